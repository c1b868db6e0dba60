//! The ring as it is kept in the metadata store: one record of what it was computed from, and the partitions in segments.
//!
//! ```text
//! ring record    magic "TRR1", epoch u64, kind u8, points u16, copies u8, partition bits u8,
//!                zones u16, each: length u8, name; members u16, each: store, node (16 bytes), zone u16, weight u16, capacity u64;
//!                past rings u16, each: epoch u64, kind u8, points u16, copies u8, partition bits u8, members u32, joined u32,
//!                left u32, copies moved u64; CRC32C of all before
//! segment        magic "TRS1", ring epoch u64, number u16, stores u16, each: 16 bytes; partitions u16, each:
//!                flags u8 (1: moving, 2: target), epoch u64, and as lists of length u8 and indexes u16 of stores:
//!                owners, those that it moves to, its target; CRC32C of all before
//! ```
//!
//! Numbers are little-endian. A segment names its stores by id, and so means the same whatever becomes of the ring's record; its
//! [`SEGMENT_PARTITIONS`] partitions are changed by comparing its revision. What is not exactly what [`RingRecord::encode`] or
//! [`Segment::encode`] makes is refused: nothing is guessed about where data are.

use std::collections::{BTreeMap, BTreeSet};

use super::{Kind, Member, NONE, Plan, Ring, RingError, Rules, check};
use crate::replication::MAX_OWNERS;
use crate::{NodeId, StoreId};

/// Partitions of a segment; the last one of a small ring has fewer.
pub const SEGMENT_PARTITIONS: u32 = 1024;
/// Former rings that a record remembers.
pub const MAX_PAST: usize = 64;

const RING_MAGIC: [u8; 4] = *b"TRR1";
const SEGMENT_MAGIC: [u8; 4] = *b"TRS1";
const MOVING: u8 = 1;
const TARGET: u8 = 2;

/// Why a record is not read, or does not fit to another one. Each message says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Something else, or a form that this program does not know.
    #[error(
        "this is no record of a ring that this program knows: was it written by a newer one? then start that"
    )]
    Unknown,
    /// The bytes are not what was written.
    #[error("a record of the ring is damaged ({0}): restore it from a backup of the metadata store")]
    Damaged(&'static str),
    /// The members or rules in it make no ring.
    #[error("the record of the ring cannot be used: {0}")]
    Ring(#[from] RingError),
    /// A segment is missing, or is of another ring.
    #[error(
        "partition {partition} is not in the segments of ring {epoch}: write all segments of that ring first"
    )]
    OtherRing {
        /// The first partition that is missing or different.
        partition: u32,
        /// The epoch of the ring's record.
        epoch: u64,
    },
}

/// Why a partition is not taken a step further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A move must be finished before the next one is begun.
    #[error("the partition is moving: finish that first")]
    Moving,
    /// There is nothing to do.
    #[error("the partition is where it should be: there is nothing to begin or to finish")]
    Settled,
    /// Epochs have an end, which no cluster reaches.
    #[error(
        "the partition has the last epoch that there is: its record is damaged, restore it from a backup"
    )]
    LastEpoch,
}

/// A ring that was in force before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PastRing {
    /// Which.
    pub epoch: u64,
    /// What it was computed by.
    pub rules: Rules,
    /// How many stores it had.
    pub members: u32,
    /// How many stores its successor had besides.
    pub joined: u32,
    /// How many stores its successor had no more.
    pub left: u32,
    /// How many copies its successor wanted elsewhere.
    pub moved: u64,
}

/// What a ring was computed from. With the partitions in its segments it is the ring ([`ring_of`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingRecord {
    /// Grows by one with every ring, from 1.
    pub epoch: u64,
    /// What it was computed by.
    pub rules: Rules,
    /// Its stores, in the order of their ids.
    pub members: Vec<Member>,
    /// The last [`MAX_PAST`] rings before, oldest first.
    pub past: Vec<PastRing>,
}

impl RingRecord {
    /// The record of a cluster's first ring.
    #[must_use]
    pub fn first(ring: &Ring) -> Self {
        Self { epoch: 1, rules: ring.rules, members: ring.members.clone(), past: Vec::new() }
    }

