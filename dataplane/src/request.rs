//! The requests that a core has in progress, in tables made at start.
//!
//! A request is a contiguous range of one export that is read or written as one, and its *riders* are the AoE requests
//! that it answers: the one that it was made for, neighbours that were merged with it, and duplicates. A request is
//! admitted when the first rider's frame has been read, starts when the range order lets it and its device has room, and
//! ends when all riders have their answers. Its number serves as its id in the range order and as its token in the store.
//!
//! Invariants:
//! * A write's riders cover its range without a gap, and where two overlap they bring the same bytes: so any order among
//!   them gives the same image.
//! * Riders are answered in their order of arrival.

use aoe_xdp::link::{Pool, Region, RxFrame};
use aoe_xdp::order::RequestId;
use aoe_xdp::target::{Io, IoKind};
use aoe_xdp::wire::{ATA_DATA_OFFSET, SECTOR_LEN};
use cluster_map::VolumeId;
use torus_uring::{BLOCKS_MAX, Blocks};

use crate::clients::ClientId;
use crate::store::{BLOCK_BYTES, BLOCK_SECTORS, Crcs, release_blocks};

/// Riders of one request: every sector of three blocks asked for by itself, and a few duplicates. A chunk of frame memory
/// takes as many handles.
pub const RIDERS_PER_REQUEST_MAX: u8 = 32;

const NONE: u32 = u32::MAX;

/// In place of a configuration's parity: the request is for a volume's head, which may keep it, and what waits behind it, for as long as a
/// member is silent. No configuration waits for that: what one names – stores, positions, keys – the request does not need, since it
/// names its head itself.
pub const FOR_HEAD: u8 = 2;

/// Sectors of a volume, side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first sector.
    pub lba: u64,
    /// How many; 0 for a flush.
    pub sectors: u8,
}

impl Range {
    /// What an AoE request asks for.
    #[must_use]
    pub fn of(io: &Io) -> Range {
        Range { lba: io.lba, sectors: io.sectors }
    }

    /// The sector behind the last.
    #[must_use]
    pub fn end(self) -> u64 {
        self.lba + u64::from(self.sectors)
    }

    /// The volume's first block that it touches.
    #[must_use]
    pub fn first_block(self) -> u64 {
        self.lba / BLOCK_SECTORS
    }

    /// The volume's last block that it touches.
    #[must_use]
    pub fn last_block(self) -> u64 {
        (self.lba + u64::from(self.sectors).max(1) - 1) / BLOCK_SECTORS
    }

    /// Blocks that it touches.
    #[must_use]
    pub fn block_count(self) -> usize {
        usize::try_from(self.last_block() - self.first_block() + 1).expect("a few")
    }

    /// Bytes of its first block before its first sector.
    #[must_use]
    pub fn head_bytes(self) -> u16 {
        let sectors = u16::try_from(self.lba % BLOCK_SECTORS).expect("below eight");
        sectors * 512
    }

    /// Bytes of its data.
    #[must_use]
    pub fn data_bytes(self) -> usize {
        usize::from(self.sectors) * SECTOR_LEN
    }

    /// Bytes of its last block behind its last sector.
    #[must_use]
    pub fn tail_bytes(self) -> u16 {
        let end = usize::from(self.head_bytes()) + self.data_bytes();
        u16::try_from(self.block_count() * BLOCK_BYTES - end).expect("less than a block")
    }

    /// Whether it consists of whole blocks.
    #[must_use]
    pub fn is_whole_blocks(self) -> bool {
        self.head_bytes() == 0 && self.tail_bytes() == 0
    }

    /// Whether every sector of `part` is one of its own.
    #[must_use]
    pub fn covers(self, part: Range) -> bool {
        self.lba <= part.lba && part.end() <= self.end()
    }

    /// Whether `other` begins where it ends, or ends where it begins.
    #[must_use]
    pub fn adjoins(self, other: Range) -> bool {
        self.end() == other.lba || other.end() == self.lba
    }

    /// The shortest range that covers both; `None` when that is longer than any request.
    #[must_use]
    pub fn joined(self, other: Range) -> Option<Range> {
        let lba = self.lba.min(other.lba);
        let sectors = u8::try_from(self.end().max(other.end()) - lba).ok()?;
        Some(Range { lba, sectors })
    }
}

