//! The 128-bit random names of clusters, nodes, stores and volumes.
//!
//! Ids are random and never reused (I2), so two ids are equal only if they name the same thing. Each kind is a type of
//! its own: a store's id cannot be passed where a volume's is expected.

use std::fmt;
use std::str::FromStr;

/// Why a text is not an id: it is not 32 hexadecimal digits in groups of 8-4-4-4-12.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an id: expected 8-4-4-4-12 hexadecimal digits, as in 6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c43")]
pub struct ParseIdError;

/// Positions of the hyphens in the 36-character form (RFC 9562, section 4).
const HYPHENS: [usize; 4] = [8, 13, 18, 23];

fn format_hyphenated(bytes: &[u8; 16], out: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            out.write_str("-")?;
        }
        write!(out, "{byte:02x}")?;
    }
    Ok(())
}

fn hex_digit(digit: u8) -> Result<u8, ParseIdError> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(ParseIdError),
    }
}

fn parse_hyphenated(text: &str) -> Result<[u8; 16], ParseIdError> {
    let text = text.as_bytes();
    if text.len() != 36 || HYPHENS.iter().any(|&at| text[at] != b'-') {
        return Err(ParseIdError);
    }
    let mut bytes = [0; 16];
    let mut digits = text.iter().enumerate().filter(|(at, _)| !HYPHENS.contains(at)).map(|(_, digit)| *digit);
    for byte in &mut bytes {
        let high = hex_digit(digits.next().ok_or(ParseIdError)?)?;
        let low = hex_digit(digits.next().ok_or(ParseIdError)?)?;
        *byte = high << 4 | low;
    }
    Ok(bytes)
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// Text form: a hyphenated UUID in lower case; parsing takes either case.
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// True for the all-zero id, which names nothing.
            #[must_use]
            pub fn is_nil(&self) -> bool {
                self.0 == [0; 16]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                format_hyphenated(&self.0, out)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(out, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                parse_hyphenated(text).map(Self)
            }
        }

        impl From<[u8; 16]> for $name {
            fn from(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }
        }
    };
}

id!(
    /// Names a cluster; every store carries it, and a store of another cluster is refused (I2).
    ClusterId
);
id!(
    /// Names a node, a permanent member of a cluster.
    NodeId
);
id!(
    /// Names a store: one formatted device or file.
    StoreId
);
id!(
    /// Names a volume; never reused after its deletion (I2).
    VolumeId
);

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_form_is_the_hyphenated_uuid() {
        let id = VolumeId(*b"\x6f\x1c\x3a\xd2\x90\xb4\x4a\x07\x8a\x55\x0d\x2f\x6b\x1e\x7c\x43");
        assert_eq!(id.to_string(), "6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c43");
        assert_eq!("6F1C3AD2-90B4-4A07-8A55-0D2F6B1E7C43".parse(), Ok(id));
        assert!(VolumeId::default().is_nil() && !id.is_nil());
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "6f1c3ad290b44a078a550d2f6b1e7c43",
            "6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c4",
            "6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c4g",
            "6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c431",
            "6f1c3ad2-90b4-4a07-8a5-50d2f6b1e7c431",
            "{6f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c4}",
            "-f1c3ad2-90b4-4a07-8a55-0d2f6b1e7c43",
        ] {
            assert_eq!(text.parse::<StoreId>(), Err(ParseIdError), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_id_survives_its_text_form(bytes: [u8; 16]) {
            prop_assert_eq!(ClusterId(bytes).to_string().parse(), Ok(ClusterId(bytes)));
        }

        #[test]
        fn parsing_is_total(text in "\\PC{0,40}") {
            let _ = text.parse::<NodeId>();
        }
    }
}
