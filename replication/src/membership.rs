//! Who is in sync: the volume's one record in the metadata store, the owners of its partitions, and the changes to them (I5).
//!
//! The in-sync set of an extent is the owners of its partition, less those not yet complete, less those that the volume's record
//! calls stale. Invariants:
//! * A change is made against the revision of the record it was computed from, and takes effect at that one or not at all.
//! * No change leaves a partition with fewer members in sync than must be ([`Partition::min_in_sync`]); there is always one.
//! * A stale member's mark does not move until the member is in sync again.
//! * While the outcome of a change is unknown, [`Membership::is_needed`] takes both outcomes together and [`Membership::is_sure`]
//!   what they have in common.

use std::collections::BTreeMap;

use cluster_map::{NodeId, VolumeId};

use crate::mutants::{self, Mutant};
use crate::terms::{Epoch, Extent, Member, Site, Version};

/// An owner of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Who.
    pub member: Member,
    /// Where the volume is on the node that has its store.
    pub site: Site,
    /// It has everything that it should; else it is being made complete and no member yet.
    pub is_complete: bool,
}

/// One of a volume's partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Grows with every change of the owners.
    pub epoch: Epoch,
    /// Nearest first is the head's business; the order is the ring's.
    pub owners: Vec<Owner>,
}

impl Partition {
    /// Of so many complete owners, how many must stay in sync: a volume asks for at most that many with `min_copies`, where 0 stands
    /// for the default, two of three or more, else one.
    #[must_use]
    pub fn min_in_sync(&self, min_copies: u8) -> usize {
        let complete = self.owners.iter().filter(|owner| owner.is_complete).count();
        let wanted = match min_copies {
            0 if complete >= 3 => 2,
            0 => 1,
            wanted => usize::from(wanted),
        };
        wanted.min(complete).max(1)
    }
}

/// What the metadata store has of a volume, as far as replication goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its spread: extent number modulo their count says which partition has an extent. The count stays.
    pub partitions: Vec<Partition>,
    /// Of the record's last change, in the metadata store.
    pub revision: u64,
    /// Grows with every change of the record, and stands in it: of two it tells which is the newer one, whatever became of the metadata store
    /// since (I14).
    pub edition: u64,
    /// Grows with every take-over.
    pub takeover: u64,
    /// The node that is to be its head.
    pub head: Option<NodeId>,
    /// Members that miss writes, with the version up to which each is known to be complete.
    pub stale: BTreeMap<Member, Version>,
    /// See [`Partition::min_in_sync`].
    pub min_copies: u8,
    /// The head is to hand over: another node is to be head next.
    pub is_moving: bool,
}

/// A change to a record.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// Members that become stale, each with its mark.
    pub eject: BTreeMap<Member, Version>,
    /// Members that have everything now: they are in sync, and complete in all that they own.
    pub join: Vec<Member>,
}

impl Change {
    /// Whether nothing would change.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.eject.is_empty() && self.join.is_empty()
    }

    /// What the record is after it. Its revision is the metadata store's to say.
    #[must_use]
    pub fn applied(&self, record: &Record) -> Record {
        let mut after = record.clone();
        for (member, mark) in &self.eject {
            // It does not move while the member is stale.
            after.stale.entry(*member).or_insert(*mark);
        }
        for member in &self.join {
            after.stale.remove(member);
            let owners = after.partitions.iter_mut().flat_map(|partition| &mut partition.owners);
            owners.filter(|owner| owner.member == *member).for_each(|owner| owner.is_complete = true);
        }
        after
    }
}

/// Where a volume lies, and who of its owners is in sync.
#[derive(Debug, Clone)]
pub struct Membership {
    /// Which volume.
    pub volume: VolumeId,
    record: Record,
    /// A change whose outcome is not known.
    doubt: Option<Change>,
}

impl Membership {
    /// Of a volume as its record has it. `doubt` is a change that was asked for and may have been made since.
    ///
    /// # Panics
    /// If there is no partition.
    #[must_use]
    pub fn new(volume: VolumeId, record: Record, doubt: Option<Change>) -> Membership {
        assert!(!record.partitions.is_empty(), "a volume has a partition");
        Membership { volume, record, doubt }
    }

    /// The record as it was last known.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The change whose outcome is not known.
    #[must_use]
    pub fn doubt(&self) -> Option<&Change> {
        self.doubt.as_ref()
    }

    /// The partition of an extent.
    #[must_use]
    pub fn partition(&self, extent: Extent) -> &Partition {
        &self.record.partitions[self.partition_index(extent)]
    }

    /// Which of the volume's partitions has an extent, and its epoch.
    #[must_use]
    pub fn epoch(&self, extent: Extent) -> (u32, Epoch) {
        let at = self.partition_index(extent);
        (u32::try_from(at).expect("fewer than 2^32 partitions"), self.record.partitions[at].epoch)
    }

    fn partition_index(&self, extent: Extent) -> usize {
        extent.0 as usize % self.record.partitions.len()
    }

    /// All partitions.
    #[must_use]
    pub fn partitions(&self) -> &[Partition] {
        &self.record.partitions
    }

