//! Three cores with a store each, and a volume with a copy on all of them: what heads and replicas make of real stores.
//!
//! What the protocol promises is for the simulation to find out; here it is whether its work, its blocks and its states go to the stores
//! and come back whole. Messages travel as on the wire.

use std::collections::HashMap;

use af_xdp::region::{Region, RegionConfig};
use cluster_map::{NodeId, StoreId};
use torus_replication::membership::{Owner, Partition};
use torus_replication::message::{Answer, Ask, Reply, Request};
use torus_replication::wire::{HEADER_BYTES, Header};

use super::*;
use crate::store::extent::format::Shape;
use crate::store::extent::fresh::FreshStore;
use crate::store::{Disk, Durable as Until};

const DEVICE_BYTES: u64 = 32 << 20;
const CHUNKS: u32 = 4096;
const VOLUME: VolumeId = VolumeId([9; 16]);
const OBJECT: Object = Object { shard: 0, number: 0 };
const PLACE: Place = Place { store: 0, object: OBJECT };
const MS: u64 = 1_000_000;
/// Blocks that requests go to, around the border between two extents.
const BLOCKS: Range<u64> = 1000..1050;

/// xorshift: the same numbers for the same seed, everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// A device in memory that ends every request at once, and the frame memory of its core.
struct MemoryDevices {
    pool: Pool,
    image: Vec<u8>,
    ended: VecDeque<(u64, Blocks)>,
    boot_ns: u64,
}

struct MemoryDisk<'d>(&'d mut MemoryDevices);

impl Devices for MemoryDevices {
    fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    fn device(&mut self, _store: usize) -> impl Disk {
        MemoryDisk(self)
    }

    fn boot_ns(&self) -> u64 {
        self.boot_ns
    }
}

impl Disk for MemoryDisk<'_> {
    fn read(&mut self, offset_bytes: u64, mut blocks: Blocks, token: u64) {
        let mut from = usize::try_from(offset_bytes).unwrap();
        for at in 0..blocks.len() {
            let MemoryDevices { pool, image, .. } = &mut *self.0;
            pool.bytes_mut(blocks.get_mut(at)).copy_from_slice(&image[from..from + BLOCK_BYTES]);
            from += BLOCK_BYTES;
        }
        self.0.ended.push_back((token, blocks));
    }

    fn write(&mut self, offset_bytes: u64, blocks: Blocks, _until: Until, token: u64) {
        let mut to = usize::try_from(offset_bytes).unwrap();
        for chunk in blocks.iter() {
            let MemoryDevices { pool, image, .. } = &mut *self.0;
            image[to..to + BLOCK_BYTES].copy_from_slice(pool.region().bytes(chunk));
            to += BLOCK_BYTES;
        }
        self.0.ended.push_back((token, blocks));
    }

    fn sync(&mut self, token: u64) {
        self.0.ended.push_back((token, Blocks::new()));
    }

    fn pool(&mut self) -> &mut Pool {
        &mut self.0.pool
    }
}

fn site(node: u8) -> Site {
    Site { node: NodeId([node; 16]), core: 0 }
}

fn member(node: u8) -> Member {
    Member { store: StoreId([node; 16]), incarnation: 1 }
}

fn partition_of(owners: &[u8]) -> Partition {
    let owner = |number: &u8| Owner { member: member(*number), site: site(*number), is_complete: true };
    Partition { epoch: Epoch(3), owners: owners.iter().map(owner).collect() }
}

/// One core.
struct Core {
    number: u8,
    replicating: Replicating,
    stores: Vec<Option<ExtentStore>>,
    devices: MemoryDevices,
    outcomes: Vec<Outcome>,
    /// Its disk ends nothing.
    is_stalled: bool,
    /// Requests that have ended, with what was read.
    answers: HashMap<u32, (Result<(), StoreError>, Vec<u8>)>,
}

