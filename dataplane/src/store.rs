//! The store trait: what a reactor asks of a device, and what a device answers, without I/O.
//!
//! A store is a state machine. Requests and ended disk requests go in; disk requests and outcomes come out, so that the
//! same code runs on io_uring, inline on memory, and on a simulated disk. Invariants that every implementation keeps:
//! * The outcome of a write is `Ok` only when its bytes are on stable media (I3).
//! * Every request ends with exactly one outcome, which hands back as many chunks as came with it: a read's own ones,
//!   filled, and for a write whatever it was written from.
//! * A write's chunks are only read, so that the caller may keep handles to them.
//! * Ranges of concurrent requests never conflict: the caller orders them first (I6), so a read-modify-write needs no
//!   lock of its own.
//! * Blocks that could not be read are never written back, and never given to the caller as data (I7).

pub mod extent;

use af_xdp::region::{Chunk, Pool};
use torus_uring::{Blocks, IoError};

/// Bytes of a block, the unit of checksums, of read-modify-write, and of buffers.
pub const BLOCK_BYTES: usize = torus_uring::BLOCK_BYTES;
/// Sectors of a block.
pub const BLOCK_SECTORS: u64 = 8;
/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of an extent, the unit of allocation.
pub const EXTENT_BYTES: u64 = 4 << 20;
/// Sectors of an extent.
pub const EXTENT_SECTORS: u64 = EXTENT_BYTES / SECTOR_BYTES;

/// The request that an outcome belongs to: the reactor's own number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestToken(pub u32);

/// CRC32C of the first blocks of a write, where whoever copied the data has computed it.
pub type Crcs = [Option<u32>; torus_uring::BLOCKS_MAX];

/// What a reactor asks of a store. Blocks are those of the volume; `blocks` hold one chunk for each.
#[derive(Debug)]
pub enum Operation {
    /// Fill the chunks.
    Read {
        /// The volume's first block to read.
        first_block: u64,
        /// One chunk for each block.
        blocks: Blocks,
    },
    /// Write what the chunks hold, but for `keep_head_bytes` of the first and `keep_tail_bytes` of the last block, which
    /// keep what they have on the device.
    Write {
        /// The volume's first block to write.
        first_block: u64,
        /// One chunk for each block, the payload at its place in them.
        blocks: Blocks,
        /// Bytes at the beginning of the first block that are not part of the write, below [`BLOCK_BYTES`].
        keep_head_bytes: u16,
        /// Bytes at the end of the last block that are not part of the write, below [`BLOCK_BYTES`].
        keep_tail_bytes: u16,
        /// What is known of the blocks; never of one that is written in part.
        crcs: Crcs,
    },
    /// Take blocks from the volume: they read as zeros afterwards, and their room is free where a whole extent goes.
    Unmap {
        /// The first block.
        first_block: u64,
        /// How many.
        count: u64,
    },
    /// Force everything acknowledged to stable media.
    Flush,
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The device could not read what is needed.
    #[error("cannot be read: {0}")]
    Unreadable(IoError),
    /// The device could not write or sync.
    #[error("cannot be written: {0}")]
    Unwritable(IoError),
    /// No frame memory is free for a read-modify-write; the initiator's retry will find some.
    #[error("no frame memory is free")]
    NoMemory,
    /// The blocks lie beyond what the volume has on this store.
    #[error("beyond the end of the volume")]
    OutOfRange,
    /// What the device gave is not what was written.
    #[error("the checksum does not match")]
    Corrupt {
        /// The region was being written when the store last crashed: another copy decides what it holds.
        suspect: bool,
    },
    /// The block was written once, and no good copy of it is left.
    #[error("no good copy is left")]
    Lost,
    /// The volume's head is not here any more: whoever asked asks the new one.
    #[error("the volume's head is not here any more")]
    NoHead,
    /// No extent is free for a part of the volume that was never written.
    #[error("the store is full")]
    NoSpace,
}

/// The end of a request.
#[derive(Debug)]
pub struct Outcome {
    /// Whose it is.
    pub request: RequestToken,
    /// Chunks for the caller to use or to release: see the module's head.
    pub blocks: Blocks,
    /// How it ended.
    pub result: Result<(), StoreError>,
}

/// When a write to the device must be on stable media.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durable {
    /// On stable media when the request ends.
    AtEnd,
    /// After the next sync that begins when the request has ended.
    AtSync,
}

/// The device under a store, as the reactor gives it: takes requests, never waits. The end of each comes back through
/// [`Store::finished`] with its token. Their number is bounded by the implementation of the store; what a core has beyond
/// [`DISK_REQUESTS_MAX`](crate::reactor::DISK_REQUESTS_MAX) in flight waits for its turn, in the order it was given.
pub trait Disk {
    /// Reads blocks from byte `offset_bytes` on.
    fn read(&mut self, offset_bytes: u64, blocks: Blocks, token: u64);
    /// Writes blocks from byte `offset_bytes` on, to be on stable media by `until`.
    fn write(&mut self, offset_bytes: u64, blocks: Blocks, until: Durable, token: u64);
    /// Forces to stable media everything whose write has ended before.
    fn sync(&mut self, token: u64);
    /// The frame memory of this core.
    fn pool(&mut self) -> &mut Pool;
}

/// A store, or one core's part of it.
pub trait Store {
    /// Where a volume lies on the store.
    type Volume;

    /// Begins a request on a volume.
    fn start(
        &mut self,
        request: RequestToken,
        volume: &Self::Volume,
        operation: Operation,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    );

    /// Goes on after a disk request has ended.
    fn finished(
        &mut self,
        token: u64,
        blocks: Blocks,
        result: Result<(), IoError>,
        disk: &mut impl Disk,
        outcomes: &mut Vec<Outcome>,
    );

    /// Ends a batch of calls: sends to the device what the store has gathered. `now_ns` is of any clock that does not go back.
    fn turn(&mut self, now_ns: u64, disk: &mut impl Disk, outcomes: &mut Vec<Outcome>) {
        let _nothing_gathered = (now_ns, disk, outcomes);
    }
}

/// Copies a part of the payload's block at `index` into `old`, which takes its place. The payload's own chunk is only read:
/// its owner may have kept a handle to it.
pub(crate) fn put_into(
    pool: &mut Pool,
    payload: &mut Blocks,
    index: usize,
    part: std::ops::Range<usize>,
    mut old: Chunk,
) {
    let region = std::sync::Arc::clone(pool.region());
    let chunk: &Chunk = payload.get_mut(index);
    pool.copy_in(&mut old, part.start, &region.bytes(chunk)[part]);
    let copied = payload.replace(index, old);
    pool.release(copied);
}

/// Gives all chunks back to this core's pool.
pub fn release_blocks(pool: &mut Pool, mut blocks: Blocks) {
    while let Some(chunk) = blocks.pop() {
        pool.release(chunk);
    }
}
