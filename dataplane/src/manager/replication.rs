//! Heads and replicas, as the manager sees them: which ones cores are to have, and what is told of them.
//!
//! * A core is ordered to be a head once for each generation, and to be none when the desired state names it no more.
//! * An export of a head is served when its core says that the head has opened its generation everywhere, and is taken back when it has
//!   ended: a core that takes the export on empties its receive rings first, so that nothing is served that was sent while another head
//!   could answer (I6), and nothing is sent from the export's MAC before there were grants.
//! * What a former data plane wished for, and of which it is not known what became, is wished for again, and its head begins with
//!   both outcomes in mind, until the record has moved on (I5).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use cluster_map::{
    Desired, DesiredHead, Granting, HeadOwner, HeadPartition, HeadState, MemberId, MemberWish, NodeId,
    ObservedHead, StaleMark, VolumeId,
};
use torus_replication::connection::handshake::{Identity, Start, Versions};
use torus_replication::head::End;
use torus_replication::membership::{Change, Membership, Owner, Partition, Record};
use torus_replication::mutants::{self, Mutant};
use torus_replication::terms::{Epoch, Generation, Member, Site, Version};

use crate::exchange::{Message, Order, Report, core_of_shard, shard_of_lane};
use crate::replicating::{Place, Wish};

/// A node whose heads have asked for nothing yet counts as granted to for so long after the start: they need a moment to find out
/// that this process is there.
const GRACE_NS: u64 = 3_000_000_000;

/// A head that a core was ordered to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ordered {
    core: u16,
    lane: u16,
    generation: Generation,
    revision: u64,
}

/// Who a core is to others.
pub(super) fn identity(desired: &Desired, core: u16, start: Start) -> Identity {
    Identity {
        cluster: desired.cluster,
        key: desired.cluster_key,
        site: Site { node: desired.node, core },
        start,
        versions: Versions::OWN,
    }
}

/// All heads and replicas of the node.
#[derive(Debug)]
pub struct Replication {
    own: NodeId,
    cores: usize,
    /// Number of this start of the data plane.
    start: u64,
    started_ns: u64,
    reports: Vec<Report>,
    /// Replicas that cores know of, with the core of each.
    replicas: BTreeMap<(Member, VolumeId), u16>,
    heads: BTreeMap<VolumeId, Ordered>,
    sites: BTreeMap<Site, SocketAddr>,
    /// Wishes of a former data plane.
    left: Vec<MemberWish>,
    /// What each core was told that it may spend in a second to bring members up to date.
    resync_rates: Vec<u64>,
}

impl Replication {
    /// Nothing yet. `left` is what the former data plane of the map wished for.
    pub fn new(desired: &Desired, left: Vec<MemberWish>, boot_ns: u64) -> Replication {
        let cores = desired.cores.len();
        Replication {
            own: desired.node,
            cores,
            start: desired.start,
            started_ns: boot_ns,
            reports: vec![Report::default(); cores],
            replicas: BTreeMap::new(),
            heads: BTreeMap::new(),
            sites: BTreeMap::new(),
            left: if mutants::is(Mutant::WishForgotten) { Vec::new() } else { left },
            resync_rates: vec![0; cores],
        }
    }

    /// Takes a core's report.
    pub fn take(&mut self, core: usize, report: Report) {
        self.reports[core] = report;
    }

