//! Every case over a virtual Ethernet against a running node.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use torus_conformance::frames::{EVERYONE, Reply, Request};
use torus_conformance::node::{self, Node, Station};
use torus_conformance::world::{CLIENT, Carrier, DEFAULT_POLICY, EXPORTS, LARGE, MAIN, OTHER, World};
use torus_conformance::{cases, for_each_case};

/// Only what hangs takes longer.
const SOON: Duration = Duration::from_secs(20);

macro_rules! against_a_node {
    ($($case:ident)*) => {
        $(#[test]
        fn $case() {
            node::run(stringify!($case), cases::$case);
        })*
    };
}

for_each_case!(against_a_node);

/// Bytes that tell where they belong and which write made them.
fn pattern(lba: u64, count: u8, generation: u32) -> Vec<u8> {
    let sector = |lba: u64| {
        let mut bytes = [generation.to_le_bytes()[0]; 512];
        bytes[..8].copy_from_slice(&lba.to_le_bytes());
        bytes[8..12].copy_from_slice(&generation.to_le_bytes());
        bytes
    };
    (lba..lba + u64::from(count)).flat_map(sector).collect()
}

/// The same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

const DONE: (u8, u8) = (0x40, 0);

#[test]
fn case_17_each_vlan_has_its_exports() {
    node::isolated("case_17_each_vlan_has_its_exports", || {
        node::veth_pair("a0", "b0");
        let mut node = Node::start("a0,a0@100,a0@200");
        node.tool("torusblk", "unexport v1");
        node.tool("torusblk", "aoe v1 1.7 --on a0@100");
        let mut tag = 0;
        let mut found = |vlan: Option<u16>, slot: u8, within: Duration| {
            tag += 1;
            let ask = Request { dst: EVERYONE, src: CLIENT, shelf: 1, slot, tag, ..Request::config(0, b"") };
            let mut frame = ask.bytes();
            if let Some(id) = vlan {
                frame.splice(12..12, [[0x81, 0x00], id.to_be_bytes()].concat());
            }
            // A host without that VLAN sees the answers without their tags; that they have them is shown in aoe-xdp.
            node.station.ask_bytes(&frame, tag, within).map(|reply| reply.src())
        };
        // The one that is everywhere answers in each VLAN, from a MAC of its own.
        let macs: BTreeSet<_> =
            [None, Some(100), Some(200)].map(|vlan| found(vlan, 2, SOON).expect("an answer")).into();
        assert_eq!(macs.len(), 3);
        assert!(found(Some(100), 7, SOON).is_some());
        for other in [None, Some(200), Some(300)] {
            assert_eq!(found(other, 7, Duration::from_millis(300)), None);
        }
        assert_eq!(found(Some(300), 2, Duration::from_millis(300)), None);
        node.stop();
    });
}

#[test]
fn case_32_a_start_is_advertised() {
    node::isolated("case_32_a_start_is_advertised", || {
        node::veth_pair("a0", "b0");
        let mut node = Node::start("a0");
        node.terminate();
        while node.station.receive(Duration::from_millis(100)).is_some() {}
        node.run_torusd();
        let mut world = World::new(&mut node);
        let mut advertised = BTreeSet::new();
        while advertised.len() < EXPORTS.len() {
            let reply = world.advertisement();
            assert_eq!((reply.dst(), reply.version_flags(), reply.config().2), (EVERYONE, 0x18, 0x10));
            advertised.insert(reply.address());
        }
        assert_eq!(advertised, EXPORTS.iter().map(|plan| (plan.shelf, plan.slot)).collect());
        node.stop();
    });
}