    /// The record of the ring that comes after this one, with this one among its past.
    ///
    /// # Errors
    /// [`StepError::LastEpoch`]
    pub fn followed_by(&self, ring: &Ring, plan: &Plan) -> Result<Self, StepError> {
        let epoch = self.epoch.checked_add(1).ok_or(StepError::LastEpoch)?;
        let stores = |members: &[Member]| members.iter().map(|one| one.store).collect::<BTreeSet<_>>();
        let (before, after) = (stores(&self.members), stores(&ring.members));
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let this = PastRing {
            epoch: self.epoch,
            rules: self.rules,
            members: count(before.len()),
            joined: count(after.difference(&before).count()),
            left: count(before.difference(&after).count()),
            moved: plan.copies(),
        };
        let forgotten = (self.past.len() + 1).saturating_sub(MAX_PAST);
        let past = self.past.iter().copied().chain([this]).skip(forgotten).collect();
        Ok(Self { epoch, rules: ring.rules, members: ring.members.clone(), past })
    }

    /// The bytes to keep.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = RING_MAGIC.to_vec();
        out.extend(self.epoch.to_le_bytes());
        put_rules(&mut out, &self.rules);
        let zones: BTreeSet<&str> = self.members.iter().map(|member| member.zone.as_str()).collect();
        let zones: Vec<&str> = zones.into_iter().collect();
        put_len16(&mut out, zones.len());
        for zone in &zones {
            put_len8(&mut out, zone.len());
            out.extend(zone.as_bytes());
        }
        put_len16(&mut out, self.members.len());
        for member in &self.members {
            out.extend(member.store.0);
            out.extend(member.node.0);
            put_len16(&mut out, zones.binary_search(&member.zone.as_str()).unwrap_or(0));
            out.extend(member.weight.to_le_bytes());
            out.extend(member.capacity_bytes.to_le_bytes());
        }
        put_len16(&mut out, self.past.len());
        for past in &self.past {
            out.extend(past.epoch.to_le_bytes());
            put_rules(&mut out, &past.rules);
            for number in [past.members, past.joined, past.left] {
                out.extend(number.to_le_bytes());
            }
            out.extend(past.moved.to_le_bytes());
        }
        seal(out)
    }

    /// Reads what [`encode`](Self::encode) made.
    ///
    /// # Errors
    /// [`RecordError`], for any other bytes, and for members that make no ring.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut from = Reader::of(bytes, RING_MAGIC)?;
        let epoch = from.u64()?;
        let rules = from.rules()?;
        let mut zones = Vec::new();
        for _ in 0..from.u16()? {
            let len = usize::from(from.u8()?);
            let name = std::str::from_utf8(from.take(len)?);
            zones.push(name.map_err(|_| RecordError::Damaged("the name of a zone"))?);
        }
        let mut members = Vec::new();
        for _ in 0..from.u16()? {
            let (store, node) = (StoreId(from.array()?), NodeId(from.array()?));
            let zone = zones.get(usize::from(from.u16()?)).ok_or(RecordError::Damaged("a zone"))?;
            let weight = from.u16()?;
            let capacity_bytes = from.u64()?;
            members.push(Member { store, node, zone: (*zone).to_owned(), capacity_bytes, weight });
        }
        let mut past = Vec::new();
        for _ in 0..from.u16()? {
            let (epoch, rules) = (from.u64()?, from.rules()?);
            let (members, joined, left) = (from.u32()?, from.u32()?, from.u32()?);
            past.push(PastRing { epoch, rules, members, joined, left, moved: from.u64()? });
        }
        from.end()?;
        let record = Self { epoch, rules, members, past };
        record.check(&zones)?;
        Ok(record)
    }

    fn check(&self, zones: &[&str]) -> Result<(), RecordError> {
        let damaged = |what| Err(RecordError::Damaged(what));
        if !self.members.is_sorted_by(|one, next| one.store < next.store) {
            return damaged("the order of members");
        }
        let used: BTreeSet<&str> = self.members.iter().map(|member| member.zone.as_str()).collect();
        if !used.iter().eq(zones) {
            return damaged("the list of zones");
        }
        let epochs = || self.past.iter().map(|past| past.epoch).chain([self.epoch]);
        let in_order = epochs().is_sorted_by(|one, next| one < next);
        if self.past.len() > MAX_PAST || epochs().next() == Some(0) || !in_order {
            return damaged("the epochs of rings");
        }
        check(&self.rules, &self.members)?;
        Ok(())
    }
}

