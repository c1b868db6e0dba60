//! What a 4 KiB read of one export costs on a node with one export, and on a node with ten thousand: CPU time, and, where
//! valgrind(1) is installed, instructions.
//!
//! A read goes its whole way but the link and the disk, which do not know of exports: routing by address, the target's
//! decision, the core that owns it, the range order, the client's record, the store's extent table, which has one for each
//! export, the checksum, the answer. The device ends every request at once. Prints one line for each number of exports and the ratio; exits 1 if reads cost more than
//! 5 % more instructions, or CPU time where instructions cannot be counted.
//!
//! `cargo bench -p torus-bench --bench exports`
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../src/null_device.rs"]
mod null_device;

use std::hint::black_box;
use std::process::{Command, ExitCode};

use af_xdp::region::{Pool, Region, RegionConfig};
use aoe_xdp::link::RxFrame;
use aoe_xdp::target::{
    Action, AoePolicy, Export, ExportTable, Ingress, ON_ALL_INTERFACES, Route, respond, route,
};
use aoe_xdp::wire::{Address, Mac};
use cluster_map::{ClusterId, ControlMap, CoreStats, DataMap, Geometry, NodeId};
use rustix::time::{ClockId, clock_gettime};
use torus_dataplane::clients::Clients;
use torus_dataplane::exchange::{Backing, Served};
use torus_dataplane::fairness::Limits;
use torus_dataplane::replicating::Replicating;
use torus_dataplane::serving::{Around, Arrival, Serving};
use torus_dataplane::store::EXTENT_BYTES;
use torus_dataplane::store::extent::format::Shape;
use torus_dataplane::store::extent::fresh::FreshStore;
use torus_dataplane::store::extent::shard::Object;
use torus_replication::terms::Site;

use null_device::{BYTE, NullDevices, request_frame};

const MANY: u32 = 10_000;
const LIMITS: Limits = Limits { requests: 1024, clients: 1024, device_depth: 128 };
/// Reads of one batch: a window of 32.
const BATCH: u64 = 32;
const BATCHES: u32 = 2_000;
const ROUNDS: usize = 31;
/// Batches of the two counted runs; their difference leaves the start out.
const COUNTED: [u32; 2] = [100, 1_100];
const INGRESS: Ingress =
    Ingress { mac: Mac([2, 0, 0, 0, 0, 9]), ordinal: 0, sectors_max: 16, sectors_told: 16 };

fn export(key: u32) -> Export {
    let [_, _, high, low] = key.to_be_bytes();
    Export {
        key,
        address: Address { shelf: u16::try_from(key / 250).unwrap(), slot: u8::try_from(key % 250).unwrap() },
        mac: Mac([0x02, 0xaa, 0, high, low, 0x10]),
        size_sectors: 8192,
        read_only: false,
        serial: String::new(),
        config_string: Vec::new(),
        on_interfaces: ON_ALL_INTERFACES,
        masks: Vec::new(),
        reserved_for: Vec::new(),
        allow: AoePolicy::default(),
    }
}

/// A core that serves a number of exports, and the frames of a batch of reads of one of them.
struct Core {
    serving: Serving,
    devices: NullDevices,
    senders: Pool,
    table: ExportTable,
    served: Vec<Option<Served>>,
    frames: Vec<RxFrame>,
    stats: CoreStats,
    _control: ControlMap,
    _folder: tempfile::TempDir,
}

impl Core {
    fn new(exports: u32) -> Core {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("map");
        let control =
            ControlMap::create(&path, &Geometry::new(1, ClusterId([1; 16]), NodeId([2; 16]))).unwrap();
        let map = DataMap::attach(&path).unwrap();
        let region =
            Region::new(RegionConfig { cores: 2, chunks_per_core: 4096, headers_per_core: 64 }).unwrap();
        let mut serving = Serving::new(
            LIMITS,
            Clients::new(1024, map.core_clients(0).unwrap()),
            Replicating::new(Site::default(), 0),
        );
        // An extent for each export, all on one shard, and room for the tables.
        let device_bytes = (256 << 20) + u64::from(exports) * 2 * EXTENT_BYTES;
        let store = FreshStore::new(device_bytes, Shape { shards: Some(1), journal_blocks: None }).unwrap();
        serving.open_store(0, store.shards.into_iter());
        let served = |number| {
            Some(Served { store: 0, backing: Backing::Layer(Object { shard: 0, number }), owner: 0 })
        };
        let mut senders = region.pool(1).unwrap();
        let read = export(exports / 2);
        let frames = (0..BATCH).map(|n| request_frame(&mut senders, &read, 8 * n, 8, None).unwrap());
        let frames = frames.collect();
        let mut core = Core {
            serving,
            devices: NullDevices::new(region.pool(0).unwrap()),
            senders,
            table: ExportTable::new((0..exports).map(export).collect()).unwrap(),
            served: (0..exports).map(served).collect(),
            frames,
            stats: map.core_stats(0).unwrap(),
            _control: control,
            _folder: folder,
        };
        for key in 0..exports {
            core.write(&export(key), 0);
        }
        for n in 0..BATCH {
            core.write(&read, 8 * n);
        }
        core
    }

