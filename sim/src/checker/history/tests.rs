use proptest::prelude::*;

use super::*;
use crate::random::Random;

const VOLUME: VolumeId = VolumeId(1);

struct Told {
    history: History,
    now_ns: u64,
}

impl Told {
    fn new() -> Self {
        Self { history: History::new(), now_ns: 0 }
    }

    fn begin_read(&mut self, op: u64) -> &mut Self {
        self.now_ns += 1000;
        self.history.begin(self.now_ns, OpId(op), VOLUME, 0, Action::Read(1));
        self
    }

    fn begin_write(&mut self, op: u64, value: u64) -> &mut Self {
        self.now_ns += 1000;
        self.history.begin(self.now_ns, OpId(op), VOLUME, 0, Action::Write(vec![value]));
        self
    }

    fn end(&mut self, op: u64, outcome: &Outcome) -> Result<(), Fault> {
        self.now_ns += 1000;
        self.history.end(self.now_ns, OpId(op), outcome).map_err(|violation| violation.fault)
    }

    fn write(&mut self, value: u64) {
        self.begin_write(1000 + value, value).end(1000 + value, &Outcome::Written).unwrap();
    }

    fn read(&mut self, value: u64) -> Result<(), Fault> {
        self.begin_read(9999).end(9999, &Outcome::Read(vec![value]))
    }
}

#[test]
fn an_acknowledged_write_is_seen() {
    let mut told = Told::new();
    assert_eq!(told.read(0), Ok(()));
    told.write(1);
    assert_eq!(told.read(1), Ok(()));
    assert!(told.clone_read(0).is_err());
    told.write(2);
    assert_eq!(told.clone_read(1), Err(Fault::Stale { read: 1, newer: 2 }));
    assert_eq!(told.clone_read(77), Err(Fault::Unknown(77)));
    assert_eq!(told.read(2), Ok(()));
    assert_eq!(told.history.remembered_values(), 1);
}

impl Told {
    /// A read that changes nothing for those after it.
    fn clone_read(&self, value: u64) -> Result<(), Fault> {
        Told { history: self.history.clone(), now_ns: self.now_ns }.read(value)
    }
}

#[test]
fn a_write_in_doubt_appears_at_most_once_and_stays() {
    let mut told = Told::new();
    told.write(1);
    told.begin_write(2, 2).end(2, &Outcome::Failed).unwrap();
    assert_eq!(told.read(1), Ok(()));
    told.write(3);
    assert_eq!(told.read(3), Ok(()));
    assert!(told.clone_read(1).is_err());
    // However late.
    assert_eq!(told.read(2), Ok(()));
    assert!(told.clone_read(3).is_err());
    told.write(4);
    assert!(told.clone_read(2).is_err());
    assert_eq!(told.read(4), Ok(()));
}

#[test]
fn a_write_in_doubt_can_be_given_up() {
    let mut told = Told::new();
    told.begin_write(2, 2).end(2, &Outcome::Failed).unwrap();
    assert_eq!(told.clone_read(2), Ok(()));
    told.history.settle();
    assert_eq!(told.clone_read(2), Err(Fault::Unknown(2)));
    assert_eq!(told.read(0), Ok(()));
}

#[test]
fn what_is_found_on_a_disk_counts_as_read() {
    let mut told = Told::new();
    told.write(1);
    told.begin_write(2, 2).end(2, &Outcome::Failed).unwrap();
    assert!(told.history.observe(told.now_ns, VOLUME, 0, 2).is_ok());
    assert!(told.history.observe(told.now_ns, VOLUME, 0, 1).is_err());
    assert!(told.history.observe(told.now_ns, VOLUME, 1, 2).is_err(), "another sector");
}

#[test]
fn a_value_that_was_read_under_way_does_not_disappear() {
    let mut told = Told::new();
    told.write(1);
    told.begin_write(2, 2);
    assert_eq!(told.read(1), Ok(()));
    assert_eq!(told.read(2), Ok(()));
    assert!(matches!(told.clone_read(1), Err(Fault::Stale { read: 1, newer: 2 })));
    told.history.abandon(0, |op| op == OpId(2));
    assert!(told.clone_read(1).is_err());
    assert_eq!(told.read(2), Ok(()));
}

