//! Whole maps in real files: what the two processes see of each other, and what hostile or torn files lead to.

use super::*;
use crate::desired::tests as desired_tests;
use crate::layout::tests::{of_boot, of_level, with_counters, without_clients};
use crate::observed::tests as observed_tests;
use crate::{
    Allow, AoePolicy, BUCKETS, DesiredExport, DesiredHead, DesiredVolume, ExportState, HeadOwner,
    HeadPartition, LEVEL, MAX_CONFIG_STRING_BYTES, MAX_LISTED_MACS, MAX_NOTE_BYTES, MemberWish,
    ObservedExport, ObservedHead, ObservedVolume, StaleMark, VolumeId, VolumeObserved,
};
use proptest::collection::vec;
use proptest::prelude::*;
use std::process::Command;
use tempfile::TempDir;

const CLUSTER: ClusterId = ClusterId([0xc1; 16]);
const NODE: NodeId = NodeId([0x0d; 16]);

/// A directory on the kind of file system that maps are made for.
pub(super) fn run_dir() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { TempDir::new_in(memory).unwrap() } else { TempDir::new().unwrap() }
}

/// Slots as small as they can be: damage anywhere hits something.
fn small() -> Geometry {
    Geometry { desired_bytes: 1, observed_bytes: 1, ..Geometry::new(2, CLUSTER, NODE) }
}

pub(super) fn of_node(desired: Desired) -> Desired {
    Desired { cluster: CLUSTER, node: NODE, ..desired }
}

/// A map of normal size with both handles.
pub(super) fn pair() -> (TempDir, ControlMap, DataMap) {
    let dir = run_dir();
    let control = ControlMap::create(dir.path().join("map"), &Geometry::new(2, CLUSTER, NODE)).unwrap();
    let data = DataMap::attach(dir.path().join("map")).unwrap();
    (dir, control, data)
}

/// Rewrites the header page of a map that nobody has open.
fn edit_header(path: &Path, edit: impl FnOnce(&[u8; PAGE]) -> [u8; PAGE]) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, 0).unwrap();
    file.write_all_at(&edit(&page), 0).unwrap();
}

/// The path of a small map that nobody has open, with one version of each state.
fn idle_map(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("map");
    let mut control = ControlMap::create(&path, &small()).unwrap();
    control.publish(&mut of_node(Desired { cores: vec![1, 2], ..Desired::default() })).unwrap();
    DataMap::attach(&path)
        .unwrap()
        .publish_observed(&mut Observed { pid: 9, ..Observed::default() })
        .unwrap();
    path
}

#[test]
fn nothing_published_reads_as_version_zero() {
    let (_dir, control, data) = pair();
    assert_eq!((data.desired().unwrap(), data.desired_version()), (Desired::default(), 0));
    assert_eq!((control.observed().unwrap(), control.reader().observed_version()), (Observed::default(), 0));
    assert_eq!((control.reader().cluster(), data.reader().node()), (CLUSTER, NODE));
    assert_eq!(control.stats(), vec![CoreSnapshot::default(); 2]);
}

#[test]
fn states_pass_both_ways_and_versions_grow_by_one() {
    let (_dir, mut control, mut data) = pair();
    for version in 1..=5 {
        let mut desired = of_node(Desired { drain: version % 2 == 0, ..Desired::default() });
        assert_eq!(control.publish(&mut desired).unwrap(), version);
        assert_eq!((desired.version, data.desired_version()), (version, version));
        assert_eq!(data.desired().unwrap(), desired);
        assert_eq!(control.desired().unwrap(), desired);
        let mut observed = Observed { applied: version, pid: 77, ..Observed::default() };
        assert_eq!(data.publish_observed(&mut observed).unwrap(), version);
        assert_eq!(control.observed().unwrap(), observed);
    }
}