impl Core {
    fn new(number: u8) -> Core {
        let config = RegionConfig { cores: 1, chunks_per_core: CHUNKS, headers_per_core: 64 };
        let pool = Region::new(config).unwrap().pool(0).unwrap();
        let shape = Shape { shards: Some(1), journal_blocks: None };
        let fresh = FreshStore::new(DEVICE_BYTES, shape).unwrap();
        let mut store = ExtentStore::new();
        fresh.shards.into_iter().for_each(|shard| store.adopt(shard));
        let image = vec![0; usize::try_from(DEVICE_BYTES).unwrap()];
        let devices = MemoryDevices { pool, image, ended: VecDeque::new(), boot_ns: 0 };
        let mut core = Core {
            number,
            replicating: Replicating::new(site(number), 0),
            stores: vec![Some(store)],
            devices,
            outcomes: Vec::new(),
            is_stalled: false,
            answers: HashMap::new(),
        };
        core.replicating.open_store(member(number), [(VOLUME, PLACE)], &core.stores);
        core
    }

    /// Its process ends and starts again: the store keeps what it has made durable.
    fn restart(&mut self) {
        while self.work() {}
        self.outcomes.clear();
        self.replicating = Replicating::new(site(self.number), self.devices.boot_ns);
        self.replicating.open_store(member(self.number), [(VOLUME, PLACE)], &self.stores);
    }

    /// The extents that its store has of the volume.
    fn held(&mut self) -> Vec<HeldExtent> {
        let mut held = Vec::new();
        assert!(self.stores[0].as_mut().unwrap().list(PLACE.object, 0, 1024, &mut held), "all of them");
        held
    }

    fn with<T>(&mut self, step: impl FnOnce(&mut Replicating, &mut Ground<'_, MemoryDevices>) -> T) -> T {
        let mut ground =
            Ground { stores: &mut self.stores, devices: &mut self.devices, outcomes: &mut self.outcomes };
        step(&mut self.replicating, &mut ground)
    }

    /// Goes on with what has ended; whether there was anything.
    fn work(&mut self) -> bool {
        if let Some((token, blocks)) = self.devices.ended.pop_front_if(|_| !self.is_stalled) {
            let store = self.stores[0].as_mut().unwrap();
            store.finished(token, blocks, Ok(()), &mut MemoryDisk(&mut self.devices), &mut self.outcomes);
            return true;
        }
        if let Some(outcome) = self.outcomes.pop() {
            if let Some(outcome) = self.with(|replicating, ground| replicating.store_ended(outcome, ground)) {
                let mut bytes = Vec::new();
                for chunk in outcome.blocks.iter() {
                    bytes.extend_from_slice(self.devices.pool.region().bytes(chunk));
                }
                release_blocks(&mut self.devices.pool, outcome.blocks);
                let former = self.answers.insert(outcome.request.0, (outcome.result, bytes));
                assert!(former.is_none(), "a request ends once");
            }
            return true;
        }
        let store = self.stores[0].as_mut().unwrap();
        if store.needs_turn(self.devices.boot_ns) {
            let now_ns = self.devices.boot_ns;
            store.turn(now_ns, &mut MemoryDisk(&mut self.devices), &mut self.outcomes);
            return !(self.devices.ended.is_empty() || self.is_stalled) || !self.outcomes.is_empty();
        }
        false
    }
}

/// From, to, whether it is a question, header and body, blocks.
type Travelling = (usize, usize, bool, Vec<u8>, Vec<u8>);

/// The cluster, and the metadata store in one.
struct Cluster {
    cores: Vec<Core>,
    record: Record,
    /// Which cores are cut off from the others.
    cut: [bool; 3],
    /// Whose grants get lost.
    ungranting: Option<usize>,
    /// On the way, in order.
    travelling: VecDeque<Travelling>,
    next_token: u32,
    model: HashMap<u64, [u8; BLOCK_BYTES]>,
    start: u64,
}

impl Cluster {
    fn new() -> Cluster {
        let record = Record {
            partitions: vec![partition_of(&[0, 1, 2])],
            revision: 1,
            edition: 1,
            takeover: 0,
            head: None,
            stale: BTreeMap::new(),
            min_copies: 0,
            is_moving: false,
        };
        let mut cluster = Cluster {
            cores: (0..3).map(Core::new).collect(),
            record,
            cut: [false; 3],
            ungranting: None,
            travelling: VecDeque::new(),
            next_token: 0,
            model: HashMap::new(),
            start: 1,
        };
        for from in 0..3 {
            for to in (0..3).filter(|to| *to != from) {
                cluster.connect(from, to);
            }
        }
        cluster
    }

    fn connect(&mut self, from: usize, to: usize) {
        let (of, at) = (self.cores[from].number, self.cores[to].number);
        self.cores[to].with(|replicating, ground| replicating.accepted(site(of), ground));
        self.cores[from].with(|replicating, ground| replicating.connected(site(at), ground));
    }

