//! `torusd`, `torusctl` and `torusblk` as processes, with the embedded store and a real etcd, and a fake data plane.
//!
//! The data plane is `examples/fake_dataplane.rs`, which cargo builds with the tests. Needs root and util-linux.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(40);

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

fn alive(pid: u32) -> bool {
    // A zombie that nobody has waited for is dead too.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or("Z").starts_with('Z'))
}

fn fake_data_plane() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_torusd")).parent().unwrap().join("examples/fake_dataplane");
    assert!(path.is_file(), "{} is missing: cargo build -p torus-control --examples", path.display());
    path
}

/// A place for one node: directories on a memory file system, and what runs there.
struct Place {
    dir: tempfile::TempDir,
    flags: Vec<String>,
    environment: Vec<(&'static str, &'static str)>,
    torusd: Option<Child>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("torusd-test-").tempdir_in("/dev/shm").unwrap();
        Self { dir, flags: Vec::new(), environment: Vec::new(), torusd: None }
    }

    fn with(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(|f| (*f).to_owned()));
        self
    }

    /// The name that it was given by a flag.
    fn name(&self) -> &str {
        self.flags.iter().find_map(|flag| flag.strip_prefix("--name=")).unwrap()
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            "--interface=lo".to_owned(),
            format!("--store={}:1GiB", self.path("store")),
            "--api=127.0.0.1:0".into(),
            format!("--state-dir={}", self.path("state")),
            format!("--run-dir={}", self.path("run")),
            format!("--dataplane={}", fake_data_plane().display()),
        ];
        arguments.retain(|a| {
            let flag = a.split('=').next().unwrap();
            !self.flags.iter().any(|own| own.starts_with(flag))
        });
        arguments.extend(self.flags.iter().cloned());
        arguments
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_torusd"));
        command.args(self.arguments()).envs(self.environment.iter().copied()).env_remove("TORUS_API");
        command
    }

    /// Starts torusd; its log goes on in one file.
    fn start(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        let child =
            self.command().stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        self.torusd = Some(child);
    }

    fn start_serving(&mut self) {
        self.start();
        wait_until("the data plane runs", || {
            self.status()
                .is_some_and(|s| s["data_plane"] == "running" && s["available_bytes"].as_u64() > Some(0))
        });
    }

    fn torusd_pid(&self) -> u32 {
        self.torusd.as_ref().unwrap().id()
    }

    fn end(&mut self, with: Signal) -> ExitStatus {
        let mut child = self.torusd.take().unwrap();
        signal(child.id(), with);
        child.wait().unwrap()
    }

    fn data_plane_pid(&self) -> Option<u32> {
        let pid = fs::read_to_string(self.path("run/dataplane.lock")).ok()?.trim().parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        String::from_utf8_lossy(&command)
            .contains(&self.path("run/map"))
            .then_some(pid)
            .filter(|pid| alive(*pid))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn tool(&self, tool: &str, arguments: &str) -> Output {
        let exe = match tool {
            "torusctl" => env!("CARGO_BIN_EXE_torusctl"),
            "torusblk" => env!("CARGO_BIN_EXE_torusblk"),
            other => panic!("{other}"),
        };
        Command::new(exe)
            .args(arguments.split_whitespace())
            .env("TORUS_API", format!("unix:{}", self.path("run/api.sock")))
            .output()
            .unwrap()
    }

    /// Runs a command that must succeed; what it prints.
    fn ok(&self, tool: &str, arguments: &str) -> String {
        let output = self.tool(tool, arguments);
        let (out, err) = texts(&output);
        assert!(output.status.success(), "{tool} {arguments}: {err}\n{}", self.log());
        out
    }

    /// Runs a command that must fail with a code; its message.
    fn fails(&self, tool: &str, arguments: &str, code: i32) -> String {
        let output = self.tool(tool, arguments);
        let (out, err) = texts(&output);
        assert_eq!(output.status.code(), Some(code), "{tool} {arguments}: {out}{err}");
        err
    }

    fn json(&self, tool: &str, arguments: &str) -> Value {
        serde_json::from_str(&self.ok(tool, &format!("{arguments} --json"))).unwrap()
    }

    fn status(&self) -> Option<Value> {
        let output = self.tool("torusctl", "status --json");
        serde_json::from_slice(&output.stdout).ok().filter(|_| output.status.success())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(child) = &mut self.torusd {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(pid) = self.data_plane_pid() {
            signal(pid, Signal::KILL);
        }
        if std::thread::panicking() {
            eprintln!("--- log of torusd\n{}", self.log());
        }
    }
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// An etcd server of its own.
struct Etcd {
    dir: tempfile::TempDir,
    client: u16,
    peer: u16,
    process: Option<Child>,
}

impl Etcd {
    fn start() -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut etcd =
            Self { dir: tempfile::tempdir().unwrap(), client: free(), peer: free(), process: None };
        etcd.run();
        etcd
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client)
    }

    fn run(&mut self) {
        let (client, peer) = (self.url(), format!("http://127.0.0.1:{}", self.peer));
        let child = Command::new("/usr/bin/etcd")
            .args(["--name", "one", "--data-dir", self.dir.path().to_str().unwrap(), "--unsafe-no-fsync"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("one={peer}"), "--log-level", "error"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("these tests need Debian's etcd-server");
        self.process = Some(child);
    }

    fn stop(&mut self) {
        let mut child = self.process.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if self.process.is_some() {
            self.stop();
        }
    }
}

#[test]
fn a_volume_from_create_to_delete_by_the_commands() {
    let mut place = Place::new();
    place.start_serving();
    let said = place.ok("torusctl", "volume create v 100MiB");
    assert!(said.contains("volume v is ready: 100 MiB, 1 copy (the default here)"), "{said}");
    let said = place.ok("torusctl", "volume create w 5MiB --copies 1");
    assert!(said.contains("8 MiB (rounded up to whole extents), 1 copy, on node"), "{said}");
    assert!(place.fails("torusctl", "volume create v 1MiB", 1).contains("a volume v exists"));
    assert!(place.fails("torusctl", "volume create x 0", 1).contains("size 0"));
    assert!(place.fails("torusctl", "volume create x 2TiB", 1).contains("torusctl store add"));
    assert!(place.fails("torusctl", "volume create x 1MiB --copies 2", 1).contains("use --copies 1"));
    assert!(place.fails("torusctl", "volume create -- -x 1MiB", 1).contains("not a valid name"));
    place.fails("torusctl", "volume create x 5potatoes", 2);
    place.fails("torusctl", "volume", 2);
    place.fails("torusctl", "volume show nothing", 1);

    let said = place.ok("torusblk", "aoe v 1.1");
    assert!(said.contains("v (100 MiB) is at 1.1") && said.contains("/dev/etherd/e1.1"), "{said}");
    let said = place.ok("torusblk", "aoe w lo 1 2");
    assert!(said.contains("at 1.2"), "{said}");
    assert!(place.fails("torusblk", "aoe w 1.3", 1).contains("torusblk unexport w"));
    place.fails("torusblk", "aoe w 1.255", 2);
    place.fails("torusblk", "aoe w lo 1", 2);
    let list = place.ok("torusblk", "list");
    let lines: Vec<_> = list.lines().collect();
    assert!(lines[0].starts_with("ADDRESS  VOLUME"), "{list}");
    assert!(lines[1].starts_with("1.1      v") && lines[1].contains("serving"), "{list}");
    assert!(lines[1].find("serving") == lines[2].find("serving"), "columns are aligned: {list}");
    assert!(place.fails("torusctl", "volume delete v", 1).contains("exported at 1.1"));
    assert!(place.fails("torusctl", "volume resize v 8MiB", 1).contains("--allow-data-loss"));
    assert!(place.ok("torusctl", "volume resize v 200MiB").contains("200 MiB"));
    assert!(place.ok("torusblk", "unexport v").contains("no longer exported"));
    assert!(place.fails("torusblk", "unexport v", 1).contains("not exported"));
    assert!(place.ok("torusctl", "volume resize v 8MiB --allow-data-loss").contains("8 MiB"));
    assert!(place.ok("torusctl", "volume delete v").contains("volume v is deleted"));
    place.ok("torusblk", "unexport w");
    assert_eq!(
        place.ok("torusblk", "aoe w"),
        place.ok("torusblk", "aoe w 1.1"),
        "the next free address is 1.1"
    );

    let volumes = place.json("torusctl", "volume list");
    assert_eq!(volumes["volumes"].as_array().unwrap().len(), 1);
    assert_eq!(volumes["volumes"][0]["export"], "1.1");
    let node = place.ok("torusctl", "node show");
    for text in
        ["native copy", "durable (every write flushed)", "read p99", "9000", "RX RING FULL", "serves on   lo"]
    {
        assert!(node.contains(text), "{text} in {node}");
    }
    assert!(place.ok("torusctl", "init").starts_with("nothing to do"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(place.ok("torusctl", &format!("completion {shell}")).contains("volume"));
        assert!(place.ok("torusblk", &format!("completion {shell}")).contains("unexport"));
    }
    let version = place.json("torusctl", "version");
    assert_eq!(version["version"], version["torusd"]);
    let refused = place.tool("torusctl", "--json volume show nothing");
    let body: Value = serde_json::from_slice(&refused.stderr).unwrap();
    assert_eq!(body["error"]["code"], "no_such_volume");

    assert_eq!(place.end(Signal::TERM).code(), Some(0));
    assert_eq!(place.data_plane_pid(), None, "it has drained");
    assert!(place.fails("torusctl", "status", 3).contains("check that torusd runs"));
    // What was made is still there after a restart.
    place.start_serving();
    assert_eq!(place.json("torusctl", "volume show w")["volume"]["export"], "1.1");
    wait_until("served again", || place.json("torusblk", "list")["exports"][0]["state"] == "serving");
}

#[test]
fn slow_and_failing_volumes_are_waited_for_and_said() {
    let mut place = Place::new();
    place.environment.push(("FAKE_ALLOCATE_MS", "1500"));
    place.start_serving();
    let made = place.json("torusctl", "volume create v 100MiB --no-wait");
    assert_eq!(made["volume"]["state"], "creating");
    wait_until("progress is seen", || {
        place.json("torusctl", "volume show v")["volume"]["progress"]["done_bytes"].as_u64() > Some(0)
    });
    wait_until("it is ready", || place.json("torusctl", "volume show v")["volume"]["state"] == "ready");
    assert!(place.ok("torusctl", "volume create w 8MiB").contains("is ready"));
    assert_eq!(place.end(Signal::TERM).code(), Some(0));

    place.environment = vec![("FAKE_FAIL_VOLUMES", "the disk is on fire")];
    place.start();
    wait_until("it answers", || place.status().is_some_and(|s| s["data_plane"] == "running"));
    wait_until("the store is ready", || {
        place.status().is_some_and(|s| s["available_bytes"].as_u64() > Some(0))
    });
    assert!(place.fails("torusctl", "volume create x 8MiB", 1).contains("the disk is on fire"));
    assert!(place.ok("torusctl", "volume delete x").contains("deleted"));
}

#[test]
fn a_killed_torusd_leaves_the_data_plane_and_finds_it_again() {
    let mut place = Place::new();
    place.start_serving();
    place.ok("torusctl", "volume create v 8MiB");
    place.ok("torusblk", "aoe v");
    let pid = place.data_plane_pid().unwrap();
    for _ in 0..3 {
        assert_eq!(place.end(Signal::KILL).signal(), Some(9));
        assert!(alive(pid));
        place.start_serving();
        assert_eq!(place.data_plane_pid(), Some(pid), "the same process");
    }
    assert!(place.log().contains("re-attached"));
    // An upgrade leaves it running too, with a clean exit.
    for _ in 0..5 {
        assert_eq!(place.end(Signal::USR1).code(), Some(0));
        std::thread::sleep(Duration::from_millis(100));
        assert!(alive(pid));
        place.start_serving();
        assert_eq!(place.data_plane_pid(), Some(pid));
    }
    // An adopted one that is killed is noticed and replaced.
    signal(pid, Signal::KILL);
    wait_until("a new data plane", || place.data_plane_pid().is_some_and(|new| new != pid));
    wait_until("served again", || place.json("torusblk", "list")["exports"][0]["state"] == "serving");
    // Both at once: the next torusd starts a new one with what was exported.
    let pid = place.data_plane_pid().unwrap();
    place.end(Signal::KILL);
    signal(pid, Signal::KILL);
    place.start_serving();
    assert_ne!(place.data_plane_pid(), Some(pid));
    wait_until("served again", || place.json("torusblk", "list")["exports"][0]["state"] == "serving");
    assert_eq!(place.end(Signal::INT).code(), Some(0));
}

#[test]
fn a_crashed_data_plane_is_restarted_again_and_again() {
    let mut place = Place::new();
    place.start_serving();
    for _ in 0..4 {
        let pid = place.data_plane_pid().unwrap();
        signal(pid, Signal::KILL);
        wait_until("a new data plane", || place.data_plane_pid().is_some_and(|new| new != pid));
    }
    wait_until("it is seen running", || place.status().is_some_and(|s| s["data_plane"] == "running"));
    assert!(place.log().contains("killed by signal 9"));
}

/// Whatever was killed or lost before it.
#[test]
fn every_start_of_a_data_plane_has_a_larger_number() {
    let mut place = Place::new();
    place.start_serving();
    let numbers = |place: &Place| -> Vec<u64> {
        let text = fs::read_to_string(place.path("run/starts")).unwrap_or_default();
        text.lines().map(|line| line.parse().unwrap()).collect()
    };
    for started in 1..3 {
        let pid = place.data_plane_pid().unwrap();
        signal(pid, Signal::KILL);
        wait_until("a new data plane", || place.data_plane_pid().is_some_and(|new| new != pid));
        wait_until("it has read its number", || numbers(&place).len() > started);
    }
    // One that is found running keeps its number.
    place.end(Signal::KILL);
    place.start_serving();
    // With the state directory's number, or with the map's where that is lost.
    for lost in ["run/map", "state/data-plane-start"] {
        let pid = place.data_plane_pid().unwrap();
        place.end(Signal::KILL);
        signal(pid, Signal::KILL);
        wait_until("it is gone", || !alive(pid));
        fs::remove_file(place.path(lost)).unwrap();
        place.start_serving();
    }
    let numbers = numbers(&place);
    assert!(numbers.len() == 5 && numbers[0] > 0, "{numbers:?}");
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{numbers:?}");
    assert_eq!(place.end(Signal::TERM).code(), Some(0));
    fs::write(place.path("state/data-plane-start"), "many").unwrap();
    place.start();
    assert_eq!(place.torusd.take().unwrap().wait().unwrap().code(), Some(1));
    assert!(place.log().contains("does not hold a number"), "{}", place.log());
}

#[test]
fn a_refused_configuration_stops_torusd_with_code_2() {
    let mut place = Place::new();
    place.environment.push(("FAKE_REFUSE", "store /x belongs to another cluster; name another"));
    place.start();
    let status = place.torusd.take().unwrap().wait().unwrap();
    assert_eq!(status.code(), Some(2), "{}", place.log());
    assert!(place.log().contains("error: store /x belongs to another cluster"), "{}", place.log());
    // Corrected flags are enough: the refused store is forgotten.
    place.environment.clear();
    place.flags.push(format!("--store={}:1GiB", place.path("better")));
    place.start_serving();
    let stores = place.json("torusctl", "store list");
    assert_eq!(stores["stores"].as_array().unwrap().len(), 1, "{stores}");
}

#[test]
fn a_second_torusd_is_refused() {
    let mut place = Place::new();
    place.start_serving();
    let refused = |flag: String| {
        let output = place.command().arg(flag).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        texts(&output).1
    };
    let text = refused("--zone=same".into());
    assert!(text.contains("another torusd") && text.contains(&place.torusd_pid().to_string()), "{text}");
    let other_run = format!("--run-dir={}", place.path("run2"));
    let mut second = Place::new().with(&[&other_run, &format!("--state-dir={}", place.path("state"))]);
    second.start();
    assert_eq!(second.torusd.take().unwrap().wait().unwrap().code(), Some(1));
    assert!(second.log().contains("--state-dir"), "{}", second.log());
    let pid = place.data_plane_pid();
    assert!(pid.is_some() && place.status().is_some(), "the first goes on");
}

/// One wrong thing each: a line that says what and the next step, code 1, and nothing started.
#[test]
fn bad_input_is_refused_before_anything_starts() {
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = format!("--api={}", busy.local_addr().unwrap());
    let cases: &[(&[&str], &[&str])] = &[
        (&["--interface=nope0"], &["there is no interface nope0", "these exist"]),
        (&["--interface=lo,lo"], &["lo is named twice"]),
        (&["--store=/nonexistent/store"], &["does not exist", ":SIZE"]),
        (&["--store=/nonexistent/store:1GiB"], &["folder /nonexistent does not exist", "create it"]),
        (&["--store=/dev/shm/torusd-test-none:1MiB"], &["too small", "64 MiB"]),
        (&["--store=/dev/null"], &["neither a file nor a block device"]),
        (&["--name=-x"], &["not a valid name", "--name"]),
        (&["--peer-addr=nonsense"], &["\"nonsense\" is not an address for peers", "IP:PORT"]),
        (&["--cluster-key-file=/nonexistent"], &["cannot read the cluster key file /nonexistent"]),
        (&["--cluster-key-file=/dev/null"], &["cluster key file /dev/null"]),
        (&["--cores=999"], &["CPU 999"]),
        (&["--cores=a"], &["not a list of CPUs"]),
        (&["--dataplane=/nonexistent/dp"], &["/nonexistent/dp does not exist"]),
        (&[&busy], &["cannot listen on", "--api"]),
        (&["--etcd=http://bad host:1"], &["etcd"]),
    ];
    for (flags, expected) in cases {
        let place = Place::new().with(flags);
        let output = place.command().output().unwrap();
        let (_, err) = texts(&output);
        assert_eq!(output.status.code(), Some(1), "{flags:?}: {err}");
        assert!(err.lines().last().unwrap_or("").starts_with("error: "), "{flags:?}: {err}");
        for text in *expected {
            assert!(err.contains(text), "{flags:?}: {text:?} in {err}");
        }
        assert_eq!(place.data_plane_pid(), None);
    }
    let usage = Command::new(env!("CARGO_BIN_EXE_torusd")).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
}

/// In a network namespace of its own `lo` is down; without capabilities nothing can be served.
#[test]
fn the_machine_is_checked_too() {
    let place = Place::new();
    let run = |program: &str, before: &[&str]| {
        let mut command = Command::new(program);
        command.args(before).arg(env!("CARGO_BIN_EXE_torusd")).args(place.arguments());
        let output = command.output().expect("these tests need util-linux");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        texts(&output).1
    };
    let down = run("unshare", &["--net"]);
    assert!(down.contains("interface lo is down; run `ip link set dev lo up`"), "{down}");
    let script = "ip link set dev lo mtu 1059 up && exec \"$@\"";
    let small = run("unshare", &["--net", "sh", "-c", script, "sh"]);
    assert!(small.contains("lo has MTU 1059, at least 1060"), "{small}");
    let powerless = run("setpriv", &["--bounding-set=-net_raw"]);
    assert!(powerless.contains("missing CAP_NET_RAW"), "{powerless}");
}

#[test]
fn a_cluster_waits_for_init_and_outlives_its_etcd() {
    let mut etcd = Etcd::start();
    let url = format!("--etcd={}", etcd.url());
    let mut place = Place::new().with(&[&url, "--name=n1"]);
    place.start();
    wait_until("the API answers and says what is missing", || {
        place.status().is_some_and(|s| s["problem"].as_str().unwrap().contains("torusctl init"))
    });
    assert!(place.fails("torusctl", "volume create v 8MiB", 1).contains("torusctl init"));
    assert_eq!(place.data_plane_pid(), None);
    wait_until("the log says it", || place.log().contains("waiting: the cluster is not initialised"));
    assert!(place.ok("torusctl", "init").starts_with("initialised cluster"));
    assert!(place.ok("torusctl", "init").starts_with("nothing to do"));
    wait_until("a store is ready", || {
        place.status().is_some_and(|s| s["available_bytes"].as_u64() > Some(0) && s["nodes_live"] == 1)
    });
    place.ok("torusctl", "volume create v 8MiB");
    place.ok("torusblk", "aoe v");
    let pid = place.data_plane_pid().unwrap();

    etcd.stop();
    wait_until("the loss is seen", || {
        place.status().is_some_and(|s| s["metadata"].as_str().unwrap().starts_with("disconnected since"))
    });
    let said = place.fails("torusctl", "volume create w 8MiB", 1);
    assert!(said.contains("bring the metadata store back"), "{said}");
    let list = place.tool("torusctl", "volume list");
    let (out, err) = texts(&list);
    assert!(list.status.success() && out.contains("v ") && err.contains("disconnected since"), "{out}{err}");
    assert_eq!(place.data_plane_pid(), Some(pid));

    // torusd restarted without etcd: what is published stays as it is.
    place.end(Signal::KILL);
    place.start();
    wait_until("it is found again", || place.status().is_some_and(|s| s["data_plane"] == "running"));
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(place.data_plane_pid(), Some(pid));
    place.fails("torusctl", "volume list", 1);

    // Both restarted without etcd: the last published state is served again.
    place.end(Signal::KILL);
    signal(pid, Signal::KILL);
    place.start();
    wait_until("a new data plane serves", || place.data_plane_pid().is_some_and(|new| new != pid));
    assert!(place.log().contains("serving the state that was published last"));
    let second = place.data_plane_pid();

    etcd.run();
    wait_until("it converges", || {
        place.status().is_some_and(|s| s["metadata"] == "connected" && s["nodes_live"] == 1)
    });
    wait_until("served", || place.json("torusblk", "list")["exports"][0]["state"] == "serving");
    place.ok("torusctl", "volume create w 8MiB");
    assert_eq!(place.data_plane_pid(), second, "without a restart");
    assert_eq!(place.end(Signal::TERM).code(), Some(0));
}

/// An etcd that hangs, longer than the lease lasts: changes fail in bounded time, serving and reading go on.
#[test]
fn a_paused_etcd_stops_changes_only() {
    let etcd = Etcd::start();
    let url = format!("--etcd={}", etcd.url());
    let mut place = Place::new().with(&[&url, "--name=n1"]);
    place.start();
    wait_until("it answers", || place.status().is_some_and(|s| s["metadata"] == "connected"));
    place.ok("torusctl", "init");
    wait_until("a store is ready", || {
        place.status().is_some_and(|s| s["available_bytes"].as_u64() > Some(0))
    });
    place.ok("torusctl", "volume create v 8MiB");
    let pid = place.data_plane_pid();
    let server = etcd.process.as_ref().unwrap().id();
    signal(server, Signal::STOP);
    let paused = Instant::now();
    let said = place.fails("torusctl", "volume create w 8MiB", 1);
    assert!(paused.elapsed() < Duration::from_secs(15), "{:?}", paused.elapsed());
    assert!(said.contains("metadata") && (said.contains("repeat")), "{said}");
    wait_until("the loss is seen", || {
        place.status().is_some_and(|s| s["metadata"].as_str().unwrap().starts_with("disconnected since"))
    });
    assert!(place.ok("torusctl", "volume list").contains("v "));
    std::thread::sleep(Duration::from_secs(12).saturating_sub(paused.elapsed()));
    signal(server, Signal::CONT);
    wait_until("it is followed again", || {
        place.status().is_some_and(|s| s["metadata"] == "connected" && s["nodes_live"] == 1)
    });
    wait_until("changes work again", || place.tool("torusctl", "volume create x 8MiB").status.success());
    assert_eq!(place.data_plane_pid(), pid);
}

#[test]
fn two_nodes_share_names_addresses_and_sight() {
    let etcd = Etcd::start();
    let url = format!("--etcd={}", etcd.url());
    let mut one = Place::new().with(&[&url, "--name=n1", "--zone=a"]);
    one.start();
    wait_until("it answers", || one.status().is_some_and(|s| s["metadata"] == "connected"));
    one.ok("torusctl", "init");
    let mut two = Place::new().with(&[&url, "--name=n2", &format!("--store={}", one.path("unused:1GiB"))]);
    two.start();
    wait_until("both are live with a store", || {
        two.status().is_some_and(|s| s["nodes_live"] == 2 && s["available_bytes"].as_u64() >= Some(2 << 30))
    });
    assert!(two.fails("torusctl", "volume create v 8MiB", 1).contains("2 copies are the default here"));
    two.ok("torusctl", "volume create v 600MiB --copies 1");
    assert!(one.fails("torusctl", "volume create v 8MiB --copies 1", 1).contains("a volume v exists"));
    one.ok("torusctl", "volume create w 600MiB --copies 1");
    let volumes = one.json("torusctl", "volume list")["volumes"].as_array().unwrap().clone();
    assert_ne!(volumes[0]["node"], volumes[1]["node"], "the emptier store each time");
    one.ok("torusblk", "aoe v 1.1");
    assert!(two.fails("torusblk", "aoe w 1.1", 1).contains("1.1 belongs to volume v"));
    let shown = one.ok("torusctl", "node show n2");
    assert!(shown.contains("native copy") && shown.contains("ask the node itself"), "{shown}");

    // Whoever is asked, the node that serves answers.
    let serving = one.json("torusctl", "volume show v")["volume"]["node"].clone();
    for asked in [&one, &two] {
        let list = asked.json("torusblk", "clients v");
        assert_eq!((&list["node"], list["clients"].as_array().unwrap().len()), (&serving, 1), "{list}");
    }

    // So is a scrub: asked for at one node, done by the other, seen at both.
    let said = two.ok("torusctl", &format!("scrub start {} --wait", one.path("store")));
    assert!(said.contains("on node n1 is finished"), "{said}");
    for asked in [&one, &two] {
        let stores = asked.json("torusctl", "store list")["stores"].as_array().unwrap().clone();
        let scrub = |node: &str| stores.iter().find(|s| s["node"] == node).unwrap()["scrub"].clone();
        assert_eq!((&scrub("n1")["state"], scrub("n2")), (&"finished".into(), Value::Null));
    }

    // A name that is taken: the newcomer is not let in, and says so.
    let mut thief = Place::new().with(&[&url, "--name=n1"]);
    thief.start();
    assert_eq!(thief.torusd.take().unwrap().wait().unwrap().code(), Some(1));
    assert!(thief.log().contains("the name n1 belongs to node"), "{}", thief.log());

    // A node that is away confirms nothing: its volume's address stays taken until it is back.
    let holder = one.json("torusctl", "volume show v")["volume"]["node"].as_str().unwrap().to_owned();
    let (away, here) = if holder == "n1" { (&mut one, &mut two) } else { (&mut two, &mut one) };
    assert_eq!(away.end(Signal::TERM).code(), Some(0));
    wait_until("it is seen down", || here.status().is_some_and(|s| s["nodes_live"] == 1));
    let said = here.fails("torusblk", "clients v", 1);
    assert!(said.contains("does not answer at 127.0.0.1:") && said.contains("ask it there"), "{said}");
    here.ok("torusblk", "unexport v --no-wait");
    assert!(here.fails("torusblk", "aoe w 1.1", 1).contains("export is ending"));
    away.start_serving();
    wait_until("the address is free", || here.tool("torusblk", "aoe w 1.1").status.success());
}

/// Three nodes, whose data planes say that they replicate: the head is killed with its torusd, and its lease has long to run.
#[test]
fn a_replicated_volume_gets_another_head_when_its_head_is_silent() {
    let etcd = Etcd::start();
    let mut places: Vec<Place> = Vec::new();
    for n in 1..=3 {
        let flags = [
            format!("--etcd={}", etcd.url()),
            format!("--name=n{n}"),
            format!("--zone=z{n}"),
            format!("--peer-addr=127.0.0.1:{}", 4000 + 100 * n),
        ];
        let mut place = Place::new().with(&flags.each_ref().map(String::as_str));
        place.environment.push(("FAKE_REPLICATES", "1"));
        place.start();
        if n == 1 {
            wait_until("it answers", || place.status().is_some_and(|s| s["metadata"] == "connected"));
            place.ok("torusctl", "init");
        }
        places.push(place);
    }
    wait_until("all are live with a store", || {
        let status = places[0].status();
        status.is_some_and(|s| s["nodes_live"] == 3 && s["available_bytes"].as_u64() >= Some(3 << 30))
    });
    assert!(places[0].fails("torusctl", "volume create v 8MiB --copies 4", 1).contains("there are 3"));
    let said = places[0].ok("torusctl", "volume create v 8MiB --copies 3 --min-copies 2");
    assert!(said.contains("volume v is ready: 8 MiB, 3 copies"), "{said}");
    places[0].ok("torusblk", "aoe v 1.1");
    let shown = |place: &Place| place.json("torusctl", "volume show v")["volume"].clone();
    let volume = shown(&places[0]);
    assert_eq!(
        (&volume["copies_in_sync"], &volume["head"]["state"]),
        (&3.into(), &"serving".into()),
        "{volume}"
    );
    assert_eq!(volume["owners"].as_array().unwrap().len(), 3);
    let text = places[0].ok("torusctl", "volume show v");
    assert!(text.contains("must be in sync") && text.contains("in sync on node n2 in"), "{text}");
    assert!(!places.iter().any(|place| place.log().contains("head now")), "nobody is silent");

    let head = places.iter().position(|place| volume["head"]["node"] == *place.name()).unwrap();
    // What the head wishes is made, as long as two copies stay in sync.
    let owners = volume["owners"].as_array().unwrap();
    let stores: Vec<_> = owners.iter().filter(|o| o["node"] != volume["head"]["node"]).collect();
    let ids: Vec<&str> = stores.iter().map(|owner| owner["store_id"].as_str().unwrap()).collect();
    let eject = |ids: &[&str]| fs::write(places[head].path("run/ejected"), ids.join("\n")).unwrap();
    let in_sync = || shown(&places[0])["copies_in_sync"].clone();
    eject(&ids[..1]);
    wait_until("one copy is stale", || in_sync() == 2);
    assert!(places[0].ok("torusctl", "volume list").contains("2 of 3"));
    assert!(places[0].ok("torusblk", "list").contains("2 of 3"));
    assert!(places[0].ok("torusblk", "show v").contains("2 of 3"));
    eject(&ids);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(in_sync(), 2, "two must stay");
    eject(&[]);
    wait_until("all are in sync again", || in_sync() == 3);
    let id = fs::read_to_string(places[head].path("state/node-id")).unwrap();
    let pid = places[head].data_plane_pid().unwrap();
    places[head].end(Signal::KILL);
    signal(pid, Signal::KILL);
    let others: Vec<usize> = (0..3).filter(|place| *place != head).collect();
    // One alone does not replace it while the other still grants it something.
    fs::write(places[others[0]].path("run/silent"), &id).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(shown(&places[others[0]])["head"]["takeover"], 1, "the other one vetoes");
    fs::write(places[others[1]].path("run/silent"), &id).unwrap();
    let begun = Instant::now();
    let asked = &places[others[0]];
    wait_until("another head serves", || {
        let volume = shown(asked);
        volume["head"]["takeover"] == 2 && volume["head"]["state"] == "serving"
    });
    // The fake data plane looks every half second.
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    wait_until("its export is served", || asked.json("torusblk", "show v")["export"]["state"] == "serving");
    let log: String = others.iter().map(|place| places[*place].log()).collect();
    assert_eq!(log.matches("this node is head now").count(), 1, "{log}");
    // Deleting waits for the owner that is away.
    asked.ok("torusblk", "unexport v");
    asked.ok("torusctl", "volume delete v --no-wait");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(shown(asked)["state"], "purging");
    places[head].start();
    let asked = &places[others[0]];
    wait_until("it has confirmed", || {
        asked.json("torusctl", "volume list")["volumes"] == Value::Array(Vec::new())
    });
}

#[test]
fn stores_are_added_and_removed_while_it_runs() {
    let mut place = Place::new();
    place.start_serving();
    let more = place.path("more");
    assert!(place.fails("torusctl", &format!("store add {more}"), 1).contains("does not exist"));
    place.fails("torusctl", "store add relative:1GiB", 1);
    place.ok("torusctl", &format!("store add {more}:2GiB"));
    wait_until("it is ready", || {
        place.json("torusctl", "store list")["stores"]
            .as_array()
            .unwrap()
            .iter()
            .all(|s| s["state"] == "ready")
    });
    place.ok("torusctl", "volume create v 1500MiB");
    assert_eq!(place.json("torusctl", "volume show v")["volume"]["store"], more.as_str());
    assert!(place.fails("torusctl", &format!("store remove {more}"), 1).contains("1 volume(s) are on"));
    place.ok("torusctl", "volume delete v");
    place.ok("torusctl", &format!("store remove {more}"));
    wait_until("it is gone", || {
        place.json("torusctl", "store list")["stores"].as_array().unwrap().len() == 1
    });
    assert!(Path::new(&more).exists(), "what is on the disk stays");

    // One that was added and is gone does not keep the node from starting.
    place.ok("torusctl", &format!("store add {more}"));
    wait_until("it is back", || {
        place.json("torusctl", "store list")["stores"].as_array().unwrap().len() == 2
    });
    wait_until("it is ready", || place.json("torusctl", "status")["stores"] == 2);
    assert_eq!(place.end(Signal::TERM).code(), Some(0));
    fs::remove_file(&more).unwrap();
    place.start_serving();
    let problem = place.status().unwrap()["problem"].as_str().unwrap().to_owned();
    assert!(problem.contains(&format!("torusctl store remove {more}")), "{problem}");
    place.ok("torusctl", &format!("store remove {more}"));
    wait_until("nothing is wrong", || place.status().is_some_and(|s| s["problem"] == ""));
    assert!(!Path::new(&more).exists(), "a known store is never made anew");
}

#[test]
fn a_store_is_scrubbed_by_the_commands() {
    let mut place = Place::new();
    place.environment = vec![("FAKE_SCRUB_MS", "4000")];
    place.start_serving();
    let store = place.path("store");
    assert!(place.ok("torusctl", "scrub status").contains("never"));
    assert!(place.fails("torusctl", &format!("scrub stop {store}"), 1).contains("torusctl scrub status"));
    assert!(place.fails("torusctl", &format!("scrub resume {store}"), 1).contains("torusctl scrub start"));
    assert!(place.fails("torusctl", "scrub start /none", 1).contains("torusctl store list"));
    place.fails("torusctl", "scrub start", 2);
    place.fails("torusctl", "scrub start --all /x", 2);
    place.fails("torusctl", "scrub start --all --rate much", 2);
    assert!(place.ok("torusctl", "scrub stop --all").contains("nothing to do"));

    let said = place.ok("torusctl", &format!("scrub start {store} --rate 1MiB"));
    assert!(said.contains("run 1, at most 1 MiB/s"), "{said}");
    let scrub = || place.json("torusctl", &format!("scrub status {store}"))["store"]["scrub"].clone();
    wait_until("it runs", || scrub()["state"] == "running" && scrub()["done_bytes"].as_u64() > Some(0));
    let shown = place.ok("torusctl", "node show");
    assert!(
        shown.contains("journal") && shown.contains("running ") && shown.contains("LOST BLOCKS"),
        "{shown}"
    );
    let said = place.ok("torusctl", "scrub stop --all");
    assert!(said.contains("is stopped: `torusctl scrub resume` goes on with run 1"), "{said}");
    wait_until("it is stopped", || scrub()["state"] == "stopped");
    let done = scrub()["done_bytes"].as_u64().unwrap();

    // It stays stopped when torusd is killed, and goes on where it was.
    place.end(Signal::KILL);
    place.start_serving();
    let scrub = || place.json("torusctl", &format!("scrub status {store}"))["store"]["scrub"].clone();
    wait_until("it is known again", || scrub()["done_bytes"] == done);
    let resumed = place.ok("torusctl", "scrub resume --all --wait");
    assert!(resumed.contains("is finished: 1 GiB read, 0 damaged block(s)"), "{resumed}");
    wait_until("it is recorded", || scrub()["finished_unix_s"].as_u64() > Some(0));
    assert_eq!((&scrub()["run"], &scrub()["done_bytes"]), (&1.into(), &(1u64 << 30).into()));
    assert_eq!(place.end(Signal::TERM).code(), Some(0));

    // One that is finished is not done again by a new data plane; what the next one finds is told.
    place.environment = vec![("FAKE_SCRUB_ERRORS", "3")];
    place.start_serving();
    assert_eq!((&scrub_of(&place)["state"], &scrub_of(&place)["errors"]), (&"finished".into(), &0.into()));
    let said = place.fails("torusctl", "scrub start --all --wait", 1);
    assert!(said.contains("damaged blocks were found in 1 of 1 store(s)"), "{said}");
    assert_eq!((&scrub_of(&place)["run"], &scrub_of(&place)["errors"]), (&2.into(), &3.into()));
    let list = place.ok("torusctl", "store list");
    assert!(list.contains("finished, 3 damaged") && list.contains("CHECKSUM ERRORS"), "{list}");
    let status = place.ok("torusctl", "scrub status");
    let lines: Vec<_> = status.lines().collect();
    assert_eq!(lines[0].find("SCRUB"), lines[1].find("finished"), "columns are aligned: {status}");
    for shell in ["bash", "zsh", "fish"] {
        let script = place.ok("torusctl", &format!("completion {shell}"));
        assert!(["scrub", "resume", "dump"].iter().all(|word| script.contains(word)), "{shell}");
    }
    for command in ["start", "stop", "resume", "status"] {
        assert!(place.ok("torusctl", &format!("scrub {command} --help")).contains("Examples:"), "{command}");
    }
    // One that is removed while its scrub is waited for, and one that another run replaces, end the waiting.
    place.end(Signal::TERM);
    place.environment = vec![("FAKE_SCRUB_MS", "60000")];
    place.start_serving();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| place.fails("torusctl", "scrub start --all --wait", 1));
        wait_until("it runs", || scrub_of(&place)["state"] == "running");
        place.ok("torusctl", "scrub stop --all");
        let said = waiting.join().unwrap();
        assert!(said.contains("was stopped at") && said.contains("torusctl scrub resume"), "{said}");
    });
}

