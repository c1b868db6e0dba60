//! Both ends against each other, and one end against what no honest end would say.

use proptest::collection::vec;
use proptest::prelude::*;

use super::fuzzing::{self, End, answer, ends, identity, request};
use super::handshake::{
    ClusterKey, HANDSHAKE_NS, Handshake, HandshakeError, Identity, Nonce, Progress, Refusal, Start, Versions,
};
use super::*;
use cluster_map::{ClusterId, NodeId};

/// Lets both ends talk until neither has anything to say; in pieces of so many bytes.
fn talk(ends: &mut [End; 2], piece: usize, now_ns: u64) {
    loop {
        let mut is_quiet = true;
        for (from, to) in [(0, 1), (1, 0)] {
            let bytes = ends[from].outgoing(600, now_ns);
            is_quiet &= bytes.is_empty();
            ends[to].incoming.extend(bytes);
            while !ends[to].incoming.is_empty() {
                let before = ends[to].incoming.len();
                ends[to].receive(piece, now_ns);
                if ends[to].incoming.len() == before {
                    break;
                }
            }
            ends[to].admit(now_ns);
        }
        if is_quiet {
            return;
        }
    }
}

fn open_ends(piece: usize) -> [End; 2] {
    let mut ends = ends(identity(1), identity(2), 0);
    talk(&mut ends, piece, 0);
    assert!(ends.iter().all(|end| end.is_open && end.error.is_none()));
    ends
}

/// How the two ends fail: first the connecting one.
fn failures(connecting: Identity, accepting: Identity) -> [HandshakeError; 2] {
    let mut ends = ends(connecting, accepting, 0);
    talk(&mut ends, 1000, 0);
    ends.map(|end| {
        assert!(!end.is_open && end.connection.peer().is_none());
        match end.error {
            Some(ConnectionError::Handshake(error)) => error,
            other => panic!("{other:?} is no failed handshake"),
        }
    })
}

#[test]
fn both_learn_who_is_there() {
    let mut accepting = identity(2);
    accepting.versions = Versions { lowest: 1, highest: 4 };
    let mut connecting = identity(1);
    connecting.versions = Versions { lowest: 0, highest: 3 };
    let mut ends = ends(connecting, accepting, 0);
    talk(&mut ends, 7, 0);
    let [connecting, accepting] = ends.map(|end| end.connection.peer().unwrap());
    assert_eq!((connecting.site, accepting.site), (identity(2).site, identity(1).site));
    assert_eq!((connecting.start, accepting.start), (Start([2; 16]), Start([1; 16])));
    assert_eq!((connecting.version, accepting.version), (3, 3), "the highest that both speak");
    assert_eq!((connecting.attempt, accepting.attempt), (1, 1));
}

#[test]
fn no_common_version_is_said_to_both() {
    let own = Versions { lowest: 1, highest: 2 };
    let peer = Versions { lowest: 3, highest: 5 };
    let (mut connecting, mut accepting) = (identity(1), identity(2));
    (connecting.versions, accepting.versions) = (own, peer);
    let errors = failures(connecting, accepting);
    assert_eq!(
        errors,
        [HandshakeError::Refused(Refusal::Version(peer)), HandshakeError::Version { own: peer, peer: own }]
    );
    let text = errors[1].to_string();
    assert!(text.contains("1 to 2") && text.contains("3 to 5"), "{text}");
}

#[test]
fn another_cluster_and_another_key_are_refused() {
    let mut other = identity(2);
    other.cluster = ClusterId([9; 16]);
    let errors = [HandshakeError::Refused(Refusal::Cluster), HandshakeError::Cluster(ClusterId([1; 16]))];
    assert_eq!(failures(identity(1), other), errors);
    let mut other = identity(2);
    other.key = ClusterKey([9; 32]);
    // The connecting side is the first to see a proof.
    let errors = [HandshakeError::Key, HandshakeError::Refused(Refusal::Key)];
    assert_eq!(failures(identity(1), other), errors);
}

