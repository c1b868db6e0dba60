//! A node: the data plane of one core around one store, driven as its reactor drives it.
//!
//! What the reactor gives to `Serving` comes from here: frames out of receive rings, ended disk requests, what other nodes say, the
//! time; and what it takes from there goes to the simulated disk and network, and to its manager.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use aoe_xdp::link::{Region, RegionConfig};
use aoe_xdp::target::Ingress;
use cluster_map::{CoreStats, VolumeId};
use torus_dataplane::clients::Clients;
use torus_dataplane::discovery::Discovery;
use torus_dataplane::fairness::Limits;
use torus_dataplane::replicating::{Ground, Payload, Replicating};
use torus_dataplane::serving::{Around, Serving};
use torus_dataplane::store::extent::shard::RESERVE_CHUNKS;
use torus_dataplane::store::extent::shared::Shared;
use torus_dataplane::store::extent::simulated::{self, SimDisk};
use torus_replication::replica::Share;
use torus_replication::site::Engine;
use torus_replication::terms::{Generation, Member};

use super::control::Control;
use super::disk::{NodeDevices, Stored, object_of};
use super::exports::{Exports, ingress_of};
use super::manager::{Manager, Map};
use super::peers::Peer;
use super::{
    Checker, Event, Plan, TICK_NS, Travels, World, counters, member_of, site_of, volume_id, volume_of,
};
use crate::network::{self, Endpoint, Power};
use crate::random::Random;
use crate::schedule::Clock;

/// Requests of initiators at a node.
const LIMITS: Limits = Limits { requests: 64, clients: 16, device_depth: 32 };

/// What of a node ends with its process.
pub(super) struct Process {
    pub(super) serving: Serving,
    pub(super) disk: SimDisk,
    shared: Arc<Shared>,
    stats: CoreStats,
    pub(super) discovery: Discovery,
    pub(super) exports: Exports,
    pub(super) ingress: Vec<Ingress>,
    /// Frames that have come and were not looked at, with their interfaces.
    pub(super) ring: VecDeque<(u8, Rc<[u8]>)>,
    pub(super) peers: Vec<Peer>,
    /// Chunks that are left free by what other nodes ask.
    pub(super) requests_leave_chunks: usize,
    /// Disk requests that have a time at which they end.
    pub(super) timed: u64,
    /// When the core looks around next.
    turn_ns: u64,
    pub(super) manager: Manager,
}

impl Process {
    pub(super) fn parts(&mut self, boot_ns: u64) -> (&mut Serving, Around<'_, NodeDevices<'_>>) {
        let devices = NodeDevices { disk: &mut self.disk, boot_ns };
        let around = Around { devices, served: &self.exports.served, stats: &self.stats, now_ns: boot_ns };
        (&mut self.serving, around)
    }

    pub(super) fn with<T>(
        &mut self,
        boot_ns: u64,
        step: impl FnOnce(&mut Replicating, &mut Ground<'_, NodeDevices<'_>>) -> T,
    ) -> T {
        let (serving, mut around) = self.parts(boot_ns);
        let (replicating, mut ground) = serving.replicating(&mut around);
        step(replicating, &mut ground)
    }

    fn engine(&self) -> &Engine<Payload> {
        self.serving.replicated().engine()
    }

    /// Under which generation this process is, or was last, head of a volume.
    pub(super) fn generation(&self, volume: usize) -> Option<Generation> {
        let volume = volume_id(volume);
        let head = self.engine().head(volume).map(torus_replication::head::Head::generation);
        head.or_else(|| self.manager.reported.ended.get(&volume).map(|(generation, _)| *generation))
    }

    /// Whether nothing is in progress.
    fn is_idle(&self) -> bool {
        self.serving.is_empty() && self.ring.is_empty() && self.peers.iter().all(Peer::is_idle)
    }

    /// Whether all memory has come back, but for what shards keep.
    fn has_all_memory(&self) -> bool {
        let kept = self.shared.scrubs.len() * RESERVE_CHUNKS;
        self.disk.pool.free_chunks() + kept == self.disk.pool.chunk_capacity()
    }
}

/// A node.
pub(super) struct Node {
    index: usize,
    pub(super) stored: Stored,
    /// Grown durably before every start of its data plane.
    pub(super) start: u64,
    /// Grows whenever its process ends: what was meant for an earlier one is not for this one.
    pub(super) life: u64,
    /// Its data plane cannot be started.
    pub(super) is_held: bool,
    clock: Clock,
    pub(super) random: Random,
    pub(super) process: Option<Process>,
    /// What both processes share.
    pub(super) map: Map,
    pub(super) control: Option<Control>,
    pub(super) control_life: u64,
    /// Of all its control processes: what they have asked of etcd.
    pub(super) requests: u64,
    pub(super) watches: u64,
}

