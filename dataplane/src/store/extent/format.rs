//! What an extent store has on its device: layout, structures, and their codec. Everything is little-endian, in blocks of
//! 4 KiB. `docs/on-disk-format.md` describes each field; a change here is a change there, and a new [`VERSION`].
//!
//! ```text
//! byte 0, 64 KiB, 128 KiB, 192 KiB   superblock, four copies
//! 256 KiB                            catalog of volumes, slots A and B (1 MiB each)
//! 2304 KiB                           for each shard: checkpoint A, checkpoint B, journal
//! first segment                      sum pages (two for each extent slot), then extent slots of 4 MiB
//! further segments                   the same, one for each time that the store has grown
//! ```
//!
//! Invariants:
//! * Decoding is total: bytes that no encoder made are an error, never a panic and never a wild length.
//! * Every structure carries a checksum over all its bytes, and what ties it to its store and place, so that a copy of it
//!   somewhere else is not taken for it.

mod state;

use cluster_map::{ClusterId, NodeId, StoreId};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::store::{BLOCK_BYTES, EXTENT_BYTES};

pub use self::state::{EPOCHS_MAX, Epochs, LayerState, ReplicaState, STATE_UNITS_MAX};

/// Layout version that this code writes; the only one that it reads.
pub const VERSION: u32 = 3;
/// Bytes of a block, as file offsets count.
pub const BLOCK: u64 = BLOCK_BYTES as u64;
/// Blocks of an extent.
pub const EXTENT_BLOCKS: u32 = 1 << 10;
const _: () = assert!(EXTENT_BLOCKS as u64 * BLOCK == EXTENT_BYTES);
/// Where the superblock copies are.
pub const SUPERBLOCK_OFFSETS: [u64; 4] = [0, 64 << 10, 128 << 10, 192 << 10];
/// Bytes of one catalog slot.
pub const CATALOG_BYTES: usize = 1 << 20;
/// Where the catalog slots are.
pub const CATALOG_OFFSETS: [u64; 2] = [256 << 10, (256 << 10) + CATALOG_BYTES as u64];
/// Where the first shard's area begins.
pub const SHARDS_OFFSET: u64 = (256 << 10) + 2 * CATALOG_BYTES as u64;
/// The smallest device that is accepted: room for the tables and a dozen extents.
pub const DEVICE_BYTES_MIN: u64 = 64 << 20;
/// Most shards of a store.
pub const SHARDS_MAX: u16 = 64;
/// Most segments of a store: one, and one for each growth.
pub const SEGMENTS_MAX: usize = 8;
/// A store can grow to so many times the extents that it was formatted with: the checkpoints have room for them.
pub const GROWTH_MAX: u32 = 4;
/// Shortest journal of a shard, blocks.
pub const JOURNAL_BLOCKS_MIN: u32 = 1 << 9;
/// Longest journal of a shard, blocks (256 MiB): beyond it a longer journal only makes opening slower.
pub const JOURNAL_BLOCKS_MAX: u32 = 1 << 16;
/// Numbers that grow by one stay below this: no writer ever comes near it, and who counts on does not overflow.
pub const COUNT_END: u64 = 1 << 63;
/// Records of a batch, at most, if none of them are neighbours: those share what they have in common, see [`Packing`].
pub const RECORDS_MAX: usize = (BLOCK_BYTES - BATCH_HEADER_BYTES) / RECORD_BYTES;
/// Fewest and most blocks of a checkpoint for states of replicas, where a store's size says how many: each has room for one of the
/// largest, and for five of 64 epochs.
const STATE_BLOCKS: std::ops::RangeInclusive<u32> = 8..=256;
/// Most data blocks of a batch: long enough to spread the cost of a sync, short enough that the next batch starts soon.
pub const BATCH_BLOCKS_MAX: usize = 128;

const SUPERBLOCK_MAGIC: [u8; 8] = *b"TORUSEXT";
const CHECKPOINT_MAGIC: [u8; 8] = *b"TORUSCKP";
const BATCH_MAGIC: [u8; 4] = *b"TJRN";

/// Bytes at the beginning of a batch's header block.
const BATCH_HEADER_BYTES: usize = 128;
/// Bytes of a record, and of each unit of one that takes several.
pub const RECORD_BYTES: usize = 24;
/// Bytes of a replica's state without its epochs.
const RAW_STATE_BYTES: usize = 40;
const _: () = assert!(STATE_UNITS_MAX <= RECORDS_MAX, "a batch has room for a state");
const _: () = assert!(STATE_UNITS_MAX * RECORD_BYTES <= BLOCK_BYTES, "a block has room for a state");
/// Bytes of an entry of a checkpoint.
pub const ENTRY_BYTES: usize = 32;
const ENTRIES_PER_BLOCK: usize = BLOCK_BYTES / ENTRY_BYTES;

/// A secret number of the store, in every batch: what an initiator writes can never look like a batch of this store.
pub type JournalKey = [u8; 16];

/// Why bytes are not a part of an extent store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The magic is another one.
    #[error("no Torus store is here")]
    Magic,
    /// The checksum differs.
    #[error("the checksum is wrong")]
    Checksum,
    /// Another version wrote it.
    #[error(
        "it has layout version {found}, and this program reads version {VERSION}: use the program that wrote it"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// Lengths or places that do not fit together.
    #[error("its lengths do not fit together")]
    Length,
    /// It belongs to another store, shard or place.
    #[error("it belongs somewhere else")]
    Misplaced,
    /// A value that no writer gives.
    #[error("it holds a value that has no meaning")]
    Value,
}

/// Whether a structure is one of ours, is what was written, and is of the version that is read, in this order. `crc` is
/// computed over all of it with its checksum field zero.
fn check_head(
    is_ours: bool,
    stored: U32,
    crc: impl FnOnce() -> u32,
    version: U32,
) -> Result<(), FormatError> {
    if !is_ours {
        return Err(FormatError::Magic);
    }
    if crc() != stored.get() {
        return Err(FormatError::Checksum);
    }
    if version.get() != VERSION {
        return Err(FormatError::Version { found: version.get() });
    }
    Ok(())
}

// -------------------------------------------------------------------------------------------------------------------
// Superblock

/// Extent slots that were made at one time, with their sum pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Where the sum pages begin, bytes.
    pub pages_offset: u64,
    /// Where the slots begin, bytes.
    pub data_offset: u64,
    /// How many slots; 0 where there is no such segment.
    pub slots: u32,
}

