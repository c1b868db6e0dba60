//! The replicas as the head sees them: connections, openings, what each was asked, and how those go that are silent.
//!
//! Invariants:
//! * What was asked of a member stays asked until it answers, its connection breaks (reads), or it leaves (writes): a write is
//!   sent again on the next connection, in order.
//! * Nobody leaves who may have the only good copy of a block: what was being written in place when a store stopped is good on the
//!   others only, until it has been written there again.
//! * Of who left, what is still on its way is remembered until it is answered or the connection is gone: nothing new is sent to
//!   blocks that it may still write.

use std::collections::{BTreeMap, BTreeSet};

use super::equalize::Equalize;
use super::resync::Learner;
use super::{Failure, Head, OpId, Output, Purport, RETRY_NS, SILENCE_NS, Stage};
use crate::grants::{GrantIndex, Grants};
use crate::membership::{Change, Record};
use crate::message::{Fault, Held, Memory};
use crate::mutants::{self, Mutant};
use crate::terms::{Extent, Member, Site, Version};

/// For how long a replica may take to open a generation: grants of the former one run out meanwhile.
const OPEN_PATIENCE_NS: u64 = 3_000_000_000;
/// For how long a write may take.
const WRITE_PATIENCE_NS: u64 = 2_000_000_000;

#[derive(Debug, Clone, Copy)]
struct Asked {
    purport: Purport,
    at_ns: u64,
    /// It is on its way, on the present connection.
    is_sent: bool,
}

/// A replica.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) site: Site,
    is_connected: bool,
    /// It has opened this generation once.
    pub(super) was_opened: bool,
    /// It has opened it on this connection, when this was the newest grant of its site.
    pub(super) opened: Option<GrantIndex>,
    /// Of the record that it was last asked to open it by; one such question is on its way at a time.
    pub(super) told_edition: u64,
    /// Of the record that it has opened it by: it keeps that durably.
    kept_edition: u64,
    unanswered: BTreeMap<u64, Asked>,
    /// Writes of before it left that may still be on their way.
    abandoned: BTreeSet<u64>,
    pub(super) learner: Option<Learner>,
    /// Extents of which it may have blocks that match no record, as it said when it was asked last.
    suspects: BTreeSet<Extent>,
    /// The store is another member now.
    is_gone: bool,
    /// A write failed there.
    has_failed: bool,
}

impl Peer {
    fn new(site: Site) -> Peer {
        Peer {
            site,
            is_connected: false,
            was_opened: false,
            opened: None,
            told_edition: 0,
            kept_edition: 0,
            unanswered: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            learner: None,
            suspects: BTreeSet::new(),
            is_gone: false,
            has_failed: false,
        }
    }

    /// Whether it can be asked.
    pub(super) fn is_open(&self) -> bool {
        self.opened.is_some()
    }

    /// Whether it keeps a record of this edition, or of a later one.
    pub(super) fn has_record_of(&self, edition: u64) -> bool {
        self.kept_edition >= edition
    }

    /// Whether nothing is asked of it, or to be.
    pub(super) fn is_resting(&self) -> bool {
        self.unanswered.is_empty()
            && self.learner.is_none()
            && self.suspects.is_empty()
            && !self.is_gone
            && !self.has_failed
            && (self.is_open() || !self.is_connected)
    }

    /// Whether it is being brought up to date.
    pub(super) fn is_learner(&self) -> bool {
        self.learner.is_some()
    }

    /// Whether nothing of a time before is on its way to it.
    pub(super) fn is_clean(&self) -> bool {
        self.abandoned.is_empty() && !self.is_gone
    }

    /// Whether it has answered every write.
    pub(super) fn has_answered_writes(&self) -> bool {
        !self.unanswered.values().any(|asked| asked.purport.is_write())
    }

    /// Whether it has not answered that.
    pub(super) fn is_asked(&self, what: Purport) -> bool {
        self.unanswered.values().any(|asked| asked.purport == what)
    }

    fn may_send(&self, purport: Purport) -> bool {
        self.is_connected && (self.opened.is_some() || purport == Purport::Open)
    }

