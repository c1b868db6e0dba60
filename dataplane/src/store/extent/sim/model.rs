//! What a store may answer: for each sector the last acknowledged value, and those of writes whose end is not known.
//!
//! A value that was read, or found when the store was opened, stays: only a new write may change it.

use std::ops::Range;
use std::sync::Arc;

use crate::store::BLOCK_BYTES;
use crate::store::extent::extents::{Extent, FoldMap, HeldExtent};
use crate::store::extent::format::{EXTENT_BLOCKS, ReplicaState};
use crate::store::extent::shard::block_hash;

use crate::store::extent::simulated::SECTOR;

/// Sectors of a block.
pub(super) const SECTORS: usize = BLOCK_BYTES / SECTOR;
/// The value of a sector whose content is gone: nothing matches it.
const GONE: u64 = u64::MAX;

/// Values of a block's sectors; zeros are 0.
pub(super) type Values = [u64; SECTORS];

/// What a block is found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    Values(Values),
    /// It does not match its checksum.
    Bad,
    /// The store says that it is lost.
    Lost,
}

/// What is known of a block.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    pub(super) values: Values,
    /// Writes whose end is not known, in order: a bit for each sector, and their values.
    pub(super) maybe: Vec<(u8, Values)>,
    /// No good content is here until the block is wholly written.
    pub(super) bad: bool,
    /// That was said to the store, and it remembers.
    pub(super) lost: bool,
    /// It was said, and whether the store remembers is not known.
    pub(super) maybe_lost: bool,
    /// It is being said.
    losing: bool,
}

impl Known {
    fn allows(&self, sector: usize, value: u64) -> bool {
        let is_maybe = |(mask, values): &(u8, Values)| mask >> sector & 1 == 1 && values[sector] == value;
        self.values[sector] == value || self.effective().iter().any(is_maybe)
    }

    /// The writes whose end is not known and that may have done something: nothing is merged into a bad block before it was wholly
    /// written.
    fn effective(&self) -> &[(u8, Values)] {
        let is_refused = |(mask, _): &&(u8, Values)| self.bad && *mask != u8::MAX;
        &self.maybe[self.maybe.iter().take_while(is_refused).count()..]
    }

    /// Whether it may be merged into: a write of all of it that ended with an error may have made it good all the same.
    pub(super) fn may_be_good(&self) -> bool {
        !self.bad || !self.effective().is_empty()
    }

    /// Whether the block may hold this, where bad content is excused by `excused`.
    pub(super) fn check(&self, held: &Held, excused: bool) -> Result<(), String> {
        match held {
            Held::Values(values) => {
                match (0..SECTORS).find(|sector| !self.allows(*sector, values[*sector])) {
                    None => Ok(()),
                    Some(sector) => {
                        Err(format!("sector {sector} holds {:#x}, known is {self:x?}", values[sector]))
                    }
                }
            }
            Held::Bad if excused || self.bad && !self.lost => Ok(()),
            Held::Lost if excused || self.lost || self.maybe_lost || self.losing => Ok(()),
            _ => Err(format!("{held:?} without a reason, known is {self:x?}")),
        }
    }

    /// It was found to hold this: so it stays.
    pub(super) fn settle(&mut self, held: &Held) {
        self.maybe.clear();
        (self.lost, self.maybe_lost, self.losing) = (*held == Held::Lost, false, false);
        match held {
            Held::Values(values) => {
                self.values = *values;
                self.bad = false;
            }
            Held::Bad | Held::Lost => {
                self.values = [GONE; SECTORS];
                self.bad = true;
            }
        }
    }

    /// A write of it begins.
    pub(super) fn begin(&mut self, mask: u8, values: Values) {
        self.maybe.push((mask, values));
    }

    /// The last write that began has ended with an error that says that nothing of it was done.
    pub(super) fn refuse(&mut self, mask: u8, values: &Values) {
        assert_eq!(self.maybe.pop(), Some((mask, *values)), "writes of a block are ordered");
    }

