//! The linear store: each volume preallocated as runs of whole extents, blocks in place, no checksums.
//!
//! * [`mod@format`] – what is on the device: superblock and allocation table, and their codec.
//! * [`catalog`] – the durable state: opening, formatting, changing.
//! * [`allocation`] – which extents are whose.
//! * this file – reads, writes and read-modify-writes of one core, without I/O.
//!
//! Invariants, beside those of [`super::Store`]:
//! * A partial write reads its block first and writes it whole, under the caller's range order.
//! * A write of several blocks goes to the device as one request per run; it is acknowledged when all are durable. Sectors
//!   of an unacknowledged write are old or new, as on any disk.

pub mod allocation;
pub mod catalog;
pub mod format;

use std::sync::Arc;

use torus_uring::{Blocks, IoError};

use super::{
    BLOCK_BYTES, Disk, Durable, EXTENT_BYTES, Operation, Outcome, RequestToken, Store, StoreError, put_into,
    release_blocks,
};

/// Blocks of an extent.
const EXTENT_BLOCKS: u64 = EXTENT_BYTES / BLOCK_BYTES as u64;
/// A request of at most three blocks crosses at most one border between runs, and has at most two partial blocks.
const PARTS_MAX: usize = 2;

/// Extents that lie side by side, in the volume and on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First extent on the device, counted from the data area's beginning.
    pub first_extent: u32,
    /// How many.
    pub extents: u32,
}

/// Where a volume lies: its runs in order, found by binary search.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placement {
    /// (first block of the volume in the run, the run's first byte on the device)
    starts: Vec<(u64, u64)>,
    len_blocks: u64,
}

impl Placement {
    /// The placement that `runs` make on a device whose data area begins at byte `data_offset_bytes`.
    #[must_use]
    pub fn new(runs: &[Run], data_offset_bytes: u64) -> Placement {
        let mut placement = Placement::default();
        for run in runs {
            let offset_bytes = data_offset_bytes + u64::from(run.first_extent) * EXTENT_BYTES;
            placement.starts.push((placement.len_blocks, offset_bytes));
            placement.len_blocks += u64::from(run.extents) * EXTENT_BLOCKS;
        }
        placement
    }

    /// The device byte of a block, and how many blocks from it on lie side by side.
    fn locate(&self, block: u64) -> Option<(u64, u64)> {
        if block >= self.len_blocks {
            return None;
        }
        let run = self.starts.partition_point(|&(first, _)| first <= block) - 1;
        let (first, offset_bytes) = self.starts[run];
        let end = self.starts.get(run + 1).map_or(self.len_blocks, |&(next, _)| next);
        Some((offset_bytes + (block - first) * BLOCK_BYTES as u64, end - block))
    }
}

/// One or two pieces of a request that are contiguous on the device: (first byte, blocks).
type Pieces = [(u64, usize); PARTS_MAX];

fn pieces(placement: &Placement, first_block: u64, count: usize) -> Option<Pieces> {
    let (offset, contiguous) = placement.locate(first_block)?;
    let head = usize::try_from(contiguous).map_or(count, |contiguous| contiguous.min(count));
    if head == count {
        return Some([(offset, count), (0, 0)]);
    }
    let (next, contiguous) = placement.locate(first_block + head as u64)?;
    let tail = count - head;
    (contiguous >= tail as u64).then_some([(offset, head), (next, tail)])
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Read,
    ReadBeforeWrite,
    Write,
    Flush,
}

/// A request in progress. Parts are the disk requests of the present phase.
#[derive(Debug)]
struct Progress {
    phase: Phase,
    request: RequestToken,
    pieces: Pieces,
    /// Disk requests that have not ended.
    pending: u8,
    /// Payload that waits for the blocks around it.
    payload: Blocks,
    /// Chunks of ended parts, by part.
    ended: [Blocks; PARTS_MAX],
    keep_head_bytes: u16,
    keep_tail_bytes: u16,
    failure: Option<StoreError>,
}

impl Progress {
    fn idle() -> Progress {
        Progress {
            phase: Phase::Idle,
            request: RequestToken(0),
            pieces: [(0, 0); PARTS_MAX],
            pending: 0,
            payload: Blocks::new(),
            ended: [Blocks::new(), Blocks::new()],
            keep_head_bytes: 0,
            keep_tail_bytes: 0,
            failure: None,
        }
    }

