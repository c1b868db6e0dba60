//! Serving against the arrival-order model, on a device in memory that ends disk requests in any order.
//!
//! Frames are made and answers read as on the wire, so that everything between the two takes part: target, order, riders,
//! turns and store. Numbers of the cases are those of the conformance table.
//!
//! The store is thin and takes writes into its journal first. So a node begins with zeros written wherever a case reads: else
//! a read would have nothing to do with the device. What a write costs is told by its batches and by the blocks in them; that
//! they go to their place afterwards is the store's own affair.

use std::collections::HashMap;
use std::sync::Arc;

use af_xdp::region::{CHUNK_BYTES, Region, RegionConfig};
use aoe_xdp::target::{Action, AoePolicy, ExportTable, Ingress, ON_ALL_INTERFACES, Route, respond, route};
use aoe_xdp::wire::{Address, AtaArg, AtaHead, FRAME_LEN_MIN, Header, Mac, command, parse_ata};
use cluster_map::{ClientCounter, ClusterId, ControlMap, DataMap, Geometry, NodeId};
use zerocopy::IntoBytes;

use torus_replication::terms::Site;

use super::*;
use crate::store::extent::format::Shape;
use crate::store::extent::fresh::FreshStore;
use crate::store::extent::shard::RESERVE_CHUNKS;
use crate::store::{BLOCK_SECTORS, Crcs, Durable, EXTENT_SECTORS};

const DEVICE_BYTES: u64 = 32 << 20;
/// One shard for each export.
const SHARDS: u16 = 2;
const EXPORTS: u8 = 2;
/// Longer than a shard that rests takes to put everything in its place.
const REST_NS: u64 = 300_000_000;
const ERROR: IoError = IoError::Errno(5);
/// Requests are made around the border between two extents, so that some go to the device in two pieces.
const BASE: u64 = EXTENT_SECTORS - 6 * BLOCK_SECTORS;
const SECTOR: usize = 512;
const DEVICE_DEPTH: u32 = 128;

/// xorshift: the same numbers for the same seed, everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 11).unwrap() % bound
    }

    fn percent(&mut self, share: usize) -> bool {
        self.below(100) < share
    }
}

#[derive(Debug)]
enum Pending {
    Read { offset: u64, blocks: Blocks, token: u64 },
    Write { offset: u64, blocks: Blocks, token: u64 },
    Sync { token: u64 },
}

impl Pending {
    /// (first byte, bytes, whether it writes)
    fn extent(&self) -> (u64, u64, bool) {
        match self {
            Pending::Read { offset, blocks, .. } => (*offset, blocks.len_bytes() as u64, false),
            Pending::Write { offset, blocks, .. } => (*offset, blocks.len_bytes() as u64, true),
            Pending::Sync { .. } => (0, 0, false),
        }
    }
}

/// How a disk request ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Well,
    /// Nothing was moved.
    Failed,
    /// A write's first block was written, the others were not.
    FailedHalfWay,
}

/// A device in memory, and the frame memory of its core.
struct TestDevices {
    pool: Pool,
    image: Vec<u8>,
    pending: Vec<Pending>,
    /// Where the journals are, bytes: for each the first one and the end.
    journals: Vec<std::ops::Range<u64>>,
    reads: u64,
    /// Writes to journals.
    batches: u64,
    /// Blocks of data in them.
    batch_blocks: u64,
    /// Ended writes of which not all was written, or nothing.
    failed_writes: u64,
}

impl TestDevices {
    fn begin(&mut self, request: Pending) {
        let (from, len, writes) = request.extent();
        for other in &self.pending {
            let (other_from, other_len, other_writes) = other.extent();
            let meet = from < other_from + other_len && other_from < from + len;
            assert!(!meet || !(writes || other_writes), "{request:?} is given out beside {other:?}");
        }
        self.pending.push(request);
    }

    /// Ends one of the disk requests in flight, if there is any.
    fn end(&mut self, pick: usize, end: End) -> Option<(u64, Blocks, Result<(), IoError>)> {
        if self.pending.is_empty() {
            return None;
        }
        let result = if end == End::Well { Ok(()) } else { Err(ERROR) };
        let (token, blocks) = match self.pending.remove(pick) {
            Pending::Sync { token } => (token, Blocks::new()),
            Pending::Read { offset, mut blocks, token } => {
                for index in 0..blocks.len() {
                    let at = usize::try_from(offset).unwrap() + index * BLOCK_BYTES;
                    let bytes = self.pool.bytes_mut(blocks.get_mut(index));
                    match end {
                        End::Well => bytes.copy_from_slice(&self.image[at..at + BLOCK_BYTES]),
                        _ => bytes.fill(0xee),
                    }
                }
                (token, blocks)
            }
            Pending::Write { offset, blocks, token } => {
                let region = Arc::clone(self.pool.region());
                let written = match end {
                    End::Well => blocks.len(),
                    End::Failed => 0,
                    End::FailedHalfWay => 1,
                };
                self.failed_writes += u64::from(end != End::Well);
                for (index, chunk) in blocks.iter().enumerate().take(written) {
                    let at = usize::try_from(offset).unwrap() + index * BLOCK_BYTES;
                    self.image[at..at + BLOCK_BYTES].copy_from_slice(region.bytes(chunk));
                }
                (token, blocks)
            }
        };
        Some((token, blocks, result))
    }
}

impl Devices for &mut TestDevices {
    fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    fn device(&mut self, store: usize) -> impl Disk {
        assert_eq!(store, 0, "there is one store");
        TestDisk(self)
    }

    fn boot_ns(&self) -> u64 {
        0
    }
}

struct TestDisk<'d>(&'d mut TestDevices);

impl Disk for TestDisk<'_> {
    fn read(&mut self, offset_bytes: u64, blocks: Blocks, token: u64) {
        self.0.reads += 1;
        self.0.begin(Pending::Read { offset: offset_bytes, blocks, token });
    }

    fn write(&mut self, offset_bytes: u64, blocks: Blocks, _until: Durable, token: u64) {
        if self.0.journals.iter().any(|journal| journal.contains(&offset_bytes)) {
            self.0.batches += 1;
            // One block tells what the others are.
            self.0.batch_blocks += blocks.len() as u64 - 1;
        }
        self.0.begin(Pending::Write { offset: offset_bytes, blocks, token });
    }

    fn sync(&mut self, token: u64) {
        self.0.begin(Pending::Sync { token });
    }

    fn pool(&mut self) -> &mut Pool {
        &mut self.0.pool
    }
}

