//! Any pieces of a stream in, frames out.
//!
//! What holds:
//! * A frame is given when its header and body are whole and every block behind it has the checksum that the body names: a block
//!   that does not match ends the stream (I7).
//! * A block's bytes are copied once, in the pass that checks them, to where the caller wants them.
//! * What a header claims is believed for lengths only: memory is taken as bytes come, for a body up to [`BODY_MAX`], for
//!   blocks one at a time from the caller, who may have none at the moment: then nothing more is taken until it has.

use zerocopy::FromBytes;

use super::handshake::{HEAD_BYTES, MAGIC, RawHead, kind};
use super::{BLOCK_BYTES, Side};
use crate::wire::{BODY_MAX, Frame, HEADER_BYTES, Header, WireError};

/// A body's memory is kept for the next one up to this size.
const BODY_KEPT: usize = 64 << 10;

/// Where blocks go, as the driver has it.
pub trait Destination {
    /// Blocks of 4 KiB, in order.
    type Blocks: Default;

    /// Appends a block, whatever is in it; false when there is no memory at the moment, and nothing has changed then.
    fn add(&mut self, blocks: &mut Self::Blocks) -> bool;

    /// Copies bytes into the last block, from byte `at` of it on, and gives the CRC32C `crc` continued over them (0 begins
    /// a new one).
    fn copy(&mut self, blocks: &mut Self::Blocks, at: usize, bytes: &[u8], crc: u32) -> u32;

    /// Takes blocks back of which nothing will come.
    fn release(&mut self, blocks: Self::Blocks);
}

/// Why a stream makes no sense any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// No frame.
    #[error("the other side's bytes are no frame: {0}")]
    Frame(#[from] WireError),
    /// A frame that only the other end of a connection sends.
    #[error("the other side has sent a frame of the wrong direction")]
    Direction,
    /// A block changed on its way.
    #[error(
        "block {block} of a frame has the checksum {found:08x} in place of {expected:08x}: it changed on its way"
    )]
    Block {
        /// Which of the frame's, from 0 on.
        block: usize,
        /// What the frame says.
        expected: u32,
        /// What the bytes have.
        found: u32,
    },
}

/// What is being waited for.
#[derive(Debug)]
enum State<B> {
    Header,
    Body(Header),
    Blocks {
        frame: Frame,
        blocks: B,
        /// Which block, how much of it is there, and the checksum of that.
        block: usize,
        done_bytes: usize,
        crc: u32,
    },
}

/// The receiving end of one stream.
#[derive(Debug)]
pub struct Receiver<B> {
    /// Who speaks.
    from: Side,
    state: State<B>,
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    body: Vec<u8>,
    is_starved: bool,
}

impl<B: Default> Receiver<B> {
    /// The end that hears the side `from`.
    #[must_use]
    pub fn new(from: Side) -> Receiver<B> {
        Receiver {
            from,
            state: State::Header,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            body: Vec::new(),
            is_starved: false,
        }
    }

    /// Takes bytes up to the end of a frame, or all, or as long as there is memory for blocks, and says how many.
    ///
    /// # Errors
    /// [`StreamError`]: the stream is of no use any more.
    pub fn take<D: Destination<Blocks = B>>(
        &mut self,
        bytes: &[u8],
        destination: &mut D,
    ) -> Result<(usize, Option<(Frame, B)>), StreamError> {
        let mut taken = 0;
        self.is_starved = false;
        loop {
            let rest = &bytes[taken..];
            let (count, is_whole) = match &mut self.state {
                State::Header => self.take_header(rest)?,
                State::Body(header) => {
                    let count = (header.body_bytes - self.body.len()).min(rest.len());
                    self.body.extend_from_slice(&rest[..count]);
                    (count, self.body.len() == header.body_bytes)
                }
                State::Blocks { .. } => self.take_blocks(rest, destination)?,
            };
            taken += count;
            if !is_whole {
                return Ok((taken, None));
            }
            if let Some(frame) = self.step_on()? {
                return Ok((taken, Some(frame)));
            }
        }
    }

