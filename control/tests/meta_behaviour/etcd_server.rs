//! Real etcd servers for tests: on free loopback ports, in a temporary directory, gone with the value.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use torus_control::meta::MetaStore;
use torus_control::meta::etcd::{EtcdOptions, EtcdStore};

const ETCD: &str = "/usr/bin/etcd";
const START_LIMIT: Duration = Duration::from_secs(30);

/// A cluster of one or more members.
pub(crate) struct EtcdCluster {
    members: Vec<EtcdMember>,
    dir: TempDir,
}

struct EtcdMember {
    name: String,
    client_url: String,
    peer_url: String,
    process: Option<Child>,
}

impl EtcdCluster {
    /// Starts a cluster and waits until it answers.
    pub(crate) async fn start(member_count: usize) -> Self {
        assert!(
            Path::new(ETCD).exists(),
            "{ETCD} is missing: install the package etcd-server, these tests need it"
        );
        for _ in 0..5 {
            let mut cluster = Self::prepare(member_count);
            (0..member_count).for_each(|index| cluster.run(index));
            if cluster.wait_ready().await {
                return cluster;
            }
            eprintln!("etcd did not start, most likely a port was taken meanwhile: trying others");
        }
        panic!("etcd did not start");
    }

    fn prepare(member_count: usize) -> Self {
        // All ports are held together, so that no two of them are the same.
        let held: Vec<_> = (0..member_count * 2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let urls: Vec<_> = held.iter().map(|port| format!("http://{}", port.local_addr().unwrap())).collect();
        let members = urls.chunks(2).enumerate().map(|(index, urls)| EtcdMember {
            name: format!("m{index}"),
            client_url: urls[0].clone(),
            peer_url: urls[1].clone(),
            process: None,
        });
        Self { members: members.collect(), dir: tempfile::tempdir().unwrap() }
    }

    fn run(&mut self, index: usize) {
        let peers: Vec<_> =
            self.members.iter().map(|member| format!("{}={}", member.name, member.peer_url)).collect();
        let member = &mut self.members[index];
        // setpriv ends the server with the thread that runs the test, even if that is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", ETCD, "--name", &member.name]);
        command.arg("--data-dir").arg(self.dir.path().join(&member.name));
        command.args([
            "--listen-client-urls",
            &member.client_url,
            "--advertise-client-urls",
            &member.client_url,
        ]);
        command.args([
            "--listen-peer-urls",
            &member.peer_url,
            "--initial-advertise-peer-urls",
            &member.peer_url,
        ]);
        command.args(["--initial-cluster", &peers.join(","), "--initial-cluster-state", "new"]);
        command.args(["--heartbeat-interval", "50", "--election-timeout", "500"]);
        command.args(["--logger", "zap", "--log-level", "error"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        member.process = Some(command.spawn().expect("setpriv (package util-linux) starts"));
    }

    async fn wait_ready(&mut self) -> bool {
        let store = self.store().await;
        let started = Instant::now();
        while started.elapsed() < START_LIMIT {
            if store.get("ready").await.is_ok() {
                return true;
            }
            let exited = |member: &mut EtcdMember| {
                member.process.as_mut().is_some_and(|process| process.try_wait().unwrap().is_some())
            };
            if self.members.iter_mut().any(exited) {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    /// The members' client URLs.
    pub(crate) fn urls(&self) -> Vec<String> {
        self.members.iter().map(|member| member.client_url.clone()).collect()
    }

    /// A store on this cluster that notices trouble faster than by default.
    pub(crate) async fn store(&self) -> EtcdStore {
        let options = EtcdOptions {
            connect_timeout: Duration::from_secs(1),
            read_timeout: Duration::from_secs(1),
            write_timeout: Duration::from_secs(3),
            keep_alive_interval: Duration::from_secs(1),
            keep_alive_timeout: Duration::from_secs(1),
            watch_idle: Duration::from_secs(2),
        };
        EtcdStore::connect(&self.urls(), options).await.unwrap()
    }

    /// Sends a signal to a member.
    pub(crate) fn signal(&self, index: usize, signal: Signal) {
        let process = self.members[index].process.as_ref().expect("the member runs");
        kill_process(Pid::from_child(process), signal).unwrap();
    }

    /// Kills a member (SIGKILL) and waits for its end.
    pub(crate) fn kill(&mut self, index: usize) {
        self.members[index].kill();
    }

    /// Starts a killed member again, on its data and its ports.
    pub(crate) fn restart(&mut self, index: usize) {
        self.run(index);
    }

    /// Compacts the history up to `revision`, as an operator does.
    pub(crate) async fn compact(&self, revision: i64) {
        let mut client = etcd_client::Client::connect(self.urls(), None).await.unwrap();
        client.compact(revision, Some(etcd_client::CompactionOptions::new().with_physical())).await.unwrap();
    }
}

impl EtcdMember {
    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }
}

impl Drop for EtcdCluster {
    fn drop(&mut self) {
        self.members.iter_mut().for_each(EtcdMember::kill);
    }
}
