//! Scrubbing: every block with data is read and held against its sum, in the background, at a bounded rate.
//!
//! What is being written meanwhile is left to the write. A block that does not match is read again before it counts: a write
//! may have overtaken the read. Regions that were in the activity log at a crash are verified without being asked for.
//! Where a run stands is kept in the checkpoints, so that it goes on after a restart.

use std::sync::atomic::Ordering;

use torus_uring::{Blocks, IoError};

use super::{Shard, kind};
use crate::store::Disk;
use crate::store::extent::extents::ExtentId;
use crate::store::extent::format::{BLOCK, EXTENT_BLOCKS, Sum};
use crate::store::extent::shared::Counters;

/// Blocks of one read.
const READ_BLOCKS: u16 = 64;
/// How long it waits while requests need the memory.
const WAIT_NS: u64 = 10_000_000;
/// How often a block that does not match is read again.
const RETRIES: u8 = 2;

/// Extents after which a checkpoint says where a run stands: 1 GiB, what a restart does again at most. The simulated stores
/// are too small for that.
const EXTENTS_UNSAVED_MAX: u32 = if cfg!(test) { 2 } else { 256 };

/// How long a suspect region with bad blocks rests before it is verified again.
const AGAIN_NS: u64 = 10_000_000_000;

/// A run that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubTask {
    /// Its number: another one starts anew.
    pub run: u64,
    /// Bytes a second, of all shards of the store together.
    pub rate_bytes_per_s: u64,
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScrubProgress {
    /// The run; 0 when there was none.
    pub run: u64,
    /// Places of the extent table that it has behind it; `u32::MAX` when it has all.
    pub cursor: u32,
    /// Bad blocks found.
    pub errors: u32,
}

/// A read in flight.
#[derive(Debug, Clone, Copy)]
struct Reading {
    extent: ExtentId,
    half: u8,
    first_block: u16,
    tries: u8,
    /// It verifies a suspect region, and is no part of a run.
    suspect: bool,
}

#[derive(Debug)]
pub(super) struct ScrubState {
    task: Option<ScrubTask>,
    progress: ScrubProgress,
    /// Extents before the cursor.
    done_extents: u32,
    /// Next block of the extent at the cursor.
    block: u16,
    reading: Option<Reading>,
    /// Extents that were active at a crash, last one first.
    suspects: Option<Vec<ExtentId>>,
    /// Next block of the last of them.
    suspect_block: u16,
    suspect_bad: bool,
    /// Not before.
    suspects_at_ns: u64,
    next_ns: u64,
    /// Extents verified since a checkpoint said where the run stands.
    unsaved_extents: u32,
}

impl ScrubState {
    pub(super) fn new(progress: ScrubProgress) -> ScrubState {
        ScrubState {
            task: None,
            progress,
            done_extents: 0,
            block: 0,
            reading: None,
            suspects: None,
            suspect_block: 0,
            suspect_bad: false,
            suspects_at_ns: 0,
            next_ns: 0,
            unsaved_extents: 0,
        }
    }

    /// Where the run stands, for a checkpoint.
    pub(super) fn save(&mut self) -> ScrubProgress {
        self.unsaved_extents = 0;
        self.progress
    }

    /// Whether so much would be done again after a restart that a checkpoint is worth it.
    pub(super) fn wants_saving(&self) -> bool {
        self.unsaved_extents >= EXTENTS_UNSAVED_MAX
    }

    pub(super) fn stop(&mut self) {
        self.task = None;
        self.suspects = Some(Vec::new());
    }

    /// When the next read is due.
    pub(super) fn due_ns(&self) -> Option<u64> {
        let runs = self.task.is_some() && self.progress.cursor != u32::MAX;
        let verifies = self.suspects.as_ref().is_none_or(|suspects| !suspects.is_empty());
        let runs = runs.then_some(self.next_ns);
        let verifies = verifies.then_some(self.next_ns.max(self.suspects_at_ns));
        runs.into_iter().chain(verifies).min().filter(|_| self.reading.is_none())
    }
}

