//! How long it takes to open a store of one TiB that a crash left with a million writes behind its checkpoints, and how much
//! memory it has then. Its metadata are written as a shard writes them; data has it none, and none are read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, ensure};
use cluster_map::{ClusterId, NodeId, StoreId, VolumeId};
use serde::Serialize;
use torus_dataplane::device::Device;
use torus_dataplane::store::BLOCK_BYTES;
use torus_dataplane::store::extent::format::{
    BLOCK, BatchHeader, CheckpointHeader, DEVICE_BYTES_MIN, DataAt, ENTRY_BYTES, EXTENT_BLOCKS, Entry,
    JournalName, RECORDS_MAX, Record, Shape, ShardName, Sum, SumPage, Superblock, encode_batch, encode_page,
};
use torus_dataplane::store::extent::opening::{self, Identity};

use crate::measure::{now_ns, resident_bytes};
use crate::units::human_bytes;
use crate::workload::Random;

/// Extents of one TiB.
const EXTENTS: u32 = 262_144;
/// Writes behind the checkpoints.
const RECORDS: u32 = 1_000_000;
/// Seconds that opening may take.
const SECONDS_MAX: f64 = 2.0;
/// Bytes that it may have in memory.
const BYTES_MAX: u64 = 3 << 29;
/// Versions of extents, before the writes behind the checkpoint.
const VERSION: u64 = 1;

#[derive(Debug, Serialize)]
struct Report {
    kind: &'static str,
    path: String,
    shards: u16,
    extents: u32,
    records: u64,
    suspect_regions: u32,
    seconds: f64,
    seconds_max: f64,
    resident_bytes: u64,
    resident_bytes_max: u64,
}

fn identity() -> Identity {
    Identity { cluster: ClusterId([1; 16]), node: NodeId([1; 16]), expected: None, fresh: StoreId([1; 16]) }
}

/// Prepares, measures and prints; whether both targets were reached. The file is removed.
///
/// # Errors
/// A file that cannot be made, or that does not open as what was written.
pub(crate) fn run(path: &Path, json: bool) -> anyhow::Result<bool> {
    ensure!(!path.exists(), "{} is there already: name another file, or remove it", path.display());
    let _scratch = super::Scratch(path.to_owned());
    eprintln!("writing the metadata of a TiB, about 1.1 GiB");
    let shards = prepare(path).with_context(|| format!("cannot prepare {}", path.display()))?;
    let before = resident_bytes();
    let start_ns = now_ns();
    let opened = opening::open(path, 0, identity())?;
    let seconds = (now_ns() - start_ns) as f64 / 1e9;
    let resident = resident_bytes().saturating_sub(before);
    let findings = opened.findings;
    ensure!(
        findings.records == u64::from(RECORDS) && findings.lost_blocks == 0 && !findings.torn_tail,
        "the store does not open as it was written: {findings:?}"
    );
    let report = Report {
        kind: "store-open",
        path: path.display().to_string(),
        shards,
        extents: EXTENTS,
        records: findings.records,
        suspect_regions: findings.suspect_regions,
        seconds,
        seconds_max: SECONDS_MAX,
        resident_bytes: resident,
        resident_bytes_max: BYTES_MAX,
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("extents    {EXTENTS} in {shards} shards, 1 TiB");
        println!("journals   {} records, {} suspect regions", findings.records, findings.suspect_regions);
        println!("opening    {seconds:.2} s (at most {SECONDS_MAX} s)");
        println!("resident   {} (at most {})", human_bytes(resident), human_bytes(BYTES_MAX));
    }
    Ok(seconds <= SECONDS_MAX && resident <= BYTES_MAX)
}

