//! How frames reach the core that serves their export, where one queue brings them all.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aoe_xdp::wire::{Address, AtaArg, AtaHead, Header, Mac, command};
use cluster_map::{Counter, DesiredExport, LinkChoice, LinkLosses, SteeringChoice};
use zerocopy::IntoBytes;

use crate::links::{Initiator, SOON, mac_on};
use crate::netns::{ip, isolated, veth_pair, wait_up};
use crate::node::{Node, Station, export};

/// A counter of each core.
fn counts(node: &Node, counter: Counter) -> Vec<u64> {
    node.control.stats().iter().map(|core| core.get(counter)).collect()
}

/// Writes and reads exports at the same time, each by an initiator of its own on `netdev`, until `work` is done; how often
/// each went round.
fn verified_beside(
    netdev: &'static str,
    vlans: &'static [(u8, u16)],
    exports: &[(DesiredExport, Mac)],
    work: impl FnOnce(),
) -> Vec<u32> {
    let stop = Arc::new(AtomicBool::new(false));
    let initiators: Vec<_> = (1u8..)
        .zip(exports)
        .map(|(number, (exported, mac))| {
            let (stop, exported, mac) = (Arc::clone(&stop), exported.clone(), *mac);
            std::thread::spawn(move || {
                let mut initiator = Initiator::open(netdev, 0x40 + number, vlans);
                initiator.verify_until(&exported, mac, &stop)
            })
        })
        .collect();
    work();
    stop.store(true, Ordering::Relaxed);
    initiators.into_iter().map(|one| one.join().expect("no error and no wrong data")).collect()
}

/// Rounds in a second that no core makes which is not woken by its frames: it looks at them twice a second.
const AWAKE: u32 = 10;

fn at_leisure() {
    std::thread::sleep(Duration::from_secs(1));
}

/// Verified requests to exports of both cores at once, with one queue, which is the first core's: the second core gets its
/// own by itself, or by hand-over, and the note says so.
fn two_cores(link: LinkChoice, steering: SteeringChoice, expected_note: &str, steered: bool) {
    veth_pair(9000, 1);
    let mut node = Node::start_steering(&["a0"], link, steering, 2, 4);
    node.export((0..4).map(export).collect());
    let seen = node.wait("the link is up", |seen| seen.links[0].up);
    assert_eq!(seen.links.len(), 1, "one queue");
    assert!(seen.links[0].note.contains(expected_note), "{}", seen.links[0].note);
    let exports: Vec<_> = (0..4).map(export).map(|one| (one.clone(), mac_on(&one, 0))).collect();
    let rounds = verified_beside("b0", &[(0, 0)], &exports, at_leisure);
    assert!(rounds.iter().all(|rounds| *rounds > AWAKE), "{rounds:?}");
    let (received, handed) = (counts(&node, Counter::RxFrames), counts(&node, Counter::HandedOver));
    let requests = |core: usize| 2 * u64::from(rounds[core] + rounds[core + 2]);
    if steered {
        assert_eq!(handed, [0, 0]);
        assert!(received[1] >= requests(1), "{received:?} {rounds:?}");
    } else {
        assert_eq!(received[1], 0);
        assert!(handed[0] >= requests(1), "{handed:?} {rounds:?}");
    }
    // What is for everybody comes to the owner of the queue, who hands it over.
    let mut initiator = Initiator::open("b0", 0x50, &[(0, 0)]);
    let tag = initiator.ask(0, &export(1), Mac::BROADCAST, AtaArg::identify(), &[]);
    assert!(initiator.answer(tag, SOON).is_some());
    assert_eq!(counts(&node, Counter::HandedOver)[0], handed[0] + 1);
    node.stop();
}

#[test]
fn the_xdp_program_brings_frames_to_the_core_that_serves_them() {
    isolated("steering::the_xdp_program_brings_frames_to_the_core_that_serves_them", || {
        let note = "the XDP program steers 4 of 4 addresses to their cores";
        two_cores(LinkChoice::AfXdp, SteeringChoice::Program, note, true);
    });
}

#[test]
fn cores_hand_over_where_nothing_is_to_steer() {
    isolated("steering::cores_hand_over_where_nothing_is_to_steer", || {
        let note = "cores hand frames over (as --steering says)";
        two_cores(LinkChoice::AfXdp, SteeringChoice::HandOver, note, false);
    });
}

#[test]
fn cores_hand_over_what_af_packet_brings() {
    isolated("steering::cores_hand_over_what_af_packet_brings", || {
        let note = "cores hand frames over (one AF_PACKET socket takes all of them)";
        two_cores(LinkChoice::AfPacket, SteeringChoice::Program, note, false);
    });
}

#[test]
fn a_nic_of_one_queue_has_nothing_to_steer_by() {
    isolated("steering::a_nic_of_one_queue_has_nothing_to_steer_by", || {
        let note = "cores hand frames over (there is one queue)";
        two_cores(LinkChoice::AfXdp, SteeringChoice::Nic, note, false);
    });
}

