//! The numbers that everything here is about. Each is a type of its own.

use std::fmt;

use cluster_map::{NodeId, StoreId};

/// Blocks of an extent.
pub const EXTENT_BLOCKS: u32 = 1024;

/// Under which head a request was made. Compared in the order of the fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation {
    /// Grown in the volume's record at every take-over.
    pub takeover: u64,
    /// Grown durably in the head's own store at every start of its data plane. With it (volume, generation, version) never names
    /// two writes though the record did not change.
    pub start: u64,
}

impl fmt::Display for Generation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}", self.takeover, self.start)
    }
}

/// A write's number. Grows within a volume, and goes on growing from one generation to the next among all in-sync members; a
/// stale one may have other writes of the same numbers, above its mark.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

impl Version {
    /// The number after this one.
    #[must_use]
    pub fn next(self) -> Version {
        Version(self.0 + 1)
    }

    /// The number before this one.
    #[must_use]
    pub fn before(self) -> Version {
        Version(self.0.saturating_sub(1))
    }
}

/// Which state of a partition's owners a request was made under (I11).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// A replica: a store, not a node, in one of its incarnations (I13). A store that was formatted, or lost what it cannot name, is
/// another member.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Which store.
    pub store: StoreId,
    /// Its incarnation.
    pub incarnation: u64,
}

/// A core of a node: heads and replicas of a volume are on one core of each node, and cores of different nodes talk to each other
/// directly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// Which node.
    pub node: NodeId,
    /// Which of its cores, from 0.
    pub core: u16,
}

impl fmt::Display for Site {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.node, self.core)
    }
}

/// Number of an extent in its volume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent(pub u32);

impl Extent {
    /// The extent of a volume's block.
    ///
    /// # Panics
    /// If the block lies behind 16 EiB.
    #[must_use]
    pub fn of_block(block: u64) -> Extent {
        Extent(u32::try_from(block / u64::from(EXTENT_BLOCKS)).expect("a volume ends before that"))
    }

    /// Its first block in the volume.
    #[must_use]
    pub fn first_block(self) -> u64 {
        u64::from(self.0) * u64::from(EXTENT_BLOCKS)
    }
}

/// Blocks of one extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Which.
    pub extent: Extent,
    /// The first block in it.
    pub first: u16,
    /// How many.
    pub count: u16,
}

impl Span {
    #[expect(clippy::cast_possible_truncation, reason = "asserted below")]
    const WHOLE: u16 = EXTENT_BLOCKS as u16;

    /// All blocks of an extent.
    #[must_use]
    pub fn whole(extent: Extent) -> Span {
        Span { extent, first: 0, count: Span::WHOLE }
    }

    /// Its blocks in the volume.
    #[must_use]
    pub fn blocks(self) -> std::ops::Range<u64> {
        let first = self.extent.first_block() + u64::from(self.first);
        first..first + u64::from(self.count)
    }
}

const _: () = assert!(EXTENT_BLOCKS <= u16::MAX as u32);
