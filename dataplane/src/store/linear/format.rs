//! What a linear store has on its device. Everything is little-endian.
//!
//! ```text
//! byte 0          superblock, copy A (4 KiB)
//! byte 4096       superblock, copy B (4 KiB)
//! 64 KiB          allocation table, slot A (up to 2 MiB)
//! 64 KiB + 2 MiB  allocation table, slot B (up to 2 MiB)
//! 8 MiB           extents of 4 MiB, as many as fit
//! ```
//!
//! Superblock: magic `TORUSLIN` (8), version u32, CRC32C u32 of the block with this field zero, cluster id (16), store id
//! (16), device bytes u64, extent count u32, zeros. Written once, when the store is formatted; either copy that verifies
//! is enough.
//!
//! Table: magic `TORUSTAB` (8), sequence u64, payload bytes u32, volumes u32, CRC32C u32 of header (this field zero) and
//! payload, zeros to 64 bytes; then for each volume: id (16), committed sectors u64, filled extents u32, runs u32, and for
//! each run: first extent u32, extents u32. A change writes the slot of the older sequence and syncs; the newer slot that
//! verifies is in force. So a torn write leaves the table before it.

use cluster_map::{ClusterId, StoreId, VolumeId};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Run;
use super::allocation::{Allocation, Entry, Inconsistent};
use crate::store::{BLOCK_BYTES, EXTENT_BYTES};

/// Layout version that this code writes; the only one so far.
pub const VERSION: u32 = 1;
/// Bytes of one superblock copy.
pub const SUPERBLOCK_BYTES: usize = BLOCK_BYTES;
/// Where the superblock copies are.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [0, 4096];
/// Bytes of one table slot.
pub const TABLE_BYTES: usize = 2 << 20;
/// Where the table slots are.
pub const TABLE_OFFSETS: [u64; 2] = [64 << 10, (64 << 10) + (2 << 20)];
/// Where the first extent begins.
pub const DATA_OFFSET_BYTES: u64 = 8 << 20;
/// The smallest device that is accepted: room for the tables and a dozen extents.
pub const DEVICE_BYTES_MIN: u64 = 64 << 20;

const SUPERBLOCK_MAGIC: [u8; 8] = *b"TORUSLIN";
const TABLE_MAGIC: [u8; 8] = *b"TORUSTAB";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    cluster: [u8; 16],
    store: [u8; 16],
    device_bytes: U64,
    extent_count: U32,
    reserved: [u8; SUPERBLOCK_BYTES - 60],
}
const _: () = assert!(size_of::<RawSuperblock>() == SUPERBLOCK_BYTES);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawTableHeader {
    magic: [u8; 8],
    sequence: U64,
    payload_bytes: U32,
    volumes: U32,
    crc: U32,
    reserved: [u8; 36],
}
const TABLE_HEADER_BYTES: usize = 64;
const _: () = assert!(size_of::<RawTableHeader>() == TABLE_HEADER_BYTES);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawVolume {
    id: [u8; 16],
    committed_sectors: U64,
    filled_extents: U32,
    runs: U32,
}
const _: () = assert!(size_of::<RawVolume>() == 32);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRun {
    first_extent: U32,
    extents: U32,
}
const _: () = assert!(size_of::<RawRun>() == 8);

/// What a store says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// Its own id.
    pub store: StoreId,
    /// Size of the device when it was formatted.
    pub device_bytes: u64,
    /// Extents on it.
    pub extent_count: u32,
}

/// Why bytes are not a part of a linear store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The magic is another one.
    #[error("no Torus store is here")]
    Magic,
    /// The checksum differs.
    #[error("the checksum is wrong")]
    Checksum,
    /// A newer version wrote it.
    #[error("it has layout version {found}, and this program reads version {VERSION}: use the newer program")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Lengths that do not fit together.
    #[error("its lengths do not fit together")]
    Length,
    /// The table contradicts itself.
    #[error("the allocation table is inconsistent: {0}")]
    Table(#[from] Inconsistent),
    /// More volumes and runs than a slot holds.
    #[error("the allocation table is full: delete volumes, or add another store")]
    TableFull,
}

