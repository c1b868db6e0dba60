//! A queue on AF_PACKET: one socket takes the whole interface.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};

use af_xdp::frame::{RxFrame, TxFrame};
use af_xdp::packet::{BATCH, PacketSocket};
use af_xdp::region::{Chunk, Pool};

use super::LinkStats;

/// Frames that may wait to be sent or reaped.
const TRANSMIT_FRAMES: usize = 1024;

#[derive(Debug)]
pub(super) struct PacketQueue {
    socket: PacketSocket,
    /// Frames in order of arrival; the first `sent` of them are done and wait to be reaped.
    frames: VecDeque<TxFrame>,
    sent: usize,
    stats: LinkStats,
}

impl PacketQueue {
    pub(super) fn new(socket: PacketSocket) -> Self {
        Self {
            socket,
            frames: VecDeque::with_capacity(TRANSMIT_FRAMES),
            sent: 0,
            stats: LinkStats::default(),
        }
    }

    pub(super) fn receive(&mut self, pool: &mut Pool, out: &mut Vec<RxFrame>) -> usize {
        let room = out.capacity() - out.len();
        let stats = &mut self.stats;
        stats.kicks += 1;
        let got = self.socket.receive(room, pool, |frame| {
            stats.rx_frames += 1;
            stats.rx_bytes += frame.len() as u64;
            out.push(frame);
        });
        // An interface that went down says so here; frames come again when it is up again.
        got.unwrap_or(0)
    }

    pub(super) fn transmit(&mut self, frame: TxFrame) -> Result<(), TxFrame> {
        if self.frames.len() == TRANSMIT_FRAMES {
            self.stats.tx_ring_full += 1;
            return Err(frame);
        }
        self.frames.push_back(frame);
        Ok(())
    }

    pub(super) fn flush(&mut self) -> bool {
        while self.tx_pending() {
            self.stats.kicks += 1;
            let done = self.socket.send(self.frames.range(self.sent..).take(BATCH));
            if done == 0 {
                return false;
            }
            for frame in self.frames.range(self.sent..self.sent + done) {
                self.stats.tx_frames += 1;
                self.stats.tx_bytes += frame.len() as u64;
            }
            self.sent += done;
        }
        true
    }

    pub(super) fn reap(&mut self, pool: &mut Pool, foreign: &mut dyn FnMut(Chunk)) {
        for frame in self.frames.drain(..self.sent) {
            release_frame(frame, pool, foreign);
        }
        self.sent = 0;
    }

    pub(super) fn poll_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn has_rx(&self) -> bool {
        self.socket.has_receivable()
    }

    pub(super) fn tx_pending(&self) -> bool {
        self.sent < self.frames.len()
    }

    pub(super) fn stats(&mut self) -> LinkStats {
        let kernel = self.socket.statistics();
        let mut stats = self.stats;
        stats.rx_dropped = kernel.dropped_full;
        stats.rx_ring_full = kernel.dropped_full;
        stats.rx_invalid = kernel.truncated;
        stats.tx_frames -= kernel.send_refused;
        stats.tx_dropped = kernel.send_refused;
        stats.fill_chunks = self.socket.posted_chunks() as u64;
        stats.tx_outstanding = self.frames.len() as u64;
        stats
    }
}

/// Releases what a frame holds: to `pool` what is its own, to `foreign` the chunks of other cores.
pub(super) fn release_frame(frame: TxFrame, pool: &mut Pool, foreign: &mut dyn FnMut(Chunk)) {
    pool.release_header(frame.header);
    for segment in frame.data {
        release_chunk(segment.chunk, pool, foreign);
    }
}

/// Releases one chunk to `pool` or to `foreign`.
pub(super) fn release_chunk(chunk: Chunk, pool: &mut Pool, foreign: &mut dyn FnMut(Chunk)) {
    if pool.owns(&chunk) {
        pool.release(chunk);
    } else {
        foreign(chunk);
    }
}
