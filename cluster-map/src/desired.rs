//! The desired state: what the control process wants the data plane to do.
//!
//! One [`Desired`] is the whole wish of a node, never a difference and never a command: either process may miss any
//! number of versions, crash or be replaced, and the newest version alone is enough to converge.

use crate::change::{AnswerRecord, at_most, put_macs, put_string, take_macs, take_string};
use crate::error::{Fault, MapError};
use crate::layout::LOWEST_READER;
use crate::record::{Decoder, Encoder, Preamble, Record, Table, Text, codes, flag};
use crate::replication::{AddrRecord, HeadTables, PeerRecord};
use crate::{
    ChangeAnswer, ClusterId, ClusterKey, DesiredHead, DesiredPeer, MAX_CHANGES, MAX_LISTED_MACS,
    MAX_PATH_BYTES, NodeId, PeerAddr, StoreId, VolumeId,
};
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most interfaces: an export's MACs have 4 bits for the interface's ordinal.
pub const MAX_INTERFACES: usize = 16;

/// Served on every interface, as the mask of [`DesiredExport::on_interfaces`].
pub const EVERY_INTERFACE: u16 = u16::MAX;

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
    /// By what frames are to reach the core that serves their export. Read at data-plane start only.
    pub steering: SteeringChoice,
    /// The logical interfaces to serve on, in ordinal order, at most [`MAX_INTERFACES`]: `eth0`, or `eth0@100` for the
    /// frames of VLAN 100. Read at data-plane start only.
    pub interfaces: Vec<String>,
    /// The stores to open.
    pub stores: Vec<DesiredStore>,
    /// The volumes to have, and those to purge.
    pub volumes: Vec<DesiredVolume>,
    /// The volumes to serve, with their addresses.
    pub exports: Vec<DesiredExport>,
    /// What became of the changes in [`Observed::changes`](crate::Observed::changes), at most [`MAX_CHANGES`]. The exports are those
    /// after the change.
    pub answers: Vec<ChangeAnswer>,
    /// Finish what is in flight, then exit with code 0.
    pub drain: bool,
    /// Grown durably by the control process before every start of a data plane, so that no two have the same. Read at
    /// data-plane start only.
    pub start: u64,
    /// What proves to peers that the node belongs to the cluster.
    pub cluster_key: ClusterKey,
    /// Where to listen for peers, each core at a port of its own; `None`: nowhere. Read at data-plane start only.
    pub listen: Option<PeerAddr>,
    /// The other nodes whose data planes can be called.
    pub peers: Vec<DesiredPeer>,
    /// The replicated volumes that this node is to be head of, each once.
    pub heads: Vec<DesiredHead>,
    /// Most bytes that the node's heads compare and copy in a second, all together, to bring members up to date; 0: no limit.
    pub resync_bytes_per_s: u64,
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

/// By what frames are to reach the core that serves their export, where there are several cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SteeringChoice {
    /// By the NIC's receive rules where it takes them, else by the XDP program, else cores hand them over.
    #[default]
    Auto,
    /// By the NIC's receive rules, as far as it takes them.
    Nic,
    /// By the XDP program.
    Program,
    /// Cores hand them over.
    HandOver,
}

/// A store to open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredStore {
    /// Path of the file or block device, 1 to [`MAX_PATH_BYTES`] bytes.
    pub path: String,
    /// Size to give it when it is created, in bytes; 0: take what is there.
    pub size_bytes: u64,
    /// The id that the store is expected to carry; `None` until it is known.
    pub id: Option<StoreId>,
    /// The scrub that it is to have; `None`: none was asked for, or the last one has been recorded as finished.
    pub scrub: Option<ScrubWish>,
}

/// A scrub that a store is to have: every block in use is read and compared with its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubWish {
    /// Number of the run; a larger one than the last begins anew, the same goes on where it was.
    pub run: u64,
    /// Most bytes to read in a second, at least 1; may change while it runs.
    pub rate_bytes_per_s: u64,
    /// Stop where it is, to go on later.
    pub stopped: bool,
}

