//! Giving up what a store no longer owns of a volume: a partition that was moved to others (I2, I11).
//!
//! Whoever asks for it has a record that names other owners, all of them complete, under the epoch that is given. A head that does not
//! know of that record may still take the store for an owner, and would be told of holes where data were.
//!
//! Invariants:
//! * Nothing is given up before the epoch is durable, and before every request that was admitted under a lower one has ended: what comes
//!   after is refused.
//! * While a partition is being given up nothing is done for it under a higher epoch. One that is asked for ends it, part done.

use std::collections::{BTreeSet, VecDeque};

use cluster_map::VolumeId;

use super::{Ended, Output, Replicas, Volume, What, Work, WorkId, ended_is_done};
use crate::message::{Fault, Held};
use crate::mutants::{self, Mutant};
use crate::terms::{Epoch, Extent, Member};

/// A partition that a store does not own any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share {
    /// Its index.
    pub partition: u32,
    /// How many the volume has.
    pub of: u32,
    /// Since which epoch others own it.
    pub epoch: Epoch,
}

impl Share {
    fn has(&self, extent: Extent) -> bool {
        extent.0 % self.of.max(1) == self.partition
    }
}

#[derive(Debug)]
enum Step {
    /// Until the epoch is durable.
    Fence,
    /// Until what was admitted before has ended.
    Drain(BTreeSet<WorkId>),
    /// Its extents are looked for, from this one on.
    List(Extent),
    /// They are given up, one after the other; then the list goes on, or ends.
    Drop { extents: VecDeque<Extent>, next: Option<Extent> },
}

/// How far a partition is given up.
#[derive(Debug)]
pub(super) struct Retiring {
    share: Share,
    step: Step,
    /// A store works at it.
    is_working: bool,
    /// It is owned again.
    is_ended: bool,
}

impl<B> Replicas<B> {
    /// Gives up what a store has of a partition that it does not own any more. [`Output::Retired`] says when nothing is left; where
    /// something fails it is to be asked for again.
    pub fn retire(&mut self, member: Member, id: VolumeId, share: Share, now_ns: u64) {
        self.now_ns = now_ns;
        if !self.members.contains(&member) {
            return;
        }
        let key = (member, id);
        let volume = self.volumes.entry(key).or_insert_with(|| Volume::new(super::Durable::default()));
        let is_owner_again = volume.epoch(share.partition) > share.epoch;
        if is_owner_again || volume.retiring.contains_key(&share.partition) {
            return;
        }
        let retiring = Retiring { share, step: Step::Fence, is_working: false, is_ended: false };
        volume.retiring.insert(share.partition, retiring);
        self.advance_retiring(key);
    }

    /// Goes on with what waits for an epoch to be durable, or for requests to end.
    pub(super) fn advance_retiring(&mut self, key: (Member, VolumeId)) {
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        let partitions: Vec<u32> = volume.retiring.keys().copied().collect();
        for partition in partitions {
            self.step(key, partition);
        }
    }

    fn step(&mut self, key: (Member, VolumeId), partition: u32) {
        let running: BTreeSet<WorkId> = self.admitted(key);
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        let known = volume.epoch(partition);
        let is_persisting = volume.is_persisting;
        let Some(retiring) = volume.retiring.get_mut(&partition) else { return };
        if retiring.is_working {
            return;
        }
        if retiring.is_ended {
            volume.retiring.remove(&partition);
            return;
        }
        match &mut retiring.step {
            Step::Fence if mutants::is(Mutant::RetireWithoutFence) => {
                retiring.step = Step::List(Extent(0));
                self.step(key, partition);
            }
            Step::Fence if is_persisting => {}
            Step::Fence if known < retiring.share.epoch => {
                let epoch = retiring.share.epoch;
                self.persist_epoch(key, partition, epoch);
            }
            Step::Fence => {
                retiring.step = Step::Drain(running);
                self.step(key, partition);
            }
            Step::Drain(before) => {
                before.retain(|id| running.contains(id));
                if before.is_empty() {
                    retiring.step = Step::List(Extent(0));
                    self.step(key, partition);
                }
            }
            Step::List(from) => {
                let from = *from;
                retiring.is_working = true;
                self.start(key, Work::List(from), What::Retire(partition));
            }
            Step::Drop { extents, next } => match (extents.pop_front(), *next) {
                (Some(extent), _) => {
                    retiring.is_working = true;
                    self.start(key, Work::Drop(extent), What::Retire(partition));
                }
                (None, Some(next)) => {
                    retiring.step = Step::List(next);
                    self.step(key, partition);
                }
                (None, None) => {
                    let share = retiring.share;
                    volume.retiring.remove(&partition);
                    self.outputs.push_back(Output::Retired(key.0, key.1, share));
                }
            },
        }
    }

    /// A store has listed, or given up an extent.
    pub(super) fn retire_worked(&mut self, key: (Member, VolumeId), partition: u32, ended: &Ended<B>) {
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        let Some(retiring) = volume.retiring.get_mut(&partition) else { return };
        retiring.is_working = false;
        match ended {
            Ended::List { held, is_whole } => {
                let last = held.last().map(|held| held.extent);
                let is_its = |held: &&Held| retiring.share.has(held.extent);
                let extents = held.iter().filter(is_its).map(|held| held.extent).collect();
                let next = last.filter(|_| !is_whole).map(|last| Extent(last.0.saturating_add(1)));
                retiring.step = Step::Drop { extents, next };
            }
            ended if ended_is_done(ended) => {}
            _ => retiring.is_ended = true,
        }
        self.step(key, partition);
    }

    /// Whether a request under this epoch has to wait for a partition that is being given up. That it is asked for ends it.
    pub(super) fn must_wait_for_retiring(
        &mut self,
        key: (Member, VolumeId),
        partition: u32,
        epoch: Epoch,
    ) -> bool {
        let retiring = self.volumes.get_mut(&key).and_then(|volume| volume.retiring.get_mut(&partition));
        let Some(retiring) = retiring.filter(|retiring| epoch > retiring.share.epoch) else { return false };
        retiring.is_ended = true;
        self.step(key, partition);
        self.volumes.get(&key).is_some_and(|volume| volume.retiring.contains_key(&partition))
    }

    /// Requests of a volume that a store works at.
    fn admitted(&self, key: (Member, VolumeId)) -> BTreeSet<WorkId> {
        let is_its = |(member, id, what): &(Member, VolumeId, What)| {
            (*member, *id) == key && matches!(what, What::Request(..))
        };
        self.running.iter().filter(|(_, work)| is_its(work)).map(|(id, _)| *id).collect()
    }
}

/// What a head is told that has to wait for a partition to be given up: it asks again.
pub(super) const WAIT: Fault = Fault::NoMemory;