#[test]
fn who_is_not_meant_says_who_it_is() {
    let mut ends = ends(identity(1), identity(2), 0);
    let wanted = Site { node: NodeId([5; 16]), core: 2 };
    ends[0].connection =
        Connection::connect(&identity(1), wanted, 1, Nonce([7; 32]), fuzzing::WAITING_BYTES_MAX, 0);
    talk(&mut ends, 1000, 0);
    let [connecting, accepting] = ends.map(|end| end.error.unwrap());
    let refused = HandshakeError::Refused(Refusal::Site(identity(2).site));
    assert_eq!(connecting, ConnectionError::Handshake(refused));
    let unmeant = HandshakeError::Unmeant { from: identity(1).site, wanted };
    assert_eq!(accepting, ConnectionError::Handshake(unmeant));
}

#[test]
fn a_node_does_not_talk_to_itself() {
    let mut same = identity(1);
    same.site.core = 9;
    let errors = [HandshakeError::Refused(Refusal::Oneself), HandshakeError::Oneself];
    assert_eq!(failures(identity(1), same), errors);
}

#[test]
fn who_answers_in_anothers_place_is_refused_though_it_has_the_key() {
    // It takes the hello of another as its own.
    let own = identity(1);
    let mut connecting = Handshake::connect(&own, identity(3).site, 1, Nonce([7; 32]), 0);
    let mut other = Handshake::connect(&identity(2), own.site, 1, Nonce([8; 32]), 0);
    let mut hello = other.outgoing().to_vec();
    other.sent();
    hello[5] = Side::Accepting.code();
    let wanted = identity(3).site;
    let error = HandshakeError::Site { wanted, reached: identity(2).site };
    assert_eq!(connecting.take(&own, &hello), Err(error));
}

#[test]
fn a_proof_that_is_sent_back_proves_nothing() {
    // Somebody without the key gives the accepting side's proof as its own.
    let own = identity(2);
    let mut stranger = identity(1);
    stranger.key = ClusterKey([0; 32]);
    let hello = Handshake::connect(&stranger, own.site, 1, Nonce([7; 32]), 0).outgoing().to_vec();
    let mut accepting = Handshake::accept(Nonce([8; 32]), 0);
    assert_eq!(accepting.take(&own, &hello), Ok((hello.len(), Progress::Waiting)));
    let mut proof = accepting.outgoing()[128..].to_vec();
    accepting.sent();
    assert_eq!(proof.len(), 40);
    proof[5] = Side::Connecting.code();
    assert_eq!(accepting.take(&own, &proof), Err(HandshakeError::Key));
    assert_eq!(accepting.outgoing()[4], kind::REFUSAL, "it is told");
    assert!(accepting.admit().is_none());
}

#[test]
fn a_hello_that_is_sent_back_is_refused() {
    let own = identity(1);
    let mut connecting = Handshake::connect(&own, identity(2).site, 1, Nonce([7; 32]), 0);
    let mut hello = connecting.outgoing().to_vec();
    assert_eq!(connecting.take(&own, &hello), Err(HandshakeError::Value("who speaks")));
    let mut connecting = Handshake::connect(&own, identity(2).site, 1, Nonce([7; 32]), 0);
    hello[5] = Side::Accepting.code();
    assert_eq!(connecting.take(&own, &hello), Err(HandshakeError::Oneself));
}

#[test]
fn an_old_proof_is_of_no_use_for_another_handshake() {
    let (own, peer) = (identity(2), identity(1));
    let run = |nonce: u8, replayed: Option<&[u8]>| {
        let mut connecting = Handshake::connect(&peer, own.site, 1, Nonce([7; 32]), 0);
        let mut accepting = Handshake::accept(Nonce([nonce; 32]), 0);
        accepting.take(&own, connecting.outgoing()).unwrap();
        connecting.sent();
        connecting.take(&peer, accepting.outgoing()).unwrap();
        let proof = connecting.outgoing().to_vec();
        let result = accepting.take(&own, replayed.unwrap_or(&proof)).map(|(_, progress)| progress);
        (proof, result)
    };
    let (proof, result) = run(8, None);
    assert!(matches!(result, Ok(Progress::Proved(_))));
    assert_eq!(run(9, Some(&proof)).1, Err(HandshakeError::Key));
}

