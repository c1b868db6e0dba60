//! What each client asks of each export: records of one core, written by that core with plain loads and stores, read by
//! anyone.
//!
//! A client is a station that reads, writes or flushes an export, known by its MAC. The core that serves the export gives
//! it one of a fixed number of records, and takes the record of another when they run out. So a record has a generation
//! beside its counters: odd while its owner is being exchanged, and one step further for each owner. A reader copies the
//! record between two looks at the generation and uses the copy only if both found the same even number: no count is ever
//! shown under a MAC that it does not belong to. Between exchanges the counters only grow, and a duration is in its
//! histogram's sum before it is in a bucket, as in module `stats`.

use crate::stats::{BUCKETS, HistogramSnapshot, HistogramWords, Latency, add, bucket_of};
use crate::sync::{AtomicU64, Ordering, fence, load_le, pause, store_le};

/// Buckets of the core's histograms that one bucket of a client's holds.
const COARSE: usize = 4;
/// The core's bucket that ends with 1023 ns: everything up to it is one bucket here.
const FLOOR: usize = 111;

/// Buckets of a client's histogram: one for everything below 1024 ns, then four to each power of two, so that a bucket is
/// at most 25 % wider than its lowest value.
pub(crate) const CLIENT_BUCKETS: usize = 1 + (BUCKETS - FLOOR - 1) / COARSE;

/// Words of a record before its counters.
pub(crate) const FIXED_WORDS: usize = 7;
const GENERATION: usize = 0;
const MAC: usize = 1;
const ADDRESS: usize = 2;
const FIRST_SEEN: usize = 3;
const LAST_SEEN: usize = 4;
const IN_FLIGHT: usize = 5;
const IN_FLIGHT_MAX: usize = 6;

/// How often a reader looks again at a record whose owner is being exchanged.
const ATTEMPTS: usize = 16;

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// What is counted for a client. The order is the order in memory: a new one is appended and raises the layout
        /// level.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ClientCounter {
            $($(#[$doc])* $variant,)*
        }

        impl ClientCounter {
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
    /// Reads answered.
    Reads = "reads",
    /// Writes answered.
    Writes = "writes",
    /// Flushes answered.
    Flushes = "flushes",
    /// Bytes read.
    ReadBytes = "read_bytes",
    /// Bytes written.
    WriteBytes = "write_bytes",
    /// Requests that repeated one still in progress and were answered together with it.
    Duplicates = "duplicates",
    /// Requests answered with an ATA error.
    AtaErrors = "ata_errors",
    /// Requests dropped because too many were in progress.
    DroppedLimit = "dropped_limit",
    /// Requests dropped because no memory was free.
    DroppedMemory = "dropped_memory",
    /// Writes dropped because a newer one of the same station to the same sectors had come before.
    DroppedLate = "dropped_late",
}

/// What a client asked of an export, up to one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientSnapshot {
    /// The client's MAC.
    pub mac: [u8; 6],
    /// The export's AoE major address.
    pub shelf: u16,
    /// The export's AoE minor address.
    pub slot: u8,
    /// Index of the core that serves the export.
    pub core: u16,
    /// When it was first seen, in nanoseconds of `CLOCK_MONOTONIC`.
    pub first_seen_ns: u64,
    /// When its newest request came, in nanoseconds of `CLOCK_MONOTONIC`.
    pub last_seen_ns: u64,
    /// Its requests in progress.
    pub in_flight: u64,
    /// The most that it had in progress at one time.
    pub in_flight_max: u64,
    counters: [u64; ClientCounter::COUNT],
    /// Latency of its reads. Its quantiles are at most 25 % too long, and 1023 ns for what was shorter.
    pub read_ns: HistogramSnapshot,
    /// Latency of its writes, as exact as that of the reads.
    pub write_ns: HistogramSnapshot,
}

impl ClientSnapshot {
    /// The value of one counter.
    #[must_use]
    pub fn get(&self, counter: ClientCounter) -> u64 {
        self.counters[counter as usize]
    }

