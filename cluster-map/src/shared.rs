//! The file in memory: mapping it, viewing it as atomics, sleeping on one of its words, locking a role.
//!
//! The only module of the crate with `unsafe`. What it hands out cannot break memory safety whatever the other process
//! writes: atomics accept every bit pattern, and no reference to plain memory of the map ever exists.
#![allow(unsafe_code)]

use crate::error::Role;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

/// A file mapped shared, from its start, for reading and writing, until it is dropped.
///
/// The file must keep its size: touching a page that was cut off kills the process (SIGBUS). Nobody who follows this
/// crate cuts a map, a new one replaces the old by rename, and only the owner of the file may (mode 0600).
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
    file: File,
}

// SAFETY: the pointer is to memory that belongs to no thread and is reached through atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above; the file is `Sync` itself.
unsafe impl Sync for Mapping {}

fn result(code: libc::c_int) -> io::Result<()> {
    if code == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn offset(bytes: usize) -> io::Result<libc::off_t> {
    libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl Mapping {
    /// Maps the first `len` bytes of `file`, which must have them.
    pub(crate) fn new(file: File, len: usize) -> io::Result<Self> {
        if len == 0 || file.metadata()?.len() < len as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the file was cut"));
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use; the descriptor is
        // open and the result is checked.
        let start = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, words: len / size_of::<AtomicU64>(), file })
    }

    /// What is mapped, as words.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is page-aligned and `words` words from it are mapped readable and writable until `self` is
        // dropped, which the result's lifetime excludes. Every bit pattern is an `AtomicU64`, and whoever else has the
        // file mapped uses atomic accesses too (this crate is the only one that maps it).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }

    /// The first four bytes of a word as a futex; `None` outside the mapping.
    ///
    /// Such a word is never used as 64 bits: accesses of two sizes to the same memory would not be ordered.
    pub(crate) fn futex(&self, word: usize) -> Option<&AtomicU32> {
        let word = self.words().get(word)?;
        // SAFETY: the pointer is valid and aligned for 8 bytes, hence for 4, as long as `self` is borrowed; all
        // processes reach these four bytes as an `AtomicU32` only (the layout gives signals words of their own).
        Some(unsafe { AtomicU32::from_ptr(word.as_ptr().cast()) })
    }

    /// Has the file system provide the pages of these bytes of the file, so that touching them cannot fail.
    pub(crate) fn reserve(&self, bytes: Range<usize>) -> io::Result<()> {
        let (start, len) = (offset(bytes.start)?, offset(bytes.len())?);
        if len == 0 {
            return Ok(());
        }
        loop {
            // SAFETY: no memory is passed; FALLOC_FL_KEEP_SIZE changes neither content nor size of the file.
            let code =
                unsafe { libc::fallocate(self.file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, start, len) };
            match result(code) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }

    /// Takes a role; false if another open file has it. It lasts until [`release`](Self::release) or, however the
    /// process ends, until the kernel has closed the file, which is after its last access to the memory.
    pub(crate) fn take(&self, role: Role) -> io::Result<bool> {
        let lock = role_lock(role, libc::F_WRLCK);
        // SAFETY: F_OFD_SETLK reads the structure, which outlives the call.
        match result(unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }) {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives a role back.
    pub(crate) fn release(&self, role: Role) -> io::Result<()> {
        let lock = role_lock(role, libc::F_UNLCK);
        // SAFETY: as in `take`.
        result(unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
    }

    /// Whether another open file has the role.
    pub(crate) fn is_taken(&self, role: Role) -> io::Result<bool> {
        let mut lock = role_lock(role, libc::F_WRLCK);
        // SAFETY: F_OFD_GETLK reads and writes the structure, which is borrowed exclusively for the call.
        result(unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
        Ok(lock.l_type != lock_type(libc::F_UNLCK))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` with this length and no reference into it outlives `self`. An error
        // could only say that it is not mapped.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}

fn lock_type(kind: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(kind).expect("lock kinds are 0 to 2")
}

/// The lock of one role: one byte of the file each, the second and the third, of the open file (not of the process), so
/// that two handles in one process exclude each other too.
fn role_lock(role: Role, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: lock_type(kind),
        l_whence: lock_type(libc::SEEK_SET),
        l_start: match role {
            Role::Control => 1,
            Role::DataPlane => 2,
        },
        l_len: 1,
        l_pid: 0,
    }
}

/// Sleeps while `word` is `value`, at most for `timeout`; wakes early without a reason now and then.
pub(crate) fn futex_wait(word: &AtomicU32, value: u32, timeout: Duration) -> io::Result<()> {
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let no_word = std::ptr::null::<u32>();
    // SAFETY: the word is valid and aligned while it is borrowed, the kernel only reads it; the time is read during the
    // call. Without FUTEX_PRIVATE_FLAG the word is found by file and offset, from any process.
    let code = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            value,
            &raw const timeout,
            no_word,
            0_u32,
        )
    };
    match io::Error::last_os_error() {
        _ if code == 0 => Ok(()),
        error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR | libc::ETIMEDOUT)) => Ok(()),
        error => Err(error),
    }
}

/// Wakes everyone who sleeps on `word`, in any process.
pub(crate) fn futex_wake(word: &AtomicU32) {
    let no_time = std::ptr::null::<libc::timespec>();
    let no_word = std::ptr::null::<u32>();
    // SAFETY: the word is valid and aligned while it is borrowed; the kernel uses its address only. It cannot fail for a
    // mapped, aligned word.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE,
            libc::c_int::MAX,
            no_time,
            no_word,
            0_u32,
        )
    };
}
