//! Changes of the cluster and the API, on the metadata store in memory with its faults.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::Arc;

use cluster_map::{
    Allow, AoePolicy, ClusterId, Desired, EVERY_INTERFACE, ExportState, MAX_PATH_BYTES, NodeId, Observed,
    ObservedExport, ObservedStore, ObservedVolume, ScrubObserved, ScrubState, ScrubWish, StoreId, StoreState,
    VolumeId, VolumeIntent, VolumeObserved, WritePath,
};
use hyper::Method;
use serde_json::{Value, json};
use tokio::sync::watch;
use torus_control::api;
use torus_control::client::{Client, ClientError, Endpoint};
use torus_control::known::Known;
use torus_control::meta::memory::{MemoryStore, TxnFault};
use torus_control::meta::{Compare, MetaStore, Txn, TxnOutcome};
use torus_control::model::{
    Address, LiveRecord, NodeRecord, PREFIX, StatusRecord, StoreRecord, StoreSpec, View, VolumeState, encode,
    keys,
};
use torus_control::node::{Node, SessionEnd, session};
use torus_control::ops::{self, NewExport, NewVolume, Plan, Refusal, RefusalKind};
use torus_control::reconcile::{self, Settings};
use torus_control::settings::Who;
use torus_control::supervise::DataPlane;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

fn node_id(n: u8) -> NodeId {
    NodeId([n; 16])
}

fn store_id(n: u8) -> StoreId {
    StoreId([n; 16])
}

fn volume_id(n: u8) -> VolumeId {
    VolumeId([n; 16])
}

async fn view(meta: &MemoryStore) -> View {
    View::read(&meta.list(PREFIX).await.unwrap().entries).unwrap()
}

fn record(n: u8) -> NodeRecord {
    NodeRecord {
        name: format!("n{n}"),
        zone: String::new(),
        peer_addr: String::new(),
        cores: 0,
        api_addr: "127.0.0.1:4321".into(),
        stores: vec![StoreSpec { path: format!("/s{n}"), size: 0 }],
    }
}

/// What the data plane of node `n` reports when everything that is desired is there.
fn obedient(desired: &Desired, n: u8) -> Observed {
    let stores = desired.stores.iter().map(|s| ObservedStore {
        path: s.path.clone(),
        id: Some(s.id.unwrap_or(store_id(n))),
        state: StoreState::Ready,
        capacity_bytes: GIB,
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
    Observed {
        version: 1,
        applied: desired.version,
        pid: 1,
        stores: stores.collect(),
        volumes: volumes.collect(),
        exports: exports.collect(),
        ..Observed::default()
    }
}

fn settings() -> Settings {
    Settings { interfaces: vec!["eth0".into(), "eth0@100".into(), "eth1".into()], ..Settings::default() }
}

/// One round of node `n`: desired state out, observed state in.
async fn converge(meta: &MemoryStore, n: u8) -> Desired {
    let mut published = Desired::default();
    for version in 1..8 {
        let now = view(meta).await;
        published = reconcile::desired(&now, node_id(n), &settings()).unwrap();
        published.version = version;
        let observed = obedient(&published, n);
        let status = reconcile::status(&published, &observed, "running");
        let live = LiveRecord { pid: 1, version: "1".into(), boot: String::new() };
        let report = Txn::new()
            .put(keys::status(node_id(n)), encode(&status))
            .put(keys::live(node_id(n)), encode(&live));
        assert!(meta.txn(report).await.unwrap().committed());
        for txn in reconcile::changes(&now, node_id(n), &published, &observed, 5) {
            // A conflict with a change that is made meanwhile is resolved in the next round.
            meta.txn(txn).await.unwrap();
        }
    }
    published
}

async fn change<T>(
    meta: &MemoryStore,
    plan: impl FnMut(&View) -> Result<Plan<T>, Refusal>,
) -> Result<T, Refusal> {
    ops::apply(meta, None, plan).await.map(|(answer, _)| answer)
}

/// A cluster of `nodes`, each with one ready store of 1 GiB.
async fn cluster(nodes: u8) -> MemoryStore {
    let meta = MemoryStore::new();
    let done = change(&meta, |v| ops::init(v, ClusterId([9; 16]), 4 * MIB, 1)).await.unwrap();
    assert!(done.created);
    for n in 1..=nodes {
        change(&meta, |v| ops::join(v, node_id(n), &record(n))).await.unwrap();
        converge(&meta, n).await;
    }
    meta
}

fn new_volume(n: u8, name: &str, size: u64) -> NewVolume {
    NewVolume { id: volume_id(n), name: name.into(), size, copies: Some(1), min_copies: None, now_unix_s: 3 }
}

async fn create(meta: &MemoryStore, n: u8, name: &str, size: u64) -> Result<(), Refusal> {
    let new = new_volume(n, name, size);
    change(meta, |v| ops::create_volume(v, &new)).await.map(|_| ())
}

fn at(volume: &str, address: Option<&str>) -> NewExport {
    NewExport { volume: volume.into(), address: address.map(|a| a.parse().unwrap()), ..NewExport::default() }
}

async fn export(meta: &MemoryStore, volume: &str, address: Option<&str>) -> Result<Address, Refusal> {
    let new = at(volume, address);
    change(meta, |v| ops::export(v, &new)).await
}

async fn unexport(meta: &MemoryStore, volume: &str) -> Result<Address, Refusal> {
    let mut seen = None;
    change(meta, |v| ops::unexport(v, volume, &mut seen)).await
}

async fn delete(meta: &MemoryStore, volume: &str) -> Result<VolumeId, Refusal> {
    let mut seen = None;
    change(meta, |v| ops::delete_volume(v, volume, &mut seen)).await
}

fn code<T: std::fmt::Debug>(result: Result<T, Refusal>) -> &'static str {
    result.unwrap_err().code
}

#[tokio::test]
async fn a_volume_lives_from_creating_to_its_tombstone() {
    let meta = cluster(1).await;
    create(&meta, 1, "v", 5 * MIB).await.unwrap();
    let seen = view(&meta).await;
    let (_, volume) = seen.volume("v").unwrap();
    assert_eq!((volume.record.size, volume.record.state), (8 * MIB, VolumeState::Creating));
    let desired = converge(&meta, 1).await;
    assert_eq!(desired.volumes[0].size_sectors, 8 * MIB / 512);
    assert_eq!(view(&meta).await.volume("v").unwrap().1.record.state, VolumeState::Ready);

    let address = export(&meta, "v", None).await.unwrap();
    assert_eq!(address.to_string(), "1.1");
    let desired = converge(&meta, 1).await;
    assert_eq!((desired.exports[0].shelf, desired.exports[0].slot), (1, 1));
    assert_eq!(desired.exports[0].mac[5] & 0xf, 0);
    assert_eq!(code(delete(&meta, "v").await), "exported");

    unexport(&meta, "v").await.unwrap();
    assert_eq!(code(delete(&meta, "v").await), "exported", "the node has not confirmed yet");
    assert_eq!(code(export(&meta, "v", None).await), "export_ending");
    converge(&meta, 1).await;
    let seen = view(&meta).await;
    assert!(seen.exports.is_empty() && seen.macs.is_empty());
    assert_eq!(seen.volume("v").unwrap().1.record.export, None);

    delete(&meta, "v").await.unwrap();
    assert_eq!(code(create(&meta, 2, "v", MIB).await), "name_taken", "its data is still there");
    assert_eq!(code(export(&meta, "v", None).await), "purging");
    converge(&meta, 1).await;
    let seen = view(&meta).await;
    assert!(seen.volumes.is_empty() && seen.names.is_empty());
    assert_eq!(seen.tombstones[&volume_id(1)].name, "v");
    create(&meta, 2, "v", MIB).await.unwrap();
}

#[tokio::test]
async fn names_and_addresses_are_unique_among_racing_requests() {
    let meta = cluster(3).await;
    let tasks: Vec<_> = (1..=8u8)
        .map(|n| {
            let meta = meta.clone();
            tokio::spawn(async move { create(&meta, n, "same", MIB).await.is_ok() })
        })
        .collect();
    let mut won = 0;
    for task in tasks {
        won += u8::from(task.await.unwrap());
    }
    assert_eq!(won, 1);
    for n in 10..18 {
        create(&meta, n, &format!("v{n}"), MIB).await.unwrap();
    }
    let tasks: Vec<_> = (10..18u8)
        .map(|n| {
            let meta = meta.clone();
            tokio::spawn(async move { export(&meta, &format!("v{n}"), (n % 2 == 0).then_some("7.7")).await })
        })
        .collect();
    let mut addresses = BTreeMap::new();
    for task in tasks {
        match task.await.unwrap() {
            Ok(address) => *addresses.entry(address).or_insert(0) += 1,
            Err(refusal) => assert_eq!(refusal.code, "address_taken"),
        }
    }
    assert_eq!(addresses.len(), 5, "four that took any, one at 7.7: {addresses:?}");
    assert!(addresses.values().all(|count| *count == 1));
    let seen = view(&meta).await;
    assert_eq!(seen.macs.len(), 5);
}

#[tokio::test]
async fn a_store_is_never_overcommitted_by_racing_requests() {
    let meta = cluster(1).await;
    let tasks: Vec<_> = (1..=10u8)
        .map(|n| {
            let meta = meta.clone();
            tokio::spawn(async move { create(&meta, n, &format!("v{n}"), 300 * MIB).await })
        })
        .collect();
    let mut made = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(()) => made += 1,
            Err(refusal) => assert_eq!(refusal.kind, RefusalKind::NoSpace, "{refusal}"),
        }
    }
    assert_eq!(made, 3);
    let mut grow =
        |v: &View| ops::resize_volume(v, &v.volumes.values().next().unwrap().record.name, 400 * MIB, false);
    converge(&meta, 1).await;
    change(&meta, &mut grow).await.unwrap();
    let twice = change(&meta, |v| {
        let last = v.volumes.values().last().unwrap();
        ops::resize_volume(v, &last.record.name, 400 * MIB, false)
    });
    assert_eq!(code(twice.await), "no_space");
}

