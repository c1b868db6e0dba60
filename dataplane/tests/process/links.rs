//! Interfaces of a running node: VLANs, several NICs, and what happens to them while requests come.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aoe_xdp::link::{Frames, Interface, LinkChoice as Choice};
use aoe_xdp::wire::{ATA_DATA_OFFSET, AtaArg, AtaHead, Header, Mac, command, parse_ata, parse_config};
use cluster_map::{Counter, DesiredExport, LinkChoice, Observed};
use zerocopy::IntoBytes;

use crate::netns::{ip, isolated, veth_pair, wait_up};
use crate::node::{Node, export};
use crate::station::{Station, region};

pub(crate) const SOON: Duration = Duration::from_secs(20);
/// Long enough that what is not held back is there.
const NEVER: Duration = Duration::from_millis(300);

/// An initiator on one network interface, with a number for each of its VLANs.
pub(crate) struct Initiator {
    mac: Mac,
    station: Station,
    _interface: Interface,
    tag: u32,
    waiting: Vec<(u8, Vec<u8>)>,
}

impl Initiator {
    pub(crate) fn open(name: &str, number: u8, ports: &[(u8, u16)]) -> Initiator {
        let (interface, station) =
            Station::open_as(name, Choice::AfPacket, ports, Frames::All, &region(1), 0);
        let mac = Mac([0x02, 0, 0, 0, 0xc1, number]);
        Initiator { mac, station, _interface: interface, tag: 0, waiting: Vec::new() }
    }

    /// Sends a request by one of its VLANs; gives its tag.
    pub(crate) fn ask(&mut self, by: u8, to: &DesiredExport, dst: Mac, arg: AtaArg, data: &[u8]) -> u32 {
        self.tag += 1;
        self.send(by, to, dst, arg, data, self.tag);
        self.tag
    }

    fn send(&mut self, by: u8, to: &DesiredExport, dst: Mac, arg: AtaArg, data: &[u8], tag: u32) {
        let at = aoe_xdp::wire::Address { shelf: to.shelf, slot: to.slot };
        let header = Header::request(dst, self.mac, at, command::ATA, tag);
        let mut frame = [AtaHead { header, arg }.as_bytes(), data].concat();
        frame.resize(frame.len().max(60), 0);
        self.station.send_by(by, &frame);
    }

