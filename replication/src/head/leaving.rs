//! A head that is to hand over: it ends what is in progress, gives its grants back, and waits for its successor.
//!
//! Its replicas open the next generation at once then, and since everything is stable by that time there is nothing to be made equal. A
//! successor that does not come is not waited for: the head opens its generation again and goes on.
//!
//! Invariants:
//! * Grants are given back when nothing is in progress, nothing is unequal, no change is in doubt, and every needed owner can be told.
//! * From then on nothing is asked, read or answered, until replicas have opened the generation again.
//! * For no longer than [`LIMIT_NS`] at a time is a volume not served because of it.

use super::{Head, Output, Purport, Stage};
use crate::grants::Grants;
use crate::message::Memory;
use crate::mutants::{self, Mutant};
use crate::terms::Member;

/// For how long requests wait for a hand-over, from the wish to the successor's record.
const LIMIT_NS: u64 = 2_000_000_000;
/// How long after that the same wish is not followed again.
const REST_NS: u64 = 3_000_000_000;
/// How long a replica is waited for that was told that it has its grant back. One that was not told opens later.
const TELL_NS: u64 = 300_000_000;

/// How far a head is with handing over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaving {
    /// It is not asked to, or has given it up until then.
    No { until_ns: u64 },
    /// Nothing is begun any more.
    Ending { since_ns: u64 },
    /// Replicas are told that they have their grants back.
    Telling { since_ns: u64, told_ns: u64 },
    /// It waits for its successor.
    Gone { since_ns: u64 },
}

impl<B> Head<B> {
    /// Whether it begins nothing.
    pub(super) fn is_leaving(&self) -> bool {
        !matches!(self.leaving, Leaving::No { .. })
    }

    /// Whether it has given its grants back, or is about to.
    pub(super) fn has_left(&self) -> bool {
        matches!(self.leaving, Leaving::Telling { .. } | Leaving::Gone { .. })
    }

    /// Whether it has handed over: whoever is head next can open its generation at once.
    #[must_use]
    pub fn has_handed_over(&self) -> bool {
        matches!(self.leaving, Leaving::Gone { .. })
    }

    /// Takes the next step of a hand-over, if one is wished for, or of going on instead.
    pub(super) fn advance_leaving(&mut self, grants: &Grants, memory: &mut impl Memory<Blocks = B>) {
        let is_wished = self.membership.record().is_moving;
        let is_over = |since_ns: u64| self.now_ns.saturating_sub(since_ns) >= LIMIT_NS;
        match self.leaving {
            Leaving::No { until_ns } => {
                if is_wished && self.now_ns >= until_ns && self.is_serving(grants, self.now_ns) {
                    self.leaving = Leaving::Ending { since_ns: self.now_ns };
                    self.advance_leaving(grants, memory);
                }
            }
            Leaving::Ending { since_ns } if !is_wished || is_over(since_ns) => self.stay(memory),
            Leaving::Ending { since_ns } => {
                self.let_learners_go();
                if self.has_nothing_left() {
                    self.give_back(memory);
                    self.leaving = Leaving::Telling { since_ns, told_ns: self.now_ns };
                }
            }
            Leaving::Telling { since_ns, .. } | Leaving::Gone { since_ns }
                if !is_wished || is_over(since_ns) =>
            {
                self.stay(memory);
            }
            Leaving::Telling { since_ns, told_ns } => {
                let is_late =
                    self.now_ns.saturating_sub(told_ns) >= TELL_NS || mutants::is(Mutant::HandedBackEarly);
                if is_late || !self.peers.values().any(|peer| peer.is_asked(Purport::Close)) {
                    self.leaving = Leaving::Gone { since_ns };
                    self.outputs.push_back(Output::HandedOver(true));
                }
            }
            Leaving::Gone { .. } => {}
        }
    }

    /// Members that are being brought up to date begin anew under the successor. One that is asked to be in sync may be so already.
    fn let_learners_go(&mut self) {
        let is_proposed =
            |member: &Member| self.membership.doubt().is_some_and(|change| change.join.contains(member));
        let learners = self.peers.iter().filter(|(member, peer)| peer.is_learner() && !is_proposed(member));
        let learners: Vec<Member> = learners.map(|(member, _)| *member).collect();
        for learner in learners {
            self.drop_learner(learner);
        }
    }

    /// Whether everything is answered, equal, and known to every needed owner.
    fn has_nothing_left(&self) -> bool {
        let owners = self.membership.partitions().iter().flat_map(|partition| &partition.owners);
        let mut needed = owners.filter(|owner| self.membership.is_needed(owner));
        let is_begun = self.ops.values().any(|op| op.stage != Stage::Waiting);
        let is_early = mutants::is(Mutant::HandedBackEarly) || mutants::is(Mutant::CleanThoughUnequal);
        self.membership.doubt().is_none()
            && (!is_begun || is_early)
            && self.jobs.is_empty()
            && self.repairs.is_empty()
            && self.unequal.is_empty()
            && needed.all(|owner| self.peers.get(&owner.member).is_some_and(super::Peer::is_open))
    }

    fn give_back(&mut self, memory: &mut impl Memory<Blocks = B>) {
        let open = self.peers.iter().filter(|(_, peer)| peer.is_open());
        let open: Vec<Member> = open.map(|(member, _)| *member).collect();
        for member in open {
            self.send(member, Purport::Close, memory);
            // Nothing is asked of it, and no grant of it counts, from here on.
            if let Some(peer) = self.peers.get_mut(&member).filter(|_| !mutants::is(Mutant::HandedBackEarly))
            {
                peer.opened = None;
            }
        }
    }

    /// Serves on: the wish is taken back, or nobody has come.
    fn stay(&mut self, memory: &mut impl Memory<Blocks = B>) {
        if self.has_handed_over() {
            self.outputs.push_back(Output::HandedOver(false));
        }
        let had_left = self.has_left();
        self.leaving = Leaving::No { until_ns: self.now_ns + REST_NS };
        if had_left {
            let members: Vec<Member> = self.peers.keys().copied().collect();
            for member in members {
                self.reopen(member, memory);
            }
        }
    }
}
