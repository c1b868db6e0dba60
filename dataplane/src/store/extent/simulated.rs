//! A simulated disk: sparse, in memory, with a write-back cache, that tears and reorders what is not durable; and a store on it,
//! formatted and opened as on a real one. For the simulations of the store and of whole clusters: the program has none of it.
//!
//! Invariants of the model:
//! * A write ended as [`Durable::AtEnd`] is durable; one ended as [`Durable::AtSync`] is after a sync that was begun later.
//! * At a power cut each sector of everything else has landed or not, by the seed; whole blocks on an atomic device.
//! * When a process is killed its requests in flight all land, and what was cached stays so.
//! * Two writes in flight never overlap: a real device would take them in either order, so a store must not send them.

#![allow(clippy::cast_possible_truncation, reason = "numbers of a simulation are small")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use af_xdp::region::Pool;
use cluster_map::{ClusterId, NodeId, StoreId};
use torus_uring::{Blocks, IoError};

use super::extents::{FoldMap, FreeSlot};
use super::format::{Segment, Shape, Superblock};
use super::recovery::{self, Image, Medium, RecoveryError};
use super::shard::{SHARD_MASK, SHARD_SHIFT, Shard, ShardConfig};
use super::shared::Shared;
use crate::store::{BLOCK_BYTES, Disk, Durable, EXTENT_BYTES};

/// Errors of the operating system that are injected.
const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const ENODEV: i32 = 19;
const SECTORS: usize = BLOCK_BYTES / SECTOR;
/// Kinds of request, as `shard::kind` has them in a token.
const KIND_SHIFT: u32 = 44;
const JOURNAL: u64 = 1;
const PLACE: u64 = 3;
const BESIDE: [u64; 2] = [2, 9];
/// Ended writes to a journal after which a batch that was being gathered when the first of them was in flight is proved by a later one,
/// though one of them went around the journal's end.
const WRITES_TO_PROVE: u8 = 4;
/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// A block's content.
pub type Data = Arc<[u8; BLOCK_BYTES]>;

/// Numbers by a seed (splitmix64).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// Those of that seed.
    #[must_use]
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// The next one.
    #[expect(clippy::should_implement_trait, reason = "there is always another one")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below that, or 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// Of any size below so many bits.
    pub fn up_to_bits(&mut self, bits: u64) -> u64 {
        let bits = self.below(bits);
        self.below(1 << bits)
    }

    /// Whether this is the one in so many.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// A position in that many.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }
}

/// What is on the device and in its cache.
#[derive(Debug, Clone, Default)]
pub struct Media {
    durable: FoldMap<u64, Data>,
    /// Ended writes that no sync has covered, in order, by block.
    cached: BTreeMap<u64, Vec<(u64, Data)>>,
    sequence: u64,
    /// A block is written whole or not at all.
    pub atomic: bool,
}

/// How a power cut leaves what was not durable.
#[derive(Debug, Clone, Copy)]
struct Style {
    /// Of 8, how many blocks land.
    land: u64,
    /// Of 8, how many blocks are torn.
    tear: u64,
}

impl Media {
    /// As a format leaves it.
    #[must_use]
    pub fn formatted(layout: &Superblock, atomic: bool) -> Media {
        let mut media = Media { atomic, ..Media::default() };
        for shard in 0..layout.shards {
            let first = layout.checkpoint_offset(shard, 0) / BLOCK_BYTES as u64;
            media.put(first, &recovery::first_checkpoint(layout, shard));
        }
        media
    }

    /// What a read of a block finds; `None` where nothing was ever written.
    #[must_use]
    pub fn visible(&self, block: u64) -> Option<&Data> {
        self.cached
            .get(&block)
            .and_then(|list| list.last())
            .map(|(_, data)| data)
            .or_else(|| self.durable.get(&block))
    }

    fn end_write(&mut self, block: u64, data: Data, until: Durable) {
        self.sequence += 1;
        match until {
            Durable::AtEnd => {
                self.durable.insert(block, data);
                self.cached.remove(&block);
            }
            Durable::AtSync => self.cached.entry(block).or_default().push((self.sequence, data)),
        }
    }

