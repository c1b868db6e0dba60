//! AF_XDP sockets: a UMEM over memory of the caller's, four rings, a bind that says what it got.
//!
//! Invariants: a [`Socket`] has its fill and completion rings to itself (one per queue, even where the UMEM is
//! shared); a [`ReceiveSocket`] has a receive ring and nothing else; memory and mappings live as long as the socket does. Descriptors here are raw offsets;
//! [`Queue`](crate::queue::Queue) turns them into handles.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Capability, Error};
use crate::region::{CHUNK_BYTES, Pages, UmemMemory};
use crate::ring::{AtomicU32, Consumer, Producer, Shared, Slot};
use crate::sys;

/// Socket send buffer in copy mode, where every frame in flight counts against it.
const SEND_BUFFER_BYTES: i32 = 8 << 20;

/// Whether the NIC or the kernel moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyMode {
    /// The NIC, or the bind fails.
    ZeroCopy,
    /// The kernel.
    Copy,
    /// The NIC where it can, else the kernel.
    Auto,
}

/// Busy polling of the queue's NAPI context from the application's own system calls (Linux 5.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusyPoll {
    /// `SO_BUSY_POLL`: how long a call may poll, microseconds.
    pub poll_us: u32,
    /// `SO_BUSY_POLL_BUDGET`: frames a poll may take.
    pub budget: u32,
}

/// What a socket is asked to be.
#[derive(Debug, Clone)]
pub struct SocketBuilder {
    ring_entries: u32,
    headroom_bytes: u32,
    copy_mode: CopyMode,
    segments: bool,
    need_wakeup: bool,
    busy_poll: Option<BusyPoll>,
    send_budget: Option<u32>,
}

impl Default for SocketBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl SocketBuilder {
    /// Rings of 2048 entries, no headroom, automatic copy mode, one buffer per frame, wake-ups on demand.
    pub fn new() -> Self {
        Self {
            ring_entries: 2048,
            headroom_bytes: 0,
            copy_mode: CopyMode::Auto,
            segments: false,
            need_wakeup: true,
            busy_poll: None,
            send_budget: None,
        }
    }

    /// Entries of each of the four rings, a power of two.
    #[must_use]
    pub fn ring_entries(mut self, entries: u32) -> Self {
        assert!(entries.is_power_of_two(), "ring sizes are powers of two");
        self.ring_entries = entries;
        self
    }

    /// Bytes left free before a received frame, beside the kernel's own 256.
    #[must_use]
    pub fn headroom_bytes(mut self, bytes: u32) -> Self {
        self.headroom_bytes = bytes;
        self
    }

    /// Who moves the bytes.
    #[must_use]
    pub fn copy_mode(mut self, mode: CopyMode) -> Self {
        self.copy_mode = mode;
        self
    }

    /// Frames of several descriptors (`XDP_USE_SG`, Linux 6.6).
    #[must_use]
    pub fn segments(mut self, wanted: bool) -> Self {
        self.segments = wanted;
        self
    }

    /// Wake-ups only when the kernel asks for them (`XDP_USE_NEED_WAKEUP`).
    #[must_use]
    pub fn need_wakeup(mut self, wanted: bool) -> Self {
        self.need_wakeup = wanted;
        self
    }

    /// Busy polling. A kernel that refuses it is no error: see [`Obtained::busy_poll`].
    #[must_use]
    pub fn busy_poll(mut self, options: BusyPoll) -> Self {
        self.busy_poll = Some(options);
        self
    }

    /// Descriptors one kick may send in copy mode (`XDP_MAX_TX_SKB_BUDGET`, Linux 6.17; 32 before). A
    /// kernel that refuses it is no error: see [`Obtained::send_budget`].
    #[must_use]
    pub fn send_budget(mut self, descriptors: u32) -> Self {
        self.send_budget = Some(descriptors);
        self
    }

