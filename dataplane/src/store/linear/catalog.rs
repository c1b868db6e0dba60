//! The durable state of a linear store: opening, formatting, and changing its allocation table.
//!
//! Invariants:
//! * A change is in force when [`Catalog::commit`] has returned; a torn one leaves the table before it.
//! * Only a blank device is formatted. One of another cluster, or one that cannot be trusted, is refused and not written.
//! * After a failed sync the catalog takes no further change: what is on the device is unknown.

use std::path::Path;

use cluster_map::{ClusterId, StoreId};

use super::allocation::Allocation;
use super::format::{
    self, DEVICE_BYTES_MIN, FormatError, SUPERBLOCK_BYTES, SUPERBLOCK_OFFSETS, Superblock, TABLE_BYTES,
    TABLE_OFFSETS,
};
use crate::device::{Device, DeviceError};
use crate::store::BLOCK_BYTES;

/// Why a store could not be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The device under it.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Something else is on the device.
    #[error(
        "store {path} is not blank and holds no Torus store: if nothing on it is needed, clear it (wipefs -a, blkdiscard, or rm for a file) and try again"
    )]
    Foreign {
        /// The path.
        path: String,
    },
    /// It belongs to another cluster.
    #[error(
        "store {path} belongs to cluster {found}, and this is cluster {own}: name another store; to give up what is on it, clear it first"
    )]
    OtherCluster {
        /// The path.
        path: String,
        /// Its cluster.
        found: ClusterId,
        /// Ours.
        own: ClusterId,
    },
    /// Another store is where this one was.
    #[error(
        "store {path} is {found}, and {expected} was there: put the right device back, or remove the store from the node"
    )]
    OtherStore {
        /// The path.
        path: String,
        /// Its id.
        found: StoreId,
        /// The id that the node knows.
        expected: StoreId,
    },
    /// It is ours and damaged.
    #[error("store {path} cannot be trusted: {what}: {source}; it was not opened, nothing on it was changed")]
    Damaged {
        /// The path.
        path: String,
        /// The part.
        what: &'static str,
        /// What is wrong.
        source: FormatError,
    },
    /// It became smaller.
    #[error("store {path} has {len_bytes} bytes and was formatted with {formatted_bytes}: restore its size")]
    Shrunk {
        /// The path.
        path: String,
        /// Its size now.
        len_bytes: u64,
        /// Its size then.
        formatted_bytes: u64,
    },
    /// The table cannot hold the change.
    #[error(transparent)]
    Table(FormatError),
    /// An earlier change failed.
    #[error("store {path} failed before and takes no changes: restart the node after looking at the device")]
    Failed {
        /// The path.
        path: String,
    },
}

/// An open store: its device and what is allocated on it.
#[derive(Debug)]
pub struct Catalog {
    device: Device,
    superblock: Superblock,
    allocation: Allocation,
    sequence: u64,
    failed: bool,
}

impl Catalog {
    /// Opens the store at `path`, formatting it for `cluster` with the id `fresh` if it is blank.
    ///
    /// # Errors
    /// [`CatalogError`]; nothing was written then, unless formatting itself failed.
    pub fn open(
        path: &Path,
        size_bytes: u64,
        cluster: ClusterId,
        expected: Option<StoreId>,
        fresh: StoreId,
    ) -> Result<Catalog, CatalogError> {
        let device = Device::open(path, size_bytes, DEVICE_BYTES_MIN)?;
        let shown = || path.display().to_string();
        let superblock = match read_superblock(&device)? {
            Ok(superblock) => superblock,
            Err(FormatError::Magic) if expected.is_none() && is_unformatted(&device)? => {
                return Catalog::format(device, Superblock::new(cluster, fresh, 0));
            }
            Err(FormatError::Magic) => return Err(CatalogError::Foreign { path: shown() }),
            Err(source) => return Err(CatalogError::Damaged { path: shown(), what: "superblock", source }),
        };
        if superblock.cluster != cluster {
            return Err(CatalogError::OtherCluster {
                path: shown(),
                found: superblock.cluster,
                own: cluster,
            });
        }
        if let Some(expected) = expected.filter(|&expected| expected != superblock.store) {
            return Err(CatalogError::OtherStore { path: shown(), found: superblock.store, expected });
        }
        if device.len_bytes() < superblock.device_bytes {
            let (len_bytes, formatted_bytes) = (device.len_bytes(), superblock.device_bytes);
            return Err(CatalogError::Shrunk { path: shown(), len_bytes, formatted_bytes });
        }
        let (sequence, allocation) = read_table(&device, superblock.extent_count)?
            .map_err(|source| CatalogError::Damaged { path: shown(), what: "allocation table", source })?;
        Ok(Catalog { device, superblock, allocation, sequence, failed: false })
    }

