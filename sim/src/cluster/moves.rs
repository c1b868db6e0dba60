//! Partitions that go to other owners: old, then old and new, then new, each step under a higher epoch (I11); and what the former owners
//! give up then (I2).
//!
//! The control plane has no moves yet: here somebody edits the volumes' records in the metadata, and asks nobody. That an owner has
//! everything is its head's to say. Who owns nothing any more stays a member, so that it may be head.

use torus_control::heads::PartitionRecord;
use torus_replication::membership::{Owner, Partition, Record};
use torus_replication::mutants::{self, Mutant};
use torus_replication::replica::Share;
use torus_replication::terms::{Epoch, Member};

use super::metadata::member_record;
use super::{Event, World, member_of, volume_id};
use crate::network::Endpoint;
use crate::random::Random;

/// How often it is looked whether a move can go on.
const LOOK_NS: u64 = 250_000_000;
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

    pub(super) fn are_done<'a>(&self, records: impl Iterator<Item = &'a Record>) -> bool {
        let mut partitions = records.flat_map(|record| &record.partitions);
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
        let record = self.metadata.record(volume);
        let moves = &self.metadata.moves;
        let is_free = |(at, partition): &(usize, &Partition)| {
            !partition.owners.iter().any(|owner| owner.member == to)
                && !moves.under_way.iter().any(|other| (other.volume, other.partition) == (volume, *at))
        };
        let free: Vec<usize> =
            record.partitions.iter().enumerate().filter(is_free).map(|(at, _)| at).collect();
        let shards = self.nodes[node].stored.layout.shards;
        let mut heads = self.metadata.heads(volume).0.clone();
        let moves = &mut self.metadata.moves;
        let Some(&at) = moves.random.pick(&free) else { return };
        let known = heads.members.iter().position(|member| member.store == to.store);
        let index = known.unwrap_or_else(|| {
            heads.members.push(member_record(node, shards));
            heads.members.len() - 1
        });
        let partition = &mut heads.partitions[at];
        let from = partition.owners[moves.random.index(partition.owners.len())];
        partition.epoch += 1;
        partition.owners.push(index as u16);
        if !mutants::is(Mutant::OwnerCompleteAtOnce) {
            partition.incomplete.push(index as u16);
        }
        let from = heads.members[usize::from(from)];
        let from = Member { store: from.store, incarnation: from.incarnation };
        moves.under_way.push(Move { volume, partition: at, from, to, due_ns: None });
        // What it had of it before is overwritten, not given up.
        moves
            .left
            .retain(|left| (left.volume, left.member, left.share.partition as usize) != (volume, to, at));
        self.coverage.moves += 1;
        self.note(|| format!("volume {volume} partition {at}: {from:?} is to give it to node {node}"));
        self.edit(volume, &heads);
    }

    /// Goes on with moves, now and then.
    pub(super) fn look_at_moves(&mut self) {
        self.schedule.after(LOOK_NS, Event::Moves);
        for node in 0..self.plan.nodes {
            if self.nodes[node].is_up() && !self.network.is_paused(Endpoint(node)) {
                self.advance_moves(node);
            }
        }
    }

    /// Lets old owners go where the new ones have everything, and this node give up what it owns no more.
    fn advance_moves(&mut self, node: usize) {
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
        let record = self.metadata.record(volume);
        let of = u32::try_from(record.partitions.len()).expect("a few");
        let is_in_sync = |owner: &Owner| owner.is_complete && !record.stale.contains_key(&owner.member);
        let partition = &record.partitions[at];
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
        let mut heads = self.metadata.heads(volume).0.clone();
        let Some(index) = heads.members.iter().position(|member| member.store == from.store) else {
            return true;
        };
        let index = index as u16;
        let partition = &mut heads.partitions[at];
        partition.owners.retain(|owner| *owner != index);
        partition.incomplete.retain(|owner| *owner != index);
        partition.epoch += 1;
        let epoch = Epoch(partition.epoch);
        let share = Share { partition: u32::try_from(at).expect("a few"), of, epoch };
        // Who has nothing of the volume any more is no member that could be stale.
        let owns = |partition: &PartitionRecord| partition.owners.contains(&index);
        if !heads.partitions.iter().any(owns) {
            heads.stale.retain(|stale| stale.member != index);
        }
        self.note(|| format!("volume {volume} partition {at}: {from:?} owns it no more"));
        self.metadata.moves.left.push(Left { volume, member: from, share });
        self.edit(volume, &heads);
        true
    }

    /// A store has given up what it did not own any more.
    fn retired(&mut self, volume: usize, member: Member, share: Share) {
        self.note(|| format!("volume {volume}: nothing is left of {share:?} on {member:?}"));
        let is_it = |left: &Left| (left.volume, left.member, left.share) == (volume, member, share);
        self.metadata.moves.left.retain(|left| !is_it(left));
    }
}
