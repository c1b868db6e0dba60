//! The replicas of one site: what they accept, from which head, and when they open a generation for another one.
//!
//! Invariants (I1, I4, I11, I14):
//! * Nothing is done for a generation but the one that is open. A higher one is opened when every grant that was given to the head of
//!   the open one has run out or was handed back, when the process has been up for as long as a grant lasts (it may have given one that
//!   it has forgotten), when everything that was admitted has ended on the device, and when it is durable that it is open.
//! * From the moment a higher generation is asked for, nothing of the open one is admitted and no grant covers the volume: every site for
//!   which a lower one was opened is told with the next grant that it gets, however late it asked and whatever has been opened since.
//! * A restarted data plane of the same take-over needs no wait: that it runs proves that the one before is gone.
//! * Of a generation whose head has given its grants back nothing is done, unless that head opens it again.
//! * A new head numbers its writes above every stable mark: what was said to be everywhere is never said of a write of its own.
//! * A request for a partition under a higher epoch is done after that epoch is durable; one under a lower epoch is refused.
//! * A record older than one that was served under is refused; that a newer one is served under is durable before that is.
//! * What a store no longer owns is given up only when no request that takes it for an owner can be done any more (`retiring`).
//!
//! A request that is sent again is done again: its range is locked at the head until it is answered, and what it writes is the same.

mod retiring;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use cluster_map::{NodeId, VolumeId};

use self::retiring::Retiring;
pub use self::retiring::Share;

use crate::grants::GRANT_NS;
use crate::message::{Answer, Ask, Digest, Fault, GrantAnswer, GrantRequest, Held, Refusal, Reply, Request};
use crate::mutants::{self, Mutant};
use crate::terms::{Epoch, Extent, Generation, Member, Site, Span, Version};

/// What a store keeps durably of a volume's replica.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Durable {
    /// The open generation.
    pub generation: Generation,
    /// Whose it is.
    pub head: NodeId,
    /// Of the newest record that was served under.
    pub edition: u64,
    /// The highest epoch of each partition.
    pub epochs: BTreeMap<u32, Epoch>,
}

/// What a store is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work<B> {
    /// Make [`Durable`] durable.
    Persist(Durable),
    /// Say what the highest version is, and what is in the activity log.
    Survey,
    /// Make room for an extent.
    Reserve(Extent),
    /// Write, durably.
    Write {
        /// Its number.
        version: Version,
        /// Where.
        span: Span,
        /// What.
        blocks: B,
        /// See [`Ask::Write`].
        is_sole: bool,
    },
    /// Take blocks away, durably.
    Unmap(Version, Span),
    /// Remember that blocks are lost.
    Lose(Version, Span),
    /// Read.
    Read(Span),
    /// Read what is there, whether it matches its checksums or not.
    Salvage(Span),
    /// Say what blocks are.
    Digest(Span),
    /// Say which extents there are, from this one on.
    List(Extent),
    /// Give an extent up that the store does not own any more: nothing of it is left, and nothing tells of it.
    Drop(Extent),
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended<B> {
    /// It is durable.
    Done,
    /// Of a survey.
    Survey {
        /// The highest version.
        highest: Version,
        /// The activity log.
        active: Vec<Held>,
    },
    /// Of a read.
    Blocks(B),
    /// Of a digest.
    Digests(Vec<Digest>),
    /// Of a list.
    List {
        /// Extents, by number.
        held: Vec<Held>,
        /// There are no more.
        is_whole: bool,
    },
    /// It failed.
    Failed(Fault),
}

/// The number of a [`Work`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkId(pub u64);

/// What the replicas want done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output<B> {
    /// Send an answer.
    Send(Site, Answer<B>),
    /// Answer a request for a grant.
    Grant(Site, GrantAnswer),
    /// Have a store do something, and tell [`Replicas::ended`].
    Start {
        /// Its number.
        id: WorkId,
        /// Which store.
        member: Member,
        /// Which volume.
        volume: VolumeId,
        /// What.
        work: Work<B>,
    },
    /// Writes of the volume up to this one are on all in-sync members: regions may leave the activity log.
    Stable(Member, VolumeId, Version),
    /// Nothing is left of what a store no longer owns.
    Retired(Member, VolumeId, Share),
    /// Nobody wants these any more.
    Release(B),
}

