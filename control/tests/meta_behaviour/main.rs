//! What every metadata store does: one set of functions, run against all three implementations. The etcd one is a real
//! server, one per test.
#![expect(clippy::unwrap_used, reason = "a test fails by panic")]
#![expect(clippy::cast_possible_truncation, reason = "small numbers")]

mod etcd_server;
mod outage;
mod reflector;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_server::EtcdCluster;
use tempfile::TempDir;
use torus_control::meta::embedded::EmbeddedStore;
use torus_control::meta::memory::MemoryStore;
use torus_control::meta::{
    Compare, Event, KeyValue, LeaseId, MAX_KEY_BYTES, MAX_TXN_BYTES, MAX_TXN_OPS, MetaError, MetaStore, Op,
    Revision, Snapshot, Txn, TxnOutcome, Watch, WatchEnd,
};

/// A lease time that all stores take as it is.
const TTL: Duration = Duration::from_secs(2);
/// Longer than a store takes to end a lease, far beyond its time.
const PATIENCE: Duration = Duration::from_secs(20);

/// A store and what the tests need around it.
struct Rig {
    store: Arc<dyn MetaStore>,
    kind: Kind,
}

enum Kind {
    Memory(MemoryStore),
    Embedded(Arc<EmbeddedStore>, #[expect(dead_code, reason = "held for its end")] TempDir),
    Etcd(EtcdCluster),
}

impl Rig {
    async fn memory() -> Self {
        let store = MemoryStore::new();
        Self { store: Arc::new(store.clone()), kind: Kind::Memory(store) }
    }

    async fn embedded() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(EmbeddedStore::open(dir.path().join("meta")).await.unwrap());
        Self { store: store.clone(), kind: Kind::Embedded(store, dir) }
    }

    async fn etcd() -> Self {
        let cluster = EtcdCluster::start(1).await;
        Self { store: Arc::new(cluster.store().await), kind: Kind::Etcd(cluster) }
    }

    /// Lets time pass for leases.
    async fn pass(&self, time: Duration) {
        match &self.kind {
            Kind::Memory(store) => store.advance(time),
            _ => tokio::time::sleep(time).await,
        }
    }

    /// Lets time pass until the key is gone.
    async fn pass_until_gone(&self, key: &str) {
        let started = Instant::now();
        while self.store.get(key).await.unwrap().is_some() {
            assert!(started.elapsed() < PATIENCE, "{key} is still there");
            self.pass(Duration::from_millis(100)).await;
        }
    }

    async fn compact(&self, through: Revision) {
        match &self.kind {
            Kind::Memory(store) => store.compact(through),
            Kind::Embedded(store, _) => store.compact(through),
            Kind::Etcd(cluster) => cluster.compact(through.0).await,
        }
    }

    async fn commit(&self, txn: Txn) -> Revision {
        match self.store.txn(txn).await.unwrap() {
            TxnOutcome::Committed(revision) => revision,
            TxnOutcome::Conflict => panic!("an unconditional transaction in conflict"),
        }
    }

    async fn put(&self, key: &str, value: &str) -> Revision {
        self.commit(Txn::new().put(key, value)).await
    }

    async fn value(&self, key: &str) -> Option<String> {
        self.store.get(key).await.unwrap().map(|entry| String::from_utf8(entry.value).unwrap())
    }

    async fn keys(&self, prefix: &str) -> Vec<String> {
        self.store.list(prefix).await.unwrap().entries.into_iter().map(|entry| entry.key).collect()
    }
}

async fn next(watch: &mut Box<dyn Watch>) -> Vec<Event> {
    tokio::time::timeout(PATIENCE, watch.next()).await.expect("an event comes").expect("the watch goes on")
}

async fn end(watch: &mut Box<dyn Watch>) -> WatchEnd {
    tokio::time::timeout(PATIENCE, watch.next()).await.expect("the end comes").expect_err("the watch ends")
}

async fn assert_silent(watch: &mut Box<dyn Watch>) {
    let waited = tokio::time::timeout(Duration::from_millis(300), watch.next()).await;
    assert!(waited.is_err(), "expected nothing, got {waited:?}");
}

