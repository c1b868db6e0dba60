//! Opening and formatting a store on a real device, and changing its catalog. All of it blocks: it is the manager's, never a
//! core's.
//!
//! Invariants:
//! * Only a blank device is formatted. One of another cluster, or one that cannot be trusted, is refused and not written.
//! * Nothing is written before everything has been read and found whole; then the open count is raised durably, and what was
//!   read with it, before anything else is written.
//! * A format is complete when its first superblock is there: what an interrupted one leaves is formatted again.

use std::path::Path;
use std::sync::Arc;

use cluster_map::{ClusterId, NodeId, StoreId};

use super::catalog::Catalog;
use super::format::{
    BLOCK, CATALOG_BYTES, CATALOG_OFFSETS, DEVICE_BYTES_MIN, FormatError, SUPERBLOCK_OFFSETS, Shape,
    Superblock,
};
use super::recovery::{self, Findings, Image, Medium, RecoveryError};
use super::shard::{Shard, ShardConfig};
use super::shared::Shared;
use crate::device::{Device, DeviceError};
use crate::store::BLOCK_BYTES;

/// Why a store could not be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
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
    /// A shard of it is damaged.
    #[error("store {path} cannot be trusted: {source}; it was not opened, nothing on it was changed")]
    Shard {
        /// The path.
        path: String,
        /// What is wrong.
        source: RecoveryError<DeviceError>,
    },
    /// Two shards claim one extent slot.
    #[error(
        "store {path} cannot be trusted: two shards have one extent slot; it was not opened, nothing on it was changed"
    )]
    SlotTwice {
        /// The path.
        path: String,
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
    /// The catalog has no room for another volume.
    #[error("the catalog of store {path} is full: delete volumes, or add another store")]
    CatalogFull {
        /// The path.
        path: String,
    },
    /// An earlier change failed.
    #[error("store {path} failed before and takes no changes: restart the node after looking at the device")]
    Failed {
        /// The path.
        path: String,
    },
}

/// What a store is opened as.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// The node's cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// The store that was at this path before.
    pub expected: Option<StoreId>,
    /// The id that a fresh store gets.
    pub fresh: StoreId,
}

/// An open store: its device, and the catalog in force on it.
#[derive(Debug)]
pub struct OpenStore {
    device: Device,
    layout: Arc<Superblock>,
    catalog: Catalog,
    sequence: u64,
    failed: bool,
}

/// A store that has just been opened.
#[derive(Debug)]
pub struct Opened {
    /// Device and catalog.
    pub store: OpenStore,
    /// What cores and manager share.
    pub shared: Arc<Shared>,
    /// The shards, by number, for the cores.
    pub shards: Vec<Box<Shard>>,
    /// Slots that no extent has, from the lowest on. None of them is in [`Shared::free`] yet.
    pub free: Vec<u32>,
    /// What opening it has found, of all shards together.
    pub findings: Findings,
}

impl Medium for Device {
    type Error = DeviceError;

    fn read_at(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.read_into(offset_bytes, bytes)
    }

    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.write_from(offset_bytes, bytes)
    }

    fn sync(&self) -> Result<(), DeviceError> {
        self.sync_data()
    }
}

