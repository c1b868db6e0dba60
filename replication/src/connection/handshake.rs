//! How two cores find out whether they may talk: before a connection has frames, each side says who it is and proves that it has
//! the cluster's key. Without I/O: bytes and time in, bytes and a verdict out.
//!
//! ```text
//!  connecting side                     accepting side
//!    hello  ------------------------------>
//!           <------------------------------  hello, proof
//!    proof  ------------------------------>
//!           <------------------------------  welcome, when the caller admits it
//! ```
//!
//! Each may send a refusal in place of its next message, and closes then. All numbers are little-endian; every message begins
//! with the same eight bytes:
//!
//! ```text
//!  0  u32       magic, "TRH1"
//!  4  u8        what follows: 1 hello, 2 proof, 3 welcome, 4 refusal, 5 beat
//!  5  u8        who speaks: 1 the connecting side, 2 the accepting one
//!  6  u16       bytes of the message, these eight included
//! ```
//!
//! Hello, 128 bytes. A later version may append to it, up to 1024 bytes: who does not know what is behind skips it.
//!
//! ```text
//!  8  u16       lowest version of frames that is spoken
//! 10  u16       highest
//! 12  u16       core that speaks
//! 14  u16       core that is meant
//! 16  16 bytes  cluster
//! 32  16 bytes  node that speaks
//! 48  16 bytes  node that is meant
//! 64  16 bytes  start: random, made once by each start of the process that speaks
//! 80  u64       number of the attempt, growing within a start; the accepting side repeats it
//! 88  u64       0
//! 96  32 bytes  nonce: random, never used again
//! ```
//!
//! Proof, 40 bytes: behind the eight, BLAKE3 keyed with a key of the speaker's role, over the connecting side's hello and the
//! accepting side's, as they were sent. The key of a role is BLAKE3's `derive_key` of the cluster's key, in the context
//! `torus connection: the connecting side proves the key of its cluster`, or `accepting` in place of `connecting`.
//!
//! Welcome, 8 bytes: frames may follow, in the highest version that both speak.
//!
//! Refusal, 40 bytes:
//!
//! ```text
//!  8  u16       why: 1 version, 2 cluster, 3 not the one meant, 4 the same node, 5 key, 6 an older attempt, 7 no room
//! 10  u16       lowest version that the speaker speaks
//! 12  u16       highest
//! 14  u16       core that speaks, for 3; else 0
//! 16  16 bytes  node that speaks, for 3; else 0
//! 32  u64       0
//! ```
//!
//! Beat, 8 bytes: not of the handshake; between frames, so that a silent side is known to live.
//!
//! What holds:
//! * Nothing of a peer is acted on before its proof is verified, and no side proves anything twice with one nonce of its own. A proof
//!   of one role is none of the other, so that none can be sent back to who made it.
//! * Versions are under the proof: nobody on the way can talk both sides down. A refusal is not proved: it ends an attempt and
//!   does no more.
//! * A side takes memory for one message of the other at a time, and keeps its hello: at most 2 KiB. It ends at its deadline.

pub use cluster_map::ClusterKey;
use cluster_map::{ClusterId, NodeId};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Side;
use crate::terms::Site;

/// How long a handshake may take, the wait for being admitted included: who is not admitted by then comes again.
pub const HANDSHAKE_NS: u64 = 1_000_000_000;

pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"TRH1");
pub(super) const HEAD_BYTES: usize = size_of::<RawHead>();
const HELLO_BYTES: usize = size_of::<RawHello>();
const HELLO_BYTES_MAX: usize = 1024;
const PROOF_BYTES: usize = size_of::<RawProof>();
const REFUSAL_BYTES: usize = size_of::<RawRefusal>();

