//! A node: one store, and a data plane around the real heads and replicas.
//!
//! A node has one connection to each other one for what its heads ask, and takes one from each. A new one of a node is served when nothing
//! that an earlier one brought is in progress any more; what an earlier one is owed is never sent by the new one.

use std::collections::BTreeMap;

use aoe_xdp::order::{Access, Admission, RangeOrder, RequestId};
use torus_replication::grants::{Grants, RENEW_NS};
use torus_replication::head::{self, Head, Token};
use torus_replication::membership::{Membership, Record};
use torus_replication::message::{Answer, GrantRequest, Memory, Reply, Request};
use torus_replication::mutants::{self, Mutant};
use torus_replication::replica::{self, Replicas, WorkId};
use torus_replication::terms::{EXTENT_BLOCKS, Generation};

use super::client::{ClientReply, ClientRequest, from_blocks, to_blocks};
use super::store::{Block, SECTORS, Store};
use super::{Checker, Event, Message, Plan, TICK_NS, World, member_of, node_id, node_of, volume_of};
use crate::network::{self, ConnectionId, Endpoint, Power};
use crate::random::Random;
use crate::schedule::Clock;

/// What a message to itself takes.
const LOOPBACK_NS: u64 = 2_000;
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
    is_served: bool,
    held: Vec<Message>,
    asked_ns: u64,
}

struct HeadAt {
    head: Head<SimMemory>,
    order: RangeOrder,
    free: Vec<RequestId>,
    doing: BTreeMap<RequestId, ClientRequest>,
    announced_ns: u64,
    is_in_doubt: bool,
}

impl HeadAt {
    /// A request's turn has come.
    fn begin(&mut self, id: RequestId, grants: &Grants, memory: &mut SimMemory, boot_ns: u64) {
        let Some(request) = self.doing.get(&id) else { return };
        let (range, payload, head, tail) = to_blocks(request);
        let token = Token(id.0.into());
        match payload {
            Some(payload) => self.head.write(token, range, payload, head, tail, grants, memory, boot_ns),
            None => self.head.read(token, range, grants, memory, boot_ns),
        }
    }
}

struct Process {
    replicas: Replicas<Vec<Block>>,
    heads: BTreeMap<usize, HeadAt>,
    grants: Grants,
    peers: Vec<Peer>,
    memory: SimMemory,
    /// The last take-over of each volume that had a head here: its numbers are used.
    used: BTreeMap<usize, u64>,
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

    fn head(&self, volume: usize) -> Option<&HeadAt> {
        self.process.as_ref()?.heads.get(&volume)
    }

    pub(super) fn has_head(&self, volume: usize) -> bool {
        self.head(volume).is_some()
    }

    pub(super) fn head_takeover(&self, volume: usize) -> Option<u64> {
        self.head(volume).map(|at| at.head.generation().takeover)
    }

    /// Whether this process had a head of the volume under that take-over.
    pub(super) fn has_used(&self, volume: usize, takeover: u64) -> bool {
        self.process
            .as_ref()
            .is_some_and(|process| process.used.get(&volume).is_some_and(|used| *used >= takeover))
    }

