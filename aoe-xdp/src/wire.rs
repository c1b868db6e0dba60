//! The AoE wire codec: what the bytes of a frame are, and nothing about what they mean to a target or an initiator.
//!
//! Every structure is a `zerocopy` view with its size asserted at compile time. Parsing is total: any bytes give a
//! value or an error, and nothing is read beyond the slice that was given. Offsets are those of an untagged frame:
//!
//! ```text
//!  0 dst(6)  6 src(6)  12 EtherType 0x88A2  14 ver:4|flags:4  15 error  16 shelf(2, BE)  18 slot  19 command
//! 20 tag(4, BE)  24 argument: ATA 12 bytes then data, Query Config 8 bytes then the string,
//!                   MAC Mask List 4 bytes then directives of 8, Reserve/Release 2 bytes then MACs
//! ```
//!
//! Byte order: network order, but the LBA (6 bytes, little-endian) and ATA data (little-endian words). Source: the
//! AoEr11 specification as implemented by Linux `drivers/block/aoe` and vblade.

use std::fmt;
use std::str::FromStr;

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// EtherType of ATA over Ethernet.
pub const ETHERTYPE: u16 = 0x88a2;
/// The one protocol version in use.
pub const VERSION: u8 = 1;
/// Shortest Ethernet frame without its checksum; virtual links do not pad, so replies are padded to this.
pub const FRAME_LEN_MIN: usize = 60;
/// Bytes of the common header.
pub const HEADER_LEN: usize = 24;
/// Bytes before the data of an ATA message.
pub const ATA_DATA_OFFSET: usize = 36;
/// Bytes before the string of a Query Config message.
pub const CONFIG_STRING_OFFSET: usize = 32;
/// Bytes before the directives of a MAC Mask List message.
pub const MASK_DIRECTIVES_OFFSET: usize = 28;
/// Bytes before the MACs of a Reserve/Release message.
pub const RESERVE_MACS_OFFSET: usize = 26;
/// Longest config string.
pub const CONFIG_STRING_LEN_MAX: usize = 1024;
/// Bytes of an ATA sector.
pub const SECTOR_LEN: usize = 512;
/// Shelf address that every target matches.
pub const SHELF_ANY: u16 = 0xffff;
/// Slot address that every target matches.
pub const SLOT_ANY: u8 = 0xff;
/// Shelf that the Linux initiator refuses (`aoecmd_cfg_rsp`), so no export may have it.
pub const SHELF_REFUSED_BY_LINUX: u16 = 0x0fff;

/// Bits of the flags nibble.
pub mod flags {
    /// The message is a response.
    pub const RESPONSE: u8 = 0x08;
    /// The message is a response that carries an AoE error.
    pub const ERROR: u8 = 0x04;
}

/// Bits of the ATA argument's flags.
pub mod aflags {
    /// LBA48 registers are in use.
    pub const EXTENDED: u8 = 0x40;
    /// Write data follows.
    pub const WRITE: u8 = 0x01;
}

/// ATA command codes that are interpreted.
pub mod ata {
    /// READ SECTORS, 28-bit.
    pub const READ: u8 = 0x20;
    /// READ SECTORS EXT, 48-bit.
    pub const READ_EXT: u8 = 0x24;
    /// WRITE SECTORS, 28-bit.
    pub const WRITE: u8 = 0x30;
    /// WRITE SECTORS EXT, 48-bit.
    pub const WRITE_EXT: u8 = 0x34;
    /// CHECK POWER MODE.
    pub const CHECK_POWER_MODE: u8 = 0xe5;
    /// FLUSH CACHE.
    pub const FLUSH_CACHE: u8 = 0xe7;
    /// FLUSH CACHE EXT.
    pub const FLUSH_CACHE_EXT: u8 = 0xea;
    /// IDENTIFY DEVICE.
    pub const IDENTIFY: u8 = 0xec;
    /// SET FEATURES.
    pub const SET_FEATURES: u8 = 0xef;

    /// Features that a host may set and that change nothing here: write cache on and off, read-ahead on and off,
    /// transfer mode.
    pub const FEATURES_ACCEPTED: [u8; 5] = [0x02, 0x82, 0xaa, 0x55, 0x03];

