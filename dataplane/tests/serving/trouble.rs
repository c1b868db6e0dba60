//! A core under what it cannot bear: a hostile neighbour, more requests than it has memory for. What is served is right,
//! what cannot be is dropped and counted, nothing is lost for good, and all of it passes without a restart.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use aoe_xdp::target::BUFFER_COUNT;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::*;

/// When a client sends a request again, under a new tag.
const RESEND_AFTER: Duration = Duration::from_millis(100);

/// A client that sends again what is not answered. It stays on one CPU: a veth without an XDP program queues frames for each
/// sending CPU, so that a resend from another one could overtake its first copy, and the copy a newer write.
struct Patient {
    station: Station,
    _interface: Interface,
    next_tag: u32,
    /// Requests that had to be sent again.
    resent: u64,
}

impl Patient {
    fn open(name: &str) -> Patient {
        let mut one = CpuSet::new();
        one.set(rustix::thread::sched_getcpu());
        sched_setaffinity(None, &one).expect("a thread may stay where it is");
        let (interface, station) = Station::open(name, LinkChoice::AfPacket, &station::region(1), 0);
        Patient { station, _interface: interface, next_tag: 1, resent: 0 }
    }

    fn send(&mut self, (slot, arg, data): &(u8, AtaArg, Vec<u8>)) -> u32 {
        let tag = self.next_tag;
        self.next_tag += 1;
        let header = Header::request(export(*slot).mac, CLIENT, export(*slot).address, command::ATA, tag);
        self.station.send(&[AtaHead { header, arg: *arg }.as_bytes(), data].concat());
        tag
    }

    /// Does all requests, `window` at a time; the answers in the order of the requests. Answers to a copy count, as long as
    /// no other has come: requests of one call must not overlap.
    fn run(&mut self, requests: &[(u8, AtaArg, Vec<u8>)], window: usize) -> Vec<Vec<u8>> {
        let mut answers = vec![Vec::new(); requests.len()];
        let mut tags: HashMap<u32, usize> = HashMap::new();
        let mut waiting: Vec<(usize, Instant)> = Vec::new();
        let (mut sent, mut done) = (0, 0);
        let deadline = Instant::now() + Duration::from_secs(120);
        while done < requests.len() {
            assert!(Instant::now() < deadline, "{done} of {} done: the rest never ends", requests.len());
            while sent < requests.len() && waiting.len() < window {
                tags.insert(self.send(&requests[sent]), sent);
                waiting.push((sent, Instant::now()));
                sent += 1;
            }
            for frame in self.station.collect_within(1, Duration::from_millis(20)) {
                let Ok(head) = parse_ata(&frame) else { continue };
                let Some(&index) = tags.get(&head.header.tag.get()).filter(|_| head.header.dst == CLIENT)
                else {
                    continue;
                };
                assert_eq!(head.header.version_flags, 0x18, "a response without an AoE error");
                assert_eq!(status(&frame), 0x40);
                if answers[index].is_empty() {
                    answers[index] = frame;
                    done += 1;
                    waiting.retain(|(waiting, _)| *waiting != index);
                }
            }
            for at in 0..waiting.len() {
                if waiting[at].1.elapsed() > RESEND_AFTER {
                    tags.insert(self.send(&requests[waiting[at].0]), waiting[at].0);
                    waiting[at].1 = Instant::now();
                    self.resent += 1;
                }
            }
        }
        answers
    }

    /// Writes `count` places of 8 KiB, then reads them back.
    fn write_and_verify(&mut self, slot: u8, generation: u8, count: u64, window: usize) {
        let writes: Vec<_> =
            (0..count).map(|at| write(slot, at * 16, pattern(slot, at * 16, generation, 16))).collect();
        self.run(&writes, window);
        let reads: Vec<_> = (0..count).map(|at| read(slot, at * 16, 16)).collect();
        for ((at, _), answer) in (0..count).zip(&reads).zip(self.run(&reads, window)) {
            let expected = pattern(slot, at * 16, generation, 16);
            assert!(answer[ATA_DATA_OFFSET..] == expected[..], "place {at} of generation {generation}");
        }
    }
}

/// Three stations at one bridge: the node at `a0`, a client at `b0`, and who means harm at `c0`.
fn bridge() {
    netns::ip("link add br0 type bridge");
    for end in ["a", "b", "c"] {
        netns::ip(&format!("link add {end}0 mtu {MTU} type veth peer name {end}p mtu {MTU}"));
        netns::ip(&format!("link set {end}p master br0"));
        // A tag beside the frame instead of in it would make a foreign VLAN's frame look untagged.
        let vlan =
            std::process::Command::new("ethtool").args(["-K", &format!("{end}p"), "txvlan", "off"]).status();
        assert!(vlan.expect("ethtool runs").success());
        netns::ip(&format!("link set {end}0 up"));
        netns::ip(&format!("link set {end}p up"));
    }
    netns::ip("link set br0 up");
    for end in ["a0", "b0", "c0"] {
        netns::wait_up(end);
    }
}