#[test]
fn ten_thousand_volumes_and_exports_with_full_lists_and_errors_fit() {
    let (_dir, mut control, mut data) = pair();
    let ids = || (0..10_000_u32).map(|index| VolumeId(u128::from(index).to_be_bytes()));
    let error = "x".repeat(MAX_NOTE_BYTES);
    let macs = vec![[2; 6]; MAX_LISTED_MACS];
    let only = || Allow::Only(macs.clone());
    let full = DesiredExport {
        config_string: vec![b'x'; MAX_CONFIG_STRING_BYTES],
        masks: macs.clone(),
        reserved_for: macs.clone(),
        allow: AoePolicy { config: only(), masks: only(), reserve: only() },
        ..DesiredExport::default()
    };
    let owned = HeadPartition { epoch: 1, owners: vec![HeadOwner::default(); 3] };
    let head = |volume| DesiredHead {
        volume,
        partitions: vec![owned.clone(); 16],
        stale: vec![StaleMark::default(); 2],
        ..DesiredHead::default()
    };
    let mut desired = of_node(Desired {
        volumes: ids().map(|id| DesiredVolume { id, ..DesiredVolume::default() }).collect(),
        exports: ids().map(|volume| DesiredExport { volume, ..full.clone() }).collect(),
        heads: ids().map(head).collect(),
        ..Desired::default()
    });
    let volume = |id| ObservedVolume {
        id,
        state: VolumeObserved::Failed,
        error: error.clone(),
        ..ObservedVolume::default()
    };
    let export = |volume| ObservedExport {
        volume,
        state: ExportState::Failed,
        error: error.clone(),
        ..ObservedExport::default()
    };
    let head = |volume| ObservedHead { volume, blocked: error.clone(), ..ObservedHead::default() };
    let wish = |volume| MemberWish { volume, eject: vec![StaleMark::default(); 2], ..MemberWish::default() };
    let mut observed = Observed {
        heads: ids().map(head).collect(),
        wishes: ids().map(wish).collect(),
        volumes: ids().map(volume).collect(),
        exports: ids().map(export).collect(),
        ..Observed::default()
    };
    control.publish(&mut desired).unwrap();
    data.publish_observed(&mut observed).unwrap();
    assert!(data.desired().unwrap() == desired, "desired");
    assert!(control.observed().unwrap() == observed, "observed");
}

#[test]
fn what_cannot_be_published_changes_nothing() {
    let dir = run_dir();
    let path = idle_map(&dir);
    let mut control = ControlMap::attach(&path).unwrap();
    let before = control.desired().unwrap();
    let mut foreign = Desired { cluster: ClusterId([9; 16]), ..before.clone() };
    assert!(matches!(control.publish(&mut foreign), Err(MapError::Invalid { .. })));
    let mut wide = Desired { cores: vec![0, 1, 2], ..before.clone() };
    assert!(matches!(control.publish(&mut wide), Err(MapError::Invalid { .. })));
    let mut large = Desired { volumes: vec![DesiredVolume::default(); 100], ..before.clone() };
    assert!(matches!(control.publish(&mut large), Err(MapError::TooBig { capacity: 4096, .. })));
    assert_eq!((foreign.version, wide.version, large.version), (1, 1, 1));
    assert_eq!(control.desired().unwrap(), before);
    assert_eq!(control.publish(&mut before.clone()).unwrap(), 2);
}

#[test]
fn each_role_has_one_holder() {
    let (dir, control, data) = pair();
    let path = dir.path().join("map");
    let in_use = |result: Result<(), MapError>, expected| match result {
        Err(MapError::InUse { role, .. }) => assert_eq!(role, expected),
        other => panic!("{other:?}"),
    };
    assert!(control.data_plane_attached().unwrap());
    in_use(ControlMap::attach(&path).map(drop), Role::Control);
    in_use(DataMap::attach(&path).map(drop), Role::DataPlane);
    in_use(ControlMap::create(&path, &small()).map(drop), Role::Control);
    drop(control);
    in_use(ControlMap::create(&path, &small()).map(drop), Role::DataPlane);
    let control = ControlMap::attach(&path).unwrap();
    let stats = data.core_stats(0).unwrap();
    let reader = data.reader().clone();
    drop(data);
    in_use(DataMap::attach(&path).map(drop), Role::DataPlane);
    drop(stats);
    assert!(!control.data_plane_attached().unwrap(), "readers hold no role");
    DataMap::attach(&path).unwrap();
    drop(reader);
}

