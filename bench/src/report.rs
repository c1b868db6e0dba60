//! What a run found, as a table for people and as JSON for programs.

use std::fmt::Write as _;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::ceiling::disk::Engine;
use crate::initiator::{Behaviour, Counters};
use crate::units::human_bytes;
use crate::verify::Findings;
use crate::workload::Pattern;

/// Longest latency that is told apart, in nanoseconds: longer than any timeout that makes sense.
const LATENCY_MAX_NS: u64 = 3_600_000_000_000;
/// Significant digits of the histograms.
const DIGITS: u8 = 3;

/// Latencies in nanoseconds. Recording never allocates.
#[derive(Debug, Clone)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Latencies {
        Latencies(Histogram::new_with_max(LATENCY_MAX_NS, DIGITS).expect("the bounds are valid"))
    }

    pub(crate) fn record(&mut self, latency_ns: u64) {
        self.0.saturating_record(latency_ns.max(1));
    }

    pub(crate) fn summary(&self) -> Option<LatencySummary> {
        let us = |value_ns: u64| value_ns as f64 / 1e3;
        (!self.0.is_empty()).then(|| LatencySummary {
            count: self.0.len(),
            min: us(self.0.min()),
            p50: us(self.0.value_at_quantile(0.5)),
            p90: us(self.0.value_at_quantile(0.9)),
            p99: us(self.0.value_at_quantile(0.99)),
            p99_9: us(self.0.value_at_quantile(0.999)),
            max: us(self.0.max()),
            mean: self.0.mean() / 1e3,
        })
    }
}

/// Latencies in microseconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LatencySummary {
    pub(crate) count: u64,
    pub(crate) min: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p99_9: f64,
    pub(crate) max: f64,
    pub(crate) mean: f64,
}

/// The link that was obtained.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LinkReport {
    pub(crate) interface: String,
    pub(crate) mode: String,
    pub(crate) zero_copy: bool,
    pub(crate) segments: u8,
    pub(crate) mtu: u32,
    pub(crate) sectors_max: u8,
    pub(crate) hugepages: bool,
    pub(crate) note: String,
}

impl From<&aoe_xdp::link::LinkInfo> for LinkReport {
    fn from(info: &aoe_xdp::link::LinkInfo) -> LinkReport {
        LinkReport {
            interface: info.interface.clone(),
            mode: info.mode.to_string(),
            zero_copy: info.mode == aoe_xdp::link::LinkMode::XdpZeroCopy,
            segments: info.segments,
            mtu: info.mtu,
            sectors_max: info.max_sectors,
            hugepages: info.hugepages,
            note: info.note.clone(),
        }
    }
}

/// The target as it was discovered.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TargetReport {
    pub(crate) address: String,
    pub(crate) mac: String,
    pub(crate) size_bytes: u64,
    pub(crate) buffer_count: u16,
    pub(crate) sector_count: u8,
    pub(crate) firmware: u16,
}

/// A time without any answer while some were wanted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Gap {
    /// Seconds after the start at which it ended.
    pub(crate) ended_s: f64,
    pub(crate) ms: f64,
    /// How much of it the generator itself did not run.
    pub(crate) stalled_ms: f64,
}

/// What the machine spent.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Cost {
    /// CPU time of the measuring thread per operation: user and system.
    pub(crate) thread_us_per_op: f64,
    /// Busy time of its core per operation, soft interrupts included; only where the thread was pinned.
    pub(crate) core_us_per_op: Option<f64>,
    /// Time that the hypervisor gave to others, of all cores' time.
    pub(crate) steal_percent: f64,
}

/// A rate over time.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Rate {
    pub(crate) operations: u64,
    pub(crate) seconds: f64,
    pub(crate) iops: f64,
    /// Millions of bytes per second.
    pub(crate) mb_per_s: f64,
}

impl Rate {
    pub(crate) fn new(operations: u64, bytes: u64, elapsed_ns: u64) -> Rate {
        let seconds = elapsed_ns as f64 / 1e9;
        let per_second = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        Rate {
            operations,
            seconds,
            iops: per_second(operations as f64),
            mb_per_s: per_second(bytes as f64 / 1e6),
        }
    }
}

