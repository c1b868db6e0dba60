//! Acknowledged writes survive every killed process, and what is lost is only time: the data plane, torusd, both, and
//! torusd together with etcd for a minute.

use std::time::{Duration, Instant};
use std::{fs, thread::sleep};

use anyhow::{Context, Result};
use torus_e2e::{DiskStalls, Lab, Report, cpu_seconds, eventually};

/// A killed data plane is served again within this: the bound for any fail-over.
const FAIL_OVER_MS: f64 = 3000.0;
/// Losing control processes interrupts nothing. Whatever depended on them would stand still for as long as they are away,
/// which is seconds to a minute here; the promised 100 ms is read off the figure that is printed, because shared machines
/// stall for longer than that by themselves.
const UNDISTURBED_MS: f64 = 1000.0;

/// A region small enough that most reads find what was written before.
const LOAD: &str = "--mixed 40 --window 16 --size 16MiB";

/// Runs `disturb` three seconds into a verified mixed load, lets the load go on for another five, and reads everything
/// back afterwards from the log of acknowledged writes.
fn under_load(lab: &Lab, name: &str, disturb: impl FnOnce() -> Result<()>) -> Result<Report> {
    let log = lab.file(name);
    let log = log.to_str().context("a path in UTF-8")?;
    let started = Instant::now();
    let mut load = lab.bench("1.1", &format!("{LOAD} --seconds 14 --verify --verify-log {log}"))?;
    sleep(Duration::from_secs(3));
    assert!(load.is_running()?, "{name}: the load ended before anything happened: {:?}", load.finish());
    disturb()?;
    assert!(started.elapsed() < Duration::from_secs(12), "{name}: the disturbance outlasted the load");
    let report = load.finish()?;
    report.assert_verified(1000.0);

    let check = lab.bench("1.1", &format!("--check-log {log}"))?.finish()?;
    check.assert_verified(1000.0);
    fs::remove_file(log)?;
    Ok(report)
}

/// The longest time without an answer, less what the generator itself did not run.
fn gap_ms(report: &Report) -> f64 {
    report.number("/longest_unstalled_gap_ms")
}

/// What was killed served again within `limit_ms`, not counting the time that the disk under the store stood still.
#[track_caller]
fn assert_resumed(report: &Report, limit_ms: f64, disk: DiskStalls, case: &str) {
    let (gap, stalled) = (gap_ms(report), disk.longest_ms());
    println!("{case}: longest interruption {gap:.0} ms; longest write of the disk {stalled:.0} ms");
    assert!(gap < limit_ms + 2.0 * stalled, "{case}: {gap:.0} ms without an answer: {:#}", report.0);
}

/// The longest gap of an undisturbed run, as a measure of the machine.
fn quiet_gap_ms(lab: &Lab, load: &str) -> Result<f64> {
    Ok(gap_ms(&lab.bench("1.1", &format!("{load} --seconds 8 --verify"))?.finish()?))
}

/// Losing control processes made no gap above [`UNDISTURBED_MS`], unless this machine makes long ones by itself (other work on
/// its cores, steal): then none above twice those, be they an undisturbed run's or stalls of the generator in this one. Only for
/// stores in memory: a disk shared with other machines stalls for seconds, and etcd's own writes hold it up too.
#[track_caller]
fn assert_uninterrupted(report: &Report, quiet_ms: f64, case: &str) {
    let noise_ms = quiet_ms.max(report.number("/longest_stall_ms"));
    let (gap, limit) = (gap_ms(report), UNDISTURBED_MS.max(2.0 * noise_ms));
    println!("{case}: longest interruption {gap:.1} ms; the machine's own {noise_ms:.1} ms");
    assert!(gap < limit, "{case}: {gap:.1} ms without an answer, allowed {limit:.1} ms: {:#}", report.0);
}

