//! The records in the metadata store: keys, values, and one consistent view of all of them.
//!
//! Every value is JSON with `"format": 1`. A record of another format, or one that does not parse, makes the whole view an
//! error for everything that decides on it: acting on half a view could take a volume for deleted (I2). The two lease-bound
//! kinds, `live/` and `status/`, only inform; a bad one counts as absent.
//!
//! | key below `torus/` | value |
//! |---|---|
//! | `cluster` | [`ClusterRecord`] |
//! | `config` | [`ConfigRecord`], once anything was set |
//! | `cluster-key` | [`ClusterKeyRecord`], where nodes are not given the key in a file |
//! | `nodes/<node>` | [`NodeRecord`], permanent |
//! | `node-names/<name>` | [`NodeNameRecord`], makes node names unique |
//! | `live/<node>` | [`LiveRecord`], bound to the node's lease |
//! | `status/<node>` | [`StatusRecord`], bound to the node's lease |
//! | `stores/<store>` | [`StoreRecord`]; rewritten by every change of what is placed on it, so that capacity is compared too |
//! | `scrubs/<store>` | [`ScrubRecord`], permanent, so that the number of a store's runs only grows |
//! | `names/<volume name>` | [`NameRecord`], makes volume names unique |
//! | `volumes/<volume>` | [`VolumeRecord`] |
//! | `heads/<volume>` | [`HeadsRecord`], of replicated volumes, from their creation to their end |
//! | `exports/<shelf>.<slot>` | [`ExportRecord`], makes addresses unique |
//! | `macs/<mac>` | [`MacRecord`], makes export MACs unique |
//! | `tombstones/<volume>` | [`TombstoneRecord`] |

use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::fmt;
use std::str::FromStr;

use cluster_map::{ClusterId, ClusterKey, NodeId, PeerAddr, StoreId, VolumeId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::ConfigRecord;
use crate::heads::HeadsRecord;
use crate::meta::{Event, KeyValue, Revision};
use crate::settings::ExportSettings;

/// The format number that this version writes and the only one it reads.
pub const FORMAT: u32 = 1;
/// Everything in the metadata store lies below this prefix.
pub const PREFIX: &str = "torus/";
/// Extent size where `init` names none; volume sizes are rounded up to whole extents.
pub const DEFAULT_EXTENT_BYTES: u64 = 4 << 20;
/// Bytes of a sector, the unit of the AoE protocol.
pub const SECTOR_BYTES: u64 = 512;

/// What is wrong with a record or a name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ModelError {
    /// A record does not parse, or its key does not.
    #[error(
        "metadata record {key} cannot be read: {reason}; restore it from a backup, nothing is changed until then"
    )]
    Damaged {
        /// The record's key.
        key: String,
        /// What the decoder says.
        reason: String,
    },
    /// A record was written by another version.
    #[error(
        "metadata record {key} has format {found}, this version reads format {FORMAT}; run the version that wrote it"
    )]
    Format {
        /// The record's key.
        key: String,
        /// The format it carries.
        found: u64,
    },
    /// A name breaks the rules.
    #[error(
        "\"{0}\" is not a valid name: use 1 to 64 characters of A-Z a-z 0-9 . _ - and start with a letter, a digit or _"
    )]
    Name(String),
    /// An export address breaks the rules.
    #[error(
        "\"{0}\" is not an export address: write SHELF.SLOT with shelf 0 to 65534 (not 4095) and slot 0 to 254, for example 1.1"
    )]
    Address(String),
    /// A MAC address does not parse.
    #[error("\"{0}\" is not a MAC address")]
    Mac(String),
}

