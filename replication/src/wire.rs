//! Frames between head and replica, byte by byte.
//!
//! A frame is a header, a body and blocks of 4 KiB. The header says how long the other two are, so that a reader knows what to wait for;
//! its CRC32C covers header and body, and the body has the CRC32C of each block: so everything is covered, and a block's is the one that
//! was made when an initiator's frame was received (I7). All numbers are little-endian.
//!
//! ```text
//!  0  u32       magic, "TRP1"
//!  4  u16       version of what follows
//!  6  u8        kind: 1 request, 2 answer, 3 grant request, 4 grant answer
//!  7  u8        0
//!  8  u32       bytes of the body
//! 12  u32       blocks behind it
//! 16  u32       CRC32C of header (with 0 here) and body
//! 20  u32       0
//! ```
//!
//! Decoding is total: any bytes are a frame or an error, and never more memory is taken than the bytes that are there.

#[cfg(any(test, fuzzing))]
pub mod fuzzing;

use cluster_map::{StoreId, VolumeId};
use smallvec::SmallVec;
use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::message::{
    Answer, Ask, Digest, Fault, GrantAnswer, GrantRequest, Held, Message, Refusal, Reply, Request,
};
use crate::terms::{EXTENT_BLOCKS, Epoch, Extent, Generation, Member, Span, Version};

/// Bytes of a header.
pub const HEADER_BYTES: usize = size_of::<RawHeader>();
/// The version that is spoken.
pub const VERSION: u16 = 1;
/// Most bytes of a body: longer lists come in pieces.
pub const BODY_MAX: usize = 1 << 20;
/// Most blocks behind a body.
pub const BLOCKS_MAX: usize = 256;
/// Behind the last version of a write, and the last partition: no number that is counted up from one of these ends its type.
const VERSIONS_END: u64 = 1 << 62;
const PARTITIONS_END: u32 = 1 << 16;
const MAGIC: u32 = u32::from_le_bytes(*b"TRP1");

/// CRC32C of each block that follows a body.
pub type BlockCrcs = SmallVec<[u32; 4]>;

/// Why bytes are no frame. The connection that they came by is of no use any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not a frame at all.
    #[error("the magic number is not that of a frame")]
    Magic,
    /// Another version.
    #[error("version {0} is spoken, and only {VERSION} is understood")]
    Version(u16),
    /// Longer than anything that is sent.
    #[error("the lengths are beyond what is sent")]
    Length,
    /// Changed on its way.
    #[error("the checksum does not match")]
    Checksum,
    /// Whole, and without a meaning: which field.
    #[error("{0} has a value without a meaning")]
    Value(&'static str),
}

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    kind: Kind,
    /// Bytes of the body.
    pub body_bytes: usize,
    /// Blocks behind it.
    pub blocks: usize,
    crc: u32,
    raw: [u8; HEADER_BYTES],
}

