//! `store dump`: what a store says of itself.

use std::path::PathBuf;

use anyhow::{Context, bail};
use cluster_map::VolumeId;
use serde_json::{Value, json};

use super::looking::{Looked, look};
use super::sizes;
use super::table::{Table, print_pairs};
use crate::store::extent::catalog::{Volume, VolumeState};
use crate::store::extent::extents::Extent;
use crate::store::extent::format::{BLOCK, DataAt, LayerState, Record, Sum, VERSION};
use crate::store::extent::recovery::{self, Found};
use crate::store::{EXTENT_BYTES, SECTOR_BYTES};

const EXAMPLES: &str = "\
Examples:
  torus-dataplane store dump /dev/nvme1n1
  torus-dataplane store dump /dev/nvme1n1 --journal
  torus-dataplane store dump /var/lib/torus/store --volume 6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c43
  torus-dataplane store dump /dev/nvme1n1 --json | jq .volumes";

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Block device, or file
    path: PathBuf,
    /// List the batches behind each shard's checkpoint, with their records
    #[arg(long)]
    journal: bool,
    /// List the extents of a volume
    #[arg(long, value_name = "UUID")]
    volume: Option<VolumeId>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Dumps.
///
/// # Errors
/// Why the store cannot be opened or trusted, or has no such volume.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let looked = look(&arguments.path)?;
    let path = arguments.path.display();
    let volume = match arguments.volume {
        None => None,
        Some(id) => match looked.catalog.get(id) {
            Some(volume) => Some(*volume),
            None => {
                bail!("store {path} has no volume {id}: without --volume the ones that it has are listed")
            }
        },
    };
    let journals = if arguments.journal { journals(&looked)? } else { Vec::new() };
    if arguments.json {
        println!("{}", as_json(&looked, volume.as_ref(), arguments.journal.then_some(&journals)));
        return Ok(());
    }
    print_superblock(&looked);
    print_checkpoints(&looked);
    print_volumes(&looked);
    print_replicas(&looked);
    for (shard, journal) in journals.iter().enumerate() {
        print_journal(shard, journal);
    }
    if let Some(volume) = volume {
        print_extents(&looked, &volume);
    }
    Ok(())
}

fn journals(looked: &Looked) -> anyhow::Result<Vec<recovery::Journal>> {
    let read = |shard| recovery::read_journal(&looked.layout, shard, &looked.device);
    let journals: Result<Vec<_>, _> = (0..looked.layout.shards).map(read).collect();
    journals.context("the journals cannot be read again")
}

/// Blocks of an extent with data, zeros, and lost.
fn states(extent: &Extent) -> (usize, usize, usize) {
    let count = |wanted: &dyn Fn(Sum) -> bool| extent.all_sums().filter(|sum| wanted(*sum)).count();
    (count(&Sum::is_data), count(&|sum| sum == Sum::ZERO), count(&|sum| sum == Sum::LOST))
}

/// Where an extent lies.
fn slots_of(extent: &Extent) -> Vec<u32> {
    extent.live().map(|(_, half)| half.slot).collect()
}

/// The extents of a volume, by number.
fn extents_of<'l>(looked: &'l Looked, volume: &Volume) -> Vec<&'l Extent> {
    let Some(image) = looked.images.get(usize::from(volume.shard)) else { return Vec::new() };
    let own = image.recovered.extents.iter().map(|(_, extent)| extent);
    let mut extents: Vec<&Extent> = own.filter(|extent| extent.object == volume.object).collect();
    extents.sort_unstable_by_key(|extent| extent.number);
    extents
}

fn allocated(looked: &Looked) -> u32 {
    looked.images.iter().map(|image| image.recovered.extents.slots()).sum()
}

fn print_superblock(looked: &Looked) {
    let layout = &looked.layout;
    let copies: Vec<String> = looked
        .copies
        .iter()
        .map(|copy| {
            copy.as_ref().map_or_else(ToString::to_string, |opened| format!("whole, opened {opened} times"))
        })
        .collect();
    let allocated = allocated(looked);
    let space = |slots: u32| format!("{slots} extents, {}", sizes::human(u64::from(slots) * EXTENT_BYTES));
    let mut pairs = vec![
        ("store", layout.store.to_string()),
        ("cluster", layout.cluster.to_string()),
        ("node", layout.node.to_string()),
        ("layout version", VERSION.to_string()),
        ("incarnation", layout.incarnation.to_string()),
        ("opened", format!("{} times", layout.open_count)),
        ("device", sizes::human(layout.device_bytes)),
        ("capacity", space(layout.slots())),
        ("allocated", space(allocated)),
        ("free", space(layout.slots() - allocated)),
        (
            "shards",
            format!("{}, journal {}", layout.shards, sizes::human(u64::from(layout.journal_blocks) * BLOCK)),
        ),
        ("activity log", format!("at most {} regions of a shard", layout.active_max)),
    ];
    for segment in layout.segments.iter().filter(|segment| segment.slots > 0) {
        pairs.push((
            "segment",
            format!(
                "sum pages at {}, data at {}, {} extents",
                segment.pages_offset, segment.data_offset, segment.slots
            ),
        ));
    }
    pairs.extend(copies.into_iter().map(|copy| ("superblock copy", copy)));
    print_pairs(&pairs);
}