    /// The next frame that `wanted` accepts, with the number of its VLAN.
    fn receive(&mut self, within: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<(u8, Vec<u8>)> {
        let until = Instant::now() + within;
        loop {
            if let Some(at) = self.waiting.iter().position(|(_, frame)| wanted(frame)) {
                return Some(self.waiting.remove(at));
            }
            if Instant::now() >= until {
                return None;
            }
            self.waiting.extend(self.station.collect_told(1, Duration::from_millis(10)));
        }
    }

    /// Writes two sectors and reads them back, sending again what gets no answer, until it is told to stop: how often it did.
    pub(crate) fn verify_until(&mut self, to: &DesiredExport, dst: Mac, stop: &AtomicBool) -> u32 {
        let mut rounds = 0u32;
        while !stop.load(Ordering::Relaxed) {
            let data: Vec<u8> = rounds.to_le_bytes().into_iter().cycle().take(1024).collect();
            let lba = u64::from(rounds % 100) * 2;
            self.insist(to, dst, AtaArg::read_write_ext(lba, 2, true), &data);
            let back = self.insist(to, dst, AtaArg::read_write_ext(lba, 2, false), &[]);
            assert!(back[ATA_DATA_OFFSET..] == data, "round {rounds}");
            rounds += 1;
        }
        rounds
    }

    /// Sends a request until it is answered; gives the answer.
    fn insist(&mut self, to: &DesiredExport, dst: Mac, arg: AtaArg, data: &[u8]) -> Vec<u8> {
        let until = Instant::now() + SOON;
        self.waiting.clear();
        loop {
            let tag = self.ask(0, to, dst, arg, data);
            if let Some((_, frame)) = self.answer(tag, Duration::from_millis(100)) {
                assert_eq!(parse_ata(&frame).unwrap().arg.command_status, 0x40);
                return frame;
            }
            assert!(Instant::now() < until, "never answered");
        }
    }

    pub(crate) fn answer(&mut self, tag: u32, within: Duration) -> Option<(u8, Vec<u8>)> {
        let own = self.mac.0;
        self.receive(within, |frame| {
            frame[..6] == own && frame[14] == 0x18 && frame[20..24] == tag.to_be_bytes()
        })
    }

    /// The sectors in the next advertisement; earlier ones are forgotten by [`Initiator::forget`].
    fn advertised(&mut self) -> u8 {
        let (_, frame) = self
            .receive(SOON, |frame| frame[19] == command::CONFIG && frame[20..24] == [0; 4])
            .expect("an advertisement");
        parse_config(&frame).unwrap().0.arg.sector_count
    }

    fn forget(&mut self) {
        self.station.collect_told(1000, Duration::from_millis(50));
        self.waiting.clear();
    }

    /// Reads and gives the data.
    pub(crate) fn read(&mut self, to: &DesiredExport, dst: Mac, lba: u64, sectors: u8) -> Vec<u8> {
        let tag = self.ask(0, to, dst, AtaArg::read_write_ext(lba, sectors, false), &[]);
        let (_, frame) = self.answer(tag, SOON).expect("an answer");
        assert_eq!(parse_ata(&frame).unwrap().arg.command_status, 0x40);
        assert_eq!(frame.len(), ATA_DATA_OFFSET + usize::from(sectors) * 512);
        frame[ATA_DATA_OFFSET..].to_vec()
    }

    pub(crate) fn write(&mut self, to: &DesiredExport, dst: Mac, lba: u64, data: &[u8]) {
        let sectors = u8::try_from(data.len() / 512).unwrap();
        let tag = self.ask(0, to, dst, AtaArg::read_write_ext(lba, sectors, true), data);
        let (_, frame) = self.answer(tag, SOON).expect("an answer");
        assert_eq!(parse_ata(&frame).unwrap().arg.command_status, 0x40);
    }
}

pub(crate) fn mac_on(export: &DesiredExport, ordinal: u8) -> Mac {
    let mut mac = export.mac;
    mac[5] |= ordinal;
    Mac(mac)
}

fn links(seen: &Observed) -> Vec<(&str, bool)> {
    seen.links.iter().map(|link| (link.interface.as_str(), link.up)).collect()
}

/// Each export answers in its own VLAN, with the tag of that VLAN, and nowhere else.
fn vlans(link: LinkChoice) {
    veth_pair(9000, 1);
    let mut node = Node::start_on(&["a0@100", "a0@200"], link, 1, 2);
    let exports = [0, 1].map(|n| DesiredExport { on_interfaces: 1 << n, ..export(n) });
    node.export(exports.to_vec());
    let seen = node.wait("both VLANs are up", |seen| seen.links.iter().all(|link| link.up));
    assert_eq!(links(&seen), [("a0@100", true), ("a0@200", true)]);
    let mut client = Initiator::open("b0", 1, &[(0, 0), (1, 100), (2, 200), (3, 300)]);
    for (own, asked) in exports.iter().enumerate() {
        let ordinal = u8::try_from(own).unwrap();
        for by in 0..4 {
            for dst in [mac_on(asked, ordinal), Mac::BROADCAST] {
                let tag = client.ask(by, asked, dst, AtaArg::identify(), &[]);
                let answered = client.answer(tag, if by == ordinal + 1 { SOON } else { NEVER });
                assert_eq!(answered.map(|(by, _)| by), (by == ordinal + 1).then_some(by), "{own} by {by}");
            }
        }
    }
    let data = [0x5a; 8192];
    let tag = client.ask(2, &exports[1], mac_on(&exports[1], 1), AtaArg::read_write_ext(0, 16, true), &data);
    assert!(client.answer(tag, SOON).is_some());
    let tag = client.ask(2, &exports[1], mac_on(&exports[1], 1), AtaArg::read_write_ext(0, 16, false), &[]);
    let (by, frame) = client.answer(tag, SOON).unwrap();
    assert!(by == 2 && frame[ATA_DATA_OFFSET..] == data);
    node.stop();
}

#[test]
fn case_17_an_export_answers_in_its_own_vlan_only_over_af_xdp() {
    isolated("links::case_17_an_export_answers_in_its_own_vlan_only_over_af_xdp", || {
        vlans(LinkChoice::AfXdp);
    });
}

#[test]
fn case_17_an_export_answers_in_its_own_vlan_only_over_af_packet() {
    isolated("links::case_17_an_export_answers_in_its_own_vlan_only_over_af_packet", || {
        vlans(LinkChoice::AfPacket);
    });
}

/// MTU and carrier change while requests come: what is advertised follows, no answer is longer than the MTU, and the same
/// process goes on.
fn mtu_and_carrier(link: LinkChoice, cores: u16) {
    veth_pair(9000, 1);
    let mut node = Node::start_on(&["a0"], link, cores, 2);
    let mut client = Initiator::open("b0", 1, &[(0, 0)]);
    let exported = export(0);
    node.export(vec![exported.clone(), export(1)]);
    assert_eq!(client.advertised(), 16);
    let stop = Arc::new(AtomicBool::new(false));
    let beside = {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            let mut initiator = Initiator::open("b0", 2, &[(0, 0)]);
            initiator.verify_until(&export(1), mac_on(&export(1), 0), &stop)
        })
    };
    let mac = mac_on(&exported, 0);
    let data: Vec<u8> = (0..8192u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    client.write(&exported, mac, 0, &data);
    let pid = node.wait("it serves", |seen| seen.pid != 0).pid;

    for _ in 0..2 {
        client.forget();
        ip("link set a0 mtu 1500");
        assert_eq!(client.advertised(), 2);
        node.wait("the MTU is shown", |seen| (seen.links[0].mtu, seen.links[0].max_sectors) == (1500, 2));
        // What was asked for by the rule of before: silence, and never a frame that is too long.
        let tag = client.ask(0, &exported, mac, AtaArg::read_write_ext(0, 16, false), &[]);
        assert!(client.answer(tag, NEVER).is_none());
        assert!(client.read(&exported, mac, 2, 2) == data[1024..2048]);
        client.forget();
        ip("link set a0 mtu 9000");
        assert_eq!(client.advertised(), 16);
        client.send(0, &exported, mac, AtaArg::read_write_ext(0, 16, false), &[], tag);
        let (_, frame) = client.answer(tag, SOON).expect("the same request, sent again");
        assert!(frame[ATA_DATA_OFFSET..] == data);

        ip("link set a0 down");
        node.wait("the link is down", |seen| !seen.links[0].up);
        client.forget();
        ip("link set a0 up");
        wait_up("a0");
        assert_eq!(client.advertised(), 16);
        assert!(client.read(&exported, mac, 0, 16) == data);
    }
    stop.store(true, Ordering::Relaxed);
    let rounds = beside.join().expect("no error and no wrong data beside all this");
    assert!(rounds > 0);
    assert_eq!(node.wait("it serves", |_| true).pid, pid, "never started again");
    node.stop();
}

