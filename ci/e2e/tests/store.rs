//! The store under a node, from outside: many kills in a row lose nothing, and what a device damages is an error and is found,
//! and never data.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use torus_e2e::{Lab, ci_dir, eventually};

/// Kills of one run, unless `TORUS_KILLS` says another number: `ci/soak kills` does.
const KILLS: u32 = 5;
const BLOCK: usize = 4096;
/// Sectors of a request: whole blocks go as such.
const SECTORS: &str = "8";

/// Every round is a load of its own with a log of its own; between the kill and the end of the load it is served again.
#[test]
fn kills_in_a_row_lose_no_acknowledged_write() -> Result<()> {
    let kills = match std::env::var("TORUS_KILLS") {
        Ok(text) => text.parse().context("TORUS_KILLS is a number")?,
        Err(_) => KILLS,
    };
    let lab = Lab::up("--nodes 1 --store file --size 512MiB --mtu 9000")?;
    lab.export("v", "128MiB", "1.1")?;
    for kill in 0..kills {
        let log = lab.file(&format!("log-{kill}"));
        let log_path = log.to_str().context("a path in UTF-8")?;
        // Small blocks and large ones, so that parts of blocks are written too; a small area, so that it is written often.
        let block = ["512", "4KiB", "16KiB"][kill as usize % 3];
        let options =
            format!("--mixed 30 --window 16 --block {block} --size 8MiB --seed {kill} --seconds 5 --verify");
        let mut load = lab.bench("1.1", &format!("{options} --verify-log {log_path}"))?;
        sleep(Duration::from_millis(1000 + u64::from(kill) * 137 % 1000));
        ensure!(load.is_running()?, "kill {kill}: the load ended before anything happened");
        lab.sh("kill n1 dataplane")?;
        if kill % 4 == 3 {
            // While the store is being opened again.
            sleep(Duration::from_millis(60));
            lab.try_run(&["kill", "n1", "dataplane"])?;
        }
        load.finish()?.assert_verified(500.0);
        lab.bench("1.1", &format!("--check-log {log_path}"))?.finish()?.assert_verified(500.0);
        fs::remove_file(log)?;
    }
    println!("{kills} kills, every acknowledged write was there");
    lab.passed()
}

