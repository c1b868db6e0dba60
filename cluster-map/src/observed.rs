//! The observed state: what the data plane has and does.
//!
//! The counterpart of [`Desired`](crate::Desired): whole, level-triggered, carrying the desired version that it answers.

use crate::change::{RequestRecord, at_most};
use crate::error::{Fault, MapError};
use crate::layout::{LEVEL, LOWEST_READER};
use crate::record::{Decoder, Encoder, Preamble, Record, Table, Text, codes, flag};
use crate::replication::ObservedTables;
use crate::{ChangeRequest, Granting, HeadState, MAX_CHANGES, MemberWish, ObservedHead, StoreId, VolumeId};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Longest error or note that is published, in bytes; longer ones are cut at a character boundary.
pub const MAX_NOTE_BYTES: usize = 512;

/// The whole state of the data plane of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Set by [`DataMap::publish_observed`](crate::DataMap::publish_observed), grows by one; 0: never published.
    pub version: u64,
    /// The desired version that was acted on.
    pub applied: u64,
    /// Process id of the data plane.
    pub pid: u32,
    /// One entry per interface queue.
    pub links: Vec<ObservedLink>,
    /// One entry per store that was asked for.
    pub stores: Vec<ObservedStore>,
    /// Every volume that was asked for or found.
    pub volumes: Vec<ObservedVolume>,
    /// One entry per export that was asked for.
    pub exports: Vec<ObservedExport>,
    /// What initiators ask to be changed, at most [`MAX_CHANGES`]; each stays until the desired state answers it, or until
    /// its initiator is no more expected to wait.
    pub changes: Vec<ChangeRequest>,
    /// This data plane can be head and replica of replicated volumes.
    pub replicates: bool,
    /// One entry per volume that it is, or was, head of.
    pub heads: Vec<ObservedHead>,
    /// What its heads wish to be changed in their volumes' records, at most one change for each. A successor begins with
    /// those that its predecessor left here: their outcome is not known.
    pub wishes: Vec<MemberWish>,
    /// Whether its replicas grant, for every peer. Published when it changes only.
    pub granting: Vec<Granting>,
}

/// One queue of one interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedLink {
    /// Name of the interface.
    pub interface: String,
    /// Index of the queue.
    pub queue: u16,
    /// The CPU whose reactor owns the queue.
    pub core: u16,
    /// How frames pass between NIC and memory.
    pub mode: LinkMode,
    /// Most buffers that one frame may be made of.
    pub segments: u8,
    /// Largest Ethernet payload in bytes.
    pub mtu: u32,
    /// Most sectors of 512 bytes that one AoE frame carries here.
    pub max_sectors: u8,
    /// Carrier is present and the interface is up.
    pub up: bool,
    /// The interface's own MAC address.
    pub mac: [u8; 6],
    /// Why a better mode was not had; empty when the best one was.
    pub note: String,
    /// What the queue lost, from its opening on. Logical interfaces on one queue show the same numbers.
    pub losses: LinkLosses,
}

/// Frames that a queue lost, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkLosses {
    /// Received frames that the kernel dropped, for any reason.
    pub rx_dropped: u64,
    /// Of these, the ones for which the receive ring was full: the core was too slow.
    pub rx_ring_full: u64,
    /// Times the kernel found no empty chunk to receive into: the core was too slow, or its memory was in use.
    pub rx_fill_empty: u64,
    /// Received frames that were dropped as malformed: truncated, in too many pieces, of another VLAN.
    pub rx_invalid: u64,
    /// Answers that had to wait because the transmit ring was full.
    pub tx_ring_full: u64,
    /// Answers that could not be sent: longer than the MTU, or refused by the kernel.
    pub tx_dropped: u64,
}

/// How frames pass between NIC and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LinkMode {
    /// AF_XDP, the NIC reads and writes the process's memory.
    XdpZeroCopy,
    /// AF_XDP in the driver, frames are copied.
    XdpNativeCopy,
    /// AF_XDP on socket buffers, for drivers without XDP.
    XdpGeneric,
    /// AF_PACKET.
    #[default]
    Packet,
}

