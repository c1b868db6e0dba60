//! The AF_PACKET twin: a raw socket for the frames of a [`FrameFilter`], moved in batches straight between chunks and the
//! kernel (recvmmsg and sendmmsg over I/O vectors: no copy in user space), and [`MacFilter`].
//!
//! The kernel takes 802.1Q tags out of received frames and tells them beside (`PACKET_AUXDATA`); a tag to send is part of
//! the frame.
//!
//! Invariants: the chunks posted for receiving are held by the socket alone; a frame's header and chunks
//! are held until sendmmsg has taken the frame. Nothing is allocated after the socket is opened.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::{Capability, Error};
use crate::frame::{MAX_SEGMENTS, RxFrame, Segment, Segments, TxFrame};
use crate::frame_filter::{FrameFilter, TAG_PROTOCOL, VLAN_ID_MASK};
use crate::region::{CHUNK_BYTES, Chunk, HEADER_BYTES, Pool, Region};
use crate::sys;

/// Messages in one system call.
pub const BATCH: usize = 32;
/// Chunks posted for one received frame: the first takes 3620 bytes, so three take 11 812.
pub const RECEIVE_CHUNKS: usize = 3;
/// Where the first byte of a received frame is put: 36 bytes of headers end at byte 512 of the chunk.
pub const RECEIVE_OFFSET: usize = 476;

/// The longest frame that fits the chunks posted for it.
pub const RECEIVE_BYTES: usize = RECEIVE_CHUNKS * CHUNK_BYTES - RECEIVE_OFFSET;

const SOCKET_BUFFER_BYTES: i32 = 8 << 20;

/// Counters of the socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PacketStatistics {
    /// Frames the kernel dropped because the receive buffer was full.
    pub dropped_full: u64,
    /// Frames longer than the chunks posted for them.
    pub truncated: u64,
    /// Frames the kernel refused to send (too long, link down, queue full).
    pub send_refused: u64,
}

/// A raw packet socket on one interface and EtherType.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
    region: Arc<Region>,
    posted: Box<[[Option<Chunk>; RECEIVE_CHUNKS]]>,
    receive: Box<Vectors<RECEIVE_CHUNKS>>,
    send: Box<Vectors<{ MAX_SEGMENTS + 1 }>>,
    statistics: PacketStatistics,
    receive_buffer_forced: bool,
    /// The kernel tells the tags of received frames.
    tells_tags: bool,
}

/// The I/O vectors and message headers of one batch, made once.
struct Vectors<const N: usize> {
    slices: [[libc::iovec; N]; BATCH],
    messages: [libc::mmsghdr; BATCH],
    /// What the kernel tells beside each received frame: one `cmsghdr` and a `tpacket_auxdata`.
    beside: [[u64; BESIDE_WORDS]; BATCH],
}

/// Room for one control message with a `tpacket_auxdata`, in words of its alignment.
const BESIDE_WORDS: usize = 5;
const BESIDE_BYTES: usize = BESIDE_WORDS * 8;
const _: () =
    assert!(mem::size_of::<libc::cmsghdr>() + mem::size_of::<libc::tpacket_auxdata>() <= BESIDE_BYTES);

impl<const N: usize> std::fmt::Debug for Vectors<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vectors").finish_non_exhaustive()
    }
}

// SAFETY: the raw pointers are scratch for one system call at a time, rewritten before each.
unsafe impl<const N: usize> Send for Vectors<N> {}

impl<const N: usize> Vectors<N> {
    fn new() -> Box<Self> {
        // SAFETY: all zero is a valid value of every part: integers and null pointers.
        unsafe { Box::new(mem::zeroed()) }
    }
}