/// A volume to have on a store. A replicated volume has an entry for each of the node's stores that own a part of it.
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
    /// Of a replicated volume: which core serves it and which shard of a store has it, by the remainder to their counts; the
    /// same on all nodes. `None`: the volume has one copy, which is served without a head.
    pub lane: Option<u16>,
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
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Bit `i`: serve on [`Desired::interfaces`]`[i]`. All ones, [`EVERY_INTERFACE`], is the default.
    pub on_interfaces: u16,
    /// The config string of Query Config, at most [`MAX_CONFIG_STRING_BYTES`](crate::MAX_CONFIG_STRING_BYTES).
    pub config_string: Vec<u8>,
    /// The mask list: the MACs that are answered, at most [`MAX_LISTED_MACS`]; empty: every one.
    pub masks: Vec<[u8; 6]>,
    /// The MACs that the export is reserved for, at most [`MAX_LISTED_MACS`]; empty: not reserved.
    pub reserved_for: Vec<[u8; 6]>,
    /// Who may change these over AoE.
    pub allow: AoePolicy,
}

impl Default for DesiredExport {
    fn default() -> Self {
        Self {
            volume: VolumeId::default(),
            shelf: 0,
            slot: 0,
            mac: [0; 6],
            read_only: false,
            on_interfaces: EVERY_INTERFACE,
            config_string: Vec::new(),
            masks: Vec::new(),
            reserved_for: Vec::new(),
            allow: AoePolicy::default(),
        }
    }
}

/// Who may change an export's settings over AoE. Any initiator may always read them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AoePolicy {
    /// The config string.
    pub config: Allow,
    /// The mask list.
    pub masks: Allow,
    /// The reservation; releasing it is changing it.
    pub reserve: Allow,
}

/// Which initiators are allowed something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Allow {
    /// None: only the API of the cluster.
    #[default]
    Nobody,
    /// All.
    Anyone,
    /// Those with these MACs, at most [`MAX_LISTED_MACS`].
    Only(Vec<[u8; 6]>),
}

impl Allow {
    /// Whether the initiator with this MAC is allowed it.
    #[must_use]
    pub fn includes(&self, mac: [u8; 6]) -> bool {
        match self {
            Self::Nobody => false,
            Self::Anyone => true,
            Self::Only(macs) => macs.contains(&mac),
        }
    }
}

/// The codes of [`Allow`].
#[derive(Clone, Copy)]
enum AllowKind {
    Nobody,
    Anyone,
    Only,
}

codes!(AllowKind { Nobody = 0, Anyone = 1, Only = 2, });
codes!(LinkChoice { Auto = 0, AfXdp = 1, AfPacket = 2, });
codes!(SteeringChoice { Auto = 0, Nic = 1, Program = 2, HandOver = 3, });
codes!(VolumeIntent { Active = 0, Purging = 1, });

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    preamble: Preamble,
    cluster: [u8; 16],
    node: [u8; 16],
    link: u8,
    drain: u8,
    steering: u8,
    reserved: u8,
    cores: Table,
    interfaces: Table,
    stores: Table,
    volumes: Table,
    exports: Table,
    pool: Table,
    answers: Table,
    /// From here on absent at level 3.
    peers: Table,
    heads: HeadTables,
    start: U64,
    cluster_key: [u8; 32],
    listen: AddrRecord,
    /// From here on absent at level 4.
    resync_bytes_per_s: U64,
}

