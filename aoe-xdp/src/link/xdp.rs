//! Queues on AF_XDP: which modes are tried in which order, and what was had.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use af_xdp::bpf::{AddressMap, AttachMode, LoadedProgram, XdpLink, XskMap};
use af_xdp::frame::{RxFrame, Segment, TxFrame};
use af_xdp::frame_filter::FrameFilter;
use af_xdp::lane::{Lane, Share};
use af_xdp::nic::{Features, Nic, NicState, Queues};
use af_xdp::offload::Offload;
use af_xdp::queue;
use af_xdp::region::{CHUNK_BYTES, Chunk, Handle, Pool, Region};
use af_xdp::socket::{CopyMode, Obtained, SocketBuilder, Umem};

use super::error::LinkError;
use super::interface::add_note;
use super::packet::{release_chunk, release_frame};
use super::programmed::{ADDRESSES_MAX, Programmed, lane_of};
use super::{LinkChoice, LinkInfo, LinkMode, LinkStats, MAX_SEGMENTS};

/// Entries of each ring.
const RING_ENTRIES: u32 = 2048;
/// Chunks that a queue with lanes holds beyond that: they wait in the lanes' rings.
const LANES_CHUNKS: u32 = RING_ENTRIES;
/// Entries of a lane's ring: several receive batches at least.
const LANE_ENTRIES_MIN: u32 = 16;
/// And at most: a core that is later than that has lost its initiators' patience anyway.
const LANE_ENTRIES_MAX: u32 = 1024;
/// Beside the kernel's 256 bytes this puts 36 bytes of headers before byte 512 of the chunk, so that the
/// payload is aligned for a disk.
const HEADROOM_BYTES: u32 = 220;
/// Descriptors that one kick may send in copy mode, where the kernel lets it be raised.
const SEND_BUDGET: u32 = 256;
/// The kernel's own headroom (`XDP_PACKET_HEADROOM`).
const KERNEL_HEADROOM_BYTES: usize = 256;
/// What a driver keeps at the end of a zero-copy buffer for frames of several (`skb_shared_info`).
const ZERO_COPY_TAIL_BYTES: usize = 320;
/// Zero-copy buffer lengths are multiples of this (include/net/xdp_sock_drv.h).
const ZERO_COPY_GRAIN_BYTES: usize = 128;
/// What a zero-copy bind adds to the MTU: Ethernet header, checksum, two VLAN tags.
const ZERO_COPY_FRAME_BYTES: usize = 26;
/// Chunks of other cores that may wait to be reaped after a frame was copied into one chunk.
const FOREIGN_CHUNKS: usize = 4096;

/// What a NIC whose tag stripping cannot be switched off means.
const TAGS_STAY_HIDDEN: &str = "the NIC takes 802.1Q tags out of frames before XDP sees them, and its driver does not let \
                                that be switched off: frames of all VLANs look untagged; --link af-packet tells them apart";

/// Several sockets on one queue behind the generic hook share what only one processor at a time may touch; from Linux
/// 6.15 on a lock sees to that.
const GENERIC_LANES_KERNEL: (u32, u32) = (6, 15);
const GENERIC_LANES_UNSAFE: &str =
    "the generic hook brings frames to several sockets safely from Linux 6.15 on";

/// How long a busy queue or hook is asked for again, after a crash of whoever had it.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
/// How often.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// A driver whose zero-copy sends frames with a header read from a wrong place where it is a kernel module: the device is
/// given the address of memory of the module as if it were memory of the kernel image (Linux 6.13 to 7.3 at least). What
/// lies there decides whether frames leave as they are, not at all, or with a checksum written into them.
const WRONG_HEADER_DRIVER: &str = "virtio_net";
const WRONG_HEADER: &str = "zero-copy of virtio_net as a module may lose or change frames: it sends a header read from a wrong address";

