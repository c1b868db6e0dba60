//! What is published, and what is changed: the real decisions, carried out one request after another.

use std::rc::Rc;

use cluster_map::{Desired, NodeId};
use torus_control::decisions::{self, Outcome, Seen, Work};
use torus_control::meta::{Compare, Revision, Txn};
use torus_control::model::{PREFIX, keys};
use torus_control::reconcile::{self, Settings};
use torus_control::takeover::Statuses;
use torus_replication::mutants::{self, Mutant};

use super::super::manager::pid_of;
use super::super::metadata::{of_etcd, to_etcd};
use super::super::{World, node_id};
use super::Asked;
use crate::etcd::{self, Reply, Request};

/// How often it looks though nothing happens.
const LOOK_NS: u64 = 1_000_000_000;
/// Time before something that failed is tried again.
const RETRY_NS: u64 = 500_000_000;
/// How long a process waits for the metadata before it goes on with the state in the map.
const FALLBACK_NS: u64 = 3_000_000_000;
/// A data plane that has not looked at the map for this long is not heard.
const SILENT_NS: u64 = 5_000_000_000;

/// What is being carried out.
#[derive(Debug)]
pub(super) struct UnderWay {
    work: Work,
    /// Statuses that are still to be read first, and those that were.
    unread: Vec<NodeId>,
    statuses: Statuses,
}

fn settings() -> Settings {
    Settings { cores: vec![0], interfaces: vec!["eth0".into(), "eth1".into()], ..Settings::default() }
}

impl World {
    /// Publishes, reports and decides, if it is time to; when it is again.
    pub(super) fn follow(&mut self, node: usize) -> u64 {
        let now_ns = self.now_ns();
        let boot_ns = self.boot_ns(node);
        let Some(control) = &mut self.nodes[node].control else { return u64::MAX };
        if now_ns < control.look_ns {
            return control.look_ns;
        }
        control.look_ns = now_ns + LOOK_NS;
        self.number_start(node);
        self.publish(node);
        let at = &mut self.nodes[node];
        let is_up = at.is_up();
        let Some(control) = &mut at.control else { return u64::MAX };
        let observed = Some(&at.map.observed).filter(|observed| is_up && observed.pid == pid_of(at.life));
        let published = Some(&*at.map.desired).filter(|desired| desired.version > 0);
        let words = if is_up { "running" } else { "restarting" };
        let observation = Some(&*at.map.observed).filter(|observed| observed.version > 0);
        control.session.report(decisions::status(published, observation, observed.is_some(), words));
        let seen = Seen {
            view: &control.view,
            revision: control.revision,
            is_followed: control.is_connected(),
            published,
            observed: observed.map(|observed| &**observed),
            is_silent: now_ns.saturating_sub(at.map.beat_ns) > SILENT_NS,
        };
        let now = control.elapsed(boot_ns);
        control.decisions.look(&seen, now, now_ns / 1_000_000_000);
        self.work_goes_on(node);
        let Some(control) = &mut self.nodes[node].control else { return u64::MAX };
        if control.decisions.is_to_be_tried_again() {
            control.look_ns = control.look_ns.min(now_ns + RETRY_NS);
        }
        if let Some(at) = control.decisions.take_over_at().filter(|_| control.under_way.is_none()) {
            let wait_ns = at.saturating_sub(now).as_nanos() as u64;
            // By a clock that may go slower than the time.
            control.look_ns = control.look_ns.min(now_ns + wait_ns + wait_ns / 10_000 + 1);
        }
        let session_ns = self.keep_session(node);
        let start_ns = self.supervise(node);
        let Some(control) = &self.nodes[node].control else { return u64::MAX };
        control.look_ns.min(session_ns).min(start_ns)
    }

    fn put(&mut self, node: usize, desired: Desired) {
        let at = &mut self.nodes[node];
        let version = at.map.desired.version + 1;
        at.map.desired = Rc::new(Desired { version, ..desired });
        self.map_changes(node);
    }

    /// Puts the number into the map that the next start waits for: with metadata or without.
    fn number_start(&mut self, node: usize) {
        let at = &self.nodes[node];
        let Some(control) = &at.control else { return };
        let (before, wanted) = (&at.map.desired, control.supervisor.wanted());
        if before.version > 0 && before.start < wanted {
            let desired = Desired { start: wanted, ..Desired::clone(before) };
            self.put(node, desired);
        }
    }

