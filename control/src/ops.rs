//! Changes of the cluster's metadata: each is planned by a pure function over one [`View`] and committed as one
//! compare-and-swap transaction over every record that the plan depended on.
//!
//! A conflict plans again on a fresh view. An outcome that is not known plans again too: the plan then either finds its own
//! work done, or is committed under compares that its first copy, should it still arrive, breaks. Plans are therefore
//! idempotent for the request that they were made for.
//!
//! Data is only ever given up by [`delete_volume`], [`resize_volume`] with its flag, and what [`crate::reconcile`] writes
//! once a data plane has confirmed (I2). An address and its MAC are free again only when the node has confirmed that it
//! serves them no more (I12).

use std::fmt;
use std::time::Duration;

use cluster_map::{ClusterId, ClusterKey, MAX_OWNERS, MAX_PATH_BYTES, NodeId, StoreId, VolumeId};

use crate::heads::HeadsRecord;
use crate::meta::{Compare, MetaError, MetaStore, Revision, Txn, TxnOutcome};
use crate::model::{
    Address, ClusterKeyRecord, ClusterRecord, Entry, ExportRecord, MacRecord, ModelError, NameRecord,
    NodeNameRecord, NodeRecord, PREFIX, ScrubRecord, StoreRecord, StoreSpec, View, VolumeRecord, VolumeState,
    check_name, encode, keys,
};
use crate::placement::{self, PlacementError, available_bytes};
use crate::settings::{ExportSettings, Policy, SettingError, parse_interfaces};
use crate::size::human;

/// Smallest store that holds its own metadata and a volume.
pub const MIN_STORE_BYTES: u64 = 64 << 20;
/// Bytes that a scrub reads in a second where nobody says otherwise.
pub const DEFAULT_SCRUB_RATE: u64 = 64 << 20;
/// Times that a plan is made before a change gives up against concurrent ones.
const ATTEMPTS: u32 = 24;

/// What kind of refusal, for the HTTP status and the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// The request is wrong by itself.
    Invalid,
    /// What it names does not exist.
    NotFound,
    /// It does not go with the present state.
    Conflict,
    /// Not enough space.
    NoSpace,
    /// The metadata store cannot be reached.
    Unavailable,
    /// A fault of ours or of the stored records.
    Internal,
}

/// Why a change was not made, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What kind.
    pub kind: RefusalKind,
    /// Stable word for programs.
    pub code: &'static str,
    /// What is wrong.
    pub message: String,
    /// The next step.
    pub hint: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(
        kind: RefusalKind,
        code: &'static str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { kind, code, message: message.into(), hint: hint.into() }
    }

    fn not_initialised() -> Self {
        Self::new(
            RefusalKind::Conflict,
            "not_initialised",
            "the cluster is not initialised",
            "run `torusctl init` once",
        )
    }

    fn not_exported(volume: &str) -> Self {
        let message = format!("volume {volume} is not exported");
        Self::new(RefusalKind::Conflict, "not_exported", message, "see `torusblk list`")
    }

    pub(crate) fn no_volume(name: &str) -> Self {
        Self::new(
            RefusalKind::NotFound,
            "no_such_volume",
            format!("there is no volume {name}"),
            "see `torusctl volume list`",
        )
    }

    pub(crate) fn no_node(name: &str) -> Self {
        Self::new(
            RefusalKind::NotFound,
            "no_such_node",
            format!("there is no node {name}"),
            "see `torusctl node list`",
        )
    }
}

impl From<SettingError> for Refusal {
    fn from(error: SettingError) -> Self {
        let code = match error {
            SettingError::StringTooLong(_) | SettingError::Escape(_) | SettingError::Hex(_) => {
                "bad_config_string"
            }
            SettingError::TooManyMacs(_) | SettingError::NoStation(_) | SettingError::Mac(_) => "bad_mac",
            SettingError::Interface(_)
            | SettingError::InterfaceTwice(_)
            | SettingError::TooManyInterfaces(_) => "bad_interface",
        };
        Self::new(RefusalKind::Invalid, code, error.to_string(), "")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, "; {}", self.hint) }
    }
}

impl std::error::Error for Refusal {}

impl From<ModelError> for Refusal {
    fn from(error: ModelError) -> Self {
        let (kind, code) = match &error {
            ModelError::Damaged { .. } | ModelError::Format { .. } => {
                (RefusalKind::Internal, "metadata_damaged")
            }
            ModelError::Name(_) => (RefusalKind::Invalid, "bad_name"),
            ModelError::Address(_) | ModelError::Mac(_) => (RefusalKind::Invalid, "bad_address"),
        };
        Self::new(kind, code, error.to_string(), "")
    }
}