#[test]
fn a_long_read_may_return_what_was_replaced_meanwhile() {
    let mut told = Told::new();
    told.write(1);
    told.begin_read(50);
    told.write(2);
    told.write(3);
    let mut other = Told { history: told.history.clone(), now_ns: told.now_ns };
    assert_eq!(told.end(50, &Outcome::Read(vec![1])), Ok(()));
    assert_eq!(other.end(50, &Outcome::Read(vec![2])), Ok(()));
    assert_eq!(other.history.remembered_values(), 1);
}

#[test]
fn a_violation_names_the_sector_and_tells_its_story() {
    let mut history = History::new();
    history.begin(1000, OpId(1), VOLUME, 4, Action::Write(vec![7, 8, 9]));
    history.end(2000, OpId(1), &Outcome::Written).unwrap();
    history.begin(3000, OpId(2), VOLUME, 5, Action::Read(2));
    let violation = history.end(4000, OpId(2), &Outcome::Read(vec![8, 0])).unwrap_err();
    assert_eq!((violation.lba, &violation.fault), (6, &Fault::Stale { read: 0, newer: 9 }));
    let text = violation.to_string();
    assert!(text.contains("sector 6") && text.contains("write of 0x9 is acknowledged"), "{text}");
}

#[test]
fn the_digest_tells_apart_what_was_read_and_when() {
    let run = |at_ns: u64, value: u64| {
        let mut history = History::new();
        history.begin(1, OpId(1), VOLUME, 0, Action::Write(vec![7]));
        history.begin(2, OpId(2), VOLUME, 0, Action::Read(1));
        history.end(at_ns, OpId(2), &Outcome::Read(vec![value])).unwrap();
        history.digest()
    };
    assert_eq!(run(5, 7), run(5, 7));
    assert_ne!(run(5, 7), run(5, 0));
    assert_ne!(run(5, 7), run(6, 7));
}

#[test]
fn an_answer_of_another_form_is_a_violation() {
    let mut history = History::new();
    history.begin(1, OpId(1), VOLUME, 0, Action::Read(2));
    assert!(history.end(2, OpId(1), &Outcome::Read(vec![0])).is_err());
    history.begin(3, OpId(2), VOLUME, 0, Action::Read(1));
    assert!(history.end(4, OpId(2), &Outcome::Written).is_err());
    assert!(history.end(5, OpId(77), &Outcome::Written).is_ok());
}

#[test]
fn memory_stays_bounded_under_a_right_disk() {
    let mut random = Random::new(5);
    let mut history = History::new();
    let mut disk = [0u64; 8];
    // Operations under way, and what a read saw.
    let mut open: Vec<(OpId, u64, Option<u64>, u64)> = Vec::new();
    let mut most = 0;
    for op in 1..100_000u64 {
        if open.len() < 12 {
            let lba = random.below(8);
            if random.coin() {
                history.begin(op, OpId(op), VOLUME, lba, Action::Write(vec![op]));
                open.push((OpId(op), lba, None, op));
            } else {
                history.begin(op, OpId(op), VOLUME, lba, Action::Read(1));
                open.push((OpId(op), lba, None, 0));
            }
        }
        // Each takes effect at a moment of its own between beginning and end.
        let at = random.index(open.len());
        let (id, lba, effect, value) = open[at];
        let sector = &mut disk[usize::try_from(lba).unwrap()];
        match effect {
            None if value == 0 => open[at].2 = Some(*sector),
            None => {
                *sector = value;
                open[at].2 = Some(value);
            }
            Some(seen) => {
                let outcome = if value == 0 { Outcome::Read(vec![seen]) } else { Outcome::Written };
                history.end(op, id, &outcome).unwrap();
                open.swap_remove(at);
            }
        }
        most = most.max(history.remembered_values());
    }
    assert!(most < 8 * 14, "{most}");
}

/// Operations of a tiny history, by the order of their beginnings and ends.
#[derive(Clone, Debug)]
struct Tiny {
    /// What each does: reads a value, or writes one.
    ops: Vec<(bool, u64)>,
    /// Beginnings and ends: the first mention of an operation is its beginning.
    order: Vec<usize>,
    /// Writes that end in doubt.
    doubtful: Vec<bool>,
}

