//! What the cores and the manager share of a store: slots that are free, counters, and what shards have to tell.
//!
//! Invariants:
//! * A slot is in [`Shared::free`] only when no durable state of any shard names it and no write to it is in flight. So it has
//!   one owner at any time: the queue, the shard that took it, or the manager that prepares it.
//! * Everything here is a bounded lock-free queue or an atomic counter of its own; no order between two of them is relied on,
//!   but for [`Shared::no_more`]: it is set after the last slot was queued, and looked at before the queue is.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crossbeam::queue::ArrayQueue;

use super::extents::FreeSlot;

/// What a shard tells the manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShardEvent {
    /// Nothing is left of a layer from that block on: durably.
    Unmapped {
        /// The layer.
        object: u32,
        /// The first block that is gone; 0 when all are.
        from_block: u64,
    },
    /// The shard takes no more writes.
    Failed {
        /// Which.
        shard: u16,
        /// Why.
        why: &'static str,
    },
}

/// How often something has happened.
#[derive(Debug, Default)]
pub struct Counters {
    /// Extents that have a slot.
    pub allocated: AtomicU32,
    /// Blocks whose checksum did not match.
    pub checksum_errors: AtomicU64,
    /// Blocks without any good copy.
    pub lost_blocks: AtomicU64,
    /// Batches written.
    pub batches: AtomicU64,
    /// Blocks written in them or beside them.
    pub blocks: AtomicU64,
    /// Checkpoints made.
    pub checkpoints: AtomicU64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, more: u64) {
        counter.fetch_add(more, Ordering::Relaxed);
    }
}

/// The shared part of an open store.
#[derive(Debug)]
pub struct Shared {
    /// Slots that may be given to extents at once.
    pub free: ArrayQueue<FreeSlot>,
    /// What shards tell.
    pub events: ArrayQueue<ShardEvent>,
    /// Counters.
    pub counters: Counters,
    /// How far each shard's scrub is.
    pub scrubs: Box<[ScrubCell]>,
    no_more: AtomicBool,
}

/// How far a shard's scrub is, for the manager to read.
#[derive(Debug, Default)]
pub struct ScrubCell {
    /// The run; 0 before the first. Written last when it changes.
    pub run: AtomicU64,
    /// Extents that it has behind it.
    pub done_extents: AtomicU32,
    /// Bad blocks that it has found.
    pub errors: AtomicU64,
    /// It has all of them behind it.
    pub is_finished: AtomicBool,
}

/// Events that may wait for the manager; shards keep what does not fit and try again.
const EVENTS_MAX: usize = 1024;

impl Shared {
    /// For a store of that many slots and shards; no slot is free yet.
    #[must_use]
    pub fn new(slots: u32, shards: u16) -> Shared {
        Shared {
            free: ArrayQueue::new(slots.max(1) as usize),
            events: ArrayQueue::new(EVENTS_MAX),
            counters: Counters::default(),
            scrubs: (0..shards).map(|_| ScrubCell::default()).collect(),
            no_more: AtomicBool::new(false),
        }
    }

    /// Whether an empty [`Shared::free`] means that the store is full; else more slots are being prepared.
    #[must_use]
    pub fn no_more(&self) -> bool {
        self.no_more.load(Ordering::Acquire)
    }

    /// The manager says whether it has slots that it has not queued yet.
    pub fn set_no_more(&self, no_more: bool) {
        self.no_more.store(no_more, Ordering::Release);
    }

    /// Makes a slot free.
    ///
    /// # Panics
    /// If more slots are free than the store has: one was freed twice.
    pub fn give_back(&self, slot: FreeSlot) {
        let queued = self.free.push(slot);
        assert!(queued.is_ok(), "a store has no more free slots than slots");
    }
}
