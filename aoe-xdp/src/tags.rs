//! Late copies of writes, known by the order of Linux's tags.
//!
//! The Linux initiator resends a write under a new tag and forgets the old copy. Where a network delivers that copy after a
//! later write to the same sectors was acknowledged, executing it would bring old data back (I6). An order of arrival
//! cannot show that, but Linux's tags can: every frame of a device, resends included, takes the low 16 bits of the tick
//! counter (`jiffies`) and the next of 2^15 sequence numbers, and bit 31 is clear. Both only grow, so of two frames of one
//! host the one that was sent first has the older tag, whichever came first.
//!
//! What the module promises:
//! * Only initiators whose tags have proved to be made like that are judged. A stream of frames is proved by
//!   [`STEPS_TO_PROVE`] steps forward in both numbers, over a second or more, in which the ticks went at a rate that a
//!   kernel can have; one step that Linux cannot make starts it again. A random tag passes for a step forward with odds
//!   below 1 : 4, so all 64 with odds below 2^-128. A counter, a constant, a structured number fails by repeating a sequence
//!   number under other ticks, by ticks that do not follow the time, or by bit 31.
//! * A write is called late only if a newer one of the same host to one of its sectors was admitted in the last
//!   [`REMEMBERED_NS`]. A verdict that is wrong costs one retransmission: nothing is executed, and the copy that is sent
//!   again has a newer tag than all others.
//! * Several stations are taken for interfaces of one host only when [`FITS_TO_JOIN`] frames of each have fallen into gaps of
//!   the other's sequence, within a window of half as many numbers, and none on a number that the other had used. Two hosts
//!   that each send by one station use every number of theirs: the one that trails reaches a used number within one window.
//!   Two hosts that each alternate between stations leave every other number free, and each frame hits a used one with odds
//!   1 : 2 unless the two counters keep in step; without that, all 2048 miss with odds of 2^-2048.
//! * What is remembered is bounded: under many writes the oldest go first, and a copy that is late by more is executed, as
//!   on a network without this module. So is a copy that is late by more than 28 s, when 16 bits of ticks wrap.
//!
//! All memory is taken at construction. Time comes in with the frames.

/// Steps forward, without a contradiction, that prove a stream.
pub const STEPS_TO_PROVE: u32 = 64;

/// Frames of each of two streams that have to fit into one sequence before the two are one host's.
pub const FITS_TO_JOIN: u32 = 2 * WINDOW;

/// How long an admitted write is remembered, in nanoseconds: far longer than networks delay a frame, and short enough that
/// the ticks of what is compared, at most this old, tell old from new.
pub const REMEMBERED_NS: u64 = 4_000_000_000;

/// Sequence numbers within which two streams must fit.
const WINDOW: u32 = 1024;
const WINDOW_WORDS: usize = 16;
const _: () = assert!(WINDOW as usize == WINDOW_WORDS * 64);

/// Sectors of a block, the unit in which writes are remembered.
const BLOCK_SECTORS: u64 = 8;
/// Writes whose blocks fall together: as many as a block has sectors, two cache lines.
const WAYS: usize = 8;
/// A remembered write's time counts 2^22 ns.
const TICK_SHIFT: u32 = 22;
/// The fastest ticks of a kernel, with a reserve: 1000 a second, 1024 on some machines.
const HZ_MAX: u64 = 1_250;
/// The slowest, with a reserve: 24 a second.
const HZ_MIN: u64 = 20;
/// How much longer one frame may be under way than another.
const SKEW_NS: u64 = 4_000_000_000;
/// Behind a pause of this length ticks say nothing: they may have wrapped.
const PAUSE_NS: u64 = 20_000_000_000;
/// Frames that come behind a newer one, without one that goes forward, before a stream is taken for another one.
const BEHIND_MAX: u32 = 256;
/// Pairs of streams that are watched at a time.
const PAIRS: usize = 32;
/// How often a stream looks for others of its host.
const SEARCH_NS: u64 = 2_000_000_000;

const NONE: u16 = u16::MAX;
const SECOND_NS: u64 = 1_000_000_000;

/// A station that sends to one export: a place below the number given at construction, the caller's to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamId(pub u32);

/// A frame's tag as Linux makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag(u32);