/// Where a partition is, and where it is to be (I11): old → old and new → new, each a higher epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartitionRecord {
    /// Grows with every change of the owners, from 1.
    pub epoch: u64,
    /// The owners, or the old ones while it moves.
    pub owners: Vec<StoreId>,
    /// While it moves: the new owners, some of which may be old ones.
    pub moving: Option<Vec<StoreId>>,
    /// The owners by the ring.
    pub target: Vec<StoreId>,
}

impl PartitionRecord {
    /// That of a partition that nobody has data of yet.
    #[must_use]
    pub fn settled(owners: Vec<StoreId>) -> Self {
        Self { epoch: 1, target: owners.clone(), owners, moving: None }
    }

    /// Whether it is where the ring wants it.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.moving.is_none() && self.owners == self.target
    }

    /// All stores that take part in writes: the owners, and while it moves the new ones after the old ones.
    #[must_use]
    pub fn writers(&self) -> Vec<StoreId> {
        let new = self.moving.iter().flatten().filter(|store| !self.owners.contains(store));
        self.owners.iter().chain(new).copied().collect()
    }

    /// Enters the middle epoch, on the way to the target.
    ///
    /// # Errors
    /// [`StepError`], if it is on its way already or has nowhere to go.
    pub fn begin(&mut self) -> Result<(), StepError> {
        if self.moving.is_some() {
            return Err(StepError::Moving);
        }
        if self.owners == self.target {
            return Err(StepError::Settled);
        }
        self.epoch = self.epoch.checked_add(1).ok_or(StepError::LastEpoch)?;
        self.moving = Some(self.target.clone());
        Ok(())
    }

    /// Leaves the middle epoch for the new owners. Only to be done when every in-sync old owner has adopted the middle epoch and its
    /// grants under the former have run out, and the new owners are complete for every volume (I11), none of which is known here.
    ///
    /// # Errors
    /// [`StepError`], if it is not moving.
    pub fn finish(&mut self) -> Result<(), StepError> {
        let epoch = self.epoch.checked_add(1).ok_or(StepError::LastEpoch)?;
        self.owners = self.moving.take().ok_or(StepError::Settled)?;
        self.epoch = epoch;
        Ok(())
    }
}

/// [`SEGMENT_PARTITIONS`] partitions, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The ring that the targets are of.
    pub ring_epoch: u64,
    /// Its first partition is this times [`SEGMENT_PARTITIONS`].
    pub number: u16,
    /// The partitions.
    pub partitions: Vec<PartitionRecord>,
}

impl Segment {
    /// All segments of a cluster's first ring.
    #[must_use]
    pub fn all_of(ring: &Ring) -> Vec<Segment> {
        let count = ring.rules.partitions();
        let segment = |number: u16| {
            let first = u32::from(number) * SEGMENT_PARTITIONS;
            let partitions = first..count.min(first + SEGMENT_PARTITIONS);
            let partitions = partitions.map(|partition| PartitionRecord::settled(ring.stores(partition)));
            Segment { ring_epoch: 1, number, partitions: partitions.collect() }
        };
        (0..u16::MAX).take(count.div_ceil(SEGMENT_PARTITIONS) as usize).map(segment).collect()
    }

    /// Aims at the next ring, of as many partitions; what is on its way arrives first.
    pub fn aim_at(&mut self, ring: &Ring, epoch: u64) {
        self.ring_epoch = epoch;
        let first = u32::from(self.number) * SEGMENT_PARTITIONS;
        for (partition, record) in (first..).zip(&mut self.partitions) {
            record.target = ring.stores(partition);
        }
    }

