//! The shared memory between the control process (`torusd`) and the data plane (`torus-dataplane`) of a node.
//!
//! State passes through it as whole, numbered versions: [`Desired`] from the control process, [`Observed`] from the data
//! plane, statistics from every core. Nothing is a command that could be lost: either process can crash, restart or be
//! upgraded alone, attach again and converge from the newest version. Losing the control process stops changes, never
//! running I/O: no reader ever waits for a writer.
//!
//! What holds, whatever either process does or dies in the middle of:
//! - a reader gets a whole version or an error, never a mixture, and never an older one than before;
//! - every area has one writer at a time (by type and by a lock on the file);
//! - bytes from the other process give a value or an error, never undefined behaviour or a panic;
//! - a program of layout level N works with one of level N−1 and refuses others, saying what to do.
//!
//! `docs/decisions/0003-shared-map.md` says why it is built like this. The two-slot protocol (module `slot`) and the
//! statistics (modules `stats` and `clients`) are model-checked with loom under `--cfg loom`.
#![deny(unsafe_code)]
#![cfg_attr(loom, allow(dead_code, unused_imports, unused_macros))]

mod change;
mod clients;
mod desired;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod ids;
mod layout;
#[cfg(not(loom))]
mod map;
mod observed;
mod record;
mod replication;
pub mod ring;
#[cfg(not(loom))]
mod shared;
mod slot;
mod stats;
mod sync;

pub use change::{
    Change, ChangeAnswer, ChangeOutcome, ChangeRequest, MAX_CHANGES, MAX_CONFIG_STRING_BYTES,
    MAX_LISTED_MACS, MaskEdit, SetRule,
};
pub use clients::{ClientCounter, ClientSnapshot};
pub use desired::{
    Allow, AoePolicy, Desired, DesiredExport, DesiredStore, DesiredVolume, EVERY_INTERFACE, LinkChoice,
    MAX_INTERFACES, ScrubWish, SteeringChoice, VolumeIntent,
};
pub use error::{MapError, Role};
pub use ids::{ClusterId, NodeId, ParseIdError, StoreId, VolumeId};
pub use layout::{Geometry, LEVEL};
#[cfg(not(loom))]
pub use map::{ControlMap, CoreClients, CoreStats, DataMap, MapReader};
pub use observed::{
    Durability, ExportState, LinkLosses, LinkMode, MAX_NOTE_BYTES, Observed, ObservedExport, ObservedLink,
    ObservedStore, ObservedVolume, ScrubObserved, ScrubState, StoreState, VolumeObserved, WritePath,
};
pub use replication::{
    ClusterKey, DesiredHead, DesiredPeer, Granting, HeadOwner, HeadPartition, HeadState, MAX_CHANGED_MEMBERS,
    MAX_OWNERS, MAX_PARTITIONS, MemberId, MemberWish, ObservedHead, PeerAddr, StaleMark,
};
pub use stats::{
    BUCKETS, CoreSnapshot, Counter, HistogramSnapshot, LONGEST_NS, Latency, bucket_bounds, bucket_of,
};

/// Longest path of a store, in bytes.
pub const MAX_PATH_BYTES: usize = 255;
