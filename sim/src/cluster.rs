//! A cluster: nodes that run the real data plane, initiators, and whatever breaks.
//!
//! * this file – the world of a run: its events, and what a seed makes of it.
//! * `node` – a node's core: the real serving, heads, replicas and store, driven as a reactor does.
//! * `exports` – what a node serves, frames in and answers out.
//! * `peers` – what nodes say to each other, as on the wire.
//! * [`disk`] – the real store on a simulated disk.
//! * `manager` – what of a data plane is not its core: heads, replicas and exports, by the map.
//! * `control` – a node's control process: the real decisions, between etcd and the map.
//! * `metadata` – the records in etcd, and what is looked at in each of their states.
//! * `moves` – partitions that go to other owners, and what the former ones give up.
//! * [`client`] – an initiator's workload by AoE frames, and the checker that sees all of it.
//! * `sectors` – a sector's bytes and its number.
//! * `counters` – where cores count.
//! * `script` – troubles in a fixed order, with the times between them drawn.
//! * `scenarios` – plans: the general one, and one for each kind of interleaving that is known to be dangerous.
//! * `trouble` – what breaks, and when all of it is whole again.
//!
//! A run has a time of trouble and a time of peace. In peace everything must come to its end: every request, and every copy in sync
//! and equal to the others.
#![allow(clippy::cast_possible_truncation, reason = "numbers of a simulation are small")]

pub mod client;
mod control;
mod counters;
pub mod disk;
mod exports;
mod manager;
mod metadata;
mod moves;
mod node;
mod peers;
pub mod scenarios;
pub mod script;
mod sectors;
mod trouble;

use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use cluster_map::{NodeId, StoreId, VolumeId};
use torus_control::heads::{HeadsRecord, PartitionRecord};
use torus_replication::terms::{EXTENT_BLOCKS, Extent, Generation, Member, Site};

use self::client::{Client, Kind};
use self::disk::{StoreForm, contents};
use self::metadata::{Metadata, member_record};
use self::node::Node;
use self::script::Step;
use self::sectors::{Block, SECTORS, ZEROS};
use crate::checker::history::{History, VolumeId as HistoryVolume};
use crate::checker::trace::Trace;
use crate::network::{self, Endpoint, Network, Power, Quality, SegmentId, Setup};
use crate::random::Random;
use crate::schedule::Schedule;

/// How often a node's data plane looks at the time.
const TICK_NS: u64 = 20_000_000;

/// What a run is like.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Nodes.
    pub nodes: usize,
    /// Volumes, each with one initiator.
    pub volumes: usize,
    /// Copies of each.
    pub copies: usize,
    /// Partitions of each.
    pub spread: usize,
    /// How long things break.
    pub trouble_ns: u64,
    /// Between two troubles, on average.
    pub pause_ns: u64,
    /// What may break.
    pub troubles: Vec<Trouble>,
    /// Requests of an initiator at a time.
    pub window: usize,
    /// Blocks that an initiator uses.
    pub blocks: u64,
    /// Places that these are at, each around a border between two extents: where there are many, regions leave activity logs.
    pub areas: u64,
    /// The streams between nodes.
    pub network: Quality,
    /// The segments that initiators are on. Copies of a write that take two ways of different length are not what a new head can put in
    /// order: two segments are both good.
    pub segments: Quality,
    /// What stores are like.
    pub store: StoreForm,
    /// Chunks of each node's frame memory.
    pub chunks: u32,
    /// What initiators are like.
    pub initiator: Kind,
    /// The switch knows no address: whatever an initiator sends comes to every node.
    pub is_flooded: bool,
    /// How long initiators go on in peace: what they write hides what has gone wrong before.
    pub linger_ns: u64,
    /// Every node is a member of each volume, also if it owns nothing of it: so that it may be head.
    pub is_open_to_all: bool,
    /// Nothing that breaks touches a data plane, a disk or the network.
    pub is_calm: bool,
    /// What happens in order, besides.
    pub script: Vec<Step>,
}