fn scrub_of(place: &Place) -> Value {
    place.json("torusctl", "scrub status")["stores"][0]["scrub"].clone()
}

/// The data plane's program beside torusctl gets what is given, and its exit code and output are those of torusctl.
#[test]
fn offline_tools_are_those_of_the_data_plane_beside() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let torusctl = dir.path().join("torusctl");
    fs::copy(env!("CARGO_BIN_EXE_torusctl"), &torusctl).unwrap();
    let run = |arguments: &str, path: &str| {
        let mut command = Command::new(&torusctl);
        command.args(arguments.split_whitespace()).env("PATH", path).stdin(Stdio::piped());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.as_ref().unwrap();
        match std::io::Write::write_all(&mut stdin, b"yes\n") {
            // It ended without reading.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            written => written.unwrap(),
        }
        let output = child.wait_with_output().unwrap();
        let (out, err) = texts(&output);
        (output.status.code(), out, err)
    };
    let (code, _, err) = run("store check /x", "/nowhere");
    assert_eq!(code, Some(1));
    assert!(err.contains("neither beside torusctl nor in PATH; install it"), "{err}");

    let program = |folder: &Path, code: u8| {
        fs::create_dir_all(folder).unwrap();
        let script = format!("#!/bin/sh\nread line\necho \"$line: $*\"\necho trouble >&2\nexit {code}\n");
        let path = folder.join("torus-dataplane");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    let other = dir.path().join("other");
    let path = other.to_str().unwrap();
    program(&other, 7);
    let said = |code, words: &str| (Some(code), format!("yes: store {words}\n"), "trouble\n".to_owned());
    assert_eq!(run("store dump /x --journal", path), said(7, "dump /x --journal"));
    program(dir.path(), 3);
    assert_eq!(run("store check /x --data --json", path), said(3, "check /x --data --json"));
    assert_eq!(
        run("store format /x --size 1GiB --cluster c --force", path),
        said(3, "format /x --size 1GiB --cluster c --force")
    );
    for (verb, option) in [("format", "--shards N"), ("check", "--data"), ("dump", "--volume UUID")] {
        let (code, out, _) = run(&format!("store {verb} --help"), path);
        assert!(code == Some(0) && out.contains(option) && out.contains("Examples:"), "{out}");
    }
    assert_eq!(run("store check", path).0, Some(2));
}

