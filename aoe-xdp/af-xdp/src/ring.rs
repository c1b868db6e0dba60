//! The cursors of a single-producer single-consumer ring shared with the kernel (Documentation/networking/
//! af_xdp.rst): one side publishes entries by storing the producer index with release, the other gives the
//! slots back by storing the consumer index with release.
//!
//! Invariants: an entry is read only after the index that publishes it was loaded with acquire; a slot is
//! written again only after the index that freed it was loaded with acquire; so each slot has one side at a
//! time. Both indices run freely through `u32` and wrap. Each cursor keeps a cached copy of the other
//! side's index and looks at the shared one only when the copy gives nothing.
//!
//! Built on loom's types under `--cfg loom`, which checks just this.
#![cfg_attr(loom, allow(dead_code, reason = "the model uses a part"))]

use std::ptr::NonNull;

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU32, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU32, Ordering, fence};

/// The flag by which the kernel asks for a wake-up (`XDP_RING_NEED_WAKEUP`).
const NEED_WAKEUP: u32 = 1;

/// One entry's place.
#[cfg(loom)]
pub(crate) type Slot<T> = loom::cell::UnsafeCell<T>;

/// One entry's place, with the access methods of loom's cell.
#[cfg(not(loom))]
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Slot<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> Slot<T> {
    fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}

/// Where a ring's parts lie in memory shared with the other side.
#[derive(Debug)]
pub(crate) struct Shared<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    slots: NonNull<Slot<T>>,
    entries: u32,
}

// SAFETY: the pointers are to memory shared by design; indices are atomic, and slots are accessed by the
// side that the indices give them to. A cursor is used by one thread at a time.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    /// Names the parts of a ring of `entries` slots.
    ///
    /// # Safety
    ///
    /// All pointers must stay valid as long as the value lives, `slots` for `entries` entries that are
    /// valid `T` in any state the other side leaves them in, and at most one producer and one consumer may
    /// be made of one ring.
    pub(crate) unsafe fn new(
        producer: NonNull<AtomicU32>,
        consumer: NonNull<AtomicU32>,
        flags: NonNull<AtomicU32>,
        slots: NonNull<Slot<T>>,
        entries: u32,
    ) -> Self {
        assert!(entries.is_power_of_two(), "ring sizes are powers of two");
        Self { producer, consumer, flags, slots, entries }
    }

    fn producer(&self) -> &AtomicU32 {
        // SAFETY: valid as long as `self`, by the contract of `new`.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { self.consumer.as_ref() }
    }

    fn needs_wakeup(&self) -> bool {
        // SAFETY: as above.
        unsafe { self.flags.as_ref() }.load(Ordering::Relaxed) & NEED_WAKEUP != 0
    }

    fn slot(&self, index: u32) -> &Slot<T> {
        // SAFETY: the mask keeps the place inside the ring, by the contract of `new`.
        unsafe { self.slots.add((index & (self.entries - 1)) as usize).as_ref() }
    }
}

/// The side that writes entries.
#[derive(Debug)]
pub(crate) struct Producer<T> {
    shared: Shared<T>,
    /// The next slot to write; slots from the shared producer index up to here are not published yet.
    next: u32,
    /// The consumer index as last seen.
    consumed: u32,
}

impl<T: Copy> Producer<T> {
    pub(crate) fn new(shared: Shared<T>) -> Self {
        let next = shared.producer().load(Ordering::Relaxed);
        let consumed = shared.consumer().load(Ordering::Acquire);
        Self { shared, next, consumed }
    }

    /// Whether `wanted` entries can be pushed now.
    pub(crate) fn has_room(&mut self, wanted: u32) -> bool {
        if self.room() >= wanted {
            return true;
        }
        self.consumed = self.shared.consumer().load(Ordering::Acquire);
        self.room() >= wanted
    }

    /// Writes one entry, not yet visible to the other side; false where there is no room.
    pub(crate) fn push(&mut self, value: T) -> bool {
        if !self.has_room(1) {
            return false;
        }
        // SAFETY: the slot is ours: the other side freed it, or never had it.
        self.shared.slot(self.next).with_mut(|slot| unsafe { slot.write(value) });
        self.next = self.next.wrapping_add(1);
        true
    }