    /// Cuts a core off, or joins it again.
    fn set_cut(&mut self, core: usize, is_cut: bool) {
        self.cut[core] = is_cut;
        for other in (0..3).filter(|other| *other != core) {
            for (from, to) in [(core, other), (other, core)] {
                if is_cut {
                    self.travelling.retain(|(a, b, ..)| (*a, *b) != (from, to));
                    let (of, at) = (self.cores[from].number, self.cores[to].number);
                    self.cores[to].with(|replicating, ground| replicating.closed(site(of), ground));
                    self.cores[from].with(|replicating, ground| replicating.disconnected(site(at), ground));
                } else {
                    self.connect(from, to);
                }
            }
        }
    }

    /// The record names that core as head, under a new take-over.
    fn take_over(&mut self, core: usize) {
        self.record.revision += 1;
        self.record.edition += 1;
        self.record.takeover += 1;
        self.record.head = Some(site(self.cores[core].number).node);
        let generation = Generation { takeover: self.record.takeover, start: self.start };
        let membership = Membership::new(VOLUME, self.record.clone(), None);
        let began =
            self.cores[core].with(|replicating, ground| replicating.begin(generation, membership, ground));
        assert!(began);
    }

    /// The record changes, and its head is told.
    fn tell(&mut self, head: usize, change: impl FnOnce(&mut Record)) {
        change(&mut self.record);
        self.record.revision += 1;
        self.record.edition += 1;
        let record = self.record.clone();
        self.cores[head].with(|replicating, ground| replicating.record(VOLUME, record, ground));
        self.work();
    }

    /// Lets some time pass.
    fn pass(&mut self, ns: u64) {
        let until_ns = self.cores[0].devices.boot_ns + ns;
        while self.cores[0].devices.boot_ns < until_ns {
            for core in &mut self.cores {
                core.devices.boot_ns += 10 * MS;
                core.with(|replicating, ground| replicating.tick(ground));
            }
            self.work();
        }
    }

    fn work(&mut self) {
        loop {
            let mut worked = false;
            for from in 0..self.cores.len() {
                while self.cores[from].work() {
                    worked = true;
                }
                while let Some(outgoing) = self.cores[from].replicating.next_outgoing() {
                    self.send(from, outgoing);
                    worked = true;
                }
            }
            if let Some((from, to, is_question, head, blocks)) = self.travelling.pop_front() {
                self.deliver(from, to, is_question, &head, &blocks);
                worked = true;
            }
            self.grant_wishes();
            if !worked {
                return;
            }
        }
    }

    fn send(&mut self, from: usize, outgoing: Outgoing) {
        let (to, message, is_question) = match outgoing {
            Outgoing::Ask(site, message) => (site, message, true),
            Outgoing::Reply(site, message) => (site, message, false),
        };
        let pool = &mut self.cores[from].devices.pool;
        let (frame, blocks) = to_wire(message, pool);
        let mut head = Vec::new();
        frame.encode(&mut head);
        let mut bytes = Vec::new();
        blocks.iter().for_each(|chunk| bytes.extend_from_slice(pool.region().bytes(chunk)));
        release_blocks(pool, blocks);
        let to = usize::from(to.node.0[0]);
        if !self.cut[from] && !self.cut[to] {
            self.travelling.push_back((from, to, is_question, head, bytes));
        }
    }

    fn deliver(&mut self, from: usize, to: usize, is_question: bool, head: &[u8], bytes: &[u8]) {
        let (header, body) = head.split_first_chunk::<HEADER_BYTES>().unwrap();
        let frame = Header::decode(header).unwrap().decode_body(body).unwrap();
        if matches!(frame, Frame::GrantAnswer(_)) && self.ungranting == Some(from) {
            return;
        }
        let pool = &mut self.cores[to].devices.pool;
        let mut blocks = take_blocks(pool, bytes.len() / BLOCK_BYTES).unwrap();
        for (at, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
            pool.copy_in(blocks.get_mut(at), 0, block);
        }
        let message = from_wire(frame, blocks);
        if let Message::Request(Request { ask: Ask::Write { blocks, .. }, .. })
        | Message::Answer(Answer { reply: Reply::Blocks(blocks), .. }) = &message
        {
            for (block, crc) in bytes.chunks(BLOCK_BYTES).zip(&blocks.crcs) {
                assert_eq!(Some(crc32c(block)), *crc, "the checksum on the wire is that of the block");
            }
        }
        let of = site(self.cores[from].number);
        self.cores[to].with(|replicating, ground| {
            if is_question {
                replicating.asked(of, message, ground);
            } else {
                replicating.answered(of, message, ground);
            }
        });
    }