fn put_event(key: &str, value: &str, revision: Revision) -> Event {
    Event::Put(KeyValue { key: key.into(), value: value.into(), mod_revision: revision, lease: None })
}

fn delete_event(key: &str, revision: Revision) -> Event {
    Event::Delete { key: key.into(), revision }
}

fn is_invalid<T: std::fmt::Debug>(result: &Result<T, MetaError>) -> bool {
    matches!(result, Err(MetaError::Invalid(_)))
}

macro_rules! behaviours {
    ($($name:ident),* $(,)?) => {
        behaviours!(@store memory, $($name)*);
        behaviours!(@store embedded, $($name)*);
        behaviours!(@store etcd, $($name)*);
    };
    (@store $store:ident, $($name:ident)*) => {
        mod $store {
            $(
                #[tokio::test]
                async fn $name() {
                    super::$name(super::Rig::$store().await).await;
                }
            )*
        }
    };
}

behaviours![
    values_are_any_bytes,
    absent_keys_read_as_none,
    compare_and_swap,
    a_conflict_does_nothing,
    a_transaction_has_one_revision,
    a_transaction_without_effect_has_no_revision,
    limits_are_refused,
    the_largest_transaction_is_taken,
    concurrent_increments_all_count,
    prefixes_are_strings_and_keys_are_exact,
    long_lists_are_exact,
    a_list_and_its_watch_give_every_state,
    a_watch_replays_from_an_old_revision,
    a_watch_of_the_future_waits,
    a_dropped_wait_loses_no_event,
    a_watch_sees_only_its_prefix,
    a_compacted_start_ends_the_watch,
    a_deletion_at_the_compacted_revision_is_not_skipped,
    an_ended_lease_deletes_its_keys,
    a_renewed_lease_lives_on,
    a_put_moves_a_key_between_leases,
    a_revoked_lease_is_gone,
    a_lease_that_is_gone_cannot_hold_keys,
    the_store_names_itself,
    random_transactions_match_the_model,
];

async fn values_are_any_bytes(rig: Rig) {
    let all: Vec<u8> = (0..=255).collect();
    for value in [Vec::new(), vec![0], all] {
        let revision = rig.commit(Txn::new().put("k/é\n", value.clone())).await;
        let entry = rig.store.get("k/é\n").await.unwrap().unwrap();
        assert_eq!(entry, KeyValue { key: "k/é\n".into(), value, mod_revision: revision, lease: None });
        assert_eq!(rig.store.list("k/").await.unwrap(), Snapshot { revision, entries: vec![entry] });
    }
}

async fn absent_keys_read_as_none(rig: Rig) {
    assert_eq!(rig.store.get("nothing").await.unwrap(), None);
    let empty = rig.store.list("nothing").await.unwrap();
    assert_eq!(empty, Snapshot { revision: Revision(1), entries: vec![] });
    assert!(is_invalid(&rig.store.get("").await));
}

async fn compare_and_swap(rig: Rig) {
    let create = Txn::new().when(Compare::Absent("k".into())).put("k", "1");
    let TxnOutcome::Committed(first) = rig.store.txn(create.clone()).await.unwrap() else {
        panic!("not created")
    };
    assert_eq!(rig.store.txn(create).await.unwrap(), TxnOutcome::Conflict);
    let swap = |revision| Txn::new().when(Compare::Revision("k".into(), revision)).put("k", "2");
    let TxnOutcome::Committed(second) = rig.store.txn(swap(first)).await.unwrap() else {
        panic!("not swapped")
    };
    assert!(second > first);
    assert_eq!(rig.store.txn(swap(first)).await.unwrap(), TxnOutcome::Conflict);
    assert_eq!(rig.store.txn(swap(second.next())).await.unwrap(), TxnOutcome::Conflict);
    let touch = |key: &str| Txn::new().when(Compare::Exists(key.into())).put("touched", "");
    assert!(rig.store.txn(touch("k")).await.unwrap().committed());
    assert_eq!(rig.store.txn(touch("other")).await.unwrap(), TxnOutcome::Conflict);
    let of_absent = Txn::new().when(Compare::Revision("other".into(), second)).put("other", "");
    assert_eq!(rig.store.txn(of_absent).await.unwrap(), TxnOutcome::Conflict);
    let never = Txn::new().when(Compare::Revision("other".into(), Revision(0))).put("other", "");
    assert!(is_invalid(&rig.store.txn(never).await), "revision 0 would mean an absent key in etcd");
    assert_eq!(rig.value("k").await.as_deref(), Some("2"));
}

