//! `torus-dataplane store …` on real files: what it says of stores that are whole, and of stores that are not.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "store_tools/file_disk.rs"]
mod file_disk;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use cluster_map::{ClusterId, NodeId, StoreId, VolumeId};
use torus_dataplane::store::BLOCK_BYTES;
use torus_dataplane::store::extent::extents::FreeSlot;
use torus_dataplane::store::extent::format::{Epochs, ReplicaState, SUPERBLOCK_OFFSETS, Superblock};
use torus_dataplane::store::extent::opening::{self, Identity, Opened};
use torus_dataplane::store::extent::recovery;
use torus_dataplane::store::extent::shard::{Copies, WriteTerms};

use file_disk::FileDisk;

const CLUSTER: &str = "6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c43";
const OTHER: &str = "00000000-0000-4000-8000-000000000001";
const VOLUMES: [VolumeId; 2] = [VolumeId([0x11; 16]), VolumeId([0x22; 16])];
/// The first block and how many of each volume are written.
const WRITTEN: [(u64, usize); 2] = [(3, 40), (1020, 8)];

fn tool(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_torus-dataplane")).arg("store").args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Runs it, and holds its exit code and what it says against what is expected.
#[track_caller]
fn expect(arguments: &[&str], code: i32, parts: &[&str]) -> String {
    let output = tool(arguments);
    let said = said(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    for part in parts {
        assert!(said.contains(part), "{arguments:?}: no '{part}' in: {said}");
    }
    said
}

fn json(arguments: &[&str]) -> serde_json::Value {
    serde_json::from_slice(&tool(arguments).stdout).unwrap()
}

struct Fixture {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Fixture {
    fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }

    fn file(&self) -> File {
        File::options().read(true).write(true).open(&self.path).unwrap()
    }

    fn layout(&self) -> Superblock {
        let mut bytes = vec![0; BLOCK_BYTES];
        self.file().read_exact_at(&mut bytes, 0).unwrap();
        Superblock::decode(&bytes).unwrap()
    }

    /// Turns a byte over.
    fn damage(&self, offset_bytes: u64) {
        let (file, mut byte) = (self.file(), [0]);
        file.read_exact_at(&mut byte, offset_bytes).unwrap();
        file.write_all_at(&[!byte[0]], offset_bytes).unwrap();
    }

    /// Where a block of a volume lies.
    fn block_offset(&self, volume: VolumeId, block: u64) -> u64 {
        let dump = json(&["dump", self.path(), "--volume", &volume.to_string(), "--json"]);
        let extents = dump["volume"]["extents"].as_array().unwrap();
        let extent = extents.iter().find(|extent| extent["extent"] == block / 1024).unwrap();
        let slot = u32::try_from(extent["slots"][0].as_u64().unwrap()).unwrap();
        self.layout().data_offset(slot) + block % 1024 * 4096
    }
}

fn blank() -> Fixture {
    // The build folder is on a disk; /tmp need not be.
    let folder = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = folder.path().join("store");
    Fixture { _folder: folder, path }
}

fn formatted() -> Fixture {
    let fixture = blank();
    expect(&["format", fixture.path(), "--size", "64MiB", "--cluster", CLUSTER], 0, &["capacity"]);
    fixture
}

fn open(path: &Path) -> Opened {
    let identity = Identity {
        cluster: CLUSTER.parse::<ClusterId>().unwrap(),
        node: NodeId::default(),
        expected: None,
        fresh: StoreId::default(),
    };
    let opened = opening::open(path, 0, identity).unwrap();
    for slot in &opened.free {
        opened.shared.add_free(FreeSlot::new(*slot));
    }
    opened.shared.set_no_more(true);
    opened
}

/// How a store is left.
#[derive(Clone, Copy, PartialEq)]
enum Left {
    AtRest,
    /// With all data in the journal and none in place.
    Crashed,
    /// In the middle of writes in place.
    CrashedInPlace,
}

/// A store with two volumes, of which some blocks are written.
fn written(left: Left) -> Fixture {
    let fixture = formatted();
    let Opened { mut store, mut shards, shared: _shared, .. } = open(&fixture.path);
    let mut catalog = store.catalog().clone();
    for volume in VOLUMES {
        catalog.add(volume, 1 << 16, store.layout().shards).unwrap();
    }
    store.commit(catalog.clone()).unwrap();
    let mut disk = FileDisk::new(store.device().file().try_clone().unwrap());
    disk.withhold_unsynced = left == Left::Crashed;
    for (volume, (first, count)) in VOLUMES.into_iter().zip(WRITTEN) {
        let volume = *catalog.get(volume).unwrap();
        let shard = &mut shards[usize::from(volume.shard)];
        let copies = match left {
            Left::CrashedInPlace => Copies::Others { stable_version: 0 },
            _ => Copies::Sole,
        };
        let terms = WriteTerms { copies, ..WriteTerms::default() };
        for at in 0..count {
            let fill = [u8::try_from(at).unwrap() + 1];
            disk.write_blocks(shard, volume.object, first + at as u64, &fill, terms).unwrap();
        }
    }
    for shard in shards {
        if left == Left::AtRest { disk.close(shard) } else { disk.crash(shard) }
    }
    fixture
}

#[test]
fn a_blank_file_is_formatted_and_nothing_else_is_without_its_name() {
    let fixture = formatted();
    let path = fixture.path();
    expect(&["check", path, "--data"], 0, &["clean"]);
    let id = json(&["dump", path, "--json"])["store"].as_str().unwrap().to_owned();
    expect(&["format", path, "--cluster", CLUSTER], 2, &["not blank", &id, "--force"]);
    expect(&["format", path, "--cluster", CLUSTER, "--force", "foreign"], 2, &[&id, "--force"]);
    expect(&["format", path, "--cluster", CLUSTER, "--force", OTHER], 2, &[&id]);
    let asked = ["format", path, "--cluster", CLUSTER, "--id", OTHER, "--shards", "1", "--journal", "2MiB"];
    expect(
        &[&asked[..], &["--force", &id]].concat(),
        0,
        &["destroying", OTHER, "1, each with a journal of 2 MiB"],
    );
    expect(&["check", path], 0, &[OTHER]);

    let other = blank();
    std::fs::write(&other.path, vec![7; 64 << 20]).unwrap();
    expect(&["format", other.path(), "--cluster", CLUSTER], 2, &["--force foreign"]);
    expect(&["check", other.path()], 2, &["not blank and holds no Torus store"]);
    expect(&["format", other.path(), "--cluster", CLUSTER, "--force", "foreign"], 0, &["capacity"]);
    expect(&["check", other.path(), "--data"], 0, &["clean"]);
}

#[test]
fn what_cannot_be_formatted_says_what_to_do() {
    let fixture = blank();
    let path = fixture.path();
    expect(&["format", path, "--cluster", CLUSTER], 2, &["does not exist", "--size"]);
    expect(&["format", path, "--size", "1MiB", "--cluster", CLUSTER], 2, &["needs at least"]);
    expect(&["format", path, "--size", "64MiB", "--cluster", "x"], 2, &["not an id"]);
    expect(
        &["format", path, "--size", "64MiB", "--cluster", CLUSTER, "--journal", "5KiB"],
        2,
        &["2 MiB to 256 MiB"],
    );
    expect(&["format", path, "--size", "64MiB", "--cluster", CLUSTER, "--shards", "65"], 2, &["65"]);
    expect(&["check", "/nowhere/store"], 2, &["does not exist"]);
    expect(&["format", "--help"], 0, &["Examples:"]);
}

#[test]
fn a_store_at_rest_is_clean_and_shown() {
    let fixture = written(Left::AtRest);
    let path = fixture.path();
    expect(&["check", path, "--data"], 0, &["clean; 192 KiB of data verified"]);
    let check = json(&["check", path, "--data", "--json"]);
    assert_eq!((check["clean"].as_bool(), check["verified_bytes"].as_u64()), (Some(true), Some(48 * 4096)));
    expect(&["dump", path], 0, &[&VOLUMES[0].to_string(), "32 MiB", "superblock copy"]);
    let text = expect(&["dump", path, "--volume", &VOLUMES[1].to_string()], 0, &["extent  slot"]);
    let extents: Vec<Vec<&str>> = text
        .lines()
        .skip_while(|line| !line.starts_with("extent"))
        .skip(1)
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(extents.len(), 2, "{text}");
    for (number, extent) in ["0", "1"].iter().zip(&extents) {
        assert_eq!((extent[0], extent[3], extent[4], extent[5]), (*number, "4", "0", "0"));
    }
    expect(&["dump", path, "--volume", OTHER], 2, &["has no volume"]);
    expect(&["dump", path, "--journal"], 0, &["allocate", "data in the journal", "1 data blocks"]);
}

#[test]
fn what_is_only_in_the_journal_is_verified_there() {
    let fixture = written(Left::Crashed);
    let path = fixture.path();
    let check = json(&["check", path, "--data", "--json"]);
    assert_eq!((check["clean"].as_bool(), check["verified_bytes"].as_u64()), (Some(true), Some(0)));
    let to_place = |shard: usize| check["shards"][shard]["blocks_to_place"].as_u64().unwrap();
    assert_eq!(to_place(0) + to_place(1), 48);
    // Data of a batch in the middle.
    let journals = json(&["dump", path, "--journal", "--json"]);
    let position = journals["journals"][0]["batches"][6]["position"].as_u64().unwrap();
    let layout = fixture.layout();
    fixture.damage(layout.journal_offset(0) + (position + 1) * 4096 + 17);
    expect(&["check", path], 1, &["journal copy", "NOT clean"]);
    let check = json(&["check", path, "--json"]);
    assert_eq!(check["bad"][0]["sector"].as_u64(), Some((3 + 5) * 8));
    // The node that opens the store says the same.
    assert_eq!(open(&fixture.path).findings.lost_blocks, 1);
}

#[test]
fn regions_being_written_in_a_crash_are_suspect() {
    let fixture = written(Left::CrashedInPlace);
    let check = json(&["check", fixture.path(), "--data", "--json"]);
    assert_eq!(check["clean"].as_bool(), Some(false));
    assert_eq!((check["suspect_regions"].as_u64(), check["bad_blocks"].as_u64()), (Some(3), Some(0)));
    expect(&["check", fixture.path()], 1, &["regions were being written"]);
}

#[test]
fn a_damaged_block_is_found_by_reading_it() {
    let fixture = written(Left::AtRest);
    let path = fixture.path();
    for block in [1021, 1022, 1025] {
        fixture.damage(fixture.block_offset(VOLUMES[1], block) + 4000);
    }
    expect(&["check", path], 0, &["data not read"]);
    expect(
        &["check", path, "--data"],
        1,
        &[&VOLUMES[1].to_string(), "checksum", "3 blocks are not what was"],
    );
    let check = json(&["check", path, "--data", "--json"]);
    let ranges: Vec<(u64, u64)> = check["bad"]
        .as_array()
        .unwrap()
        .iter()
        .map(|bad| (bad["sector"].as_u64().unwrap(), bad["sectors"].as_u64().unwrap()))
        .collect();
    assert_eq!(ranges, [(1021 * 8, 16), (1025 * 8, 8)]);
}

#[test]
fn a_damaged_sum_page_loses_its_extent() {
    let fixture = written(Left::AtRest);
    let path = fixture.path();
    // Pages count once a checkpoint names them: there is one after half a journal of batches.
    let Opened { store, mut shards, .. } = open(&fixture.path);
    let volume = *store.catalog().get(VOLUMES[0]).unwrap();
    let mut disk = FileDisk::new(store.device().file().try_clone().unwrap());
    let shard = &mut shards[usize::from(volume.shard)];
    for round in 0..200u8 {
        let fill = [round | 1];
        disk.write_blocks(shard, volume.object, 3, &fill, WriteTerms::default()).unwrap();
    }
    shards.into_iter().for_each(|shard| disk.close(shard));
    drop((store, disk));
    let (layout, shard) = (fixture.layout(), volume.shard);
    let device = torus_dataplane::device::Device::open_read_only(&fixture.path, 0).unwrap();
    let image = recovery::read(&layout, shard, &device).unwrap();
    let (_, extent) = image.recovered.extents.iter().next().unwrap();
    assert!(image.recovered.checkpoint_sequence > 1, "no checkpoint was made");
    fixture.damage(layout.page_offset(extent.slot(), extent.half(extent.home()).which) + 100);
    drop(device);
    expect(&["check", path], 1, &["lost", "blocks have no good copy here"]);
    let check = json(&["check", path, "--data", "--json"]);
    assert!(check["lost_blocks"].as_u64().unwrap() > 1000, "{check}");
}

#[test]
fn a_hole_in_the_journal_is_never_taken_for_its_end() {
    let fixture = written(Left::Crashed);
    let path = fixture.path();
    let journals = json(&["dump", path, "--journal", "--json"]);
    let position = journals["journals"][0]["batches"][6]["position"].as_u64().unwrap();
    fixture.damage(fixture.layout().journal_offset(0) + position * 4096 + 200);
    let text = expect(&["check", path], 2, &["cannot be trusted", "shard 0", "the journal is damaged"]);
    assert!(text.contains(&format!("at block {position}")), "{text}");
    expect(&["dump", path, "--journal"], 2, &["the journal is damaged"]);
    assert!(json(&["check", path, "--json"])["error"].as_str().unwrap().contains("journal"));
}

#[test]
fn a_torn_end_of_the_journal_is_no_damage() {
    let fixture = written(Left::Crashed);
    let path = fixture.path();
    let journals = json(&["dump", path, "--journal", "--json"]);
    let batches = journals["journals"][0]["batches"].as_array().unwrap();
    let position = batches.last().unwrap()["position"].as_u64().unwrap();
    fixture.damage(fixture.layout().journal_offset(0) + (position + 1) * 4096);
    let check = json(&["check", path, "--data", "--json"]);
    assert_eq!(
        (check["clean"].as_bool(), check["shards"][0]["torn_tail"].as_bool()),
        (Some(true), Some(true))
    );
}

#[test]
fn what_is_kept_of_replicas_is_shown_and_belongs_to_a_volume() {
    let fixture = written(Left::AtRest);
    let path = fixture.path();
    let Opened { store, mut shards, .. } = open(&fixture.path);
    let mut disk = FileDisk::new(store.device().file().try_clone().unwrap());
    let volume = *store.catalog().get(VOLUMES[1]).unwrap();
    let state = ReplicaState {
        takeover: 7,
        start: 3,
        head: NodeId([0x44; 16]),
        revision: 99,
        epochs: Epochs::new(vec![(5, 2), (9, 1)]).unwrap(),
    };
    let shard = &mut shards[usize::from(volume.shard)];
    let state = Arc::new(state);
    disk.run(shard, |shard, request| shard.persist(request, volume.object, Arc::clone(&state))).unwrap();
    assert_eq!(shard.state(volume.object), Some(&state));
    let copies = Copies::Others { stable_version: 0 };
    disk.run(shard, |shard, request| shard.unmap_range(request, volume.object, 1024..2048, copies, 1234))
        .unwrap();
    shards.into_iter().for_each(|shard| disk.close(shard));
    drop((store, disk));

    let head = state.head.to_string();
    let text = expect(&["dump", path], 0, &["replica of", "7.3", &head]);
    let row = text.lines().find(|line| line.contains(&head)).unwrap();
    assert!(row.starts_with(&VOLUMES[1].to_string()), "{row}");
    let dump = json(&["dump", path, "--journal", "--volume", &VOLUMES[1].to_string(), "--json"]);
    let replica = &dump["replicas"][0];
    assert_eq!(
        (&replica["revision"], &replica["highest_version"]),
        (&serde_json::json!(99), &serde_json::json!(1234))
    );
    assert_eq!(replica["epochs"][1], serde_json::json!({ "partition": 9, "epoch": 1 }));
    let extent = &dump["volume"]["extents"][1];
    let seen = [&extent["version"], &extent["active"], &extent["hollow"], &extent["data"]];
    assert_eq!(serde_json::json!(seen), serde_json::json!([1234, true, true, 0]));
    let said = format!("object {}: generation 7.3 of {head}, revision 99, 2 epochs", volume.object);
    expect(&["dump", path, "--journal"], 0, &["persist", &said, "goes when all copies know"]);
    expect(&["check", path, "--data"], 0, &["clean"]);

    // Without its volume nobody reads it.
    let Opened { mut store, shards, .. } = open(&fixture.path);
    let mut catalog = store.catalog().clone();
    catalog.remove(VOLUMES[1]);
    store.commit(catalog).unwrap();
    let mut disk = FileDisk::new(store.device().file().try_clone().unwrap());
    shards.into_iter().for_each(|shard| disk.close(shard));
    drop((store, disk));
    expect(&["check", path], 1, &["1 states of replicas belong to no volume"]);
}

#[test]
fn one_whole_superblock_is_enough_and_none_is_not() {
    let fixture = written(Left::AtRest);
    let path = fixture.path();
    for (damaged, offset_bytes) in (1..).zip(&SUPERBLOCK_OFFSETS[1..]) {
        fixture.damage(offset_bytes + 300);
        expect(&["check", path, "--data"], 1, &[&format!("{damaged} superblock copies are damaged")]);
    }
    expect(&["dump", path], 0, &["the checksum is wrong"]);
    fixture.damage(SUPERBLOCK_OFFSETS[0] + 300);
    expect(&["check", path], 2, &["superblock: the checksum is wrong"]);
}

#[test]
fn a_store_in_use_or_cut_short_is_left_alone() {
    let fixture = written(Left::AtRest);
    let path = fixture.path();
    let opened = open(&fixture.path);
    expect(&["check", path], 2, &["in use", "torusd"]);
    expect(&["dump", path], 2, &["in use"]);
    drop(opened);
    let before = std::fs::read(&fixture.path).unwrap();
    expect(&["check", path, "--data"], 0, &["clean"]);
    expect(&["dump", path, "--journal"], 0, &[]);
    assert!(std::fs::read(&fixture.path).unwrap() == before, "looking changed the store");
    fixture.file().set_len(60 << 20).unwrap();
    expect(&["check", path], 2, &["restore its size"]);
}
