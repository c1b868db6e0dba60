//! The revisioned key space as a value: what a transaction would do, and what a committed record does.
//!
//! No I/O, no clock. [`State::plan`] decides without changing anything; [`State::apply`] is the one way to change, and
//! total: records also come from a journal on disk. Two states that applied the same records are equal, so the
//! embedded store can keep one for what is durable and one for what is on its way to the disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use super::{Compare, Event, KeyValue, LeaseId, MetaError, Op, Revision, Snapshot, Txn};

/// Revision of a store that nothing was ever written to, as in etcd.
const FIRST_REVISION: Revision = Revision(1);

/// A committed change of the key space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// The operations of one transaction; none without effect.
    Write { revision: Revision, ops: Vec<Op> },
    /// A new lease.
    Grant { lease: LeaseId, ttl_ms: u64 },
    /// The end of a lease, by request or by time. `revision` is the store's afterwards.
    Revoke { lease: LeaseId, revision: Revision },
}

/// What a transaction would do to a state.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plan {
    Conflict,
    /// The conditions hold and nothing changes; the current revision.
    Unchanged(Revision),
    Write(Record),
}

/// A record does not follow from the state it is applied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Inconsistent(pub(super) &'static str);

/// What a scan of the history finds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Changes {
    Compacted(Revision),
    /// Events at `from` or later, whole revisions only, and the revision to go on from.
    Events {
        events: Vec<Event>,
        next: Revision,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) value: Vec<u8>,
    pub(super) mod_revision: Revision,
    pub(super) lease: Option<LeaseId>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) ttl_ms: u64,
    keys: BTreeSet<String>,
}

#[derive(Clone, Debug)]
pub(super) struct State {
    revision: Revision,
    /// Changes up to and including this revision are not in `history`.
    compacted: Revision,
    entries: BTreeMap<String, Entry>,
    leases: BTreeMap<LeaseId, Lease>,
    /// Highest lease id ever granted: ids are not reused.
    last_lease: LeaseId,
    /// Events by revision, ascending.
    history: VecDeque<(Revision, Arc<[Event]>)>,
    history_bytes: usize,
    history_limit_bytes: usize,
}

impl State {
    /// An empty key space that keeps at most `history_limit_bytes` of changes for watches.
    pub(super) fn new(history_limit_bytes: usize) -> Self {
        Self {
            revision: FIRST_REVISION,
            compacted: Revision(0),
            entries: BTreeMap::new(),
            leases: BTreeMap::new(),
            last_lease: LeaseId(0),
            history: VecDeque::new(),
            history_bytes: 0,
            history_limit_bytes,
        }
    }

    /// A key space read back from a snapshot: no history before `revision`.
    pub(super) fn restore(
        revision: Revision,
        last_lease: LeaseId,
        leases: impl IntoIterator<Item = (LeaseId, u64)>,
        entries: impl IntoIterator<Item = KeyValue>,
        history_limit_bytes: usize,
    ) -> Result<Self, Inconsistent> {
        if revision < FIRST_REVISION {
            return Err(Inconsistent("snapshot has no revision"));
        }
        let mut state = Self::new(history_limit_bytes);
        state.revision = revision;
        state.compacted = revision;
        state.last_lease = last_lease;
        for (lease, ttl_ms) in leases {
            if lease.0 < 1 || lease > last_lease {
                return Err(Inconsistent("snapshot has a lease that was never granted"));
            }
            state.leases.insert(lease, Lease { ttl_ms, keys: BTreeSet::new() });
        }
        for entry in entries {
            if entry.mod_revision > revision || entry.mod_revision < FIRST_REVISION {
                return Err(Inconsistent("snapshot has a key from the future"));
            }
            if let Some(lease) = entry.lease {
                let lease = state
                    .leases
                    .get_mut(&lease)
                    .ok_or(Inconsistent("snapshot has a key of an ended lease"))?;
                lease.keys.insert(entry.key.clone());
            }
            let value = Entry { value: entry.value, mod_revision: entry.mod_revision, lease: entry.lease };
            if state.entries.insert(entry.key, value).is_some() {
                return Err(Inconsistent("snapshot has a key twice"));
            }
        }
        Ok(state)
    }