    /// A write of it was acknowledged. What was merged into was good then: where the block was bad, one of the writes of all of it
    /// whose end is not known has made it good, and what the merge left is of that one or of a later one.
    pub(super) fn acknowledge(&mut self, mask: u8, values: &Values) {
        let refused = self.maybe.len() - self.effective().len();
        self.maybe.drain(..refused);
        for sector in (0..SECTORS).filter(|sector| mask >> sector & 1 == 1) {
            self.values[sector] = values[sector];
        }
        for maybe in &mut self.maybe {
            maybe.0 &= !mask;
        }
        self.maybe.retain(|(mask, _)| *mask != 0);
        (self.bad, self.lost, self.maybe_lost) = (false, false, false);
    }

    /// Which of the contents that the block may have is this, by a hash of its bytes; `None` where there are too many to tell, or the
    /// error that it is none of them.
    pub(super) fn by_hash(&self, hash: u128) -> Result<Option<Values>, String> {
        let mut candidates = vec![self.values];
        for (mask, values) in self.effective() {
            if candidates.len() >= 64 {
                return Ok(None);
            }
            for at in 0..candidates.len() {
                let merge = |sector: usize| {
                    if mask >> sector & 1 == 1 { values[sector] } else { candidates[at][sector] }
                };
                candidates.push(std::array::from_fn(merge));
            }
        }
        let mut bytes = [0; BLOCK_BYTES];
        for values in candidates.iter().filter(|values| !values.contains(&GONE)) {
            fill(&mut bytes, values);
            if block_hash(&bytes) == hash {
                return Ok(Some(*values));
            }
        }
        Err(format!("{hash:x} is the hash of nothing that is known: {self:x?}"))
    }

    /// The store begins to be told that no good content is left.
    pub(super) fn begin_lose(&mut self) {
        self.losing = true;
    }

    /// It was acknowledged that no good content is left.
    pub(super) fn lose(&mut self) {
        self.settle(&Held::Lost);
    }

    /// That ended with an error: the store may remember all the same, or it does not.
    pub(super) fn end_lose(&mut self, may_be_done: bool) {
        self.losing = false;
        self.maybe_lost |= may_be_done;
    }
}

/// Layer and block in it.
pub(super) type Key = (u32, u64);

/// Everything that was ever written.
pub(super) type Model = FoldMap<Key, Known>;

/// Whether an extent is there, and its version.
#[derive(Debug, Clone, Copy, Default)]
struct Presence {
    /// Something of it was acknowledged, and nothing took it away since.
    must: bool,
    /// It may be there, whatever those in progress that need it have done.
    may: bool,
    /// How many of those there are.
    asked: u32,
    /// Bounds of its highest version.
    least: u64,
    most: u64,
    /// The highest version of an acknowledged change that other copies have too and the stable mark has not passed: the extent is in the
    /// activity log. 0 for none.
    logged: u64,
    /// All of it was taken away by a change of that version, and it must be there all the same until the stable mark has passed.
    hollow: Option<u64>,
    /// A change that ended with an error may have made it stay.
    may_stay: bool,
}

/// The extents that there may be, by layer and number.
#[derive(Debug, Clone, Default)]
pub(super) struct Presences(FoldMap<(u32, u32), Presence>);

fn extents_of(blocks: &Range<u64>) -> Range<u32> {
    let each = u64::from(EXTENT_BLOCKS);
    (blocks.start / each) as u32..blocks.end.div_ceil(each) as u32
}

impl Presences {
    /// A change that needs its extents begins; version 0 is the store's own.
    pub(super) fn begin(&mut self, object: u32, blocks: &Range<u64>, version: u64) {
        let most = if version == 0 { u64::MAX } else { version };
        for number in extents_of(blocks) {
            let presence = self.0.entry((object, number)).or_default();
            presence.most = most.max(presence.most);
            presence.asked += 1;
        }
    }