/// Behind the generic hook, where a frame is a socket buffer first.
#[test]
fn frames_are_steered_behind_the_generic_hook() {
    isolated("steering::frames_are_steered_behind_the_generic_hook", || {
        veth_pair(9000, 1);
        ip("link add br0 mtu 9000 type bridge");
        ip("link set b0 master br0");
        ip("link set br0 up");
        wait_up("br0");
        let mut node = Node::start_steering(&["br0"], LinkChoice::AfXdp, SteeringChoice::Program, 2, 2);
        node.export(vec![export(0), export(1)]);
        let seen = node.wait("the link is up", |seen| seen.links[0].up);
        assert_eq!(seen.links[0].mode, cluster_map::LinkMode::XdpGeneric);
        assert!(seen.links[0].note.contains("steers 2 of 2"), "{}", seen.links[0].note);
        let exports = [0, 1].map(export).map(|one| (one.clone(), mac_on(&one, 0)));
        let rounds = verified_beside("a0", &[(0, 0)], &exports, at_leisure);
        assert!(rounds.iter().all(|rounds| *rounds > AWAKE), "{rounds:?}");
        assert_eq!(counts(&node, Counter::HandedOver), [0, 0]);
        assert!(counts(&node, Counter::RxFrames)[1] > 0);
        node.stop();
    });
}

/// Two VLANs of one NIC, each export on both: four addresses, and jumbo frames of several pieces.
#[test]
fn frames_of_vlans_are_steered() {
    isolated("steering::frames_of_vlans_are_steered", || {
        veth_pair(9000, 1);
        let vlans = ["a0@100", "a0@200"];
        let mut node = Node::start_steering(&vlans, LinkChoice::AfXdp, SteeringChoice::Program, 2, 2);
        node.export(vec![export(0), export(1)]);
        let seen = node.wait("the VLANs are up", |seen| seen.links.iter().all(|link| link.up));
        assert!(seen.links[0].note.contains("steers 4 of 4"), "{}", seen.links[0].note);
        let mut client = Initiator::open("b0", 1, &[(0, 100), (1, 200)]);
        for round in 0..100u8 {
            for exported in [export(0), export(1)] {
                let data: Vec<u8> = (0..8192usize).map(|at| round ^ at.to_le_bytes()[0]).collect();
                let (write, read) = (round % 2, 1 - round % 2);
                let arg = AtaArg::read_write_ext(16, 16, true);
                let tag = client.ask(write, &exported, mac_on(&exported, write), arg, &data);
                assert_eq!(client.answer(tag, SOON).expect("an answer").0, write);
                let arg = AtaArg::read_write_ext(16, 16, false);
                let tag = client.ask(read, &exported, mac_on(&exported, read), arg, &[]);
                let (by, frame) = client.answer(tag, SOON).expect("an answer");
                assert!(by == read && frame[36..] == data, "round {round}");
            }
        }
        assert_eq!(counts(&node, Counter::HandedOver), [0, 0]);
        assert_eq!(counts(&node, Counter::RxFrames)[1], 200);
        node.stop();
    });
}

/// Exports come, go and come back at other keys, hence at other cores, while others are used: the map follows.
#[test]
fn the_map_follows_the_exports_under_load() {
    isolated("steering::the_map_follows_the_exports_under_load", || {
        veth_pair(9000, 1);
        let mut node = Node::start_steering(&["a0"], LinkChoice::AfXdp, SteeringChoice::Program, 2, 6);
        let constant = vec![export(0), export(1)];
        node.export(constant.clone());
        let under_load = [0, 1].map(export).map(|one| (one.clone(), mac_on(&one, 0)));
        let rounds = verified_beside("b0", &[(0, 0)], &under_load, || {
            let mut client = Initiator::open("b0", 0x60, &[(0, 0)]);
            for round in 0..60u16 {
                let coming: Vec<_> =
                    (2..6).filter(|n| (round >> (n - 2)) & 1 == 0 || n % 4 == round % 4).collect();
                node.export(constant.iter().cloned().chain(coming.iter().copied().map(export)).collect());
                let count = 2 + coming.len();
                let note = format!("the XDP program steers {count} of {count} addresses");
                node.wait("the note follows", |seen| seen.links[0].note.contains(&note));
                let data = [u8::try_from(round).unwrap() + 1; 1024];
                for exported in coming.into_iter().map(export) {
                    client.write(&exported, mac_on(&exported, 0), 2, &data);
                    assert!(client.read(&exported, mac_on(&exported, 0), 2, 2) == data);
                }
            }
        });
        assert!(rounds.iter().all(|rounds| *rounds > 0), "{rounds:?}");
        node.stop();
    });
}

