//! Frames as lists of chunk slices: no bytes are held here, only handles to them.
//!
//! Everything is inline, so that moving a frame never allocates. A dropped frame leaks its chunks: take
//! it apart and release them.

use crate::region::{CHUNK_BYTES, Chunk, HEADER_BYTES, Header, Pool, Region};

/// Slices that one frame may have beside its header slot: 16 sectors need three when received.
pub const MAX_SEGMENTS: usize = 4;

/// Bytes `[offset, offset + len)` of a chunk.
#[derive(Debug, PartialEq, Eq)]
pub struct Segment {
    /// The chunk, of which this holds one handle.
    pub chunk: Chunk,
    /// First byte in the chunk.
    pub offset: u16,
    /// Bytes.
    pub len: u16,
}

impl Segment {
    /// The slice's bytes.
    ///
    /// # Panics
    ///
    /// Where the slice leaves its chunk.
    pub fn bytes<'a>(&'a self, region: &'a Region) -> &'a [u8] {
        let start = usize::from(self.offset);
        &region.bytes(&self.chunk)[start..start + usize::from(self.len)]
    }

    /// Whether the slice lies inside its chunk.
    pub fn is_inside(&self) -> bool {
        usize::from(self.offset) + usize::from(self.len) <= CHUNK_BYTES
    }
}

/// Up to [`MAX_SEGMENTS`] slices, inline and in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Segments {
    slots: [Option<Segment>; MAX_SEGMENTS],
    count: u8,
}

impl Segments {
    /// No slices.
    pub const fn new() -> Self {
        Self { slots: [const { None }; MAX_SEGMENTS], count: 0 }
    }

    /// Adds a slice at the end.
    ///
    /// # Errors
    ///
    /// The slice itself, where there are [`MAX_SEGMENTS`] already.
    pub fn push(&mut self, segment: Segment) -> Result<(), Segment> {
        match self.slots.get_mut(usize::from(self.count)) {
            Some(slot) => {
                *slot = Some(segment);
                self.count += 1;
                Ok(())
            }
            None => Err(segment),
        }
    }

    /// The slices in order.
    pub fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.slots.iter().flatten()
    }

    /// How many slices there are.
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of all slices together.
    pub fn len_bytes(&self) -> usize {
        self.iter().map(|segment| usize::from(segment.len)).sum()
    }

    /// The first slice.
    pub fn first(&self) -> Option<&Segment> {
        self.slots[0].as_ref()
    }
}

impl IntoIterator for Segments {
    type Item = Segment;
    type IntoIter = std::iter::Flatten<std::array::IntoIter<Option<Segment>, MAX_SEGMENTS>>;

    fn into_iter(self) -> Self::IntoIter {
        self.slots.into_iter().flatten()
    }
}

/// A received Ethernet frame: its first slice holds at least the first 36 bytes, or all of it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped frame leaks its chunks: release them"]
pub struct RxFrame {
    segments: Segments,
}

impl RxFrame {
    /// A frame of slices that the kernel filled, or a test.
    pub fn new(segments: Segments) -> Self {
        Self { segments }
    }

    /// The slices in order.
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// The frame's length, bytes.
    #[expect(clippy::len_without_is_empty, reason = "a received frame is never empty")]
    pub fn len(&self) -> usize {
        self.segments.len_bytes()
    }

    /// The bytes of the first slice: Ethernet, AoE and ATA headers, and payload as far as it goes.
    pub fn head<'a>(&'a self, region: &'a Region) -> &'a [u8] {
        self.segments.first().map_or(&[], |first| first.bytes(region))
    }

    /// The slices, to keep or to release one by one.
    pub fn into_segments(self) -> Segments {
        self.segments
    }

    /// Releases all chunks to the pool that owns them.
    ///
    /// # Panics
    ///
    /// For chunks of another core's range.
    pub fn release(self, pool: &mut Pool) {
        for segment in self.segments {
            pool.release(segment.chunk);
        }
    }
}

/// A frame to send: the first `header_len` bytes of the header slot, then the slices.
#[derive(Debug, PartialEq, Eq)]
pub struct TxFrame {
    /// The header slot, of the sending core's range.
    pub header: Header,
    /// Bytes of the header slot that are sent, 1 to 64.
    pub header_len: u8,
    /// What follows the header, of any core's range.
    pub data: Segments,
}

impl TxFrame {
    /// The frame's length, bytes.
    #[expect(clippy::len_without_is_empty, reason = "a frame always has a header")]
    pub fn len(&self) -> usize {
        usize::from(self.header_len) + self.data.len_bytes()
    }

    /// Whether the header length and every slice are possible.
    pub fn is_well_formed(&self) -> bool {
        (1..=HEADER_BYTES).contains(&usize::from(self.header_len))
            && self.data.iter().all(|segment| segment.len > 0 && segment.is_inside())
    }
}