impl Record for Head {
    const NAME: &'static str = "desired head";
    /// Without the answers and what came after them.
    const LEAST: usize = std::mem::offset_of!(Self, answers);
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CoreRecord {
    cpu: U16,
}

impl Record for CoreRecord {
    const NAME: &'static str = "core";
    const LEAST: usize = size_of::<Self>();
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct InterfaceRecord {
    name: Text,
}

impl Record for InterfaceRecord {
    const NAME: &'static str = "interface";
    const LEAST: usize = size_of::<Self>();
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StoreRecord {
    path: Text,
    size_bytes: U64,
    id: [u8; 16],
    id_known: u8,
    /// From here on absent at level 2.
    scrub_known: u8,
    scrub_stopped: u8,
    scrub_run: U64,
    scrub_rate: U64,
}

impl Record for StoreRecord {
    const NAME: &'static str = "store";
    /// Without the id, as before it is known.
    const LEAST: usize = 16;
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct VolumeRecord {
    id: [u8; 16],
    store: [u8; 16],
    size_sectors: U64,
    state: u8,
    /// From here on absent at level 3.
    lane_known: u8,
    lane: U16,
}

impl Record for VolumeRecord {
    const NAME: &'static str = "volume";
    /// Without the lane.
    const LEAST: usize = std::mem::offset_of!(Self, lane_known);
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ExportRecord {
    volume: [u8; 16],
    shelf: U16,
    slot: u8,
    read_only: u8,
    mac: [u8; 6],
    /// The interfaces that it is *not* served on: a record of the former level, without it, is served on all.
    not_on: U16,
    config_string: Text,
    masks: Text,
    reserved_for: Text,
    allow: [AllowRecord; 3],
}

impl Record for ExportRecord {
    const NAME: &'static str = "export";
    /// Up to the MAC.
    const LEAST: usize = 26;
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct AllowRecord {
    kind: u8,
    macs: Text,
}

/// An export's base address leaves its low 4 bits to the ordinal of the interface.
fn is_mac_base(mac: [u8; 6]) -> bool {
    mac[5] & 0x0f == 0
}

fn invalid<T>(what: String) -> Result<T, MapError> {
    Err(MapError::Invalid { what })
}

impl StoreRecord {
    fn encode(out: &mut Encoder<'_>, store: &DesiredStore) -> Result<Self, MapError> {
        if store.path.is_empty() || store.path.len() > MAX_PATH_BYTES {
            return invalid(format!("store path {:?} is not 1 to {MAX_PATH_BYTES} bytes long", store.path));
        }
        let scrub = store.scrub;
        if scrub.is_some_and(|scrub| scrub.rate_bytes_per_s == 0) {
            return invalid(format!("the scrub of store {:?} has a rate of 0", store.path));
        }
        Ok(Self {
            path: out.text(&store.path)?,
            size_bytes: store.size_bytes.into(),
            id: store.id.unwrap_or_default().0,
            id_known: store.id.is_some().into(),
            scrub_known: scrub.is_some().into(),
            scrub_stopped: scrub.is_some_and(|scrub| scrub.stopped).into(),
            scrub_run: scrub.map_or(0, |scrub| scrub.run).into(),
            scrub_rate: scrub.map_or(0, |scrub| scrub.rate_bytes_per_s).into(),
        })
    }

    fn decode(self, from: &mut Decoder<'_>) -> Result<DesiredStore, Fault> {
        let path = from.text(self.path)?;
        if path.is_empty() || path.len() > MAX_PATH_BYTES {
            return Err(Fault::corrupt("length of a store's path"));
        }
        let id = flag(self.id_known, "id_known")?.then_some(StoreId(self.id));
        let scrub = ScrubWish {
            run: self.scrub_run.get(),
            rate_bytes_per_s: self.scrub_rate.get(),
            stopped: flag(self.scrub_stopped, "scrub_stopped")?,
        };
        let scrub = flag(self.scrub_known, "scrub_known")?.then_some(scrub);
        if scrub.is_some_and(|scrub| scrub.rate_bytes_per_s == 0) {
            return Err(Fault::corrupt("a scrub has a rate of 0"));
        }
        Ok(DesiredStore { path, size_bytes: self.size_bytes.get(), id, scrub })
    }
}

impl VolumeRecord {
    fn encode(volume: &DesiredVolume) -> Self {
        Self {
            id: volume.id.0,
            store: volume.store.0,
            size_sectors: volume.size_sectors.into(),
            state: volume.state.code(),
            lane_known: volume.lane.is_some().into(),
            lane: volume.lane.unwrap_or(0).into(),
        }
    }

    fn decode(self) -> Result<DesiredVolume, Fault> {
        Ok(DesiredVolume {
            id: VolumeId(self.id),
            store: StoreId(self.store),
            size_sectors: self.size_sectors.get(),
            state: VolumeIntent::from_code(self.state)?,
            lane: flag(self.lane_known, "lane_known")?.then_some(self.lane.get()),
        })
    }
}

impl AllowRecord {
    fn encode(out: &mut Encoder<'_>, allow: &Allow) -> Result<Self, MapError> {
        let (kind, macs): (_, &[_]) = match allow {
            Allow::Nobody => (AllowKind::Nobody, &[]),
            Allow::Anyone => (AllowKind::Anyone, &[]),
            Allow::Only(macs) => (AllowKind::Only, macs),
        };
        Ok(Self { kind: kind.code(), macs: put_macs(out, macs, MAX_LISTED_MACS)? })
    }