    /// Makes the changes of the record that heads want who are not cut off from it either.
    fn grant_wishes(&mut self) {
        for core in (0..self.cores.len()).filter(|core| !self.cut[*core]) {
            let wishes: Vec<Wish> = self.cores[core].replicating.wishes().values().cloned().collect();
            for wish in wishes {
                if wish.revision == self.record.revision {
                    self.record = wish.change.applied(&self.record);
                    self.record.revision += 1;
                    self.record.edition += 1;
                }
                let record = self.record.clone();
                self.cores[core].with(|replicating, ground| replicating.record(VOLUME, record, ground));
            }
        }
    }

    fn start(&mut self, core: usize, wanted: Wanted) -> u32 {
        self.start_under(core, self.record.takeover, wanted)
    }

    /// Begins a request that came for the head under that take-over.
    fn start_under(&mut self, core: usize, takeover: u64, wanted: Wanted) -> u32 {
        let token = self.next_token;
        self.next_token += 1;
        let request = RequestToken(token);
        let head = (VOLUME, takeover);
        self.cores[core].with(|replicating, ground| replicating.start(request, head, wanted, ground));
        self.work();
        token
    }

    /// Begins to write random bytes at a random place.
    fn write(&mut self, core: usize, random: &mut Random) -> u32 {
        let count = 1 + random.below(3);
        let first_block = BLOCKS.start + random.below(BLOCKS.end - BLOCKS.start - count);
        let kept = |random: &mut Random| u16::try_from(random.below(8)).unwrap() * 512;
        let is_partial = random.below(2) == 0;
        let (head, mut tail) = if is_partial { (kept(random), kept(random)) } else { (0, 0) };
        if count == 1 && usize::from(head) + usize::from(tail) >= BLOCK_BYTES {
            tail = 0;
        }
        let pool = &mut self.cores[core].devices.pool;
        let mut blocks = take_blocks(pool, usize::try_from(count).unwrap()).unwrap();
        let mut crcs = Crcs::default();
        let last = blocks.len() - 1;
        for (at, crc) in crcs.iter_mut().enumerate().take(blocks.len()) {
            let mut bytes = [0; BLOCK_BYTES];
            bytes.fill_with(|| u8::try_from(random.below(256)).unwrap());
            *crc = pool.copy_in_checksummed(blocks.get_mut(at), 0, &bytes, 0).into();
            let from = if at == 0 { usize::from(head) } else { 0 };
            let to = if at == last { BLOCK_BYTES - usize::from(tail) } else { BLOCK_BYTES };
            if from > 0 || to < BLOCK_BYTES {
                *crc = None;
            }
            let known = self.model.entry(first_block + at as u64).or_insert([0; BLOCK_BYTES]);
            known[from..to].copy_from_slice(&bytes[from..to]);
        }
        let payload = Payload::known(blocks, &crcs);
        self.start(core, Wanted::Write { first_block, payload, keep_head_bytes: head, keep_tail_bytes: tail })
    }

    fn take_answer(&mut self, core: usize, token: u32) -> Option<(Result<(), StoreError>, Vec<u8>)> {
        self.cores[core].answers.remove(&token)
    }

    /// Reads everything and compares it.
    fn check(&mut self, core: usize) {
        for block in BLOCKS {
            let token = self.start(core, Wanted::Read(block..block + 1));
            let (result, bytes) = self.take_answer(core, token).expect("it is served");
            assert_eq!(result, Ok(()));
            let known = self.model.get(&block).copied().unwrap_or([0; BLOCK_BYTES]);
            assert!(bytes == known, "block {block} is not what was written");
        }
    }

