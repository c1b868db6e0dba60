//! The two-slot protocol: how one writer hands whole versions to any number of readers without ever waiting for them.
//!
//! Version `v` lies in slot `v & 1`. `latest` names the newest complete version; `seq` of a slot is `2v` while it holds
//! version `v` and odd while it is being written. So the writer fills the idle slot, marks it complete, then moves
//! `latest`: a reader of the newest version is disturbed only by a writer that publishes twice while it reads, and a
//! writer that dies in the middle leaves the newest version untouched. The payload is copied word by word with relaxed
//! atomic loads (a race with the writer is then no undefined behaviour) and used only if `seq` did not change and the
//! checksum fits. Readers never write.
//!
//! There must be one writer at a time. A new one may take over from one that died anywhere: it goes on from `latest`.

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence, load_le, pause, store_le};

/// Versions end here, so that `2v` does not overflow: 292 years of one version per nanosecond.
pub(crate) const LAST_VERSION: u64 = u64::MAX / 4;

/// Words of a cache line pair: what different cores write is kept this far apart (adjacent-line prefetch).
pub(crate) const LINE_WORDS: usize = 16;

/// Words of an area's head: one line for `latest`, one for each slot.
pub(crate) const HEAD_WORDS: usize = 3 * LINE_WORDS;

#[derive(Clone, Copy)]
struct Slot<'a> {
    seq: &'a AtomicU64,
    len: &'a AtomicU64,
    crc: &'a AtomicU64,
    payload: &'a [AtomicU64],
}

/// One area: two slots and the number of the newest version.
#[derive(Clone, Copy)]
pub(crate) struct Area<'a> {
    latest: &'a AtomicU64,
    slots: [Slot<'a>; 2],
}

/// Why no version could be read.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// The writer was faster, every time.
    Busy,
    /// The area contradicts itself.
    Damaged(&'static str),
    /// The caller's preparation of the payload failed.
    Prepare(std::io::Error),
}

/// A version whose slot is being filled.
pub(crate) struct Filling<'a> {
    latest: &'a AtomicU64,
    slot: Slot<'a>,
    version: u64,
}

/// Which of the two slots a version lies in.
pub(crate) fn slot_of(version: u64) -> usize {
    usize::from(version & 1 == 1)
}

/// Checksum of a payload; covers the version, so that the content of one cannot pass for another.
fn checksum(payload: &[u8], version: u64) -> u64 {
    u64::from(crc32c::crc32c_append(crc32c::crc32c(payload), &version.to_le_bytes()))
}

/// The words of `bytes` as they lie in memory, the last one filled up with zeros.
fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_ne_bytes(word)
    })
}

