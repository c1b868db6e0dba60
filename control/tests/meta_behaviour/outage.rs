//! What the etcd store answers while servers are killed, hang and come back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use torus_control::meta::etcd::{EtcdOptions, EtcdStore};
use torus_control::meta::{Compare, MetaError, MetaStore, Revision, Txn, TxnOutcome, WatchEnd};

use crate::PATIENCE;
use crate::etcd_server::EtcdCluster;

/// Waits until the store answers reads.
async fn recovered(store: &dyn MetaStore) {
    let started = Instant::now();
    while let Err(error) = store.get("k").await {
        assert!(started.elapsed() < PATIENCE, "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn put(store: &dyn MetaStore, key: &str) -> Result<TxnOutcome, MetaError> {
    store.txn(Txn::new().put(key, "")).await
}

#[tokio::test]
async fn members_that_never_answered_are_named() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let store = EtcdStore::connect(&[format!("http://{closed}")], EtcdOptions::default()).await.unwrap();
    let started = Instant::now();
    for error in [put(&store, "k").await.map(drop), store.get("k").await.map(drop)] {
        let Err(MetaError::Unavailable(why)) = error else { panic!("{error:?}") };
        assert!(why.contains(&closed.to_string()) && why.contains("refused"), "{why}");
    }
    assert!(started.elapsed() < Duration::from_secs(2), "a refused connection is told at once");
}

#[tokio::test]
async fn urls_that_cannot_be_used_are_refused() {
    for urls in [vec![], vec!["http://no port:x".to_owned()], vec!["https://127.0.0.1:1".to_owned()]] {
        let refused = EtcdStore::connect(&urls, EtcdOptions::default()).await.map(drop);
        assert!(matches!(refused, Err(MetaError::Invalid(_))), "{urls:?}: {refused:?}");
    }
}

#[tokio::test]
async fn a_killed_server_applies_nothing_that_was_unavailable() {
    let mut cluster = EtcdCluster::start(1).await;
    let store = cluster.store().await;
    put(&store, "before").await.unwrap();
    let mut watch = store.watch("", Revision(3)).await.unwrap();
    cluster.kill(0);
    let end = tokio::time::timeout(PATIENCE, watch.next()).await.expect("a broken connection ends the watch");
    assert!(matches!(end, Err(WatchEnd::Lost { .. })), "{end:?}");
    // The first call may find the connection before it is known to be broken.
    let first = put(&store, "first").await;
    assert!(matches!(first, Err(MetaError::Unavailable(_) | MetaError::Unknown(_))), "{first:?}");
    let second = put(&store, "second").await;
    assert!(matches!(second, Err(MetaError::Unavailable(_))), "{second:?}");
    cluster.restart(0);
    recovered(&store).await;
    assert_eq!(store.get("second").await.unwrap(), None);
    assert!(store.get("before").await.unwrap().is_some());
}

#[tokio::test]
async fn a_hung_server_leaves_outcomes_unknown() {
    let cluster = EtcdCluster::start(1).await;
    let store = cluster.store().await;
    put(&store, "before").await.unwrap();
    let mut watch = store.watch("", Revision(3)).await.unwrap();
    cluster.signal(0, Signal::STOP);
    let started = Instant::now();
    let hung = put(&store, "k").await;
    assert!(matches!(hung, Err(MetaError::Unknown(_))), "{hung:?}");
    let read = store.get("k").await;
    assert!(matches!(read, Err(MetaError::Unavailable(_))), "{read:?}");
    let end = tokio::time::timeout(PATIENCE, watch.next()).await.expect("a hung server ends the watch");
    assert!(matches!(end, Err(WatchEnd::Lost { .. })), "{end:?}");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    cluster.signal(0, Signal::CONT);
    recovered(&store).await;
    assert!(put(&store, "after").await.unwrap().committed());
}

#[tokio::test]
async fn a_lease_outlives_a_restart_of_the_server() {
    let mut cluster = EtcdCluster::start(1).await;
    let store = cluster.store().await;
    let lease = store.grant(Duration::from_secs(9)).await.unwrap();
    store.txn(Txn::new().put_leased("k", "", lease)).await.unwrap();
    cluster.kill(0);
    let failed = store.keep_alive(lease).await;
    assert!(matches!(failed, Err(MetaError::Unavailable(_))), "{failed:?}");
    cluster.restart(0);
    recovered(&store).await;
    assert_eq!(store.keep_alive(lease).await.unwrap(), Duration::from_secs(9));
    assert!(store.get("k").await.unwrap().is_some());
}

/// Kills and stops a server under load, and compares what was answered with what is there.
#[tokio::test]
async fn every_answer_is_true_through_outages() {
    let mut cluster = EtcdCluster::start(1).await;
    let store = Arc::new(cluster.store().await);
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4)
        .map(|writer| tokio::spawn(write_until(Arc::clone(&store), writer, Arc::clone(&stop))))
        .collect();
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        cluster.kill(0);
        tokio::time::sleep(Duration::from_millis(200)).await;
        cluster.restart(0);
        recovered(store.as_ref()).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        cluster.signal(0, Signal::STOP);
        tokio::time::sleep(Duration::from_millis(2500)).await;
        cluster.signal(0, Signal::CONT);
        recovered(store.as_ref()).await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut answers = Vec::new();
    for writer in writers {
        answers.extend(writer.await.unwrap());
    }
    // What was in flight when its caller gave up may still be applied: let it come to rest.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let count = |wanted: fn(&Answer) -> bool| answers.iter().filter(|(_, answer)| wanted(answer)).count();
    let committed = count(|answer| matches!(answer, Ok(TxnOutcome::Committed(_))));
    let unknown = count(|answer| matches!(answer, Err(MetaError::Unknown(_))));
    let unavailable = count(|answer| matches!(answer, Err(MetaError::Unavailable(_))));
    eprintln!("{committed} committed, {unknown} unknown, {unavailable} unavailable of {}", answers.len());
    assert!(committed > 50 && unknown > 0 && unavailable > 0, "the outages were not seen");
    for (key, answer) in &answers {
        let found = store.get(key).await.unwrap();
        match answer {
            Ok(TxnOutcome::Committed(revision)) => {
                assert_eq!(found.map(|entry| entry.mod_revision), Some(*revision), "{key} was lost");
            }
            Err(MetaError::Unknown(_)) => {}
            other => assert_eq!(found, None, "{key} was applied: {other:?}"),
        }
    }
}