/// Opens the store at `path` for writing, formatting it if it is blank. A file that does not exist is made `size_bytes` long.
///
/// # Errors
/// [`OpenError`]; nothing was written then, unless formatting or recovery itself failed.
pub fn open(path: &Path, size_bytes: u64, identity: Identity) -> Result<Opened, OpenError> {
    let device = Device::open(path, size_bytes, DEVICE_BYTES_MIN)?;
    let layout = match read_superblock(&device)? {
        Ok(layout) => layout,
        Err(FormatError::Magic) if identity.expected.is_none() && is_unformatted(&device)? => {
            format(&device, identity, Shape::default())?
        }
        Err(FormatError::Magic) => return Err(OpenError::Foreign { path: shown(&device) }),
        Err(source) => return Err(OpenError::Damaged { path: shown(&device), what: "superblock", source }),
    };
    check_identity(&device, &layout, identity)?;
    let (sequence, catalog) = read_catalog(&device, &layout)?.map_err(|source| OpenError::Damaged {
        path: shown(&device),
        what: "catalog",
        source,
    })?;
    let mut images = read_shards(&device, &layout)?;

    let mut layout = layout.grown(device.len_bytes()).unwrap_or(layout);
    let free = recovery::free_slots(&layout, images.iter())
        .ok_or_else(|| OpenError::SlotTwice { path: shown(&device) })?;
    layout.open_count += 1;
    // Its syncs also make durable what was read: after a killed process it may still be in the device's cache, and data must not
    // be in place without the batch that says so.
    write_superblock(&device, &layout)?;
    place_shards(&device, &layout, &mut images)?;
    device.sync_data()?;

    let layout = Arc::new(layout);
    let shared = Arc::new(Shared::new(layout.slots(), layout.shards));
    let findings = images.iter().fold(Findings::default(), |sum, image| sum.and(image.findings));
    let atomic_blocks = device.writes_blocks_atomically();
    let flushes_batches = device.flushes_whole_cache();
    let shards = (0..layout.shards).zip(images).map(|(shard, image)| {
        let (layout, shared) = (Arc::clone(&layout), Arc::clone(&shared));
        let config = ShardConfig { layout, shard, atomic_blocks, flushes_batches, shared };
        Box::new(Shard::new(config, image.recovered))
    });
    let shards = shards.collect();
    shared.counters.lost_blocks.store(findings.lost_blocks, std::sync::atomic::Ordering::Relaxed);
    let store = OpenStore { device, layout, catalog, sequence, failed: false };
    Ok(Opened { store, shared, shards, free, findings })
}

/// Writes an empty store over whatever the device holds; superblocks last, so that one is never without the rest.
///
/// # Errors
/// [`OpenError::Device`], also where not one extent fits.
pub fn format(device: &Device, identity: Identity, shape: Shape) -> Result<Superblock, OpenError> {
    let mut key = [0; 16];
    rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| device.io_error("make a key for it", error.into()))?;
    let Identity { cluster, node, fresh, .. } = identity;
    let layout = Superblock::new(cluster, node, fresh, key, device.len_bytes(), shape).ok_or_else(|| {
        DeviceError::TooSmall {
            path: shown(device),
            len_bytes: device.len_bytes(),
            min_bytes: DEVICE_BYTES_MIN,
        }
    })?;
    // What was there before must not be read as a store, should this be interrupted.
    for offset_bytes in SUPERBLOCK_OFFSETS {
        device.write_durably(offset_bytes, &[0; BLOCK_BYTES])?;
    }
    device.write_durably(CATALOG_OFFSETS[0], &Catalog::default().encode(layout.store, 1))?;
    device.write_durably(CATALOG_OFFSETS[1], &[0; BLOCK_BYTES])?;
    for shard in 0..layout.shards {
        // Journals are written in full: a file system then has nothing to record when a batch is.
        let journal_bytes = u64::from(layout.journal_blocks) * BLOCK;
        device.fill_with_zeros(layout.journal_offset(shard), journal_bytes, |_| true)?;
        for which in 0..2 {
            let used_blocks = 1 + layout.slots().div_ceil(128) + layout.state_blocks;
            let table_bytes = u64::from(layout.checkpoint_blocks.min(used_blocks)) * BLOCK;
            device.fill_with_zeros(layout.checkpoint_offset(shard, which), table_bytes, |_| true)?;
        }
        let first = recovery::first_checkpoint(&layout, shard);
        device.write_durably(layout.checkpoint_offset(shard, 0), &first)?;
    }
    if device.is_file() {
        let pages = layout.segments[0];
        device.fill_with_zeros(pages.pages_offset, 2 * u64::from(pages.slots) * BLOCK, |_| true)?;
    }
    write_superblock(device, &layout)?;
    Ok(layout)
}

