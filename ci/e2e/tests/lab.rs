//! The lab itself keeps its promises: what `up` makes, `cut` cuts and `heal` heals, and `down` leaves nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use torus_e2e::{Lab, ci_dir, eventually};

/// Names of the machine's namespaces and links that belong to a lab.
fn leftovers() -> String {
    let show = |args: &[&str]| {
        let output = Command::new("ip").args(args).output().expect("iproute2 is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let text = show(&["netns", "list"]) + &show(&["-o", "link", "show"]);
    text.lines().filter(|line| line.contains("torus-")).collect::<Vec<_>>().join("\n")
}

#[test]
fn up_is_idempotent_and_down_removes_everything() -> Result<()> {
    let lab = Lab::up("--nodes 2 --etcd 1 --store shm --size 256MiB --mtu 1500 --nics 2")?;
    let before = lab.json("status --json")?;
    let again = lab.json("up --nodes 2 --json")?;
    assert_eq!(before["nodes"], again["nodes"], "a second `up` started something anew");
    assert_eq!(again["mtu"], 1500);

    let other = lab.try_run(&["up", "--mtu", "9000"])?;
    assert_eq!(other.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&other.stderr).contains("ci/lab down"), "{other:?}");

    // Both hosts' links as promised.
    for host in ["n1", "n2", "ini"] {
        let links = lab.sh(&format!("exec {host} -- ip -br link show up"))?;
        assert!(links.contains("eth0@") && links.contains("eth1@"), "{host}:\n{links}");
        let offload = lab.sh(&format!("exec {host} -- ethtool -k eth0"))?;
        assert!(
            offload.contains("tx-vlan-offload: off") && offload.contains("rx-vlan-offload: off"),
            "{offload}"
        );
    }
    // The commands reach the cluster whichever node answers.
    lab.sh("kill n1 all")?;
    let nodes = lab.sh("torusctl node list")?;
    assert!(nodes.contains("n1") && nodes.contains("n2"), "{nodes}");
    lab.sh("start n1")?;
    lab.sh("start n1")?;

    lab.sh("down")?;
    assert_eq!(leftovers(), "");
    let status = lab.try_run(&["status"])?;
    assert_eq!(status.status.code(), Some(1));
    lab.sh("down")?;
    lab.passed()
}

#[test]
fn a_failed_start_leaves_nothing() -> Result<()> {
    let lab = Lab::reserve()?;
    // Programs that are there but whose torusd stops at once.
    let bin = lab.file("bin");
    fs::create_dir_all(&bin)?;
    for program in ["torusd", "torusctl", "torusblk", "torus-dataplane"] {
        let path = bin.join(program);
        fs::write(&path, "#!/bin/sh\necho 'error: this one never starts' >&2\nexit 3\n")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let output = Command::new(ci_dir().join("lab"))
        .args(["up", "--nodes", "1", "--etcd", "1", "--store", "loop", "--size", "64MiB"])
        .env("TORUS_BIN_DIR", &bin)
        .output()?;
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("error: this one never starts"), "the program's own words are missing:\n{err}");
    assert_eq!(leftovers(), "");
    let loops = Command::new("losetup").args(["-a"]).output()?;
    assert!(!String::from_utf8_lossy(&loops.stdout).contains("torus-lab"), "a loop device is left");
    lab.passed()
}

#[test]
fn wrong_use_is_told() -> Result<()> {
    let lab = Lab::reserve()?;
    for (line, code, words) in [
        ("fly", 2, "unknown command"),
        ("up --nodes 0", 2, "--nodes"),
        ("up --nodes two", 2, "--nodes"),
        ("up --store tape", 2, "file shm loop"),
        ("up --size big", 2, "--size"),
        ("up --etcd 2", 2, "--etcd"),
        ("up --nodes 3 --etcd 0", 2, "embedded"),
        ("up --mtu", 2, "needs a value"),
        ("cut n1 sideways", 2, "initiators"),
        ("kill n1", 2, "dataplane"),
        ("cut n1", 1, "ci/lab up"),
        ("torusctl status", 1, "ci/lab up"),
    ] {
        let output = lab.try_run(&line.split_whitespace().collect::<Vec<_>>())?;
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "ci/lab {line}: {err}");
        assert!(err.starts_with("error: ") && err.contains(words), "ci/lab {line}: {err}");
    }
    assert_eq!(leftovers(), "");
    lab.passed()
}

#[test]
fn cuts_cut_what_they_name_and_nothing_else() -> Result<()> {
    let lab = Lab::up("--nodes 2 --etcd 3 --store shm --size 256MiB")?;
    // A connection in both directions, refused or not, shows that frames pass.
    let reaches = |from: &str, to: &str| -> Result<bool> {
        let connect = format!("exec 3<>/dev/tcp/{to}");
        let output = lab.try_run(&["exec", from, "--", "timeout", "0.7", "bash", "-c", &connect])?;
        // 124: nothing came back in time. A refusal comes back at once.
        Ok(output.status.code() != Some(124) && !String::from_utf8_lossy(&output.stderr).contains("No route"))
    };
    let all = |expected: [(&str, &str, bool); 6]| -> Result<()> {
        for (from, to, passes) in expected {
            eventually(&format!("{from} to {to}: {passes}"), Duration::from_secs(5), || {
                Ok(reaches(from, to)? == passes)
            })?;
        }
        Ok(())
    };
    let (etcd, n1, n2) = ("10.77.0.201/2379", "10.77.0.1/9", "10.77.0.2/9");
    let table = |n1_etcd, n1_n2, n1_ini| {
        [
            ("n1", etcd, n1_etcd),
            ("n2", etcd, true),
            ("n2", n1, n1_n2),
            ("n1", n2, n1_n2),
            ("ini", n1, n1_ini),
            ("ini", n2, true),
        ]
    };
    all(table(true, true, true))?;
    lab.sh("cut n1 etcd")?;
    all(table(false, true, true))?;
    lab.sh("cut n1 peers")?;
    all(table(false, false, true))?;
    lab.sh("heal n1")?;
    all(table(true, true, true))?;
    lab.sh("cut n1 initiators")?;
    all(table(true, true, false))?;
    lab.sh("heal n1")?;
    lab.sh("cut n1")?;
    let links = lab.sh("exec n1 -- ip -br link show eth0")?;
    assert!(links.contains("NO-CARRIER"), "a pulled cable has no carrier: {links}");
    all(table(false, false, false))?;
    lab.sh("heal n1")?;
    all(table(true, true, true))?;

    lab.sh("etcd pause 1")?;
    lab.sh("etcd resume 1")?;
    lab.sh("etcd kill")?;
    assert!(
        lab.json("status --json")?["etcd"].as_array().expect("a list").iter().all(|e| e["pid"].is_null())
    );
    lab.sh("etcd start")?;
    lab.passed()
}