    fn joined(&mut self) -> Blocks {
        let [mut joined, second] = std::mem::take(&mut self.ended);
        joined.append(second);
        joined
    }
}

/// One core's part of a linear store.
#[derive(Debug)]
pub struct LinearStore {
    /// By request token.
    progress: Box<[Progress]>,
}

impl LinearStore {
    /// A store for requests with tokens below `requests_max`.
    #[must_use]
    pub fn new(requests_max: u32) -> LinearStore {
        LinearStore { progress: (0..requests_max).map(|_| Progress::idle()).collect() }
    }

    /// Sends the blocks of a request to the device, by pieces.
    fn transfer(&mut self, at: u32, mut blocks: Blocks, disk: &mut impl Disk) {
        let progress = &mut self.progress[at as usize];
        let [(first_offset, first_count), (second_offset, second_count)] = progress.pieces;
        progress.pending = if second_count == 0 { 1 } else { 2 };
        let write = progress.phase == Phase::Write;
        let second = blocks.split_off(first_count);
        let mut send = |part: usize, offset_bytes: u64, blocks: Blocks| {
            let token = token(at, part);
            if write {
                disk.write(offset_bytes, blocks, Durable::AtEnd, token);
            } else {
                disk.read(offset_bytes, blocks, token);
            }
        };
        send(0, first_offset, blocks);
        if second_count != 0 {
            send(1, second_offset, second);
        }
    }

    /// Reads the blocks that a write covers only in part. Whether frame memory for them was free.
    fn read_before_write(&mut self, at: u32, disk: &mut impl Disk) -> bool {
        let progress = &mut self.progress[at as usize];
        let count = progress.payload.len();
        let head = progress.keep_head_bytes > 0;
        let tail = progress.keep_tail_bytes > 0 && !(head && count == 1);
        let mut chunks = [None, None];
        for (chunk, wanted) in chunks.iter_mut().zip([head, tail]) {
            if wanted {
                *chunk = disk.pool().take_chunk();
                if chunk.is_none() {
                    for taken in chunks.into_iter().flatten() {
                        disk.pool().release(taken);
                    }
                    return false;
                }
            }
        }
        progress.pending = u8::from(head) + u8::from(tail);
        for (part, chunk) in chunks.into_iter().enumerate() {
            if let Some(chunk) = chunk {
                let index = if part == 0 { 0 } else { count - 1 };
                let offset_bytes = block_offset(&progress.pieces, index);
                disk.read(offset_bytes, Blocks::from_iter([chunk]), token(at, part));
            }
        }
        true
    }

    /// Puts the payload of a partial write into the blocks that were read around it, which are then what is written.
    fn merge(&mut self, at: u32, disk: &mut impl Disk) {
        let progress = &mut self.progress[at as usize];
        let [mut head, mut tail] = std::mem::take(&mut progress.ended);
        let last = progress.payload.len() - 1;
        let from = usize::from(progress.keep_head_bytes);
        let to = BLOCK_BYTES - usize::from(progress.keep_tail_bytes);
        if let Some(old) = head.pop() {
            let to = if last == 0 { to } else { BLOCK_BYTES };
            put_into(disk.pool(), &mut progress.payload, 0, from..to, old);
        }
        if let Some(old) = tail.pop() {
            put_into(disk.pool(), &mut progress.payload, last, 0..to, old);
        }
    }

    fn end(&mut self, at: u32, blocks: Blocks, outcomes: &mut Vec<Outcome>) {
        let progress = &mut self.progress[at as usize];
        progress.phase = Phase::Idle;
        let result = progress.failure.take().map_or(Ok(()), Err);
        outcomes.push(Outcome { request: progress.request, blocks, result });
    }
}

/// Device byte of the block at `index` of a request.
fn block_offset(pieces: &Pieces, index: usize) -> u64 {
    let [(first, count), (second, _)] = *pieces;
    if index < count {
        first + (index * BLOCK_BYTES) as u64
    } else {
        second + ((index - count) * BLOCK_BYTES) as u64
    }
}

fn token(at: u32, part: usize) -> u64 {
    u64::from(at) << 1 | part as u64
}

