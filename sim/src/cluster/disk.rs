//! A node's store: the real one, on a simulated disk that takes its time.

use std::collections::BTreeMap;

use cluster_map::StoreId;
use torus_dataplane::serving::Devices;
use torus_dataplane::store::extent::format::{Sum, Superblock};
use torus_dataplane::store::extent::shard::Object;
use torus_dataplane::store::extent::simulated::{Faults, Form, Media, Rng, SimDisk, Still, read_shards};
use torus_dataplane::store::{BLOCK_BYTES, Disk, Durable};
use torus_replication::terms::Extent;
use torus_uring::Blocks;

use aoe_xdp::link::Pool;

use super::sectors::{Block, ZEROS, block_of};
use super::{Event, World};
use crate::network::{Endpoint, Power};
use crate::random::Random;

/// A disk's time for a request.
const TAKES_NS: std::ops::Range<u64> = 10_000..500_000;
/// A process that stands still takes what has ended when it goes on.
const PAUSED_NS: u64 = 20_000_000;

/// Where the data of a volume are on a store of that many shards.
pub(super) fn object_of(volume: usize, shards: u16) -> Object {
    Object { shard: volume as u16 % shards, number: volume as u32 }
}

/// What a node's store is like.
#[derive(Debug, Clone, Copy)]
pub struct StoreForm {
    /// Its size.
    pub form: Form,
    /// Its device writes blocks whole or not at all.
    pub is_atomic: bool,
    /// A sync costs less than several writes that are durable at their end.
    pub flushes_batches: bool,
}

impl StoreForm {
    /// One that suits a cluster, as it happens to be.
    pub(super) fn drawn(random: &mut Random, is_small: bool) -> StoreForm {
        let shards = 1 + random.index(2) as u16;
        let journal_blocks = [48, 96, 256][random.index(3)];
        let slots = if is_small { 1 + random.index(4) as u32 } else { 64 };
        let active_max = [1, 2, 64][random.index(3)];
        StoreForm {
            form: Form { shards, slots, journal_blocks, active_max },
            is_atomic: random.coin(),
            flushes_batches: random.coin(),
        }
    }
}

/// What stays of a store when no process has it.
pub(super) struct Stored {
    pub(super) layout: Superblock,
    /// `None` while a process has it.
    pub(super) media: Option<Media>,
    /// What its disk does wrong.
    pub(super) faults: Faults,
    /// Requests to its disk take that much longer at most.
    pub(super) slow_ns: u64,
    pub(super) flushes_batches: bool,
    pub(super) rng: Rng,
}

impl Stored {
    pub(super) fn new(store: StoreId, form: StoreForm, random: &mut Random) -> Stored {
        let layout = form.form.layout(store).expect("there is room for its extents");
        Stored {
            media: Some(Media::formatted(&layout, form.is_atomic)),
            layout,
            faults: Faults::default(),
            slow_ns: 0,
            flushes_batches: form.flushes_batches,
            rng: Rng::new(random.next_u64()),
        }
    }

    /// It is formatted anew: another incarnation of the same store.
    pub(super) fn format(&mut self) {
        self.layout.incarnation += 1;
        let is_atomic = self.media.as_ref().is_some_and(|media| media.atomic);
        self.media = Some(Media::formatted(&self.layout, is_atomic));
    }

    /// The machine stops without its process, which has ended before.
    pub(super) fn power_fails(&mut self) {
        if let Some(media) = &mut self.media {
            media.cut(&mut self.rng);
        }
    }
}

/// A block of some volume's extent.
pub(super) type Place = (Extent, u16);

/// What a store would answer if it were opened now, by volume, but for zeros; `None` where a block is damaged.
///
/// # Errors
/// What is wrong with it.
pub(super) fn contents(
    layout: &Superblock,
    media: Media,
) -> Result<BTreeMap<(usize, Place), Option<Block>>, String> {
    let still = Still(media.into());
    let images = read_shards(layout, &still).map_err(|error| error.to_string())?;
    let media = still.0.into_inner();
    let mut contents = BTreeMap::new();
    for (_, extent) in images.iter().flat_map(|image| image.recovered.extents.iter()) {
        for (block, sum) in (0..).zip(extent.all_sums()) {
            let content = if sum.is_data() {
                let slot = extent.half(extent.half_of(block)).slot;
                let at = layout.data_offset(slot) / BLOCK_BYTES as u64 + u64::from(block);
                let bytes = media.visible(at).map_or(&[0; BLOCK_BYTES], |data| &**data);
                let place = (extent.object, extent.number, block);
                let found = || block_of(bytes).ok_or(format!("{place:?} has bytes that nobody wrote"));
                if Sum::of(bytes) == sum { Some(found()?) } else { None }
            } else if sum == Sum::LOST {
                None
            } else {
                continue;
            };
            if content != Some(ZEROS) {
                contents.insert((extent.object as usize, (Extent(extent.number), block)), content);
            }
        }
    }
    Ok(contents)
}