/// What an initiator got.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reply {
    tag: u32,
    client: Mac,
    interface: u8,
    status: u8,
    data: Vec<u8>,
}

struct Node {
    serving: Serving,
    devices: TestDevices,
    served: Vec<Option<Served>>,
    exports: ExportTable,
    stats: CoreStats,
    replies: Vec<Reply>,
    /// Frames come from another core's memory, as they do where the interface is not this core's.
    senders: Pool,
    chunks: usize,
    now_ns: u64,
    control: ControlMap,
    _folder: tempfile::TempDir,
}

fn address(slot: u8) -> Address {
    Address { shelf: 7, slot }
}

fn mac(slot: u8) -> Mac {
    Mac([0x02, 0xaa, 0, 0, slot, 0x10])
}

/// The layer of an export, on a shard of its own.
fn object(export: u8) -> Object {
    Object { shard: u16::from(export), number: u32::from(export) }
}

/// The number of the client that looks what a node holds.
const READER: u8 = 0xff;

fn client(number: u8) -> Mac {
    Mac([0x02, 0, 0, 0, 0xc1, number])
}

impl Node {
    fn new(requests: u32, chunks: u32) -> Node {
        Node::with_limits(Limits { requests, clients: requests, device_depth: DEVICE_DEPTH }, chunks)
    }

    fn with_limits(limits: Limits, chunks: u32) -> Node {
        let mut node = Node::thin(limits, chunks);
        node.fill();
        node
    }

    /// A node whose volumes were never written.
    fn thin(limits: Limits, chunks: u32) -> Node {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("map");
        let geometry = Geometry::new(1, ClusterId([1; 16]), NodeId([2; 16]));
        let control = ControlMap::create(&path, &geometry).unwrap();
        let map = DataMap::attach(&path).unwrap();
        let config = RegionConfig { cores: 2, chunks_per_core: chunks, headers_per_core: 64 };
        let region = Region::new(config).unwrap();
        let shape = Shape { shards: Some(SHARDS), journal_blocks: None };
        let store = FreshStore::new(DEVICE_BYTES, shape).unwrap();
        let served = (0..EXPORTS)
            .map(|export| Some(Served { store: 0, backing: Backing::Layer(object(export)), owner: 0 }));
        let export = |slot| Export {
            key: u32::from(slot),
            address: address(slot),
            mac: mac(slot),
            size_sectors: 2 * EXTENT_SECTORS,
            read_only: false,
            serial: String::new(),
            config_string: Vec::new(),
            on_interfaces: ON_ALL_INTERFACES,
            masks: Vec::new(),
            reserved_for: Vec::new(),
            allow: AoePolicy::default(),
        };
        let clients = Clients::new(limits.clients, map.core_clients(0).unwrap());
        let mut serving = Serving::new(limits, clients, Replicating::new(Site::default(), 0));
        serving.open_store(0, store.shards.into_iter());
        let journals = (0..SHARDS).map(|shard| {
            let begin = store.layout.journal_offset(shard);
            begin..begin + u64::from(store.layout.journal_blocks) * BLOCK_BYTES as u64
        });
        Node {
            serving,
            devices: TestDevices {
                pool: region.pool(0).unwrap(),
                image: vec![0; usize::try_from(DEVICE_BYTES).unwrap()],
                pending: Vec::with_capacity(16 * 1024),
                journals: journals.collect(),
                reads: 0,
                batches: 0,
                batch_blocks: 0,
                failed_writes: 0,
            },
            served: served.collect(),
            exports: ExportTable::new((0..EXPORTS).map(export).collect()).unwrap(),
            stats: map.core_stats(0).unwrap(),
            replies: Vec::new(),
            senders: region.pool(1).unwrap(),
            chunks: chunks as usize,
            now_ns: 1,
            control,
            _folder: folder,
        }
    }

    /// Writes zeros wherever cases read, past the requests and their counters, and lets the store rest.
    fn fill(&mut self) {
        const STEP_SECTORS: usize = 16;
        let mut outcomes = Vec::new();
        let places = (0..4096).chain(BASE - 64..BASE + 192).step_by(STEP_SECTORS);
        for (lba, export) in places.flat_map(|lba| (0..EXPORTS).map(move |export| (lba, export))) {
            let mut blocks = take_blocks(&mut self.devices.pool, 2).unwrap();
            for index in 0..blocks.len() {
                self.devices.pool.bytes_mut(blocks.get_mut(index)).fill(0);
            }
            let operation = Operation::Write {
                first_block: lba / BLOCK_SECTORS,
                blocks,
                keep_head_bytes: 0,
                keep_tail_bytes: 0,
                crcs: Crcs::default(),
            };
            let store = self.serving.stores[0].as_mut().unwrap();
            let mut disk = TestDisk(&mut self.devices);
            store.start(RequestToken(0), &object(export), operation, &mut disk, &mut outcomes);
            store.turn(self.now_ns, &mut disk, &mut outcomes);
            while let Some((token, blocks, result)) = self.devices.end(0, End::Well) {
                let store = self.serving.stores[0].as_mut().unwrap();
                let mut disk = TestDisk(&mut self.devices);
                store.finished(token, blocks, result, &mut disk, &mut outcomes);
                store.turn(self.now_ns, &mut disk, &mut outcomes);
            }
            assert!(outcomes.drain(..).all(|outcome| outcome.result == Ok(())));
        }
        self.rest();
        self.assert_idle();
        let devices = &mut self.devices;
        (devices.reads, devices.batches, devices.batch_blocks) = (0, 0, 0);
    }

