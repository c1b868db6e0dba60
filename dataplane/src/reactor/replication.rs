//! Replicated volumes: what heads and replicas of this core say to other cores, what the manager wants of them, and what they tell it.
//!
//! * A frame that a connection has no room for waits here, and whatever follows it on that connection waits behind it.
//! * A report is made at once when a head wishes for a change or ends, else a few times a second while something depends on the time.

use std::collections::{BTreeMap, VecDeque};

use torus_replication::connection::Side;
use torus_replication::terms::Site;
use torus_replication::wire::Frame;
use torus_uring::{Blocks, SocketEvent};

use super::cores::send_home;
use super::devices::ReactorDevices;
use super::{Reactor, boot_ns};
use crate::exchange::{Order, Report};
use crate::peers::{PeerEvent, Peers, Relation, SendError};
use crate::replicating::{Ground, Outgoing, Replicating, TICK_NS, from_wire, to_wire};
use crate::store::release_blocks;

/// How often there is a report though no head has anything urgent to tell.
const REPORT_NS: u64 = 100_000_000;
/// How often heads at rest are looked at for it.
const REPORT_ALL_NS: u64 = 1_000_000_000;
/// Heads that were not given a grant for so long are not granted to: a grant lasts as long.
const SILENT_NS: u64 = torus_replication::grants::GRANT_NS;

/// What a core has for replicated volumes beside the heads and replicas themselves.
pub(super) struct OwnReplication {
    peers: Option<Peers>,
    /// By connection: frames that it had no room for.
    held: BTreeMap<(Site, bool), VecDeque<(Frame, Blocks)>>,
    ticked_ns: u64,
    reported_ns: u64,
    reported_all_ns: u64,
    reported: Report,
}

impl OwnReplication {
    pub(super) fn new(peers: Option<Peers>) -> OwnReplication {
        OwnReplication {
            peers,
            held: BTreeMap::new(),
            ticked_ns: 0,
            reported_ns: 0,
            reported_all_ns: 0,
            reported: Report::default(),
        }
    }

    /// Whether a node was granted to when that was last reported: it will have to be reported when it is not any more.
    fn grants(&self) -> bool {
        self.reported.granting.values().any(|granting| *granting)
    }
}

impl Reactor {
    fn with_replication<T>(
        &mut self,
        step: impl FnOnce(&mut Replicating, &mut Ground<'_, ReactorDevices<'_>>) -> T,
    ) -> T {
        let (serving, mut around) = self.serving();
        let (replicating, mut ground) = serving.replicating(&mut around);
        step(replicating, &mut ground)
    }

    /// Takes what the manager wants.
    pub(super) fn obey(&mut self, order: Order) {
        let now_ns = self.now_ns;
        match order {
            Order::Sites(sites) => {
                if let Some(peers) = &mut self.replication.peers {
                    for (site, address) in sites {
                        peers.set_address(site, Some(address));
                    }
                }
            }
            Order::AddReplica(member, volume, place) => {
                self.with_replication(|replicating, _| replicating.add_replica(member, volume, place));
            }
            Order::DropReplica(member, volume) => {
                self.with_replication(|replicating, _| replicating.drop_replica(member, volume));
            }
            Order::Begin(generation, membership) => {
                self.with_replication(|replicating, ground| {
                    replicating.begin(generation, membership, ground)
                });
                self.dial();
            }
            Order::Record(volume, record) => {
                self.with_replication(|replicating, ground| replicating.record(volume, record, ground));
            }
            Order::ResyncRate(bytes_per_s) => {
                self.with_replication(|replicating, ground| replicating.set_resync_rate(bytes_per_s, ground));
            }
            Order::End(volume) => {
                self.with_replication(|replicating, ground| replicating.end(volume, ground));
                self.dial();
            }
        }
        // Soon: the manager waits for it.
        self.replication.reported_ns = 0;
        self.replication.ticked_ns = self.replication.ticked_ns.min(now_ns.saturating_sub(TICK_NS));
    }