    fn end_sync(&mut self, sequence: u64) {
        let durable = &mut self.durable;
        self.cached.retain(|block, list| {
            let covered = list.iter().take_while(|(at, _)| *at <= sequence).count();
            if let Some((_, data)) = list.drain(..covered).next_back() {
                durable.insert(*block, data);
            }
            !list.is_empty()
        });
    }

    /// Everything is durable now.
    pub fn settle(&mut self) {
        self.end_sync(u64::MAX);
    }

    /// The power fails.
    pub fn cut(&mut self, rng: &mut Rng) {
        let style = Style { land: rng.below(9), tear: if self.atomic { 0 } else { rng.below(5) } };
        for (block, list) in std::mem::take(&mut self.cached) {
            let versions = list.len();
            let torn = rng.below(8) < style.tear;
            if !torn {
                if rng.below(8) < style.land {
                    // The newest, mostly: a cache seldom keeps an older one.
                    let which = if rng.one_in(4) { rng.index(versions) } else { versions - 1 };
                    self.durable.insert(block, Arc::clone(&list[which].1));
                }
                continue;
            }
            let mut content = self.durable.get(&block).map_or([0; BLOCK_BYTES], |data| **data);
            for sector in 0..SECTORS {
                let which = rng.index(versions + 1);
                if let Some((_, data)) = list.get(which) {
                    let bytes = sector * SECTOR..(sector + 1) * SECTOR;
                    content[bytes.clone()].copy_from_slice(&data[bytes]);
                }
            }
            self.durable.insert(block, Arc::new(content));
        }
    }

    /// Changes a block behind everybody's back; whether there was one.
    pub fn rot(&mut self, block: u64, byte: usize) -> bool {
        let Some(data) = self.visible(block) else { return false };
        let mut content = **data;
        content[byte] ^= 0x10;
        self.durable.insert(block, Arc::new(content));
        self.cached.remove(&block);
        true
    }

    /// Puts content somewhere, durably.
    pub fn put(&mut self, block: u64, bytes: &[u8]) {
        for (block, bytes) in (block..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
            self.end_write(block, Arc::new(bytes.try_into().expect("a whole block")), Durable::AtEnd);
        }
    }

    /// Blocks that have something, from a block on, below another one; in order.
    #[must_use]
    pub fn written(&self, range: std::ops::Range<u64>) -> Vec<u64> {
        let mut blocks: Vec<u64> =
            self.durable.keys().chain(self.cached.keys()).copied().filter(|at| range.contains(at)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }
}

/// A disk as recovery sees it.
#[derive(Debug)]
pub struct Still(pub RefCell<Media>);

impl Medium for Still {
    type Error = Infallible;

