//! Cluster metadata: one small, revisioned key space that every node agrees on.
//!
//! Everything above (records, placement, the API) goes through the [`MetaStore`] trait: linearizable reads, watches
//! from a revision, compare-and-swap transactions and leases. Three implementations behave alike, and one test suite
//! holds them to it: [`etcd`] (a cluster), [`embedded`] (one node, a journal file), [`memory`] (tests and simulation).
//! [`reflector`] keeps a local copy of a prefix that survives every way in which a watch can end.
//!
//! Semantics, the same for all three:
//! - One revision counter per store. Each committed transaction that changes something takes the next revision; all
//!   its changes carry it. A transaction that changes nothing takes none.
//! - A key that a lease is attached to is deleted, in a revision of its own per lease, when the lease ends.
//! - A watch delivers every change of its range in order, from the given revision on, or ends with a reason. It never
//!   goes silent and never skips ([`WatchEnd`]).
//! - An error says whether the transaction can have been applied ([`MetaError::Unknown`]) or not.
//!
//! Losing the store stops changes, never running I/O: nothing here is on the data path.

pub mod embedded;
pub mod etcd;
mod lease_clock;
pub mod memory;
mod published;
pub mod reflector;
mod state;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use thiserror::Error;

/// Most operations, and most compares, that one transaction may carry (the limit of a stock etcd server).
pub const MAX_TXN_OPS: usize = 128;
/// Longest key in bytes.
pub const MAX_KEY_BYTES: usize = 1024;
/// Most bytes of keys and values in one transaction. A stock etcd server refuses requests above 1.5 MiB.
pub const MAX_TXN_BYTES: usize = 1024 * 1024;

/// A point in the history of a store. The first, of an empty store, is 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub i64);

impl Revision {
    /// The revision after this one: where to watch from after a list at `self`.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Name of a lease, given by the store and never reused. Positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// One key as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The whole key.
    pub key: String,
    /// Any bytes, possibly none.
    pub value: Vec<u8>,
    /// Revision of the last change: what [`Compare::Revision`] compares with.
    pub mod_revision: Revision,
    /// The lease whose end deletes the key.
    pub lease: Option<LeaseId>,
}

/// All keys of a prefix at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The store's revision at which `entries` is exact.
    pub revision: Revision,
    /// Sorted by key, in byte order.
    pub entries: Vec<KeyValue>,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key was created or replaced.
    Put(KeyValue),
    /// The key was deleted, by a transaction or by the end of its lease.
    Delete {
        /// The whole key.
        key: String,
        /// Revision of the deletion.
        revision: Revision,
    },
}

impl Event {
    /// The key that changed.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The revision of the change.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// A condition of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(String),
    /// The key exists.
    Exists(String),
    /// The key exists and was last changed at this revision (≥ 1).
    Revision(String, Revision),
}

impl Compare {
    /// The key that the condition is about.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Absent(key) | Self::Exists(key) | Self::Revision(key, _) => key,
        }
    }
}

/// A change within a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Creates or replaces the key, its value and its lease.
    Put {
        /// The whole key.
        key: String,
        /// Any bytes.
        value: Vec<u8>,
        /// The lease whose end deletes the key; `None` detaches it from any.
        lease: Option<LeaseId>,
    },
    /// Deletes the key; does nothing if there is none.
    Delete {
        /// The whole key.
        key: String,
    },
}

impl Op {
    /// The key that the operation changes.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// All of `ops` if all of `compares` hold, else nothing. A key occurs in at most one operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// Conditions, at most [`MAX_TXN_OPS`].
    pub compares: Vec<Compare>,
    /// Changes, at most [`MAX_TXN_OPS`], all at one revision.
    pub ops: Vec<Op>,
}

