//! What was durable and is not what it was: each block of a store is changed by itself, and opening the store must find out
//! what that means, or it must not matter.

use std::cell::RefCell;
use std::sync::Arc;

use crate::store::BLOCK_BYTES;
use crate::store::extent::format::{
    BLOCK, BatchHeader, CheckpointHeader, DataAt, EXTENT_BLOCKS, JournalName, LayerState, RECORDS_MAX,
    Record, ReplicaState, ShardName, Sum, Superblock, decode_batch, encode_batch,
};
use crate::store::extent::recovery::{self, RecoveryError};

use super::model::Model;
use super::world::{Lab, Plan, World, open};
use crate::store::extent::simulated::{Media, Rng, Still};

/// A store at rest.
struct Rested {
    layout: Superblock,
    media: Media,
    model: Model,
}

fn rested(plan: &Plan, seed: u64, lab: &mut Lab) -> Rested {
    let mut world = World::fresh(plan, seed, lab);
    world.run_quietly(lab);
    let (layout, mut media, model) = world.rest(lab);
    media.settle();
    Rested { layout, media, model }
}

/// Places of the batches behind a shard's checkpoint, in order; and how many data blocks each has.
fn batches(rested: &Rested, shard: u16) -> Vec<(u32, BatchHeader)> {
    let still = Still(RefCell::new(rested.media.clone()));
    let image = recovery::read(&rested.layout, shard, &still).unwrap();
    let name = JournalName { key: rested.layout.journal_key, shard };
    let mut places = Vec::new();
    let mut position = image.recovered.journal.tail;
    for _ in 0..image.findings.batches {
        let block = rested.layout.journal_offset(shard) / BLOCK + u64::from(position);
        let (header, _, _) = decode_batch(&rested.media.visible(block).unwrap()[..], name, position).unwrap();
        places.push((position, header));
        position = (position + 1 + u32::from(header.data_blocks)) % rested.layout.journal_blocks;
    }
    places
}

/// Opens a store, and says how that ended; what it holds must be right wherever it is not named as bad.
fn outcome(
    rested: &Rested,
    media: Media,
    excused: &dyn Fn(&(u32, u64)) -> bool,
    lab: &mut Lab,
) -> Result<(), RecoveryError<std::convert::Infallible>> {
    open(&rested.layout, media, &rested.model, excused, lab, None).unwrap().map(|_| ())
}

