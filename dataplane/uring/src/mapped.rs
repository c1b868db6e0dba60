//! Files in memory, read by a copy out of a mapping: no system call, and no search for each page in the kernel.
//!
//! A file that somebody cuts short takes its pages out of the mapping, and touching one of them raises `SIGBUS`. A handler puts a
//! page of zeros there and notes that the mapping is lost: what was just copied does not count, and the file is read by system
//! calls from then on, which tell what is wrong (mmap(2); the same is done by servers of the Wayland protocol with the memory of
//! their clients).
//!
//! Invariants:
//! * What a copy gave counts only if the mapping was not lost by its end.
//! * The handler touches only the table here, whose entries are atomics, and makes one system call that is safe in a handler.
//! * An entry of the table is there before its mapping is read, and goes before the mapping does.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, compiler_fence};

use af_xdp::region::Pool;

use crate::{BLOCK_BYTES, BLOCKS_MAX, Blocks};

/// Mappings of a process: as many as a node has stores.
const MAPPINGS_MAX: usize = 64;

/// Bytes of a line of the processor's caches.
#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

/// Bytes of a large page.
const LARGE_PAGE_BYTES: usize = 2 << 20;

/// A mapping, as the handler knows it.
struct Entry {
    is_taken: AtomicBool,
    /// 0 while there is none.
    start: AtomicUsize,
    len_bytes: AtomicUsize,
    is_lost: AtomicBool,
}

static TABLE: [Entry; MAPPINGS_MAX] = [const {
    Entry {
        is_taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len_bytes: AtomicUsize::new(0),
        is_lost: AtomicBool::new(false),
    }
}; MAPPINGS_MAX];

/// What handled `SIGBUS` before.
static FORMER: OnceLock<libc::sigaction> = OnceLock::new();

/// A file in memory that is read by copies.
#[derive(Debug)]
pub struct MappedFile {
    start: NonNull<u8>,
    len_bytes: usize,
    entry: usize,
}