impl Superblock {
    /// The superblock of a fresh store on a device of `device_bytes`.
    #[must_use]
    pub fn new(cluster: ClusterId, store: StoreId, device_bytes: u64) -> Superblock {
        let extents = device_bytes.saturating_sub(DATA_OFFSET_BYTES) / EXTENT_BYTES;
        Superblock { cluster, store, device_bytes, extent_count: u32::try_from(extents).unwrap_or(u32::MAX) }
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
            device_bytes: U64::new(self.device_bytes),
            extent_count: U32::new(self.extent_count),
            reserved: [0; SUPERBLOCK_BYTES - 60],
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
        if raw.magic != SUPERBLOCK_MAGIC {
            return Err(FormatError::Magic);
        }
        let stored = std::mem::replace(&mut raw.crc, U32::ZERO);
        if crc32c::crc32c(raw.as_bytes()) != stored.get() {
            return Err(FormatError::Checksum);
        }
        if raw.version.get() != VERSION {
            return Err(FormatError::Version { found: raw.version.get() });
        }
        let superblock = Superblock {
            cluster: ClusterId(raw.cluster),
            store: StoreId(raw.store),
            device_bytes: raw.device_bytes.get(),
            extent_count: raw.extent_count.get(),
        };
        // At most 2^32 extents of 2^22 bytes: no overflow.
        let end_bytes = DATA_OFFSET_BYTES + u64::from(superblock.extent_count) * EXTENT_BYTES;
        if end_bytes <= superblock.device_bytes { Ok(superblock) } else { Err(FormatError::Length) }
    }
}

/// The bytes of a table slot, padded to whole blocks.
///
/// # Errors
/// [`FormatError::TableFull`].
pub fn encode_table(allocation: &Allocation, sequence: u64) -> Result<Vec<u8>, FormatError> {
    let full = |_| FormatError::TableFull;
    let mut payload = Vec::new();
    for entry in allocation.entries() {
        let raw = RawVolume {
            id: entry.id.0,
            committed_sectors: U64::new(entry.committed_sectors),
            filled_extents: U32::new(entry.filled_extents),
            runs: U32::new(u32::try_from(entry.runs.len()).map_err(full)?),
        };
        payload.extend_from_slice(raw.as_bytes());
        for run in &entry.runs {
            let raw = RawRun { first_extent: U32::new(run.first_extent), extents: U32::new(run.extents) };
            payload.extend_from_slice(raw.as_bytes());
        }
    }
    if TABLE_HEADER_BYTES + payload.len() > TABLE_BYTES {
        return Err(FormatError::TableFull);
    }
    let mut header = RawTableHeader {
        magic: TABLE_MAGIC,
        sequence: U64::new(sequence),
        payload_bytes: U32::new(u32::try_from(payload.len()).map_err(full)?),
        volumes: U32::new(u32::try_from(allocation.entries().len()).map_err(full)?),
        crc: U32::ZERO,
        reserved: [0; 36],
    };
    header.crc = U32::new(crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), &payload));
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(&payload);
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    Ok(bytes)
}

/// Reads a table slot: its sequence and what it says.
///
/// # Errors
/// [`FormatError`].
pub fn decode_table(bytes: &[u8], extent_count: u32) -> Result<(u64, Allocation), FormatError> {
    let (mut header, rest) = RawTableHeader::read_from_prefix(bytes).map_err(|_| FormatError::Length)?;
    if header.magic != TABLE_MAGIC {
        return Err(FormatError::Magic);
    }
    let payload = rest.get(..header.payload_bytes.get() as usize).ok_or(FormatError::Length)?;
    let stored = std::mem::replace(&mut header.crc, U32::ZERO);
    if crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), payload) != stored.get() {
        return Err(FormatError::Checksum);
    }
    let mut entries = Vec::new();
    let mut rest = payload;
    while !rest.is_empty() {
        let (entry, after) = decode_entry(rest)?;
        entries.push(entry);
        rest = after;
    }
    if entries.len() != header.volumes.get() as usize {
        return Err(FormatError::Length);
    }
    Ok((header.sequence.get(), Allocation::from_entries(entries, extent_count)?))
}

