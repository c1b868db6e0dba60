//! Replicated volumes of one core: the engine of its heads and replicas, between requests, stores and other sites. No I/O.
//!
//! A volume of which this core has the head is served like one on a store: requests go in by [`Replicating::start`], and end as outcomes.
//! Work of replicas goes to the stores of this core as requests of their own, whose outcomes come back to
//! [`Replicating::store_ended`].
//!
//! Invariants:
//! * Every request that a head was given ends with one outcome: its answer, or [`StoreError::NoHead`] when the head has ended.
//! * No request is given to a head before it has served once: until then another one may answer copies of the same request, and of later
//!   ones that undo it (I6).
//! * Work for a volume that is not on a store of this core, or not yet, fails as what may be tried again.
//! * A block leaves for another site with the CRC32C that was made when its frame was received; where it was read, or parts of
//!   it were put together here, with one made of bytes that were verified (I7).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use af_xdp::checksum::crc32c;
use af_xdp::region::Pool;
use cluster_map::VolumeId;
use slab::Slab;
use smallvec::SmallVec;
use torus_replication::head::{End, Failure, Head, Token};
use torus_replication::membership::{Change, Membership, Partition, Record};
use torus_replication::message::{Digest, Fault, Held, Memory, Message};
use torus_replication::replica::{Durable, Ended, Share, Work, WorkId};
pub use torus_replication::site::TICK_NS;
use torus_replication::site::{Engine, Output};
use torus_replication::terms::{Epoch, Extent, Generation, Member, Site, Span, Version};
use torus_replication::wire::Frame;
use torus_uring::{BLOCKS_LONG_MAX, BLOCKS_MAX, Blocks, IoError};

use crate::exchange::{HeadReport, Report};
use crate::request::take_blocks;
use crate::serving::Devices;
use crate::store::extent::ExtentStore;
use crate::store::extent::extents::HeldExtent;
use crate::store::extent::format::{Epochs, ReplicaState};
use crate::store::extent::shard::{BlockDigest, Copies, Object, WriteTerms, block_hash};
use crate::store::{
    BLOCK_BYTES, Crcs, Operation, Outcome, RequestToken, Store, StoreError, put_into, release_blocks,
};

/// Extents in one answer to a list: a few pages of a frame.
const LIST_MAX: usize = 1024;
const NS_PER_S: u64 = 1_000_000_000;
/// What a device failed with that nobody has named.
const EIO: i32 = 5;
/// Marks the token of a store request that is a replica's work.
const WORK: u32 = 1 << 31;

/// Blocks between heads, replicas and sites, with what is known of their checksums.
#[derive(Debug, Default)]
pub struct Payload {
    /// One chunk for each block.
    pub blocks: Blocks,
    /// CRC32C of each.
    pub crcs: SmallVec<[Option<u32>; BLOCKS_MAX]>,
}

impl Payload {
    /// Blocks of which nothing is known.
    #[must_use]
    pub fn new(blocks: Blocks) -> Payload {
        let crcs = blocks.iter().map(|_| None).collect();
        Payload { blocks, crcs }
    }

    /// Blocks, with what is known of the first of them.
    #[must_use]
    pub fn known(blocks: Blocks, crcs: &Crcs) -> Payload {
        let known = crcs.iter().copied().chain(std::iter::repeat(None)).take(blocks.len()).collect();
        Payload { blocks, crcs: known }
    }

    /// What is known of the first blocks.
    fn first_crcs(&self) -> Crcs {
        let mut crcs = Crcs::default();
        for (known, crc) in crcs.iter_mut().zip(&self.crcs) {
            *known = *crc;
        }
        crcs
    }

    /// CRC32C of every block; what is not known is computed.
    pub fn complete_crcs<'a>(&'a self, pool: &'a Pool) -> impl Iterator<Item = u32> + 'a {
        let each = self.blocks.iter().zip(&self.crcs);
        each.map(|(chunk, crc)| crc.unwrap_or_else(|| crc32c(pool.region().bytes(chunk))))
    }
}

