//! What the cores and the manager share of a store: slots that are free, counters, and what shards have to tell.
//!
//! Invariants:
//! * A slot is in [`Shared::free`] only when no durable state of any shard names it and no write to it is in flight. So it has
//!   one owner at any time: the queue, the shard that took it, or the manager that prepares it.
//! * Everything here is a bounded lock-free queue or an atomic counter of its own; no order between two of them is relied on,
//!   but for those that say that more slots come ([`Shared::no_more`], `begin_giving_back`): each is changed after the
//!   slot it is about was queued, and looked at before the queue is.
//! * So a shard says that the store is full only when somebody has taken each slot that was queued before it was said that there
//!   are no more, and each whose way back had begun before the shard was asked. One that is queued meanwhile it may miss.
//!
//! Built on loom's types under `--cfg loom`, which checks the last two.
#![cfg_attr(loom, allow(dead_code, reason = "the model uses a part"))]

#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crossbeam::queue::ArrayQueue;
#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

#[cfg(loom)]
use self::stand_in::{FreeQueue, FreeSlot};
#[cfg(not(loom))]
use super::extents::FreeSlot;

#[cfg(not(loom))]
type FreeQueue = ArrayQueue<FreeSlot>;

/// What a shard tells the manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShardEvent {
    /// Nothing is left of a layer from that block on: durably.
    Unmapped {
        /// The layer.
        object: u32,
        /// The first block that is gone; 0 when all are.
        from_block: u64,
    },
    /// The shard takes no more writes.
    Failed {
        /// Which.
        shard: u16,
        /// Why.
        why: &'static str,
    },
}

/// How often something has happened.
#[derive(Debug, Default)]
pub struct Counters {
    /// Slots that extents have.
    pub allocated: AtomicU32,
    /// Blocks whose checksum did not match.
    pub checksum_errors: AtomicU64,
    /// Blocks without any good copy.
    pub lost_blocks: AtomicU64,
    /// Batches written.
    pub batches: AtomicU64,
    /// Blocks written in them or beside them.
    pub blocks: AtomicU64,
    /// Checkpoints made.
    pub checkpoints: AtomicU64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, more: u64) {
        counter.fetch_add(more, Ordering::Relaxed);
    }
}

/// The shared part of an open store.
#[derive(Debug)]
pub struct Shared {
    /// Slots that may be given to extents at once.
    pub free: FreeQueue,
    /// What shards tell.
    pub events: ArrayQueue<ShardEvent>,
    /// Counters.
    pub counters: Counters,
    /// How far each shard's scrub is.
    pub scrubs: Box<[ScrubCell]>,
    /// When the rate allows the next read of a scrub.
    scrub_ns: AtomicU64,
    no_more: AtomicBool,
    /// Slots that are to come back, and are not queued yet.
    on_their_way: AtomicU32,
    failed: AtomicBool,
}

/// How far a shard's scrub is, for the manager to read.
#[derive(Debug, Default)]
pub struct ScrubCell {
    /// The run; 0 before the first. Written last when it changes.
    pub run: AtomicU64,
    /// Extents that it has behind it.
    pub done_extents: AtomicU32,
    /// Bad blocks that it has found.
    pub errors: AtomicU64,
    /// It has all of them behind it.
    pub is_finished: AtomicBool,
}

/// Events that may wait for the manager; shards keep what does not fit and try again.
const EVENTS_MAX: usize = 1024;

impl Shared {
    /// For a store of that many slots and shards; no slot is free yet.
    #[must_use]
    pub fn new(slots: u32, shards: u16) -> Shared {
        Shared {
            free: FreeQueue::new(slots.max(1) as usize),
            events: ArrayQueue::new(EVENTS_MAX),
            counters: Counters::default(),
            scrubs: (0..shards).map(|_| ScrubCell::default()).collect(),
            scrub_ns: AtomicU64::new(0),
            no_more: AtomicBool::new(false),
            on_their_way: AtomicU32::new(0),
            failed: AtomicBool::new(false),
        }
    }

