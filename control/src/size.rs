//! Sizes as people write and read them: `512MiB`, `1.5 GiB`.
//!
//! `K`, `M`, `G`, `T`, `P` and `KiB` … `PiB` are powers of 1024 (as storage administrators mean them), `kB`/`KB` … `PB` powers
//! of 1000. All arithmetic is on integers: what is parsed is exact, or refused.

use thiserror::Error;

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SizeError {
    /// No digits, or characters that do not belong to a number.
    #[error("\"{0}\" is not a size; write for example 512MiB, 10GiB or 1.5TiB")]
    NotANumber(String),
    /// The unit is unknown.
    #[error("unknown unit \"{0}\"; use B, KiB, MiB, GiB, TiB or PiB")]
    UnknownUnit(String),
    /// More than 2^63 - 1 bytes.
    #[error("{0} is too large; the limit is 8 EiB")]
    TooLarge(String),
    /// The fraction does not name a whole number of bytes.
    #[error("{0} is not a whole number of bytes")]
    Fraction(String),
}

/// The multiplier of a unit, case-insensitively; `None` if unknown.
fn unit_bytes(unit: &str) -> Option<u64> {
    const BINARY: [&str; 6] = ["", "k", "m", "g", "t", "p"];
    let unit = unit.to_ascii_lowercase();
    if unit == "b" {
        return Some(1);
    }
    (0u32..).zip(BINARY).find_map(|(power, letter)| {
        if unit == letter || (power > 0 && unit == format!("{letter}ib")) {
            Some(1 << (10 * power))
        } else if power > 0 && unit == format!("{letter}b") {
            Some(1000u64.pow(power))
        } else {
            None
        }
    })
}

/// Parses a size such as `4096`, `512MiB`, `1.5 GiB` or `10G` into bytes.
///
/// # Errors
/// [`SizeError`] for anything that is not exactly a whole number of bytes below 8 EiB.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let not_a_number = || SizeError::NotANumber(text.to_owned());
    let unit = unit_bytes(unit.trim()).ok_or_else(|| {
        if number.is_empty() { not_a_number() } else { SizeError::UnknownUnit(unit.trim().to_owned()) }
    })?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
        return Err(not_a_number());
    }
    let too_large = || SizeError::TooLarge(text.to_owned());
    // 18 digits and a unit of at most 2^50 stay below 2^110.
    if whole.len() > 18 || fraction.len() > 18 {
        return Err(too_large());
    }
    let digits = |part: &str| part.parse::<u128>().map_err(|_| not_a_number());
    let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| too_large())?);
    let scaled = (digits(whole)? * scale + digits(fraction)?) * u128::from(unit);
    if scaled % scale != 0 {
        return Err(SizeError::Fraction(text.to_owned()));
    }
    u64::try_from(scaled / scale).ok().filter(|bytes| *bytes <= i64::MAX.unsigned_abs()).ok_or_else(too_large)
}

/// Renders a size with at most one decimal: `1.5 GiB`, `512 MiB`, `0 B`. Rounds down, so that free space is never overstated.
#[must_use]
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut power = 0;
    while power + 1 < UNITS.len() && bytes >> (10 * (power + 1)) > 0 {
        power += 1;
    }
    let whole = bytes >> (10 * power);
    let rest = bytes - (whole << (10 * power));
    let tenths = (u128::from(rest) * 10) >> (10 * power);
    if tenths == 0 || power == 0 {
        format!("{whole} {}", UNITS[power])
    } else {
        format!("{whole}.{tenths} {}", UNITS[power])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_parse_exactly() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1B", 1),
            ("512MiB", 512 << 20),
            ("512 mib", 512 << 20),
            ("10G", 10 << 30),
            ("1.5GiB", 3 << 29),
            ("2TB", 2_000_000_000_000),
            ("0.5K", 512),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_its_kind() {
        assert!(matches!(parse(""), Err(SizeError::NotANumber(_))));
        assert!(matches!(parse("GiB"), Err(SizeError::NotANumber(_))));
        assert!(matches!(parse("-1"), Err(SizeError::NotANumber(_))));
        assert!(matches!(parse("1..5G"), Err(SizeError::NotANumber(_))));
        assert!(matches!(parse("1.G"), Err(SizeError::NotANumber(_))));
        assert!(matches!(parse("5 potatoes"), Err(SizeError::UnknownUnit(_))));
        assert!(matches!(parse("0.3K"), Err(SizeError::Fraction(_))));
        assert!(matches!(parse("9000PiB"), Err(SizeError::TooLarge(_))));
        assert!(matches!(parse("99999999999999999999"), Err(SizeError::TooLarge(_))));
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(3 << 29), "1.5 GiB");
        assert_eq!(human(512 << 20), "512 MiB");
        assert_eq!(human((1 << 30) - 1), "1023.9 MiB");
        assert_eq!(human(u64::MAX), "15.9 EiB");
    }

    proptest! {
        #[test]
        fn parse_is_total(text in ".{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn whole_units_round_trip(count in 0u64..1024, unit in 0usize..5) {
            let name = ["B", "KiB", "MiB", "GiB", "TiB"][unit];
            let bytes = count << (10 * unit);
            prop_assert_eq!(parse(&format!("{count}{name}")), Ok(bytes));
            prop_assert_eq!(parse(&human(bytes)), Ok(bytes));
        }
    }
}
