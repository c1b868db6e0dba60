//! Serving: from an AoE request that has been read to its answer, without I/O.
//!
//! AoE requests and ended disk requests go in; disk requests (through [`Devices`]) and answers come out. So the same code
//! runs on io_uring, inline on memory and on a simulated disk. Between two calls of [`Serving::start_next`] lies a *batch*: what
//! was received in one go.
//!
//! * **Order.** An AoE request that overlaps an earlier one of its export starts when that one has been answered (I6).
//! * **Joining.** An AoE request becomes a rider of one of the same client that is in progress, where that changes neither
//!   order nor bytes; one disk request then serves both, and every rider gets its answer, in order of arrival. A *duplicate*
//!   asks what the other asks, for writes with the very same bytes. A *neighbour* asks for other sectors of the same or the
//!   next blocks, and joins only what was made for a part of a block and has not started: four writes of 1 KiB become one of
//!   4 KiB without a read-modify-write. Nothing waits for neighbours: a request for a part of a block starts at the end of its
//!   batch, any other one at once, and later only if it has to.
//! * **Late copies** of writes are dropped, where the initiator's tags tell them ([`aoe_xdp::tags`]).
//! * **Fairness.** What one client may hold, and who goes next to a busy device, is decided by [`crate::fairness`].
//!
//! Invariants:
//! * An answer to a write is composed only after the store has said that it is durable (I3), and before the next request
//!   that overlaps it may start (I6). Answers are composed in the order in which they must leave.
//! * Every rider gets exactly one answer, or none and is counted as dropped, or belongs to an export that is gone.
//! * A request admitted under a configuration that is gone starts under the one in force, or not at all, and takes in no
//!   rider of the new one. One for a head starts at that one or not at all: what was received before another one was there may be a copy
//!   of what a third one has answered (I6).
//! * No step allocates.

use std::collections::{BTreeSet, VecDeque};

use aoe_xdp::link::{Pool, RxFrame, Segment, Segments};
use aoe_xdp::order::{Access, Admission, RangeOrder, RequestId};
use aoe_xdp::target::{self, Export, Io, IoKind, ReplyHead};
use cluster_map::{CoreStats, Counter, Latency, VolumeId};
use torus_replication::terms::{Member, Site};
use torus_uring::{BLOCKS_MAX, Blocks, IoError};

use crate::clients::{ClientId, Clients, Dropped};
use crate::exchange::{Backing, Report, Served};
use crate::fairness::{DEVICES_MAX, Limits, Turns, may_take};
use crate::replicating::{Ground, Outgoing, Payload, Place, Replicating, Wanted};
use crate::request::{
    FOR_HEAD, RIDERS_PER_REQUEST_MAX, Range, Request, Requests, Rider, copy_payload, is_same_payload,
    share_blocks, take_blocks,
};
use crate::store::extent::ExtentStore;
use crate::store::extent::shard::{Object, ScrubTask, Shard};
use crate::store::{
    BLOCK_BYTES, Crcs, Disk, Operation, Outcome, RequestToken, Store, StoreError, release_blocks,
};

/// AoE requests in progress for each request: merged and repeated ones share a request.
const RIDERS_PER_REQUEST: u32 = 4;
/// Requests at one block that are looked at for one to join.
const HOSTS_LOOKED_AT_MAX: usize = 8;

/// The devices of a core and its memory.
pub trait Devices {
    /// The frame memory.
    fn pool(&mut self) -> &mut Pool;
    /// The device of the store at this position.
    fn device(&mut self, store: usize) -> impl Disk;
    /// The time now, of `CLOCK_BOOTTIME`, nanoseconds: read anew for every call, since grants are held against it (I1).
    fn boot_ns(&self) -> u64;
}

/// What serving works with but does not own.
pub struct Around<'a, D> {
    /// Devices and memory.
    pub devices: D,
    /// Where exports lie, by key.
    pub served: &'a [Option<Served>],
    /// The core's counters.
    pub stats: &'a CoreStats,
    /// The time, of `CLOCK_MONOTONIC`, nanoseconds.
    pub now_ns: u64,
}

