//! A running node behind a virtual Ethernet: `torusd` with its embedded metadata store, the data plane it starts, a store
//! in memory, and clients on a plain socket. All of it in a network and mount namespace of its own.
//!
//! The programs are taken from `TORUS_BIN_DIR`, or from beside the test (`cargo build --workspace --bins`).

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use af_xdp::nic::Nic;
use af_xdp::raw::RawSocket;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Pid, Signal, kill_process};

use crate::frames::{Mac, Reply, Request};
use crate::world::{CLIENT, Carrier, EXPORTS, LARGE, MAIN, World};

/// Set in the process that runs inside the namespaces.
const INSIDE: &str = "TORUS_CONFORMANCE_INSIDE";
/// Only what hangs takes longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// The beginning of a store; a small one has its journals there.
const STORES_OWN_BYTES: u64 = 64 << 20;
/// The largest frame of a client.
const FRAME_MAX: usize = 10_000;

/// Runs a case against a fresh node that serves on `a0`; `test` is the test's full name in its binary. Without root it
/// says so and does nothing.
pub fn run(test: &str, case: impl FnOnce(&mut World<'_>)) {
    isolated(test, || {
        veth_pair("a0", "b0");
        let mut node = Node::start("a0");
        case(&mut World::new(&mut node));
        node.stop();
    });
}

/// Runs a test in namespaces of its own, by running its binary again.
pub fn isolated(test: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        // Shows the interfaces of the namespace it was mounted in.
        run_tool(Command::new("mount").args(["-t", "sysfs", "none", "/sys"]));
        return body();
    }
    if !fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
        eprintln!("skipped: {test} makes namespaces and needs root");
        return;
    }
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .status()
        .expect("unshare(1) of util-linux runs");
    assert!(status.success(), "{test} failed in its namespaces: {status}");
}

/// Runs `ip` with words separated by spaces.
pub fn ip(words: &str) {
    run_tool(Command::new("ip").args(words.split_whitespace()));
}

/// Makes a pair of virtual interfaces with an MTU of 9000, up. Tags stay in the frames, as on a wire.
pub fn veth_pair(one: &str, other: &str) {
    ip(&format!("link add {one} mtu 9000 type veth peer name {other} mtu 9000"));
    for name in [one, other] {
        ip(&format!("link set {name} up"));
    }
    wait(&format!("carrier of {one} and {other}"), || {
        [one, other].iter().all(|name| {
            fs::read_to_string(format!("/sys/class/net/{name}/operstate")).is_ok_and(|state| state == "up\n")
        })
    });
}

fn run_tool(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// Waits for something that comes about by itself.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn program(name: &str) -> PathBuf {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.parent()?.to_owned());
    let folder = std::env::var_os("TORUS_BIN_DIR").map(PathBuf::from).or_else(beside).unwrap();
    let path = folder.join(name);
    assert!(path.is_file(), "no program {}: cargo build --workspace --bins", path.display());
    path
}

/// Clients on an interface.
#[derive(Debug)]
pub struct Station {
    socket: RawSocket,
}

impl Station {
    /// Stands on the interface `name`.
    #[must_use]
    pub fn open(name: &str) -> Station {
        Station { socket: RawSocket::open(Nic::open(name).unwrap().index(), 0x88a2).unwrap() }
    }

    /// Sends a frame.
    pub fn send(&mut self, frame: &[u8]) {
        self.socket.send(frame).unwrap();
    }

    /// The next response, if one comes in time.
    pub fn receive(&mut self, within: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + within;
        let mut buffer = [0; FRAME_MAX];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.socket.receive(&mut buffer, left) {
                Ok(Some(len)) if len > 14 && buffer[14] & 8 != 0 => return Some(buffer[..len].to_vec()),
                Ok(_) => {}
                // The interface was down for a moment.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NETDOWN.raw_os_error()) => {}
                Err(error) => panic!("{error}"),
            }
            if left.is_zero() {
                return None;
            }
        }
    }

    /// The answer to a request, if one comes in time.
    pub fn ask(&mut self, request: &Request, within: Duration) -> Option<Reply> {
        self.ask_bytes(&request.bytes(), request.tag, within)
    }

    /// The answer with a tag to a frame, if one comes in time.
    pub fn ask_bytes(&mut self, frame: &[u8], tag: u32, within: Duration) -> Option<Reply> {
        self.send(frame);
        let deadline = Instant::now() + within;
        loop {
            let reply = Reply(self.receive(deadline.saturating_duration_since(Instant::now()))?);
            if reply.tag() == tag {
                return Some(reply);
            }
        }
    }
}

