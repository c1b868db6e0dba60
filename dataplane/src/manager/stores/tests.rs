//! Stores on real files, with their shards driven by this thread, which is every core at once.

use cluster_map::ClusterId;

use super::*;
use crate::store::extent::on_file::Driven;
use crate::store::{EXTENT_SECTORS, StoreError};

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = 3 * EXTENT_SECTORS;
const CORES: usize = 2;
const EXTENT_BLOCKS: u64 = EXTENT_SECTORS / BLOCK_SECTORS;

struct Node {
    folder: tempfile::TempDir,
    desired: Desired,
    stores: Stores,
    /// Of the first store, while it is open.
    cores: Option<Driven>,
}

fn volume(n: u8) -> VolumeId {
    VolumeId([n; 16])
}

/// Takes all shards that wait for their cores.
fn adopt(access: &StoreAccess) -> Driven {
    let shards = access.shards.iter().flat_map(|queue| std::iter::from_fn(|| queue.pop()));
    Driven::new(Arc::clone(&access.file), shards)
}

impl Node {
    fn new() -> Node {
        // On a disk, which is where the build is.
        let folder = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let mut desired = Desired { cluster: ClusterId([1; 16]), ..Desired::default() };
        let path = folder.path().join("s").to_str().unwrap().to_owned();
        desired.stores.push(DesiredStore { path, size_bytes: SIZE, id: None, scrub: None });
        let stores = Stores::open_all(&desired, CORES).unwrap();
        let cores = Some(adopt(stores.access()[0].as_ref().unwrap()));
        Node { folder, desired, stores, cores }
    }

    /// Another process goes on. An orderly one has closed its store, a killed one has not.
    fn reopen(&mut self, in_order: bool) {
        let cores = self.cores.take().unwrap();
        if in_order {
            cores.close();
        } else {
            cores.kill();
        }
        self.stores = Stores::new(CORES);
        self.stores = Stores::open_all(&self.desired, CORES).unwrap();
        self.cores = Some(adopt(self.stores.access()[0].as_ref().unwrap()));
    }

    fn id(&self) -> StoreId {
        self.stores.observe(&self.desired)[0].id.unwrap()
    }

    fn want(&mut self, n: u8, size_sectors: u64, state: VolumeIntent) {
        let store = self.id();
        self.desired.volumes.retain(|wish| wish.id != volume(n));
        self.desired.volumes.push(DesiredVolume { id: volume(n), store, size_sectors, state, lane: None });
    }

    /// One round of the manager, with these volumes served; the cores hear what it has to say.
    fn step(&mut self, served: &[u8]) {
        let served: BTreeSet<VolumeId> = served.iter().map(|n| volume(*n)).collect();
        self.stores.open_missing(&self.desired);
        self.stores.allocate(&self.desired);
        self.stores.release(&self.desired, &served);
        let cores = self.cores.as_mut().unwrap();
        for (core, message) in self.stores.outbox().drain(..) {
            let Message::Unmap { store: at, object, from_block } = message else { panic!("{message:?}") };
            assert_eq!((at, core), (0, core_of_shard(object.shard, CORES)));
            cores.unmap(object, from_block);
        }
    }

