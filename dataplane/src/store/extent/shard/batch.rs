//! Group commit: everything that waits becomes one batch, one device write behind the last batch, and nothing of it counts
//! before all of it is durable.
//!
//! One batch is in flight at a time, so the one after it proves that it was durable, and an acknowledged batch can be told from
//! a torn one when the store is opened again. What comes meanwhile makes the next batch: the busier the device, the larger. Its data
//! that go to their place at once do so meanwhile.

use std::cmp::Reverse;

use af_xdp::region::{Chunk, Pool};
use torus_replication::mutants::{self, Mutant};
use torus_uring::{BLOCKS_LONG_MAX, Blocks, IoError};

use super::writing::Taken;
use super::{Committed, PENDING_MAX, Pending, Shard, What, kind};
use crate::store::extent::extents::{ExtentId, FreeSlot, Half};
use crate::store::extent::format::{
    BATCH_BLOCKS_MAX, BLOCK, DataAt, EXTENT_BLOCKS, JOURNAL_BLOCKS_MIN, LayerState, Packing, RECORDS_MAX,
    Record, Sum, encode_batch,
};
use crate::store::extent::shared::Counters;
use crate::store::{Disk, Durable, Outcome};

const _: () = assert!(JOURNAL_BLOCKS_MIN as usize / 4 >= BATCH_BLOCKS_MAX);

/// What becomes true when the batch has ended.
#[derive(Debug)]
pub(super) enum Applied {
    Set {
        op: u32,
        extent: ExtentId,
        /// Which of its slots.
        half: u8,
        block: u16,
        sum: Sum,
        version: u64,
        /// The data, where they go into the journal and wait for their place then.
        chunk: Option<Chunk>,
    },
    Allocated {
        extent: ExtentId,
        /// The reservation that asked for it, if one did.
        op: Option<u32>,
    },
    Activated {
        extent: ExtentId,
    },
    Deactivated {
        extent: ExtentId,
    },
    Freed {
        /// The unmap that asked for it, if one did.
        op: Option<u32>,
        extent: ExtentId,
    },
    /// One of the extent's two slots.
    Vacated {
        extent: ExtentId,
        half: u8,
    },
    Cleared {
        op: u32,
        extent: ExtentId,
        half: u8,
        block: u16,
        count: u16,
        state: Sum,
        version: u64,
        hollow: bool,
    },
    Kept {
        op: u32,
        extent: ExtentId,
    },
    Persisted {
        op: u32,
        state: LayerState,
    },
    Forgotten {
        op: u32,
        object: u32,
    },
}

/// A block that goes to its place beside the journal.
#[derive(Debug)]
pub(super) struct Beside {
    pub(super) extent: ExtentId,
    pub(super) half: u8,
    pub(super) block: u16,
    pub(super) chunk: Chunk,
}

/// A batch in the making or in flight.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) records: Vec<Record>,
    packing: Packing,
    /// Units that records will take which are about to be changed.
    reserved_units: usize,
    /// What each of the records means.
    pub(super) applied: Vec<Applied>,
    /// Data blocks that go to their place at once, and have not been sent.
    pub(super) beside: Vec<Beside>,
    /// Blocks written, in the journal or in place.
    pub(super) sets: usize,
    /// No region can leave the activity log before the batch has ended.
    pub(super) log_is_full: bool,
    /// Data blocks that are, or would be, in the journal with it.
    pub(super) journaled: usize,
    /// How many of those follow the block before them.
    pub(super) neighbours: usize,
    /// Device writes that have not ended.
    parts_in_flight: u32,
    /// Its parts are durable after a sync, which has not ended.
    unsynced: bool,
    /// Data of the batches up to this one were in place when that sync was begun.
    synced_placed_lsn: u64,
    in_flight: bool,
    failure: Option<IoError>,
    chain: u32,
    placed_lsn: u64,
    rest: bool,
}

impl Batch {
    pub(super) fn new() -> Batch {
        Batch {
            records: Vec::with_capacity(4 * RECORDS_MAX),
            packing: Packing::default(),
            applied: Vec::with_capacity(4 * RECORDS_MAX),
            reserved_units: 0,
            beside: Vec::with_capacity(4 * RECORDS_MAX),
            sets: 0,
            log_is_full: false,
            journaled: 0,
            neighbours: 0,
            parts_in_flight: 0,
            unsynced: false,
            synced_placed_lsn: 0,
            in_flight: false,
            failure: None,
            chain: 0,
            placed_lsn: 0,
            rest: false,
        }
    }

