//! What changes while a link is open: its MTU, its state, the interface itself.

use std::time::{Duration, Instant};

use aoe_xdp::link::{LinkChoice, LinkError};

use crate::SHORT;
use crate::netns::{ip, isolated, veth_pair, wait_up};
use crate::station::{Station, pattern, region};

/// Frames go on at every MTU; nothing longer than the MTU is sent; what is advertised follows it.
fn a_changed_mtu_is_followed(choice: LinkChoice) {
    veth_pair(9000, 1);
    let region = region(2);
    let (_a, mut a) = Station::open("a0", LinkChoice::AfPacket, &region, 0);
    let (mut interface, mut b) = Station::open("b0", choice, &region, 1);
    let mut refused = 0;
    for (mtu, sectors) in [(9000u32, 16u8), (1500, 2), (4200, 8), (1059, 0), (9000, 16)] {
        ip(&format!("link set b0 mtu {mtu}"));
        interface.look().unwrap();
        assert_eq!((interface.info().mtu, interface.info().max_sectors), (mtu, sectors));
        assert_eq!(interface.info().note.contains("needs at least 1060"), sectors == 0);
        b.queue.set_mtu(interface.info().mtu);
        let longest = usize::try_from(mtu).unwrap() + 14;
        let too_long = b.frame(&pattern(longest + 1, 1));
        b.queue.transmit(&mut b.pool, too_long).unwrap();
        refused += 1;
        assert_eq!(b.queue.stats().tx_dropped, refused);
        b.send(&pattern(longest, mtu));
        assert!(a.collect(1)[0] == pattern(longest, mtu), "{mtu} out");
        a.send(&pattern(longest, mtu + 1));
        assert!(b.collect(1)[0] == pattern(longest, mtu + 1), "{mtu} in");
    }
    b.assert_nothing_lost();
}

#[test]
fn case_81_af_xdp_follows_the_mtu() {
    isolated("changes::case_81_af_xdp_follows_the_mtu", || a_changed_mtu_is_followed(LinkChoice::AfXdp));
}

#[test]
fn case_81_af_packet_follows_the_mtu() {
    isolated("changes::case_81_af_packet_follows_the_mtu", || {
        a_changed_mtu_is_followed(LinkChoice::AfPacket);
    });
}

/// A link that was down is as before when it is up again, and holds no frame of the time between.
fn a_link_that_was_down_goes_on(choice: LinkChoice) {
    veth_pair(1500, 1);
    let region = region(2);
    let (_a, mut a) = Station::open("a0", LinkChoice::AfPacket, &region, 0);
    let (mut interface, mut b) = Station::open("b0", choice, &region, 1);
    assert!(interface.look().unwrap().running);
    for (end, seed) in [("b0", 1), ("a0", 2)] {
        ip(&format!("link set {end} down"));
        // The kernel tells of a lost carrier a moment later.
        let until = Instant::now() + Duration::from_secs(10);
        let state = loop {
            let state = interface.look().unwrap();
            if !state.running {
                break state;
            }
            assert!(Instant::now() < until, "{end} down is never noticed");
        };
        assert_eq!(state.up, end == "a0");
        let frame = b.frame(&pattern(100, seed));
        b.queue.transmit(&mut b.pool, frame).unwrap();
        b.queue.flush();
        b.reap();
        ip(&format!("link set {end} up"));
        wait_up("a0");
        wait_up("b0");
        assert!(interface.look().unwrap().running);
        b.flush();
        a.collect_within(1, SHORT);
        a.send(&pattern(1060, seed));
        assert!(b.collect(1)[0] == pattern(1060, seed), "{end} in");
        b.send(&pattern(1060, seed + 10));
        assert!(a.collect(1)[0] == pattern(1060, seed + 10), "{end} out");
    }
    b.assert_nothing_lost();
}

#[test]
fn case_81_af_xdp_survives_a_link_that_goes_down() {
    isolated("changes::case_81_af_xdp_survives_a_link_that_goes_down", || {
        a_link_that_was_down_goes_on(LinkChoice::AfXdp);
    });
}

#[test]
fn case_81_af_packet_survives_a_link_that_goes_down() {
    isolated("changes::case_81_af_packet_survives_a_link_that_goes_down", || {
        a_link_that_was_down_goes_on(LinkChoice::AfPacket);
    });
}

/// A deleted interface, and another one under its name, are noticed; the dead queue keeps quiet.
fn a_replaced_interface_is_noticed(choice: LinkChoice) {
    veth_pair(1500, 1);
    let region = region(1);
    let (mut interface, mut b) = Station::open("b0", choice, &region, 0);
    interface.look().unwrap();
    ip("link del a0");
    assert!(matches!(interface.look(), Err(LinkError::System { .. })));
    let mut received = Vec::with_capacity(4);
    assert_eq!(b.queue.receive(&mut b.pool, &mut received), 0);
    assert!(!b.queue.has_rx());
    assert!(!readable(&b), "nothing to wake up for");
    let frame = b.frame(&pattern(100, 1));
    b.queue.transmit(&mut b.pool, frame).unwrap();
    b.queue.flush();
    veth_pair(1500, 1);
    let error = interface.look().unwrap_err();
    assert!(matches!(error, LinkError::Replaced { .. }), "{error}");
}

/// Whether a poll for input ends at once.
fn readable(station: &Station) -> bool {
    let fd = station.queue.poll_fd();
    let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut poll, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
}

#[test]
fn af_xdp_notices_a_replaced_interface() {
    isolated("changes::af_xdp_notices_a_replaced_interface", || {
        a_replaced_interface_is_noticed(LinkChoice::AfXdp);
    });
}

#[test]
fn af_packet_notices_a_replaced_interface() {
    isolated("changes::af_packet_notices_a_replaced_interface", || {
        a_replaced_interface_is_noticed(LinkChoice::AfPacket);
    });
}
