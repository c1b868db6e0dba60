//! The hash behind partitions and circles, and a repeatable sequence of numbers.
//!
//! Both are SplitMix64: its finalizer lets every bit of the input change half of the output's. Where data are found depends on
//! it, so it is written out here and pinned by a test, rather than taken from a library that could change it.

/// The odd number nearest to 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// The hash of these words in this order.
pub(super) fn of<const N: usize>(words: [u64; N]) -> u64 {
    words.into_iter().fold(0, |hash, word| mix((hash ^ word).wrapping_add(GOLDEN)))
}

/// An id as two words.
pub(super) fn halves(id: &[u8; 16]) -> [u64; 2] {
    let word = |from: usize| id[from..from + 8].iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
    [word(0), word(8)]
}

/// The top `bits` bits, at most 32.
#[expect(clippy::cast_possible_truncation, reason = "at most 32 bits are left")]
pub(super) fn top_bits(hash: u64, bits: u8) -> u32 {
    hash.checked_shr(64 - u32::from(bits.min(32))).unwrap_or(0) as u32
}

/// The same numbers every time.
pub(super) struct Sequence(u64);

impl Sequence {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `limit`; 0 if that is 0.
    #[expect(clippy::cast_possible_truncation, reason = "below the limit, which is a usize")]
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(GOLDEN);
        ((u128::from(mix(self.0)) * limit as u128) >> 64) as usize
    }
}
