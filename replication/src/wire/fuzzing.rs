//! What fuzzing gives to whoever reads frames of peers: to the codec, and what that makes of them to a site's replicas and heads.
//! Built for tests and for the targets in `fuzz/` only.
//!
//! Bytes are frames one after the other: a kind, the number of blocks, the length of the body (two bytes), the body. Each gets a header that
//! fits. Whatever can be decoded must be the same when it is encoded and decoded again; whatever it is, nothing panics.

use std::collections::BTreeMap;
use std::ops::Range;

use cluster_map::{NodeId, StoreId, VolumeId};

use super::{BlockCrcs, Frame, HEADER_BYTES, Header, MAGIC, RawHeader, VERSION};
use crate::head::Token;
use crate::membership::{Membership, Owner, Partition, Record};
use crate::message::{Answer, Ask, Fault, GrantRequest, Memory, Reply, Request};
use crate::replica::{Ended, Work};
use crate::site::{Engine, Output};
use crate::terms::{Epoch, Extent, Generation, Member, Site, Span, Version};
use zerocopy::IntoBytes;

const OWN: Site = Site { node: NodeId([1; 16]), core: 0 };
const OTHER: Site = Site { node: NodeId([5; 16]), core: 0 };
const VOLUME: VolumeId = VolumeId([2; 16]);
const MEMBER: Member = Member { store: StoreId([3; 16]), incarnation: 1 };

/// Checksums stand for blocks.
struct Sums;

impl Memory for Sums {
    type Blocks = BlockCrcs;

    fn count(&self, blocks: &BlockCrcs) -> usize {
        blocks.len()
    }

    fn share(&mut self, blocks: &BlockCrcs, which: Range<usize>) -> BlockCrcs {
        blocks[which].into()
    }

    fn merge(&mut self, payload: &mut BlockCrcs, at: usize, _payload_bytes: Range<usize>, old: BlockCrcs) {
        payload[at] ^= old[0];
    }

    fn append(&mut self, blocks: &mut BlockCrcs, more: BlockCrcs) {
        blocks.extend(more);
    }

    fn release(&mut self, _blocks: BlockCrcs) {}
}

fn sealed(kind: u8, blocks: u8, body: &[u8]) -> Vec<u8> {
    let mut header = RawHeader {
        magic: MAGIC.into(),
        version: VERSION.into(),
        kind,
        reserved: 0,
        body_bytes: u32::try_from(body.len()).unwrap_or(u32::MAX).into(),
        blocks: u32::from(blocks).into(),
        crc: 0.into(),
        reserved_too: 0.into(),
    };
    header.crc = crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), body).into();
    [header.as_bytes(), body].concat()
}

fn decode(bytes: &[u8]) -> Option<Frame> {
    let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>()?;
    Header::decode(header).ok()?.decode_body(body).ok()
}

/// A site with a replica and a head of one volume on it and on another site, which says what is read.
struct Peers {
    engine: Engine<BlockCrcs>,
    now_ns: u64,
    tokens: u64,
}

impl Peers {
    fn new() -> Peers {
        let mut engine = Engine::new(OWN, 0);
        engine.add_store(MEMBER, []);
        let other = Member { store: StoreId([4; 16]), incarnation: 1 };
        let owner = |member, site| Owner { member, site, is_complete: true };
        let owners = vec![owner(MEMBER, OWN), owner(other, OTHER)];
        let partition = Partition { epoch: Epoch(1), owners };
        let record = Record {
            partitions: vec![partition],
            revision: 1,
            edition: 1,
            takeover: 1,
            head: Some(OWN.node),
            stale: BTreeMap::new(),
            min_copies: 0,
            is_moving: false,
        };
        let membership = Membership::new(VOLUME, record, None);
        engine.begin(Generation { takeover: 1, start: 1 }, membership, &mut Sums, 0);
        engine.connected(OTHER, &mut Sums, 0);
        engine.accepted(OTHER, &mut Sums);
        Peers { engine, now_ns: 1, tokens: 0 }
    }

