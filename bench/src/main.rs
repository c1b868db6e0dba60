//! `torus-bench`: an AoE load generator that verifies what it reads, and the ceilings of the machine to hold its
//! figures against.
//!
//! | module | what it answers |
//! |---|---|
//! | [`initiator`] | what a Linux initiator would send next (no I/O) |
//! | [`workload`], [`verify`] | which block comes next; what a sector may hold |
//! | [`load`], [`station`] | the initiator on a real link |
//! | [`ceiling`] | what link and disk reach alone |
//! | [`store`] | what the extent store reaches beside the bare disk, and how it opens |
//! | [`ring`] | how even rings are, and what moves between them |
//! | [`stages`], [`null_device`] | how many instructions a request takes, and where |
//! | [`report`], [`measure`] | what came out, and what it cost |
#![forbid(unsafe_code)]

mod ceiling;
mod cli;
mod initiator;
mod load;
mod measure;
mod null_device;
mod report;
mod ring;
mod stages;
mod station;
mod store;
mod units;
mod verify;
mod workload;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use aoe_xdp::link::{Interface, Region};
use aoe_xdp::target::ExportTable;
use aoe_xdp::wire::Mac;
use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::ceiling::disk::{self, Disk};
use crate::ceiling::link::{Served, export, serve};
use crate::ceiling::pair::{INTERFACE, Pair, enter};
use crate::cli::{AoeArgs, Ceiling, Cli, Command, DiskArgs, LinkArgs, StoreArgs};
use crate::load::Load;
use crate::measure::pin;
use crate::report::{LinkReport, LoadReport, ServeReport};
use crate::station::{Station, region};

/// MAC of the volume that `ceiling link` pretends: locally administered, as an export's.
const CEILING_MAC: Mac = Mac([0x02, 0x74, 0x62, 0x00, 0x00, 0x10]);
/// With `--pair` the server begins at core 0, and the generator has the next core to itself.
const SERVER_CORE: u16 = 0;

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Does what is asked; true if all was well.
fn run(cli: &Cli) -> anyhow::Result<bool> {
    match &cli.command {
        Command::Aoe(args) => aoe(args),
        Command::Ceiling(Ceiling::Link(args)) => match &args.interface {
            Some(interface) => ceiling_link(args, interface).map(|()| true),
            None => ceiling_pair(args),
        },
        Command::Ceiling(Ceiling::Disk(args)) => ceiling_disk(args).map(|()| true),
        Command::Store(args) => measure_store(args),
        Command::StoreOpen(args) => store::opening::run(&args.path, args.json),
        Command::Ring(args) => ring::run(args),
        Command::Stages(args) => match args.run.as_slice() {
            [kind, batches] => stages::serve(kind, batches).map(|()| true),
            _ => stages::run(args.bounds.as_deref(), args.json),
        },
    }
}

/// Set by SIGINT and SIGTERM; a second one ends the process at once.
fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .context("cannot take signals")?;
    }
    Ok(stop)
}

fn aoe(args: &AoeArgs) -> anyhow::Result<bool> {
    let load = args.load()?;
    let stop = stop_flag()?;
    if let Some(core) = args.cpu {
        pin(core)?;
    }
    let region = region(1)?;
    let mut interface = Interface::open(&args.interface, args.link, &region)?;
    let mut station = Station::open(&mut interface, &region, 0, 1)?;
    let ran = load::run(&load, &mut station, &stop)?;
    if let (Some(path), Some(oracle)) = (&args.verify_log, &ran.oracle) {
        oracle.save(path, &args.target.to_string())?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&ran.report)?);
    } else {
        print!("{}", ran.report.table());
    }
    Ok(ran.report.ok)
}

fn ceiling_disk(args: &DiskArgs) -> anyhow::Result<()> {
    let report = disk::run(&Disk {
        path: &args.file,
        size_bytes: args.size,
        block_bytes: args.block,
        depth: args.depth,
        write: args.write,
        dsync: args.dsync,
        pattern: args.pattern,
        engine: args.engine,
        duration_ns: args.seconds,
        seed: args.seed(),
        core: args.cpu,
    })?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(())
}

fn measure_store(args: &StoreArgs) -> anyhow::Result<bool> {
    let asked = store::Asked {
        path: &args.path,
        size_bytes: args.size,
        duration_ns: args.seconds,
        rounds: args.rounds,
        mode: args.mode,
        only: &args.only,
    };
    store::run(&asked, args.json)
}

