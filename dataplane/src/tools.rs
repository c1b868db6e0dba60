//! `torus-dataplane store …`: formats a store, checks one, shows what is on it.
//!
//! * `format` – makes a store of a blank device.
//! * `check` – whether everything on a store is whole.
//! * `dump` – what a store says of itself.
//! * `looking` – opens a store without changing it.
//! * `table`, `sizes` – how it is shown.
//!
//! Invariants:
//! * `check` and `dump` write nothing, and stop where a node has the store open.
//! * `format` destroys only what its caller has named.

pub mod check;
pub mod dump;
pub mod format;
mod looking;
mod sizes;
mod table;

use std::process::ExitCode;

use clap::Subcommand;

/// What may be asked of a store on a device.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a store of a blank device or file
    Format(format::Arguments),
    /// Look whether everything on a store is whole; changes nothing
    ///
    /// Exit codes: 0 everything is whole; 1 blocks are bad, lost or suspect; 2 the store cannot be opened or trusted.
    Check(check::Arguments),
    /// Show what is on a store; changes nothing
    Dump(dump::Arguments),
}

/// Does it. Exit code 2 where it could not be done; the others are the command's own.
#[must_use]
pub fn run(command: &Command) -> ExitCode {
    let done = match command {
        Command::Format(arguments) => format::run(arguments).map(|()| true),
        Command::Check(arguments) => check::run(arguments),
        Command::Dump(arguments) => dump::run(arguments).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