    /// When the shard that begins a scrub's read now may begin its next one, if reads are to be `pause_ns` apart, whichever
    /// shards have something to read.
    pub(super) fn next_scrub_ns(&self, now_ns: u64, pause_ns: u64) -> u64 {
        let after = |next_ns: u64| next_ns.max(now_ns).saturating_add(pause_ns);
        let before_ns =
            self.scrub_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| Some(after(next)));
        before_ns.map_or(u64::MAX, after)
    }

    /// Whether an empty [`Shared::free`] means that the store is full; else more slots are being prepared, or given back.
    #[must_use]
    pub fn no_more(&self) -> bool {
        self.no_more.load(Ordering::Acquire) && self.on_their_way.load(Ordering::Acquire) == 0
    }

    /// Whether no slot is free and none will be by itself: for a shard that has found none.
    #[must_use]
    pub fn is_full(&self) -> bool {
        // The other way round, the last slot might be queued between the two looks.
        self.no_more() && self.free.is_empty()
    }

    /// The manager says whether it has slots that it has not queued yet.
    pub fn set_no_more(&self, no_more: bool) {
        self.no_more.store(no_more, Ordering::Release);
    }

    /// Whether a sync or a write has failed. A kernel tells of what it could not write once, to one of those who sync: so
    /// no other shard's sync counts after that.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(super) fn set_failed(&self) {
        self.failed.store(true, Ordering::Release);
    }

    /// Makes a slot free that no extent has had.
    ///
    /// # Panics
    /// If more slots are free than the store has: one was freed twice.
    pub fn add_free(&self, slot: FreeSlot) {
        let queued = self.free.push(slot);
        assert!(queued.is_ok(), "a store has no more free slots than slots");
    }

    /// A slot is to come back, since the end of its extent is in a batch, or its extent has two: who finds none waits for it, until
    /// [`Shared::give_back`] or [`Shared::end_giving_back`].
    pub(super) fn begin_giving_back(&self) {
        self.on_their_way.fetch_add(1, Ordering::Relaxed);
    }

    /// One that was said to be on its way back is not, for now.
    pub(super) fn end_giving_back(&self) {
        self.on_their_way.fetch_sub(1, Ordering::Release);
    }

    /// A slot that was on its way back is free.
    pub(super) fn give_back(&self, slot: FreeSlot) {
        self.add_free(slot);
        // The other way round, who finds the queue empty between the two would take the store for full.
        self.on_their_way.fetch_sub(1, Ordering::Release);
    }
}

/// What loom can see of the queue of free slots.
#[cfg(loom)]
mod stand_in {
    use super::{ArrayQueue, AtomicU32, Ordering};

    /// Its number is enough.
    pub(super) type FreeSlot = u32;

    /// A queue whose every operation is one step on one word. As with the real one, a look that nothing orders behind a push may
    /// find what was there before it.
    #[derive(Debug)]
    pub struct FreeQueue {
        slots: ArrayQueue<FreeSlot>,
        len: AtomicU32,
    }

    impl FreeQueue {
        pub(super) fn new(capacity: usize) -> FreeQueue {
            FreeQueue { slots: ArrayQueue::new(capacity), len: AtomicU32::new(0) }
        }

        /// Appends a slot.
        ///
        /// # Errors
        /// The slot, when there is no room.
        pub fn push(&self, slot: FreeSlot) -> Result<(), FreeSlot> {
            self.slots.push(slot)?;
            self.len.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }

        /// Takes the first slot.
        pub fn pop(&self) -> Option<FreeSlot> {
            let less = |len: u32| len.checked_sub(1);
            self.len.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).ok()?;
            self.slots.pop()
        }

        /// How many there are.
        pub fn len(&self) -> usize {
            self.len.load(Ordering::SeqCst) as usize
        }

        /// Whether there is none.
        pub fn is_empty(&self) -> bool {
            self.len.load(Ordering::SeqCst) == 0
        }
    }
}