impl From<PlacementError> for Refusal {
    fn from(error: PlacementError) -> Self {
        match error {
            PlacementError::NoStore => Self::new(
                RefusalKind::NoSpace,
                "no_store",
                error.to_string(),
                "see `torusctl node show` for the state of the stores",
            ),
            PlacementError::TooFewNodes { .. } => Self::new(
                RefusalKind::Conflict,
                "replication_missing",
                error.to_string(),
                "use --copies 1, or as many copies as there are such nodes: see `torusctl node show`",
            ),
            PlacementError::NoSpace { .. } => Self::new(
                RefusalKind::NoSpace,
                "no_space",
                error.to_string(),
                "make it smaller, delete a volume, or add a store with `torusctl store add`",
            ),
        }
    }
}

impl From<MetaError> for Refusal {
    fn from(error: MetaError) -> Self {
        match error {
            MetaError::Unavailable(_) | MetaError::LeaseGone(_) => Self::new(
                RefusalKind::Unavailable,
                "metadata_unavailable",
                error.to_string(),
                "running I/O is not affected; bring the metadata store back and repeat",
            ),
            MetaError::Unknown(_) => Self::new(
                RefusalKind::Unavailable,
                "outcome_unknown",
                error.to_string(),
                "it may or may not have been done: look (list or show) before you repeat",
            ),
            MetaError::Invalid(_) => {
                Self::new(RefusalKind::Internal, "metadata_refused", error.to_string(), "")
            }
        }
    }
}

/// What a plan comes to.
#[derive(Debug)]
pub enum Plan<T> {
    /// Commit this, then answer that.
    Commit(Txn, T),
    /// Nothing is left to do.
    Done(T),
}

/// Plans on fresh lists and commits until the plan is done, and returns its answer with a revision at which it is visible.
/// `unknown` is the error of a former attempt whose outcome is not known.
///
/// # Errors
/// The plan's refusal, [`RefusalKind::Unavailable`] if the store is, `busy` if others kept winning.
pub async fn apply<T>(
    meta: &dyn MetaStore,
    mut unknown: Option<MetaError>,
    mut plan: impl FnMut(&View) -> Result<Plan<T>, Refusal>,
) -> Result<(T, Revision), Refusal> {
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            // Spread contenders without a random source: their process ids and attempts differ.
            let spread = u64::from(std::process::id().wrapping_mul(2_654_435_761) >> 27);
            tokio::time::sleep(Duration::from_millis(u64::from(attempt) * 3 + spread)).await;
        }
        let snapshot = match meta.list(PREFIX).await {
            Ok(snapshot) => snapshot,
            // After an unknown outcome, not being able to look must not read as "surely not done".
            Err(error) => return Err(unknown.unwrap_or(error).into()),
        };
        let view = View::read(&snapshot.entries)?;
        let (txn, answer) = match plan(&view)? {
            Plan::Commit(txn, answer) => (txn, answer),
            Plan::Done(answer) => return Ok((answer, snapshot.revision)),
        };
        match meta.txn(txn).await {
            Ok(TxnOutcome::Committed(revision)) => return Ok((answer, revision)),
            Ok(TxnOutcome::Conflict) => {}
            Err(error @ MetaError::Unknown(_)) => unknown = Some(error),
            Err(error) => return Err(unknown.unwrap_or(error).into()),
        }
    }
    Err(unknown.map_or_else(
        || {
            Refusal::new(
                RefusalKind::Conflict,
                "busy",
                "other changes kept coming first; nothing was changed",
                "repeat it",
            )
        },
        Into::into,
    ))
}

/// Condition: the record is still the one that was seen.
fn unchanged<T>(key: impl Into<String>, entry: &Entry<T>) -> Compare {
    Compare::Revision(key.into(), entry.revision)
}

fn initialised(view: &View) -> Result<&ClusterRecord, Refusal> {
    view.initialised()
}

impl View {
    /// The cluster.
    pub(crate) fn initialised(&self) -> Result<&ClusterRecord, Refusal> {
        self.cluster.as_ref().map(|c| &c.record).ok_or_else(Refusal::not_initialised)
    }
}

/// Whether an `init` made the cluster or found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initialised {
    /// The cluster.
    pub cluster: ClusterRecord,
    /// False if it had been initialised before; then nothing was changed.
    pub created: bool,
}

/// Initialises the cluster as `id`, or finds it initialised.
///
/// # Errors
/// The extent size is not a power of two of 1–64 MiB.
pub fn init(
    view: &View,
    id: ClusterId,
    extent_size: u64,
    now_unix_s: u64,
) -> Result<Plan<Initialised>, Refusal> {
    if !extent_size.is_power_of_two() || !(1 << 20..=64 << 20).contains(&extent_size) {
        return Err(Refusal::new(
            RefusalKind::Invalid,
            "bad_extent_size",
            format!("an extent of {} is not possible", human(extent_size)),
            "use a power of two from 1MiB to 64MiB; the default is 4MiB",
        ));
    }
    if let Some(cluster) = &view.cluster {
        let created = cluster.record.id == id;
        return Ok(Plan::Done(Initialised { cluster: cluster.record.clone(), created }));
    }
    let cluster = ClusterRecord { id, created_unix_s: now_unix_s, extent_size };
    let txn = Txn::new().when(Compare::Absent(keys::CLUSTER.into())).put(keys::CLUSTER, encode(&cluster));
    Ok(Plan::Commit(txn, Initialised { cluster, created: true }))
}

