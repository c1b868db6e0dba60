//! The real Linux initiator, in a virtual machine, against Torus. Tests with a case number are those of the conformance
//! list (`docs/conformance.md`) that only a real client can judge.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use torus_e2e::guest::Guest;
use torus_e2e::{Lab, ci_dir, eventually};

const MIB: u64 = 1 << 20;
/// Writes with verification, for as long as is told, to a file system or a disk.
const LOAD: &str = "fio --name=load --size=8m --rw=randwrite --bs=4k --time_based $verify";
/// Patience with a guest on a machine that does other things too, seconds.
const LONG: u64 = 200;

/// The fixed course of `ci/vm run` at one MTU: discovery, verified raw I/O of 512 B to 1 MiB, a window that reaches its
/// maximum, mkfs, verified files, unmount, fsck, remount, and a kernel log without errors.
fn course(mtu: u32) -> Result<()> {
    const VOLUME_BYTES: u64 = 256 * MIB;
    let lab = Lab::up(&format!("--nodes 1 --store file --size 512MiB --mtu {mtu}"))?;
    lab.export("v", "256MiB", "1.1")?;
    let output = Command::new(ci_dir().join("vm"))
        .args([
            "run",
            "--target",
            "1.1",
            "--mtu",
            &mtu.to_string(),
            "--expect-size",
            &VOLUME_BYTES.to_string(),
        ])
        .args(["--timeout", "220", "--log"])
        .arg(lab.file("console.log"))
        .stdin(Stdio::null())
        .output()
        .context("cannot run ci/vm")?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}");
    ensure!(output.status.success(), "the guest found a fault:\n{out}{err}");
    // The verdicts are the guest's; count them, so that a guest that skips its steps does not pass.
    let passed = out.lines().filter(|line| line.starts_with("PASS ")).count();
    ensure!(passed >= 15, "only {passed} steps passed:\n{out}");
    lab.passed()
}

#[test]
fn case_83_linux_formats_verifies_and_fills_its_window_at_mtu_1500() -> Result<()> {
    course(1500)
}

#[test]
fn case_83_linux_formats_verifies_and_fills_its_window_at_mtu_9000() -> Result<()> {
    course(9000)
}

/// The end of every test that put a file system on an export: it is whole, and the guest's kernel saw no error.
fn unmount_clean(guest: &mut Guest, disk: &str) -> Result<()> {
    guest.sh(LONG, "umount /mnt")?;
    guest.sh(LONG, &format!("e2fsck -f -n {disk}"))?;
    no_fault(guest)
}

fn no_fault(guest: &mut Guest) -> Result<()> {
    let (_, faults) = guest.try_sh(60, "log_faults")?;
    ensure!(faults.is_empty(), "the guest's kernel complains:\n{faults}");
    Ok(())
}

#[test]
fn case_85_killed_processes_and_a_target_away_for_30_seconds_are_no_error_to_linux() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store file --size 512MiB --mtu 9000 --etcd 1")?;
    lab.export("v", "256MiB", "1.1")?;
    let mut guest = Guest::boot(&lab, "")?;
    guest.sh(60, "discover 1.1")?;
    guest.sh(LONG, "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 /dev/etherd/e1.1")?;
    guest.sh(60, "mount -t ext4 /dev/etherd/e1.1 /mnt")?;
    guest.start("load", &format!("{LOAD} --directory=/mnt --runtime=50"))?;
    sleep(Duration::from_secs(3));
    lab.sh("kill n1 dataplane")?;
    sleep(Duration::from_secs(4));
    lab.sh("kill n1 control")?;
    sleep(Duration::from_secs(2));
    lab.sh("start n1")?;
    sleep(Duration::from_secs(2));
    lab.sh("kill n1 all")?;
    sleep(Duration::from_secs(30));
    let written = "awk '{print $7}' /sys/block/etherd!e1.1/stat";
    let before = guest.number(written)?;
    lab.sh("start n1")?;
    eventually("writes go on", Duration::from_secs(60), || Ok(guest.number(written)? > before))?;
    let report = guest.finish(LONG, "load")?;
    ensure!(report.contains("err= 0"), "fio found a fault:\n{report}");
    unmount_clean(&mut guest, "/dev/etherd/e1.1")?;
    drop(guest);
    lab.passed()
}