/// Serde adapter for what is text outside: `#[serde(with = "text")]`.
pub(crate) mod text {
    use super::{Deserialize, FromStr, fmt};
    use serde::{Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<T: fmt::Display, S: Serializer>(value: &T, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(value)
    }

    pub(crate) fn deserialize<'de, T, D>(d: D) -> Result<T, D::Error>
    where
        T: FromStr,
        T::Err: fmt::Display,
        D: Deserializer<'de>,
    {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

/// Serde adapter for optional identifiers.
pub(crate) mod text_option {
    use super::{Deserialize, FromStr, fmt};
    use serde::{Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<T: fmt::Display, S: Serializer>(
        value: &Option<T>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => s.collect_str(value),
            None => s.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, T, D>(d: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr,
        T::Err: fmt::Display,
        D: Deserializer<'de>,
    {
        Option::<String>::deserialize(d)?.map(|text| text.parse().map_err(D::Error::custom)).transpose()
    }
}

/// Serde adapter for lists of identifiers.
mod text_list {
    use super::{Deserialize, FromStr, fmt};
    use serde::{Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: fmt::Display, S: Serializer>(all: &[T], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(all.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, T, D>(d: D) -> Result<Vec<T>, D::Error>
    where
        T: FromStr,
        T::Err: fmt::Display,
        D: Deserializer<'de>,
    {
        let texts = Vec::<String>::deserialize(d)?;
        texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
}

/// Serde adapter for the cluster's key: 64 hexadecimal digits.
mod hex_key {
    use super::{ClusterKey, Deserialize, parse_key};
    use serde::{Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(key: &ClusterKey, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&key.0.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<ClusterKey, D::Error> {
        // What it is instead is not said: it may be most of a key.
        parse_key(&String::deserialize(d)?).ok_or_else(|| D::Error::custom("not 64 hexadecimal digits"))
    }
}

/// Reads a cluster's key: 64 hexadecimal digits, not all of them zero.
#[must_use]
pub fn parse_key(text: &str) -> Option<ClusterKey> {
    let digits = text.as_bytes();
    let mut key = [0; 32];
    if digits.len() != 2 * key.len() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(ClusterKey(key)).filter(|key| !key.is_nil())
}

/// Serde adapter for sets of addresses.
mod address_set {
    use super::{Address, BTreeSet, Deserialize};
    use serde::{Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(all: &BTreeSet<Address>, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(all.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeSet<Address>, D::Error> {
        let texts = Vec::<String>::deserialize(d)?;
        texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
}

/// Checks a volume or node name: 1–64 characters of `[A-Za-z0-9._-]`, not starting with `-` or `.`.
///
/// # Errors
/// [`ModelError::Name`], which says the rule.
pub fn check_name(name: &str) -> Result<(), ModelError> {
    let ok = (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && !name.starts_with(['-', '.']);
    if ok { Ok(()) } else { Err(ModelError::Name(name.to_owned())) }
}

/// An AoE address: shelf (major) and slot (minor).
///
/// The Linux initiator ignores answers from shelf 0xfff and 0xffff and from slot 0xff, so these are no addresses here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// AoE major.
    pub shelf: u16,
    /// AoE minor.
    pub slot: u8,
}

impl Address {
    /// The address, if initiators accept it.
    #[must_use]
    pub fn new(shelf: u16, slot: u8) -> Option<Self> {
        (shelf != 0xffff && shelf != 0xfff && slot != 0xff).then_some(Self { shelf, slot })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.shelf, self.slot)
    }
}

impl FromStr for Address {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        text.split_once('.')
            .filter(|(shelf, slot)| digits(shelf) && digits(slot))
            .and_then(|(shelf, slot)| Self::new(shelf.parse().ok()?, slot.parse().ok()?))
            .ok_or_else(|| ModelError::Address(text.to_owned()))
    }
}

/// A MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The `attempt`-th MAC of a volume's export: locally administered, unicast, low four bits zero (the data plane adds the
    /// interface's ordinal there). The same volume always gets the same sequence, so that it keeps its MAC when it moves (I6).
    #[must_use]
    pub fn of_volume(volume: VolumeId, attempt: u8) -> Self {
        // FNV-1a over the id, finished by SplitMix64: fixed here, because the result is stored for ever.
        let seed = volume.0.iter().chain([&attempt]).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let [a, b, c, d, e, f, ..] = (mixed ^ (mixed >> 31)).to_be_bytes();
        Self([(a & 0xfc) | 0x02, b, c, d, e, f & 0xf0])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        let bad = || ModelError::Mac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(bad)?, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

/// The cluster itself; written once by `init`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Identity, in every store's superblock.
    #[serde(with = "text")]
    pub id: ClusterId,
    /// When it was initialised, seconds since 1970.
    pub created_unix_s: u64,
    /// Extent size in bytes.
    pub extent_size: u64,
}

/// The cluster's key; written once, by the first node that needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterKeyRecord {
    /// The key.
    #[serde(with = "hex_key")]
    pub key: ClusterKey,
}

/// A path that a node is to open as a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSpec {
    /// File or block device.
    pub path: String,
    /// Size in bytes to create it with; 0 takes what is there.
    pub size: u64,
}

/// A permanent member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Unique name.
    pub name: String,
    /// Failure domain; empty if not given.
    pub zone: String,
    /// Where core 0 of its data plane listens for peers, as `IP:PORT`; the others follow. Empty if not known.
    pub peer_addr: String,
    /// On how many cores its data plane runs; 0 if not told.
    #[serde(default)]
    pub cores: u16,
    /// Where its HTTP API listens.
    pub api_addr: String,
    /// The paths it is to open.
    pub stores: Vec<StoreSpec>,
}

impl NodeRecord {
    /// Where its data plane listens for peers, and on how many cores it runs, if it can be called.
    #[must_use]
    pub fn peer(&self) -> Option<(PeerAddr, u16)> {
        let addr = parse_peer_addr(&self.peer_addr)?;
        (self.cores > 0 && addr.has_ports_for(usize::from(self.cores))).then_some((addr, self.cores))
    }
}

/// Reads `IP:PORT`, with brackets around an IPv6 address.
#[must_use]
pub fn parse_peer_addr(text: &str) -> Option<PeerAddr> {
    let addr: std::net::SocketAddr = text.parse().ok()?;
    Some(PeerAddr { ip: addr.ip(), base_port: addr.port() }).filter(|addr| addr.base_port != 0)
}

/// Who has a node name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeNameRecord {
    /// The node.
    #[serde(with = "text")]
    pub node: NodeId,
}

/// Present while the node's lease is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveRecord {
    /// Process id of torusd.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// The kernel's boot id.
    pub boot: String,
}

/// What one receive queue of an interface got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Interface name.
    pub interface: String,
    /// Queue number.
    pub queue: u16,
    /// Core that serves it.
    pub core: u16,
    /// `zero-copy`, `native copy`, `generic` or `packet`.
    pub mode: String,
    /// Whether frames go between NIC and user memory without a copy in the kernel.
    pub zero_copy: bool,
    /// Buffers a frame may span.
    pub segments: u8,
    /// Interface MTU in bytes.
    pub mtu: u32,
    /// Sectors per request that initiators are told.
    pub max_sectors: u8,
    /// Whether it carries frames.
    pub up: bool,
    /// Why a better mode was not had; empty if it is the best.
    pub note: String,
}

/// What became of one store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Its path on the node.
    pub path: String,
    /// Its identity once read.
    #[serde(with = "text_option")]
    pub id: Option<StoreId>,
    /// `opening`, `ready` or `failed`.
    pub state: String,
    /// When an acknowledged write is durable.
    pub durability: String,
    /// Bytes for volumes.
    pub capacity: u64,
    /// Bytes not allocated.
    pub free: u64,
    /// Bytes of volumes that no record names; never deleted (I2).
    pub orphaned: u64,
    /// Why it failed; empty if it did not.
    pub error: String,
    /// `journal` or `in place`; empty if the data plane does not say, as for a store without checksums.
    #[serde(default)]
    pub writes: String,
    /// Blocks whose checksum did not match since it was opened.
    #[serde(default)]
    pub checksum_errors: u64,
    /// Blocks of which there is no good copy.
    #[serde(default)]
    pub lost_blocks: u64,
    /// The scrub that it has or had last, as the data plane tells.
    #[serde(default)]
    pub scrub: Option<ScrubStatus>,
    /// Its incarnation (I13).
    #[serde(default = "first")]
    pub incarnation: u64,
    /// Into how many shards it was cut at its format.
    #[serde(default)]
    pub shards: u16,
}

fn first() -> u64 {
    1
}

/// How far a scrub is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Number of the run.
    pub run: u64,
    /// `running`, `stopped` or `finished`.
    pub state: String,
    /// Bytes read; while it runs in steps of what its rate allows in a second.
    pub done: u64,
    /// Bytes to read in all.
    pub total: u64,
    /// Damaged blocks that this run found.
    pub errors: u64,
}

/// A volume that is not simply there: being made, resized or purged, or failed, or an orphan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The volume.
    #[serde(with = "text")]
    pub id: VolumeId,
    /// `allocating`, `ready`, `purged`, `orphan` or `failed`.
    pub state: String,
    /// Size in bytes that the data plane was asked for when it said so; 0 if it was asked to purge, or not asked.
    pub wanted: u64,
    /// Size in bytes that the data plane has.
    pub size: u64,
    /// Bytes done of the work in progress.
    pub done: u64,
    /// Why it failed; empty if it did not.
    pub error: String,
}

/// What became of an export that is not served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// The address.
    #[serde(with = "text")]
    pub address: Address,
    /// `waiting` or `failed`.
    pub state: String,
    /// Why it failed; empty if it did not.
    pub error: String,
}

/// What became of a head that does not simply serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadStatus {
    /// The volume.
    #[serde(with = "text")]
    pub volume: VolumeId,
    /// The take-over that made it.
    pub takeover: u64,
    /// `opening`, `serving`, `replaced` or `past`.
    pub state: String,
    /// Extents that are still to be made equal, in steps of 64.
    pub resync_extents: u64,
    /// In how many seconds they will be, in steps; 0 while nobody can say.
    #[serde(default)]
    pub resync_eta_s: u64,
    /// Why requests wait; empty if they do not.
    pub blocked: String,
}

/// A node's summary of itself; bound to its lease.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusRecord {
    /// The data-plane process in words: `running`, or why not.
    pub data_plane: String,
    /// Logical interfaces that it serves on.
    #[serde(default)]
    pub interfaces: Vec<String>,
    /// Link queues.
    pub links: Vec<LinkStatus>,
    /// Stores.
    pub stores: Vec<StoreStatus>,
    /// Volumes in progress or in trouble, and orphans.
    pub volumes: Vec<VolumeStatus>,
    /// Addresses of the exports that are served.
    #[serde(with = "address_set")]
    pub serving: BTreeSet<Address>,
    /// The other exports.
    pub exports: Vec<ExportStatus>,
    /// Its data plane can be head and replica of replicated volumes.
    #[serde(default)]
    pub replicates: bool,
    /// The nodes whose heads its replicas have granted something within the last second: each of them vetoes that another node
    /// takes over from these.
    #[serde(default, with = "text_list", skip_serializing_if = "Vec::is_empty")]
    pub granting: Vec<NodeId>,
    /// Heads that do not simply serve; of all others that it was told of up to `heads_revision` it can be taken that they do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub heads: Vec<HeadStatus>,
    /// Newest revision of a volume's heads record that its data plane has acted on.
    #[serde(default)]
    pub heads_revision: u64,
}

/// A formatted store and the node that has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreRecord {
    /// The node.
    #[serde(with = "text")]
    pub node: NodeId,
    /// Path on that node.
    pub path: String,
    /// Bytes for volumes.
    pub size: u64,
}

/// The last scrub that a store was asked to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    /// Number of the run; one that begins anew has a larger one.
    pub run: u64,
    /// Most bytes to read in a second.
    pub rate: u64,
    /// Stopped where it was, to be resumed.
    pub stopped: bool,
    /// When it was asked for, seconds since 1970.
    pub started_unix_s: u64,
    /// What it came to, once the data plane has said that it is finished.
    #[serde(default)]
    pub finished: Option<ScrubResult>,
}