/// Why there is no AF_XDP here.
#[derive(Debug, thiserror::Error)]
pub(super) enum XdpError {
    #[error("{0}")]
    System(#[from] af_xdp::Error),
    #[error("{0}")]
    Refused(String),
}

impl XdpError {
    /// As an error for a user who insisted on AF_XDP.
    pub(super) fn into_link_error(self, interface: &str) -> LinkError {
        match self {
            Self::System(error) if error.missing_capability().is_some() => {
                LinkError::system(interface, error)
            }
            other => LinkError::NoAfXdp { interface: interface.to_owned(), reason: other.to_string() },
        }
    }
}

/// One combination of modes that a socket may be bound with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Attempt {
    zero_copy: bool,
    segments: bool,
}

impl Attempt {
    fn name(self) -> &'static str {
        match (self.zero_copy, self.segments) {
            (true, true) => "zero-copy with scatter-gather",
            (true, false) => "zero-copy",
            (false, true) => "copy with scatter-gather",
            (false, false) => "copy",
        }
    }

    /// Bytes of a frame that one receive buffer holds.
    fn buffer_bytes(self) -> usize {
        let copied = CHUNK_BYTES - KERNEL_HEADROOM_BYTES - HEADROOM_BYTES as usize;
        match (self.zero_copy, self.segments) {
            (false, _) => copied,
            (true, false) => copied / ZERO_COPY_GRAIN_BYTES * ZERO_COPY_GRAIN_BYTES,
            (true, true) => (copied - ZERO_COPY_TAIL_BYTES) / ZERO_COPY_GRAIN_BYTES * ZERO_COPY_GRAIN_BYTES,
        }
    }

    /// Why the bind was refused; where the kernel's own condition does not hold, with its numbers and what to change.
    fn refusal(self, mtu_bytes: u32, features: Option<Features>, error: &af_xdp::Error) -> String {
        let mut text = format!("{}: {error}", self.name());
        let buffers = usize::from(self.send_segments(features));
        let most = self.buffer_bytes() * buffers;
        let needed = mtu_bytes as usize + ZERO_COPY_FRAME_BYTES;
        if self.zero_copy && needed > most {
            text += &format!(
                " (MTU {mtu_bytes} + {ZERO_COPY_FRAME_BYTES} = {needed} bytes do not fit {buffers} x {} = {most}: zero-copy \
                 needs an MTU of at most {}, or a driver with multi-buffer zero-copy)",
                self.buffer_bytes(),
                most - ZERO_COPY_FRAME_BYTES
            );
        }
        text
    }

    /// The longest frame that can be received.
    fn receive_bytes(self) -> usize {
        self.buffer_bytes() * if self.segments { MAX_SEGMENTS } else { 1 }
    }

    /// Descriptors that one sent frame may have.
    fn send_segments(self, features: Option<Features>) -> u8 {
        let ours = u8::try_from(1 + MAX_SEGMENTS).expect("a few segments");
        match (self.segments, self.zero_copy, features) {
            (false, _, _) => 1,
            (true, true, Some(features)) if features.zero_copy_segments > 0 => {
                u8::try_from(features.zero_copy_segments).unwrap_or(ours).min(ours)
            }
            (true, _, _) => ours,
        }
    }
}

/// Whether zero-copy here may change what is sent.
fn sends_wrong_headers(nic: &Nic) -> bool {
    // A driver in the kernel image has no state of loading.
    nic.driver() == WRONG_HEADER_DRIVER
        && Path::new("/sys/module").join(WRONG_HEADER_DRIVER).join("initstate").exists()
}

/// The combinations worth trying, best first.
///
/// Zero-copy without scatter-gather comes before copying with it only where a whole frame fits one
/// buffer: otherwise it would halve or quarter the sectors of a frame.
fn attempts(mode: AttachMode, mtu_bytes: u32, features: Option<Features>) -> Vec<Attempt> {
    let attempt = |zero_copy, segments| Attempt { zero_copy, segments };
    let declared = features.is_none_or(|features| features.zero_copy);
    if mode == AttachMode::Generic || !declared {
        return vec![attempt(false, true), attempt(false, false)];
    }
    let single = attempt(true, false);
    let fits = mtu_bytes as usize + ZERO_COPY_FRAME_BYTES <= single.buffer_bytes();
    let middle = if fits { [single, attempt(false, true)] } else { [attempt(false, true), single] };
    vec![attempt(true, true), middle[0], middle[1], attempt(false, false)]
}

