//! The buffers of one disk request: a few whole chunks that lie side by side on the disk and anywhere in memory.

use af_xdp::region::Chunk;

/// Most blocks of one request: 16 sectors that begin inside a block touch three.
pub const BLOCKS_MAX: usize = 3;

/// Up to [`BLOCKS_MAX`] chunks, in the order of their blocks on disk.
#[derive(Debug, Default)]
pub struct Blocks {
    chunks: [Option<Chunk>; BLOCKS_MAX],
    count: u8,
}

impl Blocks {
    /// No chunk.
    #[must_use]
    pub fn new() -> Blocks {
        Blocks::default()
    }

    /// Appends a chunk.
    ///
    /// # Panics
    /// If there are [`BLOCKS_MAX`] already.
    pub fn push(&mut self, chunk: Chunk) {
        self.chunks[usize::from(self.count)] = Some(chunk);
        self.count += 1;
    }

    /// Appends another one's chunks in their order.
    ///
    /// # Panics
    /// If there are more than [`BLOCKS_MAX`] then.
    pub fn append(&mut self, tail: Blocks) {
        for chunk in tail.chunks.into_iter().flatten() {
            self.push(chunk);
        }
    }

    /// Takes the last chunk.
    pub fn pop(&mut self) -> Option<Chunk> {
        self.count = self.count.checked_sub(1)?;
        self.chunks[usize::from(self.count)].take()
    }

    /// How many chunks there are.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of all of them.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len() * crate::BLOCK_BYTES
    }

    /// The chunks in order.
    pub fn iter(&self) -> impl Iterator<Item = &Chunk> {
        self.chunks.iter().flatten()
    }

    /// The chunk of the block at `index`.
    ///
    /// # Panics
    /// If there is none.
    pub fn get_mut(&mut self, index: usize) -> &mut Chunk {
        self.chunks[index].as_mut().expect("a block of this request")
    }

    /// Swaps the chunk of the block at `index` for another one.
    ///
    /// # Panics
    /// If there is none.
    pub fn replace(&mut self, index: usize, chunk: Chunk) -> Chunk {
        self.chunks[index].replace(chunk).expect("a block of this request")
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
