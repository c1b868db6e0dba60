//! The connections that other cores make.

use std::os::fd::OwnedFd;

use af_xdp::region::Pool;
use rustix::net::sockopt::set_tcp_nodelay;
use torus_replication::connection::handshake::{HandshakeError, Peer};
use torus_replication::connection::{Connection, Side};
use torus_replication::terms::Site;
use torus_uring::Ring;

use super::link::{Link, State};
use super::{PeerEvent, Peers, Reason, Relation, nonce};

/// A core that has proved who it is.
#[derive(Debug)]
pub(super) struct Accepted {
    /// Its connection.
    pub(super) link: Option<usize>,
    /// Who came last.
    last: Peer,
}

impl Peers {
    /// Cores that have connected and are not served yet.
    pub fn unserved(&self) -> impl Iterator<Item = Site> {
        let waits = |accepted: &Accepted| accepted.link.is_some_and(|index| self.waits_for_admission(index));
        self.accepted.iter().filter(move |(_, accepted)| waits(accepted)).map(|(site, _)| *site)
    }

    /// Serves a core that has connected: everything that it has asked for on former connections has ended. Its frames may come.
    pub fn serve(&mut self, site: Site, now_ns: u64) {
        let Some(index) = self.accepted.get(&site).and_then(|accepted| accepted.link) else { return };
        if let Some(link) = &mut self.links[index]
            && link.connection.admit(now_ns).is_some()
        {
            link.opened_ns = Some(now_ns);
            self.is_dirty = true;
        }
    }

    /// Takes a new connection in, of whomever.
    pub(super) fn accept(&mut self, ring: &mut Ring, pool: &mut Pool, file: OwnedFd, now_ns: u64) {
        if self.listener.is_none() || self.strangers >= self.limits.strangers_max {
            return;
        }
        let Ok(nonce) = nonce() else { return };
        if set_tcp_nodelay(&file, true).is_err() {
            return;
        }
        let connection = Connection::accept(nonce, self.limits.waiting_bytes_max, now_ns);
        let link = |socket| Link::new(socket, connection, None, State::Up);
        // Without a place it is closed.
        if let Ok(index) = self.add_link(ring, file, link) {
            self.strangers += 1;
            self.look_at(ring, pool, index, now_ns);
        }
    }

    /// Accepts again after a failure, when it is time.
    pub(super) fn accept_again(&mut self, ring: &mut Ring, now_ns: u64) {
        let Some(listener) = &mut self.listener else { return };
        match listener.again_ns {
            Some(again_ns) if again_ns <= now_ns => {
                listener.again_ns = None;
                ring.accept(listener.socket);
            }
            Some(again_ns) => self.due_ns = self.due_ns.min(again_ns),
            None => {}
        }
    }

    /// Somebody has proved who it is.
    pub(super) fn proved(&mut self, ring: &mut Ring, pool: &mut Pool, index: usize, peer: Peer, now_ns: u64) {
        let known = self.accepted.get(&peer.site);
        let is_older =
            known.is_some_and(|known| known.last.start == peer.start && known.last.attempt >= peer.attempt);
        if is_older {
            if let Some(link) = &mut self.links[index] {
                link.connection.refuse(&self.identity, HandshakeError::Older);
            }
            return self.fail(ring, pool, index, HandshakeError::Older.into(), now_ns);
        }
        let former = known.and_then(|known| known.link);
        if let Some(link) = &mut self.links[index] {
            link.site = Some(peer.site);
            self.strangers -= 1;
        }
        if let Some(former) = former {
            self.end_link(ring, pool, former, Reason::Replaced, now_ns);
        }
        self.accepted.insert(peer.site, Accepted { link: Some(index), last: peer });
        self.events.push_back(PeerEvent::Accepted(peer.site, peer));
    }

    /// A connection that another core made is no more.
    pub(super) fn accepted_ended(&mut self, site: Site, index: usize, reason: Reason) {
        let Some(accepted) = self.accepted.get_mut(&site).filter(|accepted| accepted.link == Some(index))
        else {
            return;
        };
        accepted.link = None;
        let relation = Relation { site, side: Side::Accepting };
        self.events.push_back(PeerEvent::Disconnected(relation, reason));
    }

    fn waits_for_admission(&self, index: usize) -> bool {
        self.links[index].as_ref().is_some_and(|link| link.opened_ns.is_none())
    }
}
