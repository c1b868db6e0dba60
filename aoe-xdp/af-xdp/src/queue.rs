//! Frames through an AF_XDP socket, as handles: the safe side of the rings.
//!
//! Invariants: a chunk in the fill ring, in the driver, or in a send descriptor has no handle; each comes
//! back as exactly one handle, through [`Queue::receive`], a [`Lane`](crate::lane::Lane) of the queue, or
//! [`Queue::reap`]. Dropping a queue leaks what the kernel held: the memory is never handed out again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::assembly::Assembly;
use crate::error::Error;
use crate::frame::{RxFrame, Segment, TxFrame};
use crate::lane::Share;
use crate::region::{Handle, Pool, Region};
use crate::socket::{Obtained, Socket, SocketBuilder, SocketStatistics, Umem};
use crate::taken::Taken;

/// Kicks of one [`Queue::flush`]: enough to send a full ring at the kernel's smallest budget.
const KICKS_MAX: u32 = 128;

/// How a flush ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flushed {
    /// Another flush now would send nothing more.
    pub complete: bool,
    /// System calls it took.
    pub kicks: u32,
}

/// An AF_XDP socket over a [`Region`], owned by one core.
#[derive(Debug)]
pub struct Queue {
    socket: Socket,
    assembly: Assembly,
    /// Chunks given to the kernel for receiving, less those that came back by this socket, modulo 2³².
    given: u32,
    /// Those that came back by other sockets of the queue.
    lanes: Vec<Arc<Taken>>,
    fill_target: u32,
    /// Descriptors sent and not completed.
    outstanding: u32,
}

impl Queue {
    /// Binds a socket to a queue, with the whole region as its UMEM.
    ///
    /// # Errors
    ///
    /// As for [`SocketBuilder::bind`].
    pub fn bind(
        builder: &SocketBuilder,
        region: &Arc<Region>,
        ifindex: u32,
        queue: u32,
    ) -> Result<Self, Error> {
        Ok(Self::new(builder.bind(region, ifindex, queue)?, Arc::clone(region)))
    }

    /// Binds a socket to another queue of the interface, on a UMEM over the same region.
    ///
    /// # Errors
    ///
    /// As for [`SocketBuilder::bind_shared`].
    pub fn bind_shared(
        builder: &SocketBuilder,
        umem: &Umem,
        region: &Arc<Region>,
        ifindex: u32,
        queue: u32,
    ) -> Result<Self, Error> {
        assert_eq!(umem.memory().base(), region.base(), "a shared UMEM is of the same region");
        Ok(Self::new(builder.bind_shared(umem, ifindex, queue)?, Arc::clone(region)))
    }

    fn new(socket: Socket, region: Arc<Region>) -> Self {
        let fill_target = socket.ring_entries();
        Self {
            socket,
            assembly: Assembly::new(region),
            given: 0,
            lanes: Vec::new(),
            fill_target,
            outstanding: 0,
        }
    }

    /// A claim to one more socket on this queue, for another core to receive by.
    pub fn share(&mut self) -> Share {
        let taken = Arc::<Taken>::default();
        self.lanes.push(Arc::clone(&taken));
        Share { umem: self.socket.umem(), region: Arc::clone(self.assembly.region()), taken }
    }

    /// The socket, for its map entry and for sockets that share its UMEM.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// What the kernel granted.
    pub fn obtained(&self) -> Obtained {
        self.socket.obtained()
    }

    /// Limits how many chunks the kernel holds for receiving, those that wait in rings included. Without lanes the ring
    /// size is the limit otherwise.
    pub fn set_fill_target(&mut self, chunks: u32) {
        let most = if self.lanes.is_empty() { self.socket.ring_entries() } else { u32::MAX };
        self.fill_target = chunks.min(most);
    }

    /// Gives the kernel empty chunks of `pool` up to the target.
    pub fn fill(&mut self, pool: &mut Pool) {
        let mut held = self.fill_chunks();
        let fill = &mut self.socket.rings.fill;
        let mut pushed = false;
        while held < self.fill_target && fill.has_room(1) {
            let Some(chunk) = pool.take_chunk() else { break };
            fill.push(chunk.into_offset());
            held += 1;
            self.given = self.given.wrapping_add(1);
            pushed = true;
        }
        if pushed {
            fill.publish();
        }
        // A driver that ran dry asks to be told; without anything to give there is nothing to tell.
        if fill.pending() > 0 && fill.needs_wakeup() {
            self.socket.kick_receive();
        }
    }