    /// Makes everything that was pushed visible to the other side.
    pub(crate) fn publish(&mut self) {
        self.shared.producer().store(self.next, Ordering::Release);
    }

    /// Entries, published or not, that the other side has not taken.
    pub(crate) fn pending(&self) -> u32 {
        self.next.wrapping_sub(self.shared.consumer().load(Ordering::Acquire))
    }

    /// Whether the other side sleeps and wants a system call to see what was published.
    pub(crate) fn needs_wakeup(&self) -> bool {
        // The flag must be read after the index is visible: the kernel sets the flag, then looks at the
        // index once more before it sleeps.
        fence(Ordering::SeqCst);
        self.shared.needs_wakeup()
    }

    fn room(&self) -> u32 {
        self.shared.entries - self.next.wrapping_sub(self.consumed)
    }
}

/// The side that reads entries.
#[derive(Debug)]
pub(crate) struct Consumer<T> {
    shared: Shared<T>,
    /// The next slot to read; slots from the shared consumer index up to here are not given back yet.
    next: u32,
    /// The producer index as last seen.
    produced: u32,
}

impl<T: Copy> Consumer<T> {
    pub(crate) fn new(shared: Shared<T>) -> Self {
        let next = shared.consumer().load(Ordering::Relaxed);
        let produced = shared.producer().load(Ordering::Acquire);
        Self { shared, next, produced }
    }

    /// Reads one entry; its slot is given back by [`Consumer::release`].
    pub(crate) fn pop(&mut self) -> Option<T> {
        if self.next == self.produced {
            self.produced = self.shared.producer().load(Ordering::Acquire);
            if self.next == self.produced {
                return None;
            }
        }
        // SAFETY: the entry was published, and its slot is ours until released.
        let value = self.shared.slot(self.next).with(|slot| unsafe { slot.read() });
        self.next = self.next.wrapping_add(1);
        Some(value)
    }

    /// Gives the slots of everything that was popped back to the other side.
    pub(crate) fn release(&mut self) {
        self.shared.consumer().store(self.next, Ordering::Release);
    }

