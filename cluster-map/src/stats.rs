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
