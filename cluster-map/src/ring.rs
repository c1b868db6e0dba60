//! The ring: which stores have which partition, as a pure function of the members and of the ring before.
//!
//! A volume's extents are dealt to partitions by [`partition_of`]; the ring is a table from each partition to an ordered list
//! of stores, its owners. What holds for every ring that [`Ring::compute`] gives:
//! - the same members, rules and former ring give the same ring on every machine: whole numbers only, and an order of
//!   the members that does not depend on how they are listed;
//! - a partition has as many owners as there are to be copies, no two of them on one node;
//! - of kind [`Kind::Balanced`]: no zone has more copies of a partition than it must, each store has its share of the copies by
//!   capacity to within two, and from one ring to the next no more copies move than the new shares ask for.
//!
//! Nothing moves because of a ring alone: [`Plan`] says what would, and [`PartitionRecord`] takes one partition from its
//! owners to those of the ring, in two steps that each have an epoch (I11). `docs/decisions/0019-ring.md` says why it is so.
#![forbid(unsafe_code)]

mod balanced;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod hash;
mod plan;
mod record;
mod seed;
mod shares;
#[cfg(all(test, not(loom)))]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use crate::replication::MAX_OWNERS;
use crate::{NodeId, StoreId, VolumeId};

pub use plan::{Flows, Move, Plan};
pub use record::{
    MAX_PAST, PartitionRecord, PastRing, RecordError, RingRecord, SEGMENT_PARTITIONS, Segment, StepError,
    ring_of,
};

/// Most stores of a ring, so that its record stays below what etcd takes in one value by default (1.5 MiB).
pub const MAX_MEMBERS: usize = 24_576;
/// Most zones that have a name.
pub const MAX_ZONES: usize = 4096;
/// Most partitions, as a power of two.
pub const MAX_PARTITION_BITS: u8 = 20;
/// Partitions of a cluster for which nothing else was said, as a power of two.
pub const DEFAULT_PARTITION_BITS: u8 = 16;
/// Longest name of a zone, in bytes.
pub const MAX_ZONE_BYTES: usize = 64;
/// A store's whole weight: it takes its share by capacity.
pub const FULL_WEIGHT: u16 = 1000;
/// Points of a store of average capacity on the circle of [`Kind::Ketama`], for which nothing else was said.
pub const DEFAULT_POINTS: u16 = 160;
/// Most points of a store of average capacity.
pub const MAX_POINTS: u16 = 1000;

/// Stands for no store in a table of indexes.
const NONE: u16 = u16::MAX;

/// How a ring chooses owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Everything on the one store that there is.
    Single,
    /// Partition `p` on the stores `p`, `p + 1`, … of all, in the order of their ids, modulo their number. Nothing else counts,
    /// and nearly everything moves when a store comes or goes.
    Mod,
    /// Consistent hashing: stores have points on a circle, in proportion to capacity, and a partition belongs to the next
    /// ones on different nodes. Little moves; balance is a matter of chance.
    Ketama {
        /// Points of a store of average capacity, 1 to [`MAX_POINTS`].
        points: u16,
    },
    /// Shares by capacity, copies in different zones, least movement from the former ring.
    Balanced,
}

/// What a ring is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// How owners are chosen.
    pub kind: Kind,
    /// Owners of each partition, 1 to [`MAX_OWNERS`].
    pub copies: u8,
    /// Partitions, as a power of two, up to [`MAX_PARTITION_BITS`]. May grow and never shrink.
    pub partition_bits: u8,
}

impl Rules {
    /// The number of partitions.
    #[must_use]
    pub fn partitions(&self) -> u32 {
        1 << self.partition_bits.min(MAX_PARTITION_BITS)
    }
}

/// A store that can own partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which.
    pub store: StoreId,
    /// The node that has it.
    pub node: NodeId,
    /// The zone of the node: what fails together. Empty: the node is a zone by itself.
    pub zone: String,
    /// How much it can hold, in bytes, at least 1.
    pub capacity_bytes: u64,
    /// How much of its share it takes, in thousandths, up to [`FULL_WEIGHT`]; 0 drains it.
    pub weight: u16,
}