/// Every block of a shard's area, of the sum pages and of the data rots by itself.
pub(super) fn rot_everywhere(plan: &Plan, seed: u64, lab: &mut Lab) {
    let rested = rested(plan, seed, lab);
    let layout = &rested.layout;
    let mut rng = Rng::new(seed ^ 77);
    let pages = layout.segments[0].pages_offset / BLOCK;
    for shard in 0..layout.shards {
        let begin = layout.journal_offset(shard) / BLOCK;
        let list = batches(&rested, shard);
        let Some(((_, last), durable)) = list.split_last() else { continue };
        assert_eq!(last.records, 0, "a store at rest has a mark at the end");
        // A batch that a later one proves is never taken for a torn one.
        for (position, header) in durable {
            let mut media = rested.media.clone();
            assert!(media.rot(begin + u64::from(*position), rng.index(BLOCK_BYTES)));
            let error = outcome(&rested, media, &|_| false, lab).unwrap_err();
            let RecoveryError::JournalDamaged { lsn, .. } = error else { panic!("{error}") };
            assert_eq!(lsn, header.lsn);
            lab.coverage.refused_opens += 1;
            // Lost writes of the journal are the same to who opens the store.
            let mut media = rested.media.clone();
            media.put(begin + u64::from(*position), &[0; BLOCK_BYTES]);
            let error = outcome(&rested, media, &|_| false, lab).unwrap_err();
            assert!(matches!(error, RecoveryError::JournalDamaged { .. }), "{error}");
        }
        // Its data are in place, and so is what the journal has of them not needed.
        for block in rested.media.written(begin..begin + u64::from(layout.journal_blocks)) {
            if durable.iter().any(|(position, _)| begin + u64::from(*position) == block) {
                continue;
            }
            let mut media = rested.media.clone();
            media.rot(block, rng.index(BLOCK_BYTES));
            outcome(&rested, media, &|_| false, lab).unwrap();
        }
        let checkpoints: Vec<u64> =
            (0..2).map(|which| layout.checkpoint_offset(shard, which) / BLOCK).collect();
        let mut media = rested.media.clone();
        for checkpoint in &checkpoints {
            media.rot(*checkpoint, rng.index(BLOCK_BYTES));
        }
        let error = outcome(&rested, media, &|_| false, lab).unwrap_err();
        assert!(matches!(error, RecoveryError::NoCheckpoint { .. }), "{error}");
        for checkpoint in &checkpoints {
            for block in *checkpoint..checkpoint + u64::from(layout.checkpoint_blocks) {
                let mut media = rested.media.clone();
                if media.rot(block, rng.index(40)) {
                    // The other one with all that followed it, or nothing.
                    match outcome(&rested, media, &|_| false, lab) {
                        Ok(()) => {}
                        Err(RecoveryError::JournalDamaged { .. } | RecoveryError::NoCheckpoint { .. }) => {
                            lab.coverage.refused_opens += 1;
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        }
    }
    // Pages and data: the blocks that they concern, and no others.
    let still = Still(RefCell::new(rested.media.clone()));
    let images: Vec<_> =
        (0..layout.shards).map(|shard| recovery::read(layout, shard, &still).unwrap()).collect();
    for (_, extent) in images.iter().flat_map(|image| image.recovered.extents.iter()) {
        let is_own = |key: &(u32, u64)| {
            *key == (u32::MAX, 0)
                || (key.0 == extent.object && key.1 / u64::from(EXTENT_BLOCKS) == u64::from(extent.number))
        };
        let slots: Vec<u32> = extent.live().map(|(_, half)| half.slot).collect();
        for (slot, which) in slots.iter().flat_map(|slot| [(*slot, 0), (*slot, 1)]) {
            let mut media = rested.media.clone();
            if media.rot(pages + 2 * u64::from(slot) + which, rng.index(BLOCK_BYTES)) {
                outcome(&rested, media, &is_own, lab).unwrap();
            }
        }
        for slot in slots {
            let data = layout.data_offset(slot) / BLOCK;
            for block in rested.media.written(data..data + u64::from(EXTENT_BLOCKS)) {
                let mut media = rested.media.clone();
                media.rot(block, rng.index(BLOCK_BYTES));
                let number = u64::from(extent.number) * u64::from(EXTENT_BLOCKS) + (block - data);
                let is_it = |key: &(u32, u64)| *key == (u32::MAX, 0) || *key == (extent.object, number);
                outcome(&rested, media, &is_it, lab).unwrap();
            }
        }
    }
}

/// Bytes that nobody wrote, and structures that are whole and make no sense, do not bring it down.
pub(super) fn nonsense(plan: &Plan, seed: u64, lab: &mut Lab) {
    let rested = rested(plan, seed, lab);
    let layout = &rested.layout;
    let mut rng = Rng::new(seed ^ 99);
    for _ in 0..20 {
        let mut media = rested.media.clone();
        let written = media.written(0..layout.device_bytes / BLOCK);
        for _ in 0..1 + rng.below(8) {
            media.rot(written[rng.index(written.len())], rng.index(BLOCK_BYTES));
        }
        read_all(layout, media);
        // A checkpoint.
        let mut media = rested.media.clone();
        let shard = rng.below(layout.shards.into()) as u16;
        let which = rng.index(2);
        let mut bytes = vec![0; BLOCK_BYTES];
        let header = CheckpointHeader {
            sequence: 1 << 40,
            lsn: rng.up_to_bits(40),
            tail: rng.up_to_bits(10) as u32,
            chain: rng.next() as u32,
            entries: rng.up_to_bits(32) as u32,
            ..CheckpointHeader::default()
        };
        header.encode(ShardName { store: layout.store, shard }, which, &mut bytes);
        media.put(layout.checkpoint_offset(shard, which) / BLOCK, &bytes);
        read_all(layout, media);
        // A batch that follows the last one.
        let mut media = rested.media.clone();
        let still = Still(RefCell::new(media.clone()));
        let journal = recovery::read(layout, shard, &still).unwrap().recovered.journal;
        let records: Vec<Record> =
            (0..rng.index(RECORDS_MAX / 3)).map(|_| record(layout, &mut rng)).collect();
        let data = records.iter().filter(|record| record.is_journaled());
        let header = BatchHeader {
            open_count: layout.open_count,
            lsn: journal.lsn + 1,
            chain: journal.chain,
            position: journal.head,
            data_blocks: data.count() as u16,
            records: records.len() as u16,
            placed_lsn: rng.next(),
            durable_lsn: rng.next(),
            rest: false,
        };
        let name = JournalName { key: layout.journal_key, shard };
        encode_batch(&header, name, &records, &mut bytes);
        media.put(layout.journal_offset(shard) / BLOCK + u64::from(journal.head), &bytes);
        read_all(layout, media);
        lab.coverage.recoveries += 3;
    }
}

/// Whole batches that are not the next one: of another time, another place, or behind one that is gone.
pub(super) fn strangers(plan: &Plan, seed: u64, lab: &mut Lab) {
    let rested = rested(plan, seed, lab);
    let layout = &rested.layout;
    for shard in 0..layout.shards {
        let still = Still(RefCell::new(rested.media.clone()));
        let image = recovery::read(layout, shard, &still).unwrap();
        let journal = image.recovered.journal;
        let open_count = layout.open_count;
        let right = BatchHeader {
            open_count,
            lsn: journal.lsn + 1,
            durable_lsn: journal.lsn,
            placed_lsn: journal.lsn,
            chain: journal.chain,
            position: journal.head,
            ..BatchHeader::default()
        };
        let key = layout.journal_key;
        let lsn_with = |header: BatchHeader, name: JournalName| {
            let mut bytes = vec![0; BLOCK_BYTES];
            encode_batch(&header, name, &[], &mut bytes);
            let mut media = rested.media.clone();
            media.put(layout.journal_offset(shard) / BLOCK + u64::from(journal.head), &bytes);
            recovery::read(layout, shard, &Still(RefCell::new(media)))
                .map(|image| image.recovered.journal.lsn)
        };
        let name = JournalName { key, shard };
        assert_eq!(lsn_with(right, name).unwrap(), journal.lsn + 1, "the next one is");
        let wrong = [
            BatchHeader { chain: right.chain ^ 1, ..right },
            BatchHeader { open_count: open_count + 1, ..right },
            BatchHeader { lsn: journal.lsn, ..right },
            BatchHeader { position: right.position ^ 1, ..right },
        ];
        for header in wrong {
            assert_eq!(lsn_with(header, name).unwrap(), journal.lsn, "{header:?}");
        }
        if image.findings.batches > 0 {
            let header = BatchHeader { open_count: open_count - 1, ..right };
            assert_eq!(lsn_with(header, name).unwrap(), journal.lsn, "{header:?}");
        }
        assert_eq!(
            lsn_with(right, JournalName { key: [8; 16], shard }).unwrap(),
            journal.lsn,
            "another store"
        );
        assert_eq!(
            lsn_with(right, JournalName { key, shard: shard + 1 }).unwrap(),
            journal.lsn,
            "another shard"
        );
        let behind = BatchHeader { lsn: right.lsn + 1, ..right };
        let error = lsn_with(behind, name).unwrap_err();
        assert!(matches!(error, RecoveryError::JournalDamaged { .. }), "{error}");
        lab.coverage.recoveries += 16;
    }
}

fn record(layout: &Superblock, rng: &mut Rng) -> Record {
    let beyond = u64::from(rng.one_in(2000));
    let slot = rng.below(u64::from(layout.slots()) + beyond) as u32;
    let block = rng.below(EXTENT_BLOCKS.into()) as u16;
    let version = rng.next();
    match rng.below(10) {
        // Without data in the journal, mostly: a batch of this length has none.
        0 => Record::Set {
            slot,
            block,
            sum: Sum::of_crc(rng.next() as u32),
            before: Sum::ABSENT,
            version,
            data: match rng.below(500) {
                0 => DataAt::Journal,
                1 => DataAt::FreshPlace,
                _ => DataAt::Place,
            },
        },
        1 => Record::Allocate { slot, object: rng.below(4) as u32, extent: rng.below(4) as u32 },
        2 => {
            let (object, extent) = (rng.below(4) as u32, rng.below(4) as u32);
            Record::Free { slot, object, extent, goes_on: rng.one_in(2), version }
        }
        3 => Record::Clear {
            slot,
            block,
            count: rng.below(u64::from(EXTENT_BLOCKS) - u64::from(block)) as u16,
            state: Sum::LOST,
            version,
            hollow: false,
        },
        4 => Record::Activate { slot },
        5 => Record::Keep { slot },
        6 => Record::Forget { object: rng.below(4) as u32 },
        7 => {
            let count = EXTENT_BLOCKS as u16;
            Record::Clear { slot, block: 0, count, state: Sum::ABSENT, version, hollow: true }
        }
        8 => {
            let (object, state) = (rng.below(4) as u32, Arc::new(ReplicaState::default()));
            Record::Persist(LayerState { object, version, state })
        }
        _ => Record::Deactivate { slot },
    }
}

fn read_all(layout: &Superblock, media: Media) {
    let still = Still(RefCell::new(media));
    for shard in 0..layout.shards {
        if let Ok(mut image) = recovery::read(layout, shard, &still) {
            recovery::place(layout, shard, &still, &mut image).unwrap();
        }
    }
}
