//! The AoE target without I/O: a frame goes in, what is to be done comes out.
//!
//! Who is answered, and with what, is decided in one order (vblade `aoe()`, VSX): source and flags, address, interface,
//! destination, MAC mask list, version, length, command. Invariants:
//! * No I/O failure is ever an AoE error: Linux drops those and retries until the device is dead. They go into the ATA
//!   status ([`Io::finish`]).
//! * A write is executed only if it is addressed to the export's own MAC, shelf and slot exactly (I6): switches flood, and
//!   a MAC moves with its export.
//! * Nothing that was not asked by name is amplified: a wildcard address is served with what discovery needs (IDENTIFY, and
//!   reading or testing the config string, reading the mask list and the reservation) and gets silence for all else,
//!   errors too: one frame to ten thousand exports is not to become ten thousand errors.
//! * A change (config string, mask list, reservation) is answered only after it is persisted and in force
//!   ([`Action::Change`], [`finish_change`]); one that would change nothing is answered at once.
//! * Who is not entitled to a change by the export's policy is refused with AoE error 2 (bad argument): to him the target
//!   looks like one that has no such sub-command, which every tool knows how to report. Silence would look like a lost
//!   frame, and errors 4 and 6 would say something about the string or the reservation that is not so.
//! * Every answer is at least 60 bytes, padded with zeros; virtual links do not pad.
//! * The range of a command is checked without overflow against the size in force.

mod ata;
mod change;
mod config;
mod export;
mod masks;
mod reserve;
mod table;

use zerocopy::IntoBytes;

pub use self::ata::{Io, IoKind, Outcome};
pub use self::change::{Change, ChangeOutcome, MaskEdit, SetRule};
pub use self::config::advertisement;
pub use self::export::{Allow, AoePolicy, Export, LIST_MAX, ON_ALL_INTERFACES};
pub use self::table::{DuplicateAddress, ExportTable};

use crate::identify::IDENTIFY_LEN;
use crate::wire::{
    self, Address, AoeError, CONFIG_STRING_LEN_MAX, CONFIG_STRING_OFFSET, FRAME_LEN_MIN, Header,
    MASK_DIRECTIVES_OFFSET, Mac, MaskDirective, command,
};

/// Messages that an initiator may have outstanding. Linux uses at most `aoe_maxout` (64) of them; 128 leaves room for its
/// resends.
pub const BUFFER_COUNT: u16 = 128;

/// Firmware version in Query Config answers: the first version of this target.
pub const FIRMWARE_VERSION: u16 = 1;

/// Bytes of [`ReplyHead`]: a header slot.
pub const REPLY_HEAD_LEN: usize = 64;

/// Longest [`Answer`] body: the directives of a failed edit of the mask list.
pub const BODY_LEN_MAX: usize = u8::MAX as usize * size_of::<MaskDirective>();

/// Longest part of a frame that asks for a change: two config strings and a length, or as many directives as can be.
pub const CHANGE_LEN_MAX: usize = CONFIG_STRING_OFFSET + 2 * CONFIG_STRING_LEN_MAX + 2;
const _: () = assert!(CHANGE_LEN_MAX >= MASK_DIRECTIVES_OFFSET + BODY_LEN_MAX);

/// Longest part of a frame that matters to discovery: a config string to test.
pub const DISCOVERY_LEN_MAX: usize = CONFIG_STRING_OFFSET + CONFIG_STRING_LEN_MAX;

/// The interface that a frame came in by.
#[derive(Debug, Clone, Copy)]
pub struct Ingress {
    /// The interface's own MAC.
    pub mac: Mac,
    /// Its ordinal on this node, below 16.
    pub ordinal: u8,
    /// Most sectors of one message on it. Two sectors' answer is longer than every other answer, so whatever is sent fits
    /// a frame of the interface.
    pub sectors_max: u8,
    /// Most sectors that initiators were ever told here. What fitted then may be on its way still when the MTU shrinks:
    /// writes of that length are executed, and reads whose answer does not fit any more get silence. An error would be
    /// passed on to whoever waits for the data, and the MTU may grow again before the initiator gives up.
    pub sectors_told: u8,
}

