//! One shard of an extent store: a state machine without I/O, owned by one core.
//!
//! A shard has the volumes that were given to it, a journal, two checkpoints, and whatever extent slots it took from the
//! store's common ones. Its parts:
//!
//! * this file – what a shard consists of, and how ended disk requests find their way.
//! * `reading` – reads, with their checksums verified; and the old blocks of partial writes.
//! * `digesting` – what copies of blocks are, for comparison.
//! * `inventory` – which extents there are.
//! * `writing` – writes and unmaps, up to the batch that makes them durable.
//! * `releasing` – extents that were wholly taken away, until every copy knows.
//! * `twins` – long runs of sole copies beside the journal, and extents that have two slots for that.
//! * `states` – what replicas of layers must not forget.
//! * `batch` – group commit: one batch in flight, and what becomes true when it has ended.
//! * `placing` – data from the journal to their place, and the syncs that make that durable.
//! * `checkpoint` – what lets the journal's tail move.
//! * `scrub` – reading everything in the background.
//!
//! Invariants (I3, I7, I10):
//! * A write ends well when its batch and every earlier one are durable: one batch is in flight at a time.
//! * Data go in place before their batch is durable only where the device writes a block whole or not at all, another copy
//!   exists, and the region is durably in the activity log; or where nothing is that counts, in the slot in which the block does not
//!   lie. Everywhere else they go into the journal first.
//! * At most one write to a block's place is in flight; the newest data win.
//! * The journal's tail moves when a checkpoint that has all its records, and the data of all its batches, are durable.
//! * A block is read with the checksum of its newest durable record, or from memory; a mismatch is never data.
//! * An extent that was wholly taken from one of several copies ends when the head's stable mark has passed its version, not before.
//! * After a failed journal write or sync nothing more is acknowledged: what is on the device is unknown. Reads go on.

mod batch;
mod checkpoint;
mod digesting;
mod inventory;
mod placing;
mod reading;
mod releasing;
mod scrub;
mod states;
mod twins;
mod writing;

use std::collections::VecDeque;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use af_xdp::region::{Chunk, Pool};
use slab::Slab;
use torus_uring::{BLOCKS_LONG_MAX, BLOCKS_MAX, Blocks, IoError};

use super::extents::{Extent, ExtentId, Extents, FoldMap};
use super::format::{BatchHeader, JournalName, Record, ReplicaState, ShardName, Superblock};
use super::shared::{ShardEvent, Shared};
use crate::store::{Crcs, Disk, Outcome, RequestToken, StoreError, release_blocks};

pub use self::digesting::{BlockDigest, block_hash};
pub use self::scrub::{ScrubProgress, ScrubTask};
pub use self::writing::WriteTerms;

/// Blocks that wait for their place at most; more writes wait, so that a slow device does not take all memory.
const PENDING_MAX: usize = 4096;
/// Chunks that a shard keeps: one for a batch's header, one for a checkpoint, one for a block that makes room for others. Writes that
/// wait may hold all others, and without these nothing would ever end and free them. They are taken in a shard's first turn.
pub const RESERVE_CHUNKS: usize = 3;
/// How soon a shard looks again for what others give back.
const LOOK_AGAIN_NS: u64 = 1_000_000;
/// Long lists of chunks that are kept from the start; more are made when they are needed, and kept too.
const SPARE_LISTS: usize = 8;
/// Kinds of disk request, in the upper bits of a token.
mod kind {
    pub(super) const READ: u64 = 0;
    pub(super) const JOURNAL: u64 = 1;
    pub(super) const PLACE: u64 = 3;
    pub(super) const SYNC: u64 = 4;
    pub(super) const PAGE: u64 = 5;
    pub(super) const TABLE: u64 = 6;
    pub(super) const SCRUB: u64 = 7;
    pub(super) const FLUSH: u64 = 8;
    pub(super) const DIGEST: u64 = 10;
    /// Of a batch with an odd number, and with an even one: of those in flight and in the making.
    pub(super) const BESIDE: [u64; 2] = [2, 9];
}
const KIND_SHIFT: u32 = 44;
/// Where a token has its shard.
pub(super) const SHARD_SHIFT: u32 = 36;
/// What a token has of a shard.
pub(super) const SHARD_MASK: u64 = 0xff;
/// Where one that is about an extent's slot has which of them.
const HALF_SHIFT: u32 = 32;
const INDEX_MASK: u64 = 0xffff_ffff;