    pub(super) fn record(&mut self, record: Record, applied: Applied) {
        self.packing.add(&record);
        self.records.push(record);
        self.applied.push(applied);
    }

    /// Data of a block are to go into the journal.
    pub(super) fn count_journaled(&mut self, id: ExtentId, block: u16) {
        let follows = |applied: &Applied| {
            matches!(applied, Applied::Set { extent, block: before, chunk: Some(_), .. }
                if *extent == id && before + 1 == block)
        };
        self.neighbours += usize::from(self.applied.last().is_some_and(follows));
        self.journaled += 1;
    }

    /// Puts a record before all others. [`Batch::repack`] follows.
    pub(super) fn record_first(&mut self, record: Record, applied: Applied) {
        self.records.insert(0, record);
        self.applied.insert(0, applied);
    }

    /// Whether so many more records have room, whatever they are.
    pub(super) fn has_room_for(&self, records: usize) -> bool {
        self.packing.units() + self.reserved_units + records <= RECORDS_MAX
    }

    /// Keeps room for what is about to be changed.
    pub(super) fn reserve_units(&mut self, units: usize) {
        self.reserved_units += units;
    }

    /// Looks at all records anew, after some were changed.
    pub(super) fn repack(&mut self) {
        (self.packing, self.reserved_units, self.neighbours) = (Packing::default(), 0, 0);
        let mut before = None;
        for (record, applied) in self.records.iter().zip(&self.applied) {
            self.packing.add(record);
            let place = match applied {
                Applied::Set { extent, block, chunk: Some(_), .. } => Some((*extent, *block)),
                _ => None,
            };
            let follows =
                before.is_some_and(|(extent, block): (ExtentId, u16)| place == Some((extent, block + 1)));
            self.neighbours += usize::from(follows);
            before = place;
        }
        assert!(self.packing.units() <= RECORDS_MAX, "what is redirected leaves room");
    }

    /// Extents that data were redirected in.
    fn redirected(&self) -> impl Iterator<Item = ExtentId> {
        self.records.iter().zip(&self.applied).filter_map(|(record, applied)| match (record, applied) {
            (Record::Set { data: DataAt::FreshPlace, .. }, Applied::Set { extent, .. }) => Some(*extent),
            _ => None,
        })
    }

    /// Whether data were redirected in an extent.
    pub(super) fn redirects(&self, id: ExtentId) -> bool {
        self.redirected().any(|extent| extent == id)
    }

    /// Whether a slot is given to an extent.
    pub(super) fn gives(&self, id: ExtentId) -> bool {
        self.applied
            .iter()
            .any(|applied| matches!(applied, Applied::Allocated { extent, .. } if *extent == id))
    }

    /// The versions of what it has of an extent.
    fn versions_of(&self, id: ExtentId) -> impl Iterator<Item = u64> {
        self.applied.iter().filter_map(move |applied| match applied {
            Applied::Set { extent, version, .. } | Applied::Cleared { extent, version, .. }
                if *extent == id =>
            {
                Some(*version)
            }
            // It is no change of any block.
            Applied::Kept { extent, .. } if *extent == id => Some(0),
            _ => None,
        })
    }

    /// Whether a change of that extent is in it, other than of its region.
    fn concerns(&self, id: ExtentId) -> bool {
        self.versions_of(id).next().is_some()
    }

    /// What the last state of a layer in it takes, units of a record; 0 where its end is in it.
    pub(super) fn state_units(&self, of: u32) -> Option<usize> {
        self.applied.iter().rev().find_map(|applied| match applied {
            Applied::Persisted { state, .. } if state.object == of => Some(state.units()),
            Applied::Forgotten { object, .. } if *object == of => Some(0),
            _ => None,
        })
    }

    fn has(&self, id: ExtentId, block: u16) -> bool {
        // A batch is short, and only requests of one block can meet here.
        self.applied.iter().rev().any(|applied| {
            matches!(applied, Applied::Set { extent, block: other, .. } if *extent == id && *other == block)
        })
    }

