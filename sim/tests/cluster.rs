//! A small cluster of its own kind on all parts of the simulator: a head with a disk that loses nothing, two followers that
//! have every write before it is acknowledged, initiators, etcd, and everything that goes wrong.
//!
//! It shows how the parts are put together, that a right cluster is never objected to, and that a wrong one is: each
//! [`Bug`] has to be found within a number of seeds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use torus_sim::checker::history::{Action, History, OpId, VolumeId};
use torus_sim::checker::trace::Trace;
use torus_sim::checker::watchdog::Watchdog;
use torus_sim::etcd::{self, ClientId, Etcd, LeaseId, Reply, RequestId, Revision, Txn, WatchId};
use torus_sim::exploration::{Exploration, Failed, Ran};
use torus_sim::initiator::{self, Address, Answer, Command, Initiator, Load, Output, Request, Response};
use torus_sim::network::{
    self, ConnectionId, Endpoint, Event, Mac, Media, Network, Power, Quality, SegmentId,
};
use torus_sim::random::Random;
use torus_sim::schedule::{Clock, DRIFT_USUAL_PPM, Schedule};

const MILLI: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;
const NODES: usize = 3;
const INITIATORS: usize = 2;
const HEAD: Endpoint = Endpoint(0);
const EXPORT: Mac = Mac(0x0299);
const ADDRESS: Address = Address { shelf: 1, slot: 1 };
const VOLUME: VolumeId = VolumeId(1);
const SECTORS: usize = 128;
/// Faults end, and then the load.
const HEALED_NS: u64 = 35 * SECOND;
const QUIET_NS: u64 = 45 * SECOND;
const END_NS: u64 = 60 * SECOND;

/// What is wrong with the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    /// It acknowledges what a killed process loses.
    AckBeforeDurable,
    /// It answers some reads by what the sector held before.
    StaleRead,
    /// It executes a write again, later.
    LateWrite,
    /// It does not know some sectors any more.
    Forgets,
    /// It mistakes one sector for another.
    WrongSector,
    /// A follower that was gone once is never waited for to the end.
    NeverAnswers,
    /// It acknowledges before the followers have the write, and does not send it again.
    NotReplicated,
    /// It serves initiators that send one request by several ways, in the order of arrival; some frames take long.
    TwoWays,
    /// None, but the same network.
    OneWay,
}

#[derive(Clone, Debug)]
enum Payload {
    Request(Request),
    Response(Response),
    Replicate { sequence: u64, lba: u64, values: Arc<[u64]> },
    Durable { sequence: u64 },
}

#[derive(Clone, Debug)]
enum Due {
    Fault,
    Heal,
    Quiet,
    Sweep,
    Start(Endpoint),
    Resume(Endpoint),
    Timer { node: usize, life: u64 },
    Again { lba: u64, values: Arc<[u64]> },
    Flush,
}

/// What a run remembers.
enum Note {
    Frame { at: Endpoint, payload: Payload },
    Fault { what: &'static str, at: Endpoint },
    Op { op: OpId, what: &'static str, lba: u64, count: usize },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frame { at, payload: Payload::Request(request) } => write!(f, "{at} hears {request}"),
            Self::Frame { at, payload: Payload::Response(response) } => write!(f, "{at} hears {response}"),
            Self::Frame { at, payload } => write!(f, "{at} hears {payload:?}"),
            Self::Fault { what, at } => write!(f, "{what} {at}"),
            Self::Op { op, what, lba, count } => write!(f, "{op} {what} at {lba}, {count} sectors"),
        }
    }
}

/// A write that waits for followers.
struct Waiting {
    asker: (SegmentId, Mac),
    response: Response,
    followers: BTreeSet<usize>,
}

struct Node {
    life: u64,
    clock: Clock,
    disk: Vec<u64>,
    requests: u64,
    lease: Option<LeaseId>,
    /// By follower: the head's connection to it and whether it stands.
    peers: BTreeMap<usize, (ConnectionId, bool)>,
    waiting: BTreeMap<u64, Waiting>,
    sequence: u64,
    was_alone: bool,
}

struct World {
    bug: Bug,
    random: Random,
    schedule: Schedule<Due>,
    net: Network<Payload>,
    etcd: Etcd,
    nodes: Vec<Node>,
    initiators: Vec<Initiator>,
    history: History,
    watchdog: Watchdog<OpId>,
    trace: Trace<Note>,
    /// What the head's disk held before the last write of each sector, and what survives a kill.
    before: Vec<u64>,
    flushed: Vec<u64>,
    broken: bool,
    events: u64,
}