    fn step<T>(&mut self, step: impl FnOnce(&mut Serving, &mut Around<'_, &mut TestDevices>) -> T) -> T {
        let mut around = Around {
            devices: &mut self.devices,
            served: &self.served,
            stats: &self.stats,
            now_ns: self.now_ns,
        };
        let mut result = None;
        let measured = allocation_counter::measure(|| result = Some(step(&mut self.serving, &mut around)));
        assert_eq!(measured.count_total, 0, "a step allocates");
        result.unwrap()
    }

    /// A frame arrives.
    fn receive(&mut self, asked: &Asked) {
        let export = &self.exports.exports()[usize::from(asked.slot)];
        let dst = export.mac_on(asked.interface);
        let header = Header::request(dst, asked.client, address(asked.slot), command::ATA, asked.tag);
        let arg = AtaArg::read_write_ext(asked.lba, asked.sectors, asked.data.is_some());
        let mut bytes = AtaHead { header, arg }.as_bytes().to_vec();
        bytes.extend(asked.data.iter().flatten());
        bytes.resize(bytes.len().max(FRAME_LEN_MIN), 0);
        let mut segments = Segments::new();
        for part in bytes.chunks(CHUNK_BYTES) {
            let mut chunk = self.senders.take_chunk().unwrap();
            self.senders.bytes_mut(&mut chunk)[..part.len()].copy_from_slice(part);
            let len = u16::try_from(part.len()).unwrap();
            segments.push(Segment { chunk, offset: 0, len }).unwrap();
        }
        let frame = RxFrame::new(segments);
        let region = Arc::clone(self.senders.region());
        let ingress = Ingress {
            mac: Mac([2, 0, 0, 0, 0, 9]),
            ordinal: asked.interface,
            sectors_max: 16,
            sectors_told: 16,
        };
        let Route::One(_) = route(&self.exports, &ingress, frame.head(&region)) else {
            panic!("{asked:?} is for nobody")
        };
        let Action::Io(io) = respond(export, &ingress, frame.head(&region), frame.len()) else {
            panic!("{asked:?} is no work for the store")
        };
        let arrival = Arrival { io, export, interface: asked.interface, frame: &frame };
        let mut around = Around {
            devices: &mut self.devices,
            served: &self.served,
            stats: &self.stats,
            now_ns: self.now_ns,
        };
        let measured = allocation_counter::measure(|| self.serving.admit(arrival, &mut around));
        assert_eq!(measured.count_total, 0, "a step allocates");
        for segment in frame.into_segments() {
            self.senders.release(segment.chunk);
        }
    }

    /// The batch is over: devices get what may start, and what has ended is answered.
    fn work(&mut self) {
        loop {
            if self.step(|serving, around| serving.finish_next(around)) {
                while let Some(answer) = self.serving.next_answer() {
                    self.take(answer);
                }
            } else if !self.step(|serving, around| serving.start_next(around))
                && !self.step(|serving, around| serving.turn_stores(around))
            {
                return;
            }
        }
    }

    fn take(&mut self, answer: Answer) {
        let head = parse_ata(&answer.head.bytes).unwrap();
        let region = Arc::clone(self.devices.pool.region());
        let mut data = Vec::new();
        for segment in answer.data {
            data.extend_from_slice(segment.bytes(&region));
            self.devices.pool.release(segment.chunk);
        }
        self.replies.push(Reply {
            tag: head.header.tag.get(),
            client: head.header.dst,
            interface: answer.interface,
            status: head.arg.command_status,
            data,
        });
    }

    /// Ends one of the disk requests in flight.
    fn end(&mut self, pick: usize, end: End) {
        let (token, blocks, result) = self.devices.end(pick, end).expect("it is in flight");
        self.step(|serving, around| serving.disk_ended(0, token, blocks, result, around));
        self.work();
    }

    /// Ends everything in flight, the newest disk request first, and what comes of it, until every request has ended.
    fn end_all(&mut self) {
        self.work();
        loop {
            if !self.devices.pending.is_empty() {
                self.end(self.devices.pending.len() - 1, End::Well);
            } else if !self.serving.is_empty() {
                // Something waits for memory or a slot, and looks again after a while.
                let due_ns = self.serving.stores_due_ns();
                assert_ne!(due_ns, u64::MAX, "requests wait for nothing");
                self.now_ns = self.now_ns.max(due_ns);
                self.work();
            } else {
                return;
            }
        }
    }

    /// Lets time pass until the store has put everything in its place and wants nothing any more.
    fn rest(&mut self) {
        self.end_all();
        for _ in 0..1000 {
            if self.serving.stores_due_ns() == u64::MAX {
                return;
            }
            self.now_ns = self.now_ns.max(self.serving.stores_due_ns());
            self.end_all();
        }
        panic!("the store never rests");
    }

    /// What a reader finds in a sector, once the store rests: so it is what the device holds.
    fn sector(&mut self, slot: u8, lba: u64) -> Vec<u8> {
        const TAG: u32 = u32::MAX;
        self.rest();
        let before = (self.devices.reads, self.replies.len());
        self.receive(&Asked { slot, client: client(READER), ..read(TAG, lba, 1) });
        self.end_all();
        assert_eq!(self.devices.reads, before.0 + 1, "it comes from the device");
        self.devices.reads = before.0;
        let reply = self.replies.pop().unwrap();
        assert_eq!((self.replies.len(), reply.tag, reply.status), (before.1, TAG, 0x40));
        reply.data
    }

    fn count(&self, counter: Counter) -> u64 {
        self.stats.snapshot().get(counter)
    }

    fn tags(&self) -> Vec<u32> {
        self.replies.iter().map(|reply| reply.tag).collect()
    }

    /// Nothing is left once the store rests: no request, no chunk, no place in the order.
    fn assert_idle(&mut self) {
        self.rest();
        assert!(self.serving.is_empty() && self.serving.order.is_empty());
        let kept = usize::from(SHARDS) * RESERVE_CHUNKS;
        assert_eq!(self.devices.pool.free_chunks() + kept, self.chunks, "every chunk is back");
        assert_eq!(self.senders.free_chunks(), self.chunks);
    }

    /// The same of a node whose store has failed: that one keeps what it could not put in its place, until it is closed.
    fn assert_idle_after_failure(&mut self) {
        self.end_all();
        assert!(self.serving.is_empty() && self.serving.order.is_empty());
        self.serving.close_store(0);
        self.rest();
        assert!(self.serving.drop_closed_store(0, &mut self.devices.pool), "a failed store closes");
        assert_eq!(self.devices.pool.free_chunks(), self.chunks, "every chunk is back");
        assert_eq!(self.senders.free_chunks(), self.chunks);
    }
}

/// A request of an initiator.
#[derive(Debug, Clone)]
struct Asked {
    tag: u32,
    slot: u8,
    client: Mac,
    interface: u8,
    lba: u64,
    sectors: u8,
    /// A write's.
    data: Option<Vec<u8>>,
}

/// What a write with this number puts into each sector: enough to tell a torn one.
fn sector_of(number: u32, lba: u64) -> Vec<u8> {
    let mut bytes = [number.to_le_bytes(), u32::try_from(lba).unwrap().to_le_bytes()].concat();
    bytes.resize(SECTOR, number.to_le_bytes()[0] ^ 0x5a);
    bytes
}

fn payload(number: u32, lba: u64, sectors: u8) -> Vec<u8> {
    (lba..lba + u64::from(sectors)).flat_map(|lba| sector_of(number, lba)).collect()
}

fn read(tag: u32, lba: u64, sectors: u8) -> Asked {
    Asked { tag, slot: 0, client: client(1), interface: 0, lba, sectors, data: None }
}

/// A write whose bytes say its number.
fn write(tag: u32, number: u32, lba: u64, sectors: u8) -> Asked {
    Asked { data: Some(payload(number, lba, sectors)), ..read(tag, lba, sectors) }
}

fn node() -> Node {
    Node::new(64, 512)
}

#[test]
fn case_16_a_request_that_comes_twice_gets_two_answers_for_one_disk_request() {
    let mut node = node();
    for tag in [10, 11] {
        node.receive(&read(tag, 0, 8));
        node.receive(&write(tag + 100, 1, 64, 8));
    }
    node.work();
    assert_eq!((node.devices.reads, node.devices.batches), (1, 1));
    node.end_all();
    let mut tags = node.tags();
    tags.sort_unstable();
    assert_eq!(tags, [10, 11, 110, 111]);
    assert!(node.replies.iter().all(|reply| reply.status == 0x40));
    assert_eq!((node.count(Counter::Duplicates), node.count(Counter::Merged)), (2, 0));
    assert_eq!((node.count(Counter::Reads), node.count(Counter::Writes)), (2, 2));
    node.assert_idle();
}

#[test]
fn case_57_a_resent_write_is_never_answered_before_the_first_copy_is_done_nor_lands_after_a_newer_one() {
    let mut node = node();
    node.receive(&write(1, 1, 8, 8));
    node.work();
    // In the device, slowly. The copy comes with a new tag, then a read and a newer write of the same range.
    node.receive(&write(2, 1, 8, 8));
    node.work();
    node.receive(&read(3, 8, 8));
    node.receive(&write(4, 2, 8, 8));
    // A copy that comes after the newer write is a write of its own in its order of arrival.
    node.receive(&write(5, 1, 8, 8));
    node.receive(&write(6, 3, 8, 8));
    node.work();
    assert!(node.tags().is_empty(), "nothing is answered before the first copy is done");
    assert_eq!(node.devices.batches, 1, "and the second does not go to the device");
    node.end_all();
    assert_eq!(node.tags(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(node.replies[2].data, payload(1, 8, 8));
    assert_eq!(node.sector(0, 8), sector_of(3, 8));
    assert_eq!(node.count(Counter::Duplicates), 1);
    node.assert_idle();
}

#[test]
fn case_59_a_read_beside_a_write_in_flight_sees_all_or_nothing_of_it() {
    let mut node = node();
    node.receive(&read(1, 3, 9));
    node.work();
    node.receive(&write(2, 7, 0, 16));
    node.work();
    node.receive(&read(3, 3, 9));
    node.receive(&read(4, 5, 2));
    node.work();
    node.end_all();
    assert_eq!(node.tags(), [1, 2, 3, 4]);
    assert_eq!(node.replies[0].data, vec![0; 9 * SECTOR], "all old");
    assert_eq!(node.replies[2].data, payload(7, 3, 9), "all new");
    assert_eq!(node.replies[3].data, payload(7, 5, 2));
    node.assert_idle();
}

#[test]
fn case_60_a_copy_by_another_interface_or_station_keeps_the_order_too() {
    let mut node = node();
    node.receive(&write(1, 1, 8, 8));
    node.work();
    // By the second interface, from the same station and from the initiator's second one.
    node.receive(&Asked { interface: 1, ..write(2, 1, 8, 8) });
    node.receive(&Asked { interface: 1, client: client(2), ..write(3, 1, 8, 8) });
    node.work();
    assert_eq!((node.tags(), node.devices.batches), (vec![], 1));
    node.receive(&Asked { interface: 1, client: client(2), ..write(4, 2, 8, 8) });
    node.end_all();
    let answers: Vec<_> = node.replies.iter().map(|r| (r.tag, r.interface, r.client)).collect();
    let expected = [(1, 0, client(1)), (2, 1, client(1)), (3, 1, client(2)), (4, 1, client(2))];
    assert_eq!(answers, expected, "each answer goes where its request came from");
    assert_eq!(node.sector(0, 8), sector_of(2, 8));
    node.assert_idle();
}

#[test]
fn case_61_twice_the_advertised_buffers_are_served_or_dropped_and_retries_succeed() {
    let outstanding = 2 * u32::from(target::BUFFER_COUNT);
    // With room for all, and with room for few: then half of it is one client's at a time.
    for (requests_max, served_at_a_time) in [(1024, outstanding), (64, 32)] {
        let mut node = Node::new(requests_max, 2048);
        let mut missing: Vec<u32> = (0..outstanding).collect();
        let mut asked = 0;
        while !missing.is_empty() {
            let served_before = node.replies.len();
            asked += missing.len();
            for &tag in &missing {
                node.receive(&write(tag, tag, u64::from(tag) * 8, 8));
            }
            node.end_all();
            let done = node.tags();
            assert_eq!(done.len() - served_before, served_at_a_time as usize);
            assert_eq!(done.len() as u64 + node.count(Counter::ClientOverLimit), asked as u64);
            missing.retain(|tag| !done.contains(tag));
        }
        for tag in 0..outstanding {
            assert_eq!(node.sector(0, u64::from(tag) * 8), sector_of(tag, u64::from(tag) * 8));
        }
        node.assert_idle();
    }
}

#[test]
fn a_late_copy_of_a_linux_write_is_dropped_and_counted_where_tags_prove_it() {
    let mut node = node();
    let started_ns = node.now_ns;
    // A tag of the driver: 250 ticks a second, one number for each frame.
    let mut sequence = 0_u32;
    let mut tag = |now_ns: u64| {
        sequence += 1;
        sequence << 16 | u32::try_from((now_ns - started_ns) / 4_000_000).unwrap()
    };
    for station in [1, 2] {
        for _ in 0..200 {
            node.now_ns += 8_000_000;
            let tag = tag(node.now_ns);
            // The second one's tags begin with bit 31: no Linux.
            let tag = tag | u32::from(station == 2) << 31;
            node.receive(&Asked { client: client(station), ..read(tag, 800, 8) });
            node.end_all();
        }
        let (late, first, second) = (tag(node.now_ns), tag(node.now_ns), tag(node.now_ns));
        let asked = |tag, number, lba| Asked { client: client(station), ..write(tag, number, lba, 2) };
        node.receive(&asked(first, 7, 64));
        node.receive(&asked(second, 8, 64));
        node.receive(&asked(late, 6, 66));
        node.receive(&asked(late, 6, 64));
        node.end_all();
        let holds = if station == 1 { 8 } else { 6 };
        assert_eq!(node.sector(0, 64), sector_of(holds, 64), "station {station}");
        assert_eq!(node.sector(0, 66), sector_of(6, 66), "sectors beside it are free");
        let answers = node.tags().iter().filter(|&&tag| tag == late).count();
        assert_eq!(answers, if station == 1 { 1 } else { 2 }, "a late copy has no answer");
    }
    assert_eq!(node.count(Counter::LateWrites), 1);
    let clients = node.control.reader().clients_of(7, 0).unwrap();
    let dropped: Vec<u64> = clients.iter().map(|client| client.get(ClientCounter::DroppedLate)).collect();
    assert_eq!(dropped, [1, 0, 0], "of the two stations and of who looked");
    node.assert_idle();
}

#[test]
fn a_device_that_stands_still_costs_a_bounded_number_of_requests_and_goes_on_by_itself() {
    let mut node = Node::new(64, 512);
    let (mut tag, mut newest) = (0, HashMap::new());
    // Two clients ask for twice what fits, again and again, and get nothing: the device ends no request.
    for round in 0..20 {
        for at in 0..128_u32 {
            tag += 1;
            let client = client(1 + u8::try_from(at % 2).unwrap());
            let lba = u64::from(at) * 8;
            node.receive(&Asked { client, ..write(tag, round, lba, 8) });
            newest.insert(tag, (round, lba));
        }
        node.work();
    }
    assert!(node.tags().is_empty());
    assert!(node.devices.pending.len() <= 64 && node.devices.pool.free_chunks() >= 512 - 2 * 64);
    let dropped = node.count(Counter::ClientOverLimit) + node.count(Counter::RxDropped);
    let held = 20 * 128 - usize::try_from(dropped).unwrap();
    assert!(held <= 64 * 4, "{held} requests are held");
    // It goes on: what was taken in is answered, in order, once each; the newest write of a place is what it holds.
    node.end_all();
    let answered = node.tags();
    assert_eq!(answered.len(), held);
    let mut holds = HashMap::new();
    for tag in answered {
        let (round, lba) = newest.remove(&tag).expect("one answer for each request");
        let before = holds.insert(lba, round);
        assert!(before.is_none_or(|before| before <= round), "answered out of order");
    }
    for (lba, round) in holds {
        assert_eq!(node.sector(0, lba), sector_of(round, lba));
    }
    node.assert_idle();
    // And what comes now is served at once.
    node.receive(&write(9_999, 99, 0, 8));
    node.end_all();
    assert_eq!(node.sector(0, 0), sector_of(99, 0));
}

#[test]
fn a_client_that_asks_for_everything_leaves_room_for_another() {
    let mut node = Node::new(64, 512);
    for tag in 0..200 {
        node.receive(&read(tag, u64::from(tag) * 8, 8));
    }
    assert_eq!(node.count(Counter::ClientOverLimit), 200 - 32);
    for tag in 200..208 {
        node.receive(&Asked { client: client(2), ..read(tag, u64::from(tag) * 8, 8) });
    }
    assert_eq!(node.count(Counter::ClientOverLimit), 200 - 32, "the other one lost nothing");
    node.end_all();
    assert_eq!(node.replies.len(), 32 + 8);
    node.assert_idle();
}

#[test]
fn a_busy_device_serves_clients_in_turn() {
    let mut node = Node::new(1024, 2048);
    for tag in 0..400 {
        node.receive(&read(tag, u64::from(tag) * 8, 8));
    }
    node.work();
    assert_eq!(node.devices.pending.len(), DEVICE_DEPTH as usize);
    let waiting = 400 - u64::from(DEVICE_DEPTH);
    assert_eq!(node.count(Counter::DeviceWaits), waiting);
    for tag in 400..404 {
        node.receive(&Asked { client: client(2), ..read(tag, u64::from(tag) * 8, 8) });
    }
    assert_eq!(node.count(Counter::DeviceWaits), waiting + 4);
    // Eight ends: the four of the small client have started.
    for _ in 0..8 {
        node.end(0, End::Well);
    }
    node.replies.clear();
    for _ in 0..DEVICE_DEPTH {
        node.end(0, End::Well);
    }
    let small = node.replies.iter().filter(|reply| reply.client == client(2)).count();
    assert_eq!(small, 4, "while 264 requests of the other client wait");
    node.end_all();
    node.assert_idle();
}

#[test]
fn four_neighbours_of_1_kib_are_one_write_without_a_read() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 0, 3]] {
        let mut node = node();
        for part in order {
            node.receive(&write(part, part, 16 + 2 * u64::from(part), 2));
        }
        node.work();
        assert_eq!((node.devices.reads, node.devices.batches), (0, 1), "{order:?}");
        assert_eq!(node.devices.batch_blocks, 1);
        node.end_all();
        assert_eq!(node.tags(), order);
        for part in 0..4 {
            let lba = 16 + 2 * u64::from(part);
            assert_eq!(node.sector(0, lba), sector_of(part, lba));
            assert_eq!(node.sector(0, lba + 1), sector_of(part, lba + 1));
        }
        assert_eq!(node.count(Counter::Merged), 3);
        node.assert_idle();
    }
}

