//! The load generator: the initiator on a real link, one thread, one busy loop.
//!
//! Latency counts from when an operation was due: with a rate given from its place in the schedule, so that a stalled
//! target is not measured kindly; without one from its submission. The clock is read once per turn of the loop, before
//! frames are sent and after they were received. Nothing is allocated between start and end of the measurement.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail, ensure};
use aoe_xdp::link::{Chunk, RxFrame, Segments};
use aoe_xdp::wire::{ATA_DATA_OFFSET, Address, Mac, SECTOR_LEN};

use crate::initiator::{Behaviour, Finished, Initiator, Kind, Operation, Outcome, Piece, Received, Settings};
use crate::measure::{CoreTicks, now_ns, thread_cpu_ns};
use crate::report::{Cost, Gap, Latencies, LinkReport, LoadReport, Rate, TargetReport};
use crate::station::{Station, each_sector, sectors_segment};
use crate::verify::{Findings, Oracle, stamp};
use crate::workload::{Pattern, Random, Region, Workload};

/// Sectors of a chunk.
const CHUNK_SECTORS: usize = 8;
/// Most sectors of a frame on any link.
const FRAME_SECTORS_MAX: usize = 16;
/// Chunks of random bytes that unverified writes send: more than one, so that a target cannot profit from equal data.
const PAYLOAD_CHUNKS: usize = 64;
/// How long the loop turns without anything to do before it sleeps.
const SPIN_NS: u64 = 100_000;
/// A turn of the loop that takes longer means that this thread did not run: another one had its core, or the
/// hypervisor took it.
const STALL_NS: u64 = 2_000_000;
/// Gaps longer than this are listed.
const GAP_LISTED_NS: u64 = 100_000_000;
/// Gaps that are listed.
const GAPS_MAX: usize = 64;
/// Blocks that are tried for a write before the loop waits for one without an unfinished write.
const BLOCK_TRIES: usize = 8;

/// What is to be run.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) address: Address,
    pub(crate) pattern: Pattern,
    pub(crate) read_percent: u8,
    pub(crate) block_bytes: u64,
    pub(crate) window: u16,
    /// Part of the volume, in bytes; the rest of it from the offset with `None`.
    pub(crate) size_bytes: Option<u64>,
    pub(crate) offset_bytes: u64,
    /// When to stop submitting; neither means at the signal.
    pub(crate) duration_ns: Option<u64>,
    pub(crate) operations: Option<u64>,
    /// Operations per second; as many as go with `None`.
    pub(crate) rate: Option<u64>,
    pub(crate) seed: u64,
    pub(crate) behaviour: Behaviour,
    pub(crate) timeout_ns: u64,
    pub(crate) discover_timeout_ns: u64,
    /// The core that this thread was pinned to.
    pub(crate) core: Option<u16>,
    pub(crate) check: Check,
}

/// How data is checked.
#[derive(Debug, Clone)]
pub(crate) enum Check {
    /// Not at all.
    None,
    /// Everything written is stamped, everything read is compared.
    Stamps,
    /// Everything that the oracle knows is read once and compared.
    ReadBack(Box<Oracle>),
}

/// A finished run: the report, and the oracle if there was one.
pub(crate) struct Ran {
    pub(crate) report: LoadReport,
    pub(crate) oracle: Option<Oracle>,
}

enum Source {
    Generate {
        workload: Workload,
        left: u64,
        /// What was chosen but could not be submitted yet.
        chosen: Option<(Kind, u64)>,
    },
    ReadBack {
        next_block: u64,
    },
}

struct Verifier {
    oracle: Oracle,
    findings: Findings,
    /// Per frame slot: the lowest versions allowed when the frame was first sent.
    lowest: Vec<[u32; FRAME_SECTORS_MAX]>,
}

struct Progress {
    start_ns: u64,
    /// When something finished last, or the first operation after an idle time was submitted.
    last_ns: u64,
    longest_gap_ns: u64,
    longest_unstalled_gap_ns: u64,
    /// How long this thread did not run since `last_ns`, and at the longest.
    stalled_ns: u64,
    longest_stall_ns: u64,
    gaps: Vec<Gap>,
    reads: Latencies,
    writes: Latencies,
    bytes: u64,
    errors: u64,
}

struct Generator<'a> {
    load: &'a Load,
    region: Region,
    initiator: Initiator,
    source: Source,
    verifier: Option<Verifier>,
    payload: Vec<Chunk>,
    next_payload: usize,
    progress: Progress,
    next_due_ns: u64,
    finished: Vec<Finished>,
}

