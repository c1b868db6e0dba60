//! Bodies of requests and answers. What is served here is what `--json` prints.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An error.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What is wrong and what to do.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// Stable word for programs.
    pub code: String,
    /// What is wrong.
    pub message: String,
    /// The next step; may be empty.
    pub hint: String,
}

/// Version of the answering process.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Version of torusd.
    pub version: String,
    /// Version of the API.
    pub api: String,
}

/// The cluster.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Cluster {
    /// Identity.
    pub id: String,
    /// When it was initialised, seconds since 1970.
    pub created_unix_s: u64,
    /// Extent size in bytes; volume sizes are multiples of it.
    pub extent_size_bytes: u64,
}

/// The answering node and what it knows of the cluster.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// `connected` or `disconnected since …`.
    pub metadata: String,
    /// Where the metadata is kept.
    pub metadata_store: String,
    /// Version of torusd.
    pub version: String,
    /// Id of the answering node.
    pub node_id: String,
    /// Name of the answering node.
    pub node: String,
    /// The cluster, once initialised.
    pub cluster: Option<Cluster>,
    /// What the node waits for or cannot do; empty if all is well.
    pub problem: String,
    /// How this node's data plane is.
    pub data_plane: String,
    /// Members.
    pub nodes: u64,
    /// Members with a live session.
    pub nodes_live: u64,
    /// Stores.
    pub stores: u64,
    /// Volumes.
    pub volumes: u64,
    /// Exports.
    pub exports: u64,
    /// Bytes of all stores that are ready.
    pub capacity_bytes: u64,
    /// Bytes of them that new volumes can have.
    pub available_bytes: u64,
}

/// Initialises a cluster.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InitRequest {
    /// Extent size in bytes, a power of two from 1 MiB to 64 MiB; 4 MiB if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extent_size_bytes: Option<u64>,
}

/// What initialising came to.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct InitAnswer {
    /// The cluster.
    pub cluster: Cluster,
    /// False if it was initialised before; then nothing was changed.
    pub created: bool,
}

/// A member.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NodeSummary {
    /// Identity.
    pub id: String,
    /// Name.
    pub name: String,
    /// Failure domain; may be empty.
    pub zone: String,
    /// Whether its session is alive.
    pub live: bool,
    /// Version of its torusd; empty if it is not live.
    pub version: String,
    /// Where its API listens.
    pub api_addr: String,
    /// Where its data plane listens for peers; may be empty.
    pub peer_addr: String,
    /// How its data plane is; empty if it is not live.
    pub data_plane: String,
    /// Whether it can have copies of replicated volumes.
    pub replicates: bool,
    /// Stores that are ready.
    pub stores: u64,
    /// Volumes on it.
    pub volumes: u64,
    /// Bytes of its ready stores.
    pub capacity_bytes: u64,
    /// Bytes of them that new volumes can have.
    pub available_bytes: u64,
}

/// All members.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NodeList {
    /// `connected` or `disconnected since …`.
    pub metadata: String,
    /// The members.
    pub nodes: Vec<NodeSummary>,
}

/// One queue of an interface.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Link {
    /// Interface.
    pub interface: String,
    /// Queue number.
    pub queue: u16,
    /// Core that serves it.
    pub core: u16,
    /// `zero-copy`, `native copy`, `generic` or `packet`.
    pub mode: String,
    /// Whether the kernel copies no frame.
    pub zero_copy: bool,
    /// Buffers that a frame may span.
    pub segments: u8,
    /// MTU in bytes.
    pub mtu: u32,
    /// Sectors of 512 bytes per request that initiators are told.
    pub max_sectors: u8,
    /// Whether it carries frames.
    pub up: bool,
    /// Why a better mode was not had; may be empty.
    pub note: String,
    /// Frames that the queue lost since it was opened, by reason; only the node itself can tell, so they are missing in
    /// another node's answer. Interfaces on one queue show the same numbers.
    pub losses: Option<BTreeMap<String, u64>>,
}