fn decode_entry(bytes: &[u8]) -> Result<(Entry, &[u8]), FormatError> {
    let (volume, rest) = RawVolume::ref_from_prefix(bytes).map_err(|_| FormatError::Length)?;
    let (runs, rest) = <[RawRun]>::ref_from_prefix_with_elems(rest, volume.runs.get() as usize)
        .map_err(|_| FormatError::Length)?;
    let run = |raw: &RawRun| Run { first_extent: raw.first_extent.get(), extents: raw.extents.get() };
    let entry = Entry {
        id: VolumeId(volume.id),
        runs: runs.iter().map(run).collect(),
        committed_sectors: volume.committed_sectors.get(),
        filled_extents: volume.filled_extents.get(),
    };
    Ok((entry, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn superblock() -> Superblock {
        Superblock::new(ClusterId([1; 16]), StoreId([2; 16]), 1 << 30)
    }

    #[test]
    fn a_gibibyte_offers_at_least_920_mebibytes() {
        assert!(u64::from(superblock().extent_count) * EXTENT_BYTES >= 920 << 20);
    }

    #[test]
    fn superblocks_round_trip_and_any_flipped_bit_is_seen() {
        let bytes = superblock().encode();
        assert_eq!(Superblock::decode(&bytes), Ok(superblock()));
        for bit in (0..480).chain([8 * 4095]) {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&damaged).is_err(), "bit {bit}");
        }
        assert_eq!(Superblock::decode(&bytes[..4095]), Err(FormatError::Length));
        assert_eq!(Superblock::decode(&[0; 4096]), Err(FormatError::Magic));
    }

    fn allocation() -> impl Strategy<Value = Allocation> {
        proptest::collection::vec((1u64..8 * crate::store::EXTENT_SECTORS, any::<bool>()), 0..12).prop_map(
            |sizes| {
                let mut allocation = Allocation::new(50);
                for (n, (size, commit)) in (0u8..).zip(sizes) {
                    let id = VolumeId([n; 16]);
                    if allocation.reserve(id, size).is_ok() && commit {
                        allocation.commit(id, size);
                    }
                    if n % 3 == 2 {
                        allocation.remove(VolumeId([n - 1; 16]));
                    }
                }
                allocation
            },
        )
    }

    proptest! {
        #[test]
        fn tables_round_trip(allocation in allocation(), sequence in any::<u64>()) {
            let bytes = encode_table(&allocation, sequence).unwrap();
            prop_assert_eq!(bytes.len() % BLOCK_BYTES, 0);
            prop_assert_eq!(decode_table(&bytes, 50), Ok((sequence, allocation)));
        }

        #[test]
        fn damaged_tables_are_errors(allocation in allocation(), at in any::<usize>(), bit in 0u8..8) {
            let bytes = encode_table(&allocation, 7).unwrap();
            let used = TABLE_HEADER_BYTES + u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
            let mut damaged = bytes.clone();
            damaged[at % used] ^= 1 << bit;
            prop_assert!(decode_table(&damaged, 50).is_err());
        }

        /// With the checksum made right, arbitrary contents are still an error or a consistent table.
        #[test]
        fn decoding_is_total(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), volumes in 0u32..6) {
            let _ = decode_table(&bytes, 50);
            let _ = Superblock::decode(&bytes);
            if bytes.len() > TABLE_HEADER_BYTES {
                bytes[..8].copy_from_slice(&TABLE_MAGIC);
                let payload_bytes = u32::try_from(bytes.len() - TABLE_HEADER_BYTES).unwrap();
                bytes[16..20].copy_from_slice(&payload_bytes.to_le_bytes());
                bytes[20..24].copy_from_slice(&volumes.to_le_bytes());
                bytes[24..28].fill(0);
                let crc = crc32c::crc32c(&bytes);
                bytes[24..28].copy_from_slice(&crc.to_le_bytes());
                if let Ok((_, allocation)) = decode_table(&bytes, 50) {
                    prop_assert!(allocation.free_extents() <= 50);
                }
            }
        }
    }
}
