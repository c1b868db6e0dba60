//! The volumes of an extent store: which layer has which number, on which shard, and how large it is.
//!
//! Kept beside the shards, since it changes when volumes do and not when data do: one table in two slots, of which a change
//! writes the older. A volume is in the table before its first extent, and leaves it after its last.
//!
//! Invariants:
//! * A change is in force when [`OpenStore::commit`](super::opening::OpenStore::commit) has returned; a torn one leaves the table before it.
//! * The number of a layer is never used again, so that what an old one left anywhere is never taken for a new one's.
//! * After a failed write the catalog takes no further change: what is on the device is unknown.

use cluster_map::{StoreId, VolumeId};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::{CATALOG_BYTES, COUNT_END, FormatError, VERSION};
use crate::store::BLOCK_BYTES;

const MAGIC: [u8; 8] = *b"TORUSVOL";

/// What is wanted of a volume's extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeState {
    /// It is there.
    Present,
    /// Everything of it is to go, and there is no way back.
    Purging,
}

/// One layer of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Volume {
    /// Whose it is.
    pub id: VolumeId,
    /// Which layer; all zeros for a volume's first.
    pub layer: [u8; 16],
    /// Its number on the shards.
    pub object: u32,
    /// Its shard.
    pub shard: u16,
    /// See there.
    pub state: VolumeState,
    /// Its size, sectors.
    pub size_sectors: u64,
    /// Blocks from here on are being given up; it does not grow before they are gone. `u64::MAX` when there are none.
    pub unmap_from_block: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    store: [u8; 16],
    sequence: U64,
    volumes: U32,
    next_object: U32,
    reserved: [u8; 16],
}
const HEADER_BYTES: usize = 64;
const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawVolume {
    id: [u8; 16],
    layer: [u8; 16],
    object: U32,
    shard: U16,
    state: u8,
    reserved: u8,
    size_sectors: U64,
    unmap_from_block: U64,
}
const VOLUME_BYTES: usize = 56;
const _: () = assert!(size_of::<RawVolume>() == VOLUME_BYTES);

/// Most layers of a store.
pub const VOLUMES_MAX: usize = (CATALOG_BYTES - HEADER_BYTES) / VOLUME_BYTES;

/// The table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Catalog {
    /// By id and layer.
    volumes: Vec<Volume>,
    next_object: u32,
}

impl Catalog {
    /// All volumes, by id.
    #[must_use]
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// A volume's first layer.
    #[must_use]
    pub fn get(&self, id: VolumeId) -> Option<&Volume> {
        self.position(id).ok().map(|at| &self.volumes[at])
    }

    /// A volume's first layer.
    pub fn get_mut(&mut self, id: VolumeId) -> Option<&mut Volume> {
        self.position(id).ok().map(|at| &mut self.volumes[at])
    }

    /// The volume that has this number.
    #[must_use]
    pub fn of_object(&self, object: u32) -> Option<&Volume> {
        self.volumes.iter().find(|volume| volume.object == object)
    }

    fn position(&self, id: VolumeId) -> Result<usize, usize> {
        self.volumes.binary_search_by_key(&(id.0, [0; 16]), |volume| (volume.id.0, volume.layer))
    }

    /// Adds a volume, on the shard that has fewest of `shards`.
    ///
    /// # Errors
    /// [`FormatError::Length`] when the table or the numbers are used up.
    pub fn add(&mut self, id: VolumeId, size_sectors: u64, shards: u16) -> Result<(), FormatError> {
        let shard = self.emptiest_shard(shards, 0).ok_or(FormatError::Value)?;
        self.add_to(id, size_sectors, shard)
    }

    /// The shard with the fewest volumes, the first one from `from` on among equals; `None` where there are no shards.
    #[must_use]
    pub fn emptiest_shard(&self, shards: u16, from: u16) -> Option<u16> {
        let mut counts = vec![0u32; usize::from(shards)];
        for volume in &self.volumes {
            if let Some(count) = counts.get_mut(usize::from(volume.shard)) {
                *count += 1;
            }
        }
        let order =
            (0..shards).map(|at| u16::try_from((u32::from(from) + u32::from(at)) % u32::from(shards)));
        order.flatten().min_by_key(|shard| counts[usize::from(*shard)])
    }

