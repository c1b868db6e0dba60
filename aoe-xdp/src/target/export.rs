//! One exported volume as the wire sees it: who it is, who may see it, and who may change what over AoE.

use crate::identify::{IDENTIFY_LEN, Identity};
use crate::wire::{Address, Mac};

/// Most MACs of a mask list and of a reservation: their answers (540 and 410 bytes) fit a frame of every MTU from 576 up,
/// and looking a source up costs a few cache lines.
pub const LIST_MAX: usize = 64;

/// One exported volume, as the wire sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Identifies the export for as long as it exists, whatever other exports come and go.
    pub key: u32,
    /// Where it answers.
    pub address: Address,
    /// Its own MAC; an interface's ordinal is added to the low four bits of the last byte, so that two interfaces on one
    /// segment differ.
    pub mac: Mac,
    /// Size in 512-byte sectors, below 2^48.
    pub size_sectors: u64,
    /// Writes are aborted.
    pub read_only: bool,
    /// IDENTIFY's serial number, at most 20 ASCII characters.
    pub serial: String,
    /// The config string, at most 1024 bytes.
    pub config_string: Vec<u8>,
    /// Bit i: it exists on the interface with ordinal i.
    pub on_interfaces: u16,
    /// Who it exists for, at most [`LIST_MAX`]; empty: everyone.
    pub masks: Vec<Mac>,
    /// Who may read, write and flush, at most [`LIST_MAX`]; empty: everyone.
    pub reserved_for: Vec<Mac>,
    /// Who may change what over AoE.
    pub allow: AoePolicy,
}

/// On every interface.
pub const ON_ALL_INTERFACES: u16 = u16::MAX;

/// Who may change what of an export over AoE; by default nobody anything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AoePolicy {
    /// The config string.
    pub config: Allow,
    /// The MAC mask list.
    pub masks: Allow,
    /// The reservation; a release is a change of it too.
    pub reserve: Allow,
}

/// Who may do something.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Allow {
    /// Nobody.
    #[default]
    Nobody,
    /// Everyone who can reach the export.
    Anyone,
    /// Stations with these MACs.
    Only(Vec<Mac>),
}

impl Allow {
    /// Whether this station may.
    #[must_use]
    pub fn permits(&self, station: Mac) -> bool {
        match self {
            Allow::Nobody => false,
            Allow::Anyone => true,
            Allow::Only(stations) => stations.contains(&station),
        }
    }
}

impl Export {
    /// The export's MAC on the interface with this ordinal.
    #[must_use]
    pub fn mac_on(&self, ordinal: u8) -> Mac {
        let mut mac = self.mac;
        mac.0[5] |= ordinal & 0x0f;
        mac
    }

    /// Whether it exists on the interface with this ordinal.
    #[must_use]
    pub fn is_on(&self, ordinal: u8) -> bool {
        self.on_interfaces >> (ordinal & 0x0f) & 1 != 0
    }

    /// Whether the mask list lets this station see it.
    #[must_use]
    pub fn is_seen_by(&self, station: Mac) -> bool {
        self.masks.is_empty() || self.masks.contains(&station)
    }

    /// Whether somebody else has reserved it.
    #[must_use]
    pub fn is_reserved_against(&self, station: Mac) -> bool {
        !self.reserved_for.is_empty() && !self.reserved_for.contains(&station)
    }

    /// Whom to tell of it unasked: everyone, or each station of the mask list.
    #[must_use]
    pub fn audience(&self) -> &[Mac] {
        if self.masks.is_empty() { &[Mac::BROADCAST] } else { &self.masks }
    }

    /// Writes the data of an IDENTIFY answer.
    pub fn identify(&self, out: &mut [u8; IDENTIFY_LEN]) {
        Identity {
            size_sectors: self.size_sectors,
            serial: &self.serial,
            firmware: env!("CARGO_PKG_VERSION"),
            model: "Torus volume",
        }
        .write(out);
    }
}
