//! The shared memory between the control process and the data plane of a node.
#![deny(unsafe_code)]

mod desired;
mod ids;
mod observed;

pub use desired::{Desired, DesiredExport, DesiredStore, DesiredVolume, LinkChoice, VolumeIntent};
pub use ids::{ClusterId, NodeId, ParseIdError, StoreId, VolumeId};
pub use observed::{
    Durability, ExportState, LinkMode, Observed, ObservedExport, ObservedLink, ObservedStore, ObservedVolume,
    StoreState, VolumeObserved,
};

/// Longest path of a store, in bytes.
pub const MAX_PATH_BYTES: usize = 255;
