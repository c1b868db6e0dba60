//! What has to move between two rings, before anything does.

use std::collections::BTreeMap;

use super::Ring;
use crate::StoreId;

/// One copy of a partition that is made, given up, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Which partition, as the new ring counts them.
    pub partition: u32,
    /// The store that gives its copy up; none where there are to be more copies than before. It may be gone: what is in the new copy
    /// comes from any owner in sync.
    pub from: Option<StoreId>,
    /// The store that gets one; none where there are to be fewer copies than before.
    pub to: Option<StoreId>,
    /// What is copied, in bytes; 0 without `to`.
    pub bytes: u64,
}

/// What has to move from one ring to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In the order of partitions.
    pub moves: Vec<Move>,
    /// The theoretical minimum of copies to be made: what stores have more of in the new ring than in the former one, summed. Whatever the
    /// owners, no two rings in which each store has as many copies as in these are nearer to each other.
    pub least_moves: u64,
}

impl Plan {
    /// Compares two rings; `bytes_of` has the bytes in one copy of a partition, as the new ring counts them. Partitions that the new
    /// ring does not have are left out.
    #[must_use]
    pub fn between(previous: &Ring, next: &Ring, bytes_of: impl Fn(u32) -> u64) -> Plan {
        let finer = next.rules.partition_bits.saturating_sub(previous.rules.partition_bits);
        let mut moves = Vec::new();
        let mut held: BTreeMap<StoreId, (u64, u64)> = BTreeMap::new();
        for partition in 0..next.rules.partitions() {
            let (before, after) = (previous.stores(partition >> finer), next.stores(partition));
            let mut given = before.iter().filter(|store| !after.contains(store)).copied();
            let mut gained = after.iter().filter(|store| !before.contains(store)).copied();
            loop {
                let (from, to) = (given.next(), gained.next());
                if from.is_none() && to.is_none() {
                    break;
                }
                let bytes = if to.is_some() { bytes_of(partition) } else { 0 };
                moves.push(Move { partition, from, to, bytes });
            }
            for store in &before {
                held.entry(*store).or_default().0 += 1;
            }
            for store in &after {
                held.entry(*store).or_default().1 += 1;
            }
        }
        let least_moves = held.into_values().map(|(before, after)| after.saturating_sub(before)).sum();
        Plan { moves, least_moves }
    }

    /// How many copies are made.
    #[must_use]
    pub fn copies(&self) -> u64 {
        self.moves.iter().filter(|one| one.to.is_some()).count() as u64
    }

    /// How many bytes are copied.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.moves.iter().fold(0, |sum, one| sum.saturating_add(one.bytes))
    }

    /// How many bytes each store gets, and how many it may free when its moves are finished.
    #[must_use]
    pub fn by_store(&self, bytes_of: impl Fn(u32) -> u64) -> BTreeMap<StoreId, Flows> {
        let mut flows: BTreeMap<StoreId, Flows> = BTreeMap::new();
        for one in &self.moves {
            if let Some(store) = one.to {
                let flow = flows.entry(store).or_default();
                flow.gets_bytes = flow.gets_bytes.saturating_add(one.bytes);
            }
            if let Some(store) = one.from {
                let flow = flows.entry(store).or_default();
                flow.frees_bytes = flow.frees_bytes.saturating_add(bytes_of(one.partition));
            }
        }
        flows
    }
}

/// What a plan means for one store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flows {
    /// Bytes that are copied to it.
    pub gets_bytes: u64,
    /// Bytes of which its copy is given up.
    pub frees_bytes: u64,
}
