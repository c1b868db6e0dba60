//! An extent store at work on one thread: its shards, the product's own ring and frame memory, O_DIRECT, and no network.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use aoe_xdp::link::{Pool, Region, RegionConfig};
use cluster_map::{ClusterId, NodeId, StoreId, VolumeId};
use torus_dataplane::device::Device;
use torus_dataplane::store::extent::ExtentStore;
use torus_dataplane::store::extent::extents::FreeSlot;
use torus_dataplane::store::extent::format::{DEVICE_BYTES_MIN, EXTENT_BLOCKS, SUPERBLOCK_OFFSETS};
use torus_dataplane::store::extent::opening::{self, Identity};
use torus_dataplane::store::extent::recovery;
use torus_dataplane::store::extent::shard::{Copies, Object, Shard, ShardConfig, WriteTerms};
use torus_dataplane::store::extent::shared::{ShardEvent, Shared};
use torus_dataplane::store::{
    Disk, Durable, EXTENT_BYTES, Operation, Outcome, RequestToken, Store, release_blocks,
};
use torus_uring::{Blocks, Event, FileId, Finished, Full, Ring, RingConfig};

use super::{Done, LONG_BLOCKS, LONG_DEPTH, Load};
use crate::measure::{now_ns, process_cpu_ns};
use crate::workload::Random;

/// Frame memory, chunks: what may wait for its place, and what is in flight.
const CHUNKS: u32 = 16_384;
/// Disk requests in flight; more wait.
const REQUESTS_MAX: u32 = 1024;
/// Chunks with something in them, from which all writes are made.
const SOURCES: usize = 1024;
/// The longest sleep, so that the end is noticed.
const WAIT: Duration = Duration::from_millis(20);
/// Ended disk requests that are taken in before new ones are begun.
const EVENTS_AT_ONCE: usize = 4;
/// Runs before a measurement, so that its set is warm.
const WARM_UP_NS: u64 = 200_000_000;
/// The volume whose extents are written, and the one that never keeps any.
const VOLUMES: [VolumeId; 2] = [VolumeId([1; 16]), VolumeId([2; 16])];

/// How the store is opened and written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub(super) copies: Copies,
    /// Regions that the activity log holds, where the bench decides.
    pub(super) active_max: Option<u32>,
}

/// A load, and where it goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) load: Load,
    pub(super) terms: Terms,
    pub(super) extents: u64,
    pub(super) seed: u64,
}

/// Slots that are free at least: streams take some.
const FREE_SLOTS_MIN: u32 = 64;

/// A store of which a part is written in full.
#[derive(Debug)]
pub(super) struct Prepared<'p> {
    path: &'p Path,
    /// The volumes.
    objects: [Object; 2],
    /// Extents that are written.
    pub(super) extents: u64,
    /// Where their data were written first, bytes: in as many slots side by side.
    pub(super) written_offset_bytes: u64,
    /// As many slots that the store never gets: who writes there harms nothing.
    peer_slots: Range<u32>,
    /// Where those begin, bytes.
    pub(super) peer_offset_bytes: u64,
}

enum Work {
    Read { offset_bytes: u64, blocks: Blocks },
    Write { offset_bytes: u64, blocks: Blocks, dsync: bool },
    Sync,
}

/// The device of the store. What the ring has no room for waits, in order.
struct RingDisk {
    ring: Ring,
    pool: Pool,
    file: FileId,
    dsync: bool,
    waiting: VecDeque<(u64, Work)>,
}

impl RingDisk {
    fn submit(&mut self, token: u64, work: Work) {
        self.waiting.push_back((token, work));
        self.go_on();
    }

    fn go_on(&mut self) {
        while let Some((token, work)) = self.waiting.pop_front() {
            let refused = match work {
                Work::Read { offset_bytes, blocks } => self
                    .ring
                    .read(&self.pool, self.file, offset_bytes, blocks, token)
                    .map_err(|blocks| Work::Read { offset_bytes, blocks }),
                Work::Write { offset_bytes, blocks, dsync } => self
                    .ring
                    .write(self.file, offset_bytes, blocks, dsync, token)
                    .map_err(|blocks| Work::Write { offset_bytes, blocks, dsync }),
                Work::Sync => self.ring.sync(self.file, token).map_err(|Full| Work::Sync),
            };
            if let Err(work) = refused {
                self.waiting.push_front((token, work));
                return;
            }
        }
    }
}

