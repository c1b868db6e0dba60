//! A core without link and disk: frames that were received go in, answers are thrown away, and the device ends everything at once.
//!
//! Each stage of a request is a function of its own that the compiler may not take apart, so that what is spent below it can be
//! told by its name. Frames of a batch ask for blocks that do not adjoin, in the way that random load does.

use std::hint::black_box;

use af_xdp::region::{Pool, Region, RegionConfig};
use anyhow::{Context, bail, ensure};
use aoe_xdp::link::RxFrame;
use aoe_xdp::target::{
    Action, AoePolicy, Export, ExportTable, Ingress, Io, ON_ALL_INTERFACES, Route, respond, route,
};
use aoe_xdp::wire::{Address, Mac};
use cluster_map::{ClusterId, ControlMap, CoreStats, DataMap, Geometry, NodeId};
use torus_dataplane::clients::Clients;
use torus_dataplane::exchange::{Backing, Served};
use torus_dataplane::fairness::Limits;
use torus_dataplane::replicating::Replicating;
use torus_dataplane::serving::{Around, Arrival, Serving};
use torus_dataplane::store::BLOCK_BYTES;
use torus_dataplane::store::extent::format::{EXTENT_BLOCKS, Shape};
use torus_dataplane::store::extent::fresh::FreshStore;
use torus_dataplane::store::extent::shard::Object;
use torus_replication::terms::Site;

use crate::null_device::{BYTE, Ended, NullDevices, request_frame};

/// Requests of a batch: a window of 32.
pub(super) const BATCH: u32 = 32;
/// Batches that ask for different blocks.
const BATCHES: u32 = 8;
/// Between the blocks of two requests: odd, so that the batches cover blocks all over the extent before one repeats.
const STRIDE_BLOCKS: u32 = 347;
const LIMITS: Limits = Limits { requests: 1024, clients: 64, device_depth: 128 };
const SECTORS_PER_BLOCK: u64 = BLOCK_BYTES as u64 / 512;
const DEVICE_BYTES: u64 = 128 << 20;
const INGRESS: Ingress =
    Ingress { mac: Mac([2, 0, 0, 0, 0, 9]), ordinal: 0, sectors_max: 16, sectors_told: 16 };

/// Finds the export of a frame and decides what it asks.
#[inline(never)]
fn stage_parse<'e>(table: &'e ExportTable, senders: &Pool, frame: &RxFrame) -> Option<(&'e Export, Io)> {
    let head = frame.head(senders.region());
    let Route::One(export) = route(table, &INGRESS, head) else { return None };
    match respond(export, &INGRESS, head, frame.len()) {
        Action::Io(io) => Some((export, io)),
        _ => None,
    }
}

/// Takes a request in: client, tag, order, memory, and the copy of what is written.
#[inline(never)]
fn stage_order(serving: &mut Serving, arrival: Arrival<'_>, around: &mut Around<'_, &mut NullDevices>) {
    serving.admit(arrival, around);
}

/// Gives the store one that may start.
#[inline(never)]
fn stage_submit(serving: &mut Serving, around: &mut Around<'_, &mut NullDevices>) -> bool {
    serving.start_next(around)
}

/// Lets the store go on: batches, places, checkpoints.
#[inline(never)]
fn stage_store(serving: &mut Serving, around: &mut Around<'_, &mut NullDevices>) -> bool {
    serving.turn_stores(around)
}

/// Takes in an ended disk request, and verifies what was read.
#[inline(never)]
fn stage_complete(serving: &mut Serving, ended: Ended, around: &mut Around<'_, &mut NullDevices>) {
    serving.disk_ended(0, ended.token, ended.blocks, Ok(()), around);
}

/// Composes the answers of an ended request, and lets those go on that waited for it.
#[inline(never)]
fn stage_answer(serving: &mut Serving, around: &mut Around<'_, &mut NullDevices>) -> bool {
    if !serving.finish_next(around) {
        return false;
    }
    while let Some(answer) = serving.next_answer() {
        for segment in black_box(answer).data {
            around.devices.pool.release(segment.chunk);
        }
    }
    true
}

/// What the core is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
}

/// The core, and the frames that it is given again and again.
pub(super) struct Core {
    serving: Serving,
    devices: NullDevices,
    senders: Pool,
    table: ExportTable,
    served: Vec<Option<Served>>,
    batches: Vec<Vec<RxFrame>>,
    stats: CoreStats,
    _control: ControlMap,
    _folder: tempfile::TempDir,
}

