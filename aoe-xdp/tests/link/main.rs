//! The links over real virtual interfaces, each test in a network namespace of its own. Needs root.

#![allow(clippy::unwrap_used, reason = "a failure in a test's own steps is the test's failure")]

mod changes;
mod counting;
mod netns;
mod station;
mod vlans;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aoe_xdp::link::{
    Interface, LinkChoice, LinkError, LinkMode, Region, RegionConfig, Segment, Segments, TxFrame,
};
use netns::{inside_command, ip, ip_output, isolated, veth_pair, wait_up};
use station::{Station, pattern, region};

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

const SHORT: Duration = Duration::from_millis(300);

/// Frames of many sizes both ways between two links, byte for byte, in order.
fn exchange(mtu: u32, left: LinkChoice, right: LinkChoice) {
    veth_pair(mtu, 1);
    let region = region(2);
    let (_a, mut a) = Station::open("a0", left, &region, 0);
    let (_b, mut b) = Station::open("b0", right, &region, 1);
    let longest = usize::try_from(mtu).unwrap() + 14;
    let sizes = [36, 60, 64, 548, 1060, 2084, 3620, 3621, 4132, 8228, longest];
    let sizes: Vec<usize> = sizes.into_iter().filter(|size| *size <= longest).collect();
    for round in 0..3 {
        for (from, to) in [(true, false), (false, true)] {
            let (sender, receiver) = if from { (&mut a, &mut b) } else { (&mut b, &mut a) };
            assert_ne!(from, to);
            for (index, size) in sizes.iter().enumerate() {
                sender.send(&pattern(*size, round * 100 + u32::try_from(index).unwrap()));
            }
            let got = receiver.collect(sizes.len());
            for (index, (bytes, size)) in got.iter().zip(&sizes).enumerate() {
                let expected = pattern(*size, round * 100 + u32::try_from(index).unwrap());
                assert_eq!(bytes.len(), expected.len(), "round {round}");
                assert!(*bytes == expected, "frame {index} of {size} bytes, round {round}");
            }
        }
    }
    a.assert_nothing_lost();
    b.assert_nothing_lost();
    assert_eq!(a.queue.stats().tx_frames, 3 * sizes.len() as u64);
    assert_eq!(b.queue.stats().rx_frames, 3 * sizes.len() as u64);
    assert_eq!(a.pool.bytes_copied() + b.pool.bytes_copied(), 0, "no copy in user space");
}

#[test]
fn af_xdp_moves_frames_at_mtu_1500() {
    isolated("af_xdp_moves_frames_at_mtu_1500", || exchange(1500, LinkChoice::AfXdp, LinkChoice::AfXdp));
}

#[test]
fn af_xdp_moves_frames_at_mtu_9000() {
    isolated("af_xdp_moves_frames_at_mtu_9000", || exchange(9000, LinkChoice::AfXdp, LinkChoice::AfXdp));
}

#[test]
fn af_packet_moves_frames_at_mtu_1500() {
    isolated("af_packet_moves_frames_at_mtu_1500", || {
        exchange(1500, LinkChoice::AfPacket, LinkChoice::AfPacket);
    });
}

#[test]
fn af_packet_moves_frames_at_mtu_9000() {
    isolated("af_packet_moves_frames_at_mtu_9000", || {
        exchange(9000, LinkChoice::AfPacket, LinkChoice::AfPacket);
    });
}

#[test]
fn the_two_links_understand_each_other() {
    isolated("the_two_links_understand_each_other", || {
        exchange(9000, LinkChoice::AfXdp, LinkChoice::AfPacket);
    });
}

