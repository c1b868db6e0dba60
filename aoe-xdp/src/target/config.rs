//! Query Config: what the target can hold, and the config string with its tests and changes.
//!
//! A change that would leave the string as it is is answered at once, so that an initiator whose answer was lost, and
//! asks again, gets its answer: the string of a *set if empty* is there already, and so is the replacement of a
//! *test and replace*.

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::U16;

use super::change::{Change, ChangeOutcome, SetRule};
use super::{Action, Answer, BUFFER_COUNT, Body, Export, FIRMWARE_VERSION, Ingress, Request, Silence};
use crate::wire::{
    self, AoeError, CONFIG_STRING_LEN_MAX, CONFIG_STRING_OFFSET, ConfigArg, ConfigHead, Header, Mac, ccmd,
    command,
};

/// A change of the string, as the frame has it.
struct Wish<'f> {
    rule: Rule<'f>,
    string: &'f [u8],
    /// Bytes of the frame up to its end.
    frame_len: usize,
}

enum Rule<'f> {
    IfEmpty,
    Always,
    Replace { expected: &'f [u8] },
}

impl<'f> Wish<'f> {
    /// `None` if a length is beyond its limit or beyond the frame.
    fn parse(asked: &ConfigHead, rest: &'f [u8]) -> Option<Wish<'f>> {
        let first = string_in(asked, rest)?;
        let frame_len = CONFIG_STRING_OFFSET + first.len();
        let rule = match sub_command(asked) {
            ccmd::SET_IF_EMPTY => Rule::IfEmpty,
            ccmd::FORCE_SET => Rule::Always,
            ccmd::TEST_AND_REPLACE => {
                let (len, rest) = rest[first.len()..].split_first_chunk::<2>()?;
                let string = rest.get(..usize::from(u16::from_be_bytes(*len)))?;
                let fits = string.len() <= CONFIG_STRING_LEN_MAX;
                let rule = Rule::Replace { expected: first };
                return fits.then_some(Wish { rule, string, frame_len: frame_len + 2 + string.len() });
            }
            _ => return None,
        };
        Some(Wish { rule, string: first, frame_len })
    }
}

fn sub_command(asked: &ConfigHead) -> u8 {
    asked.arg.version_ccmd & 0x0f
}

/// The string of a request; `None` if its length is beyond the limit or beyond the frame.
fn string_in<'f>(asked: &ConfigHead, rest: &'f [u8]) -> Option<&'f [u8]> {
    rest.get(..usize::from(asked.arg.string_len.get())).filter(|string| string.len() <= CONFIG_STRING_LEN_MAX)
}

pub(super) fn respond(export: &Export, ingress: &Ingress, request: Request<'_>) -> Action {
    let Ok((asked, rest)) = wire::parse_config(request.head) else {
        return Action::Silent(Silence::Truncated);
    };
    let current = &export.config_string[..];
    let answer =
        |error| Action::Answer(answer(export, ingress, request.head, request.response, asked, error));
    match sub_command(asked) {
        ccmd::READ => answer(None),
        test @ (ccmd::TEST | ccmd::TEST_PREFIX) => match string_in(asked, rest) {
            Some(string) if string == current => answer(None),
            Some(prefix) if test == ccmd::TEST_PREFIX && current.starts_with(prefix) => answer(None),
            Some(_) => Action::Silent(Silence::StringDiffers),
            None => request.error_if_named(AoeError::BadArgument),
        },
        _ if !request.is_named => Action::Silent(Silence::Wildcard),
        _ => {
            let Some(wish) = Wish::parse(asked, rest) else { return request.error(AoeError::BadArgument) };
            if !export.allow.config.permits(asked.header.src) {
                return request.error(AoeError::BadArgument);
            }
            let may = match wish.rule {
                Rule::Always => true,
                Rule::IfEmpty => current.is_empty(),
                Rule::Replace { expected } => expected == current,
            };
            match (wish.string == current, may) {
                (true, _) => answer(None),
                (false, true) => Action::Change { frame_len: wish.frame_len },
                (false, false) => answer(Some(AoeError::ConfigStringPresent)),
            }
        }
    }
}

