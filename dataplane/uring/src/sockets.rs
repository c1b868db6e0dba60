//! Sockets on the ring: accepting, connecting, receiving into lent chunks, sending of owned messages.
//!
//! Invariants:
//! * A socket's place is used again only when every request on it has ended, and that was told: no completion is ever taken for
//!   another socket's, and no two sockets that a caller knows have one place.
//! * The descriptor is open until then, so that no request means a descriptor that was given to somebody else.
//! * A message is the ring's from [`Ring::send`] to [`SocketEvent::Sent`], its chunks and bytes with it; only one of a socket
//!   is on its way.
//! * What a socket receives into are chunks of its own, so that a socket whose data nobody takes holds up no other one: when
//!   they are used up the kernel's buffer fills, and then the other side stops.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use af_xdp::region::{Chunk, Pool};
use io_uring::{cqueue, opcode, types};

use crate::message::Message;
use crate::provided::Provided;
use crate::ring::{Event, KIND_IGNORED, KIND_SOCKET, Ring};
use crate::{IoError, outcome};

/// Sizes for sockets.
#[derive(Debug, Clone, Copy)]
pub struct SocketsConfig {
    /// Sockets at most.
    pub sockets_max: u16,
    /// Chunks that each may receive into; a power of two.
    pub chunks_each: u16,
}

/// A socket on a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SocketId {
    index: u16,
    generation: u16,
}

impl SocketId {
    /// A number below the ring's most sockets, which no other open one has.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.index)
    }
}

/// What has happened on a socket.
#[derive(Debug)]
pub enum SocketEvent {
    /// Somebody has connected.
    Accepted(SocketId, OwnedFd),
    /// Nobody is accepted any more, until [`Ring::accept`] is called again.
    NotAccepting(SocketId, IoError),
    /// [`Ring::connect`] has ended.
    Connected(SocketId, Result<(), IoError>),
    /// The first bytes of the chunk have come. It is the caller's, to [give back](Ring::give_back).
    Received(SocketId, Chunk, usize),
    /// Nothing more will come: the other side has said so, or it failed.
    Ended(SocketId, Result<(), IoError>),
    /// A message is the caller's again; what was sent of it when it failed is not known.
    Sent(SocketId, Message, Result<(), IoError>),
    /// [`Ring::close`] has ended: the socket is gone.
    Closed(SocketId),
}

/// No place for another socket.
#[derive(Debug, thiserror::Error)]
#[error("there are as many sockets as the ring was made for")]
pub struct NoPlace;

mod request {
    pub(super) const ACCEPT: u8 = 1;
    pub(super) const CONNECT: u8 = 2;
    pub(super) const RECEIVE: u8 = 3;
    pub(super) const SEND: u8 = 4;
    pub(super) const FINISH: u8 = 5;
    pub(super) const SHUTDOWN: u8 = 6;
    pub(super) const ALL: [u8; 6] = [ACCEPT, CONNECT, RECEIVE, SEND, FINISH, SHUTDOWN];
}

/// A socket's place.
#[derive(Default)]
struct Place {
    generation: u16,
    file: Option<OwnedFd>,
    /// Requests in flight: a bit for each kind.
    in_flight: u8,
    is_closing: bool,
    /// Data are wanted.
    receives: bool,
    message: Option<Message>,
    address: Option<Box<Address>>,
    provided: Option<Provided>,
}

/// Where to connect to, as the kernel reads it.
#[repr(C)]
union Address {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// All sockets of a ring.
#[derive(Default)]
pub(crate) struct Sockets {
    places: Vec<Place>,
    free: Vec<u16>,
    chunks_each: u16,
    /// Sockets that have gone, to be told.
    closed: Vec<SocketId>,
}

impl Sockets {
    /// Whether a request is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.places.iter().all(|place| place.in_flight == 0)
    }

    fn place(&mut self, id: SocketId) -> Option<&mut Place> {
        let place = self.places.get_mut(id.index())?;
        (place.generation == id.generation && place.file.is_some() && !place.is_closing).then_some(place)
    }

    /// A socket that has gone and was not told yet.
    pub(crate) fn next_closed(&mut self) -> Option<Event> {
        let id = self.closed.pop()?;
        self.free.push(id.index);
        Some(Event::Socket(SocketEvent::Closed(id)))
    }