/// Where an opening stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Until then grants may count.
    Fence { until_ns: u64 },
    /// What was admitted has not ended.
    Drain,
    /// It is being made durable.
    Persist,
}

/// A generation that is asked for.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    generation: Generation,
    from: Site,
    id: u64,
    edition: u64,
}

#[derive(Debug, Clone, Copy)]
struct Opening {
    wanted: Wanted,
    stage: Stage,
}

#[derive(Debug)]
struct Volume<B> {
    durable: Durable,
    /// The highest generation that was asked for.
    seen: Generation,
    opening: Option<Opening>,
    /// What was asked for while a lower one was being made durable.
    later: Option<Wanted>,
    /// The open generation's head has given its grants back.
    is_handed_back: bool,
    /// Every write up to this one is on all members that were in sync when it was said.
    stable: Version,
    /// Admitted, not ended.
    running: u32,
    /// An epoch is being made durable, for the first of these; they wait in order.
    waiting: VecDeque<(Site, Request<B>)>,
    is_persisting: bool,
    /// Partitions that are being given up.
    retiring: BTreeMap<u32, Retiring>,
}

#[derive(Debug)]
enum What {
    /// A request: who asked, its number and generation.
    Request(Site, u64, Generation),
    Open(Site, u64, Generation),
    PersistGeneration,
    PersistEpoch,
    /// With the edition before.
    PersistEdition(u64),
    /// A step of giving up a partition.
    Retire(u32),
}

/// All replicas of a site.
#[derive(Debug)]
pub struct Replicas<B> {
    started_ns: u64,
    now_ns: u64,
    members: BTreeSet<Member>,
    volumes: BTreeMap<(Member, VolumeId), Volume<B>>,
    /// Those with an opening, of all volumes: so that looking at the time costs what there is to wait for.
    opening: BTreeSet<(Member, VolumeId)>,
    /// What each site opened last of a replica, by the connection that it has: its grants cover that.
    covered: BTreeMap<(Member, VolumeId), BTreeMap<Site, Generation>>,
    /// What they cover no longer, with the generation that was asked for since: its next grant says so.
    passed: BTreeMap<Site, BTreeMap<VolumeId, Generation>>,
    /// When each site was given its last grant.
    granted_ns: BTreeMap<Site, u64>,
    running: BTreeMap<WorkId, (Member, VolumeId, What)>,
    next_work: u64,
    outputs: VecDeque<Output<B>>,
}

impl<B> Replicas<B> {
    /// Of a process that was started at `now_ns` of its boot-time clock.
    #[must_use]
    pub fn new(now_ns: u64) -> Replicas<B> {
        Replicas {
            started_ns: now_ns,
            now_ns,
            members: BTreeSet::new(),
            volumes: BTreeMap::new(),
            opening: BTreeSet::new(),
            covered: BTreeMap::new(),
            passed: BTreeMap::new(),
            granted_ns: BTreeMap::new(),
            running: BTreeMap::new(),
            next_work: 0,
            outputs: VecDeque::new(),
        }
    }

    /// A store is open, with what it has kept of its volumes.
    pub fn add_store(&mut self, member: Member, volumes: impl IntoIterator<Item = (VolumeId, Durable)>) {
        self.members.insert(member);
        for (volume, durable) in volumes {
            self.volumes.insert((member, volume), Volume::new(durable));
        }
    }

    /// A store has given a volume up. What it is doing for it still ends as it does.
    pub fn drop_replica(&mut self, member: Member, volume: VolumeId) {
        self.volumes.remove(&(member, volume));
        self.opening.remove(&(member, volume));
        self.covered.remove(&(member, volume));
    }

    /// A store is closed. What it is doing still ends as it does. It may be opened again: what was opened for whom stays known.
    pub fn remove_store(&mut self, member: Member) {
        self.members.remove(&member);
        self.volumes.retain(|(of, _), _| *of != member);
        self.opening.retain(|(of, _)| *of != member);
    }

    /// The connection of a site is gone: its heads count no grant for what they have not opened by another one.
    pub fn disconnected(&mut self, site: Site) {
        self.passed.remove(&site);
        self.covered.retain(|_, sites| {
            sites.remove(&site);
            !sites.is_empty()
        });
    }

    /// What is to be done next, if anything.
    pub fn output(&mut self) -> Option<Output<B>> {
        self.outputs.pop_front()
    }