    /// All counters with their values.
    pub fn counters(&self) -> impl Iterator<Item = (ClientCounter, u64)> + '_ {
        ClientCounter::ALL.iter().map(|&counter| (counter, self.get(counter)))
    }
}

/// The bucket of a client's histogram that a duration is counted in.
pub(crate) fn client_bucket_of(ns: u64) -> usize {
    bucket_of(ns).saturating_sub(FLOOR).div_ceil(COARSE)
}

/// The words of one record: what comes first, the counters, then the two histograms.
#[derive(Clone, Copy)]
pub(crate) struct RecordWords<'a> {
    words: &'a [AtomicU64],
    counters: usize,
    histograms: usize,
}

impl<'a> RecordWords<'a> {
    /// `words` is a whole record that has `counters` counters and whose histograms begin at `histograms`, each one sum and
    /// [`CLIENT_BUCKETS`] buckets; `None` if it is too short for that.
    #[inline]
    pub(crate) fn new(words: &'a [AtomicU64], counters: usize, histograms: usize) -> Option<Self> {
        let fits =
            FIXED_WORDS + counters <= histograms && histograms + 2 * (1 + CLIENT_BUCKETS) <= words.len();
        fits.then_some(Self { words, counters, histograms })
    }

    fn counters(&self) -> &'a [AtomicU64] {
        &self.words[FIXED_WORDS..FIXED_WORDS + self.counters]
    }

    fn histogram(&self, latency: Latency) -> &'a [AtomicU64] {
        &self.words[self.histograms + latency as usize * (1 + CLIENT_BUCKETS)..][..1 + CLIENT_BUCKETS]
    }

    fn set(&self, word: usize, value: u64) {
        store_le(&self.words[word], value, Ordering::Relaxed);
    }

    fn get(&self, word: usize) -> u64 {
        load_le(&self.words[word], Ordering::Relaxed)
    }

    /// Gives the record to a client, or to nobody if `mac` is 0; all counts begin at zero. Only for the one writer, who
    /// may follow one that died in the middle of this.
    pub(crate) fn exchange(&self, mac: u64, address: u64, now_ns: u64) {
        let changing = self.get(GENERATION) | 1;
        store_le(&self.words[GENERATION], changing, Ordering::Relaxed);
        // Who sees any word of the new owner and then looks at the generation behind an acquire fence finds it changed.
        fence(Ordering::Release);
        let counts = &self.words[IN_FLIGHT..self.histograms + 2 * (1 + CLIENT_BUCKETS)];
        counts.iter().for_each(|word| store_le(word, 0, Ordering::Relaxed));
        self.set(MAC, mac);
        self.set(ADDRESS, address);
        self.set(FIRST_SEEN, now_ns);
        self.set(LAST_SEEN, now_ns);
        store_le(&self.words[GENERATION], changing.wrapping_add(1), Ordering::Release);
    }

    pub(crate) fn add(&self, counter: ClientCounter, amount: u64) {
        // A map of a former level may lack the newest counters.
        if (counter as usize) < self.counters {
            add(&self.words[FIXED_WORDS + counter as usize], amount);
        }
    }

    pub(crate) fn record(&self, latency: Latency, ns: u64) {
        if let Some(words) = HistogramWords::new(self.histogram(latency), CLIENT_BUCKETS) {
            words.record(client_bucket_of(ns), ns);
        }
    }

    pub(crate) fn seen(&self, now_ns: u64) {
        self.set(LAST_SEEN, now_ns);
    }

    pub(crate) fn in_flight(&self, requests: u64) {
        self.set(IN_FLIGHT, requests);
        if requests > self.get(IN_FLIGHT_MAX) {
            self.set(IN_FLIGHT_MAX, requests);
        }
    }

    /// What the record says; `None` if it has no owner, or another one at every look.
    pub(crate) fn snapshot(&self, core: u16) -> Option<ClientSnapshot> {
        for _ in 0..ATTEMPTS {
            let before = load_le(&self.words[GENERATION], Ordering::Acquire);
            if before.is_multiple_of(2) {
                let copy = self.copy(core);
                fence(Ordering::Acquire);
                if load_le(&self.words[GENERATION], Ordering::Relaxed) == before {
                    return copy.filter(|copy| copy.mac != [0; 6]);
                }
            }
            pause();
        }
        None
    }

    fn copy(&self, core: u16) -> Option<ClientSnapshot> {
        let [.., a, b, c, d, e, f] = self.get(MAC).to_be_bytes();
        let [.., high, low, slot] = self.get(ADDRESS).to_be_bytes();
        let mut counters = [0; ClientCounter::COUNT];
        for (value, word) in counters.iter_mut().zip(self.counters()) {
            *value = load_le(word, Ordering::Relaxed);
        }
        Some(ClientSnapshot {
            mac: [a, b, c, d, e, f],
            shelf: u16::from_be_bytes([high, low]),
            slot,
            core,
            first_seen_ns: self.get(FIRST_SEEN),
            last_seen_ns: self.get(LAST_SEEN),
            in_flight: self.get(IN_FLIGHT),
            in_flight_max: self.get(IN_FLIGHT_MAX),
            counters,
            read_ns: coarse(self.histogram(Latency::Read))?,
            write_ns: coarse(self.histogram(Latency::Write))?,
        })
    }
}

