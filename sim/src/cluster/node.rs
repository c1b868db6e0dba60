//! A node: one store, and a data plane around the real heads and replicas of one core.
//!
//! A node has one connection to each other one for what its heads ask, and takes one from each.

use std::collections::BTreeMap;

use aoe_xdp::order::{Access, Admission, RangeOrder, RequestId};
use cluster_map::VolumeId;
use torus_replication::head::{Failure, Token};
use torus_replication::membership::{Membership, Record};
use torus_replication::message::{Answer, Memory, Message, Request};
use torus_replication::replica::{Share, WorkId};
use torus_replication::site::{Engine, Output};
use torus_replication::terms::{EXTENT_BLOCKS, Generation};

use super::client::{ClientReply, ClientRequest, from_blocks, to_blocks};
use super::store::{Block, SECTORS, Store};
use super::{
    Checker, Event, Plan, TICK_NS, Travels, World, member_of, node_of, site_of, volume_id, volume_of,
};
use crate::network::{self, ConnectionId, Endpoint, Power};
use crate::random::Random;
use crate::schedule::Clock;

/// When a lost connection is tried again.
const RECONNECT_NS: u64 = 100_000_000;
/// Requests of initiators at a head.
const REQUESTS_MAX: u32 = 128;
/// How often a head makes itself known.
const ANNOUNCE_NS: u64 = 1_000_000_000;

/// Blocks are values here; nothing has to be given back.
#[derive(Debug, Default)]
pub(super) struct SimMemory;

impl Memory for SimMemory {
    type Blocks = Vec<Block>;

    fn count(&self, blocks: &Vec<Block>) -> usize {
        blocks.len()
    }

    fn share(&mut self, blocks: &Vec<Block>, which: std::ops::Range<usize>) -> Vec<Block> {
        blocks[which].to_vec()
    }

    fn merge(
        &mut self,
        payload: &mut Vec<Block>,
        at: usize,
        payload_bytes: std::ops::Range<usize>,
        old: Vec<Block>,
    ) {
        let sectors = payload_bytes.start / 512..payload_bytes.end / 512;
        for sector in (0..SECTORS).filter(|sector| !sectors.contains(sector)) {
            payload[at][sector] = old[0][sector];
        }
    }

    fn append(&mut self, blocks: &mut Vec<Block>, more: Vec<Block>) {
        blocks.extend(more);
    }

    fn release(&mut self, _blocks: Vec<Block>) {}
}

/// What leads to another node.
#[derive(Debug, Default)]
struct Peer {
    /// For what heads here ask.
    out: Option<ConnectionId>,
    is_out_up: bool,
    retry_at_ns: u64,
    /// For what heads there ask.
    incoming: Option<ConnectionId>,
}

/// The requests of initiators for a volume, in order.
struct Requests {
    order: RangeOrder,
    free: Vec<RequestId>,
    doing: BTreeMap<RequestId, ClientRequest>,
    announced_ns: u64,
}

impl Requests {
    fn new() -> Requests {
        Requests {
            order: RangeOrder::new(REQUESTS_MAX),
            free: (0..REQUESTS_MAX).rev().map(RequestId).collect(),
            doing: BTreeMap::new(),
            announced_ns: 0,
        }
    }
}

struct Process {
    engine: Engine<Vec<Block>>,
    /// Of each volume that has a head here.
    requests: BTreeMap<usize, Requests>,
    peers: Vec<Peer>,
    memory: SimMemory,
}

impl Process {
    /// A request's turn has come.
    fn begin(&mut self, volume: usize, id: RequestId, boot_ns: u64) {
        let Some(request) = self.requests.get(&volume).and_then(|at| at.doing.get(&id)) else { return };
        let (range, payload, head, tail) = to_blocks(request);
        let (volume, token) = (volume_id(volume), Token(id.0.into()));
        match payload {
            Some(payload) => {
                self.engine.write(volume, token, range, payload, head, tail, &mut self.memory, boot_ns);
            }
            None => self.engine.read(volume, token, range, &mut self.memory, boot_ns),
        }
    }
}

/// A node.
pub(super) struct Node {
    index: usize,
    pub(super) store: Store,
    /// Grown at every start of its data plane.
    pub(super) start: u64,
    /// Grows whenever its process ends: what was meant for an earlier one is not for this one.
    pub(super) life: u64,
    pub(super) down_since_ns: Option<u64>,
    pub(super) is_asking: Vec<bool>,
    /// Requests to its store take that much longer.
    pub(super) slow_ns: u64,
    clock: Clock,
    random: Random,
    process: Option<Process>,
}