/// What a store says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// Its own id.
    pub store: StoreId,
    /// The node that formatted it.
    pub node: NodeId,
    /// Grows whenever the store may have lost something that it cannot name (I13).
    pub incarnation: u64,
    /// How often it was opened for writing. Durable before the first write of each time.
    pub open_count: u64,
    /// Size of the device when it was formatted or last grown.
    pub device_bytes: u64,
    /// Shards, fixed at format.
    pub shards: u16,
    /// Blocks of each shard's journal.
    pub journal_blocks: u32,
    /// Blocks of each checkpoint, its header among them.
    pub checkpoint_blocks: u32,
    /// How many of those are room for states of replicas.
    pub state_blocks: u32,
    /// Regions in the activity log of a shard; more only while none of them can leave it.
    pub active_max: u32,
    /// See [`JournalKey`].
    pub journal_key: JournalKey,
    /// The extent slots.
    pub segments: [Segment; SEGMENTS_MAX],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSegment {
    pages_offset: U64,
    data_offset: U64,
    slots: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    cluster: [u8; 16],
    store: [u8; 16],
    node: [u8; 16],
    incarnation: U64,
    open_count: U64,
    device_bytes: U64,
    shards: U16,
    reserved_shards: U16,
    journal_blocks: U32,
    checkpoint_blocks: U32,
    active_max: U32,
    journal_key: [u8; 16],
    segments: [RawSegment; SEGMENTS_MAX],
    state_blocks: U32,
    reserved: [u8; BLOCK_BYTES - 316],
}
const _: () = assert!(size_of::<RawSegment>() == 24);
const _: () = assert!(size_of::<RawSuperblock>() == BLOCK_BYTES);

/// What a store is to look like, where it is not derived from the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shape {
    /// Shards; `None` for as many as suit the size.
    pub shards: Option<u16>,
    /// Blocks of each journal; `None` for as many as suit the size.
    pub journal_blocks: Option<u32>,
}

impl Superblock {
    /// The superblock of a fresh store on a device of `device_bytes`; `None` where not one extent fits.
    #[must_use]
    pub fn new(
        cluster: ClusterId,
        node: NodeId,
        store: StoreId,
        journal_key: JournalKey,
        device_bytes: u64,
        shape: Shape,
    ) -> Option<Superblock> {
        // A shard for each core that a device of this size may keep busy, and never so many that small journals eat a
        // small store.
        let suited = match device_bytes >> 30 {
            0 => 2,
            1..64 => 8,
            _ => 16,
        };
        let shards = shape.shards.unwrap_or(suited).clamp(1, SHARDS_MAX);
        let suited = device_bytes / 64 / u64::from(shards) / BLOCK;
        let suited = u32::try_from(suited).unwrap_or(u32::MAX).clamp(JOURNAL_BLOCKS_MIN, JOURNAL_BLOCKS_MAX);
        let journal_blocks =
            shape.journal_blocks.unwrap_or(suited).clamp(JOURNAL_BLOCKS_MIN, JOURNAL_BLOCKS_MAX);
        let extents_max = u32::try_from((device_bytes / EXTENT_BYTES).min(u64::from(u32::MAX / GROWTH_MAX)));
        let entries_max = extents_max.expect("clamped").checked_mul(GROWTH_MAX)?;
        // A volume has an extent or more of the store, in the long run: one block for each extent that a shard may have.
        let suited = device_bytes / EXTENT_BYTES / u64::from(shards);
        let state_blocks =
            u32::try_from(suited).unwrap_or(u32::MAX).clamp(*STATE_BLOCKS.start(), *STATE_BLOCKS.end());
        let entry_blocks = entries_max.div_ceil(u32::try_from(ENTRIES_PER_BLOCK).expect("a few"));
        let checkpoint_blocks = 1 + entry_blocks + state_blocks;
        let mut superblock = Superblock {
            cluster,
            store,
            node,
            incarnation: 1,
            open_count: 0,
            device_bytes,
            shards,
            journal_blocks,
            checkpoint_blocks,
            state_blocks,
            active_max: 1024,
            journal_key,
            segments: [Segment::default(); SEGMENTS_MAX],
        };
        let begin = superblock.shards_end();
        superblock.segments[0] = segment(begin, device_bytes)?;
        Some(superblock)
    }

    /// The same store with the room that its device has gained since; `None` where there is none, or no way to use it.
    #[must_use]
    pub fn grown(&self, device_bytes: u64) -> Option<Superblock> {
        let at = self.segments.iter().position(|segment| segment.slots == 0)?;
        let last = self.segments[..at].last()?;
        let begin = last.data_offset + u64::from(last.slots) * EXTENT_BYTES;
        let room = self.entries_max().checked_sub(self.slots())?;
        let mut grown = self.clone();
        grown.segments[at] = segment(begin, device_bytes)?;
        grown.segments[at].slots = grown.segments[at].slots.min(room);
        grown.device_bytes = device_bytes;
        (grown.segments[at].slots > 0).then_some(grown)
    }

