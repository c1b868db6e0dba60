//! What head and replica say to each other, and what the driver's memory does for both.
//!
//! Messages between two nodes go over one connection at a time, in order; a new one is served only when the old one is closed and
//! everything it brought has ended. Every request carries the volume and the generation it belongs to, a request about an extent also
//! the epoch of its partition, and every answer repeats what it answers.

use std::ops::Range;

use cluster_map::VolumeId;

use crate::terms::{Epoch, Extent, Generation, Member, Span, Version};

/// The frames' memory, as the driver has it.
pub trait Memory {
    /// Blocks of 4 KiB, in order, with what is known of their checksums. Dropping one may leak memory of the driver: they are released.
    type Blocks;

    /// How many blocks.
    fn count(&self, blocks: &Self::Blocks) -> usize;

    /// Another handle on some of the blocks.
    fn share(&mut self, blocks: &Self::Blocks, which: Range<usize>) -> Self::Blocks;

    /// Puts bytes around a payload: those of block `at` that are not in `payload_bytes` come from the one block of `old`.
    fn merge(
        &mut self,
        payload: &mut Self::Blocks,
        at: usize,
        payload_bytes: Range<usize>,
        old: Self::Blocks,
    );

    /// Appends blocks.
    fn append(&mut self, blocks: &mut Self::Blocks, more: Self::Blocks);

    /// Gives blocks back.
    fn release(&mut self, blocks: Self::Blocks);
}

/// What a copy of a block is, for comparison with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digest {
    /// Nothing was ever written, or it was taken back.
    Absent,
    /// 128 bits of a cryptographic hash: equal ones are equal data.
    Data(u128),
    /// What is there does not match its record, and may never have: which of the copies holds is for the head to say.
    Suspect {
        /// Of what is there.
        found: u128,
        /// CRC32C of its newest record.
        recorded_crc: u32,
        /// CRC32C of what is there.
        found_crc: u32,
    },
    /// What is there does not match its record, and was once good.
    Bad,
    /// No good copy is left of it.
    Lost,
}

/// What a replica has of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Which.
    pub extent: Extent,
    /// The highest version written to it.
    pub version: Version,
    /// It is in the activity log.
    pub is_active: bool,
    /// It was being written when the store stopped, and blocks of it may match no record.
    pub is_suspect: bool,
}

/// What a head asks of a replica, within a volume's generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask<B> {
    /// Open the generation: accept nothing of a lower one any more.
    Open {
        /// Of the record that the head serves under.
        edition: u64,
    },
    /// The head answers nothing any more and has nothing in flight: its grants count no longer, unless it opens the generation again
    /// before a higher one is asked for.
    Close,
    /// Make room for an extent.
    Reserve {
        /// Which.
        extent: Extent,
    },
    /// Write whole blocks.
    Write {
        /// Its number.
        version: Version,
        /// Where.
        span: Span,
        /// What.
        blocks: B,
        /// No other in-sync copy exists: what was there must survive a write that is cut short (I10).
        is_sole: bool,
    },
    /// Take blocks away: they read as zeros.
    Unmap {
        /// Its number.
        version: Version,
        /// Where.
        span: Span,
    },
    /// No good copy is left of these: that is to be remembered until they are written.
    Lose {
        /// Its number.
        version: Version,
        /// Where.
        span: Span,
    },
    /// Read.
    Read {
        /// Where.
        span: Span,
    },
    /// Read what is there, whether it matches its checksums or not: a block of which every copy is suspect is made from one of them.
    Salvage {
        /// Where.
        span: Span,
    },
    /// Say what these blocks are.
    Digest {
        /// Where.
        span: Span,
    },
    /// Say which extents of the volume there are, from this one on, as many as an answer holds.
    List {
        /// The first that is wanted.
        from: Extent,
    },
    /// Nothing but what [`Request::stable`] says.
    Stable,
}

/// A message to a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request<B> {
    /// Who is meant.
    pub to: Member,
    /// Which volume.
    pub volume: VolumeId,
    /// Under which head.
    pub generation: Generation,
    /// Which partition of the volume it is about.
    pub partition: u32,
    /// Under which owners of it; 0 where no extent is concerned.
    pub epoch: Epoch,
    /// The head's own number for it, not used again within a generation.
    pub id: u64,
    /// Every write up to this one is on all in-sync members.
    pub stable: Version,
    /// What is asked.
    pub ask: Ask<B>,
}

