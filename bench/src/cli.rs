//! The command line: what may be asked, and what of it makes sense together.

use std::path::PathBuf;

use anyhow::ensure;
use aoe_xdp::link::LinkChoice;
use aoe_xdp::wire::Address;
use clap::{ArgGroup, Args, Parser, Subcommand};

use crate::ceiling::disk::Engine;
use crate::initiator::Behaviour;
use crate::load::{Check, Load};
use crate::measure::now_ns;
use crate::ring::{Change, KindName, Zones, partition_bits};
use crate::store::Mode;
use crate::units::{bytes, duration_ns};
use crate::verify::Oracle;
use crate::workload::{Pattern, Random};

/// Waited for each frame at least this long by an initiator that never sends again.
const UNREPEATED_TIMEOUT_NS: u64 = 1_000_000_000;
const TIMEOUT_NS: u64 = 180_000_000_000;
const DURATION_NS: u64 = 10_000_000_000;

/// Measures AoE targets and the limits of the machine.
///
/// Exit codes: 0 all was well; 1 operations failed or data was wrong; 2 nothing could be measured.
#[derive(Debug, Parser)]
#[command(name = "torus-bench", version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  torus-bench aoe --interface eth0 --target 1.1 --read --window 32
  torus-bench aoe --interface eth0 --target 1.1 --mixed 70 --verify --verify-log /tmp/v.log --seconds 60
  torus-bench aoe --interface eth0 --target 1.1 --check-log /tmp/v.log
  torus-bench ceiling link --pair --mtu 9000 --window 32 --repeat 3
  torus-bench ceiling disk --file /var/tmp/f --size 1GiB --depth 32 --write --dsync
  torus-bench store --path /var/tmp/store --size 4GiB --mode both
  torus-bench store-open --path /dev/shm/store
  torus-bench stages --bounds bench/instructions.json
  torus-bench ring --nodes 1000 --zones 10 --change add=1 --change remove=1";

