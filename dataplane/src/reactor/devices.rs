//! Devices: disk requests by io_uring, or by the core itself where the store is in memory, and the ends of both.

use std::collections::VecDeque;
use std::sync::Arc;

use aoe_xdp::link::Pool;
use cluster_map::{CoreStats, Counter};
use torus_uring::{Blocks, Event, FileId, IoError, MappedFile, Ring, read_inline, write_inline};

use super::waiting::{DiskRequest, WaitingRequests, Work};
use super::{DOORBELL, Reactor, boot_ns};
use crate::serving::{Around, Arrival, Devices, Serving};
use crate::store::{Disk, Durable};

/// A disk request's token: the store's position above the store's own token.
const STORE_SHIFT: u32 = 48;

/// How a store's device is reached.
pub(super) struct OwnDevice {
    pub(super) file: FileId,
    pub(super) dsync: bool,
    pub(super) inline: bool,
    pub(super) mapped: Option<Arc<MappedFile>>,
}

impl OwnDevice {
    /// Whether such a write carries `RWF_DSYNC`: a device without a volatile cache needs none.
    pub(super) fn carries_dsync(&self, until: Durable) -> bool {
        self.dsync && until == Durable::AtEnd
    }
}

/// A request of a memory store whose end is to be told.
pub(super) struct Inline {
    store: usize,
    token: u64,
    blocks: Blocks,
    state: InlineState,
}

enum InlineState {
    /// A read that is done only then.
    ToRead {
        offset_bytes: u64,
    },
    Ended(Result<(), IoError>),
}

/// A request of a memory store that has ended.
pub(super) struct InlineEnd {
    store: usize,
    token: u64,
    blocks: Blocks,
    result: Result<(), IoError>,
}

/// All devices of the core.
pub(super) struct ReactorDevices<'r> {
    pub(super) ring: &'r mut Ring,
    pub(super) pool: &'r mut Pool,
    pub(super) waiting: &'r mut WaitingRequests,
    pub(super) inline: &'r mut VecDeque<Inline>,
    pub(super) devices: &'r [Option<OwnDevice>],
    pub(super) stats: &'r CoreStats,
}

impl Devices for ReactorDevices<'_> {
    fn pool(&mut self) -> &mut Pool {
        self.pool
    }

    fn device(&mut self, store: usize) -> impl Disk {
        let own = own_device(self.devices, store);
        ReactorDisk {
            ring: self.ring,
            pool: self.pool,
            waiting: self.waiting,
            inline: self.inline,
            stats: self.stats,
            own,
            store,
        }
    }

    fn boot_ns(&self) -> u64 {
        boot_ns()
    }
}

/// The device of one store, as the store sees it.
struct ReactorDisk<'r> {
    ring: &'r mut Ring,
    pool: &'r mut Pool,
    waiting: &'r mut WaitingRequests,
    inline: &'r mut VecDeque<Inline>,
    stats: &'r CoreStats,
    own: &'r OwnDevice,
    store: usize,
}

impl ReactorDisk<'_> {
    fn submit(&mut self, token: u64, work: Work) {
        let token = token | (self.store as u64) << STORE_SHIFT;
        let request = DiskRequest { file: self.own.file, token, work };
        self.waiting.submit(request, self.ring, self.pool);
    }

    fn ended(&mut self, token: u64, blocks: Blocks, result: Result<(), IoError>) {
        let state = InlineState::Ended(result);
        self.inline.push_back(Inline { store: self.store, token, blocks, state });
    }
}

impl ReactorDevices<'_> {
    /// The oldest request of a memory store, ended. Reads are done here and not when they are asked for: until then the blocks of
    /// all of a batch are on their way from memory.
    fn next_inline_end(&mut self) -> Option<InlineEnd> {
        let Inline { store, token, mut blocks, state } = self.inline.pop_front()?;
        let result = match state {
            InlineState::Ended(result) => result,
            InlineState::ToRead { offset_bytes } => self.read_inline(store, offset_bytes, &mut blocks),
        };
        Some(InlineEnd { store, token, blocks, result })
    }

    fn read_inline(&mut self, store: usize, offset_bytes: u64, blocks: &mut Blocks) -> Result<(), IoError> {
        let own = own_device(self.devices, store);
        if own.mapped.as_ref().is_some_and(|mapped| mapped.read(offset_bytes, blocks, self.pool)) {
            return Ok(());
        }
        read_inline(self.ring.file(own.file), offset_bytes, blocks, self.pool)
    }
}

