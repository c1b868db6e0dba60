//! Changes that initiators ask for, on their way from a core to the manager: a bounded queue of requests as they came.
//!
//! Invariants:
//! * Asking costs a core no allocation, and one system call at most: the wake-up of a manager that sleeps.
//! * A queue that is full refuses; the initiator asks again. What is refused is as if it had never arrived.
//! * No request waits for a manager that sleeps: the manager's wake-up is a token that is kept when it comes first.

use std::sync::OnceLock;
use std::thread::Thread;

use aoe_xdp::target::CHANGE_LEN_MAX;
use crossbeam::queue::ArrayQueue;

/// Requests on their way to the manager.
const QUEUE_MAX: usize = cluster_map::MAX_CHANGES;

/// A change that an initiator asks for.
#[derive(Debug, Clone, Copy)]
pub struct AskedChange {
    /// The core that waits for the outcome.
    pub core: u16,
    /// The core's name for it.
    pub token: u64,
    frame: [u8; CHANGE_LEN_MAX],
    frame_len: u16,
}

impl AskedChange {
    /// The change that `frame` asks for; `None` if it is longer than [`CHANGE_LEN_MAX`].
    #[must_use]
    pub fn new(core: u16, token: u64, frame: &[u8]) -> Option<AskedChange> {
        let mut bytes = [0; CHANGE_LEN_MAX];
        bytes.get_mut(..frame.len())?.copy_from_slice(frame);
        Some(AskedChange { core, token, frame: bytes, frame_len: u16::try_from(frame.len()).ok()? })
    }

    /// The request, as long as `target::respond` said.
    #[must_use]
    pub fn frame(&self) -> &[u8] {
        &self.frame[..usize::from(self.frame_len)]
    }

    /// The request, to give the answer another tag.
    pub fn frame_mut(&mut self) -> &mut [u8] {
        &mut self.frame[..usize::from(self.frame_len)]
    }
}

/// From all cores to the manager.
#[derive(Debug)]
pub struct ChangeQueue {
    asked: ArrayQueue<AskedChange>,
    manager: OnceLock<Thread>,
}

impl Default for ChangeQueue {
    fn default() -> ChangeQueue {
        ChangeQueue { asked: ArrayQueue::new(QUEUE_MAX), manager: OnceLock::new() }
    }
}

impl ChangeQueue {
    /// The calling thread is the manager: it is unparked by [`push`](Self::push) and [`wake`](Self::wake).
    pub fn attend(&self) {
        self.manager.get_or_init(std::thread::current);
    }

    /// A core asks. Whether there was room.
    #[must_use]
    pub fn push(&self, asked: AskedChange) -> bool {
        let has_room = self.asked.push(asked).is_ok();
        self.wake();
        has_room
    }

    /// The manager takes the next one.
    #[must_use]
    pub fn pop(&self) -> Option<AskedChange> {
        self.asked.pop()
    }

    /// Wakes the manager.
    pub fn wake(&self) {
        if let Some(manager) = self.manager.get() {
            manager.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_refuses_and_nothing_too_long_is_taken() {
        let queue = ChangeQueue::default();
        let asked = AskedChange::new(0, 1, &[7; CHANGE_LEN_MAX]).unwrap();
        assert_eq!(asked.frame(), [7; CHANGE_LEN_MAX]);
        assert!(AskedChange::new(0, 1, &[7; CHANGE_LEN_MAX + 1]).is_none());
        for _ in 0..QUEUE_MAX {
            assert!(queue.push(asked));
        }
        assert!(!queue.push(asked));
        assert_eq!(std::iter::from_fn(|| queue.pop()).count(), QUEUE_MAX);
    }

    #[test]
    fn a_manager_that_was_woken_before_it_slept_does_not_sleep() {
        let queue = ChangeQueue::default();
        queue.attend();
        assert!(queue.push(AskedChange::new(0, 1, b"x").unwrap()));
        // Returns at once: the token is there.
        std::thread::park();
        assert!(queue.pop().is_some());
    }
}
