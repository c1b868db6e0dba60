//! Cores that talk to each other over real sockets on loopback, each with a ring and memory of its own: what is asked and answered,
//! and what happens when a connection, a peer or its memory is gone.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use af_xdp::region::{Pool, Region, RegionConfig};
use cluster_map::{ClusterId, NodeId, StoreId, VolumeId};
use torus_dataplane::peers::{PeerEvent, Peers, PeersLimits, Reason, Relation, SendError};
use torus_replication::connection::handshake::{
    ClusterKey, HandshakeError, Identity, Refusal, Start, Versions,
};
use torus_replication::connection::{BLOCK_BYTES, ConnectionError, SILENCE_NS, Side, StreamError};
use torus_replication::message::{Answer, Ask, GrantAnswer, GrantRequest, Reply, Request};
use torus_replication::terms::{Epoch, Extent, Generation, Member, Site, Span, Version};
use torus_replication::wire::{BlockCrcs, Frame};
use torus_uring::{Blocks, Event, Ring, RingConfig};

#[path = "peers/proxy.rs"]
mod proxy;
use proxy::Proxy;

const CHUNKS: usize = 2048;
const LIMITS: PeersLimits = PeersLimits {
    connections_max: 12,
    strangers_max: 4,
    chunks_each: 32,
    waiting_bytes_max: 1 << 20,
    requests_leave_chunks: 256,
    answers_leave_chunks: 0,
};
/// What a core's own requests leave, and what answers do for which it takes memory.
const OWN_LEAVE_CHUNKS: usize = LIMITS.requests_leave_chunks + 64;
const ANSWERING_LEAVES_CHUNKS: usize = 64;

/// Within this I/O goes on when a peer is there again.
const RETURN_TIME: Duration = Duration::from_secs(3);

fn site(node: u8) -> Site {
    Site { node: NodeId([node; 16]), core: u16::from(node) }
}

fn identity(node: u8, start: u8) -> Identity {
    Identity {
        cluster: ClusterId([1; 16]),
        key: ClusterKey([2; 32]),
        site: site(node),
        start: Start([start; 16]),
        versions: Versions::OWN,
    }
}

/// A core.
struct Core {
    ring: Ring,
    pool: Pool,
    peers: Peers,
    events: VecDeque<PeerEvent>,
    /// Serves whoever connects, at once.
    serves: bool,
}

impl Core {
    fn new(identity: Identity, listen: SocketAddr) -> Core {
        Core::with_limits(identity, listen, LIMITS)
    }

    fn with_limits(identity: Identity, listen: SocketAddr, limits: PeersLimits) -> Core {
        let config =
            RegionConfig { cores: 1, chunks_per_core: u32::try_from(CHUNKS).unwrap(), headers_per_core: 64 };
        let region = Region::new(config).unwrap();
        let pool = region.pool(0).unwrap();
        let mut ring = Ring::new(RingConfig { requests_max: 64 }, &region, None).unwrap();
        let peers = Peers::new(identity, limits, listen, &mut ring, &pool).unwrap();
        Core { ring, pool, peers, events: VecDeque::with_capacity(4096), serves: true }
    }

    fn on_loopback(node: u8) -> Core {
        Core::new(identity(node, node), "127.0.0.1:0".parse().unwrap())
    }

    fn address(&self) -> SocketAddr {
        self.peers.address().unwrap()
    }

    fn wants(&mut self, node: u8, address: SocketAddr) {
        self.peers.set_address(site(node), Some(address));
        self.peers.connect(site(node));
    }

    /// One turn, as a reactor has them.
    fn turn(&mut self, wait: Duration) {
        self.peers.turn(&mut self.ring, &mut self.pool, now_ns());
        if wait.is_zero() {
            self.ring.submit().unwrap();
        } else {
            self.ring.submit_and_wait(wait).unwrap();
        }
        while let Some(event) = self.ring.next_event() {
            if let Event::Socket(event) = event {
                self.peers.socket_event(&mut self.ring, &mut self.pool, event, now_ns());
            }
        }
        while let Some(event) = self.peers.next_event() {
            if let PeerEvent::Accepted(site, _) = &event
                && self.serves
            {
                self.peers.serve(*site, now_ns());
            }
            self.events.push_back(event);
        }
    }

