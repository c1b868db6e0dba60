//! Simulated time: what happens next, and what the clocks of the nodes show meanwhile.
//!
//! A [`Schedule`] gives events out in the order of their times, and those of one time in the order in which they were put
//! in: nothing else decides. Every component of a simulation has one for its own events and tells when its next is due;
//! whoever runs them takes the earliest.
//!
//! A [`Clock`] is what one node reads. Safety rests on durations by boot-time clocks (I1), so these drift but never go back,
//! and go on while the node is paused; wall clocks, on which nothing may rest, jump.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::random::Random;

/// An event that was put into a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EventId {
    slot: usize,
    order: u64,
}

/// Events to come. See the module.
#[derive(Clone, Debug)]
pub struct Schedule<E> {
    now_ns: u64,
    /// Grows with each event: decides between those of one time, and tells a slot's event from earlier ones.
    order: u64,
    /// Time, order, slot. Its first entry is always of an event that stands.
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    slots: Vec<Option<(u64, E)>>,
    free: Vec<usize>,
}

impl<E> Default for Schedule<E> {
    fn default() -> Self {
        Self::new()
    }
}

impl<E> Schedule<E> {
    /// No events, at time 0.
    #[must_use]
    pub fn new() -> Self {
        Self { now_ns: 0, order: 0, heap: BinaryHeap::new(), slots: Vec::new(), free: Vec::new() }
    }

    /// The time of the last event given out, or the latest one that [`Self::pop_by`] was asked for.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Events that stand.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether nothing will happen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// When the next event is due.
    #[must_use]
    pub fn next_ns(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at_ns, ..))| *at_ns)
    }

    /// Puts an event in; now, if its time has passed.
    pub fn at(&mut self, at_ns: u64, event: E) -> EventId {
        self.order += 1;
        let order = self.order;
        let slot = self.free.pop().unwrap_or(self.slots.len());
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some((order, event));
        self.heap.push(Reverse((at_ns.max(self.now_ns), order, slot)));
        EventId { slot, order }
    }

    /// Puts an event in that long from now.
    pub fn after(&mut self, delay_ns: u64, event: E) -> EventId {
        self.at(self.now_ns.saturating_add(delay_ns), event)
    }

    /// Takes an event out that is not to happen; `None` if it has happened or was taken out.
    pub fn cancel(&mut self, id: EventId) -> Option<E> {
        let event = self.take(id)?;
        self.drop_cancelled();
        Some(event)
    }

    /// The next event and its time, which it becomes.
    pub fn pop(&mut self) -> Option<(u64, E)> {
        self.pop_by(u64::MAX)
    }

    /// The next event if it is due by then. If there is none, it is that time now.
    pub fn pop_by(&mut self, limit_ns: u64) -> Option<(u64, E)> {
        let due = self.heap.peek().is_some_and(|Reverse((at_ns, ..))| *at_ns <= limit_ns);
        if !due {
            if limit_ns < u64::MAX {
                self.now_ns = self.now_ns.max(limit_ns);
            }
            return None;
        }
        let Reverse((at_ns, order, slot)) = self.heap.pop()?;
        self.now_ns = at_ns;
        let event = self.take(EventId { slot, order })?;
        self.drop_cancelled();
        Some((at_ns, event))
    }

    fn take(&mut self, id: EventId) -> Option<E> {
        let slot = self.slots.get_mut(id.slot)?;
        if slot.as_ref().is_none_or(|(order, _)| *order != id.order) {
            return None;
        }
        self.free.push(id.slot);
        slot.take().map(|(_, event)| event)
    }

    fn drop_cancelled(&mut self) {
        let slots = &self.slots;
        let stands = |order: u64, slot: usize| slots[slot].as_ref().is_some_and(|(held, _)| *held == order);
        while let Some(Reverse((_, order, slot))) = self.heap.peek()
            && !stands(*order, *slot)
        {
            self.heap.pop();
        }
        // Timers that are put off again and again must not pile up behind one that is far away.
        if self.heap.len() > 64 + 2 * (self.slots.len() - self.free.len()) {
            self.heap.retain(|Reverse((_, order, slot))| stands(*order, *slot));
        }
    }
}

/// The most by which a node's clock may run fast or slow: what grants allow for.
pub const DRIFT_LIMIT_PPM: i32 = 100_000;
/// The most by which a clock is made to run fast or slow unless a scenario says otherwise.
pub const DRIFT_USUAL_PPM: i32 = 1000;

const MILLION: u128 = 1_000_000;

