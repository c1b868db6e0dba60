//! The reflector converges through everything that a store does to it, and what it tells makes exact views.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rustix::process::Signal;
use tokio::sync::watch;
use torus_control::meta::etcd::EtcdStore;
use torus_control::meta::memory::MemoryStore;
use torus_control::meta::reflector::{self, Backoff, Follow};
use torus_control::meta::{
    Event, KeyValue, LeaseId, MetaError, MetaStore, Revision, Snapshot, Txn, TxnOutcome, Watch, WatchEnd,
};

use crate::etcd_server::EtcdCluster;
use crate::{PATIENCE, Random};

const QUICK: Backoff = Backoff { first: Duration::from_millis(1), max: Duration::from_millis(10) };

/// What the prefix is, as made of all that was told.
#[derive(Clone, Debug)]
struct View {
    revision: Revision,
    entries: BTreeMap<String, KeyValue>,
    connected: bool,
    /// When `connected` took its value.
    since: SystemTime,
    problem: Option<String>,
    /// How often a list was of a lower revision than what was told before.
    rewinds: u64,
}

impl View {
    fn listed(&self) -> bool {
        self.revision > Revision(0)
    }
}

struct Copier(watch::Sender<View>);

impl Follow for Copier {
    fn listed(&mut self, revision: Revision, entries: Vec<KeyValue>) {
        self.0.send_modify(|view| {
            view.rewinds += u64::from(revision < view.revision);
            view.revision = revision;
            view.entries = entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        });
    }

    fn changed(&mut self, revision: Revision, events: Vec<Event>) {
        self.0.send_modify(|view| {
            view.revision = revision;
            for event in events {
                match event {
                    Event::Put(entry) => view.entries.insert(entry.key.clone(), entry),
                    Event::Delete { key, .. } => view.entries.remove(&key),
                };
            }
        });
    }

    fn connected(&mut self) {
        self.0.send_modify(|view| {
            (view.connected, view.since, view.problem) = (true, SystemTime::now(), None);
        });
    }

    fn disconnected(&mut self, problem: &str) {
        self.0.send_modify(|view| {
            if std::mem::replace(&mut view.connected, false) {
                view.since = SystemTime::now();
            }
            view.problem = Some(problem.to_owned());
        });
    }
}

/// A reflector with a copy of what it follows.
struct Reflector {
    views: watch::Receiver<View>,
    _reflector: reflector::Reflector,
}

impl Reflector {
    fn start(store: Arc<dyn MetaStore>, prefix: &str, backoff: Backoff) -> Self {
        let view = View {
            revision: Revision(0),
            entries: BTreeMap::new(),
            connected: false,
            since: SystemTime::now(),
            problem: None,
            rewinds: 0,
        };
        let (publish, views) = watch::channel(view);
        Self { views, _reflector: reflector::Reflector::start(store, prefix, backoff, Copier(publish)) }
    }

    fn view(&self) -> View {
        self.views.borrow().clone()
    }

    fn subscribe(&self) -> watch::Receiver<View> {
        self.views.clone()
    }

    async fn reach(&self, revision: Revision, limit: Duration) -> Option<View> {
        let mut views = self.subscribe();
        let reached = tokio::time::timeout(limit, views.wait_for(|view| view.revision >= revision)).await;
        reached.ok()?.ok().map(|view| view.clone())
    }
}