// SAFETY: the mapping is of the process, not of a thread; it is only read, and its state is in atomics.
unsafe impl Send for MappedFile {}
// SAFETY: as above.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps the first `len_bytes` of a file; `None` where that cannot be done: then it is read by system calls.
    #[must_use]
    pub fn new(file: BorrowedFd<'_>, len_bytes: u64) -> Option<MappedFile> {
        let len_bytes = usize::try_from(len_bytes).ok().filter(|len| *len > 0)?;
        handle_signal()?;
        let free = |entry: &Entry| !entry.is_taken.swap(true, Ordering::AcqRel);
        let entry = TABLE.iter().position(free)?;
        let Some(start) = map_aligned(file, len_bytes) else {
            TABLE[entry].is_taken.store(false, Ordering::Release);
            return None;
        };
        TABLE[entry].is_lost.store(false, Ordering::Relaxed);
        TABLE[entry].len_bytes.store(len_bytes, Ordering::Relaxed);
        TABLE[entry].start.store(start.as_ptr() as usize, Ordering::Release);
        Some(MappedFile { start, len_bytes, entry })
    }

    /// Reads `blocks.len()` blocks from `offset_bytes` on; whether it did. It does not beyond what is mapped, and not once the file
    /// has become shorter: whatever the chunks have then is to be read over.
    ///
    /// # Panics
    /// If a chunk has another handle.
    #[must_use]
    pub fn read(&self, offset_bytes: u64, blocks: &mut Blocks, pool: &mut Pool) -> bool {
        let offset = usize::try_from(offset_bytes).ok();
        let is_inside = offset
            .and_then(|offset| offset.checked_add(blocks.len_bytes()))
            .is_some_and(|end| end <= self.len_bytes);
        let Some(offset) = offset.filter(|_| is_inside && !self.is_lost()) else { return false };
        for index in 0..blocks.len() {
            let bytes = pool.bytes_mut(blocks.get_mut(index));
            // SAFETY: the source lies in the mapping, which lives as long as `self`, and the destination is a whole chunk that is
            // borrowed mutably. Others may write the file meanwhile; then the copy is a mixture, as that of a system call
            // would be, and its checksum tells. Pages that are gone are replaced by the handler.
            unsafe {
                let from = self.start.as_ptr().add(offset + index * BLOCK_BYTES);
                copy_block(from, bytes.as_mut_ptr());
            }
        }
        // The handler ran in this thread, between two instructions of the copy.
        compiler_fence(Ordering::SeqCst);
        !self.is_lost()
    }

    /// Asks the kernel to put those bytes, which the file must have, on large pages, and to map them as such: then a read has to look
    /// for fewer pages. Copies what is there, so it takes its time, and reads of the same bytes wait. The kernel may refuse, or not know
    /// how (before 6.1): then all stays as it is.
    pub fn join_pages(&self, offset_bytes: u64, len_bytes: u64) {
        let (Ok(offset), Ok(len_bytes)) = (usize::try_from(offset_bytes), usize::try_from(len_bytes)) else {
            return;
        };
        if self.is_lost() || offset.checked_add(len_bytes).is_none_or(|end| end > self.len_bytes) {
            return;
        }
        // SAFETY: a range of our own mapping; the advice changes neither what it holds nor who may do what with it.
        let _refused_or_done =
            unsafe { libc::madvise(self.start.as_ptr().add(offset).cast(), len_bytes, libc::MADV_COLLAPSE) };
    }

    /// Asks the processor to bring the first [`BLOCKS_MAX`] blocks of a [`MappedFile::read`] near, ahead of it. Into its second cache: the
    /// first one holds a few of them only, and is filled by fewer lines at a time. Without effect where there are none.
    pub fn prefetch(&self, offset_bytes: u64, count: usize) {
        let Ok(offset) = usize::try_from(offset_bytes) else { return };
        let len_bytes = count.min(BLOCKS_MAX) * BLOCK_BYTES;
        if offset.checked_add(len_bytes).is_none_or(|end| end > self.len_bytes) {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        for line in (offset..offset + len_bytes).step_by(LINE_BYTES) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: the address lies in the mapping, and a prefetch raises no fault where its page is gone.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.start.as_ptr().add(line).cast()) };
        }
    }

    fn is_lost(&self) -> bool {
        TABLE[self.entry].is_lost.load(Ordering::Relaxed)
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        TABLE[self.entry].start.store(0, Ordering::Release);
        // SAFETY: our own mapping, which nobody reads any more: readers borrow `self`.
        let ended = unsafe { libc::munmap(self.start.as_ptr().cast(), self.len_bytes) };
        debug_assert_eq!(ended, 0, "a mapping of ours can be unmapped");
        TABLE[self.entry].is_taken.store(false, Ordering::Release);
    }
}

/// Copies a block.
///
/// # Safety
/// Both are of [`BLOCK_BYTES`] bytes, do not overlap, and the second is nobody else's.
unsafe fn copy_block(from: *const u8, to: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the processor can; the rest is passed on to the caller.
        return unsafe { copy_block_by_vectors(from, to) };
    }
    // SAFETY: passed on to the caller.
    unsafe { std::ptr::copy_nonoverlapping(from, to, BLOCK_BYTES) };
}

/// As [`copy_block`]. The C library copies as much by the processor's string instruction, which is slower for bytes that a prefetch has
/// brought near.
///
/// # Safety
/// As for [`copy_block`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn copy_block_by_vectors(from: *const u8, to: *mut u8) {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_storeu_si256};
    const STEP_BYTES: usize = 4 * size_of::<__m256i>();
    const _: () = assert!(BLOCK_BYTES.is_multiple_of(STEP_BYTES));
    for at in (0..BLOCK_BYTES).step_by(STEP_BYTES) {
        // SAFETY: inside both blocks; the instructions ask for no alignment.
        unsafe {
            let (from, to) = (from.add(at).cast::<__m256i>(), to.add(at).cast::<__m256i>());
            let first = _mm256_loadu_si256(from);
            let second = _mm256_loadu_si256(from.add(1));
            let third = _mm256_loadu_si256(from.add(2));
            let fourth = _mm256_loadu_si256(from.add(3));
            _mm256_storeu_si256(to, first);
            _mm256_storeu_si256(to.add(1), second);
            _mm256_storeu_si256(to.add(2), third);
            _mm256_storeu_si256(to.add(3), fourth);
        }
    }
}