    /// Status: device ready.
    pub const STATUS_DRDY: u8 = 0x40;
    /// Status: device fault.
    pub const STATUS_DF: u8 = 0x20;
    /// Status: data request; never set in an AoE reply.
    pub const STATUS_DRQ: u8 = 0x08;
    /// Status: busy; never set in an AoE reply.
    pub const STATUS_BSY: u8 = 0x80;
    /// Status: error, see the error register.
    pub const STATUS_ERR: u8 = 0x01;
    /// Error: uncorrectable data.
    pub const ERROR_UNC: u8 = 0x40;
    /// Error: id not found, the address is beyond the device.
    pub const ERROR_IDNF: u8 = 0x10;
    /// Error: command aborted.
    pub const ERROR_ABRT: u8 = 0x04;
}

/// The message's command code.
pub mod command {
    /// ATA.
    pub const ATA: u8 = 0;
    /// Query Config.
    pub const CONFIG: u8 = 1;
    /// MAC Mask List.
    pub const MAC_MASK: u8 = 2;
    /// Reserve/Release.
    pub const RESERVE: u8 = 3;
}

/// Sub-commands of Query Config.
pub mod ccmd {
    /// Read the string: always answered.
    pub const READ: u8 = 0;
    /// Answer only when the string equals the current one.
    pub const TEST: u8 = 1;
    /// Answer only when the string is a prefix of the current one.
    pub const TEST_PREFIX: u8 = 2;
    /// Set the string if it is empty.
    pub const SET_IF_EMPTY: u8 = 3;
    /// Set the string.
    pub const FORCE_SET: u8 = 4;
    /// Set the string if the current one equals another: the string is followed by a big-endian length of 16 bits and the
    /// string to set.
    pub const TEST_AND_REPLACE: u8 = 5;
}

/// Sub-commands of MAC Mask List.
pub mod mcmd {
    /// Read the list.
    pub const READ: u8 = 0;
    /// Carry out directives, all or none.
    pub const EDIT: u8 = 1;
}

/// Directives of an edit of the MAC mask list.
pub mod dcmd {
    /// Nothing.
    pub const NOP: u8 = 0;
    /// Add the MAC.
    pub const ADD: u8 = 1;
    /// Delete the MAC.
    pub const DELETE: u8 = 2;
}

/// Errors of a MAC Mask List answer; these are no [`AoeError`]s.
pub mod merror {
    /// Done.
    pub const NONE: u8 = 0;
    /// A directive is none of [`super::dcmd`], or its MAC is one that no station has.
    pub const BAD_DIRECTIVE: u8 = 2;
    /// The list has no room for another MAC.
    pub const LIST_FULL: u8 = 3;
}

/// Sub-commands of Reserve/Release.
pub mod rcmd {
    /// Read the list of those that the target is reserved for.
    pub const READ: u8 = 0;
    /// Set the list, if it is empty or the requester is in it; an empty list is a release.
    pub const SET: u8 = 1;
    /// Set the list.
    pub const FORCE_SET: u8 = 2;
}

/// AoE errors, carried in responses with the error flag. An I/O failure is never one of them: Linux drops such a
/// response and retries until the device is dead, so those go into the ATA status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum AoeError {
    /// The command code is not known.
    UnrecognizedCommand = 1,
    /// An argument is out of its range.
    BadArgument = 2,
    /// The device cannot answer now.
    DeviceUnavailable = 3,
    /// A config string is set already.
    ConfigStringPresent = 4,
    /// The version is not 1.
    UnsupportedVersion = 5,
    /// Another initiator has reserved the target.
    TargetReserved = 6,
}

/// An Ethernet address.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Default,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(transparent)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// All stations.
    pub const BROADCAST: Mac = Mac([0xff; 6]);

    /// Whether the group bit is set (broadcast included).
    #[must_use]
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether it is the all-zero address, which no station has.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 == [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A target's address: shelf (major) and slot (minor), written `shelf.slot`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Address {
    /// The shelf, 0..=65534 except 4095.
    pub shelf: u16,
    /// The slot, 0..=254.
    pub slot: u8,
}

impl Address {
    /// Addresses every target.
    pub const ANY: Address = Address { shelf: SHELF_ANY, slot: SLOT_ANY };

    /// Whether a target at `own` is addressed; shelf and slot are independent wildcards.
    #[must_use]
    pub fn matches(self, own: Address) -> bool {
        (self.shelf == SHELF_ANY || self.shelf == own.shelf)
            && (self.slot == SLOT_ANY || self.slot == own.slot)
    }