    /// Wants connections to those that heads here ask, and to nobody else.
    fn dial(&mut self) {
        let wanted = self.serving.wanted_sites();
        let Some(peers) = &mut self.replication.peers else { return };
        for site in peers.dialed() {
            if !wanted.contains(&site) {
                peers.disconnect(&mut self.ring, &mut self.pool, site, self.now_ns);
            }
        }
        for site in wanted {
            peers.connect(site);
        }
    }

    pub(super) fn socket_event(&mut self, event: SocketEvent) {
        if let Some(peers) = &mut self.replication.peers {
            peers.socket_event(&mut self.ring, &mut self.pool, event, self.now_ns);
        }
    }

    /// Takes what has come from other cores, looks at the time, and sends what heads and replicas have to say; whether there was
    /// anything.
    pub(super) fn replicate(&mut self) -> bool {
        let mut worked = false;
        while let Some(event) = self.replication.peers.as_mut().and_then(Peers::next_event) {
            self.peer_event(event);
            worked = true;
        }
        worked |= self.tick_replication();
        self.serve_peers();
        worked |= self.send_to_peers();
        if let Some(peers) = &mut self.replication.peers {
            peers.turn(&mut self.ring, &mut self.pool, self.now_ns);
            for chunk in peers.take_foreign() {
                send_home(&self.mailboxes, &self.region, &mut self.ring, chunk);
            }
        }
        worked
    }

    fn peer_event(&mut self, event: PeerEvent) {
        match event {
            PeerEvent::Connected(site, _) => {
                self.with_replication(|replicating, ground| replicating.connected(site, ground));
            }
            PeerEvent::Accepted(site, _) => {
                self.forget_held(site, false);
                self.with_replication(|replicating, ground| replicating.accepted(site, ground));
            }
            PeerEvent::Disconnected(Relation { site, side }, _) => {
                self.forget_held(site, side == Side::Connecting);
                self.with_replication(|replicating, ground| match side {
                    Side::Connecting => replicating.disconnected(site, ground),
                    Side::Accepting => replicating.closed(site, ground),
                });
            }
            PeerEvent::Unreachable(..) => {}
            PeerEvent::Frame(site, frame, blocks) => {
                let is_question = Side::Connecting.sends(&frame);
                let message = from_wire(frame, blocks);
                self.with_replication(|replicating, ground| {
                    if is_question {
                        replicating.asked(site, message, ground);
                    } else {
                        replicating.answered(site, message, ground);
                    }
                });
            }
        }
    }

    fn forget_held(&mut self, site: Site, is_question: bool) {
        for (_, blocks) in self.replication.held.remove(&(site, is_question)).unwrap_or_default() {
            release_blocks(&mut self.pool, blocks);
        }
    }

    /// When the time has to be looked at, of the clock of the reactor.
    pub(super) fn replication_due_ns(&self) -> u64 {
        let own = &self.replication;
        let peers_ns = own.peers.as_ref().map_or(u64::MAX, Peers::deadline_ns);
        self.replication_tick_ns().map_or(peers_ns, |tick_ns| peers_ns.min(own.ticked_ns + tick_ns))
    }

    /// How long a look at the time can wait after the last one; `None` if nothing depends on it. Others must hear soon of a node that
    /// is granted to no more.
    fn replication_tick_ns(&self) -> Option<u64> {
        let heads_ns = self.serving.is_replication_timed().then(|| self.serving.replication_tick_ns());
        heads_ns.into_iter().chain(self.replication.grants().then_some(REPORT_NS)).min()
    }

    fn tick_replication(&mut self) -> bool {
        let passed_ns = self.now_ns.saturating_sub(self.replication.ticked_ns);
        let is_due = self.replication_tick_ns().is_some_and(|tick_ns| passed_ns >= tick_ns);
        let is_urgent = self.serving.has_news(&self.replication.reported);
        if !(is_due || is_urgent || self.replication.reported_ns == 0) {
            return false;
        }
        self.replication.ticked_ns = self.now_ns;
        self.with_replication(|replicating, ground| replicating.tick(ground));
        if is_urgent || self.now_ns.saturating_sub(self.replication.reported_ns) >= REPORT_NS {
            self.replication.reported_ns = self.now_ns;
            self.report();
        }
        true
    }