/// A store.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Store {
    /// Identity; empty until it is formatted or read.
    pub id: String,
    /// Name of its node.
    pub node: String,
    /// Path on that node.
    pub path: String,
    /// `opening`, `ready`, `failed`, or `unknown` if the node is not live.
    pub state: String,
    /// What an acknowledged write survives.
    pub durability: String,
    /// Bytes for volumes.
    pub capacity_bytes: u64,
    /// Bytes that volumes occupy: an extent is occupied when it is first written.
    pub used_bytes: u64,
    /// Bytes that new volumes can have: what is not promised to others, occupied or not.
    pub available_bytes: u64,
    /// Bytes of volumes that no record names; they are kept.
    pub orphaned_bytes: u64,
    /// Volumes on it.
    pub volumes: u64,
    /// The way of written data: `journal` or `in place`; empty if the store is not open or keeps no checksums.
    pub write_path: String,
    /// Blocks whose checksum did not match since it was opened.
    pub checksum_errors: u64,
    /// Blocks of which there is no good copy.
    pub lost_blocks: u64,
    /// The last scrub that it was asked to have; absent if there was none.
    pub scrub: Option<Scrub>,
    /// Why it failed; may be empty.
    pub error: String,
}

/// A scrub of a store: every block in use is read and compared with its checksum.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Scrub {
    /// Number of the run; one that begins anew has a larger one.
    pub run: u64,
    /// `waiting` until its node has begun, `running`, `stopped`, `finished`, or `unknown` if its node is not live.
    pub state: String,
    /// Most bytes that it reads in a second.
    pub rate_bytes_per_s: u64,
    /// Bytes read, as far as the node has told.
    pub done_bytes: u64,
    /// Bytes to read in all, as far as the node has told.
    pub total_bytes: u64,
    /// Damaged blocks that this run found.
    pub errors: u64,
    /// When it was asked for, seconds since 1970.
    pub started_unix_s: u64,
    /// When it was recorded as finished, seconds since 1970.
    pub finished_unix_s: Option<u64>,
}

/// A store with its scrub, and how current the answer is.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ScrubAnswer {
    /// `connected` or `disconnected since …`.
    pub metadata: String,
    /// The store.
    pub store: Store,
}

/// Bytes in a second.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum ScrubRate {
    /// As a number.
    Bytes(u64),
    /// As a text with a unit, such as `100MiB`.
    Text(String),
}

/// A scrub to begin, to change or to resume.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScrubRequest {
    /// Most to read in a second, such as `100MiB` or a number of bytes; where it is not given, 64 MiB for a new run, and
    /// unchanged for one that there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<ScrubRate>,
    /// Go on with the run that was stopped, where it was.
    #[serde(default)]
    pub resume: bool,
}

/// Stores.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct StoreList {
    /// `connected` or `disconnected since …`.
    pub metadata: String,
    /// The stores.
    pub stores: Vec<Store>,
}

/// A distribution of latencies.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// Mean in nanoseconds.
    pub mean_ns: f64,
    /// Median in nanoseconds.
    pub p50_ns: u64,
    /// 99th percentile in nanoseconds.
    pub p99_ns: u64,
    /// Longest in nanoseconds.
    pub max_ns: u64,
}

/// What one core of the data plane counted since the map was made.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Core {
    /// CPU number.
    pub core: u16,
    /// Counters by name.
    pub counters: BTreeMap<String, u64>,
    /// From a read's arrival to its reply being queued.
    pub read: Latency,
    /// From a write's arrival to its reply being queued.
    pub write: Latency,
}

/// A volume that the node reports apart: in progress, failed, or an orphan.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VolumeReport {
    /// Identity.
    pub id: String,
    /// Name; empty for an orphan.
    pub name: String,
    /// `allocating`, `ready`, `purged`, `orphan` or `failed`.
    pub state: String,
    /// Size in bytes that the data plane has.
    pub size_bytes: u64,
    /// Bytes done of the work in progress.
    pub done_bytes: u64,
    /// Why it failed; may be empty.
    pub error: String,
}

/// A member in full.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// `connected` or `disconnected since …`.
    pub metadata: String,
    /// The summary.
    pub node: NodeSummary,
    /// Interfaces that it serves on, such as `eth0` or `eth0@100`.
    pub interfaces: Vec<String>,
    /// Link queues.
    pub links: Vec<Link>,
    /// Stores.
    pub stores: Vec<Store>,
    /// Volumes in progress or in trouble, and orphans.
    pub volumes: Vec<VolumeReport>,
    /// Counters per core; only the node itself can tell, so they are missing in another node's answer.
    pub cores: Option<Vec<Core>>,
}

