//! Disk requests for which the ring has no free slot: they wait, and go to it in the order they were given.
//!
//! While one waits the ring is full, so the completion that frees a slot also wakes the core.

use std::collections::VecDeque;

use aoe_xdp::link::Pool;
use torus_uring::{Blocks, FileId, Full, Ring};

use super::DISK_REQUESTS_MAX;

/// A request for a ring.
pub(super) struct DiskRequest {
    pub(super) file: FileId,
    pub(super) token: u64,
    pub(super) work: Work,
}

/// What it is to do.
pub(super) enum Work {
    Read { offset_bytes: u64, blocks: Blocks },
    Write { offset_bytes: u64, blocks: Blocks, dsync: bool },
    Sync,
}

impl DiskRequest {
    /// Gives it to the ring; back where that is full.
    fn submit(self, ring: &mut Ring, pool: &Pool) -> Result<(), DiskRequest> {
        let DiskRequest { file, token, work } = self;
        let refused = match work {
            Work::Read { offset_bytes, blocks } => ring
                .read(pool, file, offset_bytes, blocks, token)
                .map_err(|blocks| Work::Read { offset_bytes, blocks }),
            Work::Write { offset_bytes, blocks, dsync } => ring
                .write(file, offset_bytes, blocks, dsync, token)
                .map_err(|blocks| Work::Write { offset_bytes, blocks, dsync }),
            Work::Sync => ring.sync(file, token).map_err(|Full| Work::Sync),
        };
        refused.map_err(|work| DiskRequest { file, token, work })
    }
}

/// The requests that wait, the oldest first.
pub(super) struct WaitingRequests(VecDeque<DiskRequest>);

impl WaitingRequests {
    /// None, with room for as many as a ring has in flight: more than that allocate.
    pub(super) fn new() -> WaitingRequests {
        WaitingRequests(VecDeque::with_capacity(DISK_REQUESTS_MAX as usize))
    }

    /// Gives a request to the ring, or lets it wait behind those that do.
    pub(super) fn submit(&mut self, request: DiskRequest, ring: &mut Ring, pool: &Pool) {
        if !self.0.is_empty() {
            self.0.push_back(request);
        } else if let Err(refused) = request.submit(ring, pool) {
            self.0.push_back(refused);
        }
    }

    /// Gives the ring what it has room for. To be called whenever a request has ended.
    pub(super) fn go_on(&mut self, ring: &mut Ring, pool: &Pool) {
        while let Some(request) = self.0.pop_front() {
            if let Err(refused) = request.submit(ring, pool) {
                self.0.push_front(refused);
                return;
            }
        }
    }

    /// Whether none waits.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one waits for that file.
    pub(super) fn names(&self, file: FileId) -> bool {
        self.0.iter().any(|request| request.file == file)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::fd::AsFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::time::{Duration, Instant};

    use aoe_xdp::link::{Region, RegionConfig};
    use cluster_map::{ClusterId, ControlMap, Counter, DataMap, Geometry, NodeId};
    use torus_uring::{BLOCK_BYTES, Event, Finished, RingConfig};

    use super::*;
    use crate::reactor::devices::{OwnDevice, ReactorDevices};
    use crate::serving::Devices;
    use crate::store::{Disk, Durable};

    const CHUNKS: u32 = 256;

    fn wait(ring: &mut Ring) -> Finished {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(Event::Disk(finished)) = ring.next_event() {
                return finished;
            }
            assert!(Instant::now() < deadline, "the request never ended");
            ring.submit_and_wait(Duration::from_secs(1)).unwrap();
        }
    }

    fn filled(pool: &mut Pool, count: usize, byte: u8) -> Blocks {
        let chunks = std::iter::from_fn(|| {
            let mut chunk = pool.take_chunk().unwrap();
            pool.bytes_mut(&mut chunk).fill(byte);
            Some(chunk)
        });
        chunks.take(count).collect()
    }