/// SplitMix64: the same frames in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// A frame of somebody who means harm to export 0, whose sectors it must not reach, and wears export 1 out.
fn harm(random: &mut Random) -> Vec<u8> {
    let (target, worthless) = (export(0), export(1));
    let invented = {
        let [a, b, c, d, ..] = random.next().to_le_bytes();
        Mac([2, 0xff, a, b, c, d])
    };
    let tag = u32::try_from(random.below(1 << 32)).unwrap();
    let lba = random.below(VOLUME_SECTORS);
    let ata = |dst: Mac, address: Address, arg: AtaArg, data: usize| {
        let header = Header::request(dst, invented, address, command::ATA, tag);
        let mut frame = AtaHead { header, arg }.as_bytes().to_vec();
        frame.resize(frame.len() + data, 0xee);
        frame
    };
    let attack = AtaArg::read_write_ext(lba % 1024, 16, true);
    let everywhere = Address { shelf: 0xffff, slot: 0xff };
    match random.below(12) {
        // Noise behind the EtherType, of every length.
        0 => {
            let head = [&target.mac.0[..], &invented.0, &[0x88, 0xa2]].concat();
            let len = random.below(9000);
            [head, random.bytes(len)].concat()
        }
        // Cut short.
        1 => {
            let mut frame = ata(target.mac, target.address, attack, 8192);
            frame.truncate(14 + usize::try_from(random.below(60)).unwrap());
            frame
        }
        // More sectors than there are bytes, or than anybody may ask for.
        2 => {
            let sectors = u8::try_from(17 + random.below(238)).unwrap();
            ata(target.mac, target.address, AtaArg::read_write_ext(0, sectors, true), 8900)
        }
        // Writes to export 0 by other MACs than its own, to wildcards, to nobody.
        3 => ata(worthless.mac, target.address, attack, 8192),
        4 => ata(Mac::BROADCAST, target.address, attack, 8192),
        5 => ata(target.mac, everywhere, attack, 8192),
        // The same as a response.
        6 => {
            let mut frame = ata(target.mac, target.address, attack, 8192);
            frame[14] |= 0x08;
            frame
        }
        // The same in another VLAN.
        7 => {
            let frame = ata(target.mac, target.address, attack, 8192);
            [&frame[..12], &[0x81, 0x00, 0x00, 0x05], &frame[12..]].concat()
        }
        // A discovery storm.
        8 => {
            let header = Header::request(Mac::BROADCAST, invented, everywhere, command::CONFIG, tag);
            [header.as_bytes(), &[0; 8]].concat()
        }
        // Changes of what export 0 is, by somebody who may not.
        9 => {
            let kind = u8::try_from(1 + random.below(3)).unwrap();
            let header = Header::request(target.mac, invented, target.address, kind, tag);
            let arg: &[u8] = match kind {
                command::CONFIG => &[0, 0, 0, 0, 0, 0x14, 0, 4, b'm', b'i', b'n', b'e'],
                command::MAC_MASK => &[0, 1, 0, 1, 0, 1, 2, 2, 2, 2, 2, 2],
                _ => &[2, 1, 2, 2, 2, 2, 2, 2],
            };
            [header.as_bytes(), arg].concat()
        }
        // Valid reads and writes of a station that nobody has seen before.
        10 => ata(worthless.mac, worthless.address, AtaArg::read_write_ext(lba, 16, false), 0),
        _ => ata(worthless.mac, worthless.address, AtaArg::read_write_ext(lba, 16, true), 8192),
    }
}