    fn decode(self, from: &mut Decoder<'_>) -> Result<Allow, Fault> {
        Ok(match AllowKind::from_code(self.kind)? {
            AllowKind::Nobody => Allow::Nobody,
            AllowKind::Anyone => Allow::Anyone,
            AllowKind::Only => Allow::Only(take_macs(from, self.macs, MAX_LISTED_MACS)?),
        })
    }
}

impl ExportRecord {
    fn encode(out: &mut Encoder<'_>, export: &DesiredExport) -> Result<Self, MapError> {
        if !is_mac_base(export.mac) {
            return invalid(format!("MAC of export {}.{} has its low 4 bits set", export.shelf, export.slot));
        }
        let AoePolicy { config, masks, reserve } = &export.allow;
        Ok(Self {
            volume: export.volume.0,
            shelf: export.shelf.into(),
            slot: export.slot,
            read_only: export.read_only.into(),
            mac: export.mac,
            not_on: (!export.on_interfaces).into(),
            config_string: put_string(out, &export.config_string)?,
            masks: put_macs(out, &export.masks, MAX_LISTED_MACS)?,
            reserved_for: put_macs(out, &export.reserved_for, MAX_LISTED_MACS)?,
            allow: [
                AllowRecord::encode(out, config)?,
                AllowRecord::encode(out, masks)?,
                AllowRecord::encode(out, reserve)?,
            ],
        })
    }

    fn decode(self, from: &mut Decoder<'_>) -> Result<DesiredExport, Fault> {
        if !is_mac_base(self.mac) {
            return Err(Fault::corrupt("MAC of an export has its low 4 bits set"));
        }
        let [config, masks, reserve] = self.allow;
        Ok(DesiredExport {
            volume: VolumeId(self.volume),
            shelf: self.shelf.get(),
            slot: self.slot,
            mac: self.mac,
            read_only: flag(self.read_only, "read_only")?,
            on_interfaces: !self.not_on.get(),
            config_string: take_string(from, self.config_string)?,
            masks: take_macs(from, self.masks, MAX_LISTED_MACS)?,
            reserved_for: take_macs(from, self.reserved_for, MAX_LISTED_MACS)?,
            allow: AoePolicy {
                config: config.decode(from)?,
                masks: masks.decode(from)?,
                reserve: reserve.decode(from)?,
            },
        })
    }
}

impl Desired {
    /// Writes the state to `out`, replacing what is there; the version is not part of it.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), MapError> {
        at_most(MAX_INTERFACES, self.interfaces.len(), "interfaces")?;
        at_most(MAX_CHANGES, self.answers.len(), "answers to changes")?;
        let mut to = Encoder::new::<Head>(out);
        let head = Head {
            preamble: Preamble::of::<Head>(LOWEST_READER),
            cluster: self.cluster.0,
            node: self.node.0,
            link: self.link.code(),
            drain: self.drain.into(),
            steering: self.steering.code(),
            reserved: 0,
            cores: to.table(&self.cores, |_, cpu| Ok(CoreRecord { cpu: (*cpu).into() }))?,
            interfaces: to
                .table(&self.interfaces, |to, name| Ok(InterfaceRecord { name: to.text(name)? }))?,
            stores: to.table(&self.stores, StoreRecord::encode)?,
            volumes: to.table(&self.volumes, |_, volume| Ok(VolumeRecord::encode(volume)))?,
            exports: to.table(&self.exports, ExportRecord::encode)?,
            answers: to.table(&self.answers, |_, answer| Ok(AnswerRecord::encode(answer)))?,
            peers: to.table(&self.peers, |_, peer| PeerRecord::encode(peer))?,
            heads: HeadTables::encode(&mut to, &self.heads)?,
            start: self.start.into(),
            cluster_key: self.cluster_key.0,
            listen: AddrRecord::encode(self.listen, self.cores.len())?,
            resync_bytes_per_s: self.resync_bytes_per_s.into(),
            pool: to.pool()?,
        };
        to.finish(&head);
        Ok(())
    }