    /// Whether a member has extents of the same partition as `extent`.
    #[must_use]
    pub fn owns(&self, member: Member, extent: Extent) -> bool {
        self.partition(extent).owners.iter().any(|owner| owner.member == member)
    }

    /// Every owner once, with where its copy is.
    #[must_use]
    pub fn owners(&self) -> BTreeMap<Member, Site> {
        let owners = self.record.partitions.iter().flat_map(|partition| &partition.owners);
        owners.map(|owner| (owner.member, owner.site)).collect()
    }

    /// What the volume has a member as, in each partition that it owns.
    fn roles(&self, member: Member) -> impl Iterator<Item = &Owner> {
        let owners = self.record.partitions.iter().flat_map(|partition| &partition.owners);
        owners.filter(move |owner| owner.member == member)
    }

    /// Whether some outcome has a member in sync in some partition.
    #[must_use]
    pub fn is_needed_somewhere(&self, member: Member) -> bool {
        self.roles(member).any(|owner| self.is_needed(owner))
    }

    /// Whether a member owns a partition in which no outcome has it in sync: it is to be brought up to date.
    #[must_use]
    pub fn is_behind_somewhere(&self, member: Member) -> bool {
        self.roles(member).any(|owner| !self.is_needed(owner))
    }

    /// Whether some outcome has a member in sync for an extent.
    #[must_use]
    pub fn needs(&self, member: Member, extent: Extent) -> bool {
        self.needed(extent).any(|owner| owner.member == member)
    }

    /// Whether a member owns an extent, and no outcome has it in sync there.
    #[must_use]
    pub fn is_behind(&self, member: Member, extent: Extent) -> bool {
        self.owns(member, extent) && !self.needs(member, extent)
    }

    /// Whether a member owns the same, and lacks the same of it, as by another record.
    #[must_use]
    pub fn stands_as_in(&self, before: &Record, member: Member) -> bool {
        let roles = |record: &Record| -> Vec<Option<bool>> {
            let role = |partition: &Partition| {
                partition.owners.iter().find(|owner| owner.member == member).map(|owner| owner.is_complete)
            };
            record.partitions.iter().map(role).collect()
        };
        roles(&self.record) == roles(before) && self.record.stale.get(&member) == before.stale.get(&member)
    }

    /// Up to which version a member has all of an extent.
    #[must_use]
    pub fn mark(&self, member: Member, extent: Extent) -> Version {
        let mut owners = self.partition(extent).owners.iter();
        if owners.any(|owner| owner.member == member && owner.is_complete) {
            return self.record.stale.get(&member).copied().unwrap_or_default();
        }
        Version::default()
    }

    /// Whether no outcome of what was asked for has this owner out of sync: it may be read.
    #[must_use]
    pub fn is_sure(&self, owner: &Owner) -> bool {
        let ejected = self.doubt.as_ref().is_some_and(|change| change.eject.contains_key(&owner.member));
        owner.is_complete && !self.record.stale.contains_key(&owner.member) && !ejected
    }

    /// Whether some outcome has this owner in sync: nothing is acknowledged without it.
    #[must_use]
    pub fn is_needed(&self, owner: &Owner) -> bool {
        let doubt = self.doubt.as_ref();
        let joined = doubt.is_some_and(|change| change.join.contains(&owner.member))
            && !mutants::is(Mutant::JoinInDoubtUndone);
        let ejected = mutants::is(Mutant::EjectionInDoubtDone)
            && doubt.is_some_and(|change| change.eject.contains_key(&owner.member));
        let is_in_sync = owner.is_complete && !self.record.stale.contains_key(&owner.member);
        !ejected && (joined || is_in_sync)
    }

    /// The owners of an extent that may be read.
    pub fn sure(&self, extent: Extent) -> impl Iterator<Item = &Owner> {
        self.partition(extent).owners.iter().filter(|owner| self.is_sure(owner))
    }

    /// The owners of an extent without which nothing is acknowledged.
    pub fn needed(&self, extent: Extent) -> impl Iterator<Item = &Owner> {
        self.partition(extent).owners.iter().filter(|owner| self.is_needed(owner))
    }

    /// Whether these members, all of them together, may be called stale.
    #[must_use]
    pub fn may_eject(&self, members: &BTreeMap<Member, Version>) -> bool {
        self.record.partitions.iter().all(|partition| {
            let in_sync = partition.owners.iter().filter(|owner| self.is_sure(owner));
            let (mut going, mut staying) = (0, 0);
            for owner in in_sync {
                *(if members.contains_key(&owner.member) { &mut going } else { &mut staying }) += 1;
            }
            let enough = if mutants::is(Mutant::EjectBelowMin) {
                1
            } else {
                partition.min_in_sync(self.record.min_copies)
            };
            going == 0 || staying >= enough
        })
    }

    /// A member's mark is that, until the record is learned anew.
    #[cfg(mutants)]
    pub(crate) fn raise_mark(&mut self, member: Member, mark: Version) {
        self.record.stale.entry(member).and_modify(|known| *known = mark);
    }

