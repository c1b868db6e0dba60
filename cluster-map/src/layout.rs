//! What lies where in the file: a header page that is written once, then five sections.
//!
//! ```text
//! header    magic, levels, CRC32C, boot, cluster and node ids, place and geometry of every section
//! desired   head (newest version, both slots' seq, length, CRC32C), slot 0, slot 1     written by the control process
//! observed  the same                                                                   written by the data plane
//! signals   futex words and heartbeats, each on a line of its own                      written by whom it belongs to
//! stats     per core: counters, then histograms                                        written by that core
//! clients   per core a line with the number of records in use; then per core its records   written by that core
//! ```
//!
//! All offsets are bytes from the start of the file in little-endian numbers, never pointers. [`Layout::parse`] accepts
//! a header only if everything in it is consistent with itself and with the size of the file; after that nothing that
//! the other process writes can move a section.

use crate::clients::{CLIENT_BUCKETS, ClientCounter, FIXED_WORDS};
use crate::error::{Fault, MapError};
use crate::slot::{HEAD_WORDS, LINE_WORDS};
use crate::stats::{BUCKETS, Counter, HISTOGRAMS};
use crate::{ClusterId, NodeId};
use std::ops::Range;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The layout level of this program. A program of level N reads and writes maps of level N and N−1.
pub const LEVEL: u32 = 5;

/// The lowest level that can read what this program writes: its predecessor's, level 1 being the first.
///
/// Level 2 brought the records of clients and what initiators see and change of exports; level 3 scrubs and checksums of
/// stores, of which a reader of level 2 need not know; level 4 what replicated volumes need; level 5 hand-overs and editions. An observed state
/// with a head in it that has handed over is for readers of level 5 only.
pub(crate) const LOWEST_READER: u32 = if LEVEL > 1 { LEVEL - 1 } else { 1 };

/// Sections begin and end on pages.
pub(crate) const PAGE: usize = 4096;

const MAGIC: [u8; 8] = *b"TORUSMAP";

const WORD: usize = 8;
const LINE: usize = LINE_WORDS * WORD;
const SIGNAL_LINES: usize = 4;
const MAX_SLOT_BYTES: usize = 1 << 30;
const MAX_CORES: usize = 4096;
const MAX_CORE_BYTES: usize = 512 << 10;
/// Keeps all sums and products of places far from overflow.
const MAX_FILE_BYTES: u64 = 1 << 40;
const MAX_COUNTERS: usize = 4096;
const MAX_HISTOGRAMS: usize = 64;
/// Clients that each core of a new map has records for: more than it can have requests in progress.
const CLIENTS_PER_CORE: usize = 1024;
const MAX_CLIENTS_PER_CORE: usize = 1 << 16;
const MAX_CLIENT_BYTES: usize = 64 << 10;

const _: () =
    assert!(HEAD_WORDS * WORD <= PAGE && SIGNAL_LINES * LINE <= PAGE && size_of::<Header>() <= PAGE);

/// The dimensions of a map, fixed when it is created.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Geometry {
    /// Cores that write statistics: at least as many as the data plane will run on.
    pub cores: u16,
    /// The cluster that the map is for.
    pub cluster: ClusterId,
    /// The node that the map is for.
    pub node: NodeId,
    /// Largest desired state in bytes, rounded up to pages. The file is sparse: what is not used costs nothing.
    pub desired_bytes: u64,
    /// Largest observed state in bytes, rounded up to pages.
    pub observed_bytes: u64,
}