/// A write of 8 KiB with that tag, or the same to a slot that nobody has, which is met with silence.
fn jumbo_write(exported: &DesiredExport, tag: u32, is_served: bool) -> Vec<u8> {
    let client = Mac([0x02, 0, 0, 0, 0xc1, 0x70]);
    let slot = if is_served { exported.slot } else { 200 };
    let address = Address { shelf: exported.shelf, slot };
    let header = Header::request(mac_on(exported, 0), client, address, command::ATA, tag);
    let arg = AtaArg::read_write_ext(u64::from(tag % 400) * 16, 16, true);
    [AtaHead { header, arg }.as_bytes(), &[tag.to_le_bytes()[0]; 8192]].concat()
}

/// Frames of several chunks each, far more of them than the node has memory for: every chunk comes back, for requests that
/// are served and for those that are refused, from the owner of the queue and from the other core.
#[test]
fn no_chunk_is_lost_in_a_long_run() {
    const REQUESTS: u32 = 60_000;
    const WINDOW: usize = 16;
    isolated("steering::no_chunk_is_lost_in_a_long_run", || {
        veth_pair(9000, 1);
        let mut node = Node::start_steering(&["a0"], LinkChoice::AfXdp, SteeringChoice::Program, 2, 2);
        node.export(vec![export(0), export(1)]);
        let mut station = Station::open();
        let is_served = |tag: u32| tag % 8 <= 5;
        let mut waiting = BTreeSet::new();
        for tag in 1..=REQUESTS {
            let exported = export(u16::try_from(tag % 2).unwrap());
            station.send(&jumbo_write(&exported, tag, is_served(tag)));
            if is_served(tag) {
                waiting.insert(tag);
            }
            while waiting.len() >= WINDOW || tag == REQUESTS && !waiting.is_empty() {
                let answer = station.receive_where(|tag| waiting.contains(&tag), SOON);
                let answer = answer.unwrap_or_else(|| panic!("at {tag}: {waiting:?} are not answered"));
                waiting.remove(&u32::from_be_bytes(answer[20..24].try_into().unwrap()));
            }
        }
        assert_eq!(counts(&node, Counter::HandedOver), [0, 0]);
        assert_eq!(counts(&node, Counter::RxFrames), [u64::from(REQUESTS) / 2; 2], "nothing was sent twice");
        assert_eq!(counts(&node, Counter::MemoryExhausted), [0, 0]);
        let seen = node.wait("it serves", |_| true);
        assert_eq!(seen.links[0].losses, LinkLosses::default());
        node.stop();
    });
}

/// Waits until it is so, and leaves the CPUs to the cores meanwhile.
fn wait_until(it_is_so: impl Fn() -> bool, otherwise: &str) {
    let begin = Instant::now();
    while !it_is_so() {
        assert!(begin.elapsed() < SOON, "{otherwise}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// The owner of the queue has nothing to do, and sleeps, while the other core receives what needs no answer: it is woken to
/// give the kernel chunks again.
///
/// An owner that was woken needs its CPU too, which may be this thread's or anybody's: in the few milliseconds until it gets
/// it, a sender that does not wait uses up all chunks there are. So this one waits for it, and every frame must arrive.
#[test]
fn an_owner_that_sleeps_keeps_the_others_in_chunks() {
    const BURSTS: u32 = 2000;
    const BURST: u32 = 4;
    /// Bursts without a sign of the owner: more than enough chunks to wake it, and a fifth of what the kernel has.
    const AHEAD: u32 = 32;
    /// Well beyond what the scheduler makes it wait, well below the half second after which it looks by itself.
    const LATE: Duration = Duration::from_millis(300);
    isolated("steering::an_owner_that_sleeps_keeps_the_others_in_chunks", || {
        veth_pair(9000, 1);
        let mut node = Node::start_steering(&["a0"], LinkChoice::AfXdp, SteeringChoice::Program, 2, 2);
        node.export(vec![export(0), export(1)]);
        let mut station = Station::open();
        let received = || counts(&node, Counter::RxFrames);
        // It grows whenever the owner falls asleep or is woken: one that is awake falls asleep, one that sleeps on enough
        // chunks is woken.
        let signs = || counts(&node, Counter::Sleeps)[0] + counts(&node, Counter::Wakeups)[0];
        let before = received();
        let (mut seen, mut ahead, mut since, mut late) = (signs(), 0, Instant::now(), 0);
        for _ in 0..BURSTS {
            let wanted = received()[1] + u64::from(BURST);
            for tag in 0..BURST {
                station.send(&jumbo_write(&export(1), tag, false));
            }
            wait_until(|| received()[1] >= wanted, "a frame was lost for want of chunks");
            if ahead == 0 {
                since = Instant::now();
            }
            ahead += 1;
            wait_until(|| ahead < AHEAD || signs() != seen, "the owner is dead");
            let now = signs();
            if now != seen {
                // Twice may be a machine that stood still.
                late += u32::from(since.elapsed() > LATE);
                assert!(late <= 2, "{late} times the owner was not woken until it looked by itself");
                (seen, ahead) = (now, 0);
            }
        }
        assert_eq!(received()[0], before[0], "the owner had no frame");
        node.stop();
    });
}