#[test]
fn what_was_obtained_is_told() {
    isolated("what_was_obtained_is_told", || {
        veth_pair(9000, 1);
        let region = region(2);
        let a = Interface::open("a0", LinkChoice::Auto, &region).unwrap();
        let info = a.info();
        assert_eq!(info.mode, LinkMode::XdpNativeCopy);
        assert_eq!((info.interface.as_str(), info.queue, info.mtu), ("a0", 0, 9000));
        assert_eq!((info.segments, info.max_sectors), (5, 16));
        assert!(info.note.contains("veth has no AF_XDP zero-copy"), "{}", info.note);
        assert!(ip_output("link show a0").contains(&mac_text(info.mac)));
        let b = Interface::open("b0", LinkChoice::AfPacket, &region).unwrap();
        assert_eq!(b.info().mode, LinkMode::Packet);
        assert_eq!(b.info().max_sectors, 16);
        assert_eq!(b.queues(), 1);
        drop((a, b));
        ip("link set a0 mtu 1500");
        ip("link set b0 mtu 1500");
        for choice in [LinkChoice::Auto, LinkChoice::AfPacket] {
            let b = Interface::open("b0", choice, &region).unwrap();
            assert_eq!(b.info().max_sectors, 2);
        }
    });
}

/// A bridge has no native XDP, so that its program runs in the generic hook.
#[test]
fn the_generic_hook_is_the_fallback() {
    isolated("the_generic_hook_is_the_fallback", || {
        veth_pair(9000, 1);
        ip("link add br0 mtu 9000 type bridge");
        ip("link set b0 master br0");
        ip("link set br0 up");
        wait_up("br0");
        let region = region(2);
        let (_a, mut a) = Station::open("a0", LinkChoice::AfPacket, &region, 0);
        let (mut bridge, mut b) = Station::open("br0", LinkChoice::AfXdp, &region, 1);
        bridge.add_mac([2, 0, 0, 0, 0, 0xbb]).unwrap();
        let info = bridge.info();
        assert_eq!(info.mode, LinkMode::XdpGeneric);
        assert!(info.note.contains("attaching the XDP program in the driver"), "{}", info.note);
        for size in [60, 1060, 3620] {
            a.send(&pattern(size, 1));
            assert!(b.collect(1)[0] == pattern(size, 1), "{size} bytes in");
            b.send(&pattern(size, 2));
            assert!(a.collect(1)[0] == pattern(size, 2), "{size} bytes out");
        }
        let largest = 36 + 512 * usize::from(info.max_sectors);
        a.send(&pattern(largest, 3));
        assert!(b.collect(1)[0] == pattern(largest, 3), "what is advertised is received");
        b.send(&pattern(largest, 4));
        assert!(a.collect(1)[0] == pattern(largest, 4), "what is advertised is sent");
        a.assert_nothing_lost();
        b.assert_nothing_lost();
    });
}

/// Whether a frame sent by `a` reaches the host's stack at `b0`, seen by a plain packet socket.
fn reaches_host(a: &mut Station, host: &mut Station) -> bool {
    a.send(&pattern(100, 9));
    !host.collect_within(1, SHORT).is_empty()
}

#[test]
fn dropping_the_interface_detaches_the_program() {
    isolated("dropping_the_interface_detaches_the_program", || {
        veth_pair(1500, 1);
        let region = region(3);
        let (_a, mut a) = Station::open("a0", LinkChoice::AfPacket, &region, 0);
        let (_host, mut host) = Station::open("b0", LinkChoice::AfPacket, &region, 1);
        assert!(reaches_host(&mut a, &mut host));
        let (interface, mut b) = Station::open("b0", LinkChoice::AfXdp, &region, 2);
        assert!(ip_output("link show b0").contains("xdp"));
        assert!(!reaches_host(&mut a, &mut host), "our frames are ours");
        b.collect(1);
        drop((interface, b));
        assert!(!ip_output("link show b0").contains("xdp"));
        assert!(reaches_host(&mut a, &mut host));
    });
}

/// Not a test alone: what the next one starts and kills.
#[test]
fn child_that_holds_b0() {
    if std::env::var_os("AOE_TEST_CHILD").is_none() {
        return;
    }
    let region = region(1);
    let (_interface, _station) = Station::open("b0", LinkChoice::AfXdp, &region, 0);
    println!("attached");
    std::thread::sleep(Duration::from_mins(1));
}