    /// Blocks with something in them, if so many chunks are left then.
    fn filled(&mut self, id: u64, count: usize, leave: usize) -> Option<(Blocks, BlockCrcs)> {
        if self.pool.free_chunks() < count + leave {
            return None;
        }
        let mut crcs = BlockCrcs::new();
        let blocks = (0..count).map(|at| {
            let mut chunk = self.pool.take_chunk().unwrap();
            let bytes = self.pool.bytes_mut(&mut chunk);
            fill(bytes, id, at);
            crcs.push(crc32c::crc32c(bytes));
            chunk
        });
        let blocks = blocks.collect();
        Some((blocks, crcs))
    }

    /// A request of so many blocks, whose answer is to have so many.
    fn ask(&mut self, to: Site, id: u64, count: usize, wanted: usize) -> Result<(), SendError> {
        let Some((blocks, crcs)) = self.filled(id, count, OWN_LEAVE_CHUNKS) else {
            return Err(SendError::Full);
        };
        let span = Span { extent: Extent(1), first: 0, count: u16::try_from(count).unwrap() };
        let ask = match count {
            0 => Ask::List { from: Extent(7) },
            _ => Ask::Write { version: Version(1), span, blocks: crcs, is_sole: false },
        };
        let frame = Frame::Request(Request {
            to: Member { store: StoreId([3; 16]), incarnation: wanted as u64 },
            volume: VolumeId([4; 16]),
            generation: Generation { takeover: 1, start: 1 },
            partition: 0,
            epoch: Epoch(1),
            id,
            stable: Version(0),
            ask,
        });
        self.send(to, frame, blocks)
    }

    /// The answer to it.
    fn answer(&mut self, to: Site, id: u64, wanted: usize) -> Result<(), SendError> {
        let Some((blocks, crcs)) = self.filled(!id, wanted, ANSWERING_LEAVES_CHUNKS) else {
            return Err(SendError::Full);
        };
        let frame = Frame::Answer(Answer {
            from: Member { store: StoreId([3; 16]), incarnation: 1 },
            volume: VolumeId([4; 16]),
            generation: Generation { takeover: 1, start: 1 },
            id,
            reply: if wanted == 0 { Reply::Done } else { Reply::Blocks(crcs) },
        });
        self.send(to, frame, blocks)
    }

    fn send(&mut self, to: Site, frame: Frame, blocks: Blocks) -> Result<(), SendError> {
        self.peers.send(to, frame, blocks).map_err(|(error, _, blocks)| {
            self.release(blocks);
            error
        })
    }

    fn release(&mut self, blocks: Blocks) {
        blocks.into_iter().for_each(|chunk| self.pool.release(chunk));
    }

    /// Whether the blocks are those that were sent under this number; they are released.
    fn verify(&mut self, id: u64, blocks: Blocks) -> usize {
        let count = blocks.len();
        let mut expected = [0; BLOCK_BYTES];
        for (at, chunk) in blocks.into_iter().enumerate() {
            fill(&mut expected, id, at);
            assert!(self.pool.region().bytes(&chunk) == expected, "block {at} of {id} is another one");
            self.pool.release(chunk);
        }
        count
    }

    fn is_connected(&self, node: u8) -> bool {
        self.peers.is_connected(Relation { site: site(node), side: Side::Connecting })
    }

    /// Ends, and has all its memory then.
    fn end(mut self) {
        self.peers.end(&mut self.ring, &mut self.pool, now_ns());
        let begin = Instant::now();
        while !self.peers.is_over() {
            assert!(begin.elapsed() < Duration::from_secs(10), "the sockets are never closed");
            self.turn(Duration::from_millis(1));
        }
        while let Some(event) = self.events.pop_front() {
            if let PeerEvent::Frame(_, _, blocks) = event {
                self.release(blocks);
            }
        }
        self.ring.withdraw_chunks(&mut self.pool);
        assert_eq!(self.pool.free_chunks(), CHUNKS, "every chunk is back");
    }
}

fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

