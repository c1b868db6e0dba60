//! ATA commands: IDENTIFY and CHECK POWER MODE are answered here, reads, writes and flushes become work for the store.

use zerocopy::IntoBytes;

use super::{Action, Answer, Body, Export, Ingress, ReplyHead, Request, Silence};
use crate::wire::{self, ATA_DATA_OFFSET, AoeError, AtaHead, Mac, SECTOR_LEN, ata};

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

    /// The tag that the station gave it.
    #[must_use]
    pub fn tag(&self) -> u32 {
        self.response.header.tag.get()
    }
}

fn with_status(head: AtaHead, status: u8, error: u8) -> AtaHead {
    AtaHead { arg: wire::AtaArg { command_status: status, error_feature: error, ..head.arg }, ..head }
}

fn status_answer(response: AtaHead, status: u8, error: u8) -> Action {
    Action::Answer(Answer::whole(with_status(response, status, error).as_bytes()))
}

fn aborted(response: AtaHead) -> Action {
    status_answer(response, ata::STATUS_DRDY | ata::STATUS_ERR, ata::ERROR_ABRT)
}

pub(super) fn respond(export: &Export, ingress: &Ingress, request: Request<'_>) -> Action {
    let Ok(asked) = wire::parse_ata(request.head) else {
        return Action::Silent(Silence::Truncated);
    };
    // As vblade: the answer's sector count is what remains to be transferred, the LBA registers stay.
    let header = request.response;
    let arg = wire::AtaArg { sector_count: 0, reserved: [0; 2], ..asked.arg };
    let response = AtaHead { header, arg };
    let (kind, lba) = match asked.arg.command_status {
        ata::IDENTIFY => {
            let head = with_status(response, ata::STATUS_DRDY, 0);
            return Action::Answer(Answer::new(export, request.head, head.as_bytes(), Body::Identify));
        }
        _ if !request.is_named => return Action::Silent(Silence::Wildcard),
        ata::READ => (IoKind::Read, asked.arg.lba28()),
        ata::READ_EXT => (IoKind::Read, asked.arg.lba48()),
        ata::WRITE => (IoKind::Write, asked.arg.lba28()),
        ata::WRITE_EXT => (IoKind::Write, asked.arg.lba48()),
        ata::FLUSH_CACHE | ata::FLUSH_CACHE_EXT if export.is_reserved_against(asked.header.src) => {
            return request.error(AoeError::TargetReserved);
        }
        ata::FLUSH_CACHE | ata::FLUSH_CACHE_EXT => {
            return Action::Io(Io { kind: IoKind::Flush, lba: 0, sectors: 0, response });
        }
        ata::CHECK_POWER_MODE => {
            let active = wire::AtaArg { sector_count: 0xff, ..arg };
            return status_answer(AtaHead { header, arg: active }, ata::STATUS_DRDY, 0);
        }
        ata::SET_FEATURES if ata::FEATURES_ACCEPTED.contains(&asked.arg.error_feature) => {
            return status_answer(response, ata::STATUS_DRDY, 0);
        }
        _ => return aborted(response),
    };
    respond_transfer(
        export,
        ingress,
        request,
        asked,
        Io { kind, lba, sectors: asked.arg.sector_count, response },
    )
}

/// A read or write: checks who asks, then its count, data and range.
fn respond_transfer(
    export: &Export,
    ingress: &Ingress,
    request: Request<'_>,
    asked: &AtaHead,
    io: Io,
) -> Action {
    let is_write = io.kind == IoKind::Write;
    if is_write && asked.header.dst != export.mac_on(ingress.ordinal) {
        return Action::Silent(Silence::Wildcard);
    }
    if export.is_reserved_against(asked.header.src) {
        return request.error(AoeError::TargetReserved);
    }
    let data_len = usize::from(io.sectors) * SECTOR_LEN;
    let short = is_write && request.frame_len < ATA_DATA_OFFSET + data_len;
    if io.sectors > ingress.sectors_told.max(ingress.sectors_max) || short || (is_write && export.read_only) {
        return aborted(io.response);
    }
    if io.sectors > ingress.sectors_max && !is_write {
        return Action::Silent(Silence::TooLongNow);
    }
    // `lba` is below 2^48 and the count below 2^8: no overflow.
    if io.lba + u64::from(io.sectors) > export.size_sectors {
        return status_answer(io.response, ata::STATUS_DRDY | ata::STATUS_ERR, ata::ERROR_IDNF);
    }
    if io.sectors == 0 {
        return status_answer(io.response, ata::STATUS_DRDY, 0);
    }
    Action::Io(io)
}