    /// Whether something becomes of that block.
    fn touches(&self, id: ExtentId, place: u16) -> bool {
        self.applied.iter().any(|applied| match *applied {
            Applied::Set { extent, block, .. } => (extent, block) == (id, place),
            Applied::Cleared { extent, block, count, .. } => {
                extent == id && (block..block + count).contains(&place)
            }
            _ => false,
        })
    }

    /// Empties it; its lists keep their room.
    fn clear(&mut self) {
        assert!(self.beside.is_empty() && self.applied.is_empty());
        self.records.clear();
        self.packing = Packing::default();
        self.sets = 0;
        (self.journaled, self.neighbours) = (0, 0);
        self.unsynced = false;
        self.in_flight = false;
        self.failure = None;
    }

    pub(super) fn release_memory(&mut self, pool: &mut Pool) {
        let kept = self.applied.drain(..).filter_map(|applied| match applied {
            Applied::Set { chunk, .. } => chunk,
            _ => None,
        });
        let beside = self.beside.drain(..).map(|beside| beside.chunk);
        for chunk in kept.chain(beside) {
            pool.release(chunk);
        }
    }
}

impl Shard {
    /// Whether a batch is on its way.
    pub(super) fn batch_in_flight(&self) -> bool {
        self.batch.in_flight
    }

    /// Whether something waits for the batch in flight to end.
    pub(super) fn has_gathered(&self) -> bool {
        !self.next.records.is_empty()
    }

    /// The number of the batch in the making.
    pub(super) fn next_lsn(&self) -> u64 {
        self.journal.lsn + 1 + u64::from(self.batch.in_flight)
    }

    /// Whether a change of that extent's blocks has no durable record yet.
    pub(super) fn batches_concern(&self, id: ExtentId) -> bool {
        self.batch.concerns(id) || self.next.concerns(id)
    }

    /// The highest version of an extent, of changes too that have no durable record yet.
    pub(super) fn newest_version(&self, id: ExtentId) -> u64 {
        let batched = self.batch.versions_of(id).chain(self.next.versions_of(id));
        batched.fold(self.extents.get(id).version, u64::max)
    }

    /// Whether a write of that block has no durable record yet.
    pub(super) fn batches_have(&self, id: ExtentId, block: u16) -> bool {
        self.batch.has(id, block) || self.next.has(id, block)
    }

    /// Whether a change of that block has no durable record yet.
    pub(super) fn batches_touch(&self, id: ExtentId, block: u16) -> bool {
        self.batch.touches(id, block) || self.next.touches(id, block)
    }

    /// Blocks of the journal that the next batch may take. One stays free, so that full and empty differ.
    fn journal_room(&self) -> u32 {
        let blocks = self.layout.journal_blocks;
        let used = (self.journal.head + blocks - self.journal.tail) % blocks;
        blocks - 1 - used
    }

    /// Blocks of the journal that are needed.
    pub(super) fn journal_used(&self) -> u32 {
        self.layout.journal_blocks - 1 - self.journal_room()
    }

    /// Gathers what waits for the next batch, and sends that one if none is in flight.
    pub(super) fn advance_batch(&mut self, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        self.begun |= mutants::is(Mutant::BegunWithoutMark);
        if !self.begun && !self.batch.in_flight {
            if self.ready.is_empty() && !self.releases_are_due() && !self.twins_are_due() {
                return;
            }
            // A batch that was torn when the store crashed may lie at the head, whole but for some of its data. Blocks of a
            // new one behind a header that never lands could complete it: so its header is overwritten alone, first. What opening
            // overwrites is the header of one whose data are not whole.
            self.begin_mark(disk);
        }
        if !self.begun {
            // Nor may what the last one named be written before.
            return;
        }
        self.gather(disk, outcomes);
        if self.batch.in_flight {
            return;
        }
        if !self.has_gathered() {
            if self.twins.wants_mark() {
                self.begin_mark(disk);
            }
            return;
        }
        if let Some(header) = self.take_reserved(disk.pool()) {
            self.redirect(true);
            self.send_beside(disk);
            std::mem::swap(&mut self.batch, &mut self.next);
            self.send_batch(header, disk);
        }
    }

