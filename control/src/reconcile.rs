//! From metadata to what the data plane is to do, and from what it did back to metadata. Pure functions.
//!
//! State goes both ways as a whole and by versions, never as a command: each function may be called again with the same
//! input at any time. What a data plane reports counts only for what its node's records say (I2, I12): *purged* is believed
//! of a volume that is recorded as purging, and an export's end only of a data plane that has applied a desired state
//! without it, and that no former head can answer beside.

use std::collections::{BTreeMap, BTreeSet};

use cluster_map::{
    ClusterKey, Desired, DesiredExport, DesiredHead, DesiredPeer, DesiredStore, DesiredVolume, Durability,
    EVERY_INTERFACE, ExportState, HeadState, LinkChoice, LinkMode, NodeId, Observed, ObservedHead,
    ObservedStore, ObservedVolume, ScrubState, ScrubWish, SteeringChoice, StoreId, StoreState, VolumeId,
    VolumeIntent, VolumeObserved, WritePath,
};

use crate::config::Setting;
use crate::heads::HeadsRecord;
use crate::meta::{Compare, Txn};
use crate::model::{
    Address, Entry, ExportStatus, HeadStatus, LinkStatus, SECTOR_BYTES, ScrubRecord, ScrubResult,
    ScrubStatus, StatusRecord, StoreRecord, StoreStatus, TombstoneRecord, View, VolumeRecord, VolumeState,
    VolumeStatus, encode, keys,
};
use crate::settings::{ExportSettings, bare};

/// Most volumes, and most troubled exports, that a status lists: it stays far below the limit of a record.
const STATUS_ENTRIES: usize = 256;
/// Longest error text in a status, in bytes.
const STATUS_ERROR_BYTES: usize = 300;

/// What a node is told when it starts, not through the metadata.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// CPUs for the data plane.
    pub cores: Vec<u16>,
    /// Which kind of link.
    pub link: LinkChoice,
    /// By what frames reach their cores.
    pub steering: SteeringChoice,
    /// Interfaces to serve on.
    pub interfaces: Vec<String>,
    /// Paths of the stores that are named at start, as opposed to those added later.
    pub named_stores: Vec<String>,
    /// The cluster's key, if it was given in a file; else the metadata's is used.
    pub cluster_key: Option<ClusterKey>,
}

/// What the node's data plane is to do, without answers to changes; `None` until the cluster is initialised and the node
/// has joined.
#[must_use]
pub fn desired(view: &View, node: NodeId, settings: &Settings) -> Option<Desired> {
    let cluster = view.cluster.as_ref()?.record.id;
    let member = &view.nodes.get(&node)?.record;
    let store_id = |path: &str| {
        view.stores.iter().find(|(_, s)| s.record.node == node && s.record.path == path).map(|(id, _)| *id)
    };
    let stores = member.stores.iter().map(|s| {
        let id = store_id(&s.path);
        // A store that is known to exist is never made anew: a missing file is an error, not a blank store.
        let size_bytes = if id.is_some() { 0 } else { s.size };
        DesiredStore { path: s.path.clone(), size_bytes, id, scrub: id.and_then(|id| scrub_wish(view, id)) }
    });
    let volumes = view.volumes.iter().flat_map(|(id, v)| {
        let wish = |store| DesiredVolume {
            id: *id,
            store,
            size_sectors: v.record.size / SECTOR_BYTES,
            state: match v.record.state {
                VolumeState::Purging => VolumeIntent::Purging,
                VolumeState::Creating | VolumeState::Ready | VolumeState::Resizing => VolumeIntent::Active,
            },
            lane: view.heads.get(id).map(|heads| heads.record.lane),
        };
        let here = view.owners(*id).into_iter().filter(|(store, _)| is_here(view, node, *store));
        here.map(|(store, _)| wish(store)).collect::<Vec<_>>()
    });
    // A volume that is being purged has no head any more.
    let heads = view.heads.iter().filter(|(id, heads)| {
        let volume = view.volumes.get(id);
        heads.record.head == node && volume.is_some_and(|volume| volume.record.state != VolumeState::Purging)
    });
    let heads: Vec<_> = heads.map(|(id, heads)| heads.record.desired(*id, heads.revision)).collect();
    let exports = view.exports.iter().filter_map(|(address, e)| {
        let volume = &view.volumes.get(&e.record.volume)?.record;
        let wanted =
            serves(view, node, e.record.volume) && !e.record.ending && volume.state != VolumeState::Purging;
        wanted.then_some(DesiredExport {
            volume: e.record.volume,
            shelf: address.shelf,
            slot: address.slot,
            mac: e.record.mac.0,
            read_only: e.record.read_only,
            on_interfaces: on_interfaces(&e.record.settings, &settings.interfaces),
            config_string: e.record.settings.config_string.bytes().to_vec(),
            masks: bare(&e.record.settings.masks),
            reserved_for: bare(&e.record.settings.reserved_for),
            allow: e.record.settings.policy.allow(),
        })
    });
    let made_key = view.cluster_key.as_ref().map(|made| made.record.key);
    let listen = member.peer().map(|(addr, _)| addr);
    let others = view.nodes.iter().filter(|(other, _)| **other != node);
    let peers = others.filter_map(|(node, other)| {
        let (addr, cores) = other.record.peer()?;
        Some(DesiredPeer { node: *node, addr, cores })
    });
    Some(Desired {
        version: 0,
        cluster,
        node,
        cores: settings.cores.clone(),
        link: settings.link,
        steering: settings.steering,
        interfaces: settings.interfaces.clone(),
        stores: stores.collect(),
        volumes: volumes.collect(),
        exports: exports.collect(),
        cluster_key: settings.cluster_key.or(made_key).unwrap_or_default(),
        listen: listen.filter(|addr| addr.has_ports_for(settings.cores.len())),
        peers: peers.collect(),
        heads,
        resync_bytes_per_s: Setting::ResyncRate.value(view),
        ..Desired::default()
    })
}

