//! The volumes' records, and what nodes do to have them changed.
//!
//! A change is made if the record is still at the revision it was computed from. Its answer may get lost; then a node makes sure that it
//! cannot be made any more, by a change of its own that changes nothing, and tells its head what the record is.

use std::collections::BTreeSet;

use torus_replication::membership::{Change, Membership, Partition, Record};
use torus_replication::mutants::{self, Mutant};
use torus_replication::terms::Generation;

use super::moves::Moves;
use super::{Checker, Event, World, node_id, volume_id};
use crate::random::Random;

/// How often a control process looks whether it is wanted.
const WATCH_NS: u64 = 250_000_000;
/// How long a head's node is gone before somebody else takes over.
const GONE_NS: u64 = 1_000_000_000;
/// When a wish is given up.
const TIMEOUT_NS: u64 = 1_000_000_000;

/// What a node asks of the metadata store.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    node: usize,
    life: u64,
    volume: usize,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Change {
        revision: u64,
        change: Change,
    },
    /// Make sure of the record.
    Touch {
        revision: u64,
    },
    Read,
    TakeOver {
        revision: u64,
    },
    /// The head has handed over: the node that is wished for is head.
    HandOver {
        revision: u64,
    },
}

/// What became of it.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    /// The record as it is, and nothing that was asked for before can change it; else it is only what was seen.
    is_sure: bool,
    record: Option<Record>,
}

/// The metadata store.
#[derive(Debug)]
pub(super) struct Metadata {
    records: Vec<Record>,
    pub(super) moves: Moves,
    /// Who is wished to be head, of records that are moving.
    successors: Vec<Option<usize>>,
    revision: u64,
    random: Random,
    /// Nobody reaches it.
    pub(super) is_away: bool,
    /// These nodes do not reach it.
    pub(super) away_from: BTreeSet<usize>,
    /// Of a hundred answers, how many get lost.
    pub(super) lost_percent: u64,
}

impl Metadata {
    pub(super) fn new(records: Vec<Record>, copies: usize, random: Random) -> Metadata {
        Metadata {
            revision: records.len() as u64 + 1,
            successors: vec![None; records.len()],
            records,
            moves: Moves::new(copies, random.named("moves", 0)),
            random,
            is_away: false,
            away_from: BTreeSet::new(),
            lost_percent: 0,
        }
    }

    pub(super) fn is_away_from(&self, node: usize) -> bool {
        self.is_away || self.away_from.contains(&node)
    }

    pub(super) fn record(&self, volume: usize) -> &Record {
        &self.records[volume]
    }

    /// Whether no partition is on its way to another owner, and nothing is left of former ones.
    pub(super) fn has_moved_all(&self) -> bool {
        self.moves.are_done(&self.records)
    }

    pub(super) fn replace(&mut self, volume: usize, mut record: Record) -> Record {
        self.revision += 1;
        (record.revision, record.edition) = (self.revision, record.edition + 1);
        self.records[volume] = record.clone();
        record
    }
}

impl World {
    /// A head wants its record changed.
    pub(super) fn wish_for_change(&mut self, node: usize, volume: usize, revision: u64, change: Change) {
        self.note(|| format!("node {node} volume {volume} asks at revision {revision} for {change:?}"));
        self.send_wish(node, volume, What::Change { revision, change });
    }

    fn send_wish(&mut self, node: usize, volume: usize, what: What) {
        let life = self.nodes[node].life;
        let wish = Wish { node, life, volume, what };
        let delay_ns = self.metadata.random.range(500_000..20_000_000);
        self.schedule.after(delay_ns, Event::Wish(wish));
    }

