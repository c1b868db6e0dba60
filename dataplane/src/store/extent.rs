//! The extent store: thin, checksummed, crash-proof.
//!
//! * [`mod@format`] – what is on the device, and its codec.
//! * [`extents`] – where a shard's extents lie and what is known of their blocks.
//! * [`shard`] – reads, writes, journal, placement, checkpoints and scrub of one shard, without I/O.
//! * [`recovery`] – opening a shard.
//! * [`shared`] – what cores and the manager share.
//! * [`catalog`] – which volumes there are; [`opening`] – all of it on a real device; [`fresh`] – an empty one without any.
//! * `simulated` – a disk and a store on it for simulations, which the program does not have.
//! * this file – the shards of one core, behind [`super::Store`].
//!
//! A volume belongs to one shard, so that its requests meet in one journal, and a shard to one core. Extent slots are common
//! to all shards: a store is full when its last slot is taken, wherever its volumes are.

pub mod catalog;
pub mod extents;
pub mod format;
pub mod fresh;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
#[cfg(test)]
pub(crate) mod on_file;
pub mod opening;
pub mod recovery;
pub mod shard;
pub mod shared;
#[cfg(test)]
mod sim;
#[cfg(any(test, feature = "simulation"))]
pub mod simulated;

use std::ops::Range;
use std::sync::Arc;

use af_xdp::region::Pool;
use torus_uring::{Blocks, IoError};

use self::extents::HeldExtent;
use self::format::ReplicaState;
use self::shard::{BlockDigest, Copies, Object, SHARD_MASK, SHARD_SHIFT, ScrubTask, Shard, WriteTerms};
use super::{Disk, Operation, Outcome, RequestToken, Store};

/// One core's part of an extent store.
#[derive(Debug, Default)]
pub struct ExtentStore {
    /// By number; those of other cores are not here.
    shards: Vec<Option<Box<Shard>>>,
    /// Shards that were given something since their last turn, a bit for each.
    touched: u64,
    /// When each shard's next turn is due without that; `u64::MAX` for never.
    dues_ns: Vec<u64>,
    /// The first of them.
    due_ns: u64,
}

const _: () = assert!(format::SHARDS_MAX as u32 <= u64::BITS);

impl ExtentStore {
    /// Without shards yet.
    #[must_use]
    pub fn new() -> ExtentStore {
        ExtentStore { due_ns: u64::MAX, ..ExtentStore::default() }
    }

    /// Takes a shard in.
    ///
    /// # Panics
    /// If it has one of that number.
    pub fn adopt(&mut self, shard: Box<Shard>) {
        let at = usize::from(shard.number());
        if self.shards.len() <= at {
            self.shards.resize_with(at + 1, || None);
            self.dues_ns.resize(at + 1, u64::MAX);
        }
        assert!(self.shards[at].is_none(), "a shard is adopted once");
        self.shards[at] = Some(shard);
        self.touched |= 1 << at;
    }

    /// Whether a shard is here.
    #[must_use]
    pub fn has(&self, shard: u16) -> bool {
        self.shards.get(usize::from(shard)).is_some_and(Option::is_some)
    }

    /// The shard of a layer.
    fn of(&self, object: Object) -> &Shard {
        let shard = self.shards.get(usize::from(object.shard)).and_then(Option::as_ref);
        shard.expect("a request goes to its shard's core")
    }

    /// A shard that needs no turn for what it is given.
    fn untouched(&mut self, number: u16) -> &mut Shard {
        self.shards
            .get_mut(usize::from(number))
            .and_then(Option::as_mut)
            .expect("a request goes to its shard's core")
    }