#[tokio::test]
async fn an_unknown_outcome_is_resolved_by_reading_back() {
    for fault in [TxnFault::AnswerLost, TxnFault::RequestLost] {
        let meta = cluster(1).await;
        meta.fail_txn(fault);
        create(&meta, 1, "v", MIB).await.unwrap();
        converge(&meta, 1).await;
        meta.fail_txn(fault);
        assert_eq!(export(&meta, "v", None).await.unwrap().to_string(), "1.1");
        meta.fail_txn(fault);
        assert_eq!(unexport(&meta, "v").await.unwrap().to_string(), "1.1");
        converge(&meta, 1).await;
        meta.fail_txn(fault);
        let grown = change(&meta, |v| ops::resize_volume(v, "v", 20 * MIB, false)).await.unwrap();
        assert_eq!(grown.size, 20 * MIB);
        meta.fail_txn(fault);
        delete(&meta, "v").await.unwrap();
        let mut seen = false;
        converge(&meta, 1).await;
        meta.fail_txn(fault);
        change(&meta, |v| ops::remove_store(v, "n1", "/s1", &mut seen)).await.unwrap();
        let seen = view(&meta).await;
        assert!(seen.volumes.is_empty() && seen.stores.is_empty() && seen.tombstones.len() == 1);
        let again = change(&meta, |v| ops::init(v, ClusterId([7; 16]), 4 * MIB, 1)).await.unwrap();
        assert!(!again.created);
    }
}

#[tokio::test]
async fn an_unknown_outcome_that_cannot_be_resolved_is_said() {
    let meta = cluster(1).await;
    let gone = meta.clone();
    meta.fail_txn(TxnFault::AnswerLost);
    let new = new_volume(1, "v", MIB);
    let mut tried = false;
    let refusal = change(&meta, |v| {
        if std::mem::replace(&mut tried, true) {
            gone.set_available(false);
            // What the next plan asks for cannot be committed any more.
            return Ok(Plan::Commit(Txn::new().when(Compare::Exists("x".into())), ()));
        }
        ops::create_volume(v, &new).map(|plan| match plan {
            Plan::Commit(txn, _) => Plan::Commit(txn, ()),
            Plan::Done(_) => Plan::Done(()),
        })
    })
    .await
    .unwrap_err();
    assert_eq!(refusal.code, "outcome_unknown");
    meta.set_available(true);
    assert!(view(&meta).await.volume("v").is_some());
}

#[tokio::test]
async fn without_the_store_nothing_changes() {
    let meta = cluster(1).await;
    meta.set_available(false);
    let refusal = create(&meta, 1, "v", MIB).await.unwrap_err();
    assert_eq!((refusal.kind, refusal.code), (RefusalKind::Unavailable, "metadata_unavailable"));
    assert!(!refusal.hint.is_empty());
}

