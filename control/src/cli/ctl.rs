//! `torusctl`: administers the cluster.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use hyper::Method;

use super::{
    CliError, Common, Done, EXIT_CODES, completion, config, copies, dash, fields, finish, follow_volume,
    offline, print, print_json, print_version, scrub, staleness, table, yes_no,
};
use crate::api::types as t;
use crate::client::{Client, segment};
use crate::node::rfc3339;
use crate::size::{self, human};

/// Administers a Torus cluster: nodes, stores and volumes.
#[derive(Debug, Parser)]
#[command(name = "torusctl", version, after_help = format!("\
Examples:
  torusctl status
  torusctl volume create data 100GiB
  torusctl volume list --json
  torusctl node show
  torusctl scrub start --all --wait
  torusctl config set resync-rate 200MiB
  torusctl --api 10.0.0.7:4321 status

Exports are made with torusblk.
{EXIT_CODES}"))]
struct Ctl {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Initialise a cluster, once; a single node without etcd does it by itself
    #[command(after_help = "Examples:\n  torusctl init\n  torusctl init --extent-size 4MiB")]
    Init {
        /// Unit of allocation, a power of two from 1MiB to 64MiB
        #[arg(long, value_name = "SIZE", value_parser = size::parse)]
        extent_size: Option<u64>,
    },
    /// Show the cluster and the node that answers
    Status,
    /// Nodes
    #[command(subcommand)]
    Node(NodeCommand),
    /// Stores: the files and block devices of a node
    #[command(subcommand)]
    Store(StoreCommand),
    /// Scrubs: have a store read all that it holds and compare it with its checksums
    #[command(subcommand)]
    Scrub(scrub::ScrubCommand),
    /// Volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Settings of the cluster
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Show the versions of this program and of torusd
    Version,
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  torusctl completion bash > /etc/bash_completion.d/torusctl")]
    Completion {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// List the nodes
    List,
    /// Show a node: links, stores, cores and their latencies
    #[command(after_help = "Examples:\n  torusctl node show\n  torusctl node show n2")]
    Show {
        /// Name or id; the node that answers if none is given
        #[arg(default_value = "self")]
        node: String,
    },
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// List the stores
    List,
    /// Have a node open one more store; it is formatted only if it is blank
    #[command(
        after_help = "Examples:\n  torusctl store add /dev/nvme1n1\n  torusctl store add /srv/torus/more:20GiB --node n2"
    )]
    Add {
        /// File or block device; a SIZE creates a missing file
        #[arg(value_name = "PATH[:SIZE]")]
        store: String,
        /// The node; the one that answers if none is given
        #[arg(long, default_value = "self")]
        node: String,
    },
    /// Have a node close a store that holds no volume; what is on the disk stays there
    Remove {
        /// Path or id of the store
        #[arg(value_name = "PATH|ID")]
        store: String,
        /// The node; the one that answers if none is given
        #[arg(long, default_value = "self")]
        node: String,
    },
    #[command(flatten)]
    Offline(offline::OfflineCommand),
}