    /// A store that asks for far more at once than the ring takes: nothing is refused, nothing is lost, and with one slot
    /// the order of the ends is that of the requests.
    #[test]
    fn what_finds_the_ring_full_waits_in_order() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("map");
        let geometry = Geometry::new(1, ClusterId([1; 16]), NodeId([2; 16]));
        let _control = ControlMap::create(&path, &geometry).unwrap();
        let stats = DataMap::attach(&path).unwrap().core_stats(0).unwrap();
        // On a disk: where the programs are built.
        let disk_folder = std::env::current_exe().unwrap();
        let image = tempfile::NamedTempFile::new_in(disk_folder.parent().unwrap()).unwrap().into_temp_path();
        std::fs::write(&image, vec![0; 64 * BLOCK_BYTES]).unwrap();
        let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap();
        let direct = OpenOptions::new().read(true).write(true).custom_flags(direct).open(&image).unwrap();
        for slots in [1, 4] {
            let config = RegionConfig { cores: 1, chunks_per_core: CHUNKS, headers_per_core: 64 };
            let region = Region::new(config).unwrap();
            let mut ring = Ring::new(RingConfig { requests_max: slots }, &region, None).unwrap();
            let mut pool = region.pool(0).unwrap();
            let file = ring.register_file(direct.as_fd()).unwrap();
            let devices = [Some(OwnDevice { file, dsync: true, inline: false, mapped: None })];
            let (mut waiting, mut inline) = (WaitingRequests::new(), VecDeque::new());
            let before = stats.snapshot();
            let mut around = ReactorDevices {
                ring: &mut ring,
                pool: &mut pool,
                waiting: &mut waiting,
                inline: &mut inline,
                devices: &devices,
                stats: &stats,
            };
            let mut disk = around.device(0);
            // For each of 20 rounds: a durable write, one of five blocks to be synced, the sync, a read of the first.
            for round in 0..20u8 {
                let token = u64::from(round) * 4;
                let offset_bytes = u64::from(round % 4) * 8 * BLOCK_BYTES as u64;
                let blocks = filled(disk.pool(), 1, round);
                disk.write(offset_bytes, blocks, Durable::AtEnd, token);
                let blocks = filled(disk.pool(), 5, round);
                disk.write(offset_bytes + BLOCK_BYTES as u64, blocks, Durable::AtSync, token + 1);
                disk.sync(token + 2);
                let blocks = filled(disk.pool(), 1, 0xee);
                disk.read(offset_bytes, blocks, token + 3);
            }
            drop(disk);
            assert_eq!(ring.in_flight(), slots as usize);
            assert!(!waiting.is_empty() && waiting.names(file));
            let mut ended = Vec::new();
            while ring.in_flight() > 0 {
                let finished = wait(&mut ring);
                waiting.go_on(&mut ring, &pool);
                assert_eq!(finished.result, Ok(()));
                if finished.token % 4 == 3 && slots == 1 {
                    let round = finished.token / 4;
                    assert_eq!(u64::from(region.bytes(finished.blocks.get(0))[0]), round);
                }
                ended.push(finished.token);
                finished.blocks.into_iter().for_each(|chunk| pool.release(chunk));
            }
            assert!(waiting.is_empty() && !waiting.names(file));
            if slots > 1 {
                ended.sort_unstable();
            }
            assert_eq!(ended, (0..80).collect::<Vec<_>>(), "each ends once");
            assert_eq!(pool.free_chunks(), pool.chunk_capacity());
            let after = stats.snapshot();
            let counted = |counter| after.get(counter) - before.get(counter);
            assert_eq!((counted(Counter::DiskReads), counted(Counter::DiskWrites)), (20, 40));
        }
    }

    #[test]
    fn only_what_must_be_durable_at_its_end_carries_dsync() {
        for (cache, until, dsync) in [
            (true, Durable::AtEnd, true),
            (true, Durable::AtSync, false),
            (false, Durable::AtEnd, false),
            (false, Durable::AtSync, false),
        ] {
            let region =
                Region::new(RegionConfig { cores: 1, chunks_per_core: 4, headers_per_core: 64 }).unwrap();
            let mut ring = Ring::new(RingConfig { requests_max: 1 }, &region, None).unwrap();
            let null = std::fs::File::open("/dev/null").unwrap();
            let file = ring.register_file(null.as_fd()).unwrap();
            assert_eq!(
                OwnDevice { file, dsync: cache, inline: false, mapped: None }.carries_dsync(until),
                dsync
            );
        }
    }
}