    /// Closes a socket that is to be closed and on which nothing is in flight any more.
    fn settle(&mut self, index: u16) {
        let place = &mut self.places[usize::from(index)];
        if !place.is_closing || place.in_flight != 0 || place.file.is_none() {
            return;
        }
        let id = SocketId { index, generation: place.generation };
        place.file = None;
        place.is_closing = false;
        place.receives = false;
        place.generation = place.generation.wrapping_add(1);
        self.closed.push(id);
    }
}

fn user_data(id: SocketId, request: u8) -> u64 {
    KIND_SOCKET | u64::from(request) << 48 | u64::from(id.generation) << 16 | u64::from(id.index)
}

impl Ring {
    /// Makes room for sockets; none can be added before.
    ///
    /// # Panics
    /// If it was made before, or the number of chunks is no power of two.
    pub fn prepare_sockets(&mut self, config: SocketsConfig) {
        assert!(self.sockets.places.is_empty() && config.chunks_each.is_power_of_two());
        self.sockets = Sockets {
            places: (0..config.sockets_max).map(|_| Place::default()).collect(),
            free: (0..config.sockets_max).rev().collect(),
            chunks_each: config.chunks_each,
            closed: Vec::with_capacity(usize::from(config.sockets_max)),
        };
    }

    /// Takes a stream socket: one that listens, one that is connected, or one to be connected. It must be a blocking one, as
    /// sockets are that nobody has made non-blocking: the ring waits where others would block.
    ///
    /// # Errors
    /// [`NoPlace`].
    pub fn add_socket(&mut self, file: OwnedFd) -> Result<SocketId, NoPlace> {
        let index = self.sockets.free.pop().ok_or(NoPlace)?;
        let place = &mut self.sockets.places[usize::from(index)];
        place.file = Some(file);
        Ok(SocketId { index, generation: place.generation })
    }

    /// Accepts whoever connects, until it fails.
    pub fn accept(&mut self, id: SocketId) {
        let Some(fd) = self.begin(id, request::ACCEPT) else { return };
        let entry = opcode::AcceptMulti::new(fd).flags(libc::SOCK_CLOEXEC).build();
        // SAFETY: it names no memory.
        unsafe { self.queue(&entry.user_data(user_data(id, request::ACCEPT))) };
    }

    /// Connects the socket.
    pub fn connect(&mut self, id: SocketId, to: SocketAddr) {
        let Some(fd) = self.begin(id, request::CONNECT) else { return };
        let (address, len) = raw_address(to);
        let place = &mut self.sockets.places[id.index()];
        let address: *const Address = &raw const **place.address.insert(address);
        let entry = opcode::Connect::new(fd, address.cast(), len).build();
        // SAFETY: the address lies in a box of the place, which is not replaced before the request has ended: `begin` lets no
        // second one begin.
        unsafe { self.queue(&entry.user_data(user_data(id, request::CONNECT))) };
    }

    /// Receives what comes, until it [ends](SocketEvent::Ended): lends the socket as many chunks of the pool as are missing, and
    /// are there; says how many are missing still. To be called again when there are more.
    ///
    /// # Errors
    /// As the kernel gave it, when it takes no ring of buffers.
    pub fn receive(&mut self, id: SocketId, pool: &mut Pool) -> io::Result<usize> {
        if self.sockets.place(id).is_none() {
            return Ok(0);
        }
        let place = &mut self.sockets.places[id.index()];
        let provided = match &mut place.provided {
            Some(provided) => provided,
            none => none.insert(Provided::new(&self.ring.submitter(), id.index, self.sockets.chunks_each)?),
        };
        while provided.room() > 0
            && let Some(chunk) = pool.take_chunk()
        {
            provided.lend(&self.region, chunk);
        }
        let missing = provided.room();
        place.receives = true;
        self.go_on_receiving(id);
        Ok(missing)
    }

    /// Lends a chunk that has been read to the socket again. It must be the only handle.
    ///
    /// # Errors
    /// The chunk, when the socket has no use for it: it is gone, or has all its chunks.
    ///
    /// # Panics
    /// If the chunk has another handle.
    pub fn give_back(&mut self, pool: &Pool, id: SocketId, chunk: Chunk) -> Result<(), Chunk> {
        assert_eq!(pool.references(&chunk), 1, "only the only handle is received into");
        if self.sockets.place(id).is_none() {
            return Err(chunk);
        }
        match &mut self.sockets.places[id.index()].provided {
            Some(provided) if provided.room() > 0 => provided.lend(&self.region, chunk),
            _ => return Err(chunk),
        }
        self.go_on_receiving(id);
        Ok(())
    }