    /// Takes up to `max` received frames, an 802.1Q tag taken out of each; the chunks of frames that cannot be delivered go
    /// back to `pool`, which is the one that [`Queue::fill`] took from.
    pub fn receive(&mut self, max: usize, pool: &mut Pool, deliver: impl FnMut(RxFrame)) -> usize {
        let ring = &mut self.socket.rings.receive;
        let received = self.assembly.receive(ring, max, |chunk, _taken| pool.release(chunk), deliver);
        self.given = self.given.wrapping_sub(received.chunks);
        received.frames
    }

    /// Queues a frame as one descriptor for its header and one for each slice.
    ///
    /// # Errors
    ///
    /// The frame itself, where the ring or the completion ring has no room for it.
    pub fn send(&mut self, frame: TxFrame) -> Result<(), TxFrame> {
        assert!(frame.is_well_formed(), "slices lie inside their chunks");
        debug_assert!(frame.data.is_empty() || self.obtained().segments);
        let descriptors = 1 + u32::try_from(frame.data.len()).expect("a few slices");
        if !self.has_send_room(descriptors) {
            return Err(frame);
        }
        let header_len = u32::from(frame.header_len);
        let mut rest = descriptors - 1;
        self.push_send(frame.header.into_offset(), header_len, rest);
        for segment in frame.data {
            rest -= 1;
            let address = segment.chunk.into_offset() + u64::from(segment.offset);
            self.push_send(address, u32::from(segment.len), rest);
        }
        Ok(())
    }

    /// Queues one slice as a whole frame.
    ///
    /// # Errors
    ///
    /// The slice itself, where there is no room.
    pub fn send_single(&mut self, segment: Segment) -> Result<(), Segment> {
        assert!(segment.is_inside(), "slices lie inside their chunks");
        if !self.has_send_room(1) {
            return Err(segment);
        }
        let address = segment.chunk.into_offset() + u64::from(segment.offset);
        self.push_send(address, u32::from(segment.len), 0);
        Ok(())
    }

    /// Makes the kernel send what was queued, kick by kick as its budget wants.
    pub fn flush(&mut self) -> Flushed {
        self.socket.rings.send.publish();
        let mut kicks = 0;
        while self.tx_pending() && self.socket.rings.send.needs_wakeup() {
            let before = self.socket.rings.send.pending();
            let result = self.socket.kick_send();
            kicks += 1;
            let made_progress = self.socket.rings.send.pending() != before;
            match result.as_ref().map_err(io::Error::raw_os_error) {
                // The driver was woken and takes it from here.
                Ok(()) if self.obtained().zero_copy => break,
                Ok(()) | Err(Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR)) => {
                    if !made_progress || kicks == KICKS_MAX {
                        return Flushed { complete: !self.tx_pending(), kicks };
                    }
                }
                // The link is down or gone: nothing that another call could change now.
                Err(_) => break,
            }
        }
        Flushed { complete: true, kicks }
    }

    /// Gives back a handle for each descriptor that the kernel is done with.
    pub fn reap(&mut self, mut done: impl FnMut(Handle)) {
        let completion = &mut self.socket.rings.completion;
        while let Some(address) = completion.pop() {
            self.outstanding = self.outstanding.saturating_sub(1);
            // SAFETY: the kernel completes each descriptor once, with the address that was queued.
            if let Some(handle) = unsafe { self.assembly.region().handle_from_offset(address) } {
                done(handle);
            }
        }
        completion.release();
    }

    /// Whether a descriptor waits to be received.
    pub fn has_receivable(&self) -> bool {
        !self.socket.rings.receive.is_empty()
    }

    /// Whether the kernel has not taken everything that was queued.
    pub fn tx_pending(&self) -> bool {
        self.socket.rings.send.pending() != 0
    }

    /// Chunks that the kernel holds for receiving, those that wait in the rings of this queue and of its lanes included.
    pub fn fill_chunks(&self) -> u32 {
        self.lanes.iter().fold(self.given, |held, lane| held.wrapping_sub(lane.load()))
    }

    /// Descriptors queued or sent and not reaped.
    pub fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// Frames dropped here: too many slices, or a head too short.
    pub fn invalid_frames(&self) -> u64 {
        self.assembly.invalid_frames()
    }

    /// The kernel's counters.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn statistics(&self) -> Result<SocketStatistics, Error> {
        self.socket.statistics()
    }

    /// Whether that many descriptors can be queued now: never more than the completion ring can give back.
    pub fn has_send_room(&mut self, descriptors: u32) -> bool {
        self.outstanding + descriptors <= self.socket.ring_entries()
            && self.socket.rings.send.has_room(descriptors)
    }

    fn push_send(&mut self, address: u64, length: u32, rest: u32) {
        let options = if rest == 0 { 0 } else { libc::XDP_PKT_CONTD };
        let pushed = self.socket.rings.send.push(libc::xdp_desc { addr: address, len: length, options });
        assert!(pushed, "room was seen before");
        self.outstanding += 1;
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
