//! AF_XDP sockets on a real virtual interface: what a builder asks for and what it gets. Needs root.

#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a failure in a test's own steps is the test's failure")]

#[path = "../../tests/link/netns.rs"]
mod netns;

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use af_xdp::bpf::{AddressMap, AttachMode, LoadedProgram, XdpLink, XskMap};
use af_xdp::frame_filter::FrameFilter;
use af_xdp::lane::Lane;
use af_xdp::nic::Nic;
use af_xdp::queue::Queue;
use af_xdp::raw::RawSocket;
use af_xdp::region::{Chunk, Pages, Region, RegionConfig, UmemMemory};
use af_xdp::socket::{BusyPoll, CopyMode, Obtained, SocketBuilder};
use netns::{isolated, veth_pair};

fn region() -> Arc<Region> {
    Region::new(RegionConfig { cores: 1, chunks_per_core: 64, headers_per_core: 64 }).unwrap()
}

/// Whether the running kernel is of this version or later.
fn kernel_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (major, minor)
}

#[test]
fn a_builder_gets_what_it_asks_for() {
    isolated("a_builder_gets_what_it_asks_for", || {
        veth_pair(9000, 1);
        let index = Nic::open("a0").unwrap().index();
        let region = region();
        let plain = SocketBuilder::new().ring_entries(64).need_wakeup(false);
        let obtained = plain.bind(&region, index, 0).unwrap().obtained();
        let expected = Obtained {
            zero_copy: false,
            segments: false,
            need_wakeup: false,
            hugepages: region.pages() == Pages::Huge2MiB,
            busy_poll: false,
            send_budget: None,
        };
        assert_eq!(obtained, expected);
        let full = SocketBuilder::new()
            .ring_entries(128)
            .headroom_bytes(220)
            .copy_mode(CopyMode::Copy)
            .segments(true)
            .send_budget(64)
            .busy_poll(BusyPoll { poll_us: 20, budget: 64 });
        // The kernel takes the first socket apart in the background.
        let until = Instant::now() + Duration::from_secs(5);
        let socket = loop {
            match full.bind(&region, index, 0) {
                Err(error) if error.is_busy() && Instant::now() < until => std::thread::yield_now(),
                result => break result.unwrap(),
            }
        };
        assert!(socket.obtained().segments && socket.obtained().need_wakeup && socket.obtained().busy_poll);
        assert_eq!(socket.ring_entries(), 128);
        // Linux 6.17 and later grant it; earlier kernels say that they do not.
        assert_eq!(socket.obtained().send_budget, kernel_at_least(6, 17).then_some(64));
        assert_eq!(socket.statistics().unwrap(), af_xdp::socket::SocketStatistics::default());
    });
}

#[test]
fn what_the_driver_has_not_is_refused() {
    isolated("what_the_driver_has_not_is_refused", || {
        veth_pair(1500, 1);
        let nic = Nic::open("a0").unwrap();
        let region = region();
        let zero_copy = SocketBuilder::new().copy_mode(CopyMode::ZeroCopy);
        let error = zero_copy.bind(&region, nic.index(), 0).unwrap_err();
        assert_eq!(error.errno(), Some(95), "EOPNOTSUPP: {error}");
        if let Some(features) = nic.features() {
            assert!(features.native_redirect && !features.zero_copy);
        }
        let error = SocketBuilder::new().bind(&region, nic.index(), 7).unwrap_err();
        assert_eq!(error.errno(), Some(22), "EINVAL, there is no such queue: {error}");
        let _bound = SocketBuilder::new().bind(&region, nic.index(), 0).unwrap();
        let error = SocketBuilder::new().bind(&region, nic.index(), 0).unwrap_err();
        assert_eq!(error.errno(), Some(16), "EBUSY, the queue is bound: {error}");
        assert_eq!(nic.driver(), "veth");
    });
}

/// Memory that is not a region: any owner may register its own.
struct Plain {
    base: NonNull<u8>,
}

const PLAIN_BYTES: usize = 1 << 20;
const LAYOUT: std::alloc::Layout = match std::alloc::Layout::from_size_align(PLAIN_BYTES, 4096) {
    Ok(layout) => layout,
    Err(_) => panic!("a power of two"),
};

impl Plain {
    fn new() -> Self {
        // SAFETY: the layout is not empty.
        let base = unsafe { std::alloc::alloc_zeroed(LAYOUT) };
        Self { base: NonNull::new(base).unwrap() }
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and freed once.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), LAYOUT) };
    }
}

// SAFETY: plain memory, owned by the value and touched by nobody.
unsafe impl Send for Plain {}
// SAFETY: as for Send.
unsafe impl Sync for Plain {}
// SAFETY: page-aligned memory of that length, alive as long as the value.
unsafe impl UmemMemory for Plain {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len_bytes(&self) -> usize {
        PLAIN_BYTES
    }

