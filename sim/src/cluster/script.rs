//! Troubles in a fixed order: the interleavings that are known to be dangerous, with the times between their events drawn.
//!
//! A step names nodes by their parts: 0 is the head of volume 0 when the script begins, then come the other owners of its first
//! partition, then everybody else.

use super::trouble::{late, losing};
use super::{Event, Trouble, World, node_of};
use crate::etcd::ClientId;
use crate::network::{Endpoint, Media, Power};

/// When a script begins: heads have come by then.
pub(super) const BEGIN_NS: u64 = 2_000_000_000;

/// A node, by its part.
pub type Part = usize;

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// So many nanoseconds pass.
    Wait(u64),
    /// The parts are given anew.
    Cast,
    /// A data plane ends, or the machine with both processes, until it is started.
    Kill(Part, Power),
    /// It is started.
    Boot(Part),
    /// A data plane ends and is started again, if there is a control process.
    Restart(Part),
    /// A control process ends, until the node is started.
    KillControl(Part),
    /// A control process ends and another one starts at once.
    RestartControl(Part),
    /// A node is stopped in good order, until it is started.
    Leave(Part),
    /// The lease of a node is lost, though its processes are alive.
    LoseLease(Part),
    /// All leases are lost.
    LoseLeases,
    /// Changes that watches have not delivered cannot be had any more.
    Compact,
    /// Changes are carried out that much later, after their asker may have ended.
    Late(u64),
    /// All nodes lose power, and come back.
    PowerCut,
    /// What the one sends does not reach the other.
    Cut(Part, Part),
    /// Neither hears the other.
    Part(Part, Part),
    /// Both hear each other again.
    Join(Part, Part),
    /// What the one sends to the other takes that much longer, for ten seconds.
    SlowLink(Part, Part, u64),
    /// The connection of the one to the other breaks.
    Reset(Part, Part),
    /// A process stands still.
    Pause(Part),
    /// It goes on.
    Resume(Part),
    /// A node is made head of the volume, whatever the rules say.
    TakeOver(Part),
    /// A node is made head of the last volume.
    TakeOther(Part),
    /// It is wished that a node be the head.
    HandOver(Part),
    /// That is wished no longer.
    Stay,
    /// A node is given one more partition.
    Move(Part),
    /// The metadata store is away or back.
    MetadataAway(bool),
    /// One node does not reach it.
    NoMetadata(Part),
    /// Of a hundred of its answers, so many get lost.
    AnswersLost(u64),
    /// A store takes that much longer at most.
    SlowDisk(Part, u64),
    /// A store fails so many of a hundred writes.
    BadDisk(Part, u64),
    /// Initiators end, and others begin.
    Abandon,
    /// Initiators ask for nothing, or go on.
    Rest(bool),
    /// Initiators only read, or write again.
    OnlyRead(bool),
    /// Initiators use the last of their places only, or all of them.
    Narrow(bool),
}

impl Step {
    /// Whether it brings that trouble, as far as that is an excuse for anything.
    pub(super) fn is(&self, trouble: Trouble) -> bool {
        matches!((self, trouble), (Step::BadDisk(..), Trouble::BadDisk))
    }
}

impl World {
    fn give_parts(&mut self) {
        let head = self.head_of(0);
        let owners =
            self.metadata.record(0).partitions[0].owners.iter().map(|owner| node_of(owner.site.node));
        let mut cast: Vec<usize> = Vec::new();
        for node in std::iter::once(head).chain(owners).chain(0..self.plan.nodes) {
            if !cast.contains(&node) {
                cast.push(node);
            }
        }
        self.cast = cast;
    }

    pub(super) fn script_goes_on(&mut self) {
        if self.cast.is_empty() {
            self.give_parts();
        }
        while let Some(step) = self.plan.script.get(self.script_at).copied().filter(|_| !self.is_peace) {
            self.script_at += 1;
            self.note(|| format!("script: {step:?}"));
            if let Step::Wait(wait_ns) = step {
                self.schedule.after(wait_ns, Event::Script);
                return;
            }
            self.do_step(step);
        }
    }