#[tokio::test]
async fn bad_requests_are_refused_with_their_reason() {
    let meta = cluster(3).await;
    assert_eq!(code(create(&meta, 1, "-v", MIB).await), "bad_name");
    assert_eq!(code(create(&meta, 1, "v", 0).await), "bad_size");
    assert_eq!(code(create(&meta, 1, "v", u64::MAX).await), "bad_size");
    assert_eq!(code(create(&meta, 1, "v", 2 * GIB).await), "no_space");
    let default = NewVolume { copies: None, ..new_volume(1, "v", MIB) };
    let refusal = change(&meta, |v| ops::create_volume(v, &default)).await.unwrap_err();
    assert_eq!(refusal.code, "replication_missing");
    assert!(refusal.message.contains("3 copies are the default here") && refusal.hint.contains("--copies 1"));
    let none = NewVolume { copies: Some(0), ..new_volume(1, "v", MIB) };
    assert_eq!(code(change(&meta, |v| ops::create_volume(v, &none)).await), "bad_copies");
    assert_eq!(code(delete(&meta, "v").await), "no_such_volume");
    assert_eq!(code(export(&meta, "v", None).await), "no_such_volume");

    create(&meta, 1, "v", 8 * MIB).await.unwrap();
    assert_eq!(code(change(&meta, |v| ops::resize_volume(v, "v", GIB, false)).await), "not_ready");
    assert_eq!(code(unexport(&meta, "v").await), "not_exported");
    for n in 1..=3 {
        converge(&meta, n).await;
    }
    assert_eq!(code(change(&meta, |v| ops::resize_volume(v, "v", MIB, false)).await), "would_lose_data");
    export(&meta, "v", Some("1.1")).await.unwrap();
    assert_eq!(
        export(&meta, "v", Some("1.1")).await.unwrap().to_string(),
        "1.1",
        "the same again is done already"
    );
    assert_eq!(code(export(&meta, "v", Some("1.2")).await), "exported");
    assert_eq!(code(change(&meta, |v| ops::resize_volume(v, "v", MIB, true)).await), "exported");
    let missing = NewExport { interfaces: vec!["eth9".into()], ..at("v", None) };
    assert_eq!(code(change(&meta, |v| ops::export(v, &missing)).await), "no_such_interface");
    let mut seen = false;
    let (_, volume) = view(&meta).await.volume("v").map(|(id, v)| (id, v.record.clone())).unwrap();
    let node = volume.node.unwrap().to_string();
    let in_use =
        change(&meta, |v| ops::remove_store(v, &node, &volume.store.unwrap().to_string(), &mut seen)).await;
    assert_eq!(code(in_use), "store_in_use");
    let taken = NodeRecord { name: "n1".into(), ..record(5) };
    assert_eq!(code(change(&meta, |v| ops::join(v, node_id(5), &taken)).await), "node_name_taken");
    for path in ["relative", "/tab\t", &format!("/{}", "x".repeat(MAX_PATH_BYTES))] {
        let spec = StoreSpec { path: path.into(), size: 0 };
        assert_eq!(code(change(&meta, |v| ops::add_store(v, "n1", &spec)).await), "bad_path");
    }
    let empty = MemoryStore::new();
    assert_eq!(code(create(&empty, 1, "v", MIB).await), "not_initialised");
    assert_eq!(
        code(change(&empty, |v| ops::init(v, ClusterId([1; 16]), 3 * MIB, 0)).await),
        "bad_extent_size"
    );
}

#[tokio::test]
async fn an_export_is_bound_to_interfaces_of_its_node() {
    let meta = cluster(1).await;
    create(&meta, 1, "v", MIB).await.unwrap();
    let bound = |names: &[&str]| NewExport {
        interfaces: names.iter().map(|n| (*n).into()).collect(),
        ..at("v", None)
    };
    let try_bound = async |names: &[&str]| {
        let new = bound(names);
        change(&meta, |v| ops::export(v, &new)).await
    };
    let refusal = try_bound(&["eth0", "eth0@7"]).await.unwrap_err();
    assert_eq!(refusal.code, "no_such_interface");
    assert!(refusal.message.contains("eth0, eth0@100, eth1"), "{refusal}");
    for bad in [&["eth0", "eth0"][..], &["eth0@0"], &["a/b"]] {
        assert_eq!(code(try_bound(bad).await), "bad_interface");
    }
    let address = try_bound(&["eth1", "eth0@100"]).await.unwrap();
    assert_eq!(try_bound(&["eth0@100", "eth1"]).await.unwrap(), address, "the same again is done already");
    assert_eq!(code(try_bound(&["eth1"]).await), "exported");
    assert_eq!(converge(&meta, 1).await.exports[0].on_interfaces, 0b110);

    // A node that serves on neither any more says so.
    let now = view(&meta).await;
    let elsewhere = Settings { interfaces: vec!["eth2".into()], ..Settings::default() };
    let published = reconcile::desired(&now, node_id(1), &elsewhere).unwrap();
    assert_eq!(published.exports[0].on_interfaces, 0);
    let status = reconcile::status(&published, &obedient(&published, 1), "running");
    assert!(status.serving.is_empty());
    assert!(status.exports[0].state == "failed" && status.exports[0].error.contains("--interface"));
}

#[tokio::test]
async fn settings_reach_the_data_plane() {
    let meta = cluster(1).await;
    create(&meta, 1, "v", MIB).await.unwrap();
    let set = async |name: &str| {
        change(&meta, |v| {
            ops::set_export(v, name, |settings| {
                settings.config_string = r"a\x00".parse()?;
                settings.masks = vec!["02:00:00:00:00:01".parse()?];
                settings.reserved_for = vec!["02:00:00:00:00:02".parse()?];
                settings.policy.masks = Who::Anyone;
                Ok(())
            })
        })
        .await
    };
    assert_eq!(code(set("v").await), "not_exported");
    assert_eq!(code(set("w").await), "no_such_volume");
    let address = export(&meta, "v", None).await.unwrap();
    assert_eq!(set("v").await.unwrap(), address);
    let before = view(&meta).await.exports[&address].revision;
    assert_eq!(set("1.1").await.unwrap(), address);
    assert_eq!(view(&meta).await.exports[&address].revision, before, "nothing is written twice");
    let published = converge(&meta, 1).await;
    let wish = &published.exports[0];
    assert_eq!((wish.on_interfaces, wish.config_string.as_slice()), (EVERY_INTERFACE, &b"a\0"[..]));
    assert_eq!((&wish.masks, &wish.reserved_for), (&vec![[2, 0, 0, 0, 0, 1]], &vec![[2, 0, 0, 0, 0, 2]]));
    assert_eq!(wish.allow, AoePolicy { masks: Allow::Anyone, ..AoePolicy::default() });
    unexport(&meta, "v").await.unwrap();
    assert_eq!(code(set("v").await), "export_ending");
}

