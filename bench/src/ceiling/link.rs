//! A target without a store: the product's own link and protocol state machine, answering reads with whatever the
//! frame memory holds and forgetting writes. What it reaches is the most that any store behind this link can reach.
//!
//! As in the product, a read's answer is a header slot and page-aligned chunks of its own, taken and given back for
//! each frame, and no data is copied.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aoe_xdp::link::Segments;
use aoe_xdp::target::{
    self, Action, AoePolicy, Body, Export, ExportTable, Ingress, Io, IoKind, ON_ALL_INTERFACES, Outcome,
    Route,
};
use aoe_xdp::wire::{Address, Mac, SECTOR_LEN};

use crate::measure::{CoreTicks, now_ns, pin, thread_cpu_ns};
use crate::report::{LinkReport, ServeReport};
use crate::station::{Station, sectors_segment};

/// Sectors of a chunk.
const CHUNK_SECTORS: usize = 8;
/// How long the loop turns without a frame before it sleeps.
const SPIN_NS: u64 = 100_000;
/// The longest sleep, so that a stop is noticed.
const SLEEP_NS: u64 = 100_000_000;

/// What one serving thread counted.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Served {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) others: u64,
    pub(crate) silent: u64,
    thread_ns: u64,
    /// Busy time of the thread's core, where it was pinned.
    core_ns: Option<u64>,
}

impl Served {
    /// The sum of several threads.
    pub(crate) fn sum(threads: &[Served]) -> Served {
        threads.iter().fold(Served { core_ns: Some(0), ..Served::default() }, |sum, one| Served {
            reads: sum.reads + one.reads,
            writes: sum.writes + one.writes,
            others: sum.others + one.others,
            silent: sum.silent + one.silent,
            thread_ns: sum.thread_ns + one.thread_ns,
            core_ns: sum.core_ns.zip(one.core_ns).map(|(a, b)| a + b),
        })
    }

    /// The report, with the link that was served.
    pub(crate) fn report(&self, link: LinkReport) -> ServeReport {
        let per_op_us = |ns: u64| ns as f64 / 1e3 / (self.reads + self.writes).max(1) as f64;
        ServeReport {
            kind: "ceiling-link",
            link,
            reads: self.reads,
            writes: self.writes,
            others: self.others,
            silent: self.silent,
            thread_us_per_op: per_op_us(self.thread_ns),
            core_us_per_op: self.core_ns.map(per_op_us),
        }
    }
}

/// The volume that is pretended.
pub(crate) fn export(address: Address, size_bytes: u64, mac: Mac) -> Export {
    Export {
        key: 1,
        address,
        mac,
        size_sectors: size_bytes / SECTOR_LEN as u64,
        read_only: false,
        serial: "no-store".to_owned(),
        config_string: Vec::new(),
        on_interfaces: ON_ALL_INTERFACES,
        masks: Vec::new(),
        reserved_for: Vec::new(),
        allow: AoePolicy::default(),
    }
}

/// Serves until `stop` is set. With `core` the thread stays on it. CPU time counts from the first request on.
///
/// # Errors
/// What the system refused.
pub(crate) fn serve(
    station: &mut Station,
    table: &ExportTable,
    core: Option<u16>,
    stop: &AtomicBool,
) -> anyhow::Result<Served> {
    if let Some(core) = core {
        pin(core)?;
    }
    let ingress = Ingress {
        mac: Mac(station.info().mac),
        ordinal: 0,
        sectors_max: station.info().max_sectors,
        sectors_told: 0,
    };
    let region = Arc::clone(&station.region);
    let mut served = Served::default();
    let mut from: Option<(u64, CoreTicks)> = None;
    let mut busy_ns = now_ns();
    while !stop.load(Ordering::Relaxed) {
        let received = station.receive(|station, frame, queue| {
            answer(station, table, &ingress, frame.head(&region), frame.len(), queue, &mut served);
        });
        let all_sent = station.flush();
        if received > 0 {
            if from.is_none() && served.reads + served.writes > 0 {
                from = Some((thread_cpu_ns(), CoreTicks::read(core)));
            }
            busy_ns = now_ns();
        } else if all_sent && now_ns().saturating_sub(busy_ns) >= SPIN_NS {
            station.sleep(SLEEP_NS)?;
        } else {
            std::hint::spin_loop();
        }
    }
    if let Some((thread_ns, ticks)) = from {
        served.thread_ns = thread_cpu_ns() - thread_ns;
        served.core_ns = core.map(|_| CoreTicks::read(core).since(ticks).busy_ns());
    }
    Ok(served)
}

fn answer(
    station: &mut Station,
    table: &ExportTable,
    ingress: &Ingress,
    head: &[u8],
    frame_len: usize,
    queue: usize,
    served: &mut Served,
) {
    match target::route(table, ingress, head) {
        Route::Silent(_) => served.silent += 1,
        Route::One(export) => {
            let action = target::respond(export, ingress, head, frame_len);
            act(station, export, queue, action, served);
        }
        Route::Matching(address) => {
            for export in table.exports().iter().filter(|export| address.matches(export.address)) {
                let action = target::respond(export, ingress, head, frame_len);
                act(station, export, queue, action, served);
            }
        }
    }
}

fn act(station: &mut Station, export: &Export, queue: usize, action: Action, served: &mut Served) {
    // Where the ring or the memory is full the frame goes unanswered, and the initiator asks again.
    if !station.can_send() {
        station.flush();
        if !station.can_send() {
            served.silent += 1;
            return;
        }
    }
    let mut data = Segments::new();
    let head = match action {
        Action::Silent(_) | Action::Change { .. } => {
            served.silent += 1;
            return;
        }
        Action::Answer(answer) => {
            served.others += 1;
            // The pretended volume has no strings and lists.
            if answer.body == Body::Identify {
                let mut chunk = station.pool.take_chunk().expect("can_send saw free chunks");
                let bytes = station.pool.bytes_mut(&mut chunk);
                export.identify(bytes.first_chunk_mut().expect("a chunk holds a sector"));
                data.push(sectors_segment(chunk, 1)).expect("the first segment");
            }
            answer.head
        }
        Action::Io(io) => {
            count(&io, served);
            if io.kind == IoKind::Read {
                for first in (0..usize::from(io.sectors)).step_by(CHUNK_SECTORS) {
                    let chunk = station.pool.take_chunk().expect("can_send saw free chunks");
                    let count = (usize::from(io.sectors) - first).min(CHUNK_SECTORS);
                    data.push(sectors_segment(chunk, count)).expect("16 sectors are two chunks");
                }
            }
            io.finish(Outcome::Done)
        }
    };
    station.send(queue, &head.bytes[..usize::from(head.len)], data);
}

fn count(io: &Io, served: &mut Served) {
    match io.kind {
        IoKind::Read => served.reads += 1,
        IoKind::Write => served.writes += 1,
        IoKind::Flush => served.others += 1,
    }
}