/// The clocks of one machine. See the module.
#[derive(Clone, Debug)]
pub struct Clock {
    /// At this simulated time the boot-time clock showed `boot_ns`.
    since_ns: u64,
    boot_ns: u64,
    drift_ppm: i32,
    /// Wall-clock time less boot time.
    wall_ahead_ns: i64,
}

impl Clock {
    /// The clocks of a machine that starts now, running fast by so many millionths (slow, if negative).
    #[must_use]
    pub fn new(now_ns: u64, drift_ppm: i32) -> Self {
        let drift_ppm = drift_ppm.clamp(-DRIFT_LIMIT_PPM, DRIFT_LIMIT_PPM);
        Self { since_ns: now_ns, boot_ns: 0, drift_ppm, wall_ahead_ns: 0 }
    }

    /// The clocks of a machine that starts now, as fast as they happen to be.
    #[must_use]
    pub fn drawn(now_ns: u64, limit_ppm: i32, random: &mut Random) -> Self {
        let limit = limit_ppm.unsigned_abs().min(DRIFT_LIMIT_PPM.unsigned_abs());
        let drawn = i32::try_from(random.below(u64::from(limit) * 2 + 1)).unwrap_or(0);
        Self::new(now_ns, drawn - i32::try_from(limit).unwrap_or(0))
    }

    /// How fast it runs.
    #[must_use]
    pub fn drift_ppm(&self) -> i32 {
        self.drift_ppm
    }

    fn rate(&self) -> u128 {
        u128::from((1_000_000 + self.drift_ppm).unsigned_abs())
    }

    /// What the boot-time clock shows. Never less than before, whatever happens to the node's processes.
    #[must_use]
    pub fn boot_ns(&self, now_ns: u64) -> u64 {
        let passed = u128::from(now_ns.saturating_sub(self.since_ns)) * self.rate() / MILLION;
        self.boot_ns.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
    }

