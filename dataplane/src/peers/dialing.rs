//! The connections that this core makes.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use af_xdp::region::Pool;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt::set_tcp_nodelay};
use torus_replication::connection::{Connection, Side, Waiting};
use torus_replication::terms::Site;
use torus_uring::{IoError, Ring, SocketId};

use super::link::{Link, State};
use super::{PeerEvent, Peers, Reason, Relation, nonce};

/// A core that there is an address of, or that is wanted.
#[derive(Debug)]
pub(super) struct Dial {
    address: Option<SocketAddr>,
    pub(super) is_wanted: bool,
    /// The connection, or the attempt at one.
    pub(super) link: Option<usize>,
    again_ns: u64,
    waiting: Waiting,
}

impl Peers {
    /// Says where a core is, or that this is not known any more. A connection that there is stays.
    pub fn set_address(&mut self, site: Site, address: Option<SocketAddr>) {
        let dial = self.dial(site);
        if dial.address != address {
            dial.address = address;
            dial.again_ns = 0;
        }
        self.forget_unused(site);
        self.is_dirty = true;
    }

    /// The cores that connections are wanted with.
    #[must_use]
    pub fn dialed(&self) -> Vec<Site> {
        self.dials.iter().filter(|(_, dial)| dial.is_wanted).map(|(site, _)| *site).collect()
    }

    /// Wants a connection with a core, now and whenever it is lost.
    pub fn connect(&mut self, site: Site) {
        self.dial(site).is_wanted = true;
        self.is_dirty = true;
    }

    /// Wants none any more.
    pub fn disconnect(&mut self, ring: &mut Ring, pool: &mut Pool, site: Site, now_ns: u64) {
        let Some(dial) = self.dials.get_mut(&site) else { return };
        dial.is_wanted = false;
        if let Some(index) = dial.link {
            self.end_link(ring, pool, index, Reason::Unwanted, now_ns);
        }
        self.forget_unused(site);
    }

    /// Begins every attempt whose time has come.
    pub(super) fn dial_all(&mut self, ring: &mut Ring, now_ns: u64) {
        while let Some((site, address)) = self.next_dial(now_ns) {
            if let Err(reason) = self.begin(ring, site, address, now_ns) {
                self.attempt_failed(site, reason, now_ns);
            }
        }
        let waiting = self.dials.values().filter(|dial| dial.is_due(u64::MAX));
        if let Some(again_ns) = waiting.map(|dial| dial.again_ns).min() {
            self.due_ns = self.due_ns.min(again_ns);
        }
    }

    /// The network has connected a socket, or has not.
    pub(super) fn connected(
        &mut self,
        ring: &mut Ring,
        pool: &mut Pool,
        id: SocketId,
        result: Result<(), IoError>,
        now_ns: u64,
    ) {
        let Some(link) = self.link_at(id).filter(|link| link.state == State::Connecting) else { return };
        match result {
            Ok(()) => link.state = State::Up,
            Err(error) => self.end_link(ring, pool, id.index(), Reason::Io(error), now_ns),
        }
        self.is_dirty = true;
    }

    /// A connection that this core made, or an attempt, is no more.
    pub(super) fn dial_ended(&mut self, site: Site, index: usize, reason: Reason, now_ns: u64) {
        let opened_ns = self.links[index].as_ref().and_then(|link| link.opened_ns);
        let Some(dial) = self.dials.get_mut(&site).filter(|dial| dial.link == Some(index)) else { return };
        dial.link = None;
        match opened_ns {
            Some(opened_ns) => {
                dial.again_ns = now_ns + dial.waiting.wait_ns(now_ns.saturating_sub(opened_ns));
                let relation = Relation { site, side: Side::Connecting };
                self.events.push_back(PeerEvent::Disconnected(relation, reason));
            }
            None => self.attempt_failed(site, reason, now_ns),
        }
    }

    fn attempt_failed(&mut self, site: Site, reason: Reason, now_ns: u64) {
        if let Some(dial) = self.dials.get_mut(&site) {
            dial.again_ns = now_ns + dial.waiting.wait_ns(0);
            if dial.is_wanted {
                self.events.push_back(PeerEvent::Unreachable(site, reason));
            }
        }
    }

    fn next_dial(&self, now_ns: u64) -> Option<(Site, SocketAddr)> {
        let due =
            |(site, dial): (&Site, &Dial)| dial.address.filter(|_| dial.is_due(now_ns)).map(|at| (*site, at));
        self.dials.iter().find_map(due)
    }

    fn begin(&mut self, ring: &mut Ring, site: Site, address: SocketAddr, now_ns: u64) -> Result<(), Reason> {
        let failed = |error: io::Error| Reason::Io(IoError::Errno(error.raw_os_error().unwrap_or(0)));
        let file = stream_socket(address).map_err(failed)?;
        let nonce = nonce().map_err(failed)?;
        self.attempts += 1;
        let (attempt, waiting_bytes_max) = (self.attempts, self.limits.waiting_bytes_max);
        let connection = Connection::connect(&self.identity, site, attempt, nonce, waiting_bytes_max, now_ns);
        let link = |socket| Link::new(socket, connection, Some(site), State::Connecting);
        let index = self.add_link(ring, file, link).map_err(|_| Reason::NoPlace)?;
        if let Some(dial) = self.dials.get_mut(&site) {
            dial.link = Some(index);
        }
        if let Some(link) = &self.links[index] {
            ring.connect(link.socket, address);
        }
        Ok(())
    }

    fn dial(&mut self, site: Site) -> &mut Dial {
        // Two nodes that lose each other do not keep step.
        let seed = self
            .identity
            .start
            .0
            .iter()
            .chain(&site.node.0)
            .fold(u64::from(site.core), |seed, byte| seed.rotate_left(8) ^ u64::from(*byte));
        self.dials.entry(site).or_insert_with(|| Dial {
            address: None,
            is_wanted: false,
            link: None,
            again_ns: 0,
            waiting: Waiting::new(seed),
        })
    }

    fn forget_unused(&mut self, site: Site) {
        if self
            .dials
            .get(&site)
            .is_some_and(|dial| dial.address.is_none() && !dial.is_wanted && dial.link.is_none())
        {
            self.dials.remove(&site);
        }
    }
}

impl Dial {
    /// Whether an attempt is to be made at that time.
    fn is_due(&self, at_ns: u64) -> bool {
        self.is_wanted && self.link.is_none() && self.address.is_some() && self.again_ns <= at_ns
    }
}

/// A socket that waits for nothing before it sends: what is sent together is put together before.
fn stream_socket(to: SocketAddr) -> io::Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let file = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_tcp_nodelay(&file, true)?;
    Ok(file)
}
