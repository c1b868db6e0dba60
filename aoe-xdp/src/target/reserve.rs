//! Reserve/Release: which stations may read, write and flush. IDENTIFY, Query Config, MAC Mask List and Reserve/Release
//! itself are served to everyone.
//!
//! Every answer has the list in force, errors too, so that an initiator sees who holds the reservation.

use zerocopy::IntoBytes;

use super::change::{Change, ChangeOutcome};
use super::{Action, Answer, Body, Export, LIST_MAX, Request, Silence};
use crate::wire::{self, AoeError, Header, Mac, RESERVE_MACS_OFFSET, ReserveArg, ReserveHead, rcmd};

pub(super) fn respond(export: &Export, request: Request<'_>) -> Action {
    let Ok((asked, rest)) = wire::parse_reserve(request.head) else {
        return Action::Silent(Silence::Truncated);
    };
    let answer = |error| Action::Answer(answer(export, request.head, request.response, asked, error));
    match asked.arg.rcmd {
        rcmd::READ => answer(None),
        _ if !request.is_named => Action::Silent(Silence::Wildcard),
        rcmd::SET | rcmd::FORCE_SET => {
            let client = asked.header.src;
            let Some(macs) = wishes(asked, rest) else { return answer(Some(AoeError::BadArgument)) };
            if !export.allow.reserve.permits(client) {
                return answer(Some(AoeError::BadArgument));
            }
            if asked.arg.rcmd == rcmd::SET && export.is_reserved_against(client) {
                return answer(Some(AoeError::TargetReserved));
            }
            if is_same(macs, &export.reserved_for) {
                return answer(None);
            }
            Action::Change { frame_len: RESERVE_MACS_OFFSET + std::mem::size_of_val(macs) }
        }
        _ => answer(Some(AoeError::BadArgument)),
    }
}

/// The MACs of a request; `None` if they are not all there, too many, or not those of stations.
fn wishes<'f>(asked: &ReserveHead, rest: &'f [u8]) -> Option<&'f [Mac]> {
    let macs = wire::macs(rest, asked.arg.count)?;
    let is_bad = |mac: &Mac| mac.is_multicast() || mac.is_zero();
    (macs.len() <= LIST_MAX && !macs.iter().any(is_bad)).then_some(macs)
}

/// Whether the two name the same stations, in whatever order and however often.
fn is_same(one: &[Mac], other: &[Mac]) -> bool {
    one.iter().all(|mac| other.contains(mac)) && other.iter().all(|mac| one.contains(mac))
}

/// The change that a frame asks for, if [`respond`] said that it asks for one.
pub(super) fn change_in(frame: &[u8]) -> Option<Change> {
    let (asked, rest) = wire::parse_reserve(frame).ok()?;
    let mut macs = Vec::new();
    for mac in wishes(asked, rest)? {
        if !macs.contains(mac) {
            macs.push(*mac);
        }
    }
    Some(Change::Reserve { macs, force: asked.arg.rcmd == rcmd::FORCE_SET })
}

/// The answer to a change that has ended.
pub(super) fn finish(
    export: &Export,
    frame: &[u8],
    response: Header,
    outcome: ChangeOutcome,
) -> Option<Answer> {
    let (asked, _) = wire::parse_reserve(frame).ok()?;
    match outcome {
        ChangeOutcome::Done => Some(answer(export, frame, response, asked, None)),
        ChangeOutcome::Reserved => {
            Some(answer(export, frame, response, asked, Some(AoeError::TargetReserved)))
        }
        ChangeOutcome::StringPresent | ChangeOutcome::MasksFull { .. } | ChangeOutcome::Refused => None,
    }
}