impl Txn {
    /// An empty transaction, to be filled by the methods below.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Adds the change of one key.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: None });
        self
    }

    /// Adds the change of one key that a lease ends.
    #[must_use]
    pub fn put_leased(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>, lease: LeaseId) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: Some(lease) });
        self
    }

    /// Adds the deletion of one key.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.ops.push(Op::Delete { key: key.into() });
        self
    }

    /// Changes that are each to be made under conditions of their own, in as few transactions as have room for them, with half of a
    /// transaction's bytes to spare. Where one of them conflicts, none of those with it is made.
    pub(crate) fn together(changes: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let (mut txns, mut txn, mut bytes) = (Vec::new(), Self::new(), 0);
        for change in changes {
            let added = change.value_bytes();
            let is_full = txn.compares.len() + change.compares.len() > MAX_TXN_OPS
                || txn.ops.len() + change.ops.len() > MAX_TXN_OPS
                || bytes + added > MAX_TXN_BYTES / 2;
            if is_full && !txn.ops.is_empty() {
                txns.push(std::mem::take(&mut txn));
                bytes = 0;
            }
            bytes += added;
            txn.compares.extend(change.compares);
            txn.ops.extend(change.ops);
        }
        if !txn.ops.is_empty() {
            txns.push(txn);
        }
        txns
    }

    fn value_bytes(&self) -> usize {
        let bytes = |op: &Op| if let Op::Put { value, .. } = op { value.len() } else { 0 };
        self.ops.iter().map(bytes).sum()
    }

    /// Checks the limits that hold for every store.
    ///
    /// # Errors
    /// [`MetaError::Invalid`] naming the limit.
    pub fn validate(&self) -> Result<(), MetaError> {
        for (what, count) in [("operations", self.ops.len()), ("compares", self.compares.len())] {
            if count > MAX_TXN_OPS {
                return Err(MetaError::Invalid(format!(
                    "{count} {what} in one transaction, at most {MAX_TXN_OPS}"
                )));
            }
        }
        let mut keys = std::collections::BTreeSet::new();
        let mut bytes = 0usize;
        for op in &self.ops {
            validate_key(op.key())?;
            if !keys.insert(op.key()) {
                return Err(MetaError::Invalid(format!("key {:?} twice in one transaction", op.key())));
            }
            let value_bytes = if let Op::Put { value, .. } = op { value.len() } else { 0 };
            bytes = bytes.saturating_add(op.key().len()).saturating_add(value_bytes);
        }
        for compare in &self.compares {
            validate_key(compare.key())?;
            if let Compare::Revision(key, Revision(..1)) = compare {
                return Err(MetaError::Invalid(format!("key {key:?} compared with a revision below 1")));
            }
            bytes = bytes.saturating_add(compare.key().len());
        }
        if bytes > MAX_TXN_BYTES {
            return Err(MetaError::Invalid(format!("transaction of {bytes} bytes, at most {MAX_TXN_BYTES}")));
        }
        Ok(())
    }
}

fn validate_key(key: &str) -> Result<(), MetaError> {
    match key.len() {
        0 => Err(MetaError::Invalid("empty key".into())),
        1..=MAX_KEY_BYTES => Ok(()),
        len => Err(MetaError::Invalid(format!("key of {len} bytes, at most {MAX_KEY_BYTES}"))),
    }
}

fn validate_ttl(ttl: Duration) -> Result<(), MetaError> {
    // The upper bound is what etcd accepts (9,000,000,000 s), far above any use.
    if ttl.is_zero() || ttl.as_secs() > 9_000_000_000 {
        return Err(MetaError::Invalid(format!("lease time of {ttl:?}")));
    }
    Ok(())
}

fn validate_watch_start(from: Revision) -> Result<(), MetaError> {
    if from.0 < 1 {
        return Err(MetaError::Invalid(format!("watch from revision {from}, the first is 1")));
    }
    Ok(())
}

/// What a transaction came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Applied and durable. The revision is that of the changes, or the store's current one if nothing changed.
    Committed(Revision),
    /// A condition did not hold; nothing was done.
    Conflict,
}

impl TxnOutcome {
    /// Whether the transaction was applied.
    #[must_use]
    pub fn committed(self) -> bool {
        matches!(self, Self::Committed(_))
    }
}