/// A kind of trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// A data plane is killed and is started again.
    Restart,
    /// A control process is killed, and another one starts at once or in a while.
    RestartControl,
    /// A node is stopped in good order, and starts again in a while.
    Leave,
    /// A node loses its lease, or all do, though their processes are alive.
    Leases,
    /// Changes that watches have not delivered cannot be had any more.
    Compaction,
    /// The metadata store is slow, refuses changes, and loses answers.
    SlowMetadata,
    /// A node is off for a while.
    Off,
    /// All nodes lose power at the same time.
    PowerCut,
    /// A process, or both of a node, stand still for a while.
    Pause,
    /// Two groups of nodes do not hear each other.
    Partition,
    /// One node does not hear another.
    OneWay,
    /// A link comes and goes.
    Flap,
    /// A node is made head though nothing is wrong, whatever the rules say.
    TakeOver,
    /// The metadata store cannot be reached.
    NoMetadata,
    /// Its answers get lost.
    Unknown,
    /// A store is slow.
    SlowDisk,
    /// A block rots, on one copy.
    Rot,
    /// What one node sends to another takes long.
    SlowLink,
    /// A connection breaks, and nothing else.
    Reset,
    /// A disk fails reads, writes or syncs, has no room, or vanishes until its process starts again.
    BadDisk,
    /// A disk gives what was there before the last write, on one copy.
    StaleReads,
    /// An initiator and a node do not hear each other.
    Segment,
    /// A store is formatted anew while the cluster runs, as another incarnation.
    Format,
    /// An initiator ends: what it asked for is done or not, and nobody asks again.
    Initiator,
    /// A head is asked to hand over, though nothing is wrong.
    HandOver,
    /// A partition is given to another node.
    Move,
}

impl Trouble {
    /// All of them.
    pub const ALL: [Trouble; 26] = [
        Trouble::Restart,
        Trouble::RestartControl,
        Trouble::Leave,
        Trouble::Leases,
        Trouble::Compaction,
        Trouble::SlowMetadata,
        Trouble::Off,
        Trouble::PowerCut,
        Trouble::Pause,
        Trouble::Partition,
        Trouble::OneWay,
        Trouble::Flap,
        Trouble::TakeOver,
        Trouble::NoMetadata,
        Trouble::Unknown,
        Trouble::SlowDisk,
        Trouble::Rot,
        Trouble::SlowLink,
        Trouble::Reset,
        Trouble::BadDisk,
        Trouble::StaleReads,
        Trouble::Segment,
        Trouble::Format,
        Trouble::Initiator,
        Trouble::HandOver,
        Trouble::Move,
    ];
}

/// What travels.
#[derive(Debug, Clone)]
enum Travels {
    /// A frame between nodes, with its blocks.
    Peer(Rc<[u8]>),
    /// An Ethernet frame.
    Frame(Rc<[u8]>),
}

/// What happens at a time.
#[derive(Debug)]
enum Event {
    /// A data plane looks at the time.
    Tick { node: usize, life: u64 },
    /// A core looks around.
    Turn { node: usize, life: u64 },
    /// A request of a disk ends.
    Disk { node: usize, life: u64, number: u64 },
    /// A core is given another configuration.
    Configure { node: usize, life: u64 },
    /// A manager looks around.
    Manage { node: usize, life: u64 },
    /// A control process looks around.
    Control { node: usize, life: u64 },
    /// It is looked whether partitions can go on to their owners.
    Moves,
    /// An initiator does something.
    Client { client: usize },
    /// Something breaks.
    Break,
    /// A trouble of that number is over.
    Mend(u64),
    /// The script goes on.
    Script,
}

/// What a report tells.
#[derive(Debug, Clone)]
struct Note(String);

