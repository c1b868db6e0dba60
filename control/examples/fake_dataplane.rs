//! The smallest data plane: keeps the contract of the shared map, serves nothing. For the tests of `torusd`.
//!
//! Stores are opened at once (a blank file gets an id in its first 16 bytes), volumes are there as soon as they are wanted,
//! exports are served, each to one client. The number of each start is a line in the file `starts` beside the map. The
//! environment changes that:
//! - `FAKE_REFUSE`: prints `error: …` and exits with 2;
//! - `FAKE_ALLOCATE_MS`: a volume takes this long to allocate, with progress;
//! - `FAKE_FAIL_VOLUMES`: volumes fail with this text;
//! - `FAKE_SCRUB_MS`: a scrub takes this long, with progress; at once where it is not set;
//! - `FAKE_SCRUB_ERRORS`: a scrub finds this many damaged blocks, all of them lost;
//! - `FAKE_ASK`: an initiator counts in the config string of every export, this often in all: it asks for 1 where there
//!   is none, then for 2 instead of 1, and so on. What became of each is a line in the file `asked` beside the map;
//! - `FAKE_REPLICATES`: it says that it replicates. The heads that it is to be serve; it grants all nodes but those whose ids
//!   are in the file `silent` beside the map, and wishes that those stores are stale whose ids are in the file `ejected`;
//! - `FAKE_DEAF`: never looks at the map again once it has reported (as a data plane that hangs).
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use cluster_map::{
    Change, ChangeRequest, ClientCounter, Counter, DataMap, Desired, DesiredHead, DesiredStore,
    DesiredVolume, Durability, ExportState, Granting, HeadState, Latency, LinkLosses, LinkMode, MemberId,
    MemberWish, NodeId, Observed, ObservedExport, ObservedHead, ObservedLink, ObservedStore, ObservedVolume,
    ScrubObserved, ScrubState, ScrubWish, SetRule, StaleMark, StoreId, StoreState, VolumeId, VolumeIntent,
    VolumeObserved, WritePath,
};
use rustix::fs::FlockOperation;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, run, map_flag, map, lock_flag, lock] = arguments.as_slice() else {
        eprintln!("error: usage: fake_dataplane run --map PATH --lock PATH");
        return ExitCode::from(2);
    };
    if (run.as_str(), map_flag.as_str(), lock_flag.as_str()) != ("run", "--map", "--lock") {
        eprintln!("error: usage: fake_dataplane run --map PATH --lock PATH");
        return ExitCode::from(2);
    }
    if let Ok(text) = std::env::var("FAKE_REFUSE") {
        eprintln!("error: {text}");
        return ExitCode::from(2);
    }
    match serve(Path::new(map), Path::new(lock)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn hold_lock(path: &Path) -> Result<File> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("{} is locked by another data plane", path.display());
    }
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

/// What it remembers between desired states.
#[derive(Default)]
struct Memory {
    stores: BTreeMap<PathBuf, StoreId>,
    scrubs: BTreeMap<PathBuf, Scrub>,
    since: BTreeMap<VolumeId, Instant>,
    initiators: BTreeMap<VolumeId, Initiator>,
    last_id: u64,
    /// Desired version for whose exports a client was invented.
    told: u64,
}

/// A scrub of a store.
struct Scrub {
    seen: ScrubObserved,
    worked: Duration,
    looked: Instant,
}

/// One that counts in an export's config string.
#[derive(Default)]
struct Initiator {
    count: u64,
    waits: Option<ChangeRequest>,
}