/// A message as it is sent: a frame, and the blocks that follow it.
#[must_use]
pub fn to_wire(message: Message<Payload>, pool: &Pool) -> (Frame, Blocks) {
    let mut blocks = Blocks::new();
    let frame = message.map(|payload| {
        let crcs = payload.complete_crcs(pool).collect();
        blocks = payload.blocks;
        crcs
    });
    (frame, blocks)
}

/// A frame as it was received, with the blocks that followed it, which match its checksums.
#[must_use]
pub fn from_wire(frame: Frame, blocks: Blocks) -> Message<Payload> {
    frame.map(|crcs| Payload { blocks, crcs: crcs.into_iter().map(Some).collect() })
}

/// The frame memory, as heads and replicas see it.
#[derive(Debug)]
pub struct FrameMemory<'p>(pub &'p mut Pool);

impl Memory for FrameMemory<'_> {
    type Blocks = Payload;

    fn count(&self, blocks: &Payload) -> usize {
        blocks.blocks.len()
    }

    fn share(&mut self, payload: &Payload, which: Range<usize>) -> Payload {
        let shared = payload.blocks.iter().skip(which.start).take(which.len());
        let blocks = shared.map(|chunk| self.0.share(chunk)).collect();
        Payload { blocks, crcs: payload.crcs[which].into() }
    }

    fn merge(&mut self, payload: &mut Payload, at: usize, payload_bytes: Range<usize>, mut old: Payload) {
        if let Some(chunk) = old.blocks.pop() {
            put_into(self.0, &mut payload.blocks, at, payload_bytes, chunk);
            payload.crcs[at] = None;
        }
        release_blocks(self.0, old.blocks);
    }

    fn append(&mut self, payload: &mut Payload, more: Payload) {
        payload.blocks.append(more.blocks);
        payload.crcs.extend(more.crcs);
    }

    fn release(&mut self, payload: Payload) {
        release_blocks(self.0, payload.blocks);
    }
}

/// A message on its way out.
#[derive(Debug)]
pub enum Outgoing {
    /// By the own connection to that site.
    Ask(Site, Message<Payload>),
    /// By the connection of that site to here.
    Reply(Site, Message<Payload>),
}

/// A change that a head wants of its volume's record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Which head.
    pub generation: Generation,
    /// Of the record that it is computed from.
    pub revision: u64,
    /// What.
    pub change: Change,
}

/// What is wanted of a head.
#[derive(Debug)]
pub enum Wanted {
    /// These blocks of the volume.
    Read(Range<u64>),
    /// That they are written, but for what is kept of the first and the last one.
    Write {
        /// The first block.
        first_block: u64,
        /// One block for each.
        payload: Payload,
        /// Bytes at the beginning that are not part of the write.
        keep_head_bytes: u16,
        /// Bytes at the end that are not part of the write.
        keep_tail_bytes: u16,
    },
}

/// Where a replica is on this core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Position of its store.
    pub store: usize,
    /// Its layer there.
    pub object: Object,
}

/// What work with a store is in progress.
#[derive(Debug)]
struct Running {
    id: WorkId,
    place: Place,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Durable,
    Read,
    Digest,
}

/// What it works with: the stores of the core, their devices and the frame memory, and where their outcomes go.
#[derive(Debug)]
pub struct Ground<'a, D> {
    /// By position.
    pub stores: &'a mut [Option<ExtentStore>],
    /// Devices and memory.
    pub devices: &'a mut D,
    /// Of heads and stores.
    pub outcomes: &'a mut Vec<Outcome>,
}

/// The heads and replicas of a core.
#[derive(Debug)]
pub struct Replicating {
    engine: Engine<Payload>,
    places: BTreeMap<(Member, VolumeId), Place>,
    works: Slab<Running>,
    /// Requests of each volume that its head has and has not answered.
    asked: BTreeMap<VolumeId, Vec<RequestToken>>,
    outgoing: VecDeque<Outgoing>,
    /// Chunks that reads leave free: for answers, which free others.
    reads_leave_chunks: usize,
    wishes: BTreeMap<VolumeId, Wish>,
    /// Heads that have given their grants back and wait for their successors.
    handed_over: BTreeMap<VolumeId, Generation>,
    /// The last head of each volume that has ended.
    ended: BTreeMap<VolumeId, (Generation, End)>,
    /// What stores owned no more, and have given up.
    retired: BTreeSet<(Member, VolumeId, Share)>,
    /// Volumes whose head could not answer yet.
    opening: BTreeSet<VolumeId>,
    /// A head has become able to answer since the last report.
    has_opened: bool,
}

