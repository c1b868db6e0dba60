//! What an initiator is used for.

use std::iter::once;
use std::ops::Range;

use super::{Initiator, Op};
use crate::checker::history::Action;

/// Reads and writes that an initiator makes of itself.
///
/// As a file system does, it writes no sector that it is writing already. It has to be so for what it sees to be
/// linearizable: the driver repeats a write until it is answered, and where the first copy was executed, read and replaced by
/// another write before the second came, no target can tell that one from a new write. Initiators that share a
/// device therefore need ranges of their own for writing.
#[derive(Clone, Debug)]
pub struct Load {
    /// What it writes, each range as often as the others: few sectors make many conflicts.
    pub writes: Vec<Range<u64>>,
    /// What it reads.
    pub reads: Vec<Range<u64>>,
    /// Sectors of an operation, of all magnitudes alike.
    pub sectors: Range<u64>,
    /// Of a hundred operations, how many are writes.
    pub writes_percent: u64,
    /// Operations at a time.
    pub depth: usize,
    /// From one beginning to the next, if there is one to spare.
    pub pause_ns: Range<u64>,
    /// It also writes what it is writing: for runs in which no frame of a write has to be repeated.
    pub overlapping_writes: bool,
}

impl Load {
    /// Small operations all over a device, some at a time.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        Self {
            writes: once(0..sectors).collect(),
            reads: once(0..sectors).collect(),
            sectors: 1..33,
            writes_percent: 50,
            depth: 8,
            pause_ns: 1_000_000..10_000_000,
            overlapping_writes: false,
        }
    }
}

impl Op {
    fn writes_any_of(&self, lba: u64, count: u64) -> bool {
        matches!(self.action, Action::Write(_))
            && self.lba < lba + count
            && lba < self.lba + self.sectors as u64
    }
}

impl Initiator {
    /// Begins operations whose time has come.
    pub(super) fn make_ops(&mut self) {
        while self.is_up()
            && self.next_op_ns <= self.now_ns
            && let Some(load) = self.load.take_if(|load| self.ops.len() < load.depth)
        {
            self.make_op(&load);
            self.next_op_ns = self.now_ns + self.random.range(load.pause_ns.clone()).max(1);
            self.load = Some(load);
        }
    }

    fn make_op(&mut self, load: &Load) {
        let is_write = self.random.below(100) < load.writes_percent;
        let range =
            self.random.pick(if is_write { &load.writes } else { &load.reads }).cloned().unwrap_or(0..0);
        let room = range.end.min(self.setup.sectors).saturating_sub(range.start);
        if room == 0 {
            return;
        }
        let count = self.random.magnitude(load.sectors.clone()).clamp(1, room);
        let lba = range.start + self.random.below(room - count + 1);
        let sectors = usize::try_from(count).unwrap_or(1);
        if !is_write {
            self.submit(self.now_ns, lba, Action::Read(sectors));
        } else if load.overlapping_writes || !self.ops.values().any(|op| op.writes_any_of(lba, count)) {
            self.submit_write(self.now_ns, lba, sectors);
        }
    }
}
