//! Whole AoE frames in and out of an interface, one at a time: for test programs, where speed does not matter.
//!
//! Every AoE frame that the interface sees is received, whoever it is for.

use aoe_xdp::link::{
    Interface, LinkChoice, MAX_SEGMENTS, Pool, Queue, Region, RegionConfig, RxFrame, Segment, Segments,
    TxFrame,
};

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};

/// Bytes that go into the header slot of a sent frame.
const HEAD_BYTES: usize = 36;
/// Bytes of a slice of a sent frame.
const SLICE_BYTES: usize = 4096;
/// Frames taken at a time.
const BATCH: usize = 64;

/// An interface, opened as a raw packet socket.
pub struct Port {
    region: Arc<Region>,
    pool: Pool,
    queue: Queue,
    batch: Vec<RxFrame>,
    interface: Interface,
}

impl Port {
    /// Opens an interface that is up.
    ///
    /// # Errors
    /// If there is none of that name, it is down, or this is not root.
    pub fn open(name: &str) -> Result<Self> {
        let region = Region::new(RegionConfig { cores: 1, chunks_per_core: 2048, headers_per_core: 512 })?;
        let mut pool = region.pool(0)?;
        let mut interface = Interface::open(name, LinkChoice::AfPacket, &region)?;
        let queue = interface.take_queue(0, &mut pool)?;
        Ok(Self { region, pool, queue, batch: Vec::with_capacity(BATCH), interface })
    }

    /// The interface's MTU.
    #[must_use]
    pub fn mtu(&self) -> u32 {
        self.interface.info().mtu
    }

    /// The interface's address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.interface.info().mac
    }

    /// Gives each frame that waits to `take`.
    pub fn receive(&mut self, mut take: impl FnMut(&[u8])) {
        self.queue.receive(&mut self.pool, &mut self.batch);
        for frame in self.batch.drain(..) {
            let bytes: Vec<u8> =
                frame.segments().iter().flat_map(|segment| segment.bytes(&self.region)).copied().collect();
            take(&bytes);
            frame.release(&mut self.pool);
        }
    }

    /// Sends a frame at once.
    ///
    /// # Errors
    /// As [`Port::queue`].
    pub fn send(&mut self, frame: &[u8]) -> Result<()> {
        self.queue(frame)?;
        self.flush();
        Ok(())
    }

    /// Queues a frame, to be sent by [`Port::flush`]. What the kernel does not take then is lost, as on a wire.
    ///
    /// # Errors
    /// If the frame is longer than any link's, or more were queued than there is memory for.
    pub fn queue(&mut self, frame: &[u8]) -> Result<()> {
        let (head, rest) = frame.split_at(frame.len().min(HEAD_BYTES));
        let mut header = self.pool.take_header().context("out of header slots")?;
        self.pool.header_bytes_mut(&mut header)[..head.len()].copy_from_slice(head);
        let mut data = Segments::new();
        for part in rest.chunks(SLICE_BYTES).take(MAX_SEGMENTS) {
            let mut chunk = self.pool.take_chunk().context("out of chunks")?;
            self.pool.bytes_mut(&mut chunk)[..part.len()].copy_from_slice(part);
            let segment = Segment { chunk, offset: 0, len: u16::try_from(part.len())? };
            data.push(segment).map_err(|_| anyhow!("a frame of {} bytes is too long", frame.len()))?;
        }
        let frame = TxFrame { header, header_len: u8::try_from(head.len())?, data };
        self.queue.transmit(&mut self.pool, frame).map_err(|_| anyhow!("the transmit queue is full"))
    }

    /// Sends what is queued.
    pub fn flush(&mut self) {
        while !self.queue.flush() {}
        self.queue.reap(&mut self.pool, &mut |_| unreachable!("a port sends chunks of its own only"));
    }
}