impl Replicating {
    /// Of a process that was started at `boot_ns` of the boot-time clock, as all times here are.
    #[must_use]
    pub fn new(site: Site, boot_ns: u64) -> Replicating {
        Replicating {
            engine: Engine::new(site, boot_ns),
            places: BTreeMap::new(),
            works: Slab::new(),
            asked: BTreeMap::new(),
            outgoing: VecDeque::new(),
            reads_leave_chunks: 0,
            wishes: BTreeMap::new(),
            handed_over: BTreeMap::new(),
            ended: BTreeMap::new(),
            retired: BTreeSet::new(),
            opening: BTreeSet::new(),
            has_opened: false,
        }
    }

    /// Has reads leave so many chunks free for the answers of other cores.
    #[must_use]
    pub fn leaving(self, reads_leave_chunks: usize) -> Replicating {
        Replicating { reads_leave_chunks, ..self }
    }

    // ---------------------------------------------------------------------------------------------------------------
    // What there is

    /// A store is open, as that member, with these volumes on this core.
    pub fn open_store(
        &mut self,
        member: Member,
        volumes: impl IntoIterator<Item = (VolumeId, Place)>,
        stores: &[Option<ExtentStore>],
    ) {
        let mut kept = Vec::new();
        for (volume, place) in volumes {
            self.places.insert((member, volume), place);
            let store = stores.get(place.store).and_then(Option::as_ref);
            if let Some(state) = store.and_then(|store| store.state(place.object)) {
                kept.push((volume, durable_of(state)));
            }
        }
        self.engine.add_store(member, kept);
    }

    /// A volume has been made on an open store.
    pub fn add_replica(&mut self, member: Member, volume: VolumeId, place: Place) {
        self.places.insert((member, volume), place);
    }

    /// A volume on an open store is given up.
    pub fn drop_replica(&mut self, member: Member, volume: VolumeId) {
        self.places.remove(&(member, volume));
        self.engine.drop_replica(member, volume);
    }

    /// Begins to be the head of a volume; whether it did: not under a generation that was used before.
    pub fn begin<D: Devices>(
        &mut self,
        generation: Generation,
        membership: Membership,
        ground: &mut Ground<'_, D>,
    ) -> bool {
        let volume = membership.volume;
        let began = self
            .drive(ground, |engine, memory, boot_ns| engine.begin(generation, membership, memory, boot_ns));
        if began {
            self.opening.insert(volume);
        }
        began
    }

    /// The record of a volume is this: nothing that was asked for before can still change it.
    pub fn record<D: Devices>(&mut self, volume: VolumeId, record: Record, ground: &mut Ground<'_, D>) {
        if self.wishes.get(&volume).is_some_and(|wish| wish.revision < record.revision) {
            self.wishes.remove(&volume);
        }
        self.drive(ground, |engine, memory, boot_ns| engine.record(volume, record, memory, boot_ns));
    }

    /// Whether the head of a volume can answer now.
    #[must_use]
    pub fn is_serving(&self, volume: VolumeId, boot_ns: u64) -> bool {
        self.engine.is_serving(volume, boot_ns)
    }

    /// What heads want of their volumes' records.
    #[must_use]
    pub fn wishes(&self) -> &BTreeMap<VolumeId, Wish> {
        &self.wishes
    }

    /// The last head of each volume that has ended, and why.
    #[must_use]
    pub fn ended(&self) -> &BTreeMap<VolumeId, (Generation, End)> {
        &self.ended
    }

    /// The heads and replicas, for whoever looks at them.
    #[must_use]
    pub fn engine(&self) -> &Engine<Payload> {
        &self.engine
    }

    /// Whether nothing of stores is in progress for replicas.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.works.is_empty()
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Requests

