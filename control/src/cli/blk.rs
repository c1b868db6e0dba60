//! `torusblk`: makes volumes visible as AoE block devices.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Instant;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use hyper::Method;

use super::{
    CliError, Common, Done, EXIT_CODES, EXPORT_LIMIT, POLL, completion, dash, finish, print, print_json,
    print_version, staleness, table, yes_no,
};
use crate::api::types as t;
use crate::client::{Client, segment};
use crate::model::Address;
use crate::size::human;

/// Exports volumes over ATA over Ethernet.
#[derive(Debug, Parser)]
#[command(name = "torusblk", version, after_help = format!("\
Examples:
  torusblk aoe data             the next free address
  torusblk aoe data 1.1         shelf 1, slot 1: /dev/etherd/e1.1 on the initiator
  torusblk aoe data eth1 1 1    the same, if the volume's node serves on eth1
  torusblk list
  torusblk unexport data

On the initiator: modprobe aoe; the device appears within a second.
{EXIT_CODES}"))]
struct Blk {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Export a volume: NAME, NAME SHELF.SLOT, or NAME IF MAJOR MINOR
    #[command(
        after_help = "Examples:\n  torusblk aoe data\n  torusblk aoe data 1.1 --read-only\n  torusblk aoe data eth1 1 1"
    )]
    Aoe {
        /// Name or id of the volume
        name: String,
        /// SHELF.SLOT, or IF MAJOR MINOR; the next free address if left out
        #[arg(value_name = "ADDRESS", num_args = 0..=3)]
        address: Vec<String>,
        /// Refuse writes
        #[arg(long)]
        read_only: bool,
        /// Do not wait until it is served
        #[arg(long)]
        no_wait: bool,
    },
    /// End a volume's export
    Unexport {
        /// Name or id of the volume
        name: String,
        /// Do not wait until its node has confirmed
        #[arg(long)]
        no_wait: bool,
    },
    /// List the exports
    List,
    /// Show the versions of this program and of torusd
    Version,
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: Shell,
    },
}

/// The program: arguments in, exit code out.
#[must_use]
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let blk = Blk::parse_from(arguments);
    finish(blk.common.json, run(blk))
}

async fn run(blk: Blk) -> Done {
    let json = blk.common.json;
    let client = Client::new(blk.common.api.clone());
    match blk.command {
        Command::Aoe { name, address, read_only, no_wait } => {
            let (interface, address) = parse_target(&address)?;
            let request = t::ExportRequest { volume: name, address, interface, read_only };
            aoe(&client, json, &request, no_wait).await
        }
        Command::Unexport { name, no_wait } => unexport(&client, json, &name, no_wait).await,
        Command::List => list(&client, json).await,
        Command::Version => print_version(&client, "torusblk", json).await,
        Command::Completion { shell } => completion(&mut Blk::command(), shell),
    }
}

/// Reads what follows the volume's name into an interface and an address.
fn parse_target(words: &[String]) -> Result<(Option<String>, Option<String>), CliError> {
    let check = |text: String| match text.parse::<Address>() {
        Ok(address) => Ok(address.to_string()),
        Err(error) => Err(CliError::Usage(error.to_string())),
    };
    match words {
        [] => Ok((None, None)),
        [address] => Ok((None, Some(check(address.clone())?))),
        [interface, major, minor] => Ok((Some(interface.clone()), Some(check(format!("{major}.{minor}"))?))),
        _ => Err(CliError::Usage("give nothing, SHELF.SLOT, or IF MAJOR MINOR after the name".into())),
    }
}

async fn ask(client: &Client, volume: &str) -> Result<t::ExportAnswer, CliError> {
    Ok(client.get(&format!("/v1/exports/{}", segment(volume))).await?)
}

async fn aoe(client: &Client, json: bool, request: &t::ExportRequest, no_wait: bool) -> Done {
    let mut answer: t::ExportAnswer = client.request(Method::POST, "/v1/exports", Some(request)).await?;
    let started = Instant::now();
    loop {
        let Some(export) = &answer.export else {
            return Err(CliError::Failed(format!("the export of {} was ended meanwhile", request.volume)));
        };
        if export.state == "failed" {
            return Err(CliError::Failed(format!(
                "{} at {}: {}",
                export.volume, export.address, export.error
            )));
        }
        if no_wait || export.state == "serving" || started.elapsed() > EXPORT_LIMIT {
            break;
        }
        tokio::time::sleep(POLL).await;
        answer = ask(client, &request.volume).await?;
    }
    if json {
        return print_json(&answer);
    }
    let Some(e) = answer.export else { return Ok(()) };
    let read_only = if e.read_only { ", read-only" } else { "" };
    let text = format!(
        "{} ({}{read_only}) is at {}, served by node {}: {} on the initiator\n",
        e.volume,
        human(e.size_bytes),
        e.address,
        e.node,
        e.device
    );
    if e.state == "serving" {
        return print(&text);
    }
    let note = format!("not served yet ({}): see `torusctl node show {}`\n", e.state, e.node);
    print(&(text + &note))
}

async fn unexport(client: &Client, json: bool, name: &str, no_wait: bool) -> Done {
    let path = format!("/v1/exports/{}", segment(name));
    let mut answer: t::ExportAnswer = client.request(Method::DELETE, &path, None::<&()>).await?;
    let started = Instant::now();
    while answer.export.is_some() && !no_wait && started.elapsed() < EXPORT_LIMIT {
        tokio::time::sleep(POLL).await;
        answer = ask(client, name).await?;
    }
    if json {
        return print_json(&answer);
    }
    print(&match answer.export {
        None => format!("{name} is no longer exported\n"),
        Some(e) => format!(
            "the export of {name} at {} is ending; the address is free when node {} has confirmed\n",
            e.address, e.node
        ),
    })
}

async fn list(client: &Client, json: bool) -> Done {
    let list: t::ExportList = client.get("/v1/exports").await?;
    if json {
        return print_json(&list);
    }
    staleness(&list.metadata);
    let row = |e: t::Export| {
        let error = dash(&e.error);
        vec![
            e.address,
            e.volume,
            human(e.size_bytes),
            e.node,
            e.state,
            yes_no(e.read_only),
            e.mac,
            e.device,
            error,
        ]
    };
    let header = ["address", "volume", "size", "node", "state", "read-only", "mac", "device", "error"];
    print(&table(&header, &[2], list.exports.into_iter().map(row).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_well_formed() {
        Blk::command().debug_assert();
    }

    #[test]
    fn targets_are_read_in_all_three_forms() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(parse_target(&[]).unwrap(), (None, None));
        assert_eq!(parse_target(&words("1.1")).unwrap(), (None, Some("1.1".into())));
        assert_eq!(parse_target(&words("eth0 01 2")).unwrap(), (Some("eth0".into()), Some("1.2".into())));
        for bad in ["eth0", "eth0 1", "1.255", "eth0 65535 1"] {
            assert_eq!(parse_target(&words(bad)).unwrap_err().code(), 2, "{bad}");
        }
    }
}