    /// When [`Replicas::tick`] has something to do.
    #[must_use]
    pub fn due_ns(&self) -> Option<u64> {
        let openings = self.opening.iter().filter_map(|key| self.volumes.get(key)?.opening);
        let fences = openings.filter_map(|opening| match opening.stage {
            Stage::Fence { until_ns } => Some(until_ns),
            _ => None,
        });
        fences.min()
    }

    /// The time has come.
    pub fn tick(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        for key in self.opening.clone() {
            self.advance_opening(key);
        }
    }

    /// A site of heads wants a grant.
    pub fn grant(&mut self, from: Site, request: GrantRequest, now_ns: u64) {
        self.now_ns = now_ns;
        let passed = self.passed.remove(&from).unwrap_or_default();
        let excluded =
            if mutants::is(Mutant::RenewAfterOpen) { Vec::new() } else { passed.into_iter().collect() };
        self.granted_ns.insert(from, now_ns);
        self.outputs.push_back(Output::Grant(from, GrantAnswer { asked_ns: request.asked_ns, excluded }));
    }

    /// Every node whose heads were given a grant, with when the last one was given.
    #[must_use]
    pub fn granted(&self) -> BTreeMap<NodeId, u64> {
        let mut granted = BTreeMap::new();
        for (site, granted_ns) in &self.granted_ns {
            let last_ns = granted.entry(site.node).or_insert(*granted_ns);
            *last_ns = (*granted_ns).max(*last_ns);
        }
        granted
    }

    /// Whether nothing that a site has asked for is in progress: another connection of it can be served.
    #[must_use]
    pub fn has_ended_all_of(&self, site: Site) -> bool {
        let is_its = |what: &What| matches!(what, What::Request(from, ..) if *from == site);
        !self.running.values().any(|(_, _, what)| is_its(what))
    }

    /// A request has come.
    pub fn request(&mut self, from: Site, request: Request<B>, now_ns: u64) {
        self.now_ns = now_ns;
        if !self.members.contains(&request.to) {
            self.refuse(from, request, Refusal::Stranger);
            return;
        }
        let key = (request.to, request.volume);
        if let Ask::Open { edition } = request.ask {
            self.volumes.entry(key).or_insert_with(|| Volume::new(Durable::default()));
            self.open(key, from, request, edition);
            return;
        }
        if matches!(request.ask, Ask::Close) {
            self.close(key, from, request);
            return;
        }
        if let Err(refusal) = self.check(key, &request) {
            self.refuse(from, request, refusal);
            return;
        }
        let Some(volume) = self.volumes.get_mut(&key) else { unreachable!("a refused request has returned") };
        if volume.is_persisting {
            volume.waiting.push_back((from, request));
            return;
        }
        self.admit(key, from, request);
    }

    /// A store has ended something.
    pub fn ended(&mut self, id: WorkId, ended: Ended<B>, now_ns: u64) {
        self.now_ns = now_ns;
        let Some((member, id, what)) = self.running.remove(&id) else { return };
        let key = (member, id);
        match what {
            What::Request(from, number, generation) => {
                if let Some(volume) = self.volumes.get_mut(&key) {
                    volume.running -= 1;
                }
                self.answer(from, member, id, generation, number, reply(ended));
                self.advance_opening(key);
                self.advance_retiring(key);
            }
            What::Open(from, number, generation) => {
                // Not once another one has been asked for: nothing of this one would be done.
                if let Some(volume) = self.volumes.get(&key).filter(|volume| volume.seen == generation) {
                    let survey = volume.surveyed(ended);
                    self.answer(from, member, id, generation, number, reply(survey));
                }
            }
            What::PersistGeneration => self.generation_persisted(key, &ended),
            What::PersistEpoch => self.persisted(key, &ended),
            What::PersistEdition(before) => {
                if let Some(volume) = self.volumes.get_mut(&key).filter(|_| !ended_is_done(&ended)) {
                    volume.durable.edition = before;
                }
                self.persisted(key, &ended);
            }
            What::Retire(partition) => self.retire_worked(key, partition, &ended),
        }
    }