impl Disk for RingDisk {
    fn read(&mut self, offset_bytes: u64, blocks: Blocks, token: u64) {
        self.submit(token, Work::Read { offset_bytes, blocks });
    }

    fn write(&mut self, offset_bytes: u64, blocks: Blocks, until: Durable, token: u64) {
        let dsync = self.dsync && until == Durable::AtEnd;
        self.submit(token, Work::Write { offset_bytes, blocks, dsync });
    }

    fn sync(&mut self, token: u64) {
        self.submit(token, Work::Sync);
    }

    fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }
}

/// An open store.
struct Session {
    disk: RingDisk,
    store: ExtentStore,
    shared: Arc<Shared>,
    outcomes: Vec<Outcome>,
    sources: Vec<aoe_xdp::link::Chunk>,
    next_source: usize,
    /// Holds the lock.
    _device: Device,
}

impl Session {
    /// Opens a store as a node does, but with what `terms` say of device and activity log.
    /// `peer_slots` are nobody's.
    fn open(path: &Path, terms: Terms, peer_slots: &Range<u32>) -> anyhow::Result<Session> {
        let device = Device::open(path, 0, DEVICE_BYTES_MIN)?;
        let (mut layout, _, mut images) = opening::inspect(&device)?;
        layout.open_count += 1;
        for offset_bytes in SUPERBLOCK_OFFSETS {
            device.write_durably(offset_bytes, &layout.encode())?;
        }
        for (shard, image) in (0..).zip(&mut images) {
            recovery::place(&layout, shard, &device, image)?;
        }
        device.sync_data()?;
        let free = recovery::free_slots(&layout, images.iter()).context("two shards have one slot")?;
        layout.active_max = terms.active_max.unwrap_or(layout.active_max);
        let layout = Arc::new(layout);
        let shared = Arc::new(Shared::new(layout.slots(), layout.shards));
        let atomic_blocks = terms.copies != Copies::Sole;
        let flushes_batches = device.flushes_whole_cache();
        let mut store = ExtentStore::new();
        for (shard, image) in (0..).zip(images) {
            let (layout, shared) = (Arc::clone(&layout), Arc::clone(&shared));
            let config = ShardConfig { layout, shard, atomic_blocks, flushes_batches, shared };
            store.adopt(Box::new(Shard::new(config, image.recovered)));
        }
        for slot in free {
            device.make_ready(layout.data_offset(slot), EXTENT_BYTES)?;
            if !peer_slots.contains(&slot) {
                shared.add_free(FreeSlot::new(slot));
            }
        }
        shared.set_no_more(true);

        let config = RegionConfig { cores: 1, chunks_per_core: CHUNKS, headers_per_core: 64 };
        let region = Region::new(config)?;
        let mut pool = region.pool(0)?;
        let mut ring = Ring::new(RingConfig { requests_max: REQUESTS_MAX }, &region, None)?;
        let file = ring.register_file(device.file().as_fd())?;
        let mut random = Random::new(7);
        let mut sources = Vec::with_capacity(SOURCES);
        for _ in 0..SOURCES {
            let mut chunk = pool.take_chunk().context("no frame memory is left")?;
            for word in pool.bytes_mut(&mut chunk).chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
            sources.push(chunk);
        }
        let disk = RingDisk { ring, pool, file, dsync: device.needs_dsync(), waiting: VecDeque::new() };
        Ok(Session { disk, store, shared, outcomes: Vec::new(), sources, next_source: 0, _device: device })
    }

    /// A write's payload: handles to chunks that are there.
    fn payload(&mut self, count: u32) -> Blocks {
        let mut blocks = Blocks::with_capacity(count as usize);
        for _ in 0..count {
            blocks.push(self.disk.pool.share(&self.sources[self.next_source]));
            self.next_source = (self.next_source + 1) % SOURCES;
        }
        blocks
    }

