//! The initiator and the verification against a model target behind a model network, in simulated time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use aoe_xdp::wire::{AoeError, HEADER_LEN};
use proptest::prelude::*;
use zerocopy::FromBytes;

use super::*;
use crate::verify::{Findings, Oracle, Sector, stamp};
use crate::workload::{Pattern, Random, Region, Workload};

const STATION: Mac = Mac([2, 0, 0, 0, 0, 0x51]);
const TARGET: Mac = Mac([2, 0, 0, 0, 0, 0x7a]);
const ADDRESS: Address = Address { shelf: 3, slot: 4 };
const SEED: u64 = 5;

/// What the network does to frames.
#[derive(Debug, Clone, Copy)]
struct Network {
    loss_permille: u64,
    duplicate_permille: u64,
    delay_max_ns: u64,
    /// The target is not there between these times.
    gone: (u64, u64),
}

const CLEAN: Network =
    Network { loss_permille: 0, duplicate_permille: 0, delay_max_ns: 100_000, gone: (0, 0) };

/// What the target does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// Some writes are acknowledged and forgotten.
    ForgetsWrites,
    /// Some writes store half of their last sector.
    TearsWrites,
    /// Some reads return the neighbour's data.
    ReadsNeighbour,
    /// Some requests are answered with an ATA error.
    AtaErrors,
    /// Some requests are answered with an AoE error, which means nothing to an initiator.
    AoeErrors,
}

struct Target {
    sectors: Vec<Sector>,
    buffer_count: u16,
    sector_count: u8,
    flaw: Flaw,
    flaws: u64,
}

impl Target {
    fn answer(&mut self, request: &[u8], random: &mut Random) -> Option<Vec<u8>> {
        let header = wire::parse_header(request).unwrap();
        assert!(header.address().matches(ADDRESS) && !header.is_response());
        let response = header.response(TARGET, ADDRESS);
        if header.command == command::CONFIG {
            assert_eq!(header.dst, Mac::BROADCAST, "discovery is a broadcast");
            let arg = ConfigArg {
                buffer_count: self.buffer_count.into(),
                firmware_version: 7.into(),
                sector_count: self.sector_count,
                version_ccmd: 0x10,
                string_len: 0.into(),
            };
            return Some([response.as_bytes(), arg.as_bytes(), &[0; 28]].concat());
        }
        assert_eq!((header.dst, header.src), (TARGET, STATION));
        let (head, data) = AtaHead::ref_from_prefix(request).unwrap();
        let mut arg = head.arg;
        let flawed = self.flaw != Flaw::None && arg.command_status != ata::IDENTIFY && random.below(50) == 0;
        self.flaws += u64::from(flawed);
        arg.command_status = ata::STATUS_DRDY;
        let mut reply = Vec::new();
        if flawed && self.flaw == Flaw::AtaErrors {
            (arg.command_status, arg.error_feature) = (ata::STATUS_DRDY | ata::STATUS_ERR, ata::ERROR_UNC);
        } else if flawed && self.flaw == Flaw::AoeErrors {
            return Some(response.with_error(AoeError::DeviceUnavailable).as_bytes().to_vec());
        } else {
            reply = self.execute(&head.arg, data, flawed);
        }
        let mut frame = [response.as_bytes(), arg.as_bytes(), &reply].concat();
        frame.resize(frame.len().max(wire::FRAME_LEN_MIN), 0);
        Some(frame)
    }

