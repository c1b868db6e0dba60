//! A replicated volume's one record: who is its head, who owns what, and who misses writes.
//!
//! Invariants, of every record that is read and of every change that is made here (I5):
//! - Each partition has an owner that is complete and not stale.
//! - A stale member's mark does not move until it is in sync again.
//! - No change calls members stale so that fewer than must be stay in sync ([`HeadsRecord::min_in_sync`]).
//! - The take-over number only grows.
//! - Who is wished to be head next has a copy in sync; the wish ends with the next take-over.
//!
//! The record's modification revision is the *revision* that heads compute their wishes from; every change compares it. Every change also
//! counts the *edition* up, which replicas keep: unlike revisions it goes back when the metadata store is restored from a backup (I14).

use std::collections::BTreeSet;

use cluster_map::{
    DesiredHead, HeadOwner, HeadPartition, MAX_OWNERS, MAX_PARTITIONS, MemberId, NodeId, StaleMark, StoreId,
    VolumeId,
};
use serde::{Deserialize, Serialize};

use crate::meta::Revision;
use crate::model::{text, text_option};

/// Partitions of a new volume.
pub const SPREAD: usize = 16;
/// Lanes that volumes are dealt to; more than nodes have cores, and stores shards.
pub const LANES: u16 = 64;

/// A store that owns a part of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// The store.
    #[serde(with = "text")]
    pub store: StoreId,
    /// Its incarnation when it became an owner (I13).
    pub incarnation: u64,
    /// The node that has it.
    #[serde(with = "text")]
    pub node: NodeId,
    /// Into how many shards it was cut at its format.
    pub shards: u16,
}

impl MemberRecord {
    fn id(&self) -> MemberId {
        MemberId { store: self.store, incarnation: self.incarnation }
    }
}

/// The extents whose number modulo the partitions' count is this one's index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionRecord {
    /// Grows with every change of the owners.
    pub epoch: u64,
    /// Indexes into the members.
    pub owners: Vec<u16>,
    /// Those of them that do not have everything yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub incomplete: Vec<u16>,
}

/// A member that misses writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaleRecord {
    /// Index into the members.
    pub member: u16,
    /// The version up to which it is known to be complete.
    pub mark: u64,
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadsRecord {
    /// Grows with every take-over, from 1.
    pub takeover: u64,
    /// Grows with every change of the record, from 1; 0 in one of before they were counted (I14).
    #[serde(default)]
    pub edition: u64,
    /// The node that is to be head.
    #[serde(with = "text")]
    pub head: NodeId,
    /// How many copies are to stay in sync; 0: two of three or more, else one.
    pub min_copies: u8,
    /// Which core and shard, on every node.
    pub lane: u16,
    /// The owners of all partitions.
    pub members: Vec<MemberRecord>,
    /// The partitions.
    pub partitions: Vec<PartitionRecord>,
    /// Members that miss writes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stale: Vec<StaleRecord>,
    /// The node that is wished to be head next: the present one hands over.
    #[serde(default, with = "text_option", skip_serializing_if = "Option::is_none")]
    pub move_to: Option<NodeId>,
}

fn are_different<T: Ord>(mut items: impl Iterator<Item = T>) -> bool {
    let mut seen = BTreeSet::new();
    items.all(|item| seen.insert(item))
}

impl PartitionRecord {
    fn is_complete(&self, member: u16) -> bool {
        self.owners.contains(&member) && !self.incomplete.contains(&member)
    }
}

impl HeadsRecord {
    /// A new volume's: all partitions on all of these members, each beginning with another one.
    #[must_use]
    pub fn new(members: Vec<MemberRecord>, head: NodeId, min_copies: u8, lane: u16) -> Self {
        let count = u16::try_from(members.len()).unwrap_or(u16::MAX);
        let partition = |first: usize| {
            let mut owners: Vec<u16> = (0..count).collect();
            owners.rotate_left(first % members.len().max(1));
            PartitionRecord { epoch: 1, owners, incomplete: Vec::new() }
        };
        let partitions = (0..SPREAD).map(partition).collect();
        Self {
            takeover: 1,
            edition: 1,
            head,
            min_copies,
            lane,
            members,
            partitions,
            stale: Vec::new(),
            move_to: None,
        }
    }

