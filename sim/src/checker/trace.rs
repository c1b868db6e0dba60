//! What happened lately, kept cheaply and told only when it is wanted.
//!
//! Events are kept as they are and made into text when something is wrong. A report has what concerns the matter at hand
//! from as far back as it is kept, and the last of everything else.

use std::collections::VecDeque;
use std::fmt::{Display, Write};

/// The last so many events of a run.
#[derive(Clone, Debug)]
pub struct Trace<E> {
    events: VecDeque<(u64, E)>,
    capacity: usize,
    /// All that ever came.
    count: u64,
    digest: u64,
}

impl<E: Display> Trace<E> {
    /// Keeps at most so many events.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { events: VecDeque::new(), capacity: capacity.max(1), count: 0, digest: 0xcbf2_9ce4_8422_2325 }
    }

    /// Something happened.
    pub fn push(&mut self, now_ns: u64, event: E) {
        if self.events.len() == self.capacity {
            self.events.pop_front();
        }
        self.count += 1;
        self.stir(now_ns);
        self.events.push_back((now_ns, event));
    }

    /// Takes a number into the digest: of whatever two runs of one seed must have in common.
    pub fn stir(&mut self, number: u64) {
        self.digest = (self.digest ^ number).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
    }

    /// How many events there were, those that are forgotten included.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// A number by which two runs can be told to be the same: of the times of all events, and of what was stirred in.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// The events that are kept, oldest first.
    pub fn events(&self) -> impl Iterator<Item = (u64, &E)> {
        self.events.iter().map(|(at_ns, event)| (*at_ns, event))
    }

    /// The last `relevant` events that concern the matter, and the last `any` of all, in order; gaps are marked.
    #[must_use]
    pub fn report(&self, relevant: usize, any: usize, concerns: impl Fn(&E) -> bool) -> String {
        let tail = self.events.len().saturating_sub(any);
        let mut chosen = vec![false; self.events.len()];
        chosen[tail..].fill(true);
        let about = self.events.iter().enumerate().rev().filter(|(_, (_, event))| concerns(event));
        about.take(relevant).for_each(|(index, _)| chosen[index] = true);
        let mut text = String::new();
        let mut left_out = self.count - self.events.len() as u64;
        for (chosen, (at_ns, event)) in chosen.into_iter().zip(&self.events) {
            if !chosen {
                left_out += 1;
                continue;
            }
            if left_out > 0 {
                let _ = writeln!(text, "               ... {left_out} others");
                left_out = 0;
            }
            let _ = writeln!(text, "{:>12} us  {event}", at_ns / 1000);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_and_reports_what_matters() {
        let mut trace = Trace::new(10);
        (0..20u32).for_each(|number| trace.push(u64::from(number) * 1000, number));
        assert_eq!(
            trace.events().map(|(_, number)| *number).collect::<Vec<_>>(),
            (10..20).collect::<Vec<_>>()
        );
        let report = trace.report(2, 1, |number| number % 3 == 0);
        let lines: Vec<&str> = report.lines().map(str::trim).collect();
        assert_eq!(
            lines,
            ["... 15 others", "15 us  15", "... 2 others", "18 us  18", "19 us  19"],
            "{report}"
        );
        assert_eq!(trace.count(), 20);
    }

    #[test]
    fn the_digest_tells_runs_apart() {
        let run = |at_ns: u64, number: u64| {
            let mut trace = Trace::new(1);
            trace.push(at_ns, 'a');
            trace.stir(number);
            trace.push(7, 'b');
            trace.digest()
        };
        assert_eq!(run(1, 2), run(1, 2));
        assert_ne!(run(1, 2), run(2, 2));
        assert_ne!(run(1, 2), run(1, 3));
    }
}
