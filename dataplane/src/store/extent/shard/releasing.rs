//! Hollow extents: those of replicated layers of which all blocks were taken away. Each stays listed, with its version and without
//! any block, until the head's stable mark has passed its version: a new head must find what it has to make equal. Then it ends.
//!
//! A look at all of them is due when a mark has moved. It is taken in steps, between two batches.

use std::collections::VecDeque;

use super::Shard;
use super::batch::Applied;
use crate::store::extent::extents::{ExtentId, Half};
use crate::store::extent::format::Record;

/// Extents that are looked at in one go: some ten microseconds.
const STEPS_MAX: usize = 1024;
/// Extents that end with one batch: most of its room is for writes.
const RECORDS_MAX: u32 = 32;

/// Which extents wait for the stable mark.
#[derive(Debug)]
pub(super) struct ReleaseState {
    /// Places of extents that are hollow or were; in no order.
    queue: VecDeque<ExtentId>,
    /// By place: whether it is in the queue.
    is_queued: Vec<bool>,
    /// How many are to be looked at.
    due: usize,
    /// One that could go was being changed: when that has ended another look is due.
    again: bool,
}

impl ReleaseState {
    /// All memory is taken here, for a shard that may come to have all `slots` of its store.
    pub(super) fn new(hollow: impl Iterator<Item = ExtentId>, slots: u32) -> ReleaseState {
        let slots = slots as usize;
        let mut state = ReleaseState {
            queue: VecDeque::with_capacity(slots),
            is_queued: vec![false; slots],
            due: 0,
            again: false,
        };
        hollow.for_each(|id| state.add(id));
        state
    }

    /// An extent has become hollow.
    pub(super) fn add(&mut self, id: ExtentId) {
        if !std::mem::replace(&mut self.is_queued[id.0 as usize], true) {
            self.queue.push_back(id);
        }
        // The mark may have passed it already.
        self.due = self.queue.len();
    }

    /// A stable mark has moved; whether that matters to any.
    pub(super) fn look_again(&mut self) -> bool {
        self.due = self.queue.len();
        self.due > 0
    }

    /// A batch has ended.
    pub(super) fn batch_ended(&mut self) {
        if std::mem::take(&mut self.again) {
            self.due = self.queue.len();
        }
    }

    /// Whether some are to be looked at.
    pub(super) fn is_due(&self) -> bool {
        self.due > 0
    }
}

impl Shard {
    /// Gives the batch in the making the ends of extents that nobody needs to know of any more.
    pub(super) fn release_hollow(&mut self) {
        let mut records = 0;
        for _ in 0..STEPS_MAX {
            if self.releases.due == 0 || records == RECORDS_MAX || !self.next.has_room_for(2) {
                break;
            }
            self.releases.due -= 1;
            let Some(id) = self.releases.queue.pop_front() else { break };
            // Its place may have another extent now.
            let is_hollow = |extent: &super::Extent| extent.hollow && !extent.ending && !extent.ended;
            let Some((_, extent)) = self.extents.at(id.0).filter(|(_, extent)| is_hollow(extent)) else {
                self.releases.is_queued[id.0 as usize] = false;
                continue;
            };
            if !self.is_stable(extent) {
                self.releases.queue.push_back(id);
            } else if extent.activating || extent.deactivating || self.batches_concern(id) {
                self.releases.queue.push_back(id);
                self.releases.again = true;
            } else {
                self.releases.is_queued[id.0 as usize] = false;
                self.end_extent(id, None);
                records += 1;
            }
        }
    }

    /// Gives the batch in the making the end of an extent, which `op` waits for.
    pub(super) fn end_extent(&mut self, id: ExtentId, op: Option<u32>) {
        let version = self.newest_version(id);
        let home = self.extents.get(id).home();
        // One that is on its way out needs no other record.
        if self.extents.get(id).halves[usize::from(home ^ 1)].as_ref().is_some_and(Half::stays) {
            self.free_half(id, home ^ 1);
        }
        let extent = self.extents.get_mut(id);
        extent.ending = true;
        let (slot, object, number) = (extent.slot(), extent.object, extent.number);
        self.shared.begin_giving_back();
        let record = Record::Free { slot, object, extent: number, goes_on: false, version };
        self.next.record(record, Applied::Freed { op, extent: id });
    }
}