/// Bytes of memory that this process has.
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn serves_beside_a_hostile_neighbour(link: LinkChoice) {
    /// Far more than the node has chunks: one that does not come home in a hundred frames would end it.
    const HOSTILE_FRAMES: u64 = 60_000;
    bridge();
    let node = Node::start_as(disk_folder(), &Setup { cores: 1, link, chunks_per_core: 1024 });
    let cpus = sched_getaffinity(None).expect("a thread has CPUs");
    let mut client = Patient::open("b0");
    client.write_and_verify(0, 1, 64, 8);
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let hostile = std::thread::spawn({
        let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
        move || {
            sched_setaffinity(None, &cpus).expect("the CPUs are there still");
            let (interface, mut station) = Station::open("c0", LinkChoice::AfPacket, &station::region(1), 0);
            let mut random = Random(7);
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..64 {
                    let frame = harm(&mut random);
                    station.send(&frame);
                }
                sent.fetch_add(64, Ordering::Relaxed);
                // The answers are of no interest.
                station.collect_within(0, Duration::ZERO);
            }
            drop(interface);
        }
    });
    let before = resident_bytes();
    let (mut rounds, deadline) = (0, Instant::now() + Duration::from_secs(120));
    while sent.load(Ordering::Relaxed) < HOSTILE_FRAMES || rounds < 4 {
        assert!(Instant::now() < deadline, "{} hostile frames", sent.load(Ordering::Relaxed));
        client.write_and_verify(0, u8::try_from(2 + rounds % 250).unwrap(), 64, 8);
        rounds += 1;
    }
    let grown = resident_bytes().saturating_sub(before);
    stop.store(true, Ordering::Relaxed);
    hostile.join().unwrap();
    assert!(grown < 16 << 20, "{grown} bytes more");
    let seen = node.control.reader().clients().unwrap();
    let mine: Vec<_> = seen.iter().filter(|seen| seen.mac == CLIENT.0 && seen.slot == 0).collect();
    assert_eq!(mine.len(), 1, "a client that was always there has kept its place among {}", seen.len());
    let written = mine[0].get(cluster_map::ClientCounter::Writes);
    assert!(written >= (1 + rounds) * 64, "{written} writes in {rounds} rounds");
    assert!(node.count(Counter::RxInvalid) > 1000, "the hostile frames came in");
    // It goes on when the neighbour has gone.
    client.write_and_verify(0, 1, 64, 8);
    let allocations = node.stop().allocations;
    assert!(allocations < 100, "{allocations} allocations: more than its start needs");
}

#[test]
fn a_client_beside_a_hostile_neighbour_is_served_on_af_xdp() {
    netns::isolated("trouble::a_client_beside_a_hostile_neighbour_is_served_on_af_xdp", || {
        serves_beside_a_hostile_neighbour(LinkChoice::AfXdp);
    });
}

#[test]
fn a_client_beside_a_hostile_neighbour_is_served_on_af_packet() {
    netns::isolated("trouble::a_client_beside_a_hostile_neighbour_is_served_on_af_packet", || {
        serves_beside_a_hostile_neighbour(LinkChoice::AfPacket);
    });
}

/// Twice the advertised requests at once, with memory for a few of them, on a disk that takes its time.
fn more_than_there_is_memory_for(link: LinkChoice) {
    netns::veth_pair(MTU, 1);
    let outstanding = 2 * usize::from(BUFFER_COUNT);
    let node = Node::start_as(disk_folder(), &Setup { cores: 1, link, chunks_per_core: 256 });
    let mut client = Patient::open("b0");
    for generation in 1..=3 {
        client.write_and_verify(0, generation, outstanding as u64, outstanding);
    }
    let dropped = || {
        let counters = [Counter::MemoryExhausted, Counter::ClientOverLimit, Counter::RxDropped];
        counters.into_iter().map(|counter| node.count(counter)).sum::<u64>()
    };
    // The kernel's share of the count is read once a second.
    std::thread::sleep(Duration::from_millis(1600));
    client.station.collect_within(usize::MAX, Duration::from_millis(50));
    let before = dropped();
    assert!(
        client.resent > 0 && before > 0,
        "{} sent again, {before} dropped: memory was enough",
        client.resent
    );
    // All of it is there again: what fits is served without a loss.
    client.write_and_verify(0, 4, 128, 4);
    std::thread::sleep(Duration::from_millis(1600));
    assert_eq!(dropped(), before, "something of the memory has not come back");
    let totals = node.stop();
    assert_eq!(totals.errors, 0);
}

#[test]
fn case_61_with_memory_for_a_few_requests_all_are_served_in_the_end_on_af_xdp() {
    netns::isolated(
        "trouble::case_61_with_memory_for_a_few_requests_all_are_served_in_the_end_on_af_xdp",
        || {
            more_than_there_is_memory_for(LinkChoice::AfXdp);
        },
    );
}

#[test]
fn case_61_with_memory_for_a_few_requests_all_are_served_in_the_end_on_af_packet() {
    netns::isolated(
        "trouble::case_61_with_memory_for_a_few_requests_all_are_served_in_the_end_on_af_packet",
        || {
            more_than_there_is_memory_for(LinkChoice::AfPacket);
        },
    );
}