    /// Reads the state of a version; total.
    pub(crate) fn decode(bytes: &[u8], version: u64) -> Result<Self, Fault> {
        let (mut from, head) = Decoder::new::<Head>(bytes)?;
        from.use_pool(&head.pool)?;
        let cores = from.table(&head.cores, |_, core: CoreRecord| Ok(core.cpu.get()))?;
        Ok(Self {
            version,
            cluster: ClusterId(head.cluster),
            node: NodeId(head.node),
            listen: head.listen.decode(cores.len())?,
            cores,
            link: LinkChoice::from_code(head.link)?,
            steering: SteeringChoice::from_code(head.steering)?,
            interfaces: from.table(&head.interfaces, |from, one: InterfaceRecord| from.text(one.name))?,
            stores: from.table(&head.stores, |from, store: StoreRecord| store.decode(from))?,
            volumes: from.table(&head.volumes, |_, volume: VolumeRecord| volume.decode())?,
            exports: from.table(&head.exports, |from, export: ExportRecord| export.decode(from))?,
            answers: from.added_table(&head.answers, |_, answer: AnswerRecord| answer.decode())?,
            drain: flag(head.drain, "drain")?,
            start: head.start.get(),
            cluster_key: ClusterKey(head.cluster_key),
            peers: from.added_table(&head.peers, |_, peer: PeerRecord| peer.decode())?,
            heads: head.heads.decode(&mut from)?,
            resync_bytes_per_s: head.resync_bytes_per_s.get(),
        })
    }
}

#[cfg(not(loom))]
#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::MAX_CONFIG_STRING_BYTES;
    use crate::change::strategies::answer;
    use crate::layout::LEVEL;
    use crate::record::other_level::{flipped, relaid};
    use crate::replication::strategies::{heads, peer, peer_addr};
    use crate::{HeadOwner, HeadPartition, StaleMark};
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn store() -> impl Strategy<Value = DesiredStore> {
        let scrub = (any::<u64>(), 1..=u64::MAX, any::<bool>())
            .prop_map(|(run, rate_bytes_per_s, stopped)| ScrubWish { run, rate_bytes_per_s, stopped });
        let id = any::<Option<[u8; 16]>>();
        ("[a-z/ü]{1,60}", any::<u64>(), id, prop::option::of(scrub)).prop_map(
            |(path, size_bytes, id, scrub)| DesiredStore { path, size_bytes, id: id.map(StoreId), scrub },
        )
    }

    fn volume() -> impl Strategy<Value = DesiredVolume> {
        let state = prop_oneof![Just(VolumeIntent::Active), Just(VolumeIntent::Purging)];
        (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<u64>(), state, any::<Option<u16>>()).prop_map(
            |(id, store, size_sectors, state, lane)| DesiredVolume {
                id: VolumeId(id),
                store: StoreId(store),
                size_sectors,
                state,
                lane,
            },
        )
    }

    fn macs() -> impl Strategy<Value = Vec<[u8; 6]>> {
        vec(any::<[u8; 6]>(), 0..4)
    }

    fn allow() -> impl Strategy<Value = Allow> {
        prop_oneof![Just(Allow::Nobody), Just(Allow::Anyone), macs().prop_map(Allow::Only)]
    }

    fn export() -> impl Strategy<Value = DesiredExport> {
        let address = (any::<[u8; 16]>(), any::<u16>(), any::<u8>(), any::<[u8; 6]>(), any::<bool>());
        let settings = (any::<u16>(), vec(any::<u8>(), 0..40), macs(), macs());
        let policy = (allow(), allow(), allow());
        let policy = policy.prop_map(|(config, masks, reserve)| AoePolicy { config, masks, reserve });
        (address, settings, policy).prop_map(|(address, settings, allow)| {
            let (volume, shelf, slot, mut mac, read_only) = address;
            let (on_interfaces, config_string, masks, reserved_for) = settings;
            mac[5] &= 0xf0;
            let volume = VolumeId(volume);
            DesiredExport {
                volume,
                shelf,
                slot,
                mac,
                read_only,
                on_interfaces,
                config_string,
                masks,
                reserved_for,
                allow,
            }
        })
    }

    /// Any desired state, with version 0.
    pub(crate) fn any_desired() -> impl Strategy<Value = Desired> {
        let link = prop_oneof![Just(LinkChoice::Auto), Just(LinkChoice::AfXdp), Just(LinkChoice::AfPacket)];
        let steering = prop_oneof![
            Just(SteeringChoice::Auto),
            Just(SteeringChoice::Nic),
            Just(SteeringChoice::Program),
            Just(SteeringChoice::HandOver)
        ];
        let ids = (any::<[u8; 16]>(), any::<[u8; 16]>());
        let start = (vec(any::<u16>(), 0..5), link, steering, vec("[a-z0-9]{0,15}", 0..4));
        let rest = (
            vec(store(), 0..6),
            vec(volume(), 0..9),
            vec(export(), 0..9),
            vec(answer(), 0..5),
            any::<bool>(),
        );
        // Five cores at most have ports from below 60000 on.
        let listen = prop::option::of(peer_addr());
        let numbers = (any::<u64>(), any::<u64>());
        let replication = (numbers, any::<[u8; 32]>(), listen, vec(peer(), 0..4), heads());
        (ids, start, rest, replication).prop_map(
            |(
                (cluster, node),
                (cores, link, steering, interfaces),
                (stores, volumes, exports, answers, drain),
                ((start, resync_bytes_per_s), cluster_key, listen, peers, heads),
            )| {
                Desired {
                    version: 0,
                    cluster: ClusterId(cluster),
                    node: NodeId(node),
                    cores,
                    link,
                    steering,
                    interfaces,
                    stores,
                    volumes,
                    exports,
                    answers,
                    drain,
                    start,
                    cluster_key: ClusterKey(cluster_key),
                    listen,
                    peers,
                    heads,
                    resync_bytes_per_s,
                }
            },
        )
    }

