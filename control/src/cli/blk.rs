//! `torusblk`: makes volumes visible as AoE block devices.

use std::ffi::OsString;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Instant;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{
    CliError, Common, Done, EXIT_CODES, EXPORT_LIMIT, POLL, completion, copies, dash, fields, finish, print,
    print_json, print_version, staleness, table, yes_no,
};
use crate::api::types as t;
use crate::client::{Client, segment};
use crate::model::Address;
use crate::settings::{ConfigString, SettingError, Who, parse_interfaces};
use crate::size::human;

/// Exports volumes over ATA over Ethernet.
#[derive(Debug, Parser)]
#[command(name = "torusblk", version, after_help = format!("\
Examples:
  torusblk aoe data             the next free address
  torusblk aoe data 1.1         shelf 1, slot 1: /dev/etherd/e1.1 on the initiator
  torusblk aoe data eth1 1 1    the same, on eth1 of the volume's node only
  torusblk list
  torusblk show data
  torusblk config data --set 'rack 7'
  torusblk masks data --add 02:00:5e:10:00:01
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
    #[command(after_help = "\
Examples:
  torusblk aoe data
  torusblk aoe data 1.1 --read-only
  torusblk aoe data eth1 1 1
  torusblk aoe data --on eth1@100,eth2
  torusblk aoe data --allow-aoe-config --allow-aoe-reserve=02:00:5e:10:00:01")]
    Aoe {
        /// Name or id of the volume
        name: String,
        /// SHELF.SLOT, or IF MAJOR MINOR; the next free address if left out
        #[arg(value_name = "ADDRESS", num_args = 0..=3)]
        address: Vec<String>,
        /// Refuse writes
        #[arg(long)]
        read_only: bool,
        /// Interfaces of the volume's node to serve it on, such as eth1 or eth1@100 [default: all]
        #[arg(long, value_name = "IF", value_delimiter = ',')]
        on: Vec<String>,
        #[command(flatten)]
        allow: Allow,
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
    /// Show an export with all its settings
    Show {
        /// Name or id of the volume, or SHELF.SLOT
        name: String,
    },
    /// Show the initiators that use an export: requests, bytes, losses, window and latencies of each
    #[command(after_help = "\
Examples:
  torusblk clients data
  torusblk clients data --json

WINDOW is the requests in progress now and at most; DROPPED those left unanswered, which the initiator sends again.")]
    Clients {
        /// Name or id of the volume, or SHELF.SLOT
        name: String,
    },
    /// Show or set an export's config string, which initiators can read and test
    #[command(
        after_help = "Examples:\n  torusblk config data\n  torusblk config data --set \"rack 7\"\n  torusblk config data --set-hex 00ff10"
    )]
    Config {
        /// Name or id of the volume, or SHELF.SLOT
        name: String,
        /// The new string, as it is; at most 1024 bytes
        #[arg(long, value_name = "TEXT", group = "change")]
        set: Option<String>,
        /// The new string, two hexadecimal digits for each byte
        #[arg(long, value_name = "HEX", group = "change")]
        set_hex: Option<String>,
        /// Remove the string
        #[arg(long, group = "change")]
        clear: bool,
    },
    /// Show or change the initiators that an export answers; all, if none is named
    #[command(
        after_help = "Examples:\n  torusblk masks data\n  torusblk masks data --add 02:00:5e:10:00:01,02:00:5e:10:00:02\n  torusblk masks data --clear"
    )]
    Masks {
        /// Name or id of the volume, or SHELF.SLOT
        name: String,
        /// Initiators to answer, besides those in the list
        #[arg(long, value_name = "MAC", value_delimiter = ',')]
        add: Vec<String>,
        /// Initiators to take out of the list
        #[arg(long, value_name = "MAC", value_delimiter = ',')]
        remove: Vec<String>,
        /// Answer all initiators
        #[arg(long, conflicts_with_all = ["add", "remove"])]
        clear: bool,
    },
    /// Show or change for which initiators an export is reserved; whoever holds it now is not asked
    #[command(
        after_help = "Examples:\n  torusblk reserve data\n  torusblk reserve data --for 02:00:5e:10:00:01\n  torusblk reserve data --release"
    )]
    Reserve {
        /// Name or id of the volume, or SHELF.SLOT
        name: String,
        /// The only initiators that may read and write
        #[arg(long = "for", value_name = "MAC", value_delimiter = ',', group = "change")]
        macs: Vec<String>,
        /// Let all initiators read and write
        #[arg(long, group = "change")]
        release: bool,
    },
    /// Show or change who may change an export's settings over AoE
    #[command(
        after_help = "Examples:\n  torusblk policy data\n  torusblk policy data --allow-aoe-config\n  torusblk policy data --allow-aoe-reserve=02:00:5e:10:00:01,02:00:5e:10:00:02\n  torusblk policy data --allow-aoe-config=none"
    )]
    Policy {
        /// Name or id of the volume, or SHELF.SLOT
        name: String,
        #[command(flatten)]
        allow: Allow,
    },
    /// Show the versions of this program and of torusd
    Version,
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: Shell,
    },
}

