//! Two ends of a connection and what lies between them, driven by bytes: what is said, how it is cut into pieces, what changes on
//! its way, what is put in between, when memory is short, how time goes. Built for tests and for the targets in `fuzz/` only.
//!
//! What must hold whatever the bytes say: nothing panics; no frame comes before the end is open; memory is bounded; and as long as
//! nothing was changed, what comes is what was sent, in order, and no end fails but by time.
//!
//! A step is a byte: what is done (its lowest three bits), and whose turn it is (the highest); the bytes behind it say how much.

use std::collections::VecDeque;

use cluster_map::{ClusterId, NodeId, StoreId, VolumeId};

use super::handshake::{ClusterKey, Identity, Nonce, Start, Versions};
use super::{BLOCK_BYTES, Connection, ConnectionError, Destination, HandshakeError, Outgoing, Received};
use crate::message::{Answer, Ask, Reply, Request};
use crate::terms::{Epoch, Extent, Generation, Member, Site, Span, Version};
use crate::wire::{BlockCrcs, Frame};

/// A block on the heap.
pub type Block = Box<[u8]>;

/// Memory for blocks, counted.
#[derive(Debug)]
pub struct Heap {
    /// Blocks that may still be taken.
    pub free: usize,
}

impl Destination for Heap {
    type Blocks = Vec<Block>;

    fn add(&mut self, blocks: &mut Vec<Block>) -> bool {
        let is_free = self.free > 0;
        if is_free {
            self.free -= 1;
            blocks.push(vec![0xee; BLOCK_BYTES].into());
        }
        is_free
    }

    fn copy(&mut self, blocks: &mut Vec<Block>, at: usize, bytes: &[u8], crc: u32) -> u32 {
        let block = blocks.last_mut().expect("a block was added");
        block[at..at + bytes.len()].copy_from_slice(bytes);
        crc32c::crc32c_append(crc, bytes)
    }

    fn release(&mut self, blocks: Vec<Block>) {
        self.free += blocks.len();
    }
}

/// What is sent at once: up to so many pieces.
#[derive(Debug)]
pub struct Pieces {
    /// The bytes of all of them.
    pub bytes: Vec<u8>,
    /// How many there may still be.
    pub room: usize,
}

impl Outgoing<Vec<Block>> for Pieces {
    fn room(&self) -> usize {
        self.room
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.room -= 1;
    }

    fn blocks(&mut self, blocks: Vec<Block>) {
        self.room -= blocks.len();
        blocks.iter().for_each(|block| self.bytes.extend_from_slice(block));
    }
}

/// One end, and what is on its way to it.
#[derive(Debug)]
pub struct End {
    /// Who it is.
    pub identity: Identity,
    /// Its connection.
    pub connection: Connection<Vec<Block>>,
    /// Its memory.
    pub heap: Heap,
    /// Bytes that the other end has sent.
    pub incoming: VecDeque<u8>,
    /// What has come, the blocks with it.
    pub received: Vec<(Frame, Vec<Block>)>,
    /// It is open.
    pub is_open: bool,
    /// It is to admit the other end.
    pub is_asked: bool,
    /// Why it ended.
    pub error: Option<ConnectionError>,
}

/// Bytes that may wait at an end.
pub const WAITING_BYTES_MAX: usize = 64 << 10;

impl End {
    /// An end of the given identity.
    #[must_use]
    pub fn new(identity: Identity, connection: Connection<Vec<Block>>) -> End {
        End {
            identity,
            connection,
            heap: Heap { free: 64 },
            incoming: VecDeque::new(),
            received: Vec::new(),
            is_open: false,
            is_asked: false,
            error: None,
        }
    }

    /// What it has to send now.
    pub fn outgoing(&mut self, pieces: usize, now_ns: u64) -> Vec<u8> {
        let mut out = Pieces { bytes: Vec::new(), room: pieces };
        self.connection.fill(&mut out, now_ns);
        out.bytes
    }

    /// Takes up to so many of the bytes that are there.
    ///
    /// # Panics
    /// If it does what it must not.
    pub fn receive(&mut self, count: usize, now_ns: u64) {
        let count = count.min(self.incoming.len());
        let bytes: Vec<u8> = self.incoming.iter().take(count).copied().collect();
        let mut at = 0;
        while self.error.is_none() {
            match self.connection.receive(&self.identity, &bytes[at..], &mut self.heap, now_ns) {
                Ok((taken, received)) => {
                    at += taken;
                    match received {
                        None => break,
                        Some(Received::Proved(_)) => self.is_asked = true,
                        Some(Received::Open(_)) => self.is_open = true,
                        Some(Received::Frame(frame, blocks)) => {
                            assert!(self.is_open, "no frame before the end is open");
                            assert_eq!(frame.block_crcs().len(), blocks.len(), "every block is there");
                            self.received.push((frame, blocks));
                        }
                    }
                }
                Err(error) => self.error = Some(error),
            }
        }
        assert!(at <= bytes.len());
        if self.error.is_some() {
            at = bytes.len();
        }
        self.incoming.drain(..at);
    }