impl PacketSocket {
    /// Opens a socket for the frames that `filter` wants on the interface `index`.
    ///
    /// # Errors
    ///
    /// [`Error::Privilege`] naming `CAP_NET_RAW`, or the failed call.
    pub fn open(index: u32, filter: &FrameFilter, region: &Arc<Region>) -> Result<Self, Error> {
        // Protocol 0 receives nothing until bind names the interface: no frame of another one slips in.
        let fd = open_raw("opening an AF_PACKET socket")?;
        let set = |level, name, value: i32, action| {
            sys::set_option(fd.as_fd(), level, name, &value).map_err(|source| Error::Os { action, source })
        };
        set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1, "ignoring outgoing frames (Linux 4.20)")?;
        if !filter.vlans.is_empty() {
            set(libc::SOL_PACKET, libc::PACKET_AUXDATA, 1, "asking for 802.1Q tags")?;
        }
        accept_only(fd.as_fd(), filter)?;
        let receive_buffer_forced = enlarge_buffers(fd.as_fd());
        // All protocols: a tap bound to one sees frames only after the kernel has cleared their VLAN tags.
        bind(fd.as_fd(), index, u16::try_from(libc::ETH_P_ALL).expect("protocols are 16 bits"))?;
        Ok(Self {
            fd,
            region: Arc::clone(region),
            posted: (0..BATCH).map(|_| [const { None }; RECEIVE_CHUNKS]).collect(),
            receive: Vectors::new(),
            send: Vectors::new(),
            tells_tags: !filter.vlans.is_empty(),
            statistics: PacketStatistics::default(),
            receive_buffer_forced,
        })
    }

    /// Whether the large receive buffer was granted (`CAP_NET_ADMIN`); otherwise the system's limit holds.
    pub fn receive_buffer_forced(&self) -> bool {
        self.receive_buffer_forced
    }

    /// Receives up to `max` frames that are waiting, in one system call for each [`BATCH`], into
    /// empty chunks of `pool`.
    ///
    /// # Errors
    ///
    /// What recvmmsg says but `EAGAIN`: the frames delivered before stay delivered.
    pub fn receive(
        &mut self,
        max: usize,
        pool: &mut Pool,
        mut deliver: impl FnMut(RxFrame),
    ) -> io::Result<usize> {
        let mut delivered = 0;
        while delivered < max {
            let ready = self.post(BATCH.min(max - delivered), pool);
            if ready == 0 {
                break;
            }
            let got = match self.receive_batch(ready) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                other => other?,
            };
            for index in 0..got {
                if let Some(frame) = self.collect(index) {
                    deliver(frame);
                    delivered += 1;
                }
            }
            if got < ready {
                break;
            }
        }
        Ok(delivered)
    }

    /// Whether a frame waits.
    pub fn has_receivable(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, and no waiting.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        ready > 0 && poll.revents & libc::POLLIN != 0
    }

    /// Sends frames from the front of `frames`, at most [`BATCH`], and says how many the kernel took or
    /// refused for good; 0 where it wants to be asked again later. The caller removes those.
    ///
    /// # Errors
    ///
    /// Never for a frame alone: one that cannot be sent is counted and passed over.
    pub fn send<'a>(&mut self, frames: impl Iterator<Item = &'a TxFrame>) -> usize {
        let mut count = 0;
        for (index, frame) in frames.take(BATCH).enumerate() {
            self.fill_send(index, frame);
            count = index + 1;
        }
        if count == 0 {
            return 0;
        }
        let length = libc::c_uint::try_from(count).expect("a batch is small");
        // SAFETY: the first `count` messages point to filled vectors over memory whose handles the caller
        // holds; the kernel reads them during the call only.
        let sent = unsafe {
            libc::sendmmsg(self.fd.as_raw_fd(), self.send.messages.as_mut_ptr(), length, libc::MSG_DONTWAIT)
        };
        if let Ok(sent) = usize::try_from(sent) {
            return sent;
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR | libc::ENOMEM) => 0,
            _ => {
                // The first frame of the batch is the one refused: an AoE initiator asks again.
                self.statistics.send_refused += 1;
                1
            }
        }
    }

    /// The counters; reading them asks the kernel.
    pub fn statistics(&mut self) -> PacketStatistics {
        // SAFETY: tpacket_stats is two integers.
        let kernel = unsafe {
            sys::get_option::<libc::tpacket_stats>(self.fd.as_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS)
        };
        if let Ok(since_last) = kernel {
            self.statistics.dropped_full += u64::from(since_last.tp_drops);
        }
        self.statistics
    }

    /// Chunks held for frames to come.
    pub fn posted_chunks(&self) -> usize {
        self.posted.iter().flatten().flatten().count()
    }

    /// Posts chunks for `wanted` messages; returns for how many there are enough.
    fn post(&mut self, wanted: usize, pool: &mut Pool) -> usize {
        for index in 0..wanted {
            for slot in &mut self.posted[index] {
                if slot.is_none() {
                    *slot = pool.take_chunk();
                }
                if slot.is_none() {
                    return index;
                }
            }
            let vectors = &mut self.receive;
            for (position, (slice, chunk)) in
                vectors.slices[index].iter_mut().zip(&self.posted[index]).enumerate()
            {
                let chunk = chunk.as_ref().expect("posted above");
                let start = receive_start(position);
                // SAFETY: `start` lies inside the chunk.
                let base = unsafe { self.region.chunk_pointer(chunk).add(start) };
                *slice = libc::iovec { iov_base: base.as_ptr().cast(), iov_len: CHUNK_BYTES - start };
            }
            let message = &mut vectors.messages[index];
            message.msg_len = 0;
            message.msg_hdr.msg_iov = vectors.slices[index].as_mut_ptr();
            message.msg_hdr.msg_iovlen = RECEIVE_CHUNKS as _;
            message.msg_hdr.msg_flags = 0;
            if self.tells_tags {
                message.msg_hdr.msg_control = vectors.beside[index].as_mut_ptr().cast();
                message.msg_hdr.msg_controllen = BESIDE_BYTES;
            }
        }
        wanted
    }

    fn receive_batch(&mut self, ready: usize) -> io::Result<usize> {
        let length = libc::c_uint::try_from(ready).expect("a batch is small");
        // SAFETY: the first `ready` messages point to vectors over chunks that this socket alone holds.
        let got = unsafe {
            libc::recvmmsg(
                self.fd.as_raw_fd(),
                self.receive.messages.as_mut_ptr(),
                length,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// Takes message `index` out of the batch; `None` for a frame that is not ours.
    fn collect(&mut self, index: usize) -> Option<RxFrame> {
        let message = &self.receive.messages[index];
        if message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
            self.statistics.truncated += 1;
            return None;
        }
        let mut rest = message.msg_len as usize;
        let mut segments = Segments::new();
        for (position, slot) in self.posted[index].iter_mut().enumerate() {
            let start = receive_start(position);
            let len = rest.min(CHUNK_BYTES - start);
            if len == 0 {
                break;
            }
            rest -= len;
            let chunk = slot.take().expect("a message was received into posted chunks");
            let offset = u16::try_from(start).expect("offsets in a chunk are small");
            let len = u16::try_from(len).expect("lengths in a chunk are small");
            segments
                .push(Segment { chunk, offset, len })
                .expect("fewer chunks are posted than a frame holds");
        }
        let vlan_id = if self.tells_tags { self.vlan_id_beside(index) } else { 0 };
        (!segments.is_empty()).then(|| RxFrame::new(segments).with_vlan_id(vlan_id))
    }

    /// The VLAN of the tag that the kernel took out of frame `index`; 0 where there was none.
    fn vlan_id_beside(&self, index: usize) -> u16 {
        let filled = self.receive.messages[index].msg_hdr.msg_controllen;
        let words = &self.receive.beside[index];
        let mut bytes = [0; BESIDE_BYTES];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        vlan_id_of(&bytes[..BESIDE_BYTES.min(filled)])
    }

    fn fill_send(&mut self, index: usize, frame: &TxFrame) {
        assert!(frame.is_well_formed(), "slices lie inside their chunks");
        let vectors = &mut self.send;
        let slices = &mut vectors.slices[index];
        slices[0] = libc::iovec {
            iov_base: self.region.header_pointer(&frame.header).as_ptr().cast(),
            iov_len: usize::from(frame.header_len),
        };
        let mut count = 1;
        for segment in frame.data.iter() {
            // SAFETY: a well-formed frame's slices lie inside their chunks.
            let base = unsafe { self.region.chunk_pointer(&segment.chunk).add(usize::from(segment.offset)) };
            slices[count] = libc::iovec { iov_base: base.as_ptr().cast(), iov_len: usize::from(segment.len) };
            count += 1;
        }
        let message = &mut vectors.messages[index];
        message.msg_hdr.msg_iov = slices.as_mut_ptr();
        message.msg_hdr.msg_iovlen = count as _;
    }
}

/// Where the received bytes start in a frame's chunk number `position`.
const fn receive_start(position: usize) -> usize {
    if position == 0 { RECEIVE_OFFSET } else { 0 }
}

const _: () = assert!(RECEIVE_CHUNKS <= MAX_SEGMENTS);
const _: () = assert!(RECEIVE_OFFSET + 36 == 512 && RECEIVE_OFFSET > HEADER_BYTES);

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Keeps extra unicast addresses accepted by an interface, as long as the value lives.
#[derive(Debug)]
pub struct MacFilter {
    fd: OwnedFd,
    index: u32,
    promiscuous: bool,
}

impl MacFilter {
    /// Opens a filter on the interface `index`. It receives nothing itself.
    ///
    /// # Errors
    ///
    /// [`Error::Privilege`] naming `CAP_NET_RAW`, or the failed call.
    pub fn open(index: u32) -> Result<Self, Error> {
        let fd = open_raw("opening an AF_PACKET socket to accept more addresses")?;
        Ok(Self { fd, index, promiscuous: false })
    }

    /// Makes the interface accept frames to `mac`; promiscuous mode is the fallback of a full filter.
    ///
    /// # Errors
    ///
    /// The failed call, where promiscuous mode was refused too.
    pub fn add(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        if self.change(libc::PACKET_ADD_MEMBERSHIP, libc::PACKET_MR_UNICAST, mac).is_ok() || self.promiscuous
        {
            return Ok(());
        }
        self.change(libc::PACKET_ADD_MEMBERSHIP, libc::PACKET_MR_PROMISC, [0; 6]).map_err(|source| {
            Error::Os { action: "making the interface accept an export's address", source }
        })?;
        self.promiscuous = true;
        Ok(())
    }

    /// Stops accepting `mac`. An address that was not added is no error.
    pub fn remove(&mut self, mac: [u8; 6]) {
        // The kernel refuses only what is not there.
        let _absent = self.change(libc::PACKET_DROP_MEMBERSHIP, libc::PACKET_MR_UNICAST, mac);
    }

    /// Whether an address did not fit and all frames are accepted instead.
    pub fn is_promiscuous(&self) -> bool {
        self.promiscuous
    }

    fn change(&self, operation: i32, kind: i32, mac: [u8; 6]) -> io::Result<()> {
        let mut address = [0; 8];
        address[..6].copy_from_slice(&mac);
        let request = libc::packet_mreq {
            mr_ifindex: i32::try_from(self.index).map_err(io::Error::other)?,
            mr_type: libc::c_ushort::try_from(kind).map_err(io::Error::other)?,
            mr_alen: 6,
            mr_address: address,
        };
        sys::set_option(self.fd.as_fd(), libc::SOL_PACKET, operation, &request)
    }
}

pub(crate) fn open_raw(action: &'static str) -> Result<OwnedFd, Error> {
    sys::open_socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0, action, Capability::NetRaw)
}