async fn a_conflict_does_nothing(rig: Rig) {
    let revision = rig.put("a", "1").await;
    let txn = Txn::new()
        .when(Compare::Exists("a".into()))
        .when(Compare::Exists("missing".into()))
        .put("b", "1")
        .delete("a");
    assert_eq!(rig.store.txn(txn).await.unwrap(), TxnOutcome::Conflict);
    assert_eq!(rig.keys("").await, ["a"]);
    assert_eq!(rig.store.list("").await.unwrap().revision, revision);
}

async fn a_transaction_has_one_revision(rig: Rig) {
    let before = rig.put("b", "old").await;
    let mut watch = rig.store.watch("", before.next()).await.unwrap();
    let revision = rig.commit(Txn::new().put("c", "3").delete("b").put("a", "1")).await;
    assert_eq!(revision, before.next());
    let mut events = next(&mut watch).await;
    events.sort_by(|one, other| one.key().cmp(other.key()));
    let expected =
        [put_event("a", "1", revision), delete_event("b", revision), put_event("c", "3", revision)];
    assert_eq!(events, expected);
    assert_eq!(rig.store.list("").await.unwrap().revision, revision);
}

async fn a_transaction_without_effect_has_no_revision(rig: Rig) {
    let revision = rig.put("a", "1").await;
    assert_eq!(rig.commit(Txn::new()).await, revision);
    assert_eq!(rig.commit(Txn::new().when(Compare::Exists("a".into()))).await, revision);
    assert_eq!(rig.commit(Txn::new().delete("absent")).await, revision);
    assert_eq!(rig.commit(Txn::new().delete("absent").put("b", "")).await, revision.next());
}

async fn limits_are_refused(rig: Rig) {
    let many = |count: usize| (0..count).fold(Txn::new(), |txn, index| txn.put(format!("k{index}"), ""));
    let compares = |count: usize| {
        (0..count).fold(Txn::new().put("x", ""), |txn, index| txn.when(Compare::Absent(format!("c{index}"))))
    };
    for refused in [
        many(MAX_TXN_OPS + 1),
        compares(MAX_TXN_OPS + 1),
        Txn::new().put("k", "1").put("k", "2"),
        Txn::new().put("k", "1").delete("k"),
        Txn::new().put("", "1"),
        Txn::new().delete(""),
        Txn::new().when(Compare::Absent(String::new())),
        Txn::new().put("k".repeat(MAX_KEY_BYTES + 1), ""),
        Txn::new().put("k", vec![0; MAX_TXN_BYTES]),
    ] {
        assert!(is_invalid(&rig.store.txn(refused).await));
    }
    assert!(is_invalid(&rig.store.watch("", Revision(0)).await.map(drop)));
    assert!(is_invalid(&rig.store.grant(Duration::ZERO).await));
    assert_eq!(rig.store.list("").await.unwrap(), Snapshot { revision: Revision(1), entries: vec![] });
}

async fn the_largest_transaction_is_taken(rig: Rig) {
    let key = |index: usize| format!("{index:0>width$}", width = MAX_KEY_BYTES);
    let value_bytes = MAX_TXN_BYTES / MAX_TXN_OPS - 2 * MAX_KEY_BYTES;
    let txn = (0..MAX_TXN_OPS).fold(Txn::new(), |txn, index| {
        txn.when(Compare::Absent(key(index))).put(key(index), vec![index as u8; value_bytes])
    });
    let revision = rig.commit(txn).await;
    let entries = rig.store.list("").await.unwrap().entries;
    assert_eq!(entries.len(), MAX_TXN_OPS);
    for (index, entry) in entries.into_iter().enumerate() {
        assert_eq!((entry.key, entry.mod_revision), (key(index), revision));
        assert_eq!(entry.value, vec![index as u8; value_bytes]);
    }
    let mut watch = rig.store.watch("", revision).await.unwrap();
    assert_eq!(next(&mut watch).await.len(), MAX_TXN_OPS, "a revision comes in one batch");
}