impl Node {
    pub(super) fn new(index: usize, plan: &Plan, mut random: Random) -> Node {
        Node {
            index,
            store: Store::new(member_of(index), plan.extents_max),
            start: 0,
            life: 0,
            down_since_ns: None,
            is_asking: vec![false; plan.volumes],
            slow_ns: 0,
            clock: Clock::drawn(0, 10_000, &mut random),
            random,
            process: None,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    fn engine(&self) -> Option<&Engine<Vec<Block>>> {
        self.process.as_ref().map(|process| &process.engine)
    }

    pub(super) fn has_head(&self, volume: usize) -> bool {
        self.head_takeover(volume).is_some()
    }

    pub(super) fn head_takeover(&self, volume: usize) -> Option<u64> {
        Some(self.engine()?.head(volume_id(volume))?.generation().takeover)
    }

    /// Revision of the record that its head of the volume serves under.
    pub(super) fn known_revision(&self, volume: usize) -> Option<u64> {
        Some(self.engine()?.head(volume_id(volume))?.membership().record().revision)
    }

    /// Whether this process had a head of the volume under that take-over.
    pub(super) fn has_used(&self, volume: usize, takeover: u64) -> bool {
        let used = self.engine().and_then(|engine| engine.used(volume_id(volume)));
        used.is_some_and(|used| used.takeover >= takeover)
    }

    /// Whether a change that its head asked for has no outcome yet.
    pub(super) fn is_in_doubt(&self, volume: usize) -> bool {
        let head = self.engine().and_then(|engine| engine.head(volume_id(volume)));
        head.is_some_and(|head| head.membership().doubt().is_some())
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.engine().is_some_and(|engine| engine.heads().all(|(_, head)| head.is_quiet()))
    }

    /// Whether its head of the volume can answer now.
    pub(super) fn serves(&self, volume: usize, now_ns: u64) -> bool {
        let boot_ns = self.clock.boot_ns(now_ns);
        self.engine().is_some_and(|engine| engine.is_serving(volume_id(volume), boot_ns))
    }

    pub(super) fn describe(&self) -> String {
        let Some(engine) = self.engine() else { return format!("node {} is down", self.index) };
        let heads: Vec<String> =
            engine.heads().map(|(volume, head)| format!("head of {}: {head:?}", volume_of(volume))).collect();
        format!("node {}: {}", self.index, heads.join("; "))
    }
}

impl World {
    /// Starts a node's process.
    pub(super) fn boot(&mut self, node: usize) {
        let now_ns = self.now_ns();
        let nodes = self.plan.nodes;
        let at = &mut self.nodes[node];
        at.start += 1;
        at.down_since_ns = None;
        let mut engine = Engine::new(site_of(node), at.clock.boot_ns(now_ns));
        engine.add_store(at.store.member, at.store.durables());
        if at.random.one_in(4) {
            let boot_ns = at.clock.boot_ns(now_ns);
            engine.set_resync_rate(at.random.range(8 << 20..64 << 20), &mut SimMemory, boot_ns);
        }
        let peers = (0..nodes).map(|_| Peer::default()).collect();
        at.process = Some(Process { engine, requests: BTreeMap::new(), peers, memory: SimMemory });
        at.is_asking.fill(false);
        let life = at.life;
        self.network.set_power(now_ns, Endpoint(node), Power::Up);
        self.schedule.after(1000, Event::Tick { node, life });
        self.note(|| format!("node {node} starts"));
    }

    /// Ends a node's process, and what was in flight with it.
    pub(super) fn kill(&mut self, node: usize, power: Power) {
        let now_ns = self.now_ns();
        let at = &mut self.nodes[node];
        if at.process.take().is_some() {
            at.life += 1;
            at.down_since_ns = Some(now_ns);
            let mut random = at.random.split();
            at.store.crash(&mut random);
        }
        self.network.set_power(now_ns, Endpoint(node), power);
        self.note(|| format!("node {node} ends: {power:?}"));
    }

    /// Whether a node's process can take an event now; one that stands still takes it later.
    fn is_awake(&self, node: usize) -> bool {
        !self.network.is_paused(Endpoint(node))
    }

    pub(super) fn tick(&mut self, node: usize, life: u64) {
        if self.nodes[node].life != life {
            return;
        }
        self.schedule.after(TICK_NS, Event::Tick { node, life });
        if !self.is_awake(node) {
            return;
        }
        let now_ns = self.now_ns();
        let boot_ns = self.nodes[node].clock.boot_ns(now_ns);
        self.reconnect(node, now_ns);
        let Some(process) = &mut self.nodes[node].process else { return };
        process.engine.tick(&mut process.memory, boot_ns);
        self.make_known(node);
        self.pump(node);
    }

    fn reconnect(&mut self, node: usize, now_ns: u64) {
        for other in (0..self.plan.nodes).filter(|other| *other != node) {
            let Some(process) = &mut self.nodes[node].process else { return };
            let peer = &mut process.peers[other];
            if peer.out.is_none() && now_ns >= peer.retry_at_ns {
                peer.is_out_up = false;
                peer.out = Some(self.network.connect(now_ns, Endpoint(node), Endpoint(other)));
            }
        }
    }

    fn make_known(&mut self, node: usize) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        let mut known = Vec::new();
        for (volume, at) in &mut process.requests {
            let is_serving = process.engine.is_serving(volume_id(*volume), boot_ns);
            if boot_ns >= at.announced_ns + ANNOUNCE_NS && is_serving {
                at.announced_ns = boot_ns;
                known.push(*volume);
            }
        }
        for volume in known {
            self.announce(node, volume);
        }
    }

    /// Sends what a head or the grants ask, if there is a way.
    fn send_out(&mut self, node: usize, to: usize, message: Message<Vec<Block>>) {
        let now_ns = self.now_ns();
        let Some(process) = &self.nodes[node].process else { return };
        let peer = &process.peers[to];
        if let Some(connection) = peer.out.filter(|_| peer.is_out_up)
            && self
                .network
                .send(now_ns, Endpoint(node), connection, Travels::Peer(Box::new(message)))
                .is_err()
        {
            self.network.close(now_ns, Endpoint(node), connection);
            self.lost_out(node, to);
        }
    }

    /// Sends what a replica answers, by the connection that the question came by.
    fn send_back(&mut self, node: usize, to: usize, message: Message<Vec<Block>>) {
        let now_ns = self.now_ns();
        let Some(process) = &mut self.nodes[node].process else { return };
        if let Some(connection) = process.peers[to].incoming
            && self
                .network
                .send(now_ns, Endpoint(node), connection, Travels::Peer(Box::new(message)))
                .is_err()
        {
            self.network.close(now_ns, Endpoint(node), connection);
            self.lost_incoming(node, to);
        }
    }

    fn lost_out(&mut self, node: usize, to: usize) {
        let now_ns = self.now_ns();
        let boot_ns = self.nodes[node].clock.boot_ns(now_ns);
        let Some(process) = &mut self.nodes[node].process else { return };
        let peer = &mut process.peers[to];
        peer.out = None;
        peer.retry_at_ns = now_ns + RECONNECT_NS;
        if std::mem::take(&mut peer.is_out_up) {
            process.engine.disconnected(site_of(to), &mut process.memory, boot_ns);
        }
    }

    fn lost_incoming(&mut self, node: usize, from: usize) {
        let Some(process) = &mut self.nodes[node].process else { return };
        process.peers[from].incoming = None;
        process.engine.closed(site_of(from), &mut process.memory);
    }

    pub(super) fn node_event(&mut self, node: usize, event: network::Event<Travels>) {
        let now_ns = self.now_ns();
        let boot_ns = self.nodes[node].clock.boot_ns(now_ns);
        if !matches!(event, network::Event::Frame { .. } | network::Event::Message { .. }) {
            self.note(|| format!("node {node}: {event:?}"));
        }
        let Some(process) = &mut self.nodes[node].process else { return };
        let Process { engine, peers, memory, .. } = process;
        match event {
            network::Event::Frame { payload: Travels::Client(request), .. } => {
                self.client_request(node, request);
            }
            network::Event::Frame { .. } | network::Event::Carrier { .. } => {}
            network::Event::Connected { connection, .. } => {
                if let Some(other) = peers.iter().position(|peer| peer.out == Some(connection)) {
                    peers[other].is_out_up = true;
                    engine.connected(site_of(other), memory, boot_ns);
                }
            }
            network::Event::ConnectFailed { connection, .. } | network::Event::Closed { connection, .. } => {
                if let Some(other) = peers.iter().position(|peer| peer.out == Some(connection)) {
                    self.lost_out(node, other);
                } else if let Some(other) = peers.iter().position(|peer| peer.incoming == Some(connection)) {
                    self.lost_incoming(node, other);
                }
            }
            network::Event::Accepted { connection, from, .. } => {
                engine.accepted(site_of(from.0), memory);
                if let Some(older) = peers[from.0].incoming.replace(connection) {
                    self.network.close(now_ns, Endpoint(node), older);
                }
            }
            network::Event::Message { connection, payload: Travels::Peer(message), .. } => {
                if let Some(other) = peers.iter().position(|peer| peer.out == Some(connection)) {
                    engine.answered(site_of(other), *message, memory, boot_ns);
                } else if let Some(other) = peers.iter().position(|peer| peer.incoming == Some(connection)) {
                    engine.asked(site_of(other), *message, memory, boot_ns);
                }
            }
            network::Event::Message { .. } => {}
        }
        self.pump(node);
    }

    fn client_request(&mut self, node: usize, request: ClientRequest) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        let volume = request.volume;
        if !process.engine.is_serving(volume_id(volume), boot_ns) {
            return;
        }
        let Some(at) = process.requests.get_mut(&volume) else { return };
        // A copy of one in progress: it gets that one's answer.
        if at.doing.values().any(|doing| doing.op == request.op) {
            return;
        }
        // As with any target, what there is no room for is dropped.
        let Some(id) = at.free.pop() else { return };
        let (range, ..) = to_blocks(&request);
        let access = if request.values.is_some() { Access::Exclusive } else { Access::Shared };
        let admission = at.order.admit(id, 0, range.start, range.end - 1, access);
        at.doing.insert(id, request);
        if admission == Admission::Granted {
            process.begin(volume, id, boot_ns);
        }
    }