/// Asks for large socket buffers, by force where the privilege is there; says whether it was.
fn enlarge_buffers(fd: BorrowedFd<'_>) -> bool {
    let ask = |force, plain| {
        let forced = sys::set_option(fd, libc::SOL_SOCKET, force, &SOCKET_BUFFER_BYTES).is_ok();
        if !forced {
            // The system's limit holds then: smaller bursts before drops, nothing else.
            let _limited = sys::set_option(fd, libc::SOL_SOCKET, plain, &SOCKET_BUFFER_BYTES);
        }
        forced
    };
    let send_forced = ask(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF);
    ask(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF) && send_forced
}

/// The VLAN in a control message of type `PACKET_AUXDATA`; 0 where there is none.
fn vlan_id_of(message: &[u8]) -> u16 {
    const STATUS_AT: usize =
        mem::size_of::<libc::cmsghdr>() + mem::offset_of!(libc::tpacket_auxdata, tp_status);
    const TAG_AT: usize =
        mem::size_of::<libc::cmsghdr>() + mem::offset_of!(libc::tpacket_auxdata, tp_vlan_tci);
    let word = |at: usize| Some(u32::from_ne_bytes(message.get(at..at + 4)?.try_into().ok()?));
    let half = |at: usize| Some(u16::from_ne_bytes(message.get(at..at + 2)?.try_into().ok()?));
    let is_tagged = word(STATUS_AT).is_some_and(|status| status & libc::TP_STATUS_VLAN_VALID != 0);
    half(TAG_AT).filter(|_| is_tagged).map_or(0, |control| control & VLAN_ID_MASK)
}

