//! Members that missed writes are brought up to date and taken in again (I9).
//!
//! From the moment a member becomes a learner every new write goes to it too. What it may miss, and what only it may have, is found by
//! lists of extents: those that either side has above the mark or in its activity log, or that only one side has. Those are made equal, one
//! by one. When all are, and it has answered every write, it is in sync again.
//!
//! Invariants:
//! * A learner that fails anything, or whose connection breaks, is none any more, and begins anew; its mark stays.
//! * One becomes a learner only when nothing of a time before is on its way to it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::equalize::Purpose;
use super::{Head, JobId, Peer, Purport, Stage};
use crate::membership::{Change, Owner};
use crate::message::{Held, Memory};
use crate::mutants::{self, Mutant};
use crate::terms::{Extent, Member, Span};

/// Extents of a learner that are made equal at a time.
const EXTENTS_AT_ONCE: u32 = 2;

/// What a party has said.
#[derive(Debug, Default)]
struct List {
    held: Vec<Held>,
    is_whole: bool,
}

/// A member that is being brought up to date.
#[derive(Debug)]
pub(super) struct Learner {
    /// Tells it from an earlier one of the same member: what that one asked for counts no longer.
    candidacy: u64,
    /// What each party has. The learner is one of them.
    lists: BTreeMap<Member, List>,
    /// Extents with writes that were in progress when it began, and did not go to it.
    in_progress: BTreeSet<Extent>,
    /// What is to be made equal; `None` before all lists have come.
    work: Option<VecDeque<Extent>>,
    /// When that was known, and how much it was.
    planned: (u64, u64),
    running: u32,
    /// It is asked to be in sync.
    is_proposed: bool,
}

impl Learner {
    /// Extents that are to be made equal still.
    pub(super) fn extents_to_go(&self) -> u64 {
        self.work.as_ref().map_or(0, |work| work.len() as u64) + u64::from(self.running)
    }

    /// In how many nanoseconds it will be equal, if it goes on as it did.
    pub(super) fn eta_ns(&self, now_ns: u64) -> Option<u64> {
        let (since_ns, total) = self.planned;
        let to_go = self.extents_to_go();
        let done = total.checked_sub(to_go).filter(|done| *done > 0)?;
        let eta_ns = u128::from(now_ns.saturating_sub(since_ns)) * u128::from(to_go) / u128::from(done);
        u64::try_from(eta_ns).ok()
    }

    /// How the versions of an extent compare, of the in-sync copies and of the learner: it says nothing about who is right.
    pub(super) fn order(&self, member: Member, extent: Extent) -> std::cmp::Ordering {
        let of = |is_learner: bool| {
            let lists = self.lists.iter().filter(|(party, _)| (**party == member) == is_learner);
            let held = lists.flat_map(|(_, list)| &list.held).filter(|held| held.extent == extent);
            held.map(|held| held.version).max()
        };
        of(false).cmp(&of(true))
    }

    /// The record was not changed: it is asked again when it is still up to date.
    pub(super) fn was_refused(&mut self) {
        self.is_proposed = false;
    }
}

impl<B> Head<B> {
    /// Begins with members that can be brought up to date, and goes on with those that are.
    pub(super) fn advance_learners(&mut self, memory: &mut impl Memory<Blocks = B>) {
        let members: Vec<Member> = self.peers.keys().copied().collect();
        for member in members {
            let is_behind = self.membership.is_behind_somewhere(member);
            let Some(peer) = self.peers.get(&member) else { continue };
            if is_behind && peer.learner.is_none() && peer.is_open() && peer.is_clean() {
                self.begin_learner(member, memory);
            }
            self.advance_learner(member);
        }
    }

    fn begin_learner(&mut self, member: Member, memory: &mut impl Memory<Blocks = B>) {
        // Every in-sync copy of the partitions in which it is behind is needed as a source, or as a witness that there is one.
        let is_behind = |owner: &Owner| owner.member == member && !self.membership.is_needed(owner);
        let partitions = self.membership.partitions().iter().filter(|p| p.owners.iter().any(is_behind));
        let sources: BTreeSet<Member> = partitions
            .flat_map(|partition| partition.owners.iter().filter(|owner| self.membership.is_sure(owner)))
            .map(|owner| owner.member)
            .collect();
        if sources.is_empty()
            || !sources.iter().all(|source| self.peers.get(source).is_some_and(Peer::is_open))
        {
            return;
        }
        let in_progress = self
            .ops
            .values()
            .filter(|op| op.stage != Stage::Waiting)
            .flat_map(|op| super::extents(&op.range));
        let in_progress = in_progress.chain(self.jobs.values().map(|job| job.span.extent));
        let in_progress = in_progress.filter(|extent| self.membership.is_behind(member, *extent)).collect();
        let parties: Vec<Member> = sources.into_iter().chain([member]).collect();
        let candidacy = self.take_id();
        let learner = Learner {
            candidacy,
            lists: parties.iter().map(|party| (*party, List::default())).collect(),
            in_progress,
            work: None,
            planned: (0, 0),
            running: 0,
            is_proposed: false,
        };
        if let Some(peer) = self.peers.get_mut(&member) {
            peer.learner = Some(learner);
        }
        for party in parties {
            self.send(party, Purport::List { learner: member, candidacy, from: Extent(0) }, memory);
        }
    }