/// An AoE request for the store.
#[derive(Debug, Clone, Copy)]
pub struct Arrival<'a> {
    /// What it asks.
    pub io: Io,
    /// Of which export.
    pub export: &'a Export,
    /// Ordinal of the interface that it came by.
    pub interface: u8,
    /// The frame, with a write's data.
    pub frame: &'a RxFrame,
}

/// An answer on its way out.
#[derive(Debug)]
pub struct Answer {
    /// Ordinal of the interface to send it by.
    pub interface: u8,
    /// Its beginning.
    pub head: ReplyHead,
    /// What follows.
    pub data: Segments,
}

/// The requests of one core.
#[derive(Debug)]
pub struct Serving {
    order: RangeOrder,
    requests: Requests,
    clients: Clients,
    turns: Turns,
    /// Requests of the present batch that may start and take neighbours in until its end.
    forming: VecDeque<RequestId>,
    /// By position.
    stores: Vec<Option<ExtentStore>>,
    outcomes: Vec<Outcome>,
    answers: VecDeque<Answer>,
    replicating: Replicating,
    /// Chunks that writes of initiators leave free.
    leave_chunks: usize,
    /// Parity of the configuration in force.
    epoch: u8,
}

impl Serving {
    /// Nothing in progress, no store open. `clients` has as many places as the limits say.
    #[must_use]
    pub fn new(limits: Limits, clients: Clients, replicating: Replicating) -> Serving {
        let requests_max = limits.requests;
        let riders_max = requests_max * RIDERS_PER_REQUEST;
        Serving {
            order: RangeOrder::new(requests_max),
            requests: Requests::new(requests_max, riders_max),
            clients,
            turns: Turns::new(limits),
            forming: VecDeque::with_capacity(requests_max as usize),
            stores: Vec::with_capacity(DEVICES_MAX),
            outcomes: Vec::with_capacity(requests_max as usize),
            answers: VecDeque::with_capacity(riders_max as usize),
            replicating,
            leave_chunks: 0,
            epoch: 0,
        }
    }

    /// Has writes of initiators leave so many chunks free for what other cores ask: two cores whose memory is full of their own
    /// initiators' requests would wait for each other without end.
    #[must_use]
    pub fn leaving(self, leave_chunks: usize) -> Serving {
        Serving { leave_chunks, ..self }
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Configuration

    /// Makes this core's shards of a store usable. Allocates; stores come rarely.
    pub fn open_store(&mut self, at: usize, shards: impl Iterator<Item = Box<Shard>>) {
        while self.stores.len() <= at {
            self.stores.push(None);
        }
        let mut store = ExtentStore::new();
        for shard in shards {
            store.adopt(shard);
        }
        self.stores[at] = Some(store);
    }

    /// Lets heads and replicas know of a store that was opened: who it is, and which volumes this core has there.
    pub fn open_replicas(
        &mut self,
        at: usize,
        member: Member,
        volumes: impl Iterator<Item = (VolumeId, Object)>,
    ) {
        let places = volumes.map(|(volume, object)| (volume, Place { store: at, object }));
        self.replicating.open_store(member, places, &self.stores);
    }

    /// Begins to bring a store to rest that no new request will name.
    pub fn close_store(&mut self, at: usize) {
        self.replicating.close_store(at);
        if let Some(store) = self.stores.get_mut(at).and_then(Option::as_mut) {
            store.close();
        }
    }

    /// Lets a store go once it is at rest; whether it is gone.
    pub fn drop_closed_store(&mut self, at: usize, pool: &mut Pool) -> bool {
        let Some(slot) = self.stores.get_mut(at) else { return true };
        if slot.as_ref().is_some_and(|store| !store.is_closed()) {
            return false;
        }
        if let Some(store) = slot.take() {
            store.dissolve(pool);
        }
        true
    }

    /// Begins to take from a layer every block from `from_block` on.
    pub fn unmap(&mut self, at: usize, object: Object, from_block: u64) {
        if let Some(store) = self.stores.get_mut(at).and_then(Option::as_mut) {
            store.unmap(object, from_block);
        }
    }

    /// Says which scrub of a store is wanted.
    pub fn set_scrub(&mut self, at: usize, task: Option<ScrubTask>) {
        if let Some(store) = self.stores.get_mut(at).and_then(Option::as_mut) {
            store.set_scrub(task);
        }
    }

    /// When a store wants a turn, if nothing else gives it one before; `u64::MAX` for never.
    #[must_use]
    pub fn stores_due_ns(&self) -> u64 {
        self.stores.iter().flatten().map(ExtentStore::due_ns).min().unwrap_or(u64::MAX)
    }

    /// Whether the store at this position is open.
    #[must_use]
    pub fn has_store(&self, at: usize) -> bool {
        self.stores.get(at).is_some_and(Option::is_some)
    }

    /// Requests that come from now on belong to another configuration than those before.
    pub fn begin_configuration(&mut self) {
        self.epoch ^= 1;
    }

    /// Whether no request is left that came before the present configuration and needs what that named. Those for heads do not.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.requests.of_epoch(self.epoch ^ 1) == 0
    }

