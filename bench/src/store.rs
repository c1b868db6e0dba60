//! An extent store on a real file beside fio on the same one: what checksums, journal and thin space cost next to the bare disk.
//!
//! * this file – the shapes, and the interleaved rounds.
//! * [`session`] – the store at work, on one thread.
//! * [`peer`] – fio.
//! * [`opening`] – how long opening a large store takes, and how much memory it needs.

pub(crate) mod opening;
mod peer;
mod session;

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::Serialize;
use torus_dataplane::store::extent::shard::Copies;

use self::peer::Peer;
use self::session::{Placed, Prepared, Terms};
use crate::measure::CoreTicks;
use crate::units::human_bytes;

/// Requests in flight of the short shapes.
const DEPTH: u32 = 32;
/// Requests in flight of the long ones.
const LONG_DEPTH: u32 = 4;
/// Blocks of the long ones.
const LONG_BLOCKS: u32 = 256;
/// Extents of the warm set.
const WARM_EXTENTS: u64 = 16;
/// Regions in the activity log where a set is to be outside it.
const COLD_ACTIVE_MAX: u32 = 64;
/// A pair in which the hypervisor took more is measured again.
const STEAL_PERCENT_MAX: f64 = 10.0;
/// So often at most.
const ATTEMPTS: u32 = 4;

/// Where data go first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Mode {
    /// Into the journal: the only copy.
    Journal,
    /// In place: another copy exists, and the device writes blocks whole.
    InPlace,
    /// Both, one after the other.
    Both,
}

/// What is to be measured.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    pub(crate) path: &'a Path,
    pub(crate) size_bytes: u64,
    pub(crate) duration_ns: u64,
    pub(crate) rounds: u32,
    pub(crate) mode: Mode,
    /// What the names of the rows have in them.
    pub(crate) only: &'a str,
}

/// One kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    RandomRead,
    RandomWrite,
    /// Each write to an extent that has no slot yet.
    FirstWrite,
    LongRead,
    LongWrite,
}

impl Load {
    fn is_write(self) -> bool {
        !matches!(self, Load::RandomRead | Load::LongRead)
    }

    fn is_long(self) -> bool {
        matches!(self, Load::LongRead | Load::LongWrite)
    }

    fn blocks(self) -> u32 {
        if self.is_long() { LONG_BLOCKS } else { 1 }
    }

    fn depth(self) -> u32 {
        if self.is_long() { LONG_DEPTH } else { DEPTH }
    }
}

struct Shape {
    name: &'static str,
    load: Load,
    terms: Terms,
    /// Extents of the set; all that are written with `None`.
    extents: Option<u64>,
    /// What the ratio is to reach.
    bar: Option<f64>,
}

/// What was done in a measurement.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) operations: u64,
    pub(crate) elapsed_ns: u64,
    pub(crate) cpu_ns: u64,
}

impl Done {
    fn iops(self) -> f64 {
        self.operations as f64 * 1e9 / self.elapsed_ns.max(1) as f64
    }

    fn cpu_us(self) -> f64 {
        self.cpu_ns as f64 / 1e3 / self.operations.max(1) as f64
    }
}

#[derive(Debug, Serialize)]
struct Row {
    shape: &'static str,
    block_bytes: u64,
    depth: u32,
    ratio: f64,
    ratio_min: f64,
    ratio_max: f64,
    bar: Option<f64>,
    reached: Option<bool>,
    store_iops: f64,
    fio_iops: f64,
    store_cpu_us_per_op: f64,
    fio_cpu_us_per_op: f64,
    steal_percent: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    kind: &'static str,
    path: String,
    size_bytes: u64,
    rounds: u32,
    extents: u64,
    rows: Vec<Row>,
}

/// A file that is gone when the run is.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Measures and prints; whether every bar was reached.
///
/// # Errors
/// Files that cannot be made, fio that cannot be run, or a request that failed.
pub(crate) fn run(asked: &Asked<'_>, json: bool) -> anyhow::Result<bool> {
    ensure!(asked.size_bytes >= 1 << 30, "--size must be at least 1GiB: the sets would not differ");
    let path = asked.path;
    ensure!(!path.exists(), "{} is there already: name another file, or remove it", path.display());
    let _scratch = Scratch(path.to_owned());
    Peer::check()?;
    eprintln!("writing a file of {} in full", human_bytes(asked.size_bytes));
    let prepared = Prepared::make(path, asked.size_bytes)?;
    let peer = Peer {
        path,
        read_offset_bytes: prepared.written_offset_bytes,
        write_offset_bytes: prepared.peer_offset_bytes,
    };
    let mut shapes = shapes(asked.mode);
    shapes.retain(|shape| shape.name.contains(asked.only));
    ensure!(!shapes.is_empty(), "no row has '{}' in its name", asked.only);
    let mut pairs: Vec<Vec<(Done, Done, f64)>> = shapes.iter().map(|_| Vec::new()).collect();
    for round in 0..asked.rounds {
        for (shape, pairs) in shapes.iter().zip(&mut pairs) {
            pairs.push(pair(shape, &prepared, &peer, asked, round)?);
        }
        eprintln!("round {} of {}", round + 1, asked.rounds);
    }
    let rows: Vec<Row> = shapes.iter().zip(&pairs).map(|(shape, pairs)| row(shape, pairs)).collect();
    let reached = rows.iter().all(|row| row.reached != Some(false));
    let report = Report {
        kind: "store",
        path: asked.path.display().to_string(),
        size_bytes: asked.size_bytes,
        rounds: asked.rounds,
        extents: prepared.extents,
        rows,
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print(asked.mode);
    }
    Ok(reached)
}