    /// Gives the next batch of what waits as much as it has room for. Data that go to their place at once are sent without
    /// waiting for the batch in flight: only their records have to.
    fn gather(&mut self, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        let room = self.journal_room() as usize;
        let waiting = self.pending.len() + self.batch.journaled;
        // The header and at least one block.
        let is_wanted = !self.ready.is_empty() || self.releases_are_due() || self.twins_are_due();
        if !is_wanted || room < 2 || waiting >= PENDING_MAX {
            return;
        }
        self.next.log_is_full = false;
        // Where a checkpoint was lost, the next older one is found out by a later batch in the journal: with three batches or
        // more in it one is whole, even while another is being written over the oldest one.
        let longest = BATCH_BLOCKS_MAX.min(self.layout.journal_blocks as usize / 4);
        let data_max = (room - 1).min(longest).min(PENDING_MAX - waiting);
        while let Some(&at) = self.ready.front() {
            match self.take_into_batch(at, data_max, disk) {
                Taken::Whole => {
                    self.ready.pop_front();
                    self.end_if_committed(at, disk, outcomes);
                }
                Taken::Part => break,
                Taken::Later => {
                    self.ready.pop_front();
                    self.later.push_back(at);
                }
                Taken::Starved => {
                    self.ready.pop_front();
                    self.starved.push_back(at);
                }
                Taken::Failed => {
                    self.ready.pop_front();
                    self.end_op(at, Blocks::new(), disk, outcomes);
                }
            }
        }
        while let Some(at) = self.later.pop_back() {
            self.ready.push_front(at);
        }
        if self.releases_are_due() {
            self.release_hollow();
        }
        if self.twins_are_due() {
            self.free_vacant();
        }
        self.redirect(false);
        self.send_beside(disk);
    }

    /// Sends the data that go to their place at once: neighbours together, whichever requests they are of.
    fn send_beside(&mut self, disk: &mut impl Disk) {
        let until = if self.flushes_batches { Durable::AtSync } else { Durable::AtEnd };
        let kind = kind::BESIDE[usize::from(self.next_lsn().is_multiple_of(2))];
        let mut beside = std::mem::take(&mut self.next.beside);
        // From the last one to the first, so that they are taken from the end.
        beside.sort_unstable_by_key(|beside| Reverse((beside.extent, beside.half, beside.block)));
        while let Some(&Beside { extent: id, half, block: first_block, .. }) = beside.last() {
            let is_next =
                |(next, other): &(u16, &Beside)| (other.extent, other.half, other.block) == (id, half, *next);
            let longest = beside.len().min(BLOCKS_LONG_MAX);
            let run = (first_block..).zip(beside.iter().rev().take(longest)).take_while(is_next).count();
            let mut blocks = self.list_for(run);
            for beside in beside.drain(beside.len() - run..).rev() {
                blocks.push(beside.chunk);
            }
            self.extents.get_mut(id).half_mut(half).writes_in_flight += 1;
            self.next.parts_in_flight += 1;
            self.next.unsynced |= self.flushes_batches;
            let offset_bytes = self.half_offset(id, half, first_block);
            let token = self.half_token(kind, id, half);
            disk.write(offset_bytes, blocks, until, token);
        }
        self.next.beside = beside;
    }

    /// Writes a batch without records, which proves the one before it and says what is in place.
    pub(super) fn begin_mark(&mut self, disk: &mut impl Disk) {
        assert!(!self.batch.in_flight && self.batch.records.is_empty() && !self.has_gathered());
        if self.journal_room() == 0 {
            return;
        }
        if let Some(header) = self.take_reserved(disk.pool()) {
            self.send_batch(header, disk);
        }
    }