    /// Extent slots of all segments.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.segments.iter().map(|segment| segment.slots).sum()
    }

    /// Entries that a checkpoint has room for.
    #[must_use]
    pub fn entries_max(&self) -> u32 {
        (self.checkpoint_blocks - 1 - self.state_blocks) * u32::try_from(ENTRIES_PER_BLOCK).expect("a few")
    }

    /// Units of a record that a checkpoint has room for in states of replicas.
    #[must_use]
    pub fn state_units_max(&self) -> usize {
        self.state_blocks as usize * BLOCK_BYTES / RECORD_BYTES
    }

    /// Where a checkpoint of a shard is, bytes; `which` is 0 or 1.
    #[must_use]
    pub fn checkpoint_offset(&self, shard: u16, which: usize) -> u64 {
        self.shard_offset(shard) + which as u64 * u64::from(self.checkpoint_blocks) * BLOCK
    }

    /// Where the journal of a shard begins, bytes.
    #[must_use]
    pub fn journal_offset(&self, shard: u16) -> u64 {
        self.checkpoint_offset(shard, 2)
    }

    fn shard_offset(&self, shard: u16) -> u64 {
        SHARDS_OFFSET + u64::from(shard) * self.shard_bytes()
    }

    fn shard_bytes(&self) -> u64 {
        (2 * u64::from(self.checkpoint_blocks) + u64::from(self.journal_blocks)) * BLOCK
    }

    fn shards_end(&self) -> u64 {
        self.shard_offset(self.shards)
    }

    /// The segment of a slot, and the slot's number in it.
    fn segment_of(&self, slot: u32) -> Option<(&Segment, u32)> {
        let mut rest = slot;
        for segment in &self.segments {
            if rest < segment.slots {
                return Some((segment, rest));
            }
            rest -= segment.slots;
        }
        None
    }

    /// Where a slot's data begin, bytes.
    ///
    /// # Panics
    /// If the store has no such slot.
    #[must_use]
    pub fn data_offset(&self, slot: u32) -> u64 {
        let (segment, at) = self.segment_of(slot).expect("a slot of this store");
        segment.data_offset + u64::from(at) * EXTENT_BYTES
    }

    /// Where one of a slot's two sum pages is, bytes; `which` is 0 or 1.
    ///
    /// # Panics
    /// If the store has no such slot.
    #[must_use]
    pub fn page_offset(&self, slot: u32, which: u8) -> u64 {
        let (segment, at) = self.segment_of(slot).expect("a slot of this store");
        segment.pages_offset + (2 * u64::from(at) + u64::from(which)) * BLOCK
    }

    /// The bytes of one copy.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut raw = RawSuperblock {
            magic: SUPERBLOCK_MAGIC,
            version: U32::new(VERSION),
            crc: U32::ZERO,
            cluster: self.cluster.0,
            store: self.store.0,
            node: self.node.0,
            incarnation: U64::new(self.incarnation),
            open_count: U64::new(self.open_count),
            device_bytes: U64::new(self.device_bytes),
            shards: U16::new(self.shards),
            reserved_shards: U16::ZERO,
            journal_blocks: U32::new(self.journal_blocks),
            checkpoint_blocks: U32::new(self.checkpoint_blocks),
            active_max: U32::new(self.active_max),
            journal_key: self.journal_key,
            segments: self.segments.map(|segment| RawSegment {
                pages_offset: U64::new(segment.pages_offset),
                data_offset: U64::new(segment.data_offset),
                slots: U32::new(segment.slots),
                reserved: U32::ZERO,
            }),
            state_blocks: U32::new(self.state_blocks),
            reserved: [0; BLOCK_BYTES - 316],
        };
        raw.crc = U32::new(crc32c::crc32c(raw.as_bytes()));
        raw.as_bytes().to_vec()
    }

    /// Reads one copy.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Superblock, FormatError> {
        let mut raw = RawSuperblock::read_from_prefix(bytes).map_err(|_| FormatError::Length)?.0;
        let stored = std::mem::replace(&mut raw.crc, U32::ZERO);
        let crc = || crc32c::crc32c(raw.as_bytes());
        check_head(raw.magic == SUPERBLOCK_MAGIC, stored, crc, raw.version)?;
        let superblock = Superblock {
            cluster: ClusterId(raw.cluster),
            store: StoreId(raw.store),
            node: NodeId(raw.node),
            incarnation: raw.incarnation.get(),
            open_count: raw.open_count.get(),
            device_bytes: raw.device_bytes.get(),
            shards: raw.shards.get(),
            journal_blocks: raw.journal_blocks.get(),
            checkpoint_blocks: raw.checkpoint_blocks.get(),
            state_blocks: raw.state_blocks.get(),
            active_max: raw.active_max.get(),
            journal_key: raw.journal_key,
            segments: raw.segments.map(|segment| Segment {
                pages_offset: segment.pages_offset.get(),
                data_offset: segment.data_offset.get(),
                slots: segment.slots.get(),
            }),
        };
        superblock.check().then_some(superblock).ok_or(FormatError::Length)
    }

    /// Whether everything lies on the device, in order, without overlap.
    fn check(&self) -> bool {
        let sane = (1..=SHARDS_MAX).contains(&self.shards)
            && (JOURNAL_BLOCKS_MIN..=JOURNAL_BLOCKS_MAX).contains(&self.journal_blocks)
            && self.checkpoint_blocks <= u32::MAX / 256
            && self.state_blocks >= 1
            && self.checkpoint_blocks.checked_sub(self.state_blocks).is_some_and(|others| others >= 2)
            && self.active_max > 0
            && self.open_count < COUNT_END;
        if !sane {
            return false;
        }
        let mut free_from = self.shards_end();
        let mut slots = 0u32;
        let mut ended = false;
        for segment in &self.segments {
            if segment.slots == 0 {
                ended = true;
                continue;
            }
            let count = u64::from(segment.slots);
            let end = |offset: u64, bytes_each: u64| count.checked_mul(bytes_each)?.checked_add(offset);
            let (Some(pages_end), Some(data_end)) =
                (end(segment.pages_offset, 2 * BLOCK), end(segment.data_offset, EXTENT_BYTES))
            else {
                return false;
            };
            let aligned =
                segment.pages_offset.is_multiple_of(BLOCK) && segment.data_offset.is_multiple_of(BLOCK);
            if ended
                || !aligned
                || segment.pages_offset < free_from
                || segment.data_offset < pages_end
                || data_end > self.device_bytes
            {
                return false;
            }
            free_from = data_end;
            let Some(more) = slots.checked_add(segment.slots) else { return false };
            slots = more;
        }
        (1..=self.entries_max()).contains(&slots)
    }
}

/// The largest segment that fits between two bytes of a device; `None` where not one extent does.
fn segment(begin: u64, end: u64) -> Option<Segment> {
    let pages_offset = begin.next_multiple_of(BLOCK);
    // Extents begin at multiples of 2 MiB: no disk has a larger unit that matters, and a file in memory can have them on large
    // pages.
    const ALIGN: u64 = 2 << 20;
    let room = end.checked_sub(pages_offset)?.checked_sub(ALIGN)?;
    let slots = u32::try_from(room / (EXTENT_BYTES + 2 * BLOCK)).unwrap_or(u32::MAX);
    let data_offset = (pages_offset + u64::from(slots) * 2 * BLOCK).next_multiple_of(ALIGN);
    (slots > 0).then_some(Segment { pages_offset, data_offset, slots })
}

// -------------------------------------------------------------------------------------------------------------------
// Sums

