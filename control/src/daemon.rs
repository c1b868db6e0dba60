//! `torusd`: looks at everything that could be wrong, then runs a node until it is told to stop.
//!
//! Ends with 0 when it was stopped (SIGTERM, SIGINT: it hands its heads over and the data plane drains first; SIGUSR1: the data plane stays), with 2 when
//! the data plane refused its configuration, and with 1 on any other failure. It dies without harm at any point: the data
//! plane goes on, and the next `torusd` finds it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Parser, ValueEnum};
use cluster_map::{ClusterId, ControlMap, LinkChoice, MapError, NodeId, SteeringChoice};
use rustix::fs::FlockOperation;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::api;
use crate::checks;
use crate::meta::MetaStore;
use crate::meta::embedded::EmbeddedStore;
use crate::meta::etcd::{EtcdOptions, EtcdStore};
use crate::model::{DEFAULT_EXTENT_BYTES, LiveRecord, NodeRecord, StatusRecord, StoreSpec, check_name};
use crate::moves;
use crate::node::{Follower, Links, Node, SessionEnd, keep_key, session, unix_s};
use crate::ops;
use crate::reconcile::Settings;
use crate::starts::{self, Starts};
use crate::supervise::{self, DataPlane, Ended, Program, Wish};

/// How often a node that waits for something says so.
const SAY_AGAIN: Duration = Duration::from_secs(5);

const EXAMPLES: &str = "\
Examples:
  One node, on its own (metadata in the state directory):
    torusd --interface eth1 --store /dev/nvme0n1
  A file as the store, made with 10 GiB:
    torusd --interface eth1 --store /srv/torus/store:10GiB
  On two VLANs of one interface, and on the untagged frames of another:
    torusd --interface eth1@100,eth1@200,eth2 --store /dev/nvme0n1
  A member of a cluster (once, anywhere: torusctl init):
    torusd --interface eth1,eth2 --store /dev/nvme0n1 --etcd http://10.0.0.1:2379,http://10.0.0.2:2379

Signals: SIGTERM or SIGINT stops the node; SIGUSR1 ends torusd and leaves the data plane serving (for an upgrade).
Exit codes: 0 stopped, 1 failed, 2 the configuration is refused.";

/// Runs a Torus node: joins the cluster, serves its API, and supervises its data plane.
#[derive(Debug, Clone, Parser)]
#[command(name = "torusd", version, after_help = EXAMPLES)]
pub struct Options {
    /// Interfaces to serve volumes on: eth0, or eth0@100 for VLAN 100 on it
    #[arg(long, env = "TORUS_INTERFACE", value_delimiter = ',', value_name = "IF", required = true)]
    pub interface: Vec<String>,
    /// Files or block devices to keep volumes in; formatted only where blank, created if missing and a SIZE is given
    #[arg(long, env = "TORUS_STORE", value_delimiter = ',', value_name = "PATH[:SIZE]", required = true)]
    pub store: Vec<String>,
    /// etcd servers; without them the node keeps its metadata itself, alone
    #[arg(long, env = "TORUS_ETCD", value_delimiter = ',', value_name = "URL")]
    pub etcd: Vec<String>,
    /// Name of this node [default: the host's name]
    #[arg(long, env = "TORUS_NAME", value_name = "NAME")]
    pub name: Option<String>,
    /// Failure domain of this node
    #[arg(long, env = "TORUS_ZONE", value_name = "ZONE", default_value = "")]
    pub zone: String,
    /// CPUs for the data plane, such as 2,4-7 [default: the upper half of those it may use]
    #[arg(long, env = "TORUS_CORES", value_name = "LIST")]
    pub cores: Option<String>,
    /// How frames are received and sent
    #[arg(long, env = "TORUS_LINK", value_name = "MODE", default_value = "auto")]
    pub link: LinkOption,
    /// By what frames reach the core that serves their export
    #[arg(long, env = "TORUS_STEERING", value_name = "WAY", default_value = "auto")]
    pub steering: SteeringOption,
    /// Address of the HTTP API
    #[arg(long, env = "TORUS_API", value_name = "ADDR", default_value = "127.0.0.1:4321")]
    pub api: SocketAddr,
    /// Address for the data planes of other nodes; core i of the data plane listens at PORT + i [default: the address from
    /// which this node reaches etcd, port 4330]
    #[arg(long, env = "TORUS_PEER_ADDR", value_name = "IP[:PORT]", default_value = "")]
    pub peer_addr: String,
    /// File with the key that nodes of the cluster know each other by, 64 hexadecimal digits; the same on every node. Without
    /// it the key is kept in the metadata
    #[arg(long, env = "TORUS_CLUSTER_KEY_FILE", value_name = "PATH")]
    pub cluster_key_file: Option<PathBuf>,
    /// What must survive a reboot: the node's identity, and the metadata if there is no etcd
    #[arg(long, env = "TORUS_STATE_DIR", value_name = "DIR", default_value = "/var/lib/torus")]
    pub state_dir: PathBuf,
    /// What need not: the shared map, locks, the API's socket; a memory file system
    #[arg(long, env = "TORUS_RUN_DIR", value_name = "DIR", default_value = "/run/torus")]
    pub run_dir: PathBuf,
    /// The data-plane program [default: torus-dataplane beside torusd, or in PATH]
    #[arg(long, env = "TORUS_DATAPLANE", value_name = "PATH")]
    pub dataplane: Option<PathBuf>,
}

