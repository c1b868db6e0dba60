//! The frame memory of a process: one mapping, cut into header slots and page-sized chunks per core.
//!
//! Invariants:
//!
//! * A handle ([`Chunk`], [`Header`]) is move-only and names its region, so no safe code can hold two
//!   exclusive handles to one place, or use a handle with another region's memory.
//! * Only the [`Pool`] that owns a range takes, shares and releases in it; a chunk has as many handles as
//!   its reference count says. Bytes are writable only while that count is one. Of a chunk that a receive
//!   ring has just given back it is: only fresh chunks are given to the kernel for receiving.
//! * The mapping lives as long as any pool, queue or ring that holds the [`Arc<Region>`](Region).
//!
//! Layout: core `c` owns `[c * stride, (c + 1) * stride)`; each range starts with its header slots (whole
//! pages of them) and goes on with its chunks. So page 0 is never a chunk.

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::num::NonZeroU32;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Bytes in a chunk: one page, the largest that AF_XDP registers (net/xdp/xdp_umem.c).
pub const CHUNK_BYTES: usize = 4096;
/// Bytes in a header slot: a cache line, room for the 36 bytes of an AoE header and a padded reply.
pub const HEADER_BYTES: usize = 64;

/// What a receive queue gets even where its core's share is used up.
pub const RECEIVE_CHUNKS_MIN: u32 = 16;

const SLOTS_PER_PAGE: u32 = 64;
const _: () = assert!(SLOTS_PER_PAGE as usize * HEADER_BYTES == CHUNK_BYTES);
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Handles dropped without being released, in builds with debug assertions.
static LEAKED: AtomicU64 = AtomicU64::new(0);
/// The next region's identity; 0 is none.
static NEXT_REGION: AtomicU32 = AtomicU32::new(1);

/// How many handles were dropped, not released, in this process. Counted only in builds with debug
/// assertions; zero otherwise.
pub fn leaked_handles() -> u64 {
    LEAKED.load(Ordering::Relaxed)
}

/// Sizes of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionConfig {
    /// Cores, each with a range of its own.
    pub cores: u16,
    /// Chunks of [`CHUNK_BYTES`] in each core's range.
    pub chunks_per_core: u32,
    /// Header slots of [`HEADER_BYTES`] in each core's range, rounded up to whole pages of them.
    pub headers_per_core: u32,
}

/// What pages a region is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// 2 MiB pages from the kernel's reserve (`vm.nr_hugepages`).
    Huge2MiB,
    /// Pages of 4 KiB; transparent huge pages were asked for.
    Normal,
}

/// Why a region could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// A size is zero.
    #[error("a frame memory region needs at least one core, one chunk and one header slot per core")]
    Empty,
    /// The sizes exceed what handles can name.
    #[error("a frame memory region of {bytes} bytes is too large: ask for fewer chunks per core")]
    TooLarge {
        /// Bytes asked for.
        bytes: u128,
    },
    /// The kernel gave no memory.
    #[error("cannot map {bytes} bytes of frame memory: {source}; ask for fewer chunks per core")]
    Map {
        /// Bytes asked for.
        bytes: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// The core's pool was taken before, or the region has no such core.
    #[error("the frame memory pool of core {core} does not exist or was taken before")]
    PoolTaken {
        /// The core asked for.
        core: u16,
    },
}

/// Exclusive or shared ownership of one 4096-byte, page-aligned chunk. Give it back with
/// [`Pool::release`]: dropping it leaks the chunk (see [`leaked_handles`]).
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped chunk is leaked: release it"]
pub struct Chunk {
    page: NonZeroU32,
    region: u32,
}

/// Ownership of one 64-byte header slot. Give it back with [`Pool::release_header`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped header slot is leaked: release it"]
pub struct Header {
    slot: u32,
    region: u32,
}

/// A handle of either kind, as a completion's address names it.
#[derive(Debug, PartialEq, Eq)]
pub enum Handle {
    /// The address lies in a chunk.
    Chunk(Chunk),
    /// The address lies in a header slot.
    Header(Header),
}

#[cfg(debug_assertions)]
impl Drop for Chunk {
    fn drop(&mut self) {
        LEAKED.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(debug_assertions)]
impl Drop for Header {
    fn drop(&mut self) {
        LEAKED.fetch_add(1, Ordering::Relaxed);
    }
}

impl Chunk {
    /// Gives the handle up for the offset of its first byte in the region, for a ring of the kernel.
    /// [`Region::chunk_from_offset`] makes the handle again.
    pub fn into_offset(self) -> u64 {
        let offset = self.offset();
        std::mem::forget(self);
        offset
    }