impl fmt::Display for Note {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// What was explored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Requests that were answered.
    pub answered: u64,
    /// Of those, errors.
    pub failed: u64,
    /// Take-overs.
    pub takeovers: u64,
    /// Of them, those that a head has handed over for.
    pub hand_overs: u64,
    /// Members that were called stale.
    pub ejections: u64,
    /// Members that were taken in again.
    pub joins: u64,
    /// Partitions that went to other owners.
    pub moves: u64,
    /// Changes whose outcome was unknown.
    pub doubts: u64,
    /// Troubles.
    pub troubles: u64,
    /// Heads that ended because they were replaced.
    pub replaced: u64,
    /// Simulated nanoseconds.
    pub simulated_ns: u64,
    /// Events that were noted.
    pub events: u64,
}

impl Coverage {
    /// Takes another run's in.
    pub fn add(&mut self, other: &Coverage) {
        let Coverage {
            answered,
            failed,
            takeovers,
            hand_overs,
            ejections,
            joins,
            moves,
            doubts,
            troubles,
            replaced,
            simulated_ns,
            events,
        } = other;
        self.answered += answered;
        self.failed += failed;
        self.takeovers += takeovers;
        self.hand_overs += hand_overs;
        self.ejections += ejections;
        self.joins += joins;
        self.moves += moves;
        self.doubts += doubts;
        self.troubles += troubles;
        self.replaced += replaced;
        self.simulated_ns += simulated_ns;
        self.events += events;
    }
}

/// A run.
pub struct World {
    plan: Plan,
    schedule: Schedule<Event>,
    network: Network<Travels>,
    nodes: Vec<Node>,
    clients: Vec<Client>,
    metadata: Metadata,
    history: History,
    troubles: trouble::Troubles,
    trace: Trace<Note>,
    coverage: Coverage,
    is_peace: bool,
    /// The highest generation that has answered an initiator, of each partition of each volume.
    answered: BTreeMap<(usize, u64), Generation>,
    wrong: Option<Wrong>,
    steps: u64,
    /// Steps of the script that were done, and the nodes that they name.
    script_at: usize,
    cast: Vec<usize>,
    /// What happens is kept.
    is_told: bool,
    events: u64,
    /// The node whose store was formatted anew.
    formatted: Option<usize>,
}

/// Who finds what is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checker {
    /// What initiators were told is not what one disk could have answered.
    History,
    /// An initiator was told of an error.
    Errors,
    /// A head has answered after a later one had.
    Generations,
    /// The record has too few members in sync.
    Record,
    /// Copies in sync differ at rest.
    Copies,
    /// A store cannot be opened.
    Store,
    /// At rest not all memory has come back.
    Memory,
    /// Not everything has come to its end.
    Rest,
    /// A head was replaced, or I/O has stopped, though nothing but the metadata was troubled.
    Calm,
    /// A head's wish has not been answered though nothing was in its way.
    Wishes,
}

impl fmt::Display for Checker {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Checker::History => "history",
            Checker::Errors => "errors",
            Checker::Generations => "generations",
            Checker::Record => "record",
            Checker::Copies => "copies",
            Checker::Store => "store",
            Checker::Memory => "memory",
            Checker::Rest => "rest",
            Checker::Calm => "calm",
            Checker::Wishes => "wishes",
        })
    }
}

/// Something that is wrong.
#[derive(Debug, Clone)]
struct Wrong {
    checker: Checker,
    what: String,
}

impl Wrong {
    fn new(checker: Checker, what: String) -> Wrong {
        Wrong { checker, what }
    }
}

/// What a run found wrong.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}\n{log}")]
pub struct Failure {
    /// Who found it.
    pub checker: Checker,
    /// What.
    pub what: String,
    /// What happened before.
    pub log: String,
}

fn site_of(index: usize) -> Site {
    Site { node: node_id(index), core: 0 }
}

fn node_id(node: usize) -> NodeId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&(node as u64 + 1).to_be_bytes());
    NodeId(id)
}

fn node_of(id: NodeId) -> usize {
    let mut number = [0; 8];
    number.copy_from_slice(&id.0[..8]);
    usize::try_from(u64::from_be_bytes(number) - 1).expect("a node of the run")
}