/// A store that was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedStore {
    /// Its path, as asked for.
    pub path: String,
    /// The id that it carries, once it has been read.
    pub id: Option<StoreId>,
    /// Where opening it has got to.
    pub state: StoreState,
    /// What an acknowledged write survives on it (I3).
    pub durability: Durability,
    /// Bytes that volumes may occupy in all.
    pub capacity_bytes: u64,
    /// Bytes that are not occupied.
    pub free_bytes: u64,
    /// Why it failed; empty otherwise.
    pub error: String,
    /// The way that data takes to its place.
    pub writes: WritePath,
    /// Blocks whose checksum did not match, since the store was opened.
    pub checksum_errors: u64,
    /// Blocks of which there is no good copy.
    pub lost_blocks: u64,
    /// The last scrub that was asked for, once it has begun.
    pub scrub: Option<ScrubObserved>,
    /// Its incarnation (I13); 0: not told, which counts as 1.
    pub incarnation: u64,
    /// Into how many shards it was cut at its format; 0: not told.
    pub shards: u16,
}

/// The way that written data takes to its place in a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WritePath {
    /// Not told: the store is not open, keeps no checksums, or its data plane is of an earlier version.
    #[default]
    Unknown,
    /// Data goes through the journal.
    Journal,
    /// Data goes to its place, with the record of it beside it.
    InPlace,
}

/// A run of a scrub.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubObserved {
    /// Its number, as asked for.
    pub run: u64,
    /// Where it stands.
    pub state: ScrubState,
    /// Bytes that have been read.
    pub done_bytes: u64,
    /// Bytes to read in all, as far as is known.
    pub total_bytes: u64,
    /// Blocks that this run found damaged.
    pub errors: u64,
}

/// Where a scrub stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ScrubState {
    /// It reads.
    #[default]
    Running,
    /// It was stopped, and can go on.
    Stopped,
    /// Everything has been read.
    Finished,
}

/// Where opening a store has got to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum StoreState {
    /// Being opened or formatted.
    #[default]
    Opening,
    /// In use.
    Ready,
    /// Not usable, see the error.
    Failed,
}

/// What an acknowledged write survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// The death of the process, not of the machine: a memory file system.
    #[default]
    Memory,
    /// A power cut: the device has no volatile cache.
    WriteThrough,
    /// A power cut: every write carries the order to empty the device's cache (`RWF_DSYNC`).
    DsyncWriteBack,
}

/// A volume that was asked for or found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedVolume {
    /// The volume.
    pub id: VolumeId,
    /// The store that holds it.
    pub store: StoreId,
    /// Where it stands.
    pub state: VolumeObserved,
    /// Its size in sectors of 512 bytes.
    pub size_sectors: u64,
    /// Bytes allocated (or purged) so far.
    pub done_bytes: u64,
    /// Why it failed; empty otherwise.
    pub error: String,
}

/// Where a volume stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VolumeObserved {
    /// Space is being allocated and zero-filled, see `done_bytes`.
    #[default]
    Allocating,
    /// Usable.
    Ready,
    /// Its data is deleted.
    Purged,
    /// Found in a store but not asked for; kept (I2).
    Orphan,
    /// Not usable, see the error.
    Failed,
}

/// An export that was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedExport {
    /// The volume.
    pub volume: VolumeId,
    /// AoE major address.
    pub shelf: u16,
    /// AoE minor address.
    pub slot: u8,
    /// Whether it is served.
    pub state: ExportState,
    /// The size that initiators are told, in sectors of 512 bytes.
    pub size_sectors: u64,
    /// Why it failed; empty otherwise.
    pub error: String,
}

/// Whether an export is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExportState {
    /// For its store or volume.
    #[default]
    Waiting,
    /// Requests are answered.
    Serving,
    /// Not served, see the error.
    Failed,
}

