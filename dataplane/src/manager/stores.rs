//! The stores of a node: which are open, what is allocated on them, and the zero-fill of new extents.
//!
//! A volume's extents are reserved in the table first, then filled by a thread of their own, then committed; after a crash
//! in between the fill is begun again. So the table never promises bytes that were not written.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cluster_map::{
    Desired, DesiredStore, DesiredVolume, ObservedStore, ObservedVolume, StoreId, StoreState, VolumeId,
    VolumeIntent, VolumeObserved,
};

use crate::device::DeviceError;
use crate::exchange::StoreAccess;
use crate::store::linear::Placement;
use crate::store::linear::allocation::Entry;
use crate::store::linear::catalog::{Catalog, CatalogError};
use crate::store::linear::format::DATA_OFFSET_BYTES;
use crate::store::{BLOCK_BYTES, EXTENT_BYTES, SECTOR_BYTES};

/// How long a store that could not be opened is left alone before it is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// Volumes of one store that are filled at a time: each has a thread and a descriptor. The rest wait for their turn.
const FILLS_MAX: usize = 64;

/// A zero-fill in progress.
struct Fill {
    size_sectors: u64,
    done_bytes: Arc<AtomicU64>,
    cancelled: Arc<AtomicBool>,
    thread: JoinHandle<Result<bool, DeviceError>>,
}

struct OpenStore {
    /// As the desired state spells it.
    path: String,
    catalog: Catalog,
    access: StoreAccess,
    fills: BTreeMap<VolumeId, Fill>,
    /// Why a volume could not be made or changed, and for which size: another wish is another try.
    failures: BTreeMap<VolumeId, (u64, String)>,
    /// The desired state names it no more.
    removed: bool,
    /// Cores have been told to let it go.
    released: bool,
}

/// All stores. Positions are stable while a store is open.
#[derive(Default)]
pub(super) struct Stores {
    slots: Vec<Option<OpenStore>>,
    /// By path: why opening failed, and when.
    failed: BTreeMap<String, (String, Instant)>,
    access_changed: bool,
}

impl Stores {
    /// Opens every store that the desired state names.
    ///
    /// # Errors
    /// The first one that cannot be opened.
    pub(super) fn open_all(desired: &Desired) -> Result<Stores, CatalogError> {
        let mut stores = Stores::default();
        for wish in &desired.stores {
            stores.open(desired, wish)?;
        }
        Ok(stores)
    }

    /// Opens what is named and not open; marks what is open and no longer named.
    pub(super) fn open_missing(&mut self, desired: &Desired) {
        for store in self.slots.iter_mut().flatten() {
            store.removed = !desired.stores.iter().any(|wish| wish.path == store.path);
        }
        self.failed.retain(|path, _| desired.stores.iter().any(|wish| &wish.path == path));
        for wish in &desired.stores {
            let open = self.slots.iter().flatten().any(|store| store.path == wish.path);
            let recent = self.failed.get(&wish.path).is_some_and(|(_, when)| when.elapsed() < RETRY);
            if open || recent {
                continue;
            }
            match self.open(desired, wish) {
                Ok(()) => {
                    self.failed.remove(&wish.path);
                }
                Err(error) => {
                    self.failed.insert(wish.path.clone(), (error.to_string(), Instant::now()));
                }
            }
        }
    }

