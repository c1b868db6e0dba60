//! The ring's sockets, against each other and against those of the standard library, over loopback.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use af_xdp::region::{Pool, Region, RegionConfig};
use torus_uring::{
    BLOCK_BYTES, Event, IoError, Message, Ring, RingConfig, SocketEvent, SocketId, SocketsConfig,
};

const CHUNKS: u32 = 256;
const CHUNKS_EACH: u16 = 8;

struct Bench {
    ring: Ring,
    pool: Pool,
    events: VecDeque<SocketEvent>,
}

impl Bench {
    fn new() -> Bench {
        let config = RegionConfig { cores: 1, chunks_per_core: CHUNKS, headers_per_core: 64 };
        let region = Region::new(config).unwrap();
        let mut ring = Ring::new(RingConfig { requests_max: 64 }, &region, None).unwrap();
        ring.prepare_sockets(SocketsConfig { sockets_max: 8, chunks_each: CHUNKS_EACH });
        Bench { ring, pool: region.pool(0).unwrap(), events: VecDeque::with_capacity(64) }
    }

    /// Gathers what has happened within a moment.
    fn gather(&mut self, wait: Duration) {
        self.ring.submit_and_wait(wait).unwrap();
        while let Some(event) = self.ring.next_event() {
            if let Event::Socket(event) = event {
                self.events.push_back(event);
            }
        }
    }

    fn next(&mut self) -> SocketEvent {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            assert!(Instant::now() < deadline, "nothing happened");
            self.gather(Duration::from_millis(100));
        }
    }

    fn quiet(&mut self) {
        self.gather(Duration::from_millis(50));
        assert!(self.events.is_empty(), "{:?}", self.events);
    }

    /// A socket of the ring and one of the standard library, connected.
    fn pair(&mut self) -> (SocketId, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (file, _) = listener.accept().unwrap();
        (self.ring.add_socket(OwnedFd::from(file)).unwrap(), other)
    }

    fn message(&mut self, id: u8, blocks: u8) -> (Message, Vec<u8>) {
        let mut message = Message::default();
        let mut bytes = Vec::new();
        for block in 0..blocks {
            let head = [id, block, 7];
            message.push_bytes(&head[..1]);
            message.push_bytes(&head[1..]);
            bytes.extend_from_slice(&head);
            let mut chunk = self.pool.take_chunk().unwrap();
            self.pool.bytes_mut(&mut chunk).fill(id ^ block << 4);
            bytes.extend_from_slice(self.pool.region().bytes(&chunk));
            message.push_chunk(chunk);
        }
        message.push_bytes(&[id]);
        bytes.push(id);
        assert_eq!(message.len_bytes(), bytes.len());
        (message, bytes)
    }

    fn release(&mut self, mut message: Message) {
        message.take_chunks().for_each(|chunk| self.pool.release(chunk));
        assert!(message.is_empty());
    }

    fn close(&mut self, id: SocketId) {
        self.ring.close(id);
        loop {
            match self.next() {
                SocketEvent::Closed(closed) if closed == id => return,
                SocketEvent::Sent(_, message, _) => self.release(message),
                SocketEvent::Received(_, chunk, _) => self.pool.release(chunk),
                _ => {}
            }
        }
    }

    /// Every chunk is back.
    fn all_are_free(&mut self) {
        self.ring.withdraw_chunks(&mut self.pool);
        assert_eq!(self.pool.free_chunks(), CHUNKS as usize);
    }
}

fn socket(to: SocketAddr) -> OwnedFd {
    // SAFETY: no memory is named.
    let raw = unsafe {
        let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0)
    };
    assert!(raw >= 0);
    // SAFETY: a descriptor that was made a moment ago.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) }
}