    fn check(&self, key: (Member, VolumeId), request: &Request<B>) -> Result<(), Refusal> {
        let volume = self.volumes.get(&key).ok_or(Refusal::NotOpen)?;
        if mutants::is(Mutant::GenerationUnchecked) {
            return Ok(());
        }
        if request.generation < volume.seen {
            return Err(Refusal::Replaced(volume.seen));
        }
        let is_handed_back = volume.is_handed_back && !mutants::is(Mutant::HandedBackForGood);
        if request.generation != volume.durable.generation || is_handed_back {
            return Err(Refusal::NotOpen);
        }
        let known = volume.epoch(request.partition);
        if request.epoch < known && request.epoch != Epoch(0) {
            return Err(Refusal::Epoch(known));
        }
        Ok(())
    }

    fn admit(&mut self, key: (Member, VolumeId), from: Site, request: Request<B>) {
        if self.must_wait_for_retiring(key, request.partition, request.epoch) {
            self.answer(from, key.0, key.1, request.generation, request.id, Reply::Failed(retiring::WAIT));
            if let Ask::Write { blocks, .. } = request.ask {
                self.outputs.push_back(Output::Release(blocks));
            }
            return;
        }
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        if request.epoch > volume.epoch(request.partition) {
            let (partition, epoch) = (request.partition, request.epoch);
            volume.waiting.push_back((from, request));
            self.persist_epoch(key, partition, epoch);
            return;
        }
        self.is_stable(key, request.stable);
        let work = match request.ask {
            Ask::Reserve { extent } => Work::Reserve(extent),
            Ask::Write { version, span, blocks, is_sole } => Work::Write { version, span, blocks, is_sole },
            Ask::Unmap { version, span } => Work::Unmap(version, span),
            Ask::Lose { version, span } => Work::Lose(version, span),
            Ask::Read { span } => Work::Read(span),
            Ask::Salvage { span } => Work::Salvage(span),
            Ask::Digest { span } => Work::Digest(span),
            Ask::List { from } => Work::List(from),
            Ask::Stable => {
                self.answer(from, key.0, key.1, request.generation, request.id, Reply::Done);
                return;
            }
            Ask::Open { .. } | Ask::Close => unreachable!("handled before"),
        };
        if let Some(volume) = self.volumes.get_mut(&key) {
            volume.running += 1;
        }
        if mutants::is(Mutant::AckBeforeDurable) && matches!(work, Work::Write { .. }) {
            self.answer(from, key.0, key.1, request.generation, request.id, Reply::Done);
        }
        self.start(key, work, What::Request(from, request.id, request.generation));
    }

    fn persist_epoch(&mut self, key: (Member, VolumeId), partition: u32, epoch: Epoch) {
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        volume.durable.epochs.insert(partition, epoch);
        volume.is_persisting = true;
        let durable = volume.durable.clone();
        self.start(key, Work::Persist(durable), What::PersistEpoch);
    }

    /// The open generation is served under a newer record: that is durable before the head is told that it is open.
    fn persist_edition(&mut self, key: (Member, VolumeId), from: Site, request: Request<B>, edition: u64) {
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        volume.waiting.push_back((from, request));
        if volume.is_persisting {
            return;
        }
        let before = std::mem::replace(&mut volume.durable.edition, edition);
        volume.is_persisting = true;
        let durable = volume.durable.clone();
        self.start(key, Work::Persist(durable), What::PersistEdition(before));
    }

    /// Writes up to this one are on all in-sync members.
    fn is_stable(&mut self, key: (Member, VolumeId), stable: Version) {
        if let Some(volume) = self.volumes.get_mut(&key) {
            volume.stable = volume.stable.max(stable);
        }
        self.outputs.push_back(Output::Stable(key.0, key.1, stable));
    }

    /// The head gives its grants back; an opening that waits for their end goes on.
    fn close(&mut self, key: (Member, VolumeId), from: Site, request: Request<B>) {
        let is_its_own = |volume: &&mut Volume<B>| {
            volume.durable.generation == request.generation && volume.durable.head == from.node
        };
        let Some(volume) = self.volumes.get_mut(&key).filter(is_its_own) else {
            let seen = self.volumes.get(&key).map_or(request.generation, |volume| volume.seen);
            self.refuse(from, request, Refusal::Replaced(seen));
            return;
        };
        volume.is_handed_back = true;
        if let Some(Opening { stage: Stage::Fence { until_ns }, .. }) = &mut volume.opening {
            *until_ns = 0;
        }
        self.is_stable(key, request.stable);
        self.answer(from, request.to, request.volume, request.generation, request.id, Reply::Done);
        self.advance_opening(key);
    }