    /// Sends a message: all of it, or the connection has failed.
    ///
    /// # Errors
    /// The message, when the socket is gone or another one is on its way.
    pub fn send(&mut self, id: SocketId, message: Message) -> Result<(), Message> {
        let Some(fd) = self.begin(id, request::SEND) else { return Err(message) };
        let place = &mut self.sockets.places[id.index()];
        let header = place.message.insert(message).header(&self.region);
        let flags = u32::try_from(libc::MSG_WAITALL | libc::MSG_NOSIGNAL).expect("positive flags");
        let entry = opcode::SendMsg::new(fd, header).flags(flags).build();
        // SAFETY: header, vectors and bytes lie in boxes and vectors of the message, which its place keeps untouched until the
        // completion; chunks have their handles there, so that they are neither written nor free; the region stays mapped, since
        // `self` holds it.
        unsafe { self.queue(&entry.user_data(user_data(id, request::SEND))) };
        Ok(())
    }

    /// Says to the other side that nothing more will be sent; it may send on.
    pub fn finish_sending(&mut self, id: SocketId) {
        self.shutdown(id, request::FINISH, libc::SHUT_WR);
    }

    /// Ends the connection and every request on it, and closes the socket; at the end [`SocketEvent::Closed`] tells. A message that is
    /// on its way is given back before.
    pub fn close(&mut self, id: SocketId) {
        let Some(place) = self.sockets.place(id) else { return };
        let in_flight = place.in_flight;
        for kind in request::ALL {
            if in_flight & 1 << kind != 0 {
                self.cancel(id, kind);
            }
        }
        // What is just about to begin anew is found by no cancellation; it ends by this.
        self.shutdown(id, request::SHUTDOWN, libc::SHUT_RDWR);
        self.sockets.places[id.index()].is_closing = true;
    }

    /// Gives the chunks back that were lent to sockets which are gone.
    pub fn withdraw_chunks(&mut self, pool: &mut Pool) {
        let idle = self.sockets.places.iter_mut().filter(|place| place.file.is_none());
        for provided in idle.filter_map(|place| place.provided.take()) {
            provided.end(&self.ring.submitter(), pool);
        }
    }

    /// A socket's request has ended, or a part of it. Nothing for what is the ring's own affair.
    pub(crate) fn socket_event(&mut self, entry: &cqueue::Entry) -> Option<SocketEvent> {
        let data = entry.user_data();
        let [index_low, index_high, generation_low, generation_high, .., kind, _] = data.to_le_bytes();
        let index = u16::from_le_bytes([index_low, index_high]);
        let generation = u16::from_le_bytes([generation_low, generation_high]);
        let id = SocketId { index, generation };
        let place = &mut self.sockets.places[usize::from(index)];
        debug_assert_eq!(place.generation, generation, "a place waits for all its requests");
        let has_more = cqueue::more(entry.flags());
        if !has_more {
            place.in_flight &= !(1 << kind);
        }
        let is_closing = place.is_closing;
        let result = outcome_of(entry.result());
        let event = match kind {
            request::ACCEPT => self.accepted(id, result, is_closing),
            request::CONNECT => (!is_closing).then(|| SocketEvent::Connected(id, result.map(drop))),
            request::RECEIVE => self.received(id, result, cqueue::buffer_select(entry.flags())),
            request::SEND => {
                let message = self.sockets.places[usize::from(index)].message.take();
                message.map(|message| {
                    let result = outcome(entry.result(), message.len_bytes());
                    SocketEvent::Sent(id, message, result)
                })
            }
            _ => None,
        };
        if is_closing && has_more {
            self.cancel(id, kind);
        }
        self.sockets.settle(index);
        event
    }

    /// Closes every socket: for a ring that ends.
    pub(crate) fn close_all(&mut self) {
        for index in 0..self.sockets.places.len() {
            let generation = self.sockets.places[index].generation;
            self.close(SocketId { index: u16::try_from(index).expect("at most as many"), generation });
        }
    }