    fn read_at(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Infallible> {
        let media = self.0.borrow();
        for (block, bytes) in (offset_bytes / BLOCK_BYTES as u64..).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
            match media.visible(block) {
                Some(data) => bytes.copy_from_slice(&data[..]),
                None => bytes.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Infallible> {
        let mut media = self.0.borrow_mut();
        for (block, bytes) in (offset_bytes / BLOCK_BYTES as u64..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
            media.end_write(block, Arc::new(bytes.try_into().expect("a whole block")), Durable::AtSync);
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Infallible> {
        self.0.borrow_mut().settle();
        Ok(())
    }
}

/// How often something goes wrong: once in so many requests of its kind; 0 for never.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// A read fails.
    pub read: u64,
    /// A write fails, and has written a part.
    pub write: u64,
    /// A sync fails, and what it could not write is forgotten.
    pub sync: u64,
    /// There is no room for a write to an extent.
    pub no_space: u64,
    /// A read gives what was there before the last write.
    pub stale: u64,
    /// A write ends well and has written nothing.
    pub lost: u64,
    /// A block changes before it is read.
    pub rot: u64,
    /// The device vanishes, and everything fails from then on.
    pub gone: u64,
}

#[derive(Debug)]
enum Kind {
    Read,
    Write { data: Vec<Data>, until: Durable },
    Sync { sequence: u64 },
}

#[derive(Debug)]
struct Request {
    number: u64,
    token: u64,
    block: u64,
    blocks: Blocks,
    kind: Kind,
}

/// The disk of running shards.
#[derive(Debug)]
pub struct SimDisk {
    /// What is on it.
    pub media: Media,
    /// The frame memory of its core.
    pub pool: Pool,
    requests: Vec<Request>,
    begun: u64,
    /// Grows with each request begun or ended.
    pub events: u64,
    /// What goes wrong.
    pub faults: Faults,
    /// Faults that were injected.
    pub injected: u64,
    is_gone: bool,
    /// Blocks written beside a journal, with its shard, and how many more writes to it prove their batch.
    unproved: FoldMap<u64, (u64, u8)>,
    previous: FoldMap<u64, Option<Data>>,
}

/// A request that has ended: its token, its memory and how.
pub type Ended = (u64, Blocks, Result<(), IoError>);

impl SimDisk {
    /// A disk that works.
    #[must_use]
    pub fn new(media: Media, pool: Pool) -> SimDisk {
        SimDisk {
            media,
            pool,
            requests: Vec::new(),
            begun: 0,
            events: 0,
            faults: Faults::default(),
            injected: 0,
            is_gone: false,
            unproved: FoldMap::default(),
            previous: FoldMap::default(),
        }
    }

    /// Requests that have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.requests.len()
    }

    /// How many requests were begun so far: they are numbered in that order, from 0.
    #[must_use]
    pub fn begun(&self) -> u64 {
        self.begun
    }

    /// Whether it has vanished.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.is_gone
    }

    /// What a crash at this moment leaves, whose pieces are chosen by the seed: of the power, or of the process.
    #[must_use]
    pub fn crash(&self, power: bool, rng: &mut Rng) -> Media {
        let mut media = self.media.clone();
        for request in &self.requests {
            if let Kind::Write { data, until } = &request.kind {
                for (block, data) in (request.block..).zip(data) {
                    let until = if power { Durable::AtSync } else { *until };
                    media.end_write(block, Arc::clone(data), until);
                }
            }
        }
        if power {
            media.cut(rng);
        }
        media
    }

    /// Gives the chunks of all requests back, and the pool and what is on the disk.
    #[must_use]
    pub fn dissolve(mut self) -> (Pool, Media) {
        for request in self.requests {
            crate::store::release_blocks(&mut self.pool, request.blocks);
        }
        (self.pool, self.media)
    }

    fn fails(rate: u64, rng: &mut Rng) -> bool {
        rate > 0 && rng.one_in(rate)
    }

    /// Ends one of the requests.
    pub fn end_any(&mut self, rng: &mut Rng) -> Option<Ended> {
        if self.requests.is_empty() {
            return None;
        }
        let at = rng.index(self.requests.len());
        Some(self.end_at(at, rng))
    }

    /// Ends the request of that number, if it has not ended.
    pub fn end(&mut self, number: u64, rng: &mut Rng) -> Option<Ended> {
        let at = self.requests.iter().position(|request| request.number == number)?;
        Some(self.end_at(at, rng))
    }

    fn end_at(&mut self, at: usize, rng: &mut Rng) -> Ended {
        let mut request = self.requests.swap_remove(at);
        self.events += 1;
        if self.is_gone || Self::fails(self.faults.gone, rng) {
            self.is_gone = true;
            self.injected += 1;
            return (request.token, request.blocks, Err(IoError::Errno(ENODEV)));
        }
        let result = match request.kind {
            Kind::Read => self.end_read(request.block, &mut request.blocks, rng),
            Kind::Write { data, until } => self.end_write(request.token, request.block, &data, until, rng),
            Kind::Sync { sequence } => {
                if Self::fails(self.faults.sync, rng) {
                    self.injected += 1;
                    // What it could not write is forgotten, as by a kernel.
                    self.media.cut(rng);
                    Err(IoError::Errno(EIO))
                } else {
                    self.media.end_sync(sequence);
                    Ok(())
                }
            }
        };
        (request.token, request.blocks, result)
    }

    fn end_read(&mut self, first: u64, blocks: &mut Blocks, rng: &mut Rng) -> Result<(), IoError> {
        if Self::fails(self.faults.read, rng) {
            self.injected += 1;
            return Err(if rng.one_in(2) { IoError::Errno(EIO) } else { IoError::Short { done_bytes: 512 } });
        }
        for (block, index) in (first..).zip(0..blocks.len()) {
            let mut content = self.media.visible(block).map_or([0; BLOCK_BYTES], |data| **data);
            // A write in flight may be seen in part.
            for request in &self.requests {
                if let Kind::Write { data, .. } = &request.kind
                    && let Some(data) = block.checked_sub(request.block).and_then(|at| data.get(at as usize))
                {
                    let mask = rng.next();
                    for sector in (0..SECTORS).filter(|sector| mask >> sector & 1 == 1) {
                        let bytes = sector * SECTOR..(sector + 1) * SECTOR;
                        content[bytes.clone()].copy_from_slice(&data[bytes]);
                    }
                }
            }
            if Self::fails(self.faults.rot, rng)
                && !self.unproved.contains_key(&block)
                && self.media.rot(block, rng.index(BLOCK_BYTES))
            {
                self.injected += 1;
                content = self.media.visible(block).map_or([0; BLOCK_BYTES], |data| **data);
            }
            if Self::fails(self.faults.stale, rng)
                && let Some(older) = self.previous.remove(&block)
            {
                self.injected += 1;
                content = older.map_or([0; BLOCK_BYTES], |data| *data);
            }
            self.pool.bytes_mut(blocks.get_mut(index)).copy_from_slice(&content);
        }
        Ok(())
    }

    fn end_write(
        &mut self,
        token: u64,
        first: u64,
        data: &[Data],
        until: Durable,
        rng: &mut Rng,
    ) -> Result<(), IoError> {
        let no_space = token >> KIND_SHIFT == PLACE && Self::fails(self.faults.no_space, rng);
        let failed = no_space || Self::fails(self.faults.write, rng);
        let short = rng.index(data.len());
        let (kind, shard) = (token >> KIND_SHIFT, token >> SHARD_SHIFT & SHARD_MASK);
        // The last batch of a journal would be lost without a trace: the damage tests have what there is to find.
        let is_of_batch = kind == JOURNAL || BESIDE.contains(&kind);
        let lost = !is_of_batch && Self::fails(self.faults.lost, rng);
        if kind == JOURNAL {
            self.unproved.retain(|_, (of, left)| {
                *left -= u8::from(*of == shard);
                *left > 0
            });
        }
        if BESIDE.contains(&kind) {
            self.unproved.extend((first..).take(data.len()).map(|block| (block, (shard, WRITES_TO_PROVE))));
        }
        self.injected += u64::from(failed) + u64::from(lost);
        for (at, (block, data)) in (first..).zip(data).enumerate() {
            if lost || (failed && (no_space || at >= short)) {
                continue;
            }
            if self.faults.stale > 0 {
                self.previous.insert(block, self.media.visible(block).cloned());
            }
            let until = if failed { Durable::AtSync } else { until };
            self.media.end_write(block, Arc::clone(data), until);
        }
        match failed {
            false => Ok(()),
            true if no_space => Err(IoError::Errno(ENOSPC)),
            true if rng.one_in(2) => Err(IoError::Short { done_bytes: short * BLOCK_BYTES }),
            true => Err(IoError::Errno(EIO)),
        }
    }

    fn begin(&mut self, offset_bytes: u64, blocks: Blocks, kind: Kind, token: u64) {
        assert!(offset_bytes.is_multiple_of(BLOCK_BYTES as u64));
        self.events += 1;
        let (number, block) = (self.begun, offset_bytes / BLOCK_BYTES as u64);
        self.begun += 1;
        self.requests.push(Request { number, token, block, blocks, kind });
    }
}

impl Disk for SimDisk {
    fn read(&mut self, offset_bytes: u64, blocks: Blocks, token: u64) {
        self.begin(offset_bytes, blocks, Kind::Read, token);
    }

    fn write(&mut self, offset_bytes: u64, blocks: Blocks, until: Durable, token: u64) {
        let first = offset_bytes / BLOCK_BYTES as u64;
        let end = first + blocks.len() as u64;
        for other in &self.requests {
            if let Kind::Write { data, .. } = &other.kind {
                let overlap = other.block < end && first < other.block + data.len() as u64;
                assert!(
                    !overlap,
                    "two writes of one block are in flight: {other:?} and one to {first}..{end}"
                );
            }
        }
        let region = Arc::clone(self.pool.region());
        let data = blocks
            .iter()
            .map(|chunk| Arc::new(region.bytes(chunk).try_into().expect("a chunk is a block")))
            .collect();
        self.begin(offset_bytes, blocks, Kind::Write { data, until }, token);
    }

    fn sync(&mut self, token: u64) {
        let sequence = self.media.sequence;
        self.begin(0, Blocks::new(), Kind::Sync { sequence }, token);
    }

    fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }
}

/// What a simulated store looks like: small, so that journals go round, checkpoints come and stores are full.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    /// Shards.
    pub shards: u16,
    /// Extents that it has room for.
    pub slots: u32,
    /// Blocks of each journal.
    pub journal_blocks: u32,
    /// Regions in the activity log of a shard.
    pub active_max: u32,
}

impl Form {
    /// Where everything is on such a store.
    #[must_use]
    pub fn layout(&self, store: StoreId) -> Option<Superblock> {
        let (cluster, node) = (ClusterId([1; 16]), NodeId([2; 16]));
        let mut layout = Superblock::new(cluster, node, store, [7; 16], 64 << 20, Shape::default())?;
        layout.shards = self.shards;
        layout.journal_blocks = self.journal_blocks;
        // Room for one of the largest states and a few small ones.
        layout.state_blocks = 1;
        layout.checkpoint_blocks = 3;
        layout.active_max = self.active_max;
        layout.open_count = 1;
        let pages_offset = layout.checkpoint_offset(self.shards, 0);
        let data_offset = pages_offset + u64::from(self.slots) * 2 * BLOCK_BYTES as u64;
        layout.segments[0] = Segment { pages_offset, data_offset, slots: self.slots };
        layout.device_bytes = data_offset + u64::from(self.slots) * EXTENT_BYTES;
        Some(layout)
    }
}

/// Reads all shards and puts everything in place, as opening a store does.
///
/// # Errors
/// [`RecoveryError`]: the store is damaged.
pub fn read_shards(layout: &Superblock, still: &Still) -> Result<Vec<Image>, RecoveryError<Infallible>> {
    let images = (0..layout.shards).map(|shard| recovery::read(layout, shard, still));
    let mut images: Vec<Image> = images.collect::<Result<_, _>>()?;
    // As raising the open count does.
    let Ok(()) = still.sync();
    for (shard, image) in (0..).zip(&mut images) {
        recovery::place(layout, shard, still, image)?;
    }
    Ok(images)
}

/// The shards of an open store.
pub fn make_shards(
    layout: &Arc<Superblock>,
    shared: &Arc<Shared>,
    images: Vec<Image>,
    atomic_blocks: bool,
    flushes_batches: bool,
) -> impl Iterator<Item = Shard> {
    (0..).zip(images).map(move |(shard, image)| {
        let (layout, shared) = (Arc::clone(layout), Arc::clone(shared));
        Shard::new(ShardConfig { layout, shard, atomic_blocks, flushes_batches, shared }, image.recovered)
    })
}

/// An open store on a simulated disk.
#[derive(Debug)]
pub struct OpenStore {
    /// What its shards share; all slots that no extent has are free in it, and there are no more.
    pub shared: Arc<Shared>,
    /// The shards, by number.
    pub shards: Vec<Shard>,
    /// What is on the disk, all of it durable.
    pub media: Media,
}

/// Opens a store that was formatted, or that a crash has left; its open count is raised.
///
/// # Errors
/// [`RecoveryError`]: the store is damaged.
pub fn open(
    layout: &mut Superblock,
    media: Media,
    flushes_batches: bool,
) -> Result<OpenStore, RecoveryError<Infallible>> {
    let still = Still(RefCell::new(media));
    let images = read_shards(layout, &still)?;
    let mut media = still.0.into_inner();
    media.settle();
    layout.open_count += 1;
    let free = recovery::free_slots(layout, images.iter())
        .ok_or(RecoveryError::Contradiction { shard: 0, what: "a slot has two owners" })?;
    let shared = Arc::new(Shared::new(layout.slots(), layout.shards));
    free.into_iter().for_each(|slot| shared.add_free(FreeSlot::new(slot)));
    shared.set_no_more(true);
    let opened = Arc::new(layout.clone());
    let shards = make_shards(&opened, &shared, images, media.atomic, flushes_batches).collect();
    Ok(OpenStore { shared, shards, media })
}