#[derive(Debug, Subcommand)]
enum VolumeCommand {
    /// Create a volume and wait until it can be used
    #[command(
        after_help = "Examples:\n  torusctl volume create data 100GiB\n  torusctl volume create scratch 1.5TiB --copies 1\n  torusctl volume create db 1TiB --copies 3 --min-copies 2"
    )]
    Create {
        /// 1 to 64 of A-Z a-z 0-9 . _ -
        name: String,
        /// Such as 512MiB or 1.5TiB; rounded up to whole extents
        #[arg(value_parser = size::parse)]
        size: u64,
        /// Copies to keep [default: 3, or the number of nodes if that is less]
        #[arg(long, value_name = "N")]
        copies: Option<u8>,
        /// Copies that are to stay in sync: with fewer, requests wait [default: 2 of 3 or more, else 1]
        #[arg(long, value_name = "M")]
        min_copies: Option<u8>,
        /// Do not wait
        #[arg(long)]
        no_wait: bool,
    },
    /// List the volumes
    List,
    /// Show a volume
    Show {
        /// Name or id
        name: String,
    },
    /// Change a volume's size
    #[command(
        after_help = "Examples:\n  torusctl volume resize data 200GiB\n  torusctl volume resize data 50GiB --allow-data-loss"
    )]
    Resize {
        /// Name or id
        name: String,
        /// The new size
        #[arg(value_parser = size::parse)]
        size: u64,
        /// Allow a smaller size, which cuts off the end of the volume
        #[arg(long)]
        allow_data_loss: bool,
        /// Do not wait
        #[arg(long)]
        no_wait: bool,
    },
    /// Have another node be the head of a volume, which answers its initiators; requests wait for a moment
    #[command(
        after_help = "Examples:\n  torusctl volume move-head data n2\n  torusctl volume move-head data n2 --json\n  torusctl volume move-head data self --no-wait\n\nThe node must have a copy in sync. To name the node that is head takes a wish back."
    )]
    MoveHead {
        /// Name or id
        name: String,
        /// Name or id of the node, or `self` for the one that answers
        node: String,
        /// Do not wait
        #[arg(long)]
        no_wait: bool,
    },
    /// Delete a volume and its data; there is no way back
    Delete {
        /// Name or id
        name: String,
        /// Do not wait
        #[arg(long)]
        no_wait: bool,
    },
}

/// The program: arguments in, exit code out.
#[must_use]
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let ctl = Ctl::parse_from(arguments);
    finish(ctl.common.json, run(ctl))
}

async fn run(ctl: Ctl) -> Done {
    let json = ctl.common.json;
    let client = Client::new(ctl.common.api.clone());
    match ctl.command {
        Command::Init { extent_size } => init(&client, json, extent_size).await,
        Command::Status => status(&client, json).await,
        Command::Node(NodeCommand::List) => node_list(&client, json).await,
        Command::Node(NodeCommand::Show { node }) => node_show(&client, json, &node).await,
        Command::Store(command) => store(&client, json, command).await,
        Command::Scrub(command) => scrub::run(&client, json, command).await,
        Command::Volume(command) => volume(&client, json, command).await,
        Command::Config(command) => config::run(&client, json, command).await,
        Command::Version => print_version(&client, "torusctl", json).await,
        Command::Completion { shell } => completion(&mut Ctl::command(), shell),
    }
}

async fn init(client: &Client, json: bool, extent_size: Option<u64>) -> Done {
    let request = t::InitRequest { extent_size_bytes: extent_size };
    let answer: t::InitAnswer = client.request(Method::POST, "/v1/cluster/init", Some(&request)).await?;
    if json {
        return print_json(&answer);
    }
    let cluster = answer.cluster;
    print(&if answer.created {
        format!("initialised cluster {} with extents of {}\n", cluster.id, human(cluster.extent_size_bytes))
    } else {
        let since = rfc3339(cluster.created_unix_s);
        format!("nothing to do: cluster {} was initialised at {since}\n", cluster.id)
    })
}

async fn status(client: &Client, json: bool) -> Done {
    let status: t::Status = client.get("/v1/status").await?;
    if json {
        return print_json(&status);
    }
    let cluster = status.cluster.as_ref();
    print(&fields(&[
        ("cluster", cluster.map_or_else(|| "not initialised".into(), |c| c.id.clone())),
        ("created", cluster.map(|c| rfc3339(c.created_unix_s)).unwrap_or_default()),
        ("extent size", cluster.map(|c| human(c.extent_size_bytes)).unwrap_or_default()),
        ("metadata", format!("{}, {}", status.metadata_store, status.metadata)),
        ("nodes", format!("{} live of {}", status.nodes_live, status.nodes)),
        ("stores", status.stores.to_string()),
        ("volumes", status.volumes.to_string()),
        ("exports", status.exports.to_string()),
        ("available", format!("{} of {}", human(status.available_bytes), human(status.capacity_bytes))),
        ("this node", format!("{} ({})", status.node, status.node_id)),
        ("data plane", status.data_plane),
        ("torusd", status.version),
        ("problem", status.problem),
    ]))
}

