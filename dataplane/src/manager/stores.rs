//! The stores of a node: which are open, which volumes are on them, and what becomes of volumes that go or shrink.
//!
//! A volume is an entry of its store's catalog; its extents come with its first writes. One that goes, or the end of one that
//! shrinks, is first given up in the catalog, durably; then its shard is told, and tells when nothing is left; then the
//! catalog forgets it. What was under way when the process ended is begun again.

mod slots;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cluster_map::{
    Desired, DesiredStore, DesiredVolume, ObservedStore, ObservedVolume, ScrubObserved, ScrubState,
    ScrubWish, StoreId, StoreState, VolumeId, VolumeIntent, VolumeObserved, WritePath,
};

use torus_replication::terms::Member;

use self::slots::SlotFeeder;
use crate::device::DeviceError;
use crate::exchange::{Message, StoreAccess, core_of_shard, deal_shards, shard_of_lane};
use crate::replicating::Place;
use crate::store::extent::catalog::{Catalog, Volume, VolumeState};
use crate::store::extent::opening::{self, Identity, OpenError, OpenStore};
use crate::store::extent::shard::{Object, ScrubTask};
use crate::store::extent::shared::{ShardEvent, Shared};
use crate::store::{BLOCK_SECTORS, EXTENT_BYTES, SECTOR_BYTES};

/// How long a store that could not be opened is left alone before it is tried again.
const RETRY: Duration = Duration::from_secs(10);
/// What AoE addresses.
const VOLUME_SECTORS_MAX: u64 = (1 << 48) - 1;

/// A store of this node.
struct NodeStore {
    /// As the desired state spells it.
    path: String,
    /// Its place among the stores.
    position: usize,
    store: OpenStore,
    access: StoreAccess,
    shared: Arc<Shared>,
    feeder: SlotFeeder,
    /// Why a volume could not be made or changed, and for which size: another wish is another try.
    failures: BTreeMap<VolumeId, (u64, String)>,
    /// Layers whose shard has been told what to give up, and has not said that it has.
    unmapping: BTreeSet<u32>,
    /// Why it takes no more writes; empty while it does.
    failed: String,
    /// The scrub that cores were told to make.
    scrub: Option<ScrubWish>,
    /// What was published last of it.
    told: Cell<Told>,
    /// The desired state names it no more.
    removed: bool,
    /// Cores have been told to let it go.
    released: bool,
}

/// What becomes true of a store by itself, and is published when it has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Told {
    allocated: u32,
    checksum_errors: u64,
    lost_blocks: u64,
    scrub: Option<ScrubObserved>,
    /// No more slots can be made ready.
    lacks_room: bool,
}

/// All stores. Positions are stable while a store is open.
pub(super) struct Stores {
    slots: Vec<Option<NodeStore>>,
    /// By path: why opening failed, and when.
    failed: BTreeMap<String, (String, Instant)>,
    access_changed: bool,
    cores: usize,
    /// Messages for cores, with the core of each.
    outbox: Vec<(u16, Message)>,
}

impl Stores {
    /// None yet, on a node with so many cores.
    pub(super) fn new(cores: usize) -> Stores {
        Stores {
            slots: Vec::new(),
            failed: BTreeMap::new(),
            access_changed: false,
            cores,
            outbox: Vec::new(),
        }
    }