    /// Whether the head of a volume was able to answer at some time.
    #[must_use]
    pub fn has_opened(&self, volume: VolumeId) -> bool {
        self.engine.head(volume).is_some() && !self.opening.contains(&volume)
    }

    /// Begins a request on a volume, that came for its head under a take-over.
    pub fn start<D: Devices>(
        &mut self,
        request: RequestToken,
        (volume, takeover): (VolumeId, u64),
        wanted: Wanted,
        ground: &mut Ground<'_, D>,
    ) {
        let (boot_ns, memory) = clock_and_memory(ground.devices);
        let memory = &mut FrameMemory(memory);
        let is_meant = self.engine.head(volume).is_some_and(|head| head.generation().takeover == takeover);
        if !is_meant || self.opening.contains(&volume) {
            if let Wanted::Write { payload, .. } = wanted {
                memory.release(payload);
            }
            let result = Err(StoreError::NoHead);
            ground.outcomes.push(Outcome { request, blocks: Blocks::new(), result });
            return;
        }
        let token = Token(request.0.into());
        self.asked.entry(volume).or_default().push(request);
        match wanted {
            Wanted::Read(range) => self.engine.read(volume, token, range, memory, boot_ns),
            Wanted::Write { first_block, payload, keep_head_bytes, keep_tail_bytes } => {
                let range = first_block..first_block + payload.blocks.len() as u64;
                let kept = (keep_head_bytes, keep_tail_bytes);
                self.engine.write(volume, token, range, payload, kept.0, kept.1, memory, boot_ns);
            }
        }
        self.pump(ground);
    }

    /// Takes the outcome of a store request that was a replica's work; gives back any other.
    pub fn store_ended<D: Devices>(
        &mut self,
        outcome: Outcome,
        ground: &mut Ground<'_, D>,
    ) -> Option<Outcome> {
        if outcome.request.0 & WORK == 0 {
            return Some(outcome);
        }
        let Running { id, place, kind } = self.works.remove((outcome.request.0 & !WORK) as usize);
        let ended = match (outcome.result, kind) {
            (Err(error), _) => {
                release_blocks(ground.devices.pool(), outcome.blocks);
                Ended::Failed(fault_of(error))
            }
            (Ok(()), Kind::Read) => Ended::Blocks(Payload::new(outcome.blocks)),
            (Ok(()), Kind::Durable) => {
                release_blocks(ground.devices.pool(), outcome.blocks);
                Ended::Done
            }
            (Ok(()), Kind::Digest) => {
                let store = ground.stores.get_mut(place.store).and_then(Option::as_mut);
                let digests = store.and_then(|store| store.take_digests(outcome.request, place.object));
                match digests {
                    Some(digests) => Ended::Digests(digests.into_iter().map(digest_of).collect()),
                    None => Ended::Failed(Fault::Device),
                }
            }
        };
        self.work_ended(id, ended, ground);
        self.pump(ground);
        None
    }