/// Runs a load to its end, or until `stop` is set.
///
/// # Errors
/// What kept it from running; failures of operations and wrong data are in the report.
pub(crate) fn run(load: &Load, station: &mut Station, stop: &AtomicBool) -> anyhow::Result<Ran> {
    let initiator = discover(load, station, stop)?;
    let region = region_of(load, &initiator)?;
    let mut generator = Generator::new(load, region, initiator, station)?;
    let core_before = load.core.map(|core| CoreTicks::read(Some(core)));
    let (all_before, thread_before) = (CoreTicks::read(None), thread_cpu_ns());
    generator.turn(station, stop)?;
    let thread_ns = thread_cpu_ns() - thread_before;
    let elapsed_ns = now_ns() - generator.progress.start_ns;
    let core_ns =
        load.core.zip(core_before).map(|(core, before)| CoreTicks::read(Some(core)).since(before).busy_ns());
    let steal_percent = CoreTicks::read(None).since(all_before).steal_percent();
    Ok(generator.into_report(station, elapsed_ns, thread_ns, core_ns, steal_percent))
}

fn discover(load: &Load, station: &mut Station, stop: &AtomicBool) -> anyhow::Result<Initiator> {
    let settings = Settings {
        station: Mac(station.info().mac),
        address: load.address,
        operations_max: load.window,
        link_sectors_max: station.info().max_sectors.min(16),
        behaviour: load.behaviour,
        timeout_ns: load.timeout_ns,
    };
    let start_ns = now_ns();
    let mut initiator = Initiator::new(settings, start_ns);
    loop {
        let now = now_ns();
        station.receive(|station, frame, _| {
            initiator.receive(frame.head(&station.region), frame.len(), now);
        });
        if initiator.target().is_some() {
            return Ok(initiator);
        }
        if let Some(refusal) = initiator.refusal() {
            bail!("target {}: {refusal}", load.address);
        }
        ensure!(!stop.load(Ordering::Relaxed), "stopped before the target was found");
        if now - start_ns > load.discover_timeout_ns {
            let interface = &station.info().interface;
            let found =
                if initiator.is_identifying() { "does not answer IDENTIFY" } else { "does not answer" };
            bail!(
                "target {} on interface {interface} {found}: see that it is exported (`torusblk list`), that this \
                 interface is on its Ethernet segment, and that the MTU is the same everywhere",
                load.address
            );
        }
        initiator.tick(now, &mut Vec::new());
        while station.can_send()
            && let Some(outgoing) = initiator.transmit(now)
        {
            station.send(0, outgoing.head(), Segments::new());
        }
        if station.flush() {
            station.sleep(10_000_000)?;
        }
    }
}

fn region_of(load: &Load, initiator: &Initiator) -> anyhow::Result<Region> {
    let size_sectors = initiator.target().expect("discovery ended").size_sectors;
    if let Check::ReadBack(oracle) = &load.check {
        let region = oracle.region();
        ensure!(
            region.start_lba + region.sectors() <= size_sectors,
            "the verify log is about {} sectors, the volume has only {size_sectors}: is it the same volume?",
            region.start_lba + region.sectors()
        );
        return Ok(region);
    }
    let sector_len = SECTOR_LEN as u64;
    let (start_lba, block_sectors) = (load.offset_bytes / sector_len, load.block_bytes / sector_len);
    let rest = size_sectors.checked_sub(start_lba).with_context(|| {
        format!("--offset lies beyond the volume of {} bytes", u128::from(size_sectors) * 512)
    })?;
    let sectors = load.size_bytes.map_or(rest, |bytes| bytes / sector_len);
    ensure!(
        sectors <= rest,
        "--size goes beyond the volume: {} bytes are there from the offset on",
        rest * sector_len
    );
    let blocks = sectors / block_sectors;
    ensure!(blocks > 0, "not even one block fits: use a smaller --block or a larger volume");
    Ok(Region {
        start_lba,
        block_sectors: u32::try_from(block_sectors).context("--block is too large")?,
        blocks,
    })
}