impl Geometry {
    /// Room for at least 10 000 volumes and 10 000 exports, each with the longest config string and full lists of MACs, and
    /// with an error of [`MAX_NOTE_BYTES`](crate::MAX_NOTE_BYTES); and for the node to be head of all of them, with three owners
    /// for each of 16 partitions.
    #[must_use]
    pub fn new(cores: u16, cluster: ClusterId, node: NodeId) -> Self {
        Self { cores, cluster, node, desired_bytes: 64 << 20, observed_bytes: 24 << 20 }
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SectionEntry {
    offset: U64,
    len: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    level: U32,
    lowest_reader: U32,
    /// CRC32C of the whole header page with this field zero.
    crc: U32,
    reserved: U32,
    file_len: U64,
    boot: [u8; 16],
    cluster: [u8; 16],
    node: [u8; 16],
    desired: SectionEntry,
    desired_slot_bytes: U64,
    observed: SectionEntry,
    observed_slot_bytes: U64,
    signals: SectionEntry,
    stats: SectionEntry,
    core_stride: U64,
    histogram_offset: U64,
    histogram_stride: U64,
    cores: U32,
    counters: U32,
    histograms: U32,
    buckets: U32,
    /// From here on zero in a map of level 1, which has no clients.
    clients: SectionEntry,
    client_stride: U64,
    client_histogram_offset: U64,
    clients_per_core: U32,
    client_counters: U32,
    client_buckets: U32,
    reserved_2: U32,
}

/// An area in words from the start of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AreaLayout {
    pub(crate) head: Range<usize>,
    pub(crate) slots: [Range<usize>; 2],
}

/// The statistics in words: strides and offsets may be those of another level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StatsLayout {
    pub(crate) first: usize,
    pub(crate) cores: usize,
    pub(crate) core_stride: usize,
    pub(crate) counters: usize,
    pub(crate) histogram_offset: usize,
    pub(crate) histogram_stride: usize,
}

/// The statistics of one core, in words: the counters that both this program and the map know, and for each histogram
/// its sum and its buckets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CoreLayout {
    pub(crate) counters: Range<usize>,
    pub(crate) histograms: [Range<usize>; HISTOGRAMS],
}

/// The records of clients in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClientsLayout {
    first: usize,
    cores: usize,
    pub(crate) per_core: usize,
    pub(crate) stride: usize,
    /// How many counters a record has that both this program and the map know.
    pub(crate) counters: usize,
    /// Where in a record its histograms begin.
    pub(crate) histogram_offset: usize,
}

/// A header that was found consistent; all places in words from the start of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) boot: [u8; 16],
    pub(crate) cluster: ClusterId,
    pub(crate) node: NodeId,
    pub(crate) file_len: usize,
    pub(crate) desired: AreaLayout,
    pub(crate) observed: AreaLayout,
    signals: usize,
    pub(crate) stats: StatsLayout,
    /// `None` in a map of level 1.
    pub(crate) clients: Option<ClientsLayout>,
}

/// The words that one process writes to be noticed by the other.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Signal {
    DesiredWake = 0,
    ObservedWake = 1,
    ControlBeat = 2,
    DataPlaneBeat = 3,
}

/// Whether this program, of level `own`, speaks what was found.
pub(crate) fn check_level(found: u32, lowest_reader: u32, own: u32) -> Result<(), Fault> {
    let sound = found >= 1 && (1..=found).contains(&lowest_reader);
    let spoken = found.saturating_add(1) >= own && lowest_reader <= own;
    if sound && spoken { Ok(()) } else { Err(Fault::Level { found, lowest_reader, supported: own }) }
}

fn header_crc(page: &[u8; PAGE]) -> u32 {
    let field = std::mem::offset_of!(Header, crc);
    let crc = crc32c::crc32c(&page[..field]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &page[field + 4..])
}

fn slot_bytes(asked: u64, name: &str) -> Result<usize, MapError> {
    let rounded = usize::try_from(asked).ok().and_then(|bytes| bytes.checked_next_multiple_of(PAGE));
    let fits = rounded.filter(|bytes| (PAGE..=MAX_SLOT_BYTES).contains(bytes));
    fits.ok_or_else(|| MapError::Invalid {
        what: format!("{name} of {asked} bytes: not 1 to {MAX_SLOT_BYTES}"),
    })
}

/// Places sections one behind the other.
struct Planner {
    end: usize,
}

impl Planner {
    fn section(&mut self, len: usize) -> SectionEntry {
        let offset = self.end;
        let len = len.next_multiple_of(PAGE);
        self.end += len;
        SectionEntry { offset: (offset as u64).into(), len: (len as u64).into() }
    }
}

