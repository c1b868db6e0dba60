//! Requests: admitted in order, started when nothing overlaps, answered when the store has finished.

use std::collections::VecDeque;
use std::sync::Arc;

use aoe_xdp::link::{Chunk, Pool, RxFrame, Segment, Segments};
use aoe_xdp::order::{Access, Admission, RequestId};
use aoe_xdp::target::{self, Export, Io, IoKind};
use cluster_map::{Counter, Latency};
use torus_uring::{Blocks, Event, FileId, IoError, Ring, read_inline, write_inline};

use super::{DOORBELL, Reactor, served};
use crate::request::{Request, copy_payload, take_blocks};
use crate::store::{Disk, Operation, Outcome, RequestToken, Store, StoreError, release_blocks};

/// A disk request's token: the store's position above the store's own token.
const STORE_SHIFT: u32 = 48;

/// A request of a memory store that has ended.
pub(super) struct InlineEnd {
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

impl Reactor {
    pub(super) fn admit(&mut self, interface: u8, export: &Export, io: Io, frame: &RxFrame) {
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
    pub(super) fn start(&mut self, id: RequestId) {
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
    pub(super) fn gather(&mut self) -> bool {
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

    pub(super) fn event(&mut self, event: Event) {
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

    pub(super) fn disk_ended(
        &mut self,
        store: usize,
        token: u64,
        blocks: Blocks,
        result: Result<(), IoError>,
    ) {
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
    pub(super) fn finish(&mut self, outcome: Outcome) {
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
    pub(super) fn end(&mut self, id: RequestId, blocks: Option<Blocks>) {
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