    /// Whether the record keeps the invariants; what it breaks, in words.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check(&self) -> Result<(), &'static str> {
        let known = |member: &u16| usize::from(*member) < self.members.len();
        let rules = [
            (self.takeover > 0, "the take-over number is 0"),
            (self.members.iter().any(|member| member.node == self.head), "its head has no part of it"),
            (
                self.move_to.is_none_or(|to| self.members.iter().any(|member| member.node == to)),
                "who is to be its head has no part of it",
            ),
            (are_different(self.members.iter().map(|member| member.store)), "a store is named twice"),
            ((1..=MAX_PARTITIONS).contains(&self.partitions.len()), "the number of partitions"),
            (self.stale.iter().all(|stale| known(&stale.member)), "who is stale is no member"),
            (are_different(self.stale.iter().map(|stale| stale.member)), "a member is stale twice"),
        ];
        if let Some((_, broken)) = rules.iter().find(|(holds, _)| !holds) {
            return Err(broken);
        }
        for partition in &self.partitions {
            let owners = &partition.owners;
            if partition.epoch == 0 || !(1..=MAX_OWNERS).contains(&owners.len()) {
                return Err("a partition's epoch, or the number of its owners");
            }
            if !owners.iter().all(known) || !are_different(owners.iter()) {
                return Err("an owner is no member, or named twice");
            }
            if !partition.incomplete.iter().all(|member| owners.contains(member)) {
                return Err("who is incomplete is no owner");
            }
            if self.in_sync(partition) == 0 {
                return Err("a partition has no owner in sync");
            }
        }
        Ok(())
    }

    fn index(&self, id: MemberId) -> Option<u16> {
        let at = self.members.iter().position(|member| member.id() == id)?;
        u16::try_from(at).ok()
    }

    fn is_stale(&self, member: u16) -> bool {
        self.stale.iter().any(|stale| stale.member == member)
    }

    /// How many owners of a partition are in sync.
    fn in_sync(&self, partition: &PartitionRecord) -> usize {
        let owners = partition.owners.iter();
        owners.filter(|owner| partition.is_complete(**owner) && !self.is_stale(**owner)).count()
    }

    /// How many owners of a partition must stay in sync: of the complete ones as many as are asked for; where nothing is asked
    /// for, two of three or more, else one.
    #[must_use]
    pub fn min_in_sync(&self, partition: &PartitionRecord) -> usize {
        let complete = partition.owners.len() - partition.incomplete.len().min(partition.owners.len());
        let wanted = match self.min_copies {
            0 if complete >= 3 => 2,
            0 => 1,
            wanted => usize::from(wanted),
        };
        wanted.min(complete).max(1)
    }

    /// How many owners of a partition no change may go below.
    fn must_stay(&self, partition: &PartitionRecord) -> usize {
        #[cfg(mutants)]
        if torus_replication::mutants::is(torus_replication::mutants::Mutant::EjectBelowMin) {
            return 1;
        }
        self.min_in_sync(partition)
    }

    /// Copies in sync, in the partition that has fewest.
    #[must_use]
    pub fn copies_in_sync(&self) -> usize {
        self.partitions.iter().map(|partition| self.in_sync(partition)).min().unwrap_or(0)
    }

    /// Members that are not stale, and complete in everything that they own.
    pub fn members_in_sync(&self) -> impl Iterator<Item = &MemberRecord> {
        let whole = |member: u16| {
            let mut owned = self.partitions.iter().filter(|partition| partition.owners.contains(&member));
            !self.is_stale(member) && owned.all(|partition| partition.is_complete(member))
        };
        (0..).zip(&self.members).filter(move |(index, _)| whole(*index)).map(|(_, member)| member)
    }

    /// Members that miss writes.
    pub fn members_stale(&self) -> impl Iterator<Item = &MemberRecord> {
        self.stale.iter().filter_map(|stale| self.members.get(usize::from(stale.member)))
    }

    /// The record with some members called stale, and others in sync and complete in all that they own; `None` if that changes nothing, names a stranger,
    /// or leaves too few in sync.
    #[must_use]
    pub fn changed(&self, eject: &[StaleMark], join: &[MemberId]) -> Option<Self> {
        let mut after = self.clone();
        for going in eject {
            let member = self.index(going.member)?;
            // It does not move while the member is stale.
            if !self.is_stale(member) {
                after.stale.push(StaleRecord { member, mark: going.mark });
            }
        }
        for coming in join {
            let member = self.index(*coming)?;
            after.stale.retain(|stale| stale.member != member);
            for partition in &mut after.partitions {
                partition.incomplete.retain(|incomplete| *incomplete != member);
            }
        }
        let is_fit = |to: &NodeId| after.members_in_sync().any(|member| member.node == *to);
        after.move_to = after.move_to.filter(is_fit);
        let ejects_too_many = self.partitions.iter().any(|partition| {
            let left = after.in_sync(partition);
            left < self.in_sync(partition) && left < self.must_stay(partition)
        });
        (after != *self && !ejects_too_many && after.check().is_ok()).then_some(after)
    }

    /// The record with another head.
    #[must_use]
    pub fn taken_over(&self, by: NodeId) -> Option<Self> {
        let takeover = self.takeover.checked_add(1)?;
        let after = Self { takeover, head: by, move_to: None, ..self.clone() };
        after.check().is_ok().then_some(after)
    }

    /// The record as the change of another one, which the metadata store has at this revision.
    #[must_use]
    pub fn following(self, before: &Self, revision: Revision) -> Self {
        Self { edition: before.counted(revision).saturating_add(1), ..self }
    }

    /// Its edition; that of one that does not count yet is its revision.
    fn counted(&self, revision: Revision) -> u64 {
        if self.edition > 0 { self.edition } else { revision.0.unsigned_abs() }
    }

    /// What the data plane of the head is told.
    #[must_use]
    pub fn desired(&self, volume: VolumeId, revision: Revision) -> DesiredHead {
        let owner = |partition: &PartitionRecord, index: u16| {
            let member = self.members.get(usize::from(index))?;
            let is_complete = partition.is_complete(index);
            Some(HeadOwner { member: member.id(), node: member.node, shards: member.shards, is_complete })
        };
        let partition = |partition: &PartitionRecord| HeadPartition {
            epoch: partition.epoch,
            owners: partition.owners.iter().filter_map(|index| owner(partition, *index)).collect(),
        };
        let stale = self.stale.iter().filter_map(|stale| {
            let member = self.members.get(usize::from(stale.member))?.id();
            Some(StaleMark { member, mark: stale.mark })
        });
        DesiredHead {
            volume,
            takeover: self.takeover,
            revision: revision.0.unsigned_abs(),
            edition: self.counted(revision),
            min_copies: self.min_copies,
            partitions: self.partitions.iter().map(partition).collect(),
            stale: stale.collect(),
            is_moving: self.move_to.is_some_and(|to| to != self.head),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use torus_replication::membership::{Change, Membership, Owner, Partition, Record};
    use torus_replication::terms::{Epoch, Member, Site, Version};

    fn id(n: u8) -> MemberId {
        MemberId { store: StoreId([n; 16]), incarnation: 1 }
    }

    fn record(copies: u8, min_copies: u8) -> HeadsRecord {
        let member =
            |n| MemberRecord { store: StoreId([n; 16]), incarnation: 1, node: NodeId([n; 16]), shards: 1 };
        HeadsRecord::new((1..=copies).map(member).collect(), NodeId([1; 16]), min_copies, 0)
    }

    fn ejecting(members: &[u8]) -> Vec<StaleMark> {
        members.iter().map(|n| StaleMark { member: id(*n), mark: u64::from(*n) * 10 }).collect()
    }

    #[test]
    fn a_new_record_has_all_copies_everywhere_and_begins_with_each() {
        let record = record(3, 0);
        assert_eq!(record.check(), Ok(()));
        assert_eq!((record.partitions.len(), record.copies_in_sync()), (SPREAD, 3));
        let first: Vec<u16> = record.partitions.iter().map(|partition| partition.owners[0]).take(4).collect();
        assert_eq!(first, [0, 1, 2, 0]);
        let desired = record.desired(VolumeId([7; 16]), Revision(42));
        assert_eq!((desired.revision, desired.takeover, desired.partitions.len()), (42, 1, SPREAD));
        let nodes: Vec<u8> = desired.partitions[1].owners.iter().map(|owner| owner.node.0[0]).collect();
        assert_eq!(nodes, [2, 3, 1]);
        assert!(desired.partitions.iter().flat_map(|p| &p.owners).all(|owner| owner.is_complete));
    }

    #[test]
    fn two_of_three_stay_unless_fewer_were_asked_for() {
        // (copies, min_copies, ejected at once, allowed)
        for (copies, min_copies, ejected, allowed) in [
            (3, 0, &[3][..], true),
            (3, 0, &[2, 3], false),
            (3, 1, &[2, 3], true),
            (3, 3, &[3], false),
            (2, 0, &[2], true),
            (2, 2, &[2], false),
            (2, 0, &[1, 2], false),
            (3, 1, &[1, 2, 3], false),
        ] {
            let after = record(copies, min_copies).changed(&ejecting(ejected), &[]);
            assert_eq!(after.is_some(), allowed, "{copies} {min_copies} {ejected:?}");
            if let Some(after) = after {
                assert_eq!(after.copies_in_sync(), usize::from(copies) - ejected.len());
                assert_eq!(after.members_stale().count(), ejected.len());
            }
        }
    }

    #[test]
    fn a_mark_stays_until_its_member_is_back() {
        let one = record(3, 1).changed(&ejecting(&[3]), &[]).unwrap();
        assert_eq!(one.changed(&[StaleMark { member: id(3), mark: 99 }], &[]), None, "nothing changes");
        let two = one.changed(&[StaleMark { member: id(3), mark: 99 }, ejecting(&[2])[0]], &[]).unwrap();
        assert_eq!(two.stale, [StaleRecord { member: 2, mark: 30 }, StaleRecord { member: 1, mark: 20 }]);
        let back = two.changed(&[], &[id(3)]).unwrap();
        assert_eq!(back.stale, [StaleRecord { member: 1, mark: 20 }]);
        assert_eq!(back.changed(&[], &[id(3)]), None);
    }

    #[test]
    fn strangers_and_other_incarnations_are_not_named() {
        let record = record(3, 1);
        assert_eq!(record.changed(&ejecting(&[9]), &[]), None);
        let reborn = MemberId { incarnation: 2, ..id(3) };
        assert_eq!(record.changed(&[StaleMark { member: reborn, mark: 1 }], &[]), None);
        let stale = record.changed(&ejecting(&[3]), &[]).unwrap();
        assert_eq!(stale.changed(&[], &[reborn]), None);
    }

    #[test]
    fn who_exchanges_one_copy_for_another_keeps_enough() {
        let one_away = record(3, 0).changed(&ejecting(&[3]), &[]).unwrap();
        assert_eq!(one_away.changed(&ejecting(&[2]), &[]), None);
        let exchanged = one_away.changed(&ejecting(&[2]), &[id(3)]).unwrap();
        let in_sync: Vec<u8> = exchanged.members_in_sync().map(|member| member.node.0[0]).collect();
        assert_eq!(in_sync, [1, 3]);
    }

    #[test]
    fn incomplete_owners_do_not_count() {
        let mut record = record(3, 0);
        record.partitions[4].incomplete = vec![2];
        assert_eq!((record.check(), record.copies_in_sync()), (Ok(()), 2));
        assert_eq!(record.members_in_sync().count(), 2);
        assert_eq!(record.min_in_sync(&record.partitions[4]), 1);
        assert!(record.changed(&ejecting(&[1, 2]), &[]).is_none(), "the incomplete one alone is none");
        assert!(record.changed(&ejecting(&[2]), &[]).is_some());
    }

    #[test]
    fn records_that_break_a_rule_are_refused() {
        let broken: [fn(&mut HeadsRecord); 12] = [
            |r| r.takeover = 0,
            |r| r.head = NodeId([9; 16]),
            |r| r.members[1].store = r.members[0].store,
            |r| r.partitions.clear(),
            |r| r.partitions[0].owners.clear(),
            |r| r.partitions[0].owners[0] = 3,
            |r| r.partitions[0].owners[0] = r.partitions[0].owners[1],
            |r| r.partitions[0].epoch = 0,
            |r| r.partitions[0].incomplete = vec![7],
            |r| r.stale = vec![StaleRecord { member: 3, mark: 0 }],
            |r| r.stale = vec![StaleRecord { member: 1, mark: 0 }; 2],
            |r| r.stale = (0..3).map(|member| StaleRecord { member, mark: 0 }).collect(),
        ];
        for (index, breaks) in broken.iter().enumerate() {
            let mut record = record(3, 0);
            breaks(&mut record);
            assert!(record.check().is_err(), "{index}");
        }
    }

    #[test]
    fn a_take_over_names_a_member_and_a_larger_number() {
        let record = record(2, 0);
        let after = record.taken_over(NodeId([2; 16])).unwrap();
        assert_eq!((after.takeover, after.head), (2, NodeId([2; 16])));
        assert_eq!(record.taken_over(NodeId([9; 16])), None);
        assert_eq!(HeadsRecord { takeover: u64::MAX, ..record }.taken_over(NodeId([2; 16])), None);
    }

    /// The same record as a head has it.
    fn membership(record: &HeadsRecord) -> Membership {
        let member = |id: MemberId| Member { store: id.store, incarnation: id.incarnation };
        let desired = record.desired(VolumeId([7; 16]), Revision(1));
        let owner = |owner: &HeadOwner| Owner {
            member: member(owner.member),
            site: Site { node: owner.node, core: 0 },
            is_complete: owner.is_complete,
        };
        let partitions = desired.partitions.iter().map(|partition| Partition {
            epoch: Epoch(partition.epoch),
            owners: partition.owners.iter().map(owner).collect(),
        });
        let of_head = Record {
            partitions: partitions.collect(),
            revision: desired.revision,
            edition: desired.edition,
            takeover: desired.takeover,
            head: Some(record.head),
            stale: desired.stale.iter().map(|s| (member(s.member), Version(s.mark))).collect(),
            min_copies: desired.min_copies,
            is_moving: desired.is_moving,
        };
        Membership::new(desired.volume, of_head, None)
    }

    fn arbitrary_record() -> impl Strategy<Value = HeadsRecord> {
        let ejected = proptest::collection::vec((1_u8..6, 0_u64..9), 0..3);
        let incomplete = proptest::collection::vec((0..SPREAD, 0_u16..5), 0..4);
        (1_u8..6, 0_u8..6, ejected, incomplete).prop_map(|(copies, min_copies, ejected, incomplete)| {
            let mut record = record(copies, min_copies);
            for (partition, member) in incomplete {
                let was = record.clone();
                let of = &mut record.partitions[partition];
                if of.owners.contains(&member) && !of.incomplete.contains(&member) {
                    of.incomplete.push(member);
                }
                if record.check().is_err() {
                    record = was;
                }
            }
            for (n, mark) in ejected {
                record = record.changed(&[StaleMark { member: id(n), mark }], &[]).unwrap_or(record);
            }
            record
        })
    }

    proptest! {
        /// What a head may wish is made, and is made into what the head takes it to be.
        #[test]
        fn the_rules_are_those_of_the_heads(
            record in arbitrary_record(),
            eject in proptest::collection::btree_map(1_u8..6, 0_u64..9, 0..4),
            join in proptest::collection::btree_set(1_u8..6, 0..3),
        ) {
            let known = |n: &u8| usize::from(*n) <= record.members.len();
            let eject: Vec<_> = eject.iter().filter(|(n, _)| known(n)).collect();
            let join: Vec<_> = join.iter().filter(|n| known(n) && eject.iter().all(|(e, _)| e != n)).collect();
            let of_head = |n: u8| Member { store: StoreId([n; 16]), incarnation: 1 };
            let change = Change {
                eject: eject.iter().map(|(n, mark)| (of_head(**n), Version(**mark))).collect(),
                join: join.iter().map(|n| of_head(**n)).collect(),
            };
            let before = membership(&record);
            let applied = change.applied(before.record());
            let marks: Vec<_> =
                eject.iter().map(|(n, mark)| StaleMark { member: id(**n), mark: **mark }).collect();
            let back: Vec<_> = join.iter().map(|n| id(**n)).collect();
            let after = record.changed(&marks, &back);
            if let Some(after) = &after {
                let after = membership(after);
                prop_assert_eq!(&after.record().stale, &applied.stale);
            }
            // A head counts on nobody whom it only now wants to take in; the record may.
            if before.may_eject(&change.eject) {
                prop_assert_eq!(after.is_some(), applied != *before.record());
            } else if join.is_empty() {
                prop_assert_eq!(after, None);
            }
            for (partition, of_head) in record.partitions.iter().zip(before.partitions()) {
                prop_assert_eq!(record.min_in_sync(partition), of_head.min_in_sync(record.min_copies));
            }
        }

        /// Whatever is wished, in whatever order: every record keeps the rules, marks stay, and enough stay in sync.
        #[test]
        fn every_history_keeps_the_rules(
            copies in 1_u8..5, min_copies in 0_u8..5,
            wishes in proptest::collection::vec(
                (proptest::collection::vec((1_u8..6, 0_u64..9), 0..4), proptest::collection::vec(1_u8..6, 0..3)),
                0..20,
            ),
        ) {
            let mut now = record(copies, min_copies);
            for (eject, join) in wishes {
                let eject: Vec<_> =
                    eject.iter().map(|(n, mark)| StaleMark { member: id(*n), mark: *mark }).collect();
                let join: Vec<_> = join.iter().map(|n| id(*n)).collect();
                let Some(after) = now.changed(&eject, &join) else { continue };
                prop_assert_eq!(after.check(), Ok(()));
                for stale in &now.stale {
                    let moved = after.stale.iter().any(|s| s.member == stale.member && s.mark != stale.mark);
                    prop_assert!(!moved);
                }
                for (was, partition) in now.partitions.iter().zip(&after.partitions) {
                    let least = now.in_sync(was).min(after.min_in_sync(partition));
                    prop_assert!(after.in_sync(partition) >= least);
                }
                now = after;
            }
        }
    }
}