/// Maps a file for reading at a multiple of a large page, so that those of the file can be mapped as such.
fn map_aligned(file: BorrowedFd<'_>, len_bytes: usize) -> Option<NonNull<u8>> {
    let slack_bytes = len_bytes.checked_next_multiple_of(BLOCK_BYTES)?.checked_add(LARGE_PAGE_BYTES)?;
    // SAFETY: a new mapping at an address that the kernel chooses, which nobody touches.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            slack_bytes,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        return None;
    }
    let raw = raw.cast::<u8>();
    let lead_bytes = raw.align_offset(LARGE_PAGE_BYTES);
    // SAFETY: a part of our own mapping is replaced, and what is left of it on both sides goes. Nobody writes through it.
    unsafe {
        let start = raw.add(lead_bytes);
        let mapped = libc::mmap(
            start.cast(),
            len_bytes,
            libc::PROT_READ,
            libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED,
            file.as_raw_fd(),
            0,
        );
        if mapped == libc::MAP_FAILED {
            libc::munmap(raw.cast(), slack_bytes);
            return None;
        }
        if lead_bytes > 0 {
            libc::munmap(raw.cast(), lead_bytes);
        }
        let end = lead_bytes + len_bytes.next_multiple_of(BLOCK_BYTES);
        libc::munmap(raw.add(end).cast(), slack_bytes - end);
        NonNull::new(start)
    }
}

/// Installs the handler, once in a process.
fn handle_signal() -> Option<()> {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    let is_installed = INSTALLED.get_or_init(|| {
        // SAFETY: zeros are a valid `sigaction`: no flags, an empty mask.
        let (mut action, mut former): (libc::sigaction, libc::sigaction) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        // SAFETY: both point to valid memory, and nothing is installed yet.
        let asked = unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut former) };
        // Before the handler can run.
        let known = FORMER.set(former).is_ok();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler has the signature that SA_SIGINFO asks for, and does only what a handler may.
        asked == 0
            && known
            && unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } == 0
    });
    is_installed.then_some(())
}