/// What a scrub came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubResult {
    /// When that was recorded, seconds since 1970.
    pub unix_s: u64,
    /// Bytes that it read.
    pub bytes: u64,
    /// Damaged blocks that it found.
    pub errors: u64,
}

/// Who has a volume name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameRecord {
    /// The volume.
    #[serde(with = "text")]
    pub volume: VolumeId,
}

/// Where a volume is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeState {
    /// Space is being allocated and zeroed.
    Creating,
    /// Usable.
    Ready,
    /// Usable; the data plane has not yet the recorded size.
    Resizing,
    /// Being deleted; there is no way back (I2).
    Purging,
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Ready => "ready",
            Self::Resizing => "resizing",
            Self::Purging => "purging",
        })
    }
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Unique name.
    pub name: String,
    /// Size in bytes, whole extents.
    pub size: u64,
    /// Copies kept.
    pub copies: u8,
    /// The store that holds its one copy; none if it is replicated, and its [`HeadsRecord`] tells.
    #[serde(with = "text_option")]
    pub store: Option<StoreId>,
    /// The node of that store.
    #[serde(with = "text_option")]
    pub node: Option<NodeId>,
    /// Where it is in its life.
    pub state: VolumeState,
    /// Its export's address, until the node has confirmed the export's end.
    #[serde(with = "text_option")]
    pub export: Option<Address>,
    /// When it was created, seconds since 1970.
    pub created_unix_s: u64,
    /// Stores of a replicated volume that have done what its state asks for; once all have, the state changes.
    #[serde(default, with = "text_list", skip_serializing_if = "Vec::is_empty")]
    pub confirmed: Vec<StoreId>,
}