codes!(LinkMode { XdpZeroCopy = 0, XdpNativeCopy = 1, XdpGeneric = 2, Packet = 3, });
codes!(StoreState { Opening = 0, Ready = 1, Failed = 2, });
codes!(Durability { Memory = 0, WriteThrough = 1, DsyncWriteBack = 2, });
codes!(VolumeObserved { Allocating = 0, Ready = 1, Purged = 2, Orphan = 3, Failed = 4, });
codes!(ExportState { Waiting = 0, Serving = 1, Failed = 2, });
codes!(WritePath { Unknown = 0, Journal = 1, InPlace = 2, });
codes!(ScrubState { Running = 0, Stopped = 1, Finished = 2, });

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    preamble: Preamble,
    pid: U32,
    applied: U64,
    links: Table,
    stores: Table,
    volumes: Table,
    exports: Table,
    pool: Table,
    changes: Table,
    /// From here on absent at level 3.
    replication: ObservedTables,
    replicates: u8,
}

impl Record for Head {
    const NAME: &'static str = "observed head";
    /// Without the changes and what came after them.
    const LEAST: usize = std::mem::offset_of!(Self, changes);
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct LinkRecord {
    interface: Text,
    queue: U16,
    core: U16,
    mtu: U32,
    mac: [u8; 6],
    mode: u8,
    segments: u8,
    max_sectors: u8,
    up: u8,
    note: Text,
    losses: [U64; LinkLosses::COUNT],
}

impl Record for LinkRecord {
    const NAME: &'static str = "link";
    /// Without the note.
    const LEAST: usize = 26;
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StoreRecord {
    path: Text,
    id: [u8; 16],
    id_known: u8,
    state: u8,
    durability: u8,
    capacity_bytes: U64,
    free_bytes: U64,
    error: Text,
    /// From here on absent at level 2.
    writes: u8,
    scrub_known: u8,
    scrub_state: u8,
    checksum_errors: U64,
    lost_blocks: U64,
    scrub_run: U64,
    scrub_done: U64,
    scrub_total: U64,
    scrub_errors: U64,
    /// From here on absent at level 3.
    incarnation: U64,
    shards: U16,
}

impl Record for StoreRecord {
    const NAME: &'static str = "store";
    /// Without the error.
    const LEAST: usize = 43;
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct VolumeRecord {
    id: [u8; 16],
    store: [u8; 16],
    size_sectors: U64,
    state: u8,
    done_bytes: U64,
    error: Text,
}

impl Record for VolumeRecord {
    const NAME: &'static str = "volume";
    /// Without the progress and the error.
    const LEAST: usize = 41;
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ExportRecord {
    volume: [u8; 16],
    shelf: U16,
    slot: u8,
    state: u8,
    size_sectors: U64,
    error: Text,
}

impl Record for ExportRecord {
    const NAME: &'static str = "export";
    /// Without the error.
    const LEAST: usize = 28;
}

/// The front of a message for people, at most [`MAX_NOTE_BYTES`] long.
pub(crate) fn cut(note: &str) -> &str {
    &note[..note.floor_char_boundary(MAX_NOTE_BYTES)]
}

impl LinkLosses {
    /// How many counters there are.
    pub const COUNT: usize = 6;

    /// The counters, in the order of their declaration.
    #[must_use]
    pub fn words(self) -> [u64; Self::COUNT] {
        [
            self.rx_dropped,
            self.rx_ring_full,
            self.rx_fill_empty,
            self.rx_invalid,
            self.tx_ring_full,
            self.tx_dropped,
        ]
    }

    /// The counters with their names, in the order of their declaration.
    pub fn named(self) -> impl Iterator<Item = (&'static str, u64)> {
        const NAMES: [&str; LinkLosses::COUNT] =
            ["rx_dropped", "rx_ring_full", "rx_fill_empty", "rx_invalid", "tx_ring_full", "tx_dropped"];
        NAMES.into_iter().zip(self.words())
    }