    /// Opens every store that the desired state names.
    ///
    /// # Errors
    /// The first one that cannot be opened.
    pub(super) fn open_all(desired: &Desired, cores: usize) -> Result<Stores, OpenError> {
        let mut stores = Stores::new(cores);
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

    fn open(&mut self, desired: &Desired, wish: &DesiredStore) -> Result<(), OpenError> {
        let mut fresh = [0u8; 16];
        rustix::rand::getrandom(&mut fresh, rustix::rand::GetRandomFlags::empty()).map_err(|error| {
            DeviceError::Io { path: wish.path.clone(), what: "make an id", source: error.into() }
        })?;
        let identity = Identity {
            cluster: desired.cluster,
            node: desired.node,
            expected: wish.id,
            fresh: StoreId(fresh),
        };
        let opened = opening::open(Path::new(&wish.path), wish.size_bytes, identity)?;
        let position = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let device = opened.store.device();
        let access = StoreAccess {
            file: Arc::new(OwnedFd::from(device.try_clone()?.into_file())),
            durability: device.durability(),
            dsync: device.needs_dsync(),
            mapped: device.map_memory(),
            shards: deal_shards(opened.shards, self.cores),
            member: Member { store: opened.store.id(), incarnation: opened.store.layout().incarnation },
            volumes: opened
                .store
                .catalog()
                .volumes()
                .iter()
                .map(|volume| (volume.id, object_of(volume)))
                .collect(),
        };
        let feeder = SlotFeeder::start(
            device.try_clone()?,
            Arc::clone(opened.store.layout()),
            Arc::clone(&opened.shared),
            opened.free,
            access.mapped.clone(),
        )?;
        self.slots[position] = Some(NodeStore {
            path: wish.path.clone(),
            position,
            store: opened.store,
            access,
            shared: opened.shared,
            feeder,
            failures: BTreeMap::new(),
            unmapping: BTreeSet::new(),
            failed: String::new(),
            scrub: None,
            told: Cell::default(),
            removed: false,
            released: false,
        });
        self.access_changed = true;
        Ok(())
    }

    /// Whether cores must be told of stores again; asking resets it.
    pub(super) fn access_changed(&mut self) -> bool {
        std::mem::take(&mut self.access_changed)
    }

    /// How cores reach the stores, by position.
    pub(super) fn access(&self) -> Vec<Option<StoreAccess>> {
        let access = |slot: &Option<NodeStore>| {
            slot.as_ref().filter(|store| !store.released).map(|store| store.access.clone())
        };
        self.slots.iter().map(access).collect()
    }

    /// Whether there is something to do although nobody wants anything new: a shard to hear of, a store to try again or to
    /// close.
    pub(super) fn have_work(&self) -> bool {
        let waits = |store: &NodeStore| {
            store.removed || !store.shared.events.is_empty() || store.told.get() != store.told_now()
        };
        self.is_unmapping()
            || !self.failed.is_empty()
            || !self.outbox.is_empty()
            || self.slots.iter().flatten().any(waits)
    }

    /// Whether a shard is giving something up.
    pub(super) fn is_unmapping(&self) -> bool {
        self.slots.iter().flatten().any(|store| !store.unmapping.is_empty())
    }

    /// Messages for cores that have not been sent.
    pub(super) fn outbox(&mut self) -> &mut Vec<(u16, Message)> {
        &mut self.outbox
    }

    /// All volumes on stores that are named, with the store's position.
    fn volumes(&self) -> impl Iterator<Item = (usize, &Volume)> {
        let named = self.slots.iter().flatten().filter(|store| !store.removed);
        named.flat_map(|store| store.store.catalog().volumes().iter().map(|volume| (store.position, volume)))
    }

    /// Sectors that can be served, by volume: what is in force on its store, never more than desired.
    pub(super) fn servable_sectors(&self, desired: &Desired) -> BTreeMap<VolumeId, u64> {
        let present = self.volumes().filter(|(_, volume)| volume.state == VolumeState::Present);
        let sizes: BTreeMap<VolumeId, u64> =
            present.map(|(_, volume)| (volume.id, volume.size_sectors)).collect();
        let active = desired.volumes.iter().filter(|wish| wish.state == VolumeIntent::Active);
        active
            .filter_map(|wish| Some((wish.id, wish.size_sectors.min(*sizes.get(&wish.id)?))))
            .filter(|(_, sectors)| *sectors > 0)
            .collect()
    }

    /// Where each volume is: the store's position, its layer there, and the core that has it.
    pub(super) fn objects(&self) -> BTreeMap<VolumeId, (usize, Object, u16)> {
        let place = |(at, volume): (usize, &Volume)| {
            let object = Object { shard: volume.shard, number: volume.object };
            (volume.id, (at, object, core_of_shard(volume.shard, self.cores)))
        };
        self.volumes().map(place).collect()
    }

    /// The replicas that are on stores of the node: each with its member, its place, and the core that has it.
    pub(super) fn replicas(&self, desired: &Desired) -> Vec<(Member, VolumeId, Place, u16)> {
        let wanted = desired.volumes.iter().filter(|wish| wish.state == VolumeIntent::Active);
        let lanes: BTreeSet<VolumeId> =
            wanted.filter(|wish| wish.lane.is_some()).map(|wish| wish.id).collect();
        let named = self.slots.iter().flatten().filter(|store| !store.removed && !store.released);
        let of_store = |store: &NodeStore| {
            let volumes = store.store.catalog().volumes().iter();
            let replicas = volumes
                .filter(|volume| volume.state == VolumeState::Present && lanes.contains(&volume.id))
                .map(|volume| {
                    let place = Place { store: store.position, object: object_of(volume) };
                    (store.access.member, volume.id, place, core_of_shard(volume.shard, self.cores))
                });
            replicas.collect::<Vec<_>>()
        };
        named.flat_map(of_store).collect()
    }

    /// Takes in what shards tell, and makes what the desired state wants new or larger.
    pub(super) fn allocate(&mut self, desired: &Desired) {
        for store in self.slots.iter_mut().flatten() {
            store.hear_shards();
            if store.removed {
                continue;
            }
            let id = store.store.id();
            let own = desired.volumes.iter().filter(|wish| wish.store == id);
            store.provide(own.filter(|wish| wish.state == VolumeIntent::Active));
        }
    }

    /// Gives up what is purging or smaller. Called when no core serves more than the desired state names.
    pub(super) fn release(&mut self, desired: &Desired, served: &BTreeSet<VolumeId>) {
        for store in self.slots.iter_mut().flatten().filter(|store| !store.removed) {
            let id = store.store.id();
            let own = desired.volumes.iter().filter(|wish| wish.store == id);
            self.access_changed |= store.give_up(own, served);
            store.tell_shards(self.cores, &mut self.outbox);
            let wish = desired.stores.iter().find(|wish| wish.path == store.path);
            let scrub = wish.and_then(|wish| wish.scrub.as_ref());
            store.tell_scrub(scrub, self.cores, &mut self.outbox);
        }
    }

    /// Whether cores must be told to let stores go that are no longer named.
    pub(super) fn close_removed(&mut self) -> bool {
        let mut any = false;
        for store in self.slots.iter_mut().flatten().filter(|store| store.removed && !store.released) {
            store.released = true;
            any = true;
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
        let open: Vec<&NodeStore> = self.slots.iter().flatten().filter(|store| !store.removed).collect();
        let mut volumes = Vec::new();
        for wish in &desired.volumes {
            if let Some(store) = open.iter().find(|store| store.store.id() == wish.store) {
                volumes.push(store.observe_volume(wish));
            }
        }
        let named: BTreeSet<VolumeId> = desired.volumes.iter().map(|wish| wish.id).collect();
        for store in open {
            let present = store.store.catalog().volumes().iter();
            let orphans =
                present.filter(|volume| volume.state == VolumeState::Present && !named.contains(&volume.id));
            volumes.extend(orphans.map(|volume| ObservedVolume {
                id: volume.id,
                store: store.store.id(),
                state: VolumeObserved::Orphan,
                size_sectors: volume.size_sectors,
                done_bytes: 0,
                error: String::new(),
            }));
        }
        volumes
    }
}

impl NodeStore {
    /// Takes in what shards have done.
    fn hear_shards(&mut self) {
        let mut catalog = self.store.catalog().clone();
        while let Some(event) = self.shared.events.pop() {
            match event {
                ShardEvent::Failed { why, .. } => {
                    self.failed = format!(
                        "{why}: the store takes no more writes; look at the device, then restart the node"
                    );
                }
                ShardEvent::Unmapped { object, from_block } => {
                    self.unmapping.remove(&object);
                    let Some(volume) = catalog.of_object(object).copied() else { continue };
                    match volume.state {
                        VolumeState::Purging if from_block == 0 => catalog.remove(volume.id),
                        VolumeState::Purging => {}
                        // A smaller size may have been wanted meanwhile.
                        VolumeState::Present if volume.unmap_from_block == from_block => {
                            if let Some(volume) = catalog.get_mut(volume.id) {
                                volume.unmap_from_block = u64::MAX;
                            }
                        }
                        VolumeState::Present => {}
                    }
                }
            }
        }
        // What is not remembered is done once more.
        if let Err(error) = self.commit(catalog) {
            self.failed = error.to_string();
        }
    }

    fn commit(&mut self, catalog: Catalog) -> Result<(), OpenError> {
        if catalog == *self.store.catalog() { Ok(()) } else { self.store.commit(catalog) }
    }

    /// Makes volumes, and makes them as large as they are wanted; all in one change of the catalog.
    fn provide<'w>(&mut self, wishes: impl Iterator<Item = &'w DesiredVolume>) {
        let mut catalog = self.store.catalog().clone();
        let mut changed = Vec::new();
        for wish in wishes {
            let tried = self.failures.get(&wish.id).is_some_and(|(size, _)| *size == wish.size_sectors);
            if tried {
                continue;
            }
            match self.provide_one(wish, &mut catalog) {
                Ok(true) => changed.push(wish),
                Ok(false) => {}
                Err(why) => {
                    self.failures.insert(wish.id, (wish.size_sectors, why));
                }
            }
        }
        if let Err(error) = self.commit(catalog) {
            let failed = changed.into_iter().map(|wish| (wish.id, (wish.size_sectors, error.to_string())));
            self.failures.extend(failed);
        }
    }

    /// Whether the catalog has changed for it.
    fn provide_one(&self, wish: &DesiredVolume, catalog: &mut Catalog) -> Result<bool, String> {
        if !(1..=VOLUME_SECTORS_MAX).contains(&wish.size_sectors) {
            return Err(format!("a volume has between 1 and 2^48 - 1 sectors, not {}", wish.size_sectors));
        }
        let shards = self.store.layout().shards;
        match catalog.get_mut(wish.id) {
            None => {
                // Stores begin with different shards, so that their first volumes are on different cores.
                let first = u16::try_from(self.position).unwrap_or(0);
                let shard = match wish.lane {
                    Some(lane) => shard_of_lane(lane, shards),
                    None => catalog.emptiest_shard(shards, first).unwrap_or(0),
                };
                catalog
                    .add_to(wish.id, wish.size_sectors, shard)
                    .map_err(|_| OpenError::CatalogFull { path: self.path.clone() }.to_string())?;
                Ok(true)
            }
            Some(volume) if volume.state == VolumeState::Purging => {
                Err("the volume is being purged, and there is no way back".to_owned())
            }
            // What was given up must be gone before it can be zeros again.
            Some(volume)
                if volume.size_sectors < wish.size_sectors && volume.unmap_from_block == u64::MAX =>
            {
                volume.size_sectors = wish.size_sectors;
                Ok(true)
            }
            Some(_) => Ok(false),
        }
    }

    /// Gives volumes up in the catalog that are purging, and the ends of those that are smaller; whether one became smaller.
    fn give_up<'w>(
        &mut self,
        wishes: impl Iterator<Item = &'w DesiredVolume>,
        served: &BTreeSet<VolumeId>,
    ) -> bool {
        let mut catalog = self.store.catalog().clone();
        let mut changed = Vec::new();
        let mut shrunk = false;
        for wish in wishes {
            let Some(volume) = catalog.get_mut(wish.id) else { continue };
            if volume.state == VolumeState::Purging {
                continue;
            }
            match wish.state {
                VolumeIntent::Purging if !served.contains(&wish.id) => {
                    volume.state = VolumeState::Purging;
                    // What it was giving up before goes with the rest.
                    self.unmapping.remove(&volume.object);
                    changed.push(wish);
                }
                VolumeIntent::Active if wish.size_sectors > 0 && volume.size_sectors > wish.size_sectors => {
                    volume.size_sectors = wish.size_sectors;
                    volume.unmap_from_block = wish.size_sectors.div_ceil(BLOCK_SECTORS);
                    self.unmapping.remove(&volume.object);
                    changed.push(wish);
                    shrunk = true;
                }
                _ => {}
            }
        }
        match self.commit(catalog) {
            Ok(()) => shrunk,
            Err(error) => {
                let failed =
                    changed.into_iter().map(|wish| (wish.id, (wish.size_sectors, error.to_string())));
                self.failures.extend(failed);
                false
            }
        }
    }