impl Node {
    pub(super) fn new(index: usize, plan: &Plan, mut random: Random) -> Node {
        Node {
            index,
            stored: Stored::new(member_of(index).store, plan.store, &mut random),
            start: 0,
            life: 0,
            is_held: false,
            clock: Clock::drawn(0, 10_000, &mut random),
            random,
            process: None,
            map: Map::default(),
            control: None,
            control_life: 0,
            requests: 0,
            watches: 0,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    fn engine(&self) -> Option<&Engine<Payload>> {
        self.process.as_ref().map(Process::engine)
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.engine().is_some_and(|engine| engine.heads().all(|(_, head)| head.is_quiet()))
    }

    /// Whether nothing is in progress.
    pub(super) fn is_idle(&self) -> bool {
        self.process.as_ref().is_some_and(Process::is_idle)
    }

    /// Whether all memory has come back, but for what shards keep.
    pub(super) fn has_all_memory(&self) -> bool {
        self.process.as_ref().is_some_and(Process::has_all_memory)
    }

    /// Its store, as other nodes are to know it.
    pub(super) fn member(&self) -> Member {
        Member { incarnation: self.stored.layout.incarnation, ..member_of(self.index) }
    }

    /// Whether its store takes no more writes until it is opened again.
    pub(super) fn has_failed_store(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.shared.has_failed() || process.disk.is_gone())
    }

    /// Whether its head of the volume can answer now.
    pub(super) fn serves(&self, volume: usize, now_ns: u64) -> bool {
        let boot_ns = self.clock.boot_ns(now_ns);
        self.engine().is_some_and(|engine| engine.is_serving(volume_id(volume), boot_ns))
    }

    pub(super) fn describe(&self) -> String {
        let Some(process) = &self.process else { return format!("node {} is down", self.index) };
        let heads = process.engine().heads();
        let heads: Vec<String> =
            heads.map(|(volume, head)| format!("head of {}: {head:?}", volume_of(volume))).collect();
        let pool = &process.disk.pool;
        format!(
            "node {}: follows {} of {}, {} of {} chunks are free, {} disk requests, serving is empty: {}, frames: {}, peers are idle: {}, store has failed: {}; {}",
            self.index,
            process.follows(),
            self.map.desired.version,
            pool.free_chunks(),
            pool.chunk_capacity(),
            process.disk.in_flight(),
            process.serving.is_empty(),
            process.ring.len(),
            process.peers.iter().all(Peer::is_idle),
            self.has_failed_store(),
            heads.join("; ")
        )
    }
}

impl World {
    /// What a node's boot-time clock shows now.
    pub(super) fn boot_ns(&self, node: usize) -> u64 {
        self.nodes[node].clock.boot_ns(self.now_ns())
    }