fn print_checkpoints(looked: &Looked) {
    println!();
    let headings =
        ["shard", "checkpoint", "place", "extents", "batches", "to place", "active", "scrub run", "scrubbed"];
    let mut table = Table::new(&headings, &[2]);
    for (shard, image) in looked.images.iter().enumerate() {
        let recovered = &image.recovered;
        let active = recovered.extents.iter().filter(|(_, extent)| extent.active).count();
        table.row([
            shard.to_string(),
            recovered.checkpoint_sequence.to_string(),
            place_name(recovered.checkpoint_which).to_owned(),
            recovered.extents.len().to_string(),
            image.findings.batches.to_string(),
            image.unplaced().len().to_string(),
            active.to_string(),
            recovered.scrub.run.to_string(),
            recovered.scrub.cursor.to_string(),
        ]);
    }
    table.print();
}

fn place_name(which: usize) -> &'static str {
    if which == 0 { "A" } else { "B" }
}

fn state_name(state: VolumeState) -> &'static str {
    match state {
        VolumeState::Present => "present",
        VolumeState::Purging => "purging",
    }
}

fn print_volumes(looked: &Looked) {
    println!();
    let mut table =
        Table::new(&["volume", "object", "shard", "size", "extents", "allocated", "state"], &[0, 6]);
    for volume in looked.catalog.volumes() {
        let extents = extents_of(looked, volume).len();
        table.row([
            volume.id.to_string(),
            volume.object.to_string(),
            volume.shard.to_string(),
            sizes::human(volume.size_sectors * SECTOR_BYTES),
            extents.to_string(),
            sizes::human(extents as u64 * EXTENT_BYTES),
            state_name(volume.state).to_owned(),
        ]);
    }
    if table.is_empty() {
        println!("no volumes");
    } else {
        table.print();
    }
}

/// What is kept of replicas, by layer.
fn states_of(looked: &Looked) -> Vec<LayerState> {
    let mut states: Vec<LayerState> =
        looked.images.iter().flat_map(|image| image.recovered.extents.states()).collect();
    states.sort_unstable_by_key(|state| state.object);
    states
}

fn print_replicas(looked: &Looked) {
    let states = states_of(looked);
    if states.is_empty() {
        return;
    }
    println!();
    let headings = ["replica of", "generation", "head", "revision", "epochs", "highest version"];
    let mut table = Table::new(&headings, &[0, 2]);
    for LayerState { object, version, state } in states {
        table.row([
            looked.volume_name(object),
            format!("{}.{}", state.takeover, state.start),
            state.head.to_string(),
            state.revision.to_string(),
            state.epochs.all().len().to_string(),
            version.to_string(),
        ]);
    }
    table.print();
}

fn print_journal(shard: usize, journal: &recovery::Journal) {
    let checkpoint = &journal.checkpoint;
    println!();
    println!(
        "shard {shard}: checkpoint {} (place {}), batch {}, tail at block {}",
        checkpoint.sequence,
        place_name(journal.which),
        checkpoint.lsn,
        checkpoint.tail
    );
    for Found { header, records } in &journal.batches {
        println!(
            "batch {} at block {}: {} records, {} data blocks, placed up to {}, open count {}",
            header.lsn,
            header.position,
            header.records,
            header.data_blocks,
            header.placed_lsn,
            header.open_count
        );
        let mut table = Table::new(
            &["", "record", "slot", "block", "count", "sum", "before", "version", "what"],
            &[0, 1, 8],
        );
        for record in records {
            table.row(record_cells(record));
        }
        if !table.is_empty() {
            table.print();
        }
    }
    if journal.torn_tail {
        println!("a torn batch follows: it was never acknowledged");
    }
}

