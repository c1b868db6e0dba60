//! One core's connections with cores of other nodes, over TCP on the core's ring: the driver around
//! [`torus_replication::connection`], which says what is spoken.
//!
//! A core listens on a port of its own and connects, on demand, to those cores of other nodes that have replicas of its heads'
//! volumes. A connection serves one direction of that relation: on the ones that this core has made its heads ask, on those that it has
//! accepted its replicas answer. So with another core there may be two.
//!
//! The caller drives it: events of the ring's sockets go in by [`Peers::socket_event`], frames to be sent by [`Peers::send`]; once in a
//! turn [`Peers::turn`] looks at the time and begins to send everything that came since, which leaves with the ring's next submission; and
//! [`Peers::next_event`] tells what has come.
//!
//! What holds:
//! * There is at most one connection for each relation. A new one that proves to be of the same core ends the old one; no frame of it
//!   comes before the caller [serves](Peers::serve) it, which is when everything of the old one has ended.
//! * Memory is bounded: places for sockets, chunks that each may receive into, bytes that wait to be sent on each.
//! * Blocks come into chunks of the core's pool, copied once. Who finds none stops receiving, and its peer stops sending; that two cores
//!   do not wait for each other's memory without end is a matter of what each leaves free: see [`PeersLimits`].
//! * Who was not listening itself calls nobody silent: not when it has no memory for what comes, and not after a sleep.
//! * A peer that is wanted is tried again until it is there, at intervals up to a second.
//!
//! A frame of up to three blocks in steady state allocates nothing. A longer one allocates its lists of checksums and of chunks;
//! bodies that are lists (of extents, digests, volumes) allocate them.

mod accepting;
mod dialing;
mod link;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use af_xdp::region::{Chunk, Pool, Region};
use torus_replication::connection::handshake::{Identity, Nonce, Peer};
use torus_replication::connection::{BEAT_NS, ConnectionError, Received, Side};
use torus_replication::terms::Site;
use torus_replication::wire::Frame;
use torus_uring::{Blocks, IoError, Message, NoPlace, Ring, SocketEvent, SocketId, SocketsConfig};

use accepting::Accepted;
use dialing::Dial;
use link::{Link, Memory, State};

/// How long after a failed accept it is tried again: the process was out of descriptors.
const ACCEPT_AGAIN_NS: u64 = 100_000_000;
/// How long the other side of a refused connection has to read why.
const REFUSING_NS: u64 = 200_000_000;
/// A turn that comes later than this after the last one comes late: with a connection there is a beat to be sent before.
const LATE_NS: u64 = 2 * BEAT_NS;
/// How soon memory is looked for again while there is none for what has come.
const STARVED_NS: u64 = 1_000_000;

/// What connections may take.
///
/// Two cores that both have no memory left for what comes wait for each other without end. So of a core's free chunks everything
/// leaves some for what must go on before it: what a core begins for initiators leaves more than requests of peers do, those more than
/// what is read for an answer, and that more than answers of peers do, which free memory when they have come. The first and the third
/// are the caller's to keep.
#[derive(Debug, Clone, Copy)]
pub struct PeersLimits {
    /// Connections at most, the refused and the unproved included.
    pub connections_max: u16,
    /// Of those, such as have not proved yet who they are.
    pub strangers_max: u16,
    /// Chunks that each may receive into; a power of two.
    pub chunks_each: u16,
    /// Bytes of frames that may wait to be sent on each; as many may be on their way to the kernel besides.
    pub waiting_bytes_max: usize,
    /// Chunks that are left free when requests take some for their blocks.
    pub requests_leave_chunks: usize,
    /// And when answers do.
    pub answers_leave_chunks: usize,
}

/// One direction of what two cores have with each other, as seen from this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Relation {
    /// The other core.
    pub site: Site,
    /// Which end this core is: the connecting one asks, the accepting one answers.
    pub side: Side,
}

/// Why there is no connection, or none any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// What was said on it.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The network, or the other side's system.
    #[error("{0}")]
    Io(IoError),
    /// The other side closed it.
    #[error("the other side has closed the connection")]
    Closed,
    /// The other side made a new one.
    #[error("the other side has connected anew")]
    Replaced,
    /// The caller did.
    #[error("the connection is not wanted any more")]
    Unwanted,
    /// All places are taken.
    #[error("there are as many connections as this core may have")]
    NoPlace,
}

