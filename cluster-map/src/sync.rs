//! The atomics that the protocols of this crate are written on: the machine's, or loom's when they are model-checked.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Gives the other side a moment between two attempts.
pub(crate) fn pause() {
    #[cfg(not(loom))]
    std::hint::spin_loop();
    #[cfg(loom)]
    loom::thread::yield_now();
}

/// Loads a number that lies little-endian in shared memory.
pub(crate) fn load_le(word: &AtomicU64, order: Ordering) -> u64 {
    u64::from_le(word.load(order))
}

/// Stores a number little-endian in shared memory.
pub(crate) fn store_le(word: &AtomicU64, value: u64, order: Ordering) {
    word.store(value.to_le(), order);
}