    /// A change ended with an error: nothing was done from block `undone_from` on, and what was before it is not known.
    pub(super) fn failed(&mut self, object: u32, blocks: &Range<u64>, undone_from: u64) {
        for number in extents_of(blocks) {
            let presence = self.0.get_mut(&(object, number)).unwrap();
            presence.asked -= 1;
            let may_be_done = u64::from(number) * u64::from(EXTENT_BLOCKS) < undone_from;
            presence.may |= may_be_done;
            presence.may_stay |= may_be_done;
            if !presence.may && presence.asked == 0 {
                self.0.remove(&(object, number));
            }
        }
    }

    /// How many extents may be there.
    pub(super) fn most(&self) -> usize {
        self.0.len()
    }

    /// Whether all extents of these blocks are there for certain.
    pub(super) fn has_all(&self, object: u32, blocks: &Range<u64>) -> bool {
        extents_of(blocks).all(|number| self.has(object, number))
    }

    /// Whether an extent is there for certain.
    pub(super) fn has(&self, object: u32, number: u32) -> bool {
        self.0.get(&(object, number)).is_some_and(|known| known.must)
    }

    /// It was acknowledged.
    pub(super) fn done(&mut self, object: u32, blocks: &Range<u64>, version: u64, replicated: bool) {
        for number in extents_of(blocks) {
            let presence = self.0.get_mut(&(object, number)).unwrap();
            (presence.must, presence.may) = (true, true);
            presence.asked -= 1;
            presence.hollow = None;
            presence.least = version.max(presence.least);
            if replicated {
                presence.logged = version.max(presence.logged);
            }
        }
    }

    /// Whether all of an extent is known to have been taken away, and that it is there all the same until the stable mark has passed.
    pub(super) fn is_hollow(&self, object: u32, number: u32) -> bool {
        let is_hollow = |known: &Presence| known.hollow.is_some() && !known.may_stay;
        self.0.get(&(object, number)).is_some_and(is_hollow)
    }

    /// An extent of that kind, by layer and number.
    pub(super) fn first_hollow(&self) -> Option<(u32, u32)> {
        self.0.iter().filter(|(_, known)| known.hollow.is_some()).map(|(key, _)| *key).min()
    }

    /// Blocks begin to be taken away that other copies have too.
    pub(super) fn begin_trim(&mut self, object: u32, blocks: &Range<u64>, version: u64) {
        for (_, _, presence) in self.concerned(object, blocks) {
            presence.most = version.max(presence.most);
        }
    }

    /// They were.
    pub(super) fn trimmed(&mut self, object: u32, blocks: &Range<u64>, version: u64) {
        for (is_whole, _, presence) in self.concerned(object, blocks).filter(|(_, _, known)| known.must) {
            presence.least = version.max(presence.least);
            presence.logged = version.max(presence.logged);
            presence.may_stay &= !is_whole;
            if is_whole || presence.hollow.is_some() {
                presence.hollow = Some(presence.least);
            }
        }
    }

    /// It is told that all copies have every change up to a version; how many extents may go for that.
    pub(super) fn stable(&mut self, object: u32, version: u64) -> u64 {
        let mut gone = 0;
        for (_, presence) in self.0.iter_mut().filter(|((of, _), _)| *of == object) {
            if presence.logged <= version {
                presence.logged = 0;
            }
            if presence.hollow.is_some_and(|hollow| hollow <= version) {
                (presence.must, presence.least, presence.hollow) = (false, 0, None);
                gone += 1;
            }
        }
        gone
    }

    fn concerned(
        &mut self,
        object: u32,
        blocks: &Range<u64>,
    ) -> impl Iterator<Item = (bool, (u32, u32), &mut Presence)> {
        let (each, blocks) = (u64::from(EXTENT_BLOCKS), blocks.clone());
        let all = self.0.iter_mut().filter(move |((of, _), _)| *of == object);
        all.filter_map(move |(key, presence)| {
            let own = u64::from(key.1) * each..(u64::from(key.1) + 1) * each;
            let is_whole = blocks.start <= own.start && own.end <= blocks.end;
            (blocks.start < own.end && own.start < blocks.end).then_some((is_whole, *key, presence))
        })
    }