    /// Registers `memory` as a UMEM of its own and binds a socket to a queue.
    ///
    /// # Errors
    ///
    /// [`Error::Privilege`], or what the kernel said: `EOPNOTSUPP` and `EINVAL` for modes that the driver
    /// has not, `EBUSY` for a queue that is bound.
    pub fn bind<M: UmemMemory + 'static>(
        &self,
        memory: &Arc<M>,
        ifindex: u32,
        queue: u32,
    ) -> Result<Socket, Error> {
        let socket = self.open()?;
        register_memory(socket.as_fd(), memory.as_ref(), self.headroom_bytes)?;
        let mut flags = match self.copy_mode {
            CopyMode::ZeroCopy => libc::XDP_ZEROCOPY,
            CopyMode::Copy => libc::XDP_COPY,
            CopyMode::Auto => 0,
        };
        if self.segments {
            flags |= libc::XDP_USE_SG;
        }
        if self.need_wakeup {
            flags |= libc::XDP_USE_NEED_WAKEUP;
        }
        let memory: Arc<dyn UmemMemory> = Arc::<M>::clone(memory);
        let address = address_of(ifindex, queue, flags, None);
        self.finish(
            socket,
            memory,
            &address,
            Inherited { segments: self.segments, need_wakeup: self.need_wakeup },
        )
    }

    /// Binds a socket to another queue, on a UMEM that another socket registered; copy mode, segments and
    /// wake-ups are inherited, fill and completion rings are its own.
    ///
    /// # Errors
    ///
    /// As for [`SocketBuilder::bind`].
    pub fn bind_shared(&self, umem: &Umem, ifindex: u32, queue: u32) -> Result<Socket, Error> {
        let socket = self.open()?;
        let address = address_of(ifindex, queue, libc::XDP_SHARED_UMEM, Some(umem.fd.as_fd()));
        self.finish(socket, Arc::clone(&umem.memory), &address, umem.inherited)
    }

    /// Binds one more socket to the queue of the socket that registered `umem`: it receives what the XDP program sends to
    /// it, into chunks of that socket's fill ring. Everything but the ring's size is inherited.
    ///
    /// # Errors
    ///
    /// As for [`SocketBuilder::bind`].
    pub fn bind_receiver(&self, umem: &Umem, ifindex: u32, queue: u32) -> Result<ReceiveSocket, Error> {
        let fd = self.open()?;
        let offsets = self.make_rings(fd.as_fd(), &[libc::XDP_RX_RING])?;
        let entries = self.ring_entries;
        // SAFETY: the only ring of this socket, mapped once, with the entry type the kernel defines for it.
        let (receive, mapping) =
            unsafe { map_ring::<libc::xdp_desc>(fd.as_fd(), &offsets.rx, libc::XDP_PGOFF_RX_RING, entries)? };
        bind(fd.as_fd(), &address_of(ifindex, queue, libc::XDP_SHARED_UMEM, Some(umem.fd.as_fd())))?;
        let memory = Arc::clone(&umem.memory);
        Ok(ReceiveSocket { ring: Consumer::new(receive), _mapping: mapping, fd, _memory: memory })
    }

    fn open(&self) -> Result<OwnedFd, Error> {
        sys::open_socket(libc::AF_XDP, libc::SOCK_RAW, 0, "opening an AF_XDP socket", Capability::NetRaw)
    }

    fn finish(
        &self,
        fd: OwnedFd,
        memory: Arc<dyn UmemMemory>,
        address: &libc::sockaddr_xdp,
        inherited: Inherited,
    ) -> Result<Socket, Error> {
        let rings = self.map_rings(fd.as_fd())?;
        // Refusals limit bursts, nothing else: the system's limit holds without CAP_NET_ADMIN.
        let _limited =
            sys::set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER_BYTES);
        let send_budget = self.send_budget.filter(|budget| {
            sys::set_option(fd.as_fd(), libc::SOL_XDP, sys::XDP_MAX_TX_SKB_BUDGET, budget).is_ok()
        });
        let busy_poll = self.busy_poll.is_some_and(|options| set_busy_poll(fd.as_fd(), options).is_ok());
        bind(fd.as_fd(), address)?;
        let obtained = Obtained {
            zero_copy: is_zero_copy(fd.as_fd())?,
            segments: inherited.segments,
            need_wakeup: inherited.need_wakeup,
            hugepages: memory.pages() == Pages::Huge2MiB,
            busy_poll,
            send_budget,
        };
        Ok(Socket { rings, fd: Arc::new(fd), memory, obtained, ring_entries: self.ring_entries })
    }

    /// Gives a socket rings; where they lie.
    fn make_rings(&self, fd: BorrowedFd<'_>, rings: &[i32]) -> Result<libc::xdp_mmap_offsets, Error> {
        const ACTION: &str = "making the rings of an AF_XDP socket";
        for ring in rings {
            sys::set_option(fd, libc::SOL_XDP, *ring, &self.ring_entries)
                .map_err(|source| Error::Os { action: ACTION, source })?;
        }
        // SAFETY: the offsets are plain integers.
        unsafe { sys::get_option(fd, libc::SOL_XDP, libc::XDP_MMAP_OFFSETS) }
            .map_err(|source| Error::Os { action: ACTION, source })
    }

    fn map_rings(&self, fd: BorrowedFd<'_>) -> Result<Rings, Error> {
        let rings =
            [libc::XDP_UMEM_FILL_RING, libc::XDP_UMEM_COMPLETION_RING, libc::XDP_RX_RING, libc::XDP_TX_RING];
        let offsets = self.make_rings(fd, &rings)?;
        let page_of = |offset: libc::c_ulonglong| {
            libc::off_t::try_from(offset).map_err(|_| Error::Malformed { what: "AF_XDP ring offsets" })
        };
        let entries = self.ring_entries;
        // SAFETY: each ring of this socket is mapped once, with the entry type the kernel defines for it.
        unsafe {
            let (fill, fill_map) =
                map_ring::<u64>(fd, &offsets.fr, page_of(libc::XDP_UMEM_PGOFF_FILL_RING)?, entries)?;
            let (completion, completion_map) =
                map_ring::<u64>(fd, &offsets.cr, page_of(libc::XDP_UMEM_PGOFF_COMPLETION_RING)?, entries)?;
            let (receive, receive_map) =
                map_ring::<libc::xdp_desc>(fd, &offsets.rx, libc::XDP_PGOFF_RX_RING, entries)?;
            let (send, send_map) =
                map_ring::<libc::xdp_desc>(fd, &offsets.tx, libc::XDP_PGOFF_TX_RING, entries)?;
            Ok(Rings {
                fill: Producer::new(fill),
                completion: Consumer::new(completion),
                receive: Consumer::new(receive),
                send: Producer::new(send),
                _mappings: [fill_map, completion_map, receive_map, send_map],
            })
        }
    }
}

