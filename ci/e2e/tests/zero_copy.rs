//! Zero-copy on a driver that has it, and a store on a real NVMe driver: in a virtual machine (`ci/zero-copy`), because no
//! interface of a test machine can do it.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use torus_e2e::{Lab, ci_dir};

/// The exit code of `ci/zero-copy` where the kernel that it needs cannot be fetched.
const NO_KERNEL: i32 = 77;

/// Runs `ci/zero-copy`; what it printed, or nothing where its kernel cannot be had.
fn zero_copy(lab: &Lab, options: &str) -> Result<Option<String>> {
    let output = Command::new(ci_dir().join("zero-copy"))
        .args(options.split_whitespace())
        .args(["--timeout", "200", "--log"])
        .arg(lab.file("console.log"))
        .stdin(Stdio::null())
        .output()
        .context("cannot run ci/zero-copy")?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}");
    if output.status.code() == Some(NO_KERNEL) {
        // Without a package mirror there is nothing to test; anything else that goes wrong is a failure.
        eprintln!("NOT TESTED: zero-copy and NVMe. {err}");
        return Ok(None);
    }
    ensure!(output.status.success(), "ci/zero-copy ended with {}:\n{out}{err}", output.status);
    Ok(Some(out.into_owned()))
}

#[test]
fn a_node_with_zero_copy_and_nvme_serves_verified_io_through_a_kill() -> Result<()> {
    // The machine's place for labs: guests take as much of its cores.
    let lab = Lab::reserve()?;
    if let Some(out) = zero_copy(&lab, "run --seconds 6")? {
        // The script judges; a script that skips its steps does not pass.
        let has =
            |start: &str, part: &str| out.lines().any(|line| line.starts_with(start) && line.contains(part));
        ensure!(has("SHOW eth0", " zero-copy "), "the link is not zero-copy:\n{out}");
        ensure!(has("INFO nvme0n1", "driver nvme"), "the store is not on NVMe:\n{out}");
        ensure!(has("SHOW zc", "durable (every write flushed)"), "the writes are not flushed:\n{out}");
        ensure!(out.lines().filter(|line| line.starts_with("REPORT ")).count() == 2, "no reports:\n{out}");
    }
    lab.passed()
}

/// Where a driver's zero-copy is known to lose or change frames, and does at this size of memory, it is not taken.
#[test]
fn zero_copy_that_would_send_wrong_headers_is_not_taken_by_itself() -> Result<()> {
    let lab = Lab::reserve()?;
    if let Some(out) = zero_copy(&lab, "binds --count 2 --memory 1028 --link auto")? {
        ensure!(out.contains("xdp-native-copy") && out.contains("wrong address"), "{out}");
        ensure!(out.contains("PASS 2 sockets"), "{out}");
    }
    lab.passed()
}
