//! What fuzzing gives to whatever reads a store's device, and what must hold whatever it gives.
//!
//! Built for tests and for the targets in `fuzz/` only. A failed assertion is the finding. The first byte says what the rest is:
//! bytes for one decoder, which get a checksum that fits too, or the history of a small device, whose checkpoints and batches are
//! whole but say what the bytes want. What must hold:
//! * Whatever can be decoded is the same when it is encoded and decoded again.
//! * Opening gives an answer or an error, the same each time; it reads nothing beyond the device, and writes only to extents, and to a
//!   journal over the header of a last batch whose data are not whole.
//! * Putting data in place changes nothing of what the metadata say, and doing it twice gives the same.
//! * A slot is free or has one extent, which has one or two; a block lies in one of them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use cluster_map::{ClusterId, NodeId, StoreId, VolumeId};

use super::catalog::Catalog;
use super::extents::{Extent, Half, fresh_page};
use super::format::{
    BLOCK, BatchHeader, COUNT_END, CheckpointHeader, DEVICE_BYTES_MIN, DataAt, ENTRY_BYTES, EXTENT_BLOCKS,
    Entry, Epochs, JournalName, LayerState, RECORD_BYTES, RECORDS_MAX, Record, ReplicaState, Segment, Shape,
    ShardName, Sum, Superblock, decode_batch, decode_page, encode_batch, encode_page,
};
use super::recovery::{self, Findings, Image, Medium, RecoveryError};
use crate::store::{BLOCK_BYTES, EXTENT_BYTES};

const STORE: StoreId = StoreId([3; 16]);
const KEY: [u8; 16] = [4; 16];
const SHARDS: u16 = 2;
/// Where the checksum of a batch lies, and that of every other structure.
const BATCH_CRC_AT: usize = 8;
const CRC_AT: usize = 12;

/// What the first byte says.
mod kind {
    pub(super) const SUPERBLOCK: u8 = 0;
    pub(super) const CATALOG: u8 = 1;
    pub(super) const CHECKPOINT: u8 = 2;
    pub(super) const ENTRY: u8 = 3;
    pub(super) const PAGE: u8 = 4;
    pub(super) const BATCH: u8 = 5;
    pub(super) const DEVICE: u8 = 6;
    pub(super) const STATE: u8 = 7;
}

/// How far bytes have come.
#[derive(Debug, Default, Clone, Copy)]
pub struct Reached {
    /// Structures that could be decoded.
    pub decoded: u64,
    /// Shards that could be opened.
    pub opened: u64,
    /// Shards that were refused.
    pub refused: u64,
    /// Batches behind the checkpoints of those that could.
    pub batches: u64,
    /// Blocks put in place.
    pub placed: u64,
}

/// Reads bytes as whoever opens a store does.
///
/// # Panics
/// If something does not hold: see the module's head.
pub fn store(bytes: &[u8]) -> Reached {
    let mut reached = Reached::default();
    let Some((&what, rest)) = bytes.split_first() else { return reached };
    let mut block = vec![0; BLOCK_BYTES];
    let len = rest.len().min(BLOCK_BYTES);
    block[..len].copy_from_slice(&rest[..len]);
    match what {
        kind::SUPERBLOCK => {
            seal(&mut block, CRC_AT);
            reached.decoded += u64::from(superblock(rest)) + u64::from(superblock(&block));
        }
        kind::CATALOG => {
            let mut table = rest.to_vec();
            seal_catalog(&mut table);
            reached.decoded += u64::from(catalog(rest)) + u64::from(catalog(&table));
        }
        kind::CHECKPOINT => {
            seal(&mut block, CRC_AT);
            reached.decoded += u64::from(checkpoint(rest)) + u64::from(checkpoint(&block));
        }
        kind::ENTRY => {
            let decoded = rest.chunks(ENTRY_BYTES).filter(|bytes| entry(bytes)).count();
            reached.decoded += decoded as u64;
        }
        kind::PAGE => {
            page(rest, &block);
            reached.decoded += 1;
        }
        kind::STATE => reached.decoded += u64::from(state(rest)),
        kind::BATCH => {
            seal(&mut block, BATCH_CRC_AT);
            reached.decoded += u64::from(batch(rest)) + u64::from(batch(&block));
        }
        _ => device(&mut Input(rest), &mut reached),
    }
    reached
}

// -------------------------------------------------------------------------------------------------------------------
// Decoders

fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let crc = crc32c::crc32c(bytes);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// The checksum of a catalog goes as far as its volumes.
fn seal_catalog(bytes: &mut [u8]) {
    const HEADER_BYTES: usize = 64;
    const VOLUME_BYTES: usize = 56;
    let Some(&count) = bytes.get(40..).and_then(<[u8]>::first_chunk) else { return };
    let end = u64::from(u32::from_le_bytes(count)) * VOLUME_BYTES as u64 + HEADER_BYTES as u64;
    if let Some(used) = usize::try_from(end).ok().and_then(|end| bytes.get_mut(..end)) {
        seal(used, CRC_AT);
    }
}

/// Whether whoever goes on from a number can count on for as long as a store lives.
fn can_grow(number: u64) -> bool {
    number < COUNT_END
}