    /// Tells shards what the catalog has given up, once.
    fn tell_shards(&mut self, cores: usize, outbox: &mut Vec<(u16, Message)>) {
        for volume in self.store.catalog().volumes() {
            let from_block = match volume.state {
                VolumeState::Purging => 0,
                VolumeState::Present if volume.unmap_from_block != u64::MAX => volume.unmap_from_block,
                VolumeState::Present => continue,
            };
            if self.unmapping.insert(volume.object) {
                let object = Object { shard: volume.shard, number: volume.object };
                let core = core_of_shard(volume.shard, cores);
                outbox.push((core, Message::Unmap { store: self.position, object, from_block }));
            }
        }
    }

    fn observe(&self) -> ObservedStore {
        let slots = self.store.layout().slots();
        let told = self.told_now();
        self.told.set(told);
        let error = if self.failed.is_empty() { self.feeder.error() } else { self.failed.clone() };
        ObservedStore {
            path: self.path.clone(),
            id: Some(self.store.id()),
            state: if self.failed.is_empty() { StoreState::Ready } else { StoreState::Failed },
            durability: self.access.durability,
            capacity_bytes: u64::from(slots) * EXTENT_BYTES,
            free_bytes: u64::from(slots.saturating_sub(told.allocated)) * EXTENT_BYTES,
            error: shortened(&error),
            // With one copy, whatever the device can do.
            writes: WritePath::Journal,
            checksum_errors: told.checksum_errors,
            lost_blocks: told.lost_blocks,
            scrub: told.scrub,
            incarnation: self.store.layout().incarnation,
            shards: self.store.layout().shards,
        }
    }