impl<'a> Area<'a> {
    /// `head` has [`HEAD_WORDS`] words; `None` if it is shorter.
    pub(crate) fn new(head: &'a [AtomicU64], payloads: [&'a [AtomicU64]; 2]) -> Option<Self> {
        let slot = |index: usize| -> Option<Slot<'a>> {
            let line = head.get((1 + index) * LINE_WORDS..)?;
            Some(Slot { seq: line.first()?, len: line.get(1)?, crc: line.get(2)?, payload: payloads[index] })
        };
        Some(Self { latest: head.first()?, slots: [slot(0)?, slot(1)?] })
    }

    /// The newest complete version; 0: there is none.
    pub(crate) fn latest(&self) -> u64 {
        load_le(self.latest, Ordering::Acquire)
    }

    /// Begins the version after the newest. Only for the one writer, with `latest` below [`LAST_VERSION`].
    pub(crate) fn begin(&self) -> Filling<'a> {
        let version = load_le(self.latest, Ordering::Relaxed) + 1;
        let slot = self.slots[slot_of(version)];
        // Release: who sees the odd number also sees that `latest` left this slot's former version before.
        store_le(slot.seq, 2 * version - 1, Ordering::Release);
        // Who sees any word of the new payload and then looks at `seq` behind an acquire fence finds it changed.
        fence(Ordering::Release);
        Filling { latest: self.latest, slot, version }
    }

    /// Copies the newest version to `words` and returns its number and its length in bytes; `None` if nothing was
    /// published. `prepare` is told slot and length in bytes before the payload is touched.
    pub(crate) fn read(
        &self,
        words: &mut Vec<u64>,
        attempts: usize,
        mut prepare: impl FnMut(usize, usize) -> std::io::Result<()>,
    ) -> Result<Option<(u64, usize)>, ReadError> {
        for _ in 0..attempts {
            let version = self.latest();
            if version == 0 {
                return Ok(None);
            }
            if version > LAST_VERSION {
                return Err(ReadError::Damaged("version out of range"));
            }
            if let Some(len) = self.read_version(version, words, &mut prepare)? {
                return Ok(Some((version, len)));
            }
            pause();
        }
        Err(ReadError::Busy)
    }

    /// One attempt; `None` if the writer overtook it.
    fn read_version(
        &self,
        version: u64,
        words: &mut Vec<u64>,
        prepare: &mut impl FnMut(usize, usize) -> std::io::Result<()>,
    ) -> Result<Option<usize>, ReadError> {
        let index = slot_of(version);
        let slot = self.slots[index];
        let seq = load_le(slot.seq, Ordering::Acquire);
        if seq != 2 * version {
            let overtaken = self.latest() != version;
            return if overtaken {
                Ok(None)
            } else {
                Err(ReadError::Damaged("slot does not hold its version"))
            };
        }
        let len = load_le(slot.len, Ordering::Relaxed);
        let crc = load_le(slot.crc, Ordering::Relaxed);
        let payload = usize::try_from(len).ok().and_then(|len| slot.payload.get(..len.div_ceil(8)));
        if let (Some(payload), Ok(len)) = (payload, usize::try_from(len)) {
            prepare(index, len).map_err(ReadError::Prepare)?;
            words.clear();
            words.extend(payload.iter().map(|word| word.load(Ordering::Relaxed)));
        }
        fence(Ordering::Acquire);
        if load_le(slot.seq, Ordering::Relaxed) != seq {
            return Ok(None);
        }
        let len = match (payload, usize::try_from(len)) {
            (Some(_), Ok(len)) => len,
            _ => return Err(ReadError::Damaged("length exceeds the slot")),
        };
        if checksum(bytes_of(words, len), version) != crc {
            return Err(ReadError::Damaged("checksum of the state"));
        }
        Ok(Some(len))
    }
}

impl Filling<'_> {
    /// The version that will be published.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Writes the payload's words; the caller has checked that they fit.
    pub(crate) fn fill(&self, bytes: &[u8]) {
        for (word, value) in self.slot.payload.iter().zip(words_of(bytes)) {
            word.store(value, Ordering::Relaxed);
        }
        store_le(self.slot.len, bytes.len() as u64, Ordering::Relaxed);
        store_le(self.slot.crc, checksum(bytes, self.version), Ordering::Relaxed);
    }

    /// Makes the version the newest.
    pub(crate) fn publish(self) {
        // Release for its own sake: readers come through `latest`, whose release alone would do.
        store_le(self.slot.seq, 2 * self.version, Ordering::Release);
        store_le(self.latest, self.version, Ordering::Release);
    }
}

/// The first `len` bytes of a copied payload.
pub(crate) fn bytes_of(words: &[u64], len: usize) -> &[u8] {
    let bytes = zerocopy::IntoBytes::as_bytes(words);
    bytes.get(..len).unwrap_or(bytes)
}

