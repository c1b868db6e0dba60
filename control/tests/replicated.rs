//! Replicated volumes in the metadata: from creation to the last owner's confirmation, changes of who is in sync, and
//! take-overs, on the metadata store in memory with its faults.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cluster_map::{
    ClusterId, ClusterKey, Desired, ExportState, Granting, HeadState, MemberId, MemberWish, NodeId, Observed,
    ObservedExport, ObservedHead, ObservedStore, ObservedVolume, StaleMark, StoreId, StoreState, VolumeId,
    VolumeIntent, VolumeObserved,
};
use proptest::prelude::*;
use tokio::sync::watch;
use torus_control::config::{self, Setting};
use torus_control::heads::{HeadsRecord, MemberRecord};
use torus_control::meta::memory::{MemoryStore, TxnFault};
use torus_control::meta::{MAX_TXN_OPS, MetaStore, Revision, Txn, TxnOutcome};
use torus_control::model::{
    LiveRecord, NodeRecord, PREFIX, StatusRecord, StoreSpec, View, VolumeState, encode, keys,
};
use torus_control::moves::{self, Moves};
use torus_control::node::{Node, keep_key};
use torus_control::ops::{self, NewExport, NewVolume, Plan, Refusal};
use torus_control::reconcile::{self, Settings};
use torus_control::supervise::DataPlane;
use torus_control::takeover::{self, Look, PATIENCE, STAGGER, Stand, Vigil, Why, stand};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Of every data plane here.
const START: u64 = 7;

fn node_id(n: u8) -> NodeId {
    NodeId([n; 16])
}

fn store_id(n: u8) -> StoreId {
    StoreId([n; 16])
}

fn volume_id(n: u8) -> VolumeId {
    VolumeId([n; 16])
}

fn member(n: u8) -> MemberId {
    MemberId { store: store_id(n), incarnation: 1 }
}

async fn view(meta: &MemoryStore) -> View {
    View::read(&meta.list(PREFIX).await.unwrap().entries).unwrap()
}

async fn change<T>(
    meta: &MemoryStore,
    plan: impl FnMut(&View) -> Result<Plan<T>, Refusal>,
) -> Result<T, Refusal> {
    ops::apply(meta, None, plan).await.map(|(answer, _)| answer)
}

fn desired(view: &View, n: u8) -> Desired {
    let settings = Settings { cores: vec![1], interfaces: vec!["eth0".into()], ..Settings::default() };
    Desired { version: 1, start: START, ..reconcile::desired(view, node_id(n), &settings).unwrap() }
}

/// What the data plane of node `n` reports when everything that is desired is there; nothing is granted to the silent.
fn obedient(desired: &Desired, n: u8, silent: &[u8]) -> Observed {
    let stores = desired.stores.iter().map(|s| ObservedStore {
        path: s.path.clone(),
        id: Some(s.id.unwrap_or(store_id(n))),
        state: StoreState::Ready,
        capacity_bytes: GIB,
        incarnation: 1,
        ..ObservedStore::default()
    });
    let volumes = desired.volumes.iter().map(|v| ObservedVolume {
        id: v.id,
        store: v.store,
        state: if v.state == VolumeIntent::Purging { VolumeObserved::Purged } else { VolumeObserved::Ready },
        size_sectors: v.size_sectors,
        ..ObservedVolume::default()
    });
    let exports = desired.exports.iter().map(|e| ObservedExport {
        volume: e.volume,
        shelf: e.shelf,
        slot: e.slot,
        state: ExportState::Serving,
        ..ObservedExport::default()
    });
    let heads = desired.heads.iter().map(|head| ObservedHead {
        volume: head.volume,
        takeover: head.takeover,
        start: desired.start,
        state: if head.is_moving { HeadState::HandedOver } else { HeadState::Serving },
        ..ObservedHead::default()
    });
    let granting = desired
        .peers
        .iter()
        .map(|peer| Granting { node: peer.node, is_granting: !silent.contains(&peer.node.0[0]) });
    Observed {
        version: 1,
        applied: desired.version,
        pid: 1,
        stores: stores.collect(),
        volumes: volumes.collect(),
        exports: exports.collect(),
        heads: heads.collect(),
        granting: granting.collect(),
        replicates: true,
        ..Observed::default()
    }
}

/// One round of node `n`: desired state out, observed state and status in. What was desired and observed at its end.
async fn round(meta: &MemoryStore, n: u8, silent: &[u8]) -> (Desired, Observed) {
    loop {
        let now = view(meta).await;
        let published = desired(&now, n);
        let observed = obedient(&published, n, silent);
        let status = reconcile::status(&published, &observed, "running");
        let live = LiveRecord { pid: 1, version: "1".into(), boot: String::new() };
        if now.live.get(&node_id(n)) != Some(&live) || now.status.get(&node_id(n)) != Some(&status) {
            let report = Txn::new()
                .put(keys::status(node_id(n)), encode(&status))
                .put(keys::live(node_id(n)), encode(&live));
            assert!(meta.txn(report).await.unwrap().committed());
        }
        let txns = reconcile::changes(&now, node_id(n), &published, &observed, 5);
        if txns.is_empty() {
            return (published, observed);
        }
        for txn in txns {
            meta.txn(txn).await.unwrap();
        }
    }
}

/// A cluster of so many nodes that replicate, each with one ready store of 1 GiB.
async fn cluster(nodes: u8) -> MemoryStore {
    let meta = MemoryStore::new();
    change(&meta, |v| ops::init(v, ClusterId([9; 16]), 4 * MIB, 1)).await.unwrap();
    for n in 1..=nodes {
        let record = NodeRecord {
            name: format!("n{n}"),
            zone: String::new(),
            peer_addr: format!("10.0.0.{n}:4330"),
            cores: 1,
            api_addr: String::new(),
            stores: vec![StoreSpec { path: format!("/s{n}"), size: 0 }],
        };
        change(&meta, |v| ops::join(v, node_id(n), &record)).await.unwrap();
        round(&meta, n, &[]).await;
    }
    meta
}

fn new_volume(n: u8, copies: u8, min_copies: Option<u8>) -> NewVolume {
    let (id, name, copies) = (volume_id(n), format!("v{n}"), Some(copies));
    NewVolume { id, name, size: 8 * MIB, copies, min_copies, now_unix_s: 3 }
}

