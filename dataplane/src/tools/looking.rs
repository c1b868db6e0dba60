//! Opens a store without changing it.

use std::path::Path;

use anyhow::bail;

use crate::device::{Device, DeviceError};
use crate::store::BLOCK_BYTES;
use crate::store::extent::catalog::Catalog;
use crate::store::extent::format::{FormatError, SHARDS_OFFSET, SUPERBLOCK_OFFSETS, Superblock};
use crate::store::extent::opening;
use crate::store::extent::recovery::Image;

/// A store that is being looked at.
pub(super) struct Looked {
    pub(super) device: Device,
    pub(super) layout: Superblock,
    pub(super) catalog: Catalog,
    /// By shard.
    pub(super) images: Vec<Image>,
    /// What each copy of the superblock says: its open count, or what is wrong.
    pub(super) copies: Vec<Result<u64, FormatError>>,
}

/// Reads all metadata of the store at `path`.
///
/// # Errors
/// What keeps the store from being opened, and what to do.
pub(super) fn look(path: &Path) -> anyhow::Result<Looked> {
    // A store that was cut short is told as that.
    let device = Device::open_read_only(path, SHARDS_OFFSET).map_err(explain)?;
    let copy = |offset_bytes: &u64| Ok(Superblock::decode(&device.read(*offset_bytes, BLOCK_BYTES)?));
    let copies: Result<Vec<_>, DeviceError> = SUPERBLOCK_OFFSETS.iter().map(copy).collect();
    let copies = copies?;
    let formatted_bytes = copies.iter().flatten().map(|copy| copy.device_bytes).max().unwrap_or(0);
    if device.len_bytes() < formatted_bytes {
        let (path, len_bytes) = (path.display().to_string(), device.len_bytes());
        bail!(opening::OpenError::Shrunk { path, len_bytes, formatted_bytes });
    }
    let (layout, catalog, images) = opening::inspect(&device)?;
    let copies = copies.into_iter().map(|copy| copy.map(|copy| copy.open_count)).collect();
    Ok(Looked { device, layout, catalog, images, copies })
}

/// The next step is another one here than for a node.
pub(super) fn explain(error: DeviceError) -> anyhow::Error {
    match error {
        DeviceError::Missing { path } => {
            anyhow::anyhow!(
                "store {path} does not exist: look for it with lsblk, or make a file of it with `torus-dataplane store format {path} --size 10GiB --cluster UUID`"
            )
        }
        DeviceError::InUse { path } => {
            anyhow::anyhow!(
                "store {path} is in use by another process: stop the torusd that serves it, then try again"
            )
        }
        error => error.into(),
    }
}

impl Looked {
    /// The volume that an extent belongs to, for people: one without a volume has the number of its layer.
    pub(super) fn volume_name(&self, object: u32) -> String {
        self.catalog
            .of_object(object)
            .map_or_else(|| format!("(no volume, object {object})"), |volume| volume.id.to_string())
    }
}
