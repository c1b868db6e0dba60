//! Reactors on a real link and real stores: what they cost, and that what they serve is right.
//!
//! A node is made of its parts here, without a manager, so that the thread that runs a reactor is the test's own and can
//! be measured.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aoe_xdp::link::{Interface, LinkChoice, Region, RegionConfig};
use aoe_xdp::target::{AoePolicy, Export, ExportTable, Ingress, ON_ALL_INTERFACES};
use aoe_xdp::wire::{ATA_DATA_OFFSET, Address, AtaArg, AtaHead, Header, Mac, command, parse_ata};
use cluster_map::{ClusterId, ControlMap, Counter, DataMap, Geometry, NodeId, StoreId, VolumeId};
use torus_dataplane::changes::ChangeQueue;
use torus_dataplane::exchange::{
    Backing, CoreConfig, Mailbox, Served, StoreAccess, core_of_shard, deal_shards,
};
use torus_dataplane::reactor::{Egress, OwnedQueue, Parts, Reactor};
use torus_dataplane::store::EXTENT_BYTES;
use torus_dataplane::store::extent::extents::FreeSlot;
use torus_dataplane::store::extent::opening::{self, Identity};
use torus_dataplane::store::extent::shard::Object;
use torus_replication::terms::Member;
use zerocopy::IntoBytes;

#[path = "../../aoe-xdp/tests/link/netns.rs"]
mod netns;
#[path = "../../aoe-xdp/tests/link/station.rs"]
#[allow(dead_code, reason = "a part is used here")]
mod station;

#[path = "serving/trouble.rs"]
mod trouble;

use station::Station;

const MTU: u32 = 9000;
const WINDOW: usize = 32;
const VOLUME_SECTORS: u64 = 16 << 11;
const EXPORTS: u8 = 2;
const CLIENT: Mac = Mac([0x02, 0, 0, 0, 0xc1, 0x10]);

fn export(slot: u8) -> Export {
    Export {
        key: u32::from(slot),
        address: Address { shelf: 7, slot },
        mac: Mac([0x02, 0xaa, 0, 0, slot, 0x10]),
        size_sectors: VOLUME_SECTORS,
        read_only: false,
        serial: "test".into(),
        config_string: Vec::new(),
        on_interfaces: ON_ALL_INTERFACES,
        masks: Vec::new(),
        reserved_for: Vec::new(),
        allow: AoePolicy::default(),
    }
}

/// What a node had done when it was stopped.
struct Totals {
    allocations: u64,
    bytes_copied: u64,
    reads: u64,
    writes: u64,
    errors: u64,
    duplicates: u64,
    merged: u64,
    disk_writes: u64,
}

/// What a node is made of, where it matters.
struct Setup {
    cores: u16,
    link: LinkChoice,
    chunks_per_core: u32,
}

struct Node {
    mailboxes: Arc<[Mailbox]>,
    config: CoreConfig,
    cores: Vec<JoinHandle<u64>>,
    control: ControlMap,
    _interface: Interface,
    _folder: tempfile::TempDir,
}

impl Node {
    /// Serves two volumes from a store in `folder` by interface `a0`, whose one queue belongs to core 0; export `n` belongs
    /// to core `n % cores`.
    fn start(folder: &Path, cores: u16) -> Node {
        Node::start_as(folder, &Setup { cores, link: LinkChoice::AfXdp, chunks_per_core: 8192 })
    }