/// Keeps a key for the cluster, unless there is one.
///
/// # Errors
/// The cluster is not initialised.
pub fn make_key(view: &View, key: ClusterKey) -> Result<Plan<()>, Refusal> {
    initialised(view)?;
    if view.cluster_key.is_some() {
        return Ok(Plan::Done(()));
    }
    let absent = Compare::Absent(keys::CLUSTER_KEY.into());
    Ok(Plan::Commit(Txn::new().when(absent).put(keys::CLUSTER_KEY, encode(&ClusterKeyRecord { key })), ()))
}

/// Makes the node a member, or brings its record up to date. Stores that it opened before are kept, named again or not; a
/// path that never came to be a store is forgotten, so that a wrong one can be corrected. A peer address that is not known
/// this time stays as it was.
///
/// # Errors
/// The cluster is not initialised, or the name belongs to another node.
pub fn join(view: &View, id: NodeId, wanted: &NodeRecord) -> Result<Plan<NodeRecord>, Refusal> {
    initialised(view)?;
    check_name(&wanted.name)?;
    if let Some(owner) = view.node_names.get(&wanted.name).filter(|owner| **owner != id) {
        return Err(Refusal::new(
            RefusalKind::Conflict,
            "node_name_taken",
            format!("the name {} belongs to node {owner}", wanted.name),
            "start torusd with another --name, or with the --state-dir that holds that node's id",
        ));
    }
    let known = view.nodes.get(&id);
    let mut record = wanted.clone();
    if let Some(known) = known {
        let opened = |path: &str| view.stores.values().any(|s| s.record.node == id && s.record.path == path);
        let named = |path: &str| wanted.stores.iter().any(|s| s.path == path);
        let kept = known.record.stores.iter().filter(|s| opened(&s.path) && !named(&s.path));
        record.stores.extend(kept.cloned());
        if record.peer_addr.is_empty() {
            record.peer_addr.clone_from(&known.record.peer_addr);
        }
    }
    record.stores.sort_by(|a, b| a.path.cmp(&b.path));
    if known.is_some_and(|known| known.record == record) && view.node_names.contains_key(&record.name) {
        return Ok(Plan::Done(record));
    }
    let mut txn = Txn::new().put(keys::node(id), encode(&record));
    txn = match known {
        Some(known) => txn.when(unchanged(keys::node(id), known)),
        None => txn.when(Compare::Absent(keys::node(id))),
    };
    if !view.node_names.contains_key(&record.name) {
        txn = txn
            .when(Compare::Absent(keys::node_name(&record.name)))
            .put(keys::node_name(&record.name), encode(&NodeNameRecord { node: id }));
    }
    if let Some(former) = known.map(|k| &k.record.name).filter(|name| **name != record.name) {
        txn = txn.delete(keys::node_name(former));
    }
    Ok(Plan::Commit(txn, record))
}

/// A volume to create.
#[derive(Debug, Clone)]
pub struct NewVolume {
    /// Fresh random id; tells this request's volume from any other.
    pub id: VolumeId,
    /// Unique name.
    pub name: String,
    /// Bytes asked for.
    pub size: u64,
    /// Copies asked for; the default is one per node, at most three.
    pub copies: Option<u8>,
    /// Of them, how many are to stay in sync; the default is two of three or more, else one.
    pub min_copies: Option<u8>,
    /// Seconds since 1970.
    pub now_unix_s: u64,
}

fn whole_extents(cluster: &ClusterRecord, size: u64) -> Result<u64, Refusal> {
    let refuse = |message: String, hint| Refusal::new(RefusalKind::Invalid, "bad_size", message, hint);
    if size == 0 {
        return Err(refuse("a volume of size 0 is not possible".into(), "name a size, for example 10GiB"));
    }
    // An AoE initiator addresses 2^48 sectors.
    placement::round_up(size, cluster.extent_size)
        .filter(|size| *size <= 1 << 57)
        .ok_or_else(|| refuse(format!("{} is too large", human(size)), "the limit is 128 PiB"))
}