#[test]
fn twelve_neighbours_are_one_write_of_three_blocks_and_the_thirteenth_begins_another() {
    let mut node = node();
    for part in 0..13 {
        node.receive(&write(part, part, 16 + 2 * u64::from(part), 2));
    }
    node.work();
    assert_eq!((node.devices.reads, node.devices.batches), (1, 1), "one write; the thirteenth reads first");
    assert_eq!(node.devices.batch_blocks, 3);
    node.end_all();
    assert_eq!((node.devices.reads, node.devices.batches, node.replies.len()), (1, 2, 13));
    assert_eq!(node.devices.batch_blocks, 3 + 1);
    node.assert_idle();
}

#[test]
fn neighbours_of_two_clients_and_exports_are_told_apart_when_they_alternate() {
    let mut node = node();
    for part in 0..4u32 {
        let lba = 16 + 2 * u64::from(part);
        node.receive(&write(part, 1, lba, 2));
        node.receive(&Asked { client: client(2), ..write(10 + part, 2, lba + 64, 2) });
        node.receive(&Asked { slot: 1, ..write(20 + part, 3, lba, 2) });
    }
    node.work();
    assert_eq!((node.devices.reads, node.devices.batches), (0, 2), "one batch for each shard");
    assert_eq!(node.devices.batch_blocks, 3);
    node.end_all();
    for (slot, lba, number) in [(0, 16, 1), (0, 80, 2), (1, 16, 3)] {
        assert_eq!(node.sector(slot, lba + 7), sector_of(number, lba + 7));
    }
    assert_eq!(node.replies.len(), 12);
    node.assert_idle();
}

