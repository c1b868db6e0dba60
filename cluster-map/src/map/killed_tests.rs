//! Two processes: one publishes as fast as it can and is killed at random times, the other reads all the while.

use super::tests::{of_node, pair, run_dir};
use super::*;
use crate::{DesiredVolume, ObservedVolume, StoreId, VolumeId};
use std::os::unix::process::parent_id;
use std::process::{Child, Command, Stdio};

/// Tells the same test, started again as a process of its own, to write to the map at this path until it is killed.
const WRITE_TO: &str = "TORUS_MAP_TEST_WRITE_TO";
const KILLS: u64 = 60;

/// A number that follows from another and looks like no other.
fn mixed(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number ^ (number >> 27)
}

/// How many records version `version` has: sizes change, so that slots hold remains of larger versions.
fn records(version: u64) -> u64 {
    mixed(version) % 1500
}

fn record_id(version: u64, index: u64) -> [u8; 16] {
    (u128::from(version) << 64 | u128::from(mixed(version ^ index << 40))).to_le_bytes()
}

/// The only content that version `version` may have.
fn desired_of(version: u64) -> Desired {
    let volume = |index| DesiredVolume {
        id: VolumeId(record_id(version, index)),
        store: StoreId(record_id(index, version)),
        size_sectors: mixed(index),
        ..DesiredVolume::default()
    };
    of_node(Desired { version, volumes: (0..records(version)).map(volume).collect(), ..Desired::default() })
}

/// As [`desired_of`].
fn observed_of(version: u64) -> Observed {
    let volume = |index| ObservedVolume {
        id: VolumeId(record_id(version, index)),
        error: format!("{version} {index}"),
        ..ObservedVolume::default()
    };
    let volumes = (0..records(version)).map(volume).collect();
    Observed { version, applied: mixed(version), volumes, ..Observed::default() }
}

/// Whether a slot of the area is half written.
fn is_torn(reader: &MapReader, which: Which) -> bool {
    let head = reader.shared.places(which).head.start;
    let words = reader.shared.mapping.words();
    let seq = |slot: usize| load_le(&words[head + (1 + slot) * slot::LINE_WORDS], Ordering::Relaxed);
    (0..2).any(|slot| seq(slot) % 2 == 1)
}

/// A process that is killed at the latest when the test ends.
struct Writer(Child);

impl Writer {
    /// Starts this program again, to run the test `test` alone.
    fn start(test: &str, path: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test]).env(WRITE_TO, path).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a writer does until it is killed, or its test is gone.
fn until_orphaned(mut act: impl FnMut()) {
    let parent = parent_id();
    while parent_id() == parent {
        act();
    }
}

/// Reads for `duration` and returns how many versions it saw; each is checked by `check`.
fn read_for(duration: Duration, mut seen: u64, mut check: impl FnMut() -> Option<u64>) -> (u64, u64) {
    let end = Instant::now() + duration;
    let mut versions = 0;
    while Instant::now() < end {
        let Some(version) = check() else { continue };
        assert!(version >= seen, "version {version} after {seen}");
        versions += u64::from(version > seen);
        seen = version;
    }
    (versions, seen)
}

/// Kills a writer [`KILLS`] times; `check` reads a version, compares its content and returns its number.
fn survive(
    test: &str,
    path: &Path,
    reader: &MapReader,
    which: Which,
    check: impl Fn(&MapReader) -> Result<u64, MapError>,
) {
    let (mut seen, mut read, mut torn) = (0, 0, 0);
    for round in 0..KILLS {
        let writer = Writer::start(test, path);
        let newest = || reader.shared.area(which).latest();
        let patience = Instant::now() + Duration::from_secs(60);
        while newest() == seen {
            assert!(Instant::now() < patience, "the writer goes on from version {seen}");
            std::thread::yield_now();
        }
        let busy_is_no_version = || match check(reader) {
            Ok(version) => Some(version),
            Err(MapError::Busy) => None,
            Err(error) => panic!("{error}"),
        };
        let duration = Duration::from_micros(mixed(round) % 12_000);
        let (versions, last) = read_for(duration, seen, busy_is_no_version);
        writer.kill();
        torn += u64::from(is_torn(reader, which));
        let left = check(reader).expect("what a dead writer left is readable at once");
        assert!(left >= last && left == newest());
        (seen, read) = (left, read + versions);
    }
    eprintln!("{KILLS} kills, {torn} in the middle of a write; {read} of {seen} versions read");
    assert!(torn > 0, "no kill came in the middle of a write");
    assert!(read > KILLS / 4 && seen > read, "{read} of {seen}");
}

