//! The extents of one shard, in memory: where each lies, what is known of its blocks, and whether its region is in the
//! activity log.
//!
//! Invariants:
//! * What stands here has a durable record in the journal or a durable checkpoint: sums change when their batch has ended.
//! * A slot belongs to one extent. It is given to another only when its former extent's end is durable and none of its
//!   writes is in flight.
//! * An extent's place in the table ([`ExtentId`]) does not change while it lives.
//! * The highest version of a layer is none below that of any extent that it has or had: since the shard was opened, and since a
//!   state of its replica was first made durable.

mod order;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use self::order::Order;
use super::format::{EXTENT_BLOCKS, LayerState, ReplicaState, Sum, SumPage};

/// Place of an extent in its shard's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtentId(pub u32);

/// A slot that no extent has, with the memory for its sums.
#[derive(Debug)]
pub struct FreeSlot {
    /// Which.
    pub slot: u32,
    /// Sums for its next extent; all [`Sum::ABSENT`].
    pub sums: Box<SumPage>,
}

impl FreeSlot {
    /// One with fresh memory.
    #[must_use]
    pub fn new(slot: u32) -> FreeSlot {
        FreeSlot { slot, sums: fresh_page() }
    }
}

/// A page without anything, made on the heap.
#[must_use]
pub fn fresh_page() -> Box<SumPage> {
    vec![Sum::ABSENT; EXTENT_BLOCKS as usize].into_boxed_slice().try_into().expect("as long as a page")
}

/// One extent.
#[derive(Debug)]
pub struct Extent {
    /// The volume's layer.
    pub object: u32,
    /// Which of its extents.
    pub number: u32,
    /// Where it lies.
    pub slot: u32,
    /// The highest version written; changed by [`Extents::wrote`].
    pub version: u64,
    /// Its layer's place among the layers.
    layer: u32,
    /// Its blocks.
    pub sums: Box<SumPage>,
    /// The batch that allocated it; 0 where a checkpoint has it.
    pub allocated_lsn: u64,
    /// Which of the slot's sum pages the last durable checkpoint names.
    pub which: u8,
    /// CRC32C of that page.
    pub page_crc: u32,
    /// What it knows differs from that page.
    pub dirty: bool,
    /// Its region is in the activity log, durably.
    pub active: bool,
    /// It was in the activity log when the store was opened after a crash, and has not been verified since.
    pub suspect: bool,
    /// An activation is on its way to the journal.
    pub activating: bool,
    /// Its way out of the activity log is on the way to the journal.
    pub deactivating: bool,
    /// All of it was taken away, durably: it goes when that is on every copy.
    pub hollow: bool,
    /// Its region was written since the activity log last looked for one to leave.
    pub touched: bool,
    /// CRC32C of the sum page that the checkpoint in progress has written.
    pub next_page_crc: Option<u32>,
    /// Data writes to the slot that are in flight.
    pub writes_in_flight: u32,
    /// Its end is on its way to the journal.
    pub ending: bool,
    /// Its end is durable; the slot goes when the last write has ended.
    pub ended: bool,
}

/// Multiplies and folds: keys are small numbers that nobody outside chooses freely.
#[derive(Debug, Default, Clone, Copy)]
pub struct FoldHasher(u64);

impl Hasher for FoldHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(29) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// A map that hashes by [`FoldHasher`].
pub type FoldMap<K, V> = HashMap<K, V, BuildHasherDefault<FoldHasher>>;

/// What an extent is, to who asks which there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldExtent {
    /// Which of its layer's extents.
    pub number: u32,
    /// The highest version written to it.
    pub version: u64,
    /// Its region is in the activity log or on the way there, and not on the way out of it: then every copy has all of it.
    pub active: bool,
    /// Blocks of it may match no record: it was being written when the store stopped, and has not been verified since.
    pub suspect: bool,
}

/// What the extents of a layer have in common.
#[derive(Debug)]
struct Layer {
    object: u32,
    /// The highest version written to any of them.
    highest: u64,
    /// What its replica has made durable.
    state: Option<Arc<ReplicaState>>,
}