/// What is known of a block: one of four states, with the checksum where the block has data.
///
/// A CRC32C of 0, 1 or 2 is kept as 3, 4 or 5, so that the other states need no bits of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sum(pub u32);

impl Sum {
    /// Never written here: the layer below has it, and without one it is zeros.
    pub const ABSENT: Sum = Sum(0);
    /// Zeros, whatever a layer below has.
    pub const ZERO: Sum = Sum(1);
    /// Written once, and no good copy is left.
    pub const LOST: Sum = Sum(2);

    /// That of data with this CRC32C.
    #[must_use]
    pub fn of_crc(crc: u32) -> Sum {
        Sum(if crc < 3 { crc + 3 } else { crc })
    }

    /// That of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Sum {
        Sum::of_crc(af_xdp::checksum::crc32c(bytes))
    }

    /// Whether the block has data.
    #[must_use]
    pub fn is_data(self) -> bool {
        self.0 > 2
    }
}

/// The sums of an extent's blocks.
pub type SumPage = [Sum; EXTENT_BLOCKS as usize];

/// A page of sums as it is on the device.
pub fn encode_page(page: &SumPage, bytes: &mut [u8]) {
    for (bytes, sum) in bytes.chunks_exact_mut(4).zip(page) {
        bytes.copy_from_slice(&sum.0.to_le_bytes());
    }
}

/// Reads a page of sums; any bytes are one.
pub fn decode_page(bytes: &[u8], page: &mut SumPage) {
    for (bytes, sum) in bytes.chunks_exact(4).zip(page) {
        *sum = Sum(u32::from_le_bytes(bytes.try_into().expect("four bytes")));
    }
}

// -------------------------------------------------------------------------------------------------------------------
// Checkpoint

/// The beginning of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckpointHeader {
    /// Grows by one with each checkpoint of the shard.
    pub sequence: u64,
    /// The last batch whose records it holds. Their data are in place and durable.
    pub lsn: u64,
    /// Where in the journal the batch after that one begins, blocks.
    pub tail: u32,
    /// Checksum of the batch `lsn`, that the one after it repeats.
    pub chain: u32,
    /// Entries.
    pub entries: u32,
    /// CRC32C of the entries.
    pub entries_crc: u32,
    /// States of replicas behind the entries.
    pub states: u32,
    /// What they take, units of a record.
    pub state_units: u32,
    /// CRC32C of the states.
    pub states_crc: u32,
    /// The run of the scrub that is or was under way.
    pub scrub_run: u64,
    /// Slots that it has behind it.
    pub scrub_cursor: u32,
    /// Bad blocks that it has found.
    pub scrub_errors: u32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawCheckpoint {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    store: [u8; 16],
    shard: U16,
    which: U16,
    entries: U32,
    sequence: U64,
    lsn: U64,
    tail: U32,
    chain: U32,
    entries_crc: U32,
    scrub_cursor: U32,
    scrub_run: U64,
    scrub_errors: U32,
    states: U32,
    state_units: U32,
    states_crc: U32,
    reserved: [u8; BLOCK_BYTES - 96],
}
const _: () = assert!(size_of::<RawCheckpoint>() == BLOCK_BYTES);

/// Whose a checkpoint or a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardName {
    /// The store.
    pub store: StoreId,
    /// The shard.
    pub shard: u16,
}

impl CheckpointHeader {
    /// Writes the header block of the checkpoint at place `which`.
    pub fn encode(&self, name: ShardName, which: usize, bytes: &mut [u8]) {
        let mut raw = RawCheckpoint {
            magic: CHECKPOINT_MAGIC,
            version: U32::new(VERSION),
            crc: U32::ZERO,
            store: name.store.0,
            shard: U16::new(name.shard),
            which: U16::new(u16::from(which != 0)),
            entries: U32::new(self.entries),
            sequence: U64::new(self.sequence),
            lsn: U64::new(self.lsn),
            tail: U32::new(self.tail),
            chain: U32::new(self.chain),
            entries_crc: U32::new(self.entries_crc),
            scrub_cursor: U32::new(self.scrub_cursor),
            scrub_run: U64::new(self.scrub_run),
            scrub_errors: U32::new(self.scrub_errors),
            states: U32::new(self.states),
            state_units: U32::new(self.state_units),
            states_crc: U32::new(self.states_crc),
            reserved: [0; BLOCK_BYTES - 96],
        };
        raw.crc = U32::new(crc32c::crc32c(raw.as_bytes()));
        bytes[..BLOCK_BYTES].copy_from_slice(raw.as_bytes());
    }

    /// Reads a header block.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(bytes: &[u8], name: ShardName, which: usize) -> Result<CheckpointHeader, FormatError> {
        let mut raw = RawCheckpoint::read_from_prefix(bytes).map_err(|_| FormatError::Length)?.0;
        let stored = std::mem::replace(&mut raw.crc, U32::ZERO);
        let crc = || crc32c::crc32c(raw.as_bytes());
        check_head(raw.magic == CHECKPOINT_MAGIC, stored, crc, raw.version)?;
        if raw.store != name.store.0 || raw.shard.get() != name.shard || usize::from(raw.which.get()) != which
        {
            return Err(FormatError::Misplaced);
        }
        if raw.sequence.get() >= COUNT_END || raw.lsn.get() >= COUNT_END {
            return Err(FormatError::Value);
        }
        Ok(CheckpointHeader {
            sequence: raw.sequence.get(),
            lsn: raw.lsn.get(),
            tail: raw.tail.get(),
            chain: raw.chain.get(),
            entries: raw.entries.get(),
            entries_crc: raw.entries_crc.get(),
            states: raw.states.get(),
            state_units: raw.state_units.get(),
            states_crc: raw.states_crc.get(),
            scrub_run: raw.scrub_run.get(),
            scrub_cursor: raw.scrub_cursor.get(),
            scrub_errors: raw.scrub_errors.get(),
        })
    }
}

