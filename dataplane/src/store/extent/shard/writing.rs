//! Writes, unmaps, losses and reservations, until a batch has taken all of them.
//!
//! A write that covers a block in part waits for the block's old content, and becomes a write of whole blocks. What waits for
//! a batch waits in order of arrival; what needs a slot and finds none waits by itself, unless the store is full.

use std::ops::Range;

use torus_replication::mutants::{self, Mutant};
use torus_uring::Blocks;

use super::batch::{Applied, Beside};
use super::reading::locate;
use super::twins::UNITS_FOR_PIECE;
use super::{Copies, Op, Shard, What};
use crate::store::extent::extents::{Extent, ExtentId};
use crate::store::extent::format::{DataAt, EXTENT_BLOCKS, Record, Sum};
use crate::store::{BLOCK_BYTES, Crcs, Disk, Outcome, RequestToken, StoreError, put_into};

/// What is written, beside the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteTerms {
    /// Bytes at the beginning of the first block that are not part of the write.
    pub keep_head_bytes: u16,
    /// Bytes at the end of the last block that are not part of the write.
    pub keep_tail_bytes: u16,
    /// Whether another copy exists.
    pub copies: Copies,
    /// CRC32C of whole blocks, where it is known.
    pub crcs: Crcs,
    /// The head's number for the write, which grows; 0 for the batch's own.
    pub version: u64,
}

/// Extents that an unmap looks at in one go: some ten microseconds.
const UNMAP_STEPS_MAX: u32 = 1024;
/// Extents that it takes in one batch: most of its room is for writes.
const UNMAP_RECORDS_MAX: u32 = 32;

/// Regions that leave the activity log for one that comes: where the log is longer than it should be it becomes shorter.
const EVICTED_MAX: usize = 2;

/// What a change of a block may take: allocation, regions out of the log and another one in, and the block itself.
const RECORDS_NEEDED: usize = 3 + EVICTED_MAX;

/// How far a batch came with a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It has all of it.
    Whole,
    /// It is full: what follows waits too.
    Part,
    /// The request waits for this batch to end, or for what is on its way; what follows need not.
    Later,
    /// The request needs a slot and none is free yet.
    Starved,
    /// It failed, and no batch has anything of it.
    Failed,
}

impl Shard {
    /// Begins to write blocks of a layer. The chunks may have other handles: they are only read.
    #[expect(clippy::too_many_arguments, reason = "a request and what it is about")]
    pub fn write(
        &mut self,
        request: RequestToken,
        object: u32,
        first_block: u64,
        payload: Blocks,
        terms: WriteTerms,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        let WriteTerms { keep_head_bytes, keep_tail_bytes, copies, crcs, version } = terms;
        let count = u32::try_from(payload.len()).expect("at most a long request");
        let what = What::Write { keep_head_bytes, keep_tail_bytes, copies, version };
        let mut op = Op::new(Some(request), what, object, first_block, count);
        op.payload = payload;
        op.crcs = crcs;
        // Until all reads are sent.
        op.reading = 1;
        op.failure = self.failed;
        let at = u32::try_from(self.ops.insert(op)).expect("32 bits");
        if self.failed.is_none() {
            self.read_before_write(at, disk);
        }
        self.ops[at as usize].reading -= 1;
        self.merge_if_read(at, disk, outcomes);
    }

    /// Begins to take from a layer every block from `from_block` on, which nobody uses any more: with the first one the layer ends, and
    /// what was kept of its replica. The end is told as an event.
    pub fn unmap(&mut self, object: u32, from_block: u64) {
        let (copies, version) = (Copies::Sole, 0);
        let what = What::Unmap { from_block, to_block: u64::MAX, next: 0, copies, version };
        let at = u32::try_from(self.ops.insert(Op::new(None, what, object, 0, 0))).expect("32 bits");
        self.ready.push_back(at);
    }

    /// Begins to take blocks from a layer: they read as zeros then. The caller orders it as a write of them.
    ///
    /// An extent of which all blocks go gives its slot back at once where the copy is the only one. Else it stays listed, with the
    /// version and in the activity log, until the stable mark has passed.
    pub fn unmap_range(
        &mut self,
        request: RequestToken,
        object: u32,
        blocks: Range<u64>,
        copies: Copies,
        version: u64,
    ) {
        let (from_block, to_block) = (blocks.start, blocks.end);
        let what = What::Unmap { from_block, to_block, next: 0, copies, version };
        let op = Op::new(Some(request), what, object, blocks.start, 0);
        self.await_batch(op);
    }

