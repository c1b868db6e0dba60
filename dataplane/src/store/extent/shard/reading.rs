//! Reads: runs of blocks from the device, verified; blocks that wait for their place, from memory; holes, as zeros.
//!
//! The old blocks of a partial write are read here too. Whatever fails its checksum is neither given out nor merged into,
//! but for suspect blocks to who asks for them as they are.

use std::sync::Arc;

use af_xdp::region::{Chunk, Pool};
use torus_replication::mutants::{self, Mutant};
use torus_uring::{Blocks, IoError};

use super::{Op, ReadPart, Shard, What, kind};
use crate::store::extent::extents::ExtentId;
use crate::store::extent::format::{BLOCK, EXTENT_BLOCKS, Sum};
use crate::store::extent::shared::Counters;
use crate::store::{BLOCK_BYTES, Disk, Outcome, RequestToken, StoreError, release_blocks};

/// Where a block's data are.
pub(super) enum Source {
    Zeros,
    Memory,
    Lost,
    Device,
}

/// Extent and block in it of a block of a volume. `None` beyond what extents are numbered for.
pub(super) fn locate(block: u64) -> Option<(u32, u16)> {
    let extent = u32::try_from(block / u64::from(EXTENT_BLOCKS)).ok()?;
    let within = u16::try_from(block % u64::from(EXTENT_BLOCKS)).expect("below 1024");
    Some((extent, within))
}

impl Op {
    pub(super) fn add_part(&mut self, position: u32, blocks: Blocks) {
        match self.parts.iter_mut().find(|part| part.is_none()) {
            Some(free) if self.more_parts.is_empty() => *free = Some((position, blocks)),
            _ => self.more_parts.push((position, blocks)),
        }
    }

    /// All parts in order.
    pub(super) fn joined(&mut self) -> Blocks {
        if self.more_parts.is_empty()
            && let [only @ Some(_), None, None] = &mut self.parts
        {
            return only.take().map_or_else(Blocks::new, |(_, blocks)| blocks);
        }
        let mut inline = std::mem::take(&mut self.parts);
        if self.more_parts.is_empty() {
            inline.sort_unstable_by_key(|part| part.as_ref().map_or(u32::MAX, |(position, _)| *position));
            let mut joined = Blocks::new();
            for (_, blocks) in inline.into_iter().flatten() {
                joined.append(blocks);
            }
            return joined;
        }
        self.more_parts.extend(inline.into_iter().flatten());
        self.more_parts.sort_unstable_by_key(|(position, _)| *position);
        let mut joined = Blocks::with_capacity(self.count as usize);
        for (_, blocks) in self.more_parts.drain(..) {
            joined.append(blocks);
        }
        joined
    }
}

impl Shard {
    /// Begins to read `blocks.len()` blocks of a layer.
    pub fn read(
        &mut self,
        request: RequestToken,
        object: u32,
        first_block: u64,
        blocks: Blocks,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.begin_read(request, What::Read, object, first_block, blocks, disk, outcomes);
    }

    /// Begins to read blocks as they are, suspect ones too. One that fails its checksum elsewhere is an error all the same.
    pub fn salvage(
        &mut self,
        request: RequestToken,
        object: u32,
        first_block: u64,
        blocks: Blocks,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.begin_read(request, What::Salvage, object, first_block, blocks, disk, outcomes);
    }

    #[expect(clippy::too_many_arguments, reason = "a request and what it is about")]
    fn begin_read(
        &mut self,
        request: RequestToken,
        what: What,
        object: u32,
        first_block: u64,
        mut blocks: Blocks,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        let count = u32::try_from(blocks.len()).expect("at most a long request");
        let mut op = Op::new(Some(request), what, object, first_block, count);
        // Until all parts are sent.
        op.reading = 1;
        let at = u32::try_from(self.ops.insert(op)).expect("32 bits");
        let mut position = 0;
        while position < count {
            let (len, source, place) =
                self.run_at(object, first_block + u64::from(position), count - position);
            // Most often all there is.
            let rest = if len == count - position { Blocks::new() } else { blocks.split_off(len as usize) };
            let run = std::mem::replace(&mut blocks, rest);
            self.read_run(at, position, run, source, place, disk);
            position += len;
        }
        release_blocks(disk.pool(), blocks);
        self.ops[at as usize].reading -= 1;
        self.end_read_if_done(at, disk, outcomes);
    }

    /// How many blocks from `block` on, at most `max`, come from one source and lie side by side; which; and where.
    pub(super) fn run_at(&self, object: u32, block: u64, max: u32) -> (u32, Source, Option<(ExtentId, u16)>) {
        let Some((number, within)) = locate(block) else { return (max, Source::Lost, None) };
        let room = (EXTENT_BLOCKS - u32::from(within)).min(max);
        let Some(id) = self.extents.find(object, number) else { return (room, Source::Zeros, None) };
        let extent = self.extents.get(id);
        let source_of = |block: u16| {
            let sum = extent.sum(block);
            if !self.pending.is_empty() && self.pending.contains_key(&(id.0, block)) {
                Source::Memory
            } else if sum.is_data() {
                Source::Device
            } else if sum == Sum::LOST {
                Source::Lost
            } else {
                Source::Zeros
            }
        };
        let first = source_of(within);
        let is_twin = extent.is_twin() && matches!(first, Source::Device);
        let half = extent.half_of(within);
        let same = |block: &u16| {
            std::mem::discriminant(&source_of(*block)) == std::mem::discriminant(&first)
                && !(is_twin && extent.half_of(*block) != half)
        };
        let room = u16::try_from(room).expect("at most an extent's blocks");
        let run = (within..within + room).take_while(same).count();
        (u32::try_from(run).expect("at most an extent's blocks"), first, Some((id, within)))
    }

