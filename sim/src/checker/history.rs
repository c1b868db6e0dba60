//! Whether all that initiators saw is what one disk could have answered: linearizable, sector by sector.
//!
//! Each write gives a sector a value that no other write gives it. Then (Gibbons and Korach) it is enough to look at
//! each value's *zone*: from the first end of an operation on it to the last beginning of one. If the end comes first, the
//! sector held this value all that time: a *forward* zone. Else one moment in between was enough: a *backward* zone. A
//! history is linearizable if and only if no read ended before the write of its value began, no two forward zones overlap,
//! and no backward zone lies within a forward one. So an acknowledged write is seen by every later read (I5), one
//! that was not acknowledged appears at most once and stays once it was read, and no value comes from nowhere.
//!
//! This holds at every moment, with operations under way: those that have not ended constrain nothing. A value that no
//! operation still to end may return is forgotten, so that a sector costs what is in flight on it, and one value for each
//! write whose fate was never learned.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// A volume, or whatever else is one array of sectors to those who use it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId(pub u64);

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume {}", self.0)
    }
}

/// An operation of an initiator. Whoever makes them gives each a number of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

impl fmt::Display for OpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "op {:x}", self.0)
    }
}

/// What a sector holds that was never written: zeros.
pub const UNWRITTEN: u64 = 0;

/// What an operation does, beginning at sector `lba`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reads so many sectors.
    Read(usize),
    /// Writes a value to each sector, never [`UNWRITTEN`] and never one that the sector was given before.
    Write(Vec<u64>),
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A read, with what each sector held.
    Read(Vec<u64>),
    /// A write that is acknowledged.
    Written,
    /// An error: a read says nothing by it, a write may have happened or may happen yet.
    Failed,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A value that was never written to this sector, or that was replaced so long ago that it is forgotten.
    #[error("{0:#x} was read, which was never written there or was replaced long ago")]
    Unknown(u64),
    /// A value that had been replaced before the read began, or one that was to be seen and is not.
    #[error("{read:#x} was read, but {newer:#x} had replaced it for good")]
    Stale {
        /// What was read.
        read: u64,
        /// What had replaced it.
        newer: u64,
    },
    /// Two values that must each have been there all the time between two moments, which overlap.
    #[error("{0:#x} and {1:#x} cannot both have been there when they were seen")]
    Torn(u64, u64),
    /// An outcome that does not fit the operation.
    #[error("an answer of another form than was asked for")]
    Form,
}

/// A history that no disk could have produced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// When it was noticed.
    pub now_ns: u64,
    /// Where.
    pub volume: VolumeId,
    /// The sector.
    pub lba: u64,
    /// The operation whose end shows it.
    pub op: OpId,
    /// What is wrong.
    pub fault: Fault,
    /// What happened to the sector lately, oldest first.
    pub recent: Vec<Step>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { now_ns, volume, lba, op, fault, recent } = self;
        writeln!(f, "{volume}, sector {lba}, {op} at {} us: {fault}", now_ns / 1000)?;
        for step in recent {
            writeln!(f, "  {step}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Violation {}

/// One thing that happened to a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// When.
    pub at_ns: u64,
    /// By which operation.
    pub op: OpId,
    /// What.
    pub kind: StepKind,
}

/// See [`Step`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// A write of this value begins.
    WriteBegins(u64),
    /// The write of this value is acknowledged.
    WriteEnds(u64),
    /// The write of this value failed, or nobody will learn what became of it.
    WriteInDoubt(u64),
    /// A read begins.
    ReadBegins,
    /// A read returns this value.
    ReadEnds(u64),
    /// A read failed.
    ReadFails,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>12} us  {:<12} ", self.at_ns / 1000, self.op.to_string())?;
        match self.kind {
            StepKind::WriteBegins(value) => write!(f, "write of {value:#x} begins"),
            StepKind::WriteEnds(value) => write!(f, "write of {value:#x} is acknowledged"),
            StepKind::WriteInDoubt(value) => write!(f, "write of {value:#x} is in doubt"),
            StepKind::ReadBegins => write!(f, "read begins"),
            StepKind::ReadEnds(value) => write!(f, "read returns {value:#x}"),
            StepKind::ReadFails => write!(f, "read fails"),
        }
    }
}

/// Steps of a sector that are kept for an explanation.
const RECENT_STEPS: usize = 16;

/// One value that a sector was given.
#[derive(Clone, Debug)]
struct Value {
    value: u64,
    /// When the last operation on it began.
    last_begin: u64,
    /// When the first operation on it ended; `u64::MAX` if none has.
    first_end: u64,
    /// The write may still end.
    writing: bool,
    /// Another value is known to have come after it for good.
    replaced_by: Option<u64>,
}

impl Value {
    fn is_forward(&self) -> bool {
        self.first_end < self.last_begin
    }

    fn low(&self) -> u64 {
        self.first_end.min(self.last_begin)
    }

    fn high(&self) -> u64 {
        self.first_end.max(self.last_begin)
    }