    /// What there is to tell beside what this manager does itself.
    fn told_now(&self) -> Told {
        let counters = &self.shared.counters;
        let allocated = counters.allocated.load(Ordering::Relaxed);
        Told {
            allocated,
            checksum_errors: counters.checksum_errors.load(Ordering::Relaxed),
            lost_blocks: counters.lost_blocks.load(Ordering::Relaxed),
            scrub: self.observe_scrub(allocated),
            lacks_room: !self.feeder.error().is_empty(),
        }
    }

    /// Where the scrub stands that was asked for last.
    fn observe_scrub(&self, allocated: u32) -> Option<ScrubObserved> {
        let wish = self.scrub.as_ref()?;
        let cells = self.shared.scrubs.iter().filter(|cell| cell.run.load(Ordering::Acquire) == wish.run);
        let mut told = ScrubObserved { run: wish.run, ..ScrubObserved::default() };
        let mut finished = 0;
        for cell in cells {
            told.done_bytes += u64::from(cell.done_extents.load(Ordering::Relaxed)) * EXTENT_BYTES;
            told.errors += cell.errors.load(Ordering::Relaxed);
            finished += usize::from(cell.is_finished.load(Ordering::Relaxed));
        }
        told.total_bytes = (u64::from(allocated) * EXTENT_BYTES).max(told.done_bytes);
        told.state = if finished == self.shared.scrubs.len() {
            told.total_bytes = told.done_bytes;
            ScrubState::Finished
        } else if wish.stopped {
            ScrubState::Stopped
        } else {
            ScrubState::Running
        };
        Some(told)
    }