/// A decoded frame. Where a message has blocks, their checksums stand for them.
pub type Frame = Message<BlockCrcs>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request = 1,
    Answer = 2,
    GrantRequest = 3,
    GrantAnswer = 4,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U16,
    kind: u8,
    reserved: u8,
    body_bytes: U32,
    blocks: U32,
    crc: U32,
    reserved_too: U32,
}
const _: () = assert!(HEADER_BYTES == 24);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRequest {
    store: [u8; 16],
    incarnation: U64,
    volume: [u8; 16],
    takeover: U64,
    start: U64,
    partition: U32,
    ask: u8,
    flags: u8,
    first: U16,
    epoch: U64,
    id: U64,
    stable: U64,
    version: U64,
    edition: U64,
    extent: U32,
    count: U16,
    reserved: U16,
}
const _: () = assert!(size_of::<RawRequest>() == 112);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawAnswer {
    store: [u8; 16],
    incarnation: U64,
    volume: [u8; 16],
    takeover: U64,
    start: U64,
    id: U64,
    reply: u8,
    detail: u8,
    reserved: U16,
    items: U32,
    /// Two numbers, as the reply needs them.
    first: U64,
    second: U64,
}
const _: () = assert!(size_of::<RawAnswer>() == 88);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeld {
    extent: U32,
    flags: U32,
    version: U64,
}
const _: () = assert!(size_of::<RawHeld>() == 16);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawDigest {
    found: U128,
    kind: U32,
    recorded_crc: U32,
    found_crc: U32,
    reserved: U32,
}
const _: () = assert!(size_of::<RawDigest>() == 32);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawGrantRequest {
    asked_ns: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawGrantAnswer {
    asked_ns: U64,
    items: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawExcluded {
    volume: [u8; 16],
    takeover: U64,
    start: U64,
}

mod ask {
    pub(super) const OPEN: u8 = 1;
    pub(super) const CLOSE: u8 = 2;
    pub(super) const RESERVE: u8 = 3;
    pub(super) const WRITE: u8 = 4;
    pub(super) const UNMAP: u8 = 5;
    pub(super) const LOSE: u8 = 6;
    pub(super) const READ: u8 = 7;
    pub(super) const SALVAGE: u8 = 8;
    pub(super) const DIGEST: u8 = 9;
    pub(super) const LIST: u8 = 10;
    pub(super) const STABLE: u8 = 11;
}

mod reply {
    pub(super) const OPENED: u8 = 1;
    pub(super) const DONE: u8 = 2;
    pub(super) const BLOCKS: u8 = 3;
    pub(super) const DIGESTS: u8 = 4;
    pub(super) const LIST: u8 = 5;
    pub(super) const FAILED: u8 = 6;
    pub(super) const REFUSED: u8 = 7;
}

const IS_SOLE: u8 = 1;
const IS_ACTIVE: u32 = 1;
const IS_SUSPECT: u32 = 2;

impl Header {
    /// What a header says.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
        let raw = RawHeader::read_from_bytes(bytes).map_err(|_| WireError::Length)?;
        if raw.magic.get() != MAGIC {
            return Err(WireError::Magic);
        }
        if raw.version.get() != VERSION {
            return Err(WireError::Version(raw.version.get()));
        }
        let kind = match raw.kind {
            1 => Kind::Request,
            2 => Kind::Answer,
            3 => Kind::GrantRequest,
            4 => Kind::GrantAnswer,
            _ => return Err(WireError::Value("the kind of frame")),
        };
        let (body_bytes, blocks) = (raw.body_bytes.get() as usize, raw.blocks.get() as usize);
        if body_bytes > BODY_MAX || blocks > BLOCKS_MAX {
            return Err(WireError::Length);
        }
        Ok(Header { kind, body_bytes, blocks, crc: raw.crc.get(), raw: *bytes })
    }

    /// What the body means that follows it.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode_body(&self, body: &[u8]) -> Result<Frame, WireError> {
        let mut raw = self.raw;
        raw[16..20].fill(0);
        if body.len() != self.body_bytes || crc32c::crc32c_append(crc32c::crc32c(&raw), body) != self.crc {
            return Err(WireError::Checksum);
        }
        let has_blocks = matches!(self.kind, Kind::Request | Kind::Answer);
        if self.blocks > 0 && !has_blocks {
            return Err(WireError::Value("the number of blocks"));
        }
        match self.kind {
            Kind::Request => self.decode_request(body).map(Frame::Request),
            Kind::Answer => self.decode_answer(body).map(Frame::Answer),
            Kind::GrantRequest => {
                let raw = RawGrantRequest::read_from_bytes(body).map_err(|_| WireError::Length)?;
                Ok(Frame::GrantRequest(GrantRequest { asked_ns: raw.asked_ns.get() }))
            }
            Kind::GrantAnswer => {
                let (raw, rest) = RawGrantAnswer::read_from_prefix(body).map_err(|_| WireError::Length)?;
                let excluded = items::<RawExcluded>(rest, raw.items.get())?.iter().map(|raw| {
                    let below = Generation { takeover: raw.takeover.get(), start: raw.start.get() };
                    (VolumeId(raw.volume), below)
                });
                Ok(Frame::GrantAnswer(GrantAnswer {
                    asked_ns: raw.asked_ns.get(),
                    excluded: excluded.collect(),
                }))
            }
        }
    }

    fn crcs(&self, rest: &[u8]) -> Result<BlockCrcs, WireError> {
        Ok(items::<U32>(rest, self.blocks as u64)?.iter().map(|crc| crc.get()).collect())
    }

    fn decode_request(&self, body: &[u8]) -> Result<Request<BlockCrcs>, WireError> {
        let (raw, rest) = RawRequest::read_from_prefix(body).map_err(|_| WireError::Length)?;
        let span = Span { extent: Extent(raw.extent.get()), first: raw.first.get(), count: raw.count.get() };
        let (version, stable) = (version(raw.version)?, version(raw.stable)?);
        let blocks = self.crcs(rest)?;
        if raw.partition.get() >= PARTITIONS_END {
            return Err(WireError::Value("a partition"));
        }
        let has_span = matches!(raw.ask, ask::WRITE..=ask::DIGEST);
        if has_span && (span.count == 0 || u32::from(span.first) + u32::from(span.count) > EXTENT_BLOCKS) {
            return Err(WireError::Value("a span"));
        }
        let expected = if raw.ask == ask::WRITE { usize::from(span.count) } else { 0 };
        if blocks.len() != expected || raw.flags & !IS_SOLE != 0 {
            return Err(WireError::Value("the number of blocks"));
        }
        let ask = match raw.ask {
            ask::OPEN => Ask::Open { edition: raw.edition.get() },
            ask::CLOSE => Ask::Close,
            ask::RESERVE => Ask::Reserve { extent: span.extent },
            ask::WRITE => Ask::Write { version, span, blocks, is_sole: raw.flags & IS_SOLE != 0 },
            ask::UNMAP => Ask::Unmap { version, span },
            ask::LOSE => Ask::Lose { version, span },
            ask::READ => Ask::Read { span },
            ask::SALVAGE => Ask::Salvage { span },
            ask::DIGEST => Ask::Digest { span },
            ask::LIST => Ask::List { from: span.extent },
            ask::STABLE => Ask::Stable,
            _ => return Err(WireError::Value("what is asked")),
        };
        Ok(Request {
            to: Member { store: StoreId(raw.store), incarnation: raw.incarnation.get() },
            volume: VolumeId(raw.volume),
            generation: Generation { takeover: raw.takeover.get(), start: raw.start.get() },
            partition: raw.partition.get(),
            epoch: Epoch(raw.epoch.get()),
            id: raw.id.get(),
            stable,
            ask,
        })
    }

    fn decode_answer(&self, body: &[u8]) -> Result<Answer<BlockCrcs>, WireError> {
        let (raw, rest) = RawAnswer::read_from_prefix(body).map_err(|_| WireError::Length)?;
        if self.blocks > 0 && raw.reply != reply::BLOCKS {
            return Err(WireError::Value("the number of blocks"));
        }
        let count = u64::from(raw.items.get());
        let pair = Generation { takeover: raw.first.get(), start: raw.second.get() };
        let reply = match raw.reply {
            reply::OPENED => Reply::Opened { highest: version(raw.first)?, active: held(rest, count)? },
            reply::DONE => Reply::Done,
            reply::BLOCKS => Reply::Blocks(self.crcs(rest)?),
            reply::DIGESTS => Reply::Digests(digests(rest, count)?),
            reply::LIST => {
                let is_whole = match raw.detail {
                    0 => false,
                    1 => true,
                    _ => return Err(WireError::Value("the end of a list")),
                };
                Reply::List { held: held(rest, count)?, is_whole }
            }
            reply::FAILED => Reply::Failed(match raw.detail {
                1 => Fault::Corrupt,
                2 => Fault::Lost,
                3 => Fault::NoSpace,
                4 => Fault::NoMemory,
                5 => Fault::Device,
                _ => return Err(WireError::Value("a fault")),
            }),
            reply::REFUSED => Reply::Refused(match raw.detail {
                1 => Refusal::Replaced(pair),
                2 => Refusal::NotOpen,
                3 => Refusal::Epoch(Epoch(raw.first.get())),
                4 => Refusal::Past(raw.first.get()),
                5 => Refusal::Stranger,
                _ => return Err(WireError::Value("a refusal")),
            }),
            _ => return Err(WireError::Value("a reply")),
        };
        Ok(Answer {
            from: Member { store: StoreId(raw.store), incarnation: raw.incarnation.get() },
            volume: VolumeId(raw.volume),
            generation: Generation { takeover: raw.takeover.get(), start: raw.start.get() },
            id: raw.id.get(),
            reply,
        })
    }
}