/// A registration of memory by a bound socket, for sockets on other queues to share. It keeps that socket
/// open.
#[derive(Debug, Clone)]
pub struct Umem {
    fd: Arc<OwnedFd>,
    memory: Arc<dyn UmemMemory>,
    inherited: Inherited,
}

impl Umem {
    /// The memory that is registered.
    pub fn memory(&self) -> &Arc<dyn UmemMemory> {
        &self.memory
    }
}

/// What sockets on one UMEM have in common and no option reads back.
#[derive(Debug, Clone, Copy)]
struct Inherited {
    segments: bool,
    need_wakeup: bool,
}

/// What a socket really is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Obtained {
    /// The NIC reads and writes the memory itself (read back with `XDP_OPTIONS`).
    pub zero_copy: bool,
    /// Frames may have several descriptors.
    pub segments: bool,
    /// The kernel asks for wake-ups.
    pub need_wakeup: bool,
    /// The memory is on 2 MiB pages.
    pub hugepages: bool,
    /// Busy polling was granted.
    pub busy_poll: bool,
    /// The send budget that was granted; `None` leaves the kernel's.
    pub send_budget: Option<u32>,
}

/// The kernel's counters of a socket (`XDP_STATISTICS`), since its opening.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SocketStatistics {
    /// Frames dropped for other reasons than a full ring.
    pub rx_dropped: u64,
    /// Frames dropped because the receive ring was full.
    pub rx_ring_full: u64,
    /// Times the fill ring was found empty.
    pub rx_fill_ring_empty: u64,
    /// Fill descriptors that the kernel refused.
    pub rx_invalid_descriptors: u64,
    /// Send descriptors that the kernel refused.
    pub tx_invalid_descriptors: u64,
    /// Times the send ring was found empty.
    pub tx_ring_empty: u64,
}

