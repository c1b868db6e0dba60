//! The store under a simulated replica: what is durable, what a crash makes of what was in flight, and what rots.
//!
//! Each block has its content and its newest record. A write in progress when the process or the machine stops may have reached
//! either, both or none: then the two differ, and since the region is in the activity log the block is suspect. On a sole copy
//! the content waits in the journal: both or none.

use std::collections::{BTreeMap, BTreeSet};

use cluster_map::VolumeId;
use torus_replication::message::{Digest, Fault, Held};
use torus_replication::mutants::{self, Mutant};
use torus_replication::replica::{Durable, Ended, Work, WorkId};
use torus_replication::terms::{Extent, Member, Span, Version};

use crate::random::Random;

/// Sectors of a block.
pub const SECTORS: usize = 8;
/// Extents in an answer: few, so that lists come in pieces.
const LIST_MAX: usize = 2;

/// A block, by the value of each sector.
pub type Block = [u64; SECTORS];

/// A block that was never written.
pub const ZEROS: Block = [0; SECTORS];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stored {
    content: Block,
    recorded: Record,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Record {
    Data(u128),
    Absent,
    Lost,
}

#[derive(Debug, Default)]
struct ExtentAt {
    version: Version,
    is_active: bool,
    /// Blocks that did not match their records when the store was opened after a crash, with the extent in the activity log.
    suspects: BTreeSet<u16>,
    writes_in_flight: u32,
    blocks: BTreeMap<u16, Stored>,
}

#[derive(Debug, Default)]
struct VolumeAt {
    durable: Durable,
    extents: BTreeMap<Extent, ExtentAt>,
    stable: Version,
}

/// What is being done.
#[derive(Debug)]
struct Running {
    volume: VolumeId,
    work: Work<Vec<Block>>,
}

/// A store.
#[derive(Debug)]
pub struct Store {
    /// Who it is.
    pub member: Member,
    volumes: BTreeMap<VolumeId, VolumeAt>,
    running: BTreeMap<WorkId, Running>,
    /// Extents that there is room for.
    pub extents_max: usize,
    /// Of a hundred writes, how many the device fails.
    pub bad_percent: u64,
}

/// What stands for 128 bits of a hash.
#[must_use]
pub fn hash(block: &Block) -> u128 {
    let mut hash = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128;
    for value in block {
        hash = (hash ^ u128::from(*value)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    hash
}

fn crc(hash: u128) -> u32 {
    // All of the hash: a product's low bits know nothing of what differs in high ones only.
    let halves = (hash >> 64) as u64 ^ hash as u64;
    (halves >> 32) as u32 ^ halves as u32
}

impl Store {
    /// An empty one.
    #[must_use]
    pub fn new(member: Member, extents_max: usize) -> Store {
        Store { member, volumes: BTreeMap::new(), running: BTreeMap::new(), extents_max, bad_percent: 0 }
    }

    /// What it has kept of each volume, for a process that opens it.
    #[must_use]
    pub fn durables(&self) -> Vec<(VolumeId, Durable)> {
        self.volumes.iter().map(|(volume, at)| (*volume, at.durable.clone())).collect()
    }

    /// Something begins.
    pub fn start(&mut self, id: WorkId, volume: VolumeId, work: Work<Vec<Block>>) {
        let at = self.volumes.entry(volume).or_default();
        if let Work::Write { span, .. } | Work::Unmap(_, span) | Work::Lose(_, span) = &work {
            let is_journaled = matches!(work, Work::Write { is_sole: true, .. });
            let extent = at.extents.entry(span.extent).or_default();
            extent.writes_in_flight += 1;
            extent.is_active |= !is_journaled;
        }
        self.running.insert(id, Running { volume, work });
    }

    /// Writes up to this one are on all in-sync members.
    pub fn set_stable(&mut self, volume: VolumeId, stable: Version) {
        let Some(at) = self.volumes.get_mut(&volume) else { return };
        at.stable = at.stable.max(stable);
        let stable = at.stable;
        for extent in at.extents.values_mut() {
            if extent.version <= stable && extent.writes_in_flight == 0 && extent.suspects.is_empty() {
                extent.is_active = false;
            }
        }
    }

    /// It ends, durably.
    pub fn end(&mut self, id: WorkId, random: &mut Random) -> Option<Ended<Vec<Block>>> {
        let Running { volume, work } = self.running.remove(&id)?;
        let used: usize = self.volumes.values().map(|volume| volume.extents.len()).sum();
        let at = self.volumes.entry(volume).or_default();
        if self.bad_percent > 0
            && let Work::Write { span, .. } = &work
            && random.below(100) < self.bad_percent
        {
            let extent = at.extents.entry(span.extent).or_default();
            extent.writes_in_flight -= 1;
            return Some(Ended::Failed(Fault::Device));
        }
        Some(match work {
            Work::Persist(durable) => {
                at.durable = durable;
                Ended::Done
            }
            Work::Survey => {
                let highest = at.extents.values().map(|extent| extent.version).max().unwrap_or_default();
                Ended::Survey { highest, active: at.held().filter(|held| held.is_active).collect() }
            }
            Work::Reserve(extent) => {
                if !at.extents.contains_key(&extent) && used >= self.extents_max {
                    return Some(Ended::Failed(Fault::NoSpace));
                }
                at.extents.entry(extent).or_default();
                Ended::Done
            }
            Work::Write { version, span, blocks, .. } => {
                let extent = at.extents.entry(span.extent).or_default();
                extent.writes_in_flight -= 1;
                extent.version = extent.version.max(version);
                for (block, content) in (span.first..).zip(blocks) {
                    let recorded = Record::Data(hash(&content));
                    extent.blocks.insert(block, Stored { content, recorded });
                    extent.suspects.remove(&block);
                }
                if mutants::is(Mutant::LogReleasedLocally) && extent.writes_in_flight == 0 {
                    extent.is_active = false;
                }
                Ended::Done
            }
            Work::Unmap(version, span) => at.remove(version, span),
            Work::Lose(version, span) => {
                let extent = at.extents.entry(span.extent).or_default();
                extent.writes_in_flight -= 1;
                extent.version = extent.version.max(version);
                for block in blocks(span) {
                    extent.blocks.insert(block, Stored { content: ZEROS, recorded: Record::Lost });
                    extent.suspects.remove(&block);
                }
                Ended::Done
            }
            Work::Read(span) => at.read(span, false),
            Work::Salvage(span) => at.read(span, true),
            Work::Digest(span) => {
                Ended::Digests(blocks(span).map(|block| at.digest(span.extent, block)).collect())
            }
            Work::Drop(extent) => {
                at.extents.remove(&extent);
                Ended::Done
            }
            Work::List(from) => {
                let mut held: Vec<Held> = at.held().filter(|held| held.extent >= from).collect();
                let is_whole = held.len() <= LIST_MAX;
                held.truncate(LIST_MAX);
                Ended::List { held, is_whole }
            }
        })
    }

    /// The process or the machine stops: what was in flight is done, in part, or not at all.
    pub fn crash(&mut self, random: &mut Random) {
        for (_, Running { volume, work }) in std::mem::take(&mut self.running) {
            let at = self.volumes.entry(volume).or_default();
            match work {
                // Its record is in a batch: there or not.
                Work::Persist(durable) if random.coin() => at.durable = durable,
                Work::Write { version, span, blocks, is_sole } => {
                    let extent = at.extents.entry(span.extent).or_default();
                    let has_record = random.coin();
                    if has_record {
                        extent.version = extent.version.max(version);
                    }
                    for (block, content) in (span.first..).zip(blocks) {
                        let old = extent.blocks.get(&block).copied();
                        let old = old.unwrap_or(Stored { content: ZEROS, recorded: Record::Absent });
                        let recorded = if has_record { Record::Data(hash(&content)) } else { old.recorded };
                        let has_content = if is_sole { has_record } else { random.coin() };
                        let content = if has_content { content } else { old.content };
                        if recorded != Record::Absent || content != ZEROS {
                            extent.blocks.insert(block, Stored { content, recorded });
                        }
                    }
                }
                Work::Drop(extent) if random.coin() => {
                    at.extents.remove(&extent);
                }
                Work::Unmap(version, span) if random.coin() => {
                    at.remove(version, span);
                }
                Work::Lose(version, span) if random.coin() => {
                    let extent = at.extents.entry(span.extent).or_default();
                    extent.version = extent.version.max(version);
                    for block in blocks(span) {
                        extent.blocks.insert(block, Stored { content: ZEROS, recorded: Record::Lost });
                    }
                }
                _ => {}
            }
        }
        for extent in self.volumes.values_mut().flat_map(|volume| volume.extents.values_mut()) {
            extent.writes_in_flight = 0;
            if extent.is_active {
                let is_good = |at: &Stored| match at.recorded {
                    Record::Data(recorded) => recorded == hash(&at.content),
                    Record::Absent | Record::Lost => true,
                };
                let suspects = extent.blocks.iter().filter(|(_, at)| !is_good(at));
                extent.suspects.extend(suspects.map(|(block, _)| *block));
            }
        }
    }

    /// One block changes by itself; whether there was one.
    pub fn rot(&mut self, random: &mut Random) -> bool {
        let extents = self.volumes.values_mut().flat_map(|volume| volume.extents.values_mut());
        let mut all: Vec<&mut Stored> = extents.flat_map(|extent| extent.blocks.values_mut()).collect();
        if all.is_empty() {
            return false;
        }
        let at = random.index(all.len());
        all[at].content[0] ^= 1 << 63;
        true
    }

    /// What it would answer, for a comparison of copies at rest; `None` where it is damaged.
    #[must_use]
    pub fn visible(&self, volume: VolumeId) -> BTreeMap<(Extent, u16), Option<Block>> {
        let Some(at) = self.volumes.get(&volume) else { return BTreeMap::new() };
        let all = at
            .extents
            .iter()
            .flat_map(|(number, extent)| extent.blocks.iter().map(move |(block, at)| (number, block, at)));
        let seen = all.filter_map(|(number, block, stored)| match stored.recorded {
            Record::Absent => None,
            Record::Data(recorded) => {
                Some(((*number, *block), (hash(&stored.content) == recorded).then_some(stored.content)))
            }
            Record::Lost => Some(((*number, *block), None)),
        });
        seen.filter(|(_, content)| *content != Some(ZEROS)).collect()
    }
}

fn blocks(span: Span) -> impl Iterator<Item = u16> {
    span.first..span.first + span.count
}

impl VolumeAt {
    fn held(&self) -> impl Iterator<Item = Held> {
        self.extents.iter().map(|(extent, at)| Held {
            extent: *extent,
            version: at.version,
            is_active: at.is_active,
            is_suspect: !at.suspects.is_empty(),
        })
    }

    fn remove(&mut self, version: Version, span: Span) -> Ended<Vec<Block>> {
        let extent = self.extents.entry(span.extent).or_default();
        extent.writes_in_flight = extent.writes_in_flight.saturating_sub(1);
        extent.version = extent.version.max(version);
        for block in blocks(span) {
            extent.blocks.remove(&block);
            extent.suspects.remove(&block);
        }
        Ended::Done
    }

    fn read(&self, span: Span, is_salvage: bool) -> Ended<Vec<Block>> {
        let mut all = Vec::with_capacity(span.count.into());
        for block in blocks(span) {
            let extent = self.extents.get(&span.extent);
            let stored = extent.and_then(|extent| extent.blocks.get(&block));
            let is_blessed = mutants::is(Mutant::SuspectGood)
                && extent.is_some_and(|extent| extent.suspects.contains(&block));
            match stored {
                None => all.push(ZEROS),
                Some(stored) if is_salvage || is_blessed => all.push(stored.content),
                Some(stored) => match stored.recorded {
                    Record::Data(recorded) if recorded == hash(&stored.content) => all.push(stored.content),
                    Record::Absent => all.push(ZEROS),
                    Record::Data(_) => return Ended::Failed(Fault::Corrupt),
                    Record::Lost => return Ended::Failed(Fault::Lost),
                },
            }
        }
        Ended::Blocks(all)
    }

    fn digest(&self, extent: Extent, block: u16) -> Digest {
        let Some(at) = self.extents.get(&extent) else { return Digest::Absent };
        let Some(stored) = at.blocks.get(&block) else { return Digest::Absent };
        let found = hash(&stored.content);
        match stored.recorded {
            Record::Lost => Digest::Lost,
            Record::Absent => Digest::Absent,
            Record::Data(recorded) if recorded == found => Digest::Data(found),
            Record::Data(_) if at.suspects.contains(&block) && mutants::is(Mutant::SuspectGood) => {
                Digest::Data(found)
            }
            Record::Data(recorded) if at.suspects.contains(&block) => {
                Digest::Suspect { found, recorded_crc: crc(recorded), found_crc: crc(found) }
            }
            Record::Data(_) => Digest::Bad,
        }
    }
}