    /// The offset of the chunk's first byte in the region, bytes.
    pub fn offset(&self) -> u64 {
        u64::from(self.page.get()) * CHUNK_BYTES as u64
    }
}

impl Header {
    /// Gives the handle up for the offset of its first byte in the region, for a ring of the kernel.
    /// [`Region::header_from_offset`] makes the handle again.
    pub fn into_offset(self) -> u64 {
        let offset = self.offset();
        std::mem::forget(self);
        offset
    }

    /// The offset of the slot's first byte in the region, bytes.
    pub fn offset(&self) -> u64 {
        u64::from(self.slot) * HEADER_BYTES as u64
    }
}

/// Memory that a UMEM may be registered on.
///
/// # Safety
///
/// `base` must be page-aligned and start `len_bytes` bytes of mapped, readable and writable memory that
/// stays mapped at that place as long as the value lives, and that no Rust reference aliases while the
/// kernel owns it.
pub unsafe trait UmemMemory: Send + Sync {
    /// The first byte.
    fn base(&self) -> NonNull<u8>;
    /// Length, bytes; a multiple of [`CHUNK_BYTES`].
    fn len_bytes(&self) -> usize;
    /// What pages it is made of.
    fn pages(&self) -> Pages;
}

/// One mapping of frame memory, shared by all cores of the process.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    mapped_bytes: usize,
    id: u32,
    pages: Pages,
    config: RegionConfig,
    header_pages: u32,
    stride_pages: u32,
    taken: Box<[AtomicBool]>,
}

// SAFETY: the base pointer is to memory that this value alone maps and unmaps; access to the bytes goes
// through handles, whose exclusivity the pools keep.
unsafe impl Send for Region {}
// SAFETY: as for Send: shared access hands out only reads of handles the caller holds.
unsafe impl Sync for Region {}

// SAFETY: the mapping is page-aligned, readable and writable, lives until drop, and chunks that the
// kernel owns have no handle, hence no reference.
unsafe impl UmemMemory for Region {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len_bytes(&self) -> usize {
        self.used_bytes()
    }

    fn pages(&self) -> Pages {
        self.pages
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `base` and `mapped_bytes` are those of our own mapping; no handle can reach it without
        // the Arc that is gone.
        let unmapped = unsafe { libc::munmap(self.base.as_ptr().cast(), self.mapped_bytes) };
        debug_assert_eq!(unmapped, 0, "munmap of our own mapping");
    }
}

impl Region {
    /// Maps a region, on 2 MiB pages where the kernel has them in reserve.
    ///
    /// # Errors
    ///
    /// [`RegionError::Empty`], [`RegionError::TooLarge`] (above 256 GiB) or [`RegionError::Map`].
    pub fn new(config: RegionConfig) -> Result<Arc<Self>, RegionError> {
        if config.cores == 0 || config.chunks_per_core == 0 || config.headers_per_core == 0 {
            return Err(RegionError::Empty);
        }
        let header_pages = config.headers_per_core.div_ceil(SLOTS_PER_PAGE);
        let pages =
            u128::from(config.cores) * (u128::from(header_pages) + u128::from(config.chunks_per_core));
        let bytes = pages * CHUNK_BYTES as u128;
        // Slots are named by 32 bits; and a huge page of slack is mapped for alignment.
        if pages * u128::from(SLOTS_PER_PAGE) > u128::from(u32::MAX) {
            return Err(RegionError::TooLarge { bytes });
        }
        let bytes = usize::try_from(bytes).map_err(|_| RegionError::TooLarge { bytes })?;
        let (base, mapped_bytes, pages) = map_frames(bytes)?;
        let region = Self {
            base,
            mapped_bytes,
            id: NEXT_REGION.fetch_add(1, Ordering::Relaxed),
            pages,
            config,
            header_pages,
            stride_pages: header_pages + config.chunks_per_core,
            taken: (0..config.cores).map(|_| AtomicBool::new(false)).collect(),
        };
        assert_ne!(region.id, 0, "region identities are never reused");
        Ok(Arc::new(region))
    }

    /// The pool of `core`'s range; each can be taken once.
    ///
    /// # Errors
    ///
    /// [`RegionError::PoolTaken`] for a second take or a core that the region was not made for.
    pub fn pool(self: &Arc<Self>, core: u16) -> Result<Pool, RegionError> {
        let taken = self.taken.get(usize::from(core)).ok_or(RegionError::PoolTaken { core })?;
        if taken.swap(true, Ordering::AcqRel) {
            return Err(RegionError::PoolTaken { core });
        }
        Ok(Pool::new(Arc::clone(self), core))
    }

    /// The sizes this region was made with.
    pub fn config(&self) -> RegionConfig {
        self.config
    }