    fn start_as(folder: &Path, setup: &Setup) -> Node {
        let Setup { cores, link, chunks_per_core } = *setup;
        let folder = tempfile::tempdir_in(folder).unwrap();
        let (access, objects) = make_store(&folder.path().join("store"), cores);
        let map_folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let map_path = map_folder.path().join("map");
        let control =
            ControlMap::create(&map_path, &Geometry::new(cores, ClusterId([1; 16]), NodeId([2; 16])))
                .unwrap();
        let map = DataMap::attach(&map_path).unwrap();

        let region = Region::new(RegionConfig { cores, chunks_per_core, headers_per_core: 4096 }).unwrap();
        let mut interface = Interface::open("a0", link, &region).unwrap();
        let mut pools: Vec<_> = (0..cores).map(|core| region.pool(core).unwrap()).collect();
        let mut queue = Some(interface.take_queue(0, &mut pools[0]).unwrap());
        let info = queue.as_ref().unwrap().info().clone();
        for slot in 0..EXPORTS {
            interface.add_mac(export(slot).mac.0).unwrap();
        }
        let served = objects.into_iter().map(|object| {
            Some(Served {
                store: 0,
                backing: Backing::Layer(object),
                owner: core_of_shard(object.shard, usize::from(cores)),
            })
        });
        let config = CoreConfig {
            version: 1,
            exports: ExportTable::new((0..EXPORTS).map(export).collect()).unwrap(),
            ingress: vec![Ingress {
                mac: Mac(info.mac),
                ordinal: 0,
                sectors_max: info.max_sectors,
                sectors_told: 0,
            }],
            mtus: vec![info.mtu],
            served: served.collect(),
            announce: Vec::new(),
            stores: vec![Some(access)],
            drain: false,
        };
        let mailboxes: Arc<[Mailbox]> = (0..cores).map(|_| Mailbox::new().unwrap()).collect();
        let mut node = Node {
            mailboxes,
            config: CoreConfig::default(),
            cores: Vec::new(),
            control,
            _interface: interface,
            _folder: folder,
        };
        let changes = Arc::new(ChangeQueue::default());
        for (core, pool) in (0u16..).zip(pools) {
            let parts = Parts {
                core,
                node: NodeId([2; 16]),
                pool,
                lanes: Vec::new(),
                queues: queue.take().map(OwnedQueue::new).into_iter().collect(),
                egress: vec![if core == 0 { Egress::Own(0) } else { Egress::Other(0) }],
                mailboxes: Arc::clone(&node.mailboxes),
                stats: map.core_stats(core).unwrap(),
                changes: Arc::clone(&changes),
                clients: map.core_clients(core).unwrap(),
                listen: None,
            };
            node.cores.push(std::thread::spawn(move || {
                let mut reactor = Reactor::new(parts).unwrap();
                allocation_counter::measure(|| reactor.run().unwrap()).count_total
            }));
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while node.mailboxes.iter().any(|mailbox| mailbox.wake_handle().is_none()) {
            assert!(Instant::now() < deadline, "a core does not start");
            std::thread::yield_now();
        }
        node.configure(config);
        node
    }

    fn configure(&mut self, config: CoreConfig) {
        let version = config.version;
        let shared = Arc::new(config);
        for mailbox in &*self.mailboxes {
            mailbox.configure(Arc::clone(&shared));
        }
        self.config = CoreConfig { version, ..CoreConfig::default() };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !shared.drain && self.mailboxes.iter().any(|mailbox| mailbox.applied() < version) {
            assert!(Instant::now() < deadline, "a configuration is never applied");
            std::thread::yield_now();
        }
    }

    /// Waits until what was written is in its place: until then it is read from memory, by a copy.
    fn rest(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut before = self.count(Counter::DiskWrites);
        loop {
            // More than twice as long as a shard is at rest before it writes its last.
            std::thread::sleep(Duration::from_millis(500));
            let now = self.count(Counter::DiskWrites);
            if std::mem::replace(&mut before, now) == now {
                return;
            }
            assert!(Instant::now() < deadline, "the store never rests");
        }
    }

    /// What all cores have counted.
    fn count(&self, counter: Counter) -> u64 {
        self.control.stats().iter().map(|core| core.get(counter)).sum()
    }

    /// Drains and stops.
    fn stop(mut self) -> Totals {
        // Counters of the memory are written once a second, and while a core is awake.
        std::thread::sleep(Duration::from_millis(1600));
        let version = self.config.version + 1;
        self.configure(CoreConfig { version, drain: true, stores: vec![None], ..CoreConfig::default() });
        let allocations = self.cores.drain(..).map(|core| core.join().unwrap()).sum();
        let total = |counter| self.count(counter);
        Totals {
            allocations,
            bytes_copied: total(Counter::BytesCopied),
            reads: total(Counter::Reads),
            writes: total(Counter::Writes),
            errors: total(Counter::AtaErrors),
            duplicates: total(Counter::Duplicates),
            merged: total(Counter::Merged),
            disk_writes: total(Counter::DiskWrites),
        }
    }
}

/// A store with a volume for each export, whose shards are dealt out so that export `n` belongs to core `n % cores`.
fn make_store(path: &Path, cores: u16) -> (StoreAccess, Vec<Object>) {
    let identity = Identity {
        cluster: ClusterId([1; 16]),
        node: NodeId([2; 16]),
        expected: None,
        fresh: StoreId([3; 16]),
    };
    let mut opened = opening::open(path, 128 << 20, identity).unwrap();
    let mut catalog = opened.store.catalog().clone();
    let shards = opened.store.layout().shards;
    for slot in 0..EXPORTS {
        catalog.add(VolumeId([slot; 16]), VOLUME_SECTORS, shards).unwrap();
    }
    opened.store.commit(catalog).unwrap();
    let object = |slot| {
        let volume = opened.store.catalog().get(VolumeId([slot; 16])).unwrap();
        assert_eq!(core_of_shard(volume.shard, usize::from(cores)), u16::from(slot) % cores);
        Object { shard: volume.shard, number: volume.object }
    };
    let objects = (0..EXPORTS).map(object).collect();
    let device = opened.store.device();
    // All that the volumes can ever take is there before the first write.
    let wanted = u64::from(EXPORTS) * VOLUME_SECTORS * 512 / EXTENT_BYTES;
    for slot in opened.free.iter().copied().take(usize::try_from(wanted).unwrap()) {
        device.make_ready(opened.store.layout().data_offset(slot), EXTENT_BYTES).unwrap();
        opened.shared.add_free(FreeSlot::new(slot));
    }
    opened.shared.set_no_more(true);
    let access = StoreAccess {
        file: Arc::new(OwnedFd::from(device.file().try_clone().unwrap())),
        durability: device.durability(),
        dsync: device.needs_dsync(),
        mapped: device.map_memory(),
        shards: deal_shards(opened.shards, usize::from(cores)),
        member: Member::default(),
        volumes: Arc::default(),
    };
    (access, objects)
}

/// What an initiator has in flight: a request's tag is its position.
struct Client {
    station: Station,
    _interface: Interface,
}

impl Client {
    fn open() -> Client {
        let (interface, station) = Station::open("b0", LinkChoice::AfXdp, &station::region(1), 0);
        Client { station, _interface: interface }
    }