/// Creates a volume on the store with most free space; one of several copies on as many nodes, with its heads record.
///
/// # Errors
/// Bad or taken name, bad size, no space, more copies than nodes that replicate.
pub fn create_volume(view: &View, new: &NewVolume) -> Result<Plan<VolumeRecord>, Refusal> {
    let cluster = initialised(view)?;
    check_name(&new.name)?;
    if let Some(made) = view.volumes.get(&new.id) {
        return Ok(Plan::Done(made.record.clone()));
    }
    let size = whole_extents(cluster, new.size)?;
    let default_copies = u8::try_from(view.nodes.len().clamp(1, 3)).unwrap_or(3);
    let copies = new.copies.unwrap_or(default_copies);
    refuse_impossible_copies(copies, new.min_copies)?;
    if let Some(taken) = view.names.get(&new.name) {
        let purging =
            view.volumes.get(&taken.record.volume).map(|v| v.record.state) == Some(VolumeState::Purging);
        let hint =
            if purging { "it is still being deleted: repeat when it is gone" } else { "choose another name" };
        let message = format!("a volume {} exists", new.name);
        return Err(Refusal::new(RefusalKind::Conflict, "name_taken", message, hint));
    }
    let mut record = VolumeRecord {
        name: new.name.clone(),
        size,
        copies,
        store: None,
        node: None,
        state: VolumeState::Creating,
        export: None,
        created_unix_s: new.now_unix_s,
        confirmed: Vec::new(),
    };
    let mut txn = Txn::new()
        .when(Compare::Absent(keys::name(&new.name)))
        .when(Compare::Absent(keys::volume(new.id)))
        .put(keys::name(&new.name), encode(&NameRecord { volume: new.id }));
    let stores = if copies == 1 {
        let store = placement::choose_store(view, size)?;
        (record.store, record.node) = (Some(store), view.stores.get(&store).map(|s| s.record.node));
        vec![store]
    } else {
        let asked = if new.copies.is_some() { "asked for" } else { "the default here" };
        let owners = placement::choose_owners(view, size, copies).map_err(|error| {
            let mut refusal = Refusal::from(error.clone());
            if let PlacementError::TooFewNodes { .. } = error {
                refusal.message = format!("{copies} copies are {asked}: {error}");
            }
            refusal
        })?;
        let stores = owners.iter().map(|owner| owner.store).collect();
        let head = placement::choose_head(view, &owners).ok_or(PlacementError::NoStore)?;
        let lane = placement::choose_lane(view);
        let heads = HeadsRecord::new(owners, head, new.min_copies.unwrap_or(0), lane);
        let key = keys::heads(new.id);
        txn = txn.when(Compare::Absent(key.clone())).put(key, encode(&heads));
        stores
    };
    txn = claim_space(view, txn, &stores).put(keys::volume(new.id), encode(&record));
    Ok(Plan::Commit(txn, record))
}

fn refuse_impossible_copies(copies: u8, min_copies: Option<u8>) -> Result<(), Refusal> {
    let refuse =
        |message: String, hint: String| Err(Refusal::new(RefusalKind::Invalid, "bad_copies", message, hint));
    if copies == 0 {
        return refuse("a volume without a copy is not possible".into(), "use --copies 1".into());
    }
    if usize::from(copies) > MAX_OWNERS {
        return refuse(format!("{copies} copies are too many"), format!("at most {MAX_OWNERS} are possible"));
    }
    match min_copies {
        Some(min) if min == 0 || min > copies => {
            let hint = format!("use --min-copies with 1 to {copies}, or leave it out");
            refuse(format!("{min} of {copies} copies cannot be the least to stay in sync"), hint)
        }
        _ => Ok(()),
    }
}

/// Rewrites the records of stores as they are: whoever else counted their space conflicts.
fn claim_space(view: &View, txn: Txn, stores: &[StoreId]) -> Txn {
    let known = stores.iter().filter_map(|id| Some((*id, view.stores.get(id)?)));
    known.fold(txn, |txn, (id, store)| {
        txn.when(unchanged(keys::store(id), store)).put(keys::store(id), encode(&store.record))
    })
}

/// Changes a volume's size; shrinking needs `allow_data_loss` and no export.
///
/// # Errors
/// No such volume, not ready, bad size, no space, shrinking without leave.
pub fn resize_volume(
    view: &View,
    name: &str,
    size: u64,
    allow_data_loss: bool,
) -> Result<Plan<VolumeRecord>, Refusal> {
    let cluster = initialised(view)?;
    let (id, volume) = view.volume(name).ok_or_else(|| Refusal::no_volume(name))?;
    let size = whole_extents(cluster, size)?;
    let old = &volume.record;
    if !matches!(old.state, VolumeState::Ready | VolumeState::Resizing) {
        let message = format!("volume {} is {}", old.name, old.state);
        return Err(Refusal::new(RefusalKind::Conflict, "not_ready", message, "repeat when it is ready"));
    }
    if size == old.size {
        return Ok(Plan::Done(old.clone()));
    }
    let stores: Vec<_> = view.owners(id).into_iter().map(|(store, _)| store).collect();
    let largest = stores.iter().map(|store| available_bytes(view, *store)).min().unwrap_or(0);
    if size < old.size {
        refuse_unwanted_shrink(old, size, allow_data_loss)?;
    } else if size - old.size > largest {
        return Err(PlacementError::NoSpace { needed: size - old.size, largest }.into());
    }
    let record = VolumeRecord { size, state: VolumeState::Resizing, confirmed: Vec::new(), ..old.clone() };
    let txn = Txn::new().when(unchanged(keys::volume(id), volume)).put(keys::volume(id), encode(&record));
    Ok(Plan::Commit(claim_space(view, txn, &stores), record))
}

