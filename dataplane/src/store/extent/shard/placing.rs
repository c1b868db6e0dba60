//! From the journal to the place: the data of ended batches, in runs, and the syncs after which they are durable there.
//!
//! A block that is written again meanwhile is sent once more when the first write has ended: never two at a time. Its older
//! data count as placed, since the newer ones are in the journal behind them.

use torus_uring::{BLOCKS_LONG_MAX, IoError};

use super::{Shard, kind};
use crate::store::extent::extents::ExtentId;
use crate::store::{Disk, Durable, Outcome};

/// Blocks in place and not durable there, after which a sync is due: what opening the store after a crash must do again.
/// The simulated histories are too short for that.
const SYNC_BLOCKS: u32 = if cfg!(test) { 16 } else { 2048 };
/// How long a shard is at rest before it puts its last data in place durably and says so in the journal.
const SETTLE_NS: u64 = 200_000_000;
/// How long data wait that the file system had no room for.
const RETRY_NS: u64 = 1_000_000_000;

/// Blocks on their way to their place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placement {
    extent: ExtentId,
    half: u8,
    first_block: u16,
    count: u16,
}

/// Where syncs stand.
#[derive(Debug)]
pub(super) struct SyncState {
    /// One is in flight.
    in_flight: bool,
    /// It was begun when every sum page of the checkpoint had been written.
    after_pages: bool,
    /// Data of the batches up to this one were in place when it was begun.
    target_lsn: u64,
    /// Data of the batches up to this one are in place.
    placed_lsn: u64,
    unsynced_blocks: u32,
    /// Blocks that the file system had no room for.
    pub(super) retry: Vec<(ExtentId, u16)>,
    retry_at_ns: u64,
}

impl SyncState {
    pub(super) fn new(placed_lsn: u64) -> SyncState {
        SyncState {
            in_flight: false,
            after_pages: false,
            target_lsn: 0,
            placed_lsn,
            unsynced_blocks: 0,
            retry: Vec::with_capacity(super::PENDING_MAX),
            retry_at_ns: 0,
        }
    }
}

impl Shard {
    /// Sends what has become pending to its place.
    pub(super) fn send_placements(&mut self, disk: &mut impl Disk) {
        if !self.sync.retry.is_empty() && self.now_ns >= self.sync.retry_at_ns {
            self.unsent.append(&mut self.sync.retry);
        }
        if self.unsent.is_empty() {
            return;
        }
        self.unsent.sort_unstable();
        let mut unsent = std::mem::take(&mut self.unsent);
        let mut at = 0;
        while at < unsent.len() {
            let (id, first_block) = unsent[at];
            let extent = self.extents.get(id);
            let half = extent.half_of(first_block);
            let is_next = |(next, (other, block)): &(u16, &(ExtentId, u16))| {
                *other == id && *block == *next && extent.half_of(*block) == half
            };
            let run = (first_block..).zip(&unsent[at..]).take(BLOCKS_LONG_MAX).take_while(is_next).count();
            self.place((id, half), first_block, run, disk);
            at += run;
        }
        unsent.clear();
        self.unsent = unsent;
    }

    fn place(&mut self, (id, half): (ExtentId, u8), first_block: u16, run: usize, disk: &mut impl Disk) {
        let count = u16::try_from(run).expect("at most a long request");
        let mut blocks = self.list_for(run);
        for block in first_block..first_block + count {
            let Some(pending) = self.pending.get_mut(&(id.0, block)) else {
                unreachable!("what is to be placed is pending");
            };
            pending.placing_lsn = pending.lsn;
            blocks.push(disk.pool().share(&pending.chunk));
        }
        self.extents.get_mut(id).half_mut(half).writes_in_flight += 1;
        let offset_bytes = self.half_offset(id, half, first_block);
        let at = self.placements.insert(Placement { extent: id, half, first_block, count });
        let token = self.token(kind::PLACE, at);
        disk.write(offset_bytes, blocks, Durable::AtSync, token);
    }

    pub(super) fn placement_ended(
        &mut self,
        index: usize,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
    ) {
        let Placement { extent: id, half, first_block, count } = self.placements.remove(index);
        let extent = self.extents.get_mut(id);
        extent.half_mut(half).writes_in_flight -= 1;
        if extent.ended {
            self.give_slot_back_if_quiet(id, half);
            return;
        }
        if let Err(error) = result {
            self.placement_failed(id, first_block, count, error);
            return;
        }
        self.sync.unsynced_blocks += u32::from(count);
        for block in first_block..first_block + count {
            let Some(pending) = self.pending.get_mut(&(id.0, block)) else { continue };
            if pending.lsn != pending.placing_lsn {
                pending.placing_lsn = 0;
                self.unsent.push((id, block));
            } else if let Some(placed) = self.pending.remove(&(id.0, block)) {
                disk.pool().release(placed.chunk);
                self.count_placed(placed.lsn);
            }
        }
    }