/// Why a request to the store failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MetaError {
    /// The store cannot be used now. Nothing was changed.
    #[error("metadata store unavailable: {0}")]
    Unavailable(String),
    /// The request may or may not have been applied, now or in a moment: read back before anything depends on it.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// The lease has ended, and with it the keys that it held; a new one is needed.
    #[error("lease {0} is gone")]
    LeaseGone(LeaseId),
    /// The request breaks a limit or a rule; it fails in the same way when repeated. Nothing was changed.
    #[error("invalid metadata request: {0}")]
    Invalid(String),
}

/// Why a watch ended. After any of these: list again, and watch from the revision after the list.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum WatchEnd {
    /// Changes that the watch has not delivered are no longer kept.
    #[error("history up to revision {compacted} is compacted")]
    Compacted {
        /// Changes up to and including this revision cannot be had.
        compacted: Revision,
    },
    /// The store ended the watch.
    #[error("cancelled by the store: {reason}")]
    Cancelled {
        /// The store's words.
        reason: String,
    },
    /// The connection, or the store, is gone.
    #[error("lost: {reason}")]
    Lost {
        /// What was seen.
        reason: String,
    },
}

/// A stream of changes.
#[async_trait]
pub trait Watch: Send {
    /// Waits for the next changes: at least one, in order of revision; all changes of one revision within the range
    /// come in one batch. Cancel safe: a dropped call loses nothing.
    ///
    /// # Errors
    /// [`WatchEnd`]; every later call fails too.
    async fn next(&mut self) -> Result<Vec<Event>, WatchEnd>;
}

/// The cluster's metadata. All calls may be made concurrently.
#[async_trait]
pub trait MetaStore: Send + Sync {
    /// Reads one key, linearizably.
    ///
    /// # Errors
    /// [`MetaError::Unavailable`], [`MetaError::Invalid`].
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, MetaError>;

    /// Reads all keys that start with `prefix` (any string; an empty one means every key), linearizably and at one
    /// revision.
    ///
    /// # Errors
    /// [`MetaError::Unavailable`].
    async fn list(&self, prefix: &str) -> Result<Snapshot, MetaError>;

    /// Watches all keys that start with `prefix`, from the changes of revision `from` (≥ 1) on. A `from` in the future
    /// is waited for; one that is no longer kept ends the watch with [`WatchEnd::Compacted`] at its first call.
    ///
    /// # Errors
    /// [`MetaError::Unavailable`], [`MetaError::Invalid`].
    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, MetaError>;

    /// Applies a transaction; durable when this returns [`TxnOutcome::Committed`].
    ///
    /// # Errors
    /// All of [`MetaError`]; [`MetaError::LeaseGone`] if a put names a lease that has ended.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, MetaError>;

    /// Creates a lease that ends `ttl` after its last renewal. A store may lengthen a short `ttl` (etcd: to about 2 s)
    /// and rounds it up to its own unit (etcd: seconds).
    ///
    /// # Errors
    /// [`MetaError::Unavailable`], [`MetaError::Invalid`]; [`MetaError::Unknown`] can leave a lease behind that nobody
    /// knows of and that ends by itself.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, MetaError>;

    /// Renews a lease and returns the time that it now has. Count it from the moment *before* the call.
    ///
    /// # Errors
    /// [`MetaError::LeaseGone`]; [`MetaError::Unavailable`]: not known to be renewed.
    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, MetaError>;

    /// Ends a lease and deletes its keys now.
    ///
    /// # Errors
    /// [`MetaError::LeaseGone`], [`MetaError::Unavailable`], [`MetaError::Unknown`].
    async fn revoke(&self, lease: LeaseId) -> Result<(), MetaError>;

    /// What tells this store from another one of the same kind (etcd's cluster id, the journal's id): for diagnostics
    /// only, since a restored backup keeps it.
    ///
    /// # Errors
    /// [`MetaError::Unavailable`].
    async fn identity(&self) -> Result<String, MetaError>;

    /// Where the metadata is, for people: "etcd at …", "embedded in …".
    fn describe(&self) -> String;
}