    fn pages(&self) -> Pages {
        Pages::Normal
    }
}

#[test]
fn the_memory_may_be_anybodys() {
    isolated("the_memory_may_be_anybodys", || {
        veth_pair(1500, 2);
        let index = Nic::open("a0").unwrap().index();
        let memory = Arc::new(Plain::new());
        let builder = SocketBuilder::new().ring_entries(64);
        let first = builder.bind(&memory, index, 0).unwrap();
        let second = builder.bind_shared(&first.umem(), index, 1).unwrap();
        assert_eq!(second.umem().memory().base(), memory.base());
        assert!(Arc::strong_count(&memory) >= 3, "sockets keep their memory");
        drop((first, second));
        assert_eq!(Arc::strong_count(&memory), 1);
    });
}

#[test]
fn a_queue_holds_no_more_than_its_target() {
    isolated("a_queue_holds_no_more_than_its_target", || {
        veth_pair(1500, 1);
        let index = Nic::open("a0").unwrap().index();
        let region = region();
        let mut pool = region.pool(0).unwrap();
        let mut queue = Queue::bind(&SocketBuilder::new().ring_entries(32), &region, index, 0).unwrap();
        queue.set_fill_target(10);
        queue.fill(&mut pool);
        assert_eq!((queue.fill_chunks(), pool.free_chunks()), (10, 54));
        queue.set_fill_target(1000);
        queue.fill(&mut pool);
        assert_eq!((queue.fill_chunks(), pool.free_chunks()), (32, 32), "the ring is the limit");
    });
}

const ETHERTYPE: u16 = 0x88a2;
const OWNERS: [u8; 6] = [0x02, 0xaa, 0, 0, 0, 0x10];
const LANES: [u8; 6] = [0x02, 0xaa, 0, 0, 0, 0x20];

/// A queue on `a0` with a lane for [`LANES`], and whoever sends from `b0`.
struct Shared {
    queue: Queue,
    pool: af_xdp::region::Pool,
    lane: Lane,
    sender: RawSocket,
    _link: XdpLink,
}

impl Shared {
    fn open(mode: AttachMode, mtu: u32, entries: u32) -> Self {
        veth_pair(mtu, 1);
        let index = Nic::open("a0").unwrap().index();
        let region =
            Region::new(RegionConfig { cores: 2, chunks_per_core: 256, headers_per_core: 64 }).unwrap();
        let mut pool = region.pool(0).unwrap();
        let filter = FrameFilter { ethertype: ETHERTYPE, untagged: true, vlans: vec![7], rejected_flags: 0 };
        let (addresses, sockets) = (AddressMap::new(4, 1).unwrap(), XskMap::new(2).unwrap());
        let program = LoadedProgram::load_steering(&filter, &sockets, &addresses).unwrap();
        let link = XdpLink::attach(&program, index, mode).unwrap();
        let builder = SocketBuilder::new().ring_entries(64).copy_mode(CopyMode::Copy).segments(true);
        let mut queue = Queue::bind(&builder, &region, index, 0).unwrap();
        let lane = Lane::bind(queue.share(), entries, index, 0).unwrap();
        queue.set_fill_target(48);
        queue.fill(&mut pool);
        sockets.set(addresses.place(0, 0), queue.socket().as_fd()).unwrap();
        sockets.set(addresses.place(1, 0), lane.as_fd()).unwrap();
        addresses.set(LANES, 1).unwrap();
        let sender = RawSocket::open(Nic::open("b0").unwrap().index(), ETHERTYPE).unwrap();
        Self { queue, pool, lane, sender, _link: link }
    }

    fn send(&mut self, to: [u8; 6], vlan: Option<u16>, number: u32, bytes: usize) {
        let mut frame = [&to[..], &[2, 0, 0, 0, 0, 1]].concat();
        if let Some(vlan) = vlan {
            frame.extend_from_slice(&[0x81, 0]);
            frame.extend_from_slice(&vlan.to_be_bytes());
        }
        frame.extend_from_slice(&ETHERTYPE.to_be_bytes());
        frame.extend_from_slice(&number.to_be_bytes());
        frame.resize(bytes, u8::try_from(number % 251).unwrap());
        self.sender.send(&frame).unwrap();
    }