/// Whether a disk request with this token was a read for a request: its end needs no turn, unless a write waited for it.
pub(super) fn ends_read(token: u64) -> bool {
    token >> KIND_SHIFT == kind::READ
}

/// Whether another in-sync copy of what is changed exists. Where one does, who comes to lead the copies must find what may differ: the
/// region of the change stays in the activity log, and an extent that is wholly taken away stays listed, until the head's stable mark
/// has passed the change's version. A sole copy has nobody to differ from, and is told no mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Copies {
    /// None: the block's old content must survive a torn write of it.
    #[default]
    Sole,
    /// Another store has it too.
    Others {
        /// Every write of the volume with a version up to this is on all in-sync copies.
        stable_version: u64,
    },
}

/// A layer of a volume, on a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Object {
    /// The shard that has it.
    pub shard: u16,
    /// Its number in the catalog.
    pub number: u32,
}

/// What a shard is made for.
#[derive(Debug, Clone)]
pub struct ShardConfig {
    /// Where everything is.
    pub layout: Arc<Superblock>,
    /// Its number.
    pub shard: u16,
    /// The device writes 4 KiB whole or not at all, through power cuts.
    pub atomic_blocks: bool,
    /// A write that must be durable at its end flushes all of the device's cache, so that one flush after several costs less.
    pub flushes_batches: bool,
    /// What it shares with others.
    pub shared: Arc<Shared>,
}

/// A request in progress.
#[derive(Debug)]
struct Op {
    /// `None`: the shard's own.
    request: Option<RequestToken>,
    what: What,
    object: u32,
    first_block: u64,
    /// Blocks asked for.
    count: u32,
    /// A write's payload; shared with the caller before it is merged.
    payload: Blocks,
    /// What is known of its whole blocks.
    crcs: Crcs,
    /// What is to be kept of a replica, until a batch has it.
    state: Option<Arc<ReplicaState>>,
    /// Ended parts, with the position of their first block.
    parts: [Option<(u32, Blocks)>; PARTS_INLINE],
    /// The same, beyond those.
    more_parts: Vec<(u32, Blocks)>,
    /// Disk reads that have not ended.
    reading: u32,
    /// Blocks that a batch has taken.
    queued: u32,
    /// Blocks whose batch has ended.
    committed: u32,
    failure: Option<StoreError>,
}

/// Parts of a request that need no allocation: an AoE request has at most three blocks.
const PARTS_INLINE: usize = 3;