#[tokio::test]
async fn stores_come_and_go_with_their_node() {
    let meta = cluster(1).await;
    let spec = StoreSpec { path: "/more".into(), size: GIB };
    change(&meta, |v| ops::add_store(v, "n1", &spec)).await.unwrap();
    let desired = reconcile::desired(&view(&meta).await, node_id(1), &Settings::default()).unwrap();
    let paths: Vec<_> = desired.stores.iter().map(|s| (s.path.as_str(), s.id)).collect();
    assert_eq!(paths, [("/more", None), ("/s1", Some(store_id(1)))]);
    let grown = StoreSpec { size: 2 * GIB, ..spec.clone() };
    assert_eq!(code(change(&meta, |v| ops::add_store(v, "n1", &grown)).await), "store_exists");
    // A restart with the flags of the first start keeps what was opened since, and forgets what never could be.
    let opened = StoreRecord { node: node_id(1), path: "/more".into(), size: GIB };
    meta.txn(Txn::new().put(keys::store(store_id(4)), encode(&opened))).await.unwrap();
    let wrong = StoreSpec { path: "/wrong".into(), size: GIB };
    change(&meta, |v| ops::add_store(v, "n1", &wrong)).await.unwrap();
    let joined = change(&meta, |v| ops::join(v, node_id(1), &record(1))).await.unwrap();
    assert_eq!(joined.stores.iter().map(|s| s.path.as_str()).collect::<Vec<_>>(), ["/more", "/s1"]);
    let mut seen = false;
    change(&meta, |v| ops::remove_store(v, "n1", "/more", &mut seen)).await.unwrap();
    let mut seen = false;
    assert_eq!(
        code(change(&meta, |v| ops::remove_store(v, "n1", "/more", &mut seen)).await),
        "no_such_store"
    );
    // A report that is older than the removal must not bring the record back.
    let mut late = obedient(&desired, 1);
    late.stores[0].id = Some(store_id(8));
    assert!(reconcile::changes(&view(&meta).await, node_id(1), &desired, &late, 0).is_empty());
}

#[tokio::test]
async fn a_node_changes_its_name_and_frees_the_old_one() {
    let meta = cluster(1).await;
    let renamed = NodeRecord { name: "other".into(), ..record(1) };
    change(&meta, |v| ops::join(v, node_id(1), &renamed)).await.unwrap();
    let seen = view(&meta).await;
    assert_eq!(seen.node_names.keys().collect::<Vec<_>>(), ["other"]);
    let newcomer = NodeRecord { name: "n1".into(), ..record(2) };
    change(&meta, |v| ops::join(v, node_id(2), &newcomer)).await.unwrap();
}

/// What a data plane says about a volume that is not recorded as it says must change nothing.
#[tokio::test]
async fn reports_delete_only_what_is_recorded_as_purging() {
    let meta = cluster(2).await;
    create(&meta, 1, "v", MIB).await.unwrap();
    for n in 1..=2 {
        converge(&meta, n).await;
    }
    let seen = view(&meta).await;
    let (id, volume) = seen.volume("v").unwrap();
    let holder = volume.record.node.unwrap().0[0];
    let mut desired = reconcile::desired(&seen, volume.record.node.unwrap(), &Settings::default()).unwrap();
    desired.version = 4;
    let mut observed = obedient(&desired, holder);
    observed.volumes[0].state = VolumeObserved::Purged;
    assert!(
        reconcile::changes(&seen, volume.record.node.unwrap(), &desired, &observed, 0).is_empty(),
        "not purging"
    );

    delete(&meta, "v").await.unwrap();
    let purging = view(&meta).await;
    assert!(
        reconcile::changes(&purging, volume.record.node.unwrap(), &desired, &observed, 0).is_empty(),
        "purged before it was asked to"
    );
    let mut asked = reconcile::desired(&purging, volume.record.node.unwrap(), &Settings::default()).unwrap();
    asked.version = 5;
    let other = node_id(3 - holder);
    assert!(reconcile::changes(&purging, other, &asked, &observed, 0).is_empty(), "another node's report");
    let orphan =
        ObservedVolume { id: volume_id(77), state: VolumeObserved::Orphan, ..observed.volumes[0].clone() };
    let vanished = Observed { volumes: vec![orphan], ..observed.clone() };
    assert!(
        reconcile::changes(&purging, volume.record.node.unwrap(), &asked, &vanished, 0).is_empty(),
        "not found"
    );
    let done = reconcile::changes(&purging, volume.record.node.unwrap(), &asked, &observed, 0);
    assert_eq!(done.len(), 1);
    assert!(meta.txn(done[0].clone()).await.unwrap().committed());
    assert!(!view(&meta).await.volumes.contains_key(&id));
}

#[tokio::test]
async fn an_address_is_free_only_after_its_node_has_let_go() {
    let meta = cluster(1).await;
    create(&meta, 1, "v", MIB).await.unwrap();
    create(&meta, 2, "w", MIB).await.unwrap();
    converge(&meta, 1).await;
    export(&meta, "v", Some("1.1")).await.unwrap();
    let served = converge(&meta, 1).await;
    unexport(&meta, "v").await.unwrap();
    assert_eq!(code(export(&meta, "w", Some("1.1")).await), "address_taken");
    let ending = view(&meta).await;
    let mut without = reconcile::desired(&ending, node_id(1), &Settings::default()).unwrap();
    assert!(without.exports.is_empty());
    without.version = served.version + 1;
    let still_old = obedient(&served, 1);
    assert!(reconcile::changes(&ending, node_id(1), &without, &still_old, 0).is_empty(), "not applied yet");
    let mut still_there = obedient(&without, 1);
    still_there.exports = still_old.exports.clone();
    assert!(reconcile::changes(&ending, node_id(1), &without, &still_there, 0).is_empty(), "still reported");
    assert!(reconcile::changes(&ending, node_id(1), &served, &still_old, 0).is_empty(), "still published");
    let gone = reconcile::changes(&ending, node_id(1), &without, &obedient(&without, 1), 0);
    assert_eq!(
        meta.txn(gone[0].clone()).await.unwrap(),
        TxnOutcome::Committed(meta.list("").await.unwrap().revision)
    );
    assert_eq!(export(&meta, "w", Some("1.1")).await.unwrap().to_string(), "1.1");
}

async fn start_scrub(
    meta: &MemoryStore,
    store: &str,
    rate: Option<u64>,
    resume: bool,
) -> Result<StoreId, Refusal> {
    change(meta, |v| ops::start_scrub(v, store, rate, resume, 7)).await
}

async fn stop_scrub(meta: &MemoryStore, store: &str) -> Result<StoreId, Refusal> {
    change(meta, |v| ops::stop_scrub(v, store)).await
}

/// What the data plane of node 1 says when its scrub is as given; what follows is recorded.
async fn report_scrub(meta: &MemoryStore, scrub: ScrubObserved) {
    let now = view(meta).await;
    let mut published = reconcile::desired(&now, node_id(1), &settings()).unwrap();
    published.version = 1;
    let mut observed = obedient(&published, 1);
    observed.stores[0].scrub = Some(scrub);
    let status = reconcile::status(&published, &observed, "running");
    meta.txn(Txn::new().put(keys::status(node_id(1)), encode(&status))).await.unwrap();
    for txn in reconcile::changes(&now, node_id(1), &published, &observed, 9) {
        assert!(meta.txn(txn).await.unwrap().committed());
    }
}

async fn scrub_wish(meta: &MemoryStore) -> Option<ScrubWish> {
    reconcile::desired(&view(meta).await, node_id(1), &settings()).unwrap().stores[0].scrub
}