/// Feeder and shards under every interleaving and every reordering that the memory model allows.
#[cfg(all(test, loom))]
mod model {
    // Neither is a part of what is checked. Loom's own would be a step with each clone, drop and count.
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32 as Tally;

    use loom::thread::{self, JoinHandle};

    use super::*;

    /// What a shard's look for a slot gives.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Answer {
        Slot(FreeSlot),
        Full,
        /// It waits for a turn and looks again.
        Starved,
    }
    use Answer::{Full, Slot, Starved};

    struct World {
        shared: Shared,
        /// How often a slot was taken.
        taken: Tally,
    }

    impl World {
        fn new(slots: u32) -> Arc<World> {
            Arc::new(World { shared: Shared::new(slots, 1), taken: Tally::new(0) })
        }

        /// The manager makes slots ready, and says when there are no more.
        fn feed(&self, slots: u32) {
            for slot in 0..slots {
                self.shared.add_free(slot);
                self.shared.set_no_more(slot + 1 == slots);
            }
        }

        /// A shard looks for a slot.
        fn look(&self) -> Answer {
            match self.shared.free.pop() {
                Some(slot) => {
                    self.taken.fetch_add(1, Ordering::Relaxed);
                    Slot(slot)
                }
                None if self.shared.is_full() => Full,
                None => Starved,
            }
        }

        /// The same; where the store is full, each of the slots that the manager has was somebody's.
        fn look_for(&self, slots: u32) -> Answer {
            let answer = self.look();
            let taken = self.taken.load(Ordering::Relaxed);
            assert!(answer != Full || taken >= slots, "full, and only {taken} of {slots} slots were taken");
            answer
        }

        /// When all others are done nobody waits.
        fn look_again(&self, before: Answer) -> Option<FreeSlot> {
            match if before == Starved { self.look() } else { before } {
                Slot(slot) => Some(slot),
                Full => None,
                Starved => panic!("starved, and nothing will come"),
            }
        }
    }

    fn spawn<T: 'static>(world: &Arc<World>, work: impl FnOnce(&World) -> T + 'static) -> JoinHandle<T> {
        let world = Arc::clone(world);
        thread::spawn(move || work(&world))
    }

    #[test]
    fn nobody_is_refused_while_a_slot_is_or_will_be_queued() {
        // At most three preemptions: without the bound this one takes minutes.
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let world = World::new(2);
            let feeder = spawn(&world, |world| world.feed(2));
            let shards = [(); 2].map(|()| spawn(&world, |world| world.look_for(2)));
            feeder.join().unwrap();
            let answers = shards.map(|shard| shard.join().unwrap());
            let mut slots = answers.map(|answer| world.look_again(answer).expect("there is one for each"));
            slots.sort_unstable();
            assert_eq!(slots, [0, 1], "a slot has one owner");
        });
    }

    #[test]
    fn who_comes_too_late_is_refused_and_nobody_else() {
        loom::model(|| {
            let world = World::new(1);
            let feeder = spawn(&world, |world| world.feed(1));
            let shards = [(); 2].map(|()| spawn(&world, |world| world.look_for(1)));
            feeder.join().unwrap();
            let answers = shards.map(|shard| shard.join().unwrap());
            let slots = answers.map(|answer| world.look_again(answer));
            assert_eq!(slots.iter().flatten().count(), 1);
            assert!(world.shared.is_full());
        });
    }

    /// *Full* is an answer while the other one has the slot, and while it gives it back.
    #[test]
    fn a_slot_that_is_given_back_meanwhile_is_found_or_still_there() {
        loom::model(|| {
            let world = World::new(1);
            let feeder = spawn(&world, |world| world.feed(1));
            let other = spawn(&world, |world| {
                if let Slot(slot) = world.look_for(1) {
                    world.shared.begin_giving_back();
                    world.shared.give_back(slot);
                }
            });
            let shard = spawn(&world, |world| world.look_for(1));
            feeder.join().unwrap();
            other.join().unwrap();
            let answer = shard.join().unwrap();
            let is_held = matches!(answer, Slot(_));
            assert_eq!(world.shared.is_full(), is_held, "it is somewhere, and once");
            assert!(is_held || world.look() == Slot(0));
        });
    }

    /// Whoever writes while a deletion is on its way waits for its room.
    #[test]
    fn a_slot_on_its_way_is_waited_for() {
        loom::model(|| {
            let world = World::new(1);
            world.feed(1);
            let begun = Arc::new(AtomicBool::new(false));
            let other = spawn(&world, {
                let begun = Arc::clone(&begun);
                move |world| {
                    let Slot(slot) = world.look() else { panic!("nobody else wants it yet") };
                    world.shared.begin_giving_back();
                    begun.store(true, Ordering::Release);
                    world.shared.give_back(slot);
                }
            });
            let shard = spawn(&world, move |world| {
                if begun.load(Ordering::Acquire) {
                    assert_ne!(world.look(), Full, "it comes back");
                }
            });
            other.join().unwrap();
            shard.join().unwrap();
            assert!(!world.shared.is_full() || world.taken.load(Ordering::Relaxed) > 1);
        });
    }

    #[test]
    fn a_slot_that_was_given_back_before_is_found() {
        loom::model(|| {
            let world = World::new(1);
            world.feed(1);
            let gone = Arc::new(AtomicBool::new(false));
            // Whoever deleted a volume may rely on its room.
            let other = spawn(&world, {
                let gone = Arc::clone(&gone);
                move |world| {
                    let Slot(slot) = world.look() else { panic!("nobody else wants it yet") };
                    world.shared.begin_giving_back();
                    world.shared.give_back(slot);
                    gone.store(true, Ordering::Release);
                }
            });
            let shard = spawn(&world, move |world| {
                if gone.load(Ordering::Acquire) {
                    assert_eq!(world.look(), Slot(0));
                }
            });
            other.join().unwrap();
            shard.join().unwrap();
        });
    }

    /// The file system had no room for a while.
    #[test]
    fn a_slot_that_is_ready_after_all_is_found() {
        loom::model(|| {
            let world = World::new(2);
            world.shared.set_no_more(true);
            let ready = Arc::new(AtomicBool::new(false));
            let feeder = spawn(&world, {
                let ready = Arc::clone(&ready);
                move |world| {
                    world.shared.add_free(0);
                    world.shared.set_no_more(false);
                    ready.store(true, Ordering::Release);
                    world.shared.add_free(1);
                    world.shared.set_no_more(true);
                }
            });
            let shards = [Arc::clone(&ready), ready].map(|ready| {
                spawn(&world, move |world| {
                    if ready.load(Ordering::Acquire) {
                        assert_ne!(world.look(), Full, "one is ready and the other one will be");
                    }
                })
            });
            feeder.join().unwrap();
            for shard in shards {
                shard.join().unwrap();
            }
        });
    }

    /// A shard whose sync ends well while another one's has just failed may not know yet. It does when the failure was told
    /// before, and does not forget it.
    #[test]
    fn a_failure_that_was_told_before_is_known_for_good() {
        loom::model(|| {
            let world = World::new(1);
            assert!(!world.shared.has_failed());
            let told = Arc::new(AtomicBool::new(false));
            let failing = spawn(&world, {
                let told = Arc::clone(&told);
                move |world| {
                    world.shared.set_failed();
                    told.store(true, Ordering::Release);
                }
            });
            let other = spawn(&world, move |world| {
                let (told, knows) = (told.load(Ordering::Acquire), world.shared.has_failed());
                assert!(knows || !told, "acknowledged after a failure");
                assert!(world.shared.has_failed() || !knows, "forgotten");
            });
            failing.join().unwrap();
            other.join().unwrap();
            assert!(world.shared.has_failed());
        });
    }
}