    pub(super) fn wish(&mut self, wish: Wish) {
        let Wish { node, life, volume, what } = wish;
        let is_late = self.metadata.random.below(100) < self.metadata.lost_percent / 4;
        if self.metadata.is_away_from(node) || is_late {
            // It may still be carried out, long after its asker has given up.
            let delay_ns = self.metadata.random.range(100_000_000..3_000_000_000);
            let again = Wish { node, life, volume, what: what.clone() };
            if self.metadata.random.coin() {
                self.schedule.after(delay_ns, Event::Wish(again));
            }
            self.answer_wish(node, life, volume, TIMEOUT_NS, Outcome { is_sure: false, record: None });
            return;
        }
        let now = self.metadata.records[volume].clone();
        let (is_sure, record) = match &what {
            What::Change { revision, change }
                if now.revision == *revision || mutants::is(Mutant::ChangeWithoutCompare) =>
            {
                self.check_change(volume, &now, change);
                self.coverage.ejections += change.eject.len() as u64;
                self.coverage.joins += change.join.len() as u64;
                (true, self.metadata.replace(volume, change.applied(&now)))
            }
            What::Touch { revision } if now.revision == *revision => {
                (true, self.metadata.replace(volume, now))
            }
            What::TakeOver { revision } if now.revision == *revision => {
                self.coverage.takeovers += 1;
                (true, self.name_head(volume, now, node))
            }
            What::HandOver { revision } if now.revision == *revision && now.is_moving => {
                self.coverage.takeovers += 1;
                self.coverage.hand_overs += 1;
                let successor = self.metadata.successors[volume].unwrap_or(node);
                (true, self.name_head(volume, now, successor))
            }
            // A record that has changed since cannot be changed by what was computed from it.
            What::Change { .. } => (true, now),
            What::Touch { .. } | What::TakeOver { .. } | What::HandOver { .. } | What::Read => (false, now),
        };
        self.note(|| format!("metadata: volume {volume} node {node} {what:?}: {is_sure} {record:?}"));
        let is_lost = self.metadata.random.below(100) < self.metadata.lost_percent;
        if is_lost {
            self.coverage.doubts += 1;
            self.answer_wish(node, life, volume, TIMEOUT_NS, Outcome { is_sure: false, record: None });
        } else {
            // Whoever has handed over may be the last to hear of its successor.
            let is_late = matches!(what, What::HandOver { .. }) && self.metadata.random.coin();
            let most_ns = if is_late { 1_500_000_000 } else { 20_000_000 };
            let delay_ns = self.metadata.random.range(500_000..most_ns);
            self.answer_wish(node, life, volume, delay_ns, Outcome { is_sure, record: Some(record) });
        }
    }

    fn name_head(&mut self, volume: usize, now: Record, node: usize) -> Record {
        let after = Record { takeover: now.takeover + 1, head: Some(node_id(node)), is_moving: false, ..now };
        self.metadata.successors[volume] = None;
        self.metadata.replace(volume, after)
    }

    /// Somebody wishes that a node be the head, if it has a copy in sync.
    pub(super) fn wish_for_move(&mut self, volume: usize, node: usize) {
        let now = self.metadata.records[volume].clone();
        let is_owner = |partition: &Partition| {
            partition.owners.iter().any(|owner| super::node_of(owner.site.node) == node)
        };
        let has_copy =
            now.partitions.iter().any(is_owner) && !now.stale.contains_key(&super::member_of(node));
        if !self.metadata.is_away && has_copy && now.head.is_some_and(|head| head != node_id(node)) {
            self.metadata.successors[volume] = Some(node);
            self.metadata.replace(volume, Record { is_moving: true, ..now });
        }
    }

    /// And that it need not be any more.
    pub(super) fn take_wish_back(&mut self, volume: usize) {
        let now = self.metadata.records[volume].clone();
        if !self.metadata.is_away && now.is_moving {
            self.metadata.replace(volume, Record { is_moving: false, ..now });
        }
    }

    /// A head has given its grants back.
    pub(super) fn handed_over(&mut self, node: usize, volume: usize) {
        let revision = self.metadata.records[volume].revision;
        self.nodes[node].is_asking[volume] = true;
        self.send_wish(node, volume, What::HandOver { revision });
    }

    /// No ejection leaves fewer members in sync than must be (I5).
    fn check_change(&mut self, volume: usize, before: &Record, change: &Change) {
        let after = change.applied(before);
        for (at, partition) in after.partitions.iter().enumerate() {
            let in_sync = |record: &Record| {
                let owners = record.partitions[at].owners.iter().filter(|owner| owner.is_complete);
                owners.filter(|owner| !record.stale.contains_key(&owner.member)).count()
            };
            let (had, has) = (in_sync(before), in_sync(&after));
            if has < had && has < partition.min_in_sync(after.min_copies) {
                let what =
                    format!("volume {volume} partition {at}: {has} in sync by {change:?} of {before:?}");
                self.object(Checker::Record, what);
            }
        }
    }