/// `--link`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LinkOption {
    /// AF_XDP where it can be had, else AF_PACKET
    Auto,
    /// AF_XDP or an error
    AfXdp,
    /// AF_PACKET
    AfPacket,
}

impl From<LinkOption> for LinkChoice {
    fn from(option: LinkOption) -> Self {
        match option {
            LinkOption::Auto => Self::Auto,
            LinkOption::AfXdp => Self::AfXdp,
            LinkOption::AfPacket => Self::AfPacket,
        }
    }
}

/// `--steering`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SteeringOption {
    /// The NIC's receive rules where it takes them, else the XDP program, else hand-over
    Auto,
    /// The NIC's receive rules, as far as it takes them
    Nic,
    /// The XDP program
    Program,
    /// Nothing: cores hand frames over
    HandOver,
}

impl From<SteeringOption> for SteeringChoice {
    fn from(option: SteeringOption) -> Self {
        match option {
            SteeringOption::Auto => Self::Auto,
            SteeringOption::Nic => Self::Nic,
            SteeringOption::Program => Self::Program,
            SteeringOption::HandOver => Self::HandOver,
        }
    }
}

/// Parses a list of CPUs such as `2,4-7`.
///
/// # Errors
/// Empty, malformed or repeated entries.
pub fn parse_cores(text: &str) -> Result<Vec<u16>> {
    let wrong = || anyhow!("\"{text}\" is not a list of CPUs; write for example 2,4-7");
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (
            first.trim().parse::<u16>().map_err(|_| wrong())?,
            last.trim().parse::<u16>().map_err(|_| wrong())?,
        );
        if first > last || last > 1023 {
            return Err(wrong());
        }
        cores.extend(first..=last);
    }
    let mut sorted = cores.clone();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.len() == cores.len() { Ok(cores) } else { Err(wrong()) }
}

/// The CPUs that this process may use.
fn usable_cores() -> Vec<u16> {
    let set = rustix::thread::sched_getaffinity(None);
    (0..1024u16).filter(|core| set.as_ref().is_ok_and(|set| set.is_set(usize::from(*core)))).collect()
}

/// The CPUs for the data plane: those named, else the upper half of the usable ones.
fn choose_cores(named: Option<&str>, usable: &[u16]) -> Result<Vec<u16>> {
    let Some(named) = named else {
        let half = usable.len().div_ceil(2).min(8);
        return Ok(usable[usable.len() - half..].to_vec());
    };
    let cores = parse_cores(named)?;
    match cores.iter().find(|core| !usable.contains(core)) {
        Some(core) => {
            bail!("CPU {core} does not exist or may not be used by this process; usable: {usable:?}")
        }
        None => Ok(cores),
    }
}

/// What has been looked at and found good.
struct Checked {
    name: String,
    peer_addr: String,
    settings: Settings,
    stores: Vec<StoreSpec>,
    program: PathBuf,
}