    /// Whether it names one target and no wildcard.
    #[must_use]
    pub fn is_exact(self) -> bool {
        self.shelf != SHELF_ANY && self.slot != SLOT_ANY
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.shelf, self.slot)
    }
}

/// Why a text is not an address that an export can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not of the form `shelf.slot`.
    #[error("'{0}' is not an AoE address: write SHELF.SLOT, for example 1.2")]
    Form(String),
    /// The shelf is a wildcard or one that Linux refuses.
    #[error("shelf {0} cannot be used: Linux initiators take shelves 0 to 65534 except 4095")]
    Shelf(u32),
    /// The slot is the wildcard or too large.
    #[error("slot {0} cannot be used: slots go from 0 to 254")]
    Slot(u32),
}

impl FromStr for Address {
    type Err = AddressError;

    /// Reads `shelf.slot`; wildcards and shelf 4095 are refused, since no Linux initiator would attach them.
    fn from_str(text: &str) -> Result<Address, AddressError> {
        let form = || AddressError::Form(text.to_owned());
        let (shelf, slot) = text.split_once('.').ok_or_else(form)?;
        let number = |digits: &str| -> Result<u32, AddressError> {
            let plain = !digits.is_empty() && digits.len() <= 9 && digits.bytes().all(|b| b.is_ascii_digit());
            if plain { digits.parse().map_err(|_| form()) } else { Err(form()) }
        };
        let (shelf_no, slot_no) = (number(shelf)?, number(slot)?);
        let shelf = u16::try_from(shelf_no)
            .ok()
            .filter(|&s| s != SHELF_ANY && s != SHELF_REFUSED_BY_LINUX)
            .ok_or(AddressError::Shelf(shelf_no))?;
        let slot =
            u8::try_from(slot_no).ok().filter(|&s| s != SLOT_ANY).ok_or(AddressError::Slot(slot_no))?;
        Ok(Address { shelf, slot })
    }
}

/// The common header of every message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Destination station.
    pub dst: Mac,
    /// Source station.
    pub src: Mac,
    /// [`ETHERTYPE`].
    pub ethertype: U16,
    /// Version in the high nibble, [`flags`] in the low one.
    pub version_flags: u8,
    /// An [`AoeError`], valid with the error flag.
    pub error: u8,
    /// Shelf, or [`SHELF_ANY`].
    pub shelf: U16,
    /// Slot, or [`SLOT_ANY`].
    pub slot: u8,
    /// One of [`command`].
    pub command: u8,
    /// Opaque to the target, echoed verbatim.
    pub tag: U32,
}
const _: () = assert!(size_of::<Header>() == HEADER_LEN);

impl Header {
    /// A request from `src` to `dst`.
    #[must_use]
    pub fn request(dst: Mac, src: Mac, address: Address, command: u8, tag: u32) -> Header {
        Header {
            dst,
            src,
            ethertype: U16::new(ETHERTYPE),
            version_flags: VERSION << 4,
            error: 0,
            shelf: U16::new(address.shelf),
            slot: address.slot,
            command,
            tag: U32::new(tag),
        }
    }

    /// The answer to this request, sent by the target at `own` from the station `from`: tag, version and command are
    /// echoed, the address is the target's own and never the wildcard that was asked.
    #[must_use]
    pub fn response(&self, from: Mac, own: Address) -> Header {
        Header {
            dst: self.src,
            src: from,
            version_flags: (VERSION << 4) | flags::RESPONSE,
            error: 0,
            shelf: U16::new(own.shelf),
            slot: own.slot,
            ..*self
        }
    }

    /// This response with an AoE error in it.
    #[must_use]
    pub fn with_error(self, error: AoeError) -> Header {
        Header { version_flags: self.version_flags | flags::ERROR, error: error as u8, ..self }
    }

    /// The protocol version.
    #[must_use]
    pub fn version(&self) -> u8 {
        self.version_flags >> 4
    }

    /// Whether the response flag is set.
    #[must_use]
    pub fn is_response(&self) -> bool {
        self.version_flags & flags::RESPONSE != 0
    }