/// Whether a store is recorded as one of the node.
fn is_here(view: &View, node: NodeId, store: StoreId) -> bool {
    view.stores.get(&store).is_some_and(|s| s.record.node == node)
}

/// Whether the node is to answer the initiators of a volume: it has the only copy, or is the head.
fn serves(view: &View, node: NodeId, id: VolumeId) -> bool {
    let Some(volume) = view.volumes.get(&id) else { return false };
    match volume.record.store {
        Some(store) => is_here(view, node, store),
        None => view.serving_node(id) == Some(node),
    }
}

/// The scrub that a store is to have. One that is recorded as finished is not done again by a data plane that starts anew.
fn scrub_wish(view: &View, store: StoreId) -> Option<ScrubWish> {
    let scrub = &view.scrubs.get(&store)?.record;
    // A rate of 0 is never recorded; a record that was edited by hand must not keep all else from being published.
    let rate_bytes_per_s = scrub.rate.max(1);
    scrub.finished.is_none().then_some(ScrubWish { run: scrub.run, rate_bytes_per_s, stopped: scrub.stopped })
}

/// The interfaces of the node, as a mask, that an export is served on; none if it is bound to others.
fn on_interfaces(settings: &ExportSettings, of_node: &[String]) -> u16 {
    if settings.interfaces.is_empty() {
        return EVERY_INTERFACE;
    }
    let bound = of_node.iter().enumerate().filter(|(_, name)| settings.interfaces.contains(name));
    bound.fold(0, |mask, (ordinal, _)| mask | 1u16.unbounded_shl(u32::try_from(ordinal).unwrap_or(u32::MAX)))
}

/// The record changes that follow from what the data plane reports. `published` is the desired state that stands in the map.
#[must_use]
pub fn changes(
    view: &View,
    node: NodeId,
    published: &Desired,
    observed: &Observed,
    now_unix_s: u64,
) -> Vec<Txn> {
    // First what initiators may be waiting for.
    let mut txns = wished_changes(view, node, published, observed);
    txns.extend(store_changes(view, node, observed));
    txns.extend(observed.stores.iter().filter_map(|seen| finished_scrub(view, node, seen, now_unix_s)));
    for seen in &observed.volumes {
        let owned = is_here(view, node, seen.store)
            && view.owners(seen.id).iter().any(|(store, _)| *store == seen.store);
        let Some(volume) = view.volumes.get(&seen.id).filter(|_| owned) else { continue };
        let change = match view.heads.get(&seen.id) {
            Some(heads) => replica_change(volume, heads, seen, published, now_unix_s),
            None => volume_change(volume, seen, published, now_unix_s),
        };
        txns.extend(change);
    }
    if observed.applied >= published.version && published.version > 0 {
        txns.extend(ended_exports(view, node, published, observed));
    }
    txns
}