    /// Adds a volume on a shard.
    ///
    /// # Errors
    /// As [`Catalog::add`].
    pub fn add_to(&mut self, id: VolumeId, size_sectors: u64, shard: u16) -> Result<(), FormatError> {
        let Err(at) = self.position(id) else { return Err(FormatError::Value) };
        let next = self.next_object.checked_add(1).ok_or(FormatError::Length)?;
        if self.volumes.len() >= VOLUMES_MAX {
            return Err(FormatError::Length);
        }
        let volume = Volume {
            id,
            layer: [0; 16],
            object: self.next_object,
            shard,
            state: VolumeState::Present,
            size_sectors,
            unmap_from_block: u64::MAX,
        };
        self.volumes.insert(at, volume);
        self.next_object = next;
        Ok(())
    }

    /// Takes a volume out.
    pub fn remove(&mut self, id: VolumeId) {
        if let Ok(at) = self.position(id) {
            self.volumes.remove(at);
        }
    }

    /// The bytes of a slot, padded to whole blocks.
    #[must_use]
    pub fn encode(&self, store: StoreId, sequence: u64) -> Vec<u8> {
        let mut body = Vec::with_capacity(self.volumes.len() * VOLUME_BYTES);
        for volume in &self.volumes {
            let raw = RawVolume {
                id: volume.id.0,
                layer: volume.layer,
                object: U32::new(volume.object),
                shard: U16::new(volume.shard),
                state: match volume.state {
                    VolumeState::Present => 1,
                    VolumeState::Purging => 2,
                },
                reserved: 0,
                size_sectors: U64::new(volume.size_sectors),
                unmap_from_block: U64::new(volume.unmap_from_block),
            };
            body.extend_from_slice(raw.as_bytes());
        }
        let mut header = RawHeader {
            magic: MAGIC,
            version: U32::new(VERSION),
            crc: U32::ZERO,
            store: store.0,
            sequence: U64::new(sequence),
            volumes: U32::new(u32::try_from(self.volumes.len()).expect("at most VOLUMES_MAX")),
            next_object: U32::new(self.next_object),
            reserved: [0; 16],
        };
        header.crc = U32::new(crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), &body));
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(&body);
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        bytes
    }

    /// Reads a slot of a store with so many shards: its sequence and what it says.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(bytes: &[u8], store: StoreId, shards: u16) -> Result<(u64, Catalog), FormatError> {
        let (mut header, rest) = RawHeader::read_from_prefix(bytes).map_err(|_| FormatError::Length)?;
        if header.magic != MAGIC {
            return Err(FormatError::Magic);
        }
        let count = header.volumes.get() as usize;
        let body =
            count.checked_mul(VOLUME_BYTES).and_then(|len| rest.get(..len)).ok_or(FormatError::Length)?;
        let stored = std::mem::replace(&mut header.crc, U32::ZERO);
        if crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), body) != stored.get() {
            return Err(FormatError::Checksum);
        }
        if header.version.get() != VERSION {
            return Err(FormatError::Version { found: header.version.get() });
        }
        if header.store != store.0 {
            return Err(FormatError::Misplaced);
        }
        let raw = <[RawVolume]>::ref_from_bytes(body).map_err(|_| FormatError::Length)?;
        let volumes: Result<Vec<Volume>, FormatError> = raw.iter().map(volume_of).collect();
        let catalog = Catalog { volumes: volumes?, next_object: header.next_object.get() };
        let sane = catalog.check(shards) && header.sequence.get() < COUNT_END;
        sane.then_some((header.sequence.get(), catalog)).ok_or(FormatError::Value)
    }

    /// Whether every volume and every number is there once, and every shard exists.
    fn check(&self, shards: u16) -> bool {
        let key = |volume: &Volume| (volume.id.0, volume.layer);
        let ordered = self.volumes.windows(2).all(|pair| key(&pair[0]) < key(&pair[1]));
        let mut objects: Vec<u32> = self.volumes.iter().map(|volume| volume.object).collect();
        objects.sort_unstable();
        let distinct = objects.windows(2).all(|pair| pair[0] < pair[1]);
        let known =
            self.volumes.iter().all(|volume| volume.shard < shards && volume.object < self.next_object);
        ordered && distinct && known
    }
}