    /// Begins to remember of blocks that no good copy is left: they cannot be read, nor merged into, until they are wholly written.
    /// The caller orders it as a write of them.
    pub fn lose(
        &mut self,
        request: RequestToken,
        object: u32,
        blocks: Range<u64>,
        copies: Copies,
        version: u64,
    ) {
        let extents = extents_of(&blocks);
        let count = if blocks.is_empty() { 0 } else { extents.end - extents.start };
        // Numbers of extents end before that many are behind them.
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let what = What::Lose { to_block: blocks.end, copies, version };
        let op = Op::new(Some(request), what, object, blocks.start, count);
        self.await_batch(op);
    }

    /// Begins to give an extent of a layer its slot, before anything is written to it. It is done at once where it has one.
    pub fn reserve(&mut self, request: RequestToken, object: u32, extent: u32) {
        let first_block = u64::from(extent) * u64::from(EXTENT_BLOCKS);
        let op = Op::new(Some(request), What::Reserve, object, first_block, 1);
        self.await_batch(op);
    }

    /// Lets a request without data wait for a batch. After a failure the next turn ends it.
    pub(super) fn await_batch(&mut self, mut op: Op) {
        op.failure = self.failed;
        let at = u32::try_from(self.ops.insert(op)).expect("32 bits");
        self.ready.push_back(at);
    }

    /// Reads the blocks that a write covers only in part.
    fn read_before_write(&mut self, at: u32, disk: &mut impl Disk) {
        let op = &self.ops[at as usize];
        let What::Write { keep_head_bytes, keep_tail_bytes, .. } = op.what else { return };
        let (first, last) = (op.first_block, op.first_block + u64::from(op.count) - 1);
        let head = keep_head_bytes > 0;
        let tail = keep_tail_bytes > 0 && !(head && op.count == 1);
        for (wanted, position, block) in [(head, 0, first), (tail, 1, last)] {
            if !wanted {
                continue;
            }
            match disk.pool().take_chunk() {
                Some(chunk) => self.fetch_old(at, position, block, chunk, disk),
                None => {
                    self.ops[at as usize].failure.get_or_insert(StoreError::NoMemory);
                }
            }
        }
    }

    /// Puts the payload of a partial write into the blocks that were read around it, and lets it wait for a batch.
    pub(super) fn merge_if_read(&mut self, at: u32, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        let op = &mut self.ops[at as usize];
        if op.reading > 0 {
            return;
        }
        if op.failure.is_some() {
            let old = op.joined();
            self.end_op(at, old, disk, outcomes);
            return;
        }
        let What::Write { keep_head_bytes, keep_tail_bytes, .. } = op.what else { return };
        let (mut head, mut tail) = (None, None);
        for (position, mut blocks) in std::mem::take(&mut op.parts).into_iter().flatten() {
            *(if position == 0 { &mut head } else { &mut tail }) = blocks.pop();
        }
        let last = op.payload.len() - 1;
        let (from, to) = (usize::from(keep_head_bytes), BLOCK_BYTES - usize::from(keep_tail_bytes));
        if let Some(old) = head {
            let to = if last == 0 { to } else { BLOCK_BYTES };
            put_into(disk.pool(), &mut op.payload, 0, from..to, old);
        }
        if let Some(old) = tail {
            put_into(disk.pool(), &mut op.payload, last, 0..to, old);
        }
        self.ready.push_back(at);
    }

    /// Gives the batch in the making as much of a request as it has room for.
    pub(super) fn take_into_batch(&mut self, at: u32, data_max: usize, disk: &mut impl Disk) -> Taken {
        match self.ops[at as usize].what {
            What::Write { copies, version, .. } => self.take_write(at, copies, version, data_max, disk),
            What::Unmap { from_block, to_block, next, copies, version } => {
                self.take_unmap(at, from_block..to_block, next, copies, version)
            }
            What::Reserve => self.take_reserve(at),
            What::Persist => self.take_persist(at),
            What::Move => self.take_move(at, data_max, disk),
            What::Lose { to_block, copies, version } => self.take_lose(at, to_block, copies, version),
            What::Read | What::Salvage | What::Digest => unreachable!("reads need no batch"),
        }
    }