const RING_EXAMPLES: &str = "\
Examples:
  torus-bench ring --nodes 1000 --zones 10 --change add=1 --change remove=1 --change return
  torus-bench ring --nodes 20 --zones 1,3,16 --copies 2                 # a zone of one node, one of three, one of sixteen
  torus-bench ring --nodes 12 --stores-per-node 4 --capacity 4TiB,4TiB,8TiB,16TiB --change remove=1
  torus-bench ring --nodes 40 --zones 4 --change remove-zone=2 --change return --partition-bytes 4GiB
  torus-bench ring --kind ketama --nodes 100 --change add=1             # as the original Torus did it
  torus-bench ring --nodes 10000 --partitions 1048576 --json";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Loads an AoE target as a Linux initiator would, and reports rates, latencies and faults.
    Aoe(Box<AoeArgs>),
    /// Measures a limit of this machine.
    #[command(subcommand)]
    Ceiling(Ceiling),
    /// Measures an extent store on a new file beside fio on another one, in interleaved rounds.
    Store(StoreArgs),
    /// Measures how long opening a store of one TiB takes, and its memory: metadata only, on a sparse file in memory.
    StoreOpen(StoreOpenArgs),
    /// Computes rings, and prints how even they are, what moves from one to the next, and how long computing took.
    ///
    /// Exit code 1: a change of members moved more than 1.05 times the minimum of the balanced ring.
    #[command(after_help = RING_EXAMPLES)]
    Ring(Box<RingArgs>),
    /// Counts the instructions of a request's stages with valgrind, and holds them against bounds.
    Stages(StagesArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Ceiling {
    /// Answers AoE requests from the product's own link with no store behind it.
    Link(LinkArgs),
    /// Reads or writes a file or device in a bare io_uring loop with fixed buffers.
    Disk(DiskArgs),
}

/// Direction, pattern and amount of the load.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("direction").args(["read", "write", "mixed"]))]
pub(crate) struct ShapeArgs {
    /// Read only (the default).
    #[arg(long)]
    pub(crate) read: bool,
    /// Write only. Destroys what the volume holds.
    #[arg(long)]
    pub(crate) write: bool,
    /// This percentage of the operations are reads, the others writes. Destroys what the volume holds.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) mixed: Option<u8>,
    /// Order of the blocks.
    #[arg(long, value_enum, default_value = "random")]
    pub(crate) pattern: Pattern,
    /// Bytes of an operation, a multiple of 512. Longer ones than a frame carries are split, as Linux does.
    #[arg(long, value_parser = bytes, default_value = "4KiB")]
    pub(crate) block: u64,
    /// Operations unfinished at a time. Frames are also limited by the target's buffer count.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=16384))]
    pub(crate) window: u16,
    /// Stop after this time [default: 10s].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    pub(crate) seconds: Option<u64>,
    /// Stop after this many operations.
    #[arg(long)]
    pub(crate) ops: Option<u64>,
    /// Operations per second; latency then counts from the schedule, not from the sending.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub(crate) rate: Option<u64>,
    /// Makes a run repeatable [default: from the clock].
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// When unanswered frames are sent again: `linux` as the driver does, with its shrinking window; `steady` with
    /// the driver's tags and timer but at least 50 ms and a window that stays.
    #[arg(long, value_enum, default_value = "steady")]
    pub(crate) initiator: Behaviour,
    /// Send nothing again: a lost frame fails its operation after the timeout (default then 1 s).
    #[arg(long)]
    pub(crate) no_retransmit: bool,
    /// Give up when a frame was not answered for this long [default: 180s].
    #[arg(long, value_parser = duration_ns)]
    pub(crate) timeout: Option<u64>,
}

impl ShapeArgs {
    pub(crate) fn read_percent(&self) -> u8 {
        if self.write { 0 } else { self.mixed.unwrap_or(100) }
    }

    /// The load of this shape on the whole of a target.
    pub(crate) fn load(&self, address: Address, core: Option<u16>) -> anyhow::Result<Load> {
        ensure!(
            self.block > 0 && self.block.is_multiple_of(512) && self.block <= 64 << 20,
            "--block {} cannot be used: it must be a multiple of 512 up to 64MiB",
            self.block
        );
        let behaviour = if self.no_retransmit { Behaviour::Never } else { self.initiator };
        let timeout_default = if behaviour == Behaviour::Never { UNREPEATED_TIMEOUT_NS } else { TIMEOUT_NS };
        Ok(Load {
            address,
            pattern: self.pattern,
            read_percent: self.read_percent(),
            block_bytes: self.block,
            window: self.window,
            size_bytes: None,
            offset_bytes: 0,
            duration_ns: self.seconds.or(if self.ops.is_none() { Some(DURATION_NS) } else { None }),
            operations: self.ops,
            rate: self.rate,
            seed: self.seed.unwrap_or_else(fresh_seed),
            behaviour,
            timeout_ns: self.timeout.unwrap_or(timeout_default),
            discover_timeout_ns: DURATION_NS,
            core,
            check: Check::None,
        })
    }
}

/// A seed that no earlier run had: stamps of another run must not pass for this one's.
fn fresh_seed() -> u64 {
    Random::new(now_ns() ^ u64::from(std::process::id()) << 40).next()
}

#[derive(Debug, Args)]
pub(crate) struct AoeArgs {
    /// Interface on the target's Ethernet segment.
    #[arg(long, value_name = "IF")]
    pub(crate) interface: String,
    /// The target, for example 1.1.
    #[arg(long, value_name = "SHELF.SLOT")]
    pub(crate) target: Address,
    #[command(flatten)]
    pub(crate) shape: ShapeArgs,
    /// Use only this many bytes of the volume [default: the rest from the offset].
    #[arg(long, value_parser = bytes)]
    pub(crate) size: Option<u64>,
    /// Begin at this byte of the volume, a multiple of 512.
    #[arg(long, value_parser = bytes, default_value = "0")]
    pub(crate) offset: u64,
    /// Run until SIGINT or SIGTERM, then finish cleanly.
    #[arg(long, conflicts_with_all = ["seconds", "ops"])]
    pub(crate) until_stopped: bool,
    /// How frames are moved: auto, af-xdp or af-packet.
    #[arg(long, default_value_t = LinkChoice::Auto)]
    pub(crate) link: LinkChoice,
    /// Keep the generator on this core.
    #[arg(long, value_name = "CORE")]
    pub(crate) cpu: Option<u16>,
    /// Look for the target at most this long.
    #[arg(long, value_parser = duration_ns, default_value = "10s")]
    pub(crate) discover_timeout: u64,
    /// Stamp every sector written with address, version, seed and CRC32C, and compare every sector read with the
    /// versions that it may have.
    #[arg(long)]
    pub(crate) verify: bool,
    /// As --verify; at the end write to this file what the volume must hold.
    #[arg(long, value_name = "FILE", conflicts_with = "check_log")]
    pub(crate) verify_log: Option<PathBuf>,
    /// Read everything back that the log of a --verify-log run knows, and report sectors lost, torn and wrong.
    #[arg(long, value_name = "FILE",
          conflicts_with_all = ["read", "write", "mixed", "verify", "size", "offset", "until_stopped",
                                "seconds", "ops", "block", "pattern"])]
    pub(crate) check_log: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl AoeArgs {
    /// The load that is asked for.
    ///
    /// # Errors
    /// Arguments that make no sense together, or a log that cannot be read.
    pub(crate) fn load(&self) -> anyhow::Result<Load> {
        ensure!(self.offset.is_multiple_of(512), "--offset {} is not a multiple of 512", self.offset);
        let mut load = self.shape.load(self.target, self.cpu)?;
        load.size_bytes = self.size;
        load.offset_bytes = self.offset;
        load.discover_timeout_ns = self.discover_timeout;
        if self.until_stopped || self.check_log.is_some() {
            load.duration_ns = None;
        }
        if let Some(path) = &self.check_log {
            let (oracle, target) = Oracle::load(path)?;
            ensure!(
                target == self.target.to_string(),
                "the verify log {} is about target {target}, not {}",
                path.display(),
                self.target
            );
            load.check = Check::ReadBack(Box::new(oracle));
        } else if self.verify || self.verify_log.is_some() {
            load.check = Check::Stamps;
        }
        Ok(load)
    }
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("where").args(["interface", "pair"]).required(true))]
pub(crate) struct LinkArgs {
    /// Serve on this interface until SIGINT or SIGTERM.
    #[arg(long, value_name = "IF")]
    pub(crate) interface: Option<String>,
    /// Make a veth pair in two fresh network namespaces, serve on one end, load the other, and print the rate.
    #[arg(long)]
    pub(crate) pair: bool,
    /// Address to answer at.
    #[arg(long, value_name = "SHELF.SLOT", default_value = "1.1")]
    pub(crate) shelf_slot: Address,
    /// Size of the volume that is pretended.
    #[arg(long, value_parser = bytes, default_value = "1GiB")]
    pub(crate) size: u64,
    /// Threads that serve, one per core from core 0 on; the interface needs as many queues (--pair makes them).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) cores: u16,
    /// With --interface: the first core that serves. Without it the threads run where they are put.
    #[arg(long, value_name = "CORE", conflicts_with = "pair")]
    pub(crate) cpu: Option<u16>,
    /// How frames are moved: auto, af-xdp or af-packet.
    #[arg(long, default_value_t = LinkChoice::Auto)]
    pub(crate) link: LinkChoice,
    /// With --pair: the MTU of both ends.
    #[arg(long, default_value_t = 9000)]
    pub(crate) mtu: u32,
    /// With --pair: how often to measure; several give the median too.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) repeat: u16,
    /// With --pair: the load.
    #[command(flatten)]
    pub(crate) shape: ShapeArgs,
    /// Print JSON, one line for each measurement.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("disk_direction").args(["disk_read", "disk_write"]))]
pub(crate) struct DiskArgs {
    /// File or block device.
    #[arg(long, value_name = "PATH")]
    pub(crate) file: PathBuf,
    /// Make the file, or write it in full up to this size, before measuring: blocks never written are slower. Needed
    /// where the file does not exist.
    #[arg(long, value_parser = bytes)]
    pub(crate) size: Option<u64>,
    /// Bytes of an operation: a multiple of 4096, up to 64KiB.
    #[arg(long, value_parser = bytes, default_value = "4KiB")]
    pub(crate) block: u64,
    /// Operations unfinished at a time.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) depth: u16,
    /// Read (the default).
    #[arg(long = "read", id = "disk_read")]
    pub(crate) read: bool,
    /// Write. Destroys what the file holds.
    #[arg(long = "write", id = "disk_write")]
    pub(crate) write: bool,
    /// Each write is on stable media before it counts (RWF_DSYNC).
    #[arg(long, requires = "disk_write")]
    pub(crate) dsync: bool,
    /// Order of the blocks.
    #[arg(long, value_enum, default_value = "random")]
    pub(crate) pattern: Pattern,
    /// How requests are made: `auto` as the product would, inline on tmpfs, else through io_uring.
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) engine: Engine,
    /// Stop after this time.
    #[arg(long, value_name = "DURATION", value_parser = duration_ns, default_value = "10s")]
    pub(crate) seconds: u64,
    /// Makes a run repeatable [default: from the clock].
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Keep the loop on this core.
    #[arg(long, value_name = "CORE")]
    pub(crate) cpu: Option<u16>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    /// File to make for the store and for fio. It is removed at the end.
    #[arg(long, value_name = "FILE")]
    pub(crate) path: PathBuf,
    /// Bytes of the file.
    #[arg(long, value_parser = bytes, default_value = "4GiB")]
    pub(crate) size: u64,
    /// Time of each measurement.
    #[arg(long, value_name = "DURATION", value_parser = duration_ns, default_value = "3s")]
    pub(crate) seconds: u64,
    /// How often each pair is measured.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// Where data go first.
    #[arg(long, value_enum, default_value = "both")]
    pub(crate) mode: Mode,
    /// Only the rows whose name has this in it.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) only: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StoreOpenArgs {
    /// Sparse file to make, on tmpfs: it takes about 1.1 GiB of memory, and is removed at the end.
    #[arg(long, value_name = "FILE")]
    pub(crate) path: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RingArgs {
    /// How owners are chosen.
    #[arg(long, value_enum, default_value = "balanced")]
    pub(crate) kind: KindName,
    /// Nodes of the first ring.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) nodes: u32,
    /// Stores of each node.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) stores_per_node: u32,
    /// Capacities of the stores, one after the other and then from the beginning again.
    #[arg(long, value_name = "BYTES[,...]", value_parser = bytes, value_delimiter = ',', default_value = "1TiB")]
    pub(crate) capacity: Vec<u64>,
    /// Zones: how many, of the same size, or how many nodes are in each. 0: every node is one by itself.
    #[arg(long, value_name = "N | N,N,...", default_value = "0")]
    pub(crate) zones: Zones,
    /// Copies of each partition, on different nodes.
    #[arg(long, default_value_t = 3)]
    pub(crate) copies: u8,
    /// Partitions, a power of two.
    #[arg(long, value_name = "N", value_parser = partition_bits, default_value = "65536")]
    pub(crate) partitions: u8,
    /// Points of an average store on the circle of ketama [default: 160].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) points: Option<u16>,
    /// Bytes in one copy of a partition, to say how much data moves.
    #[arg(long, value_parser = bytes, default_value = "1GiB")]
    pub(crate) partition_bytes: u64,
    /// What happens next, each after the one before: add=N and remove=N nodes, remove-zone=N (from 0), return (of those that went
    /// last), copies=N.
    #[arg(long, value_name = "CHANGE")]
    pub(crate) change: Vec<Change>,
    /// Compute each ring this often and print the median time.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeat: u32,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StagesArgs {
    /// JSON with a bound for each stage, as --json prints the counts: exit code 1 if a count is more than 3 % above its own.
    #[arg(long, value_name = "FILE")]
    pub(crate) bounds: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// What valgrind runs: the requests, and nothing else.
    #[arg(long, hide = true, num_args = 2, value_names = ["KIND", "BATCHES"])]
    pub(crate) run: Vec<String>,
}

impl DiskArgs {
    pub(crate) fn seed(&self) -> u64 {
        self.seed.unwrap_or_else(fresh_seed)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn aoe(args: &[&str]) -> Result<AoeArgs, clap::Error> {
        let all = ["torus-bench", "aoe", "--interface", "eth0", "--target", "1.2"].iter().chain(args);
        match Cli::try_parse_from(all)?.command {
            Command::Aoe(args) => Ok(*args),
            _ => unreachable!("asked for aoe"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_a_random_read_of_ten_seconds() {
        let load = aoe(&[]).unwrap().load().unwrap();
        assert_eq!((load.read_percent, load.block_bytes, load.window), (100, 4096, 32));
        assert_eq!((load.duration_ns, load.operations), (Some(DURATION_NS), None));
        assert_eq!(load.timeout_ns, TIMEOUT_NS);
        assert!(matches!(load.check, Check::None));
    }

    #[test]
    fn the_end_of_a_run_is_what_was_asked() {
        let load = |args: &[&str]| aoe(args).unwrap().load().unwrap();
        assert_eq!(load(&["--ops", "5"]).duration_ns, None);
        assert_eq!(load(&["--ops", "5", "--seconds", "2"]).duration_ns, Some(2_000_000_000));
        assert_eq!(load(&["--until-stopped"]).duration_ns, None);
        assert_eq!(load(&["--no-retransmit"]).timeout_ns, UNREPEATED_TIMEOUT_NS);
        assert_eq!(load(&["--no-retransmit", "--timeout", "3s"]).timeout_ns, 3_000_000_000);
    }

    #[test]
    fn nonsense_is_refused() {
        for args in [
            &["--read", "--write"][..],
            &["--mixed", "101"],
            &["--window", "0"],
            &["--check-log", "x", "--write"],
            &["--check-log", "x", "--verify-log", "y"],
            &["--until-stopped", "--ops", "1"],
            &["--link", "best"],
            &["--target", "4095.0"],
        ] {
            assert!(aoe(args).is_err(), "{args:?}");
        }
        for args in
            [&["--block", "513"][..], &["--block", "0"], &["--offset", "1"], &["--check-log", "/nowhere"]]
        {
            assert!(aoe(args).unwrap().load().is_err(), "{args:?}");
        }
    }
}