#[test]
fn case_81_mtu_and_carrier_change_under_af_xdp() {
    isolated("links::case_81_mtu_and_carrier_change_under_af_xdp", || {
        mtu_and_carrier(LinkChoice::AfXdp, 1);
    });
}

#[test]
fn case_81_mtu_and_carrier_change_where_the_program_steers() {
    isolated("links::case_81_mtu_and_carrier_change_where_the_program_steers", || {
        mtu_and_carrier(LinkChoice::AfXdp, 2);
    });
}

#[test]
fn case_81_mtu_and_carrier_change_under_af_packet() {
    isolated("links::case_81_mtu_and_carrier_change_under_af_packet", || {
        mtu_and_carrier(LinkChoice::AfPacket, 1);
    });
}

/// A second pair of interfaces, `c0` and `d0`.
fn second_pair() {
    ip("link add c0 mtu 1500 type veth peer name d0 mtu 1500");
    ip("link set d0 up");
    ip("link set c0 up");
    wait_up("c0");
    wait_up("d0");
}

/// An interface that is missing at the start, or goes away, is waited for; the other one serves on meanwhile. When it is
/// there, the process ends to be started again, and serves on both.
fn gone_and_back(link: LinkChoice, cores: u16) {
    veth_pair(1500, 1);
    let mut node = Node::start_on(&["a0", "c0"], link, cores, cores);
    // The last core's: with several, not that of the first interface's queue.
    let exported = export(cores - 1);
    node.export((0..cores).map(export).collect());
    let seen = node.wait("one interface is up", |seen| links(seen) == [("a0", true), ("c0", false)]);
    assert!(seen.links[1].note.contains("no network interface \"c0\""), "{}", seen.links[1].note);
    let mut first = Initiator::open("b0", 1, &[(0, 0)]);
    first.write(&exported, mac_on(&exported, 0), 0, &[1; 1024]);

    second_pair();
    node.restart();
    node.wait("both are up", |seen| links(seen) == [("a0", true), ("c0", true)]);
    let mut second = Initiator::open("d0", 2, &[(0, 0)]);
    assert!(second.read(&exported, mac_on(&exported, 1), 0, 2) == [1; 1024]);

    drop(second);
    ip("link del c0");
    node.wait("one is gone", |seen| links(seen) == [("a0", true), ("c0", false)]);
    // The dead queue wakes nobody up: an idle core goes on sleeping.
    let wakeups = |node: &Node| {
        node.control.stats().iter().map(|core| core.get(Counter::Wakeups)).max().expect("a core")
    };
    let before = wakeups(&node);
    std::thread::sleep(Duration::from_secs(1));
    assert!(wakeups(&node) - before < 100, "{} times in a second", wakeups(&node) - before);
    for round in 2..50 {
        first.write(&exported, mac_on(&exported, 0), 0, &[round; 1024]);
        assert!(first.read(&exported, mac_on(&exported, 0), 0, 2) == [round; 1024]);
    }
    second_pair();
    node.restart();
    let mut second = Initiator::open("d0", 2, &[(0, 0)]);
    assert!(second.read(&exported, mac_on(&exported, 1), 0, 2) == [49; 1024]);
    assert!(first.read(&exported, mac_on(&exported, 0), 0, 2) == [49; 1024]);
    node.stop();
}