    /// Whether the error flag is set.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.version_flags & flags::ERROR != 0
    }

    /// Shelf and slot as sent, wildcards included.
    #[must_use]
    pub fn address(&self) -> Address {
        Address { shelf: self.shelf.get(), slot: self.slot }
    }
}

/// The argument of an ATA message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct AtaArg {
    /// See [`aflags`].
    pub aflags: u8,
    /// Feature register of a request, Error register of a response.
    pub error_feature: u8,
    /// Sectors; 0 is none, never 256.
    pub sector_count: u8,
    /// Command register of a request, Status register of a response.
    pub command_status: u8,
    /// Little-endian. In 28-bit commands the low nibble of byte 3 is bits 24–27, its high nibble is the Device register.
    pub lba: [u8; 6],
    /// Sent as zero.
    pub reserved: [u8; 2],
}
const _: () = assert!(size_of::<AtaArg>() == ATA_DATA_OFFSET - HEADER_LEN);

impl AtaArg {
    /// The 48-bit sector address.
    #[must_use]
    pub fn lba48(&self) -> u64 {
        let [a, b, c, d, e, f] = self.lba;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }

    /// The 28-bit sector address, the Device register's bits masked off.
    #[must_use]
    pub fn lba28(&self) -> u64 {
        self.lba48() & 0x0fff_ffff
    }

    /// A 48-bit read or write of `sector_count` sectors at `lba` (the low 48 bits), as Linux's `ata_rw_frameinit`
    /// makes it.
    #[must_use]
    pub fn read_write_ext(lba: u64, sector_count: u8, write: bool) -> AtaArg {
        let [a, b, c, d, e, f, _, _] = lba.to_le_bytes();
        AtaArg {
            aflags: aflags::EXTENDED | if write { aflags::WRITE } else { 0 },
            error_feature: 0,
            sector_count,
            command_status: if write { ata::WRITE_EXT } else { ata::READ_EXT },
            lba: [a, b, c, d, e, f],
            reserved: [0; 2],
        }
    }

    /// IDENTIFY DEVICE, as Linux's `aoecmd_ata_id` makes it.
    #[must_use]
    pub fn identify() -> AtaArg {
        AtaArg {
            aflags: 0,
            error_feature: 0,
            sector_count: 1,
            command_status: ata::IDENTIFY,
            lba: [0, 0, 0, 0xa0, 0, 0],
            reserved: [0; 2],
        }
    }
}

/// The argument of a Query Config message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ConfigArg {
    /// Messages that the target can hold for one initiator; 0 in requests.
    pub buffer_count: U16,
    /// Opaque.
    pub firmware_version: U16,
    /// Most sectors of one ATA message; 0 means 2.
    pub sector_count: u8,
    /// Protocol version in the high nibble, one of [`ccmd`] in the low one.
    pub version_ccmd: u8,
    /// Bytes of the string that follows.
    pub string_len: U16,
}
const _: () = assert!(size_of::<ConfigArg>() == CONFIG_STRING_OFFSET - HEADER_LEN);

/// The first bytes of an ATA message: everything before its data.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct AtaHead {
    /// Common header.
    pub header: Header,
    /// ATA argument.
    pub arg: AtaArg,
}
const _: () = assert!(size_of::<AtaHead>() == ATA_DATA_OFFSET);

/// The first bytes of a Query Config message: everything before its string.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ConfigHead {
    /// Common header.
    pub header: Header,
    /// Query Config argument.
    pub arg: ConfigArg,
}
const _: () = assert!(size_of::<ConfigHead>() == CONFIG_STRING_OFFSET);

/// The argument of a MAC Mask List message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MaskArg {
    /// Sent as zero.
    pub reserved: u8,
    /// One of [`mcmd`].
    pub mcmd: u8,
    /// One of [`merror`], in responses.
    pub merror: u8,
    /// Directives that follow; in a response that failed the position of the one that could not be carried out.
    pub count: u8,
}

/// One directive of a MAC Mask List message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MaskDirective {
    /// Sent as zero.
    pub reserved: u8,
    /// One of [`dcmd`]; 0 in responses.
    pub dcmd: u8,
    /// The station.
    pub mac: Mac,
}
const _: () = assert!(size_of::<MaskDirective>() == 8);

