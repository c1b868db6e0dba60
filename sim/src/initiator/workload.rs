//! What an initiator is used for.

use std::ops::Range;

use super::Initiator;
use crate::checker::history::Action;

/// Reads and writes that an initiator makes of itself.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where, each as often as the others: few sectors make many conflicts.
    pub ranges: Vec<Range<u64>>,
    /// Sectors of an operation, of all magnitudes alike.
    pub sectors: Range<u64>,
    /// Of a hundred operations, how many are writes.
    pub writes_percent: u64,
    /// Operations at a time.
    pub depth: usize,
    /// From one beginning to the next, if there is one to spare.
    pub pause_ns: Range<u64>,
}

impl Load {
    /// Small operations all over a device, some at a time.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        Self {
            ranges: vec![0..sectors],
            sectors: 1..33,
            writes_percent: 50,
            depth: 8,
            pause_ns: 1_000_000..10_000_000,
        }
    }
}

impl Initiator {
    /// Begins operations whose time has come.
    pub(super) fn make_ops(&mut self) {
        while self.is_up()
            && self.next_op_ns <= self.now_ns
            && let Some(load) = self.load.take_if(|load| self.ops.len() < load.depth)
        {
            let range = self.random.pick(&load.ranges).cloned().unwrap_or(0..0);
            let room = range.end.min(self.setup.sectors).saturating_sub(range.start);
            if room > 0 {
                let count = self.random.magnitude(load.sectors.clone()).clamp(1, room);
                let lba = range.start + self.random.below(room - count + 1);
                let count = usize::try_from(count).unwrap_or(1);
                if self.random.below(100) < load.writes_percent {
                    self.submit_write(self.now_ns, lba, count);
                } else {
                    self.submit(self.now_ns, lba, Action::Read(count));
                }
            }
            self.next_op_ns = self.now_ns + self.random.range(load.pause_ns.clone()).max(1);
            self.load = Some(load);
        }
    }
}
