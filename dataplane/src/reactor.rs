//! One core: takes frames, orders requests, drives the stores, sends answers.
//!
//! Invariants:
//! * After start nothing here allocates, locks, logs, or makes a system call per operation: one `io_uring_enter` and one
//!   kick of each link per batch.
//! * An answer to a write is queued only after the store has said that it is durable (I3), and before the next request
//!   that overlaps it may start (I6).
//! * A request admitted under a configuration that is gone starts under the one in force, or not at all.
//! * What cannot be taken for want of memory or room is dropped and counted: the initiator sends it again.
//! * Before a core sleeps everything queued has been given to the kernel, and every source of work is armed.

mod changes;
mod configuration;
mod cores;
mod devices;
mod discovery;
mod idle;
mod receive;
mod replication;
mod send;
mod waiting;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;

use aoe_xdp::link::{Lane, LinkStats, Pool, Queue, Region, RxFrame, TxFrame};
use cluster_map::{CoreClients, CoreStats, NodeId};
use rustix::time::{ClockId, clock_gettime};
use torus_replication::connection::handshake::Identity;
use torus_replication::terms::Site;
use torus_uring::{Ring, RingConfig, RingError};

use self::changes::WaitingChanges;
use self::devices::{Inline, OwnDevice};
use self::replication::OwnReplication;
use self::waiting::WaitingRequests;
use crate::changes::ChangeQueue;
use crate::clients::Clients;
use crate::discovery::Discovery;
use crate::exchange::{CoreConfig, Losses, Mailbox, Served};
use crate::fairness::{DEVICES_MAX, Limits};
use crate::peers::{Peers, PeersLimits};
use crate::replicating::Replicating;
use crate::serving::Serving;

/// Requests in progress on one core. Linux keeps 64 in flight for each target MAC, so this serves 16 busy exports at their
/// full window; beyond it requests are dropped and come again.
pub const REQUESTS_MAX: u32 = 1024;
/// Clients that one core remembers: at least as many as can have a request in progress.
const CLIENTS_MAX: u32 = REQUESTS_MAX;
/// What one core takes on. A device gets enough to keep an NVMe disk busy, and little enough that a newcomer's first request
/// is not far behind.
const LIMITS: Limits = Limits { requests: REQUESTS_MAX, clients: CLIENTS_MAX, device_depth: 128 };
/// Disk requests that a core has in flight; what its stores have beyond that waits. Enough for two at a time of every request.
pub const DISK_REQUESTS_MAX: u32 = 2 * REQUESTS_MAX;
/// Frames taken from one queue or lane in one go: large enough to spread the cost of a system call, small enough that a batch's
/// first answer leaves soon.
const RX_BATCH: usize = 64;
/// Answers that wait for room in one transmit ring.
const BACKLOG_MAX: usize = REQUESTS_MAX as usize;
/// Connections of one core. Each holds [`PeersLimits::chunks_each`] chunks: 2 MiB for a hundred of them would be a quarter of the core's
/// memory, so that they are few, and large enough for a window of writes to arrive between two turns.
const PEERS_LIMITS: PeersLimits = PeersLimits {
    connections_max: 64,
    strangers_max: 8,
    chunks_each: 16,
    waiting_bytes_max: 8 << 20,
    requests_leave_chunks: 1024,
    answers_leave_chunks: 0,
};
/// Chunks that are left free by writes of initiators, and by reads of replicas, on a core that other cores talk to. Whatever frees memory
/// leaves less than what takes it: answers nothing, reads for answers more, requests of other cores more, initiators the most. Each
/// step is a window of a few hundred requests.
const INITIATORS_LEAVE_CHUNKS: usize = 2048;
const READS_LEAVE_CHUNKS: usize = 512;
const _: () = assert!(
    INITIATORS_LEAVE_CHUNKS > PEERS_LIMITS.requests_leave_chunks
        && PEERS_LIMITS.requests_leave_chunks > READS_LEAVE_CHUNKS
        && READS_LEAVE_CHUNKS > PEERS_LIMITS.answers_leave_chunks
);
/// Shortest spin: a look at every source of work.
const SPIN_NS_MIN: u64 = 2_000;
/// How often the kernel's counters are read.
const LINK_STATS_NS: u64 = 1_000_000_000;

/// `poll` tokens: queues by position, lanes by position after them, then the doorbell.
const DOORBELL: u32 = u32::MAX;

