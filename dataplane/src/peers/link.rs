//! One connection and its socket.

use std::collections::VecDeque;

use af_xdp::region::{Chunk, Pool, Region};
use torus_replication::connection::handshake::Identity;
use torus_replication::connection::{Connection, ConnectionError, Destination, Outgoing, Received};
use torus_replication::terms::Site;
use torus_uring::{Blocks, Message, Ring, SocketId};

use crate::store::release_blocks;

/// Where a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The network is connecting it.
    Connecting,
    /// Bytes may be sent and come.
    Up,
    /// The other side hears why it is refused.
    Refusing {
        /// When it is closed at the latest.
        until_ns: u64,
    },
    /// Closed; the kernel may still have something of it.
    Over,
}

/// Bytes that have come.
#[derive(Debug)]
struct Piece {
    chunk: Chunk,
    from: usize,
    len: usize,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) socket: SocketId,
    pub(super) connection: Connection<Blocks>,
    /// Who it is with, once that is known.
    pub(super) site: Option<Site>,
    pub(super) state: State,
    /// Since when frames may be sent.
    pub(super) opened_ns: Option<u64>,
    /// It was lent fewer chunks than it may receive into.
    pub(super) is_short: bool,
    /// What is sent next, but for the time that it is on its way.
    pub(super) message: Option<Message>,
    received: VecDeque<Piece>,
}

/// Chunks of the core, for blocks.
pub(super) struct Memory<'p> {
    pub(super) pool: &'p mut Pool,
    /// So many are left free.
    pub(super) leave: usize,
}

impl Destination for Memory<'_> {
    type Blocks = Blocks;

    fn add(&mut self, blocks: &mut Blocks) -> bool {
        if self.pool.free_chunks() <= self.leave {
            return false;
        }
        let chunk = self.pool.take_chunk();
        chunk.map(|chunk| blocks.push(chunk)).is_some()
    }

    fn copy(&mut self, blocks: &mut Blocks, at: usize, bytes: &[u8], crc: u32) -> u32 {
        let last = blocks.len() - 1;
        self.pool.copy_in_checksummed(blocks.get_mut(last), at, bytes, crc)
    }

    fn release(&mut self, blocks: Blocks) {
        release_blocks(self.pool, blocks);
    }
}

/// A message that frames are put into.
struct Out<'m>(&'m mut Message);

impl Outgoing<Blocks> for Out<'_> {
    fn room(&self) -> usize {
        self.0.room()
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.push_bytes(bytes);
    }

    fn blocks(&mut self, blocks: Blocks) {
        blocks.into_iter().for_each(|chunk| self.0.push_chunk(chunk));
    }
}

impl Link {
    pub(super) fn new(
        socket: SocketId,
        connection: Connection<Blocks>,
        site: Option<Site>,
        state: State,
    ) -> Link {
        Link {
            socket,
            connection,
            site,
            state,
            opened_ns: None,
            is_short: true,
            message: None,
            received: VecDeque::new(),
        }
    }

    /// Whether nothing of it counts any more.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Over | State::Refusing { .. })
    }

    /// Takes bytes that have come.
    pub(super) fn push(&mut self, chunk: Chunk, len: usize) {
        self.received.push_back(Piece { chunk, from: 0, len });
    }

    /// Whether there are bytes that nothing could be made of yet.
    pub(super) fn has_unread(&self) -> bool {
        !self.received.is_empty()
    }

    /// Has bytes understood up to what is to be told, or as far as they go; chunks that are read are lent to the socket again.
    pub(super) fn receive(
        &mut self,
        own: &Identity,
        region: &Region,
        ring: &mut Ring,
        memory: &mut Memory<'_>,
        now_ns: u64,
    ) -> Result<Option<Received<Blocks>>, ConnectionError> {
        while let Some(piece) = self.received.front_mut() {
            let bytes = &region.bytes(&piece.chunk)[piece.from..piece.len];
            let (taken, received) = self.connection.receive(own, bytes, memory, now_ns)?;
            piece.from += taken;
            let is_stuck = taken < bytes.len() && received.is_none();
            if piece.from == piece.len
                && let Some(piece) = self.received.pop_front()
                && let Err(chunk) = ring.give_back(memory.pool, self.socket, piece.chunk)
            {
                memory.pool.release(chunk);
            }
            if is_stuck || received.is_some() {
                return Ok(received);
            }
        }
        Ok(None)
    }

    /// Begins to send what there is, if nothing is on its way.
    pub(super) fn flush(&mut self, ring: &mut Ring, now_ns: u64) {
        if self.state == State::Connecting || !self.connection.has_to_send(now_ns) {
            return;
        }
        let Some(mut message) = self.message.take() else { return };
        self.connection.fill(&mut Out(&mut message), now_ns);
        if let Err(message) = ring.send(self.socket, message) {
            // Cannot be: nothing is on its way, and the socket is open.
            debug_assert!(false, "the ring takes a message of an idle socket");
            self.message = Some(message);
        }
    }

    /// Gives back what has come and will not be understood.
    pub(super) fn release_received(&mut self, pool: &mut Pool) {
        self.received.drain(..).for_each(|piece| pool.release(piece.chunk));
    }
}
