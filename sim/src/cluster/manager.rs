//! The manager of a node's data plane: the real rules for heads, replicas and exports, between the map and the core.
//!
//! It goes round as the real one does: exports first, then orders to the core, then what is told; and while an export's configuration is
//! taken on it does nothing else.

use std::collections::BTreeMap;
use std::rc::Rc;

use cluster_map::{
    Desired, Durability, ExportState, Observed, ObservedExport, ObservedStore, ObservedVolume, StoreState,
    VolumeId, VolumeObserved,
};
use torus_dataplane::exchange::{Message, Order, Report};
use torus_dataplane::manager::replication::Replication;
use torus_dataplane::replicating::{Place, Wish};

use super::disk::object_of;
use super::exports::Changing;
use super::metadata::{STORE_BYTES, STORE_PATH};
use super::node::Process;
use super::{Checker, Event, World, Wrong, volume_of};
use crate::etcd::ClientId;
use crate::network::Endpoint;

/// The longest time between two looks of a manager.
const LOOK_NS: u64 = 1_000_000_000;
/// How often there is a report though no head has anything urgent to tell.
const REPORT_NS: u64 = 100_000_000;
/// How often heads at rest are looked at for it.
const REPORT_ALL_NS: u64 = 1_000_000_000;
/// Heads that were not given a grant for so long are not granted to.
const SILENT_NS: u64 = torus_replication::grants::GRANT_NS;
/// How long something takes from one thread or process of a node to another.
pub(super) const WAKES_NS: std::ops::Range<u64> = 10_000..2_000_000;
/// When it is looked again whether a configuration has been taken on.
const AGAIN_NS: u64 = 1_000_000;
/// How long a wish stands at most while etcd answers and nobody stands still: an earlier request may have had to be given up, and the
/// metadata to be listed anew.
const WISHES_NS: u64 = 12_000_000_000;
/// A process that stands still goes on some time after.
const PAUSED_NS: u64 = 20_000_000;

/// The memory that both processes of a node share. It is lost with the machine only.
#[derive(Debug, Default)]
pub(super) struct Map {
    pub(super) desired: Rc<Desired>,
    pub(super) observed: Rc<Observed>,
    /// When the data plane last gave a sign of life.
    pub(super) beat_ns: u64,
}

/// What of a manager ends with its process.
#[derive(Debug)]
pub(super) struct Manager {
    replication: Replication,
    /// What it was started with.
    pub(super) desired: Rc<Desired>,
    pub(super) reported: Report,
    reported_ns: u64,
    reported_all_ns: u64,
    published: Option<Observed>,
    due_ns: u64,
    /// Since when heads have had their wishes.
    wished: BTreeMap<VolumeId, (Wish, u64)>,
    /// When something last was in the way of wishes.
    hindered_ns: u64,
}

impl Manager {
    pub(super) fn new(map: &Map, boot_ns: u64) -> Manager {
        Manager {
            replication: Replication::new(&map.desired, map.observed.wishes.clone(), boot_ns),
            desired: Rc::clone(&map.desired),
            reported: Report::default(),
            reported_ns: 0,
            reported_all_ns: 0,
            published: None,
            due_ns: u64::MAX,
            wished: BTreeMap::new(),
            hindered_ns: 0,
        }
    }

    /// The volumes to serve now, each with the take-over of its head.
    fn wanted_exports(&self, desired: &Desired) -> BTreeMap<usize, u64> {
        let volumes = desired.exports.iter().map(|export| export.volume);
        let served =
            |volume| self.replication.served_takeover(volume).map(|takeover| (volume_of(volume), takeover));
        volumes.filter_map(served).collect()
    }
}

impl World {
    /// Has a node's manager look around at that time, if it would not before.
    pub(super) fn manage_by(&mut self, node: usize, at_ns: u64) {
        let at = &mut self.nodes[node];
        let life = at.life;
        let Some(process) = &mut at.process else { return };
        if at_ns < process.manager.due_ns {
            process.manager.due_ns = at_ns;
            self.schedule.at(at_ns, Event::Manage { node, life });
        }
    }

    fn manage_soon(&mut self, node: usize) {
        let at_ns = self.now_ns() + self.nodes[node].random.range(WAKES_NS);
        self.manage_by(node, at_ns);
    }

    /// A new desired state stands in the map.
    pub(super) fn map_changes(&mut self, node: usize) {
        self.manage_soon(node);
    }

