//! Everything that can be wrong with what a person types or plugs in: the answer is an error that says what is wrong and
//! what to do next, the exit code is not zero, and nothing is lost.

use std::fs;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use torus_e2e::{Lab, eventually};

/// Runs a program on a host of the lab and expects it to end by itself within ten seconds.
fn ends(lab: &Lab, host: &str, command: &[String]) -> Result<Output> {
    let mut arguments = vec!["exec", host, "--", "timeout", "-s", "KILL", "10"];
    arguments.extend(command.iter().map(String::as_str));
    let output = lab.try_run(&arguments)?;
    ensure!(
        output.status.code().is_some_and(|code| code != 137),
        "{command:?} did not end by itself: {output:?}"
    );
    Ok(output)
}

/// A command line of torusd, with folders of its own: a node remembers the stores it was once told of.
fn torusd(lab: &Lab, number: usize, interface: &str, store: &str, more: &[&str]) -> Vec<String> {
    let folder = |name: &str| lab.file(&format!("{name}{number}")).to_string_lossy().into_owned();
    let (state, run) = (folder("state"), folder("run"));
    let fixed = ["torusd", "--name", "x", "--interface", interface, "--store", store, "--state-dir", &state];
    let run = if more.contains(&"--run-dir") { vec![] } else { vec!["--run-dir", &run] };
    fixed.iter().chain(&run).chain(more).map(|&word| word.to_owned()).collect()
}

/// What is wrong with an answer to bad input, if anything: it must be an error that a person can act on, which starts with
/// `error: `, contains these words and is no panic, and the exit code must say so too.
fn faults(case: &str, output: &Output, words: &[&str]) -> Option<String> {
    let err = String::from_utf8_lossy(&output.stderr);
    let told = err.lines().filter(|line| line.contains("error: ")).collect::<Vec<_>>().join("\n");
    let refused = output.status.code().is_some_and(|code| code != 0);
    let missing: Vec<_> = words.iter().filter(|word| !told.contains(**word)).collect();
    let good = refused && !told.is_empty() && !err.contains("panicked") && missing.is_empty();
    (!good).then(|| format!("{case}: {}, without the words {missing:?}:\n{err}", output.status))
}

#[track_caller]
fn assert_told(case: &str, output: &Output, words: &[&str]) {
    assert_eq!(faults(case, output, words), None);
}