impl Tag {
    /// The sequence number, of 15 bits in a tag of Linux, and the ticks.
    fn halves(self) -> (u16, u16) {
        let [a, b, c, d] = self.0.to_be_bytes();
        (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    }

    /// Ticks from `other` to this one.
    fn ticks_after(self, other: Tag) -> i32 {
        let difference = self.halves().1.wrapping_sub(other.halves().1);
        i32::from(difference.cast_signed())
    }

    /// Sequence numbers from `other` to this one.
    fn frames_after(self, other: Tag) -> i32 {
        let difference = self.halves().0.wrapping_sub(other.halves().0);
        i32::from((difference << 1).cast_signed() >> 1)
    }

    /// Whether a host sent this frame after the other: by the ticks, and within one tick by the sequence.
    fn is_newer_than(self, other: Tag) -> bool {
        match self.ticks_after(other) {
            0 => self.frames_after(other) > 0,
            ticks => ticks > 0,
        }
    }
}

/// What a frame is to the newest one of its lineage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Forward,
    /// The same frame again, or one that was overtaken.
    Behind,
    /// Linux does not make that step.
    Contradiction,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    live: bool,
    export: u32,
    /// The place of the lineage that it belongs to: its own, unless it was joined to another one.
    lineage: u16,
}

/// The frames of one host to one export, as far as known: those of one stream or of several.
#[derive(Debug, Clone, Copy)]
struct Lineage {
    streams: u16,
    newest: Option<(Tag, u64)>,
    forward: u32,
    behind: u32,
    /// Ticks and time of the steps forward.
    ticks: u64,
    span_ns: u64,
    /// Since when it is proved.
    proved: Option<u64>,
    pair: u16,
    search_ns: u64,
}

const NEW: Lineage = Lineage {
    streams: 0,
    newest: None,
    forward: 0,
    behind: 0,
    ticks: 0,
    span_ns: 0,
    proved: None,
    pair: NONE,
    search_ns: 0,
};

impl Lineage {
    fn judge(&self, tag: Tag, now_ns: u64) -> Step {
        if tag.0 >> 31 != 0 {
            return Step::Contradiction;
        }
        let Some((newest, newest_ns)) = self.newest else { return Step::Forward };
        if tag == newest {
            return Step::Behind;
        }
        let (ticks, frames) = (tag.ticks_after(newest), tag.frames_after(newest));
        let elapsed_ns = now_ns.saturating_sub(newest_ns);
        if frames == 0 {
            return Step::Contradiction;
        }
        if elapsed_ns >= PAUSE_NS {
            return if frames > 0 { Step::Forward } else { Step::Contradiction };
        }
        if ticks < 0 || (ticks == 0 && frames < 0) {
            // So late that the sequence has gone half around is credible only of a host that is known.
            let credible = frames < 0 || self.proved.is_some();
            return if credible { Step::Behind } else { Step::Contradiction };
        }
        let possible = u64::from(ticks.unsigned_abs()) <= (elapsed_ns + SKEW_NS) * HZ_MAX / SECOND_NS;
        if frames > 0 && possible { Step::Forward } else { Step::Contradiction }
    }

    /// Takes a frame in; whether it fits.
    fn observe(&mut self, tag: Tag, now_ns: u64) -> bool {
        match self.judge(tag, now_ns) {
            Step::Contradiction => return false,
            Step::Behind => {
                self.behind += 1;
                return self.behind <= BEHIND_MAX;
            }
            Step::Forward => {}
        }
        self.behind = 0;
        if let Some((newest, newest_ns)) = self.newest {
            let elapsed_ns = now_ns.saturating_sub(newest_ns);
            if elapsed_ns < PAUSE_NS {
                self.ticks += u64::from(tag.ticks_after(newest).unsigned_abs());
                self.span_ns += elapsed_ns;
            }
            self.forward += 1;
        }
        self.newest = Some((tag, now_ns));
        if self.proved.is_none() && self.forward >= STEPS_TO_PROVE && self.span_ns >= SECOND_NS {
            let least = self.span_ns * HZ_MIN / SECOND_NS;
            let most = (self.span_ns + SECOND_NS) * HZ_MAX / SECOND_NS;
            if (least..=most).contains(&self.ticks) {
                self.proved = Some(now_ns);
            }
            (self.forward, self.ticks, self.span_ns) = (0, 0, 0);
        }
        true
    }
}

/// Two lineages that may be one.
#[derive(Debug, Clone, Copy)]
struct Pair {
    lineages: Option<[u16; 2]>,
    newest: Tag,
    newest_ns: u64,
    fits: [u32; 2],
    /// Which numbers each has used, counted back from the newest.
    used: [[u64; WINDOW_WORDS]; 2],
}

const NO_PAIR: Pair =
    Pair { lineages: None, newest: Tag(0), newest_ns: 0, fits: [0; 2], used: [[0; WINDOW_WORDS]; 2] };