/// A run of the load generator.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LoadReport {
    pub(crate) kind: &'static str,
    pub(crate) ok: bool,
    pub(crate) link: LinkReport,
    pub(crate) target: TargetReport,
    pub(crate) pattern: Pattern,
    pub(crate) read_percent: u8,
    pub(crate) block_bytes: u64,
    pub(crate) window: u16,
    /// Frames that could be unanswered at most: the target's buffer count, or what the Linux driver would use of it.
    pub(crate) frames_max: usize,
    pub(crate) initiator: Behaviour,
    pub(crate) seed: u64,
    #[serde(flatten)]
    pub(crate) rate: Rate,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) read_latency_us: Option<LatencySummary>,
    pub(crate) write_latency_us: Option<LatencySummary>,
    #[serde(flatten)]
    pub(crate) counters: Counters,
    /// Operations that failed.
    pub(crate) errors: u64,
    /// Frames that the generator's own link dropped.
    pub(crate) link_dropped: u64,
    pub(crate) longest_gap_ms: f64,
    /// As `longest_gap_ms`, less the time within each gap that the generator itself did not run.
    pub(crate) longest_unstalled_gap_ms: f64,
    /// The longest time that the generator itself did not run.
    pub(crate) longest_stall_ms: f64,
    /// Gaps above 100 ms.
    pub(crate) gaps: Vec<Gap>,
    #[serde(flatten)]
    pub(crate) cost: Cost,
    /// Present where data was verified.
    pub(crate) verify: Option<Findings>,
}

impl LoadReport {
    /// The report as text.
    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        self.write_table(&mut out).expect("writing to a string cannot fail");
        out
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        let (link, target, rate) = (&self.link, &self.target, &self.rate);
        writeln!(
            out,
            "target {} at {}: {}, {} buffers, {} sectors a frame",
            target.address,
            target.mac,
            human_bytes(target.size_bytes),
            target.buffer_count,
            target.sector_count
        )?;
        write_link(out, link)?;
        let direction = match self.read_percent {
            0 => "write".to_owned(),
            100 => "read".to_owned(),
            percent => format!("{percent} % read"),
        };
        let pattern = if self.pattern == Pattern::Random { "random" } else { "sequential" };
        writeln!(
            out,
            "{pattern} {direction}, block {}, window {}, seed {}",
            human_bytes(self.block_bytes),
            self.window,
            self.seed
        )?;
        write_rate(out, rate)?;
        writeln!(out, "{:<14}{LATENCY_HEAD}", "latency (µs)")?;
        for (name, summary) in [("read", &self.read_latency_us), ("write", &self.write_latency_us)] {
            if let Some(summary) = summary {
                writeln!(out, "  {name:<12}{}", latency_row(summary))?;
            }
        }
        let counters = &self.counters;
        writeln!(
            out,
            "frames {}, retransmits {}, timeouts {}, ATA errors {}, AoE errors {}, unexpected replies {}, malformed {}, dropped here {}",
            counters.frames,
            counters.retransmits,
            counters.timeouts,
            counters.ata_errors,
            counters.aoe_errors,
            counters.unexpected_replies,
            counters.malformed,
            self.link_dropped
        )?;
        writeln!(
            out,
            "longest gap {:.1} ms ({:.1} ms less own stalls, of which the longest was {:.1} ms)",
            self.longest_gap_ms, self.longest_unstalled_gap_ms, self.longest_stall_ms
        )?;
        write_cost(out, &self.cost)?;
        if let Some(findings) = &self.verify {
            write_findings(out, findings)?;
        }
        writeln!(out, "{}", if self.ok { "ok" } else { "FAILED" })
    }
}

const LATENCY_HEAD: &str = "      min      p50      p90      p99    p99.9      max     mean";

fn latency_row(summary: &LatencySummary) -> String {
    let LatencySummary { min, p50, p90, p99, p99_9, max, mean, .. } = summary;
    format!("{min:>9.1}{p50:>9.1}{p90:>9.1}{p99:>9.1}{p99_9:>9.1}{max:>9.1}{mean:>9.1}")
}

fn write_link(out: &mut String, link: &LinkReport) -> std::fmt::Result {
    write!(
        out,
        "link {}: {}, {} segments, MTU {}, {} sectors a frame",
        link.interface, link.mode, link.segments, link.mtu, link.sectors_max
    )?;
    if link.note.is_empty() { writeln!(out) } else { writeln!(out, " ({})", link.note) }
}

fn write_rate(out: &mut String, rate: &Rate) -> std::fmt::Result {
    writeln!(
        out,
        "{} operations in {:.2} s: {:.0} IOPS, {:.1} MB/s",
        rate.operations, rate.seconds, rate.iops, rate.mb_per_s
    )
}

