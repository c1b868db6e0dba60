//! The heads and replicas of one site, their grants, and what goes between them and those of other sites.
//!
//! A site has a connection to each other one for what its heads ask, and takes one from each for what heads there ask. What it says to
//! itself needs none. Whoever drives it has the connections, the stores, the time and the metadata.
//!
//! Invariants:
//! * A new connection of a site is served when nothing that an earlier one brought is in progress any more (I6): what an earlier one is
//!   owed is never sent by the new one.
//! * Answers of a site, grants among them, are taken in the order in which they were sent, those of the own site too.
//! * A head is begun at most once under each generation.

use std::collections::{BTreeMap, BTreeSet, VecDeque, btree_map};
use std::ops::Range;

use cluster_map::{NodeId, VolumeId};

use crate::budget::Budget;
use crate::grants::{Grants, RENEW_NS};
use crate::head::{self, End, Failure, Head, PIECE_BYTES, Token};
use crate::membership::{Change, Membership, Record};
use crate::message::{Answer, GrantRequest, Memory, Message, Reply, Request};
use crate::mutants::{self, Mutant};
use crate::replica::{self, Durable, Ended, Replicas, Share, Work, WorkId};
use crate::terms::{Generation, Member, Site, Version};

/// How often a site looks at the time while something depends on it: grants, silence and impatience are counted in hundreds of
/// milliseconds.
pub const TICK_NS: u64 = 20_000_000;

/// The same while nothing is in progress: only grants are renewed, which also say to others that this site's heads live.
pub const REST_NS: u64 = RENEW_NS;

/// What a site wants done.
#[derive(Debug, PartialEq, Eq)]
pub enum Output<B> {
    /// Send what a head asks, by the own connection to that site.
    Ask(Site, Message<B>),
    /// Send an answer, by the connection that the question came by.
    Reply(Site, Message<B>),
    /// Have a store do something, and tell [`Engine::ended`].
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
    /// Writes of the volume up to this one are on all in-sync members: regions of the store may leave the activity log.
    Stable(Member, VolumeId, Version),
    /// Answer a request of an initiator.
    Answer {
        /// Of which volume.
        volume: VolumeId,
        /// Which.
        token: Token,
        /// How it ended.
        result: Result<(), Failure>,
        /// What was read.
        blocks: Option<B>,
    },
    /// Have a volume's record changed, if it is still at this revision, and tell by [`Engine::record`] what it has become.
    Change {
        /// Whose.
        volume: VolumeId,
        /// Which head asks.
        generation: Generation,
        /// Of the record that it is computed from.
        revision: u64,
        /// What is to change.
        change: Change,
    },
    /// Look at the volume's partitions again: a replica knows newer owners.
    Refresh(VolumeId),
    /// The volume's head has given its grants back and waits for its successor, or does so no longer.
    HandedOver(VolumeId, Generation, bool),
    /// The volume's head is none any more; what it was asked and did not answer ends with it.
    Ended(VolumeId, Generation, End),
    /// Nothing is left of what a store here no longer owns.
    Retired(Member, VolumeId, Share),
    /// Nobody wants these any more.
    Release(B),
}

/// Another site.
#[derive(Debug)]
struct Peer<B> {
    /// For what heads here ask.
    is_connected: bool,
    /// When a grant was asked for last.
    asked_ns: Option<u64>,
    /// For what heads there ask.
    incoming: Option<Incoming<B>>,
}

#[derive(Debug)]
struct Incoming<B> {
    is_served: bool,
    held: VecDeque<Message<B>>,
}

impl<B> Default for Peer<B> {
    fn default() -> Peer<B> {
        Peer { is_connected: false, asked_ns: None, incoming: None }
    }
}