    /// Takes in some of what the device has ended; where there is nothing, lets the shards go on and waits for the device, if it
    /// has anything to do. As a reactor does: what ends is followed by new requests before all of it was looked at.
    fn turn(&mut self) -> anyhow::Result<()> {
        if self.take_events() == 0 {
            let now = now_ns();
            if self.store.needs_turn(now) {
                self.store.turn(now, &mut self.disk, &mut self.outcomes);
            }
            if self.outcomes.is_empty() && self.disk.ring.in_flight() > 0 {
                self.disk.ring.submit_and_wait(WAIT).context("io_uring")?;
            } else {
                self.disk.ring.submit().context("io_uring")?;
            }
        }
        while let Some(event) = self.shared.events.pop() {
            if let ShardEvent::Failed { shard, why } = event {
                bail!("shard {shard} failed: {why}");
            }
        }
        Ok(())
    }

    /// Takes in a few ended disk requests; how many.
    fn take_events(&mut self) -> usize {
        let mut taken = 0;
        while taken < EVENTS_AT_ONCE
            && let Some(event) = self.disk.ring.next_event()
        {
            taken += 1;
            let Event::Disk(finished) = event else { continue };
            self.disk.go_on();
            let Finished { token, blocks, result } = finished;
            self.store.finished(token, blocks, result, &mut self.disk, &mut self.outcomes);
        }
        taken
    }

    /// Brings everything to rest and gives up all memory.
    fn close(mut self) -> anyhow::Result<()> {
        self.store.close();
        while !self.store.is_closed() {
            self.turn()?;
        }
        self.store.dissolve(&mut self.disk.pool);
        for chunk in self.sources.drain(..) {
            self.disk.pool.release(chunk);
        }
        Ok(())
    }

    /// Keeps `load.depth()` requests in flight on a volume until it is time, or `next` has no more.
    fn work(
        &mut self,
        load: Load,
        terms: Terms,
        object: Object,
        end_ns: u64,
        mut next: impl FnMut() -> Option<u64>,
    ) -> anyhow::Result<u64> {
        let depth = usize::try_from(load.depth())?;
        let mut busy: Vec<Option<u64>> = vec![None; depth];
        let mut idle: Vec<u32> = (0..load.depth()).collect();
        let mut buffers: Vec<Blocks> = Vec::new();
        let (mut done, mut ended) = (0, false);
        loop {
            while !ended && !idle.is_empty() {
                let first_block = match next() {
                    Some(block) if now_ns() < end_ns => block,
                    _ => {
                        ended = true;
                        break;
                    }
                };
                // Writes of one block are ordered by whoever gives them: here none begins beside another.
                if load.is_write() && busy.contains(&Some(first_block)) {
                    continue;
                }
                let Some(token) = idle.pop() else { break };
                busy[token as usize] = Some(first_block);
                let request = RequestToken(token);
                if load.is_write() {
                    let payload = self.payload(load.blocks());
                    let terms = WriteTerms { copies: terms.copies, ..WriteTerms::default() };
                    let (disk, outcomes) = (&mut self.disk, &mut self.outcomes);
                    self.store.write(request, object, first_block, payload, terms, disk, outcomes);
                } else {
                    let blocks = match buffers.pop() {
                        Some(blocks) => blocks,
                        None => self.buffer(load.blocks())?,
                    };
                    let (disk, outcomes) = (&mut self.disk, &mut self.outcomes);
                    let operation = Operation::Read { first_block, blocks };
                    self.store.start(request, &object, operation, disk, outcomes);
                }
            }
            if ended && idle.len() == depth {
                break;
            }
            self.turn()?;
            let mut outcomes = std::mem::take(&mut self.outcomes);
            for outcome in outcomes.drain(..) {
                outcome.result.context("a request failed")?;
                busy[outcome.request.0 as usize] = None;
                idle.push(outcome.request.0);
                done += 1;
                if load.is_write() {
                    release_blocks(&mut self.disk.pool, outcome.blocks);
                } else {
                    buffers.push(outcome.blocks);
                }
            }
            self.outcomes = outcomes;
        }
        for blocks in buffers {
            release_blocks(&mut self.disk.pool, blocks);
        }
        Ok(done)
    }

    fn buffer(&mut self, count: u32) -> anyhow::Result<Blocks> {
        let mut blocks = Blocks::with_capacity(count as usize);
        for _ in 0..count {
            blocks.push(self.disk.pool.take_chunk().context("no frame memory is left")?);
        }
        Ok(blocks)
    }

    /// Takes everything from a volume.
    fn unmap(&mut self, object: Object) -> anyhow::Result<()> {
        self.store.unmap(object, 0);
        while !self.store.is_idle() {
            self.turn()?;
        }
        Ok(())
    }
}

