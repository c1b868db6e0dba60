//! The form of a published state: a head, tables of fixed-size records, and a pool of strings.
//!
//! The head names the level of its writer, the lowest level that can read it, and for every table its place, its number
//! of records and their stride. A level only ever appends fields to a record, so a reader takes the fields it knows: of
//! a longer record the front, of a shorter one all there is, the rest being zero. A value that older readers must not
//! overlook (a new kind of state, say) raises the lowest level instead. Decoding is total: any bytes give a state or a
//! [`Fault`], never a panic, and never more memory than a small multiple of the input.

use crate::error::{Fault, MapError};
use crate::layout::{LEVEL, check_level};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A record or head: all fields little-endian, no padding, only appended to.
pub(crate) trait Record: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned {
    /// For messages.
    const NAME: &'static str;

    /// How many bytes there must be for the record to mean anything; what follows may be absent and is then zero.
    const LEAST: usize;
}

/// Place of a table: offset from the start of the state in bytes, number of records, bytes from one to the next.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Table {
    pub(crate) offset: U32,
    pub(crate) count: U32,
    pub(crate) stride: U32,
}

/// Place of a string, or of other bytes, in the pool.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Text {
    pub(crate) offset: U32,
    pub(crate) len: U32,
}

/// What every head begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Preamble {
    pub(crate) level: U32,
    pub(crate) lowest_reader: U32,
    pub(crate) head_len: U32,
}

impl Preamble {
    /// That of this program's level, for a head of type `H`, to be read by the levels from `lowest_reader` on.
    pub(crate) fn of<H: Record>(lowest_reader: u32) -> Self {
        let head_len = u32::try_from(size_of::<H>()).expect("a head is a few hundred bytes");
        Self { level: LEVEL.into(), lowest_reader: lowest_reader.into(), head_len: head_len.into() }
    }
}

/// Reads a record whose bytes may be fewer or more than this level knows.
fn read_record<R: Record>(bytes: &[u8]) -> Result<R, Fault> {
    if bytes.len() < R::LEAST {
        return Err(Fault::Corrupt(format!(
            "{} of {} bytes, at least {} expected",
            R::NAME,
            bytes.len(),
            R::LEAST
        )));
    }
    let mut record = R::new_zeroed();
    let known = bytes.len().min(size_of::<R>());
    record.as_mut_bytes()[..known].copy_from_slice(&bytes[..known]);
    Ok(record)
}

/// Builds a state behind a head that is written last.
pub(crate) struct Encoder<'a> {
    out: &'a mut Vec<u8>,
    pool: Vec<u8>,
}

impl<'a> Encoder<'a> {
    /// Clears `out` and leaves room for a head of type `H`.
    pub(crate) fn new<H: Record>(out: &'a mut Vec<u8>) -> Self {
        out.clear();
        out.resize(size_of::<H>(), 0);
        Self { out, pool: Vec::new() }
    }

    /// Appends one record per item.
    pub(crate) fn table<T, R: Record>(
        &mut self,
        items: &[T],
        mut record: impl FnMut(&mut Self, &T) -> Result<R, MapError>,
    ) -> Result<Table, MapError> {
        let offset = self.out.len();
        for item in items {
            let record = record(self, item)?;
            self.out.extend_from_slice(record.as_bytes());
        }
        place(offset, items.len(), size_of::<R>())
    }

    /// Puts a string into the pool.
    pub(crate) fn text(&mut self, text: &str) -> Result<Text, MapError> {
        self.bytes(text.as_bytes())
    }

    /// Puts bytes that need be no text into the pool.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<Text, MapError> {
        let offset = length(self.pool.len())?;
        self.pool.extend_from_slice(bytes);
        Ok(Text { offset, len: length(bytes.len())? })
    }

    /// Appends the pool; no string may follow.
    pub(crate) fn pool(&mut self) -> Result<Table, MapError> {
        let offset = self.out.len();
        self.out.append(&mut self.pool);
        place(offset, self.out.len() - offset, 1)
    }

    /// Writes the head.
    pub(crate) fn finish<H: Record>(self, head: &H) {
        self.out[..size_of::<H>()].copy_from_slice(head.as_bytes());
    }
}

