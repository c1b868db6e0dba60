//! A core with its pool and one queue: sends patterned frames, collects frames.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aoe_xdp::link::{
    CHUNK_BYTES, Frames, Interface, LinkChoice, LinkOptions, Pool, Port, Queue, Region, RegionConfig,
    RxFrame, Segment, Segments, SteeringChoice, TxFrame, VlanId,
};

/// How long a frame may take on a virtual link.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of Ethernet, AoE and ATA headers.
pub(crate) const HEADERS: usize = 36;

pub(crate) fn region(cores: u16) -> Arc<Region> {
    let config = RegionConfig { cores, chunks_per_core: 2048, headers_per_core: 1024 };
    Region::new(config).expect("a small region can be mapped")
}

pub(crate) struct Station {
    pub(crate) region: Arc<Region>,
    pub(crate) pool: Pool,
    pub(crate) queue: Queue,
    received: Vec<RxFrame>,
}

impl Station {
    /// Takes queue 0 of a fresh interface.
    pub(crate) fn open(name: &str, choice: LinkChoice, region: &Arc<Region>, core: u16) -> (Interface, Self) {
        let mut interface = Interface::open(name, choice, region).expect("the interface opens");
        let station = Self::take(&mut interface, 0, region, core);
        (interface, station)
    }

    /// Takes queue 0 of a fresh interface with logical interfaces; each is (ordinal, VLAN or 0).
    pub(crate) fn open_as(
        name: &str,
        choice: LinkChoice,
        ports: &[(u8, u16)],
        frames: Frames,
        region: &Arc<Region>,
        core: u16,
    ) -> (Interface, Self) {
        let ports = ports.iter().map(|&(ordinal, vlan)| Port { ordinal, vlan: VlanId::new(vlan) });
        let options =
            LinkOptions { choice, ports: ports.collect(), frames, cores: 1, steering: SteeringChoice::Auto };
        let mut interface = Interface::open_as(name, &options, region).expect("the interface opens");
        let station = Self::take(&mut interface, 0, region, core);
        (interface, station)
    }

    pub(crate) fn take(interface: &mut Interface, queue: u16, region: &Arc<Region>, core: u16) -> Self {
        let mut pool = region.pool(core).expect("each core is used once");
        let queue = interface.take_queue(queue, &mut pool).expect("the queue is free");
        Self { region: Arc::clone(region), pool, queue, received: Vec::with_capacity(64) }
    }

    /// A frame of `bytes`: 36 in the header slot (less for shorter frames), the rest in page-aligned chunks.
    pub(crate) fn frame(&mut self, bytes: &[u8]) -> TxFrame {
        let header_len = bytes.len().min(HEADERS);
        let mut header = self.pool.take_header().expect("a header slot is free");
        self.pool.header_bytes_mut(&mut header)[..header_len].copy_from_slice(&bytes[..header_len]);
        let mut data = Segments::new();
        for part in bytes[header_len..].chunks(CHUNK_BYTES) {
            let mut chunk = self.pool.take_chunk().expect("a chunk is free");
            self.pool.bytes_mut(&mut chunk)[..part.len()].copy_from_slice(part);
            let len = u16::try_from(part.len()).unwrap();
            data.push(Segment { chunk, offset: 0, len }).expect("four chunks are enough");
        }
        TxFrame { header, header_len: u8::try_from(header_len).unwrap(), data }
    }

    /// Sends bytes as one frame by the first logical interface, waiting for room.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        let first = self.queue.ports()[0].ordinal;
        self.send_by(first, bytes);
    }

    /// Sends bytes as one frame by a logical interface, waiting for room.
    pub(crate) fn send_by(&mut self, ordinal: u8, bytes: &[u8]) {
        let mut frame = self.frame(bytes);
        let until = Instant::now() + PATIENCE;
        while let Err(back) = self.queue.transmit_by(&mut self.pool, ordinal, frame) {
            assert!(Instant::now() < until, "the ring never has room");
            frame = back;
            self.flush();
        }
        self.flush();
    }

    /// Flushes until nothing is left, and reaps.
    pub(crate) fn flush(&mut self) {
        let until = Instant::now() + PATIENCE;
        while !self.queue.flush() {
            assert!(Instant::now() < until, "the kernel never takes the frames");
            self.reap();
        }
        self.reap();
    }

    pub(crate) fn reap(&mut self) {
        self.queue.reap(&mut self.pool, &mut |chunk| panic!("chunk {chunk:?} of another core"));
    }

    /// The next `count` frames, as bytes; the chunks go back to the pool.
    pub(crate) fn collect(&mut self, count: usize) -> Vec<Vec<u8>> {
        let frames = self.collect_within(count, PATIENCE);
        assert_eq!(frames.len(), count, "frames arrive; {:?}", self.queue.stats());
        frames
    }

    /// Up to `count` frames that arrive within a time.
    pub(crate) fn collect_within(&mut self, count: usize, time: Duration) -> Vec<Vec<u8>> {
        self.collect_told(count, time).into_iter().map(|(_, bytes)| bytes).collect()
    }

    /// Up to `count` frames that arrive within a time, each with its logical interface.
    pub(crate) fn collect_told(&mut self, count: usize, time: Duration) -> Vec<(u8, Vec<u8>)> {
        let until = Instant::now() + time;
        let mut frames = Vec::new();
        loop {
            self.queue.receive(&mut self.pool, &mut self.received);
            for frame in self.received.drain(..) {
                let head = frame.head(&self.region);
                assert!(head.len() >= HEADERS || head.len() == frame.len(), "the head is in one piece");
                let bytes = frame.segments().iter().flat_map(|segment| segment.bytes(&self.region).to_vec());
                frames.push((frame.interface(), bytes.collect()));
                frame.release(&mut self.pool);
            }
            if frames.len() >= count || Instant::now() >= until {
                return frames;
            }
            std::thread::yield_now();
        }
    }

    /// Waits until everything sent is completed, then checks that every chunk and header is accounted for.
    pub(crate) fn assert_nothing_lost(&mut self) {
        let until = Instant::now() + PATIENCE;
        while self.queue.stats().tx_outstanding > 0 && Instant::now() < until {
            self.flush();
        }
        assert_eq!(self.queue.stats().tx_outstanding, 0);
        assert_eq!(self.pool.free_headers(), self.pool.header_capacity(), "headers");
        let held = usize::try_from(self.queue.stats().fill_chunks).unwrap();
        assert_eq!(self.pool.free_chunks() + held, self.pool.chunk_capacity(), "chunks");
        assert_eq!(af_xdp::region::leaked_handles(), 0);
    }
}

/// A frame of `len` bytes whose content depends on `seed`, from and to addresses nobody has.
pub(crate) fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut bytes: Vec<u8> = (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        })
        .collect();
    bytes[..6].copy_from_slice(&[2, 0, 0, 0, 0, 0xbb]);
    bytes[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 0xaa]);
    bytes[12..14].copy_from_slice(&[0x88, 0xa2]);
    bytes
}