    fn work_ended<D: Devices>(&mut self, id: WorkId, ended: Ended<Payload>, ground: &mut Ground<'_, D>) {
        let (boot_ns, memory) = clock_and_memory(ground.devices);
        self.engine.ended(id, ended, &mut FrameMemory(memory), boot_ns);
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Other sites

    /// The sites that heads here have something to ask of.
    #[must_use]
    pub fn wanted(&self) -> BTreeSet<Site> {
        self.engine.wanted()
    }

    /// The own connection to a site can be used.
    pub fn connected<D: Devices>(&mut self, site: Site, ground: &mut Ground<'_, D>) {
        self.drive(ground, |engine, memory, boot_ns| engine.connected(site, memory, boot_ns));
    }

    /// The own connection to a site is gone.
    pub fn disconnected<D: Devices>(&mut self, site: Site, ground: &mut Ground<'_, D>) {
        self.drive(ground, |engine, memory, boot_ns| engine.disconnected(site, memory, boot_ns));
    }

    /// A site has a new connection to here.
    pub fn accepted<D: Devices>(&mut self, site: Site, ground: &mut Ground<'_, D>) {
        self.drive(ground, |engine, memory, _| engine.accepted(site, memory));
    }

    /// The connection of a site to here is gone.
    pub fn closed<D: Devices>(&mut self, site: Site, ground: &mut Ground<'_, D>) {
        self.engine.closed(site, &mut FrameMemory(ground.devices.pool()));
    }

    /// Whether more is to be read from the connection of a site to here.
    #[must_use]
    pub fn serves(&self, site: Site) -> bool {
        self.engine.serves(site)
    }

    /// A message has come by the connection of a site to here.
    pub fn asked<D: Devices>(&mut self, site: Site, message: Message<Payload>, ground: &mut Ground<'_, D>) {
        self.drive(ground, |engine, memory, boot_ns| engine.asked(site, message, memory, boot_ns));
    }

    /// A message has come by the own connection to a site.
    pub fn answered<D: Devices>(
        &mut self,
        site: Site,
        message: Message<Payload>,
        ground: &mut Ground<'_, D>,
    ) {
        self.drive(ground, |engine, memory, boot_ns| engine.answered(site, message, memory, boot_ns));
    }

    /// Is the head of a volume no more.
    pub fn end<D: Devices>(&mut self, volume: VolumeId, ground: &mut Ground<'_, D>) {
        self.drive(ground, |engine, memory, _| engine.end(volume, memory));
    }

    /// Members are brought up to date with so many bytes in a second at most, by all heads of this core; 0: as fast as can be.
    pub fn set_resync_rate<D: Devices>(&mut self, bytes_per_s: u64, ground: &mut Ground<'_, D>) {
        self.drive(ground, |engine, memory, boot_ns| engine.set_resync_rate(bytes_per_s, memory, boot_ns));
    }

    /// Ends all heads.
    pub fn end_all<D: Devices>(&mut self, ground: &mut Ground<'_, D>) {
        let volumes: Vec<VolumeId> = self.engine.heads().map(|(volume, _)| volume).collect();
        for volume in volumes {
            self.end(volume, ground);
        }
    }

    /// Heads that have given their grants back and wait for their successors.
    #[must_use]
    pub fn handed_over(&self) -> &BTreeMap<VolumeId, Generation> {
        &self.handed_over
    }

    /// Whether a head has a wish, can answer for the first time, or has handed over or ended, of which that report says nothing.
    #[must_use]
    pub fn has_news(&self, reported: &Report) -> bool {
        self.has_opened
            || self.wishes != reported.wishes
            || self.handed_over != reported.handed_over
            || self.ended != reported.ended
    }

    /// Gives up what a store has of a partition that others own by now, all of them complete: the volume's record says so (I2). To be asked
    /// for again until [`Replicating::has_retired`].
    pub fn retire<D: Devices>(
        &mut self,
        member: Member,
        volume: VolumeId,
        share: Share,
        ground: &mut Ground<'_, D>,
    ) {
        self.drive(ground, |engine, memory, boot_ns| engine.retire(member, volume, share, memory, boot_ns));
    }

    /// Whether nothing is left of what a store was to give up.
    #[must_use]
    pub fn has_retired(&self, member: Member, volume: VolumeId, share: Share) -> bool {
        self.retired.contains(&(member, volume, share))
    }

    /// A store is closed: nothing of its replicas is known any more.
    pub fn close_store(&mut self, at: usize) {
        let gone: Vec<(Member, VolumeId)> =
            self.places.iter().filter(|(_, place)| place.store == at).map(|(key, _)| *key).collect();
        for key in gone {
            self.places.remove(&key);
            self.engine.remove_store(key.0);
        }
    }

    /// Whether something depends on the time: then [`Replicating::tick`] is to be called every [`Replicating::tick_ns`].
    #[must_use]
    pub fn is_timed(&self) -> bool {
        self.engine.is_timed()
    }

    /// How long a look at the time can wait after the last one.
    #[must_use]
    pub fn tick_ns(&self) -> u64 {
        // That a head can answer is found out by a look at the time.
        if self.opening.is_empty() { self.engine.tick_ns() } else { TICK_NS }
    }

    /// All that there is to tell. A node whose heads were last given a grant more than `silent_ns` ago is not granted to. Of heads of
    /// which nothing is in progress it is what was told before, if that is given.
    #[must_use]
    pub fn report(&mut self, boot_ns: u64, silent_ns: u64, before: Option<&Report>) -> Report {
        self.has_opened = false;
        let heads = self.engine.heads().map(|(volume, head)| {
            let told = before.and_then(|before| before.heads.get(&volume)).copied();
            // What was told before it could answer is to be told anew.
            let told = told
                .filter(|told| told.generation == head.generation() && told.is_serving && told.has_opened);
            if let Some(told) = told.filter(|_| self.engine.is_resting(volume)) {
                return (volume, told);
            }
            let membership = head.membership();
            let in_sync = |partition: &Partition| {
                partition.owners.iter().filter(|owner| membership.is_sure(owner)).count()
            };
            let counts =
                membership.partitions().iter().map(|partition| (in_sync(partition), partition.owners.len()));
            let (in_sync, copies) = counts.min().unwrap_or_default();
            let report = HeadReport {
                generation: head.generation(),
                is_serving: self.engine.is_serving(volume, boot_ns),
                has_opened: !self.opening.contains(&volume),
                in_sync: u8::try_from(in_sync).unwrap_or(u8::MAX),
                copies: u8::try_from(copies).unwrap_or(u8::MAX),
                extents_to_go: head.extents_to_go(),
                resync_eta_s: head
                    .resync_eta_ns()
                    .map_or(0, |ns| u32::try_from(ns.div_ceil(NS_PER_S)).unwrap_or(u32::MAX)),
            };
            (volume, report)
        });
        let granted = self.engine.granted().into_iter();
        Report {
            heads: heads.collect(),
            wishes: self.wishes.clone(),
            handed_over: self.handed_over.clone(),
            ended: self.ended.clone(),
            granting: granted
                .map(|(node, last_ns)| (node, boot_ns.saturating_sub(last_ns) < silent_ns))
                .collect(),
        }
    }

    /// Time has passed.
    pub fn tick<D: Devices>(&mut self, ground: &mut Ground<'_, D>) {
        self.drive(ground, |engine, memory, boot_ns| engine.tick(memory, boot_ns));
        let before = self.opening.len();
        // An owner may be gone again: that is found out by what is asked.
        self.opening.retain(|volume| !self.engine.head(*volume).is_some_and(Head::has_served));
        self.has_opened |= self.opening.len() < before;
    }

    /// The next message to send.
    pub fn next_outgoing(&mut self) -> Option<Outgoing> {
        self.outgoing.pop_front()
    }

    // ---------------------------------------------------------------------------------------------------------------
    // What the engine wants

    /// Gives the engine something, with the memory and the time, and does what it wants then.
    fn drive<D: Devices, T>(
        &mut self,
        ground: &mut Ground<'_, D>,
        step: impl FnOnce(&mut Engine<Payload>, &mut FrameMemory<'_>, u64) -> T,
    ) -> T {
        let (boot_ns, memory) = clock_and_memory(ground.devices);
        let result = step(&mut self.engine, &mut FrameMemory(memory), boot_ns);
        self.pump(ground);
        result
    }

    fn pump<D: Devices>(&mut self, ground: &mut Ground<'_, D>) {
        while let Some(output) = self.engine.output() {
            self.take_output(output, ground);
        }
    }

    fn take_output<D: Devices>(&mut self, output: Output<Payload>, ground: &mut Ground<'_, D>) {
        match output {
            Output::Ask(site, message) => self.outgoing.push_back(Outgoing::Ask(site, message)),
            Output::Reply(site, message) => self.outgoing.push_back(Outgoing::Reply(site, message)),
            Output::Start { id, member, volume, work } => self.start_work(id, member, volume, work, ground),
            Output::Stable(member, volume, version) => {
                if let Some(place) = self.places.get(&(member, volume))
                    && let Some(store) = ground.stores.get_mut(place.store).and_then(Option::as_mut)
                {
                    store.set_stable(place.object, version.0);
                }
            }
            Output::Answer { volume, token, result, blocks } => {
                let request = RequestToken(u32::try_from(token.0).expect("as it was given"));
                if let Some(asked) = self.asked.get_mut(&volume) {
                    asked.retain(|asked| *asked != request);
                }
                let blocks = blocks.map(|payload| payload.blocks).unwrap_or_default();
                ground.outcomes.push(Outcome { request, blocks, result: result.map_err(error_of) });
            }
            Output::Change { volume, generation, revision, change } => {
                self.wishes.insert(volume, Wish { generation, revision, change });
            }
            // What the partitions are now comes with the volume's record.
            Output::Refresh(_) => {}
            Output::HandedOver(volume, generation, true) => {
                self.handed_over.insert(volume, generation);
            }
            Output::HandedOver(volume, _, false) => {
                self.handed_over.remove(&volume);
            }
            Output::Ended(volume, generation, end) => {
                self.wishes.remove(&volume);
                self.handed_over.remove(&volume);
                self.opening.remove(&volume);
                self.ended.insert(volume, (generation, end));
                for request in self.asked.remove(&volume).unwrap_or_default() {
                    let result = Err(StoreError::NoHead);
                    ground.outcomes.push(Outcome { request, blocks: Blocks::new(), result });
                }
            }
            Output::Retired(member, volume, share) => {
                self.retired.insert((member, volume, share));
            }
            Output::Release(payload) => release_blocks(ground.devices.pool(), payload.blocks),
        }
    }

    fn start_work<D: Devices>(
        &mut self,
        id: WorkId,
        member: Member,
        volume: VolumeId,
        work: Work<Payload>,
        ground: &mut Ground<'_, D>,
    ) {
        let place = self.places.get(&(member, volume)).copied();
        let is_open = |place: &Place| ground.stores.get(place.store).is_some_and(Option::is_some);
        let Some(place) = place.filter(is_open) else {
            if let Work::Write { blocks, .. } = work {
                release_blocks(ground.devices.pool(), blocks.blocks);
            }
            self.work_ended(id, Ended::Failed(Fault::NoMemory), ground);
            return;
        };
        if let Err(ended) = self.give_to_store(id, place, work, ground) {
            self.work_ended(id, ended, ground);
        }
    }

    /// Gives work to a store.
    ///
    /// # Errors
    /// What has ended already.
    fn give_to_store<D: Devices>(
        &mut self,
        id: WorkId,
        place: Place,
        work: Work<Payload>,
        ground: &mut Ground<'_, D>,
    ) -> Result<(), Ended<Payload>> {
        let Place { store: at, object } = place;
        let store = ground.stores.get_mut(at).and_then(Option::as_mut).expect("it is open");
        let mut begin = |kind| {
            let number =
                u32::try_from(self.works.insert(Running { id, place, kind })).expect("a few thousand");
            RequestToken(WORK | number)
        };
        match work {
            Work::Survey => {
                let mut active = Vec::new();
                let highest = Version(store.survey(object, &mut active));
                return Err(Ended::Survey { highest, active: active.into_iter().map(held_of).collect() });
            }
            Work::List(from) => {
                let mut held = Vec::new();
                let is_whole = store.list(object, from.0, LIST_MAX, &mut held);
                return Err(Ended::List { held: held.into_iter().map(held_of).collect(), is_whole });
            }
            Work::Persist(durable) => {
                let Some(state) = state_of(&durable) else { return Err(Ended::Failed(Fault::NoSpace)) };
                store.persist(begin(Kind::Durable), object, Arc::new(state));
            }
            Work::Reserve(extent) => store.reserve(begin(Kind::Durable), object, extent.0),
            Work::Write { version, span, blocks, is_sole } => {
                let copies = if is_sole { Copies::Sole } else { Copies::Others { stable_version: 0 } };
                let terms = WriteTerms {
                    copies,
                    crcs: blocks.first_crcs(),
                    version: version.0,
                    ..WriteTerms::default()
                };
                let first_block = span.blocks().start;
                let mut disk = ground.devices.device(at);
                let request = begin(Kind::Durable);
                store.write(request, object, first_block, blocks.blocks, terms, &mut disk, ground.outcomes);
            }
            Work::Unmap(version, span) => {
                let copies = Copies::Others { stable_version: 0 };
                store.unmap_range(begin(Kind::Durable), object, span.blocks(), copies, version.0);
            }
            Work::Drop(extent) => {
                // Of what the store does not own nobody compares copies: nothing has to tell that it was there.
                let span = Span::whole(extent);
                store.unmap_range(begin(Kind::Durable), object, span.blocks(), Copies::Sole, 0);
            }
            Work::Lose(version, span) => {
                let copies = Copies::Others { stable_version: 0 };
                store.lose(begin(Kind::Durable), object, span.blocks(), copies, version.0);
            }
            Work::Read(span) | Work::Salvage(span) => {
                let pool = ground.devices.pool();
                let has_room = pool.free_chunks() >= self.reads_leave_chunks;
                let taken = (has_room && usize::from(span.count) <= BLOCKS_LONG_MAX)
                    .then(|| take_blocks(pool, usize::from(span.count)));
                let Some(blocks) = taken.flatten() else { return Err(Ended::Failed(Fault::NoMemory)) };
                let first_block = span.blocks().start;
                let request = begin(Kind::Read);
                let mut disk = ground.devices.device(at);
                if matches!(work, Work::Salvage(_)) {
                    store.salvage(request, object, first_block, blocks, &mut disk, ground.outcomes);
                } else {
                    let operation = Operation::Read { first_block, blocks };
                    store.start(request, &object, operation, &mut disk, ground.outcomes);
                }
            }
            Work::Digest(span) => {
                let mut disk = ground.devices.device(at);
                let request = begin(Kind::Digest);
                store.digest(request, object, span.blocks(), &mut disk, ground.outcomes);
            }
        }
        Ok(())
    }
}

/// The time, and the frame memory.
fn clock_and_memory<D: Devices>(devices: &mut D) -> (u64, &mut Pool) {
    (devices.boot_ns(), devices.pool())
}

fn durable_of(state: &ReplicaState) -> Durable {
    let epochs = state.epochs.all().iter().map(|(partition, epoch)| (*partition, Epoch(*epoch)));
    Durable {
        generation: Generation { takeover: state.takeover, start: state.start },
        head: state.head,
        edition: state.revision,
        epochs: epochs.collect(),
    }
}

/// `None` where there are more epochs than a store keeps.
fn state_of(durable: &Durable) -> Option<ReplicaState> {
    let epochs = durable.epochs.iter().map(|(partition, epoch)| (*partition, epoch.0));
    Some(ReplicaState {
        takeover: durable.generation.takeover,
        start: durable.generation.start,
        head: durable.head,
        revision: durable.edition,
        epochs: Epochs::new(epochs.collect())?,
    })
}

fn held_of(held: HeldExtent) -> Held {
    Held {
        extent: Extent(held.number),
        version: Version(held.version),
        is_active: held.active,
        is_suspect: held.suspect,
    }
}

fn digest_of(digest: BlockDigest) -> Digest {
    match digest {
        BlockDigest::Absent => Digest::Absent,
        BlockDigest::Zero => Digest::Data(block_hash(&[0; BLOCK_BYTES])),
        BlockDigest::Data(hash) => Digest::Data(hash),
        BlockDigest::Suspect { found, recorded_sum, found_sum } => {
            Digest::Suspect { found, recorded_crc: recorded_sum.0, found_crc: found_sum.0 }
        }
        BlockDigest::Bad => Digest::Bad,
        BlockDigest::Lost => Digest::Lost,
    }
}

fn fault_of(error: StoreError) -> Fault {
    match error {
        StoreError::NoMemory => Fault::NoMemory,
        StoreError::NoSpace => Fault::NoSpace,
        StoreError::Corrupt { .. } => Fault::Corrupt,
        StoreError::Lost => Fault::Lost,
        StoreError::Unreadable(_)
        | StoreError::Unwritable(_)
        | StoreError::OutOfRange
        | StoreError::NoHead => Fault::Device,
    }
}

fn error_of(failure: Failure) -> StoreError {
    match failure {
        Failure::Unreadable => StoreError::Lost,
        Failure::NoSpace => StoreError::NoSpace,
        Failure::Unwritable => StoreError::Unwritable(IoError::Errno(EIO)),
    }
}

#[cfg(test)]
mod tests;