impl<'a> Generator<'a> {
    fn new(
        load: &'a Load,
        region: Region,
        initiator: Initiator,
        station: &mut Station,
    ) -> anyhow::Result<Generator<'a>> {
        let oracle = match &load.check {
            Check::None => None,
            Check::Stamps => Some(Oracle::new(load.seed, region)?),
            Check::ReadBack(oracle) => Some((**oracle).clone()),
        };
        let source = if matches!(load.check, Check::ReadBack(_)) {
            Source::ReadBack { next_block: 0 }
        } else {
            let workload = Workload::new(region.blocks, load.pattern, load.read_percent, load.seed);
            Source::Generate { workload, left: load.operations.unwrap_or(u64::MAX), chosen: None }
        };
        let payload =
            if oracle.is_none() && load.read_percent < 100 { random_payload(station)? } else { Vec::new() };
        let lowest = vec![[0; FRAME_SECTORS_MAX]; initiator.frames_max()];
        let start_ns = now_ns();
        Ok(Generator {
            load,
            region,
            source,
            verifier: oracle.map(|oracle| Verifier { oracle, findings: Findings::default(), lowest }),
            payload,
            next_payload: 0,
            progress: Progress {
                start_ns,
                last_ns: start_ns,
                longest_gap_ns: 0,
                longest_unstalled_gap_ns: 0,
                stalled_ns: 0,
                longest_stall_ns: 0,
                gaps: Vec::with_capacity(GAPS_MAX),
                reads: Latencies::new(),
                writes: Latencies::new(),
                bytes: 0,
                errors: 0,
            },
            next_due_ns: start_ns,
            finished: Vec::with_capacity(usize::from(load.window)),
            initiator,
        })
    }

    fn turn(&mut self, station: &mut Station, stop: &AtomicBool) -> anyhow::Result<()> {
        let end_ns = self.load.duration_ns.map(|duration| self.progress.start_ns.saturating_add(duration));
        let mut busy_ns = self.progress.start_ns;
        let (mut last_turn_ns, mut slept_ns) = (busy_ns, 0);
        loop {
            let now = now_ns();
            self.progress.turned(now.saturating_sub(last_turn_ns).saturating_sub(slept_ns));
            (last_turn_ns, slept_ns) = (now, 0);
            let received = station.receive(|station, frame, _| self.take(station, frame, now));
            self.initiator.tick(now, &mut self.finished);
            self.account(now);
            let over = end_ns.is_some_and(|end| now >= end) || stop.load(Ordering::Relaxed);
            let mut idle = received == 0;
            if !over {
                idle &= self.submit(now) == 0;
            }
            if self.initiator.is_dead() || (self.initiator.unfinished() == 0 && (over || self.is_exhausted()))
            {
                return Ok(());
            }
            idle &= self.transmit(station, now) == 0;
            idle &= station.flush();
            if !idle {
                busy_ns = now;
            } else if now.saturating_sub(busy_ns) < SPIN_NS {
                std::hint::spin_loop();
            } else {
                slept_ns = self.sleep(station, now, end_ns)?;
            }
        }
    }

    /// Sleeps until a frame comes or something is due; returns how long that was allowed to take.
    fn sleep(&self, station: &Station, now: u64, end_ns: Option<u64>) -> anyhow::Result<u64> {
        let mut until_ns = self.initiator.next_tick_ns();
        if let Some(end_ns) = end_ns.filter(|&end| end > now) {
            until_ns = until_ns.min(end_ns);
        }
        if self.load.rate.is_some() && self.next_due_ns > now {
            until_ns = until_ns.min(self.next_due_ns);
        }
        // Turning on through the last moment hits a due time better than the timer does.
        match until_ns.saturating_sub(now) {
            0..60_000 => Ok(0),
            left => station.sleep(left - 50_000).map(|()| left),
        }
    }

    fn is_exhausted(&self) -> bool {
        match &self.source {
            Source::Generate { left, .. } => *left == 0,
            Source::ReadBack { next_block } => *next_block >= self.region.blocks,
        }
    }

    /// Gives the initiator what is due; returns how many operations that was.
    fn submit(&mut self, now: u64) -> usize {
        let mut submitted = 0;
        while self.initiator.has_room() {
            let due_ns = match self.load.rate {
                Some(_) if self.next_due_ns > now => break,
                Some(_) => self.next_due_ns,
                None => now,
            };
            let Some((kind, block, version)) = self.choose() else { break };
            if let Some(rate) = self.load.rate {
                self.next_due_ns += 1_000_000_000 / rate;
            }
            if self.initiator.unfinished() == 0 {
                self.progress.wait_from(now);
            }
            let (lba, sectors) = (self.region.lba(block), self.region.block_sectors);
            self.initiator.submit(Operation { kind, lba, sectors, version, due_ns });
            submitted += 1;
        }
        submitted
    }

    /// The next operation, with the version it writes. `None` when there is none, or none that may start now.
    fn choose(&mut self) -> Option<(Kind, u64, u32)> {
        match &mut self.source {
            Source::ReadBack { next_block } => {
                let oracle = &self.verifier.as_ref().expect("reading back is verified").oracle;
                let block = (*next_block..self.region.blocks).find(|&block| oracle.knows(block));
                *next_block = block.map_or(self.region.blocks, |block| block + 1);
                block.map(|block| (Kind::Read, block, 0))
            }
            Source::Generate { left: 0, .. } => None,
            Source::Generate { workload, left, chosen } => {
                let retry = self.load.pattern == Pattern::Random;
                for _ in 0..BLOCK_TRIES {
                    let (kind, block) = chosen.take().unwrap_or_else(|| workload.next());
                    let version = match (&mut self.verifier, kind) {
                        (Some(verifier), Kind::Write) => verifier.oracle.begin_write(block),
                        _ => Some(0),
                    };
                    if let Some(version) = version {
                        *left -= 1;
                        return Some((kind, block, version));
                    }
                    if !retry {
                        *chosen = Some((kind, block));
                        return None;
                    }
                }
                None
            }
        }
    }

    /// Sends what may be sent; returns how many frames that was.
    fn transmit(&mut self, station: &mut Station, now: u64) -> usize {
        let mut sent = 0;
        while station.can_send() {
            let Some(outgoing) = self.initiator.transmit(now) else { break };
            // By address, so that all frames about one block stay in one queue and in order.
            let queue = outgoing.io.map_or(0, |(_, piece, _)| {
                usize::try_from(piece.lba / CHUNK_SECTORS as u64 % station.queues() as u64)
                    .expect("below the number of queues")
            });
            let data = match outgoing.io {
                Some((Kind::Write, piece, _)) => self.write_data(station, piece),
                Some((Kind::Read, piece, true)) => {
                    if let Some(Verifier { oracle, lowest, .. }) = &mut self.verifier {
                        oracle.snapshot(piece.lba, piece.sectors, &mut lowest[usize::from(piece.slot)]);
                    }
                    Segments::new()
                }
                _ => Segments::new(),
            };
            station.send(queue, outgoing.head(), data);
            sent += 1;
        }
        sent
    }

    fn write_data(&mut self, station: &mut Station, piece: Piece) -> Segments {
        let mut segments = Segments::new();
        let sectors = usize::from(piece.sectors);
        for first in (0..sectors).step_by(CHUNK_SECTORS) {
            let count = (sectors - first).min(CHUNK_SECTORS);
            let lba = piece.lba + first as u64;
            let chunk = match &self.verifier {
                None => {
                    // In turn, so that no chunk gets near the 255 handles that it may have.
                    self.next_payload = (self.next_payload + 1) % self.payload.len();
                    station.pool.share(&self.payload[self.next_payload])
                }
                Some(verifier) => {
                    let mut chunk = station.pool.take_chunk().expect("can_send saw free chunks");
                    let sectors = station.pool.bytes_mut(&mut chunk).as_chunks_mut().0;
                    for (lba, sector) in (lba..).zip(&mut sectors[..count]) {
                        stamp(sector, verifier.oracle.seed(), lba, piece.version);
                    }
                    chunk
                }
            };
            segments.push(sectors_segment(chunk, count)).expect("16 sectors are two chunks");
        }
        segments
    }

    fn take(&mut self, station: &Station, frame: &RxFrame, now: u64) {
        let finished = match self.initiator.receive(frame.head(&station.region), frame.len(), now) {
            Received::Other => None,
            Received::Failure { finished } => finished,
            Received::Answer { kind, piece, finished } => {
                if let Some(verifier) = &mut self.verifier {
                    verifier.answered(kind, piece, frame, station);
                }
                finished
            }
        };
        self.finished.extend(finished);
    }

    /// Books what finished.
    fn account(&mut self, now: u64) {
        if self.finished.is_empty() {
            return;
        }
        self.progress.advance(now);
        for Finished { operation, outcome } in self.finished.drain(..) {
            if let (Some(verifier), Kind::Write) = (&mut self.verifier, operation.kind) {
                verifier.oracle.end_write(self.region.block(operation.lba));
            }
            if outcome != Outcome::Done {
                self.progress.errors += 1;
                continue;
            }
            self.progress.bytes += u64::from(operation.sectors) * SECTOR_LEN as u64;
            let latencies = match operation.kind {
                Kind::Read => &mut self.progress.reads,
                Kind::Write => &mut self.progress.writes,
            };
            latencies.record(now.saturating_sub(operation.due_ns));
        }
    }

    fn into_report(
        self,
        station: &mut Station,
        elapsed_ns: u64,
        thread_ns: u64,
        core_ns: Option<u64>,
        steal_percent: f64,
    ) -> Ran {
        for chunk in self.payload {
            station.pool.release(chunk);
        }
        let progress = self.progress;
        let (read, write) = (progress.reads.summary(), progress.writes.summary());
        let [reads, writes] =
            [&read, &write].map(|summary| summary.as_ref().map_or(0, |summary| summary.count));
        let per_op_us = |ns: u64| ns as f64 / 1e3 / (reads + writes).max(1) as f64;
        let target = self.initiator.target().expect("discovery ended");
        let bad = self.verifier.as_ref().is_some_and(|verifier| verifier.findings.is_bad());
        let read_back = matches!(self.source, Source::ReadBack { .. });
        let report = LoadReport {
            kind: if read_back { "check" } else { "aoe" },
            ok: progress.errors == 0 && !bad && !self.initiator.is_dead(),
            link: LinkReport::from(station.info()),
            target: TargetReport {
                address: self.load.address.to_string(),
                mac: target.mac.to_string(),
                size_bytes: target.size_sectors.saturating_mul(SECTOR_LEN as u64),
                buffer_count: target.buffer_count,
                sector_count: target.sector_count,
                firmware: target.firmware,
            },
            pattern: if read_back { Pattern::Sequential } else { self.load.pattern },
            read_percent: if read_back { 100 } else { self.load.read_percent },
            block_bytes: u64::from(self.region.block_sectors) * SECTOR_LEN as u64,
            window: self.load.window,
            frames_max: self.initiator.frames_max(),
            initiator: self.load.behaviour,
            seed: self.verifier.as_ref().map_or(self.load.seed, |verifier| verifier.oracle.seed()),
            rate: Rate::new(reads + writes, progress.bytes, elapsed_ns),
            reads,
            writes,
            read_latency_us: read,
            write_latency_us: write,
            counters: *self.initiator.counters(),
            errors: progress.errors,
            link_dropped: station.dropped(),
            longest_gap_ms: progress.longest_gap_ns as f64 / 1e6,
            longest_unstalled_gap_ms: progress.longest_unstalled_gap_ns as f64 / 1e6,
            longest_stall_ms: progress.longest_stall_ns as f64 / 1e6,
            gaps: progress.gaps,
            cost: Cost {
                thread_us_per_op: per_op_us(thread_ns),
                core_us_per_op: core_ns.map(per_op_us),
                steal_percent,
            },
            verify: self.verifier.as_ref().map(|verifier| verifier.findings.clone()),
        };
        Ran { report, oracle: self.verifier.map(|verifier| verifier.oracle) }
    }
}