    /// The reverse of [`LinkLosses::words`].
    #[must_use]
    pub fn of_words(words: [u64; Self::COUNT]) -> LinkLosses {
        let [rx_dropped, rx_ring_full, rx_fill_empty, rx_invalid, tx_ring_full, tx_dropped] = words;
        LinkLosses { rx_dropped, rx_ring_full, rx_fill_empty, rx_invalid, tx_ring_full, tx_dropped }
    }
}

impl LinkRecord {
    fn encode(out: &mut Encoder<'_>, link: &ObservedLink) -> Result<Self, MapError> {
        Ok(Self {
            interface: out.text(&link.interface)?,
            queue: link.queue.into(),
            core: link.core.into(),
            mtu: link.mtu.into(),
            mac: link.mac,
            mode: link.mode.code(),
            segments: link.segments,
            max_sectors: link.max_sectors,
            up: link.up.into(),
            note: out.text(cut(&link.note))?,
            losses: link.losses.words().map(U64::new),
        })
    }

    fn decode(self, from: &mut Decoder<'_>) -> Result<ObservedLink, Fault> {
        Ok(ObservedLink {
            interface: from.text(self.interface)?,
            queue: self.queue.get(),
            core: self.core.get(),
            mode: LinkMode::from_code(self.mode)?,
            segments: self.segments,
            mtu: self.mtu.get(),
            max_sectors: self.max_sectors,
            up: flag(self.up, "up")?,
            mac: self.mac,
            note: from.text(self.note)?,
            losses: LinkLosses::of_words(self.losses.map(U64::get)),
        })
    }
}

impl StoreRecord {
    fn encode(out: &mut Encoder<'_>, store: &ObservedStore) -> Result<Self, MapError> {
        let scrub = store.scrub.unwrap_or_default();
        Ok(Self {
            path: out.text(&store.path)?,
            id: store.id.unwrap_or_default().0,
            id_known: store.id.is_some().into(),
            state: store.state.code(),
            durability: store.durability.code(),
            capacity_bytes: store.capacity_bytes.into(),
            free_bytes: store.free_bytes.into(),
            error: out.text(cut(&store.error))?,
            writes: store.writes.code(),
            scrub_known: store.scrub.is_some().into(),
            scrub_state: scrub.state.code(),
            checksum_errors: store.checksum_errors.into(),
            lost_blocks: store.lost_blocks.into(),
            scrub_run: scrub.run.into(),
            scrub_done: scrub.done_bytes.into(),
            scrub_total: scrub.total_bytes.into(),
            scrub_errors: scrub.errors.into(),
            incarnation: store.incarnation.into(),
            shards: store.shards.into(),
        })
    }

    fn decode(self, from: &mut Decoder<'_>) -> Result<ObservedStore, Fault> {
        let scrub = ScrubObserved {
            run: self.scrub_run.get(),
            state: ScrubState::from_code(self.scrub_state)?,
            done_bytes: self.scrub_done.get(),
            total_bytes: self.scrub_total.get(),
            errors: self.scrub_errors.get(),
        };
        Ok(ObservedStore {
            path: from.text(self.path)?,
            id: flag(self.id_known, "id_known")?.then_some(StoreId(self.id)),
            state: StoreState::from_code(self.state)?,
            durability: Durability::from_code(self.durability)?,
            capacity_bytes: self.capacity_bytes.get(),
            free_bytes: self.free_bytes.get(),
            error: from.text(self.error)?,
            writes: WritePath::from_code(self.writes)?,
            checksum_errors: self.checksum_errors.get(),
            lost_blocks: self.lost_blocks.get(),
            scrub: flag(self.scrub_known, "scrub_known")?.then_some(scrub),
            incarnation: self.incarnation.get(),
            shards: self.shards.get(),
        })
    }
}

impl VolumeRecord {
    fn encode(out: &mut Encoder<'_>, volume: &ObservedVolume) -> Result<Self, MapError> {
        Ok(Self {
            id: volume.id.0,
            store: volume.store.0,
            size_sectors: volume.size_sectors.into(),
            state: volume.state.code(),
            done_bytes: volume.done_bytes.into(),
            error: out.text(cut(&volume.error))?,
        })
    }

