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

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use aoe_xdp::identify::IDENTIFY_LEN;
use aoe_xdp::link::{Chunk, LinkStats, Pool, Queue, Region, RxFrame, Segment, Segments, TxFrame};
use aoe_xdp::order::{Access, Admission, RangeOrder, RequestId};
use aoe_xdp::target::{self, Action, Export, Ingress, Io, IoKind, ReplyHead, Route};
use cluster_map::{CoreStats, Counter, Durability, Latency};
use rustix::time::{ClockId, clock_gettime};
use torus_uring::{Blocks, Event, FileId, IoError, Ring, RingConfig, RingError, read_inline, write_inline};

use crate::exchange::{CoreConfig, Mailbox, Message, Served, StoreAccess};
use crate::request::{Request, Requests, copy_payload, take_blocks};
use crate::store::linear::LinearStore;
use crate::store::{Disk, Operation, Outcome, RequestToken, Store, StoreError, release_blocks};

/// Requests in progress on one core. Linux keeps 64 in flight for each target MAC, so this serves 16 busy exports at their
/// full window; beyond it requests are dropped and come again.
pub const REQUESTS_MAX: u32 = 1024;
/// Disk requests in flight: a request has at most two at a time.
const DISK_REQUESTS_MAX: u32 = 2 * REQUESTS_MAX;
/// Frames taken from one queue in one go: large enough to spread the cost of a system call, small enough that a batch's
/// first answer leaves soon.
const RX_BATCH: usize = 64;
/// Answers that wait for room in a transmit ring.
const BACKLOG_MAX: usize = 2 * REQUESTS_MAX as usize;
/// Messages of other cores taken in one go.
const MESSAGES_BATCH: usize = 256;
/// Advertisements sent in one turn, so that requests are served between them.
const ADVERTISEMENTS_BATCH: usize = 16;
/// Longest spin before a sleep: about what a sleep and a wake-up cost together.
const SPIN_NS_MAX: u64 = 50_000;
/// Shortest spin: a look at every source of work.
const SPIN_NS_MIN: u64 = 2_000;
/// Longest sleep: only for the counters that are read from the kernel.
const SLEEP: Duration = Duration::from_millis(500);
/// Sleep while memory is short: chunks that the kernel is done with are found by looking.
const SLEEP_SHORT: Duration = Duration::from_millis(1);
/// How often the kernel's counters are read.
const LINK_STATS_NS: u64 = 1_000_000_000;

/// `poll` tokens: queues by position, then the doorbell.
const DOORBELL: u32 = u32::MAX;
/// A disk request's token: the store's position above the store's own token.
const STORE_SHIFT: u32 = 48;

/// How answers leave by an interface.
#[derive(Debug, Clone, Copy)]
pub enum Egress {
    /// By this core's queue at that position.
    Own(usize),
    /// By the queue of another core.
    Other(u16),
}

/// What a reactor is made of.
pub struct Parts {
    /// Its index among the cores.
    pub core: u16,
    /// Its part of the frame memory.
    pub pool: Pool,
    /// Its queues, each with the ordinal of its interface.
    pub queues: Vec<(u8, Queue)>,
    /// By interface ordinal.
    pub egress: Vec<Egress>,
    /// By interface ordinal.
    pub ingress: Vec<Ingress>,
    /// The letter boxes of all cores, its own among them.
    pub mailboxes: Arc<[Mailbox]>,
    /// Its counters.
    pub stats: CoreStats,
}

struct OwnQueue {
    interface: u8,
    queue: Queue,
    armed: bool,
    seen: LinkStats,
}

struct OwnStore {
    file: FileId,
    dsync: bool,
    inline: bool,
    store: LinearStore,
}

struct InlineEnd {
    store: usize,
    token: u64,
    blocks: Blocks,
    result: Result<(), IoError>,
}

/// The device of one store, as the store sees it.
struct ReactorDisk<'r> {
    ring: &'r mut Ring,
    pool: &'r mut Pool,
    inline_ends: &'r mut VecDeque<InlineEnd>,
    store: usize,
    file: FileId,
    dsync: bool,
    inline: bool,
}