    /// Writes a block, so that the export has an extent, and the block something to read.
    fn write(&mut self, export: &Export, lba: u64) {
        let write = request_frame(&mut self.senders, export, lba, 8, Some(BYTE)).unwrap();
        let reads = std::mem::replace(&mut self.frames, vec![write]);
        self.run(1);
        for segment in std::mem::replace(&mut self.frames, reads).into_iter().flat_map(RxFrame::into_segments)
        {
            self.senders.release(segment.chunk);
        }
    }

    /// Serves the batch so many times.
    fn run(&mut self, batches: u32) {
        let Core { serving, devices, senders, table, served, frames, stats, .. } = self;
        for _ in 0..batches {
            let mut around = Around { devices: &mut *devices, served, stats, now_ns: 1 };
            for frame in &*frames {
                let head = frame.head(senders.region());
                let Route::One(export) = route(table, &INGRESS, head) else { panic!("it is there") };
                assert_eq!(around.served[export.key as usize].as_ref().map(|served| served.owner), Some(0));
                let Action::Io(io) = respond(export, &INGRESS, head, frame.len()) else {
                    panic!("it is work for the store")
                };
                serving.admit(Arrival { io, export, interface: 0, frame }, &mut around);
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
                    break;
                }
            }
        }
    }
}

fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).expect("time is positive")
}

/// CPU time of a read with one export and with many, in turns, so that the machine's moods meet both: the medians.
fn cpu_time() -> [f64; 2] {
    let mut cores = [1, MANY].map(Core::new);
    let mut ns = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (core, ns) in cores.iter_mut().zip(&mut ns) {
            let begin = cpu_ns();
            core.run(BATCHES);
            ns.push((cpu_ns() - begin) as f64 / (u64::from(BATCHES) * BATCH) as f64);
        }
    }
    ns.map(|mut ns| {
        ns.sort_by(f64::total_cmp);
        ns[ROUNDS / 2]
    })
}

/// Instructions of a run of this program under valgrind; `None` where there is none.
fn instructions_of(exports: u32, batches: u32) -> Option<f64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().ok()?)
        .args(["--run", &exports.to_string(), &batches.to_string()])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let collected = text.lines().find_map(|line| line.split("Collected : ").nth(1));
    let count = collected.and_then(|count| count.trim().parse().ok());
    assert!(output.status.success() && count.is_some(), "valgrind could not count: {text}");
    count
}

fn instructions() -> Option<[f64; 2]> {
    let of = |exports| {
        let [few, more] = COUNTED.map(|batches| instructions_of(exports, batches));
        Some((more? - few?) / (u64::from(COUNTED[1] - COUNTED[0]) * BATCH) as f64)
    };
    Some([of(1)?, of(MANY)?])
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--run") {
        Core::new(arguments[at + 1].parse().unwrap()).run(arguments[at + 2].parse().unwrap());
        return ExitCode::SUCCESS;
    }
    let line = |what: &str, [one, many]: [f64; 2]| {
        println!("{what:<36} {one:>10.1} {many:>10.1} {:>8.3}", many / one);
        many / one
    };
    println!("{:<36} {:>10} {:>10} {:>8}", "per read of 4 KiB", "1 export", "10,000", "ratio");
    let time = line("CPU time, ns", cpu_time());
    let ratio = match instructions() {
        Some(counted) => line("instructions", counted),
        None => time,
    };
    if ratio <= 1.05 { ExitCode::SUCCESS } else { ExitCode::from(1) }
}