    fn shard(&mut self, number: u16) -> &mut Shard {
        self.touched |= 1 << number;
        self.untouched(number)
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Box<Shard>> {
        self.touched = u64::MAX;
        self.shards.iter_mut().flatten()
    }

    /// Begins to write, as [`Store::start`] does, on terms that the caller names.
    #[expect(clippy::too_many_arguments, reason = "a request and what it is about")]
    pub fn write(
        &mut self,
        request: RequestToken,
        object: Object,
        first_block: u64,
        blocks: Blocks,
        terms: WriteTerms,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.shard(object.shard).write(request, object.number, first_block, blocks, terms, disk, outcomes);
    }

    /// Begins to give an extent of a layer its slot, durably, before anything is written to it; the outcome has no blocks.
    pub fn reserve(&mut self, request: RequestToken, object: Object, extent: u32) {
        self.shard(object.shard).reserve(request, object.number, extent);
    }

    /// Begins to say what blocks of a layer are, at most an extent's. When the outcome, which has no blocks, is good
    /// [`ExtentStore::take_digests`] has it. The caller orders it as a read.
    pub fn digest(
        &mut self,
        request: RequestToken,
        object: Object,
        blocks: Range<u64>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.shard(object.shard).digest(request, object.number, blocks, disk, outcomes);
    }

    /// What the blocks of a request are, once it has ended well.
    pub fn take_digests(&mut self, request: RequestToken, object: Object) -> Option<Vec<BlockDigest>> {
        self.untouched(object.shard).take_digests(request)
    }

    /// Begins to read blocks as they are, suspect ones too, whose every copy is: one of them is to be made the block. What fails
    /// its checksum elsewhere is an error all the same.
    pub fn salvage(
        &mut self,
        request: RequestToken,
        object: Object,
        first_block: u64,
        blocks: Blocks,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.untouched(object.shard).salvage(request, object.number, first_block, blocks, disk, outcomes);
    }

    /// Begins to remember, durably, of blocks that no good copy is left; the outcome has no blocks. The caller orders it as a write.
    pub fn lose(
        &mut self,
        request: RequestToken,
        object: Object,
        blocks: Range<u64>,
        copies: Copies,
        version: u64,
    ) {
        self.shard(object.shard).lose(request, object.number, blocks, copies, version);
    }

    /// Begins to take blocks from a layer: they read as zeros then; the outcome has no blocks. Extents that go as a whole are listed
    /// until the stable mark has passed `version`, unless the copy is the only one. The caller orders it as a write.
    pub fn unmap_range(
        &mut self,
        request: RequestToken,
        object: Object,
        blocks: Range<u64>,
        copies: Copies,
        version: u64,
    ) {
        let blocks = blocks.start.min(BLOCKS_END)..blocks.end.min(BLOCKS_END);
        self.shard(object.shard).unmap_range(request, object.number, blocks, copies, version);
    }

    /// Begins to keep what a replica of a layer must not forget, instead of what was kept before; the outcome, which has no blocks, is
    /// good when it is durable. A crash leaves it or what was there before; of several those that were asked for later count.
    pub fn persist(&mut self, request: RequestToken, object: Object, state: Arc<ReplicaState>) {
        self.shard(object.shard).persist(request, object.number, state);
    }

    /// What is durably kept of a layer's replica: what was asked for last and has become durable, before the store was opened or
    /// since.
    #[must_use]
    pub fn state(&self, object: Object) -> Option<&Arc<ReplicaState>> {
        self.of(object).state(object.number)
    }

    /// The head says that every write of a layer with a version up to this is on all in-sync copies.
    pub fn set_stable(&mut self, object: Object, version: u64) {
        if self.untouched(object.shard).set_stable(object.number, version) {
            self.touched |= 1 << object.shard;
        }
    }

    /// Begins to take from a layer every block from `from_block` on; the shard tells when it has.
    pub fn unmap(&mut self, object: Object, from_block: u64) {
        self.shard(object.shard).unmap(object.number, from_block);
    }

    /// Appends the extents of a layer from number `from_extent` on, at most `max` of them, in order. Whether there are no more.
    #[must_use]
    pub fn list(&self, object: Object, from_extent: u32, max: usize, held: &mut Vec<HeldExtent>) -> bool {
        self.of(object).list(object.number, from_extent, max, held)
    }

    /// Appends the extents of a layer that are in the activity log, in no order. Gives the highest version written to the
    /// layer, 0 for none; with a state of its replica that never goes back, whatever happens to its extents.
    #[must_use]
    pub fn survey(&self, object: Object, active: &mut Vec<HeldExtent>) -> u64 {
        self.of(object).survey(object.number, active)
    }

    /// Says which scrub is wanted.
    pub fn set_scrub(&mut self, task: Option<ScrubTask>) {
        for shard in self.all() {
            shard.set_scrub(task);
        }
    }

    /// Begins to bring everything to rest.
    pub fn close(&mut self) {
        for shard in self.all() {
            shard.close();
        }
    }

    /// Whether everything is at rest.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shards.iter().flatten().all(|shard| shard.is_closed())
    }