    /// The numbers, VLANs and lengths of what the lane has now, each frame's bytes checked; its chunks go to `away`.
    fn by_lane(&mut self, away: &mut Vec<Chunk>) -> Vec<(u32, u16, usize)> {
        let region = Arc::clone(self.pool.region());
        let (mut got, mut frames, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        self.lane.receive(64, |chunk| refused.push(chunk), |frame| frames.push(frame));
        away.extend(refused);
        for frame in frames {
            let head = frame.head(&region);
            assert_eq!(head[..6], LANES, "only what is for it");
            assert_eq!(head[12..14], ETHERTYPE.to_be_bytes(), "untagged");
            let number = u32::from_be_bytes(head[14..18].try_into().unwrap());
            let bytes = frame.segments().iter().flat_map(|part| part.bytes(&region).to_vec());
            assert!(bytes.skip(18).all(|byte| u32::from(byte) == number % 251), "frame {number}");
            got.push((number, frame.vlan_id(), frame.len()));
            away.extend(frame.into_segments().into_iter().map(|segment| segment.chunk));
        }
        got
    }

    /// What the owner has now: how many frames.
    fn by_owner(&mut self) -> usize {
        let mut frames = Vec::new();
        self.queue.receive(64, &mut self.pool, |frame| frames.push(frame));
        let count = frames.len();
        for frame in frames {
            assert_eq!(frame.head(self.pool.region())[..6], OWNERS);
            frame.release(&mut self.pool);
        }
        count
    }

    /// Every chunk is free, or with the kernel as the queue counts.
    fn assert_all_accounted(&self) {
        let held = self.queue.fill_chunks() as usize;
        assert_eq!(self.pool.free_chunks() + held, self.pool.chunk_capacity());
    }
}

/// Frames of two addresses, tagged and not, in one and in several pieces, each to its own socket; and after many times round
/// all rings every chunk is accounted for.
fn lanes_get_what_is_theirs(mode: AttachMode) {
    let mut shared = Shared::open(mode, 9000, 64);
    let mut away = Vec::new();
    let (mut number, mut owned) = (0, 0);
    let until = Instant::now() + Duration::from_secs(60);
    for round in 0..600u32 {
        let (bytes, vlan) = ([60, 1060, 8228][round as usize % 3], (round % 2 == 0).then_some(7));
        let mut expected = Vec::new();
        for _ in 0..4 {
            shared.send(LANES, vlan, number, bytes);
            shared.send(OWNERS, vlan, number, bytes);
            expected.push((number, vlan.unwrap_or(0), bytes - if vlan.is_some() { 4 } else { 0 }));
            number += 1;
            owned += 1;
        }
        let mut got = Vec::new();
        while got.len() < expected.len() || owned > 0 {
            assert!(Instant::now() < until, "round {round}: {got:?}, {owned} missing at the owner");
            got.extend(shared.by_lane(&mut away));
            owned -= shared.by_owner();
            for chunk in away.drain(..) {
                shared.pool.release(chunk);
            }
            shared.queue.fill(&mut shared.pool);
            assert!(shared.queue.fill_chunks() <= 48);
        }
        assert_eq!(got, expected, "round {round}");
        shared.assert_all_accounted();
    }
    assert_eq!(shared.queue.statistics().unwrap().rx_dropped, 0);
    assert_eq!(shared.lane.statistics().unwrap().rx_ring_full, 0);
}

#[test]
fn lanes_get_what_is_theirs_in_the_driver() {
    isolated("lanes_get_what_is_theirs_in_the_driver", || lanes_get_what_is_theirs(AttachMode::Native));
}

#[test]
fn lanes_get_what_is_theirs_in_the_generic_hook() {
    isolated("lanes_get_what_is_theirs_in_the_generic_hook", || {
        lanes_get_what_is_theirs(AttachMode::Generic);
    });
}

/// A core that does not come to its lane loses frames of its own and none of others, and holds no more than its ring.
#[test]
fn a_lane_that_nobody_reads_stops_nobody() {
    isolated("a_lane_that_nobody_reads_stops_nobody", || {
        let mut shared = Shared::open(AttachMode::Native, 1500, 16);
        for number in 0..100 {
            shared.send(LANES, None, number, 60);
        }
        let until = Instant::now() + Duration::from_secs(10);
        for number in 0..500 {
            shared.send(OWNERS, None, number, 60);
            while shared.by_owner() == 0 {
                assert!(Instant::now() < until, "frame {number}");
            }
            shared.queue.fill(&mut shared.pool);
        }
        assert_eq!(shared.lane.statistics().unwrap().rx_ring_full, 84);
        let mut away = Vec::new();
        assert_eq!(shared.by_lane(&mut away).len(), 16);
        assert_eq!(
            shared.queue.fill_chunks(),
            32,
            "what was taken out of the lane is not the kernel's any more"
        );
        shared.queue.fill(&mut shared.pool);
        for chunk in away {
            shared.pool.release(chunk);
        }
        assert_eq!(shared.queue.fill_chunks(), 48);
        shared.assert_all_accounted();
    });
}