fn refuse_unwanted_shrink(old: &VolumeRecord, size: u64, allow_data_loss: bool) -> Result<(), Refusal> {
    if old.copies > 1 {
        // What is cut off may be given to others only when no former head can write there any more (I12).
        return Err(Refusal::new(
            RefusalKind::Conflict,
            "cannot_shrink",
            format!(
                "volume {} has {} copies, and such a volume cannot be made smaller yet",
                old.name, old.copies
            ),
            "create a smaller one and copy what is to be kept",
        ));
    }
    if !allow_data_loss {
        return Err(Refusal::new(
            RefusalKind::Conflict,
            "would_lose_data",
            format!("volume {} is {}; {} would cut off its end", old.name, human(old.size), human(size)),
            "shrink the file system first, then repeat with --allow-data-loss",
        ));
    }
    match old.export {
        None => Ok(()),
        Some(address) => Err(Refusal::new(
            RefusalKind::Conflict,
            "exported",
            format!("volume {} is exported at {address}", old.name),
            format!("run `torusblk unexport {}` first", old.name),
        )),
    }
}

/// Starts deleting a volume: state purging, from which there is no way back (I2). `seen` remembers the id between attempts.
///
/// # Errors
/// No such volume, or it is exported.
pub fn delete_volume(
    view: &View,
    name: &str,
    seen: &mut Option<VolumeId>,
) -> Result<Plan<VolumeId>, Refusal> {
    initialised(view)?;
    if let Some(id) = seen.filter(|id| !view.volumes.contains_key(id)) {
        return Ok(Plan::Done(id));
    }
    let (id, volume) = view.volume(name).ok_or_else(|| Refusal::no_volume(name))?;
    *seen = Some(id);
    let old = &volume.record;
    if old.state == VolumeState::Purging {
        return Ok(Plan::Done(id));
    }
    if let Some(address) = old.export {
        let ending = view.exports.get(&address).is_some_and(|e| e.record.ending);
        let hint = if ending {
            format!("its export is ending: wait until node {} has confirmed", view.serving_label(id))
        } else {
            format!("run `torusblk unexport {}` first", old.name)
        };
        let message = format!("volume {} is exported at {address}", old.name);
        return Err(Refusal::new(RefusalKind::Conflict, "exported", message, hint));
    }
    let record = VolumeRecord { state: VolumeState::Purging, confirmed: Vec::new(), ..old.clone() };
    let txn = Txn::new().when(unchanged(keys::volume(id), volume)).put(keys::volume(id), encode(&record));
    Ok(Plan::Commit(txn, id))
}

/// A volume to export.
#[derive(Debug, Clone, Default)]
pub struct NewExport {
    /// Name or id of the volume.
    pub volume: String,
    /// Where; the next free address if none.
    pub address: Option<Address>,
    /// Logical interfaces of the volume's node to serve it on; all if none is named.
    pub interfaces: Vec<String>,
    /// Refuse writes.
    pub read_only: bool,
    /// Who may change its settings over AoE; nobody if not given.
    pub policy: Option<Policy>,
}

