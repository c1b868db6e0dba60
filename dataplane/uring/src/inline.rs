//! Disk requests done at once by the calling thread, for stores in memory.
//!
//! io_uring hands every request on tmpfs to a worker thread, since that file system cannot do non-blocking I/O; the copy
//! itself is faster than the hand-over.

use std::os::fd::{AsRawFd, BorrowedFd};

use af_xdp::region::Pool;

use crate::{BLOCK_BYTES, BLOCKS_MAX, Blocks, IoError, outcome};

/// Reads `blocks.len()` blocks from `offset_bytes` on.
///
/// # Errors
/// As the file gave it.
///
/// # Panics
/// If a chunk has another handle.
pub fn read_inline(
    file: BorrowedFd<'_>,
    offset_bytes: u64,
    blocks: &mut Blocks,
    pool: &Pool,
) -> Result<(), IoError> {
    assert!(blocks.iter().all(|chunk| pool.references(chunk) == 1), "only the only handle is read into");
    let vectors = vectors(blocks, pool);
    let offset = file_offset(offset_bytes);
    // SAFETY: the vectors name whole chunks whose only handles are borrowed mutably for the length of the call.
    let moved = unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), vector_count(blocks), offset) };
    finish(moved, blocks)
}

/// Writes the blocks from `offset_bytes` on.
///
/// # Errors
/// As the file gave it.
pub fn write_inline(
    file: BorrowedFd<'_>,
    offset_bytes: u64,
    blocks: &Blocks,
    pool: &Pool,
) -> Result<(), IoError> {
    let vectors = vectors(blocks, pool);
    let offset = file_offset(offset_bytes);
    // SAFETY: the vectors name whole chunks whose handles are borrowed for the length of the call; the kernel only reads.
    let moved = unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), vector_count(blocks), offset) };
    finish(moved, blocks)
}

fn vectors(blocks: &Blocks, pool: &Pool) -> [libc::iovec; BLOCKS_MAX] {
    let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BLOCKS_MAX];
    for (vector, chunk) in vectors.iter_mut().zip(blocks.iter()) {
        *vector = libc::iovec {
            iov_base: pool.region().chunk_pointer(chunk).as_ptr().cast(),
            iov_len: BLOCK_BYTES,
        };
    }
    vectors
}

fn vector_count(blocks: &Blocks) -> i32 {
    i32::try_from(blocks.len()).expect("at most three")
}

fn file_offset(offset_bytes: u64) -> libc::off_t {
    libc::off_t::try_from(offset_bytes).expect("offsets of a file are positive and signed")
}

fn finish(moved: isize, blocks: &Blocks) -> Result<(), IoError> {
    let result = match i32::try_from(moved) {
        Ok(-1) => -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        Ok(bytes) => bytes,
        Err(_) => unreachable!("at most three blocks were asked for"),
    };
    outcome(result, blocks.len_bytes())
}