/// The store of a node, before it is formatted anew.
fn member_of(node: usize) -> Member {
    Member { store: StoreId(node_id(node).0), incarnation: 1 }
}

fn volume_id(volume: usize) -> VolumeId {
    let mut id = [0xee; 16];
    id[..8].copy_from_slice(&(volume as u64).to_be_bytes());
    VolumeId(id)
}

fn volume_of(id: VolumeId) -> usize {
    let mut number = [0; 8];
    number.copy_from_slice(&id.0[..8]);
    usize::try_from(u64::from_be_bytes(number)).expect("a volume of the run")
}

/// Where a volume is at the beginning.
fn placed(plan: &Plan, volume: usize, nodes: &[Node], placing: &mut Random) -> HeadsRecord {
    let mut owned: Vec<Vec<usize>> = Vec::new();
    for _ in 0..plan.spread {
        let mut order: Vec<usize> = (0..plan.nodes).collect();
        placing.shuffle(&mut order);
        owned.push(order[..plan.copies].to_vec());
    }
    let is_member = |node: &usize| plan.is_open_to_all || owned.iter().flatten().any(|owner| owner == node);
    let members: Vec<usize> = (0..plan.nodes).filter(is_member).collect();
    let index = |node: &usize| members.iter().position(|member| member == node).expect("it is one") as u16;
    let partition = |owners: &Vec<usize>| PartitionRecord {
        epoch: 1,
        owners: owners.iter().map(index).collect(),
        incomplete: Vec::new(),
    };
    HeadsRecord {
        takeover: 1,
        edition: 1,
        head: node_id(owned[0][0]),
        min_copies: 0,
        lane: volume as u16,
        members: members.iter().map(|node| member_record(*node, nodes[*node].stored.layout.shards)).collect(),
        partitions: owned.iter().map(partition).collect(),
        stale: Vec::new(),
        move_to: None,
    }
}

impl Plan {
    /// A run of the seed's own choice.
    #[must_use]
    pub fn drawn(random: &mut Random) -> Plan {
        let nodes = if random.one_in(8) { 6 + random.index(4) } else { 1 + random.index(5) };
        let mut troubles = Trouble::ALL.to_vec();
        random.shuffle(&mut troubles);
        troubles.truncate(1 + random.index(5));
        let copies = 1 + random.index(nodes.min(3));
        let blocks = [8, 64, 3000][random.index(3)];
        let is_small = copies == nodes && random.one_in(8);
        let is_good = random.coin();
        let network = if is_good { Quality::good() } else { Quality::drawn(random) };
        let initiator = [Kind::Hasty, Kind::Hasty, Kind::Linux(1), Kind::Linux(2)][random.index(4)];
        Plan {
            nodes,
            volumes: 1 + random.index(2),
            copies,
            spread: 1 + random.index(3),
            trouble_ns: random.range(5_000_000_000..30_000_000_000),
            pause_ns: random.range(300_000_000..5_000_000_000),
            troubles,
            window: 1 + random.index(8),
            blocks,
            areas: if blocks < 1000 && random.coin() { 4 } else { 1 },
            segments: if initiator.paths() == 1 { network.clone() } else { Quality::good() },
            network,
            // A full one only where all have the same.
            store: StoreForm::drawn(random, is_small),
            // Few, so that requests wait for memory and are dropped for want of it.
            chunks: if random.one_in(4) { 160 } else { 1024 },
            initiator,
            // Copies of a write that take two ways of different length are not what a head can put in order.
            is_flooded: is_good && random.coin(),
            linger_ns: if random.coin() { 2_000_000_000 } else { 50_000_000 },
            is_open_to_all: random.coin(),
            is_calm: false,
            script: Vec::new(),
        }
    }

    /// Whether stores may have no room for what initiators write.
    fn may_be_full(&self) -> bool {
        let extents = self.volumes as u64 * self.areas * (2 + self.blocks / u64::from(EXTENT_BLOCKS));
        u64::from(self.store.form.slots) < extents
    }