fn own_device(devices: &[Option<OwnDevice>], store: usize) -> &OwnDevice {
    devices[store].as_ref().expect("stores are open as long as their devices")
}

impl Disk for ReactorDisk<'_> {
    fn read(&mut self, offset_bytes: u64, blocks: Blocks, token: u64) {
        self.stats.add(Counter::DiskReads, 1);
        if self.own.inline {
            if let Some(mapped) = &self.own.mapped {
                mapped.prefetch(offset_bytes, blocks.len());
            }
            let state = InlineState::ToRead { offset_bytes };
            self.inline.push_back(Inline { store: self.store, token, blocks, state });
            return;
        }
        self.submit(token, Work::Read { offset_bytes, blocks });
    }

    fn write(&mut self, offset_bytes: u64, blocks: Blocks, until: Durable, token: u64) {
        self.stats.add(Counter::DiskWrites, 1);
        if self.own.inline {
            let result = write_inline(self.ring.file(self.own.file), offset_bytes, &blocks, self.pool);
            self.ended(token, blocks, result);
            return;
        }
        let dsync = self.own.carries_dsync(until);
        self.submit(token, Work::Write { offset_bytes, blocks, dsync });
    }

    fn sync(&mut self, token: u64) {
        if self.own.inline {
            // Memory has nothing to be forced to.
            self.ended(token, Blocks::new(), Ok(()));
            return;
        }
        self.submit(token, Work::Sync);
    }

    fn pool(&mut self) -> &mut Pool {
        self.pool
    }
}

impl Reactor {
    /// The requests, and what they work with.
    pub(super) fn serving(&mut self) -> (&mut Serving, Around<'_, ReactorDevices<'_>>) {
        let devices = ReactorDevices {
            ring: &mut self.ring,
            pool: &mut self.pool,
            waiting: &mut self.waiting,
            inline: &mut self.inline,
            devices: &self.devices,
            stats: &self.stats,
        };
        let around = Around { devices, served: &self.config.served, stats: &self.stats, now_ns: self.now_ns };
        (&mut self.serving, around)
    }

    pub(super) fn admit(&mut self, arrival: Arrival<'_>) {
        let (serving, mut around) = self.serving();
        serving.admit(arrival, &mut around);
    }

    /// Gives devices all that may start; whether there was anything.
    pub(super) fn start_all(&mut self) -> bool {
        let (serving, mut around) = self.serving();
        let mut started = false;
        while serving.start_next(&mut around) {
            started = true;
        }
        started
    }

    /// Goes through everything that has ended until nothing is left; whether there was anything.
    pub(super) fn gather(&mut self) -> bool {
        let mut worked = false;
        loop {
            let (serving, mut around) = self.serving();
            if serving.finish_next(&mut around) {
                while let Some(answer) = self.serving.next_answer() {
                    self.send(answer.interface, &answer.head, answer.data);
                }
            } else if serving.start_next(&mut around) {
            } else if let Some(end) = around.devices.next_inline_end() {
                serving.disk_ended(end.store, end.token, end.blocks, end.result, &mut around);
            } else if let Some(event) = self.ring.next_event() {
                self.event(event);
            } else {
                let (serving, mut around) = self.serving();
                if !serving.turn_stores(&mut around) && !self.replicate() {
                    return worked;
                }
            }
            worked = true;
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Disk(finished) => {
                // Before the store asks for more: who came first is first.
                self.waiting.go_on(&mut self.ring, &self.pool);
                let store = (finished.token >> STORE_SHIFT) as usize;
                let token = finished.token & ((1 << STORE_SHIFT) - 1);
                let (serving, mut around) = self.serving();
                serving.disk_ended(store, token, finished.blocks, finished.result, &mut around);
            }
            Event::Ready(DOORBELL) => {
                self.doorbell_armed = false;
                self.mailboxes[usize::from(self.core)].silence_doorbell();
            }
            Event::Ready(at) => {
                let queues = self.queues.iter_mut().map(|own| &mut own.armed);
                let lanes = self.lanes.iter_mut().map(|own| &mut own.armed);
                if let Some(armed) = queues.chain(lanes).nth(at as usize) {
                    *armed = false;
                }
            }
            Event::Woken => {}
            Event::Socket(event) => self.socket_event(event),
        }
    }
}