/// The header page of a new map.
pub(crate) fn plan(geometry: &Geometry, boot: [u8; 16]) -> Result<[u8; PAGE], MapError> {
    let cores = usize::from(geometry.cores);
    if !(1..=MAX_CORES).contains(&cores) {
        return Err(MapError::Invalid { what: format!("{cores} cores: not 1 to {MAX_CORES}") });
    }
    let desired_slot = slot_bytes(geometry.desired_bytes, "desired_bytes")?;
    let observed_slot = slot_bytes(geometry.observed_bytes, "observed_bytes")?;
    let histogram_offset = (Counter::COUNT * WORD).next_multiple_of(LINE);
    let histogram_stride = ((1 + BUCKETS) * WORD).next_multiple_of(LINE);
    let core_stride = histogram_offset + HISTOGRAMS * histogram_stride;

    let mut place = Planner { end: PAGE };
    let mut header = Header::new_zeroed();
    header.magic = MAGIC;
    header.level = LEVEL.into();
    header.lowest_reader = LOWEST_READER.into();
    header.boot = boot;
    header.cluster = geometry.cluster.0;
    header.node = geometry.node.0;
    header.desired = place.section(PAGE + 2 * desired_slot);
    header.desired_slot_bytes = (desired_slot as u64).into();
    header.observed = place.section(PAGE + 2 * observed_slot);
    header.observed_slot_bytes = (observed_slot as u64).into();
    header.signals = place.section(SIGNAL_LINES * LINE);
    header.stats = place.section(cores * core_stride);
    header.core_stride = (core_stride as u64).into();
    header.histogram_offset = (histogram_offset as u64).into();
    header.histogram_stride = (histogram_stride as u64).into();
    header.cores = u32::from(geometry.cores).into();
    header.counters = small(Counter::COUNT);
    header.histograms = small(HISTOGRAMS);
    header.buckets = small(BUCKETS);
    let client_histogram_offset = (FIXED_WORDS + ClientCounter::COUNT) * WORD;
    let client_bytes = client_histogram_offset + HISTOGRAMS * (1 + CLIENT_BUCKETS) * WORD;
    let client_stride = client_bytes.next_multiple_of(LINE);
    header.clients = place.section(cores * (LINE + CLIENTS_PER_CORE * client_stride));
    header.client_stride = (client_stride as u64).into();
    header.client_histogram_offset = (client_histogram_offset as u64).into();
    header.clients_per_core = small(CLIENTS_PER_CORE);
    header.client_counters = small(ClientCounter::COUNT);
    header.client_buckets = small(CLIENT_BUCKETS);
    header.file_len = (place.end as u64).into();

    let mut page = [0; PAGE];
    page[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    seal(&mut page);
    Ok(page)
}

fn small(number: usize) -> U32 {
    U32::new(u32::try_from(number).expect("counts of this crate's own tables are below 4096"))
}

/// Puts the checksum into a header page.
pub(crate) fn seal(page: &mut [u8; PAGE]) {
    let field = std::mem::offset_of!(Header, crc);
    let crc = header_crc(page);
    page[field..field + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Whether a file begins like a map, of whatever level and in whatever state.
pub(crate) fn is_map(page: &[u8]) -> bool {
    page.starts_with(&MAGIC)
}

/// The size that a planned header gives its file, in bytes.
pub(crate) fn file_len(page: &[u8; PAGE]) -> u64 {
    Header::ref_from_prefix(page).map_or(0, |(header, _)| header.file_len.get())
}

/// A section in bytes, once it is known to lie in the file behind the header page.
fn section(entry: SectionEntry, name: &str, file_len: usize) -> Result<Range<usize>, Fault> {
    let range = || -> Option<Range<usize>> {
        let offset = usize::try_from(entry.offset.get()).ok()?;
        let end = offset.checked_add(usize::try_from(entry.len.get()).ok()?)?;
        let inside = offset >= PAGE && end > offset && end <= file_len;
        (inside && offset % PAGE == 0 && end % PAGE == 0).then_some(offset..end)
    };
    range().ok_or_else(|| Fault::Corrupt(format!("section {name} does not lie in the file")))
}

fn bounded(value: u64, bounds: Range<usize>, name: &str) -> Result<usize, Fault> {
    let value = usize::try_from(value).ok().filter(|value| bounds.contains(value));
    value.ok_or_else(|| Fault::Corrupt(format!("{name} is out of range")))
}

/// A number of bytes in words, once it is known to be whole words.
fn words(bytes: u64, bounds: Range<usize>, name: &str) -> Result<usize, Fault> {
    let bytes = bounded(bytes, bounds, name)?;
    if bytes.is_multiple_of(WORD) {
        Ok(bytes / WORD)
    } else {
        Err(Fault::Corrupt(format!("{name} is not whole words")))
    }
}

fn area(range: &Range<usize>, slot_bytes: u64, name: &str) -> Result<AreaLayout, Fault> {
    let slot = words(slot_bytes, PAGE..MAX_SLOT_BYTES + 1, "slot size")?;
    let head = range.start / WORD;
    let first = head + PAGE / WORD;
    if range.len() / WORD != PAGE / WORD + 2 * slot {
        return Err(Fault::Corrupt(format!("section {name} is not a head and two slots")));
    }
    Ok(AreaLayout { head: head..first, slots: [first..first + slot, first + slot..first + 2 * slot] })
}

fn stats(header: &Header, range: &Range<usize>) -> Result<StatsLayout, Fault> {
    let cores = bounded(header.cores.get().into(), 1..MAX_CORES + 1, "number of cores")?;
    let counters = bounded(header.counters.get().into(), 1..MAX_COUNTERS + 1, "number of counters")?;
    let histograms =
        bounded(header.histograms.get().into(), HISTOGRAMS..MAX_HISTOGRAMS + 1, "number of histograms")?;
    bounded(header.buckets.get().into(), BUCKETS..BUCKETS + 1, "number of buckets")?;
    let limit = range.len().min(MAX_CORE_BYTES) + 1;
    let histogram_offset =
        words(header.histogram_offset.get(), counters * WORD..limit, "place of the histograms")?;
    let least = (1 + BUCKETS) * WORD;
    let histogram_stride = words(header.histogram_stride.get(), least..limit, "stride of a histogram")?;
    let used = (histogram_offset + histograms * histogram_stride) * WORD;
    let core_stride = words(header.core_stride.get(), used..limit, "stride of a core")?;
    if !core_stride.is_multiple_of(LINE_WORDS) {
        return Err(Fault::corrupt("two cores share a cache line"));
    }
    if cores * core_stride > range.len() / WORD {
        return Err(Fault::corrupt("statistics exceed their section"));
    }
    let first = range.start / WORD;
    Ok(StatsLayout { first, cores, core_stride, counters, histogram_offset, histogram_stride })
}

fn clients(header: &Header, range: &Range<usize>, cores: usize) -> Result<ClientsLayout, Fault> {
    let per_core =
        bounded(header.clients_per_core.get().into(), 1..MAX_CLIENTS_PER_CORE + 1, "clients of a core")?;
    let counters = bounded(header.client_counters.get().into(), 1..MAX_COUNTERS + 1, "counters of a client")?;
    bounded(header.client_buckets.get().into(), CLIENT_BUCKETS..CLIENT_BUCKETS + 1, "buckets of a client")?;
    let limit = range.len().min(MAX_CLIENT_BYTES) + 1;
    let least = (FIXED_WORDS + counters) * WORD;
    let histogram_offset =
        words(header.client_histogram_offset.get(), least..limit, "place of a client's histograms")?;
    let used = (histogram_offset + HISTOGRAMS * (1 + CLIENT_BUCKETS)) * WORD;
    let stride = words(header.client_stride.get(), used..limit, "stride of a client")?;
    if cores * (LINE_WORDS + per_core * stride) > range.len() / WORD {
        return Err(Fault::corrupt("clients exceed their section"));
    }
    let counters = counters.min(ClientCounter::COUNT);
    Ok(ClientsLayout { first: range.start / WORD, cores, per_core, stride, counters, histogram_offset })
}

impl Layout {
    /// Checks the header page of a file of `file_len` bytes.
    pub(crate) fn parse(page: &[u8; PAGE], file_len: u64) -> Result<Self, Fault> {
        let (header, _) = Header::ref_from_prefix(page).map_err(|_| Fault::NotAMap)?;
        if header.magic != MAGIC {
            return Err(Fault::NotAMap);
        }
        if header_crc(page) != header.crc.get() {
            return Err(Fault::corrupt("checksum of the header"));
        }
        check_level(header.level.get(), header.lowest_reader.get(), LEVEL)?;
        let expected = header.file_len.get();
        if expected != file_len || file_len > MAX_FILE_BYTES || !file_len.is_multiple_of(PAGE as u64) {
            return Err(Fault::Corrupt(format!("file has {file_len} bytes, its header says {expected}")));
        }
        let size = usize::try_from(file_len).map_err(|_| Fault::corrupt("file is larger than memory"))?;
        let desired = section(header.desired, "desired", size)?;
        let observed = section(header.observed, "observed", size)?;
        let signals = section(header.signals, "signals", size)?;
        let statistics = section(header.stats, "stats", size)?;
        let nothing = [header.clients.offset.get(), header.clients.len.get()] == [0, 0];
        let records = if nothing { None } else { Some(section(header.clients, "clients", size)?) };
        let mut sections = vec![&desired, &observed, &signals, &statistics];
        sections.extend(&records);
        sections.sort_by_key(|section| section.start);
        if sections.windows(2).any(|pair| pair[0].end > pair[1].start) {
            return Err(Fault::corrupt("sections overlap"));
        }
        let stats = stats(header, &statistics)?;
        let clients = records.map(|range| clients(header, &range, stats.cores)).transpose()?;
        Ok(Self {
            boot: header.boot,
            cluster: ClusterId(header.cluster),
            node: NodeId(header.node),
            file_len: size,
            desired: area(&desired, header.desired_slot_bytes.get(), "desired")?,
            observed: area(&observed, header.observed_slot_bytes.get(), "observed")?,
            signals: signals.start / WORD,
            stats,
            clients,
        })
    }

    /// The word of a signal.
    pub(crate) fn signal(&self, signal: Signal) -> usize {
        self.signals + signal as usize * LINE_WORDS
    }

    /// What is written without asking for room first, in bytes: everything but the slots and the clients' records.
    pub(crate) fn fixed(&self) -> Vec<Range<usize>> {
        let bytes = |words: &Range<usize>| words.start * WORD..words.end * WORD;
        let signals = self.signals..self.signals + SIGNAL_LINES * LINE_WORDS;
        let stats = self.stats.first..self.stats.first + self.stats.cores * self.stats.core_stride;
        let mut fixed = vec![
            0..PAGE,
            bytes(&self.desired.head),
            bytes(&self.observed.head),
            bytes(&signals),
            bytes(&stats),
        ];
        fixed.extend(self.clients.as_ref().map(|clients| bytes(&clients.heads())));
        fixed
    }
}

impl StatsLayout {
    /// Where a core's statistics lie; `None` if there is no such core.
    pub(crate) fn core(&self, core: usize) -> Option<CoreLayout> {
        let first = self.first + core * self.core_stride;
        let known = self.counters.min(Counter::COUNT);
        let histogram = |index: usize| {
            let start = first + self.histogram_offset + index * self.histogram_stride;
            start..start + 1 + BUCKETS
        };
        (core < self.cores)
            .then(|| CoreLayout { counters: first..first + known, histograms: [histogram(0), histogram(1)] })
    }
}

impl ClientsLayout {
    fn heads(&self) -> Range<usize> {
        self.first..self.first + self.cores * LINE_WORDS
    }

    /// The word that says how many records of a core have ever been in use; `None` if there is no such core.
    pub(crate) fn used(&self, core: usize) -> Option<usize> {
        (core < self.cores).then(|| self.first + core * LINE_WORDS)
    }

    /// The first `count` records of a core.
    pub(crate) fn records(&self, core: usize, count: usize) -> Option<Range<usize>> {
        let first = self.heads().end + core * self.per_core * self.stride;
        (core < self.cores && count <= self.per_core).then(|| first..first + count * self.stride)
    }

    /// One record of a core.
    pub(crate) fn record(&self, core: usize, index: usize) -> Option<Range<usize>> {
        let end = self.records(core, index.checked_add(1)?)?.end;
        Some(end - self.stride..end)
    }
}

#[cfg(not(loom))]
#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn small_geometry(cores: u16) -> Geometry {
        Geometry {
            desired_bytes: 1,
            observed_bytes: 5000,
            ..Geometry::new(cores, ClusterId([7; 16]), NodeId([9; 16]))
        }
    }

    /// A header page with some bytes replaced and a checksum that fits.
    pub(crate) fn forged(page: &[u8; PAGE], at: usize, bytes: &[u8]) -> [u8; PAGE] {
        let mut page = *page;
        page[at..at + bytes.len()].copy_from_slice(bytes);
        seal(&mut page);
        page
    }

    /// A header page as another level would write it.
    pub(crate) fn of_level(page: &[u8; PAGE], level: u32, lowest_reader: u32) -> [u8; PAGE] {
        let page = forged(page, std::mem::offset_of!(Header, level), &level.to_le_bytes());
        forged(&page, std::mem::offset_of!(Header, lowest_reader), &lowest_reader.to_le_bytes())
    }

    /// A header page as another boot would write it.
    pub(crate) fn of_boot(page: &[u8; PAGE], boot: [u8; 16]) -> [u8; PAGE] {
        forged(page, std::mem::offset_of!(Header, boot), &boot)
    }

    /// A header page whose cores have only `counters` counters.
    pub(crate) fn with_counters(page: &[u8; PAGE], counters: u32) -> [u8; PAGE] {
        forged(page, std::mem::offset_of!(Header, counters), &counters.to_le_bytes())
    }

    /// A header page as a program of level 1 would have written it: without records of clients.
    pub(crate) fn without_clients(page: &[u8; PAGE]) -> [u8; PAGE] {
        let from = std::mem::offset_of!(Header, clients);
        forged(page, from, &vec![0; size_of::<Header>() - from])
    }

    /// Everything that the layout leads to lies in the file, and nothing lies on anything else.
    fn assert_sound(layout: &Layout) {
        let words = layout.file_len / WORD;
        let stats = &layout.stats;
        let mut used = vec![0..PAGE / WORD, layout.signals..layout.signals + SIGNAL_LINES * LINE_WORDS];
        for area in [&layout.desired, &layout.observed] {
            assert!(area.head.len() >= HEAD_WORDS);
            used.push(area.head.clone());
            used.extend(area.slots.clone());
        }
        for core in (0..stats.cores).map(|core| stats.core(core).unwrap()) {
            used.push(core.counters);
            used.extend(core.histograms);
        }
        assert_eq!(stats.core(stats.cores), None);
        if let Some(clients) = &layout.clients {
            used.push(clients.heads());
            for core in 0..stats.cores {
                assert!(clients.heads().contains(&clients.used(core).unwrap()));
                used.push(clients.records(core, clients.per_core).unwrap());
                let last = clients.record(core, clients.per_core - 1).unwrap();
                assert_eq!(last.end, clients.records(core, clients.per_core).unwrap().end);
                assert!(last.len() >= clients.histogram_offset + 2 * (1 + CLIENT_BUCKETS));
                assert!(clients.histogram_offset >= FIXED_WORDS + clients.counters);
                assert_eq!(clients.record(core, clients.per_core), None);
            }
            assert_eq!((clients.used(stats.cores), clients.record(stats.cores, 0)), (None, None));
        }
        used.sort_by_key(|range| range.start);
        assert!(used.iter().all(|range| range.start < range.end && range.end <= words));
        assert!(used.windows(2).all(|pair| pair[0].end <= pair[1].start), "{layout:?}");
    }

    #[test]
    fn a_planned_header_is_read_back() {
        let geometry = small_geometry(3);
        let page = plan(&geometry, [5; 16]).unwrap();
        let layout = Layout::parse(&page, file_len(&page)).unwrap();
        assert_sound(&layout);
        assert_eq!((layout.cluster, layout.node, layout.boot), (geometry.cluster, geometry.node, [5; 16]));
        assert_eq!(layout.stats.cores, 3);
        let slot = |area: &AreaLayout| area.slots.clone().map(|slot| slot.len() * WORD);
        assert_eq!((slot(&layout.desired), slot(&layout.observed)), ([4096; 2], [8192; 2]));
    }

    #[test]
    fn impossible_geometries_are_refused() {
        let refused = |geometry| matches!(plan(&geometry, [0; 16]), Err(MapError::Invalid { .. }));
        assert!(refused(small_geometry(0)));
        assert!(refused(small_geometry(u16::MAX)));
        assert!(refused(Geometry { desired_bytes: 0, ..small_geometry(1) }));
        assert!(refused(Geometry { observed_bytes: u64::MAX, ..small_geometry(1) }));
        assert!(!refused(small_geometry(1)));
    }

    #[test]
    fn levels_next_to_ours_are_spoken() {
        // (found, lowest reader, own level, spoken)
        for (found, lowest_reader, own, spoken) in [
            (1, 1, 1, true),
            (2, 1, 1, true),
            (2, 2, 1, false),
            (3, 2, 1, false),
            (1, 1, 2, true),
            (5, 4, 5, true),
            (4, 4, 5, true),
            (4, 3, 5, true),
            (3, 3, 5, false),
            (3, 2, 5, false),
            (6, 5, 5, true),
            (6, 6, 5, false),
            (0, 0, 1, false),
            (1, 0, 1, false),
            (1, 2, 1, false),
            (u32::MAX, 1, 1, true),
        ] {
            let said = check_level(found, lowest_reader, own);
            assert_eq!(said.is_ok(), spoken, "level {found} (from {lowest_reader}) read by {own}: {said:?}");
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let page = plan(&small_geometry(1), [0; 16]).unwrap();
        let len = file_len(&page);
        assert_eq!(Layout::parse(&[0; PAGE], len), Err(Fault::NotAMap));
        for wrong in [0, len - PAGE as u64, len + PAGE as u64, len + 1, u64::MAX] {
            assert!(matches!(Layout::parse(&page, wrong), Err(Fault::Corrupt(_))), "length {wrong}");
        }
        for at in 8..PAGE {
            let mut flipped = page;
            flipped[at] ^= 1;
            assert!(Layout::parse(&flipped, len).is_err(), "flip in byte {at}");
        }
    }

    #[test]
    fn sections_that_overlap_are_refused() {
        let page = plan(&small_geometry(1), [0; 16]).unwrap();
        let (desired, observed) =
            (std::mem::offset_of!(Header, desired), std::mem::offset_of!(Header, observed));
        let place: [u8; 8] = page[desired..desired + 8].try_into().unwrap();
        let forged = forged(&page, observed, &place);
        assert_eq!(Layout::parse(&forged, file_len(&page)), Err(Fault::corrupt("sections overlap")));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        /// With a checksum that fits, every number in the header is up to the forger.
        #[test]
        fn a_forged_header_is_refused_or_sound(
            edits in prop::collection::vec((8..size_of::<Header>() - 8, any::<u64>(), 0_u32..64), 1..4),
        ) {
            let mut page = plan(&small_geometry(2), [0; 16]).unwrap();
            let len = file_len(&page);
            for (at, value, shift) in edits {
                page = forged(&page, at & !7, &(value >> shift).to_le_bytes());
            }
            if let Ok(layout) = Layout::parse(&page, len) {
                assert_sound(&layout);
            }
        }

        /// Small changes of the numbers that are there get further.
        #[test]
        fn a_nudged_header_is_refused_or_sound(
            edits in prop::collection::vec((8..size_of::<Header>() / 4, -3_i32..=3, 0_u32..14), 1..4),
        ) {
            let mut page = plan(&small_geometry(2), [0; 16]).unwrap();
            let len = file_len(&page);
            for (index, change, shift) in edits {
                let at = 4 * index;
                let was = u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
                page = forged(&page, at, &was.wrapping_add_signed(change << shift).to_le_bytes());
            }
            if let Ok(layout) = Layout::parse(&page, len) {
                assert_sound(&layout);
            }
        }

        #[test]
        fn random_pages_are_refused(seed in prop::collection::vec(any::<u8>(), 1..64), magic: bool) {
            let mut page = [0; PAGE];
            page.iter_mut().zip(seed.iter().cycle()).for_each(|(byte, value)| *byte = *value);
            if magic {
                page[..8].copy_from_slice(&MAGIC);
            }
            prop_assert!(Layout::parse(&page, 1 << 20).is_err());
        }
    }
}
