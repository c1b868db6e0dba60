//! The head of one volume: orders, numbers and spreads its writes, reads from whoever is in sync, and keeps the copies equal.
//!
//! * this file – what a head consists of, requests of initiators, and their way to the replicas and back.
//! * `peers` – the replicas as the head sees them: connections, openings, silence, ejection.
//! * `equalize` – blocks that may differ between copies are made equal, under the head's own numbers and locks.
//! * `resync` – members that missed writes are brought up to date and taken in again.
//! * `leaving` – it hands over to another head that is wished for.
//!
//! Invariants (I1, I5 to I9):
//! * A request is begun, and answered, only while grants of every needed owner of its extents cover the volume, and when each of them keeps
//!   durably that the record says so since this edition (I14): whoever is in sync can tell a record of the past.
//! * A write is answered well only when every needed owner has it durably; it holds its blocks until everybody it was sent to, learners
//!   included, has answered or left. Nothing else touches a block meanwhile.
//! * A member leaves only by the volume's record. Its mark is below every write that it may miss.
//! * No block of a region that an in-sync member had in its activity log when this generation began is read or written before it is
//!   equal on all of them.
//! * The stable mark is below every write that is not on all needed owners, and below every region that is not equal yet.
//! * A failed read of one copy is never the end: others are asked, and what was bad is made good from them.
//!
//! Requests of initiators never conflict with each other: their caller orders them.

mod equalize;
mod leaving;
mod peers;
mod resync;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use cluster_map::{NodeId, VolumeId};
use smallvec::SmallVec;

pub(crate) use self::equalize::PIECE_BYTES;
use self::equalize::{Equalize, Fix, Remedy};
use self::leaving::Leaving;
use self::peers::Peer;
use crate::grants::Grants;
use crate::membership::{Change, Membership, Owner, Record};
use crate::message::{Answer, Ask, Fault, Memory, Refusal, Reply, Request};
use crate::mutants::{self, Mutant};
use crate::terms::{EXTENT_BLOCKS, Epoch, Extent, Generation, Member, Site, Span, Version};

/// Bytes of a block.
const BLOCK_BYTES: usize = 4096;
/// For how long a replica may be silent while something waits for it.
pub const SILENCE_NS: u64 = 1_000_000_000;
/// After how long another copy is asked for what is to be read.
const READ_PATIENCE_NS: u64 = 300_000_000;
/// How soon what has failed without an ejection is tried again.
const RETRY_NS: u64 = 200_000_000;

/// The head's number for a request of an initiator; not used again, so that a late answer finds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct OpId(u64);

/// The same for a job of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct JobId(u64);

/// The caller's number for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(pub u64);

/// How a request of an initiator ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No copy of a block can be read.
    #[error("no good copy can be read")]
    Unreadable,
    /// There is no room for an extent on some owner.
    #[error("a store is full")]
    NoSpace,
    /// The only copy could not be written.
    #[error("the only copy could not be written")]
    Unwritable,
}

/// Why a head is none any more. What it was asked and did not answer ends with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Another one has come.
    Replaced,
    /// It serves under metadata of the past.
    Past,
}

/// What a head wants done.
#[derive(Debug, PartialEq, Eq)]
pub enum Output<B> {
    /// Send a request to the site that has the member.
    Send(Site, Request<B>),
    /// Answer a request.
    Answer {
        /// Which.
        token: Token,
        /// How it ended.
        result: Result<(), Failure>,
        /// What was read.
        blocks: Option<B>,
    },
    /// Have the record changed, if it is still at this revision, and tell by [`Head::record`] what it has become.
    Change {
        /// Of the record that it is computed from.
        revision: u64,
        /// What is to change.
        change: Change,
    },
    /// Look at the partitions again: a replica knows newer owners.
    Refresh,
    /// A piece of a member that is brought up to date waits for [`Head::resync`].
    Resync,
    /// It has given its grants back and waits for its successor, or does so no longer.
    HandedOver(bool),
    /// Nobody wants these any more.
    Release(B),
    /// It is none any more.
    End(End),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write { keep_head_bytes: u16, keep_tail_bytes: u16 },
    Unmap,
}

/// Where a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its blocks are held, or not yet equal, or grants are missing.
    Waiting,
    /// The old content of blocks that are written in part is read.
    Filling,
    /// Room is made for extents.
    Reserving,
    /// It has been sent.
    Sent,
}

/// Whoever a write was sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    member: Member,
    is_done: bool,
}

/// A read of blocks, from one copy after the other.
#[derive(Debug)]
struct Reading<B> {
    span: Span,
    /// Of its first block among the request's.
    offset: usize,
    /// Who was asked and has not answered, and when.
    asked: Option<(Member, u64)>,
    /// Who could not give it.
    failed: SmallVec<[Member; 4]>,
    /// Somebody's copy is bad.
    is_damaged: bool,
    got: Option<B>,
}

/// A part of a write, in one extent.
#[derive(Debug)]
struct Piece {
    span: Span,
    offset: usize,
    version: Version,
    targets: SmallVec<[Target; 4]>,
}