#[test]
fn a_longer_hello_of_a_later_version_is_understood() {
    // Its proof covers all of it.
    let (own, peer) = (identity(2), identity(1));
    let mut hello = Handshake::connect(&peer, own.site, 1, Nonce([7; 32]), 0).outgoing().to_vec();
    hello.extend_from_slice(&[0xaa; 100]);
    hello[6..8].copy_from_slice(&228u16.to_le_bytes());
    let mut accepting = Handshake::accept(Nonce([8; 32]), 0);
    assert_eq!(accepting.take(&own, &hello), Ok((228, Progress::Waiting)));
    let transcript = [&hello[..], &accepting.outgoing()[..128]].concat();
    let context = "torus connection: the connecting side proves the key of its cluster";
    let proof = blake3::keyed_hash(&blake3::derive_key(context, &own.key.0), &transcript);
    let mut message = RawHead::new(kind::PROOF, Side::Connecting, 40).as_bytes().to_vec();
    message.extend_from_slice(proof.as_bytes());
    assert!(matches!(accepting.take(&own, &message), Ok((40, Progress::Proved(_)))));
}

#[test]
fn a_handshake_ends_at_its_deadline_and_a_wait_for_admission_too() {
    let mut ends = ends(identity(1), identity(2), 5);
    let bytes = ends[0].outgoing(9, 5);
    ends[1].incoming.extend(bytes);
    ends[1].receive(1000, 5);
    for end in &mut ends {
        assert_eq!(end.connection.deadline_ns(), 5 + HANDSHAKE_NS);
        assert_eq!(end.connection.tick(4 + HANDSHAKE_NS), Ok(()));
        let late = ConnectionError::Handshake(HandshakeError::Late);
        assert_eq!(end.connection.tick(5 + HANDSHAKE_NS), Err(late));
    }
}

#[test]
fn nothing_is_sent_before_the_end_is_open() {
    let mut ends = ends(identity(1), identity(2), 0);
    let (frame, blocks) = request(1, 2);
    assert_eq!(ends[0].connection.send(frame.clone(), blocks.clone()), Err((frame, blocks)));
}

#[test]
fn who_is_refused_by_the_caller_is_told() {
    let mut ends = ends(identity(1), identity(2), 0);
    for (from, to) in [(0, 1), (1, 0), (0, 1)] {
        let bytes = ends[from].outgoing(9, 0);
        ends[to].incoming.extend(bytes);
        ends[to].receive(1000, 0);
    }
    assert!(ends[1].is_asked);
    let own = identity(2);
    ends[1].connection.refuse(&own, HandshakeError::Older);
    assert!(ends[1].connection.admit(0).is_none(), "who is refused is not admitted");
    let bytes = ends[1].outgoing(9, 0);
    ends[0].incoming.extend(bytes);
    ends[0].receive(1000, 0);
    let refused = HandshakeError::Refused(Refusal::Older);
    assert_eq!(ends[0].error, Some(ConnectionError::Handshake(refused)));
}

#[test]
fn a_changed_byte_of_a_block_ends_the_connection_and_names_the_block() {
    let mut ends = open_ends(1000);
    let (frame, blocks) = request(1, 3);
    ends[0].connection.send(frame, blocks).unwrap();
    let mut bytes = ends[0].outgoing(100, 0);
    let at = bytes.len() - BLOCK_BYTES - 1;
    bytes[at] ^= 0x10;
    ends[1].incoming.extend(bytes);
    ends[1].receive(usize::MAX, 0);
    assert!(matches!(ends[1].error, Some(ConnectionError::Stream(StreamError::Block { block: 1, .. }))));
    assert!(ends[1].received.is_empty());
    let free = ends[1].heap.free;
    let End { connection, heap, .. } = &mut ends[1];
    connection.end(heap);
    assert!(connection.take_unsent().is_none());
    assert_eq!(free, 62, "the blocks of the frame were taken");
    assert_eq!(ends[1].heap.free, 64, "and are given back with it");
}