#[test]
fn acknowledged_writes_survive_kill_9_of_each_process() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store file --mtu 9000")?;
    lab.export("v", "512MiB", "1.1")?;
    let data_plane = || lab.pid("n1", "dataplane_pid");
    let control = || lab.pid("n1", "torusd_pid");

    let (first, owner) = (data_plane()?, control()?);
    let disk = DiskStalls::watch()?;
    let report = under_load(&lab, "data-plane", || lab.sh("kill n1 dataplane").map(drop))?;
    assert_resumed(&report, FAIL_OVER_MS, disk, "the data plane killed");
    assert!(data_plane()?.is_some() && data_plane()? != first, "torusd did not start a new data plane");
    assert_eq!(control()?, owner, "torusd did not survive its data plane");

    let running = data_plane()?;
    under_load(&lab, "control", || {
        lab.sh("kill n1 control")?;
        sleep(Duration::from_secs(2));
        lab.sh("start n1").map(drop)
    })?;
    assert_eq!(data_plane()?, running, "a new torusd took over by restarting the data plane");

    // A torusd that has re-attached notices the end of a data plane that is not its child.
    let disk = DiskStalls::watch()?;
    let report = under_load(&lab, "adopted", || lab.sh("kill n1 dataplane").map(drop))?;
    assert_resumed(&report, FAIL_OVER_MS, disk, "an adopted data plane killed");

    let disk = DiskStalls::watch()?;
    let report = under_load(&lab, "both", || {
        lab.sh("kill n1 all")?;
        assert_eq!((control()?, data_plane()?), (None, None));
        sleep(Duration::from_secs(1));
        lab.sh("start n1").map(drop)
    })?;
    // One second of it is the pause above, and the lab's own work comes on top.
    assert_resumed(&report, 3000.0 + FAIL_OVER_MS, disk, "everything killed");
    lab.passed()
}

#[test]
fn a_minute_without_torusd_and_etcd_interrupts_nothing() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store shm --size 512MiB --mtu 9000 --etcd 1")?;
    lab.export("v", "256MiB", "1.1")?;
    lab.sh("torusctl volume create later 16MiB")?;
    let data_plane = lab.pid("n1", "dataplane_pid")?;
    let log = lab.file("log");
    let log = log.to_str().context("a path in UTF-8")?;

    let load = "--mixed 50 --window 8 --rate 2000 --size 16MiB";
    let quiet = quiet_gap_ms(&lab, load)?;
    let options = format!("{load} --seconds 80 --verify --verify-log {log}");
    let load = lab.bench("1.1", &options)?;
    sleep(Duration::from_secs(3));
    lab.sh("kill n1 control")?;
    lab.sh("etcd stop")?;
    sleep(Duration::from_secs(60));
    assert_eq!(lab.pid("n1", "dataplane_pid")?, data_plane, "the data plane did not go on alone");
    lab.sh("etcd start")?;
    lab.sh("start n1")?;
    // Converged: changes are made again.
    eventually("a volume can be exported again", Duration::from_secs(30), || {
        Ok(lab.try_run(&["torusblk", "aoe", "later", "1.2"])?.status.success())
    })?;
    let report = load.finish()?;
    report.assert_verified(5_000.0);
    assert_uninterrupted(&report, quiet, "a minute without torusd and etcd");
    assert_eq!(lab.pid("n1", "dataplane_pid")?, data_plane, "coming back restarted the data plane");
    lab.bench("1.1", &format!("--check-log {log}"))?.finish()?.assert_verified(5_000.0);
    lab.passed()
}