pub(super) mod kind {
    pub(in super::super) const HELLO: u8 = 1;
    pub(in super::super) const PROOF: u8 = 2;
    pub(in super::super) const WELCOME: u8 = 3;
    pub(in super::super) const REFUSAL: u8 = 4;
    pub(in super::super) const BEAT: u8 = 5;
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct RawHead {
    pub(super) magic: U32,
    pub(super) kind: u8,
    pub(super) side: u8,
    pub(super) len_bytes: U16,
}
const _: () = assert!(HEAD_BYTES == 8);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHello {
    head: RawHead,
    lowest: U16,
    highest: U16,
    from_core: U16,
    to_core: U16,
    cluster: [u8; 16],
    from_node: [u8; 16],
    to_node: [u8; 16],
    start: [u8; 16],
    attempt: U64,
    reserved: U64,
    nonce: [u8; 32],
}
const _: () = assert!(HELLO_BYTES == 128);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawProof {
    head: RawHead,
    proof: [u8; 32],
}
const _: () = assert!(PROOF_BYTES == 40);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRefusal {
    head: RawHead,
    code: U16,
    lowest: U16,
    highest: U16,
    core: U16,
    node: [u8; 16],
    reserved: U64,
}
const _: () = assert!(REFUSAL_BYTES == 40);

impl RawHead {
    pub(super) fn new(kind: u8, side: Side, len_bytes: usize) -> RawHead {
        RawHead {
            magic: MAGIC.into(),
            kind,
            side: side.code(),
            len_bytes: u16::try_from(len_bytes).expect("at most HELLO_BYTES_MAX").into(),
        }
    }
}

/// Which start of a process: 128 random bits made when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Start(pub [u8; 16]);

/// 256 random bits, to be used for one handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub [u8; 32]);

/// Versions of the frames that a side speaks, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The lowest.
    pub lowest: u16,
    /// The highest.
    pub highest: u16,
}

impl Versions {
    /// What this program speaks.
    pub const OWN: Versions = Versions { lowest: crate::wire::VERSION, highest: crate::wire::VERSION };

    /// The highest version that both speak.
    #[must_use]
    pub fn common(self, other: Versions) -> Option<u16> {
        let highest = self.highest.min(other.highest);
        (highest >= self.lowest.max(other.lowest)).then_some(highest)
    }
}

impl std::fmt::Display for Versions {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} to {}", self.lowest, self.highest)
    }
}

/// Who a side is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its cluster.
    pub cluster: ClusterId,
    /// The cluster's key.
    pub key: ClusterKey,
    /// Its node and core.
    pub site: Site,
    /// This start of its process.
    pub start: Start,
    /// What it speaks.
    pub versions: Versions,
}

/// Who the other side has proved to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its node and core.
    pub site: Site,
    /// Which start of its process.
    pub start: Start,
    /// Which attempt of that start to connect here; of two the later one counts.
    pub attempt: u64,
    /// The version of frames that both speak.
    pub version: u16,
}

/// Why the other side does not want to talk, as it says; nothing proves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No version in common.
    #[error("it speaks versions {0} only: upgrade the older node")]
    Version(Versions),
    /// Another cluster.
    #[error("it belongs to another cluster: check the address")]
    Cluster,
    /// Somebody else is there.
    #[error("it is {0}: check the address in the record of the node")]
    Site(Site),
    /// It is the same node.
    #[error("it is this very node: two nodes have one id, or its address is this one's")]
    Oneself,
    /// Another key.
    #[error("the key of the cluster is another one there: give both nodes the same")]
    Key,
    /// A later attempt is known there.
    #[error("a later connection of this core is known there")]
    Older,
    /// Too many connections.
    #[error("it has no room for another connection")]
    Room,
}

/// Why a handshake came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// What is there does not speak this protocol.
    #[error("no data plane of Torus answers there: check address and port")]
    Stranger,
    /// A message is not what it must be: which part.
    #[error("{0} has a value without a meaning")]
    Value(&'static str),
    /// No version in common.
    #[error("this node speaks versions {own} and the other one {peer}: upgrade the older one")]
    Version {
        /// Ours.
        own: Versions,
        /// Theirs.
        peer: Versions,
    },
    /// Another cluster.
    #[error("the node belongs to cluster {0}: check the address, or remove the node there first")]
    Cluster(ClusterId),
    /// Somebody else answers.
    #[error("{reached} answers in place of {wanted}: check the address in the record of the node")]
    Site {
        /// Who was to be reached.
        wanted: Site,
        /// Who was.
        reached: Site,
    },
    /// Somebody else was to be reached.
    #[error("{from} wants {wanted}, which is not here: check the address that it has")]
    Unmeant {
        /// Who connected.
        from: Site,
        /// Who is wanted.
        wanted: Site,
    },
    /// The other side is of this node.
    #[error("this node has reached itself: two nodes have one id, or the address of a peer is this one's")]
    Oneself,
    /// The proof does not fit.
    #[error("the other side does not have the key of the cluster: give both nodes the same")]
    Key,
    /// A later attempt is known.
    #[error("a later connection of the same core is known")]
    Older,
    /// Too many connections.
    #[error("there is no room for another connection")]
    Room,
    /// Nothing came of it in time.
    #[error("the handshake was not finished within its time")]
    Late,
    /// The other side said no.
    #[error("the other side refuses: {0}")]
    Refused(Refusal),
}

