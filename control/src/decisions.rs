//! What a node changes in the metadata of its own accord, one transaction after another: successors of heads that have handed over,
//! itself in place of heads that are silent, and what its data plane has done or wishes for. No I/O and no clock: [`crate::node`]
//! carries it out.
//!
//! - Nothing is decided on a view that may be out of date: not while the metadata cannot be followed, nor on one from before a change
//!   that this node knows it has made.
//! - Nothing new is decided before all that was decided has an outcome. One that is not known counts as a failure: it is decided anew on
//!   what is read next, and what is wished for stays in the map meanwhile (I5).
//! - A map that is new knows nothing of what was wished for before, as after a power cut; and a change that was sent then may still be
//!   made. So before anything is published there, the heads that the records name this node for are taken over anew: that breaks the
//!   comparison of whatever is on its way.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use cluster_map::{Desired, NodeId, Observed, StoreState, VolumeId};

use crate::meta::{Revision, Txn};
use crate::model::{StatusRecord, View, VolumeState};
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
    /// Heads of this node are taken over anew.
    Renew(Txn),
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
    /// The heads to be taken over anew before there is a desired state, with their take-overs; `None` before that was looked at.
    former: Option<BTreeMap<VolumeId, u64>>,
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
            former: None,
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
        let former = self.former.iter().flatten().map(|(volume, _)| *volume);
        self.due.extend(takeover::renewals(seen.view, self.node, former).into_iter().map(Work::Renew));
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

    /// Whether a desired state may be published where `published` stands, which is none if the map is new.
    pub fn may_publish(&mut self, view: &View, published: Option<&Desired>) -> bool {
        if published.is_some() {
            self.former = Some(BTreeMap::new());
            return true;
        }
        let node = self.node;
        let is_head = |volume: &VolumeId| {
            let heads = view.heads.get(volume).filter(|heads| heads.record.head == node)?;
            let is_wanted = view.volumes.get(volume)?.record.state != VolumeState::Purging;
            is_wanted.then_some(heads.record.takeover)
        };
        let former = self.former.get_or_insert_with(|| {
            view.heads.keys().filter_map(|volume| Some((*volume, is_head(volume)?))).collect()
        });
        former.retain(|volume, takeover| is_head(volume) == Some(*takeover));
        former.is_empty()
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
            (Work::Move(_) | Work::Renew(_) | Work::Change(_), Outcome::Conflict)
            | (Work::Renew(_), Outcome::Failed) => {}
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

#[cfg(test)]
mod tests {
    use cluster_map::{MemberWish, StoreId};

    use super::*;
    use crate::heads::{HeadsRecord, MemberRecord};
    use crate::meta::{Compare, KeyValue};
    use crate::model::{VolumeRecord, encode, keys};

    const NODE: NodeId = NodeId([1; 16]);
    const VOLUME: VolumeId = VolumeId([9; 16]);

    fn heads() -> HeadsRecord {
        let member =
            |n| MemberRecord { store: StoreId([n; 16]), incarnation: 1, node: NodeId([n; 16]), shards: 1 };
        HeadsRecord::new(vec![member(1), member(2)], NODE, 0, 0)
    }

    /// A volume with this record, last changed at this revision.
    fn view(heads: &HeadsRecord, revision: i64) -> View {
        let volume = VolumeRecord {
            name: "v".into(),
            size: 4 << 20,
            copies: 2,
            store: None,
            node: None,
            state: VolumeState::Ready,
            export: None,
            created_unix_s: 1,
            confirmed: Vec::new(),
        };
        let kv = |key, value| KeyValue { key, value, mod_revision: Revision(revision), lease: None };
        let entries = [kv(keys::volume(VOLUME), encode(&volume)), kv(keys::heads(VOLUME), encode(heads))];
        View::read(&entries).unwrap()
    }

    fn seen<'a>(view: &'a View, revision: i64, told: Option<&'a (Desired, Observed)>) -> Seen<'a> {
        Seen {
            view,
            revision: Revision(revision),
            is_followed: true,
            published: told.map(|(desired, _)| desired),
            observed: told.map(|(_, observed)| observed),
            is_silent: false,
        }
    }

    /// A map whose head wishes that the second member join.
    fn wishing(heads: &HeadsRecord, revision: i64) -> (Desired, Observed) {
        let member = heads.desired(VOLUME, Revision(revision)).partitions[0].owners[1].member;
        let wish = MemberWish {
            volume: VOLUME,
            takeover: heads.takeover,
            start: 3,
            revision: revision.unsigned_abs(),
            eject: vec![cluster_map::StaleMark { member, mark: 7 }],
            join: Vec::new(),
        };
        let desired = Desired { version: 4, start: 3, node: NODE, ..Desired::default() };
        (desired, Observed { version: 2, applied: 4, wishes: vec![wish], ..Observed::default() })
    }

    #[test]
    fn on_a_new_map_heads_are_taken_over_anew_before_anything_is_published() {
        let mut decisions = Decisions::new(NODE);
        let before = view(&heads(), 5);
        assert!(!decisions.may_publish(&before, None));
        decisions.look(&seen(&before, 5, None), Duration::ZERO, 0);
        let Some(work @ Work::Renew(_)) = decisions.begin() else { panic!("nothing is renewed") };
        let Work::Renew(txn) = &work else { unreachable!() };
        assert_eq!(txn.compares, [Compare::Revision(keys::heads(VOLUME), Revision(5))]);
        decisions.ended(&work, Outcome::Failed, Duration::ZERO);
        assert!(decisions.is_to_be_tried_again() && !decisions.may_publish(&before, None));
        // Whoever made the next take-over, what was sent under the former one cannot be made any more.
        let after = view(&heads().taken_over(NODE).unwrap(), 6);
        assert!(decisions.may_publish(&after, None));
        let (desired, _) = wishing(&heads(), 6);
        assert!(Decisions::new(NODE).may_publish(&before, Some(&desired)), "the map tells");
    }

    #[test]
    fn what_is_decided_has_an_outcome_before_anything_else_is() {
        let mut decisions = Decisions::new(NODE);
        let (before, told) = (view(&heads(), 5), wishing(&heads(), 5));
        assert!(decisions.may_publish(&before, Some(&told.0)));
        decisions.look(&seen(&before, 5, Some(&told)), Duration::ZERO, 0);
        let work = decisions.begin().unwrap();
        assert!(matches!(work, Work::Change(_)) && decisions.is_busy() && decisions.begin().is_none());
        decisions.look(&seen(&before, 5, Some(&told)), Duration::ZERO, 0);
        decisions.ended(&work, Outcome::Failed, Duration::ZERO);
        assert!(!decisions.is_busy() && decisions.is_to_be_tried_again());
        decisions.look(&seen(&before, 5, Some(&told)), Duration::ZERO, 0);
        let work = decisions.begin().unwrap();
        decisions.ended(&work, Outcome::Committed(Revision(8)), Duration::ZERO);
        // This view is from before the change.
        decisions.look(&seen(&before, 7, Some(&told)), Duration::ZERO, 0);
        assert!(decisions.begin().is_none() && !decisions.is_to_be_tried_again());
    }
}