async fn create(meta: &MemoryStore, n: u8, copies: u8) -> Result<(), Refusal> {
    let new = new_volume(n, copies, None);
    change(meta, |v| ops::create_volume(v, &new)).await.map(|_| ())
}

/// A volume on three nodes whose head is node 1.
async fn replicated() -> MemoryStore {
    let meta = cluster(3).await;
    create(&meta, 1, 3).await.unwrap();
    for n in 1..=3 {
        round(&meta, n, &[]).await;
    }
    assert_eq!(view(&meta).await.serving_node(volume_id(1)), Some(node_id(1)));
    meta
}

fn state(view: &View) -> VolumeState {
    view.volumes[&volume_id(1)].record.state
}

fn heads(view: &View) -> &HeadsRecord {
    &view.heads[&volume_id(1)].record
}

fn code<T: std::fmt::Debug>(result: Result<T, Refusal>) -> &'static str {
    result.unwrap_err().code
}

#[tokio::test]
async fn a_volume_is_ready_when_every_owner_has_made_it_and_only_its_head_serves() {
    let meta = cluster(3).await;
    create(&meta, 1, 3).await.unwrap();
    let seen = view(&meta).await;
    assert_eq!(heads(&seen).check(), Ok(()));
    assert_eq!((heads(&seen).takeover, heads(&seen).lane, heads(&seen).members.len()), (1, 0, 3));
    assert!((1..=3).all(|n| seen.placed(store_id(n)).bytes == 8 * MIB));
    let made = seen.volumes[&volume_id(1)].revision;
    assert_eq!(seen.heads[&volume_id(1)].revision, made, "in one transaction");
    for n in 1..=3 {
        assert_eq!(state(&view(&meta).await), VolumeState::Creating);
        round(&meta, n, &[]).await;
    }
    let seen = view(&meta).await;
    assert_eq!(state(&seen), VolumeState::Ready);
    assert!(seen.volumes[&volume_id(1)].record.confirmed.is_empty());

    let at = NewExport { volume: "v1".into(), ..NewExport::default() };
    change(&meta, |v| ops::export(v, &at)).await.unwrap();
    let seen = view(&meta).await;
    for n in 1..=3 {
        let wished = desired(&seen, n);
        assert_eq!(wished.volumes.len(), 1);
        assert_eq!((wished.volumes[0].store, wished.volumes[0].lane), (store_id(n), Some(0)));
        let is_head = usize::from(seen.serving_node(volume_id(1)) == Some(node_id(n)));
        assert_eq!((wished.heads.len(), wished.exports.len()), (is_head, is_head), "node {n}");
        let peers: BTreeSet<u8> = wished.peers.iter().map(|peer| peer.node.0[0]).collect();
        assert_eq!(peers, (1..=3).filter(|other| *other != n).collect());
        let listen = wished.listen.unwrap();
        assert_eq!((listen.ip.to_string(), listen.base_port), (format!("10.0.0.{n}"), 4330));
        for head in &wished.heads {
            assert_eq!(head.revision, made.0.unsigned_abs());
            assert_eq!(head.partitions.len(), 16);
        }
    }
}

/// Wishes that a node be head of the volume.
async fn move_to(meta: &MemoryStore, node: &str) -> Result<VolumeId, Refusal> {
    change(meta, |v| moves::move_head(v, "v1", node)).await
}

/// One look of node `n` at the moves of its heads, with what its data plane says if it does as it is told.
async fn follow_moves(meta: &MemoryStore, follower: &mut Moves, n: u8, obeys: bool, now_s: u64) -> usize {
    let now = view(meta).await;
    let published = desired(&now, n);
    let observed = obedient(&published, n, &[]);
    let told = obeys.then_some((&published, &observed));
    let txns = follower.look(&now, node_id(n), told, Duration::from_secs(now_s));
    for txn in &txns {
        assert!(meta.txn(txn.clone()).await.unwrap().committed());
    }
    txns.len()
}

#[tokio::test]
async fn a_head_moves_when_it_has_handed_over_and_not_before() {
    let meta = replicated().await;
    move_to(&meta, "n2").await.unwrap();
    let before = view(&meta).await;
    assert!(desired(&before, 1).heads[0].is_moving, "its data plane is told");
    assert_eq!((heads(&before).takeover, heads(&before).head), (1, node_id(1)));
    move_to(&meta, "n2").await.unwrap();
    assert_eq!(view(&meta).await, before, "asked for again it changes nothing");
    let (mut first, mut second) = (Moves::default(), Moves::default());
    assert_eq!(follow_moves(&meta, &mut first, 1, false, 0).await, 0, "it has not handed over");
    assert_eq!(follow_moves(&meta, &mut second, 2, true, 0).await, 0, "it is not the head");
    assert_eq!(follow_moves(&meta, &mut first, 1, true, 1).await, 1);
    let after = view(&meta).await;
    assert_eq!((heads(&after).takeover, heads(&after).head, heads(&after).move_to), (2, node_id(2), None));
    assert!(desired(&after, 1).heads.is_empty() && !desired(&after, 2).heads[0].is_moving);
    // What it said of the head that it had says nothing of one that it has again.
    move_to(&meta, "n1").await.unwrap();
    let now = view(&meta).await;
    let (published, mut observed) = (desired(&now, 2), obedient(&desired(&now, 2), 2, &[]));
    observed.heads[0].takeover = 1;
    assert!(second.look(&now, node_id(2), Some((&published, &observed)), Duration::ZERO).is_empty());
    assert_eq!(follow_moves(&meta, &mut second, 2, true, 2).await, 1);
    assert_eq!(heads(&view(&meta).await).head, node_id(1));
}