    /// The segments of twice as many partitions, from all of those that are, in order: each partition becomes two that are where it
    /// is, and on the same way.
    #[must_use]
    pub fn split(all: &[Segment]) -> Vec<Segment> {
        let both = |partition: &PartitionRecord| [partition.clone(), partition.clone()];
        let partitions: Vec<PartitionRecord> =
            all.iter().flat_map(|one| &one.partitions).flat_map(both).collect();
        let ring_epoch = all.first().map_or(0, |segment| segment.ring_epoch);
        let segments = (0..u16::MAX).zip(partitions.chunks(SEGMENT_PARTITIONS as usize));
        segments.map(|(number, some)| Segment { ring_epoch, number, partitions: some.to_vec() }).collect()
    }

    /// The bytes to keep.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = SEGMENT_MAGIC.to_vec();
        out.extend(self.ring_epoch.to_le_bytes());
        out.extend(self.number.to_le_bytes());
        let stores: BTreeSet<StoreId> = self.partitions.iter().flat_map(lists).flatten().copied().collect();
        let stores: Vec<StoreId> = stores.into_iter().collect();
        put_len16(&mut out, stores.len());
        for store in &stores {
            out.extend(store.0);
        }
        put_len16(&mut out, self.partitions.len());
        for partition in &self.partitions {
            let heading = partition.moving.as_ref().unwrap_or(&partition.owners);
            let (moving, target) = (partition.moving.is_some(), partition.target != *heading);
            out.push(if moving { MOVING } else { 0 } | if target { TARGET } else { 0 });
            out.extend(partition.epoch.to_le_bytes());
            let lists =
                [Some(&partition.owners), partition.moving.as_ref(), target.then_some(&partition.target)];
            for list in lists.into_iter().flatten() {
                put_len8(&mut out, list.len());
                for store in list {
                    put_len16(&mut out, stores.binary_search(store).unwrap_or(usize::from(NONE)));
                }
            }
        }
        seal(out)
    }

    /// Reads what [`encode`](Self::encode) made.
    ///
    /// # Errors
    /// [`RecordError`], for any other bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let damaged = |what| Err(RecordError::Damaged(what));
        let mut from = Reader::of(bytes, SEGMENT_MAGIC)?;
        let (ring_epoch, number) = (from.u64()?, from.u16()?);
        let mut stores = Vec::new();
        for _ in 0..from.u16()? {
            stores.push(StoreId(from.array()?));
        }
        let mut partitions = Vec::new();
        for _ in 0..from.u16()? {
            let flags = from.u8()?;
            if flags & !(MOVING | TARGET) != 0 {
                return damaged("flags of a partition");
            }
            let (epoch, owners) = (from.u64()?, from.stores(&stores)?);
            let moving = if flags & MOVING == 0 { None } else { Some(from.stores(&stores)?) };
            let heading = moving.as_ref().unwrap_or(&owners);
            let target = if flags & TARGET == 0 { heading.clone() } else { from.stores(&stores)? };
            if epoch == 0 || (flags & TARGET != 0 && target == *heading) {
                return damaged("the epoch or the target of a partition");
            }
            partitions.push(PartitionRecord { epoch, owners, moving, target });
        }
        from.end()?;
        if ring_epoch == 0 || partitions.is_empty() || partitions.len() > SEGMENT_PARTITIONS as usize {
            return damaged("the number of partitions in a segment");
        }
        let used: BTreeSet<StoreId> = partitions.iter().flat_map(lists).flatten().copied().collect();
        if !used.iter().eq(&stores) {
            return damaged("the list of stores");
        }
        Ok(Self { ring_epoch, number, partitions })
    }
}

/// All lists of stores of a partition.
fn lists(partition: &PartitionRecord) -> impl Iterator<Item = &Vec<StoreId>> {
    [&partition.owners, &partition.target].into_iter().chain(&partition.moving)
}