fn length(bytes: usize) -> Result<U32, MapError> {
    let too_big = || MapError::TooBig { bytes: bytes as u64, capacity: u64::from(u32::MAX) };
    u32::try_from(bytes).map(U32::new).map_err(|_| too_big())
}

fn place(offset: usize, count: usize, stride: usize) -> Result<Table, MapError> {
    Ok(Table { offset: length(offset)?, count: length(count)?, stride: length(stride)? })
}

/// Reads a state.
pub(crate) struct Decoder<'a> {
    bytes: &'a [u8],
    pool: &'a [u8],
    /// How many bytes of strings may still be handed out: each byte of the pool belongs to one string, so that a small
    /// state cannot ask for much memory.
    budget: usize,
}

impl<'a> Decoder<'a> {
    /// Checks the level and reads the head.
    pub(crate) fn new<H: Record>(bytes: &'a [u8]) -> Result<(Self, H), Fault> {
        let (preamble, _) = Preamble::read_from_prefix(bytes)
            .map_err(|_| Fault::corrupt("state is shorter than its head"))?;
        check_level(preamble.level.get(), preamble.lowest_reader.get(), LEVEL)?;
        let head = usize::try_from(preamble.head_len.get()).ok().and_then(|len| bytes.get(..len));
        let head = head.ok_or_else(|| Fault::corrupt("head exceeds the state"))?;
        Ok((Self { bytes, pool: &[], budget: 0 }, read_record(head)?))
    }

    /// The bytes of a table and its stride.
    fn rows(&self, table: &Table, name: &str, least: usize) -> Result<(&'a [u8], usize), Fault> {
        let number = |value: U32| usize::try_from(value.get()).ok();
        let span = || -> Option<(&'a [u8], usize)> {
            let (offset, count, stride) =
                (number(table.offset)?, number(table.count)?, number(table.stride)?);
            let end = offset.checked_add(count.checked_mul(stride)?)?;
            (stride >= least).then_some((self.bytes.get(offset..end)?, stride))
        };
        span()
            .ok_or_else(|| Fault::Corrupt(format!("table of {name}s does not lie in the state ({table:?})")))
    }

    /// Names the table that strings are taken from.
    pub(crate) fn use_pool(&mut self, table: &Table) -> Result<(), Fault> {
        (self.pool, _) = self.rows(table, "string", 1)?;
        self.budget = self.pool.len();
        Ok(())
    }

    /// Reads the records of a table.
    pub(crate) fn table<R: Record, T>(
        &mut self,
        table: &Table,
        mut item: impl FnMut(&mut Self, R) -> Result<T, Fault>,
    ) -> Result<Vec<T>, Fault> {
        let (rows, stride) = self.rows(table, R::NAME, R::LEAST)?;
        rows.chunks_exact(stride).map(|row| item(self, read_record(row)?)).collect()
    }

    /// Reads the records of a table that heads of the former level lack.
    pub(crate) fn added_table<R: Record, T>(
        &mut self,
        table: &Table,
        item: impl FnMut(&mut Self, R) -> Result<T, Fault>,
    ) -> Result<Vec<T>, Fault> {
        let absent = table.as_bytes().iter().all(|byte| *byte == 0);
        if absent { Ok(Vec::new()) } else { self.table(table, item) }
    }

    /// Reads a string.
    pub(crate) fn text(&mut self, text: Text) -> Result<String, Fault> {
        let text =
            std::str::from_utf8(self.bytes(text)?).map_err(|_| Fault::corrupt("string is not UTF-8"))?;
        Ok(text.to_owned())
    }

