//! Logical interfaces: VLANs of one network interface, each with its own frames, and the host's share.

use aoe_xdp::link::{Frames, LinkChoice};

use crate::SHORT;
use crate::netns::{isolated, veth_pair};
use crate::station::{Station, pattern, region};

/// Every VLAN that the sender is on; it numbers them like this.
const ALL: [(u8, u16); 4] = [(0, 0), (1, 100), (2, 200), (3, 300)];

/// Frames of the opened VLANs arrive untagged, told apart, at every size; those of others do not; answers leave tagged.
fn each_vlan_is_an_interface_of_its_own(choice: LinkChoice) {
    veth_pair(9000, 1);
    let region = region(2);
    let (_a, mut a) = Station::open_as("a0", LinkChoice::AfPacket, &ALL, Frames::All, &region, 0);
    let (interface, mut b) = Station::open_as("b0", choice, &[(5, 200), (7, 100)], Frames::All, &region, 1);
    assert_eq!(interface.info().max_sectors, 16);
    for (round, size) in [36, 60, 1060, 4132, 8228, 9014].into_iter().enumerate() {
        let seed = u32::try_from(round).unwrap() * 10;
        for (ordinal, _) in ALL {
            a.send_by(ordinal, &pattern(size, seed + u32::from(ordinal)));
        }
        let got = b.collect_told(2, crate::station::PATIENCE);
        assert_eq!(got.iter().map(|(ordinal, _)| *ordinal).collect::<Vec<_>>(), [7, 5], "{size} bytes");
        assert!(got[0].1 == pattern(size, seed + 1) && got[1].1 == pattern(size, seed + 2), "{size} bytes");
        for ordinal in [5, 7] {
            b.send_by(ordinal, &pattern(size, seed + u32::from(ordinal)));
        }
        let back = a.collect_told(2, crate::station::PATIENCE);
        assert_eq!(back.iter().map(|(ordinal, _)| *ordinal).collect::<Vec<_>>(), [2, 1], "{size} bytes back");
        assert!(
            back[0].1 == pattern(size, seed + 5) && back[1].1 == pattern(size, seed + 7),
            "{size} bytes back"
        );
    }
    assert!(b.collect_within(1, SHORT).is_empty(), "nothing of other VLANs");
    a.assert_nothing_lost();
    b.assert_nothing_lost();
}

#[test]
fn case_17_af_xdp_tells_vlans_apart() {
    isolated("vlans::case_17_af_xdp_tells_vlans_apart", || {
        each_vlan_is_an_interface_of_its_own(LinkChoice::AfXdp);
    });
}

#[test]
fn case_17_af_packet_tells_vlans_apart() {
    isolated("vlans::case_17_af_packet_tells_vlans_apart", || {
        each_vlan_is_an_interface_of_its_own(LinkChoice::AfPacket);
    });
}

/// Untagged frames beside a VLAN; a tag of VLAN 0 carries a priority and nothing else.
fn untagged_frames_beside_a_vlan(choice: LinkChoice) {
    veth_pair(1500, 1);
    let region = region(2);
    let (_a, mut a) = Station::open_as("a0", LinkChoice::AfPacket, &ALL, Frames::All, &region, 0);
    let (_b, mut b) = Station::open_as("b0", choice, &[(4, 0), (6, 300)], Frames::All, &region, 1);
    let plain = pattern(200, 1);
    a.send_by(0, &plain);
    let mut with_priority = plain[..12].to_vec();
    with_priority.extend_from_slice(&[0x81, 0x00, 0xe0, 0x00]);
    with_priority.extend_from_slice(&plain[12..]);
    a.send_by(0, &with_priority);
    a.send_by(3, &plain);
    a.send_by(1, &plain);
    let got = b.collect_told(3, crate::station::PATIENCE);
    assert!(got.iter().all(|(_, bytes)| *bytes == plain), "the tag is gone");
    assert_eq!(got.iter().map(|(ordinal, _)| *ordinal).collect::<Vec<_>>(), [4, 4, 6]);
    assert!(b.collect_within(1, SHORT).is_empty());
    let elsewhere = b.frame(&plain);
    b.queue.transmit_by(&mut b.pool, 0, elsewhere).unwrap();
    assert_eq!(b.queue.stats().tx_dropped, 1, "an interface that is not opened");
    b.reap();
    b.assert_nothing_lost();
}

#[test]
fn af_xdp_takes_untagged_frames_beside_a_vlan() {
    isolated("vlans::af_xdp_takes_untagged_frames_beside_a_vlan", || {
        untagged_frames_beside_a_vlan(LinkChoice::AfXdp);
    });
}

#[test]
fn af_packet_takes_untagged_frames_beside_a_vlan() {
    isolated("vlans::af_packet_takes_untagged_frames_beside_a_vlan", || {
        untagged_frames_beside_a_vlan(LinkChoice::AfPacket);
    });
}

/// A target leaves responses to the host, which may be an initiator on the same interface.
fn responses_are_left_to_the_host(choice: LinkChoice) {
    veth_pair(1500, 1);
    let region = region(3);
    let ports = [(0, 0), (1, 100)];
    let (_a, mut a) = Station::open_as("a0", LinkChoice::AfPacket, &ports, Frames::All, &region, 0);
    let (_host, mut host) = Station::open_as("b0", LinkChoice::AfPacket, &ports, Frames::All, &region, 1);
    let (_b, mut b) = Station::open_as("b0", choice, &ports, Frames::Requests, &region, 2);
    for ordinal in [0, 1] {
        let (mut request, mut response) = (pattern(200, 1), pattern(200, 2));
        request[14] = 0x10;
        response[14] = 0x18;
        a.send_by(ordinal, &response);
        a.send_by(ordinal, &request);
        assert!(b.collect(1)[0] == request);
        assert!(host.collect_within(2, SHORT)[0] == response, "the host has what came first");
    }
    assert!(b.collect_within(1, SHORT).is_empty());
}

#[test]
fn af_xdp_leaves_responses_to_the_host() {
    isolated("vlans::af_xdp_leaves_responses_to_the_host", || {
        responses_are_left_to_the_host(LinkChoice::AfXdp);
    });
}

#[test]
fn af_packet_leaves_responses_to_the_host() {
    isolated("vlans::af_packet_leaves_responses_to_the_host", || {
        responses_are_left_to_the_host(LinkChoice::AfPacket);
    });
}
