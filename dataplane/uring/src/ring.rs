//! The ring itself.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use af_xdp::region::{Pool, Region};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};

use crate::sockets::{SocketEvent, Sockets};
use crate::{BLOCK_BYTES, BLOCKS_LONG_MAX, BLOCKS_MAX, Blocks, IoError, NO_VECTOR, outcome, point_to};

/// A registered buffer covers at most 1 GiB (io_uring/rsrc.c `io_buffer_validate`), so a larger region is registered in
/// pieces of that size.
const BUFFER_BYTES_MAX: usize = 1 << 30;
/// Files that a ring can hold registered.
const FILES_MAX: u32 = 64;
/// Vectors for requests of more than [`BLOCKS_MAX`] blocks that a ring is made with: 64 such requests in flight, 256 KiB.
const LONG_VECTORS: usize = 64;
/// How long a dropped ring waits for what is in flight.
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// Kinds of completion, in the top byte of `user_data`.
const KIND_DISK: u64 = 0;
const KIND_READY: u64 = 1 << 56;
const KIND_WOKEN: u64 = 2 << 56;
pub(crate) const KIND_IGNORED: u64 = 3 << 56;
pub(crate) const KIND_SOCKET: u64 = 4 << 56;
const KIND_MASK: u64 = 0xff << 56;

/// Sizes of a ring.
#[derive(Debug, Clone, Copy)]
pub struct RingConfig {
    /// Disk requests in flight at most; a power of two.
    pub requests_max: u32,
}

