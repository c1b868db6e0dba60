//! The AoE target without I/O: a frame goes in, what is to be done comes out.
//!
//! Who is answered, and with what, is decided in one order (vblade `aoe()`, VSX): source and flags, version, address,
//! destination, length, command. Invariants:
//! * No I/O failure is ever an AoE error: Linux drops those and retries until the device is dead. They go into the ATA
//!   status ([`Io::finish`]).
//! * A write is executed only if it is addressed to the export's own MAC, shelf and slot exactly (I6): switches flood, and
//!   a MAC moves with its export.
//! * Nothing that was not asked by name is amplified: of the ATA commands only IDENTIFY takes a wildcard.
//! * Every answer is at least 60 bytes, padded with zeros; virtual links do not pad.
//! * The range of a command is checked without overflow against the size in force.

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::U16;

use crate::identify::{IDENTIFY_LEN, Identity};
use crate::wire::{
    self, ATA_DATA_OFFSET, Address, AoeError, AtaHead, ConfigArg, ConfigHead, FRAME_LEN_MIN, Header, Mac,
    SECTOR_LEN, ata, ccmd, command,
};

/// Messages that an initiator may have outstanding. Linux uses at most `aoe_maxout` (64) of them; 128 leaves room for its
/// resends.
pub const BUFFER_COUNT: u16 = 128;

/// Firmware version in Query Config answers: the first version of this target.
pub const FIRMWARE_VERSION: u16 = 1;

/// Bytes of [`ReplyHead`]: a header slot.
pub const REPLY_HEAD_LEN: usize = 64;

/// One exported volume, as the wire sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Identifies the export for as long as it exists, whatever other exports come and go.
    pub key: u32,
    /// Where it answers.
    pub address: Address,
    /// Its own MAC; an interface's ordinal is added to the low four bits of the last byte, so that two interfaces on one
    /// segment differ.
    pub mac: Mac,
    /// Size in 512-byte sectors, below 2^48.
    pub size_sectors: u64,
    /// Writes are aborted.
    pub read_only: bool,
    /// IDENTIFY's serial number, at most 20 ASCII characters.
    pub serial: String,
    /// The config string, at most 1024 bytes.
    pub config_string: Vec<u8>,
}

impl Export {
    /// The export's MAC on the interface with this ordinal.
    #[must_use]
    pub fn mac_on(&self, ordinal: u8) -> Mac {
        let mut mac = self.mac;
        mac.0[5] |= ordinal & 0x0f;
        mac
    }

    /// Writes the data of an IDENTIFY answer.
    pub fn identify(&self, out: &mut [u8; IDENTIFY_LEN]) {
        Identity {
            size_sectors: self.size_sectors,
            serial: &self.serial,
            firmware: env!("CARGO_PKG_VERSION"),
            model: "Torus volume",
        }
        .write(out);
    }
}

/// The interface that a frame came in by.
#[derive(Debug, Clone, Copy)]
pub struct Ingress {
    /// The interface's own MAC.
    pub mac: Mac,
    /// Its ordinal on this node, below 16.
    pub ordinal: u8,
    /// Most sectors of one message on it.
    pub sectors_max: u8,
}

/// All exports, found by address in one array read each for shelf and slot.
#[derive(Debug)]
pub struct ExportTable {
    exports: Vec<Export>,
    /// Shelf → page number + 1; 0 where the shelf has no export.
    page_of_shelf: Box<[u32]>,
    /// Slot → export number + 1.
    pages: Vec<[u32; 256]>,
}

/// Two exports claim one address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("two exports have the address {0}")]
pub struct DuplicateAddress(pub Address);

impl Default for ExportTable {
    fn default() -> ExportTable {
        ExportTable::new(Vec::new()).expect("no export, no duplicate")
    }
}

impl ExportTable {
    /// Builds the table.
    ///
    /// # Errors
    /// [`DuplicateAddress`].
    pub fn new(exports: Vec<Export>) -> Result<ExportTable, DuplicateAddress> {
        let mut page_of_shelf = vec![0u32; 1 << 16].into_boxed_slice();
        let mut pages: Vec<[u32; 256]> = Vec::new();
        for (number, export) in (1u32..).zip(&exports) {
            let page = &mut page_of_shelf[usize::from(export.address.shelf)];
            if *page == 0 {
                pages.push([0; 256]);
                *page = u32::try_from(pages.len()).expect("at most 2^16 shelves");
            }
            let slot = &mut pages[*page as usize - 1][usize::from(export.address.slot)];
            if std::mem::replace(slot, number) != 0 {
                return Err(DuplicateAddress(export.address));
            }
        }
        Ok(ExportTable { exports, page_of_shelf, pages })
    }