/// One AoE request.
#[derive(Debug)]
pub struct Rider {
    /// What was asked, and the answer's beginning.
    pub io: Io,
    /// Ordinal of the interface it came by.
    pub interface: u8,
    /// When its frame was read.
    pub arrived_ns: u64,
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// What is done.
    pub kind: IoKind,
    /// The export's key.
    pub export: u32,
    /// Who asked for it.
    pub client: ClientId,
    /// Parity of the configuration that it was admitted under; [`FOR_HEAD`] if a head is to have it.
    pub epoch: u8,
    /// The head that its export was served by when it was admitted, by volume and take-over; `None` where a store is behind it. It is for
    /// no other one.
    pub head: Option<(VolumeId, u64)>,
    /// The store has it.
    pub started: bool,
    /// It was made for a part of a block, and takes in neighbours while it has not started.
    pub growing: bool,
    /// Position of the device whose turn it took.
    pub device: usize,
    /// What its riders ask for.
    pub range: Range,
    /// A write's payload, at its place in whole blocks; kept to compare duplicates with.
    pub payload: Blocks,
    /// What is known of the payload's whole blocks.
    pub crcs: Crcs,
    riders: Riders,
}

/// The riders of one request: a chain.
#[derive(Debug, Clone, Copy)]
struct Riders {
    first: u32,
    last: u32,
    count: u8,
}

impl Request {
    /// A request without a rider yet.
    #[must_use]
    pub fn new(io: &Io, export: u32, client: ClientId, epoch: u8) -> Request {
        let range = Range::of(io);
        Request {
            kind: io.kind,
            export,
            client,
            epoch,
            head: None,
            started: false,
            growing: !range.is_whole_blocks(),
            device: 0,
            range,
            payload: Blocks::new(),
            crcs: Crcs::default(),
            riders: Riders { first: NONE, last: NONE, count: 0 },
        }
    }

    /// How many riders it has.
    #[must_use]
    pub fn rider_count(&self) -> u8 {
        self.riders.count
    }
}

#[derive(Debug)]
struct RiderSlot {
    rider: Option<Rider>,
    next: u32,
}

/// The tables.
#[derive(Debug)]
pub struct Requests {
    slots: Box<[Option<Request>]>,
    free: Vec<u32>,
    riders: Box<[RiderSlot]>,
    riders_free: Vec<u32>,
    /// Requests in progress, by the parity of their configuration.
    by_epoch: [usize; 3],
}

impl Requests {
    /// Tables for so many requests and riders.
    #[must_use]
    pub fn new(requests_max: u32, riders_max: u32) -> Requests {
        Requests {
            slots: (0..requests_max).map(|_| None).collect(),
            free: (0..requests_max).rev().collect(),
            riders: (0..riders_max).map(|_| RiderSlot { rider: None, next: NONE }).collect(),
            riders_free: (0..riders_max).rev().collect(),
            by_epoch: [0; 3],
        }
    }

    /// AoE requests that can be taken in for sure.
    #[must_use]
    pub fn room(&self) -> u32 {
        u32::try_from(self.free.len().min(self.riders_free.len())).expect("numbers are 32 bits")
    }

    /// Takes a request in with its first rider.
    ///
    /// # Errors
    /// The request, when there is no [room](Requests::room).
    #[expect(clippy::result_large_err, reason = "it goes back as it came, to be released")]
    pub fn insert(&mut self, request: Request, rider: Rider) -> Result<RequestId, Request> {
        if self.room() == 0 {
            return Err(request);
        }
        let Some(id) = self.free.pop() else { return Err(request) };
        self.by_epoch[usize::from(request.epoch)] += 1;
        self.slots[id as usize] = Some(request);
        let id = RequestId(id);
        let added = self.add_rider(id, rider);
        debug_assert!(added, "there is room");
        Ok(id)
    }

    /// Puts a rider behind a request's others; false when there is no room for it.
    ///
    /// # Panics
    /// If there is no request of that number.
    pub fn add_rider(&mut self, id: RequestId, rider: Rider) -> bool {
        let request = self.slots[id.0 as usize].as_mut().expect("a request in progress");
        let Some(slot) = self.riders_free.pop() else { return false };
        self.riders[slot as usize] = RiderSlot { rider: Some(rider), next: NONE };
        match std::mem::replace(&mut request.riders.last, slot) {
            NONE => request.riders.first = slot,
            last => self.riders[last as usize].next = slot,
        }
        request.riders.count += 1;
        true
    }