    fn accepted(
        &mut self,
        id: SocketId,
        result: Result<u32, IoError>,
        is_closing: bool,
    ) -> Option<SocketEvent> {
        match result {
            Ok(fd) => {
                let fd = i32::try_from(fd).expect("it was positive");
                // SAFETY: the kernel has made it for us a moment ago, and nobody else knows it.
                let file = unsafe { OwnedFd::from_raw_fd(fd) };
                if is_closing {
                    return None;
                }
                // It may have been the last for a reason that has passed.
                self.accept(id);
                Some(SocketEvent::Accepted(id, file))
            }
            Err(_) if is_closing => None,
            Err(error) => Some(SocketEvent::NotAccepting(id, error)),
        }
    }

    fn received(
        &mut self,
        id: SocketId,
        result: Result<u32, IoError>,
        buffer: Option<u16>,
    ) -> Option<SocketEvent> {
        let place = &mut self.sockets.places[id.index()];
        let provided = place.provided.as_mut()?;
        let chunk = buffer.and_then(|number| provided.take(number));
        match (result, chunk) {
            (Ok(len), Some(chunk)) if len > 0 && !place.is_closing => {
                self.go_on_receiving(id);
                Some(SocketEvent::Received(id, chunk, len as usize))
            }
            (result, chunk) => {
                if let Some(chunk) = chunk {
                    // Nothing that is wanted: lent again, at once.
                    provided.lend(&self.region, chunk);
                }
                if place.is_closing {
                    return None;
                }
                match result {
                    // No chunk was lent at that moment; one is now, or `give_back` goes on.
                    Err(IoError::Errno(libc::ENOBUFS)) => {
                        self.go_on_receiving(id);
                        None
                    }
                    result => {
                        place.receives = false;
                        Some(SocketEvent::Ended(id, result.map(drop)))
                    }
                }
            }
        }
    }

    /// Begins to receive again if that has ended, is wanted, and there is a chunk to receive into.
    fn go_on_receiving(&mut self, id: SocketId) {
        let place = &self.sockets.places[id.index()];
        let Some(provided) = place.provided.as_ref().filter(|provided| !provided.is_empty()) else { return };
        let group = provided.group();
        if !place.receives {
            return;
        }
        let Some(fd) = self.begin(id, request::RECEIVE) else { return };
        let entry = opcode::RecvMulti::new(fd, group).build();
        // SAFETY: it names no memory but the ring of buffers of the place, which owns its chunks until it is unregistered, which is
        // after the last request has ended.
        unsafe { self.queue(&entry.user_data(user_data(id, request::RECEIVE))) };
    }

    /// Notes a request that begins; nothing when one of its kind is in flight or the socket is gone.
    fn begin(&mut self, id: SocketId, kind: u8) -> Option<types::Fd> {
        let place = self.sockets.place(id)?;
        if place.in_flight & 1 << kind != 0 {
            return None;
        }
        let fd = types::Fd(place.file.as_ref()?.as_raw_fd());
        place.in_flight |= 1 << kind;
        Some(fd)
    }

    fn shutdown(&mut self, id: SocketId, kind: u8, how: i32) {
        let Some(fd) = self.begin(id, kind) else { return };
        let entry = opcode::Shutdown::new(fd, how).build();
        // SAFETY: it names no memory.
        unsafe { self.queue(&entry.user_data(user_data(id, kind))) };
    }

    fn cancel(&mut self, id: SocketId, kind: u8) {
        let entry = opcode::AsyncCancel::new(user_data(id, kind)).build();
        // SAFETY: it names no memory.
        unsafe { self.queue(&entry.user_data(KIND_IGNORED)) };
    }
}

/// The number that a request ended with.
fn outcome_of(result: i32) -> Result<u32, IoError> {
    u32::try_from(result).map_err(|_| IoError::Errno(-result))
}

fn raw_address(address: SocketAddr) -> (Box<Address>, libc::socklen_t) {
    let family = |family: i32| libc::sa_family_t::try_from(family).expect("a small number");
    let len = |bytes: usize| libc::socklen_t::try_from(bytes).expect("a small number");
    match address {
        SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: family(libc::AF_INET),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            (Box::new(Address { v4: raw }), len(size_of::<libc::sockaddr_in>()))
        }
        SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: family(libc::AF_INET6),
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            (Box::new(Address { v6: raw }), len(size_of::<libc::sockaddr_in6>()))
        }
    }
}