/// Reads a store's superblock and catalog, and all its shards, and writes nothing.
///
/// # Errors
/// [`OpenError`].
pub fn inspect(device: &Device) -> Result<(Superblock, Catalog, Vec<Image>), OpenError> {
    let layout = read_superblock(device)?.map_err(|source| match source {
        FormatError::Magic => OpenError::Foreign { path: shown(device) },
        source => OpenError::Damaged { path: shown(device), what: "superblock", source },
    })?;
    let (_, catalog) = read_catalog(device, &layout)?.map_err(|source| OpenError::Damaged {
        path: shown(device),
        what: "catalog",
        source,
    })?;
    let images = read_shards(device, &layout)?;
    if recovery::free_slots(&layout, images.iter()).is_none() {
        return Err(OpenError::SlotTwice { path: shown(device) });
    }
    Ok((layout, catalog, images))
}

impl OpenStore {
    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The store's id.
    #[must_use]
    pub fn id(&self) -> StoreId {
        self.layout.store
    }

    /// Where everything is.
    #[must_use]
    pub fn layout(&self) -> &Arc<Superblock> {
        &self.layout
    }

    /// The volumes in force.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Puts another catalog in force, durably.
    ///
    /// # Errors
    /// [`OpenError`]; the old one is in force then, in memory; after a failed write the store takes no more changes.
    pub fn commit(&mut self, catalog: Catalog) -> Result<(), OpenError> {
        if self.failed {
            return Err(OpenError::Failed { path: shown(&self.device) });
        }
        let sequence = self.sequence + 1;
        let bytes = catalog.encode(self.layout.store, sequence);
        let slot = CATALOG_OFFSETS[usize::from(sequence.is_multiple_of(2))];
        if let Err(error) = self.device.write_durably(slot, &bytes) {
            self.failed = true;
            return Err(error.into());
        }
        self.sequence = sequence;
        self.catalog = catalog;
        Ok(())
    }
}

fn shown(device: &Device) -> String {
    device.path().display().to_string()
}

fn check_identity(device: &Device, layout: &Superblock, identity: Identity) -> Result<(), OpenError> {
    let path = shown(device);
    if layout.cluster != identity.cluster {
        return Err(OpenError::OtherCluster { path, found: layout.cluster, own: identity.cluster });
    }
    if let Some(expected) = identity.expected.filter(|expected| *expected != layout.store) {
        return Err(OpenError::OtherStore { path, found: layout.store, expected });
    }
    let (len_bytes, formatted_bytes) = (device.len_bytes(), layout.device_bytes);
    if len_bytes < formatted_bytes {
        return Err(OpenError::Shrunk { path, len_bytes, formatted_bytes });
    }
    Ok(())
}

fn write_superblock(device: &Device, layout: &Superblock) -> Result<(), DeviceError> {
    let bytes = layout.encode();
    SUPERBLOCK_OFFSETS.iter().try_for_each(|offset_bytes| device.write_durably(*offset_bytes, &bytes))
}

/// The newest copy that verifies, or why the best one does not.
fn read_superblock(device: &Device) -> Result<Result<Superblock, FormatError>, DeviceError> {
    let mut best: Result<Superblock, FormatError> = Err(FormatError::Magic);
    for offset_bytes in SUPERBLOCK_OFFSETS {
        let copy = Superblock::decode(&device.read(offset_bytes, BLOCK_BYTES)?);
        let better = match (&copy, &best) {
            (Ok(copy), Ok(best)) => copy.open_count > best.open_count,
            (Ok(_), Err(_)) | (Err(_), Err(FormatError::Magic)) => true,
            (Err(_), _) => false,
        };
        if better {
            best = copy;
        }
    }
    Ok(best)
}