#[tokio::test]
async fn a_scrub_is_begun_changed_stopped_resumed_and_finished_once() {
    let meta = cluster(2).await;
    let wish = |run, rate_bytes_per_s, stopped| Some(ScrubWish { run, rate_bytes_per_s, stopped });
    assert_eq!(scrub_wish(&meta).await, None);
    assert_eq!(code(start_scrub(&meta, "/none", None, false).await), "no_such_store");
    assert_eq!(code(start_scrub(&meta, "/s1", Some(0), false).await), "bad_rate");
    assert_eq!(code(start_scrub(&meta, "/s1", None, true).await), "no_scrub");
    assert_eq!(code(stop_scrub(&meta, "/s1").await), "no_scrub");

    assert_eq!(start_scrub(&meta, "/s1", None, false).await.unwrap(), store_id(1));
    assert_eq!(scrub_wish(&meta).await, wish(1, ops::DEFAULT_SCRUB_RATE, false));
    let other = reconcile::desired(&view(&meta).await, node_id(2), &settings()).unwrap();
    assert_eq!(other.stores[0].scrub, None, "another node's store");
    let before = view(&meta).await.scrubs[&store_id(1)].revision;
    start_scrub(&meta, "/s1", None, false).await.unwrap();
    assert_eq!(view(&meta).await.scrubs[&store_id(1)].revision, before, "it runs as asked for");
    start_scrub(&meta, &store_id(1).to_string(), Some(MIB), false).await.unwrap();
    assert_eq!(scrub_wish(&meta).await, wish(1, MIB, false), "the same run at another rate");

    stop_scrub(&meta, "/s1").await.unwrap();
    stop_scrub(&meta, "/s1").await.unwrap();
    assert_eq!(scrub_wish(&meta).await, wish(1, MIB, true));
    start_scrub(&meta, "/s1", None, true).await.unwrap();
    assert_eq!(scrub_wish(&meta).await, wish(1, MIB, false));

    // A run that is not the one asked for ends nothing.
    let seen = |run, state| ScrubObserved { run, state, done_bytes: GIB, total_bytes: GIB, errors: 3 };
    report_scrub(&meta, seen(1, ScrubState::Running)).await;
    let status = view(&meta).await.store_status(store_id(1)).unwrap().scrub.clone().unwrap();
    assert_eq!((status.state.as_str(), status.done, status.errors), ("running", GIB, 3));
    report_scrub(&meta, seen(0, ScrubState::Finished)).await;
    assert_eq!(scrub_wish(&meta).await, wish(1, MIB, false));
    report_scrub(&meta, seen(1, ScrubState::Finished)).await;
    assert_eq!(scrub_wish(&meta).await, None, "it is not done again");
    let result = view(&meta).await.scrubs[&store_id(1)].record.finished.unwrap();
    assert_eq!((result.unix_s, result.bytes, result.errors), (9, GIB, 3));
    assert_eq!(code(start_scrub(&meta, "/s1", None, true).await), "no_scrub");
    assert_eq!(code(stop_scrub(&meta, "/s1").await), "no_scrub");

    // Finished, but not recorded yet: who asks then wants another run.
    let early = cluster(1).await;
    start_scrub(&early, "/s1", None, false).await.unwrap();
    let now = view(&early).await;
    let mut published = reconcile::desired(&now, node_id(1), &settings()).unwrap();
    published.version = 1;
    let mut observed = obedient(&published, 1);
    observed.stores[0].scrub = Some(seen(1, ScrubState::Finished));
    let status = reconcile::status(&published, &observed, "running");
    early.txn(Txn::new().put(keys::status(node_id(1)), encode(&status))).await.unwrap();
    let late = reconcile::changes(&now, node_id(1), &published, &observed, 9);
    start_scrub(&early, "/s1", None, false).await.unwrap();
    assert_eq!(scrub_wish(&early).await.unwrap().run, 2);
    assert!(
        !early.txn(late[0].clone()).await.unwrap().committed(),
        "the result of run 1 is not that of run 2"
    );

    // The next run has a number that is new to the record and to the data plane.
    start_scrub(&meta, "/s1", None, false).await.unwrap();
    assert_eq!(scrub_wish(&meta).await, wish(2, ops::DEFAULT_SCRUB_RATE, false));
    report_scrub(&meta, seen(40, ScrubState::Finished)).await;
    start_scrub(&meta, "/s1", None, false).await.unwrap();
    assert_eq!(scrub_wish(&meta).await, wish(41, ops::DEFAULT_SCRUB_RATE, false));
    stop_scrub(&meta, "/s1").await.unwrap();
    start_scrub(&meta, "/s1", None, false).await.unwrap();
    assert_eq!(scrub_wish(&meta).await, wish(42, ops::DEFAULT_SCRUB_RATE, false), "anew, not resumed");
}

#[tokio::test]
async fn a_scrub_of_unknown_outcome_is_begun_once_and_survives_other_changes() {
    for fault in [TxnFault::AnswerLost, TxnFault::RequestLost] {
        let meta = cluster(1).await;
        meta.fail_txn(fault);
        start_scrub(&meta, "/s1", Some(MIB), false).await.unwrap();
        meta.fail_txn(fault);
        stop_scrub(&meta, "/s1").await.unwrap();
        create(&meta, 1, "v", MIB).await.unwrap();
        converge(&meta, 1).await;
        let wish = ScrubWish { run: 1, rate_bytes_per_s: MIB, stopped: true };
        assert_eq!(scrub_wish(&meta).await, Some(wish));
        // A store that goes and comes back goes on counting.
        delete(&meta, "v").await.unwrap();
        converge(&meta, 1).await;
        let mut seen = false;
        change(&meta, |v| ops::remove_store(v, "n1", "/s1", &mut seen)).await.unwrap();
        assert_eq!(code(start_scrub(&meta, "/s1", None, false).await), "no_such_store");
        change(&meta, |v| ops::join(v, node_id(1), &record(1))).await.unwrap();
        converge(&meta, 1).await;
        start_scrub(&meta, "/s1", None, false).await.unwrap();
        assert_eq!(scrub_wish(&meta).await.unwrap().run, 2);
    }
}

#[tokio::test]
async fn a_path_that_two_nodes_have_is_no_name_of_a_store() {
    let meta = cluster(2).await;
    let same = StoreRecord { node: node_id(2), path: "/s1".into(), size: GIB };
    meta.txn(Txn::new().put(keys::store(store_id(2)), encode(&same))).await.unwrap();
    assert_eq!(code(start_scrub(&meta, "/s1", None, false).await), "ambiguous_store");
    start_scrub(&meta, &store_id(2).to_string(), None, false).await.unwrap();
}