    fn send(&mut self, slot: u8, tag: u32, arg: AtaArg, data: &[u8]) {
        let header = Header::request(export(slot).mac, CLIENT, export(slot).address, command::ATA, tag);
        let head = AtaHead { header, arg };
        self.station.send(&[head.as_bytes(), data].concat());
    }

    /// Sends all requests, at most [`WINDOW`] at a time, and gives the answers in the order of the requests.
    fn run(&mut self, requests: &[(u8, AtaArg, Vec<u8>)]) -> Vec<Vec<u8>> {
        let mut answers = vec![Vec::new(); requests.len()];
        let (mut sent, mut done) = (0, 0);
        while done < requests.len() {
            while sent < requests.len() && sent - done < WINDOW {
                let (slot, arg, data) = &requests[sent];
                self.send(*slot, u32::try_from(sent).unwrap(), *arg, data);
                sent += 1;
            }
            let frames = self.station.collect_within(1, Duration::from_secs(20));
            assert!(!frames.is_empty(), "answers arrive; {:?}", self.station.queue.stats());
            for frame in frames {
                let head = parse_ata(&frame).unwrap();
                assert_eq!(head.header.version_flags, 0x18, "a response without an AoE error");
                let answer = &mut answers[head.header.tag.get() as usize];
                assert!(answer.is_empty(), "one answer for one request");
                *answer = frame;
                done += 1;
            }
        }
        answers
    }
}

fn write(slot: u8, lba: u64, data: Vec<u8>) -> (u8, AtaArg, Vec<u8>) {
    (slot, AtaArg::read_write_ext(lba, u8::try_from(data.len() / 512).unwrap(), true), data)
}

fn read(slot: u8, lba: u64, sectors: u8) -> (u8, AtaArg, Vec<u8>) {
    (slot, AtaArg::read_write_ext(lba, sectors, false), Vec::new())
}

fn status(answer: &[u8]) -> u8 {
    parse_ata(answer).unwrap().arg.command_status
}

/// Bytes that tell which export and block they belong to, and which write made them.
fn pattern(slot: u8, lba: u64, generation: u8, sectors: u8) -> Vec<u8> {
    let sector = |s: u64| {
        let mut bytes = [generation; 512];
        bytes[..8].copy_from_slice(&(lba + s).to_le_bytes());
        bytes[8] = slot;
        bytes
    };
    (0..u64::from(sectors)).flat_map(sector).collect()
}

fn disk_folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn memory_folder() -> &'static Path {
    Path::new("/dev/shm")
}

