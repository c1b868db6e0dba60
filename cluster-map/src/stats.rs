//! Counters and latency histograms of one core: written by that core with plain loads and stores, read by anyone.
//!
//! A counter has exactly one writer, so adding needs no read-modify-write instruction, and a reader sees every counter
//! only grow. A duration enters its histogram in two words, first the sum, then the bucket (release): a reader that
//! takes the buckets first (acquire) finds every duration that it counts in the sum.

use crate::sync::{AtomicU64, Ordering, load_le, store_le};

/// Values below this are counted exactly, and every power of two above is cut into this many buckets.
const SUB_BUCKETS: u64 = 16;
const SUB_BITS: u32 = SUB_BUCKETS.trailing_zeros();
/// Values of this many bits and fewer have buckets of their own; longer ones share the last.
const VALUE_BITS: u32 = 36;

/// Number of buckets of a histogram.
pub const BUCKETS: usize = 528;

/// Longest duration that is told apart, in nanoseconds: 68.7 s.
pub const LONGEST_NS: u64 = (1 << VALUE_BITS) - 1;

const _: () = assert!(BUCKETS as u64 == SUB_BUCKETS * (VALUE_BITS - SUB_BITS + 1) as u64);

/// The bucket that a duration of `ns` nanoseconds is counted in.
///
/// Log-linear: exact below 16 ns, then 16 buckets to each power of two, so that a bucket is at most 6.25 % wider than
/// its lowest value. Durations above [`LONGEST_NS`] are counted in the last bucket.
#[must_use]
pub fn bucket_of(ns: u64) -> usize {
    let ns = ns.min(LONGEST_NS);
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(SUB_BITS + 1);
    let index = u64::from(shift) * SUB_BUCKETS + (ns >> shift);
    usize::try_from(index).map_or(BUCKETS - 1, |index| index.min(BUCKETS - 1))
}

/// The shortest and the longest duration of a bucket, in nanoseconds; `bucket` above the last counts as the last.
#[must_use]
pub fn bucket_bounds(bucket: usize) -> (u64, u64) {
    let bucket = bucket.min(BUCKETS - 1) as u64;
    let shift = (bucket / SUB_BUCKETS).saturating_sub(1);
    let low = (bucket - shift * SUB_BUCKETS) << shift;
    (low, low + (1 << shift) - 1)
}

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// What a core counts. The order is the order in memory: a new one is appended and raises the layout level.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Counter {
            $($(#[$doc])* $variant,)*
        }

        impl Counter {
            /// All counters, in order.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// Its name in lower case with underscores.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

counters! {
    /// Frames received.
    RxFrames = "rx_frames",
    /// Bytes received.
    RxBytes = "rx_bytes",
    /// Frames that were dropped for want of memory or ring space.
    RxDropped = "rx_dropped",
    /// Frames that are not valid requests.
    RxInvalid = "rx_invalid",
    /// Frames sent.
    TxFrames = "tx_frames",
    /// Bytes sent.
    TxBytes = "tx_bytes",
    /// Times that the transmit ring was found full.
    TxRingFull = "tx_ring_full",
    /// Reads answered.
    Reads = "reads",
    /// Writes answered.
    Writes = "writes",
    /// Bytes read.
    ReadBytes = "read_bytes",
    /// Bytes written.
    WriteBytes = "write_bytes",
    /// Flushes answered.
    Flushes = "flushes",
    /// IDENTIFY requests answered.
    Identifies = "identifies",
    /// Query Config requests answered.
    Configs = "configs",
    /// Requests answered with an ATA error.
    AtaErrors = "ata_errors",
    /// Requests that waited for an earlier overlapping one.
    OrderWaits = "order_waits",
    /// Payload bytes copied in user space.
    BytesCopied = "bytes_copied",
    /// Times that no buffer was free.
    MemoryExhausted = "memory_exhausted",
    /// Times that the core went to sleep.
    Sleeps = "sleeps",
    /// Times that it was woken.
    Wakeups = "wakeups",
    /// Requests answered with the result of an equal one of the same client that was in progress.
    Duplicates = "duplicates",
    /// Requests that were served as a part of another one's disk request.
    Merged = "merged",
    /// Requests dropped because their client had as many in progress as there was room for others.
    ClientOverLimit = "client_over_limit",
    /// Granted requests that waited for a busy device.
    DeviceWaits = "device_waits",
    /// Reads given to devices, those of read-modify-writes included.
    DiskReads = "disk_reads",
    /// Writes given to devices.
    DiskWrites = "disk_writes",
    /// Writes dropped because a newer one of the same host to the same sectors had come before.
    LateWrites = "late_writes",
    /// Frames handed to the core that serves their export, because they came in by another one.
    HandedOver = "handed_over",
}

/// What durations a core measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Latency {
    /// From the arrival of a read request to its reply being queued.
    Read,
    /// From the arrival of a write request to its reply being queued.
    Write,
}

/// Histograms of one core, in the order in memory: [`Latency::Read`], [`Latency::Write`].
pub(crate) const HISTOGRAMS: usize = 2;

/// Adds to a counter whose only writer is the caller.
pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    let value = load_le(counter, Ordering::Relaxed);
    store_le(counter, value.wrapping_add(amount), Ordering::Relaxed);
}