async fn node_list(client: &Client, json: bool) -> Done {
    let list: t::NodeList = client.get("/v1/nodes").await?;
    if json {
        return print_json(&list);
    }
    staleness(&list.metadata);
    let row = |n: t::NodeSummary| {
        vec![
            n.name,
            if n.live { "live" } else { "down" }.into(),
            dash(&n.zone),
            dash(&n.data_plane),
            n.stores.to_string(),
            n.volumes.to_string(),
            human(n.capacity_bytes),
            human(n.available_bytes),
            n.api_addr,
            n.id,
        ]
    };
    let header =
        ["name", "state", "zone", "data plane", "stores", "volumes", "capacity", "available", "api", "id"];
    print(&table(&header, &[4, 5, 6, 7], list.nodes.into_iter().map(row).collect()))
}

fn us(ns: u64) -> String {
    format!("{}.{} us", ns / 1000, ns % 1000 / 100)
}

async fn node_show(client: &Client, json: bool, name: &str) -> Done {
    let answer: t::Node = client.get(&format!("/v1/nodes/{}", segment(name))).await?;
    if json {
        return print_json(&answer);
    }
    staleness(&answer.metadata);
    let node = &answer.node;
    let mut text = fields(&[
        ("node", node.name.clone()),
        ("id", node.id.clone()),
        ("state", if node.live { "live" } else { "down" }.into()),
        ("zone", node.zone.clone()),
        ("data plane", node.data_plane.clone()),
        ("torusd", node.version.clone()),
        ("api", node.api_addr.clone()),
        ("peers", node.peer_addr.clone()),
        ("replicates", yes_no(node.replicates)),
        ("volumes", node.volumes.to_string()),
        ("serves on", answer.interfaces.join(", ")),
    ]);
    let links: Vec<_> = answer.links.iter().map(link_row).collect();
    if !links.is_empty() {
        let header = ["interface", "queue", "core", "link", "segments", "mtu", "sectors", "up", "note"];
        text += &format!("\n{}", table(&header, &[1, 2, 4, 5, 6], links));
    }
    let losses = loss_table(&answer.links);
    if !losses.is_empty() {
        text += &format!("\n{losses}");
    }
    text += &format!("\n{}", store_table(&answer.stores));
    if !answer.volumes.is_empty() {
        let row = |v: &t::VolumeReport| {
            let name = if v.name.is_empty() { &v.id } else { &v.name };
            let done = format!("{} of {}", human(v.done_bytes), human(v.size_bytes));
            vec![name.clone(), v.state.clone(), done, dash(&v.error)]
        };
        let rows = answer.volumes.iter().map(row).collect();
        text += &format!("\n{}", table(&["volume", "state", "done", "error"], &[2], rows));
    }
    text += &match &answer.cores {
        Some(cores) => format!("\n{}", core_table(cores)),
        None => format!("\ncounters: ask the node itself (torusctl --api {} node show)\n", node.api_addr),
    };
    print(&text)
}

fn link_row(link: &t::Link) -> Vec<String> {
    vec![
        link.interface.clone(),
        link.queue.to_string(),
        link.core.to_string(),
        link.mode.clone(),
        link.segments.to_string(),
        link.mtu.to_string(),
        link.max_sectors.to_string(),
        yes_no(link.up),
        dash(&link.note),
    ]
}

/// What each queue lost, one column per reason; empty where nobody told.
fn loss_table(links: &[t::Link]) -> String {
    let Some(reasons) = links.iter().find_map(|link| link.losses.as_ref()) else { return String::new() };
    let mut header = vec!["interface", "queue"];
    header.extend(reasons.keys().map(String::as_str));
    let row = |link: &t::Link| {
        let lost =
            |reason: &String| link.losses.as_ref().and_then(|losses| losses.get(reason)).map(u64::to_string);
        let mut row = vec![link.interface.clone(), link.queue.to_string()];
        row.extend(reasons.keys().map(|reason| lost(reason).unwrap_or_else(|| "-".into())));
        row
    };
    let header: Vec<String> = header.iter().map(|name| name.replace('_', " ")).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    table(&header, &(1..header.len()).collect::<Vec<_>>(), links.iter().map(row).collect())
}