#[tokio::test]
async fn a_wish_is_given_up_when_it_cannot_be_or_takes_too_long() {
    let meta = replicated().await;
    let mut follower = Moves::default();
    move_to(&meta, "n2").await.unwrap();
    assert_eq!(follow_moves(&meta, &mut follower, 1, false, 5).await, 0);
    assert_eq!(follow_moves(&meta, &mut follower, 1, false, 14).await, 0);
    assert_eq!(follow_moves(&meta, &mut follower, 1, true, 15).await, 1, "it has had its ten seconds");
    let seen = view(&meta).await;
    assert_eq!((heads(&seen).takeover, heads(&seen).move_to), (1, None));
    // The successor dies after the head has handed over: the head goes on.
    move_to(&meta, "n2").await.unwrap();
    let gone = Txn::new().delete(keys::live(node_id(2))).delete(keys::status(node_id(2)));
    meta.txn(gone).await.unwrap();
    assert_eq!(follow_moves(&meta, &mut follower, 1, true, 15).await, 1);
    let seen = view(&meta).await;
    assert_eq!((heads(&seen).takeover, heads(&seen).head, heads(&seen).move_to), (1, node_id(1), None));
    // Nor does it outlive that its copy is called stale, or a take-over.
    let record = heads(&seen);
    let wished = HeadsRecord { move_to: Some(node_id(3)), ..record.clone() };
    let eject = [StaleMark { member: member(3), mark: 4 }];
    assert_eq!(wished.changed(&eject, &[]).unwrap().move_to, None);
    assert_eq!(wished.taken_over(node_id(2)).unwrap().move_to, None);
    let other = [StaleMark { member: member(2), mark: 4 }];
    assert_eq!(wished.changed(&other, &[]).unwrap().move_to, Some(node_id(3)));
}

#[tokio::test]
async fn the_successor_is_alive_when_it_is_named() {
    let meta = replicated().await;
    move_to(&meta, "n2").await.unwrap();
    let now = view(&meta).await;
    let published = desired(&now, 1);
    let observed = obedient(&published, 1, &[]);
    let txns = Moves::default().look(&now, node_id(1), Some((&published, &observed)), Duration::ZERO);
    meta.txn(Txn::new().delete(keys::live(node_id(2)))).await.unwrap();
    assert_eq!(meta.txn(txns[0].clone()).await.unwrap(), TxnOutcome::Conflict);
}

#[tokio::test]
async fn who_cannot_be_head_is_refused_with_the_reason() {
    let meta = cluster(4).await;
    create(&meta, 1, 3).await.unwrap();
    create(&meta, 2, 1).await.unwrap();
    for n in 1..=4 {
        round(&meta, n, &[]).await;
    }
    let seen = view(&meta).await;
    let head = heads(&seen).head.0[0];
    let owners: Vec<u8> = heads(&seen).members.iter().map(|member| member.node.0[0]).collect();
    let without = (1..=4).find(|n| !owners.contains(n)).unwrap();
    let other = *owners.iter().find(|n| **n != head).unwrap();
    assert_eq!(code(move_to(&meta, &format!("n{without}")).await), "no_copy");
    assert_eq!(code(move_to(&meta, "n9").await), "no_such_node");
    assert_eq!(code(change(&meta, |v| moves::move_head(v, "v9", "n1")).await), "no_such_volume");
    assert_eq!(code(change(&meta, |v| moves::move_head(v, "v2", "n1")).await), "not_replicated");
    move_to(&meta, &format!("n{head}")).await.unwrap();
    assert_eq!(view(&meta).await.heads, seen.heads, "it is the head");
    let refused = |change: &dyn Fn(&mut View)| {
        let mut view = seen.clone();
        change(&mut view);
        let name = format!("n{other}");
        moves::move_head(&view, "v1", &name).map(drop).unwrap_err().code
    };
    let status = |view: &mut View, change: &dyn Fn(&mut StatusRecord)| {
        change(view.status.get_mut(&node_id(other)).unwrap());
    };
    assert_eq!(refused(&|v| drop(v.live.remove(&node_id(other)))), "node_down");
    assert_eq!(refused(&|v| drop(v.live.remove(&node_id(head)))), "head_down");
    assert_eq!(refused(&|v| make_stale(v, other)), "not_in_sync");
    assert_eq!(refused(&|v| status(v, &|s| s.stores[0].state = "opening".into())), "store_not_open");
    assert_eq!(refused(&|v| status(v, &|s| s.stores[0].incarnation = 2)), "store_not_open");
    assert_eq!(refused(&|v| status(v, &|s| s.replicates = false)), "cannot_replicate");
}

#[tokio::test]
async fn a_node_that_stops_wishes_its_heads_to_others_that_are_fit() {
    let meta = replicated().await;
    let seen = view(&meta).await;
    let (txns, going) = moves::leaving(&seen, node_id(1));
    assert_eq!((txns.len(), going), (1, 1));
    assert!(meta.txn(txns[0].clone()).await.unwrap().committed());
    let wished = view(&meta).await;
    assert!(heads(&wished).move_to.is_some_and(|to| to != node_id(1)));
    assert_eq!(moves::leaving(&wished, node_id(1)).0.len(), 0, "wished for already");
    assert_eq!(follow_moves(&meta, &mut Moves::default(), 1, true, 0).await, 1);
    assert_eq!(moves::leaving(&view(&meta).await, node_id(1)).1, 0);
    let mut alone = seen;
    alone.live.retain(|node, _| *node == node_id(1));
    assert_eq!(moves::leaving(&alone, node_id(1)).1, 0, "nobody can take it: it is not waited for");
}

#[tokio::test]
async fn a_setting_is_followed_by_every_node_until_it_is_taken_back() {
    let meta = cluster(2).await;
    let rate = |view: &View| (1..=2).map(|n| desired(view, n).resync_bytes_per_s).collect::<Vec<_>>();
    assert_eq!(rate(&view(&meta).await), [0, 0], "no limit is the default");
    let setting = Setting::named("resync-rate").unwrap();
    for (text, expected) in [("200MiB", 200 << 20), ("none", 0), ("1", 1), ("default", 0)] {
        let value = setting.parse(text).unwrap();
        change(&meta, |v| config::set(v, setting, value)).await.unwrap();
        assert_eq!(rate(&view(&meta).await), [expected; 2], "{text}");
        assert_eq!(setting.set_value(&view(&meta).await), value);
    }
}

#[tokio::test]
async fn the_key_is_the_files_or_the_metadatas() {
    let meta = cluster(1).await;
    assert!(desired(&view(&meta).await, 1).cluster_key.is_nil());
    for key in [[3; 32], [4; 32]] {
        change(&meta, |v| ops::make_key(v, ClusterKey(key))).await.unwrap();
        assert_eq!(desired(&view(&meta).await, 1).cluster_key, ClusterKey([3; 32]), "the first stays");
    }
    let settings = Settings { cluster_key: Some(ClusterKey([5; 32])), ..Settings::default() };
    let given = reconcile::desired(&view(&meta).await, node_id(1), &settings).unwrap();
    assert_eq!(given.cluster_key, ClusterKey([5; 32]));
}

