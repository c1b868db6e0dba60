//! A bare io_uring loop on a file or device: the product's own ring, buffers that are chunks of registered frame
//! memory, O_DIRECT, and nothing else. What it reaches is the most that a store on this disk can reach.
//!
//! On tmpfs, where io_uring hands every request to a worker thread, the product reads and writes inline; so does this
//! loop, unless told otherwise. One request is then in flight at a time, whatever the depth.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use aoe_xdp::link::{CHUNK_BYTES, Pool};
use rustix::fs::{Mode, OFlags, fstatfs, open};
use torus_uring::{BLOCKS_MAX, Blocks, Event, FileId, Ring, RingConfig, read_inline, write_inline};

use crate::measure::{CoreTicks, now_ns, pin, thread_cpu_ns};
use crate::report::{Cost, DiskReport, Latencies, Rate};
use crate::station::region;
use crate::workload::{Pattern, Random, Workload};

/// Bytes written at a time where a file is made.
const FILL_BYTES: usize = 1 << 20;
/// The longest sleep for a completion, so that the end is noticed.
const WAIT: Duration = Duration::from_millis(50);

/// `TMPFS_MAGIC` of `linux/magic.h`.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// How requests are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Engine {
    /// As the product would: inline on tmpfs, else through the ring.
    Auto,
    /// io_uring.
    Ring,
    /// preadv and pwritev.
    Inline,
}

/// What is to be measured.
#[derive(Debug, Clone)]
pub(crate) struct Disk<'a> {
    pub(crate) path: &'a Path,
    /// The file is made of this size, where it is shorter or missing.
    pub(crate) size_bytes: Option<u64>,
    pub(crate) block_bytes: u64,
    pub(crate) depth: u16,
    pub(crate) write: bool,
    pub(crate) dsync: bool,
    pub(crate) pattern: Pattern,
    pub(crate) engine: Engine,
    pub(crate) duration_ns: u64,
    pub(crate) seed: u64,
    pub(crate) core: Option<u16>,
}

struct Loop<'a> {
    disk: &'a Disk<'a>,
    ring: Ring,
    pool: Pool,
    file: FileId,
    inline: bool,
    workload: Workload,
    /// Buffers of requests that are not in flight.
    idle: Vec<(u64, Blocks)>,
    started_ns: Vec<u64>,
    latencies: Latencies,
    operations: u64,
}

/// Runs the loop.
///
/// # Errors
/// A file that cannot be used, or a request that failed.
pub(crate) fn run(disk: &Disk<'_>) -> anyhow::Result<DiskReport> {
    let blocks_max = (BLOCKS_MAX * CHUNK_BYTES) as u64;
    ensure!(
        disk.block_bytes > 0
            && disk.block_bytes.is_multiple_of(CHUNK_BYTES as u64)
            && disk.block_bytes <= blocks_max,
        "--block {} cannot be used: it must be a multiple of 4096 up to {blocks_max}, the product's own longest request",
        disk.block_bytes
    );
    if let Some(core) = disk.core {
        pin(core)?;
    }
    if let Some(size_bytes) = disk.size_bytes {
        fill(disk.path, size_bytes, disk.seed)
            .with_context(|| format!("cannot write {} in full", disk.path.display()))?;
    }
    let mut work = Loop::open(disk)?;
    let (all_before, core_before) = (CoreTicks::read(None), CoreTicks::read(disk.core));
    let (start_ns, thread_before) = (now_ns(), thread_cpu_ns());
    work.turn(start_ns + disk.duration_ns)?;
    let (elapsed_ns, thread_ns) = (now_ns() - start_ns, thread_cpu_ns() - thread_before);
    let per_op_us = |ns: u64| ns as f64 / 1e3 / work.operations.max(1) as f64;
    Ok(DiskReport {
        kind: "ceiling-disk",
        path: disk.path.display().to_string(),
        pattern: disk.pattern,
        engine: if work.inline { Engine::Inline } else { Engine::Ring },
        write: disk.write,
        dsync: disk.dsync,
        block_bytes: disk.block_bytes,
        depth: disk.depth,
        rate: Rate::new(work.operations, work.operations * disk.block_bytes, elapsed_ns),
        latency_us: work.latencies.summary(),
        cost: Cost {
            thread_us_per_op: per_op_us(thread_ns),
            core_us_per_op: disk
                .core
                .map(|core| per_op_us(CoreTicks::read(Some(core)).since(core_before).busy_ns())),
            steal_percent: CoreTicks::read(None).since(all_before).steal_percent(),
        },
    })
}

