//! Long runs of a sole copy beside the journal: each block goes to that one of its extent's two slots in which it does not lie, so
//! that what it was before stays whole until the record counts. And the way back to one slot.
//!
//! Invariants:
//! * Data go beside the journal only to a block that is absent in the slot that they go to, and on the way to which nothing else is.
//!   They are in the batch in the making, or in the next to be sent: so a crash leaves at most one batch that names such data, the
//!   last one, and opening holds them against their sums.
//! * What the last batch names is not written again before another batch is durable: a redirected write of it goes to the other slot,
//!   one through the journal goes to its place after its batch, and one in place waits for a batch that proves the last one.
//! * A slot in which no block lies any more goes with a batch of its own that nothing else of the extent is in.
//! * The slot beside an extent's first one counts as one on its way back: a store is not full while one of them can be had. Where slots
//!   run short, or an extent has rested, its smaller half goes to the other slot through the journal, as any write.

use std::collections::VecDeque;

use torus_replication::mutants::{self, Mutant};
use torus_uring::Blocks;

use super::batch::{Applied, Beside};
use super::writing::Taken;
use super::{LOOK_AGAIN_NS, Op, ReadPart, Shard, What, kind};
use crate::store::extent::extents::{Extent, ExtentId, Half};
use crate::store::extent::format::{DataAt, EXTENT_BLOCKS, RECORDS_MAX, Record, Sum};
use crate::store::{Disk, StoreError};

/// Blocks side by side from which on they go beside the journal: 128 KiB, whose transfer takes a disk as long as one more command.
const REDIRECT_BLOCKS: usize = if cfg!(test) { 3 } else { 32 };
/// Extents of a shard with two slots, at most: as many streams as it serves at once at full speed. The price is 4 MiB for each.
const TWINS_MAX: usize = if cfg!(test) { 2 } else { 8 };
/// Slots that are left to extents that have none.
const SLOTS_LEFT: usize = if cfg!(test) { 1 } else { 16 };
/// With fewer free slots those beside an extent's first one are wanted back at once.
const SLOTS_SHORT: usize = if cfg!(test) { 1 } else { 5 };
/// How long nothing is redirected in an extent before it is brought into one slot.
const REST_NS: u64 = if cfg!(test) { 300_000_000 } else { 1_000_000_000 };
/// The same where few blocks are left to be moved, and how many those are: what a stream has left behind.
const SHORT_REST_NS: u64 = if cfg!(test) { 100_000_000 } else { 50_000_000 };
const LEFT_BLOCKS: usize = if cfg!(test) { 2 } else { 32 };
/// Streams whose end is known.
const STREAMS: usize = 2 * TWINS_MAX;
/// How often a shard looks whether slots have run short: others take them.
const LOOK_NS: u64 = 20_000_000;
/// Blocks that are moved in one go: few, since those who write them meanwhile wait.
const MOVE_BLOCKS: u16 = if cfg!(test) { 2 } else { 32 };
/// Units of a batch that a piece of a run may take in addition: both ends cut a run of records, and the slot has to be given.
pub(super) const UNITS_FOR_PIECE: usize = 5;

/// An extent with two slots.
#[derive(Debug)]
struct Twin {
    id: ExtentId,
    /// When something was redirected in it.
    written_ns: u64,
    /// Whether few blocks lie in one of its slots, once it has rested for a moment.
    has_few: Option<bool>,
    /// Blocks of this half, or the other, cannot be moved: one of them is bad.
    blocked: [bool; 2],
    /// A move of several blocks has failed: they go one by one.
    singly: bool,
    /// Its second slot counts as one on its way back.
    is_counted: bool,
}

impl Twin {
    fn new(id: ExtentId, written_ns: u64) -> Twin {
        Twin { id, written_ns, has_few: None, blocked: [false; 2], singly: false, is_counted: true }
    }

    /// When it has rested.
    fn rests_at_ns(&self) -> u64 {
        self.written_ns + if self.has_few == Some(false) { REST_NS } else { SHORT_REST_NS }
    }
}