/// Why a frame gets no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// A read of a length that was advertised once and does not fit the interface's MTU now.
    TooLongNow,
    /// Too short, or of another EtherType.
    NotAoe,
    /// A response, one of our own frames, or from a source that no station has.
    NotARequest,
    /// Another version, not addressed to us in person.
    Version,
    /// No export has that address on that interface, or the frame is for another station.
    NotOurs,
    /// The export's mask list does not have the station.
    Masked,
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
    /// Every export that the address matches: pass each to [`respond`]. Of the frame only the first
    /// [`DISCOVERY_LEN_MAX`] bytes matter.
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
    let in_person = header.dst != Mac::BROADCAST;
    if header.version() != wire::VERSION && !in_person {
        return Route::Silent(Silence::Version);
    }
    let export = match (header.address().is_exact(), in_person) {
        (true, _) => table.find(header.address()),
        (false, true) => table.by_mac(header.dst),
        (false, false) if asks_for_discovery(head, header) => return Route::Matching(header.address()),
        (false, false) => return Route::Silent(Silence::Wildcard),
    };
    export.map_or(Route::Silent(Silence::NotOurs), Route::One)
}

/// Whether a frame asks for something that is served to wildcards.
fn asks_for_discovery(head: &[u8], header: &Header) -> bool {
    use wire::{ata, ccmd, mcmd, rcmd};
    match header.command {
        command::ATA => wire::parse_ata(head).is_ok_and(|asked| asked.arg.command_status == ata::IDENTIFY),
        command::CONFIG => wire::parse_config(head).is_ok_and(|(asked, _)| {
            matches!(asked.arg.version_ccmd & 0x0f, ccmd::READ | ccmd::TEST | ccmd::TEST_PREFIX)
        }),
        command::MAC_MASK => wire::parse_masks(head).is_ok_and(|(asked, _)| asked.arg.mcmd == mcmd::READ),
        command::RESERVE => wire::parse_reserve(head).is_ok_and(|(asked, _)| asked.arg.rcmd == rcmd::READ),
        _ => false,
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

/// An answer that needs no store.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// Its beginning.
    pub head: ReplyHead,
    /// What follows; [`Body::Nothing`] where all fitted into the head.
    pub body: Body,
}

/// What follows the head of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// Nothing.
    Nothing,
    /// The export's IDENTIFY data.
    Identify,
    /// The export's config string.
    ConfigString,
    /// The export's mask list.
    Masks,
    /// Those that the export is reserved for.
    Reservation,
    /// The directives of the request.
    Directives {
        /// How many.
        count: u8,
    },
}

impl Body {
    fn len(self, export: &Export) -> usize {
        match self {
            Body::Nothing => 0,
            Body::Identify => IDENTIFY_LEN,
            Body::ConfigString => export.config_string.len(),
            Body::Masks => export.masks.len() * size_of::<MaskDirective>(),
            Body::Reservation => export.reserved_for.len() * size_of::<Mac>(),
            Body::Directives { count } => usize::from(count) * size_of::<MaskDirective>(),
        }
    }

    /// Writes the body over `out`, which has its length.
    fn write(self, export: &Export, request: &[u8], out: &mut [u8]) {
        match self {
            Body::Nothing => {}
            Body::Identify => {
                let mut data = [0; IDENTIFY_LEN];
                export.identify(&mut data);
                out.copy_from_slice(&data);
            }
            Body::ConfigString => out.copy_from_slice(&export.config_string),
            Body::Masks => {
                for (place, mac) in out.chunks_exact_mut(size_of::<MaskDirective>()).zip(&export.masks) {
                    let directive = MaskDirective { reserved: 0, dcmd: wire::dcmd::NOP, mac: *mac };
                    place.copy_from_slice(directive.as_bytes());
                }
            }
            Body::Reservation => out.copy_from_slice(export.reserved_for.as_bytes()),
            Body::Directives { .. } => {
                out.copy_from_slice(&request[MASK_DIRECTIVES_OFFSET..MASK_DIRECTIVES_OFFSET + out.len()]);
            }
        }
    }
}

impl Answer {
    /// An answer that is all head.
    fn whole(head: &[u8]) -> Answer {
        Answer { head: ReplyHead::whole(head), body: Body::Nothing }
    }