impl Pair {
    /// Takes a frame of one side in; whether the two can still be one.
    fn observe(&mut self, side: usize, tag: Tag, now_ns: u64) -> bool {
        let (ticks, frames) = (tag.ticks_after(self.newest), tag.frames_after(self.newest));
        let back = match frames {
            0 if ticks != 0 => return false,
            0 => 0,
            1.. if ticks < 0 => return false,
            1.. => {
                let elapsed_ns = now_ns.saturating_sub(self.newest_ns);
                let possible = u64::from(ticks.unsigned_abs()) <= (elapsed_ns + SKEW_NS) * HZ_MAX / SECOND_NS;
                if frames.unsigned_abs() >= WINDOW || !possible {
                    return false;
                }
                self.used.iter_mut().for_each(|used| shift(used, frames.unsigned_abs() as usize));
                (self.newest, self.newest_ns) = (tag, now_ns);
                0
            }
            _ if ticks > 0 => return false,
            // A late copy: it says nothing for the two and nothing against.
            _ if frames.unsigned_abs() >= WINDOW => return true,
            _ => frames.unsigned_abs() as usize,
        };
        let (word, bit) = (back / 64, 1 << (back % 64));
        if self.used[1 - side][word] & bit != 0 {
            return false;
        }
        if self.used[side][word] & bit == 0 {
            self.used[side][word] |= bit;
            self.fits[side] += 1;
        }
        true
    }
}

/// Makes every number older by `by`, below [`WINDOW`].
fn shift(used: &mut [u64; WINDOW_WORDS], by: usize) {
    let (words, bits) = (by / 64, by % 64);
    for at in (0..WINDOW_WORDS).rev() {
        let word = |index: Option<usize>| index.map_or(0, |index| used[index]);
        let low = word(at.checked_sub(words));
        let carried = if bits == 0 { 0 } else { word(at.checked_sub(words + 1)) >> (64 - bits) };
        used[at] = low << bits | carried;
    }
}

/// A write that was admitted.
#[derive(Debug, Clone, Copy)]
struct Remembered {
    /// Block, lineage and, one bit each, the block's sectors; without a sector: nothing.
    key: u64,
    tag: Tag,
    tick: u32,
}

impl Remembered {
    /// Whether it is of use: not older than what is promised, nor than the proof of its lineage.
    fn is_current(&self, since_ns: u64, now_ns: u64) -> bool {
        let age = u64::from(tick(now_ns).wrapping_sub(self.tick));
        age <= (REMEMBERED_NS >> TICK_SHIFT)
            .min((now_ns >> TICK_SHIFT).saturating_sub(since_ns >> TICK_SHIFT))
    }
}

const NOTHING: Remembered = Remembered { key: 0, tag: Tag(0), tick: 0 };
const LINEAGE_BITS: u32 = 11;
const SECTOR_BITS: u32 = 8;
const SECTORS: u64 = (1 << SECTOR_BITS) - 1;

/// The streams of one core, their lineages, and the writes that were admitted lately.
#[derive(Debug)]
pub struct TagOrder {
    streams: Box<[Stream]>,
    lineages: Box<[Lineage]>,
    pairs: Box<[Pair]>,
    remembered: Box<[[Remembered; WAYS]]>,
    set_shift: u32,
}

impl TagOrder {
    /// For at most `streams_max` streams at a time, remembering about `writes_max` writes of one block.
    ///
    /// # Panics
    /// If `streams_max` is 0 or above 2^11, or `writes_max` is below 16 or above 2^30.
    #[must_use]
    pub fn new(streams_max: u32, writes_max: u32) -> TagOrder {
        assert!(streams_max > 0 && streams_max <= 1 << LINEAGE_BITS);
        assert!((16..=1 << 30).contains(&writes_max));
        let sets = (writes_max as usize / WAYS).next_power_of_two();
        let nobody = Stream { live: false, export: 0, lineage: 0 };
        TagOrder {
            streams: vec![nobody; streams_max as usize].into(),
            lineages: vec![NEW; streams_max as usize].into(),
            pairs: vec![NO_PAIR; PAIRS].into(),
            remembered: vec![[NOTHING; WAYS]; sets].into(),
            set_shift: 64 - sets.trailing_zeros(),
        }
    }