impl Disk for ReactorDisk<'_> {
    fn read(&mut self, offset_bytes: u64, mut blocks: Blocks, token: u64) {
        if self.inline {
            let result = read_inline(self.ring.file(self.file), offset_bytes, &mut blocks, self.pool);
            self.inline_ends.push_back(InlineEnd { store: self.store, token, blocks, result });
            return;
        }
        let token = token | (self.store as u64) << STORE_SHIFT;
        let accepted = self.ring.read(self.pool, self.file, offset_bytes, blocks, token);
        assert!(accepted.is_ok(), "the ring has room for two disk requests of every request");
    }

    fn write(&mut self, offset_bytes: u64, blocks: Blocks, token: u64) {
        if self.inline {
            let result = write_inline(self.ring.file(self.file), offset_bytes, &blocks, self.pool);
            self.inline_ends.push_back(InlineEnd { store: self.store, token, blocks, result });
            return;
        }
        let token = token | (self.store as u64) << STORE_SHIFT;
        let accepted = self.ring.write(self.file, offset_bytes, blocks, self.dsync, token);
        assert!(accepted.is_ok(), "the ring has room for two disk requests of every request");
    }

    fn sync(&mut self, token: u64) {
        if self.inline {
            // Memory has nothing to be forced to.
            self.inline_ends.push_back(InlineEnd {
                store: self.store,
                token,
                blocks: Blocks::new(),
                result: Ok(()),
            });
            return;
        }
        let token = token | (self.store as u64) << STORE_SHIFT;
        let accepted = self.ring.sync(self.file, token);
        assert!(accepted.is_ok(), "the ring has room for two disk requests of every request");
    }

    fn pool(&mut self) -> &mut Pool {
        self.pool
    }
}