    fn take_write(
        &mut self,
        at: u32,
        copies: Copies,
        version: u64,
        data_max: usize,
        disk: &mut impl Disk,
    ) -> Taken {
        let replicated = self.is_replicated(self.ops[at as usize].object, copies);
        loop {
            let op = &self.ops[at as usize];
            if op.queued == op.count {
                return Taken::Whole;
            }
            // What is left of a run that goes on in the next batch is to have room to be redirected.
            if !self.next.has_room_for(RECORDS_NEEDED + 2 * UNITS_FOR_PIECE) {
                return Taken::Part;
            }
            let Some((number, block)) = locate(op.first_block + u64::from(op.queued)) else {
                return self.refuse(at, StoreError::OutOfRange);
            };
            let object = op.object;
            let id = match self.extents.find(object, number) {
                Some(id) => id,
                None => match self.allocate(object, number, None) {
                    Some(id) => id,
                    None if self.shared.is_full() => {
                        return self.refuse(at, StoreError::NoSpace);
                    }
                    None => return Taken::Starved,
                },
            };
            if self.extents.get(id).ending {
                // It was hollow, and is given another slot when that end is durable.
                return Taken::Later;
            }
            if replicated && self.extents.get(id).deactivating {
                // This batch takes its region out of the log: the next one can put it back.
                return Taken::Later;
            }
            if replicated && !self.extents.get(id).active {
                self.activate(id);
            }
            let in_place = replicated && self.atomic_blocks;
            if in_place && !self.extents.get(id).active {
                // Its region must be in the log, durably, before the device sees the data.
                return Taken::Later;
            }
            if in_place && self.twins.awaits_proof(id) {
                return Taken::Later;
            }
            if !in_place && self.next.journaled >= data_max {
                self.redirect(false);
                if self.next.journaled >= data_max {
                    return Taken::Part;
                }
            }
            if self.twins.is_moving(id, std::iter::once(block)) {
                return Taken::Later;
            }
            debug_assert!(!self.batches_have(id, block), "the caller orders writes of one block");
            if in_place && self.pending.contains_key(&(id.0, block)) {
                // Older data are on their way to the same place.
                return Taken::Later;
            }
            self.take_block(at, id, block, version, in_place, disk);
        }
    }

    /// Puts one block of a write into the batch.
    fn take_block(
        &mut self,
        at: u32,
        id: ExtentId,
        block: u16,
        version: u64,
        in_place: bool,
        disk: &mut impl Disk,
    ) {
        let version = if version == 0 { self.next_lsn() } else { version };
        let index = self.ops[at as usize].queued as usize;
        let chunk = disk.pool().share(self.ops[at as usize].payload.get(index));
        let known = self.ops[at as usize].crcs.get(index).copied().flatten();
        let sum = known.map_or_else(|| Sum::of(disk.pool().region().bytes(&chunk)), Sum::of_crc);
        let extent = self.extents.get_mut(id);
        extent.touched = true;
        let (before, half) = (extent.sum(block), extent.half_of(block));
        let slot = extent.half(half).slot;
        let data = if in_place { DataAt::Place } else { DataAt::Journal };
        let record = Record::Set { slot, block, sum, before, version, data };
        let kept = if in_place {
            self.next.beside.push(Beside { extent: id, half, block, chunk });
            None
        } else {
            self.next.count_journaled(id, block);
            Some(chunk)
        };
        self.next.sets += 1;
        self.next.record(record, Applied::Set { op: at, extent: id, half, block, sum, version, chunk: kept });
        self.ops[at as usize].queued += 1;
    }

    /// Ends a request that cannot go on, unless a batch has a part of it: then when that has ended.
    pub(super) fn refuse(&mut self, at: u32, why: StoreError) -> Taken {
        let op = &mut self.ops[at as usize];
        op.failure.get_or_insert(why);
        op.count = op.queued;
        if op.queued == op.committed { Taken::Failed } else { Taken::Whole }
    }

