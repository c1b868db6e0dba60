//! The lease of a node, with its sign of life and its status.

use torus_control::meta::{LeaseId, Txn};
use torus_control::model::{LiveRecord, StatusRecord, encode, keys};

use super::super::metadata::to_etcd;
use super::super::{World, node_id};
use super::Asked;
use crate::etcd::{self, Reply, Request};

/// Lifetime of the lease.
const TTL_NS: u64 = 9_000_000_000;
/// How often it is renewed.
const RENEWAL_NS: u64 = 3_000_000_000;
/// Shortest time between two writes of the status.
const STATUS_NS: u64 = 300_000_000;
/// Time before something that failed is tried again.
const RETRY_NS: u64 = 500_000_000;

/// What is asked of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Waits {
    Grant,
    Renewal,
    Write(Box<StatusRecord>),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Session {
    lease: Option<etcd::LeaseId>,
    waits: Option<Waits>,
    rests_until_ns: u64,
    renew_ns: u64,
    write_ns: u64,
    /// The sign of life, and some status, stand under the present lease.
    is_live: bool,
    /// The status as it should be, and as it was last written.
    status: StatusRecord,
    written: Option<StatusRecord>,
}

impl Session {
    /// Takes what the status should be.
    pub(super) fn report(&mut self, status: StatusRecord) {
        self.status = status;
    }

    fn is_write_due(&self) -> bool {
        !self.is_live || self.written.as_ref() != Some(&self.status)
    }
}

impl World {
    /// Asks for what the session needs next; when it is to be looked at again.
    pub(super) fn keep_session(&mut self, node: usize) -> u64 {
        let now_ns = self.now_ns();
        let Some(control) = &mut self.nodes[node].control else { return u64::MAX };
        let is_joined = control.is_connected();
        let session = &mut control.session;
        if session.waits.is_some() {
            return u64::MAX;
        }
        if now_ns < session.rests_until_ns {
            return session.rests_until_ns;
        }
        let (waits, request) = match session.lease {
            None if !is_joined => return u64::MAX,
            None => (Waits::Grant, Request::Grant { ttl_ns: TTL_NS }),
            Some(lease) if now_ns >= session.renew_ns => {
                session.renew_ns = now_ns + RENEWAL_NS;
                (Waits::Renewal, Request::KeepAlive { lease })
            }
            Some(lease) if session.is_write_due() && now_ns >= session.write_ns => {
                session.write_ns = now_ns + STATUS_NS;
                let (id, lease) = (node_id(node), LeaseId(lease.0));
                let mut txn = Txn::new().put_leased(keys::status(id), encode(&session.status), lease);
                if !session.is_live {
                    let live = LiveRecord { pid: 1, version: String::new(), boot: String::new() };
                    txn = txn.put_leased(keys::live(id), encode(&live), lease);
                }
                (Waits::Write(Box::new(session.status.clone())), Request::Txn(to_etcd(txn)))
            }
            Some(_) if session.is_write_due() => return session.renew_ns.min(session.write_ns),
            Some(_) => return session.renew_ns,
        };
        session.waits = Some(waits);
        self.ask_etcd(node, Asked::Session, request);
        u64::MAX
    }

    /// The answer to what the session asked for.
    pub(super) fn session_hears(&mut self, node: usize, result: Result<Reply, etcd::Error>) {
        let now_ns = self.now_ns();
        let Some(control) = &mut self.nodes[node].control else { return };
        let session = &mut control.session;
        match (session.waits.take(), result) {
            (Some(Waits::Grant), Ok(Reply::Granted { lease, .. })) => {
                session.lease = Some(lease);
                session.is_live = false;
                session.renew_ns = now_ns;
                session.write_ns = now_ns;
            }
            (Some(Waits::Write(status)), Ok(_)) => {
                session.is_live = true;
                session.written = Some(*status);
            }
            (_, Ok(_)) => {}
            (Some(Waits::Renewal | Waits::Write(_)), Err(etcd::Error::LeaseGone(_))) => {
                session.lease = None;
                self.note(|| format!("node {node}: its lease is gone"));
            }
            (waits, Err(_)) => {
                if matches!(waits, Some(Waits::Write(_))) {
                    session.is_live = false;
                }
                session.rests_until_ns = now_ns + RETRY_NS;
            }
        }
    }

    /// Takes the lease of a node from it, though its process renews it.
    pub(in super::super) fn lose_lease(&mut self, node: usize) {
        let now_ns = self.now_ns();
        let lease = self.nodes[node].control.as_ref().and_then(|control| control.session.lease);
        if let Some(lease) = lease {
            self.metadata.etcd.revoke_lease(now_ns, lease);
        }
    }
}
