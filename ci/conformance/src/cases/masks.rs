//! MAC Mask List.

use crate::frames::{EVERYONE, Mac, Reply, Request};
use crate::world::{CLIENT, DEFAULT_POLICY, OTHER, World};

const THIRD: Mac = [0x02, 0, 0, 0, 0xc1, 0x30];

fn edit(w: &mut World<'_>, directives: &[(u8, Mac)]) -> Reply {
    w.ask(Request::masks(1, directives))
}

/// The list in force.
fn list(w: &mut World<'_>) -> Vec<Mac> {
    let (error, count, directives) = w.ask(Request::masks(0, &[])).masks();
    assert_eq!((error, usize::from(count)), (0, directives.len()));
    assert!(directives.iter().all(|(dcmd, _)| *dcmd == 0));
    directives.into_iter().map(|(_, mac)| mac).collect()
}

/// Nobody is named: everyone is served.
pub fn case_62_an_empty_mask_list(w: &mut World<'_>) {
    assert_eq!(w.ask(Request::masks(0, &[])).masks(), (0, 0, vec![]));
}

/// Deleting what is not there is no error.
pub fn case_63_masks_added_and_deleted(w: &mut World<'_>) {
    let reply = edit(w, &[(1, CLIENT), (1, OTHER), (2, THIRD), (0, THIRD)]);
    assert_eq!(reply.masks(), (0, 2, vec![(0, CLIENT), (0, OTHER)]));
    assert_eq!(list(w), [CLIENT, OTHER]);
    edit(w, &[(2, OTHER)]);
    assert_eq!(list(w), [CLIENT]);
    // It survives.
    w.carrier.crash();
    assert_eq!(list(w), [CLIENT]);
}

/// Nor is adding what is there.
pub fn case_64_a_mask_added_twice(w: &mut World<'_>) {
    let reply = edit(w, &[(1, CLIENT), (1, CLIENT)]);
    assert_eq!(reply.masks().1, 1);
    assert_eq!(edit(w, &[(1, CLIENT)]).masks().1, 1);
    assert_eq!(list(w), [CLIENT]);
}

/// All or nothing.
pub fn case_65_a_bad_directive_changes_nothing(w: &mut World<'_>) {
    edit(w, &[(1, CLIENT)]);
    let bad = [(1, OTHER), (7, THIRD), (1, THIRD)];
    let (error, position, body) = edit(w, &bad).masks();
    assert_eq!((error, position), (2, 1));
    assert_eq!(body, bad, "the request's directives");
    assert_eq!(list(w), [CLIENT]);
}

/// Sixty-four fit.
pub fn case_66_more_masks_than_fit(w: &mut World<'_>) {
    let mac = |n: u8| [0x02, 0, 0, 0, 0xd0, n];
    let mut directives = vec![(1, CLIENT)];
    directives.extend((1..65).map(|n| (1, mac(n))));
    let (error, position, _) = edit(w, &directives).masks();
    assert_eq!((error, position), (3, 64));
    assert!(list(w).is_empty());
    directives.pop();
    assert_eq!(edit(w, &directives).masks().1, 64);
    let (error, position, _) = edit(w, &[(1, CLIENT), (1, mac(99))]).masks();
    assert_eq!((error, position), (3, 1));
    assert_eq!(list(w).len(), 64);
}

/// Nor may everyone be edited, or who is not allowed.
pub fn case_67_an_unknown_mask_command(w: &mut World<'_>) {
    assert_eq!(w.ask(Request::masks(5, &[])).error(), 2);
    let request = w.to(DEFAULT_POLICY, Request::masks(1, &[(1, OTHER)]));
    assert_eq!(w.ask_as_is(&request).error(), 2);
    let request = w.main(Request::masks(1, &[(1, OTHER)]));
    w.silence(&Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, ..request });
    assert!(list(w).is_empty());
}

/// What is not in the frame is not read.
pub fn case_68_more_directives_than_the_frame_has(w: &mut World<'_>) {
    let mut request = Request::masks(1, &[(1, CLIENT), (1, OTHER)]);
    request.argument[3] = 10;
    assert_eq!(w.ask(request).error(), 2);
    assert!(list(w).is_empty());
}

/// Whatever it asks, discovery included.
pub fn case_69_who_is_masked_out_gets_silence(w: &mut World<'_>) {
    edit(w, &[(1, CLIENT)]);
    for request in [
        Request::config(0, b""),
        Request::identify(),
        Request::read(0, 1),
        Request::write(0, &[7; 512]),
        Request::masks(0, &[]),
        Request::masks(1, &[(1, OTHER)]),
        Request::reserve(0, &[]),
        Request::of(0x55, vec![]),
    ] {
        let request = w.main(request);
        w.silence(&Request { src: OTHER, ..request });
    }
    let everyone = w.main(Request::config(0, b""));
    let everyone = Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, src: OTHER, ..everyone };
    let replies = w.ask_all(&everyone, crate::world::EXPORTS.len() - 1);
    assert!(replies.iter().all(|reply| reply.address() != (1, 2)));
    assert_eq!(w.content(crate::world::MAIN, 0, 1), [0; 512]);
}
