//! The desired state: what the control process wants the data plane to do.
//!
//! One [`Desired`] is the whole wish of a node, never a difference and never a command: either process may miss any
//! number of versions, crash or be replaced, and the newest version alone is enough to converge.

use crate::{ClusterId, NodeId, StoreId, VolumeId};

/// The whole wish of the control process for one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Set by [`ControlMap::publish`](crate::ControlMap::publish), grows by one; 0: never published.
    pub version: u64,
    /// The cluster that the node belongs to; must be the map's.
    pub cluster: ClusterId,
    /// The node; must be the map's.
    pub node: NodeId,
    /// The CPUs to run a reactor on; core index `i` of the statistics is `cores[i]`. Read at data-plane start only.
    pub cores: Vec<u16>,
    /// How frames are sent and received. Read at data-plane start only.
    pub link: LinkChoice,
    /// Names of the network interfaces to serve on, in ordinal order. Read at data-plane start only.
    pub interfaces: Vec<String>,
    /// The stores to open.
    pub stores: Vec<DesiredStore>,
    /// The volumes to have, and those to purge.
    pub volumes: Vec<DesiredVolume>,
    /// The volumes to serve, with their addresses.
    pub exports: Vec<DesiredExport>,
    /// Finish what is in flight, then exit with code 0.
    pub drain: bool,
}

/// Which kind of link the data plane is to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LinkChoice {
    /// AF_XDP where it can be had, else AF_PACKET.
    #[default]
    Auto,
    /// AF_XDP or an error.
    AfXdp,
    /// AF_PACKET.
    AfPacket,
}

/// A store to open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredStore {
    /// Path of the file or block device, 1 to [`MAX_PATH_BYTES`](crate::MAX_PATH_BYTES) bytes.
    pub path: String,
    /// Size to give it when it is created, in bytes; 0: take what is there.
    pub size_bytes: u64,
    /// The id that the store is expected to carry; `None` until it is known.
    pub id: Option<StoreId>,
}

/// A volume to have on a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DesiredVolume {
    /// The volume.
    pub id: VolumeId,
    /// The store that holds it.
    pub store: StoreId,
    /// Size in sectors of 512 bytes.
    pub size_sectors: u64,
    /// Whether it is to exist or to go.
    pub state: VolumeIntent,
}

/// What is to become of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VolumeIntent {
    /// Keep it, creating it where it is absent.
    #[default]
    Active,
    /// Delete its data; there is no way back (I2).
    Purging,
}

/// A volume to serve under an AoE address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DesiredExport {
    /// The volume.
    pub volume: VolumeId,
    /// AoE major address.
    pub shelf: u16,
    /// AoE minor address.
    pub slot: u8,
    /// Base of the export's own MAC addresses (I6): the low 4 bits of the last byte are 0, and the ordinal of the
    /// interface is added to it.
    pub mac: [u8; 6],
    /// Refuse writes.
    pub read_only: bool,
}