fn sum_text(sum: Sum) -> String {
    match sum {
        Sum::ABSENT => "absent".to_owned(),
        Sum::ZERO => "zeros".to_owned(),
        Sum::LOST => "lost".to_owned(),
        Sum(value) => format!("{value:08x}"),
    }
}

fn record_cells(record: &Record) -> [String; 9] {
    let no = String::new;
    let slot = record.slot().map_or_else(no, |slot| slot.to_string());
    match *record {
        Record::Set { block, sum, before, version, data, .. } => [
            no(),
            "set".to_owned(),
            slot,
            block.to_string(),
            "1".to_owned(),
            sum_text(sum),
            sum_text(before),
            version.to_string(),
            match data {
                DataAt::Place => "data in place",
                DataAt::Journal => "data in the journal",
                DataAt::FreshPlace => "data in a fresh place",
            }
            .to_owned(),
        ],
        Record::Allocate { object, extent, .. } => [
            no(),
            "allocate".to_owned(),
            slot,
            no(),
            no(),
            no(),
            no(),
            no(),
            format!("extent {extent} of object {object}"),
        ],
        Record::Clear { block, count, state, version, hollow, .. } => [
            no(),
            "clear".to_owned(),
            slot,
            block.to_string(),
            count.to_string(),
            sum_text(state),
            no(),
            version.to_string(),
            if hollow { "goes when all copies know" } else { "" }.to_owned(),
        ],
        Record::Free { object, extent, goes_on, version, .. } => {
            let goes_on = if goes_on { ", which goes on" } else { "" };
            of_layer("free", slot, version, format!("was of extent {extent} of object {object}{goes_on}"))
        }
        Record::Persist(ref state) => {
            let what = format!("object {}: {}", state.object, state_text(state));
            of_layer("persist", slot, state.version, what)
        }
        Record::Forget { object } => {
            let mut cells = plain("forget", slot);
            cells[8] = format!("object {object}");
            cells
        }
        Record::Keep { .. } => plain("keep", slot),
        Record::Activate { .. } => plain("activate", slot),
        Record::Deactivate { .. } => plain("deactivate", slot),
    }
}

fn of_layer(name: &str, slot: String, version: u64, what: String) -> [String; 9] {
    let mut cells = plain(name, slot);
    (cells[7], cells[8]) = (version.to_string(), what);
    cells
}

fn state_text(LayerState { state, .. }: &LayerState) -> String {
    let (takeover, start, epochs) = (state.takeover, state.start, state.epochs.all().len());
    format!("generation {takeover}.{start} of {}, revision {}, {epochs} epochs", state.head, state.revision)
}

fn plain(name: &str, slot: String) -> [String; 9] {
    let no = String::new;
    [no(), name.to_owned(), slot, no(), no(), no(), no(), no(), no()]
}

fn print_extents(looked: &Looked, volume: &Volume) {
    println!();
    println!("volume {}", volume.id);
    let mut table = Table::new(
        &["extent", "slots", "version", "data", "zeros", "lost", "active", "suspect", "hollow"],
        &[6, 7, 8],
    );
    let word = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    for extent in extents_of(looked, volume) {
        let (data, zeros, lost) = states(extent);
        table.row([
            extent.number.to_string(),
            slots_of(extent).iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            extent.version.to_string(),
            data.to_string(),
            zeros.to_string(),
            lost.to_string(),
            word(extent.active),
            word(extent.suspect),
            word(extent.hollow),
        ]);
    }
    if table.is_empty() {
        println!("nothing of it was ever written");
    } else {
        table.print();
    }
}

