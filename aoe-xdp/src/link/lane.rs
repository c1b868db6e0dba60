//! What of a queue's frames the XDP program brings to another core than the queue's owner.

use std::os::fd::{AsFd, BorrowedFd};

use af_xdp::frame::RxFrame;
use af_xdp::lane;
use af_xdp::region::Chunk;

use super::LinkStats;
use super::ports::Ports;

/// Frames of a queue that come straight to the core that serves them. It only receives: answers leave by queues, and
/// the chunks are the queue owner's.
#[derive(Debug)]
pub struct Lane {
    lane: lane::Lane,
    ports: Ports,
    queue: u16,
    foreign_frames: u64,
    stats: LinkStats,
}

impl Lane {
    pub(super) fn new(lane: lane::Lane, ports: Ports, queue: u16) -> Self {
        Self { lane, ports, queue, foreign_frames: 0, stats: LinkStats::default() }
    }

    /// The queue that it is on.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// Receives what is waiting, as [`Queue::receive`](super::Queue::receive) does; the chunks of frames that are not ours
    /// go to `home`, to be sent to the queue's owner. Returns how many frames were added.
    pub fn receive(&mut self, out: &mut Vec<RxFrame>, mut home: impl FnMut(Chunk)) -> usize {
        let before = out.len();
        let room = out.capacity() - before;
        let stats = &mut self.stats;
        self.lane.receive(room, &mut home, |frame| {
            stats.rx_frames += 1;
            stats.rx_bytes += frame.len() as u64;
            out.push(frame);
        });
        self.foreign_frames += self.ports.tell_apart(out, before, |frame| {
            for segment in frame.into_segments() {
                home(segment.chunk);
            }
        });
        out.len() - before
    }

    /// The descriptor to poll for `POLLIN` before sleeping.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.lane.as_fd()
    }

    /// Whether a frame waits to be received.
    pub fn has_rx(&self) -> bool {
        self.lane.has_receivable()
    }

    /// The counters of what was received here; reading them asks the kernel, so not for every batch. Those of empty chunks
    /// and of sending are the queue's.
    pub fn stats(&mut self) -> LinkStats {
        if let Ok(kernel) = self.lane.statistics() {
            self.stats.rx_dropped = kernel.rx_dropped + kernel.rx_ring_full;
            self.stats.rx_ring_full = kernel.rx_ring_full;
        }
        self.stats.rx_invalid = self.lane.invalid_frames() + self.foreign_frames;
        self.stats
    }
}
