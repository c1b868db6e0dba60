//! The extents of one shard, in memory: where each lies, what is known of its blocks, and whether its region is in the
//! activity log.
//!
//! Invariants:
//! * What stands here has a durable record in the journal or a durable checkpoint: sums change when their batch has ended.
//! * A slot belongs to one extent. It is given to another only when it is durable that its former extent has it no more, and none of
//!   that one's reads and writes of it is in flight.
//! * An extent has one slot, or two: then a block is absent in one of them at least, and lies in the other.
//! * An extent's place in the table ([`ExtentId`]) does not change while it lives.
//! * The highest version of a layer is none below that of any extent that it has or had: since the shard was opened, and since a
//!   state of its replica was first made durable.

mod order;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
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

/// A slot that an extent has.
#[derive(Debug)]
pub struct Half {
    /// Which.
    pub slot: u32,
    /// The blocks that lie in it; all others are absent here.
    pub sums: Box<SumPage>,
    /// The batch that gave it to the extent; 0 where a checkpoint has it.
    pub allocated_lsn: u64,
    /// Which of the slot's sum pages the last durable checkpoint names.
    pub which: u8,
    /// CRC32C of that page.
    pub page_crc: u32,
    /// CRC32C of the sum page that the checkpoint in progress has written.
    pub next_page_crc: Option<u32>,
    /// Reads of it that are in flight.
    pub reads_in_flight: u32,
    /// Writes of data to it, and of its sum page, that are in flight.
    pub writes_in_flight: u32,
    /// That the extent has it no more is on its way to the journal.
    pub ending: bool,
    /// That is durable; the slot goes when the last read and write has ended.
    pub ended: bool,
}

impl Half {
    /// A slot that was just given to an extent.
    #[must_use]
    pub fn new(free: FreeSlot, lsn: u64) -> Half {
        Half {
            slot: free.slot,
            sums: free.sums,
            allocated_lsn: lsn,
            which: 0,
            page_crc: 0,
            next_page_crc: None,
            reads_in_flight: 0,
            writes_in_flight: 0,
            ending: false,
            ended: false,
        }
    }

    /// Whether no block lies in it.
    #[must_use]
    pub fn is_vacant(&self) -> bool {
        self.sums.iter().all(|sum| *sum == Sum::ABSENT)
    }

    /// How many blocks lie in it.
    #[must_use]
    pub fn count(&self) -> usize {
        self.sums.iter().filter(|sum| **sum != Sum::ABSENT).count()
    }

    /// Whether it is the extent's, and is going to be.
    #[must_use]
    pub fn stays(&self) -> bool {
        !self.ending && !self.ended
    }
}

/// One extent.
#[derive(Debug)]
pub struct Extent {
    /// The volume's layer.
    pub object: u32,
    /// Which of its extents.
    pub number: u32,
    /// Where it lies. A slot stays in its place here as long as the extent has it.
    pub halves: [Option<Half>; 2],
    /// The highest version written; changed by [`Extents::wrote`].
    pub version: u64,
    /// The batch that gave it its first slot; 0 where a checkpoint has it.
    pub begun_lsn: u64,
    /// Its layer's place among the layers.
    layer: u32,
    /// What it knows differs from the sum pages that the last durable checkpoint names.
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
    /// Its end is on its way to the journal.
    pub ending: bool,
    /// Its end is durable; it goes when its slots have.
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

    /// Makes an extent unfindable: its end is durable. It keeps its place until [its last slot is taken](Extents::take_half).
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

    /// Takes from an extent a slot that it has no more; the extent goes too if it has ended and that was its last one.
    ///
    /// # Panics
    /// If reads or writes of the slot are in flight.
    pub fn take_half(&mut self, id: ExtentId, at: u8) -> Half {
        let extent = self.get_mut(id);
        let half = extent.halves[usize::from(at)].take().expect("a slot of the extent");
        assert!(
            half.reads_in_flight == 0 && half.writes_in_flight == 0,
            "a slot goes after its last request"
        );
        assert!(half.ended || extent.ended, "a slot goes when that is durable");
        if extent.ended && extent.halves.iter().all(Option::is_none) {
            self.places[id.0 as usize] = None;
            self.free.push(id.0);
        }
        half
    }

    /// How many slots they have.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.iter().map(|(_, extent)| u32::try_from(extent.live().count()).expect("at most two")).sum()
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

    /// Whether both of its places are taken, if only by a slot that is about to go.
    #[must_use]
    pub fn is_twin(&self) -> bool {
        self.halves.iter().all(Option::is_some)
    }