    /// Whether both can be right.
    fn agrees_with(&self, other: &Value) -> bool {
        match (self.is_forward(), other.is_forward()) {
            (true, true) => self.high() < other.low() || other.high() < self.low(),
            (true, false) => !self.encloses(other),
            (false, true) => !other.encloses(self),
            (false, false) => true,
        }
    }

    fn encloses(&self, other: &Value) -> bool {
        self.low() < other.low() && other.high() < self.high()
    }

    /// Whether a read of it that begins at `begin` or later would contradict the other.
    fn ruled_out_by(&self, other: &Value, begin: u64) -> bool {
        if self.first_end >= begin {
            return false;
        }
        let extended = Value { last_begin: self.last_begin.max(begin), ..self.clone() };
        !extended.agrees_with(other)
    }
}

/// One sector.
#[derive(Clone, Debug)]
struct Sector {
    values: Vec<Value>,
    /// Operations under way, and when they began.
    open: Vec<(OpId, u64)>,
    recent: VecDeque<Step>,
}

impl Sector {
    fn new() -> Self {
        let unwritten =
            Value { value: UNWRITTEN, last_begin: 0, first_end: 0, writing: false, replaced_by: None };
        Self { values: vec![unwritten], open: Vec::new(), recent: VecDeque::new() }
    }

    fn note(&mut self, at_ns: u64, op: OpId, kind: StepKind) {
        if self.recent.len() == RECENT_STEPS {
            self.recent.pop_front();
        }
        self.recent.push_back(Step { at_ns, op, kind });
    }

    fn close(&mut self, op: OpId) -> u64 {
        let at = self.open.iter().position(|(open, _)| *open == op);
        at.map_or(0, |at| self.open.swap_remove(at).1)
    }

    /// An operation that began and ended then shows that the sector held the value between the two.
    fn saw(&mut self, value: u64, begin: u64, end: u64, is_write: bool) -> Result<(), Fault> {
        let Some(at) = self.values.iter().position(|known| known.value == value) else {
            return Err(Fault::Unknown(value));
        };
        let seen = &mut self.values[at];
        // The write itself may end after its value was replaced.
        if let Some(newer) = seen.replaced_by
            && !is_write
        {
            return Err(Fault::Stale { read: value, newer });
        }
        seen.writing &= !is_write;
        seen.last_begin = seen.last_begin.max(begin);
        seen.first_end = seen.first_end.min(end);
        let seen = &self.values[at];
        if let Some(other) = self.values.iter().find(|other| other.value != value && !seen.agrees_with(other))
        {
            let stale = !is_write && other.low() > seen.first_end;
            return Err(if stale {
                Fault::Stale { read: value, newer: other.value }
            } else {
                Fault::Torn(value, other.value)
            });
        }
        Ok(())
    }

    /// Forgets what can matter to nothing that ends from now on, all of which begins at `horizon` or later.
    fn forget(&mut self, now: u64) {
        if self.values.len() == 1 {
            return;
        }
        let horizon = self.open.iter().map(|(_, begin)| *begin).min().unwrap_or(now);
        for at in 0..self.values.len() {
            let value = &self.values[at];
            if value.replaced_by.is_some() || value.first_end >= horizon {
                continue;
            }
            let ruling_out = self
                .values
                .iter()
                .find(|other| other.value != value.value && value.ruled_out_by(other, horizon));
            self.values[at].replaced_by = ruling_out.map(|other| other.value);
        }
        // The zone of a replaced value ended before the horizon, else it would contradict another already: whatever ends
        // from now on agrees with it, if it agrees with those that are kept.
        self.values.retain(|value| value.replaced_by.is_none() || value.writing);
    }
}

#[derive(Clone, Debug)]
struct Open {
    volume: VolumeId,
    lba: u64,
    action: Action,
}

/// All that initiators asked and were told, as far as it still matters. See the module.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Grows with each beginning and end: their order is all that counts.
    moment: u64,
    sectors: BTreeMap<(VolumeId, u64), Sector>,
    open: BTreeMap<OpId, Open>,
    ended: u64,
    digest: u64,
}