    fn read_run(
        &mut self,
        at: u32,
        position: u32,
        mut run: Blocks,
        source: Source,
        place: Option<(ExtentId, u16)>,
        disk: &mut impl Disk,
    ) {
        match (source, place) {
            (Source::Device, Some((extent, first_block))) => {
                let half = self.begin_reading(extent, first_block);
                let offset_bytes = self.half_offset(extent, half, first_block);
                let part = self.reads.insert(ReadPart { op: at, position, extent, half, first_block });
                self.ops[at as usize].reading += 1;
                let token = self.token(kind::READ, part);
                disk.read(offset_bytes, run, token);
                return;
            }
            (Source::Memory, Some((extent, first_block))) => {
                for (block, index) in (first_block..).zip(0..run.len()) {
                    let newest = &self.pending[&(extent.0, block)].chunk;
                    copy_chunk(disk.pool(), newest, run.get_mut(index));
                }
            }
            (Source::Zeros, _) => {
                for index in 0..run.len() {
                    disk.pool().bytes_mut(run.get_mut(index)).fill(0);
                }
            }
            (Source::Lost | Source::Device | Source::Memory, _) => {
                self.ops[at as usize].failure.get_or_insert(StoreError::Lost);
            }
        }
        self.ops[at as usize].add_part(position, run);
    }

    /// Where a block would lie in one of its extent's slots, bytes.
    pub(super) fn half_offset(&self, extent: ExtentId, half: u8, block: u16) -> u64 {
        self.layout.data_offset(self.extents.get(extent).half(half).slot) + u64::from(block) * BLOCK
    }

    /// A read of a block begins; which of its extent's slots it is of.
    pub(super) fn begin_reading(&mut self, id: ExtentId, block: u16) -> u8 {
        let extent = self.extents.get_mut(id);
        let half = extent.half_of(block);
        extent.half_mut(half).reads_in_flight += 1;
        half
    }

    /// It has ended, and what was read was looked at.
    pub(super) fn end_reading(&mut self, id: ExtentId, half: u8) {
        self.extents.get_mut(id).half_mut(half).reads_in_flight -= 1;
        self.give_slot_back_if_quiet(id, half);
    }

    pub(super) fn read_ended(
        &mut self,
        index: usize,
        blocks: Blocks,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        let part = self.reads.remove(index);
        let failure = match result {
            Ok(()) => self.verify(&part, &blocks, disk.pool()).err(),
            Err(error) => Some(StoreError::Unreadable(error)),
        };
        self.end_reading(part.extent, part.half);
        let op = &mut self.ops[part.op as usize];
        op.reading -= 1;
        let salvages = op.what == What::Salvage;
        if let Some(failure) =
            failure.filter(|failure| !salvages || *failure != StoreError::Corrupt { suspect: true })
        {
            op.failure.get_or_insert(failure);
        }
        op.add_part(part.position, blocks);
        match op.what {
            What::Read | What::Salvage => self.end_read_if_done(part.op, disk, outcomes),
            What::Move => self.move_if_read(part.op, disk, outcomes),
            _ => self.merge_if_read(part.op, disk, outcomes),
        }
    }

    /// Holds what was read against the sums that are known.
    fn verify(&self, part: &ReadPart, blocks: &Blocks, pool: &Pool) -> Result<(), StoreError> {
        let extent = self.extents.get(part.extent);
        let region = pool.region();
        // What was moved to the other slot meanwhile is the same.
        let bad = (part.first_block..)
            .zip(blocks.iter())
            .filter(|(block, chunk)| Sum::of(region.bytes(chunk)) != extent.sum(*block))
            .count();
        if bad == 0 || extent.suspect && mutants::is(Mutant::SuspectGood) {
            return Ok(());
        }
        Counters::add(&self.shared.counters.checksum_errors, bad as u64);
        Err(StoreError::Corrupt { suspect: extent.suspect })
    }

    fn end_read_if_done(&mut self, at: u32, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        let op = &mut self.ops[at as usize];
        if op.reading == 0 {
            let blocks = op.joined();
            self.end_op(at, blocks, disk, outcomes);
        }
    }

    /// Brings the old content of a block into a chunk, at once or by a read that ends as part `position` of `op`.
    pub(super) fn fetch_old(
        &mut self,
        at: u32,
        position: u32,
        block: u64,
        chunk: Chunk,
        disk: &mut impl Disk,
    ) {
        let object = self.ops[at as usize].object;
        let (_, source, place) = self.run_at(object, block, 1);
        self.read_run(at, position, Blocks::from_iter([chunk]), source, place, disk);
    }
}

/// Copies a whole chunk.
pub(super) fn copy_chunk(pool: &mut Pool, from: &Chunk, to: &mut Chunk) {
    let region = Arc::clone(pool.region());
    pool.copy_in(to, 0, &region.bytes(from)[..BLOCK_BYTES]);
}