/// Why a ring could not be made or a file not be registered.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel has no usable io_uring.
    #[error(
        "cannot set up io_uring: {0}; Linux 6.1 or newer is needed, and kernel.io_uring_disabled must be 0"
    )]
    Setup(#[source] io::Error),
    /// The frame memory could not be pinned.
    #[error(
        "cannot register frame memory with io_uring: {0}; raise the locked-memory limit or grant CAP_IPC_LOCK"
    )]
    Buffers(#[source] io::Error),
    /// The file could not be registered.
    #[error("cannot register a file with io_uring: {0}")]
    File(#[source] io::Error),
    /// All places for files are taken.
    #[error("more than {FILES_MAX} stores on one core: spread them over more nodes")]
    TooManyFiles,
}

/// A registered file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId(u32);

/// A way to wake the thread that waits in another ring.
#[derive(Debug, Clone)]
pub struct WakeHandle(Arc<OwnedFd>);

/// A disk request that has ended.
#[derive(Debug)]
pub struct Finished {
    /// What was given with the request.
    pub token: u64,
    /// Its buffers; empty for a sync.
    pub blocks: Blocks,
    /// How it ended.
    pub result: Result<(), IoError>,
}

/// What [`Ring::next_event`] tells.
#[derive(Debug)]
pub enum Event {
    /// A disk request has ended.
    Disk(Finished),
    /// The descriptor given to [`Ring::poll`] with this token is readable, or failed.
    Ready(u32),
    /// Another ring's [`Ring::wake`] arrived.
    Woken,
    /// Something happened on a socket.
    Socket(SocketEvent),
}

/// New requests that are handed to the kernel without waiting for [`Ring::submit`]. A device that ends requests by the dozen
/// would else stand still until the last of those that follow is prepared; one call for each costs more than it gains.
const SUBMIT_AT: usize = 2;

/// The vectors of a request of more than [`BLOCKS_MAX`] blocks.
type LongVectors = Box<[libc::iovec; BLOCKS_LONG_MAX]>;

struct Slot {
    token: u64,
    blocks: Blocks,
    asked_bytes: usize,
    vectors: [libc::iovec; BLOCKS_MAX],
    /// In their place, while a longer request is in flight.
    long: Option<LongVectors>,
}

impl Slot {
    /// The vectors of the request in flight.
    fn vectors(&self) -> &[libc::iovec] {
        self.long.as_ref().map_or(&self.vectors[..], |long| &long[..])
    }
}

/// One io_uring; see the crate's head for what it keeps.
pub struct Ring {
    pub(crate) ring: IoUring,
    pub(crate) region: Arc<Region>,
    slots: Box<[Slot]>,
    free: Vec<u32>,
    /// Vectors that no request in flight uses; room for those of all.
    long_free: Vec<LongVectors>,
    files: Vec<Option<OwnedFd>>,
    /// The kernel has vectored requests on fixed buffers (6.15).
    vectored_fixed: bool,
    pub(crate) sockets: Sockets,
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write { dsync: bool },
}

impl Ring {
    /// Sets up a ring for the calling thread, with `region` as its fixed buffers. With `like`, the registration of that
    /// ring is shared instead of pinning the memory again.
    ///
    /// # Errors
    /// [`RingError::Setup`], [`RingError::Buffers`], [`RingError::File`].
    pub fn new(
        config: RingConfig,
        region: &Arc<Region>,
        like: Option<&WakeHandle>,
    ) -> Result<Ring, RingError> {
        assert!(config.requests_max.is_power_of_two());
        let ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_clamp()
            // Completions of requests, readiness and wake-ups together never overflow.
            .setup_cqsize(config.requests_max * 4)
            .build(config.requests_max)
            .map_err(RingError::Setup)?;
        register_region(&ring, region, like).map_err(RingError::Buffers)?;
        ring.submitter().register_files_sparse(FILES_MAX).map_err(RingError::File)?;
        let mut probe = Probe::new();
        let probed = ring.submitter().register_probe(&mut probe).is_ok();
        let vectored_fixed = probed
            && probe.is_supported(opcode::ReadvFixed::CODE)
            && probe.is_supported(opcode::WritevFixed::CODE);
        let slot = || Slot {
            token: 0,
            blocks: Blocks::new(),
            asked_bytes: 0,
            vectors: [NO_VECTOR; BLOCKS_MAX],
            long: None,
        };
        let mut long_free = Vec::with_capacity(LONG_VECTORS.max(config.requests_max as usize));
        long_free.extend((0..LONG_VECTORS).map(|_| no_vectors()));
        Ok(Ring {
            ring,
            region: Arc::clone(region),
            slots: (0..config.requests_max).map(|_| slot()).collect(),
            free: (0..config.requests_max).rev().collect(),
            long_free,
            files: (0..FILES_MAX).map(|_| None).collect(),
            vectored_fixed,
            sockets: Sockets::default(),
        })
    }

    /// Registers a duplicate of `file`: the same open file description, so that locks on it last as long as its I/O.
    ///
    /// # Errors
    /// [`RingError::File`], [`RingError::TooManyFiles`].
    pub fn register_file(&mut self, file: BorrowedFd<'_>) -> Result<FileId, RingError> {
        let at = self.files.iter().position(Option::is_none).ok_or(RingError::TooManyFiles)?;
        let own = file.try_clone_to_owned().map_err(RingError::File)?;
        let index = u32::try_from(at).expect("at most FILES_MAX");
        self.ring.submitter().register_files_update(index, &[own.as_raw_fd()]).map_err(RingError::File)?;
        self.files[at] = Some(own);
        Ok(FileId(index))
    }

    /// Gives a registration up. Requests in flight on it end as usual.
    pub fn unregister_file(&mut self, file: FileId) {
        let _cannot_fail_for_a_registered_index = self.ring.submitter().register_files_update(file.0, &[-1]);
        self.files[file.0 as usize] = None;
    }

    /// The registered file, for requests done inline.
    ///
    /// # Panics
    /// If it was unregistered.
    #[must_use]
    pub fn file(&self, file: FileId) -> BorrowedFd<'_> {
        self.files[file.0 as usize].as_ref().expect("a registered file").as_fd()
    }

    /// Reads `blocks.len()` blocks from byte `offset_bytes` on; up to [`BLOCKS_LONG_MAX`].
    ///
    /// # Errors
    /// The blocks, when as many requests are in flight as the ring was made for.
    ///
    /// # Panics
    /// If a chunk has another handle, or there is none.
    pub fn read(
        &mut self,
        pool: &Pool,
        file: FileId,
        offset_bytes: u64,
        blocks: Blocks,
        token: u64,
    ) -> Result<(), Blocks> {
        assert!(blocks.iter().all(|chunk| pool.references(chunk) == 1), "only the only handle is read into");
        self.transfer(file, offset_bytes, blocks, token, Direction::Read)
    }

    /// Writes the blocks from byte `offset_bytes` on; with `dsync` the request ends when they are on stable media
    /// (`RWF_DSYNC`). Up to [`BLOCKS_LONG_MAX`] of them.
    ///
    /// # Errors
    /// The blocks, when as many requests are in flight as the ring was made for.
    ///
    /// # Panics
    /// If there is no block.
    pub fn write(
        &mut self,
        file: FileId,
        offset_bytes: u64,
        blocks: Blocks,
        dsync: bool,
        token: u64,
    ) -> Result<(), Blocks> {
        self.transfer(file, offset_bytes, blocks, token, Direction::Write { dsync })
    }

    /// Forces everything written to the file to stable media (`fdatasync`).
    ///
    /// # Errors
    /// When as many requests are in flight as the ring was made for.
    pub fn sync(&mut self, file: FileId, token: u64) -> Result<(), Full> {
        let slot = self.free.pop().ok_or(Full)?;
        self.slots[slot as usize].token = token;
        self.slots[slot as usize].asked_bytes = 0;
        let entry = opcode::Fsync::new(types::Fixed(file.0)).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: a sync names no memory.
        unsafe { self.push(&entry.user_data(KIND_DISK | u64::from(slot))) };
        Ok(())
    }

    /// Asks once to be told when `fd` is readable.
    pub fn poll(&mut self, fd: BorrowedFd<'_>, token: u32) {
        let events = u32::try_from(libc::POLLIN).expect("a positive flag");
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events).build();
        // SAFETY: a poll names no memory; the kernel takes its own reference to the file when it accepts the entry.
        unsafe { self.push(&entry.user_data(KIND_READY | u64::from(token))) };
    }

    /// A handle by which other rings wake this one's thread.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn wake_handle(&self) -> io::Result<WakeHandle> {
        // SAFETY: the descriptor is that of our own ring, open as long as it lives.
        let own = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        Ok(WakeHandle(Arc::new(own.try_clone_to_owned()?)))
    }

    /// Wakes another ring's thread with the next submission.
    pub fn wake(&mut self, other: &WakeHandle) {
        let fd = types::Fd(other.0.as_raw_fd());
        let entry = opcode::MsgRingData::new(fd, 0, KIND_WOKEN, None).build();
        // SAFETY: a message names no memory.
        unsafe { self.push(&entry.user_data(KIND_IGNORED)) };
    }

    /// Hands new requests to the kernel and gathers completions, with at most one system call and none when there is
    /// nothing to do. Completions that the ring had no room for, which sockets may have more of than it holds, are gathered too.
    ///
    /// # Errors
    /// As the kernel gave it; an interrupted or busy call is not an error, the next one goes on.
    pub fn submit(&mut self) -> io::Result<()> {
        let queue = self.ring.submission();
        if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(());
        }
        drop(queue);
        tolerate(self.ring.submit().map(drop))
    }

    /// As [`Ring::submit`], then sleeps until a completion is there or `timeout` has passed.
    ///
    /// # Errors
    /// As for [`Ring::submit`].
    pub fn submit_and_wait(&mut self, timeout: Duration) -> io::Result<()> {
        let timespec = types::Timespec::new().sec(timeout.as_secs()).nsec(timeout.subsec_nanos());
        let args = types::SubmitArgs::new().timespec(&timespec);
        tolerate(self.ring.submitter().submit_with_args(1, &args).map(drop))
    }

    /// The next thing that has happened.
    pub fn next_event(&mut self) -> Option<Event> {
        if let Some(closed) = self.sockets.next_closed() {
            return Some(closed);
        }
        loop {
            let Some(entry) = self.ring.completion().next() else { return self.sockets.next_closed() };
            match entry.user_data() & KIND_MASK {
                KIND_DISK => return Some(Event::Disk(self.finish(&entry))),
                KIND_READY => return Some(Event::Ready((entry.user_data() & 0xffff_ffff) as u32)),
                KIND_WOKEN => return Some(Event::Woken),
                KIND_SOCKET => {
                    if let Some(event) = self.socket_event(&entry) {
                        return Some(Event::Socket(event));
                    }
                }
                _ => {}
            }
        }
    }

    /// Disk requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether the kernel has nothing of ours.
    fn is_idle(&self) -> bool {
        self.in_flight() == 0 && self.sockets.is_idle()
    }

    fn finish(&mut self, entry: &cqueue::Entry) -> Finished {
        let index = (entry.user_data() & 0xffff_ffff) as u32;
        let slot = &mut self.slots[index as usize];
        let blocks = std::mem::take(&mut slot.blocks);
        // The kernel is done with them.
        self.long_free.extend(slot.long.take());
        let finished =
            Finished { token: slot.token, blocks, result: outcome(entry.result(), slot.asked_bytes) };
        self.free.push(index);
        finished
    }

    fn transfer(
        &mut self,
        file: FileId,
        offset_bytes: u64,
        blocks: Blocks,
        token: u64,
        direction: Direction,
    ) -> Result<(), Blocks> {
        assert!(!blocks.is_empty(), "a request moves at least one block");
        let Some(index) = self.free.pop() else { return Err(blocks) };
        let slot = &mut self.slots[index as usize];
        slot.token = token;
        slot.asked_bytes = blocks.len_bytes();
        if blocks.len() > BLOCKS_MAX {
            let long = slot.long.insert(self.long_free.pop().unwrap_or_else(no_vectors));
            point_to(&mut long[..], &blocks, &self.region);
        } else {
            point_to(&mut slot.vectors, &blocks, &self.region);
        }
        let buffer = fixed_buffer_of(&blocks).filter(|_| blocks.len() == 1 || self.vectored_fixed);
        slot.blocks = blocks;
        let entry = entry(slot, types::Fixed(file.0), offset_bytes, direction, buffer);
        // SAFETY: the vectors lie in the slot table, which neither moves nor is reused before the completion, or in a box
        // that the slot owns and that only `finish` takes out of it, after the completion, to be kept for another request.
        // As many of them are set as the entry says, and they name chunks whose handles the slot owns until the completion;
        // the region stays mapped, since `self` holds it.
        unsafe { self.push(&entry.user_data(KIND_DISK | u64::from(index))) };
        Ok(())
    }

    /// Queues an entry, making room by submitting when the queue is full.
    ///
    /// # Safety
    /// Whatever memory the entry names must stay valid, and be free of conflicting access, until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: passed on to the caller.
        unsafe { self.queue(entry) };
        // An error is seen again, and reported, by the caller's own submit.
        if self.ring.submission().len() >= SUBMIT_AT {
            let _handed_over = self.ring.submit();
        }
    }

    /// As [`Ring::push`], and leaves the entry for the next [`Ring::submit`].
    ///
    /// # Safety
    /// As for [`Ring::push`].
    pub(crate) unsafe fn queue(&mut self, entry: &squeue::Entry) {
        // SAFETY: passed on to the caller.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // The only way to make room; an error is seen again, and reported, by the caller's own submit.
            if self.ring.submit().is_err() {
                std::thread::yield_now();
            }
        }
    }
}