/// A node and the clients on `b0`.
#[derive(Debug)]
pub struct Node {
    folder: PathBuf,
    interfaces: String,
    torusd: Option<Child>,
    /// Where its clients stand.
    pub station: Station,
    macs: Vec<Mac>,
    interface_mac: Mac,
    worlds: u32,
}

impl Node {
    /// Starts a node that serves the world's exports on these interfaces (as `torusd --interface` takes them).
    #[must_use]
    pub fn start(interfaces: &str) -> Node {
        Node::start_with(interfaces, EXPORTS[LARGE].sectors)
    }

    /// The same with a large export of that size.
    #[must_use]
    pub fn start_with(interfaces: &str, large_sectors: u64) -> Node {
        ip("link set lo up");
        let folder = PathBuf::from("/dev/shm").join(format!("torus-conformance-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        run_tool(Command::new("mount").args(["-t", "tmpfs", "-o", "size=256m", "none"]).arg(&folder));
        // A file system of its own, so that a case can fill it.
        fs::create_dir(folder.join("disk")).unwrap();
        run_tool(
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=512m", "none"]).arg(folder.join("disk")),
        );
        let mut plans = EXPORTS;
        plans[LARGE].sectors = large_sectors;
        // Room for all exports, and one more of each small one's size; an eighth more is the store's own.
        let exports_bytes = plans.iter().map(|plan| plan.sectors * 512).sum::<u64>() + (128 << 20);
        let bytes = (exports_bytes + exports_bytes / 8) & !4095;
        let node_interface = interfaces.split([',', '@']).next().unwrap().to_owned();
        let mut node = Node {
            folder,
            interfaces: interfaces.to_owned(),
            torusd: None,
            station: Station::open("b0"),
            macs: Vec::new(),
            interface_mac: mac_of(&node_interface),
            worlds: 0,
        };
        let store = File::create(node.store()).unwrap();
        store.set_len(bytes).unwrap();
        // What is the store's own has its room whatever becomes of the rest.
        fallocate(&store, FallocateFlags::KEEP_SIZE, 0, STORES_OWN_BYTES).unwrap();
        node.run_torusd();
        for (number, plan) in plans.iter().enumerate() {
            node.tool("torusctl", &format!("volume create v{number} {}", plan.sectors * 512));
            let read_only = if plan.read_only { "--read-only" } else { "" };
            let open =
                if plan.open { "--allow-aoe-config --allow-aoe-masks --allow-aoe-reserve" } else { "" };
            let address = format!("{}.{}", plan.shelf, plan.slot);
            node.tool("torusblk", &format!("aoe v{number} {address} {read_only} {open}"));
        }
        node.learn_macs();
        // What was advertised meanwhile.
        World::new(&mut node).forget();
        node
    }

    /// The store's file.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.folder.join("disk/store")
    }

    /// A file on the store's file system.
    #[must_use]
    pub fn beside_the_store(&self, name: &str) -> PathBuf {
        self.folder.join("disk").join(name)
    }

    /// Starts torusd, and with it the data plane.
    pub fn run_torusd(&mut self) {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let log = fs::OpenOptions::new().create(true).append(true).open(path("log")).unwrap();
        let child = Command::new(program("torusd"))
            .args(["--interface", &self.interfaces, "--store", &self.store().display().to_string()])
            .args(["--api", "127.0.0.1:0", "--state-dir", &path("state"), "--run-dir", &path("run")])
            .args(["--dataplane", &program("torus-dataplane").display().to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.torusd = Some(child);
        self.await_data_plane();
    }

    /// Waits until the data plane serves.
    pub fn await_data_plane(&mut self) {
        wait("torusd and its data plane run", || {
            let status = self.command("torusctl", "status --json").output().unwrap();
            let text = String::from_utf8_lossy(&status.stdout).replace(' ', "");
            status.status.success()
                && text.contains("\"data_plane\":\"running\"")
                && !text.contains("\"available_bytes\":0")
                && self.data_plane().is_some()
        });
    }

    fn command(&self, tool: &str, arguments: &str) -> Command {
        let mut command = Command::new(program(tool));
        command
            .args(arguments.split_whitespace())
            .env("TORUS_API", format!("unix:{}", self.folder.join("run/api.sock").display()));
        command
    }

    /// Runs a command of the administrator, which must succeed.
    pub fn tool(&self, tool: &str, arguments: &str) -> String {
        run_tool(&mut self.command(tool, arguments))
    }

    /// The data plane's process.
    #[must_use]
    pub fn data_plane(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.folder.join("run/dataplane.lock")).ok()?;
        let pid: i32 = text.trim().parse().ok()?;
        Path::new(&format!("/proc/{pid}/exe")).exists().then(|| Pid::from_raw(pid).unwrap())
    }

    /// Waits until all exports answer.
    pub fn await_serving(&mut self) {
        let plan = EXPORTS[LARGE];
        let (dst, shelf, slot) = (self.export_mac(LARGE), plan.shelf, plan.slot);
        let ask = Request { dst, src: CLIENT, shelf, slot, tag: 0x7fff_0000, ..Request::identify() };
        wait("the exports are served", || {
            self.station.ask(&ask, Duration::from_millis(100)).is_some_and(|reply| reply.error() == 0)
        });
    }

    /// Asks torusd to end, and waits until it and the data plane have.
    pub fn terminate(&mut self) {
        let mut child = self.torusd.take().unwrap();
        let data_plane = self.data_plane();
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "torusd does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
        wait("the data plane has ended", || self.data_plane().is_none() || self.data_plane() != data_plane);
    }

    /// Ends the node; it must end well.
    pub fn stop(mut self) {
        self.terminate();
    }

    fn learn_macs(&mut self) {
        let mut macs = Vec::new();
        for (tag, plan) in (0x7ffe_0000..).zip(EXPORTS) {
            let (shelf, slot) = (plan.shelf, plan.slot);
            let ask = Request { dst: [0xff; 6], src: CLIENT, shelf, slot, tag, ..Request::config(0, b"") };
            let mut mac = None;
            wait("an export answers", || {
                mac = self.station.ask(&ask, Duration::from_millis(200)).map(|reply| reply.src());
                mac.is_some()
            });
            macs.extend(mac);
        }
        self.macs = macs;
    }
}

impl Carrier for Node {
    fn export_mac(&self, export: usize) -> Mac {
        self.macs[export]
    }

    fn interface_mac(&self) -> Mac {
        self.interface_mac
    }

    fn send(&mut self, frame: &[u8]) {
        self.station.send(frame);
    }

    fn receive(&mut self, within: Duration) -> Option<Vec<u8>> {
        self.station.receive(within)
    }

    fn fresh_tags(&mut self) -> u32 {
        self.worlds += 1;
        self.worlds << 16
    }

    /// Kills both processes.
    fn crash(&mut self) {
        let mut torusd = self.torusd.take().unwrap();
        torusd.kill().unwrap();
        torusd.wait().unwrap();
        if let Some(data_plane) = self.data_plane() {
            kill_process(data_plane, Signal::KILL).unwrap();
            wait("the data plane is gone", || self.data_plane().is_none());
        }
        self.run_torusd();
        self.await_serving();
        World::new(self).forget();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(torusd) = &mut self.torusd {
            let _ended = torusd.kill();
            let _status = torusd.wait();
        }
        if let Some(data_plane) = self.data_plane() {
            let _ended = kill_process(data_plane, Signal::KILL);
            while self.data_plane() == Some(data_plane) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        if std::thread::panicking() {
            eprintln!(
                "--- log of torusd\n{}",
                fs::read_to_string(self.folder.join("log")).unwrap_or_default()
            );
        }
        for mounted in [self.folder.join("disk"), self.folder.clone()] {
            let _unmounted = Command::new("umount").arg("--lazy").arg(mounted).status();
        }
        let _removed = fs::remove_dir(&self.folder);
    }
}

/// The export that cases are about, for tests that speak to a node beside the world.
#[must_use]
pub fn main_request(node: &Node, tag: u32, request: Request) -> Request {
    let plan = EXPORTS[MAIN];
    Request { dst: node.export_mac(MAIN), src: CLIENT, shelf: plan.shelf, slot: plan.slot, tag, ..request }
}

fn mac_of(interface: &str) -> Mac {
    let text = fs::read_to_string(format!("/sys/class/net/{interface}/address")).unwrap();
    let bytes: Vec<u8> = text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}