/// Blocks on their way from one half of an extent to the other.
#[derive(Debug)]
struct Moving {
    id: ExtentId,
    from: u8,
    first: u16,
    count: u16,
    /// Those that something else was done to since they were read, a bit for each.
    changed: u32,
}

const _: () = assert!(MOVE_BLOCKS as u32 <= u32::BITS);

/// A block of the batch in the making that may be redirected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    extent: ExtentId,
    block: u16,
    /// Which of the batch's records.
    at: usize,
}

/// What was done, for the simulation to see that it was.
#[cfg(test)]
#[derive(Debug, Default, Clone, Copy)]
pub struct TwinTally {
    /// Blocks that went beside the journal.
    pub redirected: u64,
    /// Of those, blocks of extents with two slots.
    pub to_twins: u64,
    /// Blocks, or their states, given to a batch to be moved.
    pub moved: u64,
    /// Of those, blocks without data.
    pub moved_states: u64,
    /// Slots that went since no block lay in them any more.
    pub vacated: u64,
    /// Moves that failed.
    pub failed: u64,
}

#[derive(Debug)]
pub(super) struct TwinState {
    #[cfg(test)]
    pub(super) tally: TwinTally,
    list: Vec<Twin>,
    moving: Option<Moving>,
    /// A half may have become vacant.
    look: bool,
    /// One is, and the batches have something of its extent.
    again: bool,
    candidates: Vec<Candidate>,
    /// Extents in which the last durable batch redirected something.
    unproved: Vec<ExtentId>,
    /// A write in place waits for the next one.
    wants_mark: bool,
    /// Layers and blocks of them before which the last redirected runs ended.
    ends: VecDeque<(u32, u64)>,
    /// When the last one was redirected.
    redirected_ns: u64,
    /// Slots given in the making of the batch.
    given: Vec<(Record, Applied)>,
}

impl TwinState {
    pub(super) fn new(twins: impl Iterator<Item = ExtentId>) -> TwinState {
        let mut list: Vec<Twin> = twins.map(|id| Twin::new(id, 0)).collect();
        list.reserve(TWINS_MAX);
        TwinState {
            #[cfg(test)]
            tally: TwinTally::default(),
            look: !list.is_empty(),
            list,
            moving: None,
            again: false,
            candidates: Vec::with_capacity(4 * RECORDS_MAX),
            unproved: Vec::with_capacity(4 * RECORDS_MAX),
            wants_mark: false,
            ends: VecDeque::with_capacity(STREAMS),
            redirected_ns: 0,
            given: Vec::with_capacity(TWINS_MAX),
        }
    }

    /// Whether a write in place of an extent has to wait until another batch is durable, and asks for one.
    pub(super) fn awaits_proof(&mut self, id: ExtentId) -> bool {
        let awaits = self.unproved.contains(&id) && !mutants::is(Mutant::InPlaceUnproved);
        self.wants_mark |= awaits;
        awaits
    }

    /// Whether a batch without records is to prove the last one.
    pub(super) fn wants_mark(&self) -> bool {
        self.wants_mark
    }

    /// A batch is durable that redirected something in these extents.
    pub(super) fn proved(&mut self, redirected: impl Iterator<Item = ExtentId>) {
        self.unproved.clear();
        self.wants_mark = false;
        for id in redirected {
            if self.unproved.last() != Some(&id) {
                self.unproved.push(id);
            }
        }
    }

    /// Whether the last batch says what lies beside the journal.
    #[cfg(test)]
    pub(super) fn has_unproved(&self) -> bool {
        !self.unproved.is_empty()
    }

    /// How many of them no slot will come back from by itself.
    #[cfg(test)]
    pub(super) fn blocked(&self) -> usize {
        self.list.iter().filter(|twin| !twin.is_counted).count()
    }

    /// A batch has ended.
    pub(super) fn batch_ended(&mut self) {
        self.look |= std::mem::take(&mut self.again);
    }

    /// Whether a batch is to look for slots in which no block lies any more.
    pub(super) fn is_due(&self) -> bool {
        self.look
    }