    pub(super) fn work_ended(&mut self, node: usize, life: u64, id: WorkId) {
        if self.nodes[node].life != life {
            return;
        }
        if !self.is_awake(node) {
            self.schedule.after(TICK_NS, Event::Work { node, life, id });
            return;
        }
        let at = &mut self.nodes[node];
        let boot_ns = at.clock.boot_ns(self.schedule.now_ns());
        let Some(ended) = at.store.end(id, &mut at.random) else { return };
        if let Some(process) = &mut at.process {
            process.engine.ended(id, ended, &mut process.memory, boot_ns);
        }
        self.pump(node);
    }

    /// Does what heads and replicas want, until they want nothing more.
    fn pump(&mut self, node: usize) {
        while let Some(output) = self.nodes[node].process.as_mut().and_then(|process| process.engine.output())
        {
            self.take_output(node, output);
        }
    }

    fn take_output(&mut self, node: usize, output: Output<Vec<Block>>) {
        match output {
            Output::Ask(to, message) => {
                if let Message::Request(request) = &message {
                    self.note(|| {
                        format!("node {node} head asks {} {}", node_of(to.node), brief_request(request))
                    });
                }
                self.send_out(node, node_of(to.node), message);
            }
            Output::Reply(to, message) => {
                if let Message::Answer(answer) = &message {
                    self.note(|| {
                        format!("node {node} answers {} {}", node_of(to.node), brief_answer(answer))
                    });
                }
                self.send_back(node, node_of(to.node), message);
            }
            Output::Start { id, volume, work, .. } => {
                let at = &mut self.nodes[node];
                let delay_ns = at.random.range(20_000..2_000_000) + at.random.below(at.slow_ns + 1);
                at.store.start(id, volume, work);
                let life = at.life;
                self.schedule.after(delay_ns, Event::Work { node, life, id });
            }
            Output::Stable(_, volume, version) => self.nodes[node].store.set_stable(volume, version),
            Output::Answer { volume, token, result, blocks } => {
                self.answer_client(node, volume_of(volume), token, result, blocks);
            }
            Output::Change { volume, revision, change, .. } => {
                let volume = volume_of(volume);
                self.nodes[node].is_asking[volume] = true;
                self.wish_for_change(node, volume, revision, change);
            }
            Output::HandedOver(volume, _, has_handed_over) => {
                self.note(|| {
                    format!("node {node}: volume {} handed over: {has_handed_over}", volume_of(volume))
                });
                if has_handed_over {
                    self.handed_over(node, volume_of(volume));
                }
            }
            Output::Ended(volume, _, end) => {
                let volume = volume_of(volume);
                self.coverage.replaced += 1;
                self.note(|| format!("node {node}: head of volume {volume} ends: {end:?}"));
                if let Some(process) = &mut self.nodes[node].process {
                    process.requests.remove(&volume);
                }
                self.nodes[node].is_asking[volume] = false;
            }
            Output::Retired(member, volume, share) => self.retired(volume_of(volume), member, share),
            Output::Refresh(_) | Output::Release(_) => {}
        }
    }