    /// A node's manager looks around.
    pub(super) fn manage(&mut self, node: usize, life: u64) {
        let now_ns = self.now_ns();
        let is_paused = self.network.is_paused(Endpoint(node));
        let at = &mut self.nodes[node];
        if at.life != life {
            return;
        }
        let Some(process) = &mut at.process else { return };
        if now_ns < process.manager.due_ns {
            return;
        }
        process.manager.due_ns = u64::MAX;
        if is_paused {
            self.manage_by(node, now_ns + PAUSED_NS);
            return;
        }
        at.map.beat_ns = now_ns;
        match process.exports.changing {
            // What is looked at takes no time; what comes of it does.
            Changing::Coming => return self.manage_by(node, now_ns + LOOK_NS),
            Changing::Settling if !process.serving.is_settled() => {
                return self.manage_by(node, now_ns + AGAIN_NS);
            }
            Changing::Settling | Changing::No => process.exports.changing = Changing::No,
        }
        let desired = Rc::clone(&at.map.desired);
        let wanted = process.manager.wanted_exports(&desired);
        if wanted != process.exports.heads {
            self.begin_configuration(node, wanted);
            return self.manage_by(node, now_ns + LOOK_NS);
        }
        self.give_orders(node, &desired);
        self.publish_observed(node, &desired);
        self.manage_by(node, now_ns + LOOK_NS);
    }

    fn give_orders(&mut self, node: usize, desired: &Rc<Desired>) {
        let at = &mut self.nodes[node];
        let (member, shards) = (at.member(), at.stored.layout.shards);
        let Some(process) = &mut at.process else { return };
        let replicas: Vec<_> = desired
            .volumes
            .iter()
            .map(|wish| {
                let place = Place { store: 0, object: object_of(volume_of(wish.id), shards) };
                (member, wish.id, place, 0)
            })
            .collect();
        let mut outbox = Vec::new();
        process.manager.replication.follow(desired, &replicas, &mut outbox);
        process.manager.desired = Rc::clone(desired);
        for (_, message) in outbox {
            if let Message::Replicate(order) = message {
                self.obey(node, *order);
            }
        }
    }