fn check(options: &Options) -> Result<Checked> {
    let hostname = || fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let name = options.name.clone().unwrap_or_else(hostname);
    check_name(&name).context("bad node name; give a good one with --name")?;
    let cores = choose_cores(options.cores.as_deref(), &usable_cores())?;
    let link = options.link.into();
    let present = checks::interfaces().context("cannot list the network interfaces")?;
    let interfaces = checks::check_interfaces(&options.interface, &present)?;
    checks::check_capabilities(link)?;
    let program = checks::find_data_plane(options.dataplane.as_deref())?;
    let mut stores: Vec<StoreSpec> = Vec::new();
    for text in &options.store {
        let spec = checks::parse_store(text)?;
        if stores.iter().any(|s| s.path == spec.path) {
            bail!("store {} is named twice; name each once", spec.path);
        }
        stores.push(spec);
    }
    stores.iter().try_for_each(checks::check_store_path)?;
    let named_stores = stores.iter().map(|s| s.path.clone()).collect();
    let interfaces = interfaces.iter().map(ToString::to_string).collect();
    let steering = options.steering.into();
    let cluster_key = options.cluster_key_file.as_deref().map(checks::read_key).transpose()?;
    let peer_addr = checks::peer_address(&options.peer_addr, &options.etcd, cores.len())?;
    let settings = Settings { cores, link, steering, interfaces, named_stores, cluster_key };
    Ok(Checked { name, peer_addr, settings, stores, program })
}

/// Makes a directory if needed and takes its lock, which lasts as long as the file is open.
fn lock_dir(dir: &Path, flag: &str) -> Result<File> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .with_context(|| format!("cannot create {}; name another with {flag}", dir.display()))?;
    let path = dir.join("torusd.lock");
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(&path);
    let mut file =
        open.with_context(|| format!("cannot write to {}; name another with {flag}", dir.display()))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let holder = fs::read_to_string(&path).unwrap_or_default();
            bail!(
                "another torusd (pid {}) uses {}; stop it, or name another directory with {flag}",
                holder.trim(),
                dir.display()
            );
        }
        Err(error) => return Err(anyhow::Error::from(io::Error::from(error)).context("cannot lock")),
    }
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