/// Names a store for a node to open.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StoreRequest {
    /// Absolute path of a file or block device on that node.
    pub path: String,
    /// Size in bytes to create the file with; 0 or absent takes what is there.
    #[serde(default)]
    pub size_bytes: u64,
}

/// A change was taken in.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    /// What happens now.
    pub message: String,
}

/// A volume to create.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeRequest {
    /// Unique name, 1–64 of `[A-Za-z0-9._-]`, not starting with `-` or `.`.
    pub name: String,
    /// Size in bytes; rounded up to whole extents.
    pub size_bytes: u64,
    /// Copies; min(3, nodes) if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies: Option<u8>,
    /// Copies that are to stay in sync; two of three or more, else one, if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_copies: Option<u8>,
}

/// A volume's new size.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// Size in bytes; rounded up to whole extents.
    pub size_bytes: u64,
    /// Allows a smaller size, which cuts off the end.
    #[serde(default)]
    pub allow_data_loss: bool,
}

/// A setting of the cluster.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// The value in force, as a number; of a rate bytes per second, 0 for no limit.
    pub value: u64,
    /// The value as people write it.
    pub words: String,
    /// Whether it was set; else it has its default.
    pub is_set: bool,
    /// Its default, as people write it.
    pub default: String,
    /// What it is for.
    pub description: String,
}

/// The settings of the cluster.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct SettingList {
    /// How current this is.
    pub metadata: String,
    /// By name.
    pub settings: Vec<Setting>,
}

/// A setting of the cluster.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct SettingAnswer {
    /// How current this is.
    pub metadata: String,
    /// The setting.
    pub setting: Setting,
}

/// What a setting is to be.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingRequest {
    /// As people write it, such as `200MiB` or `none`; `default` takes it back.
    pub value: String,
}

/// Who is to be the head of a volume.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveHeadRequest {
    /// Name or id of a node with a copy in sync, or `self` for the answering node. The node that is head takes a wish back.
    pub node: String,
}

/// Work in progress.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// A copy of a replicated volume, or a part of one.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VolumeCopy {
    /// Name of its node.
    pub node: String,
    /// Whether that node's session is alive.
    pub node_live: bool,
    /// Path of its store on that node.
    pub store: String,
    /// Identity of its store.
    pub store_id: String,
    /// `in sync`, `stale` (it misses writes) or `incomplete` (it has not everything yet).
    pub state: String,
}

/// The head of a replicated volume: it answers the initiators and keeps the copies equal.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VolumeHead {
    /// Name of its node.
    pub node: String,
    /// How often the volume has got a head.
    pub takeover: u64,
    /// `opening`, `serving`, `handed over`, `replaced`, `past`, or `unknown` if its node is not live or cannot name all of its heads.
    pub state: String,
    /// Copies that must be in sync for requests to be carried out.
    pub copies_needed: u64,
    /// Extents that are still to be made equal on copies that are brought up to date, in steps of 64.
    pub resync_extents: u64,
    /// In how many seconds they will be, in steps, if it goes on as it did; 0 while nobody can say.
    #[serde(default)]
    pub resync_eta_s: u64,
    /// Why requests wait; may be empty.
    pub blocked: String,
    /// Name of the node that is to be head next; empty if none is.
    #[serde(default)]
    pub moving_to: String,
}

/// A volume.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Identity.
    pub id: String,
    /// Name.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Copies.
    pub copies: u8,
    /// Copies in sync, where there are fewest; 0 also while nobody knows.
    pub copies_in_sync: u64,
    /// Head of a replicated volume; absent where there is one copy.
    pub head: Option<VolumeHead>,
    /// The copies of a replicated volume; empty where there is one copy.
    pub owners: Vec<VolumeCopy>,
    /// `creating`, `ready`, `resizing` or `purging`.
    pub state: String,
    /// Name of its node: of the head's, if it is replicated.
    pub node: String,
    /// Whether that node's session is alive.
    pub node_live: bool,
    /// Path of its store on that node.
    pub store: String,
    /// Identity of its store.
    pub store_id: String,
    /// `SHELF.SLOT` of its export, if it has one.
    pub export: Option<String>,
    /// When it was created, seconds since 1970.
    pub created_unix_s: u64,
    /// Work in progress, as far as the node has told.
    pub progress: Option<Progress>,
    /// Why it failed; may be empty.
    pub error: String,
}

