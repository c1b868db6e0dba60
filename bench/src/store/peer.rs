//! fio on the store's own file: io_uring, fixed buffers, O_DIRECT, each write durable before it counts. It reads where the
//! store was written first, and writes to slots that the store never gets.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::{Done, Load};

/// Where fio reads and writes.
pub(super) struct Peer<'p> {
    pub(super) path: &'p Path,
    pub(super) read_offset_bytes: u64,
    pub(super) write_offset_bytes: u64,
}

impl Peer<'_> {
    /// Whether there is a fio.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn check() -> anyhow::Result<()> {
        let found = Command::new("fio").arg("--version").output();
        ensure!(found.is_ok_and(|output| output.status.success()), "fio is not there: install it");
        Ok(())
    }

    /// Runs the load on as many bytes as `extents` have.
    ///
    /// # Errors
    /// What fio said.
    pub(super) fn measure(&self, load: Load, extents: u64, duration_ns: u64) -> anyhow::Result<Done> {
        let kind = match load {
            Load::RandomRead => "randread",
            Load::RandomWrite | Load::FirstWrite => "randwrite",
            Load::LongRead => "read",
            Load::LongWrite => "write",
        };
        let offset_bytes = if load.is_write() { self.write_offset_bytes } else { self.read_offset_bytes };
        let mut fio = Command::new("fio");
        fio.args(["--name=peer", "--ioengine=io_uring", "--direct=1", "--fixedbufs=1", "--registerfiles=1"])
            .args(["--time_based", "--norandommap", "--randrepeat=0", "--allow_file_create=0"])
            .args(["--thread", "--output-format=json"])
            .arg(format!("--filename={}", self.path.display()))
            .arg(format!("--rw={kind}"))
            .arg(format!("--bs={}", u64::from(load.blocks()) * 4096))
            .arg(format!("--iodepth={}", load.depth()))
            .arg(format!("--offset={offset_bytes}"))
            .arg(format!("--size={}", extents << 22))
            .arg(format!("--runtime={}ms", duration_ns / 1_000_000));
        if load.is_write() {
            fio.arg("--sync=dsync");
        }
        let output = fio.output().context("fio cannot be run")?;
        ensure!(output.status.success(), "fio failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        let report: Value = serde_json::from_slice(&output.stdout).context("fio's report is not JSON")?;
        parse(&report, load.is_write()).context("fio's report lacks its figures")
    }
}

fn parse(report: &Value, write: bool) -> Option<Done> {
    let job = report.get("jobs")?.get(0)?;
    let side = job.get(if write { "write" } else { "read" })?;
    let elapsed_ms = side.get("runtime")?.as_u64()?;
    let cpu_percent = job.get("usr_cpu")?.as_f64()? + job.get("sys_cpu")?.as_f64()?;
    let cpu_time = Duration::from_millis(job.get("job_runtime")?.as_u64()?);
    Some(Done {
        operations: side.get("total_ios")?.as_u64()?,
        elapsed_ns: elapsed_ms * 1_000_000,
        // Of the job's own run time.
        cpu_ns: cpu_time.mul_f64(cpu_percent / 100.0).as_nanos().try_into().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_of_fio_are_read() {
        let report = serde_json::json!({ "jobs": [{
            "usr_cpu": 10.0, "sys_cpu": 15.0, "job_runtime": 2000,
            "read": { "runtime": 0, "total_ios": 0 },
            "write": { "runtime": 1999, "total_ios": 5000 },
        }] });
        let done = parse(&report, true).unwrap();
        assert_eq!((done.operations, done.elapsed_ns, done.cpu_ns), (5000, 1_999_000_000, 500_000_000));
        assert!(parse(&serde_json::json!({}), true).is_none());
    }
}