/// So many structures and nothing behind them.
fn items<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    bytes: &[u8],
    count: u64,
) -> Result<&[T], WireError> {
    let all = <[T]>::ref_from_bytes(bytes).map_err(|_| WireError::Length)?;
    if all.len() as u64 == count { Ok(all) } else { Err(WireError::Length) }
}

fn version(raw: U64) -> Result<Version, WireError> {
    Some(raw.get())
        .filter(|version| *version < VERSIONS_END)
        .map(Version)
        .ok_or(WireError::Value("a version"))
}

fn held(bytes: &[u8], count: u64) -> Result<Vec<Held>, WireError> {
    let one = |raw: &RawHeld| {
        let flags = raw.flags.get();
        if flags & !(IS_ACTIVE | IS_SUSPECT) != 0 {
            return Err(WireError::Value("an extent's flags"));
        }
        Ok(Held {
            extent: Extent(raw.extent.get()),
            version: version(raw.version)?,
            is_active: flags & IS_ACTIVE != 0,
            is_suspect: flags & IS_SUSPECT != 0,
        })
    };
    items::<RawHeld>(bytes, count)?.iter().map(one).collect()
}

fn digests(bytes: &[u8], count: u64) -> Result<Vec<Digest>, WireError> {
    let one = |raw: &RawDigest| {
        Ok(match raw.kind.get() {
            0 => Digest::Absent,
            1 => Digest::Data(raw.found.get()),
            2 => Digest::Suspect {
                found: raw.found.get(),
                recorded_crc: raw.recorded_crc.get(),
                found_crc: raw.found_crc.get(),
            },
            3 => Digest::Bad,
            4 => Digest::Lost,
            _ => return Err(WireError::Value("a digest")),
        })
    };
    items::<RawDigest>(bytes, count)?.iter().map(one).collect()
}

