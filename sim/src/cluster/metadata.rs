//! The metadata of the cluster: what is there at the beginning, and what the volumes' records come to.
//!
//! They are the records of the control process, as it writes them, in the simulated etcd. Whatever changes a volume's record, each of its
//! states is looked at here, when it comes about.

use std::collections::BTreeMap;

use cluster_map::{ClusterId, ClusterKey, StoreId};
use torus_control::config::ConfigRecord;
use torus_control::heads::{HeadsRecord, MemberRecord, PartitionRecord};
use torus_control::meta::{Compare, Op, Revision, Txn};
use torus_control::model::{
    Address, ClusterKeyRecord, ClusterRecord, ExportRecord, Mac, MacRecord, NameRecord, NodeNameRecord,
    NodeRecord, PREFIX, StoreRecord, StoreSpec, View, VolumeRecord, VolumeState, decode, encode, keys,
};
use torus_control::settings::ExportSettings;
use torus_replication::membership::{Owner, Partition, Record};
use torus_replication::terms::{Epoch, Member, Site, Version};

use super::exports::{SIZE_SECTORS, address_of, mac_of};
use super::moves::Moves;
use super::{Checker, Plan, World, member_of, node_id, node_of, volume_id};
use crate::etcd::{self, ClientId, Etcd, Quality, Request, RequestId, Setup};
use crate::random::Random;

/// Bytes of a store, as far as its record says.
pub(super) const STORE_BYTES: u64 = 1 << 40;
/// Where each node has its store.
pub(super) const STORE_PATH: &str = "/store";

/// A volume's record.
#[derive(Debug)]
struct Kept {
    revision: Revision,
    heads: HeadsRecord,
    record: Record,
}

/// The metadata store, and what is known of it outside of all nodes.
#[derive(Debug)]
pub(super) struct Metadata {
    pub(super) etcd: Etcd,
    kept: Vec<Kept>,
    seen: etcd::Revision,
    pub(super) moves: Moves,
    /// Who gives orders that no node is asked for.
    operator: ClientId,
    orders: u64,
}

/// A transaction of the control process, as etcd takes it.
pub(super) fn to_etcd(txn: Txn) -> etcd::Txn {
    let compare = |compare| match compare {
        Compare::Absent(key) => etcd::Compare::Absent(key),
        Compare::Exists(key) => etcd::Compare::Exists(key),
        Compare::Revision(key, revision) => etcd::Compare::Revision(key, etcd::Revision(revision.0)),
    };
    let op = |op| match op {
        Op::Put { key, value, lease } => {
            etcd::Op::Put { key, value, lease: lease.map(|lease| etcd::LeaseId(lease.0)) }
        }
        Op::Delete { key } => etcd::Op::Delete { key },
    };
    etcd::Txn {
        compares: txn.compares.into_iter().map(compare).collect(),
        ops: txn.ops.into_iter().map(op).collect(),
    }
}

/// A key as the control process knows it.
pub(super) fn of_etcd(entry: etcd::KeyValue) -> torus_control::meta::KeyValue {
    torus_control::meta::KeyValue {
        key: entry.key,
        value: entry.value,
        mod_revision: Revision(entry.mod_revision.0),
        lease: entry.lease.map(|lease| torus_control::meta::LeaseId(lease.0)),
    }
}

fn record_of(heads: &HeadsRecord, revision: Revision) -> Record {
    let member = |index: u16| {
        let MemberRecord { store, incarnation, .. } = heads.members[usize::from(index)];
        Member { store, incarnation }
    };
    let owner = |partition: &PartitionRecord, index: u16| Owner {
        member: member(index),
        site: Site { node: heads.members[usize::from(index)].node, core: 0 },
        is_complete: !partition.incomplete.contains(&index),
    };
    let partition = |partition: &PartitionRecord| Partition {
        epoch: Epoch(partition.epoch),
        owners: partition.owners.iter().map(|index| owner(partition, *index)).collect(),
    };
    Record {
        partitions: heads.partitions.iter().map(partition).collect(),
        revision: revision.0.unsigned_abs(),
        takeover: heads.takeover,
        head: Some(heads.head),
        stale: heads.stale.iter().map(|stale| (member(stale.member), Version(stale.mark))).collect(),
        min_copies: heads.min_copies,
        is_moving: heads.move_to.is_some_and(|to| to != heads.head),
        edition: heads.edition,
    }
}

/// Every node has one store.
pub(super) fn member_record(node: usize, shards: u16) -> MemberRecord {
    let Member { store, incarnation } = member_of(node);
    MemberRecord { store, incarnation, node: node_id(node), shards }
}