    /// Whether a change that its head asked for has no outcome yet.
    pub(super) fn is_in_doubt(&self, volume: usize) -> bool {
        self.head(volume).is_some_and(|at| at.is_in_doubt)
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.heads.values().all(|at| at.head.is_quiet()))
    }

    /// Whether its head of the volume can answer now.
    pub(super) fn serves(&self, volume: usize, now_ns: u64) -> bool {
        let boot_ns = self.clock.boot_ns(now_ns);
        let grants = self.process.as_ref().map(|process| &process.grants);
        let head = self.head(volume).map(|at| &at.head);
        head.zip(grants).is_some_and(|(head, grants)| head.is_serving(grants, boot_ns))
    }

    pub(super) fn describe(&self) -> String {
        let Some(process) = &self.process else { return format!("node {} is down", self.index) };
        let heads: Vec<String> =
            process.heads.iter().map(|(volume, at)| format!("head of {volume}: {:?}", at.head)).collect();
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
        let mut replicas = Replicas::new(at.clock.boot_ns(now_ns));
        replicas.add_store(at.store.member, at.store.durables());
        let peers = (0..nodes).map(|_| Peer::default()).collect();
        at.process = Some(Process {
            replicas,
            heads: BTreeMap::new(),
            grants: Grants::default(),
            peers,
            memory: SimMemory,
            used: BTreeMap::new(),
        });
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
        process.replicas.tick(boot_ns);
        let Process { heads, grants, memory, .. } = process;
        for at in heads.values_mut() {
            at.head.tick(grants, memory, boot_ns);
        }
        self.ask_for_grants(node, false);
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

    fn ask_for_grants(&mut self, node: usize, is_urgent: bool) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        if process.heads.is_empty() {
            return;
        }
        let mut ask = Vec::new();
        for (other, peer) in process.peers.iter_mut().enumerate() {
            let is_due = is_urgent || boot_ns.saturating_sub(peer.asked_ns) >= RENEW_NS;
            if is_due && (other == node || peer.is_out_up) {
                peer.asked_ns = boot_ns;
                ask.push(other);
            }
        }
        for other in ask {
            self.send_out(
                node,
                other,
                Message::GrantRequest(GrantRequest { asked_ns: boot_ns, from: node_id(node) }),
            );
        }
    }

    fn make_known(&mut self, node: usize) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        let mut known = Vec::new();
        for (volume, at) in &mut process.heads {
            if boot_ns >= at.announced_ns + ANNOUNCE_NS && at.head.is_serving(&process.grants, boot_ns) {
                at.announced_ns = boot_ns;
                known.push(*volume);
            }
        }
        for volume in known {
            self.announce(node, volume);
        }
    }

    /// Sends what a head or the grants ask, if there is a way.
    fn send_out(&mut self, node: usize, to: usize, message: Message) {
        let now_ns = self.now_ns();
        if to == node {
            let life = self.nodes[node].life;
            self.schedule.after(LOOPBACK_NS, Event::Loopback { node, life, message });
            return;
        }
        let Some(process) = &self.nodes[node].process else { return };
        let peer = &process.peers[to];
        if let Some(connection) = peer.out.filter(|_| peer.is_out_up)
            && self.network.send(now_ns, Endpoint(node), connection, message).is_err()
        {
            self.network.close(now_ns, Endpoint(node), connection);
            self.lost_out(node, to);
        }
    }

    /// Sends what a replica answers, by the connection that the question came by.
    fn send_back(&mut self, node: usize, to: usize, message: Message) {
        let now_ns = self.now_ns();
        if to == node {
            let life = self.nodes[node].life;
            self.schedule.after(LOOPBACK_NS, Event::Loopback { node, life, message });
            return;
        }
        let Some(process) = &mut self.nodes[node].process else { return };
        let peer = &mut process.peers[to];
        if let Some(connection) = peer.incoming.filter(|_| peer.is_served)
            && self.network.send(now_ns, Endpoint(node), connection, message).is_err()
        {
            self.network.close(now_ns, Endpoint(node), connection);
            peer.incoming = None;
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
            let Process { heads, grants, memory, .. } = process;
            for at in heads.values_mut() {
                at.head.disconnected(node_id(to), grants, memory, boot_ns);
            }
        }
    }

    pub(super) fn node_event(&mut self, node: usize, event: network::Event<Message>) {
        let now_ns = self.now_ns();
        let boot_ns = self.nodes[node].clock.boot_ns(now_ns);
        if !matches!(event, network::Event::Frame { .. } | network::Event::Message { .. }) {
            self.note(|| format!("node {node}: {event:?}"));
        }
        let Some(process) = &mut self.nodes[node].process else { return };
        match event {
            network::Event::Frame { payload: Message::Client(request), .. } => {
                self.client_request(node, request);
            }
            network::Event::Frame { .. } | network::Event::Carrier { .. } => {}
            network::Event::Connected { connection, .. } => {
                if let Some(other) = process.peers.iter().position(|peer| peer.out == Some(connection)) {
                    process.peers[other].is_out_up = true;
                    process.peers[other].asked_ns = 0;
                    let Process { heads, grants, memory, .. } = process;
                    for at in heads.values_mut() {
                        at.head.connected(node_id(other), grants, memory, boot_ns);
                    }
                }
            }
            network::Event::ConnectFailed { connection, .. } | network::Event::Closed { connection, .. } => {
                if let Some(other) = process.peers.iter().position(|peer| peer.out == Some(connection)) {
                    self.lost_out(node, other);
                } else if let Some(peer) =
                    process.peers.iter_mut().find(|peer| peer.incoming == Some(connection))
                {
                    peer.incoming = None;
                    peer.held.clear();
                }
            }
            network::Event::Accepted { connection, from, .. } => {
                let peer = &mut process.peers[from.0];
                let older = peer.incoming.replace(connection);
                peer.is_served = false;
                peer.held.clear();
                if let Some(older) = older {
                    self.network.close(now_ns, Endpoint(node), older);
                }
            }
            network::Event::Message { connection, payload, .. } => {
                if let Some(other) = process.peers.iter().position(|peer| peer.out == Some(connection)) {
                    self.take(node, other, payload);
                } else if let Some(other) =
                    process.peers.iter().position(|peer| peer.incoming == Some(connection))
                {
                    process.peers[other].held.push(payload);
                }
            }
        }
        self.pump(node);
    }

    /// Takes what has come by connections that can be served.
    fn serve(&mut self, node: usize) {
        for other in 0..self.plan.nodes {
            let Some(process) = &mut self.nodes[node].process else { return };
            let peer = &mut process.peers[other];
            if peer.incoming.is_none() || peer.held.is_empty() {
                continue;
            }
            if !peer.is_served {
                let has_ended = process.replicas.has_ended_all_of(node_id(other));
                if !has_ended && !mutants::is(Mutant::ConnectionServedEarly) {
                    continue;
                }
                peer.is_served = true;
            }
            for message in std::mem::take(&mut peer.held) {
                self.take(node, other, message);
            }
        }
    }

    pub(super) fn loopback(&mut self, node: usize, life: u64, message: Message) {
        if self.nodes[node].life != life {
            return;
        }
        if !self.is_awake(node) {
            self.schedule.after(TICK_NS, Event::Loopback { node, life, message });
            return;
        }
        self.take(node, node, message);
        self.pump(node);
    }

    fn take(&mut self, node: usize, from: usize, message: Message) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        match message {
            Message::Request(request) => process.replicas.request(node_id(from), *request, boot_ns),
            Message::Answer(answer) => {
                let is_open = matches!(answer.reply, Reply::Opened { .. });
                let volume = volume_of(answer.volume);
                let Process { heads, grants, memory, .. } = process;
                if let Some(at) = heads.get_mut(&volume) {
                    at.head.answer(*answer, grants, memory, boot_ns);
                }
                if is_open {
                    self.ask_for_grants(node, true);
                }
            }
            Message::GrantRequest(request) => process.replicas.grant(request, boot_ns),
            Message::GrantAnswer(answer) => {
                process.grants.received(node_id(from), answer.asked_ns, boot_ns);
                let Process { heads, grants, memory, .. } = process;
                for (volume, at) in heads {
                    for (_, below) in
                        answer.excluded.iter().filter(|(excluded, _)| volume_of(*excluded) == *volume)
                    {
                        at.head.excluded(*below, memory);
                    }
                    at.head.tick(grants, memory, boot_ns);
                }
            }
            Message::Client(_) | Message::Reply(_) => {}
        }
    }

    fn client_request(&mut self, node: usize, request: ClientRequest) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        let Process { heads, grants, memory, .. } = process;
        let Some(at) = heads.get_mut(&request.volume) else { return };
        // A copy of one in progress: it gets that one's answer.
        let is_known = at.doing.values().any(|doing| doing.op == request.op);
        if is_known || !at.head.is_serving(grants, boot_ns) {
            return;
        }
        // As with any target, what there is no room for is dropped.
        let Some(id) = at.free.pop() else { return };
        let (range, ..) = to_blocks(&request);
        let access = if request.values.is_some() { Access::Exclusive } else { Access::Shared };
        let admission = at.order.admit(id, 0, range.start, range.end - 1, access);
        at.doing.insert(id, request);
        if admission == Admission::Granted {
            at.begin(id, grants, memory, boot_ns);
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
            process.replicas.ended(id, ended, boot_ns);
        }
        self.pump(node);
    }

    /// Does what heads and replicas want, until they want nothing more.
    fn pump(&mut self, node: usize) {
        loop {
            self.serve(node);
            let Some(process) = &mut self.nodes[node].process else { return };
            if let Some(output) = process.replicas.output() {
                self.replica_output(node, output);
                continue;
            }
            let next = process
                .heads
                .iter_mut()
                .find_map(|(volume, at)| at.head.output().map(|output| (*volume, output)));
            let Some((volume, output)) = next else { return };
            self.head_output(node, volume, output);
        }
    }

    fn replica_output(&mut self, node: usize, output: replica::Output<Vec<Block>>) {
        match output {
            replica::Output::Send(to, answer) => {
                self.note(|| format!("node {node} answers {} {}", node_of(to), brief_answer(&answer)));
                self.send_back(node, node_of(to), Message::Answer(Box::new(answer)));
            }
            replica::Output::Grant(to, answer) => {
                self.send_back(node, node_of(to), Message::GrantAnswer(answer));
            }
            replica::Output::Start { id, volume, work, .. } => {
                let at = &mut self.nodes[node];
                let delay_ns = at.random.range(20_000..2_000_000) + at.random.below(at.slow_ns + 1);
                at.store.start(id, volume, work);
                let life = at.life;
                self.schedule.after(delay_ns, Event::Work { node, life, id });
            }
            replica::Output::Stable(_, volume, version) => self.nodes[node].store.set_stable(volume, version),
            replica::Output::Release(_) => {}
        }
    }

    fn head_output(&mut self, node: usize, volume: usize, output: head::Output<Vec<Block>>) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        match output {
            head::Output::Send(to, request) => {
                self.note(|| format!("node {node} head asks {} {}", node_of(to), brief_request(&request)));
                self.send_out(node, node_of(to), Message::Request(Box::new(request)));
            }
            head::Output::Answer { token, result, blocks } => {
                let Some(process) = &mut self.nodes[node].process else { return };
                let Process { heads, grants, memory, .. } = process;
                let Some(at) = heads.get_mut(&volume) else { return };
                let id = RequestId(u32::try_from(token.0).expect("as it was given"));
                let Some(request) = at.doing.remove(&id) else { return };
                let generation = at.head.generation();
                let (range, ..) = to_blocks(&request);
                let values = blocks.map(|blocks| from_blocks(&request, &blocks));
                let result = result.map(|()| values);
                let mut granted = Vec::new();
                at.order.release(id, |next| granted.push(next));
                at.free.push(id);
                for next in granted {
                    at.begin(next, grants, memory, boot_ns);
                }
                self.check_order(node, volume, &range, generation);
                self.reply(node, volume, ClientReply { op: request.op, result });
            }
            head::Output::Change { revision, change } => {
                if let Some(at) =
                    self.nodes[node].process.as_mut().and_then(|process| process.heads.get_mut(&volume))
                {
                    at.is_in_doubt = true;
                }
                self.nodes[node].is_asking[volume] = true;
                self.wish_for_change(node, volume, revision, change);
            }
            head::Output::End(end) => {
                self.coverage.replaced += 1;
                self.note(|| format!("node {node}: head of volume {volume} ends: {end:?}"));
                if let Some(process) = &mut self.nodes[node].process {
                    process.heads.remove(&volume);
                }
                self.nodes[node].is_asking[volume] = false;
            }
            head::Output::Refresh | head::Output::Release(_) => {}
        }
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
        let mut head = Head::new(node_id(node), generation, membership, boot_ns);
        for (other, peer) in process.peers.iter().enumerate() {
            if other == node || peer.is_out_up {
                head.connected(node_id(other), &process.grants, &mut process.memory, boot_ns);
            }
        }
        process.used.insert(volume, generation.takeover);
        let at = HeadAt {
            head,
            order: RangeOrder::new(REQUESTS_MAX),
            free: (0..REQUESTS_MAX).rev().map(RequestId).collect(),
            doing: BTreeMap::new(),
            announced_ns: 0,
            is_in_doubt: false,
        };
        process.heads.insert(volume, at);
        self.pump(node);
    }

    /// The record of a volume that this node is head of.
    pub(super) fn tell_record(&mut self, node: usize, volume: usize, record: Record) {
        let boot_ns = self.nodes[node].clock.boot_ns(self.now_ns());
        let Some(process) = &mut self.nodes[node].process else { return };
        let Process { heads, grants, memory, .. } = process;
        if let Some(at) = heads.get_mut(&volume) {
            at.is_in_doubt = false;
            at.head.record(record, grants, memory, boot_ns);
        }
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