#[test]
fn progress_of_a_scrub_changes_the_status_once_a_second_at_most() {
    let scrub =
        |run, state, done_bytes| ScrubObserved { run, state, done_bytes, total_bytes: GIB, errors: 0 };
    let wish = ScrubWish { run: 1, rate_bytes_per_s: 10 * MIB, stopped: false };
    let store = cluster_map::DesiredStore {
        path: "/s".into(),
        scrub: Some(wish),
        ..cluster_map::DesiredStore::default()
    };
    let published = Desired { stores: vec![store], ..Desired::default() };
    let told = |scrub| {
        let store = ObservedStore {
            path: "/s".into(),
            writes: WritePath::InPlace,
            checksum_errors: 5,
            lost_blocks: 2,
            scrub: Some(scrub),
            ..ObservedStore::default()
        };
        let observed = Observed { stores: vec![store], ..Observed::default() };
        let status = reconcile::status(&published, &observed, "running").stores.remove(0);
        assert_eq!((status.writes.as_str(), status.checksum_errors, status.lost_blocks), ("in place", 5, 2));
        status.scrub.unwrap().done
    };
    assert_eq!(told(scrub(1, ScrubState::Running, 25 * MIB)), 20 * MIB);
    assert_eq!(told(scrub(1, ScrubState::Stopped, 25 * MIB)), 25 * MIB);
    assert_eq!(told(scrub(1, ScrubState::Finished, GIB)), GIB);
}

#[tokio::test]
async fn scrubs_are_asked_for_over_the_api() {
    let served = served(cluster(2).await).await;
    let path = format!("/v1/stores/{}/scrub", store_id(1));
    let ask = async |method: Method, body: Option<Value>| served.ask(method, &path, body).await;
    assert_eq!(ask(Method::GET, None).await.unwrap()["store"]["scrub"], Value::Null);
    assert_eq!(ask(Method::DELETE, None).await, Err("no_scrub".into()));
    assert_eq!(ask(Method::POST, Some(json!({"resume": true}))).await, Err("no_scrub".into()));
    for (rate, code) in [
        (json!("much"), "bad_rate"),
        (json!(0), "bad_rate"),
        (json!(-1), "malformed"),
        (json!([]), "malformed"),
    ] {
        assert_eq!(ask(Method::POST, Some(json!({"rate": rate}))).await, Err(code.into()));
    }
    assert_eq!(ask(Method::POST, Some(json!({"speed": 1}))).await, Err("malformed".into()));
    let begun = ask(Method::POST, Some(json!({}))).await.unwrap()["store"]["scrub"].clone();
    assert_eq!((&begun["run"], &begun["state"]), (&json!(1), &json!("waiting")));
    assert_eq!(begun["rate_bytes_per_s"], json!(64 * MIB));
    for (rate, bytes) in [(json!("100MiB"), 100 * MIB), (json!("3MiB/s"), 3 * MIB), (json!(4096), 4096)] {
        let answer = ask(Method::POST, Some(json!({"rate": rate}))).await.unwrap();
        let scrub = &answer["store"]["scrub"];
        assert_eq!((&scrub["run"], &scrub["rate_bytes_per_s"]), (&json!(1), &json!(bytes)));
    }
    let mut known = served.node.subscribe();
    let going =
        ScrubObserved { run: 1, state: ScrubState::Running, done_bytes: 0, total_bytes: 9, errors: 0 };
    report_scrub(&served.meta, going).await;
    let state = |view: &View| view.store_status(store_id(1)).and_then(|s| Some(s.scrub.clone()?.state));
    known.wait_for(|known| state(&known.view).as_deref() == Some("running")).await.unwrap();
    let running = ask(Method::GET, None).await.unwrap();
    assert_eq!(running["store"]["scrub"]["state"], "running");
    // While no data plane has the store open, it waits.
    let mut status = known.borrow_and_update().view.status[&node_id(1)].clone();
    status.stores[0].state = "opening".into();
    served.meta.txn(Txn::new().put(keys::status(node_id(1)), encode(&status))).await.unwrap();
    let opening = |view: &View| view.status[&node_id(1)].stores[0].state == "opening";
    known.wait_for(|known| opening(&known.view)).await.unwrap();
    assert_eq!(ask(Method::GET, None).await.unwrap()["store"]["scrub"]["state"], "waiting");
    let half = ScrubObserved { run: 1, state: ScrubState::Stopped, done_bytes: 5, total_bytes: 9, errors: 1 };
    report_scrub(&served.meta, half).await;
    let stopped = ask(Method::DELETE, None).await.unwrap();
    assert_eq!(stopped["store"]["scrub"]["state"], "stopped");
    let resumed = served.ask(Method::POST, "/v1/stores/%2Fs1/scrub", Some(json!({"resume": true}))).await;
    let scrub = &resumed.unwrap()["store"]["scrub"];
    assert_eq!(
        (&scrub["state"], &scrub["done_bytes"], &scrub["errors"]),
        (&json!("waiting"), &json!(5), &json!(1))
    );
    report_scrub(&served.meta, ScrubObserved { state: ScrubState::Finished, done_bytes: 9, ..half }).await;
    known.wait_for(|known| known.view.scrubs[&store_id(1)].record.finished.is_some()).await.unwrap();
    let list = served.ask(Method::GET, "/v1/stores", None).await.unwrap();
    let scrub = &list["stores"][0]["scrub"];
    assert_eq!((&scrub["state"], &scrub["done_bytes"]), (&json!("finished"), &json!(9)));
    assert_eq!(list["stores"][1]["scrub"], Value::Null);
    // Of a node that is away only what is recorded is known.
    let far = format!("/v1/stores/{}/scrub", store_id(2));
    served.meta.txn(Txn::new().delete(keys::live(node_id(2)))).await.unwrap();
    known.wait_for(|known| !known.view.live.contains_key(&node_id(2))).await.unwrap();
    let waits = served.ask(Method::POST, &far, Some(json!({}))).await.unwrap();
    assert_eq!(waits["store"]["scrub"]["state"], "unknown");
    let stopped = served.ask(Method::DELETE, &far, None).await.unwrap();
    assert_eq!(stopped["store"]["scrub"]["state"], "stopped");
}

struct Served {
    client: Client,
    meta: MemoryStore,
    node: Arc<Node>,
    _dir: tempfile::TempDir,
}

/// The API of node 1 over a unix socket; no data plane.
async fn served(meta: MemoryStore) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let (_, map) = watch::channel(None);
    let (_, data_plane) = watch::channel(DataPlane::Idle);
    let node = Node::start(node_id(1), "n1".into(), Arc::new(meta.clone()), map, data_plane);
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    tokio::spawn(api::serve_unix(listener, api::router(Arc::clone(&node))));
    node.subscribe().wait_for(|known| known.connected).await.unwrap();
    Served { client: Client::new(Some(Endpoint::Unix(socket))), meta, node, _dir: dir }
}

impl Served {
    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, String> {
        self.client.request(method, path, body.as_ref()).await.map_err(|error| match error {
            ClientError::Refused(detail) => detail.code,
            other => other.to_string(),
        })
    }
}