/// All extents of a shard.
#[derive(Debug)]
pub struct Extents {
    places: Vec<Option<Extent>>,
    free: Vec<u32>,
    by_key: FoldMap<(u32, u32), u32>,
    order: Order,
    layers: Vec<Layer>,
    /// Places of layers by their number in the catalog.
    layer_of: FoldMap<u32, u32>,
    count: u32,
}

/// Layers that there is room for from the start; more are made as they come.
const LAYERS_EXPECTED: usize = 256;

impl Extents {
    /// None yet, with room for `entries_max` without another allocation.
    #[must_use]
    pub fn new(entries_max: u32) -> Extents {
        Extents {
            places: Vec::with_capacity(entries_max as usize),
            free: Vec::with_capacity(entries_max as usize),
            by_key: FoldMap::with_capacity_and_hasher(entries_max as usize, BuildHasherDefault::default()),
            order: Order::new(entries_max),
            layers: Vec::with_capacity(LAYERS_EXPECTED),
            layer_of: FoldMap::with_capacity_and_hasher(LAYERS_EXPECTED, BuildHasherDefault::default()),
            count: 0,
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.count
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Places in the table, free or not: the end of a walk.
    #[must_use]
    pub fn places(&self) -> u32 {
        u32::try_from(self.places.len()).expect("slots are numbered by 32 bits")
    }

    /// That extent of a layer, unless it has none there.
    #[must_use]
    pub fn find(&self, object: u32, number: u32) -> Option<ExtentId> {
        self.by_key.get(&(object, number)).copied().map(ExtentId)
    }

    /// The extent at a place, if one is there.
    #[must_use]
    pub fn at(&self, place: u32) -> Option<(ExtentId, &Extent)> {
        self.places.get(place as usize)?.as_ref().map(|extent| (ExtentId(place), extent))
    }

    /// The extent at a place.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn get(&self, id: ExtentId) -> &Extent {
        self.places[id.0 as usize].as_ref().expect("an extent of this shard")
    }

    /// The extent at a place.
    ///
    /// # Panics
    /// If there is none.
    pub fn get_mut(&mut self, id: ExtentId) -> &mut Extent {
        self.places[id.0 as usize].as_mut().expect("an extent of this shard")
    }

    /// Takes one in.
    ///
    /// # Panics
    /// If the layer has that extent already.
    pub fn insert(&mut self, mut extent: Extent) -> ExtentId {
        let key = (extent.object, extent.number);
        extent.layer = self.layer(extent.object);
        let highest = &mut self.layers[extent.layer as usize].highest;
        *highest = extent.version.max(*highest);
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places() - 1
        });
        let before = self.by_key.insert(key, place);
        assert!(before.is_none(), "a layer has each extent once");
        self.order.insert(key, place);
        self.places[place as usize] = Some(extent);
        self.count += 1;
        ExtentId(place)
    }

    /// Makes an extent unfindable: its end is durable. It keeps its place until it is [removed](Extents::remove).
    pub fn end(&mut self, id: ExtentId) {
        let extent = self.get_mut(id);
        assert!(!extent.ended, "an extent ends once");
        extent.ended = true;
        let key = (extent.object, extent.number);
        let found = self.by_key.remove(&key);
        assert_eq!(found, Some(id.0), "an extent is found by its key");
        self.order.remove(key);
        self.count -= 1;
    }

    /// Takes an ended extent out.
    ///
    /// # Panics
    /// If it has not ended, or writes to it are in flight.
    pub fn remove(&mut self, id: ExtentId) -> Extent {
        let extent = self.places[id.0 as usize].take().expect("an extent of this shard");
        assert!(extent.ended && extent.writes_in_flight == 0, "a slot goes after its extent's last write");
        self.free.push(id.0);
        extent
    }

    /// The place of a layer among the layers.
    fn layer(&mut self, object: u32) -> u32 {
        *self.layer_of.entry(object).or_insert_with(|| {
            self.layers.push(Layer { object, highest: 0, state: None });
            u32::try_from(self.layers.len() - 1).expect("layers are numbered by 32 bits")
        })
    }

    /// A write of that version is durable, or is found to have been.
    pub fn wrote(&mut self, id: ExtentId, version: u64) -> &mut Extent {
        let extent = self.places[id.0 as usize].as_mut().expect("an extent of this shard");
        let highest = &mut self.layers[extent.layer as usize].highest;
        *highest = version.max(*highest);
        extent.version = version.max(extent.version);
        extent
    }

    /// The highest version written to a layer; 0 for none.
    #[must_use]
    pub fn highest_version(&self, object: u32) -> u64 {
        self.layer_of.get(&object).map_or(0, |layer| self.layers[*layer as usize].highest)
    }

    /// A version of a layer is known that no extent of it has any more.
    pub fn raise(&mut self, object: u32, version: u64) {
        let layer = self.layer(object) as usize;
        let highest = &mut self.layers[layer].highest;
        *highest = version.max(*highest);
    }

    /// What a layer's replica has made durable.
    #[must_use]
    pub fn state(&self, object: u32) -> Option<&Arc<ReplicaState>> {
        self.layers[*self.layer_of.get(&object)? as usize].state.as_ref()
    }

    /// A state of a layer's replica is durable.
    pub fn persisted(&mut self, LayerState { object, version, state }: LayerState) {
        self.raise(object, version);
        let layer = self.layer(object) as usize;
        self.layers[layer].state = Some(state);
    }

    /// It is durable that a layer has ended. What is written to it all the same begins anew.
    pub fn forgotten(&mut self, object: u32) {
        let (mut highest, mut next) = (0, Some(0));
        while let Some((_, extent)) = next.and_then(|next| self.first_from(object, next)) {
            highest = extent.version.max(highest);
            next = extent.number.checked_add(1);
        }
        let layer = self.layer(object) as usize;
        (self.layers[layer].highest, self.layers[layer].state) = (highest, None);
    }

    /// Layers of which a state is kept, in no order.
    pub fn states(&self) -> impl Iterator<Item = LayerState> {
        self.layers.iter().filter_map(|layer| {
            let state = Arc::clone(layer.state.as_ref()?);
            Some(LayerState { object: layer.object, version: layer.highest, state })
        })
    }

    /// A layer's first extent from a number on.
    #[must_use]
    pub fn first_from(&self, object: u32, number: u32) -> Option<(ExtentId, &Extent)> {
        let ((found, _), place) = self.order.first_from((object, number))?;
        if found == object { self.at(place) } else { None }
    }

    /// All that have not ended.
    pub fn iter(&self) -> impl Iterator<Item = (ExtentId, &Extent)> {
        (0..self.places()).filter_map(|place| self.at(place)).filter(|(_, extent)| !extent.ended)
    }
}

