//! One `torus-dataplane` process on interface `a0` or others, with the test as its control process, and a station on `b0`.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use af_xdp::nic::Nic;
use af_xdp::raw::RawSocket;
use aoe_xdp::wire::{ETHERTYPE, FRAME_LEN_MIN};
use cluster_map::{
    ChangeAnswer, ClusterId, ClusterKey, ControlMap, Desired, DesiredExport, DesiredStore, DesiredVolume,
    ExportState, Geometry, LinkChoice, NodeId, Observed, PeerAddr, SteeringChoice, StoreId, VolumeId,
    VolumeIntent,
};

/// Only a process that hangs takes longer.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) const VOLUME_SECTORS: u64 = 8192;

pub(crate) struct Node {
    pub(crate) control: ControlMap,
    pub(crate) desired: Desired,
    child: Child,
    folder: tempfile::TempDir,
}

fn spawn(folder: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_torus-dataplane"))
        .args(["run", "--map", &text(&folder.join("map")), "--lock", &text(&folder.join("lock"))])
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

impl Node {
    /// Starts the process on a sparse store in memory with room for `volumes` of [`VOLUME_SECTORS`], and makes them: they take
    /// space when they are written.
    pub(crate) fn start(volumes: u16) -> Node {
        Node::start_on(&["a0"], LinkChoice::Auto, 1, volumes)
    }

    /// The same on other interfaces, and on that many cores.
    pub(crate) fn start_on(interfaces: &[&str], link: LinkChoice, cores: u16, volumes: u16) -> Node {
        Node::start_steering(interfaces, link, SteeringChoice::Auto, cores, volumes)
    }

    /// The same with a choice of how frames are to reach their cores.
    pub(crate) fn start_steering(
        interfaces: &[&str],
        link: LinkChoice,
        steering: SteeringChoice,
        cores: u16,
        volumes: u16,
    ) -> Node {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| folder.path().join(name);
        let store_path = path("store");
        File::create(&store_path).unwrap().set_len((u64::from(volumes) * 4 + 64) << 20).unwrap();
        let (cluster, node) = (ClusterId([1; 16]), NodeId([2; 16]));
        let mut control = ControlMap::create(path("map"), &Geometry::new(cores, cluster, node)).unwrap();
        let mut desired = Desired {
            cluster,
            node,
            cores: (0..cores).collect(),
            link,
            steering,
            interfaces: interfaces.iter().map(ToString::to_string).collect(),
            stores: vec![DesiredStore { path: text(&store_path), ..DesiredStore::default() }],
            ..Desired::default()
        };
        control.publish(&mut desired).unwrap();
        let child = spawn(folder.path());
        let mut node = Node { control, desired, child, folder };
        let store = node.store();
        let volume = |n| DesiredVolume {
            id: volume_id(n),
            store,
            size_sectors: VOLUME_SECTORS,
            state: VolumeIntent::Active,
            lane: None,
        };
        node.desired.volumes = (0..volumes).map(volume).collect();
        node.publish();
        node.wait("the volumes are made", |seen| {
            seen.volumes.len() == usize::from(volumes)
                && seen.volumes.iter().all(|volume| volume.size_sectors == VOLUME_SECTORS)
        });
        node
    }

    /// Starts the process as one of several nodes of a cluster, on interface `a0`, with a store for `volumes` volumes; it listens for
    /// the others at `listen`.
    pub(crate) fn start_member(number: u8, listen: PeerAddr, volumes: u64) -> Node {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| folder.path().join(name);
        let store_path = path("store");
        File::create(&store_path).unwrap().set_len((volumes * 4 + 64) << 20).unwrap();
        let (cluster, node) = (ClusterId([1; 16]), NodeId([number; 16]));
        let mut control = ControlMap::create(path("map"), &Geometry::new(1, cluster, node)).unwrap();
        let mut desired = Desired {
            cluster,
            node,
            cores: vec![0],
            link: LinkChoice::AfPacket,
            interfaces: vec!["a0".to_owned()],
            stores: vec![DesiredStore { path: text(&store_path), ..DesiredStore::default() }],
            start: 1,
            cluster_key: ClusterKey([5; 32]),
            listen: Some(listen),
            ..Desired::default()
        };
        control.publish(&mut desired).unwrap();
        let child = spawn(folder.path());
        Node { control, desired, child, folder }
    }

    /// The id of its one store, once it is open.
    pub(crate) fn store(&mut self) -> StoreId {
        let is_open = |seen: &Observed| seen.stores.first().is_some_and(|store| store.id.is_some());
        self.wait("the store opens", is_open).stores[0].id.unwrap()
    }

    /// Kills the process, as nothing else does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        let _status = self.child.wait().unwrap();
    }

    /// Starts it again after it was killed.
    pub(crate) fn start_again(&mut self) {
        self.desired.start += 1;
        self.publish();
        self.child = spawn(self.folder.path());
    }

    /// Exports volumes, and waits until they are served.
    pub(crate) fn export(&mut self, exports: Vec<DesiredExport>) {
        self.desired.exports = exports;
        self.publish();
        let count = self.desired.exports.len();
        self.wait("the exports are served", |seen| {
            seen.exports.len() == count && seen.exports.iter().all(|e| e.state == ExportState::Serving)
        });
    }

    pub(crate) fn publish(&mut self) {
        self.control.publish(&mut self.desired).unwrap();
    }

    /// Publishes answers with the desired state as it is now.
    pub(crate) fn answer(&mut self, answers: Vec<ChangeAnswer>) {
        self.desired.answers = answers;
        self.publish();
    }

    /// Waits until what is observed, of the newest desired state, is as asked.
    pub(crate) fn wait(&mut self, what: &str, done: impl Fn(&Observed) -> bool) -> Observed {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.control.reader().observed().unwrap_or_default();
            if seen.applied == self.desired.version && done(&seen) {
                return seen;
            }
            assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
            assert!(self.child.try_wait().unwrap().is_none(), "the process has ended: {what}");
            let version = seen.version;
            self.control.reader().wait_observed(version, Duration::from_millis(100)).unwrap();
        }
    }

    /// Waits until the process ends by itself, and starts another one.
    pub(crate) fn restart(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(2));
        };
        assert_eq!(status.code(), Some(1), "not refused, not drained: to be started again");
        self.child = spawn(self.folder.path());
        let old = self.control.reader().observed().unwrap().pid;
        self.wait("the new process serves", |seen| {
            seen.pid != old && seen.exports.iter().all(|e| e.state == ExportState::Serving)
        });
    }

    #[allow(dead_code, reason = "for the benches")]
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    #[allow(dead_code, reason = "for the benches")]
    pub(crate) fn exports(&self) -> u16 {
        u16::try_from(self.desired.exports.len()).unwrap()
    }

    /// Asks the process to end, and waits for it.
    pub(crate) fn stop(mut self) {
        self.desired.drain = true;
        self.publish();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("it does not drain");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

pub(crate) fn volume_id(n: u16) -> VolumeId {
    let mut id = [7; 16];
    id[..2].copy_from_slice(&n.to_be_bytes());
    VolumeId(id)
}

/// Volume `n` at shelf n / 250 + 1, slot n % 250.
pub(crate) fn export(n: u16) -> DesiredExport {
    let slot = u8::try_from(n % 250).unwrap();
    let [high, low] = n.to_be_bytes();
    DesiredExport {
        volume: volume_id(n),
        shelf: n / 250 + 1,
        slot,
        mac: [0x02, 0xaa, 0, high, low, 0x10],
        ..DesiredExport::default()
    }
}

/// Where an initiator stands: a plain socket with the buffers of the system.
pub(crate) struct Station {
    socket: RawSocket,
}

impl Station {
    pub(crate) fn open() -> Station {
        Station { socket: RawSocket::open(Nic::open("b0").unwrap().index(), ETHERTYPE).unwrap() }
    }

    pub(crate) fn send(&mut self, frame: &[u8]) {
        self.socket.send(frame).unwrap();
    }

    /// The next frame with this tag, unless none comes in time.
    pub(crate) fn receive(&mut self, tag: u32, within: Duration) -> Option<Vec<u8>> {
        self.receive_where(|of| of == tag, within)
    }

    /// The next frame whose tag is accepted, unless none comes in time.
    pub(crate) fn receive_where(
        &mut self,
        accept: impl Fn(u32) -> bool,
        within: Duration,
    ) -> Option<Vec<u8>> {
        let deadline = Instant::now() + within;
        let mut buffer = [0; 10_000];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let got = self.socket.receive(&mut buffer, left).unwrap();
            if let Some(len) = got.filter(|len| *len >= FRAME_LEN_MIN)
                && accept(u32::from_be_bytes(buffer[20..24].try_into().unwrap()))
            {
                return Some(buffer[..len].to_vec());
            }
            if left.is_zero() {
                return None;
            }
        }
    }
}