/// Who may change settings over AoE: WHO is `none`, `any` (also if left out), or MACs with commas between.
#[derive(Debug, Clone, Args)]
struct Allow {
    /// Who may set the config string: none, any (also if left out), or MACs with commas between
    #[arg(long, value_name = "WHO", num_args = 0..=1, require_equals = true, default_missing_value = "any", value_parser = Who::from_str)]
    allow_aoe_config: Option<Who>,
    /// Who may edit the mask list
    #[arg(long, value_name = "WHO", num_args = 0..=1, require_equals = true, default_missing_value = "any", value_parser = Who::from_str)]
    allow_aoe_masks: Option<Who>,
    /// Who may reserve and release
    #[arg(long, value_name = "WHO", num_args = 0..=1, require_equals = true, default_missing_value = "any", value_parser = Who::from_str)]
    allow_aoe_reserve: Option<Who>,
}

impl Allow {
    /// The whole policy, if any of it was named: the rest is `none`.
    fn policy(&self) -> Option<t::Policy> {
        let edit = self.edit();
        let or_none = |who: Option<String>| who.unwrap_or_else(|| Who::Nobody.to_string());
        self.is_given().then(|| t::Policy {
            config: or_none(edit.config),
            masks: or_none(edit.masks),
            reserve: or_none(edit.reserve),
        })
    }

    fn edit(&self) -> t::PolicyEdit {
        let text = |who: &Option<Who>| who.as_ref().map(ToString::to_string);
        t::PolicyEdit {
            config: text(&self.allow_aoe_config),
            masks: text(&self.allow_aoe_masks),
            reserve: text(&self.allow_aoe_reserve),
        }
    }

    fn is_given(&self) -> bool {
        self.allow_aoe_config.is_some() || self.allow_aoe_masks.is_some() || self.allow_aoe_reserve.is_some()
    }
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
        Command::Aoe { name, address, read_only, mut on, allow, no_wait } => {
            let (interface, address) = parse_target(&address)?;
            on.extend(interface);
            let interfaces = parse_interfaces(&on).map_err(usage)?.iter().map(ToString::to_string).collect();
            let policy = allow.policy();
            let request = t::ExportRequest { volume: name, address, interfaces, read_only, policy };
            aoe(&client, json, &request, no_wait).await
        }
        Command::Unexport { name, no_wait } => unexport(&client, json, &name, no_wait).await,
        Command::List => list(&client, json).await,
        Command::Show { name } => show(&client, json, &name).await,
        Command::Clients { name } => clients(&client, json, &name).await,
        Command::Config { name, set, set_hex, clear } => {
            let string = match (set, set_hex) {
                (Some(text), _) => Some(ConfigString::new(text.into_bytes()).map_err(usage)?),
                (None, Some(hex)) => Some(ConfigString::from_hex(&hex).map_err(usage)?),
                (None, None) => clear.then(ConfigString::default),
            };
            config(&client, json, &name, string).await
        }
        Command::Masks { name, add, remove, clear } => {
            let resource = Resource::new(&name, "masks");
            let answer = if clear {
                resource.change(&client, Method::PUT, &t::MacList::default()).await?
            } else if add.is_empty() && remove.is_empty() {
                resource.get(&client).await?
            } else {
                resource.change(&client, Method::PATCH, &t::MacListEdit { add, remove }).await?
            };
            print_macs(json, &answer, "every initiator is answered")
        }
        Command::Reserve { name, macs, release } => {
            let resource = Resource::new(&name, "reservation");
            let answer = if release || !macs.is_empty() {
                resource.change(&client, Method::PUT, &t::MacList { macs }).await?
            } else {
                resource.get(&client).await?
            };
            print_macs(json, &answer, "not reserved")
        }
        Command::Policy { name, allow } => {
            let resource = Resource::new(&name, "policy");
            let policy: t::Policy = if allow.is_given() {
                resource.change(&client, Method::PATCH, &allow.edit()).await?
            } else {
                resource.get(&client).await?
            };
            if json { print_json(&policy) } else { print(&fields(&policy_fields(&policy))) }
        }
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
            copies(e.copies, e.copies_in_sync),
            e.node,
            e.state,
            yes_no(e.read_only),
            e.mac,
            e.device,
            error,
        ]
    };
    let header =
        ["address", "volume", "size", "copies", "node", "state", "read-only", "mac", "device", "error"];
    print(&table(&header, &[2, 3], list.exports.into_iter().map(row).collect()))
}