    fn send_batch(&mut self, mut header: Chunk, disk: &mut impl Disk) {
        let fields = self.next_header(&self.batch.records, self.batch.journaled);
        self.batch.chain =
            encode_batch(&fields, self.journal_name, &self.batch.records, disk.pool().bytes_mut(&mut header));
        self.batch.placed_lsn = fields.placed_lsn;
        self.batch.rest = fields.rest;
        let to_end = (self.layout.journal_blocks - self.journal.head) as usize;
        let begin = self.layout.journal_offset(self.name.shard);
        let offset_bytes = begin + u64::from(self.journal.head) * BLOCK;
        let len = 1 + self.batch.journaled;
        assert!(len <= self.journal_room() as usize, "a batch never reaches what is needed");
        let until = if self.batch.unsynced { Durable::AtSync } else { Durable::AtEnd };
        // Filled one by one, not cut: a cut would take a list from the heap in the middle of service.
        let mut blocks = self.list_for(len.min(to_end));
        let mut around = (len > to_end).then(|| self.list_for(len - to_end));
        blocks.push(header);
        for applied in &self.batch.applied {
            let Applied::Set { chunk: Some(chunk), .. } = applied else { continue };
            let chunk = disk.pool().share(chunk);
            match &mut around {
                Some(around) if blocks.len() == to_end => around.push(chunk),
                _ => blocks.push(chunk),
            }
        }
        self.batch.in_flight = true;
        self.batch.parts_in_flight += 1;
        let token = self.token(kind::JOURNAL, 0);
        disk.write(offset_bytes, blocks, until, token);
        if let Some(rest) = around {
            self.batch.parts_in_flight += 1;
            let token = self.token(kind::JOURNAL, 0);
            disk.write(begin, rest, until, token);
        }
        let len = u32::try_from(len).expect("at most a batch");
        self.journal.head = (self.journal.head + len) % self.layout.journal_blocks;
        Counters::add(&self.shared.counters.batches, 1);
        Counters::add(&self.shared.counters.blocks, self.batch.sets as u64);
    }

    /// A write of data to their place has ended, of a batch whose number is even or not.
    pub(super) fn beside_ended(
        &mut self,
        (id, half): (ExtentId, u8),
        is_even: bool,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.extents.get_mut(id).half_mut(half).writes_in_flight -= 1;
        // Without a batch in flight it is one of the next: a batch that was dropped has taken its number with it.
        if self.batch.in_flight && is_even != self.next_lsn().is_multiple_of(2) {
            self.batch_part_ended(result, disk, outcomes);
            return;
        }
        self.next.parts_in_flight -= 1;
        if let Err(error) = result {
            self.take_no_more("data could not be written to their place", error);
        }
        if self.failed.is_some() {
            self.fail_waiting(disk, outcomes);
        }
    }

    pub(super) fn batch_part_ended(
        &mut self,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.batch.parts_in_flight -= 1;
        if let Err(error) = result {
            self.batch.failure.get_or_insert(error);
        }
        if self.batch.parts_in_flight > 0 {
            return;
        }
        match self.batch.failure {
            None if self.batch.unsynced => {
                self.batch.synced_placed_lsn = self.begin_syncing();
                let token = self.token(kind::FLUSH, 0);
                disk.sync(token);
            }
            None => self.commit(disk, outcomes),
            Some(error) => self.drop_batch("a write to the journal failed", error, disk, outcomes),
        }
    }

    /// The sync after the parts of a batch has ended.
    pub(super) fn flush_ended(
        &mut self,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        match result {
            Ok(()) if self.shared.has_failed() => {
                self.fail_with_others(disk, outcomes);
                let error = IoError::Errno(rustix::io::Errno::IO.raw_os_error());
                self.drop_batch("another shard of the store failed", error, disk, outcomes);
            }
            Ok(()) => {
                self.journal.placed_lsn = self.journal.placed_lsn.max(self.batch.synced_placed_lsn);
                self.commit(disk, outcomes);
            }
            Err(error) => self.drop_batch("a sync failed", error, disk, outcomes),
        }
    }

    /// The batch is durable.
    fn commit(&mut self, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        // Batches that are in place leave the list here, so that it does not grow from one sync to the next.
        self.placed_lsn();
        self.journal.lsn += 1;
        self.journal.chain = self.batch.chain;
        self.rested = self.batch.rest;
        // What follows a rest begins as what follows an opening.
        self.begun = !self.rested;
        let lsn = self.journal.lsn;
        self.committed.push_back(Committed { lsn, unplaced: 0 });
        self.committed_ns = self.now_ns;
        self.marked_placed_lsn = self.batch.placed_lsn;
        if !self.batch.records.is_empty() {
            self.last_record_lsn = lsn;
        }
        self.twins.proved(self.batch.redirected());
        let mut applied = std::mem::take(&mut self.batch.applied);
        for change in applied.drain(..) {
            self.apply(change, lsn, disk, outcomes);
        }
        self.batch.applied = applied;
        self.batch.clear();
        if std::mem::take(&mut self.active_ended) {
            let extents = &self.extents;
            self.active.retain(|id| extents.at(id.0).is_some_and(|(_, extent)| !extent.ended));
        }
        self.releases.batch_ended();
        self.twins.batch_ended();
    }