#[test]
fn an_interface_that_goes_away_and_comes_back_is_served_on_over_af_xdp() {
    isolated("links::an_interface_that_goes_away_and_comes_back_is_served_on_over_af_xdp", || {
        gone_and_back(LinkChoice::AfXdp, 1);
    });
}

#[test]
fn an_interface_that_goes_away_and_comes_back_is_steered_again() {
    isolated("links::an_interface_that_goes_away_and_comes_back_is_steered_again", || {
        gone_and_back(LinkChoice::AfXdp, 2);
    });
}

#[test]
fn an_interface_that_goes_away_and_comes_back_is_served_on_over_af_packet() {
    isolated("links::an_interface_that_goes_away_and_comes_back_is_served_on_over_af_packet", || {
        gone_and_back(LinkChoice::AfPacket, 1);
    });
}

/// One export by two interfaces whose queues belong to two cores: one order, and an answer for every copy of a request.
#[test]
fn case_60_copies_by_a_second_interface_are_in_the_same_order() {
    isolated("links::case_60_copies_by_a_second_interface_are_in_the_same_order", || {
        veth_pair(1500, 1);
        second_pair();
        let mut node = Node::start_on(&["a0", "c0"], LinkChoice::AfXdp, 2, 2);
        node.export(vec![export(0), export(1)]);
        let seen = node.wait("both are up", |seen| links(seen) == [("a0", true), ("c0", true)]);
        assert_ne!(seen.links[0].core, seen.links[1].core, "each queue has a core of its own");
        let mut clients = [Initiator::open("b0", 1, &[(0, 0)]), Initiator::open("d0", 1, &[(0, 0)])];
        for exported in [export(0), export(1)] {
            let macs = [mac_on(&exported, 0), mac_on(&exported, 1)];
            for round in 0..60u8 {
                let (by, other) = (usize::from(round % 2), usize::from(1 - round % 2));
                let data = [round + 1; 1024];
                clients[by].write(&exported, macs[by], 4, &data);
                assert!(clients[other].read(&exported, macs[other], 4, 2) == data, "round {round}");
                // A copy of one write by both ways at once, and reads behind it.
                let arg = AtaArg::read_write_ext(8, 2, true);
                let tags = [0, 1].map(|way: usize| clients[way].ask(0, &exported, macs[way], arg, &data));
                for way in [0, 1] {
                    assert!(clients[way].answer(tags[way], SOON).is_some(), "every copy has its answer");
                    assert!(clients[way].read(&exported, macs[way], 8, 2) == data, "round {round}");
                }
            }
        }
        node.stop();
    });
}