#[test]
fn a_killed_process_leaves_nothing_attached() {
    isolated("a_killed_process_leaves_nothing_attached", || {
        veth_pair(1500, 1);
        let region = region(2);
        let (_a, mut a) = Station::open("a0", LinkChoice::AfPacket, &region, 0);
        let (_host, mut host) = Station::open("b0", LinkChoice::AfPacket, &region, 1);
        let mut child = inside_command("child_that_holds_b0")
            .env("AOE_TEST_CHILD", "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.contains("attached")), "the child came up");
        assert!(!reaches_host(&mut a, &mut host), "the child has the frames");
        child.kill().unwrap();
        child.wait().unwrap();
        // At once, as a supervisor does: what the dead process had is not yet all taken apart.
        let again = Interface::open("b0", LinkChoice::AfXdp, &region).unwrap();
        assert_eq!(again.info().mode, LinkMode::XdpNativeCopy);
        drop(again);
        let until = Instant::now() + Duration::from_secs(5);
        while !reaches_host(&mut a, &mut host) {
            assert!(Instant::now() < until, "the program is still attached");
        }
    });
}

#[test]
fn a_second_queue_shares_the_memory() {
    isolated("a_second_queue_shares_the_memory", || {
        veth_pair(9000, 2);
        let region = region(4);
        let mut a = Interface::open("a0", LinkChoice::AfXdp, &region).unwrap();
        let mut b = Interface::open("b0", LinkChoice::AfXdp, &region).unwrap();
        assert_eq!((a.queues(), b.queues()), (2, 2));
        let mut left: Vec<_> = (0..2).map(|queue| Station::take(&mut a, queue, &region, queue)).collect();
        // The other way round: the second queue is bound before the first is taken.
        let mut right: Vec<_> =
            [1, 0].into_iter().map(|queue| Station::take(&mut b, queue, &region, 2 + queue)).collect();
        right.reverse();
        for queue in 0..2 {
            assert_eq!(left[queue].queue.info().queue, u16::try_from(queue).unwrap());
            let seed = u32::try_from(queue).unwrap();
            left[queue].send(&pattern(8228, seed));
            assert!(right[queue].collect(1)[0] == pattern(8228, seed), "queue {queue}");
            right[queue].send(&pattern(8228, 10 + seed));
            assert!(left[queue].collect(1)[0] == pattern(8228, 10 + seed), "queue {queue}");
        }
        for station in left.iter_mut().chain(&mut right) {
            station.assert_nothing_lost();
        }
        let mut pool_taken_before = region.pool(0);
        assert!(pool_taken_before.is_err());
        let error = a.take_queue(0, &mut left[0].pool).unwrap_err();
        assert!(matches!(error, LinkError::NoSuchQueue { queue: 0, queues: 2, .. }), "{error}");
        let error = a.take_queue(2, &mut left[0].pool).unwrap_err();
        assert!(matches!(error, LinkError::NoSuchQueue { queue: 2, .. }), "{error}");
        let _ = &mut pool_taken_before;
    });
}

/// Many times around every ring, in bursts, with both ends at work.
fn rings_go_round(choice: LinkChoice, mtu: u32, size: usize) {
    const FRAMES: u32 = 10_000;
    const WINDOW: u32 = 48;
    veth_pair(mtu, 1);
    let region = region(2);
    let (_a, mut a) = Station::open("a0", choice, &region, 0);
    let (_b, mut b) = Station::open("b0", choice, &region, 1);
    let (mut sent, mut echoed, mut back) = (0, 0, 0);
    let until = Instant::now() + Duration::from_secs(60);
    while back < FRAMES {
        assert!(Instant::now() < until, "{sent} sent, {echoed} echoed, {back} back");
        while sent < FRAMES && sent - back < WINDOW {
            let frame = a.frame(&pattern(size, sent));
            a.queue.transmit(&mut a.pool, frame).unwrap();
            sent += 1;
        }
        a.flush();
        for bytes in b.collect_within(64, Duration::ZERO) {
            assert!(bytes == pattern(size, echoed), "frame {echoed} there");
            let frame = b.frame(&bytes);
            b.queue.transmit(&mut b.pool, frame).unwrap();
            echoed += 1;
        }
        b.flush();
        for bytes in a.collect_within(64, Duration::ZERO) {
            assert!(bytes == pattern(size, back), "frame {back} back");
            back += 1;
        }
    }
    assert_eq!(a.queue.stats().rx_frames, u64::from(FRAMES));
    a.assert_nothing_lost();
    b.assert_nothing_lost();
}

#[test]
fn af_xdp_rings_go_round() {
    isolated("af_xdp_rings_go_round", || rings_go_round(LinkChoice::AfXdp, 9000, 4132));
}

#[test]
fn af_packet_batches_go_round() {
    isolated("af_packet_batches_go_round", || rings_go_round(LinkChoice::AfPacket, 9000, 4132));
}

/// After a queue was taken, moving frames allocates nothing, full rings and empty ones included.
fn moving_frames_allocates_nothing(choice: LinkChoice) {
    veth_pair(9000, 1);
    let region = region(2);
    let (_a, mut a) = Station::open("a0", choice, &region, 0);
    let (_b, mut b) = Station::open("b0", choice, &region, 1);
    let mut received = Vec::with_capacity(64);
    let head = pattern(36, 0);
    let before = counting::allocations();
    let until = Instant::now() + Duration::from_secs(30);
    let mut moved = 0;
    while moved < 5000 && Instant::now() < until {
        for _ in 0..16 {
            let mut header = a.pool.take_header().unwrap();
            a.pool.header_bytes_mut(&mut header)[..36].copy_from_slice(&head);
            let mut data = Segments::new();
            for _ in 0..2 {
                let chunk = a.pool.take_chunk().unwrap();
                data.push(Segment { chunk, offset: 0, len: 4096 }).unwrap();
            }
            if let Err(frame) = a.queue.transmit(&mut a.pool, TxFrame { header, header_len: 36, data }) {
                a.pool.release_header(frame.header);
                frame.data.into_iter().for_each(|segment| a.pool.release(segment.chunk));
            }
        }
        while !a.queue.flush() {
            a.reap();
        }
        a.reap();
        while b.queue.receive(&mut b.pool, &mut received) > 0 {
            for frame in received.drain(..) {
                moved += 1;
                frame.release(&mut b.pool);
            }
        }
    }
    let after = counting::allocations();
    assert!(moved >= 5000, "{moved} frames");
    assert_eq!(after - before, 0, "allocations");
    drop(pattern(36, 1));
    assert!(counting::allocations() > after, "the counter counts");
}

#[test]
fn af_xdp_allocates_nothing_after_its_start() {
    isolated("af_xdp_allocates_nothing_after_its_start", || {
        moving_frames_allocates_nothing(LinkChoice::AfXdp);
    });
}

#[test]
fn af_packet_allocates_nothing_after_its_start() {
    isolated("af_packet_allocates_nothing_after_its_start", || {
        moving_frames_allocates_nothing(LinkChoice::AfPacket);
    });
}

/// Chunks of another core are sent in place and come back to be sent home.
fn chunks_of_another_core_come_back(choice: LinkChoice) {
    veth_pair(9000, 1);
    let region = region(3);
    let (_a, mut a) = Station::open("a0", choice, &region, 0);
    let (_b, mut b) = Station::open("b0", choice, &region, 1);
    let mut elsewhere = region.pool(2).unwrap();
    let mut frame = a.frame(&pattern(36, 5));
    let mut data = Segments::new();
    for part in 0..2u8 {
        let mut chunk = elsewhere.take_chunk().unwrap();
        elsewhere.bytes_mut(&mut chunk).fill(part);
        data.push(Segment { chunk, offset: 0, len: 4096 }).unwrap();
    }
    frame.data = data;
    a.queue.transmit(&mut a.pool, frame).unwrap();
    let mut home = Vec::new();
    let until = Instant::now() + Duration::from_secs(5);
    while home.len() < 2 && Instant::now() < until {
        a.queue.flush();
        a.queue.reap(&mut a.pool, &mut |chunk| home.push(chunk));
    }
    assert_eq!(home.len(), 2);
    home.into_iter().for_each(|chunk| elsewhere.release(chunk));
    assert_eq!(elsewhere.free_chunks(), elsewhere.chunk_capacity());
    let got = &b.collect(1)[0];
    assert_eq!(got.len(), 8228);
    assert!(got[36..4132].iter().all(|byte| *byte == 0) && got[4132..].iter().all(|byte| *byte == 1));
    a.assert_nothing_lost();
}

#[test]
fn af_xdp_gives_chunks_of_another_core_back() {
    isolated("af_xdp_gives_chunks_of_another_core_back", || {
        chunks_of_another_core_come_back(LinkChoice::AfXdp);
    });
}

#[test]
fn af_packet_gives_chunks_of_another_core_back() {
    isolated("af_packet_gives_chunks_of_another_core_back", || {
        chunks_of_another_core_come_back(LinkChoice::AfPacket);
    });
}

/// One chunk in many frames at once: each completion gives back one handle.
#[test]
fn a_shared_chunk_is_free_after_its_last_frame() {
    isolated("a_shared_chunk_is_free_after_its_last_frame", || {
        veth_pair(9000, 1);
        let region = region(2);
        let (_a, mut a) = Station::open("a0", LinkChoice::AfXdp, &region, 0);
        let (_b, mut b) = Station::open("b0", LinkChoice::AfXdp, &region, 1);
        let mut chunk = a.pool.take_chunk().unwrap();
        a.pool.bytes_mut(&mut chunk).fill(0x5a);
        for part in 0..8u16 {
            let mut frame = a.frame(&pattern(36, 0));
            let slice = Segment { chunk: a.pool.share(&chunk), offset: part * 512, len: 512 };
            frame.data.push(slice).unwrap();
            a.queue.transmit(&mut a.pool, frame).unwrap();
        }
        a.flush();
        for bytes in b.collect(8) {
            assert_eq!(bytes.len(), 548);
            assert!(bytes[36..].iter().all(|byte| *byte == 0x5a));
        }
        let until = Instant::now() + Duration::from_secs(5);
        while a.pool.references(&chunk) > 1 {
            assert!(Instant::now() < until);
            a.flush();
        }
        a.pool.release(chunk);
        a.assert_nothing_lost();
    });
}

/// A full ring hands the frame back whole; after a flush there is room again, and no frame is lost.
fn a_full_ring_hands_frames_back(choice: LinkChoice) {
    veth_pair(1500, 1);
    let config = RegionConfig { cores: 2, chunks_per_core: 8192, headers_per_core: 4096 };
    let region = Region::new(config).unwrap();
    let (_a, mut a) = Station::open("a0", choice, &region, 0);
    let (_b, mut b) = Station::open("b0", LinkChoice::AfXdp, &region, 1);
    let mut queued = 0;
    let (bytes, refused) = loop {
        let bytes = pattern(60, queued);
        let frame = a.frame(&bytes);
        match a.queue.transmit(&mut a.pool, frame) {
            Ok(()) => queued += 1,
            Err(frame) => break (bytes, frame),
        }
    };
    assert!(queued >= 1024 && a.queue.tx_pending());
    assert_eq!(a.queue.stats().tx_ring_full, 1);
    let mut refused = Some(refused);
    let mut received = Vec::new();
    let until = Instant::now() + Duration::from_secs(10);
    while u32::try_from(received.len()).unwrap() <= queued {
        assert!(Instant::now() < until, "{} of {queued}: {:?}", received.len(), b.queue.stats());
        a.queue.flush();
        a.reap();
        received.extend(b.collect_within(64, Duration::from_millis(1)));
        if let Some(frame) = refused.take() {
            refused = a.queue.transmit(&mut a.pool, frame).err();
        }
    }
    assert!(received.last() == Some(&bytes), "the frame that had no room comes last");
    a.assert_nothing_lost();
    b.assert_nothing_lost();
}

#[test]
fn a_full_af_xdp_ring_hands_frames_back() {
    isolated("a_full_af_xdp_ring_hands_frames_back", || a_full_ring_hands_frames_back(LinkChoice::AfXdp));
}

#[test]
fn a_full_af_packet_queue_hands_frames_back() {
    isolated("a_full_af_packet_queue_hands_frames_back", || {
        a_full_ring_hands_frames_back(LinkChoice::AfPacket);
    });
}

/// Frames that can never be sent are counted and come back; the ones around them are sent.
fn impossible_frames_are_counted(choice: LinkChoice) {
    veth_pair(1500, 1);
    let region = region(2);
    let (_a, mut a) = Station::open("a0", choice, &region, 0);
    let (_b, mut b) = Station::open("b0", LinkChoice::AfXdp, &region, 1);
    let too_long = a.frame(&pattern(1515, 0));
    a.queue.transmit(&mut a.pool, too_long).unwrap();
    let no_header = TxFrame { header_len: 0, ..a.frame(&pattern(60, 0)) };
    a.queue.transmit(&mut a.pool, no_header).unwrap();
    let mut outside = a.frame(&pattern(36, 0));
    let chunk = a.pool.take_chunk().unwrap();
    outside.data.push(Segment { chunk, offset: 4000, len: 200 }).unwrap();
    a.queue.transmit(&mut a.pool, outside).unwrap();
    a.send(&pattern(1514, 7));
    assert!(b.collect(1)[0] == pattern(1514, 7));
    assert_eq!(a.queue.stats().tx_dropped, 3);
    assert!(b.collect_within(1, SHORT).is_empty());
    a.assert_nothing_lost();
}

#[test]
fn af_xdp_counts_impossible_frames() {
    isolated("af_xdp_counts_impossible_frames", || impossible_frames_are_counted(LinkChoice::AfXdp));
}

#[test]
fn af_packet_counts_impossible_frames() {
    isolated("af_packet_counts_impossible_frames", || impossible_frames_are_counted(LinkChoice::AfPacket));
}

/// Tagged and foreign frames are not ours: neither link delivers them.
#[test]
fn tagged_and_foreign_frames_are_left_alone() {
    isolated("tagged_and_foreign_frames_are_left_alone", || {
        veth_pair(1500, 1);
        let region = region(3);
        let (_a, mut a) = Station::open("a0", LinkChoice::AfPacket, &region, 0);
        let (_host, mut host) = Station::open("b0", LinkChoice::AfPacket, &region, 1);
        let (_b, mut b) = Station::open("b0", LinkChoice::AfXdp, &region, 2);
        let mut foreign = pattern(200, 1);
        foreign[12..14].copy_from_slice(&[0x08, 0x00]);
        let mut tagged = pattern(200, 2);
        tagged[12..18].copy_from_slice(&[0x81, 0x00, 0x00, 0x05, 0x88, 0xa2]);
        a.send(&foreign);
        a.send(&tagged);
        a.send(&pattern(200, 3));
        assert!(b.collect(1)[0] == pattern(200, 3), "only the AoE frame");
        assert!(b.collect_within(1, SHORT).is_empty());
        assert!(host.collect_within(1, SHORT).is_empty());
    });
}

/// Frames longer than what one frame may be made of are dropped and counted, and their chunks come back.
#[test]
fn frames_of_too_many_segments_are_dropped() {
    isolated("frames_of_too_many_segments_are_dropped", || {
        veth_pair(16_000, 1);
        let region = region(3);
        let (_a, mut a) = Station::open("a0", LinkChoice::AfXdp, &region, 0);
        let (_packet, mut host) = Station::open("b0", LinkChoice::AfPacket, &region, 1);
        a.send(&pattern(15_000, 1));
        assert!(host.collect_within(1, SHORT).is_empty());
        assert_eq!(host.queue.stats().rx_invalid, 1, "truncated");
        let (_b, mut b) = Station::open("b0", LinkChoice::AfXdp, &region, 2);
        a.send(&pattern(15_000, 1));
        a.send(&pattern(14_480, 2));
        assert!(b.collect(1)[0] == pattern(14_480, 2));
        assert_eq!(b.queue.stats().rx_invalid, 1, "five segments");
        b.assert_nothing_lost();
    });
}

/// A receiver without empty chunks drops, counts, and goes on when there are chunks again.
#[test]
fn running_out_of_chunks_drops_and_recovers() {
    isolated("running_out_of_chunks_drops_and_recovers", || {
        veth_pair(1500, 1);
        let region = region(2);
        let (_a, mut a) = Station::open("a0", LinkChoice::AfPacket, &region, 0);
        let (_b, mut b) = Station::open("b0", LinkChoice::AfXdp, &region, 1);
        let mut held = Vec::new();
        while let Some(chunk) = b.pool.take_chunk() {
            held.push(chunk);
        }
        let filled = usize::try_from(b.queue.stats().fill_chunks).unwrap();
        assert_eq!(filled, 512, "a quarter of the core's chunks");
        let mut keep = Vec::with_capacity(2048);
        for seed in 0..u32::try_from(filled).unwrap() + 100 {
            a.send(&pattern(60, seed));
        }
        let until = Instant::now() + Duration::from_secs(5);
        while keep.len() < filled && Instant::now() < until {
            b.queue.receive(&mut b.pool, &mut keep);
        }
        assert_eq!(keep.len(), filled);
        assert_eq!(b.queue.stats().rx_dropped, 100);
        keep.drain(..).for_each(|frame| frame.release(&mut b.pool));
        held.into_iter().for_each(|chunk| b.pool.release(chunk));
        b.queue.receive(&mut b.pool, &mut keep);
        a.send(&pattern(60, 7));
        assert!(b.collect(1)[0] == pattern(60, 7));
        b.assert_nothing_lost();
    });
}

/// Polling for input wakes on a frame, and only then.
#[test]
fn readiness_is_pollable() {
    isolated("readiness_is_pollable", || {
        veth_pair(1500, 1);
        let region = region(3);
        let (_a, mut a) = Station::open("a0", LinkChoice::AfPacket, &region, 0);
        let links = [("b0", LinkChoice::AfPacket, 1), ("b0", LinkChoice::AfXdp, 2)];
        for (name, choice, core) in links {
            let (_b, mut b) = Station::open(name, choice, &region, core);
            assert!(!b.queue.has_rx());
            a.send(&pattern(60, 1));
            let until = Instant::now() + Duration::from_secs(5);
            while !b.queue.has_rx() {
                assert!(Instant::now() < until);
            }
            b.collect(1);
            assert!(!b.queue.has_rx());
        }
    });
}

#[test]
fn extra_addresses_are_accepted_while_wanted() {
    isolated("extra_addresses_are_accepted_while_wanted", || {
        veth_pair(1500, 1);
        let region = region(1);
        // A virtual interface has no address filter: the kernel makes it promiscuous instead.
        let promiscuity = || {
            let text = ip_output("-details link show b0");
            let mut words = text.split_whitespace().skip_while(|word| *word != "promiscuity");
            words.nth(1).unwrap().parse::<u32>().unwrap()
        };
        let mut b = Interface::open("b0", LinkChoice::AfXdp, &region).unwrap();
        let (first, second) = ([2, 0, 0, 0, 1, 0], [2, 0, 0, 0, 2, 0]);
        assert_eq!(promiscuity(), 0);
        for mac in [first, second, first, b.info().mac] {
            b.add_mac(mac).unwrap();
        }
        assert_eq!(promiscuity(), 1);
        b.remove_mac(first).unwrap();
        assert_eq!(promiscuity(), 1, "the second is still wanted");
        b.remove_mac(second).unwrap();
        b.remove_mac(second).unwrap();
        assert_eq!(promiscuity(), 0);
        b.add_mac(first).unwrap();
        drop(b);
        assert_eq!(promiscuity(), 0, "nothing stays behind");
    });
}

#[test]
fn wrong_interfaces_are_refused_with_the_next_step() {
    isolated("wrong_interfaces_are_refused_with_the_next_step", || {
        ip("link add a0 type veth peer name b0");
        let region = region(1);
        let open = |choice| Interface::open("a0", choice, &region).unwrap_err();
        for choice in [LinkChoice::Auto, LinkChoice::AfXdp, LinkChoice::AfPacket] {
            let error = Interface::open("nothere0", choice, &region).unwrap_err();
            assert!(matches!(error, LinkError::UnknownInterface { .. }), "{error}");
            assert!(error.to_string().contains("\"nothere0\""), "{error}");
            let error = open(choice);
            assert!(matches!(error, LinkError::Down { .. }), "{error}");
            assert!(error.to_string().contains("ip link set a0 up"), "{error}");
        }
        ip("link set a0 mtu 1059 up");
        let error = open(LinkChoice::Auto);
        assert!(matches!(error, LinkError::MtuTooSmall { mtu_bytes: 1059, .. }), "{error}");
        assert!(error.to_string().contains("1060"), "{error}");
        ip("link set a0 mtu 1060");
        let smallest = Interface::open("a0", LinkChoice::Auto, &region).unwrap();
        assert_eq!(smallest.info().max_sectors, 2);
    });
}

#[test]
fn a_busy_interface_is_refused_or_taken_by_af_packet() {
    isolated("a_busy_interface_is_refused_or_taken_by_af_packet", || {
        veth_pair(1500, 1);
        let region = region(1);
        let _first = Interface::open("b0", LinkChoice::AfXdp, &region).unwrap();
        let error = Interface::open("b0", LinkChoice::AfXdp, &region).unwrap_err();
        assert!(matches!(error, LinkError::NoAfXdp { .. }), "{error}");
        assert!(error.to_string().contains("busy"), "{error}");
        let second = Interface::open("b0", LinkChoice::Auto, &region).unwrap();
        assert_eq!(second.info().mode, LinkMode::Packet);
        assert!(second.info().note.contains("busy"), "{}", second.info().note);
    });
}

/// Not a test alone: what the next one starts with fewer privileges.
#[test]
fn child_that_opens_b0() {
    let Ok(choice) = std::env::var("AOE_TEST_CHOICE") else { return };
    match Interface::open("b0", choice.parse().unwrap(), &region(1)) {
        Ok(interface) => println!("opened: {} ({})", interface.info().mode, interface.info().note),
        Err(error) => println!("refused: {error}"),
    }
}

#[test]
fn missing_privileges_are_named() {
    isolated("missing_privileges_are_named", || {
        veth_pair(1500, 1);
        let without = |capabilities: &str, choice: &str| {
            let inside = inside_command("child_that_opens_b0");
            let output = Command::new("setpriv")
                .arg(format!("--bounding-set={capabilities}"))
                .arg("--")
                .arg(inside.get_program())
                .args(inside.get_args())
                .envs(inside.get_envs().filter_map(|(name, value)| Some((name, value?))))
                .env("AOE_TEST_CHOICE", choice)
                .output()
                .expect("setpriv(1) of util-linux runs");
            let text = String::from_utf8(output.stdout).unwrap();
            text.lines().find(|line| line.contains("opened") || line.contains("refused")).unwrap().to_owned()
        };
        for choice in ["auto", "af-xdp", "af-packet"] {
            let line = without("-net_raw", choice);
            assert!(line.contains("refused") && line.contains("CAP_NET_RAW"), "{line}");
        }
        let line = without("-bpf,-sys_admin", "af-xdp");
        assert!(line.contains("refused") && line.contains("CAP_BPF"), "{line}");
        let line = without("-net_admin,-sys_admin", "af-xdp");
        assert!(line.contains("refused") && line.contains("CAP_NET_ADMIN"), "{line}");
        let line = without("-bpf,-sys_admin", "auto");
        assert!(line.contains("opened: packet") && line.contains("CAP_BPF"), "{line}");
        let line = without("-net_admin,-sys_admin", "auto");
        assert!(line.contains("opened: packet") && line.contains("rmem_max"), "{line}");
    });
}

/// CAP_IPC_LOCK matters only where the locked-memory limit is below the region.
#[test]
fn a_low_memory_lock_limit_is_named() {
    isolated("a_low_memory_lock_limit_is_named", || {
        veth_pair(1500, 1);
        let inside = inside_command("child_that_opens_b0");
        let output = Command::new("prlimit")
            .args(["--memlock=65536:65536", "setpriv", "--bounding-set=-ipc_lock", "--"])
            .arg(inside.get_program())
            .args(inside.get_args())
            .envs(inside.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env("AOE_TEST_CHOICE", "af-xdp")
            .output()
            .expect("prlimit(1) of util-linux runs");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("refused") && text.contains("CAP_IPC_LOCK"), "{text}");
    });
}

/// The hardware address as ip(8) writes it.
fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