#[test]
fn frames_of_the_wrong_direction_end_the_connection() {
    let mut ends = open_ends(1000);
    let mut bytes = Vec::new();
    answer(1, 0).0.encode(&mut bytes);
    ends[1].incoming.extend(bytes);
    ends[1].receive(1000, 0);
    assert_eq!(ends[1].error, Some(ConnectionError::Stream(StreamError::Direction)));
}

#[test]
fn without_memory_nothing_is_taken_and_with_memory_it_goes_on() {
    let mut ends = open_ends(1000);
    let (frame, blocks) = request(1, 4);
    ends[0].connection.send(frame.clone(), blocks.clone()).unwrap();
    let bytes = ends[0].outgoing(100, 0);
    let (all, head) = (bytes.len(), bytes.len() - 4 * BLOCK_BYTES);
    ends[1].incoming.extend(bytes);
    for free in [0, 1, 0, 2] {
        ends[1].heap.free = free;
        ends[1].receive(usize::MAX, 0);
        assert!(ends[1].connection.is_starved() && ends[1].error.is_none());
    }
    assert_eq!(all - ends[1].incoming.len(), head + 3 * BLOCK_BYTES);
    assert!(ends[1].received.is_empty());
    ends[1].heap.free = 1;
    ends[1].receive(usize::MAX, 0);
    assert!(!ends[1].connection.is_starved());
    assert_eq!(ends[1].received, [(frame, blocks)]);
}

#[test]
fn what_waits_is_bounded_and_handed_back_at_the_end() {
    let mut ends = open_ends(1000);
    let mut taken = 0;
    while ends[0].connection.send(request(taken, 4).0, request(taken, 4).1).is_ok() {
        taken += 1;
        assert!(ends[0].connection.waiting_bytes() <= fuzzing::WAITING_BYTES_MAX);
    }
    assert!(taken >= 3);
    // One of them leaves.
    ends[0].outgoing(5, 0);
    let End { connection, heap, .. } = &mut ends[0];
    connection.end(heap);
    let unsent: Vec<_> = std::iter::from_fn(|| connection.take_unsent()).collect();
    let expected: Vec<_> = (1..taken).map(|id| request(id, 4).1).collect();
    assert_eq!(unsent, expected);
    assert_eq!(ends[0].connection.waiting_bytes(), 0);
}

#[test]
fn a_frame_longer_than_the_queue_is_taken_alone() {
    let mut ends = open_ends(1000);
    ends[1].heap.free = 256;
    let (frame, blocks) = request(1, 256);
    ends[0].connection.send(frame.clone(), blocks.clone()).unwrap();
    assert!(ends[0].connection.send(request(2, 1).0, request(2, 1).1).is_err());
    talk(&mut ends, 4096, 0);
    assert_eq!(ends[1].received, [(frame, blocks)]);
}

#[test]
fn a_silent_side_sends_beats_and_is_dead_without_them() {
    let mut ends = open_ends(1000);
    let mut now_ns = 0;
    for _ in 0..20 {
        now_ns += BEAT_NS;
        talk(&mut ends, 3, now_ns);
        assert!(ends.iter_mut().all(|end| end.connection.tick(now_ns) == Ok(())));
        assert!(ends.iter().all(|end| end.connection.deadline_ns() == now_ns + BEAT_NS));
    }
    let dead_ns = now_ns + SILENCE_NS;
    ends[0].connection.hold(now_ns + 1);
    assert_eq!(ends[1].connection.tick(dead_ns - 1), Ok(()));
    assert_eq!(ends[1].connection.tick(dead_ns), Err(ConnectionError::Silent));
    assert_eq!(ends[0].connection.tick(dead_ns), Ok(()), "it did not listen itself");
    assert_eq!(ends[0].connection.tick(dead_ns + 1), Err(ConnectionError::Silent));
    const { assert!(SILENCE_NS + WAIT_NS_MAX < 3_000_000_000, "I/O goes on within three seconds") };
}