/// What an interface is opened as.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wish<'a> {
    pub(super) filter: &'a FrameFilter,
    /// Whether the NIC takes 802.1Q tags out of frames before the program sees them.
    pub(super) tags: Offload,
    pub(super) choice: LinkChoice,
    /// Cores that the program is to steer to; 0 where it is not to steer.
    pub(super) steered_cores: u16,
}

/// A queue that was taken.
#[derive(Debug)]
struct Taken {
    owner: u16,
    /// Claims to its lanes, until they are taken.
    shares: Vec<Share>,
    lane_entries: u32,
}

/// What the queues of an interface share: the attached program, its maps, the UMEM.
#[derive(Debug)]
pub(super) struct XdpInterface {
    _link: XdpLink,
    map: XskMap,
    /// Where the program steers.
    programmed: Option<Programmed>,
    steered_cores: u16,
    umem: Umem,
    builder: SocketBuilder,
    region: Arc<Region>,
    ifindex: u32,
    segments: u8,
    /// Queue 0, bound already, until it is taken.
    first: Option<queue::Queue>,
    taken: Vec<Option<Taken>>,
}

impl XdpInterface {
    /// Attaches the program and binds queue 0 in the best mode that is granted; fills in `info`. Gives the longest frame
    /// that can be received.
    pub(super) fn open(
        nic: &Nic,
        state: NicState,
        region: &Arc<Region>,
        wish: Wish<'_>,
        info: &mut LinkInfo,
    ) -> Result<(Self, usize), XdpError> {
        let Wish { filter, tags, choice, steered_cores } = wish;
        if tags != Offload::Off && !filter.vlans.is_empty() {
            return Err(XdpError::Refused(TAGS_STAY_HIDDEN.into()));
        }
        let queues = nic.queues();
        let usable = queues.receive.min(queues.transmit);
        let (program, map, mut programmed) = load(filter, queues, steered_cores)?;
        let mut refusals = Vec::new();
        let link = attach(&program, nic, &mut refusals)?;
        if let Some(programmed) = &mut programmed
            && link.mode() == AttachMode::Generic
            && !kernel_is_at_least(GENERIC_LANES_KERNEL)
        {
            programmed.give_up(GENERIC_LANES_UNSAFE.to_owned());
        }
        let features = nic.features();
        let mut attempts = attempts(link.mode(), state.mtu_bytes, features);
        let wrong_headers = sends_wrong_headers(nic);
        if wrong_headers && choice == LinkChoice::Auto {
            attempts.retain(|attempt| !attempt.zero_copy);
            refusals.push(format!("{WRONG_HEADER}; not taken, --link af-xdp takes it"));
        }
        let (first, builder, attempt) = bind_first(nic, state, region, &attempts, features, &mut refusals)?;
        let obtained = first.obtained();
        info.mode = mode_of(link.mode(), obtained);
        info.segments = attempt.send_segments(features);
        info.hugepages = obtained.hugepages;
        info.note = note_of(nic, link.mode(), obtained, features, &refusals);
        if wrong_headers && obtained.zero_copy {
            add_note(&mut info.note, WRONG_HEADER);
        }
        if tags != Offload::Off {
            add_note(&mut info.note, TAGS_STAY_HIDDEN);
        }
        if queues.receive > usable {
            let advice = format!(
                "{} receive queues have no transmit queue and are not served: ethtool -L {} rx {usable}",
                queues.receive - usable,
                info.interface
            );
            add_note(&mut info.note, &advice);
        }
        let opened = Self {
            _link: link,
            map,
            programmed,
            steered_cores,
            umem: first.socket().umem(),
            builder,
            region: Arc::clone(region),
            ifindex: nic.index(),
            segments: info.segments,
            first: Some(first),
            taken: (0..usable).map(|_| None).collect(),
        };
        Ok((opened, attempt.receive_bytes()))
    }