#[test]
fn case_55_a_failing_store() {
    node::isolated("case_55_a_failing_store", || {
        node::veth_pair("a0", "b0");
        const LARGE_SECTORS: u64 = 2 << 20;
        const EXTENT_SECTORS: u64 = 8192;
        let mut node = Node::start_with("a0", LARGE_SECTORS);
        let mut w = World::new(&mut node);
        for generation in 1..=2 {
            assert_eq!(w.ask(Request::write(0, &pattern(0, 8, generation))).ata(), DONE);
        }
        let place = place_of(&node.store(), &pattern(0, 8, 2));
        // What cannot be read: the end of the store's file is gone.
        let file = File::options().write(true).open(node.store()).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(place).unwrap();
        assert_eq!(World::new(&mut node).ask(Request::read(0, 1)).ata(), (0x41, 0x40));
        // What is not what was written: it is back, and empty.
        file.set_len(len).unwrap();
        let mut w = World::new(&mut node);
        assert_eq!(w.ask(Request::read(0, 1)).ata(), (0x41, 0x40));
        assert_eq!(w.ask(Request::write(0, &pattern(0, 8, 3))).ata(), DONE);
        assert_eq!(w.content(MAIN, 0, 8), pattern(0, 8, 3));
        // What cannot be written: the store's file system is full, and so in the end is the store.
        let ballast = node.beside_the_store("ballast");
        let filled = std::io::copy(&mut std::io::repeat(1), &mut File::create(&ballast).unwrap());
        assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
        let mut w = World::new(&mut node);
        let mut fill = |lba| {
            let request = w.to(LARGE, Request::write(lba, &pattern(lba, 8, 1)));
            w.ask_as_is(&request).ata()
        };
        let places = || (0..LARGE_SECTORS).step_by(usize::try_from(EXTENT_SECTORS).unwrap());
        let refused = places().find(|lba| fill(*lba) != DONE).expect("there is no room for all of it");
        assert!(refused > 0, "what was made ready before is used");
        assert_eq!(fill(refused).0 & 0x21, 0x21, "device fault and error, never an AoE error");
        assert_eq!(fill(0), DONE, "what has its room is written over");
        std::fs::remove_file(&ballast).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while fill(refused) != DONE {
            assert!(Instant::now() < deadline, "there is room again, and it is not used");
        }
        for lba in places().take_while(|lba| *lba <= refused) {
            assert_eq!(w.content(LARGE, lba, 8), pattern(lba, 8, 1));
        }
        node.stop();
    });
}

/// Where in a store a block has its place: behind the journal, where it stood first.
fn place_of(path: &Path, block: &[u8]) -> u64 {
    let deadline = Instant::now() + SOON;
    loop {
        let bytes = std::fs::read(path).unwrap();
        let same = bytes.chunks(block.len()).enumerate().filter(|(_, other)| *other == block);
        let places: Vec<_> = same.map(|(at, _)| (at * block.len()) as u64).collect();
        if let &[_, place] = &places[..] {
            return place;
        }
        assert!(Instant::now() < deadline, "it is not put in place: {places:?}");
    }
}

#[test]
fn case_57_a_duplicate_and_what_follows_it() {
    node::run("case_57_a_duplicate_and_what_follows_it", |w| {
        for round in 0..100u32 {
            let one = w.main(Request::write(40, &pattern(40, 8, 2 * round)));
            let copy = w.main(Request::write(40, &pattern(40, 8, 2 * round)));
            let between = w.main(Request::read(40, 8));
            let two = w.main(Request::write(40, &pattern(40, 8, 2 * round + 1)));
            let after = w.main(Request::read(40, 8));
            for request in [&one, &copy, &between, &two, &after] {
                w.send(request);
            }
            let order = w.order_of(&[&one, &copy, &between, &two, &after]);
            assert!(order.is_sorted(), "answered in order of arrival: {order:?}");
            assert_eq!(w.answer(&one).ata(), DONE);
            assert_eq!(w.answer(&copy).ata(), DONE);
            assert_eq!(w.answer(&between).sectors(8), pattern(40, 8, 2 * round));
            assert_eq!(w.answer(&two).ata(), DONE);
            assert_eq!(w.answer(&after).sectors(8), pattern(40, 8, 2 * round + 1));
        }
    });
}

#[test]
fn case_58_ten_thousand_overlapping_writes() {
    node::run("case_58_ten_thousand_overlapping_writes", |w| {
        let mut random = Random(58);
        let mut image = vec![0; 64 * 512];
        let mut waiting = VecDeque::new();
        let mut last: Option<Request> = None;
        for generation in 0..10_000u32 {
            let repeat = last.take().filter(|_| random.below(8) == 0);
            let request = match repeat {
                // An exact duplicate under another tag.
                Some(request) => w.main(request),
                None => {
                    let count = 1 + random.below(16);
                    let lba = random.below(64 - count + 1);
                    let count = u8::try_from(count).unwrap();
                    w.main(Request::write(lba, &pattern(lba, count, generation)))
                }
            };
            let lba = usize::from(request.argument[4]);
            image[lba * 512..lba * 512 + request.argument.len() - 12]
                .copy_from_slice(&request.argument[12..]);
            w.send(&request);
            waiting.push_back(request.clone());
            last = Some(request);
            if waiting.len() > 16 {
                let oldest = waiting.pop_front().unwrap();
                assert_eq!(w.answer(&oldest).ata(), DONE);
            }
        }
        for request in waiting {
            assert_eq!(w.answer(&request).ata(), DONE);
        }
        for lba in (0..64).step_by(16) {
            let at = usize::try_from(lba).unwrap() * 512;
            assert_eq!(w.content(MAIN, lba, 16), image[at..at + 8192]);
        }
    });
}

