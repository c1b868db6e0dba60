//! A node that is stopped in good order: its heads go elsewhere first, as far as that can be in time; then its processes end.

use torus_control::meta::Txn;
use torus_control::moves::{LEAVE_LIMIT, leaving};

use super::super::metadata::to_etcd;
use super::super::{World, node_id};
use super::Asked;
use crate::etcd::Request;
use crate::network::Power;

/// How soon it looks again.
const AGAIN_NS: u64 = 200_000_000;

/// How far it is.
#[derive(Debug)]
pub(super) struct Leaving {
    deadline_ns: u64,
    again_ns: u64,
    /// Wishes that are still to be made.
    due: Vec<Txn>,
    is_under_way: bool,
}

impl World {
    /// A node is to stop.
    pub(in super::super) fn leave(&mut self, node: usize) {
        let now_ns = self.now_ns();
        let Some(control) = &mut self.nodes[node].control else { return };
        let deadline_ns = now_ns + LEAVE_LIMIT.as_nanos() as u64;
        control.leaving =
            Some(Leaving { deadline_ns, again_ns: now_ns, due: Vec::new(), is_under_way: false });
        self.note(|| format!("node {node} is to stop"));
        self.control_by(node, now_ns);
    }

    /// It is not, after all.
    pub(in super::super) fn stay(&mut self, node: usize) {
        if let Some(control) = &mut self.nodes[node].control {
            control.leaving = None;
        }
    }

    /// Wishes that heads go elsewhere, and ends when they have or the time is over; when it is to be looked at again.
    pub(super) fn go_on_leaving(&mut self, node: usize) -> u64 {
        let now_ns = self.now_ns();
        let Some(control) = &mut self.nodes[node].control else { return u64::MAX };
        let is_connected = control.is_connected();
        let Some(leaving_now) = &mut control.leaving else { return u64::MAX };
        if now_ns < leaving_now.deadline_ns {
            if leaving_now.is_under_way {
                return leaving_now.deadline_ns;
            }
            if let Some(txn) = leaving_now.due.pop() {
                leaving_now.is_under_way = true;
                let deadline_ns = leaving_now.deadline_ns;
                self.ask_etcd(node, Asked::Leaving, Request::Txn(to_etcd(txn)));
                return deadline_ns;
            }
            if now_ns < leaving_now.again_ns {
                return leaving_now.again_ns;
            }
            let (txns, going) = leaving(&control.view, node_id(node));
            if is_connected && going > 0 {
                leaving_now.due = txns;
                leaving_now.again_ns = now_ns + AGAIN_NS;
                return now_ns + 1;
            }
        }
        self.note(|| format!("node {node} stops"));
        self.lose_lease(node);
        self.end_control(node);
        self.hold(node, Power::NoProcess);
        u64::MAX
    }

    /// What became of a wish.
    pub(super) fn leaving_hears(&mut self, node: usize, is_known: bool) {
        let now_ns = self.now_ns();
        let Some(leaving) = self.nodes[node].control.as_mut().and_then(|control| control.leaving.as_mut())
        else {
            return;
        };
        leaving.is_under_way = false;
        if !is_known {
            // Others will replace the heads.
            leaving.deadline_ns = now_ns;
        }
        self.control_by(node, now_ns);
    }
}