    /// An answer that goes into the head as a whole where it fits.
    fn new(export: &Export, request: &[u8], head: &[u8], body: Body) -> Answer {
        let len = head.len() + body.len(export);
        if len > REPLY_HEAD_LEN {
            return Answer { head: ReplyHead::before_data(head), body };
        }
        let mut bytes = [0; REPLY_HEAD_LEN];
        bytes[..head.len()].copy_from_slice(head);
        body.write(export, request, &mut bytes[head.len()..len]);
        Answer::whole(&bytes[..len])
    }

    /// Writes what follows the head into `out`, for the same export and request as [`respond`] or [`finish_change`] had;
    /// how many bytes that is.
    ///
    /// # Panics
    /// If the request is another one, shorter than its directives.
    #[must_use]
    pub fn write_body(&self, export: &Export, request: &[u8], out: &mut [u8; BODY_LEN_MAX]) -> usize {
        let len = self.body.len(export);
        self.body.write(export, request, &mut out[..len]);
        len
    }
}

/// What is to be done for a frame and an export.
#[derive(Debug, Clone, Copy)]
pub enum Action {
    /// Nothing.
    Silent(Silence),
    /// This is the answer.
    Answer(Answer),
    /// Work for the store; the answer comes from [`Io::finish`].
    Io(Io),
    /// A change to be persisted: [`change_in`] the first `frame_len` bytes of the frame (at most [`CHANGE_LEN_MAX`]) says
    /// which; the answer comes from [`finish_change`], for the same bytes.
    Change {
        /// Bytes of the frame that say all of it.
        frame_len: usize,
    },
}

/// A request as the modules for each command see it.
#[derive(Clone, Copy)]
struct Request<'f> {
    /// The frame's first contiguous part.
    head: &'f [u8],
    /// Bytes of the whole frame.
    frame_len: usize,
    /// The answer's header.
    response: Header,
    /// It names shelf and slot, without a wildcard.
    is_named: bool,
}

impl Request<'_> {
    fn error(&self, error: AoeError) -> Action {
        Action::Answer(Answer::whole(self.response.with_error(error).as_bytes()))
    }

    fn error_if_named(&self, error: AoeError) -> Action {
        if self.is_named { self.error(error) } else { Action::Silent(Silence::Wildcard) }
    }
}

/// Decides what to do for `frame_len` bytes that begin with `head` and are for `export` (by [`route`]). `head` must hold
/// at least the message's argument with its strings and lists, or the whole frame where that is shorter.
#[must_use]
pub fn respond(export: &Export, ingress: &Ingress, head: &[u8], frame_len: usize) -> Action {
    let Ok(header) = wire::parse_header(head) else {
        return Action::Silent(Silence::NotAoe);
    };
    let own_mac = export.mac_on(ingress.ordinal);
    if header.src == own_mac {
        return Action::Silent(Silence::NotARequest);
    }
    let is_ours = header.address().matches(export.address) && export.is_on(ingress.ordinal);
    if !is_ours || (header.dst != own_mac && header.dst != Mac::BROADCAST) {
        return Action::Silent(Silence::NotOurs);
    }
    if !export.is_seen_by(header.src) {
        return Action::Silent(Silence::Masked);
    }
    let response = header.response(own_mac, export.address);
    let request = Request { head, frame_len, response, is_named: header.address().is_exact() };
    if header.version() != wire::VERSION {
        return request.error(AoeError::UnsupportedVersion);
    }
    match header.command {
        command::ATA => ata::respond(export, ingress, request),
        command::CONFIG => config::respond(export, ingress, request),
        command::MAC_MASK => masks::respond(export, request),
        command::RESERVE => reserve::respond(export, request),
        _ => request.error_if_named(AoeError::UnrecognizedCommand),
    }
}

/// The change that a frame asks for, once [`respond`] has called it one: `frame` is as long as that said.
#[must_use]
pub fn change_in(frame: &[u8]) -> Option<Change> {
    match wire::parse_header(frame).ok()?.command {
        command::CONFIG => config::change_in(frame),
        command::MAC_MASK => masks::change_in(frame),
        command::RESERVE => reserve::change_in(frame),
        _ => None,
    }
}