/// All volumes.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VolumeList {
    /// `connected` or `disconnected since …`.
    pub metadata: String,
    /// The volumes, by name.
    pub volumes: Vec<Volume>,
}

/// A volume and how current the answer is.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VolumeAnswer {
    /// `connected` or `disconnected since …`.
    pub metadata: String,
    /// The volume.
    pub volume: Volume,
}

/// A volume to export.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// Name or id of the volume.
    pub volume: String,
    /// `SHELF.SLOT`; the next free address if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Interfaces of the volume's node to serve it on, such as `eth0` or `eth0@100`; all if none is named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<String>,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// Who may change its settings over AoE; nobody if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
}

/// An export's config string.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigString {
    /// At most 1024 bytes: printable ASCII as it is, `\\` for a backslash, `\xHH` for any other byte; empty: none.
    pub config_string: String,
}

/// A list of initiators.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MacList {
    /// Their MAC addresses, at most 64.
    pub macs: Vec<String>,
}

/// Changes of a list of initiators; first what goes, then what comes.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MacListEdit {
    /// MAC addresses that are to be in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<String>,
    /// MAC addresses that are not to be in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
}

fn nobody() -> String {
    "none".into()
}

/// Who may change an export's settings over AoE: each `none`, `any`, or MAC addresses with commas between.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The config string.
    #[serde(default = "nobody")]
    pub config: String,
    /// The mask list.
    #[serde(default = "nobody")]
    pub masks: String,
    /// The reservation.
    #[serde(default = "nobody")]
    pub reserve: String,
}

/// Changes of a policy; what is not named stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyEdit {
    /// Who may change the config string.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// Who may change the mask list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masks: Option<String>,
    /// Who may change the reservation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserve: Option<String>,
}

/// An export.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Export {
    /// `SHELF.SLOT`.
    pub address: String,
    /// Name of the volume.
    pub volume: String,
    /// Identity of the volume.
    pub volume_id: String,
    /// Name of the node that serves it.
    pub node: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Copies of the volume.
    pub copies: u8,
    /// Copies in sync, where there are fewest; 0 also while nobody knows.
    pub copies_in_sync: u64,
    /// Base MAC address.
    pub mac: String,
    /// Refuses writes.
    pub read_only: bool,
    /// `waiting`, `serving`, `failed`, `ending`, or `unknown` if the node is not live.
    pub state: String,
    /// Name of the block device on a Linux initiator.
    pub device: String,
    /// Interfaces that it is served on; empty: all of its node.
    pub interfaces: Vec<String>,
    /// Config string: printable ASCII as it is, `\\` for a backslash, `\xHH` for any other byte.
    pub config_string: String,
    /// MAC addresses of the initiators that are answered; empty: all.
    pub masks: Vec<String>,
    /// MAC addresses of the initiators that it is reserved for; empty: not reserved.
    pub reserved_for: Vec<String>,
    /// Who may change these over AoE.
    pub policy: Policy,
    /// Why it failed; may be empty.
    pub error: String,
}

/// All exports.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ExportList {
    /// `connected` or `disconnected since …`.
    pub metadata: String,
    /// The exports, by address.
    pub exports: Vec<Export>,
}

/// An export and how current the answer is.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ExportAnswer {
    /// `connected` or `disconnected since …`.
    pub metadata: String,
    /// The export; absent once it has ended.
    pub export: Option<Export>,
}

/// An initiator, and what it asked of one export.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ExportClient {
    /// Its MAC address.
    pub mac: String,
    /// Milliseconds since its newest request.
    pub last_seen_ms_ago: u64,
    /// Milliseconds since it was seen first.
    pub first_seen_ms_ago: u64,
    /// Its requests in progress.
    pub in_flight: u64,
    /// The most that it had in progress at one time: the window that it uses.
    pub in_flight_max: u64,
    /// Counters by name.
    pub counters: BTreeMap<String, u64>,
    /// From a read's arrival to its reply being queued; up to 25 % too long.
    pub read: Latency,
    /// From a write's arrival to its reply being queued; up to 25 % too long.
    pub write: Latency,
}

/// The initiators that use an export.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ClientList {
    /// Name of the node that serves the export and counted.
    pub node: String,
    /// `SHELF.SLOT`.
    pub address: String,
    /// The initiators, those first that were seen last.
    pub clients: Vec<ExportClient>,
}