#[test]
fn what_is_sent_is_received_in_order_over_both_families() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(address) else {
            assert!(address.starts_with('['), "a machine has IPv4");
            continue;
        };
        let address = listener.local_addr().unwrap();
        let mut bench = Bench::new();
        let listening = bench.ring.add_socket(OwnedFd::from(listener)).unwrap();
        bench.ring.accept(listening);
        let mut ends = Vec::new();
        for _ in 0..2 {
            let connecting = bench.ring.add_socket(socket(address)).unwrap();
            bench.ring.connect(connecting, address);
            let (mut accepted, mut connected) = (None, false);
            while accepted.is_none() || !connected {
                match bench.next() {
                    SocketEvent::Accepted(id, file) if id == listening => accepted = Some(file),
                    SocketEvent::Connected(id, Ok(())) if id == connecting => connected = true,
                    other => panic!("{other:?}"),
                }
            }
            let accepting = bench.ring.add_socket(accepted.unwrap()).unwrap();
            ends.push((connecting, accepting));
        }
        for (from, to) in ends.iter().flat_map(|(one, other)| [(*one, *other), (*other, *one)]) {
            bench.ring.receive(to, &mut bench.pool).unwrap();
            let mut received = Vec::new();
            let mut expected = Vec::new();
            for id in 0..5 {
                let (message, bytes) = bench.message(id, id * 3);
                expected.extend_from_slice(&bytes);
                bench.ring.send(from, message).unwrap();
                let mut was_sent = false;
                while received.len() < expected.len() || !was_sent {
                    match bench.next() {
                        SocketEvent::Received(at, chunk, len) if at == to => {
                            received.extend_from_slice(&bench.pool.region().bytes(&chunk)[..len]);
                            bench.ring.give_back(&bench.pool, to, chunk).unwrap();
                        }
                        SocketEvent::Sent(at, message, Ok(())) if at == from => {
                            bench.release(message);
                            was_sent = true;
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
            assert!(received == expected);
        }
        for (one, other) in ends {
            bench.close(one);
            bench.close(other);
        }
        bench.close(listening);
        bench.all_are_free();
    }
}

#[test]
fn a_socket_whose_data_are_not_taken_stops_its_sender_and_no_other() {
    let mut bench = Bench::new();
    let (slow, mut to_slow) = bench.pair();
    let none = std::iter::from_fn(|| bench.pool.take_chunk()).collect::<Vec<_>>();
    assert_eq!(
        bench.ring.receive(slow, &mut bench.pool).unwrap(),
        usize::from(CHUNKS_EACH),
        "no chunk is free"
    );
    none.into_iter().for_each(|chunk| bench.pool.release(chunk));
    let (fast, mut to_fast) = bench.pair();
    assert_eq!(bench.ring.receive(slow, &mut bench.pool).unwrap(), 0);
    bench.ring.receive(fast, &mut bench.pool).unwrap();
    let sender = std::thread::spawn(move || {
        let bytes: Vec<u8> = (0..16 << 20).map(|at: u32| u8::try_from(at / 977 % 251).unwrap()).collect();
        to_slow.write_all(&bytes).unwrap();
        bytes
    });
    let mut held = VecDeque::new();
    while held.len() < usize::from(CHUNKS_EACH) {
        match bench.next() {
            SocketEvent::Received(id, chunk, len) if id == slow => held.push_back((chunk, len)),
            other => panic!("{other:?}"),
        }
    }
    bench.quiet();
    assert!(!sender.is_finished(), "16 MiB are more than the kernel buffers");
    to_fast.write_all(b"through").unwrap();
    match bench.next() {
        SocketEvent::Received(id, chunk, 7) if id == fast => bench.pool.release(chunk),
        other => panic!("{other:?}"),
    }
    // And goes on where it was.
    let mut received = Vec::new();
    while received.len() < 16 << 20 {
        while let Some((chunk, len)) = held.pop_front() {
            received.extend_from_slice(&bench.pool.region().bytes(&chunk)[..len]);
            bench.ring.give_back(&bench.pool, slow, chunk).unwrap();
        }
        match bench.next() {
            SocketEvent::Received(id, chunk, len) if id == slow => held.push_back((chunk, len)),
            SocketEvent::Ended(id, Ok(())) if id == slow => break,
            other => panic!("{other:?}"),
        }
    }
    held.into_iter().for_each(|(chunk, len)| {
        received.extend_from_slice(&bench.pool.region().bytes(&chunk)[..len]);
        bench.pool.release(chunk);
    });
    assert!(received == sender.join().unwrap());
    bench.close(slow);
    bench.close(fast);
    bench.all_are_free();
}

#[test]
fn the_end_of_the_other_side_is_told() {
    let mut bench = Bench::new();
    let (id, mut other) = bench.pair();
    bench.ring.receive(id, &mut bench.pool).unwrap();
    other.write_all(b"last words").unwrap();
    drop(other);
    match bench.next() {
        SocketEvent::Received(_, chunk, 10) => bench.ring.give_back(&bench.pool, id, chunk).unwrap(),
        other => panic!("{other:?}"),
    }
    assert!(matches!(bench.next(), SocketEvent::Ended(at, Ok(())) if at == id));
    // A reset is an error.
    let (id, other) = bench.pair();
    bench.ring.receive(id, &mut bench.pool).unwrap();
    bench.quiet();
    let (message, _) = bench.message(1, 1);
    bench.ring.send(id, message).unwrap();
    match bench.next() {
        SocketEvent::Sent(_, message, Ok(())) => bench.release(message),
        other => panic!("{other:?}"),
    }
    // Closed with data that nobody has read.
    drop(other);
    let reset = IoError::Errno(libc::ECONNRESET);
    match bench.next() {
        SocketEvent::Ended(at, Err(error)) => assert_eq!((at, error), (id, reset)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_message_on_its_way_comes_back_when_the_socket_is_closed() {
    let mut bench = Bench::new();
    let (id, mut other) = bench.pair();
    let mut sent = 0;
    // Until the kernel takes no more.
    let stuck = loop {
        let (message, _) = bench.message(1, 12);
        bench.ring.send(id, message).unwrap();
        bench.gather(Duration::from_millis(100));
        match bench.events.pop_front() {
            Some(SocketEvent::Sent(_, message, Ok(()))) => bench.release(message),
            None => break sent,
            other => panic!("{other:?}"),
        }
        sent += 1;
        assert!(sent < 10_000, "the kernel buffers without end");
    };
    assert!(stuck > 0);
    let (second, _) = bench.message(2, 1);
    let second = bench.ring.send(id, second).unwrap_err();
    bench.release(second);
    bench.ring.close(id);
    match bench.next() {
        SocketEvent::Sent(at, message, Err(_)) if at == id => bench.release(message),
        other => panic!("{other:?}"),
    }
    assert!(matches!(bench.next(), SocketEvent::Closed(at) if at == id));
    bench.all_are_free();
    // The other side sees the end behind what was sent.
    let mut bytes = Vec::new();
    let _may_be_reset = other.read_to_end(&mut bytes);
    let (message, _) = bench.message(3, 1);
    let message = bench.ring.send(id, message).unwrap_err();
    bench.release(message);
}

#[test]
fn a_place_is_free_when_its_socket_is_told_to_be_gone_and_not_before() {
    let mut bench = Bench::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let listening = bench.ring.add_socket(OwnedFd::from(listener)).unwrap();
    bench.ring.accept(listening);
    let pairs: Vec<_> = (0..7).map(|_| bench.pair()).collect();
    for (id, _) in &pairs {
        bench.ring.receive(*id, &mut bench.pool).unwrap();
    }
    bench.quiet();
    // Their completions come one behind the other, and somebody connects among them.
    let mut gone: Vec<_> = pairs.iter().map(|(id, _)| *id).collect();
    gone.iter().for_each(|id| bench.ring.close(*id));
    let _somebody = TcpStream::connect(address).unwrap();
    let mut new = Vec::new();
    let mut accepted = 0;
    while !gone.is_empty() || accepted == 0 {
        bench.ring.submit_and_wait(Duration::from_millis(100)).unwrap();
        while let Some(event) = bench.ring.next_event() {
            match event {
                Event::Socket(SocketEvent::Closed(at)) => gone.retain(|id| *id != at),
                Event::Socket(SocketEvent::Accepted(..)) => accepted += 1,
                other => panic!("{other:?}"),
            }
            // Whatever is told: who takes a place takes none that somebody else is known by.
            while let Ok(id) = bench.ring.add_socket(socket(address)) {
                assert!(gone.iter().all(|gone| gone.index() != id.index()), "a place is taken twice");
                new.push(id);
            }
        }
    }
    assert_eq!(new.len(), 7);
    new.into_iter().for_each(|id| bench.close(id));
    bench.close(listening);
    bench.all_are_free();
}

#[test]
fn a_finished_side_still_receives() {
    let mut bench = Bench::new();
    let (id, mut other) = bench.pair();
    bench.ring.receive(id, &mut bench.pool).unwrap();
    bench.ring.finish_sending(id);
    bench.gather(Duration::from_millis(10));
    let mut bytes = Vec::new();
    other.read_to_end(&mut bytes).unwrap();
    assert!(bytes.is_empty());
    other.write_all(b"answer").unwrap();
    match bench.next() {
        SocketEvent::Received(at, chunk, 6) if at == id => bench.pool.release(chunk),
        other => panic!("{other:?}"),
    }
}

#[test]
fn nobody_there_is_an_error_and_a_wait_for_somebody_can_be_given_up() {
    let mut bench = Bench::new();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let id = bench.ring.add_socket(socket(address)).unwrap();
    bench.ring.connect(id, address);
    let refused = IoError::Errno(libc::ECONNREFUSED);
    assert!(matches!(bench.next(), SocketEvent::Connected(at, Err(error)) if at == id && error == refused));
    bench.close(id);
    // A listener that accepts nobody, its queue full: the rest wait.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // SAFETY: an open descriptor, and no memory.
    assert_eq!(unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) }, 0);
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let id = bench.ring.add_socket(socket(address)).unwrap();
        bench.ring.connect(id, address);
        waiting.push(id);
    }
    bench.gather(Duration::from_millis(200));
    let connected = bench.events.drain(..).count();
    assert!(connected < 4, "some wait");
    for id in waiting {
        bench.close(id);
    }
    bench.all_are_free();
}

#[test]
fn places_are_used_again_and_names_of_gone_sockets_mean_nothing() {
    let mut bench = Bench::new();
    let mut former = None;
    for _ in 0..40 {
        let (id, mut other) = bench.pair();
        bench.ring.receive(id, &mut bench.pool).unwrap();
        if let Some(former) = former {
            assert_ne!(former, id);
            // Does nothing to the one in its place.
            bench.ring.close(former);
            bench.ring.finish_sending(former);
            let chunk = bench.pool.take_chunk().unwrap();
            let chunk = bench.ring.give_back(&bench.pool, former, chunk).unwrap_err();
            bench.pool.release(chunk);
        }
        other.write_all(b"x").unwrap();
        match bench.next() {
            // Given back to nobody.
            SocketEvent::Received(at, chunk, 1) if at == id => bench.pool.release(chunk),
            other => panic!("{other:?}"),
        }
        bench.close(id);
        former = Some(id);
    }
    let files = (0..8).map(|_| bench.pair()).collect::<Vec<_>>();
    assert!(bench.ring.add_socket(socket("127.0.0.1:1".parse().unwrap())).is_err(), "eight are all");
    for (id, _) in files {
        bench.close(id);
    }
    bench.all_are_free();
}

#[test]
fn a_ring_ends_with_everything_in_flight() {
    let mut bench = Bench::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let listening = bench.ring.add_socket(OwnedFd::from(listener)).unwrap();
    bench.ring.accept(listening);
    let mut others = Vec::new();
    for _ in 0..3 {
        let (id, other) = bench.pair();
        bench.ring.receive(id, &mut bench.pool).unwrap();
        others.push(other);
    }
    bench.quiet();
    let begin = Instant::now();
    drop(bench.ring);
    assert!(begin.elapsed() < Duration::from_secs(5), "it waits for nobody outside");
    for mut other in others {
        assert_eq!(other.read(&mut [0; 8]).unwrap_or(0), 0, "its sockets are closed");
    }
}

#[test]
fn a_message_back_and_forth_allocates_nothing_once_warm() {
    let mut bench = Bench::new();
    let (id, other) = bench.pair();
    let other = bench.ring.add_socket(OwnedFd::from(other)).unwrap();
    bench.ring.receive(other, &mut bench.pool).unwrap();
    let mut message = Some(Message::default());
    let round = |bench: &mut Bench, message: &mut Option<Message>| {
        let mut out = message.take().unwrap();
        out.push_bytes(&[7; 100]);
        out.push_chunk(bench.pool.take_chunk().unwrap());
        bench.ring.send(id, out).unwrap();
        let mut left = 100 + BLOCK_BYTES;
        while left > 0 || message.is_none() {
            match bench.next() {
                SocketEvent::Received(_, chunk, len) => {
                    left -= len;
                    bench.ring.give_back(&bench.pool, other, chunk).unwrap();
                }
                SocketEvent::Sent(_, mut sent, Ok(())) => {
                    sent.take_chunks().for_each(|chunk| bench.pool.release(chunk));
                    *message = Some(sent);
                }
                other => panic!("{other:?}"),
            }
        }
    };
    for _ in 0..10 {
        round(&mut bench, &mut message);
    }
    let counted = allocation_counter::measure(|| {
        for _ in 0..1000 {
            round(&mut bench, &mut message);
        }
    });
    assert_eq!(counted.count_total, 0);
}