#[test]
fn case_78_linux_sees_a_new_size_and_loses_only_the_export_that_is_removed() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store file --size 1GiB --mtu 9000 --etcd 1")?;
    lab.export("v", "64MiB", "1.1")?;
    lab.export("w", "64MiB", "1.2")?;
    let mut guest = Guest::boot(&lab, "--aoe|aoe_deadsecs=10")?;

    // Two exports at once, each verified while the other is written.
    guest.sh(60, "discover 1.1")?;
    guest.sh(60, "discover 1.2")?;
    for (name, export) in [("first", "1.1"), ("second", "1.2")] {
        let job = format!(
            "fio --name={name} --filename=/dev/etherd/e{export} --size=16m --io_size=24m --rw=randrw --bsrange=512-64k $verify"
        );
        guest.start(name, &job)?;
    }
    guest.finish(LONG, "first")?;
    guest.finish(LONG, "second")?;
    guest.sh(60, "fio --name=first --filename=/dev/etherd/e1.1 --size=16m --io_size=24m --rw=randrw --bsrange=512-64k $verify --verify_only=1")?;

    // 78: while nobody has it open, the advertisement is enough.
    let sectors = |mib: u64| mib * MIB / 512;
    lab.sh("torusctl volume resize v 96MiB")?;
    eventually("a closed device has its new size", Duration::from_secs(70), || {
        Ok(guest.number("sectors 1.1")? == sectors(96))
    })?;
    // An open one keeps its size until it is asked to look again.
    guest.start("holder", "sh -c 'exec 5</dev/etherd/e1.1; sleep 1000'")?;
    lab.sh("torusctl volume resize v 128MiB")?;
    sleep(Duration::from_secs(2));
    ensure!(guest.number("sectors 1.1")? == sectors(96), "an open device changed its size by itself");
    guest.sh(10, "echo e1.1 >/dev/etherd/revalidate")?;
    eventually("an open device has its new size after aoe-revalidate", Duration::from_secs(40), || {
        Ok(guest.number("sectors 1.1")? == sectors(128))
    })?;
    guest.sh(60, "dd if=/dev/zero of=/dev/etherd/e1.1 bs=1M seek=127 count=1 oflag=direct conv=notrunc")?;
    no_fault(&mut guest)?;

    // 79: a removed export is silent, so its device goes down after aoe_deadsecs, and only its.
    lab.sh("torusblk unexport w")?;
    guest.start("reader", "dd if=/dev/etherd/e1.2 of=/dev/null bs=4k count=1 iflag=direct")?;
    sleep(Duration::from_secs(4));
    ensure!(guest.sh(10, "state 1.2")?.trim() == "up", "something answered for a removed export");
    eventually("the device of a removed export is down", Duration::from_secs(40), || {
        Ok(guest.sh(10, "state 1.2")?.contains("down"))
    })?;
    let (code, said) = guest.try_sh(60, "result reader")?;
    ensure!(code != 0, "a removed export was read:\n{said}");
    guest.sh(60, "dd if=/dev/etherd/e1.1 of=/dev/null bs=1M count=4 iflag=direct")?;
    // The same address again is the same disk again, with what was on it.
    lab.sh("torusblk aoe w 1.2")?;
    guest.sh(60, "discover 1.2")?;
    guest.sh(60, "fio --name=second --filename=/dev/etherd/e1.2 --size=16m --io_size=24m --rw=randrw --bsrange=512-64k $verify --verify_only=1")?;
    drop(guest);
    lab.passed()
}

/// Frames that the switch sent to the node so far, by the node's interface.
fn sent_to_node() -> Result<[u64; 2]> {
    let mut frames = [0; 2];
    for (card, count) in frames.iter_mut().enumerate() {
        let path = format!("/sys/class/net/torus-n1e{card}/statistics/tx_packets");
        *count = fs::read_to_string(path)?.trim().parse()?;
    }
    Ok(frames)
}

#[test]
fn two_cards_are_two_paths_and_one_may_be_cut_under_load() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store file --size 512MiB --mtu 9000 --nics 2 --etcd 1")?;
    lab.export("v", "128MiB", "1.1")?;
    let mut guest = Guest::boot(&lab, "--nics|2")?;
    guest.sh(60, "discover 1.1")?;
    // Each of the node's interfaces answers with an address of its own: to Linux, a target each.
    eventually("two targets", Duration::from_secs(30), || {
        guest.sh(10, "echo >/dev/etherd/discover")?;
        Ok(guest.number("paths 1.1 | wc -l")? == 2)
    })?;
    guest.sh(LONG, "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 /dev/etherd/e1.1")?;
    guest.sh(60, "mount -t ext4 /dev/etherd/e1.1 /mnt")?;
    guest.start("load", &format!("{LOAD} --directory=/mnt --runtime=24"))?;
    sleep(Duration::from_secs(4));
    let before = sent_to_node()?;
    sleep(Duration::from_secs(2));
    let after = sent_to_node()?;
    for path in 0..2 {
        ensure!(after[path] > before[path] + 100, "path {path} is not used: {before:?}, then {after:?}");
    }
    lab.sh("cut n1 eth1")?;
    let written = "awk '{print $7}' /sys/block/etherd!e1.1/stat";
    let before = guest.number(written)?;
    eventually("writes go on by the other path", Duration::from_secs(60), || {
        Ok(guest.number(written)? > before + 1000)
    })?;
    lab.sh("heal n1")?;
    let report = guest.finish(LONG, "load")?;
    ensure!(report.contains("err= 0"), "fio found a fault:\n{report}");
    unmount_clean(&mut guest, "/dev/etherd/e1.1")?;
    drop(guest);
    lab.passed()
}

#[test]
fn case_84_one_percent_loss_and_20_ms_of_jitter_leave_verified_data() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store file --size 512MiB --mtu 9000 --etcd 1")?;
    lab.export("v", "128MiB", "1.1")?;
    let mut guest = Guest::boot(&lab, "--wire|10,20")?;
    guest.sh(60, "discover 1.1")?;
    let job = "fio --filename=/dev/etherd/e1.1 --name=lossy --size=4m --io_size=8m --rw=randrw --bsrange=512-64k $verify";
    guest.sh(LONG, job)?;
    guest.sh(LONG, &format!("{job} --verify_only=1"))?;
    no_fault(&mut guest)?;
    // The wire was a bad one: its last report.
    let report = fs::read_to_string(lab.file("console.log.wire0")).context("the relay wrote no report")?;
    let lost: u64 = report
        .lines()
        .last()
        .and_then(|line| line.rsplit_once("lost ")?.1.parse().ok())
        .with_context(|| format!("no report: {report}"))?;
    ensure!(lost > 20, "only {lost} frames were lost: {report}");
    drop(guest);
    lab.passed()
}