impl Frame {
    /// Checksums of the blocks that follow it.
    #[must_use]
    pub fn block_crcs(&self) -> &[u32] {
        match self {
            Frame::Request(Request { ask: Ask::Write { blocks, .. }, .. })
            | Frame::Answer(Answer { reply: Reply::Blocks(blocks), .. }) => blocks,
            _ => &[],
        }
    }

    /// Appends header and body; the blocks, whose checksums stand in the frame, are the caller's to send behind them.
    ///
    /// # Panics
    /// If it is longer than any frame may be: lists are sent in pieces.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let begin = out.len();
        out.resize(begin + HEADER_BYTES, 0);
        let (kind, blocks) = match self {
            Frame::Request(request) => (Kind::Request, encode_request(request, out)),
            Frame::Answer(answer) => (Kind::Answer, encode_answer(answer, out)),
            Frame::GrantRequest(request) => {
                let raw = RawGrantRequest { asked_ns: request.asked_ns.into() };
                out.extend_from_slice(raw.as_bytes());
                (Kind::GrantRequest, 0)
            }
            Frame::GrantAnswer(answer) => {
                let items = answer.excluded.len() as u64;
                let raw = RawGrantAnswer { asked_ns: answer.asked_ns.into(), items: items.into() };
                out.extend_from_slice(raw.as_bytes());
                for (volume, below) in &answer.excluded {
                    let (takeover, start) = (below.takeover.into(), below.start.into());
                    out.extend_from_slice(RawExcluded { volume: volume.0, takeover, start }.as_bytes());
                }
                (Kind::GrantAnswer, 0)
            }
        };
        let body_bytes = out.len() - begin - HEADER_BYTES;
        assert!(body_bytes <= BODY_MAX && blocks <= BLOCKS_MAX, "a frame is as short as its reader expects");
        let mut header = RawHeader {
            magic: MAGIC.into(),
            version: VERSION.into(),
            kind: kind as u8,
            reserved: 0,
            body_bytes: u32::try_from(body_bytes).expect("at most BODY_MAX").into(),
            blocks: u32::try_from(blocks).expect("at most BLOCKS_MAX").into(),
            crc: 0.into(),
            reserved_too: 0.into(),
        };
        let crc = crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), &out[begin + HEADER_BYTES..]);
        header.crc = crc.into();
        out[begin..begin + HEADER_BYTES].copy_from_slice(header.as_bytes());
    }
}