/// An export: a volume at an AoE address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRecord {
    /// The volume.
    #[serde(with = "text")]
    pub volume: VolumeId,
    /// Base MAC.
    #[serde(with = "text")]
    pub mac: Mac,
    /// Refuses writes.
    pub read_only: bool,
    /// Unexported; the record goes once the node has confirmed that it serves it no more (I12).
    #[serde(default)]
    pub ending: bool,
    /// What initiators see and may change.
    #[serde(default, skip_serializing_if = "ExportSettings::is_default")]
    pub settings: ExportSettings,
}

/// Who has a MAC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MacRecord {
    /// The volume.
    #[serde(with = "text")]
    pub volume: VolumeId,
}

/// What is left of a deleted volume: its id is never used again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TombstoneRecord {
    /// The name it had.
    pub name: String,
    /// The store that confirmed the deletion of the one copy.
    #[serde(with = "text_option")]
    pub store: Option<StoreId>,
    /// The stores that confirmed the deletion of a replicated volume: all that owned a part of it.
    #[serde(default, with = "text_list", skip_serializing_if = "Vec::is_empty")]
    pub owners: Vec<StoreId>,
    /// When, seconds since 1970.
    pub deleted_unix_s: u64,
}

/// Keys of the records.
pub mod keys {
    use super::{Address, Mac, NodeId, StoreId, VolumeId};

    /// The cluster record.
    pub const CLUSTER: &str = "torus/cluster";
    /// The cluster's settings.
    pub const CONFIG: &str = "torus/config";
    /// The cluster's key.
    pub const CLUSTER_KEY: &str = "torus/cluster-key";

    macro_rules! key {
        ($($(#[$doc:meta])* $name:ident($arg:ident: $type:ty) = $folder:literal;)*) => {$(
            $(#[$doc])*
            #[must_use]
            pub fn $name($arg: $type) -> String {
                format!(concat!("torus/", $folder, "/{}"), $arg)
            }
        )*};
    }
    key! {
        /// A member.
        node(id: NodeId) = "nodes";
        /// A member's name.
        node_name(name: &str) = "node-names";
        /// A member's sign of life.
        live(id: NodeId) = "live";
        /// A member's summary.
        status(id: NodeId) = "status";
        /// A store.
        store(id: StoreId) = "stores";
        /// A store's last scrub.
        scrub(id: StoreId) = "scrubs";
        /// A volume's name.
        name(name: &str) = "names";
        /// A volume.
        volume(id: VolumeId) = "volumes";
        /// A replicated volume's head and owners.
        heads(id: VolumeId) = "heads";
        /// An export.
        export(address: Address) = "exports";
        /// An export's MAC.
        mac(mac: Mac) = "macs";
        /// A deleted volume.
        tombstone(id: VolumeId) = "tombstones";
    }
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    format: u32,
    #[serde(flatten)]
    record: &'a T,
}

/// A record's value as it is stored.
///
/// # Panics
/// Never: the records hold no map with keys that JSON cannot express.
#[must_use]
pub fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    serde_json::to_vec(&Envelope { format: FORMAT, record }).expect("records serialize to JSON")
}

/// Reads a record's value.
///
/// # Errors
/// [`ModelError::Format`] if another version wrote it, [`ModelError::Damaged`] if it does not parse.
pub fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, ModelError> {
    #[derive(Deserialize)]
    struct Head {
        format: u64,
    }
    let damaged = |e: serde_json::Error| ModelError::Damaged { key: key.to_owned(), reason: e.to_string() };
    let head: Head = serde_json::from_slice(value).map_err(damaged)?;
    if head.format != u64::from(FORMAT) {
        return Err(ModelError::Format { key: key.to_owned(), found: head.format });
    }
    serde_json::from_slice(value).map_err(damaged)
}

/// A record with the revision that last changed it, for compare-and-swap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<T> {
    /// What it says.
    pub record: T,
    /// Its modification revision.
    pub revision: Revision,
}

/// All records at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// The cluster, once initialised.
    pub cluster: Option<Entry<ClusterRecord>>,
    /// The cluster's key, where one has been made.
    pub cluster_key: Option<Entry<ClusterKeyRecord>>,
    /// The cluster's settings, once anything was set.
    pub config: Option<Entry<ConfigRecord>>,
    /// Members.
    pub nodes: BTreeMap<NodeId, Entry<NodeRecord>>,
    /// Owners of node names.
    pub node_names: BTreeMap<String, NodeId>,
    /// Members whose lease is alive.
    pub live: BTreeMap<NodeId, LiveRecord>,
    /// Their summaries.
    pub status: BTreeMap<NodeId, StatusRecord>,
    /// Stores.
    pub stores: BTreeMap<StoreId, Entry<StoreRecord>>,
    /// Their last scrubs.
    pub scrubs: BTreeMap<StoreId, Entry<ScrubRecord>>,
    /// Owners of volume names.
    pub names: BTreeMap<String, Entry<NameRecord>>,
    /// Volumes.
    pub volumes: BTreeMap<VolumeId, Entry<VolumeRecord>>,
    /// Heads and owners of the replicated ones.
    pub heads: BTreeMap<VolumeId, Entry<HeadsRecord>>,
    /// Exports.
    pub exports: BTreeMap<Address, Entry<ExportRecord>>,
    /// Owners of MACs.
    pub macs: BTreeMap<Mac, VolumeId>,
    /// Deleted volumes.
    pub tombstones: BTreeMap<VolumeId, TombstoneRecord>,
    /// What the volumes of each store come to.
    placed: BTreeMap<StoreId, Placed>,
}