#[derive(Debug)]
struct Op<B> {
    token: Option<Token>,
    kind: Kind,
    range: Range<u64>,
    stage: Stage,
    payload: Option<B>,
    readings: SmallVec<[Reading<B>; 2]>,
    pieces: SmallVec<[Piece; 2]>,
    failure: Option<Failure>,
}

/// What a request to a replica was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purport {
    Open,
    Read { op: OpId, reading: usize },
    Reserve { op: OpId, piece: usize },
    Write { op: OpId, piece: usize },
    EqualizeDigest { job: JobId, round: u32 },
    EqualizeRead { job: JobId, round: u32 },
    EqualizeWrite { job: JobId },
    List { learner: Member, candidacy: u64, from: Extent },
    Stable,
    Close,
}

impl Purport {
    /// Whether it changes something at the replica: who does not answer it may have it or not.
    fn is_write(self) -> bool {
        matches!(self, Purport::Write { .. } | Purport::EqualizeWrite { .. } | Purport::Reserve { .. })
    }
}

/// A volume's head.
#[derive(Debug)]
pub struct Head<B> {
    node: NodeId,
    generation: Generation,
    membership: Membership,
    peers: BTreeMap<Member, Peer>,
    ops: BTreeMap<OpId, Op<B>>,
    /// Requests that wait, in order.
    waiting: VecDeque<OpId>,
    jobs: BTreeMap<JobId, Equalize<B>>,
    /// Extents that may differ between in-sync copies, with the lowest version that anybody has of each; and whether a job is at it.
    unequal: BTreeMap<Extent, (Version, bool)>,
    /// Extents for which every owner has room.
    reserved: BTreeSet<Extent>,
    /// Blocks to be made good.
    repairs: VecDeque<Span>,
    next_version: Version,
    next_request: u64,
    /// Of requests and jobs.
    next_id: u64,
    started_ns: u64,
    now_ns: u64,
    retry_at_ns: u64,
    survey_at_ns: u64,
    /// When an idle head last said what is stable.
    stable_told: Version,
    leaving: Leaving,
    /// Since which edition the record has had these members, in sync as they are.
    members_since: u64,
    /// It has been able to answer.
    has_served: bool,
    outputs: VecDeque<Output<B>>,
    end: Option<End>,
}

impl<B> Head<B> {
    /// Begins to be the head, under a generation that the volume's record names. `unequal` stays unknown until replicas have opened.
    #[must_use]
    pub fn new(node: NodeId, generation: Generation, membership: Membership, now_ns: u64) -> Head<B> {
        let mut head = Head {
            node,
            generation,
            members_since: membership.record().edition,
            membership,
            peers: BTreeMap::new(),
            ops: BTreeMap::new(),
            waiting: VecDeque::new(),
            jobs: BTreeMap::new(),
            unequal: BTreeMap::new(),
            reserved: BTreeSet::new(),
            repairs: VecDeque::new(),
            next_version: Version(1),
            next_request: 1,
            next_id: 0,
            started_ns: now_ns,
            now_ns,
            retry_at_ns: u64::MAX,
            survey_at_ns: 0,
            stable_told: Version(0),
            leaving: Leaving::No { until_ns: 0 },
            has_served: false,
            outputs: VecDeque::new(),
            end: None,
        };
        head.follow_owners();
        head
    }

