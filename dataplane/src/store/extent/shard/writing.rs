//! Writes and unmaps, until a batch has taken all of them.
//!
//! A write that covers a block in part waits for the block's old content, and becomes a write of whole blocks. What waits for
//! a batch waits in order of arrival; what needs a slot and finds none waits by itself, unless the store is full.

use torus_uring::Blocks;

use super::batch::Applied;
use super::reading::locate;
use super::{Copies, Op, Shard, What, kind};
use crate::store::extent::extents::{Extent, ExtentId};
use crate::store::extent::format::{BATCH_BLOCKS_MAX, EXTENT_BLOCKS, RECORDS_MAX, Record, Sum};
use crate::store::{BLOCK_BYTES, Disk, Durable, Outcome, RequestToken, StoreError, put_into};

/// What is written, beside the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteTerms {
    /// Bytes at the beginning of the first block that are not part of the write.
    pub keep_head_bytes: u16,
    /// Bytes at the end of the last block that are not part of the write.
    pub keep_tail_bytes: u16,
    /// Whether another copy exists.
    pub copies: Copies,
    /// The head's number for the write, which grows; 0 for the batch's own.
    pub version: u64,
}

/// How far a batch came with a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It has all of it.
    Whole,
    /// It is full, or memory is short, or the request waits for the batch to end: what follows waits too.
    Part,
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
        let WriteTerms { keep_head_bytes, keep_tail_bytes, copies, version } = terms;
        let count = u32::try_from(payload.len()).expect("at most a long request");
        let what = What::Write { keep_head_bytes, keep_tail_bytes, copies, version };
        let mut op = Op::new(Some(request), what, object, first_block, count);
        op.payload = payload;
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

    /// Begins to take from a layer every extent from `from_extent` on. The end is told as an event.
    pub fn unmap(&mut self, object: u32, from_extent: u32) {
        let op = Op::new(None, What::Unmap { from_extent, place: 0 }, object, 0, 0);
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
            What::Unmap { from_extent, place } => self.take_unmap(at, from_extent, place),
            What::Read => unreachable!("reads need no batch"),
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
        // Allocation, a region out of the log and another one in, and the block itself.
        const RECORDS_NEEDED: usize = 4;
        if let Copies::Others { stable_version } = copies {
            self.set_stable(self.ops[at as usize].object, stable_version);
        }
        loop {
            let op = &self.ops[at as usize];
            if op.queued == op.count {
                return Taken::Whole;
            }
            if self.batch.records.len() + RECORDS_NEEDED > RECORDS_MAX || self.batch.sets >= BATCH_BLOCKS_MAX
            {
                return Taken::Part;
            }
            let Some((number, block)) = locate(op.first_block + u64::from(op.queued)) else {
                return self.refuse(at, StoreError::OutOfRange);
            };
            let object = op.object;
            let id = match self.extents.find(object, number) {
                Some(id) => id,
                None => match self.allocate(object, number) {
                    Some(id) => id,
                    None if self.shared.no_more() && self.shared.free.is_empty() => {
                        return self.refuse(at, StoreError::NoSpace);
                    }
                    None => return Taken::Starved,
                },
            };
            let replicated = matches!(copies, Copies::Others { .. });
            if replicated && self.extents.get(id).deactivating {
                // This batch takes its region out of the log: the next one can put it back.
                return Taken::Part;
            }
            if replicated && !self.extents.get(id).active && !self.activate(id) {
                return Taken::Part;
            }
            let in_place = replicated && self.atomic_blocks;
            if in_place && !self.extents.get(id).active {
                // Its region must be in the log, durably, before the device sees the data.
                return Taken::Part;
            }
            if !in_place && self.batch.data.len() >= data_max {
                return Taken::Part;
            }
            debug_assert!(!self.batch_has(id, block), "the caller orders writes of one block");
            if in_place && self.pending.contains_key(&(id.0, block)) {
                // Older data are on their way to the same place.
                return Taken::Part;
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
        let version = if version == 0 { self.journal.lsn + 1 } else { version };
        let index = self.ops[at as usize].queued as usize;
        let chunk = disk.pool().share(self.ops[at as usize].payload.get(index));
        let sum = Sum::of(disk.pool().region().bytes(&chunk));
        let extent = self.extents.get_mut(id);
        extent.touched = true;
        let before = extent.sums[usize::from(block)];
        let slot = extent.slot;
        self.batch.records.push(Record::Set { slot, block, sum, before, version, in_journal: !in_place });
        let kept = if in_place {
            extent.writes_in_flight += 1;
            let offset_bytes = self.block_offset(id, block);
            let token = self.token(kind::BESIDE, id.0 as usize);
            disk.write(offset_bytes, Blocks::from_iter([chunk]), Durable::AtEnd, token);
            self.batch.parts_in_flight += 1;
            None
        } else {
            self.batch.data.push(disk.pool().share(&chunk));
            Some(chunk)
        };
        self.batch.sets += 1;
        self.batch.applied.push(Applied::Set { op: at, extent: id, block, sum, version, chunk: kept });
        self.ops[at as usize].queued += 1;
    }

    /// Ends a request that cannot go on, unless a batch has a part of it: then when that has ended.
    fn refuse(&mut self, at: u32, why: StoreError) -> Taken {
        let op = &mut self.ops[at as usize];
        op.failure.get_or_insert(why);
        op.count = op.queued;
        if op.queued == op.committed { Taken::Failed } else { Taken::Whole }
    }

    /// Takes a slot for an extent, if one is free.
    fn allocate(&mut self, object: u32, number: u32) -> Option<ExtentId> {
        let free = self.shared.free.pop()?;
        let slot = free.slot;
        let id = self.extents.insert(Extent::allocated(object, number, free, self.journal.lsn + 1));
        self.batch.records.push(Record::Allocate { slot, object, extent: number });
        self.batch.applied.push(Applied::Allocated { extent: id });
        Some(id)
    }

    /// Puts a region into the activity log; whether there is room, now or when this batch has ended.
    fn activate(&mut self, id: ExtentId) -> bool {
        if self.extents.get(id).activating {
            return true;
        }
        // Suspect regions stay until they were verified, and must not keep others out for so long.
        let counted = self.active.iter().filter(|id| !self.extents.get(**id).suspect).count();
        if counted >= self.layout.active_max as usize && !self.evict_region() {
            return false;
        }
        let extent = self.extents.get_mut(id);
        extent.activating = true;
        let slot = extent.slot;
        self.active.push_back(id);
        self.batch.records.push(Record::Activate { slot });
        self.batch.applied.push(Applied::Activated { extent: id });
        true
    }

    /// Takes a region out of the activity log that has not been written for a while: its records are durable, no write to it is
    /// under way, and the head has said that every in-sync copy has all of them. Whether there was one.
    fn evict_region(&mut self) -> bool {
        for _ in 0..2 * self.active.len() {
            let Some(id) = self.active.pop_front() else { return false };
            let (object, version) = (self.extents.get(id).object, self.extents.get(id).version);
            let is_stable = self.stable_versions.get(&object).is_some_and(|stable| version <= *stable);
            let in_batch = self.batch.concerns(id);
            let extent = self.extents.get_mut(id);
            // The next one to open the store must know of a suspect region too.
            let kept = extent.activating || extent.suspect;
            let busy = extent.writes_in_flight > 0 || in_batch || !is_stable || kept;
            if std::mem::take(&mut extent.touched) || busy {
                self.active.push_back(id);
                continue;
            }
            extent.deactivating = true;
            let slot = extent.slot;
            self.batch.records.push(Record::Deactivate { slot });
            self.batch.applied.push(Applied::Deactivated { extent: id });
            return true;
        }
        false
    }

    pub(super) fn batch_has(&self, id: ExtentId, block: u16) -> bool {
        // A batch is short, and only requests of one block can meet here.
        self.batch.applied.iter().rev().any(|applied| {
            matches!(applied, Applied::Set { extent, block: other, .. } if *extent == id && *other == block)
        })
    }

    fn take_unmap(&mut self, at: u32, from_extent: u32, mut place: u32) -> Taken {
        let object = self.ops[at as usize].object;
        while place < self.extents.places() {
            if self.batch.records.len() >= RECORDS_MAX {
                self.ops[at as usize].what = What::Unmap { from_extent, place };
                return Taken::Part;
            }
            let gone = self.extents.at(place).filter(|(_, extent)| {
                let here = extent.object == object && extent.number >= from_extent;
                here && !extent.ending && !extent.ended
            });
            if let Some((id, extent)) = gone {
                let slot = extent.slot;
                self.extents.get_mut(id).ending = true;
                self.batch.records.push(Record::Free { slot });
                self.batch.applied.push(Applied::Freed { op: at, extent: id });
                let op = &mut self.ops[at as usize];
                op.count += 1;
                op.queued += 1;
            }
            place += 1;
        }
        self.ops[at as usize].what = What::Unmap { from_extent, place: u32::MAX };
        Taken::Whole
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
    }
}

const _: () = assert!(EXTENT_BLOCKS <= u16::MAX as u32);
