//! One node at work: what it knows of the cluster, its session there, and the data plane's desired and observed state.
//!
//! Three loops, none of which waits for another: one turns the reflected metadata into one consistent view,
//! [`session`] keeps the lease with the node's sign of life and status, [`Follower`] publishes what the data plane is to do
//! and records what it has done. While the metadata store is away, or cannot be read, what was published last stays.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cluster_map::{
    ChangeAnswer, ClusterKey, ControlMap, Desired, Geometry, MapError, MapReader, NodeId, Observed,
};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use crate::aoe_changes::AoeChanges;
use crate::decisions::{self, Decisions, Outcome, Seen, Work};
use crate::known::{Knowledge, Known};
use crate::meta::reflector::{Backoff, Reflector};
use crate::meta::{LeaseId, MetaError, MetaStore, Revision, Txn, TxnOutcome};
use crate::model::{LiveRecord, NodeRecord, PREFIX, StatusRecord, View, encode, keys};
use crate::ops::{self, Plan, Refusal, RefusalKind};
use crate::reconcile::{self, Settings};
use crate::starts::StartsInMap;
use crate::supervise::{DataPlane, Wish};
use crate::takeover;

/// Lifetime of the node's lease.
const LEASE_TTL: Duration = Duration::from_secs(9);
/// How often it is renewed.
const LEASE_RENEWAL: Duration = Duration::from_secs(3);
/// Shortest time between two writes of the status.
const STATUS_INTERVAL: Duration = Duration::from_millis(300);
/// Longest time that the follower rests after a step.
const LONGEST_REST: Duration = Duration::from_millis(50);
/// Time before something that failed is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// How long an answer waits for the node to see what it has just changed.
const CATCH_UP: Duration = Duration::from_secs(3);
/// How often a change is planned on what is known before the store is listed.
const PLANS_ON_KNOWN: usize = 16;
/// How long what a change conflicted with may take to be known.
const CONFLICT_SEEN: Duration = Duration::from_millis(100);
/// A data plane that has not looked at the map for this long is reported.
const SILENT_AFTER: Duration = Duration::from_secs(5);
/// How long a restarted node waits for the metadata before it goes on with the state in the map.
const FALLBACK_AFTER: Duration = Duration::from_secs(3);