#[test]
fn case_59_reads_beside_writes() {
    node::run("case_59_reads_beside_writes", |w| {
        for generation in 1..500u32 {
            let before = w.main(Request::read(16, 16));
            let write = w.main(Request::write(19, &pattern(19, 9, generation)));
            let after = w.main(Request::read(16, 16));
            for request in [&before, &write, &after] {
                w.send(request);
            }
            let expected = |generation: u32| match generation {
                0 => vec![0; 9 * 512],
                made => pattern(19, 9, made),
            };
            assert_eq!(w.answer(&before).sectors(16)[3 * 512..12 * 512], expected(generation - 1));
            assert_eq!(w.answer(&write).ata(), DONE);
            assert_eq!(w.answer(&after).sectors(16)[3 * 512..12 * 512], expected(generation));
        }
    });
}

#[test]
fn case_60_a_duplicate_by_another_interface() {
    node::isolated("case_60_a_duplicate_by_another_interface", || {
        node::veth_pair("a0", "b0");
        node::veth_pair("a1", "b1");
        let mut node = Node::start("a0,a1");
        let mut other = Station::open("b1");
        let ask = |tag, dst, request| Request { dst, src: OTHER, shelf: 1, slot: 2, tag, ..request };
        let found = other.ask(&ask(1, EVERYONE, Request::config(0, b"")), SOON).expect("it is there too");
        let path = found.src();
        assert_ne!(path, node.export_mac(MAIN), "another MAC, another path");
        for round in 0..200u32 {
            let data = pattern(40, 8, 2 * round);
            let first = node::main_request(&node, 0x1000 + round, Request::write(40, &data));
            node.station.send(&first.bytes());
            let copy = ask(0x2000 + round, path, Request::write(40, &data));
            assert_eq!(other.ask(&copy, SOON).expect("the copy's answer").ata(), DONE);
            assert_eq!(World::new(&mut node).answer(&first).ata(), DONE);
            // Only now, as an initiator would.
            let next = pattern(40, 8, 2 * round + 1);
            let second = ask(0x3000 + round, path, Request::write(40, &next));
            assert_eq!(other.ask(&second, SOON).expect("the next write's answer").ata(), DONE);
            let read = node::main_request(&node, 0x4000 + round, Request::read(40, 8));
            assert_eq!(node.station.ask(&read, SOON).expect("a read's answer").sectors(8), next);
        }
        node.stop();
    });
}

#[test]
fn case_61_twice_as_many_as_advertised() {
    node::run("case_61_twice_as_many_as_advertised", |w| {
        let (buffers, _, _) = w.ask(Request::config(0, b"")).config();
        let count = 2 * u64::from(buffers);
        let write = |w: &mut World<'_>, n: u64| w.main(Request::write(n * 8, &pattern(n * 8, 8, 1)));
        let mut open: Vec<u64> = (0..count).collect();
        // Whatever is dropped is asked again, as every initiator does.
        for _try in 0..20 {
            let requests: Vec<_> = open.iter().map(|n| write(w, *n)).collect();
            for request in &requests {
                w.send(request);
            }
            w.settle();
            let mut dropped = Vec::new();
            for (n, request) in open.iter().zip(&requests) {
                match w.answered(request) {
                    Some(reply) => assert_eq!(reply.ata(), DONE),
                    None => dropped.push(*n),
                }
            }
            open = dropped;
            if open.is_empty() {
                break;
            }
        }
        assert!(open.is_empty(), "never answered: {open:?}");
        for n in 0..count {
            assert_eq!(w.content(MAIN, n * 8, 8), pattern(n * 8, 8, 1));
        }
    });
}

