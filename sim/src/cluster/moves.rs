//! Partitions that go to other owners: old, then old and new, then new, each step under a higher epoch (I11); and what the former owners
//! give up then (I2).
//!
//! The steps are the metadata's: no head is asked. That an owner has everything is its head's to say.

use torus_replication::membership::{Owner, Partition, Record};
use torus_replication::mutants::{self, Mutant};
use torus_replication::replica::Share;
use torus_replication::terms::{Epoch, Member};

use super::{World, member_of, site_of, volume_id};
use crate::random::Random;

/// How long after a new owner has everything the old one may be let go.
const GRACE_NS: std::ops::Range<u64> = 1_000_000..2_000_000_000;

/// A partition that is on its way.
#[derive(Debug)]
struct Move {
    volume: usize,
    partition: usize,
    /// Who is to own it no more, and who instead.
    from: Member,
    to: Member,
    /// When the old owner may go, once the new one is complete.
    due_ns: Option<u64>,
}

/// What a store owns no more and still has.
#[derive(Debug)]
struct Left {
    volume: usize,
    member: Member,
    share: Share,
}

/// All moves.
#[derive(Debug)]
pub(super) struct Moves {
    copies: usize,
    random: Random,
    under_way: Vec<Move>,
    left: Vec<Left>,
}

impl Moves {
    pub(super) fn new(copies: usize, random: Random) -> Moves {
        Moves { copies, random, under_way: Vec::new(), left: Vec::new() }
    }

    pub(super) fn are_done(&self, records: &[Record]) -> bool {
        let mut partitions = records.iter().flat_map(|record| &record.partitions);
        let is_whole = |partition: &Partition| {
            partition.owners.len() == self.copies && partition.owners.iter().all(|owner| owner.is_complete)
        };
        self.left.is_empty() && partitions.all(is_whole)
    }
}

impl World {
    /// Gives a node one more partition of a volume, if there is one that it does not own.
    pub(super) fn begin_move(&mut self, volume: usize, node: usize) {
        // A store that was formatted anew is no member, and nobody makes it one here.
        if self.formatted.is_some() {
            return;
        }
        let to = member_of(node);
        let mut record = self.metadata.record(volume).clone();
        let moves = &mut self.metadata.moves;
        let is_free = |(at, partition): &(usize, &Partition)| {
            !partition.owners.iter().any(|owner| owner.member == to)
                && !moves.under_way.iter().any(|other| (other.volume, other.partition) == (volume, *at))
        };
        let free: Vec<usize> =
            record.partitions.iter().enumerate().filter(is_free).map(|(at, _)| at).collect();
        let Some(&at) = moves.random.pick(&free) else { return };
        let partition = &mut record.partitions[at];
        let from = partition.owners[moves.random.index(partition.owners.len())].member;
        partition.epoch = Epoch(partition.epoch.0 + 1);
        let is_complete = mutants::is(Mutant::OwnerCompleteAtOnce);
        partition.owners.push(Owner { member: to, site: site_of(node), is_complete });
        moves.under_way.push(Move { volume, partition: at, from, to, due_ns: None });
        // What it had of it before is overwritten, not given up.
        moves
            .left
            .retain(|left| (left.volume, left.member, left.share.partition as usize) != (volume, to, at));
        self.coverage.moves += 1;
        self.note(|| format!("volume {volume} partition {at}: {from:?} is to give it to node {node}"));
        self.metadata.replace(volume, record);
    }

    /// Lets old owners go where the new ones have everything, and this node give up what it owns no more.
    pub(super) fn advance_moves(&mut self, node: usize) {
        let now_ns = self.now_ns();
        let mut under_way = std::mem::take(&mut self.metadata.moves.under_way);
        under_way.retain_mut(|moving| !self.advance_move(moving, now_ns));
        self.metadata.moves.under_way.append(&mut under_way);
        let own = member_of(node);
        let left = self.metadata.moves.left.iter().filter(|left| left.member == own);
        let left: Vec<(usize, Share)> = left.map(|left| (left.volume, left.share)).collect();
        for (volume, share) in left {
            if self.retire(node, volume_id(volume), share) {
                self.retired(volume, own, share);
            }
        }
    }

    /// Whether it has come to its end.
    fn advance_move(&mut self, moving: &mut Move, now_ns: u64) -> bool {
        let Move { volume, partition: at, from, to, .. } = *moving;
        let mut record = self.metadata.record(volume).clone();
        let of = u32::try_from(record.partitions.len()).expect("a few");
        let stale = record.stale.clone();
        let is_in_sync = |owner: &Owner| owner.is_complete && !stale.contains_key(&owner.member);
        let partition = &mut record.partitions[at];
        let staying = partition.owners.iter().filter(|owner| owner.member != from);
        let enough = staying.filter(|owner| is_in_sync(owner)).count() >= self.metadata.moves.copies;
        let is_new_in_sync = partition.owners.iter().any(|owner| owner.member == to && is_in_sync(owner));
        if !enough || !is_new_in_sync {
            moving.due_ns = None;
            return false;
        }
        let random = &mut self.metadata.moves.random;
        let due_ns = *moving.due_ns.get_or_insert_with(|| now_ns + random.range(GRACE_NS));
        if now_ns < due_ns {
            return false;
        }
        partition.owners.retain(|owner| owner.member != from);
        partition.epoch = Epoch(partition.epoch.0 + 1);
        let share = Share { partition: u32::try_from(at).expect("a few"), of, epoch: partition.epoch };
        // Who has nothing of the volume any more is no member that could be stale.
        if !record
            .partitions
            .iter()
            .any(|partition| partition.owners.iter().any(|owner| owner.member == from))
        {
            record.stale.remove(&from);
        }
        self.note(|| format!("volume {volume} partition {at}: {from:?} owns it no more"));
        self.metadata.moves.left.push(Left { volume, member: from, share });
        self.metadata.replace(volume, record);
        true
    }

    /// A store has given up what it did not own any more.
    fn retired(&mut self, volume: usize, member: Member, share: Share) {
        self.note(|| format!("volume {volume}: nothing is left of {share:?} on {member:?}"));
        let is_it = |left: &Left| (left.volume, left.member, left.share) == (volume, member, share);
        self.metadata.moves.left.retain(|left| !is_it(left));
    }
}