fn fill(bytes: &mut [u8], id: u64, at: usize) {
    let seed = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at as u64;
    for (place, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(0u64..) {
        *place = (seed.rotate_left(7) ^ word << 40 ^ word).to_le_bytes();
    }
}

/// Turns of all cores until something holds.
fn until(cores: &mut [&mut Core], what: &str, mut holds: impl FnMut(&mut [&mut Core]) -> bool) {
    let begin = Instant::now();
    while !holds(cores) {
        assert!(begin.elapsed() < Duration::from_secs(60), "never: {what}");
        for core in cores.iter_mut() {
            core.turn(Duration::from_micros(100));
        }
    }
}

/// Turns of all cores for so long.
fn pass(cores: &mut [&mut Core], time: Duration) {
    let begin = Instant::now();
    until(cores, "time passes", |_| begin.elapsed() >= time);
}

/// Answers every request among the events, as soon as it can, and gives the answers that came.
fn serve(core: &mut Core, todo: &mut VecDeque<(Site, u64, usize)>) -> Vec<(Site, u64, usize)> {
    let mut answers = Vec::new();
    while let Some(event) = core.events.pop_front() {
        match event {
            PeerEvent::Frame(from, Frame::Request(request), blocks) => {
                let crcs = Frame::Request(request.clone()).block_crcs().len();
                assert_eq!(core.verify(request.id, blocks), crcs);
                todo.push_back((from, request.id, usize::try_from(request.to.incarnation).unwrap()));
            }
            PeerEvent::Frame(from, Frame::Answer(answer), blocks) => {
                answers.push((from, answer.id, core.verify(!answer.id, blocks)));
            }
            PeerEvent::Frame(..) => panic!("nobody asks for grants"),
            PeerEvent::Disconnected(relation, reason) => panic!("{relation:?} was lost: {reason}"),
            PeerEvent::Unreachable(site, reason) => panic!("{site} is out of reach: {reason}"),
            PeerEvent::Connected(..) | PeerEvent::Accepted(..) => {}
        }
    }
    while let Some((from, id, wanted)) = todo.front().copied() {
        match core.answer(from, id, wanted) {
            Ok(()) => drop(todo.pop_front()),
            Err(SendError::Full) => break,
            Err(SendError::NotConnected) => panic!("{from} is gone"),
        }
    }
    answers
}

/// Two cores of which the first asks and the second answers, connected by way of a proxy.
fn by_proxy() -> (Core, Core, Proxy) {
    let (mut one, mut two) = (Core::on_loopback(1), Core::on_loopback(2));
    let proxy = Proxy::new(two.address());
    one.wants(2, proxy.address());
    until(&mut [&mut one, &mut two], "both connect", |cores| cores[0].is_connected(2));
    one.events.clear();
    two.events.clear();
    (one, two, proxy)
}

fn reasons_lost(core: &mut Core, side: Side) -> Vec<Reason> {
    let lost = core.events.iter().filter_map(|event| match event {
        PeerEvent::Disconnected(relation, reason) if relation.side == side => Some(*reason),
        _ => None,
    });
    lost.collect()
}

/// Asks and hears the answer.
fn round(one: &mut Core, two: &mut Core, id: u64) {
    one.ask(site(2), id, 2, 3).unwrap();
    let mut todo = VecDeque::new();
    until(&mut [one, two], "an answer comes", |cores| {
        serve(cores[1], &mut todo);
        serve(cores[0], &mut VecDeque::new()) == [(site(2), id, 3)]
    });
}

#[test]
fn a_hundred_thousand_frames_of_any_size_come_whole_and_in_order_among_three_cores() {
    const EACH: u64 = 8334;
    let mut cores = [1, 2, 3].map(Core::on_loopback);
    let addresses: Vec<_> = cores.iter().map(Core::address).collect();
    for (core, own) in cores.iter_mut().zip(1u8..) {
        for other in (1u8..=3).filter(|other| *other != own) {
            core.wants(other, addresses[usize::from(other) - 1]);
        }
    }
    let mut state = 7_u64;
    let mut random = move |end: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % end
    };
    let mut size = move || match random(100) {
        0 => usize::try_from(random(120)).unwrap(),
        1..40 => 0,
        _ => usize::try_from(random(4)).unwrap(),
    };
    // By relation: what is asked next, and what the answers are to be, in order.
    let mut asked: BTreeMap<(u8, u8), u64> = BTreeMap::new();
    let mut expected: BTreeMap<(u8, u8), VecDeque<(u64, usize)>> = BTreeMap::new();
    let mut todo = [const { VecDeque::new() }; 3];
    let mut answered = 0;
    let begin = Instant::now();
    let [one, two, three] = &mut cores;
    until(&mut [one, two, three], "everything is answered", |cores| {
        for (own, core) in (1u8..).zip(cores.iter_mut()) {
            for (from, id, count) in serve(core, &mut todo[usize::from(own) - 1]) {
                let other = u8::try_from(from.core).unwrap();
                assert_eq!(expected.get_mut(&(own, other)).unwrap().pop_front(), Some((id, count)));
                answered += 1;
            }
            for other in (1u8..=3).filter(|other| *other != own) {
                let at = asked.entry((own, other)).or_default();
                let waiting = expected.entry((own, other)).or_default();
                while *at < EACH && waiting.len() < 64 && core.is_connected(other) {
                    let id = u64::from(own) << 48 | u64::from(other) << 32 | *at;
                    let (count, wanted) = (size(), size());
                    if core.ask(site(other), id, count, wanted).is_err() {
                        break;
                    }
                    waiting.push_back((id, wanted));
                    *at += 1;
                }
            }
        }
        answered == 6 * EACH
    });
    assert!(2 * answered >= 100_000);
    println!("{} frames in {:?}", 2 * answered, begin.elapsed());
    cores.into_iter().for_each(Core::end);
}

