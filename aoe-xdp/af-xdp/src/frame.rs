//! Frames as lists of chunk slices: no bytes are held here, only handles to them.
//!
//! Everything is inline, so that moving a frame never allocates. A dropped frame leaks its chunks: take
//! it apart and release them.

use crate::frame_filter::{TAG_BYTES, TAG_PROTOCOL, VLAN_ID_MASK};
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
    vlan_id: u16,
    interface: u8,
}

/// Where a tag stands in a frame: after the two addresses.
const TAG_AT: usize = 12;
const TAG_LEN: usize = TAG_BYTES as usize;

impl RxFrame {
    /// A frame of slices that the kernel filled, or a test.
    pub fn new(segments: Segments) -> Self {
        Self { segments, vlan_id: 0, interface: 0 }
    }

    /// The same frame, whose tag of that VLAN the kernel has taken out.
    pub(crate) fn with_vlan_id(self, vlan_id: u16) -> Self {
        Self { vlan_id, ..self }
    }

    /// The VLAN of the tag that was taken out; 0 where there was none, or one of no VLAN.
    pub fn vlan_id(&self) -> u16 {
        self.vlan_id
    }

    /// Which of the opener's interfaces the frame came by; 0 until it is set.
    pub fn interface(&self) -> u8 {
        self.interface
    }

    /// Notes by which interface the frame came.
    pub fn set_interface(&mut self, interface: u8) {
        self.interface = interface;
    }

    /// Takes an 802.1Q tag out of the frame, where there is one: the addresses move four bytes towards it.
    ///
    /// # Safety
    ///
    /// The first slice's chunk must have no other handle, and the kernel must be done with it.
    pub(crate) unsafe fn take_tag_out(&mut self, region: &Region) {
        let Some(first) = self.segments.slots[0].as_mut() else { return };
        let start = usize::from(first.offset);
        // SAFETY: the caller's word.
        let whole = unsafe { region.sole_bytes_mut(&mut first.chunk) };
        let bytes = &mut whole[start..start + usize::from(first.len)];
        let Some(&[protocol_high, protocol_low, control_high, control_low]) =
            bytes.get(TAG_AT..TAG_AT + TAG_LEN)
        else {
            return;
        };
        if u16::from_be_bytes([protocol_high, protocol_low]) != TAG_PROTOCOL {
            return;
        }
        bytes.copy_within(..TAG_AT, TAG_LEN);
        first.offset += u16::from(TAG_BYTES);
        first.len -= u16::from(TAG_BYTES);
        self.vlan_id = u16::from_be_bytes([control_high, control_low]) & VLAN_ID_MASK;
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
    /// Puts an 802.1Q tag of priority 0 into the header.
    ///
    /// # Errors
    ///
    /// The frame as it was, where its header is shorter than two addresses or fills its slot.
    pub fn put_tag_in(mut self, vlan_id: u16, pool: &mut Pool) -> Result<Self, Self> {
        let len = usize::from(self.header_len);
        if !(TAG_AT..=HEADER_BYTES - TAG_LEN).contains(&len) {
            return Err(self);
        }
        let bytes = pool.header_bytes_mut(&mut self.header);
        bytes.copy_within(TAG_AT..len, TAG_AT + TAG_LEN);
        bytes[TAG_AT..TAG_AT + 2].copy_from_slice(&TAG_PROTOCOL.to_be_bytes());
        bytes[TAG_AT + 2..TAG_AT + TAG_LEN].copy_from_slice(&(vlan_id & VLAN_ID_MASK).to_be_bytes());
        self.header_len += TAG_BYTES;
        Ok(self)
    }

    /// Takes out again what [`TxFrame::put_tag_in`] put in.
    #[must_use]
    pub fn without_tag(mut self, pool: &mut Pool) -> Self {
        let len = usize::from(self.header_len);
        pool.header_bytes_mut(&mut self.header).copy_within(TAG_AT + TAG_LEN..len, TAG_AT);
        self.header_len -= TAG_BYTES;
        self
    }

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