/// The records of the cluster, its nodes and their stores.
fn records_of_nodes(plan: &Plan) -> Txn {
    let cluster = ClusterRecord { id: ClusterId([1; 16]), created_unix_s: 1, extent_size: 4 << 20 };
    let key = ClusterKeyRecord { key: ClusterKey([7; 32]) };
    let mut txn = Txn::new().put(keys::CLUSTER, encode(&cluster)).put(keys::CLUSTER_KEY, encode(&key));
    for node in 0..plan.nodes {
        let id = node_id(node);
        let name = format!("n{node}");
        let record = NodeRecord {
            name: name.clone(),
            zone: String::new(),
            peer_addr: format!("10.0.0.{}:4330", node + 1),
            cores: 1,
            api_addr: String::new(),
            stores: vec![StoreSpec { path: STORE_PATH.into(), size: 0 }],
        };
        let store = StoreRecord { node: id, path: STORE_PATH.into(), size: STORE_BYTES };
        txn = txn
            .put(keys::node(id), encode(&record))
            .put(keys::node_name(&name), encode(&NodeNameRecord { node: id }))
            .put(keys::store(member_of(node).store), encode(&store));
    }
    txn
}

/// The records of a volume with an export.
fn records_of_volume(volume: usize, plan: &Plan, heads: &HeadsRecord) -> Txn {
    let id = volume_id(volume);
    let name = format!("v{volume}");
    let wire = address_of(volume);
    let address = Address { shelf: wire.shelf, slot: wire.slot };
    let mac = Mac(mac_of(volume, 0).0);
    let record = VolumeRecord {
        name: name.clone(),
        size: SIZE_SECTORS * 512,
        copies: u8::try_from(plan.copies).expect("a few"),
        store: None::<StoreId>,
        node: None,
        state: VolumeState::Ready,
        export: Some(address),
        created_unix_s: 1,
        confirmed: Vec::new(),
    };
    let export = ExportRecord {
        volume: id,
        mac,
        read_only: false,
        ending: false,
        settings: ExportSettings::default(),
    };
    Txn::new()
        .put(keys::name(&name), encode(&NameRecord { volume: id }))
        .put(keys::volume(id), encode(&record))
        .put(keys::heads(id), encode(heads))
        .put(keys::export(address), encode(&export))
        .put(keys::mac(mac), encode(&MacRecord { volume: id }))
}

impl Metadata {
    pub(super) fn new(plan: &Plan, heads: &[HeadsRecord], mut random: Random) -> Metadata {
        let operator = ClientId(plan.nodes);
        let mut setup = Setup::new(plan.nodes + 1);
        setup.history_changes = if random.one_in(4) { 4 } else { 500 };
        let mut etcd = Etcd::new(setup, random.named("etcd", 0));
        let mut apply = |txn| {
            etcd.apply(0, to_etcd(txn)).expect("it is valid");
        };
        apply(records_of_nodes(plan));
        if random.one_in(4) {
            let config = ConfigRecord { resync_rate: Some(random.range(8 << 20..64 << 20)) };
            apply(Txn::new().put(keys::CONFIG, encode(&config)));
        }
        heads.iter().enumerate().for_each(|(volume, heads)| apply(records_of_volume(volume, plan, heads)));
        let kept = heads.iter().map(|heads| {
            let revision = Revision(0);
            Kept { revision, heads: heads.clone(), record: record_of(heads, revision) }
        });
        Metadata {
            kept: kept.collect(),
            seen: etcd::Revision(0),
            moves: Moves::new(plan.copies, random.named("moves", 0)),
            operator,
            orders: 0,
            etcd,
        }
    }

    pub(super) fn record(&self, volume: usize) -> &Record {
        &self.kept[volume].record
    }

    /// A volume's record as it is written, and its revision.
    pub(super) fn heads(&self, volume: usize) -> (&HeadsRecord, Revision) {
        let Kept { heads, revision, .. } = &self.kept[volume];
        (heads, *revision)
    }

    /// Whether no partition is on its way to another owner, and nothing is left of former ones.
    pub(super) fn has_moved_all(&self) -> bool {
        self.moves.are_done(self.kept.iter().map(|kept| &kept.record))
    }

    /// Everything that is there now, as somebody sees it who asks for it.
    pub(super) fn view(&self) -> View {
        let entries: Vec<_> = self.etcd.peek_prefix(PREFIX).entries.into_iter().map(of_etcd).collect();
        View::read(&entries).expect("what is written can be read")
    }

    /// All changes have these troubles from now on.
    pub(super) fn set_quality(&mut self, quality: &Quality) {
        for client in (0..=self.operator.0).map(ClientId) {
            self.etcd.set_quality(client, quality.clone());
        }
    }
}

impl World {
    /// Somebody gives an order that no node has a part in: it arrives, or gets lost.
    pub(super) fn order(&mut self, txn: Txn) {
        let now_ns = self.now_ns();
        let Metadata { etcd, operator, orders, .. } = &mut self.metadata;
        *orders += 1;
        etcd.request(now_ns, *operator, RequestId(*orders), Request::Txn(to_etcd(txn)));
    }

