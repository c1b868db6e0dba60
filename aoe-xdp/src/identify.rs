//! The 512 bytes of IDENTIFY DEVICE.
//!
//! Linux's `aoe` driver reads only the LBA48 bits (words 83 and 86), the size (words 100–103, or 60–61 without LBA48),
//! and the three strings; other initiators read the size at its byte offset. Every other word is what a disk without a
//! volatile write cache says of itself.

use crate::wire::SECTOR_LEN;

/// Bytes of the answer.
pub const IDENTIFY_LEN: usize = SECTOR_LEN;

/// Largest size that 28-bit commands can address.
const SECTORS_MAX_28: u64 = 0x0fff_ffff;

/// What an initiator is told about an export.
#[derive(Debug, Clone, Copy)]
pub struct Identity<'a> {
    /// Size in sectors, below 2^48.
    pub size_sectors: u64,
    /// At most 20 ASCII characters.
    pub serial: &'a str,
    /// At most 8 ASCII characters.
    pub firmware: &'a str,
    /// At most 40 ASCII characters.
    pub model: &'a str,
}

impl Identity<'_> {
    /// Writes the whole answer over `out`.
    pub fn write(&self, out: &mut [u8; IDENTIFY_LEN]) {
        out.fill(0);
        let size_28 = self.size_sectors.min(SECTORS_MAX_28);
        let cylinders = (self.size_sectors / (16 * 63)).min(16383);
        let sectors_chs = cylinders * 16 * 63;
        for (word, value) in [
            (0, 0x0040),
            (1, cylinders),
            (3, 16),
            (6, 63),
            (47, 0x8000),
            (49, 0x0200), // LBA
            (50, 0x4000),
            (53, 0x0002),
            (54, cylinders),
            (55, 16),
            (56, 63),
            (57, sectors_chs & 0xffff),
            (58, sectors_chs >> 16),
            (60, size_28 & 0xffff),
            (61, size_28 >> 16),
            (80, 0x00f0),
            (83, 0x7400), // LBA48, FLUSH CACHE, FLUSH CACHE EXT
            (84, 0x4000),
            (86, 0x3400),
            (87, 0x4000),
            (93, 0x400b),
            (100, self.size_sectors & 0xffff),
            (101, (self.size_sectors >> 16) & 0xffff),
            (102, (self.size_sectors >> 32) & 0xffff),
            (106, 0x6003), // 8 logical sectors per physical one: stores work in 4 KiB blocks
            (217, 1),      // not rotating
        ] {
            put_word(out, word, value);
        }
        put_text(&mut out[20..40], self.serial);
        put_text(&mut out[46..54], self.firmware);
        put_text(&mut out[54..94], self.model);
        // The integrity word: a signature, then what makes the sum of all bytes zero.
        out[510] = 0xa5;
        out[511] = out[..511].iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg();
    }
}

fn put_word(out: &mut [u8; IDENTIFY_LEN], word: usize, value: u64) {
    let [low, high, ..] = value.to_le_bytes();
    out[word * 2] = low;
    out[word * 2 + 1] = high;
}

/// ATA strings are padded with blanks, and the bytes of each word are swapped.
fn put_text(field: &mut [u8], text: &str) {
    field.fill(b' ');
    for (i, byte) in text.bytes().filter(u8::is_ascii).take(field.len()).enumerate() {
        field[i ^ 1] = byte;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identify(size_sectors: u64) -> [u8; IDENTIFY_LEN] {
        let mut out = [0xaa; IDENTIFY_LEN];
        Identity { size_sectors, serial: "0123456789abcdef", firmware: "0.1.0", model: "Torus volume" }
            .write(&mut out);
        out
    }

    fn word(data: &[u8; IDENTIFY_LEN], n: usize) -> u16 {
        u16::from_le_bytes([data[2 * n], data[2 * n + 1]])
    }

    #[test]
    fn linux_sees_lba48_and_the_size() {
        let size = 0x0000_1234_5678_9abc_u64 & 0xffff_ffff_ffff;
        let data = identify(size);
        assert_ne!(word(&data, 83) & (1 << 10), 0);
        assert_ne!(word(&data, 86) & (1 << 10), 0);
        assert_eq!(u64::from_le_bytes(data[200..208].try_into().unwrap()), size);
        assert_eq!(u32::from_le_bytes(data[120..124].try_into().unwrap()), 0x0fff_ffff);
        assert_eq!(word(&data, 103), 0);
    }

    #[test]
    fn small_sizes_are_exact_in_both_places() {
        let data = identify(2048);
        assert_eq!(u32::from_le_bytes(data[120..124].try_into().unwrap()), 2048);
        assert_eq!(u64::from_le_bytes(data[200..208].try_into().unwrap()), 2048);
    }

    #[test]
    fn the_geometry_is_told_twice_and_the_sum_of_all_bytes_is_zero() {
        for size in [1, 2048, 16383 * 16 * 63, 1 << 40] {
            let data = identify(size);
            let cylinders = (size / 1008).min(16383);
            assert_eq!([word(&data, 1), word(&data, 54)], [u16::try_from(cylinders).unwrap(); 2]);
            assert_eq!(u64::from(word(&data, 57)) | u64::from(word(&data, 58)) << 16, cylinders * 1008);
            assert_eq!(data.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)), 0);
        }
    }

    #[test]
    fn strings_are_swapped_and_padded() {
        let data = identify(1);
        assert_eq!(&data[20..40], b"1032547698badcfe    ");
        assert_eq!(&data[46..54], b".0.1 0  ");
        assert_eq!(&data[54..60], b"oTur s");
        assert!(data[66..94].iter().all(|&b| b == b' '));
    }
}
