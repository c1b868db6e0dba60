//! MAC Mask List: which stations the export exists for.
//!
//! * An edit is carried out whole or not at all: the list is unchanged when a directive fails.
//! * An edit that would change nothing is answered at once, as if done.
//! * A failed edit is answered with the request's directives, and the position of the one that failed as their count.

use zerocopy::IntoBytes;

use super::change::{Change, ChangeOutcome, MaskEdit};
use super::{Action, Answer, Body, Export, LIST_MAX, Request, Silence};
use crate::wire::{
    self, AoeError, Header, MASK_DIRECTIVES_OFFSET, Mac, MaskArg, MaskDirective, MaskHead, dcmd, mcmd, merror,
};

pub(super) fn respond(export: &Export, request: Request<'_>) -> Action {
    let Ok((asked, rest)) = wire::parse_masks(request.head) else {
        return Action::Silent(Silence::Truncated);
    };
    match asked.arg.mcmd {
        mcmd::READ => Action::Answer(list(export, request.head, request.response, mcmd::READ)),
        _ if !request.is_named => Action::Silent(Silence::Wildcard),
        mcmd::EDIT => {
            let Some(directives) = wire::directives(rest, asked.arg.count) else {
                return request.error(AoeError::BadArgument);
            };
            if !export.allow.masks.permits(asked.header.src) {
                return request.error(AoeError::BadArgument);
            }
            match effect(&export.masks, directives) {
                Effect::Nothing => Action::Answer(list(export, request.head, request.response, mcmd::EDIT)),
                Effect::Change => {
                    Action::Change { frame_len: MASK_DIRECTIVES_OFFSET + std::mem::size_of_val(directives) }
                }
                Effect::Failure { position, error } => {
                    Action::Answer(failure(export, request.head, request.response, asked, position, error))
                }
            }
        }
        _ => request.error(AoeError::BadArgument),
    }
}

enum Effect {
    Nothing,
    Change,
    Failure { position: u8, error: u8 },
}

/// What the directives would do to the list as it is now.
fn effect(current: &[Mac], directives: &[MaskDirective]) -> Effect {
    let mut list = [Mac::default(); LIST_MAX];
    let mut len = current.len().min(LIST_MAX);
    list[..len].copy_from_slice(&current[..len]);
    for (position, directive) in (0u8..).zip(directives) {
        let failure = |error| Effect::Failure { position, error };
        let found = list[..len].iter().position(|mac| *mac == directive.mac);
        match (directive.dcmd, found) {
            (dcmd::NOP, _) | (dcmd::ADD, Some(_)) | (dcmd::DELETE, None) => {}
            (dcmd::ADD, None) => {
                if directive.mac.is_multicast() || directive.mac.is_zero() {
                    return failure(merror::BAD_DIRECTIVE);
                }
                if len == LIST_MAX {
                    return failure(merror::LIST_FULL);
                }
                list[len] = directive.mac;
                len += 1;
            }
            (dcmd::DELETE, Some(at)) => {
                list.copy_within(at + 1..len, at);
                len -= 1;
            }
            _ => return failure(merror::BAD_DIRECTIVE),
        }
    }
    let same = len == current.len() && list[..len].iter().all(|mac| current.contains(mac));
    if same { Effect::Nothing } else { Effect::Change }
}

/// The change that a frame asks for, if [`respond`] said that it asks for one.
pub(super) fn change_in(frame: &[u8]) -> Option<Change> {
    let (asked, rest) = wire::parse_masks(frame).ok()?;
    let directives = wire::directives(rest, asked.arg.count)?;
    let edits = (0u8..).zip(directives).filter(|(_, directive)| directive.dcmd != dcmd::NOP);
    let edits = edits.map(|(position, directive)| MaskEdit {
        position,
        add: directive.dcmd == dcmd::ADD,
        mac: directive.mac,
    });
    Some(Change::EditMasks { edits: edits.collect() })
}

/// The answer to a change that has ended.
pub(super) fn finish(
    export: &Export,
    frame: &[u8],
    response: Header,
    outcome: ChangeOutcome,
) -> Option<Answer> {
    let (asked, _) = wire::parse_masks(frame).ok()?;
    match outcome {
        ChangeOutcome::Done => Some(list(export, frame, response, mcmd::EDIT)),
        ChangeOutcome::MasksFull { position } => {
            Some(failure(export, frame, response, asked, position, merror::LIST_FULL))
        }
        ChangeOutcome::StringPresent | ChangeOutcome::Reserved | ChangeOutcome::Refused => None,
    }
}

