//! What replicated volumes need of the map: where peers are, who is to be head of what and who owns it, what heads have come to,
//! and which changes of their volumes' records they wish for.
//!
//! A record of the metadata store is changed by the control process alone. The data plane says what it wishes
//! ([`MemberWish`], level-triggered) and at which revision of the record it computed that; the desired state that carries a newer
//! revision is the answer (I5). Lists within lists lie in tables of their own, one after the other; each entry says how many
//! of them are its own, so that decoding takes memory in proportion to its input.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::vec::IntoIter;

use crate::change::at_most;
use crate::error::{Fault, MapError};
use crate::observed::cut;
use crate::record::{Decoder, Encoder, Record, Table, Text, codes, flag};
use crate::{NodeId, StoreId, VolumeId};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most partitions of a volume.
pub const MAX_PARTITIONS: usize = 1024;
/// Most owners of a partition.
pub const MAX_OWNERS: usize = 16;
/// Most members that one volume's record calls stale, and most that one wish ejects or takes in.
pub const MAX_CHANGED_MEMBERS: usize = MAX_PARTITIONS * MAX_OWNERS;

/// What proves to a peer that a node belongs to the cluster. Never shown.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct ClusterKey(pub [u8; 32]);

impl ClusterKey {
    /// True for the all-zero key, which stands for none: peers are then neither called nor answered.
    #[must_use]
    pub fn is_nil(&self) -> bool {
        self.0 == [0; 32]
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("ClusterKey(not shown)")
    }
}

/// Where a node's data plane listens for peers: core `i` at port `base_port + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerAddr {
    /// Its address.
    pub ip: IpAddr,
    /// Port of core 0.
    pub base_port: u16,
}

impl PeerAddr {
    /// Whether there is a port for each of so many cores.
    #[must_use]
    pub fn has_ports_for(&self, cores: usize) -> bool {
        self.base_port != 0 && usize::from(self.base_port) + cores <= usize::from(u16::MAX) + 1
    }
}

/// Another node whose data plane can be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DesiredPeer {
    /// Which.
    pub node: NodeId,
    /// Where it listens.
    pub addr: PeerAddr,
    /// On how many cores its data plane runs, at least 1.
    pub cores: u16,
}

/// A store in one of its incarnations (I13).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId {
    /// Which store.
    pub store: StoreId,
    /// Its incarnation, from 1.
    pub incarnation: u64,
}

/// An owner of a partition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeadOwner {
    /// Its store.
    pub member: MemberId,
    /// The node that has the store.
    pub node: NodeId,
    /// Into how many shards the store was cut at its format, at least 1: with the volume's lane that says on which core of its node
    /// the volume is.
    pub shards: u16,
    /// It has everything that it should; else it is being made complete.
    pub is_complete: bool,
}

/// A partition of a volume: which stores have the extents whose number modulo the partitions' count is its index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeadPartition {
    /// Grows with every change of the owners.
    pub epoch: u64,
    /// At least one, at most [`MAX_OWNERS`].
    pub owners: Vec<HeadOwner>,
}

/// A member that misses writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StaleMark {
    /// Which.
    pub member: MemberId,
    /// The version up to which it is known to be complete; does not move while it is stale.
    pub mark: u64,
}

/// A volume that the node is to be head of, as its record in the metadata store has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredHead {
    /// The volume.
    pub volume: VolumeId,
    /// Grows with every take-over; with [`Desired::start`](crate::Desired::start) it is the head's generation.
    pub takeover: u64,
    /// Of the record's last change: what a [`MemberWish`] is computed from.
    pub revision: u64,
    /// How many copies are to stay in sync; 0: two of three or more, else one.
    pub min_copies: u8,
    /// At least one, at most [`MAX_PARTITIONS`].
    pub partitions: Vec<HeadPartition>,
    /// Members that miss writes.
    pub stale: Vec<StaleMark>,
    /// Which of the record's changes was the last, counted in the record: tells it from a restored one. 0: not counted.
    pub edition: u64,
    /// Another node is to be head: finish what is in progress, give the grants back, and say so ([`HeadState::HandedOver`]).
    pub is_moving: bool,
}