    fn open(&mut self, desired: &Desired, wish: &DesiredStore) -> Result<(), CatalogError> {
        let mut fresh = [0u8; 16];
        rustix::rand::getrandom(&mut fresh, rustix::rand::GetRandomFlags::empty()).map_err(|error| {
            DeviceError::Io { path: wish.path.clone(), what: "make an id", source: error.into() }
        })?;
        let catalog =
            Catalog::open(Path::new(&wish.path), wish.size_bytes, desired.cluster, wish.id, StoreId(fresh))?;
        let device = catalog.device();
        let access = StoreAccess {
            file: Arc::new(OwnedFd::from(device.try_clone()?.into_file())),
            durability: device.durability(),
            dsync: device.needs_dsync(),
        };
        let store = OpenStore {
            path: wish.path.clone(),
            catalog,
            access,
            fills: BTreeMap::new(),
            failures: BTreeMap::new(),
            removed: false,
            released: false,
        };
        match self.slots.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(store),
            None => self.slots.push(Some(store)),
        }
        self.access_changed = true;
        Ok(())
    }

    /// Whether cores must be told of stores again; asking resets it.
    pub(super) fn access_changed(&mut self) -> bool {
        std::mem::take(&mut self.access_changed)
    }

    /// How cores reach the stores, by position.
    pub(super) fn access(&self) -> Vec<Option<StoreAccess>> {
        let access = |slot: &Option<OpenStore>| {
            slot.as_ref().filter(|store| !store.released).map(|s| s.access.clone())
        };
        self.slots.iter().map(access).collect()
    }

    /// Whether there is something to do although nobody wants anything new: a fill to take in, a store to try again or to
    /// close.
    pub(super) fn have_work(&self) -> bool {
        self.is_filling() || !self.failed.is_empty() || self.slots.iter().flatten().any(|store| store.removed)
    }

    /// Whether a zero-fill is in progress.
    pub(super) fn is_filling(&self) -> bool {
        self.slots.iter().flatten().any(|store| !store.fills.is_empty())
    }

    /// All volumes on stores that are named, with the store's position.
    fn volumes(&self) -> impl Iterator<Item = (usize, &Entry)> {
        let named =
            |(at, slot): (usize, &'_ Option<OpenStore>)| slot.as_ref().filter(|s| !s.removed).map(|_| at);
        let positions: Vec<usize> = self.slots.iter().enumerate().filter_map(named).collect();
        positions.into_iter().flat_map(|at| {
            let store = self.slots[at].as_ref().expect("just seen");
            store.catalog.allocation().entries().iter().map(move |entry| (at, entry))
        })
    }

    /// Sectors that can be served, by volume: what is in force on its store, never more than desired.
    pub(super) fn servable_sectors(&self, desired: &Desired) -> BTreeMap<VolumeId, u64> {
        let committed: BTreeMap<VolumeId, u64> =
            self.volumes().map(|(_, entry)| (entry.id, entry.committed_sectors)).collect();
        let active = desired.volumes.iter().filter(|wish| wish.state == VolumeIntent::Active);
        active
            .filter_map(|wish| Some((wish.id, wish.size_sectors.min(*committed.get(&wish.id)?))))
            .filter(|(_, sectors)| *sectors > 0)
            .collect()
    }

    /// Where each volume is: the store's position, and its place there.
    pub(super) fn placements(&self) -> BTreeMap<VolumeId, (usize, Arc<Placement>)> {
        let place = |entry: &Entry| Arc::new(Placement::new(&entry.runs, DATA_OFFSET_BYTES));
        self.volumes().map(|(at, entry)| (entry.id, (at, place(entry)))).collect()
    }

    /// Takes finished fills in, and begins what the desired state wants larger or new.
    pub(super) fn allocate(&mut self, desired: &Desired) {
        for store in self.slots.iter_mut().flatten() {
            store.finish_fills();
            if store.removed {
                continue;
            }
            let id = store.catalog.id();
            let own = desired.volumes.iter().filter(|wish| wish.store == id);
            let active = own.filter(|wish| wish.state == VolumeIntent::Active);
            store.allocate(active, !desired.exports.is_empty());
        }
    }

    /// Frees what is purged or smaller. Called when no core serves more than the desired state names.
    pub(super) fn release(&mut self, desired: &Desired, served: &BTreeSet<VolumeId>) {
        for store in self.slots.iter_mut().flatten().filter(|store| !store.removed) {
            let id = store.catalog.id();
            for wish in desired.volumes.iter().filter(|wish| wish.store == id) {
                let Some(committed) =
                    store.catalog.allocation().get(wish.id).map(|entry| entry.committed_sectors)
                else {
                    continue;
                };
                match wish.state {
                    VolumeIntent::Purging if !served.contains(&wish.id) => store.purge(wish),
                    VolumeIntent::Active if wish.size_sectors > 0 && committed > wish.size_sectors => {
                        self.access_changed |= store.shrink(wish);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Whether cores must be told to let stores go that are no longer named.
    pub(super) fn close_removed(&mut self) -> bool {
        let mut any = false;
        for store in self.slots.iter_mut().flatten().filter(|store| store.removed && !store.released) {
            for fill in store.fills.values() {
                fill.cancelled.store(true, Ordering::Relaxed);
            }
            if store.fills.is_empty() {
                store.released = true;
                any = true;
            }
        }
        any
    }

    /// Closes the stores that cores have let go.
    pub(super) fn drop_closed(&mut self) {
        for slot in &mut self.slots {
            if slot.as_ref().is_some_and(|store| store.released) {
                *slot = None;
            }
        }
    }

    /// What is known of the stores that are named.
    pub(super) fn observe(&self, desired: &Desired) -> Vec<ObservedStore> {
        let observe = |wish: &DesiredStore| {
            if let Some(store) = self.slots.iter().flatten().find(|store| store.path == wish.path) {
                return store.observe();
            }
            let error = self.failed.get(&wish.path).map(|(error, _)| error.clone()).unwrap_or_default();
            let state = if error.is_empty() { StoreState::Opening } else { StoreState::Failed };
            ObservedStore {
                path: wish.path.clone(),
                id: wish.id,
                state,
                error: shortened(&error),
                ..ObservedStore::default()
            }
        };
        desired.stores.iter().map(observe).collect()
    }

    /// What is known of the volumes that are named or found.
    pub(super) fn observe_volumes(&self, desired: &Desired) -> Vec<ObservedVolume> {
        let open: Vec<&OpenStore> = self.slots.iter().flatten().filter(|store| !store.removed).collect();
        let mut volumes = Vec::new();
        for wish in &desired.volumes {
            if let Some(store) = open.iter().find(|store| store.catalog.id() == wish.store) {
                volumes.push(store.observe_volume(wish));
            }
        }
        let named: BTreeSet<VolumeId> = desired.volumes.iter().map(|wish| wish.id).collect();
        for store in open {
            for entry in store.catalog.allocation().entries() {
                if !named.contains(&entry.id) {
                    volumes.push(ObservedVolume {
                        id: entry.id,
                        store: store.catalog.id(),
                        state: VolumeObserved::Orphan,
                        size_sectors: entry.committed_sectors,
                        done_bytes: 0,
                        error: String::new(),
                    });
                }
            }
        }
        volumes
    }
}

impl OpenStore {
    /// Takes in what has been filled, all in one change of the table.
    fn finish_fills(&mut self) {
        let finished: Vec<VolumeId> =
            self.fills.iter().filter(|(_, fill)| fill.thread.is_finished()).map(|(id, _)| *id).collect();
        let mut allocation = self.catalog.allocation().clone();
        let mut filled = Vec::new();
        for id in finished {
            let fill = self.fills.remove(&id).expect("just listed");
            let failure = match fill.thread.join() {
                Ok(Ok(true)) if allocation.get(id).is_some() => {
                    allocation.commit(id, fill.size_sectors);
                    filled.push((id, fill.size_sectors));
                    continue;
                }
                Ok(Ok(_)) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "the zero-fill crashed".to_owned(),
            };
            self.failures.insert(id, (fill.size_sectors, failure));
        }
        if !filled.is_empty()
            && let Err(error) = self.catalog.commit(allocation)
        {
            self.failures.extend(filled.into_iter().map(|(id, size)| (id, (size, error.to_string()))));
        }
    }

    /// Begins to make volumes as large as they are wanted, gently if the node is `serving` others.
    fn allocate<'w>(&mut self, wishes: impl Iterator<Item = &'w DesiredVolume>, serving: bool) {
        let room = FILLS_MAX.saturating_sub(self.fills.len());
        let due: Vec<&DesiredVolume> = wishes.filter(|wish| self.is_due(wish)).take(room).collect();
        for wish in self.reserve(&due) {
            if let Err(error) = self.begin_fill(wish, serving) {
                self.failures.insert(wish.id, (wish.size_sectors, error.to_string()));
            }
        }
    }

    /// Whether a volume is smaller than it is wanted, and nothing is being done about it.
    fn is_due(&self, wish: &DesiredVolume) -> bool {
        let committed = self.catalog.allocation().get(wish.id).map_or(0, |entry| entry.committed_sectors);
        let tried = self.failures.get(&wish.id).is_some_and(|(size, _)| *size == wish.size_sectors);
        (committed < wish.size_sectors || committed == 0) && !self.fills.contains_key(&wish.id) && !tried
    }

    /// Reserves extents for volumes, all in one change of the table; gives those that have theirs.
    fn reserve<'w>(&mut self, wishes: &[&'w DesiredVolume]) -> Vec<&'w DesiredVolume> {
        let mut allocation = self.catalog.allocation().clone();
        let mut reserved = Vec::new();
        for wish in wishes {
            self.failures.remove(&wish.id);
            match allocation.reserve(wish.id, wish.size_sectors) {
                Ok(()) => reserved.push(*wish),
                Err(error) => {
                    self.failures.insert(wish.id, (wish.size_sectors, error.to_string()));
                }
            }
        }
        if allocation == *self.catalog.allocation() {
            return reserved;
        }
        match self.catalog.commit(allocation) {
            Ok(()) => reserved,
            // The table may have room for some of them.
            Err(CatalogError::Table(_)) if reserved.len() > 1 => {
                reserved.iter().flat_map(|wish| self.reserve(&[wish])).collect()
            }
            Err(error) => {
                let failed = |wish: &DesiredVolume| (wish.id, (wish.size_sectors, error.to_string()));
                self.failures.extend(reserved.into_iter().map(failed));
                Vec::new()
            }
        }
    }

    /// Begins to fill what a volume has reserved.
    fn begin_fill(&mut self, wish: &DesiredVolume, serving: bool) -> anyhow::Result<()> {
        let entry = self.catalog.allocation().get(wish.id).expect("just reserved");
        let ranges = unfilled_ranges(entry);
        let device = self.catalog.device().try_clone()?;
        let gently = serving && device.fills_gently();
        let done_bytes = Arc::new(AtomicU64::new(0));
        let cancelled = Arc::new(AtomicBool::new(false));
        let (done, cancel) = (Arc::clone(&done_bytes), Arc::clone(&cancelled));
        let thread = std::thread::Builder::new().name("zero-fill".into()).spawn(move || {
            let mut before = 0;
            let mut piece_began = Instant::now();
            for (offset_bytes, len_bytes) in ranges {
                let went_on = device.fill_with_zeros(offset_bytes, len_bytes, |bytes| {
                    done.store(before + bytes, Ordering::Relaxed);
                    if gently {
                        // Half of the device's time at most is taken from those who use it.
                        std::thread::sleep(piece_began.elapsed());
                        piece_began = Instant::now();
                    }
                    !cancel.load(Ordering::Relaxed)
                })?;
                if !went_on {
                    return Ok(false);
                }
                before += len_bytes;
            }
            Ok(true)
        })?;
        self.fills.insert(wish.id, Fill { size_sectors: wish.size_sectors, done_bytes, cancelled, thread });
        Ok(())
    }

    fn purge(&mut self, wish: &DesiredVolume) {
        if let Some(fill) = self.fills.get(&wish.id) {
            fill.cancelled.store(true, Ordering::Relaxed);
            return;
        }
        let mut allocation = self.catalog.allocation().clone();
        allocation.remove(wish.id);
        if let Err(error) = self.catalog.commit(allocation) {
            self.failures.insert(wish.id, (wish.size_sectors, error.to_string()));
        }
    }

    /// Gives the end of a volume up; whether it did.
    fn shrink(&mut self, wish: &DesiredVolume) -> bool {
        if self.fills.contains_key(&wish.id) {
            return false;
        }
        match self.try_shrink(wish) {
            Ok(()) => true,
            Err(error) => {
                self.failures.insert(wish.id, (wish.size_sectors, error.to_string()));
                false
            }
        }
    }

    fn try_shrink(&mut self, wish: &DesiredVolume) -> Result<(), CatalogError> {
        let mut allocation = self.catalog.allocation().clone();
        allocation.shrink(wish.id, wish.size_sectors);
        // What the last extent keeps beyond the new end must be zeros when the volume grows again.
        let entry = allocation.get(wish.id).expect("shrunk, not removed");
        let last = entry.runs.last().expect("a volume has at least one extent");
        let end_bytes = DATA_OFFSET_BYTES + u64::from(last.first_extent + last.extents) * EXTENT_BYTES;
        let unused = u64::from(entry.extents()) * EXTENT_BYTES - wish.size_sectors * SECTOR_BYTES;
        let unused = unused / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        self.catalog.device().fill_with_zeros(end_bytes - unused, unused, |_| true)?;
        self.catalog.commit(allocation)
    }

    fn observe(&self) -> ObservedStore {
        let allocation = self.catalog.allocation();
        ObservedStore {
            path: self.path.clone(),
            id: Some(self.catalog.id()),
            state: StoreState::Ready,
            durability: self.access.durability,
            capacity_bytes: u64::from(allocation.extent_count()) * EXTENT_BYTES,
            free_bytes: u64::from(allocation.free_extents()) * EXTENT_BYTES,
            ..ObservedStore::default()
        }
    }

    fn observe_volume(&self, wish: &DesiredVolume) -> ObservedVolume {
        let entry = self.catalog.allocation().get(wish.id);
        let committed = entry.map_or(0, |entry| entry.committed_sectors);
        let failure = self.failures.get(&wish.id).filter(|(size, _)| *size == wish.size_sectors);
        let filling = self.fills.get(&wish.id);
        let state = match (wish.state, failure, entry) {
            (_, Some(_), _) => VolumeObserved::Failed,
            (VolumeIntent::Purging, _, None) => VolumeObserved::Purged,
            (VolumeIntent::Active, _, Some(_)) if committed == wish.size_sectors => VolumeObserved::Ready,
            _ => VolumeObserved::Allocating,
        };
        ObservedVolume {
            id: wish.id,
            store: wish.store,
            state,
            size_sectors: committed,
            done_bytes: filling
                .map_or(committed * SECTOR_BYTES, |fill| fill.done_bytes.load(Ordering::Relaxed)),
            error: failure.map(|(_, error)| shortened(error)).unwrap_or_default(),
        }
    }
}

/// Device ranges of a volume that have not been filled: (first byte, bytes).
fn unfilled_ranges(entry: &Entry) -> Vec<(u64, u64)> {
    let mut skip = entry.filled_extents;
    let mut ranges = Vec::new();
    for run in &entry.runs {
        let skipped = skip.min(run.extents);
        skip -= skipped;
        let extents = run.extents - skipped;
        if extents > 0 {
            let first = u64::from(run.first_extent + skipped);
            ranges.push((DATA_OFFSET_BYTES + first * EXTENT_BYTES, u64::from(extents) * EXTENT_BYTES));
        }
    }
    ranges
}

/// An error text that fits the map.
fn shortened(text: &str) -> String {
    text.chars().take(240).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use cluster_map::ClusterId;

    use super::*;
    use crate::store::EXTENT_SECTORS;

    const SIZE: u64 = 64 << 20;
    const SECTORS: u64 = 3 * EXTENT_SECTORS;

    struct Node {
        folder: tempfile::TempDir,
        desired: Desired,
        stores: Stores,
    }

    fn volume(n: u8) -> VolumeId {
        VolumeId([n; 16])
    }

    impl Node {
        fn new() -> Node {
            let folder = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
            let mut desired = Desired { cluster: ClusterId([1; 16]), ..Desired::default() };
            let path = folder.path().join("s").to_str().unwrap().to_owned();
            desired.stores.push(DesiredStore { path, size_bytes: SIZE, ..DesiredStore::default() });
            let stores = Stores::open_all(&desired).unwrap();
            Node { folder, desired, stores }
        }

        fn id(&self) -> StoreId {
            self.stores.observe(&self.desired)[0].id.unwrap()
        }

        fn want(&mut self, n: u8, size_sectors: u64, state: VolumeIntent) {
            let store = self.id();
            self.desired.volumes.retain(|wish| wish.id != volume(n));
            self.desired.volumes.push(DesiredVolume { id: volume(n), store, size_sectors, state });
        }

        /// Steps until no fill is left, serving `served`.
        fn converge(&mut self, served: &[u8]) {
            let served: BTreeSet<VolumeId> = served.iter().map(|n| volume(*n)).collect();
            let deadline = Instant::now() + Duration::from_secs(30);
            loop {
                self.stores.open_missing(&self.desired);
                self.stores.allocate(&self.desired);
                self.stores.release(&self.desired, &served);
                if !self.stores.is_filling() {
                    return;
                }
                assert!(Instant::now() < deadline, "a fill never ends");
                std::thread::sleep(Duration::from_millis(1));
            }
        }

        fn state(&self, n: u8) -> VolumeObserved {
            let all = self.stores.observe_volumes(&self.desired);
            all.iter().find(|observed| observed.id == volume(n)).unwrap().state
        }

        fn committed(&self, n: u8) -> Option<u64> {
            self.stores
                .volumes()
                .find(|(_, entry)| entry.id == volume(n))
                .map(|(_, entry)| entry.committed_sectors)
        }

        fn path(&self) -> std::path::PathBuf {
            self.folder.path().join("s")
        }

        /// The device bytes of a volume's sectors.
        fn device_ranges(&self, n: u8) -> Vec<(u64, u64)> {
            let (_, entry) = self.stores.volumes().find(|(_, entry)| entry.id == volume(n)).unwrap();
            unfilled_ranges(&Entry { filled_extents: 0, ..entry.clone() })
        }

        fn write_everywhere(&self, n: u8, byte: u8) {
            let file = std::fs::OpenOptions::new().write(true).open(self.path()).unwrap();
            for (offset, len) in self.device_ranges(n) {
                file.write_all_at(&vec![byte; usize::try_from(len).unwrap()], offset).unwrap();
            }
            file.sync_all().unwrap();
        }

        fn bytes(&self, n: u8) -> Vec<u8> {
            let file = std::fs::File::open(self.path()).unwrap();
            let mut all = Vec::new();
            for (offset, len) in self.device_ranges(n) {
                let mut bytes = vec![0; usize::try_from(len).unwrap()];
                file.read_exact_at(&mut bytes, offset).unwrap();
                all.extend(bytes);
            }
            all
        }
    }

    #[test]
    fn a_new_volume_on_used_extents_reads_as_zeros() {
        let mut node = Node::new();
        node.want(1, SECTORS, VolumeIntent::Active);
        node.converge(&[]);
        assert_eq!(node.state(1), VolumeObserved::Ready);
        node.write_everywhere(1, 0xaa);
        node.want(1, SECTORS, VolumeIntent::Purging);
        node.converge(&[]);
        node.desired.volumes.clear();
        node.want(2, SECTORS, VolumeIntent::Active);
        node.converge(&[]);
        assert_eq!(node.committed(2), Some(SECTORS));
        assert!(node.bytes(2).iter().all(|&byte| byte == 0));
    }

    #[test]
    fn only_what_is_purging_and_unserved_is_freed() {
        let mut node = Node::new();
        node.want(1, SECTORS, VolumeIntent::Active);
        node.want(2, SECTORS, VolumeIntent::Active);
        node.converge(&[1, 2]);
        node.write_everywhere(1, 0xbb);
        // Not named any more: an orphan, kept.
        node.desired.volumes.retain(|wish| wish.id != volume(1));
        node.converge(&[2]);
        assert_eq!(node.state(1), VolumeObserved::Orphan);
        assert!(node.bytes(1).iter().all(|&byte| byte == 0xbb));
        // Purging, and still served: kept.
        node.want(2, SECTORS, VolumeIntent::Purging);
        node.converge(&[2]);
        assert_ne!(node.state(2), VolumeObserved::Purged);
        node.converge(&[]);
        assert_eq!(node.state(2), VolumeObserved::Purged);
        assert_eq!(node.committed(2), None);
        assert!(node.committed(1).is_some());
    }

    #[test]
    fn a_volume_grows_in_zeros_and_shrinks_only_when_wanted() {
        let mut node = Node::new();
        node.want(1, EXTENT_SECTORS, VolumeIntent::Active);
        node.converge(&[1]);
        node.write_everywhere(1, 0xcc);
        node.want(1, SECTORS, VolumeIntent::Active);
        node.converge(&[1]);
        assert_eq!(node.committed(1), Some(SECTORS));
        let bytes = node.bytes(1);
        let (old, new) = bytes.split_at(usize::try_from(EXTENT_BYTES).unwrap());
        assert!(old.iter().all(|&byte| byte == 0xcc) && new.iter().all(|&byte| byte == 0));
        node.write_everywhere(1, 0xdd);
        // Down to one and a half extents, and up again: what was given up does not come back.
        let half = EXTENT_SECTORS + EXTENT_SECTORS / 2;
        node.want(1, half, VolumeIntent::Active);
        node.converge(&[1]);
        assert_eq!(node.committed(1), Some(half));
        node.want(1, SECTORS, VolumeIntent::Active);
        node.converge(&[1]);
        let bytes = node.bytes(1);
        let (kept, new) = bytes.split_at(usize::try_from(half * SECTOR_BYTES).unwrap());
        assert!(kept.iter().all(|&byte| byte == 0xdd) && new.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn an_interrupted_fill_is_begun_again() {
        let mut node = Node::new();
        node.want(1, SECTORS, VolumeIntent::Active);
        // Reserved and not filled, as a crash leaves it; the extents hold something old.
        {
            let store = node.stores.slots[0].as_mut().unwrap();
            let mut allocation = store.catalog.allocation().clone();
            allocation.reserve(volume(1), SECTORS).unwrap();
            store.catalog.commit(allocation).unwrap();
        }
        node.write_everywhere(1, 0xee);
        assert_eq!(node.committed(1), Some(0), "not served");
        node.stores = Stores::default();
        node.converge(&[]);
        assert_eq!(node.state(1), VolumeObserved::Ready);
        assert!(node.bytes(1).iter().all(|&byte| byte == 0));
    }

    #[test]
    fn what_does_not_fit_is_said_and_another_size_is_tried() {
        let mut node = Node::new();
        node.want(1, 1000 * EXTENT_SECTORS, VolumeIntent::Active);
        node.converge(&[]);
        assert_eq!(node.state(1), VolumeObserved::Failed);
        let observed = node.stores.observe_volumes(&node.desired);
        assert!(observed[0].error.contains("free extents"), "{}", observed[0].error);
        node.want(1, SECTORS, VolumeIntent::Active);
        node.converge(&[]);
        assert_eq!(node.state(1), VolumeObserved::Ready);
    }

    #[test]
    fn a_store_that_is_named_no_more_is_closed_and_can_come_back() {
        let mut node = Node::new();
        node.want(1, SECTORS, VolumeIntent::Active);
        node.converge(&[]);
        let named = std::mem::take(&mut node.desired.stores);
        node.stores.open_missing(&node.desired);
        assert_eq!(node.committed(1), None, "not served any more");
        assert!(node.stores.close_removed());
        assert!(node.stores.access().iter().all(Option::is_none));
        node.stores.drop_closed();
        node.desired.stores = named;
        node.converge(&[]);
        assert_eq!(node.committed(1), Some(SECTORS));
    }

    #[test]
    fn a_store_that_cannot_be_opened_is_said_and_the_others_serve() {
        let mut node = Node::new();
        let path = node.folder.path().join("missing").to_str().unwrap().to_owned();
        node.desired.stores.push(DesiredStore { path, ..DesiredStore::default() });
        node.want(1, SECTORS, VolumeIntent::Active);
        node.converge(&[]);
        let observed = node.stores.observe(&node.desired);
        assert_eq!(observed[1].state, StoreState::Failed);
        assert!(observed[1].error.contains("does not exist"), "{}", observed[1].error);
        assert_eq!(node.state(1), VolumeObserved::Ready);
    }
}
