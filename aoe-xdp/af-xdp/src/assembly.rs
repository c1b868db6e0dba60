//! Frames out of receive descriptors, whichever socket of a queue they came by.
//!
//! Invariant: each chunk that the kernel gave back leaves here once, in a delivered frame or to whoever takes refused ones.

use std::sync::Arc;

use crate::frame::{RxFrame, Segment, Segments};
use crate::region::{CHUNK_BYTES, Chunk, Region};
use crate::ring::Consumer;

/// Bytes that the first slice of a received frame must hold, unless it is the whole frame: 36 of headers and a tag.
const HEAD_BYTES: u16 = 40;

/// What one call of [`Assembly::receive`] did.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Received {
    /// Frames delivered.
    pub(crate) frames: usize,
    /// Chunks that the kernel gave back, those of refused frames included.
    pub(crate) chunks: u32,
}

/// The frame that is being received on one socket.
#[derive(Debug)]
pub(crate) struct Assembly {
    region: Arc<Region>,
    partial: Segments,
    /// The frame being received cannot be delivered: drop what is left of it.
    partial_bad: bool,
    invalid_frames: u64,
}

impl Assembly {
    pub(crate) fn new(region: Arc<Region>) -> Self {
        Self { region, partial: Segments::new(), partial_bad: false, invalid_frames: 0 }
    }

    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Frames dropped here: too many slices, or a head too short.
    pub(crate) fn invalid_frames(&self) -> u64 {
        self.invalid_frames
    }

    /// Takes up to `max` frames out of `ring`, an 802.1Q tag taken out of each; chunks of frames that cannot be delivered
    /// go to `refuse`, with how many have been taken out until then.
    pub(crate) fn receive(
        &mut self,
        ring: &mut Consumer<libc::xdp_desc>,
        max: usize,
        mut refuse: impl FnMut(Chunk, u32),
        mut deliver: impl FnMut(RxFrame),
    ) -> Received {
        let mut received = Received::default();
        while received.frames < max {
            let Some(descriptor) = ring.pop() else { break };
            received.chunks += 1;
            let mut refuse = |chunk| refuse(chunk, received.chunks);
            let last = descriptor.options & libc::XDP_PKT_CONTD == 0;
            self.collect(descriptor.addr, descriptor.len, last, &mut refuse);
            if last && let Some(frame) = self.finish_frame(&mut refuse) {
                received.frames += 1;
                deliver(frame);
            }
        }
        ring.release();
        received
    }

    /// Adds a received descriptor to the frame it belongs to.
    fn collect(&mut self, address: u64, length: u32, last: bool, refuse: &mut impl FnMut(Chunk)) {
        // SAFETY: the kernel gives each chunk of the fill ring back once, by the receive ring of one socket.
        let Some(chunk) = (unsafe { self.region.chunk_from_offset(address) }) else {
            self.partial_bad = true;
            return;
        };
        let offset = u16::try_from(address % CHUNK_BYTES as u64).expect("an offset in a chunk is small");
        // Only a kernel that breaks its word gives a length beyond the chunk.
        let len = u16::try_from(length).unwrap_or(u16::MAX);
        let segment = Segment { chunk, offset, len };
        let short_head = self.partial.is_empty() && !last && len < HEAD_BYTES;
        if self.partial_bad || short_head || !segment.is_inside() {
            self.partial_bad = true;
            refuse(segment.chunk);
        } else if let Err(surplus) = self.partial.push(segment) {
            self.partial_bad = true;
            refuse(surplus.chunk);
        }
    }

    /// The frame whose last descriptor came; none where it cannot be delivered.
    fn finish_frame(&mut self, refuse: &mut impl FnMut(Chunk)) -> Option<RxFrame> {
        let segments = std::mem::take(&mut self.partial);
        if self.partial_bad || segments.is_empty() {
            for segment in segments {
                refuse(segment.chunk);
            }
            self.partial_bad = false;
            self.invalid_frames += 1;
            return None;
        }
        let mut frame = RxFrame::new(segments);
        // SAFETY: the chunks came from the kernel just now. Only handles fresh from a pool, each the only one of its chunk,
        // are given to it for receiving.
        unsafe { frame.take_tag_out(&self.region) };
        Some(frame)
    }
}