/// The words of one histogram: the sum, then the buckets.
pub(crate) struct HistogramWords<'a> {
    sum: &'a AtomicU64,
    buckets: &'a [AtomicU64],
}

impl<'a> HistogramWords<'a> {
    /// `words` begins with the sum and holds all buckets; `None` if it is too short.
    pub(crate) fn new(words: &'a [AtomicU64], buckets: usize) -> Option<Self> {
        let (sum, rest) = words.split_first()?;
        Some(Self { sum, buckets: rest.get(..buckets)? })
    }

    /// Counts a duration in bucket `bucket`; the caller is the only writer.
    pub(crate) fn record(&self, bucket: usize, ns: u64) {
        let Some(bucket) = self.buckets.get(bucket) else { return };
        add(self.sum, ns);
        let count = load_le(bucket, Ordering::Relaxed);
        store_le(bucket, count.wrapping_add(1), Ordering::Release);
    }

    pub(crate) fn snapshot(&self) -> HistogramSnapshot {
        let buckets = self.buckets.iter().map(|bucket| load_le(bucket, Ordering::Acquire)).collect();
        HistogramSnapshot { buckets, sum_ns: load_le(self.sum, Ordering::Relaxed) }
    }
}

/// The durations that were counted up to one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramSnapshot {
    buckets: Box<[u64]>,
    sum_ns: u64,
}

impl Default for HistogramSnapshot {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS].into_boxed_slice(), sum_ns: 0 }
    }
}

impl HistogramSnapshot {
    /// The same durations in `buckets` buckets, those of each of its own in the one that `place` says.
    pub(crate) fn spread(&self, buckets: usize, place: impl Fn(usize) -> usize) -> Self {
        let mut spread = vec![0_u64; buckets].into_boxed_slice();
        for (bucket, &held) in self.buckets.iter().enumerate() {
            if let Some(there) = spread.get_mut(place(bucket)) {
                *there = there.wrapping_add(held);
            }
        }
        Self { buckets: spread, sum_ns: self.sum_ns }
    }

    /// How many durations were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum: u64, count| sum.saturating_add(*count))
    }

    /// The sum of all durations, in nanoseconds; at least that of the counted ones.
    #[must_use]
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// How many durations each bucket holds; see [`bucket_bounds`].
    #[must_use]
    pub fn buckets(&self) -> &[u64] {
        &self.buckets
    }

    /// The duration in nanoseconds that the share `quantile` (0.0 to 1.0) of all does not exceed, at most 6.25 % too
    /// long and never too short; 0 if nothing was counted.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the float is in 0..=count; the conversion saturates"
    )]
    pub fn quantile(&self, quantile: f64) -> u64 {
        let count = self.count();
        let rank = ((quantile.clamp(0.0, 1.0) * count as f64).ceil() as u64).clamp(1, count.max(1));
        let mut below = 0_u64;
        for (index, held) in self.buckets.iter().enumerate() {
            below = below.saturating_add(*held);
            if below >= rank {
                return bucket_bounds(index).1;
            }
        }
        0
    }

    /// The mean duration in nanoseconds; 0 if nothing was counted.
    #[must_use]
    pub fn mean(&self) -> f64 {
        match self.count() {
            0 => 0.0,
            count => self.sum_ns as f64 / count as f64,
        }
    }

    /// Adds the durations of another core.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine = mine.saturating_add(*theirs);
        }
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
    }

    /// What was counted after `earlier`, a snapshot of the same core.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let pairs = self.buckets.iter().zip(&earlier.buckets);
        Self {
            buckets: pairs.map(|(now, then)| now.wrapping_sub(*then)).collect(),
            sum_ns: self.sum_ns.wrapping_sub(earlier.sum_ns),
        }
    }
}