/// Writes the store; how many shards it has.
fn prepare(path: &Path) -> anyhow::Result<u16> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    // Room for the tables beside the extents.
    file.set_len((1 << 40) + (16 << 30))?;
    let device = Device::open(path, 0, DEVICE_BYTES_MIN)?;
    opening::format(&device, identity(), Shape::default())?;
    drop(device);
    let mut opened = opening::open(path, 0, identity())?;
    let layout = opened.store.layout().clone();
    ensure!(layout.slots() >= EXTENTS, "only {} extents fit", layout.slots());
    let mut catalog = opened.store.catalog().clone();
    for volume in 0..layout.shards {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&(volume + 1).to_le_bytes());
        catalog.add(VolumeId(id), 1 << 31, layout.shards)?;
    }
    let objects: Vec<(u16, u32)> =
        catalog.volumes().iter().map(|volume| (volume.shard, volume.object)).collect();
    opened.store.commit(catalog)?;
    drop(opened);
    for (shard, object) in objects {
        write_shard(&file, &layout, shard, object)?;
    }
    file.sync_all()?;
    Ok(layout.shards)
}

/// The share of a shard in a total.
fn share(total: u32, shard: u16, shards: u16) -> u32 {
    let (shard, shards) = (u32::from(shard), u32::from(shards));
    total / shards + u32::from(shard < total % shards)
}

/// A checkpoint with the shard's extents, and the batches of its writes behind it.
fn write_shard(file: &File, layout: &Superblock, shard: u16, object: u32) -> anyhow::Result<()> {
    let mut random = Random::new(u64::from(shard) + 1);
    let extents = share(EXTENTS, shard, layout.shards);
    let slot_of = |extent: u32| extent * u32::from(layout.shards) + u32::from(shard);
    let mut table = vec![0; BLOCK_BYTES];
    let mut page_bytes = vec![0; BLOCK_BYTES];
    let mut page: Box<SumPage> = vec![Sum::ABSENT; EXTENT_BLOCKS as usize]
        .into_boxed_slice()
        .try_into()
        .map_err(|_| anyhow::anyhow!("a page has {EXTENT_BLOCKS} sums"))?;
    for extent in 0..extents {
        for sum in page.iter_mut() {
            *sum = Sum::of_crc((random.next() & 0xffff_ffff) as u32);
        }
        encode_page(&page, &mut page_bytes);
        let slot = slot_of(extent);
        file.write_all_at(&page_bytes, layout.page_offset(slot, 1))?;
        let page_crc = crc32c::crc32c(&page_bytes);
        let active = extent < layout.active_max;
        Entry { object, extent, slot, page_crc, version: VERSION, which: 1, active, hollow: false }
            .encode(&mut table);
    }
    let header = CheckpointHeader {
        sequence: 2,
        entries: extents,
        entries_crc: crc32c::crc32c(&table[BLOCK_BYTES..BLOCK_BYTES + extents as usize * ENTRY_BYTES]),
        ..CheckpointHeader::default()
    };
    header.encode(ShardName { store: layout.store, shard }, 1, &mut table);
    table.resize(table.len().next_multiple_of(BLOCK_BYTES), 0);
    file.write_all_at(&table, layout.checkpoint_offset(shard, 1))?;

    let name = JournalName { key: layout.journal_key, shard };
    let mut left = share(RECORDS, shard, layout.shards) as usize;
    let mut batch = BatchHeader { open_count: layout.open_count, lsn: 1, ..BatchHeader::default() };
    while left > 0 {
        let count = left.min(RECORDS_MAX);
        let records: Vec<Record> = (0..count)
            .map(|_| {
                let word = random.next();
                Record::Set {
                    slot: slot_of(u32::try_from(word >> 40).unwrap_or(0) % layout.active_max.min(extents)),
                    block: (word & 0x3ff) as u16,
                    sum: Sum::of_crc((word >> 10 & 0xffff_ffff) as u32),
                    before: Sum::ABSENT,
                    version: VERSION + batch.lsn,
                    data: DataAt::Place,
                }
            })
            .collect();
        batch.records = u16::try_from(count)?;
        let crc = encode_batch(&batch, name, &records, &mut page_bytes);
        let offset_bytes = layout.journal_offset(shard) + u64::from(batch.position) * BLOCK;
        file.write_all_at(&page_bytes, offset_bytes)?;
        batch = BatchHeader {
            lsn: batch.lsn + 1,
            durable_lsn: batch.lsn,
            chain: crc,
            position: batch.position + 1,
            ..batch
        };
        left -= count;
    }
    Ok(())
}