#[test]
fn grants_are_asked_for_and_given() {
    let (mut one, mut two, _proxy) = by_proxy();
    let request = GrantRequest { asked_ns: 5 };
    one.send(site(2), Frame::GrantRequest(request), Blocks::new()).unwrap();
    until(&mut [&mut one, &mut two], "the request comes", |cores| !cores[1].events.is_empty());
    let Some(PeerEvent::Frame(from, Frame::GrantRequest(came), _)) = two.events.pop_front() else {
        panic!("no request for a grant");
    };
    assert_eq!((from, came), (site(1), request));
    let generation = Generation { takeover: 2, start: 3 };
    let answer = GrantAnswer { asked_ns: 5, excluded: vec![(VolumeId([9; 16]), generation)] };
    two.send(site(1), Frame::GrantAnswer(answer.clone()), Blocks::new()).unwrap();
    until(&mut [&mut one, &mut two], "the answer comes", |cores| !cores[0].events.is_empty());
    assert!(
        matches!(one.events.pop_front(), Some(PeerEvent::Frame(_, Frame::GrantAnswer(came), _)) if came == answer)
    );
    // The accepting side has nothing to ask by this connection.
    assert_eq!(two.ask(site(1), 1, 1, 1), Err(SendError::NotConnected));
    one.end();
    two.end();
}

#[test]
fn who_does_not_take_what_comes_stops_its_peer_and_loses_nothing() {
    let (mut one, mut two, _proxy) = by_proxy();
    let mut sent = 0;
    let mut held = VecDeque::new();
    let begin = Instant::now();
    // Longer than a silent peer would live.
    while begin.elapsed() < Duration::from_nanos(SILENCE_NS + 500_000_000) {
        while one.ask(site(2), sent, 8, 0).is_ok() {
            sent += 1;
        }
        pass(&mut [&mut one, &mut two], Duration::from_millis(1));
        held.extend(two.events.drain(..).map(|event| match event {
            PeerEvent::Frame(_, Frame::Request(request), blocks) => (request.id, blocks),
            other => panic!("{other:?}"),
        }));
    }
    assert!(two.pool.free_chunks() >= LIMITS.requests_leave_chunks - 8, "requests leave some memory");
    let came = held.len() as u64;
    assert!(came >= 100 && came < sent, "{came} of {sent} have come");
    assert!(one.is_connected(2) && one.events.is_empty());
    let mut next = 0;
    until(&mut [&mut one, &mut two], "the rest comes", |cores| {
        while let Some((id, blocks)) = held.pop_front() {
            assert_eq!((id, cores[1].verify(id, blocks)), (next, 8));
            next += 1;
        }
        held.extend(cores[1].events.drain(..).map(|event| match event {
            PeerEvent::Frame(_, Frame::Request(request), blocks) => (request.id, blocks),
            other => panic!("{other:?}"),
        }));
        next == sent
    });
    one.end();
    two.end();
}

#[test]
fn another_key_another_cluster_and_another_core_are_refused_and_told() {
    let mut two = Core::on_loopback(2);
    let mut wrong_key = identity(1, 1);
    wrong_key.key = ClusterKey([9; 32]);
    let mut wrong_cluster = identity(1, 1);
    wrong_cluster.cluster = ClusterId([9; 16]);
    let refused = |refusal| HandshakeError::Refused(refusal);
    let cases = [
        (wrong_key, 2, HandshakeError::Key),
        (wrong_cluster, 2, refused(Refusal::Cluster)),
        (identity(1, 1), 3, refused(Refusal::Site(site(2)))),
        (identity(2, 1), 2, refused(Refusal::Oneself)),
    ];
    for (identity, wanted, expected) in cases {
        let mut one = Core::new(identity, "127.0.0.1:0".parse().unwrap());
        one.wants(wanted, two.address());
        until(&mut [&mut one, &mut two], "it is tried again and again", |cores| cores[0].events.len() >= 3);
        for event in one.events.drain(..) {
            let PeerEvent::Unreachable(at, reason) = event else { panic!("{event:?}") };
            let expected = Reason::Connection(ConnectionError::Handshake(expected));
            assert_eq!((at, reason), (site(wanted), expected));
        }
        assert!(two.events.is_empty(), "{:?}", two.events);
        one.end();
    }
    // And who is right is served.
    let mut one = Core::on_loopback(1);
    one.wants(2, two.address());
    until(&mut [&mut one, &mut two], "the right one connects", |cores| cores[0].is_connected(2));
    one.end();
    two.end();
}