/// The change that a frame asks for, if [`respond`] said that it asks for one.
pub(super) fn change_in(frame: &[u8]) -> Option<Change> {
    let (asked, rest) = wire::parse_config(frame).ok()?;
    let wish = Wish::parse(asked, rest)?;
    let rule = match wish.rule {
        Rule::IfEmpty => SetRule::IfEmpty,
        Rule::Always => SetRule::Always,
        Rule::Replace { expected } => SetRule::Replace { expected: expected.to_vec() },
    };
    Some(Change::SetString { rule, string: wish.string.to_vec() })
}

/// The answer to a change that has ended.
pub(super) fn finish(
    export: &Export,
    ingress: &Ingress,
    frame: &[u8],
    response: Header,
    outcome: ChangeOutcome,
) -> Option<Answer> {
    let (asked, _) = wire::parse_config(frame).ok()?;
    let error = match outcome {
        ChangeOutcome::Done => None,
        ChangeOutcome::StringPresent => Some(AoeError::ConfigStringPresent),
        ChangeOutcome::MasksFull { .. } | ChangeOutcome::Reserved | ChangeOutcome::Refused => return None,
    };
    Some(answer(export, ingress, frame, response, asked, error))
}

/// An answer with the string in force.
fn answer(
    export: &Export,
    ingress: &Ingress,
    frame: &[u8],
    response: Header,
    asked: &ConfigHead,
    error: Option<AoeError>,
) -> Answer {
    let header = error.map_or(response, |error| response.with_error(error));
    let head = ConfigHead { header, arg: argument(export, ingress, sub_command(asked)) };
    Answer::new(export, frame, head.as_bytes(), Body::ConfigString)
}

fn argument(export: &Export, ingress: &Ingress, sub_command: u8) -> ConfigArg {
    let string_len =
        u16::try_from(export.config_string.len()).expect("config strings have at most 1024 bytes");
    ConfigArg {
        buffer_count: U16::new(BUFFER_COUNT),
        firmware_version: U16::new(FIRMWARE_VERSION),
        sector_count: ingress.sectors_max,
        version_ccmd: (wire::VERSION << 4) | sub_command,
        string_len: U16::new(string_len),
    }
}