#[test]
fn parts_of_blocks_are_read_once_and_answered_with_their_slices() {
    let mut node = node();
    node.receive(&write(0, 5, 16, 16));
    node.end_all();
    node.replies.clear();
    // Of three blocks, out of order, one twice, one across a border, one a part of another.
    let parts = [(18, 2), (16, 2), (23, 3), (20, 2), (18, 2), (30, 2), (24, 1)];
    for (tag, (lba, sectors)) in (0..).zip(parts) {
        node.receive(&read(tag, lba, sectors));
    }
    node.work();
    assert_eq!(node.devices.reads, 1);
    node.end_all();
    for ((tag, (lba, sectors)), reply) in (0..).zip(parts).zip(&node.replies) {
        assert_eq!((reply.tag, &reply.data), (tag, &payload(5, lba, sectors)));
    }
    assert_eq!((node.count(Counter::Merged), node.count(Counter::Duplicates)), (5, 1));
    node.assert_idle();
}

#[test]
fn a_request_alone_goes_to_the_device_in_the_turn_that_it_came_in() {
    for asked in [write(1, 1, 16, 2), read(1, 16, 2), write(1, 1, 16, 8)] {
        let mut node = node();
        node.receive(&asked);
        node.work();
        assert_eq!(node.devices.pending.len(), 1);
        // What has started takes no neighbours in: they are written by a request of their own, after it.
        node.receive(&write(2, 2, 18, 2));
        node.work();
        assert_eq!(node.devices.pending.len(), 1);
        node.end_all();
        assert_eq!(node.tags(), [1, 2]);
        node.assert_idle();
    }
}