#[test]
fn case_78_a_volume_that_grows() {
    node::isolated("case_78_a_volume_that_grows", || {
        node::veth_pair("a0", "b0");
        let mut node = Node::start("a0");
        let before = World::new(&mut node).ask(Request::identify()).size_sectors();
        node.tool("torusctl", &format!("volume resize v0 {}", 2 * before * 512));
        let mut world = World::new(&mut node);
        assert_eq!(world.advertisement().address(), (1, 2));
        assert_eq!(world.ask(Request::identify()).size_sectors(), 2 * before);
        assert_eq!(world.content(MAIN, 2 * before - 1, 1), [0; 512]);
        node.stop();
    });
}

#[test]
fn case_79_an_export_that_is_gone_is_silent() {
    node::isolated("case_79_an_export_that_is_gone_is_silent", || {
        node::veth_pair("a0", "b0");
        let mut node = Node::start("a0");
        node.tool("torusblk", "unexport v0");
        let mut world = World::new(&mut node);
        for request in
            [Request::identify(), Request::config(0, b""), Request::read(0, 1), Request::of(0x55, vec![])]
        {
            let request = world.main(request);
            world.silence(&request);
            world.silence(&Request { dst: EVERYONE, ..request });
        }
        let everyone = world.main(Request::config(0, b""));
        world.ask_all(&Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, ..everyone }, EXPORTS.len() - 1);
        node.stop();
    });
}

#[test]
fn case_80_what_was_answered_before_the_end_is_there() {
    node::isolated("case_80_what_was_answered_before_the_end_is_there", || {
        node::veth_pair("a0", "b0");
        let mut node = Node::start("a0");
        let mut requests = Vec::new();
        for n in 0..100u32 {
            let lba = u64::from(n) * 8;
            let request = node::main_request(&node, 0x1000 + n, Request::write(lba, &pattern(lba, 8, 1)));
            node.station.send(&request.bytes());
            requests.push(request);
        }
        node.terminate();
        let mut answered = BTreeSet::new();
        while let Some(frame) = node.station.receive(Duration::from_millis(100)) {
            let reply = Reply(frame);
            if reply.tag() >= 0x1000 {
                assert_eq!(reply.ata(), DONE);
                assert!(answered.insert(reply.tag()), "answered twice");
            }
        }
        node.run_torusd();
        node.await_serving();
        for request in requests {
            let lba = u64::from(request.tag - 0x1000) * 8;
            let content = World::new(&mut node).content(MAIN, lba, 8);
            let whole = content == pattern(lba, 8, 1);
            assert!(whole || (!answered.contains(&request.tag) && content == [0; 4096]), "block at {lba}");
        }
        node.stop();
    });
}

#[test]
fn case_82_nonsense() {
    node::isolated("case_82_nonsense", || {
        node::veth_pair("a0", "b0");
        let mut node = Node::start("a0");
        let other = {
            let mut world = World::new(&mut node);
            let request = world.to(DEFAULT_POLICY, Request::write(0, &pattern(0, 8, 5)));
            assert_eq!(world.ask_as_is(&request).ata(), DONE);
            world.content(DEFAULT_POLICY, 0, 8)
        };
        let process = node.data_plane();
        let mut random = Random(82);
        for _ in 0..20_000 {
            let templates = [
                Request::read(0, 2),
                Request::write(0, &[7; 1024]),
                Request::identify(),
                Request::config(4, b"abc"),
                Request::masks(0, &[]),
                Request::reserve(0, &[]),
            ];
            let which = usize::try_from(random.below(6)).unwrap();
            let template = templates.into_iter().nth(which).unwrap();
            let mut frame = node::main_request(&node, 0x5000, template).bytes();
            for _ in 0..random.below(6) {
                // Not the EtherType, and not the address: other exports keep what they hold.
                let at = usize::try_from(random.below(frame.len() as u64)).unwrap();
                if !(12..14).contains(&at) && !(16..19).contains(&at) {
                    frame[at] = random.below(256).to_le_bytes()[0];
                }
            }
            frame.truncate(14 + usize::try_from(random.below(frame.len() as u64)).unwrap());
            node.station.send(&frame);
            while node.station.receive(Duration::ZERO).is_some() {}
        }
        World::new(&mut node).settle();
        assert_eq!(node.data_plane(), process, "the data plane has crashed");
        assert_eq!(World::new(&mut node).content(DEFAULT_POLICY, 0, 8), other);
        node.stop();
    });
}
