//! The metadata store in memory: deterministic, with faults on demand, for tests and simulation.
//!
//! Time is virtual: leases end only when [`MemoryStore::advance`] is called. Clones share one store.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use super::lease_clock::LeaseClock;
use super::published::Published;
use super::state::{Inconsistent, Plan, Record, State};
use super::{
    KeyValue, LeaseId, MetaError, MetaStore, Revision, Snapshot, Txn, TxnOutcome, Watch, WatchEnd,
    validate_key, validate_ttl, validate_watch_start,
};

/// What happens to a transaction instead of its normal course.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxnFault {
    /// Refused before it reached the store: [`MetaError::Unavailable`].
    Unavailable,
    /// The request was lost: [`MetaError::Unknown`], not applied.
    RequestLost,
    /// The answer was lost: [`MetaError::Unknown`], applied if its conditions held.
    AnswerLost,
}

/// A copy of everything in a store, as an operator's backup is.
#[derive(Clone, Debug)]
pub struct Backup(State);

/// See the module.
#[derive(Clone)]
pub struct MemoryStore {
    published: Arc<Published>,
    control: Arc<Mutex<Control>>,
}

#[derive(Default)]
struct Control {
    clock: LeaseClock,
    now_ms: u64,
    down: bool,
    txn_faults: VecDeque<TxnFault>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self { published: Published::new(State::new(usize::MAX)), control: Arc::default() }
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets time pass; the leases that end do so in the order of their deadlines.
    pub fn advance(&self, by: Duration) {
        let mut control = self.control();
        let by_ms = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        control.now_ms = control.now_ms.saturating_add(by_ms);
        for lease in control.clock.expired(control.now_ms) {
            control.clock.stop(lease);
            self.end_lease(lease).expect("the clock holds exactly the leases of the state");
        }
    }

    /// The virtual time since the store was made.
    #[must_use]
    pub fn now(&self) -> Duration {
        Duration::from_millis(self.control().now_ms)
    }

    /// Takes the store away (every call fails with [`MetaError::Unavailable`], every watch is lost) or gives it back.
    /// Time goes on, and so do leases.
    pub fn set_available(&self, available: bool) {
        self.control().down = !available;
        if !available {
            self.published.end_watches(WatchEnd::Lost { reason: "injected fault".into() });
        }
    }

    /// Queues a fault for one coming transaction; several are taken in order.
    pub fn fail_txn(&self, fault: TxnFault) {
        self.control().txn_faults.push_back(fault);
    }

    /// Forgets the history up to and including `through`.
    pub fn compact(&self, through: Revision) {
        self.published.change(|state| state.compact(through));
    }

    /// Ends every open watch.
    pub fn end_watches(&self, end: WatchEnd) {
        self.published.end_watches(end);
    }

    /// While held, open watches deliver nothing, as behind a slow network.
    pub fn hold_watches(&self, held: bool) {
        self.published.hold_watches(held);
    }

    /// How many watches are open.
    #[must_use]
    pub fn open_watches(&self) -> usize {
        self.published.open_watches()
    }

    /// Copies everything.
    #[must_use]
    pub fn backup(&self) -> Backup {
        Backup(self.published.read(State::clone))
    }

    /// Goes back to a backup, as an operator does: revisions go backwards, watches are lost, leases start anew.
    pub fn restore(&self, backup: &Backup) {
        let mut control = self.control();
        control.clock = LeaseClock::default();
        for (lease, ttl_ms) in backup.0.leases() {
            let now_ms = control.now_ms;
            control.clock.start(lease, ttl_ms, now_ms);
        }
        self.published.change(|state| *state = backup.0.clone());
        self.published.end_watches(WatchEnd::Lost { reason: "restored from a backup".into() });
    }

    fn reachable(&self) -> Result<(), MetaError> {
        if self.control().down {
            return Err(MetaError::Unavailable("injected fault".into()));
        }
        Ok(())
    }

    fn end_lease(&self, lease: LeaseId) -> Result<(), MetaError> {
        self.published.change(|state| {
            let record = state.plan_revoke(lease)?;
            commit(state, &record);
            Ok(())
        })
    }

    fn apply(&self, txn: Txn) -> Result<TxnOutcome, MetaError> {
        self.published.change(|state| match state.plan(txn)? {
            Plan::Conflict => Ok(TxnOutcome::Conflict),
            Plan::Unchanged(revision) => Ok(TxnOutcome::Committed(revision)),
            Plan::Write(record) => {
                commit(state, &record);
                Ok(TxnOutcome::Committed(state.revision()))
            }
        })
    }
}

fn commit(state: &mut State, record: &Record) {
    let applied: Result<(), Inconsistent> = state.apply(record);
    applied.expect("a record planned on this very state applies to it");
}

#[async_trait]
impl MetaStore for MemoryStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, MetaError> {
        validate_key(key)?;
        self.reachable()?;
        Ok(self.published.read(|state| state.get(key)))
    }

    async fn list(&self, prefix: &str) -> Result<Snapshot, MetaError> {
        self.reachable()?;
        Ok(self.published.read(|state| state.list(prefix)))
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, MetaError> {
        validate_watch_start(from)?;
        self.reachable()?;
        Ok(Box::new(self.published.watch(prefix, from)))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, MetaError> {
        txn.validate()?;
        self.reachable()?;
        let fault = self.control().txn_faults.pop_front();
        match fault {
            None => self.apply(txn),
            Some(TxnFault::Unavailable) => Err(MetaError::Unavailable("injected fault".into())),
            Some(TxnFault::RequestLost) => Err(MetaError::Unknown("injected fault".into())),
            Some(TxnFault::AnswerLost) => {
                // Whatever it came to, the caller does not learn it.
                let _ = self.apply(txn);
                Err(MetaError::Unknown("injected fault".into()))
            }
        }
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, MetaError> {
        validate_ttl(ttl)?;
        self.reachable()?;
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
        let lease = self.published.change(|state| {
            let record = state.plan_grant(ttl_ms);
            commit(state, &record);
            state.last_lease()
        });
        let mut control = self.control();
        let now_ms = control.now_ms;
        control.clock.start(lease, ttl_ms, now_ms);
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, MetaError> {
        self.reachable()?;
        let mut control = self.control();
        let now_ms = control.now_ms;
        control.clock.renew(lease, now_ms).map(Duration::from_millis).ok_or(MetaError::LeaseGone(lease))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), MetaError> {
        self.reachable()?;
        self.control().clock.stop(lease);
        self.end_lease(lease)
    }

    async fn identity(&self) -> Result<String, MetaError> {
        self.reachable()?;
        Ok("memory".into())
    }

    fn describe(&self) -> String {
        "in memory".into()
    }
}