/// A setting of an export, as the API has it.
struct Resource {
    path: String,
}

impl Resource {
    fn new(export: &str, setting: &str) -> Self {
        Self { path: format!("/v1/exports/{}/{setting}", segment(export)) }
    }

    async fn get<T: DeserializeOwned>(&self, client: &Client) -> Result<T, CliError> {
        Ok(client.get(&self.path).await?)
    }

    async fn change<T: DeserializeOwned>(
        &self,
        client: &Client,
        method: Method,
        body: &(impl Serialize + Sync),
    ) -> Result<T, CliError> {
        Ok(client.request(method, &self.path, Some(body)).await?)
    }
}

fn usage(error: SettingError) -> CliError {
    CliError::Usage(error.to_string())
}

async fn config(client: &Client, json: bool, name: &str, string: Option<ConfigString>) -> Done {
    let resource = Resource::new(name, "config-string");
    let answer: t::ConfigString = match string {
        Some(string) => {
            let body = t::ConfigString { config_string: string.to_string() };
            resource.change(client, Method::PUT, &body).await?
        }
        None => resource.get(client).await?,
    };
    if json {
        return print_json(&answer);
    }
    print(&(answer.config_string + "\n"))
}

fn print_macs(json: bool, answer: &t::MacList, if_none: &str) -> Done {
    if json {
        return print_json(answer);
    }
    let lines = answer.macs.iter().map(|mac| format!("{mac}\n"));
    print(&if answer.macs.is_empty() { format!("{if_none}\n") } else { lines.collect() })
}