    /// Changes a volume's record, whatever stands between.
    pub(super) fn edit(&mut self, volume: usize, heads: &HeadsRecord) {
        let now_ns = self.now_ns();
        let (before, revision) = self.metadata.heads(volume);
        let heads = heads.clone().following(before, revision);
        let txn = Txn::new().put(keys::heads(volume_id(volume)), encode(&heads));
        self.metadata.etcd.apply(now_ns, to_etcd(txn)).expect("it is valid");
        self.follow_records();
    }

    /// Looks at what has become of volumes' records.
    pub(super) fn follow_records(&mut self) {
        let revision = self.metadata.etcd.revision();
        if revision == self.metadata.seen {
            return;
        }
        self.metadata.seen = revision;
        for volume in 0..self.plan.volumes {
            let key = keys::heads(volume_id(volume));
            let Some(found) = self.metadata.etcd.peek(&key) else { continue };
            let revision = Revision(found.mod_revision.0);
            if revision == self.metadata.kept[volume].revision {
                continue;
            }
            let heads: HeadsRecord = decode(&key, &found.value).expect("it was encoded");
            let record = record_of(&heads, revision);
            let after = Kept { revision, heads, record };
            let before = std::mem::replace(&mut self.metadata.kept[volume], after);
            let Kept { record, .. } = &self.metadata.kept[volume];
            let text = format!("metadata: volume {volume}: {record:?}");
            self.note(|| text);
            self.check_change(volume, &before);
        }
    }

    fn check_change(&mut self, volume: usize, before: &Kept) {
        let Kept { heads, record: after, .. } = &self.metadata.kept[volume];
        let (old, coverage) = (&before.record, &mut self.coverage);
        let is_new = |stale: &BTreeMap<Member, Version>, other: &BTreeMap<Member, Version>| {
            stale.keys().filter(|member| !other.contains_key(member)).count() as u64
        };
        coverage.ejections += is_new(&after.stale, &old.stale);
        coverage.joins += is_new(&old.stale, &after.stale);
        let mut wrong = None;
        if after.takeover > old.takeover {
            coverage.takeovers += 1;
            coverage.hand_overs += u64::from(before.heads.move_to == Some(heads.head));
        } else if after.takeover < old.takeover || after.head != old.head {
            wrong = Some("another head without a take-over".to_owned());
        }
        let is_needless = self.plan.is_calm && after.head != old.head;
        // No ejection leaves fewer members in sync than must be (I5).
        for (at, partition) in after.partitions.iter().enumerate() {
            let in_sync = |record: &Record| {
                let owners = record.partitions[at].owners.iter().filter(|owner| owner.is_complete);
                owners.filter(|owner| !record.stale.contains_key(&owner.member)).count()
            };
            let (had, has) = (in_sync(old), in_sync(after));
            if has < had && has < partition.min_in_sync(after.min_copies) {
                wrong.get_or_insert_with(|| format!("partition {at}: {has} in sync"));
            }
        }
        for (member, mark) in &after.stale {
            if old.stale.get(member).is_some_and(|former| former != mark) {
                wrong.get_or_insert_with(|| format!("the mark of {member:?} moves"));
            }
        }
        if is_needless {
            let what = format!("volume {volume} has another head: {after:?}, and before {old:?}");
            self.object(Checker::Calm, what);
        } else if let Some(wrong) = wrong {
            let what = format!("volume {volume}: {wrong}: {after:?}, and before {old:?}");
            self.object(Checker::Record, what);
        }
    }

    /// A node is made head though nothing is wrong, whatever the rules say of who may be: safety does not rest on them.
    pub(super) fn force_head(&mut self, node: usize, volume: usize) {
        let (heads, revision) = self.metadata.heads(volume);
        let Some(after) = heads.taken_over(node_id(node)) else { return };
        let after = after.following(heads, revision);
        let key = keys::heads(volume_id(volume));
        self.order(Txn::new().when(Compare::Revision(key.clone(), revision)).put(key, encode(&after)));
    }

    /// Somebody wishes that a node be the head; of the one that is head, that it stay.
    pub(super) fn wish_for_head(&mut self, volume: usize, node: usize) {
        let view = self.metadata.view();
        let planned = torus_control::moves::move_head(&view, &format!("v{volume}"), &format!("n{node}"));
        match planned {
            Ok(torus_control::ops::Plan::Commit(txn, _)) => self.order(txn),
            Ok(torus_control::ops::Plan::Done(_)) => {}
            Err(refusal) => self.note(|| format!("volume {volume} cannot go to node {node}: {refusal}")),
        }
    }

    /// The node that is head of a volume.
    pub(super) fn head_of(&self, volume: usize) -> usize {
        node_of(self.metadata.heads(volume).0.head)
    }
}