/// An answer with the list in force.
fn list(export: &Export, frame: &[u8], header: Header, mcmd: u8) -> Answer {
    let count = u8::try_from(export.masks.len()).expect("a mask list has at most 64 entries");
    let arg = MaskArg { reserved: 0, mcmd, merror: merror::NONE, count };
    Answer::new(export, frame, MaskHead { header, arg }.as_bytes(), Body::Masks)
}

fn failure(
    export: &Export,
    frame: &[u8],
    header: Header,
    asked: &MaskHead,
    position: u8,
    error: u8,
) -> Answer {
    let arg = MaskArg { reserved: 0, mcmd: mcmd::EDIT, merror: error, count: position };
    let body = Body::Directives { count: asked.arg.count };
    Answer::new(export, frame, MaskHead { header, arg }.as_bytes(), body)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        CLIENT, INGRESS, act, act_on, aoe_error, export, mask_frame, permissive, silence_of, whole,
    };
    use super::*;
    use crate::wire::{Address, FRAME_LEN_MIN};

    const A: Mac = CLIENT;

    fn mac(n: u8) -> Mac {
        Mac([2, 0, 0, 0, 0xb, n])
    }

    fn masked(macs: &[Mac]) -> Export {
        Export { masks: macs.to_vec(), ..permissive() }
    }

    /// A whole answer's (merror, count, directives).
    fn answered(export: &Export, frame: &[u8]) -> (u8, u8, Vec<(u8, Mac)>) {
        let Action::Answer(answer) = act_on(export, frame) else { panic!("{:?}", act_on(export, frame)) };
        parsed(&whole(export, frame, &answer))
    }

    fn parsed(bytes: &[u8]) -> (u8, u8, Vec<(u8, Mac)>) {
        let (head, rest) = wire::parse_masks(bytes).unwrap();
        assert_eq!(head.header.version_flags, 0x18, "never the error flag");
        let all = u8::try_from(rest.len() / 8).unwrap();
        let directives = wire::directives(rest, all).unwrap().iter().map(|d| (d.dcmd, d.mac));
        let used = directives.collect::<Vec<_>>();
        let end = used.iter().rposition(|d| *d != (0, Mac::default())).map_or(0, |last| last + 1);
        (head.arg.merror, head.arg.count, used[..end].to_vec())
    }

    #[test]
    fn the_list_is_read_whole() {
        assert_eq!(answered(&masked(&[]), &mask_frame(mcmd::READ, &[])), (0, 0, vec![]));
        let full: Vec<Mac> = std::iter::once(A).chain((1..64).map(mac)).collect();
        let (error, count, list) = answered(&masked(&full), &mask_frame(mcmd::READ, &[]));
        assert_eq!((error, count), (0, 64));
        assert_eq!(list, full.iter().map(|mac| (0, *mac)).collect::<Vec<_>>());
        assert_eq!(answered(&masked(&[A, mac(1)]), &mask_frame(mcmd::READ, &[])).1, 2);
    }

    #[test]
    fn edits_that_change_nothing_are_done_and_others_are_changes() {
        let two = masked(&[A, mac(1)]);
        let done = [
            vec![],
            vec![(dcmd::ADD, A)],
            vec![(dcmd::DELETE, mac(9)), (dcmd::NOP, mac(8))],
            vec![(dcmd::DELETE, A), (dcmd::ADD, A)],
        ];
        for directives in done {
            let (error, count, _) = answered(&two, &mask_frame(mcmd::EDIT, &directives));
            assert_eq!((error, count), (0, 2), "{directives:?}");
        }
        for directives in
            [vec![(dcmd::ADD, mac(2))], vec![(dcmd::DELETE, A)], vec![(dcmd::DELETE, A), (dcmd::ADD, mac(3))]]
        {
            let frame = mask_frame(mcmd::EDIT, &directives);
            let Action::Change { frame_len } = act_on(&two, &frame) else { panic!("{directives:?}") };
            assert_eq!(frame_len, 28 + 8 * directives.len());
        }
        let mixed = mask_frame(mcmd::EDIT, &[(dcmd::NOP, A), (dcmd::ADD, mac(1)), (dcmd::DELETE, mac(2))]);
        assert_eq!(
            change_in(&mixed),
            Some(Change::EditMasks {
                edits: vec![
                    MaskEdit { position: 1, add: true, mac: mac(1) },
                    MaskEdit { position: 2, add: false, mac: mac(2) },
                ]
            })
        );
    }

    #[test]
    fn a_bad_directive_is_named_by_its_position() {
        let empty = masked(&[]);
        for bad in [(7, mac(2)), (dcmd::ADD, Mac::BROADCAST), (dcmd::ADD, Mac::default())] {
            let directives = [(dcmd::ADD, mac(1)), bad, (dcmd::ADD, mac(3))];
            let (error, count, body) = answered(&empty, &mask_frame(mcmd::EDIT, &directives));
            assert_eq!((error, count), (merror::BAD_DIRECTIVE, 1));
            assert_eq!(body, directives, "the request's directives come back");
        }
    }

    #[test]
    fn a_full_list_takes_no_more_but_takes_what_makes_room_first() {
        let full: Vec<Mac> = std::iter::once(A).chain((1..64).map(mac)).collect();
        let over = mask_frame(mcmd::EDIT, &[(dcmd::ADD, A), (dcmd::ADD, mac(99))]);
        let (error, count, _) = answered(&masked(&full), &over);
        assert_eq!((error, count), (merror::LIST_FULL, 1));
        let swap = mask_frame(mcmd::EDIT, &[(dcmd::DELETE, mac(5)), (dcmd::ADD, mac(99))]);
        assert!(matches!(act_on(&masked(&full), &swap), Action::Change { .. }));
        let many: Vec<(u8, Mac)> = (0..65).map(|n| (dcmd::ADD, mac(n))).collect();
        let (error, count, body) = answered(&masked(&[]), &mask_frame(mcmd::EDIT, &many));
        assert_eq!((error, count, body.len()), (merror::LIST_FULL, 64, 65));
    }

    #[test]
    fn nonsense_is_refused() {
        let mut cut = mask_frame(mcmd::EDIT, &[(dcmd::ADD, A); 10]);
        cut.truncate(28 + 16);
        assert_eq!(aoe_error(act_on(&permissive(), &cut)), 2);
        assert_eq!(aoe_error(act_on(&permissive(), &mask_frame(5, &[]))), 2);
        let edit = mask_frame(mcmd::EDIT, &[(dcmd::ADD, A)]);
        assert_eq!(aoe_error(act(&edit)), 2, "nobody may by default");
        let mut to_anyone = edit.clone();
        to_anyone[18] = 0xff;
        assert_eq!(silence_of(&permissive(), &to_anyone), Silence::Wildcard);
    }

    #[test]
    fn who_is_not_listed_gets_silence_whatever_it_asks() {
        use super::super::testing::{ata_frame, config_frame, named};
        let others = masked(&[mac(1)]);
        let frames = [
            mask_frame(mcmd::READ, &[]),
            ata_frame(|_| (), 0),
            ata_frame(|h| h.header.command = 0x55, 0),
            ata_frame(|h| h.header.version_flags = 0x20, 0),
            config_frame(0, b"", |_| ()),
            config_frame(0, b"", named),
        ];
        for frame in frames {
            assert_eq!(silence_of(&others, &frame), Silence::Masked);
            assert!(!matches!(act_on(&masked(&[mac(1), A]), &frame), Action::Silent(_)));
        }
    }

    #[test]
    fn a_change_is_answered_with_the_list_then_in_force() {
        let now = masked(&[mac(1), mac(2)]);
        let frame = mask_frame(mcmd::EDIT, &[(dcmd::ADD, mac(1)), (dcmd::ADD, mac(2)), (dcmd::DELETE, A)]);
        let end = |outcome| super::super::finish_change(&now, &INGRESS, &frame, outcome);
        let done = whole(&now, &frame, &end(ChangeOutcome::Done).unwrap());
        assert_eq!(parsed(&done), (0, 2, vec![(0, mac(1)), (0, mac(2))]));
        assert_eq!(done.len(), FRAME_LEN_MIN);
        let full = whole(&now, &frame, &end(ChangeOutcome::MasksFull { position: 1 }).unwrap());
        let (error, count, body) = parsed(&full);
        assert_eq!((error, count, body.len()), (merror::LIST_FULL, 1, 3));
        assert!(end(ChangeOutcome::Refused).is_none());
        assert_eq!(export(1, 2).address, Address { shelf: 1, slot: 2 });
    }
}