/// The ring of a record and of its segments, in any order.
///
/// # Errors
/// [`RecordError`], if the segments are not those of this ring.
pub fn ring_of(record: &RingRecord, segments: &[Segment]) -> Result<Ring, RecordError> {
    check(&record.rules, &record.members)?;
    let by_number: BTreeMap<u16, &Segment> =
        segments.iter().map(|segment| (segment.number, segment)).collect();
    let index = |store: &StoreId| {
        let found = record.members.binary_search_by_key(store, |member| member.store).ok()?;
        u16::try_from(found).ok()
    };
    let mut owners =
        Vec::with_capacity(record.rules.partitions() as usize * usize::from(record.rules.copies));
    for partition in 0..record.rules.partitions() {
        let number = u16::try_from(partition / SEGMENT_PARTITIONS).ok();
        let segment =
            number.and_then(|number| by_number.get(&number)).filter(|one| one.ring_epoch == record.epoch);
        let one =
            segment.and_then(|segment| segment.partitions.get((partition % SEGMENT_PARTITIONS) as usize));
        let row: Option<Vec<u16>> = one.and_then(|one| one.target.iter().map(index).collect());
        let row = row.filter(|row| row.len() == usize::from(record.rules.copies));
        owners.extend(row.ok_or(RecordError::OtherRing { partition, epoch: record.epoch })?);
    }
    Ok(Ring { rules: record.rules, members: record.members.clone(), owners })
}

fn put_rules(out: &mut Vec<u8>, rules: &Rules) {
    let (kind, points) = match rules.kind {
        Kind::Single => (0, 0),
        Kind::Mod => (1, 0),
        Kind::Ketama { points } => (2, points),
        Kind::Balanced => (3, 0),
    };
    out.push(kind);
    out.extend(points.to_le_bytes());
    out.extend([rules.copies, rules.partition_bits]);
}

/// A count that the limits of a ring keep below 2^16.
fn put_len16(out: &mut Vec<u8>, len: usize) {
    out.extend(u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes());
}

/// A count that the limits of a ring keep below 2^8.
fn put_len8(out: &mut Vec<u8>, len: usize) {
    out.push(u8::try_from(len).unwrap_or(u8::MAX));
}

/// Appends the checksum.
pub(super) fn seal(mut out: Vec<u8>) -> Vec<u8> {
    let sum = crc32c::crc32c(&out);
    out.extend(sum.to_le_bytes());
    out
}

