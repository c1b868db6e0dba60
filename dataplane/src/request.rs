//! The requests that a core has in progress, in a table made at start.
//!
//! A request is admitted when its frame has been read, starts when the range order lets it, and ends when its answer has
//! been queued. Its number serves as its id in the range order and as its token in the store.

use aoe_xdp::link::{Pool, Region, RxFrame};
use aoe_xdp::order::RequestId;
use aoe_xdp::target::{Io, IoKind};
use aoe_xdp::wire::{ATA_DATA_OFFSET, SECTOR_LEN};
use torus_uring::Blocks;

use crate::store::{BLOCK_BYTES, BLOCK_SECTORS, release_blocks};

/// One request.
#[derive(Debug)]
pub struct Request {
    /// What was asked, and the answer's beginning.
    pub io: Io,
    /// The export's key.
    pub export: u32,
    /// Ordinal of the interface it came by.
    pub interface: u8,
    /// Parity of the configuration that it was admitted under.
    pub epoch: u8,
    /// A write's payload, at its place in whole blocks.
    pub payload: Blocks,
    /// When its frame was read.
    pub arrived_ns: u64,
}

impl Request {
    /// The volume's first block that it touches.
    #[must_use]
    pub fn first_block(&self) -> u64 {
        self.io.lba / BLOCK_SECTORS
    }

    /// The volume's last block that it touches.
    #[must_use]
    pub fn last_block(&self) -> u64 {
        (self.io.lba + u64::from(self.io.sectors).max(1) - 1) / BLOCK_SECTORS
    }

    /// Blocks that it touches.
    #[must_use]
    pub fn block_count(&self) -> usize {
        usize::try_from(self.last_block() - self.first_block() + 1).expect("at most three")
    }

    /// Bytes of its first block before its first sector.
    #[must_use]
    pub fn head_bytes(&self) -> u16 {
        let sectors = u16::try_from(self.io.lba % BLOCK_SECTORS).expect("below eight");
        sectors * 512
    }

    /// Bytes of its data.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        usize::from(self.io.sectors) * SECTOR_LEN
    }

    /// Bytes of its last block behind its last sector.
    #[must_use]
    pub fn tail_bytes(&self) -> u16 {
        let end = usize::from(self.head_bytes()) + self.data_bytes();
        u16::try_from(self.block_count() * BLOCK_BYTES - end).expect("less than a block")
    }
}

/// The table.
#[derive(Debug)]
pub struct Requests {
    slots: Box<[Option<Request>]>,
    free: Vec<u32>,
    /// Requests in progress, by the parity of their configuration.
    by_epoch: [usize; 2],
}

impl Requests {
    /// A table for `requests_max` requests.
    #[must_use]
    pub fn new(requests_max: u32) -> Requests {
        Requests {
            slots: (0..requests_max).map(|_| None).collect(),
            free: (0..requests_max).rev().collect(),
            by_epoch: [0; 2],
        }
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// The request, when the table is full.
    pub fn insert(&mut self, request: Request) -> Result<RequestId, Request> {
        let Some(id) = self.free.pop() else { return Err(request) };
        self.by_epoch[usize::from(request.epoch & 1)] += 1;
        self.slots[id as usize] = Some(request);
        Ok(RequestId(id))
    }

    /// A request in progress.
    ///
    /// # Panics
    /// If there is none of that number.
    pub fn get_mut(&mut self, id: RequestId) -> &mut Request {
        self.slots[id.0 as usize].as_mut().expect("a request in progress")
    }

    /// Takes a request out.
    ///
    /// # Panics
    /// If there is none of that number.
    pub fn remove(&mut self, id: RequestId) -> Request {
        let request = self.slots[id.0 as usize].take().expect("a request in progress");
        self.by_epoch[usize::from(request.epoch & 1)] -= 1;
        self.free.push(id.0);
        request
    }

    /// Requests admitted under configurations of this parity.
    #[must_use]
    pub fn of_epoch(&self, epoch: u8) -> usize {
        self.by_epoch[usize::from(epoch & 1)]
    }

    /// Requests in progress.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_epoch.iter().sum()
    }

    /// Whether nothing is in progress.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Takes chunks for `count` blocks; `None` when not as many are free.
pub fn take_blocks(pool: &mut Pool, count: usize) -> Option<Blocks> {
    let mut blocks = Blocks::new();
    for _ in 0..count {
        match pool.take_chunk() {
            Some(chunk) => blocks.push(chunk),
            None => {
                release_blocks(pool, blocks);
                return None;
            }
        }
    }
    Some(blocks)
}

/// Copies a write's data out of its frame to its place in whole blocks. The one copy on the way of a write: receive
/// buffers are too short and too scarce to lend to the disk. `None` when no memory is free.
pub fn copy_payload(pool: &mut Pool, region: &Region, frame: &RxFrame, request: &Request) -> Option<Blocks> {
    debug_assert_eq!(request.io.kind, IoKind::Write);
    let mut blocks = take_blocks(pool, request.block_count())?;
    let mut skip = ATA_DATA_OFFSET;
    let mut left = request.data_bytes();
    let mut at = usize::from(request.head_bytes());
    for segment in frame.segments().iter() {
        let bytes = segment.bytes(region);
        let from = skip.min(bytes.len());
        skip -= from;
        let mut bytes = &bytes[from..];
        bytes = &bytes[..bytes.len().min(left)];
        left -= bytes.len();
        while !bytes.is_empty() {
            let room = BLOCK_BYTES - at % BLOCK_BYTES;
            let (piece, rest) = bytes.split_at(room.min(bytes.len()));
            pool.copy_in(blocks.get_mut(at / BLOCK_BYTES), at % BLOCK_BYTES, piece);
            at += piece.len();
            bytes = rest;
        }
    }
    assert_eq!(left, 0, "the target has checked that the frame holds its data");
    Some(blocks)
}