    /// Whether that may break in it.
    fn may(&self, trouble: Trouble) -> bool {
        self.troubles.contains(&trouble) || self.script.iter().any(|step| step.is(trouble))
    }
}

/// Events that are told of a run that failed; all that are kept with `TORUS_SIM_LOG=all`.
const EVENTS_TOLD: usize = 60;

/// Steps of a run: what takes more goes round in a circle.
const STEPS_MAX: u64 = 20_000_000;

/// Runs a seed to its end.
///
/// # Errors
/// What was wrong, and what happened before.
pub fn run(seed: u64, plan: impl FnOnce(&mut Random) -> Plan) -> Result<(Coverage, u64), Failure> {
    let mut random = Random::new(seed);
    let plan = plan(&mut random);
    let mut world = World::new(plan.clone(), random.clone(), false);
    if world.run().is_err() {
        // Once more, and what happens is kept.
        drop(world);
        let mut world = World::new(plan, random, true);
        let differ = || Wrong::new(Checker::Rest, "two runs of one seed differ".into());
        let Wrong { checker, what } = world.run().err().unwrap_or_else(differ);
        return Err(Failure { checker, what: format!("{what}\n{:?}", world.plan), log: world.log() });
    }
    world.coverage.simulated_ns = world.schedule.now_ns();
    world.coverage.events = world.events;
    Ok((world.coverage, world.trace.digest()))
}

impl World {
    fn new(plan: Plan, random: Random, is_told: bool) -> World {
        let endpoints = plan.nodes + plan.volumes;
        let paths = plan.initiator.paths();
        let mut network = Network::new(Setup::new(endpoints, paths), random.named("network", 0));
        network.set_stream_quality(plan.network.clone());
        for segment in (0..paths).map(SegmentId) {
            network.set_segment_quality(segment, plan.segments.clone());
            network.set_flooding(segment, plan.is_flooded);
        }
        let mut schedule = Schedule::new();
        let nodes: Vec<Node> =
            (0..plan.nodes).map(|node| Node::new(node, &plan, random.named("node", node as u64))).collect();
        let mut placing = random.named("placing", 0);
        let heads: Vec<HeadsRecord> =
            (0..plan.volumes).map(|volume| placed(&plan, volume, &nodes, &mut placing)).collect();
        let clients = (0..plan.volumes)
            .map(|volume| {
                Client::new(
                    volume,
                    Endpoint(plan.nodes + volume),
                    &plan,
                    random.named("client", volume as u64),
                )
            })
            .collect();
        for client in 0..plan.volumes {
            schedule.at(1000, Event::Client { client });
        }
        if !plan.troubles.is_empty() {
            schedule.at(plan.pause_ns, Event::Break);
        }
        if !plan.script.is_empty() {
            schedule.at(script::BEGIN_NS, Event::Script);
        }
        schedule.at(1, Event::Moves);
        let troubles = trouble::Troubles::new(random.named("trouble", 0));
        let metadata = Metadata::new(&plan, &heads, random.named("metadata", 0));
        let mut world = World {
            schedule,
            network,
            nodes,
            clients,
            metadata,
            history: History::new(),
            troubles,
            trace: Trace::new(200_000),
            coverage: Coverage::default(),
            is_peace: false,
            answered: BTreeMap::new(),
            wrong: None,
            steps: 0,
            script_at: 0,
            cast: Vec::new(),
            is_told,
            events: 0,
            formatted: None,
            plan,
        };
        world.follow_records();
        for node in 0..world.nodes.len() {
            world.network.set_power(0, Endpoint(node), Power::NoProcess);
            world.power_on(node);
        }
        world
    }

    fn now_ns(&self) -> u64 {
        self.schedule.now_ns()
    }

    fn log(&self) -> String {
        let told = if std::env::var_os("TORUS_SIM_LOG").is_some() { usize::MAX } else { EVENTS_TOLD };
        self.trace.report(0, told, |_| false)
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        let now_ns = self.now_ns();
        if self.is_told {
            self.trace.push(now_ns, Note(text()));
        } else {
            self.events += 1;
            self.trace.stir(now_ns);
        }
    }

