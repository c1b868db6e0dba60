//! `store check`: whether everything on a store is whole.

use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::looking::{Looked, look};
use super::sizes;
use super::table::{Table, print_pairs};
use crate::device::{AlignedBuffer, DeviceError};
use crate::store::extent::extents::{Extent, Half};
use crate::store::extent::format::{BLOCK, EXTENT_BLOCKS, Sum};
use crate::store::extent::recovery::Image;
use crate::store::{BLOCK_BYTES, BLOCK_SECTORS, EXTENT_SECTORS};

/// Findings that are listed at most.
const LISTED_MAX: usize = 100;
/// Blocks read at a time.
const READ_BLOCKS: u16 = 256;

const EXAMPLES: &str = "\
Examples:
  torus-dataplane store check /dev/nvme1n1
  torus-dataplane store check /var/lib/torus/store --data
  torus-dataplane store check /dev/nvme1n1 --json | jq .shards";

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Block device, or file
    path: PathBuf,
    /// Read all data too, and hold them against their checksums
    #[arg(long)]
    data: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is wrong with blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Fault {
    /// What is there is not what was written.
    Checksum,
    /// The device cannot read it.
    Unreadable,
    /// The journal has the newest data, and they are not what was written.
    JournalCopy,
    /// No good copy was left before.
    Lost,
}

/// Neighbouring blocks of a volume with one fault.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Bad {
    volume: String,
    sector: u64,
    sectors: u64,
    fault: Fault,
    /// Its region was being written when the store last crashed.
    suspect: bool,
}

#[derive(Debug, Serialize)]
struct ShardReport {
    shard: u16,
    extents: u32,
    checkpoint: u64,
    /// Behind the checkpoint.
    batches: u64,
    records: u64,
    torn_tail: bool,
    blocks_to_place: usize,
    suspect_regions: u32,
    lost_blocks: u64,
    bad_blocks: u64,
}

#[derive(Debug, Default, Serialize)]
struct Totals {
    bad_blocks: u64,
    lost_blocks: u64,
    suspect_regions: u32,
    damaged_superblocks: usize,
    extents_without_volume: usize,
    replicas_without_volume: usize,
    verified_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    path: String,
    store: String,
    clean: bool,
    data_read: bool,
    #[serde(flatten)]
    totals: Totals,
    shards: Vec<ShardReport>,
    /// The first ones.
    bad: Vec<Bad>,
    bad_ranges: usize,
}

/// Checks; whether all is whole.
///
/// # Errors
/// Why the store cannot be opened or trusted.
pub fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let looked = match look(&arguments.path) {
        Ok(looked) => looked,
        Err(error) => {
            if arguments.json {
                let path = arguments.path.display().to_string();
                println!("{}", serde_json::json!({ "path": path, "error": format!("{error:#}") }));
            }
            return Err(error);
        }
    };
    let report = check(&looked, arguments.data)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(report.clean)
}

fn check(looked: &Looked, data: bool) -> anyhow::Result<Report> {
    let mut faults = Faults { looked, listed: Vec::new(), ranges: 0, blocks: 0 };
    let mut totals = Totals {
        damaged_superblocks: looked.copies.iter().filter(|copy| copy.is_err()).count(),
        ..Totals::default()
    };
    let bar = progress(looked, data);
    let mut shards = Vec::new();
    for (shard, image) in (0..).zip(&looked.images) {
        let recovered = &image.recovered;
        let blocks_to_place = image.unplaced().len();
        let extents: Vec<&Extent> = recovered.extents.iter().map(|(_, extent)| extent).collect();
        let mut halves: Vec<(&Extent, &Half)> = Vec::new();
        for extent in &extents {
            halves.extend(extent.live().map(|(_, half)| (*extent, half)));
        }
        halves.sort_unstable_by_key(|(_, half)| half.slot);
        let is_here =
            |object: u32| looked.catalog.of_object(object).is_some_and(|volume| volume.shard == shard);
        totals.extents_without_volume += extents.iter().filter(|extent| !is_here(extent.object)).count();
        totals.replicas_without_volume +=
            recovered.extents.states().filter(|state| !is_here(state.object)).count();
        let (lost_blocks, faults_before) = (lost_blocks(&extents), faults.blocks);
        check_journal(shard, image, &halves, &mut faults)?;
        for (extent, half) in &halves {
            if data {
                totals.verified_bytes += check_half(image, extent, half, &mut faults, &bar)?;
            }
            faults.lost(extent, half);
        }
        let bad_blocks = faults.blocks - faults_before;
        totals.bad_blocks += bad_blocks;
        totals.lost_blocks += lost_blocks;
        totals.suspect_regions += image.findings.suspect_regions;
        shards.push(ShardReport {
            shard,
            extents: recovered.extents.len(),
            checkpoint: recovered.checkpoint_sequence,
            batches: image.findings.batches,
            records: image.findings.records,
            torn_tail: image.findings.torn_tail,
            blocks_to_place,
            suspect_regions: image.findings.suspect_regions,
            lost_blocks,
            bad_blocks,
        });
    }
    bar.finish_and_clear();
    let clean = totals.bad_blocks == 0
        && totals.lost_blocks == 0
        && totals.suspect_regions == 0
        && totals.damaged_superblocks == 0
        && totals.extents_without_volume == 0
        && totals.replicas_without_volume == 0;
    Ok(Report {
        path: looked.device.path().display().to_string(),
        store: looked.layout.store.to_string(),
        clean,
        data_read: data,
        totals,
        shards,
        bad: faults.listed,
        bad_ranges: faults.ranges,
    })
}