    /// What pages it is made of.
    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// The first byte of the region, for registrations with the kernel.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes of the region from [`Region::base`] on, a multiple of [`CHUNK_BYTES`].
    pub fn used_bytes(&self) -> usize {
        self.stride_pages as usize * usize::from(self.config.cores) * CHUNK_BYTES
    }

    /// The region as an I/O vector, for `io_uring` fixed buffers.
    pub fn as_iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.base.as_ptr().cast(), iov_len: self.used_bytes() }
    }

    /// The bytes of a chunk.
    pub fn bytes<'a>(&'a self, chunk: &'a Chunk) -> &'a [u8] {
        let at = self.chunk_pointer(chunk);
        // SAFETY: `at` starts a whole chunk of this region; the handle exists, so neither the kernel nor
        // a `bytes_mut` (which needs the only handle, mutably) writes it while `chunk` is borrowed.
        unsafe { std::slice::from_raw_parts(at.as_ptr(), CHUNK_BYTES) }
    }

    /// The bytes of a chunk of any core's range, writable: for a chunk that came from the kernel a moment ago.
    ///
    /// # Safety
    ///
    /// The handle must be the only one to its chunk, and the kernel must be done with the chunk.
    pub(crate) unsafe fn sole_bytes_mut<'a>(&'a self, chunk: &'a mut Chunk) -> &'a mut [u8] {
        let at = self.chunk_pointer(chunk);
        // SAFETY: `at` starts a whole chunk; no other handle exists, and this one is borrowed mutably. Another core's pool
        // hands the chunk out again only after this handle has come home.
        unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), CHUNK_BYTES) }
    }

    /// The bytes of a header slot.
    pub fn header_bytes<'a>(&'a self, header: &'a Header) -> &'a [u8; HEADER_BYTES] {
        let at = self.header_pointer(header);
        // SAFETY: as for `bytes`; a header slot has one handle.
        unsafe { at.cast::<[u8; HEADER_BYTES]>().as_ref() }
    }

    /// The address of a chunk's first byte, for system calls that the caller answers for.
    pub fn chunk_pointer(&self, chunk: &Chunk) -> NonNull<u8> {
        assert_eq!(chunk.region, self.id, "a chunk of another region");
        self.pointer_at(u64::from(chunk.page.get()) * CHUNK_BYTES as u64)
    }

    /// The address of a header slot's first byte, for system calls that the caller answers for.
    pub fn header_pointer(&self, header: &Header) -> NonNull<u8> {
        assert_eq!(header.region, self.id, "a header of another region");
        self.pointer_at(u64::from(header.slot) * HEADER_BYTES as u64)
    }

    /// Which core's range a chunk belongs to.
    pub fn owner(&self, chunk: &Chunk) -> u16 {
        assert_eq!(chunk.region, self.id, "a chunk of another region");
        self.core_of_page(chunk.page.get())
    }

    /// Makes the handle of the chunk that holds `offset`; `None` where no chunk does.
    ///
    /// # Safety
    ///
    /// The offset must come from a handle of this region given up with [`Chunk::into_offset`] (any byte of
    /// that chunk will do), and each giving up may be taken back once.
    pub unsafe fn chunk_from_offset(&self, offset: u64) -> Option<Chunk> {
        // SAFETY: the caller keeps the same contract.
        match unsafe { self.handle_from_offset(offset) }? {
            Handle::Chunk(chunk) => Some(chunk),
            Handle::Header(header) => {
                std::mem::forget(header);
                None
            }
        }
    }

    /// Makes the handle of the header slot that holds `offset`; `None` where no slot does.
    ///
    /// # Safety
    ///
    /// As for [`Region::chunk_from_offset`], with [`Header::into_offset`].
    pub unsafe fn header_from_offset(&self, offset: u64) -> Option<Header> {
        // SAFETY: the caller keeps the same contract.
        match unsafe { self.handle_from_offset(offset) }? {
            Handle::Header(header) => Some(header),
            Handle::Chunk(chunk) => {
                std::mem::forget(chunk);
                None
            }
        }
    }

    /// Makes the handle of the chunk or header slot that holds `offset`; `None` beyond the region.
    ///
    /// # Safety
    ///
    /// As for [`Region::chunk_from_offset`] and [`Region::header_from_offset`].
    pub unsafe fn handle_from_offset(&self, offset: u64) -> Option<Handle> {
        if offset >= self.used_bytes() as u64 {
            return None;
        }
        let page = u32::try_from(offset / CHUNK_BYTES as u64).ok()?;
        if page % self.stride_pages < self.header_pages {
            let slot = u32::try_from(offset / HEADER_BYTES as u64).ok()?;
            return Some(Handle::Header(Header { slot, region: self.id }));
        }
        Some(Handle::Chunk(Chunk { page: NonZeroU32::new(page)?, region: self.id }))
    }

    fn core_of_page(&self, page: u32) -> u16 {
        u16::try_from(page / self.stride_pages).expect("a page of this region belongs to one of its cores")
    }

    fn pointer_at(&self, offset: u64) -> NonNull<u8> {
        let offset = usize::try_from(offset).expect("offsets of a mapping fit a pointer");
        debug_assert!(offset < self.used_bytes());
        // SAFETY: handles name places inside the mapping: only pools and the checked conversions make them.
        unsafe { self.base.add(offset) }
    }
}

