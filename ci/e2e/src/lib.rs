//! What the end-to-end tests share: a lab of their own (`ci/lab`), load on it, and the real programs' answers.
//!
//! The tests observe from outside what the design promises: acknowledged writes survive any killed process (I3), neither
//! a lost control process nor a lost metadata store interrupts running I/O (I1), and nothing is ever deleted because it
//! was not found (I2).
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

pub mod guest;
pub mod port;
pub mod random;

/// The folder of the lab's scripts.
#[must_use]
pub fn ci_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in ci/").to_owned()
}

/// Marks that a test, not a person, brought the lab up; locked as long as that test lives.
const MARK: &str = "/run/lock/torus-e2e.lock";

/// A cluster that belongs to one test and goes with it.
#[derive(Debug)]
pub struct Lab {
    scratch: PathBuf,
    passed: bool,
    /// Held until the cluster is gone: one lab per machine.
    _lock: File,
}

impl Lab {
    /// Brings a cluster up with the options of `ci/lab up`, separated by spaces.
    ///
    /// # Errors
    /// If this is not root, somebody else has a lab up, or the start fails; the message has what `ci/lab` printed.
    pub fn up(options: &str) -> Result<Self> {
        let lab = Self::reserve()?;
        let mut arguments = vec!["up"];
        arguments.extend(options.split_whitespace());
        lab.run(&arguments)?;
        Ok(lab)
    }

    /// Takes the machine's only place for a lab without bringing one up.
    ///
    /// # Errors
    /// If this is not root, or somebody else has a lab up.
    pub fn reserve() -> Result<Self> {
        let id = fs::read_to_string("/proc/self/status").context("/proc is not mounted")?;
        let root =
            id.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"));
        ensure!(root, "the lab makes network namespaces: run the end-to-end tests as root");
        fs::create_dir_all("/run/lock").context("cannot make /run/lock")?;
        let existed = Path::new(MARK).exists();
        let lock = File::create(MARK).with_context(|| format!("cannot create {MARK}"))?;
        // Tests of one binary run as threads under `cargo test`; elsewhere a test group keeps them apart.
        lock.lock().context("cannot lock")?;
        let scratch = std::env::temp_dir().join(format!("torus-e2e-{}", std::process::id()));
        fs::create_dir_all(&scratch)?;
        let lab = Self { scratch, passed: false, _lock: lock };
        if lab.try_run(&["status"])?.status.success() {
            // The mark without its test's removal: that test was killed, and its lab is nobody's.
            ensure!(existed, "a lab that is not a test's is up: run ci/lab down first");
            lab.run(&["down"])?;
        }
        Ok(lab)
    }

    /// A file of this test, removed with the lab.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// `ci/lab` with these arguments, whatever its exit code.
    ///
    /// # Errors
    /// If the script cannot be run at all.
    pub fn try_run(&self, arguments: &[&str]) -> Result<Output> {
        Command::new(ci_dir().join("lab"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("cannot run ci/lab")
    }

    /// `ci/lab` with these arguments; its standard output.
    ///
    /// # Errors
    /// If it fails; the message has what it printed.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.try_run(arguments)?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(
            output.status.success(),
            "ci/lab {} failed ({}):\n{out}{err}",
            arguments.join(" "),
            output.status
        );
        Ok(out.into_owned())
    }

    /// `ci/lab` with these arguments, separated by spaces; its standard output.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn sh(&self, line: &str) -> Result<String> {
        self.run(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// As [`Lab::sh`], the output parsed as JSON.
    ///
    /// # Errors
    /// As [`Lab::run`], or if the output is no JSON.
    pub fn json(&self, line: &str) -> Result<Value> {
        let out = self.sh(line)?;
        serde_json::from_str(&out).with_context(|| format!("ci/lab {line} printed no JSON:\n{out}"))
    }

    /// Creates a volume and exports it.
    ///
    /// # Errors
    /// If a command fails.
    pub fn export(&self, volume: &str, size: &str, address: &str) -> Result<()> {
        self.sh(&format!("torusctl volume create {volume} {size}"))?;
        self.sh(&format!("torusblk aoe {volume} {address}"))?;
        Ok(())
    }

    /// Process id of a host's `torusd_pid` or `dataplane_pid`, if it runs.
    ///
    /// # Errors
    /// If no lab is up.
    pub fn pid(&self, host: &str, which: &str) -> Result<Option<u64>> {
        let status = self.json("status --json")?;
        let nodes = status["nodes"].as_array().context("ci/lab status names no nodes")?;
        let node =
            nodes.iter().find(|node| node["host"] == host).with_context(|| format!("no host {host}"))?;
        Ok(node[which].as_u64())
    }

    /// Starts `torus-bench aoe` against an export from the initiator's host.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn bench(&self, target: &str, options: &str) -> Result<Bench> {
        let mut command = Command::new(ci_dir().join("lab"));
        command
            .args([
                "exec",
                "ini",
                "--",
                "torus-bench",
                "aoe",
                "--interface",
                "eth0",
                "--target",
                target,
                "--json",
            ])
            .args(options.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().context("cannot run ci/lab exec")?;
        Ok(Bench { child: Some(child) })
    }
}

impl Lab {
    /// The test passed: removes the cluster without printing its logs.
    ///
    /// # Errors
    /// None; the type spares the caller a line.
    pub fn passed(mut self) -> Result<()> {
        self.passed = true;
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // What the nodes printed explains a failure better than the assertion.
        if !self.passed {
            for host in ["n1", "n2", "n3"] {
                if let Ok(log) = self.run(&["logs", host]) {
                    let lines: Vec<_> = log.lines().collect();
                    eprintln!(
                        "--- last lines of {host}:\n{}",
                        lines[lines.len().saturating_sub(60)..].join("\n")
                    );
                }
            }
        }
        if let Err(error) = self.run(&["down"]) {
            eprintln!("{error:#}");
        }
        let _ = fs::remove_dir_all(&self.scratch);
        let _ = fs::remove_file(MARK);
    }
}

/// A running load generator; killed if the test drops it.
#[derive(Debug)]
pub struct Bench {
    child: Option<Child>,
}

impl Bench {
    /// Waits for the end; the report.
    ///
    /// # Errors
    /// If it found a fault or failed; the message has the report.
    pub fn finish(self) -> Result<Report> {
        self.ended(0)
    }