#[tokio::test]
async fn the_first_node_without_a_key_file_makes_the_key() {
    let meta = cluster(2).await;
    let start = |n: u8| {
        let (map, data_plane) = (watch::channel(None).1, watch::channel(DataPlane::Idle).1);
        Node::start(node_id(n), format!("n{n}"), Arc::new(meta.clone()), map, data_plane)
    };
    let given = ClusterKey([5; 32]);
    let with_file = start(1);
    let keeping = tokio::spawn(keep_key(Arc::clone(&with_file), Some(given)));
    with_file.subscribe().wait_for(|known| known.usable()).await.unwrap();
    assert!(view(&meta).await.cluster_key.is_none(), "where all have the file, none is in the metadata");
    let without = start(2);
    let making = tokio::spawn(keep_key(Arc::clone(&without), None));
    let mut known = with_file.subscribe();
    known.wait_for(|known| known.view.cluster_key.is_some()).await.unwrap();
    let made = view(&meta).await.cluster_key.unwrap().record.key;
    assert!(!made.is_nil() && made != given);
    // The two do not know each other, which is said where it can be seen.
    while !with_file.problem().contains("--cluster-key-file") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(without.problem().is_empty(), "{}", without.problem());
    keeping.abort();
    making.abort();
}

#[tokio::test]
async fn copies_that_cannot_be_are_refused() {
    let meta = cluster(3).await;
    assert_eq!(code(create(&meta, 1, 4).await), "replication_missing");
    assert_eq!(code(create(&meta, 1, 17).await), "bad_copies");
    for min_copies in [0, 3] {
        let new = new_volume(1, 2, Some(min_copies));
        assert_eq!(code(change(&meta, |v| ops::create_volume(v, &new)).await), "bad_copies");
    }
    let gone = Txn::new().delete(keys::live(node_id(3))).delete(keys::status(node_id(3)));
    meta.txn(gone).await.unwrap();
    let refusal = create(&meta, 1, 3).await.unwrap_err();
    assert!(refusal.message.contains("3 copies are asked for") && refusal.message.contains("there are 2"));
    let new = new_volume(1, 2, Some(2));
    change(&meta, |v| ops::create_volume(v, &new)).await.unwrap();
    assert_eq!(heads(&view(&meta).await).min_copies, 2);
    // One copy is what it was: no record beside the volume's.
    create(&meta, 2, 1).await.unwrap();
    let seen = view(&meta).await;
    assert!(!seen.heads.contains_key(&volume_id(2)) && seen.volumes[&volume_id(2)].record.store.is_some());
}

#[tokio::test]
async fn growing_takes_space_and_time_of_every_owner_and_shrinking_is_refused() {
    let meta = replicated().await;
    let resize = |size, loss| change(&meta, move |v| ops::resize_volume(v, "v1", size, loss));
    // Node 3 has another volume.
    let other = NewVolume { size: 600 * MIB, ..new_volume(2, 1, None) };
    change(&meta, |v| ops::create_volume(v, &other)).await.unwrap();
    assert_eq!(code(resize(500 * MIB, false).await), "no_space");
    resize(400 * MIB, false).await.unwrap();
    for n in 1..=3 {
        assert_eq!(state(&view(&meta).await), VolumeState::Resizing, "node {n} has not done it");
        round(&meta, n, &[]).await;
    }
    assert_eq!(state(&view(&meta).await), VolumeState::Ready);
    assert_eq!(code(resize(4 * MIB, true).await), "cannot_shrink");
    let mut seen = false;
    let removed = change(&meta, |v| ops::remove_store(v, "n2", "/s2", &mut seen)).await;
    assert_eq!(code(removed), "store_in_use");
}

#[tokio::test]
async fn a_deleted_volume_leaves_its_tombstone_when_the_last_owner_has_confirmed() {
    let meta = replicated().await;
    let mut id = None;
    change(&meta, |v| ops::delete_volume(v, "v1", &mut id)).await.unwrap();
    assert!(desired(&view(&meta).await, 1).heads.is_empty());
    for n in [2, 1] {
        round(&meta, n, &[]).await;
        // Nobody confirms twice, nor for another.
        round(&meta, n, &[]).await;
        let seen = view(&meta).await;
        assert_eq!(state(&seen), VolumeState::Purging);
        assert!(seen.tombstones.is_empty() && seen.names.contains_key("v1"));
    }
    // What was not asked for is not believed.
    let seen = view(&meta).await;
    let observed = obedient(&desired(&seen, 3), 3, &[]);
    assert!(reconcile::changes(&seen, node_id(3), &Desired::default(), &observed, 0).is_empty());
    round(&meta, 3, &[]).await;
    let seen = view(&meta).await;
    assert!(seen.volumes.is_empty() && seen.heads.is_empty() && seen.names.is_empty());
    let owners: BTreeSet<_> = seen.tombstones[&volume_id(1)].owners.iter().copied().collect();
    assert_eq!(owners, (1..=3).map(store_id).collect());
    assert!((1..=3).all(|n| seen.placed(store_id(n)).bytes == 0));
}

#[tokio::test]
async fn no_owner_is_overcommitted_by_racing_requests() {
    let meta = cluster(3).await;
    let tasks: Vec<_> = (1..=12u8)
        .map(|n| {
            let meta = meta.clone();
            let new = NewVolume { size: 300 * MIB, ..new_volume(n, 1 + n % 3, None) };
            tokio::spawn(async move { change(&meta, |v| ops::create_volume(v, &new)).await.is_ok() })
        })
        .collect();
    let mut made = 0;
    for task in tasks {
        made += u8::from(task.await.unwrap());
    }
    assert!(made >= 3, "{made}");
    let seen = view(&meta).await;
    for n in 1..=3 {
        assert!(seen.placed(store_id(n)).bytes <= GIB, "{:?}", seen.placed(store_id(n)));
    }
}