/// Maps at least `bytes`, aligned to 2 MiB, on huge pages where there are any.
fn map_frames(bytes: usize) -> Result<(NonNull<u8>, usize, Pages), RegionError> {
    let huge_bytes = bytes.next_multiple_of(HUGE_PAGE_BYTES);
    let fail = |source| RegionError::Map { bytes, source };
    if let Some(base) = map_huge(huge_bytes) {
        keep_from_children(base, huge_bytes);
        return Ok((base, huge_bytes, Pages::Huge2MiB));
    }
    // One huge page of slack, trimmed away again, lets transparent huge pages back the whole region.
    let slack_bytes = huge_bytes + HUGE_PAGE_BYTES;
    let raw = map_anonymous(slack_bytes, 0).map_err(fail)?;
    let lead_bytes = raw.as_ptr().align_offset(HUGE_PAGE_BYTES);
    // SAFETY: the three parts make up our own fresh mapping; only the outer two are unmapped.
    let base = unsafe {
        let base = raw.add(lead_bytes);
        if lead_bytes > 0 {
            libc::munmap(raw.as_ptr().cast(), lead_bytes);
        }
        let tail_bytes = slack_bytes - lead_bytes - huge_bytes;
        if tail_bytes > 0 {
            libc::munmap(base.add(huge_bytes).as_ptr().cast(), tail_bytes);
        }
        // A hint: refused where the kernel has no transparent huge pages.
        libc::madvise(base.as_ptr().cast(), huge_bytes, libc::MADV_HUGEPAGE);
        base
    };
    if !populate(base, huge_bytes) {
        for offset in (0..huge_bytes).step_by(CHUNK_BYTES) {
            // SAFETY: inside our own mapping, which nobody else knows yet.
            unsafe { base.add(offset).write_volatile(0) };
        }
    }
    keep_from_children(base, huge_bytes);
    Ok((base, huge_bytes, Pages::Normal))
}

fn map_anonymous(bytes: usize, extra_flags: i32) -> Result<NonNull<u8>, io::Error> {
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | extra_flags,
            -1,
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(NonNull::new(raw.cast()).expect("mmap never gives the null page"))
}

/// Maps and faults in pages of the kernel's reserve; `None` where it has not enough for us.
fn map_huge(bytes: usize) -> Option<NonNull<u8>> {
    let base = map_anonymous(bytes, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB).ok()?;
    if populate(base, bytes) {
        return Some(base);
    }
    // A limit of the control group or NUMA policy: touching the pages would be a fatal signal.
    // SAFETY: our own mapping, which nobody else knows yet.
    unsafe { libc::munmap(base.as_ptr().cast(), bytes) };
    None
}

/// Faults every page in now, not in the hot path; false where the kernel (before 5.14, or out of pages)
/// does not.
fn populate(base: NonNull<u8>, bytes: usize) -> bool {
    // SAFETY: the range is our own mapping.
    unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_POPULATE_WRITE) == 0 }
}

/// A forked child must not share pinned frame memory: copy-on-write would move it under the kernel.
fn keep_from_children(base: NonNull<u8>, bytes: usize) {
    // SAFETY: the range is our own mapping; the advice changes nothing for this process.
    unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_DONTFORK) };
}

/// The free lists and reference counts of one core's range. Owned by that core's thread.
#[derive(Debug)]
pub struct Pool {
    region: Arc<Region>,
    core: u16,
    first_page: u32,
    first_slot: u32,
    free_pages: Vec<u32>,
    free_slots: Vec<u32>,
    /// References per chunk of the range; 0 is free.
    references: Box<[u8]>,
    bytes_copied: u64,
    /// Chunks that receive queues may still be promised.
    receive_budget: u32,
    _one_thread_at_a_time: PhantomData<Cell<()>>,
}

impl Pool {
    fn new(region: Arc<Region>, core: u16) -> Self {
        let first = region.stride_pages * u32::from(core);
        let first_page = first + region.header_pages;
        let first_slot = first * SLOTS_PER_PAGE;
        let chunks = region.config.chunks_per_core;
        // Popped from the back, so the lowest addresses go first and stay warm.
        let free_pages = (first_page..first_page + chunks).rev().collect();
        let free_slots = (first_slot..first_page * SLOTS_PER_PAGE).rev().collect();
        let references = vec![0; chunks as usize].into_boxed_slice();
        Self {
            region,
            core,
            first_page,
            first_slot,
            free_pages,
            free_slots,
            references,
            bytes_copied: 0,
            receive_budget: chunks / 2,
            _one_thread_at_a_time: PhantomData,
        }
    }