    fn decode(self, from: &mut Decoder<'_>) -> Result<ObservedVolume, Fault> {
        Ok(ObservedVolume {
            id: VolumeId(self.id),
            store: StoreId(self.store),
            state: VolumeObserved::from_code(self.state)?,
            size_sectors: self.size_sectors.get(),
            done_bytes: self.done_bytes.get(),
            error: from.text(self.error)?,
        })
    }
}

impl ExportRecord {
    fn encode(out: &mut Encoder<'_>, export: &ObservedExport) -> Result<Self, MapError> {
        Ok(Self {
            volume: export.volume.0,
            shelf: export.shelf.into(),
            slot: export.slot,
            state: export.state.code(),
            size_sectors: export.size_sectors.into(),
            error: out.text(cut(&export.error))?,
        })
    }

    fn decode(self, from: &mut Decoder<'_>) -> Result<ObservedExport, Fault> {
        Ok(ObservedExport {
            volume: VolumeId(self.volume),
            shelf: self.shelf.get(),
            slot: self.slot,
            state: ExportState::from_code(self.state)?,
            size_sectors: self.size_sectors.get(),
            error: from.text(self.error)?,
        })
    }
}

impl Observed {
    /// Writes the state to `out`, replacing what is there; the version is not part of it.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), MapError> {
        at_most(MAX_CHANGES, self.changes.len(), "changes at a time")?;
        // The former level has no word for a head that has handed over.
        let has_left = self.heads.iter().any(|head| head.state == HeadState::HandedOver);
        let lowest_reader = if has_left { LEVEL } else { LOWEST_READER };
        let mut to = Encoder::new::<Head>(out);
        let head = Head {
            preamble: Preamble::of::<Head>(lowest_reader),
            pid: self.pid.into(),
            applied: self.applied.into(),
            links: to.table(&self.links, LinkRecord::encode)?,
            stores: to.table(&self.stores, StoreRecord::encode)?,
            volumes: to.table(&self.volumes, VolumeRecord::encode)?,
            exports: to.table(&self.exports, ExportRecord::encode)?,
            changes: to.table(&self.changes, RequestRecord::encode)?,
            replication: ObservedTables::encode(&mut to, &self.heads, &self.wishes, &self.granting)?,
            replicates: self.replicates.into(),
            pool: to.pool()?,
        };
        to.finish(&head);
        Ok(())
    }

    /// Reads the state of a version; total.
    pub(crate) fn decode(bytes: &[u8], version: u64) -> Result<Self, Fault> {
        let (mut from, head) = Decoder::new::<Head>(bytes)?;
        from.use_pool(&head.pool)?;
        let (heads, wishes, granting) = head.replication.decode(&mut from)?;
        Ok(Self {
            version,
            applied: head.applied.get(),
            pid: head.pid.get(),
            links: from.table(&head.links, |from, link: LinkRecord| link.decode(from))?,
            stores: from.table(&head.stores, |from, store: StoreRecord| store.decode(from))?,
            volumes: from.table(&head.volumes, |from, volume: VolumeRecord| volume.decode(from))?,
            exports: from.table(&head.exports, |from, export: ExportRecord| export.decode(from))?,
            changes: from.added_table(&head.changes, |from, change: RequestRecord| change.decode(from))?,
            replicates: flag(head.replicates, "replicates")?,
            heads,
            wishes,
            granting,
        })
    }
}

#[cfg(not(loom))]
#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::change::strategies::request;
    use crate::record::other_level::{flipped, relaid};
    use crate::replication::strategies::{granting, observed_heads, wishes};
    use crate::{Change, MaskEdit, SetRule, StaleMark};
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    fn note() -> impl Strategy<Value = String> {
        "[ -~ä€]{0,40}"
    }

    fn link() -> impl Strategy<Value = ObservedLink> {
        use LinkMode::{Packet, XdpGeneric, XdpNativeCopy, XdpZeroCopy};
        let mode = select(vec![XdpZeroCopy, XdpNativeCopy, XdpGeneric, Packet]);
        let numbers = (any::<u16>(), any::<u16>(), any::<u8>(), any::<u32>(), any::<u8>());
        let losses = any::<[u64; LinkLosses::COUNT]>().prop_map(LinkLosses::of_words);
        ("[a-z0-9@]{0,20}", mode, numbers, any::<bool>(), any::<[u8; 6]>(), note(), losses).prop_map(
            |(interface, mode, (queue, core, segments, mtu, max_sectors), up, mac, note, losses)| {
                ObservedLink {
                    interface,
                    queue,
                    core,
                    mode,
                    segments,
                    mtu,
                    max_sectors,
                    up,
                    mac,
                    note,
                    losses,
                }
            },
        )
    }