    /// Something is wrong: the run ends.
    fn object(&mut self, checker: Checker, what: String) {
        self.wrong.get_or_insert(Wrong { checker, what });
    }

    fn run(&mut self) -> Result<(), Wrong> {
        let peace_ns = self.plan.trouble_ns;
        let limit_ns = peace_ns + 60_000_000_000;
        loop {
            let others = self.network.next_ns().into_iter().chain(self.metadata.etcd.next_ns());
            let next = self.schedule.next_ns().into_iter().chain(others).min();
            let Some(next_ns) = next else {
                return Err(Wrong::new(Checker::Rest, "nothing happens any more".into()));
            };
            if !self.is_peace && next_ns >= peace_ns {
                self.make_peace();
                continue;
            }
            if self.is_peace && next_ns > peace_ns + self.plan.linger_ns {
                for client in &mut self.clients {
                    client.stop(next_ns);
                }
                if self.is_at_rest() && self.nodes.iter().all(Node::has_all_memory) {
                    return self.look_at_copies();
                }
            }
            if next_ns > limit_ns || self.steps > STEPS_MAX {
                if self.is_at_rest() {
                    let what = format!("memory does not come back: {}", self.what_is_open());
                    return Err(Wrong::new(Checker::Memory, what));
                }
                let what = format!("it does not come to rest: {}", self.what_is_open());
                return Err(Wrong::new(Checker::Rest, what));
            }
            self.steps += 1;
            self.step(next_ns)?;
            if let Some(wrong) = self.wrong.take() {
                return Err(wrong);
            }
        }
    }

    fn step(&mut self, next_ns: u64) -> Result<(), Wrong> {
        if self.network.next_ns().is_some_and(|at_ns| at_ns <= next_ns) {
            if let Some((at_ns, event)) = self.network.pop(next_ns) {
                self.schedule.advance(at_ns);
                self.network_event(event)?;
            }
            return Ok(());
        }
        if self.metadata.etcd.next_ns().is_some_and(|at_ns| at_ns <= next_ns) {
            let said = self.metadata.etcd.pop(next_ns);
            self.schedule.advance(next_ns);
            self.follow_records();
            if let Some((_, output)) = said {
                self.etcd_says(output);
            }
            return Ok(());
        }
        let Some((_, event)) = self.schedule.pop() else { return Ok(()) };
        match event {
            Event::Tick { node, life } => self.tick(node, life),
            Event::Turn { node, life } => self.turn(node, life),
            Event::Disk { node, life, number } => self.disk_ends(node, life, number),
            Event::Configure { node, life } => self.configure(node, life),
            Event::Manage { node, life } => self.manage(node, life),
            Event::Control { node, life } => self.control_turn(node, life),
            Event::Moves => self.look_at_moves(),
            Event::Client { client } => self.client_turn(client),
            Event::Break => self.break_something(),
            Event::Mend(number) => self.mend(number),
            Event::Script => self.script_goes_on(),
        }
        Ok(())
    }

    fn network_event(&mut self, event: network::Event<Travels>) -> Result<(), Wrong> {
        let at = event.at().0;
        if at >= self.plan.nodes {
            if let network::Event::Frame {
                segment,
                source,
                destination,
                payload: Travels::Frame(bytes),
                ..
            } = event
            {
                return self.client_frame(at - self.plan.nodes, segment, source, destination, &bytes);
            }
            return Ok(());
        }
        self.node_event(at, event);
        Ok(())
    }

    fn is_at_rest(&self) -> bool {
        self.clients.iter().all(Client::is_idle)
            && (0..self.plan.volumes).all(|volume| self.is_whole(volume))
            && self.metadata.has_moved_all()
            && self.nodes.iter().all(|node| node.is_quiet() && node.is_idle())
            && (0..self.plan.volumes)
                .all(|volume| self.nodes[self.head_of(volume)].serves(volume, self.now_ns()))
    }