    pub(super) fn queues(&self) -> u16 {
        u16::try_from(self.taken.len()).expect("made from a count of 16 bits")
    }

    /// Takes a queue; `None` where there is none to take.
    pub(super) fn take_queue(
        &mut self,
        index: u16,
        pool: &mut Pool,
    ) -> Result<Option<XdpQueue>, af_xdp::Error> {
        if !matches!(self.taken.get(usize::from(index)), Some(None)) {
            return Ok(None);
        }
        let number = u32::from(index);
        let mut queue = match self.first.take_if(|_| index == 0) {
            Some(first) => first,
            None => while_busy(|| {
                queue::Queue::bind_shared(&self.builder, &self.umem, &self.region, self.ifindex, number)
            })?,
        };
        let programmed = self.programmed.as_ref().filter(|programmed| programmed.is_whole());
        let lanes = programmed.map_or(0, |_| u32::from(self.steered_cores) - 1);
        let shares = (0..lanes).map(|_| queue.share()).collect();
        let wanted = RING_ENTRIES + if lanes > 0 { LANES_CHUNKS } else { 0 };
        let chunks = pool.reserve_for_receiving(wanted);
        queue.set_fill_target(chunks);
        queue.fill(pool);
        self.map.set(number, queue.as_fd())?;
        if let Some(programmed) = programmed {
            self.map.set(programmed.map().place(lane_of(pool.core()), number), queue.as_fd())?;
        }
        self.taken[usize::from(index)] =
            Some(Taken { owner: pool.core(), shares, lane_entries: lane_entries(chunks, lanes) });
        Ok(Some(XdpQueue::new(queue, Arc::clone(&self.region), self.segments)))
    }

    /// Takes the lane of a core on a queue that another core has taken; `None` where there is none to take.
    pub(super) fn take_lane(&mut self, index: u16, core: u16) -> Result<Option<Lane>, af_xdp::Error> {
        let programmed = self.programmed.as_ref().filter(|programmed| programmed.is_whole());
        let taken = self.taken.get_mut(usize::from(index)).and_then(Option::as_mut);
        let (Some(programmed), Some(taken)) = (programmed, taken) else { return Ok(None) };
        if taken.owner == core || core >= self.steered_cores {
            return Ok(None);
        }
        let Some(share) = taken.shares.pop() else { return Ok(None) };
        let number = u32::from(index);
        let lane = Lane::bind(share, taken.lane_entries, self.ifindex, number)?;
        self.map.set(programmed.map().place(lane_of(core), number), lane.as_fd())?;
        Ok(Some(lane))
    }

    /// The addresses that the program steers, where it does.
    pub(super) fn programmed(&self) -> Option<&Programmed> {
        self.programmed.as_ref()
    }

    pub(super) fn programmed_mut(&mut self) -> Option<&mut Programmed> {
        self.programmed.as_mut()
    }
}

/// Loads the program and its maps; for the steering one they have places for the queues' owners and for all cores.
fn load(
    filter: &FrameFilter,
    queues: Queues,
    steered_cores: u16,
) -> Result<(LoadedProgram, XskMap, Option<Programmed>), XdpError> {
    let receive = u32::from(queues.receive);
    if steered_cores == 0 {
        let map = XskMap::new(receive)?;
        return Ok((LoadedProgram::load(filter, &map)?, map, None));
    }
    let map = XskMap::new(receive * (1 + u32::from(steered_cores)))?;
    let addresses = AddressMap::new(ADDRESSES_MAX, receive)?;
    let program = LoadedProgram::load_steering(filter, &map, &addresses)?;
    Ok((program, map, Some(Programmed::of(addresses))))
}

/// Entries of each lane's ring: together they never keep more than three quarters of the queue's chunks waiting, so that
/// cores that are late leave the others something to receive into.
fn lane_entries(chunks: u32, lanes: u32) -> u32 {
    let most = chunks / 4 * 3 / lanes.max(1);
    let entries = most.checked_ilog2().map_or(0, |bits| 1 << bits);
    entries.clamp(LANE_ENTRIES_MIN, LANE_ENTRIES_MAX)
}