    /// All exports, in the order given at construction.
    #[must_use]
    pub fn exports(&self) -> &[Export] {
        &self.exports
    }

    /// The export at exactly this address.
    #[must_use]
    pub fn find(&self, address: Address) -> Option<&Export> {
        let page = self.page_of_shelf[usize::from(address.shelf)].checked_sub(1)?;
        let number = self.pages[page as usize][usize::from(address.slot)].checked_sub(1)?;
        self.exports.get(number as usize)
    }
}

/// Why a frame gets no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// Too short, or of another EtherType.
    NotAoe,
    /// A response, one of our own frames, or from a source that no station has.
    NotARequest,
    /// Another version, not addressed to us in person.
    Version,
    /// No export has that address, or the frame is for another station.
    NotOurs,
    /// The command's own part is cut short.
    Truncated,
    /// A command that takes no wildcard was sent to one, or a write not to the export's own MAC.
    Wildcard,
    /// A config string test that did not match.
    StringDiffers,
}

/// Which exports a frame is for.
#[derive(Debug, Clone, Copy)]
pub enum Route<'t> {
    /// None: nothing is answered.
    Silent(Silence),
    /// Exactly one.
    One(&'t Export),
    /// Every export that the address matches: pass each to [`respond`].
    Matching(Address),
}

/// Decides which exports a frame is for. `head` is the frame's first contiguous part; it need not be the whole frame.
#[must_use]
pub fn route<'t>(table: &'t ExportTable, ingress: &Ingress, head: &[u8]) -> Route<'t> {
    let Ok(header) = wire::parse_header(head) else {
        return Route::Silent(Silence::NotAoe);
    };
    if header.is_response() || header.src.is_multicast() || header.src.is_zero() || header.src == ingress.mac
    {
        return Route::Silent(Silence::NotARequest);
    }
    if header.version() != wire::VERSION && header.dst == Mac::BROADCAST {
        return Route::Silent(Silence::Version);
    }
    if !header.address().is_exact() {
        return Route::Matching(header.address());
    }
    match table.find(header.address()) {
        Some(export) => Route::One(export),
        None => Route::Silent(Silence::NotOurs),
    }
}

/// The composed beginning of an answer.
#[derive(Debug, Clone, Copy)]
pub struct ReplyHead {
    /// Header and argument, then zeros.
    pub bytes: [u8; REPLY_HEAD_LEN],
    /// Bytes in use.
    pub len: u8,
}

impl ReplyHead {
    /// A whole answer: padded to the shortest frame.
    #[must_use]
    pub fn whole(head: &[u8]) -> ReplyHead {
        ReplyHead::with_len(head, head.len().max(FRAME_LEN_MIN))
    }

    /// The part before data that follows.
    #[must_use]
    pub fn before_data(head: &[u8]) -> ReplyHead {
        ReplyHead::with_len(head, head.len())
    }

    fn with_len(head: &[u8], len: usize) -> ReplyHead {
        let mut bytes = [0; REPLY_HEAD_LEN];
        bytes[..head.len()].copy_from_slice(head);
        ReplyHead { bytes, len: u8::try_from(len).expect("a header slot is 64 bytes") }
    }
}

/// What is to be done for a frame and an export.
#[derive(Debug, Clone, Copy)]
pub enum Action {
    /// Nothing.
    Silent(Silence),
    /// This is the whole answer.
    Reply(ReplyHead),
    /// This, then the export's IDENTIFY data.
    Identify(ReplyHead),
    /// This, then the export's config string.
    ConfigString(ReplyHead),
    /// Work for the store; the answer comes from [`Io::finish`].
    Io(Io),
}

/// What a request asks of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoKind {
    /// `sectors` sectors are read.
    Read,
    /// `sectors` sectors are written; their bytes begin at [`ATA_DATA_OFFSET`] of the frame.
    Write,
    /// Everything acknowledged is forced to stable media.
    Flush,
}

/// How a request to the store ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done; for a write: durable.
    Done,
    /// The data cannot be read.
    Uncorrectable,
    /// The device failed.
    Fault,
}

/// One read, write or flush.
#[derive(Debug, Clone, Copy)]
pub struct Io {
    /// What is asked.
    pub kind: IoKind,
    /// First sector.
    pub lba: u64,
    /// Sectors, 1..=16; 0 for a flush.
    pub sectors: u8,
    response: AtaHead,
}