/// Two queues on two cores: every export answers what comes in by either queue, from its own core's queue; no core hands
/// anything over.
#[test]
fn every_export_is_served_by_every_queue() {
    isolated("links::every_export_is_served_by_every_queue", || {
        veth_pair(1500, 2);
        let mut node = Node::start_on(&["a0"], LinkChoice::AfXdp, 2, 2);
        node.export(vec![export(0), export(1)]);
        let seen = node.wait("the link is up", |seen| seen.links.iter().all(|link| link.up));
        let queues: Vec<_> = seen.links.iter().map(|link| (link.queue, link.core)).collect();
        assert_eq!(queues, [(0, 0), (1, 1)]);
        let note = &seen.links[0].note;
        assert!(note.contains("the XDP program steers 2 of 2 addresses to their cores"), "{note}");

        let region = region(2);
        let mut interface = Interface::open("b0", Choice::AfXdp, &region).unwrap();
        let mut client: Vec<_> = (0..2).map(|q| Station::take(&mut interface, q, &region, q)).collect();
        for (number, exported) in [export(0), export(1)].iter().enumerate() {
            for queue in 0..2 {
                let at = aoe_xdp::wire::Address { shelf: exported.shelf, slot: exported.slot };
                let from = Mac([0x02, 0, 0, 0, 0xc1, 9]);
                let header = Header::request(mac_on(exported, 0), from, at, command::ATA, 7);
                let head = AtaHead { header, arg: AtaArg::read_write_ext(0, 2, false) };
                let mut frame = head.as_bytes().to_vec();
                frame.resize(60, 0);
                client[queue].collect_within(1000, Duration::from_millis(20));
                client[queue].send(&frame);
                let until = Instant::now() + SOON;
                let answer = loop {
                    let got = client[number].collect_within(1, Duration::from_millis(20));
                    let mut got = got.into_iter().filter(|frame| frame[20..24] == [0, 0, 0, 7]);
                    if let Some(answer) = got.next() {
                        break answer;
                    }
                    assert!(Instant::now() < until, "export {number} by queue {queue}");
                };
                assert_eq!(answer.len(), ATA_DATA_OFFSET + 1024);
            }
        }
        assert_eq!(node.control.stats().iter().map(|core| core.get(Counter::HandedOver)).sum::<u64>(), 0);
        node.stop();
    });
}

/// What a queue loses stands in the map, by reason.
#[test]
fn losses_are_shown_by_reason() {
    isolated("links::losses_are_shown_by_reason", || {
        veth_pair(16_000, 1);
        let mut node = Node::start_on(&["a0"], LinkChoice::AfXdp, 1, 1);
        let exported = export(0);
        node.export(vec![exported.clone()]);
        let seen = node.wait("the link is up", |seen| seen.links[0].up);
        assert_eq!(seen.links[0].losses, cluster_map::LinkLosses::default());
        let mut client = Initiator::open("b0", 1, &[(0, 0)]);
        // Longer than what one received frame may be made of.
        let surplus = vec![0; 15_000];
        for _ in 0..3 {
            client.ask(0, &exported, mac_on(&exported, 0), AtaArg::identify(), &surplus);
        }
        let seen = node.wait("the losses are shown", |seen| seen.links[0].losses.rx_invalid == 3);
        let expected = cluster_map::LinkLosses { rx_invalid: 3, ..Default::default() };
        assert_eq!(seen.links[0].losses, expected);
        let tag = client.ask(0, &exported, mac_on(&exported, 0), AtaArg::identify(), &[]);
        assert!(client.answer(tag, SOON).is_some());
        node.stop();
    });
}