    /// Reads bytes that need be no text.
    pub(crate) fn bytes(&mut self, text: Text) -> Result<&'a [u8], Fault> {
        let bytes = || -> Option<&'a [u8]> {
            let (offset, len) =
                (usize::try_from(text.offset.get()).ok()?, usize::try_from(text.len.get()).ok()?);
            self.pool.get(offset..offset.checked_add(len)?)
        };
        let bytes = bytes().ok_or_else(|| Fault::corrupt("string outside its pool"))?;
        self.budget = self
            .budget
            .checked_sub(bytes.len())
            .ok_or_else(|| Fault::corrupt("strings exceed their pool"))?;
        Ok(bytes)
    }
}

/// Reads a truth value.
pub(crate) fn flag(byte: u8, name: &str) -> Result<bool, Fault> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Fault::Corrupt(format!("{name} is neither 0 nor 1 but {byte}"))),
    }
}

/// Gives an enum the codes of its variants in shared memory: `code` and a total `from_code`.
macro_rules! codes {
    ($type:ident { $($variant:ident = $code:literal,)* }) => {
        impl $type {
            fn code(self) -> u8 {
                match self { $(Self::$variant => $code,)* }
            }

            fn from_code(code: u8) -> Result<Self, $crate::error::Fault> {
                match code {
                    $($code => Ok(Self::$variant),)*
                    _ => Err($crate::error::Fault::Corrupt(format!(concat!("unknown ", stringify!($type), " {}"), code))),
                }
            }
        }
    };
}
pub(crate) use codes;

/// Makes of a state what a program of another level would have written.
#[cfg(not(loom))]
#[cfg(test)]
pub(crate) mod other_level {
    use super::*;

    /// What a newer level appends, of which this one knows nothing.
    const UNKNOWN: u8 = 0xa5;

    fn number(bytes: &[u8], at: usize) -> usize {
        usize::try_from(U32::read_from_bytes(&bytes[at..at + 4]).unwrap().get()).unwrap()
    }

    fn set_number(bytes: &mut [u8], at: usize, value: usize) {
        bytes[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_le_bytes());
    }

    /// Lays `state` out anew with the given levels, a head of `head_len` bytes, and record strides given by
    /// `stride(table, stride)` for the tables whose entries lie in the head from `tables` on. A table whose entry the head
    /// loses is left out; the pool, of stride 1, stays as it is.
    pub(crate) fn relaid(
        state: &[u8],
        levels: (u32, u32),
        head_len: usize,
        tables: std::ops::Range<usize>,
        stride: impl Fn(usize, usize) -> usize,
    ) -> Vec<u8> {
        let mut out = state[..number(state, 8)].to_vec();
        out.resize(head_len, UNKNOWN);
        out[..4].copy_from_slice(&levels.0.to_le_bytes());
        out[4..8].copy_from_slice(&levels.1.to_le_bytes());
        set_number(&mut out, 8, head_len);
        let entries =
            tables.step_by(size_of::<Table>()).filter(|entry| entry + size_of::<Table>() <= head_len);
        for (index, entry) in entries.enumerate() {
            let (offset, count) = (number(state, entry), number(state, entry + 4));
            let old = number(state, entry + 8);
            let new = if old == 1 { old } else { stride(index, old) };
            let start = out.len();
            set_number(&mut out, entry, start);
            set_number(&mut out, entry + 8, new);
            for row in state[offset..offset + count * old].chunks_exact(old) {
                out.extend_from_slice(&row[..old.min(new)]);
                out.extend(std::iter::repeat_n(UNKNOWN, new.saturating_sub(old)));
            }
        }
        out
    }

    /// Flips one bit.
    pub(crate) fn flipped(state: &[u8], bit: usize) -> Vec<u8> {
        let mut state = state.to_vec();
        let bit = bit % (8 * state.len());
        state[bit / 8] ^= 1 << (bit % 8);
        state
    }
}