    /// Serves cores that have connected anew, once everything of their former connection has ended.
    fn serve_peers(&mut self) {
        let Some(peers) = &mut self.replication.peers else { return };
        let unserved: Vec<Site> = peers.unserved().collect();
        for site in unserved {
            if self.serving.serves_site(site) {
                peers.serve(site, self.now_ns);
            }
        }
    }

    fn report(&mut self) {
        let is_all = self.now_ns.saturating_sub(self.replication.reported_all_ns) >= REPORT_ALL_NS;
        let before = std::mem::take(&mut self.replication.reported);
        let told = (!is_all).then_some(&before);
        let report = self.with_replication(|replicating, _| replicating.report(boot_ns(), SILENT_NS, told));
        self.replication.reported = before;
        if is_all {
            self.replication.reported_all_ns = self.now_ns;
        }
        if report != self.replication.reported {
            self.replication.reported = report.clone();
            self.mailboxes[usize::from(self.core)].tell(Box::new(report));
            self.change_queue.wake();
        }
    }

    fn send_to_peers(&mut self) -> bool {
        let mut worked = self.send_held();
        while let Some(outgoing) = self.serving.next_outgoing() {
            let (site, message, is_question) = match outgoing {
                Outgoing::Ask(site, message) => (site, message, true),
                Outgoing::Reply(site, message) => (site, message, false),
            };
            let (frame, blocks) = to_wire(message, &self.pool);
            let waits = self.replication.held.get(&(site, is_question)).is_some_and(|held| !held.is_empty());
            if waits {
                self.hold(site, is_question, frame, blocks);
            } else {
                self.send_frame(site, is_question, frame, blocks);
            }
            worked = true;
        }
        worked
    }

    fn hold(&mut self, site: Site, is_question: bool, frame: Frame, blocks: Blocks) {
        self.replication.held.entry((site, is_question)).or_default().push_back((frame, blocks));
    }

    /// Sends a frame, or holds it where there is no room; whether it is gone.
    fn send_frame(&mut self, site: Site, is_question: bool, frame: Frame, blocks: Blocks) -> bool {
        let Some(peers) = &mut self.replication.peers else {
            release_blocks(&mut self.pool, blocks);
            return true;
        };
        match peers.send(site, frame, blocks) {
            Ok(()) => true,
            Err((SendError::NotConnected, _, blocks)) => {
                // Asked again on the next connection; and who asked on the last one has asked somebody else.
                release_blocks(&mut self.pool, blocks);
                true
            }
            Err((SendError::Full, frame, blocks)) => {
                self.replication.held.entry((site, is_question)).or_default().push_front((frame, blocks));
                false
            }
        }
    }

    fn send_held(&mut self) -> bool {
        if self.replication.held.is_empty() {
            return false;
        }
        let mut worked = false;
        let connections: Vec<(Site, bool)> = self.replication.held.keys().copied().collect();
        for (site, is_question) in connections {
            while let Some((frame, blocks)) =
                self.replication.held.get_mut(&(site, is_question)).and_then(VecDeque::pop_front)
            {
                if !self.send_frame(site, is_question, frame, blocks) {
                    break;
                }
                worked = true;
            }
        }
        self.replication.held.retain(|_, held| !held.is_empty());
        worked
    }

    /// Lets all heads and connections end.
    pub(super) fn end_replication(&mut self) {
        self.with_replication(|replicating, ground| replicating.end_all(ground));
        if let Some(peers) = &mut self.replication.peers {
            peers.end(&mut self.ring, &mut self.pool, self.now_ns);
        }
    }

    /// Whether the kernel has nothing of connections any more.
    pub(super) fn has_no_peers(&self) -> bool {
        self.replication.peers.as_ref().is_none_or(Peers::is_over)
    }
}