#[test]
fn a_data_plane_that_hangs_is_reported() {
    let mut place = Place::new();
    place.environment.push(("FAKE_DEAF", "1"));
    place.start();
    wait_until("it runs", || place.status().is_some_and(|s| s["data_plane"] == "running"));
    wait_until("its silence is seen", || {
        place.ok("torusctl", "node list").contains("running, but gives no sign of life")
    });
}

/// What the initiators of the fake data plane were answered: the line of each answer, by volume.
fn answers(place: &Place) -> Vec<Vec<String>> {
    let text = fs::read_to_string(place.path("run/asked")).unwrap_or_default();
    text.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
}

/// Every answer says *done*, in order and once, and the desired state that brought it had the string.
fn assert_counted(place: &Place, volumes: &[&str], often: usize) {
    let all = answers(place);
    assert_eq!(all.len(), volumes.len() * often, "{all:?}");
    for volume in volumes {
        let id = place.json("torusblk", &format!("show {volume}"))["export"]["volume_id"].clone();
        let own: Vec<_> = all.iter().filter(|line| line[0] == id).collect();
        let numbers: Vec<_> = (1..=often).map(|number| number.to_string()).collect();
        assert!(own.iter().zip(&numbers).all(|(line, n)| line[1..] == [n, "Done", n]), "{own:?}");
        assert_eq!(place.ok("torusblk", &format!("config {volume}")).trim(), often.to_string());
    }
}