/// A client's histogram as one of the core's: what a bucket holds stands in the last of the core's buckets that it covers,
/// so that no quantile is too short.
fn coarse(words: &[AtomicU64]) -> Option<HistogramSnapshot> {
    let counted = HistogramWords::new(words, CLIENT_BUCKETS)?.snapshot();
    Some(counted.spread(BUCKETS, |bucket| FLOOR + COARSE * bucket))
}

/// A client's MAC as a number.
pub(crate) fn mac_number(mac: [u8; 6]) -> u64 {
    mac.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// An export's address as a number.
pub(crate) fn address_number(shelf: u16, slot: u8) -> u64 {
    u64::from(shelf) << 8 | u64::from(slot)
}

/// The exchange of owners under every interleaving and reordering that the memory model allows.
#[cfg(loom)]
#[cfg(test)]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Generation, owner and one counter: the three words that can be mixed up. The record's other words are written and
    /// read at the same places of the protocol.
    struct Record([AtomicU64; 3]);

    impl Record {
        fn exchange(&self, owner: u64) {
            let changing = load_le(&self.0[0], Ordering::Relaxed) | 1;
            store_le(&self.0[0], changing, Ordering::Relaxed);
            fence(Ordering::Release);
            store_le(&self.0[2], 0, Ordering::Relaxed);
            store_le(&self.0[1], owner, Ordering::Relaxed);
            store_le(&self.0[0], changing.wrapping_add(1), Ordering::Release);
        }

        fn read(&self) -> Option<(u64, u64)> {
            let before = load_le(&self.0[0], Ordering::Acquire);
            let copy = (load_le(&self.0[1], Ordering::Relaxed), load_le(&self.0[2], Ordering::Relaxed));
            fence(Ordering::Acquire);
            let after = load_le(&self.0[0], Ordering::Relaxed);
            (before.is_multiple_of(2) && before == after).then_some(copy)
        }
    }

    #[test]
    fn no_count_is_shown_under_another_owner() {
        loom::model(|| {
            let record = Arc::new(Record(std::array::from_fn(|_| AtomicU64::new(0))));
            let writer = thread::spawn({
                let record = Arc::clone(&record);
                move || {
                    record.exchange(7);
                    add(&record.0[2], 70);
                    record.exchange(9);
                }
            });
            let reader = thread::spawn({
                let record = Arc::clone(&record);
                move || {
                    if let Some(found) = record.read() {
                        assert!([(0, 0), (7, 0), (7, 70), (9, 0)].contains(&found), "{found:?}");
                    }
                }
            });
            writer.join().expect("writer");
            reader.join().expect("reader");
            assert_eq!(record.read(), Some((9, 0)));
        });
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{LONGEST_NS, bucket_bounds};

    const WORDS: usize = FIXED_WORDS + ClientCounter::COUNT + 2 * (1 + CLIENT_BUCKETS);

    fn words() -> Vec<AtomicU64> {
        (0..WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    fn record(words: &[AtomicU64]) -> RecordWords<'_> {
        RecordWords::new(words, ClientCounter::COUNT, FIXED_WORDS + ClientCounter::COUNT).unwrap()
    }

    #[test]
    fn buckets_are_four_to_a_power_of_two_above_a_microsecond() {
        assert_eq!(bucket_bounds(FLOOR).1, 1023);
        assert_eq!((client_bucket_of(0), client_bucket_of(1023), client_bucket_of(1024)), (0, 0, 1));
        assert_eq!(client_bucket_of(LONGEST_NS), CLIENT_BUCKETS - 1);
        assert_eq!(client_bucket_of(u64::MAX), CLIENT_BUCKETS - 1);
        for ns in [1024, 1279, 1280, 99_999, 1 << 20, (1 << 30) - 1, LONGEST_NS] {
            let words = words();
            record(&words).exchange(1, 1, 0);
            record(&words).record(Latency::Read, ns);
            let said = record(&words).snapshot(0).unwrap().read_ns.quantile(0.5);
            assert!((ns..=ns + ns / 4).contains(&said), "{ns} is shown as {said}");
        }
    }

    #[test]
    fn a_record_belongs_to_one_client_at_a_time() {
        let words = words();
        let record = record(&words);
        assert_eq!(record.snapshot(0), None, "nobody's");
        record.exchange(mac_number([2, 0, 0, 0, 0, 7]), address_number(300, 4), 55);
        ClientCounter::ALL.iter().for_each(|&counter| record.add(counter, 1 + counter as u64));
        record.record(Latency::Write, 5_000);
        record.in_flight(9);
        record.in_flight(3);
        record.seen(77);
        let seen = record.snapshot(6).unwrap();
        assert_eq!((seen.mac, seen.shelf, seen.slot, seen.core), ([2, 0, 0, 0, 0, 7], 300, 4, 6));
        assert_eq!((seen.first_seen_ns, seen.last_seen_ns), (55, 77));
        assert_eq!((seen.in_flight, seen.in_flight_max), (3, 9));
        assert!(seen.counters().all(|(counter, value)| value == 1 + counter as u64));
        assert_eq!((seen.write_ns.count(), seen.write_ns.sum_ns(), seen.read_ns.count()), (1, 5_000, 0));
        record.exchange(mac_number([2, 0, 0, 0, 0, 8]), address_number(1, 1), 80);
        let next = record.snapshot(6).unwrap();
        assert_eq!((next.mac, next.in_flight_max, next.write_ns.count()), ([2, 0, 0, 0, 0, 8], 0, 0));
        assert!(next.counters().all(|(_, value)| value == 0));
        record.exchange(0, 0, 0);
        assert_eq!(record.snapshot(6), None);
    }

    #[test]
    fn a_record_whose_writer_died_is_nobodys_until_its_successor_has_it() {
        let words = words();
        let record = record(&words);
        record.exchange(5, 1, 0);
        words[GENERATION]
            .store((load_le(&words[GENERATION], Ordering::Relaxed) | 1).to_le(), Ordering::Relaxed);
        assert_eq!(record.snapshot(0), None);
        record.exchange(6, 1, 0);
        assert_eq!(record.snapshot(0).unwrap().mac, [0, 0, 0, 0, 0, 6]);
    }

    #[test]
    fn counters_have_distinct_names_and_places() {
        let names: std::collections::BTreeSet<_> =
            ClientCounter::ALL.iter().map(|counter| counter.name()).collect();
        assert_eq!(names.len(), ClientCounter::COUNT);
        assert!(ClientCounter::ALL.iter().enumerate().all(|(index, &counter)| counter as usize == index));
    }
}
