//! Follows a prefix of the metadata for as long as the store can be reached.
//!
//! List at a revision, watch from the revision after; on any error, cancellation or compaction wait a little (jittered,
//! growing) and list again. Nothing is patched together from two sources: whoever follows is told a whole list, then every
//! change since, so that what it makes of them is always the exact content of the prefix at a revision.
//!
//! While the store cannot be reached nothing is told but that; losing the store stops changes, never running I/O. A list
//! of a lower revision than before (a restored backup) is told like any other: whoever follows is to look at it.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Event, KeyValue, MetaStore, Revision, Watch};

/// Batches taken together when a watch has several at once.
const MERGE_BATCHES: usize = 64;

/// Whoever follows a prefix. It is told one thing after another and must not block.
pub trait Follow: Send + 'static {
    /// All keys of the prefix at a revision, instead of everything told before.
    fn listed(&mut self, revision: Revision, entries: Vec<KeyValue>);

    /// All changes after what was told before, up to and including a revision.
    fn changed(&mut self, revision: Revision, events: Vec<Event>);

    /// Changes are being followed from now on.
    fn connected(&mut self);

    /// Changes are not being followed, and why; told again for every attempt that fails.
    fn disconnected(&mut self, problem: &str);
}

/// How soon the store is tried again.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// After the first failure; doubled with each one.
    pub first: Duration,
    /// At most.
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_millis(50), max: Duration::from_secs(2) }
    }
}

/// See the module. Dropping it stops following.
pub struct Reflector {
    task: JoinHandle<()>,
}

impl Reflector {
    /// Starts following `prefix` in a task of the current tokio runtime.
    pub fn start(
        store: Arc<dyn MetaStore>,
        prefix: impl Into<String>,
        backoff: Backoff,
        follow: impl Follow,
    ) -> Self {
        let reflection = Reflection { store, prefix: prefix.into(), backoff, follow, problem: None };
        Self { task: tokio::spawn(reflection.run()) }
    }
}

impl Drop for Reflector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Reflection<F> {
    store: Arc<dyn MetaStore>,
    prefix: String,
    backoff: Backoff,
    follow: F,
    /// What was said last to be wrong.
    problem: Option<String>,
}

impl<F: Follow> Reflection<F> {
    async fn run(mut self) {
        let mut wait = self.backoff.first;
        loop {
            let started = Instant::now();
            let problem = self.follow().await;
            self.follow.disconnected(&problem);
            // Once per problem, not per attempt.
            if self.problem.as_ref() != Some(&problem) {
                tracing::warn!(
                    store = self.store.describe(),
                    problem,
                    "not following the metadata; trying again"
                );
                self.problem = Some(problem);
            }
            if started.elapsed() > self.backoff.max {
                wait = self.backoff.first;
            }
            tokio::time::sleep(jittered(wait)).await;
            wait = wait.saturating_mul(2).min(self.backoff.max);
        }
    }

    /// Lists, then follows until something fails; what did.
    async fn follow(&mut self) -> String {
        let snapshot = match self.store.list(&self.prefix).await {
            Ok(snapshot) => snapshot,
            Err(error) => return error.to_string(),
        };
        let mut revision = snapshot.revision;
        self.follow.listed(revision, snapshot.entries);
        let mut watch = match self.store.watch(&self.prefix, revision.next()).await {
            Ok(watch) => watch,
            Err(error) => return error.to_string(),
        };
        tracing::info!(store = self.store.describe(), "following the metadata");
        self.problem = None;
        self.follow.connected();
        loop {
            let (events, end) = next_batches(watch.as_mut()).await;
            if let Some(last) = events.last().map(Event::revision) {
                let mut before = revision.next();
                for event in &events {
                    if event.revision() < before {
                        return format!("an event of revision {} came after {revision}", event.revision());
                    }
                    before = event.revision();
                }
                revision = last;
                self.follow.changed(revision, events);
            }
            if let Some(problem) = end {
                return problem;
            }
        }
    }
}

/// Waits for a batch, takes those that are there already too, and tells if the watch ended behind them.
async fn next_batches(watch: &mut dyn Watch) -> (Vec<Event>, Option<String>) {
    let mut events = match watch.next().await {
        Ok(events) => events,
        Err(end) => return (Vec::new(), Some(end.to_string())),
    };
    for _ in 1..MERGE_BATCHES {
        tokio::select! {
            biased;
            more = watch.next() => match more {
                Ok(more) => events.extend(more),
                Err(end) => return (events, Some(end.to_string())),
            },
            () = std::future::ready(()) => break,
        }
    }
    (events, None)
}

/// A random time between half of `wait` and all of it, so that the nodes of a cluster do not return in step.
fn jittered(wait: Duration) -> Duration {
    let half = wait / 2;
    let span_ns = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX).max(1);
    half + Duration::from_nanos(RandomState::new().hash_one(0u8) % span_ns)
}