impl Io {
    /// The answer's head: with data to follow for a read that is done, else the whole answer.
    #[must_use]
    pub fn finish(&self, outcome: Outcome) -> ReplyHead {
        let (status, error) = match outcome {
            Outcome::Done => (ata::STATUS_DRDY, 0),
            Outcome::Uncorrectable => (ata::STATUS_DRDY | ata::STATUS_ERR, ata::ERROR_UNC),
            Outcome::Fault => (ata::STATUS_DRDY | ata::STATUS_DF | ata::STATUS_ERR, ata::ERROR_ABRT),
        };
        let head = with_status(self.response, status, error);
        if self.kind == IoKind::Read && outcome == Outcome::Done {
            ReplyHead::before_data(head.as_bytes())
        } else {
            ReplyHead::whole(head.as_bytes())
        }
    }

    /// The station that asked.
    #[must_use]
    pub fn initiator(&self) -> Mac {
        self.response.header.dst
    }
}

/// Decides what to do for `frame_len` bytes that begin with `head` and are for `export` (by [`route`]). `head` must hold
/// at least the message's argument, or the whole frame where that is shorter; for Query Config the string too.
#[must_use]
pub fn respond(export: &Export, ingress: &Ingress, head: &[u8], frame_len: usize) -> Action {
    let Ok(header) = wire::parse_header(head) else {
        return Action::Silent(Silence::NotAoe);
    };
    let own_mac = export.mac_on(ingress.ordinal);
    if header.src == own_mac {
        return Action::Silent(Silence::NotARequest);
    }
    if !header.address().matches(export.address) || (header.dst != own_mac && header.dst != Mac::BROADCAST) {
        return Action::Silent(Silence::NotOurs);
    }
    let response = header.response(own_mac, export.address);
    if header.version() != wire::VERSION {
        return error_reply(response, AoeError::UnsupportedVersion);
    }
    match header.command {
        command::ATA => match wire::parse_ata(head) {
            Ok(request) => respond_ata(export, ingress, request, response, frame_len),
            Err(_) => Action::Silent(Silence::Truncated),
        },
        command::CONFIG => match wire::parse_config(head) {
            Ok((request, rest)) => respond_config(export, ingress, request, rest, response),
            Err(_) => Action::Silent(Silence::Truncated),
        },
        _ => error_reply(response, AoeError::UnrecognizedCommand),
    }
}

fn error_reply(response: Header, error: AoeError) -> Action {
    Action::Reply(ReplyHead::whole(response.with_error(error).as_bytes()))
}

fn with_status(head: AtaHead, status: u8, error: u8) -> AtaHead {
    AtaHead { arg: wire::AtaArg { command_status: status, error_feature: error, ..head.arg }, ..head }
}

fn status_reply(response: AtaHead, status: u8, error: u8) -> Action {
    Action::Reply(ReplyHead::whole(with_status(response, status, error).as_bytes()))
}

fn aborted(response: AtaHead) -> Action {
    status_reply(response, ata::STATUS_DRDY | ata::STATUS_ERR, ata::ERROR_ABRT)
}

fn respond_ata(
    export: &Export,
    ingress: &Ingress,
    request: &AtaHead,
    header: Header,
    frame_len: usize,
) -> Action {
    // As vblade: the answer's sector count is what remains to be transferred, the LBA registers stay.
    let arg = wire::AtaArg { sector_count: 0, reserved: [0; 2], ..request.arg };
    let response = AtaHead { header, arg };
    let exact = request.header.address().is_exact();
    let (kind, lba) = match request.arg.command_status {
        ata::IDENTIFY => {
            let head = with_status(response, ata::STATUS_DRDY, 0);
            return Action::Identify(ReplyHead::before_data(head.as_bytes()));
        }
        _ if !exact => return Action::Silent(Silence::Wildcard),
        ata::READ => (IoKind::Read, request.arg.lba28()),
        ata::READ_EXT => (IoKind::Read, request.arg.lba48()),
        ata::WRITE => (IoKind::Write, request.arg.lba28()),
        ata::WRITE_EXT => (IoKind::Write, request.arg.lba48()),
        ata::FLUSH_CACHE | ata::FLUSH_CACHE_EXT => {
            return Action::Io(Io { kind: IoKind::Flush, lba: 0, sectors: 0, response });
        }
        ata::CHECK_POWER_MODE => {
            let active = wire::AtaArg { sector_count: 0xff, ..arg };
            return status_reply(AtaHead { header, arg: active }, ata::STATUS_DRDY, 0);
        }
        _ => return aborted(response),
    };
    respond_transfer(
        export,
        ingress,
        request,
        Io { kind, lba, sectors: request.arg.sector_count, response },
        frame_len,
    )
}