/// Whether the running kernel is of that version or later; not where it does not say.
fn kernel_is_at_least(version: (u32, u32)) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release_version(&release).is_some_and(|running| running >= version)
}

/// Major and minor version of a release such as `6.18.24-custom`.
fn release_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Attaches the program in the driver, or else in the generic hook.
fn attach(program: &LoadedProgram, nic: &Nic, refusals: &mut Vec<String>) -> Result<XdpLink, XdpError> {
    for mode in [AttachMode::Native, AttachMode::Generic] {
        match while_busy(|| XdpLink::attach(program, nic.index(), mode)) {
            Ok(link) => return Ok(link),
            Err(error) if error.missing_capability().is_some() => return Err(error.into()),
            Err(error) => refusals.push(error.to_string()),
        }
    }
    Err(XdpError::Refused(refusals.join("; ")))
}

/// Tries again for a while what is refused as busy.
fn while_busy<T>(mut attempt: impl FnMut() -> Result<T, af_xdp::Error>) -> Result<T, af_xdp::Error> {
    let until = Instant::now() + BUSY_PATIENCE;
    loop {
        match attempt() {
            Err(error) if error.is_busy() && Instant::now() < until => std::thread::sleep(BUSY_PAUSE),
            result => return result,
        }
    }
}

/// Binds queue 0 in the first combination of modes that the kernel grants.
fn bind_first(
    nic: &Nic,
    state: NicState,
    region: &Arc<Region>,
    attempts: &[Attempt],
    features: Option<Features>,
    refusals: &mut Vec<String>,
) -> Result<(queue::Queue, SocketBuilder, Attempt), XdpError> {
    for &attempt in attempts {
        let builder = SocketBuilder::new()
            .ring_entries(RING_ENTRIES)
            .headroom_bytes(HEADROOM_BYTES)
            .copy_mode(if attempt.zero_copy { CopyMode::ZeroCopy } else { CopyMode::Copy })
            .segments(attempt.segments)
            .need_wakeup(true)
            .send_budget(SEND_BUDGET);
        match while_busy(|| queue::Queue::bind(&builder, region, nic.index(), 0)) {
            Ok(first) => return Ok((first, builder, attempt)),
            Err(error) if error.missing_capability().is_some() => return Err(error.into()),
            Err(error) => refusals.push(attempt.refusal(state.mtu_bytes, features, &error)),
        }
    }
    Err(XdpError::Refused(refusals.join("; ")))
}

fn mode_of(attached: AttachMode, obtained: Obtained) -> LinkMode {
    match (attached, obtained.zero_copy) {
        (AttachMode::Generic, _) => LinkMode::XdpGeneric,
        (AttachMode::Native, false) => LinkMode::XdpNativeCopy,
        (AttachMode::Native, true) => LinkMode::XdpZeroCopy,
    }
}

/// Why nothing better was had, and what to change.
fn note_of(
    nic: &Nic,
    mode: AttachMode,
    obtained: Obtained,
    features: Option<Features>,
    refusals: &[String],
) -> String {
    let mut note = String::new();
    if mode == AttachMode::Native && features.is_some_and(|features| !features.zero_copy) {
        add_note(&mut note, &format!("driver {} has no AF_XDP zero-copy", nic.driver()));
    }
    for refusal in refusals {
        add_note(&mut note, refusal);
    }
    if !obtained.segments {
        add_note(&mut note, "frames to send are copied into one chunk each");
    }
    note
}

/// One AF_XDP queue.
#[derive(Debug)]
pub(super) struct XdpQueue {
    queue: queue::Queue,
    region: Arc<Region>,
    segments: u8,
    /// Chunks of other cores, of frames that were copied, until they are reaped.
    foreign: Vec<Chunk>,
    stats: LinkStats,
}

