//! The observed state: what the data plane has and does.
//!
//! The counterpart of [`Desired`](crate::Desired): whole, level-triggered, carrying the desired version that it answers.

use crate::{StoreId, VolumeId};

/// The whole state of the data plane of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Set by [`DataMap::publish_observed`](crate::DataMap::publish_observed), grows by one; 0: never published.
    pub version: u64,
    /// The desired version that was acted on.
    pub applied: u64,
    /// Process id of the data plane.
    pub pid: u32,
    /// One entry per interface queue.
    pub links: Vec<ObservedLink>,
    /// One entry per store that was asked for.
    pub stores: Vec<ObservedStore>,
    /// Every volume that was asked for or found.
    pub volumes: Vec<ObservedVolume>,
    /// One entry per export that was asked for.
    pub exports: Vec<ObservedExport>,
}

/// One queue of one interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedLink {
    /// Name of the interface.
    pub interface: String,
    /// Index of the queue.
    pub queue: u16,
    /// The CPU whose reactor owns the queue.
    pub core: u16,
    /// How frames pass between NIC and memory.
    pub mode: LinkMode,
    /// Most buffers that one frame may be made of.
    pub segments: u8,
    /// Largest Ethernet payload in bytes.
    pub mtu: u32,
    /// Most sectors of 512 bytes that one AoE frame carries here.
    pub max_sectors: u8,
    /// Carrier is present and the interface is up.
    pub up: bool,
    /// The interface's own MAC address.
    pub mac: [u8; 6],
    /// Why a better mode was not had; empty when the best one was.
    pub note: String,
}

/// How frames pass between NIC and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LinkMode {
    /// AF_XDP, the NIC reads and writes the process's memory.
    XdpZeroCopy,
    /// AF_XDP in the driver, frames are copied.
    XdpNativeCopy,
    /// AF_XDP on socket buffers, for drivers without XDP.
    XdpGeneric,
    /// AF_PACKET.
    #[default]
    Packet,
}

/// A store that was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedStore {
    /// Its path, as asked for.
    pub path: String,
    /// The id that it carries, once it has been read.
    pub id: Option<StoreId>,
    /// Where opening it has got to.
    pub state: StoreState,
    /// What an acknowledged write survives on it (I3).
    pub durability: Durability,
    /// Bytes that volumes may occupy in all.
    pub capacity_bytes: u64,
    /// Bytes that are not occupied.
    pub free_bytes: u64,
    /// Why it failed; empty otherwise.
    pub error: String,
}

/// Where opening a store has got to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum StoreState {
    /// Being opened or formatted.
    #[default]
    Opening,
    /// In use.
    Ready,
    /// Not usable, see the error.
    Failed,
}

/// What an acknowledged write survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// The death of the process, not of the machine: a memory file system.
    #[default]
    Memory,
    /// A power cut: the device has no volatile cache.
    WriteThrough,
    /// A power cut: every write carries the order to empty the device's cache (`RWF_DSYNC`).
    DsyncWriteBack,
}

/// A volume that was asked for or found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedVolume {
    /// The volume.
    pub id: VolumeId,
    /// The store that holds it.
    pub store: StoreId,
    /// Where it stands.
    pub state: VolumeObserved,
    /// Its size in sectors of 512 bytes.
    pub size_sectors: u64,
    /// Bytes allocated (or purged) so far.
    pub done_bytes: u64,
    /// Why it failed; empty otherwise.
    pub error: String,
}

/// Where a volume stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VolumeObserved {
    /// Space is being allocated and zero-filled, see `done_bytes`.
    #[default]
    Allocating,
    /// Usable.
    Ready,
    /// Its data is deleted.
    Purged,
    /// Found in a store but not asked for; kept (I2).
    Orphan,
    /// Not usable, see the error.
    Failed,
}

/// An export that was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedExport {
    /// The volume.
    pub volume: VolumeId,
    /// AoE major address.
    pub shelf: u16,
    /// AoE minor address.
    pub slot: u8,
    /// Whether it is served.
    pub state: ExportState,
    /// The size that initiators are told, in sectors of 512 bytes.
    pub size_sectors: u64,
    /// Why it failed; empty otherwise.
    pub error: String,
}

/// Whether an export is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExportState {
    /// For its store or volume.
    #[default]
    Waiting,
    /// Requests are answered.
    Serving,
    /// Not served, see the error.
    Failed,
}