/// How far a handshake is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// More bytes are needed.
    Waiting,
    /// The accepting side knows who is there, and waits for [`Handshake::admit`].
    Proved(Peer),
    /// Frames follow.
    Open(Peer),
}

/// What a side waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Hello,
    Proof,
    Admission,
    Welcome,
    Done,
}

/// What a hello says.
#[derive(Debug, Clone, Copy)]
struct Hello {
    versions: Versions,
    cluster: ClusterId,
    from: Site,
    to: Site,
    start: Start,
    attempt: u64,
}

/// One side's handshake.
#[derive(Debug)]
pub struct Handshake {
    side: Side,
    step: Step,
    /// Who is to be reached, and the number of the attempt: the connecting side's.
    wanted: Option<(Site, u64)>,
    nonce: Nonce,
    peer: Option<Peer>,
    incoming: Vec<u8>,
    /// The connecting side's hello, and behind it the accepting side's, as they were sent.
    transcript: Vec<u8>,
    outgoing: Vec<u8>,
    deadline_ns: u64,
}

impl Handshake {
    /// The connecting side's; its hello is to be sent.
    #[must_use]
    pub fn connect(own: &Identity, to: Site, attempt: u64, nonce: Nonce, now_ns: u64) -> Handshake {
        let mut handshake = Handshake::new(Side::Connecting, Some((to, attempt)), nonce, now_ns);
        handshake.say_hello(own, to, attempt);
        handshake
    }

    /// The accepting side's.
    #[must_use]
    pub fn accept(nonce: Nonce, now_ns: u64) -> Handshake {
        Handshake::new(Side::Accepting, None, nonce, now_ns)
    }

    fn new(side: Side, wanted: Option<(Site, u64)>, nonce: Nonce, now_ns: u64) -> Handshake {
        Handshake {
            side,
            step: Step::Hello,
            wanted,
            nonce,
            peer: None,
            incoming: Vec::new(),
            transcript: Vec::new(),
            outgoing: Vec::new(),
            deadline_ns: now_ns.saturating_add(HANDSHAKE_NS),
        }
    }

    /// Takes bytes of the other side, and says how many and how far it is. What is behind a message that ends a step is not taken:
    /// it is of the frames, or to be given again.
    ///
    /// # Errors
    /// [`HandshakeError`]: nothing more is taken; a refusal for the other side may be among what is [to be sent](Handshake::outgoing).
    pub fn take(&mut self, own: &Identity, bytes: &[u8]) -> Result<(usize, Progress), HandshakeError> {
        let mut taken = 0;
        while !matches!(self.step, Step::Admission | Step::Done) {
            let (count, is_whole) = self.gather(&bytes[taken..])?;
            taken += count;
            if !is_whole {
                break;
            }
            let message = std::mem::take(&mut self.incoming);
            self.message(own, &message)?;
            if let Some(progress) = self.reached() {
                return Ok((taken, progress));
            }
        }
        Ok((taken, Progress::Waiting))
    }

    /// What is to be sent.
    #[must_use]
    pub fn outgoing(&self) -> &[u8] {
        &self.outgoing
    }

    /// All of it has been taken to be sent.
    pub fn sent(&mut self) {
        self.outgoing.clear();
    }

    /// Lets the other side, which has proved who it is, begin with frames: a welcome is to be sent. Gives who it is; nothing when it
    /// has not proved anything, or was let in before.
    pub fn admit(&mut self) -> Option<Peer> {
        if self.step != Step::Admission {
            return None;
        }
        self.step = Step::Done;
        self.outgoing.extend_from_slice(RawHead::new(kind::WELCOME, self.side, HEAD_BYTES).as_bytes());
        self.peer
    }