/// A head that the data plane has, or had in this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedHead {
    /// The volume.
    pub volume: VolumeId,
    /// The generation: as it was desired …
    pub takeover: u64,
    /// … and of this process.
    pub start: u64,
    /// Where it stands.
    pub state: HeadState,
    /// How many copies must be in sync, for the partition that needs most.
    pub copies_needed: u8,
    /// How many are, in the partition that has fewest.
    pub copies_in_sync: u8,
    /// Extents that are still to be made equal on members that are brought up to date.
    pub resync_extents: u64,
    /// Why requests wait; empty if they do not.
    pub blocked: String,
    /// In how many seconds these extents will be equal, if it goes on as it did; 0 while nobody can say.
    pub resync_eta_s: u32,
}

/// Where a head stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HeadState {
    /// Its generation is being opened at the replicas, or its copies are being compared; or what is in progress ends, before it hands
    /// over.
    #[default]
    Opening,
    /// Requests are carried out.
    Serving,
    /// It ended: another head has come.
    Replaced,
    /// It ended: a replica has seen newer metadata than it was made of (I14).
    Past,
    /// It has given its grants back as [`DesiredHead::is_moving`] asks, and waits for its successor for a moment.
    HandedOver,
}

/// A change that a head wishes of its volume's record. It stays until a desired state has a newer revision of the record, or
/// until the head is none any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberWish {
    /// The volume.
    pub volume: VolumeId,
    /// The head's generation.
    pub takeover: u64,
    /// See [`ObservedHead::start`].
    pub start: u64,
    /// Of the record that it was computed from: it is made at this one or not at all.
    pub revision: u64,
    /// Members to call stale.
    pub eject: Vec<StaleMark>,
    /// Members that are in sync again.
    pub join: Vec<MemberId>,
}

/// Whether this data plane's replicas have granted a node's heads something within the last second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Granting {
    /// Whose heads.
    pub node: NodeId,
    /// True also for the first second of a process, which does not know what its predecessor granted.
    pub is_granting: bool,
}

codes!(HeadState { Opening = 0, Serving = 1, Replaced = 2, Past = 3, HandedOver = 4, });

fn invalid<T>(what: String) -> Result<T, MapError> {
    Err(MapError::Invalid { what })
}

/// The first volume that is named twice.
fn named_twice(mut volumes: impl Iterator<Item = VolumeId>) -> Option<VolumeId> {
    let mut seen = BTreeSet::new();
    volumes.find(|volume| !seen.insert(*volume))
}

/// A count that is known to be small.
fn count(len: usize, most: usize, what: &str) -> Result<U32, MapError> {
    at_most(most, len, what)?;
    Ok(u32::try_from(len).map_err(|_| MapError::Invalid { what: format!("too many {what}") })?.into())
}

/// The next `count` entries of a list that several others have their parts of.
fn take<T>(from: &mut IntoIter<T>, count: U32, most: usize, what: &str) -> Result<Vec<T>, Fault> {
    let count = usize::try_from(count.get()).unwrap_or(usize::MAX);
    if count > most || count > from.len() {
        return Err(Fault::Corrupt(format!("{count} {what}, of {} that there are", from.len())));
    }
    Ok(from.by_ref().take(count).collect())
}

fn nothing_left<T>(from: &IntoIter<T>, what: &str) -> Result<(), Fault> {
    if from.len() == 0 {
        Ok(())
    } else {
        Err(Fault::Corrupt(format!("{} {what} belong to nothing", from.len())))
    }
}

/// An address; family 0 is none, 4 and 6 are those of IP.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct AddrRecord {
    ip: [u8; 16],
    family: u8,
    base_port: U16,
}