fn write_cost(out: &mut String, cost: &Cost) -> std::fmt::Result {
    write!(out, "CPU per operation: thread {:.2} µs", cost.thread_us_per_op)?;
    if let Some(core) = cost.core_us_per_op {
        write!(out, ", core {core:.2} µs")?;
    }
    writeln!(out, "; steal {:.1} %", cost.steal_percent)
}

fn write_findings(out: &mut String, findings: &Findings) -> std::fmt::Result {
    writeln!(
        out,
        "verified {} sectors ({} of unknown content): lost {}, torn {}, wrong {}",
        findings.checked_sectors,
        findings.unknown_sectors,
        findings.lost_sectors,
        findings.torn_sectors,
        findings.wrong_sectors
    )?;
    for violation in &findings.examples {
        let (lowest, highest) = violation.allowed;
        writeln!(
            out,
            "  sector {}: {:?}: found {}, allowed versions {lowest} to {highest}",
            violation.lba, violation.fault, violation.found
        )?;
    }
    Ok(())
}

/// A run of the bare disk loop.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct DiskReport {
    pub(crate) kind: &'static str,
    pub(crate) path: String,
    pub(crate) pattern: Pattern,
    /// Through io_uring, or inline.
    pub(crate) engine: Engine,
    pub(crate) write: bool,
    pub(crate) dsync: bool,
    pub(crate) block_bytes: u64,
    pub(crate) depth: u16,
    #[serde(flatten)]
    pub(crate) rate: Rate,
    pub(crate) latency_us: Option<LatencySummary>,
    #[serde(flatten)]
    pub(crate) cost: Cost,
}

impl DiskReport {
    /// The report as text.
    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        self.write_table(&mut out).expect("writing to a string cannot fail");
        out
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        let pattern = if self.pattern == Pattern::Random { "random" } else { "sequential" };
        let direction = match (self.write, self.dsync) {
            (false, _) => "read",
            (true, false) => "write",
            (true, true) => "write, durable each",
        };
        writeln!(
            out,
            "{}: {pattern} {direction}, block {}, {}",
            self.path,
            human_bytes(self.block_bytes),
            if self.engine == Engine::Inline { "inline".to_owned() } else { format!("depth {}", self.depth) }
        )?;
        write_rate(out, &self.rate)?;
        if let Some(summary) = &self.latency_us {
            writeln!(out, "{:<14}{LATENCY_HEAD}", "latency (µs)")?;
            writeln!(out, "  {:<12}{}", "", latency_row(summary))?;
        }
        write_cost(out, &self.cost)
    }
}

/// What a server without a store did.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ServeReport {
    pub(crate) kind: &'static str,
    pub(crate) link: LinkReport,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) others: u64,
    pub(crate) silent: u64,
    /// CPU time of the serving threads per read or write.
    pub(crate) thread_us_per_op: f64,
    /// Busy time of their cores per read or write, soft interrupts included.
    pub(crate) core_us_per_op: Option<f64>,
}

impl ServeReport {
    /// The report as text.
    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        self.write_table(&mut out).expect("writing to a string cannot fail");
        out
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        write!(out, "server ")?;
        write_link(out, &self.link)?;
        write!(
            out,
            "served {} reads, {} writes, {} others, {} without an answer; CPU per operation: thread {:.2} µs",
            self.reads, self.writes, self.others, self.silent, self.thread_us_per_op
        )?;
        match self.core_us_per_op {
            Some(core) => writeln!(out, ", core {core:.2} µs"),
            None => writeln!(out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_summed_up_in_microseconds() {
        let mut latencies = Latencies::new();
        assert!(latencies.summary().is_none());
        for us in 1..=1000u64 {
            latencies.record(us * 1000);
        }
        latencies.record(u64::MAX);
        let summary = latencies.summary().unwrap();
        assert_eq!(summary.count, 1001);
        for (value, expected) in [(summary.min, 1.0), (summary.p50, 501.0), (summary.p99, 991.0)] {
            assert!((value - expected).abs() < expected * 0.002, "{value} is not {expected}");
        }
        assert!(summary.max > 3e9);
    }

    #[test]
    fn a_rate_of_no_time_is_zero() {
        assert_eq!(Rate::new(5, 5, 0).iops, 0.0);
        let rate = Rate::new(1000, 4_096_000, 500_000_000);
        assert_eq!((rate.iops, rate.mb_per_s), (2000.0, 8.192));
    }
}