    /// Starts a node's process.
    pub(super) fn boot(&mut self, node: usize) {
        let now_ns = self.now_ns();
        let boot_ns = self.boot_ns(node);
        let plan = &self.plan;
        let at = &mut self.nodes[node];
        if at.map.desired.version == 0 {
            return;
        }
        let Some(media) = at.stored.media.take() else { return };
        let opened = simulated::open(&mut at.stored.layout, media, at.stored.flushes_batches);
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.object(Checker::Store, format!("the store of node {node} cannot be opened: {error}"));
                return;
            }
        };
        let config = RegionConfig { cores: 1, chunks_per_core: plan.chunks, headers_per_core: 64 };
        let pool = Region::new(config).and_then(|region| region.pool(0)).expect("there is memory");
        let (stats, clients) = counters::take();
        let leave_chunks = |parts: usize| pool.chunk_capacity() * parts / 16;
        let replicating = Replicating::new(site_of(node), boot_ns).leaving(leave_chunks(1));
        let mut serving =
            Serving::new(LIMITS, Clients::new(LIMITS.clients, clients), replicating).leaving(leave_chunks(4));
        serving.open_store(0, opened.shards.into_iter().map(Box::new));
        let shards = at.stored.layout.shards;
        let volumes = (0..plan.volumes).map(|volume| (volume_id(volume), object_of(volume, shards)));
        serving.open_replicas(0, at.member(), volumes);
        at.process = Some(Process {
            serving,
            shared: opened.shared,
            stats,
            discovery: Discovery::default(),
            exports: Exports::default(),
            ingress: ingress_of(node),
            ring: VecDeque::new(),
            peers: (0..plan.nodes).map(|_| Peer::default()).collect(),
            requests_leave_chunks: leave_chunks(2),
            timed: 0,
            turn_ns: u64::MAX,
            manager: Manager::new(&at.map, boot_ns),
            disk: SimDisk::new(opened.media, pool),
        });
        let life = at.life;
        self.network.set_power(now_ns, Endpoint(node), Power::Up);
        self.schedule.after(1000, Event::Tick { node, life });
        self.note(|| format!("node {node} starts"));
        self.manage_by(node, now_ns + 1000);
        self.pump(node);
    }

    /// A node's machine is on, and its control process starts; so does the data plane, in time.
    pub(super) fn power_on(&mut self, node: usize) {
        self.nodes[node].is_held = false;
        self.start_control(node);
        self.wake_supervisor(node);
    }

    /// Ends a node's data plane, and what was in flight with it; without power its control process too, and the map is lost.
    pub(super) fn kill(&mut self, node: usize, power: Power) {
        let now_ns = self.now_ns();
        let at = &mut self.nodes[node];
        if at.process.is_some() {
            at.life += 1;
        }
        if power == Power::Off {
            at.map = Map::default();
            self.end_control(node);
        }
        self.leave_disk(node, power);
        self.network.set_power(now_ns, Endpoint(node), power);
        self.note(|| format!("node {node} ends: {power:?}"));
        self.wake_supervisor(node);
    }

    /// The same, and it does not start again before [`World::power_on`].
    pub(super) fn hold(&mut self, node: usize, power: Power) {
        self.nodes[node].is_held = true;
        self.kill(node, power);
    }

    pub(super) fn tick(&mut self, node: usize, life: u64) {
        if self.nodes[node].life != life {
            return;
        }
        self.schedule.after(TICK_NS, Event::Tick { node, life });
        if self.network.is_paused(Endpoint(node)) {
            return;
        }
        let boot_ns = self.boot_ns(node);
        self.reconnect(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        process.with(boot_ns, |replicating, ground| replicating.tick(ground));
        self.hear_core(node, true);
        self.check_wishes(node);
        self.discover(node);
        self.pump(node);
    }

    /// Has a node's core look around at that time, if it would not before.
    pub(super) fn turn_by(&mut self, node: usize, at_ns: u64) {
        let at = &mut self.nodes[node];
        let life = at.life;
        let Some(process) = &mut at.process else { return };
        if at_ns < process.turn_ns {
            process.turn_ns = at_ns;
            self.schedule.at(at_ns, Event::Turn { node, life });
        }
    }

    /// A node's core looks around.
    pub(super) fn turn(&mut self, node: usize, life: u64) {
        let now_ns = self.now_ns();
        let at = &mut self.nodes[node];
        if at.life != life {
            return;
        }
        let Some(process) = &mut at.process else { return };
        if now_ns < process.turn_ns {
            return;
        }
        process.turn_ns = u64::MAX;
        if self.network.is_paused(Endpoint(node)) {
            self.turn_by(node, now_ns + TICK_NS);
            return;
        }
        self.receive(node);
        self.pump(node);
    }

    pub(super) fn node_event(&mut self, node: usize, event: network::Event<Travels>) {
        if !matches!(event, network::Event::Frame { .. } | network::Event::Message { .. }) {
            self.note(|| format!("node {node}: {event:?}"));
        }
        match event {
            network::Event::Frame { segment, payload: Travels::Frame(bytes), .. } => {
                self.frame_comes(node, segment, bytes);
            }
            event => self.peer_event(node, event),
        }
    }

    /// Goes on with everything that has ended or come until nothing is left.
    pub(super) fn pump(&mut self, node: usize) {
        let boot_ns = self.boot_ns(node);
        while let Some(process) = &mut self.nodes[node].process {
            let (serving, mut around) = process.parts(boot_ns);
            if serving.finish_next(&mut around) {
                while let Some(answer) =
                    self.nodes[node].process.as_mut().and_then(|process| process.serving.next_answer())
                {
                    self.send_answer(node, answer);
                }
            } else if !serving.start_next(&mut around)
                && !self.read_peers(node)
                && !self.turn_stores(node, boot_ns)
                && !self.send_to_peers(node)
            {
                break;
            }
        }
        self.time_disk(node);
        self.hear_core(node, false);
        self.retry_peers(node);
        let at = &self.nodes[node];
        if let Some(process) = &at.process {
            let due_ns = process.serving.stores_due_ns();
            if due_ns != u64::MAX {
                let at_ns = at.clock.simulated_ns(due_ns);
                self.turn_by(node, at_ns);
            }
        }
    }

    fn turn_stores(&mut self, node: usize, boot_ns: u64) -> bool {
        let Some(process) = &mut self.nodes[node].process else { return false };
        let (serving, mut around) = process.parts(boot_ns);
        serving.turn_stores(&mut around)
    }

    /// The store of this node owns a part of a volume no more; whether nothing is left of it.
    pub(super) fn retire(&mut self, node: usize, volume: VolumeId, share: Share) -> bool {
        let boot_ns = self.boot_ns(node);
        let Some(process) = &mut self.nodes[node].process else { return false };
        let member = member_of(node);
        if process.serving.replicated().has_retired(member, volume, share) {
            return true;
        }
        process.with(boot_ns, |replicating, ground| replicating.retire(member, volume, share, ground));
        self.pump(node);
        false
    }
}