/// The answer to a change that has ended, from the export now in force; `None` for silence. `frame` is what
/// [`change_in`] had.
#[must_use]
pub fn finish_change(
    export: &Export,
    ingress: &Ingress,
    frame: &[u8],
    outcome: ChangeOutcome,
) -> Option<Answer> {
    let header = wire::parse_header(frame).ok()?;
    let response = header.response(export.mac_on(ingress.ordinal), export.address);
    match header.command {
        command::CONFIG => config::finish(export, ingress, frame, response, outcome),
        command::MAC_MASK => masks::finish(export, frame, response, outcome),
        command::RESERVE => reserve::finish(export, frame, response, outcome),
        _ => None,
    }
}

/// What the tests of this module's parts share.
#[cfg(test)]
mod testing {
    use zerocopy::byteorder::big_endian::U16;

    use super::*;
    use crate::wire::{ATA_DATA_OFFSET, AtaArg, AtaHead, ConfigArg, ConfigHead};

    pub(super) const CLIENT: Mac = Mac([0x52, 0x54, 0, 0, 0, 9]);
    pub(super) const NIC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
    pub(super) const SIZE_SECTORS: u64 = 1000;
    pub(super) const INGRESS: Ingress = Ingress { mac: NIC, ordinal: 1, sectors_max: 16, sectors_told: 16 };
    pub(super) const ADDRESS: Address = Address { shelf: 1, slot: 2 };
    pub(super) const TAG: u32 = 0xdead_beef;

    pub(super) fn export(shelf: u16, slot: u8) -> Export {
        Export {
            key: u32::from(slot),
            address: Address { shelf, slot },
            mac: Mac([2, 0, 0, 0, slot, 0x40]),
            size_sectors: SIZE_SECTORS,
            read_only: false,
            serial: "s".into(),
            config_string: Vec::new(),
            on_interfaces: ON_ALL_INTERFACES,
            masks: Vec::new(),
            reserved_for: Vec::new(),
            allow: AoePolicy::default(),
        }
    }

    /// Everyone may change everything.
    pub(super) fn permissive() -> Export {
        let allow = AoePolicy { config: Allow::Anyone, masks: Allow::Anyone, reserve: Allow::Anyone };
        Export { allow, ..export(1, 2) }
    }

    pub(super) fn own_mac() -> Mac {
        export(1, 2).mac_on(INGRESS.ordinal)
    }

    pub(super) fn ata_frame(edit: impl FnOnce(&mut AtaHead), data_len: usize) -> Vec<u8> {
        let mut head = AtaHead {
            header: Header::request(own_mac(), CLIENT, ADDRESS, command::ATA, TAG),
            arg: AtaArg::read_write_ext(8, 2, false),
        };
        edit(&mut head);
        let mut frame = head.as_bytes().to_vec();
        frame.resize(ATA_DATA_OFFSET + data_len, 0x5a);
        frame
    }