    /// Waits for the end; the report of a run that must have found wrong data.
    ///
    /// # Errors
    /// If it found none or failed.
    pub fn finish_with_faults(self) -> Result<Report> {
        self.ended(1)
    }

    fn ended(mut self, code: i32) -> Result<Report> {
        let output = self.child.take().expect("finished once").wait_with_output()?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.code() != Some(code) {
            bail!("torus-bench ended with {}:\n{out}{err}", output.status);
        }
        let value = serde_json::from_str(&out)
            .with_context(|| format!("torus-bench printed no JSON:\n{out}{err}"))?;
        Ok(Report(value))
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.as_mut().expect("not finished").try_wait()?.is_none())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What `torus-bench aoe --json` reports.
#[derive(Debug)]
pub struct Report(pub Value);

impl Report {
    /// A number of the report; 0 if it is missing would hide a fault, so that panics.
    #[must_use]
    #[track_caller]
    pub fn number(&self, pointer: &str) -> f64 {
        let found = self.0.pointer(pointer).and_then(Value::as_f64);
        found.unwrap_or_else(|| panic!("the report has no number {pointer}: {:#}", self.0))
    }

    /// Asserts that sectors were compared, at least `least` of them, and that every one was right.
    #[track_caller]
    pub fn assert_verified(&self, least: f64) {
        for wrong in ["lost_sectors", "torn_sectors", "wrong_sectors"] {
            assert_eq!(self.number(&format!("/verify/{wrong}")), 0.0, "{:#}", self.0);
        }
        let checked = self.number("/verify/checked_sectors");
        assert!(checked >= least, "only {checked} sectors were compared, {least} expected: {:#}", self.0);
        assert_eq!(self.0["ata_errors"], 0, "{:#}", self.0);
        assert_eq!(self.0["errors"], 0, "{:#}", self.0);
    }
}

/// A small durable write to the disk of the lab's stores (`/var/tmp`), over and over, from a thread of its own: how long the disk itself
/// stands still, so that a bound on an interruption need not pay for it.
#[derive(Debug)]
pub struct DiskStalls {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Duration>>,
}

impl DiskStalls {
    /// Starts writing.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn watch() -> Result<Self> {
        let path = format!("/var/tmp/torus-e2e-disk-{}", std::process::id());
        let file = File::create(&path).with_context(|| format!("cannot make {path}"))?;
        // Nobody else needs its name.
        fs::remove_file(&path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            while !stopped.load(Ordering::Relaxed) {
                let begun = Instant::now();
                // A failed write shows in the store's own test; here it only ends the measurement early.
                if file.write_all_at(&[0; 4096], 0).and_then(|()| file.sync_data()).is_err() {
                    break;
                }
                longest = longest.max(begun.elapsed());
                sleep(Duration::from_millis(20));
            }
            longest
        });
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Stops; the longest write.
    #[must_use]
    pub fn longest_ms(mut self) -> f64 {
        self.join().as_secs_f64() * 1000.0
    }

    fn join(&mut self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(Duration::ZERO, |thread| thread.join().unwrap_or_default())
    }
}

impl Drop for DiskStalls {
    fn drop(&mut self) {
        self.join();
    }
}

/// Repeats a question until its answer is yes.
///
/// # Errors
/// If it is not within `limit`; the message says what was waited for.
pub fn eventually(what: &str, limit: Duration, mut question: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        if question()? {
            return Ok(());
        }
        ensure!(Instant::now() < end, "not within {} s: {what}", limit.as_secs());
        sleep(Duration::from_millis(50));
    }
}

/// CPU time that a process has used so far, in seconds, user and system, all threads.
///
/// # Errors
/// If there is no such process.
pub fn cpu_seconds(pid: u64) -> Result<f64> {
    let stat =
        fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("no process {pid}"))?;
    // The second field is the name in parentheses and may contain anything; user time is field 14.
    let (_, fields) = stat.rsplit_once(')').context("unknown form of /proc/PID/stat")?;
    let tick = |index: usize| -> Result<f64> {
        Ok(fields.split_whitespace().nth(index).context("/proc/PID/stat is short")?.parse()?)
    };
    // USER_HZ is 100 on every architecture that Linux offers to programs here.
    Ok((tick(11)? + tick(12)?) / 100.0)
}