    /// Blocks begin to be taken away, and extents with them where all of them go. `version` is that of the change, if it has one; 0 for
    /// the store's own.
    pub(super) fn begin_removal(&mut self, object: u32, blocks: &Range<u64>, version: Option<u64>) {
        for (is_whole, _, presence) in self.concerned(object, blocks) {
            if is_whole {
                (presence.must, presence.logged, presence.hollow) = (false, 0, None);
            } else if let Some(version) = version {
                let most = if version == 0 { u64::MAX } else { version };
                presence.most = most.max(presence.most);
            }
        }
    }

    /// They were.
    pub(super) fn removed(&mut self, object: u32, blocks: &Range<u64>) {
        let gone: Vec<_> = self
            .concerned(object, blocks)
            .filter(|(is_whole, ..)| *is_whole)
            .map(|(_, key, _)| key)
            .collect();
        for key in gone {
            self.0.remove(&key);
        }
    }

    /// Whether these may be all extents of a layer.
    pub(super) fn check(&self, object: u32, held: &[HeldExtent]) -> Result<(), String> {
        for extent in held {
            let Some(known) = self.0.get(&(object, extent.number)) else {
                return Err(format!("object {object}: {extent:?} from nowhere"));
            };
            // One that was given up and is not gone may have any version that it had.
            if extent.version > known.most || known.must && extent.version < known.least {
                return Err(format!("object {object}: {extent:?}, known is {known:?}"));
            }
            if known.logged > 0 && !extent.active {
                return Err(format!("object {object}: {extent:?} is not in the activity log: {known:?}"));
            }
        }
        let missing = self.0.iter().find(|((of, number), known)| {
            *of == object && known.must && held.iter().all(|extent| extent.number != *number)
        });
        missing.map_or(Ok(()), |(key, known)| Err(format!("{key:?} is not there, known is {known:?}")))
    }

    /// These are there.
    pub(super) fn settle<'e>(&mut self, extents: impl Iterator<Item = &'e Extent>) {
        let found = |extent: &Extent| Presence {
            must: true,
            may: true,
            asked: 0,
            least: extent.version,
            most: extent.version,
            logged: if extent.active { extent.version } else { 0 },
            hollow: extent.hollow.then_some(extent.version),
            may_stay: false,
        };
        self.0 = extents.map(|extent| ((extent.object, extent.number), found(extent))).collect();
    }
}

/// What may be kept of a replica: what is known to be durable, and what has been asked for since, in this order.
#[derive(Debug, Clone)]
pub(super) struct Kept(Vec<Option<Arc<ReplicaState>>>);

impl Kept {
    /// This, durably.
    pub(super) fn new(state: Option<Arc<ReplicaState>>) -> Kept {
        Kept(vec![state])
    }

    /// Another one is asked for; `None` for the end of it.
    pub(super) fn begin(&mut self, state: Option<Arc<ReplicaState>>) {
        self.0.push(state);
    }

    /// It is acknowledged: none that was asked for before it may be found again.
    pub(super) fn done(&mut self, state: Option<&Arc<ReplicaState>>) {
        let at = self.0.iter().rposition(|one| one.as_ref() == state).expect("it was asked for");
        self.0.drain(..at);
    }

    /// It was refused.
    pub(super) fn refused(&mut self, state: &Arc<ReplicaState>) {
        self.0.retain(|one| one.as_ref() != Some(state));
    }

    /// What is known to be durable.
    pub(super) fn known(&self) -> Option<&Arc<ReplicaState>> {
        self.0[0].as_ref()
    }

    /// Whether something else was asked for.
    pub(super) fn is_changing(&self) -> bool {
        self.0.len() > 1
    }

    /// Whether something is kept, whatever has become of what was asked for.
    pub(super) fn is_certain(&self) -> bool {
        self.0.iter().all(Option::is_some)
    }

    /// The most that it may take, units of a record.
    pub(super) fn units(&self) -> usize {
        self.0.iter().flatten().map(|state| state.units()).max().unwrap_or(0)
    }