    /// Refuses the other side, for a reason that is the caller's.
    pub fn refuse(&mut self, own: &Identity, error: HandshakeError) {
        let code = match error {
            HandshakeError::Version { .. } => 1,
            HandshakeError::Cluster(_) => 2,
            HandshakeError::Unmeant { .. } | HandshakeError::Site { .. } => 3,
            HandshakeError::Oneself => 4,
            HandshakeError::Key => 5,
            HandshakeError::Older => 6,
            HandshakeError::Room => 7,
            // Nobody is there who would understand.
            HandshakeError::Stranger
            | HandshakeError::Value(_)
            | HandshakeError::Late
            | HandshakeError::Refused(_) => return,
        };
        let site = if code == 3 { own.site } else { Site { node: NodeId([0; 16]), core: 0 } };
        let raw = RawRefusal {
            head: RawHead::new(kind::REFUSAL, self.side, REFUSAL_BYTES),
            code: code.into(),
            lowest: own.versions.lowest.into(),
            highest: own.versions.highest.into(),
            core: site.core.into(),
            node: site.node.0,
            reserved: 0.into(),
        };
        self.step = Step::Done;
        self.outgoing.extend_from_slice(raw.as_bytes());
    }

    /// When it has failed if it is not finished.
    #[must_use]
    pub fn deadline_ns(&self) -> u64 {
        self.deadline_ns
    }

    /// Whether it is the turn of the caller, who has to admit or refuse.
    #[must_use]
    pub fn waits_for_admission(&self) -> bool {
        self.step == Step::Admission
    }

    /// How far it is when that is far enough to be told.
    fn reached(&self) -> Option<Progress> {
        match self.step {
            Step::Admission => self.peer.map(Progress::Proved),
            Step::Done => self.peer.map(Progress::Open),
            Step::Hello | Step::Proof | Step::Welcome => None,
        }
    }

    /// Takes bytes until a message is whole.
    fn gather(&mut self, bytes: &[u8]) -> Result<(usize, bool), HandshakeError> {
        let mut taken = 0;
        if self.incoming.len() < HEAD_BYTES {
            taken = (HEAD_BYTES - self.incoming.len()).min(bytes.len());
            self.incoming.extend_from_slice(&bytes[..taken]);
        }
        let Ok((head, _)) = RawHead::read_from_prefix(&self.incoming) else { return Ok((taken, false)) };
        let len = self.check_head(head)?;
        let more = (len - self.incoming.len()).min(bytes.len() - taken);
        self.incoming.extend_from_slice(&bytes[taken..taken + more]);
        Ok((taken + more, self.incoming.len() == len))
    }

    /// Whether a message may come now, and how long it is.
    fn check_head(&self, head: RawHead) -> Result<usize, HandshakeError> {
        if head.magic.get() != MAGIC {
            return Err(HandshakeError::Stranger);
        }
        if head.side != self.side.other().code() {
            return Err(HandshakeError::Value("who speaks"));
        }
        let lengths = match (head.kind, self.step) {
            (kind::HELLO, Step::Hello) => HELLO_BYTES..=HELLO_BYTES_MAX,
            (kind::PROOF, Step::Proof) => PROOF_BYTES..=PROOF_BYTES,
            (kind::WELCOME, Step::Welcome) => HEAD_BYTES..=HEAD_BYTES,
            (kind::REFUSAL, _) => REFUSAL_BYTES..=REFUSAL_BYTES,
            _ => return Err(HandshakeError::Value("the kind of message")),
        };
        let len = usize::from(head.len_bytes.get());
        if lengths.contains(&len) { Ok(len) } else { Err(HandshakeError::Value("the length of a message")) }
    }

    /// A whole message, of a kind that may come now.
    fn message(&mut self, own: &Identity, message: &[u8]) -> Result<(), HandshakeError> {
        match message[4] {
            kind::HELLO => {
                let result = self.hello(own, message);
                if let Err(error) = result {
                    self.refuse(own, error);
                }
                result
            }
            kind::PROOF => {
                let result = self.proof(own, message);
                if let Err(error) = result {
                    self.refuse(own, error);
                }
                result
            }
            kind::REFUSAL => Err(refusal(message)),
            _ => {
                self.step = Step::Done;
                Ok(())
            }
        }
    }

