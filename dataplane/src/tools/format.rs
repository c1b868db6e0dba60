//! `store format`: makes a store of a blank device.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use cluster_map::{ClusterId, NodeId, StoreId};

use super::looking::explain;
use super::sizes;
use super::table::print_pairs;
use crate::device::Device;
use crate::store::extent::format::{
    BLOCK, DEVICE_BYTES_MIN, JOURNAL_BLOCKS_MAX, JOURNAL_BLOCKS_MIN, SHARDS_MAX, Shape, Superblock,
};
use crate::store::extent::opening::{self, Identity};
use crate::store::{BLOCK_BYTES, EXTENT_BYTES};

/// What `--force` calls everything that is not a Torus store.
const FOREIGN: &str = "foreign";
/// Bytes at both ends that are cleared of what others have left there.
const LABEL_BYTES: u64 = 1 << 20;

const EXAMPLES: &str = "\
Examples:
  torus-dataplane store format /dev/nvme1n1 --cluster 6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c43
  torus-dataplane store format /var/lib/torus/store --size 100GiB --cluster 6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c43
  torus-dataplane store format /dev/sdb --cluster 6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c43 --force foreign";

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Block device, or file
    path: PathBuf,
    /// Make a file of this size, where there is none
    #[arg(long, value_parser = sizes::parse)]
    size: Option<u64>,
    /// The cluster that the store is to belong to
    #[arg(long, value_name = "UUID")]
    cluster: ClusterId,
    /// The node that it is formatted for [default: none]
    #[arg(long, value_name = "UUID")]
    node: Option<NodeId>,
    /// The store's id [default: a random one]
    #[arg(long, value_name = "UUID")]
    id: Option<StoreId>,
    /// Parts that cores can serve independently [default: by size, 2 to 16]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=i64::from(SHARDS_MAX)))]
    shards: Option<u16>,
    /// Size of each shard's journal, 2MiB to 256MiB [default: by size]
    #[arg(long, value_parser = sizes::parse)]
    journal: Option<u64>,
    /// Destroy what is there: the id of the Torus store, or `foreign` for anything else
    #[arg(long, value_name = "WHAT")]
    force: Option<String>,
}

/// Formats.
///
/// # Errors
/// Something is there that was not named, or the device cannot be used.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let shape = Shape { shards: arguments.shards, journal_blocks: journal_blocks(arguments.journal)? };
    let size_bytes = arguments.size.unwrap_or(0);
    let device = Device::open(&arguments.path, size_bytes, DEVICE_BYTES_MIN).map_err(explain)?;
    clear(&device, arguments.force.as_deref())?;
    let fresh = arguments.id.map_or_else(random_id, Ok)?;
    let identity = Identity {
        cluster: arguments.cluster,
        node: arguments.node.unwrap_or_default(),
        expected: None,
        fresh,
    };
    let layout = opening::format(&device, identity, shape)?;
    print_formatted(&arguments.path, &layout);
    Ok(())
}

fn journal_blocks(bytes: Option<u64>) -> anyhow::Result<Option<u32>> {
    let Some(bytes) = bytes else { return Ok(None) };
    let (min, max) = (u64::from(JOURNAL_BLOCKS_MIN), u64::from(JOURNAL_BLOCKS_MAX));
    ensure!(
        bytes.is_multiple_of(BLOCK) && (min..=max).contains(&(bytes / BLOCK)),
        "--journal {} cannot be used: it must be a multiple of 4 KiB from {} to {}",
        sizes::human(bytes),
        sizes::human(min * BLOCK),
        sizes::human(max * BLOCK)
    );
    Ok(Some(u32::try_from(bytes / BLOCK)?))
}

fn random_id() -> anyhow::Result<StoreId> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("cannot make an id: give one with --id")?;
    // RFC 9562, version 4.
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(StoreId(bytes))
}

/// Refuses what is there, unless it was named; then the labels that others look for are cleared.
fn clear(device: &Device, force: Option<&str>) -> anyhow::Result<()> {
    if opening::is_unformatted(device)? {
        return Ok(());
    }
    let (name, what) = what_is_there(device)?;
    let path = device.path().display();
    match force {
        Some(named) if named == name => {}
        Some(named) => bail!("{path} holds {what}, not '{named}': to destroy it give --force {name}"),
        None => bail!(
            "{path} is not blank, it holds {what}: to destroy it give --force {name}, else name another device"
        ),
    }
    eprintln!("destroying {what} on {path}");
    let label_bytes = LABEL_BYTES.min(device.len_bytes() / 2) / BLOCK * BLOCK;
    let tail = (device.len_bytes() - label_bytes) / BLOCK * BLOCK;
    for offset_bytes in [0, tail] {
        device.fill_with_zeros(offset_bytes, label_bytes, |_| true)?;
    }
    Ok(())
}

/// What is on a device: how `--force` names it, and for people.
fn what_is_there(device: &Device) -> anyhow::Result<(String, String)> {
    for offset_bytes in crate::store::extent::format::SUPERBLOCK_OFFSETS {
        if let Ok(layout) = Superblock::decode(&device.read(offset_bytes, BLOCK_BYTES)?) {
            let id = layout.store.to_string();
            let what = format!(
                "Torus store {id} of cluster {} ({}, opened {} times)",
                layout.cluster,
                sizes::human(layout.device_bytes),
                layout.open_count
            );
            return Ok((id, what));
        }
    }
    Ok((FOREIGN.to_owned(), "something that is no whole Torus store".to_owned()))
}

fn print_formatted(path: &Path, layout: &Superblock) {
    let capacity = u64::from(layout.slots()) * EXTENT_BYTES;
    let overhead = layout.device_bytes - capacity;
    print_pairs(&[
        ("store", layout.store.to_string()),
        ("path", path.display().to_string()),
        ("cluster", layout.cluster.to_string()),
        ("capacity", format!("{} ({} extents of 4 MiB)", sizes::human(capacity), layout.slots())),
        (
            "overhead",
            format!(
                "{} of {} ({:.1} %)",
                sizes::human(overhead),
                sizes::human(layout.device_bytes),
                100.0 * overhead as f64 / layout.device_bytes as f64
            ),
        ),
        (
            "shards",
            format!(
                "{}, each with a journal of {}",
                layout.shards,
                sizes::human(u64::from(layout.journal_blocks) * BLOCK)
            ),
        ),
    ]);
}
