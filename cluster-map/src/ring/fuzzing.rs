//! What fuzzing gives to whatever reads the records of a ring. Built for tests and for the target in `fuzz/` only.
//!
//! The first byte says whether the rest is a ring's record or a segment; it gets a checksum that fits. What is read is written as the same
//! bytes. A ring's record also becomes a ring, which loses its first store, if it is small enough.

use super::record::seal;
use super::{Kind, Member, Plan, Ring, RingRecord, Rules, Segment};
use crate::{NodeId, StoreId};

/// A ring of more stores or partitions would take all the time there is.
const MEMBERS_MAX: usize = 64;
const PARTITION_BITS_MAX: u8 = 6;

/// Reads bytes as the readers of the metadata do.
///
/// # Panics
/// If what is read is written as other bytes, or a ring contradicts itself.
pub fn read(bytes: &[u8]) {
    match bytes.split_first() {
        Some((0, rest)) => {
            let bytes = seal(rest.to_vec());
            if let Ok(record) = RingRecord::decode(&bytes) {
                assert!(record.encode() == bytes, "a record is written as it was read");
                compute(&record);
            }
        }
        Some((_, rest)) => {
            let bytes = seal(rest.to_vec());
            if let Ok(mut segment) = Segment::decode(&bytes) {
                assert!(segment.encode() == bytes, "a segment is written as it was read");
                step(&mut segment);
            }
        }
        None => {}
    }
}

fn compute(record: &RingRecord) {
    if record.members.len() > MEMBERS_MAX || record.rules.partition_bits > PARTITION_BITS_MAX {
        return;
    }
    let ring = Ring::compute(record.rules, record.members.clone(), None)
        .expect("a record that is read makes a ring");
    if let Ok(next) = ring.change(Vec::new(), &[record.members[0].store]) {
        let plan = Plan::between(&ring, &next, |_| u64::MAX);
        assert!(plan.copies() >= plan.least_moves);
    }
}

fn step(segment: &mut Segment) {
    for partition in &mut segment.partitions {
        let (before, was_moving) = (partition.epoch, partition.moving.is_some());
        let stepped = if was_moving { partition.finish() } else { partition.begin() };
        assert_eq!(partition.epoch - before, u64::from(stepped.is_ok()));
        assert!(!partition.writers().is_empty());
    }
    let bytes = segment.encode();
    assert!(Segment::decode(&bytes).is_ok_and(|same| same == *segment));
}

/// Records as they are written, for [`read`] to begin with.
///
/// # Panics
/// Never: all of them can be written.
#[must_use]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let member = |number: u8| Member {
        store: StoreId([number + 1; 16]),
        node: NodeId([number / 2 + 1; 16]),
        zone: ["", "a", "b"][usize::from(number / 2 % 3)].into(),
        capacity_bytes: u64::from(number) + 1,
        weight: 1000,
    };
    let ring = |kind, members| {
        let rules = Rules { kind, copies: 2, partition_bits: 3 };
        Ring::compute(rules, members, None).expect("a usual ring")
    };
    let first = ring(Kind::Balanced, (0..6).map(member).collect());
    let next = first.change((6..9).map(member).collect(), &[StoreId([3; 16])]).expect("a usual change");
    let record = RingRecord::first(&first);
    let plan = Plan::between(&first, &next, |_| 0);
    let after = record.followed_by(&next, &plan).expect("the second epoch");
    let mut segment = Segment::all_of(&first).remove(0);
    segment.aim_at(&next, 2);
    let seed = |kind: u8, sealed: Vec<u8>| [&[kind], &sealed[..sealed.len() - 4]].concat();
    let ketama = RingRecord::first(&ring(Kind::Ketama { points: 3 }, (0..4).map(member).collect()));
    let aimed = seed(1, segment.encode());
    for partition in segment.partitions.iter_mut().step_by(2) {
        // Those that stay where they are have nothing to begin.
        let _ = partition.begin();
    }
    vec![
        ("balanced", seed(0, after.encode())),
        ("ketama", seed(0, ketama.encode())),
        ("aimed", aimed),
        ("moving", seed(1, segment.encode())),
    ]
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::ring::hash::Sequence;

    #[test]
    fn no_bytes_make_a_reader_of_the_ring_panic() {
        let seeds = seeds();
        let mut sequence = Sequence::new(82);
        for run in 0..40_000 {
            let mut bytes = seeds[run % seeds.len()].1.clone();
            for _ in 0..sequence.below(4) {
                let at = sequence.below(bytes.len());
                match sequence.below(4) {
                    0 => bytes.truncate(at.max(1)),
                    1 => bytes.insert(at, bytes[at]),
                    2 => bytes[at] ^= 1 << sequence.below(8),
                    _ => bytes[at] = [0, 1, 2, 0xff][sequence.below(4)],
                }
            }
            read(&bytes);
        }
    }

    #[test]
    fn seeds_are_read() {
        for (name, bytes) in seeds() {
            let sealed = seal(bytes[1..].to_vec());
            assert!(RingRecord::decode(&sealed).is_ok() || Segment::decode(&sealed).is_ok(), "{name}");
            read(&bytes);
        }
    }
}