    /// The region this pool is a part of.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// The core whose range this is.
    pub fn core(&self) -> u16 {
        self.core
    }

    /// Chunks free now.
    pub fn free_chunks(&self) -> usize {
        self.free_pages.len()
    }

    /// Chunks of the range, free or not.
    pub fn chunk_capacity(&self) -> usize {
        self.references.len()
    }

    /// Header slots free now.
    pub fn free_headers(&self) -> usize {
        self.free_slots.len()
    }

    /// Header slots of the range, free or not.
    pub fn header_capacity(&self) -> usize {
        ((self.first_page * SLOTS_PER_PAGE) - self.first_slot) as usize
    }

    /// Bytes copied in user space through this pool since it was made.
    pub fn bytes_copied(&self) -> u64 {
        self.bytes_copied
    }

    /// Promises a receive queue up to `wanted` chunks to hold, and says how many. All queues of a core
    /// together get at most half of its chunks (beyond that [`RECEIVE_CHUNKS_MIN`] each), however many
    /// queues there are, so that the other half is for I/O and for sending; the first ones get most.
    pub fn reserve_for_receiving(&mut self, wanted: u32) -> u32 {
        let share = wanted.min(self.receive_budget / 2);
        self.receive_budget -= share;
        share.max(RECEIVE_CHUNKS_MIN.min(wanted))
    }

    /// A free chunk, exclusively; `None` when the range is used up. Its bytes are what was left in them.
    pub fn take_chunk(&mut self) -> Option<Chunk> {
        let page = self.free_pages.pop()?;
        let index = self.index_of(page).expect("free pages are pages of the range");
        debug_assert_eq!(self.references[index], 0);
        self.references[index] = 1;
        Some(Chunk { page: NonZeroU32::new(page)?, region: self.region.id })
    }

    /// One more handle to a chunk of this range.
    ///
    /// # Panics
    ///
    /// For a chunk of another core's range, and above 255 handles to one chunk.
    pub fn share(&mut self, chunk: &Chunk) -> Chunk {
        let index = self.index_checked(chunk);
        let references = &mut self.references[index];
        *references = references.checked_add(1).expect("at most 255 handles to one chunk");
        Chunk { page: chunk.page, region: chunk.region }
    }

    /// Gives a handle back; the chunk is free when it was the last.
    ///
    /// # Panics
    ///
    /// For a chunk of another core's range: see [`Pool::owns`].
    pub fn release(&mut self, chunk: Chunk) {
        let index = self.index_checked(&chunk);
        let page = chunk.page.get();
        std::mem::forget(chunk);
        let references = &mut self.references[index];
        *references = references.checked_sub(1).expect("a handle is counted until it is released");
        if *references == 0 {
            self.free_pages.push(page);
        }
    }

    /// Whether a chunk is of this core's range. One that is not must be sent to its owner's pool.
    pub fn owns(&self, chunk: &Chunk) -> bool {
        chunk.region == self.region.id && self.index_of(chunk.page.get()).is_some()
    }

    /// Handles that exist to a chunk of this range.
    ///
    /// # Panics
    ///
    /// For a chunk of another core's range.
    pub fn references(&self, chunk: &Chunk) -> u8 {
        self.references[self.index_checked(chunk)]
    }