    fn open(&mut self, key: (Member, VolumeId), from: Site, request: Request<B>, edition: u64) {
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        let generation = request.generation;
        // Another take-over is a later change: with the same edition it is one of a record that was restored.
        let is_another = generation.takeover != volume.durable.generation.takeover;
        if edition < volume.durable.edition || is_another && edition == volume.durable.edition && edition > 0
        {
            let past = volume.durable.edition;
            self.refuse(from, request, Refusal::Past(past));
            return;
        }
        if generation < volume.seen {
            let seen = volume.seen;
            self.refuse(from, request, Refusal::Replaced(seen));
            return;
        }
        if generation == volume.durable.generation {
            if edition > volume.durable.edition {
                self.persist_edition(key, from, request, edition);
                return;
            }
            // Grants that are given from now on count again.
            volume.is_handed_back &= mutants::is(Mutant::HandedBackForGood);
            self.survey(key, from, request.id, generation);
            return;
        }
        if generation > volume.seen {
            volume.seen = generation;
            let dropped = std::mem::take(&mut volume.waiting);
            self.pass(key, generation);
            for (from, request) in dropped {
                self.refuse(from, request, Refusal::Replaced(generation));
            }
        }
        let wanted = Wanted { generation, from, id: request.id, edition };
        self.begin_opening(key, wanted);
    }

    /// A generation is open for a site: the store tells what it has, and grants cover it until a higher one is asked for.
    fn survey(&mut self, key: (Member, VolumeId), from: Site, id: u64, generation: Generation) {
        let seen = self.volumes.get(&key).map_or(generation, |volume| volume.seen);
        self.covered.entry(key).or_default().insert(from, generation);
        self.pass(key, seen);
        self.start(key, Work::Survey, What::Open(from, id, generation));
    }

    /// No grant covers a generation below this one any more.
    fn pass(&mut self, key: (Member, VolumeId), seen: Generation) {
        let Some(sites) = self.covered.get_mut(&key) else { return };
        for (site, _) in sites.extract_if(.., |_, generation| *generation < seen) {
            let below = self.passed.entry(site).or_default().entry(key.1).or_insert(seen);
            *below = seen.max(*below);
        }
    }

    fn begin_opening(&mut self, key: (Member, VolumeId), wanted: Wanted) {
        let Some(former) = self.volumes.get(&key).map(|volume| volume.durable.head) else { return };
        let granted_ns = self.granted().get(&former).map_or(0, |granted_ns| granted_ns + GRANT_NS);
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        if volume.opening.is_some_and(|opening| opening.stage == Stage::Persist) {
            volume.later = Some(wanted);
            return;
        }
        let former = &volume.durable;
        let was_open = former.generation > Generation::default();
        let is_restart =
            wanted.generation.takeover == former.generation.takeover && wanted.from.node == former.head;
        let until_ns =
            if is_restart || volume.is_handed_back || !was_open || mutants::is(Mutant::FenceSkipped) {
                0
            } else {
                let forgotten_ns = self.started_ns + GRANT_NS;
                if mutants::is(Mutant::RestartWithoutQuarantine) {
                    granted_ns
                } else {
                    granted_ns.max(forgotten_ns)
                }
            };
        volume.opening = Some(Opening { wanted, stage: Stage::Fence { until_ns } });
        self.opening.insert(key);
        self.advance_opening(key);
    }

    fn advance_opening(&mut self, key: (Member, VolumeId)) {
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        let Some(opening) = &mut volume.opening else { return };
        if let Stage::Fence { until_ns } = opening.stage
            && self.now_ns >= until_ns
        {
            opening.stage = Stage::Drain;
        }
        let is_drained = volume.running == 0 || mutants::is(Mutant::OpenWithoutDrain);
        if opening.stage != Stage::Drain || !is_drained || volume.is_persisting {
            return;
        }
        opening.stage = Stage::Persist;
        let Wanted { generation, from, edition, .. } = opening.wanted;
        let edition = edition.max(volume.durable.edition);
        let durable = Durable { generation, head: from.node, edition, epochs: volume.durable.epochs.clone() };
        volume.is_persisting = true;
        self.start(key, Work::Persist(durable), What::PersistGeneration);
    }