    /// Takes a request's oldest rider out.
    ///
    /// # Panics
    /// If there is no request of that number.
    pub fn take_rider(&mut self, id: RequestId) -> Option<Rider> {
        let request = self.slots[id.0 as usize].as_mut().expect("a request in progress");
        let slot = self.riders.get_mut(request.riders.first as usize)?;
        let rider = slot.rider.take();
        self.riders_free.push(request.riders.first);
        request.riders.count -= 1;
        request.riders.first = slot.next;
        if request.riders.first == NONE {
            request.riders.last = NONE;
        }
        rider
    }

    /// Whether a rider of the request asks for exactly this.
    pub fn has_rider_for(&self, id: RequestId, range: Range) -> bool {
        let mut at = self.get(id).riders.first;
        while let Some(slot) = self.riders.get(at as usize) {
            if slot.rider.as_ref().is_some_and(|rider| Range::of(&rider.io) == range) {
                return true;
            }
            at = slot.next;
        }
        false
    }

    /// A request in progress.
    ///
    /// # Panics
    /// If there is none of that number.
    #[must_use]
    pub fn get(&self, id: RequestId) -> &Request {
        self.slots[id.0 as usize].as_ref().expect("a request in progress")
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
    /// If there is none of that number, or it has riders.
    pub fn remove(&mut self, id: RequestId) -> Request {
        let request = self.slots[id.0 as usize].take().expect("a request in progress");
        assert_eq!(request.riders.count, 0, "every rider has left");
        self.by_epoch[usize::from(request.epoch)] -= 1;
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

/// Another handle to each chunk.
pub fn share_blocks(pool: &mut Pool, blocks: &Blocks) -> Blocks {
    blocks.iter().map(|chunk| pool.share(chunk)).collect()
}

/// Where the data of a write for `part` lies: pieces of the frame, each with its block of `whole` and its place there.
fn data_pieces<'f>(
    region: &'f Region,
    frame: &'f RxFrame,
    part: Range,
    whole: Range,
) -> impl Iterator<Item = (usize, usize, &'f [u8])> {
    let mut skip = ATA_DATA_OFFSET;
    let mut left = part.data_bytes();
    let sectors_before = part.lba - whole.first_block() * BLOCK_SECTORS;
    let mut at = usize::try_from(sectors_before).expect("less than a request") * SECTOR_LEN;
    let mut segments = frame.segments().iter();
    let mut bytes: &[u8] = &[];
    std::iter::from_fn(move || {
        while left > 0 && bytes.is_empty() {
            bytes =
                segments.next().expect("the target has checked that the frame holds its data").bytes(region);
            let from = skip.min(bytes.len());
            skip -= from;
            bytes = &bytes[from..];
        }
        let (block, offset) = (at / BLOCK_BYTES, at % BLOCK_BYTES);
        let (piece, rest) = bytes.split_at(bytes.len().min(left).min(BLOCK_BYTES - offset));
        bytes = rest;
        left -= piece.len();
        at += piece.len();
        (!piece.is_empty()).then_some((block, offset, piece))
    })
}

/// Copies the data of a write for `part` out of its frame to its place in the blocks of `whole`. The one copy on the way of
/// a write: receive buffers are too short and too scarce to lend to the disk. Gives the CRC32C of each block that the part has
/// whole, computed while its bytes are at hand.
pub fn copy_payload(
    pool: &mut Pool,
    frame: &RxFrame,
    part: Range,
    whole: Range,
    blocks: &mut Blocks,
) -> Crcs {
    let region = std::sync::Arc::clone(pool.region());
    let mut sums = [(0, 0); BLOCKS_MAX];
    for (block, offset, piece) in data_pieces(&region, frame, part, whole) {
        let (crc, len) = sums[block];
        let crc = pool.copy_in_checksummed(blocks.get_mut(block), offset, piece, crc);
        sums[block] = (crc, len + piece.len());
    }
    sums.map(|(crc, len)| (len == BLOCK_BYTES).then_some(crc))
}

/// Whether a frame brings, for `part`, the very bytes that the blocks of `whole` hold.
#[must_use]
pub fn is_same_payload(region: &Region, frame: &RxFrame, part: Range, whole: Range, blocks: &Blocks) -> bool {
    data_pieces(region, frame, part, whole).all(|(block, offset, piece)| {
        let chunk = blocks.iter().nth(block).expect("the part is covered");
        region.bytes(chunk)[offset..offset + piece.len()] == *piece
    })
}