    /// The bytes of a chunk, writable.
    ///
    /// # Panics
    ///
    /// For a chunk of another core's range and for a chunk with more than one handle.
    pub fn bytes_mut<'a>(&'a mut self, chunk: &'a mut Chunk) -> &'a mut [u8] {
        assert_eq!(self.references(chunk), 1, "only the only handle writes");
        let at = self.region.chunk_pointer(chunk);
        // SAFETY: `at` starts a whole chunk; the handle is the only one, borrowed mutably, and the pool is
        // borrowed too, so that nobody can share it meanwhile.
        unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), CHUNK_BYTES) }
    }

    /// A free header slot; `None` when they are used up.
    pub fn take_header(&mut self) -> Option<Header> {
        let slot = self.free_slots.pop()?;
        Some(Header { slot, region: self.region.id })
    }

    /// Gives a header slot back.
    ///
    /// # Panics
    ///
    /// For a slot of another core's range: headers never leave their core.
    pub fn release_header(&mut self, header: Header) {
        assert!(self.owns_header(&header), "a header slot of another core");
        let slot = header.slot;
        std::mem::forget(header);
        debug_assert!(self.free_slots.len() < self.header_capacity());
        self.free_slots.push(slot);
    }

    /// Whether a header slot is of this core's range.
    pub fn owns_header(&self, header: &Header) -> bool {
        let slots = self.first_slot..self.first_page * SLOTS_PER_PAGE;
        header.region == self.region.id && slots.contains(&header.slot)
    }

    /// The bytes of a header slot, writable.
    pub fn header_bytes_mut<'a>(&'a mut self, header: &'a mut Header) -> &'a mut [u8; HEADER_BYTES] {
        let at = self.region.header_pointer(header);
        // SAFETY: a slot has one handle, borrowed mutably here.
        unsafe { at.cast::<[u8; HEADER_BYTES]>().as_mut() }
    }

    /// Copies `source` to byte `at` of a chunk: with [`Pool::copy_out`] the one place where payload is
    /// copied in user space, counted in [`Pool::bytes_copied`].
    ///
    /// # Panics
    ///
    /// As for [`Pool::bytes_mut`], and where the copy would leave the chunk.
    pub fn copy_in(&mut self, target: &mut Chunk, at: usize, source: &[u8]) {
        self.bytes_copied += source.len() as u64;
        self.bytes_mut(target)[at..at + source.len()].copy_from_slice(source);
    }

    /// As [`Pool::copy_in`], and gives the CRC32C `crc` continued over the bytes of `source` (0 begins a new one). Memory
    /// is read once: the checksum brings the bytes into the first cache, which has room for a chunk, and the copy takes
    /// them from there. In smaller pieces it would be slower: the checksum of less than a few hundred bytes at a time
    /// cannot keep the processor's CRC unit busy.
    ///
    /// # Panics
    ///
    /// As for [`Pool::copy_in`].
    pub fn copy_in_checksummed(&mut self, target: &mut Chunk, at: usize, source: &[u8], crc: u32) -> u32 {
        let crc = crate::checksum::crc32c_append(crc, source);
        self.copy_in(target, at, source);
        crc
    }

    /// Copies from byte `at` of a chunk, of any core's range, to `target`, counted as
    /// [`Pool::copy_in`].
    ///
    /// # Panics
    ///
    /// Where the copy would leave the chunk.
    pub fn copy_out(&mut self, source: &Chunk, at: usize, target: &mut [u8]) {
        self.bytes_copied += target.len() as u64;
        target.copy_from_slice(&self.region.bytes(source)[at..at + target.len()]);
    }

    fn index_of(&self, page: u32) -> Option<usize> {
        let index = page.checked_sub(self.first_page)? as usize;
        (index < self.references.len()).then_some(index)
    }

    fn index_checked(&self, chunk: &Chunk) -> usize {
        assert_eq!(chunk.region, self.region.id, "a chunk of another region");
        self.index_of(chunk.page.get()).expect("a chunk of this core's range")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn region(cores: u16, chunks_per_core: u32, headers_per_core: u32) -> Arc<Region> {
        Region::new(RegionConfig { cores, chunks_per_core, headers_per_core }).unwrap()
    }

    #[test]
    fn sizes_that_make_no_region_are_refused() {
        for (cores, chunks_per_core, headers_per_core) in [(0, 1, 1), (1, 0, 1), (1, 1, 0)] {
            let config = RegionConfig { cores, chunks_per_core, headers_per_core };
            assert!(matches!(Region::new(config), Err(RegionError::Empty)));
        }
        let huge = RegionConfig { cores: u16::MAX, chunks_per_core: u32::MAX, headers_per_core: 1 };
        assert!(matches!(Region::new(huge), Err(RegionError::TooLarge { .. })));
    }

    #[test]
    fn each_pool_is_taken_once() {
        let region = region(2, 4, 4);
        let pool = region.pool(1).unwrap();
        assert_eq!(pool.core(), 1);
        assert!(matches!(region.pool(1), Err(RegionError::PoolTaken { core: 1 })));
        assert!(matches!(region.pool(2), Err(RegionError::PoolTaken { core: 2 })));
        assert!(region.pool(0).is_ok());
    }

    #[test]
    fn a_region_is_aligned_and_covers_every_handle() {
        let region = region(3, 5, 100);
        assert_eq!(region.base().as_ptr().addr() % CHUNK_BYTES, 0);
        // 100 headers take two pages.
        assert_eq!(region.used_bytes(), 3 * (5 + 2) * CHUNK_BYTES);
        assert_eq!(region.as_iovec().iov_len, region.used_bytes());
        let mut seen = std::collections::HashSet::new();
        for core in 0..3 {
            let mut pool = region.pool(core).unwrap();
            assert_eq!((pool.free_chunks(), pool.free_headers()), (5, 128));
            while let Some(chunk) = pool.take_chunk() {
                assert_eq!(region.owner(&chunk), core);
                assert_eq!(chunk.offset() % CHUNK_BYTES as u64, 0);
                assert!(seen.insert(chunk.offset()), "no chunk is given twice");
                let end = usize::try_from(chunk.into_offset()).unwrap() + CHUNK_BYTES;
                assert!(end <= region.used_bytes());
            }
            while let Some(header) = pool.take_header() {
                let page = header.offset() / CHUNK_BYTES as u64 * CHUNK_BYTES as u64;
                assert!(!seen.contains(&page), "headers and chunks are apart");
                header.into_offset();
            }
        }
        assert_eq!(seen.len(), 15);
    }

    #[test]
    fn bytes_written_are_bytes_read() {
        let region = region(1, 2, 2);
        let mut pool = region.pool(0).unwrap();
        let mut chunk = pool.take_chunk().unwrap();
        pool.bytes_mut(&mut chunk)[4095] = 7;
        assert_eq!(region.bytes(&chunk)[4095], 7);
        let mut header = pool.take_header().unwrap();
        pool.header_bytes_mut(&mut header)[63] = 9;
        assert_eq!(region.header_bytes(&header)[63], 9);
        pool.release(chunk);
        pool.release_header(header);
    }

    #[test]
    fn copies_are_counted() {
        let region = region(2, 2, 2);
        let (mut pool, mut other) = (region.pool(0).unwrap(), region.pool(1).unwrap());
        let mut chunk = pool.take_chunk().unwrap();
        pool.copy_in(&mut chunk, 512, &[5; 1024]);
        let mut back = [0; 100];
        other.copy_out(&chunk, 1436, &mut back);
        assert_eq!(back, [5; 100]);
        assert_eq!((pool.bytes_copied(), other.bytes_copied()), (1024, 100));
        pool.release(chunk);
    }

    #[test]
    fn a_checksummed_copy_is_a_copy_and_its_checksum() {
        let region = region(1, 2, 2);
        let mut pool = region.pool(0).unwrap();
        let mut chunk = pool.take_chunk().unwrap();
        let source: Vec<u8> = (0..CHUNK_BYTES).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
        let mut copied = 0;
        for len in [0, 1, 7, 512, 767, 768, 769, 1536, 4000, 4096] {
            for at in [0, 1, 36, 512] {
                let part = &source[..len.min(CHUNK_BYTES - at)];
                pool.bytes_mut(&mut chunk).fill(0xee);
                // In two calls, the second going on from the first.
                let (head, tail) = part.split_at(part.len() / 3);
                let crc = pool.copy_in_checksummed(&mut chunk, at, head, 0);
                let crc = pool.copy_in_checksummed(&mut chunk, at + head.len(), tail, crc);
                copied += part.len() as u64;
                assert_eq!(crc, crc32c::crc32c(part));
                let bytes = region.bytes(&chunk);
                assert_eq!(&bytes[at..at + part.len()], part);
                assert!(bytes[..at].iter().chain(&bytes[at + part.len()..]).all(|&byte| byte == 0xee));
                assert_eq!(pool.bytes_copied(), copied);
            }
        }
        let beyond = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.copy_in_checksummed(&mut chunk, 1, &source, 0)
        }));
        assert!(beyond.is_err(), "a copy stays in its chunk");
        // RFC 3720, B.4.
        assert_eq!(pool.copy_in_checksummed(&mut chunk, 0, &[0; 32], 0), 0x8a91_36aa);
        pool.release(chunk);
    }

    #[test]
    fn many_receive_queues_leave_half_of_the_chunks() {
        let region = region(1, 16_384, 1);
        let mut pool = region.pool(0).unwrap();
        let shares: Vec<u32> = (0..12).map(|_| pool.reserve_for_receiving(2048)).collect();
        assert_eq!(shares[..5], [2048, 2048, 2048, 1024, 512]);
        assert_eq!(shares[11], RECEIVE_CHUNKS_MIN);
        assert!(shares.iter().sum::<u32>() <= 8192 + 12 * RECEIVE_CHUNKS_MIN);
        assert_eq!(pool.reserve_for_receiving(5), 5);
    }

    #[test]
    fn a_shared_chunk_is_read_only_and_free_after_its_last_release() {
        let region = region(1, 1, 1);
        let mut pool = region.pool(0).unwrap();
        let mut chunk = pool.take_chunk().unwrap();
        assert!(pool.take_chunk().is_none());
        let copy = pool.share(&chunk);
        assert_eq!(pool.references(&chunk), 2);
        let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.bytes_mut(&mut chunk)[0] = 1;
        }));
        assert!(written.is_err(), "a shared chunk must not be writable");
        pool.release(chunk);
        assert_eq!(pool.free_chunks(), 0);
        pool.release(copy);
        assert_eq!(pool.free_chunks(), 1);
    }

    #[test]
    fn a_chunk_of_another_core_is_told_apart() {
        let region = region(2, 1, 1);
        let (mut first, mut second) = (region.pool(0).unwrap(), region.pool(1).unwrap());
        let chunk = first.take_chunk().unwrap();
        assert!(first.owns(&chunk) && !second.owns(&chunk));
        let wrong = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| second.release(chunk)));
        assert!(wrong.is_err(), "a chunk must go home");
    }

    #[test]
    fn a_handle_of_another_region_is_refused() {
        let (one, two) = (region(1, 1, 1), region(1, 1, 1));
        let mut pool = one.pool(0).unwrap();
        let chunk = pool.take_chunk().unwrap();
        assert!(!two.pool(0).unwrap().owns(&chunk));
        assert!(std::panic::catch_unwind(|| two.bytes(&chunk).len()).is_err());
        pool.release(chunk);
    }

    #[test]
    fn offsets_come_back_as_the_handles_they_were() {
        let region = region(2, 2, 65);
        let mut pool = region.pool(1).unwrap();
        let chunk_offset = pool.take_chunk().unwrap().into_offset();
        let header_offset = pool.take_header().unwrap().into_offset();
        // SAFETY: each offset was given up just above and is taken back once.
        let (chunk, header) = unsafe {
            assert!(region.handle_from_offset(region.used_bytes() as u64).is_none());
            assert!(region.chunk_from_offset(header_offset).is_none());
            assert!(region.header_from_offset(chunk_offset).is_none());
            (
                region.chunk_from_offset(chunk_offset + 4095).unwrap(),
                region.header_from_offset(header_offset + 63).unwrap(),
            )
        };
        assert_eq!((chunk.offset(), header.offset()), (chunk_offset, header_offset));
        pool.release(chunk);
        pool.release_header(header);
        assert_eq!((pool.free_chunks(), pool.free_headers()), (2, 128));
    }

    #[cfg(debug_assertions)]
    #[test]
    fn dropped_handles_are_counted() {
        let region = region(1, 1, 1);
        let mut pool = region.pool(0).unwrap();
        let before = leaked_handles();
        drop(pool.take_chunk());
        // Other tests of this process may leak too.
        assert!(leaked_handles() > before);
        assert_eq!(pool.free_chunks(), 0, "a leaked chunk is never handed out again");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Take,
        Share(usize),
        Release(usize),
        Write(usize, u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Take),
            any::<usize>().prop_map(Step::Share),
            any::<usize>().prop_map(Step::Release),
            (any::<usize>(), any::<u8>()).prop_map(|(which, value)| Step::Write(which, value)),
        ]
    }

    proptest! {
        #[test]
        fn references_are_counted_as_handles_exist(
            steps in proptest::collection::vec(step(), 1..200),
        ) {
            const CHUNKS: usize = 8;
            let region = region(1, 8, 1);
            let mut pool = region.pool(0).unwrap();
            let mut held: Vec<Chunk> = Vec::new();
            let mut contents: HashMap<u64, u8> = HashMap::new();
            for step in steps {
                match step {
                    Step::Take => match pool.take_chunk() {
                        Some(mut chunk) => {
                            prop_assert!(held.iter().all(|other| other.offset() != chunk.offset()));
                            pool.bytes_mut(&mut chunk)[0] = 0;
                            contents.insert(chunk.offset(), 0);
                            held.push(chunk);
                        }
                        None => prop_assert_eq!(contents.len(), CHUNKS),
                    },
                    Step::Share(which) if !held.is_empty() => {
                        let chunk = pool.share(&held[which % held.len()]);
                        held.push(chunk);
                    }
                    Step::Release(which) if !held.is_empty() => {
                        let chunk = held.swap_remove(which % held.len());
                        if pool.references(&chunk) == 1 {
                            contents.remove(&chunk.offset());
                        }
                        pool.release(chunk);
                    }
                    Step::Write(which, value) if !held.is_empty() => {
                        let index = which % held.len();
                        if pool.references(&held[index]) == 1 {
                            pool.bytes_mut(&mut held[index])[0] = value;
                            contents.insert(held[index].offset(), value);
                        }
                    }
                    _ => {}
                }
                prop_assert_eq!(pool.free_chunks() + contents.len(), CHUNKS);
                for chunk in &held {
                    let handles = held.iter().filter(|other| other.offset() == chunk.offset()).count();
                    prop_assert_eq!(usize::from(pool.references(chunk)), handles);
                    prop_assert_eq!(region.bytes(chunk)[0], contents[&chunk.offset()]);
                }
            }
            held.into_iter().for_each(|chunk| pool.release(chunk));
            prop_assert_eq!(pool.free_chunks(), CHUNKS);
        }
    }
}
