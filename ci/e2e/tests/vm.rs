//! The real Linux initiator, in a virtual machine, against Torus: it formats, verifies, checks and remounts an export.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fs, io::Read as _};

use anyhow::{Context, Result, ensure};
use torus_e2e::{Lab, ci_dir};

/// Bytes of the exported volume.
const VOLUME: u64 = 256 << 20;

/// Runs the guest; `during_load` is called when its load stage begins. Prints what the guest found.
fn guest(lab: &Lab, mtu: u32, load_s: u32, during_load: impl FnOnce() -> Result<()>) -> Result<()> {
    let log = lab.file("console.log");
    let mut guest = Command::new(ci_dir().join("vm"))
        .args(["run", "--target", "1.1", "--mtu", &mtu.to_string(), "--expect-size", &VOLUME.to_string()])
        .args(["--load-seconds", &load_s.to_string(), "--timeout", "300", "--log"])
        .arg(&log)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ci/vm")?;
    let started = Instant::now();
    let mut disturbed = Ok(());
    while guest.try_wait()?.is_none() && started.elapsed() < Duration::from_secs(310) {
        if has_line(&log, "STAGE load") {
            // In the middle of the writes.
            sleep(Duration::from_secs(2));
            disturbed = during_load();
            break;
        }
        sleep(Duration::from_millis(200));
    }
    let status = guest.wait()?;
    let (mut out, mut err) = (String::new(), String::new());
    guest.stdout.take().context("piped")?.read_to_string(&mut out)?;
    guest.stderr.take().context("piped")?.read_to_string(&mut err)?;
    println!("{out}");
    ensure!(status.success(), "the guest found a fault:\n{out}{err}");
    disturbed?;
    // The verdicts are the guest's; count them, so that a guest that skips its steps does not pass.
    let passed = out.lines().filter(|line| line.starts_with("PASS ")).count();
    ensure!(passed >= 14, "only {passed} steps passed:\n{out}");
    Ok(())
}

fn has_line(log: &Path, line: &str) -> bool {
    fs::read(log).is_ok_and(|text| String::from_utf8_lossy(&text).lines().any(|l| l.trim_end() == line))
}

fn linux_initiator(mtu: u32) -> Result<()> {
    let lab = Lab::up(&format!("--nodes 1 --store file --size 512MiB --mtu {mtu}"))?;
    lab.export("v", "256MiB", "1.1")?;
    guest(&lab, mtu, 3, || Ok(()))?;
    lab.passed()
}

#[test]
fn linux_initiator_at_mtu_1500() -> Result<()> {
    linux_initiator(1500)
}

#[test]
fn linux_initiator_at_mtu_9000() -> Result<()> {
    linux_initiator(9000)
}

#[test]
fn linux_initiator_sees_no_error_while_processes_are_killed() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store file --size 512MiB --mtu 9000 --etcd 1")?;
    lab.export("v", "256MiB", "1.1")?;
    guest(&lab, 9000, 20, || {
        lab.sh("kill n1 dataplane")?;
        sleep(Duration::from_secs(4));
        lab.sh("kill n1 control")?;
        sleep(Duration::from_secs(2));
        lab.sh("start n1")?;
        sleep(Duration::from_secs(2));
        lab.sh("kill n1 all")?;
        lab.sh("start n1")?;
        Ok(())
    })?;
    lab.passed()
}