    fn hello(&mut self, own: &Identity, message: &[u8]) -> Result<(), HandshakeError> {
        let hello = decode_hello(message)?;
        let version = own
            .versions
            .common(hello.versions)
            .ok_or(HandshakeError::Version { own: own.versions, peer: hello.versions })?;
        if hello.cluster != own.cluster {
            return Err(HandshakeError::Cluster(hello.cluster));
        }
        if hello.from.node == own.site.node {
            return Err(HandshakeError::Oneself);
        }
        if let Some((wanted, attempt)) = self.wanted {
            if hello.from != wanted {
                return Err(HandshakeError::Site { wanted, reached: hello.from });
            }
            if hello.attempt != attempt {
                return Err(HandshakeError::Value("the number of the attempt"));
            }
        }
        if hello.to != own.site {
            return Err(HandshakeError::Unmeant { from: hello.from, wanted: hello.to });
        }
        self.peer = Some(Peer { site: hello.from, start: hello.start, attempt: hello.attempt, version });
        self.step = Step::Proof;
        self.transcript.extend_from_slice(message);
        if self.side == Side::Accepting {
            self.say_hello(own, hello.from, hello.attempt);
            self.prove(own);
        }
        Ok(())
    }

    fn proof(&mut self, own: &Identity, message: &[u8]) -> Result<(), HandshakeError> {
        let raw = RawProof::read_from_bytes(message).map_err(|_| HandshakeError::Value("a proof"))?;
        // Hashes are compared in a time that does not depend on where they differ.
        if proof_of(&own.key, self.side.other(), &self.transcript) != blake3::Hash::from_bytes(raw.proof) {
            return Err(HandshakeError::Key);
        }
        if self.side == Side::Connecting {
            self.prove(own);
            self.step = Step::Welcome;
        } else {
            self.step = Step::Admission;
        }
        Ok(())
    }

    fn say_hello(&mut self, own: &Identity, to: Site, attempt: u64) {
        let raw = RawHello {
            head: RawHead::new(kind::HELLO, self.side, HELLO_BYTES),
            lowest: own.versions.lowest.into(),
            highest: own.versions.highest.into(),
            from_core: own.site.core.into(),
            to_core: to.core.into(),
            cluster: own.cluster.0,
            from_node: own.site.node.0,
            to_node: to.node.0,
            start: own.start.0,
            attempt: attempt.into(),
            reserved: 0.into(),
            nonce: self.nonce.0,
        };
        self.transcript.extend_from_slice(raw.as_bytes());
        self.outgoing.extend_from_slice(raw.as_bytes());
    }

    fn prove(&mut self, own: &Identity) {
        let proof = *proof_of(&own.key, self.side, &self.transcript).as_bytes();
        let raw = RawProof { head: RawHead::new(kind::PROOF, self.side, PROOF_BYTES), proof };
        self.outgoing.extend_from_slice(raw.as_bytes());
    }
}

fn proof_of(key: &ClusterKey, side: Side, transcript: &[u8]) -> blake3::Hash {
    let context = match side {
        Side::Connecting => "torus connection: the connecting side proves the key of its cluster",
        Side::Accepting => "torus connection: the accepting side proves the key of its cluster",
    };
    blake3::keyed_hash(&blake3::derive_key(context, &key.0), transcript)
}

fn decode_hello(message: &[u8]) -> Result<Hello, HandshakeError> {
    let (raw, _) =
        RawHello::read_from_prefix(message).map_err(|_| HandshakeError::Value("the length of a message"))?;
    let versions = Versions { lowest: raw.lowest.get(), highest: raw.highest.get() };
    if versions.lowest > versions.highest {
        return Err(HandshakeError::Value("the versions"));
    }
    Ok(Hello {
        versions,
        cluster: ClusterId(raw.cluster),
        from: Site { node: NodeId(raw.from_node), core: raw.from_core.get() },
        to: Site { node: NodeId(raw.to_node), core: raw.to_core.get() },
        start: Start(raw.start),
        attempt: raw.attempt.get(),
    })
}

fn refusal(message: &[u8]) -> HandshakeError {
    let Ok(raw) = RawRefusal::read_from_bytes(message) else { return HandshakeError::Value("a refusal") };
    HandshakeError::Refused(match raw.code.get() {
        1 => Refusal::Version(Versions { lowest: raw.lowest.get(), highest: raw.highest.get() }),
        2 => Refusal::Cluster,
        3 => Refusal::Site(Site { node: NodeId(raw.node), core: raw.core.get() }),
        4 => Refusal::Oneself,
        5 => Refusal::Key,
        6 => Refusal::Older,
        7 => Refusal::Room,
        _ => return HandshakeError::Value("a refusal"),
    })
}
