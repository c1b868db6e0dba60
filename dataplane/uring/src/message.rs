//! What is sent on a socket at once: bytes of its own, and whole chunks of frame memory that are not copied.

use af_xdp::region::{Chunk, Region};

use crate::{BLOCK_BYTES, NO_VECTOR};

/// Most pieces of a message: as many vectors the kernel takes at once (`UIO_MAXIOV`).
pub const MESSAGE_PIECES_MAX: usize = 1024;

/// A piece, in the order of sending.
#[derive(Debug)]
enum Piece {
    /// So many of the message's own bytes, behind those of earlier pieces.
    Bytes(usize),
    Chunk(Chunk),
}

/// Bytes and chunks to be sent one behind the other. Its memory is kept when it is emptied, so that one that is used again and
/// again allocates no more.
pub struct Message {
    pieces: Vec<Piece>,
    bytes: Vec<u8>,
    len_bytes: usize,
    vectors: Vec<libc::iovec>,
    header: Box<libc::msghdr>,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Message").field("pieces", &self.pieces).field("len_bytes", &self.len_bytes).finish()
    }
}

impl Default for Message {
    fn default() -> Message {
        Message {
            pieces: Vec::new(),
            bytes: Vec::new(),
            len_bytes: 0,
            vectors: Vec::new(),
            header: Box::new(libc::msghdr {
                msg_name: std::ptr::null_mut(),
                msg_namelen: 0,
                msg_iov: std::ptr::null_mut(),
                msg_iovlen: 0,
                msg_control: std::ptr::null_mut(),
                msg_controllen: 0,
                msg_flags: 0,
            }),
        }
    }
}

impl Message {
    /// Pieces that there is still room for.
    #[must_use]
    pub fn room(&self) -> usize {
        MESSAGE_PIECES_MAX - self.pieces.len()
    }

    /// Appends a copy of the bytes: one piece, or a part of the one before it.
    ///
    /// # Panics
    /// If there is no room.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.bytes.extend_from_slice(bytes);
        self.len_bytes += bytes.len();
        if let Some(Piece::Bytes(len)) = self.pieces.last_mut() {
            *len += bytes.len();
        } else {
            assert!(self.room() > 0, "a message has at most {MESSAGE_PIECES_MAX} pieces");
            self.pieces.push(Piece::Bytes(bytes.len()));
        }
    }

    /// Appends a whole chunk: one piece.
    ///
    /// # Panics
    /// If there is no room.
    pub fn push_chunk(&mut self, chunk: Chunk) {
        assert!(self.room() > 0, "a message has at most {MESSAGE_PIECES_MAX} pieces");
        self.len_bytes += BLOCK_BYTES;
        self.pieces.push(Piece::Chunk(chunk));
    }

    /// Bytes that it sends.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Whether it sends none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Empties it, and gives its chunks away. Those that are not taken are leaked, as any dropped chunk.
    pub fn take_chunks(&mut self) -> impl Iterator<Item = Chunk> {
        self.bytes.clear();
        self.len_bytes = 0;
        self.pieces.drain(..).filter_map(|piece| match piece {
            Piece::Bytes(_) => None,
            Piece::Chunk(chunk) => Some(chunk),
        })
    }

    /// Lets the header name all pieces, and gives it. It names memory of this value that stays where it is while the value is
    /// only moved, and chunks of `region`.
    pub(crate) fn header(&mut self, region: &Region) -> *const libc::msghdr {
        self.vectors.clear();
        let mut bytes = &self.bytes[..];
        for piece in &self.pieces {
            let vector = match piece {
                Piece::Bytes(len) => {
                    let (own, rest) = bytes.split_at(*len);
                    bytes = rest;
                    // Only read: it is sent.
                    libc::iovec { iov_base: own.as_ptr().cast_mut().cast(), iov_len: *len }
                }
                Piece::Chunk(chunk) => libc::iovec {
                    iov_base: region.chunk_pointer(chunk).as_ptr().cast(),
                    iov_len: BLOCK_BYTES,
                },
            };
            self.vectors.push(vector);
        }
        debug_assert!(self.vectors.iter().all(|vector| vector.iov_base != NO_VECTOR.iov_base));
        self.header.msg_iov = self.vectors.as_mut_ptr();
        self.header.msg_iovlen = self.vectors.len();
        &raw const *self.header
    }
}