impl World {
    fn new(seed: u64, bug: Bug) -> Self {
        let root = Random::new(seed);
        let ways = if bug == Bug::TwoWays { 2 } else { 1 };
        let mut random = root.named("world", 0);
        let mut net = Network::new(network::Setup::new(NODES + INITIATORS, 2), root.named("network", 0));
        let rough = matches!(bug, Bug::TwoWays | Bug::OneWay);
        if rough {
            let spikes = Quality { spike_ppm: 10_000, spike_ns: SECOND / 2..2 * SECOND, ..Quality::good() };
            net.set_segment_quality(SegmentId(0), spikes);
        }
        let nodes = (0..NODES).map(|_| Node {
            life: 0,
            clock: Clock::drawn(0, DRIFT_USUAL_PPM, &mut random),
            disk: vec![0; SECTORS],
            requests: 0,
            lease: None,
            peers: BTreeMap::new(),
            waiting: BTreeMap::new(),
            sequence: 0,
            was_alone: false,
        });
        let nodes = nodes.collect();
        let initiators = (0..INITIATORS).map(|number| {
            let setup = initiator::Setup::new(number as u64 + 1, ADDRESS, SECTORS as u64, ways);
            let mut made = Initiator::new(0, setup, root.named("initiator", number as u64));
            let share = SECTORS as u64 / INITIATORS as u64;
            let first = number as u64 * share;
            let mut load = Load { sectors: 1..20, pause_ns: MILLI..20 * MILLI, ..Load::new(SECTORS as u64) };
            load.writes[0] = first..first + if rough { 4 } else { share };
            made.set_load(0, Some(load));
            made
        });
        let mut world = Self {
            bug,
            schedule: Schedule::new(),
            net,
            etcd: Etcd::new(etcd::Setup::new(NODES), root.named("etcd", 0)),
            nodes,
            initiators: initiators.collect(),
            history: History::new(),
            // The driver gives a device up by then; answers that come very late make it as slow as that.
            watchdog: Watchdog::new(200 * SECOND),
            trace: Trace::new(4096),
            before: vec![0; SECTORS],
            flushed: vec![0; SECTORS],
            broken: false,
            events: 0,
            random,
        };
        world.schedule.at(0, Due::Flush);
        world.schedule.at(5 * SECOND, Due::Fault);
        world.schedule.at(HEALED_NS, Due::Heal);
        world.schedule.at(QUIET_NS, Due::Quiet);
        (0..NODES).for_each(|node| world.start(0, node));
        world
    }

    /// Runs to the end, or to the first thing that is wrong.
    fn run(mut self) -> Result<Ran, String> {
        let mut now_ns = 0;
        loop {
            let initiators = self.initiators.iter().map(Initiator::next_ns).min();
            let all = [self.net.next_ns(), self.etcd.next_ns(), self.schedule.next_ns(), initiators];
            let Some(next_ns) = all.into_iter().flatten().min() else { break };
            now_ns = now_ns.max(next_ns);
            let idle = self.initiators.iter().all(Initiator::is_idle);
            if now_ns >= END_NS && idle && self.schedule.next_ns().is_none_or(|at| at > now_ns) {
                break;
            }
            self.step(now_ns)?;
            if let Err(overdue) = self.watchdog.check(now_ns) {
                return Err(format!("{overdue}\n{}", self.trace.report(40, 20, |_| false)));
            }
        }
        for node in &self.nodes[1..] {
            if node.disk != self.nodes[0].disk {
                return Err("the copies differ when all is quiet".into());
            }
        }
        if self.initiators.iter().any(|initiator| initiator.counters().failed > 0) {
            return Err("an error at an initiator".into());
        }
        if self.history.ended() < 300 {
            return Err(format!("only {} operations", self.history.ended()));
        }
        Ok(Ran {
            simulated_ns: now_ns,
            events: self.events,
            digest: self.trace.digest() ^ self.history.digest(),
        })
    }