    fn answer_client(
        &mut self,
        node: usize,
        volume: usize,
        token: Token,
        result: Result<(), Failure>,
        blocks: Option<Vec<Block>>,
    ) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        let generation =
            process.engine.head(volume_id(volume)).map(torus_replication::head::Head::generation);
        let Some((at, generation)) = process.requests.get_mut(&volume).zip(generation) else { return };
        let id = RequestId(u32::try_from(token.0).expect("as it was given"));
        let Some(request) = at.doing.remove(&id) else { return };
        let (range, ..) = to_blocks(&request);
        let values = blocks.map(|blocks| from_blocks(&request, &blocks));
        let mut granted = Vec::new();
        at.order.release(id, |next| granted.push(next));
        at.free.push(id);
        for next in granted {
            process.begin(volume, next, boot_ns);
        }
        self.check_order(node, volume, &range, generation);
        self.reply(node, volume, ClientReply { op: request.op, result: result.map(|()| values) });
    }

    /// Whoever answers an initiator is head at that moment: nobody answers when a later one has (I1).
    fn check_order(&mut self, node: usize, volume: usize, range: &std::ops::Range<u64>, now: Generation) {
        let spread = self.plan.spread as u64;
        for extent in range.start / u64::from(EXTENT_BLOCKS)..=(range.end - 1) / u64::from(EXTENT_BLOCKS) {
            let highest = self.answered.entry((volume, extent % spread)).or_default();
            if now < *highest {
                let what = format!(
                    "node {node} answers for volume {volume} under generation {now}, after {highest} has answered"
                );
                self.object(Checker::Generations, what);
                return;
            }
            *highest = now;
        }
    }

    /// Closes a node's connection to another one, as something in between may.
    pub(super) fn reset(&mut self, node: usize, other: usize) {
        let now_ns = self.now_ns();
        let peers = self.nodes[node].process.as_ref().map(|process| &process.peers);
        if let Some(connection) = peers.and_then(|peers| peers[other].out) {
            self.network.close(now_ns, Endpoint(node), connection);
            self.lost_out(node, other);
            self.pump(node);
        }
    }

    /// The record names this node under a generation that has no head yet.
    pub(super) fn begin_head(
        &mut self,
        node: usize,
        volume: usize,
        generation: Generation,
        membership: Membership,
    ) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        if process.engine.begin(generation, membership, &mut process.memory, boot_ns) {
            // What the former one has to say is said before.
            self.pump(node);
            if let Some(process) = &mut self.nodes[node].process {
                process.requests.insert(volume, Requests::new());
            }
        }
    }

    /// The store of this node owns a part of a volume no more.
    pub(super) fn retire(&mut self, node: usize, volume: VolumeId, share: Share) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        process.engine.retire(member_of(node), volume, share, &mut process.memory, boot_ns);
        self.pump(node);
    }

    /// The record of a volume that this node is head of.
    pub(super) fn tell_record(&mut self, node: usize, volume: usize, record: Record) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        process.engine.record(volume_id(volume), record, &mut process.memory, boot_ns);
        self.pump(node);
    }

    /// The record names another node.
    pub(super) fn give_up_head(&mut self, node: usize, volume: usize, record: &Record) {
        if self.nodes[node].has_head(volume) {
            self.tell_record(node, volume, record.clone());
        }
    }
}

fn brief_request(request: &Request<Vec<Block>>) -> String {
    let text = format!("{:?}", request.ask);
    format!(
        "vol {} gen {} id {} stable {} {}",
        volume_of(request.volume),
        request.generation,
        request.id,
        request.stable.0,
        &text[..text.len().min(120)]
    )
}

fn brief_answer(answer: &Answer<Vec<Block>>) -> String {
    let text = format!("{:?}", answer.reply);
    format!(
        "vol {} gen {} id {} {}",
        volume_of(answer.volume),
        answer.generation,
        answer.id,
        &text[..text.len().min(120)]
    )
}