impl Drop for Ring {
    /// Waits for what is in flight, so that no request outlives the process's view of its memory.
    fn drop(&mut self) {
        let deadline = Instant::now() + DRAIN_TIME;
        self.close_all();
        while !self.is_idle() && Instant::now() < deadline {
            if self.submit_and_wait(Duration::from_millis(100)).is_err() {
                break;
            }
            while self.next_event().is_some() {}
        }
        if !self.is_idle() {
            // Requests hold pages of the region: it must not be unmapped and reused under them.
            std::mem::forget(Arc::clone(&self.region));
            // And those that the kernel has not looked at yet name vectors in the slots.
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(std::mem::take(&mut self.sockets));
        }
    }
}

/// No room for another request: wait for a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("as many disk requests are in flight as the ring was made for")]
pub struct Full;

fn entry(
    slot: &Slot,
    file: types::Fixed,
    offset_bytes: u64,
    direction: Direction,
    buffer: Option<u16>,
) -> squeue::Entry {
    let vectors = slot.vectors().as_ptr();
    let count = u32::try_from(slot.blocks.len()).expect("at most BLOCKS_LONG_MAX");
    let base = slot.vectors()[0].iov_base.cast::<u8>();
    let len_bytes = u32::try_from(BLOCK_BYTES).expect("a page");
    match (direction, buffer, count) {
        (Direction::Read, Some(buffer), 1) => {
            opcode::ReadFixed::new(file, base, len_bytes, buffer).offset(offset_bytes).build()
        }
        (Direction::Read, Some(buffer), _) => {
            opcode::ReadvFixed::new(file, vectors, count, buffer).offset(offset_bytes).build()
        }
        (Direction::Read, None, _) => opcode::Readv::new(file, vectors, count).offset(offset_bytes).build(),
        (Direction::Write { dsync }, Some(buffer), 1) => {
            opcode::WriteFixed::new(file, base, len_bytes, buffer)
                .offset(offset_bytes)
                .rw_flags(rw_flags(dsync))
                .build()
        }
        (Direction::Write { dsync }, Some(buffer), _) => {
            opcode::WritevFixed::new(file, vectors, count, buffer)
                .offset(offset_bytes)
                .rw_flags(rw_flags(dsync))
                .build()
        }
        (Direction::Write { dsync }, None, _) => {
            opcode::Writev::new(file, vectors, count).offset(offset_bytes).rw_flags(rw_flags(dsync)).build()
        }
    }
}