impl Store for LinearStore {
    type Volume = Arc<Placement>;

    fn start(
        &mut self,
        request: RequestToken,
        volume: &Arc<Placement>,
        operation: Operation,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    ) {
        let at = request.0;
        let progress = &mut self.progress[at as usize];
        assert_eq!(progress.phase, Phase::Idle, "the token is in use");
        progress.request = request;
        let (phase, first_block, blocks, keep) = match operation {
            Operation::Flush => {
                progress.phase = Phase::Flush;
                progress.pending = 1;
                disk.sync(token(at, 0));
                return;
            }
            Operation::Read { first_block, blocks } => (Phase::Read, first_block, blocks, (0, 0)),
            Operation::Write { first_block, blocks, keep_head_bytes: 0, keep_tail_bytes: 0 } => {
                (Phase::Write, first_block, blocks, (0, 0))
            }
            Operation::Write { first_block, blocks, keep_head_bytes, keep_tail_bytes } => {
                (Phase::ReadBeforeWrite, first_block, blocks, (keep_head_bytes, keep_tail_bytes))
            }
        };
        let Some(pieces) = pieces(volume, first_block, blocks.len()) else {
            outcomes.push(Outcome { request, blocks, result: Err(StoreError::OutOfRange) });
            return;
        };
        progress.phase = phase;
        progress.pieces = pieces;
        (progress.keep_head_bytes, progress.keep_tail_bytes) = keep;
        if phase != Phase::ReadBeforeWrite {
            self.transfer(at, blocks, disk);
            return;
        }
        progress.payload = blocks;
        if !self.read_before_write(at, disk) {
            let progress = &mut self.progress[at as usize];
            progress.failure = Some(StoreError::NoMemory);
            let payload = std::mem::take(&mut progress.payload);
            self.end(at, payload, outcomes);
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
        let at = u32::try_from(token >> 1).expect("a token of this store");
        let progress = &mut self.progress[at as usize];
        let phase = progress.phase;
        assert!(progress.pending > 0, "ended twice");
        if let Err(error) = result {
            progress.failure = Some(match phase {
                Phase::Read | Phase::ReadBeforeWrite => StoreError::Unreadable(error),
                _ => StoreError::Unwritable(error),
            });
        }
        progress.ended[(token & 1) as usize] = blocks;
        progress.pending -= 1;
        if progress.pending > 0 {
            return;
        }
        if phase != Phase::ReadBeforeWrite {
            let blocks = progress.joined();
            self.end(at, blocks, outcomes);
        } else if progress.failure.is_some() {
            // What could not be read must not be written back with a new neighbour (I7).
            let read = progress.joined();
            let payload = std::mem::take(&mut progress.payload);
            release_blocks(disk.pool(), read);
            self.end(at, payload, outcomes);
        } else {
            self.merge(at, disk);
            let progress = &mut self.progress[at as usize];
            progress.phase = Phase::Write;
            let payload = std::mem::take(&mut progress.payload);
            self.transfer(at, payload, disk);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use af_xdp::region::{Pool, Region, RegionConfig};
    use proptest::prelude::*;

    use super::*;

    const DATA_OFFSET: u64 = 8 << 20;
    const ERROR: IoError = IoError::Errno(5);

    enum Pending {
        Read(u64, Blocks, u64),
        Write(u64, Blocks, u64),
        Sync(u64),
    }

    /// A device in memory that ends requests in the order the test picks.
    struct ModelDisk {
        pool: Pool,
        blocks: HashMap<u64, Vec<u8>>,
        pending: Vec<Pending>,
        broken_reads: bool,
    }

    impl ModelDisk {
        fn new() -> ModelDisk {
            let config = RegionConfig { cores: 1, chunks_per_core: 64, headers_per_core: 64 };
            let pool = Region::new(config).unwrap().pool(0).unwrap();
            ModelDisk { pool, blocks: HashMap::new(), pending: Vec::new(), broken_reads: false }
        }

        /// Ends one pending request: (token, blocks, result).
        fn end(&mut self, pick: usize) -> (u64, Blocks, Result<(), IoError>) {
            match self.pending.remove(pick % self.pending.len()) {
                Pending::Read(_, blocks, token) if self.broken_reads => (token, blocks, Err(ERROR)),
                Pending::Read(offset, mut blocks, token) => {
                    for i in 0..blocks.len() {
                        let at = offset + (i * BLOCK_BYTES) as u64;
                        let bytes = self.blocks.get(&at).cloned().unwrap_or(vec![0; BLOCK_BYTES]);
                        self.pool.bytes_mut(blocks.get_mut(i)).copy_from_slice(&bytes);
                    }
                    (token, blocks, Ok(()))
                }
                Pending::Write(offset, blocks, token) => {
                    for (i, chunk) in blocks.iter().enumerate() {
                        let bytes = self.pool.region().bytes(chunk).to_vec();
                        self.blocks.insert(offset + (i * BLOCK_BYTES) as u64, bytes);
                    }
                    (token, blocks, Ok(()))
                }
                Pending::Sync(token) => (token, Blocks::new(), Ok(())),
            }
        }
    }

    impl Disk for ModelDisk {
        fn read(&mut self, offset_bytes: u64, blocks: Blocks, token: u64) {
            self.pending.push(Pending::Read(offset_bytes, blocks, token));
        }
        fn write(&mut self, offset_bytes: u64, blocks: Blocks, until: Durable, token: u64) {
            assert_eq!(until, Durable::AtEnd, "there is no sync before the answer");
            self.pending.push(Pending::Write(offset_bytes, blocks, token));
        }
        fn sync(&mut self, token: u64) {
            self.pending.push(Pending::Sync(token));
        }
        fn pool(&mut self) -> &mut Pool {
            &mut self.pool
        }
    }

    struct Bench {
        disk: ModelDisk,
        store: LinearStore,
        volume: Arc<Placement>,
    }

    impl Bench {
        /// A volume of two extents that lie apart, in the wrong order.
        fn new() -> Bench {
            let runs = [Run { first_extent: 3, extents: 1 }, Run { first_extent: 1, extents: 1 }];
            Bench {
                disk: ModelDisk::new(),
                store: LinearStore::new(4),
                volume: Arc::new(Placement::new(&runs, DATA_OFFSET)),
            }
        }

        fn run(&mut self, operation: Operation, mut pick: usize) -> Outcome {
            let mut outcomes = Vec::new();
            self.store.start(RequestToken(2), &self.volume, operation, &mut self.disk, &mut outcomes);
            while outcomes.is_empty() {
                let (token, blocks, result) = self.disk.end(pick);
                pick /= 2;
                self.store.finished(token, blocks, result, &mut self.disk, &mut outcomes);
            }
            assert_eq!(outcomes.len(), 1, "one outcome for one request");
            assert!(self.disk.pending.is_empty());
            outcomes.pop().unwrap()
        }

        fn chunks(&mut self, count: usize) -> Blocks {
            (0..count).map(|_| self.disk.pool.take_chunk().unwrap()).collect()
        }

        /// Writes sectors as a reactor does: payload at its place in whole blocks.
        fn write(&mut self, lba: u64, data: &[u8], pick: usize) -> Result<(), StoreError> {
            let first_block = lba / 8;
            let head = usize::try_from(lba % 8).unwrap() * 512;
            let count = (head + data.len()).div_ceil(BLOCK_BYTES);
            let mut image = vec![0xdd; count * BLOCK_BYTES];
            image[head..head + data.len()].copy_from_slice(data);
            let mut blocks = self.chunks(count);
            for i in 0..count {
                let bytes = &image[i * BLOCK_BYTES..(i + 1) * BLOCK_BYTES];
                self.disk.pool.bytes_mut(blocks.get_mut(i)).copy_from_slice(bytes);
            }
            let operation = Operation::Write {
                first_block,
                blocks,
                keep_head_bytes: u16::try_from(head).unwrap(),
                keep_tail_bytes: u16::try_from(count * BLOCK_BYTES - head - data.len()).unwrap(),
            };
            let outcome = self.run(operation, pick);
            assert_eq!(outcome.blocks.len(), count);
            release_blocks(&mut self.disk.pool, outcome.blocks);
            outcome.result
        }

        fn read(&mut self, first_block: u64, count: usize, pick: usize) -> Result<Vec<u8>, StoreError> {
            let blocks = self.chunks(count);
            let outcome = self.run(Operation::Read { first_block, blocks }, pick);
            let region = Arc::clone(self.disk.pool.region());
            let bytes = outcome.blocks.iter().flat_map(|chunk| region.bytes(chunk).to_vec()).collect();
            release_blocks(&mut self.disk.pool, outcome.blocks);
            outcome.result.map(|()| bytes)
        }
    }

    #[test]
    fn blocks_lie_where_the_runs_say() {
        let mut bench = Bench::new();
        bench.write(0, &[1; 4096], 0).unwrap();
        bench.write(EXTENT_BLOCKS * 8, &[2; 4096], 0).unwrap();
        assert_eq!(bench.disk.blocks[&(DATA_OFFSET + 3 * EXTENT_BYTES)][0], 1);
        assert_eq!(bench.disk.blocks[&(DATA_OFFSET + EXTENT_BYTES)][0], 2);
    }

    #[test]
    fn beyond_the_volume_nothing_is_touched() {
        let mut bench = Bench::new();
        for first in [2 * EXTENT_BLOCKS - 1, 2 * EXTENT_BLOCKS, u64::MAX / 8] {
            assert_eq!(bench.read(first, 2, 0), Err(StoreError::OutOfRange));
            assert_eq!(bench.write(first * 8 + 1, &[1; 8192], 0), Err(StoreError::OutOfRange));
        }
        assert!(bench.disk.blocks.is_empty());
    }

    #[test]
    fn a_block_that_cannot_be_read_is_not_written_back() {
        let mut bench = Bench::new();
        bench.write(0, &[1; 8192], 0).unwrap();
        bench.disk.broken_reads = true;
        assert_eq!(bench.write(1, &[2; 512], 0), Err(StoreError::Unreadable(ERROR)));
        assert_eq!(bench.write(1, &[2; 8192], 0), Err(StoreError::Unreadable(ERROR)));
        assert_eq!(bench.read(0, 1, 0), Err(StoreError::Unreadable(ERROR)));
        bench.disk.broken_reads = false;
        assert_eq!(bench.read(0, 2, 0).unwrap(), vec![1; 8192]);
        assert_eq!(bench.disk.pool.free_chunks(), bench.disk.pool.chunk_capacity());
    }

    #[test]
    fn without_memory_a_partial_write_fails_and_loses_no_chunk() {
        let mut bench = Bench::new();
        let mut held = Vec::new();
        while bench.disk.pool.free_chunks() > 2 {
            held.push(bench.disk.pool.take_chunk().unwrap());
        }
        assert_eq!(bench.write(1, &[2; 512], 0), Ok(()));
        assert_eq!(bench.write(1, &[2; 7168], 0), Err(StoreError::NoMemory));
        assert_eq!(bench.disk.pool.free_chunks(), 2);
        for chunk in held {
            bench.disk.pool.release(chunk);
        }
    }

    #[test]
    fn flush_syncs() {
        let mut bench = Bench::new();
        assert_eq!(bench.run(Operation::Flush, 0).result, Ok(()));
    }

    proptest! {
        /// Any sectors, aligned or not, across the border of the runs, whatever the order of completion: reads give what
        /// was written, neighbours stay.
        #[test]
        fn sectors_are_what_was_written(
            writes in proptest::collection::vec((0u64..64, 1usize..=16, any::<u8>(), any::<usize>()), 1..40)
        ) {
            let mut bench = Bench::new();
            // Around the border between the two extents.
            let base = EXTENT_BLOCKS * 8 - 40;
            let mut image = vec![0u8; 80 * 512];
            for (at, sectors, byte, pick) in writes {
                let data = vec![byte; sectors * 512];
                let from = usize::try_from(at).unwrap() * 512;
                image[from..from + data.len()].copy_from_slice(&data);
                bench.write(base + at, &data, pick).unwrap();
            }
            for (i, expected) in image.chunks(2 * BLOCK_BYTES).enumerate() {
                let got = bench.read(base / 8 + 2 * i as u64, 2, i).unwrap();
                prop_assert_eq!(&got[..expected.len()], expected);
            }
            prop_assert_eq!(bench.disk.pool.free_chunks(), bench.disk.pool.chunk_capacity());
        }
    }
}