#[test]
fn a_cut_connection_is_noticed_by_both_and_made_again() {
    let (mut one, mut two, proxy) = by_proxy();
    for id in 0..5 {
        round(&mut one, &mut two, id);
        proxy.cut();
        let begin = Instant::now();
        until(&mut [&mut one, &mut two], "both notice", |cores| {
            !reasons_lost(cores[0], Side::Connecting).is_empty()
                && !reasons_lost(cores[1], Side::Accepting).is_empty()
        });
        until(&mut [&mut one, &mut two], "it is made again", |cores| cores[0].is_connected(2));
        assert!(begin.elapsed() < RETURN_TIME, "it took {:?}", begin.elapsed());
        one.events.clear();
        two.events.clear();
    }
    one.end();
    two.end();
}

#[test]
fn a_peer_that_cannot_be_heard_is_dead_after_a_while_and_found_again() {
    let (mut one, mut two, proxy) = by_proxy();
    round(&mut one, &mut two, 1);
    proxy.stall();
    let begin = Instant::now();
    until(&mut [&mut one, &mut two], "both notice", |cores| {
        !reasons_lost(cores[0], Side::Connecting).is_empty()
            && !reasons_lost(cores[1], Side::Accepting).is_empty()
    });
    assert!(begin.elapsed() < RETURN_TIME, "it took {:?}", begin.elapsed());
    let silent = Reason::Connection(ConnectionError::Silent);
    assert_eq!(reasons_lost(&mut one, Side::Connecting)[0], silent);
    assert_eq!(reasons_lost(&mut two, Side::Accepting)[0], silent);
    pass(&mut [&mut one, &mut two], Duration::from_secs(1));
    assert!(!one.is_connected(2));
    proxy.cut();
    proxy.pass();
    let begin = Instant::now();
    until(&mut [&mut one, &mut two], "it is found again", |cores| cores[0].is_connected(2));
    assert!(begin.elapsed() < RETURN_TIME, "it took {:?}", begin.elapsed());
    one.events.clear();
    two.events.clear();
    round(&mut one, &mut two, 2);
    one.end();
    two.end();
}

#[test]
fn an_idle_connection_stays() {
    let (mut one, mut two, _proxy) = by_proxy();
    pass(&mut [&mut one, &mut two], Duration::from_nanos(2 * SILENCE_NS));
    assert!(one.events.is_empty() && two.events.is_empty());
    // And nobody has to look at it all the time.
    let begin = Instant::now();
    let mut looks = 0;
    while begin.elapsed() < Duration::from_secs(1) {
        for core in [&mut one, &mut two] {
            looks += usize::from(core.peers.deadline_ns() <= now_ns());
            core.turn(Duration::from_millis(1));
        }
    }
    assert!((4..100).contains(&looks), "{looks} times in a second");
    round(&mut one, &mut two, 1);
    one.end();
    two.end();
}

#[test]
fn who_has_slept_calls_nobody_silent() {
    let (mut one, mut two, _proxy) = by_proxy();
    for id in 0..2 {
        std::thread::sleep(Duration::from_nanos(SILENCE_NS + 200_000_000));
        round(&mut one, &mut two, id);
    }
    assert!(one.events.is_empty() && two.events.is_empty());
    one.end();
    two.end();
}