    /// Which volume.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.membership.volume
    }

    /// Under which generation.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Who is in sync.
    #[must_use]
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// Why it has ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<End> {
        self.end
    }

    /// Whether everything that it needs is open and granted: it may say that it is the head.
    #[must_use]
    pub fn is_serving(&self, grants: &Grants, now_ns: u64) -> bool {
        let needed = self.membership.partitions().iter().flat_map(|partition| &partition.owners);
        let mut needed = needed.filter(|owner| self.membership.is_needed(owner));
        self.end.is_none()
            && !self.is_leaving()
            && needed.all(|owner| self.is_granted_by(owner, grants, now_ns))
    }

    /// Whether it has been able to answer at some time.
    #[must_use]
    pub fn has_served(&self) -> bool {
        self.has_served
    }

    /// Whether an owner has the generation open, by a record that has the members of the present one, and a grant of its node covers that.
    fn is_granted_by(&self, owner: &Owner, grants: &Grants, now_ns: u64) -> bool {
        let Some(peer) = self.peers.get(&owner.member) else { return false };
        peer.has_record_of(self.members_since)
            && peer.opened.is_some_and(|opened| grants.covers(owner.site, opened, now_ns))
    }

    /// Extents that are being made equal, or are to be, on copies that are in sync and on those that are being brought up to date.
    #[must_use]
    pub fn extents_to_go(&self) -> u64 {
        let learners = self.peers.values().filter_map(|peer| peer.learner.as_ref());
        self.unequal.len() as u64 + learners.map(resync::Learner::extents_to_go).sum::<u64>()
    }

    /// In how many nanoseconds the members that are brought up to date will be so, if it goes on as it did; `None` while nobody can say.
    #[must_use]
    pub fn resync_eta_ns(&self) -> Option<u64> {
        let learners = self.peers.values().filter_map(|peer| peer.learner.as_ref());
        learners.map(|learner| learner.eta_ns(self.now_ns)).max().flatten()
    }

    /// Whether nothing is asked, in progress, unequal or being brought up to date.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.ops.is_empty() && self.jobs.is_empty() && self.unequal.is_empty() && self.repairs.is_empty()
    }

    /// Whether time and grants mean nothing to it: it has been able to answer, everybody that it reaches is open, nothing is asked or to be made equal, and all have
    /// been told that everything is stable.
    #[must_use]
    pub(crate) fn is_resting(&self) -> bool {
        let rests = |member: &Member| {
            self.peers.get(member).is_none_or(|peer| {
                let is_to_learn = peer.is_open() && self.membership.is_behind_somewhere(*member);
                peer.is_resting() && !is_to_learn
            })
        };
        self.is_quiet()
            && self.has_served
            && self.retry_at_ns == u64::MAX
            && !self.is_leaving()
            && !self.membership.record().is_moving
            && self.membership.owners().keys().all(rests)
            && self.stable() <= self.stable_told
    }

    /// What is to be done next, if anything.
    pub fn output(&mut self) -> Option<Output<B>> {
        self.outputs.pop_front()
    }

    /// Gives all memory back.
    pub fn dissolve(mut self, memory: &mut impl Memory<Blocks = B>) {
        self.release_all(memory);
    }

    fn release_all(&mut self, memory: &mut impl Memory<Blocks = B>) {
        for op in std::mem::take(&mut self.ops).into_values() {
            for blocks in
                op.payload.into_iter().chain(op.readings.into_iter().filter_map(|reading| reading.got))
            {
                memory.release(blocks);
            }
        }
        for job in std::mem::take(&mut self.jobs).into_values() {
            if let Some(blocks) = job.copy {
                memory.release(blocks);
            }
        }
        self.waiting.clear();
    }

    fn finish(&mut self, end: End, memory: &mut impl Memory<Blocks = B>) {
        if self.end.is_none() {
            self.end = Some(end);
            self.release_all(memory);
            self.outputs.push_back(Output::End(end));
        }
    }

    /// Begins to read.
    pub fn read(
        &mut self,
        token: Token,
        blocks: Range<u64>,
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.begin(token, Kind::Read, blocks, None, grants, memory, now_ns);
    }

    /// Begins to write: one block of the payload for each of `blocks`, but for the bytes that are to be kept.
    #[expect(clippy::too_many_arguments, reason = "a request and what it is about")]
    pub fn write(
        &mut self,
        token: Token,
        blocks: Range<u64>,
        payload: B,
        keep_head_bytes: u16,
        keep_tail_bytes: u16,
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        let kind = Kind::Write { keep_head_bytes, keep_tail_bytes };
        self.begin(token, kind, blocks, Some(payload), grants, memory, now_ns);
    }

    /// Begins to take blocks away.
    pub fn unmap(
        &mut self,
        token: Token,
        blocks: Range<u64>,
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.begin(token, Kind::Unmap, blocks, None, grants, memory, now_ns);
    }

    #[expect(clippy::too_many_arguments, reason = "a request and what it is about")]
    fn begin(
        &mut self,
        token: Token,
        kind: Kind,
        range: Range<u64>,
        payload: Option<B>,
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        if self.end.is_some() {
            if let Some(blocks) = payload {
                memory.release(blocks);
            }
            return;
        }
        let op = Op {
            token: Some(token),
            kind,
            range,
            stage: Stage::Waiting,
            payload,
            readings: SmallVec::new(),
            pieces: SmallVec::new(),
            failure: None,
        };
        let at = OpId(self.take_id());
        self.ops.insert(at, op);
        self.waiting.push_back(at);
        self.advance(grants, memory);
    }

    /// An answer has come. `from` is the node that it came from.
    pub fn answer(
        &mut self,
        answer: Answer<B>,
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        let purport = self
            .peers
            .get_mut(&answer.from)
            .filter(|_| answer.generation == self.generation)
            .and_then(|peer| peer.answered(answer.id));
        let Some(purport) = purport else {
            if let Reply::Blocks(blocks) = answer.reply {
                memory.release(blocks);
            }
            return;
        };
        if self.end.is_some() {
            return;
        }
        match answer.reply {
            Reply::Refused(refusal) => self.refused(answer.from, purport, refusal, memory),
            reply => self.replied(answer.from, purport, reply, grants, memory),
        }
        self.advance(grants, memory);
    }

    fn refused(
        &mut self,
        from: Member,
        purport: Purport,
        refusal: Refusal,
        memory: &mut impl Memory<Blocks = B>,
    ) {
        match refusal {
            Refusal::Replaced(_) => self.finish(End::Replaced, memory),
            Refusal::Past(_) => self.finish(End::Past, memory),
            Refusal::Epoch(_) => {
                self.outputs.push_back(Output::Refresh);
                self.open_failed(from);
                self.ask_again(from, purport, memory);
            }
            Refusal::NotOpen => {
                self.ask_again(from, purport, memory);
                if !self.has_left() {
                    self.reopen(from, memory);
                }
            }
            Refusal::Stranger => {
                self.ask_again(from, purport, memory);
                self.peer_is_gone(from);
            }
        }
    }

    fn replied(
        &mut self,
        from: Member,
        purport: Purport,
        reply: Reply<B>,
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
    ) {
        match (purport, reply) {
            (Purport::Open, _) if self.has_left() => {}
            (Purport::Open, Reply::Opened { highest, active }) => {
                self.opened(from, highest, &active, grants, memory);
            }
            (Purport::Open, _) => self.open_failed(from),
            (Purport::Read { op, reading }, reply) => self.read_ended(op, reading, from, reply, memory),
            (Purport::Reserve { op, piece }, reply) => self.reserve_ended(op, piece, from, &reply),
            (Purport::Write { op, piece }, Reply::Done) => self.write_ended(op, piece, from),
            (Purport::EqualizeDigest { job, round }, reply) => {
                self.digest_ended(job, round, from, reply, memory);
            }
            (Purport::EqualizeRead { job, round }, reply) => {
                self.equalize_read_ended(job, round, reply, memory);
            }
            (Purport::EqualizeWrite { job }, Reply::Done) => self.equalize_write_ended(job, from),
            (Purport::Write { .. } | Purport::EqualizeWrite { .. }, Reply::Failed(fault)) => {
                self.write_failed(from, purport, fault);
            }
            (Purport::List { learner, candidacy, .. }, Reply::List { held, is_whole }) => {
                self.listed(from, (learner, candidacy), held, is_whole, memory);
            }
            (Purport::List { learner, .. }, _) => self.drop_learner(learner),
            (_, Reply::Blocks(blocks)) => memory.release(blocks),
            _ => {}
        }
    }

    /// Time has passed, or grants have come.
    pub fn tick(&mut self, grants: &Grants, memory: &mut impl Memory<Blocks = B>, now_ns: u64) {
        self.now_ns = now_ns;
        if self.end.is_some() {
            return;
        }
        if now_ns >= self.retry_at_ns {
            self.retry_at_ns = u64::MAX;
            self.resend_failed(memory);
        }
        self.lose_patience(memory);
        self.advance(grants, memory);
        if self.has_left() && !mutants::is(Mutant::HandedBackEarly) {
            return;
        }
        self.has_served = self.has_served || self.is_serving(grants, now_ns);
        self.eject_the_silent(grants);
        if now_ns >= self.survey_at_ns {
            self.survey_at_ns = now_ns + RETRY_NS;
            self.survey_suspects(memory);
        }
        self.tell_stable(memory);
    }

    /// The volume's record is this: nothing that was asked for before can still change it.
    pub fn record(
        &mut self,
        record: Record,
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        if self.end.is_some() || record.revision < self.membership.record().revision {
            return;
        }
        if record.takeover > self.generation.takeover || record.head != Some(self.node) {
            self.finish(End::Replaced, memory);
            return;
        }
        let before = self.membership.record().clone();
        if (&record.partitions, &record.stale) != (&before.partitions, &before.stale) {
            self.members_since = record.edition;
        }
        self.membership.settle(record);
        self.follow_record(&before, memory);
        self.advance(grants, memory);
    }

    /// A renewal of its grants has excluded all generations of the volume below this one.
    pub fn excluded(&mut self, below: Generation, memory: &mut impl Memory<Blocks = B>) {
        if self.generation < below {
            self.finish(End::Replaced, memory);
        }
    }

    /// Everything that can go on does.
    fn advance(&mut self, grants: &Grants, memory: &mut impl Memory<Blocks = B>) {
        if self.end.is_some() {
            return;
        }
        self.begin_jobs();
        self.advance_jobs(memory);
        if !self.is_leaving() {
            self.begin_waiting(grants, memory);
        }
        self.advance_ops(grants, memory);
        if !self.is_leaving() {
            self.advance_learners(memory);
        }
        self.advance_leaving(grants, memory);
    }

    fn begin_waiting(&mut self, grants: &Grants, memory: &mut impl Memory<Blocks = B>) {
        let waiting = std::mem::take(&mut self.waiting);
        for at in waiting {
            let range = self.op(at).range.clone();
            if self.is_held(&range, Some(at)) || !self.is_ready(&range) || !self.is_covered(&range, grants) {
                self.waiting.push_back(at);
                continue;
            }
            self.start(at, memory);
        }
    }

    /// Whether blocks are held by somebody else: a job, or a write that was answered and that not everybody has.
    fn is_held(&self, range: &Range<u64>, but: Option<OpId>) -> bool {
        let overlaps = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        let holds = |job: &Equalize<B>| !(mutants::is(Mutant::CopyWithoutLock) && job.is_resync());
        self.jobs.values().any(|job| job.holds() && holds(job) && overlaps(&job.range()))
            || self.ops.iter().any(|(at, op)| Some(*at) != but && op.token.is_none() && overlaps(&op.range))
    }

    /// Whether a request of an initiator has begun on some of these blocks.
    fn is_in_use(&self, range: &Range<u64>) -> bool {
        self.ops
            .values()
            .any(|op| op.stage != Stage::Waiting && op.range.start < range.end && range.start < op.range.end)
    }

    /// Whether all that owns these blocks has opened the generation, and they are equal everywhere.
    fn is_ready(&self, range: &Range<u64>) -> bool {
        extents(range).all(|extent| !self.unequal.contains_key(&extent) && self.is_open(extent))
    }

    fn is_open(&self, extent: Extent) -> bool {
        self.membership
            .needed(extent)
            .all(|owner| self.peers.get(&owner.member).is_some_and(|peer| peer.was_opened))
    }

    fn is_covered(&self, range: &Range<u64>, grants: &Grants) -> bool {
        extents(range).all(|extent| {
            self.membership.needed(extent).all(|owner| self.is_granted_by(owner, grants, self.now_ns))
        })
    }

    /// Whether grants cover the blocks of a request still, or again.
    fn may_answer(&self, range: &Range<u64>, grants: &Grants) -> bool {
        self.is_covered(range, grants) || mutants::is(Mutant::GrantsUncheckedAtReply)
    }

    fn start(&mut self, at: OpId, memory: &mut impl Memory<Blocks = B>) {
        let op = self.op_mut(at);
        let range = op.range.clone();
        match op.kind {
            Kind::Read => {
                op.stage = Stage::Filling;
                op.readings = spans(&range).map(|(span, offset)| Reading::new(span, offset)).collect();
            }
            Kind::Write { keep_head_bytes, keep_tail_bytes } => {
                op.stage = Stage::Filling;
                let last = range.end - 1;
                if keep_head_bytes > 0 || (keep_tail_bytes > 0 && last == range.start) {
                    op.readings.push(Reading::new(block_span(range.start), 0));
                }
                if keep_tail_bytes > 0 && last > range.start {
                    let offset = usize::try_from(last - range.start).expect("a request is short");
                    op.readings.push(Reading::new(block_span(last), offset));
                }
            }
            Kind::Unmap => op.stage = Stage::Filling,
        }
        for reading in 0..self.op(at).readings.len() {
            self.send_read(at, reading, None, memory);
        }
    }

    /// Asks the next copy, not that of `avoided` this time.
    fn send_read(
        &mut self,
        at: OpId,
        index: usize,
        avoided: Option<Member>,
        memory: &mut impl Memory<Blocks = B>,
    ) {
        let reading = &self.op(at).readings[index];
        let (span, failed) = (reading.span, reading.failed.clone());
        let usable = |member: &Member| {
            let is_out = failed.contains(member) || avoided == Some(*member);
            !is_out && self.peers.get(member).is_some_and(Peer::is_open)
        };
        let owners = self.membership.partition(span.extent).owners.iter();
        let owners = owners.filter(|owner| self.membership.is_sure(owner) || mutants::is(Mutant::StaleRead));
        let owners = owners.filter(|owner| usable(&owner.member));
        let nearest = owners.min_by_key(|owner| owner.site.node != self.node).map(|owner| owner.member);
        let Some(member) = nearest else {
            let all_failed = self.membership.sure(span.extent).all(|owner| failed.contains(&owner.member));
            if all_failed && !failed.is_empty() {
                self.op_mut(at).failure.get_or_insert(Failure::Unreadable);
                self.op_mut(at).readings[index].asked = None;
                if self.op(at).readings[index].is_damaged {
                    self.repairs.push_back(span);
                }
            }
            // Else somebody comes back, or is ejected.
            return;
        };
        self.op_mut(at).readings[index].asked = Some((member, self.now_ns));
        self.send(member, Purport::Read { op: at, reading: index }, memory);
    }

    fn read_ended(
        &mut self,
        at: OpId,
        index: usize,
        from: Member,
        reply: Reply<B>,
        memory: &mut impl Memory<Blocks = B>,
    ) {
        let Some(reading) = self.ops.get_mut(&at).and_then(|op| op.readings.get_mut(index)) else {
            if let Reply::Blocks(blocks) = reply {
                memory.release(blocks);
            }
            return;
        };
        match reply {
            Reply::Blocks(blocks) if memory.count(&blocks) != usize::from(reading.span.count) => {
                memory.release(blocks);
                self.ask_another(at, index, from, memory);
            }
            Reply::Blocks(blocks) if reading.got.is_none() => {
                reading.got = Some(blocks);
                reading.asked = None;
                if reading.is_damaged {
                    self.repairs.push_back(reading.span);
                }
            }
            Reply::Blocks(blocks) => memory.release(blocks),
            Reply::Failed(fault) => {
                reading.is_damaged |= matches!(fault, Fault::Corrupt | Fault::Lost);
                if fault != Fault::NoMemory {
                    reading.failed.push(from);
                }
                if reading.got.is_none() && reading.asked.is_some_and(|(asked, _)| asked == from) {
                    reading.asked = None;
                    self.send_read(at, index, None, memory);
                }
            }
            _ => {}
        }
    }

    fn advance_ops(&mut self, grants: &Grants, memory: &mut impl Memory<Blocks = B>) {
        let all: SmallVec<[OpId; 64]> = self.ops.keys().copied().collect();
        for at in all {
            if self.ops.contains_key(&at) {
                self.advance_op(at, grants, memory);
            }
        }
    }

    fn advance_op(&mut self, at: OpId, grants: &Grants, memory: &mut impl Memory<Blocks = B>) {
        if self.op(at).stage == Stage::Filling {
            let op = self.op(at);
            if op.failure.is_none() && op.readings.iter().any(|reading| reading.got.is_none()) {
                for index in 0..self.op(at).readings.len() {
                    let reading = &self.op(at).readings[index];
                    if reading.got.is_none() && reading.asked.is_none() {
                        self.send_read(at, index, None, memory);
                    }
                }
                if self.op(at).failure.is_none() {
                    return;
                }
            }
            match self.op(at).kind {
                _ if self.op(at).failure.is_some() => self.end_unsent(at, grants, memory),
                Kind::Read => self.end_read(at, grants, memory),
                Kind::Write { .. } => {
                    self.fill(at, memory);
                    self.reserve(at, memory);
                }
                Kind::Unmap => self.reserve(at, memory),
            }
            if !self.ops.contains_key(&at) {
                return;
            }
        }
        if self.op(at).stage == Stage::Reserving && self.op(at).failure.is_some() && self.is_answered(at) {
            self.end_unsent(at, grants, memory);
            return;
        }
        if self.op(at).stage == Stage::Reserving && self.op(at).failure.is_none() && self.is_answered(at) {
            let extents: SmallVec<[Extent; 2]> =
                self.op(at).pieces.iter().map(|piece| piece.span.extent).collect();
            self.reserved.extend(extents);
            self.send_writes(at, memory);
        }
        if self.op(at).stage == Stage::Sent {
            self.end_write(at, grants, memory);
        }
    }

    /// Ends a request of which nothing was sent to be written.
    fn end_unsent(&mut self, at: OpId, grants: &Grants, memory: &mut impl Memory<Blocks = B>) {
        if !self.may_answer(&self.op(at).range.clone(), grants) {
            return;
        }
        let op = self.take_op(at);
        let result = op.failure.map_or(Ok(()), Err);
        for blocks in op.payload.into_iter().chain(op.readings.into_iter().filter_map(|reading| reading.got))
        {
            memory.release(blocks);
        }
        if let Some(token) = op.token {
            self.outputs.push_back(Output::Answer { token, result, blocks: None });
        }
    }

    fn end_read(&mut self, at: OpId, grants: &Grants, memory: &mut impl Memory<Blocks = B>) {
        // Checked again now: whoever came meanwhile may have written.
        if !self.may_answer(&self.op(at).range.clone(), grants) {
            return;
        }
        let op = self.take_op(at);
        let mut all: Option<B> = None;
        for blocks in op.readings.into_iter().filter_map(|reading| reading.got) {
            match &mut all {
                None => all = Some(blocks),
                Some(all) => memory.append(all, blocks),
            }
        }
        if let Some(token) = op.token {
            self.outputs.push_back(Output::Answer { token, result: Ok(()), blocks: all });
        }
    }

    /// Makes whole blocks of a write.
    fn fill(&mut self, at: OpId, memory: &mut impl Memory<Blocks = B>) {
        let op = self.op_mut(at);
        let Kind::Write { keep_head_bytes, keep_tail_bytes } = op.kind else { return };
        let last = usize::try_from(op.range.end - op.range.start).expect("a request is short") - 1;
        let readings = std::mem::take(&mut op.readings);
        for reading in readings {
            let (Some(payload), Some(old)) = (&mut op.payload, reading.got) else { continue };
            let from = if reading.offset == 0 { usize::from(keep_head_bytes) } else { 0 };
            let to =
                if reading.offset == last { BLOCK_BYTES - usize::from(keep_tail_bytes) } else { BLOCK_BYTES };
            memory.merge(payload, reading.offset, from..to, old);
        }
    }

    /// Whoever must have a write of that extent.
    fn targets(&self, extent: Extent) -> SmallVec<[Target; 4]> {
        let owners = self.membership.partition(extent).owners.iter();
        owners
            .filter(|owner| {
                self.membership.is_needed(owner)
                    || self.peers.get(&owner.member).is_some_and(Peer::is_learner)
            })
            .map(|owner| Target { member: owner.member, is_done: false })
            .collect()
    }

    fn reserve(&mut self, at: OpId, memory: &mut impl Memory<Blocks = B>) {
        let pieces: SmallVec<[(Span, usize); 2]> = spans(&self.op(at).range).collect();
        let is_unmap = self.op(at).kind == Kind::Unmap;
        self.op_mut(at).stage = Stage::Reserving;
        for (index, (span, offset)) in pieces.into_iter().enumerate() {
            let mut targets = self.targets(span.extent);
            if is_unmap || self.reserved.contains(&span.extent) {
                targets.iter_mut().for_each(|target| target.is_done = true);
            }
            let asked: SmallVec<[Member; 4]> =
                targets.iter().filter(|target| !target.is_done).map(|target| target.member).collect();
            self.op_mut(at).pieces.push(Piece { span, offset, version: Version(0), targets });
            for member in asked {
                self.send(member, Purport::Reserve { op: at, piece: index }, memory);
            }
        }
    }

    fn reserve_ended(&mut self, at: OpId, piece: usize, from: Member, reply: &Reply<B>) {
        let Some(op) = self.ops.get_mut(&at).filter(|op| op.stage == Stage::Reserving) else { return };
        match reply {
            Reply::Failed(Fault::NoSpace) => {
                op.failure.get_or_insert(Failure::NoSpace);
            }
            Reply::Failed(fault) => {
                self.write_failed(from, Purport::Reserve { op: at, piece }, *fault);
                return;
            }
            _ => {}
        }
        if let Some(target) =
            self.op_mut(at).pieces[piece].targets.iter_mut().find(|target| target.member == from)
        {
            target.is_done = true;
        }
    }

    /// Whether everybody that was asked has answered.
    fn is_answered(&self, at: OpId) -> bool {
        self.op(at).pieces.iter().all(|piece| piece.targets.iter().all(|target| target.is_done))
    }

    fn send_writes(&mut self, at: OpId, memory: &mut impl Memory<Blocks = B>) {
        self.op_mut(at).stage = Stage::Sent;
        for index in 0..self.op(at).pieces.len() {
            let extent = self.op(at).pieces[index].span.extent;
            let version = self.take_version();
            // Those of now: somebody may have come or gone while room was made.
            let targets = self.targets(extent);
            let members: SmallVec<[Member; 4]> = targets.iter().map(|target| target.member).collect();
            if self.op(at).kind == Kind::Unmap {
                // Whoever has nothing of an extent any more gives its room away.
                self.reserved.remove(&extent);
            }
            let piece = &mut self.op_mut(at).pieces[index];
            piece.version = version;
            piece.targets = targets;
            for member in members {
                self.send(member, Purport::Write { op: at, piece: index }, memory);
            }
        }
    }

    fn write_ended(&mut self, at: OpId, piece: usize, from: Member) {
        let Some(op) = self.ops.get_mut(&at) else { return };
        if let Some(target) = op.pieces[piece].targets.iter_mut().find(|target| target.member == from) {
            target.is_done = true;
        }
    }

    fn end_write(&mut self, at: OpId, grants: &Grants, memory: &mut impl Memory<Blocks = B>) {
        let op = self.op(at);
        let has = |piece: &Piece, member: Member| {
            piece.targets.iter().any(|target| target.member == member && target.is_done)
        };
        let is_written = op
            .pieces
            .iter()
            .all(|piece| self.membership.needed(piece.span.extent).all(|owner| has(piece, owner.member)));
        let is_written = is_written
            || mutants::is(Mutant::AckAfterFirst)
                && op.pieces.iter().all(|piece| piece.targets.iter().any(|target| target.is_done));
        if let Some(token) = op.token
            && (is_written || op.failure.is_some())
            && self.may_answer(&op.range, grants)
        {
            let result = self.op(at).failure.map_or(Ok(()), Err);
            self.op_mut(at).token = None;
            self.outputs.push_back(Output::Answer { token, result, blocks: None });
        }
        let is_everywhere = self.is_answered(at) || mutants::is(Mutant::UnlockedEarly);
        if self.op(at).token.is_none() && is_everywhere {
            let op = self.take_op(at);
            if let Some(blocks) = op.payload {
                memory.release(blocks);
            }
        }
    }

    fn take_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// A request that is in progress.
    fn op(&self, at: OpId) -> &Op<B> {
        &self.ops[&at]
    }

    fn op_mut(&mut self, at: OpId) -> &mut Op<B> {
        self.ops.get_mut(&at).expect("a request in progress")
    }

    fn take_op(&mut self, at: OpId) -> Op<B> {
        self.ops.remove(&at).expect("a request in progress")
    }

    fn take_version(&mut self) -> Version {
        let version = self.next_version;
        self.next_version = version.next();
        version
    }

    /// Every write up to this one is on all needed owners, and every extent that has one is equal on all of them.
    fn stable(&self) -> Version {
        let all_open =
            self.membership.partitions().iter().flat_map(|partition| &partition.owners).all(|owner| {
                !self.membership.is_needed(owner)
                    || self.peers.get(&owner.member).is_some_and(|peer| peer.was_opened)
            });
        if !all_open {
            return Version(0);
        }
        let unequal = self.unequal.values().map(|(lowest, _)| *lowest);
        let unequal = unequal.filter(|_| !mutants::is(Mutant::StableBeforeEqual));
        let writes = self.ops.values().filter(|op| op.stage == Stage::Sent).flat_map(|op| &op.pieces);
        let missing = writes.filter(|piece| {
            let has =
                |member: Member| piece.targets.iter().any(|target| target.member == member && target.is_done);
            !self.membership.needed(piece.span.extent).all(|owner| has(owner.member))
        });
        let is_said = mutants::is(Mutant::CleanThoughUnequal) && self.is_leaving();
        let missing = missing.filter(|_| !is_said).map(|piece| piece.version);
        let copies = self.jobs.values().filter_map(Equalize::version);
        unequal.chain(missing).chain(copies).min().unwrap_or(self.next_version).before()
    }

    /// What is asked for a purport, and which extent it is about. `None` where that has ended.
    fn ask_for(
        &self,
        purport: Purport,
        member: Member,
        memory: &mut impl Memory<Blocks = B>,
    ) -> Option<(Ask<B>, Option<Extent>)> {
        let (ask, extent) = match purport {
            Purport::Open => return Some((Ask::Open { edition: self.membership.record().edition }, None)),
            Purport::List { from, .. } => return Some((Ask::List { from }, None)),
            Purport::Stable => return Some((Ask::Stable, None)),
            Purport::Close => return Some((Ask::Close, None)),
            Purport::Read { op, reading } => {
                let op = self.ops.get(&op)?;
                let span = op.readings.get(reading)?.span;
                let is_unverified = mutants::is(Mutant::BadBlockMerged) && op.kind != Kind::Read;
                let ask = if is_unverified { Ask::Salvage { span } } else { Ask::Read { span } };
                (ask, span.extent)
            }
            Purport::Reserve { op, piece } => {
                let extent = self.ops.get(&op)?.pieces.get(piece)?.span.extent;
                (Ask::Reserve { extent }, extent)
            }
            Purport::Write { op, piece } => {
                let op = self.ops.get(&op)?;
                let Piece { span, offset, version, .. } = *op.pieces.get(piece)?;
                let ask = match &op.payload {
                    Some(payload) => {
                        let blocks = memory.share(payload, offset..offset + usize::from(span.count));
                        Ask::Write { version, span, blocks, is_sole: self.is_sole(member, span.extent) }
                    }
                    None => Ask::Unmap { version, span },
                };
                (ask, span.extent)
            }
            Purport::EqualizeDigest { job, .. } => {
                let span = self.jobs.get(&job)?.span;
                (Ask::Digest { span }, span.extent)
            }
            Purport::EqualizeRead { job, .. } => {
                let Fix { span, remedy } = self.jobs.get(&job)?.fix()?;
                let ask = match remedy {
                    Remedy::Copy { is_suspect: true, .. } => Ask::Salvage { span },
                    _ => Ask::Read { span },
                };
                (ask, span.extent)
            }
            Purport::EqualizeWrite { job } => {
                let job = self.jobs.get(&job)?;
                let (Fix { span, remedy }, version) = (job.fix()?, job.version()?);
                let ask = match (remedy, &job.copy) {
                    (Remedy::Copy { .. }, Some(copy)) => {
                        let blocks = memory.share(copy, 0..usize::from(span.count));
                        Ask::Write { version, span, blocks, is_sole: self.is_sole(member, span.extent) }
                    }
                    (Remedy::Copy { .. }, None) => return None,
                    (Remedy::Unmap, _) => Ask::Unmap { version, span },
                    (Remedy::Lose, _) => Ask::Lose { version, span },
                };
                (ask, span.extent)
            }
        };
        Some((ask, Some(extent)))
    }

    /// Whether no other member surely has a good copy of an extent.
    fn is_sole(&self, member: Member, extent: Extent) -> bool {
        self.membership.sure(extent).all(|owner| owner.member == member)
    }

    fn send_now(&mut self, member: Member, id: u64, purport: Purport, memory: &mut impl Memory<Blocks = B>) {
        let Some((ask, extent)) = self.ask_for(purport, member, memory) else {
            // What it was for has ended: nothing is sent, and no answer will come.
            if let Some(peer) = self.peers.get_mut(&member) {
                peer.answered(id);
            }
            return;
        };
        let (partition, epoch) = extent.map_or((0, Epoch(0)), |extent| self.membership.epoch(extent));
        let stable = self.stable();
        let (volume, generation) = (self.membership.volume, self.generation);
        let edition = self.membership.record().edition;
        let Some(peer) = self.peers.get_mut(&member) else { return };
        if purport == Purport::Open {
            peer.told_edition = edition;
        }
        let request = Request { to: member, volume, generation, partition, epoch, id, stable, ask };
        self.outputs.push_back(Output::Send(peer.site, request));
    }
}