/// Exports a volume; an export that is there as asked for is left alone.
///
/// # Errors
/// No such volume, it is being deleted, it has another export, the address is taken, the node has no such interface.
pub fn export(view: &View, new: &NewExport) -> Result<Plan<Address>, Refusal> {
    initialised(view)?;
    let conflict =
        |code, message: String, hint: String| Refusal::new(RefusalKind::Conflict, code, message, hint);
    let (id, volume) = view.volume(&new.volume).ok_or_else(|| Refusal::no_volume(&new.volume))?;
    let old = &volume.record;
    if old.state == VolumeState::Purging {
        return Err(conflict("purging", format!("volume {} is being deleted", old.name), String::new()));
    }
    let interfaces = wanted_interfaces(view, id, old, &new.interfaces)?;
    if let Some(at) = old.export {
        let export = view.exports.get(&at).map(|e| &e.record);
        if export.is_some_and(|e| e.ending) {
            let hint = format!("repeat when node {} has confirmed its end", view.serving_label(id));
            return Err(conflict(
                "export_ending",
                format!("the export of {} at {at} is ending", old.name),
                hint,
            ));
        }
        let same = new.address.is_none_or(|address| address == at)
            && export.is_some_and(|e| {
                let settings = &e.settings;
                e.read_only == new.read_only
                    && (interfaces.is_empty() || interfaces == settings.interfaces)
                    && new.policy.as_ref().is_none_or(|policy| *policy == settings.policy)
            });
        if same {
            return Ok(Plan::Done(at));
        }
        let hint = format!(
            "see `torusblk show {0}`; its policy is changed with `torusblk policy {0}`, all else after `torusblk unexport {0}`",
            old.name
        );
        return Err(conflict(
            "exported",
            format!("volume {} is exported at {at}, not as it is asked for now", old.name),
            hint,
        ));
    }
    let address = match new.address {
        Some(address) => address,
        None => placement::next_address(view)
            .ok_or_else(|| conflict("no_address", "no address is free".into(), "name one".into()))?,
    };
    if let Some(taken) = view.exports.get(&address) {
        let holder = view.volumes.get(&taken.record.volume);
        let holder = holder.map_or_else(|| taken.record.volume.to_string(), |v| v.record.name.clone());
        let hint = "choose another address, or give none to get the next free one".to_owned();
        let ending = if taken.record.ending { ", whose export is ending" } else { "" };
        return Err(conflict("address_taken", format!("{address} belongs to volume {holder}{ending}"), hint));
    }
    let mac = placement::free_mac(view, id)
        .ok_or_else(|| conflict("no_mac", "no MAC is free for this volume".into(), String::new()))?;
    let record = VolumeRecord { export: Some(address), ..old.clone() };
    let policy = new.policy.clone().unwrap_or_default();
    let settings = ExportSettings { interfaces, policy, ..ExportSettings::default() };
    let export = ExportRecord { volume: id, mac, read_only: new.read_only, ending: false, settings };
    let mut txn = Txn::new()
        .when(unchanged(keys::volume(id), volume))
        .when(Compare::Absent(keys::export(address)))
        .put(keys::volume(id), encode(&record))
        .put(keys::export(address), encode(&export));
    if !view.macs.contains_key(&mac) {
        txn =
            txn.when(Compare::Absent(keys::mac(mac))).put(keys::mac(mac), encode(&MacRecord { volume: id }));
    }
    Ok(Plan::Commit(txn, address))
}

/// The interfaces to bind an export to, each in its one spelling and in order; refused if the volume's node does not serve
/// on one of them.
fn wanted_interfaces(
    view: &View,
    id: VolumeId,
    volume: &VolumeRecord,
    names: &[String],
) -> Result<Vec<String>, Refusal> {
    let mut wanted: Vec<_> = parse_interfaces(names)?.iter().map(ToString::to_string).collect();
    wanted.sort_unstable();
    let status = view.serving_node(id).and_then(|node| view.status.get(&node));
    let has = status.map_or(&[][..], |status| &status.interfaces);
    let Some(missing) = wanted.iter().find(|name| !has.contains(name)) else { return Ok(wanted) };
    let has = if has.is_empty() { "none now".to_owned() } else { has.join(", ") };
    Err(Refusal::new(
        RefusalKind::Conflict,
        "no_such_interface",
        format!(
            "node {}, which holds volume {}, does not serve on {missing}; it serves on: {has}",
            view.serving_label(id),
            volume.name
        ),
        "name one of these, or none to serve it on all of them",
    ))
}

/// An export, named by its volume or its address.
///
/// # Errors
/// No such volume, or it is not exported.
pub fn find_export<'a>(view: &'a View, name: &str) -> Result<(Address, &'a Entry<ExportRecord>), Refusal> {
    view.export(name).ok_or_else(|| match view.volume(name) {
        Some((_, volume)) => Refusal::not_exported(&volume.record.name),
        None => Refusal::no_volume(name),
    })
}

/// Changes the settings of an export, named by its volume or its address. `change` is called anew for every attempt.
///
/// # Errors
/// No such export, it is ending, or what `change` refuses.
pub fn set_export(
    view: &View,
    name: &str,
    change: impl FnOnce(&mut ExportSettings) -> Result<(), Refusal>,
) -> Result<Plan<Address>, Refusal> {
    initialised(view)?;
    let (address, export) = find_export(view, name)?;
    if export.record.ending {
        let message = format!("the export at {address} is ending");
        let hint = "export the volume again when it has ended";
        return Err(Refusal::new(RefusalKind::Conflict, "export_ending", message, hint));
    }
    let mut settings = export.record.settings.clone();
    change(&mut settings)?;
    if settings == export.record.settings {
        return Ok(Plan::Done(address));
    }
    let record = ExportRecord { settings, ..export.record.clone() };
    let txn =
        Txn::new().when(unchanged(keys::export(address), export)).put(keys::export(address), encode(&record));
    Ok(Plan::Commit(txn, address))
}