/// The changes of heads records that the node's heads wish for, each against the revision that it was computed from and only while
/// the node is head by the same take-over; as many as fit in one transaction. Where one of them conflicts, the next view has
/// the others again.
fn wished_changes(view: &View, node: NodeId, published: &Desired, observed: &Observed) -> Vec<Txn> {
    let wished = observed.wishes.iter().filter_map(|wish| {
        let heads = view.heads.get(&wish.volume)?;
        let volume = view.volumes.get(&wish.volume)?;
        let by_its_head = heads.record.head == node
            && (heads.record.takeover, published.start) == (wish.takeover, wish.start)
            && heads.revision.0.unsigned_abs() == wish.revision;
        if !by_its_head || volume.record.state == VolumeState::Purging {
            return None;
        }
        let after = heads.record.changed(&wish.eject, &wish.join)?.following(&heads.record, heads.revision);
        let key = keys::heads(wish.volume);
        Some(Txn::new().when(Compare::Revision(key.clone(), heads.revision)).put(key, encode(&after)))
    });
    Txn::together(wished)
}

/// Records stores that the node was asked to open and that are not recorded, or have another path or size.
fn store_changes(view: &View, node: NodeId, observed: &Observed) -> Vec<Txn> {
    let Some(member) = view.nodes.get(&node) else { return Vec::new() };
    let ready = observed.stores.iter().filter(|s| s.state == StoreState::Ready);
    let wanted = ready.filter(|s| member.record.stores.iter().any(|m| m.path == s.path));
    wanted
        .filter_map(|seen| {
            let id = seen.id?;
            let record = StoreRecord { node, path: seen.path.clone(), size: seen.capacity_bytes };
            let key = keys::store(id);
            let guard = match view.stores.get(&id) {
                None => Compare::Absent(key.clone()),
                // A store recorded at another node is not taken over: that node may still serve from it.
                Some(known) if known.record.node != node || known.record == record => return None,
                Some(known) => Compare::Revision(key.clone(), known.revision),
            };
            let member_guard = Compare::Revision(keys::node(node), member.revision);
            Some(Txn::new().when(guard).when(member_guard).put(key, encode(&record)))
        })
        .collect()
}

/// Records what a scrub came to, once the data plane has finished the run that is recorded.
fn finished_scrub(view: &View, node: NodeId, seen: &ObservedStore, now_unix_s: u64) -> Option<Txn> {
    let (id, scrub) = (seen.id?, seen.scrub?);
    let store = view.stores.get(&id).filter(|store| store.record.node == node)?;
    let known = view.scrubs.get(&id)?;
    let asked = known.record.run == scrub.run && known.record.finished.is_none();
    if scrub.state != ScrubState::Finished || !asked || store.record.path != seen.path {
        return None;
    }
    let result = ScrubResult { unix_s: now_unix_s, bytes: scrub.done_bytes, errors: scrub.errors };
    let record = ScrubRecord { stopped: false, finished: Some(result), ..known.record.clone() };
    let guard = Compare::Revision(keys::scrub(id), known.revision);
    Some(Txn::new().when(guard).put(keys::scrub(id), encode(&record)))
}

fn volume_change(
    entry: &Entry<VolumeRecord>,
    seen: &ObservedVolume,
    published: &Desired,
    now_unix_s: u64,
) -> Option<Txn> {
    let record = &entry.record;
    let key = keys::volume(seen.id);
    let guard = Compare::Revision(key.clone(), entry.revision);
    match (record.state, seen.state) {
        (VolumeState::Creating | VolumeState::Resizing, VolumeObserved::Ready)
            if seen.size_sectors == record.size / SECTOR_BYTES =>
        {
            let ready = VolumeRecord { state: VolumeState::Ready, ..record.clone() };
            Some(Txn::new().when(guard).put(key, encode(&ready)))
        }
        (VolumeState::Purging, VolumeObserved::Purged) => {
            let asked = published.volumes.iter().any(|v| v.id == seen.id && v.state == VolumeIntent::Purging);
            let tombstone = TombstoneRecord {
                name: record.name.clone(),
                store: record.store,
                owners: Vec::new(),
                deleted_unix_s: now_unix_s,
            };
            asked.then(|| {
                Txn::new()
                    .when(guard)
                    .delete(key)
                    .delete(keys::name(&record.name))
                    .put(keys::tombstone(seen.id), encode(&tombstone))
            })
        }
        _ => None,
    }
}