/// The counters and histograms of one core, or of several merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CoreSnapshot {
    pub(crate) counters: [u64; Counter::COUNT],
    /// Latency of reads.
    pub read_ns: HistogramSnapshot,
    /// Latency of writes.
    pub write_ns: HistogramSnapshot,
}

impl CoreSnapshot {
    /// The value of one counter.
    #[must_use]
    pub fn get(&self, counter: Counter) -> u64 {
        self.counters[counter as usize]
    }

    /// All counters with their values.
    pub fn counters(&self) -> impl Iterator<Item = (Counter, u64)> + '_ {
        Counter::ALL.iter().map(|&counter| (counter, self.get(counter)))
    }

    /// Adds what another core counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counters.iter_mut().zip(other.counters) {
            *mine = mine.wrapping_add(theirs);
        }
        self.read_ns.merge(&other.read_ns);
        self.write_ns.merge(&other.write_ns);
    }

    /// What was counted after `earlier`, a snapshot of the same core.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut counters = self.counters;
        for (now, then) in counters.iter_mut().zip(earlier.counters) {
            *now = now.wrapping_sub(then);
        }
        Self {
            counters,
            read_ns: self.read_ns.since(&earlier.read_ns),
            write_ns: self.write_ns.since(&earlier.write_ns),
        }
    }
}