    fn take_lose(&mut self, at: u32, to_block: u64, copies: Copies, version: u64) -> Taken {
        let op = &self.ops[at as usize];
        let (object, blocks) = (op.object, op.first_block..to_block);
        let replicated = self.is_replicated(object, copies);
        loop {
            let op = &self.ops[at as usize];
            if op.queued == op.count {
                return Taken::Whole;
            }
            if !self.next.has_room_for(RECORDS_NEEDED) {
                return Taken::Part;
            }
            let Ok(number) = u32::try_from(extents_of(&blocks).start + u64::from(op.queued)) else {
                return self.refuse(at, StoreError::OutOfRange);
            };
            let id = match self.extents.find(object, number) {
                Some(id) => id,
                None => match self.allocate(object, number, None) {
                    Some(id) => id,
                    None if self.shared.is_full() => return self.refuse(at, StoreError::NoSpace),
                    None => return Taken::Starved,
                },
            };
            let part = part_of_extent(number, &blocks);
            let extent = self.extents.get(id);
            if extent.ending || extent.deactivating || self.is_pending_in(id, &part) {
                return Taken::Later;
            }
            if replicated && !self.extents.get(id).active {
                self.activate(id);
            }
            let version = if version == 0 { self.next_lsn() } else { version };
            let extent = self.extents.get_mut(id);
            extent.touched = true;
            self.clear(at, id, part, Sum::LOST, version, false);
            self.ops[at as usize].queued += 1;
        }
    }

    /// Gives the batch in the making a change of blocks to a state without data.
    fn clear(&mut self, op: u32, id: ExtentId, blocks: Range<u16>, state: Sum, version: u64, hollow: bool) {
        let extent = self.extents.get(id);
        let (half, block) = (extent.home(), blocks.start);
        let (slot, count) = (extent.half(half).slot, blocks.end - blocks.start);
        let record = Record::Clear { slot, block, count, state, version, hollow };
        let applied = Applied::Cleared { op, extent: id, half, block, count, state, version, hollow };
        self.next.record(record, applied);
    }

    /// Whether a change of a layer is one of several copies: see [`Copies`]. Takes in how far all of them are.
    fn is_replicated(&mut self, object: u32, copies: Copies) -> bool {
        match copies {
            Copies::Sole => false,
            Copies::Others { stable_version } => {
                self.set_stable(object, stable_version);
                true
            }
        }
    }

    fn take_reserve(&mut self, at: u32) -> Taken {
        let op = &self.ops[at as usize];
        let object = op.object;
        let Some((number, _)) = locate(op.first_block) else {
            return self.refuse(at, StoreError::OutOfRange);
        };
        if let Some(id) = self.extents.find(object, number) {
            let extent = self.extents.get(id);
            // Its allocation, or its end, is in a batch that has not ended.
            if extent.ending || extent.allocated_lsn() > self.journal.lsn {
                return Taken::Later;
            }
            if !extent.hollow {
                self.ops[at as usize].count = 0;
                return Taken::Whole;
            }
            if !self.next.has_room_for(1) {
                return Taken::Part;
            }
            let slot = extent.slot();
            self.next.record(Record::Keep { slot }, Applied::Kept { op: at, extent: id });
            self.ops[at as usize].queued = 1;
            return Taken::Whole;
        }
        if !self.next.has_room_for(1) {
            return Taken::Part;
        }
        match self.allocate(object, number, Some(at)) {
            Some(_) => {
                self.ops[at as usize].queued = 1;
                Taken::Whole
            }
            None if self.shared.is_full() => self.refuse(at, StoreError::NoSpace),
            None => Taken::Starved,
        }
    }

    /// Takes a slot for an extent, if one is free.
    fn allocate(&mut self, object: u32, number: u32, op: Option<u32>) -> Option<ExtentId> {
        let free = self.shared.free.pop()?;
        let slot = free.slot;
        let id = self.extents.insert(Extent::allocated(object, number, free, self.next_lsn()));
        let record = Record::Allocate { slot, object, extent: number };
        self.next.record(record, Applied::Allocated { extent: id, op });
        Some(id)
    }