impl Verifier {
    fn answered(&mut self, kind: Kind, piece: Piece, frame: &RxFrame, station: &Station) {
        let Verifier { oracle, findings, lowest } = self;
        match kind {
            Kind::Write => oracle.acknowledged(piece.lba, piece.sectors, piece.version),
            Kind::Read => {
                let lowest = &lowest[usize::from(piece.slot)];
                each_sector(frame, &station.region, ATA_DATA_OFFSET, piece.sectors, |number, sector| {
                    oracle.check(piece.lba + number as u64, sector, lowest[number], findings);
                });
            }
        }
    }
}

impl Progress {
    /// From now on an answer is waited for.
    fn wait_from(&mut self, now: u64) {
        self.last_ns = now;
        self.stalled_ns = 0;
    }

    /// A turn of the loop took this long, sleep not counted.
    fn turned(&mut self, turn_ns: u64) {
        if turn_ns >= STALL_NS {
            self.stalled_ns += turn_ns;
            self.longest_stall_ns = self.longest_stall_ns.max(turn_ns);
        }
    }

    /// Something finished after at least one operation was unfinished since the last time.
    fn advance(&mut self, now: u64) {
        let gap_ns = now.saturating_sub(self.last_ns);
        let unstalled_ns = gap_ns.saturating_sub(self.stalled_ns);
        let stalled_ms = self.stalled_ns as f64 / 1e6;
        self.longest_gap_ns = self.longest_gap_ns.max(gap_ns);
        self.longest_unstalled_gap_ns = self.longest_unstalled_gap_ns.max(unstalled_ns);
        self.wait_from(now);
        if gap_ns > GAP_LISTED_NS && self.gaps.len() < GAPS_MAX {
            let ended_s = now.saturating_sub(self.start_ns) as f64 / 1e9;
            self.gaps.push(Gap { ended_s, ms: gap_ns as f64 / 1e6, stalled_ms });
        }
    }
}

fn random_payload(station: &mut Station) -> anyhow::Result<Vec<Chunk>> {
    let mut random = Random::new(now_ns());
    (0..PAYLOAD_CHUNKS)
        .map(|_| {
            let mut chunk = station.pool.take_chunk().context("no frame memory for the data to write")?;
            for word in station.pool.bytes_mut(&mut chunk).chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
            Ok(chunk)
        })
        .collect()
}