    pub(super) fn revision(&self) -> Revision {
        self.revision
    }

    pub(super) fn last_lease(&self) -> LeaseId {
        self.last_lease
    }

    pub(super) fn leases(&self) -> impl Iterator<Item = (LeaseId, u64)> {
        self.leases.iter().map(|(id, lease)| (*id, lease.ttl_ms))
    }

    pub(super) fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    pub(super) fn get(&self, key: &str) -> Option<KeyValue> {
        self.entries.get(key).map(|entry| key_value(key, entry))
    }

    pub(super) fn list(&self, prefix: &str) -> Snapshot {
        let from: (Bound<&str>, Bound<&str>) = (Bound::Included(prefix), Bound::Unbounded);
        let entries = self
            .entries
            .range::<str, _>(from)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, entry)| key_value(key, entry))
            .collect();
        Snapshot { revision: self.revision, entries }
    }

    /// Decides a transaction that passed [`Txn::validate`].
    pub(super) fn plan(&self, txn: Txn) -> Result<Plan, MetaError> {
        if !txn.compares.iter().all(|compare| self.holds(compare)) {
            return Ok(Plan::Conflict);
        }
        for op in &txn.ops {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.leases.contains_key(lease)
            {
                return Err(MetaError::LeaseGone(*lease));
            }
        }
        let mut ops = txn.ops;
        ops.retain(|op| matches!(op, Op::Put { .. }) || self.entries.contains_key(op.key()));
        if ops.is_empty() {
            return Ok(Plan::Unchanged(self.revision));
        }
        Ok(Plan::Write(Record::Write { revision: self.revision.next(), ops }))
    }

    pub(super) fn plan_grant(&self, ttl_ms: u64) -> Record {
        Record::Grant { lease: LeaseId(self.last_lease.0 + 1), ttl_ms }
    }

    pub(super) fn plan_revoke(&self, lease: LeaseId) -> Result<Record, MetaError> {
        let held = self.leases.get(&lease).ok_or(MetaError::LeaseGone(lease))?;
        let revision = if held.keys.is_empty() { self.revision } else { self.revision.next() };
        Ok(Record::Revoke { lease, revision })
    }

    fn holds(&self, compare: &Compare) -> bool {
        let entry = self.entries.get(compare.key());
        match compare {
            Compare::Absent(_) => entry.is_none(),
            Compare::Exists(_) => entry.is_some(),
            Compare::Revision(_, revision) => entry.is_some_and(|entry| entry.mod_revision == *revision),
        }
    }

    /// Applies a committed record. On an error the state is not usable any more.
    pub(super) fn apply(&mut self, record: &Record) -> Result<(), Inconsistent> {
        match record {
            Record::Write { revision, ops } => self.apply_write(*revision, ops),
            Record::Grant { lease, ttl_ms } => self.apply_grant(*lease, *ttl_ms),
            Record::Revoke { lease, revision } => self.apply_revoke(*lease, *revision),
        }
    }

    fn apply_write(&mut self, revision: Revision, ops: &[Op]) -> Result<(), Inconsistent> {
        if revision != self.revision.next() || revision == self.revision {
            return Err(Inconsistent("revisions do not follow each other"));
        }
        let mut events = Vec::with_capacity(ops.len());
        for op in ops {
            events.push(self.apply_op(revision, op)?);
        }
        self.commit(revision, events);
        Ok(())
    }

    fn apply_op(&mut self, revision: Revision, op: &Op) -> Result<Event, Inconsistent> {
        let before = self.entries.get(op.key());
        if before.is_some_and(|entry| entry.mod_revision == revision) {
            return Err(Inconsistent("a key changes twice in one revision"));
        }
        if let Some(lease) = before.and_then(|entry| entry.lease)
            && let Some(lease) = self.leases.get_mut(&lease)
        {
            lease.keys.remove(op.key());
        }
        match op {
            Op::Put { key, value, lease } => {
                if let Some(lease) = lease {
                    let lease =
                        self.leases.get_mut(lease).ok_or(Inconsistent("a key of a lease that has ended"))?;
                    lease.keys.insert(key.clone());
                }
                let entry = Entry { value: value.clone(), mod_revision: revision, lease: *lease };
                let event = Event::Put(key_value(key, &entry));
                self.entries.insert(key.clone(), entry);
                Ok(event)
            }
            Op::Delete { key } => {
                self.entries.remove(key).ok_or(Inconsistent("deletion of a key that does not exist"))?;
                Ok(Event::Delete { key: key.clone(), revision })
            }
        }
    }

    fn apply_grant(&mut self, lease: LeaseId, ttl_ms: u64) -> Result<(), Inconsistent> {
        if lease <= self.last_lease || ttl_ms == 0 {
            return Err(Inconsistent("a lease is granted twice or without time"));
        }
        self.last_lease = lease;
        self.leases.insert(lease, Lease { ttl_ms, keys: BTreeSet::new() });
        Ok(())
    }

    fn apply_revoke(&mut self, lease: LeaseId, revision: Revision) -> Result<(), Inconsistent> {
        let ended = self.leases.remove(&lease).ok_or(Inconsistent("the end of a lease that is not there"))?;
        let expected = if ended.keys.is_empty() { self.revision } else { self.revision.next() };
        if revision != expected {
            return Err(Inconsistent("revisions do not follow each other"));
        }
        if ended.keys.is_empty() {
            return Ok(());
        }
        let mut events = Vec::with_capacity(ended.keys.len());
        for key in ended.keys {
            self.entries.remove(&key).ok_or(Inconsistent("a lease holds a key that does not exist"))?;
            events.push(Event::Delete { key, revision });
        }
        self.commit(revision, events);
        Ok(())
    }

    fn commit(&mut self, revision: Revision, events: Vec<Event>) {
        self.revision = revision;
        self.history_bytes = self.history_bytes.saturating_add(history_bytes(&events));
        self.history.push_back((revision, events.into()));
        while self.history_bytes > self.history_limit_bytes {
            let Some((oldest, _)) = self.history.front() else { break };
            self.compact(*oldest);
        }
    }

    /// Forgets the changes up to and including `through` (not beyond the current revision).
    pub(super) fn compact(&mut self, through: Revision) {
        let through = through.min(self.revision);
        while let Some((revision, events)) = self.history.front()
            && *revision <= through
        {
            self.history_bytes = self.history_bytes.saturating_sub(history_bytes(events));
            self.history.pop_front();
        }
        self.compacted = self.compacted.max(through);
    }

    /// Forgets all history and keeps none from now on: for a state that no watch reads.
    pub(super) fn without_history(mut self) -> Self {
        self.history_limit_bytes = 0;
        self.compact(self.revision);
        self
    }

    /// The changes of `prefix` since `from`, at most about `limit` of them.
    pub(super) fn changes(&self, prefix: &str, from: Revision, limit: usize) -> Changes {
        if from <= self.compacted {
            return Changes::Compacted(self.compacted);
        }
        let start = self.history.partition_point(|(revision, _)| *revision < from);
        let mut events = Vec::new();
        for (revision, changed) in self.history.iter().skip(start) {
            events.extend(changed.iter().filter(|event| event.key().starts_with(prefix)).cloned());
            if events.len() >= limit {
                return Changes::Events { events, next: revision.next() };
            }
        }
        Changes::Events { events, next: self.revision.next().max(from) }
    }
}

/// About what events take in memory.
fn history_bytes(events: &[Event]) -> usize {
    let bytes = |event: &Event| {
        let value_bytes = if let Event::Put(entry) = event { entry.value.len() } else { 0 };
        size_of::<Event>() + event.key().len() + value_bytes
    };
    events.iter().map(bytes).sum()
}

fn key_value(key: &str, entry: &Entry) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: entry.value.clone(),
        mod_revision: entry.mod_revision,
        lease: entry.lease,
    }
}