    /// What the store of a core has of a block.
    fn stored(&mut self, core: usize, block: u64) -> Vec<u8> {
        let at = &mut self.cores[core];
        let blocks = take_blocks(&mut at.devices.pool, 1).unwrap();
        let operation = Operation::Read { first_block: block, blocks };
        let mut outcomes = Vec::new();
        let store = at.stores[0].as_mut().unwrap();
        store.start(RequestToken(0), &OBJECT, operation, &mut MemoryDisk(&mut at.devices), &mut outcomes);
        while let Some((token, blocks)) = at.devices.ended.pop_front() {
            let store = at.stores[0].as_mut().unwrap();
            store.finished(token, blocks, Ok(()), &mut MemoryDisk(&mut at.devices), &mut outcomes);
        }
        let outcome = outcomes.pop().unwrap();
        assert_eq!(outcome.result, Ok(()));
        let bytes = at.devices.pool.region().bytes(outcome.blocks.get(0)).to_vec();
        release_blocks(&mut at.devices.pool, outcome.blocks);
        bytes
    }

    fn assert_equal_copies(&mut self) {
        for block in BLOCKS {
            let first = self.stored(0, block);
            for core in 1..3 {
                assert!(self.stored(core, block) == first, "block {block} of core {core} differs");
            }
        }
    }

    /// Writes and reads at random, one request at a time.
    fn run(&mut self, core: usize, random: &mut Random, count: usize) {
        for _ in 0..count {
            let token = self.write(core, random);
            let answer = self.take_answer(core, token);
            assert_eq!(answer.map(|answer| answer.0), Some(Ok(())));
        }
    }
}

#[test]
fn writes_reach_every_store_and_are_read_back() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0x5eed));
    cluster.take_over(0);
    cluster.pass(300 * MS);
    cluster.run(0, &mut random, 300);
    cluster.check(0);
    cluster.pass(500 * MS);
    cluster.assert_equal_copies();
    for core in &mut cluster.cores {
        assert!(core.replicating.is_idle());
    }
}

#[test]
fn who_was_away_is_left_out_and_brought_up_to_date() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0xcafe));
    cluster.take_over(0);
    cluster.pass(300 * MS);
    cluster.run(0, &mut random, 50);
    cluster.set_cut(2, true);
    let waits = cluster.write(0, &mut random);
    assert!(cluster.take_answer(0, waits).is_none(), "not before it is recorded that one is missing");
    cluster.pass(1500 * MS);
    assert_eq!(cluster.take_answer(0, waits).map(|answer| answer.0), Some(Ok(())));
    assert_eq!(cluster.record.stale.keys().copied().collect::<Vec<_>>(), [member(2)]);
    cluster.run(0, &mut random, 100);
    cluster.set_cut(2, false);
    cluster.pass(3000 * MS);
    assert!(cluster.record.stale.is_empty(), "it has everything again");
    cluster.run(0, &mut random, 50);
    cluster.check(0);
    cluster.pass(500 * MS);
    cluster.assert_equal_copies();
}

#[test]
fn members_come_back_no_faster_than_they_may_and_requests_go_on() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0xfeed));
    cluster.take_over(0);
    cluster.pass(300 * MS);
    cluster.run(0, &mut random, 50);
    cluster.set_cut(2, true);
    let waits = cluster.write(0, &mut random);
    cluster.pass(1500 * MS);
    assert_eq!(cluster.take_answer(0, waits).map(|answer| answer.0), Some(Ok(())));
    cluster.run(0, &mut random, 100);
    // Two extents of 4 MiB are compared.
    cluster.cores[0].with(|replicating, ground| replicating.set_resync_rate(4 << 20, ground));
    cluster.set_cut(2, false);
    for _ in 0..15 {
        cluster.pass(100 * MS);
        cluster.run(0, &mut random, 5);
        assert!(!cluster.record.stale.is_empty(), "that would be faster than it may be");
    }
    let head = |cluster: &mut Cluster| cluster.cores[0].replicating.report(0, 0, None).heads[&VOLUME];
    assert!(head(&mut cluster).extents_to_go > 0);
    cluster.pass(1000 * MS);
    assert!(cluster.record.stale.is_empty() && head(&mut cluster).extents_to_go == 0);
    cluster.check(0);
    // As fast as can be.
    cluster.set_cut(2, true);
    let waits = cluster.write(0, &mut random);
    cluster.pass(1500 * MS);
    assert_eq!(cluster.take_answer(0, waits).map(|answer| answer.0), Some(Ok(())));
    cluster.set_cut(2, false);
    cluster.pass(100 * MS);
    assert!(!cluster.record.stale.is_empty());
    cluster.cores[0].with(|replicating, ground| replicating.set_resync_rate(0, ground));
    cluster.pass(200 * MS);
    assert!(cluster.record.stale.is_empty());
    cluster.pass(500 * MS);
    cluster.assert_equal_copies();
}