fn shapes(mode: Mode) -> Vec<Shape> {
    let journal = Terms { copies: Copies::Sole, active_max: None };
    let beside = Terms { copies: Copies::Others { stable_version: u64::MAX }, active_max: None };
    let cold = Terms { active_max: Some(COLD_ACTIVE_MAX), ..beside };
    let (with_journal, with_place) = (mode != Mode::InPlace, mode != Mode::Journal);
    let warm = Some(WARM_EXTENTS);
    let shape = |name, load, terms, extents, bar| Shape { name, load, terms, extents, bar };
    let all = [
        (true, shape("random read", Load::RandomRead, journal, None, Some(0.95))),
        (with_journal, shape("warm overwrite, journal", Load::RandomWrite, journal, warm, Some(0.85))),
        (with_place, shape("warm overwrite, in place", Load::RandomWrite, beside, warm, Some(0.85))),
        (with_place, shape("cold overwrite, in place", Load::RandomWrite, cold, None, Some(0.5))),
        (with_journal, shape("first write, journal", Load::FirstWrite, journal, None, None)),
        (with_place, shape("first write, in place", Load::FirstWrite, beside, None, None)),
        (true, shape("sequential read", Load::LongRead, journal, None, Some(0.95))),
        (with_journal, shape("sequential write, journal", Load::LongWrite, journal, None, Some(0.95))),
        (with_place, shape("sequential write, in place", Load::LongWrite, beside, None, Some(0.95))),
    ];
    all.into_iter().filter_map(|(wanted, shape)| wanted.then_some(shape)).collect()
}

/// One measurement of the store and one of fio, as near to each other as can be.
fn pair(
    shape: &Shape,
    prepared: &Prepared<'_>,
    peer: &Peer<'_>,
    asked: &Asked<'_>,
    round: u32,
) -> anyhow::Result<(Done, Done, f64)> {
    let extents = shape.extents.unwrap_or(prepared.extents).min(prepared.extents);
    let mut attempt = 1;
    loop {
        let before = CoreTicks::read(None);
        let ours = || {
            let placed = Placed { load: shape.load, terms: shape.terms, extents, seed: u64::from(round) };
            prepared.measure(placed, asked.duration_ns).with_context(|| format!("the store, {}", shape.name))
        };
        let theirs = || peer.measure(shape.load, extents, asked.duration_ns);
        let (store, fio) = if round.is_multiple_of(2) {
            let store = ours()?;
            (store, theirs()?)
        } else {
            let fio = theirs()?;
            (ours()?, fio)
        };
        let steal = CoreTicks::read(None).since(before).steal_percent();
        if steal <= STEAL_PERCENT_MAX || attempt >= ATTEMPTS {
            return Ok((store, fio, steal));
        }
        eprintln!("{}: {steal:.0} % steal, once more", shape.name);
        attempt += 1;
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn row(shape: &Shape, pairs: &[(Done, Done, f64)]) -> Row {
    let ratios = || pairs.iter().map(|(store, fio, _)| store.iops() / fio.iops());
    let ratio = median(ratios());
    Row {
        shape: shape.name,
        block_bytes: u64::from(shape.load.blocks()) * 4096,
        depth: shape.load.depth(),
        ratio,
        ratio_min: ratios().fold(f64::INFINITY, f64::min),
        ratio_max: ratios().fold(0.0, f64::max),
        bar: shape.bar,
        reached: shape.bar.map(|bar| ratio >= bar),
        store_iops: median(pairs.iter().map(|(store, _, _)| store.iops())),
        fio_iops: median(pairs.iter().map(|(_, fio, _)| fio.iops())),
        store_cpu_us_per_op: median(pairs.iter().map(|(store, _, _)| store.cpu_us())),
        fio_cpu_us_per_op: median(pairs.iter().map(|(_, fio, _)| fio.cpu_us())),
        steal_percent: pairs.iter().map(|(_, _, steal)| *steal).fold(0.0, f64::max),
    }
}

impl Report {
    fn print(&self, mode: Mode) {
        println!(
            "{:<27} {:>6} {:>13} {:>5} {:>8} {:>8} {:>9} {:>9} {:>6}",
            "shape", "ratio", "extremes", "bar", "store/s", "fio/s", "µs store", "µs fio", "steal"
        );
        for row in &self.rows {
            let bar = row.bar.map_or("-".to_owned(), |bar| format!("{bar:.2}"));
            let missed = if row.reached == Some(false) { "  below" } else { "" };
            println!(
                "{:<27} {:>6.3} {:>13} {:>5} {:>8.0} {:>8.0} {:>9.1} {:>9.1} {:>4.0} %{missed}",
                row.shape,
                row.ratio,
                format!("{:.2} - {:.2}", row.ratio_min, row.ratio_max),
                bar,
                row.store_iops,
                row.fio_iops,
                row.store_cpu_us_per_op,
                row.fio_cpu_us_per_op,
                row.steal_percent
            );
        }
        if mode != Mode::Journal {
            println!(
                "in place: another copy, stable at once, and a device that writes blocks whole are pretended by the bench"
            );
            println!("cold: {COLD_ACTIVE_MAX} regions in the activity log, set by the bench");
        }
    }
}