    fn scrub() -> impl Strategy<Value = ScrubObserved> {
        let state = select(vec![ScrubState::Running, ScrubState::Stopped, ScrubState::Finished]);
        (any::<u64>(), state, any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
            |(run, state, done_bytes, total_bytes, errors)| ScrubObserved {
                run,
                state,
                done_bytes,
                total_bytes,
                errors,
            },
        )
    }

    fn store() -> impl Strategy<Value = ObservedStore> {
        let state = select(vec![StoreState::Opening, StoreState::Ready, StoreState::Failed]);
        let durability =
            select(vec![Durability::Memory, Durability::WriteThrough, Durability::DsyncWriteBack]);
        let id = any::<Option<[u8; 16]>>();
        let writes = select(vec![WritePath::Unknown, WritePath::Journal, WritePath::InPlace]);
        let checks =
            (writes, any::<u64>(), any::<u64>(), prop::option::of(scrub()), any::<u64>(), any::<u16>());
        ("[a-z/]{0,60}", id, state, durability, any::<u64>(), any::<u64>(), note(), checks).prop_map(
            |(path, id, state, durability, capacity_bytes, free_bytes, error, checks)| ObservedStore {
                path,
                id: id.map(StoreId),
                state,
                durability,
                capacity_bytes,
                free_bytes,
                error,
                writes: checks.0,
                checksum_errors: checks.1,
                lost_blocks: checks.2,
                scrub: checks.3,
                incarnation: checks.4,
                shards: checks.5,
            },
        )
    }

    fn volume() -> impl Strategy<Value = ObservedVolume> {
        use VolumeObserved::{Allocating, Failed, Orphan, Purged, Ready};
        let state = select(vec![Allocating, Ready, Purged, Orphan, Failed]);
        (any::<[u8; 16]>(), any::<[u8; 16]>(), state, any::<u64>(), any::<u64>(), note()).prop_map(
            |(id, store, state, size_sectors, done_bytes, error)| ObservedVolume {
                id: VolumeId(id),
                store: StoreId(store),
                state,
                size_sectors,
                done_bytes,
                error,
            },
        )
    }

    fn export() -> impl Strategy<Value = ObservedExport> {
        let state = select(vec![ExportState::Waiting, ExportState::Serving, ExportState::Failed]);
        (any::<[u8; 16]>(), any::<u16>(), any::<u8>(), state, any::<u64>(), note()).prop_map(
            |(volume, shelf, slot, state, size_sectors, error)| ObservedExport {
                volume: VolumeId(volume),
                shelf,
                slot,
                state,
                size_sectors,
                error,
            },
        )
    }

    /// Any observed state, with version 0.
    pub(crate) fn any_observed() -> impl Strategy<Value = Observed> {
        let lists = (vec(link(), 0..4), vec(store(), 0..5), vec(volume(), 0..8), vec(export(), 0..8));
        let changes = vec(request(), 0..5);
        let replication = (any::<bool>(), observed_heads(), wishes(), granting());
        (any::<u64>(), any::<u32>(), lists, changes, replication).prop_map(
            |(applied, pid, (links, stores, volumes, exports), changes, told)| Observed {
                version: 0,
                applied,
                pid,
                links,
                stores,
                volumes,
                exports,
                changes,
                replicates: told.0,
                heads: told.1,
                wishes: told.2,
                granting: told.3,
            },
        )
    }

    pub(crate) fn encoded(observed: &Observed) -> Vec<u8> {
        let mut bytes = Vec::new();
        observed.encode(&mut bytes).unwrap();
        bytes
    }

    const TABLES: std::ops::Range<usize> =
        std::mem::offset_of!(Head, links)..std::mem::offset_of!(Head, replicates);