    pub(crate) fn encoded(desired: &Desired) -> Vec<u8> {
        let mut bytes = Vec::new();
        desired.encode(&mut bytes).unwrap();
        bytes
    }

    const TABLES: std::ops::Range<usize> =
        std::mem::offset_of!(Head, cores)..std::mem::offset_of!(Head, start);

    /// As written by the next level, which still serves this one: longer head, longer records.
    pub(crate) fn newer(desired: &Desired) -> Vec<u8> {
        let head_len = size_of::<Head>() + 20;
        relaid(&encoded(desired), (LEVEL + 1, LEVEL), head_len, TABLES, |table, stride| stride + 3 + table)
    }

    /// As written by a level that had only what every record must have.
    pub(crate) fn older(desired: &Desired) -> Vec<u8> {
        let least = [
            CoreRecord::LEAST,
            InterfaceRecord::LEAST,
            StoreRecord::LEAST,
            VolumeRecord::LEAST,
            ExportRecord::LEAST,
        ];
        relaid(&encoded(desired), (LEVEL - 1, LEVEL - 1), Head::LEAST, TABLES, |table, _| least[table])
    }

    /// What is left of a state in the form of [`older`].
    pub(crate) fn without_newer_fields(mut desired: Desired) -> Desired {
        for store in &mut desired.stores {
            store.id = None;
            store.scrub = None;
        }
        desired.answers.clear();
        desired.volumes.iter_mut().for_each(|volume| volume.lane = None);
        (desired.start, desired.cluster_key, desired.listen) = (0, ClusterKey::default(), None);
        (desired.peers, desired.heads) = (Vec::new(), Vec::new());
        desired.resync_bytes_per_s = 0;
        for export in &mut desired.exports {
            *export = DesiredExport {
                volume: export.volume,
                shelf: export.shelf,
                slot: export.slot,
                mac: export.mac,
                read_only: export.read_only,
                ..DesiredExport::default()
            };
        }
        desired
    }

    proptest! {
        #[test]
        fn a_state_survives_encoding(desired in any_desired(), version: u64) {
            let read = Desired::decode(&encoded(&desired), version).unwrap();
            prop_assert_eq!(read, Desired { version, ..desired });
        }

        #[test]
        fn a_newer_level_is_read(desired in any_desired()) {
            prop_assert_eq!(Desired::decode(&newer(&desired), 0).unwrap(), desired);
        }

        #[test]
        fn an_older_level_is_read_with_defaults(desired in any_desired()) {
            prop_assert_eq!(Desired::decode(&older(&desired), 0).unwrap(), without_newer_fields(desired));
        }

        #[test]
        fn decoding_random_bytes_is_total(bytes in vec(any::<u8>(), 0..600)) {
            let _ = Desired::decode(&bytes, 1);
        }

        #[test]
        fn decoding_flipped_bits_is_total(desired in any_desired(), bits in vec(any::<usize>(), 1..4)) {
            let bytes = bits.iter().fold(encoded(&desired), |bytes, bit| flipped(&bytes, *bit));
            let _ = Desired::decode(&bytes, 1);
        }

        #[test]
        fn no_part_can_be_missing(desired in any_desired(), cut: prop::sample::Index) {
            let bytes = encoded(&desired);
            prop_assert!(Desired::decode(&bytes[..cut.index(bytes.len())], 1).is_err());
        }
    }

    /// What the former level wrote, which knew of no hand-overs, editions and no rate.
    #[test]
    fn the_former_level_is_read() {
        let desired = Desired {
            cores: vec![1],
            start: 5,
            cluster_key: ClusterKey([1; 32]),
            listen: Some(PeerAddr { ip: [127, 0, 0, 1].into(), base_port: 4330 }),
            heads: vec![DesiredHead { is_moving: true, edition: 7, ..some_head() }],
            resync_bytes_per_s: 9,
            ..Desired::default()
        };
        let head_len = std::mem::offset_of!(Head, resync_bytes_per_s);
        // Cores, interfaces, stores, volumes, exports, the pool, answers and peers come before the heads.
        let heads = 8;
        let stride = |table, stride| if table == heads { stride - 1 - size_of::<u64>() } else { stride };
        let former = relaid(&encoded(&desired), (LEVEL - 1, LEVEL - 1), head_len, TABLES, stride);
        let expected = Desired { heads: vec![some_head()], resync_bytes_per_s: 0, ..desired };
        assert_eq!(Desired::decode(&former, 0), Ok(expected));
    }

