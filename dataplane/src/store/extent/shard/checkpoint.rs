//! Checkpoints: all that a shard knows, written so that the journal's tail can move.
//!
//! A checkpoint is fuzzy: sum pages are copied one after the other while writes go on, each into the one of its slot's two
//! pages that the last durable checkpoint does not name. Records that are newer than the checkpoint's batch are applied to it
//! again when the store is opened, and give the same, whether the copy had them or not.
//!
//! Order, each step after the one before is durable: the data of all batches up to the checkpoint's; the sum pages; the table
//! that names them. Only then does the tail move.

use torus_uring::{Blocks, IoError};

use super::{Shard, kind};
use crate::store::extent::extents::{Extent, ExtentId, Half};
use crate::store::extent::format::{
    BLOCK, CheckpointHeader, ENTRY_BYTES, Entry, RECORD_BYTES, Superblock, encode_page,
};
use crate::store::extent::shared::Counters;
use crate::store::{BLOCK_BYTES, Disk, Durable, Outcome};

/// Sum pages in flight: enough to keep a disk busy, few enough that requests find room beside them.
const PAGES_IN_FLIGHT: u32 = 32;
/// Blocks of the table in one write.
const TABLE_PIECE_BLOCKS: usize = 64;
/// Chunks that are left to requests.
const CHUNKS_LEFT: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    /// The data of its batches are on their way to their place.
    Placing,
    /// Sum pages are being written.
    Pages,
    /// A sync makes them durable.
    Sync,
    /// The table is being written.
    Table,
}

#[derive(Debug)]
pub(super) struct CheckpointState {
    /// Extents that changed since their page was written.
    pub(super) dirty: Vec<ExtentId>,
    phase: Phase,
    /// Of the last durable one.
    sequence: u64,
    /// Which of the two places that one has.
    which: usize,
    /// What the one in progress covers.
    lsn: u64,
    tail: u32,
    chain: u32,
    /// The last batch that had ended when its first page was copied: what was allocated later is not in it.
    snapshot_lsn: u64,
    queue: Vec<ExtentId>,
    at: usize,
    /// A page of the extent there has been written.
    begun: bool,
    written: Vec<ExtentId>,
    in_flight: u32,
    table: Vec<u8>,
    table_at: usize,
}

impl CheckpointState {
    /// All memory is taken here, for a shard that may come to have all slots of its store; none of it is touched before it is
    /// needed.
    pub(super) fn new(
        sequence: u64,
        which: usize,
        mut dirty: Vec<ExtentId>,
        layout: &Superblock,
    ) -> CheckpointState {
        let slots = layout.slots() as usize;
        let table_bytes = BLOCK_BYTES + slots * ENTRY_BYTES + layout.state_units_max() * RECORD_BYTES;
        dirty.reserve(slots.saturating_sub(dirty.len()));
        CheckpointState {
            dirty,
            phase: Phase::Idle,
            sequence,
            which,
            lsn: 0,
            tail: 0,
            chain: 0,
            snapshot_lsn: 0,
            queue: Vec::with_capacity(slots),
            at: 0,
            begun: false,
            written: Vec::with_capacity(slots),
            in_flight: 0,
            table: Vec::with_capacity(table_bytes.next_multiple_of(BLOCK_BYTES)),
            table_at: 0,
        }
    }
}

impl CheckpointState {
    /// Whether one is being made.
    pub(super) fn is_in_progress(&self) -> bool {
        self.phase != Phase::Idle
    }
}

impl Shard {
    /// Goes on with the checkpoint in progress.
    pub(super) fn advance_checkpoint(&mut self, disk: &mut impl Disk) {
        if self.checkpoint.phase == Phase::Placing && self.placed_lsn() >= self.checkpoint.lsn {
            self.checkpoint.phase = Phase::Pages;
            self.checkpoint.snapshot_lsn = self.journal.lsn;
            std::mem::swap(&mut self.checkpoint.queue, &mut self.checkpoint.dirty);
            (self.checkpoint.at, self.checkpoint.begun) = (0, false);
        }
        if self.checkpoint.phase == Phase::Pages {
            self.send_pages(disk);
        }
        if self.checkpoint.phase == Phase::Sync && !self.sync_in_flight() {
            self.send_sync(true, disk);
        }
        if self.checkpoint.phase == Phase::Table {
            self.send_table(disk);
        }
    }