    /// Everything that is due by now, in a fixed order.
    fn step(&mut self, now_ns: u64) -> Result<(), String> {
        self.events += 1;
        if let Some((_, due)) = self.schedule.pop_by(now_ns) {
            self.due(now_ns, due);
        } else if let Some((_, event)) = self.net.pop(now_ns) {
            self.network_event(now_ns, event);
        } else if let Some((_, output)) = self.etcd.pop(now_ns) {
            self.etcd_output(now_ns, output);
        }
        for number in 0..INITIATORS {
            if self.initiators[number].next_ns() <= now_ns {
                self.initiators[number].advance(now_ns);
            }
            while let Some(output) = self.initiators[number].pop() {
                self.initiator_output(now_ns, number, output)?;
            }
        }
        Ok(())
    }

    fn initiator_output(&mut self, now_ns: u64, number: usize, output: Output) -> Result<(), String> {
        match output {
            Output::Transmit { interface, destination, request } => {
                let source = Mac(0x0400 + number as u64);
                let payload = Payload::Request(request);
                let from = Endpoint(NODES + number);
                self.net.transmit(now_ns, from, SegmentId(interface), source, destination, &payload);
            }
            Output::Begun { op, lba, action } => {
                let (what, count) = match &action {
                    Action::Read(count) => ("reads", *count),
                    Action::Write(values) => ("writes", values.len()),
                };
                self.trace.push(now_ns, Note::Op { op, what, lba, count });
                self.watchdog.begin(now_ns, op);
                self.history.begin(now_ns, op, VOLUME, lba, action);
            }
            Output::Ended { op, outcome } => {
                self.watchdog.end(&op);
                if let Err(violation) = self.history.end(now_ns, op, &outcome) {
                    let lba = violation.lba;
                    let log = self.trace.report(30, 5, |note| match note {
                        Note::Frame { payload: Payload::Request(request), .. } => concerns(request, lba),
                        Note::Fault { .. } => true,
                        _ => false,
                    });
                    return Err(format!("{violation}{log}"));
                }
            }
        }
        Ok(())
    }

    fn network_event(&mut self, now_ns: u64, event: Event<Payload>) {
        match event {
            Event::Frame { at, segment, source, destination, payload } => {
                if destination != EXPORT && destination != Mac::BROADCAST && at.0 < NODES {
                    return;
                }
                match &payload {
                    Payload::Request(request) if at == HEAD => {
                        let request = request.clone();
                        self.trace.push(now_ns, Note::Frame { at, payload });
                        self.serve(now_ns, segment, source, request);
                    }
                    Payload::Response(response) if at.0 >= NODES => {
                        let response = response.clone();
                        self.trace.push(now_ns, Note::Frame { at, payload });
                        self.initiators[at.0 - NODES].receive(now_ns, segment.0, source, &response);
                    }
                    _ => {}
                }
            }
            Event::Connected { at, connection } => {
                let Some((peer, held)) =
                    self.nodes[at.0].peers.iter_mut().find(|(_, held)| held.0 == connection)
                else {
                    return;
                };
                held.1 = true;
                let peer = *peer;
                // All that the head has: the follower may have missed anything.
                let values = self.nodes[at.0].disk.as_slice().into();
                self.replicate(now_ns, peer, 0, 0, values);
                // What waited has come with it.
                let last = self.nodes[0].sequence;
                let marker: Arc<[u64]> = [].into();
                self.replicate(now_ns, peer, last, 0, marker);
            }
            Event::ConnectFailed { at, connection } | Event::Closed { at, connection } => {
                let node = &mut self.nodes[at.0];
                node.was_alone |= at == HEAD && now_ns > SECOND;
                node.peers.retain(|_, held| held.0 != connection);
            }
            Event::Message { at, connection, payload: Payload::Replicate { sequence, lba, values } } => {
                let from = index(lba);
                self.nodes[at.0].disk[from..from + values.len()].copy_from_slice(&values);
                let _ = self.net.send(now_ns, at, connection, Payload::Durable { sequence });
            }
            Event::Message { connection, payload: Payload::Durable { sequence }, .. } => {
                let peer = self.nodes[0].peers.iter().find(|(_, held)| held.0 == connection);
                if let Some(peer) = peer.map(|(peer, _)| *peer) {
                    self.durable(now_ns, peer, sequence);
                }
            }
            _ => {}
        }
    }

    fn replicate(&mut self, now_ns: u64, peer: usize, sequence: u64, lba: u64, values: Arc<[u64]>) {
        if let Some((connection, true)) = self.nodes[0].peers.get(&peer).copied() {
            let payload = Payload::Replicate { sequence, lba, values };
            if self.net.send(now_ns, HEAD, connection, payload).is_err() {
                self.net.close(now_ns, HEAD, connection);
                self.nodes[0].peers.remove(&peer);
            }
        }
    }