    fn answer_wish(&mut self, node: usize, life: u64, volume: usize, delay_ns: u64, outcome: Outcome) {
        self.schedule.after(delay_ns, Event::Outcome { node, volume, life, outcome });
    }

    pub(super) fn outcome(&mut self, node: usize, volume: usize, life: u64, outcome: Outcome) {
        if self.nodes[node].life != life {
            return;
        }
        self.nodes[node].is_asking[volume] = false;
        let Some(record) = outcome.record else {
            if self.nodes[node].is_in_doubt(volume) {
                self.nodes[node].is_asking[volume] = true;
                self.send_wish(node, volume, What::Read);
            }
            return;
        };
        let is_mine = record.head == Some(node_id(node));
        if !is_mine {
            self.give_up_head(node, volume, &record);
            return;
        }
        if self.nodes[node].is_in_doubt(volume) && !outcome.is_sure {
            self.nodes[node].is_asking[volume] = true;
            self.send_wish(node, volume, What::Touch { revision: record.revision });
            return;
        }
        if outcome.is_sure || !self.nodes[node].has_head(volume) {
            self.head_record(node, volume, record);
        }
    }

    /// A control process looks at the volumes: is it to be head, or has the head gone?
    pub(super) fn watch(&mut self, node: usize) {
        let jitter_ns = self.metadata.random.below(20_000_000);
        self.schedule.after(WATCH_NS + jitter_ns, Event::Watch { node });
        let now_ns = self.now_ns();
        if !self.nodes[node].is_up()
            || self.network.is_paused(crate::network::Endpoint(node))
            || self.metadata.is_away_from(node)
        {
            return;
        }
        self.advance_moves(node);
        for volume in 0..self.plan.volumes {
            if self.nodes[node].is_asking[volume] {
                continue;
            }
            let record = self.metadata.records[volume].clone();
            if record.head == Some(node_id(node)) {
                if self.nodes[node].has_used(volume, record.takeover) && !self.nodes[node].has_head(volume) {
                    self.take_over(node, volume);
                } else if !self.nodes[node].has_head(volume) {
                    self.nodes[node].is_asking[volume] = true;
                    self.send_wish(node, volume, What::Touch { revision: record.revision });
                } else if !self.nodes[node].is_in_doubt(volume)
                    && self.nodes[node].head_takeover(volume) == Some(record.takeover)
                    && self.nodes[node].known_revision(volume) < Some(record.revision)
                {
                    self.tell_record(node, volume, record);
                }
                continue;
            }
            if self.nodes[node].has_head(volume) {
                self.nodes[node].is_asking[volume] = true;
                self.send_wish(node, volume, What::Read);
                continue;
            }
            let is_gone = record.head.is_none_or(|head| {
                let head = super::node_of(head);
                let since = self.nodes[head].down_since_ns;
                !self.nodes[head].is_up() && since.is_some_and(|since| now_ns > since + GONE_NS)
            });
            if is_gone && self.metadata.random.one_in(3) {
                self.take_over(node, volume);
            }
        }
    }

    /// A node begins to take a volume over.
    pub(super) fn take_over(&mut self, node: usize, volume: usize) {
        let revision = self.metadata.records[volume].revision;
        self.nodes[node].is_asking[volume] = true;
        self.send_wish(node, volume, What::TakeOver { revision });
    }

    /// The record names this node: it is the head under it.
    fn head_record(&mut self, node: usize, volume: usize, record: Record) {
        let generation = Generation { takeover: record.takeover, start: self.nodes[node].start };
        if self.nodes[node].head_takeover(volume) == Some(record.takeover) {
            self.tell_record(node, volume, record);
            return;
        }
        if self.nodes[node].has_used(volume, record.takeover) {
            return;
        }
        self.note(|| format!("node {node} becomes head of volume {volume}, generation {generation}"));
        let membership = Membership::new(volume_id(volume), record, None);
        self.begin_head(node, generation, membership);
    }
}