/// How answers leave by an interface.
#[derive(Debug, Clone, Copy)]
pub enum Egress {
    /// By this core's queue at that position.
    Own(usize),
    /// By the queue of another core.
    Other(u16),
    /// Not at all: the interface is not there.
    Nowhere,
}

/// What a reactor is made of.
pub struct Parts {
    /// Its index among the cores.
    pub core: u16,
    /// The node that it is of.
    pub node: NodeId,
    /// Its part of the frame memory.
    pub pool: Pool,
    /// Its queues.
    pub queues: Vec<OwnedQueue>,
    /// Its lanes on queues of other cores.
    pub lanes: Vec<OwnedLane>,
    /// By interface ordinal.
    pub egress: Vec<Egress>,
    /// The letter boxes of all cores, its own among them.
    pub mailboxes: Arc<[Mailbox]>,
    /// Its counters.
    pub stats: CoreStats,
    /// Its records of clients.
    pub clients: CoreClients,
    /// How it asks the manager for changes.
    pub changes: Arc<ChangeQueue>,
    /// Where it listens for other nodes, and who it is to them; `None` where it has nothing to do with others.
    pub listen: Option<(SocketAddr, Identity)>,
}

/// A queue for a core to own.
pub struct OwnedQueue {
    queue: Queue,
    losses: Arc<Losses>,
}

impl OwnedQueue {
    /// For that queue.
    #[must_use]
    pub fn new(queue: Queue) -> OwnedQueue {
        OwnedQueue { queue, losses: Arc::default() }
    }

    /// What the queue has lost, kept up to date by its owner.
    #[must_use]
    pub fn losses(&self) -> Arc<Losses> {
        Arc::clone(&self.losses)
    }
}

/// A lane for a core to receive by.
pub struct OwnedLane {
    lane: Lane,
    losses: Arc<Losses>,
}

impl OwnedLane {
    /// For that lane.
    #[must_use]
    pub fn new(lane: Lane) -> OwnedLane {
        OwnedLane { lane, losses: Arc::default() }
    }

    /// What the lane has lost, kept up to date by its core.
    #[must_use]
    pub fn losses(&self) -> Arc<Losses> {
        Arc::clone(&self.losses)
    }
}

struct OwnQueue {
    queue: Queue,
    armed: bool,
    seen: LinkStats,
    losses: Arc<Losses>,
    /// Answers that wait for room, each with its interface. A link that is stuck delays no other.
    backlog: VecDeque<(u8, TxFrame)>,
}

struct OwnLane {
    lane: Lane,
    armed: bool,
    seen: LinkStats,
    losses: Arc<Losses>,
}

/// Why a core cannot work.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// Its ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// Its port.
    #[error(
        "cannot listen for other nodes at {address} ({source}): is the port in use, or the address another machine's?"
    )]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A core at work.
pub struct Reactor {
    core: u16,
    region: Arc<Region>,
    pool: Pool,
    ring: Ring,
    queues: Vec<OwnQueue>,
    lanes: Vec<OwnLane>,
    egress: Vec<Egress>,
    mailboxes: Arc<[Mailbox]>,
    stats: CoreStats,
    config: Arc<CoreConfig>,
    /// The configuration whose predecessors still have requests.
    settling: bool,
    serving: Serving,
    /// By store.
    devices: Vec<Option<OwnDevice>>,
    /// Disk requests that the ring has no room for.
    waiting: WaitingRequests,
    inline: VecDeque<Inline>,
    received: Vec<RxFrame>,
    /// Always there, but while it is at work.
    discovery: Option<Discovery>,
    /// Ordinals of the interfaces that this core advertises on: those whose first queue it owns.
    advertise_on: Arc<[u8]>,
    changes: WaitingChanges,
    change_queue: Arc<ChangeQueue>,
    replication: OwnReplication,
    /// The kernel would take more frames if it were asked again.
    unsent: bool,
    doorbell_armed: bool,
    now_ns: u64,
    spin_ns: u64,
    stats_read_ns: u64,
    bytes_copied_seen: u64,
}