impl Extent {
    /// What it is to who asks which there are.
    #[must_use]
    pub fn held(&self) -> HeldExtent {
        let active = (self.active && !self.deactivating) || self.activating;
        HeldExtent { number: self.number, version: self.version, active, suspect: self.suspect }
    }

    /// Blocks of it were given a state without data; `hollow` where all of it was taken away.
    pub fn cleared(&mut self, block: u16, count: u16, state: Sum, hollow: bool) {
        self.sums[usize::from(block)..][..usize::from(count)].fill(state);
        self.hollow = hollow || self.hollow && state == Sum::ABSENT;
    }

    /// A block of it was written.
    pub fn set(&mut self, block: u16, sum: Sum) {
        self.sums[usize::from(block)] = sum;
        self.hollow = false;
    }

    /// An extent that a slot was just given to.
    #[must_use]
    pub fn allocated(object: u32, number: u32, free: FreeSlot, lsn: u64) -> Extent {
        Extent {
            object,
            number,
            slot: free.slot,
            version: 0,
            layer: 0,
            sums: free.sums,
            allocated_lsn: lsn,
            which: 0,
            page_crc: 0,
            dirty: false,
            active: false,
            suspect: false,
            activating: false,
            deactivating: false,
            hollow: false,
            touched: false,
            next_page_crc: None,
            writes_in_flight: 0,
            ending: false,
            ended: false,
        }
    }
}