    /// Whether all copies of a volume are in sync, but for those on stores that were formatted since.
    fn is_whole(&self, volume: usize) -> bool {
        let mut stale = self.metadata.record(volume).stale.keys();
        stale.all(|member| self.formatted.is_some_and(|node| member_of(node) == *member))
    }

    fn what_is_open(&self) -> String {
        let mut text = String::new();
        for client in &self.clients {
            text += &format!("\n  {}", client.describe());
        }
        for volume in 0..self.plan.volumes {
            text += &format!("\n  volume {volume}: {:?}", self.metadata.record(volume));
        }
        for node in &self.nodes {
            text += &format!("\n  {}", node.describe());
        }
        text
    }

    /// At rest all copies of a volume are the same, and what they hold is what a read would be given.
    fn look_at_copies(&mut self) -> Result<(), Wrong> {
        let mut held = Vec::new();
        for node in 0..self.plan.nodes {
            self.leave_disk(node, Power::NoProcess);
            let stored = &mut self.nodes[node].stored;
            let media = stored.media.take().unwrap_or_default();
            let found = contents(&stored.layout, media);
            held.push(found.map_err(|error| Wrong::new(Checker::Store, format!("node {node}: {error}")))?);
        }
        self.compare_copies(&held).and_then(|()| self.read_copies(&held))
    }

    fn read_copies(&mut self, held: &[Contents]) -> Result<(), Wrong> {
        let now_ns = self.now_ns();
        for volume in 0..self.plan.volumes {
            let partitions = self.metadata.record(volume).partitions.clone();
            for block in self.clients[volume].blocks() {
                let extent = Extent::of_block(block);
                let owners = &partitions[extent.0 as usize % partitions.len()].owners;
                let mut nodes = owners.iter().map(|owner| node_of(owner.site.node));
                let Some(node) = nodes.find(|node| Some(*node) != self.formatted) else { continue };
                let at = (volume, (extent, (block - extent.first_block()) as u16));
                let content = match held[node].get(&at) {
                    None => ZEROS,
                    Some(Some(content)) => *content,
                    Some(None) => continue,
                };
                for (lba, value) in (block * SECTORS as u64..).zip(content) {
                    let seen = self.history.observe(now_ns, HistoryVolume(volume as u64), lba, value);
                    seen.map_err(|violation| Wrong::new(Checker::Copies, violation.to_string()))?;
                }
            }
        }
        Ok(())
    }

    fn compare_copies(&self, held: &[Contents]) -> Result<(), Wrong> {
        for volume in 0..self.plan.volumes {
            let partitions = &self.metadata.record(volume).partitions;
            for (at, partition) in partitions.iter().enumerate() {
                let mut first = None;
                for owner in &partition.owners {
                    let node = node_of(owner.site.node);
                    if Some(node) == self.formatted {
                        continue;
                    }
                    let mine = held[node].iter().filter(|((of, (extent, _)), _)| {
                        *of == volume && extent.0 as usize % partitions.len() == at
                    });
                    let mine: Vec<_> = mine.collect();
                    // What has rotted since it was compared last is found when it is read.
                    let has_damage = mine.iter().any(|(_, content)| content.is_none());
                    let (first_node, first) = first.get_or_insert_with(|| (node, mine.clone()));
                    if !has_damage && *first != mine && !first.iter().any(|(_, content)| content.is_none()) {
                        let differing = first.iter().zip(&mine).find(|(a, b)| a != b);
                        let what = format!(
                            "volume {volume} partition {at}: nodes {first_node} and {node} differ: {} and {} blocks, {differing:?}",
                            first.len(),
                            mine.len()
                        );
                        return Err(Wrong::new(Checker::Copies, what));
                    }
                }
            }
        }
        Ok(())
    }
}

/// What a store holds, by volume and place; `None` where it is damaged.
type Contents = BTreeMap<(usize, disk::Place), Option<Block>>;