fn superblock(bytes: &[u8]) -> bool {
    let Ok(superblock) = Superblock::decode(bytes) else { return false };
    assert_eq!(Superblock::decode(&superblock.encode()).as_ref(), Ok(&superblock));
    assert!(can_grow(superblock.open_count));
    let last = superblock.slots() - 1;
    assert!(superblock.data_offset(last) + EXTENT_BYTES <= superblock.device_bytes);
    assert!(superblock.page_offset(last, 1) + BLOCK <= superblock.data_offset(last));
    assert!(superblock.journal_offset(superblock.shards - 1) < superblock.page_offset(0, 0));
    for device_bytes in [superblock.device_bytes.saturating_add(1 << 30), u64::MAX] {
        if let Some(grown) = superblock.grown(device_bytes) {
            assert_eq!(Superblock::decode(&grown.encode()).as_ref(), Ok(&grown));
        }
    }
    true
}

fn catalog(bytes: &[u8]) -> bool {
    let Ok((sequence, mut catalog)) = Catalog::decode(bytes, STORE, SHARDS) else { return false };
    assert_eq!(
        Catalog::decode(&catalog.encode(STORE, sequence), STORE, SHARDS),
        Ok((sequence, catalog.clone()))
    );
    assert!(can_grow(sequence));
    if catalog.add(VolumeId([9; 16]), 8, SHARDS).is_ok() {
        assert!(Catalog::decode(&catalog.encode(STORE, sequence), STORE, SHARDS).is_ok());
    }
    true
}

fn checkpoint(bytes: &[u8]) -> bool {
    let name = ShardName { store: STORE, shard: 0 };
    let Ok(header) = CheckpointHeader::decode(bytes, name, 0) else { return false };
    let mut again = vec![0; BLOCK_BYTES];
    header.encode(name, 0, &mut again);
    assert_eq!(CheckpointHeader::decode(&again, name, 0), Ok(header));
    assert!(can_grow(header.sequence) && can_grow(header.lsn));
    true
}

fn entry(bytes: &[u8]) -> bool {
    let Ok(entry) = Entry::decode(bytes) else { return false };
    let mut again = Vec::new();
    entry.encode(&mut again);
    assert_eq!(Entry::decode(&again), Ok(entry));
    true
}

fn state(bytes: &[u8]) -> bool {
    let Ok((state, rest)) = LayerState::decode(bytes) else { return false };
    let mut again = vec![1; state.units() * RECORD_BYTES];
    state.encode(&mut again);
    assert!(again == bytes[..bytes.len() - rest.len()]);
    assert_eq!(LayerState::decode(&again), Ok((state, &[][..])));
    true
}

fn page(bytes: &[u8], block: &[u8]) {
    let mut page = fresh_page();
    decode_page(bytes, &mut page);
    decode_page(block, &mut page);
    let mut again = vec![0; BLOCK_BYTES];
    encode_page(&page, &mut again);
    assert_eq!(again, block);
}

fn batch(bytes: &[u8]) -> bool {
    let name = JournalName { key: KEY, shard: 0 };
    let Ok((header, _, records)) = decode_batch(bytes, name, 0) else { return false };
    let mut again = vec![0; BLOCK_BYTES];
    let crc = encode_batch(&header, name, &records, &mut again);
    assert_eq!(decode_batch(&again, name, 0), Ok((header, crc, records)));
    true
}

// -------------------------------------------------------------------------------------------------------------------
// A device

/// Bytes to choose by; zeros behind their end.
struct Input<'b>(&'b [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let len = N.min(self.0.len());
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        let mut bytes = [0; N];
        bytes[..len].copy_from_slice(taken);
        bytes
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.bytes();
        byte
    }

    fn below(&mut self, bound: u8) -> u8 {
        self.byte() % bound
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// One of the store's slots; with 254 the first that it does not have, and with 255 any number.
    fn slot(&mut self, layout: &Superblock) -> u32 {
        match self.byte() {
            u8::MAX => self.u32(),
            254 => layout.slots(),
            byte => u32::from(byte) % layout.slots(),
        }
    }
}

type Block = [u8; BLOCK_BYTES];

struct Media<'l> {
    layout: &'l Superblock,
    /// Others are zeros.
    blocks: RefCell<BTreeMap<u64, Box<Block>>>,
}

impl Media<'_> {
    fn block(&self, offset_bytes: u64, change: impl FnOnce(&mut Block)) {
        assert!(offset_bytes.is_multiple_of(BLOCK) && offset_bytes < self.layout.device_bytes);
        let mut blocks = self.blocks.borrow_mut();
        change(blocks.entry(offset_bytes).or_insert_with(|| Box::new([0; BLOCK_BYTES])));
    }
}