    /// Goes on until no shard is giving anything up.
    fn converge(&mut self, served: &[u8]) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            self.step(served);
            if !self.stores.is_unmapping() {
                return;
            }
            assert!(Instant::now() < deadline, "a shard never gives up what it should");
            self.cores().turn();
        }
    }

    fn cores(&mut self) -> &mut Driven {
        self.cores.as_mut().unwrap()
    }

    fn state(&self, n: u8) -> VolumeObserved {
        let all = self.stores.observe_volumes(&self.desired);
        all.iter().find(|observed| observed.id == volume(n)).unwrap().state
    }

    fn size(&self, n: u8) -> Option<u64> {
        self.stores.volumes().find(|(_, entry)| entry.id == volume(n)).map(|(_, entry)| entry.size_sectors)
    }

    fn object(&self, n: u8) -> Object {
        self.stores.objects()[&volume(n)].1
    }

    /// Writes one block in each extent of [`SECTORS`], and the last one.
    fn write_everywhere(&mut self, n: u8, byte: u8) {
        let object = self.object(n);
        for extent in 0..SECTORS / EXTENT_SECTORS {
            for block in [0, EXTENT_BLOCKS - 1] {
                self.cores().write(object, extent * EXTENT_BLOCKS + block, byte).unwrap();
            }
        }
    }

    /// What those blocks hold.
    fn bytes(&mut self, n: u8) -> Vec<u8> {
        let object = self.object(n);
        let blocks = (0..SECTORS / EXTENT_SECTORS)
            .flat_map(|extent| [0, EXTENT_BLOCKS - 1].map(|block| extent * EXTENT_BLOCKS + block));
        let blocks: Vec<u64> = blocks.collect();
        blocks.into_iter().map(|block| self.cores().read(object, block)).collect()
    }

    fn allocated(&self) -> u32 {
        let store = self.stores.slots[0].as_ref().unwrap();
        store.shared.counters.allocated.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn observed(&self) -> ObservedStore {
        self.stores.observe(&self.desired)[0].clone()
    }
}

#[test]
fn a_volume_is_ready_at_once_and_takes_room_when_it_is_written() {
    let mut node = Node::new();
    // More than the store has, as long as nobody writes it.
    node.want(1, 1000 * EXTENT_SECTORS, VolumeIntent::Active);
    node.step(&[]);
    assert_eq!((node.state(1), node.size(1)), (VolumeObserved::Ready, Some(1000 * EXTENT_SECTORS)));
    let (object, capacity) = (node.object(1), node.observed().capacity_bytes);
    assert_eq!(node.observed().free_bytes, capacity);
    assert_eq!(node.cores().read(object, 999 * EXTENT_BLOCKS), 0);
    assert_eq!(node.allocated(), 0, "reading takes nothing");
    node.cores().write(object, 999 * EXTENT_BLOCKS, 7).unwrap();
    node.cores().write(object, 998 * EXTENT_BLOCKS, 8).unwrap();
    node.cores().write(object, 998 * EXTENT_BLOCKS + 1, 9).unwrap();
    assert_eq!(node.allocated(), 2);
    assert_eq!(node.observed().free_bytes, capacity - 2 * EXTENT_BYTES);
    // Until there is no more; what has room goes on.
    let slots = u32::try_from(capacity / EXTENT_BYTES).unwrap();
    for extent in 0..u64::from(slots) - 2 {
        node.cores().write(object, extent * EXTENT_BLOCKS, 1).unwrap();
    }
    assert_eq!(node.cores().write(object, 500 * EXTENT_BLOCKS, 1), Err(StoreError::NoSpace));
    assert_eq!((node.allocated(), node.observed().free_bytes), (slots, 0));
    node.cores().write(object, 998 * EXTENT_BLOCKS + 2, 4).unwrap();
    for (block, byte) in [(999 * EXTENT_BLOCKS, 7), (998 * EXTENT_BLOCKS, 8), (500 * EXTENT_BLOCKS, 0)] {
        assert_eq!(node.cores().read(object, block), byte);
    }
    assert_eq!(node.observed().state, StoreState::Ready);
}

#[test]
fn a_new_volume_on_used_extents_reads_as_zeros() {
    let mut node = Node::new();
    node.want(1, SECTORS, VolumeIntent::Active);
    node.converge(&[]);
    node.write_everywhere(1, 0xaa);
    assert_eq!(node.allocated(), 3);
    node.want(1, SECTORS, VolumeIntent::Purging);
    node.converge(&[]);
    assert_eq!(node.allocated(), 0);
    node.desired.volumes.clear();
    // The same id again is another volume.
    for n in [1, 2] {
        node.want(n, 100 * EXTENT_SECTORS, VolumeIntent::Active);
        node.converge(&[]);
        assert_eq!(node.bytes(n), [0; 6]);
        // In every extent that there is, so in those that volume 1 had.
        let (object, slots) = (node.object(n), node.observed().capacity_bytes / EXTENT_BYTES);
        for extent in 0..slots / 2 {
            let block = extent * EXTENT_BLOCKS;
            node.cores().write(object, block + 1, n).unwrap();
            let around = [0, 1, 2].map(|at| node.cores().read(object, block + at));
            assert_eq!(around, [0, n, 0]);
        }
    }
}