    /// Admits the other end if that is asked for.
    pub fn admit(&mut self, now_ns: u64) {
        if std::mem::take(&mut self.is_asked) && self.connection.admit(now_ns).is_some() {
            self.is_open = true;
        }
    }
}

/// An identity in one cluster.
#[must_use]
pub fn identity(node: u8) -> Identity {
    Identity {
        cluster: ClusterId([1; 16]),
        key: ClusterKey([2; 32]),
        site: Site { node: NodeId([node; 16]), core: u16::from(node) },
        start: Start([node; 16]),
        versions: Versions::OWN,
    }
}

/// Both ends of a new connection: the connecting one first.
#[must_use]
pub fn ends(connecting: Identity, accepting: Identity, now_ns: u64) -> [End; 2] {
    let connection =
        Connection::connect(&connecting, accepting.site, 1, Nonce([7; 32]), WAITING_BYTES_MAX, now_ns);
    let accepted = Connection::accept(Nonce([8; 32]), WAITING_BYTES_MAX, now_ns);
    [End::new(connecting, connection), End::new(accepting, accepted)]
}

/// Blocks that say who they are.
#[must_use]
pub fn blocks(id: u64, count: usize) -> (Vec<Block>, BlockCrcs) {
    let block = |at: usize| -> Block {
        let seed = id.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(at as u64);
        (0..BLOCK_BYTES as u64 / 8).flat_map(|word| (seed ^ (word << 32)).to_le_bytes()).collect()
    };
    let blocks: Vec<Block> = (0..count).map(block).collect();
    let crcs = blocks.iter().map(|block| crc32c::crc32c(block)).collect();
    (blocks, crcs)
}

/// A write of so many blocks, or what asks for nothing.
///
/// # Panics
/// For more than 256 blocks.
#[must_use]
pub fn request(id: u64, count: usize) -> (Frame, Vec<Block>) {
    let (blocks, crcs) = blocks(id, count);
    let span = Span { extent: Extent(1), first: 4, count: u16::try_from(count).expect("a few") };
    let ask = match count {
        0 => Ask::Stable,
        _ => Ask::Write { version: Version(id % 1000), span, blocks: crcs, is_sole: false },
    };
    let frame = Frame::Request(Request {
        to: Member { store: StoreId([3; 16]), incarnation: 1 },
        volume: VolumeId([4; 16]),
        generation: Generation { takeover: 1, start: 1 },
        partition: 0,
        epoch: Epoch(1),
        id,
        stable: Version(0),
        ask,
    });
    (frame, blocks)
}

/// An answer with so many blocks, or with none.
#[must_use]
pub fn answer(id: u64, count: usize) -> (Frame, Vec<Block>) {
    let (blocks, crcs) = blocks(id, count);
    let frame = Frame::Answer(Answer {
        from: Member { store: StoreId([3; 16]), incarnation: 1 },
        volume: VolumeId([4; 16]),
        generation: Generation { takeover: 1, start: 1 },
        id,
        reply: if count == 0 { Reply::Done } else { Reply::Blocks(crcs) },
    });
    (frame, blocks)
}

/// How far a script has come.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Reached {
    /// Ends that were open.
    pub open: usize,
    /// Frames that came.
    pub frames: usize,
    /// Ends that failed.
    pub failed: usize,
    /// An end had no memory for what came.
    pub was_starved: bool,
}