#[tokio::test]
async fn new_volumes_get_heads_and_lanes_in_turn() {
    let meta = cluster(3).await;
    for n in 1..=8 {
        create(&meta, n, 3).await.unwrap();
    }
    let seen = view(&meta).await;
    let lanes: BTreeSet<u16> = seen.heads.values().map(|heads| heads.record.lane).collect();
    assert_eq!(lanes, (0..8).collect());
    let mut heads_of = BTreeMap::new();
    seen.heads.values().for_each(|heads| *heads_of.entry(heads.record.head).or_insert(0) += 1);
    assert!(heads_of.len() == 3 && heads_of.values().all(|count| *count >= 2), "{heads_of:?}");
}

fn wish(view: &View, eject: &[(u8, u64)], join: &[u8]) -> MemberWish {
    MemberWish {
        volume: volume_id(1),
        takeover: heads(view).takeover,
        start: START,
        revision: view.heads[&volume_id(1)].revision.0.unsigned_abs(),
        eject: eject.iter().map(|(n, mark)| StaleMark { member: member(*n), mark: *mark }).collect(),
        join: join.iter().map(|n| member(*n)).collect(),
    }
}

/// What node `n` does about a wish of its data plane's.
fn changes_for(view: &View, n: u8, wish: MemberWish) -> Vec<Txn> {
    let published = desired(view, n);
    let observed = Observed { wishes: vec![wish], ..obedient(&published, n, &[]) };
    reconcile::changes(view, node_id(n), &published, &observed, 5)
}

#[tokio::test]
async fn a_wish_is_made_at_its_revision_by_its_head_and_leaves_enough_in_sync() {
    let meta = replicated().await;
    let before = view(&meta).await;
    let good = wish(&before, &[(3, 41)], &[]);
    for bad in [
        MemberWish { revision: good.revision + 1, ..good.clone() },
        MemberWish { revision: good.revision - 1, ..good.clone() },
        MemberWish { takeover: 2, ..good.clone() },
        MemberWish { start: START + 1, ..good.clone() },
        MemberWish { volume: volume_id(9), ..good.clone() },
        wish(&before, &[(3, 41), (2, 41)], &[]),
        wish(&before, &[(4, 41)], &[]),
        wish(&before, &[], &[2]),
    ] {
        assert!(changes_for(&before, 1, bad.clone()).is_empty(), "{bad:?}");
    }
    assert!(changes_for(&before, 2, good.clone()).is_empty(), "it is not the head");

    let txns = changes_for(&before, 1, good.clone());
    assert_eq!(txns.len(), 1);
    // The outcome is not known; it was made.
    meta.fail_txn(TxnFault::AnswerLost);
    assert!(meta.txn(txns[0].clone()).await.is_err());
    let after = view(&meta).await;
    assert_eq!((heads(&after).copies_in_sync(), heads(&after).stale[0].mark), (2, 41));
    assert!(changes_for(&after, 1, good).is_empty(), "read again, it is done");
    assert_eq!(meta.txn(txns[0].clone()).await, Ok(TxnOutcome::Conflict), "a late copy does nothing");
    assert_eq!(desired(&after, 1).heads[0].stale.len(), 1);

    let back = changes_for(&after, 1, wish(&after, &[], &[3]));
    assert!(meta.txn(back[0].clone()).await.unwrap().committed());
    assert_eq!(heads(&view(&meta).await).copies_in_sync(), 3);
    // The first wish, on its way for long, finds another revision though the record says the same.
    assert_eq!(meta.txn(txns[0].clone()).await, Ok(TxnOutcome::Conflict));
}

#[tokio::test]
async fn a_volume_that_is_purged_changes_no_more_members() {
    let meta = replicated().await;
    let mut id = None;
    change(&meta, |v| ops::delete_volume(v, "v1", &mut id)).await.unwrap();
    let seen = view(&meta).await;
    assert!(
        changes_for(&seen, 1, wish(&seen, &[(3, 1)], &[]))
            .iter()
            .all(|txn| { txn.ops.iter().all(|op| op.key() != keys::heads(volume_id(1))) })
    );
}

#[tokio::test]
async fn the_wishes_of_one_event_go_together() {
    let meta = cluster(3).await;
    for n in 1..=200 {
        let new = NewVolume { size: 4 * MIB, ..new_volume(n, 3, None) };
        change(&meta, |v| ops::create_volume(v, &new)).await.unwrap();
    }
    let mut seen = view(&meta).await;
    // As after take-overs: one node is head of all.
    for heads in seen.heads.values_mut().filter(|heads| heads.record.head != node_id(1)) {
        heads.record = heads.record.taken_over(node_id(1)).unwrap();
    }
    let published = desired(&seen, 1);
    let wishes = published.heads.iter().map(|head| MemberWish {
        volume: head.volume,
        takeover: head.takeover,
        start: START,
        revision: head.revision,
        eject: vec![StaleMark { member: member(3), mark: 1 }],
        join: Vec::new(),
    });
    let observed = Observed { wishes: wishes.collect(), ..obedient(&published, 1, &[]) };
    let txns = reconcile::changes(&seen, node_id(1), &published, &observed, 5);
    let of_heads = |txn: &&Txn| txn.ops.iter().all(|op| op.key().starts_with("torus/heads/"));
    let sizes: Vec<usize> = txns.iter().filter(of_heads).map(|txn| txn.ops.len()).collect();
    assert_eq!(sizes, [MAX_TXN_OPS, 200 - MAX_TXN_OPS]);
    assert!(txns.iter().all(|txn| txn.validate().is_ok()));
}