    fn apply(&mut self, change: Applied, lsn: u64, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        match change {
            Applied::Set { op, extent: id, half, block, sum, version, chunk } => {
                self.extents.wrote(id, version).set(half, block, sum);
                self.mark_dirty(id);
                self.twin_changed(id, block, 1, self.ops[op as usize].what == What::Move);
                if let Some(chunk) = chunk {
                    self.make_pending(id, block, lsn, chunk, disk);
                }
                self.end_part(op, disk, outcomes);
            }
            Applied::Vacated { extent: id, half } => self.half_ended(id, half),
            Applied::Allocated { extent: id, op, .. } => {
                self.mark_dirty(id);
                self.shared.counters.allocated.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if let Some(op) = op {
                    self.end_part(op, disk, outcomes);
                }
            }
            Applied::Activated { extent: id } => {
                let extent = self.extents.get_mut(id);
                extent.activating = false;
                extent.active = true;
            }
            Applied::Deactivated { extent: id } => {
                let extent = self.extents.get_mut(id);
                extent.deactivating = false;
                extent.active = false;
            }
            Applied::Cleared { op, extent: id, half, block, count, state, version, hollow } => {
                let extent = self.extents.wrote(id, version);
                if state == Sum::LOST {
                    let fresh = extent.sums(block..block + count).filter(|sum| *sum != Sum::LOST).count();
                    Counters::add(&self.shared.counters.lost_blocks, fresh as u64);
                }
                extent.cleared(half, block, count, state, hollow);
                self.twin_changed(id, block, count, self.ops[op as usize].what == What::Move);
                if hollow {
                    self.releases.add(id);
                }
                self.mark_dirty(id);
                self.end_part(op, disk, outcomes);
            }
            Applied::Freed { op, extent: id } => {
                self.free_extent(id, disk);
                if let Some(op) = op {
                    self.end_part(op, disk, outcomes);
                }
            }
            Applied::Kept { op, extent: id } => {
                self.extents.get_mut(id).hollow = false;
                self.end_part(op, disk, outcomes);
            }
            Applied::Persisted { op, state } => {
                self.extents.persisted(state);
                self.end_part(op, disk, outcomes);
            }
            Applied::Forgotten { op, object } => {
                self.extents.forgotten(object);
                self.stable_versions.remove(&object);
                self.end_part(op, disk, outcomes);
            }
        }
    }

    /// A part of a request is durable.
    fn end_part(&mut self, op: u32, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        self.count_committed(op);
        self.end_if_committed(op, disk, outcomes);
    }

    fn count_committed(&mut self, op: u32) {
        let op = &mut self.ops[op as usize];
        op.committed += 1;
        // Something else failed while the batch was in flight.
        op.failure = op.failure.or(self.failed);
    }

    /// Ends a request whose last batch has ended.
    fn end_if_committed(&mut self, at: u32, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        let op = &self.ops[at as usize];
        let is_taken = !matches!(op.what, What::Unmap { next, .. } if next != u32::MAX);
        if is_taken && op.queued == op.count && op.committed == op.count {
            self.end_op(at, Blocks::new(), disk, outcomes);
        }
    }

    fn make_pending(&mut self, id: ExtentId, block: u16, lsn: u64, chunk: Chunk, disk: &mut impl Disk) {
        self.count_unplaced(lsn, 1);
        let fresh = Pending { chunk, lsn, placing_lsn: 0 };
        match self.pending.get_mut(&(id.0, block)) {
            None => {
                self.pending.insert((id.0, block), fresh);
                self.unsent.push((id, block));
            }
            Some(pending) => {
                let older = std::mem::replace(&mut pending.chunk, fresh.chunk);
                let overtaken_lsn = std::mem::replace(&mut pending.lsn, lsn);
                disk.pool().release(older);
                self.count_unplaced(overtaken_lsn, -1);
            }
        }
    }