    /// Whether nothing waits to be popped.
    pub(crate) fn is_empty(&self) -> bool {
        self.next == self.shared.producer().load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The memory of a ring, as the kernel would map it.
    struct Memory {
        producer: AtomicU32,
        consumer: AtomicU32,
        flags: AtomicU32,
        slots: Vec<Slot<u64>>,
    }

    // SAFETY: as for `Shared`: that is what is tested.
    unsafe impl Sync for Memory {}

    #[cfg(loom)]
    fn slot() -> Slot<u64> {
        Slot::new(0)
    }

    #[cfg(not(loom))]
    fn slot() -> Slot<u64> {
        Slot(std::cell::UnsafeCell::new(0))
    }

    impl Memory {
        fn new(entries: u32, start: u32) -> Self {
            Self {
                producer: AtomicU32::new(start),
                consumer: AtomicU32::new(start),
                flags: AtomicU32::new(0),
                slots: (0..entries).map(|_| slot()).collect(),
            }
        }

        fn shared(&self) -> Shared<u64> {
            let entries = u32::try_from(self.slots.len()).unwrap();
            let slots = NonNull::from(&self.slots[0]);
            // SAFETY: the tests keep the memory alive and make one cursor of each kind.
            unsafe {
                Shared::new(
                    (&self.producer).into(),
                    (&self.consumer).into(),
                    (&self.flags).into(),
                    slots,
                    entries,
                )
            }
        }
    }

    /// Both sides of a ring of two slots at once, without waiting for each other: one tries to push three
    /// values, publishing after each or at the end, the other tries to pop three times. What was pushed
    /// arrives once, in order, now or afterwards. The third value needs a slot that the other side freed.
    #[cfg(loom)]
    fn model(start: u32, publish_each: bool, release_each: bool) {
        loom::model(move || {
            let memory = loom::sync::Arc::new(Memory::new(2, start));
            // Made before the threads part: loom tracks one last access of an index, and a writer's own
            // first look at it would hide the reader's.
            let mut producer = Producer::new(memory.shared());
            let mut consumer = Consumer::new(memory.shared());
            let writer = loom::thread::spawn(move || {
                let mut pushed = 0;
                for _ in 0..3 {
                    pushed += u64::from(producer.push(pushed));
                    if publish_each {
                        producer.publish();
                    }
                }
                producer.publish();
                pushed
            });
            let mut popped = 0;
            for _ in 0..3 {
                if let Some(value) = consumer.pop() {
                    assert_eq!(value, popped, "entries arrive in order, once");
                    popped += 1;
                    if release_each {
                        consumer.release();
                    }
                }
            }
            let pushed = writer.join().unwrap();
            assert!(pushed >= 2, "two slots were free");
            while let Some(value) = consumer.pop() {
                assert_eq!(value, popped);
                popped += 1;
            }
            assert_eq!(popped, pushed, "nothing is lost");
            assert!(consumer.is_empty());
        });
    }

    #[cfg(loom)]
    #[test]
    fn model_entries_published_and_released_alone() {
        model(0, true, true);
    }

    #[cfg(loom)]
    #[test]
    fn model_batches_published_and_released_together() {
        model(0, false, false);
    }

    #[cfg(loom)]
    #[test]
    fn model_indices_that_wrap() {
        model(u32::MAX - 1, true, true);
    }

    /// The kernel's side of a sleeping transmit ring: it sets the flag, then looks at the index again.
    #[cfg(loom)]
    #[test]
    fn model_no_wakeup_is_lost() {
        loom::model(|| {
            let memory = loom::sync::Arc::new(Memory::new(2, 0));
            let kernel = {
                let memory = memory.clone();
                loom::thread::spawn(move || {
                    memory.flags.store(NEED_WAKEUP, Ordering::Relaxed);
                    fence(Ordering::SeqCst);
                    memory.producer.load(Ordering::Acquire) != 0
                })
            };
            let mut producer = Producer::new(memory.shared());
            assert!(producer.push(7));
            producer.publish();
            let woken = producer.needs_wakeup();
            let seen = kernel.join().unwrap();
            assert!(woken || seen, "either we see the flag or the kernel sees the entry");
        });
    }

    #[cfg(not(loom))]
    mod sequential {
        use super::*;
        use proptest::prelude::*;
        use std::collections::VecDeque;

        #[derive(Debug, Clone)]
        enum Step {
            Push(u8),
            Publish,
            Pop(u8),
            Release,
        }

        fn step() -> impl Strategy<Value = Step> {
            prop_oneof![
                (1u8..6).prop_map(Step::Push),
                Just(Step::Publish),
                (1u8..6).prop_map(Step::Pop),
                Just(Step::Release),
            ]
        }

        proptest! {
            #[test]
            fn a_ring_is_a_bounded_queue(
                start in prop_oneof![Just(0u32), u32::MAX - 9..=u32::MAX],
                steps in proptest::collection::vec(step(), 1..200),
            ) {
                let memory = Memory::new(4, start);
                let mut producer = Producer::new(memory.shared());
                let mut consumer = Consumer::new(memory.shared());
                let (mut hidden, mut visible, mut held) = (VecDeque::new(), VecDeque::new(), 0);
                let mut next = 0u64;
                for step in steps {
                    match step {
                        Step::Push(count) => for _ in 0..count {
                            let room = hidden.len() + visible.len() + held < 4;
                            prop_assert_eq!(producer.push(next), room);
                            if room {
                                hidden.push_back(next);
                                next += 1;
                            }
                        },
                        Step::Publish => {
                            producer.publish();
                            visible.append(&mut hidden);
                        }
                        Step::Pop(count) => for _ in 0..count {
                            let expected = visible.pop_front();
                            prop_assert_eq!(consumer.pop(), expected);
                            held += usize::from(expected.is_some());
                        },
                        Step::Release => {
                            consumer.release();
                            held = 0;
                        }
                    }
                    prop_assert_eq!(consumer.is_empty(), visible.is_empty());
                    prop_assert_eq!(producer.pending() as usize, hidden.len() + visible.len() + held);
                }
            }
        }

        #[test]
        fn the_wakeup_flag_is_seen() {
            let memory = Memory::new(2, 0);
            let producer = Producer::new(memory.shared());
            assert!(!producer.needs_wakeup());
            memory.flags.store(NEED_WAKEUP, Ordering::Relaxed);
            assert!(producer.needs_wakeup());
        }
    }
}
