//! A device that ends every request at once and keeps nothing, and frames that ask for its blocks: what is measured with them is the
//! bookkeeping. Used by `torus-bench stages` and by the benches, which take this file in by its path.

use std::collections::VecDeque;

use af_xdp::region::Pool;
use anyhow::{Context, ensure};
use aoe_xdp::link::{RxFrame, Segment, Segments};
use aoe_xdp::target::Export;
use aoe_xdp::wire::{AtaArg, AtaHead, FRAME_LEN_MIN, Header, Mac, command};
use torus_dataplane::serving::Devices;
use torus_dataplane::store::{BLOCK_BYTES, Disk, Durable};
use torus_uring::Blocks;
use zerocopy::IntoBytes;

/// What every byte is that is read. The store takes nothing else for what was written, so that is what is to be written first.
pub(crate) const BYTE: u8 = 1;
/// Requests that have ended and were not taken in, for which there is room from the beginning.
const ENDED_MAX: usize = 8192;

/// The device and the frame memory of a core.
pub(crate) struct NullDevices {
    pub(crate) pool: Pool,
    ended: VecDeque<Ended>,
    /// Disk requests so far.
    pub(crate) requests: u64,
}

/// A disk request that has ended.
pub(crate) struct Ended {
    pub(crate) token: u64,
    pub(crate) blocks: Blocks,
    is_read: bool,
}

impl NullDevices {
    pub(crate) fn new(pool: Pool) -> NullDevices {
        NullDevices { pool, ended: VecDeque::with_capacity(ENDED_MAX), requests: 0 }
    }

    /// The next disk request that has ended. What a disk itself does is done here, not where it is asked.
    pub(crate) fn next_ended(&mut self) -> Option<Ended> {
        let mut ended = self.ended.pop_front()?;
        if ended.is_read {
            for index in 0..ended.blocks.len() {
                self.pool.bytes_mut(ended.blocks.get_mut(index)).fill(BYTE);
            }
        }
        Some(ended)
    }

    fn end(&mut self, token: u64, blocks: Blocks, is_read: bool) {
        self.requests += 1;
        self.ended.push_back(Ended { token, blocks, is_read });
    }
}

struct NullDisk<'d>(&'d mut NullDevices);

impl Devices for &mut NullDevices {
    fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    fn device(&mut self, _store: usize) -> impl Disk {
        NullDisk(self)
    }

    fn boot_ns(&self) -> u64 {
        0
    }
}

impl Disk for NullDisk<'_> {
    fn read(&mut self, _offset_bytes: u64, blocks: Blocks, token: u64) {
        self.0.end(token, blocks, true);
    }

    fn write(&mut self, _offset_bytes: u64, blocks: Blocks, _until: Durable, token: u64) {
        self.0.end(token, blocks, false);
    }

    fn sync(&mut self, token: u64) {
        self.0.end(token, Blocks::new(), false);
    }

    fn pool(&mut self) -> &mut Pool {
        &mut self.0.pool
    }
}

/// A frame that asks for sectors of an export: to read them, or to write that byte everywhere.
///
/// # Errors
/// No memory, or more sectors than a frame has room for.
pub(crate) fn request_frame(
    senders: &mut Pool,
    export: &Export,
    lba: u64,
    sectors: u8,
    write: Option<u8>,
) -> anyhow::Result<RxFrame> {
    let client = Mac([0x02, 0, 0, 0, 0xc1, 1]);
    let header = Header::request(export.mac, client, export.address, command::ATA, 1);
    let arg = AtaArg::read_write_ext(lba, sectors, write.is_some());
    let mut bytes = AtaHead { header, arg }.as_bytes().to_vec();
    if let Some(byte) = write {
        bytes.resize(bytes.len() + usize::from(sectors) * 512, byte);
    }
    bytes.resize(bytes.len().max(FRAME_LEN_MIN), 0);
    let mut segments = Segments::new();
    for part in bytes.chunks(BLOCK_BYTES) {
        let mut chunk = senders.take_chunk().context("no frame memory is left")?;
        senders.bytes_mut(&mut chunk)[..part.len()].copy_from_slice(part);
        let segment = Segment { chunk, offset: 0, len: u16::try_from(part.len())? };
        ensure!(segments.push(segment).is_ok(), "a frame has too many segments");
    }
    Ok(RxFrame::new(segments))
}