#[tokio::test]
async fn every_route_is_in_the_document_and_answers() {
    let served = served(cluster(1).await).await;
    let document = served.ask(Method::GET, "/v1/openapi.json", None).await.unwrap();
    let mut documented = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            documented.push(format!("{} {path}", method.to_uppercase()));
            let url = path.replace("{name}", "none").replace("{volume}", "none").replace("{id}", "none");
            let url = if url.ends_with("stores") && method == "delete" { url + "?store=x" } else { url };
            let verb: Method = method.to_uppercase().parse().unwrap();
            let body = (method != "get").then(|| json!({"no such": "field"}));
            let answer = served.ask(verb, &url, body).await;
            let code = answer.err().unwrap_or_default();
            assert!(!code.contains("HTTP status"), "{method} {path}: {code}");
            assert!(
                !(path.contains('{') && code == "malformed" && method == "get"),
                "{method} {path} has no route"
            );
        }
    }
    documented.sort();
    let expected = [
        "DELETE /v1/exports/{volume}",
        "DELETE /v1/nodes/{name}/stores",
        "DELETE /v1/stores/{id}/scrub",
        "DELETE /v1/volumes/{name}",
        "GET /v1/config",
        "GET /v1/config/{name}",
        "GET /v1/exports",
        "GET /v1/exports/{volume}",
        "GET /v1/exports/{volume}/clients",
        "GET /v1/exports/{volume}/config-string",
        "GET /v1/exports/{volume}/masks",
        "GET /v1/exports/{volume}/policy",
        "GET /v1/exports/{volume}/reservation",
        "GET /v1/metrics",
        "GET /v1/nodes",
        "GET /v1/nodes/{name}",
        "GET /v1/openapi.json",
        "GET /v1/status",
        "GET /v1/stores",
        "GET /v1/stores/{id}/scrub",
        "GET /v1/version",
        "GET /v1/volumes",
        "GET /v1/volumes/{name}",
        "PATCH /v1/exports/{volume}/masks",
        "PATCH /v1/exports/{volume}/policy",
        "PATCH /v1/volumes/{name}",
        "POST /v1/cluster/init",
        "POST /v1/exports",
        "POST /v1/nodes/{name}/stores",
        "POST /v1/stores/{id}/scrub",
        "POST /v1/volumes",
        "PUT /v1/config/{name}",
        "PUT /v1/exports/{volume}/config-string",
        "PUT /v1/exports/{volume}/masks",
        "PUT /v1/exports/{volume}/policy",
        "PUT /v1/exports/{volume}/reservation",
        "PUT /v1/volumes/{name}/head",
    ];
    assert_eq!(documented, expected);
    for schema in ["Volume", "Export", "Node", "ErrorBody"] {
        assert!(document["components"]["schemas"][schema].is_object(), "{schema}");
    }
}

#[tokio::test]
async fn malformed_requests_get_an_error_body_too() {
    let served = served(cluster(1).await).await;
    assert_eq!(served.ask(Method::GET, "/v1/nothing", None).await, Err("malformed".into()));
    assert_eq!(served.ask(Method::PUT, "/v1/volumes", None).await, Err("malformed".into()));
    let unknown = json!({"name": "v", "size_bytes": 1, "sise": 2});
    assert_eq!(served.ask(Method::POST, "/v1/volumes", Some(unknown)).await, Err("malformed".into()));
    let negative = json!({"name": "v", "size_bytes": -1});
    assert_eq!(served.ask(Method::POST, "/v1/volumes", Some(negative)).await, Err("malformed".into()));
    let huge = json!({"name": "v".repeat(100_000), "size_bytes": 1});
    assert_eq!(served.ask(Method::POST, "/v1/volumes", Some(huge)).await, Err("too_large".into()));
    let address = json!({"volume": "v", "address": "1.255"});
    assert_eq!(served.ask(Method::POST, "/v1/exports", Some(address)).await, Err("bad_address".into()));
}

#[tokio::test]
async fn what_was_written_is_read_at_once() {
    let served = served(cluster(1).await).await;
    let body = json!({"name": "v", "size_bytes": 5 * MIB});
    let made = served.ask(Method::POST, "/v1/volumes", Some(body.clone())).await.unwrap();
    assert_eq!(made["volume"]["state"], "creating");
    assert_eq!(made["volume"]["size_bytes"], 8 * MIB);
    let list = served.ask(Method::GET, "/v1/volumes", None).await.unwrap();
    assert_eq!(list["metadata"], "connected");
    assert_eq!(list["volumes"][0]["name"], "v");
    assert_eq!(served.ask(Method::POST, "/v1/volumes", Some(body)).await, Err("name_taken".into()));
    let export = json!({"volume": "v"});
    let made = served.ask(Method::POST, "/v1/exports", Some(export)).await.unwrap();
    assert_eq!(made["export"]["address"], "1.1");
    assert_eq!(made["export"]["device"], "/dev/etherd/e1.1");
    assert_eq!(served.ask(Method::GET, "/v1/nodes/self", None).await.unwrap()["node"]["name"], "n1");
}

#[tokio::test]
async fn settings_are_resources_of_their_export() {
    let served = served(cluster(1).await).await;
    served.ask(Method::POST, "/v1/volumes", Some(json!({"name": "v", "size_bytes": MIB}))).await.unwrap();
    let at = |setting: &str| format!("/v1/exports/v/{setting}");
    assert_eq!(served.ask(Method::GET, &at("masks"), None).await, Err("not_exported".into()));
    let body = json!({"volume": "v", "policy": {"config": "any"}});
    let made = served.ask(Method::POST, "/v1/exports", Some(body)).await.unwrap();
    let policy = json!({"config": "any", "masks": "none", "reserve": "none"});
    assert_eq!(made["export"]["policy"], policy);

    let (one, two) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
    let both = json!({"macs": [one, two]});
    let string = json!({"config_string": r"rack \\ 7\x00"});
    let cases = [
        (Method::PUT, "config-string", string.clone(), string.clone()),
        (Method::PUT, "masks", json!({"macs": [two]}), json!({"macs": [two]})),
        (Method::PATCH, "masks", json!({"add": [one], "remove": [two]}), json!({"macs": [one]})),
        (Method::PATCH, "masks", json!({"add": [two, one]}), both.clone()),
        (Method::PUT, "reservation", both.clone(), both.clone()),
        (
            Method::PATCH,
            "policy",
            json!({"masks": one}),
            json!({"config": "any", "masks": one, "reserve": "none"}),
        ),
        (
            Method::PUT,
            "policy",
            json!({"reserve": "any"}),
            json!({"config": "none", "masks": "none", "reserve": "any"}),
        ),
    ];
    for (method, setting, body, expected) in cases {
        let answer = served.ask(method, &at(setting), Some(body)).await.unwrap();
        assert_eq!(answer, expected, "{setting}");
        assert_eq!(served.ask(Method::GET, &at(setting), None).await.unwrap(), expected, "{setting}");
    }
    let bad = [
        ("config-string", json!({"config_string": "a\\"}), "bad_config_string"),
        ("config-string", json!({"config_string": "x".repeat(1025)}), "bad_config_string"),
        ("masks", json!({"macs": ["02:00"]}), "bad_mac"),
        ("reservation", json!({"macs": ["ff:ff:ff:ff:ff:ff"]}), "bad_mac"),
        ("policy", json!({"config": "everybody"}), "bad_mac"),
        ("masks", json!({"add": []}), "malformed"),
    ];
    for (setting, body, code) in bad {
        assert_eq!(served.ask(Method::PUT, &at(setting), Some(body)).await, Err(code.into()), "{setting}");
    }
    let shown = served.ask(Method::GET, "/v1/exports/1.1", None).await.unwrap();
    let export = &shown["export"];
    assert_eq!((&export["config_string"], &export["masks"]), (&string["config_string"], &both["macs"]));
    assert_eq!((&export["reserved_for"], &export["interfaces"]), (&both["macs"], &json!([])));
}

