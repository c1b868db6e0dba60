//! A local copy of a prefix of the metadata, kept current for as long as the store can be reached.
//!
//! List at a revision, publish all of it, watch from the revision after; on any error, cancellation or compaction wait
//! a little (jittered, growing) and list again. Nothing is patched together from two sources: a copy is a list plus
//! every change since, so it is always the exact content of the prefix at [`View::revision`].
//!
//! While the store cannot be reached the last copy stays, marked with since when; losing the store stops changes, never
//! running I/O. A copy that goes back in revision (a restored backup) says so in [`View::rewinds`].

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Event, KeyValue, MetaStore, Revision, Watch};

/// Batches taken together when a watch has several at once.
const MERGE_BATCHES: usize = 64;

/// The prefix as it was last known.
#[derive(Clone, Debug)]
pub struct View {
    /// The revision of `entries`: 0 before the first list.
    pub revision: Revision,
    /// Exactly the keys of the prefix at `revision`.
    pub entries: Arc<BTreeMap<String, KeyValue>>,
    /// Whether changes are being followed.
    pub connected: bool,
    /// When `connected` took its value.
    pub since: SystemTime,
    /// Why changes are not being followed.
    pub problem: Option<String>,
    /// How often the store came back at a lower revision than it had been seen at: it forgot something.
    pub rewinds: u64,
}

impl View {
    /// Whether the store was ever listed: before, the entries are empty because nothing is known.
    #[must_use]
    pub fn listed(&self) -> bool {
        self.revision > Revision(0)
    }
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

/// See the module. Dropping it stops following; views that were taken stay.
pub struct Reflector {
    views: watch::Receiver<View>,
    task: JoinHandle<()>,
}

impl Reflector {
    /// Starts following `prefix` in a task of the current tokio runtime.
    pub fn start(store: Arc<dyn MetaStore>, prefix: impl Into<String>, backoff: Backoff) -> Self {
        let view = View {
            revision: Revision(0),
            entries: Arc::default(),
            connected: false,
            since: SystemTime::now(),
            problem: None,
            rewinds: 0,
        };
        let (publish, views) = watch::channel(view);
        let follower = Follower { store, prefix: prefix.into(), backoff, publish };
        Self { views, task: tokio::spawn(follower.run()) }
    }

    /// The latest view.
    #[must_use]
    pub fn view(&self) -> View {
        self.views.borrow().clone()
    }

    /// A receiver of every coming view; views that nobody looked at in time are skipped.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<View> {
        self.views.clone()
    }

    /// Waits for a view at `revision` or later: to read what was just written. `None` after `limit`.
    pub async fn reach(&self, revision: Revision, limit: Duration) -> Option<View> {
        let mut views = self.subscribe();
        let reached = tokio::time::timeout(limit, views.wait_for(|view| view.revision >= revision)).await;
        reached.ok()?.ok().map(|view| view.clone())
    }
}

impl Drop for Reflector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Follower {
    store: Arc<dyn MetaStore>,
    prefix: String,
    backoff: Backoff,
    publish: watch::Sender<View>,
}

impl Follower {
    async fn run(self) {
        let mut wait = self.backoff.first;
        loop {
            let started = Instant::now();
            let problem = self.follow().await;
            self.disconnect(problem);
            if started.elapsed() > self.backoff.max {
                wait = self.backoff.first;
            }
            tokio::time::sleep(jittered(wait)).await;
            wait = wait.saturating_mul(2).min(self.backoff.max);
        }
    }

    /// Lists, then follows until something fails; what did.
    async fn follow(&self) -> String {
        let snapshot = match self.store.list(&self.prefix).await {
            Ok(snapshot) => snapshot,
            Err(error) => return error.to_string(),
        };
        let revision = snapshot.revision;
        let entries = snapshot.entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        self.replace(revision, entries);
        let mut watch = match self.store.watch(&self.prefix, revision.next()).await {
            Ok(watch) => watch,
            Err(error) => return error.to_string(),
        };
        self.connect();
        loop {
            let (events, end) = next_batches(watch.as_mut()).await;
            if let Err(problem) = self.apply(events) {
                return problem;
            }
            if let Some(problem) = end {
                return problem;
            }
        }
    }

    fn replace(&self, revision: Revision, entries: BTreeMap<String, KeyValue>) {
        self.publish.send_modify(|view| {
            if revision < view.revision {
                view.rewinds += 1;
                tracing::error!(seen = %view.revision, now = %revision, "the metadata store went back in time");
            }
            view.revision = revision;
            view.entries = Arc::new(entries);
        });
    }

    fn connect(&self) {
        tracing::info!(store = self.store.describe(), "following the metadata");
        self.publish.send_modify(|view| {
            view.connected = true;
            view.since = SystemTime::now();
            view.problem = None;
        });
    }

    fn disconnect(&self, problem: String) {
        // Once per problem, not per attempt.
        if self.publish.borrow().problem.as_ref() != Some(&problem) {
            tracing::warn!(
                store = self.store.describe(),
                problem,
                "not following the metadata; trying again"
            );
        }
        self.publish.send_modify(|view| {
            if view.connected {
                view.connected = false;
                view.since = SystemTime::now();
            }
            view.problem = Some(problem);
        });
    }

    /// Publishes a view with the events applied.
    fn apply(&self, events: Vec<Event>) -> Result<(), String> {
        let Some(last) = events.last().map(Event::revision) else { return Ok(()) };
        let (listed, mut entries) = {
            let view = self.publish.borrow();
            (view.revision, BTreeMap::clone(&view.entries))
        };
        let mut revision = listed;
        for event in events {
            if event.revision() <= listed || event.revision() < revision {
                return Err(format!("an event of revision {} came after {revision}", event.revision()));
            }
            revision = event.revision();
            match event {
                Event::Put(entry) => entries.insert(entry.key.clone(), entry),
                Event::Delete { key, .. } => entries.remove(&key),
            };
        }
        self.publish.send_modify(|view| {
            view.revision = last;
            view.entries = Arc::new(entries);
        });
        Ok(())
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