    /// As written by the next level, which still serves this one: longer head, longer records.
    pub(crate) fn newer(observed: &Observed) -> Vec<u8> {
        let head_len = size_of::<Head>() + 9;
        relaid(&encoded(observed), (LEVEL + 1, LEVEL), head_len, TABLES, |table, stride| stride + 1 + table)
    }

    /// As written by a level that had only what every record must have.
    pub(crate) fn older(observed: &Observed) -> Vec<u8> {
        let least = [LinkRecord::LEAST, StoreRecord::LEAST, VolumeRecord::LEAST, ExportRecord::LEAST];
        relaid(&encoded(observed), (LEVEL - 1, LEVEL - 1), Head::LEAST, TABLES, |table, _| least[table])
    }

    /// What is left of a state in the form of [`older`].
    pub(crate) fn without_newer_fields(mut observed: Observed) -> Observed {
        observed.changes.clear();
        (observed.replicates, observed.heads) = (false, Vec::new());
        (observed.wishes, observed.granting) = (Vec::new(), Vec::new());
        for link in &mut observed.links {
            link.note.clear();
            link.losses = LinkLosses::default();
        }
        for store in &mut observed.stores {
            store.error.clear();
            (store.writes, store.scrub) = (WritePath::Unknown, None);
            (store.checksum_errors, store.lost_blocks) = (0, 0);
            (store.incarnation, store.shards) = (0, 0);
        }
        observed.exports.iter_mut().for_each(|export| export.error.clear());
        for volume in &mut observed.volumes {
            volume.error.clear();
            volume.done_bytes = 0;
        }
        observed
    }

    proptest! {
        #[test]
        fn a_state_survives_encoding(observed in any_observed(), version: u64) {
            let read = Observed::decode(&encoded(&observed), version).unwrap();
            prop_assert_eq!(read, Observed { version, ..observed });
        }

        #[test]
        fn a_newer_level_is_read(observed in any_observed()) {
            prop_assert_eq!(Observed::decode(&newer(&observed), 0).unwrap(), observed);
        }

        #[test]
        fn an_older_level_is_read_with_defaults(observed in any_observed()) {
            prop_assert_eq!(Observed::decode(&older(&observed), 0).unwrap(), without_newer_fields(observed));
        }

        #[test]
        fn decoding_random_bytes_is_total(bytes in vec(any::<u8>(), 0..600)) {
            let _ = Observed::decode(&bytes, 1);
        }

        #[test]
        fn decoding_flipped_bits_is_total(observed in any_observed(), bits in vec(any::<usize>(), 1..4)) {
            let bytes = bits.iter().fold(encoded(&observed), |bytes, bit| flipped(&bytes, *bit));
            let _ = Observed::decode(&bytes, 1);
        }

        #[test]
        fn no_part_can_be_missing(observed in any_observed(), cut: prop::sample::Index) {
            let bytes = encoded(&observed);
            prop_assert!(Observed::decode(&bytes[..cut.index(bytes.len())], 1).is_err());
        }

        #[test]
        fn long_errors_are_cut_between_characters(error in "[aä€𝄞]{0,700}") {
            let export = ObservedExport { error: error.clone(), ..ObservedExport::default() };
            let state = Observed { exports: vec![export], ..Observed::default() };
            let read = Observed::decode(&encoded(&state), 1).unwrap();
            let kept = &read.exports[0].error;
            prop_assert!(error.starts_with(kept.as_str()) && kept.len() <= MAX_NOTE_BYTES);
            prop_assert!(kept.len() == error.len() || kept.len() > MAX_NOTE_BYTES - 4);
        }
    }

    #[test]
    fn who_has_no_word_for_a_head_that_handed_over_is_not_given_one() {
        let lowest = |state| {
            let heads = vec![ObservedHead { state, ..ObservedHead::default() }];
            let bytes = encoded(&Observed { heads, ..Observed::default() });
            u32::from_le_bytes(bytes[4..8].try_into().unwrap())
        };
        assert_eq!((lowest(HeadState::Serving), lowest(HeadState::HandedOver)), (LEVEL - 1, LEVEL));
    }

