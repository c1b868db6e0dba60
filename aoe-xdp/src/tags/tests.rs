//! Hosts that send as Linux does, over networks that delay, lose, repeat and overtake; and clients that are no Linux.
#![allow(clippy::cast_possible_truncation, reason = "a model cuts its clocks into tags")]

use super::*;
use proptest::prelude::*;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// SplitMix64.
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

    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

const MS: u64 = 1_000_000;
/// Sectors of the device that hosts write.
const SECTORS: u64 = 64;
/// Writes that a host keeps in progress.
const WINDOW: usize = 8;

/// How a path treats frames.
#[derive(Debug, Clone, Copy)]
struct Path {
    delay_ns: u64,
    /// Added to the delay, each time another part of it: frames overtake each other.
    jitter_ns: u64,
    /// One frame of so many is late by up to 3 s.
    late_one_in: u64,
    lost_one_in: u64,
    repeated_one_in: u64,
}

#[derive(Debug, Clone, Copy)]
struct Write {
    number: u64,
    lba: u64,
    sectors: u8,
    tag: u32,
    sent_ns: u64,
    since_ns: u64,
}

/// A host: writes wait for their answer, come again under a new tag by the next interface, and never touch a sector that
/// another write of the host is under way to.
struct Host {
    hz: u64,
    boot_ticks: u64,
    sequence: u16,
    paths: Vec<Path>,
    next_path: usize,
    open: Vec<Write>,
    written: u64,
    longest_ns: u64,
}

impl Host {
    fn new(hz: u64, paths: &[Path], random: &mut Random) -> Host {
        let sequence = random.next() as u16;
        let (boot_ticks, paths) = (random.next() >> 8, paths.to_vec());
        Host { hz, boot_ticks, sequence, paths, next_path: 0, open: Vec::new(), written: 0, longest_ns: 0 }
    }