    /// Whether nothing is in progress.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.answers.is_empty() && self.replicating.is_idle()
    }

    /// The clients of this core.
    pub fn clients_mut(&mut self) -> &mut Clients {
        &mut self.clients
    }

    // ---------------------------------------------------------------------------------------------------------------
    // In

    /// Takes an AoE request in, or drops and counts it.
    pub fn admit(&mut self, arrival: Arrival<'_>, around: &mut Around<'_, impl Devices>) {
        let io = arrival.io;
        let Export { key, address, .. } = *arrival.export;
        let Some(client) = self.clients.seen(key, address, io.initiator(), around.now_ns) else {
            around.stats.add(Counter::RxDropped, 1);
            return;
        };
        if self.clients.is_late(client, &io, around.now_ns) {
            around.stats.add(Counter::LateWrites, 1);
            self.clients.dropped(client, Dropped::Late);
            return;
        }
        if !may_take(self.clients.in_flight(client), self.requests.room()) {
            around.stats.add(Counter::ClientOverLimit, 1);
            self.clients.dropped(client, Dropped::Limit);
            return;
        }
        if io.kind != IoKind::Flush && self.join(&arrival, client, around) {
            self.take(client, &io, around.now_ns);
            return;
        }
        let mut request = Request::new(&io, key, client, self.epoch);
        request.head = head_of(around.served, key);
        if request.head.is_some() {
            request.epoch = FOR_HEAD;
        }
        let range = request.range;
        if io.kind == IoKind::Write {
            let pool = around.devices.pool();
            let has_room = pool.free_chunks() >= self.leave_chunks;
            let Some(mut payload) = has_room.then(|| take_blocks(pool, range.block_count())).flatten() else {
                around.stats.add(Counter::MemoryExhausted, 1);
                self.clients.dropped(client, Dropped::Memory);
                return;
            };
            request.crcs = copy_payload(pool, arrival.frame, range, range, &mut payload);
            request.payload = payload;
        }
        let Ok(id) = self.requests.insert(request, rider(&arrival, around.now_ns)) else {
            unreachable!("there was room");
        };
        self.take(client, &io, around.now_ns);
        let access = match io.kind {
            IoKind::Read => Access::Shared,
            IoKind::Write => Access::Exclusive,
            // Everything acknowledged is durable already: a flush has nothing to wait for.
            IoKind::Flush => return self.start_in_turn(id, around),
        };
        let (first, last) = (range.first_block(), range.last_block());
        match self.order.admit(id, key, first, last, access) {
            Admission::Granted if range.is_whole_blocks() => self.start_in_turn(id, around),
            Admission::Granted => self.forming.push_back(id),
            Admission::Queued => around.stats.add(Counter::OrderWaits, 1),
        }
    }

    /// Notes that an AoE request of a client is in progress.
    fn take(&mut self, client: ClientId, io: &Io, now_ns: u64) {
        self.clients.admitted(client);
        if io.kind == IoKind::Write {
            self.clients.written(client, io, now_ns);
        }
    }

    /// Makes an AoE request a rider of one in progress, if one suits.
    fn join(
        &mut self,
        arrival: &Arrival<'_>,
        client: ClientId,
        around: &mut Around<'_, impl Devices>,
    ) -> bool {
        let (export, range) = (arrival.export.key, Range::of(&arrival.io));
        let head = head_of(around.served, export);
        let epoch = if head.is_some() { FOR_HEAD } else { self.epoch };
        let (first, last) = (range.first_block(), range.last_block());
        // One that has all its blocks has the first; a neighbour may have any of them, or one beyond its edge.
        let partial = !range.is_whole_blocks();
        let before = first.checked_sub(1).filter(|_| partial && range.head_bytes() == 0);
        let after = Some(last + 1).filter(|_| partial && range.tail_bytes() == 0);
        let other_end = Some(last).filter(|_| partial && last != first);
        for block in [Some(first), other_end, before, after].into_iter().flatten() {
            let host = self.order.newest(export, block).take(HOSTS_LOOKED_AT_MAX).find(|&host| {
                suits(self.requests.get(host), arrival.io.kind, client, (epoch, head), range)
                    && self.order.may_join(host, export, first, last)
            });
            if let Some(host) = host
                && self.take_in(host, arrival, around)
            {
                self.order.join(host, export, first, last);
                return true;
            }
        }
        false
    }

    /// Adds a rider to a request that [`suits`] it; false if a write differs from what the request writes, or memory is
    /// short.
    fn take_in(
        &mut self,
        host: RequestId,
        arrival: &Arrival<'_>,
        around: &mut Around<'_, impl Devices>,
    ) -> bool {
        let range = Range::of(&arrival.io);
        let request = self.requests.get_mut(host);
        let Some(joined) = request.range.joined(range) else { return false };
        let mut duplicate = false;
        if request.kind == IoKind::Write {
            let pool = around.devices.pool();
            if request.range.covers(range) {
                duplicate = true;
                if !is_same_payload(pool.region(), arrival.frame, range, request.range, &request.payload) {
                    return false;
                }
            } else {
                if !widen(pool, &mut request.payload, request.range, joined) {
                    return false;
                }
                // Blocks have moved, and those that two frames make up have no sum yet.
                let _of_one_frame = copy_payload(pool, arrival.frame, range, joined, &mut request.payload);
                request.crcs = Crcs::default();
            }
        }
        request.range = joined;
        duplicate |= self.requests.has_rider_for(host, range);
        let added = self.requests.add_rider(host, rider(arrival, around.now_ns));
        debug_assert!(added, "there was room");
        if duplicate {
            let client = self.requests.get(host).client;
            self.clients.duplicate(client);
        }
        around.stats.add(if duplicate { Counter::Duplicates } else { Counter::Merged }, 1);
        true
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Devices

    /// Ends the batch, and gives the next request whose turn it is to its store; false when none may start.
    pub fn start_next(&mut self, around: &mut Around<'_, impl Devices>) -> bool {
        while let Some(id) = self.forming.pop_front() {
            wait_for_turn(&mut self.turns, self.requests.get(id), id, around);
        }
        self.take_turn(around)
    }

    /// Starts a request that may, unless its device is busy.
    fn start_in_turn(&mut self, id: RequestId, around: &mut Around<'_, impl Devices>) {
        wait_for_turn(&mut self.turns, self.requests.get(id), id, around);
        while self.take_turn(around) {}
    }

    fn take_turn(&mut self, around: &mut Around<'_, impl Devices>) -> bool {
        let Some((device, id)) = self.turns.take_next() else { return false };
        let request = self.requests.get_mut(id);
        request.started = true;
        request.device = device;
        let place = served(around.served, request.export);
        let layer = match (place.map(|place| place.backing), request.head) {
            (Some(Backing::Head(volume, takeover)), Some(head)) if head == (volume, takeover) => {
                self.ask_head(id, head, around);
                return true;
            }
            (Some(Backing::Layer(layer)), None) => Some(layer),
            (Some(Backing::Head(..) | Backing::Layer(_)) | None, _) => None,
        };
        let store = place.and_then(|place| self.stores.get_mut(place.store)?.as_mut());
        let (Some(place), Some(object), Some(store)) = (place, layer, store) else {
            // Unexported, or its store is gone, while it waited.
            self.abandon(id, None, around);
            return true;
        };
        let range = request.range;
        let token = RequestToken(id.0);
        let pool = around.devices.pool();
        let operation = match request.kind {
            IoKind::Flush => Operation::Flush,
            IoKind::Write => Operation::Write {
                first_block: range.first_block(),
                keep_head_bytes: range.head_bytes(),
                keep_tail_bytes: range.tail_bytes(),
                blocks: share_blocks(pool, &request.payload),
                crcs: request.crcs,
            },
            IoKind::Read => match take_blocks(pool, range.block_count()) {
                Some(blocks) => Operation::Read { first_block: range.first_block(), blocks },
                None => {
                    self.abandon(id, Some(Dropped::Memory), around);
                    return true;
                }
            },
        };
        let mut device = around.devices.device(place.store);
        store.start(token, &object, operation, &mut device, &mut self.outcomes);
        true
    }

    /// Gives a request to the head of its volume.
    fn ask_head(&mut self, id: RequestId, head: (VolumeId, u64), around: &mut Around<'_, impl Devices>) {
        let request = self.requests.get(id);
        let (range, token) = (request.range, RequestToken(id.0));
        let wanted = match request.kind {
            // Everything acknowledged is durable.
            IoKind::Flush => {
                self.outcomes.push(Outcome { request: token, blocks: Blocks::new(), result: Ok(()) });
                return;
            }
            IoKind::Read => Wanted::Read(range.first_block()..range.last_block() + 1),
            IoKind::Write => Wanted::Write {
                first_block: range.first_block(),
                payload: Payload::known(share_blocks(around.devices.pool(), &request.payload), &request.crcs),
                keep_head_bytes: range.head_bytes(),
                keep_tail_bytes: range.tail_bytes(),
            },
        };
        let (replicating, mut ground) = self.replicating(around);
        replicating.start(token, head, wanted, &mut ground);
    }

    /// The sites that heads here ask.
    #[must_use]
    pub fn wanted_sites(&self) -> BTreeSet<Site> {
        self.replicating.wanted()
    }

    /// Whether what comes by the connection of a site is done at once.
    #[must_use]
    pub fn serves_site(&self, site: Site) -> bool {
        self.replicating.serves(site)
    }

    /// How long heads and replicas can wait for the next look at the time.
    #[must_use]
    pub fn replication_tick_ns(&self) -> u64 {
        self.replicating.tick_ns()
    }

    /// Whether heads or replicas wait for a time.
    #[must_use]
    pub fn is_replication_timed(&self) -> bool {
        self.replicating.is_timed()
    }

    /// Whether heads have something to tell of which that report says nothing.
    #[must_use]
    pub fn has_news(&self, reported: &Report) -> bool {
        self.replicating.has_news(reported)
    }

    /// The next message of a head or replica to another site.
    pub fn next_outgoing(&mut self) -> Option<Outgoing> {
        self.replicating.next_outgoing()
    }

    /// Heads and replicas, for whoever looks at them.
    #[must_use]
    pub fn replicated(&self) -> &Replicating {
        &self.replicating
    }

    /// Heads and replicas, and what they work with.
    pub fn replicating<'s, D: Devices>(
        &'s mut self,
        around: &'s mut Around<'_, D>,
    ) -> (&'s mut Replicating, Ground<'s, D>) {
        let ground =
            Ground { stores: &mut self.stores, devices: &mut around.devices, outcomes: &mut self.outcomes };
        (&mut self.replicating, ground)
    }

    /// Lets stores send what they have gathered; whether any had something to do. Called when nothing else is left: what has come
    /// by then goes to the device together.
    pub fn turn_stores(&mut self, around: &mut Around<'_, impl Devices>) -> bool {
        let mut worked = false;
        for (at, store) in self.stores.iter_mut().enumerate() {
            let Some(store) = store.as_mut().filter(|store| store.needs_turn(around.now_ns)) else {
                continue;
            };
            store.turn(around.now_ns, &mut around.devices.device(at), &mut self.outcomes);
            worked = true;
        }
        worked
    }

    /// A disk request of the store at this position has ended.
    ///
    /// # Panics
    /// If the store is not open: stores close only after their last request.
    pub fn disk_ended(
        &mut self,
        store: usize,
        token: u64,
        blocks: Blocks,
        result: Result<(), IoError>,
        around: &mut Around<'_, impl Devices>,
    ) {
        let own = self.stores.get_mut(store).and_then(Option::as_mut);
        let own = own.expect("a disk request ends before its store is closed");
        own.finished(token, blocks, result, &mut around.devices.device(store), &mut self.outcomes);
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Out

    /// Composes the answers of a request that its store has finished, and lets go what waited for it; false when no store
    /// has finished one.
    pub fn finish_next(&mut self, around: &mut Around<'_, impl Devices>) -> bool {
        let Some(outcome) = self.outcomes.pop() else { return false };
        let (replicating, mut ground) = self.replicating(around);
        let Some(outcome) = replicating.store_ended(outcome, &mut ground) else { return true };
        let id = RequestId(outcome.request.0);
        let (kind, client) = (self.requests.get(id).kind, self.requests.get(id).client);
        let first_block = self.requests.get(id).range.first_block();
        let ended = match outcome.result {
            Ok(()) => target::Outcome::Done,
            Err(StoreError::NoMemory) => {
                release_blocks(around.devices.pool(), outcome.blocks);
                self.abandon(id, Some(Dropped::Memory), around);
                return true;
            }
            Err(StoreError::NoHead) => {
                release_blocks(around.devices.pool(), outcome.blocks);
                self.abandon(id, None, around);
                return true;
            }
            Err(
                StoreError::Unreadable(_)
                | StoreError::OutOfRange
                | StoreError::Corrupt { .. }
                | StoreError::Lost,
            ) if kind == IoKind::Read => target::Outcome::Uncorrectable,
            Err(_) => target::Outcome::Fault,
        };
        let mut blocks = outcome.blocks;
        while let Some(rider) = self.requests.take_rider(id) {
            let head = rider.io.finish(ended);
            let range = Range::of(&rider.io);
            let mut data = Segments::new();
            if ended == target::Outcome::Done {
                let elapsed_ns = around.now_ns.saturating_sub(rider.arrived_ns);
                count_answer(around.stats, kind, range, elapsed_ns);
                self.clients.answered(client, kind, range.data_bytes() as u64, elapsed_ns);
                if kind == IoKind::Read {
                    data = slices(around.devices.pool(), &mut blocks, first_block, range);
                }
            } else {
                around.stats.add(Counter::AtaErrors, 1);
                self.clients.failed(client);
            }
            self.answers.push_back(Answer { interface: rider.interface, head, data });
        }
        release_blocks(around.devices.pool(), blocks);
        self.end(id, around);
        true
    }

    /// The next answer to send.
    pub fn next_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }

    /// Ends a request without answers: its initiator asks again, or should not have asked.
    fn abandon(&mut self, id: RequestId, why: Option<Dropped>, around: &mut Around<'_, impl Devices>) {
        let client = self.requests.get(id).client;
        while self.requests.take_rider(id).is_some() {
            self.clients.abandoned(client, why);
            if why == Some(Dropped::Memory) {
                around.stats.add(Counter::MemoryExhausted, 1);
            }
        }
        self.end(id, around);
    }

    /// Takes a request out; what waited for it may start.
    fn end(&mut self, id: RequestId, around: &mut Around<'_, impl Devices>) {
        let request = self.requests.remove(id);
        self.turns.ended(request.device);
        release_blocks(around.devices.pool(), request.payload);
        if request.kind != IoKind::Flush {
            let (turns, requests) = (&mut self.turns, &self.requests);
            self.order.release(id, |granted| wait_for_turn(turns, requests.get(granted), granted, around));
        }
    }
}

