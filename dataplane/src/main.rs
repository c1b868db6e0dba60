//! `torus-dataplane`: started and supervised by `torusd`.
//!
//! Exit codes of `run`: 0 drained as asked; 2 the configuration cannot be served (one line on standard error says why and what to
//! do); anything else is a crash, after which it is started again. Those of `store` are the commands' own.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "torus-dataplane", version, about = "The data plane of a Torus node; started by torusd")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve what the shared map asks for, until it asks to drain
    #[command(
        after_help = "Example: torus-dataplane run --map /run/torus/map --lock /run/torus/dataplane.lock"
    )]
    Run {
        /// The shared map, made by torusd
        #[arg(long)]
        map: PathBuf,
        /// File that is locked while serving; the process id is written into it
        #[arg(long)]
        lock: PathBuf,
    },
    /// Make a store, check one, show what is on it; no node is needed
    #[command(subcommand)]
    Store(torus_dataplane::tools::Command),
}

fn main() -> ExitCode {
    // A thread that panics takes the process with it: its supervisor starts a whole one.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    let (map, lock) = match Arguments::parse().command {
        Command::Run { map, lock } => (map, lock),
        Command::Store(command) => return torus_dataplane::tools::run(&command),
    };
    let (manager, _lock) = match torus_dataplane::manager::start(&map, &lock) {
        Ok(started) => started,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(if error.is_configuration() { 2 } else { 1 });
        }
    };
    match manager.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