#[tokio::test]
async fn an_answer_waits_for_the_data_plane_if_asked_to() {
    let served = served(cluster(1).await).await;
    let meta = served.meta.clone();
    let data_plane = tokio::spawn(async move {
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            converge(&meta, 1).await;
        }
    });
    let body = json!({"name": "v", "size_bytes": MIB});
    let made = served.ask(Method::POST, "/v1/volumes?wait", Some(body)).await.unwrap();
    assert_eq!(made["volume"]["state"], "ready");
    let made = served.ask(Method::POST, "/v1/exports?wait=true", Some(json!({"volume": "v"}))).await.unwrap();
    assert_eq!(made["export"]["state"], "serving");
    let grown = served
        .ask(Method::PATCH, "/v1/volumes/v?wait=1", Some(json!({"size_bytes": 9 * MIB})))
        .await
        .unwrap();
    assert_eq!(
        (&grown["volume"]["state"], &grown["volume"]["size_bytes"]),
        (&json!("ready"), &json!(12 * MIB))
    );
    let ended = served.ask(Method::DELETE, "/v1/exports/v?wait", None).await.unwrap();
    assert_eq!(ended["export"], Value::Null);
    let gone = served.ask(Method::DELETE, "/v1/volumes/v?wait", None).await.unwrap();
    assert_eq!(gone["message"], "volume v is deleted");
    data_plane.abort();
}

#[tokio::test]
async fn reads_go_on_and_changes_stop_without_the_store() {
    let served = served(cluster(1).await).await;
    create(&served.meta, 1, "v", MIB).await.unwrap();
    served.node.subscribe().wait_for(|known| known.view.volume("v").is_some()).await.unwrap();
    served.meta.set_available(false);
    served.node.subscribe().wait_for(|known| !known.connected).await.unwrap();
    let list = served.ask(Method::GET, "/v1/volumes", None).await.unwrap();
    assert!(list["metadata"].as_str().unwrap().starts_with("disconnected since 20"), "{list}");
    assert_eq!(list["volumes"][0]["name"], "v");
    let body = json!({"name": "w", "size_bytes": MIB});
    assert_eq!(served.ask(Method::POST, "/v1/volumes", Some(body)).await, Err("metadata_unavailable".into()));
    served.meta.set_available(true);
    served.node.subscribe().wait_for(|known| known.connected).await.unwrap();
    let body = json!({"name": "w", "size_bytes": MIB});
    served.ask(Method::POST, "/v1/volumes", Some(body)).await.unwrap();
}

#[tokio::test]
async fn a_damaged_record_stops_changes_but_not_reading() {
    let served = served(cluster(1).await).await;
    create(&served.meta, 1, "v", MIB).await.unwrap();
    served.node.subscribe().wait_for(|known| known.view.volume("v").is_some()).await.unwrap();
    let bad = Txn::new().put(keys::volume(volume_id(5)), b"{\"format\":9}".to_vec());
    served.meta.txn(bad).await.unwrap();
    served.node.subscribe().wait_for(|known| !known.problem.is_empty()).await.unwrap();
    let status = served.ask(Method::GET, "/v1/status", None).await.unwrap();
    assert!(status["problem"].as_str().unwrap().contains("format 9"), "{status}");
    assert_eq!(served.ask(Method::GET, "/v1/volumes", None).await.unwrap()["volumes"][0]["name"], "v");
    let body = json!({"name": "w", "size_bytes": MIB});
    assert_eq!(served.ask(Method::POST, "/v1/volumes", Some(body)).await, Err("metadata_unusable".into()));
    served.meta.txn(Txn::new().delete(keys::volume(volume_id(5)))).await.unwrap();
    served.node.subscribe().wait_for(|known| known.problem.is_empty()).await.unwrap();
}

#[tokio::test]
async fn metadata_from_the_past_changes_nothing() {
    let meta = cluster(1).await;
    let backup = meta.backup();
    let served = served(meta).await;
    create(&served.meta, 1, "v", MIB).await.unwrap();
    served.node.subscribe().wait_for(|known| known.view.volume("v").is_some()).await.unwrap();
    served.meta.restore(&backup);
    served.node.subscribe().wait_for(|known| !known.problem.is_empty()).await.unwrap();
    assert!(served.node.known().view.volume("v").is_some(), "what was known stays");
    let body = json!({"name": "w", "size_bytes": MIB});
    assert_eq!(served.ask(Method::POST, "/v1/volumes", Some(body)).await, Err("metadata_unusable".into()));
}

#[tokio::test]
async fn a_lost_lease_is_taken_again_and_its_records_put_back() {
    let meta = cluster(1).await;
    let old = Txn::new().delete(keys::live(node_id(1))).delete(keys::status(node_id(1)));
    meta.txn(old).await.unwrap();
    let served = served(meta).await;
    let live = LiveRecord { pid: 7, version: "1".into(), boot: "b".into() };
    let (report, reports) = watch::channel(StatusRecord::default());
    let (stop, stopped) = watch::channel(false);
    let session = tokio::spawn(session(Arc::clone(&served.node), record(1), live.clone(), reports, stopped));
    let mut known = served.node.subscribe();
    known.wait_for(|known| known.view.live.contains_key(&node_id(1))).await.unwrap();
    for round in 1..3 {
        served.meta.advance(std::time::Duration::from_secs(10));
        known.wait_for(|known| known.view.live.is_empty() && known.view.status.is_empty()).await.unwrap();
        known.wait_for(|known| known.view.live.get(&node_id(1)) == Some(&live)).await.unwrap();
        report.send_replace(StatusRecord { data_plane: format!("round {round}"), ..StatusRecord::default() });
        let told = format!("round {round}");
        let seen =
            |known: &Arc<Known>| known.view.status.get(&node_id(1)).is_some_and(|s| s.data_plane == told);
        known.wait_for(seen).await.unwrap();
    }
    stop.send_replace(true);
    assert!(matches!(session.await.unwrap(), SessionEnd::Stopped));
    known.wait_for(|known| known.view.live.is_empty()).await.unwrap();
    assert!(known.borrow().view.nodes.contains_key(&node_id(1)), "a member stays one");
}