/// Writes 4 KiB blocks once, then reads them `rounds` times.
fn read_rounds(folder: &Path, rounds: usize) -> Totals {
    const BLOCKS: u64 = 256;
    let node = Node::start(folder, 1);
    let mut client = Client::open();
    let writes: Vec<_> = (0..BLOCKS).map(|b| write(0, b * 8, pattern(0, b * 8, 1, 8))).collect();
    assert!(client.run(&writes).iter().all(|answer| status(answer) == 0x40));
    node.rest();
    let reads: Vec<_> = (0..BLOCKS).map(|b| read(0, (b * 37 % BLOCKS) * 8, 8)).collect();
    for _ in 0..rounds {
        for (request, answer) in reads.iter().zip(client.run(&reads)) {
            let lba = request.1.lba48();
            assert_eq!(answer[ATA_DATA_OFFSET..], pattern(0, lba, 1, 8), "block at {lba}");
        }
    }
    let totals = node.stop();
    assert_eq!((totals.reads, totals.writes, totals.errors), (BLOCKS * rounds as u64, BLOCKS, 0));
    // Each write is copied once, on its way from the frame to whole blocks; reads are not copied at all.
    assert_eq!(totals.bytes_copied, BLOCKS * 4096, "after {rounds} rounds of reads");
    totals
}

fn reads_cost_no_allocation_and_no_copy(folder: &Path) {
    let few = read_rounds(folder, 2);
    netns::ip("link set a0 down");
    netns::ip("link set a0 up");
    netns::wait_up("a0");
    netns::wait_up("b0");
    let many = read_rounds(folder, 40);
    assert_eq!(few.allocations, many.allocations, "allocations of {} and {} reads", few.reads, many.reads);
}

#[test]
fn reads_from_memory_cost_no_allocation_and_no_copy() {
    netns::isolated("reads_from_memory_cost_no_allocation_and_no_copy", || {
        netns::veth_pair(MTU, 1);
        reads_cost_no_allocation_and_no_copy(memory_folder());
    });
}

#[test]
fn reads_from_disk_cost_no_allocation_and_no_copy() {
    netns::isolated("reads_from_disk_cost_no_allocation_and_no_copy", || {
        netns::veth_pair(MTU, 1);
        reads_cost_no_allocation_and_no_copy(disk_folder());
    });
}

#[test]
fn a_core_serves_what_another_core_receives() {
    netns::isolated("a_core_serves_what_another_core_receives", || {
        netns::veth_pair(MTU, 1);
        let node = Node::start(disk_folder(), 2);
        let mut client = Client::open();
        let mut writes = Vec::new();
        let mut reads = Vec::new();
        for block in 0..200u64 {
            for slot in 0..EXPORTS {
                // Of every alignment, in pieces of up to 16 sectors that never overlap.
                let sectors = u8::try_from(1 + block % 16).unwrap();
                let lba = block * 17 + u64::from(slot);
                writes.push(write(slot, lba, pattern(slot, lba, 3, sectors)));
                reads.push(read(slot, lba, sectors));
            }
        }
        assert!(client.run(&writes).iter().all(|answer| status(answer) == 0x40));
        for ((slot, arg, _), answer) in reads.iter().zip(client.run(&reads)) {
            let expected = pattern(*slot, arg.lba48(), 3, arg.sector_count);
            assert_eq!(answer[ATA_DATA_OFFSET..], expected, "{slot}: {}", arg.lba48());
        }
        client.station.assert_nothing_lost();
        let totals = node.stop();
        assert_eq!((totals.reads, totals.writes, totals.errors), (400, 400, 0));
    });
}