    fn take(&mut self, frame: Frame) {
        self.now_ns += 10_000_000;
        let now_ns = self.now_ns;
        match frame {
            Frame::Request(_) | Frame::GrantRequest(_) => {
                self.engine.asked(OTHER, frame, &mut Sums, now_ns);
            }
            Frame::Answer(_) | Frame::GrantAnswer(_) => {
                self.engine.answered(OTHER, frame, &mut Sums, now_ns);
            }
        }
        self.tokens += 1;
        let (token, blocks) = (Token(self.tokens), self.tokens * 4..self.tokens * 4 + 2);
        match self.tokens % 4 {
            0 => {
                let payload = [1, 2].into_iter().collect();
                self.engine.write(VOLUME, token, blocks, payload, 512, 0, &mut Sums, now_ns);
            }
            1 => self.engine.read(VOLUME, token, blocks, &mut Sums, now_ns),
            _ => {}
        }
        self.engine.tick(&mut Sums, now_ns);
        while let Some(output) = self.engine.output() {
            if let Output::Start { id, work, .. } = output {
                self.engine.ended(id, outcome(work), &mut Sums, now_ns);
            }
        }
    }
}

fn outcome(work: Work<BlockCrcs>) -> Ended<BlockCrcs> {
    match work {
        Work::Survey => Ended::Survey { highest: Version(5), active: Vec::new() },
        Work::Read(span) | Work::Salvage(span) if span.first.is_multiple_of(7) => {
            Ended::Blocks((0..u32::from(span.count)).collect())
        }
        Work::Read(_) | Work::Salvage(_) => Ended::Failed(Fault::Corrupt),
        Work::Digest(_) => Ended::Failed(Fault::NoMemory),
        Work::List(_) => Ended::List { held: Vec::new(), is_whole: true },
        _ => Ended::Done,
    }
}

/// Reads frames as a node reads them from a peer.
///
/// # Panics
/// If a frame changes on its way through encoding.
pub fn read(mut bytes: &[u8]) {
    let mut peers = Peers::new();
    while let [kind, blocks, low, high, rest @ ..] = bytes {
        let (body, next) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
        bytes = next;
        let Some(frame) = decode(&sealed(*kind, *blocks, body)) else { continue };
        let mut again = Vec::new();
        frame.encode(&mut again);
        assert_eq!(decode(&again).as_ref(), Some(&frame), "a frame survives its encoding");
        peers.take(frame);
    }
}

/// Frames as they are sent, for [`read`] to begin with.
///
/// # Panics
/// Never: all of them are short.
#[must_use]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let generation = Generation { takeover: 1, start: 1 };
    let span = Span { extent: Extent(0), first: 4, count: 2 };
    let request = |id, ask| {
        let (epoch, stable) = (Epoch(1), Version(0));
        Frame::Request(Request {
            to: MEMBER,
            volume: VOLUME,
            generation,
            partition: 0,
            epoch,
            id,
            stable,
            ask,
        })
    };
    let answer = |id, reply| Frame::Answer(Answer { from: MEMBER, volume: VOLUME, generation, id, reply });
    let blocks: BlockCrcs = [1, 2].into_iter().collect();
    let write = Ask::Write { version: Version(6), span, blocks: blocks.clone(), is_sole: false };
    let open = request(1, Ask::Open { edition: 1 });
    let opened = |id| answer(id, Reply::Opened { highest: Version(5), active: Vec::new() });
    let grant = Frame::GrantRequest(GrantRequest { asked_ns: 1 });
    let named = [
        ("write", vec![open.clone(), request(2, write), request(3, Ask::Read { span }), grant]),
        ("survey", vec![open, request(2, Ask::List { from: Extent(0) }), request(3, Ask::Digest { span })]),
        ("answers", vec![opened(1), opened(2), answer(3, Reply::Blocks(blocks)), answer(4, Reply::Done)]),
    ];
    let joined = |frames: Vec<Frame>| {
        let mut all = Vec::new();
        for frame in frames {
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            let (header, body) = bytes.split_at(HEADER_BYTES);
            let len = u16::try_from(body.len()).expect("a short frame");
            all.extend_from_slice(&[header[6], header[12]]);
            all.extend_from_slice(&len.to_le_bytes());
            all.extend_from_slice(body);
        }
        all
    };
    named.into_iter().map(|(name, frames)| (name, joined(frames))).collect()
}