    /// Whether some of these blocks are being read to be moved, or are on their way to another slot.
    pub(super) fn is_moving(&self, id: ExtentId, mut blocks: impl Iterator<Item = u16>) -> bool {
        let moving = self.moving.as_ref().filter(|moving| moving.id == id);
        let moves = moving.is_some_and(|moving| blocks.any(|block| moving.bit(block).is_some()));
        moves && !mutants::is(Mutant::WrittenWhileMoved)
    }

    fn forget(&mut self, id: ExtentId) -> Option<Twin> {
        let at = self.list.iter().position(|twin| twin.id == id)?;
        Some(self.list.remove(at))
    }
}

impl Moving {
    fn bit(&self, block: u16) -> Option<u32> {
        let at = block.checked_sub(self.first).filter(|at| *at < self.count)?;
        Some(1 << at)
    }
}

impl Shard {
    /// Takes runs of blocks out of the data that the batch in the making would take into the journal: they go beside it. With the last
    /// look before it is sent also shorter ones that go on where one ended.
    pub(super) fn redirect(&mut self, is_last: bool) {
        let may_go_on = is_last
            && !self.twins.ends.is_empty()
            && self.now_ns < self.twins.redirected_ns.saturating_add(REST_NS);
        let is_run = self.next.neighbours + 1 >= REDIRECT_BLOCKS / 2;
        if self.next.journaled == 0 || !(is_run || may_go_on) {
            return;
        }
        let mut candidates = std::mem::take(&mut self.twins.candidates);
        self.find_candidates(&mut candidates);
        candidates.sort_unstable();
        let before = self.next.journaled;
        // Long runs first: short ones may go on where those end.
        for is_long in [true, false] {
            let mut rest = candidates.as_slice();
            while let Some(&Candidate { extent: id, block: first, .. }) = rest.first() {
                let is_next =
                    |(block, found): &(u16, &Candidate)| found.extent == id && found.block == *block;
                let len = (first..).zip(rest).take_while(is_next).count();
                let (run, behind) = rest.split_at(len);
                rest = behind;
                if (len >= REDIRECT_BLOCKS) == is_long {
                    self.redirect_run(id, run);
                }
            }
            if !may_go_on {
                break;
            }
        }
        candidates.clear();
        self.twins.candidates = candidates;
        // A slot is given before anything is said of it.
        while let Some((record, applied)) = self.twins.given.pop() {
            self.next.record_first(record, applied);
        }
        if self.next.journaled < before {
            self.next.repack();
        }
    }

    fn find_candidates(&self, candidates: &mut Vec<Candidate>) {
        for (at, applied) in self.next.applied.iter().enumerate() {
            let Applied::Set { op, extent, block, chunk: Some(_), .. } = *applied else { continue };
            let is_on_its_way = !self.pending.is_empty() && self.pending.contains_key(&(extent.0, block));
            let is_on_its_way = is_on_its_way && !mutants::is(Mutant::RedirectedOverPending);
            if self.ops[op as usize].what == What::Move || is_on_its_way {
                continue;
            }
            if self.extents.get(extent).ending {
                continue;
            }
            candidates.push(Candidate { extent, block, at });
        }
    }

    /// Redirects what can be of blocks side by side.
    fn redirect_run(&mut self, id: ExtentId, run: &[Candidate]) {
        let mut rest = run;
        let mut before = None;
        while let Some(first) = rest.first() {
            let extent = self.extents.get(id);
            let target = target_of(extent, first.block, before);
            let len =
                rest.iter().take_while(|one| target_of(extent, one.block, Some(target)) == target).count();
            let (piece, behind) = rest.split_at(len);
            rest = behind;
            before = Some(target);
            if (run.len() >= REDIRECT_BLOCKS || self.goes_on(id, first.block)) && self.has_half(id, target) {
                self.redirect_piece(id, target, piece);
            }
        }
    }

