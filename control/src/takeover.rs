//! Who becomes head of a volume whose head is silent (I8).
//!
//! Safety rests on the replicas, which open no generation while a grant of a lower one lasts, and on the comparison of the
//! record's revision: whatever is decided here, nobody serves beside another. What is decided here is that a head is not
//! replaced needlessly, and is replaced soon:
//! - Only a node with a store that is in sync stands as a candidate, and only while its own data plane grants the head nothing.
//! - Another node with a store in sync that still grants the head something vetoes. Its status is read, and compared, in the
//!   transaction: a veto that was given in time holds.
//! - Candidates are ordered by a hash of volume and node; each waits for those before it.
//! - A head that was just named gets time to open.
//! - That a lease is gone replaces nobody, and without a fresh answer of the metadata store nobody is replaced.
//! - But for one case: an export is to end, and the node that serves it cannot hear of that. Then its head is replaced whoever grants it
//!   something, since the address is free only when no former head answers there (I12).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cluster_map::{NodeId, Observed, StoreState, VolumeId};

use crate::heads::HeadsRecord;
use crate::meta::{
    Compare, KeyValue, MAX_TXN_BYTES, MAX_TXN_OPS, MetaError, MetaStore, Revision, Txn, TxnOutcome,
};
use crate::model::{Entry, StatusRecord, View, VolumeState, decode, encode, keys};

/// How long each candidate waits for the one before it.
pub const STAGGER: Duration = Duration::from_millis(200);
/// How long a head that was just named is left alone: replicas open for it within a second.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How soon what could not be committed is tried again.
const AGAIN: Duration = Duration::from_millis(500);

/// How a node stands to a volume's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stand {
    /// It leaves the head alone.
    Rests(Why),
    /// It may take over, after so many others had the time to.
    Candidate {
        /// How many are before it.
        rank: u32,
    },
}

/// Why a node leaves a head alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It is the head.
    IsHead,
    /// The volume is going, or gone.
    NoVolume,
    /// Its data plane cannot be head.
    CannotReplicate,
    /// It has no store that is open and in sync.
    NotInSync,
    /// Its replicas grant the head something, or do not say.
    Grants,
    /// Another node's replicas do.
    Vetoed(NodeId),
}

/// A number by which candidates are ordered, the same on every node.
pub(crate) fn order(volume: VolumeId, node: NodeId) -> u64 {
    // FNV-1a over both ids, finished by SplitMix64.
    let seed = volume.0.iter().chain(&node.0).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The other nodes that may veto: those with a store in sync, but for the head's own.
fn vetoers(heads: &HeadsRecord, node: NodeId) -> BTreeSet<NodeId> {
    let nodes = heads.members_in_sync().map(|member| member.node);
    nodes.filter(|other| *other != node && *other != heads.head).collect()
}

/// Whether an export of the volume is to end whose head's node does not hear of it: no grant keeps that head.
fn is_to_be_fenced(view: &View, id: VolumeId, heads: &HeadsRecord) -> bool {
    let address = view.volumes.get(&id).and_then(|volume| volume.record.export);
    let export = address.and_then(|address| view.exports.get(&address));
    export.is_some_and(|export| export.record.ending) && !view.live.contains_key(&heads.head)
}

/// How this node stands to the head of a volume. `observed` is what its own running data plane says.
#[must_use]
pub fn stand(view: &View, id: VolumeId, heads: &HeadsRecord, node: NodeId, observed: &Observed) -> Stand {
    let head = heads.head;
    if head == node {
        return Stand::Rests(Why::IsHead);
    }
    if view.volumes.get(&id).is_none_or(|volume| volume.record.state == VolumeState::Purging) {
        return Stand::Rests(Why::NoVolume);
    }
    if !observed.replicates {
        return Stand::Rests(Why::CannotReplicate);
    }
    let is_open = |store, incarnation| {
        let mut stores = observed.stores.iter();
        stores.any(|s| {
            s.id == Some(store) && s.state == StoreState::Ready && s.incarnation.max(1) == incarnation
        })
    };
    if !heads.members_in_sync().any(|own| own.node == node && is_open(own.store, own.incarnation)) {
        return Stand::Rests(Why::NotInSync);
    }
    let is_kept = !is_to_be_fenced(view, id, heads);
    let grants = observed.granting.iter().find(|grant| grant.node == head);
    if is_kept && grants.is_none_or(|grant| grant.is_granting) {
        return Stand::Rests(Why::Grants);
    }
    let is_live = |other: &NodeId| view.live.contains_key(other);
    let grants = |other: &NodeId| {
        is_live(other) && view.status.get(other).is_some_and(|status| status.granting.contains(&head))
    };
    let others = vetoers(heads, node);
    if let Some(by) = others.iter().find(|other| is_kept && grants(other)) {
        return Stand::Rests(Why::Vetoed(*by));
    }
    let own = (order(id, node), node);
    let before = others.iter().filter(|other| is_live(other) && (order(id, **other), **other) < own).count();
    Stand::Candidate { rank: u32::try_from(before).unwrap_or(u32::MAX) }
}

/// Since when something is so for a take-over number.
#[derive(Debug, Clone, Copy)]
struct Since {
    takeover: u64,
    at: Duration,
}

impl Since {
    /// Begins anew if it is about another take-over.
    fn follow(known: &mut BTreeMap<VolumeId, Since>, id: VolumeId, takeover: u64, now: Duration) -> Duration {
        let since = known.entry(id).or_insert(Since { takeover, at: now });
        if since.takeover != takeover {
            *since = Since { takeover, at: now };
        }
        since.at
    }
}

/// Watches the heads of the volumes that this node has copies of.
#[derive(Debug, Default)]
pub struct Vigil {
    /// When this node learnt who is head.
    named: BTreeMap<VolumeId, Since>,
    /// Since when this node is a candidate.
    stands: BTreeMap<VolumeId, Since>,
}

/// What a look came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// The volumes to take over now.
    pub due: Vec<VolumeId>,
    /// When the next one is due, if nothing changes.
    pub next: Option<Duration>,
}

