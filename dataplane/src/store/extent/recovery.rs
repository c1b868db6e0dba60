//! Opening one shard: the newest checkpoint, the journal behind it, and the data that were not known to be in place.
//!
//! Invariants (I10, I13):
//! * Every record of a batch that was acknowledged is applied, in order. Where that cannot be, the shard is *damaged* and is
//!   not opened: never is a part of the journal taken for the whole.
//! * A torn tail and damage differ: one batch is in flight at a time, so whatever follows a bad batch proves that it had been
//!   whole.
//! * Nothing makes a checksum from what it finds. A sum page that does not verify makes its extent's blocks *lost*; data in the
//!   journal that do not verify make their block lost.
//! * The last batch counts only if the data that came with it verify, in the journal and in their place. If they do not, its header is
//!   overwritten before anything else is written, so that nothing written later makes it whole.
//! * The cost is bounded by checkpoint and journal, and one batch's data, never by the data.
//!
//! Reading does not write; [`place`] does, and doing it twice gives the same.

use std::collections::BTreeMap;

use torus_replication::mutants::{self, Mutant};

use super::extents::{Extent, ExtentId, Extents, FoldMap, FreeSlot, Half};
use super::format::{
    BATCH_BLOCKS_MAX, BLOCK, BatchHeader, CheckpointHeader, DataAt, ENTRY_BYTES, EXTENT_BLOCKS, Entry,
    FormatError, JournalName, LayerState, RECORD_BYTES, Record, ShardName, Sum, Superblock, decode_batch,
    decode_page,
};
use super::shard::{JournalState, Recovered, ScrubProgress};
use crate::device::AlignedBuffer;
use crate::store::BLOCK_BYTES;

/// Where a store's bytes are, for opening it: a device, or a simulated one.
pub trait Medium {
    /// Why it failed.
    type Error;

    /// Fills `bytes` from byte `offset_bytes` on. Both are multiples of 4096, and so is the address.
    ///
    /// # Errors
    /// When not all of it can be read.
    fn read_at(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Self::Error>;

    /// Writes `bytes` from byte `offset_bytes` on, durable after the next sync.
    ///
    /// # Errors
    /// When not all of it can be written.
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Makes everything written durable.
    ///
    /// # Errors
    /// When the device says so: nothing is known to be durable then.
    fn sync(&self) -> Result<(), Self::Error>;
}

/// Why a shard cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError<E> {
    /// The device could not be read or written.
    #[error("{0}")]
    Medium(E),
    /// Neither checkpoint is whole.
    #[error("shard {shard}: both checkpoints are unreadable ({source})")]
    NoCheckpoint {
        /// The shard.
        shard: u16,
        /// What is wrong with the better one.
        source: FormatError,
    },
    /// Something that was durable is gone from the journal.
    #[error(
        "shard {shard}: the journal is damaged at block {position}: batch {lsn} is unreadable and batch {later_lsn} behind it is not"
    )]
    JournalDamaged {
        /// The shard.
        shard: u16,
        /// Where in the journal.
        position: u32,
        /// The batch that should be there.
        lsn: u64,
        /// The one that proves that it was.
        later_lsn: u64,
    },
    /// The records contradict each other.
    #[error("shard {shard}: its records contradict each other: {what}")]
    Contradiction {
        /// The shard.
        shard: u16,
        /// How.
        what: &'static str,
    },
}

/// What opening a shard has found that is worth telling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Findings {
    /// Batches behind the checkpoint.
    pub batches: u64,
    /// Records in them.
    pub records: u64,
    /// A batch was under way and is not whole; it had not been acknowledged.
    pub torn_tail: bool,
    /// Blocks that had to be put in place.
    pub replaced_blocks: u64,
    /// Blocks that have no good copy here.
    pub lost_blocks: u64,
    /// Regions to be verified.
    pub suspect_regions: u32,
}

impl Findings {
    /// Those of two shards together.
    #[must_use]
    pub fn and(self, other: Findings) -> Findings {
        Findings {
            batches: self.batches + other.batches,
            records: self.records + other.records,
            torn_tail: self.torn_tail || other.torn_tail,
            replaced_blocks: self.replaced_blocks + other.replaced_blocks,
            lost_blocks: self.lost_blocks + other.lost_blocks,
            suspect_regions: self.suspect_regions + other.suspect_regions,
        }
    }
}

/// A batch that was found.
#[derive(Debug)]
pub struct Found {
    /// Its header.
    pub header: BatchHeader,
    /// What it says.
    pub records: Vec<Record>,
}

