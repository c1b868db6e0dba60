//! One connection between a core of heads and a core of replicas, without I/O: bytes of the peer, frames of the caller and
//! time go in; frames, pieces to be sent and verdicts come out.
//!
//! The connecting side has the heads: it sends requests and grant requests, the accepting side answers and grant answers. First
//! comes the [handshake], then frames ([`wire`](crate::wire)), each as it is, and between them *beats*, eight bytes of a side that
//! has nothing else to say. There is at most one connection for each pair of a connecting and an accepting core; the accepting
//! side admits a new one when everything of the old one has ended.
//!
//! What holds:
//! * No frame is given, and none is sent, before the other side has proved that it has the cluster's key.
//! * A frame is given whole and checked, blocks included, or the connection ends (I7).
//! * Memory is bounded, whatever the other side sends or leaves unread.
//! * A side that is not heard for [`SILENCE_NS`] is taken for dead. While it is this side that does not take what comes, or that slept, the other
//!   one is not called silent.
//! * Blocks that wait to be sent, and those of a frame that never became whole, are handed back at the end.

#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod handshake;
mod receiving;
mod sending;
#[cfg(test)]
mod tests;
mod waiting;

use zerocopy::IntoBytes;

use crate::terms::Site;
use crate::wire::Frame;
use handshake::{HEAD_BYTES, Handshake, HandshakeError, Identity, Nonce, Peer, Progress, RawHead, kind};
pub use receiving::{Destination, Receiver, StreamError};
pub use sending::{Outgoing, Sender};
pub use waiting::{WAIT_NS_MAX, Waiting};

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// How long a side is silent before it sends a beat.
pub const BEAT_NS: u64 = 300_000_000;
/// How long nothing is heard of a side before it is taken for dead.
pub const SILENCE_NS: u64 = 1_500_000_000;

/// The ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Has the heads, and made the connection.
    Connecting,
    /// Has the replicas.
    Accepting,
}

impl Side {
    /// The other end.
    #[must_use]
    pub fn other(self) -> Side {
        match self {
            Side::Connecting => Side::Accepting,
            Side::Accepting => Side::Connecting,
        }
    }

    /// Whether a frame is of those that this side sends.
    #[must_use]
    pub fn sends(self, frame: &Frame) -> bool {
        let side = match frame {
            Frame::Request(_) | Frame::GrantRequest(_) => Side::Connecting,
            Frame::Answer(_) | Frame::GrantAnswer(_) => Side::Accepting,
        };
        self == side
    }

    /// How it is written.
    fn code(self) -> u8 {
        match self {
            Side::Connecting => 1,
            Side::Accepting => 2,
        }
    }
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionError {
    /// The handshake failed.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The stream broke.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Nothing was heard for too long.
    #[error("nothing was heard of the other side for {} ms", SILENCE_NS / 1_000_000)]
    Silent,
}

/// What has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<B> {
    /// The connecting side has proved who it is: [`Connection::admit`] or [`Connection::refuse`] it.
    Proved(Peer),
    /// The connection is open: frames may be sent.
    Open(Peer),
    /// A frame with its blocks.
    Frame(Frame, B),
}

/// Where a connection is.
#[derive(Debug)]
enum Phase {
    Handshake(Box<Handshake>),
    Open(Peer),
    /// A refusal may still be on its way out.
    Failed(Box<Handshake>),
    Ended,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Connection<B> {
    side: Side,
    phase: Phase,
    receiver: Receiver<B>,
    sender: Sender<B>,
    heard_ns: u64,
    sent_ns: u64,
}

impl<B: Default> Connection<B> {
    /// The connecting end of a connection to `to`. `attempt` grows with every one of this start; up to `waiting_bytes_max` wait to
    /// be sent.
    #[must_use]
    pub fn connect(
        own: &Identity,
        to: Site,
        attempt: u64,
        nonce: Nonce,
        waiting_bytes_max: usize,
        now_ns: u64,
    ) -> Connection<B> {
        let handshake = Handshake::connect(own, to, attempt, nonce, now_ns);
        Connection::new(Side::Connecting, handshake, waiting_bytes_max, now_ns)
    }