#[test]
fn etcd_that_hangs_or_is_cut_off_stops_changes_only() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store shm --size 512MiB --etcd 3")?;
    lab.export("v", "64MiB", "1.1")?;
    let data_plane = lab.pid("n1", "dataplane_pid")?;
    let load = "--mixed 50 --window 8 --rate 2000 --size 16MiB";
    let quiet = quiet_gap_ms(&lab, load)?;
    for (away, back) in
        [("etcd pause", "etcd resume"), ("cut n1 etcd", "heal n1"), ("etcd kill", "etcd start")]
    {
        let load = lab.bench("1.1", &format!("{load} --seconds 16 --verify"))?;
        sleep(Duration::from_secs(1));
        lab.sh(away)?;
        // Longer than the lease.
        sleep(Duration::from_secs(11));
        let refused = lab.try_run(&["torusctl", "volume", "create", "x", "16MiB"])?;
        assert_eq!(refused.status.code(), Some(1), "{away}: a change was accepted: {refused:?}");
        lab.sh(back)?;
        let report = load.finish()?;
        report.assert_verified(1000.0);
        assert_uninterrupted(&report, quiet, away);
        eventually(&format!("after {back} a volume can be created"), Duration::from_secs(30), || {
            Ok(lab.try_run(&["torusctl", "volume", "create", "x", "16MiB"])?.status.success())
        })?;
        lab.sh("torusctl volume delete x")?;
    }
    // One of three may go without any effect.
    lab.sh("etcd kill 2")?;
    eventually("a volume can be created with two etcd servers of three", Duration::from_secs(15), || {
        Ok(lab.try_run(&["torusctl", "volume", "create", "y", "16MiB"])?.status.success())
    })?;
    assert_eq!(lab.pid("n1", "dataplane_pid")?, data_plane, "the data plane was restarted");
    lab.passed()
}

#[test]
fn an_idle_node_costs_under_two_percent_of_a_core() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store file --size 256MiB --cores 1")?;
    lab.export("v", "64MiB", "1.1")?;
    // It has served, and sleeps again.
    lab.bench("1.1", "--mixed 50 --window 16 --size 4MiB --seconds 2 --verify")?
        .finish()?
        .assert_verified(1000.0);
    sleep(Duration::from_secs(2));
    for which in ["dataplane_pid", "torusd_pid"] {
        let pid = lab.pid("n1", which)?.context("the process runs")?;
        let (before, started) = (cpu_seconds(pid)?, Instant::now());
        sleep(Duration::from_secs(15));
        let percent = 100.0 * (cpu_seconds(pid)? - before) / started.elapsed().as_secs_f64();
        println!("{which}: {percent:.2} % of a core while idle");
        assert!(percent < 2.0, "{which} takes {percent:.2} % of a core while idle");
    }
    lab.passed()
}

#[test]
fn every_store_and_link_serves_verified_data() -> Result<()> {
    for options in [
        "--store file --link af-xdp --mtu 9000",
        "--store shm --link af-packet --mtu 9000",
        "--store loop --link auto --mtu 1500",
        "--store shm --link auto --mtu 1500 --nics 2 --queues 2 --cores 2",
        "--store file --link af-packet --mtu 1500 --etcd 0",
    ] {
        let lab = Lab::up(&format!("--nodes 1 --size 256MiB {options}"))?;
        let run = || -> Result<()> {
            lab.export("v", "64MiB", "1.1")?;
            for load in [
                "--mixed 50 --window 16 --block 4KiB",
                "--mixed 50 --window 4 --block 512",
                "--write --block 64KiB --pattern sequential",
            ] {
                let report =
                    lab.bench("1.1", &format!("{load} --size 512KiB --seconds 2 --verify"))?.finish()?;
                report.assert_verified(if load.starts_with("--write") { 0.0 } else { 100.0 });
            }
            // What was written is there for the next one, whoever serves it.
            let log = lab.file("log");
            let log = log.to_str().context("a path in UTF-8")?;
            lab.bench("1.1", &format!("--write --window 8 --seconds 2 --verify --verify-log {log}"))?
                .finish()?;
            lab.sh("kill n1 all")?;
            lab.sh("start n1")?;
            lab.bench("1.1", &format!("--check-log {log}"))?.finish()?.assert_verified(100.0);
            Ok(())
        };
        run().with_context(|| format!("with {options}"))?;
        lab.passed()?;
    }
    Ok(())
}