/// Why there is no such ring. Each message says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// Nobody can own anything.
    #[error("a ring needs a store: add one")]
    NoMembers,
    /// More than fit into a ring's record.
    #[error(
        "{count} stores are more than the {MAX_MEMBERS} of a ring: make fewer and larger stores of the disks"
    )]
    TooManyMembers {
        /// How many there are.
        count: usize,
    },
    /// Two members are the same store, or a store was added that is a member.
    #[error("store {0} is named twice: name each store once")]
    DuplicateStore(StoreId),
    /// A store was to be removed that is no member.
    #[error("store {0} is not in the ring: list the members and name one of them")]
    UnknownStore(StoreId),
    /// The all-zero id names nothing.
    #[error("a member of the ring has no id of its store or node: give both")]
    NilId,
    /// Its share would be nothing, by mistake rather than by wish.
    #[error(
        "store {0} has a capacity of 0 bytes: wait until its size is known, or leave it out; weight 0 drains a store"
    )]
    NoCapacity(StoreId),
    /// A weight above the whole.
    #[error("store {store} has weight {weight}, of at most {FULL_WEIGHT} thousandths: lower it")]
    Weight {
        /// The store.
        store: StoreId,
        /// Its weight.
        weight: u16,
    },
    /// The name of a zone is too long.
    #[error("the zone of node {0} has a name of more than {MAX_ZONE_BYTES} bytes: shorten it")]
    ZoneName(NodeId),
    /// More than fit into a ring's record.
    #[error(
        "{0} zones are more than the {MAX_ZONES} of a ring: join some, or name none where each node is one"
    )]
    TooManyZones(usize),
    /// The stores of one node are said to be in two zones.
    #[error("node {0} is in two zones: give all of its stores one")]
    TwoZones(NodeId),
    /// No such number of copies.
    #[error("{0} copies cannot be kept: ask for 1 to {MAX_OWNERS}")]
    Copies(u8),
    /// No such number of partitions.
    #[error("2^{0} partitions are too many: ask for at most 2^{MAX_PARTITION_BITS}")]
    PartitionBits(u8),
    /// Partitions cannot be joined: their data lie on different stores.
    #[error("a ring of 2^{from} partitions cannot become one of 2^{to}: ask for at least as many")]
    FewerPartitions {
        /// Those of the former ring.
        from: u8,
        /// Those that were asked for.
        to: u8,
    },
    /// No such number of points.
    #[error("{0} points for a store cannot be had: ask for 1 to {MAX_POINTS}")]
    Points(u16),
    /// Copies of a partition are on different nodes.
    #[error(
        "{copies} copies need as many nodes with a store that takes data, and there are {nodes}: add nodes or ask for fewer copies"
    )]
    TooFewNodes {
        /// Copies that were asked for.
        copies: u8,
        /// Nodes that can have one.
        nodes: usize,
    },
    /// [`Kind::Single`] is for one store.
    #[error(
        "a ring of kind single has one store and one copy, not {members} and {copies}: choose another kind"
    )]
    NotSingle {
        /// Stores.
        members: usize,
        /// Copies.
        copies: u8,
    },
    /// No assignment was found though there is one.
    #[error(
        "no owners were found for some partitions: this is a fault of this program, please report the members of the ring"
    )]
    Unsolved,
}

/// A partition of the cluster that an extent belongs to: the top `partition_bits` bits of a hash of the volume and of the extent's
/// number modulo the volume's `spread`, so that one volume depends on at most `spread` partitions. With one bit more,
/// partition `p` becomes `2p` and `2p + 1`, and no data moves. A spread of 0 counts as 1.
///
/// This function is part of the format of all data: it never changes.
#[must_use]
pub fn partition_of(volume: VolumeId, extent: u64, spread: u32, partition_bits: u8) -> u32 {
    let [high, low] = hash::halves(&volume.0);
    let slot = extent % u64::from(spread.max(1));
    hash::top_bits(hash::of([high, low, slot]), partition_bits.min(MAX_PARTITION_BITS))
}