#[cfg(test)]
mod tests {
    use zerocopy::byteorder::big_endian::U16;

    use super::super::testing::{
        ADDRESS, CLIENT, INGRESS, SIZE_SECTORS, TAG, act, act_on, ata_frame, export, own_mac, silence,
    };
    use super::*;
    use crate::wire::{AtaArg, FRAME_LEN_MIN};

    /// (status, error) of a whole ATA answer, after checking everything else that every answer must have.
    fn status(action: Action) -> (u8, u8) {
        let Action::Answer(Answer { head, body: Body::Nothing }) = action else {
            panic!("not a whole answer: {action:?}")
        };
        status_of(&head, FRAME_LEN_MIN)
    }

    fn status_of(reply: &ReplyHead, len: usize) -> (u8, u8) {
        assert_eq!(usize::from(reply.len), len);
        let head = wire::parse_ata(&reply.bytes).unwrap();
        assert_eq!((head.header.dst, head.header.src), (CLIENT, own_mac()));
        assert_eq!(head.header.version_flags, 0x18, "a response without the error flag");
        assert_eq!(head.header.address(), ADDRESS);
        assert_eq!(head.header.tag.get(), TAG);
        assert!(reply.bytes[ATA_DATA_OFFSET..].iter().all(|&b| b == 0));
        (head.arg.command_status, head.arg.error_feature)
    }

    fn io(action: Action) -> Io {
        let Action::Io(io) = action else { panic!("no I/O: {action:?}") };
        io
    }

    #[test]
    fn identify_is_served_whatever_the_count_the_payload_or_the_wildcard() {
        for (count, data_len) in [(1, 0), (0, 0), (1, 8192)] {
            let frame = ata_frame(|h| h.arg = AtaArg { sector_count: count, ..AtaArg::identify() }, data_len);
            let Action::Answer(Answer { head, body: Body::Identify }) = act(&frame) else {
                panic!("count {count}")
            };
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
        assert!(matches!(act(&anyone), Action::Answer(Answer { body: Body::Identify, .. })));
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

    /// Case 81: the MTU shrank after 16 sectors were advertised.
    #[test]
    fn case_81_what_was_advertised_once_is_written_or_met_with_silence() {
        let now = Ingress { sectors_max: 2, ..INGRESS };
        let asked = |sectors: u8, write: bool, told: u8| {
            let data_len = if write { usize::from(sectors) * SECTOR_LEN } else { 0 };
            let frame = ata_frame(|h| h.arg = AtaArg::read_write_ext(0, sectors, write), data_len);
            crate::target::respond(&export(1, 2), &Ingress { sectors_told: told, ..now }, &frame, frame.len())
        };
        assert_eq!(io(asked(2, false, 16)).sectors, 2);
        assert_eq!(io(asked(16, true, 16)).sectors, 16);
        assert!(matches!(asked(16, false, 16), Action::Silent(Silence::TooLongNow)));
        for write in [false, true] {
            assert_eq!(status(asked(17, write, 16)), (0x41, 0x04), "never advertised");
            assert_eq!(status(asked(3, write, 0)), (0x41, 0x04), "never advertised");
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
        let power = act(&ata_frame(|h| h.arg.command_status = ata::CHECK_POWER_MODE, 0));
        let Action::Answer(answer) = power else { panic!() };
        assert_eq!((answer.head.bytes[26], answer.head.bytes[27]), (0xff, 0x40));
        for (feature, answer) in [(0x02, (0x40, 0)), (0x82, (0x40, 0)), (0xaa, (0x40, 0)), (0x90, (0x41, 4))]
        {
            let edit = |h: &mut AtaHead| {
                (h.arg.command_status, h.arg.error_feature) = (ata::SET_FEATURES, feature);
            };
            assert_eq!(status(act(&ata_frame(edit, 0))), answer, "feature {feature:#x}");
        }
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
}