    fn some_head() -> DesiredHead {
        let owners = vec![HeadOwner::default(), HeadOwner { is_complete: true, ..HeadOwner::default() }];
        let partitions = vec![HeadPartition { epoch: 1, owners }; 2];
        DesiredHead { takeover: 1, partitions, stale: vec![StaleMark::default()], ..DesiredHead::default() }
    }

    #[test]
    fn impossible_heads_are_refused() {
        let refused = |heads: Vec<DesiredHead>| {
            let state = Desired { heads, ..Desired::default() };
            matches!(state.encode(&mut Vec::new()), Err(MapError::Invalid { .. }))
        };
        assert!(!refused(vec![some_head()]));
        assert!(refused(vec![some_head(), some_head()]), "two of one volume");
        assert!(refused(vec![DesiredHead { partitions: Vec::new(), ..some_head() }]));
        let with = |partitions| vec![DesiredHead { partitions, ..some_head() }];
        assert!(refused(with(vec![HeadPartition::default()])));
        let owned = |owners| HeadPartition { epoch: 1, owners: vec![HeadOwner::default(); owners] };
        assert!(!refused(with(vec![owned(crate::MAX_OWNERS)])));
        assert!(refused(with(vec![owned(crate::MAX_OWNERS + 1)])));
        assert!(!refused(with(vec![owned(1); crate::MAX_PARTITIONS])));
        assert!(refused(with(vec![owned(1); crate::MAX_PARTITIONS + 1])));
        let listen = Some(PeerAddr { ip: [127, 0, 0, 1].into(), base_port: 65_535 });
        let crowded = Desired { cores: vec![1, 2], listen, ..Desired::default() };
        assert!(matches!(crowded.encode(&mut Vec::new()), Err(MapError::Invalid { .. })));
    }

    /// Every list within a list is exactly as long as its entries say.
    #[test]
    fn lists_that_are_longer_or_shorter_than_they_say_are_damage() {
        let state = Desired { heads: vec![some_head()], ..Desired::default() };
        let bytes = encoded(&state);
        let heads = std::mem::offset_of!(Head, heads);
        let mut refused = 0;
        // The count of each of the four tables, then what the head says of its partitions and stale members.
        for table in 0..4 {
            for change in [-1_i32, 1] {
                let mut bytes = bytes.clone();
                let at = heads + table * size_of::<Table>() + 4;
                let count = i32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                bytes[at..at + 4].copy_from_slice(&(count + change).to_le_bytes());
                // One more of the last table does not lie in the state, or takes a part of the pool.
                refused += u32::from(Desired::decode(&bytes, 1).is_err());
            }
        }
        assert_eq!(refused, 8);
    }

    #[test]
    fn a_record_below_its_least_is_refused() {
        let desired = Desired { volumes: vec![DesiredVolume::default()], ..Desired::default() };
        let short =
            relaid(&encoded(&desired), (LEVEL, LEVEL), size_of::<Head>(), TABLES, |_, stride| stride - 1);
        let fault = Desired::decode(&short, 1).unwrap_err();
        assert!(matches!(&fault, Fault::Corrupt(what) if what.contains("table of cores")), "{fault:?}");
    }

    #[test]
    fn a_level_that_leaves_this_one_behind_is_refused() {
        let levels = (LEVEL + 2, LEVEL + 1);
        let bytes =
            relaid(&encoded(&Desired::default()), levels, size_of::<Head>(), TABLES, |_, stride| stride);
        let refused = Fault::Level { found: LEVEL + 2, lowest_reader: LEVEL + 1, supported: LEVEL };
        assert_eq!(Desired::decode(&bytes, 1), Err(refused));
    }