impl AddrRecord {
    /// For a data plane on so many cores.
    pub(crate) fn encode(addr: Option<PeerAddr>, cores: usize) -> Result<Self, MapError> {
        let Some(addr) = addr else { return Ok(Self { ip: [0; 16], family: 0, base_port: 0.into() }) };
        if !addr.has_ports_for(cores) {
            return invalid(format!("no {cores} ports for peers from port {} on", addr.base_port));
        }
        let mut ip = [0; 16];
        let family = match addr.ip {
            IpAddr::V4(four) => {
                ip[..4].copy_from_slice(&four.octets());
                4
            }
            IpAddr::V6(six) => {
                ip = six.octets();
                6
            }
        };
        Ok(Self { ip, family, base_port: addr.base_port.into() })
    }

    pub(crate) fn decode(self, cores: usize) -> Result<Option<PeerAddr>, Fault> {
        let [a, b, c, d, ..] = self.ip;
        let ip = match self.family {
            0 => return Ok(None),
            4 => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
            6 => IpAddr::V6(Ipv6Addr::from(self.ip)),
            other => return Err(Fault::Corrupt(format!("unknown family of addresses {other}"))),
        };
        let addr = PeerAddr { ip, base_port: self.base_port.get() };
        if addr.has_ports_for(cores) { Ok(Some(addr)) } else { Err(Fault::corrupt("ports for peers")) }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct PeerRecord {
    node: [u8; 16],
    cores: U16,
    addr: AddrRecord,
}

impl Record for PeerRecord {
    const NAME: &'static str = "peer";
    const LEAST: usize = size_of::<Self>();
}

impl PeerRecord {
    pub(crate) fn encode(peer: &DesiredPeer) -> Result<Self, MapError> {
        if peer.cores == 0 {
            return invalid(format!("peer {} has no cores", peer.node));
        }
        let addr = AddrRecord::encode(Some(peer.addr), usize::from(peer.cores))?;
        Ok(Self { node: peer.node.0, cores: peer.cores.into(), addr })
    }

    pub(crate) fn decode(self) -> Result<DesiredPeer, Fault> {
        let cores = self.cores.get();
        let addr = self.addr.decode(usize::from(cores))?;
        let addr =
            addr.filter(|_| cores > 0).ok_or_else(|| Fault::corrupt("a peer without address or cores"))?;
        Ok(DesiredPeer { node: NodeId(self.node), addr, cores })
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MemberRecord {
    store: [u8; 16],
    incarnation: U64,
}

impl Record for MemberRecord {
    const NAME: &'static str = "member";
    const LEAST: usize = size_of::<Self>();
}

impl MemberRecord {
    fn encode(member: MemberId) -> Self {
        Self { store: member.store.0, incarnation: member.incarnation.into() }
    }

    fn decode(self) -> MemberId {
        MemberId { store: StoreId(self.store), incarnation: self.incarnation.get() }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct OwnerRecord {
    member: MemberRecord,
    node: [u8; 16],
    is_complete: u8,
    shards: U16,
}

impl Record for OwnerRecord {
    const NAME: &'static str = "owner";
    const LEAST: usize = size_of::<Self>();
}

impl OwnerRecord {
    fn encode(owner: &HeadOwner) -> Self {
        Self {
            member: MemberRecord::encode(owner.member),
            node: owner.node.0,
            is_complete: owner.is_complete.into(),
            shards: owner.shards.into(),
        }
    }

    fn decode(self) -> Result<HeadOwner, Fault> {
        let (member, node, shards) = (self.member.decode(), NodeId(self.node), self.shards.get());
        Ok(HeadOwner { member, node, shards, is_complete: flag(self.is_complete, "is_complete")? })
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MarkRecord {
    member: MemberRecord,
    mark: U64,
}

impl Record for MarkRecord {
    const NAME: &'static str = "mark";
    const LEAST: usize = size_of::<Self>();
}

impl MarkRecord {
    fn encode(stale: &StaleMark) -> Self {
        Self { member: MemberRecord::encode(stale.member), mark: stale.mark.into() }
    }

    fn decode(self) -> StaleMark {
        StaleMark { member: self.member.decode(), mark: self.mark.get() }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PartitionRecord {
    epoch: U64,
    owners: U32,
}

impl Record for PartitionRecord {
    const NAME: &'static str = "partition";
    const LEAST: usize = size_of::<Self>();
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HeadRecord {
    volume: [u8; 16],
    takeover: U64,
    revision: U64,
    min_copies: u8,
    partitions: U32,
    stale: U32,
    /// From here on absent at level 4.
    is_moving: u8,
    edition: U64,
}

impl Record for HeadRecord {
    const NAME: &'static str = "head";
    /// Without the hand-over and the edition.
    const LEAST: usize = std::mem::offset_of!(Self, is_moving);
}

impl HeadRecord {
    fn encode(head: &DesiredHead) -> Result<Self, MapError> {
        if head.partitions.is_empty() {
            return invalid(format!("volume {} has no partitions", head.volume));
        }
        Ok(Self {
            volume: head.volume.0,
            takeover: head.takeover.into(),
            revision: head.revision.into(),
            min_copies: head.min_copies,
            partitions: count(head.partitions.len(), MAX_PARTITIONS, "partitions of a volume")?,
            stale: count(head.stale.len(), MAX_CHANGED_MEMBERS, "stale members of a volume")?,
            is_moving: head.is_moving.into(),
            edition: head.edition.into(),
        })
    }
}

/// The tables of the heads that are desired.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct HeadTables {
    heads: Table,
    partitions: Table,
    owners: Table,
    stale: Table,
}

impl HeadTables {
    pub(crate) fn encode(to: &mut Encoder<'_>, heads: &[DesiredHead]) -> Result<Self, MapError> {
        if let Some(volume) = named_twice(heads.iter().map(|head| head.volume)) {
            return invalid(format!("volume {volume} has two heads"));
        }
        let partitions: Vec<_> = heads.iter().flat_map(|head| &head.partitions).collect();
        let owners: Vec<_> = partitions.iter().flat_map(|partition| &partition.owners).collect();
        let stale: Vec<_> = heads.iter().flat_map(|head| &head.stale).collect();
        let partition = |_: &mut Encoder<'_>, partition: &&HeadPartition| {
            if partition.owners.is_empty() {
                return invalid("a partition has no owner".into());
            }
            let owners = count(partition.owners.len(), MAX_OWNERS, "owners of a partition")?;
            Ok(PartitionRecord { epoch: partition.epoch.into(), owners })
        };
        Ok(Self {
            heads: to.table(heads, |_, head| HeadRecord::encode(head))?,
            partitions: to.table(&partitions, partition)?,
            owners: to.table(&owners, |_, owner| Ok(OwnerRecord::encode(owner)))?,
            stale: to.table(&stale, |_, stale| Ok(MarkRecord::encode(stale)))?,
        })
    }

    pub(crate) fn decode(&self, from: &mut Decoder<'_>) -> Result<Vec<DesiredHead>, Fault> {
        let mut owners = from.added_table(&self.owners, |_, owner: OwnerRecord| owner.decode())?.into_iter();
        let mut stale = from.added_table(&self.stale, |_, stale: MarkRecord| Ok(stale.decode()))?.into_iter();
        let partition = |_: &mut Decoder<'_>, partition: PartitionRecord| {
            let owners = take(&mut owners, partition.owners, MAX_OWNERS, "owners of a partition")?;
            if owners.is_empty() {
                return Err(Fault::corrupt("a partition has no owner"));
            }
            Ok(HeadPartition { epoch: partition.epoch.get(), owners })
        };
        let mut partitions = from.added_table(&self.partitions, partition)?.into_iter();
        nothing_left(&owners, "owners")?;
        let head = |_: &mut Decoder<'_>, head: HeadRecord| {
            let partitions =
                take(&mut partitions, head.partitions, MAX_PARTITIONS, "partitions of a volume")?;
            if partitions.is_empty() {
                return Err(Fault::corrupt("a volume has no partitions"));
            }
            Ok(DesiredHead {
                volume: VolumeId(head.volume),
                takeover: head.takeover.get(),
                revision: head.revision.get(),
                min_copies: head.min_copies,
                partitions,
                stale: take(&mut stale, head.stale, MAX_CHANGED_MEMBERS, "stale members of a volume")?,
                is_moving: flag(head.is_moving, "is_moving")?,
                edition: head.edition.get(),
            })
        };
        let heads = from.added_table(&self.heads, head)?;
        nothing_left(&partitions, "partitions")?;
        nothing_left(&stale, "stale members")?;
        match named_twice(heads.iter().map(|head| head.volume)) {
            None => Ok(heads),
            Some(volume) => Err(Fault::Corrupt(format!("volume {volume} has two heads"))),
        }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HeadSeenRecord {
    volume: [u8; 16],
    takeover: U64,
    start: U64,
    state: u8,
    copies_needed: u8,
    copies_in_sync: u8,
    resync_extents: U64,
    blocked: Text,
    /// From here on absent at level 4.
    resync_eta_s: U32,
}

impl Record for HeadSeenRecord {
    const NAME: &'static str = "observed head of a volume";
    /// Without the time that is left.
    const LEAST: usize = std::mem::offset_of!(Self, resync_eta_s);
}

impl HeadSeenRecord {
    fn encode(out: &mut Encoder<'_>, head: &ObservedHead) -> Result<Self, MapError> {
        Ok(Self {
            volume: head.volume.0,
            takeover: head.takeover.into(),
            start: head.start.into(),
            state: head.state.code(),
            copies_needed: head.copies_needed,
            copies_in_sync: head.copies_in_sync,
            resync_extents: head.resync_extents.into(),
            blocked: out.text(cut(&head.blocked))?,
            resync_eta_s: head.resync_eta_s.into(),
        })
    }

    fn decode(self, from: &mut Decoder<'_>) -> Result<ObservedHead, Fault> {
        Ok(ObservedHead {
            volume: VolumeId(self.volume),
            takeover: self.takeover.get(),
            start: self.start.get(),
            state: HeadState::from_code(self.state)?,
            copies_needed: self.copies_needed,
            copies_in_sync: self.copies_in_sync,
            resync_extents: self.resync_extents.get(),
            blocked: from.text(self.blocked)?,
            resync_eta_s: self.resync_eta_s.get(),
        })
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WishRecord {
    volume: [u8; 16],
    takeover: U64,
    start: U64,
    revision: U64,
    eject: U32,
    join: U32,
}

impl Record for WishRecord {
    const NAME: &'static str = "wish";
    const LEAST: usize = size_of::<Self>();
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GrantingRecord {
    node: [u8; 16],
    is_granting: u8,
}

impl Record for GrantingRecord {
    const NAME: &'static str = "granting";
    const LEAST: usize = size_of::<Self>();
}

/// The tables of what heads have come to, what they wish and what replicas grant.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ObservedTables {
    heads: Table,
    wishes: Table,
    eject: Table,
    join: Table,
    granting: Table,
}

/// What they hold.
pub(crate) type Told = (Vec<ObservedHead>, Vec<MemberWish>, Vec<Granting>);

impl ObservedTables {
    pub(crate) fn encode(
        to: &mut Encoder<'_>,
        heads: &[ObservedHead],
        wishes: &[MemberWish],
        granting: &[Granting],
    ) -> Result<Self, MapError> {
        if let Some(volume) = named_twice(heads.iter().map(|head| head.volume)) {
            return invalid(format!("volume {volume} has two heads"));
        }
        if let Some(volume) = named_twice(wishes.iter().map(|wish| wish.volume)) {
            return invalid(format!("two changes of the record of volume {volume} are wished for"));
        }
        let eject: Vec<_> = wishes.iter().flat_map(|wish| &wish.eject).collect();
        let join: Vec<_> = wishes.iter().flat_map(|wish| &wish.join).collect();
        let wish = |_: &mut Encoder<'_>, wish: &MemberWish| {
            Ok(WishRecord {
                volume: wish.volume.0,
                takeover: wish.takeover.into(),
                start: wish.start.into(),
                revision: wish.revision.into(),
                eject: count(wish.eject.len(), MAX_CHANGED_MEMBERS, "members to eject")?,
                join: count(wish.join.len(), MAX_CHANGED_MEMBERS, "members to take in")?,
            })
        };
        let grant = |_: &mut Encoder<'_>, grant: &Granting| {
            Ok(GrantingRecord { node: grant.node.0, is_granting: grant.is_granting.into() })
        };
        Ok(Self {
            heads: to.table(heads, HeadSeenRecord::encode)?,
            wishes: to.table(wishes, wish)?,
            eject: to.table(&eject, |_, stale| Ok(MarkRecord::encode(stale)))?,
            join: to.table(&join, |_, member| Ok(MemberRecord::encode(**member)))?,
            granting: to.table(granting, grant)?,
        })
    }

    pub(crate) fn decode(&self, from: &mut Decoder<'_>) -> Result<Told, Fault> {
        let heads = from.added_table(&self.heads, |from, head: HeadSeenRecord| head.decode(from))?;
        let mut eject = from.added_table(&self.eject, |_, stale: MarkRecord| Ok(stale.decode()))?.into_iter();
        let mut join = from.added_table(&self.join, |_, one: MemberRecord| Ok(one.decode()))?.into_iter();
        let wish = |_: &mut Decoder<'_>, wish: WishRecord| {
            Ok(MemberWish {
                volume: VolumeId(wish.volume),
                takeover: wish.takeover.get(),
                start: wish.start.get(),
                revision: wish.revision.get(),
                eject: take(&mut eject, wish.eject, MAX_CHANGED_MEMBERS, "members to eject")?,
                join: take(&mut join, wish.join, MAX_CHANGED_MEMBERS, "members to take in")?,
            })
        };
        let wishes = from.added_table(&self.wishes, wish)?;
        nothing_left(&eject, "members to eject")?;
        nothing_left(&join, "members to take in")?;
        let granting = from.added_table(&self.granting, |_, grant: GrantingRecord| {
            Ok(Granting { node: NodeId(grant.node), is_granting: flag(grant.is_granting, "is_granting")? })
        })?;
        if named_twice(heads.iter().map(|head| head.volume)).is_some() {
            return Err(Fault::corrupt("a volume has two heads"));
        }
        if named_twice(wishes.iter().map(|wish| wish.volume)).is_some() {
            return Err(Fault::corrupt("two changes of one record are wished for"));
        }
        Ok((heads, wishes, granting))
    }
}

/// For the tests of the states that these are parts of.
#[cfg(not(loom))]
#[cfg(test)]
pub(crate) mod strategies {
    use super::*;
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;
    use proptest::sample::select;

    pub(crate) fn peer_addr() -> impl Strategy<Value = PeerAddr> {
        let ip = prop_oneof![
            any::<[u8; 4]>().prop_map(|ip| IpAddr::V4(ip.into())),
            any::<[u8; 16]>().prop_map(|ip| IpAddr::V6(ip.into())),
        ];
        (ip, 1..60_000_u16).prop_map(|(ip, base_port)| PeerAddr { ip, base_port })
    }

    pub(crate) fn peer() -> impl Strategy<Value = DesiredPeer> {
        (any::<[u8; 16]>(), peer_addr(), 1..200_u16).prop_map(|(node, addr, cores)| DesiredPeer {
            node: NodeId(node),
            addr,
            cores,
        })
    }

    fn member() -> impl Strategy<Value = MemberId> {
        (any::<[u8; 16]>(), any::<u64>())
            .prop_map(|(store, incarnation)| MemberId { store: StoreId(store), incarnation })
    }

    fn mark() -> impl Strategy<Value = StaleMark> {
        (member(), any::<u64>()).prop_map(|(member, mark)| StaleMark { member, mark })
    }

    fn partition() -> impl Strategy<Value = HeadPartition> {
        let owner = (member(), any::<[u8; 16]>(), any::<u16>(), any::<bool>()).prop_map(
            |(member, node, shards, is_complete)| HeadOwner {
                member,
                node: NodeId(node),
                shards,
                is_complete,
            },
        );
        (any::<u64>(), vec(owner, 1..4)).prop_map(|(epoch, owners)| HeadPartition { epoch, owners })
    }

    /// Heads of different volumes.
    pub(crate) fn heads() -> impl Strategy<Value = Vec<DesiredHead>> {
        let numbers = (any::<u64>(), any::<u64>(), any::<u8>(), any::<bool>(), any::<u64>());
        let of_one = (numbers, vec(partition(), 1..4), vec(mark(), 0..3));
        btree_map(any::<[u8; 16]>(), of_one, 0..4).prop_map(|heads| {
            let head =
                |(volume, ((takeover, revision, min_copies, is_moving, edition), partitions, stale))| {
                    DesiredHead {
                        volume: VolumeId(volume),
                        takeover,
                        revision,
                        min_copies,
                        partitions,
                        stale,
                        is_moving,
                        edition,
                    }
                };
            heads.into_iter().map(head).collect()
        })
    }

    type Numbers = (u64, u64, u8, u8, u64, u32);

    pub(crate) fn observed_heads() -> impl Strategy<Value = Vec<ObservedHead>> {
        use HeadState::{HandedOver, Opening, Past, Replaced, Serving};
        let numbers = (any::<u64>(), any::<u64>(), any::<u8>(), any::<u8>(), any::<u64>(), any::<u32>());
        let of_one = (numbers, select(vec![Opening, Serving, Replaced, Past, HandedOver]), "[ -~ä€]{0,40}");
        btree_map(any::<[u8; 16]>(), of_one, 0..4).prop_map(|heads| {
            let head = |(volume, (numbers, state, blocked)): ([u8; 16], (Numbers, _, _))| {
                let (takeover, start, copies_needed, copies_in_sync, resync_extents, resync_eta_s) = numbers;
                ObservedHead {
                    volume: VolumeId(volume),
                    takeover,
                    start,
                    state,
                    copies_needed,
                    copies_in_sync,
                    resync_extents,
                    blocked,
                    resync_eta_s,
                }
            };
            heads.into_iter().map(head).collect()
        })
    }

    pub(crate) fn wishes() -> impl Strategy<Value = Vec<MemberWish>> {
        let of_one = (any::<[u64; 3]>(), vec(mark(), 0..3), vec(member(), 0..3));
        btree_map(any::<[u8; 16]>(), of_one, 0..4).prop_map(|wishes| {
            let wish = |(volume, (numbers, eject, join)): ([u8; 16], ([u64; 3], _, _))| MemberWish {
                volume: VolumeId(volume),
                takeover: numbers[0],
                start: numbers[1],
                revision: numbers[2],
                eject,
                join,
            };
            wishes.into_iter().map(wish).collect()
        })
    }

    pub(crate) fn granting() -> impl Strategy<Value = Vec<Granting>> {
        let one = (any::<[u8; 16]>(), any::<bool>())
            .prop_map(|(node, is_granting)| Granting { node: NodeId(node), is_granting });
        vec(one, 0..4)
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_not_shown() {
        let key = ClusterKey([0x5a; 32]);
        assert_eq!(format!("{key:?}"), "ClusterKey(not shown)");
        assert!(ClusterKey::default().is_nil() && !key.is_nil());
    }

    #[test]
    fn every_core_has_a_port() {
        let at = |base_port| PeerAddr { ip: IpAddr::V4(Ipv4Addr::LOCALHOST), base_port };
        assert!(at(u16::MAX).has_ports_for(1) && !at(u16::MAX).has_ports_for(2) && !at(0).has_ports_for(1));
        let peer = |base_port, cores| DesiredPeer { node: NodeId([1; 16]), addr: at(base_port), cores };
        assert!(PeerRecord::encode(&peer(65_534, 2)).is_ok());
        for bad in [peer(65_535, 2), peer(1, 0), peer(0, 1)] {
            assert!(matches!(PeerRecord::encode(&bad), Err(MapError::Invalid { .. })), "{bad:?}");
        }
        let mut record = PeerRecord::encode(&peer(65_534, 2)).expect("it fits");
        record.cores = 3.into();
        assert_eq!(record.decode(), Err(Fault::corrupt("ports for peers")));
        let mut record = PeerRecord::encode(&peer(1, 1)).expect("it fits");
        record.addr.family = 0;
        assert!(record.decode().is_err(), "a peer has an address");
    }
}