#[test]
fn whole_blocks_are_left_alone_by_neighbours() {
    let mut node = node();
    node.receive(&write(1, 1, 16, 8));
    node.receive(&write(2, 1, 24, 2));
    node.receive(&write(3, 1, 32, 8));
    node.work();
    // A merge would have cost the whole block a read.
    assert_eq!((node.devices.reads, node.devices.batch_blocks), (1, 2));
    node.end_all();
    assert_eq!((node.devices.reads, node.devices.batch_blocks), (1, 3));
    node.assert_idle();
}

#[test]
fn what_conflicts_in_between_keeps_neighbours_and_duplicates_apart() {
    let mut node = node();
    node.receive(&write(1, 1, 16, 2));
    node.receive(&read(2, 16, 8));
    node.receive(&write(3, 2, 18, 2));
    node.receive(&read(4, 16, 8));
    node.receive(&write(5, 1, 16, 2));
    node.end_all();
    assert_eq!(node.tags(), [1, 2, 3, 4, 5]);
    let old = vec![0; 2 * SECTOR];
    let first = payload(1, 16, 2);
    assert_eq!(node.replies[1].data, [&first[..], &old, &old, &old].concat());
    assert_eq!(node.replies[3].data, [&first[..], &payload(2, 18, 2), &old, &old].concat());
    assert_eq!((node.count(Counter::Merged), node.count(Counter::Duplicates)), (0, 0));
    node.assert_idle();
}

#[test]
fn a_write_that_differs_in_one_byte_or_sector_is_no_duplicate() {
    for sectors in [2, 8, 16] {
        let mut node = node();
        let first = write(1, 1, 16, sectors);
        let mut last_byte = Asked { tag: 2, ..first.clone() };
        *last_byte.data.as_mut().unwrap().last_mut().unwrap() ^= 1;
        let moved = Asked { tag: 3, lba: 17, ..first.clone() };
        let longer = write(4, 1, 16, sectors.min(15) + 1);
        for asked in [&first, &last_byte, &moved] {
            node.receive(asked);
        }
        if sectors < 16 {
            node.receive(&longer);
        }
        node.end_all();
        assert_eq!(node.count(Counter::Duplicates) + node.count(Counter::Merged), 0, "{sectors}");
        assert_eq!(node.replies.len(), if sectors < 16 { 4 } else { 3 });
        node.assert_idle();
    }
}

#[test]
fn duplicates_beyond_the_limit_are_requests_of_their_own() {
    let mut node = Node::new(256, 1024);
    let many = u32::from(RIDERS_PER_REQUEST_MAX) + 3;
    for tag in 0..many {
        node.receive(&read(tag, 16, 8));
        node.receive(&write(1000 + tag, 1, 64, 2));
    }
    node.work();
    // A second read may run beside the first; a second write waits.
    assert_eq!(node.devices.reads, 2 + 1);
    node.end_all();
    // What the second write merges into is on its way to its place: it is in memory still.
    assert_eq!((node.devices.reads, node.devices.batches), (2 + 1, 2));
    assert_eq!(node.replies.len(), 2 * many as usize);
    node.assert_idle();
}

#[test]
fn when_the_device_fails_every_rider_is_told() {
    let mut node = node();
    for part in 0..4 {
        node.receive(&write(part, part, 16 + 2 * u64::from(part), 2));
        node.receive(&read(10 + part, 64 + 2 * u64::from(part), 2));
        node.receive(&Asked { tag: 20 + part, ..write(0, part, 16 + 2 * u64::from(part), 2) });
    }
    node.work();
    assert_eq!(node.devices.pending.len(), 2);
    node.end(0, End::Failed);
    node.end(0, End::Failed);
    assert_eq!(node.replies.len(), 12);
    for reply in &node.replies {
        let expected = if (10..20).contains(&reply.tag) { 0x41 } else { 0x61 };
        assert_eq!((reply.status, reply.data.len()), (expected, 0), "tag {}", reply.tag);
    }
    assert_eq!(node.count(Counter::AtaErrors), 12);
    // What the journal holds is unknown now. No write of the store is acknowledged any more, whichever shard it is of, and
    // reads go on.
    node.receive(&write(40, 9, 16, 8));
    node.receive(&read(41, 16, 8));
    node.receive(&Asked { slot: 1, ..write(42, 9, 16, 8) });
    node.end_all();
    let of = |tag| node.replies.iter().find(|reply| reply.tag == tag).unwrap();
    assert_eq!((of(40).status, of(41).status, of(42).status), (0x61, 0x40, 0x61));
    assert_eq!(of(41).data, vec![0; 8 * SECTOR], "nothing of a batch that failed is read");
    node.assert_idle_after_failure();
}