    /// Writes an empty store: table first, so that a superblock is never without one.
    fn format(device: Device, template: Superblock) -> Result<Catalog, CatalogError> {
        let superblock = Superblock::new(template.cluster, template.store, device.len_bytes());
        let allocation = Allocation::new(superblock.extent_count);
        let mut catalog = Catalog { device, superblock, allocation, sequence: 0, failed: false };
        catalog.write_table()?;
        for offset_bytes in SUPERBLOCK_OFFSETS {
            catalog.device.write_durably(offset_bytes, &superblock.encode())?;
        }
        Ok(catalog)
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The store's id.
    #[must_use]
    pub fn id(&self) -> StoreId {
        self.superblock.store
    }

    /// What is allocated.
    #[must_use]
    pub fn allocation(&self) -> &Allocation {
        &self.allocation
    }

    /// Puts another allocation in force, durably.
    ///
    /// # Errors
    /// [`CatalogError`]; the old one is in force then, in memory; after a failed write the store takes no more changes.
    pub fn commit(&mut self, allocation: Allocation) -> Result<(), CatalogError> {
        if self.failed {
            return Err(CatalogError::Failed { path: self.device.path().display().to_string() });
        }
        let before = std::mem::replace(&mut self.allocation, allocation);
        let written = self.write_table();
        if let Err(error) = &written {
            self.allocation = before;
            self.failed = !matches!(error, CatalogError::Table(_));
        }
        written
    }

    fn write_table(&mut self) -> Result<(), CatalogError> {
        let sequence = self.sequence + 1;
        let bytes = format::encode_table(&self.allocation, sequence).map_err(CatalogError::Table)?;
        let slot = TABLE_OFFSETS[usize::from(sequence.is_multiple_of(2))];
        self.device.write_durably(slot, &bytes)?;
        self.sequence = sequence;
        Ok(())
    }
}

/// Whether the device is blank, or a store's first, empty table is all there is on it: formatting was interrupted before
/// the first superblock, so nothing was ever kept there.
fn is_unformatted(device: &Device) -> Result<bool, DeviceError> {
    let [first, second] = TABLE_OFFSETS;
    let table = format::decode_table(&device.read(first, BLOCK_BYTES)?, u32::MAX);
    let is_first = table.is_ok_and(|(sequence, allocation)| sequence == 1 && allocation.entries().is_empty());
    let is_only = device.read(second, BLOCK_BYTES)?.iter().all(|&byte| byte == 0);
    let interrupted = is_first && is_only;
    device.is_blank(if interrupted { first..first + BLOCK_BYTES as u64 } else { 0..0 })
}

/// The first copy that verifies, or why the better one does not.
fn read_superblock(device: &Device) -> Result<Result<Superblock, FormatError>, DeviceError> {
    let mut why = FormatError::Magic;
    for offset_bytes in SUPERBLOCK_OFFSETS {
        match Superblock::decode(&device.read(offset_bytes, SUPERBLOCK_BYTES)?) {
            Ok(superblock) => return Ok(Ok(superblock)),
            Err(FormatError::Magic) => {}
            Err(error) => why = error,
        }
    }
    Ok(Err(why))
}

/// The newest table that verifies.
fn read_table(
    device: &Device,
    extent_count: u32,
) -> Result<Result<(u64, Allocation), FormatError>, DeviceError> {
    let mut newest: Result<(u64, Allocation), FormatError> = Err(FormatError::Magic);
    for offset_bytes in TABLE_OFFSETS {
        let table = format::decode_table(&device.read(offset_bytes, TABLE_BYTES)?, extent_count);
        let newer = match (&table, &newest) {
            (Ok((sequence, _)), Ok((other, _))) => sequence > other,
            (Ok(_), Err(_)) | (Err(_), Err(FormatError::Magic)) => true,
            (Err(_), _) => false,
        };
        if newer {
            newest = table;
        }
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use cluster_map::VolumeId;

    use super::*;
    use crate::store::EXTENT_SECTORS;

    const OURS: ClusterId = ClusterId([1; 16]);
    const FRESH: StoreId = StoreId([2; 16]);
    const SIZE: u64 = 128 << 20;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
    }

    fn open(path: &Path) -> Result<Catalog, CatalogError> {
        Catalog::open(path, SIZE, OURS, None, FRESH)
    }

    fn reserve(catalog: &mut Catalog, n: u8) {
        let mut allocation = catalog.allocation().clone();
        allocation.reserve(VolumeId([n; 16]), EXTENT_SECTORS).unwrap();
        allocation.commit(VolumeId([n; 16]), EXTENT_SECTORS);
        catalog.commit(allocation).unwrap();
    }

    fn damage(path: &Path, offset_bytes: u64) {
        std::fs::OpenOptions::new()
            .write(true)
            .open(path)
            .unwrap()
            .write_all_at(&[0xff; 600], offset_bytes)
            .unwrap();
    }

    #[test]
    fn volumes_survive_reopening() {
        let folder = folder();
        let path = folder.path().join("s");
        let mut catalog = open(&path).unwrap();
        assert_eq!(catalog.id(), FRESH);
        for n in 1..=5 {
            reserve(&mut catalog, n);
        }
        let allocation = catalog.allocation().clone();
        drop(catalog);
        let again = Catalog::open(&path, 0, OURS, Some(FRESH), StoreId([9; 16])).unwrap();
        assert_eq!((again.id(), again.allocation()), (FRESH, &allocation));
    }

    #[test]
    fn a_torn_table_leaves_the_one_before() {
        let folder = folder();
        let path = folder.path().join("s");
        let mut catalog = open(&path).unwrap();
        reserve(&mut catalog, 1);
        let before = catalog.allocation().clone();
        reserve(&mut catalog, 2);
        let newest = TABLE_OFFSETS[usize::from(catalog.sequence.is_multiple_of(2))];
        drop(catalog);
        damage(&path, newest + 64);
        let mut catalog = open(&path).unwrap();
        assert_eq!(catalog.allocation(), &before);
        // The next change must not land on the one table that is good.
        reserve(&mut catalog, 3);
        let after = catalog.allocation().clone();
        drop(catalog);
        assert_eq!(open(&path).unwrap().allocation(), &after);
    }

    #[test]
    fn one_superblock_is_enough_and_none_is_damage() {
        let folder = folder();
        let path = folder.path().join("s");
        drop(open(&path).unwrap());
        damage(&path, SUPERBLOCK_OFFSETS[0] + 20);
        drop(open(&path).unwrap());
        damage(&path, SUPERBLOCK_OFFSETS[1] + 20);
        assert!(matches!(open(&path), Err(CatalogError::Damaged { what: "superblock", .. })));
        let damaged = std::fs::read(&path).unwrap();
        assert!(open(&path).is_err());
        assert!(std::fs::read(&path).unwrap() == damaged, "nothing was changed");
    }

    #[test]
    fn without_any_good_table_the_store_is_refused() {
        let folder = folder();
        let path = folder.path().join("s");
        let mut catalog = open(&path).unwrap();
        reserve(&mut catalog, 1);
        drop(catalog);
        damage(&path, TABLE_OFFSETS[0]);
        damage(&path, TABLE_OFFSETS[1]);
        assert!(matches!(open(&path), Err(CatalogError::Damaged { what: "allocation table", .. })));
    }

    #[test]
    fn foreign_stores_are_refused_and_kept() {
        let folder = folder();
        let path = folder.path().join("s");
        drop(open(&path).unwrap());
        let other = Catalog::open(&path, 0, ClusterId([8; 16]), None, FRESH);
        assert!(matches!(other, Err(CatalogError::OtherCluster { .. })));
        let moved = Catalog::open(&path, 0, OURS, Some(StoreId([8; 16])), FRESH);
        assert!(matches!(moved, Err(CatalogError::OtherStore { .. })));
        let occupied = folder.path().join("fs");
        std::fs::write(&occupied, vec![3; 64 << 20]).unwrap();
        assert!(matches!(open(&occupied), Err(CatalogError::Foreign { .. })));
        assert_eq!(std::fs::read(&occupied).unwrap()[0], 3);
    }

    #[test]
    fn a_store_that_was_here_and_is_blank_is_not_formatted_again() {
        let folder = folder();
        let path = folder.path().join("s");
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let lost = Catalog::open(&path, 0, OURS, Some(FRESH), StoreId([9; 16]));
        assert!(matches!(lost, Err(CatalogError::Foreign { .. })));
    }

    #[test]
    fn an_interrupted_format_is_begun_again() {
        let folder = folder();
        let path = folder.path().join("s");
        drop(open(&path).unwrap());
        // As a crash leaves it: the first table is there, the superblocks are not.
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        for offset_bytes in SUPERBLOCK_OFFSETS {
            file.write_all_at(&[0; SUPERBLOCK_BYTES], offset_bytes).unwrap();
        }
        assert_eq!(open(&path).unwrap().id(), FRESH);
        // Once a volume was kept there it is damage, and the same with a label of something else is not ours to format.
        let mut catalog = open(&path).unwrap();
        reserve(&mut catalog, 1);
        drop(catalog);
        for offset_bytes in SUPERBLOCK_OFFSETS {
            file.write_all_at(&[0; SUPERBLOCK_BYTES], offset_bytes).unwrap();
        }
        assert!(matches!(open(&path), Err(CatalogError::Foreign { .. })));
        file.write_all_at(&[0; BLOCK_BYTES], TABLE_OFFSETS[1]).unwrap();
        drop(open(&path).unwrap());
        for offset_bytes in SUPERBLOCK_OFFSETS {
            file.write_all_at(&[0; SUPERBLOCK_BYTES], offset_bytes).unwrap();
        }
        file.write_all_at(b"label", 1080).unwrap();
        assert!(matches!(open(&path), Err(CatalogError::Foreign { .. })));
    }

    #[test]
    fn a_file_cut_short_is_refused() {
        let folder = folder();
        let path = folder.path().join("s");
        drop(open(&path).unwrap());
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(SIZE / 2).unwrap();
        assert!(matches!(open(&path), Err(CatalogError::Shrunk { .. })));
    }
}