    /// Begins one when half of the journal is in use, or a scrub has come far.
    pub(super) fn begin_checkpoint_if_due(&mut self) {
        let is_wanted = self.journal_used() > self.layout.journal_blocks / 2 || self.scrub.wants_saving();
        let is_due = is_wanted && !self.rested;
        // While a batch is in flight the journal's head is behind it, and so would be the tail.
        if self.checkpoint.phase != Phase::Idle || !is_due || self.batch_in_flight() {
            return;
        }
        self.checkpoint.phase = Phase::Placing;
        self.checkpoint.lsn = self.journal.lsn;
        self.checkpoint.tail = self.journal.head;
        self.checkpoint.chain = self.journal.chain;
    }

    fn send_pages(&mut self, disk: &mut impl Disk) {
        while self.checkpoint.at < self.checkpoint.queue.len() && self.checkpoint.in_flight < PAGES_IN_FLIGHT
        {
            let id = self.checkpoint.queue[self.checkpoint.at];
            // A place of the table that has changed hands may stand here twice: its page must not be written again while it is.
            // What changed since then is for the next checkpoint.
            let begun = self.checkpoint.begun;
            let is_fresh = |half: &Half| half.next_page_crc.is_none();
            let wanted = |extent: &Extent| {
                let is_first = || extent.dirty && extent.live().all(|(_, half)| is_fresh(half));
                !extent.ended && (begun || is_first())
            };
            let extent = self.extents.at(id.0).map(|(_, extent)| extent).filter(|extent| wanted(extent));
            let Some((at, _)) = extent.and_then(|extent| extent.live().find(|(_, half)| is_fresh(half)))
            else {
                self.checkpoint.at += 1;
                self.checkpoint.begun = false;
                continue;
            };
            let is_short = disk.pool().free_chunks() <= CHUNKS_LEFT.min(disk.pool().chunk_capacity() / 4);
            // One at a time goes on even then: memory may be short because the journal is full.
            if is_short && self.checkpoint.in_flight > 0 {
                break;
            }
            let Some(mut chunk) = self.take_reserved(disk.pool()) else { break };
            let extent = self.extents.get_mut(id);
            // What changes from its first page on is for the next checkpoint too, whichever page has it.
            extent.dirty &= std::mem::replace(&mut self.checkpoint.begun, true);
            let half = extent.half_mut(at);
            let bytes = disk.pool().bytes_mut(&mut chunk);
            encode_page(&half.sums, bytes);
            half.next_page_crc = Some(crc32c::crc32c(bytes));
            half.writes_in_flight += 1;
            let offset_bytes = self.layout.page_offset(half.slot, half.which ^ 1);
            self.checkpoint.written.push(id);
            self.checkpoint.in_flight += 1;
            let token = self.half_token(kind::PAGE, id, at);
            disk.write(offset_bytes, Blocks::from_iter([chunk]), Durable::AtSync, token);
        }
        self.end_pages_if_written();
    }

    pub(super) fn page_ended(
        &mut self,
        (id, half): (ExtentId, u8),
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.checkpoint.in_flight -= 1;
        self.extents.get_mut(id).half_mut(half).writes_in_flight -= 1;
        self.give_slot_back_if_quiet(id, half);
        match result {
            Ok(()) => self.end_pages_if_written(),
            Err(error) => self.fail("a sum page could not be written", error, disk, outcomes),
        }
    }

    fn end_pages_if_written(&mut self) {
        let state = &mut self.checkpoint;
        if state.phase == Phase::Pages && state.at == state.queue.len() && state.in_flight == 0 {
            state.queue.clear();
            state.phase = Phase::Sync;
        }
    }