/// Why a replica does not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another head has come: the highest generation that was asked for.
    #[error("generation {0} has been asked for")]
    Replaced(Generation),
    /// The generation was never opened here.
    #[error("the generation is not open")]
    NotOpen,
    /// The partition has other owners now.
    #[error("the partition is in epoch {}", .0.0)]
    Epoch(Epoch),
    /// The head serves under a record older than one that was seen here (I14).
    #[error("the record was at edition {0} already")]
    Past(u64),
    /// The store is in another incarnation.
    #[error("the store is in another incarnation")]
    Stranger,
}

/// Why a replica could not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// What is there does not match its checksum.
    #[error("the checksum does not match")]
    Corrupt,
    /// No good copy was left, and that is remembered.
    #[error("no good copy is left")]
    Lost,
    /// No room for an extent.
    #[error("the store is full")]
    NoSpace,
    /// No memory at the moment.
    #[error("no memory is free")]
    NoMemory,
    /// The device failed.
    #[error("the device failed")]
    Device,
}

/// A replica's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply<B> {
    /// The generation is open.
    Opened {
        /// The highest version written there, or said to be stable.
        highest: Version,
        /// Extents in its activity log of which it was not said that all in-sync members have them.
        active: Vec<Held>,
    },
    /// A write, an unmap, a loss or a reservation is durable.
    Done,
    /// What was read.
    Blocks(B),
    /// What the blocks are, one for each.
    Digests(Vec<Digest>),
    /// What there is, by number.
    List {
        /// Extents.
        held: Vec<Held>,
        /// There are no more.
        is_whole: bool,
    },
    /// It could not be done.
    Failed(Fault),
    /// It was not done.
    Refused(Refusal),
}

/// A message from a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer<B> {
    /// Who answers.
    pub from: Member,
    /// Which volume.
    pub volume: VolumeId,
    /// The request's generation.
    pub generation: Generation,
    /// The request's number.
    pub id: u64,
    /// What it is.
    pub reply: Reply<B>,
}

/// A site of heads asks a site of replicas for a grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrantRequest {
    /// When it was sent, by the sender's clock: given back in the answer.
    pub asked_ns: u64,
}

/// It is granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantAnswer {
    /// As in the request.
    pub asked_ns: u64,
    /// Volumes of which it covers no generation below the one given: that one has been asked for.
    pub excluded: Vec<(VolumeId, Generation)>,
}

/// Whatever two sites say to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<B> {
    /// A head asks.
    Request(Request<B>),
    /// A replica answers.
    Answer(Answer<B>),
    /// A site asks for a grant.
    GrantRequest(GrantRequest),
    /// It is granted.
    GrantAnswer(GrantAnswer),
}

impl<B> Message<B> {
    /// The same with what `change` makes of its blocks, if it has any.
    pub fn map<C>(self, change: impl FnOnce(B) -> C) -> Message<C> {
        match self {
            Message::Request(request) => {
                let Request { to, volume, generation, partition, epoch, id, stable, ask } = request;
                let ask = ask.map(change);
                Message::Request(Request { to, volume, generation, partition, epoch, id, stable, ask })
            }
            Message::Answer(Answer { from, volume, generation, id, reply }) => {
                Message::Answer(Answer { from, volume, generation, id, reply: reply.map(change) })
            }
            Message::GrantRequest(request) => Message::GrantRequest(request),
            Message::GrantAnswer(answer) => Message::GrantAnswer(answer),
        }
    }
}

impl<B> Ask<B> {
    fn map<C>(self, change: impl FnOnce(B) -> C) -> Ask<C> {
        match self {
            Ask::Write { version, span, blocks, is_sole } => {
                Ask::Write { version, span, blocks: change(blocks), is_sole }
            }
            Ask::Open { edition } => Ask::Open { edition },
            Ask::Close => Ask::Close,
            Ask::Reserve { extent } => Ask::Reserve { extent },
            Ask::Unmap { version, span } => Ask::Unmap { version, span },
            Ask::Lose { version, span } => Ask::Lose { version, span },
            Ask::Read { span } => Ask::Read { span },
            Ask::Salvage { span } => Ask::Salvage { span },
            Ask::Digest { span } => Ask::Digest { span },
            Ask::List { from } => Ask::List { from },
            Ask::Stable => Ask::Stable,
        }
    }
}

impl<B> Reply<B> {
    fn map<C>(self, change: impl FnOnce(B) -> C) -> Reply<C> {
        match self {
            Reply::Blocks(blocks) => Reply::Blocks(change(blocks)),
            Reply::Opened { highest, active } => Reply::Opened { highest, active },
            Reply::Done => Reply::Done,
            Reply::Digests(digests) => Reply::Digests(digests),
            Reply::List { held, is_whole } => Reply::List { held, is_whole },
            Reply::Failed(fault) => Reply::Failed(fault),
            Reply::Refused(refusal) => Reply::Refused(refusal),
        }
    }
}