    #[test]
    fn unknown_words_of_a_scrub_are_damage() {
        let scrub = Some(ScrubObserved { run: 1, ..ScrubObserved::default() });
        let store = ObservedStore { writes: WritePath::InPlace, scrub, ..ObservedStore::default() };
        let bytes = encoded(&Observed { stores: vec![store], ..Observed::default() });
        for field in [
            std::mem::offset_of!(StoreRecord, writes),
            std::mem::offset_of!(StoreRecord, scrub_known),
            std::mem::offset_of!(StoreRecord, scrub_state),
        ] {
            let mut bytes = bytes.clone();
            bytes[size_of::<Head>() + field] = 3;
            assert!(matches!(Observed::decode(&bytes, 1), Err(Fault::Corrupt(_))));
        }
    }

    /// A small state whose records all name the whole pool may not ask for the product of both.
    #[test]
    fn strings_cannot_be_handed_out_twice() {
        let export = |error: &str| ObservedExport { error: error.into(), ..ObservedExport::default() };
        let state = Observed { exports: vec![export("shared"), export("")], ..Observed::default() };
        let mut bytes = encoded(&state);
        let exports = size_of::<Head>();
        let text = std::mem::offset_of!(ExportRecord, error);
        let (first, second) = (exports + text, exports + size_of::<ExportRecord>() + text);
        let shared = bytes[first..first + size_of::<Text>()].to_vec();
        bytes[second..second + size_of::<Text>()].copy_from_slice(&shared);
        assert_eq!(Observed::decode(&bytes, 1), Err(Fault::corrupt("strings exceed their pool")));
    }

    #[test]
    fn one_wish_for_each_record_and_each_as_long_as_it_says() {
        let wish = |n: u8, eject: usize| MemberWish {
            volume: VolumeId([n; 16]),
            eject: vec![StaleMark::default(); eject],
            ..MemberWish::default()
        };
        let with = |wishes| Observed { wishes, ..Observed::default() };
        assert!(with(vec![wish(1, 0), wish(1, 1)]).encode(&mut Vec::new()).is_err());
        let bytes = encoded(&with(vec![wish(1, 1), wish(2, 1)]));
        let wishes = size_of::<Head>();
        let mut twice = bytes.clone();
        twice[wishes..wishes + 16].copy_from_slice(&[2; 16]);
        assert_eq!(
            Observed::decode(&twice, 1),
            Err(Fault::corrupt("two changes of one record are wished for"))
        );
        let tables = std::mem::offset_of!(Head, replication);
        // Of the wishes themselves, and of the members that they eject.
        for table in [1, 2] {
            let mut fewer = bytes.clone();
            let at = tables + table * size_of::<Table>() + 4;
            assert_eq!(fewer[at], 2);
            fewer[at] = 1;
            assert!(matches!(Observed::decode(&fewer, 1), Err(Fault::Corrupt(_))), "table {table}");
        }
    }

    #[test]
    fn more_than_a_frame_or_the_map_carries_is_refused() {
        let with = |count, change: Change| {
            let request = ChangeRequest { id: 1, volume: VolumeId::default(), client: [2; 6], change };
            Observed { changes: vec![request; count], ..Observed::default() }.encode(&mut Vec::new()).is_ok()
        };
        let reserve = |macs| Change::Reserve { macs: vec![[2; 6]; macs], force: false };
        let string = |bytes| Change::SetString { rule: SetRule::Always, string: vec![b'x'; bytes] };
        let edit = MaskEdit { position: 0, add: true, mac: [2; 6] };
        let masks = |edits| Change::EditMasks { edits: vec![edit; edits] };
        assert!(
            with(MAX_CHANGES, reserve(255)) && !with(MAX_CHANGES + 1, reserve(0)) && !with(1, reserve(256))
        );
        assert!(with(MAX_CHANGES, string(1024)) && !with(1, string(1025)));
        assert!(with(MAX_CHANGES, masks(255)) && !with(1, masks(256)));
    }
}
