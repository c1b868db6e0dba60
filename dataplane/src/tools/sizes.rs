//! Sizes as people write them.

const UNITS: [(&str, u64); 5] =
    [("", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// Reads a number of bytes: `1048576`, `16MiB`, `10 GiB`.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let refuse = || format!("'{text}' is not understood: write for example 16MiB or 10GiB");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit.trim())).ok_or_else(refuse)?.1;
    let number: u64 = number.parse().map_err(|_| refuse())?;
    number.checked_mul(factor).ok_or_else(|| format!("'{text}' is too large"))
}

/// Writes a number of bytes in the largest unit below it.
pub(super) fn human(bytes: u64) -> String {
    let (name, factor) = UNITS.iter().rev().find(|(_, factor)| bytes >= *factor).unwrap_or(&UNITS[0]);
    let name = if name.is_empty() { "B" } else { name };
    if bytes.is_multiple_of(*factor) {
        format!("{} {name}", bytes / factor)
    } else {
        format!("{:.1} {name}", bytes as f64 / *factor as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [("4096", 4096), ("4KiB", 4096), ("10 gib", 10 << 30), ("1TiB", 1 << 40)] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "x", "1.5GiB", "5 parsecs", "99999999999TiB", "-1"] {
            assert!(parse(text).is_err(), "{text}");
        }
        for (bytes, text) in [(0, "0 B"), (512, "512 B"), (4096, "4 KiB"), (3 << 29, "1.5 GiB")] {
            assert_eq!(human(bytes), text);
        }
    }
}