    /// The slots that it has.
    pub fn live(&self) -> impl Iterator<Item = (u8, &Half)> {
        let halves = (0..).zip(&self.halves);
        halves.filter_map(|(at, half)| Some((at, half.as_ref()?))).filter(|(_, half)| !half.ended)
    }

    /// One of its slots.
    ///
    /// # Panics
    /// If it does not have that one.
    #[must_use]
    pub fn half(&self, at: u8) -> &Half {
        self.halves[usize::from(at)].as_ref().expect("a slot of the extent")
    }

    /// One of its slots.
    ///
    /// # Panics
    /// If it does not have that one.
    pub fn half_mut(&mut self, at: u8) -> &mut Half {
        self.halves[usize::from(at)].as_mut().expect("a slot of the extent")
    }

    /// The slot that stands for all of it, and that blocks lie in which have nothing yet.
    ///
    /// # Panics
    /// If it has none.
    #[must_use]
    pub fn home(&self) -> u8 {
        let position =
            |wanted: fn(&Half) -> bool| self.halves.iter().position(|half| half.as_ref().is_some_and(wanted));
        let at = position(Half::stays).or_else(|| position(|_| true)).expect("an extent has a slot");
        u8::from(at == 1)
    }

    /// The number of its [home](Extent::home).
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.half(self.home()).slot
    }

    /// What is known of a block.
    #[must_use]
    pub fn sum(&self, block: u16) -> Sum {
        let sums = self.halves.iter().flatten().map(|half| half.sums[usize::from(block)]);
        sums.fold(Sum::ABSENT, |found, sum| if found == Sum::ABSENT { sum } else { found })
    }

    /// What is known of blocks.
    pub fn sums(&self, blocks: Range<u16>) -> impl Iterator<Item = Sum> {
        blocks.map(|block| self.sum(block))
    }

    /// What is known of all its blocks.
    pub fn all_sums(&self) -> impl Iterator<Item = Sum> {
        self.sums(0..u16::try_from(EXTENT_BLOCKS).expect("1024"))
    }

    /// The slot that a block lies in.
    #[must_use]
    pub fn half_of(&self, block: u16) -> u8 {
        match &self.halves {
            [Some(_), None] => 0,
            [None, Some(_)] => 1,
            halves => {
                let has = |half: &Half| half.sums[usize::from(block)] != Sum::ABSENT;
                let at = halves.iter().position(|half| half.as_ref().is_some_and(has));
                at.map_or_else(|| self.home(), |at| u8::from(at == 1))
            }
        }
    }

    /// The first batch that gave it a slot which it has.
    #[must_use]
    pub fn allocated_lsn(&self) -> u64 {
        self.live().map(|(_, half)| half.allocated_lsn).min().unwrap_or(0)
    }

    /// Whether writes to it are in flight.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.halves.iter().flatten().any(|half| half.writes_in_flight > 0)
    }

    /// Gives it another slot.
    ///
    /// # Panics
    /// If it has two.
    pub fn add_half(&mut self, half: Half) -> u8 {
        let at = self.halves.iter().position(Option::is_none).expect("an extent has at most two slots");
        self.halves[at] = Some(half);
        u8::from(at == 1)
    }

    /// Blocks of it were given a state without data, which lies in that slot; `hollow` where all of it was taken away.
    pub fn cleared(&mut self, at: u8, block: u16, count: u16, state: Sum, hollow: bool) {
        self.take_away(block, count);
        self.half_mut(at).sums[usize::from(block)..][..usize::from(count)].fill(state);
        self.hollow = hollow || self.hollow && state == Sum::ABSENT;
    }

    /// Nothing is known of blocks any more, but what will be said next.
    pub fn take_away(&mut self, block: u16, count: u16) {
        for half in self.halves.iter_mut().flatten() {
            half.sums[usize::from(block)..][..usize::from(count)].fill(Sum::ABSENT);
        }
    }

    /// A block of it was written to that slot.
    pub fn set(&mut self, at: u8, block: u16, sum: Sum) {
        self.take_away(block, 1);
        self.half_mut(at).sums[usize::from(block)] = sum;
        self.hollow = false;
    }

    /// An extent that a slot was just given to.
    #[must_use]
    pub fn allocated(object: u32, number: u32, free: FreeSlot, lsn: u64) -> Extent {
        Extent {
            object,
            number,
            halves: [Some(Half::new(free, lsn)), None],
            version: 0,
            begun_lsn: lsn,
            layer: 0,
            dirty: false,
            active: false,
            suspect: false,
            activating: false,
            deactivating: false,
            hollow: false,
            touched: false,
            ending: false,
            ended: false,
        }
    }
}