impl Vigil {
    /// Looks at all heads at a time of a clock that only goes forward. `observed` is what the running data plane of the node
    /// says; `None` while none runs, or nothing about the cluster is surely current.
    pub fn look(&mut self, view: &View, node: NodeId, observed: Option<&Observed>, now: Duration) -> Look {
        let mut look = Look::default();
        self.named.retain(|id, _| view.heads.contains_key(id));
        for (id, Entry { record: heads, .. }) in &view.heads {
            let named = Since::follow(&mut self.named, *id, heads.takeover, now);
            let stand = observed.map(|observed| stand(view, *id, heads, node, observed));
            let Some(Stand::Candidate { rank }) = stand else {
                self.stands.remove(id);
                continue;
            };
            let stands = Since::follow(&mut self.stands, *id, heads.takeover, now);
            let due = stands.max(named.saturating_add(PATIENCE)).saturating_add(STAGGER.saturating_mul(rank));
            if now >= due {
                look.due.push(*id);
            } else {
                look.next = Some(look.next.map_or(due, |next| next.min(due)));
            }
        }
        self.stands.retain(|id, _| view.heads.contains_key(id));
        look
    }

    /// These were not taken over, though they were due: not again at once.
    pub fn put_off(&mut self, volumes: impl IntoIterator<Item = VolumeId>, now: Duration) {
        for id in volumes {
            if let Some(since) = self.stands.get_mut(&id) {
                since.at = now.saturating_add(AGAIN);
            }
        }
    }
}

/// A volume's record with this node as its head, and what it depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct TakeOver {
    volume: VolumeId,
    revision: Revision,
    after: Vec<u8>,
    vetoers: BTreeSet<NodeId>,
    /// It is made only while the head's node has no session.
    is_forced: bool,
}

/// Take-overs from one head, in one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    head: NodeId,
    take_overs: Vec<TakeOver>,
}

impl Batch {
    fn has_room_for(&self, other: &TakeOver) -> bool {
        let all = || self.take_overs.iter().chain([other]);
        let vetoers: BTreeSet<_> = all().flat_map(|one| &one.vetoers).collect();
        let compares = all().count() + vetoers.len() + usize::from(other.is_forced);
        let bytes: usize = all().map(|one| one.after.len() + 256).sum();
        compares <= MAX_TXN_OPS && bytes <= MAX_TXN_BYTES / 2
    }

    /// The volumes.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> {
        self.take_overs.iter().map(|one| one.volume)
    }

    /// The node whose heads they have.
    #[must_use]
    pub fn head(&self) -> NodeId {
        self.head
    }
}