impl Medium for Media<'_> {
    type Error = Infallible;

    fn read_at(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Infallible> {
        let aligned = bytes.as_ptr().addr().is_multiple_of(BLOCK_BYTES);
        assert!(aligned && offset_bytes.is_multiple_of(BLOCK) && bytes.len().is_multiple_of(BLOCK_BYTES));
        assert!(offset_bytes + bytes.len() as u64 <= self.layout.device_bytes, "a read beyond the device");
        let blocks = self.blocks.borrow();
        for (at, bytes) in (offset_bytes..).step_by(BLOCK_BYTES).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
            match blocks.get(&at) {
                Some(block) => bytes.copy_from_slice(&block[..]),
                None => bytes.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Infallible> {
        let Segment { data_offset, slots, .. } = self.layout.segments[0];
        let extents = data_offset..data_offset + u64::from(slots) * EXTENT_BYTES;
        let is_header = |shard: u16| {
            let (begin, blocks) = (self.layout.journal_offset(shard), u64::from(self.layout.journal_blocks));
            (begin..begin + blocks * BLOCK).contains(&offset_bytes) && bytes.iter().all(|byte| *byte == 0)
        };
        let is_fine = extents.contains(&offset_bytes) || (0..SHARDS).any(is_header);
        assert!(bytes.len() == BLOCK_BYTES && is_fine, "a write beside the extents");
        self.block(offset_bytes, |block| block.copy_from_slice(bytes));
        Ok(())
    }

    fn sync(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// How a device came to be what it is.
mod event {
    pub(super) const BATCH: u8 = 0;
    pub(super) const CHECKPOINT: u8 = 2;
    pub(super) const PATCH: u8 = 3;
}

/// What does not follow from what was before, as bits.
mod twist {
    pub(super) const LSN: u8 = 1;
    pub(super) const CHAIN: u8 = 2;
    pub(super) const PLACE: u8 = 4;
    // Of a batch.
    pub(super) const OPEN_COUNT: u8 = 8;
    pub(super) const PLACED: u8 = 16;
    pub(super) const TORN: u8 = 32;
    pub(super) const REST: u8 = 64;
    pub(super) const OVERWRITTEN: u8 = 128;
    // Of a checkpoint.
    pub(super) const SECOND: u8 = 8;
    pub(super) const SEQUENCE: u8 = 16;
    pub(super) const COUNT: u8 = 32;
    pub(super) const CRC: u8 = 64;
}

/// Most events of a device.
const EVENTS_MAX: usize = 64;
/// Journals as long as a few batches: the shortest of real stores would hold more than an input can fill.
const JOURNAL_BLOCKS: [u32; 4] = [8, 16, 24, 40];

/// Where a shard's journal stands, for what follows next.
#[derive(Clone, Copy, Default)]
struct Writer {
    head: u32,
    lsn: u64,
    chain: u32,
    sequence: u64,
}

/// The first byte: journal, slots and opens; then the events.
fn device(input: &mut Input<'_>, reached: &mut Reached) {
    let setup = input.byte();
    let shape = Shape { shards: Some(SHARDS), journal_blocks: None };
    let (cluster, node) = (ClusterId([1; 16]), NodeId([2; 16]));
    let mut layout =
        Superblock::new(cluster, node, STORE, KEY, DEVICE_BYTES_MIN, shape).expect("room for it");
    layout.journal_blocks = JOURNAL_BLOCKS[usize::from(setup & 3)];
    layout.segments[0].slots = 1 + u32::from(setup >> 2 & 7);
    layout.open_count = u64::from(setup >> 5);
    let media = Media { layout: &layout, blocks: RefCell::default() };
    let mut writers = [Writer { sequence: 1, ..Writer::default() }; SHARDS as usize];
    for shard in 0..SHARDS {
        let first = recovery::first_checkpoint(&layout, shard);
        media.block(layout.checkpoint_offset(shard, 0), |block| block.copy_from_slice(&first));
    }
    for _ in 0..EVENTS_MAX {
        if input.0.is_empty() {
            break;
        }
        let what = input.byte();
        let shard = u16::from(what & 1);
        let writer = &mut writers[usize::from(shard)];
        match what >> 1 & 3 {
            event::CHECKPOINT => write_checkpoint(&media, shard, writer, input),
            event::PATCH => patch(&media, shard, what >> 3 & 1 == 1, input),
            _ => write_batch(&media, shard, writer, input),
        }
    }
    open(&layout, &media, reached);
}

fn record(layout: &Superblock, input: &mut Input<'_>) -> (Record, Option<u8>) {
    let blocks = u16::try_from(EXTENT_BLOCKS).expect("1024");
    let what = input.byte();
    let slot = input.slot(layout);
    match what & 7 {
        // Of layers, and of extents that are hollow.
        _ if what >> 5 == 1 => (layer_record(what & 7, slot, input), None),
        0 | 1 => {
            let (block, content) = (input.u16() % blocks, input.byte());
            let data = match (what >> 3 & 1, what >> 6 & 1) {
                (1, _) => DataAt::Journal,
                (_, 1) => DataAt::FreshPlace,
                _ => DataAt::Place,
            };
            let sum = Sum::of(&[content; BLOCK_BYTES]);
            let version = if what >> 4 & 1 == 1 { input.u64() } else { u64::from(input.byte()) };
            let set = Record::Set { slot, block, sum, before: Sum::ABSENT, version, data };
            (set, (data != DataAt::Place).then_some(content))
        }
        2 | 3 => {
            let (object, extent) = (input.below(4).into(), input.below(4).into());
            (Record::Allocate { slot, object, extent }, None)
        }
        4 => {
            let (object, extent, goes_on) =
                (input.below(4).into(), input.below(4).into(), what >> 3 & 1 == 1);
            (Record::Free { slot, object, extent, goes_on, version: input.byte().into() }, None)
        }
        5 => {
            let block = input.u16() % blocks;
            let count = input.u16() % (blocks - block + 1);
            let (state, version) = (Sum(input.below(3).into()), input.byte().into());
            (Record::Clear { slot, block, count, state, version, hollow: false }, None)
        }
        6 => (Record::Activate { slot }, None),
        _ => (Record::Deactivate { slot }, None),
    }
}

fn layer_record(what: u8, slot: u32, input: &mut Input<'_>) -> Record {
    let object = input.below(4).into();
    match what {
        0 => Record::Forget { object },
        1 => Record::Keep { slot },
        2 | 3 => {
            let count = u16::try_from(EXTENT_BLOCKS).expect("1024");
            let version = input.byte().into();
            Record::Clear { slot, block: 0, count, state: Sum::ABSENT, version, hollow: true }
        }
        _ => Record::Persist(layer_state(object, input)),
    }
}

fn layer_state(object: u32, input: &mut Input<'_>) -> LayerState {
    let (takeover, start, revision) = (input.byte().into(), input.byte().into(), input.byte().into());
    let epochs = (0..u32::from(input.below(5))).map(|partition| (partition, input.byte().into()));
    let epochs = Epochs::new(epochs.collect()).expect("a few, in order");
    let state = ReplicaState { takeover, start, head: NodeId([input.byte(); 16]), revision, epochs };
    LayerState { object, version: input.byte().into(), state: Arc::new(state) }
}

fn write_batch(media: &Media<'_>, shard: u16, writer: &mut Writer, input: &mut Input<'_>) {
    let (layout, twists) = (media.layout, input.byte());
    let has = |twist: u8| twists & twist != 0;
    let lsn = if has(twist::LSN) { input.u64() } else { writer.lsn.wrapping_add(1) };
    let chain = if has(twist::CHAIN) { input.u32() } else { writer.chain };
    let position = if has(twist::PLACE) { input.u32() % layout.journal_blocks } else { writer.head };
    let open_count = if has(twist::OPEN_COUNT) { input.byte().into() } else { layout.open_count };
    let placed_lsn = if has(twist::PLACED) { input.u64() } else { 0 };
    // Records of several units are longer than these.
    let count = usize::from(input.byte()) % (RECORDS_MAX / 5 + 1);
    let (records, data): (Vec<Record>, Vec<Option<u8>>) =
        std::iter::from_fn(|| (!input.0.is_empty()).then(|| record(layout, input))).take(count).unzip();
    for (record, content) in records.iter().zip(&data) {
        let (&Record::Set { slot, block, data: DataAt::FreshPlace, .. }, Some(content)) = (record, content)
        else {
            continue;
        };
        if slot < layout.slots() && !has(twist::TORN) {
            let offset_bytes = layout.data_offset(slot) + u64::from(block) * BLOCK;
            media.block(offset_bytes, |block| block.fill(*content));
        }
    }
    let data = records.iter().zip(data).filter(|(record, _)| record.is_journaled());
    let data: Vec<u8> = data.filter_map(|(_, content)| content).collect();
    let header = BatchHeader {
        open_count,
        lsn,
        durable_lsn: writer.lsn,
        placed_lsn,
        chain,
        position,
        data_blocks: u16::try_from(data.len()).expect("at most the records"),
        records: u16::try_from(records.len()).expect("at most RECORDS_MAX"),
        rest: has(twist::REST),
    };
    let at = |block: u32| layout.journal_offset(shard) + u64::from(block % layout.journal_blocks) * BLOCK;
    if !has(twist::TORN) {
        for (behind, content) in (position + 1..).zip(&data) {
            media.block(at(behind), |block| block.fill(*content));
        }
    }
    let mut next = Writer { lsn, ..*writer };
    media.block(at(position), |block| {
        next.chain = encode_batch(&header, JournalName { key: KEY, shard }, &records, block);
    });
    next.head = (position + 1 + u32::from(header.data_blocks)) % layout.journal_blocks;
    if !has(twist::OVERWRITTEN) {
        *writer = next;
    }
}

fn write_checkpoint(media: &Media<'_>, shard: u16, writer: &mut Writer, input: &mut Input<'_>) {
    let (layout, twists) = (media.layout, input.byte());
    let has = |twist: u8| twists & twist != 0;
    if has(twist::LSN) {
        writer.lsn = input.u64();
    }
    if has(twist::CHAIN) {
        writer.chain = input.u32();
    }
    if has(twist::PLACE) {
        writer.head = input.u32();
    }
    writer.sequence = if has(twist::SEQUENCE) { input.u64() } else { writer.sequence.wrapping_add(1) };
    let mut table = Vec::new();
    let mut entries = 0;
    for _ in 0..input.below(9) {
        let (object, extent, slot) = (input.below(4).into(), input.below(4).into(), input.slot(layout));
        let (flags, sum) = (input.byte(), Sum(input.byte().into()));
        let mut page = vec![0; BLOCK_BYTES];
        encode_page(&[sum; EXTENT_BLOCKS as usize], &mut page);
        let mut page_crc = crc32c::crc32c(&page);
        if flags >> 2 & 1 == 1 {
            page_crc ^= 1;
        }
        let (which, active, version) = (flags & 1, flags >> 1 & 1 == 1, u64::from(flags >> 4));
        let hollow = flags >> 3 & 1 == 1;
        if slot < layout.slots() {
            media.block(layout.page_offset(slot, which), |block| block.copy_from_slice(&page));
        }
        Entry { object, extent, slot, page_crc, version, which, active, hollow }.encode(&mut table);
        entries += 1;
    }
    let states_at = table.len();
    let states = input.below(4).into();
    for _ in 0..states {
        let state = layer_state(input.below(4).into(), input);
        let at = table.len();
        table.resize(at + state.units() * RECORD_BYTES, 0);
        state.encode(&mut table[at..]);
    }
    let (of_entries, of_states) = table.split_at(states_at);
    let header = CheckpointHeader {
        sequence: writer.sequence,
        lsn: writer.lsn,
        tail: writer.head,
        chain: writer.chain,
        entries: if has(twist::COUNT) { input.u32() } else { entries },
        entries_crc: crc32c::crc32c(of_entries) ^ u32::from(has(twist::CRC)),
        states,
        state_units: u32::try_from(of_states.len() / RECORD_BYTES).expect("a few"),
        states_crc: crc32c::crc32c(of_states),
        ..CheckpointHeader::default()
    };
    // What follows begins somewhere, wherever the checkpoint says that it does.
    writer.head %= layout.journal_blocks;
    let which = usize::from(has(twist::SECOND));
    let begin = layout.checkpoint_offset(shard, which);
    media.block(begin, |block| header.encode(ShardName { store: STORE, shard }, which, block));
    media.block(begin + BLOCK, |block| block[..table.len()].copy_from_slice(&table));
}

/// Changes a byte of a shard's checkpoints or journal, or of the sum pages.
fn patch(media: &Media<'_>, shard: u16, in_pages: bool, input: &mut Input<'_>) {
    let layout = media.layout;
    let (begin, blocks) = if in_pages {
        (layout.page_offset(0, 0), 2 * layout.slots())
    } else {
        (layout.checkpoint_offset(shard, 0), 2 * layout.checkpoint_blocks + layout.journal_blocks)
    };
    let block = u64::from(u32::from(input.u16()) % blocks);
    let (at, mask) = (usize::from(input.u16()) % BLOCK_BYTES, input.byte());
    media.block(begin + block * BLOCK, |block| block[at] ^= mask);
}

fn open(layout: &Superblock, media: &Media<'_>, reached: &mut Reached) {
    let mut images = Vec::new();
    for shard in 0..SHARDS {
        match recovery::read(layout, shard, media) {
            Ok(image) => {
                reached.opened += 1;
                reached.batches += image.findings.batches;
                check(layout, shard, media, &image);
                images.push((shard, image));
            }
            Err(error) => {
                reached.refused += 1;
                let _shown = error.to_string();
                let again: RecoveryError<Infallible> =
                    recovery::read(layout, shard, media).expect_err("an error stays one");
                assert_eq!(format!("{again:?}"), format!("{error:?}"));
            }
        }
    }
    if let Some(free) = recovery::free_slots(layout, images.iter().map(|(_, image)| image)) {
        let taken: usize = images.iter().map(|(_, image)| image.recovered.extents.slots() as usize).sum();
        assert_eq!(free.len() + taken, layout.slots() as usize);
        assert!(free.iter().all(|slot| *slot < layout.slots()) && free.is_sorted());
    }
    for (shard, mut image) in images {
        let mut again = read_again(layout, shard, media);
        place(layout, shard, media, &mut image);
        reached.placed += image.findings.replaced_blocks;
        let blocks = media.blocks.borrow().clone();
        assert_same(&read_again(layout, shard, media), &again);
        place(layout, shard, media, &mut again);
        assert_same(&image, &again);
        assert!(*media.blocks.borrow() == blocks, "data are put in place twice, and differ");
    }
}

fn read_again(layout: &Superblock, shard: u16, media: &Media<'_>) -> Image {
    recovery::read(layout, shard, media).expect("what could be read can be read again")
}

fn place(layout: &Superblock, shard: u16, media: &Media<'_>, image: &mut Image) {
    recovery::place(layout, shard, media, image).expect("the medium does not fail");
    assert_eq!(image.unplaced().len(), 0);
}

fn check(layout: &Superblock, shard: u16, media: &Media<'_>, image: &Image) {
    let again = read_again(layout, shard, media);
    assert_same(image, &again);
    assert_eq!(image.findings.torn_tail, again.findings.torn_tail);
    let journal = recovery::read_journal(layout, shard, media).expect("a part of what could be read");
    assert_eq!(journal.batches.len() as u64, image.findings.batches);
    let state = image.recovered.journal;
    assert!(state.head < layout.journal_blocks && state.tail < layout.journal_blocks);
    assert_eq!(state.lsn, journal.checkpoint.lsn + image.findings.batches);
    let extents = &image.recovered.extents;
    let state_units: usize = extents.states().map(|state| state.units()).sum();
    assert!(state_units <= layout.state_units_max());
    assert_eq!(extents.len() as usize, extents.iter().count());
    for (id, extent) in extents.iter() {
        assert!(extent.live().all(|(_, half)| half.slot < layout.slots()));
        assert!(!extent.hollow || extent.all_sums().all(|sum| sum == Sum::ABSENT));
        if let [Some(one), Some(other)] = &extent.halves {
            let mut pairs = one.sums.iter().zip(other.sums.iter());
            assert!(pairs.all(|(one, other)| [*one, *other].contains(&Sum::ABSENT)));
        }
        assert!(extents.highest_version(extent.object) >= extent.version);
        assert_eq!(extents.find(extent.object, extent.number), Some(id));
    }
    for (slot, block, position, sum) in image.unplaced() {
        assert!(position < layout.journal_blocks);
        let mut halves = extents.iter().flat_map(|(_, extent)| extent.live());
        let (_, owner) = halves.find(|(_, half)| half.slot == slot).expect("data of an extent");
        assert_eq!(owner.sums[usize::from(block)], sum);
    }
}

fn assert_same(one: &Image, other: &Image) {
    // The header of a torn batch goes when data are put in place.
    let findings = |image: &Image| Findings { torn_tail: false, ..image.findings };
    assert_eq!(findings(one), findings(other));
    assert!(one.unplaced().eq(other.unplaced()));
    let (one, others) = (&one.recovered, &other.recovered);
    let other = others;
    assert_eq!(one.journal, other.journal);
    assert!(one.extents.states().eq(other.extents.states()));
    let rest = |recovered: &super::shard::Recovered| {
        let super::shard::Recovered { last_record_lsn, marked_placed_lsn, .. } = *recovered;
        (last_record_lsn, marked_placed_lsn, recovered.checkpoint_sequence, recovered.checkpoint_which)
    };
    assert_eq!(rest(one), rest(other));
    assert_eq!(one.extents.len(), other.extents.len());
    for ((id, extent), (other_id, other)) in one.extents.iter().zip(other.extents.iter()) {
        let of = |extent: &Extent| {
            let Extent { object, number, version, dirty, active, suspect, hollow, .. } = *extent;
            (object, number, version, (dirty, active, suspect, hollow))
        };
        let half_of = |half: &Half| {
            let Half { slot, which, page_crc, allocated_lsn, .. } = *half;
            (slot, which, page_crc, allocated_lsn, half.sums.clone())
        };
        assert_eq!((id, of(extent)), (other_id, of(other)));
        for (half, other) in extent.halves.iter().zip(&other.halves) {
            assert!(half.as_ref().map(half_of) == other.as_ref().map(half_of));
        }
        assert_eq!(one.extents.highest_version(extent.object), others.extents.highest_version(extent.object));
    }
}

// -------------------------------------------------------------------------------------------------------------------
// Seeds

/// A device's events as [`store`] takes them.
struct Script(Vec<u8>);

impl Script {
    fn new(journal: u8, slots: u8, open_count: u8) -> Script {
        Script(vec![kind::DEVICE, journal | (slots - 1) << 2 | open_count << 5])
    }

    /// A batch; its records are one after the other.
    fn batch(mut self, shard: u8, twists: u8, fields: &[u8], records: &[Vec<u8>]) -> Script {
        self.0.extend([event::BATCH << 1 | shard, twists]);
        self.0.extend_from_slice(fields);
        self.0.push(u8::try_from(records.len()).expect("a few"));
        self.0.extend(records.iter().flatten());
        self
    }

    /// A checkpoint; each entry has object, extent, slot, flags and sum.
    fn checkpoint(self, shard: u8, twists: u8, fields: &[u8], entries: &[[u8; 5]]) -> Script {
        self.checkpoint_with(shard, twists, fields, entries, &[])
    }

    /// The same, with states of replicas, each as [`layer_state`] takes it behind its object.
    fn checkpoint_with(
        mut self,
        shard: u8,
        twists: u8,
        fields: &[u8],
        entries: &[[u8; 5]],
        states: &[&[u8]],
    ) -> Script {
        self.0.extend([event::CHECKPOINT << 1 | shard, twists]);
        self.0.extend_from_slice(fields);
        self.0.push(u8::try_from(entries.len()).expect("a few"));
        self.0.extend(entries.iter().flatten());
        self.0.push(u8::try_from(states.len()).expect("a few"));
        self.0.extend(states.iter().copied().flatten());
        self
    }

    fn patch(mut self, shard: u8, in_pages: bool, block: u16, at: u16) -> Script {
        self.0.push(event::PATCH << 1 | shard | u8::from(in_pages) << 3);
        self.0.extend(block.to_le_bytes());
        self.0.extend(at.to_le_bytes());
        self.0.push(0x40);
        self
    }
}

fn set(slot: u8, block: u8, content: u8) -> Vec<u8> {
    vec![8, slot, block, 0, content, 1]
}

fn set_fresh(slot: u8, block: u8, content: u8) -> Vec<u8> {
    vec![64, slot, block, 0, content, 1]
}

fn set_in_place(slot: u8, block: u8, content: u8) -> Vec<u8> {
    vec![0, slot, block, 0, content, 1]
}

fn persist(slot: u8, object: u8, takeover: u8) -> Vec<u8> {
    vec![0x24, slot, object, takeover, 1, 2, 2, 3, 4, 5, 6]
}

fn allocate(slot: u8, object: u8, extent: u8) -> Vec<u8> {
    vec![2, slot, object, extent]
}

/// Structures as they are written, and devices of every kind, for [`store`] to begin with.
///
/// # Panics
/// Never: all of them can be written.
#[must_use]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let cut = |kind: u8, bytes: &[u8]| {
        let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        [&[kind], &bytes[..used]].concat()
    };
    let (cluster, node) = (ClusterId([1; 16]), NodeId([2; 16]));
    let layout = Superblock::new(cluster, node, STORE, KEY, DEVICE_BYTES_MIN, Shape::default());
    let layout = layout.expect("room for it");
    let grown = layout.grown(4 * DEVICE_BYTES_MIN).expect("room for more");
    let mut catalog = Catalog::default();
    for number in 0..3 {
        catalog.add(VolumeId([number; 16]), 8 << number, SHARDS).expect("room for it");
    }
    let mut checkpoint = vec![0; BLOCK_BYTES];
    let header = CheckpointHeader { sequence: 2, lsn: 3, tail: 4, ..CheckpointHeader::default() };
    header.encode(ShardName { store: STORE, shard: 0 }, 0, &mut checkpoint);
    let mut entry = Vec::new();
    Entry { object: 1, extent: 2, slot: 3, page_crc: 4, version: 5, which: 1, active: true, hollow: false }
        .encode(&mut entry);
    let of_page: Vec<u8> = [Sum::ABSENT, Sum::ZERO, Sum::LOST, Sum::of(b"data")]
        .iter()
        .flat_map(|sum| sum.0.to_le_bytes())
        .collect();
    let of_layer = layer_state(2, &mut Input(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]));
    let mut state = vec![0; of_layer.units() * RECORD_BYTES];
    of_layer.encode(&mut state);
    let mut batch = vec![0; BLOCK_BYTES];
    let (slot, version) = (1, 7);
    let sum = Sum::of(b"data");
    let records = [
        Record::Allocate { slot, object: 2, extent: 3 },
        Record::Set { slot, block: 4, sum, before: Sum::ABSENT, version, data: DataAt::Journal },
        Record::Set { slot, block: 5, sum, before: Sum::ABSENT, version, data: DataAt::FreshPlace },
        Record::Clear { slot, block: 8, count: 9, state: Sum::ZERO, version, hollow: false },
        Record::Activate { slot },
        Record::Clear { slot, block: 0, count: 1024, state: Sum::ABSENT, version, hollow: true },
        Record::Persist(of_layer.clone()),
        Record::Keep { slot },
        Record::Deactivate { slot },
        Record::Free { slot, object: 2, extent: 3, goes_on: false, version },
        Record::Forget { object: 2 },
    ];
    let header = BatchHeader { lsn: 1, data_blocks: 1, records: 11, ..BatchHeader::default() };
    encode_batch(&header, JournalName { key: KEY, shard: 0 }, &records, &mut batch);

    let written = |journal: u8| {
        let first = [allocate(0, 1, 0), set(0, 5, 0xa1), set(0, 6, 0xa2)];
        Script::new(journal, 4, 2).batch(0, 0, &[], &first).batch(
            1,
            0,
            &[],
            &[allocate(1, 2, 0), set(1, 0, 7)],
        )
    };
    let last_lsn = u64::MAX.to_le_bytes();
    let devices = [
        ("device-fresh", Script::new(0, 1, 0)),
        ("device-written", written(1).batch(0, 0, &[], &[set(0, 5, 0xa3)]).batch(0, twist::REST, &[], &[])),
        ("device-torn", written(1).batch(0, twist::TORN, &[], &[set(0, 7, 0xa4), set(0, 8, 0xa5)])),
        (
            "device-around",
            written(0).checkpoint(0, twist::SECOND, &[], &[[1, 0, 0, 0, 9]]).batch(
                0,
                0,
                &[],
                &[set(0, 1, 1), set(0, 2, 2), set(0, 3, 3), set(0, 4, 4), set(0, 1, 5)],
            ),
        ),
        (
            "device-hands",
            written(2)
                .batch(0, 0, &[], &[vec![4, 0, 1, 0, 9]])
                .batch(1, 0, &[], &[allocate(0, 2, 1), set(0, 5, 0xb1)])
                .batch(0, 0, &[], &[allocate(2, 1, 0), set(2, 5, 0xb2)]),
        ),
        (
            "device-placed",
            written(2).batch(0, twist::PLACED, &1_u64.to_le_bytes(), &[set(0, 5, 0xa6)]).batch(
                0,
                0,
                &[],
                &[vec![6, 0], set_in_place(0, 9, 1), vec![5, 0, 4, 0, 2, 0, 1, 3]],
            ),
        ),
        (
            "device-replicas",
            written(2)
                .batch(0, 0, &[], &[persist(0, 1, 4), persist(1, 1, 5)])
                .batch(0, 0, &[], &[persist(0, 1, 6), vec![0x22, 0, 1, 9]])
                .batch(1, 0, &[], &[persist(1, 2, 7), vec![0x20, 1, 2]])
                .batch(0, 0, &[], &[vec![0x21, 0, 1]]),
        ),
        (
            "device-kept-replicas",
            Script::new(3, 8, 1)
                .checkpoint_with(
                    0,
                    twist::SECOND,
                    &[],
                    &[[1, 0, 0, 10, 0]],
                    &[&[1, 4, 5, 6, 1, 9, 7, 30], &[2, 5, 5, 6, 0, 7, 40]],
                )
                .batch(0, 0, &[], &[vec![4, 0, 1, 0, 50], persist(0, 2, 8)]),
        ),
        (
            "device-replica-twice",
            Script::new(3, 8, 1).checkpoint_with(
                0,
                twist::SECOND,
                &[],
                &[],
                &[&[1, 4, 5, 6, 0, 7, 30], &[1, 5, 5, 6, 0, 7, 40]],
            ),
        ),
        ("device-hollow-data", written(2).checkpoint(0, twist::SECOND, &[], &[[1, 0, 0, 8, 9]])),
        ("device-gap", written(2).batch(0, 0, &[], &[set(0, 5, 1)]).patch(0, false, 20, 100)),
        (
            "device-twins",
            written(2)
                .batch(0, 0, &[], &[allocate(3, 1, 0), set_fresh(3, 5, 0xc1), set(0, 7, 0xc2)])
                .checkpoint(1, twist::SECOND, &[], &[[2, 0, 1, 0, 0], [2, 0, 2, 0, 0]])
                .batch(0, 0, &[], &[set_fresh(3, 6, 0xc3), set_fresh(3, 7, 0xc4), vec![12, 0, 1, 0, 9]])
                .batch(0, 0, &[], &[vec![6, 3], set_fresh(3, 8, 0xc5)]),
        ),
        (
            "device-torn-fresh",
            written(2).batch(0, twist::TORN, &[], &[allocate(3, 1, 0), set_fresh(3, 5, 0xc1)]),
        ),
        ("device-twice", written(2).checkpoint(0, twist::SECOND, &[], &[[1, 0, 0, 0, 9], [1, 0, 3, 0, 9]])),
        ("device-contradiction", written(2).batch(0, 0, &[], &[allocate(2, 1, 0), allocate(3, 1, 0)])),
        ("device-two-owners", written(2).batch(1, 0, &[], &[allocate(0, 2, 2)])),
        ("device-beyond", written(2).batch(0, 0, &[], &[allocate(254, 3, 3)])),
        (
            "device-entries",
            Script::new(3, 8, 1)
                .checkpoint(0, twist::SECOND, &[], &[[1, 0, 0, 0, 0], [1, 1, 2, 3, 1], [2, 0, 7, 4, 9]])
                .checkpoint(1, twist::SECOND, &[], &[[3, 0, 1, 2, 9]])
                .batch(0, 0, &[], &[set(2, 3, 4), vec![7, 2]])
                .patch(0, true, 14, 8),
        ),
        (
            "device-older-checkpoint",
            written(1)
                .checkpoint(0, twist::SECOND, &[], &[[1, 0, 0, 0, 9]])
                .batch(0, 0, &[], &[set(0, 1, 1)])
                .patch(0, false, 10, 48),
        ),
        (
            "device-strange-checkpoint",
            Script::new(0, 2, 1).checkpoint(0, twist::SECOND | twist::COUNT, &[], &[]).checkpoint(
                1,
                twist::SECOND | twist::PLACE,
                &[0xff; 4],
                &[],
            ),
        ),
        (
            "device-last-number",
            Script::new(0, 2, 1).checkpoint(0, twist::SECOND | twist::LSN, &last_lsn, &[]),
        ),
        (
            "device-strange-batches",
            written(1)
                .batch(0, twist::LSN | twist::OVERWRITTEN, &9_u64.to_le_bytes(), &[])
                .batch(1, twist::CHAIN | twist::OPEN_COUNT, &[1, 2, 3, 4, 9], &[set(1, 1, 1)])
                .batch(1, twist::PLACE, &3_u32.to_le_bytes(), &[set(1, 2, 1)]),
        ),
    ];
    let structures = vec![
        ("superblock", cut(kind::SUPERBLOCK, &layout.encode())),
        ("superblock-grown", cut(kind::SUPERBLOCK, &grown.encode())),
        ("catalog", cut(kind::CATALOG, &catalog.encode(STORE, 5))),
        ("checkpoint", cut(kind::CHECKPOINT, &checkpoint)),
        ("entry", [&[kind::ENTRY], &entry[..]].concat()),
        ("page", cut(kind::PAGE, &of_page)),
        ("batch", cut(kind::BATCH, &batch)),
        ("state", [&[kind::STATE], &state[..]].concat()),
    ];
    structures.into_iter().chain(devices.map(|(name, script)| (name, script.0))).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// SplitMix64: the same numbers in every run.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }

        fn below(&mut self, bound: usize) -> usize {
            usize::try_from(self.next() % bound as u64).unwrap()
        }

        fn byte(&mut self) -> u8 {
            self.next().to_le_bytes()[0]
        }
    }

    fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
        for _ in 0..1 + random.below(4) {
            let at = random.below(bytes.len().max(1));
            match random.below(8) {
                0 if !bytes.is_empty() => bytes[at] = random.byte(),
                1 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
                2 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
                3 if !bytes.is_empty() => drop(bytes.remove(at)),
                4 if !bytes.is_empty() => bytes.insert(at, random.byte()),
                5 => bytes.truncate(at),
                // Another device's events behind those before.
                6 | 7 => bytes.extend_from_slice(&other[other.len().min(2)..]),
                _ => {}
            }
        }
    }

    #[test]
    fn no_bytes_on_a_device_make_a_reader_panic_or_two_readers_differ() {
        let seeds = seeds();
        let mut random = Random(82);
        let mut seen = Reached::default();
        for given in 0..20_000 {
            let mut bytes = seeds[given % seeds.len()].1.clone();
            mutate(&mut bytes, &seeds[random.below(seeds.len())].1, &mut random);
            let reached = store(&bytes);
            seen.decoded += reached.decoded;
            seen.opened += reached.opened;
            seen.refused += reached.refused;
            seen.batches += reached.batches;
            seen.placed += reached.placed;
        }
        let enough = seen.decoded > 2000
            && seen.opened > 10_000
            && seen.refused > 1000
            && seen.batches > 10_000
            && seen.placed > 5000;
        assert!(enough, "most devices stop at the door: {seen:?}");
    }

    #[test]
    fn the_corpus_holds_every_kind_of_device() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/store");
        for (name, bytes) in seeds() {
            assert_eq!(std::fs::read(folder.join(name)).ok(), Some(bytes), "fuzz/corpus/store lacks {name}");
        }
    }

    /// Each seed must come as far as it is meant to, or fuzzing begins at the door.
    #[test]
    fn seeds_get_past_the_door() {
        for (name, bytes) in seeds() {
            let reached = store(&bytes);
            let refused = match name {
                "device-gap"
                | "device-contradiction"
                | "device-beyond"
                | "device-hollow-data"
                | "device-twice" => 1,
                "device-strange-batches" => 2,
                _ => 0,
            };
            assert_eq!(reached.refused, refused, "{name}");
            if name.starts_with("device-") {
                assert_eq!(reached.opened, u64::from(SHARDS) - refused, "{name}");
            } else {
                assert!(reached.decoded > 0, "{name}");
            }
        }
    }
}