    /// A follower has everything up to a write.
    fn durable(&mut self, now_ns: u64, peer: usize, sequence: u64) {
        if self.bug == Bug::NeverAnswers && self.nodes[0].was_alone {
            return;
        }
        let waiting = &mut self.nodes[0].waiting;
        for (_, waits) in waiting.range_mut(..=sequence) {
            waits.followers.remove(&peer);
        }
        // In the order of arrival.
        let mut ready = VecDeque::new();
        while let Some(first) = waiting.first_entry().filter(|entry| entry.get().followers.is_empty()) {
            ready.push_back(first.remove());
        }
        for Waiting { asker: (segment, mac), response, .. } in ready {
            self.respond(now_ns, segment, mac, response);
        }
    }

    fn respond(&mut self, now_ns: u64, segment: SegmentId, to: Mac, response: Response) {
        self.net.transmit(now_ns, HEAD, segment, EXPORT, to, &Payload::Response(response));
    }

    /// The head takes a request.
    fn serve(&mut self, now_ns: u64, segment: SegmentId, from: Mac, request: Request) {
        let tag = request.tag;
        let response = |answer| Response { address: ADDRESS, tag, answer };
        match request.command {
            Command::Query => {
                let answer = response(Answer::Config { buffers: 64, sectors: 16 });
                self.respond(now_ns, segment, from, answer);
            }
            Command::Read { lba, count } => {
                let at = index(lba);
                let mut values = self.nodes[0].disk[at..at + count].to_vec();
                match self.bug {
                    Bug::StaleRead if self.random.one_in(100) => values[0] = self.before[at],
                    Bug::Forgets if self.random.one_in(1000) => values[0] = 0,
                    Bug::WrongSector if self.random.one_in(1000) => values.swap(0, count - 1),
                    _ => {}
                }
                self.respond(now_ns, segment, from, response(Answer::Read(values.into())));
            }
            Command::Write { lba, values } => {
                self.write(lba, &values);
                if self.bug == Bug::LateWrite && self.random.one_in(50) {
                    let values = Arc::clone(&values);
                    self.schedule.at(now_ns + 100 * MILLI, Due::Again { lba, values });
                }
                self.nodes[0].sequence += 1;
                let sequence = self.nodes[0].sequence;
                let followers: BTreeSet<usize> = (1..NODES).collect();
                let wait = Waiting { asker: (segment, from), response: response(Answer::Written), followers };
                if self.bug == Bug::NotReplicated {
                    self.respond(now_ns, segment, from, wait.response);
                    if self.random.one_in(50) {
                        return;
                    }
                } else {
                    self.nodes[0].waiting.insert(sequence, wait);
                }
                for peer in 1..NODES {
                    self.replicate(now_ns, peer, sequence, lba, Arc::clone(&values));
                }
            }
        }
    }

    fn write(&mut self, lba: u64, values: &[u64]) {
        let at = index(lba);
        let sectors = at..at + values.len();
        self.before[sectors.clone()].copy_from_slice(&self.nodes[0].disk[sectors.clone()]);
        self.nodes[0].disk[sectors].copy_from_slice(values);
    }

    fn start(&mut self, now_ns: u64, node: usize) {
        let at = Endpoint(node);
        self.net.set_power(now_ns, at, Power::Up);
        let life = self.nodes[node].life;
        self.schedule.at(now_ns, Due::Timer { node, life });
        let watch = etcd::Request::Watch { watch: WatchId(life), prefix: "nodes/".into(), from: Revision(1) };
        self.ask(now_ns, node, watch);
    }

    fn end(&mut self, now_ns: u64, node: usize, power: Power) {
        if self.bug == Bug::AckBeforeDurable && node == 0 {
            self.nodes[0].disk.clone_from(&self.flushed);
        }
        self.net.set_power(now_ns, Endpoint(node), power);
        self.etcd.client_ended(ClientId(node));
        let held = &mut self.nodes[node];
        held.life += 1;
        held.peers.clear();
        held.waiting.clear();
        held.lease = None;
        if power == Power::Off {
            held.clock.reboot(now_ns);
        }
    }

    fn ask(&mut self, now_ns: u64, node: usize, request: etcd::Request) {
        let held = &mut self.nodes[node];
        held.requests += 1;
        self.etcd.request(now_ns, ClientId(node), RequestId(held.requests), request);
    }

