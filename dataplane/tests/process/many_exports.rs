//! Ten thousand exports on one node: all are found in time, with the buffers that a Linux system gives a socket.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use aoe_xdp::wire::{Address, Header, Mac, command, parse_header};
use zerocopy::IntoBytes;

use crate::netns;
use crate::node::{Node, Station, export};

const EXPORTS: u16 = 10_000;
const TRIES: u32 = 10;
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