impl Shard {
    /// Says which run is wanted; `None` stops.
    pub fn set_scrub(&mut self, task: Option<ScrubTask>) {
        if let Some(task) = task
            && task.run != self.scrub.progress.run
        {
            self.scrub.progress = ScrubProgress { run: task.run, ..ScrubProgress::default() };
            self.scrub.block = 0;
        }
        let behind = self.extents.iter().filter(|(id, _)| id.0 < self.scrub.progress.cursor).count();
        self.scrub.done_extents = u32::try_from(behind).expect("slots are numbered by 32 bits");
        self.scrub.task = task;
        self.scrub.next_ns = 0;
        self.tell_scrub();
    }

    /// Where the last run stands.
    #[must_use]
    pub fn scrub_progress(&self) -> ScrubProgress {
        self.scrub.progress
    }

    pub(super) fn advance_scrub(&mut self, disk: &mut impl Disk) {
        if self.closing || self.scrub.reading.is_some() || self.now_ns < self.scrub.next_ns {
            return;
        }
        if disk.pool().free_chunks() < disk.pool().chunk_capacity() / 8 {
            self.scrub.next_ns = self.now_ns + WAIT_NS;
            return;
        }
        if self.scrub.suspects.is_none() {
            let suspects = self.extents.iter().filter(|(_, extent)| extent.suspect).map(|(id, _)| id);
            self.scrub.suspects = Some(suspects.collect());
        }
        if self.read_suspect(disk) {
            return;
        }
        if self.scrub.task.is_some() && self.scrub.progress.cursor != u32::MAX {
            self.read_next(disk);
        }
    }

    /// Goes on verifying suspect regions; whether a read was begun.
    fn read_suspect(&mut self, disk: &mut impl Disk) -> bool {
        if self.now_ns < self.scrub.suspects_at_ns {
            return false;
        }
        while let Some(&id) = self.scrub.suspects.as_ref().and_then(|suspects| suspects.last()) {
            let alive = self.extents.at(id.0).is_some_and(|(_, extent)| extent.suspect && !extent.ended);
            let run = if alive { self.next_run(id, self.scrub.suspect_block) } else { None };
            if let Some((first_block, count)) = run {
                let sent = self.send_scrub(id, first_block, count, 0, true, disk);
                if sent {
                    self.scrub.suspect_block = first_block + count;
                }
                return sent;
            }
            let bad = std::mem::take(&mut self.scrub.suspect_bad);
            if alive && !bad {
                self.extents.get_mut(id).suspect = false;
            }
            self.scrub.suspect_block = 0;
            if let Some(suspects) = &mut self.scrub.suspects {
                suspects.pop();
                if alive && bad {
                    // Until its bad blocks have been made good.
                    suspects.insert(0, id);
                    self.scrub.suspects_at_ns = self.now_ns + AGAIN_NS;
                    return false;
                }
            }
        }
        false
    }

    fn read_next(&mut self, disk: &mut impl Disk) {
        while self.scrub.progress.cursor < self.extents.places() {
            let place = self.scrub.progress.cursor;
            if let Some((id, _)) = self.extents.at(place).filter(|(_, extent)| !extent.ended)
                && let Some((first_block, count)) = self.next_run(id, self.scrub.block)
            {
                if self.send_scrub(id, first_block, count, 0, false, disk) {
                    self.scrub.block = first_block + count;
                }
                return;
            }
            self.scrub.block = 0;
            self.scrub.progress.cursor += 1;
            let was_there = u32::from(self.extents.at(place).is_some());
            self.scrub.done_extents += was_there;
            self.scrub.unsaved_extents += was_there;
        }
        self.scrub.progress.cursor = u32::MAX;
        self.tell_scrub();
    }