/// The first bytes of a MAC Mask List message: everything before its directives.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MaskHead {
    /// Common header.
    pub header: Header,
    /// MAC Mask List argument.
    pub arg: MaskArg,
}
const _: () = assert!(size_of::<MaskHead>() == MASK_DIRECTIVES_OFFSET);

/// The argument of a Reserve/Release message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ReserveArg {
    /// One of [`rcmd`].
    pub rcmd: u8,
    /// MACs that follow.
    pub count: u8,
}

/// The first bytes of a Reserve/Release message: everything before its MACs.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ReserveHead {
    /// Common header.
    pub header: Header,
    /// Reserve/Release argument.
    pub arg: ReserveArg,
}
const _: () = assert!(size_of::<ReserveHead>() == RESERVE_MACS_OFFSET);

/// Why bytes are not an AoE message. Nothing is answered to such bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Fewer bytes than the part being read has.
    #[error("the frame is too short")]
    Short,
    /// Another EtherType.
    #[error("the frame is not ATA over Ethernet")]
    EtherType,
}

/// Reads the common header.
///
/// # Errors
/// [`ParseError::Short`] below 24 bytes, [`ParseError::EtherType`] for a foreign frame.
pub fn parse_header(frame: &[u8]) -> Result<&Header, ParseError> {
    let (header, _) = Header::ref_from_prefix(frame).map_err(|_| ParseError::Short)?;
    if header.ethertype.get() == ETHERTYPE { Ok(header) } else { Err(ParseError::EtherType) }
}

/// Reads the part of an ATA message before its data.
///
/// # Errors
/// [`ParseError::Short`] below 36 bytes.
pub fn parse_ata(frame: &[u8]) -> Result<&AtaHead, ParseError> {
    AtaHead::ref_from_prefix(frame).map(|(head, _)| head).map_err(|_| ParseError::Short)
}

/// Reads the part of a Query Config message before its string, and all bytes after it (a frame's padding included).
///
/// # Errors
/// [`ParseError::Short`] below 32 bytes.
pub fn parse_config(frame: &[u8]) -> Result<(&ConfigHead, &[u8]), ParseError> {
    ConfigHead::ref_from_prefix(frame).map_err(|_| ParseError::Short)
}

/// Reads the part of a MAC Mask List message before its directives, and all bytes after it (padding included).
///
/// # Errors
/// [`ParseError::Short`] below 28 bytes.
pub fn parse_masks(frame: &[u8]) -> Result<(&MaskHead, &[u8]), ParseError> {
    MaskHead::ref_from_prefix(frame).map_err(|_| ParseError::Short)
}

/// The first `count` directives of the bytes that follow a [`MaskHead`]; `None` if they are not all there.
#[must_use]
pub fn directives(rest: &[u8], count: u8) -> Option<&[MaskDirective]> {
    <[MaskDirective]>::ref_from_prefix_with_elems(rest, usize::from(count)).ok().map(|(list, _)| list)
}

/// Reads the part of a Reserve/Release message before its MACs, and all bytes after it (padding included).
///
/// # Errors
/// [`ParseError::Short`] below 26 bytes.
pub fn parse_reserve(frame: &[u8]) -> Result<(&ReserveHead, &[u8]), ParseError> {
    ReserveHead::ref_from_prefix(frame).map_err(|_| ParseError::Short)
}