/// Runs two ends as the bytes say.
///
/// # Panics
/// If something does not hold.
pub fn run(script: &[u8]) -> Reached {
    let mut reached = Reached::default();
    let mut now_ns = 0;
    let mut ends = ends(identity(1), identity(2), now_ns);
    let mut sent: [Vec<(Frame, Vec<Block>)>; 2] = [Vec::new(), Vec::new()];
    let mut is_changed = false;
    let mut script = script.iter().copied();
    while let Some(step) = script.next() {
        // Whose turn: of the connecting side, or of the accepting one.
        let (from, to) = if step & 0x80 == 0 { (0, 1) } else { (1, 0) };
        let mut next = || script.next().unwrap_or(0);
        match step & 7 {
            0 => {
                let bytes = ends[from].outgoing(1 + usize::from(next()) * 2, now_ns);
                ends[to].incoming.extend(bytes);
            }
            1 => ends[to].receive(usize::from(next()), now_ns),
            2 => ends[to].receive(usize::from(next()) << 8, now_ns),
            3 => {
                let (id, count) = (u64::from(next()), usize::from(next() % 5));
                let (frame, blocks) = if from == 0 { request(id, count) } else { answer(id, count) };
                if ends[from].connection.send(frame.clone(), blocks.clone()).is_ok() {
                    assert!(ends[from].is_open, "nothing is taken before the end is open");
                    sent[from].push((frame, blocks));
                }
            }
            4 => now_ns += u64::from(next()) * 10_000_000,
            5 => {
                ends[to].admit(now_ns);
                ends[to].heap.free = usize::from(next());
            }
            6 => {
                let (at, with) = (usize::from(next()) << 4 | usize::from(step >> 3 & 15), next());
                if let Some(byte) = ends[to].incoming.get_mut(at) {
                    *byte ^= with;
                    is_changed |= with != 0;
                }
            }
            _ => {
                let count = usize::from(next());
                let bytes: Vec<u8> = (0..count).map(|_| next()).collect();
                is_changed |= count > 0;
                ends[to].incoming.extend(bytes);
            }
        }
        for end in &mut ends {
            reached.was_starved |= end.connection.is_starved();
            if end.error.is_none() {
                end.error = end.connection.tick(now_ns).err();
            }
            assert!(end.connection.waiting_bytes() <= WAITING_BYTES_MAX + 4096, "what waits is bounded");
        }
        if !is_changed {
            check(&ends, &sent);
        }
    }
    for end in &mut ends {
        reached.open += usize::from(end.is_open);
        reached.frames += end.received.len();
        reached.failed += usize::from(end.error.is_some());
        // What came in part goes back; what waited is handed back.
        let before = end.heap.free;
        end.connection.end(&mut end.heap);
        let unsent =
            std::iter::from_fn(|| end.connection.take_unsent()).map(|blocks| blocks.len()).sum::<usize>();
        assert!(end.heap.free - before <= 256 && unsent * BLOCK_BYTES <= WAITING_BYTES_MAX);
    }
    reached
}

/// What holds as long as nothing was changed on its way.
fn check(ends: &[End; 2], sent: &[Vec<(Frame, Vec<Block>)>; 2]) {
    for (at, end) in ends.iter().enumerate() {
        let other = &sent[1 - at];
        assert_eq!(end.received[..], other[..end.received.len()], "what comes is what was sent");
        let is_time = matches!(
            end.error,
            None | Some(ConnectionError::Silent | ConnectionError::Handshake(HandshakeError::Late))
        );
        assert!(is_time, "{:?} ended the {:?} side", end.error, end.connection.side());
    }
}

/// Scripts for [`run`] to begin with.
#[must_use]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    const OTHER: u8 = 0x80;
    let handshake = [0, 200, 2, 4, OTHER, 200, OTHER | 2, 4, 0, 200, 2, 4, 5, 64, OTHER, 200, OTHER | 2, 4];
    let requests = [3, 1, 2, 3, 2, 0, 0, 200, 2, 64];
    let answers = [OTHER | 3, 1, 4, OTHER | 3, 2, 0, OTHER, 200, OTHER | 1, 9, OTHER | 2, 255];
    let starved = [5, 1, 3, 3, 4, 0, 200, 2, 255, 2, 255, 4, 20, 5, 64, 2, 255];
    let idle = [4, 31, 0, 200, OTHER, 200, 1, 255, OTHER | 1, 255, 4, 100, 4, 100];
    let changed = [3, 9, 3, 0, 200, 6, 40, 1, 2, 255];
    let inserted = [7, 8, b'T', b'R', b'H', b'1', 5, 1, 8, 0, 2, 1];
    let of = |parts: &[&[u8]]| parts.concat();
    vec![
        ("handshake", of(&[&handshake])),
        ("frames", of(&[&handshake, &requests, &answers])),
        ("starved", of(&[&handshake, &starved, &answers])),
        ("idle", of(&[&handshake, &idle])),
        ("changed", of(&[&handshake, &requests, &changed])),
        ("inserted", of(&[&handshake, &inserted, &requests])),
        ("stranger", of(&[&inserted, &handshake])),
    ]
}