    /// A station sends its first frame to the export with key `export`. Nothing is known of it yet.
    ///
    /// # Panics
    /// If the place is in use or out of range.
    pub fn begin(&mut self, stream: StreamId, export: u32) {
        let at = stream.0 as usize;
        assert!(!self.streams[at].live, "the place is in use");
        let lineage = u16::try_from(stream.0).expect("below 2^11");
        self.streams[at] = Stream { live: true, export, lineage };
        self.lineages[at] = Lineage { streams: 1, ..NEW };
    }

    /// A station is forgotten.
    ///
    /// # Panics
    /// If the place is not in use.
    pub fn end(&mut self, stream: StreamId) {
        let at = stream.0 as usize;
        assert!(self.streams[at].live, "the place is not in use");
        let lineage = self.streams[at].lineage;
        if u32::from(lineage) == stream.0 {
            // The place that the next station gets is the lineage's.
            self.dissolve(lineage);
        } else {
            self.lineages[usize::from(lineage)].streams -= 1;
        }
        self.streams[at].live = false;
    }

    /// Takes the tag of a request of a stream in, whatever it asks for.
    pub fn observe(&mut self, stream: StreamId, tag: u32, now_ns: u64) {
        let tag = Tag(tag);
        let lineage = self.streams[stream.0 as usize].lineage;
        if !self.lineages[usize::from(lineage)].observe(tag, now_ns) {
            self.dissolve(lineage);
            // It may be the first one of a host that was started again.
            let fits = self.lineages[stream.0 as usize].observe(tag, now_ns);
            debug_assert!(fits || tag.0 >> 31 != 0, "the first frame fits");
            return;
        }
        let known = self.lineages[usize::from(lineage)];
        if known.pair != NONE {
            self.weigh(known.pair, lineage, tag, now_ns);
        } else if known.proved.is_some() && now_ns >= known.search_ns {
            self.search(stream, now_ns);
        }
    }

    /// Whether a write of `sectors` sectors from `lba` is a copy that comes too late: a newer one of the same host to one of
    /// its sectors was admitted before. It must not be executed then.
    #[must_use]
    pub fn is_late(&self, stream: StreamId, tag: u32, lba: u64, sectors: u8, now_ns: u64) -> bool {
        let Some((lineage, since_ns)) = self.proved(stream) else { return false };
        let tag = Tag(tag);
        blocks(lba, sectors).any(|(block, touched)| {
            let key = key(block, lineage, 0);
            self.remembered[self.set(key)].iter().any(|write| {
                write.key & !SECTORS == key
                    && write.key & touched != 0
                    && write.is_current(since_ns, now_ns)
                    && write.tag.is_newer_than(tag)
            })
        })
    }

    /// Remembers a write of `sectors` sectors from `lba` that [was not late](Self::is_late) and was admitted.
    pub fn admitted(&mut self, stream: StreamId, tag: u32, lba: u64, sectors: u8, now_ns: u64) {
        let Some((lineage, _)) = self.proved(stream) else { return };
        let (tag, tick) = (Tag(tag), tick(now_ns));
        for (block, touched) in blocks(lba, sectors) {
            let key = key(block, lineage, touched);
            let set = &mut self.remembered[self.set(key)];
            // Of a sector only the newest write counts, so a block needs at most as many places as it has sectors.
            for write in set.iter_mut().filter(|write| write.key & !SECTORS == key & !SECTORS) {
                write.key &= !touched;
            }
            let rank = |write: &Remembered| match write.key & SECTORS {
                0 => u32::MAX,
                _ => tick.wrapping_sub(write.tick),
            };
            let place = set.iter_mut().max_by_key(|write| rank(write)).expect("a set has ways");
            *place = Remembered { key, tag, tick };
        }
    }

    /// Whether the stream's tags have proved to be Linux's.
    #[must_use]
    pub fn is_proved(&self, stream: StreamId) -> bool {
        self.proved(stream).is_some()
    }

    /// Whether two streams have proved to be interfaces of one host.
    #[must_use]
    pub fn are_one_host(&self, one: StreamId, other: StreamId) -> bool {
        self.streams[one.0 as usize].lineage == self.streams[other.0 as usize].lineage
    }

    /// The lineage of a stream that is proved, and since when.
    fn proved(&self, stream: StreamId) -> Option<(u16, u64)> {
        let lineage = self.streams[stream.0 as usize].lineage;
        self.lineages[usize::from(lineage)].proved.map(|since_ns| (lineage, since_ns))
    }

    fn set(&self, key: u64) -> usize {
        let mixed = (key >> SECTOR_BITS).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        usize::try_from(mixed >> self.set_shift).expect("fewer sets than usize")
    }