#[test]
fn changes_over_aoe_are_made_once_each_whenever_torusd_is_killed() {
    let mut place = Place::new();
    place.environment.push(("FAKE_ASK", "2000"));
    place.start_serving();
    for volume in ["v", "w"] {
        place.ok("torusctl", &format!("volume create {volume} 8MiB"));
        place.ok("torusblk", &format!("aoe {volume} --allow-aoe-config=02:00:00:00:00:01"));
    }
    let pid = place.data_plane_pid();
    for killed in 0..6 {
        let seen = answers(&place).len();
        wait_until("the initiators get on", || answers(&place).len() > seen + 17 * killed);
        place.end(Signal::KILL);
        place.start();
    }
    wait_until("all are answered", || answers(&place).len() == 4000);
    assert_eq!(place.data_plane_pid(), pid);
    assert_counted(&place, &["v", "w"], 2000);
    assert_eq!(place.end(Signal::TERM).code(), Some(0));
}

#[test]
fn settings_outlive_the_node_and_are_shown() {
    let mut place = Place::new();
    place.start_serving();
    place.ok("torusctl", "volume create v 8MiB");
    assert!(place.fails("torusblk", "masks v", 1).contains("v is not exported"));
    assert!(place.fails("torusblk", "aoe v --on eth7", 1).contains("it serves on: lo"));
    place.ok("torusblk", "aoe v lo 1 1 --allow-aoe-masks");
    assert_eq!(place.ok("torusblk", "config v --set hello\\"), "hello\\\\\n");
    let (one, two) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
    assert_eq!(place.ok("torusblk", &format!("masks v --add {one},{two}")), format!("{one}\n{two}\n"));
    assert_eq!(place.ok("torusblk", &format!("masks 1.1 --remove {one}")), format!("{two}\n"));
    assert_eq!(place.ok("torusblk", &format!("reserve v --for {two}")), format!("{two}\n"));
    place.ok("torusblk", &format!("policy v --allow-aoe-reserve={two}"));
    assert!(place.fails("torusblk", "config v --set-hex 0", 2).contains("two digits"));
    assert!(place.fails("torusblk", "masks v --add ff:ff:ff:ff:ff:ff", 1).contains("group address"));
    assert!(place.fails("torusblk", "masks v --add 00:00:00:00:00:00", 1).contains("all zeros"));
    assert_eq!(place.end(Signal::TERM).code(), Some(0));
    place.start_serving();
    wait_until("served again", || place.json("torusblk", "list")["exports"][0]["state"] == "serving");
    let clients = place.ok("torusblk", "clients v");
    let row = clients.lines().nth(1).unwrap().split_whitespace().take(10).collect::<Vec<_>>();
    assert_eq!(row[..4], ["02:00:00:00:00:01", "3", "4", "KiB"], "{clients}");
    let listed = place.json("torusblk", "clients 1.1");
    let client = &listed["clients"][0];
    assert_eq!((&client["counters"]["dropped_limit"], &client["in_flight_max"]), (&1.into(), &2.into()));
    assert!((100_000..126_000).contains(&client["read"]["max_ns"].as_u64().unwrap()), "{client}");
    let shown = place.ok("torusblk", "show v");
    for line in [
        "interfaces             lo",
        "config string          hello\\\\",
        "answers                02:00:00:00:00:02",
        "reserved for           02:00:00:00:00:02",
        "may set config string  none",
        "may edit masks         any",
        "may reserve            02:00:00:00:00:02",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    assert_eq!(place.ok("torusblk", "masks v --clear"), "every initiator is answered\n");
    assert_eq!(place.ok("torusblk", "reserve v --release"), "not reserved\n");
    assert_eq!(place.ok("torusblk", "config v --clear"), "\n");
}

/// Without etcd a change waits, is answered by nobody, and is made when etcd is back; over the API likewise.
#[test]
fn changes_over_aoe_wait_for_a_lost_etcd() {
    let mut etcd = Etcd::start();
    let url = format!("--etcd={}", etcd.url());
    let mut place = Place::new().with(&[&url, "--name=n1"]);
    place.environment.push(("FAKE_ASK", "1500"));
    place.start();
    wait_until("it answers", || place.status().is_some_and(|s| s["metadata"] == "connected"));
    place.ok("torusctl", "init");
    wait_until("a store is ready", || {
        place.status().is_some_and(|s| s["available_bytes"].as_u64() > Some(0))
    });
    place.ok("torusctl", "volume create v 8MiB");
    place.ok("torusblk", "aoe v --allow-aoe-config");
    wait_until("some are answered", || answers(&place).len() > 4);
    etcd.stop();
    wait_until("the loss is seen", || {
        place.status().is_some_and(|s| s["metadata"].as_str().unwrap().starts_with("disconnected since"))
    });
    let before = answers(&place).len();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(answers(&place).len(), before, "nothing is answered that is not stored");
    assert!(before < 1500, "the store went away in between");
    // torusd restarted meanwhile knows nothing of the cluster; the request waits in the map.
    place.end(Signal::KILL);
    place.start();
    etcd.run();
    wait_until("all are answered", || answers(&place).len() == 1500);
    wait_until("connected", || place.status().is_some_and(|s| s["metadata"] == "connected"));
    assert_counted(&place, &["v"], 1500);
}
