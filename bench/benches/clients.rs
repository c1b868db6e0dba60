//! What knowing clients costs a request: finding its place, counting, and comparing tags, in nanoseconds.
//!
//! Time is CPU time of this thread. One Linux initiator, 16 of them, and 512 of which each comes rarely; writes go to blocks
//! all over a volume of 1 GiB, so that what is remembered of them does not lie in the first cache. Exits 1 if anything
//! allocated.
//!
//! `cargo bench -p torus-bench --bench clients`
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::hint::black_box;
use std::process::ExitCode;

use aoe_xdp::target::{Action, AoePolicy, Export, Ingress, Io, IoKind, ON_ALL_INTERFACES, respond};
use aoe_xdp::wire::{Address, AtaArg, AtaHead, Header, Mac, command};
use cluster_map::{ClusterId, ControlMap, DataMap, Geometry, NodeId};
use rustix::time::{ClockId, clock_gettime};
use torus_dataplane::clients::Clients;
use zerocopy::IntoBytes;

const REQUESTS: usize = 100_000;
const ROUNDS: usize = 15;
const ADDRESS: Address = Address { shelf: 1, slot: 1 };
const SECTORS: u64 = 1 << 21;
/// From one request to the next: 100 000 a second.
const STEP_NS: u64 = 10_000;

fn export() -> Export {
    Export {
        key: 0,
        address: ADDRESS,
        mac: Mac([0x02, 0, 0, 0, 0, 0x10]),
        size_sectors: SECTORS,
        read_only: false,
        serial: String::new(),
        config_string: Vec::new(),
        on_interfaces: ON_ALL_INTERFACES,
        masks: Vec::new(),
        reserved_for: Vec::new(),
        allow: AoePolicy::default(),
    }
}

/// A request as the target leaves it.
fn request(export: &Export, number: u64, clients: u64, write: bool) -> Io {
    let client = number % clients;
    let [.., a, b] = client.to_be_bytes();
    let station = Mac([0x02, 0, 0, 0xc1, a, b]);
    // Ticks of a kernel with 1000 a second.
    let (sequence, ticks) = ((number / clients) & 0x7fff, (number * STEP_NS / 1_000_000) & 0xffff);
    let tag = u32::try_from(sequence << 16 | ticks).unwrap();
    let lba = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (SECTORS / 8) * 8;
    let header = Header::request(export.mac, station, ADDRESS, command::ATA, tag);
    let head = AtaHead { header, arg: AtaArg::read_write_ext(lba, 8, write) };
    let ingress = Ingress { mac: Mac([2, 0, 0, 0, 0, 9]), ordinal: 0, sectors_max: 16, sectors_told: 16 };
    let len = head.as_bytes().len() + if write { 4096 } else { 0 };
    match respond(export, &ingress, head.as_bytes(), len) {
        Action::Io(io) => io,
        other => panic!("{other:?}"),
    }
}

fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).expect("time is positive")
}

fn measure(name: &str, stations: u64, write: bool) -> bool {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("map");
    let geometry = Geometry::new(1, ClusterId([1; 16]), NodeId([2; 16]));
    let _control = ControlMap::create(&path, &geometry).unwrap();
    let map = DataMap::attach(&path).unwrap();
    let mut clients = Clients::new(1024, map.core_clients(0).unwrap());
    let export = export();
    let (mut number, mut allocations, mut late) = (0, 0, 0_u64);
    let mut ns: Vec<f64> = (0..=ROUNDS)
        .map(|_| {
            let requests: Vec<Io> =
                (number..).take(REQUESTS).map(|number| request(&export, number, stations, write)).collect();
            let begin = cpu_ns();
            allocations += allocation_counter::measure(|| {
                for io in &requests {
                    number += 1;
                    let now_ns = number * STEP_NS;
                    let client = clients.seen(export.key, ADDRESS, io.initiator(), now_ns).unwrap();
                    late += u64::from(clients.is_late(client, io, now_ns));
                    clients.admitted(client);
                    if io.kind == IoKind::Write {
                        clients.written(client, io, now_ns);
                    }
                    clients.answered(black_box(client), io.kind, 4096, 50_000);
                }
            })
            .count_total;
            (cpu_ns() - begin) as f64 / REQUESTS as f64
        })
        .skip(1)
        .collect();
    ns.sort_by(f64::total_cmp);
    println!("{name:<50} {:>7.1} {:>7.1} {allocations:>6}", ns[ROUNDS / 2], ns[0]);
    assert_eq!(late, 0, "nothing came late");
    allocations == 0
}

fn main() -> ExitCode {
    println!("{:<50} {:>7} {:>7} {:>6}", "per AoE request", "ns", "least", "alloc");
    let all = [
        measure("read, one client", 1, false),
        measure("write, one client", 1, true),
        measure("write, 16 clients", 16, true),
        measure("read, 512 clients", 512, false),
        measure("write, 512 clients", 512, true),
    ];
    if all.iter().all(|ok| *ok) { ExitCode::SUCCESS } else { ExitCode::from(1) }
}