/// Notes that one owner of a replicated volume has done what the volume's state asks for; the last of them changes the state.
fn replica_change(
    entry: &Entry<VolumeRecord>,
    heads: &Entry<HeadsRecord>,
    seen: &ObservedVolume,
    published: &Desired,
    now_unix_s: u64,
) -> Option<Txn> {
    let record = &entry.record;
    let done = match (record.state, seen.state) {
        (VolumeState::Creating | VolumeState::Resizing, VolumeObserved::Ready) => {
            seen.size_sectors == record.size / SECTOR_BYTES
        }
        (VolumeState::Purging, VolumeObserved::Purged) => published
            .volumes
            .iter()
            .any(|v| (v.id, v.store, v.state) == (seen.id, seen.store, VolumeIntent::Purging)),
        _ => false,
    };
    if !done || record.confirmed.contains(&seen.store) {
        return None;
    }
    let mut confirmed = record.confirmed.clone();
    confirmed.push(seen.store);
    let all = heads.record.members.iter().all(|member| confirmed.contains(&member.store));
    let (key, heads_key) = (keys::volume(seen.id), keys::heads(seen.id));
    let txn = Txn::new()
        .when(Compare::Revision(key.clone(), entry.revision))
        .when(Compare::Revision(heads_key.clone(), heads.revision));
    Some(match (all, record.state) {
        (false, _) => txn.put(key, encode(&VolumeRecord { confirmed, ..record.clone() })),
        (true, VolumeState::Purging) => {
            let name = record.name.clone();
            let gone = keys::name(&name);
            let tombstone =
                TombstoneRecord { name, store: None, owners: confirmed, deleted_unix_s: now_unix_s };
            txn.delete(key).delete(heads_key).delete(gone).put(keys::tombstone(seen.id), encode(&tombstone))
        }
        (true, _) => {
            let ready = VolumeRecord { state: VolumeState::Ready, confirmed: Vec::new(), ..record.clone() };
            txn.put(key, encode(&ready))
        }
    })
}

/// Whether the data plane has been able to answer as the head of the volume's latest take-over: then every replica in sync has opened that
/// generation, and whoever was head before can answer nothing any more, whatever it has heard of (I12).
fn is_fenced(view: &View, id: VolumeId, published: &Desired, observed: &Observed) -> bool {
    let Some(heads) = view.heads.get(&id) else {
        // The only copy is on this node, where one data plane at a time has the store.
        return true;
    };
    observed.heads.iter().any(|head| {
        (head.volume, head.takeover, head.start) == (id, heads.record.takeover, published.start)
            && head.state == HeadState::Serving
    })
}

/// Exports of this node that are recorded as ending, that the data plane has let go of, and that no former head serves.
fn ended_exports<'a>(
    view: &'a View,
    node: NodeId,
    published: &'a Desired,
    observed: &'a Observed,
) -> impl Iterator<Item = Txn> + 'a {
    let ending = view.exports.iter().filter(|(_, e)| e.record.ending);
    ending.filter_map(move |(address, export)| {
        let volume = view.volumes.get(&export.record.volume)?;
        let fence = view.heads.get(&export.record.volume).map(|heads| heads.revision);
        let at = |shelf, slot| Address { shelf, slot } == *address;
        let still_wanted = published.exports.iter().any(|e| at(e.shelf, e.slot));
        let still_there = observed.exports.iter().any(|e| at(e.shelf, e.slot));
        let is_here = view.serving_node(export.record.volume) == Some(node);
        if !is_here
            || still_wanted
            || still_there
            || !is_fenced(view, export.record.volume, published, observed)
        {
            return None;
        }
        let freed = VolumeRecord { export: None, ..volume.record.clone() };
        let mut txn = Txn::new();
        if let Some(revision) = fence {
            txn = txn.when(Compare::Revision(keys::heads(export.record.volume), revision));
        }
        Some(
            txn.when(Compare::Revision(keys::export(*address), export.revision))
                .when(Compare::Revision(keys::volume(export.record.volume), volume.revision))
                .delete(keys::export(*address))
                .delete(keys::mac(export.record.mac))
                .put(keys::volume(export.record.volume), encode(&freed)),
        )
    })
}

/// A link mode in plain words.
#[must_use]
pub fn link_mode_words(mode: LinkMode) -> &'static str {
    match mode {
        LinkMode::XdpZeroCopy => "zero-copy",
        LinkMode::XdpNativeCopy => "native copy",
        LinkMode::XdpGeneric => "generic",
        LinkMode::Packet => "packet",
    }
}