/// The first `count` MACs of the bytes that follow a [`ReserveHead`]; `None` if they are not all there.
#[must_use]
pub fn macs(rest: &[u8], count: u8) -> Option<&[Mac]> {
    <[Mac]>::ref_from_prefix_with_elems(rest, usize::from(count)).ok().map(|(list, _)| list)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const T: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const S: Mac = Mac([0x52, 0x54, 0, 0, 0, 9]);
    const OWN: Address = Address { shelf: 1, slot: 2 };

    #[test]
    fn discovery_request_has_the_bytes_of_linux() {
        let mut frame =
            Header::request(Mac::BROADCAST, S, Address::ANY, command::CONFIG, 0).as_bytes().to_vec();
        frame.extend_from_slice(&[0; 8]);
        let expected: Vec<u8> =
            [&[0xff; 6][..], &S.0, &[0x88, 0xa2, 0x10, 0x00, 0xff, 0xff, 0xff, 0x01, 0, 0, 0, 0], &[0; 8]]
                .concat();
        assert_eq!(frame, expected);
    }

    #[test]
    fn read_ext_request_and_its_response_have_the_bytes_of_the_vectors() {
        let head = AtaHead {
            header: Header::request(T, S, OWN, command::ATA, 0x0002_a3f1),
            arg: AtaArg::read_write_ext(8, 2, false),
        };
        assert_eq!(head.as_bytes()[14..24], [0x10, 0, 0, 1, 2, 0, 0, 2, 0xa3, 0xf1]);
        assert_eq!(head.as_bytes()[24..], [0x40, 0, 2, 0x24, 8, 0, 0, 0, 0, 0, 0, 0]);
        let response = head.header.response(T, OWN);
        assert_eq!(response.as_bytes()[..6], S.0);
        assert_eq!(response.as_bytes()[6..12], T.0);
        assert_eq!(response.as_bytes()[14..24], [0x18, 0, 0, 1, 2, 0, 0, 2, 0xa3, 0xf1]);
        assert_eq!(response.with_error(AoeError::TargetReserved).as_bytes()[14..16], [0x1c, 6]);
    }

    #[test]
    fn shelf_and_slot_are_independent_wildcards() {
        for (asked, matches) in [
            (Address::ANY, true),
            (Address { shelf: SHELF_ANY, slot: 2 }, true),
            (Address { shelf: 1, slot: SLOT_ANY }, true),
            (Address { shelf: 1, slot: 3 }, false),
            (Address { shelf: 2, slot: SLOT_ANY }, false),
            (Address { shelf: SHELF_ANY, slot: 3 }, false),
        ] {
            assert_eq!(asked.matches(OWN), matches, "{asked}");
        }
    }

    #[test]
    fn lba28_masks_the_device_register() {
        let arg = AtaArg { lba: [0x11, 0x22, 0x33, 0xe4, 0xff, 0xff], ..AtaArg::identify() };
        assert_eq!(arg.lba28(), 0x0433_2211);
    }

    #[test]
    fn addresses_that_linux_refuses_are_refused_here() {
        assert_eq!("1.2".parse(), Ok(OWN));
        assert_eq!("65535.0".parse::<Address>(), Err(AddressError::Shelf(65535)));
        assert_eq!("4095.0".parse::<Address>(), Err(AddressError::Shelf(4095)));
        assert_eq!("70000.0".parse::<Address>(), Err(AddressError::Shelf(70000)));
        assert_eq!("0.255".parse::<Address>(), Err(AddressError::Slot(255)));
        for bad in ["", ".", "1", "1.", ".1", "+1.1", "1.-1", "1.1.1", "e1.1", " 1.1", "1.0000000001"] {
            assert!(matches!(bad.parse::<Address>(), Err(AddressError::Form(_))), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let header = parse_header(&bytes);
            prop_assert_eq!(header.is_ok(), bytes.len() >= HEADER_LEN && bytes[12..14] == [0x88, 0xa2]);
            prop_assert_eq!(parse_ata(&bytes).is_ok(), bytes.len() >= ATA_DATA_OFFSET);
            prop_assert_eq!(parse_config(&bytes).is_ok(), bytes.len() >= CONFIG_STRING_OFFSET);
            prop_assert_eq!(parse_masks(&bytes).is_ok(), bytes.len() >= MASK_DIRECTIVES_OFFSET);
            prop_assert_eq!(parse_reserve(&bytes).is_ok(), bytes.len() >= RESERVE_MACS_OFFSET);
            for count in [0, 1, 5, 200] {
                prop_assert_eq!(directives(&bytes, count).is_some(), bytes.len() >= usize::from(count) * 8);
                prop_assert_eq!(macs(&bytes, count).is_some(), bytes.len() >= usize::from(count) * 6);
            }
        }

        #[test]
        fn lba_round_trips(lba in 0u64..1 << 48, n in any::<u8>(), write in any::<bool>()) {
            let arg = AtaArg::read_write_ext(lba, n, write);
            prop_assert_eq!(AtaArg::read_from_bytes(arg.as_bytes()).unwrap().lba48(), lba);
        }

        #[test]
        fn address_text_round_trips(shelf in 0u16..0xffff, slot in 0u8..0xff) {
            prop_assume!(shelf != SHELF_REFUSED_BY_LINUX);
            let address = Address { shelf, slot };
            prop_assert_eq!(address.to_string().parse(), Ok(address));
        }
    }
}