/// What has come.
#[derive(Debug)]
pub enum PeerEvent {
    /// A core that is wanted can be asked.
    Connected(Site, Peer),
    /// A core has connected to ask. It is to be [served](Peers::serve) when everything of its former connection has ended.
    Accepted(Site, Peer),
    /// What was sent and not answered will not be.
    Disconnected(Relation, Reason),
    /// An attempt to connect has failed; another one follows.
    Unreachable(Site, Reason),
    /// A frame and its blocks.
    Frame(Site, Frame, Blocks),
}

/// Why a frame was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// There is no connection for it.
    #[error("not connected")]
    NotConnected,
    /// Too much waits to be sent: to be tried again when some of it has left.
    #[error("too much waits to be sent")]
    Full,
}

/// The listening socket.
#[derive(Debug)]
struct Listener {
    socket: SocketId,
    address: SocketAddr,
    /// When to accept again, after a failure.
    again_ns: Option<u64>,
}

/// The connections of one core; see the module's head.
pub struct Peers {
    identity: Identity,
    limits: PeersLimits,
    region: Arc<Region>,
    listener: Option<Listener>,
    /// By the index of their sockets.
    links: Vec<Option<Link>>,
    dials: BTreeMap<Site, Dial>,
    accepted: BTreeMap<Site, Accepted>,
    strangers: u16,
    attempts: u64,
    events: VecDeque<PeerEvent>,
    messages: Vec<Message>,
    /// Chunks that were sent and are other cores'.
    foreign: Vec<Chunk>,
    /// Something was given that [`Peers::turn`] has to look at.
    is_dirty: bool,
    due_ns: u64,
    /// When the last turn was.
    turned_ns: u64,
}

impl Peers {
    /// Listens at `listen`, and makes room on the ring.
    ///
    /// # Errors
    /// As the system gave it: the address is in use, or not this machine's.
    pub fn new(
        identity: Identity,
        limits: PeersLimits,
        listen: SocketAddr,
        ring: &mut Ring,
        pool: &Pool,
    ) -> io::Result<Peers> {
        let listener = TcpListener::bind(listen)?;
        let address = listener.local_addr()?;
        let sockets_max = limits.connections_max + 1;
        ring.prepare_sockets(SocketsConfig { sockets_max, chunks_each: limits.chunks_each });
        let socket = ring.add_socket(OwnedFd::from(listener)).map_err(io::Error::other)?;
        ring.accept(socket);
        Ok(Peers {
            identity,
            limits,
            region: Arc::clone(pool.region()),
            listener: Some(Listener { socket, address, again_ns: None }),
            links: (0..sockets_max).map(|_| None).collect(),
            dials: BTreeMap::new(),
            accepted: BTreeMap::new(),
            strangers: 0,
            attempts: 0,
            events: VecDeque::new(),
            messages: Vec::new(),
            foreign: Vec::new(),
            is_dirty: false,
            due_ns: 0,
            turned_ns: 0,
        })
    }