/// The heads and replicas of a site.
#[derive(Debug)]
pub struct Engine<B> {
    site: Site,
    replicas: Replicas<B>,
    heads: BTreeMap<VolumeId, Head<B>>,
    /// Heads that were given something since they wanted nothing more.
    stirred: BTreeSet<VolumeId>,
    /// Heads to which time and grants mean something; looking at the time costs as much as they are.
    awake: BTreeSet<VolumeId>,
    /// How many heads have something to ask of each site.
    asked_by: BTreeMap<Site, u32>,
    /// The last generation of each volume that had a head here: it is used.
    used: BTreeMap<VolumeId, Generation>,
    grants: Grants,
    /// For bringing members up to date, and heads that wait for it, once for each piece, in turn.
    budget: Budget,
    saving: VecDeque<VolumeId>,
    peers: BTreeMap<Site, Peer<B>>,
    /// From the heads here to the replicas here, and back.
    own: VecDeque<Message<B>>,
    outputs: VecDeque<Output<B>>,
    now_ns: u64,
}

impl<B> Engine<B> {
    /// Of a process that was started at `now_ns` of its boot-time clock, as all times here are.
    #[must_use]
    pub fn new(site: Site, now_ns: u64) -> Engine<B> {
        Engine {
            site,
            replicas: Replicas::new(now_ns),
            heads: BTreeMap::new(),
            stirred: BTreeSet::new(),
            awake: BTreeSet::new(),
            asked_by: BTreeMap::new(),
            used: BTreeMap::new(),
            grants: Grants::default(),
            budget: Budget::default(),
            saving: VecDeque::new(),
            peers: BTreeMap::new(),
            own: VecDeque::new(),
            outputs: VecDeque::new(),
            now_ns,
        }
    }

    /// A store is open, with what it has kept of its volumes.
    pub fn add_store(&mut self, member: Member, volumes: impl IntoIterator<Item = (VolumeId, Durable)>) {
        self.replicas.add_store(member, volumes);
    }

    /// A store is closed.
    pub fn remove_store(&mut self, member: Member) {
        self.replicas.remove_store(member);
    }

    /// A volume on an open store is given up.
    pub fn drop_replica(&mut self, member: Member, volume: VolumeId) {
        self.replicas.drop_replica(member, volume);
    }