    /// The end of an extent is durable.
    fn free_extent(&mut self, id: ExtentId, disk: &mut impl Disk) {
        let extent = self.extents.get(id);
        // One look at the log is enough for all that end with a batch: until then no place is given to another extent.
        self.active_ended |= extent.active || extent.activating;
        if !self.pending.is_empty() {
            for block in 0..u16::try_from(EXTENT_BLOCKS).expect("1024") {
                if let Some(pending) = self.pending.remove(&(id.0, block)) {
                    disk.pool().release(pending.chunk);
                    self.count_unplaced(pending.lsn, -1);
                }
            }
        }
        self.unsent.retain(|(extent, _)| *extent != id);
        // Another extent may have its place in the table before these are sent again.
        self.sync.retry.retain(|(extent, _)| *extent != id);
        self.twin_ended(id);
        self.extents.end(id);
        self.shared.counters.allocated.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
        for half in 0..2 {
            if self.extents.at(id.0).is_some() {
                self.give_slot_back_if_quiet(id, half);
            }
        }
    }

    /// Gives a slot that its extent has no more to whoever wants it, after the last read and write of it.
    pub(super) fn give_slot_back_if_quiet(&mut self, id: ExtentId, at: u8) {
        let extent = self.extents.get(id);
        let Some(half) = &extent.halves[usize::from(at)] else { return };
        let is_quiet = half.reads_in_flight == 0 && half.writes_in_flight == 0;
        if !(extent.ended || half.ended) || !is_quiet {
            return;
        }
        let Half { slot, mut sums, .. } = self.extents.take_half(id, at);
        sums.fill(Sum::ABSENT);
        self.shared.give_back(FreeSlot { slot, sums });
    }

    fn count_unplaced(&mut self, lsn: u64, by: i32) {
        let Some(first) = self.committed.front() else { return };
        let at = lsn.checked_sub(first.lsn).and_then(|at| usize::try_from(at).ok());
        if let Some(batch) = at.and_then(|at| self.committed.get_mut(at)) {
            batch.unplaced =
                batch.unplaced.checked_add_signed(by).expect("blocks are placed or overtaken once");
        }
    }

    /// A block of that batch is in place.
    pub(super) fn count_placed(&mut self, lsn: u64) {
        self.count_unplaced(lsn, -1);
    }

    pub(super) fn mark_dirty(&mut self, id: ExtentId) {
        let extent = self.extents.get_mut(id);
        if !std::mem::replace(&mut extent.dirty, true) {
            self.checkpoint.dirty.push(id);
        }
    }

    /// The batch could not be written: what it has is neither done nor undone.
    fn drop_batch(
        &mut self,
        why: &'static str,
        error: IoError,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.take_no_more(why, error);
        self.fail_waiting(disk, outcomes);
        let mut applied = std::mem::take(&mut self.batch.applied);
        self.drop_applied(&mut applied, disk, outcomes);
        self.batch.applied = applied;
        self.batch.clear();
    }

    /// Ends what waits for a batch that will never be sent, unless data of it are on their way to their place: then later.
    pub(super) fn drop_gathered(&mut self, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        if self.next.parts_in_flight > 0 {
            return;
        }
        let mut applied = std::mem::take(&mut self.next.applied);
        self.drop_applied(&mut applied, disk, outcomes);
        self.next.applied = applied;
        self.next.clear();
    }

    fn drop_applied(
        &mut self,
        applied: &mut Vec<Applied>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        for change in applied.drain(..) {
            let (op, chunk) = match change {
                Applied::Set { op, chunk, .. } => (op, chunk),
                Applied::Freed { op: Some(op), .. }
                | Applied::Cleared { op, .. }
                | Applied::Kept { op, .. }
                | Applied::Persisted { op, .. }
                | Applied::Forgotten { op, .. }
                | Applied::Allocated { op: Some(op), .. } => (op, None),
                Applied::Freed { op: None, .. }
                | Applied::Vacated { .. }
                | Applied::Allocated { op: None, .. }
                | Applied::Activated { .. }
                | Applied::Deactivated { .. } => continue,
            };
            if let Some(chunk) = chunk {
                disk.pool().release(chunk);
            }
            self.count_committed(op);
            let op_state = &mut self.ops[op as usize];
            op_state.count = op_state.queued;
            if op_state.committed == op_state.queued {
                self.end_op(op, Blocks::new(), disk, outcomes);
            }
        }
    }
}
