//! What a request costs on its way through the range order and through serving, in nanoseconds and allocations.
//!
//! Time is CPU time of this thread, so that a busy machine does not enter much. The device ends every request at once and
//! keeps nothing, so that what is left is the bookkeeping, the checksum of every block, for writes the one copy of their data,
//! and for reads that the device fills their memory: each block of the volume holds the same byte, since the store would
//! not take anything else for what was written. Disk requests are those of journal, placement and checkpoints together.
//! Prints one line per case, the medians of several rounds; exits 1 if anything allocated.
//!
//! `cargo bench -p torus-bench --bench order`
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../src/null_device.rs"]
mod null_device;

use std::hint::black_box;
use std::process::ExitCode;

use af_xdp::region::{Pool, Region, RegionConfig};
use aoe_xdp::link::RxFrame;
use aoe_xdp::order::{Access, RangeOrder, RequestId};
use aoe_xdp::target::{Action, AoePolicy, Export, Ingress, Io, ON_ALL_INTERFACES, respond};
use aoe_xdp::wire::{Address, Mac};
use cluster_map::{ClusterId, ControlMap, CoreStats, DataMap, Geometry, NodeId};
use rustix::time::{ClockId, clock_gettime};
use torus_dataplane::clients::Clients;
use torus_dataplane::exchange::{Backing, Served};
use torus_dataplane::fairness::Limits;
use torus_dataplane::replicating::Replicating;
use torus_dataplane::serving::{Around, Arrival, Serving};
use torus_dataplane::store::extent::format::Shape;
use torus_dataplane::store::extent::fresh::FreshStore;
use torus_dataplane::store::extent::shard::Object;
use torus_replication::terms::Site;

use null_device::{BYTE, NullDevices, request_frame};

const REQUESTS_MAX: u32 = 1024;
const LIMITS: Limits = Limits { requests: REQUESTS_MAX, clients: REQUESTS_MAX, device_depth: 128 };
/// Requests of one batch: a window of a Linux initiator.
const BATCH: usize = 32;
const BATCHES: usize = 4_000;
const ROUNDS: usize = 15;
const VOLUME_SECTORS: u64 = 1 << 17;
/// Room for the volume and the store's tables.
const DEVICE_BYTES: u64 = 128 << 20;
const ADDRESS: Address = Address { shelf: 1, slot: 1 };
const EXPORT_MAC: Mac = Mac([0x02, 0, 0, 0, 0, 0x10]);

/// A core without links and disks.
struct Core {
    serving: Serving,
    devices: NullDevices,
    senders: Pool,
    served: Vec<Option<Served>>,
    export: Export,
    stats: CoreStats,
    _control: ControlMap,
    _folder: tempfile::TempDir,
}

impl Core {
    fn new() -> Core {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("map");
        let geometry = Geometry::new(1, ClusterId([1; 16]), NodeId([2; 16]));
        let control = ControlMap::create(&path, &geometry).unwrap();
        let map = DataMap::attach(&path).unwrap();
        let config = RegionConfig { cores: 2, chunks_per_core: 8192, headers_per_core: 64 };
        let region = Region::new(config).unwrap();
        let store = FreshStore::new(DEVICE_BYTES, Shape { shards: Some(1), journal_blocks: None }).unwrap();
        let clients = Clients::new(REQUESTS_MAX, map.core_clients(0).unwrap());
        let mut serving = Serving::new(LIMITS, clients, Replicating::new(Site::default(), 0));
        serving.open_store(0, store.shards.into_iter());
        let mut core = Core {
            serving,
            devices: NullDevices::new(region.pool(0).unwrap()),
            senders: region.pool(1).unwrap(),
            served: vec![Some(Served {
                store: 0,
                backing: Backing::Layer(Object { shard: 0, number: 0 }),
                owner: 0,
            })],
            export: Export {
                key: 0,
                address: ADDRESS,
                mac: EXPORT_MAC,
                size_sectors: VOLUME_SECTORS,
                read_only: false,
                serial: String::new(),
                config_string: Vec::new(),
                on_interfaces: ON_ALL_INTERFACES,
                masks: Vec::new(),
                reserved_for: Vec::new(),
                allow: AoePolicy::default(),
            },
            stats: map.core_stats(0).unwrap(),
            _control: control,
            _folder: folder,
        };
        for lba in (0..VOLUME_SECTORS).step_by(16) {
            let request = core.request(lba, 16, true, BYTE);
            core.serve(std::slice::from_ref(&request));
            for segment in request.1.into_segments() {
                core.senders.release(segment.chunk);
            }
        }
        core
    }

    /// A request as it is after the target has looked at its frame.
    fn request(&mut self, lba: u64, sectors: u8, write: bool, byte: u8) -> (Io, RxFrame) {
        let data = write.then_some(byte);
        let frame = request_frame(&mut self.senders, &self.export, lba, sectors, data).unwrap();
        let ingress = Ingress { mac: Mac([2, 0, 0, 0, 0, 9]), ordinal: 0, sectors_max: 16, sectors_told: 16 };
        match respond(&self.export, &ingress, frame.head(self.senders.region()), frame.len()) {
            Action::Io(io) => (io, frame),
            other => panic!("{other:?}"),
        }
    }