fn store_table(stores: &[t::Store]) -> String {
    let row = |s: &t::Store| {
        vec![
            s.node.clone(),
            s.path.clone(),
            s.state.clone(),
            dash(&s.durability),
            human(s.capacity_bytes),
            human(s.used_bytes),
            human(s.available_bytes),
            s.volumes.to_string(),
            dash(&s.write_path),
            s.checksum_errors.to_string(),
            s.lost_blocks.to_string(),
            s.scrub.as_ref().map_or_else(|| "-".into(), scrub::brief),
            if s.orphaned_bytes > 0 { human(s.orphaned_bytes) } else { "-".into() },
            dash(&s.id),
            dash(&s.error),
        ]
    };
    let header = [
        "node",
        "store",
        "state",
        "durability",
        "capacity",
        "used",
        "available",
        "volumes",
        "writes",
        "checksum errors",
        "lost blocks",
        "scrub",
        "orphaned",
        "id",
        "error",
    ];
    table(&header, &[4, 5, 6, 7, 9, 10, 12], stores.iter().map(row).collect())
}

/// Every counter that counted anything, one row each, one column per core; then the latencies.
fn core_table(cores: &[t::Core]) -> String {
    let mut header = vec!["per core".to_owned()];
    header.extend(cores.iter().map(|core| format!("core {}", core.core)));
    let header: Vec<_> = header.iter().map(String::as_str).collect();
    let names =
        cores.first().map(|core| core.counters.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    let counter =
        |name: &str| cores.iter().map(|c| c.counters.get(name).copied().unwrap_or(0)).collect::<Vec<_>>();
    let counted = names.iter().filter(|name| counter(name).into_iter().any(|value| value > 0));
    let mut rows: Vec<Vec<String>> = counted
        .map(|name| {
            std::iter::once(name.clone()).chain(counter(name).iter().map(ToString::to_string)).collect()
        })
        .collect();
    let mut latency = |label: &str, of: &dyn Fn(&t::Core) -> u64| {
        rows.push(std::iter::once(label.to_owned()).chain(cores.iter().map(|c| us(of(c)))).collect());
    };
    latency("read p50", &|c| c.read.p50_ns);
    latency("read p99", &|c| c.read.p99_ns);
    latency("write p50", &|c| c.write.p50_ns);
    latency("write p99", &|c| c.write.p99_ns);
    table(&header, &(1..header.len()).collect::<Vec<_>>(), rows)
}

/// Splits `PATH[:SIZE]` without looking at this machine: the store is on the node's.
fn split_store(text: &str) -> Result<t::StoreRequest, CliError> {
    if let Some((path, size)) = text.rsplit_once(':') {
        match size::parse(size) {
            Ok(0) => return Err(CliError::Usage(format!("store {path}: a size of 0 is not possible"))),
            Ok(size_bytes) => return Ok(t::StoreRequest { path: path.into(), size_bytes }),
            Err(_) => {}
        }
    }
    Ok(t::StoreRequest { path: text.into(), size_bytes: 0 })
}

async fn store(client: &Client, json: bool, command: StoreCommand) -> Done {
    let answer: t::Accepted = match command {
        StoreCommand::List => {
            let list: t::StoreList = client.get("/v1/stores").await?;
            if json {
                return print_json(&list);
            }
            staleness(&list.metadata);
            return print(&store_table(&list.stores));
        }
        StoreCommand::Add { store, node } => {
            let path = format!("/v1/nodes/{}/stores", segment(&node));
            client.request(Method::POST, &path, Some(&split_store(&store)?)).await?
        }
        StoreCommand::Remove { store, node } => {
            let path = format!("/v1/nodes/{}/stores?store={}", segment(&node), segment(&store));
            client.request(Method::DELETE, &path, None::<&()>).await?
        }
        StoreCommand::Offline(command) => return Err(offline::run(&command, json)),
    };
    if json { print_json(&answer) } else { print(&format!("{}\n", answer.message)) }
}

async fn volume(client: &Client, json: bool, command: VolumeCommand) -> Done {
    match command {
        VolumeCommand::Create { name, size, copies, min_copies, no_wait } => {
            let request = t::VolumeRequest { name: name.clone(), size_bytes: size, copies, min_copies };
            let answer = client.request(Method::POST, "/v1/volumes", Some(&request)).await?;
            changed(
                client,
                json,
                no_wait,
                answer,
                &Asked { size, copies_default: copies.is_none(), verb: "creating" },
            )
            .await
        }
        VolumeCommand::Resize { name, size, allow_data_loss, no_wait } => {
            let request = t::ResizeRequest { size_bytes: size, allow_data_loss };
            let path = format!("/v1/volumes/{}", segment(&name));
            let answer = client.request(Method::PATCH, &path, Some(&request)).await?;
            changed(client, json, no_wait, answer, &Asked { size, copies_default: false, verb: "resizing" })
                .await
        }
        VolumeCommand::MoveHead { name, node, no_wait } => {
            let wait = if no_wait { "" } else { "?wait" };
            let path = format!("/v1/volumes/{}/head{wait}", segment(&name));
            let request = t::MoveHeadRequest { node };
            let answer: t::VolumeAnswer = client.request(Method::PUT, &path, Some(&request)).await?;
            if json {
                return print_json(&answer);
            }
            let v = answer.volume;
            match v.head.filter(|head| !head.moving_to.is_empty()) {
                Some(head) => {
                    print(&format!("volume {} moves from node {} to {}\n", v.name, head.node, head.moving_to))
                }
                None => print(&format!("node {} is head of volume {}\n", v.node, v.name)),
            }
        }
        VolumeCommand::List => volume_list(client, json).await,
        VolumeCommand::Show { name } => volume_show(client, json, &name).await,
        VolumeCommand::Delete { name, no_wait } => volume_delete(client, json, &name, no_wait).await,
    }
}

/// What was asked for, to say what it became.
struct Asked {
    size: u64,
    copies_default: bool,
    verb: &'static str,
}

/// Waits for a created or resized volume and says what it is.
async fn changed(client: &Client, json: bool, no_wait: bool, answer: t::VolumeAnswer, asked: &Asked) -> Done {
    let name = answer.volume.name.clone();
    let answer = if no_wait || answer.volume.state == "ready" {
        answer
    } else {
        let gone = || CliError::Failed(format!("volume {name} was deleted meanwhile"));
        follow_volume(client, &answer.volume.id, asked.verb).await?.ok_or_else(gone)?
    };
    if json {
        return print_json(&answer);
    }
    let v = answer.volume;
    let rounded = if v.size_bytes == asked.size { "" } else { " (rounded up to whole extents)" };
    let copies = if v.copies == 1 { "1 copy".into() } else { format!("{} copies", v.copies) };
    let default = if asked.copies_default { " (the default here)" } else { "" };
    print(&format!(
        "volume {} is {}: {}{rounded}, {copies}{default}, on node {} in {}\n",
        v.name,
        v.state,
        human(v.size_bytes),
        v.node,
        v.store
    ))
}

async fn volume_list(client: &Client, json: bool) -> Done {
    let list: t::VolumeList = client.get("/v1/volumes").await?;
    if json {
        return print_json(&list);
    }
    staleness(&list.metadata);
    let row = |v: t::Volume| {
        let copies = copies(v.copies, v.copies_in_sync);
        let export = v.export.unwrap_or_default();
        vec![v.name, human(v.size_bytes), copies, v.state, v.node, dash(&export), v.id]
    };
    let header = ["name", "size", "copies", "state", "node", "export", "id"];
    print(&table(&header, &[1, 2], list.volumes.into_iter().map(row).collect()))
}

async fn volume_show(client: &Client, json: bool, name: &str) -> Done {
    let answer: t::VolumeAnswer = client.get(&format!("/v1/volumes/{}", segment(name))).await?;
    if json {
        return print_json(&answer);
    }
    staleness(&answer.metadata);
    let v = answer.volume;
    let copies = copies(v.copies, v.copies_in_sync);
    let mut replicas: Vec<(&str, String)> = Vec::new();
    if let Some(head) = &v.head {
        replicas.push(("head", format!("node {}, {} (take-over {})", head.node, head.state, head.takeover)));
        if !head.moving_to.is_empty() {
            replicas.push(("moves to", format!("node {}", head.moving_to)));
        }
        replicas.push(("must be in sync", head.copies_needed.to_string()));
        if head.resync_extents > 0 {
            let left = time_left(head.resync_eta_s);
            replicas.push(("to be made equal", format!("{} extents{left}", head.resync_extents)));
        }
        if !head.blocked.is_empty() {
            replicas.push(("requests wait", head.blocked.clone()));
        }
    }
    for copy in &v.owners {
        let down = if copy.node_live { "" } else { ", down" };
        replicas.push(("copy", format!("{} on node {}{down} in {}", copy.state, copy.node, copy.store)));
    }
    let progress = v.progress.map(|p| format!("{} of {}", human(p.done_bytes), human(p.total_bytes)));
    let mut lines = vec![
        ("volume", v.name),
        ("id", v.id),
        ("size", format!("{} ({} bytes)", human(v.size_bytes), v.size_bytes)),
        ("copies", copies),
        ("state", v.state),
        ("progress", progress.unwrap_or_default()),
        ("node", if v.node_live { v.node } else { format!("{} (down)", v.node) }),
        ("store", format!("{} ({})", v.store, v.store_id)),
    ];
    lines.extend(replicas);
    lines.extend([
        ("export", v.export.unwrap_or_else(|| "none".into())),
        ("created", rfc3339(v.created_unix_s)),
        ("error", v.error),
    ]);
    print(&fields(&lines))
}

/// How long something takes, for people; empty while nobody can say.
fn time_left(eta_s: u64) -> String {
    match eta_s {
        0 => String::new(),
        1..120 => format!(", about {eta_s} s left"),
        120..7200 => format!(", about {} min left", eta_s.div_ceil(60)),
        _ => format!(", about {} h left", eta_s.div_ceil(3600)),
    }
}

async fn volume_delete(client: &Client, json: bool, name: &str, no_wait: bool) -> Done {
    let shown: t::VolumeAnswer = client.get(&format!("/v1/volumes/{}", segment(name))).await?;
    let id = shown.volume.id;
    let mut answer: t::Accepted =
        client.request(Method::DELETE, &format!("/v1/volumes/{}", segment(&id)), None::<&()>).await?;
    if no_wait {
        answer.message = format!("volume {name} is being deleted");
    } else if shown.volume.node_live {
        follow_volume(client, &id, "deleting").await?;
        answer.message = format!("volume {name} is deleted");
    } else {
        answer.message =
            format!("volume {name} is being deleted: its data goes when node {} is back", shown.volume.node);
    }
    if json { print_json(&answer) } else { print(&format!("{}\n", answer.message)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_well_formed() {
        Ctl::command().debug_assert();
    }

    #[test]
    fn stores_split_at_their_size_only() {
        let split = |text| split_store(text).map(|s| (s.path, s.size_bytes)).unwrap();
        assert_eq!(split("/a:1GiB"), ("/a".into(), 1 << 30));
        assert_eq!(split("/dev/disk/by-path/pci-0:ata"), ("/dev/disk/by-path/pci-0:ata".into(), 0));
        assert!(matches!(split_store("/a:0"), Err(CliError::Usage(_))));
    }
}