/// Starts the end of a volume's export; its record goes when the node has confirmed (I12).
///
/// # Errors
/// No such volume, or it is not exported.
pub fn unexport(view: &View, name: &str, seen: &mut Option<Address>) -> Result<Plan<Address>, Refusal> {
    initialised(view)?;
    let (id, volume) = view.volume(name).ok_or_else(|| Refusal::no_volume(name))?;
    let Some(address) = volume.record.export else {
        if let Some(address) = *seen {
            return Ok(Plan::Done(address));
        }
        return Err(Refusal::not_exported(&volume.record.name));
    };
    *seen = Some(address);
    let Some(export) = view.exports.get(&address) else {
        let txn = Txn::new()
            .when(unchanged(keys::volume(id), volume))
            .when(Compare::Absent(keys::export(address)))
            .put(keys::volume(id), encode(&VolumeRecord { export: None, ..volume.record.clone() }));
        return Ok(Plan::Commit(txn, address));
    };
    if export.record.ending {
        return Ok(Plan::Done(address));
    }
    let record = ExportRecord { ending: true, ..export.record.clone() };
    let txn =
        Txn::new().when(unchanged(keys::export(address), export)).put(keys::export(address), encode(&record));
    Ok(Plan::Commit(txn, address))
}

/// Checks a store's path and size as a node is to open it.
///
/// # Errors
/// The path is not absolute, too long or unprintable; the size is too small.
pub fn check_store(spec: &StoreSpec) -> Result<(), Refusal> {
    let refuse = |code, message: String, hint| Err(Refusal::new(RefusalKind::Invalid, code, message, hint));
    let path = &spec.path;
    if !path.starts_with('/') || path.len() > MAX_PATH_BYTES || path.contains(|c: char| c.is_control()) {
        let hint = "give an absolute path of at most 255 bytes";
        return refuse("bad_path", format!("\"{}\" is not a store path", path.escape_default()), hint);
    }
    if spec.size != 0 && spec.size < MIN_STORE_BYTES {
        let message = format!("a store of {} is too small: {path}", human(spec.size));
        return refuse("store_too_small", message, "a store needs at least 64 MiB");
    }
    Ok(())
}

/// Names one more path for a node to open.
///
/// # Errors
/// No such node, a bad path, or the path is named already with another size.
pub fn add_store(view: &View, node: &str, spec: &StoreSpec) -> Result<Plan<NodeId>, Refusal> {
    initialised(view)?;
    check_store(spec)?;
    let (id, entry) = view.node(node).ok_or_else(|| Refusal::no_node(node))?;
    if let Some(known) = entry.record.stores.iter().find(|s| s.path == spec.path) {
        if known.size == spec.size || spec.size == 0 {
            return Ok(Plan::Done(id));
        }
        return Err(Refusal::new(
            RefusalKind::Conflict,
            "store_exists",
            format!("node {} has a store at {} already", entry.record.name, spec.path),
            "remove it first, or choose another path",
        ));
    }
    let mut record = entry.record.clone();
    record.stores.push(spec.clone());
    record.stores.sort_by(|a, b| a.path.cmp(&b.path));
    let txn = Txn::new().when(unchanged(keys::node(id), entry)).put(keys::node(id), encode(&record));
    Ok(Plan::Commit(txn, id))
}

/// Makes a node close a store that holds no volume; what is on the disk stays there.
///
/// # Errors
/// No such store, or volumes are on it.
pub fn remove_store(view: &View, node: &str, path_or_id: &str, seen: &mut bool) -> Result<Plan<()>, Refusal> {
    initialised(view)?;
    let (id, entry) = view.node(node).ok_or_else(|| Refusal::no_node(node))?;
    let wanted: Option<StoreId> = path_or_id.parse().ok();
    let on_node = |s: &Entry<StoreRecord>| s.record.node == id;
    let store = view
        .stores
        .iter()
        .find(|(store, s)| on_node(s) && (wanted == Some(**store) || s.record.path == path_or_id));
    let path = store.map_or(path_or_id, |(_, s)| s.record.path.as_str());
    if store.is_none() && !entry.record.stores.iter().any(|s| s.path == path) {
        if *seen {
            return Ok(Plan::Done(()));
        }
        return Err(Refusal::new(
            RefusalKind::NotFound,
            "no_such_store",
            format!("node {} has no store {path_or_id}", entry.record.name),
            "see `torusctl node show`",
        ));
    }
    *seen = true;
    let mut record = entry.record.clone();
    record.stores.retain(|s| s.path != path);
    let mut txn = Txn::new().when(unchanged(keys::node(id), entry)).put(keys::node(id), encode(&record));
    if let Some((store_id, store)) = store {
        let is_on_it = |id: VolumeId| view.owners(id).iter().any(|(owner, _)| owner == store_id);
        let volumes: Vec<_> =
            view.volumes.iter().filter(|(id, _)| is_on_it(**id)).map(|(_, volume)| volume).collect();
        if let Some(first) = volumes.first() {
            return Err(Refusal::new(
                RefusalKind::Conflict,
                "store_in_use",
                format!("{} volume(s) are on {path}, such as {}", volumes.len(), first.record.name),
                "delete them first",
            ));
        }
        // Creating a volume rewrites the store's record, so that no volume can arrive meanwhile.
        txn = txn.when(unchanged(keys::store(*store_id), store)).delete(keys::store(*store_id));
    }
    Ok(Plan::Commit(txn, ()))
}