fn ceiling_link(args: &LinkArgs, name: &str) -> anyhow::Result<()> {
    let stop = stop_flag()?;
    let region = region(args.cores)?;
    let mut interface = open_server(args, name, &region)?;
    let cores = |thread: u16| args.cpu.map(|first| first + thread);
    eprintln!("serving {} on {name}: {}", args.shelf_slot, interface.info().mode);
    let (served, link) = serve_all(args, &region, &mut interface, cores, &stop)?;
    print_served(args, &served.report(link))
}

fn open_server(args: &LinkArgs, name: &str, region: &Arc<Region>) -> anyhow::Result<Interface> {
    let mut interface = Interface::open(name, args.link, region)?;
    interface.add_mac(CEILING_MAC.0)?;
    Ok(interface)
}

/// Serves with one thread per core until `stop`.
fn serve_all(
    args: &LinkArgs,
    region: &Arc<Region>,
    interface: &mut Interface,
    core_of: impl Fn(u16) -> Option<u16>,
    stop: &AtomicBool,
) -> anyhow::Result<(Served, LinkReport)> {
    let table = ExportTable::new(vec![export(args.shelf_slot, args.size, CEILING_MAC)])?;
    let link = LinkReport::from(interface.info());
    let mut stations = (0..args.cores)
        .map(|thread| Station::open(interface, region, thread, args.cores))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let served = std::thread::scope(|scope| {
        let threads: Vec<_> = (0u16..)
            .zip(&mut stations)
            .map(|(thread, station)| {
                let (table, core) = (&table, core_of(thread));
                scope.spawn(move || serve(station, table, core, stop))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a serving thread does not panic"))
            .collect::<anyhow::Result<Vec<_>>>()
    })?;
    Ok((Served::sum(&served), link))
}

fn print_served(args: &LinkArgs, report: &ServeReport) -> anyhow::Result<()> {
    if args.json {
        println!("{}", serde_json::to_string(report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(())
}

/// The core after the server's, or the last one where there are no more.
fn generator_core(args: &LinkArgs) -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let last = u16::try_from(cores - 1).unwrap_or(u16::MAX);
    (SERVER_CORE + args.cores).min(last)
}

fn ceiling_pair(args: &LinkArgs) -> anyhow::Result<bool> {
    let load = args.shape.load(args.shelf_slot, Some(generator_core(args)))?;
    let stop = stop_flag()?;
    let mut rates = Vec::new();
    let mut ok = true;
    for _ in 0..args.repeat {
        let pair = Pair::create(args.mtu, args.cores)?;
        let (report, served) = measure_pair(args, &load, &pair, &stop)?;
        if args.json {
            println!("{}", serde_json::json!({ "load": report, "server": served }));
        } else {
            print!("{}{}", served.table(), report.table());
        }
        ok &= report.ok;
        rates.push(report.rate.iops);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    if rates.len() > 1 && !args.json {
        rates.sort_by(f64::total_cmp);
        println!("median of {}: {:.0} IOPS", rates.len(), rates[rates.len() / 2]);
    }
    Ok(ok)
}

/// One measurement: the server's threads in one namespace, the generator in the other.
fn measure_pair(
    args: &LinkArgs,
    load: &Load,
    pair: &Pair,
    stop: &AtomicBool,
) -> anyhow::Result<(LoadReport, ServeReport)> {
    let served_enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            enter(&pair.server)?;
            let region = region(args.cores)?;
            let mut interface = open_server(args, INTERFACE, &region)?;
            let core_of = |thread: u16| Some((SERVER_CORE + thread).min(generator_core(args)));
            serve_all(args, &region, &mut interface, core_of, &served_enough)
        });
        let client = scope.spawn(|| {
            enter(&pair.client)?;
            pin(generator_core(args))?;
            let region = region(1)?;
            let mut interface = Interface::open(INTERFACE, args.link, &region)?;
            let mut station = Station::open(&mut interface, &region, 0, 1)?;
            load::run(load, &mut station, stop)
        });
        let ran = client.join().expect("the generator does not panic");
        served_enough.store(true, Ordering::Relaxed);
        let served = server.join().expect("the server does not panic");
        // Where both failed, the server's failure is the reason of the other.
        let (served, link) = served?;
        Ok((ran?.report, served.report(link)))
    })
}