#[test]
fn without_memory_requests_are_dropped_and_counted_and_come_again() {
    let mut node = Node::new(64, 24);
    let mut held = Vec::new();
    while node.devices.pool.free_chunks() > 1 {
        held.push(node.devices.pool.take_chunk().unwrap());
    }
    let asked: Vec<_> = (0..3).map(|part| write(part, part, 16 + 2 * u64::from(part), 2)).collect();
    let round = |node: &mut Node| {
        asked.iter().for_each(|asked| node.receive(asked));
        node.receive(&read(9, 64, 9));
        node.end_all();
    };
    round(&mut node);
    // The payload took the last chunk: none is left to read the block around it into, nor for the read.
    assert_eq!((node.tags(), node.count(Counter::MemoryExhausted)), (vec![], 4));
    held.into_iter().for_each(|chunk| node.devices.pool.release(chunk));
    round(&mut node);
    assert_eq!(node.replies.len(), 4);
    node.assert_idle();
}

#[test]
fn a_new_configuration_starts_with_requests_of_its_own() {
    let mut node = node();
    node.receive(&write(1, 1, 16, 8));
    node.receive(&read(2, 64, 2));
    node.work();
    node.serving.begin_configuration();
    assert!(!node.serving.is_settled());
    node.receive(&write(3, 1, 16, 8));
    node.receive(&read(4, 64, 2));
    node.work();
    assert_eq!(node.count(Counter::Duplicates), 0);
    assert_eq!(node.devices.reads, 2, "reads may run side by side");
    assert_eq!(node.devices.batches, 1);
    // Unexported meanwhile: what has not started ends unanswered.
    node.served[0] = None;
    let write_in_flight = node.devices.pending.iter().position(|pending| pending.extent().2).unwrap();
    node.end(write_in_flight, End::Well);
    assert_eq!(node.tags(), [1]);
    node.end_all();
    assert!(node.serving.is_settled());
    assert_eq!(node.tags(), [1, 4, 2], "3 had not started");
    node.assert_idle();
}

/// What has been asked so far, and how it ended.
struct History {
    asked: Vec<Asked>,
    random: Random,
    next_write: u32,
}

impl History {
    /// A request that often overlaps recent ones, often is a part of a block, and often repeats a recent one exactly or
    /// nearly.
    fn ask(&mut self) -> Asked {
        let tag = u32::try_from(self.asked.len()).unwrap();
        let random = &mut self.random;
        let recent = self.asked.len().min(24);
        let asked = if recent > 0 && random.percent(25) {
            let mut again = self.asked[self.asked.len() - 1 - random.below(recent)].clone();
            again.tag = tag;
            if random.percent(20) {
                again.interface ^= 1;
            }
            match random.below(8) {
                0 => again.client = client(u8::try_from(random.below(3)).unwrap()),
                1 => again.lba += 1,
                2 => again.slot ^= 1,
                3 => {
                    if let Some(data) = &mut again.data {
                        // One sector is another write's.
                        let at = random.below(usize::from(again.sectors));
                        self.next_write += 1;
                        let sector = sector_of(self.next_write, again.lba + at as u64);
                        data[at * SECTOR..][..SECTOR].copy_from_slice(&sector);
                    }
                }
                _ => {}
            }
            again
        } else {
            let last = self.asked.last().filter(|_| random.percent(50));
            // A neighbour of the last one, or anything near the border.
            let (lba, sectors, slot, number, writes) = match last {
                Some(last) => {
                    let lba = last.lba + u64::from(last.sectors);
                    let sectors = if random.percent(70) { 2 } else { 1 + random.below(16) };
                    (lba, sectors, last.slot, last.client.0[5], last.data.is_some())
                }
                None => {
                    let lba = BASE + random.below(96) as u64;
                    let sectors = if random.percent(60) { 2 } else { 1 + random.below(16) };
                    let slot = u8::from(random.percent(25));
                    let number = u8::try_from(random.below(3)).unwrap();
                    (lba, sectors, slot, number, random.percent(55))
                }
            };
            let lba = if lba > BASE + 110 { BASE } else { lba };
            let sectors = u8::try_from(sectors).unwrap();
            let data = writes.then(|| {
                self.next_write += 1;
                payload(self.next_write, lba, sectors)
            });
            Asked { tag, slot, client: client(number), interface: 0, lba, sectors, data }
        };
        self.asked.push(asked.clone());
        asked
    }
}