    /// Whether a run goes on with this block where a redirected one ended.
    fn goes_on(&self, id: ExtentId, block: u16) -> bool {
        let extent = self.extents.get(id);
        self.twins.ends.contains(&(extent.object, block_of(extent, block)))
    }

    /// Whether an extent has that slot, or can be given one.
    fn has_half(&mut self, id: ExtentId, at: u8) -> bool {
        if !self.next.has_room_for(UNITS_FOR_PIECE) {
            return false;
        }
        match &self.extents.get(id).halves[usize::from(at)] {
            Some(half) => half.stays(),
            None => self.give_twin(id),
        }
    }

    /// Gives an extent another slot, if one can be spared.
    fn give_twin(&mut self, id: ExtentId) -> bool {
        if self.twins.list.len() >= TWINS_MAX || self.shared.free.len() <= SLOTS_LEFT {
            return false;
        }
        // Before it is taken: who finds none waits for this one.
        self.shared.begin_giving_back();
        let Some(free) = self.shared.free.pop() else {
            self.shared.end_giving_back();
            return false;
        };
        let slot = free.slot;
        let half = Half::new(free, self.next_lsn());
        let extent = self.extents.get_mut(id);
        let (object, number) = (extent.object, extent.number);
        extent.add_half(half);
        self.twins.list.push(Twin::new(id, self.now_ns));
        let record = Record::Allocate { slot, object, extent: number };
        self.twins.given.push((record, Applied::Allocated { extent: id, op: None }));
        self.next.reserve_units(1);
        true
    }

    fn redirect_piece(&mut self, id: ExtentId, to: u8, piece: &[Candidate]) {
        let to_slot = self.extents.get(id).half(to).slot;
        for candidate in piece {
            let Record::Set { slot, data, .. } = &mut self.next.records[candidate.at] else {
                unreachable!("a record of a write");
            };
            (*slot, *data) = (to_slot, DataAt::FreshPlace);
            let Applied::Set { half, chunk, .. } = &mut self.next.applied[candidate.at] else {
                unreachable!("what a write becomes");
            };
            *half = to;
            let Some(chunk) = chunk.take() else { unreachable!("a candidate has its data") };
            self.next.beside.push(Beside { extent: id, half: to, block: candidate.block, chunk });
            self.next.journaled -= 1;
        }
        let extent = self.extents.get(id);
        let (object, first) = (extent.object, block_of(extent, piece[0].block));
        // The stream that it is of, or the one that has rested longest.
        let stream = self.twins.ends.iter().position(|end| *end == (object, first));
        self.twins.ends.remove(stream.unwrap_or(if self.twins.ends.len() == STREAMS { 0 } else { STREAMS }));
        self.twins.ends.push_back((object, first + piece.len() as u64));
        self.twins.redirected_ns = self.now_ns;
        self.next.reserve_units(UNITS_FOR_PIECE - 1);
        #[cfg(test)]
        {
            self.twins.tally.redirected += piece.len() as u64;
            let is_twin = self.extents.get(id).is_twin();
            self.twins.tally.to_twins += if is_twin { piece.len() as u64 } else { 0 };
        }
        if let Some(twin) = self.twins.list.iter_mut().find(|twin| twin.id == id) {
            (twin.written_ns, twin.has_few) = (self.now_ns, None);
        }
    }

    /// Something has become of blocks of an extent, by a move or else: that is durable.
    pub(super) fn twin_changed(&mut self, id: ExtentId, block: u16, count: u16, is_move: bool) {
        if let Some(moving) = self.twins.moving.as_mut().filter(|moving| moving.id == id) {
            for block in block.max(moving.first)..(block + count).min(moving.first + moving.count) {
                moving.changed |= moving.bit(block).unwrap_or(0);
            }
        }
        if let Some(twin) = self.twins.list.iter_mut().find(|twin| twin.id == id) {
            self.twins.look = true;
            if is_move {
                return;
            }
            // A bad block may have become good.
            (twin.blocked, twin.singly) = ([false; 2], false);
            if !std::mem::replace(&mut twin.is_counted, true) {
                self.shared.begin_giving_back();
            }
        }
    }