/// Reads front to back and never past the end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// What is behind the magic, if the checksum is right.
    fn of(bytes: &'a [u8], magic: [u8; 4]) -> Result<Self, RecordError> {
        let (rest, sum) = bytes.split_last_chunk::<4>().ok_or(RecordError::Unknown)?;
        let fields = rest.strip_prefix(&magic).ok_or(RecordError::Unknown)?;
        if crc32c::crc32c(rest) != u32::from_le_bytes(*sum) {
            return Err(RecordError::Damaged("its checksum"));
        }
        Ok(Self(fields))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], RecordError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(RecordError::Damaged("its length"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(RecordError::Damaged("its length"))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, RecordError> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, RecordError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, RecordError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, RecordError> {
        self.array().map(u64::from_le_bytes)
    }

    fn rules(&mut self) -> Result<Rules, RecordError> {
        let kind = match (self.u8()?, self.u16()?) {
            (0, 0) => Kind::Single,
            (1, 0) => Kind::Mod,
            (2, points) => Kind::Ketama { points },
            (3, 0) => Kind::Balanced,
            _ => return Err(RecordError::Unknown),
        };
        Ok(Rules { kind, copies: self.u8()?, partition_bits: self.u8()? })
    }

    /// A list of different stores.
    fn stores(&mut self, stores: &[StoreId]) -> Result<Vec<StoreId>, RecordError> {
        let len = usize::from(self.u8()?);
        let mut list = Vec::new();
        for _ in 0..len {
            let store = stores.get(usize::from(self.u16()?)).ok_or(RecordError::Damaged("an owner"))?;
            list.push(*store);
        }
        let different = list.iter().collect::<BTreeSet<_>>().len();
        if different != len || !(1..=MAX_OWNERS).contains(&len) {
            return Err(RecordError::Damaged("the owners of a partition"));
        }
        Ok(list)
    }

    fn end(&self) -> Result<(), RecordError> {
        if self.0.is_empty() { Ok(()) } else { Err(RecordError::Damaged("its length")) }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ring::tests::{balanced, member, store};
    use crate::ring::{MAX_MEMBERS, MAX_ZONE_BYTES, MAX_ZONES};

    /// What etcd takes in one request by default, less room for keys and comparisons.
    const ETCD_BYTES: usize = (3 << 19) - (64 << 10);

    fn members(count: u32) -> Vec<Member> {
        (0..count).map(|number| member(number, ["", "a", "b"][number as usize % 3], 1 << 40)).collect()
    }

    fn any_partition() -> impl Strategy<Value = PartitionRecord> {
        let list = || prop::collection::btree_set(0..40u32, 1..=MAX_OWNERS);
        let stores = |list: BTreeSet<u32>| list.into_iter().map(store).collect::<Vec<_>>();
        (1..u64::MAX, list(), prop::option::of(list()), prop::option::of(list())).prop_map(
            move |(epoch, owners, moving, target)| {
                let (owners, moving) = (stores(owners), moving.map(stores));
                let target = target.map_or_else(|| moving.as_ref().unwrap_or(&owners).clone(), stores);
                PartitionRecord { epoch, owners, moving, target }
            },
        )
    }

    proptest! {
        #[test]
        fn segments_survive_their_encoding(
            partitions in prop::collection::vec(any_partition(), 1..40),
            ring_epoch in 1..u64::MAX,
            number: u16,
        ) {
            let segment = Segment { ring_epoch, number, partitions };
            prop_assert_eq!(Segment::decode(&segment.encode()), Ok(segment));
        }

        #[test]
        fn records_survive_their_encoding(
            count in 3..40u32,
            weight in 0..=1000u16,
            epochs in 1..2000u64,
            points in 1..=1000u16,
            kind in 0..2u8,
        ) {
            let ring = balanced(&members(count), 2, 4, None);
            let mut record = RingRecord::first(&ring);
            record.members[0].weight = weight;
            record.rules.kind = if kind == 0 { Kind::Ketama { points } } else { Kind::Mod };
            record.epoch = epochs;
            let plan = Plan::between(&ring, &ring, |_| 0);
            for _ in 0..epochs % 70 {
                record = record.followed_by(&ring, &plan).unwrap();
            }
            prop_assert!(record.past.len() <= MAX_PAST);
            prop_assert_eq!(RingRecord::decode(&record.encode()), Ok(record));
        }

        /// Any bytes, and any damage to right ones under a checksum that fits, are a record that stays itself or an error.
        #[test]
        fn reading_is_total(
            bytes in prop::collection::vec(any::<u8>(), 0..64),
            at in any::<prop::sample::Index>(),
            cut in any::<prop::sample::Index>(),
            what in 0..4u8,
        ) {
            let ring = balanced(&members(7), 2, 4, None);
            let mut segment = Segment::all_of(&ring).remove(0);
            segment.aim_at(&balanced(&members(9), 2, 4, Some(&ring)), 2);
            let mut damaged = match what {
                0 => [&RING_MAGIC[..], &bytes].concat(),
                1 => [&SEGMENT_MAGIC[..], &bytes].concat(),
                2 => RingRecord::first(&ring).encode(),
                _ => segment.encode(),
            };
            let body = damaged.len() - if what < 2 { 0 } else { 4 };
            damaged.truncate(body);
            for (offset, byte) in bytes.iter().take(3).enumerate() {
                let at = at.index(damaged.len());
                damaged[(at + offset) % body] = *byte;
            }
            damaged.truncate(cut.index(4 * body).max(4).min(body));
            read(&seal(damaged.clone()));
            read(&damaged);
        }
    }

    /// What is read is written as the same bytes.
    fn read(bytes: &[u8]) {
        if let Ok(record) = RingRecord::decode(bytes) {
            assert_eq!(record.encode(), bytes);
        }
        if let Ok(segment) = Segment::decode(bytes) {
            assert_eq!(segment.encode(), bytes);
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let ring = balanced(&members(5), 2, 3, None);
        for bytes in [RingRecord::first(&ring).encode(), Segment::all_of(&ring)[0].encode()] {
            for bit in 0..bytes.len() * 8 {
                let mut bytes = bytes.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(RingRecord::decode(&bytes).is_err() && Segment::decode(&bytes).is_err(), "bit {bit}");
            }
        }
    }

    #[test]
    fn a_ring_is_made_of_its_record_and_segments_and_of_no_others() {
        let ring = balanced(&members(20), 3, 12, None);
        let (record, mut segments) = (RingRecord::first(&ring), Segment::all_of(&ring));
        assert_eq!(segments.len(), 4);
        assert_eq!(ring_of(&record, &segments), Ok(ring.clone()));
        let next = balanced(&members(21), 3, 12, Some(&ring));
        let after = record.followed_by(&next, &Plan::between(&ring, &next, |_| 0)).unwrap();
        let past = after.past[0];
        assert_eq!((after.epoch, past.epoch, past.members, past.joined, past.left), (2, 1, 20, 1, 0));
        assert_eq!(past.moved, u64::from(next.counts()[next.index_of(store(20)).unwrap()]));
        for segment in &mut segments[..3] {
            segment.aim_at(&next, 2);
        }
        assert_eq!(ring_of(&after, &segments), Err(RecordError::OtherRing { partition: 3072, epoch: 2 }));
        segments[3].aim_at(&next, 2);
        segments.reverse();
        assert_eq!(ring_of(&after, &segments), Ok(next.clone()));
        assert!(ring_of(&record, &segments).is_err() && ring_of(&after, &segments[1..]).is_err());
        // What moves is still where it was.
        let moving = segments.iter().flat_map(|segment| &segment.partitions).filter(|one| !one.is_settled());
        assert!(
            moving.clone().count() > 0 && moving.clone().all(|one| one.epoch == 1 && one.moving.is_none())
        );
    }

    #[test]
    fn partitions_are_split_where_they_are() {
        let ring = balanced(&members(20), 3, 9, None);
        for bits in 10..13 {
            let mut segments = Segment::all_of(&ring);
            for _ in 9..bits {
                segments = Segment::split(&segments);
            }
            let finer = balanced(&members(20), 3, bits, Some(&ring));
            let record = RingRecord { rules: finer.rules(), ..RingRecord::first(&ring) };
            let split = ring_of(&record, &segments).unwrap();
            for partition in 0..finer.rules().partitions() {
                assert_eq!(split.stores(partition), ring.stores(partition >> (bits - 9)));
            }
            assert_eq!(Plan::between(&ring, &split, |_| 1).moves, []);
        }
    }

    #[test]
    fn a_partition_moves_in_two_steps_of_an_epoch_each() {
        let [a, b, c, d] = [1, 2, 3, 4].map(store);
        let mut partition = PartitionRecord::settled(vec![a, b]);
        assert_eq!(
            (partition.begin(), partition.finish()),
            (Err(StepError::Settled), Err(StepError::Settled))
        );
        partition.target = vec![a, c];
        assert_eq!((partition.begin(), partition.epoch, partition.writers()), (Ok(()), 2, vec![a, b, c]));
        // A newer ring does not change a move that was begun.
        partition.target = vec![d, c];
        assert_eq!(partition.begin(), Err(StepError::Moving));
        assert_eq!((partition.finish(), partition.epoch, partition.writers()), (Ok(()), 3, vec![a, c]));
        assert!(!partition.is_settled());
        assert_eq!((partition.begin(), partition.finish(), partition.epoch), (Ok(()), Ok(()), 5));
        assert_eq!((partition.is_settled(), partition.owners.clone()), (true, vec![d, c]));
        partition = PartitionRecord { epoch: u64::MAX, target: vec![a], ..partition };
        assert_eq!(
            (partition.begin(), partition.finish()),
            (Err(StepError::LastEpoch), Err(StepError::LastEpoch))
        );
        assert_eq!((partition.epoch, partition.owners), (u64::MAX, vec![d, c]));
    }

    #[test]
    fn the_largest_records_fit_into_etcd() {
        let zones = u32::try_from(MAX_ZONES).unwrap();
        let zone = |number: u32| format!("{:0>width$}", number % zones, width = MAX_ZONE_BYTES);
        let count = u32::try_from(MAX_MEMBERS).unwrap();
        let members: Vec<Member> = (0..count).map(|number| member(number, &zone(number), 1)).collect();
        let ring =
            Ring::compute(Rules { kind: Kind::Mod, copies: 1, partition_bits: 0 }, members, None).unwrap();
        let mut record = RingRecord::first(&ring);
        let plan = Plan::between(&ring, &ring, |_| 0);
        for _ in 0..MAX_PAST {
            record = record.followed_by(&ring, &plan).unwrap();
        }
        let bytes = record.encode();
        assert!(bytes.len() <= ETCD_BYTES, "{}", bytes.len());
        assert_eq!(RingRecord::decode(&bytes), Ok(record));
        // All partitions of a segment on their way, no two with a store in common that would not have to.
        let list = |partition: u32, from: u32| -> Vec<StoreId> {
            (0..16).map(|slot| store((partition * 48 + from * 16 + slot) % count)).collect()
        };
        let partitions = (0..SEGMENT_PARTITIONS).map(|partition| PartitionRecord {
            epoch: u64::MAX,
            owners: list(partition, 0),
            moving: Some(list(partition, 1)),
            target: list(partition, 2),
        });
        let segment = Segment { ring_epoch: 1, number: 0, partitions: partitions.collect() };
        let bytes = segment.encode();
        assert!(bytes.len() <= ETCD_BYTES, "{}", bytes.len());
        assert_eq!(Segment::decode(&bytes), Ok(segment));
        // A usual one is far below what etcd likes.
        let usual =
            Segment::all_of(&balanced(&(0..1000).map(|n| member(n, "", 1)).collect::<Vec<_>>(), 3, 10, None));
        assert!(usual[0].encode().len() < 40 << 10, "{}", usual[0].encode().len());
    }

    /// Bytes that were written by the first release are read by every later one.
    #[test]
    fn the_form_of_records_does_not_change() {
        let ring = balanced(&members(2), 1, 1, None);
        let mut segment = Segment::all_of(&ring).remove(0);
        segment.partitions[0].target.reverse();
        let sums = [RingRecord::first(&ring).encode(), segment.encode()]
            .map(|bytes| crc32c::crc32c(&bytes[..bytes.len() - 4]));
        assert_eq!(sums, [1_025_010_459, 3_452_871_966]);
    }

    #[test]
    fn records_that_contradict_themselves_are_refused() {
        let ring = balanced(&members(4), 2, 3, None);
        let good = RingRecord::first(&ring);
        let refused = |change: fn(&mut RingRecord)| {
            let mut record = good.clone();
            change(&mut record);
            RingRecord::decode(&record.encode()).unwrap_err()
        };
        assert_eq!(refused(|one| one.members.swap(0, 1)), RecordError::Damaged("the order of members"));
        assert_eq!(refused(|one| one.epoch = 0), RecordError::Damaged("the epochs of rings"));
        assert_eq!(
            refused(|one| one.members.truncate(1)),
            RingError::TooFewNodes { copies: 2, nodes: 1 }.into()
        );
        assert_eq!(
            refused(|one| one.members[0].capacity_bytes = 0),
            RingError::NoCapacity(good.members[0].store).into()
        );
        let segment = Segment::all_of(&ring).remove(0);
        let refused = |change: fn(&mut Segment)| {
            let mut segment = segment.clone();
            change(&mut segment);
            Segment::decode(&segment.encode()).unwrap_err()
        };
        let owners = RecordError::Damaged("the owners of a partition");
        assert_eq!(refused(|one| one.partitions[2].owners.clear()), owners);
        assert_eq!(refused(|one| one.partitions[2].owners = vec![store(1); 2]), owners);
        assert_eq!(refused(|one| one.partitions[2].moving = Some((0..17).map(store).collect())), owners);
        assert_eq!(
            refused(|one| one.partitions[2].epoch = 0),
            RecordError::Damaged("the epoch or the target of a partition")
        );
        let number = RecordError::Damaged("the number of partitions in a segment");
        assert_eq!(refused(|one| one.partitions.clear()), number);
        assert_eq!(refused(|one| one.ring_epoch = 0), number);
    }
}