impl<'a> Loop<'a> {
    fn open(disk: &'a Disk<'a>) -> anyhow::Result<Loop<'a>> {
        let access = if disk.write { OFlags::RDWR } else { OFlags::RDONLY };
        let file =
            open(disk.path, access | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()).with_context(|| {
                format!("cannot open {} for O_DIRECT: give --size to make it", disk.path.display())
            })?;
        let mut file = File::from(file);
        let size_bytes = file.seek(SeekFrom::End(0)).context("cannot find the size")?;
        let blocks = size_bytes / disk.block_bytes;
        ensure!(
            blocks > 0,
            "{} has {size_bytes} bytes, less than one block: give --size",
            disk.path.display()
        );
        let is_tmpfs = fstatfs(&file).is_ok_and(|info| info.f_type == TMPFS_MAGIC);
        let inline = disk.engine == Engine::Inline || disk.engine == Engine::Auto && is_tmpfs;
        ensure!(
            is_tmpfs || !inline || !disk.dsync,
            "--engine inline cannot make writes durable: leave out --dsync"
        );
        let region = region(1)?;
        let mut pool = region.pool(0)?;
        let requests_max = u32::from(disk.depth).next_power_of_two();
        let mut ring = Ring::new(RingConfig { requests_max }, &region, None)?;
        let file = ring.register_file(file.as_fd())?;
        let mut random = Random::new(disk.seed);
        let mut idle = Vec::with_capacity(usize::from(disk.depth));
        for token in 0..u64::from(disk.depth) {
            let mut request = Blocks::new();
            for _ in 0..disk.block_bytes / CHUNK_BYTES as u64 {
                let mut chunk = pool.take_chunk().context("no frame memory left: use a smaller --depth")?;
                for word in pool.bytes_mut(&mut chunk).chunks_exact_mut(8) {
                    word.copy_from_slice(&random.next().to_le_bytes());
                }
                request.push(chunk);
            }
            idle.push((token, request));
        }
        Ok(Loop {
            disk,
            ring,
            pool,
            file,
            inline,
            workload: Workload::new(blocks, disk.pattern, if disk.write { 0 } else { 100 }, disk.seed),
            idle,
            started_ns: vec![0; usize::from(disk.depth)],
            latencies: Latencies::new(),
            operations: 0,
        })
    }

    fn turn(&mut self, end_ns: u64) -> anyhow::Result<()> {
        loop {
            let now = now_ns();
            if now < end_ns && self.inline {
                self.one_inline(now)?;
                continue;
            }
            if now < end_ns {
                self.submit(now)?;
            } else if self.ring.in_flight() == 0 {
                break;
            }
            self.ring.submit_and_wait(WAIT).context("io_uring")?;
            self.complete()?;
        }
        for (_, mut blocks) in self.idle.drain(..) {
            while let Some(chunk) = blocks.pop() {
                self.pool.release(chunk);
            }
        }
        Ok(())
    }

    fn submit(&mut self, now: u64) -> anyhow::Result<()> {
        while let Some((token, blocks)) = self.idle.pop() {
            let at = self.workload.next().1 * self.disk.block_bytes;
            self.started_ns[usize::try_from(token)?] = now;
            let refused = if self.disk.write {
                self.ring.write(self.file, at, blocks, self.disk.dsync, token)
            } else {
                self.ring.read(&self.pool, self.file, at, blocks, token)
            };
            if refused.is_err() {
                bail!("the ring holds fewer requests than it was made for");
            }
        }
        Ok(())
    }

    fn one_inline(&mut self, now: u64) -> anyhow::Result<()> {
        let at = self.workload.next().1 * self.disk.block_bytes;
        let file = self.ring.file(self.file);
        let (_, blocks) = self.idle.last_mut().context("--depth is at least 1")?;
        let result = if self.disk.write {
            write_inline(file, at, blocks, &self.pool)
        } else {
            read_inline(file, at, blocks, &self.pool)
        };
        result.with_context(|| self.failed())?;
        self.latencies.record(now_ns().saturating_sub(now));
        self.operations += 1;
        Ok(())
    }

    fn failed(&self) -> String {
        format!("{} {}", if self.disk.write { "writing" } else { "reading" }, self.disk.path.display())
    }

    fn complete(&mut self) -> anyhow::Result<()> {
        let now = now_ns();
        while let Some(event) = self.ring.next_event() {
            let Event::Disk(finished) = event else { continue };
            finished.result.with_context(|| self.failed())?;
            let started_ns = self.started_ns[usize::try_from(finished.token)?];
            self.latencies.record(now.saturating_sub(started_ns));
            self.operations += 1;
            self.idle.push((finished.token, finished.blocks));
        }
        Ok(())
    }
}