    /// The data stay in the journal and in memory: nothing is lost. Where only room was missing they are sent again; any other
    /// failure ends writing.
    fn placement_failed(&mut self, id: ExtentId, first_block: u16, count: u16, error: IoError) {
        for block in first_block..first_block + count {
            if let Some(pending) = self.pending.get_mut(&(id.0, block)) {
                pending.placing_lsn = 0;
                self.sync.retry.push((id, block));
            }
        }
        self.sync.retry_at_ns = self.now_ns + RETRY_NS;
        if !error.is_no_space() {
            self.take_no_more(
                "data could not be written to their place; they are kept in the journal",
                error,
            );
        }
    }

    /// Data of the batches up to this one are in place.
    pub(super) fn placed_lsn(&mut self) -> u64 {
        while let Some(batch) = self.committed.front().filter(|batch| batch.unplaced == 0) {
            self.sync.placed_lsn = batch.lsn;
            self.committed.pop_front();
        }
        self.sync.placed_lsn
    }

    /// Begins a sync when one is due.
    pub(super) fn begin_sync(&mut self, disk: &mut impl Disk) {
        if self.sync.unsynced_blocks >= SYNC_BLOCKS && !self.sync.in_flight {
            self.send_sync(false, disk);
        }
        let rest_ns = self.now_ns.saturating_sub(self.committed_ns);
        if self.is_idle()
            && !self.has_gathered()
            && !self.is_settled()
            && (self.closing || rest_ns >= SETTLE_NS)
        {
            self.settle_step(disk);
        }
    }

    /// When this shard wants a turn, if nothing else gives it one before.
    pub(super) fn settle_at_ns(&self) -> Option<u64> {
        let retry = (!self.sync.retry.is_empty()).then_some(self.sync.retry_at_ns);
        // While anything is in progress its end gives the next turn.
        let rests = self.failed.is_none() && self.is_idle() && self.pending.is_empty() && !self.is_settled();
        let settle = rests.then(|| (self.committed_ns + SETTLE_NS).max(self.now_ns + super::LOOK_AGAIN_NS));
        retry.into_iter().chain(settle).min()
    }

    /// Whether the next one to open the shard finds all data in place, and every batch proved by a later one.
    pub(super) fn is_settled(&self) -> bool {
        let proved = self.last_record_lsn < self.journal.lsn || self.last_record_lsn == 0;
        let rests = !self.closing || self.rested || self.active.is_empty() || self.has_suspects();
        self.pending.is_empty() && proved && self.marked_placed_lsn >= self.last_record_lsn && rests
    }

    fn settle_step(&mut self, disk: &mut impl Disk) {
        if !self.pending.is_empty() {
            return;
        }
        if self.placed_lsn() > self.journal.placed_lsn {
            self.send_sync(false, disk);
        } else {
            self.begin_mark(disk);
        }
    }

    pub(super) fn sync_in_flight(&self) -> bool {
        self.sync.in_flight
    }

    pub(super) fn send_sync(&mut self, after_pages: bool, disk: &mut impl Disk) {
        assert!(!self.sync.in_flight);
        self.sync.in_flight = true;
        self.sync.after_pages = after_pages;
        self.sync.target_lsn = self.begin_syncing();
        let token = self.token(kind::SYNC, 0);
        disk.sync(token);
    }

    /// A sync begins now: data of the batches up to the one given back will be durable in their place.
    pub(super) fn begin_syncing(&mut self) -> u64 {
        self.sync.unsynced_blocks = 0;
        self.placed_lsn()
    }

    pub(super) fn sync_ended(
        &mut self,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.sync.in_flight = false;
        match result {
            Ok(()) if self.shared.has_failed() => self.fail_with_others(disk, outcomes),
            Ok(()) => {
                self.journal.placed_lsn = self.journal.placed_lsn.max(self.sync.target_lsn);
                if std::mem::take(&mut self.sync.after_pages) {
                    self.pages_durable();
                }
            }
            // Never tried again: the kernel may have forgotten what it could not write.
            Err(error) => self.fail("a sync failed", error, disk, outcomes),
        }
    }
}
