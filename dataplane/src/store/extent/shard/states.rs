//! What replicas of layers must not forget: made durable with the batch that goes out anyway, and kept in checkpoints.
//!
//! Invariants (I4, I11, I14):
//! * A state is one record of one batch: after a crash it is there as a whole, or the one before it is.
//! * States of a layer become durable in the order in which they were asked for.
//! * A checkpoint has room for every state that a batch was given.

use std::sync::Arc;

use super::batch::Applied;
use super::writing::Taken;
use super::{Op, Shard, What};
use crate::store::extent::format::{LayerState, Record, ReplicaState};
use crate::store::{RequestToken, StoreError};

/// Room that checkpoints have for states.
#[derive(Debug)]
pub(super) struct StateRoom {
    /// Units of a record that are not taken.
    free_units: usize,
}

impl StateRoom {
    /// What `used_units` leave of so many.
    ///
    /// # Panics
    /// If these are more: see [`crate::store::extent::recovery`].
    pub(super) fn new(units_max: usize, used_units: usize) -> StateRoom {
        StateRoom { free_units: units_max.checked_sub(used_units).expect("what was read had room") }
    }

    /// Takes the room of a layer's next state and gives that of its last one back; whether there was enough.
    fn exchange(&mut self, before_units: usize, after_units: usize) -> bool {
        let room = self.free_units + before_units;
        let is_enough = after_units <= room;
        if is_enough {
            self.free_units = room - after_units;
        }
        is_enough
    }
}

impl Shard {
    /// Begins to keep what a replica of a layer must not forget, instead of what was kept before. The outcome has no blocks and is
    /// good when it is durable; it is [`StoreError::NoSpace`] where too many layers have too much of it, and nothing has changed then.
    pub fn persist(&mut self, request: RequestToken, object: u32, state: Arc<ReplicaState>) {
        let mut op = Op::new(Some(request), What::Persist, object, 0, 1);
        op.state = Some(state);
        self.await_batch(op);
    }

    /// What is durably kept of a layer's replica.
    #[must_use]
    pub fn state(&self, object: u32) -> Option<&Arc<ReplicaState>> {
        self.extents.state(object)
    }

    pub(super) fn take_persist(&mut self, at: u32) -> Taken {
        let op = &mut self.ops[at as usize];
        let (object, Some(state)) = (op.object, op.state.take()) else {
            unreachable!("a state is taken once");
        };
        let version = self.extents.highest_version(object);
        let state = LayerState { object, version, state };
        if !self.next.has_room_for(state.units()) {
            self.ops[at as usize].state = Some(state.state);
            return Taken::Part;
        }
        let before_units = self.last_state_units(object);
        if !self.states.exchange(before_units, state.units()) {
            return self.refuse(at, StoreError::NoSpace);
        }
        self.next.record(Record::Persist(state.clone()), Applied::Persisted { op: at, state });
        self.ops[at as usize].queued = 1;
        Taken::Whole
    }

    /// Ends the state of a layer of which nothing is left; whether the batch in the making had room for that.
    pub(super) fn take_forget(&mut self, at: u32) -> bool {
        let object = self.ops[at as usize].object;
        let before_units = self.last_state_units(object);
        if before_units == 0 {
            return true;
        }
        if !self.next.has_room_for(1) {
            return false;
        }
        self.states.exchange(before_units, 0);
        self.next.record(Record::Forget { object }, Applied::Forgotten { op: at, object });
        self.count_queued(at);
        true
    }

    /// What the newest state of a layer takes, that of a batch which has not ended before one that is durable; 0 for none.
    fn last_state_units(&self, object: u32) -> usize {
        let batched = self.next.state_units(object).or_else(|| self.batch.state_units(object));
        batched.unwrap_or_else(|| self.extents.state(object).map_or(0, |state| state.units()))
    }
}