/// A node's look at a volume: what it and the others say.
#[tokio::test]
async fn who_stands_for_head_and_who_rests() {
    type Change = fn(&mut View, &mut Observed);
    let meta = replicated().await;
    round(&meta, 3, &[1]).await;
    let (_, observed) = round(&meta, 2, &[1]).await;
    let before = view(&meta).await;
    let cases: [(&str, Change, Option<Why>); 16] = [
        ("all say that the head is silent", |_, _| (), None),
        ("its lease is gone besides", |v, _| drop(v.live.remove(&node_id(1))), None),
        ("it grants", |_, o| o.granting[0].is_granting = true, Some(Why::Grants)),
        ("it does not say", |_, o| o.granting.clear(), Some(Why::Grants)),
        (
            "another grants",
            |v, _| v.status.get_mut(&node_id(3)).unwrap().granting = vec![node_id(1)],
            Some(Why::Vetoed(node_id(3))),
        ),
        (
            "another grants somebody else",
            |v, _| v.status.get_mut(&node_id(3)).unwrap().granting = vec![node_id(2)],
            None,
        ),
        (
            "who grants is not live",
            |v, _| {
                v.status.get_mut(&node_id(3)).unwrap().granting = vec![node_id(1)];
                v.live.remove(&node_id(3));
            },
            None,
        ),
        (
            "who grants is stale",
            |v, _| {
                v.status.get_mut(&node_id(3)).unwrap().granting = vec![node_id(1)];
                make_stale(v, 3);
            },
            None,
        ),
        (
            "the head says that it grants itself",
            |v, _| v.status.get_mut(&node_id(1)).unwrap().granting = vec![node_id(1)],
            None,
        ),
        ("its own copy is stale", |v, _| make_stale(v, 2), Some(Why::NotInSync)),
        (
            "its own copy is incomplete",
            |v, _| {
                for partition in &mut v.heads.get_mut(&volume_id(1)).unwrap().record.partitions {
                    partition.incomplete = vec![1];
                }
            },
            Some(Why::NotInSync),
        ),
        ("its store is not open", |_, o| o.stores[0].state = StoreState::Opening, Some(Why::NotInSync)),
        ("its store lost something", |_, o| o.stores[0].incarnation = 2, Some(Why::NotInSync)),
        ("it cannot replicate", |_, o| o.replicates = false, Some(Why::CannotReplicate)),
        (
            "the volume goes",
            |v, _| v.volumes.get_mut(&volume_id(1)).unwrap().record.state = VolumeState::Purging,
            Some(Why::NoVolume),
        ),
        (
            "it is the head",
            |v, _| v.heads.get_mut(&volume_id(1)).unwrap().record.head = node_id(2),
            Some(Why::IsHead),
        ),
    ];
    for (what, case, rests) in cases {
        let (mut view, mut observed) = (before.clone(), observed.clone());
        observed.granting.sort_by_key(|grant| grant.node);
        case(&mut view, &mut observed);
        let stands = stand(&view, volume_id(1), heads(&view), node_id(2), &observed);
        match rests {
            Some(why) => assert_eq!(stands, Stand::Rests(why), "{what}"),
            None => assert!(matches!(stands, Stand::Candidate { .. }), "{what}: {stands:?}"),
        }
    }
}

fn make_stale(view: &mut View, n: u8) {
    let entry = view.heads.get_mut(&volume_id(1)).unwrap();
    entry.record = entry.record.changed(&[StaleMark { member: member(n), mark: 1 }], &[]).unwrap();
}

/// Ranks are 0, 1, … among the candidates, and not the same order for every volume.
#[tokio::test]
async fn candidates_stand_in_an_order_of_their_own_for_each_volume() {
    let meta = cluster(4).await;
    for n in 1..=40 {
        create(&meta, n, 4).await.unwrap();
    }
    let mut seen = view(&meta).await;
    let mut first = BTreeSet::new();
    seen.heads.values_mut().for_each(|heads| heads.record.head = node_id(1));
    seen.status.values_mut().for_each(|status| status.granting.clear());
    for (id, heads) in &seen.heads {
        let ranks: Vec<_> = (2..=4)
            .map(|n| stand(&seen, *id, &heads.record, node_id(n), &obedient(&desired(&seen, n), n, &[1])))
            .map(|stand| match stand {
                Stand::Candidate { rank } => rank,
                rests @ Stand::Rests(_) => panic!("{rests:?}"),
            })
            .collect();
        let mut sorted = ranks.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2], "{ranks:?}");
        first.insert(ranks.iter().position(|rank| *rank == 0));
    }
    assert_eq!(first.len(), 3);
}

#[tokio::test]
async fn a_vigil_waits_for_those_before_and_for_heads_that_were_just_named() {
    let meta = replicated().await;
    round(&meta, 3, &[1]).await;
    round(&meta, 2, &[1]).await;
    let seen = view(&meta).await;
    let observed = |n| obedient(&desired(&seen, n), n, &[1]);
    let rank = |n| match stand(&seen, volume_id(1), heads(&seen), node_id(n), &observed(n)) {
        Stand::Candidate { rank } => rank,
        rests @ Stand::Rests(_) => panic!("{rests:?}"),
    };
    let (first, second) = if rank(2) == 0 { (2, 3) } else { (3, 2) };
    assert_eq!(rank(second), 1);
    let second_s = 10 * PATIENCE;
    let nothing = Look::default();
    let due = Look { due: vec![volume_id(1)], next: None };
    let at = |next| Look { due: Vec::new(), next: Some(next) };
    let mut vigil = Vigil::default();
    // Known for long, silent now.
    assert_eq!(vigil.look(&seen, node_id(first), None, Duration::ZERO), nothing);
    assert_eq!(vigil.look(&seen, node_id(first), Some(&observed(first)), second_s), due);
    vigil.put_off([volume_id(1)], second_s);
    assert!(vigil.look(&seen, node_id(first), Some(&observed(first)), second_s).due.is_empty());
    let mut vigil = Vigil::default();
    assert_eq!(vigil.look(&seen, node_id(second), None, Duration::ZERO), nothing);
    let look = vigil.look(&seen, node_id(second), Some(&observed(second)), second_s);
    assert_eq!(look, at(second_s + STAGGER));
    assert_eq!(vigil.look(&seen, node_id(second), Some(&observed(second)), second_s + STAGGER), due);
    // Whoever rests in between begins anew.
    let grants = obedient(&desired(&seen, second), second, &[]);
    assert_eq!(vigil.look(&seen, node_id(second), Some(&grants), second_s + STAGGER), nothing);
    let look = vigil.look(&seen, node_id(second), Some(&observed(second)), second_s + STAGGER);
    assert_eq!(look, at(second_s + 2 * STAGGER));
    // A head that was just named is left alone, also where the one before it was watched.
    let mut vigil = Vigil::default();
    let look = vigil.look(&seen, node_id(first), Some(&observed(first)), Duration::ZERO);
    assert_eq!(look, at(PATIENCE));
    assert_eq!(vigil.look(&seen, node_id(first), Some(&observed(first)), PATIENCE), due);
    let mut renamed = seen.clone();
    renamed.heads.get_mut(&volume_id(1)).unwrap().record.takeover = 2;
    let look = vigil.look(&renamed, node_id(first), Some(&observed(first)), PATIENCE);
    assert_eq!(look, at(2 * PATIENCE));
}

