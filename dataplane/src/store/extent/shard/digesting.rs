//! What copies of blocks are, for comparison with other copies: hashes of what is on the device, and whether it is what the
//! records say.
//!
//! One request at a time, one read of a few blocks at a time: comparison takes little of what requests need, whatever its length.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use torus_replication::mutants::{self, Mutant};
use torus_uring::{Blocks, IoError};

use super::reading::Source;
use super::{LOOK_AGAIN_NS, Op, Shard, What, kind};
use crate::store::extent::extents::ExtentId;
use crate::store::extent::format::{EXTENT_BLOCKS, Sum};
use crate::store::extent::shared::Counters;
use crate::store::{BLOCK_BYTES, Disk, Outcome, RequestToken, StoreError};

/// Blocks hashed in one go: some 50 microseconds of the core.
const PIECE_BLOCKS: u32 = 32;
/// The part of the memory that is left to requests.
const LEFT_OF: usize = 4;

/// What a copy of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockDigest {
    /// Nothing was ever written, or it was taken back.
    Absent,
    /// Zeros, whatever a layer below has.
    Zero,
    /// 128 bits of the BLAKE3 hash of data that match their record.
    Data(u128),
    /// What is there does not match its newest record, and was being written when the store last crashed.
    Suspect {
        /// The hash of what is there.
        found: u128,
        /// What the record says.
        recorded_sum: Sum,
        /// What should stand there for what is there.
        found_sum: Sum,
    },
    /// What is there does not match its record or cannot be read, and was good once.
    Bad,
    /// No good copy was left, and that is remembered.
    Lost,
}

/// A read in flight.
#[derive(Debug)]
struct Reading {
    extent: ExtentId,
    half: u8,
    first_block: u16,
    count: u32,
}

#[derive(Debug, Default)]
pub(super) struct DigestState {
    /// Requests in order of arrival; the first is at work.
    queue: VecDeque<u32>,
    /// Its blocks so far.
    found: Vec<BlockDigest>,
    reading: Option<Reading>,
    /// Before this position blocks are read one by one: one of them cannot be read.
    singly_to: usize,
    /// What the caller has not taken.
    ended: Vec<(RequestToken, Vec<BlockDigest>)>,
}

impl DigestState {
    /// Whether it waits for memory or for its turn.
    pub(super) fn waits(&self) -> bool {
        !self.queue.is_empty() && self.reading.is_none()
    }
}

/// 128 bits of the hash of a block.
#[must_use]
pub fn block_hash(bytes: &[u8]) -> u128 {
    let hash = blake3::hash(&bytes[..BLOCK_BYTES]);
    let (first, _) = hash.as_bytes().split_first_chunk().expect("32 bytes");
    u128::from_le_bytes(*first)
}

impl Shard {
    /// Begins to say what blocks of a layer are. When the outcome is good [`Shard::take_digests`] has it. The caller orders it as
    /// a read.
    ///
    /// # Panics
    /// If these are more blocks than an extent has.
    pub fn digest(
        &mut self,
        request: RequestToken,
        object: u32,
        blocks: Range<u64>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        let count = u32::try_from(blocks.end - blocks.start).expect("at most an extent's blocks");
        assert!(count <= EXTENT_BLOCKS, "at most an extent's blocks");
        let op = Op::new(Some(request), What::Digest, object, blocks.start, count);
        let at = u32::try_from(self.ops.insert(op)).expect("32 bits");
        self.digests.queue.push_back(at);
        self.advance_digests(disk, outcomes);
    }

    /// What the blocks of a request are, once it has ended well.
    pub fn take_digests(&mut self, request: RequestToken) -> Option<Vec<BlockDigest>> {
        let at = self.digests.ended.iter().position(|(ended, _)| *ended == request)?;
        Some(self.digests.ended.swap_remove(at).1)
    }

    /// When comparison wants a turn.
    pub(super) fn digests_at_ns(&self) -> Option<u64> {
        self.digests.waits().then_some(self.now_ns + LOOK_AGAIN_NS)
    }