    /// Whether this may be found.
    pub(super) fn allows(&self, state: Option<&Arc<ReplicaState>>) -> bool {
        self.0.iter().any(|one| one.as_ref() == state)
    }
}

/// The sectors' values, if every sector holds one value over and over.
pub(super) fn values_of(bytes: &[u8]) -> Result<Values, String> {
    let mut values = [0; SECTORS];
    for (sector, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
        let (words, _) = bytes.as_chunks::<8>();
        let first = words[0];
        if words.iter().any(|word| *word != first) {
            return Err(format!("sector {sector} is torn inside"));
        }
        values[sector] = u64::from_le_bytes(first);
    }
    Ok(values)
}

/// Writes values.
pub(super) fn fill(bytes: &mut [u8], values: &Values) {
    for (bytes, value) in bytes.chunks_exact_mut(SECTOR).zip(values) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Values = [7; SECTORS];
    const PART: Values = [8; SECTORS];

    fn bad() -> Known {
        let mut known = Known::default();
        known.lose();
        known
    }

    fn values(part: u8, rest: u64) -> Held {
        Held::Values(std::array::from_fn(|sector| if part >> sector & 1 == 1 { PART[sector] } else { rest }))
    }

    #[test]
    fn a_merge_says_that_a_bad_block_was_made_good() {
        let mut known = bad();
        known.begin(0x01, PART);
        assert!(!known.may_be_good(), "{known:x?}");
        known.begin(u8::MAX, WHOLE);
        assert!(known.may_be_good());
        known.begin(0xf0, PART);
        known.acknowledge(0xf0, &PART);
        assert!(known.may_be_good(), "another one may follow");
        known.check(&values(0xf0, 7), false).unwrap();
        for wrong in [values(0xf1, 7), values(0xf0, 0), values(0x70, 7), Held::Lost, Held::Bad] {
            known.check(&wrong, false).unwrap_err();
        }
        known.begin(0x0f, PART);
        known.acknowledge(0x0f, &PART);
        known.check(&values(u8::MAX, 0), false).unwrap();
        assert!(known.maybe.is_empty());
    }

    #[test]
    fn what_is_merged_into_a_bad_block_is_never_found() {
        let mut known = bad();
        (0..SECTORS).for_each(|sector| known.begin(1 << sector, PART));
        known.check(&values(u8::MAX, 0), false).unwrap_err();
        known.begin(u8::MAX, WHOLE);
        known.check(&values(0, 7), false).unwrap();
        known.check(&values(1, 7), false).unwrap_err();
    }

    #[test]
    fn what_was_refused_is_never_found() {
        let mut known = Known::default();
        known.begin(0x0f, PART);
        known.check(&values(0x0f, 0), false).unwrap();
        known.refuse(0x0f, &PART);
        known.check(&values(0x0f, 0), false).unwrap_err();
        known.begin_lose();
        known.check(&Held::Lost, false).unwrap();
        known.end_lose(false);
        known.check(&Held::Lost, false).unwrap_err();
        known.begin_lose();
        known.end_lose(true);
        known.check(&Held::Lost, false).unwrap();
        known.acknowledge(0x01, &PART);
        known.check(&Held::Lost, false).unwrap_err();
    }

    #[test]
    fn an_extent_that_nobody_got_is_not_there() {
        let each = u64::from(EXTENT_BLOCKS);
        let held = |number| [HeldExtent { number, version: 1, active: false, suspect: false }];
        let mut presences = Presences::default();
        presences.begin(0, &(each - 1..each + 1), 1);
        presences.begin(0, &(each..each + 1), 1);
        assert_eq!(presences.most(), 2);
        presences.failed(0, &(each - 1..each + 1), each);
        presences.check(0, &held(1)).unwrap();
        presences.failed(0, &(each..each + 1), each);
        presences.check(0, &held(1)).unwrap_err();
        presences.check(0, &held(0)).unwrap();
        assert_eq!(presences.most(), 1);
    }
}
