//! Free extent slots, made ready before somebody needs them.
//!
//! A shard takes a slot when a write needs a new extent, and must not wait for it nor find out later that the file system has
//! no room. So a thread of the store's own keeps a few slots ready: reserved, and in a file on a disk written with zeros, since the
//! first write to a block costs a file system several times one that overwrites.
//!
//! Invariants:
//! * A slot is queued once it is ready. That there are no more is said only when the last one was queued, or the file system
//!   refuses another: then a write that needs one fails, and overwriting goes on.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::device::{Device, DeviceError};
use crate::store::EXTENT_BYTES;
use crate::store::extent::extents::FreeSlot;
use crate::store::extent::format::Superblock;
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
    /// Makes the first slots ready, and starts the thread for the others. `free` are all slots that no extent has.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(
        device: Device,
        layout: Arc<Superblock>,
        shared: Arc<Shared>,
        free: Vec<u32>,
    ) -> Result<SlotFeeder, DeviceError> {
        let talk = Arc::new(Talk::default());
        let own = Arc::clone(&talk);
        let path = device.path().display().to_string();
        let work = move || feed(&device, &layout, &shared, free.into(), &own);
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

fn feed(device: &Device, layout: &Superblock, shared: &Shared, mut free: VecDeque<u32>, talk: &Talk) {
    shared.set_no_more(free.is_empty());
    while !talk.stop.load(Ordering::Relaxed) {
        let wanted = shared.free.len() < READY;
        let Some(slot) = free.front().copied().filter(|_| wanted) else {
            std::thread::park_timeout(LOOK);
            continue;
        };
        let made = device.make_ready(layout.data_offset(slot), EXTENT_BYTES);
        let error = made.as_ref().err().map(DeviceError::to_string).unwrap_or_default();
        *talk.error.lock().unwrap_or_else(PoisonError::into_inner) = error;
        if made.is_ok() {
            free.pop_front();
            shared.give_back(FreeSlot::new(slot));
            shared.set_no_more(free.is_empty());
        } else {
            shared.set_no_more(true);
            std::thread::park_timeout(WAIT_FOR_ROOM);
        }
    }
}