/// What an acknowledged write survives, in plain words.
#[must_use]
pub fn durability_words(durability: Durability) -> &'static str {
    match durability {
        Durability::Memory => "memory, not durable",
        Durability::WriteThrough => "durable (no volatile cache)",
        Durability::DsyncWriteBack => "durable (every write flushed)",
    }
}

/// The way of written data, in plain words; empty if it is not told.
#[must_use]
pub fn write_path_words(writes: WritePath) -> &'static str {
    match writes {
        WritePath::Unknown => "",
        WritePath::Journal => "journal",
        WritePath::InPlace => "in place",
    }
}

fn scrub_words(state: ScrubState) -> &'static str {
    match state {
        ScrubState::Running => "running",
        ScrubState::Stopped => "stopped",
        ScrubState::Finished => "finished",
    }
}

fn volume_words(state: VolumeObserved) -> &'static str {
    match state {
        VolumeObserved::Allocating => "allocating",
        VolumeObserved::Ready => "ready",
        VolumeObserved::Purged => "purged",
        VolumeObserved::Orphan => "orphan",
        VolumeObserved::Failed => "failed",
    }
}

fn shortened(error: &str) -> String {
    let end = (0..=STATUS_ERROR_BYTES.min(error.len())).rev().find(|at| error.is_char_boundary(*at));
    error[..end.unwrap_or(0)].to_owned()
}

/// The node's summary of itself. `data_plane` says in words how that process is.
#[must_use]
pub fn status(published: &Desired, observed: &Observed, data_plane: &str) -> StatusRecord {
    let links = observed.links.iter().map(|l| LinkStatus {
        interface: l.interface.clone(),
        queue: l.queue,
        core: l.core,
        mode: link_mode_words(l.mode).into(),
        zero_copy: l.mode == LinkMode::XdpZeroCopy,
        segments: l.segments,
        mtu: l.mtu,
        max_sectors: l.max_sectors,
        up: l.up,
        note: shortened(&l.note),
    });
    let size_wanted = |v: &cluster_map::DesiredVolume| match v.state {
        VolumeIntent::Active => v.size_sectors.saturating_mul(SECTOR_BYTES),
        VolumeIntent::Purging => 0,
    };
    let wanted: BTreeMap<_, _> = published.volumes.iter().map(|v| (v.id, size_wanted(v))).collect();
    let report = |v: &ObservedVolume| VolumeStatus {
        id: v.id,
        state: volume_words(v.state).into(),
        wanted: wanted.get(&v.id).copied().unwrap_or(0),
        size: v.size_sectors.saturating_mul(SECTOR_BYTES),
        done: v.done_bytes,
        error: shortened(&v.error),
    };
    // A report on an earlier wish says nothing about the volumes of this one.
    let current = observed.volumes.iter().filter(|_| observed.applied >= published.version);
    let unsettled = |v: &VolumeStatus| v.state != "ready" || v.wanted != v.size;
    let volumes = current.map(report).filter(unsettled).take(STATUS_ENTRIES);
    let address = |e: &cluster_map::ObservedExport| Address { shelf: e.shelf, slot: e.slot };
    let nowhere = published.exports.iter().filter(|e| e.on_interfaces == 0);
    let nowhere: BTreeSet<_> = nowhere.map(|e| Address { shelf: e.shelf, slot: e.slot }).collect();
    let (serving, troubled): (Vec<_>, Vec<_>) = observed
        .exports
        .iter()
        .partition(|e| e.state == ExportState::Serving && !nowhere.contains(&address(e)));
    let exports = troubled.into_iter().take(STATUS_ENTRIES).map(|e| match nowhere.contains(&address(e)) {
        true => ExportStatus {
            address: address(e),
            state: "failed".into(),
            error:
                "the node serves on none of the interfaces that it is bound to: name one of them in torusd's \
                    --interface, or unexport the volume and export it anew"
                    .into(),
        },
        false => ExportStatus {
            address: address(e),
            state: if e.state == ExportState::Failed { "failed" } else { "waiting" }.into(),
            error: shortened(&e.error),
        },
    });
    let (heads, heads_revision) = head_statuses(published, observed);
    StatusRecord {
        data_plane: data_plane.to_owned(),
        interfaces: published.interfaces.clone(),
        links: links.collect(),
        stores: store_statuses(published, observed),
        volumes: volumes.collect(),
        serving: serving.into_iter().map(address).collect(),
        exports: exports.collect(),
        replicates: observed.replicates,
        granting: granting(observed),
        heads,
        heads_revision,
    }
}