/// A node's disk and memory, as its data plane sees them at a moment.
pub(super) struct NodeDevices<'d> {
    pub(super) disk: &'d mut SimDisk,
    pub(super) boot_ns: u64,
}

impl Devices for NodeDevices<'_> {
    fn pool(&mut self) -> &mut Pool {
        &mut self.disk.pool
    }

    fn device(&mut self, _store: usize) -> impl Disk {
        NodeDisk(self.disk)
    }

    fn boot_ns(&self) -> u64 {
        self.boot_ns
    }
}

struct NodeDisk<'d>(&'d mut SimDisk);

impl Disk for NodeDisk<'_> {
    fn read(&mut self, offset_bytes: u64, blocks: Blocks, token: u64) {
        self.0.read(offset_bytes, blocks, token);
    }

    fn write(&mut self, offset_bytes: u64, blocks: Blocks, until: Durable, token: u64) {
        self.0.write(offset_bytes, blocks, until, token);
    }

    fn sync(&mut self, token: u64) {
        self.0.sync(token);
    }

    fn pool(&mut self) -> &mut Pool {
        self.0.pool()
    }
}

impl World {
    /// Gives each request that the disk has got a time at which it ends.
    pub(super) fn time_disk(&mut self, node: usize) {
        let at = &mut self.nodes[node];
        let Some(process) = &mut at.process else { return };
        let life = at.life;
        while process.timed < process.disk.begun() {
            let number = process.timed;
            process.timed += 1;
            let delay_ns = at.random.range(TAKES_NS) + at.random.below(at.stored.slow_ns + 1);
            self.schedule.after(delay_ns, Event::Disk { node, life, number });
        }
    }

    /// A request of a node's disk ends.
    pub(super) fn disk_ends(&mut self, node: usize, life: u64, number: u64) {
        if self.nodes[node].life != life {
            return;
        }
        if self.network.is_paused(Endpoint(node)) {
            self.schedule.after(PAUSED_NS, Event::Disk { node, life, number });
            return;
        }
        let boot_ns = self.boot_ns(node);
        let at = &mut self.nodes[node];
        let Some(process) = &mut at.process else { return };
        process.disk.faults = at.stored.faults;
        let Some((token, blocks, result)) = process.disk.end(number, &mut at.stored.rng) else { return };
        if let Err(error) = result {
            self.note(|| format!("node {node}: its disk fails: {error}"));
        }
        let Some(process) = &mut self.nodes[node].process else { return };
        let (serving, mut around) = process.parts(boot_ns);
        serving.disk_ended(0, token, blocks, result, &mut around);
        self.pump(node);
    }

    /// One block of a node's data changes by itself.
    pub(super) fn rot(&mut self, node: usize) {
        let at = &mut self.nodes[node];
        let slots = 0..at.stored.layout.slots();
        let first = at.stored.layout.data_offset(slots.start) / BLOCK_BYTES as u64;
        let end = at.stored.layout.device_bytes / BLOCK_BYTES as u64;
        let media = match &mut at.process {
            Some(process) => Some(&mut process.disk.media),
            None => at.stored.media.as_mut(),
        };
        let Some(media) = media else { return };
        let written = media.written(first..end);
        if !written.is_empty() {
            let block = written[at.random.index(written.len())];
            media.rot(block, at.random.index(BLOCK_BYTES));
        }
    }

    /// Ends a node's process: what it had asked of its disk is done or not, as the disk happens to leave it.
    pub(super) fn leave_disk(&mut self, node: usize, power: Power) {
        let at = &mut self.nodes[node];
        if let Some(process) = at.process.take() {
            at.stored.media = Some(process.disk.crash(power == Power::Off, &mut at.stored.rng));
        } else if power == Power::Off {
            at.stored.power_fails();
        }
    }
}