async fn concurrent_increments_all_count(rig: Rig) {
    const TASKS: u64 = 8;
    const EACH: u64 = 25;
    rig.put("count", "0").await;
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let store = Arc::clone(&rig.store);
            tokio::spawn(async move {
                for _ in 0..EACH {
                    increment(store.as_ref()).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(rig.value("count").await, Some((TASKS * EACH).to_string()));
    assert_eq!(rig.store.list("").await.unwrap().revision, Revision(2 + (TASKS * EACH) as i64));
}

async fn increment(store: &dyn MetaStore) {
    loop {
        let entry = store.get("count").await.unwrap().unwrap();
        let count: u64 = String::from_utf8(entry.value).unwrap().parse().unwrap();
        let unchanged = Compare::Revision("count".into(), entry.mod_revision);
        let txn = Txn::new().when(unchanged).put("count", (count + 1).to_string());
        if store.txn(txn).await.unwrap().committed() {
            return;
        }
    }
}

async fn prefixes_are_strings_and_keys_are_exact(rig: Rig) {
    for key in ["a", "a/", "a/1", "a/10", "a/2", "a0", "b", "\u{10ffff}x"] {
        rig.put(key, key).await;
    }
    assert_eq!(rig.keys("a/").await, ["a/", "a/1", "a/10", "a/2"]);
    assert_eq!(rig.keys("a/1").await, ["a/1", "a/10"]);
    assert_eq!(rig.keys("a").await, ["a", "a/", "a/1", "a/10", "a/2", "a0"]);
    assert_eq!(rig.keys("").await, ["a", "a/", "a/1", "a/10", "a/2", "a0", "b", "\u{10ffff}x"]);
    assert_eq!(rig.keys("\u{10ffff}").await, ["\u{10ffff}x"]);
    assert_eq!(rig.keys("c").await, [""; 0]);
    assert_eq!(rig.value("a/1").await.as_deref(), Some("a/1"));
    rig.commit(Txn::new().delete("a/1")).await;
    assert_eq!(rig.value("a/1").await, None);
    assert_eq!(rig.keys("a/").await, ["a/", "a/10", "a/2"]);
}

async fn long_lists_are_exact(rig: Rig) {
    // More than a page of the etcd implementation, twice.
    let keys: Vec<_> = (0..2500).map(|index| format!("long/{index:05}")).collect();
    for chunk in keys.chunks(MAX_TXN_OPS) {
        rig.commit(chunk.iter().fold(Txn::new(), |txn, key| txn.put(key.as_str(), key.as_bytes()))).await;
    }
    rig.put("longer", "").await;
    assert_eq!(rig.keys("long/").await, keys);
}

async fn a_list_and_its_watch_give_every_state(rig: Rig) {
    let writer = tokio::spawn({
        let store = Arc::clone(&rig.store);
        async move {
            for round in 0..120u32 {
                let txn = Txn::new()
                    .put(format!("w/{}", round % 7), round.to_string())
                    .put(format!("w/{}", 10 + round % 11), round.to_string())
                    .delete(format!("w/{}", 10 + (round + 5) % 11));
                assert!(store.txn(txn).await.unwrap().committed());
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let Snapshot { revision, entries } = rig.store.list("w/").await.unwrap();
    let mut state: BTreeMap<_, _> = entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
    let mut watch = rig.store.watch("w/", revision.next()).await.unwrap();
    let mut at = revision;
    while at < Revision(121) {
        for event in next(&mut watch).await {
            assert!(event.revision() >= at && event.revision() <= at.next(), "a revision was skipped");
            at = event.revision();
            match event {
                Event::Put(entry) => drop(state.insert(entry.key.clone(), entry)),
                Event::Delete { key, .. } => {
                    assert!(state.remove(&key).is_some(), "deletion of a key that is not there");
                }
            }
        }
    }
    writer.await.unwrap();
    let entries = rig.store.list("w/").await.unwrap().entries;
    assert_eq!(state.into_values().collect::<Vec<_>>(), entries);
}

async fn a_watch_replays_from_an_old_revision(rig: Rig) {
    let first = rig.put("k", "1").await;
    let second = rig.commit(Txn::new().delete("k")).await;
    let third = rig.put("k", "3").await;
    let expected = [put_event("k", "1", first), delete_event("k", second), put_event("k", "3", third)];
    for skip in 0..3 {
        let mut watch = rig.store.watch("k", expected[skip].revision()).await.unwrap();
        let mut events = Vec::new();
        while events.len() < 3 - skip {
            events.extend(next(&mut watch).await);
        }
        assert_eq!(events, expected[skip..]);
        assert_silent(&mut watch).await;
    }
}

async fn a_watch_of_the_future_waits(rig: Rig) {
    let now = rig.put("k", "1").await;
    let mut watch = rig.store.watch("k", Revision(now.0 + 2)).await.unwrap();
    rig.put("k", "2").await;
    assert_silent(&mut watch).await;
    let third = rig.put("k", "3").await;
    assert_eq!(next(&mut watch).await, [put_event("k", "3", third)]);
}

async fn a_dropped_wait_loses_no_event(rig: Rig) {
    let mut watch = rig.store.watch("k", Revision(1)).await.unwrap();
    let writer = tokio::spawn({
        let store = Arc::clone(&rig.store);
        async move {
            for value in 0..50 {
                store.txn(Txn::new().put("k", value.to_string())).await.unwrap();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    });
    let mut revisions = Vec::new();
    let started = Instant::now();
    while revisions.len() < 50 {
        assert!(started.elapsed() < PATIENCE, "events were lost: {revisions:?}");
        if let Ok(events) = tokio::time::timeout(Duration::from_millis(1), watch.next()).await {
            revisions.extend(events.unwrap().iter().map(|event| event.revision().0));
        }
    }
    writer.await.unwrap();
    assert_eq!(revisions, (2..52).collect::<Vec<_>>());
}

async fn a_watch_sees_only_its_prefix(rig: Rig) {
    let mut watch = rig.store.watch("a/1", Revision(1)).await.unwrap();
    let mut everything = rig.store.watch("", Revision(1)).await.unwrap();
    rig.put("a/", "").await;
    rig.put("a/2", "").await;
    rig.put("a", "").await;
    let inside = rig.put("a/10", "x").await;
    assert_eq!(next(&mut watch).await, [put_event("a/10", "x", inside)]);
    let mut seen = Vec::new();
    while seen.len() < 4 {
        seen.extend(next(&mut everything).await.iter().map(|event| event.key().to_owned()));
    }
    assert_eq!(seen, ["a/", "a/2", "a", "a/10"]);
}

async fn a_compacted_start_ends_the_watch(rig: Rig) {
    for value in 0..10 {
        rig.put("k", &value.to_string()).await;
    }
    let mut open = rig.store.watch("k", Revision(1)).await.unwrap();
    let mut replayed = 0;
    while replayed < 10 {
        replayed += next(&mut open).await.len();
    }
    rig.compact(Revision(6)).await;
    for from in [1, 5, 6] {
        let mut watch = rig.store.watch("k", Revision(from)).await.unwrap();
        assert_eq!(end(&mut watch).await, WatchEnd::Compacted { compacted: Revision(6) });
        assert_eq!(
            end(&mut watch).await,
            WatchEnd::Compacted { compacted: Revision(6) },
            "an end is for good"
        );
    }
    let mut watch = rig.store.watch("k", Revision(7)).await.unwrap();
    assert_eq!(next(&mut watch).await.first().map(Event::revision), Some(Revision(7)));
    let last = rig.put("k", "last").await;
    assert_eq!(next(&mut open).await, [put_event("k", "last", last)], "a watch that is up to date goes on");
    assert_eq!(rig.value("k").await.as_deref(), Some("last"));
}

async fn a_deletion_at_the_compacted_revision_is_not_skipped(rig: Rig) {
    rig.put("k", "1").await;
    let deleted = rig.commit(Txn::new().delete("k")).await;
    rig.put("other", "").await;
    rig.compact(deleted).await;
    let mut watch = rig.store.watch("k", deleted).await.unwrap();
    assert_eq!(end(&mut watch).await, WatchEnd::Compacted { compacted: deleted });
}

async fn an_ended_lease_deletes_its_keys(rig: Rig) {
    let lease = rig.store.grant(TTL).await.unwrap();
    let other = rig.store.grant(Duration::from_secs(600)).await.unwrap();
    assert_ne!(lease, other);
    rig.commit(Txn::new().put_leased("l/1", "x", lease).put_leased("l/2", "y", lease)).await;
    let put = rig.commit(Txn::new().put_leased("l/3", "z", other).put("l/4", "")).await;
    assert_eq!(rig.store.get("l/1").await.unwrap().unwrap().lease, Some(lease));
    assert_eq!(rig.store.list("l/3").await.unwrap().entries[0].lease, Some(other));
    let mut watch = rig.store.watch("l/", put.next()).await.unwrap();
    rig.pass_until_gone("l/1").await;
    let ended = put.next();
    let mut events = next(&mut watch).await;
    events.sort_by(|one, other| one.key().cmp(other.key()));
    assert_eq!(events, [delete_event("l/1", ended), delete_event("l/2", ended)], "one revision for all keys");
    assert_eq!(rig.keys("l/").await, ["l/3", "l/4"]);
    assert_eq!(rig.store.keep_alive(lease).await, Err(MetaError::LeaseGone(lease)));
    assert_eq!(rig.store.revoke(lease).await, Err(MetaError::LeaseGone(lease)));
}

async fn a_renewed_lease_lives_on(rig: Rig) {
    let lease = rig.store.grant(TTL).await.unwrap();
    rig.commit(Txn::new().put_leased("l", "", lease)).await;
    for _ in 0..10 {
        rig.pass(Duration::from_millis(600)).await;
        let left = rig.store.keep_alive(lease).await.unwrap();
        assert!(left >= TTL && left <= 2 * TTL, "{left:?}");
    }
    assert!(rig.value("l").await.is_some(), "renewed for three times its time");
    rig.pass_until_gone("l").await;
    assert_eq!(rig.store.keep_alive(lease).await, Err(MetaError::LeaseGone(lease)));
}

async fn a_put_moves_a_key_between_leases(rig: Rig) {
    let short = rig.store.grant(TTL).await.unwrap();
    let long = rig.store.grant(Duration::from_secs(600)).await.unwrap();
    rig.commit(Txn::new().put_leased("stays", "", short).put_leased("moves", "", short)).await;
    rig.commit(Txn::new().put_leased("goes", "", short)).await;
    rig.commit(Txn::new().put("stays", "").put_leased("moves", "", long)).await;
    rig.pass_until_gone("goes").await;
    assert_eq!(rig.keys("").await, ["moves", "stays"]);
    assert_eq!(rig.store.get("stays").await.unwrap().unwrap().lease, None);
    rig.store.revoke(long).await.unwrap();
    assert_eq!(rig.keys("").await, ["stays"]);
}

async fn a_revoked_lease_is_gone(rig: Rig) {
    let lease = rig.store.grant(Duration::from_secs(600)).await.unwrap();
    let put = rig.commit(Txn::new().put_leased("a", "", lease).put_leased("b", "", lease)).await;
    let mut watch = rig.store.watch("", put.next()).await.unwrap();
    rig.store.revoke(lease).await.unwrap();
    let mut events = next(&mut watch).await;
    events.sort_by(|one, other| one.key().cmp(other.key()));
    assert_eq!(events, [delete_event("a", put.next()), delete_event("b", put.next())]);
    assert_eq!(rig.store.revoke(lease).await, Err(MetaError::LeaseGone(lease)));
    assert_eq!(rig.store.keep_alive(lease).await, Err(MetaError::LeaseGone(lease)));
    let empty = rig.store.grant(Duration::from_secs(600)).await.unwrap();
    assert!(empty != lease, "ids are not reused");
    rig.store.revoke(empty).await.unwrap();
    assert_eq!(
        rig.store.list("").await.unwrap().revision,
        put.next(),
        "a lease without keys leaves no trace"
    );
}

async fn a_lease_that_is_gone_cannot_hold_keys(rig: Rig) {
    let gone = rig.store.grant(TTL).await.unwrap();
    rig.store.revoke(gone).await.unwrap();
    for lease in [gone, LeaseId(0x7777_7777)] {
        let txn = Txn::new().put("a", "").put_leased("b", "", lease);
        assert_eq!(rig.store.txn(txn.clone()).await, Err(MetaError::LeaseGone(lease)));
        let conflict = txn.when(Compare::Exists("a".into()));
        assert_eq!(rig.store.txn(conflict).await, Ok(TxnOutcome::Conflict), "conditions come first");
    }
    assert_eq!(rig.keys("").await, [""; 0]);
}

async fn the_store_names_itself(rig: Rig) {
    let identity = rig.store.identity().await.unwrap();
    assert!(!identity.is_empty());
    rig.put("k", "").await;
    assert_eq!(rig.store.identity().await.unwrap(), identity);
    let start = match rig.kind {
        Kind::Memory(_) => "in memory",
        Kind::Embedded(..) => "embedded in /",
        Kind::Etcd(_) => "etcd at http://127.0.0.1:",
    };
    assert!(rig.store.describe().starts_with(start), "{}", rig.store.describe());
}

/// Every store answers a random sequence exactly as the in-memory one does, revisions included.
async fn random_transactions_match_the_model(rig: Rig) {
    let model = MemoryStore::new();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for step in 0..300 {
        let txn = random_txn(&mut random, &model).await;
        let expected = model.txn(txn.clone()).await;
        assert_eq!(rig.store.txn(txn.clone()).await, expected, "step {step}: {txn:?}");
    }
    assert_eq!(rig.store.list("").await.unwrap(), model.list("").await.unwrap());
    let mut from_rig = rig.store.watch("k", Revision(1)).await.unwrap();
    let mut from_model = model.watch("k", Revision(1)).await.unwrap();
    let last = model.list("").await.unwrap().revision;
    let expected = by_revision(&mut from_model, last).await;
    assert_eq!(by_revision(&mut from_rig, last).await, expected);
}

async fn by_revision(
    watch: &mut Box<dyn Watch>,
    last: Revision,
) -> BTreeMap<Revision, BTreeMap<String, Event>> {
    let mut history: BTreeMap<Revision, BTreeMap<String, Event>> = BTreeMap::new();
    while history.last_key_value().is_none_or(|(revision, _)| *revision < last) {
        for event in next(watch).await {
            history.entry(event.revision()).or_default().insert(event.key().to_owned(), event);
        }
    }
    history
}

async fn random_txn(random: &mut Random, model: &MemoryStore) -> Txn {
    let mut txn = Txn::new();
    for _ in 0..random.below(3) {
        let key = format!("k{}", random.below(6));
        let known = model.get(&key).await.unwrap().map_or(Revision(1), |entry| entry.mod_revision);
        txn = txn.when(match random.below(4) {
            0 => Compare::Absent(key),
            1 => Compare::Exists(key),
            2 => Compare::Revision(key, Revision(1 + random.below(20) as i64)),
            _ => Compare::Revision(key, known),
        });
    }
    let mut keys: Vec<_> = (0..6).map(|index| format!("k{index}")).collect();
    for _ in 0..random.below(5) {
        let key = keys.swap_remove(random.below(keys.len() as u64) as usize);
        let value = random.0.to_le_bytes().to_vec();
        txn.ops.push(if random.below(3) == 0 {
            Op::Delete { key }
        } else {
            Op::Put { key, value, lease: None }
        });
    }
    txn
}

/// A fixed sequence of numbers (xorshift64), so that a failure repeats.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
