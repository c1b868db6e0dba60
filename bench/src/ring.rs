//! How evenly a ring deals its partitions, how much it moves when members come and go, and how long it computes.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::str::FromStr;

use anyhow::{Context, ensure};
use cluster_map::ring::{DEFAULT_POINTS, FULL_WEIGHT, Kind, Member, Plan, Ring, RingError, Rules};
use cluster_map::{NodeId, StoreId};
use serde::Serialize;

use crate::cli::RingArgs;
use crate::measure::{now_ns, thread_cpu_ns};
use crate::units::human_bytes;

/// What may move for each copy that must when members come and go, of the balanced ring.
const MOVED_OVER_LEAST: f64 = 1.05;

/// The kinds by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KindName {
    /// One store has everything.
    Single,
    /// Store after store, modulo their number.
    Mod,
    /// Consistent hashing.
    Ketama,
    /// Shares by capacity, copies in different zones, least movement.
    Balanced,
}

/// How nodes are dealt to zones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Zones {
    /// Each is one by itself.
    None,
    /// So many of the same size.
    Equal(u32),
    /// So many nodes in each.
    Sizes(Vec<u32>),
}

impl FromStr for Zones {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sizes: Result<Vec<u32>, _> = text.split(',').map(str::parse).collect();
        match sizes.as_deref() {
            Ok([0]) => Ok(Self::None),
            Ok([count]) => Ok(Self::Equal(*count)),
            Ok(sizes) if sizes.iter().all(|size| *size > 0) => Ok(Self::Sizes(sizes.to_vec())),
            _ => Err(format!(
                "'{text}' is not understood: write for example 10, or 1,3,16 for the nodes in each"
            )),
        }
    }
}

/// What becomes of the members, or of the copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// So many nodes come, dealt to the zones like the first ones.
    Add(u32),
    /// So many nodes go, here and there.
    Remove(u32),
    /// All nodes of a zone go.
    RemoveZone(u32),
    /// Those that went last come back.
    Return,
    /// So many copies from now on.
    Copies(u8),
}

impl FromStr for Change {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || {
            format!("'{text}' is not understood: write add=N, remove=N, remove-zone=N, return or copies=N")
        };
        let (what, number) = text.split_once('=').unwrap_or((text, ""));
        let number: Result<u32, _> = number.parse();
        match (what, number) {
            ("add", Ok(count)) if count > 0 => Ok(Self::Add(count)),
            ("remove", Ok(count)) if count > 0 => Ok(Self::Remove(count)),
            ("remove-zone", Ok(zone)) => Ok(Self::RemoveZone(zone)),
            ("return", Err(_)) if text == "return" => Ok(Self::Return),
            ("copies", Ok(copies)) => u8::try_from(copies).map(Self::Copies).map_err(|_| refuse()),
            _ => Err(refuse()),
        }
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Add(count) => write!(out, "add={count}"),
            Self::Remove(count) => write!(out, "remove={count}"),
            Self::RemoveZone(zone) => write!(out, "remove-zone={zone}"),
            Self::Return => out.write_str("return"),
            Self::Copies(copies) => write!(out, "copies={copies}"),
        }
    }
}

/// Reads a power of two; gives its exponent.
pub(crate) fn partition_bits(text: &str) -> Result<u8, String> {
    let partitions: Option<u32> = text.parse().ok().filter(|count: &u32| count.is_power_of_two());
    let bits = partitions.and_then(|count| u8::try_from(count.ilog2()).ok());
    bits.ok_or_else(|| format!("'{text}' is no power of two: write for example 65536"))
}

#[derive(Debug, Serialize)]
struct Report {
    kind: &'static str,
    ring: KindName,
    nodes: u32,
    stores_per_node: u32,
    partitions: u32,
    copies: u8,
    partition_bytes: u64,
    rings: Vec<RingReport>,
    ok: bool,
}

#[derive(Debug, Serialize)]
struct RingReport {
    change: String,
    stores: usize,
    /// Median time to compute it, and CPU time of that: on a machine with other load only the latter means something.
    compute_ms: f64,
    compute_cpu_ms: f64,
    /// Copies on a store.
    copies_min: u32,
    copies_mean: f64,
    copies_max: u32,
    /// How full the fullest store is, by its capacity, over the mean of all.
    fullest_over_mean: f64,
    /// Partitions with two copies in one zone.
    partitions_twice_in_a_zone: u32,
    moved: Option<Moved>,
}