/// A core at work.
pub struct Reactor {
    core: u16,
    region: Arc<Region>,
    pool: Pool,
    ring: Ring,
    queues: Vec<OwnQueue>,
    egress: Vec<Egress>,
    ingress: Vec<Ingress>,
    mailboxes: Arc<[Mailbox]>,
    stats: CoreStats,
    config: Arc<CoreConfig>,
    /// Parity of the configuration in force.
    epoch: u8,
    /// The configuration whose predecessors still have requests.
    settling: bool,
    stores: Vec<Option<OwnStore>>,
    order: RangeOrder,
    requests: Requests,
    /// Requests that the range order lets start.
    ready: VecDeque<RequestId>,
    inline_ends: VecDeque<InlineEnd>,
    outcomes: Vec<Outcome>,
    received: Vec<RxFrame>,
    backlog: VecDeque<(usize, TxFrame)>,
    /// Next position in the configuration's list of exports to advertise, for each of our first queues.
    announced: usize,
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
    /// [`RingError`].
    pub fn new(parts: Parts) -> Result<Reactor, RingError> {
        let region = Arc::clone(parts.pool.region());
        let like = parts.mailboxes.iter().find_map(Mailbox::wake_handle);
        let ring = Ring::new(RingConfig { requests_max: DISK_REQUESTS_MAX }, &region, like)?;
        let own = &parts.mailboxes[usize::from(parts.core)];
        own.set_wake_handle(ring.wake_handle().map_err(RingError::Setup)?);
        let queues = parts.queues.into_iter().map(|(interface, queue)| OwnQueue {
            interface,
            queue,
            armed: false,
            seen: LinkStats::default(),
        });
        Ok(Reactor {
            core: parts.core,
            region,
            pool: parts.pool,
            ring,
            queues: queues.collect(),
            egress: parts.egress,
            ingress: parts.ingress,
            mailboxes: parts.mailboxes,
            stats: parts.stats,
            config: Arc::new(CoreConfig::default()),
            epoch: 0,
            settling: false,
            stores: Vec::with_capacity(64),
            order: RangeOrder::new(REQUESTS_MAX),
            requests: Requests::new(REQUESTS_MAX),
            ready: VecDeque::with_capacity(REQUESTS_MAX as usize),
            inline_ends: VecDeque::with_capacity(DISK_REQUESTS_MAX as usize),
            outcomes: Vec::with_capacity(REQUESTS_MAX as usize),
            received: Vec::with_capacity(RX_BATCH),
            backlog: VecDeque::with_capacity(BACKLOG_MAX),
            announced: 0,
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
        worked |= self.advertise();
        self.ring.submit()?;
        worked |= self.gather();
        self.settle();
        // Requests that were started by completions.
        self.ring.submit()?;
        worked |= self.send_out();
        if self.now_ns.saturating_sub(self.stats_read_ns) > LINK_STATS_NS {
            self.read_link_stats();
        }
        Ok(worked)
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Configuration

    fn take_config(&mut self) -> bool {
        let Some(config) = self.mailboxes[usize::from(self.core)].take_config() else { return false };
        // Stores come and go with the manager, rarely: this may allocate.
        for (at, access) in config.stores.iter().enumerate() {
            if self.stores.len() <= at {
                self.stores.push(None);
            }
            match (access, &self.stores[at]) {
                (Some(access), None) => self.stores[at] = self.open_store(access),
                (None, Some(own)) => {
                    let file = own.file;
                    self.ring.unregister_file(file);
                    self.stores[at] = None;
                }
                _ => {}
            }
        }
        let old = std::mem::replace(&mut self.config, config);
        self.mailboxes[usize::from(self.core)].retire(old);
        self.epoch ^= 1;
        self.settling = true;
        self.announced = 0;
        true
    }

    fn open_store(&mut self, access: &StoreAccess) -> Option<OwnStore> {
        let inline = access.durability == Durability::Memory;
        let file = self.ring.register_file(access.file.as_fd()).ok()?;
        Some(OwnStore { file, dsync: access.dsync, inline, store: LinearStore::new(REQUESTS_MAX) })
    }

    /// Tells the manager once no request of an older configuration is left.
    fn settle(&mut self) {
        if self.settling && self.requests.of_epoch(self.epoch ^ 1) == 0 {
            self.settling = false;
            self.mailboxes[usize::from(self.core)].set_applied(self.config.version);
        }
    }

    fn is_drained(&self) -> bool {
        self.requests.is_empty() && !self.unsent
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Frames in

    fn receive(&mut self) -> bool {
        let (config, region) = (Arc::clone(&self.config), Arc::clone(&self.region));
        let mut frames = std::mem::take(&mut self.received);
        let mut worked = false;
        for at in 0..self.queues.len() {
            let own = &mut self.queues[at];
            let interface = own.interface;
            own.queue.receive(&mut self.pool, &mut frames);
            worked |= !frames.is_empty();
            for frame in frames.drain(..) {
                self.stats.add(Counter::RxFrames, 1);
                self.stats.add(Counter::RxBytes, frame.len() as u64);
                self.dispatch(&config, &region, interface, frame);
            }
        }
        self.received = frames;
        worked
    }

    /// Finds out whose a frame is.
    fn dispatch(&mut self, config: &CoreConfig, region: &Region, interface: u8, frame: RxFrame) {
        let ingress = self.ingress[usize::from(interface)];
        match target::route(&config.exports, &ingress, frame.head(region)) {
            Route::Silent(_) => self.stats.add(Counter::RxInvalid, 1),
            Route::Matching(address) => {
                for export in config.exports.exports().iter().filter(|export| address.matches(export.address))
                {
                    let action = target::respond(export, &ingress, frame.head(region), frame.len());
                    self.answer(interface, export, action);
                }
            }
            Route::One(export) => match served(config, export.key) {
                Some(served) if served.owner == self.core => {
                    let action = target::respond(export, &ingress, frame.head(region), frame.len());
                    self.act(interface, export, action, &frame);
                }
                Some(served) => {
                    let owner = served.owner;
                    self.hand_over(owner, Message::Serve { interface, frame });
                    return;
                }
                None => self.stats.add(Counter::RxInvalid, 1),
            },
        }
        self.give_back(frame.into_segments());
    }

    /// Carries out what the target decided for an export of this core.
    fn act(&mut self, interface: u8, export: &Export, action: Action, frame: &RxFrame) {
        match action {
            Action::Io(io) => self.admit(interface, export, io, frame),
            other => self.answer(interface, export, other),
        }
    }

    /// Sends an answer that needs no store.
    fn answer(&mut self, interface: u8, export: &Export, action: Action) {
        match action {
            Action::Silent(_) => self.stats.add(Counter::RxInvalid, 1),
            Action::Reply(head) => {
                self.count_reply(&head);
                self.send(interface, &head, Segments::new());
            }
            Action::Identify(head) => {
                self.stats.add(Counter::Identifies, 1);
                let mut data = [0; IDENTIFY_LEN];
                export.identify(&mut data);
                self.send_bytes(interface, &head, &data);
            }
            Action::ConfigString(head) => {
                self.stats.add(Counter::Configs, 1);
                self.send_bytes(interface, &head, &export.config_string);
            }
            // Only exact addresses give I/O, and those go through `act`.
            Action::Io(_) => self.stats.add(Counter::RxInvalid, 1),
        }
    }

    fn count_reply(&mut self, head: &ReplyHead) {
        use aoe_xdp::wire::{ata, command, parse_ata};
        let Ok(reply) = parse_ata(&head.bytes) else { return };
        if reply.header.command == command::CONFIG {
            self.stats.add(Counter::Configs, 1);
        } else if reply.header.command == command::ATA && reply.arg.command_status & ata::STATUS_ERR != 0 {
            self.stats.add(Counter::AtaErrors, 1);
        }
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Requests

    fn admit(&mut self, interface: u8, export: &Export, io: Io, frame: &RxFrame) {
        let mut request = Request {
            io,
            export: export.key,
            interface,
            epoch: self.epoch,
            payload: Blocks::new(),
            arrived_ns: self.now_ns,
        };
        if io.kind == IoKind::Write {
            match copy_payload(&mut self.pool, &self.region, frame, &request) {
                Some(payload) => request.payload = payload,
                None => {
                    self.stats.add(Counter::MemoryExhausted, 1);
                    return;
                }
            }
        }
        let (first_block, last_block) = (request.first_block(), request.last_block());
        let id = match self.requests.insert(request) {
            Ok(id) => id,
            Err(refused) => {
                self.stats.add(Counter::RxDropped, 1);
                release_blocks(&mut self.pool, refused.payload);
                return;
            }
        };
        let access = match io.kind {
            IoKind::Read => Access::Shared,
            IoKind::Write => Access::Exclusive,
            // Everything acknowledged is durable already: a flush has nothing to wait for.
            IoKind::Flush => {
                self.start(id);
                return;
            }
        };
        match self.order.admit(id, export.key, first_block, last_block, access) {
            Admission::Granted => self.start(id),
            Admission::Queued => self.stats.add(Counter::OrderWaits, 1),
        }
    }

    /// Gives a request to its store.
    fn start(&mut self, id: RequestId) {
        let config = Arc::clone(&self.config);
        let request = self.requests.get_mut(id);
        let place = served(&config, request.export)
            .filter(|served| self.stores.get(served.store).is_some_and(Option::is_some));
        let Some(place) = place else {
            // Unexported, or its store is gone, while it waited.
            self.end(id, None);
            return;
        };
        let operation = match request.io.kind {
            IoKind::Flush => Operation::Flush,
            IoKind::Write => Operation::Write {
                first_block: request.first_block(),
                keep_head_bytes: request.head_bytes(),
                keep_tail_bytes: request.tail_bytes(),
                blocks: std::mem::take(&mut request.payload),
            },
            IoKind::Read => match take_blocks(&mut self.pool, request.block_count()) {
                Some(blocks) => Operation::Read { first_block: request.first_block(), blocks },
                None => {
                    self.stats.add(Counter::MemoryExhausted, 1);
                    self.end(id, None);
                    return;
                }
            },
        };
        let own = self.stores[place.store].as_mut().expect("checked above");
        let mut disk = ReactorDisk {
            ring: &mut self.ring,
            pool: &mut self.pool,
            inline_ends: &mut self.inline_ends,
            store: place.store,
            file: own.file,
            dsync: own.dsync,
            inline: own.inline,
        };
        own.store.start(RequestToken(id.0), &place.placement, operation, &mut disk, &mut self.outcomes);
    }

    /// Goes through everything that has ended until nothing is left; whether there was anything.
    fn gather(&mut self) -> bool {
        let mut worked = false;
        loop {
            if let Some(outcome) = self.outcomes.pop() {
                self.finish(outcome);
            } else if let Some(id) = self.ready.pop_front() {
                self.start(id);
            } else if let Some(end) = self.inline_ends.pop_front() {
                self.disk_ended(end.store, end.token, end.blocks, end.result);
            } else if let Some(event) = self.ring.next_event() {
                self.event(event);
            } else {
                return worked;
            }
            worked = true;
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Disk(finished) => {
                let store = (finished.token >> STORE_SHIFT) as usize;
                let token = finished.token & ((1 << STORE_SHIFT) - 1);
                self.disk_ended(store, token, finished.blocks, finished.result);
            }
            Event::Ready(DOORBELL) => {
                self.doorbell_armed = false;
                self.mailboxes[usize::from(self.core)].silence_doorbell();
            }
            Event::Ready(at) => {
                if let Some(own) = self.queues.get_mut(at as usize) {
                    own.armed = false;
                }
            }
            Event::Woken => {}
        }
    }

    fn disk_ended(&mut self, store: usize, token: u64, blocks: Blocks, result: Result<(), IoError>) {
        let Some(own) = self.stores.get_mut(store).and_then(Option::as_mut) else {
            // Stores close only after their last request.
            unreachable!("a disk request ended on a closed store");
        };
        let mut disk = ReactorDisk {
            ring: &mut self.ring,
            pool: &mut self.pool,
            inline_ends: &mut self.inline_ends,
            store,
            file: own.file,
            dsync: own.dsync,
            inline: own.inline,
        };
        own.store.finished(token, blocks, result, &mut disk, &mut self.outcomes);
    }

    /// Answers a request whose store has finished.
    fn finish(&mut self, outcome: Outcome) {
        let id = RequestId(outcome.request.0);
        let request = self.requests.get_mut(id);
        let (interface, io, arrived_ns) = (request.interface, request.io, request.arrived_ns);
        let (head_bytes, data_bytes) = (request.head_bytes(), request.data_bytes());
        let ended = match (outcome.result, io.kind) {
            (Ok(()), _) => target::Outcome::Done,
            (Err(StoreError::NoMemory), _) => {
                self.stats.add(Counter::MemoryExhausted, 1);
                self.end(id, Some(outcome.blocks));
                return;
            }
            (Err(StoreError::Unreadable(_) | StoreError::OutOfRange), IoKind::Read) => {
                target::Outcome::Uncorrectable
            }
            (Err(_), _) => target::Outcome::Fault,
        };
        let head = io.finish(ended);
        if ended != target::Outcome::Done {
            self.stats.add(Counter::AtaErrors, 1);
            self.send(interface, &head, Segments::new());
            self.end(id, Some(outcome.blocks));
            return;
        }
        let elapsed_ns = self.now_ns.saturating_sub(arrived_ns);
        match io.kind {
            IoKind::Read => {
                self.stats.add(Counter::Reads, 1);
                self.stats.add(Counter::ReadBytes, data_bytes as u64);
                self.stats.record(Latency::Read, elapsed_ns);
                self.send(interface, &head, slices(outcome.blocks, head_bytes, data_bytes));
                self.end(id, None);
            }
            IoKind::Write => {
                self.stats.add(Counter::Writes, 1);
                self.stats.add(Counter::WriteBytes, data_bytes as u64);
                self.stats.record(Latency::Write, elapsed_ns);
                self.send(interface, &head, Segments::new());
                self.end(id, Some(outcome.blocks));
            }
            IoKind::Flush => {
                self.stats.add(Counter::Flushes, 1);
                self.send(interface, &head, Segments::new());
                self.end(id, None);
            }
        }
    }

    /// Takes a request out; what waited for it becomes ready.
    fn end(&mut self, id: RequestId, blocks: Option<Blocks>) {
        let request = self.requests.remove(id);
        release_blocks(&mut self.pool, request.payload);
        if let Some(blocks) = blocks {
            release_blocks(&mut self.pool, blocks);
        }
        if request.io.kind != IoKind::Flush {
            let ready = &mut self.ready;
            self.order.release(id, |granted| ready.push_back(granted));
        }
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Frames out

    /// Sends an answer with a few bytes behind its head.
    fn send_bytes(&mut self, interface: u8, head: &ReplyHead, bytes: &[u8]) {
        let Some(mut chunk) = self.pool.take_chunk() else {
            self.stats.add(Counter::MemoryExhausted, 1);
            return;
        };
        self.pool.copy_in(&mut chunk, 0, bytes);
        let mut data = Segments::new();
        let len = u16::try_from(bytes.len()).expect("less than a chunk");
        let fits = data.push(Segment { chunk, offset: 0, len }).is_ok();
        debug_assert!(fits);
        self.send(interface, head, data);
    }

    /// Queues an answer on the way out of its interface.
    fn send(&mut self, interface: u8, head: &ReplyHead, data: Segments) {
        match self.egress[usize::from(interface)] {
            Egress::Own(at) => self.transmit(at, head, data),
            Egress::Other(core) => self.hand_over(core, Message::Send { interface, head: *head, data }),
        }
    }

    fn transmit(&mut self, at: usize, head: &ReplyHead, data: Segments) {
        let Some(mut header) = self.pool.take_header() else {
            self.stats.add(Counter::MemoryExhausted, 1);
            self.give_back(data);
            return;
        };
        *self.pool.header_bytes_mut(&mut header) = head.bytes;
        let frame = TxFrame { header, header_len: head.len, data };
        self.stats.add(Counter::TxFrames, 1);
        self.stats.add(Counter::TxBytes, frame.len() as u64);
        // Answers keep their order: behind one that waits, all wait.
        let waiting = if self.backlog.is_empty() {
            self.queues[at].queue.transmit(&mut self.pool, frame).err()
        } else {
            Some(frame)
        };
        let Some(frame) = waiting else { return };
        self.stats.add(Counter::TxRingFull, 1);
        if self.backlog.len() < BACKLOG_MAX {
            self.backlog.push_back((at, frame));
        } else {
            self.pool.release_header(frame.header);
            self.give_back(frame.data);
        }
    }

    /// Gives everything queued to the kernel and takes back what it has sent; whether there was anything.
    fn send_out(&mut self) -> bool {
        let mut worked = false;
        let (pool, mailboxes, region, ring) = (&mut self.pool, &self.mailboxes, &self.region, &mut self.ring);
        self.unsent = false;
        for own in &mut self.queues {
            let pending = own.queue.tx_pending();
            self.unsent |= !own.queue.flush();
            worked |= pending && !own.queue.tx_pending();
            own.queue.reap(pool, &mut |chunk| send_home(mailboxes, region, ring, chunk));
        }
        while let Some((at, frame)) = self.backlog.pop_front() {
            match self.queues[at].queue.transmit(&mut self.pool, frame) {
                Ok(()) => worked = true,
                Err(frame) => {
                    self.backlog.push_front((at, frame));
                    break;
                }
            }
        }
        worked
    }

    /// Advertises exports that are new, by the queues that are each interface's first.
    fn advertise(&mut self) -> bool {
        if self.announced >= self.config.announce.len() {
            return false;
        }
        let config = Arc::clone(&self.config);
        let end = config.announce.len().min(self.announced + ADVERTISEMENTS_BATCH);
        for &key in &config.announce[self.announced..end] {
            let Some(export) = config.exports.exports().iter().find(|export| export.key == key) else {
                continue;
            };
            for at in 0..self.queues.len() {
                if self.queues[at].queue.info().queue == 0 {
                    let interface = self.queues[at].interface;
                    let ingress = self.ingress[usize::from(interface)];
                    self.answer(interface, export, target::advertisement(export, &ingress));
                }
            }
        }
        self.announced = end;
        true
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Other cores

    fn hand_over(&mut self, core: u16, message: Message) {
        let mailbox = &self.mailboxes[usize::from(core)];
        match mailbox.send(message) {
            Ok(false) => {}
            Ok(true) => {
                if let Some(handle) = mailbox.wake_handle() {
                    self.ring.wake(handle);
                }
            }
            Err(Message::Serve { frame, .. }) => {
                self.stats.add(Counter::RxDropped, 1);
                self.give_back(frame.into_segments());
            }
            Err(Message::Send { data, .. }) => {
                self.stats.add(Counter::TxRingFull, 1);
                self.give_back(data);
            }
            Err(Message::TakeBack(_)) => unreachable!("chunks go home by `send_home`"),
        }
    }

    fn take_messages(&mut self) -> bool {
        let config = Arc::clone(&self.config);
        let region = Arc::clone(&self.region);
        let mut worked = false;
        for _ in 0..MESSAGES_BATCH {
            let Some(message) = self.mailboxes[usize::from(self.core)].receive() else { break };
            worked = true;
            match message {
                Message::TakeBack(chunk) => self.pool.release(chunk),
                Message::Send { interface, head, data } => self.send(interface, &head, data),
                Message::Serve { interface, frame } => {
                    let ingress = self.ingress[usize::from(interface)];
                    // Routed again: the sender may have had another configuration.
                    if let Route::One(export) = target::route(&config.exports, &ingress, frame.head(&region))
                        && served(&config, export.key).is_some_and(|served| served.owner == self.core)
                        && !config.drain
                    {
                        let action = target::respond(export, &ingress, frame.head(&region), frame.len());
                        self.act(interface, export, action, &frame);
                    }
                    self.give_back(frame.into_segments());
                }
            }
        }
        worked
    }

    /// Gives chunks back to their owners.
    fn give_back(&mut self, segments: Segments) {
        for segment in segments {
            if self.pool.owns(&segment.chunk) {
                self.pool.release(segment.chunk);
            } else {
                send_home(&self.mailboxes, &self.region, &mut self.ring, segment.chunk);
            }
        }
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Idle

    fn sleep(&mut self) -> std::io::Result<()> {
        // Frames that a dead link holds are no reason to stay awake.
        if self.unsent {
            return Ok(());
        }
        for (at, own) in self.queues.iter_mut().enumerate() {
            if !own.armed {
                own.armed = true;
                self.ring.poll(own.queue.poll_fd(), u32::try_from(at).expect("a few queues"));
            }
        }
        let mailbox = &self.mailboxes[usize::from(self.core)];
        if !self.doorbell_armed {
            self.doorbell_armed = true;
            self.ring.poll(mailbox.doorbell(), DOORBELL);
        }
        let may_sleep = mailbox.begin_sleep() && !self.queues.iter().any(|own| own.queue.has_rx());
        if may_sleep {
            let short = self.pool.free_chunks() < self.pool.chunk_capacity() / 16;
            self.stats.add(Counter::Sleeps, 1);
            let before_ns = now_ns();
            self.ring.submit_and_wait(if short { SLEEP_SHORT } else { SLEEP })?;
            self.stats.add(Counter::Wakeups, 1);
            self.adapt_spin(now_ns().saturating_sub(before_ns));
        }
        self.mailboxes[usize::from(self.core)].end_sleep();
        Ok(())
    }

    /// Spins longer when sleeps turn out short, and hardly at all when there is nothing to do.
    fn adapt_spin(&mut self, slept_ns: u64) {
        self.spin_ns = if slept_ns < 2 * SPIN_NS_MAX {
            (self.spin_ns * 2).min(SPIN_NS_MAX)
        } else {
            (self.spin_ns / 2).max(SPIN_NS_MIN)
        };
    }

    fn read_link_stats(&mut self) {
        self.stats_read_ns = self.now_ns;
        for own in &mut self.queues {
            let now = own.queue.stats();
            let seen = std::mem::replace(&mut own.seen, now);
            self.stats.add(Counter::RxDropped, now.rx_dropped.saturating_sub(seen.rx_dropped));
            self.stats.add(Counter::RxInvalid, now.rx_invalid.saturating_sub(seen.rx_invalid));
        }
        let copied = self.pool.bytes_copied();
        self.stats.add(Counter::BytesCopied, copied - std::mem::replace(&mut self.bytes_copied_seen, copied));
    }
}

fn served(config: &CoreConfig, key: u32) -> Option<&Served> {
    config.served.get(key as usize)?.as_ref()
}

/// The part of whole blocks that was asked for, as slices to send.
fn slices(mut blocks: Blocks, head_bytes: u16, data_bytes: usize) -> Segments {
    let mut reversed: [Option<Chunk>; torus_uring::BLOCKS_MAX] = Default::default();
    let count = blocks.len();
    for slot in reversed[..count].iter_mut().rev() {
        *slot = blocks.pop();
    }
    let mut data = Segments::new();
    let mut offset = head_bytes;
    let mut left = data_bytes;
    for chunk in reversed.into_iter().flatten() {
        let room = torus_uring::BLOCK_BYTES - usize::from(offset);
        let len = u16::try_from(room.min(left)).expect("at most a block");
        left -= usize::from(len);
        let fits = data.push(Segment { chunk, offset, len }).is_ok();
        debug_assert!(fits, "at most three blocks");
        offset = 0;
    }
    data
}

/// Sends a chunk to the core that owns it. Its letter box is emptied by a core that never waits for this one, so a full
/// box empties soon; one that stays full is that of a core that has ended, and takes its chunks with it.
fn send_home(mailboxes: &[Mailbox], region: &Region, ring: &mut Ring, chunk: Chunk) {
    let mailbox = &mailboxes[usize::from(region.owner(&chunk))];
    const TRIES: u32 = 1 << 20;
    let mut message = Message::TakeBack(chunk);
    for _ in 0..TRIES {
        match mailbox.send(message) {
            Ok(false) => return,
            Ok(true) => {
                if let Some(handle) = mailbox.wake_handle() {
                    ring.wake(handle);
                }
                return;
            }
            Err(refused) => {
                message = refused;
                std::hint::spin_loop();
            }
        }
    }
    std::mem::forget(message);
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