/// A store, named by its id or its path.
///
/// # Errors
/// No such store, or several nodes have one at this path.
pub fn find_store<'a>(view: &'a View, name: &str) -> Result<(StoreId, &'a Entry<StoreRecord>), Refusal> {
    view.store(name).ok_or_else(|| {
        if view.stores.values().any(|store| store.record.path == name) {
            let message = format!("several nodes have a store at {name}");
            let hint = "name it by its id: see `torusctl store list`";
            return Refusal::new(RefusalKind::Conflict, "ambiguous_store", message, hint);
        }
        let message = format!("there is no store {name}");
        Refusal::new(RefusalKind::NotFound, "no_such_store", message, "see `torusctl store list`")
    })
}

/// Whether a recorded scrub is going on, as far as the cluster wants.
fn is_scrubbing(record: &ScrubRecord) -> bool {
    !record.stopped && record.finished.is_none()
}

/// Begins a scrub of a store, named by its id or its path; while one goes on, changes its rate if one is given. With
/// `resume`, a scrub that was stopped goes on where it was.
///
/// # Errors
/// No such store, a rate of 0, or nothing to resume.
pub fn start_scrub(
    view: &View,
    name: &str,
    rate: Option<u64>,
    resume: bool,
    now_unix_s: u64,
) -> Result<Plan<StoreId>, Refusal> {
    initialised(view)?;
    let (id, store) = find_store(view, name)?;
    if rate == Some(0) {
        let message = "a scrub with a rate of 0 is not possible";
        let hint = "name bytes per second, for example 100MiB, or stop it with `torusctl scrub stop`";
        return Err(Refusal::new(RefusalKind::Invalid, "bad_rate", message, hint));
    }
    let path = &store.record.path;
    let known = view.scrubs.get(&id);
    // A data plane that is further than the record, as after a restored backup, begins only what is newer to it.
    let told = view.store_status(id).and_then(|status| status.scrub.as_ref());
    let seen = told.map_or(0, |scrub| scrub.run);
    // The node has finished it, which is not recorded yet: who asks now wants another one.
    let over = |record: &ScrubRecord| told.is_some_and(|s| s.run == record.run && s.state == "finished");
    let record = match known.map(|known| &known.record) {
        None if resume => return Err(nothing_to_resume(format!("{path} was never scrubbed"))),
        Some(old) if resume && old.finished.is_some() => {
            return Err(nothing_to_resume(format!("the last scrub of {path} is finished")));
        }
        Some(old) if resume || (is_scrubbing(old) && seen <= old.run && !over(old)) => {
            ScrubRecord { stopped: false, rate: rate.unwrap_or(old.rate), ..old.clone() }
        }
        old => ScrubRecord {
            run: old.map_or(0, |old| old.run).max(seen).saturating_add(1),
            rate: rate.unwrap_or(DEFAULT_SCRUB_RATE),
            stopped: false,
            started_unix_s: now_unix_s,
            finished: None,
        },
    };
    Ok(put_scrub(id, known, record))
}

fn nothing_to_resume(message: String) -> Refusal {
    let hint = "begin a new one with `torusctl scrub start`";
    Refusal::new(RefusalKind::Conflict, "no_scrub", message, hint)
}

/// Stops the scrub of a store, named by its id or its path; it can be resumed.
///
/// # Errors
/// No such store, or no scrub goes on.
pub fn stop_scrub(view: &View, name: &str) -> Result<Plan<StoreId>, Refusal> {
    initialised(view)?;
    let (id, store) = find_store(view, name)?;
    let known = view.scrubs.get(&id);
    let Some(going) = known.filter(|known| known.record.finished.is_none()) else {
        let message = format!("no scrub of {} goes on", store.record.path);
        let hint = "see `torusctl scrub status`";
        return Err(Refusal::new(RefusalKind::Conflict, "no_scrub", message, hint));
    };
    Ok(put_scrub(id, known, ScrubRecord { stopped: true, ..going.record.clone() }))
}

fn put_scrub(id: StoreId, known: Option<&Entry<ScrubRecord>>, record: ScrubRecord) -> Plan<StoreId> {
    let key = keys::scrub(id);
    let guard = match known {
        Some(known) if known.record == record => return Plan::Done(id),
        Some(known) => unchanged(key.clone(), known),
        None => Compare::Absent(key.clone()),
    };
    let txn = Txn::new().when(Compare::Exists(keys::store(id))).when(guard).put(key, encode(&record));
    Plan::Commit(txn, id)
}