/// The newest catalog that verifies.
fn read_catalog(
    device: &Device,
    layout: &Superblock,
) -> Result<Result<(u64, Catalog), FormatError>, DeviceError> {
    let mut newest: Result<(u64, Catalog), FormatError> = Err(FormatError::Magic);
    for offset_bytes in CATALOG_OFFSETS {
        let table = Catalog::decode(&device.read(offset_bytes, CATALOG_BYTES)?, layout.store, layout.shards);
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

/// Whether the device is blank, or an interrupted format's first catalog is all there is at its ends: nothing was ever kept
/// there.
pub(crate) fn is_unformatted(device: &Device) -> Result<bool, DeviceError> {
    let first = device.read(CATALOG_OFFSETS[0], BLOCK_BYTES)?;
    let begins = first.starts_with(&Catalog::default().encode(StoreId([0; 16]), 1)[..8]);
    let only = device.read(CATALOG_OFFSETS[1], BLOCK_BYTES)?.iter().all(|byte| *byte == 0);
    let empty = first[40..44].iter().all(|byte| *byte == 0);
    let except = if begins && only && empty { CATALOG_OFFSETS[0]..CATALOG_OFFSETS[0] + BLOCK } else { 0..0 };
    device.is_blank(except)
}

/// Does something for each shard, on a thread for each: they wait for the device most of the time, which has work for all.
fn for_each_shard<T: Send>(
    shards: &mut [T],
    work: impl Fn(u16, &mut T) -> Result<(), OpenError> + Sync,
) -> Result<(), OpenError> {
    let work = &work;
    std::thread::scope(|scope| {
        let parts = (0..).zip(shards).map(|(number, shard)| scope.spawn(move || work(number, shard)));
        let parts: Vec<_> = parts.collect();
        parts.into_iter().try_for_each(|part| part.join().expect("opening does not panic"))
    })
}

fn read_shards(device: &Device, layout: &Superblock) -> Result<Vec<Image>, OpenError> {
    let mut images: Vec<Option<Image>> = Vec::new();
    images.resize_with(usize::from(layout.shards), || None);
    for_each_shard(&mut images, |shard, image| {
        *image = Some(recovery::read(layout, shard, device).map_err(|source| shard_error(device, source))?);
        Ok(())
    })?;
    Ok(images.into_iter().map(|image| image.expect("all were read")).collect())
}

fn place_shards(device: &Device, layout: &Superblock, images: &mut [Image]) -> Result<(), OpenError> {
    for_each_shard(images, |shard, image| {
        recovery::place(layout, shard, device, image).map_err(|source| shard_error(device, source))
    })
}

fn shard_error(device: &Device, source: RecoveryError<DeviceError>) -> OpenError {
    match source {
        RecoveryError::Medium(error) => error.into(),
        source => OpenError::Shard { path: shown(device), source },
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    use cluster_map::VolumeId;

    use super::*;
    use crate::store::extent::extents::FreeSlot;
    use crate::store::extent::format::{Epochs, ReplicaState};
    use crate::store::extent::on_file::Driven;
    use crate::store::extent::shard::{Copies, Object};
    use crate::store::{EXTENT_BYTES, StoreError};

    const OURS: ClusterId = ClusterId([1; 16]);
    const FRESH: StoreId = StoreId([2; 16]);
    const SIZE: u64 = 128 << 20;
    const IDENTITY: Identity =
        Identity { cluster: OURS, node: NodeId([5; 16]), expected: None, fresh: FRESH };

    fn folder() -> tempfile::TempDir {
        // On a disk, which is where the build is.
        tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
    }

    fn open_it(path: &Path) -> Result<Opened, OpenError> {
        open(path, SIZE, IDENTITY)
    }

    fn add(store: &mut OpenStore, n: u8) {
        let mut catalog = store.catalog().clone();
        catalog.add(VolumeId([n; 16]), 8192, store.layout().shards).unwrap();
        store.commit(catalog).unwrap();
    }

    fn write(path: &Path, offset_bytes: u64, bytes: &[u8]) {
        OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset_bytes).unwrap();
    }

    fn damage(path: &Path, offset_bytes: u64) {
        write(path, offset_bytes, &[0xff; 600]);
    }

    /// Whether opening is refused, and leaves every byte as it was.
    fn is_refused(path: &Path, identity: Identity, why: impl Fn(&OpenError) -> bool) -> bool {
        let before = std::fs::read(path).unwrap();
        let error = open(path, SIZE, identity).map(drop).unwrap_err();
        assert!(why(&error), "{error}");
        std::fs::read(path).unwrap() == before
    }

    #[test]
    fn a_fresh_store_offers_its_slots_and_volumes_survive_reopening() {
        let folder = folder();
        let path = folder.path().join("s");
        let mut opened = open_it(&path).unwrap();
        let layout = Arc::clone(opened.store.layout());
        assert_eq!((opened.store.id(), opened.findings, layout.open_count), (FRESH, Findings::default(), 1));
        assert_eq!(opened.shards.len(), usize::from(layout.shards));
        assert_eq!(opened.free, (0..layout.slots()).collect::<Vec<_>>());
        assert!(opened.shared.free.is_empty(), "they are the caller's to make ready");
        for n in 1..=5 {
            add(&mut opened.store, n);
        }
        let catalog = opened.store.catalog().clone();
        drop(opened);
        let identity = Identity { expected: Some(FRESH), fresh: StoreId([9; 16]), ..IDENTITY };
        let again = open(&path, 0, identity).unwrap();
        assert_eq!((again.store.id(), again.store.catalog()), (FRESH, &catalog));
        assert_eq!(again.store.layout().open_count, 2);
    }

    #[test]
    fn a_torn_catalog_leaves_the_one_before() {
        let folder = folder();
        let path = folder.path().join("s");
        let mut opened = open_it(&path).unwrap();
        add(&mut opened.store, 1);
        let before = opened.store.catalog().clone();
        add(&mut opened.store, 2);
        let newest = CATALOG_OFFSETS[usize::from(opened.store.sequence.is_multiple_of(2))];
        drop(opened);
        damage(&path, newest + 64);
        let mut opened = open_it(&path).unwrap();
        assert_eq!(opened.store.catalog(), &before);
        // The next change must not land on the one table that is good.
        add(&mut opened.store, 3);
        let after = opened.store.catalog().clone();
        drop(opened);
        let opened = open_it(&path).unwrap();
        assert_eq!(opened.store.catalog(), &after);
        drop(opened);
        CATALOG_OFFSETS.iter().for_each(|offset| damage(&path, *offset));
        assert!(is_refused(&path, IDENTITY, |error| {
            matches!(error, OpenError::Damaged { what: "catalog", .. })
        }));
    }

    #[test]
    fn one_superblock_is_enough_and_none_is_damage() {
        let folder = folder();
        let path = folder.path().join("s");
        drop(open_it(&path).unwrap());
        for kept in 0..SUPERBLOCK_OFFSETS.len() {
            for (_, offset) in SUPERBLOCK_OFFSETS.iter().enumerate().filter(|(at, _)| *at != kept) {
                damage(&path, offset + 20);
            }
            // All copies are made whole again.
            drop(open_it(&path).unwrap());
        }
        SUPERBLOCK_OFFSETS.iter().for_each(|offset| damage(&path, offset + 20));
        assert!(is_refused(&path, IDENTITY, |error| {
            matches!(error, OpenError::Damaged { what: "superblock", .. })
        }));
    }

    #[test]
    fn the_newest_superblock_counts() {
        let folder = folder();
        let path = folder.path().join("s");
        let opened = open_it(&path).unwrap();
        let old = opened.store.layout().encode();
        drop(opened);
        drop(open_it(&path).unwrap());
        // As a crash between two copies leaves it.
        write(&path, SUPERBLOCK_OFFSETS[0], &old);
        write(&path, SUPERBLOCK_OFFSETS[3], &old);
        assert_eq!(open_it(&path).unwrap().store.layout().open_count, 3);
    }

    #[test]
    fn foreign_stores_are_refused_and_kept() {
        let folder = folder();
        let path = folder.path().join("s");
        drop(open_it(&path).unwrap());
        let other = Identity { cluster: ClusterId([8; 16]), ..IDENTITY };
        assert!(is_refused(&path, other, |error| matches!(error, OpenError::OtherCluster { .. })));
        let moved = Identity { expected: Some(StoreId([8; 16])), ..IDENTITY };
        assert!(is_refused(&path, moved, |error| matches!(error, OpenError::OtherStore { .. })));
        let occupied = folder.path().join("fs");
        std::fs::write(&occupied, vec![3; 64 << 20]).unwrap();
        assert!(is_refused(&occupied, IDENTITY, |error| matches!(error, OpenError::Foreign { .. })));
    }

    #[test]
    fn a_store_that_was_here_and_is_blank_is_not_formatted_again() {
        let folder = folder();
        let path = folder.path().join("s");
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let lost = Identity { expected: Some(FRESH), fresh: StoreId([9; 16]), ..IDENTITY };
        assert!(is_refused(&path, lost, |error| matches!(error, OpenError::Foreign { .. })));
    }

    #[test]
    fn an_interrupted_format_is_begun_again() {
        let folder = folder();
        let path = folder.path().join("s");
        let clear = || SUPERBLOCK_OFFSETS.iter().for_each(|offset| write(&path, *offset, &[0; BLOCK_BYTES]));
        drop(open_it(&path).unwrap());
        // As a crash leaves it: the first catalog is there, the superblocks are not.
        clear();
        let identity = Identity { fresh: StoreId([6; 16]), ..IDENTITY };
        let mut opened = open(&path, 0, identity).unwrap();
        assert_eq!(opened.store.id(), StoreId([6; 16]));
        // Once a volume was kept there it is damage, and the same with a label of something else is not ours to format.
        add(&mut opened.store, 1);
        drop(opened);
        clear();
        assert!(is_refused(&path, IDENTITY, |error| matches!(error, OpenError::Foreign { .. })));
        write(&path, CATALOG_OFFSETS[1], &[0; BLOCK_BYTES]);
        drop(open_it(&path).unwrap());
        clear();
        write(&path, 1080, b"label");
        assert!(is_refused(&path, IDENTITY, |error| matches!(error, OpenError::Foreign { .. })));
    }

    #[test]
    fn a_file_cut_short_is_refused() {
        let folder = folder();
        let path = folder.path().join("s");
        drop(open_it(&path).unwrap());
        OpenOptions::new().write(true).open(&path).unwrap().set_len(SIZE / 2).unwrap();
        assert!(is_refused(&path, IDENTITY, |error| matches!(error, OpenError::Shrunk { .. })));
    }

    #[test]
    fn a_shard_without_a_checkpoint_is_damage_and_nothing_is_written() {
        let folder = folder();
        let path = folder.path().join("s");
        let opened = open_it(&path).unwrap();
        let layout = Arc::clone(opened.store.layout());
        drop(opened);
        damage(&path, layout.checkpoint_offset(layout.shards - 1, 0));
        assert!(is_refused(&path, IDENTITY, |error| matches!(error, OpenError::Shard { .. })));
    }

    /// Opens the store, lets `work` have a shard and its disk, and brings it to rest.
    fn with_shard(path: &Path, work: impl FnOnce(&mut Driven)) -> (Vec<u32>, u32) {
        let opened = open_it(path).unwrap();
        let (free, slots) = (opened.free.clone(), opened.store.layout().slots());
        for slot in &free {
            opened.store.device().make_ready(opened.store.layout().data_offset(*slot), EXTENT_BYTES).unwrap();
            opened.shared.add_free(FreeSlot::new(*slot));
        }
        opened.shared.set_no_more(true);
        let file = opened.store.device().try_clone().unwrap().into_file();
        let mut driven = Driven::new(Arc::new(file.into()), opened.shards);
        work(&mut driven);
        driven.close();
        (free, slots)
    }

    #[test]
    fn a_file_that_has_grown_has_more_slots_and_its_data_still() {
        let folder = folder();
        let path = folder.path().join("s");
        let volumes = [Object { shard: 0, number: 0 }, Object { shard: 1, number: 1 }];
        let (free, slots) = with_shard(&path, |driven| {
            for (byte, volume) in (1..).zip(volumes) {
                driven.write(volume, 3, byte).unwrap();
            }
        });
        assert_eq!(free.len(), slots as usize);
        OpenOptions::new().write(true).open(&path).unwrap().set_len(SIZE + (64 << 20)).unwrap();
        let (free, more) = with_shard(&path, |driven| {
            for (byte, volume) in (1..).zip(volumes) {
                assert_eq!([2, 3].map(|block| driven.read(volume, block)), [0, byte]);
            }
            // All that is free is used, the new slots too.
            for extent in 1.. {
                let block = extent * 1024;
                match driven.write(volumes[0], block, 7) {
                    Ok(()) => assert_eq!(driven.read(volumes[0], block), 7),
                    Err(error) => {
                        assert_eq!(error, StoreError::NoSpace);
                        return;
                    }
                }
            }
        });
        assert!(more >= slots + 14, "{slots} became {more}");
        assert_eq!(free.len(), more as usize - 2);
        let (free, same) = with_shard(&path, |driven| {
            for (byte, volume) in (1..).zip(volumes) {
                assert_eq!(driven.read(volume, 3), byte);
            }
            for extent in 1..u64::from(more) - 1 {
                assert_eq!(driven.read(volumes[0], extent * 1024), 7, "extent {extent}");
            }
        });
        assert_eq!((free, same), (Vec::new(), more));
    }

    #[test]
    fn what_is_kept_of_a_replica_is_there_when_the_store_is_opened_again() {
        let folder = folder();
        let path = folder.path().join("s");
        let volumes = [Object { shard: 0, number: 0 }, Object { shard: 1, number: 1 }];
        let state = |takeover: u64| {
            let epochs = Epochs::new(vec![(3, takeover)]).unwrap();
            Arc::new(ReplicaState { takeover, epochs, ..ReplicaState::default() })
        };
        with_shard(&path, |driven| {
            for (takeover, volume) in [(1, volumes[0]), (2, volumes[0]), (5, volumes[1])] {
                driven.ask(|store, request| store.persist(request, volume, state(takeover))).unwrap();
                assert_eq!(driven.store().state(volume), Some(&state(takeover)));
            }
        });
        with_shard(&path, |driven| {
            assert_eq!(driven.store().state(volumes[0]), Some(&state(2)));
            assert_eq!(driven.store().state(volumes[1]), Some(&state(5)));
            // The layer ends, and so does its state.
            driven.unmap(volumes[1], 0);
            for _ in 0..10 {
                driven.turn();
            }
            assert_eq!(driven.store().state(volumes[1]), None);
        });
        with_shard(&path, |driven| {
            assert_eq!(driven.store().state(volumes[0]), Some(&state(2)));
            assert_eq!(driven.store().state(volumes[1]), None);
        });
    }

    #[test]
    fn what_is_unmapped_on_one_of_several_copies_is_listed_until_all_have_it() {
        let folder = folder();
        let path = folder.path().join("s");
        let volume = Object { shard: 1, number: 0 };
        let listed = |driven: &mut Driven| {
            let (mut held, mut active) = (Vec::new(), Vec::new());
            assert!(driven.store().list(volume, 0, 9, &mut held));
            let highest = driven.store().survey(volume, &mut active);
            assert!(active.iter().all(|extent| extent.active));
            (held.iter().map(|held| (held.number, held.version)).collect::<Vec<_>>(), active.len(), highest)
        };
        let state = Arc::new(ReplicaState::default());
        with_shard(&path, |driven| {
            driven.ask(|store, request| store.persist(request, volume, state)).unwrap();
            for extent in 0..2 {
                driven.write(volume, extent * 1024 + 5, 7).unwrap();
            }
            // A layer without other copies gives the room back at once.
            driven
                .ask(|store, request| store.unmap_range(request, volume, 0..1024, Copies::Sole, 0))
                .unwrap();
            assert_eq!(listed(driven).0.iter().map(|held| held.0).collect::<Vec<_>>(), [1]);
            let copies = Copies::Others { stable_version: 50 };
            driven.ask(|store, request| store.unmap_range(request, volume, 0..8192, copies, 51)).unwrap();
            assert_eq!(listed(driven), (vec![(1, 51)], 1, 51));
            assert_eq!(driven.read(volume, 1024 + 5), 0);
        });
        with_shard(&path, |driven| {
            assert_eq!(listed(driven), (vec![(1, 51)], 1, 51));
            driven.store().set_stable(volume, 50);
            driven.turn();
            assert_eq!(listed(driven), (vec![(1, 51)], 1, 51));
            assert_ne!(driven.store().due_ns(), 0, "nothing is to be done");
            driven.store().set_stable(volume, 51);
            assert_eq!(driven.store().due_ns(), 0, "a turn has something to do");
            for _ in 0..10 {
                driven.turn();
            }
            assert_eq!(listed(driven), (vec![], 0, 51));
        });
        with_shard(&path, |driven| assert_eq!(listed(driven), (vec![], 0, 51)));
    }
}
