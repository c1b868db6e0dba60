//! CPU time of the running data plane for a 4 KiB read of one export, on a node with one export and on a node with ten thousand.
//!
//! Two such nodes after each other, twice, after one to warm up, on a store in memory at MTU 9000. Prints the median and the least of the rounds for
//! each node, and the ratio of the medians. Needs root: it makes a network namespace.
//!
//! `cargo bench -p torus-dataplane --bench many_exports`
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../../aoe-xdp/tests/link/netns.rs"]
mod netns;
#[path = "../tests/process/node.rs"]
#[allow(dead_code, reason = "a part is used here")]
mod node;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use aoe_xdp::wire::{Address, AtaArg, AtaHead, Header, Mac, command};
use node::{Node, Station, export};
use zerocopy::IntoBytes;

const MANY: u16 = 10_000;
/// Reads of a round, in flight at a time, and rounds.
const READS: u32 = 20_000;
const WINDOW: usize = 32;
const ROUNDS: usize = 15;
/// The socket of the station has a Linux system's default room: what it had no room for is asked for again.
const RETRANSMIT_AFTER: Duration = Duration::from_millis(50);
const GIVE_UP_AFTER: Duration = Duration::from_secs(20);
const CLIENT: Mac = Mac([0x02, 0, 0, 0, 0xc1, 0x10]);

/// CPU time that the data plane's core has used, in nanoseconds.
fn core_cpu_ns(node: &Node) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", node.pid())).unwrap();
    let core = tasks
        .map(|task| task.unwrap().path())
        .find(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("core-")));
    let times = std::fs::read_to_string(core.expect("a core runs").join("schedstat")).unwrap();
    times.split_whitespace().next().unwrap().parse().unwrap()
}

/// Reads 4 KiB blocks of the export in the middle, [`WINDOW`] at a time; CPU time of the core for each, in nanoseconds.
fn cost_of_reads(node: &Node, station: &mut Station, first_tag: u32) -> u64 {
    let wish = export(node.exports() / 2);
    let address = Address { shelf: wish.shelf, slot: wish.slot };
    let read = |tag: u32| {
        let header = Header::request(Mac(wish.mac), CLIENT, address, command::ATA, tag);
        let arg = AtaArg::read_write_ext(u64::from(tag % 1024) * 8, 8, false);
        AtaHead { header, arg }.as_bytes().to_vec()
    };
    let (before_ns, started) = (core_cpu_ns(node), Instant::now());
    let mut waiting = BTreeSet::new();
    let mut tags = first_tag..first_tag + READS;
    loop {
        while waiting.len() < WINDOW
            && let Some(tag) = tags.next()
        {
            station.send(&read(tag));
            waiting.insert(tag);
        }
        if waiting.is_empty() {
            return (core_cpu_ns(node) - before_ns) / u64::from(READS);
        }
        match station.receive_where(|tag| waiting.contains(&tag), RETRANSMIT_AFTER) {
            Some(answer) => {
                assert_eq!((answer.len(), answer[27]), (36 + 4096, 0x40));
                waiting.remove(&u32::from_be_bytes(answer[20..24].try_into().unwrap()));
            }
            None => {
                for tag in &waiting {
                    station.send(&read(*tag));
                }
            }
        }
        assert!(started.elapsed() < GIVE_UP_AFTER, "{} reads have no answer", waiting.len());
    }
}

/// Medians of the rounds on a node with that many exports.
fn measure(exports: u16) -> u64 {
    let mut node = Node::start(exports);
    node.export((0..exports).map(export).collect());
    // Until everything is advertised.
    std::thread::sleep(Duration::from_secs(3));
    let mut station = Station::open();
    let mut ns: Vec<u64> = (1..=ROUNDS)
        .map(|round| cost_of_reads(&node, &mut station, u32::try_from(round).unwrap() * READS))
        .collect();
    node.stop();
    ns.sort_unstable();
    println!("{exports} exports: {} ns of CPU time for each read, at least {}", ns[ROUNDS / 2], ns[0]);
    ns[ROUNDS / 2]
}

fn main() {
    netns::isolated("many_exports", || {
        netns::veth_pair(9000, 1);
        println!("to warm up:");
        measure(1);
        println!("measured:");
        let measured = [1, MANY, 1, MANY].map(measure);
        let (one, many) = (measured[0] + measured[2], measured[1] + measured[3]);
        println!("{MANY} exports / 1 export: {}.{:03}", many / one, many % one * 1000 / one);
    });
}