    /// Serves one batch to its last answer.
    fn serve(&mut self, batch: &[(Io, RxFrame)]) {
        let Core { serving, devices, served, export, stats, .. } = self;
        let mut around = Around { devices, served, stats, now_ns: 1 };
        for (io, frame) in batch {
            serving.admit(Arrival { io: *io, export, interface: 0, frame }, &mut around);
        }
        loop {
            if serving.finish_next(&mut around) {
                while let Some(answer) = serving.next_answer() {
                    for segment in black_box(answer).data {
                        around.devices.pool.release(segment.chunk);
                    }
                }
            } else if serving.start_next(&mut around) {
            } else if let Some(ended) = around.devices.next_ended() {
                serving.disk_ended(0, ended.token, ended.blocks, Ok(()), &mut around);
            } else if serving.turn_stores(&mut around) {
            } else {
                return;
            }
        }
    }
}

fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).expect("time is positive")
}

/// Prints what one step costs, by the medians of the rounds; whether it allocated nothing. A step is for `requests`
/// requests, and `disk_requests` tells how many have gone to the device so far.
fn report(
    name: &str,
    requests: usize,
    mut step: impl FnMut(),
    disk_requests: impl Fn() -> Option<u64>,
) -> bool {
    (0..BATCHES / 10).for_each(|_| step());
    let before = disk_requests();
    let mut allocations = 0;
    let mut ns: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let begin = cpu_ns();
            allocations += allocation_counter::measure(|| (0..BATCHES).for_each(|_| step())).count_total;
            (cpu_ns() - begin) as f64 / (BATCHES * requests) as f64
        })
        .collect();
    ns.sort_by(f64::total_cmp);
    let all = (ROUNDS * BATCHES * requests) as f64;
    let per_request = before.zip(disk_requests()).map(|(before, after)| (after - before) as f64 / all);
    let disk = per_request.map_or(String::from("-"), |per_request| format!("{per_request:.2}"));
    println!("{name:<58} {:>7.1} {:>7.1} {disk:>7} {allocations:>6}", ns[ROUNDS / 2], ns[0]);
    allocations == 0
}

fn order_alone(name: &str, blocks: u64) -> bool {
    let mut order = RangeOrder::new(REQUESTS_MAX);
    let mut first_block = 0u64;
    let mut step = || {
        let ids = 0..u32::try_from(BATCH).expect("a few");
        for id in ids.clone() {
            first_block = first_block.wrapping_add(7);
            let block = first_block % blocks;
            black_box(order.admit(RequestId(id), 0, block, block, Access::Exclusive));
        }
        for id in ids {
            order.release(RequestId(id), |granted| {
                black_box(granted);
            });
        }
    };
    report(name, BATCH, &mut step, || None)
}

/// Serves batches of requests that `make` chooses by number: (sector, sectors, byte of a write's data).
fn serving(name: &str, write: bool, make: impl Fn(usize) -> (u64, u8, u8)) -> bool {
    /// Batches that follow each other with other blocks, so that caches hold what they hold in service.
    const DIFFERENT: usize = 16;
    let mut core = Core::new();
    let batches: Vec<Vec<_>> = (0..DIFFERENT)
        .map(|batch| {
            let request = |at| {
                let (lba, sectors, byte) = make(at);
                core.request(lba + 4096 * batch as u64, sectors, write, byte)
            };
            (0..BATCH).map(request).collect()
        })
        .collect();
    let disk_requests = std::cell::Cell::new(0);
    let mut next = batches.iter().cycle();
    let ok = report(
        name,
        BATCH,
        || {
            core.serve(next.next().unwrap());
            disk_requests.set(core.devices.requests);
        },
        || Some(disk_requests.get()),
    );
    assert_eq!(core.devices.pool.free_chunks(), core.devices.pool.chunk_capacity(), "{name}");
    ok
}

fn main() -> ExitCode {
    println!(
        "{:<58} {:>7} {:>7} {:>7} {:>6}",
        "per AoE request, in batches of 32", "ns", "least", "disk", "alloc"
    );
    let at = |at: usize| at as u64;
    let all = [
        order_alone("order alone: no overlap", 1 << 20),
        order_alone("order alone: all in one block", 1),
        serving("read 4 KiB: no overlap", false, |i| (8 * at(i), 8, 0)),
        serving("read 4 KiB: all of one block", false, |_| (0, 8, 0)),
        serving("read 1 KiB: no overlap", false, |i| (16 * at(i), 2, 0)),
        serving("read 1 KiB: four neighbours of each block, merged", false, |i| {
            (2 * at(i) + at(i / 4) * 8, 2, 0)
        }),
        serving("write 4 KiB: no overlap", true, |i| (8 * at(i), 8, 1)),
        serving("write 4 KiB: all of one block, different data", true, |i| (0, 8, u8::try_from(i).unwrap())),
        serving("write 4 KiB: all of one block, duplicates", true, |_| (0, 8, 1)),
        serving("write 1 KiB: no overlap, read-modify-write each", true, |i| (16 * at(i), 2, 1)),
        serving("write 1 KiB: four neighbours of each block, merged", true, |i| {
            (2 * at(i) + at(i / 4) * 8, 2, 1)
        }),
    ];
    if all.iter().all(|ok| *ok) { ExitCode::SUCCESS } else { ExitCode::from(1) }
}