#[test]
fn killed_control_processes_leave_whole_versions() {
    if let Some(path) = std::env::var_os(WRITE_TO) {
        let mut control = ControlMap::attach(path).unwrap();
        until_orphaned(|| {
            let mut next = desired_of(control.reader().desired_version() + 1);
            control.publish(&mut next).unwrap();
        });
        return;
    }
    let (dir, control, data) = pair();
    drop(control);
    let path = dir.path().join("map");
    survive(
        "map::killed_tests::killed_control_processes_leave_whole_versions",
        &path,
        data.reader(),
        Which::Desired,
        {
            |reader| {
                let read = reader.desired()?;
                assert!(
                    read.version == 0 || read == desired_of(read.version),
                    "version {} is torn",
                    read.version
                );
                Ok(read.version)
            }
        },
    );
    let mut control = ControlMap::attach(&path).unwrap();
    let latest = data.desired_version();
    assert_eq!(control.publish(&mut desired_of(latest + 1)).unwrap(), latest + 1);
}

#[test]
fn killed_data_planes_leave_whole_versions_and_statistics() {
    if let Some(path) = std::env::var_os(WRITE_TO) {
        let mut data = DataMap::attach(path).unwrap();
        let stats = data.core_stats(1).unwrap();
        until_orphaned(|| {
            let mut next = observed_of(data.reader().observed_version() + 1);
            stats.record(Latency::Read, 3);
            stats.add(Counter::Reads, 1);
            data.publish_observed(&mut next).unwrap();
        });
        return;
    }
    let (dir, control, data) = pair();
    drop(data);
    let path = dir.path().join("map");
    let newest = Cell::new((0, 0));
    survive(
        "map::killed_tests::killed_data_planes_leave_whole_versions_and_statistics",
        &path,
        control.reader(),
        Which::Observed,
        |reader| {
            let read = reader.observed()?;
            assert!(
                read.version == 0 || read == observed_of(read.version),
                "version {} is torn",
                read.version
            );
            let core = &reader.stats()[1];
            let (count, reads) = (core.read_ns.count(), core.get(Counter::Reads));
            assert!(
                core.read_ns.sum_ns() >= 3 * count && (count, reads) >= newest.get(),
                "statistics went back"
            );
            newest.set((count, reads));
            Ok(read.version)
        },
    );
    assert!(!control.data_plane_attached().unwrap());
    let (count, published) = (newest.get().0, control.reader().observed_version());
    assert!((published..=published + KILLS).contains(&count), "{count} durations for {published} versions");
}

#[test]
fn a_process_is_woken_by_another() {
    if let Some(path) = std::env::var_os(WRITE_TO) {
        let mut data = DataMap::attach(path).unwrap();
        let mut seen = 0;
        until_orphaned(|| {
            let version = data.wait_desired(seen, Duration::from_secs(1)).unwrap();
            if version != seen {
                data.publish_observed(&mut Observed { applied: version, ..Observed::default() }).unwrap();
            }
            seen = version;
        });
        return;
    }
    let dir = run_dir();
    let path = dir.path().join("map");
    let mine = of_node(Desired::default());
    let mut control = ControlMap::create(&path, &Geometry::new(1, mine.cluster, mine.node)).unwrap();
    let process = Writer::start("map::killed_tests::a_process_is_woken_by_another", &path);
    let patience = Instant::now() + Duration::from_secs(60);
    while !control.data_plane_attached().unwrap() {
        assert!(Instant::now() < patience, "the other process attaches");
        std::thread::sleep(Duration::from_millis(1));
    }
    let start = Instant::now();
    for _ in 0..200 {
        let version = control.publish(&mut of_node(Desired::default())).unwrap();
        let mut observed = control.observed().unwrap();
        while observed.applied < version {
            let woken = control.reader().wait_observed(observed.version, Duration::from_secs(30)).unwrap();
            assert!(woken > observed.version, "not woken for version {version}");
            observed = control.observed().unwrap();
        }
    }
    // A wake-up that was lost in either direction costs a second or more.
    let mean = start.elapsed() / 200;
    eprintln!("{mean:?} there and back");
    assert!(mean < Duration::from_millis(250), "{mean:?}");
    process.kill();
    assert!(!control.data_plane_attached().unwrap(), "the kernel gives a dead process's role back");
}