    /// An extent has ended, or has one slot again.
    pub(super) fn twin_ended(&mut self, id: ExtentId) {
        if let Some(moving) = self.twins.moving.as_mut().filter(|moving| moving.id == id) {
            moving.changed = u32::MAX;
        }
        if self.twins.forget(id).is_some_and(|twin| !twin.is_counted) {
            // It comes back all the same.
            self.shared.begin_giving_back();
        }
    }

    /// Whether a batch is to look for slots that can go. What rests changes nothing by itself.
    pub(super) fn twins_are_due(&self) -> bool {
        self.twins.is_due() && !self.closing
    }

    /// Gives the batch in the making the ends of slots in which no block lies any more.
    pub(super) fn free_vacant(&mut self) {
        self.twins.look = false;
        for at in 0..self.twins.list.len() {
            let id = self.twins.list[at].id;
            let extent = self.extents.get(id);
            let stays = |half: &Option<Half>| half.as_ref().is_some_and(Half::stays);
            if extent.ending || extent.ended || !extent.halves.iter().all(stays) {
                continue;
            }
            // Where nothing is left at all it stays in its first one.
            let Some(vacant) = [1, 0].into_iter().find(|at| extent.half(*at).is_vacant()) else { continue };
            let is_named = self.batches_concern(id) || self.next.gives(id) || self.batch.gives(id);
            if is_named && !mutants::is(Mutant::VacatedTooEarly) {
                self.twins.again = true;
                continue;
            }
            if !self.next.has_room_for(1) {
                self.twins.look = true;
                return;
            }
            self.free_half(id, vacant);
        }
    }

    /// Gives the batch in the making the end of one of an extent's two slots.
    pub(super) fn free_half(&mut self, id: ExtentId, at: u8) {
        let version = self.newest_version(id);
        let extent = self.extents.get_mut(id);
        let (object, number) = (extent.object, extent.number);
        let half = extent.half_mut(at);
        half.ending = true;
        let record = Record::Free { slot: half.slot, object, extent: number, goes_on: true, version };
        self.next.record(record, Applied::Vacated { extent: id, half: at });
    }

    /// It is durable that an extent has that slot no more.
    pub(super) fn half_ended(&mut self, id: ExtentId, at: u8) {
        self.extents.get_mut(id).half_mut(at).ended = true;
        #[cfg(test)]
        {
            self.twins.tally.vacated += 1;
        }
        self.twin_ended(id);
        self.shared.counters.allocated.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
        self.give_slot_back_if_quiet(id, at);
    }

    /// When this shard wants to look after its extents with two slots.
    pub(super) fn twins_at_ns(&self) -> Option<u64> {
        if self.twins.moving.is_some() {
            return None;
        }
        let waits = self.twins.list.iter().filter(|twin| twin.blocked != [true; 2]);
        let first_ns = waits.map(Twin::rests_at_ns).min()?;
        let rests_at_ns = if self.closing { u64::MAX } else { first_ns };
        Some(rests_at_ns.min(self.now_ns + LOOK_NS).max(self.now_ns + LOOK_AGAIN_NS))
    }

    /// Goes on to bring extents into one slot.
    pub(super) fn advance_moves(&mut self, disk: &mut impl Disk) {
        if self.twins.moving.is_some() || self.twins.list.is_empty() {
            return;
        }
        let is_short = self.shared.free.len() < SLOTS_SHORT;
        if self.closing && !is_short {
            return;
        }
        for at in 0..self.twins.list.len() {
            let twin = &self.twins.list[at];
            let has_rested = self.now_ns >= twin.rests_at_ns();
            if has_rested && twin.has_few.is_none() {
                let few = |(_, half): (u8, &Half)| half.count() <= LEFT_BLOCKS;
                self.twins.list[at].has_few = Some(self.extents.get(twin.id).live().any(few));
            } else if is_short || has_rested {
                self.begin_move(at, disk);
            }
            if self.twins.moving.is_some() {
                return;
            }
        }
    }