    /// To everyone, unless edited.
    pub(super) fn config_frame(ccmd: u8, string: &[u8], edit: impl FnOnce(&mut ConfigHead)) -> Vec<u8> {
        let header = Header::request(Mac::BROADCAST, CLIENT, Address::ANY, command::CONFIG, TAG);
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

    /// Makes a Query Config frame name shelf and slot, to all stations as aoecfg(8) does.
    pub(super) fn named(head: &mut ConfigHead) {
        (head.header.shelf, head.header.slot) = (U16::new(ADDRESS.shelf), ADDRESS.slot);
    }

    pub(super) fn mask_frame(mcmd: u8, directives: &[(u8, Mac)]) -> Vec<u8> {
        let header = Header::request(own_mac(), CLIENT, ADDRESS, command::MAC_MASK, TAG);
        let mut frame = header.as_bytes().to_vec();
        frame.extend([0, mcmd, 0, u8::try_from(directives.len()).unwrap()]);
        for (dcmd, mac) in directives {
            frame.extend([0, *dcmd]);
            frame.extend(mac.0);
        }
        frame
    }

    pub(super) fn reserve_frame(rcmd: u8, macs: &[Mac]) -> Vec<u8> {
        let header = Header::request(own_mac(), CLIENT, ADDRESS, command::RESERVE, TAG);
        let mut frame = header.as_bytes().to_vec();
        frame.extend([rcmd, u8::try_from(macs.len()).unwrap()]);
        frame.extend(macs.iter().flat_map(|mac| mac.0));
        frame
    }

    pub(super) fn act(frame: &[u8]) -> Action {
        act_on(&export(1, 2), frame)
    }

    pub(super) fn act_on(export: &Export, frame: &[u8]) -> Action {
        let table = ExportTable::new(vec![export.clone()]).unwrap();
        match route(&table, &INGRESS, frame) {
            Route::Silent(why) => Action::Silent(why),
            Route::One(export) => respond(export, &INGRESS, frame, frame.len()),
            Route::Matching(address) => {
                assert!(!address.is_exact());
                let cut = &frame[..frame.len().min(DISCOVERY_LEN_MAX)];
                respond(export, &INGRESS, cut, cut.len())
            }
        }
    }

    pub(super) fn silence(frame: &[u8]) -> Silence {
        silence_of(&export(1, 2), frame)
    }

    pub(super) fn silence_of(export: &Export, frame: &[u8]) -> Silence {
        match act_on(export, frame) {
            Action::Silent(why) => why,
            other => panic!("answered: {other:?}"),
        }
    }

    /// The bytes of an answer.
    pub(super) fn whole(export: &Export, request: &[u8], answer: &Answer) -> Vec<u8> {
        let mut body = [0xee; BODY_LEN_MAX];
        let len = answer.write_body(export, request, &mut body);
        let bytes = [&answer.head.bytes[..usize::from(answer.head.len)], &body[..len]].concat();
        assert!(bytes.len() >= FRAME_LEN_MIN);
        bytes
    }

    /// The error of an answer that is nothing but a header.
    pub(super) fn aoe_error(action: Action) -> u8 {
        let Action::Answer(Answer { head, body: Body::Nothing }) = action else {
            panic!("not a whole answer: {action:?}")
        };
        assert_eq!(usize::from(head.len), FRAME_LEN_MIN);
        let header = wire::parse_header(&head.bytes).unwrap();
        assert_eq!((header.version_flags, header.tag.get()), (0x1c, TAG));
        assert!(head.bytes[wire::HEADER_LEN..].iter().all(|&b| b == 0));
        header.error
    }

    pub(super) fn aoe_error_of(export: &Export, frame: &[u8]) -> u8 {
        aoe_error(act_on(export, frame))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::byteorder::big_endian::{U16, U32};

    use super::testing::*;
    use super::*;
    use crate::wire::{ATA_DATA_OFFSET, AtaArg};

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
            (config_frame(0, b"", named)[..31].to_vec(), Silence::Truncated),
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
        for code in [4, 0x55, 0xf0, 0xff] {
            assert_eq!(aoe_error(act(&ata_frame(|h| h.header.command = code, 0))), 1, "command {code:#x}");
            let to_anyone = ata_frame(|h| (h.header.command, h.header.slot) = (code, 0xff), 0);
            assert_eq!(silence(&to_anyone), Silence::Wildcard, "command {code:#x}");
        }
    }

    #[test]
    fn an_export_does_not_exist_on_other_interfaces() {
        let here = Export { on_interfaces: 1 << INGRESS.ordinal, ..export(1, 2) };
        let elsewhere = Export { on_interfaces: !(1 << INGRESS.ordinal), ..export(1, 2) };
        for frame in
            [ata_frame(|_| (), 0), config_frame(0, b"", |_| ()), ata_frame(|h| h.header.command = 9, 0)]
        {
            assert!(!matches!(act_on(&here, &frame), Action::Silent(_)));
            assert_eq!(silence_of(&elsewhere, &frame), Silence::NotOurs);
        }
    }

    #[test]
    fn a_wildcard_sent_to_a_station_is_for_the_one_export_with_that_mac() {
        let table = ExportTable::new((0..4).map(|slot| export(1, slot)).collect()).unwrap();
        for edit in [
            |h: &mut crate::wire::AtaHead| h.header.slot = 0xff,
            |h: &mut crate::wire::AtaHead| h.header.shelf = U16::new(0xffff),
            // Errors are told in person.
            |h: &mut crate::wire::AtaHead| (h.header.slot, h.header.version_flags) = (0xff, 0x20),
        ] {
            let frame = ata_frame(edit, 0);
            let Route::One(found) = route(&table, &INGRESS, &frame) else { panic!() };
            assert_eq!(found.address, ADDRESS);
        }
        let stranger = ata_frame(|h| (h.header.slot, h.header.dst) = (0xff, NIC), 0);
        assert!(matches!(route(&table, &INGRESS, &stranger), Route::Silent(Silence::NotOurs)));
    }

    #[test]
    fn only_what_discovery_needs_is_routed_to_every_export() {
        let table = ExportTable::new(vec![export(1, 2)]).unwrap();
        let is_discovery = |mut frame: Vec<u8>| {
            frame[..6].fill(0xff);
            frame[16..19].fill(0xff);
            match route(&table, &INGRESS, &frame) {
                Route::Matching(Address::ANY) => true,
                Route::Silent(Silence::Wildcard) => false,
                other => panic!("{other:?}"),
            }
        };
        for (frame, expected) in [
            (config_frame(0, b"", |_| ()), true),
            (config_frame(1, b"a", |_| ()), true),
            (config_frame(2, b"a", |_| ()), true),
            (config_frame(3, b"a", |_| ()), false),
            (config_frame(4, b"a", |_| ()), false),
            (config_frame(5, b"a", |_| ()), false),
            (config_frame(0, b"", |_| ())[..31].to_vec(), false),
            (ata_frame(|h| h.arg = AtaArg::identify(), 0), true),
            (ata_frame(|_| (), 0), false),
            (mask_frame(0, &[]), true),
            (mask_frame(1, &[]), false),
            (reserve_frame(0, &[]), true),
            (reserve_frame(1, &[]), false),
            (ata_frame(|h| h.header.command = 0x55, 0), false),
        ] {
            assert_eq!(is_discovery(frame.clone()), expected, "{frame:02x?}");
        }
    }

    #[test]
    fn reserved_flags_are_tolerated() {
        assert!(matches!(act(&ata_frame(|h| h.header.version_flags = 0x13, 0)), Action::Io(_)));
    }

    fn subject() -> Export {
        Export { config_string: b"rack7".to_vec(), ..permissive() }
    }

    fn almost_a_frame() -> impl Strategy<Value = Vec<u8>> {
        let valid = prop_oneof![
            Just(ata_frame(|_| (), 1024)),
            Just(ata_frame(|h| h.arg = AtaArg::read_write_ext(0, 2, true), 1024)),
            Just(config_frame(1, b"abc", |_| ())),
            Just(config_frame(4, b"abc", named)),
            Just(config_frame(5, b"rack7\0\x03abc", |h| {
                named(h);
                h.arg.string_len = U16::new(5);
            })),
            Just(mask_frame(1, &[(1, CLIENT), (2, NIC), (0, NIC), (1, NIC), (1, own_mac()), (7, NIC)])),
            Just(mask_frame(1, &[(1, CLIENT), (1, NIC)])),
            Just(reserve_frame(1, &[CLIENT, NIC])),
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
            match act_on(&subject(), &frame) {
                Action::Silent(_) => {}
                Action::Io(io) => {
                    prop_assert!(io.lba + u64::from(io.sectors) <= SIZE_SECTORS);
                    prop_assert!(io.kind != IoKind::Write || frame.len() >= ATA_DATA_OFFSET + usize::from(io.sectors) * 512);
                    prop_assert!(frame[14] & 0x08 == 0);
                }
                Action::Change { frame_len } => {
                    prop_assert!(frame_len <= frame.len().min(CHANGE_LEN_MAX));
                    prop_assert!(change_in(&frame[..frame_len]).is_some());
                    prop_assert!(frame[16..19] == [0, 1, 2]);
                }
                Action::Answer(answer) => {
                    prop_assert!(frame[14] & 0x08 == 0);
                    let bytes = whole(&subject(), &frame, &answer);
                    // What any interface that takes two sectors can carry.
                    prop_assert!(bytes.len() <= ATA_DATA_OFFSET + 1024);
                    let header = wire::parse_header(&bytes).unwrap();
                    let asked = wire::parse_header(&frame).unwrap();
                    prop_assert_eq!(header.tag, U32::new(asked.tag.get()));
                    prop_assert!(header.is_response() && header.address().is_exact());
                    prop_assert!(!header.dst.is_multicast());
                }
            }
        }
    }
}