impl Op {
    /// A request of which nothing has been done.
    fn new(request: Option<RequestToken>, what: What, object: u32, first_block: u64, count: u32) -> Op {
        Op {
            request,
            what,
            object,
            first_block,
            count,
            payload: Blocks::new(),
            crcs: Crcs::default(),
            state: None,
            parts: [const { None }; PARTS_INLINE],
            more_parts: Vec::new(),
            reading: 0,
            queued: 0,
            committed: 0,
            failure: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Read,
    /// A read of suspect blocks, as they are.
    Salvage,
    Digest,
    Write {
        keep_head_bytes: u16,
        keep_tail_bytes: u16,
        copies: Copies,
        version: u64,
    },
    /// The extent of its one block is to have a slot.
    Reserve,
    /// Its state is to be kept.
    Persist,
    /// Its blocks go to the other one of their extent's two slots.
    Move,
    /// Up to this block no good copy is left. What is counted are the extents that have some of them.
    Lose {
        to_block: u64,
        copies: Copies,
        version: u64,
    },
    /// The blocks to go, and how many extents have been looked at: of those of the range by number where it ends, else of all in the
    /// table; `u32::MAX` when it has all.
    Unmap {
        from_block: u64,
        to_block: u64,
        next: u32,
        copies: Copies,
        version: u64,
    },
}

/// A disk read for a request.
#[derive(Debug, Clone, Copy)]
struct ReadPart {
    op: u32,
    /// Of its first block in the request.
    position: u32,
    extent: ExtentId,
    /// Of which of its slots.
    half: u8,
    /// In the extent.
    first_block: u16,
}

/// A block whose newest data are durable in the journal and not known to be in place.
#[derive(Debug)]
struct Pending {
    chunk: Chunk,
    /// The batch that has it.
    lsn: u64,
    /// The batch whose data are being written in place; 0 when none is.
    placing_lsn: u64,
}

/// A batch that is durable.
#[derive(Debug, Clone, Copy)]
struct Committed {
    lsn: u64,
    /// Blocks of it that are neither in place nor overtaken.
    unplaced: u32,
}

/// Where the journal stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JournalState {
    /// Where the next batch begins, blocks.
    pub head: u32,
    /// The oldest block that is needed.
    pub tail: u32,
    /// The last durable batch.
    pub lsn: u64,
    /// Its checksum.
    pub chain: u32,
    /// Up to here data are in place and durable.
    pub placed_lsn: u64,
}

/// One shard at work.
#[derive(Debug)]
pub struct Shard {
    layout: Arc<Superblock>,
    shared: Arc<Shared>,
    name: ShardName,
    journal_name: JournalName,
    atomic_blocks: bool,
    flushes_batches: bool,
    extents: Extents,
    journal: JournalState,
    ops: Slab<Op>,
    reads: Slab<ReadPart>,
    /// Writes and other changes that wait for a batch.
    ready: VecDeque<u32>,
    /// Those that the batch in the making leaves to a later one; empty between two calls.
    later: VecDeque<u32>,
    /// Those that wait for a free slot.
    starved: VecDeque<u32>,
    /// In flight, when one is.
    batch: batch::Batch,
    /// In the making.
    next: batch::Batch,
    committed: VecDeque<Committed>,
    pending: FoldMap<(u32, u16), Pending>,
    /// Blocks that have just become pending, to be sent to their place.
    unsent: Vec<(ExtentId, u16)>,
    placements: Slab<placing::Placement>,
    sync: placing::SyncState,
    checkpoint: checkpoint::CheckpointState,
    scrub: scrub::ScrubState,
    digests: digesting::DigestState,
    twins: twins::TwinState,
    /// Regions of the activity log, the longest there first.
    active: VecDeque<ExtentId>,
    /// Some of those have ended with the batch that is being applied.
    active_ended: bool,
    stable_versions: FoldMap<u32, u64>,
    releases: releasing::ReleaseState,
    states: states::StateRoom,
    events: VecDeque<ShardEvent>,
    /// Empty long lists of chunks, for the next long disk requests.
    spare: Vec<Blocks>,
    failed: Option<StoreError>,
    /// Disk requests that have not ended.
    in_flight: u32,
    /// The last batch that had records.
    last_record_lsn: u64,
    /// Up to here the journal says that data are in place and durable.
    marked_placed_lsn: u64,
    /// When the last batch ended.
    committed_ns: u64,
    now_ns: u64,
    /// Finish what is durable, settle, and rest.
    closing: bool,
    open_count: u64,
    /// A batch that marks the beginning of this open, or what follows a rest, has ended.
    begun: bool,
    /// The last batch says that the store rests.
    rested: bool,
    /// Chunks for what frees others: see [`RESERVE_CHUNKS`].
    reserve: Vec<Chunk>,
}

/// What a shard is after it was opened: see [`super::recovery`].
#[derive(Debug)]
pub struct Recovered {
    /// Its extents.
    pub extents: Extents,
    /// Its journal.
    pub journal: JournalState,
    /// The last batch that has records; 0 when there is none behind the checkpoint.
    pub last_record_lsn: u64,
    /// Up to here the journal says that data are in place and durable.
    pub marked_placed_lsn: u64,
    /// The newest checkpoint's number.
    pub checkpoint_sequence: u64,
    /// Which of the two it is.
    pub checkpoint_which: usize,
    /// Where the scrub stands.
    pub scrub: ScrubProgress,
}

impl Shard {
    /// A shard that goes on from what was recovered.
    #[must_use]
    pub fn new(config: ShardConfig, recovered: Recovered) -> Shard {
        let Recovered { extents, journal, .. } = recovered;
        let active = extents.iter().filter(|(_, extent)| extent.active).map(|(id, _)| id).collect();
        let dirty = extents.iter().filter(|(_, extent)| extent.dirty).map(|(id, _)| id).collect();
        let hollow = extents.iter().filter(|(_, extent)| extent.hollow).map(|(id, _)| id);
        let releases = releasing::ReleaseState::new(hollow, config.layout.slots());
        let state_units = extents.states().map(|state| state.units()).sum();
        config.shared.counters.allocated.fetch_add(extents.slots(), std::sync::atomic::Ordering::Relaxed);
        let twins: Vec<ExtentId> =
            extents.iter().filter(|(_, extent)| extent.is_twin()).map(|(id, _)| id).collect();
        twins.iter().for_each(|_| config.shared.begin_giving_back());
        Shard {
            name: ShardName { store: config.layout.store, shard: config.shard },
            journal_name: JournalName { key: config.layout.journal_key, shard: config.shard },
            open_count: config.layout.open_count,
            atomic_blocks: config.atomic_blocks,
            ops: Slab::with_capacity(1024),
            reads: Slab::with_capacity(1024),
            ready: VecDeque::with_capacity(1024),
            later: VecDeque::with_capacity(1024),
            starved: VecDeque::with_capacity(1024),
            batch: batch::Batch::new(),
            next: batch::Batch::new(),
            flushes_batches: config.flushes_batches,
            committed: VecDeque::with_capacity(PENDING_MAX),
            pending: FoldMap::with_capacity_and_hasher(2 * PENDING_MAX, BuildHasherDefault::default()),
            unsent: Vec::with_capacity(PENDING_MAX),
            placements: Slab::with_capacity(PENDING_MAX),
            sync: placing::SyncState::new(journal.placed_lsn.max(journal.lsn)),
            checkpoint: checkpoint::CheckpointState::new(
                recovered.checkpoint_sequence,
                recovered.checkpoint_which,
                dirty,
                &config.layout,
            ),
            scrub: scrub::ScrubState::new(recovered.scrub),
            digests: digesting::DigestState::default(),
            twins: twins::TwinState::new(twins.into_iter()),
            active,
            active_ended: false,
            stable_versions: FoldMap::default(),
            releases,
            states: states::StateRoom::new(config.layout.state_units_max(), state_units),
            events: VecDeque::with_capacity(64),
            spare: (0..SPARE_LISTS).map(|_| Blocks::with_capacity(BLOCKS_LONG_MAX)).collect(),
            failed: None,
            in_flight: 0,
            last_record_lsn: recovered.last_record_lsn,
            marked_placed_lsn: recovered.marked_placed_lsn,
            committed_ns: 0,
            now_ns: 0,
            closing: false,
            begun: false,
            rested: false,
            reserve: Vec::with_capacity(RESERVE_CHUNKS),
            layout: config.layout,
            shared: config.shared,
            extents,
            journal,
        }
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.name.shard
    }