    /// A core takes what its manager wants.
    fn obey(&mut self, node: usize, order: Order) {
        if let Order::Begin(generation, membership) = &order {
            let (volume, doubt) = (volume_of(membership.volume), membership.doubt().cloned());
            self.note(|| {
                format!(
                    "node {node} becomes head of volume {volume}, generation {generation}, doubt {doubt:?}"
                )
            });
        }
        let boot_ns = self.boot_ns(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        process.with(boot_ns, |replicating, ground| match order {
            // The network has no addresses.
            Order::Sites(_) => {}
            Order::AddReplica(member, volume, place) => replicating.add_replica(member, volume, place),
            Order::DropReplica(member, volume) => replicating.drop_replica(member, volume),
            Order::Begin(generation, membership) => {
                replicating.begin(generation, membership, ground);
            }
            Order::Record(volume, record) => replicating.record(volume, record, ground),
            Order::End(volume) => replicating.end(volume, ground),
            Order::ResyncRate(bytes_per_s) => replicating.set_resync_rate(bytes_per_s, ground),
        });
        process.manager.reported_ns = 0;
        self.pump(node);
    }

    /// A core tells its manager what there is to tell: at once what is urgent, the rest when the time is looked at.
    pub(super) fn hear_core(&mut self, node: usize, is_tick: bool) {
        let boot_ns = self.boot_ns(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        let manager = &process.manager;
        let is_due = is_tick && boot_ns.saturating_sub(manager.reported_ns) >= REPORT_NS;
        if !is_due && !process.serving.has_news(&manager.reported) {
            return;
        }
        let is_all = boot_ns.saturating_sub(manager.reported_all_ns) >= REPORT_ALL_NS;
        let before = std::mem::take(&mut process.manager.reported);
        let told = (!is_all).then_some(&before);
        let report = process.with(boot_ns, |replicating, _| replicating.report(boot_ns, SILENT_NS, told));
        let manager = &mut process.manager;
        manager.reported_ns = boot_ns;
        if is_all {
            manager.reported_all_ns = boot_ns;
        }
        manager.reported = report.clone();
        if report == before {
            return;
        }
        manager.replication.take(0, report.clone());
        for (volume, (generation, end)) in &report.ended {
            if before.ended.get(volume) != Some(&(*generation, *end)) {
                self.coverage.replaced += 1;
                self.note(|| format!("node {node}: head of volume {} ends: {end:?}", volume_of(*volume)));
            }
        }
        for (volume, wish) in &report.wishes {
            if before.wishes.get(volume) != Some(wish) {
                self.note(|| format!("node {node}: head of volume {} wishes {wish:?}", volume_of(*volume)));
            }
        }
        for (volume, generation) in &report.handed_over {
            if before.handed_over.get(volume) != Some(generation) {
                self.note(|| format!("node {node}: volume {} is handed over", volume_of(*volume)));
            }
        }
        self.manage_soon(node);
    }

    /// What heads wish for is decided on before long, unless something is in the way: a volume must not wait for another one.
    pub(super) fn check_wishes(&mut self, node: usize) {
        let now_ns = self.now_ns();
        let is_paused = self.network.is_paused(Endpoint(node));
        let at = &mut self.nodes[node];
        let is_heard = at.control.as_ref().is_some_and(|control| !control.is_paused());
        let Some(process) = &mut at.process else { return };
        let Manager { wished, hindered_ns, .. } = &mut process.manager;
        if is_paused || !is_heard || !self.metadata.etcd.serves_well(ClientId(node)) {
            *hindered_ns = now_ns;
        }
        let wishes = process.serving.replicated().wishes();
        wished.retain(|volume, (wish, _)| wishes.get(volume) == Some(wish));
        for (volume, wish) in wishes {
            let (_, since_ns) = wished.entry(*volume).or_insert_with(|| (wish.clone(), now_ns));
            if now_ns.saturating_sub(*hindered_ns.max(since_ns)) > WISHES_NS {
                let what = format!("node {node}: nobody answers {wish:?} of volume {}", volume_of(*volume));
                self.wrong.get_or_insert(Wrong::new(Checker::Wishes, what));
                return;
            }
        }
    }

    /// Writes down what is true now, if it has changed.
    fn publish_observed(&mut self, node: usize, desired: &Desired) {
        let now_ns = self.now_ns();
        let boot_ns = self.boot_ns(node);
        let at = &mut self.nodes[node];
        let has_failed = at.has_failed_store();
        let (layout, member) = (&at.stored.layout, at.member());
        let store = ObservedStore {
            path: STORE_PATH.into(),
            id: Some(member.store),
            state: if has_failed { StoreState::Failed } else { StoreState::Ready },
            durability: Durability::DsyncWriteBack,
            capacity_bytes: STORE_BYTES,
            free_bytes: STORE_BYTES,
            incarnation: member.incarnation,
            shards: layout.shards,
            ..ObservedStore::default()
        };
        let volumes = desired.volumes.iter().map(|wish| ObservedVolume {
            id: wish.id,
            store: wish.store,
            state: VolumeObserved::Ready,
            size_sectors: wish.size_sectors,
            ..ObservedVolume::default()
        });
        let Some(process) = &mut at.process else { return };
        let exports = desired.exports.iter().map(|wish| {
            let is_served = process.exports.heads.contains_key(&volume_of(wish.volume));
            ObservedExport {
                volume: wish.volume,
                shelf: wish.shelf,
                slot: wish.slot,
                state: if is_served { ExportState::Serving } else { ExportState::Waiting },
                ..ObservedExport::default()
            }
        });
        let replication = &process.manager.replication;
        let observed = Observed {
            applied: desired.version,
            pid: pid_of(at.life),
            stores: vec![store],
            volumes: volumes.collect(),
            exports: exports.collect(),
            replicates: true,
            heads: replication.observe_heads(),
            wishes: replication.observe_wishes(),
            granting: replication.observe_granting(desired, boot_ns),
            ..Observed::default()
        };
        if process.manager.published.as_ref() == Some(&observed) {
            return;
        }
        process.manager.published = Some(observed.clone());
        at.map.observed = Rc::new(Observed { version: at.map.observed.version + 1, ..observed });
        let at_ns = now_ns + at.random.range(WAKES_NS);
        self.look_by(node, at_ns);
    }
}

/// The process id of a data plane.
pub(super) fn pid_of(life: u64) -> u32 {
    life as u32 + 1
}

impl Process {
    /// The desired state that the manager has acted on.
    pub(super) fn follows(&self) -> u64 {
        self.manager.desired.version
    }
}
