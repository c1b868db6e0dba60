//! The key space: what is there, and what changed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use super::{Compare, Error, Event, KeyValue, LeaseId, Op, Revision, Snapshot, Txn, TxnOutcome};

/// Changes that one delivery has at most, whole revisions apart.
const DELIVERED_CHANGES: usize = 256;

pub(super) enum Changes {
    /// They are not kept.
    Compacted(Revision),
    Events {
        events: Vec<Event>,
        next: Revision,
        more: bool,
    },
}

#[derive(Clone, Debug)]
struct Lease {
    ttl_ns: u64,
    keys: BTreeSet<String>,
}

#[derive(Clone, Debug)]
pub(super) struct State {
    revision: Revision,
    /// Changes up to and including this one are not in `history`.
    compacted: Revision,
    entries: BTreeMap<String, KeyValue>,
    leases: BTreeMap<LeaseId, Lease>,
    history: VecDeque<(Revision, Arc<[Event]>)>,
    history_changes: usize,
    history_limit: usize,
}

impl State {
    pub(super) fn new(history_limit: usize) -> Self {
        Self {
            revision: Revision(1),
            compacted: Revision(0),
            entries: BTreeMap::new(),
            leases: BTreeMap::new(),
            history: VecDeque::new(),
            history_changes: 0,
            history_limit,
        }
    }

    pub(super) fn revision(&self) -> Revision {
        self.revision
    }

    pub(super) fn leases(&self) -> impl Iterator<Item = (LeaseId, u64)> {
        self.leases.iter().map(|(id, lease)| (*id, lease.ttl_ns))
    }

    pub(super) fn get(&self, key: &str) -> Option<KeyValue> {
        self.entries.get(key).cloned()
    }

    pub(super) fn list(&self, prefix: &str) -> Snapshot {
        let from: (Bound<&str>, Bound<&str>) = (Bound::Included(prefix), Bound::Unbounded);
        let entries = self.entries.range::<str, _>(from).take_while(|(key, _)| key.starts_with(prefix));
        Snapshot { revision: self.revision, entries: entries.map(|(_, entry)| entry.clone()).collect() }
    }

    fn holds(&self, compare: &Compare) -> bool {
        let entry = self.entries.get(compare.key());
        match compare {
            Compare::Absent(_) => entry.is_none(),
            Compare::Exists(_) => entry.is_some(),
            Compare::Revision(_, revision) => entry.is_some_and(|entry| entry.mod_revision == *revision),
            Compare::Created(_, revision) => entry.is_some_and(|entry| entry.create_revision == *revision),
            Compare::Version(_, version) => entry.is_some_and(|entry| entry.version == *version),
            Compare::Value(_, value) => entry.is_some_and(|entry| entry.value == *value),
        }
    }

    /// A transaction within the limits.
    pub(super) fn txn(&mut self, txn: Txn) -> Result<TxnOutcome, Error> {
        if !txn.compares.iter().all(|compare| self.holds(compare)) {
            return Ok(TxnOutcome::Conflict);
        }
        for op in &txn.ops {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.leases.contains_key(lease)
            {
                return Err(Error::LeaseGone(*lease));
            }
        }
        let revision = self.revision.next();
        let events: Vec<Event> = txn.ops.into_iter().filter_map(|op| self.change(revision, op)).collect();
        if !events.is_empty() {
            self.commit(revision, events);
        }
        Ok(TxnOutcome::Committed(self.revision))
    }

    fn change(&mut self, revision: Revision, op: Op) -> Option<Event> {
        let before = self.entries.remove(op.key());
        if let Some(entry) = &before
            && let Some(lease) = entry.lease.and_then(|lease| self.leases.get_mut(&lease))
        {
            lease.keys.remove(&entry.key);
        }
        match op {
            Op::Delete { key } => before.map(|_| Event::Delete { key, revision }),
            Op::Put { key, value, lease } => {
                let (create_revision, version) =
                    before.map_or((revision, 0), |entry| (entry.create_revision, entry.version));
                if let Some(lease) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
                    lease.keys.insert(key.clone());
                }
                let version = version + 1;
                let entry = KeyValue { key, value, create_revision, mod_revision: revision, version, lease };
                self.entries.insert(entry.key.clone(), entry.clone());
                Some(Event::Put(entry))
            }
        }
    }

    fn commit(&mut self, revision: Revision, events: Vec<Event>) {
        self.revision = revision;
        self.history_changes += events.len();
        self.history.push_back((revision, events.into()));
        while self.history_changes > self.history_limit {
            let Some((oldest, _)) = self.history.front() else { break };
            self.compact(*oldest);
        }
    }

    pub(super) fn grant(&mut self, lease: LeaseId, ttl_ns: u64) {
        self.leases.insert(lease, Lease { ttl_ns, keys: BTreeSet::new() });
    }

    pub(super) fn revoke(&mut self, lease: LeaseId) -> Result<(), Error> {
        let ended = self.leases.remove(&lease).ok_or(Error::LeaseGone(lease))?;
        let revision = self.revision.next();
        let delete = |key: String| {
            self.entries.remove(&key);
            Event::Delete { key, revision }
        };
        let events: Vec<Event> = ended.keys.into_iter().map(delete).collect();
        if !events.is_empty() {
            self.commit(revision, events);
        }
        Ok(())
    }

    pub(super) fn compact(&mut self, through: Revision) {
        let through = through.min(self.revision);
        while let Some((revision, events)) = self.history.front()
            && *revision <= through
        {
            self.history_changes -= events.len();
            self.history.pop_front();
        }
        self.compacted = self.compacted.max(through);
    }

    /// What a restored backup is: no history, and possibly a higher revision.
    pub(super) fn restored(mut self, higher: i64) -> Self {
        self.revision = Revision(self.revision.0 + higher.max(0));
        self.compact(self.revision);
        self
    }

    pub(super) fn changes(&self, prefix: &str, from: Revision) -> Changes {
        if from <= self.compacted {
            return Changes::Compacted(self.compacted);
        }
        let start = self.history.partition_point(|(revision, _)| *revision < from);
        let mut events = Vec::new();
        for (revision, changed) in self.history.iter().skip(start) {
            events.extend(changed.iter().filter(|event| event.key().starts_with(prefix)).cloned());
            if events.len() >= DELIVERED_CHANGES {
                return Changes::Events { events, next: revision.next(), more: *revision < self.revision };
            }
        }
        Changes::Events { events, next: self.revision.next().max(from), more: false }
    }
}
