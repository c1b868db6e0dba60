//! More sockets on a queue: the XDP program brings frames of some addresses to them, each to be read by a core of its own.
//!
//! Invariants:
//!
//! * A lane only receives. The queue's fill and completion rings stay with the queue's owner, whose chunks the lane's
//!   frames are in: they must be sent home to its pool.
//! * The owner knows how many chunks the kernel holds, because each lane tells how many it has taken out.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::assembly::Assembly;
use crate::error::Error;
use crate::frame::RxFrame;
use crate::region::{Chunk, Region};
use crate::socket::{ReceiveSocket, SocketBuilder, SocketStatistics, Umem};
use crate::taken::Taken;

/// A claim to one more socket on a queue; made by [`Queue::share`](crate::queue::Queue::share).
#[derive(Debug)]
pub struct Share {
    pub(crate) umem: Umem,
    pub(crate) region: Arc<Region>,
    pub(crate) taken: Arc<Taken>,
}

/// A receiving socket on a queue that another core owns.
#[derive(Debug)]
pub struct Lane {
    socket: ReceiveSocket,
    assembly: Assembly,
    taken: Arc<Taken>,
}

impl Lane {
    /// Binds the socket that a claim is for, to the queue that the claim is on; `entries` of the receive ring, a power of
    /// two, bound how many of the owner's chunks a core that is late may keep waiting.
    ///
    /// # Errors
    ///
    /// [`Error::Privilege`], or what the kernel said.
    pub fn bind(share: Share, entries: u32, ifindex: u32, queue: u32) -> Result<Self, Error> {
        let builder = SocketBuilder::new().ring_entries(entries);
        let socket = builder.bind_receiver(&share.umem, ifindex, queue)?;
        Ok(Self { socket, assembly: Assembly::new(share.region), taken: share.taken })
    }

    /// Takes up to `max` received frames; the chunks of frames that cannot be delivered go to `home`, to be sent to the
    /// queue's owner.
    pub fn receive(
        &mut self,
        max: usize,
        mut home: impl FnMut(Chunk),
        deliver: impl FnMut(RxFrame),
    ) -> usize {
        let taken = &self.taken;
        let mut counted = 0;
        // Counted before a chunk goes home: an owner that fills by the old count may sleep before it sees the new one.
        let refuse = |chunk, taken_out| {
            taken.add(taken_out - counted);
            counted = taken_out;
            home(chunk);
        };
        let received = self.assembly.receive(self.socket.ring_mut(), max, refuse, deliver);
        if received.chunks > counted {
            taken.add(received.chunks - counted);
        }
        received.frames
    }

    /// Whether a descriptor waits to be received.
    pub fn has_receivable(&self) -> bool {
        !self.socket.ring().is_empty()
    }

    /// Frames dropped here: too many slices, or a head too short.
    pub fn invalid_frames(&self) -> u64 {
        self.assembly.invalid_frames()
    }

    /// The kernel's counters; those of the fill ring are the queue's, not this socket's.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn statistics(&self) -> Result<SocketStatistics, Error> {
        self.socket.statistics()
    }
}

impl AsFd for Lane {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