impl XdpQueue {
    fn new(queue: queue::Queue, region: Arc<Region>, segments: u8) -> Self {
        let foreign = Vec::with_capacity(if segments > 1 { 0 } else { FOREIGN_CHUNKS });
        Self { queue, region, segments, foreign, stats: LinkStats::default() }
    }

    pub(super) fn receive(&mut self, pool: &mut Pool, out: &mut Vec<RxFrame>) -> usize {
        let room = out.capacity() - out.len();
        let stats = &mut self.stats;
        let got = self.queue.receive(room, pool, |frame| {
            stats.rx_frames += 1;
            stats.rx_bytes += frame.len() as u64;
            out.push(frame);
        });
        self.queue.fill(pool);
        got
    }

    pub(super) fn transmit(&mut self, pool: &mut Pool, frame: TxFrame) -> Result<(), TxFrame> {
        let bytes = frame.len() as u64;
        let descriptors = 1 + frame.data.len();
        let queued = if descriptors <= usize::from(self.segments) {
            self.queue.send(frame)
        } else {
            self.send_copied(pool, frame)
        };
        match queued {
            Ok(()) => {
                self.stats.tx_frames += 1;
                self.stats.tx_bytes += bytes;
                Ok(())
            }
            Err(frame) => {
                self.stats.tx_ring_full += 1;
                Err(frame)
            }
        }
    }

    /// Sends a frame from one chunk that it is copied into.
    fn send_copied(&mut self, pool: &mut Pool, frame: TxFrame) -> Result<(), TxFrame> {
        if !self.queue.has_send_room(1) || self.foreign.len() + frame.data.len() > FOREIGN_CHUNKS {
            return Err(frame);
        }
        let Some(mut chunk) = pool.take_chunk() else { return Err(frame) };
        let header = &self.region.header_bytes(&frame.header)[..usize::from(frame.header_len)];
        pool.copy_in(&mut chunk, 0, header);
        let mut end = header.len();
        for segment in frame.data.iter() {
            pool.copy_in(&mut chunk, end, segment.bytes(&self.region));
            end += usize::from(segment.len);
        }
        let len = u16::try_from(end).expect("the frame fits a chunk: the queue refuses longer ones");
        self.queue.send_single(Segment { chunk, offset: 0, len }).expect("room was seen before");
        self.stats.tx_linearised += 1;
        let foreign = &mut self.foreign;
        release_frame(frame, pool, &mut |chunk| foreign.push(chunk));
        Ok(())
    }

    pub(super) fn flush(&mut self) -> bool {
        let flushed = self.queue.flush();
        self.stats.kicks += u64::from(flushed.kicks);
        flushed.complete
    }

    pub(super) fn reap(&mut self, pool: &mut Pool, foreign: &mut dyn FnMut(Chunk)) {
        for chunk in self.foreign.drain(..) {
            foreign(chunk);
        }
        self.queue.reap(|handle| match handle {
            Handle::Header(header) => pool.release_header(header),
            Handle::Chunk(chunk) => release_chunk(chunk, pool, foreign),
        });
    }

    pub(super) fn poll_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    pub(super) fn has_rx(&self) -> bool {
        self.queue.has_receivable()
    }

    pub(super) fn tx_pending(&self) -> bool {
        self.queue.tx_pending()
    }

    pub(super) fn stats(&mut self) -> LinkStats {
        let mut stats = self.stats;
        // Counters that the kernel does not give are left as they were.
        if let Ok(kernel) = self.queue.statistics() {
            stats.rx_dropped = kernel.rx_dropped + kernel.rx_ring_full;
            stats.rx_ring_full = kernel.rx_ring_full;
            stats.rx_fill_empty = kernel.rx_fill_ring_empty;
            stats.tx_dropped = kernel.tx_invalid_descriptors;
        }
        stats.rx_invalid = self.queue.invalid_frames();
        stats.fill_chunks = u64::from(self.queue.fill_chunks());
        stats.tx_outstanding = u64::from(self.queue.outstanding());
        stats
    }
}

