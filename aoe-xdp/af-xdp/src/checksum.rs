//! CRC32C of whole blocks: the checksum that every read is verified with.
//!
//! Bytes are taken 256 at a time, by carry-less multiplication in four registers of 512 bits, where the processor has it (Gopal
//! et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", 2009): a fourth of the time that the
//! processor's CRC instruction needs. Everywhere else, and for what is left, the `crc32c` crate does it.
//!
//! Invariant: the result is that of `crc32c::crc32c_append`, for all bytes of any length.

/// CRC32C of the bytes.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c_append(0, bytes)
}

/// The CRC32C `crc` continued over the bytes; 0 begins a new one.
#[must_use]
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() >= wide::STEP_BYTES && wide::is_possible() {
        let (steps, rest) = bytes.as_chunks();
        // SAFETY: the processor has what is asked for.
        let crc = unsafe { wide::fold(crc, steps) };
        return if rest.is_empty() { crc } else { crc32c::crc32c_append(crc, rest) };
    }
    crc32c::crc32c_append(crc, bytes)
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::is_x86_feature_detected;
    use std::arch::x86_64::{
        __m512i, _mm_crc32_u64, _mm_cvtsi32_si128, _mm_set_epi64x, _mm512_broadcast_i32x4,
        _mm512_clmulepi64_epi128, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_ternarylogic_epi64,
        _mm512_xor_si512, _mm512_zextsi128_si512,
    };

    /// Bytes of a register.
    const LANE_BYTES: usize = 64;
    const LANE_BITS: u32 = 512;
    const _: () = assert!(LANE_BYTES * 8 == LANE_BITS as usize);
    /// Bytes of four of them: what is taken at a time.
    pub(super) const STEP_BYTES: usize = 4 * LANE_BYTES;
    /// Castagnoli's polynomial without its highest term.
    const POLYNOMIAL: u32 = 0x1edc_6f41;

    /// What moves a 128-bit piece of the message on by `bits`: factors for its first and its second half.
    const fn factors(bits: u32) -> [i64; 2] {
        [factor(bits + 32), factor(bits - 32)]
    }

    /// `x^exponent` modulo the polynomial, mirrored as the message is.
    const fn factor(exponent: u32) -> i64 {
        let mut power = 1u32;
        let mut at = 0;
        while at < exponent {
            power = (power << 1) ^ if power >> 31 == 1 { POLYNOMIAL } else { 0 };
            at += 1;
        }
        (power.reverse_bits() as i64) << 1
    }

    /// Whether the processor has what [`fold`] needs.
    pub(super) fn is_possible() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("vpclmulqdq")
            && is_x86_feature_detected!("sse4.2")
    }

    #[target_feature(enable = "avx512f,vpclmulqdq")]
    fn load(bytes: &[u8; STEP_BYTES], lane: usize) -> __m512i {
        // The bound is checked here, and known to the compiler where the lane is.
        let bytes: &[u8] = &bytes[lane * LANE_BYTES..][..LANE_BYTES];
        // SAFETY: so many bytes are there; the instruction asks for no alignment.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    /// Adds to `onto` what `sum`, moved on to its place, stands for.
    #[target_feature(enable = "avx512f,vpclmulqdq")]
    fn moved(sum: __m512i, factors: __m512i, onto: __m512i) -> __m512i {
        let first = _mm512_clmulepi64_epi128::<0x00>(sum, factors);
        let second = _mm512_clmulepi64_epi128::<0x11>(sum, factors);
        // All three added, in one instruction.
        _mm512_ternarylogic_epi64::<0x96>(first, second, onto)
    }

    #[target_feature(enable = "avx512f,vpclmulqdq")]
    fn broadcast([first, second]: [i64; 2]) -> __m512i {
        _mm512_broadcast_i32x4(_mm_set_epi64x(second, first))
    }

    /// The CRC32C `crc` continued over at least one step.
    #[target_feature(enable = "avx512f,vpclmulqdq,sse4.2")]
    pub(super) fn fold(crc: u32, steps: &[[u8; STEP_BYTES]]) -> u32 {
        const STEP: [i64; 2] = factors(4 * LANE_BITS);
        const LANE: [i64; 2] = factors(LANE_BITS);
        let (head, steps) = steps.split_first().expect("at least one step");
        let mut sums = [load(head, 0), load(head, 1), load(head, 2), load(head, 3)];
        // The message so far is as good as its remainder in front of what follows.
        let so_far = _mm512_zextsi128_si512(_mm_cvtsi32_si128(!crc.cast_signed()));
        sums[0] = _mm512_xor_si512(sums[0], so_far);
        let by = broadcast(STEP);
        for step in steps {
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum = moved(*sum, by, load(step, lane));
            }
        }
        let by = broadcast(LANE);
        let [first, second, third, fourth] = sums;
        let sum = moved(moved(moved(first, by, second), by, third), by, fourth);
        let mut words = [0u64; LANE_BYTES / 8];
        // SAFETY: the array has as many bytes as a register; the instruction asks for no alignment.
        unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), sum) };
        let crc = words.iter().fold(0, |crc, word| _mm_crc32_u64(crc, *word));
        // A remainder has 32 bits.
        !((crc & 0xffff_ffff) as u32)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_sums() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        // RFC 3720, B.4, and as many zeros as take the long way.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0; 4096]), crc32c::crc32c(&[0; 4096]));
        assert_eq!(crc32c(&[]), 0);
    }

    proptest! {
        #[test]
        fn it_is_that_of_the_crate_for_any_bytes_at_any_place(
            bytes in proptest::collection::vec(any::<u8>(), 0..5000),
            from in 0..70usize,
            crc in any::<u32>(),
        ) {
            let bytes = &bytes[from.min(bytes.len())..];
            prop_assert_eq!(crc32c_append(crc, bytes), crc32c::crc32c_append(crc, bytes));
        }

        #[test]
        fn whole_blocks_in_pieces(block in proptest::collection::vec(any::<u8>(), 4096), cut in 0..4096usize) {
            let (head, tail) = block.split_at(cut);
            let whole = crc32c(&block);
            prop_assert_eq!(whole, crc32c::crc32c(&block));
            prop_assert_eq!(crc32c_append(crc32c(head), tail), whole);
        }
    }
}