#[derive(Debug, Serialize)]
struct Moved {
    copies: u64,
    copies_least: u64,
    over_least: f64,
    percent_of_all: f64,
    bytes: u64,
}

/// Nodes as they come, and those that went.
struct Cluster<'a> {
    args: &'a RingArgs,
    members: Vec<Member>,
    gone: Vec<Member>,
    made: u32,
}

impl<'a> Cluster<'a> {
    fn new(args: &'a RingArgs) -> anyhow::Result<Self> {
        if let Zones::Sizes(sizes) = &args.zones {
            let sum: u32 = sizes.iter().sum();
            ensure!(
                sum == args.nodes,
                "--zones has {sum} nodes and --nodes {}: they must be the same",
                args.nodes
            );
        }
        let mut cluster = Cluster { args, members: Vec::new(), gone: Vec::new(), made: 0 };
        cluster.add(args.nodes);
        Ok(cluster)
    }

    fn zone_of(&self, node: u32) -> String {
        match &self.args.zones {
            Zones::None => String::new(),
            Zones::Equal(count) => format!("zone {}", node % count),
            Zones::Sizes(sizes) => {
                let mut left = node % sizes.iter().sum::<u32>();
                let zone = sizes.iter().position(|size| match left.checked_sub(*size) {
                    Some(rest) => {
                        left = rest;
                        false
                    }
                    None => true,
                });
                format!("zone {}", zone.unwrap_or(0))
            }
        }
    }

    fn add(&mut self, nodes: u32) {
        for node in self.made..self.made + nodes {
            for store in 0..self.args.stores_per_node {
                let number = node * self.args.stores_per_node + store;
                let capacity_bytes = self.args.capacity[number as usize % self.args.capacity.len()];
                self.members.push(Member {
                    store: StoreId(id(1, number)),
                    node: NodeId(id(0, node)),
                    zone: self.zone_of(node),
                    capacity_bytes,
                    weight: FULL_WEIGHT,
                });
            }
        }
        self.made += nodes;
    }

    fn remove(&mut self, goes: impl Fn(&Member) -> bool) {
        (self.gone, self.members) = std::mem::take(&mut self.members).into_iter().partition(goes);
    }

    fn change(&mut self, change: Change) -> anyhow::Result<()> {
        match change {
            Change::Add(count) => self.add(count),
            Change::Remove(count) => {
                let nodes: BTreeSet<NodeId> = self.members.iter().map(|member| member.node).collect();
                ensure!(
                    (count as usize) < nodes.len(),
                    "remove={count} would leave none of {} nodes",
                    nodes.len()
                );
                // Ids are in no order that means anything.
                let goes: BTreeSet<NodeId> = nodes.into_iter().take(count as usize).collect();
                self.remove(|member| goes.contains(&member.node));
            }
            Change::RemoveZone(zone) => {
                let name = format!("zone {zone}");
                self.remove(|member| member.zone == name);
                ensure!(
                    !self.gone.is_empty(),
                    "remove-zone={zone}: there is no such zone, they are numbered from 0"
                );
            }
            Change::Return => {
                ensure!(!self.gone.is_empty(), "return: nothing went before");
                self.members.append(&mut self.gone);
            }
            Change::Copies(_) => {}
        }
        Ok(())
    }
}

/// A random-looking id that is the same in every run.
fn id(what: u64, number: u32) -> [u8; 16] {
    let mut random = crate::workload::Random::new(what << 32 | u64::from(number));
    let mut id = [0; 16];
    id[..8].copy_from_slice(&random.next().to_le_bytes());
    id[8..].copy_from_slice(&((what << 32 | u64::from(number)) + 1).to_be_bytes());
    id
}

/// Computes and prints; whether the balanced ring moved as little as it has to.
///
/// # Errors
/// Members that make no ring.
pub(crate) fn run(args: &RingArgs) -> anyhow::Result<bool> {
    let report = measure(args)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", table(&report));
    }
    Ok(report.ok)
}

