//! A volume with a copy on each of three nodes, from outside. Any of their processes is killed, at random, again and again, under a
//! verified load: no error reaches the initiator, nothing is lost, and every copy comes back. And its head is moved around all nodes.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use torus_e2e::random::Random;
use torus_e2e::{Lab, eventually};

/// Kills of one run, unless `TORUS_KILLS` says another number: `ci/soak nodes` does.
const KILLS: u32 = 5;
const NODES: usize = 3;
/// Longer than it takes to notice, to take over, and to bring a node up to date, on a machine that is busy with other things.
const HEALED_WITHIN: Duration = Duration::from_secs(60);

/// Moves of one run, at least: two rounds.
const MOVES: u32 = 6;
/// The longest that requests may wait for a planned move, on a machine that is busy with other things.
const MOVED_WITHIN_MS: f64 = 1000.0;

/// The same for the stop of the node that has the head: its copy is silent then, and waited for before it is called stale.
const STOPPED_WITHIN_MS: f64 = 3000.0;

/// Whether the volume is served with all copies in sync.
fn is_whole(lab: &Lab) -> Result<bool> {
    let shown = lab.json("torusctl volume show v --json")?;
    let volume = &shown["volume"];
    Ok(volume["copies_in_sync"] == NODES && volume["head"]["state"] == "serving")
}

fn random_ms(random: &mut Random, below: usize) -> Duration {
    Duration::from_millis(random.below(below) as u64)
}

#[test]
fn killed_nodes_lose_nothing_and_every_copy_comes_back() -> Result<()> {
    let kills = match std::env::var("TORUS_KILLS") {
        Ok(text) => text.parse().context("TORUS_KILLS is a number")?,
        Err(_) => KILLS,
    };
    let seed = match std::env::var("TORUS_KILLS_SEED") {
        Ok(text) => text.parse().context("TORUS_KILLS_SEED is a number")?,
        Err(_) => u64::from(std::process::id()),
    };
    println!("TORUS_KILLS_SEED={seed}");
    let mut random = Random::new(seed);
    let lab = Lab::up("--nodes 3 --etcd 3 --store file --size 512MiB --mtu 9000")?;
    lab.sh("torusctl volume create v 128MiB --copies 3")?;
    lab.sh("torusblk aoe v 1.1")?;
    eventually("all copies are in sync at first", HEALED_WITHIN, || is_whole(&lab))?;
    for kill in 0..kills {
        let log = lab.file(&format!("log-{kill}"));
        let log_path = log.to_str().context("a path in UTF-8")?;
        let block = ["512", "4KiB", "16KiB"][kill as usize % 3];
        let options =
            format!("--mixed 30 --window 16 --block {block} --size 8MiB --seed {kill} --seconds 10 --verify");
        let mut load = lab.bench("1.1", &format!("{options} --verify-log {log_path}"))?;
        sleep(Duration::from_millis(1000) + random_ms(&mut random, 1000));
        ensure!(load.is_running()?, "kill {kill}: the load ended before anything happened");
        let node = format!("n{}", 1 + random.below(NODES));
        let process = ["dataplane", "control", "all"][random.below(3)];
        lab.sh(&format!("kill {node} {process}"))?;
        let down = random_ms(&mut random, 3000);
        sleep(down);
        lab.sh(&format!("start {node}"))?;
        let report = load.finish()?;
        report.assert_verified(500.0);
        assert_eq!(report.number("/timeouts"), 0.0, "an initiator gave up: {:#}", report.0);
        lab.bench("1.1", &format!("--check-log {log_path}"))?.finish()?.assert_verified(500.0);
        eventually("all copies are in sync again", HEALED_WITHIN, || is_whole(&lab))?;
        println!(
            "kill {kill}: {node} {process}, started again {} ms later: longest interruption {} ms",
            down.as_millis(),
            report.number("/longest_gap_ms")
        );
        fs::remove_file(log)?;
    }
    println!("{kills} kills, every acknowledged write was there, and all copies came back");
    lab.passed()
}