#[test]
fn only_what_is_purging_and_unserved_is_freed() {
    let mut node = Node::new();
    node.want(1, SECTORS, VolumeIntent::Active);
    node.want(2, SECTORS, VolumeIntent::Active);
    node.converge(&[1, 2]);
    node.write_everywhere(1, 0xbb);
    node.write_everywhere(2, 0xcc);
    // Not named any more: an orphan, kept, also by the next process.
    node.desired.volumes.retain(|wish| wish.id != volume(1));
    node.converge(&[2]);
    node.reopen(true);
    node.converge(&[2]);
    assert_eq!(node.state(1), VolumeObserved::Orphan);
    assert_eq!(node.bytes(1), [0xbb; 6]);
    // Purging, and still served: kept.
    node.want(2, SECTORS, VolumeIntent::Purging);
    node.converge(&[2]);
    assert_ne!(node.state(2), VolumeObserved::Purged);
    assert_eq!((node.bytes(2), node.allocated()), (vec![0xcc; 6], 6));
    node.converge(&[]);
    assert_eq!((node.state(2), node.size(2)), (VolumeObserved::Purged, None));
    assert_eq!((node.bytes(1), node.allocated()), (vec![0xbb; 6], 3));
    // There is no way back while it goes, and afterwards it is another volume.
    node.want(2, SECTORS, VolumeIntent::Active);
    node.converge(&[]);
    assert_eq!(node.bytes(2), [0; 6]);
}

#[test]
fn a_purge_has_no_way_back() {
    let mut node = Node::new();
    node.want(1, SECTORS, VolumeIntent::Active);
    node.converge(&[]);
    node.write_everywhere(1, 0xaa);
    node.want(1, SECTORS, VolumeIntent::Purging);
    node.step(&[]);
    assert!(node.stores.is_unmapping());
    node.want(1, SECTORS, VolumeIntent::Active);
    node.step(&[]);
    assert_eq!(node.state(1), VolumeObserved::Failed);
    assert!(!node.stores.servable_sectors(&node.desired).contains_key(&volume(1)));
    let observed = node.stores.observe_volumes(&node.desired);
    assert!(observed[0].error.contains("no way back"), "{}", observed[0].error);
}

#[test]
fn a_volume_grows_in_zeros_and_shrinks_only_when_wanted() {
    let mut node = Node::new();
    node.want(1, EXTENT_SECTORS, VolumeIntent::Active);
    node.converge(&[1]);
    node.want(1, SECTORS, VolumeIntent::Active);
    node.converge(&[1]);
    assert_eq!(node.size(1), Some(SECTORS));
    assert_eq!(node.bytes(1), [0; 6]);
    node.write_everywhere(1, 0xdd);
    // Down to one and a half extents, and up again: what was given up does not come back.
    let half = EXTENT_SECTORS + EXTENT_SECTORS / 2;
    node.want(1, half, VolumeIntent::Active);
    node.step(&[1]);
    assert_eq!(node.size(1), Some(half));
    assert_eq!(node.stores.servable_sectors(&node.desired)[&volume(1)], half);
    // Wanted large again while the end is going: it grows when that is gone.
    node.want(1, SECTORS, VolumeIntent::Active);
    node.step(&[1]);
    assert_eq!((node.size(1), node.state(1)), (Some(half), VolumeObserved::Allocating));
    node.converge(&[1]);
    assert_eq!((node.size(1), node.state(1)), (Some(SECTORS), VolumeObserved::Ready));
    assert_eq!(node.allocated(), 2);
    assert_eq!(node.bytes(1), [0xdd, 0xdd, 0xdd, 0, 0, 0]);
    // And the next process finds it so.
    node.reopen(false);
    node.converge(&[1]);
    assert_eq!(node.bytes(1), [0xdd, 0xdd, 0xdd, 0, 0, 0]);
}