fn measure(args: &RingArgs) -> anyhow::Result<Report> {
    let kind = match args.kind {
        KindName::Single => Kind::Single,
        KindName::Mod => Kind::Mod,
        KindName::Ketama => Kind::Ketama { points: args.points.unwrap_or(DEFAULT_POINTS) },
        KindName::Balanced => Kind::Balanced,
    };
    let mut rules = Rules { kind, copies: args.copies, partition_bits: args.partitions };
    let mut cluster = Cluster::new(args)?;
    let (mut ring, took) = timed(args, rules, &cluster.members, None)?;
    let mut rings = vec![describe("first".into(), &ring, took, None)];
    let mut ok = true;
    for change in &args.change {
        cluster.change(*change)?;
        if let Change::Copies(copies) = change {
            rules.copies = *copies;
        }
        let (next, took) =
            timed(args, rules, &cluster.members, Some(&ring)).with_context(|| format!("after {change}"))?;
        let moved = moved(&Plan::between(&ring, &next, |_| args.partition_bytes), &next);
        let is_membership = !matches!(change, Change::Copies(_));
        ok &= args.kind != KindName::Balanced || !is_membership || moved.over_least <= MOVED_OVER_LEAST;
        rings.push(describe(change.to_string(), &next, took, Some(moved)));
        ring = next;
    }
    Ok(Report {
        kind: "ring",
        ring: args.kind,
        nodes: args.nodes,
        stores_per_node: args.stores_per_node,
        partitions: rules.partitions(),
        copies: args.copies,
        partition_bytes: args.partition_bytes,
        rings,
        ok,
    })
}

/// What computing took, in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Took {
    wall_ms: f64,
    cpu_ms: f64,
}

/// The ring, and the medians of what it took.
fn timed(
    args: &RingArgs,
    rules: Rules,
    members: &[Member],
    before: Option<&Ring>,
) -> Result<(Ring, Took), RingError> {
    let once = || {
        let members = members.to_vec();
        let (start_ns, cpu_start_ns) = (now_ns(), thread_cpu_ns());
        let ring = Ring::compute(rules, members, before)?;
        let took = [now_ns() - start_ns, thread_cpu_ns() - cpu_start_ns];
        Ok::<_, RingError>((ring, took))
    };
    let (ring, first) = once()?;
    let mut took = vec![first];
    for _ in 1..args.repeat {
        took.push(once()?.1);
    }
    let mut median_ms = |of: usize| {
        took.sort_by_key(|took| took[of]);
        took[took.len() / 2][of] as f64 / 1e6
    };
    Ok((ring, Took { wall_ms: median_ms(0), cpu_ms: median_ms(1) }))
}

fn describe(change: String, ring: &Ring, took: Took, moved: Option<Moved>) -> RingReport {
    let counts = ring.counts();
    let sum: u64 = counts.iter().map(|count| u64::from(*count)).sum();
    let capacity: f64 = ring.members().iter().map(|member| member.capacity_bytes as f64).sum();
    let fullness = |(count, member): (&u32, &Member)| f64::from(*count) / member.capacity_bytes as f64;
    let fullest = counts.iter().zip(ring.members()).map(fullness).fold(0.0, f64::max);
    let twice = (0..ring.rules().partitions()).filter(|partition| {
        let owners = ring.owners(*partition);
        let zones: Vec<&str> =
            owners.iter().map(|owner| ring.members()[usize::from(*owner)].zone.as_str()).collect();
        zones.iter().enumerate().any(|(at, zone)| !zone.is_empty() && zones[..at].contains(zone))
    });
    RingReport {
        change,
        stores: counts.len(),
        compute_ms: took.wall_ms,
        compute_cpu_ms: took.cpu_ms,
        copies_min: counts.iter().copied().min().unwrap_or(0),
        copies_mean: sum as f64 / counts.len() as f64,
        copies_max: counts.iter().copied().max().unwrap_or(0),
        fullest_over_mean: fullest * capacity / sum as f64,
        partitions_twice_in_a_zone: u32::try_from(twice.count()).unwrap_or(u32::MAX),
        moved,
    }
}

fn moved(plan: &Plan, ring: &Ring) -> Moved {
    let (copies, least) = (plan.copies(), plan.least_moves);
    let all = u64::from(ring.rules().partitions()) * u64::from(ring.rules().copies);
    Moved {
        copies,
        copies_least: least,
        over_least: if copies == least { 1.0 } else { copies as f64 / least as f64 },
        percent_of_all: 100.0 * copies as f64 / all as f64,
        bytes: plan.bytes(),
    }
}