    /// `newtag` of the driver.
    fn tag(&mut self, now_ns: u64) -> u32 {
        let ticks = self.boot_ticks + now_ns * self.hz / SECOND_NS;
        self.sequence = self.sequence.wrapping_add(1);
        (ticks & 0xffff) as u32 | u32::from(self.sequence & 0x7fff) << 16
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Arrival {
    at_ns: u64,
    nth: u64,
    path: usize,
    tag: u32,
    number: u64,
    lba: u64,
    sectors: u8,
    /// An answer on its way back; else a write on its way out.
    answer: bool,
}

/// What a run has shown.
#[derive(Debug, Default)]
struct Shown {
    writes: u64,
    /// Copies executed although a newer write to one of their sectors had been, while the host was proved.
    stale: u64,
    /// The same, while it was not.
    stale_unproved: u64,
    dropped: u64,
    proved: bool,
    longest_ns: u64,
}

/// Lets a host write for `seconds`; `filter` says whether late copies are dropped.
fn run(hz: u64, paths: &[Path], seconds: u64, filter: bool, seed: u64) -> Shown {
    let mut random = Random(seed);
    let mut host = Host::new(hz, paths, &mut random);
    let mut order = TagOrder::new(8, 4096);
    for path in 0..paths.len() {
        order.begin(StreamId(path as u32), 1);
    }
    let mut shown = Shown::default();
    let mut wire: BinaryHeap<Reverse<Arrival>> = BinaryHeap::new();
    // By sector: which write it holds, and whether the host was proved when that came.
    let mut disk = vec![(0_u64, false); SECTORS as usize];
    let (mut nth, mut clock_ns) = (0, 0);
    let end_ns = seconds * SECOND_NS;
    while clock_ns < end_ns || !host.open.is_empty() {
        // The timer of the driver: what waits too long is sent again, by the next interface.
        let mut sends = Vec::new();
        for at in 0..host.open.len() {
            let rto_ns = 20 * MS + host.paths[0].delay_ns * 4;
            if clock_ns - host.open[at].sent_ns > rto_ns {
                let tag = host.tag(clock_ns);
                (host.open[at].tag, host.open[at].sent_ns) = (tag, clock_ns);
                sends.push(host.open[at]);
            }
        }
        while clock_ns < end_ns && host.open.len() < WINDOW {
            let sectors = 1 + random.below(16) as u8;
            let lba = random.below(SECTORS - u64::from(sectors) + 1);
            let meets = |other: &Write| {
                lba < other.lba + u64::from(other.sectors) && other.lba < lba + u64::from(sectors)
            };
            if host.open.iter().any(meets) {
                break;
            }
            host.written += 1;
            let (number, tag) = (host.written, host.tag(clock_ns));
            let write = Write { number, lba, sectors, tag, sent_ns: clock_ns, since_ns: clock_ns };
            host.open.push(write);
            sends.push(write);
        }
        for Write { number, lba, sectors, tag, .. } in sends {
            let path = host.next_path;
            host.next_path = (path + 1) % host.paths.len();
            let Path { delay_ns, jitter_ns, late_one_in, lost_one_in, repeated_one_in } = host.paths[path];
            let copies =
                if random.one_in(lost_one_in) { 0 } else { 1 + u64::from(random.one_in(repeated_one_in)) };
            for _ in 0..copies {
                let late_ns = if random.one_in(late_one_in) { random.below(3 * SECOND_NS) } else { 0 };
                let at_ns = clock_ns + delay_ns + random.below(jitter_ns + 1) + late_ns;
                nth += 1;
                wire.push(Reverse(Arrival { at_ns, nth, path, tag, number, lba, sectors, answer: false }));
            }
        }
        let step_ns = clock_ns + MS;
        while let Some(&Reverse(arrival)) = wire.peek().filter(|arrival| arrival.0.at_ns <= step_ns) {
            wire.pop();
            let Arrival { at_ns, path, tag, number, lba, sectors, answer, .. } = arrival;
            if answer {
                if let Some(at) = host.open.iter().position(|write| write.tag == tag) {
                    let write = host.open.swap_remove(at);
                    host.longest_ns = host.longest_ns.max(at_ns - write.since_ns);
                }
                continue;
            }
            let stream = StreamId(path as u32);
            order.observe(stream, tag, at_ns);
            if filter && order.is_late(stream, tag, lba, sectors, at_ns) {
                shown.dropped += 1;
                continue;
            }
            order.admitted(stream, tag, lba, sectors, at_ns);
            let one = (0..paths.len()).all(|other| order.are_one_host(stream, StreamId(other as u32)));
            let proved = order.is_proved(stream) && one;
            let range = lba as usize..lba as usize + usize::from(sectors);
            if disk[range.clone()].iter().any(|&(held, known)| held > number && known) {
                shown.stale += u64::from(proved);
                shown.stale_unproved += u64::from(!proved);
            }
            disk[range].fill((number, proved));
            nth += 1;
            let at_ns = at_ns + host.paths[path].delay_ns;
            wire.push(Reverse(Arrival { at_ns, nth, answer: true, ..arrival }));
        }
        clock_ns = step_ns;
        shown.proved |= (0..paths.len()).all(|path| order.is_proved(StreamId(path as u32)));
        assert!(clock_ns < end_ns + 60 * SECOND_NS, "writes never end: {:?}", host.open);
    }
    (shown.writes, shown.longest_ns) = (host.written, host.longest_ns);
    shown
}

const QUIET: Path = Path {
    delay_ns: MS,
    jitter_ns: 0,
    late_one_in: u64::MAX,
    lost_one_in: u64::MAX,
    repeated_one_in: u64::MAX,
};
const ROUGH: Path =
    Path { delay_ns: MS, jitter_ns: 10 * MS, late_one_in: 50, lost_one_in: 100, repeated_one_in: 100 };

#[test]
fn without_the_filter_late_copies_land_on_newer_writes() {
    let shown = run(250, &[ROUGH], 20, false, 1);
    assert!(shown.proved && shown.stale > 10, "the model has no late copies: {shown:?}");
}

#[test]
fn a_quiet_network_loses_nothing() {
    for paths in [&[QUIET][..], &[QUIET, QUIET]] {
        let shown = run(1000, paths, 10, true, 2);
        assert!(shown.proved && shown.dropped == 0 && shown.writes > 10_000, "{shown:?}");
    }
}

#[test]
fn two_interfaces_are_found_to_be_one_host() {
    let slower = Path { delay_ns: 3 * MS, ..ROUGH };
    let shown = run(100, &[ROUGH, slower], 60, true, 3);
    assert!(shown.dropped > 10 && shown.stale == 0 && shown.proved, "{shown:?}");
    let unfiltered = run(100, &[ROUGH, slower], 60, false, 3);
    assert!(unfiltered.stale > 10, "nothing was joined: {unfiltered:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Whatever the network does: once a host is proved, no copy lands on a newer write of it, every write ends, and
    /// dropped copies cost little more than what the network itself costs.
    #[test]
    fn no_stale_write_of_a_proved_host_is_executed(
        hz in prop::sample::select(vec![100_u64, 250, 300, 1000]),
        delays_ms in prop::collection::vec((0_u64..20, 0_u64..30), 1..4),
        late_one_in in 10_u64..200,
        seed: u64,
    ) {
        let path = |&(delay, jitter): &(u64, u64)| {
            Path { delay_ns: delay * MS, jitter_ns: jitter * MS, late_one_in, ..ROUGH }
        };
        let paths: Vec<Path> = delays_ms.iter().map(path).collect();
        let shown = run(hz, &paths, 20, true, seed);
        prop_assert_eq!(shown.stale, 0, "{:?}", shown);
        prop_assert!(shown.proved, "{:?}", shown);
        prop_assert!(shown.longest_ns < 10 * SECOND_NS, "{:?}", shown);
    }
}

/// How other initiators make their tags; `None`: as before, because it is sent again.
fn other_tags(kind: usize, nth: u32, now_ns: u64, random: &mut Random) -> u32 {
    let ms = (now_ns / MS) as u32;
    match kind {
        // Random ones, with and without the bit of user space.
        0 => random.next() as u32,
        1 => random.next() as u32 & 0x7fff_ffff,
        // iPXE: a constant and a small number.
        2 => 0x18ae_0000 | (nth & 0xff),
        // Counters: by one, by one in the upper half, in the other byte order.
        3 => nth,
        4 => nth << 16,
        5 => nth.swap_bytes(),
        // aoetools: bit 31, time and a process number.
        6 => 0x8000_0000 | ms,
        // The time alone, in the lower or in both halves.
        7 => ms & 0xffff,
        8 => ms.rotate_left(16),
        // One tag for everything.
        9 => 0x0001_0001,
        // Linux's sequence with something else for the ticks.
        10 => (nth & 0x7fff) << 16 | (random.next() as u32 & 0xffff),
        // Slots of a table, used again in turn, with a time that is right.
        _ => (nth % 64) << 16 | (ms & 0xffff),
    }
}

#[test]
fn clients_that_are_no_linux_are_never_hindered() {
    for kind in 0..=11 {
        let mut random = Random(kind as u64);
        let mut order = TagOrder::new(4, 1024);
        let stream = StreamId(2);
        order.begin(stream, 7);
        let (mut now_ns, mut tags) = (5 * SECOND_NS, Vec::new());
        for nth in 1..200_000_u32 {
            now_ns += random.below(MS);
            // One of ten comes again, as it was: this client does not make a new tag for it.
            let tag = if random.one_in(10) && !tags.is_empty() {
                tags[random.below(tags.len() as u64) as usize]
            } else {
                other_tags(kind, nth, now_ns, &mut random)
            };
            tags.truncate(20);
            tags.insert(0, tag);
            order.observe(stream, tag, now_ns);
            let lba = random.below(16);
            assert!(!order.is_late(stream, tag, lba, 8, now_ns), "client {kind}, frame {nth}");
            order.admitted(stream, tag, lba, 8, now_ns);
        }
    }
}

/// Two hosts that write to one export at the same time, whose counters are as near to each other as can be.
#[test]
fn two_hosts_are_never_taken_for_one() {
    for offset in [0_u16, 1, 2, 100, 500, 1000, 1023] {
        for (speed, dense) in [(1, true), (3, true), (1, false), (2, false)] {
            let mut random = Random(u64::from(offset) * 8 + speed);
            let mut order = TagOrder::new(4, 1024);
            (0..2).for_each(|at| order.begin(StreamId(at), 7));
            let mut hosts = [Host::new(1000, &[QUIET], &mut random), Host::new(1000, &[QUIET], &mut random)];
            hosts[1].boot_ticks = hosts[0].boot_ticks;
            hosts[1].sequence = hosts[0].sequence.wrapping_add(offset);
            let mut now_ns = SECOND_NS;
            for _ in 0..100_000 {
                now_ns += random.below(MS / 5);
                let at = usize::from(random.below(1 + speed) == 0);
                // A host with a second interface, by which the other half of its frames goes elsewhere.
                let tag = hosts[at].tag(now_ns);
                if dense || random.one_in(2) {
                    order.observe(StreamId(at as u32), tag, now_ns);
                }
                assert!(
                    !order.are_one_host(StreamId(0), StreamId(1)),
                    "offset {offset}, speed {speed}, {dense}"
                );
            }
            assert!(order.is_proved(StreamId(0)) && order.is_proved(StreamId(1)));
        }
    }
}

#[test]
fn a_host_that_starts_again_is_proved_again() {
    let mut random = Random(9);
    let mut order = TagOrder::new(2, 64);
    let stream = StreamId(0);
    order.begin(stream, 1);
    let mut host = Host::new(250, &[QUIET], &mut random);
    let mut now_ns = SECOND_NS;
    for start in 0..4 {
        let mut steps = 0;
        while !order.is_proved(stream) || steps < 1000 {
            steps += 1;
            assert!(steps < 20_000, "start {start} is never proved");
            now_ns += 3 * MS;
            let tag = host.tag(now_ns);
            order.observe(stream, tag, now_ns);
            assert!(!order.is_late(stream, tag, 8, 8, now_ns), "a new start is held against the former one");
            order.admitted(stream, tag, 8, 8, now_ns);
        }
        // A reboot: both counters begin anew.
        now_ns += 30 * SECOND_NS;
        host.boot_ticks = random.next() >> 8;
        host.sequence = 0;
    }
}

#[test]
fn sectors_and_exports_beside_a_newer_write_are_free() {
    let mut random = Random(4);
    let mut order = TagOrder::new(4, 64);
    let mut host = Host::new(1000, &[QUIET], &mut random);
    (0..2).for_each(|at| order.begin(StreamId(at), at));
    let mut now_ns = SECOND_NS;
    for _ in 0..2000 {
        now_ns += MS;
        let tag = host.tag(now_ns);
        (0..2).for_each(|at| order.observe(StreamId(at), tag, now_ns));
    }
    let old = host.tag(now_ns);
    now_ns += MS;
    let new = host.tag(now_ns);
    let stream = StreamId(0);
    order.admitted(stream, new, 10, 4, now_ns);
    let late = |order: &TagOrder, tag, lba, sectors, after_ns| {
        order.is_late(stream, tag, lba, sectors, now_ns + after_ns)
    };
    assert!(late(&order, old, 10, 4, 0) && late(&order, old, 13, 8, 0) && late(&order, old, 0, 11, 0));
    assert!(!late(&order, old, 8, 2, 0) && !late(&order, old, 14, 16, 0), "other sectors of the block");
    assert!(!late(&order, new, 10, 4, 0), "the same frame, repeated by the network");
    assert!(!order.is_late(StreamId(1), old, 10, 4, now_ns), "another export");
    assert!(late(&order, old, 10, 4, REMEMBERED_NS - (1 << TICK_SHIFT)));
    assert!(!late(&order, old, 10, 4, REMEMBERED_NS + (1 << TICK_SHIFT)));
    // A write that covers it takes its place; one beside it stands with it.
    let newest = host.tag(now_ns);
    order.admitted(stream, newest, 8, 8, now_ns);
    assert!(late(&order, new, 10, 4, 0) && late(&order, new, 8, 1, 0));
    let remembered = order.remembered.iter().flatten().filter(|write| write.key & SECTORS != 0).count();
    assert_eq!(remembered, 1);
    // The place is given to another station.
    order.end(stream);
    order.begin(stream, 0);
    assert!(!order.is_late(stream, old, 10, 4, now_ns));
}

proptest! {
    #[test]
    fn shifting_a_window_makes_every_number_older(set in prop::collection::vec(0_usize..1024, 0..40), by in 0_usize..1024) {
        let mut used = [0; WINDOW_WORDS];
        set.iter().for_each(|&bit| used[bit / 64] |= 1 << (bit % 64));
        shift(&mut used, by);
        for bit in 0..1024_usize {
            let expected = bit.checked_sub(by).is_some_and(|bit| set.contains(&bit));
            prop_assert_eq!(used[bit / 64] >> (bit % 64) & 1 == 1, expected, "{}", bit);
        }
    }

    #[test]
    fn any_tags_in_any_order_are_taken(
        frames in prop::collection::vec((0_u32..4, any::<u32>(), any::<u64>(), any::<u8>(), 0_u64..40_000_000_000), 1..300),
    ) {
        let mut order = TagOrder::new(4, 16);
        (0..4).for_each(|at| order.begin(StreamId(at), at / 2));
        let mut now_ns = 0;
        for (stream, tag, lba, sectors, later_ns) in frames {
            now_ns += later_ns;
            order.observe(StreamId(stream), tag, now_ns);
            let lba = lba >> 16;
            let _ = order.is_late(StreamId(stream), tag, lba, sectors, now_ns);
            order.admitted(StreamId(stream), tag, lba, sectors, now_ns);
            if later_ns < 1_000_000_000 {
                order.end(StreamId(stream));
                order.begin(StreamId(stream), stream / 2);
            }
        }
    }
}