fn lost_blocks(extents: &[&Extent]) -> u64 {
    let lost = extents.iter().map(|extent| extent.all_sums().filter(|sum| *sum == Sum::LOST).count());
    lost.sum::<usize>() as u64
}

/// Shown on a terminal only.
fn progress(looked: &Looked, data: bool) -> ProgressBar {
    if !data {
        return ProgressBar::hidden();
    }
    let sums = looked.images.iter().flat_map(|image| image.recovered.extents.iter());
    let blocks: usize = sums.map(|(_, extent)| extent.all_sums().filter(|sum| sum.is_data()).count()).sum();
    let bar = ProgressBar::new(blocks as u64 * BLOCK);
    let style = "{bar:40} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}

/// Holds the data that are only in the journal against their sums.
fn check_journal(
    shard: u16,
    image: &Image,
    halves: &[(&Extent, &Half)],
    faults: &mut Faults<'_>,
) -> Result<(), DeviceError> {
    let device = &faults.looked.device;
    let begin = faults.looked.layout.journal_offset(shard);
    let mut buffer = AlignedBuffer::new(BLOCK_BYTES);
    for (slot, block, position, sum) in image.unplaced() {
        let read = device.read_into(begin + u64::from(position) * BLOCK, buffer.bytes_mut());
        if read.is_ok() && Sum::of(buffer.bytes()) == sum {
            continue;
        }
        if let Ok(at) = halves.binary_search_by_key(&slot, |(_, half)| half.slot) {
            let fault = if read.is_ok() { Fault::JournalCopy } else { Fault::Unreadable };
            faults.add(halves[at].0, block, 1, fault);
        }
    }
    Ok(())
}

/// Holds what lies in a slot of an extent against its sums; how many bytes were read.
fn check_half(
    image: &Image,
    extent: &Extent,
    half: &Half,
    faults: &mut Faults<'_>,
    bar: &ProgressBar,
) -> Result<u64, DeviceError> {
    let device = &faults.looked.device;
    let begin = faults.looked.layout.data_offset(half.slot);
    let mut buffer = AlignedBuffer::new(usize::from(READ_BLOCKS) * BLOCK_BYTES);
    let mut verified = 0;
    let last = u16::try_from(EXTENT_BLOCKS).expect("1024");
    for first in (0..last).step_by(usize::from(READ_BLOCKS)) {
        let sums = &half.sums[usize::from(first)..usize::from(first + READ_BLOCKS)];
        let wanted = |at: &(u16, &Sum)| at.1.is_data() && !image.is_unplaced(half.slot, at.0);
        let blocks: Vec<(u16, &Sum)> = (first..).zip(sums).filter(wanted).collect();
        let (Some((from, _)), Some((to, _))) = (blocks.first(), blocks.last()) else { continue };
        let (from, to) = (*from, *to + 1);
        let bytes = &mut buffer.bytes_mut()[..usize::from(to - from) * BLOCK_BYTES];
        let whole = device.read_into(begin + u64::from(from) * BLOCK, bytes).is_ok();
        for &(block, sum) in &blocks {
            let at = usize::from(block - from) * BLOCK_BYTES;
            let bytes = &mut bytes[at..at + BLOCK_BYTES];
            // What cannot be read together is read one by one.
            if !whole && device.read_into(begin + u64::from(block) * BLOCK, bytes).is_err() {
                faults.add(extent, block, 1, Fault::Unreadable);
            } else if Sum::of(bytes) != *sum {
                faults.add(extent, block, 1, Fault::Checksum);
            }
        }
        let bytes = blocks.len() as u64 * BLOCK;
        verified += bytes;
        bar.inc(bytes);
    }
    Ok(verified)
}

/// Bad blocks, gathered in ranges.
struct Faults<'l> {
    looked: &'l Looked,
    listed: Vec<Bad>,
    ranges: usize,
    /// Bad ones, without the lost.
    blocks: u64,
}