fn table(report: &Report) -> String {
    let mut out = String::new();
    let name = format!("{:?}", report.ring).to_lowercase();
    let _ = writeln!(
        out,
        "ring {name}: {} nodes of {} stores, {} copies of {} partitions of {}",
        report.nodes,
        report.stores_per_node,
        report.copies,
        report.partitions,
        human_bytes(report.partition_bytes)
    );
    let _ = writeln!(
        out,
        "{:<14} {:>6} {:>8} {:>8} {:>20} {:>9} {:>7}  {:>7} {:>7} {:>7} {:>7} {:>9}",
        "change",
        "stores",
        "ms",
        "CPU ms",
        "copies min/mean/max",
        "full/mean",
        "in zone",
        "moved",
        "minimum",
        "ratio",
        "of all",
        "data"
    );
    for ring in &report.rings {
        let _ = write!(
            out,
            "{:<14} {:>6} {:>8.1} {:>8.1} {:>20} {:>9.4} {:>7}",
            ring.change,
            ring.stores,
            ring.compute_ms,
            ring.compute_cpu_ms,
            format!("{}/{:.1}/{}", ring.copies_min, ring.copies_mean, ring.copies_max),
            ring.fullest_over_mean,
            ring.partitions_twice_in_a_zone,
        );
        if let Some(moved) = &ring.moved {
            let _ = write!(
                out,
                "  {:>7} {:>7} {:>7.3} {:>6.2}% {:>9}",
                moved.copies,
                moved.copies_least,
                moved.over_least,
                moved.percent_of_all,
                human_bytes(moved.bytes)
            );
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn args(args: &[&str]) -> RingArgs {
        match Cli::try_parse_from(["torus-bench", "ring"].iter().chain(args)).unwrap().command {
            Command::Ring(args) => *args,
            _ => unreachable!("asked for a ring"),
        }
    }

    #[test]
    fn a_balanced_ring_is_even_and_moves_what_it_must() {
        let asked = "--nodes 60 --zones 6 --partitions 4096 --repeat 1 --partition-bytes 1GiB --change add=6 \
                     --change remove=3 --change return --change remove-zone=2 --change return --change copies=2";
        let report = measure(&args(&asked.split_whitespace().collect::<Vec<_>>())).unwrap();
        assert!(report.ok && report.rings.len() == 7);
        assert_eq!((report.rings[0].copies_min, report.rings[0].copies_max), (204, 205));
        let moved = report.rings[1].moved.as_ref().unwrap();
        assert_eq!((moved.copies, moved.copies_least, moved.bytes), (1116, 1116, 1116 << 30));
        assert_eq!(
            report.rings.iter().map(|ring| ring.stores).collect::<Vec<_>>(),
            [60, 66, 63, 66, 55, 66, 66]
        );
        assert!(report.rings.iter().all(|ring| ring.partitions_twice_in_a_zone == 0));
        assert!(report.rings[6].moved.as_ref().is_some_and(|moved| moved.copies == 0));
        let table = table(&report);
        assert!(table.lines().count() == 9 && table.contains("remove-zone=2"), "{table}");
    }

    #[test]
    fn other_kinds_are_measured_as_they_are() {
        let report =
            measure(&args(&["--kind", "mod", "--nodes", "50", "--zones", "5,15,30", "--change", "add=1"]));
        let report = report.unwrap();
        let moved = report.rings[1].moved.as_ref().unwrap();
        assert!(report.ok && moved.over_least > 10.0 && moved.percent_of_all > 90.0);
        assert!(report.rings[0].partitions_twice_in_a_zone > 0);
        let report = measure(&args(&["--kind", "single", "--nodes", "1", "--copies", "1"])).unwrap();
        assert_eq!(report.rings[0].copies_max, 65536);
        let unequal =
            measure(&args(&["--kind", "balanced", "--nodes", "10", "--capacity", "1TiB,3TiB"])).unwrap();
        assert!(unequal.rings[0].fullest_over_mean < 1.001 && unequal.rings[0].copies_min * 3 < 30000);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for nonsense in [
            &["--partitions", "1000"][..],
            &["--nodes", "0"],
            &["--nodes", "10001"],
            &["--change", "add=0"],
            &["--change", "return=1"],
            &["--change", "copies=300"],
            &["--zones", "3,0"],
            &["--kind", "best"],
            &["--points", "0"],
        ] {
            let all = ["torus-bench", "ring"].iter().chain(nonsense);
            assert!(Cli::try_parse_from(all).is_err(), "{nonsense:?}");
        }
        for nonsense in [
            &["--nodes", "2"][..],
            &["--nodes", "10", "--zones", "3,3"],
            &["--nodes", "5", "--change", "remove=5"],
            &["--nodes", "5", "--change", "remove-zone=0"],
            &["--nodes", "5", "--change", "return"],
            &["--kind", "single"],
        ] {
            assert!(measure(&args(nonsense)).is_err(), "{nonsense:?}");
        }
    }
}
