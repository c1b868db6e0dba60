//! Sectors as initiators and checkers see them, by one number each, and as bytes: every byte of a sector follows from its number.

use torus_dataplane::store::BLOCK_BYTES;

use crate::checker::history::UNWRITTEN;

/// Sectors of a block.
pub(super) const SECTORS: usize = 8;
/// Bytes of a sector.
pub(super) const SECTOR_BYTES: usize = BLOCK_BYTES / SECTORS;

/// A block, by the value of each sector.
pub(super) type Block = [u64; SECTORS];

/// A block that was never written.
pub(super) const ZEROS: Block = [UNWRITTEN; SECTORS];

/// The word of a sector at that place.
fn word(value: u64, at: u32) -> u64 {
    value.rotate_left(at) ^ u64::from(at).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Appends the bytes of sectors.
pub(super) fn append(values: &[u64], bytes: &mut Vec<u8>) {
    for value in values {
        for at in 0..64 {
            let word = if *value == UNWRITTEN { 0 } else { word(*value, at) };
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
}

/// The value of a sector; `None` for bytes that no value has.
pub(super) fn value_of(bytes: &[u8]) -> Option<u64> {
    let (words, rest) = bytes.as_chunks::<8>();
    let value = u64::from_le_bytes(*words.first()?);
    let is_right = |(at, found): (u32, &[u8; 8])| {
        let wanted = if value == UNWRITTEN { 0 } else { word(value, at) };
        u64::from_le_bytes(*found) == wanted
    };
    (rest.is_empty() && words.len() == 64 && (0..).zip(words).all(is_right)).then_some(value)
}

/// The values of sectors.
pub(super) fn values_of(bytes: &[u8]) -> Option<Vec<u64>> {
    bytes.chunks(SECTOR_BYTES).map(value_of).collect()
}

/// The values of a block.
pub(super) fn block_of(bytes: &[u8; BLOCK_BYTES]) -> Option<Block> {
    let mut block = ZEROS;
    for (value, bytes) in block.iter_mut().zip(bytes.chunks(SECTOR_BYTES)) {
        *value = value_of(bytes)?;
    }
    Some(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_is_noticed() {
        for value in [UNWRITTEN, 1, 0x1234_5678_9abc_def0] {
            let mut bytes = Vec::new();
            append(&[value], &mut bytes);
            assert_eq!(value_of(&bytes), Some(value));
            for at in 0..SECTOR_BYTES {
                bytes[at] ^= 4;
                assert_eq!(value_of(&bytes), None, "byte {at} of {value:#x}");
                bytes[at] ^= 4;
            }
        }
    }
}