/// A table from partitions to their owners, with the members and the rules that it was computed from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    rules: Rules,
    /// In the order of their stores' ids.
    members: Vec<Member>,
    /// Indexes of members, `copies` for each partition.
    owners: Vec<u16>,
}

impl Ring {
    /// The ring of these members. `previous` is the ring that is in force, from which [`Kind::Balanced`] moves as little as it can:
    /// [`Plan::least_moves`] has the theoretical minimum, and more is moved only where copies would otherwise meet in a zone or on
    /// a node. Without one, all partitions are dealt anew.
    ///
    /// A former ring of fewer partitions is taken as one of as many, each partition's owners owning all of its parts.
    ///
    /// # Errors
    /// [`RingError`], if the members or rules make no ring.
    pub fn compute(
        rules: Rules,
        mut members: Vec<Member>,
        previous: Option<&Ring>,
    ) -> Result<Ring, RingError> {
        members.sort_by_key(|member| member.store);
        check(&rules, &members)?;
        if let Some(previous) = previous.filter(|ring| ring.rules.partition_bits > rules.partition_bits) {
            let (from, to) = (previous.rules.partition_bits, rules.partition_bits);
            return Err(RingError::FewerPartitions { from, to });
        }
        let owners = match rules.kind {
            Kind::Single => vec![0; rules.partitions() as usize],
            Kind::Mod => seed::modulo(&rules, &members),
            Kind::Ketama { points } => seed::ketama(&rules, &members, points),
            Kind::Balanced => balanced::owners(&rules, &members, previous)?,
        };
        Ok(Ring { rules, members, owners })
    }

    /// The ring after members have come and gone, under the same rules; [`Plan::between`] says what has to move for it.
    ///
    /// # Errors
    /// As [`compute`](Self::compute), and where a store is added that is a member or removed that is none.
    pub fn change(&self, add: Vec<Member>, remove: &[StoreId]) -> Result<Ring, RingError> {
        let gone: BTreeSet<StoreId> = remove.iter().copied().collect();
        if let Some(unknown) = gone.iter().find(|store| self.member(**store).is_none()) {
            return Err(RingError::UnknownStore(*unknown));
        }
        let stay = self.members.iter().filter(|member| !gone.contains(&member.store)).cloned();
        Ring::compute(self.rules, stay.chain(add).collect(), Some(self))
    }

    /// What it was computed by.
    #[must_use]
    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// Its stores, in the order of their ids.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The member with this store.
    #[must_use]
    pub fn member(&self, store: StoreId) -> Option<&Member> {
        self.index_of(store).map(|index| &self.members[index])
    }

    /// The owners of a partition, as indexes into [`members`](Self::members), in order. Of a partition that the ring does not
    /// have, none.
    #[must_use]
    pub fn owners(&self, partition: u32) -> &[u16] {
        let copies = usize::from(self.rules.copies);
        let first = partition as usize * copies;
        self.owners.get(first..first + copies).unwrap_or(&[])
    }

    /// The stores that own a partition, in order.
    #[must_use]
    pub fn stores(&self, partition: u32) -> Vec<StoreId> {
        self.owners(partition).iter().map(|owner| self.members[usize::from(*owner)].store).collect()
    }

    /// How many copies of partitions each member has, in the order of [`members`](Self::members).
    #[must_use]
    pub fn counts(&self) -> Vec<u32> {
        let mut counts = vec![0; self.members.len()];
        for owner in &self.owners {
            counts[usize::from(*owner)] += 1;
        }
        counts
    }