    /// Takes note of an answer; what was asked, unless nobody wants to know any more.
    pub(super) fn answered(&mut self, id: u64) -> Option<Purport> {
        self.abandoned.remove(&id);
        self.unanswered.remove(&id).map(|asked| asked.purport)
    }

    fn oldest_ns(&self, which: impl Fn(Purport) -> bool) -> Option<u64> {
        self.unanswered.values().filter(|asked| which(asked.purport)).map(|asked| asked.at_ns).min()
    }
}

impl<B> Head<B> {
    /// Has a peer for every owner.
    pub(super) fn follow_owners(&mut self) {
        for (member, site) in self.membership.owners() {
            self.peers.entry(member).or_insert_with(|| Peer::new(site)).site = site;
        }
    }

    /// A connection to that site can be used. Nothing of an earlier one is on its way any more.
    pub fn connected(
        &mut self,
        site: Site,
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        if self.end.is_some() {
            return;
        }
        let members: Vec<Member> = self.members_of(site);
        for member in members {
            let Some(peer) = self.peers.get_mut(&member) else { continue };
            peer.is_connected = true;
            peer.abandoned.clear();
            self.reopen(member, memory);
        }
        self.advance(grants, memory);
    }

    /// The connection to that site is gone.
    pub fn disconnected(
        &mut self,
        site: Site,
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        if self.end.is_some() {
            return;
        }
        for member in self.members_of(site) {
            let Some(peer) = self.peers.get_mut(&member) else { continue };
            peer.is_connected = false;
            peer.opened = None;
            peer.unanswered.retain(|_, asked| asked.purport != Purport::Open);
            peer.unanswered.values_mut().for_each(|asked| asked.is_sent = false);
            self.drop_reads(member, memory);
            self.drop_learners_that_need(member);
        }
        self.advance(grants, memory);
    }

    /// Owners have come, and the connection to their site can be used already.
    pub fn owners_came(
        &mut self,
        site: Site,
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
        now_ns: u64,
    ) {
        self.now_ns = now_ns;
        for member in self.members_of(site) {
            if let Some(peer) = self.peers.get_mut(&member).filter(|peer| !peer.is_open()) {
                peer.is_connected = true;
                self.reopen(member, memory);
            }
        }
        self.advance(grants, memory);
    }

    fn members_of(&self, site: Site) -> Vec<Member> {
        self.peers.iter().filter(|(_, peer)| peer.site == site).map(|(member, _)| *member).collect()
    }

    /// Asks a replica to open the generation, again if it was asked on an earlier connection.
    pub(super) fn reopen(&mut self, member: Member, memory: &mut impl Memory<Blocks = B>) {
        let is_asked = !self.has_left() && self.membership.owners().contains_key(&member);
        let Some(peer) = self.peers.get_mut(&member) else { return };
        peer.opened = None;
        if peer.is_connected && is_asked && peer.oldest_ns(|purport| purport == Purport::Open).is_none() {
            self.send(member, Purport::Open, memory);
        }
    }