    /// Puts the desired state into the map if it differs from what is there, and has the data plane started.
    fn publish(&mut self, node: usize) {
        let boot_ns = self.boot_ns(node);
        let at = &mut self.nodes[node];
        let is_up = at.is_up();
        let Some(control) = &mut at.control else { return };
        let before = &at.map.desired;
        if !control.has_listed() {
            // What was published last in this boot is kept, and served again.
            let is_late = control.elapsed(boot_ns).as_nanos() >= u128::from(FALLBACK_NS);
            if is_late && !control.supervisor.is_wished && (is_up || before.version > 0) {
                control.supervisor.is_wished = true;
            }
            return;
        }
        let published = Some(&**before).filter(|before| before.version > 0);
        if !control.decisions.may_publish(&control.view, published) {
            return;
        }
        let Some(mut desired) = reconcile::desired(&control.view, node_id(node), &settings()) else { return };
        desired.version = before.version;
        desired.start = before.start.max(control.supervisor.wanted());
        control.supervisor.is_wished = true;
        if before.version == 0 || **before != desired {
            self.put(node, desired);
        }
    }

    /// Begins what is to be carried out next.
    fn work_goes_on(&mut self, node: usize) {
        let boot_ns = self.boot_ns(node);
        while let Some(control) = &mut self.nodes[node].control
            && let Some(work) = control.decisions.begin()
        {
            match &work {
                Work::Move(txn) | Work::Renew(txn) | Work::Change(txn) => {
                    let txn = txn.clone();
                    control.under_way =
                        Some(UnderWay { work, unread: Vec::new(), statuses: Statuses::new() });
                    return self.ask_for_change(node, txn);
                }
                Work::TakeOver(batch) => {
                    let unread: Vec<NodeId> = batch.vetoers().into_iter().collect();
                    control.under_way = Some(UnderWay { work, unread, statuses: Statuses::new() });
                    if self.read_next(node) {
                        return;
                    }
                    let Some(control) = &mut self.nodes[node].control else { return };
                    let Some(UnderWay { work, .. }) = control.under_way.take() else { return };
                    let now = control.elapsed(boot_ns);
                    control.decisions.ended(&work, Outcome::Conflict, now);
                }
            }
        }
    }

    fn ask_for_change(&mut self, node: usize, mut txn: Txn) {
        if mutants::is(Mutant::ChangeWithoutCompare) {
            let heads = format!("{PREFIX}heads/");
            txn.compares.retain(|compare| !compare.key().starts_with(&heads));
        }
        self.note(|| {
            let ops: Vec<&str> = txn.ops.iter().map(torus_control::meta::Op::key).collect();
            let compares: Vec<&Compare> = txn.compares.iter().collect();
            format!("node {node} asks for a change of {ops:?} if {compares:?}")
        });
        self.ask_etcd(node, Asked::Change, Request::Txn(to_etcd(txn)));
    }

    /// Reads the next status that a take-over depends on, or asks for it; whether there was anything to ask for.
    fn read_next(&mut self, node: usize) -> bool {
        let Some(control) = &mut self.nodes[node].control else { return false };
        let Some(UnderWay { work: Work::TakeOver(batch), unread, statuses }) = &mut control.under_way else {
            return false;
        };
        if let Some(next) = unread.last() {
            let key = keys::status(*next);
            self.ask_etcd(node, Asked::Change, Request::Get { key });
            return true;
        }
        let Some(txn) = batch.transaction(statuses) else { return false };
        self.ask_for_change(node, txn);
        true
    }

    /// The answer to a change, or to what it depends on.
    pub(super) fn change_hears(&mut self, node: usize, result: Result<Reply, etcd::Error>) {
        let boot_ns = self.boot_ns(node);
        let Some(control) = &mut self.nodes[node].control else { return };
        let Some(under_way) = &mut control.under_way else { return };
        let outcome = match result {
            Ok(Reply::Value(found)) => {
                if let Some(other) = under_way.unread.pop() {
                    under_way.statuses.insert(other, found.map(of_etcd));
                }
                if self.read_next(node) {
                    return;
                }
                Outcome::Conflict
            }
            Ok(Reply::Txn(etcd::TxnOutcome::Committed(revision))) => Outcome::Committed(Revision(revision.0)),
            Ok(_) => Outcome::Conflict,
            Err(_) => Outcome::Failed,
        };
        self.note(|| format!("node {node}: its change: {outcome:?}"));
        let Some(control) = &mut self.nodes[node].control else { return };
        let Some(UnderWay { work, .. }) = control.under_way.take() else { return };
        let now = control.elapsed(boot_ns);
        control.decisions.ended(&work, outcome, now);
        self.work_goes_on(node);
    }
}