/// An extent, as a checkpoint has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The volume's layer, by its number in the catalog.
    pub object: u32,
    /// Which extent of it.
    pub extent: u32,
    /// Where it lies.
    pub slot: u32,
    /// CRC32C of its sum page.
    pub page_crc: u32,
    /// The highest version written to it.
    pub version: u64,
    /// Which of the slot's two sum pages is its own: 0 or 1.
    pub which: u8,
    /// It is in the activity log.
    pub active: bool,
    /// All of it was taken away: it goes when that is on every copy.
    pub hollow: bool,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    object: U32,
    extent: U32,
    slot: U32,
    page_crc: U32,
    version: U64,
    flags: u8,
    reserved: [u8; 7],
}
const _: () = assert!(size_of::<RawEntry>() == ENTRY_BYTES);
const ENTRY_WHICH: u8 = 1;
const ENTRY_ACTIVE: u8 = 2;
const ENTRY_HOLLOW: u8 = 4;

impl Entry {
    /// Appends its bytes.
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        let raw = RawEntry {
            object: U32::new(self.object),
            extent: U32::new(self.extent),
            slot: U32::new(self.slot),
            page_crc: U32::new(self.page_crc),
            version: U64::new(self.version),
            flags: (self.which & 1)
                | if self.active { ENTRY_ACTIVE } else { 0 }
                | if self.hollow { ENTRY_HOLLOW } else { 0 },
            reserved: [0; 7],
        };
        bytes.extend_from_slice(raw.as_bytes());
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Entry, FormatError> {
        let raw = RawEntry::read_from_bytes(bytes).map_err(|_| FormatError::Length)?;
        if raw.flags & !(ENTRY_WHICH | ENTRY_ACTIVE | ENTRY_HOLLOW) != 0 {
            return Err(FormatError::Value);
        }
        Ok(Entry {
            object: raw.object.get(),
            extent: raw.extent.get(),
            slot: raw.slot.get(),
            page_crc: raw.page_crc.get(),
            version: raw.version.get(),
            which: raw.flags & ENTRY_WHICH,
            active: raw.flags & ENTRY_ACTIVE != 0,
            hollow: raw.flags & ENTRY_HOLLOW != 0,
        })
    }
}

// -------------------------------------------------------------------------------------------------------------------
// Journal

/// The beginning of a batch: one block, followed by the batch's data blocks, around the journal's end where it must.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BatchHeader {
    /// The store's open count when it was written.
    pub open_count: u64,
    /// Its number: one more than that of the batch before.
    pub lsn: u64,
    /// Every batch up to this one was durable when it was written.
    pub durable_lsn: u64,
    /// The data of every batch up to this one were in place and durable when it was written.
    pub placed_lsn: u64,
    /// Checksum of the batch before.
    pub chain: u32,
    /// Where in the journal it begins, blocks.
    pub position: u32,
    /// Data blocks behind the header block.
    pub data_blocks: u16,
    /// Records.
    pub records: u16,
    /// The store was closed with it: nothing was on its way to the device beside it, and nothing follows before another mark.
    pub rest: bool,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBatch {
    magic: [u8; 4],
    version: U32,
    crc: U32,
    chain: U32,
    key: [u8; 16],
    open_count: U64,
    lsn: U64,
    durable_lsn: U64,
    placed_lsn: U64,
    position: U32,
    shard: U16,
    data_blocks: U16,
    records: U16,
    flags: u8,
    reserved: [u8; BATCH_HEADER_BYTES - 75],
}
const _: () = assert!(size_of::<RawBatch>() == BATCH_HEADER_BYTES);
const BATCH_REST: u8 = 1;

/// Where the data of a block that was written are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataAt {
    /// In place, over what was there: the activity log has the region, and another copy exists.
    Place,
    /// In the batch, in the order of such records; in place later.
    Journal,
    /// In place, where nothing that counted was: the last batch of a journal counts only if they match the sum.
    FreshPlace,
}

/// One change of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A block was written. In the extent's other slot, if it has one, the block is absent now.
    Set {
        /// The extent's slot.
        slot: u32,
        /// The block in it.
        block: u16,
        /// Its checksum now.
        sum: Sum,
        /// Its checksum before.
        before: Sum,
        /// The write's version.
        version: u64,
        /// Where its data are.
        data: DataAt,
    },
    /// A slot was given to an extent, as its only one or beside another; none of its blocks has anything.
    Allocate {
        /// The slot.
        slot: u32,
        /// The volume's layer.
        object: u32,
        /// Its extent.
        extent: u32,
    },
    /// A slot was taken from its extent.
    Free {
        /// The slot.
        slot: u32,
        /// The layer that had it.
        object: u32,
        /// Which of its extents.
        extent: u32,
        /// The extent goes on in its other slot; else it is gone.
        goes_on: bool,
        /// The highest version written to the extent: the layer's may not go back with it.
        version: u64,
    },
    /// Blocks were given a state without data. In the extent's other slot, if it has one, they are absent now.
    Clear {
        /// The extent's slot.
        slot: u32,
        /// The first block.
        block: u16,
        /// How many.
        count: u16,
        /// [`Sum::ABSENT`], [`Sum::ZERO`] or [`Sum::LOST`].
        state: Sum,
        /// The version of the change.
        version: u64,
        /// These are all blocks of the extent, which goes when the change is on every copy.
        hollow: bool,
    },
    /// An extent of which all blocks had been taken away is to stay: somebody relies on its slot.
    Keep {
        /// Its slot.
        slot: u32,
    },
    /// What a replica of a layer must not forget has become this.
    Persist(LayerState),
    /// Nothing is left of a layer: nor is its state.
    Forget {
        /// The layer.
        object: u32,
    },
    /// An extent entered the activity log.
    Activate {
        /// Its slot.
        slot: u32,
    },
    /// An extent left the activity log.
    Deactivate {
        /// Its slot.
        slot: u32,
    },
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Default, Clone, Copy)]
#[repr(C)]
struct RawRecord {
    kind: u8,
    flags: u8,
    block: U16,
    slot: U32,
    first: U32,
    second: U32,
    version: U64,
}
const _: () = assert!(size_of::<RawRecord>() == RECORD_BYTES);

mod kind {
    pub(super) const SET: u8 = 1;
    pub(super) const ALLOCATE: u8 = 2;
    pub(super) const FREE: u8 = 3;
    pub(super) const CLEAR: u8 = 4;
    pub(super) const ACTIVATE: u8 = 5;
    pub(super) const DEACTIVATE: u8 = 6;
    pub(super) const SET_RUN: u8 = 7;
    pub(super) const PERSIST: u8 = 8;
    pub(super) const FORGET: u8 = 9;
    pub(super) const KEEP: u8 = 10;
}
const IN_JOURNAL: u8 = 1;
const FRESH_PLACE: u8 = 2;
const GOES_ON: u8 = 1;
const HOLLOW: u8 = 1;