fn rider(arrival: &Arrival<'_>, now_ns: u64) -> Rider {
    Rider { io: arrival.io, interface: arrival.interface, arrived_ns: now_ns }
}

/// The head that an export is served by now, if it is by one.
fn head_of(all: &[Option<Served>], key: u32) -> Option<(VolumeId, u64)> {
    match served(all, key)?.backing {
        Backing::Head(volume, takeover) => Some((volume, takeover)),
        Backing::Layer(_) => None,
    }
}

/// Whether an AoE request may be a rider of this one for all that the two of them are; the range order and, for a write of
/// the same sectors, the bytes decide the rest.
fn suits(
    host: &Request,
    kind: IoKind,
    client: ClientId,
    behind: (u8, Option<(VolumeId, u64)>),
    range: Range,
) -> bool {
    if host.kind != kind
        || host.client != client
        || (host.epoch, host.head) != behind
        || host.rider_count() >= RIDERS_PER_REQUEST_MAX
    {
        return false;
    }
    let grows = host.growing
        && !host.started
        && host.range.joined(range).is_some_and(|joined| joined.block_count() <= BLOCKS_MAX);
    let (first, last) = (range.first_block(), range.last_block());
    let (host_first, host_last) = (host.range.first_block(), host.range.last_block());
    match kind {
        // Whole blocks are read, whatever part of them is asked for.
        IoKind::Read => {
            let covered = host_first <= first && last <= host_last;
            let touching = first <= host_last + 1 && host_first <= last + 1;
            covered || (grows && touching)
        }
        // Without a gap, so that one range tells what is written.
        IoKind::Write => host.range.covers(range) || (grows && host.range.adjoins(range)),
        IoKind::Flush => false,
    }
}