/// A read or write: checks its count, data and range.
fn respond_transfer(
    export: &Export,
    ingress: &Ingress,
    request: &AtaHead,
    io: Io,
    frame_len: usize,
) -> Action {
    let is_write = io.kind == IoKind::Write;
    if is_write && request.header.dst != export.mac_on(ingress.ordinal) {
        return Action::Silent(Silence::Wildcard);
    }
    let data_len = usize::from(io.sectors) * SECTOR_LEN;
    let short = is_write && frame_len < ATA_DATA_OFFSET + data_len;
    if io.sectors > ingress.sectors_max || short || (is_write && export.read_only) {
        return aborted(io.response);
    }
    // `lba` is below 2^48 and the count below 2^8: no overflow.
    if io.lba + u64::from(io.sectors) > export.size_sectors {
        return status_reply(io.response, ata::STATUS_DRDY | ata::STATUS_ERR, ata::ERROR_IDNF);
    }
    if io.sectors == 0 {
        return status_reply(io.response, ata::STATUS_DRDY, 0);
    }
    Action::Io(io)
}

fn respond_config(
    export: &Export,
    ingress: &Ingress,
    request: &ConfigHead,
    rest: &[u8],
    response: Header,
) -> Action {
    let sub_command = request.arg.version_ccmd & 0x0f;
    let current = &export.config_string[..];
    let asked = rest.get(..usize::from(request.arg.string_len.get()));
    let answered = match sub_command {
        ccmd::READ => true,
        ccmd::TEST => asked == Some(current),
        ccmd::TEST_PREFIX => asked.is_some_and(|prefix| current.starts_with(prefix)),
        _ => return error_reply(response, AoeError::BadArgument),
    };
    if !answered {
        return Action::Silent(Silence::StringDiffers);
    }
    let head =
        ConfigHead { header: response, arg: config_arg(current.len(), ingress.sectors_max, sub_command) };
    if current.is_empty() {
        Action::Reply(ReplyHead::whole(head.as_bytes()))
    } else {
        Action::ConfigString(ReplyHead::before_data(head.as_bytes()))
    }
}

fn config_arg(string_len: usize, sectors_max: u8, sub_command: u8) -> ConfigArg {
    ConfigArg {
        buffer_count: U16::new(BUFFER_COUNT),
        firmware_version: U16::new(FIRMWARE_VERSION),
        sector_count: sectors_max,
        version_ccmd: (wire::VERSION << 4) | sub_command,
        string_len: U16::new(u16::try_from(string_len).expect("config strings have at most 1024 bytes")),
    }
}