type Answer = Result<TxnOutcome, MetaError>;

async fn write_until(store: Arc<EtcdStore>, writer: u32, stop: Arc<AtomicBool>) -> Vec<(String, Answer)> {
    let mut answers = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let key = format!("{writer}/{}", answers.len());
        let answer = store.txn(Txn::new().when(Compare::Absent(key.clone())).put(&key, "")).await;
        answers.push((key, answer));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    answers
}

#[tokio::test]
async fn another_member_takes_over() {
    let mut cluster = EtcdCluster::start(3).await;
    let store = cluster.store().await;
    put(&store, "before").await.unwrap();
    // The first one is in use: it answered first.
    cluster.kill(0);
    until_committed(&store, "one-killed").await;
    cluster.signal(1, Signal::STOP);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(4) {
        let answer = put(&store, "no-quorum").await;
        let refused = matches!(answer, Err(MetaError::Unavailable(_) | MetaError::Unknown(_)));
        assert!(refused, "one of three members cannot commit: {answer:?}");
    }
    assert!(store.list("").await.is_err(), "one of three members cannot read linearizably");
    cluster.signal(1, Signal::CONT);
    until_committed(&store, "quorum-again").await;
    cluster.restart(0);
    cluster.kill(2);
    until_committed(&store, "another-killed").await;
    for key in ["before", "one-killed", "quorum-again", "another-killed"] {
        assert!(store.get(key).await.unwrap().is_some(), "{key} was lost");
    }
}

async fn until_committed(store: &EtcdStore, key: &str) {
    let started = Instant::now();
    while let Err(error) = put(store, key).await {
        assert!(started.elapsed() < PATIENCE, "{key}: {error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