/// Publication of statistics under every interleaving and reordering that the memory model allows.
#[cfg(loom)]
#[cfg(test)]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    // Reader and writer are both spawned: what the main thread does right after a spawn, loom 0.7 takes for ordered
    // before the new thread and explores no other order.

    #[test]
    fn every_counted_duration_is_in_the_sum() {
        loom::model(|| {
            let words: Arc<[AtomicU64; 3]> = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
            let core = thread::spawn({
                let words = Arc::clone(&words);
                move || {
                    let histogram = HistogramWords::new(&words[..], 2).expect("three words");
                    histogram.record(0, 5);
                    histogram.record(1, 7);
                    histogram.record(0, 5);
                }
            });
            let reader = thread::spawn({
                let words = Arc::clone(&words);
                move || {
                    let histogram = HistogramWords::new(&words[..], 2).expect("three words");
                    let mut earlier = HistogramSnapshot { buckets: vec![0; 2].into(), sum_ns: 0 };
                    for _ in 0..2 {
                        let now = histogram.snapshot();
                        assert!(now.sum_ns >= 5 * now.buckets[0] + 7 * now.buckets[1], "{now:?}");
                        assert!(now.buckets.iter().zip(&earlier.buckets).all(|(now, then)| now >= then));
                        assert!(now.sum_ns >= earlier.sum_ns);
                        earlier = now;
                    }
                }
            });
            core.join().expect("core");
            reader.join().expect("reader");
            let end = HistogramWords::new(&words[..], 2).expect("three words").snapshot();
            assert_eq!((&end.buckets[..], end.sum_ns), (&[2, 1][..], 17));
        });
    }

    #[test]
    fn counters_only_grow() {
        loom::model(|| {
            let counter = Arc::new(AtomicU64::new(0));
            let core = thread::spawn({
                let counter = Arc::clone(&counter);
                move || (1..=3).for_each(|amount| add(&counter, amount))
            });
            let reader = thread::spawn({
                let counter = Arc::clone(&counter);
                move || {
                    let first = load_le(&counter, Ordering::Relaxed);
                    let second = load_le(&counter, Ordering::Relaxed);
                    assert!(first <= second, "{second} after {first}");
                    assert!([first, second].iter().all(|value| [0, 1, 3, 6].contains(value)));
                }
            });
            core.join().expect("core");
            reader.join().expect("reader");
            assert_eq!(load_le(&counter, Ordering::Relaxed), 6);
        });
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn histogram(durations: &[u64]) -> HistogramSnapshot {
        let words: Vec<AtomicU64> = (0..=BUCKETS).map(|_| AtomicU64::new(0)).collect();
        let histogram = HistogramWords::new(&words, BUCKETS).unwrap();
        durations.iter().for_each(|&ns| histogram.record(bucket_of(ns), ns));
        histogram.snapshot()
    }

    #[test]
    fn buckets_follow_each_other_without_gap() {
        assert_eq!(bucket_bounds(0), (0, 0));
        for bucket in 1..BUCKETS {
            let (low, high) = bucket_bounds(bucket);
            assert_eq!(low, bucket_bounds(bucket - 1).1 + 1, "bucket {bucket}");
            assert!(high - low < low.div_ceil(16).max(1), "bucket {bucket} is wider than 6.25 %");
            assert_eq!((bucket_of(low), bucket_of(high)), (bucket, bucket));
        }
        assert_eq!(bucket_bounds(BUCKETS - 1).1, LONGEST_NS);
        assert_eq!(bucket_bounds(usize::MAX), bucket_bounds(BUCKETS - 1));
        const { assert!(LONGEST_NS > 68_000_000_000) };
    }

    #[test]
    fn an_empty_histogram_says_zero() {
        let empty = HistogramSnapshot::default();
        assert_eq!((empty.count(), empty.quantile(0.5), empty.sum_ns()), (0, 0, 0));
        assert!(empty.mean().abs() < f64::EPSILON);
    }

    #[test]
    fn counters_have_distinct_names_and_places() {
        let names: std::collections::BTreeSet<_> =
            Counter::ALL.iter().map(|counter| counter.name()).collect();
        assert_eq!(names.len(), Counter::COUNT);
        assert!(Counter::ALL.iter().enumerate().all(|(index, &counter)| counter as usize == index));
    }

    proptest! {
        #[test]
        fn every_duration_lies_in_its_bucket(ns: u64, shift in 0_u32..64) {
            let ns = ns >> shift;
            let (low, high) = bucket_bounds(bucket_of(ns));
            prop_assert!(low <= ns.min(LONGEST_NS) && ns.min(LONGEST_NS) <= high);
        }

        #[test]
        fn quantiles_are_those_of_the_durations(
            mut durations in prop::collection::vec(1..=LONGEST_NS, 1..200),
            quantile in 0.0_f64..=1.0,
        ) {
            let counted = histogram(&durations);
            durations.sort_unstable();
            let rank = (quantile * durations.len() as f64).ceil().max(1.0);
            let exact = durations.iter().enumerate().find(|(index, _)| *index as f64 + 1.0 >= rank).unwrap().1;
            let told = counted.quantile(quantile);
            prop_assert!(told >= *exact && told - exact <= exact / 16, "{told} for {exact}");
        }

        #[test]
        fn merging_is_counting_together(
            mine in prop::collection::vec(0_u64..1 << 40, 0..50),
            theirs in prop::collection::vec(0_u64..1 << 40, 0..50),
        ) {
            let mut merged = histogram(&mine);
            merged.merge(&histogram(&theirs));
            let all: Vec<u64> = mine.iter().chain(&theirs).copied().collect();
            prop_assert_eq!(&merged, &histogram(&all));
            prop_assert_eq!(merged.count(), all.len() as u64);
            prop_assert_eq!(merged.sum_ns(), all.iter().sum::<u64>());
            let mean = all.iter().sum::<u64>() as f64 / all.len().max(1) as f64;
            prop_assert!((merged.mean() - mean).abs() <= mean * 1e-12);
            prop_assert_eq!(merged.since(&histogram(&mine)), histogram(&theirs));
        }
    }
}