fn stirred(digest: u64, number: u64) -> u64 {
    (digest ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
}

impl History {
    /// Nothing has happened; every sector is unwritten.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Operations that have ended.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.ended
    }

    /// A number by which two runs can be told to be the same: of all operations, when they began and ended, and what they
    /// read.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Operations under way.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.open.len()
    }

    /// Values that are remembered, of all sectors.
    #[must_use]
    pub fn remembered_values(&self) -> usize {
        self.sectors.values().map(|sector| sector.values.len()).sum()
    }

    /// An initiator begins an operation: call this before anything of it is sent.
    pub fn begin(&mut self, now_ns: u64, op: OpId, volume: VolumeId, lba: u64, action: Action) {
        self.moment += 1;
        let moment = self.moment;
        self.digest = [now_ns, op.0, lba].into_iter().fold(self.digest, stirred);
        let count = match &action {
            Action::Read(count) => *count,
            Action::Write(values) => values.len(),
        };
        let sectors = (volume, lba)..(volume, lba + count as u64);
        if self.sectors.range(sectors.clone()).count() < count {
            for lba in (lba..).take(count) {
                self.sectors.entry((volume, lba)).or_insert_with(Sector::new);
            }
        }
        for (index, (_, sector)) in self.sectors.range_mut(sectors).enumerate() {
            sector.open.push((op, moment));
            match &action {
                Action::Read(_) => sector.note(now_ns, op, StepKind::ReadBegins),
                Action::Write(values) => {
                    let value = values[index];
                    sector.note(now_ns, op, StepKind::WriteBegins(value));
                    sector.values.push(Value {
                        value,
                        last_begin: moment,
                        first_end: u64::MAX,
                        writing: true,
                        replaced_by: None,
                    });
                }
            }
        }
        self.open.insert(op, Open { volume, lba, action });
    }

    /// An operation ends: call this when its initiator learns of it. An operation that is not under way is ignored.
    ///
    /// # Errors
    /// The history is wrong from here on.
    pub fn end(&mut self, now_ns: u64, op: OpId, outcome: &Outcome) -> Result<(), Box<Violation>> {
        let Some(Open { volume, lba, action }) = self.open.remove(&op) else { return Ok(()) };
        self.moment += 1;
        self.ended += 1;
        let moment = self.moment;
        self.digest = [now_ns, op.0].into_iter().fold(self.digest, stirred);
        if let Outcome::Read(values) = outcome {
            self.digest = values.iter().copied().fold(self.digest, stirred);
        }
        let violation = |sector: Option<&Sector>, lba: u64, fault: Fault| {
            let recent = sector.map(|sector| sector.recent.iter().copied().collect()).unwrap_or_default();
            Err(Box::new(Violation { now_ns, volume, lba, op, fault, recent }))
        };
        let count = match (&action, outcome) {
            (Action::Read(count), Outcome::Failed) => *count,
            (Action::Read(count), Outcome::Read(values)) if values.len() == *count => *count,
            (Action::Write(values), Outcome::Written | Outcome::Failed) => values.len(),
            _ => return violation(None, lba, Fault::Form),
        };
        let sectors = (volume, lba)..(volume, lba + count as u64);
        for (index, ((_, lba), sector)) in self.sectors.range_mut(sectors).enumerate() {
            let begin = sector.close(op);
            let (kind, seen) = match (&action, outcome) {
                (Action::Write(values), Outcome::Written) => {
                    (StepKind::WriteEnds(values[index]), Some((values[index], true)))
                }
                (Action::Write(values), _) => {
                    let value = values[index];
                    for known in sector.values.iter_mut().filter(|known| known.value == value) {
                        known.writing = false;
                    }
                    (StepKind::WriteInDoubt(value), None)
                }
                (_, Outcome::Read(values)) => {
                    (StepKind::ReadEnds(values[index]), Some((values[index], false)))
                }
                _ => (StepKind::ReadFails, None),
            };
            sector.note(now_ns, op, kind);
            if let Some((value, is_write)) = seen
                && let Err(fault) = sector.saw(value, begin, moment, is_write)
            {
                return violation(Some(sector), *lba, fault);
            }
            sector.forget(moment);
        }
        Ok(())
    }

    /// A sector is found to hold a value: a read that takes no time, of a copy that all readers could be given.
    ///
    /// # Errors
    /// The history is wrong from here on.
    pub fn observe(
        &mut self,
        now_ns: u64,
        volume: VolumeId,
        lba: u64,
        value: u64,
    ) -> Result<(), Box<Violation>> {
        const OBSERVER: OpId = OpId(u64::MAX);
        self.begin(now_ns, OBSERVER, volume, lba, Action::Read(1));
        self.end(now_ns, OBSERVER, &Outcome::Read(vec![value]))
    }

    /// The initiator of these operations is gone: nobody will learn what became of them.
    pub fn abandon(&mut self, now_ns: u64, mut is_gone: impl FnMut(OpId) -> bool) {
        let gone: Vec<OpId> = self.open.keys().copied().filter(|op| is_gone(*op)).collect();
        for op in gone {
            let ended = self.end(now_ns, op, &Outcome::Failed);
            debug_assert!(ended.is_ok(), "what nobody saw contradicts nothing");
        }
    }

    /// Writes in doubt that nothing was seen of will not happen any more: for when every copy of every request is known
    /// to be gone and all that is on disks was read. Without it they may still appear, however late.
    pub fn settle(&mut self) {
        for sector in self.sectors.values_mut() {
            sector.values.retain(|value| value.writing || value.first_end < u64::MAX);
        }
    }

    /// What happened to a sector lately, oldest first.
    pub fn recent(&self, volume: VolumeId, lba: u64) -> impl Iterator<Item = &Step> {
        self.sectors.get(&(volume, lba)).into_iter().flat_map(|sector| &sector.recent)
    }
}

#[cfg(test)]
mod tests;