    /// Begins to move the next blocks of an extent to its other slot, if there are some that nothing else is done to.
    fn begin_move(&mut self, at: usize, disk: &mut impl Disk) {
        let Twin { id, blocked, singly, .. } = self.twins.list[at];
        let extent = self.extents.get(id);
        let stays = |half: &Option<Half>| half.as_ref().is_some_and(Half::stays);
        if extent.ending || extent.ended || !extent.halves.iter().all(stays) {
            return;
        }
        let has = |at: u8| extent.half(at).count();
        let Some(from) = [0, 1].into_iter().filter(|at| !blocked[usize::from(*at)]).min_by_key(|at| has(*at))
        else {
            return;
        };
        let sums = &extent.half(from).sums;
        let blocks = u16::try_from(EXTENT_BLOCKS).expect("1024");
        // A look at the batches takes long: one at most for each block of a move.
        let is_free = |block: &u16| {
            sums[usize::from(*block)] != Sum::ABSENT
                && !self.pending.contains_key(&(id.0, *block))
                && !self.batches_touch(id, *block)
        };
        let looks = usize::from(2 * MOVE_BLOCKS);
        let here = (0..blocks).filter(|block| sums[usize::from(*block)] != Sum::ABSENT);
        let Some(first) = here.take(looks).find(is_free) else { return };
        let kind_of = |block: u16| Some(sums[usize::from(block)]).filter(|sum| !sum.is_data());
        let same = |block: &u16| is_free(block) && kind_of(*block) == kind_of(first);
        let most = if singly { 1 } else { MOVE_BLOCKS };
        let run = (first..blocks.min(first + most)).take_while(same).count();
        let is_data = kind_of(first).is_none();
        let count = u16::try_from(run).expect("a few");
        self.read_to_move(id, from, first, count, is_data, disk);
    }

    fn read_to_move(
        &mut self,
        id: ExtentId,
        from: u8,
        first: u16,
        mut count: u16,
        is_data: bool,
        disk: &mut impl Disk,
    ) {
        let mut chunks = Blocks::new();
        if is_data {
            chunks = self.list_for(usize::from(count));
            while chunks.len() < usize::from(count) {
                let is_short = disk.pool().free_chunks() <= disk.pool().chunk_capacity() / 4;
                let taken = match chunks.len() {
                    0 => self.take_reserved(disk.pool()),
                    _ if is_short => None,
                    _ => disk.pool().take_chunk(),
                };
                let Some(chunk) = taken else { break };
                chunks.push(chunk);
            }
            count = u16::try_from(chunks.len()).expect("a few");
            if count == 0 {
                self.recycle(chunks, disk.pool());
                return;
            }
        }
        let extent = self.extents.get_mut(id);
        let first_block = u64::from(extent.number) * u64::from(EXTENT_BLOCKS) + u64::from(first);
        let mut op = Op::new(None, What::Move, extent.object, first_block, count.into());
        op.reading = u32::from(is_data);
        let at = u32::try_from(self.ops.insert(op)).expect("32 bits");
        self.twins.moving = Some(Moving { id, from, first, count, changed: 0 });
        if !is_data {
            self.ready.push_back(at);
            return;
        }
        let extent = self.extents.get_mut(id);
        extent.half_mut(from).reads_in_flight += 1;
        let offset_bytes = self.half_offset(id, from, first);
        let part =
            self.reads.insert(ReadPart { op: at, position: 0, extent: id, half: from, first_block: first });
        let token = self.token(kind::READ, part);
        disk.read(offset_bytes, chunks, token);
    }

    /// The blocks to be moved were read: they wait for a batch.
    pub(super) fn move_if_read(
        &mut self,
        at: u32,
        disk: &mut impl Disk,
        outcomes: &mut Vec<crate::store::Outcome>,
    ) {
        let op = &mut self.ops[at as usize];
        let blocks = op.joined();
        if op.failure.is_none() {
            op.payload = blocks;
            self.ready.push_back(at);
        } else {
            self.end_op(at, blocks, disk, outcomes);
        }
    }

