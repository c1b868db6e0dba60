//! Free extent slots, made ready before somebody needs them.
//!
//! A shard takes a slot when a write needs a new extent, and must not wait for it nor find out later that the file system has
//! no room. So a thread of the store's own keeps a few slots ready: reserved, and in a file on a disk written with zeros, since the
//! first write to a block costs a file system several times one that overwrites.
//!
//! A store in memory gets its slots on large pages here, those that were written before it was opened too: that takes a copy of them,
//! and is never worth a request's time.
//!
//! Invariants:
//! * A slot is queued once it is ready. That there are no more is said only when the last one was queued, or the file system
//!   refuses another: then a write that needs one fails, and overwriting goes on.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use torus_uring::MappedFile;

use crate::device::{Device, DeviceError};
use crate::store::EXTENT_BYTES;
use crate::store::extent::extents::FreeSlot;
use crate::store::extent::format::{BLOCK, Superblock};
use crate::store::extent::shared::Shared;

/// Slots that are kept ready: 256 MiB, some seconds of a first write at full speed.
const READY: usize = 64;
/// How often the thread looks whether some were taken.
const LOOK: Duration = Duration::from_millis(50);
/// How long it waits for room in the file system.
const WAIT_FOR_ROOM: Duration = Duration::from_secs(1);

/// What thread and owner share.
#[derive(Default)]
struct Talk {
    stop: AtomicBool,
    /// Why no more can be made ready; empty while they can.
    error: Mutex<String>,
}

/// The thread of one store.
pub(super) struct SlotFeeder {
    talk: Arc<Talk>,
    thread: Option<JoinHandle<()>>,
}

impl SlotFeeder {
    /// Makes the first slots ready, and starts the thread for the others. `free` are all slots that no extent has; `mapped` is by what
    /// a store in memory is read.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(
        device: Device,
        layout: Arc<Superblock>,
        shared: Arc<Shared>,
        free: Vec<u32>,
        mapped: Option<Arc<MappedFile>>,
    ) -> Result<SlotFeeder, DeviceError> {
        let talk = Arc::new(Talk::default());
        let own = Arc::clone(&talk);
        let path = device.path().display().to_string();
        let work = move || feed(&device, &layout, &shared, free.into(), mapped.as_deref(), &own);
        let thread = std::thread::Builder::new().name("slots".into()).spawn(work);
        let thread =
            thread.map_err(|source| DeviceError::Io { path, what: "start a thread for it", source })?;
        Ok(SlotFeeder { talk, thread: Some(thread) })
    }

    /// Why no more slots can be made ready; empty while they can.
    pub(super) fn error(&self) -> String {
        self.talk.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for SlotFeeder {
    /// Ends the thread: it holds the device, and with it the store's lock.
    fn drop(&mut self) {
        self.talk.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A panic of it has ended the process.
            let _ended = thread.join();
        }
    }
}