/// The sums of blocks of a run, behind the record that begins it: as long as a record.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Default, Clone, Copy)]
#[repr(C)]
struct RawSums([[U32; 2]; SUMS_PER_UNIT]);
const _: () = assert!(size_of::<RawSums>() == RECORD_BYTES);
const SUMS_PER_UNIT: usize = RECORD_BYTES / 8;

/// What records take in a batch, in units of a record: blocks side by side that were written by one write take one together, and
/// one for each three of them; states of replicas what they need.
#[derive(Debug, Clone, Default)]
pub struct Packing {
    units_before: usize,
    /// Blocks of the run at the end, and its last one.
    run: usize,
    last: Option<Record>,
}

impl Packing {
    /// Another record follows.
    pub fn add(&mut self, record: &Record) {
        if self.last.as_ref().is_some_and(|last| last.is_followed_by(record)) {
            self.run += 1;
        } else {
            self.units_before = self.units();
            self.run = 1;
        }
        if let Record::Persist(state) = record {
            self.units_before += state.units();
            self.run = 0;
        }
        // Only these are followed by others.
        self.last = matches!(record, Record::Set { .. }).then(|| record.clone());
    }

    /// What they take.
    #[must_use]
    pub fn units(&self) -> usize {
        self.units_before + units_of_run(self.run)
    }
}

fn units_of_all(run: &[Record]) -> usize {
    match run {
        [Record::Persist(state)] => state.units(),
        run => units_of_run(run.len()),
    }
}

fn units_of_run(records: usize) -> usize {
    if records < 2 { records } else { 1 + records.div_ceil(SUMS_PER_UNIT) }
}

impl Record {
    /// The slot that it concerns; `None` for one that concerns a layer.
    #[must_use]
    pub fn slot(&self) -> Option<u32> {
        match *self {
            Record::Set { slot, .. }
            | Record::Allocate { slot, .. }
            | Record::Free { slot, .. }
            | Record::Clear { slot, .. }
            | Record::Keep { slot }
            | Record::Activate { slot }
            | Record::Deactivate { slot } => Some(slot),
            Record::Persist(_) | Record::Forget { .. } => None,
        }
    }

    /// Whether it is of a block whose data are in the batch.
    #[must_use]
    pub fn is_journaled(&self) -> bool {
        matches!(self, Record::Set { data: DataAt::Journal, .. })
    }

    /// Whether another one is of the next block, and of the same write.
    fn is_followed_by(&self, next: &Record) -> bool {
        match (self, next) {
            (
                Record::Set { slot, block, version, data, .. },
                Record::Set { slot: its_slot, block: its_block, version: its_version, data: its, .. },
            ) => (slot, block + 1, version, data) == (its_slot, *its_block, its_version, its),
            _ => false,
        }
    }

    /// Its bytes, where it takes one unit.
    fn raw(&self) -> RawRecord {
        let slot = U32::new(self.slot().unwrap_or_default());
        let none = RawRecord { slot, ..RawRecord::default() };
        match *self {
            Record::Set { block, sum, before, version, data, .. } => RawRecord {
                kind: kind::SET,
                flags: match data {
                    DataAt::Place => 0,
                    DataAt::Journal => IN_JOURNAL,
                    DataAt::FreshPlace => FRESH_PLACE,
                },
                block: U16::new(block),
                first: U32::new(sum.0),
                second: U32::new(before.0),
                version: U64::new(version),
                ..none
            },
            Record::Allocate { object, extent, .. } => {
                RawRecord { kind: kind::ALLOCATE, first: U32::new(object), second: U32::new(extent), ..none }
            }
            Record::Free { object, extent, goes_on, version, .. } => RawRecord {
                kind: kind::FREE,
                flags: if goes_on { GOES_ON } else { 0 },
                first: U32::new(object),
                second: U32::new(extent),
                version: U64::new(version),
                ..none
            },
            Record::Clear { block, count, state, version, hollow, .. } => RawRecord {
                kind: kind::CLEAR,
                flags: if hollow { HOLLOW } else { 0 },
                block: U16::new(block),
                first: U32::new(u32::from(count)),
                second: U32::new(state.0),
                version: U64::new(version),
                ..none
            },
            Record::Keep { .. } => RawRecord { kind: kind::KEEP, ..none },
            Record::Activate { .. } => RawRecord { kind: kind::ACTIVATE, ..none },
            Record::Deactivate { .. } => RawRecord { kind: kind::DEACTIVATE, ..none },
            Record::Forget { object } => RawRecord { kind: kind::FORGET, first: U32::new(object), ..none },
            Record::Persist(_) => unreachable!("a state takes several units"),
        }
    }

    fn of_raw(raw: &RawRecord) -> Result<Record, FormatError> {
        let (slot, block) = (raw.slot.get(), raw.block.get());
        let (first, second) = (raw.first.get(), raw.second.get());
        let blocks = u16::try_from(EXTENT_BLOCKS).expect("1024");
        match (raw.kind, raw.flags) {
            (kind::SET, 0 | IN_JOURNAL | FRESH_PLACE) if block < blocks && Sum(first).is_data() => {
                Ok(Record::Set {
                    slot,
                    block,
                    sum: Sum(first),
                    before: Sum(second),
                    version: raw.version.get(),
                    data: match raw.flags {
                        IN_JOURNAL => DataAt::Journal,
                        FRESH_PLACE => DataAt::FreshPlace,
                        _ => DataAt::Place,
                    },
                })
            }
            (kind::ALLOCATE, 0) => Ok(Record::Allocate { slot, object: first, extent: second }),
            (kind::FREE, 0 | GOES_ON) => Ok(Record::Free {
                slot,
                object: first,
                extent: second,
                goes_on: raw.flags == GOES_ON,
                version: raw.version.get(),
            }),
            (kind::CLEAR, 0 | HOLLOW)
                if !Sum(second).is_data() && block < blocks && first <= u32::from(blocks - block) =>
            {
                let count = u16::try_from(first).expect("at most an extent's blocks");
                let (state, hollow) = (Sum(second), raw.flags == HOLLOW);
                if hollow && (count < blocks || state != Sum::ABSENT) {
                    return Err(FormatError::Value);
                }
                Ok(Record::Clear { slot, block, count, state, version: raw.version.get(), hollow })
            }
            (kind::KEEP, 0) => Ok(Record::Keep { slot }),
            (kind::FORGET, 0) => Ok(Record::Forget { object: first }),
            (kind::ACTIVATE, 0) => Ok(Record::Activate { slot }),
            (kind::DEACTIVATE, 0) => Ok(Record::Deactivate { slot }),
            _ => Err(FormatError::Value),
        }
    }
}