#[derive(Debug)]
pub(crate) struct Rings {
    pub(crate) fill: Producer<u64>,
    pub(crate) completion: Consumer<u64>,
    pub(crate) receive: Consumer<libc::xdp_desc>,
    pub(crate) send: Producer<libc::xdp_desc>,
    _mappings: [Mapping; 4],
}

/// A bound AF_XDP socket. Frames move through [`Queue`](crate::queue::Queue).
#[derive(Debug)]
pub struct Socket {
    pub(crate) rings: Rings,
    fd: Arc<OwnedFd>,
    memory: Arc<dyn UmemMemory>,
    obtained: Obtained,
    ring_entries: u32,
}

impl std::fmt::Debug for dyn UmemMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UmemMemory").field("len_bytes", &self.len_bytes()).finish_non_exhaustive()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    /// What the kernel granted.
    pub fn obtained(&self) -> Obtained {
        self.obtained
    }

    /// Entries of each ring.
    pub fn ring_entries(&self) -> u32 {
        self.ring_entries
    }

    /// The registration this socket is on, to share.
    pub fn umem(&self) -> Umem {
        let inherited =
            Inherited { segments: self.obtained.segments, need_wakeup: self.obtained.need_wakeup };
        Umem { fd: Arc::clone(&self.fd), memory: Arc::clone(&self.memory), inherited }
    }

    /// The kernel's counters.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn statistics(&self) -> Result<SocketStatistics, Error> {
        statistics(self.fd.as_fd())
    }

    /// Makes the kernel look at the send ring.
    pub(crate) fn kick_send(&self) -> io::Result<()> {
        // SAFETY: no data and no address: the call is only a wake-up.
        let result = unsafe {
            libc::sendto(self.fd.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Makes the kernel look at the fill ring.
    pub(crate) fn kick_receive(&self) {
        // SAFETY: no data and no address: the call is only a wake-up.
        unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                std::ptr::null_mut(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            );
        }
    }
}

/// A bound AF_XDP socket that only receives, on a queue whose other rings belong to a [`Socket`].
#[derive(Debug)]
pub struct ReceiveSocket {
    ring: Consumer<libc::xdp_desc>,
    _mapping: Mapping,
    fd: OwnedFd,
    _memory: Arc<dyn UmemMemory>,
}

impl AsFd for ReceiveSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl ReceiveSocket {
    /// The kernel's counters; those of the fill ring are common to all sockets of the queue.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn statistics(&self) -> Result<SocketStatistics, Error> {
        statistics(self.fd.as_fd())
    }

    pub(crate) fn ring(&self) -> &Consumer<libc::xdp_desc> {
        &self.ring
    }

    pub(crate) fn ring_mut(&mut self) -> &mut Consumer<libc::xdp_desc> {
        &mut self.ring
    }
}

fn statistics(fd: BorrowedFd<'_>) -> Result<SocketStatistics, Error> {
    // SAFETY: the statistics are plain integers; an older kernel fills in fewer.
    let raw: libc::xdp_statistics = unsafe { sys::get_option(fd, libc::SOL_XDP, libc::XDP_STATISTICS) }
        .map_err(|source| Error::Os { action: "reading AF_XDP statistics", source })?;
    Ok(SocketStatistics {
        rx_dropped: raw.rx_dropped,
        rx_ring_full: raw.rx_ring_full,
        rx_fill_ring_empty: raw.rx_fill_ring_empty_descs,
        rx_invalid_descriptors: raw.rx_invalid_descs,
        tx_invalid_descriptors: raw.tx_invalid_descs,
        tx_ring_empty: raw.tx_ring_empty_descs,
    })
}

