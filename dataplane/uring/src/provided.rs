//! The chunks that the kernel may receive into for one socket: a ring of buffers that it takes from as data come.
//!
//! Invariants:
//! * A chunk in the ring is owned by this value: nobody else has a handle, so nobody reads or writes what the kernel may write.
//! * There are never more chunks in it than places: a place is written only while the kernel has nothing to read there.
//! * The ring's memory is freed only when it is not registered any more.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use af_xdp::region::{Chunk, Pool, Region};
use io_uring::Submitter;
use io_uring::types::BufRingEntry;

use crate::BLOCK_BYTES;

/// The kernel asks for it.
const PAGE_BYTES: usize = 4096;

/// One socket's ring of buffers.
#[derive(Debug)]
pub(crate) struct Provided {
    group: u16,
    entries: NonNull<BufRingEntry>,
    layout: Layout,
    tail: u16,
    /// By the number that the kernel names a buffer by.
    chunks: Box<[Option<Chunk>]>,
    free: Vec<u16>,
}

impl Provided {
    /// Registers a ring of so many buffers, a power of two, without any yet.
    pub(crate) fn new(submitter: &Submitter<'_>, group: u16, count: u16) -> io::Result<Provided> {
        assert!(count.is_power_of_two());
        let bytes = usize::from(count) * size_of::<BufRingEntry>();
        let layout = Layout::from_size_align(bytes, PAGE_BYTES).expect("less than a mebibyte");
        // SAFETY: the size is not zero.
        let raw = unsafe { alloc_zeroed(layout) };
        let entries = NonNull::new(raw.cast::<BufRingEntry>()).unwrap_or_else(|| handle_alloc_error(layout));
        // SAFETY: the memory holds so many entries, and stays until `end` has taken it from the kernel; else it is leaked.
        let registered = unsafe {
            submitter.register_buf_ring_with_flags(entries.as_ptr().addr() as u64, count, group, 0)
        };
        if let Err(error) = registered {
            // SAFETY: our own, and the kernel has not taken it.
            unsafe { dealloc(entries.as_ptr().cast(), layout) };
            return Err(error);
        }
        Ok(Provided {
            group,
            entries,
            layout,
            tail: 0,
            chunks: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
        })
    }

    /// Which group of buffers this is.
    pub(crate) fn group(&self) -> u16 {
        self.group
    }

    /// Whether the kernel has none to receive into.
    pub(crate) fn is_empty(&self) -> bool {
        self.free.len() == self.chunks.len()
    }

    /// Places for more.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    /// Lends a chunk to the kernel; it is the only handle.
    ///
    /// # Panics
    /// If there is no room.
    pub(crate) fn lend(&mut self, region: &Region, chunk: Chunk) {
        let number = self.free.pop().expect("as many places as chunks");
        let mask = self.chunks.len() - 1;
        let at = usize::from(self.tail) & mask;
        // SAFETY: the place is one of the ring's. Its chunk is not with the kernel: at most as many as there are places are
        // between the kernel's head and the tail, and this one is not. The setters leave alone what lies over the tail in the first
        // entry.
        let entry = unsafe { self.entries.add(at).as_mut() };
        entry.set_addr(region.chunk_pointer(&chunk).as_ptr().addr() as u64);
        entry.set_len(u32::try_from(BLOCK_BYTES).expect("a page"));
        entry.set_bid(number);
        self.chunks[usize::from(number)] = Some(chunk);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the address of the first entry of a ring whose memory was initialised; the tail is aligned, and only
        // written by us, here; the kernel reads it.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(self.entries.as_ptr()).cast_mut()) };
        // The kernel sees the entry when it sees the tail.
        tail.store(self.tail, Ordering::Release);
    }

    /// Takes the chunk of which the kernel has said that it is done with it.
    pub(crate) fn take(&mut self, number: u16) -> Option<Chunk> {
        let chunk = self.chunks.get_mut(usize::from(number))?.take()?;
        self.free.push(number);
        Some(chunk)
    }

    /// Takes the ring from the kernel and gives its chunks back. No request that uses it may be in flight.
    pub(crate) fn end(mut self, submitter: &Submitter<'_>, pool: &mut Pool) {
        let unregistered = submitter.unregister_buf_ring(self.group).is_ok();
        debug_assert!(unregistered, "a registered group");
        for chunk in self.chunks.iter_mut().filter_map(Option::take) {
            pool.release(chunk);
        }
        if unregistered {
            // SAFETY: our own allocation, which the kernel does not know any more; the value ends here.
            unsafe { dealloc(self.entries.as_ptr().cast(), self.layout) };
        }
    }
}