/// Adds chunks to a payload for `range`, at either end, for all blocks of `joined`; false when no memory is free.
fn widen(pool: &mut Pool, payload: &mut Blocks, range: Range, joined: Range) -> bool {
    let missing = joined.block_count() - range.block_count();
    if missing == 0 {
        return true;
    }
    let Some(added) = take_blocks(pool, missing) else { return false };
    let (mut front, mut back) = (added, std::mem::take(payload));
    if joined.first_block() == range.first_block() {
        std::mem::swap(&mut front, &mut back);
    }
    front.append(back);
    *payload = front;
    true
}

/// The part of whole blocks, the first of which is `first_block`, that a rider asked for, as slices to send.
fn slices(pool: &mut Pool, blocks: &mut Blocks, first_block: u64, range: Range) -> Segments {
    let mut data = Segments::new();
    let mut offset = range.head_bytes();
    let mut left = range.data_bytes();
    let skipped = usize::try_from(range.first_block() - first_block).expect("within the request");
    for chunk in blocks.iter().skip(skipped).take(range.block_count()) {
        let room = BLOCK_BYTES - usize::from(offset);
        let len = u16::try_from(room.min(left)).expect("at most a block");
        left -= usize::from(len);
        let fits = data.push(Segment { chunk: pool.share(chunk), offset, len }).is_ok();
        debug_assert!(fits, "at most three blocks");
        offset = 0;
    }
    data
}

