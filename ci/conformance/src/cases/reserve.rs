//! Reserve/Release.

use crate::frames::{EVERYONE, Mac, Reply, Request};
use crate::world::{CLIENT, DEFAULT_POLICY, EXPORTS, MAIN, OTHER, World};

fn ask_from(w: &mut World<'_>, src: Mac, request: Request) -> Reply {
    let request = w.main(request);
    w.ask_as_is(&Request { src, ..request })
}

fn holders(w: &mut World<'_>) -> Vec<Mac> {
    let reply = w.ask(Request::reserve(0, &[]));
    assert_eq!(reply.error(), 0);
    reply.holders()
}

fn reserve(w: &mut World<'_>, macs: &[Mac]) {
    let reply = w.ask(Request::reserve(1, macs));
    assert_eq!((reply.error(), reply.holders()), (0, macs.to_vec()));
}

/// Nobody holds it.
pub fn case_70_a_reservation_read(w: &mut World<'_>) {
    assert!(holders(w).is_empty());
}

/// From the data, and from flushing it.
pub fn case_71_a_reservation_keeps_others_out(w: &mut World<'_>) {
    reserve(w, &[CLIENT]);
    for request in [
        Request::read(0, 1),
        Request::ata(0x20, 0, 1, &[]),
        Request::write(0, &[7; 512]),
        Request::ata(0x30, 0, 1, &[7; 512]),
        Request::ata(0xe7, 0, 0, &[]),
        Request::ata(0xea, 0, 0, &[]),
    ] {
        assert_eq!(ask_from(w, OTHER, request).error(), 6);
    }
    assert_eq!(w.content(MAIN, 0, 1), [0; 512]);
    // It survives.
    w.carrier.crash();
    assert_eq!(ask_from(w, OTHER, Request::read(0, 1)).error(), 6);
    assert_eq!(holders(w), [CLIENT]);
}

/// The answer says who holds it.
pub fn case_72_a_reservation_of_somebody_else(w: &mut World<'_>) {
    reserve(w, &[CLIENT]);
    let reply = ask_from(w, OTHER, Request::reserve(1, &[OTHER]));
    assert_eq!((reply.error(), reply.holders()), (6, vec![CLIENT]));
    assert_eq!(holders(w), [CLIENT]);
}

/// Everything but the data.
pub fn case_73_what_is_served_beside_a_reservation(w: &mut World<'_>) {
    reserve(w, &[CLIENT]);
    assert_eq!(ask_from(w, OTHER, Request::identify()).size_sectors(), EXPORTS[MAIN].sectors);
    assert_eq!(ask_from(w, OTHER, Request::config(0, b"")).string(), b"");
    assert_eq!(ask_from(w, OTHER, Request::config(4, b"x")).string(), b"x");
    assert_eq!(ask_from(w, OTHER, Request::masks(0, &[])).masks().0, 0);
    assert_eq!(ask_from(w, OTHER, Request::reserve(0, &[])).holders(), [CLIENT]);
    assert_eq!(ask_from(w, OTHER, Request::ata(0xe5, 0, 0, &[])).ata().0, 0x40);
}

/// Whoever held it is kept out then.
pub fn case_74_a_reservation_by_force(w: &mut World<'_>) {
    reserve(w, &[CLIENT]);
    let reply = ask_from(w, OTHER, Request::reserve(2, &[OTHER]));
    assert_eq!((reply.error(), reply.holders()), (0, vec![OTHER]));
    assert_eq!(w.ask(Request::read(0, 1)).error(), 6);
    assert_eq!(ask_from(w, OTHER, Request::read(0, 1)).ata().0, 0x40);
}

/// By who holds it.
pub fn case_75_a_release(w: &mut World<'_>) {
    reserve(w, &[OTHER, CLIENT]);
    let reply = ask_from(w, OTHER, Request::reserve(1, &[]));
    assert_eq!((reply.error(), reply.holders()), (0, vec![]));
    assert_eq!(w.ask(Request::read(0, 1)).ata().0, 0x40);
}

/// What is not in the frame is not read.
pub fn case_76_more_macs_than_the_frame_has(w: &mut World<'_>) {
    reserve(w, &[CLIENT]);
    let mut request = Request::reserve(1, &[OTHER; 5]);
    request.argument[1] = 200;
    let reply = w.ask(request);
    assert_eq!((reply.error(), reply.holders()), (2, vec![CLIENT]));
    let reply = w.ask(Request::reserve(1, &[OTHER; 65]));
    assert_eq!((reply.error(), reply.holders()), (2, vec![CLIENT]), "sixty-four fit");
    assert_eq!(holders(w), [CLIENT]);
}

/// Nor may everyone be reserved, or by who is not allowed.
pub fn case_77_an_unknown_reserve_command(w: &mut World<'_>) {
    assert_eq!(w.ask(Request::reserve(9, &[])).error(), 2);
    let request = w.to(DEFAULT_POLICY, Request::reserve(1, &[CLIENT]));
    assert_eq!(w.ask_as_is(&request).error(), 2);
    let request = w.main(Request::reserve(1, &[OTHER]));
    w.silence(&Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, ..request });
    assert!(holders(w).is_empty());
}
