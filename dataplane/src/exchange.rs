//! What cores and the manager hand to each other: bounded, lock-free queues, and the wake-up of a core that sleeps.
//!
//! Invariants:
//! * A queue that is full refuses; the sender counts a drop and keeps what it wanted to send. Nothing waits.
//! * A sleeper is never missed: it announces its sleep before it looks at its queues a last time, and a sender queues
//!   before it looks for the announcement, both with sequentially consistent order between the two steps. One sender takes
//!   the announcement away, and with it the duty to wake.
//! * Chunks on their way home wake nobody until a batch of them waits: a sleeper needs them only when it is awake.
//! * Chunks travel with the message that names them and go home to the core that owns them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use af_xdp::region::RECEIVE_CHUNKS_MIN;
use aoe_xdp::link::{Chunk, RxFrame, Segments};
use aoe_xdp::target::{ChangeOutcome, ExportTable, Ingress, ReplyHead};
use cluster_map::{Durability, LinkLosses, NodeId, VolumeId};
use crossbeam::queue::ArrayQueue;
use rustix::event::EventfdFlags;
use torus_replication::head::End;
use torus_replication::membership::{Membership, Record};
use torus_replication::terms::{Generation, Member, Site};
use torus_uring::{MappedFile, WakeHandle};

use crate::replicating::{Place, Wish};
use crate::store::extent::shard::{Object, ScrubTask, Shard};

/// Messages that may wait for a core: a few receive batches from every other core.
const MESSAGES_MAX: usize = 4096;

/// A sleeper is woken when this many messages wait for it, though they be chunks only: half of what the kernel has at
/// least for every queue, so that other cores never receive a queue dry whose owner sleeps.
const HOMECOMING_MAX: usize = RECEIVE_CHUNKS_MIN as usize / 2;

/// What one core asks another to do.
#[derive(Debug)]
pub enum Message {
    /// Serve this request: the export is yours. The frame's chunks are the sender's.
    Serve {
        /// Ordinal of the interface it came in by.
        interface: u8,
        /// The frame.
        frame: RxFrame,
    },
    /// Send this answer: the interface's queue is yours. The chunks are the sender's.
    Send {
        /// Ordinal of the interface to send by.
        interface: u8,
        /// The frame's beginning.
        head: ReplyHead,
        /// What follows it.
        data: Segments,
    },
    /// The manager says how a change ended that this core asked for; the configuration in force has it.
    Changed {
        /// The core's name for it.
        token: u64,
        /// How it ended.
        outcome: ChangeOutcome,
    },
    /// Take your chunk back.
    TakeBack(Chunk),
    /// The manager wants every block of a layer from there on to go; no core uses them any more.
    Unmap {
        /// Position of the store.
        store: usize,
        /// The layer.
        object: Object,
        /// The first block to go.
        from_block: u64,
    },
    /// The manager wants something of heads and replicas.
    Replicate(Box<Order>),
    /// The manager says which scrub of a store it wants.
    Scrub {
        /// Position of the store.
        store: usize,
        /// The run, and the rate of one shard; `None` for none.
        task: Option<ScrubTask>,
    },
}

/// What the manager wants of a core's heads and replicas.
#[derive(Debug)]
pub enum Order {
    /// Other sites are reached there; what was known of one that is not named stays.
    Sites(BTreeMap<Site, SocketAddr>),
    /// A volume has been made on an open store.
    AddReplica(Member, VolumeId, Place),
    /// A volume on an open store is given up: nothing is asked of it any more.
    DropReplica(Member, VolumeId),
    /// Be the head of a volume.
    Begin(Generation, Membership),
    /// The volume's record is this: nothing that was asked for before can still change it.
    Record(VolumeId, Record),
    /// Be the head of the volume no more.
    End(VolumeId),
    /// Bring members up to date with so many bytes in a second at most, all heads of the core together; 0: as fast as can be.
    ResyncRate(u64),
}