impl Faults<'_> {
    fn add(&mut self, extent: &Extent, block: u16, count: u16, fault: Fault) {
        if fault != Fault::Lost {
            self.blocks += u64::from(count);
        }
        let bad = Bad {
            volume: self.looked.volume_name(extent.object),
            sector: u64::from(extent.number) * EXTENT_SECTORS + u64::from(block) * BLOCK_SECTORS,
            sectors: u64::from(count) * BLOCK_SECTORS,
            fault,
            suspect: extent.suspect,
        };
        if let Some(last) = self.listed.last_mut().filter(|last| {
            last.volume == bad.volume
                && last.sector + last.sectors == bad.sector
                && (last.fault, last.suspect) == (bad.fault, bad.suspect)
        }) {
            last.sectors += bad.sectors;
            return;
        }
        self.ranges += 1;
        if self.listed.len() < LISTED_MAX {
            self.listed.push(bad);
        }
    }

    /// Adds what was lost in a slot of an extent.
    fn lost(&mut self, extent: &Extent, half: &Half) {
        for (block, _) in (0..).zip(half.sums.iter()).filter(|(_, sum)| **sum == Sum::LOST) {
            self.add(extent, block, 1, Fault::Lost);
        }
    }
}

impl Report {
    fn print(&self) {
        print_pairs(&[("store", self.store.clone()), ("path", self.path.clone())]);
        println!();
        let mut table = Table::new(
            &[
                "shard",
                "extents",
                "checkpoint",
                "batches",
                "records",
                "torn tail",
                "to place",
                "suspect",
                "lost",
                "bad",
            ],
            &[],
        );
        for shard in &self.shards {
            table.row([
                shard.shard.to_string(),
                shard.extents.to_string(),
                shard.checkpoint.to_string(),
                shard.batches.to_string(),
                shard.records.to_string(),
                if shard.torn_tail { "yes" } else { "no" }.to_owned(),
                shard.blocks_to_place.to_string(),
                shard.suspect_regions.to_string(),
                shard.lost_blocks.to_string(),
                shard.bad_blocks.to_string(),
            ]);
        }
        table.print();
        self.print_bad();
        println!();
        for (count, what) in [
            (
                self.totals.damaged_superblocks as u64,
                "superblock copies are damaged: the next node that opens the store writes them again",
            ),
            (
                self.totals.extents_without_volume as u64,
                "extents belong to no volume: their space is taken and nobody reads them",
            ),
            (
                self.totals.replicas_without_volume as u64,
                "states of replicas belong to no volume: their room is taken and nobody reads them",
            ),
            (
                u64::from(self.totals.suspect_regions),
                "regions were being written when the store crashed: another copy decides what they hold",
            ),
            (
                self.totals.lost_blocks,
                "blocks have no good copy here: they are repaired from another copy, or when they are written",
            ),
            (
                self.totals.bad_blocks,
                "blocks are not what was written: they are repaired from another copy, or when they are written",
            ),
        ] {
            if count > 0 {
                println!("{count} {what}");
            }
        }
        let read = if self.data_read {
            format!("{} of data verified", sizes::human(self.totals.verified_bytes))
        } else {
            "data not read: --data reads them".to_owned()
        };
        println!("{}; {read}", if self.clean { "clean" } else { "NOT clean" });
    }

    fn print_bad(&self) {
        if self.bad.is_empty() {
            return;
        }
        println!();
        let mut table = Table::new(&["volume", "sector", "sectors", "fault", "suspect"], &[0, 3, 4]);
        for bad in &self.bad {
            let fault = match bad.fault {
                Fault::Checksum => "checksum",
                Fault::Unreadable => "unreadable",
                Fault::JournalCopy => "journal copy",
                Fault::Lost => "lost",
            };
            table.row([
                bad.volume.clone(),
                bad.sector.to_string(),
                bad.sectors.to_string(),
                fault.to_owned(),
                if bad.suspect { "yes" } else { "no" }.to_owned(),
            ]);
        }
        table.print();
        if self.bad_ranges > self.bad.len() {
            println!("and {} more ranges", self.bad_ranges - self.bad.len());
        }
    }
}