/// What a shard's journal says, as it is.
#[derive(Debug)]
pub struct Journal {
    /// The newest checkpoint that is whole.
    pub checkpoint: CheckpointHeader,
    /// Which of the two it is.
    pub which: usize,
    /// The batches behind it.
    pub batches: Vec<Found>,
    /// A batch that is not whole follows.
    pub torn_tail: bool,
}

/// What a shard's metadata say.
#[derive(Debug)]
pub struct Image {
    /// What the shard goes on from.
    pub recovered: Recovered,
    /// What was found.
    pub findings: Findings,
    /// Blocks whose newest data are in the journal and not known to be in place: slot and block, journal block, sum.
    unplaced: BTreeMap<(u32, u16), (u32, Sum)>,
}

impl Image {
    /// Blocks whose newest data are in the journal and not known to be in place, by slot and block: the journal's block that
    /// has them, and their sum.
    pub fn unplaced(&self) -> impl ExactSizeIterator<Item = (u32, u16, u32, Sum)> {
        self.unplaced.iter().map(|((slot, block), (position, sum))| (*slot, *block, *position, *sum))
    }

    /// Whether a block's newest data are among [`Image::unplaced`].
    #[must_use]
    pub fn is_unplaced(&self, slot: u32, block: u16) -> bool {
        self.unplaced.contains_key(&(slot, block))
    }
}

/// Blocks read from the journal in one go.
const WINDOW_BLOCKS: u32 = 64;
/// Sum pages read in one go, where many are wanted.
const PAGES_SPAN: u32 = 256;
/// Slots between two wanted ones that are read along: those of other shards mostly, and each of them would be read by every shard.
const SLOTS_BETWEEN: u64 = 3;

/// A batch's header, its checksum, and its records.
type Decoded = (BatchHeader, u32, Vec<Record>);

/// What a checkpoint has behind its header.
#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    states: Vec<LayerState>,
}

/// Whole batches; whether a torn one follows; where the next one goes, and the checksum that it repeats.
type Behind = (Vec<Found>, bool, (u32, u32));

struct Reader<'m, M> {
    layout: &'m Superblock,
    shard: u16,
    medium: &'m M,
    window: AlignedBuffer,
    /// First block in the window; `u32::MAX` when it has nothing.
    window_at: u32,
}

/// Reads a shard's metadata. Writes nothing.
///
/// # Errors
/// [`RecoveryError`].
pub fn read<M: Medium>(
    layout: &Superblock,
    shard: u16,
    medium: &M,
) -> Result<Image, RecoveryError<M::Error>> {
    let mut reader = Reader::new(layout, shard, medium);
    let (checkpoint, which, table) = reader.read_checkpoint()?;
    let (found, torn_tail, head) = reader.read_journal(&checkpoint)?;
    reader.replay(&checkpoint, which, table, &found, torn_tail, head)
}

/// Reads a shard's journal, and nothing that it is about.
///
/// # Errors
/// [`RecoveryError`].
pub fn read_journal<M: Medium>(
    layout: &Superblock,
    shard: u16,
    medium: &M,
) -> Result<Journal, RecoveryError<M::Error>> {
    let mut reader = Reader::new(layout, shard, medium);
    let (checkpoint, which, _) = reader.read_checkpoint()?;
    let (batches, torn_tail, _) = reader.read_journal(&checkpoint)?;
    Ok(Journal { checkpoint, which, batches, torn_tail })
}

/// Puts in place what is only in the journal, and ends what is left of a last batch that does not count. The caller syncs before
/// anybody relies on it, and writes nothing before.
///
/// # Errors
/// [`RecoveryError::Medium`].
pub fn place<M: Medium>(
    layout: &Superblock,
    shard: u16,
    medium: &M,
    image: &mut Image,
) -> Result<(), RecoveryError<M::Error>> {
    let mut buffer = AlignedBuffer::new(BLOCK_BYTES);
    let begin = layout.journal_offset(shard);
    if image.findings.torn_tail && !mutants::is(Mutant::TornHeaderKept) {
        let head = u64::from(image.recovered.journal.head);
        medium.write_at(begin + head * BLOCK, buffer.bytes()).map_err(RecoveryError::Medium)?;
        medium.sync().map_err(RecoveryError::Medium)?;
    }
    let mut by_slot: FoldMap<u32, super::extents::ExtentId> = FoldMap::default();
    for (id, extent) in image.recovered.extents.iter() {
        by_slot.extend(extent.live().map(|(_, half)| (half.slot, id)));
    }
    for ((slot, block), (position, sum)) in std::mem::take(&mut image.unplaced) {
        medium
            .read_at(begin + u64::from(position) * BLOCK, buffer.bytes_mut())
            .map_err(RecoveryError::Medium)?;
        if Sum::of(buffer.bytes()) == sum {
            let offset_bytes = layout.data_offset(slot) + u64::from(block) * BLOCK;
            medium.write_at(offset_bytes, buffer.bytes()).map_err(RecoveryError::Medium)?;
            image.findings.replaced_blocks += 1;
        } else if let Some(id) = by_slot.get(&slot) {
            let extent = image.recovered.extents.get_mut(*id);
            extent.set(extent.half_of(block), block, Sum::LOST);
            extent.dirty = true;
            image.findings.lost_blocks += 1;
        }
    }
    Ok(())
}