/// What volumes come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Placed {
    /// How many.
    pub volumes: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl View {
    /// Reads all entries of one snapshot.
    ///
    /// # Errors
    /// The first record that cannot be read, except among the informative `live/` and `status/` records.
    pub fn read<'a>(entries: impl IntoIterator<Item = &'a KeyValue>) -> Result<Self, ModelError> {
        let mut view = Self::default();
        for entry in entries {
            view.add(entry)?;
        }
        Ok(view)
    }

    /// Follows one change.
    ///
    /// # Errors
    /// The record, or the key, cannot be read; then there is no such record in the view.
    pub fn follow(&mut self, event: &Event) -> Result<(), ModelError> {
        // An informative record that cannot be read counts as absent, not as what it was.
        self.remove(event.key())?;
        match event {
            Event::Put(kv) => self.add(kv),
            Event::Delete { .. } => Ok(()),
        }
    }

    /// Reads one more entry.
    ///
    /// # Errors
    /// As [`View::read`].
    pub fn add(&mut self, kv: &KeyValue) -> Result<(), ModelError> {
        let key = kv.key.as_str();
        if key == keys::CLUSTER {
            self.cluster = Some(entry(kv)?);
            return Ok(());
        }
        if key == keys::CLUSTER_KEY {
            self.cluster_key = Some(entry(kv)?);
            return Ok(());
        }
        if key == keys::CONFIG {
            self.config = Some(entry(kv)?);
            return Ok(());
        }
        let Some((kind, rest)) = kind_of(key) else { return Ok(()) };
        match kind {
            "nodes" => drop(self.nodes.insert(part(key, rest)?, entry(kv)?)),
            "node-names" => {
                self.node_names.insert(rest.to_owned(), entry::<NodeNameRecord>(kv)?.record.node);
            }
            "live" => {
                if let (Ok(node), Ok(live)) = (part(key, rest), decode(key, &kv.value)) {
                    self.live.insert(node, live);
                }
            }
            "status" => {
                if let (Ok(node), Ok(status)) = (part(key, rest), decode(key, &kv.value)) {
                    self.status.insert(node, status);
                }
            }
            "stores" => drop(self.stores.insert(part(key, rest)?, entry(kv)?)),
            "scrubs" => drop(self.scrubs.insert(part(key, rest)?, entry(kv)?)),
            "names" => drop(self.names.insert(rest.to_owned(), entry(kv)?)),
            "volumes" => {
                let (id, volume) = (part(key, rest)?, entry::<VolumeRecord>(kv)?);
                self.recount(id, |view| drop(view.volumes.insert(id, volume)));
            }
            "heads" => {
                let (id, heads) = (part(key, rest)?, entry::<HeadsRecord>(kv)?);
                let broken =
                    |reason: &str| ModelError::Damaged { key: key.to_owned(), reason: reason.to_owned() };
                heads.record.check().map_err(broken)?;
                self.recount(id, |view| drop(view.heads.insert(id, heads)));
            }
            "exports" => drop(self.exports.insert(part(key, rest)?, entry(kv)?)),
            "macs" => {
                self.macs.insert(part(key, rest)?, entry::<MacRecord>(kv)?.record.volume);
            }
            "tombstones" => {
                self.tombstones.insert(part(key, rest)?, entry::<TombstoneRecord>(kv)?.record);
            }
            // Keys of a later version do not concern this one.
            _ => {}
        }
        Ok(())
    }

    fn remove(&mut self, key: &str) -> Result<(), ModelError> {
        if key == keys::CLUSTER {
            self.cluster = None;
            return Ok(());
        }
        if key == keys::CLUSTER_KEY {
            self.cluster_key = None;
            return Ok(());
        }
        if key == keys::CONFIG {
            self.config = None;
            return Ok(());
        }
        let Some((kind, rest)) = kind_of(key) else { return Ok(()) };
        match kind {
            "nodes" => drop(self.nodes.remove(&part(key, rest)?)),
            "node-names" => drop(self.node_names.remove(rest)),
            "live" => drop(part(key, rest).map(|node| self.live.remove(&node))),
            "status" => drop(part(key, rest).map(|node| self.status.remove(&node))),
            "stores" => drop(self.stores.remove(&part(key, rest)?)),
            "scrubs" => drop(self.scrubs.remove(&part(key, rest)?)),
            "names" => drop(self.names.remove(rest)),
            "volumes" => {
                let id = part(key, rest)?;
                self.recount(id, |view| drop(view.volumes.remove(&id)));
            }
            "heads" => {
                let id = part(key, rest)?;
                self.recount(id, |view| drop(view.heads.remove(&id)));
            }
            "exports" => drop(self.exports.remove(&part(key, rest)?)),
            "macs" => drop(self.macs.remove(&part(key, rest)?)),
            "tombstones" => drop(self.tombstones.remove(&part(key, rest)?)),
            _ => {}
        }
        Ok(())
    }

    /// Makes a change to what is known of a volume, and counts anew what it takes of its owners.
    fn recount(&mut self, id: VolumeId, change: impl FnOnce(&mut Self)) {
        let before = self.taken(id);
        change(self);
        for (store, bytes) in before {
            if let btree_map::Entry::Occupied(mut placed) = self.placed.entry(store) {
                placed.get_mut().volumes -= 1;
                placed.get_mut().bytes = placed.get().bytes.saturating_sub(bytes);
                if placed.get().volumes == 0 {
                    placed.remove();
                }
            }
        }
        for (store, bytes) in self.taken(id) {
            let placed = self.placed.entry(store).or_default();
            placed.volumes += 1;
            placed.bytes = placed.bytes.saturating_add(bytes);
        }
    }

    /// What a volume takes of each of its owners, at most: an owner of some partitions counts as one of all.
    fn taken(&self, id: VolumeId) -> Vec<(StoreId, u64)> {
        let Some(volume) = self.volumes.get(&id) else { return Vec::new() };
        self.owners(id).into_iter().map(|(store, _)| (store, volume.record.size)).collect()
    }

    /// The stores that own a part of a volume, with their nodes. None of a replicated volume whose heads record is missing:
    /// then nobody knows, and nothing is served or deleted.
    #[must_use]
    pub fn owners(&self, id: VolumeId) -> Vec<(StoreId, NodeId)> {
        let Some(volume) = self.volumes.get(&id).map(|volume| &volume.record) else { return Vec::new() };
        if let (Some(store), Some(node)) = (volume.store, volume.node) {
            return vec![(store, node)];
        }
        let heads = self.heads.get(&id).into_iter();
        heads.flat_map(|heads| &heads.record.members).map(|member| (member.store, member.node)).collect()
    }

    /// The node that serves a volume: its head's, or that of its only copy.
    #[must_use]
    pub fn serving_node(&self, id: VolumeId) -> Option<NodeId> {
        let volume = &self.volumes.get(&id)?.record;
        volume.node.or_else(|| Some(self.heads.get(&id)?.record.head))
    }

    /// The name of that node for people.
    #[must_use]
    pub fn serving_label(&self, id: VolumeId) -> String {
        self.serving_node(id).map_or_else(|| "none".into(), |node| self.node_label(node))
    }

    /// A volume by name or, failing that, by id.
    #[must_use]
    pub fn volume(&self, name_or_id: &str) -> Option<(VolumeId, &Entry<VolumeRecord>)> {
        let id = match self.names.get(name_or_id) {
            Some(name) => name.record.volume,
            None => name_or_id.parse().ok()?,
        };
        self.volumes.get(&id).map(|volume| (id, volume))
    }

    /// An export by its volume's name or id or, failing that, by its address.
    #[must_use]
    pub fn export(&self, volume_or_address: &str) -> Option<(Address, &Entry<ExportRecord>)> {
        let address = match self.volume(volume_or_address) {
            Some((_, volume)) => volume.record.export?,
            None => volume_or_address.parse().ok()?,
        };
        self.exports.get(&address).map(|export| (address, export))
    }

    /// A node by name or, failing that, by id.
    #[must_use]
    pub fn node(&self, name_or_id: &str) -> Option<(NodeId, &Entry<NodeRecord>)> {
        let id = match self.node_names.get(name_or_id) {
            Some(id) => *id,
            None => name_or_id.parse().ok()?,
        };
        self.nodes.get(&id).map(|node| (id, node))
    }

    /// A node's name for people; its id if the record is gone.
    #[must_use]
    pub fn node_label(&self, id: NodeId) -> String {
        self.nodes.get(&id).map_or_else(|| id.to_string(), |node| node.record.name.clone())
    }

    /// What the nodes of a volume say about the work on it, if that answers what the record asks for now: first who failed,
    /// else who is least far.
    #[must_use]
    pub fn volume_report(&self, id: VolumeId) -> Option<&VolumeStatus> {
        let volume = &self.volumes.get(&id)?.record;
        let wanted = if volume.state == VolumeState::Purging { 0 } else { volume.size };
        let nodes: BTreeSet<_> = self.owners(id).into_iter().map(|(_, node)| node).collect();
        let live = nodes.iter().filter(|node| self.live.contains_key(node));
        let reports = live.filter_map(|node| self.status.get(node)).flat_map(|status| &status.volumes);
        let of_it = reports.filter(|report| report.id == id && report.wanted == wanted);
        of_it.min_by_key(|report| (report.state != "failed", report.done))
    }

    /// What the volumes on a store come to.
    #[must_use]
    pub fn placed(&self, store: StoreId) -> Placed {
        self.placed.get(&store).copied().unwrap_or_default()
    }

    /// A store by id or, failing that, by its path, if one node only has it.
    #[must_use]
    pub fn store(&self, id_or_path: &str) -> Option<(StoreId, &Entry<StoreRecord>)> {
        if let Some(found) = id_or_path.parse().ok().and_then(|id| self.stores.get_key_value(&id)) {
            return Some((*found.0, found.1));
        }
        let mut found = self.stores.iter().filter(|(_, store)| store.record.path == id_or_path);
        let (id, store) = found.next()?;
        found.next().is_none().then_some((*id, store))
    }

    /// What the node of a store last said about it.
    #[must_use]
    pub fn store_status(&self, id: StoreId) -> Option<&StoreStatus> {
        let node = self.stores.get(&id)?.record.node;
        self.status.get(&node)?.stores.iter().find(|s| s.id == Some(id))
    }
}