#[test]
fn a_head_goes_around_all_nodes_and_no_request_fails() -> Result<()> {
    let lab = Lab::up("--nodes 3 --etcd 3 --store file --size 512MiB --mtu 9000")?;
    lab.sh("torusctl volume create v 128MiB --copies 3")?;
    lab.sh("torusblk aoe v 1.1")?;
    eventually("all copies are in sync at first", HEALED_WITHIN, || is_whole(&lab))?;
    let log = lab.file("log-moves");
    let log_path = log.to_str().context("a path in UTF-8")?;
    let options = "--mixed 30 --window 16 --block 4KiB --size 8MiB --seed 1 --seconds 25 --verify";
    let mut load = lab.bench("1.1", &format!("{options} --verify-log {log_path}"))?;
    sleep(Duration::from_secs(1));
    let takeovers = |lab: &Lab| {
        lab.json("torusctl volume show v --json").map(|shown| shown["volume"]["head"]["takeover"].clone())
    };
    let first = takeovers(&lab)?.as_u64().context("a number")?;
    let mut moves = 0;
    while moves < MOVES || load.is_running()? {
        let head = lab.json("torusctl volume show v --json")?["volume"]["node"].clone();
        let at = (1..=NODES).find(|n| head == format!("n{n}")).context("a node of the lab")?;
        let to = format!("n{}", at % NODES + 1);
        ensure!(moves >= MOVES || load.is_running()?, "the load ended after {moves} moves");
        let begun = Instant::now();
        let moved = lab.json(&format!("torusctl volume move-head v {to} --json"))?;
        assert_eq!(moved["volume"]["node"], to, "{moved:#}");
        println!("move {moves}: {head} to {to}, told after {} ms", begun.elapsed().as_millis());
        moves += 1;
        sleep(Duration::from_millis(1500));
    }
    let report = load.finish()?;
    report.assert_verified(500.0);
    assert_eq!(report.number("/timeouts"), 0.0, "an initiator gave up: {:#}", report.0);
    lab.bench("1.1", &format!("--check-log {log_path}"))?.finish()?.assert_verified(500.0);
    eventually("all copies are in sync", HEALED_WITHIN, || is_whole(&lab))?;
    let longest_ms = report.number("/longest_gap_ms");
    println!(
        "{moves} moves: longest interruption {longest_ms} ms, {} retransmissions",
        report.0["retransmits"]
    );
    assert!(longest_ms <= MOVED_WITHIN_MS, "requests waited {longest_ms} ms for a planned move");
    // Nobody else took over: every new head was named by the one before it.
    assert_eq!(takeovers(&lab)?.as_u64(), Some(first + u64::from(moves)));
    // A node that is stopped has its heads go elsewhere first, and what is asked for meanwhile is answered.
    let head = lab.json("torusctl volume show v --json")?["volume"]["node"].clone();
    let head = head.as_str().context("a name")?.to_owned();
    let mut load =
        lab.bench("1.1", "--mixed 30 --window 16 --block 4KiB --size 8MiB --seed 2 --seconds 6 --verify")?;
    sleep(Duration::from_secs(1));
    ensure!(load.is_running()?, "the load ended before the node was stopped");
    lab.sh(&format!("stop {head}"))?;
    let report = load.finish()?;
    report.assert_verified(500.0);
    println!("{head} stopped: longest interruption {} ms", report.number("/longest_gap_ms"));
    assert!(report.number("/longest_gap_ms") <= STOPPED_WITHIN_MS, "{:#}", report.0);
    lab.passed()
}

/// Which exports answer a query for all addresses, each with its config string.
fn answering(lab: &Lab) -> Result<Vec<String>> {
    let said = lab.sh("exec ini -- timeout 20 aoecfg -t 1 eth0")?;
    Ok(said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
}

#[test]
fn an_address_is_free_only_when_nobody_answers_there_who_has_not_heard_of_it() -> Result<()> {
    let lab = Lab::up("--nodes 3 --etcd 3 --store file --size 512MiB --mtu 9000")?;
    for volume in ["v", "w"] {
        lab.sh(&format!("torusctl volume create {volume} 32MiB --copies 3"))?;
    }
    lab.sh("torusblk aoe v 1.1")?;
    lab.sh("torusblk config v --set of-v")?;
    eventually("all copies are in sync at first", HEALED_WITHIN, || is_whole(&lab))?;
    let log = lab.file("log-address");
    let log_path = log.to_str().context("a path in UTF-8")?;

    // Its control process is gone, its data plane serves on and is granted what it needs.
    let head = lab.json("torusctl volume show v --json")?["volume"]["node"].clone();
    let head = head.as_str().context("a name")?;
    lab.sh(&format!("kill {head} control"))?;
    let options = "--mixed 30 --window 16 --block 4KiB --size 8MiB --verify --seconds 2 --seed 1";
    lab.bench("1.1", &format!("{options} --verify-log {log_path}"))?.finish()?.assert_verified(100.0);
    lab.sh("torusblk unexport v --no-wait")?;
    let taken = lab.try_run(&["torusblk", "aoe", "w", "1.1"])?;
    let said = String::from_utf8_lossy(&taken.stderr);
    ensure!(!taken.status.success() && said.contains("ending"), "the address was free at once: {said}");

    let begun = Instant::now();
    eventually("the export has ended", HEALED_WITHIN, || {
        Ok(lab.json("torusctl volume show v --json")?["volume"]["export"].is_null())
    })?;
    println!("the export ended {} ms after it was asked for", begun.elapsed().as_millis());
    ensure!(answering(&lab)?.is_empty(), "who has not heard of the end answers: {:?}", answering(&lab)?);
    lab.sh("torusblk aoe w 1.1")?;
    lab.sh("torusblk config w --set of-w")?;
    let mut load =
        lab.bench("1.1", "--mixed 30 --window 16 --block 4KiB --size 8MiB --verify --seconds 5 --seed 3")?;
    while load.is_running()? {
        let answers = answering(&lab)?;
        ensure!(answers.iter().all(|answer| answer == "1.1 of-w"), "two volumes at one address: {answers:?}");
        sleep(Duration::from_millis(100));
    }
    load.finish()?.assert_verified(100.0);
    ensure!(answering(&lab)? == ["1.1 of-w"], "{:?}", answering(&lab)?);

    // What was written before is there when the address is the first one's again.
    lab.sh(&format!("start {head}"))?;
    lab.sh("torusblk unexport w")?;
    lab.sh("torusblk aoe v 1.1")?;
    eventually("all copies are in sync again", HEALED_WITHIN, || is_whole(&lab))?;
    lab.bench("1.1", &format!("--check-log {log_path}"))?.finish()?.assert_verified(100.0);
    lab.passed()
}