#[test]
fn what_was_being_given_up_is_given_up_by_the_next_process() {
    for purge in [true, false] {
        let mut node = Node::new();
        node.want(1, SECTORS, VolumeIntent::Active);
        node.converge(&[]);
        node.write_everywhere(1, 0xee);
        if purge {
            node.want(1, SECTORS, VolumeIntent::Purging);
        } else {
            node.want(1, EXTENT_SECTORS, VolumeIntent::Active);
        }
        // It stands in the catalog; the shard has heard of it and done nothing.
        node.step(&[]);
        assert_eq!(node.allocated(), 3);
        node.reopen(false);
        assert_eq!(node.allocated(), 3);
        node.converge(&[]);
        if purge {
            assert_eq!((node.state(1), node.allocated()), (VolumeObserved::Purged, 0));
        } else {
            assert_eq!((node.state(1), node.allocated()), (VolumeObserved::Ready, 1));
            assert_eq!(node.bytes(1), [0xee, 0xee, 0, 0, 0, 0]);
        }
        // Once is enough.
        node.reopen(true);
        node.step(&[]);
        assert!(!node.stores.is_unmapping());
    }
}

#[test]
fn sizes_that_cannot_be_are_said_and_another_size_is_tried() {
    let mut node = Node::new();
    for wrong in [0, VOLUME_SECTORS_MAX + 1] {
        node.want(1, wrong, VolumeIntent::Active);
        node.converge(&[]);
        assert_eq!(node.state(1), VolumeObserved::Failed);
        let observed = node.stores.observe_volumes(&node.desired);
        assert!(observed[0].error.contains("sectors"), "{}", observed[0].error);
    }
    node.want(1, SECTORS, VolumeIntent::Active);
    node.converge(&[]);
    assert_eq!(node.state(1), VolumeObserved::Ready);
}

#[test]
fn a_store_that_is_named_no_more_is_closed_and_can_come_back() {
    let mut node = Node::new();
    node.want(1, SECTORS, VolumeIntent::Active);
    node.converge(&[]);
    node.write_everywhere(1, 0xaa);
    let named = std::mem::take(&mut node.desired.stores);
    node.stores.open_missing(&node.desired);
    assert_eq!(node.size(1), None, "not served any more");
    assert!(node.stores.close_removed());
    assert!(node.stores.access().iter().all(Option::is_none));
    node.cores.take().unwrap().close();
    node.stores.drop_closed();
    node.desired.stores = named;
    node.stores.open_missing(&node.desired);
    let access = node.stores.access();
    node.cores = Some(adopt(access[0].as_ref().unwrap()));
    node.converge(&[]);
    assert_eq!(node.size(1), Some(SECTORS));
    assert_eq!(node.bytes(1), [0xaa; 6]);
}

#[test]
fn a_store_that_cannot_be_opened_is_said_and_the_others_serve() {
    let mut node = Node::new();
    let path = node.folder.path().join("missing").to_str().unwrap().to_owned();
    node.desired.stores.push(DesiredStore { path, size_bytes: 0, id: None, scrub: None });
    node.want(1, SECTORS, VolumeIntent::Active);
    node.converge(&[]);
    let observed = node.stores.observe(&node.desired);
    assert_eq!(observed[1].state, StoreState::Failed);
    assert!(observed[1].error.contains("does not exist"), "{}", observed[1].error);
    assert_eq!(node.state(1), VolumeObserved::Ready);
    assert!(node.stores.have_work(), "it is tried again");
}

#[test]
fn a_shard_that_fails_is_said() {
    let mut node = Node::new();
    let store = node.stores.slots[0].as_ref().unwrap();
    store.shared.events.push(ShardEvent::Failed { shard: 1, why: "a sync failed" }).unwrap();
    assert!(node.stores.have_work());
    node.step(&[]);
    let observed = node.observed();
    assert_eq!(observed.state, StoreState::Failed);
    assert!(
        observed.error.contains("a sync failed") && observed.error.contains("restart"),
        "{}",
        observed.error
    );
}
