//! Ten thousand exports on one node: all are found in time, with the buffers that a Linux system gives a socket.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use aoe_xdp::wire::{Address, AtaArg, AtaHead, Header, Mac, command, parse_header};
use zerocopy::IntoBytes;

use crate::netns;
use crate::node::{Node, Station, export};

const EXPORTS: u16 = 10_000;
const TRIES: u32 = 10;
/// What is measured: reads of a round, in flight at a time, and rounds.
const READS: u32 = 20_000;
const WINDOW: u32 = 32;
const ROUNDS: usize = 15;
const CLIENT: Mac = Mac([0x02, 0, 0, 0, 0xc1, 0x10]);

fn discover(tag: u32) -> Vec<u8> {
    let header = Header::request(Mac::BROADCAST, CLIENT, Address::ANY, command::CONFIG, tag);
    [header.as_bytes(), &[0; 8]].concat()
}

/// Takes all answers with a tag: how many exports answered, and how long that took.
fn collect(station: &mut Station, tag: u32) -> (usize, Duration) {
    let started = Instant::now();
    let (mut seen, mut last) = (BTreeSet::new(), started);
    while seen.len() < usize::from(EXPORTS)
        && let Some(frame) = station.receive(tag, Duration::from_secs(1))
    {
        let header = parse_header(&frame).unwrap();
        assert_eq!((header.dst, header.version_flags), (CLIENT, 0x18));
        assert!(seen.insert(header.address()), "{} answers twice", header.address());
        last = Instant::now();
    }
    (seen.len(), last - started)
}

#[test]
fn ten_thousand_exports_are_discovered_within_two_seconds() {
    netns::isolated("many_exports::ten_thousand_exports_are_discovered_within_two_seconds", || {
        netns::veth_pair(1500, 1);
        let mut node = Node::start(EXPORTS);
        node.export((0..EXPORTS).map(export).collect());

        // The first query beside the advertisements, which are still going out. A machine that is busy with other things
        // may hold the reader up for longer than its socket has room: it may ask again, as every initiator does.
        let mut station = Station::open();
        let complete = (1..=TRIES).any(|tag| {
            station.send(&discover(tag));
            let (found, took) = collect(&mut station, tag);
            println!("{found} of {EXPORTS} answers within {took:?}");
            found == usize::from(EXPORTS) && took < Duration::from_secs(2)
        });
        assert!(complete, "never all within two seconds at a default socket buffer");
        node.stop();
    });
}

/// CPU time that the data plane's core has used, in nanoseconds.
fn core_cpu_ns(node: &Node) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", node.pid())).unwrap();
    let core = tasks
        .map(|task| task.unwrap().path())
        .find(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("core-")));
    let times = std::fs::read_to_string(core.expect("a core runs").join("schedstat")).unwrap();
    times.split_whitespace().next().unwrap().parse().unwrap()
}

/// Reads 4 KiB blocks of one export, [`WINDOW`] at a time; CPU time of the core for each, in nanoseconds.
fn cost_of_reads(node: &Node, station: &mut Station, first_tag: u32) -> u64 {
    let wish = export(node.exports() / 2);
    let address = Address { shelf: wish.shelf, slot: wish.slot };
    let read = |n: u32| {
        let header = Header::request(Mac(wish.mac), CLIENT, address, command::ATA, first_tag + n);
        let arg = AtaArg::read_write_ext(u64::from(n % 1024) * 8, 8, false);
        AtaHead { header, arg }.as_bytes().to_vec()
    };
    let before_ns = core_cpu_ns(node);
    for n in 0..READS + WINDOW {
        if n < READS {
            station.send(&read(n));
        }
        if n >= WINDOW {
            let answer = station.receive(first_tag + n - WINDOW, Duration::from_secs(20)).expect("an answer");
            assert_eq!((answer.len(), answer[27]), (36 + 4096, 0x40));
        }
    }
    (core_cpu_ns(node) - before_ns) / u64::from(READS)
}

#[test]
#[ignore = "a measurement: it prints what a read costs with one export and with ten thousand"]
fn cost_of_a_read_among_many() {
    netns::isolated("many_exports::cost_of_a_read_among_many", || {
        netns::veth_pair(9000, 1);
        let mut tag = 1 << 16;
        for exports in [1, EXPORTS, 1, EXPORTS] {
            let mut node = Node::start(exports);
            node.export((0..exports).map(export).collect());
            // Until everything is advertised.
            std::thread::sleep(Duration::from_secs(3));
            let mut station = Station::open();
            let mut ns: Vec<u64> = (0..ROUNDS)
                .map(|_| {
                    tag += READS;
                    cost_of_reads(&node, &mut station, tag)
                })
                .collect();
            ns.sort_unstable();
            println!(
                "{exports} exports: {} ns of CPU time for each read, at least {}",
                ns[ROUNDS / 2],
                ns[0]
            );
            node.stop();
        }
    });
}