    /// Puts a region into the activity log. Where the log is full and no region can leave it, it grows: a write that waited for
    /// room here while the regions here wait for writes elsewhere, and those for room there, would wait for ever. What the log
    /// has beyond its length is bounded by what the heads have in progress, and leaves it as soon as it can.
    fn activate(&mut self, id: ExtentId) {
        if self.extents.get(id).activating {
            return;
        }
        for _ in 0..EVICTED_MAX {
            if self.next.log_is_full || !self.log_is_full() {
                break;
            }
            self.next.log_is_full = !self.evict_region();
        }
        let extent = self.extents.get_mut(id);
        extent.activating = true;
        let slot = extent.slot();
        self.active.push_back(id);
        self.next.record(Record::Activate { slot }, Applied::Activated { extent: id });
    }

    fn log_is_full(&self) -> bool {
        let max = self.layout.active_max as usize;
        // Suspect regions stay until they were verified, and must not push others out for so long.
        self.active.len() >= max
            && self.active.iter().filter(|id| !self.extents.get(**id).suspect).count() >= max
    }

    /// Takes a region out of the activity log that has not been written for a while: its records are durable, no write to it is
    /// under way, and the head has said that every in-sync copy has all of them. Whether there was one.
    fn evict_region(&mut self) -> bool {
        for _ in 0..2 * self.active.len() {
            let Some(id) = self.active.pop_front() else { return false };
            let is_stable = self.is_stable(self.extents.get(id)) || mutants::is(Mutant::LogReleasedLocally);
            let extent = self.extents.get_mut(id);
            // The next one to open the store must know of a suspect region too.
            let kept = extent.activating || extent.suspect || extent.ending;
            let busy = extent.is_written() || !is_stable || kept;
            if std::mem::take(&mut extent.touched) || busy || self.batches_concern(id) {
                self.active.push_back(id);
                continue;
            }
            let extent = self.extents.get_mut(id);
            extent.deactivating = true;
            let slot = extent.slot();
            self.next.record(Record::Deactivate { slot }, Applied::Deactivated { extent: id });
            return true;
        }
        false
    }

    fn take_unmap(
        &mut self,
        at: u32,
        blocks: Range<u64>,
        mut next: u32,
        copies: Copies,
        version: u64,
    ) -> Taken {
        let object = self.ops[at as usize].object;
        let replicated = self.is_replicated(object, copies);
        // It takes what was written before it, and nothing that is written after it. What the batch in flight has may be on its
        // way to its place when that has ended.
        if self.batch_in_flight()
            || self
                .later
                .iter()
                .chain(&self.starved)
                .any(|before| self.ops[*before as usize].object == object)
        {
            return Taken::Later;
        }
        let is_known = blocks.end < u64::MAX;
        let first = u32::try_from(blocks.start / u64::from(EXTENT_BLOCKS)).unwrap_or(u32::MAX);
        let end = u32::try_from(blocks.end.div_ceil(u64::from(EXTENT_BLOCKS))).unwrap_or(u32::MAX);
        let steps = if is_known { end.saturating_sub(first) } else { self.extents.places() };
        let stop = steps.min(next.saturating_add(UNMAP_STEPS_MAX));
        let mut records = 0;
        while next < stop {
            // Extents by their numbers, or all that there are.
            let found = if is_known {
                self.extents.find(object, first + next)
            } else {
                self.extents.at(next).filter(|(_, extent)| extent.object == object).map(|(id, _)| id)
            };
            // An extent that is not here needs no trace of its end. Room for it is made on every in-sync copy before data are sent
            // to any: so none has anything of it, or one had its end passed by the stable mark and all have, or this copy missed what
            // made it elsewhere, and is stale.
            let found = found.filter(|id| !self.extents.get(*id).ended);
            if let Some(id) = found {
                let gone = part_of_extent(self.extents.get(id).number, &blocks);
                // Its entry goes, and what is on its way to its place with it.
                let ends = !replicated && is_whole(&gone);
                let extent = self.extents.get(id);
                // An end that is not durable is not to be acknowledged as one.
                // Nor may a slot go with the batch that says what was written to it beside the journal: who gets the slot then writes there,
                // and the batch would look torn. What every copy does by itself nobody orders behind writes.
                let waits = extent.ending
                    || !is_known && self.next.redirects(id)
                    || !ends && (replicated && extent.deactivating || self.is_pending_in(id, &gone));
                let needed = if replicated { RECORDS_NEEDED } else { 2 };
                let is_full = records >= UNMAP_RECORDS_MAX || !self.next.has_room_for(needed);
                if !gone.is_empty() && (waits || is_full) {
                    break;
                }
                if ends {
                    self.end_extent(id, Some(at));
                    self.count_queued(at);
                } else {
                    // What every copy does by itself, without a head, is no write: numbers of batches mean nothing beside a head's.
                    let version = if is_known { version } else { self.newest_version(id) };
                    self.take_blocks(at, id, gone, replicated, version);
                }
                records += 1;
            }
            next += 1;
        }
        let is_end_of_layer = !is_known && blocks.start == 0;
        let is_done = next >= steps && (!is_end_of_layer || self.take_forget(at));
        let next = if is_done { u32::MAX } else { next };
        let (from_block, to_block) = (blocks.start, blocks.end);
        self.ops[at as usize].what = What::Unmap { from_block, to_block, next, copies, version };
        if is_done { Taken::Whole } else { Taken::Later }
    }