#[cfg(test)]
#[path = "../../tests/link/netns.rs"]
mod netns;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::ports::{Frames, Port, Ports};
    use crate::wire::ETHERTYPE;
    use af_xdp::region::RegionConfig;

    /// A link without scatter-gather, as many drivers' zero-copy is: frames are copied into one chunk, the
    /// copy is counted, and what they were made of comes back at once.
    #[test]
    fn frames_are_copied_where_there_is_no_scatter_gather() {
        let test = "link::xdp::tests::frames_are_copied_where_there_is_no_scatter_gather";
        netns::isolated(test, || {
            netns::veth_pair(1500, 1);
            let config = RegionConfig { cores: 3, chunks_per_core: 256, headers_per_core: 64 };
            let region = Region::new(config).unwrap();
            let open = |name, core| {
                let mut pool = region.pool(core).unwrap();
                let nic = Nic::open(name).unwrap();
                let map = XskMap::new(1).unwrap();
                let ports = Ports::new(&[Port { ordinal: 0, vlan: None }]);
                let program = LoadedProgram::load(&ports.filter(Frames::All), &map).unwrap();
                let link = XdpLink::attach(&program, nic.index(), AttachMode::Native).unwrap();
                let builder = SocketBuilder::new()
                    .headroom_bytes(HEADROOM_BYTES)
                    .ring_entries(64)
                    .copy_mode(CopyMode::Copy);
                let mut queue = queue::Queue::bind(&builder, &region, nic.index(), 0).unwrap();
                assert!(!queue.obtained().segments);
                queue.set_fill_target(32);
                queue.fill(&mut pool);
                map.set(0, queue.as_fd()).unwrap();
                (XdpQueue::new(queue, Arc::clone(&region), 1), pool, link)
            };
            let (mut a, mut pool, _a_link) = open("a0", 0);
            let (mut b, mut b_pool, _b_link) = open("b0", 1);
            let mut elsewhere = region.pool(2).unwrap();
            let before = (pool.free_chunks(), pool.free_headers());
            let mut header = pool.take_header().unwrap();
            pool.header_bytes_mut(&mut header)[..36].fill(0x11);
            pool.header_bytes_mut(&mut header)[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
            let mut own = pool.take_chunk().unwrap();
            pool.bytes_mut(&mut own)[512..1024].fill(0x22);
            let mut foreign = elsewhere.take_chunk().unwrap();
            elsewhere.bytes_mut(&mut foreign)[..512].fill(0x33);
            let mut data = af_xdp::frame::Segments::new();
            data.push(Segment { chunk: own, offset: 512, len: 512 }).unwrap();
            data.push(Segment { chunk: foreign, offset: 0, len: 512 }).unwrap();
            a.transmit(&mut pool, TxFrame { header, header_len: 36, data }).unwrap();
            assert_eq!(pool.bytes_copied(), 36 + 1024);
            assert_eq!((pool.free_chunks(), pool.free_headers()), (before.0 - 1, before.1));
            assert!(a.flush());
            let mut frames = Vec::with_capacity(4);
            let until = Instant::now() + Duration::from_secs(5);
            while frames.is_empty() && Instant::now() < until {
                b.receive(&mut b_pool, &mut frames);
            }
            let got = frames.pop().expect("the frame arrives");
            let bytes = got.head(&region);
            assert_eq!(bytes.len(), 1060);
            assert!(bytes[36..548].iter().all(|byte| *byte == 0x22));
            assert!(bytes[548..].iter().all(|byte| *byte == 0x33));
            got.release(&mut b_pool);
            let mut home = 0;
            while a.stats().tx_outstanding > 0 || home == 0 {
                assert!(Instant::now() < until);
                a.reap(&mut pool, &mut |chunk| {
                    home += 1;
                    elsewhere.release(chunk);
                });
            }
            assert_eq!((home, a.stats().tx_linearised), (1, 1));
            assert_eq!((pool.free_chunks(), pool.free_headers()), before);
            assert_eq!(elsewhere.free_chunks(), elsewhere.chunk_capacity());
        });
    }

    fn features(zero_copy: bool, zero_copy_segments: u32) -> Option<Features> {
        Some(Features { native_redirect: true, zero_copy, receive_segments: true, zero_copy_segments })
    }

    fn names(attempts: &[Attempt]) -> Vec<&'static str> {
        attempts.iter().map(|attempt| attempt.name()).collect()
    }

    #[test]
    fn late_lanes_leave_a_queue_some_chunks() {
        assert_eq!(lane_entries(4096, 0), 1024);
        assert_eq!(lane_entries(3072, 1), 1024);
        assert_eq!(lane_entries(3072, 7), 256);
        assert_eq!(lane_entries(16, 31), 16);
        for (chunks, lanes) in [(64, 1), (2048, 1), (3072, 3), (4096, 15), (4096, 63)] {
            assert!(lane_entries(chunks, lanes) * lanes <= chunks / 4 * 3, "{chunks} {lanes}");
        }
    }

    #[test]
    fn releases_of_kernels_are_read() {
        assert_eq!(release_version("6.18.44-fc-v769\n"), Some((6, 18)));
        assert_eq!(release_version("7.3-rc1"), Some((7, 3)));
        assert_eq!(release_version("6"), None);
        assert_eq!(release_version(""), None);
        assert!(kernel_is_at_least((5, 0)) && !kernel_is_at_least((99, 0)));
    }

    #[test]
    fn buffers_are_as_the_kernel_reckons_them() {
        let bytes = |zero_copy, segments| Attempt { zero_copy, segments }.buffer_bytes();
        assert_eq!(bytes(false, true), 3620);
        assert_eq!(bytes(true, false), 3584);
        assert_eq!(bytes(true, true), 3200);
    }

    #[test]
    fn small_frames_prefer_zero_copy_without_segments() {
        let order = attempts(AttachMode::Native, 1500, None);
        assert_eq!(
            names(&order),
            ["zero-copy with scatter-gather", "zero-copy", "copy with scatter-gather", "copy"]
        );
    }

    #[test]
    fn jumbo_frames_prefer_whole_frames_over_zero_copy() {
        let order = attempts(AttachMode::Native, 9000, features(true, 1));
        assert_eq!(
            names(&order),
            ["zero-copy with scatter-gather", "copy with scatter-gather", "zero-copy", "copy"]
        );
    }

    #[test]
    fn zero_copy_is_not_tried_where_it_cannot_be() {
        let copies = ["copy with scatter-gather", "copy"];
        assert_eq!(names(&attempts(AttachMode::Native, 9000, features(false, 0))), copies);
        assert_eq!(names(&attempts(AttachMode::Generic, 9000, features(true, 8))), copies);
    }

    #[test]
    fn a_refusal_says_which_condition_does_not_hold() {
        let error = af_xdp::Error::Malformed { what: "bind" };
        let single = Attempt { zero_copy: true, segments: false };
        let text = single.refusal(9000, features(true, 1), &error);
        assert!(text.contains("MTU 9000 + 26 = 9026 bytes do not fit 1 x 3584 = 3584"), "{text}");
        assert!(text.contains("at most 3558"), "{text}");
        assert!(!single.refusal(3558, features(true, 1), &error).contains("do not fit"));
        let several = Attempt { zero_copy: true, segments: true };
        assert!(several.refusal(9000, features(true, 2), &error).contains("2 x 3200 = 6400"));
        assert!(!several.refusal(9000, features(true, 0), &error).contains("do not fit"));
    }

    #[test]
    fn a_driver_may_limit_the_segments_of_a_frame() {
        let both = Attempt { zero_copy: true, segments: true };
        assert_eq!(both.send_segments(features(true, 3)), 3);
        assert_eq!(both.send_segments(features(true, 0)), 5);
        assert_eq!(both.send_segments(features(true, 300)), 5);
        assert_eq!(Attempt { zero_copy: false, segments: true }.send_segments(features(true, 3)), 5);
        assert_eq!(Attempt { zero_copy: false, segments: false }.send_segments(None), 1);
    }
}