fn encode_request(request: &Request<BlockCrcs>, out: &mut Vec<u8>) -> usize {
    let none = (Span { extent: Extent(0), first: 0, count: 0 }, Version(0));
    let (ask, (span, version)) = match &request.ask {
        Ask::Open { .. } => (ask::OPEN, none),
        Ask::Close => (ask::CLOSE, none),
        Ask::Reserve { extent } => (ask::RESERVE, (Span { extent: *extent, ..none.0 }, none.1)),
        Ask::Write { version, span, .. } => (ask::WRITE, (*span, *version)),
        Ask::Unmap { version, span } => (ask::UNMAP, (*span, *version)),
        Ask::Lose { version, span } => (ask::LOSE, (*span, *version)),
        Ask::Read { span } => (ask::READ, (*span, none.1)),
        Ask::Salvage { span } => (ask::SALVAGE, (*span, none.1)),
        Ask::Digest { span } => (ask::DIGEST, (*span, none.1)),
        Ask::List { from } => (ask::LIST, (Span { extent: *from, ..none.0 }, none.1)),
        Ask::Stable => (ask::STABLE, none),
    };
    let raw = RawRequest {
        store: request.to.store.0,
        incarnation: request.to.incarnation.into(),
        volume: request.volume.0,
        takeover: request.generation.takeover.into(),
        start: request.generation.start.into(),
        partition: request.partition.into(),
        ask,
        flags: if matches!(request.ask, Ask::Write { is_sole: true, .. }) { IS_SOLE } else { 0 },
        first: span.first.into(),
        epoch: request.epoch.0.into(),
        id: request.id.into(),
        stable: request.stable.0.into(),
        version: version.0.into(),
        edition: if let Ask::Open { edition } = request.ask { edition.into() } else { 0.into() },
        extent: span.extent.0.into(),
        count: span.count.into(),
        reserved: 0.into(),
    };
    out.extend_from_slice(raw.as_bytes());
    let Ask::Write { blocks, .. } = &request.ask else { return 0 };
    put_crcs(blocks, out)
}

fn put_crcs(crcs: &BlockCrcs, out: &mut Vec<u8>) -> usize {
    for crc in crcs {
        out.extend_from_slice(&crc.to_le_bytes());
    }
    crcs.len()
}

fn encode_answer(answer: &Answer<BlockCrcs>, out: &mut Vec<u8>) -> usize {
    let (mut detail, mut first, mut second, mut items) = (0, 0, 0, 0);
    let reply = match &answer.reply {
        Reply::Opened { highest, active } => {
            (first, items) = (highest.0, active.len());
            reply::OPENED
        }
        Reply::Done => reply::DONE,
        Reply::Blocks(_) => reply::BLOCKS,
        Reply::Digests(digests) => {
            items = digests.len();
            reply::DIGESTS
        }
        Reply::List { held, is_whole } => {
            (items, detail) = (held.len(), u8::from(*is_whole));
            reply::LIST
        }
        Reply::Failed(fault) => {
            detail = match fault {
                Fault::Corrupt => 1,
                Fault::Lost => 2,
                Fault::NoSpace => 3,
                Fault::NoMemory => 4,
                Fault::Device => 5,
            };
            reply::FAILED
        }
        Reply::Refused(refusal) => {
            (detail, first, second) = match refusal {
                Refusal::Replaced(by) => (1, by.takeover, by.start),
                Refusal::NotOpen => (2, 0, 0),
                Refusal::Epoch(epoch) => (3, epoch.0, 0),
                Refusal::Past(edition) => (4, *edition, 0),
                Refusal::Stranger => (5, 0, 0),
            };
            reply::REFUSED
        }
    };
    let raw = RawAnswer {
        store: answer.from.store.0,
        incarnation: answer.from.incarnation.into(),
        volume: answer.volume.0,
        takeover: answer.generation.takeover.into(),
        start: answer.generation.start.into(),
        id: answer.id.into(),
        reply,
        detail,
        reserved: 0.into(),
        items: u32::try_from(items).expect("a body has fewer").into(),
        first: first.into(),
        second: second.into(),
    };
    out.extend_from_slice(raw.as_bytes());
    match &answer.reply {
        Reply::Opened { active: list, .. } | Reply::List { held: list, .. } => {
            for held in list {
                let flags =
                    if held.is_active { IS_ACTIVE } else { 0 } | if held.is_suspect { IS_SUSPECT } else { 0 };
                let (extent, version) = (held.extent.0.into(), held.version.0.into());
                out.extend_from_slice(RawHeld { extent, flags: flags.into(), version }.as_bytes());
            }
            0
        }
        Reply::Digests(digests) => {
            for digest in digests {
                out.extend_from_slice(raw_digest(digest).as_bytes());
            }
            0
        }
        Reply::Blocks(crcs) => put_crcs(crcs, out),
        Reply::Done | Reply::Failed(_) | Reply::Refused(_) => 0,
    }
}