/// Runs `count` requests with this seed and holds what was answered against the arrival order. Gives the counts of
/// duplicates, merges, and writes to the device that failed.
///
/// Every other node's volumes were never written. On every fifth one writes fail too, and with the first that does all
/// that come after it to the same shard.
fn against_the_arrival_order(seed: u64, count: usize, limits: Limits, chunks: u32) -> (u64, u64, u64) {
    let is_thin = seed % 4 < 2;
    let mut node = if is_thin { Node::thin(limits, chunks) } else { Node::with_limits(limits, chunks) };
    let writes_fail = seed.is_multiple_of(5);
    let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut history = History { asked: Vec::new(), random, next_write: 0 };
    while history.asked.len() < count {
        for _ in 0..1 + history.random.below(12) {
            let asked = history.ask();
            node.receive(&asked);
        }
        node.work();
        if node.serving.is_settled() && history.random.percent(5) {
            node.serving.begin_configuration();
        }
        for _ in 0..history.random.below(10).min(node.devices.pending.len()) {
            let pick = history.random.below(node.devices.pending.len().max(1));
            let end = match history.random.below(100) {
                0 => End::Failed,
                1 => End::FailedHalfWay,
                _ => End::Well,
            };
            if pick < node.devices.pending.len() {
                let is_read = matches!(node.devices.pending[pick], Pending::Read { .. });
                node.end(pick, if is_read || writes_fail { end } else { End::Well });
            }
        }
        // Now and then it rests: marks, and reads from the device of what was in memory.
        if history.random.percent(2) {
            node.now_ns += REST_NS;
        }
    }
    node.end_all();
    if node.devices.failed_writes == 0 {
        node.assert_idle();
    }

    let mut reply_of: Vec<Option<usize>> = vec![None; history.asked.len()];
    for (at, reply) in node.replies.iter().enumerate() {
        let asked = &history.asked[reply.tag as usize];
        assert_eq!((reply.client, reply.interface), (asked.client, asked.interface), "seed {seed}");
        let earlier = reply_of[reply.tag as usize].replace(at);
        assert_eq!(earlier, None, "seed {seed}: tag {} is answered twice", reply.tag);
    }
    let unanswered = reply_of.iter().filter(|reply| reply.is_none()).count() as u64;
    let dropped = node.count(Counter::MemoryExhausted) + node.count(Counter::ClientOverLimit);
    assert_eq!(unanswered, dropped, "seed {seed}: every request is answered, or dropped and counted");

    // By export and sector: what it may hold, and when the last write and the last request there was answered.
    let sectors = 128;
    let mut may_hold: Vec<Vec<Vec<u8>>> = vec![vec![vec![0; SECTOR]]; usize::from(EXPORTS) * sectors];
    let mut answered_at = vec![(0, 0); usize::from(EXPORTS) * sectors];
    for (asked, reply) in history.asked.iter().zip(&reply_of) {
        let Some(at) = *reply else { continue };
        let reply = &node.replies[at];
        for sector in 0..usize::from(asked.sectors) {
            let lba = asked.lba + sector as u64;
            let slot = usize::from(asked.slot) * sectors + usize::try_from(lba - BASE).unwrap();
            let here = |data: &[u8]| data[sector * SECTOR..][..SECTOR].to_vec();
            let (last_write, last_any) = &mut answered_at[slot];
            let what = format!("seed {seed}, tag {} at sector {lba}", asked.tag);
            match (&asked.data, reply.status) {
                (Some(data), 0x40) => may_hold[slot] = vec![here(data)],
                // A write that failed has been done, or not, in each of its sectors.
                (Some(data), 0x61) => may_hold[slot].push(here(data)),
                (None, 0x40) => {
                    let found = here(&reply.data);
                    assert!(may_hold[slot].contains(&found), "{what}: {:?}", &found[..8]);
                    may_hold[slot] = vec![found];
                }
                (None, 0x41) => {}
                (_, status) => panic!("{what}: status {status:#x}"),
            }
            let after = if asked.data.is_some() { *last_any } else { *last_write };
            assert!(at + 1 > after, "{what}: answered before an earlier one that it overlaps");
            *last_any = (*last_any).max(at + 1);
            if asked.data.is_some() {
                *last_write = (*last_write).max(at + 1);
            }
        }
    }
    let counts = (node.count(Counter::Duplicates), node.count(Counter::Merged), node.devices.failed_writes);
    node.replies.clear();
    for slot in 0..EXPORTS {
        for block in 0..sectors as u64 / BLOCK_SECTORS {
            let first = block * BLOCK_SECTORS;
            node.receive(&Asked { slot, client: client(READER), ..read(0, BASE + first, 8) });
            node.end_all();
            let reply = node.replies.pop().unwrap();
            assert_eq!(reply.status, 0x40);
            for (sector, found) in (usize::try_from(first).unwrap()..).zip(reply.data.chunks(SECTOR)) {
                let expected = &may_hold[usize::from(slot) * sectors + sector];
                assert!(
                    expected.iter().any(|bytes| bytes == found),
                    "seed {seed}: sector {sector} of {slot}"
                );
            }
        }
    }
    if node.devices.failed_writes > 0 {
        node.assert_idle_after_failure();
    }
    counts
}

#[test]
fn case_58_a_hundred_thousand_overlapping_requests_agree_with_their_order_of_arrival() {
    let (mut duplicates, mut merged, mut failed_stores) = (0, 0, 0);
    for seed in 1..=50 {
        // Every other device takes so little that requests wait for it, and are joined there.
        let device_depth = if seed % 2 == 0 { 3 } else { DEVICE_DEPTH };
        let limits = Limits { requests: 256, clients: 256, device_depth };
        let (again, together, failed) = against_the_arrival_order(seed, 2_000, limits, 1024);
        duplicates += again;
        merged += together;
        failed_stores += u32::from(failed > 0);
    }
    assert!(duplicates > 2_000 && merged > 5_000, "{duplicates} duplicates, {merged} merged");
    assert!(failed_stores >= 5, "{failed_stores} stores failed");
}

#[test]
fn with_little_room_and_memory_requests_are_dropped_but_the_rest_agrees_with_its_order() {
    let limits = Limits { requests: 24, clients: 24, device_depth: 8 };
    for seed in 1..=20 {
        against_the_arrival_order(1_000 + seed, 1_000, limits, 40);
    }
}

#[test]
fn a_full_store_refuses_what_needs_room_and_serves_the_rest() {
    let mut node = Node::thin(Limits { requests: 64, clients: 64, device_depth: DEVICE_DEPTH }, 512);
    node.exports = {
        let mut exports = node.exports.exports().to_vec();
        exports.iter_mut().for_each(|export| export.size_sectors = 64 * EXTENT_SECTORS);
        ExportTable::new(exports).unwrap()
    };
    // One block in each extent of the volume: 32 MiB have no room for 64 of 4 MiB.
    for extent in 0..64 {
        node.receive(&write(extent, extent, u64::from(extent) * EXTENT_SECTORS, 8));
        node.end_all();
    }
    let written: Vec<u32> =
        node.replies.iter().filter(|reply| reply.status == 0x40).map(|reply| reply.tag).collect();
    let refused = node.replies.iter().filter(|reply| reply.status == 0x61).count();
    assert!((1..8).contains(&written.len()), "{} extents on 32 MiB", written.len());
    assert_eq!(written.len() + refused, 64);
    for &extent in &written {
        let lba = u64::from(extent) * EXTENT_SECTORS;
        assert_eq!(node.sector(0, lba), sector_of(extent, lba));
        node.receive(&write(100 + extent, 100 + extent, lba + 8, 8));
        node.receive(&read(200 + extent, lba + 16, 8));
        node.end_all();
        assert_eq!(node.sector(0, lba + 8), sector_of(100 + extent, lba + 8), "the extent has room");
    }
    node.assert_idle();
}

#[test]
fn every_step_of_a_long_run_is_without_allocation_and_memory_comes_back() {
    let mut node = node();
    // Many times round the journal, so that it is checkpointed again and again, in batches of all sizes.
    let mut random = Random(11);
    let mut number = 0;
    while node.devices.batch_blocks < 20 * 256 {
        let many = 1 + random.below(48);
        for _ in 0..many {
            number += 1;
            let block = random.below(500) as u64;
            node.receive(&write(number, number, block * BLOCK_SECTORS, 16));
        }
        node.end_all();
    }
    assert_eq!(node.replies.len() as u64 + node.count(Counter::ClientOverLimit), u64::from(number));
    node.assert_idle();
}