    fn generation_persisted(&mut self, key: (Member, VolumeId), ended: &Ended<B>) {
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        volume.is_persisting = false;
        let later = volume.later.take();
        let Some(Opening { wanted, .. }) = volume.opening.take() else { return };
        self.opening.remove(&key);
        let Wanted { generation, from, id, edition } = wanted;
        if ended_is_done(ended) {
            volume.durable.generation = generation;
            volume.durable.head = from.node;
            volume.durable.edition = edition.max(volume.durable.edition);
            volume.is_handed_back = false;
            if mutants::is(Mutant::PassedForgotten) {
                for volumes in self.passed.values_mut() {
                    volumes.remove(&key.1);
                }
            }
            self.survey(key, from, id, generation);
        } else {
            self.answer(from, key.0, key.1, generation, id, Reply::Failed(Fault::Device));
        }
        let is_open = |wanted: &Wanted| {
            self.volumes.get(&key).is_some_and(|volume| volume.durable.generation == wanted.generation)
        };
        match later {
            // Asked for again by another connection. Made durable once more it would keep requests waiting that are admitted already.
            Some(later) if is_open(&later) => {
                self.survey(key, later.from, later.id, later.generation);
            }
            Some(later) => self.begin_opening(key, later),
            None => {}
        }
        self.advance_retiring(key);
    }

    /// An epoch or a edition is durable, or could not be made so.
    fn persisted(&mut self, key: (Member, VolumeId), ended: &Ended<B>) {
        let is_done = ended_is_done(ended);
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        volume.is_persisting = false;
        let waiting = std::mem::take(&mut volume.waiting);
        for (from, request) in waiting {
            if is_done {
                self.request(from, request, self.now_ns);
            } else {
                self.answer(from, key.0, key.1, request.generation, request.id, Reply::Failed(Fault::Device));
                if let Ask::Write { blocks, .. } = request.ask {
                    self.outputs.push_back(Output::Release(blocks));
                }
            }
        }
        self.advance_opening(key);
        self.advance_retiring(key);
    }

    fn start(&mut self, key: (Member, VolumeId), work: Work<B>, what: What) {
        let id = WorkId(self.next_work);
        self.next_work += 1;
        self.running.insert(id, (key.0, key.1, what));
        self.outputs.push_back(Output::Start { id, member: key.0, volume: key.1, work });
    }

    fn refuse(&mut self, from: Site, request: Request<B>, refusal: Refusal) {
        self.answer(
            from,
            request.to,
            request.volume,
            request.generation,
            request.id,
            Reply::Refused(refusal),
        );
        if let Ask::Write { blocks, .. } = request.ask {
            self.outputs.push_back(Output::Release(blocks));
        }
    }

    fn answer(
        &mut self,
        to: Site,
        from: Member,
        volume: VolumeId,
        generation: Generation,
        id: u64,
        reply: Reply<B>,
    ) {
        self.outputs.push_back(Output::Send(to, Answer { from, volume, generation, id, reply }));
    }
}

impl<B> Volume<B> {
    fn new(durable: Durable) -> Volume<B> {
        Volume {
            seen: durable.generation,
            durable,
            opening: None,
            later: None,
            is_handed_back: false,
            stable: Version::default(),
            running: 0,
            waiting: VecDeque::new(),
            is_persisting: false,
            retiring: BTreeMap::new(),
        }
    }

    /// The highest epoch of a partition that was asked for.
    fn epoch(&self, partition: u32) -> Epoch {
        self.durable.epochs.get(&partition).copied().unwrap_or_default()
    }

    /// A survey, without what was said to be on all in-sync members: the store's log lets go of that when it pleases.
    fn surveyed(&self, ended: Ended<B>) -> Ended<B> {
        let Ended::Survey { highest, mut active } = ended else { return ended };
        active.retain(|held| held.is_suspect || held.version > self.stable);
        Ended::Survey { highest: highest.max(self.stable), active }
    }
}

fn ended_is_done<B>(ended: &Ended<B>) -> bool {
    matches!(ended, Ended::Done)
}

fn reply<B>(ended: Ended<B>) -> Reply<B> {
    match ended {
        Ended::Done => Reply::Done,
        Ended::Survey { highest, active } => Reply::Opened { highest, active },
        Ended::Blocks(blocks) => Reply::Blocks(blocks),
        Ended::Digests(digests) => Reply::Digests(digests),
        Ended::List { held, is_whole } => Reply::List { held, is_whole },
        Ended::Failed(fault) => Reply::Failed(fault),
    }
}
