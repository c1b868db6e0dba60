//! One end of a link: the product's own queues with a pool of frame memory, driven by one thread.
//!
//! Nothing is allocated per frame. A frame that the ring has no room for is held and sent first thing later, so that
//! frames leave in the order they were given.

use std::sync::Arc;

use anyhow::Context;
use aoe_xdp::link::{
    Interface, LinkInfo, Pool, Queue, Region, RegionConfig, RxFrame, Segment, Segments, TxFrame,
};
use aoe_xdp::wire::SECTOR_LEN;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use crate::verify::Sector;

/// Frames received at a time.
const BATCH: usize = 64;
/// Chunks that a frame to be sent needs at most, linearised copy included.
const FRAME_CHUNKS: usize = 8;
/// Chunks of a core: receive rings, frames in flight and payload.
const CHUNKS_PER_CORE: u32 = 8192;
/// Header slots of a core: one for each frame in flight.
const HEADERS_PER_CORE: u32 = 8192;

/// Frame memory for `cores` stations.
pub(crate) fn region(cores: u16) -> anyhow::Result<Arc<Region>> {
    let config = RegionConfig { cores, chunks_per_core: CHUNKS_PER_CORE, headers_per_core: HEADERS_PER_CORE };
    Ok(Region::new(config)?)
}

/// See the module.
pub(crate) struct Station {
    pub(crate) region: Arc<Region>,
    pub(crate) pool: Pool,
    queues: Vec<Queue>,
    batch: Vec<RxFrame>,
    /// A frame that the ring of the queue with this number had no room for.
    held: Option<(usize, TxFrame)>,
}

impl Station {
    /// Takes every `step`th queue of an interface from `first` on, with the pool of core `first`.
    pub(crate) fn open(
        interface: &mut Interface,
        region: &Arc<Region>,
        first: u16,
        step: u16,
    ) -> anyhow::Result<Station> {
        let mut pool = region.pool(first)?;
        let mut queues = Vec::new();
        for queue in (first..interface.queues()).step_by(usize::from(step)) {
            queues.push(interface.take_queue(queue, &mut pool)?);
        }
        anyhow::ensure!(
            !queues.is_empty(),
            "interface {} has {} queues, so {step} cores are too many",
            interface.info().interface,
            interface.queues()
        );
        Ok(Station { region: Arc::clone(region), pool, queues, batch: Vec::with_capacity(BATCH), held: None })
    }

    /// What the link is.
    pub(crate) fn info(&self) -> &LinkInfo {
        self.queues[0].info()
    }

    /// How many queues there are to send on.
    pub(crate) fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Receives a batch from every queue and gives each frame to `take`, then its memory back. Returns how many
    /// frames there were.
    pub(crate) fn receive(&mut self, mut take: impl FnMut(&mut Station, &RxFrame, usize)) -> usize {
        let mut batch = std::mem::take(&mut self.batch);
        let mut received = 0;
        for queue in 0..self.queues.len() {
            self.queues[queue].receive(&mut self.pool, &mut batch);
            received += batch.len();
            for frame in batch.drain(..) {
                take(self, &frame, queue);
                frame.release(&mut self.pool);
            }
        }
        self.batch = batch;
        received
    }

    /// Whether a frame can be sent now: call [`Station::flush`] and try again if not.
    pub(crate) fn can_send(&self) -> bool {
        self.held.is_none() && self.pool.free_headers() > 0 && self.pool.free_chunks() >= FRAME_CHUNKS
    }

    /// Queues a frame. [`Station::can_send`] must have said so.
    pub(crate) fn send(&mut self, queue: usize, head: &[u8], data: Segments) {
        assert!(self.held.is_none(), "frames leave in the order given");
        let mut header = self.pool.take_header().expect("can_send saw a free header slot");
        self.pool.header_bytes_mut(&mut header)[..head.len()].copy_from_slice(head);
        let header_len = u8::try_from(head.len()).expect("a head fits its slot");
        let frame = TxFrame { header, header_len, data };
        self.held = self.queues[queue].transmit(&mut self.pool, frame).err().map(|frame| (queue, frame));
    }