#[test]
fn a_head_that_hands_over_is_followed_at_once_and_one_that_waits_in_vain_goes_on() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0xface));
    cluster.take_over(0);
    cluster.pass(300 * MS);
    cluster.run(0, &mut random, 100);
    let wish = |cluster: &mut Cluster, core: usize| {
        cluster.record.revision += 1;
        cluster.record.is_moving = true;
        let record = cluster.record.clone();
        cluster.cores[core].with(|replicating, ground| replicating.record(VOLUME, record, ground));
        cluster.work();
    };
    let has_left =
        |cluster: &Cluster, core: usize| cluster.cores[core].replicating.handed_over().contains_key(&VOLUME);
    wish(&mut cluster, 0);
    assert!(has_left(&cluster, 0), "nothing is in progress");
    let waits = cluster.start(0, Wanted::Read(BLOCKS.start..BLOCKS.start + 1));
    assert!(cluster.take_answer(0, waits).is_none(), "it has given its grants back");
    cluster.record.is_moving = false;
    cluster.take_over(1);
    let record = cluster.record.clone();
    cluster.cores[0].with(|replicating, ground| replicating.record(VOLUME, record, ground));
    cluster.pass(20 * MS);
    let gone = cluster.take_answer(0, waits).map(|answer| answer.0);
    assert_eq!(gone, Some(Err(StoreError::NoHead)));
    assert_eq!(
        cluster.cores[1].replicating.report(0, 0, None).heads[&VOLUME].extents_to_go,
        0,
        "all is stable"
    );
    cluster.run(1, &mut random, 50);
    cluster.check(1);
    // Nobody comes: requests that wait are answered by the same head, under the same generation.
    wish(&mut cluster, 1);
    let waits = cluster.start(1, Wanted::Read(BLOCKS.start..BLOCKS.start + 1));
    cluster.pass(1900 * MS);
    assert!(has_left(&cluster, 1) && cluster.take_answer(1, waits).is_none());
    cluster.pass(200 * MS);
    assert!(!has_left(&cluster, 1));
    assert_eq!(cluster.take_answer(1, waits).map(|answer| answer.0), Some(Ok(())));
    cluster.run(1, &mut random, 50);
    cluster.check(1);
    // Whoever takes over now waits for the grants again.
    cluster.record.is_moving = false;
    cluster.take_over(2);
    cluster.pass(500 * MS);
    assert!(!cluster.cores[2].replicating.is_serving(VOLUME, cluster.cores[2].devices.boot_ns));
    cluster.pass(1000 * MS);
    cluster.run(2, &mut random, 50);
    cluster.check(2);
    cluster.pass(500 * MS);
    cluster.assert_equal_copies();
}

#[test]
fn another_head_takes_over_when_the_grants_have_run_out() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0xbeef));
    cluster.take_over(0);
    cluster.pass(300 * MS);
    cluster.run(0, &mut random, 50);
    // What is begun now is answered by nobody.
    cluster.set_cut(0, true);
    let read = cluster.start(0, Wanted::Read(BLOCKS.start..BLOCKS.start + 1));
    cluster.take_over(1);
    cluster.pass(200 * MS);
    assert!(!cluster.cores[1].replicating.is_serving(VOLUME, cluster.cores[1].devices.boot_ns));
    cluster.pass(2500 * MS);
    assert!(cluster.cores[1].replicating.is_serving(VOLUME, cluster.cores[1].devices.boot_ns));
    assert!(cluster.take_answer(0, read).is_none(), "nobody else can be asked whether it is the head still");
    cluster.run(1, &mut random, 50);
    cluster.check(1);
    cluster.set_cut(0, false);
    cluster.pass(3000 * MS);
    let gone = cluster.take_answer(0, read).map(|answer| answer.0);
    assert_eq!(gone, Some(Err(StoreError::NoHead)), "its head has ended");
    assert!(cluster.cores[0].replicating.ended().contains_key(&VOLUME));
    cluster.assert_equal_copies();
}

