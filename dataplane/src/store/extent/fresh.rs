//! A fresh store without a device: what opening a blank device of some size gives, for a device that is simulated or does not
//! matter, as in tests and measurements.
//!
//! The caller's [`Disk`](crate::store::Disk) has to give back what is written between [`Superblock::data_offset`] of a slot and
//! the slot's end; nothing else is read while the store is open.

use std::sync::Arc;

use cluster_map::{ClusterId, NodeId, StoreId};

use super::extents::{Extents, FreeSlot};
use super::format::{Shape, Superblock};
use super::shard::{JournalState, Recovered, ScrubProgress, Shard, ShardConfig};
use super::shared::Shared;

/// A store that holds nothing.
#[derive(Debug)]
pub struct FreshStore {
    /// Where everything is.
    pub layout: Arc<Superblock>,
    /// What the shards share; all slots are free in it, the lowest first, and there are no more.
    pub shared: Arc<Shared>,
    /// The shards, by number.
    pub shards: Vec<Box<Shard>>,
}

impl FreshStore {
    /// On a device of `device_bytes` whose writes of a block may be torn; `None` where not one extent fits.
    #[must_use]
    pub fn new(device_bytes: u64, shape: Shape) -> Option<FreshStore> {
        let (cluster, node, store) = (ClusterId([1; 16]), NodeId([2; 16]), StoreId([3; 16]));
        let layout = Arc::new(Superblock::new(cluster, node, store, [4; 16], device_bytes, shape)?);
        let shared = Arc::new(Shared::new(layout.slots(), layout.shards));
        for slot in 0..layout.slots() {
            shared.add_free(FreeSlot::new(slot));
        }
        shared.set_no_more(true);
        let shards = (0..layout.shards).map(|shard| {
            let (layout, shared) = (Arc::clone(&layout), Arc::clone(&shared));
            // As a format leaves it: one checkpoint, in the first of its two places.
            let recovered = Recovered {
                extents: Extents::new(layout.slots()),
                journal: JournalState::default(),
                last_record_lsn: 0,
                marked_placed_lsn: 0,
                checkpoint_sequence: 1,
                checkpoint_which: 0,
                scrub: ScrubProgress::default(),
            };
            let (atomic_blocks, flushes_batches) = (false, false);
            let config = ShardConfig { layout, shard, atomic_blocks, flushes_batches, shared };
            Box::new(Shard::new(config, recovered))
        });
        let shards = shards.collect();
        Some(FreshStore { layout, shared, shards })
    }
}