impl<'p> Prepared<'p> {
    /// Formats a store on a new file, and writes a third of it in full.
    ///
    /// # Errors
    /// A file that cannot be made or written.
    pub(super) fn make(path: &'p Path, size_bytes: u64) -> anyhow::Result<Prepared<'p>> {
        let identity = Identity {
            cluster: ClusterId([1; 16]),
            node: NodeId([1; 16]),
            expected: None,
            fresh: StoreId([1; 16]),
        };
        let mut opened = opening::open(path, size_bytes, identity)?;
        let mut catalog = opened.store.catalog().clone();
        let shards = opened.store.layout().shards;
        for volume in VOLUMES {
            catalog.add(volume, size_bytes / 512, shards)?;
        }
        let objects = VOLUMES.map(|id| {
            catalog.get(id).map_or(Object { shard: 0, number: 0 }, |volume| Object {
                shard: volume.shard,
                number: volume.object,
            })
        });
        opened.store.commit(catalog)?;
        let layout = Arc::clone(opened.store.layout());
        drop(opened);
        // Slots are given out from the lowest on.
        let slots = layout.slots();
        let free = (slots / 3).max(FREE_SLOTS_MIN);
        ensure!(free < slots / 2, "the store is too small");
        let written = (slots - free) / 2;
        let extents = u64::from(written);
        let prepared = Prepared {
            path,
            objects,
            extents,
            written_offset_bytes: layout.data_offset(0),
            peer_slots: written..2 * written,
            peer_offset_bytes: layout.data_offset(written),
        };
        let terms = Terms { copies: Copies::Sole, active_max: None };
        let mut session = Session::open(path, terms, &prepared.peer_slots)?;
        let mut blocks = (0..extents * u64::from(EXTENT_BLOCKS)).step_by(LONG_BLOCKS as usize);
        session.work(Load::LongWrite, terms, objects[0], u64::MAX, || blocks.next())?;
        session.close()?;
        ensure!(extents > u64::from(LONG_DEPTH), "the store is too small");
        Ok(prepared)
    }

    /// Runs a load for some time.
    ///
    /// # Errors
    /// A store that cannot be opened, or a request that failed.
    pub(super) fn measure(&self, placed: Placed, duration_ns: u64) -> anyhow::Result<Done> {
        let Placed { load, terms, extents, seed } = placed;
        let mut session = Session::open(self.path, terms, &self.peer_slots)?;
        let done = if load == Load::FirstWrite {
            self.first_writes(&mut session, terms, duration_ns)?
        } else {
            let blocks = extents * u64::from(EXTENT_BLOCKS);
            let step = u64::from(load.blocks());
            let mut random = Random::new(seed);
            let mut at = 0;
            let mut next = move || {
                if load.is_long() {
                    at = (at + step) % blocks;
                    return Some(at);
                }
                Some(random.below(blocks))
            };
            session.work(load, terms, self.objects[0], now_ns() + WARM_UP_NS, &mut next)?;
            let (start_ns, cpu_ns) = (now_ns(), process_cpu_ns());
            let operations = session.work(load, terms, self.objects[0], start_ns + duration_ns, &mut next)?;
            Done { operations, elapsed_ns: now_ns() - start_ns, cpu_ns: process_cpu_ns() - cpu_ns }
        };
        session.close()?;
        Ok(done)
    }

    /// Writes one block of each free extent, and gives them back, until the writes alone have taken the time.
    fn first_writes(&self, session: &mut Session, terms: Terms, duration_ns: u64) -> anyhow::Result<Done> {
        let mut done = Done::default();
        while done.elapsed_ns < duration_ns {
            let free = session.shared.free.len() as u64;
            let mut extents = (0..free).map(|extent| extent * u64::from(EXTENT_BLOCKS));
            let (start_ns, cpu_ns) = (now_ns(), process_cpu_ns());
            done.operations +=
                session.work(Load::FirstWrite, terms, self.objects[1], u64::MAX, || extents.next())?;
            done.elapsed_ns += now_ns() - start_ns;
            done.cpu_ns += process_cpu_ns() - cpu_ns;
            session.unmap(self.objects[1])?;
        }
        Ok(done)
    }
}