#[test]
fn who_is_gone_after_it_has_opened_is_left_out_though_nothing_is_asked() {
    let mut cluster = Cluster::new();
    cluster.ungranting = Some(2);
    cluster.take_over(0);
    cluster.pass(100 * MS);
    let is_serving =
        |cluster: &Cluster| cluster.cores[0].replicating.is_serving(VOLUME, cluster.cores[0].devices.boot_ns);
    assert!(!is_serving(&cluster), "one has opened and granted nothing");
    cluster.set_cut(2, true);
    cluster.pass(1500 * MS);
    assert_eq!(cluster.record.stale.keys().copied().collect::<Vec<_>>(), [member(2)]);
    assert!(is_serving(&cluster));
}

#[test]
fn a_head_that_could_answer_for_a_moment_is_told_of() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0xface));
    cluster.take_over(0);
    cluster.work();
    cluster.set_cut(2, true);
    cluster.pass(100 * MS);
    assert!(cluster.cores[0].replicating.has_opened(VOLUME));
    let waits = cluster.write(0, &mut random);
    assert!(cluster.take_answer(0, waits).is_none());
    cluster.pass(1500 * MS);
    assert_eq!(cluster.take_answer(0, waits).map(|answer| answer.0), Some(Ok(())));
}

#[test]
fn a_restarted_replica_knows_what_it_has_opened() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0xf00d));
    cluster.take_over(0);
    cluster.pass(300 * MS);
    cluster.run(0, &mut random, 20);
    for other in [1, 2] {
        cluster.set_cut(other, true);
        cluster.cores[other].restart();
        cluster.set_cut(other, false);
    }
    cluster.pass(2000 * MS);
    cluster.run(0, &mut random, 20);
    // One from before cannot come back.
    let generation = Generation { takeover: 0, start: 9 };
    let record =
        Record { revision: 1, edition: 1, takeover: 0, head: Some(site(1).node), ..cluster.record.clone() };
    let membership = Membership::new(VOLUME, record, None);
    cluster.cores[1].with(|replicating, ground| replicating.begin(generation, membership, ground));
    cluster.pass(100 * MS);
    let ended = cluster.cores[1].replicating.ended().get(&VOLUME);
    assert!(matches!(ended, Some((_, End::Past | End::Replaced))));
    cluster.check(0);
    cluster.assert_equal_copies();
}

/// The metadata store is restored from a backup of before one was left out: whoever kept on being in sync knows.
#[test]
fn who_is_in_sync_refuses_a_record_from_before_another_was_left_out() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0xba5e));
    cluster.take_over(0);
    cluster.pass(300 * MS);
    cluster.run(0, &mut random, 20);
    let backup = cluster.record.clone();
    cluster.set_cut(2, true);
    let waits = cluster.write(0, &mut random);
    cluster.pass(1500 * MS);
    assert_eq!(cluster.take_answer(0, waits).map(|answer| answer.0), Some(Ok(())));
    let begin = |cluster: &mut Cluster, core: usize, generation, record: &Record| -> Option<End> {
        let membership = Membership::new(VOLUME, record.clone(), None);
        cluster.cores[core].with(|replicating, ground| replicating.begin(generation, membership, ground));
        cluster.pass(1500 * MS);
        let ended = cluster.cores[core].replicating.ended().get(&VOLUME).copied();
        ended.filter(|(of, _)| *of == generation).map(|(_, end)| end)
    };
    // The one that was left out is head by the backup; restored more than once, so that the store's revisions are higher than ever.
    let takeover = backup.takeover + 1;
    let head = Some(site(cluster.cores[2].number).node);
    let edition = backup.edition + 1;
    let restored = Record { revision: 1000, edition, takeover, head, ..backup.clone() };
    cluster.set_cut(2, false);
    let end = begin(&mut cluster, 2, Generation { takeover, start: 1 }, &restored);
    assert_eq!(end, Some(End::Past));
    // And the head itself, started again, by the backup as it was.
    let generation = Generation { takeover: backup.takeover, start: 2 };
    cluster.cores[0].restart();
    for other in [1, 2] {
        cluster.set_cut(other, true);
    }
    for other in [1, 2] {
        cluster.set_cut(other, false);
    }
    assert_eq!(begin(&mut cluster, 0, generation, &backup), Some(End::Past));
    // By a change of the record as it was, above all that was opened, nothing is lost.
    let generation = Generation { takeover: takeover + 1, start: 3 };
    cluster.record.takeover = generation.takeover;
    cluster.record.edition += 1;
    cluster.record.revision = 2000;
    let newest = cluster.record.clone();
    assert_eq!(begin(&mut cluster, 0, generation, &newest), None);
    cluster.run(0, &mut random, 20);
    cluster.check(0);
}

