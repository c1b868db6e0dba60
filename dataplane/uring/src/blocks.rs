//! The buffers of one disk request: whole chunks that lie side by side on the disk and anywhere in memory.

use af_xdp::region::Chunk;
use smallvec::SmallVec;

/// Most blocks of an AoE request: 16 sectors that begin inside a block touch three. So many are held without allocation.
pub const BLOCKS_MAX: usize = 3;
/// Most blocks of any request: what the kernel takes as one I/O of 4 KiB pages (`BIO_MAX_VECS`).
pub const BLOCKS_LONG_MAX: usize = 256;

/// Up to [`BLOCKS_LONG_MAX`] chunks, in the order of their blocks on disk. Up to [`BLOCKS_MAX`] lie in the value itself, more
/// of them on the heap.
#[derive(Debug, Default)]
pub struct Blocks {
    chunks: SmallVec<[Chunk; BLOCKS_MAX]>,
}

// It is moved with every request.
const _: () = assert!(size_of::<Blocks>() <= 32);

impl Blocks {
    /// No chunk.
    #[must_use]
    pub fn new() -> Blocks {
        Blocks::default()
    }

    /// No chunk, with room for `count` of them: allocates at once where that is more than [`BLOCKS_MAX`], and not again.
    ///
    /// # Panics
    /// If `count` is above [`BLOCKS_LONG_MAX`].
    #[must_use]
    pub fn with_capacity(count: usize) -> Blocks {
        assert!(count <= BLOCKS_LONG_MAX, "no request has {count} blocks");
        Blocks { chunks: SmallVec::with_capacity(count) }
    }

    /// Appends a chunk. The first one beyond [`BLOCKS_MAX`] moves all of them to the heap.
    ///
    /// # Panics
    /// If there are [`BLOCKS_LONG_MAX`] already.
    pub fn push(&mut self, chunk: Chunk) {
        assert!(self.len() < BLOCKS_LONG_MAX, "a request has at most {BLOCKS_LONG_MAX} blocks");
        self.chunks.push(chunk);
    }

    /// Appends another one's chunks in their order.
    ///
    /// # Panics
    /// If there are more than [`BLOCKS_LONG_MAX`] then.
    pub fn append(&mut self, mut tail: Blocks) {
        let len = self.len() + tail.len();
        assert!(len <= BLOCKS_LONG_MAX, "a request has at most {BLOCKS_LONG_MAX} blocks");
        self.chunks.append(&mut tail.chunks);
    }

    /// Takes the last chunk.
    pub fn pop(&mut self) -> Option<Chunk> {
        self.chunks.pop()
    }

    /// Takes the first chunk; the others move up. To take all of them in order iterate over the value instead.
    pub fn remove_first(&mut self) -> Option<Chunk> {
        if self.is_empty() { None } else { Some(self.chunks.remove(0)) }
    }

    /// Cuts the list: keeps its first `at` chunks, and gives the others in their order.
    ///
    /// # Panics
    /// If there are fewer than `at`.
    #[must_use = "the chunks behind the cut"]
    pub fn split_off(&mut self, at: usize) -> Blocks {
        Blocks { chunks: self.chunks.drain(at..).collect() }
    }

    /// Whether the chunks are on the heap: such a list is worth keeping for the next long request.
    #[must_use]
    pub fn is_on_heap(&self) -> bool {
        self.chunks.spilled()
    }

    /// How many chunks there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Bytes of all of them.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len() * crate::BLOCK_BYTES
    }

    /// The chunks in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Chunk> {
        self.chunks.iter()
    }

    /// The chunk of the block at `index`.
    ///
    /// # Panics
    /// If there is none.
    pub fn get(&self, index: usize) -> &Chunk {
        &self.chunks[index]
    }

    /// The chunk of the block at `index`.
    ///
    /// # Panics
    /// If there is none.
    pub fn get_mut(&mut self, index: usize) -> &mut Chunk {
        &mut self.chunks[index]
    }

    /// Swaps the chunk of the block at `index` for another one.
    ///
    /// # Panics
    /// If there is none.
    pub fn replace(&mut self, index: usize, chunk: Chunk) -> Chunk {
        std::mem::replace(&mut self.chunks[index], chunk)
    }
}

impl FromIterator<Chunk> for Blocks {
    fn from_iter<I: IntoIterator<Item = Chunk>>(chunks: I) -> Blocks {
        let mut blocks = Blocks::new();
        for chunk in chunks {
            blocks.push(chunk);
        }
        blocks
    }
}

/// The chunks of [`Blocks`], each given away in order. Those that are not taken are leaked, as any dropped chunk.
#[derive(Debug)]
pub struct IntoIter(smallvec::IntoIter<[Chunk; BLOCKS_MAX]>);

impl Iterator for IntoIter {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        self.0.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl DoubleEndedIterator for IntoIter {
    fn next_back(&mut self) -> Option<Chunk> {
        self.0.next_back()
    }
}

impl ExactSizeIterator for IntoIter {}

impl IntoIterator for Blocks {
    type Item = Chunk;
    type IntoIter = IntoIter;

    fn into_iter(self) -> IntoIter {
        IntoIter(self.chunks.into_iter())
    }
}

impl<'b> IntoIterator for &'b Blocks {
    type Item = &'b Chunk;
    type IntoIter = std::slice::Iter<'b, Chunk>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