/// An unsolicited Query Config answer to one of the export's [audience](Export::audience), which initiators take as a
/// discovery: sent when an export appears or changes.
#[must_use]
pub fn advertisement(export: &Export, ingress: &Ingress, to: Mac) -> Answer {
    let own_mac = export.mac_on(ingress.ordinal);
    let asked = Header::request(own_mac, to, export.address, command::CONFIG, 0);
    let header = asked.response(own_mac, export.address);
    let head = ConfigHead { header, arg: argument(export, ingress, ccmd::READ) };
    Answer::new(export, &[], head.as_bytes(), Body::ConfigString)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        CLIENT, INGRESS, act, act_on, aoe_error, config_frame, export, named, own_mac, permissive, silence,
        whole,
    };
    use super::*;
    use crate::wire::{Address, FRAME_LEN_MIN};

    /// A test-and-replace of the export that [`named`] addresses.
    fn replace_frame(expected: &[u8], string: &[u8]) -> Vec<u8> {
        let mut frame = config_frame(ccmd::TEST_AND_REPLACE, expected, named);
        frame.extend_from_slice(&u16::try_from(string.len()).unwrap().to_be_bytes());
        frame.extend_from_slice(string);
        frame
    }

    fn with_string(string: &[u8]) -> Export {
        Export { config_string: string.to_vec(), ..permissive() }
    }

    /// The whole answer's (error, string), or `None` for a change to be made.
    fn asked_of(export: &Export, frame: &[u8]) -> Option<(u8, Vec<u8>)> {
        match act_on(export, frame) {
            Action::Answer(answer) => {
                let bytes = whole(export, frame, &answer);
                let (head, rest) = wire::parse_config(&bytes).unwrap();
                let string = &rest[..usize::from(head.arg.string_len.get())];
                Some((head.header.error, string.to_vec()))
            }
            Action::Change { frame_len } => {
                assert!(change_in(&frame[..frame_len]).is_some());
                assert!(change_in(&frame[..frame_len - 1]).is_none(), "every byte is needed");
                None
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn query_config_answers_a_short_broadcast() {
        let frame = config_frame(0, b"", |_| ());
        let Action::Answer(answer) = act(&frame) else { panic!() };
        let bytes = whole(&export(1, 2), &frame, &answer);
        let (head, rest) = wire::parse_config(&bytes).unwrap();
        assert_eq!((head.header.src, head.header.dst), (own_mac(), CLIENT));
        assert_eq!(head.header.address(), Address { shelf: 1, slot: 2 });
        assert_eq!(head.arg.buffer_count.get(), BUFFER_COUNT);
        assert_eq!((head.arg.sector_count, head.arg.version_ccmd, head.arg.string_len.get()), (16, 0x10, 0));
        assert_eq!(bytes.len(), FRAME_LEN_MIN);
        assert!(rest.iter().all(|&b| b == 0));
    }

    #[test]
    fn a_read_ignores_the_filler_of_aoeping() {
        assert!(matches!(act(&config_frame(0, &[0xed; 1024], |_| ())), Action::Answer(_)));
        let too_long = config_frame(0, b"", |h| h.arg.string_len = U16::new(1024));
        assert!(matches!(act(&too_long), Action::Answer(_)));
    }

    #[test]
    fn answers_of_every_length_are_padded_and_whole() {
        for len in [0, 1, 27, 28, 29, 32, 33, 1024] {
            let string: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let export = with_string(&string);
            let frame = config_frame(0, b"", |_| ());
            let Action::Answer(answer) = act_on(&export, &frame) else { panic!() };
            let bytes = whole(&export, &frame, &answer);
            assert_eq!(bytes.len(), (32 + len).max(FRAME_LEN_MIN), "string of {len}");
            assert_eq!(bytes[32..32 + len], string);
            assert!(bytes[32 + len..].iter().all(|&b| b == 0));
        }
    }

    #[test]
    fn tests_match_or_stay_silent() {
        let rack7 = with_string(b"rack7");
        let answered = |ccmd, string: &[u8]| match act_on(&rack7, &config_frame(ccmd, string, |_| ())) {
            Action::Answer(answer) => {
                assert_eq!(answer.head.bytes[29..32], [0x10 | ccmd, 0, 5]);
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
    }

    #[test]
    fn lengths_beyond_the_limit_or_the_frame_are_refused_to_who_names_the_target() {
        for code in
            [ccmd::TEST, ccmd::TEST_PREFIX, ccmd::SET_IF_EMPTY, ccmd::FORCE_SET, ccmd::TEST_AND_REPLACE]
        {
            let longer_than_the_frame = |h: &mut ConfigHead| h.arg.string_len = U16::new(6);
            let in_person = config_frame(code, b"rack7", |h| {
                named(h);
                longer_than_the_frame(h);
            });
            assert_eq!(aoe_error(act_on(&permissive(), &in_person)), 2, "sub-command {code}");
            assert_eq!(
                aoe_error(act_on(&permissive(), &config_frame(code, &[7; 1025], named))),
                2,
                "sub-command {code}"
            );
            let to_anyone = config_frame(code, b"rack7", longer_than_the_frame);
            assert!(matches!(act_on(&permissive(), &to_anyone), Action::Silent(_)), "sub-command {code}");
        }
        assert_eq!(aoe_error(act_on(&permissive(), &replace_frame(b"", &[7; 1025]))), 2);
        let mut short = replace_frame(b"abc", b"de");
        short.pop();
        assert_eq!(aoe_error(act_on(&permissive(), &short)), 2);
        short.truncate(CONFIG_STRING_OFFSET + 4);
        assert_eq!(aoe_error(act_on(&permissive(), &short)), 2);
    }

    #[test]
    fn sub_commands_that_nobody_knows_are_refused() {
        for code in 6..16 {
            assert_eq!(aoe_error(act_on(&permissive(), &config_frame(code, b"", named))), 2);
            assert_eq!(silence(&config_frame(code, b"", |_| ())), Silence::Wildcard);
        }
    }

    #[test]
    fn a_string_is_set_under_its_rule_and_what_is_there_already_is_done() {
        let set = |code, string: &[u8]| config_frame(code, string, named);
        let (empty, abc) = (with_string(b""), with_string(b"abc"));
        assert_eq!(asked_of(&empty, &set(ccmd::SET_IF_EMPTY, b"abc")), None);
        assert_eq!(asked_of(&abc, &set(ccmd::SET_IF_EMPTY, b"abc")), Some((0, b"abc".to_vec())));
        assert_eq!(asked_of(&abc, &set(ccmd::SET_IF_EMPTY, b"abd")), Some((4, b"abc".to_vec())));
        assert_eq!(asked_of(&abc, &set(ccmd::SET_IF_EMPTY, b"")), Some((4, b"abc".to_vec())));
        assert_eq!(asked_of(&abc, &set(ccmd::FORCE_SET, b"abd")), None);
        assert_eq!(asked_of(&abc, &set(ccmd::FORCE_SET, b"")), None);
        assert_eq!(asked_of(&abc, &set(ccmd::FORCE_SET, b"abc")), Some((0, b"abc".to_vec())));
        assert_eq!(asked_of(&empty, &set(ccmd::FORCE_SET, &[9; 1024])), None);
        assert_eq!(asked_of(&abc, &replace_frame(b"abc", b"x")), None);
        assert_eq!(asked_of(&abc, &replace_frame(b"abd", b"x")), Some((4, b"abc".to_vec())));
        assert_eq!(asked_of(&abc, &replace_frame(b"zzz", b"abc")), Some((0, b"abc".to_vec())));
        assert_eq!(asked_of(&empty, &replace_frame(b"", b"x")), None);
    }

    #[test]
    fn what_is_asked_is_what_the_frame_says() {
        let change = |frame: &[u8]| change_in(frame).unwrap();
        let string = b"abc".to_vec();
        assert_eq!(
            change(&config_frame(ccmd::SET_IF_EMPTY, b"abc", named)),
            Change::SetString { rule: SetRule::IfEmpty, string: string.clone() }
        );
        assert_eq!(
            change(&config_frame(ccmd::FORCE_SET, b"abc", named)),
            Change::SetString { rule: SetRule::Always, string: string.clone() }
        );
        assert_eq!(
            change(&replace_frame(b"old", b"abc")),
            Change::SetString { rule: SetRule::Replace { expected: b"old".to_vec() }, string }
        );
    }

    #[test]
    fn only_who_may_sets_a_string_and_only_by_name() {
        let frame = config_frame(ccmd::FORCE_SET, b"abc", named);
        assert_eq!(aoe_error(act(&frame)), 2, "nobody may by default");
        assert_eq!(asked_of(&permissive(), &frame), None);
        let to_anyone = config_frame(ccmd::FORCE_SET, b"abc", |_| ());
        assert!(matches!(act_on(&permissive(), &to_anyone), Action::Silent(Silence::Wildcard)));
    }

    #[test]
    fn a_change_is_answered_with_the_string_then_in_force() {
        let frame = config_frame(ccmd::FORCE_SET, b"abc", named);
        let now = with_string(b"abc");
        let end = |outcome| super::super::finish_change(&now, &INGRESS, &frame, outcome);
        for (outcome, error) in [(ChangeOutcome::Done, 0), (ChangeOutcome::StringPresent, 4)] {
            let bytes = whole(&now, &frame, &end(outcome).unwrap());
            let (head, rest) = wire::parse_config(&bytes).unwrap();
            assert_eq!((head.header.error, head.header.is_error()), (error, error != 0));
            assert_eq!((head.arg.version_ccmd, head.arg.string_len.get()), (0x14, 3));
            assert_eq!(&rest[..3], b"abc");
            assert_eq!((head.header.src, head.header.dst), (own_mac(), CLIENT));
        }
        assert!(end(ChangeOutcome::Refused).is_none());
        assert!(end(ChangeOutcome::Reserved).is_none());
    }

    #[test]
    fn an_advertisement_is_a_response_with_tag_zero_to_its_audience() {
        let everyone = export(1, 2);
        assert_eq!(everyone.audience(), [Mac::BROADCAST]);
        let answer = advertisement(&everyone, &INGRESS, Mac::BROADCAST);
        let header = wire::parse_header(&answer.head.bytes).unwrap();
        assert_eq!((header.dst, header.src), (Mac::BROADCAST, own_mac()));
        assert_eq!((header.version_flags, header.tag.get()), (0x18, 0));
        let few = Export { masks: vec![CLIENT], ..export(1, 2) };
        assert_eq!(few.audience(), [CLIENT]);
    }
}
