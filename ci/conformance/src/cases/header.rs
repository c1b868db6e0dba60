//! Headers and addressing.

use std::collections::BTreeSet;

use crate::frames::{EVERYONE, Request};
use crate::world::{CLIENT, EXPORTS, MAIN, World};

/// Shorter than a header.
pub fn case_01_a_frame_of_23_bytes(w: &mut World<'_>) {
    let request = w.main(Request::config(0, b""));
    w.silence_of_bytes(&request.bytes()[..23]);
}

/// Not AoE.
pub fn case_02_another_ethertype(w: &mut World<'_>) {
    let request = w.main(Request::config(0, b""));
    w.silence(&Request { ethertype: 0x88b5, ..request });
}

/// Responses are not answered: a target on the same segment would hear its own.
pub fn case_03_a_response(w: &mut World<'_>) {
    let request = w.main(Request::config(0, b""));
    w.silence(&Request { version_flags: 0x18, ..request });
}

/// Our own frames come back by some switches; and no station has a group address or none.
pub fn case_04_from_the_interface_itself(w: &mut World<'_>) {
    let own = [w.carrier.interface_mac(), w.carrier.export_mac(MAIN), EVERYONE, [0; 6]];
    for src in own {
        let request = w.main(Request::config(0, b""));
        w.silence(&Request { src, ..request });
    }
}

/// An error in person, silence to everyone.
pub fn case_05_version_two(w: &mut World<'_>) {
    let request = w.main(Request::identify());
    let request = Request { version_flags: 0x20, ..request };
    assert_eq!(w.ask_as_is(&request).error(), 5);
    w.silence(&Request { dst: EVERYONE, ..request });
}

/// Nobody is there.
pub fn case_06_another_slot(w: &mut World<'_>) {
    for (shelf, slot) in [(1, 3), (2, 2), (0, 0)] {
        let request = w.main(Request::config(0, b""));
        w.silence(&Request { shelf, slot, ..request });
        let everyone = w.main(Request::config(0, b""));
        w.silence(&Request { shelf, slot, dst: EVERYONE, ..everyone });
    }
}

/// Shelf and slot are independent wildcards.
pub fn case_07_any_shelf(w: &mut World<'_>) {
    for dst in [w.carrier.export_mac(MAIN), EVERYONE] {
        let request = w.main(Request::config(0, b""));
        let reply = w.ask_as_is(&Request { shelf: 0xffff, dst, ..request });
        assert_eq!(reply.address(), (1, 2));
    }
}

/// In person one answer, to everyone one for each slot of the shelf.
pub fn case_08_any_slot(w: &mut World<'_>) {
    let request = w.main(Request::config(0, b""));
    let in_person = Request { slot: 0xff, ..request.clone() };
    assert_eq!(w.ask_as_is(&in_person).address(), (1, 2));
    let request = w.main(request);
    let replies = w.ask_all(&Request { slot: 0xff, dst: EVERYONE, ..request }, 2);
    let addresses: Vec<_> = replies.iter().map(|reply| reply.address()).collect();
    assert_eq!(addresses, [(1, 2), (1, 7)]);
}

/// Every export answers once, each from a MAC of its own.
pub fn case_09_discovery(w: &mut World<'_>) {
    let request = w.main(Request::config(0, b""));
    let request = Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, ..request };
    let replies = w.ask_all(&request, EXPORTS.len());
    let addresses: BTreeSet<_> = replies.iter().map(|reply| reply.address()).collect();
    assert_eq!(addresses, EXPORTS.iter().map(|plan| (plan.shelf, plan.slot)).collect());
    let macs: BTreeSet<_> = replies.iter().map(|reply| reply.src()).collect();
    assert_eq!(macs.len(), EXPORTS.len());
}

/// Told so to who names the target.
pub fn case_10_an_unknown_command(w: &mut World<'_>) {
    let reply = w.ask(Request::of(0x55, vec![0; 12]));
    assert_eq!((reply.version_flags(), reply.error()), (0x1c, 1));
    let everyone = w.main(Request::of(0x55, vec![0; 12]));
    w.silence(&Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, ..everyone });
}

/// Keyed reservations and vendors' commands are unknown too.
pub fn case_11_a_vendor_command(w: &mut World<'_>) {
    for command in [4, 0xf0, 0xf1, 0xff] {
        for argument in [vec![], vec![0xff; 1000]] {
            assert_eq!(w.ask(Request::of(command, argument)).error(), 1, "{command:#x}");
        }
    }
}

/// The tools' tags.
pub fn case_12_a_tag_with_its_highest_bit(w: &mut World<'_>) {
    let request = w.main(Request::config(0, b""));
    // The tag is compared with every answer.
    w.ask_as_is(&Request { tag: 0xdead_beef, ..request });
}

/// Every kind of answer.
pub fn case_13_the_answer_comes_from_the_exports_mac_and_is_padded(w: &mut World<'_>) {
    let own = w.carrier.export_mac(MAIN);
    assert_eq!(own[0] & 3, 2, "locally administered, of one station");
    for request in [
        Request::config(0, b""),
        Request::identify(),
        Request::read(0, 1),
        Request::write(0, &[1; 512]),
        Request::read(u64::MAX >> 16, 1),
        Request::masks(0, &[]),
        Request::reserve(0, &[]),
        Request::of(0x55, vec![]),
    ] {
        let reply = w.ask(request);
        assert_eq!((reply.src(), reply.dst()), (own, CLIENT));
        assert!(reply.0.len() >= 60);
    }
}

/// aoeping sets one by mistake.
pub fn case_14_a_reserved_flag(w: &mut World<'_>) {
    for version_flags in [0x11, 0x12, 0x13] {
        let request = w.main(Request::identify());
        assert_eq!(w.ask_as_is(&Request { version_flags, ..request }).size_sectors(), EXPORTS[MAIN].sectors);
    }
}

/// A switch floods, or the interface listens to all.
pub fn case_15_to_another_station(w: &mut World<'_>) {
    for dst in [[2, 9, 9, 9, 9, 9], w.carrier.interface_mac(), w.carrier.export_mac(1)] {
        let request = w.main(Request::config(0, b""));
        w.silence(&Request { dst, ..request });
        let write = w.main(Request::write(0, &[9; 512]));
        w.silence(&Request { dst, ..write });
    }
    assert_eq!(w.content(MAIN, 0, 1), [0; 512]);
}

/// Linux sends again with another tag.
pub fn case_16_twice_with_two_tags(w: &mut World<'_>) {
    let one = w.main(Request::read(8, 2));
    let two = w.main(Request::read(8, 2));
    w.send(&one);
    w.send(&two);
    let (first, second) = (w.answer(&one), w.answer(&two));
    assert_eq!(first.sectors(2), second.sectors(2));
}