    fn etcd_output(&mut self, now_ns: u64, output: etcd::Output) {
        let node = output.client().0;
        self.trace.stir(now_ns);
        match output {
            etcd::Output::Answer { result: Ok(Reply::Granted { lease, .. }), .. } => {
                self.nodes[node].lease = Some(lease);
                let txn = Txn::new().put_leased(format!("nodes/{node}"), "", lease);
                self.ask(now_ns, node, etcd::Request::Txn(txn));
            }
            etcd::Output::Answer { result: Err(etcd::Error::LeaseGone(_)), .. } => {
                self.nodes[node].lease = None;
            }
            etcd::Output::WatchEnded { watch, .. } => {
                let from = self.etcd.revision();
                let request = etcd::Request::Watch { watch, prefix: "nodes/".into(), from };
                self.ask(now_ns, node, request);
            }
            _ => {}
        }
    }

    fn due(&mut self, now_ns: u64, due: Due) {
        match due {
            Due::Timer { node, life } => {
                if self.nodes[node].life != life {
                    return;
                }
                if !self.net.is_paused(Endpoint(node)) {
                    let request = match self.nodes[node].lease {
                        None => etcd::Request::Grant { ttl_ns: 3 * SECOND },
                        Some(lease) => etcd::Request::KeepAlive { lease },
                    };
                    self.ask(now_ns, node, request);
                    for peer in (1..NODES).filter(|_| node == 0) {
                        if !self.nodes[0].peers.contains_key(&peer) {
                            let connection = self.net.connect(now_ns, HEAD, Endpoint(peer));
                            self.nodes[0].peers.insert(peer, (connection, false));
                        }
                    }
                }
                let clock = &self.nodes[node].clock;
                let at_ns = clock.simulated_ns(clock.boot_ns(now_ns) + 200 * MILLI);
                self.schedule.at(at_ns, Due::Timer { node, life });
            }
            Due::Again { lba, values } => self.write(lba, &values),
            Due::Flush => {
                let disk = &self.nodes[0].disk;
                self.flushed.clone_from(disk);
                self.schedule.at(now_ns + 20 * MILLI, Due::Flush);
            }
            Due::Start(at) => {
                if self.net.power(at) != Power::Up {
                    self.note(now_ns, "started", at);
                    self.start(now_ns, at.0);
                }
            }
            Due::Resume(at) => {
                self.note(now_ns, "resumed", at);
                self.net.resume(now_ns, at);
                self.etcd.resume(now_ns, ClientId(at.0));
            }
            Due::Fault => self.fault(now_ns),
            Due::Heal => self.heal(now_ns),
            Due::Quiet => {
                self.initiators.iter_mut().for_each(|initiator| initiator.set_load(now_ns, None));
                self.schedule.at(now_ns + SECOND, Due::Sweep);
            }
            Due::Sweep => {
                if self.initiators.iter().all(Initiator::is_idle) {
                    self.initiators.iter_mut().for_each(|initiator| initiator.submit_sweep(now_ns, 64));
                } else {
                    self.schedule.at(now_ns + SECOND, Due::Sweep);
                }
            }
        }
    }

    fn note(&mut self, now_ns: u64, what: &'static str, at: Endpoint) {
        self.trace.push(now_ns, Note::Fault { what, at });
    }