    /// Where it listens; nothing once it has [ended](Peers::end).
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.listener.as_ref().map(|listener| listener.address)
    }

    /// Takes a frame to be sent, with as many blocks as it has checksums: a request or grant request on the connection that this
    /// core has made, an answer or grant answer on the one that it has accepted.
    ///
    /// # Errors
    /// [`SendError`], with both.
    #[expect(
        clippy::result_large_err,
        reason = "what is refused goes back as it came, without an allocation"
    )]
    pub fn send(
        &mut self,
        site: Site,
        frame: Frame,
        blocks: Blocks,
    ) -> Result<(), (SendError, Frame, Blocks)> {
        debug_assert_eq!(blocks.len(), frame.block_crcs().len(), "every block has its checksum");
        let side = if Side::Connecting.sends(&frame) { Side::Connecting } else { Side::Accepting };
        let Some(link) =
            self.link_of(Relation { site, side }).filter(|link| link.connection.peer().is_some())
        else {
            return Err((SendError::NotConnected, frame, blocks));
        };
        link.connection.send(frame, blocks).map_err(|(frame, blocks)| (SendError::Full, frame, blocks))?;
        self.is_dirty = true;
        Ok(())
    }

    /// Whether frames may be sent.
    #[must_use]
    pub fn is_connected(&self, relation: Relation) -> bool {
        let link = self.index_of(relation).and_then(|index| self.links[index].as_ref());
        link.is_some_and(|link| link.connection.peer().is_some())
    }

    /// Ends the present connection of a relation, if there is one. One that this core wants is made again.
    pub fn cut(&mut self, ring: &mut Ring, pool: &mut Pool, relation: Relation, now_ns: u64) {
        if let Some(index) = self.index_of(relation) {
            self.end_link(ring, pool, index, Reason::Unwanted, now_ns);
        }
    }

    /// Takes an event of the ring's sockets.
    pub fn socket_event(&mut self, ring: &mut Ring, pool: &mut Pool, event: SocketEvent, now_ns: u64) {
        match event {
            SocketEvent::Accepted(_, file) => self.accept(ring, pool, file, now_ns),
            SocketEvent::NotAccepting(_, _) => {
                if let Some(listener) = &mut self.listener {
                    listener.again_ns = Some(now_ns + ACCEPT_AGAIN_NS);
                }
                self.is_dirty = true;
            }
            SocketEvent::Connected(id, result) => self.connected(ring, pool, id, result, now_ns),
            SocketEvent::Received(id, chunk, len) => match self.link_at(id) {
                Some(link) if !link.is_over() => {
                    link.push(chunk, len);
                    self.pump(ring, pool, id.index(), now_ns);
                    // Handshakes answer, and what has come may have to be held.
                    self.is_dirty = true;
                }
                _ => pool.release(chunk),
            },
            SocketEvent::Ended(id, result) => self.ended(ring, pool, id, result, now_ns),
            SocketEvent::Sent(id, message, result) => self.sent(ring, pool, id, message, result, now_ns),
            SocketEvent::Closed(id) => {
                if let Some(link) = self.link_at(id) {
                    let message = link.message.take();
                    self.messages.extend(message);
                    self.links[id.index()] = None;
                }
            }
        }
    }

    /// Looks at the time, and begins to send what has been given since: with the ring's next submission.
    pub fn turn(&mut self, ring: &mut Ring, pool: &mut Pool, now_ns: u64) {
        let since_ns = now_ns.saturating_sub(std::mem::replace(&mut self.turned_ns, now_ns));
        if !self.is_dirty && now_ns < self.due_ns {
            return;
        }
        if since_ns > LATE_NS {
            self.links.iter_mut().flatten().for_each(|link| link.connection.hold(now_ns));
        }
        self.is_dirty = false;
        self.due_ns = u64::MAX;
        self.accept_again(ring, now_ns);
        self.dial_all(ring, now_ns);
        for index in 0..self.links.len() {
            self.look_at(ring, pool, index, now_ns);
        }
    }

    /// When [`Peers::turn`] has something to do though nothing comes.
    #[must_use]
    pub fn deadline_ns(&self) -> u64 {
        if self.is_dirty { 0 } else { self.due_ns }
    }

    /// What has come. Blocks are the caller's.
    pub fn next_event(&mut self) -> Option<PeerEvent> {
        self.events.pop_front()
    }

    /// Chunks of other cores that were sent, or were not and will not be: to go home.
    pub fn take_foreign(&mut self) -> impl Iterator<Item = Chunk> {
        self.foreign.drain(..)
    }

    /// Ends everything. The ring's events are to be given on until [`Peers::is_over`].
    pub fn end(&mut self, ring: &mut Ring, pool: &mut Pool, now_ns: u64) {
        self.dials.values_mut().for_each(|dial| dial.is_wanted = false);
        if let Some(listener) = self.listener.take() {
            ring.close(listener.socket);
        }
        for index in 0..self.links.len() {
            if self.links[index].as_ref().is_some_and(|link| matches!(link.state, State::Refusing { .. })) {
                self.close(ring, pool, index);
            }
            self.end_link(ring, pool, index, Reason::Unwanted, now_ns);
        }
    }

    /// Whether it has ended, and the kernel has nothing of it any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.listener.is_none() && self.links.iter().all(Option::is_none)
    }

    fn index_of(&self, relation: Relation) -> Option<usize> {
        match relation.side {
            Side::Connecting => self.dials.get(&relation.site)?.link,
            Side::Accepting => self.accepted.get(&relation.site)?.link,
        }
    }

    fn link_of(&mut self, relation: Relation) -> Option<&mut Link> {
        let index = self.index_of(relation)?;
        self.links[index].as_mut()
    }

    /// The link of a socket that is not gone.
    fn link_at(&mut self, id: SocketId) -> Option<&mut Link> {
        self.links.get_mut(id.index())?.as_mut().filter(|link| link.socket == id)
    }

    /// Takes a socket in, with its connection.
    fn add_link(
        &mut self,
        ring: &mut Ring,
        file: OwnedFd,
        link: impl FnOnce(SocketId) -> Link,
    ) -> Result<usize, NoPlace> {
        let socket = ring.add_socket(file)?;
        let mut link = link(socket);
        link.message = Some(self.messages.pop().unwrap_or_default());
        self.links[socket.index()] = Some(link);
        self.is_dirty = true;
        Ok(socket.index())
    }

    /// Has a link's bytes understood, as far as they go.
    fn pump(&mut self, ring: &mut Ring, pool: &mut Pool, index: usize, now_ns: u64) {
        while let Some(link) = self.links[index].as_mut().filter(|link| !link.is_over()) {
            let leave = match link.connection.side() {
                Side::Connecting => self.limits.answers_leave_chunks,
                Side::Accepting => self.limits.requests_leave_chunks,
            };
            let mut memory = Memory { pool, leave };
            match link.receive(&self.identity, &self.region, ring, &mut memory, now_ns) {
                Ok(None) => break,
                Ok(Some(Received::Frame(frame, blocks))) => {
                    if let Some(peer) = link.connection.peer() {
                        self.events.push_back(PeerEvent::Frame(peer.site, frame, blocks));
                    }
                }
                Ok(Some(Received::Open(peer))) => {
                    link.opened_ns = Some(now_ns);
                    self.events.push_back(PeerEvent::Connected(peer.site, peer));
                }
                Ok(Some(Received::Proved(peer))) => self.proved(ring, pool, index, peer, now_ns),
                Err(error) => self.fail(ring, pool, index, error, now_ns),
            }
        }
    }

    /// Does for one link what time and memory allow.
    fn look_at(&mut self, ring: &mut Ring, pool: &mut Pool, index: usize, now_ns: u64) {
        let Some(link) = &mut self.links[index] else { return };
        match link.state {
            State::Over => return,
            State::Connecting => {}
            State::Refusing { until_ns } => {
                link.flush(ring, now_ns);
                if now_ns >= until_ns {
                    self.close(ring, pool, index);
                } else {
                    self.due_ns = self.due_ns.min(until_ns);
                }
                return;
            }
            State::Up => {
                if link.is_short {
                    match ring.receive(link.socket, pool) {
                        Ok(missing) => link.is_short = missing > 0,
                        Err(error) => {
                            let error = IoError::Errno(error.raw_os_error().unwrap_or(0));
                            return self.end_link(ring, pool, index, Reason::Io(error), now_ns);
                        }
                    }
                }
                // Bytes that are given again keep the connection alive.
                if link.has_unread() {
                    self.pump(ring, pool, index, now_ns);
                }
            }
        }
        let Some(link) = self.links[index].as_mut().filter(|link| !link.is_over()) else { return };
        if let Err(error) = link.connection.tick(now_ns) {
            return self.fail(ring, pool, index, error, now_ns);
        }
        link.flush(ring, now_ns);
        if link.is_short || link.connection.is_starved() {
            self.due_ns = self.due_ns.min(now_ns + STARVED_NS);
        }
        // A message on its way comes back, and then the rest is sent; until then there is no beat to be sent.
        let deadline_ns = link.connection.deadline_ns();
        let is_sending = link.message.is_none() && deadline_ns <= now_ns;
        self.due_ns = self.due_ns.min(if is_sending { now_ns + STARVED_NS } else { deadline_ns });
    }

    fn ended(
        &mut self,
        ring: &mut Ring,
        pool: &mut Pool,
        id: SocketId,
        result: Result<(), IoError>,
        now_ns: u64,
    ) {
        let Some(link) = self.link_at(id) else { return };
        match link.state {
            State::Refusing { .. } => self.close(ring, pool, id.index()),
            State::Over => {}
            State::Connecting | State::Up => {
                let reason = result.map_or_else(Reason::Io, |()| Reason::Closed);
                self.end_link(ring, pool, id.index(), reason, now_ns);
            }
        }
    }

    fn sent(
        &mut self,
        ring: &mut Ring,
        pool: &mut Pool,
        id: SocketId,
        mut message: Message,
        result: Result<(), IoError>,
        now_ns: u64,
    ) {
        for chunk in message.take_chunks() {
            release(pool, &mut self.foreign, chunk);
        }
        let Some(link) = self.link_at(id) else {
            self.messages.push(message);
            return;
        };
        link.message = Some(message);
        match (link.state, result) {
            (State::Over, _) => {}
            (State::Refusing { .. }, Ok(())) if link.connection.has_to_send(now_ns) => {
                link.flush(ring, now_ns);
            }
            (State::Refusing { .. }, _) => ring.finish_sending(id),
            (_, Ok(())) => self.is_dirty = true,
            (_, Err(error)) => self.end_link(ring, pool, id.index(), Reason::Io(error), now_ns),
        }
    }

    /// Ends a connection that has failed; one that is refused hears why.
    fn fail(&mut self, ring: &mut Ring, pool: &mut Pool, index: usize, error: ConnectionError, now_ns: u64) {
        let Some(link) = &mut self.links[index] else { return };
        link.release_received(pool);
        if !link.connection.has_to_send(now_ns) || link.state != State::Up {
            return self.end_link(ring, pool, index, error.into(), now_ns);
        }
        self.detach(index, error.into(), now_ns);
        if let Some(link) = &mut self.links[index] {
            link.state = State::Refusing { until_ns: now_ns + REFUSING_NS };
            link.flush(ring, now_ns);
        }
        self.is_dirty = true;
    }

    /// Ends a connection, tells who is concerned, and gives back what it holds.
    fn end_link(&mut self, ring: &mut Ring, pool: &mut Pool, index: usize, reason: Reason, now_ns: u64) {
        if self.links[index].as_ref().is_none_or(Link::is_over) {
            return;
        }
        self.detach(index, reason, now_ns);
        self.close(ring, pool, index);
    }

    /// Takes a link out of the tables.
    fn detach(&mut self, index: usize, reason: Reason, now_ns: u64) {
        let Some(link) = &self.links[index] else { return };
        if matches!(link.state, State::Refusing { .. }) {
            return;
        }
        match (link.connection.side(), link.site) {
            (Side::Connecting, Some(site)) => self.dial_ended(site, index, reason, now_ns),
            (Side::Accepting, Some(site)) => self.accepted_ended(site, index, reason),
            (_, None) => self.strangers -= 1,
        }
        self.is_dirty = true;
    }

    /// Gives back what a link holds, and closes its socket.
    fn close(&mut self, ring: &mut Ring, pool: &mut Pool, index: usize) {
        let Some(link) = &mut self.links[index] else { return };
        link.release_received(pool);
        link.connection.end(&mut Memory { pool, leave: 0 });
        while let Some(blocks) = link.connection.take_unsent() {
            blocks.into_iter().for_each(|chunk| release(pool, &mut self.foreign, chunk));
        }
        link.state = State::Over;
        ring.close(link.socket);
    }
}

/// Gives a chunk back to whose it is.
fn release(pool: &mut Pool, foreign: &mut Vec<Chunk>, chunk: Chunk) {
    if pool.owns(&chunk) {
        pool.release(chunk);
    } else {
        foreign.push(chunk);
    }
}

/// Random bits of the system, for one handshake.
fn nonce() -> io::Result<Nonce> {
    let mut bytes = [0; 32];
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(Nonce(bytes))
}