fn feed(
    device: &Device,
    layout: &Superblock,
    shared: &Shared,
    mut free: VecDeque<u32>,
    mapped: Option<&MappedFile>,
    talk: &Talk,
) {
    shared.set_no_more(free.is_empty());
    // What is still on small pages: at first what has data already. Without a mapping there is nothing to do for them.
    let mut small = mapped.map_or_else(VecDeque::new, |_| {
        let free: BTreeSet<u32> = free.iter().copied().collect();
        (0..layout.slots()).filter(|slot| !free.contains(slot)).collect()
    });
    let join_pages = |slot| {
        if let Some(mapped) = mapped {
            mapped.join_pages(layout.data_offset(slot), EXTENT_BYTES);
        }
    };
    while !talk.stop.load(Ordering::Relaxed) {
        let wanted = shared.free.len() < READY;
        let Some(slot) = free.front().copied().filter(|_| wanted) else {
            match small.pop_front() {
                Some(slot) => join_pages(slot),
                None => std::thread::park_timeout(LOOK),
            }
            continue;
        };
        // Its sum pages too: those of a store that has grown were not there at format.
        let made = device
            .make_ready(layout.page_offset(slot, 0), 2 * BLOCK)
            .and_then(|()| device.make_ready(layout.data_offset(slot), EXTENT_BYTES));
        let error = made.as_ref().err().map(DeviceError::to_string).unwrap_or_default();
        *talk.error.lock().unwrap_or_else(PoisonError::into_inner) = error;
        if made.is_ok() {
            // While slots are wanted urgently they come before their large pages.
            if shared.free.len() < READY / 2 {
                small.push_back(slot);
            } else {
                join_pages(slot);
            }
            free.pop_front();
            shared.add_free(FreeSlot::new(slot));
            shared.set_no_more(free.is_empty());
        } else {
            shared.set_no_more(true);
            std::thread::park_timeout(WAIT_FOR_ROOM);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use cluster_map::{ClusterId, NodeId, StoreId};
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    use super::*;
    use crate::store::extent::opening::{self, Identity, Opened};

    const IDENTITY: Identity = Identity {
        cluster: ClusterId([1; 16]),
        node: NodeId([2; 16]),
        expected: None,
        fresh: StoreId([3; 16]),
    };
    const PATIENCE: Duration = Duration::from_secs(60);

    fn start(opened: &Opened) -> SlotFeeder {
        let device = opened.store.device().try_clone().unwrap();
        let device_mapping = device.map_memory();
        let layout = Arc::clone(opened.store.layout());
        SlotFeeder::start(device, layout, Arc::clone(&opened.shared), opened.free.clone(), device_mapping)
            .unwrap()
    }

    fn wait(what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn slots_get_ready_and_the_last_one_is_followed_by_the_word() {
        let folder = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let path = folder.path().join("s");
        // More slots than are kept ready, in a file that has no room of its own yet.
        std::fs::File::create(&path).unwrap().set_len(300 << 20).unwrap();
        let opened = opening::open(&path, 0, IDENTITY).unwrap();
        let (shared, layout, device) = (&opened.shared, opened.store.layout(), opened.store.device());
        assert!(opened.free.len() > READY && shared.free.is_empty());
        let feeder = start(&opened);
        wait("the first slots are ready", || shared.free.len() == READY);
        std::thread::sleep(2 * LOOK);
        assert_eq!(shared.free.len(), READY, "and no more than are needed soon");
        assert!(!shared.no_more());
        let mut taken = Vec::new();
        while taken.len() < opened.free.len() {
            let Some(slot) = shared.free.pop() else {
                assert!(!shared.no_more(), "it is said after the last one");
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            let hole =
                rustix::fs::seek(device.file(), rustix::fs::SeekFrom::Hole(layout.data_offset(slot.slot)));
            assert!(hole.unwrap() >= layout.data_offset(slot.slot) + EXTENT_BYTES, "it was written");
            taken.push(slot.slot);
        }
        wait("that there are no more is said", || shared.no_more());
        assert_eq!((taken, feeder.error()), (opened.free.clone(), String::new()));
        drop(feeder);
        assert_eq!(Arc::strong_count(shared), 1 + opened.shards.len(), "the thread has gone");
    }

    /// A file system in memory of its own, for as long as the test runs.
    struct Small<'p>(&'p Path);

    impl<'p> Small<'p> {
        fn mount(path: &'p Path, mib: u32) -> Small<'p> {
            let options = std::ffi::CString::new(format!("size={mib}m")).unwrap();
            mount("tmpfs", path, "tmpfs", MountFlags::empty(), options.as_c_str())
                .expect("tests run as root");
            Small(path)
        }
    }

    impl Drop for Small<'_> {
        fn drop(&mut self) {
            let _gone = unmount(self.0, UnmountFlags::DETACH);
        }
    }

    #[test]
    fn a_full_file_system_is_said_and_used_again_when_it_has_room() {
        let folder = tempfile::tempdir().unwrap();
        let small = Small::mount(folder.path(), 48);
        let path = folder.path().join("s");
        // The file promises more than the file system has.
        std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        let ballast = folder.path().join("ballast");
        std::fs::write(&ballast, vec![1; 20 << 20]).unwrap();
        let opened = opening::open(&path, 0, IDENTITY).unwrap();
        let shared = &opened.shared;
        let feeder = start(&opened);
        wait("the file system is full", || shared.no_more());
        assert!(feeder.error().contains("reserve room"), "{}", feeder.error());
        let ready = shared.free.len();
        assert!((1..=7).contains(&ready), "{ready} slots in less than 28 MiB");
        std::fs::remove_file(&ballast).unwrap();
        wait("it has room again", || shared.free.len() >= ready + 4);
        // It is full once more: the store's size is still a promise.
        wait("and then no more", || shared.no_more() && !feeder.error().is_empty());
        assert!(shared.free.len() < opened.free.len());
        drop((feeder, small));
    }
}