    /// The sum pages are durable: the table can be written.
    pub(super) fn pages_durable(&mut self) {
        let mut table = std::mem::take(&mut self.checkpoint.table);
        table.clear();
        table.resize(BLOCK_BYTES, 0);
        let mut entries = 0;
        let (snapshot_lsn, durable_lsn) = (self.checkpoint.snapshot_lsn, self.journal.lsn);
        let slots = self.extents.iter().flat_map(|(_, extent)| {
            // Where all that an extent has was given to it later, its former slot has gone since, and what is true of it as a whole must
            // stand somewhere. The page of such a slot is not looked at: its allocation is behind the checkpoint.
            let goes_on = extent.begun_lsn <= snapshot_lsn
                && extent.live().all(|(_, half)| half.allocated_lsn > snapshot_lsn);
            let end_lsn = if goes_on { durable_lsn } else { snapshot_lsn };
            let slots = extent.live().map(move |(_, half)| (extent, half));
            slots.filter(move |(_, half)| half.allocated_lsn <= end_lsn)
        });
        for (extent, half) in slots {
            let which = half.which ^ u8::from(half.next_page_crc.is_some());
            let page_crc = half.next_page_crc.unwrap_or(half.page_crc);
            let entry = Entry {
                object: extent.object,
                extent: extent.number,
                slot: half.slot,
                page_crc,
                version: extent.version,
                which,
                active: extent.active,
                hollow: extent.hollow,
            };
            entry.encode(&mut table);
            entries += 1;
        }
        let states_at = table.len();
        let mut states = 0;
        for state in self.extents.states() {
            let at = table.len();
            table.resize(at + state.units() * RECORD_BYTES, 0);
            state.encode(&mut table[at..]);
            states += 1;
        }
        let state_units = (table.len() - states_at) / RECORD_BYTES;
        assert!(state_units <= self.layout.state_units_max(), "states have room");
        let scrub = self.scrub.save();
        let header = CheckpointHeader {
            sequence: self.checkpoint.sequence + 1,
            lsn: self.checkpoint.lsn,
            tail: self.checkpoint.tail,
            chain: self.checkpoint.chain,
            entries,
            entries_crc: crc32c::crc32c(&table[BLOCK_BYTES..states_at]),
            states,
            state_units: u32::try_from(state_units).expect("at most a checkpoint's"),
            states_crc: crc32c::crc32c(&table[states_at..]),
            scrub_run: scrub.run,
            scrub_cursor: scrub.cursor,
            scrub_errors: scrub.errors,
        };
        header.encode(self.name, self.checkpoint.which ^ 1, &mut table);
        table.resize(table.len().next_multiple_of(BLOCK_BYTES), 0);
        self.checkpoint.table = table;
        self.checkpoint.table_at = 0;
        self.checkpoint.phase = Phase::Table;
    }

    fn send_table(&mut self, disk: &mut impl Disk) {
        while self.checkpoint.table_at < self.checkpoint.table.len() {
            let left = (self.checkpoint.table.len() - self.checkpoint.table_at) / BLOCK_BYTES;
            let count = left.min(TABLE_PIECE_BLOCKS);
            if disk.pool().free_chunks() < count + CHUNKS_LEFT.min(disk.pool().chunk_capacity() / 4)
                && self.checkpoint.in_flight > 0
            {
                break;
            }
            let mut blocks = self.list_for(count);
            let begin = self.checkpoint.table_at;
            while blocks.len() < count {
                let taken = match self.checkpoint.in_flight + u32::from(!blocks.is_empty()) {
                    0 => self.take_reserved(disk.pool()),
                    _ => disk.pool().take_chunk(),
                };
                let Some(mut chunk) = taken else { break };
                let at = begin + blocks.len() * BLOCK_BYTES;
                disk.pool()
                    .bytes_mut(&mut chunk)
                    .copy_from_slice(&self.checkpoint.table[at..at + BLOCK_BYTES]);
                blocks.push(chunk);
            }
            if blocks.is_empty() {
                break;
            }
            self.checkpoint.table_at += blocks.len() * BLOCK_BYTES;
            self.checkpoint.in_flight += 1;
            let base = self.layout.checkpoint_offset(self.name.shard, self.checkpoint.which ^ 1);
            let token = self.token(kind::TABLE, 0);
            disk.write(base + begin as u64 / BLOCK * BLOCK, blocks, Durable::AtEnd, token);
        }
    }

    pub(super) fn table_part_ended(
        &mut self,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.checkpoint.in_flight -= 1;
        if let Err(error) = result {
            self.fail("a checkpoint could not be written", error, disk, outcomes);
            return;
        }
        let is_whole = self.checkpoint.table_at == self.checkpoint.table.len();
        if self.checkpoint.phase == Phase::Table && is_whole && self.checkpoint.in_flight == 0 {
            self.end_checkpoint();
        }
    }

    /// The table is durable: it is the shard's checkpoint now.
    fn end_checkpoint(&mut self) {
        let mut written = std::mem::take(&mut self.checkpoint.written);
        for id in written.drain(..) {
            if self.extents.at(id.0).is_none() {
                continue;
            }
            for half in self.extents.get_mut(id).halves.iter_mut().flatten() {
                if let Some(page_crc) = half.next_page_crc.take() {
                    half.page_crc = page_crc;
                    half.which ^= 1;
                }
            }
        }
        self.checkpoint.written = written;
        self.checkpoint.which ^= 1;
        self.checkpoint.sequence += 1;
        self.checkpoint.phase = Phase::Idle;
        self.journal.tail = self.checkpoint.tail;
        Counters::add(&self.shared.counters.checkpoints, 1);
    }
}
