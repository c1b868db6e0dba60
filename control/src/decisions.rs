//! What a node changes in the metadata of its own accord, one transaction after another: successors of heads that have handed over,
//! itself in place of heads that are silent, and what its data plane has done or wishes for. No I/O and no clock: [`crate::node`]
//! carries it out.
//!
//! - Nothing is decided on a view that may be out of date: not while the metadata cannot be followed, nor on one from before a change
//!   that this node knows it has made.
//! - Nothing new is decided before all that was decided has an outcome. One that is not known counts as a failure: it is decided anew on
//!   what is read next, and what is wished for stays in the map meanwhile (I5).

use std::collections::VecDeque;
use std::time::Duration;

use cluster_map::{Desired, NodeId, Observed, StoreState};

use crate::meta::{Revision, Txn};
use crate::model::{StatusRecord, View};
use crate::moves::Moves;
use crate::reconcile;
use crate::takeover::{self, Batch, Vigil};

/// What a decision is made of.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The cluster.
    pub view: &'a View,
    /// The view's revision.
    pub revision: Revision,
    /// The view can be read and is being followed.
    pub is_followed: bool,
    /// What stands in the map.
    pub published: Option<&'a Desired>,
    /// What the running data plane says.
    pub observed: Option<&'a Observed>,
    /// That data plane has given no sign of life for long.
    pub is_silent: bool,
}

/// Something to be committed.
#[derive(Debug, Clone)]
pub enum Work {
    /// Heads move, or are not to move any more.
    Move(Txn),
    /// Heads that are silent are replaced by this node.
    TakeOver(Batch),
    /// The data plane has done something, or wishes for it.
    Change(Txn),
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was made.
    Committed(Revision),
    /// Somebody else was first, or vetoes: the next view tells.
    Conflict,
    /// It was not, or nobody knows.
    Failed,
}

/// Metadata revision, desired and observed version of which something follows.
type Versions = (Revision, u64, u64);

/// See the module.
#[derive(Debug)]
pub struct Decisions {
    node: NodeId,
    vigil: Vigil,
    moves: Moves,
    due: VecDeque<Work>,
    /// One is being committed.
    is_under_way: bool,
    /// Of which all changes are recorded, and of which they will be when none is due any more.
    recorded: Option<Versions>,
    recording: Option<Versions>,
    /// Views that are older are not decided on.
    seen_after: Revision,
    take_over_at: Option<Duration>,
    has_failed: bool,
}

impl Decisions {
    /// Of a node that has just started.
    #[must_use]
    pub fn new(node: NodeId) -> Self {
        Self {
            node,
            vigil: Vigil::default(),
            moves: Moves::default(),
            due: VecDeque::new(),
            is_under_way: false,
            recorded: None,
            recording: None,
            seen_after: Revision(0),
            take_over_at: None,
            has_failed: false,
        }
    }

    /// Decides, unless there is something that has no outcome yet; at a time of a clock that only goes forward.
    pub fn look(&mut self, seen: &Seen<'_>, now: Duration, now_unix_s: u64) {
        let is_current = seen.is_followed && seen.revision >= self.seen_after;
        // That this node is a candidate is seen also while it is busy.
        let observed = seen.observed.filter(|_| is_current && !seen.is_silent);
        let look = self.vigil.look(seen.view, self.node, observed, now);
        self.take_over_at = look.next;
        if self.is_busy() {
            return;
        }
        self.has_failed = false;
        if !is_current {
            return;
        }
        // First what initiators wait for.
        let told = seen.published.zip(seen.observed);
        self.due.extend(self.moves.look(seen.view, self.node, told, now).into_iter().map(Work::Move));
        let batches = takeover::batches(seen.view, self.node, &look.due);
        self.due.extend(batches.into_iter().map(Work::TakeOver));
        let Some((desired, observed)) = told else { return };
        let versions = (seen.revision, desired.version, observed.version);
        if self.recorded == Some(versions) {
            return;
        }
        let changes = reconcile::changes(seen.view, self.node, desired, observed, now_unix_s);
        self.due.extend(changes.into_iter().map(Work::Change));
        self.recording = Some(versions);
        self.end_recording();
    }

    /// Whether something has no outcome yet.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.is_under_way || !self.due.is_empty()
    }

    /// Takes the next thing to commit, unless one is being committed.
    pub fn begin(&mut self) -> Option<Work> {
        let next = if self.is_under_way { None } else { self.due.pop_front() };
        self.is_under_way |= next.is_some();
        next
    }

    /// What came of the last one.
    pub fn ended(&mut self, work: &Work, outcome: Outcome, now: Duration) {
        self.is_under_way = false;
        match (work, outcome) {
            (_, Outcome::Committed(revision)) => self.seen_after = self.seen_after.max(revision),
            (Work::TakeOver(batch), _) => self.vigil.put_off(batch.volumes(), now),
            (Work::Move(_) | Work::Change(_), Outcome::Conflict) => {}
            (Work::Move(_), Outcome::Failed) => self.due.retain(|due| !matches!(due, Work::Move(_))),
            (Work::Change(_), Outcome::Failed) => {
                self.due.retain(|due| !matches!(due, Work::Change(_)));
                self.recording = None;
            }
        }
        self.has_failed |= outcome == Outcome::Failed;
        self.end_recording();
    }

    fn end_recording(&mut self) {
        if !self.is_busy()
            && let Some(versions) = self.recording.take()
        {
            self.recorded = Some(versions);
        }
    }

    /// When a take-over is due, if nothing changes.
    #[must_use]
    pub fn take_over_at(&self) -> Option<Duration> {
        self.take_over_at
    }

    /// Whether something failed and is to be decided again in a while.
    #[must_use]
    pub fn is_to_be_tried_again(&self) -> bool {
        self.has_failed && !self.is_busy()
    }
}

/// The status of a node whose data plane is as `words` say. `observation` is what one said last, which counts only while that runs.
#[must_use]
pub fn status(
    published: Option<&Desired>,
    observation: Option<&Observed>,
    is_running: bool,
    words: &str,
) -> StatusRecord {
    if let Some((desired, observed)) = published.zip(observation).filter(|_| is_running) {
        return reconcile::status(desired, observed, words);
    }
    // Nothing is served: only the stores are kept, as not ready.
    let stores = observation.map(|observation| observation.stores.clone()).unwrap_or_default();
    let mut observed = Observed { stores, ..Observed::default() };
    observed.stores.iter_mut().for_each(|store| store.state = StoreState::Opening);
    reconcile::status(&Desired::default(), &observed, words)
}