fn raw_digest(digest: &Digest) -> RawDigest {
    let (kind, found, recorded_crc, found_crc) = match digest {
        Digest::Absent => (0, 0, 0, 0),
        Digest::Data(found) => (1, *found, 0, 0),
        Digest::Suspect { found, recorded_crc, found_crc } => (2, *found, *recorded_crc, *found_crc),
        Digest::Bad => (3, 0, 0, 0),
        Digest::Lost => (4, 0, 0, 0),
    };
    RawDigest {
        found: found.into(),
        kind: kind.into(),
        recorded_crc: recorded_crc.into(),
        found_crc: found_crc.into(),
        reserved: 0.into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn spans() -> impl Strategy<Value = Span> {
        (any::<u32>(), 0u16..1024).prop_flat_map(|(extent, first)| {
            (1..=(1024 - first).min(256)).prop_map(move |count| Span { extent: Extent(extent), first, count })
        })
    }

    fn versions() -> impl Strategy<Value = Version> + Clone {
        (0..VERSIONS_END).prop_map(Version)
    }

    fn asks() -> impl Strategy<Value = Ask<BlockCrcs>> {
        let version = (0..VERSIONS_END).prop_map(Version);
        let write = (version.clone(), spans(), any::<bool>(), any::<u32>()).prop_map(
            |(version, span, is_sole, crc)| {
                let blocks = (0..u32::from(span.count)).map(|block| crc.wrapping_add(block)).collect();
                Ask::Write { version, span, blocks, is_sole }
            },
        );
        prop_oneof![
            any::<u64>().prop_map(|edition| Ask::Open { edition }),
            Just(Ask::Close),
            any::<u32>().prop_map(|extent| Ask::Reserve { extent: Extent(extent) }),
            write,
            (version.clone(), spans()).prop_map(|(version, span)| Ask::Unmap { version, span }),
            (version, spans()).prop_map(|(version, span)| Ask::Lose { version, span }),
            spans().prop_map(|span| Ask::Read { span }),
            spans().prop_map(|span| Ask::Salvage { span }),
            spans().prop_map(|span| Ask::Digest { span }),
            any::<u32>().prop_map(|from| Ask::List { from: Extent(from) }),
            Just(Ask::Stable),
        ]
    }

    fn replies() -> impl Strategy<Value = Reply<BlockCrcs>> {
        let held = (any::<u32>(), versions(), any::<bool>(), any::<bool>()).prop_map(
            |(extent, version, is_active, is_suspect)| Held {
                extent: Extent(extent),
                version,
                is_active,
                is_suspect,
            },
        );
        let digest = prop_oneof![
            Just(Digest::Absent),
            any::<u128>().prop_map(Digest::Data),
            (any::<u128>(), any::<u32>(), any::<u32>()).prop_map(|(found, recorded_crc, found_crc)| {
                Digest::Suspect { found, recorded_crc, found_crc }
            }),
            Just(Digest::Bad),
            Just(Digest::Lost),
        ];
        let fault = prop::sample::select(vec![
            Fault::Corrupt,
            Fault::Lost,
            Fault::NoSpace,
            Fault::NoMemory,
            Fault::Device,
        ]);
        let refusal = prop_oneof![
            (any::<u64>(), any::<u64>())
                .prop_map(|(takeover, start)| Refusal::Replaced(Generation { takeover, start })),
            Just(Refusal::NotOpen),
            any::<u64>().prop_map(|epoch| Refusal::Epoch(Epoch(epoch))),
            any::<u64>().prop_map(Refusal::Past),
            Just(Refusal::Stranger),
        ];
        prop_oneof![
            (versions(), vec(held.clone(), 0..20))
                .prop_map(|(highest, active)| Reply::Opened { highest, active }),
            Just(Reply::Done),
            vec(any::<u32>(), 0..256).prop_map(|crcs| Reply::Blocks(crcs.into())),
            vec(digest, 0..64).prop_map(Reply::Digests),
            (vec(held, 0..200), any::<bool>()).prop_map(|(held, is_whole)| Reply::List { held, is_whole }),
            fault.prop_map(Reply::Failed),
            refusal.prop_map(Reply::Refused),
        ]
    }

    fn frames() -> impl Strategy<Value = Frame> {
        let numbers = any::<[u64; 6]>();
        let request =
            (any::<[u8; 16]>(), 0..PARTITIONS_END, numbers, asks()).prop_map(|(id, partition, n, ask)| {
                Frame::Request(Request {
                    to: Member { store: StoreId(id), incarnation: n[0] },
                    volume: VolumeId(id),
                    generation: Generation { takeover: n[1], start: n[2] },
                    partition,
                    epoch: Epoch(n[3]),
                    id: n[4],
                    stable: Version(n[5] % VERSIONS_END),
                    ask,
                })
            });
        let answer = (any::<[u8; 16]>(), numbers, replies()).prop_map(|(id, n, reply)| {
            Frame::Answer(Answer {
                from: Member { store: StoreId(id), incarnation: n[0] },
                volume: VolumeId(id),
                generation: Generation { takeover: n[1], start: n[2] },
                id: n[3],
                reply,
            })
        });
        let excluded = (any::<[u8; 16]>(), any::<u64>(), any::<u64>())
            .prop_map(|(id, takeover, start)| (VolumeId(id), Generation { takeover, start }));
        prop_oneof![
            4 => request,
            4 => answer,
            1 => any::<u64>().prop_map(|asked_ns| Frame::GrantRequest(GrantRequest { asked_ns })),
            1 => (any::<u64>(), vec(excluded, 0..10))
                .prop_map(|(asked_ns, excluded)| Frame::GrantAnswer(GrantAnswer { asked_ns, excluded })),
        ]
    }

    fn decode(bytes: &[u8]) -> Result<Frame, WireError> {
        let (header, body) = bytes.split_first_chunk().ok_or(WireError::Length)?;
        Header::decode(header)?.decode_body(body)
    }

    #[test]
    fn a_peer_that_sends_changed_frames_is_survived() {
        // Seeds with a few bytes changed come further than bytes by chance.
        let seeds = fuzzing::seeds();
        let mut state = 1_u64;
        let mut next = |end: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % end
        };
        for _ in 0..100_000 {
            let mut bytes = seeds[next(seeds.len())].1.clone();
            for _ in 0..next(4) {
                let at = next(bytes.len());
                bytes[at] = u8::try_from(next(256)).unwrap();
            }
            fuzzing::read(&bytes);
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(frame in frames()) {
            let mut bytes = vec![7; 3];
            frame.encode(&mut bytes);
            prop_assert_eq!(decode(&bytes[3..]), Ok(frame));
        }

        #[test]
        fn any_changed_bit_is_noticed(frame in frames(), at in any::<prop::sample::Index>(), bit in 0u32..8) {
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn any_body_under_a_good_checksum_is_decoded_or_refused(kind in 0u8..6, blocks in 0u32..300, body in vec(any::<u8>(), 0..400)) {
            let mut header = RawHeader {
                magic: MAGIC.into(),
                version: VERSION.into(),
                kind,
                reserved: 0,
                body_bytes: u32::try_from(body.len()).unwrap().into(),
                blocks: blocks.into(),
                crc: 0.into(),
                reserved_too: 0.into(),
            };
            header.crc = crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), &body).into();
            let mut bytes = header.as_bytes().to_vec();
            bytes.extend_from_slice(&body);
            if let Ok(frame) = decode(&bytes) {
                let mut again = Vec::new();
                frame.encode(&mut again);
                prop_assert_eq!(decode(&again), Ok(frame));
            }
        }

        #[test]
        fn any_peer_is_survived(bytes in vec(any::<u8>(), 0..2000)) {
            fuzzing::read(&bytes);
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
