//! The io_uring of one reactor: disk requests whose buffers are chunks of frame memory, stream sockets that receive into such
//! chunks and send them, readiness of other descriptors, and wake-ups between reactors.
//!
//! The one place of the data plane where memory is handed to the kernel, so the one with `unsafe` in it. Invariants:
//! * A request owns its chunks ([`Blocks`]) from the moment it is accepted until its completion hands them back; so no
//!   safe code can read or change bytes that the kernel is working on.
//! * The kernel writes only to chunks with a single handle ([`Ring::read`] and [`Ring::give_back`] assert it).
//! * The frame memory is registered as fixed buffers and outlives the ring, which holds it.
//! * Every table is sized at construction: no request of up to [`BLOCKS_MAX`] blocks allocates. Longer ones take their
//!   vectors from a table as well, which grows only while more of them are in flight than ever before.
//!
//! A ring belongs to the thread that made it (`IORING_SETUP_SINGLE_ISSUER`), completions are gathered when that thread
//! asks (`DEFER_TASKRUN`), and `TASKRUN_FLAG` tells without a system call whether there are any to gather.

mod blocks;
mod inline;
mod mapped;
mod message;
mod provided;
mod ring;
mod sockets;

pub use blocks::{BLOCKS_LONG_MAX, BLOCKS_MAX, Blocks, IntoIter};
pub use inline::{read_inline, write_inline};
pub use mapped::MappedFile;
pub use message::{MESSAGE_PIECES_MAX, Message};
pub use ring::{Event, FileId, Finished, Full, Ring, RingConfig, RingError, WakeHandle};
pub use sockets::{NoPlace, SocketEvent, SocketId, SocketsConfig};

/// Bytes of a block: the unit of disk requests, and a chunk of frame memory.
pub const BLOCK_BYTES: usize = af_xdp::region::CHUNK_BYTES;

/// How a disk request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The kernel said so; the number is positive (`errno`).
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Errno(i32),
    /// Fewer bytes were moved than asked for: the device or file is shorter than it was.
    #[error("only {done_bytes} bytes were moved")]
    Short {
        /// Bytes that were moved.
        done_bytes: usize,
    },
}

impl IoError {
    /// Whether the file system had no room; the same request may end well later.
    #[must_use]
    pub fn is_no_space(self) -> bool {
        matches!(self, IoError::Errno(libc::ENOSPC | libc::EDQUOT))
    }
}

/// Turns the result of a request for `asked_bytes` into the outcome.
fn outcome(result: i32, asked_bytes: usize) -> Result<(), IoError> {
    match usize::try_from(result) {
        Ok(done_bytes) if done_bytes == asked_bytes => Ok(()),
        Ok(done_bytes) => Err(IoError::Short { done_bytes }),
        Err(_) => Err(IoError::Errno(-result)),
    }
}

/// A vector that names nothing.
const NO_VECTOR: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// Lets the first `blocks.len()` vectors name the chunks, in order.
///
/// # Panics
/// If there are fewer vectors than chunks.
fn point_to(vectors: &mut [libc::iovec], blocks: &Blocks, region: &af_xdp::region::Region) {
    for (vector, chunk) in vectors[..blocks.len()].iter_mut().zip(blocks) {
        *vector = libc::iovec { iov_base: region.chunk_pointer(chunk).as_ptr().cast(), iov_len: BLOCK_BYTES };
    }
}