fn serve(path: &Path, lock: &Path) -> Result<()> {
    let _lock = hold_lock(lock)?;
    let mut map = DataMap::attach(path).context("cannot attach to the map")?;
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let mut memory = Memory { last_id: u64::try_from(started.as_nanos())?, ..Memory::default() };
    let asked = path.with_file_name("asked");
    let numbers = path.with_file_name("starts");
    writeln!(OpenOptions::new().create(true).append(true).open(numbers)?, "{}", map.desired()?.start)?;
    let stats = map.core_stats(0)?;
    let clients = map.core_clients(0)?;
    let mut busy = false;
    let mut seen = 0;
    loop {
        if !busy {
            map.wait_desired(seen, Duration::from_millis(500))?;
        }
        let desired = map.desired()?;
        seen = desired.version;
        if desired.drain {
            return Ok(());
        }
        if let Ok(often) = std::env::var("FAKE_ASK") {
            count(&desired, &mut memory, often.parse()?, &asked)?;
        }
        let list = |name| std::fs::read_to_string(path.with_file_name(name)).unwrap_or_default();
        let mut observed = observe(&desired, &mut memory, &list("silent"), &list("ejected"))?;
        busy = observed.volumes.iter().any(|v| v.state == VolumeObserved::Allocating)
            || observed.stores.iter().any(|s| s.scrub.is_some_and(|s| s.state == ScrubState::Running));
        map.publish_observed(&mut observed)?;
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        map.beat(u64::try_from(now.tv_sec)? * 1_000_000_000 + u64::try_from(now.tv_nsec)?);
        for (record, export) in (0..).zip(&desired.exports) {
            if desired.version != memory.told {
                clients.give(record, [2, 0, 0, 0, 0, 1], export.shelf, export.slot, monotonic_ns()?);
                clients.add(record, ClientCounter::Reads, 3);
                clients.add(record, ClientCounter::ReadBytes, 4096);
                clients.add(record, ClientCounter::DroppedLimit, 1);
                clients.record(record, Latency::Read, 100_000);
                clients.in_flight(record, 2);
            }
        }
        memory.told = desired.version;
        stats.add(Counter::Reads, 1);
        stats.record(Latency::Read, 1000);
        if std::env::var_os("FAKE_DEAF").is_some() {
            std::thread::sleep(Duration::from_secs(3600));
        }
        if busy {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn monotonic_ns() -> Result<u64> {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Ok(u64::try_from(now.tv_sec)? * 1_000_000_000 + u64::try_from(now.tv_nsec)?)
}

/// Lets the initiators take their answers and ask for the next number.
fn count(desired: &Desired, memory: &mut Memory, often: u64, asked: &Path) -> Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(asked)?;
    for export in &desired.exports {
        let initiator = memory.initiators.entry(export.volume).or_default();
        if let Some(waits) = &initiator.waits {
            let Some(answer) = desired.answers.iter().find(|answer| answer.id == waits.id) else { continue };
            let string = String::from_utf8_lossy(&export.config_string);
            writeln!(file, "{} {} {:?} {string}", export.volume, initiator.count, answer.outcome)?;
            initiator.waits = None;
        }
        if initiator.count < often {
            memory.last_id += 1;
            let text = |number: u64| if number == 0 { Vec::new() } else { number.to_string().into_bytes() };
            initiator.waits = Some(ChangeRequest {
                id: memory.last_id,
                volume: export.volume,
                client: [2, 0, 0, 0, 0, 1],
                change: Change::SetString {
                    rule: SetRule::Replace { expected: text(initiator.count) },
                    string: text(initiator.count + 1),
                },
            });
            initiator.count += 1;
        }
    }
    Ok(())
}

fn observe(desired: &Desired, memory: &mut Memory, silent: &str, ejected: &str) -> Result<Observed> {
    let stores: Vec<_> = desired.stores.iter().map(|store| open(store, memory)).collect();
    let links = desired.interfaces.iter().map(|interface| ObservedLink {
        interface: interface.clone(),
        core: desired.cores.first().copied().unwrap_or(0),
        mode: LinkMode::XdpNativeCopy,
        segments: 4,
        mtu: 9000,
        max_sectors: 16,
        up: true,
        losses: LinkLosses { rx_ring_full: 3, ..LinkLosses::default() },
        ..ObservedLink::default()
    });
    let exports = desired.exports.iter().map(|export| ObservedExport {
        volume: export.volume,
        shelf: export.shelf,
        slot: export.slot,
        state: ExportState::Serving,
        ..ObservedExport::default()
    });
    Ok(Observed {
        version: 0,
        applied: desired.version,
        pid: std::process::id(),
        links: links.collect(),
        volumes: desired.volumes.iter().map(|volume| observe_volume(volume, memory)).collect(),
        exports: exports.collect(),
        changes: memory.initiators.values().filter_map(|initiator| initiator.waits.clone()).collect(),
        stores,
        replicates: std::env::var_os("FAKE_REPLICATES").is_some(),
        heads: desired.heads.iter().map(|head| serve_head(head, desired.start)).collect(),
        wishes: desired.heads.iter().filter_map(|head| wish(head, desired.start, ejected)).collect(),
        granting: desired.peers.iter().map(|peer| grant(peer.node, silent)).collect(),
    })
}

fn serve_head(head: &DesiredHead, start: u64) -> ObservedHead {
    let (volume, takeover, state) = (head.volume, head.takeover, HeadState::Serving);
    ObservedHead { volume, takeover, start, state, ..ObservedHead::default() }
}

/// Who is in the list of the ejected is to be stale, and nobody else.
fn wish(head: &DesiredHead, start: u64, ejected: &str) -> Option<MemberWish> {
    let is_stale = |member: MemberId| head.stale.iter().any(|stale| stale.member == member);
    let is_ejected = |member: MemberId| ejected.contains(&member.store.to_string());
    let members = head.partitions.first()?.owners.iter().map(|owner| owner.member);
    let eject: Vec<_> = members.filter(|member| is_ejected(*member) && !is_stale(*member)).collect();
    let stale = head.stale.iter().map(|stale| stale.member);
    let join: Vec<_> = stale.filter(|member| !is_ejected(*member)).collect();
    (!eject.is_empty() || !join.is_empty()).then(|| MemberWish {
        volume: head.volume,
        takeover: head.takeover,
        start,
        revision: head.revision,
        eject: eject.into_iter().map(|member| StaleMark { member, mark: 5 }).collect(),
        join,
    })
}

/// Everybody is granted everything who is not in the list of the silent.
fn grant(node: NodeId, silent: &str) -> Granting {
    Granting { node, is_granting: !silent.contains(&node.to_string()) }
}

fn open(store: &DesiredStore, memory: &mut Memory) -> ObservedStore {
    let path = PathBuf::from(&store.path);
    let opened = match memory.stores.get(&path) {
        Some(id) => Ok(*id),
        None => read_or_format(&path, store.size_bytes),
    };
    let mut observed = ObservedStore { path: store.path.clone(), ..ObservedStore::default() };
    match opened {
        Ok(id) => {
            memory.stores.insert(path.clone(), id);
            observed.id = Some(id);
            observed.state = StoreState::Ready;
            observed.durability = Durability::DsyncWriteBack;
            observed.capacity_bytes = std::fs::metadata(&path).map_or(0, |m| m.len());
            observed.free_bytes = observed.capacity_bytes;
            observed.writes = WritePath::Journal;
            observed.scrub = scrub(&path, store.scrub, observed.capacity_bytes, memory);
            let errors = observed.scrub.map_or(0, |scrub| scrub.errors);
            (observed.checksum_errors, observed.lost_blocks) = (errors, errors);
        }
        Err(error) => {
            observed.state = StoreState::Failed;
            observed.error = format!("{error:#}");
        }
    }
    observed
}

/// Time that passes counts as work while the scrub is not stopped.
fn scrub(
    path: &Path,
    wish: Option<ScrubWish>,
    total_bytes: u64,
    memory: &mut Memory,
) -> Option<ScrubObserved> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let begin = |run| Scrub {
        seen: ScrubObserved { run, total_bytes, ..ScrubObserved::default() },
        worked: Duration::ZERO,
        looked: Instant::now(),
    };
    let Some(wish) = wish else { return memory.scrubs.get(path).map(|scrub| scrub.seen) };
    let scrub = memory.scrubs.entry(path.to_owned()).or_insert_with(|| begin(wish.run));
    if wish.run > scrub.seen.run {
        *scrub = begin(wish.run);
    }
    let passed = scrub.looked.elapsed();
    scrub.looked += passed;
    if scrub.seen.state == ScrubState::Running {
        scrub.worked += passed;
    }
    let needed = u128::from(number("FAKE_SCRUB_MS"));
    let done = scrub.worked.as_millis();
    scrub.seen.state = match scrub.seen.state {
        ScrubState::Finished => ScrubState::Finished,
        _ if wish.stopped => ScrubState::Stopped,
        _ if done >= needed => ScrubState::Finished,
        _ => ScrubState::Running,
    };
    scrub.seen.done_bytes = match needed {
        0 => total_bytes,
        needed => u64::try_from(u128::from(total_bytes) * done.min(needed) / needed).unwrap_or(total_bytes),
    };
    if scrub.seen.state == ScrubState::Finished {
        scrub.seen.errors = number("FAKE_SCRUB_ERRORS");
    }
    Some(scrub.seen)
}

fn read_or_format(path: &Path, size_bytes: u64) -> Result<StoreId> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(size_bytes > 0).truncate(false);
    let mut file = options.open(path).context("cannot open the store")?;
    if file.metadata()?.len() == 0 {
        file.set_len(size_bytes)?;
    }
    let mut id = [0; 16];
    file.read_exact(&mut id)?;
    if id == [0; 16] {
        id = uuid::Uuid::new_v4().into_bytes();
        file.write_all_at(&id, 0)?;
    }
    Ok(StoreId(id))
}

fn observe_volume(volume: &DesiredVolume, memory: &mut Memory) -> ObservedVolume {
    let mut observed = ObservedVolume {
        id: volume.id,
        store: volume.store,
        state: VolumeObserved::Ready,
        size_sectors: volume.size_sectors,
        ..ObservedVolume::default()
    };
    if volume.state == VolumeIntent::Purging {
        observed.state = VolumeObserved::Purged;
        return observed;
    }
    if let Ok(text) = std::env::var("FAKE_FAIL_VOLUMES") {
        observed.state = VolumeObserved::Failed;
        observed.error = text;
        return observed;
    }
    let needed = std::env::var("FAKE_ALLOCATE_MS").ok().and_then(|ms| ms.parse().ok()).unwrap_or(0);
    let since = memory.since.entry(volume.id).or_insert_with(Instant::now);
    let done = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
    if done < needed {
        observed.state = VolumeObserved::Allocating;
        observed.done_bytes = volume.size_sectors * 512 / needed * done;
    }
    observed
}