impl<'m, M: Medium> Reader<'m, M> {
    fn new(layout: &'m Superblock, shard: u16, medium: &'m M) -> Reader<'m, M> {
        let window = AlignedBuffer::new(WINDOW_BLOCKS as usize * BLOCK_BYTES);
        Reader { layout, shard, medium, window, window_at: u32::MAX }
    }

    fn name(&self) -> ShardName {
        ShardName { store: self.layout.store, shard: self.shard }
    }

    fn read_bytes(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), RecoveryError<M::Error>> {
        self.medium.read_at(offset_bytes, bytes).map_err(RecoveryError::Medium)
    }

    /// The newest checkpoint that is whole.
    fn read_checkpoint(&self) -> Result<(CheckpointHeader, usize, Table), RecoveryError<M::Error>> {
        let mut headers = Vec::new();
        let mut why = FormatError::Magic;
        for which in 0..2 {
            let mut block = AlignedBuffer::new(BLOCK_BYTES);
            self.read_bytes(self.layout.checkpoint_offset(self.shard, which), block.bytes_mut())?;
            match CheckpointHeader::decode(block.bytes(), self.name(), which) {
                Ok(header) => headers.push((header, which)),
                Err(error) if why == FormatError::Magic => why = error,
                Err(_) => {}
            }
        }
        headers.sort_unstable_by_key(|(header, _)| std::cmp::Reverse(header.sequence));
        for (header, which) in headers {
            match self.read_table(&header, which)? {
                Ok(table) => return Ok((header, which, table)),
                Err(error) => why = error,
            }
        }
        Err(RecoveryError::NoCheckpoint { shard: self.shard, source: why })
    }

    fn read_table(
        &self,
        header: &CheckpointHeader,
        which: usize,
    ) -> Result<Result<Table, FormatError>, RecoveryError<M::Error>> {
        if header.entries > self.layout.entries_max()
            || header.state_units as usize > self.layout.state_units_max()
            || header.tail >= self.layout.journal_blocks
        {
            return Ok(Err(FormatError::Length));
        }
        let entries_end = header.entries as usize * ENTRY_BYTES;
        let end = entries_end + header.state_units as usize * RECORD_BYTES;
        let mut table = AlignedBuffer::new(end.next_multiple_of(BLOCK_BYTES));
        let offset_bytes = self.layout.checkpoint_offset(self.shard, which) + BLOCK;
        if end > 0 {
            self.read_bytes(offset_bytes, table.bytes_mut())?;
        }
        let (entries, states) = table.bytes()[..end].split_at(entries_end);
        if crc32c::crc32c(entries) != header.entries_crc || crc32c::crc32c(states) != header.states_crc {
            return Ok(Err(FormatError::Checksum));
        }
        let entries: Result<Vec<Entry>, FormatError> =
            entries.chunks_exact(ENTRY_BYTES).map(Entry::decode).collect();
        let slots = self.layout.slots();
        Ok(entries.and_then(|entries| {
            let sane = entries.iter().all(|entry| entry.slot < slots);
            let states = decode_states(states, header.states)?;
            if sane { Ok(Table { entries, states }) } else { Err(FormatError::Length) }
        }))
    }

    /// The batch at a place of the journal, if a whole header is there.
    fn batch_at(&mut self, position: u32) -> Result<Option<Decoded>, RecoveryError<M::Error>> {
        let in_window = position.checked_sub(self.window_at).filter(|at| *at < WINDOW_BLOCKS);
        let at = match in_window {
            Some(at) => at,
            None => {
                let len = WINDOW_BLOCKS.min(self.layout.journal_blocks - position) as usize * BLOCK_BYTES;
                let offset_bytes = self.layout.journal_offset(self.shard) + u64::from(position) * BLOCK;
                self.medium
                    .read_at(offset_bytes, &mut self.window.bytes_mut()[..len])
                    .map_err(RecoveryError::Medium)?;
                // What lies behind the journal's end is left from before and never looked at: positions end there.
                self.window_at = position;
                0
            }
        };
        let block = &self.window.bytes()[at as usize * BLOCK_BYTES..][..BLOCK_BYTES];
        let name = JournalName { key: self.layout.journal_key, shard: self.shard };
        Ok(decode_batch(block, name, position).ok())
    }

    /// All batches behind the checkpoint, whether a torn one follows, and where the next one goes.
    fn read_journal(&mut self, checkpoint: &CheckpointHeader) -> Result<Behind, RecoveryError<M::Error>> {
        let blocks = self.layout.journal_blocks;
        let mut found: Vec<Found> = Vec::new();
        let (mut position, mut chain, mut open_count) = (checkpoint.tail, checkpoint.chain, 0);
        let mut chains = vec![chain];
        let mut used = 0;
        loop {
            let lsn = checkpoint.lsn + 1 + found.len() as u64;
            let next = self.batch_at(position)?;
            let next = next.filter(|(header, _, _)| {
                header.lsn == lsn
                    && header.chain == chain
                    && header.open_count >= open_count
                    && header.open_count <= self.layout.open_count
            });
            let len = next.as_ref().map_or(1, |(header, _, _)| 1 + u32::from(header.data_blocks));
            // The writer leaves a block free. Where the next batch does not, a newer checkpoint had let the tail move, and is lost.
            if let Some((header, _, _)) = next.as_ref().filter(|_| used + len >= blocks) {
                let (shard, later_lsn) = (self.shard, header.lsn);
                return Err(RecoveryError::JournalDamaged { shard, position, lsn, later_lsn });
            }
            let Some((header, checksum, records)) = next else {
                self.refuse_damage(position, lsn)?;
                break;
            };
            used += len;
            (chain, open_count) = (checksum, header.open_count);
            chains.push(chain);
            position = (position + len) % blocks;
            found.push(Found { header, records });
        }
        let torn_header = false;
        let Some(last) = found.last() else { return Ok((found, torn_header, (position, chain))) };
        if self.data_are_whole(last)? {
            return Ok((found, torn_header, (position, chain)));
        }
        let lsn = last.header.lsn;
        position = last.header.position;
        self.refuse_damage(position, lsn)?;
        found.pop();
        Ok((found, true, (position, chains[chains.len() - 2])))
    }

    /// Whether a later batch proves that the one at `position`, which cannot be read, had been durable.
    fn refuse_damage(&mut self, position: u32, lsn: u64) -> Result<(), RecoveryError<M::Error>> {
        let blocks = self.layout.journal_blocks;
        // Behind the data of a batch that reaches over this place may be what is left of another one: two lengths, then a header.
        let longest = 2 * u32::try_from(BATCH_BLOCKS_MAX + 1).expect("a few blocks");
        for distance in 0..=longest.min(blocks - 1) {
            let Some((header, _, _)) = self.batch_at((position + distance) % blocks)? else { continue };
            if header.lsn > lsn {
                return Err(RecoveryError::JournalDamaged {
                    shard: self.shard,
                    position,
                    lsn,
                    later_lsn: header.lsn,
                });
            }
        }
        Ok(())
    }

    /// Whether the data of a batch are what its records say.
    fn data_are_whole(&self, batch: &Found) -> Result<bool, RecoveryError<M::Error>> {
        let mut block = AlignedBuffer::new(BLOCK_BYTES);
        if batch.records.iter().any(|record| record.slot().is_some_and(|slot| slot >= self.layout.slots())) {
            // It contradicts the store, whole or not.
            return Ok(true);
        }
        for (at, record) in (1..).zip(batch.records.iter().filter(|record| record.is_journaled())) {
            let Record::Set { sum, .. } = record else { continue };
            let position = (batch.header.position + at) % self.layout.journal_blocks;
            let offset_bytes = self.layout.journal_offset(self.shard) + u64::from(position) * BLOCK;
            self.read_bytes(offset_bytes, block.bytes_mut())?;
            if Sum::of(block.bytes()) != *sum {
                return Ok(false);
            }
        }
        Ok(mutants::is(Mutant::FreshDataUnread) || self.fresh_data_are_whole(&batch.records)?)
    }

    /// Whether what a batch says of data that went beside it is true.
    fn fresh_data_are_whole(&self, records: &[Record]) -> Result<bool, RecoveryError<M::Error>> {
        let mut fresh: Vec<(u32, u16, Sum)> = Vec::new();
        for record in records {
            if let Record::Set { slot, block, sum, data: DataAt::FreshPlace, .. } = *record {
                fresh.push((slot, block, sum));
            }
        }
        fresh.sort_unstable_by_key(|(slot, block, _)| (*slot, *block));
        let mut buffer =
            AlignedBuffer::new(if fresh.is_empty() { 0 } else { WINDOW_BLOCKS as usize * BLOCK_BYTES });
        let mut rest = fresh.as_slice();
        while let Some(&(slot, first, _)) = rest.first() {
            let is_next =
                |(next, (other, block, _)): &(u16, &(u32, u16, Sum))| *other == slot && block == next;
            let len = (first..).zip(rest).take(WINDOW_BLOCKS as usize).take_while(is_next).count();
            let (run, behind) = rest.split_at(len);
            rest = behind;
            let bytes = &mut buffer.bytes_mut()[..len * BLOCK_BYTES];
            self.read_bytes(self.layout.data_offset(slot) + u64::from(first) * BLOCK, bytes)?;
            let mut pairs = run.iter().zip(bytes.chunks_exact(BLOCK_BYTES));
            if pairs.any(|((_, _, sum), bytes)| Sum::of(bytes) != *sum) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn replay(
        &self,
        checkpoint: &CheckpointHeader,
        which: usize,
        table: Table,
        found: &[Found],
        torn_tail: bool,
        (head, chain): (u32, u32),
    ) -> Result<Image, RecoveryError<M::Error>> {
        let contradiction = |what| RecoveryError::Contradiction { shard: self.shard, what };
        let slots = self.layout.slots();
        let all = || found.iter().flat_map(|batch| batch.records.iter().map(move |record| (batch, record)));
        if all().any(|(_, record)| record.slot().is_some_and(|slot| slot >= slots)) {
            return Err(contradiction("a record names a slot that the store does not have"));
        }
        let mut hands = Hands::default();
        let mut owners: FoldMap<u32, (u32, u32, u64)> = FoldMap::default();
        for (batch, record) in all() {
            hands.note(record);
            match *record {
                Record::Free { slot, .. } => {
                    owners.remove(&slot);
                }
                Record::Allocate { slot, object, extent } => {
                    owners.insert(slot, (object, extent, batch.header.lsn));
                }
                _ => {}
            }
        }
        let mut extents = Extents::new(slots);
        let mut by_slot: FoldMap<u32, (ExtentId, u8)> = FoldMap::default();
        let mut unreadable: Vec<(ExtentId, u8)> = Vec::new();
        let mut lost_blocks = 0;
        let (left, kept): (Vec<Entry>, Vec<Entry>) =
            table.entries.into_iter().partition(|entry| hands.has(entry.slot));
        let pages = self.read_pages(&kept)?;
        for (entry, page) in kept.iter().zip(pages) {
            let is_whole = page.is_some();
            let sums = page.unwrap_or_else(super::extents::fresh_page);
            let free = FreeSlot { slot: entry.slot, sums };
            let Some((id, at)) = give(&mut extents, (entry.object, entry.extent), free, 0) else {
                return Err(contradiction("an extent has three slots"));
            };
            let extent = extents.wrote(id, entry.version);
            let half = extent.half_mut(at);
            (half.which, half.page_crc) = (entry.which, entry.page_crc);
            let is_first = extent.live().count() == 1;
            extent.active |= entry.active;
            extent.hollow = entry.hollow && (is_first || extent.hollow);
            extent.dirty |= !is_whole;
            // Of a hollow one it is known what its page said.
            if !is_whole && !entry.hollow {
                unreadable.push((id, at));
            }
            if by_slot.insert(entry.slot, (id, at)).is_some() {
                return Err(contradiction("a slot has two extents"));
            }
        }
        for (id, at) in unreadable {
            // What lies in the other slot does not lie here.
            let extent = extents.get_mut(id);
            for block in 0..u16::try_from(EXTENT_BLOCKS).expect("1024") {
                if extent.sum(block) == Sum::ABSENT {
                    extent.half_mut(at).sums[usize::from(block)] = Sum::LOST;
                    lost_blocks += 1;
                }
            }
        }
        let mut fresh: Vec<(&u32, &(u32, u32, u64))> = owners.iter().collect();
        fresh.sort_unstable();
        for (slot, (object, number, lsn)) in fresh {
            let Some((id, at)) = give(&mut extents, (*object, *number), FreeSlot::new(*slot), *lsn) else {
                return Err(contradiction("an extent has three slots"));
            };
            extents.get_mut(id).dirty = true;
            by_slot.insert(*slot, (id, at));
        }
        // What is said of an extent as a whole is true of it in its other slot too.
        for entry in left.iter().filter(|entry| hands.lives((entry.object, entry.extent))) {
            let Some(id) = extents.find(entry.object, entry.extent) else { continue };
            let extent = extents.wrote(id, entry.version);
            extent.active |= entry.active;
            if extent.live().all(|(_, half)| hands.has(half.slot)) {
                extent.hollow = entry.hollow;
            }
        }

        for state in table.states {
            extents.persisted(state);
        }
        let placed_lsn =
            found.last().map_or(checkpoint.lsn, |batch| batch.header.placed_lsn.max(checkpoint.lsn));
        let mut unplaced = BTreeMap::new();
        let mut last_record_lsn = 0;
        let mut records = 0;
        for batch in found {
            let lsn = batch.header.lsn;
            let mut data = 0;
            for record in &batch.records {
                records += 1;
                last_record_lsn = lsn;
                data += u32::from(record.is_journaled());
                let Some(slot) = record.slot() else {
                    match record {
                        Record::Persist(state) => extents.persisted(state.clone()),
                        Record::Forget { object } => extents.forgotten(*object),
                        _ => unreachable!("all others concern a slot"),
                    }
                    continue;
                };
                if let Record::Free { object, version, .. } = *record {
                    extents.raise(object, version);
                }
                // Of the slot's last extent, or of one that has it no more and goes on in another.
                let (half, former) = match hands.pass(record) {
                    Holder::Last => (by_slot.get(&slot).copied(), None),
                    Holder::Former(key) => (None, extents.find(key.0, key.1)),
                    Holder::Gone => continue,
                };
                let Some(id) = half.map(|(id, _)| id).or(former) else { continue };
                match *record {
                    Record::Set { block, sum, version, data: data_at, .. } => {
                        let extent = extents.wrote(id, version);
                        extent.dirty = true;
                        forget_unplaced(&mut unplaced, extent, block..block + 1);
                        match half {
                            Some((_, at)) => extent.set(at, block, sum),
                            // A later record says what has become of it.
                            None if mutants::is(Mutant::FormerSlotIgnored) => {}
                            None => extent.take_away(block, 1),
                        }
                        let position = (batch.header.position + data) % self.layout.journal_blocks;
                        if half.is_some() && data_at == DataAt::Journal && lsn > placed_lsn {
                            unplaced.insert((slot, block), (position, sum));
                        }
                    }
                    Record::Clear { block, count, state, version, hollow, .. } => {
                        let extent = extents.wrote(id, version);
                        extent.dirty = true;
                        forget_unplaced(&mut unplaced, extent, block..block + count);
                        match half {
                            Some((_, at)) => extent.cleared(at, block, count, state, hollow),
                            None => {
                                let ignored = mutants::is(Mutant::FormerSlotIgnored);
                                extent.take_away(block, if ignored { 0 } else { count });
                                extent.hollow = hollow || extent.hollow && state == Sum::ABSENT;
                            }
                        }
                    }
                    Record::Keep { .. } => extents.get_mut(id).hollow = false,
                    Record::Activate { .. } => extents.get_mut(id).active = true,
                    Record::Deactivate { .. } => extents.get_mut(id).active = false,
                    Record::Free { .. }
                    | Record::Allocate { .. }
                    | Record::Persist(_)
                    | Record::Forget { .. } => {}
                }
            }
        }
        let has_twice = |extent: &Extent| {
            let [Some(one), Some(other)] = &extent.halves else { return false };
            one.sums.iter().zip(other.sums.iter()).any(|(one, other)| ![*one, *other].contains(&Sum::ABSENT))
        };
        if extents.iter().any(|(_, extent)| has_twice(extent)) {
            return Err(contradiction("a block lies in two slots"));
        }
        let is_hollow = |extent: &Extent| extent.all_sums().all(|sum| sum == Sum::ABSENT);
        if extents.iter().any(|(_, extent)| extent.hollow && !is_hollow(extent)) {
            return Err(contradiction("an extent that was wholly taken away has something"));
        }
        let state_units: usize = extents.states().map(|state| state.units()).sum();
        if state_units > self.layout.state_units_max() {
            return Err(contradiction("replicas have more state than a checkpoint has room for"));
        }
        let last_lsn = found.last().map_or(checkpoint.lsn, |batch| batch.header.lsn);
        // Only then was nothing in flight. Data may be in place whose record never landed, whatever batch is the last one.
        let at_rest = !torn_tail && found.last().is_some_and(|batch| batch.header.rest);
        let mut suspect_regions = 0;
        if !at_rest {
            for place in 0..extents.places() {
                let Some(id) = extents.at(place).filter(|(_, extent)| extent.active).map(|(id, _)| id) else {
                    continue;
                };
                extents.get_mut(id).suspect = true;
                suspect_regions += 1;
            }
        }
        let recovered = Recovered {
            extents,
            journal: JournalState { head, tail: checkpoint.tail, lsn: last_lsn, chain, placed_lsn: last_lsn },
            last_record_lsn,
            marked_placed_lsn: placed_lsn,
            checkpoint_sequence: checkpoint.sequence,
            checkpoint_which: which,
            scrub: ScrubProgress {
                run: checkpoint.scrub_run,
                cursor: checkpoint.scrub_cursor,
                errors: checkpoint.scrub_errors,
            },
        };
        let findings = Findings {
            batches: found.len() as u64,
            records,
            torn_tail,
            replaced_blocks: 0,
            lost_blocks,
            suspect_regions,
        };
        Ok(Image { recovered, findings, unplaced })
    }

    /// The sum pages of entries, in their order; `None` where one does not verify.
    fn read_pages(
        &self,
        entries: &[Entry],
    ) -> Result<Vec<Option<Box<super::format::SumPage>>>, RecoveryError<M::Error>> {
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_unstable_by_key(|at| entries[*at].slot);
        let mut pages: Vec<Option<Box<super::format::SumPage>>> = Vec::new();
        pages.resize_with(entries.len(), || None);
        let mut buffer = AlignedBuffer::new(2 * PAGES_SPAN as usize * BLOCK_BYTES);
        let mut rest = order.as_slice();
        while let Some(&first) = rest.first() {
            let begin = self.layout.page_offset(entries[first].slot, 0);
            let mut end = begin;
            let near = |at: &&usize| {
                let offset = self.layout.page_offset(entries[**at].slot, 0);
                let is_near = offset <= end + SLOTS_BETWEEN * 2 * BLOCK
                    && offset + 2 * BLOCK <= begin + 2 * u64::from(PAGES_SPAN) * BLOCK;
                end = offset + 2 * BLOCK;
                is_near
            };
            let span = rest.iter().take_while(near).count();
            let (span, after) = rest.split_at(span);
            rest = after;
            let single = span.len() == 1;
            let read_from = |entry: &Entry| self.layout.page_offset(entry.slot, entry.which);
            let (from, to) = if single {
                (read_from(&entries[first]), read_from(&entries[first]) + BLOCK)
            } else {
                (begin, self.layout.page_offset(entries[span[span.len() - 1]].slot, 1) + BLOCK)
            };
            let len = usize::try_from(to - from).expect("at most a span");
            self.read_bytes(from, &mut buffer.bytes_mut()[..len])?;
            for at in span {
                let entry = &entries[*at];
                let offset = usize::try_from(read_from(entry) - from).expect("within the span");
                let bytes = &buffer.bytes()[offset..offset + BLOCK_BYTES];
                if crc32c::crc32c(bytes) == entry.page_crc {
                    let mut page = super::extents::fresh_page();
                    decode_page(bytes, &mut page);
                    pages[*at] = Some(page);
                }
            }
        }
        Ok(pages)
    }
}

/// So many states of replicas, each of another layer, and nothing else.
fn decode_states(mut bytes: &[u8], count: u32) -> Result<Vec<LayerState>, FormatError> {
    let mut states: Vec<LayerState> = Vec::new();
    let mut seen: FoldMap<u32, ()> = FoldMap::default();
    for _ in 0..count {
        let (state, behind) = LayerState::decode(bytes)?;
        if seen.insert(state.object, ()).is_some() {
            return Err(FormatError::Value);
        }
        states.push(state);
        bytes = behind;
    }
    if bytes.is_empty() { Ok(states) } else { Err(FormatError::Length) }
}

/// An extent, by layer and number.
type Key = (u32, u32);

/// Whom a record concerns.
enum Holder {
    /// The extent that has its slot in the end, if one has.
    Last,
    /// One that has had it, and goes on in another.
    Former(Key),
    /// One that is gone, or none.
    Gone,
}

/// What slots changed hands, and whose they were.
#[derive(Debug, Default)]
struct Hands {
    /// By slot, how often it still does.
    changes: FoldMap<u32, u32>,
    /// By slot, whose it is meanwhile.
    holders: FoldMap<u32, Option<Key>>,
    /// By extent, how often it still ends.
    ends: FoldMap<Key, u32>,
}

impl Hands {
    /// Notes a record, one after the other.
    fn note(&mut self, record: &Record) {
        match *record {
            Record::Free { slot, object, extent, goes_on, .. } => {
                *self.changes.entry(slot).or_default() += 1;
                // Before the first time it was whose it ends to be.
                self.holders.entry(slot).or_insert(Some((object, extent)));
                *self.ends.entry((object, extent)).or_default() += u32::from(!goes_on);
            }
            Record::Allocate { slot, .. } => {
                *self.changes.entry(slot).or_default() += 1;
                self.holders.entry(slot).or_insert(None);
            }
            _ => {}
        }
    }

    /// Whether a slot changes hands.
    fn has(&self, slot: u32) -> bool {
        self.changes.contains_key(&slot)
    }

    /// Whether an extent does not end any more.
    fn lives(&self, key: Key) -> bool {
        self.ends.get(&key).is_none_or(|ends| *ends == 0)
    }

    /// Whom the next record concerns.
    fn pass(&mut self, record: &Record) -> Holder {
        let Some(slot) = record.slot() else { return Holder::Gone };
        let Some(changes) = self.changes.get_mut(&slot) else { return Holder::Last };
        match *record {
            Record::Free { object, extent, goes_on, .. } => {
                *changes -= 1;
                self.holders.insert(slot, None);
                if let Some(ends) = self.ends.get_mut(&(object, extent)).filter(|_| !goes_on) {
                    *ends -= 1;
                }
            }
            Record::Allocate { object, extent, .. } => {
                *changes -= 1;
                self.holders.insert(slot, Some((object, extent)));
            }
            _ => {}
        }
        if *changes == 0 {
            return Holder::Last;
        }
        let holder = self.holders.get(&slot).copied().flatten();
        holder.filter(|key| self.lives(*key)).map_or(Holder::Gone, Holder::Former)
    }
}

/// Gives an extent a slot, its first or its second; `None` where it has two.
fn give(extents: &mut Extents, key: Key, free: FreeSlot, lsn: u64) -> Option<(ExtentId, u8)> {
    let Some(id) = extents.find(key.0, key.1) else {
        return Some((extents.insert(Extent::allocated(key.0, key.1, free, lsn)), 0));
    };
    let extent = extents.get_mut(id);
    (!extent.is_twin()).then(|| (id, extent.add_half(Half::new(free, lsn))))
}

/// What was written before to blocks of an extent needs no place any more.
fn forget_unplaced(
    unplaced: &mut BTreeMap<(u32, u16), (u32, Sum)>,
    extent: &Extent,
    blocks: std::ops::Range<u16>,
) {
    if unplaced.is_empty() {
        return;
    }
    for (_, half) in extent.live() {
        for block in blocks.clone() {
            unplaced.remove(&(half.slot, block));
        }
    }
}

/// Slots that no shard has, from the lowest on.
#[must_use]
pub fn free_slots<'i>(layout: &Superblock, images: impl Iterator<Item = &'i Image>) -> Option<Vec<u32>> {
    let mut taken = vec![false; layout.slots() as usize];
    for image in images {
        for (_, extent) in image.recovered.extents.iter() {
            for (_, half) in extent.live() {
                if std::mem::replace(&mut taken[half.slot as usize], true) {
                    return None;
                }
            }
        }
    }
    let free = (0..layout.slots()).filter(|slot| !taken[*slot as usize]);
    Some(free.collect())
}

/// The checkpoint of an empty shard, as it is written at format.
#[must_use]
pub fn first_checkpoint(layout: &Superblock, shard: u16) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES];
    let name = ShardName { store: layout.store, shard };
    CheckpointHeader { sequence: 1, ..CheckpointHeader::default() }.encode(name, 0, &mut bytes);
    bytes
}