fn volume_of(raw: &RawVolume) -> Result<Volume, FormatError> {
    Ok(Volume {
        id: VolumeId(raw.id),
        layer: raw.layer,
        object: raw.object.get(),
        shard: raw.shard.get(),
        state: match raw.state {
            1 => VolumeState::Present,
            2 => VolumeState::Purging,
            _ => return Err(FormatError::Value),
        },
        size_sectors: raw.size_sectors.get(),
        unmap_from_block: raw.unmap_from_block.get(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STORE: StoreId = StoreId([7; 16]);

    fn catalog() -> impl Strategy<Value = Catalog> {
        proptest::collection::vec((any::<[u8; 16]>(), any::<u64>(), any::<u8>()), 0..12).prop_map(|volumes| {
            let mut catalog = Catalog::default();
            for (id, size, what) in volumes {
                let id = VolumeId(id);
                let _there_already = catalog.add(id, size, 4);
                match what % 4 {
                    0 => catalog.remove(id),
                    1 => catalog.get_mut(id).unwrap().state = VolumeState::Purging,
                    2 => catalog.get_mut(id).unwrap().unmap_from_block = size / 2,
                    _ => {}
                }
            }
            catalog
        })
    }

    #[test]
    fn volumes_spread_over_shards_and_numbers_are_not_used_again() {
        let mut catalog = Catalog::default();
        for n in 0..8 {
            catalog.add(VolumeId([n; 16]), 8, 4).unwrap();
        }
        let mut shards: Vec<u16> = catalog.volumes().iter().map(|volume| volume.shard).collect();
        shards.sort_unstable();
        assert_eq!(shards, [0, 0, 1, 1, 2, 2, 3, 3]);
        let gone = catalog.get(VolumeId([3; 16])).unwrap().object;
        catalog.remove(VolumeId([3; 16]));
        catalog.add(VolumeId([3; 16]), 8, 4).unwrap();
        assert!(catalog.get(VolumeId([3; 16])).unwrap().object > gone);
        assert_eq!(catalog.add(VolumeId([3; 16]), 8, 4), Err(FormatError::Value));
    }

    proptest! {
        #[test]
        fn tables_round_trip_and_damage_is_seen(
            catalog in catalog(), sequence in 0..COUNT_END, at in any::<usize>(), bit in 0u8..8
        ) {
            let bytes = catalog.encode(STORE, sequence);
            prop_assert_eq!(bytes.len() % BLOCK_BYTES, 0);
            prop_assert_eq!(Catalog::decode(&bytes, STORE, 4), Ok((sequence, catalog.clone())));
            prop_assert!(Catalog::decode(&bytes, StoreId([8; 16]), 4).is_err());
            let used = HEADER_BYTES + catalog.volumes().len() * VOLUME_BYTES;
            let mut damaged = bytes;
            damaged[at % used] ^= 1 << bit;
            prop_assert!(Catalog::decode(&damaged, STORE, 4).is_err());
        }

        /// With the checksum made right, arbitrary contents are still an error or a consistent table.
        #[test]
        fn decoding_is_total(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), volumes in 0u32..5) {
            let _ = Catalog::decode(&bytes, STORE, 4);
            if bytes.len() >= HEADER_BYTES {
                bytes[..8].copy_from_slice(&MAGIC);
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
                bytes[12..16].fill(0);
                bytes[16..32].copy_from_slice(&STORE.0);
                bytes[40..44].copy_from_slice(&volumes.to_le_bytes());
                let end = (HEADER_BYTES + volumes as usize * VOLUME_BYTES).min(bytes.len());
                let crc = crc32c::crc32c(&bytes[..end]);
                bytes[12..16].copy_from_slice(&crc.to_le_bytes());
                if let Ok((_, catalog)) = Catalog::decode(&bytes, STORE, 4) {
                    prop_assert_eq!(catalog.volumes().len(), volumes as usize);
                }
            }
        }
    }
}