    /// Makes the kernel send what is queued and takes memory back. False when something is left to be sent.
    pub(crate) fn flush(&mut self) -> bool {
        let mut all_sent = true;
        for queue in &mut self.queues {
            all_sent &= queue.flush();
            queue.reap(&mut self.pool, &mut |_| unreachable!("a station sends chunks of its own only"));
        }
        if let Some((queue, frame)) = self.held.take() {
            self.held = self.queues[queue].transmit(&mut self.pool, frame).err().map(|frame| (queue, frame));
            all_sent = false;
        }
        all_sent
    }

    /// Sleeps until a frame comes, at most `timeout_ns`.
    pub(crate) fn sleep(&self, timeout_ns: u64) -> anyhow::Result<()> {
        if self.queues.iter().any(Queue::has_rx) {
            return Ok(());
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout_ns / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(timeout_ns % 1_000_000_000).unwrap_or(0),
        };
        // An allocation, but only where there is nothing to do.
        let mut descriptors: Vec<PollFd<'_>> = self
            .queues
            .iter()
            .map(|queue| PollFd::from_borrowed_fd(queue.poll_fd(), PollFlags::IN))
            .collect();
        match poll(&mut descriptors, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait for frames"),
        }
    }

    /// Frames that the link dropped: received but not wanted by us in time, or never sent.
    pub(crate) fn dropped(&mut self) -> u64 {
        self.queues
            .iter_mut()
            .map(|queue| {
                let stats = queue.stats();
                stats.rx_dropped + stats.rx_invalid + stats.tx_dropped
            })
            .sum()
    }
}

/// A whole chunk's worth of sectors from the front of a chunk.
pub(crate) fn sectors_segment(chunk: aoe_xdp::link::Chunk, sectors: usize) -> Segment {
    let len = u16::try_from(sectors * SECTOR_LEN).expect("a chunk is 4096 bytes");
    Segment { chunk, offset: 0, len }
}

/// Calls `take` for each of the first `sectors` sectors behind the first `skip` bytes of a frame, wherever its
/// segments are cut.
pub(crate) fn each_sector(
    frame: &RxFrame,
    region: &Region,
    skip: usize,
    sectors: u8,
    take: impl FnMut(usize, &Sector),
) {
    each_sector_of(frame.segments().iter().map(|segment| segment.bytes(region)), skip, sectors, take);
}

fn each_sector_of<'a>(
    parts: impl Iterator<Item = &'a [u8]>,
    mut skip: usize,
    sectors: u8,
    mut take: impl FnMut(usize, &Sector),
) {
    let mut carry: Sector = [0; SECTOR_LEN];
    let (mut carried, mut number) = (0, 0);
    for part in parts {
        let skipped = skip.min(part.len());
        skip -= skipped;
        let mut bytes = &part[skipped..];
        while !bytes.is_empty() && number < usize::from(sectors) {
            if carried == 0
                && let Some((sector, rest)) = bytes.split_first_chunk()
            {
                take(number, sector);
                number += 1;
                bytes = rest;
                continue;
            }
            let len = bytes.len().min(SECTOR_LEN - carried);
            carry[carried..carried + len].copy_from_slice(&bytes[..len]);
            carried += len;
            bytes = &bytes[len..];
            if carried == SECTOR_LEN {
                take(number, &carry);
                number += 1;
                carried = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sectors_are_found_wherever_a_frame_is_cut(
            mut cuts in proptest::collection::vec(0usize..36 + 4 * SECTOR_LEN + 20, 0..4),
        ) {
            let frame: Vec<u8> = (0..36 + 4 * SECTOR_LEN + 20).map(|i| (i / 7 % 251).to_le_bytes()[0]).collect();
            cuts.sort_unstable();
            let mut parts = Vec::new();
            let mut from = 0;
            for cut in cuts.into_iter().chain([frame.len()]) {
                parts.push(&frame[from..cut]);
                from = cut;
            }
            let mut seen = Vec::new();
            each_sector_of(parts.into_iter(), 36, 4, |number, sector| seen.push((number, *sector)));
            prop_assert_eq!(seen.len(), 4);
            for (number, sector) in seen {
                prop_assert_eq!(&sector[..], &frame[36 + number * SECTOR_LEN..][..SECTOR_LEN]);
            }
        }
    }
}