impl Tiny {
    fn drawn(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let count = 2 + random.index(6);
        let mut written = vec![];
        let mut ops: Vec<(bool, u64)> = (0..count)
            .map(|_| {
                let is_write = random.below(5) < 2;
                if is_write {
                    written.push(written.len() as u64 + 1);
                }
                (is_write, written.len() as u64)
            })
            .collect();
        for (is_write, value) in &mut ops {
            if !*is_write {
                *value = random.below(written.len() as u64 + 1);
            }
        }
        let doubtful = ops.iter().map(|(is_write, _)| *is_write && random.one_in(3)).collect();
        // Beginnings in order, each end anywhere behind; some never end.
        let mut order: Vec<usize> = (0..count).collect();
        random.shuffle(&mut order);
        for op in 0..count {
            let begin = order.iter().position(|at| *at == op).unwrap();
            if !random.one_in(8) {
                let reach = if random.coin() { 3 } else { 20 };
                let at = begin + 1 + random.index((order.len() - begin).min(reach));
                order.insert(at, op);
            }
        }
        Self { ops, order, doubtful }
    }

    fn begin_and_end(&self, op: usize) -> (usize, usize) {
        let mut at = self.order.iter().enumerate().filter(|(_, at)| **at == op).map(|(index, _)| index);
        (at.next().unwrap(), at.next().unwrap_or(usize::MAX))
    }

    /// Tries every order (Wing and Gong).
    fn is_linearizable(&self) -> bool {
        let spans: Vec<(usize, usize)> = (0..self.ops.len())
            .map(|op| {
                let (begin, end) = self.begin_and_end(op);
                (begin, if self.doubtful[op] { usize::MAX } else { end })
            })
            .collect();
        self.search(&spans, 0, 0)
    }

    fn search(&self, spans: &[(usize, usize)], done: u32, value: u64) -> bool {
        let left = |op: &usize| done >> op & 1 == 0;
        let first_end = (0..spans.len()).filter(left).map(|op| spans[op].1).min().unwrap_or(usize::MAX);
        if first_end == usize::MAX {
            return true;
        }
        (0..spans.len()).filter(left).filter(|op| spans[*op].0 < first_end).any(|op| {
            let (is_write, its) = self.ops[op];
            (is_write || its == value)
                && self.search(spans, done | 1 << op, if is_write { its } else { value })
        })
    }

    fn is_accepted(&self) -> bool {
        let mut history = History::new();
        let mut begun = vec![false; self.ops.len()];
        for (now_ns, op) in (1..).zip(&self.order) {
            let (is_write, value) = self.ops[*op];
            let id = OpId(*op as u64);
            if !std::mem::replace(&mut begun[*op], true) {
                let action = if is_write { Action::Write(vec![value]) } else { Action::Read(1) };
                history.begin(now_ns, id, VOLUME, 0, action);
                continue;
            }
            let outcome = match (is_write, self.doubtful[*op]) {
                (true, true) => Outcome::Failed,
                (true, false) => Outcome::Written,
                (false, _) => Outcome::Read(vec![value]),
            };
            if history.end(now_ns, id, &outcome).is_err() {
                return false;
            }
        }
        true
    }
}

#[test]
fn judges_tiny_histories_as_a_search_of_every_order_does() {
    let (mut right, mut wrong) = (0, 0);
    for seed in 0..60_000 {
        let tiny = Tiny::drawn(seed);
        let linearizable = tiny.is_linearizable();
        assert_eq!(tiny.is_accepted(), linearizable, "seed {seed}: {tiny:?}");
        if linearizable {
            right += 1;
        } else {
            wrong += 1;
        }
    }
    assert!(right > 10_000 && wrong > 10_000, "{right} right, {wrong} wrong");
}

proptest! {
    #[test]
    fn judges_any_tiny_history_as_a_search_of_every_order_does(seed in any::<u64>()) {
        let tiny = Tiny::drawn(seed);
        prop_assert_eq!(tiny.is_accepted(), tiny.is_linearizable(), "{:?}", tiny);
    }
}