    /// Goes on until a read is in flight, or no memory is free, or much has been hashed.
    pub(super) fn advance_digests(&mut self, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        let mut hashed = 0;
        while self.digests.reading.is_none()
            && let Some(&at) = self.digests.queue.front()
        {
            let op = &self.ops[at as usize];
            let (object, position) = (op.object, self.digests.found.len());
            let left = op.count - u32::try_from(position).expect("at most an extent's blocks");
            if left == 0 || op.failure.is_some() {
                self.end_digest(at, disk, outcomes);
                continue;
            }
            let (run, source, place) = self.run_at(object, op.first_block + position as u64, left);
            let len = run.min(PIECE_BLOCKS);
            match (source, place) {
                (Source::Zeros, None) => {
                    self.digests.found.extend((0..run).map(|_| BlockDigest::Absent));
                }
                (Source::Zeros, Some((id, first))) => {
                    let end = first + u16::try_from(run).expect("at most an extent's blocks");
                    let digest =
                        |sum: Sum| if sum == Sum::ABSENT { BlockDigest::Absent } else { BlockDigest::Zero };
                    self.digests.found.extend(self.extents.get(id).sums(first..end).map(digest));
                }
                (Source::Lost, Some(_)) => {
                    self.digests.found.extend((0..run).map(|_| BlockDigest::Lost));
                }
                (Source::Memory, Some((id, first))) => {
                    if hashed >= PIECE_BLOCKS {
                        return;
                    }
                    hashed += len;
                    let region = Arc::clone(disk.pool().region());
                    for block in (first..).take(len as usize) {
                        let newest = &self.pending[&(id.0, block)].chunk;
                        self.digests.found.push(BlockDigest::Data(block_hash(region.bytes(newest))));
                    }
                }
                (Source::Device, Some((id, first))) => {
                    let len = if position < self.digests.singly_to { 1 } else { len };
                    if !self.read_for_digest(id, first, len, disk) {
                        return;
                    }
                }
                (Source::Device | Source::Memory | Source::Lost, None) => {
                    self.ops[at as usize].failure = Some(StoreError::OutOfRange);
                }
            }
        }
    }

    /// Begins to read blocks, as many as there is memory for; whether there was any.
    fn read_for_digest(&mut self, id: ExtentId, first_block: u16, count: u32, disk: &mut impl Disk) -> bool {
        let mut blocks = self.list_for(count as usize);
        for _ in 0..count {
            // One at a time goes on even then.
            let is_short = disk.pool().free_chunks() <= disk.pool().chunk_capacity() / LEFT_OF;
            if is_short && !blocks.is_empty() {
                break;
            }
            let Some(chunk) = disk.pool().take_chunk() else { break };
            blocks.push(chunk);
        }
        if blocks.is_empty() {
            self.recycle(blocks, disk.pool());
            return false;
        }
        let count = u32::try_from(blocks.len()).expect("a few");
        let half = self.begin_reading(id, first_block);
        self.digests.reading = Some(Reading { extent: id, half, first_block, count });
        let offset_bytes = self.half_offset(id, half, first_block);
        let token = self.token(kind::DIGEST, 0);
        disk.read(offset_bytes, blocks, token);
        true
    }

    pub(super) fn digest_read_ended(
        &mut self,
        blocks: Blocks,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        let Some(reading) = self.digests.reading.take() else { unreachable!("such a read was in flight") };
        // A layer that is given up goes whoever compares it: what is there now is looked at anew.
        if !self.extents.get(reading.extent).ended {
            let extent = self.extents.get(reading.extent);
            let region = Arc::clone(disk.pool().region());
            let mut mismatches = 0;
            match result {
                Ok(()) => {
                    for (block, chunk) in (reading.first_block..).zip(blocks.iter()) {
                        let recorded_sum = extent.sum(block);
                        let bytes = region.bytes(chunk);
                        let found_sum = Sum::of(bytes);
                        let is_taken_for_good = extent.suspect && mutants::is(Mutant::SuspectGood);
                        self.digests.found.push(if found_sum == recorded_sum || is_taken_for_good {
                            BlockDigest::Data(block_hash(bytes))
                        } else if extent.suspect {
                            let found = block_hash(bytes);
                            BlockDigest::Suspect { found, recorded_sum, found_sum }
                        } else {
                            BlockDigest::Bad
                        });
                        mismatches += u64::from(found_sum != recorded_sum);
                    }
                }
                Err(_) if reading.count > 1 => {
                    self.digests.singly_to = self.digests.found.len() + reading.count as usize;
                }
                Err(_) => self.digests.found.push(BlockDigest::Bad),
            }
            Counters::add(&self.shared.counters.checksum_errors, mismatches);
        }
        self.end_reading(reading.extent, reading.half);
        self.recycle(blocks, disk.pool());
        self.advance_digests(disk, outcomes);
    }

    fn end_digest(&mut self, at: u32, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        self.digests.queue.pop_front();
        self.digests.singly_to = 0;
        let found = std::mem::take(&mut self.digests.found);
        let op = &self.ops[at as usize];
        if let (Some(request), None) = (op.request, op.failure) {
            self.digests.ended.push((request, found));
        }
        self.end_op(at, Blocks::new(), disk, outcomes);
    }
}