/// Writes sectors from the initiator's host, a block at a time.
fn write_sectors(lba: usize, bytes: &[u8]) -> Result<()> {
    let mut child = Command::new(ci_dir().join("lab"))
        .args(["exec", "ini", "--", "torus-sectors", "eth0", "1.1", "write", &lba.to_string(), SECTORS])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("piped")?.write_all(bytes)?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "torus-sectors: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Reads sectors on the initiator's host; the error is what the target said.
fn read_sectors(lba: usize, count: usize) -> Result<Result<Vec<u8>, String>> {
    let output = Command::new(ci_dir().join("lab"))
        .args(["exec", "ini", "--", "torus-sectors", "eth0", "1.1", "read"])
        .args([lba.to_string(), count.to_string()])
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(if output.status.success() { Ok(output.stdout) } else { Err(said) })
}

/// Where the node's store is.
fn store_path(lab: &Lab) -> Result<PathBuf> {
    let stores = lab.json("torusctl store list --json")?;
    let path = stores.pointer("/0/path").or_else(|| stores.pointer("/stores/0/path"));
    let path = path.and_then(|path| path.as_str()).with_context(|| format!("no path in {stores}"))?;
    Ok(Path::new(path).to_owned())
}

/// The last place in a file that holds these bytes, at the beginning of a block: behind the journal, where they belong.
fn last_place(path: &Path, block: &[u8]) -> Result<u64> {
    let file = File::open(path)?;
    let blocks = usize::try_from(file.metadata()?.len())? / BLOCK;
    let mut bytes = vec![0; BLOCK];
    for at in (0..blocks).rev() {
        let offset = u64::try_from(at * BLOCK)?;
        file.read_exact_at(&mut bytes, offset)?;
        if bytes == block {
            return Ok(offset);
        }
    }
    anyhow::bail!("the block is nowhere in {}", path.display())
}

#[test]
fn a_block_that_the_device_damaged_is_an_error_is_found_by_a_scrub_and_heals_when_it_is_written() -> Result<()>
{
    let lab = Lab::up("--nodes 1 --store file --size 256MiB")?;
    lab.export("v", "64MiB", "1.1")?;
    let blocks: Vec<Vec<u8>> = (0..4u8)
        .map(|n| format!("block {n} of the volume ").repeat(300).into_bytes()[..BLOCK].to_vec())
        .collect();
    write_sectors(0, &blocks.concat())?;
    assert_eq!(read_sectors(0, 32)?.expect("whole"), blocks.concat());
    let path = store_path(&lab)?;
    // At rest everything is in place, and nothing of it is read from memory.
    let offset = eventually_placed(&path, &blocks[2])?;
    let file = File::options().write(true).open(&path)?;
    file.write_all_at(b"damage", offset + 1000)?;
    file.sync_all()?;

    let said = read_sectors(16, 8)?.expect_err("damaged bytes were given out as data");
    assert!(said.contains("error 0x40"), "uncorrectable data is what the target says: {said}");
    // The parts of the block that are written do not make the rest good.
    assert!(write_sectors(17, &[9; 512]).is_err(), "a part was written into a block that cannot be read");
    assert!(read_sectors(16, 8)?.is_err());
    assert_eq!(read_sectors(0, 16)?.expect("its neighbours are whole"), blocks[..2].concat());

    let scrubbed = lab.try_run(&["torusctl", "scrub", "start", "--all", "--wait", "--json"])?;
    let text = String::from_utf8_lossy(&scrubbed.stdout).into_owned();
    assert_eq!(scrubbed.status.code(), Some(1), "a scrub that finds damage says so: {text}");
    let check = lab.sh("torusctl scrub status")?;
    assert!(check.contains("finished"), "{check}");

    write_sectors(16, &blocks[3])?;
    assert_eq!(read_sectors(16, 8)?.expect("whole again"), blocks[3]);
    lab.run(&["torusctl", "scrub", "start", "--all", "--wait"]).context("nothing is damaged any more")?;
    lab.passed()
}

/// Waits until the shard has come to rest: until then a block may only be in the journal and in memory.
fn eventually_placed(path: &Path, block: &[u8]) -> Result<u64> {
    let mut place = None;
    eventually("the block is in place", Duration::from_secs(10), || {
        let found = last_place(path, block).ok();
        let settled = found.is_some() && found == place;
        place = found;
        sleep(Duration::from_millis(700));
        Ok(settled)
    })?;
    place.context("a place")
}

/// Volumes take space when they are written, give it back when they are deleted, and a full store keeps what it has.
#[test]
fn a_store_fills_up_and_gives_space_back() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store file --size 256MiB")?;
    let used = || -> Result<u64> {
        let node = lab.json("torusctl store list --json")?;
        let store = node.pointer("/0").or_else(|| node.pointer("/stores/0")).cloned().context("a store")?;
        store["used_bytes"].as_u64().with_context(|| format!("no used_bytes in {store}"))
    };
    assert_eq!(used()?, 0);
    lab.export("v", "128MiB", "1.1")?;
    assert_eq!(used()?, 0, "a volume takes no space before it is written");
    lab.bench("1.1", "--write --block 64KiB --pattern sequential --window 16 --seconds 6 --verify")?
        .finish()?;
    eventually("written extents are taken", Duration::from_secs(5), || Ok(used()? >= 64 << 20))?;
    lab.sh("torusblk unexport v")?;
    lab.sh("torusctl volume delete v")?;
    eventually("a deleted volume gives its space back", Duration::from_secs(30), || Ok(used()? == 0))?;
    lab.passed()
}
