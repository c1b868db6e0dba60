//! Sizes and durations as people write them.

const SIZE_UNITS: [(&str, u64); 13] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
];
const DURATION_UNITS: [(&str, u64); 5] =
    [("", 1_000_000_000), ("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000), ("m", 60_000_000_000)];

fn parse(text: &str, units: &[(&str, u64)], example: &str) -> Result<u64, String> {
    let refuse = || format!("'{text}' is not understood: write for example {example}");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let factor = units.iter().find(|(name, _)| *name == unit).ok_or_else(refuse)?.1;
    let number: u64 = number.parse().map_err(|_| refuse())?;
    number.checked_mul(factor).ok_or_else(|| format!("'{text}' is too large"))
}

/// Reads a number of bytes: `4096`, `4KiB`, `4k` (binary), `1GB` (decimal).
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    parse(text, &SIZE_UNITS, "4096, 4KiB or 1GiB")
}

/// Reads a duration in nanoseconds: `10`, `10s`, `500ms`, `3m`.
pub(crate) fn duration_ns(text: &str) -> Result<u64, String> {
    parse(text, &DURATION_UNITS, "10s, 500ms or 3m")
}

/// Writes a number of bytes in the largest binary unit below it.
pub(crate) fn human_bytes(bytes: u64) -> String {
    let mut unit = 0;
    let mut whole = bytes;
    while whole >= 1024 && unit < 4 {
        whole >>= 10;
        unit += 1;
    }
    let name = ["B", "KiB", "MiB", "GiB", "TiB"][unit];
    let scale = 1u64 << (10 * unit);
    if bytes.is_multiple_of(scale) {
        format!("{whole} {name}")
    } else {
        format!("{:.1} {name}", bytes as f64 / scale as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_are_read() {
        for (text, value) in
            [("512", 512), ("4KiB", 4096), ("4k", 4096), ("1GB", 1_000_000_000), ("2 MiB", 2 << 20)]
        {
            assert_eq!(bytes(text), Ok(value), "{text}");
        }
        for (text, value) in [("180s", 180_000_000_000), ("10", 10_000_000_000), ("250ms", 250_000_000)] {
            assert_eq!(duration_ns(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "x", "-1", "4 Kib b", "1.5GiB", "18446744073709551615k", "99999999999999999999"] {
            assert!(bytes(text).is_err(), "{text}");
        }
        for text in ["", "s", "1h", "-5s"] {
            assert!(duration_ns(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_written_in_the_largest_unit() {
        assert_eq!(human_bytes(512), "512 B");
        assert_eq!(human_bytes(4096), "4 KiB");
        assert_eq!(human_bytes(3 << 29), "1.5 GiB");
    }
}