    /// The first simulated time at which the boot-time clock shows that or more: when a timer set by it fires.
    #[must_use]
    pub fn simulated_ns(&self, boot_ns: u64) -> u64 {
        let wait = (u128::from(boot_ns.saturating_sub(self.boot_ns)) * MILLION).div_ceil(self.rate());
        self.since_ns.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX))
    }

    /// What the wall clock shows.
    #[must_use]
    pub fn wall_ns(&self, now_ns: u64) -> u64 {
        self.boot_ns(now_ns).saturating_add_signed(self.wall_ahead_ns)
    }

    /// Sets the wall clock forward or back; the boot-time clock takes no notice.
    pub fn jump_wall(&mut self, by_ns: i64) {
        self.wall_ahead_ns = self.wall_ahead_ns.saturating_add(by_ns);
    }

    /// Changes how fast both clocks run from now on. Timers set by boot time have to be converted anew.
    pub fn set_drift(&mut self, now_ns: u64, drift_ppm: i32) {
        let boot_ns = self.boot_ns(now_ns);
        *self =
            Self { since_ns: now_ns, boot_ns, ..Self::new(now_ns, drift_ppm).with_wall(self.wall_ahead_ns) };
    }

    /// The machine starts anew: boot time begins at zero, the wall clock goes on.
    pub fn reboot(&mut self, now_ns: u64) {
        let wall_ns = self.wall_ns(now_ns);
        let ahead_ns = i64::try_from(wall_ns).unwrap_or(i64::MAX);
        *self = Self::new(now_ns, self.drift_ppm).with_wall(ahead_ns);
    }

    fn with_wall(mut self, ahead_ns: i64) -> Self {
        self.wall_ahead_ns = ahead_ns;
        self
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn events_of_one_time_come_in_the_order_they_were_put_in() {
        let mut schedule = Schedule::new();
        schedule.at(20, 'c');
        schedule.at(10, 'a');
        schedule.at(20, 'd');
        schedule.at(10, 'b');
        let order: Vec<_> = std::iter::from_fn(|| schedule.pop()).collect();
        assert_eq!(order, [(10, 'a'), (10, 'b'), (20, 'c'), (20, 'd')]);
        schedule.at(5, 'e');
        assert_eq!(schedule.pop(), Some((20, 'e')), "time does not go back");
    }

    #[test]
    fn a_cancelled_event_does_not_happen_and_its_id_means_no_later_one() {
        let mut schedule = Schedule::new();
        let first = schedule.at(10, 1);
        assert_eq!(schedule.cancel(first), Some(1));
        assert_eq!((schedule.next_ns(), schedule.is_empty()), (None, true));
        let second = schedule.at(30, 2);
        assert_eq!(schedule.cancel(first), None);
        assert_eq!((schedule.pop_by(29), schedule.now_ns()), (None, 29));
        assert_eq!(schedule.pop_by(30), Some((30, 2)));
        assert_eq!(schedule.cancel(second), None);
    }

    #[test]
    fn a_timer_put_off_for_ever_takes_no_memory() {
        let mut schedule = Schedule::new();
        schedule.at(1, 0);
        let mut timer = schedule.at(1000, 1);
        for at_ns in 1001..20_000 {
            schedule.cancel(timer);
            timer = schedule.at(at_ns, 1);
        }
        assert_eq!(schedule.len(), 2);
        assert!(schedule.heap.len() < 100 && schedule.slots.len() <= 3);
    }

    proptest! {
        #[test]
        fn gives_out_what_a_sorted_list_would(steps in proptest::collection::vec((0u64..50, 0u8..4), 1..200)) {
            let mut schedule = Schedule::new();
            let mut model: Vec<(u64, u64, EventId)> = Vec::new();
            for (number, (at_ns, kind)) in (0u64..).zip(steps) {
                match kind {
                    0 | 1 => {
                        let id = schedule.at(at_ns, number);
                        model.push((at_ns.max(schedule.now_ns()), number, id));
                        model.sort_unstable();
                    }
                    2 if !model.is_empty() => {
                        let (_, expected, id) = model.remove(usize::try_from(at_ns).unwrap() % model.len());
                        prop_assert_eq!(schedule.cancel(id), Some(expected));
                    }
                    _ => {
                        let expected = if model.is_empty() { None } else { Some(model.remove(0)) };
                        prop_assert_eq!(schedule.pop(), expected.map(|(at_ns, number, _)| (at_ns, number)));
                    }
                }
                prop_assert_eq!(schedule.next_ns(), model.first().map(|(at_ns, ..)| *at_ns));
                prop_assert_eq!(schedule.len(), model.len());
            }
        }

        #[test]
        fn a_timer_fires_when_its_clock_shows_it_and_not_before(
            start in 0u64..1 << 40, drift in -DRIFT_LIMIT_PPM..=DRIFT_LIMIT_PPM, boot_ns in 1u64..1 << 45,
        ) {
            let clock = Clock::new(start, drift);
            let at_ns = clock.simulated_ns(boot_ns);
            prop_assert!(clock.boot_ns(at_ns) >= boot_ns);
            prop_assert!(clock.boot_ns(at_ns - 1) < boot_ns);
        }

        #[test]
        fn a_boot_clock_never_goes_back(changes in proptest::collection::vec(
            (0u64..1 << 35, -DRIFT_LIMIT_PPM..=DRIFT_LIMIT_PPM, any::<i64>()), 1..20)) {
            let (mut clock, mut now_ns, mut seen_ns) = (Clock::new(0, 0), 0, 0);
            for (by_ns, drift, jump) in changes {
                now_ns += by_ns;
                prop_assert!(clock.boot_ns(now_ns) >= seen_ns);
                clock.set_drift(now_ns, drift);
                clock.jump_wall(jump);
                seen_ns = clock.boot_ns(now_ns);
            }
        }
    }

    #[test]
    fn drift_is_what_it_says() {
        let fast = Clock::new(0, 100_000);
        let slow = Clock::new(0, -100_000);
        assert_eq!((fast.boot_ns(1_000_000_000), slow.boot_ns(1_000_000_000)), (1_100_000_000, 900_000_000));
        let mut random = Random::new(1);
        let drawn: Vec<i32> = (0..100).map(|_| Clock::drawn(0, 1000, &mut random).drift_ppm()).collect();
        assert!(drawn.iter().all(|ppm| ppm.abs() <= 1000));
        assert!(drawn.iter().any(|ppm| *ppm < -500) && drawn.iter().any(|ppm| *ppm > 500));
    }

    #[test]
    fn a_reboot_starts_boot_time_and_keeps_the_wall_clock() {
        let mut clock = Clock::new(0, 0);
        clock.jump_wall(500);
        clock.reboot(1000);
        assert_eq!((clock.boot_ns(1000), clock.wall_ns(1000), clock.wall_ns(1100)), (0, 1500, 1600));
        clock.jump_wall(-300);
        assert_eq!((clock.boot_ns(1100), clock.wall_ns(1100)), (100, 1300));
    }
}