/// Reads the node's identity, or makes one; it lasts as long as the state directory.
fn node_id(state_dir: &Path) -> Result<NodeId> {
    let path = state_dir.join("node-id");
    match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| {
            anyhow!(
                "{} does not hold a node id; restore it, or remove it to become a new node",
                path.display()
            )
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = NodeId(uuid::Uuid::new_v4().into_bytes());
            starts::write_durably(state_dir, "node-id", &id.to_string())
                .with_context(|| format!("cannot write {}", path.display()))?;
            Ok(id)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

async fn bind(options: &Options) -> Result<(TcpListener, UnixListener)> {
    let address = options.api;
    let tcp = TcpListener::bind(address)
        .await
        .with_context(|| format!("the API cannot listen on {address}; name another address with --api"))?;
    let path = options.run_dir.join("api.sock");
    // The directory's lock is held: a socket that is there is a left-over.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", path.display()));
        }
        _ => {}
    }
    let unix =
        UnixListener::bind(&path).with_context(|| format!("the API cannot listen on {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o660))?;
    Ok((tcp, unix))
}

async fn open_meta(options: &Options) -> Result<Arc<dyn MetaStore>> {
    if !options.etcd.is_empty() {
        let store = EtcdStore::connect(&options.etcd, EtcdOptions::default()).await?;
        return Ok(Arc::new(store));
    }
    let store = EmbeddedStore::open(options.state_dir.join("meta")).await?;
    let cluster = ClusterId(uuid::Uuid::new_v4().into_bytes());
    let now = unix_s(SystemTime::now());
    ops::apply(&store, None, |view| ops::init(view, cluster, DEFAULT_EXTENT_BYTES, now)).await?;
    Ok(Arc::new(store))
}

/// The map that a former torusd left, if it can be gone on with.
fn find_map(path: &Path, node: NodeId, running: Option<u32>) -> Result<Option<ControlMap>> {
    match ControlMap::attach(path) {
        Ok(map) if map.reader().node() == node => Ok(Some(map)),
        Ok(map) => {
            let other = map.reader().node();
            match running {
                Some(pid) => bail!(
                    "{} belongs to node {other}, whose data plane (pid {pid}) runs; use that node's --state-dir, or another --run-dir",
                    path.display()
                ),
                None => Ok(None),
            }
        }
        Err(MapError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => match running {
            Some(pid) => bail!(
                "a data plane (pid {pid}) runs, but its map {} is gone; end it with `kill {pid}` and start again",
                path.display()
            ),
            None => Ok(None),
        },
        Err(MapError::EarlierBoot { .. }) => Ok(None),
        Err(error) => match running {
            Some(pid) => {
                Err(anyhow!("the data plane (pid {pid}) runs, but torusd cannot use its map: {error}"))
            }
            None if matches!(error, MapError::Level { .. } | MapError::Corrupt { .. }) => {
                tracing::warn!(%error, "the old map cannot be used: a new one is made when the metadata is there");
                Ok(None)
            }
            None => Err(error.into()),
        },
    }
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Stop,
    Leave,
}

async fn order() -> Result<Order> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut leave = signal(SignalKind::user_defined1())?;
    Ok(tokio::select! {
        _ = terminate.recv() => Order::Stop,
        _ = interrupt.recv() => Order::Stop,
        _ = leave.recv() => Order::Leave,
    })
}

/// Says every few seconds what a node waits for.
async fn say_waiting(node: Arc<Node>) {
    let mut tick = tokio::time::interval(SAY_AGAIN);
    tick.tick().await;
    loop {
        tick.tick().await;
        let problem = node.problem();
        if !problem.is_empty() {
            tracing::warn!("waiting: {problem}");
        } else if !node.known().connected {
            tracing::warn!("metadata {}: serving goes on, changes wait", node.known().words());
        }
    }
}

/// Runs a node to its end.
///
/// # Errors
/// Why it cannot start, or cannot go on.
pub async fn run(options: Options) -> Result<ExitCode> {
    let checked = check(&options)?;
    let _state_lock = lock_dir(&options.state_dir, "--state-dir")?;
    let _run_lock = lock_dir(&options.run_dir, "--run-dir")?;
    // Before anything runs: from here on no signal is missed.
    let ordered = tokio::spawn(order());
    let id = node_id(&options.state_dir)?;
    let (tcp, unix) = bind(&options).await?;
    let meta = open_meta(&options).await?;
    let program = Program {
        path: checked.program.clone(),
        map: options.run_dir.join("map"),
        lock: options.run_dir.join("dataplane.lock"),
    };
    let running = supervise::holder(&program.lock).await?;
    let map = find_map(&program.map, id, running)?;

    let (mut starts, starts_in_map) = Starts::open(&options.state_dir)?;
    let (announce_map, map_reader) = watch::channel(None);
    let (wish, wished) = watch::channel(Wish::Watch);
    let (state, states) = watch::channel(DataPlane::Idle);
    let (status, statuses) = watch::channel(StatusRecord::default());
    let (stop, stopped) = watch::channel(false);
    let node = Node::start(id, checked.name.clone(), meta, map_reader, states);
    let api = tcp.local_addr()?;
    tracing::info!(
        node = %id, name = checked.name, %api, metadata = node.meta.describe(), cores = ?checked.settings.cores,
        "torusd {} runs", env!("CARGO_PKG_VERSION")
    );

    let router = api::router(Arc::clone(&node));
    tokio::spawn(api::serve_tcp(tcp, router.clone()));
    tokio::spawn(api::serve_unix(unix, router));
    tokio::spawn(say_waiting(Arc::clone(&node)));
    let record = NodeRecord {
        name: checked.name,
        zone: options.zone.clone(),
        peer_addr: checked.peer_addr,
        cores: u16::try_from(checked.settings.cores.len()).unwrap_or(u16::MAX),
        api_addr: api.to_string(),
        stores: checked.stores,
    };
    let live =
        LiveRecord { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").into(), boot: boot_id() };
    tokio::spawn(keep_key(Arc::clone(&node), checked.settings.cluster_key));
    let session = tokio::spawn(session(Arc::clone(&node), record, live, statuses, stopped.clone()));
    let follower = Follower::new(
        Arc::clone(&node),
        checked.settings,
        program.map.clone(),
        map,
        Links { announce_map, starts: starts_in_map, wish, status },
    );
    let follower = tokio::spawn(follower.run(stopped));
    let supervisor = tokio::spawn(async move { supervise::run(&program, &mut starts, wished, &state).await });
    Tasks { node, ordered, session, follower, supervisor, stop }.until_the_end().await
}

/// What runs until the node ends.
struct Tasks {
    node: Arc<Node>,
    ordered: JoinHandle<Result<Order>>,
    session: JoinHandle<SessionEnd>,
    follower: JoinHandle<()>,
    supervisor: JoinHandle<io::Result<Ended>>,
    stop: watch::Sender<bool>,
}

impl Tasks {
    /// Waits for an order or a failure; on the order to stop, until the data plane has drained.
    async fn until_the_end(mut self) -> Result<ExitCode> {
        tokio::select! {
            order = &mut self.ordered => match order?? {
                Order::Leave => {
                    tracing::info!("leaving the data plane running");
                    return Ok(ExitCode::SUCCESS);
                }
                Order::Stop => {
                    tracing::info!("stopping: heads are handed over, then the data plane drains");
                    moves::leave(&self.node).await;
                }
            },
            end = &mut self.supervisor => return supervision_ended(end??),
            end = &mut self.session => match end? {
                SessionEnd::Refused(refusal) => return Err(refusal.into()),
                SessionEnd::Stopped => bail!("the session ended by itself"),
            },
        }
        self.stop.send_replace(true);
        self.follower.await?;
        let ended = self.supervisor.await??;
        self.session.await?;
        match ended {
            Ended::Stopped => Ok(ExitCode::SUCCESS),
            other => supervision_ended(other),
        }
    }
}

fn supervision_ended(ended: Ended) -> Result<ExitCode> {
    match ended {
        Ended::Refused => {
            tracing::error!("the data plane refused its configuration (its line is above): stopping");
            Ok(ExitCode::from(2))
        }
        Ended::Killed => {
            bail!("the data plane did not drain in time and was killed; acknowledged writes are durable")
        }
        Ended::Stopped => bail!("the data plane was stopped by somebody else"),
    }
}

/// The program: arguments in, exit code out.
#[must_use]
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    if let [_, first, program, rest @ ..] = arguments.as_slice()
        && first == supervise::LAUNCH_ARGUMENT
    {
        let error = supervise::launch(Path::new(program), rest);
        eprintln!("error: cannot start {}: {error}", Path::new(program).display());
        return ExitCode::FAILURE;
    }
    let options = Options::parse_from(arguments);
    let filter = tracing_subscriber::EnvFilter::try_from_env("TORUS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(run(options));
            // What still runs (readers of watches, API connections) must not hold the end up.
            runtime.shutdown_background();
            ended
        }
        Err(error) => Err(error.into()),
    };
    match ended {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_lists_parse() {
        assert_eq!(parse_cores("2,4-6").unwrap(), [2, 4, 5, 6]);
        for bad in ["", "a", "3-1", "1,1", "1-2,2", "-1", "70000", "1024"] {
            assert!(parse_cores(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_upper_half_serves_unless_named() {
        assert_eq!(choose_cores(None, &[0]).unwrap(), [0]);
        assert_eq!(choose_cores(None, &[0, 1]).unwrap(), [1]);
        assert_eq!(choose_cores(None, &[0, 1, 2]).unwrap(), [1, 2]);
        assert_eq!(choose_cores(Some("0"), &[0, 1]).unwrap(), [0]);
        assert!(choose_cores(Some("2"), &[0, 1]).unwrap_err().to_string().contains("CPU 2"));
    }

    #[test]
    fn options_are_well_formed() {
        use clap::CommandFactory;
        Options::command().debug_assert();
    }

    #[test]
    fn the_identity_stays_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let id = node_id(dir.path()).unwrap();
        assert_eq!(node_id(dir.path()).unwrap(), id);
        fs::write(dir.path().join("node-id"), "x").unwrap();
        assert!(node_id(dir.path()).unwrap_err().to_string().contains("node-id"));
    }

    #[test]
    fn a_directory_is_locked_once() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock_dir(dir.path(), "--run-dir").unwrap();
        let error = lock_dir(dir.path(), "--run-dir").unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(held);
        assert!(lock_dir(dir.path(), "--run-dir").is_ok());
    }
}