impl<B> Reading<B> {
    fn new(span: Span, offset: usize) -> Reading<B> {
        Reading { span, offset, asked: None, failed: SmallVec::new(), is_damaged: false, got: None }
    }
}

fn block_span(block: u64) -> Span {
    let extent = Extent::of_block(block);
    let first = u16::try_from(block - extent.first_block()).expect("below 1024");
    Span { extent, first, count: 1 }
}

/// The extents of blocks.
fn extents(range: &Range<u64>) -> impl Iterator<Item = Extent> + use<> {
    let (first, last) = (Extent::of_block(range.start), Extent::of_block(range.end - 1));
    (first.0..=last.0).map(Extent)
}

/// Blocks by extent, with the position of each first one.
fn spans(range: &Range<u64>) -> impl Iterator<Item = (Span, usize)> + use<> {
    let range = range.clone();
    extents(&range).map(move |extent| {
        let begin = extent.first_block();
        let first = range.start.max(begin);
        let end = range.end.min(begin + u64::from(EXTENT_BLOCKS));
        let narrow = |blocks: u64| u16::try_from(blocks).expect("at most an extent");
        let span = Span { extent, first: narrow(first - begin), count: narrow(end - first) };
        (span, usize::try_from(first - range.start).expect("a request is short"))
    })
}
