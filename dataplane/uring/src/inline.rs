//! Disk requests done at once by the calling thread, for stores in memory.
//!
//! io_uring hands every request on tmpfs to a worker thread, since that file system cannot do non-blocking I/O; the copy
//! itself is faster than the hand-over.

use std::os::fd::{AsRawFd, BorrowedFd};

use af_xdp::region::Pool;

use crate::{BLOCKS_LONG_MAX, BLOCKS_MAX, Blocks, IoError, NO_VECTOR, outcome, point_to};

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
    let offset = file_offset(offset_bytes);
    let moved = with_vectors(blocks, pool, |vectors, count| {
        // SAFETY: the vectors live on the stack of `with_vectors` for the length of the call, `count` of them are set, and
        // they name whole chunks whose only handles are borrowed mutably for as long.
        unsafe { libc::preadv(file.as_raw_fd(), vectors, count, offset) }
    });
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
    let offset = file_offset(offset_bytes);
    let moved = with_vectors(blocks, pool, |vectors, count| {
        // SAFETY: as in `read_inline`, but that the handles are borrowed shared: the kernel only reads.
        unsafe { libc::pwritev(file.as_raw_fd(), vectors, count, offset) }
    });
    finish(moved, blocks)
}

/// Gives `call` the vectors of the blocks and their number, from the stack: 48 bytes, or 4 KiB for a long list.
fn with_vectors(
    blocks: &Blocks,
    pool: &Pool,
    call: impl FnOnce(*const libc::iovec, libc::c_int) -> isize,
) -> isize {
    if blocks.len() <= BLOCKS_MAX {
        call_with::<BLOCKS_MAX>(blocks, pool, call)
    } else {
        call_with::<BLOCKS_LONG_MAX>(blocks, pool, call)
    }
}

fn call_with<const MAX: usize>(
    blocks: &Blocks,
    pool: &Pool,
    call: impl FnOnce(*const libc::iovec, libc::c_int) -> isize,
) -> isize {
    let mut vectors = [NO_VECTOR; MAX];
    point_to(&mut vectors, blocks, pool.region());
    // A list is never longer than BLOCKS_LONG_MAX.
    call(vectors.as_ptr(), libc::c_int::try_from(blocks.len()).expect("at most 256"))
}

fn file_offset(offset_bytes: u64) -> libc::off_t {
    libc::off_t::try_from(offset_bytes).expect("offsets of a file are positive and signed")
}

fn finish(moved: isize, blocks: &Blocks) -> Result<(), IoError> {
    let result = match i32::try_from(moved) {
        Ok(-1) => -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        Ok(bytes) => bytes,
        Err(_) => unreachable!("at most 256 blocks were asked for"),
    };
    outcome(result, blocks.len_bytes())
}