    /// Whether no disk request is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.shards.iter().flatten().all(|shard| shard.is_idle())
    }

    /// Whether a turn would do something.
    #[must_use]
    pub fn needs_turn(&self, now_ns: u64) -> bool {
        self.touched != 0 || now_ns >= self.due_ns
    }

    /// When a turn is due, if nothing else gives one before; nanoseconds of the clock of [`Store::turn`], `u64::MAX` for never.
    #[must_use]
    pub fn due_ns(&self) -> u64 {
        if self.touched != 0 { 0 } else { self.due_ns }
    }

    /// Gives up all memory of frames.
    ///
    /// # Panics
    /// If a disk request is in flight.
    pub fn dissolve(self, pool: &mut Pool) {
        for shard in self.shards.into_iter().flatten() {
            shard.dissolve(pool);
        }
    }
}

/// Behind the last block that a layer can have.
const BLOCKS_END: u64 = 1 << 42;

/// The shard that gave the disk a request with this token.
#[must_use]
pub fn shard_of(token: u64) -> u16 {
    u16::try_from(token >> SHARD_SHIFT & SHARD_MASK).expect("eight bits")
}

impl Store for ExtentStore {
    type Volume = Object;

    fn start(
        &mut self,
        request: RequestToken,
        volume: &Object,
        operation: Operation,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        match operation {
            Operation::Read { first_block, blocks } => {
                let shard = self.untouched(volume.shard);
                shard.read(request, volume.number, first_block, blocks, disk, outcomes);
            }
            Operation::Write { first_block, blocks, keep_head_bytes, keep_tail_bytes, crcs } => {
                let terms = WriteTerms { keep_head_bytes, keep_tail_bytes, crcs, ..WriteTerms::default() };
                self.write(request, *volume, first_block, blocks, terms, disk, outcomes);
            }
            Operation::Unmap { first_block, count } => {
                let blocks = first_block..first_block.saturating_add(count).min(BLOCKS_END);
                self.unmap_range(request, *volume, blocks, Copies::Sole, 0);
            }
            // Whatever was acknowledged is durable.
            Operation::Flush => outcomes.push(Outcome { request, blocks: Blocks::new(), result: Ok(()) }),
        }
    }

    fn finished(
        &mut self,
        token: u64,
        blocks: Blocks,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        let number = shard_of(token);
        let shard = self.untouched(number);
        shard.finished(token, blocks, result, disk, outcomes);
        if !shard::ends_read(token) || shard.has_ready() {
            self.touched |= 1 << number;
        }
    }

    fn turn(&mut self, now_ns: u64, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        let touched = std::mem::take(&mut self.touched);
        let mut due_ns = u64::MAX;
        for (at, (shard, own_due_ns)) in self.shards.iter_mut().zip(&mut self.dues_ns).enumerate() {
            let Some(shard) = shard else { continue };
            if touched >> at & 1 == 1 || now_ns >= *own_due_ns {
                shard.turn(now_ns, disk, outcomes);
                *own_due_ns = shard.wants_turn_at_ns().unwrap_or(u64::MAX);
            }
            due_ns = due_ns.min(*own_due_ns);
        }
        self.due_ns = due_ns;
    }
}