/// The take-overs of volumes that are due, together as far as they are from the same node.
#[must_use]
pub fn batches(view: &View, node: NodeId, due: &[VolumeId]) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    for volume in due {
        let Some(Entry { record, revision }) = view.heads.get(volume) else { continue };
        let Some(after) = record.taken_over(node) else { continue };
        let after = after.following(record, *revision);
        let is_forced = is_to_be_fenced(view, *volume, record);
        let vetoers = if is_forced { BTreeSet::new() } else { vetoers(record, node) };
        let one =
            TakeOver { volume: *volume, revision: *revision, after: encode(&after), vetoers, is_forced };
        // What needs the session to be gone would keep the others from being made once it is back.
        let fits = |batch: &&mut Batch| {
            let are_alike = batch.take_overs.iter().all(|other| other.is_forced == is_forced);
            batch.head == record.head && are_alike && batch.has_room_for(&one)
        };
        match batches.iter_mut().rev().find(fits) {
            Some(batch) => batch.take_overs.push(one),
            None => batches.push(Batch { head: record.head, take_overs: vec![one] }),
        }
    }
    batches
}

/// Take-overs of heads of this node by itself.
pub(crate) fn renewals(view: &View, node: NodeId, volumes: impl Iterator<Item = VolumeId>) -> Vec<Txn> {
    let renewal = |volume: VolumeId| {
        let Entry { record, revision } = view.heads.get(&volume).filter(|heads| heads.record.head == node)?;
        let after = record.taken_over(node)?.following(record, *revision);
        let key = keys::heads(volume);
        Some(Txn::new().when(Compare::Revision(key.clone(), *revision)).put(key, encode(&after)))
    };
    Txn::together(volumes.filter_map(renewal))
}

/// What stands at the keys of nodes' statuses; `None` where the status went with its node's lease.
pub type Statuses = BTreeMap<NodeId, Option<KeyValue>>;

impl Batch {
    /// The nodes whose statuses are to be read before it is committed.
    #[must_use]
    pub fn vetoers(&self) -> BTreeSet<NodeId> {
        self.take_overs.iter().flat_map(|one| &one.vetoers).copied().collect()
    }

    /// The transaction, without the volumes that somebody vetoes as of now; `None` if that are all. A status that has changed since
    /// makes it fail.
    #[must_use]
    pub fn transaction(&self, statuses: &Statuses) -> Option<Txn> {
        let vetoes = |(key, found): (String, &Option<KeyValue>)| {
            let status = found.as_ref().map(|found| decode::<StatusRecord>(&key, &found.value));
            status.is_some_and(|status| status.is_ok_and(|status| status.granting.contains(&self.head)))
        };
        let found = |node: &NodeId| statuses.get(node).unwrap_or(&None);
        let is_vetoed =
            |one: &&TakeOver| one.vetoers.iter().any(|other| vetoes((keys::status(*other), found(other))));
        let mut txn = Txn::new();
        let mut compared: BTreeSet<NodeId> = BTreeSet::new();
        for one in self.take_overs.iter().filter(|one| !is_vetoed(one)) {
            let key = keys::heads(one.volume);
            txn = txn.when(Compare::Revision(key.clone(), one.revision)).put(key, one.after.clone());
            compared.extend(&one.vetoers);
        }
        if !txn.ops.is_empty() && self.take_overs.iter().any(|one| one.is_forced) {
            txn = txn.when(Compare::Absent(keys::live(self.head)));
        }
        for other in compared {
            let key = keys::status(other);
            txn = txn.when(match found(&other) {
                None => Compare::Absent(key),
                Some(found) => Compare::Revision(key, found.mod_revision),
            });
        }
        (!txn.ops.is_empty()).then_some(txn)
    }
}

/// Commits a batch, without the volumes that somebody vetoes as of now. `None`: nothing was changed.
///
/// # Errors
/// The metadata store gives no fresh answer, or the outcome is not known: what is read of the records next tells.
pub async fn commit(meta: &dyn MetaStore, batch: &Batch) -> Result<Option<Revision>, MetaError> {
    let mut statuses = Statuses::new();
    for other in batch.vetoers() {
        statuses.insert(other, meta.get(&keys::status(other)).await?);
    }
    let Some(txn) = batch.transaction(&statuses) else { return Ok(None) };
    match meta.txn(txn).await? {
        TxnOutcome::Committed(revision) => Ok(Some(revision)),
        TxnOutcome::Conflict => Ok(None),
    }
}