    /// The next blocks with data in place, from `block` on.
    fn next_run(&self, id: ExtentId, block: u16) -> Option<(u16, u16)> {
        let extent = self.extents.get(id);
        let blocks = u16::try_from(EXTENT_BLOCKS).expect("1024");
        let in_place =
            |block: &u16| extent.sum(*block).is_data() && !self.pending.contains_key(&(id.0, *block));
        let first = (block..blocks).find(in_place)?;
        let half = extent.half_of(first);
        let same = |block: &u16| in_place(block) && extent.half_of(*block) == half;
        let run = (first..blocks.min(first + READ_BLOCKS)).take_while(same).count();
        Some((first, u16::try_from(run).expect("at most a read")))
    }

    fn send_scrub(
        &mut self,
        id: ExtentId,
        first_block: u16,
        count: u16,
        tries: u8,
        suspect: bool,
        disk: &mut impl Disk,
    ) -> bool {
        let mut blocks = self.list_for(usize::from(count));
        for _ in 0..count {
            match disk.pool().take_chunk() {
                Some(chunk) => blocks.push(chunk),
                None => {
                    self.recycle(blocks, disk.pool());
                    return false;
                }
            }
        }
        let half = self.begin_reading(id, first_block);
        self.scrub.reading = Some(Reading { extent: id, half, first_block, tries, suspect });
        if let Some(task) = self.scrub.task {
            let bytes = u64::from(count) * BLOCK;
            let pause_ns = bytes.saturating_mul(1_000_000_000) / task.rate_bytes_per_s.max(1);
            self.scrub.next_ns = self.shared.next_scrub_ns(self.now_ns, pause_ns);
        }
        let offset_bytes = self.half_offset(id, half, first_block);
        let token = self.token(kind::SCRUB, 0);
        disk.read(offset_bytes, blocks, token);
        true
    }

    pub(super) fn scrub_ended(&mut self, blocks: Blocks, result: Result<(), IoError>, disk: &mut impl Disk) {
        let Some(reading) = self.scrub.reading.take() else { unreachable!("a scrub read was in flight") };
        let id = reading.extent;
        let same = !self.extents.get(id).ended;
        let region = std::sync::Arc::clone(disk.pool().region());
        let mut bad = Vec::new();
        if same {
            for (block, chunk) in (reading.first_block..).zip(blocks.iter()) {
                let extent = self.extents.get(id);
                let sum = extent.sum(block);
                let written = extent.half_of(block) != reading.half
                    || self.pending.contains_key(&(id.0, block))
                    || self.batches_have(id, block);
                let settled = sum.is_data() && !written;
                if settled && (result.is_err() || Sum::of(region.bytes(chunk)) != sum) {
                    bad.push(block);
                }
            }
        }
        self.end_reading(id, reading.half);
        self.recycle(blocks, disk.pool());
        match bad.first() {
            Some(&block) if reading.tries < RETRIES || bad.len() > 1 => {
                // One by one, as often as it takes to tell a write that overtook the read from a bad block.
                let tries = if bad.len() > 1 { 0 } else { reading.tries + 1 };
                let sent = self.send_scrub(id, block, 1, tries, reading.suspect, disk);
                let at = if reading.suspect { &mut self.scrub.suspect_block } else { &mut self.scrub.block };
                // Without memory the next read begins with it.
                *at = block + u16::from(sent);
                if sent {
                    return;
                }
            }
            Some(_) => self.found_bad(reading.suspect),
            None => {}
        }
        if !reading.suspect {
            self.tell_scrub();
        }
    }

    fn found_bad(&mut self, suspect: bool) {
        Counters::add(&self.shared.counters.checksum_errors, 1);
        if suspect {
            self.scrub.suspect_bad = true;
        } else {
            self.scrub.progress.errors = self.scrub.progress.errors.saturating_add(1);
        }
    }

    fn tell_scrub(&self) {
        if let Some(cell) = self.shared.scrubs.get(usize::from(self.name.shard)) {
            let progress = self.scrub.progress;
            cell.errors.store(u64::from(progress.errors), Ordering::Relaxed);
            cell.done_extents.store(self.scrub.done_extents, Ordering::Relaxed);
            cell.is_finished.store(progress.cursor == u32::MAX, Ordering::Relaxed);
            cell.run.store(progress.run, Ordering::Release);
        }
    }
}