/// Seconds since 1970.
#[must_use]
pub fn unix_s(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Nanoseconds of the boot-time clock, the clock of the map's signs of life.
fn boot_time_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// A time as RFC 3339 in UTC, to the second.
#[must_use]
pub fn rfc3339(unix_s: u64) -> String {
    // Days to a date after Howard Hinnant, "chrono-compatible low-level date algorithms": years begin in March.
    let (days, second) = (unix_s / 86_400 + 719_468, unix_s % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// What the parts of a running node share.
pub struct Node {
    /// Its identity.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// When torusd started, seconds since 1970.
    pub started_unix_s: u64,
    /// The metadata.
    pub meta: Arc<dyn MetaStore>,
    known: watch::Receiver<Arc<Known>>,
    map: watch::Receiver<Option<MapReader>>,
    data_plane: watch::Receiver<DataPlane>,
    problems: Mutex<BTreeMap<&'static str, String>>,
    _reflector: Reflector,
}

impl Node {
    /// Starts reflecting the metadata. `map` and `data_plane` come from the follower and the supervisor.
    #[must_use]
    pub fn start(
        id: NodeId,
        name: String,
        meta: Arc<dyn MetaStore>,
        map: watch::Receiver<Option<MapReader>>,
        data_plane: watch::Receiver<DataPlane>,
    ) -> Arc<Self> {
        let (knowledge, known) = Knowledge::new();
        let reflector = Reflector::start(Arc::clone(&meta), PREFIX, Backoff::default(), knowledge);
        Arc::new(Self {
            id,
            name,
            started_unix_s: unix_s(SystemTime::now()),
            meta,
            known,
            map,
            data_plane,
            problems: Mutex::default(),
            _reflector: reflector,
        })
    }

    /// The cluster as known now.
    #[must_use]
    pub fn known(&self) -> Arc<Known> {
        Arc::clone(&self.known.borrow())
    }

    /// A receiver of every coming state of knowledge.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<Known>> {
        self.known.clone()
    }

    /// How the data plane is.
    #[must_use]
    pub fn data_plane(&self) -> DataPlane {
        self.data_plane.borrow().clone()
    }

    /// The shared map, once there is one.
    #[must_use]
    pub fn map(&self) -> Option<MapReader> {
        self.map.borrow().clone()
    }

    /// Says, or with an empty text no longer says, that something is wrong.
    pub fn set_problem(&self, of: &'static str, text: String) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        let before = if text.is_empty() { problems.remove(of) } else { problems.insert(of, text.clone()) };
        if !text.is_empty() && before.as_ref() != Some(&text) {
            tracing::error!("{text}");
        }
    }

    /// All that is wrong, or waited for.
    #[must_use]
    pub fn problem(&self) -> String {
        let known = self.known();
        let mut all: Vec<_> =
            self.problems.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        if !known.problem.is_empty() {
            all.push(known.problem.clone());
        }
        if known.listed() && known.view.cluster.is_none() {
            all.push("the cluster is not initialised: run `torusctl init` once".into());
        }
        if !known.listed() {
            all.push(format!("no answer yet from {}: keeps trying", self.meta.describe()));
        }
        all.join("; ")
    }

    /// Makes a change, and waits until this node sees it.
    ///
    /// # Errors
    /// As [`ops::apply`].
    pub async fn change<T>(&self, plan: impl FnMut(&View) -> Result<Plan<T>, Refusal>) -> Result<T, Refusal> {
        let known = self.known();
        if known.listed() && !known.problem.is_empty() {
            let hint = "nothing is changed until this is resolved; running I/O is not affected";
            return Err(Refusal::new(RefusalKind::Unavailable, "metadata_unusable", &known.problem, hint));
        }
        drop(known);
        let (answer, revision) = match self.commit(plan).await {
            Err(mut refusal) if refusal.kind == RefusalKind::Unavailable => {
                refusal.message = format!("{} (metadata {})", refusal.message, self.known().words());
                return Err(refusal);
            }
            done => done?,
        };
        let mut known = self.subscribe();
        let _ = tokio::time::timeout(CATCH_UP, known.wait_for(|known| known.revision >= revision)).await;
        Ok(answer)
    }

    /// Plans and commits, on what is known while that can be: what is committed is compared with the store anyway, and a
    /// conflict shows soon. What would be answered without a commit (a refusal, or that nothing is to be done) is decided
    /// on a fresh list.
    async fn commit<T>(
        &self,
        mut plan: impl FnMut(&View) -> Result<Plan<T>, Refusal>,
    ) -> Result<(T, Revision), Refusal> {
        for _ in 0..PLANS_ON_KNOWN {
            let known = self.known();
            let (planned, seen) = (plan(&known.view), known.revision);
            let (true, Ok(Plan::Commit(txn, answer))) = (known.usable() && known.connected, planned) else {
                break;
            };
            // A view that is waited with cannot be made into the next one.
            drop(known);
            match self.meta.txn(txn).await {
                Ok(TxnOutcome::Committed(revision)) => return Ok((answer, revision)),
                Ok(TxnOutcome::Conflict) => {
                    let mut known = self.subscribe();
                    let newer = known.wait_for(|known| known.revision > seen);
                    let _ = tokio::time::timeout(CONFLICT_SEEN, newer).await;
                }
                Err(error @ MetaError::Unknown(_)) => {
                    return ops::apply(self.meta.as_ref(), Some(error), plan).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        ops::apply(self.meta.as_ref(), None, plan).await
    }
}

/// Waits for the order to stop. That nobody can give it any more is none: torusd may be leaving its data plane running.
async fn told_to_stop(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// How the session of a node ended.
#[derive(Debug)]
pub enum SessionEnd {
    /// It was asked to end.
    Stopped,
    /// The cluster does not take the node in.
    Refused(Refusal),
}

/// Joins the cluster and keeps the node's lease, its `live` and its `status` record until `stop` turns true.
pub async fn session(
    node: Arc<Node>,
    record: NodeRecord,
    live: LiveRecord,
    mut status: watch::Receiver<StatusRecord>,
    mut stop: watch::Receiver<bool>,
) -> SessionEnd {
    let mut lease = None;
    let end = tokio::select! {
        refusal = keep_session(&node, &record, &live, &mut status, &mut lease) => SessionEnd::Refused(refusal),
        () = told_to_stop(&mut stop) => SessionEnd::Stopped,
    };
    if let Some(lease) = lease {
        let _ = tokio::time::timeout(Duration::from_secs(2), node.meta.revoke(lease)).await;
    }
    end
}

async fn keep_session(
    node: &Node,
    record: &NodeRecord,
    live: &LiveRecord,
    status: &mut watch::Receiver<StatusRecord>,
    lease: &mut Option<LeaseId>,
) -> Refusal {
    if let Err(refusal) = join(node, record).await {
        return refusal;
    }
    loop {
        let Ok(granted) = node.meta.grant(LEASE_TTL).await else {
            tokio::time::sleep(RETRY).await;
            continue;
        };
        *lease = Some(granted);
        let error = hold_lease(node, live, status, granted).await;
        tracing::warn!(%error, "the node's lease is gone: asking for a new one");
    }
}

/// Sees to it that the cluster has a key: one that was given to the node in a file, or else one in the metadata, which the
/// first node without a file makes.
pub async fn keep_key(node: Arc<Node>, given: Option<ClusterKey>) {
    let mut known = node.subscribe();
    loop {
        let made = {
            let ready =
                |known: &Arc<Known>| known.usable() && known.connected && known.view.cluster.is_some();
            let Ok(known) = known.wait_for(ready).await else { return };
            known.view.cluster_key.as_ref().map(|made| made.record.key)
        };
        match (given, made) {
            (Some(given), Some(made)) if given != made => {
                let text = "the cluster's key in the metadata, which nodes without --cluster-key-file use, is not the one in \
                            this node's file: give the same file to every node, or to none";
                node.set_problem("key", text.into());
            }
            (Some(_), _) | (None, Some(_)) => node.set_problem("key", String::new()),
            (None, None) => match fresh_key() {
                Some(key) => {
                    if node.change(|view| ops::make_key(view, key)).await.is_err() {
                        tokio::time::sleep(RETRY).await;
                    }
                    continue;
                }
                None => {
                    node.set_problem("key", "the kernel gives no random bytes for the cluster's key".into());
                }
            },
        }
        if known.changed().await.is_err() {
            return;
        }
    }
}

/// A random key.
fn fresh_key() -> Option<ClusterKey> {
    let mut key = [0; 32];
    let filled = rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty()).ok()?;
    Some(ClusterKey(key)).filter(|key| filled == key.0.len() && !key.is_nil())
}

/// Becomes a member as soon as there is a cluster; tries again for as long as that may help.
async fn join(node: &Node, record: &NodeRecord) -> Result<(), Refusal> {
    loop {
        let mut known = node.subscribe();
        let closed = known.wait_for(|known| known.connected && known.view.cluster.is_some()).await.is_err();
        if closed {
            std::future::pending::<()>().await;
        }
        match node.change(|view| ops::join(view, node.id, record)).await {
            Ok(_) => {
                node.set_problem("join", String::new());
                return Ok(());
            }
            // A member that is known already keeps serving; a new one is not let in.
            Err(refusal)
                if refusal.kind == RefusalKind::Conflict
                    && !node.known().view.nodes.contains_key(&node.id) =>
            {
                return Err(refusal);
            }
            Err(refusal) => node.set_problem("join", refusal.to_string()),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Renews the lease and writes the status when it changes; returns when the lease is gone.
async fn hold_lease(
    node: &Node,
    live: &LiveRecord,
    status: &mut watch::Receiver<StatusRecord>,
    lease: LeaseId,
) -> MetaError {
    let mut renewal = tokio::time::interval(LEASE_RENEWAL);
    renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut live_due = true;
    let mut next_status = Instant::now();
    loop {
        let write_due = live_due || status.has_changed().unwrap_or(false);
        let result = tokio::select! {
            _ = renewal.tick() => node.meta.keep_alive(lease).await.map(|_| ()),
            () = tokio::time::sleep_until(next_status), if write_due => {
                let record = status.borrow_and_update().clone();
                let mut txn = Txn::new().put_leased(keys::status(node.id), encode(&record), lease);
                if live_due {
                    txn = txn.put_leased(keys::live(node.id), encode(live), lease);
                }
                next_status = Instant::now() + STATUS_INTERVAL;
                let written = node.meta.txn(txn).await.map(|_| ());
                live_due &= written.is_err();
                if written.is_err() {
                    next_status = Instant::now() + RETRY;
                    live_due = true;
                }
                written
            }
            changed = status.changed(), if !write_due => {
                if changed.is_err() {
                    // Nobody reports any more: only the lease is kept.
                    std::future::pending::<()>().await;
                }
                status.mark_changed();
                Ok(())
            }
        };
        match result {
            Err(error @ MetaError::LeaseGone(_)) => return error,
            Err(error) => {
                tracing::warn!(%error, "cannot renew the node's session: keeps trying");
                tokio::time::sleep(RETRY).await;
            }
            Ok(()) => {}
        }
    }
}

/// What a follower tells the other parts of the node.
pub struct Links {
    /// The map, once there is one.
    pub announce_map: watch::Sender<Option<MapReader>>,
    /// The numbers of the data plane's starts.
    pub starts: StartsInMap,
    /// What is wanted of the supervisor.
    pub wish: watch::Sender<Wish>,
    /// The status for the session to write.
    pub status: watch::Sender<StatusRecord>,
}

/// Publishes the desired state and records what the data plane has done.
pub struct Follower {
    node: Arc<Node>,
    settings: Settings,
    map_path: PathBuf,
    map: Option<ControlMap>,
    announce_map: watch::Sender<Option<MapReader>>,
    /// The version that the data plane published last; a receiver is kept, or the watching thread would end.
    observed: (watch::Sender<u64>, watch::Receiver<u64>),
    starts: StartsInMap,
    wish: watch::Sender<Wish>,
    status: watch::Sender<StatusRecord>,
    /// The desired state in the map, once it has been read; nobody else writes it.
    published: Option<Arc<Desired>>,
    /// What the desired state was last made of; it is not made again of the same.
    made_of: Option<MadeOf>,
    /// The newest observed state.
    observation: Option<Arc<Observed>>,
    /// What the status was last made of: desired version, if the data plane runs, observed version, and how it is.
    reported: Option<(Option<u64>, Option<u64>, String)>,
    changes: AoeChanges,
    decisions: Decisions,
    started: Instant,
}

/// All that a desired state is made of.
#[derive(Debug, PartialEq, Eq)]
struct MadeOf {
    revision: Revision,
    answers: Vec<ChangeAnswer>,
    running: bool,
    /// Stores that were left out are looked for again every second.
    missing_since: Option<u64>,
}

impl Follower {
    /// A follower; `map` is the one found at start, if it is usable.
    #[must_use]
    pub fn new(
        node: Arc<Node>,
        settings: Settings,
        map_path: PathBuf,
        map: Option<ControlMap>,
        links: Links,
    ) -> Self {
        let Links { announce_map, starts, wish, status } = links;
        let changes = AoeChanges::new(Arc::clone(&node));
        let decisions = Decisions::new(node.id);
        let mut follower = Self {
            node,
            settings,
            map_path,
            map: None,
            announce_map,
            observed: watch::channel(0),
            starts,
            wish,
            status,
            published: None,
            made_of: None,
            observation: None,
            reported: None,
            changes,
            decisions,
            started: Instant::now(),
        };
        if let Some(map) = map {
            follower.use_map(map);
        }
        follower
    }

    /// Takes a map into use and starts a thread that wakes this loop when the data plane reports.
    fn use_map(&mut self, map: ControlMap) {
        let reader = map.reader().clone();
        let observed = self.observed.0.clone();
        self.announce_map.send_replace(Some(reader.clone()));
        self.map = Some(map);
        (self.published, self.observation, self.made_of) = (None, None, None);
        std::thread::spawn(move || {
            let mut seen = 0;
            while observed.receiver_count() > 0 {
                match reader.wait_observed(seen, Duration::from_millis(500)) {
                    Ok(version) if version != seen => {
                        seen = version;
                        observed.send_replace(version);
                    }
                    Ok(_) => {}
                    Err(_) => std::thread::sleep(RETRY),
                }
            }
        });
    }

    /// Runs until `stop` turns true; then the data plane is told to drain.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut known = self.node.subscribe();
        let mut observed = self.observed.1.clone();
        let mut starts = self.starts.subscribe();
        let mut data_plane = self.node.data_plane.clone();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // While a change waits for its outcome, what is read is published all the same, and starts get their numbers.
        let mut commit: Option<Commit> = None;
        loop {
            let begun = Instant::now();
            let retry = !self.step() || self.decisions.is_to_be_tried_again();
            if commit.is_none() {
                let next = self.decisions.begin();
                commit = next.map(|work| Box::pin(carry_out(Arc::clone(&self.node.meta), work)) as _);
            }
            // Where there is much to publish, changes are taken together, and half of a CPU at most goes into it.
            let rest = begun.elapsed().min(LONGEST_REST);
            tokio::select! {
                () = tokio::time::sleep(rest) => {}
                () = told_to_stop(&mut stop) => {
                    self.drain();
                    return;
                }
            }
            let is_idle = commit.is_none();
            let take_over_at = self.decisions.take_over_at().filter(|_| is_idle).map(|at| self.started + at);
            tokio::select! {
                (work, outcome) = outcome(&mut commit) => {
                    commit = None;
                    self.ended(&work, outcome);
                }
                _ = known.changed() => {}
                _ = observed.changed() => {}
                Ok(()) = starts.changed() => {}
                _ = data_plane.changed() => {}
                () = self.changes.decided() => {}
                () = told_to_stop(&mut stop) => {
                    self.drain();
                    return;
                }
                _ = tick.tick() => {}
                () = until(take_over_at) => {}
                () = tokio::time::sleep(RETRY), if retry => {}
            }
        }
    }

    /// Publishes, reports, decides; false if something failed and is to be tried again.
    fn step(&mut self) -> bool {
        self.beat();
        let known = self.node.known();
        let observed = self.observe();
        if let Some(observed) = &observed {
            self.changes.keep_asked(&observed.changes);
        }
        let published = match self.number_start().and_then(|()| self.publish(&known)) {
            Ok(()) => {
                self.node.set_problem("map", String::new());
                true
            }
            Err(error) => {
                self.node.set_problem("map", error.to_string());
                false
            }
        };
        if let Some(observed) = &observed {
            self.changes.begin(&observed.changes, &known);
        }
        self.report(observed.as_deref());
        let seen = Seen {
            view: &known.view,
            revision: known.revision,
            is_followed: known.usable() && known.connected && published,
            published: self.published.as_deref().filter(|published| published.version > 0),
            observed: observed.as_deref(),
            is_silent: self.silent(observed.as_deref()),
        };
        self.decisions.look(&seen, self.started.elapsed(), unix_s(SystemTime::now()));
        published
    }

    /// Takes what became of a change.
    fn ended(&mut self, work: &Work, outcome: Result<Outcome, MetaError>) {
        match (work, &outcome) {
            (Work::TakeOver(batch), Ok(Outcome::Committed(_))) => {
                let volumes = batch.volumes().count();
                tracing::info!(from = %batch.head(), volumes, "this node is head now: the former one is silent");
            }
            (Work::TakeOver(batch), Err(error)) => {
                tracing::warn!(%error, from = %batch.head(), "cannot replace a silent head: keeps trying");
            }
            (Work::Renew(_), Err(error)) => {
                tracing::warn!(%error, "cannot take this node's heads over anew, as is due after a loss of the map: keeps trying");
            }
            (Work::Move(_), Err(error)) => {
                tracing::warn!(%error, "cannot name the successor of a head: it goes on by itself");
            }
            (Work::Change(_), Err(error)) => {
                tracing::warn!(%error, "cannot record what the data plane has done: keeps trying");
            }
            (_, Ok(_)) => {}
        }
        self.decisions.ended(work, outcome.unwrap_or(Outcome::Failed), self.started.elapsed());
    }

    /// What the running data plane says, if one runs and has said anything.
    fn observe(&mut self) -> Option<Arc<Observed>> {
        let map = self.map.as_ref()?;
        let version = map.reader().observed_version();
        if self.observation.as_ref().is_none_or(|observation| observation.version != version) {
            self.observation = map.observed().ok().map(Arc::new);
        }
        let pid = self.node.data_plane().pid()?;
        self.observation.clone().filter(|observation| observation.pid == pid)
    }

    /// The desired state in the map; its answers are gone on from.
    fn in_map(&mut self) -> Result<Option<Arc<Desired>>, MapError> {
        if let (None, Some(map)) = (&self.published, &self.map) {
            let desired = map.desired()?;
            self.changes.adopt(&desired.answers);
            self.starts.is_in_map(desired.start);
            self.published = Some(Arc::new(desired));
        }
        Ok(self.published.clone())
    }

    /// Puts a desired state into the map.
    fn put(&mut self, mut desired: Desired) -> Result<(), MapError> {
        let Some(map) = self.map.as_mut() else { return Ok(()) };
        let version = map.publish(&mut desired)?;
        self.changes.published(&desired.answers);
        self.starts.is_in_map(desired.start);
        // An initiator that changes settings all the time must not fill the log.
        tracing::debug!(
            version,
            volumes = desired.volumes.len(),
            exports = desired.exports.len(),
            "published the desired state"
        );
        self.published = Some(Arc::new(desired));
        Ok(())
    }

    fn beat(&self) {
        if let Some(map) = &self.map {
            map.beat(boot_time_ns());
        }
    }

    /// Whether the data plane runs but has not looked at the map for long.
    fn silent(&self, observed: Option<&Observed>) -> bool {
        if observed.is_none() {
            return false;
        }
        let Some(map) = self.map.as_ref() else { return false };
        let limit = u64::try_from(SILENT_AFTER.as_nanos()).unwrap_or(u64::MAX);
        boot_time_ns().saturating_sub(map.data_plane_alive_ns()) > limit
    }

    fn running(&self) -> bool {
        self.node.data_plane().pid().is_some()
    }

    /// Puts the number into the map that the next start of a data plane waits for: with metadata or without.
    fn number_start(&mut self) -> Result<(), MapError> {
        let wanted = self.starts.wanted();
        match self.in_map()? {
            Some(before) if before.version > 0 && before.start < wanted => {
                self.put(Desired { start: wanted, ..Desired::clone(&before) })
            }
            _ => Ok(()),
        }
    }

    /// Puts the desired state into the map if it differs from what is there, and has the data plane started.
    fn publish(&mut self, known: &Known) -> Result<(), MapError> {
        if !known.usable() {
            return self.fall_back();
        }
        let Some(cluster) = known.view.cluster.as_ref().map(|cluster| cluster.record.id) else {
            return Ok(());
        };
        if !known.view.nodes.contains_key(&self.node.id) {
            return Ok(());
        }
        let cores = cores_of_map(&self.settings);
        let running = self.running();
        let unfit =
            |map: &ControlMap| map.reader().cluster() != cluster || map.reader().cores() < usize::from(cores);
        if self.map.as_ref().is_some_and(unfit) && !running {
            self.map = None;
        }
        if self.map.is_none() {
            let geometry = Geometry::new(cores, cluster, self.node.id);
            let map = ControlMap::create(&self.map_path, &geometry)?;
            self.use_map(map);
        }
        let Some(before) = self.in_map()? else { return Ok(()) };
        if !self.decisions.may_publish(&known.view, Some(&*before).filter(|before| before.version > 0)) {
            return Ok(());
        }
        let answers = self.changes.answers(known);
        let mut made_of = MadeOf { revision: known.revision, answers, running, missing_since: None };
        let missing = self.made_of.as_ref().is_some_and(|made_of| made_of.missing_since.is_some());
        if missing {
            made_of.missing_since = Some(self.started.elapsed().as_secs());
        }
        if self.made_of.as_ref() != Some(&made_of)
            && let Some(mut desired) = reconcile::desired(&known.view, self.node.id, &self.settings)
        {
            desired.answers.clone_from(&made_of.answers);
            desired.version = before.version;
            desired.start = before.start.max(self.starts.wanted());
            let missing = leave_out_missing(&mut desired, &before, &self.settings, running);
            made_of.missing_since = (!missing.is_empty()).then(|| self.started.elapsed().as_secs());
            self.node.set_problem("stores", missing);
            if before.version == 0 || *before != desired {
                self.put(desired)?;
            }
            self.made_of = Some(made_of);
        }
        self.wish.send_if_modified(|wish| std::mem::replace(wish, Wish::Run) != Wish::Run);
        Ok(())
    }

    /// Without metadata: what was published last in this boot is kept, and served again if no data plane runs.
    fn fall_back(&mut self) -> Result<(), MapError> {
        let due = self.started.elapsed() >= FALLBACK_AFTER && *self.wish.borrow() == Wish::Watch;
        let running = self.running();
        if !due || self.map.is_none() {
            return Ok(());
        }
        if !running {
            let mut desired = match self.in_map()? {
                Some(desired) if desired.version > 0 => Desired::clone(&desired),
                _ => return Ok(()),
            };
            tracing::warn!("no metadata yet: serving the state that was published last");
            desired.cores.clone_from(&self.settings.cores);
            desired.interfaces.clone_from(&self.settings.interfaces);
            desired.link = self.settings.link;
            desired.steering = self.settings.steering;
            desired.drain = false;
            self.put(desired)?;
        }
        self.wish.send_replace(Wish::Run);
        Ok(())
    }

    /// Hands the status to the session, if it has changed.
    fn report(&mut self, observed: Option<&Observed>) {
        let mut words = self.node.data_plane().words();
        if self.silent(observed) {
            words.push_str(", but gives no sign of life");
        }
        let published = self.published.clone();
        let running = published.as_ref().zip(observed);
        let observed_version = self.observation.as_ref().map(|observation| observation.version);
        let made_of = (running.map(|(desired, _)| desired.version), observed_version, words);
        if self.reported.as_ref() == Some(&made_of) {
            return;
        }
        let observation = self.observation.as_deref();
        let status = decisions::status(published.as_deref(), observation, running.is_some(), &made_of.2);
        self.reported = Some(made_of);
        self.status.send_if_modified(|now| {
            let changed = *now != status;
            *now = status;
            changed
        });
    }

    fn drain(&mut self) {
        match self.in_map() {
            Ok(Some(desired)) if desired.version > 0 => {
                let drained = self.put(Desired { drain: true, ..Desired::clone(&desired) });
                if let Err(error) = drained {
                    tracing::error!(%error, "cannot tell the data plane to drain");
                }
            }
            Ok(_) => {}
            Err(error) => tracing::error!(%error, "cannot tell the data plane to drain"),
        }
        self.wish.send_replace(Wish::Drain);
    }
}

/// Something is being committed.
type Commit = Pin<Box<dyn Future<Output = (Work, Result<Outcome, MetaError>)> + Send>>;

/// Carries out what was decided.
async fn carry_out(meta: Arc<dyn MetaStore>, work: Work) -> (Work, Result<Outcome, MetaError>) {
    let outcome = match &work {
        Work::TakeOver(batch) => takeover::commit(meta.as_ref(), batch)
            .await
            .map(|made| made.map_or(Outcome::Conflict, Outcome::Committed)),
        Work::Move(txn) | Work::Renew(txn) | Work::Change(txn) => {
            meta.txn(txn.clone()).await.map(|outcome| match outcome {
                TxnOutcome::Committed(revision) => Outcome::Committed(revision),
                TxnOutcome::Conflict => Outcome::Conflict,
            })
        }
    };
    (work, outcome)
}

/// Waits for what is being carried out, if anything is.
async fn outcome<F: Future + Unpin>(commit: &mut Option<F>) -> F::Output {
    match commit {
        Some(commit) => commit.await,
        None => std::future::pending().await,
    }
}

/// Waits for a time, if there is one.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Leaves out stores that were added while the node ran and are gone now: they must not keep it from starting. Says which.
fn leave_out_missing(desired: &mut Desired, before: &Desired, settings: &Settings, running: bool) -> String {
    let missing =
        |path: &str| std::fs::metadata(path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound);
    let mut left_out = Vec::new();
    desired.stores.retain(|store| {
        let path = &store.path;
        let in_use = running && before.stores.iter().any(|b| b.path == *path);
        let keep = in_use || store.size_bytes > 0 || settings.named_stores.contains(path) || !missing(path);
        if !keep {
            left_out.push(path.clone());
        }
        keep
    });
    match left_out.first() {
        None => String::new(),
        Some(first) => format!(
            "missing store(s): {}; bring them back and restart torusd, or remove them with `torusctl store remove {first}`",
            left_out.join(", ")
        ),
    }
}

/// Cores that the map has room for: all of the machine, so that another `--cores` needs no new map.
fn cores_of_map(settings: &Settings) -> u16 {
    let present = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(present.max(settings.cores.len()).max(1)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_utc() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(1_795_342_380), "2026-11-22T10:13:00Z");
        assert_eq!(rfc3339(4_107_542_399), "2100-02-28T23:59:59Z");
        assert_eq!(rfc3339(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
