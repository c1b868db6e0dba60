//! Malformed frames, a storm of them, harm neither the data plane nor the verified load beside them.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use torus_e2e::Lab;

/// Memory that a process has, in KiB.
fn resident_kib(pid: u64) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a running process")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn storm(link: &str) -> Result<()> {
    let lab = Lab::up(&format!("--nodes 1 --etcd 0 --size 512MiB --store shm --mtu 9000 --link {link}"))?;
    lab.export("v", "64MiB", "1.1")?;
    lab.export("worthless", "16MiB", "1.2")?;
    let data_plane = lab.pid("n1", "dataplane_pid")?.context("a data plane")?;
    let seen = lab.bench("1.2", "--read --window 1 --seconds 1")?.finish()?;
    let mac = seen.0["target"]["mac"].as_str().context("the target has a MAC")?.to_owned();

    let log = lab.file("log");
    let log = log.to_str().context("a path in UTF-8")?;
    let load = lab.bench(
        "1.1",
        &format!("--mixed 50 --window 8 --rate 3000 --seconds 12 --verify --verify-log {log}"),
    )?;
    sleep(Duration::from_secs(2));
    let before = resident_kib(data_plane)?;
    for seed in [1, 2, 3] {
        let sent = lab.sh(&format!("exec ini -- torus-junk eth0 {mac} 1.2 40000 {seed}"))?;
        assert!(sent.contains("40000 frames sent"), "{sent}");
    }
    let after = resident_kib(data_plane)?;
    // What is touched for the first time counts as grown: the frame memory, and the pages of two volumes.
    assert!(after < before + (32 << 10), "the data plane has grown from {before} to {after} KiB");
    load.finish()?.assert_verified(1000.0);
    assert_eq!(lab.pid("n1", "dataplane_pid")?, Some(data_plane), "malformed frames ended the data plane");
    lab.bench("1.1", &format!("--check-log {log}"))?.finish()?.assert_verified(1000.0);
    // The export that was shot at still serves.
    lab.bench("1.2", "--mixed 50 --window 8 --seconds 2 --verify")?.finish()?.assert_verified(100.0);
    lab.passed()
}

#[test]
fn malformed_frames_on_af_xdp() -> Result<()> {
    storm("auto")
}

#[test]
fn malformed_frames_on_af_packet() -> Result<()> {
    storm("af-packet")
}