/// Makes sure that a file of `size_bytes` is there with every block written.
fn fill(path: &Path, size_bytes: u64, seed: u64) -> anyhow::Result<()> {
    let mut file = File::options().create(true).truncate(false).read(true).write(true).open(path)?;
    let mut at = file.seek(SeekFrom::End(0))?;
    if at >= size_bytes {
        return Ok(());
    }
    let mut random = Random::new(seed);
    let mut bytes = vec![0u8; FILL_BYTES];
    while at < size_bytes {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes());
        }
        let len = usize::try_from(size_bytes - at).map_or(FILL_BYTES, |left| left.min(FILL_BYTES));
        file.write_all(&bytes[..len])?;
        at += len as u64;
    }
    file.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &Path) -> Disk<'_> {
        Disk {
            path,
            size_bytes: Some(4 << 20),
            block_bytes: 4096,
            depth: 8,
            write: false,
            dsync: false,
            pattern: Pattern::Random,
            engine: Engine::Auto,
            duration_ns: 100_000_000,
            seed: 1,
            core: None,
        }
    }

    #[test]
    fn a_file_is_made_read_and_written() {
        let file = tempfile::NamedTempFile::new_in(".").unwrap();
        let report = run(&disk(file.path())).unwrap();
        assert!(report.rate.operations > 8 && report.rate.iops > 0.0);
        assert_eq!(file.as_file().metadata().unwrap().len(), 4 << 20);
        let before = std::fs::read(file.path()).unwrap();
        let write = Disk { write: true, dsync: true, block_bytes: 8192, seed: 2, ..disk(file.path()) };
        let report = run(&write).unwrap();
        assert_eq!(report.latency_us.unwrap().count, report.rate.operations);
        let after = std::fs::read(file.path()).unwrap();
        assert!(before.len() == after.len() && before != after, "writing changed nothing");
    }

    #[test]
    fn memory_is_read_and_written_inline() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        for write in [false, true] {
            let report = run(&Disk { write, dsync: write, ..disk(file.path()) }).unwrap();
            assert_eq!(report.engine, Engine::Inline);
            assert!(report.rate.operations > 100, "{}", report.rate.operations);
            let ring = run(&Disk { write, engine: Engine::Ring, ..disk(file.path()) }).unwrap();
            assert!(ring.engine == Engine::Ring && ring.rate.operations > 8);
        }
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let file = tempfile::NamedTempFile::new_in(".").unwrap();
        let none = Disk { size_bytes: None, ..disk(file.path()) };
        assert!(run(&none).unwrap_err().to_string().contains("--size"));
        let odd = Disk { block_bytes: 512, ..disk(file.path()) };
        assert!(run(&odd).unwrap_err().to_string().contains("--block"));
        let unsafe_writes = Disk { write: true, dsync: true, engine: Engine::Inline, ..disk(file.path()) };
        assert!(run(&unsafe_writes).unwrap_err().to_string().contains("durable"));
        let missing = Disk { size_bytes: None, ..disk(Path::new("./no/such/file")) };
        assert!(run(&missing).unwrap_err().to_string().contains("cannot open"));
    }
}