impl Core {
    /// One export on a store in which every block that is asked for was written.
    pub(super) fn new(kind: Kind) -> anyhow::Result<Core> {
        let folder = tempfile::tempdir_in("/dev/shm").context("cannot make a directory in /dev/shm")?;
        let path = folder.path().join("map");
        let control = ControlMap::create(&path, &Geometry::new(1, ClusterId([1; 16]), NodeId([2; 16])))?;
        let map = DataMap::attach(&path)?;
        let region = Region::new(RegionConfig { cores: 2, chunks_per_core: 4096, headers_per_core: 64 })?;
        let clients = Clients::new(LIMITS.clients, map.core_clients(0)?);
        let mut serving = Serving::new(LIMITS, clients, Replicating::new(Site::default(), 0));
        let store = FreshStore::new(DEVICE_BYTES, Shape { shards: Some(1), journal_blocks: None })
            .context("a new store is too small for its tables")?;
        serving.open_store(0, store.shards.into_iter());
        let export = export();
        let table = ExportTable::new(vec![export.clone()]).context("two exports have one address")?;
        let backing = Backing::Layer(Object { shard: 0, number: 0 });
        let mut core = Core {
            serving,
            devices: NullDevices::new(region.pool(0)?),
            senders: region.pool(1)?,
            table,
            served: vec![Some(Served { store: 0, backing, owner: 0 })],
            batches: Vec::new(),
            stats: map.core_stats(0)?,
            _control: control,
            _folder: folder,
        };
        core.batches = core.frames(&export, Kind::Write)?;
        core.run(BATCHES)?;
        if kind == Kind::Read {
            for frame in std::mem::take(&mut core.batches).into_iter().flatten() {
                for segment in frame.into_segments() {
                    core.senders.release(segment.chunk);
                }
            }
            core.batches = core.frames(&export, Kind::Read)?;
        }
        Ok(core)
    }

    fn frames(&mut self, export: &Export, kind: Kind) -> anyhow::Result<Vec<Vec<RxFrame>>> {
        let write = (kind == Kind::Write).then_some(BYTE);
        let mut frame = |request: u32| {
            let block = u64::from(request * STRIDE_BLOCKS % EXTENT_BLOCKS);
            request_frame(&mut self.senders, export, block * SECTORS_PER_BLOCK, 8, write)
        };
        let batch = |batch: u32| batch * BATCH..(batch + 1) * BATCH;
        (0..BATCHES).map(|number| batch(number).map(&mut frame).collect()).collect()
    }

    /// Serves so many batches.
    ///
    /// # Errors
    /// A frame that is not taken for what it is, or a request that is not answered.
    pub(super) fn run(&mut self, batches: u32) -> anyhow::Result<()> {
        let Core { serving, devices, senders, table, served, batches: frames, stats, .. } = self;
        for batch in frames.iter().cycle().take(batches as usize) {
            let mut around = Around { devices: &mut *devices, served, stats, now_ns: 1 };
            for frame in batch {
                let Some((export, io)) = stage_parse(table, senders, frame) else {
                    bail!("a frame of this program's own is not work for the store")
                };
                stage_order(serving, Arrival { io, export, interface: 0, frame }, &mut around);
            }
            let mut answered = 0;
            loop {
                if stage_answer(serving, &mut around) {
                    answered += 1;
                } else if stage_submit(serving, &mut around) {
                } else if let Some(ended) = around.devices.next_ended() {
                    stage_complete(serving, ended, &mut around);
                } else if stage_store(serving, &mut around) {
                } else {
                    break;
                }
            }
            ensure!(answered == BATCH, "{answered} of {BATCH} requests were answered");
        }
        Ok(())
    }
}

fn export() -> Export {
    Export {
        key: 0,
        address: Address { shelf: 1, slot: 1 },
        mac: Mac([0x02, 0xaa, 0, 0, 0, 0x10]),
        size_sectors: u64::from(EXTENT_BLOCKS) * SECTORS_PER_BLOCK,
        read_only: false,
        serial: String::new(),
        config_string: Vec::new(),
        on_interfaces: ON_ALL_INTERFACES,
        masks: Vec::new(),
        reserved_for: Vec::new(),
        allow: AoePolicy::default(),
    }
}
