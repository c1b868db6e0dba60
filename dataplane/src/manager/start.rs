//! Bringing the process up: lock, map, interfaces, stores, cores. Whatever is wrong with the configuration is said here,
//! before the first frame is served.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use af_xdp::nic::Nic;
use aoe_xdp::link::{
    Frames, Interface, InterfaceName, LinkChoice, LinkError, LinkOptions, Pool, Port, Region, RegionConfig,
    RegionError, SteeringChoice,
};
use cluster_map::{DataMap, Desired, MapError};
use rustix::fs::FlockOperation;
use rustix::thread::{CpuSet, sched_setaffinity};
use torus_replication::connection::handshake::Start;

use super::links::{NodeInterface, OpenQueue};
use super::replication::{Replication, identity};
use super::{Manager, ProcessLock, Stores, boot_time_ns};
use crate::changes::ChangeQueue;
use crate::exchange::Mailbox;
use crate::reactor::{Egress, OwnedLane, OwnedQueue, Parts, Reactor};
use crate::store::extent::opening::OpenError;

/// Interfaces of a node: their ordinals are four bits of an export's MAC.
const INTERFACES_MAX: usize = 16;
/// Chunks for each core beside those that its receive rings hold: requests in progress with three blocks each, their
/// read-modify-writes, and answers on their way out. 32 MiB.
const CHUNKS_PER_CORE: u32 = 8192;
/// Chunks that one queue's receive ring holds (its length, in `aoe_xdp::link`).
const CHUNKS_PER_QUEUE: u32 = 2048;
/// Chunks that wait in the rings of other cores on one queue, where the XDP program steers (`aoe_xdp::link` too).
const CHUNKS_PER_QUEUES_LANES: u32 = 2048;
/// Queues that one core may own: each is looked at in every turn and holds 8 MiB of receive buffers.
const QUEUES_PER_CORE_MAX: u32 = 64;
/// Answers on their way out of one core.
const HEADERS_PER_CORE: u32 = 8192;
/// How long to wait for the first desired state.
const DESIRED_WAIT: Duration = Duration::from_secs(30);