#[test]
fn parts_of_blocks_and_their_copies_share_disk_requests_on_every_core() {
    netns::isolated("parts_of_blocks_and_their_copies_share_disk_requests_on_every_core", || {
        netns::veth_pair(MTU, 1);
        let node = Node::start(disk_folder(), 2);
        let mut client = Client::open();
        let mut writes = Vec::new();
        let mut reads = Vec::new();
        for block in 0..64u64 {
            for slot in 0..EXPORTS {
                for lba in [0, 2, 2, 4, 6].map(|sector| block * 8 + sector) {
                    writes.push(write(slot, lba, pattern(slot, lba, 5, 2)));
                    reads.push(read(slot, lba, 2));
                }
            }
        }
        assert!(client.run(&writes).iter().all(|answer| status(answer) == 0x40), "each has its answer");
        for ((slot, arg, _), answer) in reads.iter().zip(client.run(&reads)) {
            assert_eq!(
                answer[ATA_DATA_OFFSET..],
                pattern(*slot, arg.lba48(), 5, 2),
                "{slot}: {}",
                arg.lba48()
            );
        }
        let totals = node.stop();
        assert_eq!((totals.reads, totals.writes, totals.errors), (640, 640, 0));
        // How many meet depends on when frames come in; a device takes longer than the next frame.
        assert!(totals.duplicates > 0 && totals.merged > 0);
        assert!(totals.disk_writes < totals.writes, "{} of {}", totals.disk_writes, totals.writes);
    });
}

#[test]
fn overlapping_requests_take_effect_in_their_order_of_arrival() {
    netns::isolated("overlapping_requests_take_effect_in_their_order_of_arrival", || {
        netns::veth_pair(MTU, 1);
        let node = Node::start(disk_folder(), 1);
        let mut client = Client::open();
        // Every request meets the ones before it in its two blocks; the disk ends them in any order it likes.
        let mut image = vec![0u8; 16 * 512];
        let mut requests = Vec::new();
        let mut expected = Vec::new();
        let mut random = 1u32;
        for step in 0..600u32 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let first = usize::try_from(random >> 28).unwrap();
            let sectors = 1 + usize::try_from((random >> 20) & 15).unwrap().min(15 - first);
            let (lba, bytes) = (64 + first as u64, first * 512..(first + sectors) * 512);
            if random & 0x4000 == 0 {
                let generation = u8::try_from(step % 251).unwrap();
                let data = pattern(0, lba, generation, u8::try_from(sectors).unwrap());
                image[bytes].copy_from_slice(&data);
                requests.push(write(0, lba, data));
                expected.push(Vec::new());
            } else {
                requests.push(read(0, lba, u8::try_from(sectors).unwrap()));
                expected.push(image[bytes].to_vec());
            }
        }
        for (step, (answer, expected)) in client.run(&requests).iter().zip(&expected).enumerate() {
            assert_eq!(status(answer), 0x40);
            assert!(expected.is_empty() || answer[ATA_DATA_OFFSET..] == expected[..], "step {step}");
        }
        node.stop();
    });
}

#[test]
fn draining_answers_what_was_taken_in() {
    netns::isolated("draining_answers_what_was_taken_in", || {
        netns::veth_pair(MTU, 1);
        let mut node = Node::start(disk_folder(), 1);
        let mut client = Client::open();
        for tag in 0..16u8 {
            let lba = u64::from(tag) * 16;
            let (slot, arg, data) = write(0, lba, pattern(0, lba, tag, 16));
            client.send(slot, u32::from(tag), arg, &data);
        }
        // All are in: each is answered although the node stops at once.
        let deadline = Instant::now() + Duration::from_secs(10);
        while node.control.stats()[0].get(Counter::RxFrames) < 16 {
            assert!(Instant::now() < deadline, "frames never arrive");
            std::thread::yield_now();
        }
        let version = node.config.version + 1;
        node.configure(CoreConfig { version, drain: true, ..CoreConfig::default() });
        for core in node.cores.drain(..) {
            core.join().unwrap();
        }
        // Under a configuration without exports those that had not started end unanswered, as if never received.
        let answers = client.station.collect_within(16, Duration::from_millis(500));
        let writes = node.control.stats()[0].get(Counter::Writes);
        assert_eq!(answers.len() as u64, writes, "answered is what was written");
        assert!(answers.iter().all(|answer| status(answer) == 0x40));
    });
}
