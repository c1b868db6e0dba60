//! One queue of an interface, whatever link is behind it.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use af_xdp::frame::{RxFrame, TxFrame};
use af_xdp::region::{CHUNK_BYTES, Chunk, Pool};

use super::geometry::{ETHERNET_BYTES, TAG_BYTES};
use super::packet::{PacketQueue, release_frame};
use super::ports::{Port, Ports};
use super::xdp::XdpQueue;
use super::{LinkInfo, LinkStats};

/// A receive and transmit queue, owned by one core. All calls take that core's pool.
///
/// Dropping a queue leaks the chunks that the kernel holds for it.
#[derive(Debug)]
pub struct Queue {
    info: LinkInfo,
    ports: Ports,
    kind: Kind,
    longest_bytes: usize,
    /// Frames that can never be sent, until they are reaped.
    refused: VecDeque<TxFrame>,
    refused_frames: u64,
    foreign_frames: u64,
}

/// Impossible frames that may wait to be reaped.
const REFUSED_FRAMES: usize = 64;

#[derive(Debug)]
pub(super) enum Kind {
    Xdp(Box<XdpQueue>),
    Packet(Box<PacketQueue>),
}

impl Queue {
    pub(super) fn new(info: LinkInfo, ports: Ports, kind: Kind) -> Self {
        let longest_bytes = info.mtu as usize + ETHERNET_BYTES;
        let refused = VecDeque::with_capacity(REFUSED_FRAMES);
        Self { info, ports, kind, longest_bytes, refused, refused_frames: 0, foreign_frames: 0 }
    }

    /// From now on nothing longer than this MTU allows is sent.
    pub fn set_mtu(&mut self, mtu_bytes: u32) {
        self.longest_bytes = mtu_bytes as usize + ETHERNET_BYTES;
    }

    /// The logical interfaces whose frames come by this queue.
    pub fn ports(&self) -> &[Port] {
        self.ports.as_slice()
    }

    /// Receives what is waiting, as far as `out` has capacity, and gives the kernel empty chunks for it. Frames are
    /// untagged, and say by which logical interface they came. Returns how many were added.
    pub fn receive(&mut self, pool: &mut Pool, out: &mut Vec<RxFrame>) -> usize {
        let before = out.len();
        match &mut self.kind {
            Kind::Xdp(queue) => queue.receive(pool, out),
            Kind::Packet(queue) => queue.receive(pool, out),
        };
        self.foreign_frames += self.ports.tell_apart(out, before, |frame| frame.release(pool));
        out.len() - before
    }

    /// Queues a frame for the first logical interface of this queue, else as [`Queue::transmit_by`].
    ///
    /// # Errors
    ///
    /// As for [`Queue::transmit_by`].
    pub fn transmit(&mut self, pool: &mut Pool, frame: TxFrame) -> Result<(), TxFrame> {
        self.transmit_by(pool, self.ports.as_slice().first().map_or(0, |port| port.ordinal), frame)
    }

    /// Queues an untagged frame for a logical interface; [`Queue::flush`] sends it, with the tag that it needs there. The
    /// frame's chunks come back through [`Queue::reap`].
    /// A frame that can never be sent (malformed, longer than the MTU, for no logical interface of this queue) is counted,
    /// and comes back through `reap` too.
    ///
    /// # Errors
    ///
    /// The frame itself where the ring, or without scatter-gather the pool, has no room: keep it, flush,
    /// reap and try again.
    pub fn transmit_by(&mut self, pool: &mut Pool, ordinal: u8, frame: TxFrame) -> Result<(), TxFrame> {
        let port = self.ports.get(ordinal).filter(|_| self.is_sendable(&frame));
        let Some(port) = port else { return self.refuse(frame) };
        let Some(vlan) = port.vlan else { return self.hand_to_link(pool, frame) };
        match frame.put_tag_in(vlan.get(), pool) {
            Ok(tagged) => self.hand_to_link(pool, tagged).map_err(|frame| frame.without_tag(pool)),
            Err(frame) => self.refuse(frame),
        }
    }

    fn refuse(&mut self, frame: TxFrame) -> Result<(), TxFrame> {
        if self.refused.len() == REFUSED_FRAMES {
            return Err(frame);
        }
        self.refused_frames += 1;
        self.refused.push_back(frame);
        Ok(())
    }

    fn hand_to_link(&mut self, pool: &mut Pool, frame: TxFrame) -> Result<(), TxFrame> {
        match &mut self.kind {
            Kind::Xdp(queue) => queue.transmit(pool, frame),
            Kind::Packet(queue) => queue.transmit(frame),
        }
    }

    /// Whether a frame can be sent here at all. More slices than the link sends are copied into one chunk.
    fn is_sendable(&self, frame: &TxFrame) -> bool {
        let is_gathered = frame.data.len() < usize::from(self.info.segments);
        frame.is_well_formed()
            && frame.len() <= self.longest_bytes
            && (is_gathered || frame.len() + TAG_BYTES <= CHUNK_BYTES)
    }

    /// Makes the kernel send what was queued. True when another call now would send nothing more; false
    /// when the kernel stopped at its budget or for lack of room: call again before sleeping.
    pub fn flush(&mut self) -> bool {
        match &mut self.kind {
            Kind::Xdp(queue) => queue.flush(),
            Kind::Packet(queue) => queue.flush(),
        }
    }

    /// Takes back what was sent: headers and chunks of this core go to `pool`, each chunk of another
    /// core's range to `foreign`, to be sent home.
    pub fn reap(&mut self, pool: &mut Pool, foreign: &mut dyn FnMut(Chunk)) {
        for frame in self.refused.drain(..) {
            release_frame(frame, pool, foreign);
        }
        match &mut self.kind {
            Kind::Xdp(queue) => queue.reap(pool, foreign),
            Kind::Packet(queue) => queue.reap(pool, foreign),
        }
    }

    /// The descriptor to poll for `POLLIN` before sleeping.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            Kind::Xdp(queue) => queue.poll_fd(),
            Kind::Packet(queue) => queue.poll_fd(),
        }
    }

    /// Whether a frame waits to be received.
    pub fn has_rx(&self) -> bool {
        match &self.kind {
            Kind::Xdp(queue) => queue.has_rx(),
            Kind::Packet(queue) => queue.has_rx(),
        }
    }

    /// Whether a queued frame was not taken by the kernel yet.
    pub fn tx_pending(&self) -> bool {
        match &self.kind {
            Kind::Xdp(queue) => queue.tx_pending(),
            Kind::Packet(queue) => queue.tx_pending(),
        }
    }

    /// The counters; reading them asks the kernel, so not for every batch.
    pub fn stats(&mut self) -> LinkStats {
        let mut stats = match &mut self.kind {
            Kind::Xdp(queue) => queue.stats(),
            Kind::Packet(queue) => queue.stats(),
        };
        stats.tx_dropped += self.refused_frames;
        stats.rx_invalid += self.foreign_frames;
        stats
    }

    /// What this link was when it was opened.
    pub fn info(&self) -> &LinkInfo {
        &self.info
    }
}
