//! Frames in, pieces to be sent out: bytes of headers and bodies, and handles of blocks, which nobody copies.
//!
//! What holds:
//! * Frames leave in the order they came, each whole.
//! * What waits is bounded; who has more to say keeps it.
//! * A block's handle is either here or with whoever sends, until it is handed back.

use std::collections::VecDeque;

use super::BLOCK_BYTES;
use crate::wire::Frame;

/// What is sent at once, as the driver has it.
pub trait Outgoing<B> {
    /// Pieces that it still has room for: bytes are one, each block is one.
    fn room(&self) -> usize;

    /// Appends bytes; they may become one piece with bytes before them.
    fn bytes(&mut self, bytes: &[u8]);

    /// Appends blocks.
    fn blocks(&mut self, blocks: B);
}

/// A frame whose header and body lie in the queue's bytes.
#[derive(Debug)]
struct Queued<B> {
    bytes: usize,
    count: usize,
    blocks: B,
}

/// The sending end of one stream.
#[derive(Debug)]
pub struct Sender<B> {
    frames: VecDeque<Queued<B>>,
    /// Headers and bodies of the frames, from `taken` on.
    heads: Vec<u8>,
    taken: usize,
    blocks_bytes: usize,
    bytes_max: usize,
}

impl<B: Default> Sender<B> {
    /// A queue of so many bytes; a longer frame is taken when there is no other.
    #[must_use]
    pub fn new(bytes_max: usize) -> Sender<B> {
        Sender { frames: VecDeque::new(), heads: Vec::new(), taken: 0, blocks_bytes: 0, bytes_max }
    }

    /// Takes a frame with its blocks, as many as its checksums.
    ///
    /// # Errors
    /// Both, when there is no room.
    ///
    /// # Panics
    /// As [`Frame::encode`].
    #[expect(
        clippy::result_large_err,
        reason = "what is refused goes back as it came, without an allocation"
    )]
    pub fn push(&mut self, frame: Frame, blocks: B) -> Result<(), (Frame, B)> {
        let begin = self.heads.len();
        let count = frame.block_crcs().len();
        frame.encode(&mut self.heads);
        let more = count * BLOCK_BYTES;
        if !self.frames.is_empty() && self.waiting_bytes() + more > self.bytes_max {
            self.heads.truncate(begin);
            return Err((frame, blocks));
        }
        self.blocks_bytes += more;
        self.frames.push_back(Queued { bytes: self.heads.len() - begin, count, blocks });
        Ok(())
    }

    /// Takes bytes that go before all frames that come later.
    pub(super) fn lead(&mut self, bytes: &[u8]) {
        self.heads.extend_from_slice(bytes);
        self.frames.push_back(Queued { bytes: bytes.len(), count: 0, blocks: B::default() });
    }

    /// Bytes that wait.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.heads.len() - self.taken + self.blocks_bytes
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Moves as many frames as there is room for.
    pub fn fill(&mut self, out: &mut impl Outgoing<B>) {
        while let Some(frame) = self.frames.pop_front_if(|frame| frame.count < out.room()) {
            out.bytes(&self.heads[self.taken..self.taken + frame.bytes]);
            if frame.count > 0 {
                out.blocks(frame.blocks);
            }
            self.taken += frame.bytes;
            self.blocks_bytes -= frame.count * BLOCK_BYTES;
        }
        if self.frames.is_empty() {
            self.heads.clear();
            self.taken = 0;
        } else if self.taken > self.heads.len() / 2 {
            self.heads.drain(..self.taken);
            self.taken = 0;
        }
    }

    /// Hands back the blocks of a frame that was not taken to be sent, and forgets the frame.
    pub fn take_unsent(&mut self) -> Option<B> {
        let frame = self.frames.pop_front()?;
        if self.frames.is_empty() {
            self.heads.clear();
            self.taken = 0;
            self.blocks_bytes = 0;
        } else {
            self.taken += frame.bytes;
            self.blocks_bytes -= frame.count * BLOCK_BYTES;
        }
        Some(frame.blocks)
    }
}