    /// The accepting end.
    #[must_use]
    pub fn accept(nonce: Nonce, waiting_bytes_max: usize, now_ns: u64) -> Connection<B> {
        Connection::new(Side::Accepting, Handshake::accept(nonce, now_ns), waiting_bytes_max, now_ns)
    }

    fn new(side: Side, handshake: Handshake, waiting_bytes_max: usize, now_ns: u64) -> Connection<B> {
        Connection {
            side,
            phase: Phase::Handshake(Box::new(handshake)),
            receiver: Receiver::new(side.other()),
            sender: Sender::new(waiting_bytes_max),
            heard_ns: now_ns,
            sent_ns: now_ns,
        }
    }

    /// Which end this is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.side
    }

    /// Who is at the other end, when frames may be sent.
    #[must_use]
    pub fn peer(&self) -> Option<Peer> {
        match &self.phase {
            Phase::Open(peer) => Some(*peer),
            _ => None,
        }
    }

    /// Takes bytes of the other side up to what is to be told, or all of them, and says how many. Those that were not taken
    /// are to be given again, first: after what was told is dealt with, or when there is memory again. Whoever has bytes here that were not
    /// taken is not silent: giving them again counts as hearing.
    ///
    /// # Errors
    /// [`ConnectionError`]: the connection is to be ended. A refusal may be [to be sent](Connection::fill) before it is closed.
    pub fn receive<D: Destination<Blocks = B>>(
        &mut self,
        own: &Identity,
        bytes: &[u8],
        destination: &mut D,
        now_ns: u64,
    ) -> Result<(usize, Option<Received<B>>), ConnectionError> {
        if !bytes.is_empty() {
            self.heard_ns = now_ns;
        }
        match &mut self.phase {
            Phase::Handshake(handshake) => match handshake.take(own, bytes) {
                Ok((taken, Progress::Waiting)) => Ok((taken, None)),
                Ok((taken, Progress::Proved(peer))) => Ok((taken, Some(Received::Proved(peer)))),
                Ok((taken, Progress::Open(peer))) => {
                    self.phase = Phase::Open(peer);
                    Ok((taken, Some(Received::Open(peer))))
                }
                Err(error) => Err(self.fail(error)),
            },
            Phase::Open(_) => match self.receiver.take(bytes, destination) {
                Ok((taken, frame)) => {
                    Ok((taken, frame.map(|(frame, blocks)| Received::Frame(frame, blocks))))
                }
                Err(error) => {
                    self.phase = Phase::Ended;
                    Err(error.into())
                }
            },
            Phase::Failed(_) | Phase::Ended => Ok((bytes.len(), None)),
        }
    }