/// Writes records of a run, or one record, over the units that they take.
fn encode_run(run: &[Record], bytes: &mut [u8]) {
    if let [Record::Persist(state)] = run {
        state.encode(bytes);
        return;
    }
    let (head, rest) = bytes.split_at_mut(RECORD_BYTES);
    if let [record] = run {
        head.copy_from_slice(record.raw().as_bytes());
        return;
    }
    let first = U32::new(u32::try_from(run.len()).expect("at most an extent's blocks"));
    let raw = RawRecord { kind: kind::SET_RUN, first, second: U32::ZERO, ..run[0].raw() };
    head.copy_from_slice(raw.as_bytes());
    for (bytes, records) in rest.chunks_exact_mut(RECORD_BYTES).zip(run.chunks(SUMS_PER_UNIT)) {
        let mut sums = RawSums::default();
        for (sums, record) in sums.0.iter_mut().zip(records) {
            let raw = record.raw();
            *sums = [raw.first, raw.second];
        }
        bytes.copy_from_slice(sums.as_bytes());
    }
}

/// Reads the records of a run whose first unit is `head` from the units behind it; gives those that follow.
fn decode_run<'b>(
    head: &RawRecord,
    bytes: &'b [u8],
    records: &mut Vec<Record>,
) -> Result<&'b [u8], FormatError> {
    let count = head.first.get() as usize;
    if count < 2
        || head.second.get() != 0
        || count > EXTENT_BLOCKS as usize - usize::from(head.block.get().min(1023))
    {
        return Err(FormatError::Value);
    }
    let (own, rest) =
        bytes.split_at_checked(count.div_ceil(SUMS_PER_UNIT) * RECORD_BYTES).ok_or(FormatError::Length)?;
    let units = own.chunks_exact(RECORD_BYTES);
    let sums = units.flat_map(|unit| RawSums::read_from_bytes(unit).map(|sums| sums.0).unwrap_or_default());
    for (at, [first, second]) in (0..).zip(sums) {
        if at >= count {
            if first.get() != 0 || second.get() != 0 {
                return Err(FormatError::Value);
            }
            continue;
        }
        let block = U16::new(head.block.get() + u16::try_from(at).map_err(|_| FormatError::Value)?);
        records.push(Record::of_raw(&RawRecord { kind: kind::SET, block, first, second, ..*head })?);
    }
    Ok(rest)
}

/// What ties batches to their place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalName {
    /// The store's secret.
    pub key: JournalKey,
    /// The shard.
    pub shard: u16,
}

/// Writes a batch's header block. Gives its checksum, which the next batch repeats.
///
/// # Panics
/// If the records take more than [`RECORDS_MAX`] units.
pub fn encode_batch(header: &BatchHeader, name: JournalName, records: &[Record], bytes: &mut [u8]) -> u32 {
    assert!(usize::from(header.records) == records.len());
    let mut raw = RawBatch {
        magic: BATCH_MAGIC,
        version: U32::new(VERSION),
        crc: U32::ZERO,
        chain: U32::new(header.chain),
        key: name.key,
        open_count: U64::new(header.open_count),
        lsn: U64::new(header.lsn),
        durable_lsn: U64::new(header.durable_lsn),
        placed_lsn: U64::new(header.placed_lsn),
        position: U32::new(header.position),
        shard: U16::new(name.shard),
        data_blocks: U16::new(header.data_blocks),
        records: U16::new(header.records),
        flags: if header.rest { BATCH_REST } else { 0 },
        reserved: [0; BATCH_HEADER_BYTES - 75],
    };
    let (head, body) = bytes[..BLOCK_BYTES].split_at_mut(BATCH_HEADER_BYTES);
    // What no record needs differs from open to open: a torn batch must not become whole by sectors of the one that is written
    // over it after a crash.
    for bytes in body.chunks_mut(8) {
        bytes.copy_from_slice(&header.open_count.to_le_bytes()[..bytes.len()]);
    }
    let mut at = 0;
    for run in records.chunk_by(Record::is_followed_by) {
        let len = units_of_all(run) * RECORD_BYTES;
        encode_run(run, &mut body[at..at + len]);
        at += len;
    }
    let crc = crc32c::crc32c_append(crc32c::crc32c(raw.as_bytes()), body);
    raw.crc = U32::new(crc);
    head.copy_from_slice(raw.as_bytes());
    crc
}

