//! The desired state: what the control process wants the data plane to do.
//!
//! One [`Desired`] is the whole wish of a node, never a difference and never a command: either process may miss any
//! number of versions, crash or be replaced, and the newest version alone is enough to converge.

use crate::error::{Fault, MapError};
use crate::record::{Decoder, Encoder, Preamble, Record, Table, Text, codes, flag};
use crate::{ClusterId, MAX_PATH_BYTES, NodeId, StoreId, VolumeId};
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

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
    /// Path of the file or block device, 1 to [`MAX_PATH_BYTES`] bytes.
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

codes!(LinkChoice { Auto = 0, AfXdp = 1, AfPacket = 2, });
codes!(VolumeIntent { Active = 0, Purging = 1, });

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    preamble: Preamble,
    cluster: [u8; 16],
    node: [u8; 16],
    link: u8,
    drain: u8,
    reserved: [u8; 2],
    cores: Table,
    interfaces: Table,
    stores: Table,
    volumes: Table,
    exports: Table,
    pool: Table,
}

impl Record for Head {
    const NAME: &'static str = "desired head";
    const LEAST: usize = size_of::<Self>();
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
}

impl Record for VolumeRecord {
    const NAME: &'static str = "volume";
    const LEAST: usize = size_of::<Self>();
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ExportRecord {
    volume: [u8; 16],
    shelf: U16,
    slot: u8,
    read_only: u8,
    mac: [u8; 6],
}

impl Record for ExportRecord {
    const NAME: &'static str = "export";
    const LEAST: usize = size_of::<Self>();
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
        Ok(Self {
            path: out.text(&store.path)?,
            size_bytes: store.size_bytes.into(),
            id: store.id.unwrap_or_default().0,
            id_known: store.id.is_some().into(),
        })
    }

    fn decode(self, from: &mut Decoder<'_>) -> Result<DesiredStore, Fault> {
        let path = from.text(self.path)?;
        if path.is_empty() || path.len() > MAX_PATH_BYTES {
            return Err(Fault::corrupt("length of a store's path"));
        }
        let id = flag(self.id_known, "id_known")?.then_some(StoreId(self.id));
        Ok(DesiredStore { path, size_bytes: self.size_bytes.get(), id })
    }
}

impl VolumeRecord {
    fn encode(volume: &DesiredVolume) -> Self {
        Self {
            id: volume.id.0,
            store: volume.store.0,
            size_sectors: volume.size_sectors.into(),
            state: volume.state.code(),
        }
    }

    fn decode(self) -> Result<DesiredVolume, Fault> {
        Ok(DesiredVolume {
            id: VolumeId(self.id),
            store: StoreId(self.store),
            size_sectors: self.size_sectors.get(),
            state: VolumeIntent::from_code(self.state)?,
        })
    }
}

impl ExportRecord {
    fn encode(export: &DesiredExport) -> Result<Self, MapError> {
        if !is_mac_base(export.mac) {
            return invalid(format!("MAC of export {}.{} has its low 4 bits set", export.shelf, export.slot));
        }
        Ok(Self {
            volume: export.volume.0,
            shelf: export.shelf.into(),
            slot: export.slot,
            read_only: export.read_only.into(),
            mac: export.mac,
        })
    }

    fn decode(self) -> Result<DesiredExport, Fault> {
        if !is_mac_base(self.mac) {
            return Err(Fault::corrupt("MAC of an export has its low 4 bits set"));
        }
        Ok(DesiredExport {
            volume: VolumeId(self.volume),
            shelf: self.shelf.get(),
            slot: self.slot,
            mac: self.mac,
            read_only: flag(self.read_only, "read_only")?,
        })
    }
}

impl Desired {
    /// Writes the state to `out`, replacing what is there; the version is not part of it.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), MapError> {
        let mut to = Encoder::new::<Head>(out);
        let head = Head {
            preamble: Preamble::of::<Head>(),
            cluster: self.cluster.0,
            node: self.node.0,
            link: self.link.code(),
            drain: self.drain.into(),
            reserved: [0; 2],
            cores: to.table(&self.cores, |_, cpu| Ok(CoreRecord { cpu: (*cpu).into() }))?,
            interfaces: to
                .table(&self.interfaces, |to, name| Ok(InterfaceRecord { name: to.text(name)? }))?,
            stores: to.table(&self.stores, StoreRecord::encode)?,
            volumes: to.table(&self.volumes, |_, volume| Ok(VolumeRecord::encode(volume)))?,
            exports: to.table(&self.exports, |_, export| ExportRecord::encode(export))?,
            pool: to.pool()?,
        };
        to.finish(&head);
        Ok(())
    }

    /// Reads the state of a version; total.
    pub(crate) fn decode(bytes: &[u8], version: u64) -> Result<Self, Fault> {
        let (mut from, head) = Decoder::new::<Head>(bytes)?;
        from.use_pool(&head.pool)?;
        Ok(Self {
            version,
            cluster: ClusterId(head.cluster),
            node: NodeId(head.node),
            cores: from.table(&head.cores, |_, core: CoreRecord| Ok(core.cpu.get()))?,
            link: LinkChoice::from_code(head.link)?,
            interfaces: from.table(&head.interfaces, |from, one: InterfaceRecord| from.text(one.name))?,
            stores: from.table(&head.stores, |from, store: StoreRecord| store.decode(from))?,
            volumes: from.table(&head.volumes, |_, volume: VolumeRecord| volume.decode())?,
            exports: from.table(&head.exports, |_, export: ExportRecord| export.decode())?,
            drain: flag(head.drain, "drain")?,
        })
    }
}