    /// A replica has opened the generation.
    pub(super) fn opened(
        &mut self,
        from: Member,
        highest: Version,
        active: &[Held],
        grants: &Grants,
        memory: &mut impl Memory<Blocks = B>,
    ) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        // Asked once more on the same connection it has it open since the first time.
        peer.opened.get_or_insert(grants.index(peer.site));
        peer.kept_edition = peer.told_edition;
        peer.suspects = active.iter().filter(|held| held.is_suspect).map(|held| held.extent).collect();
        if !std::mem::replace(&mut peer.was_opened, true) {
            if !mutants::is(Mutant::SequenceRestarts) {
                self.next_version = self.next_version.max(highest.next());
            }
            // Where it is behind it is made equal by what it missed, and by what only it has.
            let is_unequal =
                |extent| self.membership.needs(from, extent) && !mutants::is(Mutant::ReconcileSkipped);
            for held in active.iter().filter(|held| is_unequal(held.extent)) {
                let lowest = &mut self.unequal.entry(held.extent).or_insert((held.version, false)).0;
                *lowest = held.version.min(*lowest);
            }
        }
        self.resend(from, memory);
        self.have_record_kept(memory);
    }

    /// Has those who are in sync keep the edition since which they are it: by opening the generation once more.
    fn have_record_kept(&mut self, memory: &mut impl Memory<Blocks = B>) {
        let lacks_it = |member: &Member, peer: &Peer| {
            peer.is_open()
                && !peer.has_record_of(self.members_since)
                && !peer.is_asked(Purport::Open)
                && self.membership.is_needed_somewhere(*member)
        };
        let members = self.peers.iter().filter(|(member, peer)| lacks_it(member, peer));
        let members: Vec<Member> = members.map(|(member, _)| *member).collect();
        for member in members {
            self.send(member, Purport::Open, memory);
        }
    }

    /// Sends what is not on its way, in order.
    fn resend(&mut self, member: Member, memory: &mut impl Memory<Blocks = B>) {
        let Some(peer) = self.peers.get_mut(&member) else { return };
        let unsent = peer.unanswered.iter_mut().filter(|(_, asked)| !asked.is_sent);
        let unsent: Vec<(u64, Purport)> = unsent
            .map(|(id, asked)| {
                asked.is_sent = true;
                (*id, asked.purport)
            })
            .collect();
        for (id, purport) in unsent {
            self.send_now(member, id, purport, memory);
        }
    }

    /// Asks a replica, now or when it is open again.
    pub(super) fn send(&mut self, member: Member, purport: Purport, memory: &mut impl Memory<Blocks = B>) {
        let is_sent = self.peers.get(&member).is_some_and(|peer| peer.may_send(purport));
        let id = self.keep(member, purport, is_sent);
        if is_sent {
            self.send_now(member, id, purport, memory);
        }
    }

    /// Takes note of what is asked of a member; its number.
    fn keep(&mut self, member: Member, purport: Purport, is_sent: bool) -> u64 {
        let id = self.next_request;
        self.next_request += 1;
        if let Some(peer) = self.peers.get_mut(&member) {
            peer.unanswered.insert(id, Asked { purport, at_ns: self.now_ns, is_sent });
        }
        id
    }

    /// Reads of who cannot answer are asked of others.
    fn drop_reads(&mut self, member: Member, memory: &mut impl Memory<Blocks = B>) {
        let Some(peer) = self.peers.get_mut(&member) else { return };
        let is_read = |purport: Purport| !purport.is_write() && purport != Purport::Open;
        let dropped: Vec<Purport> =
            peer.unanswered.values().map(|asked| asked.purport).filter(|purport| is_read(*purport)).collect();
        peer.unanswered.retain(|_, asked| !is_read(asked.purport));
        for purport in dropped {
            match purport {
                Purport::Read { op, reading } => self.ask_another(op, reading, member, memory),
                Purport::EqualizeDigest { job, .. } | Purport::EqualizeRead { job, .. } => {
                    self.restart_job(job, memory);
                }
                Purport::List { learner, .. } => self.drop_learner(learner),
                _ => {}
            }
        }
    }

    /// Gives reads that take long to another copy too.
    pub(super) fn lose_patience(&mut self, memory: &mut impl Memory<Blocks = B>) {
        let late = |asked: u64| self.now_ns.saturating_sub(asked) > super::READ_PATIENCE_NS;
        let mut slow = Vec::new();
        for (&at, op) in &self.ops {
            for (index, reading) in op.readings.iter().enumerate() {
                if let Some((member, _)) = reading.asked.filter(|(_, asked_ns)| late(*asked_ns)) {
                    slow.push((at, index, member));
                }
            }
        }
        for (at, index, member) in slow {
            let span = self.op(at).readings[index].span;
            let others = self.membership.sure(span.extent).filter(|owner| owner.member != member);
            let tried = &self.op(at).readings[index].failed;
            let has_another = others
                .filter(|owner| !tried.contains(&owner.member))
                .any(|owner| self.peers.get(&owner.member).is_some_and(Peer::is_open));
            if has_another {
                self.ask_another(at, index, member, memory);
            }
        }
    }

    pub(super) fn ask_another(
        &mut self,
        at: OpId,
        index: usize,
        but: Member,
        memory: &mut impl Memory<Blocks = B>,
    ) {
        let Some(reading) = self.ops.get_mut(&at).and_then(|op| op.readings.get_mut(index)) else { return };
        if reading.got.is_some() || reading.asked.is_none_or(|(asked, _)| asked != but) {
            return;
        }
        // It has not said that it cannot give it: it is asked again if no other can.
        reading.asked = None;
        self.send_read(at, index, Some(but), memory);
    }

    /// A replica could not write, or make room.
    pub(super) fn write_failed(&mut self, from: Member, purport: Purport, fault: Fault) {
        // While it is asked to be in sync it may be so already: then nobody but it can answer for the write.
        let is_needed = self.extent_of(purport).is_some_and(|extent| self.membership.needs(from, extent));
        if self.peers.get(&from).is_some_and(Peer::is_learner) && !is_needed {
            if mutants::is(Mutant::JoinAfterFailedWrite) {
                self.leave(from);
                return;
            }
            self.drop_learner(from);
            return;
        }
        let (op, piece) = match purport {
            Purport::Write { op, piece } | Purport::Reserve { op, piece } => (Some(op), piece),
            _ => (None, 0),
        };
        let is_sole =
            |extent: Extent| self.membership.needed(extent).count() == 1 && self.membership.doubt().is_none();
        let is_alone =
            op.and_then(|op| self.ops.get(&op)).is_some_and(|op| super::extents(&op.range).all(is_sole));
        if fault != Fault::NoMemory
            && is_alone
            && let Some(op) = op.and_then(|op| self.ops.get_mut(&op))
        {
            // Nobody has anything else: it was written or not, as with any disk. Other pieces may be on their way still.
            op.failure.get_or_insert(Failure::Unwritable);
            let targets = op.pieces.get_mut(piece).into_iter().flat_map(|piece| &mut piece.targets);
            targets.filter(|target| target.member == from).for_each(|target| target.is_done = true);
            return;
        }
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.has_failed |= fault != Fault::NoMemory;
        }
        self.keep(from, purport, false);
        self.retry_at_ns = self.retry_at_ns.min(self.now_ns + RETRY_NS);
    }

    /// A replica could not open the generation, or knows newer owners: it is asked again, later.
    pub(super) fn open_failed(&mut self, from: Member) {
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.opened = None;
        }
        self.retry_at_ns = self.retry_at_ns.min(self.now_ns + RETRY_NS);
    }

    /// Tries again what has failed.
    pub(super) fn resend_failed(&mut self, memory: &mut impl Memory<Blocks = B>) {
        let members: Vec<Member> = self.peers.keys().copied().collect();
        for member in members {
            let Some(peer) = self.peers.get_mut(&member) else { continue };
            peer.has_failed = false;
            if peer.is_open() {
                self.resend(member, memory);
            } else {
                self.reopen(member, memory);
            }
        }
    }

    pub(super) fn peer_is_gone(&mut self, member: Member) {
        if let Some(peer) = self.peers.get_mut(&member) {
            peer.is_gone = true;
            peer.opened = None;
        }
        self.drop_learners_that_need(member);
    }

    /// What a refused request was for stays to be done.
    pub(super) fn ask_again(
        &mut self,
        member: Member,
        purport: Purport,
        memory: &mut impl Memory<Blocks = B>,
    ) {
        match purport {
            Purport::Read { op, reading } => self.ask_another(op, reading, member, memory),
            Purport::EqualizeDigest { job, .. } | Purport::EqualizeRead { job, .. } => {
                self.restart_job(job, memory);
            }
            Purport::Write { .. } | Purport::EqualizeWrite { .. } | Purport::Reserve { .. } => {
                self.keep(member, purport, false);
            }
            Purport::List { learner, .. } => self.drop_learner(learner),
            Purport::Open | Purport::Stable | Purport::Close => {}
        }
    }

    /// Whether something waits that a partition of this member has a part in. Everything does before it could answer for the first time:
    /// until then nobody is told that there is a head, so that nothing is asked of it.
    fn is_wanted(&self, member: Member) -> bool {
        if !self.has_served {
            return true;
        }
        let owns = |extent: Extent| self.membership.owns(member, extent);
        self.is_leaving()
            || self.ops.values().any(|op| super::extents(&op.range).any(owns))
            || self.unequal.keys().any(|extent| owns(*extent))
    }

    /// Whether a member does not do what something waits for.
    fn is_silent(&self, member: Member, peer: &Peer, grants: &Grants) -> bool {
        let late = |since: Option<u64>, patience_ns: u64| {
            since.is_some_and(|at_ns| self.now_ns.saturating_sub(at_ns) > patience_ns)
        };
        peer.is_gone
            || peer.has_failed
            || self.is_wanted(member)
                && (peer.site.node != self.node
                    && late(Some(grants.heard_ns(peer.site).max(self.started_ns)), SILENCE_NS))
            || self.is_wanted(member)
                && late(peer.oldest_ns(|purport| purport == Purport::Open), OPEN_PATIENCE_NS)
            || late(peer.oldest_ns(Purport::is_write), WRITE_PATIENCE_NS)
    }

    /// Has those called stale that keep others waiting.
    pub(super) fn eject_the_silent(&mut self, grants: &Grants) {
        if self.membership.doubt().is_some() {
            return;
        }
        let mut ejected = BTreeMap::new();
        for (member, peer) in &self.peers {
            if !self.membership.is_needed_somewhere(*member)
                || !self.is_silent(*member, peer, grants)
                || !self.knows_what_it_misses(*member, &ejected)
            {
                continue;
            }
            ejected.insert(*member, self.mark_of(*member));
            if !self.membership.may_eject(&ejected) || !self.leaves_good_copies(&ejected) {
                ejected.remove(member);
            }
        }
        if !ejected.is_empty() {
            self.change(Change { eject: ejected, join: Vec::new() });
        }
    }

    /// Whether all that stay in sync of its partitions have said what they have: of who never opened this generation it is not known
    /// which of the writes of the one before it has.
    fn knows_what_it_misses(&self, member: Member, ejected: &BTreeMap<Member, Version>) -> bool {
        let partitions = self.membership.partitions().iter();
        partitions.filter(|partition| partition.owners.iter().any(|owner| owner.member == member)).all(
            |partition| {
                let others = partition
                    .owners
                    .iter()
                    .filter(|owner| owner.member != member && !ejected.contains_key(&owner.member));
                others
                    .filter(|owner| self.membership.is_needed(owner))
                    .all(|owner| self.peers.get(&owner.member).is_some_and(|peer| peer.was_opened))
            },
        )
    }

    /// Whether each extent that is suspect on somebody who stays is not suspect on somebody else who does.
    fn leaves_good_copies(&self, ejected: &BTreeMap<Member, Version>) -> bool {
        let partitions = self.membership.partitions().iter();
        let touched = partitions
            .filter(|partition| partition.owners.iter().any(|owner| ejected.contains_key(&owner.member)));
        touched.into_iter().all(|partition| {
            let staying = partition.owners.iter().filter(|owner| self.membership.is_needed(owner));
            let staying: Vec<&Peer> = staying
                .filter(|owner| !ejected.contains_key(&owner.member))
                .filter_map(|owner| self.peers.get(&owner.member))
                .collect();
            let is_its = |extent: &&Extent| self.membership.partition(**extent) == partition;
            let suspects = staying.iter().flat_map(|peer| &peer.suspects).filter(is_its);
            let is_good = |extent: &Extent| {
                staying.iter().any(|peer| peer.was_opened && !peer.suspects.contains(extent))
            };
            suspects.into_iter().all(is_good)
        })
    }

    /// Asks those again whose suspect extents keep others from leaving: they may have been written since.
    pub(super) fn survey_suspects(&mut self, memory: &mut impl Memory<Blocks = B>) {
        let is_due = |peer: &Peer| peer.is_open() && !peer.suspects.is_empty();
        let members: Vec<Member> =
            self.peers.iter().filter(|(_, peer)| is_due(peer)).map(|(member, _)| *member).collect();
        for member in members {
            let Some(peer) = self.peers.get(&member) else { continue };
            if peer.oldest_ns(|purport| purport == Purport::Open).is_none() {
                self.send(member, Purport::Open, memory);
            }
        }
    }

    /// The version up to which a member has everything.
    fn mark_of(&self, member: Member) -> Version {
        let unequal = self.unequal.iter().filter(|(extent, _)| self.membership.owns(member, **extent));
        let unequal = unequal.map(|(_, (lowest, _))| *lowest);
        let writes = self.ops.values().filter(|op| op.stage == Stage::Sent).flat_map(|op| &op.pieces);
        let is_missing = |piece: &&super::Piece| {
            !mutants::is(Mutant::MarkAboveWrites)
                && piece.targets.iter().any(|target| target.member == member && !target.is_done)
        };
        let writes = writes.filter(is_missing).map(|piece| piece.version);
        let copies = self.jobs.values().filter_map(Equalize::version);
        unequal.chain(writes).chain(copies).min().unwrap_or(self.next_version).before()
    }

    /// Asks for a change of the record.
    pub(super) fn change(&mut self, change: Change) {
        let revision = self.membership.record().revision;
        self.membership.begin(change.clone());
        self.outputs.push_back(Output::Change { revision, change });
    }

    /// The record has changed.
    pub(super) fn follow_record(&mut self, before: &Record, memory: &mut impl Memory<Blocks = B>) {
        self.follow_owners();
        let members: Vec<Member> = self.peers.keys().copied().collect();
        for member in members {
            let (is_needed, is_behind) =
                (self.membership.is_needed_somewhere(member), self.membership.is_behind_somewhere(member));
            let is_same =
                self.membership.stands_as_in(before, member) || mutants::is(Mutant::LearnerKeptThroughMove);
            let Some(peer) = self.peers.get_mut(&member) else { continue };
            match &mut peer.learner {
                Some(learner) if is_behind && is_same => {
                    learner.was_refused();
                    continue;
                }
                // It has everything, or owns something else than what was found out about.
                Some(_) => {
                    self.drop_learner(member);
                    // It was not asked whether it has room for everything.
                    self.reserved.clear();
                }
                None => {}
            }
            if is_behind || !is_needed || !self.membership.stands_as_in(before, member) {
                self.leave(member);
                self.drop_reads(member, memory);
            }
        }
        self.have_record_kept(memory);
    }

    /// Nobody waits for it any more, where it is not needed.
    pub(super) fn leave(&mut self, member: Member) {
        let is_left = |extent: Extent| !self.membership.needs(member, extent);
        let Some(peer) = self.peers.get(&member) else { return };
        let left = peer.unanswered.iter().filter(|(_, asked)| asked.purport.is_write());
        let left = left.filter(|(_, asked)| self.extent_of(asked.purport).is_none_or(is_left));
        let left: Vec<(u64, bool)> = left.map(|(id, asked)| (*id, asked.is_sent)).collect();
        for op in self.ops.values_mut() {
            for piece in
                op.pieces.iter_mut().filter(|piece| !self.membership.needs(member, piece.span.extent))
            {
                piece.targets.retain(|target| target.member != member);
            }
        }
        for job in self.jobs.values_mut().filter(|job| !self.membership.needs(member, job.span.extent)) {
            job.leave(member);
        }
        let is_needed = self.membership.is_needed_somewhere(member);
        let Some(peer) = self.peers.get_mut(&member) else { return };
        for (id, is_sent) in left {
            peer.unanswered.remove(&id);
            if is_sent {
                peer.abandoned.insert(id);
            }
        }
        peer.has_failed &= is_needed;
    }

    /// Which extent something is about that is in progress.
    fn extent_of(&self, purport: Purport) -> Option<Extent> {
        match purport {
            Purport::Write { op, piece } | Purport::Reserve { op, piece } => {
                Some(self.ops.get(&op)?.pieces.get(piece)?.span.extent)
            }
            Purport::EqualizeWrite { job } => Some(self.jobs.get(&job)?.span.extent),
            _ => None,
        }
    }

    /// Says what is stable when no request says it.
    pub(super) fn tell_stable(&mut self, memory: &mut impl Memory<Blocks = B>) {
        let stable = self.stable();
        if stable <= self.stable_told || !self.ops.is_empty() {
            return;
        }
        self.stable_told = stable;
        let open: Vec<Member> =
            self.peers.iter().filter(|(_, peer)| peer.is_open()).map(|(member, _)| *member).collect();
        for member in open {
            self.send(member, Purport::Stable, memory);
        }
    }
}