/// Announces a new version to sleepers: to be followed by a wake-up on the word. Only for the one writer.
pub(crate) fn bump(wake: &AtomicU32) {
    wake.store(wake.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
}

/// Waits until the newest version of `area` is not `seen` and returns it, or until `park` gives up.
///
/// `park(word, value)` sleeps while the word has that value (as a futex does) and returns false when time is up. No
/// wake-up is lost: the writer moves `latest` before the word, so a word read before the version is stale whenever the
/// version is.
pub(crate) fn wait_past<E>(
    area: &Area<'_>,
    wake: &AtomicU32,
    seen: u64,
    mut park: impl FnMut(&AtomicU32, u32) -> Result<bool, E>,
) -> Result<u64, E> {
    loop {
        let value = wake.load(Ordering::Acquire);
        let latest = area.latest();
        if latest != seen || !park(wake, value)? {
            return Ok(area.latest());
        }
    }
}

/// The protocol under every interleaving and every reordering that the memory model allows.
#[cfg(loom)]
#[cfg(test)]
mod model {
    use super::*;
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    /// With length and checksum, three words can be mixed up.
    const WORDS: usize = 1;

    struct Memory {
        latest: AtomicU64,
        slots: [[AtomicU64; 3]; 2],
        payloads: [[AtomicU64; WORDS]; 2],
        wake: AtomicU32,
    }

    /// Where a writer dies.
    #[derive(Clone, Copy)]
    enum Death {
        Begun,
        HalfFilled,
        Filled,
        Completed,
    }

    impl Memory {
        fn new() -> Self {
            let zero = || AtomicU64::new(0);
            Self {
                latest: zero(),
                slots: std::array::from_fn(|_| std::array::from_fn(|_| zero())),
                payloads: std::array::from_fn(|_| std::array::from_fn(|_| zero())),
                wake: AtomicU32::new(0),
            }
        }

        fn area(&self) -> Area<'_> {
            let slot = |index: usize| {
                let [seq, len, crc] = &self.slots[index];
                Slot { seq, len, crc, payload: &self.payloads[index] }
            };
            Area { latest: &self.latest, slots: [slot(0), slot(1)] }
        }

        fn publish(&self) {
            let filling = self.area().begin();
            filling.fill(&content(filling.version()));
            filling.publish();
        }

        fn die(&self, death: Death) {
            let filling = self.area().begin();
            let torn = [0xee; 8 * WORDS];
            match death {
                Death::Begun => {}
                Death::HalfFilled => filling.slot.payload[0].store(u64::MAX, Ordering::Relaxed),
                Death::Filled => filling.fill(&torn),
                Death::Completed => {
                    filling.fill(&torn);
                    store_le(filling.slot.seq, 2 * filling.version, Ordering::Release);
                }
            }
        }

        /// Reads once; the version must be whole and not older than `seen`.
        fn read(&self, seen: u64, attempts: usize) -> u64 {
            let mut words = Vec::new();
            match self.area().read(&mut words, attempts, |_, _| Ok(())) {
                Ok(None) => {
                    assert_eq!(seen, 0, "a published version disappeared");
                    0
                }
                Ok(Some((version, len))) => {
                    assert!(version >= seen, "version {version} after {seen}");
                    assert_eq!(bytes_of(&words, len), content(version));
                    version
                }
                Err(ReadError::Busy) => seen,
                Err(error) => panic!("{error:?}"),
            }
        }
    }

    impl Memory {
        /// Reads the one version that is there; being overtaken is no excuse.
        fn read_newest(&self, version: usize) -> u64 {
            let mut words = Vec::new();
            let (found, len) =
                self.area().read(&mut words, 1, |_, _| Ok(())).expect("readable").expect("published");
            assert_eq!((found, bytes_of(&words, len)), (version as u64, &content(found)[..]));
            found
        }
    }

    /// What version `version` says; each has another length.
    fn content(version: u64) -> Vec<u8> {
        let byte = u8::try_from(version).expect("models publish a handful of versions");
        vec![byte; 8 * WORDS - usize::from(byte)]
    }

    /// Runs the two at once on a memory with `published` versions and returns what the reader returned.
    ///
    /// Both are spawned: what the main thread does right after a spawn, loom 0.7 takes for ordered before the new
    /// thread and explores no other order.
    fn race(
        published: usize,
        writer: impl FnOnce(&Memory) + 'static,
        reader: impl FnOnce(&Memory) -> u64 + 'static,
    ) -> (Arc<Memory>, u64) {
        let memory = Arc::new(Memory::new());
        (0..published).for_each(|_| memory.publish());
        let writing = thread::spawn({
            let memory = Arc::clone(&memory);
            move || writer(&memory)
        });
        let reading = thread::spawn({
            let memory = Arc::clone(&memory);
            move || reader(&memory)
        });
        writing.join().expect("writer");
        (memory, reading.join().expect("reader"))
    }

    /// Two versions later the slot that is being read is overwritten.
    fn publishes_during_a_read(attempts: usize) {
        // At most four preemptions: without the bound this one takes a minute and finds nothing more.
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(4);
        model.check(move || {
            let writer = |memory: &Memory| (0..2).for_each(|_| memory.publish());
            let (memory, seen) = race(1, writer, move |memory| memory.read(1, attempts));
            assert_eq!(memory.read(seen, 1), 3, "the newest version is read when nobody writes");
        });
    }

    #[test]
    fn a_reader_gets_a_whole_version_or_busy() {
        publishes_during_a_read(1);
    }

    #[test]
    fn an_overtaken_reader_tries_again() {
        publishes_during_a_read(2);
    }

    #[test]
    fn versions_never_go_back() {
        loom::model(|| {
            let reader = |memory: &Memory| {
                let seen = memory.read(0, 1);
                memory.read(seen, 1)
            };
            race(0, |memory| (0..2).for_each(|_| memory.publish()), reader);
        });
    }

    #[test]
    fn two_readers_do_not_disturb_each_other() {
        loom::model(|| {
            let memory = Arc::new(Memory::new());
            let threads: Vec<_> = (0..3)
                .map(|index| {
                    let memory = Arc::clone(&memory);
                    thread::spawn(move || match index {
                        0 => memory.publish(),
                        _ => assert!(memory.read(0, 1) <= 1),
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().expect("thread"));
        });
    }

    /// A writer dies, its successor goes on; the successor attaches after the death, which the kernel orders. The
    /// newest version stays readable throughout: the dead one wrote to the other slot.
    fn survives(death: Death) {
        for published in [1, 2] {
            loom::model(move || {
                let reader = move |memory: &Memory| memory.read_newest(published);
                let (memory, _) = race(published, move |memory| memory.die(death), reader);
                assert_eq!(memory.read_newest(published), published as u64);
            });
        }
        loom::model(move || {
            let writer = move |memory: &Memory| {
                memory.die(death);
                memory.publish();
            };
            let reader = |memory: &Memory| {
                let seen = memory.read(1, 1);
                memory.read(seen, 1)
            };
            let (memory, seen) = race(1, writer, reader);
            assert_eq!(memory.read(seen, 1), 2);
        });
    }

    #[test]
    fn a_writer_may_die_before_it_filled_anything() {
        survives(Death::Begun);
    }

    #[test]
    fn a_writer_may_die_while_it_fills() {
        survives(Death::HalfFilled);
    }

    #[test]
    fn a_writer_may_die_before_it_completes() {
        survives(Death::Filled);
    }

    #[test]
    fn a_writer_may_die_before_it_announces() {
        survives(Death::Completed);
    }

    #[test]
    fn no_wake_up_is_lost() {
        loom::model(|| {
            // A futex: comparing and going to sleep are one step, as under the kernel's bucket lock.
            let futex = Arc::new((Mutex::new(()), Condvar::new()));
            let waiter = {
                let futex = Arc::clone(&futex);
                move |memory: &Memory| {
                    let park = |word: &AtomicU32, value| {
                        let bucket = futex.0.lock().expect("bucket");
                        if word.load(Ordering::Relaxed) == value {
                            drop(futex.1.wait(bucket));
                        }
                        Ok::<_, ()>(true)
                    };
                    wait_past(&memory.area(), &memory.wake, 0, park).expect("woken")
                }
            };
            let writer = move |memory: &Memory| {
                memory.publish();
                bump(&memory.wake);
                drop(futex.0.lock());
                futex.1.notify_all();
            };
            assert_eq!(race(0, writer, waiter).1, 1);
        });
    }
}