/// What a core tells of its heads and replicas: all of it as it is, so that only the newest report counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Its heads.
    pub heads: BTreeMap<VolumeId, HeadReport>,
    /// What they wish to be changed.
    pub wishes: BTreeMap<VolumeId, Wish>,
    /// The last head of each volume that has ended, and why.
    pub ended: BTreeMap<VolumeId, (Generation, End)>,
    /// Heads that have given their grants back and wait for their successors.
    pub handed_over: BTreeMap<VolumeId, Generation>,
    /// Whether replicas have granted the heads of a node something lately.
    pub granting: BTreeMap<NodeId, bool>,
}

/// What there is to tell of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadReport {
    /// Under which generation.
    pub generation: Generation,
    /// Everything that it needs is open and granted.
    pub is_serving: bool,
    /// They were at some time: no other head answers any more.
    pub has_opened: bool,
    /// Of the partition with the fewest: copies that are in sync.
    pub in_sync: u8,
    /// And how many there should be.
    pub copies: u8,
    /// Extents to be made equal.
    pub extents_to_go: u64,
    /// In how many seconds they will be, if it goes on as it did; 0 while nobody can say.
    pub resync_eta_s: u32,
}

/// How cores reach a store.
#[derive(Debug, Clone)]
pub struct StoreAccess {
    /// The descriptor that holds the store's lock; cores register duplicates.
    pub file: Arc<OwnedFd>,
    /// What a completed write means.
    pub durability: Durability,
    /// Each write must be synced.
    pub dsync: bool,
    /// By which a file in memory is read, where it can be mapped.
    pub mapped: Option<Arc<MappedFile>>,
    /// The shards on their way to their cores, by core.
    pub shards: Arc<[ShardQueue]>,
    /// Who the store is among those that hold a volume.
    pub member: Member,
    /// The volumes that it had when it was opened.
    pub volumes: Arc<[(VolumeId, Object)]>,
}

/// Shards for one core to adopt.
pub type ShardQueue = ArrayQueue<Box<Shard>>;

/// Deals the shards of a store out to cores.
#[must_use]
pub fn deal_shards(shards: Vec<Box<Shard>>, cores: usize) -> Arc<[ShardQueue]> {
    let queues: Arc<[ShardQueue]> = (0..cores).map(|_| ArrayQueue::new(shards.len().max(1))).collect();
    for shard in shards {
        let core = usize::from(core_of_shard(shard.number(), cores));
        let queued = queues[core].push(shard);
        assert!(queued.is_ok(), "a queue has room for all shards");
    }
    queues
}

/// The core that has a shard, of whatever store: so that a volume with copies on several of them is on one core, and other nodes know
/// on which.
#[must_use]
pub fn core_of_shard(shard: u16, cores: usize) -> u16 {
    u16::try_from(usize::from(shard) % cores).expect("a core's index has 16 bits")
}

/// The shard that has a replicated volume.
#[must_use]
pub fn shard_of_lane(lane: u16, shards: u16) -> u16 {
    lane % shards.max(1)
}

/// Where the data of an export is.
#[derive(Debug, Clone)]
pub struct Served {
    /// Position in [`CoreConfig::stores`] of the store whose device's turns it takes.
    pub store: usize,
    /// What is behind it.
    pub backing: Backing,
    /// The core that serves it: the one that has its shard.
    pub owner: u16,
}

/// What is behind an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// A layer of its store, the only copy.
    Layer(Object),
    /// The head of that volume, on this core, under that take-over and no other.
    Head(VolumeId, u64),
}