    /// Whether the last bytes were left because there was no memory for a block.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        self.receiver.is_starved()
    }

    /// Admits the connecting side, which has proved who it is: frames may come and be sent. Gives who it is; nothing when there is
    /// nobody to admit.
    pub fn admit(&mut self, now_ns: u64) -> Option<Peer> {
        let Phase::Handshake(handshake) = &mut self.phase else { return None };
        let peer = handshake.admit()?;
        // The welcome goes before all frames, and as a refusal would.
        self.sender.lead(handshake.outgoing());
        self.phase = Phase::Open(peer);
        self.heard_ns = now_ns;
        Some(peer)
    }

    /// Refuses the other side for a reason that is the caller's; what it is told is [to be sent](Connection::fill).
    pub fn refuse(&mut self, own: &Identity, error: HandshakeError) {
        if let Phase::Handshake(handshake) = &mut self.phase {
            handshake.refuse(own, error);
            self.fail(error);
        }
    }

    /// Takes a frame to be sent, with its blocks.
    ///
    /// # Errors
    /// Both, when too much waits or the connection is not open.
    ///
    /// # Panics
    /// If it is a frame that the other side sends.
    #[expect(
        clippy::result_large_err,
        reason = "what is refused goes back as it came, without an allocation"
    )]
    pub fn send(&mut self, frame: Frame, blocks: B) -> Result<(), (Frame, B)> {
        assert!(self.side.sends(&frame), "requests are of the connecting side, answers of the accepting one");
        if self.peer().is_none() { Err((frame, blocks)) } else { self.sender.push(frame, blocks) }
    }

    /// Bytes of frames that wait to be sent.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.sender.waiting_bytes()
    }

    /// Whether there is something to be sent now.
    #[must_use]
    pub fn has_to_send(&self, now_ns: u64) -> bool {
        match &self.phase {
            Phase::Handshake(handshake) | Phase::Failed(handshake) => !handshake.outgoing().is_empty(),
            Phase::Open(_) => !self.sender.is_empty() || now_ns >= self.beat_ns(),
            Phase::Ended => false,
        }
    }

    /// Moves what is to be sent, as much as there is room for: after [`Connection::receive`] has failed a refusal, if any.
    pub fn fill(&mut self, out: &mut impl Outgoing<B>, now_ns: u64) {
        match &mut self.phase {
            Phase::Handshake(handshake) | Phase::Failed(handshake) => {
                if !handshake.outgoing().is_empty() && out.room() > 0 {
                    out.bytes(handshake.outgoing());
                    handshake.sent();
                }
            }
            Phase::Open(_) => {
                let room = out.room();
                self.sender.fill(out);
                if out.room() < room {
                    self.sent_ns = now_ns;
                } else if now_ns >= self.beat_ns() && room > 0 && self.sender.is_empty() {
                    out.bytes(RawHead::new(kind::BEAT, self.side, HEAD_BYTES).as_bytes());
                    self.sent_ns = now_ns;
                }
            }
            Phase::Ended => {}
        }
    }

    /// Notes that this side has not listened: the other one is not silent.
    pub fn hold(&mut self, now_ns: u64) {
        self.heard_ns = now_ns;
    }

    /// Looks at the time.
    ///
    /// # Errors
    /// [`ConnectionError`], as for [`Connection::receive`].
    pub fn tick(&mut self, now_ns: u64) -> Result<(), ConnectionError> {
        match &self.phase {
            Phase::Handshake(handshake) if now_ns >= handshake.deadline_ns() => {
                Err(self.fail(HandshakeError::Late))
            }
            Phase::Open(_) if now_ns >= self.heard_ns.saturating_add(SILENCE_NS) => {
                self.phase = Phase::Ended;
                Err(ConnectionError::Silent)
            }
            _ => Ok(()),
        }
    }

    /// When [`Connection::tick`] or [`Connection::fill`] has something to do though nothing else happens.
    #[must_use]
    pub fn deadline_ns(&self) -> u64 {
        match &self.phase {
            Phase::Handshake(handshake) => handshake.deadline_ns(),
            Phase::Open(_) => self.beat_ns().min(self.heard_ns.saturating_add(SILENCE_NS)),
            Phase::Failed(_) | Phase::Ended => u64::MAX,
        }
    }

    /// Ends it: a frame that came in part is given back to its memory, and what waited to be sent is to be
    /// [taken back](Connection::take_unsent).
    pub fn end<D: Destination<Blocks = B>>(&mut self, destination: &mut D) {
        self.phase = Phase::Ended;
        self.receiver.end(destination);
    }

    /// Blocks of a frame that waited to be sent and will not be; frame by frame.
    pub fn take_unsent(&mut self) -> Option<B> {
        self.sender.take_unsent()
    }

    fn beat_ns(&self) -> u64 {
        self.sent_ns.saturating_add(BEAT_NS)
    }

    fn fail(&mut self, error: HandshakeError) -> ConnectionError {
        if let Phase::Handshake(handshake) = std::mem::replace(&mut self.phase, Phase::Ended) {
            self.phase = Phase::Failed(handshake);
        }
        error.into()
    }
}