/// Makes the kernel drop, before it queues them, all frames that `filter` does not want.
fn accept_only(fd: BorrowedFd<'_>, filter: &FrameFilter) -> Result<(), Error> {
    let mut program = classic_program(filter);
    let filter = libc::sock_fprog {
        len: libc::c_ushort::try_from(program.len()).expect("the filter is short"),
        filter: program.as_mut_ptr(),
    };
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)
        .map_err(|source| Error::Os { action: "filtering an AF_PACKET socket", source })
}

/// The filter as classic BPF, for frames whose tag was taken out.
fn classic_program(filter: &FrameFilter) -> Vec<libc::sock_filter> {
    // Ancillary loads (include/uapi/linux/filter.h): the tag that was taken out, whether there was one, its protocol.
    const VLAN_TAG: u32 = (-4096_i32 + 44).cast_unsigned();
    const VLAN_TAG_PRESENT: u32 = (-4096_i32 + 48).cast_unsigned();
    const VLAN_TAG_PROTOCOL: u32 = (-4096_i32 + 60).cast_unsigned();
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const AND: u16 = 0x54;
    const JUMP_EQUAL: u16 = 0x15;
    const JUMP_ANY_BIT: u16 = 0x45;
    const RETURN: u16 = 0x06;
    const WHOLE_FRAME: u32 = 0x4_0000;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // What every frame is asked in the end, then the way out for those that are wanted, and for the others.
    let ours = [
        op(LOAD_HALF, 0, 0, 12),
        op(JUMP_EQUAL, 0, 3, u32::from(filter.ethertype)),
        op(LOAD_BYTE, 0, 0, 14),
        op(JUMP_ANY_BIT, 1, 0, u32::from(filter.rejected_flags)),
        op(RETURN, 0, 0, WHOLE_FRAME),
        op(RETURN, 0, 0, 0),
    ];
    let vlans: Vec<u16> = filter.vlan_ids().collect();
    let vlan_count = u8::try_from(vlans.len()).expect("a few VLANs");
    let untagged_way = if filter.untagged { 4 + vlan_count } else { 4 + vlan_count + 5 };
    let mut program = vec![
        op(LOAD_HALF, 0, 0, VLAN_TAG_PRESENT),
        op(JUMP_EQUAL, untagged_way, 0, 0),
        op(LOAD_HALF, 0, 0, VLAN_TAG_PROTOCOL),
        op(JUMP_EQUAL, 0, 2 + vlan_count + 5, u32::from(TAG_PROTOCOL)),
        op(LOAD_HALF, 0, 0, VLAN_TAG),
        op(AND, 0, 0, u32::from(VLAN_ID_MASK)),
    ];
    for (vlan, left) in vlans.iter().zip((0..vlan_count).rev()) {
        // The last one that does not match goes to the way out for what is not wanted.
        program.push(op(JUMP_EQUAL, left, if left == 0 { 5 } else { 0 }, u32::from(*vlan)));
    }
    program.extend(ours);
    program
}

/// Binds to an interface, for frames of `protocol` (host order).
pub(crate) fn bind(fd: BorrowedFd<'_>, index: u32, protocol: u16) -> Result<(), Error> {
    // SAFETY: all zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::c_ushort::try_from(libc::AF_PACKET).expect("address families are small");
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = i32::try_from(index).expect("the kernel's indices are positive integers");
    // SAFETY: a whole sockaddr_ll of the length given.
    let result = unsafe {
        libc::bind(fd.as_raw_fd(), std::ptr::from_ref(&address).cast(), sys::length_of::<libc::sockaddr_ll>())
    };
    if result == 0 { Ok(()) } else { Err(Error::last("binding an AF_PACKET socket to the interface")) }
}