    /// Whether the last call left bytes because the caller had no memory for a block.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        self.is_starved
    }

    /// Gives back what has been taken for a frame that will not be whole.
    pub fn end<D: Destination<Blocks = B>>(&mut self, destination: &mut D) {
        if let State::Blocks { blocks, .. } = std::mem::replace(&mut self.state, State::Header) {
            destination.release(blocks);
        }
    }

    /// Takes bytes of a header, and whole beats before it.
    fn take_header(&mut self, bytes: &[u8]) -> Result<(usize, bool), StreamError> {
        let mut taken = 0;
        loop {
            let wanted = if self.header_bytes < HEAD_BYTES { HEAD_BYTES } else { HEADER_BYTES };
            let count = (wanted - self.header_bytes).min(bytes.len() - taken);
            self.header[self.header_bytes..self.header_bytes + count]
                .copy_from_slice(&bytes[taken..taken + count]);
            self.header_bytes += count;
            taken += count;
            if self.header_bytes == HEADER_BYTES {
                return Ok((taken, true));
            }
            if self.header_bytes < wanted {
                return Ok((taken, false));
            }
            if self.is_beat()? {
                self.header_bytes = 0;
            }
        }
    }

    /// Whether the first bytes are a beat, and not a frame's.
    fn is_beat(&self) -> Result<bool, StreamError> {
        let (head, _) = RawHead::read_from_prefix(&self.header).map_err(|_| WireError::Length)?;
        if head.magic.get() != MAGIC {
            return Ok(false);
        }
        let is_right = head.kind == kind::BEAT
            && head.side == self.from.code()
            && usize::from(head.len_bytes.get()) == HEAD_BYTES;
        if is_right { Ok(true) } else { Err(WireError::Value("a message between frames").into()) }
    }

    /// Copies bytes into blocks until the frame has all of them.
    fn take_blocks<D: Destination<Blocks = B>>(
        &mut self,
        bytes: &[u8],
        destination: &mut D,
    ) -> Result<(usize, bool), StreamError> {
        let State::Blocks { frame, blocks, block, done_bytes, crc } = &mut self.state else {
            return Ok((0, false));
        };
        let crcs = frame.block_crcs();
        let mut taken = 0;
        while *block < crcs.len() {
            if taken == bytes.len() {
                return Ok((taken, false));
            }
            if *done_bytes == 0 && !destination.add(blocks) {
                self.is_starved = true;
                return Ok((taken, false));
            }
            let count = (BLOCK_BYTES - *done_bytes).min(bytes.len() - taken);
            *crc = destination.copy(blocks, *done_bytes, &bytes[taken..taken + count], *crc);
            taken += count;
            *done_bytes += count;
            if *done_bytes == BLOCK_BYTES {
                let (expected, found) = (crcs[*block], *crc);
                if found != expected {
                    return Err(StreamError::Block { block: *block, expected, found });
                }
                (*block, *done_bytes, *crc) = (*block + 1, 0, 0);
            }
        }
        Ok((taken, true))
    }

    /// Goes on from a part that is whole; gives the frame when that was the last.
    fn step_on(&mut self) -> Result<Option<(Frame, B)>, StreamError> {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Header => {
                self.header_bytes = 0;
                self.state = State::Body(Header::decode(&self.header)?);
            }
            State::Body(header) => {
                debug_assert!(header.body_bytes <= BODY_MAX, "a header says no more");
                let frame = header.decode_body(&self.body)?;
                self.body.clear();
                self.body.shrink_to(BODY_KEPT);
                if !self.from.sends(&frame) {
                    return Err(StreamError::Direction);
                }
                self.state = State::Blocks { frame, blocks: B::default(), block: 0, done_bytes: 0, crc: 0 };
            }
            State::Blocks { frame, blocks, .. } => return Ok(Some((frame, blocks))),
        }
        Ok(None)
    }
}
