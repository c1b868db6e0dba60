//! Changes asked for over AoE: they stand in the map until they are answered there, and then on the wire.

use std::time::Duration;

use aoe_xdp::wire::{Address, CONFIG_STRING_OFFSET, Header, Mac, ccmd, command, parse_config};
use cluster_map::{Allow, AoePolicy, Change, ChangeAnswer, ChangeOutcome, DesiredExport, SetRule};
use zerocopy::IntoBytes;

use crate::netns;
use crate::node::{Node, Station, export, volume_id};

const CLIENT: Mac = Mac([0x02, 0, 0, 0, 0xc1, 0x10]);
const SOON: Duration = Duration::from_secs(20);
/// Long enough that what is not held back is there.
const NEVER: Duration = Duration::from_millis(300);

fn set_string(string: &[u8], tag: u32) -> Vec<u8> {
    let at = Address { shelf: 1, slot: 0 };
    let header = Header::request(Mac::BROADCAST, CLIENT, at, command::CONFIG, tag);
    let len = u16::try_from(string.len()).unwrap().to_be_bytes();
    [header.as_bytes(), &[0, 0, 0, 0, 0, ccmd::FORCE_SET], &len, string].concat()
}

fn open_export() -> DesiredExport {
    DesiredExport { allow: AoePolicy { config: Allow::Anyone, ..AoePolicy::default() }, ..export(0) }
}

/// The string of an answer without an error.
fn string_of(frame: &[u8]) -> Vec<u8> {
    let (head, rest) = parse_config(frame).unwrap();
    assert_eq!(head.header.version_flags, 0x18);
    rest[..usize::from(head.arg.string_len.get())].to_vec()
}

#[test]
fn a_change_is_answered_when_it_is_in_force_and_not_before() {
    netns::isolated("changes::a_change_is_answered_when_it_is_in_force_and_not_before", || {
        netns::veth_pair(1500, 1);
        let mut node = Node::start(1);
        node.export(vec![open_export()]);
        let mut station = Station::open();

        station.send(&set_string(b"rack 7", 1));
        let observed = node.wait("the change stands in the map", |seen| seen.changes.len() == 1);
        let request = observed.changes[0].clone();
        assert_eq!((request.volume, request.client), (volume_id(0), CLIENT.0));
        assert_eq!(request.change, Change::SetString { rule: SetRule::Always, string: b"rack 7".to_vec() });
        // Sent again while it waits: the same request, another tag.
        station.send(&set_string(b"rack 7", 2));
        assert!(station.receive(1, NEVER).is_none(), "answered before it was stored");
        assert_eq!(node.wait("it stands", |_| true).changes, observed.changes);

        node.desired.exports[0].config_string = b"rack 7".to_vec();
        node.answer(vec![ChangeAnswer { id: request.id, outcome: ChangeOutcome::Done }]);
        for tag in [1, 2] {
            assert_eq!(string_of(&station.receive(tag, SOON).expect("an answer")), b"rack 7");
        }
        node.wait("the request is gone", |seen| seen.changes.is_empty());
        // The change is advertised, with the export as it is now.
        node.answer(Vec::new());

        // What is in force already needs nobody.
        station.send(&set_string(b"rack 7", 3));
        assert_eq!(string_of(&station.receive(3, SOON).expect("an answer")), b"rack 7");
        // What cannot be made is silence, and room for the next.
        station.send(&set_string(b"rack 8", 4));
        let observed = node.wait("the next change stands in the map", |seen| seen.changes.len() == 1);
        assert_eq!(observed.changes[0].id, request.id + 1);
        node.answer(vec![ChangeAnswer { id: request.id + 1, outcome: ChangeOutcome::Refused }]);
        node.wait("the request is gone", |seen| seen.changes.is_empty());
        assert!(station.receive(4, NEVER).is_none());
        node.stop();
    });
}

#[test]
fn a_changed_export_is_advertised_as_it_is_now() {
    netns::isolated("changes::a_changed_export_is_advertised_as_it_is_now", || {
        netns::veth_pair(1500, 1);
        let mut station = Station::open();
        let mut node = Node::start(1);
        node.export(vec![open_export()]);
        let first = station.receive(0, SOON).expect("an advertisement");
        assert_eq!(first[..6], [0xff; 6]);
        assert_eq!(string_of(&first), b"");
        node.desired.exports[0].config_string = vec![b'x'; 1024];
        node.publish();
        let second = station.receive(0, SOON).expect("an advertisement");
        assert_eq!(second.len(), CONFIG_STRING_OFFSET + 1024);
        assert_eq!(string_of(&second), [b'x'; 1024]);
        // To whom it exists for, and to nobody else.
        node.desired.exports[0].masks = vec![CLIENT.0];
        node.publish();
        let third = station.receive(0, SOON).expect("an advertisement");
        assert_eq!(third[..6], CLIENT.0);
        node.stop();
    });
}