/// The nodes whose heads the data plane's replicas grant, in order.
fn granting(observed: &Observed) -> Vec<NodeId> {
    let granting: BTreeSet<_> =
        observed.granting.iter().filter(|grant| grant.is_granting).map(|grant| grant.node).collect();
    granting.into_iter().collect()
}

fn head_words(state: HeadState) -> &'static str {
    match state {
        HeadState::Opening => "opening",
        HeadState::Serving => "serving",
        HeadState::Replaced => "replaced",
        HeadState::Past => "past",
        HeadState::HandedOver => "handed over",
    }
}

/// Heads that do not simply serve, and the revision up to which the others do; 0 where not all of them can be named.
fn head_statuses(published: &Desired, observed: &Observed) -> (Vec<HeadStatus>, u64) {
    /// What is still to be made equal changes all the time: the status tells it in steps.
    const STEP_EXTENTS: u64 = 64;
    let seen: BTreeMap<_, _> = observed.heads.iter().map(|head| (head.volume, head)).collect();
    let status = |wish: &DesiredHead| {
        let head = seen
            .get(&wish.volume)
            .filter(|head| (head.takeover, head.start) == (wish.takeover, published.start));
        let serves = |head: &&&ObservedHead| {
            head.state == HeadState::Serving && head.resync_extents == 0 && head.blocked.is_empty()
        };
        head.filter(serves).is_none().then(|| HeadStatus {
            volume: wish.volume,
            takeover: wish.takeover,
            state: head.map_or("opening", |head| head_words(head.state)).into(),
            resync_extents: head.map_or(0, |head| head.resync_extents).saturating_add(STEP_EXTENTS - 1)
                / STEP_EXTENTS
                * STEP_EXTENTS,
            resync_eta_s: head.map_or(0, |head| eta_in_steps(head.resync_eta_s)),
            blocked: head.map(|head| shortened(&head.blocked)).unwrap_or_default(),
        })
    };
    let mut heads: Vec<_> = published.heads.iter().filter_map(status).take(STATUS_ENTRIES + 1).collect();
    let all_named = heads.len() <= STATUS_ENTRIES;
    heads.truncate(STATUS_ENTRIES);
    let newest = published.heads.iter().map(|head| head.revision).max().unwrap_or(0);
    (heads, if all_named { newest } else { 0 })
}

/// A time that is left, in steps that grow with it: a status is not written anew every second.
fn eta_in_steps(eta_s: u32) -> u64 {
    let step = match eta_s {
        0..60 => 10,
        60..600 => 60,
        _ => 300,
    };
    u64::from(eta_s).div_ceil(step) * step
}

fn store_statuses(published: &Desired, observed: &Observed) -> Vec<StoreStatus> {
    let orphaned = |store| -> u64 {
        let orphans =
            observed.volumes.iter().filter(|v| v.state == VolumeObserved::Orphan && Some(v.store) == store);
        orphans.map(|v| v.size_sectors.saturating_mul(SECTOR_BYTES)).fold(0, u64::saturating_add)
    };
    // What a scrub has done changes all the time: the status is written once in a second's work for it.
    let step = |path: &str| {
        let wish = published.stores.iter().find(|wish| wish.path == path).and_then(|wish| wish.scrub);
        wish.map_or(1, |wish| wish.rate_bytes_per_s.max(1))
    };
    let scrub = |s: &ObservedStore| {
        s.scrub.map(|scrub| ScrubStatus {
            run: scrub.run,
            state: scrub_words(scrub.state).into(),
            done: match scrub.state {
                ScrubState::Running => scrub.done_bytes - scrub.done_bytes % step(&s.path),
                ScrubState::Stopped | ScrubState::Finished => scrub.done_bytes,
            },
            total: scrub.total_bytes,
            errors: scrub.errors,
        })
    };
    let status = |s: &ObservedStore| StoreStatus {
        path: s.path.clone(),
        id: s.id,
        state: match s.state {
            StoreState::Opening => "opening",
            StoreState::Ready => "ready",
            StoreState::Failed => "failed",
        }
        .into(),
        durability: durability_words(s.durability).into(),
        capacity: s.capacity_bytes,
        free: s.free_bytes,
        orphaned: orphaned(s.id),
        error: shortened(&s.error),
        writes: write_path_words(s.writes).into(),
        checksum_errors: s.checksum_errors,
        lost_blocks: s.lost_blocks,
        scrub: scrub(s),
        incarnation: s.incarnation.max(1),
        shards: s.shards,
    };
    observed.stores.iter().map(status).collect()
}