/// Everything that cores are told; a new one replaces the old one as a whole.
#[derive(Debug, Default)]
pub struct CoreConfig {
    /// Grows by one.
    pub version: u64,
    /// What the wire sees.
    pub exports: ExportTable,
    /// By interface ordinal: what frames that come in there meet. It follows the live MTU.
    pub ingress: Vec<Ingress>,
    /// By interface ordinal: the live MTU in bytes; nothing longer is sent.
    pub mtus: Vec<u32>,
    /// By export key.
    pub served: Vec<Option<Served>>,
    /// Keys of the exports to advertise.
    pub announce: Vec<u32>,
    /// Stores by position; a position is not used again while a request may name it.
    pub stores: Vec<Option<StoreAccess>>,
    /// Take no more requests, finish, and end.
    pub drain: bool,
}

/// What one queue has lost so far, for everybody to read: written by the core that owns the queue.
#[derive(Debug, Default)]
pub struct Losses([AtomicU64; LinkLosses::COUNT]);

impl Losses {
    /// The owner tells the counters as they are now.
    pub fn store(&self, now: LinkLosses) {
        for (cell, word) in self.0.iter().zip(now.words()) {
            cell.store(word, Ordering::Relaxed);
        }
    }

    /// The counters; each is exact, together they need not be of one instant.
    #[must_use]
    pub fn load(&self) -> LinkLosses {
        LinkLosses::of_words(self.0.each_ref().map(|cell| cell.load(Ordering::Relaxed)))
    }
}

/// A core's letter box.
#[derive(Debug)]
pub struct Mailbox {
    messages: ArrayQueue<Message>,
    config: ArrayQueue<Arc<CoreConfig>>,
    /// Old configurations, for the manager to drop: a core frees no memory.
    retired: ArrayQueue<Arc<CoreConfig>>,
    /// The newest report, on its way to the manager.
    report: ArrayQueue<Box<Report>>,
    sleeping: AtomicBool,
    applied: AtomicU64,
    wake: OnceLock<WakeHandle>,
    doorbell: OwnedFd,
}