/// Why the process cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another one does.
    #[error("another torus-dataplane of this node is running (it holds {0}): stop it first")]
    Running(String),
    /// The lock file cannot be used.
    #[error("cannot use the lock file {path}: {source}")]
    Lock {
        /// Its path.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The map cannot be used.
    #[error("cannot use the shared map: {0}")]
    Map(#[from] MapError),
    /// The control process has not written what it wants.
    #[error("the control process has published nothing in {} s: is torusd running?", DESIRED_WAIT.as_secs())]
    NothingDesired,
    /// No core or no interface, or too many.
    #[error("{0}")]
    Configuration(String),
    /// A link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Frame memory.
    #[error(transparent)]
    Memory(#[from] RegionError),
    /// A store.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// A core's thread.
    #[error("core {cpu} cannot start: {reason}")]
    Core {
        /// The CPU.
        cpu: u16,
        /// Why.
        reason: String,
    },
}

impl StartError {
    /// Whether it is the configuration's fault, so that another start would end the same way.
    #[must_use]
    pub fn is_configuration(&self) -> bool {
        match self {
            StartError::Configuration(_)
            | StartError::Link(_)
            | StartError::Store(_)
            | StartError::Core { .. } => true,
            StartError::Running(_)
            | StartError::Lock { .. }
            | StartError::Map(_)
            | StartError::NothingDesired
            | StartError::Memory(_) => false,
        }
    }
}

/// Takes the process lock and writes the pid into it.
///
/// # Errors
/// [`StartError::Running`], [`StartError::Lock`].
fn lock_process(path: &Path) -> Result<ProcessLock, StartError> {
    let fail = |source| StartError::Lock { path: path.display().to_string(), source };
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(fail)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(StartError::Running(path.display().to_string())),
        Err(error) => return Err(fail(error.into())),
    }
    file.set_len(0).map_err(fail)?;
    writeln!(file, "{}", std::process::id()).map_err(fail)?;
    Ok(ProcessLock(file.into()))
}

fn first_desired(map: &DataMap) -> Result<Desired, StartError> {
    if map.wait_desired(0, DESIRED_WAIT)? == 0 {
        return Err(StartError::NothingDesired);
    }
    Ok(map.desired()?)
}

fn check(desired: &Desired) -> Result<(), StartError> {
    let wrong = |text: String| Err(StartError::Configuration(text));
    if desired.cores.is_empty() {
        return wrong("no core to run on: name at least one with --cores".into());
    }
    if desired.interfaces.is_empty() || desired.interfaces.len() > INTERFACES_MAX {
        return wrong(format!(
            "{} interfaces were named: name 1 to {INTERFACES_MAX}",
            desired.interfaces.len()
        ));
    }
    for (i, cpu) in desired.cores.iter().enumerate() {
        if desired.cores[..i].contains(cpu) {
            return wrong(format!("core {cpu} is named twice in --cores"));
        }
        if usize::from(*cpu) >= CpuSet::MAX_CPU {
            return wrong(format!("core {cpu} does not exist: see lscpu"));
        }
    }
    for (i, name) in desired.interfaces.iter().enumerate() {
        if desired.interfaces[..i].contains(name) {
            return wrong(format!("interface {name} is named twice"));
        }
    }
    Ok(())
}

fn link_choice(choice: cluster_map::LinkChoice) -> LinkChoice {
    match choice {
        cluster_map::LinkChoice::Auto => LinkChoice::Auto,
        cluster_map::LinkChoice::AfXdp => LinkChoice::AfXdp,
        cluster_map::LinkChoice::AfPacket => LinkChoice::AfPacket,
    }
}

fn steering_choice(choice: cluster_map::SteeringChoice) -> SteeringChoice {
    match choice {
        cluster_map::SteeringChoice::Auto => SteeringChoice::Auto,
        cluster_map::SteeringChoice::Nic => SteeringChoice::Nic,
        cluster_map::SteeringChoice::Program => SteeringChoice::Program,
        cluster_map::SteeringChoice::HandOver => SteeringChoice::HandOver,
    }
}

/// Chunks that a queue may hold: more where the XDP program may be the one that steers.
fn chunks_per_queue(desired: &Desired) -> u32 {
    use cluster_map::SteeringChoice::{Auto, Program};
    let may_have_lanes = desired.cores.len() > 1
        && desired.link != cluster_map::LinkChoice::AfPacket
        && matches!(desired.steering, Auto | Program);
    CHUNKS_PER_QUEUE + if may_have_lanes { CHUNKS_PER_QUEUES_LANES } else { 0 }
}

/// The network interfaces to open, each with the logical interfaces on it, whose ordinals are their places in the list.
fn netdevs(names: &[String]) -> Result<Vec<(String, Vec<Port>)>, StartError> {
    let mut netdevs: Vec<(String, Vec<Port>)> = Vec::new();
    for (ordinal, name) in (0u8..).zip(names) {
        let InterfaceName { netdev, vlan } = name.parse()?;
        let port = Port { ordinal, vlan };
        match netdevs.iter_mut().find(|(known, _)| *known == netdev) {
            Some((_, ports)) => ports.push(port),
            None => netdevs.push((netdev, vec![port])),
        }
    }
    Ok(netdevs)
}

/// Queues that each core will own at most; the interfaces themselves are opened later, with the memory sized by this.
fn queues_per_core(netdevs: &[(String, Vec<Port>)], cores: u16) -> Result<u32, StartError> {
    // An interface that cannot be asked is waited for, or refused with its reason when it is opened.
    let queues = |name: &String| Nic::open(name).map_or(1, |nic| u32::from(nic.queues().receive));
    let total: u32 = netdevs.iter().map(|(name, _)| queues(name)).sum();
    let per_core = total.div_ceil(u32::from(cores));
    if per_core > QUEUES_PER_CORE_MAX {
        return Err(StartError::Configuration(format!(
            "{total} receive queues are too many for {cores} cores: give them {QUEUES_PER_CORE_MAX} each at most \
             (ethtool -L INTERFACE combined N), or name more cores"
        )));
    }
    Ok(per_core)
}

/// Interfaces, pools and the queues of each core.
struct Paths {
    interfaces: Vec<NodeInterface>,
    pools: Vec<Pool>,
    queues: Vec<Vec<OwnedQueue>>,
    lanes: Vec<Vec<OwnedLane>>,
    egress: Vec<Vec<Egress>>,
}

fn open_paths(desired: &Desired) -> Result<Paths, StartError> {
    let cores = u16::try_from(desired.cores.len()).expect("each core number has 16 bits and is named once");
    let netdevs = netdevs(&desired.interfaces)?;
    let queues_per_core = queues_per_core(&netdevs, cores)?;
    let region = Region::new(RegionConfig {
        cores,
        chunks_per_core: CHUNKS_PER_CORE + queues_per_core * chunks_per_queue(desired),
        headers_per_core: HEADERS_PER_CORE,
    })?;
    let mut paths = Paths {
        interfaces: Vec::new(),
        pools: (0..cores).map(|core| region.pool(core)).collect::<Result<Vec<_>, _>>()?,
        queues: (0..cores).map(|_| Vec::new()).collect(),
        lanes: (0..cores).map(|_| Vec::new()).collect(),
        egress: vec![vec![Egress::Nowhere; desired.interfaces.len()]; usize::from(cores)],
    };
    for (netdev, ports) in netdevs {
        open_path(&mut paths, netdev, ports, desired, &region)?;
    }
    Ok(paths)
}

/// Opens one interface; its queues go round the cores, starting where the interface before ended. One that is missing,
/// down or of too small an MTU is waited for.
fn open_path(
    paths: &mut Paths,
    netdev: String,
    ports: Vec<Port>,
    desired: &Desired,
    region: &Arc<Region>,
) -> Result<(), StartError> {
    let cores = u16::try_from(paths.pools.len()).expect("a core's index has 16 bits");
    let options = LinkOptions {
        choice: link_choice(desired.link),
        ports: ports.clone(),
        frames: Frames::Requests,
        cores,
        steering: steering_choice(desired.steering),
    };
    let mut interface = match Interface::open_as(&netdev, &options, region) {
        Ok(interface) => interface,
        Err(
            error @ (LinkError::UnknownInterface { .. }
            | LinkError::Down { .. }
            | LinkError::MtuTooSmall { .. }),
        ) => {
            eprintln!("torus-dataplane: {error}; it is served on once it is there");
            paths.interfaces.push(NodeInterface::waiting(netdev, ports, error.to_string()));
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let taken: usize = paths.queues.iter().map(Vec::len).sum();
    let mut queues = Vec::new();
    let mut owners = Vec::new();
    for queue in 0..interface.queues() {
        let core = (taken + usize::from(queue)) % paths.pools.len();
        let opened = interface.take_queue(queue, &mut paths.pools[core])?;
        let info = opened.info().clone();
        let owned = OwnedQueue::new(opened);
        queues.push(OpenQueue { info, cpu: desired.cores[core], losses: vec![owned.losses()] });
        owners.push((core, paths.queues[core].len()));
        paths.queues[core].push(owned);
    }
    for queue in &mut queues {
        for (core, lanes) in (0..cores).zip(&mut paths.lanes) {
            if let Some(lane) = interface.take_lane(queue.info.queue, core) {
                let owned = OwnedLane::new(lane);
                queue.losses.push(owned.losses());
                lanes.push(owned);
            }
        }
    }
    let Some(&(first_core, _)) = owners.first() else {
        return Err(StartError::Configuration(format!("interface {netdev} has no queue")));
    };
    for (core, egress) in paths.egress.iter_mut().enumerate() {
        let own = owners.iter().find(|(owner, _)| *owner == core).map(|(_, at)| Egress::Own(*at));
        let way = own.unwrap_or(Egress::Other(u16::try_from(first_core).expect("a core's index")));
        for port in &ports {
            egress[usize::from(port.ordinal)] = way;
        }
    }
    paths.interfaces.push(NodeInterface::open(netdev, ports, interface, queues));
    Ok(())
}

/// Starts one core's thread, pinned, and waits until it runs.
fn start_core(cpu: u16, parts: Parts) -> Result<std::thread::JoinHandle<std::io::Result<()>>, StartError> {
    let (ready, started) = mpsc::sync_channel::<Result<(), String>>(1);
    let fail = |reason: String| StartError::Core { cpu, reason };
    let run = move || {
        let reactor = pin(cpu).and_then(|()| Reactor::new(parts).map_err(|error| error.to_string()));
        match reactor {
            Ok(mut reactor) => {
                let _manager_waits = ready.send(Ok(()));
                reactor.run()
            }
            Err(reason) => {
                let _manager_waits = ready.send(Err(reason));
                Ok(())
            }
        }
    };
    let name = format!("core-{cpu}");
    let thread =
        std::thread::Builder::new().name(name).spawn(run).map_err(|error| fail(error.to_string()))?;
    match started.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(reason)) => Err(fail(reason)),
        Err(_) => Err(fail("its thread crashed".into())),
    }
}

fn pin(cpu: u16) -> Result<(), String> {
    let mut set = CpuSet::new();
    set.set(usize::from(cpu));
    sched_setaffinity(None, &set).map_err(|error| format!("cannot pin a thread to it ({error}): see lscpu"))
}

/// Brings everything up that the desired state names.
///
/// # Errors
/// [`StartError`]; nothing is served then.
pub fn start(map_path: &Path, lock_path: &Path) -> Result<(Manager, ProcessLock), StartError> {
    let lock = lock_process(lock_path)?;
    let map = DataMap::attach(map_path)?;
    let desired = first_desired(&map)?;
    check(&desired)?;
    let stores = Stores::open_all(&desired, desired.cores.len())?;
    let paths = open_paths(&desired)?;
    let mailboxes = (0..desired.cores.len()).map(|_| Mailbox::new()).collect::<std::io::Result<Vec<_>>>();
    let mailboxes: Arc<[Mailbox]> = mailboxes
        .map_err(|error| StartError::Configuration(format!("cannot make queues between cores: {error}")))?
        .into();
    let change_queue = Arc::new(ChangeQueue::default());
    let left = map.reader().observed().map(|observed| observed.wishes).unwrap_or_default();
    let replication = Replication::new(&desired, left, boot_time_ns());
    let mut process = [0u8; 16];
    rustix::rand::getrandom(&mut process, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| StartError::Configuration(format!("the system has no random numbers: {error}")))?;
    let listen = |core: u16| {
        let address = desired.listen?;
        let port = address.base_port.checked_add(core)?;
        Some((SocketAddr::new(address.ip, port), identity(&desired, core, Start(process))))
    };
    let mut threads = Vec::new();
    let links = paths.queues.into_iter().zip(paths.lanes).zip(paths.egress);
    let per_core = paths.pools.into_iter().zip(links).zip(&desired.cores);
    for (core, ((pool, ((queues, lanes), egress)), &cpu)) in (0u16..).zip(per_core) {
        let parts = Parts {
            core,
            node: desired.node,
            pool,
            queues,
            lanes,
            egress,
            mailboxes: Arc::clone(&mailboxes),
            stats: map.core_stats(core)?,
            changes: Arc::clone(&change_queue),
            clients: map.core_clients(core)?,
            listen: listen(core),
        };
        threads.push(start_core(cpu, parts)?);
    }
    let names = desired.interfaces;
    Ok((
        Manager::new(map, names, paths.interfaces, stores, replication, mailboxes, threads, change_queue),
        lock,
    ))
}