    #[test]
    fn impossible_wishes_are_refused() {
        let with_path = |path: String| Desired {
            stores: vec![DesiredStore { path, ..DesiredStore::default() }],
            ..Desired::default()
        };
        let with_mac = |mac| Desired {
            exports: vec![DesiredExport { mac, ..DesiredExport::default() }],
            ..Desired::default()
        };
        let refused =
            |desired: Desired| matches!(desired.encode(&mut Vec::new()), Err(MapError::Invalid { .. }));
        assert!(refused(with_path(String::new())));
        assert!(refused(with_path("x".repeat(MAX_PATH_BYTES + 1))));
        assert!(!refused(with_path("x".repeat(MAX_PATH_BYTES))));
        let with_rate = |rate_bytes_per_s| {
            let scrub = Some(ScrubWish { run: 1, rate_bytes_per_s, stopped: false });
            let store = DesiredStore { path: "/s".into(), scrub, ..DesiredStore::default() };
            Desired { stores: vec![store], ..Desired::default() }
        };
        assert!(refused(with_rate(0)));
        assert!(!refused(with_rate(1)));
        assert!(refused(with_mac([2, 0, 0, 0, 0, 1])));
        assert!(!refused(with_mac([2, 0, 0, 0, 0, 0x10])));
    }

    #[test]
    fn settings_longer_than_a_frame_of_every_mtu_are_refused() {
        let with = |change: fn(&mut DesiredExport, usize), excess: usize| {
            let mut export = DesiredExport::default();
            change(&mut export, excess);
            let desired = Desired { exports: vec![export], ..Desired::default() };
            desired.encode(&mut Vec::new()).is_ok()
        };
        let string = |export: &mut DesiredExport, excess| {
            export.config_string = vec![b'x'; MAX_CONFIG_STRING_BYTES + excess];
        };
        assert!(with(string, 0) && !with(string, 1));
        for list in [
            (|export, excess| export.masks = vec![[2; 6]; MAX_LISTED_MACS + excess])
                as fn(&mut DesiredExport, usize),
            |export, excess| export.reserved_for = vec![[2; 6]; MAX_LISTED_MACS + excess],
            |export, excess| export.allow.config = Allow::Only(vec![[2; 6]; MAX_LISTED_MACS + excess]),
            |export, excess| export.allow.masks = Allow::Only(vec![[2; 6]; MAX_LISTED_MACS + excess]),
            |export, excess| export.allow.reserve = Allow::Only(vec![[2; 6]; MAX_LISTED_MACS + excess]),
        ] {
            assert!(with(list, 0) && !with(list, 1));
        }
        let crowded = Desired { interfaces: vec!["eth0".into(); MAX_INTERFACES + 1], ..Desired::default() };
        assert!(crowded.encode(&mut Vec::new()).is_err());
    }

    #[test]
    fn a_list_with_a_part_of_a_mac_is_damage() {
        let export = DesiredExport { masks: vec![[2; 6]; 2], ..DesiredExport::default() };
        let mut bytes = encoded(&Desired { exports: vec![export], ..Desired::default() });
        let len = size_of::<Head>() + std::mem::offset_of!(ExportRecord, masks) + 4;
        assert_eq!(bytes[len], 12);
        bytes[len] = 11;
        assert_eq!(
            Desired::decode(&bytes, 1),
            Err(Fault::corrupt("a list of MAC addresses has a part of one"))
        );
    }

    #[test]
    fn a_scrub_without_a_rate_is_damage_and_without_its_mark_absent() {
        let scrub = Some(ScrubWish { run: 7, rate_bytes_per_s: 1, stopped: true });
        let store = DesiredStore { path: "/s".into(), scrub, ..DesiredStore::default() };
        let bytes = encoded(&Desired { stores: vec![store.clone()], ..Desired::default() });
        let with = |field: usize, value: u8| {
            let mut bytes = bytes.clone();
            bytes[size_of::<Head>() + field] = value;
            Desired::decode(&bytes, 1).map(|desired| desired.stores[0].clone())
        };
        let rate = std::mem::offset_of!(StoreRecord, scrub_rate);
        assert_eq!(with(rate, 0), Err(Fault::corrupt("a scrub has a rate of 0")));
        let known = std::mem::offset_of!(StoreRecord, scrub_known);
        assert_eq!(with(known, 0), Ok(DesiredStore { scrub: None, ..store }));
        assert!(with(known, 2).is_err());
        assert!(with(std::mem::offset_of!(StoreRecord, scrub_stopped), 2).is_err());
    }

    #[test]
    fn a_reader_of_the_former_level_is_served() {
        let scrub = Some(ScrubWish { run: 7, rate_bytes_per_s: 1, stopped: false });
        let store = DesiredStore { path: "/s".into(), scrub, ..DesiredStore::default() };
        let export = DesiredExport { masks: vec![[2; 6]], on_interfaces: 1, ..DesiredExport::default() };
        let desired = Desired { stores: vec![store], exports: vec![export], ..Desired::default() };
        assert_eq!(u32::from_le_bytes(encoded(&desired)[4..8].try_into().unwrap()), LEVEL - 1);
    }
}