    /// How many copies each member is to have by capacity, weight and zone, in the order of [`members`](Self::members): what
    /// [`Kind::Balanced`] keeps to, and what another kind's [`counts`](Self::counts) are to be held against.
    ///
    /// # Errors
    /// [`RingError::TooFewNodes`] if too few nodes take data, which of the other kinds none asks.
    pub fn shares(&self) -> Result<Vec<u32>, RingError> {
        let topology = shares::Topology::of(&self.rules, &self.members)?;
        Ok(topology.shares(self.rules.partitions(), self.rules.copies, &self.counts()))
    }

    /// The most copies of one partition that each zone may have: what the loss of a zone costs at most. Zones are in the order of
    /// their names, and a node without one is a zone named by its id.
    ///
    /// # Errors
    /// As [`shares`](Self::shares).
    pub fn zone_limits(&self) -> Result<BTreeMap<String, u8>, RingError> {
        let topology = shares::Topology::of(&self.rules, &self.members)?;
        Ok(self
            .members
            .iter()
            .enumerate()
            .map(|(index, one)| (zone_name(one), topology.limit(index)))
            .collect())
    }

    fn index_of(&self, store: StoreId) -> Option<usize> {
        self.members.binary_search_by_key(&store, |member| member.store).ok()
    }
}

/// The zone of a member; that of a node without one is the node itself.
fn zone_name(member: &Member) -> String {
    if member.zone.is_empty() { member.node.to_string() } else { member.zone.clone() }
}

/// Whether rules and sorted members make a ring.
fn check(rules: &Rules, members: &[Member]) -> Result<(), RingError> {
    if !(1..=MAX_OWNERS).contains(&usize::from(rules.copies)) {
        return Err(RingError::Copies(rules.copies));
    }
    if rules.partition_bits > MAX_PARTITION_BITS {
        return Err(RingError::PartitionBits(rules.partition_bits));
    }
    if let Kind::Ketama { points } = rules.kind
        && !(1..=MAX_POINTS).contains(&points)
    {
        return Err(RingError::Points(points));
    }
    check_members(members)?;
    if rules.kind == Kind::Single {
        if members.len() != 1 || rules.copies != 1 {
            return Err(RingError::NotSingle { members: members.len(), copies: rules.copies });
        }
        return Ok(());
    }
    // `Mod` knows no weights; the other kinds give nothing to a store of weight 0.
    let takes = |member: &&Member| rules.kind == Kind::Mod || member.weight > 0;
    let nodes: BTreeSet<NodeId> = members.iter().filter(takes).map(|member| member.node).collect();
    if nodes.len() < usize::from(rules.copies) {
        return Err(RingError::TooFewNodes { copies: rules.copies, nodes: nodes.len() });
    }
    Ok(())
}

fn check_members(members: &[Member]) -> Result<(), RingError> {
    if members.is_empty() {
        return Err(RingError::NoMembers);
    }
    if members.len() > MAX_MEMBERS {
        return Err(RingError::TooManyMembers { count: members.len() });
    }
    if let Some([twice, _]) = members.array_windows().find(|[one, next]| one.store == next.store) {
        return Err(RingError::DuplicateStore(twice.store));
    }
    let mut zones: BTreeMap<NodeId, &str> = BTreeMap::new();
    for member in members {
        let (store, node) = (member.store, member.node);
        if store.is_nil() || node.is_nil() {
            return Err(RingError::NilId);
        }
        if member.capacity_bytes == 0 {
            return Err(RingError::NoCapacity(store));
        }
        if member.weight > FULL_WEIGHT {
            return Err(RingError::Weight { store, weight: member.weight });
        }
        if member.zone.len() > MAX_ZONE_BYTES {
            return Err(RingError::ZoneName(node));
        }
        if zones.insert(node, &member.zone).is_some_and(|zone| zone != member.zone) {
            return Err(RingError::TwoZones(node));
        }
    }
    let named: BTreeSet<&str> = zones.into_values().filter(|zone| !zone.is_empty()).collect();
    if named.len() > MAX_ZONES {
        return Err(RingError::TooManyZones(named.len()));
    }
    Ok(())
}