fn follow(store: &(impl MetaStore + Clone + 'static)) -> Reflector {
    Reflector::start(Arc::new(store.clone()), "r/", QUICK)
}

async fn put(store: &dyn MetaStore, key: &str, value: &str) -> Revision {
    match store.txn(Txn::new().put(key, value)).await.unwrap() {
        TxnOutcome::Committed(revision) => revision,
        TxnOutcome::Conflict => panic!("no conditions"),
    }
}

async fn wait(reflector: &Reflector, what: &str, wanted: impl FnMut(&View) -> bool) -> View {
    let mut views = reflector.subscribe();
    let reached = tokio::time::timeout(PATIENCE, views.wait_for(wanted)).await;
    match reached {
        Ok(view) => view.unwrap().clone(),
        Err(_) => panic!("not {what}: {:?}", reflector.view()),
    }
}

async fn connected(reflector: &Reflector) -> View {
    wait(reflector, "connected", |view| view.connected).await
}

async fn disconnected(reflector: &Reflector) -> View {
    wait(reflector, "disconnected", |view| !view.connected).await
}

/// Waits for the view that is what the store holds now.
async fn converged(reflector: &Reflector, store: &dyn MetaStore) -> View {
    let Snapshot { entries, .. } = store.list("r/").await.unwrap();
    wait(reflector, "converged", |view| view.connected && view.entries.values().eq(&entries)).await
}

#[tokio::test]
async fn changes_are_followed() {
    let store = MemoryStore::new();
    put(&store, "r/1", "old").await;
    put(&store, "other", "").await;
    let reflector = follow(&store);
    assert!(!reflector.view().listed());
    let view = connected(&reflector).await;
    assert!(view.listed() && view.problem.is_none());
    assert_eq!(view.revision, Revision(3));
    assert_eq!(view.entries.keys().collect::<Vec<_>>(), ["r/1"]);
    put(&store, "r/1", "new").await;
    let last = put(&store, "r/2", "").await;
    let view = reflector.reach(last, PATIENCE).await.unwrap();
    assert_eq!(view.entries["r/1"].value, b"new");
    store.txn(Txn::new().delete("r/1")).await.unwrap();
    let view = reflector.reach(last.next(), PATIENCE).await.unwrap();
    assert_eq!(view.entries.keys().collect::<Vec<_>>(), ["r/2"]);
    assert_eq!(reflector.reach(Revision(100), Duration::from_millis(20)).await.map(drop), None);
    drop(reflector);
    let gone = async {
        while store.open_watches() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("a dropped reflector closes its watch");
}

#[tokio::test]
async fn a_store_that_is_away_at_the_start_is_waited_for() {
    let store = MemoryStore::new();
    put(&store, "r/1", "").await;
    store.set_available(false);
    let reflector = follow(&store);
    let view = wait(&reflector, "failed", |view| view.problem.is_some()).await;
    assert!(!view.listed() && !view.connected && view.entries.is_empty());
    assert!(view.problem.unwrap().contains("unavailable"));
    store.set_available(true);
    converged(&reflector, &store).await;
}

#[tokio::test]
async fn the_last_view_stays_while_the_store_is_away() {
    let store = MemoryStore::new();
    let before = put(&store, "r/1", "").await;
    let reflector = follow(&store);
    connected(&reflector).await;
    let went = SystemTime::now();
    store.set_available(false);
    let view = disconnected(&reflector).await;
    assert_eq!((view.revision, view.entries.len()), (before, 1));
    assert!(view.since >= went && view.problem.is_some());
    tokio::time::sleep(Duration::from_millis(50)).await;
    let later = reflector.view();
    assert_eq!(later.since, view.since, "failed attempts do not move the time of the loss");
    store.set_available(true);
    let view = converged(&reflector, &store).await;
    assert!(view.since > later.since && view.problem.is_none() && view.rewinds == 0);
}

#[tokio::test]
async fn ended_watches_are_opened_again() {
    let store = MemoryStore::new();
    let reflector = follow(&store);
    for (index, end) in [
        WatchEnd::Cancelled { reason: "test".into() },
        WatchEnd::Lost { reason: "test".into() },
        WatchEnd::Compacted { compacted: Revision(1) },
    ]
    .into_iter()
    .enumerate()
    {
        connected(&reflector).await;
        store.hold_watches(true);
        put(&store, "r/1", &index.to_string()).await;
        store.end_watches(end);
        store.hold_watches(false);
        let view = converged(&reflector, &store).await;
        assert_eq!(view.entries["r/1"].value, index.to_string().as_bytes());
    }
}

#[tokio::test]
async fn a_slow_watch_that_is_compacted_is_listed_again() {
    let store = MemoryStore::new();
    let reflector = follow(&store);
    connected(&reflector).await;
    store.hold_watches(true);
    for key in ["r/1", "r/2", "r/3"] {
        put(&store, key, "").await;
    }
    let last = store.txn(Txn::new().delete("r/1")).await.unwrap();
    assert!(last.committed());
    store.compact(Revision(5));
    store.hold_watches(false);
    let view = converged(&reflector, &store).await;
    assert_eq!(view.entries.keys().collect::<Vec<_>>(), ["r/2", "r/3"]);
}

#[tokio::test]
async fn a_store_that_went_back_in_time_is_told() {
    let store = MemoryStore::new();
    put(&store, "r/1", "old").await;
    let backup = store.backup();
    put(&store, "r/1", "new").await;
    let reflector = follow(&store);
    connected(&reflector).await;
    store.restore(&backup);
    let view = wait(&reflector, "rewound", |view| view.rewinds == 1).await;
    assert_eq!((view.revision, view.entries["r/1"].value.as_slice()), (Revision(2), b"old".as_slice()));
    put(&store, "r/2", "").await;
    assert_eq!(converged(&reflector, &store).await.rewinds, 1);
}

/// Random changes and faults; every view must be the exact content at its revision, and revisions must not go back.
#[tokio::test]
async fn every_view_is_exact_through_random_faults() {
    let store = MemoryStore::new();
    let history: Arc<Mutex<BTreeMap<Revision, Vec<KeyValue>>>> = Arc::default();
    history.lock().unwrap().insert(Revision(1), Vec::new());
    let reflector = follow(&store);
    let checker = tokio::spawn(check_views(reflector.subscribe(), Arc::clone(&history)));
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for _ in 0..2000 {
        match random.below(40) {
            0 => store.set_available(false),
            1..=4 => store.set_available(true),
            5 => store.end_watches(WatchEnd::Cancelled { reason: "test".into() }),
            6 => store.hold_watches(true),
            7..=9 => store.hold_watches(false),
            10 => store.compact(Revision(random.below(1000) as i64)),
            _ => change(&store, &mut random, &history).await,
        }
        if random.below(4) == 0 {
            tokio::time::sleep(Duration::from_millis(random.below(4))).await;
        }
    }
    store.set_available(true);
    store.hold_watches(false);
    converged(&reflector, &store).await;
    drop(reflector);
    let views = checker.await.unwrap();
    assert!(views > 100, "only {views} views were seen");
}

async fn change(
    store: &MemoryStore,
    random: &mut Random,
    history: &Mutex<BTreeMap<Revision, Vec<KeyValue>>>,
) {
    let mut txn = Txn::new();
    for key in 0..3 {
        let key = format!("r/{}", key * 4 + random.below(4));
        txn = if random.below(3) == 0 { txn.delete(key) } else { txn.put(key, random.0.to_le_bytes()) };
    }
    // The checker may look only after this: nothing else runs between the change and its record.
    if store.txn(txn).await.is_ok() {
        let snapshot = store.list("r/").await.unwrap();
        history.lock().unwrap().insert(snapshot.revision, snapshot.entries);
    }
}

async fn check_views(
    mut views: watch::Receiver<View>,
    history: Arc<Mutex<BTreeMap<Revision, Vec<KeyValue>>>>,
) -> usize {
    let mut seen = 0;
    let mut last = Revision(0);
    while views.changed().await.is_ok() {
        let view = views.borrow_and_update().clone();
        if view.listed() {
            let history = history.lock().unwrap();
            let expected = history.get(&view.revision).expect("a view of a revision that was");
            assert!(view.entries.values().eq(expected), "the view at {} is wrong", view.revision);
            assert!(view.revision >= last, "went from {last} to {}", view.revision);
            last = view.revision;
            seen += 1;
        }
    }
    seen
}

#[tokio::test]
async fn a_killed_etcd_is_followed_again() {
    let mut cluster = EtcdCluster::start(1).await;
    let store = Arc::new(cluster.store().await);
    put(store.as_ref(), "r/1", "").await;
    let reflector = Reflector::start(store.clone(), "r/", QUICK);
    for round in 0..2 {
        connected(&reflector).await;
        cluster.kill(0);
        assert_eq!(disconnected(&reflector).await.entries.len(), round + 1);
        cluster.restart(0);
        until_put(store.as_ref(), &format!("r/after-{round}")).await;
        converged(&reflector, store.as_ref()).await;
    }
}

#[tokio::test]
async fn a_hung_etcd_is_noticed_and_followed_again() {
    let cluster = EtcdCluster::start(1).await;
    let store = Arc::new(cluster.store().await);
    put(store.as_ref(), "r/1", "").await;
    let reflector = Reflector::start(store.clone(), "r/", QUICK);
    connected(&reflector).await;
    cluster.signal(0, Signal::STOP);
    assert_eq!(disconnected(&reflector).await.entries.len(), 1);
    cluster.signal(0, Signal::CONT);
    until_put(store.as_ref(), "r/2").await;
    converged(&reflector, store.as_ref()).await;
}

#[tokio::test]
async fn another_member_is_followed() {
    let mut cluster = EtcdCluster::start(3).await;
    let store = Arc::new(cluster.store().await);
    put(store.as_ref(), "r/1", "").await;
    let reflector = Reflector::start(store.clone(), "r/", QUICK);
    connected(&reflector).await;
    cluster.kill(0);
    until_put(store.as_ref(), "r/2").await;
    converged(&reflector, store.as_ref()).await;
}

async fn until_put(store: &dyn MetaStore, key: &str) {
    let put = async {
        while store.txn(Txn::new().put(key, "")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, put).await.expect("etcd comes back");
}

#[tokio::test]
async fn an_etcd_that_compacts_between_list_and_watch_is_listed_again() {
    let cluster = EtcdCluster::start(1).await;
    let store = Arc::new(cluster.store().await);
    put(store.as_ref(), "r/1", "").await;
    let racing = Arc::new(Racing { store: store.clone(), cluster, watches: AtomicUsize::new(0) });
    let reflector = Reflector::start(racing.clone(), "r/", QUICK);
    let view = wait(&reflector, "through", |view| view.connected && view.entries.len() == 1 + RACES).await;
    assert!(!view.entries.contains_key("r/1"), "the deletion of a compacted revision was missed");
    assert!(racing.watches.load(Ordering::Relaxed) > RACES);
    put(store.as_ref(), "r/last", "").await;
    converged(&reflector, store.as_ref()).await;
}

const RACES: usize = 3;

/// An etcd that changes and compacts just before its first watches start.
struct Racing {
    store: Arc<EtcdStore>,
    cluster: EtcdCluster,
    watches: AtomicUsize,
}

#[async_trait]
impl MetaStore for Racing {
    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, MetaError> {
        let race = self.watches.fetch_add(1, Ordering::Relaxed);
        if race < RACES {
            let deleted = self.store.txn(Txn::new().delete("r/1").put(format!("r/race-{race}"), "")).await?;
            let TxnOutcome::Committed(deleted) = deleted else { panic!("no conditions") };
            put(self.store.as_ref(), "r/again", "").await;
            self.cluster.compact(deleted.0).await;
        }
        self.store.watch(prefix, from).await
    }

    async fn get(&self, key: &str) -> Result<Option<KeyValue>, MetaError> {
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Snapshot, MetaError> {
        self.store.list(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, MetaError> {
        self.store.txn(txn).await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, MetaError> {
        self.store.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, MetaError> {
        self.store.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), MetaError> {
        self.store.revoke(lease).await
    }

    async fn identity(&self) -> Result<String, MetaError> {
        self.store.identity().await
    }

    fn describe(&self) -> String {
        self.store.describe()
    }
}