/// Reads a batch's header block, which lies at block `position` of the journal: header, checksum and records.
///
/// # Errors
/// [`FormatError`].
pub fn decode_batch(
    bytes: &[u8],
    name: JournalName,
    position: u32,
) -> Result<(BatchHeader, u32, Vec<Record>), FormatError> {
    let block = bytes.get(..BLOCK_BYTES).ok_or(FormatError::Length)?;
    let (mut raw, body) = RawBatch::read_from_prefix(block).map_err(|_| FormatError::Length)?;
    let stored = std::mem::replace(&mut raw.crc, U32::ZERO);
    let crc = || crc32c::crc32c_append(crc32c::crc32c(raw.as_bytes()), body);
    check_head(raw.magic == BATCH_MAGIC, stored, crc, raw.version)?;
    if raw.key != name.key || raw.shard.get() != name.shard || raw.position.get() != position {
        return Err(FormatError::Misplaced);
    }
    let header = BatchHeader {
        open_count: raw.open_count.get(),
        lsn: raw.lsn.get(),
        durable_lsn: raw.durable_lsn.get(),
        placed_lsn: raw.placed_lsn.get(),
        chain: raw.chain.get(),
        position,
        data_blocks: raw.data_blocks.get(),
        records: raw.records.get(),
        rest: raw.flags & BATCH_REST != 0,
    };
    if raw.flags & !BATCH_REST != 0 {
        return Err(FormatError::Value);
    }
    let count = usize::from(header.records);
    if count > RECORDS_MAX * SUMS_PER_UNIT || usize::from(header.data_blocks) > BATCH_BLOCKS_MAX {
        return Err(FormatError::Length);
    }
    let mut records = Vec::with_capacity(count);
    let mut rest = body;
    while records.len() < count {
        let (raw, behind) = RawRecord::ref_from_prefix(rest).map_err(|_| FormatError::Length)?;
        match raw.kind {
            kind::SET_RUN => rest = decode_run(raw, behind, &mut records)?,
            kind::PERSIST => {
                let (state, behind) = LayerState::decode(rest)?;
                rest = behind;
                records.push(Record::Persist(state));
            }
            _ => {
                rest = behind;
                records.push(Record::of_raw(raw)?);
            }
        }
    }
    if records.len() > count {
        return Err(FormatError::Length);
    }
    let in_journal = records.iter().filter(|record| record.is_journaled()).count();
    if in_journal != usize::from(header.data_blocks) {
        return Err(FormatError::Length);
    }
    Ok((header, stored.get(), records))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: JournalName = JournalName { key: [5; 16], shard: 0 };

    fn set(slot: u32, block: u16, version: u64, in_journal: bool) -> Record {
        let data = if in_journal { DataAt::Journal } else { DataAt::FreshPlace };
        Record::Set {
            slot,
            block,
            sum: Sum(1000 + u32::from(block)),
            before: Sum(block.into()),
            version,
            data,
        }
    }

    /// What is read of a batch of these records, and the units that they take.
    fn packed(records: &[Record]) -> (Vec<Record>, usize) {
        let in_journal = |record: &&Record| record.is_journaled();
        let header = BatchHeader {
            records: u16::try_from(records.len()).unwrap(),
            data_blocks: u16::try_from(records.iter().filter(in_journal).count()).unwrap(),
            ..BatchHeader::default()
        };
        let mut bytes = vec![0; BLOCK_BYTES];
        encode_batch(&header, NAME, records, &mut bytes);
        let (found, _, found_records) = decode_batch(&bytes, NAME, 0).unwrap();
        assert_eq!(found, header);
        let mut packing = Packing::default();
        records.iter().for_each(|record| packing.add(record));
        (found_records, packing.units())
    }

    #[test]
    fn neighbours_of_one_write_share_what_they_have_in_common() {
        let run = |count: u16| (0..count).map(|at| set(3, 100 + at, 7, false)).collect::<Vec<_>>();
        for (count, units) in [(1, 1), (2, 2), (3, 2), (4, 3), (6, 3), (7, 4), (492, 165)] {
            assert_eq!(packed(&run(count)), (run(count), units), "{count} blocks");
        }
        let others = [
            set(3, 9, 7, false),
            // Another slot, version, place or block.
            set(4, 10, 7, false),
            set(4, 11, 8, false),
            set(4, 12, 8, true),
            set(4, 14, 8, true),
            Record::Free { slot: 9, object: 1, extent: 2, goes_on: true, version: 5 },
            set(4, 15, 8, true),
            set(4, 16, 8, true),
            Record::Activate { slot: 1 },
        ];
        assert_eq!(packed(&others), (others.to_vec(), others.len()));
        let full: Vec<Record> =
            (0..RECORDS_MAX).map(|at| Record::Activate { slot: u32::try_from(at).unwrap() }).collect();
        assert_eq!(packed(&full), (full.clone(), RECORDS_MAX));
    }

    #[test]
    fn a_state_takes_its_units_between_runs() {
        let state = |object: u32, epochs: u32| {
            let epochs = Epochs::new((0..epochs).map(|at| (at, 9)).collect()).unwrap();
            let state = std::sync::Arc::new(ReplicaState { epochs, ..ReplicaState::default() });
            Record::Persist(LayerState { object, version: 3, state })
        };
        let records = [
            set(3, 9, 7, false),
            state(1, 0),
            set(3, 10, 7, false),
            set(3, 11, 7, false),
            state(1, 2),
            state(2, 3),
            Record::Forget { object: 1 },
        ];
        assert_eq!(packed(&records), (records.to_vec(), 1 + 3 + 2 + 4 + 5 + 1));
        let largest = [state(7, 256)];
        assert_eq!(packed(&largest), (largest.to_vec(), STATE_UNITS_MAX));
    }

    #[test]
    fn only_a_whole_extent_becomes_hollow() {
        let (slot, version) = (1, 5);
        let clear = |block: u16, count: u16, state: Sum| {
            let record = Record::Clear { slot, block, count, state, version, hollow: true };
            Record::of_raw(&record.raw()).map(|found| assert_eq!(found, record))
        };
        assert_eq!(clear(0, 1024, Sum::ABSENT), Ok(()));
        for (block, count, state) in [(0, 1023, Sum::ABSENT), (1, 1023, Sum::ABSENT), (0, 1024, Sum::LOST)] {
            assert_eq!(clear(block, count, state), Err(FormatError::Value));
        }
    }

    #[test]
    fn a_run_that_cannot_be_is_refused() {
        let records: Vec<Record> = (0..4).map(|at| set(3, 1020 + at, 7, false)).collect();
        let header = BatchHeader { records: 4, ..BatchHeader::default() };
        let mut good = vec![0; BLOCK_BYTES];
        encode_batch(&header, NAME, &records, &mut good);
        let changed = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[BATCH_HEADER_BYTES + at] = byte;
            let (raw, body) = RawBatch::read_from_prefix(&bytes).unwrap();
            let raw = RawBatch { crc: U32::ZERO, ..raw };
            let crc = crc32c::crc32c_append(crc32c::crc32c(raw.as_bytes()), body);
            bytes[8..12].copy_from_slice(&crc.to_le_bytes());
            decode_batch(&bytes, NAME, 0).map(|(_, _, records)| records)
        };
        assert_eq!(changed(0, kind::SET_RUN), Ok(records.clone()));
        // A length of one, of more than the batch says, and beyond the extent; something behind the last sum; another flag.
        for (at, byte) in [(8, 1), (8, 3), (8, 5), (8, 7), (12, 1), (RECORD_BYTES + 32, 1), (1, 3), (2, 253)]
        {
            assert!(changed(at, byte).is_err(), "byte {at} as {byte}");
        }
    }
}
