//! What `torusctl` and `torusblk` share: where to ask, how to print, how to end.
//!
//! Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 the API cannot be reached.

pub mod blk;
mod config;
pub mod ctl;
mod offline;
mod scrub;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use thiserror::Error;

use crate::api::types as t;
use crate::client::{Client, ClientError, Endpoint, parse_endpoint, segment};

/// Shown at the end of every command's help.
const EXIT_CODES: &str = "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no API could be reached.";
/// Work that takes longer than this is shown with a progress bar.
const QUICK: Duration = Duration::from_secs(2);
/// How often the state of work in progress is asked for.
const POLL: Duration = Duration::from_millis(100);
/// How long an export may take to begin or end before the command stops waiting for it.
const EXPORT_LIMIT: Duration = Duration::from_secs(20);

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Where the API listens [default: unix:/run/torus/api.sock, then 127.0.0.1:4321]
    #[arg(long, env = "TORUS_API", global = true, value_name = "ADDR|unix:PATH", value_parser = parse_endpoint)]
    api: Option<Endpoint>,
    /// Print the API's answer as JSON; a refusal too, on stderr
    #[arg(long, global = true)]
    json: bool,
}

/// Why a command ends badly.
#[derive(Debug, Error)]
pub enum CliError {
    /// The API cannot be reached, or refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Something was given that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// It was taken in, but came to no good end.
    #[error("{0}")]
    Failed(String),
    /// The answer cannot be printed.
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
}

impl CliError {
    /// The exit code.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Client(ClientError::Unreachable { .. }) => 3,
            Self::Usage(_) => 2,
            Self::Client(_) | Self::Failed(_) | Self::Print(_) => 1,
        }
    }
}

type Done = Result<(), CliError>;

/// Runs a command to its exit code; errors go to stderr, as JSON too if that was asked for.
fn finish(json: bool, work: impl Future<Output = Done>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(work) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of a pipe has had enough.
        Err(CliError::Print(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            match (&error, json) {
                (CliError::Client(ClientError::Refused(detail)), true) => {
                    let body = t::ErrorBody { error: detail.clone() };
                    eprintln!("{}", serde_json::to_string(&body).unwrap_or_default());
                }
                _ => eprintln!("error: {error}"),
            }
            ExitCode::from(error.code())
        }
    }
}

fn print(text: &str) -> Done {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

fn print_json(value: &impl Serialize) -> Done {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
    print(&(text + "\n"))
}

/// A table without lines: a header, rows, columns aligned; the columns in `right` to the right.
fn table(header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().map(|h| h.to_uppercase())).add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines = table.lines().map(|line| line.trim_end().to_owned() + "\n");
    lines.collect()
}

/// Label and value per line, values aligned; empty values are left out.
fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    let shown = pairs.iter().filter(|(_, value)| !value.is_empty());
    shown.map(|(label, value)| format!("{label:width$}  {value}\n")).collect()
}

/// A warning if what is shown may be old.
fn staleness(metadata: &str) {
    if metadata != "connected" {
        eprintln!("warning: metadata {metadata}: this is what was known then");
    }
}

/// Follows a volume's work until it is ready, or gone.
async fn follow_volume(client: &Client, name: &str, verb: &str) -> Result<Option<t::VolumeAnswer>, CliError> {
    let started = Instant::now();
    let mut bar: Option<ProgressBar> = None;
    let end = loop {
        let answer: t::VolumeAnswer = match client.get(&format!("/v1/volumes/{}", segment(name))).await {
            Ok(answer) => answer,
            Err(ClientError::Refused(detail)) if detail.code == "no_such_volume" => break Ok(None),
            Err(error) => break Err(error.into()),
        };
        let volume = &answer.volume;
        if volume.state == "ready" {
            break Ok(Some(answer));
        }
        if !volume.error.is_empty() {
            break Err(CliError::Failed(format!("volume {}: {}", volume.name, volume.error)));
        }
        if started.elapsed() > QUICK && io::stderr().is_terminal() {
            let bar =
                bar.get_or_insert_with(|| progress_bar(volume.size_bytes, format!("{verb} {}", volume.name)));
            bar.set_position(volume.progress.as_ref().map_or(0, |p| p.done_bytes));
        }
        tokio::time::sleep(POLL).await;
    };
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    end
}

/// A bar on stderr that counts bytes.
fn progress_bar(total_bytes: u64, message: String) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    ProgressBar::new(total_bytes)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(message)
}

/// Prints a shell's completion script for a command.
fn completion(command: &mut clap::Command, shell: clap_complete::Shell) -> Done {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, command, name, &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// Prints this program's version, and torusd's if it answers.
async fn print_version(client: &Client, name: &str, json: bool) -> Done {
    let server: Option<t::Version> = client.get("/v1/version").await.ok();
    let own = env!("CARGO_PKG_VERSION");
    if json {
        return print_json(&serde_json::json!({
            "version": own,
            "torusd": server.as_ref().map(|s| &s.version),
            "api": server.as_ref().map(|s| &s.api),
        }));
    }
    let server = server.map_or_else(|| "not reachable".into(), |s| format!("{} (API {})", s.version, s.api));
    print(&fields(&[(name, own.to_owned()), ("torusd", server)]))
}

fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// How many copies there are, and how many of them are in sync where not all are.
fn copies(copies: u8, in_sync: u64) -> String {
    if in_sync == u64::from(copies) { copies.to_string() } else { format!("{in_sync} of {copies}") }
}

fn dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows = vec![vec!["a".into(), "1 GiB".into()], vec!["long".into(), "512 MiB".into()]];
        assert_eq!(table(&["name", "size"], &[1], rows), "NAME     SIZE\na       1 GiB\nlong  512 MiB\n");
    }

    #[test]
    fn fields_leave_out_what_is_empty() {
        let text = fields(&[("id", "x".into()), ("zone", String::new()), ("longer", "y".into())]);
        assert_eq!(text, "id      x\nlonger  y\n");
    }

    #[test]
    fn exit_codes_are_those_documented() {
        let unreachable = ClientError::Unreachable { tried: String::new(), reason: String::new() };
        assert_eq!(CliError::from(unreachable).code(), 3);
        assert_eq!(CliError::Usage(String::new()).code(), 2);
        assert_eq!(CliError::Failed(String::new()).code(), 1);
    }
}