impl Mailbox {
    /// An empty one.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> std::io::Result<Mailbox> {
        Ok(Mailbox {
            messages: ArrayQueue::new(MESSAGES_MAX),
            config: ArrayQueue::new(1),
            retired: ArrayQueue::new(4),
            report: ArrayQueue::new(1),
            sleeping: AtomicBool::new(false),
            applied: AtomicU64::new(0),
            wake: OnceLock::new(),
            doorbell: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// The owner tells how other rings wake it.
    pub fn set_wake_handle(&self, handle: WakeHandle) {
        let first = self.wake.set(handle).is_ok();
        assert!(first, "a core has one ring");
    }

    /// How to wake the owner from another ring; `None` before it runs.
    pub fn wake_handle(&self) -> Option<&WakeHandle> {
        self.wake.get()
    }

    /// Queues a message. Whether the owner sleeps and must be woken, by this sender and no other.
    ///
    /// # Errors
    /// The message, when the box is full.
    pub fn send(&self, message: Message) -> Result<bool, Message> {
        let may_wait = matches!(message, Message::TakeBack(_));
        self.messages.push(message)?;
        fence(Ordering::SeqCst);
        let must_wake = || !may_wait || self.messages.len() >= HOMECOMING_MAX;
        Ok(self.sleeping.load(Ordering::Relaxed)
            && must_wake()
            && self.sleeping.swap(false, Ordering::Relaxed))
    }

    /// The next message.
    pub fn receive(&self) -> Option<Message> {
        self.messages.pop()
    }

    /// The manager hands over a configuration and wakes the owner. The one before must have been applied.
    ///
    /// # Panics
    /// If it was not.
    pub fn configure(&self, config: Arc<CoreConfig>) {
        assert!(self.config.push(config).is_ok(), "one configuration at a time");
        while self.retired.pop().is_some() {}
        self.ring_doorbell();
    }

    /// Wakes the owner from a thread that has no ring.
    pub fn ring_doorbell(&self) {
        // Fails only when the counter is full, and then the owner is awake.
        let _full = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
    }

    /// What the owner polls.
    pub fn doorbell(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }

    /// The owner has heard the doorbell.
    pub fn silence_doorbell(&self) {
        let mut count = [0u8; 8];
        let _nothing_to_read = rustix::io::read(&self.doorbell, &mut count);
    }

    /// The owner tells the manager of its heads and replicas. Whatever it told before and was not read is gone.
    pub fn tell(&self, report: Box<Report>) {
        self.report.force_push(report);
    }

    /// The manager takes the newest report.
    #[must_use]
    pub fn take_report(&self) -> Option<Box<Report>> {
        self.report.pop()
    }

    /// The owner takes a new configuration.
    pub fn take_config(&self) -> Option<Arc<CoreConfig>> {
        self.config.pop()
    }

    /// The owner gives an old configuration away.
    pub fn retire(&self, config: Arc<CoreConfig>) {
        // At most one is retired for each configuration sent, and the manager empties the queue as it sends.
        let _never_full = self.retired.push(config);
    }

    /// The owner tells that no request of an older configuration is left.
    pub fn set_applied(&self, version: u64) {
        self.applied.store(version, Ordering::Release);
    }

    /// The newest configuration before which no request is left.
    pub fn applied(&self) -> u64 {
        self.applied.load(Ordering::Acquire)
    }

    /// The owner announces that it is going to sleep. Whether it may: false when something arrived meanwhile.
    pub fn begin_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.messages.is_empty() && self.config.is_empty()
    }

    /// The owner is awake.
    pub fn end_sleep(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aoe_xdp::link::{Region, RegionConfig};

    #[test]
    fn a_sender_sees_a_sleeper_and_a_sleeper_sees_a_message() {
        let mailbox = Mailbox::new().unwrap();
        let message = || Message::Send {
            interface: 0,
            head: ReplyHead { bytes: [0; 64], len: 60 },
            data: Segments::new(),
        };
        assert!(!mailbox.send(message()).unwrap());
        assert!(!mailbox.begin_sleep(), "a message waits");
        mailbox.end_sleep();
        assert!(mailbox.receive().is_some());
        assert!(mailbox.begin_sleep());
        assert!(mailbox.send(message()).unwrap(), "must be woken");
        assert!(!mailbox.send(message()).unwrap(), "somebody does that already");
        assert!(!mailbox.begin_sleep());
    }

    #[test]
    fn chunks_come_home_in_batches_and_anything_else_at_once() {
        let config = RegionConfig { cores: 1, chunks_per_core: 64, headers_per_core: 64 };
        let mut pool = Region::new(config).unwrap().pool(0).unwrap();
        let mailbox = Mailbox::new().unwrap();
        for interrupted in [false, true] {
            assert!(mailbox.begin_sleep());
            for count in 1..HOMECOMING_MAX {
                let chunk = pool.take_chunk().unwrap();
                assert!(!mailbox.send(Message::TakeBack(chunk)).unwrap(), "{count} may wait");
            }
            let last = if interrupted {
                Message::Changed { token: 1, outcome: ChangeOutcome::Refused }
            } else {
                Message::TakeBack(pool.take_chunk().unwrap())
            };
            assert!(mailbox.send(last).unwrap());
            assert!(!mailbox.begin_sleep(), "nobody sleeps on what waits");
            while let Some(message) = mailbox.receive() {
                if let Message::TakeBack(chunk) = message {
                    pool.release(chunk);
                }
            }
        }
        assert_eq!(pool.free_chunks(), pool.chunk_capacity());
    }

    #[test]
    fn a_full_box_refuses_and_keeps_nothing() {
        let mailbox = Mailbox::new().unwrap();
        let message = || Message::Send {
            interface: 0,
            head: ReplyHead { bytes: [0; 64], len: 60 },
            data: Segments::new(),
        };
        for _ in 0..MESSAGES_MAX {
            mailbox.send(message()).unwrap();
        }
        assert!(mailbox.send(message()).is_err());
    }
}