#[test]
fn a_peer_that_was_started_anew_is_found_and_known_for_another_start() {
    let (mut one, mut two) = (Core::on_loopback(1), Core::on_loopback(2));
    let address = two.address();
    one.wants(2, address);
    two.wants(1, one.address());
    until(&mut [&mut one, &mut two], "both connect", |cores| {
        cores[0].is_connected(2) && cores[1].is_connected(1)
    });
    for start in 10..13 {
        // Killed: nobody says goodbye but the system.
        drop(two);
        one.events.clear();
        pass(&mut [&mut one], Duration::from_millis(700));
        let mut lost = reasons_lost(&mut one, Side::Connecting);
        lost.extend(reasons_lost(&mut one, Side::Accepting));
        assert_eq!(lost.len(), 2, "both relations are lost: {lost:?}");
        two = Core::new(identity(2, start), address);
        two.wants(1, one.address());
        let begin = Instant::now();
        until(&mut [&mut one, &mut two], "both connect again", |cores| {
            cores[0].is_connected(2) && cores[1].is_connected(1)
        });
        assert!(begin.elapsed() < RETURN_TIME, "it took {:?}", begin.elapsed());
        let starts = one.events.drain(..).filter_map(|event| match event {
            PeerEvent::Connected(_, peer) | PeerEvent::Accepted(_, peer) => Some(peer.start),
            _ => None,
        });
        assert_eq!(starts.collect::<Vec<_>>(), [Start([start; 16]); 2]);
        two.events.clear();
        round(&mut one, &mut two, u64::from(start));
    }
    one.end();
    two.end();
}

#[test]
fn a_byte_that_changed_on_its_way_ends_the_connection_and_reaches_nobody() {
    let (mut one, mut two, proxy) = by_proxy();
    for id in 0..20 {
        let at = usize::try_from(id * 997 % 8192).unwrap();
        proxy.change_byte(at);
        one.ask(site(2), id, 2, 0).unwrap();
        until(&mut [&mut one, &mut two], "it is noticed", |cores| !cores[1].events.is_empty());
        let came = two.events.iter().any(|event| matches!(event, PeerEvent::Frame(..)));
        assert!(!came, "a changed frame has come");
        let reasons = reasons_lost(&mut two, Side::Accepting);
        assert!(
            matches!(
                reasons[..],
                [Reason::Connection(ConnectionError::Stream(
                    StreamError::Block { .. } | StreamError::Frame(_)
                ))]
            ),
            "{reasons:?}"
        );
        until(&mut [&mut one, &mut two], "it is made again", |cores| {
            !reasons_lost(cores[0], Side::Connecting).is_empty() && cores[0].is_connected(2)
        });
        one.events.clear();
        two.events.clear();
    }
    round(&mut one, &mut two, 100);
    one.end();
    two.end();
}

#[test]
fn a_new_connection_takes_an_old_ones_place_and_is_served_when_that_has_ended() {
    let (mut one, mut two, proxy) = by_proxy();
    one.ask(site(2), 1, 1, 0).unwrap();
    until(&mut [&mut one, &mut two], "a request comes", |cores| !cores[1].events.is_empty());
    let Some(PeerEvent::Frame(_, _, blocks)) = two.events.pop_front() else { panic!("no frame") };
    // What goes by the old one is lost, and the asking side knows; the other does not.
    two.serves = false;
    proxy.stall();
    one.peers.cut(&mut one.ring, &mut one.pool, Relation { site: site(2), side: Side::Connecting }, now_ns());
    proxy.pass_new();
    until(&mut [&mut one, &mut two], "it connects anew", |cores| {
        cores[1].events.iter().any(|event| matches!(event, PeerEvent::Accepted(..)))
    });
    assert_eq!(reasons_lost(&mut two, Side::Accepting), [Reason::Replaced]);
    assert_eq!(two.peers.unserved().collect::<Vec<_>>(), [site(1)]);
    pass(&mut [&mut one, &mut two], Duration::from_millis(300));
    assert!(!one.is_connected(2), "it is not served yet");
    assert_eq!(one.ask(site(2), 2, 1, 0), Err(SendError::NotConnected));
    // What the old one brought has ended.
    two.release(blocks);
    two.events.clear();
    one.events.clear();
    two.peers.serve(site(1), now_ns());
    until(&mut [&mut one, &mut two], "it is served", |cores| cores[0].is_connected(2));
    assert_eq!(two.peers.unserved().count(), 0);
    one.events.clear();
    round(&mut one, &mut two, 3);
    one.end();
    two.end();
}

#[test]
fn who_is_never_served_comes_again() {
    let (mut one, mut two) = (Core::on_loopback(1), Core::on_loopback(2));
    two.serves = false;
    one.wants(2, two.address());
    until(&mut [&mut one, &mut two], "it comes again", |cores| {
        cores[1].events.iter().filter(|event| matches!(event, PeerEvent::Accepted(..))).count() == 3
    });
    let late = Reason::Connection(ConnectionError::Handshake(HandshakeError::Late));
    assert!(
        one.events.iter().all(|event| matches!(event, PeerEvent::Unreachable(_, reason) if *reason == late))
    );
    two.serves = true;
    until(&mut [&mut one, &mut two], "it is served", |cores| cores[0].is_connected(2));
    one.end();
    two.end();
}