#[cfg(not(loom))]
#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::layout::LEVEL;
    use crate::record::other_level::{flipped, relaid};
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn store() -> impl Strategy<Value = DesiredStore> {
        ("[a-z/ü]{1,60}", any::<u64>(), any::<Option<[u8; 16]>>())
            .prop_map(|(path, size_bytes, id)| DesiredStore { path, size_bytes, id: id.map(StoreId) })
    }

    fn volume() -> impl Strategy<Value = DesiredVolume> {
        let state = prop_oneof![Just(VolumeIntent::Active), Just(VolumeIntent::Purging)];
        (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<u64>(), state).prop_map(
            |(id, store, size_sectors, state)| DesiredVolume {
                id: VolumeId(id),
                store: StoreId(store),
                size_sectors,
                state,
            },
        )
    }

    fn export() -> impl Strategy<Value = DesiredExport> {
        (any::<[u8; 16]>(), any::<u16>(), any::<u8>(), any::<[u8; 6]>(), any::<bool>()).prop_map(
            |(volume, shelf, slot, mut mac, read_only)| {
                mac[5] &= 0xf0;
                DesiredExport { volume: VolumeId(volume), shelf, slot, mac, read_only }
            },
        )
    }

    /// Any desired state, with version 0.
    pub(crate) fn any_desired() -> impl Strategy<Value = Desired> {
        let link = prop_oneof![Just(LinkChoice::Auto), Just(LinkChoice::AfXdp), Just(LinkChoice::AfPacket)];
        let ids = (any::<[u8; 16]>(), any::<[u8; 16]>());
        let start = (vec(any::<u16>(), 0..5), link, vec("[a-z0-9]{0,15}", 0..4));
        let rest = (vec(store(), 0..6), vec(volume(), 0..9), vec(export(), 0..9), any::<bool>());
        (ids, start, rest).prop_map(
            |((cluster, node), (cores, link, interfaces), (stores, volumes, exports, drain))| Desired {
                version: 0,
                cluster: ClusterId(cluster),
                node: NodeId(node),
                cores,
                link,
                interfaces,
                stores,
                volumes,
                exports,
                drain,
            },
        )
    }

    pub(crate) fn encoded(desired: &Desired) -> Vec<u8> {
        let mut bytes = Vec::new();
        desired.encode(&mut bytes).unwrap();
        bytes
    }

    const TABLES: std::ops::Range<usize> = std::mem::offset_of!(Head, cores)..size_of::<Head>();

    /// As written by the next level, which still serves this one: longer head, longer records.
    pub(crate) fn newer(desired: &Desired) -> Vec<u8> {
        relaid(&encoded(desired), (LEVEL + 1, LEVEL), 20, TABLES, |table, stride| stride + 3 + table)
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
        relaid(&encoded(desired), (LEVEL, LEVEL), 0, TABLES, |table, _| least[table])
    }

    /// What is left of a state in the form of [`older`].
    pub(crate) fn without_newer_fields(mut desired: Desired) -> Desired {
        desired.stores.iter_mut().for_each(|store| store.id = None);
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

    #[test]
    fn a_record_below_its_least_is_refused() {
        let desired = Desired { volumes: vec![DesiredVolume::default()], ..Desired::default() };
        let short = relaid(&encoded(&desired), (LEVEL, LEVEL), 0, TABLES, |_, stride| stride - 1);
        let fault = Desired::decode(&short, 1).unwrap_err();
        assert!(matches!(&fault, Fault::Corrupt(what) if what.contains("table of cores")), "{fault:?}");
    }

    #[test]
    fn a_level_that_leaves_this_one_behind_is_refused() {
        let bytes =
            relaid(&encoded(&Desired::default()), (LEVEL + 2, LEVEL + 1), 0, TABLES, |_, stride| stride);
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
        assert!(refused(with_mac([2, 0, 0, 0, 0, 1])));
        assert!(!refused(with_mac([2, 0, 0, 0, 0, 0x10])));
    }
}