    /// One more part of a request is in the batch in the making than was known to come.
    pub(super) fn count_queued(&mut self, at: u32) {
        let op = &mut self.ops[at as usize];
        op.count += 1;
        op.queued += 1;
    }

    /// Takes blocks of an extent that stays listed: those of a sole copy if any of them has something, those of one of several always,
    /// since another copy may have something, and the change's version must be found.
    fn take_blocks(&mut self, at: u32, id: ExtentId, blocks: Range<u16>, replicated: bool, version: u64) {
        let extent = self.extents.get_mut(id);
        let has_some = extent.sums(blocks.clone()).any(|sum| sum != Sum::ABSENT);
        if blocks.is_empty() || !(has_some || replicated) {
            return;
        }
        if replicated {
            extent.touched = true;
            if !extent.active {
                self.activate(id);
            }
        }
        let version = if version == 0 { self.next_lsn() } else { version };
        let hollow = replicated && is_whole(&blocks);
        self.clear(at, id, blocks, Sum::ABSENT, version, hollow);
        self.count_queued(at);
    }

    /// Whether data of these blocks are on their way to their place, or to another slot: what is written there later must not be
    /// overtaken.
    fn is_pending_in(&self, id: ExtentId, blocks: &Range<u16>) -> bool {
        self.twins.is_moving(id, blocks.clone())
            || !self.pending.is_empty()
                && self.pending.keys().any(|(extent, block)| *extent == id.0 && blocks.contains(block))
    }

    /// Lets requests that waited for a slot try again.
    pub(super) fn feed_starved(&mut self) {
        if self.starved.is_empty() || (self.shared.free.is_empty() && !self.shared.no_more()) {
            return;
        }
        while let Some(at) = self.starved.pop_back() {
            self.ready.push_front(at);
        }
    }

    /// Ends everything that waits for a batch that will not come.
    pub(super) fn fail_waiting(&mut self, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        let Some(failure) = self.failed else { return };
        while let Some(at) = self.starved.pop_front().or_else(|| self.ready.pop_front()) {
            let op = &mut self.ops[at as usize];
            op.failure.get_or_insert(failure);
            op.count = op.queued;
            if op.queued == op.committed {
                self.end_op(at, Blocks::new(), disk, outcomes);
            }
        }
        self.drop_gathered(disk, outcomes);
    }
}

/// The extents that have some of a layer's blocks, by number.
fn extents_of(blocks: &Range<u64>) -> Range<u64> {
    blocks.start / u64::from(EXTENT_BLOCKS)..blocks.end.div_ceil(u64::from(EXTENT_BLOCKS))
}

/// Which blocks of an extent are among those of a layer.
fn part_of_extent(number: u32, blocks: &Range<u64>) -> Range<u16> {
    let begin = u64::from(number) * u64::from(EXTENT_BLOCKS);
    let within = |block: u64| {
        u16::try_from(block.saturating_sub(begin).min(u64::from(EXTENT_BLOCKS))).expect("at most 1024")
    };
    within(blocks.start)..within(blocks.end)
}

/// Whether these are all blocks of an extent.
fn is_whole(blocks: &Range<u16>) -> bool {
    blocks.start == 0 && u32::from(blocks.end) == EXTENT_BLOCKS
}

const _: () = assert!(EXTENT_BLOCKS <= u16::MAX as u32);