    /// Tells cores which scrub is wanted, when that has changed.
    fn tell_scrub(&mut self, wish: Option<&ScrubWish>, cores: usize, outbox: &mut Vec<(u16, Message)>) {
        if self.scrub.as_ref() == wish {
            return;
        }
        self.scrub = wish.cloned();
        let shards = self.store.layout().shards;
        let task = wish
            .filter(|wish| !wish.stopped)
            .map(|wish| ScrubTask { run: wish.run, rate_bytes_per_s: wish.rate_bytes_per_s.max(1) });
        let owners: BTreeSet<u16> = (0..shards).map(|shard| core_of_shard(shard, cores)).collect();
        outbox.extend(owners.into_iter().map(|core| (core, Message::Scrub { store: self.position, task })));
    }

    fn observe_volume(&self, wish: &DesiredVolume) -> ObservedVolume {
        let volume = self.store.catalog().get(wish.id);
        let size_sectors = volume.map_or(0, |volume| volume.size_sectors);
        let failure = self.failures.get(&wish.id).filter(|(size, _)| *size == wish.size_sectors);
        let state = match (wish.state, failure, volume) {
            (_, Some(_), _) => VolumeObserved::Failed,
            (VolumeIntent::Purging, _, None) => VolumeObserved::Purged,
            (VolumeIntent::Active, _, Some(_)) if size_sectors == wish.size_sectors => VolumeObserved::Ready,
            _ => VolumeObserved::Allocating,
        };
        ObservedVolume {
            id: wish.id,
            store: wish.store,
            state,
            size_sectors,
            done_bytes: size_sectors * SECTOR_BYTES,
            error: failure.map(|(_, error)| shortened(error)).unwrap_or_default(),
        }
    }
}

fn object_of(volume: &Volume) -> Object {
    Object { shard: volume.shard, number: volume.object }
}

/// An error text that fits the map.
fn shortened(text: &str) -> String {
    text.chars().take(240).collect()
}

#[cfg(test)]
mod tests;