/// What replicas tell a record of the past by (I14).
#[tokio::test]
async fn every_change_of_a_record_counts_and_one_from_before_counts_from_its_revision() {
    let meta = replicated().await;
    let edition = |seen: &View| (heads(seen).edition, desired(seen, heads(seen).head.0[0]).heads[0].edition);
    let first = view(&meta).await;
    assert_eq!(edition(&first), (1, 1));
    for txn in changes_for(&first, 1, wish(&first, &[(3, 5)], &[])) {
        meta.txn(txn).await.unwrap();
    }
    assert_eq!(edition(&view(&meta).await), (2, 2), "an ejection");
    move_to(&meta, "n2").await.unwrap();
    assert_eq!(edition(&view(&meta).await), (3, 3), "a wish for another head");
    follow_moves(&meta, &mut Moves::default(), 1, true, 0).await;
    let moved = view(&meta).await;
    assert_eq!((heads(&moved).head, edition(&moved)), (node_id(2), (4, 4)));
    // A record of before changes were counted.
    let former = HeadsRecord { edition: 0, ..heads(&moved).clone() };
    let mut value: serde_json::Value = serde_json::from_slice(&encode(&former)).unwrap();
    value.as_object_mut().unwrap().remove("edition").unwrap();
    meta.txn(Txn::new().put(keys::heads(volume_id(1)), value.to_string().into_bytes())).await.unwrap();
    let former = view(&meta).await;
    let revision = former.heads[&volume_id(1)].revision.0.unsigned_abs();
    assert_eq!(edition(&former), (0, revision));
    for batch in takeover::batches(&former, node_id(1), &[volume_id(1)]) {
        takeover::commit(&meta, &batch).await.unwrap();
    }
    assert_eq!(edition(&view(&meta).await), (revision + 1, revision + 1));
}

#[tokio::test]
async fn a_silent_head_is_replaced_once_and_the_new_one_serves() {
    let meta = replicated().await;
    let at = NewExport { volume: "v1".into(), ..NewExport::default() };
    change(&meta, |v| ops::export(v, &at)).await.unwrap();
    for n in 1..=3 {
        round(&meta, n, &[]).await;
    }
    for n in 2..=3 {
        round(&meta, n, &[1]).await;
    }
    let seen = view(&meta).await;
    let mut won = Vec::new();
    for n in 2..=3 {
        for batch in takeover::batches(&seen, node_id(n), &[volume_id(1)]) {
            assert_eq!((batch.head(), batch.volumes().count()), (node_id(1), 1));
            won.extend(takeover::commit(&meta, &batch).await.unwrap().map(|_| n));
        }
    }
    assert_eq!(won, [2]);
    let seen = view(&meta).await;
    assert_eq!((heads(&seen).takeover, heads(&seen).head), (2, node_id(2)));
    assert!(desired(&seen, 1).exports.is_empty() && desired(&seen, 1).heads.is_empty());
    let wished = desired(&seen, 2);
    assert_eq!((wished.exports.len(), wished.heads[0].takeover), (1, 2));
    // What the former head wished is nothing any more.
    assert!(changes_for(&seen, 1, MemberWish { takeover: 1, ..wish(&seen, &[(2, 1)], &[]) }).is_empty());
}

/// An exported volume whose export is to end, at three nodes that all say that they grant its head, node 1, something.
async fn ending() -> MemoryStore {
    let meta = replicated().await;
    let at = NewExport { volume: "v1".into(), ..NewExport::default() };
    change(&meta, |v| ops::export(v, &at)).await.unwrap();
    for n in 1..=3 {
        round(&meta, n, &[]).await;
    }
    change(&meta, |v| ops::unexport(v, "v1", &mut None)).await.unwrap();
    meta
}

#[tokio::test]
async fn an_export_ends_when_no_former_head_can_answer() {
    type Change = fn(&mut ObservedHead);
    let meta = ending().await;
    let seen = view(&meta).await;
    let published = desired(&seen, 1);
    let mut observed = obedient(&published, 1, &[]);
    let ends = |observed: &Observed| reconcile::changes(&seen, node_id(1), &published, observed, 5).len();
    assert_eq!(ends(&observed), 1);
    let cases: [(&str, Change); 4] = [
        ("its head has not opened its generation everywhere", |head| head.state = HeadState::Opening),
        ("its head is replaced", |head| head.state = HeadState::Replaced),
        ("it is an earlier take-over that is served", |head| head.takeover = 0),
        ("it is an earlier start that is told of", |head| head.start = START - 1),
    ];
    for (what, case) in cases {
        let mut observed = observed.clone();
        case(&mut observed.heads[0]);
        assert_eq!(ends(&observed), 0, "{what}");
    }
    observed.heads.clear();
    assert_eq!(ends(&observed), 0, "nothing is told of the head");
    // A take-over meanwhile: who was head then has nothing to say any more.
    let txn = reconcile::changes(&seen, node_id(1), &published, &obedient(&published, 1, &[]), 5).remove(0);
    let taken = heads(&seen).taken_over(node_id(2)).unwrap();
    meta.txn(Txn::new().put(keys::heads(volume_id(1)), encode(&taken))).await.unwrap();
    assert!(!meta.txn(txn).await.unwrap().committed());
    round(&meta, 2, &[]).await;
    assert!(view(&meta).await.exports.is_empty());
}