    fn do_step(&mut self, step: Step) {
        let now_ns = self.now_ns();
        let cast = self.cast.clone();
        // In a cluster without such a part somebody has two.
        let node = |part: Part| cast[part % cast.len()];
        let at = |part: Part| [Endpoint(node(part))];
        match step {
            Step::Wait(_) => {}
            Step::Cast => self.give_parts(),
            Step::Kill(part, power) => self.hold(node(part), power),
            Step::Boot(part) => {
                self.stay(node(part));
                self.power_on(node(part));
            }
            Step::Restart(part) => self.kill(node(part), Power::NoProcess),
            Step::KillControl(part) => self.end_control(node(part)),
            Step::RestartControl(part) => {
                self.end_control(node(part));
                self.start_control(node(part));
            }
            Step::Leave(part) => self.leave(node(part)),
            Step::LoseLease(part) => self.lose_lease(node(part)),
            Step::LoseLeases => self.metadata.etcd.revoke_all_leases(now_ns),
            Step::Compact => self.compact(),
            Step::Late(by_ns) => self.metadata.set_quality(&late(by_ns)),
            Step::PowerCut => {
                for node in 0..self.plan.nodes {
                    self.kill(node, Power::Off);
                }
                for node in 0..self.plan.nodes {
                    self.power_on(node);
                }
            }
            Step::Cut(from, to) => self.network.cut(now_ns, &at(from), &at(to), Media::STREAMS),
            Step::Part(one, other) => self.network.partition(now_ns, &at(one), &at(other), Media::STREAMS),
            Step::Join(one, other) => {
                self.network.mend(now_ns, &at(one), &at(other), Media::STREAMS);
                self.network.mend(now_ns, &at(other), &at(one), Media::STREAMS);
            }
            Step::SlowLink(from, to, by_ns) => {
                self.network.slow(now_ns, &at(from), &at(to), by_ns, 10_000_000_000);
            }
            Step::Reset(from, to) => self.reset(node(from), node(to)),
            Step::Pause(part) => self.network.pause(Endpoint(node(part))),
            Step::Resume(part) => self.network.resume(now_ns, Endpoint(node(part))),
            Step::TakeOver(part) => self.force_head(node(part), 0),
            Step::TakeOther(part) => self.force_head(node(part), self.plan.volumes - 1),
            Step::HandOver(part) => self.wish_for_head(0, node(part)),
            Step::Stay => self.wish_for_head(0, self.head_of(0)),
            Step::Move(part) => self.begin_move(0, node(part)),
            Step::MetadataAway(is_away) => {
                self.metadata.etcd.set_available(now_ns, !is_away);
                for node in 0..self.plan.nodes {
                    self.metadata.etcd.set_reachable(now_ns, ClientId(node), true);
                }
            }
            Step::NoMetadata(part) => {
                self.metadata.etcd.set_reachable(now_ns, ClientId(node(part)), false);
            }
            Step::AnswersLost(percent) => self.metadata.set_quality(&losing(percent)),
            Step::SlowDisk(part, by_ns) => self.nodes[node(part)].stored.slow_ns = by_ns,
            Step::BadDisk(part, percent) => {
                self.nodes[node(part)].stored.faults.write = 100_u64.checked_div(percent).unwrap_or(0);
            }
            Step::Abandon => {
                for volume in 0..self.plan.volumes {
                    self.abandon(volume);
                }
            }
            Step::Rest(is_resting) => {
                self.use_clients(|client, now_ns| client.set_resting(now_ns, is_resting));
            }
            Step::Narrow(is_narrow) => {
                self.use_clients(|client, now_ns| client.set_narrow(now_ns, is_narrow));
            }
            Step::OnlyRead(is_reading) => {
                self.use_clients(|client, now_ns| client.set_reading(now_ns, is_reading));
            }
        }
    }
}
