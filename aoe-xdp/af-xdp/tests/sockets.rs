//! AF_XDP sockets on a real virtual interface: what a builder asks for and what it gets. Needs root.

#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a failure in a test's own steps is the test's failure")]

#[path = "../../tests/link/netns.rs"]
mod netns;

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use af_xdp::nic::Nic;
use af_xdp::queue::Queue;
use af_xdp::region::{Pages, Region, RegionConfig, UmemMemory};
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