/// Puts zeros where a page of a mapping is gone. Any other fault goes to whoever handled it before.
extern "C" fn on_bus_error(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid pointer, and SIGBUS has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let own = TABLE.iter().find(|entry| {
        let start = entry.start.load(Ordering::Acquire);
        start > 0 && address.checked_sub(start).is_some_and(|at| at < entry.len_bytes.load(Ordering::Relaxed))
    });
    let replaced = own.is_some_and(|entry| {
        entry.is_lost.store(true, Ordering::SeqCst);
        // SAFETY: a page in our own mapping is replaced by zeros; whoever reads it is in `MappedFile::read`, and looks at
        // `is_lost` afterwards.
        let page = unsafe {
            libc::mmap(
                (address & !(BLOCK_BYTES - 1)) as *mut libc::c_void,
                BLOCK_BYTES,
                libc::PROT_READ,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        page != libc::MAP_FAILED
    });
    if !replaced && let Some(former) = FORMER.get() {
        // SAFETY: what the kernel gave when the handler was installed. The instruction faults again, and meets it.
        unsafe { libc::sigaction(libc::SIGBUS, former, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use af_xdp::region::{Region, RegionConfig};

    use super::*;

    fn pool() -> Pool {
        Region::new(RegionConfig { cores: 1, chunks_per_core: 64, headers_per_core: 64 })
            .unwrap()
            .pool(0)
            .unwrap()
    }

    fn blocks(pool: &mut Pool, count: usize) -> Blocks {
        (0..count).map(|_| pool.take_chunk().unwrap()).collect()
    }

    #[test]
    fn a_mapping_gives_what_the_file_has_now() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(16 * BLOCK_BYTES as u64).unwrap();
        let mapped = MappedFile::new(file.as_fd(), 16 * BLOCK_BYTES as u64).unwrap();
        let mut pool = pool();
        let mut read = blocks(&mut pool, 3);
        for round in 1..4u8 {
            for block in 0..16u8 {
                file.write_all_at(&[round * 16 + block; BLOCK_BYTES], u64::from(block) * BLOCK_BYTES as u64)
                    .unwrap();
            }
            assert!(mapped.read(13 * BLOCK_BYTES as u64, &mut read, &mut pool));
            for (block, chunk) in (13..).zip(read.iter()) {
                assert_eq!(pool.region().bytes(chunk), [round * 16 + block; BLOCK_BYTES]);
            }
        }
        assert!(!mapped.read(14 * BLOCK_BYTES as u64, &mut read, &mut pool), "beyond its end");
        assert!(!mapped.read(u64::MAX - 4095, &mut read, &mut pool));
    }

    #[test]
    fn a_file_cut_short_is_not_read_by_its_mapping_any_more() {
        let files: Vec<_> = (0..2).map(|_| tempfile::tempfile_in("/dev/shm").unwrap()).collect();
        let len = 8 * BLOCK_BYTES as u64;
        let mut pool = pool();
        let mut read = blocks(&mut pool, 2);
        let mapped: Vec<_> = files
            .iter()
            .map(|file| {
                file.write_all_at(&[7; 8 * BLOCK_BYTES], 0).unwrap();
                MappedFile::new(file.as_fd(), len).unwrap()
            })
            .collect();
        files[0].set_len(5 * BLOCK_BYTES as u64).unwrap();
        assert!(mapped[0].read(3 * BLOCK_BYTES as u64, &mut read, &mut pool), "what is left is there");
        assert!(!mapped[0].read(4 * BLOCK_BYTES as u64, &mut read, &mut pool), "its second block is gone");
        files[0].set_len(len).unwrap();
        assert!(!mapped[0].read(0, &mut read, &mut pool), "and it is not trusted again");
        assert!(mapped[1].read(4 * BLOCK_BYTES as u64, &mut read, &mut pool), "other files are");
        drop(mapped);
        let again = MappedFile::new(files[0].as_fd(), len).unwrap();
        assert!(again.read(0, &mut read, &mut pool));
        assert_eq!(pool.region().bytes(read.get(0)), [7; BLOCK_BYTES]);
    }

    #[test]
    fn large_pages_change_nothing_but_the_pace() {
        const MIB: u64 = 1 << 20;
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let len = 8 * MIB;
        let fill = |round: u8| {
            for at in (0..len).step_by(BLOCK_BYTES) {
                let block = u8::try_from(at / BLOCK_BYTES as u64 % 251).unwrap();
                file.write_all_at(&[block ^ round; BLOCK_BYTES], at).unwrap();
            }
        };
        fill(0);
        let mapped = MappedFile::new(file.as_fd(), len).unwrap();
        assert_eq!(mapped.start.as_ptr().addr() % LARGE_PAGE_BYTES, 0);
        let mut pool = pool();
        let mut read = blocks(&mut pool, 2);
        for round in 0..3u8 {
            for at in (0..len - 4096).step_by(37 * BLOCK_BYTES) {
                mapped.prefetch(at, 2);
                assert!(mapped.read(at, &mut read, &mut pool));
                for (block, chunk) in (at / BLOCK_BYTES as u64..).zip(read.iter()) {
                    let byte = u8::try_from(block % 251).unwrap() ^ round;
                    assert_eq!(pool.region().bytes(chunk), [byte; BLOCK_BYTES]);
                }
            }
            // Whether the kernel does it or not; the second time they are large already.
            mapped.join_pages(0, len);
            fill(round + 1);
        }
        mapped.join_pages(4 * MIB, 8 * MIB);
        mapped.join_pages(u64::MAX - 5, 8);
        mapped.prefetch(len - BLOCK_BYTES as u64, 2);
        mapped.prefetch(u64::MAX - 5, 2);
        // In the middle of a large page.
        file.set_len(5 * MIB).unwrap();
        mapped.prefetch(6 * MIB, 2);
        assert!(mapped.read(5 * MIB - 2 * BLOCK_BYTES as u64, &mut read, &mut pool), "what is left is there");
        assert!(!mapped.read(5 * MIB - BLOCK_BYTES as u64, &mut read, &mut pool), "its second block is gone");
        assert!(!mapped.read(0, &mut read, &mut pool), "and it is not trusted again");
        mapped.join_pages(0, len);
    }
}