    /// A change is asked for. Its outcome is unknown from now on.
    ///
    /// # Panics
    /// If another one's still is.
    pub fn begin(&mut self, change: Change) {
        assert!(self.doubt.is_none(), "one change at a time");
        self.doubt = Some(change);
    }

    /// The record is this now: nothing that was asked for before can still change it.
    pub fn settle(&mut self, record: Record) {
        self.record = record;
        self.doubt = None;
    }
}

#[cfg(test)]
mod tests {
    use cluster_map::StoreId;

    use super::*;

    fn member(number: u8) -> Member {
        Member { store: StoreId([number; 16]), incarnation: 1 }
    }

    fn membership(owners: &[u8], stale: &[u8]) -> Membership {
        let owner = |number: &u8| Owner {
            member: member(*number),
            site: Site { node: NodeId([*number; 16]), core: 0 },
            is_complete: true,
        };
        let partition = Partition { epoch: Epoch(1), owners: owners.iter().map(owner).collect() };
        let stale = stale.iter().map(|number| (member(*number), Version(7))).collect();
        let record = Record {
            partitions: vec![partition],
            revision: 1,
            edition: 1,
            takeover: 1,
            head: None,
            stale,
            min_copies: 0,
            is_moving: false,
        };
        Membership::new(VolumeId([9; 16]), record, None)
    }

    fn eject(members: &[u8]) -> BTreeMap<Member, Version> {
        members.iter().map(|number| (member(*number), Version(50))).collect()
    }

    fn numbers<'a>(owners: impl Iterator<Item = &'a Owner>) -> Vec<u8> {
        owners.map(|owner| owner.member.store.0[0]).collect()
    }

    #[test]
    fn two_of_three_stay() {
        let all = membership(&[1, 2, 3], &[]);
        assert!(all.may_eject(&eject(&[3])));
        assert!(!all.may_eject(&eject(&[2, 3])));
        assert!(!membership(&[1, 2, 3], &[3]).may_eject(&eject(&[2])));
        assert!(membership(&[1, 2], &[]).may_eject(&eject(&[2])));
        assert!(!membership(&[1], &[]).may_eject(&eject(&[1])));
        assert!(membership(&[1], &[]).may_eject(&eject(&[2])), "who has nothing of it may go");
    }

    #[test]
    fn in_doubt_both_outcomes_hold() {
        let mut membership = membership(&[1, 2, 3], &[3]);
        let change = Change { eject: eject(&[2]), join: vec![member(3)] };
        membership.begin(change.clone());
        assert_eq!(numbers(membership.sure(Extent(0))), [1]);
        assert_eq!(numbers(membership.needed(Extent(0))), [1, 2, 3]);
        let after = change.applied(membership.record());
        membership.settle(after);
        assert_eq!(numbers(membership.sure(Extent(0))), [1, 3]);
        assert_eq!(numbers(membership.needed(Extent(0))), [1, 3]);
    }

    #[test]
    fn a_new_owner_is_behind_in_its_partition_only() {
        let (old, moved) = (membership(&[1, 2], &[]), membership(&[2, 3], &[]));
        let mut record = old.record().clone();
        record.partitions.push(moved.record().partitions[0].clone());
        record.partitions[1].owners[1].is_complete = false;
        record.partitions[0].owners[1].is_complete = false;
        // 1 and 2 have the even extents, 2 and 3 the odd ones; 2 is new to the even ones, 3 to the odd ones.
        let mut membership = Membership::new(old.volume, record, None);
        assert_eq!(numbers(membership.needed(Extent(0))), [1]);
        assert_eq!(numbers(membership.needed(Extent(1))), [2]);
        assert!(membership.is_behind(member(2), Extent(0)) && !membership.is_behind(member(2), Extent(1)));
        assert!(membership.is_needed_somewhere(member(2)) && membership.is_behind_somewhere(member(2)));
        assert!(!membership.is_needed_somewhere(member(3)));
        let change = Change { eject: BTreeMap::new(), join: vec![member(2)] };
        membership.begin(change.clone());
        assert_eq!(
            (numbers(membership.needed(Extent(0))), numbers(membership.sure(Extent(0)))),
            (vec![1, 2], vec![1])
        );
        let after = change.applied(membership.record());
        membership.settle(after);
        assert_eq!(numbers(membership.sure(Extent(0))), [1, 2]);
        assert!(!membership.is_behind_somewhere(member(2)) && membership.is_behind_somewhere(member(3)));
    }

    #[test]
    fn what_is_new_to_a_member_has_no_mark() {
        let mut record = membership(&[1, 2], &[2]).record().clone();
        let new = record.partitions[0].clone();
        record.partitions.push(new);
        record.partitions[1].owners[1].is_complete = false;
        let membership = Membership::new(VolumeId([9; 16]), record, None);
        assert_eq!(membership.mark(member(2), Extent(0)), Version(7));
        assert_eq!(membership.mark(member(2), Extent(1)), Version(0));
    }

    #[test]
    fn a_mark_stays_where_it_is() {
        let membership = membership(&[1, 2, 3], &[3]);
        let change = Change { eject: eject(&[3]), join: Vec::new() };
        assert_eq!(change.applied(membership.record()).stale[&member(3)], Version(7));
    }
}