impl Reactor {
    /// Makes the reactor of the calling thread, and tells the others how to wake it.
    ///
    /// # Errors
    /// [`CoreError`].
    pub fn new(parts: Parts) -> Result<Reactor, CoreError> {
        let mut parts = parts;
        let region = Arc::clone(parts.pool.region());
        let like = parts.mailboxes.iter().find_map(Mailbox::wake_handle);
        let mut ring = Ring::new(RingConfig { requests_max: DISK_REQUESTS_MAX }, &region, like)?;
        let peers = parts.listen.take().map(|(address, identity)| {
            let made = Peers::new(identity, PEERS_LIMITS, address, &mut ring, &parts.pool);
            made.map_err(|source| CoreError::Listen { address, source })
        });
        let peers = peers.transpose()?;
        let (initiators_leave_chunks, reads_leave_chunks) =
            if peers.is_some() { (INITIATORS_LEAVE_CHUNKS, READS_LEAVE_CHUNKS) } else { (0, 0) };
        let site = Site { node: parts.node, core: parts.core };
        let replicating = Replicating::new(site, boot_ns()).leaving(reads_leave_chunks);
        let own = &parts.mailboxes[usize::from(parts.core)];
        own.set_wake_handle(ring.wake_handle().map_err(RingError::Setup)?);
        let firsts = parts.queues.iter().map(|owned| &owned.queue).filter(|queue| queue.info().queue == 0);
        let advertise_on = firsts.flat_map(Queue::ports).map(|port| port.ordinal).collect();
        let queues = parts.queues.into_iter().map(|owned| OwnQueue {
            queue: owned.queue,
            armed: false,
            seen: LinkStats::default(),
            losses: owned.losses,
            backlog: VecDeque::with_capacity(BACKLOG_MAX),
        });
        let lanes = parts.lanes.into_iter().map(|owned| OwnLane {
            lane: owned.lane,
            armed: false,
            seen: LinkStats::default(),
            losses: owned.losses,
        });
        Ok(Reactor {
            core: parts.core,
            region,
            pool: parts.pool,
            ring,
            queues: queues.collect(),
            lanes: lanes.collect(),
            egress: parts.egress,
            mailboxes: parts.mailboxes,
            stats: parts.stats,
            config: Arc::new(CoreConfig::default()),
            settling: false,
            serving: Serving::new(LIMITS, Clients::new(CLIENTS_MAX, parts.clients), replicating)
                .leaving(initiators_leave_chunks),
            devices: Vec::with_capacity(DEVICES_MAX),
            waiting: WaitingRequests::new(),
            inline: VecDeque::with_capacity(DISK_REQUESTS_MAX as usize),
            received: Vec::with_capacity(RX_BATCH),
            discovery: Some(Discovery::default()),
            advertise_on,
            changes: WaitingChanges::new(),
            change_queue: parts.changes,
            replication: OwnReplication::new(peers),
            unsent: false,
            doorbell_armed: false,
            now_ns: now_ns(),
            spin_ns: SPIN_NS_MIN,
            stats_read_ns: 0,
            bytes_copied_seen: 0,
        })
    }

    /// Works until it is told to drain and has.
    ///
    /// # Errors
    /// When the kernel refuses the ring's own calls: nothing can be promised then.
    pub fn run(&mut self) -> std::io::Result<()> {
        let mut busy_ns = now_ns();
        loop {
            let worked = self.turn()?;
            if worked {
                busy_ns = self.now_ns;
                continue;
            }
            if self.config.drain && self.is_drained() {
                return Ok(());
            }
            if self.now_ns.saturating_sub(busy_ns) < self.spin_ns {
                std::hint::spin_loop();
                continue;
            }
            self.sleep()?;
            busy_ns = now_ns();
        }
    }

    /// Looks once at every source of work; whether there was any.
    fn turn(&mut self) -> std::io::Result<bool> {
        self.now_ns = now_ns();
        let mut worked = self.take_config();
        if !self.config.drain {
            worked |= self.receive();
        }
        worked |= self.take_messages();
        worked |= self.replicate();
        // Not before everything is in: neighbours are served together.
        worked |= self.start_all();
        self.ring.submit()?;
        worked |= self.gather();
        self.settle();
        if !self.config.drain {
            worked |= self.discover();
        }
        // Requests that were started by completions.
        self.ring.submit()?;
        worked |= self.send_out();
        if self.now_ns.saturating_sub(self.stats_read_ns) > LINK_STATS_NS {
            self.read_link_stats();
        }
        Ok(worked)
    }
}

fn served(config: &CoreConfig, key: u32) -> Option<&Served> {
    config.served.get(key as usize)?.as_ref()
}

fn now_ns() -> u64 {
    read_clock(ClockId::Monotonic)
}

/// Of a clock that goes on while the machine is suspended: others do not wait for it.
fn boot_ns() -> u64 {
    read_clock(ClockId::Boottime)
}

fn read_clock(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