/// Nothing is acknowledged without who is left out before those who stay keep that durably.
#[test]
fn an_ejection_is_kept_by_those_who_stay_before_it_counts() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0x1dea));
    cluster.take_over(0);
    cluster.pass(300 * MS);
    cluster.set_cut(2, true);
    let waits = cluster.write(0, &mut random);
    // Whoever stays has the write, but cannot keep anything more.
    cluster.cores[1].is_stalled = true;
    cluster.pass(2000 * MS);
    assert_eq!(cluster.record.stale.keys().copied().collect::<Vec<_>>(), [member(2)]);
    assert!(cluster.take_answer(0, waits).is_none(), "one in sync does not know that another is left out");
    cluster.cores[1].is_stalled = false;
    cluster.pass(100 * MS);
    assert_eq!(cluster.take_answer(0, waits).map(|answer| answer.0), Some(Ok(())));
    for core in &cluster.cores[..2] {
        let state = core.stores[0].as_ref().unwrap().state(PLACE.object).unwrap();
        assert_eq!(state.revision, cluster.record.edition);
    }
}

#[test]
fn a_partition_goes_to_another_store_and_the_former_owner_gives_it_up() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0x30e5));
    cluster.record.partitions = vec![partition_of(&[0, 1])];
    cluster.take_over(0);
    cluster.pass(300 * MS);
    cluster.run(0, &mut random, 200);
    assert!(cluster.cores[2].held().is_empty(), "it owns nothing yet");

    cluster.tell(0, |record| {
        let mut partition = partition_of(&[0, 1, 2]);
        partition.epoch = Epoch(4);
        partition.owners[2].is_complete = false;
        record.partitions = vec![partition];
    });
    cluster.run(0, &mut random, 50);
    cluster.pass(500 * MS);
    assert!(cluster.record.partitions[0].owners[2].is_complete, "its head has said that it has everything");
    cluster.run(0, &mut random, 50);
    cluster.assert_equal_copies();

    // The former owner hears of it before the head does.
    let share = Share { partition: 0, of: 1, epoch: Epoch(5) };
    let retire = |cluster: &mut Cluster| {
        cluster.cores[1].with(|replicating, ground| replicating.retire(member(1), VOLUME, share, ground));
        cluster.work();
    };
    retire(&mut cluster);
    assert!(cluster.cores[1].held().is_empty(), "nothing is left");
    assert!(cluster.cores[1].replicating.has_retired(member(1), VOLUME, share));
    let waits = cluster.write(0, &mut random);
    assert!(cluster.take_answer(0, waits).is_none(), "it counts on an owner that is none any more");
    cluster.tell(0, |record| {
        record.partitions = vec![partition_of(&[0, 2])];
        record.partitions[0].epoch = Epoch(5);
    });
    cluster.pass(300 * MS);
    assert_eq!(cluster.take_answer(0, waits).map(|answer| answer.0), Some(Ok(())));
    cluster.run(0, &mut random, 50);
    cluster.check(0);
    assert!(cluster.cores[1].held().is_empty(), "nothing comes back");
}

#[test]
fn a_head_takes_no_request_before_it_has_opened_and_none_that_came_for_another() {
    let (mut cluster, mut random) = (Cluster::new(), Random(0xabba));
    cluster.take_over(0);
    cluster.pass(300 * MS);
    cluster.run(0, &mut random, 10);
    cluster.take_over(1);
    let read = || Wanted::Read(BLOCKS.start..BLOCKS.start + 1);
    // The former one may answer still what is sent to both.
    assert!(!cluster.cores[1].replicating.has_opened(VOLUME));
    let early = cluster.start(1, read());
    assert_eq!(cluster.take_answer(1, early).map(|answer| answer.0), Some(Err(StoreError::NoHead)));
    cluster.pass(2500 * MS);
    assert!(cluster.cores[1].replicating.has_opened(VOLUME));
    let takeover = cluster.record.takeover;
    for (takeover, result) in [(takeover - 1, Err(StoreError::NoHead)), (takeover, Ok(()))] {
        let token = cluster.start_under(1, takeover, read());
        assert_eq!(cluster.take_answer(1, token).map(|answer| answer.0), Some(result));
    }
}