#[tokio::test]
async fn who_does_not_hear_that_its_export_is_to_end_is_replaced_though_it_is_granted() {
    let meta = ending().await;
    let stands = |seen: &View| {
        let observed = obedient(&desired(seen, 2), 2, &[]);
        stand(seen, volume_id(1), heads(seen), node_id(2), &observed)
    };
    let seen = view(&meta).await;
    assert_eq!(stands(&seen), Stand::Rests(Why::Grants), "it hears");
    meta.txn(Txn::new().delete(keys::live(node_id(1)))).await.unwrap();
    let deaf = view(&meta).await;
    assert!(matches!(stands(&deaf), Stand::Candidate { .. }));
    let batches = takeover::batches(&deaf, node_id(2), &[volume_id(1)]);
    // Its session is back: it ends the export itself.
    let live = LiveRecord { pid: 1, version: "1".into(), boot: String::new() };
    meta.txn(Txn::new().put(keys::live(node_id(1)), encode(&live))).await.unwrap();
    assert_eq!(takeover::commit(&meta, &batches[0]).await, Ok(None));
    meta.txn(Txn::new().delete(keys::live(node_id(1)))).await.unwrap();
    assert!(takeover::commit(&meta, &batches[0]).await.unwrap().is_some());
    assert_eq!(heads(&view(&meta).await).head, node_id(2));
    round(&meta, 2, &[]).await;
    let after = view(&meta).await;
    assert!(after.exports.is_empty() && after.volumes[&volume_id(1)].record.export.is_none());
    // Without an export to end, grants keep a head whose session is gone.
    meta.txn(Txn::new().delete(keys::live(node_id(2)))).await.unwrap();
    let kept = view(&meta).await;
    let observed = obedient(&desired(&kept, 3), 3, &[]);
    assert_eq!(stand(&kept, volume_id(1), heads(&kept), node_id(3), &observed), Stand::Rests(Why::Grants));
}

#[tokio::test]
async fn without_a_fresh_answer_nobody_is_replaced() {
    let meta = replicated().await;
    round(&meta, 2, &[1]).await;
    round(&meta, 3, &[1]).await;
    let batches = takeover::batches(&view(&meta).await, node_id(2), &[volume_id(1)]);
    meta.set_available(false);
    assert!(takeover::commit(&meta, &batches[0]).await.is_err());
    meta.set_available(true);
    meta.fail_txn(TxnFault::AnswerLost);
    assert!(takeover::commit(&meta, &batches[0]).await.is_err());
    // It was made though nobody heard; a second time it is not.
    assert_eq!(heads(&view(&meta).await).takeover, 2);
    assert_eq!(takeover::commit(&meta, &batches[0]).await, Ok(None));
}

#[tokio::test]
async fn a_veto_that_comes_late_holds_and_holds_for_its_volumes_only() {
    let meta = cluster(3).await;
    for n in 1..=2 {
        create(&meta, n, 3).await.unwrap();
    }
    // All are node 1's; of the second volume node 3 has no part.
    for (id, copies) in [(volume_id(1), 3), (volume_id(2), 2)] {
        let member = |n| MemberRecord { store: store_id(n), incarnation: 1, node: node_id(n), shards: 1 };
        let record = HeadsRecord::new((1..=copies).map(member).collect(), node_id(1), 0, 0);
        meta.txn(Txn::new().put(keys::heads(id), encode(&record))).await.unwrap();
    }
    for n in 1..=3 {
        round(&meta, n, &[1]).await;
    }
    let batches = takeover::batches(&view(&meta).await, node_id(2), &[volume_id(1), volume_id(2)]);
    assert_eq!(batches.len(), 1);
    let vetoes = StatusRecord { granting: vec![node_id(1)], ..StatusRecord::default() };
    meta.txn(Txn::new().put(keys::status(node_id(3)), encode(&vetoes))).await.unwrap();
    assert!(takeover::commit(&meta, &batches[0]).await.unwrap().is_some());
    let after = view(&meta).await;
    let takeover = |n| after.heads[&volume_id(n)].record.takeover;
    assert_eq!((takeover(1), takeover(2)), (1, 2));
}

#[tokio::test]
async fn take_overs_of_one_event_go_together() {
    let meta = cluster(3).await;
    for n in 1..=200 {
        let new = NewVolume { size: 4 * MIB, ..new_volume(n, 3, None) };
        change(&meta, |v| ops::create_volume(v, &new)).await.unwrap();
    }
    let mut seen = view(&meta).await;
    let due: Vec<_> = seen.heads.keys().copied().collect();
    for heads in seen.heads.values_mut() {
        heads.record.head = node_id(1);
    }
    let sizes: Vec<_> =
        takeover::batches(&seen, node_id(2), &due).iter().map(|b| b.volumes().count()).collect();
    assert_eq!(
        sizes,
        [MAX_TXN_OPS - 1, 200 - (MAX_TXN_OPS - 1)],
        "one comparison is the third node's status"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whoever tries, in whatever order, on however old a view: one revision elects one head, and none against a veto.
    #[test]
    fn one_revision_elects_one_head_and_none_against_a_veto(
        attempts in proptest::collection::vec((2_u8..5, any::<bool>()), 1..12),
        vetoes in proptest::collection::vec((2_u8..5, any::<bool>()), 0..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let meta = cluster(4).await;
            create(&meta, 1, 4).await.unwrap();
            for n in 1..=4 {
                round(&meta, n, &[1, 2, 3, 4]).await;
            }
            let mut elected: BTreeMap<Revision, Vec<u8>> = BTreeMap::new();
            let old = view(&meta).await;
            let mut vetoes = vetoes.into_iter();
            for (n, looks_again) in attempts {
                // Somebody begins or ceases to grant, which the one who tries has not seen.
                let seen = if looks_again { view(&meta).await } else { old.clone() };
                let head = heads(&seen).head;
                if let Some((by, grants)) = vetoes.next() {
                    let granting = if grants { vec![head] } else { Vec::new() };
                    let status = StatusRecord { granting, ..StatusRecord::default() };
                    meta.txn(Txn::new().put(keys::status(node_id(by)), encode(&status))).await.unwrap();
                }
                let now = view(&meta).await;
                let others = (2..=4).filter(|other| *other != n && node_id(*other) != head);
                let vetoed = others.clone().any(|other| now.status[&node_id(other)].granting.contains(&head));
                for batch in takeover::batches(&seen, node_id(n), &[volume_id(1)]) {
                    let revision = seen.heads[&volume_id(1)].revision;
                    if takeover::commit(&meta, &batch).await.unwrap().is_some() {
                        elected.entry(revision).or_default().push(n);
                        prop_assert!(!vetoed, "node {n} against a veto");
                    } else {
                        let moved = now.heads[&volume_id(1)].revision != revision;
                        prop_assert!(moved || vetoed, "node {n} was not elected though it could be");
                    }
                }
            }
            prop_assert!(elected.values().all(|by| by.len() == 1), "{elected:?}");
            let last = u64::try_from(elected.len()).unwrap() + 1;
            prop_assert_eq!(heads(&view(&meta).await).takeover, last);
            Ok(())
        })?;
    }
}