    /// Gives the batch in the making the blocks that are to move, as far as nothing was done to them and there is room.
    pub(super) fn take_move(&mut self, at: u32, data_max: usize, disk: &mut impl Disk) -> Taken {
        let Some(&Moving { id, from, first, count, changed, .. }) = self.twins.moving.as_ref() else {
            unreachable!("a move is under way")
        };
        if !self.next.has_room_for(1) || self.next.journaled >= data_max {
            return Taken::Part;
        }
        let to = from ^ 1;
        let is_data = !self.ops[at as usize].payload.is_empty();
        let is_there = changed != u32::MAX
            && self.extents.at(id.0).is_some_and(|(_, extent)| {
                let stays = |half: &Option<Half>| half.as_ref().is_some_and(Half::stays);
                !extent.ending && !extent.ended && extent.halves.iter().all(stays)
            });
        for (index, block) in (0..).zip(first..first + count) {
            if !is_there || !self.next.has_room_for(1) || self.next.journaled >= data_max {
                break;
            }
            let extent = self.extents.get(id);
            let sum = extent.half(from).sums[usize::from(block)];
            let untouched = changed >> index & 1 == 0
                && sum != Sum::ABSENT
                && sum.is_data() == is_data
                && !self.pending.contains_key(&(id.0, block))
                && !self.batches_touch(id, block);
            #[cfg(test)]
            {
                let tally = &mut self.twins.tally;
                tally.moved += u64::from(untouched);
                tally.moved_states += u64::from(untouched && !is_data);
            }
            if !untouched {
                continue;
            }
            let (slot, version) = (extent.half(to).slot, extent.version);
            if is_data {
                let chunk = disk.pool().share(self.ops[at as usize].payload.get(index));
                let data = DataAt::Journal;
                let record = Record::Set { slot, block, sum, before: sum, version, data };
                let applied =
                    Applied::Set { op: at, extent: id, half: to, block, sum, version, chunk: Some(chunk) };
                self.next.journaled += 1;
                self.next.record(record, applied);
            } else {
                let (count, hollow) = (1, false);
                let record = Record::Clear { slot, block, count, state: sum, version, hollow };
                let applied = Applied::Cleared {
                    op: at,
                    extent: id,
                    half: to,
                    block,
                    count,
                    state: sum,
                    version,
                    hollow,
                };
                self.next.record(record, applied);
            }
            self.ops[at as usize].queued += 1;
        }
        let op = &mut self.ops[at as usize];
        op.count = op.queued;
        if op.queued == 0 { Taken::Failed } else { Taken::Whole }
    }

    /// A move has ended, or could not be made.
    pub(super) fn move_ended(&mut self, failure: Option<StoreError>) {
        let Some(Moving { id, from, count, .. }) = self.twins.moving.take() else { return };
        let is_bad = matches!(failure, Some(StoreError::Corrupt { .. } | StoreError::Unreadable(_)));
        let Some(twin) = self.twins.list.iter_mut().find(|twin| twin.id == id) else { return };
        if !is_bad {
            return;
        }
        #[cfg(test)]
        {
            self.twins.tally.failed += 1;
        }
        if count > 1 {
            twin.singly = true;
            return;
        }
        twin.blocked[usize::from(from)] = true;
        if twin.blocked == [true; 2] && std::mem::replace(&mut twin.is_counted, false) {
            self.shared.end_giving_back();
        }
    }
}

/// A block of an extent, as its layer's.
fn block_of(extent: &Extent, block: u16) -> u64 {
    u64::from(extent.number) * u64::from(EXTENT_BLOCKS) + u64::from(block)
}

/// The slot that a block would be redirected to: the one in which it does not lie. What lies nowhere goes where the block before it
/// goes.
fn target_of(extent: &Extent, block: u16, before: Option<u8>) -> u8 {
    match extent.sum(block) {
        Sum::ABSENT => before.unwrap_or_else(|| extent.home()),
        _ if mutants::is(Mutant::RedirectedOntoItself) => extent.half_of(block),
        _ => extent.half_of(block) ^ 1,
    }
}