    /// Orders what the desired state wants and cores have not been told. `replicas` are those on open stores, each with its core.
    pub fn follow(
        &mut self,
        desired: &Desired,
        replicas: &[(Member, VolumeId, Place, u16)],
        outbox: &mut Vec<(u16, Message)>,
    ) {
        let resync_rates = self.share_resync_rate(desired.resync_bytes_per_s);
        let mut order = |core: u16, order: Order| outbox.push((core, Message::Replicate(Box::new(order))));
        let wanted: BTreeMap<VolumeId, &DesiredHead> =
            desired.heads.iter().map(|head| (head.volume, head)).collect();
        self.left.retain(|wish| {
            let head = wanted.get(&wish.volume);
            head.is_some_and(|head| (head.takeover, head.revision) == (wish.takeover, wish.revision))
        });
        let sites = self.sites_of(desired);
        if sites != self.sites {
            for core in (0..self.cores).filter_map(|core| u16::try_from(core).ok()) {
                order(core, Order::Sites(sites.clone()));
            }
            self.sites = sites;
        }
        for (core, (rate, told)) in resync_rates.iter().zip(&self.resync_rates).enumerate() {
            if let Some(core) = u16::try_from(core).ok().filter(|_| rate != told) {
                order(core, Order::ResyncRate(*rate));
            }
        }
        self.resync_rates = resync_rates;
        for (member, volume, place, core) in replicas {
            if self.replicas.insert((*member, *volume), *core).is_none() {
                order(*core, Order::AddReplica(*member, *volume, *place));
            }
        }
        let there: BTreeSet<(Member, VolumeId)> =
            replicas.iter().map(|(member, volume, ..)| (*member, *volume)).collect();
        self.replicas.retain(|key, core| {
            if !there.contains(key) {
                order(*core, Order::DropReplica(key.0, key.1));
            }
            there.contains(key)
        });
        self.heads.retain(|volume, ordered| {
            if !wanted.contains_key(volume) {
                order(ordered.core, Order::End(*volume));
            }
            wanted.contains_key(volume)
        });
        let cores: BTreeMap<VolumeId, u16> =
            replicas.iter().map(|(_, volume, _, core)| (*volume, *core)).collect();
        let lanes: BTreeMap<VolumeId, u16> =
            desired.volumes.iter().filter_map(|wish| Some((wish.id, wish.lane?))).collect();
        for head in &desired.heads {
            let generation = Generation { takeover: head.takeover, start: self.start };
            let revision = head.revision;
            match self.heads.get_mut(&head.volume) {
                Some(ordered) if ordered.generation == generation => {
                    if ordered.revision < revision {
                        ordered.revision = revision;
                        let (core, lane) = (ordered.core, ordered.lane);
                        order(core, Order::Record(head.volume, self.record_of(desired, head, lane)));
                    }
                }
                _ => {
                    // A node is head of what it has a replica of.
                    let place = cores.get(&head.volume).zip(lanes.get(&head.volume));
                    let Some((&core, &lane)) = place else { continue };
                    self.heads.insert(head.volume, Ordered { core, lane, generation, revision });
                    order(core, Order::Begin(generation, self.membership_of(desired, head, lane)));
                }
            }
        }
    }

    /// What each core may spend of the node's rate: those that bring somebody up to date share it, and one that begins to takes as much
    /// as they do until it has said so.
    fn share_resync_rate(&self, bytes_per_s: u64) -> Vec<u64> {
        let is_busy = |report: &Report| report.heads.values().any(|head| head.extents_to_go > 0);
        let busy = self.reports.iter().filter(|report| is_busy(report)).count().max(1);
        let busy = u64::try_from(busy).unwrap_or(u64::MAX);
        let share = if bytes_per_s == 0 { 0 } else { (bytes_per_s / busy).max(1) };
        vec![share; self.reports.len()]
    }

    /// Under which take-over a core has the head of a volume that the desired state wants now, once that has been able to answer; `None`
    /// before, and when there is none any more.
    pub fn served_takeover(&self, volume: VolumeId) -> Option<u64> {
        let ordered = self.heads.get(&volume)?;
        let report = self.reports.get(usize::from(ordered.core))?.heads.get(&volume)?;
        let is_served = report.generation == ordered.generation && report.has_opened;
        is_served.then_some(ordered.generation.takeover)
    }

    /// Whether a core has a head of the volume, or was ordered to and has not said yet that it has ended.
    pub fn has_head(&self, volume: VolumeId) -> bool {
        self.heads.contains_key(&volume)
            || self.reports.iter().any(|report| report.heads.contains_key(&volume))
    }

    fn record_of(&self, desired: &Desired, head: &DesiredHead, lane: u16) -> Record {
        let cores_of = |node: NodeId| {
            let peer = desired.peers.iter().find(|peer| peer.node == node);
            if node == self.own { self.cores } else { peer.map_or(1, |peer| usize::from(peer.cores.max(1))) }
        };
        let owner = |owner: &HeadOwner| {
            let core = core_of_shard(shard_of_lane(lane, owner.shards), cores_of(owner.node));
            let site = Site { node: owner.node, core };
            Owner { member: member_of(owner.member), site, is_complete: owner.is_complete }
        };
        let partition = |partition: &HeadPartition| Partition {
            epoch: Epoch(partition.epoch),
            owners: partition.owners.iter().map(owner).collect(),
        };
        Record {
            partitions: head.partitions.iter().map(partition).collect(),
            revision: head.revision,
            // A record from before they were counted has not been changed since.
            edition: if head.edition > 0 { head.edition } else { head.revision },
            takeover: head.takeover,
            head: Some(self.own),
            stale: head.stale.iter().map(|stale| (member_of(stale.member), Version(stale.mark))).collect(),
            min_copies: head.min_copies,
            is_moving: head.is_moving,
        }
    }

