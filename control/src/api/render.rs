//! From records to answers. Pure functions over one [`View`].

use cluster_map::{CoreSnapshot, Counter, HistogramSnapshot, NodeId, ObservedLink, StoreId, VolumeId};

use super::types as t;
use crate::heads::{HeadsRecord, MemberRecord};
use crate::model::{
    Address, ClusterRecord, Entry, ExportRecord, Mac, NodeRecord, ScrubRecord, StoreStatus, View,
    VolumeRecord, VolumeState,
};
use crate::placement::available_bytes;
use crate::settings::Policy;

pub(crate) fn cluster(record: &ClusterRecord) -> t::Cluster {
    t::Cluster {
        id: record.id.to_string(),
        created_unix_s: record.created_unix_s,
        extent_size_bytes: record.extent_size,
    }
}

fn count(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// Bytes of the ready stores of one node, or of all, and bytes that new volumes can have.
pub(crate) fn capacity(view: &View, of: Option<NodeId>) -> (u64, u64) {
    let wanted = view.stores.iter().filter(|(_, s)| of.is_none_or(|node| s.record.node == node));
    wanted.fold((0, 0), |(capacity, available), (id, store)| {
        let live = view.live.contains_key(&store.record.node);
        let ready = view.store_status(*id).filter(|s| live && s.state == "ready");
        (capacity + ready.map_or(0, |s| s.capacity), available + available_bytes(view, *id))
    })
}

pub(crate) fn node_summary(view: &View, id: NodeId, node: &NodeRecord) -> t::NodeSummary {
    let live = view.live.get(&id);
    let status = view.status.get(&id).filter(|_| live.is_some());
    let (capacity_bytes, available_bytes) = capacity(view, Some(id));
    t::NodeSummary {
        id: id.to_string(),
        name: node.name.clone(),
        zone: node.zone.clone(),
        live: live.is_some(),
        version: live.map(|l| l.version.clone()).unwrap_or_default(),
        api_addr: node.api_addr.clone(),
        peer_addr: node.peer_addr.clone(),
        data_plane: status.map(|s| s.data_plane.clone()).unwrap_or_default(),
        replicates: status.is_some_and(|s| s.replicates) && node.peer().is_some(),
        stores: count(status.map_or(0, |s| s.stores.iter().filter(|s| s.state == "ready").count())),
        volumes: count(view.volumes.keys().filter(|v| is_on(view, **v, id)).count()),
        capacity_bytes,
        available_bytes,
    }
}

/// Whether a node has a part of a volume.
fn is_on(view: &View, volume: VolumeId, node: NodeId) -> bool {
    view.owners(volume).iter().any(|(_, owner)| *owner == node)
}

pub(crate) fn node(view: &View, id: NodeId, node: &NodeRecord, cores: Option<Vec<t::Core>>) -> t::Node {
    let status = view.status.get(&id).cloned().unwrap_or_default();
    let links = status.links.into_iter().map(|l| t::Link {
        interface: l.interface,
        queue: l.queue,
        core: l.core,
        mode: l.mode,
        zero_copy: l.zero_copy,
        segments: l.segments,
        mtu: l.mtu,
        max_sectors: l.max_sectors,
        up: l.up,
        note: l.note,
        losses: None,
    });
    let volumes = status.volumes.into_iter().map(|v| t::VolumeReport {
        id: v.id.to_string(),
        name: view.volumes.get(&v.id).map(|r| r.record.name.clone()).unwrap_or_default(),
        state: v.state,
        size_bytes: v.size,
        done_bytes: v.done,
        error: v.error,
    });
    t::Node {
        metadata: String::new(),
        node: node_summary(view, id, node),
        interfaces: status.interfaces,
        links: links.collect(),
        stores: stores(view, Some(id)),
        volumes: volumes.collect(),
        cores,
    }
}

/// The stores of one node, or of all: every path that a node is to open, and every recorded store.
pub(crate) fn stores(view: &View, of: Option<NodeId>) -> Vec<t::Store> {
    let nodes = view.nodes.iter().filter(|(id, _)| of.is_none_or(|node| node == **id));
    let mut all = Vec::new();
    for (node, member) in nodes {
        let recorded = view.stores.iter().filter(|(_, s)| s.record.node == *node);
        for (id, store) in recorded.clone() {
            all.push(self::store(view, *node, &store.record.path, Some(*id)));
        }
        let new =
            member.record.stores.iter().filter(|m| recorded.clone().all(|(_, s)| s.record.path != m.path));
        all.extend(new.map(|m| self::store(view, *node, &m.path, None)));
    }
    all.sort_by(|a, b| (&a.node, &a.path).cmp(&(&b.node, &b.path)));
    all
}

/// One path of a node, with the store that is recorded for it.
pub(crate) fn store(view: &View, node: NodeId, path: &str, id: Option<StoreId>) -> t::Store {
    let live = view.live.contains_key(&node);
    let status = view.status.get(&node).and_then(|s| s.stores.iter().find(|s| s.path == path));
    let status = status.filter(|_| live);
    t::Store {
        id: id.map(|id| id.to_string()).unwrap_or_default(),
        node: view.node_label(node),
        path: path.to_owned(),
        state: status.map_or("unknown", |s| &s.state).to_owned(),
        durability: status.filter(|s| s.state == "ready").map(|s| s.durability.clone()).unwrap_or_default(),
        capacity_bytes: status.map_or(0, |s| s.capacity),
        used_bytes: status.map_or(0, |s| s.capacity.saturating_sub(s.free)),
        available_bytes: id.map_or(0, |id| available_bytes(view, id)),
        orphaned_bytes: status.map_or(0, |s| s.orphaned),
        volumes: id.map_or(0, |id| view.placed(id).volumes),
        write_path: status.filter(|s| s.state == "ready").map(|s| s.writes.clone()).unwrap_or_default(),
        checksum_errors: status.map_or(0, |s| s.checksum_errors),
        lost_blocks: status.map_or(0, |s| s.lost_blocks),
        scrub: id.and_then(|id| view.scrubs.get(&id)).map(|known| scrub(&known.record, live, status)),
        error: status.map(|s| s.error.clone()).unwrap_or_default(),
    }
}

/// What was asked for, with what the node tells of it; once it is recorded as finished, the record knows all.
fn scrub(record: &ScrubRecord, live: bool, status: Option<&StoreStatus>) -> t::Scrub {
    let told = status.and_then(|s| s.scrub.as_ref()).filter(|scrub| scrub.run == record.run);
    let ready = status.is_some_and(|s| s.state == "ready");
    let (state, done_bytes, total_bytes, errors) = match (&record.finished, told) {
        (Some(result), _) => ("finished", result.bytes, result.bytes, result.errors),
        // It is to go on, which its node has not seen yet, or cannot do while the store is not open.
        (None, Some(told))
            if !record.stopped && (told.state == "stopped" || told.state == "running" && !ready) =>
        {
            ("waiting", told.done, told.total, told.errors)
        }
        (None, Some(told)) => (told.state.as_str(), told.done, told.total, told.errors),
        (None, None) if record.stopped => ("stopped", 0, 0, 0),
        (None, None) => (if live { "waiting" } else { "unknown" }, 0, 0, 0),
    };
    t::Scrub {
        run: record.run,
        state: state.to_owned(),
        rate_bytes_per_s: record.rate,
        done_bytes,
        total_bytes,
        errors,
        started_unix_s: record.started_unix_s,
        finished_unix_s: record.finished.map(|result| result.unix_s),
    }
}

pub(crate) fn volume(view: &View, id: VolumeId, volume: &VolumeRecord) -> t::Volume {
    let node = view.serving_node(id);
    let store = view.owners(id).into_iter().find(|(_, owner)| Some(*owner) == node).map(|(store, _)| store);
    let heads = view.heads.get(&id);
    let report = view.volume_report(id);
    let progress = report
        .filter(|_| volume.state != VolumeState::Ready)
        .map(|r| t::Progress { done_bytes: r.done.min(volume.size), total_bytes: volume.size });
    t::Volume {
        id: id.to_string(),
        name: volume.name.clone(),
        size_bytes: volume.size,
        copies: volume.copies,
        copies_in_sync: copies_in_sync(view, id, volume),
        head: heads.map(|heads| head(view, id, heads)),
        owners: heads.map(|heads| copies(view, &heads.record)).unwrap_or_default(),
        state: volume.state.to_string(),
        node: node.map(|node| view.node_label(node)).unwrap_or_default(),
        node_live: node.is_some_and(|node| view.live.contains_key(&node)),
        store: store.and_then(|id| Some(view.stores.get(&id)?.record.path.clone())).unwrap_or_default(),
        store_id: store.map(|id| id.to_string()).unwrap_or_default(),
        export: volume.export.map(|e| e.to_string()),
        created_unix_s: volume.created_unix_s,
        progress,
        error: report.map(|r| r.error.clone()).unwrap_or_default(),
    }
}

fn copies_in_sync(view: &View, id: VolumeId, volume: &VolumeRecord) -> u64 {
    match view.heads.get(&id) {
        Some(heads) => count(heads.record.copies_in_sync()),
        None => u64::from(volume.store.is_some()),
    }
}

/// What is known of the head of a replicated volume.
fn head(view: &View, id: VolumeId, heads: &Entry<HeadsRecord>) -> t::VolumeHead {
    let record = &heads.record;
    let status = view.status.get(&record.head).filter(|_| view.live.contains_key(&record.head));
    let named = status.and_then(|s| s.heads.iter().find(|h| h.volume == id && h.takeover == record.takeover));
    let revision = heads.revision.0.unsigned_abs();
    let state = match (status, named) {
        (_, Some(named)) => named.state.as_str(),
        (Some(status), None) if status.heads_revision >= revision => "serving",
        // It has not seen the record yet, or has more troubled heads than it can name.
        (Some(_), None) | (None, None) => "unknown",
    };
    let needed = record.partitions.iter().map(|partition| record.min_in_sync(partition)).max();
    t::VolumeHead {
        node: view.node_label(record.head),
        takeover: record.takeover,
        state: state.to_owned(),
        copies_needed: count(needed.unwrap_or(1)),
        resync_extents: named.map_or(0, |named| named.resync_extents),
        resync_eta_s: named.map_or(0, |named| named.resync_eta_s),
        blocked: named.map(|named| named.blocked.clone()).unwrap_or_default(),
        moving_to: record.move_to.map(|to| view.node_label(to)).unwrap_or_default(),
    }
}

fn copies(view: &View, record: &HeadsRecord) -> Vec<t::VolumeCopy> {
    let one = |member: &MemberRecord| {
        let is = |mut among: Box<dyn Iterator<Item = &MemberRecord> + '_>| among.any(|other| other == member);
        let state = if is(Box::new(record.members_stale())) {
            "stale"
        } else if is(Box::new(record.members_in_sync())) {
            "in sync"
        } else {
            "incomplete"
        };
        t::VolumeCopy {
            node: view.node_label(member.node),
            node_live: view.live.contains_key(&member.node),
            store: view.stores.get(&member.store).map(|s| s.record.path.clone()).unwrap_or_default(),
            store_id: member.store.to_string(),
            state: state.to_owned(),
        }
    };
    record.members.iter().map(one).collect()
}

pub(crate) fn volumes(view: &View) -> Vec<t::Volume> {
    let mut all: Vec<_> = view.volumes.iter().map(|(id, v)| volume(view, *id, &v.record)).collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

pub(crate) fn export(view: &View, address: Address, export: &Entry<ExportRecord>) -> t::Export {
    let record = &export.record;
    let volume = view.volumes.get(&record.volume).map(|v| &v.record);
    let node = view.serving_node(record.volume);
    let status = node.filter(|node| view.live.contains_key(node)).and_then(|node| view.status.get(&node));
    let text = address.to_string();
    let (state, error) = match status {
        _ if record.ending => ("ending", String::new()),
        None => ("unknown", String::new()),
        Some(status) if status.serving.contains(&address) => ("serving", String::new()),
        Some(status) => match status.exports.iter().find(|e| e.address == address) {
            Some(report) if report.state == "failed" => ("failed", report.error.clone()),
            Some(report) => ("waiting", report.error.clone()),
            None => ("waiting", String::new()),
        },
    };
    t::Export {
        device: format!("/dev/etherd/e{text}"),
        address: text,
        volume: volume.map(|v| v.name.clone()).unwrap_or_default(),
        volume_id: record.volume.to_string(),
        node: node.map(|node| view.node_label(node)).unwrap_or_default(),
        size_bytes: volume.map_or(0, |v| v.size),
        copies: volume.map_or(0, |v| v.copies),
        copies_in_sync: volume.map_or(0, |v| copies_in_sync(view, record.volume, v)),
        mac: record.mac.to_string(),
        read_only: record.read_only,
        state: state.to_owned(),
        error,
        interfaces: record.settings.interfaces.clone(),
        config_string: record.settings.config_string.to_string(),
        masks: macs(&record.settings.masks).macs,
        reserved_for: macs(&record.settings.reserved_for).macs,
        policy: policy(&record.settings.policy),
    }
}

pub(crate) fn macs(macs: &[Mac]) -> t::MacList {
    t::MacList { macs: macs.iter().map(ToString::to_string).collect() }
}

pub(crate) fn policy(policy: &Policy) -> t::Policy {
    t::Policy {
        config: policy.config.to_string(),
        masks: policy.masks.to_string(),
        reserve: policy.reserve.to_string(),
    }
}

pub(crate) fn exports(view: &View) -> Vec<t::Export> {
    view.exports.iter().map(|(address, e)| export(view, *address, e)).collect()
}

pub(crate) fn latency(histogram: &HistogramSnapshot) -> t::Latency {
    t::Latency {
        count: histogram.count(),
        mean_ns: histogram.mean(),
        p50_ns: histogram.quantile(0.5),
        p99_ns: histogram.quantile(0.99),
        max_ns: histogram.quantile(1.0),
    }
}

/// Adds to the links of the answering node what their queues lost.
pub(crate) fn add_losses(links: &mut [t::Link], observed: &[ObservedLink]) {
    for link in links {
        let same =
            |o: &&ObservedLink| (o.interface.as_str(), o.queue) == (link.interface.as_str(), link.queue);
        let found = observed.iter().find(same);
        link.losses = found.map(|o| o.losses.named().map(|(name, count)| (name.to_owned(), count)).collect());
    }
}

/// Statistics by core; `cores` are the CPU numbers in the map's order.
pub(crate) fn cores(cores: &[u16], stats: &[CoreSnapshot]) -> Vec<t::Core> {
    let named = cores.iter().zip(stats);
    named
        .map(|(core, stats)| t::Core {
            core: *core,
            counters: Counter::ALL.iter().map(|c| (c.name().to_owned(), stats.get(*c))).collect(),
            read: latency(&stats.read_ns),
            write: latency(&stats.write_ns),
        })
        .collect()
}