    /// Makes the streams of a lineage unknown ones, each for itself.
    fn dissolve(&mut self, lineage: u16) {
        self.part(self.lineages[usize::from(lineage)].pair);
        let known = self.lineages[usize::from(lineage)];
        if known.streams > 1 {
            for (at, own) in (0..self.streams.len()).zip(0u16..) {
                if self.streams[at].live && self.streams[at].lineage == lineage {
                    self.streams[at].lineage = own;
                    self.lineages[at] = Lineage { streams: 1, ..NEW };
                }
            }
        }
        self.lineages[usize::from(lineage)] = Lineage { streams: 1, ..NEW };
    }

    /// Watches a proved lineage together with another one of the same export whose newest frame is near.
    fn search(&mut self, stream: StreamId, now_ns: u64) {
        let Stream { export, lineage: mine, .. } = self.streams[stream.0 as usize];
        self.lineages[usize::from(mine)].search_ns = now_ns + SEARCH_NS;
        let Some((newest, newest_ns)) = self.lineages[usize::from(mine)].newest else { return };
        let near = |other: &Lineage| {
            other.newest.is_some_and(|(tag, at_ns)| {
                let apart_ns = newest_ns.abs_diff(at_ns) + SECOND_NS;
                let ticks = u64::from(tag.ticks_after(newest).unsigned_abs());
                tag.frames_after(newest).unsigned_abs() < WINDOW / 2 && ticks <= apart_ns * HZ_MAX / SECOND_NS
            })
        };
        let other = self.streams.iter().filter(|other| other.live && other.export == export).find(|other| {
            let lineage = &self.lineages[usize::from(other.lineage)];
            other.lineage != mine && lineage.proved.is_some() && lineage.pair == NONE && near(lineage)
        });
        let Some(theirs) = other.map(|other| other.lineage) else { return };
        let Some(free) = self.pairs.iter().position(|pair| pair.lineages.is_none()) else { return };
        self.pairs[free] = Pair { lineages: Some([mine, theirs]), newest, newest_ns, ..NO_PAIR };
        for lineage in [mine, theirs] {
            self.lineages[usize::from(lineage)].pair = u16::try_from(free).expect("a few pairs");
        }
    }

    /// Takes a frame of one of a pair in, and parts or joins the two.
    fn weigh(&mut self, at: u16, lineage: u16, tag: Tag, now_ns: u64) {
        let pair = &mut self.pairs[usize::from(at)];
        let Some([one, other]) = pair.lineages else { return };
        let fits = pair.observe(usize::from(lineage == other), tag, now_ns);
        let proved = pair.fits.iter().all(|&fits| fits >= FITS_TO_JOIN);
        if !fits {
            self.part(at);
        } else if proved {
            self.part(at);
            for stream in &mut self.streams {
                if stream.live && stream.lineage == other {
                    stream.lineage = one;
                    self.lineages[usize::from(one)].streams += 1;
                }
            }
            let (mine, theirs) =
                (self.lineages[usize::from(one)].newest, self.lineages[usize::from(other)].newest);
            if let (Some((old, _)), Some((new, at_ns))) = (mine, theirs)
                && new.is_newer_than(old)
            {
                self.lineages[usize::from(one)].newest = Some((new, at_ns));
            }
            self.lineages[usize::from(other)] = NEW;
        }
    }

    /// Ends the watch over a pair.
    fn part(&mut self, at: u16) {
        let Some(pair) = self.pairs.get_mut(usize::from(at)) else { return };
        for lineage in pair.lineages.take().into_iter().flatten() {
            self.lineages[usize::from(lineage)].pair = NONE;
        }
    }
}

/// The blocks of a write, each with a bit for every sector of it that is written.
fn blocks(lba: u64, sectors: u8) -> impl Iterator<Item = (u64, u64)> {
    let end = lba + u64::from(sectors);
    (lba / BLOCK_SECTORS..end.div_ceil(BLOCK_SECTORS)).map(move |block| {
        let start = block * BLOCK_SECTORS;
        let (from, to) = (lba.max(start) - start, end.min(start + BLOCK_SECTORS) - start);
        (block, ((1 << to) - 1) & !((1 << from) - 1))
    })
}

fn key(block: u64, lineage: u16, touched: u64) -> u64 {
    block << (LINEAGE_BITS + SECTOR_BITS) | u64::from(lineage) << SECTOR_BITS | touched
}

/// A time as a number that is compared as a difference; it comes again after 208 days.
fn tick(now_ns: u64) -> u32 {
    let [.., a, b, c, d] = (now_ns >> TICK_SHIFT).to_be_bytes();
    u32::from_be_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests;