    fn fault(&mut self, now_ns: u64) {
        if now_ns >= HEALED_NS {
            return;
        }
        if !std::mem::replace(&mut self.broken, true) {
            self.watchdog.broken();
        }
        let at = Endpoint(self.random.index(NODES));
        let others: Vec<Endpoint> =
            (0..NODES + INITIATORS).map(Endpoint).filter(|other| *other != at).collect();
        let lasts_ns = self.random.magnitude(10 * MILLI..5 * SECOND);
        match self.random.below(12) {
            0..2 => {
                let power = if self.random.coin() { Power::Off } else { Power::NoProcess };
                if self.net.power(at) == Power::Up {
                    self.note(now_ns, "killed", at);
                    self.end(now_ns, at.0, power);
                    self.schedule.at(now_ns + lasts_ns, Due::Start(at));
                }
            }
            2 => {
                self.note(now_ns, "paused", at);
                self.net.pause(at);
                self.etcd.pause(ClientId(at.0));
                self.schedule.at(now_ns + lasts_ns, Due::Resume(at));
            }
            3 => {
                self.note(now_ns, "cut off", at);
                self.net.partition(now_ns, &[at], &others, Media::ALL);
            }
            4 => {
                self.note(now_ns, "cut off one way", at);
                self.net.cut(now_ns, &[at], &others, Media::STREAMS);
            }
            5 => {
                self.note(now_ns, "comes and goes", at);
                self.net.flap(now_ns, &[at], &others, Media::ALL, MILLI..SECOND, MILLI..SECOND);
            }
            6 => self.net.slow(now_ns, &[at], &others, lasts_ns / 10, lasts_ns),
            7..9 => {
                self.note(now_ns, "all links healed, in particular of", at);
                self.net.heal(now_ns);
            }
            9 => {
                for segment in [SegmentId(0), SegmentId(1)] {
                    self.net.set_segment_quality(segment, Quality::drawn(&mut self.random));
                }
                self.net.set_stream_quality(Quality::drawn(&mut self.random));
            }
            10 => self.etcd.set_quality(ClientId(at.0), etcd::Quality::drawn(&mut self.random)),
            _ => {
                let (available, reachable) = (self.random.coin(), self.random.coin());
                self.etcd.set_available(now_ns, available);
                self.etcd.set_reachable(now_ns, ClientId(at.0), reachable);
                if self.random.one_in(4) {
                    self.etcd.revoke_all_leases(now_ns);
                }
            }
        }
        let pause_ns = self.random.magnitude(50 * MILLI..3 * SECOND);
        self.schedule.at(now_ns + pause_ns, Due::Fault);
    }

    fn heal(&mut self, now_ns: u64) {
        self.net.heal(now_ns);
        self.etcd.heal(now_ns);
        for segment in [SegmentId(0), SegmentId(1)] {
            self.net.set_segment_quality(segment, Quality::good());
        }
        self.net.set_stream_quality(Quality::good());
        for node in 0..NODES {
            self.due(now_ns, Due::Resume(Endpoint(node)));
            self.due(now_ns, Due::Start(Endpoint(node)));
        }
        self.watchdog.healed(now_ns);
    }
}

fn index(lba: u64) -> usize {
    usize::try_from(lba).expect("a sector of a small disk")
}

fn concerns(request: &Request, lba: u64) -> bool {
    match &request.command {
        Command::Query => false,
        Command::Read { lba: first, count } => (*first..*first + *count as u64).contains(&lba),
        Command::Write { lba: first, values } => (*first..*first + values.len() as u64).contains(&lba),
    }
}

fn explore(test: &str, seeds: u64, bug: Bug) -> Result<(), Failed> {
    let command = format!("cargo test -p torus-sim --test cluster {test}");
    let run = |seed| World::new(seed, bug).run();
    Exploration::from_environment(command, seeds).run(run).map(|_| ())
}

#[test]
fn a_right_cluster_is_never_objected_to() {
    if let Err(failed) = explore("a_right_cluster_is_never_objected_to", 100, Bug::None) {
        panic!("{failed}");
    }
}

#[test]
fn frames_that_take_long_by_one_way_do_no_harm() {
    if let Err(failed) = explore("frames_that_take_long_by_one_way_do_no_harm", 50, Bug::OneWay) {
        panic!("{failed}");
    }
}

fn finds(bug: Bug, within: u64) {
    let run = |seed| World::new(seed, bug).run();
    let failed = Exploration::new("", within).run(run);
    let failed = failed.expect_err("a wrong cluster is objected to");
    println!("{bug:?} after {}: {}", failed.after + 1, failed.report);
}

#[test]
fn acknowledging_what_a_kill_loses_is_found() {
    finds(Bug::AckBeforeDurable, 20);
}

#[test]
fn stale_reads_are_found() {
    finds(Bug::StaleRead, 3);
}

#[test]
fn a_write_that_is_executed_again_later_is_found() {
    finds(Bug::LateWrite, 3);
}

#[test]
fn forgotten_and_mistaken_sectors_are_found() {
    finds(Bug::Forgets, 3);
    finds(Bug::WrongSector, 3);
}

#[test]
fn requests_that_are_never_answered_are_found() {
    finds(Bug::NeverAnswers, 5);
}

#[test]
fn copies_that_differ_are_found() {
    finds(Bug::NotReplicated, 20);
}

#[test]
fn copies_of_a_write_that_come_late_by_another_way_are_found() {
    finds(Bug::TwoWays, 20);
}