/// An answer with the list in force.
fn answer(
    export: &Export,
    frame: &[u8],
    response: Header,
    asked: &ReserveHead,
    error: Option<AoeError>,
) -> Answer {
    let header = error.map_or(response, |error| response.with_error(error));
    let count = u8::try_from(export.reserved_for.len()).expect("a reservation has at most 64 entries");
    let head = ReserveHead { header, arg: ReserveArg { rcmd: asked.arg.rcmd, count } };
    Answer::new(export, frame, head.as_bytes(), Body::Reservation)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        CLIENT, INGRESS, act_on, aoe_error_of, ata_frame, config_frame, export, mask_frame, named,
        permissive, reserve_frame, silence_of, whole,
    };
    use super::*;
    use crate::wire::{AtaArg, ata};

    const OTHER: Mac = Mac([2, 0, 0, 0, 0xb, 1]);

    fn reserved_for(macs: &[Mac]) -> Export {
        Export { reserved_for: macs.to_vec(), ..permissive() }
    }

    /// A whole answer's (error, list), or `None` for a change to be made.
    fn asked_of(export: &Export, frame: &[u8]) -> Option<(u8, Vec<Mac>)> {
        match act_on(export, frame) {
            Action::Answer(answer) => Some(parsed(&whole(export, frame, &answer))),
            Action::Change { frame_len } => {
                assert_eq!(frame_len, frame.len());
                None
            }
            other => panic!("{other:?}"),
        }
    }

    fn parsed(bytes: &[u8]) -> (u8, Vec<Mac>) {
        let (head, rest) = wire::parse_reserve(bytes).unwrap();
        assert_eq!(head.header.is_error(), head.header.error != 0);
        (head.header.error, wire::macs(rest, head.arg.count).unwrap().to_vec())
    }

    #[test]
    fn the_list_is_read_by_everyone() {
        assert_eq!(asked_of(&reserved_for(&[]), &reserve_frame(rcmd::READ, &[])), Some((0, vec![])));
        assert_eq!(
            asked_of(&reserved_for(&[OTHER]), &reserve_frame(rcmd::READ, &[])),
            Some((0, vec![OTHER]))
        );
        let full: Vec<Mac> = (0..64).map(|n| Mac([2, 0, 0, 0, 0xb, n])).collect();
        assert_eq!(asked_of(&reserved_for(&full), &reserve_frame(rcmd::READ, &[])), Some((0, full)));
    }

    #[test]
    fn a_free_target_is_taken_and_a_taken_one_only_by_force() {
        let set = |code, macs: &[Mac]| reserve_frame(code, macs);
        assert_eq!(asked_of(&reserved_for(&[]), &set(rcmd::SET, &[CLIENT])), None);
        assert_eq!(asked_of(&reserved_for(&[]), &set(rcmd::SET, &[])), Some((0, vec![])));
        assert_eq!(
            asked_of(&reserved_for(&[CLIENT]), &set(rcmd::SET, &[CLIENT, CLIENT])),
            Some((0, vec![CLIENT]))
        );
        assert_eq!(asked_of(&reserved_for(&[CLIENT]), &set(rcmd::SET, &[OTHER])), None);
        assert_eq!(asked_of(&reserved_for(&[CLIENT]), &set(rcmd::SET, &[])), None, "a release");
        assert_eq!(asked_of(&reserved_for(&[OTHER]), &set(rcmd::SET, &[CLIENT])), Some((6, vec![OTHER])));
        assert_eq!(asked_of(&reserved_for(&[OTHER]), &set(rcmd::SET, &[])), Some((6, vec![OTHER])));
        assert_eq!(asked_of(&reserved_for(&[OTHER]), &set(rcmd::FORCE_SET, &[CLIENT])), None);
        assert_eq!(
            change_in(&set(rcmd::FORCE_SET, &[CLIENT, OTHER, CLIENT])),
            Some(Change::Reserve { macs: vec![CLIENT, OTHER], force: true })
        );
        assert_eq!(change_in(&set(rcmd::SET, &[])), Some(Change::Reserve { macs: vec![], force: false }));
    }

    #[test]
    fn nonsense_is_refused_with_the_list() {
        let held = reserved_for(&[CLIENT]);
        let mut short = reserve_frame(rcmd::SET, &[CLIENT; 3]);
        short[25] = 200;
        let too_many = reserve_frame(rcmd::SET, &[OTHER; 65]);
        for frame in [
            short,
            too_many,
            reserve_frame(9, &[]),
            reserve_frame(rcmd::SET, &[Mac::BROADCAST]),
            reserve_frame(rcmd::FORCE_SET, &[Mac::default()]),
        ] {
            assert_eq!(asked_of(&held, &frame), Some((2, vec![CLIENT])));
        }
        let default = Export { reserved_for: vec![OTHER], ..export(1, 2) };
        let force = reserve_frame(rcmd::FORCE_SET, &[CLIENT]);
        assert_eq!(asked_of(&default, &force), Some((2, vec![OTHER])), "nobody may by default");
        let mut to_anyone = force;
        to_anyone[18] = 0xff;
        assert_eq!(silence_of(&held, &to_anyone), Silence::Wildcard);
    }

    #[test]
    fn a_reservation_keeps_others_from_the_data_and_from_nothing_else() {
        let held = reserved_for(&[OTHER]);
        let with = |code, edit: fn(&mut AtaArg)| {
            ata_frame(
                move |h| {
                    h.arg.command_status = code;
                    edit(&mut h.arg);
                },
                1024,
            )
        };
        for code in
            [ata::READ, ata::READ_EXT, ata::WRITE, ata::WRITE_EXT, ata::FLUSH_CACHE, ata::FLUSH_CACHE_EXT]
        {
            assert_eq!(aoe_error_of(&held, &with(code, |_| ())), 6, "{code:#x}");
            assert_eq!(aoe_error_of(&held, &with(code, |arg| arg.sector_count = 0)), 6, "{code:#x}");
            let mine = reserved_for(&[OTHER, CLIENT]);
            assert!(matches!(act_on(&mine, &with(code, |_| ())), Action::Io(_)), "{code:#x}");
        }
        for frame in [
            with(ata::IDENTIFY, |_| ()),
            with(ata::CHECK_POWER_MODE, |_| ()),
            config_frame(0, b"", named),
            mask_frame(0, &[]),
        ] {
            let Action::Answer(answer) = act_on(&held, &frame) else { panic!() };
            assert_eq!(answer.head.bytes[14..16], [0x18, 0]);
        }
    }

    #[test]
    fn a_change_is_answered_with_the_list_then_in_force() {
        let now = reserved_for(&[CLIENT]);
        let frame = reserve_frame(rcmd::SET, &[CLIENT]);
        let end = |outcome| super::super::finish_change(&now, &INGRESS, &frame, outcome);
        for (outcome, error) in [(ChangeOutcome::Done, 0), (ChangeOutcome::Reserved, 6)] {
            assert_eq!(parsed(&whole(&now, &frame, &end(outcome).unwrap())), (error, vec![CLIENT]));
        }
        assert!(end(ChangeOutcome::Refused).is_none());
    }
}