fn as_json(looked: &Looked, volume: Option<&Volume>, journals: Option<&Vec<recovery::Journal>>) -> Value {
    let layout = &looked.layout;
    let allocated = allocated(looked);
    let segments = layout.segments.iter().filter(|segment| segment.slots > 0).map(|segment| {
        json!({ "pages_offset": segment.pages_offset, "data_offset": segment.data_offset, "slots": segment.slots })
    });
    let copies = looked.copies.iter().map(|copy| match copy {
        Ok(opened) => json!({ "open_count": opened }),
        Err(error) => json!({ "error": error.to_string() }),
    });
    let shards = looked.images.iter().enumerate().map(|(shard, image)| {
        json!({
            "shard": shard,
            "checkpoint": image.recovered.checkpoint_sequence,
            "place": place_name(image.recovered.checkpoint_which),
            "extents": image.recovered.extents.len(),
            "batches": image.findings.batches,
            "blocks_to_place": image.unplaced().len(),
            "scrub_run": image.recovered.scrub.run,
            "scrub_cursor": image.recovered.scrub.cursor,
        })
    });
    let volumes = looked.catalog.volumes().iter().map(|volume| {
        json!({
            "volume": volume.id.to_string(),
            "object": volume.object,
            "shard": volume.shard,
            "size_bytes": volume.size_sectors * SECTOR_BYTES,
            "extents": extents_of(looked, volume).len(),
            "state": state_name(volume.state),
        })
    });
    let mut value = json!({
        "store": layout.store.to_string(),
        "cluster": layout.cluster.to_string(),
        "node": layout.node.to_string(),
        "version": VERSION,
        "incarnation": layout.incarnation,
        "open_count": layout.open_count,
        "device_bytes": layout.device_bytes,
        "extents": layout.slots(),
        "allocated": allocated,
        "journal_bytes": u64::from(layout.journal_blocks) * BLOCK,
        "active_max": layout.active_max,
        "segments": segments.collect::<Vec<_>>(),
        "superblocks": copies.collect::<Vec<_>>(),
        "shards": shards.collect::<Vec<_>>(),
        "volumes": volumes.collect::<Vec<_>>(),
        "replicas": states_of(looked).iter().map(state_json).collect::<Vec<_>>(),
    });
    if let Some(volume) = volume {
        let extents = extents_of(looked, volume).into_iter().map(|extent| {
            let (data, zeros, lost) = states(extent);
            json!({
                "extent": extent.number,
                "slots": slots_of(extent),
                "version": extent.version,
                "data": data,
                "zeros": zeros,
                "lost": lost,
                "active": extent.active,
                "suspect": extent.suspect,
                "hollow": extent.hollow,
            })
        });
        value["volume"] = json!({ "id": volume.id.to_string(), "extents": extents.collect::<Vec<_>>() });
    }
    if let Some(journals) = journals {
        value["journals"] = journals.iter().map(journal_json).collect();
    }
    value
}

fn journal_json(journal: &recovery::Journal) -> Value {
    let batches = journal.batches.iter().map(|Found { header, records }| {
        json!({
            "lsn": header.lsn,
            "position": header.position,
            "placed_lsn": header.placed_lsn,
            "open_count": header.open_count,
            "data_blocks": header.data_blocks,
            "records": records.iter().map(record_json).collect::<Vec<_>>(),
        })
    });
    json!({
        "checkpoint": journal.checkpoint.sequence,
        "lsn": journal.checkpoint.lsn,
        "tail": journal.checkpoint.tail,
        "batches": batches.collect::<Vec<_>>(),
        "torn_tail": journal.torn_tail,
    })
}

fn state_json(LayerState { object, version, state }: &LayerState) -> Value {
    let epochs = state.epochs.all().iter();
    let epochs = epochs.map(|(partition, epoch)| json!({ "partition": partition, "epoch": epoch }));
    json!({
        "object": object,
        "highest_version": version,
        "takeover": state.takeover,
        "start": state.start,
        "head": state.head.to_string(),
        "revision": state.revision,
        "epochs": epochs.collect::<Vec<_>>(),
    })
}

fn record_json(record: &Record) -> Value {
    match *record {
        Record::Set { slot, block, sum, before, version, data } => json!({
            "record": "set", "slot": slot, "block": block, "sum": sum_text(sum), "before": sum_text(before),
            "version": version, "in_journal": data == DataAt::Journal, "fresh_place": data == DataAt::FreshPlace,
        }),
        Record::Allocate { slot, object, extent } => {
            json!({ "record": "allocate", "slot": slot, "object": object, "extent": extent })
        }
        Record::Free { slot, object, extent, goes_on, version } => json!({
            "record": "free", "slot": slot, "object": object, "extent": extent, "goes_on": goes_on,
            "version": version,
        }),
        Record::Clear { slot, block, count, state, version, hollow } => json!({
            "record": "clear", "slot": slot, "block": block, "count": count, "state": sum_text(state),
            "version": version, "hollow": hollow,
        }),
        Record::Keep { slot } => json!({ "record": "keep", "slot": slot }),
        Record::Persist(ref state) => {
            let mut value = state_json(state);
            value["record"] = "persist".into();
            value
        }
        Record::Forget { object } => json!({ "record": "forget", "object": object }),
        Record::Activate { slot } => json!({ "record": "activate", "slot": slot }),
        Record::Deactivate { slot } => json!({ "record": "deactivate", "slot": slot }),
    }
}