/// Splits a key into its folder and the rest.
fn kind_of(key: &str) -> Option<(&str, &str)> {
    key.strip_prefix(PREFIX)?.split_once('/')
}

fn entry<T: DeserializeOwned>(kv: &KeyValue) -> Result<Entry<T>, ModelError> {
    Ok(Entry { record: decode(&kv.key, &kv.value)?, revision: kv.mod_revision })
}

fn part<T: FromStr>(key: &str, rest: &str) -> Result<T, ModelError>
where
    T::Err: fmt::Display,
{
    rest.parse()
        .map_err(|e: T::Err| ModelError::Damaged { key: key.to_owned(), reason: format!("bad key: {e}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heads::MemberRecord;
    use proptest::prelude::*;

    fn kv(key: String, value: Vec<u8>) -> KeyValue {
        KeyValue { key, value, mod_revision: Revision(7), lease: None }
    }

    fn volume() -> VolumeRecord {
        VolumeRecord {
            name: "v".into(),
            size: 4 << 20,
            copies: 1,
            store: Some(StoreId([2; 16])),
            node: Some(NodeId([3; 16])),
            state: VolumeState::Ready,
            export: Address::new(1, 1),
            created_unix_s: 1,
            confirmed: Vec::new(),
        }
    }

    #[test]
    fn records_carry_their_format_and_ids_as_text() {
        let text = String::from_utf8(encode(&volume())).unwrap();
        assert!(text.contains("\"format\":1"), "{text}");
        assert!(text.contains("\"export\":\"1.1\""), "{text}");
        assert!(text.contains("\"02020202-0202-0202-0202-020202020202\""), "{text}");
        assert_eq!(decode::<VolumeRecord>("k", text.as_bytes()), Ok(volume()));
    }

    #[test]
    fn another_format_is_refused_and_named() {
        let text = String::from_utf8(encode(&volume())).unwrap().replace("\"format\":1", "\"format\":2");
        let error = decode::<VolumeRecord>("torus/volumes/x", text.as_bytes()).unwrap_err();
        assert_eq!(error, ModelError::Format { key: "torus/volumes/x".into(), found: 2 });
        let missing = decode::<VolumeRecord>("k", b"{}").unwrap_err();
        assert!(matches!(missing, ModelError::Damaged { .. }));
    }

    #[test]
    fn a_status_of_the_former_version_is_read() {
        let text = r#"{"path":"/s","id":null,"state":"ready","durability":"","capacity":1,"free":1,
            "orphaned":0,"error":""}"#;
        let status: StoreStatus = serde_json::from_str(text).unwrap();
        assert_eq!((status.writes.as_str(), status.checksum_errors, status.scrub), ("", 0, None));
    }

    #[test]
    fn stores_are_found_by_id_and_by_a_path_of_their_own() {
        let record = |n: u8, path: &str| {
            let record = StoreRecord { node: NodeId([n; 16]), path: path.into(), size: 1 };
            kv(keys::store(StoreId([n; 16])), encode(&record))
        };
        let view = View::read([&record(1, "/a"), &record(2, "/b"), &record(3, "/b")]).unwrap();
        let found = |text: &str| view.store(text).map(|(id, _)| id.0[0]);
        assert_eq!(found(&StoreId([3; 16]).to_string()), Some(3));
        assert_eq!((found("/a"), found("/b"), found("/c")), (Some(1), None, None));
    }

    #[test]
    fn one_unreadable_volume_spoils_the_view_but_a_status_does_not() {
        let node = NodeId([3; 16]);
        let good = kv(keys::volume(VolumeId([1; 16])), encode(&volume()));
        let bad_status = kv(keys::status(node), b"not json".to_vec());
        let view = View::read([&good, &bad_status]).unwrap();
        assert_eq!(view.volumes.len(), 1);
        assert!(view.status.is_empty());
        let bad = kv(keys::volume(VolumeId([4; 16])), b"{\"format\":1}".to_vec());
        assert!(View::read([&good, &bad]).is_err());
        let bad_key = kv("torus/volumes/nonsense".into(), encode(&volume()));
        assert!(View::read([&bad_key]).is_err());
        let later = kv("torus/partitions/1".into(), b"?".to_vec());
        assert!(View::read([&later]).is_ok());
    }

    #[test]
    fn a_key_is_stored_as_text_and_never_said() {
        let record = ClusterKeyRecord { key: ClusterKey([0xab; 32]) };
        let stored = kv(keys::CLUSTER_KEY.into(), encode(&record));
        assert!(String::from_utf8_lossy(&stored.value).contains(&"ab".repeat(32)));
        let view = View::read([&stored]).unwrap();
        assert_eq!(view.cluster_key.as_ref().unwrap().record, record);
        assert!(!format!("{view:?}").contains("abab") && !format!("{view:?}").contains("171, 171"));
        for bad in ["ab".repeat(31), "00".repeat(32), "xy".repeat(32), "ab".repeat(33)] {
            let text = format!(r#"{{"format":1,"key":"{bad}"}}"#);
            let error = View::read([&kv(keys::CLUSTER_KEY.into(), text.into())]).unwrap_err().to_string();
            assert!(error.contains("64 hexadecimal digits") && !error.contains(&bad), "{error}");
        }
    }

    #[test]
    fn a_replicated_volume_counts_on_every_owner_and_an_unsound_record_spoils_the_view() {
        let id = VolumeId([1; 16]);
        let member =
            |n| MemberRecord { store: StoreId([n; 16]), incarnation: 1, node: NodeId([n; 16]), shards: 1 };
        let heads = HeadsRecord::new(vec![member(4), member(5)], NodeId([5; 16]), 0, 0);
        let replicated = VolumeRecord { store: None, node: None, copies: 2, ..volume() };
        let (volume, record) =
            (kv(keys::volume(id), encode(&replicated)), kv(keys::heads(id), encode(&heads)));
        for order in [[&volume, &record], [&record, &volume]] {
            let view = View::read(order).unwrap();
            let placed = Placed { volumes: 1, bytes: 4 << 20 };
            assert_eq!((view.placed(StoreId([4; 16])), view.placed(StoreId([5; 16]))), (placed, placed));
            assert_eq!(view.serving_node(id), Some(NodeId([5; 16])));
        }
        let alone = View::read([&volume]).unwrap();
        assert_eq!((alone.owners(id), alone.serving_node(id)), (Vec::new(), None));
        let unsound = HeadsRecord { takeover: 0, ..heads };
        let error = View::read([&kv(keys::heads(id), encode(&unsound))]).unwrap_err().to_string();
        assert!(error.contains("torus/heads/") && error.contains("take-over"), "{error}");
    }

    #[test]
    fn peers_are_called_where_every_core_has_a_port() {
        let node = |peer_addr: &str, cores| NodeRecord {
            name: "n".into(),
            zone: String::new(),
            peer_addr: peer_addr.into(),
            cores,
            api_addr: String::new(),
            stores: Vec::new(),
        };
        assert!(node("10.0.0.1:4330", 2).peer().is_some() && node("[fd00::1]:4330", 1).peer().is_some());
        for (addr, cores) in
            [("", 1), ("10.0.0.1", 1), ("10.0.0.1:0", 1), ("10.0.0.1:4330", 0), ("10.0.0.1:65535", 2)]
        {
            assert_eq!(node(addr, cores).peer(), None, "{addr} {cores}");
        }
    }

    #[test]
    fn names_follow_the_rule() {
        for good in ["a", "A.b_c-9", "_x", &"n".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".a", "-a", "a/b", "a b", "ü", &"n".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_that_linux_ignores_are_refused() {
        assert_eq!("1.1".parse(), Ok(Address { shelf: 1, slot: 1 }));
        assert_eq!("65534.254".parse(), Ok(Address { shelf: 65534, slot: 254 }));
        for bad in ["", "1", "1.", ".1", "1.255", "65535.1", "4095.1", "+1.1", "1.1.1", "70000.1", "1.256"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn macs_are_stable_local_unicast_with_room_for_interfaces() {
        // Stored for ever: a change of the derivation must fail here.
        let first = Mac::of_volume(VolumeId([1; 16]), 0).to_string();
        assert_eq!(first, MAC_OF_ONES);
        let mut seen = std::collections::BTreeSet::new();
        for byte in 0..=255u8 {
            for attempt in 0..4 {
                let mac = Mac::of_volume(VolumeId([byte; 16]), attempt);
                assert_eq!(mac.0[0] & 3, 2, "{mac}");
                assert_eq!(mac.0[5] & 0xf, 0, "{mac}");
                assert!(seen.insert(mac), "{mac} twice");
                assert_eq!(mac.to_string().parse(), Ok(mac));
            }
        }
    }
    /// A key of one kind and a value for it; a status or a sign of life may be unreadable.
    fn sample(kind: u8, n: u8, change: u8) -> (String, Vec<u8>) {
        let (node, store, id) = (NodeId([n; 16]), StoreId([n; 16]), VolumeId([n; 16]));
        let address = Address::new(u16::from(n), change).unwrap();
        let mac = Mac::of_volume(id, 0);
        let name = change.to_string();
        let unreadable = |value: Vec<u8>| if change == 3 { b"?".to_vec() } else { value };
        match kind {
            0 => (
                keys::CLUSTER.into(),
                encode(&ClusterRecord { id: ClusterId([n; 16]), created_unix_s: 1, extent_size: 1 }),
            ),
            1 => {
                let record = NodeRecord {
                    name: name.clone(),
                    zone: String::new(),
                    peer_addr: String::new(),
                    cores: 0,
                    api_addr: String::new(),
                    stores: Vec::new(),
                };
                (keys::node(node), encode(&record))
            }
            2 => (keys::node_name(&n.to_string()), encode(&NodeNameRecord { node: NodeId([change; 16]) })),
            3 => (
                keys::live(node),
                unreadable(encode(&LiveRecord { pid: 1, version: name, boot: String::new() })),
            ),
            4 => (
                keys::status(node),
                unreadable(encode(&StatusRecord { data_plane: name, ..StatusRecord::default() })),
            ),
            5 => (keys::store(store), encode(&StoreRecord { node, path: name, size: 1 })),
            6 => (keys::name(&n.to_string()), encode(&NameRecord { volume: VolumeId([change; 16]) })),
            7 => {
                let (size, store) = (u64::from(change), Some(StoreId([change; 16])));
                // One of three is replicated.
                let (store, node) = if n == 2 { (None, None) } else { (store, volume().node) };
                (keys::volume(id), encode(&VolumeRecord { name, size, store, node, ..volume() }))
            }
            8 => (
                keys::export(address),
                encode(&ExportRecord {
                    volume: id,
                    mac,
                    read_only: false,
                    ending: false,
                    settings: ExportSettings::default(),
                }),
            ),
            10 => {
                let member =
                    |n: u8| MemberRecord { store: StoreId([n; 16]), incarnation: 1, node, shards: 1 };
                let members = (change..change + 3).map(member).collect();
                (keys::heads(id), encode(&HeadsRecord::new(members, node, 0, 0)))
            }
            12 => {
                let resync_rate = Some(u64::from(change));
                (keys::CONFIG.into(), encode(&ConfigRecord { resync_rate }))
            }
            11 => (keys::CLUSTER_KEY.into(), encode(&ClusterKeyRecord { key: ClusterKey([change; 32]) })),
            9 => (keys::mac(mac), encode(&MacRecord { volume: VolumeId([change; 16]) })),
            _ => {
                let (run, rate, started_unix_s) = (u64::from(change), 1, 1);
                let scrub = ScrubRecord { run, rate, stopped: false, started_unix_s, finished: None };
                (keys::scrub(store), encode(&scrub))
            }
        }
    }

    const MAC_OF_ONES: &str = "26:f6:29:0a:47:50";

    proptest! {
        #[test]
        fn decoding_is_total(key in ".{0,30}", value in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = View::read([&kv(format!("torus/{key}"), value.clone())]);
            let _ = View::read([&kv(keys::volume(VolumeId([1; 16])), value)]);
        }

        #[test]
        fn following_is_the_same_as_reading_anew(
            steps in proptest::collection::vec((0u8..14, 0u8..3, 0u8..4), 1..60),
        ) {
            let (mut entries, mut view) = (BTreeMap::new(), View::default());
            for (revision, (kind, n, change)) in (1..).map(Revision).zip(steps) {
                let (key, value) = sample(kind, n, change);
                if change == 0 {
                    entries.remove(&key);
                    view.follow(&Event::Delete { key, revision }).unwrap();
                } else {
                    let kv = KeyValue { key: key.clone(), value, mod_revision: revision, lease: None };
                    view.follow(&Event::Put(kv.clone())).unwrap();
                    entries.insert(key, kv);
                }
                prop_assert_eq!(&view, &View::read(entries.values()).unwrap());
            }
        }

        #[test]
        fn addresses_round_trip(shelf in any::<u16>(), slot in any::<u8>()) {
            if let Some(address) = Address::new(shelf, slot) {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}