    /// Gives up what a store has of a partition that others own, all of them complete: its record says so. Until [`Output::Retired`] it is
    /// to be asked for again now and then.
    pub fn retire(
        &mut self,
        member: Member,
        volume: VolumeId,
        share: Share,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        self.replicas.retire(member, volume, share, now_ns);
        self.pump(memory);
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Heads

    /// Begins to be the head of a volume; whether it did: not under a generation that was used here before.
    pub fn begin(
        &mut self,
        generation: Generation,
        membership: Membership,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) -> bool {
        let volume = membership.volume;
        if self.used.get(&volume).is_some_and(|used| *used >= generation) {
            return false;
        }
        self.now_ns = now_ns;
        self.end(volume, memory);
        self.used.insert(volume, generation);
        let mut head = Head::new(self.site.node, generation, membership, now_ns);
        for site in sites_of(&head) {
            self.begin_asking(site);
            if site == self.site || self.peers.get(&site).is_some_and(|peer| peer.is_connected) {
                head.connected(site, &self.grants, memory, now_ns);
            }
        }
        self.heads.insert(volume, head);
        self.stirred.insert(volume);
        self.pump(memory);
        true
    }

    /// Is the head of a volume no more: its record names another one.
    pub fn end(&mut self, volume: VolumeId, memory: &mut impl Memory<Blocks = B>) {
        if let Some(head) = self.heads.remove(&volume) {
            self.outputs.push_back(Output::Ended(volume, head.generation(), End::Replaced));
            self.dissolve(head, memory);
        }
    }

    fn dissolve(&mut self, head: Head<B>, memory: &mut impl Memory<Blocks = B>) {
        for site in sites_of(&head) {
            self.stop_asking(site);
        }
        head.dissolve(memory);
    }

    /// One more head asks a site.
    fn begin_asking(&mut self, site: Site) {
        *self.asked_by.entry(site).or_default() += 1;
    }

    /// One head less does.
    fn stop_asking(&mut self, site: Site) {
        if let btree_map::Entry::Occupied(mut asked_by) = self.asked_by.entry(site) {
            *asked_by.get_mut() -= 1;
            if *asked_by.get() == 0 {
                asked_by.remove();
            }
        }
    }

    /// The last generation under which this process had a head of the volume.
    #[must_use]
    pub fn used(&self, volume: VolumeId) -> Option<Generation> {
        self.used.get(&volume).copied()
    }

    /// The head of a volume.
    #[must_use]
    pub fn head(&self, volume: VolumeId) -> Option<&Head<B>> {
        self.heads.get(&volume)
    }

    /// All heads.
    pub fn heads(&self) -> impl Iterator<Item = (VolumeId, &Head<B>)> {
        self.heads.iter().map(|(volume, head)| (*volume, head))
    }

    /// Whether the head of a volume can answer now.
    #[must_use]
    pub fn is_serving(&self, volume: VolumeId, now_ns: u64) -> bool {
        self.heads.get(&volume).is_some_and(|head| head.is_serving(&self.grants, now_ns))
    }

    /// The record of a volume is this: nothing that was asked for before can still change it.
    pub fn record(
        &mut self,
        volume: VolumeId,
        record: Record,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        let Some(head) = self.heads.get_mut(&volume) else { return };
        let before = sites_of(head);
        head.record(record, &self.grants, memory, now_ns);
        let after = sites_of(head);
        for site in &after {
            if *site == self.site || self.peers.get(site).is_some_and(|peer| peer.is_connected) {
                head.owners_came(*site, &self.grants, memory, now_ns);
            }
        }
        after.difference(&before).for_each(|site| self.begin_asking(*site));
        before.difference(&after).for_each(|site| self.stop_asking(*site));
        self.stirred.insert(volume);
        self.pump(memory);
    }

    /// Begins to read blocks of a volume. Without a head nothing comes of it.
    pub fn read(
        &mut self,
        volume: VolumeId,
        token: Token,
        blocks: Range<u64>,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        if let Some(head) = self.heads.get_mut(&volume) {
            head.read(token, blocks, &self.grants, memory, now_ns);
            self.stirred.insert(volume);
            self.pump(memory);
        }
    }

    /// Begins to write: one block of the payload for each of `blocks`, but for the bytes that are to be kept. Without a head nothing
    /// comes of it.
    #[expect(clippy::too_many_arguments, reason = "a request and what it is about")]
    pub fn write(
        &mut self,
        volume: VolumeId,
        token: Token,
        blocks: Range<u64>,
        payload: B,
        keep_head_bytes: u16,
        keep_tail_bytes: u16,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        match self.heads.get_mut(&volume) {
            Some(head) => {
                let kept = (keep_head_bytes, keep_tail_bytes);
                head.write(token, blocks, payload, kept.0, kept.1, &self.grants, memory, now_ns);
                self.stirred.insert(volume);
                self.pump(memory);
            }
            None => memory.release(payload),
        }
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Connections

    /// The sites that heads here have something to ask of, the own one left out.
    #[must_use]
    pub fn wanted(&self) -> BTreeSet<Site> {
        self.asked_by.keys().copied().filter(|site| *site != self.site).collect()
    }

    /// The own connection to a site can be used.
    pub fn connected(&mut self, site: Site, memory: &mut impl Memory<Blocks = B>, now_ns: u64) {
        self.now_ns = now_ns;
        let peer = self.peers.entry(site).or_default();
        peer.is_connected = true;
        peer.asked_ns = None;
        for head in self.heads.values_mut() {
            head.connected(site, &self.grants, memory, now_ns);
        }
        self.stir_all();
        self.pump(memory);
    }

    /// The own connection to a site is gone.
    pub fn disconnected(&mut self, site: Site, memory: &mut impl Memory<Blocks = B>, now_ns: u64) {
        self.now_ns = now_ns;
        let peer = self.peers.entry(site).or_default();
        if std::mem::take(&mut peer.is_connected) {
            for head in self.heads.values_mut() {
                head.disconnected(site, &self.grants, memory, now_ns);
            }
            self.stir_all();
            self.pump(memory);
        }
    }

    /// A site has a new connection to here. An earlier one is none any more.
    pub fn accepted(&mut self, site: Site, memory: &mut impl Memory<Blocks = B>) {
        self.closed(site, memory);
        let incoming = Incoming { is_served: false, held: VecDeque::new() };
        self.peers.entry(site).or_default().incoming = Some(incoming);
        self.pump(memory);
    }

    /// The connection of a site to here is gone.
    pub fn closed(&mut self, site: Site, memory: &mut impl Memory<Blocks = B>) {
        self.replicas.disconnected(site);
        let incoming = self.peers.get_mut(&site).and_then(|peer| peer.incoming.take());
        for message in incoming.into_iter().flat_map(|incoming| incoming.held) {
            release(message, memory);
        }
    }

    /// Whether what comes by the connection of a site is done at once. Until then nothing more is to be read from it.
    #[must_use]
    pub fn serves(&self, site: Site) -> bool {
        self.peers
            .get(&site)
            .and_then(|peer| peer.incoming.as_ref())
            .is_some_and(|incoming| incoming.is_served)
    }

    /// A message has come by the connection of a site to here.
    pub fn asked(
        &mut self,
        site: Site,
        message: Message<B>,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        let Some(incoming) = self.peers.get_mut(&site).and_then(|peer| peer.incoming.as_mut()) else {
            release(message, memory);
            return;
        };
        incoming.held.push_back(message);
        self.pump(memory);
    }

    /// A message has come by the own connection to a site.
    pub fn answered(
        &mut self,
        site: Site,
        message: Message<B>,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        if self.peers.get(&site).is_some_and(|peer| peer.is_connected) {
            self.take_answer(site, message, memory);
            self.pump(memory);
        } else {
            release(message, memory);
        }
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Stores and time

    /// A store has ended something.
    pub fn ended(&mut self, id: WorkId, ended: Ended<B>, memory: &mut impl Memory<Blocks = B>, now_ns: u64) {
        self.now_ns = now_ns;
        self.replicas.ended(id, ended, now_ns);
        self.pump(memory);
    }

    /// Time has passed.
    pub fn tick(&mut self, memory: &mut impl Memory<Blocks = B>, now_ns: u64) {
        self.now_ns = now_ns;
        self.replicas.tick(now_ns);
        self.tick_heads(memory);
        self.spend(memory);
        self.ask_for_grants(false);
        self.pump(memory);
    }

    /// Members are brought up to date with so many bytes in a second at most, by all heads together; 0: as fast as can be.
    pub fn set_resync_rate(&mut self, bytes_per_s: u64, memory: &mut impl Memory<Blocks = B>, now_ns: u64) {
        self.now_ns = now_ns;
        self.budget.set_rate(bytes_per_s, now_ns);
        self.spend(memory);
        self.pump(memory);
    }

    /// Lets heads go on that wait for something to spend, as far as it goes.
    fn spend(&mut self, memory: &mut impl Memory<Blocks = B>) {
        while let Some(volume) = self.saving.front().copied() {
            let Some(head) = self.heads.get_mut(&volume) else {
                self.saving.pop_front();
                continue;
            };
            if !self.budget.take(PIECE_BYTES, self.now_ns) {
                return;
            }
            self.saving.pop_front();
            if head.resync(&self.grants, memory, self.now_ns) {
                self.stirred.insert(volume);
            }
        }
    }

    /// What is to be done next, if anything.
    pub fn output(&mut self) -> Option<Output<B>> {
        self.outputs.pop_front()
    }

    /// Whether something depends on the time: then [`Engine::tick`] is to be called every [`Engine::tick_ns`].
    #[must_use]
    pub fn is_timed(&self) -> bool {
        !self.heads.is_empty() || self.replicas.due_ns().is_some()
    }

    /// How long a look at the time can wait after the last one: [`TICK_NS`], or longer while nothing is in progress.
    #[must_use]
    pub fn tick_ns(&self) -> u64 {
        if self.awake.is_empty() && self.replicas.due_ns().is_none() { REST_NS } else { TICK_NS }
    }

    /// Whether nothing of a volume's head is in progress: what was told of it is true still, but for whether it is granted to.
    #[must_use]
    pub fn is_resting(&self, volume: VolumeId) -> bool {
        !self.awake.contains(&volume)
    }

    /// Lets heads look at the time and the grants to which they mean something.
    fn tick_heads(&mut self, memory: &mut impl Memory<Blocks = B>) {
        for volume in &self.awake {
            if let Some(head) = self.heads.get_mut(volume) {
                head.tick(&self.grants, memory, self.now_ns);
            }
        }
        self.stirred.extend(&self.awake);
    }

    /// Every node whose heads were given a grant by a replica here, with when the last one was given.
    #[must_use]
    pub fn granted(&self) -> BTreeMap<NodeId, u64> {
        self.replicas.granted()
    }

    /// Asks those sites for a grant whose last one is not new; urgently: whoever was asked before an opening is asked again.
    fn ask_for_grants(&mut self, is_urgent: bool) {
        if self.heads.is_empty() {
            return;
        }
        let now_ns = self.now_ns;
        let is_due = |peer: &Peer<B>| {
            is_urgent || peer.asked_ns.is_none_or(|asked_ns| now_ns.saturating_sub(asked_ns) >= RENEW_NS)
        };
        self.peers.entry(self.site).or_default().is_connected = true;
        for (site, peer) in &mut self.peers {
            let is_own = *site == self.site;
            if !peer.is_connected || !(is_own || self.asked_by.contains_key(site)) || !is_due(peer) {
                continue;
            }
            peer.asked_ns = Some(now_ns);
            let message = Message::GrantRequest(GrantRequest { asked_ns: now_ns });
            if is_own {
                self.own.push_back(message);
            } else {
                self.outputs.push_back(Output::Ask(*site, message));
            }
        }
    }

    // ---------------------------------------------------------------------------------------------------------------
    // Between heads and replicas

    /// Does what heads and replicas want, until they want nothing more that can be done here.
    fn pump(&mut self, memory: &mut impl Memory<Blocks = B>) {
        loop {
            self.serve(memory);
            if let Some(message) = self.own.pop_front() {
                self.take_own(message, memory);
            } else if let Some(output) = self.replicas.output() {
                self.replica_wants(output, memory);
            } else if !self.heads_want(memory) {
                return;
            }
        }
    }

    /// Takes what has come by connections that can be served.
    fn serve(&mut self, memory: &mut impl Memory<Blocks = B>) {
        let mut ready = Vec::new();
        for (site, peer) in &mut self.peers {
            let Some(incoming) = &mut peer.incoming else { continue };
            if !incoming.is_served {
                incoming.is_served =
                    self.replicas.has_ended_all_of(*site) || mutants::is(Mutant::ConnectionServedEarly);
            }
            if incoming.is_served {
                ready.extend(incoming.held.drain(..).map(|message| (*site, message)));
            }
        }
        for (site, message) in ready {
            self.take_question(site, message, memory);
        }
    }

    fn take_own(&mut self, message: Message<B>, memory: &mut impl Memory<Blocks = B>) {
        match message {
            Message::Request(_) | Message::GrantRequest(_) => self.take_question(self.site, message, memory),
            Message::Answer(_) | Message::GrantAnswer(_) => self.take_answer(self.site, message, memory),
        }
    }

    fn take_question(&mut self, from: Site, message: Message<B>, memory: &mut impl Memory<Blocks = B>) {
        match message {
            Message::Request(request) => self.replicas.request(from, request, self.now_ns),
            Message::GrantRequest(request) => self.replicas.grant(from, request, self.now_ns),
            // Nobody here has asked by that connection.
            Message::Answer(_) | Message::GrantAnswer(_) => release(message, memory),
        }
    }

    fn take_answer(&mut self, from: Site, message: Message<B>, memory: &mut impl Memory<Blocks = B>) {
        let now_ns = self.now_ns;
        match message {
            Message::Answer(answer) => {
                let is_open = matches!(answer.reply, Reply::Opened { .. });
                match self.heads.get_mut(&answer.volume) {
                    Some(head) => {
                        self.stirred.insert(answer.volume);
                        head.answer(answer, &self.grants, memory, now_ns);
                    }
                    None => release(Message::Answer(answer), memory),
                }
                if is_open {
                    self.ask_for_grants(true);
                }
            }
            Message::GrantAnswer(answer) => {
                self.grants.received(from, answer.asked_ns, now_ns);
                for (volume, below) in answer.excluded {
                    if let Some(head) = self.heads.get_mut(&volume) {
                        head.excluded(below, memory);
                        self.stirred.insert(volume);
                    }
                }
                self.tick_heads(memory);
            }
            Message::Request(_) | Message::GrantRequest(_) => release(message, memory),
        }
    }

    fn replica_wants(&mut self, output: replica::Output<B>, memory: &mut impl Memory<Blocks = B>) {
        let (to, message) = match output {
            replica::Output::Send(to, answer) => (to, Message::Answer(answer)),
            replica::Output::Grant(to, answer) => (to, Message::GrantAnswer(answer)),
            replica::Output::Start { id, member, volume, work } => {
                self.outputs.push_back(Output::Start { id, member, volume, work });
                return;
            }
            replica::Output::Stable(member, volume, version) => {
                self.outputs.push_back(Output::Stable(member, volume, version));
                return;
            }
            replica::Output::Retired(member, volume, share) => {
                self.outputs.push_back(Output::Retired(member, volume, share));
                return;
            }
            replica::Output::Release(blocks) => {
                memory.release(blocks);
                return;
            }
        };
        if to == self.site {
            self.own.push_back(message);
        } else if self.serves(to) {
            self.outputs.push_back(Output::Reply(to, message));
        } else {
            // The connection that it was asked by is gone.
            release(message, memory);
        }
    }

    /// All heads may want something.
    fn stir_all(&mut self) {
        self.stirred.extend(self.heads.keys());
    }

    /// The next thing that a head wants.
    fn next_wanted(&mut self) -> Option<(VolumeId, Generation, head::Output<B>)> {
        while let Some(volume) = self.stirred.first().copied() {
            if let Some(head) = self.heads.get_mut(&volume)
                && let Some(output) = head.output()
            {
                return Some((volume, head.generation(), output));
            }
            self.stirred.remove(&volume);
            if self.heads.get(&volume).is_some_and(|head| !head.is_resting()) {
                self.awake.insert(volume);
            } else {
                self.awake.remove(&volume);
            }
        }
        None
    }

    /// Does the next thing that a head wants; whether there was any.
    fn heads_want(&mut self, memory: &mut impl Memory<Blocks = B>) -> bool {
        let Some((volume, generation, output)) = self.next_wanted() else { return false };
        match output {
            head::Output::Send(to, request) if to == self.site => {
                self.own.push_back(Message::Request(request));
            }
            head::Output::Send(to, request) => {
                self.outputs.push_back(Output::Ask(to, Message::Request(request)));
            }
            head::Output::Answer { token, result, blocks } => {
                self.outputs.push_back(Output::Answer { volume, token, result, blocks });
            }
            head::Output::Change { revision, change } => {
                self.outputs.push_back(Output::Change { volume, generation, revision, change });
            }
            head::Output::Resync => {
                self.saving.push_back(volume);
                self.spend(memory);
            }
            head::Output::Refresh => self.outputs.push_back(Output::Refresh(volume)),
            head::Output::HandedOver(has_handed_over) => {
                self.outputs.push_back(Output::HandedOver(volume, generation, has_handed_over));
            }
            head::Output::Release(blocks) => memory.release(blocks),
            head::Output::End(end) => {
                if let Some(head) = self.heads.remove(&volume) {
                    self.dissolve(head, memory);
                }
                self.outputs.push_back(Output::Ended(volume, generation, end));
            }
        }
        true
    }
}

/// Every site that a head asks, once.
fn sites_of<B>(head: &Head<B>) -> BTreeSet<Site> {
    head.membership().owners().into_values().collect()
}

/// Gives back what a message that nobody wants has brought.
fn release<B>(message: Message<B>, memory: &mut impl Memory<Blocks = B>) {
    use crate::message::Ask;
    match message {
        Message::Request(Request { ask: Ask::Write { blocks, .. }, .. })
        | Message::Answer(Answer { reply: Reply::Blocks(blocks), .. }) => memory.release(blocks),
        _ => {}
    }
}