#[test]
fn torusd_refuses_what_cannot_work() -> Result<()> {
    let lab = Lab::up("--nodes 1 --etcd 0 --size 256MiB --store file")?;
    lab.export("v", "64MiB", "1.1")?;
    let log = lab.file("log");
    let log = log.to_str().context("a path in UTF-8")?;
    lab.bench("1.1", &format!("--write --window 8 --seconds 2 --verify --verify-log {log}"))?.finish()?;

    // The second node's place: the initiator's host has an interface, and its own folders.
    for setup in [
        "link add small0 mtu 900 type veth peer name small1",
        "link set small0 up",
        "link set small1 up",
        "link add down0 mtu 9000 type veth peer name down1",
    ] {
        lab.sh(&format!("exec ini -- ip {setup}"))?;
    }
    let path = |name: &str| lab.file(name).to_string_lossy().into_owned();
    let small = path("small");
    fs::write(&small, vec![0; 1 << 20])?;
    let text = path("text");
    fs::write(&text, "not a store, and precious\n".repeat(4 << 20))?;
    let precious = fs::read(&text)?;
    let good = format!("{}:128MiB", path("good"));
    let taken = lab.json("status --json")?["nodes"][0]["store"].as_str().context("a store")?.to_owned();
    let taken = taken.split(':').next().context("a path")?.to_owned();
    let run_of_n1 =
        lab.json("status --json")?["nodes"][0]["run_dir"].as_str().context("a folder")?.to_owned();

    let missing = path("no/such/folder/store") + ":128MiB";
    let absent = path("absent");
    let tiny = path("tiny") + ":1MiB";
    let cases: &[(&str, &str, &str, &[&str])] = &[
        ("an unknown interface", "nosuch0", &good, &["nosuch0", "these exist"]),
        ("an interface that is down", "down0", &good, &["down0", "up"]),
        ("an MTU that is too small", "small0", &good, &["small0", "MTU", "900", "1060"]),
        ("a store in no folder", "eth0", &missing, &["no/such/folder"]),
        ("a store that is not there and has no size", "eth0", &absent, &["absent", "SIZE"]),
        ("a store that is too small", "eth0", &small, &["small", "64 MiB"]),
        ("a store that is asked for too small", "eth0", &tiny, &["tiny", "64 MiB"]),
        ("a file with other data", "eth0", &text, &["text", "not blank"]),
        ("a store in use by another torusd", "eth0", &taken, &["store", "in use"]),
    ];
    let mut wrong = Vec::new();
    for (number, (case, interface, store, words)) in cases.iter().enumerate() {
        let output = ends(&lab, "ini", &torusd(&lab, number, interface, store, &[]))?;
        wrong.extend(faults(case, &output, words));
    }
    assert!(fs::read(&text)? == precious, "a file that is not a store was written to");

    let second = torusd(&lab, 100, "eth0", &good, &["--run-dir", &run_of_n1]);
    wrong.extend(faults("a second torusd in the same folder", &ends(&lab, "n1", &second)?, &["run"]));
    let same_api = torusd(&lab, 101, "eth0", &good, &[]);
    wrong.extend(faults(
        "an API address in use",
        &ends(&lab, "n1", &same_api)?,
        &["127.0.0.1:4321", "--api"],
    ));
    for (capability, link) in [("net_raw", "auto"), ("net_admin", "af-xdp"), ("bpf,-sys_admin", "af-xdp")] {
        let drop = format!("-{capability}");
        let mut command: Vec<_> =
            ["setpriv", "--bounding-set", &drop, "--inh-caps", &drop].map(str::to_owned).into();
        command.extend(torusd(&lab, 102, "eth0", &good, &["--link", link]));
        let name = capability.split(',').next().context("a name")?.to_uppercase();
        let output = ends(&lab, "ini", &command)?;
        wrong.extend(faults("a missing capability", &output, &[&format!("CAP_{name}")]));
    }
    for more in [["--link", "carrier-pigeon"], ["--cores", "999"], ["--api", "nowhere"], ["--bogus", "1"]] {
        let output = ends(&lab, "ini", &torusd(&lab, 103, "eth0", &good, &more))?;
        wrong.extend(faults(more[0], &output, &[if more[0] == "--bogus" { more[0] } else { more[1] }]));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // The running node took no harm from any of this.
    lab.bench("1.1", &format!("--check-log {log}"))?.finish()?.assert_verified(1000.0);
    lab.passed()
}

#[test]
fn a_store_of_another_cluster_is_refused_and_kept() -> Result<()> {
    let lab = Lab::up("--nodes 1 --etcd 0 --size 256MiB --store file")?;
    lab.export("v", "64MiB", "1.1")?;
    let log = lab.file("log");
    let log = log.to_str().context("a path in UTF-8")?;
    lab.bench("1.1", &format!("--write --window 8 --seconds 2 --verify --verify-log {log}"))?.finish()?;
    lab.sh("kill n1 all")?;

    let store = lab.json("status --json")?["nodes"][0]["store"].as_str().context("a store")?.to_owned();
    let store = store.split(':').next().context("a path")?.to_owned();
    let command = torusd(&lab, 0, "eth0", &store, &[]);
    assert_told(
        "a store of another cluster",
        &ends(&lab, "ini", &command)?,
        &["store", "belongs to cluster", "name another store"],
    );

    lab.sh("start n1")?;
    lab.bench("1.1", &format!("--check-log {log}"))?.finish()?.assert_verified(1000.0);
    lab.passed()
}

#[test]
fn commands_refuse_what_cannot_be_done() -> Result<()> {
    let lab = Lab::up("--nodes 1 --etcd 1 --size 1GiB --store shm")?;
    lab.export("v", "64MiB", "1.1")?;
    lab.sh("torusctl volume create w 64MiB")?;
    let cases: &[(&str, &[&str])] = &[
        ("torusctl volume create v 64MiB", &["v", "exists"]),
        ("torusctl volume create z 0", &["size"]),
        ("torusctl volume create z 0MiB", &["size"]),
        ("torusctl volume create z 100GiB", &["free"]),
        ("torusctl volume create z much", &["much"]),
        ("torusctl volume create -- -z 64MiB", &["name"]),
        ("torusctl volume create a/b 64MiB", &["name"]),
        ("torusctl volume create z 64MiB --copies 3", &["--copies 1"]),
        ("torusctl volume delete nosuch", &["nosuch"]),
        ("torusctl volume delete v", &["torusblk unexport"]),
        ("torusctl volume resize v 32MiB", &["--allow-data-loss"]),
        ("torusblk aoe w 1.1", &["1.1", "choose another address"]),
        ("torusblk aoe w 65535.0", &["65535.0"]),
        ("torusblk aoe w 1.255", &["1.255"]),
        ("torusblk aoe w one.two", &["one.two"]),
        ("torusblk aoe nosuch 2.2", &["nosuch"]),
        ("torusblk unexport w", &["not exported"]),
    ];
    let mut wrong = Vec::new();
    for (line, words) in cases {
        let output = lab.try_run(&line.split_whitespace().collect::<Vec<_>>())?;
        wrong.extend(faults(line, &output, words));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Usage is another exit code than refusal.
    for (line, code) in
        [("torusctl fly", 2), ("torusctl volume create", 2), ("torusctl volume create v 64MiB", 1)]
    {
        let output = lab.try_run(&line.split_whitespace().collect::<Vec<_>>())?;
        assert_eq!(output.status.code(), Some(code), "{line}: {output:?}");
    }
    // Twice is no harm and no new cluster.
    assert!(lab.sh("torusctl init")?.contains("nothing to do"));
    let away = lab.try_run(&["exec", "ini", "--", "torusctl", "status"])?;
    assert_eq!(away.status.code(), Some(3), "no API answers there: {away:?}");

    // Nothing of this left a trace.
    let volumes = lab.json("torusctl volume list --json")?.to_string();
    assert!(
        volumes.contains("\"v\"") && volumes.contains("\"w\"") && !volumes.contains("\"z\""),
        "{volumes}"
    );
    lab.passed()
}

#[test]
fn a_store_of_one_gibibyte_offers_920_mebibytes() -> Result<()> {
    let lab = Lab::up("--nodes 1 --etcd 0 --size 1GiB --store shm")?;
    lab.export("big", "920MiB", "1.1")?;
    let output = lab.try_run(&["torusctl", "volume", "create", "more", "200MiB"])?;
    assert_told("more than there is", &output, &["free"]);
    let log = lab.file("log");
    let log = log.to_str().context("a path in UTF-8")?;
    let options = format!("--write --block 64KiB --size 256MiB --window 8 --seconds 2 --verify-log {log}");
    lab.bench("1.1", &options)?.finish()?;
    // What is deleted can be had again.
    lab.sh("torusblk unexport big")?;
    lab.sh("torusctl volume delete big")?;
    eventually("the space of a deleted volume is free", Duration::from_secs(30), || {
        Ok(lab.try_run(&["torusctl", "volume", "create", "more", "900MiB"])?.status.success())
    })?;
    // And holds nothing of the old volume: every sector that was acknowledged there is gone here. This also shows that the
    // check of the other tests can fail.
    lab.sh("torusblk aoe more 1.1")?;
    let report = lab.bench("1.1", &format!("--check-log {log}"))?.finish_with_faults()?;
    let (checked, lost) = (report.number("/verify/checked_sectors"), report.number("/verify/lost_sectors"));
    assert!(checked > 1000.0 && lost == checked, "{lost} of {checked} sectors are gone: {:#}", report.0);
    let examples = report.0["verify"]["examples"].as_array().context("examples")?;
    assert!(
        examples.iter().all(|e| e["found"].as_str().is_some_and(|f| f.contains("Zeros"))),
        "{examples:?}"
    );
    lab.passed()
}

#[test]
fn torusd_waits_for_an_etcd_that_is_not_there() -> Result<()> {
    let lab = Lab::up("--nodes 1 --etcd 1 --size 256MiB --store shm")?;
    let path = |name: &str| lab.file(name).to_string_lossy().into_owned();
    let (state, run, store) = (path("state"), path("run"), path("store") + ":128MiB");
    let stderr = lab.file("torusd.log");
    let mut torusd = Command::new(torus_e2e::ci_dir().join("lab"))
        .args([
            "exec",
            "ini",
            "--",
            "torusd",
            "--interface",
            "eth0",
            "--name",
            "x",
            "--etcd",
            "http://10.77.0.250:2379",
        ])
        .args(["--store", &store, "--state-dir", &state, "--run-dir", &run])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&stderr)?)
        .stderr(fs::File::options().append(true).open(&stderr)?)
        .spawn()?;
    let check = || -> Result<()> {
        eventually("torusd says which etcd it cannot reach", Duration::from_secs(20), || {
            let text = fs::read_to_string(&stderr)?;
            Ok(text.contains("10.77.0.250:2379") && text.contains("etcd"))
        })?;
        // It answers meanwhile, and refuses changes.
        let api = format!("TORUS_API=unix:{run}/api.sock");
        let status = lab.try_run(&["exec", "ini", "--", "env", &api, "torusctl", "status"])?;
        ensure!(status.status.success(), "status is not answered without etcd: {status:?}");
        let create =
            lab.try_run(&["exec", "ini", "--", "env", &api, "torusctl", "volume", "create", "q", "16MiB"])?;
        ensure!(create.status.code() == Some(1), "a change without etcd: {create:?}");
        Ok(())
    };
    let outcome = check();
    ensure!(torusd.try_wait()?.is_none(), "torusd gave up: {}", fs::read_to_string(&stderr)?);
    torusd.kill()?;
    torusd.wait()?;
    outcome.with_context(|| fs::read_to_string(&stderr).unwrap_or_default())?;
    lab.passed()
}