fn served(served: &[Option<Served>], export: u32) -> Option<&Served> {
    served.get(export as usize)?.as_ref()
}

/// Puts a request that may start in its client's line at the device.
fn wait_for_turn<D>(turns: &mut Turns, request: &Request, id: RequestId, around: &Around<'_, D>) {
    // Where an export that is gone has no device, any turn will do to find that out.
    let device = served(around.served, request.export).map_or(0, |place| place.store.min(DEVICES_MAX - 1));
    if turns.is_busy(device) {
        around.stats.add(Counter::DeviceWaits, 1);
    }
    turns.wait(device, request.client, id);
}

fn count_answer(stats: &CoreStats, kind: IoKind, range: Range, elapsed_ns: u64) {
    let bytes = range.data_bytes() as u64;
    match kind {
        IoKind::Read => {
            stats.add(Counter::Reads, 1);
            stats.add(Counter::ReadBytes, bytes);
            stats.record(Latency::Read, elapsed_ns);
        }
        IoKind::Write => {
            stats.add(Counter::Writes, 1);
            stats.add(Counter::WriteBytes, bytes);
            stats.record(Latency::Write, elapsed_ns);
        }
        IoKind::Flush => stats.add(Counter::Flushes, 1),
    }
}

#[cfg(test)]
mod tests;