    fn membership_of(&self, desired: &Desired, head: &DesiredHead, lane: u16) -> Membership {
        let doubt = self.left.iter().find(|wish| wish.volume == head.volume).map(change_of);
        Membership::new(head.volume, self.record_of(desired, head, lane), doubt)
    }

    fn sites_of(&self, desired: &Desired) -> BTreeMap<Site, SocketAddr> {
        let mut sites = BTreeMap::new();
        for peer in desired.peers.iter().filter(|peer| peer.node != self.own) {
            for core in 0..peer.cores {
                let address = SocketAddr::new(peer.addr.ip, peer.addr.base_port + core);
                sites.insert(Site { node: peer.node, core }, address);
            }
        }
        sites
    }

    /// What is told of heads.
    pub fn observe_heads(&self) -> Vec<ObservedHead> {
        let mut heads = BTreeMap::new();
        for report in &self.reports {
            for (volume, (generation, end)) in &report.ended {
                let state = match end {
                    End::Replaced => HeadState::Replaced,
                    End::Past => HeadState::Past,
                };
                heads.insert(*volume, observed_head(*volume, *generation, state));
            }
        }
        let handed_over = self.reports.iter().flat_map(|report| &report.handed_over);
        let handed_over: BTreeSet<_> =
            handed_over.map(|(volume, generation)| (*volume, *generation)).collect();
        for (volume, report) in self.reports.iter().flat_map(|report| &report.heads) {
            let state = match report.is_serving {
                _ if handed_over.contains(&(*volume, report.generation)) => HeadState::HandedOver,
                true => HeadState::Serving,
                false => HeadState::Opening,
            };
            let mut head = observed_head(*volume, report.generation, state);
            head.copies_in_sync = report.in_sync;
            head.copies_needed = report.copies;
            head.resync_extents = report.extents_to_go;
            head.resync_eta_s = report.resync_eta_s;
            heads.insert(*volume, head);
        }
        heads.into_values().collect()
    }

    /// What heads wish for, and what a former data plane did.
    pub fn observe_wishes(&self) -> Vec<MemberWish> {
        let own = self.reports.iter().flat_map(|report| &report.wishes);
        let again = |wish: &MemberWish| (wish.volume, MemberWish { start: self.start, ..wish.clone() });
        let mut wishes: BTreeMap<VolumeId, MemberWish> = self.left.iter().map(again).collect();
        wishes.extend(own.map(|(volume, wish)| (*volume, told_wish(*volume, wish))));
        wishes.into_values().collect()
    }

    /// Which nodes' heads are granted to.
    pub fn observe_granting(&self, desired: &Desired, boot_ns: u64) -> Vec<Granting> {
        let is_fresh = boot_ns.saturating_sub(self.started_ns) < GRACE_NS;
        let peers = desired.peers.iter().map(|peer| peer.node).filter(|node| *node != self.own);
        let of_node = |node: NodeId| {
            let told: Vec<bool> =
                self.reports.iter().filter_map(|report| report.granting.get(&node).copied()).collect();
            let is_granting = if told.is_empty() { is_fresh } else { told.contains(&true) };
            Granting { node, is_granting }
        };
        peers.map(of_node).collect()
    }
}

fn observed_head(volume: VolumeId, generation: Generation, state: HeadState) -> ObservedHead {
    ObservedHead {
        volume,
        takeover: generation.takeover,
        start: generation.start,
        state,
        copies_needed: 0,
        copies_in_sync: 0,
        resync_extents: 0,
        blocked: String::new(),
        resync_eta_s: 0,
    }
}

fn member_of(id: MemberId) -> Member {
    Member { store: id.store, incarnation: id.incarnation }
}

fn id_of(member: Member) -> MemberId {
    MemberId { store: member.store, incarnation: member.incarnation }
}

fn change_of(wish: &MemberWish) -> Change {
    let eject = wish.eject.iter().map(|stale| (member_of(stale.member), Version(stale.mark)));
    Change { eject: eject.collect(), join: wish.join.iter().copied().map(member_of).collect() }
}

fn told_wish(volume: VolumeId, wish: &Wish) -> MemberWish {
    let eject = wish.change.eject.iter();
    MemberWish {
        volume,
        takeover: wish.generation.takeover,
        start: wish.generation.start,
        revision: wish.revision,
        eject: eject.map(|(member, mark)| StaleMark { member: id_of(*member), mark: mark.0 }).collect(),
        join: wish.change.join.iter().copied().map(id_of).collect(),
    }
}
