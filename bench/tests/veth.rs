//! `torus-bench` over veth pairs in network namespaces of its own: against its own target without a store, and against
//! vblade, a target with one. Needs root, `ip` and vblade.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

const BENCH: &str = env!("CARGO_BIN_EXE_torus-bench");
const SECTOR: u64 = 512;

/// Two namespaces joined by a veth pair, each end `eth0`.
struct Net {
    server: String,
    client: String,
}

impl Net {
    fn new(mtu: u32) -> Net {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let net = Net { server: format!("tbt-{id}-s"), client: format!("tbt-{id}-c") };
        let (s, c, mtu) = (&net.server, &net.client, mtu.to_string());
        ip(&["netns", "add", s]);
        ip(&["netns", "add", c]);
        ip(&[
            "-n", s, "link", "add", "eth0", "mtu", &mtu, "type", "veth", "peer", "name", "eth0", "mtu", &mtu,
            "netns", c,
        ]);
        ip(&["-n", s, "link", "set", "eth0", "up"]);
        ip(&["-n", c, "link", "set", "eth0", "up"]);
        net
    }

    /// A command inside a namespace.
    fn command(namespace: &str, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace, program]).args(args);
        command
    }

    fn serve(&self, program: &str, args: &[&str]) -> Process {
        let mut command = Net::command(&self.server, program, args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Process(Some(command.spawn().unwrap()))
    }

    fn vblade(&self, file: &Path) -> Process {
        let server = self.serve("vblade", &["-b", "64", "1", "1", "eth0", file.to_str().unwrap()]);
        // A first answer shows that it runs.
        let up = Instant::now();
        while !self.aoe(&["--ops", "1", "--discover-timeout", "200ms"]).status.success() {
            assert!(up.elapsed() < Duration::from_secs(20), "vblade does not answer: is it installed?");
        }
        server
    }

    /// `torus-bench aoe` in the client's namespace.
    fn aoe_command(&self, args: &[&str]) -> Command {
        let mut command = Net::command(&self.client, BENCH, &["aoe", "--interface", "eth0", "--json"]);
        if !args.contains(&"--target") {
            command.args(["--target", "1.1"]);
        }
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn aoe(&self, args: &[&str]) -> Output {
        self.aoe_command(args).output().unwrap()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for namespace in [&self.server, &self.client] {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

/// A process that does not outlive its test.
struct Process(Option<Child>);

impl Process {
    fn signal(&self, signal: &str) {
        let id = self.0.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    fn output(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().expect("iproute2 is installed");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "`ip {}` (these tests need root): {said}", args.join(" "));
}

fn report(output: &Output) -> Value {
    let error = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default())
        .unwrap_or_else(|_| panic!("no report but '{text}', {error}"))
}

/// The report of a run that must have gone well.
fn good(output: &Output) -> Value {
    let report = report(output);
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert_eq!(report["ok"], true);
    assert_eq!((&report["errors"], &report["timeouts"]), (&0.into(), &0.into()), "{report}");
    report
}

/// A file of `mib` MiB.
fn volume(folder: &Path, mib: usize) -> std::path::PathBuf {
    let path = folder.join("volume");
    fs::write(&path, vec![0u8; mib << 20]).unwrap();
    path
}

#[test]
fn the_pair_measures_itself_on_both_links_and_at_both_mtus() {
    for (link, mtu, segments) in [("auto", "9000", 1), ("auto", "1500", 1), ("af-packet", "9000", 5)] {
        let output = Command::new(BENCH)
            .args(["ceiling", "link", "--pair", "--json", "--ops", "3000", "--link", link, "--mtu", mtu])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let both = report(&output);
        let (load, server) = (&both["load"], &both["server"]);
        assert_eq!((&load["ok"], &load["operations"]), (&true.into(), &3000.into()), "{both}");
        assert!(server["reads"].as_u64().unwrap() >= 3000, "{both}");
        assert!(server["link"]["segments"].as_u64().unwrap() >= segments, "{both}");
        let frames = load["frames"].as_u64().unwrap();
        assert_eq!(frames, if mtu == "1500" { 4 * 3000 } else { 3000 }, "a block is cut as the MTU asks");
        let latency = &load["read_latency_us"];
        let order = ["min", "p50", "p90", "p99", "p99_9", "max"].map(|name| latency[name].as_f64().unwrap());
        assert!(order.is_sorted() && order[0] > 0.0, "{latency}");
    }
    let left = Command::new("ip").arg("netns").output().unwrap();
    assert!(!String::from_utf8_lossy(&left.stdout).contains("tbench-"), "namespaces are left behind");
}

#[test]
fn several_cores_share_the_queues_of_a_pair() {
    let args = ["ceiling", "link", "--pair", "--json", "--ops", "4000", "--cores", "2", "--link", "af-xdp"];
    let output = Command::new(BENCH).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let both = report(&output);
    assert_eq!((&both["load"]["ok"], &both["load"]["operations"]), (&true.into(), &4000.into()), "{both}");
    // With fewer queues than cores there is nothing to share.
    let net = Net::new(1500);
    let serve = ["ceiling", "link", "--interface", "eth0", "--cores", "3"];
    let output = Net::command(&net.server, BENCH, &serve).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("1 queues") && error.contains("3 cores"), "{error}");
}

#[test]
fn a_target_that_keeps_nothing_is_caught() {
    let net = Net::new(9000);
    let server = net.serve(BENCH, &["ceiling", "link", "--interface", "eth0", "--size", "4MiB", "--json"]);
    let output = net.aoe(&["--mixed", "50", "--verify", "--ops", "4000", "--window", "16"]);
    let report = report(&output);
    assert_eq!(output.status.code(), Some(1), "{report}");
    // Its answers are frame memory that was used before: old data, data of other sectors, halves.
    let found = ["lost_sectors", "torn_sectors", "wrong_sectors"];
    let found: u64 = found.iter().map(|name| report["verify"][name].as_u64().unwrap()).sum();
    assert!(found > 1000 && found <= report["verify"]["checked_sectors"].as_u64().unwrap(), "{report}");
    assert_eq!((&report["ok"], &report["errors"]), (&false.into(), &0.into()));
    server.signal("-TERM");
    let output = server.output();
    assert!(output.status.success());
    let served: Value = serde_json::from_slice(&output.stdout).unwrap();
    let sum = served["reads"].as_u64().unwrap() + served["writes"].as_u64().unwrap();
    assert!(sum >= 4000 && served["writes"].as_u64().unwrap() > 1000, "{served}");
}

#[test]
fn what_was_written_is_read_back_and_planted_damage_is_found() {
    let (net, folder) = (Net::new(9000), tempfile::tempdir().unwrap());
    let (file, log) = (volume(folder.path(), 16), folder.path().join("log"));
    let log = log.to_str().unwrap();
    let _server = net.vblade(&file);
    let args =
        ["--mixed", "40", "--verify-log", log, "--ops", "20000", "--offset", "1MiB", "--block", "12KiB"];
    let run = good(&net.aoe(&args));
    assert!(run["verify"]["checked_sectors"].as_u64().unwrap() > 10_000, "{run}");
    let check = good(&net.aoe(&["--check-log", log]));
    assert_eq!(check["kind"], "check");
    let known = check["verify"]["checked_sectors"].as_u64().unwrap();
    assert!(known > 20_000 && check["verify"]["unknown_sectors"] == 0, "{check}");

    // One sector gone, one stale by taking its neighbour's place, one half written.
    let mut volume = fs::File::options().read(true).write(true).open(&file).unwrap();
    let mut plant = |lba: u64, at: u64, bytes: &[u8]| {
        volume.seek(SeekFrom::Start(lba * SECTOR + at)).unwrap();
        volume.write_all(bytes).unwrap();
    };
    plant(4000, 0, &[0; 512]);
    plant(5000, 300, b"not what was written");
    let mut neighbour = [0; 512];
    fs::File::open(&file)
        .and_then(|mut file| {
            file.seek(SeekFrom::Start(6001 * SECTOR))?;
            file.read_exact(&mut neighbour)
        })
        .unwrap();
    plant(6000, 0, &neighbour);
    let output = net.aoe(&["--check-log", log]);
    let check = report(&output);
    assert_eq!(output.status.code(), Some(1), "{check}");
    let found = &check["verify"];
    assert_eq!(
        ["lost_sectors", "torn_sectors", "wrong_sectors"].map(|name| found[name].as_u64().unwrap()),
        [1, 1, 1],
        "{found}"
    );
    let at: Vec<_> =
        found["examples"].as_array().unwrap().iter().map(|one| one["lba"].as_u64().unwrap()).collect();
    assert_eq!(at, [4000, 5000, 6000]);
}

#[test]
fn a_target_that_is_killed_and_comes_back_costs_a_gap_and_no_error() {
    for initiator in ["steady", "linux"] {
        let (net, folder) = (Net::new(9000), tempfile::tempdir().unwrap());
        let file = volume(folder.path(), 8);
        let mut server = net.vblade(&file);
        let args =
            ["--mixed", "50", "--verify", "--seconds", "6", "--rate", "2000", "--initiator", initiator];
        let load = Process(Some(net.aoe_command(&args).spawn().unwrap()));
        std::thread::sleep(Duration::from_millis(1500));
        server.signal("-KILL");
        drop(server);
        std::thread::sleep(Duration::from_millis(1500));
        server = net.vblade(&file);
        let run = good(&load.output());
        let gap_ms = run["longest_gap_ms"].as_f64().unwrap();
        assert!((1400.0..5000.0).contains(&gap_ms), "{run}");
        let unstalled_ms = run["longest_unstalled_gap_ms"].as_f64().unwrap();
        assert!(unstalled_ms > 1000.0 && unstalled_ms <= gap_ms, "{run}");
        assert!(run["retransmits"].as_u64().unwrap() > 0 && !run["gaps"].as_array().unwrap().is_empty());
        drop(server);
    }
}

#[test]
fn a_target_that_stays_away_fails_the_run_in_time() {
    let (net, folder) = (Net::new(1500), tempfile::tempdir().unwrap());
    let file = volume(folder.path(), 8);
    let server = net.vblade(&file);
    let load = Process(Some(net.aoe_command(&["--seconds", "20s", "--timeout", "2s"]).spawn().unwrap()));
    std::thread::sleep(Duration::from_millis(1000));
    let killed = Instant::now();
    drop(server);
    let output = load.output();
    let report = report(&output);
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert_eq!(report["timeouts"], 32, "{report}");
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
}

#[test]
fn a_signal_ends_a_run_cleanly() {
    let (net, folder) = (Net::new(9000), tempfile::tempdir().unwrap());
    let file = volume(folder.path(), 8);
    let _server = net.vblade(&file);
    let log = folder.path().join("log");
    let args = [
        "--write",
        "--verify-log",
        log.to_str().unwrap(),
        "--until-stopped",
        "--rate",
        "1000",
        "--window",
        "4",
    ];
    let load = Process(Some(net.aoe_command(&args).spawn().unwrap()));
    std::thread::sleep(Duration::from_millis(1500));
    load.signal("-TERM");
    let run = good(&load.output());
    let seconds = run["seconds"].as_f64().unwrap();
    let (writes, expected) = (run["writes"].as_f64().unwrap(), seconds * 1000.0);
    assert!((expected * 0.8..expected * 1.2 + 2.0).contains(&writes), "the rate is kept: {run}");
    good(&net.aoe(&["--check-log", log.to_str().unwrap()]));
}

#[test]
fn what_cannot_be_measured_says_so_and_exits_with_2() {
    let net = Net::new(9000);
    ip(&["-n", &net.server, "link", "set", "eth0", "down"]);
    for (args, said) in [
        (&["--discover-timeout", "300ms"][..], "does not answer"),
        (&["--target", "1"], "SHELF.SLOT"),
        (&["--block", "100"], "multiple of 512"),
        (&["--check-log", "/nowhere"], "/nowhere"),
    ] {
        let output = net.aoe(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(error.contains(said) && output.stdout.is_empty(), "{args:?}: {error}");
    }
    let unknown = Net::command(&net.client, BENCH, &["aoe", "--interface", "nope", "--target", "1.1"]);
    let output = { unknown }.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nope"));
}