#[test]
fn strangers_are_sent_away_and_keep_nobody_out() {
    let mut two = Core::on_loopback(2);
    let address = two.address();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 500], &[0xff; 3]] {
        let mut stranger = TcpStream::connect(address).unwrap();
        stranger.write_all(bytes).unwrap();
        stranger.set_nonblocking(true).unwrap();
        until(
            &mut [&mut two],
            "it is sent away",
            |_| !matches!(stranger.read(&mut [0; 64]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
        );
    }
    // Some that say nothing: more than there may be.
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
    pass(&mut [&mut two], Duration::from_millis(100));
    let mut one = Core::on_loopback(1);
    one.wants(2, address);
    until(&mut [&mut one, &mut two], "it connects when they are gone", |cores| cores[0].is_connected(2));
    drop(silent);
    assert!(two.events.iter().all(|event| matches!(event, PeerEvent::Accepted(..))));
    one.end();
    two.end();
}

#[test]
fn who_is_not_wanted_any_more_is_let_go_and_found_again_when_wanted() {
    let (mut one, mut two) = (Core::on_loopback(1), Core::on_loopback(2));
    // Wanted before anybody knows where it is.
    one.peers.connect(site(2));
    pass(&mut [&mut one, &mut two], Duration::from_millis(50));
    assert!(one.events.is_empty() && two.events.is_empty());
    one.peers.set_address(site(2), Some(two.address()));
    until(&mut [&mut one, &mut two], "they connect", |cores| cores[0].is_connected(2));
    one.peers.disconnect(&mut one.ring, &mut one.pool, site(2), now_ns());
    until(&mut [&mut one, &mut two], "both hear of it", |cores| {
        reasons_lost(cores[0], Side::Connecting) == [Reason::Unwanted]
            && reasons_lost(cores[1], Side::Accepting) == [Reason::Closed]
    });
    one.events.clear();
    pass(&mut [&mut one, &mut two], Duration::from_millis(1500));
    assert!(one.events.is_empty(), "nobody dials: {:?}", one.events);
    one.peers.set_address(site(2), None);
    one.wants(2, two.address());
    until(&mut [&mut one, &mut two], "they connect again", |cores| cores[0].is_connected(2));
    one.events.clear();
    two.events.clear();
    round(&mut one, &mut two, 1);
    one.end();
    two.end();
}

#[test]
fn what_waits_to_be_sent_when_a_connection_is_lost_is_given_back() {
    let (mut one, mut two, proxy) = by_proxy();
    proxy.stall();
    let mut id = 0;
    // The kernel takes some, the proxy none; nobody says so but the queue.
    let mut refused = 0;
    while refused < 20 {
        match one.ask(site(2), id, 8, 0) {
            Ok(()) => id += 1,
            Err(error) => {
                assert_eq!(error, SendError::Full);
                refused += 1;
                pass(&mut [&mut one, &mut two], Duration::from_millis(2));
            }
        }
    }
    assert!(one.pool.free_chunks() < CHUNKS - LIMITS.waiting_bytes_max / BLOCK_BYTES / 2);
    one.peers.disconnect(&mut one.ring, &mut one.pool, site(2), now_ns());
    until(&mut [&mut one, &mut two], "its memory is free", |cores| {
        let lent = usize::from(LIMITS.chunks_each);
        cores[0].pool.free_chunks() == CHUNKS - lent
    });
    one.end();
    two.end();
}

#[test]
fn two_cores_with_little_memory_that_flood_each_other_get_their_answers() {
    const EACH: u64 = 3000;
    let (mut one, mut two) = (Core::on_loopback(1), Core::on_loopback(2));
    one.wants(2, two.address());
    two.wants(1, one.address());
    until(&mut [&mut one, &mut two], "both connect", |cores| {
        cores[0].is_connected(2) && cores[1].is_connected(1)
    });
    // A few chunks more than have to be left.
    let mut held = [&mut one, &mut two].map(|core| {
        let count = core.pool.free_chunks() - OWN_LEAVE_CHUNKS - 40;
        (0..count).map(|_| core.pool.take_chunk().unwrap()).collect::<Vec<_>>()
    });
    let mut asked = [0; 2];
    let mut answered = [0; 2];
    let mut todo = [const { VecDeque::new() }; 2];
    until(&mut [&mut one, &mut two], "everything is answered", |cores| {
        for (at, other) in [(0, 2), (1, 1)] {
            while asked[at] < EACH && cores[at].ask(site(other), asked[at], 12, 12).is_ok() {
                asked[at] += 1;
            }
            for (_, id, count) in serve(cores[at], &mut todo[at]) {
                assert_eq!((id, count), (answered[at], 12));
                answered[at] += 1;
            }
        }
        answered == [EACH; 2]
    });
    for (core, held) in [&mut one, &mut two].into_iter().zip(&mut held) {
        held.drain(..).for_each(|chunk| core.pool.release(chunk));
    }
    one.end();
    two.end();
}

#[test]
fn chunks_of_other_cores_are_sent_and_handed_back() {
    let config = RegionConfig { cores: 2, chunks_per_core: 128, headers_per_core: 64 };
    let region = Region::new(config).unwrap();
    let (pool, mut other_pool) = (region.pool(0).unwrap(), region.pool(1).unwrap());
    let mut ring = Ring::new(RingConfig { requests_max: 64 }, &region, None).unwrap();
    let listen = "127.0.0.1:0".parse().unwrap();
    let limits = PeersLimits { requests_leave_chunks: 0, ..LIMITS };
    let peers = Peers::new(identity(1, 1), limits, listen, &mut ring, &pool).unwrap();
    let mut one = Core { ring, pool, peers, events: VecDeque::new(), serves: true };
    let mut two = Core::on_loopback(2);
    one.wants(2, two.address());
    until(&mut [&mut one, &mut two], "they connect", |cores| cores[0].is_connected(2));
    two.events.clear();
    let mut chunk = other_pool.take_chunk().unwrap();
    fill(other_pool.bytes_mut(&mut chunk), 5, 0);
    let crc = crc32c::crc32c(region.bytes(&chunk));
    let frame = Frame::Request(Request {
        to: Member::default(),
        volume: VolumeId::default(),
        generation: Generation::default(),
        partition: 0,
        epoch: Epoch(1),
        id: 5,
        stable: Version(0),
        ask: Ask::Write {
            version: Version(1),
            span: Span { extent: Extent(0), first: 0, count: 1 },
            blocks: [crc].into_iter().collect(),
            is_sole: false,
        },
    });
    one.peers.send(site(2), frame, [chunk].into_iter().collect()).unwrap();
    until(&mut [&mut one, &mut two], "it comes", |cores| !cores[1].events.is_empty());
    let Some(PeerEvent::Frame(_, _, blocks)) = two.events.pop_front() else { panic!("no frame") };
    assert_eq!(two.verify(5, blocks), 1);
    let mut home = 0;
    until(&mut [&mut one, &mut two], "the chunk is handed back", |cores| {
        home += cores[0].peers.take_foreign().map(|chunk| other_pool.release(chunk)).count();
        home == 1
    });
    assert_eq!(other_pool.free_chunks(), 128);
    two.end();
}

#[test]
fn frames_of_up_to_three_blocks_allocate_nothing_once_warm() {
    let (mut one, mut two) = (Core::on_loopback(1), Core::on_loopback(2));
    one.wants(2, two.address());
    until(&mut [&mut one, &mut two], "both connect", |cores| cores[0].is_connected(2));
    one.events.clear();
    two.events.clear();
    let mut id = 0;
    let mut exchange = |one: &mut Core, two: &mut Core| {
        for count in 0..4 {
            one.ask(site(2), id + count, usize::try_from(count).unwrap(), 0).unwrap();
        }
        let (mut came, mut answered) = (0, 0);
        while answered < 4 {
            one.turn(Duration::ZERO);
            two.turn(Duration::ZERO);
            while let Some(event) = two.events.pop_front() {
                let PeerEvent::Frame(_, Frame::Request(request), blocks) = event else { panic!("{event:?}") };
                assert_eq!(request.id, id + came);
                two.verify(request.id, blocks);
                two.answer(site(1), request.id, usize::try_from(came).unwrap()).unwrap();
                came += 1;
            }
            while let Some(event) = one.events.pop_front() {
                let PeerEvent::Frame(_, Frame::Answer(answer), blocks) = event else { panic!("{event:?}") };
                assert_eq!(one.verify(!answer.id, blocks) as u64, answered);
                answered += 1;
            }
        }
        id += 4;
    };
    for _ in 0..200 {
        exchange(&mut one, &mut two);
    }
    let counted = allocation_counter::measure(|| {
        for _ in 0..500 {
            exchange(&mut one, &mut two);
        }
    });
    assert_eq!(counted.count_total, 0);
    one.end();
    two.end();
}