    fn execute(&mut self, arg: &AtaArg, data: &[u8], flawed: bool) -> Vec<u8> {
        if arg.command_status == ata::IDENTIFY {
            let mut words = vec![0u8; SECTOR_LEN];
            words[2 * 83..][..2].copy_from_slice(&0x7400u16.to_le_bytes());
            words[200..208].copy_from_slice(&(self.sectors.len() as u64).to_le_bytes());
            return words;
        }
        let (lba, count) = (usize::try_from(arg.lba48()).unwrap(), usize::from(arg.sector_count));
        assert!(arg.sector_count <= self.sector_count, "the target's sector count is honoured");
        if arg.command_status == ata::READ_EXT {
            let shift = usize::from(flawed && self.flaw == Flaw::ReadsNeighbour);
            let from = (lba + shift).min(self.sectors.len() - count);
            return self.sectors[from..from + count].concat();
        }
        assert_eq!((arg.command_status, data.len()), (ata::WRITE_EXT, count * SECTOR_LEN));
        for (i, sector) in data.chunks_exact(SECTOR_LEN).enumerate() {
            let len = match (flawed, self.flaw) {
                (true, Flaw::ForgetsWrites) => 0,
                (true, Flaw::TearsWrites) if i + 1 == count => SECTOR_LEN / 2,
                _ => SECTOR_LEN,
            };
            self.sectors[lba + i][..len].copy_from_slice(&sector[..len]);
        }
        Vec::new()
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Delivery {
    ToTarget(Vec<u8>),
    ToInitiator(Vec<u8>),
}

struct World {
    now_ns: u64,
    network: Network,
    random: Random,
    target: Target,
    initiator: Initiator,
    queue: BinaryHeap<Reverse<(u64, u64, Delivery)>>,
    queued: u64,
    last_write_ns: u64,
    oracle: Oracle,
    lowest: Vec<[u32; 16]>,
    findings: Findings,
    finished: Vec<Finished>,
    most_unanswered: u16,
}

impl World {
    fn new(settings: Settings, network: Network, flaw: Flaw, region: Region, seed: u64) -> World {
        let sectors = usize::try_from(region.start_lba + region.sectors()).unwrap();
        World {
            now_ns: 0,
            network,
            random: Random::new(seed),
            target: Target {
                sectors: vec![[0x11; SECTOR_LEN]; sectors],
                buffer_count: 24,
                sector_count: 4,
                flaw,
                flaws: 0,
            },
            initiator: Initiator::new(settings, 0),
            queue: BinaryHeap::new(),
            queued: 0,
            last_write_ns: 0,
            oracle: Oracle::new(SEED, region).unwrap(),
            lowest: vec![[0; 16]; usize::from(FRAMES_MAX)],
            findings: Findings::default(),
            finished: Vec::new(),
            most_unanswered: 0,
        }
    }

    /// Puts a frame on the wire. Replies and reads may overtake each other; writes arrive in the order of sending,
    /// since without that AoE cannot keep data right at all.
    fn send(&mut self, delivery: Delivery, is_write: bool) {
        let gone = self.network.gone.0 <= self.now_ns && self.now_ns < self.network.gone.1;
        if gone || self.random.below(1000) < self.network.loss_permille {
            return;
        }
        let mut at_ns = self.now_ns + 1_000 + self.random.below(self.network.delay_max_ns);
        if is_write {
            at_ns = at_ns.max(self.last_write_ns);
            self.last_write_ns = at_ns;
        }
        let twice = self.random.below(1000) < self.network.duplicate_permille;
        if let (true, Delivery::ToInitiator(frame)) = (twice, &delivery) {
            let later_ns = at_ns + self.random.below(self.network.delay_max_ns);
            self.push(later_ns, Delivery::ToInitiator(frame.clone()));
        }
        if let (true, Delivery::ToTarget(frame)) = (twice, &delivery) {
            self.push(at_ns, Delivery::ToTarget(frame.clone()));
        }
        self.push(at_ns, delivery);
    }

    fn push(&mut self, at_ns: u64, delivery: Delivery) {
        self.queued += 1;
        self.queue.push(Reverse((at_ns, self.queued, delivery)));
    }

    fn transmit_all(&mut self) {
        while let Some(outgoing) = self.initiator.transmit(self.now_ns) {
            let mut frame = outgoing.head().to_vec();
            let mut is_write = false;
            if let Some((kind, piece, first)) = outgoing.io {
                is_write = kind == Kind::Write;
                for lba in piece.lba..piece.lba + u64::from(piece.sectors) {
                    let mut sector = [0; SECTOR_LEN];
                    stamp(&mut sector, SEED, lba, piece.version);
                    frame.extend_from_slice(if is_write { &sector } else { &[] });
                }
                if first && !is_write {
                    let lowest = &mut self.lowest[usize::from(piece.slot)];
                    self.oracle.snapshot(piece.lba, piece.sectors, lowest);
                }
            }
            self.send(Delivery::ToTarget(frame), is_write);
        }
        self.most_unanswered = self.most_unanswered.max(self.initiator.frames_sent);
    }

    fn deliver(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::ToTarget(frame) => {
                if let Some(reply) = self.target.answer(&frame, &mut self.random) {
                    self.send(Delivery::ToInitiator(reply), false);
                }
            }
            Delivery::ToInitiator(frame) => {
                let finished = match self.initiator.receive(&frame, frame.len(), self.now_ns) {
                    Received::Other => None,
                    Received::Failure { finished } => finished,
                    Received::Answer { kind: Kind::Write, piece, finished } => {
                        self.oracle.acknowledged(piece.lba, piece.sectors, piece.version);
                        finished
                    }
                    Received::Answer { kind: Kind::Read, piece, finished } => {
                        for (i, sector) in frame[36..].as_chunks::<SECTOR_LEN>().0.iter().enumerate() {
                            let lowest = self.lowest[usize::from(piece.slot)][i];
                            self.oracle.check(piece.lba + i as u64, sector, lowest, &mut self.findings);
                        }
                        finished
                    }
                };
                self.finished.extend(finished);
            }
        }
    }

    /// Runs operations to their end; returns how many were submitted.
    fn run(&mut self, operations: usize, read_percent: u8) -> usize {
        let region = self.oracle.region();
        let mut workload = Workload::new(region.blocks, Pattern::Random, read_percent, self.random.next());
        let (mut submitted, mut ended) = (0, 0);
        while submitted < operations || self.initiator.unfinished() > 0 {
            if self.initiator.is_dead() {
                break;
            }
            while submitted < operations && self.initiator.has_room() {
                let (mut kind, block) = workload.next();
                let version = if kind == Kind::Write { self.oracle.begin_write(block) } else { Some(0) };
                let version = version.unwrap_or_else(|| {
                    kind = Kind::Read;
                    0
                });
                let (lba, sectors, due_ns) = (region.lba(block), region.block_sectors, self.now_ns);
                self.initiator.submit(Operation { kind, lba, sectors, version, due_ns });
                submitted += 1;
            }
            self.transmit_all();
            let tick_ns = self.initiator.next_tick_ns();
            match self.queue.peek() {
                Some(Reverse((at_ns, _, _))) if *at_ns <= tick_ns => {
                    let Reverse((at_ns, _, delivery)) = self.queue.pop().unwrap();
                    self.now_ns = at_ns;
                    self.deliver(delivery);
                }
                _ => {
                    self.now_ns = tick_ns;
                    let mut finished = std::mem::take(&mut self.finished);
                    self.initiator.tick(tick_ns, &mut finished);
                    self.finished = finished;
                }
            }
            for finished in &self.finished[ended..] {
                if finished.operation.kind == Kind::Write {
                    self.oracle.end_write(region.block(finished.operation.lba));
                }
            }
            ended = self.finished.len();
            assert!(self.now_ns < 3_600_000_000_000, "no progress within an hour");
        }
        submitted
    }

    fn failures(&self) -> usize {
        self.finished.iter().filter(|finished| finished.outcome != Outcome::Done).count()
    }
}

fn settings(behaviour: Behaviour) -> Settings {
    Settings {
        station: STATION,
        address: ADDRESS,
        operations_max: 8,
        link_sectors_max: 16,
        behaviour,
        timeout_ns: 180_000_000_000,
    }
}

const REGION: Region = Region { start_lba: 40, block_sectors: 10, blocks: 12 };

#[test]
fn a_clean_network_needs_no_retransmission_of_a_steady_initiator() {
    let mut world = World::new(settings(Behaviour::Steady), CLEAN, Flaw::None, REGION, 1);
    assert_eq!(world.run(5_000, 50), 5_000);
    assert_eq!((world.finished.len(), world.failures()), (5_000, 0));
    assert!(!world.findings.is_bad(), "{:?}", world.findings);
    assert!(world.findings.checked_sectors > 10_000);
    let counters = *world.initiator.counters();
    assert_eq!(counters, Counters { frames: 5_000 * 3, ..Counters::default() });
    assert!(world.most_unanswered <= 24 && world.most_unanswered > 16, "the buffer count is the limit");
    let target = *world.initiator.target().unwrap();
    assert_eq!((target.mac, target.buffer_count, target.sector_count, target.firmware), (TARGET, 24, 4, 7));
    assert_eq!(target.size_sectors, 160);
}

#[test]
fn a_target_that_is_gone_for_many_seconds_is_waited_for() {
    for behaviour in [Behaviour::Linux, Behaviour::Steady] {
        let network = Network { gone: (100_000_000, 60_000_000_000), ..CLEAN };
        let mut world = World::new(settings(behaviour), network, Flaw::None, REGION, 2);
        world.run(20_000, 50);
        assert!(world.now_ns > 60_000_000_000, "{behaviour:?} was too quick: {}", world.now_ns);
        assert_eq!((world.finished.len(), world.failures()), (20_000, 0));
        assert!(world.initiator.counters().retransmits > 100);
        assert!(!world.findings.is_bad(), "{:?}", world.findings);
    }
}

#[test]
fn a_target_that_never_comes_back_fails_everything_once() {
    let mut settings = settings(Behaviour::Steady);
    settings.timeout_ns = 5_000_000_000;
    let network = Network { gone: (100_000_000, u64::MAX), ..CLEAN };
    let mut world = World::new(settings, network, Flaw::None, REGION, 3);
    let submitted = world.run(1_000_000, 50);
    assert!(world.initiator.is_dead());
    assert_eq!(world.finished.len(), submitted);
    assert_eq!(world.failures(), 8);
    assert_eq!(world.initiator.counters().timeouts, 8);
    assert!((5_000_000_000..5_500_000_000).contains(&world.now_ns), "{}", world.now_ns);
}

#[test]
fn without_retransmission_a_lost_frame_fails_its_operation_alone() {
    let mut settings = settings(Behaviour::Never);
    settings.timeout_ns = 1_000_000_000;
    let network = Network { loss_permille: 20, ..CLEAN };
    let mut world = World::new(settings, network, Flaw::None, REGION, 4);
    // Discovery itself is repeated in any case.
    world.run(500, 50);
    assert_eq!(world.finished.len(), 500);
    assert!((5..150).contains(&world.failures()), "{}", world.failures());
    assert_eq!(world.initiator.counters().retransmits, 0);
    assert!(!world.findings.is_bad(), "{:?}", world.findings);
}

#[test]
fn the_flaws_of_a_target_are_found() {
    for flaw in [Flaw::ForgetsWrites, Flaw::TearsWrites, Flaw::ReadsNeighbour] {
        let mut world = World::new(settings(Behaviour::Steady), CLEAN, flaw, REGION, 6);
        world.run(5_000, 50);
        assert!(world.target.flaws > 0 && world.findings.is_bad(), "{flaw:?} went unseen");
        let findings = &world.findings;
        match flaw {
            Flaw::ForgetsWrites => assert!(findings.lost_sectors > 0),
            Flaw::TearsWrites => assert!(findings.torn_sectors > 0),
            _ => assert!(findings.wrong_sectors > 0),
        }
    }
}

#[test]
fn ata_errors_fail_operations_at_once_and_aoe_errors_are_dropped() {
    let mut world = World::new(settings(Behaviour::Steady), CLEAN, Flaw::AtaErrors, REGION, 7);
    world.run(2_000, 50);
    assert!(world.failures() > 0 && world.initiator.counters().ata_errors >= world.failures() as u64);
    assert_eq!(world.finished.len(), 2_000);
    let mut world = World::new(settings(Behaviour::Steady), CLEAN, Flaw::AoeErrors, REGION, 8);
    world.run(2_000, 50);
    assert_eq!((world.finished.len(), world.failures()), (2_000, 0));
    let counters = world.initiator.counters();
    assert_eq!(counters.aoe_errors, world.target.flaws);
    assert!(counters.retransmits >= counters.aoe_errors);
}

#[test]
fn a_retransmission_has_a_new_tag_and_the_old_one_is_unexpected() {
    let mut initiator = ready(settings(Behaviour::Steady));
    initiator.submit(Operation { kind: Kind::Read, lba: 0, sectors: 4, version: 0, due_ns: 0 });
    let first = initiator.transmit(0).unwrap();
    assert!(initiator.transmit(0).is_none());
    initiator.tick(17_000_000_000, &mut Vec::new());
    let reply = |sent: &Outgoing| {
        let head = wire::parse_ata(sent.head()).unwrap();
        let mut arg = head.arg;
        arg.command_status = ata::STATUS_DRDY;
        [head.header.response(TARGET, ADDRESS).as_bytes(), arg.as_bytes(), &[0; 2048]].concat()
    };
    assert_eq!(initiator.receive(&reply(&first), 36 + 2048, 17_000_000_000), Received::Other);
    let again = loop {
        let outgoing = initiator.transmit(17_000_000_000).unwrap();
        if outgoing.io.is_some() {
            break outgoing;
        }
    };
    assert_ne!(first.head()[20..24], again.head()[20..24], "the tag is new");
    assert_eq!(first.head()[24..], again.head()[24..], "and nothing else");
    assert_eq!((again.io.unwrap().2, initiator.counters().retransmits), (false, 1));
    assert_eq!(again.head()[20] & 0x80, 0, "bit 31 belongs to user-space tools");
    let answer = initiator.receive(&reply(&again), 36 + 2048, 17_000_100_000);
    assert!(matches!(answer, Received::Answer { finished: Some(_), .. }), "{answer:?}");
    assert_eq!(initiator.receive(&reply(&again), 36 + 2048, 17_000_100_000), Received::Other);
    assert_eq!(initiator.counters().unexpected_replies, 2);
}

#[test]
fn a_short_answer_is_not_taken_for_data() {
    let mut initiator = ready(settings(Behaviour::Steady));
    initiator.submit(Operation { kind: Kind::Read, lba: 0, sectors: 4, version: 0, due_ns: 0 });
    let sent = initiator.transmit(0).unwrap();
    let head = wire::parse_ata(sent.head()).unwrap();
    let mut arg = head.arg;
    arg.command_status = ata::STATUS_DRDY;
    let short = [head.header.response(TARGET, ADDRESS).as_bytes(), arg.as_bytes(), &[0; 2047]].concat();
    assert_eq!(initiator.receive(&short, short.len(), 1), Received::Other);
    assert_eq!((initiator.counters().malformed, initiator.unfinished()), (1, 1));
}

#[test]
fn refusals_say_why() {
    let mut world = World::new(settings(Behaviour::Steady), CLEAN, Flaw::None, REGION, 9);
    world.target.buffer_count = 0;
    world.transmit_all();
    let Reverse((at_ns, _, delivery)) = world.queue.pop().unwrap();
    world.now_ns = at_ns;
    world.deliver(delivery);
    let Reverse((at_ns, _, delivery)) = world.queue.pop().unwrap();
    world.now_ns = at_ns;
    world.deliver(delivery);
    assert_eq!(world.initiator.refusal(), Some(Refusal::NoBuffers));
    assert!(world.initiator.transmit(at_ns).is_none());
}

fn ready(settings: Settings) -> Initiator {
    let mut world = World::new(settings, CLEAN, Flaw::None, REGION, 0);
    while world.initiator.target().is_none() {
        world.transmit_all();
        let Reverse((at_ns, _, delivery)) = world.queue.pop().unwrap();
        world.now_ns = at_ns;
        world.deliver(delivery);
    }
    world.initiator
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_network_gives_each_operation_one_end_and_right_data(
        seed in any::<u64>(),
        loss_permille in 0u64..150,
        duplicate_permille in 0u64..150,
        delay_max_ns in prop::sample::select(vec![10_000u64, 1_000_000, 30_000_000, 250_000_000]),
        behaviour in prop::sample::select(vec![Behaviour::Linux, Behaviour::Steady]),
        block_sectors in 1u32..40,
        read_percent in 0u8..=100,
        gone_from_ms in 0u64..3_000,
        gone_ms in 0u64..5_000,
    ) {
        let gone = (gone_from_ms * MILLISECOND_NS, (gone_from_ms + gone_ms) * MILLISECOND_NS);
        let network = Network { loss_permille, duplicate_permille, delay_max_ns, gone };
        let region = Region { start_lba: 3, block_sectors, blocks: 9 };
        let mut world = World::new(settings(behaviour), network, Flaw::None, region, seed);
        let submitted = world.run(400, read_percent);
        prop_assert_eq!(submitted, 400);
        prop_assert_eq!(world.finished.len(), 400);
        prop_assert_eq!(world.failures(), 0);
        prop_assert!(!world.findings.is_bad(), "{:?}", world.findings);
        prop_assert!(world.most_unanswered <= 24);
        // What is on the medium in the end is what the oracle allows, and nothing else was touched.
        let mut findings = Findings::default();
        for lba in region.start_lba..region.start_lba + region.sectors() {
            let mut lowest = [0; 1];
            world.oracle.snapshot(lba, 1, &mut lowest);
            let sector = world.target.sectors[usize::try_from(lba).unwrap()];
            world.oracle.check(lba, &sector, lowest[0], &mut findings);
        }
        prop_assert!(!findings.is_bad(), "{:?}", findings);
        prop_assert!(world.target.sectors[..3].iter().all(|sector| *sector == [0x11; SECTOR_LEN]));
    }

    #[test]
    fn receiving_is_total(
        bytes in proptest::collection::vec(any::<u8>(), 0..80),
        response in any::<bool>(),
        code in 0u8..5,
        tag in any::<u32>(),
    ) {
        let mut initiator = ready(settings(Behaviour::Linux));
        initiator.submit(Operation { kind: Kind::Read, lba: 0, sectors: 1, version: 0, due_ns: 0 });
        initiator.transmit(0);
        initiator.receive(&bytes, bytes.len(), 5);
        let mut header = Header::request(STATION, TARGET, ADDRESS, code, tag);
        header.version_flags |= if response { 8 } else { 0 };
        let mut frame = header.as_bytes().to_vec();
        prop_assert_eq!(frame.len(), HEADER_LEN);
        frame.extend_from_slice(&bytes);
        initiator.receive(&frame, frame.len(), 6);
    }
}