fn policy_fields(policy: &t::Policy) -> [(&'static str, String); 3] {
    [
        ("may set config string", policy.config.clone()),
        ("may edit masks", policy.masks.clone()),
        ("may reserve", policy.reserve.clone()),
    ]
}

async fn show(client: &Client, json: bool, name: &str) -> Done {
    let answer = ask(client, name).await?;
    if json {
        return print_json(&answer);
    }
    staleness(&answer.metadata);
    let Some(e) = answer.export else {
        return Err(CliError::Failed(format!("volume {name} is not exported; see `torusblk list`")));
    };
    let or = |list: &[String], if_none: &str| {
        if list.is_empty() { if_none.to_owned() } else { list.join(", ") }
    };
    let mut lines = vec![
        ("address", e.address),
        ("volume", format!("{} ({})", e.volume, e.volume_id)),
        ("size", human(e.size_bytes)),
        ("copies", copies(e.copies, e.copies_in_sync)),
        ("node", e.node),
        ("state", e.state),
        ("read-only", yes_no(e.read_only)),
        ("mac", e.mac),
        ("device", e.device),
        ("interfaces", or(&e.interfaces, "all")),
        ("config string", e.config_string),
        ("answers", or(&e.masks, "every initiator")),
        ("reserved for", or(&e.reserved_for, "nobody")),
    ];
    lines.extend(policy_fields(&e.policy));
    lines.push(("error", e.error));
    print(&fields(&lines))
}

/// How long ago something was, to the unit that matters.
fn ago(ms: u64) -> String {
    match ms / 1000 {
        0 => format!("{ms} ms ago"),
        s @ 1..120 => format!("{s} s ago"),
        s @ 120..7200 => format!("{} min ago", s / 60),
        s => format!("{} h ago", s / 3600),
    }
}

async fn clients(client: &Client, json: bool, name: &str) -> Done {
    let list: t::ClientList = Resource::new(name, "clients").get(client).await?;
    if json {
        return print_json(&list);
    }
    if list.clients.is_empty() {
        let address = &list.address;
        return print(&format!(
            "no initiator has read or written {address} since node {} serves it\n",
            list.node
        ));
    }
    let latency = |l: &t::Latency| match l.count {
        0 => "-".to_owned(),
        _ => format!("{}/{}/{}", us(l.p50_ns), us(l.p99_ns), us(l.max_ns)),
    };
    let row = |c: &t::ExportClient| {
        let count = |name: &str| c.counters.get(name).copied().unwrap_or(0);
        let dropped: u64 =
            c.counters.iter().filter(|(name, _)| name.starts_with("dropped")).map(|(_, n)| n).sum();
        vec![
            c.mac.clone(),
            count("reads").to_string(),
            human(count("read_bytes")),
            count("writes").to_string(),
            human(count("write_bytes")),
            count("flushes").to_string(),
            count("duplicates").to_string(),
            dropped.to_string(),
            count("ata_errors").to_string(),
            format!("{}/{}", c.in_flight, c.in_flight_max),
            latency(&c.read),
            latency(&c.write),
            ago(c.last_seen_ms_ago),
        ]
    };
    let header = [
        "client",
        "reads",
        "read",
        "writes",
        "written",
        "flushes",
        "duplicates",
        "dropped",
        "errors",
        "window",
        "read us p50/p99/max",
        "write us p50/p99/max",
        "last seen",
    ];
    let right: Vec<_> = (1..12).collect();
    print(&table(&header, &right, list.clients.iter().map(row).collect()))
}

/// Microseconds, whole.
fn us(ns: u64) -> u64 {
    ns.div_ceil(1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_well_formed() {
        Blk::command().debug_assert();
    }

    #[test]
    fn who_may_is_left_out_named_or_a_list() {
        let allow = |words: &str| {
            let words = format!("torusblk aoe v {words}");
            match Blk::try_parse_from(words.split_whitespace()).unwrap().command {
                Command::Aoe { allow, address, .. } => (allow.policy(), address),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(allow("1.1"), (None, vec!["1.1".to_owned()]));
        let policy = |config: &str, masks: &str| t::Policy {
            config: config.into(),
            masks: masks.into(),
            reserve: "none".into(),
        };
        let mac = "02:00:00:00:00:01";
        assert_eq!(allow("--allow-aoe-config 1.1"), (Some(policy("any", "none")), vec!["1.1".to_owned()]));
        let both = allow(&format!("--allow-aoe-config=none --allow-aoe-masks={mac},{mac}")).0;
        assert_eq!(both, Some(policy("none", mac)));
        for bad in ["--allow-aoe-config=all", "--allow-aoe-masks=1:2"] {
            assert!(Blk::try_parse_from(["torusblk", "policy", "v", bad]).is_err());
        }
        assert!(Blk::try_parse_from(["torusblk", "config", "v", "--set", "x", "--clear"]).is_err());
    }

    #[test]
    fn times_are_told_in_the_unit_that_matters() {
        for (ms, text) in [
            (5, "5 ms ago"),
            (1999, "1 s ago"),
            (119_000, "119 s ago"),
            (120_000, "2 min ago"),
            (7_200_000, "2 h ago"),
        ] {
            assert_eq!(ago(ms), text);
        }
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