    /// Begins to rest: what is asked of it is finished, everything is put in place, and [`Shard::is_closed`] says when.
    pub fn close(&mut self) {
        self.closing = true;
        self.scrub.stop();
    }

    /// Whether nothing is left to do, and the next one to open the shard finds everything in place.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.is_idle() && !self.has_gathered() && (self.failed.is_some() || self.is_settled())
    }

    /// Whether writes wait for a batch.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether no request and no disk request is in progress.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.ops.is_empty()
    }

    /// Gives up all memory of frames. Only when no disk request is in flight: those hold chunks too.
    ///
    /// # Panics
    /// If one is.
    pub fn dissolve(mut self, pool: &mut Pool) {
        assert_eq!(self.in_flight, 0, "a shard ends after its last disk request");
        self.release_memory(pool);
    }

    /// Gives up all memory of frames, whatever is in flight: for a simulated crash.
    pub fn abandon(mut self, pool: &mut Pool) {
        self.release_memory(pool);
    }

    fn release_memory(&mut self, pool: &mut Pool) {
        for (_, pending) in self.pending.drain() {
            pool.release(pending.chunk);
        }
        for mut op in self.ops.drain() {
            release_blocks(pool, std::mem::take(&mut op.payload));
            for (_, blocks) in op.parts.iter_mut().filter_map(Option::take).chain(op.more_parts.drain(..)) {
                release_blocks(pool, blocks);
            }
        }
        self.batch.release_memory(pool);
        self.next.release_memory(pool);
        for chunk in self.reserve.drain(..) {
            pool.release(chunk);
        }
    }

    fn fill_reserve(&mut self, pool: &mut Pool) {
        while self.reserve.len() < RESERVE_CHUNKS {
            match pool.take_chunk() {
                Some(chunk) => self.reserve.push(chunk),
                None => break,
            }
        }
    }

    /// A chunk for what frees others. Of those who ask each has one at most at a time, or takes from the pool.
    fn take_reserved(&mut self, pool: &mut Pool) -> Option<Chunk> {
        pool.take_chunk().or_else(|| self.reserve.pop())
    }

    /// Goes on after a disk request has ended.
    pub fn finished(
        &mut self,
        token: u64,
        blocks: Blocks,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.in_flight -= 1;
        let index = (token & INDEX_MASK) as usize;
        let half = || {
            let id = ExtentId(u32::try_from(index).expect("32 bits"));
            (id, u8::from(token >> HALF_SHIFT & 1 == 1))
        };
        match token >> KIND_SHIFT {
            kind::READ => self.read_ended(index, blocks, result, disk, outcomes),
            kind::JOURNAL => {
                self.recycle(blocks, disk.pool());
                self.fill_reserve(disk.pool());
                self.batch_part_ended(result, disk, outcomes);
            }
            kind if kind::BESIDE.contains(&kind) => {
                self.recycle(blocks, disk.pool());
                self.beside_ended(half(), kind == kind::BESIDE[1], result, disk, outcomes);
            }
            kind::FLUSH => self.flush_ended(result, disk, outcomes),
            kind::PLACE => {
                self.recycle(blocks, disk.pool());
                self.placement_ended(index, result, disk);
            }
            kind::SYNC => self.sync_ended(result, disk, outcomes),
            kind::PAGE => {
                release_blocks(disk.pool(), blocks);
                self.fill_reserve(disk.pool());
                self.page_ended(half(), result, disk, outcomes);
            }
            kind::TABLE => {
                self.recycle(blocks, disk.pool());
                self.fill_reserve(disk.pool());
                self.table_part_ended(result, disk, outcomes);
            }
            kind::SCRUB => self.scrub_ended(blocks, result, disk),
            kind::DIGEST => self.digest_read_ended(blocks, result, disk, outcomes),
            _ => unreachable!("a token of this shard"),
        }
    }

    /// Ends a batch of calls: sends what has gathered. Called when requests were started or disk requests have ended, and once
    /// in a while.
    pub fn turn(&mut self, now_ns: u64, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        self.now_ns = now_ns;
        self.fill_reserve(disk.pool());
        if self.failed.is_some() {
            self.fail_waiting(disk, outcomes);
        } else if self.shared.has_failed() {
            self.fail_with_others(disk, outcomes);
        } else {
            self.feed_starved();
            self.send_placements(disk);
            // Between two batches: with writes waiting there is always one in flight after this.
            self.begin_checkpoint_if_due();
            self.advance_moves(disk);
            self.advance_batch(disk, outcomes);
            self.begin_sync(disk);
            self.advance_checkpoint(disk);
            self.advance_scrub(disk);
        }
        if self.digests.waits() {
            self.advance_digests(disk, outcomes);
        }
        while let Some(event) = self.events.pop_front() {
            if let Err(event) = self.shared.events.push(event) {
                self.events.push_front(event);
                break;
            }
        }
    }

    /// When the shard wants a turn, if nothing gives it one before; nanoseconds of the clock of [`Shard::turn`].
    #[must_use]
    pub fn wants_turn_at_ns(&self) -> Option<u64> {
        let tells = (!self.events.is_empty()).then_some(self.now_ns + LOOK_AGAIN_NS);
        if self.failed.is_some() {
            // Nothing but reading goes on by itself any more: a time that was due before would be due for ever.
            return tells.into_iter().chain(self.digests_at_ns()).min();
        }
        // What waits for a slot or for memory looks again soon: others give them back.
        let gathers = !self.ready.is_empty() || self.has_gathered();
        let goes_on = gathers
            || self.releases_are_due()
            || self.twins_are_due()
            || !self.unsent.is_empty()
            || self.checkpoint.is_in_progress();
        let stands = self.in_flight == 0 && goes_on;
        let waits = stands || !self.starved.is_empty();
        let again = waits.then_some(self.now_ns + LOOK_AGAIN_NS);
        self.settle_at_ns()
            .into_iter()
            .chain(self.scrub.due_ns())
            .chain(again)
            .chain(tells)
            .chain(self.digests_at_ns())
            .chain(self.twins_at_ns())
            .min()
    }

    /// The head says that every write of a layer with a version up to this is on all in-sync copies: regions may leave the activity log
    /// and hollow extents end, up to it. Whether the next turn has something to do for that.
    pub fn set_stable(&mut self, object: u32, version: u64) -> bool {
        let stable = self.stable_versions.entry(object).or_default();
        if version <= *stable {
            return false;
        }
        *stable = version;
        self.releases.look_again()
    }

    /// Whether every copy has all writes of an extent.
    fn is_stable(&self, extent: &Extent) -> bool {
        self.stable_versions.get(&extent.object).is_some_and(|stable| extent.version <= *stable)
    }

    /// Whether a batch is to look for hollow extents that can end. What rests changes nothing by itself.
    fn releases_are_due(&self) -> bool {
        self.releases.is_due() && !self.closing
    }

    fn token(&mut self, kind: u64, index: usize) -> u64 {
        self.in_flight += 1;
        kind << KIND_SHIFT | u64::from(self.name.shard) << SHARD_SHIFT | index as u64
    }

    /// The token of a request that is about one of an extent's slots.
    fn half_token(&mut self, kind: u64, id: ExtentId, half: u8) -> u64 {
        self.token(kind, id.0 as usize) | u64::from(half) << HALF_SHIFT
    }

    /// An empty list for so many chunks.
    fn list_for(&mut self, count: usize) -> Blocks {
        if count <= BLOCKS_MAX {
            return Blocks::new();
        }
        self.spare.pop().unwrap_or_else(|| Blocks::with_capacity(BLOCKS_LONG_MAX))
    }

    /// Gives the chunks of a list back, and keeps a long list.
    fn recycle(&mut self, mut blocks: Blocks, pool: &mut Pool) {
        while let Some(chunk) = blocks.pop() {
            pool.release(chunk);
        }
        if blocks.is_on_heap() {
            self.spare.push(blocks);
        }
    }

    /// Nothing is acknowledged any more.
    fn fail(&mut self, why: &'static str, error: IoError, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        self.take_no_more(why, error);
        self.fail_waiting(disk, outcomes);
    }

    /// Notes that nothing is acknowledged any more; what waits ends at the next turn.
    fn take_no_more(&mut self, why: &'static str, error: IoError) {
        self.shared.set_failed();
        if self.failed.is_none() {
            self.failed = Some(StoreError::Unwritable(error));
            self.events.push_back(ShardEvent::Failed { shard: self.name.shard, why });
        }
    }

    /// Another shard's write or sync has failed, and this one's may have without anybody being told.
    fn fail_with_others(&mut self, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        let error = IoError::Errno(rustix::io::Errno::IO.raw_os_error());
        self.fail("another shard of the store failed", error, disk, outcomes);
    }

    /// Ends a request.
    fn end_op(&mut self, at: u32, blocks: Blocks, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        let op = self.ops.remove(at as usize);
        release_blocks(disk.pool(), op.payload);
        let result = op.failure.map_or(Ok(()), Err);
        if op.what == What::Move {
            self.move_ended(op.failure);
        }
        match (op.request, op.what) {
            (Some(request), _) => outcomes.push(Outcome { request, blocks, result }),
            (None, What::Unmap { from_block, .. }) if result.is_ok() => {
                self.events.push_back(ShardEvent::Unmapped { object: op.object, from_block });
                release_blocks(disk.pool(), blocks);
            }
            (None, _) => release_blocks(disk.pool(), blocks),
        }
    }

    /// Whether a region of the activity log waits for its verification.
    fn has_suspects(&self) -> bool {
        self.active.iter().any(|id| self.extents.get(*id).suspect)
    }

    /// The header of the next batch.
    fn next_header(&self, records: &[Record], data_blocks: usize) -> BatchHeader {
        BatchHeader {
            open_count: self.open_count,
            lsn: self.journal.lsn + 1,
            durable_lsn: self.journal.lsn,
            placed_lsn: self.journal.placed_lsn,
            chain: self.journal.chain,
            position: self.journal.head,
            data_blocks: u16::try_from(data_blocks).expect("at most a batch's"),
            records: u16::try_from(records.len()).expect("at most a batch's"),
            rest: self.closing && records.is_empty() && self.is_idle() && !self.has_suspects(),
        }
    }
}
