//! Query Config.

use crate::frames::{EVERYONE, Request};
use crate::world::{DEFAULT_POLICY, SECTORS_MAX, World};

fn set(w: &mut World<'_>, string: &[u8]) {
    assert_eq!(w.ask(Request::config(4, string)).string(), string);
}

fn string(w: &mut World<'_>) -> Vec<u8> {
    w.ask(Request::config(0, b"")).string().to_vec()
}

/// 32 bytes, as Linux sends it on a link that does not pad.
pub fn case_18_a_short_config_read(w: &mut World<'_>) {
    let request = w.main(Request::config(0, b""));
    assert_eq!(request.bytes().len(), 32);
    let reply = w.ask_as_is(&request);
    let (buffers, sectors, version) = reply.config();
    assert!(buffers >= 64, "Linux's window");
    assert_eq!((sectors, version), (SECTORS_MAX, 0x10));
    assert_eq!(reply.string(), b"");
    w.silence_of_bytes(&request.bytes()[..31]);
}

/// aoeping sends a length of 1024 and filler with a read.
pub fn case_19_a_config_read_with_filler(w: &mut World<'_>) {
    assert_eq!(w.ask(Request::config(0, &[0xed; 1024])).string(), b"");
    assert_eq!(string(w), b"");
}

/// The whole string.
pub fn case_20_a_test_that_matches(w: &mut World<'_>) {
    assert_eq!(w.ask(Request::config(1, b"")).string(), b"");
    set(w, b"rack 7");
    let reply = w.ask(Request::config(1, b"rack 7"));
    assert_eq!((reply.string(), reply.config().2), (&b"rack 7"[..], 0x11));
    // By everyone too: that is how a host finds its own.
    let everyone = w.main(Request::config(1, b"rack 7"));
    w.ask_all(&Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, ..everyone }, 1);
}

/// Silence, as the protocol says.
pub fn case_21_a_test_that_differs(w: &mut World<'_>) {
    set(w, b"rack 7");
    for other in [&b"rack"[..], b"rack 8", b"rack 77", b""] {
        let request = w.main(Request::config(1, other));
        w.silence(&request);
    }
}

/// The answer has the whole string; nothing is a prefix of everything.
pub fn case_22_a_prefix_that_matches(w: &mut World<'_>) {
    set(w, b"rack 7");
    for prefix in [&b"rack"[..], b"", b"rack 7"] {
        assert_eq!(w.ask(Request::config(2, prefix)).string(), b"rack 7");
    }
}

/// Longer than the string, or another.
pub fn case_23_a_prefix_that_is_too_long(w: &mut World<'_>) {
    set(w, b"rack 7");
    for other in [&b"rack 77"[..], b"ruck"] {
        let request = w.main(Request::config(2, other));
        w.silence(&request);
    }
}

/// And it is read back.
pub fn case_24_set_an_empty_string(w: &mut World<'_>) {
    let reply = w.ask(Request::config(3, b"abc"));
    assert_eq!((reply.error(), reply.string()), (0, &b"abc"[..]));
    assert_eq!(string(w), b"abc");
}

/// An error that carries what is there.
pub fn case_25_set_over_another_string(w: &mut World<'_>) {
    set(w, b"abc");
    let reply = w.ask(Request::config(3, b"abd"));
    assert_eq!((reply.error(), reply.string()), (4, &b"abc"[..]));
    // Replacing asks for the string that is to be there.
    let tar = |expected: &[u8], string: &[u8]| {
        let mut request = Request::config(5, expected);
        request.argument.extend(u16::try_from(string.len()).unwrap().to_be_bytes());
        request.argument.extend(string);
        request
    };
    let reply = w.ask(tar(b"abd", b"new"));
    assert_eq!((reply.error(), reply.string()), (4, &b"abc"[..]));
    assert_eq!(string(w), b"abc");
    let reply = w.ask(tar(b"abc", b"new"));
    assert_eq!((reply.error(), reply.string()), (0, &b"new"[..]));
    assert_eq!(string(w), b"new");
    let mut short = tar(b"new", b"newer");
    short.argument.truncate(8 + 3 + 2 + 4);
    assert_eq!(w.ask(short).error(), 2);
    assert_eq!(string(w), b"new");
}

/// An initiator whose answer was lost asks again.
pub fn case_26_set_the_same_string(w: &mut World<'_>) {
    set(w, b"abc");
    let reply = w.ask(Request::config(3, b"abc"));
    assert_eq!((reply.error(), reply.string()), (0, &b"abc"[..]));
}

/// The answer came, so it is stored.
pub fn case_27_force_set_of_the_longest_string_survives_a_crash(w: &mut World<'_>) {
    let longest: Vec<u8> = (0..1024u32).map(|i| (i % 251).to_le_bytes()[0]).collect();
    set(w, &longest);
    w.carrier.crash();
    assert_eq!(string(w), longest);
    // The default policy lets nobody change it; the answer is that of a target that has no such sub-command.
    let request = w.to(DEFAULT_POLICY, Request::config(4, b"mine"));
    assert_eq!(w.ask_as_is(&request).error(), 2);
    let request = w.to(DEFAULT_POLICY, Request::config(0, b""));
    assert_eq!(w.ask_as_is(&request).string(), b"");
}

/// Cleared.
pub fn case_28_force_set_of_nothing(w: &mut World<'_>) {
    set(w, b"abc");
    set(w, b"");
    assert_eq!(string(w), b"");
}

/// 1025 bytes.
pub fn case_29_a_string_that_is_too_long(w: &mut World<'_>) {
    set(w, b"abc");
    for ccmd in [1, 2, 3, 4, 5] {
        assert_eq!(w.ask(Request::config(ccmd, &[7; 1025])).error(), 2, "sub-command {ccmd}");
    }
    assert_eq!(string(w), b"abc");
}

/// What is not in the frame is not stored.
pub fn case_30_a_string_longer_than_its_frame(w: &mut World<'_>) {
    let mut request = Request::config(4, &[7; 28]);
    request.argument[7] = 100;
    assert_eq!(w.ask(request.clone()).error(), 2);
    let everyone = w.main(request);
    w.silence(&Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, ..everyone });
    assert_eq!(string(w), b"");
}

/// Told so in person; to everyone nothing is set, and nothing said.
pub fn case_31_an_unknown_sub_command(w: &mut World<'_>) {
    for ccmd in [6, 9, 15] {
        assert_eq!(w.ask(Request::config(ccmd, b"")).error(), 2);
    }
    for ccmd in [3, 4, 5, 9] {
        let everyone = w.main(Request::config(ccmd, b"everyone"));
        w.silence(&Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, ..everyone });
    }
    assert_eq!(string(w), b"");
}