/// A mapping of one ring.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is a place; what is in it is reached through the ring cursors only.
unsafe impl Send for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whose cursors go away with the same socket.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Maps one ring.
///
/// # Safety
///
/// `T` must be the kernel's entry type of the ring at `page_offset`; each ring may be mapped once, and the
/// mapping must outlive the cursors made of it.
unsafe fn map_ring<T>(
    fd: BorrowedFd<'_>,
    offsets: &libc::xdp_ring_offset,
    page_offset: libc::off_t,
    entries: u32,
) -> Result<(Shared<T>, Mapping), Error> {
    let at =
        |offset: u64| usize::try_from(offset).map_err(|_| Error::Malformed { what: "AF_XDP ring offsets" });
    let slots_at = at(offsets.desc)?;
    let bytes = slots_at + entries as usize * mem::size_of::<T>();
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_POPULATE,
            fd.as_raw_fd(),
            page_offset,
        )
    };
    if raw == libc::MAP_FAILED {
        return Err(Error::last("mapping the rings of an AF_XDP socket"));
    }
    let base: NonNull<u8> = NonNull::new(raw.cast()).expect("mmap never gives the null page");
    let mapping = Mapping { base, bytes };
    // SAFETY: the kernel's offsets lie inside the mapping it just made, aligned for their types.
    let shared = unsafe {
        Shared::new(
            base.add(at(offsets.producer)?).cast::<AtomicU32>(),
            base.add(at(offsets.consumer)?).cast::<AtomicU32>(),
            base.add(at(offsets.flags)?).cast::<AtomicU32>(),
            base.add(slots_at).cast::<Slot<T>>(),
            entries,
        )
    };
    Ok((shared, mapping))
}

fn register_memory(fd: BorrowedFd<'_>, memory: &dyn UmemMemory, headroom_bytes: u32) -> Result<(), Error> {
    let registration = libc::xdp_umem_reg {
        addr: memory.base().as_ptr().addr() as u64,
        len: memory.len_bytes() as u64,
        chunk_size: u32::try_from(CHUNK_BYTES).expect("a chunk is a page"),
        headroom: headroom_bytes,
        flags: 0,
        tx_metadata_len: 0,
    };
    sys::set_option(fd, libc::SOL_XDP, libc::XDP_UMEM_REG, &registration).map_err(|source| {
        let action = "registering frame memory with AF_XDP";
        match source.raw_os_error() {
            // The kernel says this when the pages exceed RLIMIT_MEMLOCK.
            Some(libc::ENOBUFS | libc::EPERM) => {
                Error::Privilege { action, capability: Capability::IpcLock, source }
            }
            _ => Error::Os { action, source },
        }
    })
}

fn set_busy_poll(fd: BorrowedFd<'_>, options: BusyPoll) -> io::Result<()> {
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_PREFER_BUSY_POLL, &1i32)?;
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_BUSY_POLL, &options.poll_us)?;
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_BUSY_POLL_BUDGET, &options.budget)
}

fn is_zero_copy(fd: BorrowedFd<'_>) -> Result<bool, Error> {
    // SAFETY: the options are one integer.
    let options: libc::xdp_options = unsafe { sys::get_option(fd, libc::SOL_XDP, libc::XDP_OPTIONS) }
        .map_err(|source| Error::Os { action: "reading AF_XDP options", source })?;
    Ok(options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
}

fn address_of(ifindex: u32, queue: u32, flags: u16, shared: Option<BorrowedFd<'_>>) -> libc::sockaddr_xdp {
    libc::sockaddr_xdp {
        sxdp_family: u16::try_from(libc::AF_XDP).expect("address families are small"),
        sxdp_flags: flags,
        sxdp_ifindex: ifindex,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: shared.map_or(0, |fd| fd.as_raw_fd().cast_unsigned()),
    }
}

fn bind(fd: BorrowedFd<'_>, address: &libc::sockaddr_xdp) -> Result<(), Error> {
    // SAFETY: a whole sockaddr_xdp of the length given.
    let result = unsafe {
        libc::bind(fd.as_raw_fd(), std::ptr::from_ref(address).cast(), sys::length_of::<libc::sockaddr_xdp>())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::privileged("binding an AF_XDP socket", &[Capability::NetRaw], io::Error::last_os_error()))
    }
}