    /// A party has said what it has, or a piece of it.
    pub(super) fn listed(
        &mut self,
        from: Member,
        (member, candidacy): (Member, u64),
        held: Vec<Held>,
        is_whole: bool,
        memory: &mut impl Memory<Blocks = B>,
    ) {
        let learner = self.peers.get_mut(&member).and_then(|peer| peer.learner.as_mut());
        let learner = learner.filter(|learner| learner.candidacy == candidacy);
        let Some(list) = learner.and_then(|learner| learner.lists.get_mut(&from)) else { return };
        let last = held.last().map(|held| held.extent);
        list.held.extend(held);
        list.is_whole |= is_whole;
        match last {
            Some(last) if !is_whole => {
                let from_extent = Extent(last.0.saturating_add(1));
                self.send(from, Purport::List { learner: member, candidacy, from: from_extent }, memory);
            }
            None if !is_whole => self.drop_learner(member),
            _ => self.plan_learner(member),
        }
    }

    /// Says which extents are to be made equal, once all lists are there.
    fn plan_learner(&mut self, member: Member) {
        let Some(learner) = self.peers.get(&member).and_then(|peer| peer.learner.as_ref()) else { return };
        if learner.work.is_some() || !learner.lists.values().all(|list| list.is_whole) {
            return;
        }
        let is_its = |extent: Extent| self.membership.is_behind(member, extent);
        let mut work: BTreeSet<Extent> = learner.in_progress.clone();
        // Extents of the in-sync copies, and of it.
        let (mut there, mut here) = (BTreeSet::new(), BTreeSet::new());
        for (party, list) in &learner.lists {
            for held in list.held.iter().filter(|held| is_its(held.extent)) {
                if *party == member {
                    here.insert(held.extent);
                    if mutants::is(Mutant::ResyncSourceOnly) {
                        continue;
                    }
                } else if self.membership.owns(*party, held.extent) {
                    there.insert(held.extent);
                } else {
                    continue;
                }
                if held.version > self.membership.mark(member, held.extent) || held.is_active {
                    work.insert(held.extent);
                }
            }
        }
        work.extend(there.symmetric_difference(&here));
        if mutants::is(Mutant::EqualVersionSkipped) {
            work.retain(|extent| learner.order(member, *extent).is_ne());
        }
        let work: VecDeque<Extent> = work.into_iter().collect();
        if let Some(learner) = self.peers.get_mut(&member).and_then(|peer| peer.learner.as_mut()) {
            learner.planned = (self.now_ns, work.len() as u64);
            learner.work = Some(work);
        }
    }

    fn advance_learner(&mut self, member: Member) {
        let has_jobs = self.jobs.values().any(|job| job.purpose == Purpose::Resync(member));
        let Some(peer) = self.peers.get_mut(&member) else { return };
        let answered = peer.has_answered_writes();
        let Some(learner) = peer.learner.as_mut() else { return };
        let Some(work) = learner.work.as_mut() else { return };
        if learner.running < EXTENTS_AT_ONCE
            && let Some(extent) = work.pop_front()
        {
            learner.running += 1;
            self.begin_job(Purpose::Resync(member), Span::whole(extent));
            return;
        }
        if learner.running == 0
            && !has_jobs
            && answered
            && !learner.is_proposed
            && self.membership.doubt().is_none()
        {
            learner.is_proposed = true;
            self.change(Change { eject: BTreeMap::new(), join: vec![member] });
        }
    }

    /// An extent of a learner is equal.
    pub(super) fn extent_is_equal(&mut self, member: Member) {
        if let Some(learner) = self.peers.get_mut(&member).and_then(|peer| peer.learner.as_mut()) {
            learner.running = learner.running.saturating_sub(1);
        }
    }

    /// A member cannot be asked any more: learners that it is a source of, or that it is, begin anew.
    pub(super) fn drop_learners_that_need(&mut self, member: Member) {
        let needs =
            |peer: &Peer| peer.learner.as_ref().is_some_and(|learner| learner.lists.contains_key(&member));
        let learners: Vec<Member> =
            self.peers.iter().filter(|(_, peer)| needs(peer)).map(|(member, _)| *member).collect();
        for learner in learners {
            self.drop_learner(learner);
        }
    }

    /// A learner is none any more. If it was asked to be in sync, that stands: nothing is acknowledged without it until the outcome is
    /// known.
    pub(super) fn drop_learner(&mut self, member: Member) {
        if let Some(peer) = self.peers.get_mut(&member) {
            peer.learner = None;
        }
        #[cfg(mutants)]
        if mutants::is(Mutant::MarkRaised) {
            self.membership.raise_mark(member, self.next_version.before());
        }
        let of_it = self.jobs.iter().filter(|(_, job)| job.purpose == Purpose::Resync(member));
        let jobs: Vec<JobId> = of_it.map(|(at, _)| *at).collect();
        for at in jobs {
            self.drop_job(at);
        }
        self.leave(member);
    }
}
