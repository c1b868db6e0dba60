//! The state that readers and watches of an in-process store see.
//!
//! Readers take the lock for a copy and never wait for a disk. A watch is a cursor into the history, so that a slow
//! one costs no memory: it is told [`WatchEnd::Compacted`] when it falls behind what is kept.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use super::state::{Changes, Inconsistent, Record, State};
use super::{Event, Revision, Watch, WatchEnd};

/// Most events in one batch of a watch, but for a single larger revision.
const BATCH_EVENTS: usize = 1024;

pub(super) struct Published {
    inner: Mutex<Inner>,
    /// Counts changes of `inner`, so that watches wait without polling.
    changed: watch::Sender<u64>,
}

struct Inner {
    state: State,
    /// Watches opened before this count end with `end`.
    epoch: u64,
    end: Option<WatchEnd>,
    held: bool,
}

impl Published {
    pub(super) fn new(state: State) -> Arc<Self> {
        let inner = Inner { state, epoch: 0, end: None, held: false };
        Arc::new(Self { inner: Mutex::new(inner), changed: watch::Sender::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change under the lock is complete or the process is going down with the panic that broke it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.lock().state)
    }

    /// Applies records and wakes the watches.
    pub(super) fn apply(&self, records: &[Record]) -> Result<(), Inconsistent> {
        self.change(|state| records.iter().try_for_each(|record| state.apply(record)))
    }

    /// Changes the state and wakes the watches.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock().state);
        self.wake();
        result
    }

    /// Ends every open watch.
    pub(super) fn end_watches(&self, end: WatchEnd) {
        let mut inner = self.lock();
        inner.epoch += 1;
        inner.end = Some(end);
        drop(inner);
        self.wake();
    }

    /// While held, watches deliver nothing (they still end).
    pub(super) fn hold_watches(&self, held: bool) {
        self.lock().held = held;
        self.wake();
    }

    fn wake(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    pub(super) fn watch(self: &Arc<Self>, prefix: &str, from: Revision) -> Cursor {
        Cursor {
            changed: self.changed.subscribe(),
            epoch: self.lock().epoch,
            published: Arc::clone(self),
            prefix: prefix.to_owned(),
            next: from,
            end: None,
        }
    }

    /// How many watches are open.
    pub(super) fn open_watches(&self) -> usize {
        self.changed.receiver_count()
    }
}

/// An open watch.
pub(super) struct Cursor {
    published: Arc<Published>,
    changed: watch::Receiver<u64>,
    epoch: u64,
    prefix: String,
    next: Revision,
    end: Option<WatchEnd>,
}

impl Cursor {
    fn poll(&mut self) -> Result<Vec<Event>, WatchEnd> {
        self.changed.mark_unchanged();
        let inner = self.published.lock();
        if inner.epoch != self.epoch
            && let Some(end) = &inner.end
        {
            return Err(end.clone());
        }
        if inner.held {
            return Ok(Vec::new());
        }
        match inner.state.changes(&self.prefix, self.next, BATCH_EVENTS) {
            Changes::Compacted(compacted) => Err(WatchEnd::Compacted { compacted }),
            Changes::Events { events, next } => {
                self.next = next;
                Ok(events)
            }
        }
    }
}

#[async_trait]
impl Watch for Cursor {
    async fn next(&mut self) -> Result<Vec<Event>, WatchEnd> {
        loop {
            if let Some(end) = &self.end {
                return Err(end.clone());
            }
            match self.poll() {
                Ok(events) if events.is_empty() => {}
                Ok(events) => return Ok(events),
                Err(end) => {
                    self.end = Some(end);
                    continue;
                }
            }
            // The sender lives in `published`, which this cursor keeps alive.
            self.changed
                .changed()
                .await
                .map_err(|_| WatchEnd::Lost { reason: "the store is closed".into() })?;
        }
    }
}