fn rw_flags(dsync: bool) -> i32 {
    if dsync { libc::RWF_DSYNC } else { 0 }
}

fn no_vectors() -> LongVectors {
    Box::new([NO_VECTOR; BLOCKS_LONG_MAX])
}

/// The registered buffer that holds all blocks of a request, if one does.
fn fixed_buffer_of(blocks: &Blocks) -> Option<u16> {
    let piece = |offset: u64| offset / BUFFER_BYTES_MAX as u64;
    let mut pieces = blocks.iter().map(|chunk| piece(chunk.offset()));
    let first = pieces.next()?;
    if pieces.all(|other| other == first) { u16::try_from(first).ok() } else { None }
}

fn register_region(ring: &IoUring, region: &Arc<Region>, like: Option<&WakeHandle>) -> io::Result<()> {
    if let Some(other) = like
        && ring.submitter().register_buffers_clone(other.0.as_raw_fd()).is_ok()
    {
        return Ok(());
    }
    let whole = region.as_iovec();
    let pieces: Vec<libc::iovec> = (0..whole.iov_len.div_ceil(BUFFER_BYTES_MAX))
        .map(|piece| {
            let at = piece * BUFFER_BYTES_MAX;
            libc::iovec {
                iov_base: whole.iov_base.cast::<u8>().wrapping_add(at).cast(),
                iov_len: BUFFER_BYTES_MAX.min(whole.iov_len - at),
            }
        })
        .collect();
    // SAFETY: the pieces make up the region, which the ring's owner holds as long as the ring.
    unsafe { ring.submitter().register_buffers(&pieces) }
}

/// A wait that ran out, a signal, and a kernel that is short of room for now are no failures: the caller comes back.
fn tolerate(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) => match error.raw_os_error() {
            Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
            _ => Err(error),
        },
        ok => ok,
    }
}