#[test]
fn the_seeds_come_as_far_as_they_say() {
    let reached: Vec<_> =
        fuzzing::seeds().into_iter().map(|(name, script)| (name, fuzzing::run(&script))).collect();
    let of = |name| reached.iter().find(|(other, _)| *other == name).unwrap().1;
    assert_eq!((of("handshake").open, of("handshake").frames), (2, 0));
    assert_eq!((of("frames").open, of("frames").frames, of("frames").failed), (2, 4, 0));
    assert!(of("starved").was_starved && of("starved").frames > 1);
    assert_eq!((of("idle").open, of("idle").failed), (2, 2), "silent for too long");
    assert_eq!((of("changed").open, of("changed").frames, of("changed").failed), (2, 2, 1));
    assert_eq!((of("inserted").frames, of("inserted").failed), (2, 0), "a beat more is no harm");
    assert_eq!((of("stranger").open, of("stranger").failed), (0, 1));
}

#[test]
fn changed_scripts_break_nothing() {
    let seeds = fuzzing::seeds();
    let mut state = 1_u64;
    let mut next = |end: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % end
    };
    for _ in 0..20_000 {
        let mut script = seeds[next(seeds.len())].1.clone();
        for _ in 0..next(6) {
            let at = next(script.len());
            script[at] = u8::try_from(next(256)).unwrap();
        }
        fuzzing::run(&script);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_come_whole_and_in_order_however_the_stream_is_cut(
        counts in vec((0..4usize, any::<bool>()), 1..30),
        pieces in vec(1..9000usize, 1..20),
        free in 1..6usize,
    ) {
        let mut ends = open_ends(pieces[0]);
        let mut pieces = pieces.iter().copied().cycle();
        let mut sent = [Vec::new(), Vec::new()];
        for (id, (count, is_request)) in counts.iter().enumerate() {
            let from = usize::from(!is_request);
            let (frame, blocks) =
                if *is_request { request(id as u64, *count) } else { answer(id as u64, *count) };
            let mut waiting = Some((frame.clone(), blocks.clone()));
            while let Some((frame, blocks)) = waiting.take() {
                if let Err(refused) = ends[from].connection.send(frame, blocks) {
                    waiting = Some(refused);
                }
                // Memory comes back slowly.
                ends[1 - from].heap.free = free;
                let bytes = ends[from].outgoing(5, 0);
                ends[1 - from].incoming.extend(bytes);
                ends[1 - from].receive(pieces.next().unwrap(), 0);
            }
            sent[from].push((frame, blocks));
        }
        for _ in 0..200 {
            for (from, to) in [(0, 1), (1, 0)] {
                ends[to].heap.free = free;
                let bytes = ends[from].outgoing(5, 0);
                ends[to].incoming.extend(bytes);
                let piece = pieces.next().unwrap();
                ends[to].receive(piece, 0);
                ends[to].receive(4 * BLOCK_BYTES, 0);
            }
        }
        for at in 0..2 {
            prop_assert_eq!(&ends[at].error, &None);
            prop_assert_eq!(&ends[at].received, &sent[1 - at]);
        }
    }

    #[test]
    fn any_changed_byte_of_a_handshake_is_noticed(at in 0..1000usize, with in 1..=255u8) {
        let mut ends = ends(identity(1), identity(2), 0);
        let mut said = 0;
        let mut is_changed = false;
        for (from, to) in [(0, 1), (1, 0), (0, 1), (1, 0)] {
            let mut bytes = ends[from].outgoing(9, 0);
            if (said..said + bytes.len()).contains(&at) {
                bytes[at - said] ^= with;
                is_changed = true;
            }
            said += bytes.len();
            ends[to].incoming.extend(bytes);
            ends[to].receive(1000, 0);
            ends[to].admit(0);
        }
        prop_assert_eq!(is_changed, ends[0].error.is_some() || ends[1].error.is_some() || !ends[0].is_open);
    }

    #[test]
    fn any_bytes_are_survived(script in vec(any::<u8>(), 0..400)) {
        fuzzing::run(&script);
    }

    #[test]
    fn any_bytes_at_an_open_end_are_survived(bytes in vec(any::<u8>(), 0..3000), piece in 1..300usize) {
        let mut ends = open_ends(1000);
        ends[1].incoming.extend(bytes);
        while ends[1].error.is_none() && !ends[1].incoming.is_empty() {
            ends[1].receive(piece, 0);
        }
        prop_assert!(ends[1].received.is_empty());
    }
}