#[test]
fn creating_replaces_the_whole_map_and_only_a_map() {
    let dir = run_dir();
    let path = idle_map(&dir);
    let old = MapReader { shared: Arc::new(Shared::attach(&path, Shared::open(&path).unwrap()).unwrap()) };
    std::fs::write(dir.path().join("map.new"), "left over by a process that died").unwrap();
    let control = ControlMap::create(&path, &small()).unwrap();
    assert_eq!((control.reader().desired_version(), old.desired_version()), (0, 1));
    assert_eq!(old.desired().unwrap().cores, [1, 2]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the map");

    for content in [&b""[..], b"precious", &[7; 10_000]] {
        let other = dir.path().join("other");
        std::fs::write(&other, content).unwrap();
        assert!(matches!(ControlMap::create(&other, &small()), Err(MapError::NotAMap { .. })));
        assert_eq!(std::fs::read(&other).unwrap(), content);
    }
    std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
    assert!(matches!(ControlMap::create(dir.path().join("link"), &small()), Err(MapError::Io { .. })));
    assert!(matches!(ControlMap::create(dir.path(), &small()), Err(MapError::Io { .. })));
    assert!(matches!(DataMap::attach(dir.path().join("none")), Err(MapError::Io { action: "open", .. })));
}

#[test]
fn a_waiter_is_woken_from_another_thread() {
    let (_dir, mut control, mut data) = pair();
    let long = Duration::from_secs(60);
    for version in 1..=20 {
        let reader = data.reader().clone();
        let waiter = std::thread::spawn(move || reader.wait_desired(version - 1, long).unwrap());
        std::thread::sleep(Duration::from_millis(version % 3));
        control.publish(&mut of_node(Desired::default())).unwrap();
        assert_eq!(waiter.join().unwrap(), version);
        let reader = control.reader().clone();
        let waiter = std::thread::spawn(move || reader.wait_observed(version - 1, long).unwrap());
        data.publish_observed(&mut Observed::default()).unwrap();
        assert_eq!(waiter.join().unwrap(), version);
    }
    let start = Instant::now();
    assert_eq!(data.wait_desired(20, Duration::from_millis(30)).unwrap(), 20);
    assert!(start.elapsed() >= Duration::from_millis(30));
    assert_eq!(data.wait_desired(20, Duration::ZERO).unwrap(), 20);
    assert_eq!(data.wait_desired(3, long).unwrap(), 20, "an old version is no reason to wait");
}

#[test]
fn a_successor_wakes_whom_its_predecessor_forgot() {
    let (dir, mut control, data) = pair();
    control.publish(&mut of_node(Desired::default())).unwrap();
    let before = data.reader().desired_wake_word().load(Ordering::Acquire);
    drop(control);
    let _control = ControlMap::attach(dir.path().join("map")).unwrap();
    assert_ne!(data.reader().desired_wake_word().load(Ordering::Acquire), before);
}

#[test]
fn statistics_are_read_by_the_other_process_and_survive_a_restart() {
    let (dir, control, data) = pair();
    let path = dir.path().join("map");
    let (zero, one) = (data.core_stats(0).unwrap(), data.core_stats(1).unwrap());
    assert!(matches!(data.core_stats(1), Err(MapError::Core { core: 1, .. })), "one writer per core");
    assert!(matches!(data.core_stats(2), Err(MapError::Core { core: 2, .. })), "no such core");
    for (index, &counter) in Counter::ALL.iter().enumerate() {
        zero.add(counter, 100 + index as u64);
        one.add(counter, 1);
        one.add(counter, 1);
    }
    zero.record(Latency::Read, 1_000);
    one.record(Latency::Write, 2_000_000);
    let stats = control.stats();
    assert!(stats[0].counters().enumerate().all(|(index, (_, value))| value == 100 + index as u64));
    assert!(stats[1].counters().all(|(_, value)| value == 2));
    assert_eq!(
        (stats[0].read_ns.count(), stats[0].read_ns.sum_ns(), stats[0].write_ns.count()),
        (1, 1_000, 0)
    );
    assert_eq!((stats[1].write_ns.count(), stats[1].read_ns.count()), (1, 0));
    assert_eq!(one.snapshot(), stats[1]);
    drop(one);
    data.core_stats(1).unwrap().add(Counter::Sleeps, 5);
    drop((zero, data));
    let data = DataMap::attach(&path).unwrap();
    data.core_stats(1).unwrap().add(Counter::Sleeps, 1);
    let mut all = CoreSnapshot::default();
    control.stats().iter().for_each(|core| all.merge(core));
    assert_eq!(control.stats()[1].get(Counter::Sleeps), 8);
    assert_eq!((all.read_ns.count(), all.write_ns.count(), all.read_ns.buckets().len()), (1, 1, BUCKETS));
}

#[test]
fn clients_are_read_by_the_other_process_and_forgotten_at_a_restart() {
    let (dir, control, data) = pair();
    let reader = control.reader();
    let (zero, one) = (data.core_clients(0).unwrap(), data.core_clients(1).unwrap());
    assert!(matches!(data.core_clients(1), Err(MapError::Core { core: 1, .. })), "one writer per core");
    assert!(matches!(data.core_clients(2), Err(MapError::Core { core: 2, .. })), "no such core");
    assert_eq!(reader.clients().unwrap(), []);
    zero.give(3, [2, 0, 0, 0, 0, 1], 7, 1, 100);
    one.give(0, [2, 0, 0, 0, 0, 2], 7, 1, 200);
    one.give(1, [2, 0, 0, 0, 0, 2], 7, 2, 300);
    one.add(1, ClientCounter::Reads, 5);
    one.record(1, Latency::Read, 4_000);
    one.in_flight(1, 4);
    one.seen(1, 350);
    // Records that no map has are not written, and nothing else is.
    one.give(u32::MAX, [1; 6], 7, 2, 0);
    one.add(1 << 20, ClientCounter::Reads, 5);
    let macs = |clients: Vec<ClientSnapshot>| -> Vec<(u8, u16)> {
        clients.iter().map(|client| (client.mac[5], client.core)).collect()
    };
    assert_eq!(macs(reader.clients().unwrap()), [(1, 0), (2, 1), (2, 1)]);
    assert_eq!(macs(reader.clients_of(7, 1).unwrap()), [(1, 0), (2, 1)]);
    let client = &reader.clients_of(7, 2).unwrap()[0];
    assert_eq!((client.get(ClientCounter::Reads), client.read_ns.count(), client.in_flight), (5, 1, 4));
    assert_eq!((client.first_seen_ns, client.last_seen_ns), (300, 350));
    one.take_away(0);
    assert_eq!(macs(reader.clients_of(7, 1).unwrap()), [(1, 0)]);
    drop((zero, one, data));
    assert_eq!(reader.clients().unwrap().len(), 2, "what a data plane did is read when it is gone");
    let data = DataMap::attach(dir.path().join("map")).unwrap();
    let _zero = data.core_clients(0).unwrap();
    assert_eq!(macs(reader.clients().unwrap()), [(2, 1)]);
}

#[test]
fn a_map_without_records_of_clients_works_without_them() {
    let dir = run_dir();
    let path = idle_map(&dir);
    edit_header(&path, without_clients);
    let data = DataMap::attach(&path).unwrap();
    let clients = data.core_clients(0).unwrap();
    clients.give(0, [2; 6], 1, 1, 1);
    clients.add(0, ClientCounter::Reads, 1);
    assert_eq!(data.reader().clients().unwrap(), []);
}

#[test]
fn heartbeats_belong_to_their_process() {
    let (_dir, control, data) = pair();
    assert_eq!((control.data_plane_alive_ns(), data.reader().control_alive_ns()), (0, 0));
    data.beat(11);
    control.beat(u64::MAX);
    assert_eq!((control.data_plane_alive_ns(), data.reader().control_alive_ns()), (11, u64::MAX));
}

/// Publishes bytes that this program would not write.
fn publish_raw(reader: &MapReader, which: Which, bytes: &[u8]) -> u64 {
    reader.shared.publish(which, bytes).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn maps_of_processes_of_other_levels_are_read(
        desired in desired_tests::any_desired(),
        observed in observed_tests::any_observed(),
    ) {
        let (_dir, control, data) = pair();
        let reader = control.reader();
        for (longer, bytes) in [(true, desired_tests::newer(&desired)), (false, desired_tests::older(&desired))] {
            let version = publish_raw(reader, Which::Desired, &bytes);
            let desired = desired.clone();
            let expected = if longer { desired } else { desired_tests::without_newer_fields(desired) };
            prop_assert_eq!(data.desired().unwrap(), Desired { version, ..expected });
        }
        for (longer, bytes) in [(true, observed_tests::newer(&observed)), (false, observed_tests::older(&observed))] {
            let version = publish_raw(reader, Which::Observed, &bytes);
            let observed = observed.clone();
            let expected = if longer { observed } else { observed_tests::without_newer_fields(observed) };
            prop_assert_eq!(control.observed().unwrap(), Observed { version, ..expected });
        }
    }
}

#[test]
fn a_map_of_the_next_level_is_used_if_it_serves_this_one() {
    let dir = run_dir();
    let path = idle_map(&dir);
    edit_header(&path, |page| of_level(page, LEVEL + 1, LEVEL));
    let mut control = ControlMap::attach(&path).unwrap();
    assert_eq!(control.publish(&mut of_node(Desired::default())).unwrap(), 2);
    assert_eq!(DataMap::attach(&path).unwrap().desired().unwrap().version, 2);
}

#[test]
fn a_map_of_a_distant_level_is_refused_with_the_next_step() {
    let dir = run_dir();
    let path = idle_map(&dir);
    edit_header(&path, |page| of_level(page, LEVEL + 2, LEVEL + 1));
    let error = DataMap::attach(&path).unwrap_err();
    let (found, supported) =
        (format!("layout level {}", LEVEL + 2), format!("levels {} and {LEVEL}", LEVEL - 1));
    let text = error.to_string();
    assert!(matches!(error, MapError::Level { .. }), "{text}");
    assert!(text.contains(&found) && text.contains(&supported) && text.contains("restart both"), "{text}");
    let error = ControlMap::attach(&path).unwrap_err();
    assert!(matches!(error, MapError::Level { .. }), "{error}");
    drop(ControlMap::create(&path, &small()).unwrap());
    DataMap::attach(&path).unwrap();
}

#[test]
fn counters_that_a_map_lacks_are_not_written() {
    let dir = run_dir();
    let path = idle_map(&dir);
    edit_header(&path, |page| with_counters(page, 3));
    let data = DataMap::attach(&path).unwrap();
    let stats = data.core_stats(0).unwrap();
    Counter::ALL.iter().for_each(|&counter| stats.add(counter, 4));
    stats.record(Latency::Read, 5);
    let read = stats.snapshot();
    assert!(read.counters().all(|(counter, value)| value == if (counter as usize) < 3 { 4 } else { 0 }));
    assert_eq!(read.read_ns.sum_ns(), 5);
}

#[test]
fn a_map_from_an_earlier_boot_is_refused_and_replaced() {
    let dir = run_dir();
    let path = idle_map(&dir);
    edit_header(&path, |page| of_boot(page, [0xb0; 16]));
    assert!(matches!(ControlMap::attach(&path), Err(MapError::EarlierBoot { .. })));
    assert!(matches!(DataMap::attach(&path), Err(MapError::EarlierBoot { .. })));
    ControlMap::create(&path, &small()).unwrap();
}

#[test]
fn a_version_that_went_back_is_noticed() {
    let dir = run_dir();
    let path = idle_map(&dir);
    let mut control = ControlMap::attach(&path).unwrap();
    let data = DataMap::attach(&path).unwrap();
    for _ in 0..3 {
        control.publish(&mut of_node(Desired::default())).unwrap();
    }
    assert_eq!(data.desired().unwrap().version, 4);
    let latest = &data.reader.shared.mapping.words()[data.reader.shared.layout.desired.head.start];
    store_le(latest, 3, Ordering::Release);
    assert!(matches!(data.desired(), Err(MapError::Backward { seen: 4, found: 3, .. })));
    assert!(matches!(control.publish(&mut of_node(Desired::default())), Err(MapError::Backward { .. })));
    store_le(latest, u64::MAX, Ordering::Release);
    assert!(matches!(data.desired(), Err(MapError::Corrupt { .. })));
    assert!(matches!(control.publish(&mut of_node(Desired::default())), Err(MapError::Corrupt { .. })));
    drop(control);
    assert!(matches!(ControlMap::attach(&path), Err(MapError::Corrupt { .. })));
}

#[test]
fn damage_in_a_slot_is_an_error_until_the_next_version() {
    let dir = run_dir();
    let path = idle_map(&dir);
    let mut control = ControlMap::attach(&path).unwrap();
    let data = DataMap::attach(&path).unwrap();
    let shared = &data.reader.shared;
    let slot = shared.layout.desired.slots[slot_of(1)].clone();
    for word in slot.clone().take(4) {
        let word = &shared.mapping.words()[word];
        let was = word.fetch_xor(1 << 17, Ordering::Relaxed);
        assert!(matches!(data.desired(), Err(MapError::Corrupt { .. })));
        word.store(was, Ordering::Relaxed);
        data.desired().unwrap();
    }
    // Its line in the head: seq, length, checksum.
    let line = shared.layout.desired.head.start + (1 + slot_of(1)) * slot::LINE_WORDS;
    for word in line..line + 3 {
        for value in [0, 7, 4097, u64::MAX] {
            let word = &shared.mapping.words()[word];
            let was = word.swap(value, Ordering::Relaxed);
            assert!(matches!(data.desired(), Err(MapError::Corrupt { .. })), "{value}");
            word.store(was, Ordering::Relaxed);
        }
    }
    shared.mapping.words()[slot.start].fetch_xor(1, Ordering::Relaxed);
    control.publish(&mut of_node(Desired::default())).unwrap();
    assert_eq!(data.desired().unwrap().version, 2);
}

/// Uses a file in every way; the answers do not matter, that there are answers does.
fn use_whatever_it_is(path: &Path) {
    let data = DataMap::attach(path);
    let control = ControlMap::attach(path);
    if let Ok(data) = &data {
        let _ = (data.desired(), data.reader().observed(), data.reader().stats());
        let _ = data.wait_desired(data.desired_version(), Duration::from_micros(1));
        let stats = data.core_stats(0).unwrap();
        stats.add(Counter::Reads, 1);
        stats.record(Latency::Write, u64::MAX);
        let clients = data.core_clients(0).unwrap();
        clients.give(9, [2; 6], 1, 1, 1);
        clients.record(9, Latency::Write, u64::MAX);
        let _ = data.reader().clients();
        data.beat(1);
    }
    if let Ok(mut control) = control {
        let (cluster, node) = (control.reader().cluster(), control.reader().node());
        let _ = control.publish(&mut Desired { cluster, node, ..Desired::default() });
        let _ = (control.desired(), control.observed());
    }
    if let Ok(mut data) = data {
        let _ = data.publish_observed(&mut Observed::default());
        let _ = (data.desired(), data.reader().observed());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_file_gives_an_answer(start in vec(any::<u8>(), 0..300), len in 0_u64..70_000, map_like: bool) {
        let dir = run_dir();
        let path = dir.path().join("map");
        std::fs::write(&path, &start).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(len).unwrap();
        if map_like {
            file.write_all_at(b"TORUSMAP", 0).unwrap();
        }
        prop_assert!(DataMap::attach(&path).is_err());
        use_whatever_it_is(&path);
    }

    /// Numbers anywhere in the file are replaced, with a header checksum that fits, and the file may be cut.
    #[test]
    fn any_damage_gives_an_answer(
        header in vec((0_usize..60, any::<u32>(), 0_u32..32), 0..3),
        body in vec((any::<prop::sample::Index>(), any::<u64>(), 0_u32..64), 0..40),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let dir = run_dir();
        let path = idle_map(&dir);
        let mut bytes = std::fs::read(&path).unwrap();
        let words = bytes.len() / 8;
        for (index, value, shift) in body {
            // Half of the edits hit the heads, the signals and the first words of the slots.
            let word = index.index(words);
            let word = if shift % 2 == 0 { word } else { word / 512 * 512 + word % 64 };
            bytes[8 * word..8 * word + 8].copy_from_slice(&(value >> shift).to_le_bytes());
        }
        let mut page: [u8; PAGE] = bytes[..PAGE].try_into().unwrap();
        for (index, value, shift) in header {
            page = layout::tests::forged(&page, 4 * index, &(value >> shift).to_le_bytes());
        }
        bytes[..PAGE].copy_from_slice(&page);
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        std::fs::write(&path, &bytes).unwrap();
        use_whatever_it_is(&path);
    }
}

#[test]
fn what_is_no_file_is_refused() {
    let dir = run_dir();
    let pipe = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert!(matches!(DataMap::attach(&pipe), Err(MapError::NotAMap { .. })));
    assert!(matches!(ControlMap::create(&pipe, &small()), Err(MapError::NotAMap { .. })));
    assert!(matches!(DataMap::attach("/dev/null"), Err(MapError::NotAMap { .. })));
    assert!(matches!(DataMap::attach(dir.path()), Err(MapError::Io { .. })));
}

/// A small memory file system, unmounted at the end.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn mount(size: &str) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let options = format!("size={size}");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).status();
        if mount.is_ok_and(|status| status.success()) {
            return Some(Self(dir));
        }
        eprintln!("skipped: mounting a memory file system needs root");
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

/// Touching a page that the file system has no room for would kill the process.
#[test]
fn a_full_memory_file_system_is_an_error_not_a_signal() {
    let Some(tiny) = Tmpfs::mount("12k") else { return };
    let created = ControlMap::create(tiny.0.path().join("map"), &Geometry::new(2, CLUSTER, NODE));
    assert!(matches!(created, Err(MapError::NoSpace { .. })), "{created:?}");
    assert_eq!(std::fs::read_dir(tiny.0.path()).unwrap().count(), 0, "nothing is left behind");

    let Some(medium) = Tmpfs::mount("256k") else { return };
    let path = medium.0.path().join("map");
    let mut control = ControlMap::create(&path, &Geometry::new(2, CLUSTER, NODE)).unwrap();
    let data = DataMap::attach(&path).unwrap();
    control.publish(&mut of_node(Desired { drain: true, ..Desired::default() })).unwrap();
    let mut large =
        of_node(Desired { volumes: vec![DesiredVolume::default(); 20_000], ..Desired::default() });
    let refused = control.publish(&mut large).unwrap_err();
    assert!(matches!(refused, MapError::NoSpace { .. }), "{refused}");
    assert_eq!((data.desired().unwrap().version, data.desired().unwrap().drain), (1, true));
    control.publish(&mut of_node(Desired::default())).unwrap();
    assert_eq!(data.desired().unwrap().version, 2);

    // A length that leads into pages that were never written, and the rest of the file system taken.
    let shared = &data.reader.shared;
    std::fs::write(medium.0.path().join("filler"), vec![0; 256 << 10]).unwrap_err();
    let line = shared.layout.desired.head.start + (1 + slot_of(2)) * slot::LINE_WORDS;
    store_le(&shared.mapping.words()[line + 1], 4 << 20, Ordering::Relaxed);
    let read = data.desired();
    assert!(matches!(read, Err(MapError::NoSpace { .. })), "{read:?}");
}