/// An unsolicited Query Config answer to everyone, which initiators take as a discovery: sent when an export appears or
/// changes.
#[must_use]
pub fn advertisement(export: &Export, ingress: &Ingress) -> Action {
    let own_mac = export.mac_on(ingress.ordinal);
    let asked = Header::request(own_mac, Mac::BROADCAST, export.address, command::CONFIG, 0);
    let header = asked.response(own_mac, export.address);
    let head =
        ConfigHead { header, arg: config_arg(export.config_string.len(), ingress.sectors_max, ccmd::READ) };
    if export.config_string.is_empty() {
        Action::Reply(ReplyHead::whole(head.as_bytes()))
    } else {
        Action::ConfigString(ReplyHead::before_data(head.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::byteorder::big_endian::U32;

    use super::*;
    use crate::wire::AtaArg;

    const CLIENT: Mac = Mac([0x52, 0x54, 0, 0, 0, 9]);
    const NIC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
    const SIZE_SECTORS: u64 = 1000;
    const INGRESS: Ingress = Ingress { mac: NIC, ordinal: 1, sectors_max: 16 };

    fn export(shelf: u16, slot: u8) -> Export {
        Export {
            key: u32::from(slot),
            address: Address { shelf, slot },
            mac: Mac([2, 0, 0, 0, slot, 0x40]),
            size_sectors: SIZE_SECTORS,
            read_only: false,
            serial: "s".into(),
            config_string: Vec::new(),
        }
    }

    fn own_mac() -> Mac {
        export(1, 2).mac_on(INGRESS.ordinal)
    }

    fn ata_frame(edit: impl FnOnce(&mut AtaHead), data_len: usize) -> Vec<u8> {
        let mut head = AtaHead {
            header: Header::request(
                own_mac(),
                CLIENT,
                Address { shelf: 1, slot: 2 },
                command::ATA,
                0xdead_beef,
            ),
            arg: AtaArg::read_write_ext(8, 2, false),
        };
        edit(&mut head);
        let mut frame = head.as_bytes().to_vec();
        frame.resize(ATA_DATA_OFFSET + data_len, 0x5a);
        frame
    }

    fn config_frame(ccmd: u8, string: &[u8], edit: impl FnOnce(&mut ConfigHead)) -> Vec<u8> {
        let header = Header::request(Mac::BROADCAST, CLIENT, Address::ANY, command::CONFIG, 7);
        let arg = ConfigArg {
            buffer_count: U16::ZERO,
            firmware_version: U16::ZERO,
            sector_count: 0,
            version_ccmd: 0x10 | ccmd,
            string_len: U16::new(u16::try_from(string.len()).unwrap()),
        };
        let mut head = ConfigHead { header, arg };
        edit(&mut head);
        [head.as_bytes(), string].concat()
    }

    fn act(frame: &[u8]) -> Action {
        act_on(&export(1, 2), frame)
    }

    fn act_on(export: &Export, frame: &[u8]) -> Action {
        let table = ExportTable::new(vec![export.clone()]).unwrap();
        match route(&table, &INGRESS, frame) {
            Route::Silent(why) => Action::Silent(why),
            Route::One(export) => respond(export, &INGRESS, frame, frame.len()),
            Route::Matching(address) => {
                assert!(!address.is_exact());
                respond(export, &INGRESS, frame, frame.len())
            }
        }
    }

    fn silence(frame: &[u8]) -> Silence {
        match act(frame) {
            Action::Silent(why) => why,
            other => panic!("answered: {other:?}"),
        }
    }

    /// (status, error) of a whole ATA answer, after checking everything else that every answer must have.
    fn status(action: Action) -> (u8, u8) {
        let Action::Reply(reply) = action else { panic!("not a whole answer: {action:?}") };
        status_of(&reply, FRAME_LEN_MIN)
    }

    fn status_of(reply: &ReplyHead, len: usize) -> (u8, u8) {
        assert_eq!(usize::from(reply.len), len);
        let head = wire::parse_ata(&reply.bytes).unwrap();
        assert_eq!((head.header.dst, head.header.src), (CLIENT, own_mac()));
        assert_eq!(head.header.version_flags, 0x18, "a response without the error flag");
        assert_eq!(head.header.address(), Address { shelf: 1, slot: 2 });
        assert_eq!(head.header.tag.get(), 0xdead_beef);
        assert!(reply.bytes[ATA_DATA_OFFSET..].iter().all(|&b| b == 0));
        (head.arg.command_status, head.arg.error_feature)
    }

    fn aoe_error(action: Action) -> u8 {
        let Action::Reply(reply) = action else { panic!("not a whole answer: {action:?}") };
        assert_eq!(usize::from(reply.len), FRAME_LEN_MIN);
        let header = wire::parse_header(&reply.bytes).unwrap();
        assert_eq!(header.version_flags, 0x1c);
        assert!(reply.bytes[wire::HEADER_LEN..].iter().all(|&b| b == 0));
        header.error
    }

    fn io(action: Action) -> Io {
        let Action::Io(io) = action else { panic!("no I/O: {action:?}") };
        io
    }

    #[test]
    fn frames_that_are_not_requests_to_us_get_silence() {
        let table = [
            (ata_frame(|_| (), 0)[..23].to_vec(), Silence::NotAoe),
            (ata_frame(|h| h.header.ethertype = U16::new(0x0800), 0), Silence::NotAoe),
            (ata_frame(|h| h.header.version_flags = 0x18, 0), Silence::NotARequest),
            (ata_frame(|h| h.header.src = NIC, 0), Silence::NotARequest),
            (ata_frame(|h| h.header.src = own_mac(), 0), Silence::NotARequest),
            (ata_frame(|h| h.header.src = Mac::BROADCAST, 0), Silence::NotARequest),
            (ata_frame(|h| h.header.src = Mac::default(), 0), Silence::NotARequest),
            (ata_frame(|h| h.header.slot = 3, 0), Silence::NotOurs),
            (ata_frame(|h| h.header.shelf = U16::new(2), 0), Silence::NotOurs),
            (ata_frame(|h| h.header.dst = Mac([2, 9, 9, 9, 9, 9]), 0), Silence::NotOurs),
            (ata_frame(|h| h.header.dst = NIC, 0), Silence::NotOurs),
            (ata_frame(|_| (), 0)[..35].to_vec(), Silence::Truncated),
            (config_frame(0, b"", |_| ())[..31].to_vec(), Silence::Truncated),
        ];
        for (i, (frame, why)) in table.iter().enumerate() {
            assert_eq!(silence(frame), *why, "case {i}");
        }
    }

    #[test]
    fn a_foreign_version_is_told_so_only_in_person() {
        assert_eq!(aoe_error(act(&ata_frame(|h| h.header.version_flags = 0x20, 0))), 5);
        let broadcast = ata_frame(|h| (h.header.version_flags, h.header.dst) = (0x20, Mac::BROADCAST), 0);
        assert_eq!(silence(&broadcast), Silence::Version);
    }

    #[test]
    fn unknown_commands_are_told_so() {
        for code in [2, 3, 4, 0x55, 0xf0, 0xff] {
            assert_eq!(aoe_error(act(&ata_frame(|h| h.header.command = code, 0))), 1, "command {code:#x}");
        }
    }

    #[test]
    fn reserved_flags_are_tolerated() {
        assert_eq!(io(act(&ata_frame(|h| h.header.version_flags = 0x13, 0))).kind, IoKind::Read);
    }

    #[test]
    fn query_config_answers_a_short_broadcast() {
        let Action::Reply(reply) = act(&config_frame(0, b"", |_| ())) else { panic!() };
        let (head, rest) = wire::parse_config(&reply.bytes).unwrap();
        assert_eq!((head.header.src, head.header.dst), (own_mac(), CLIENT));
        assert_eq!(head.header.address(), Address { shelf: 1, slot: 2 });
        assert_eq!(head.arg.buffer_count.get(), BUFFER_COUNT);
        assert_eq!((head.arg.sector_count, head.arg.version_ccmd, head.arg.string_len.get()), (16, 0x10, 0));
        assert_eq!(usize::from(reply.len), FRAME_LEN_MIN);
        assert!(rest.iter().all(|&b| b == 0));
    }

    #[test]
    fn query_config_read_ignores_the_filler_of_aoeping() {
        assert!(matches!(act(&config_frame(0, &[0xed; 1024], |_| ())), Action::Reply(_)));
        assert!(matches!(
            act(&config_frame(0, b"", |h| h.arg.string_len = U16::new(1024))),
            Action::Reply(_)
        ));
    }

    #[test]
    fn config_string_tests_match_or_stay_silent() {
        let named = Export { config_string: b"rack7".to_vec(), ..export(1, 2) };
        let answered = |ccmd, string: &[u8]| match act_on(&named, &config_frame(ccmd, string, |_| ())) {
            Action::ConfigString(head) => {
                assert_eq!(head.len, 32);
                assert_eq!(head.bytes[30..32], [0, 5]);
                assert_eq!(head.bytes[29], 0x10 | ccmd);
                true
            }
            Action::Silent(Silence::StringDiffers) => false,
            other => panic!("{other:?}"),
        };
        assert!(answered(ccmd::TEST, b"rack7"));
        assert!(!answered(ccmd::TEST, b"rack"));
        assert!(!answered(ccmd::TEST, b"rack8"));
        assert!(answered(ccmd::TEST_PREFIX, b"rack"));
        assert!(answered(ccmd::TEST_PREFIX, b""));
        assert!(!answered(ccmd::TEST_PREFIX, b"rack77"));
        let longer_than_the_frame = config_frame(ccmd::TEST, b"rack7", |h| h.arg.string_len = U16::new(6));
        assert!(matches!(act_on(&named, &longer_than_the_frame), Action::Silent(Silence::StringDiffers)));
        assert_eq!(aoe_error(act_on(&named, &config_frame(9, b"", |_| ()))), 2);
    }

    #[test]
    fn identify_is_served_whatever_the_count_the_payload_or_the_wildcard() {
        for (count, data_len) in [(1, 0), (0, 0), (1, 8192)] {
            let frame = ata_frame(|h| h.arg = AtaArg { sector_count: count, ..AtaArg::identify() }, data_len);
            let Action::Identify(head) = act(&frame) else { panic!("count {count}") };
            assert_eq!(status_of(&head, ATA_DATA_OFFSET), (0x40, 0));
        }
        let anyone = ata_frame(
            |h| {
                h.arg = AtaArg::identify();
                h.header.dst = Mac::BROADCAST;
                (h.header.shelf, h.header.slot) = (U16::new(0xffff), 0xff);
            },
            0,
        );
        assert!(matches!(act(&anyone), Action::Identify(_)));
    }

    #[test]
    fn reads_and_writes_within_the_volume_become_io() {
        for (code, kind, lba) in [
            (ata::READ, IoKind::Read, 8),
            (ata::READ_EXT, IoKind::Read, 8),
            (ata::WRITE, IoKind::Write, 8),
            (ata::WRITE_EXT, IoKind::Write, 8),
        ] {
            // The direction is the command's; a device nibble is no part of a 28-bit address.
            let edit = |h: &mut AtaHead| {
                h.arg.command_status = code;
                if code & 4 == 0 {
                    h.arg.lba = [8, 0, 0, 0xe0, 0xff, 0xff];
                }
            };
            let io = io(act(&ata_frame(edit, 1024)));
            assert_eq!((io.kind, io.lba, io.sectors, io.initiator()), (kind, lba, 2, CLIENT));
        }
    }

    #[test]
    fn the_end_of_the_volume_is_exact() {
        let at = |lba: u64, n: u8| act(&ata_frame(|h| h.arg = AtaArg::read_write_ext(lba, n, false), 0));
        assert_eq!(io(at(SIZE_SECTORS - 1, 1)).lba, SIZE_SECTORS - 1);
        for (lba, n) in [(SIZE_SECTORS - 1, 2), (SIZE_SECTORS, 1), ((1 << 48) - 1, 16), (SIZE_SECTORS + 1, 0)]
        {
            assert_eq!(status(at(lba, n)), (0x41, 0x10), "{lba}+{n}");
        }
    }

    #[test]
    fn bad_transfers_are_ata_errors_never_aoe_errors() {
        let too_many = ata_frame(|h| h.arg = AtaArg::read_write_ext(0, 17, false), 0);
        assert_eq!(status(act(&too_many)), (0x41, 0x04));
        let short_write = ata_frame(|h| h.arg = AtaArg::read_write_ext(0, 2, true), 1000);
        assert_eq!(status(act(&short_write)), (0x41, 0x04));
        let frozen = Export { read_only: true, ..export(1, 2) };
        let write = ata_frame(|h| h.arg = AtaArg::read_write_ext(0, 2, true), 1024);
        assert_eq!(status(act_on(&frozen, &write)), (0x41, 0x04));
        for code in [0xb0, 0xc8, 0x25, 0x00, 0xff, 0x06] {
            assert_eq!(
                status(act(&ata_frame(|h| h.arg.command_status = code, 0))),
                (0x41, 0x04),
                "{code:#x}"
            );
        }
    }

    #[test]
    fn a_write_with_surplus_bytes_is_cut_to_its_count() {
        let io = io(act(&ata_frame(|h| h.arg = AtaArg::read_write_ext(0, 1, true), 4096)));
        assert_eq!((io.kind, io.sectors), (IoKind::Write, 1));
    }

    #[test]
    fn a_count_of_zero_is_no_data_and_no_error() {
        for write in [false, true] {
            assert_eq!(
                status(act(&ata_frame(|h| h.arg = AtaArg::read_write_ext(0, 0, write), 0))),
                (0x40, 0)
            );
        }
    }

    #[test]
    fn only_identify_takes_a_wildcard_and_writes_take_only_the_exports_mac() {
        let wild = |write| {
            ata_frame(move |h| (h.header.slot, h.arg) = (0xff, AtaArg::read_write_ext(0, 1, write)), 512)
        };
        assert_eq!(silence(&wild(false)), Silence::Wildcard);
        assert_eq!(silence(&wild(true)), Silence::Wildcard);
        let broadcast = |write| {
            ata_frame(
                move |h| (h.header.dst, h.arg) = (Mac::BROADCAST, AtaArg::read_write_ext(0, 1, write)),
                512,
            )
        };
        assert_eq!(silence(&broadcast(true)), Silence::Wildcard);
        assert_eq!(io(act(&broadcast(false))).kind, IoKind::Read);
    }

    #[test]
    fn flush_and_power_mode() {
        for code in [ata::FLUSH_CACHE, ata::FLUSH_CACHE_EXT] {
            let io = io(act(&ata_frame(|h| h.arg.command_status = code, 0)));
            assert_eq!(io.kind, IoKind::Flush);
            assert_eq!(status_of(&io.finish(Outcome::Done), FRAME_LEN_MIN), (0x40, 0));
        }
        let Action::Reply(reply) = act(&ata_frame(|h| h.arg.command_status = ata::CHECK_POWER_MODE, 0))
        else {
            panic!()
        };
        assert_eq!((reply.bytes[26], reply.bytes[27]), (0xff, 0x40));
    }

    #[test]
    fn outcomes_are_ata_status() {
        let read = io(act(&ata_frame(|_| (), 0)));
        assert_eq!(status_of(&read.finish(Outcome::Done), ATA_DATA_OFFSET), (0x40, 0));
        assert_eq!(status_of(&read.finish(Outcome::Uncorrectable), FRAME_LEN_MIN), (0x41, 0x40));
        let write = io(act(&ata_frame(|h| h.arg = AtaArg::read_write_ext(0, 2, true), 1024)));
        assert_eq!(status_of(&write.finish(Outcome::Done), FRAME_LEN_MIN), (0x40, 0));
        assert_eq!(status_of(&write.finish(Outcome::Fault), FRAME_LEN_MIN), (0x61, 0x04));
    }

    #[test]
    fn an_advertisement_is_a_response_with_tag_zero_to_everyone() {
        let Action::Reply(reply) = advertisement(&export(1, 2), &INGRESS) else { panic!() };
        let header = wire::parse_header(&reply.bytes).unwrap();
        assert_eq!((header.dst, header.src), (Mac::BROADCAST, own_mac()));
        assert_eq!((header.version_flags, header.tag.get()), (0x18, 0));
    }

    #[test]
    fn the_table_finds_every_export_and_refuses_duplicates() {
        let exports: Vec<Export> =
            (0..20u16).flat_map(|shelf| (0..50u8).map(move |slot| export(shelf * 3000, slot))).collect();
        let table = ExportTable::new(exports.clone()).unwrap();
        for export in &exports {
            assert_eq!(table.find(export.address), Some(export));
        }
        for missing in [Address { shelf: 1, slot: 0 }, Address { shelf: 0, slot: 50 }, Address::ANY] {
            assert_eq!(table.find(missing), None);
        }
        let twice = vec![export(1, 2), export(1, 2)];
        assert_eq!(ExportTable::new(twice).unwrap_err(), DuplicateAddress(Address { shelf: 1, slot: 2 }));
    }

    fn almost_a_frame() -> impl Strategy<Value = Vec<u8>> {
        let valid = prop_oneof![
            Just(ata_frame(|_| (), 1024)),
            Just(ata_frame(|h| h.arg = AtaArg::read_write_ext(0, 2, true), 1024)),
            Just(config_frame(1, b"abc", |_| ())),
        ];
        let edits = proptest::collection::vec((0usize..64, any::<u8>()), 0..6);
        (valid, edits, 0usize..1100).prop_map(|(mut frame, edits, len)| {
            for (at, byte) in edits {
                if let Some(b) = frame.get_mut(at) {
                    *b = byte;
                }
            }
            frame.truncate(len);
            frame
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

        /// No bytes make the target panic, answer a response, touch sectors beyond the end, or lose the tag.
        #[test]
        fn any_frame_is_handled(frame in prop_oneof![almost_a_frame(), proptest::collection::vec(any::<u8>(), 0..200)]) {
            match act(&frame) {
                Action::Silent(_) => {}
                Action::Io(io) => {
                    prop_assert!(io.lba + u64::from(io.sectors) <= SIZE_SECTORS);
                    prop_assert!(io.kind != IoKind::Write || frame.len() >= ATA_DATA_OFFSET + usize::from(io.sectors) * 512);
                    prop_assert!(frame[14] & 0x08 == 0);
                }
                Action::Reply(head) | Action::Identify(head) | Action::ConfigString(head) => {
                    prop_assert!(frame[14] & 0x08 == 0);
                    let header = wire::parse_header(&head.bytes).unwrap();
                    let asked = wire::parse_header(&frame).unwrap();
                    prop_assert_eq!(header.tag, U32::new(asked.tag.get()));
                    prop_assert!(header.is_response() && header.address().is_exact());
                    prop_assert!(!header.dst.is_multicast());
                }
            }
        }
    }
}
