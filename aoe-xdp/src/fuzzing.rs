//! What fuzzing gives to the parser and to the state machine, and what must hold whatever it gives.
//!
//! Built for tests and for the targets in `fuzz/` only. A failed assertion is the finding. What must hold:
//! * One frame has at most one effect for each export: silence, an answer, a request to the store, or a change.
//! * An answer goes to the station that asked, from the export's own MAC, with the export's own address; it has at least 60
//!   bytes, at most what the interface carries, and nothing but zeros as padding. Nobody that the mask list hides the export
//!   from is answered at all.
//! * A request to the store lies inside the export; a write brings its data and named the export in every way.
//! * A change is one that the policy allows, and within the limits of the lists.

use zerocopy::IntoBytes;

use crate::target::{
    self, Action, Allow, Answer, AoePolicy, BODY_LEN_MAX, CHANGE_LEN_MAX, Change, ChangeOutcome, Export,
    ExportTable, Ingress, IoKind, LIST_MAX, ON_ALL_INTERFACES, Outcome, ReplyHead, Route, SetRule, change_in,
    finish_change, respond, route,
};
use crate::wire::{
    self, ATA_DATA_OFFSET, Address, CONFIG_STRING_LEN_MAX, FRAME_LEN_MIN, Mac, SECTOR_LEN, command,
};

/// Bytes of a frame that lie in its first chunk.
const HEAD_LEN: usize = 3840;
/// A station that seeds use, and that policies name.
pub const CLIENT: Mac = Mac([0x52, 0x54, 0, 0, 0, 9]);
/// The interface's own MAC.
pub const NIC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
const SIZE_SECTORS: u64 = (1 << 28) + 17;

/// Gives bytes to every parser of frames.
pub fn parse(frame: &[u8]) {
    let _ = (wire::parse_header(frame), wire::parse_ata(frame), wire::parse_config(frame));
    if let Ok((head, rest)) = wire::parse_masks(frame) {
        let _ = wire::directives(rest, head.arg.count);
    }
    if let Ok((head, rest)) = wire::parse_reserve(frame) {
        let _ = wire::macs(rest, head.arg.count);
    }
}

/// Gives a sequence of frames to a target with three exports.
///
/// `bytes` are: one that says how the exports and the interface are set up (see [`World::new`]), then for each frame one that
/// says how the store or the change ends, two for its length, low byte first, and the frame; the last frame may be cut.
pub fn sequence(bytes: &[u8]) {
    let Some((&setup, mut rest)) = bytes.split_first() else { return };
    let mut world = World::new(setup);
    while let [end, low, high, tail @ ..] = rest {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(tail.len());
        let (frame, next) = tail.split_at(len);
        world.receive(frame, *end);
        rest = next;
    }
}

/// Frames as [`sequence`] takes them.
#[must_use]
pub fn encode<'f>(setup: u8, frames: impl IntoIterator<Item = (u8, &'f [u8])>) -> Vec<u8> {
    let mut bytes = vec![setup];
    for (end, frame) in frames {
        bytes.push(end);
        let len = u16::try_from(frame.len()).unwrap_or(u16::MAX);
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&frame[..usize::from(len)]);
    }
    bytes
}

/// A target with its exports.
pub struct World {
    exports: ExportTable,
    ingress: Ingress,
    /// What its frames have led to.
    pub effects: Effects,
}

/// How often frames had what effect on an export.
#[derive(Debug, Default, Clone, Copy)]
pub struct Effects {
    /// Answers that needed no store.
    pub answers: u64,
    /// Requests to the store.
    pub requests: u64,
    /// Changes that were carried out.
    pub changes: u64,
}

impl World {
    /// Bits 0 and 1: sectors of a message; 2 and 3: who may change what; 4: the first export is read-only; 5: the second
    /// is on another interface only; 6 and 7: the interface's ordinal.
    #[must_use]
    pub fn new(setup: u8) -> World {
        let allowed = match setup >> 2 & 3 {
            0 => Allow::Nobody,
            1 => Allow::Only(vec![CLIENT]),
            _ => Allow::Anyone,
        };
        let masks = if setup >> 2 & 3 == 3 { Allow::Nobody } else { allowed.clone() };
        let allow = AoePolicy { config: allowed.clone(), masks, reserve: allowed };
        let ordinal = setup >> 6;
        let export = |number: u8| Export {
            key: u32::from(number),
            address: [
                Address { shelf: 1, slot: 2 },
                Address { shelf: 1, slot: 3 },
                Address { shelf: 256, slot: 0 },
            ][usize::from(number)],
            mac: Mac([2, 0, 0, 0, number, 0x40]),
            size_sectors: if number == 2 { 9 } else { SIZE_SECTORS },
            read_only: number == 0 && setup >> 4 & 1 == 1,
            serial: "serial".into(),
            config_string: Vec::new(),
            on_interfaces: if number == 1 && setup >> 5 & 1 == 1 {
                !(1 << ordinal)
            } else {
                ON_ALL_INTERFACES
            },
            masks: Vec::new(),
            reserved_for: Vec::new(),
            allow: allow.clone(),
        };
        let sectors_max = 2 << (setup & 3);
        // With an odd ordinal the MTU has shrunk.
        let sectors_told = if ordinal & 1 == 1 { 16 } else { sectors_max };
        World {
            exports: ExportTable::new((0..3).map(export).collect()).expect("three addresses"),
            ingress: Ingress { mac: NIC, ordinal, sectors_max, sectors_told },
            effects: Effects::default(),
        }
    }

    /// A frame comes in; bits 0 to 2 of `end` say how a change ends, bits 3 and 4 how the store does.
    ///
    /// # Panics
    /// If the target does what it never may.
    pub fn receive(&mut self, frame: &[u8], end: u8) {
        let head = &frame[..frame.len().min(HEAD_LEN)];
        let (mut changed, mut effects) = (None, self.effects);
        match route(&self.exports, &self.ingress, head) {
            Route::Silent(_) => {}
            Route::One(export) => changed = self.serve(export, frame, head, end, &mut effects),
            Route::Matching(address) => {
                let cut = &head[..head.len().min(target::DISCOVERY_LEN_MAX)];
                for export in self.exports.exports().iter().filter(|export| address.matches(export.address)) {
                    let served = self.serve(export, frame, cut, end, &mut effects);
                    assert!(served.is_none(), "a wildcard changed an export");
                }
            }
        }
        self.effects = effects;
        if let Some(changed) = changed {
            let others = self.exports.exports().iter().filter(|export| export.key != changed.key);
            let exports = others.cloned().chain([changed.clone()]).collect();
            self.exports = ExportTable::new(exports).expect("the same addresses");
        }
    }

    /// What one export makes of a frame; the export as changed, where it is.
    fn serve(
        &self,
        export: &Export,
        frame: &[u8],
        head: &[u8],
        end: u8,
        effects: &mut Effects,
    ) -> Option<Export> {
        let action = respond(export, &self.ingress, head, frame.len());
        if let Action::Silent(_) = action {
            return None;
        }
        let asked = wire::parse_header(head).expect("what is no frame has no effect");
        let (is_named, is_ours) =
            (asked.address().is_exact(), asked.dst == export.mac_on(self.ingress.ordinal));
        assert!(!asked.is_response() && !asked.src.is_multicast() && asked.src != NIC);
        assert!(asked.address().matches(export.address) && export.is_on(self.ingress.ordinal));
        assert!(is_ours || asked.dst == Mac::BROADCAST);
        assert!(export.is_seen_by(asked.src), "the mask list hides the export from this station");
        match action {
            Action::Silent(_) => None,
            Action::Answer(answer) => {
                effects.answers += 1;
                self.check(export, frame, head, &answer);
                None
            }
            Action::Io(io) => {
                effects.requests += 1;
                assert!(is_named && !export.is_reserved_against(asked.src));
                assert_eq!((io.initiator(), io.tag()), (asked.src, asked.tag.get()));
                let data_len = usize::from(io.sectors) * SECTOR_LEN;
                match io.kind {
                    IoKind::Flush => assert_eq!(io.sectors, 0),
                    IoKind::Read | IoKind::Write => {
                        let Ingress { sectors_max, sectors_told, .. } = self.ingress;
                        let most = if io.kind == IoKind::Read { sectors_max } else { sectors_told };
                        assert!((1..=most).contains(&io.sectors));
                        let end = io.lba.checked_add(io.sectors.into()).expect("no overflow");
                        assert!(end <= export.size_sectors);
                    }
                }
                if io.kind == IoKind::Write {
                    assert!(is_ours && !export.read_only && frame.len() >= ATA_DATA_OFFSET + data_len);
                }
                let ended =
                    [Outcome::Done, Outcome::Uncorrectable, Outcome::Fault][usize::from(end >> 3) % 3];
                let reply = io.finish(ended);
                let body = if io.kind == IoKind::Read && ended == Outcome::Done { data_len } else { 0 };
                self.check_reply(export, frame, head, &reply, body);
                None
            }
            Action::Change { frame_len } => {
                // To a broadcast too: so aoecfg sends it.
                assert!(is_named && frame_len <= CHANGE_LEN_MAX.min(head.len()));
                let change = change_in(&frame[..frame_len]).expect("a change says what it is");
                let allowed = match asked.command {
                    command::CONFIG => &export.allow.config,
                    command::MAC_MASK => &export.allow.masks,
                    _ => &export.allow.reserve,
                };
                assert!(allowed.permits(asked.src), "the policy does not allow it");
                let (changed, outcome) = carry_out(export, &change, end);
                effects.changes += u64::from(outcome == ChangeOutcome::Done);
                if let Some(answer) = finish_change(&changed, &self.ingress, &frame[..frame_len], outcome) {
                    self.check(&changed, frame, &frame[..frame_len], &answer);
                }
                Some(changed)
            }
        }
    }

    fn check(&self, export: &Export, frame: &[u8], head: &[u8], answer: &Answer) {
        let mut body = [0; BODY_LEN_MAX];
        let len = answer.write_body(export, head, &mut body);
        self.check_reply(export, frame, head, &answer.head, len);
    }

    fn check_reply(&self, export: &Export, frame: &[u8], head: &[u8], reply: &ReplyHead, body_len: usize) {
        let asked = wire::parse_header(head).expect("what is no frame has no answer");
        let len = usize::from(reply.len) + body_len;
        let longest = (ATA_DATA_OFFSET + usize::from(self.ingress.sectors_max) * SECTOR_LEN).max(frame.len());
        assert!((FRAME_LEN_MIN..=longest).contains(&len), "an answer of {len} bytes");
        assert!(body_len == 0 || usize::from(reply.len) < FRAME_LEN_MIN, "what is padded has no body");
        assert!(reply.bytes[usize::from(reply.len)..].iter().all(|&byte| byte == 0));
        let header = wire::parse_header(&reply.bytes).expect("an answer is a frame");
        let own_mac = export.mac_on(self.ingress.ordinal);
        assert_eq!((header.dst, header.src, header.address()), (asked.src, own_mac, export.address));
        assert!(header.is_response() && header.version() == wire::VERSION);
        assert_eq!((header.command, header.tag), (asked.command, asked.tag));
    }
}

/// Changes an export as the control process does, or says that it cannot be.
fn carry_out(export: &Export, change: &Change, end: u8) -> (Export, ChangeOutcome) {
    let mut changed = export.clone();
    if end & 7 == 1 {
        return (changed, ChangeOutcome::Refused);
    }
    match change {
        Change::SetString { rule, string } => {
            assert!(string.len() <= CONFIG_STRING_LEN_MAX);
            let may = match rule {
                SetRule::Always => true,
                SetRule::IfEmpty => export.config_string.is_empty() || export.config_string == *string,
                SetRule::Replace { expected } => export.config_string == *expected,
            };
            if !may {
                return (changed, ChangeOutcome::StringPresent);
            }
            changed.config_string.clone_from(string);
        }
        Change::EditMasks { edits } => {
            for edit in edits {
                if !edit.add {
                    changed.masks.retain(|mac| *mac != edit.mac);
                } else if !changed.masks.contains(&edit.mac) {
                    if changed.masks.len() == LIST_MAX {
                        return (export.clone(), ChangeOutcome::MasksFull { position: edit.position });
                    }
                    changed.masks.push(edit.mac);
                }
            }
        }
        Change::Reserve { macs, force } => {
            assert!(macs.len() <= LIST_MAX);
            // Two that ask at once: the other one was first.
            if !force && end & 7 == 2 {
                return (changed, ChangeOutcome::Reserved);
            }
            changed.reserved_for.clone_from(macs);
        }
    }
    (changed, ChangeOutcome::Done)
}

/// Real frames, by what they ask for: where fuzzing begins.
#[must_use]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use wire::{AtaArg, AtaHead, Header, ccmd, mcmd, rcmd};
    let own = Mac([2, 0, 0, 0, 0, 0x40]);
    let address = Address { shelf: 1, slot: 2 };
    let everywhere = Address { shelf: 0xffff, slot: 0xff };
    let header = |dst, address, command| Header::request(dst, CLIENT, address, command, 0x0001_a3f0);
    let ata = |dst, address, arg: AtaArg, data_len: usize| {
        let mut frame = AtaHead { header: header(dst, address, command::ATA), arg }.as_bytes().to_vec();
        frame.resize(frame.len() + data_len, 0x5a);
        frame
    };
    let plain =
        |dst, address, command, rest: &[u8]| [header(dst, address, command).as_bytes(), rest].concat();
    let config = |sub_command: u8, string: &[u8], len: u16| {
        let [high, low] = len.to_be_bytes();
        let arg = [0, 0, 0, 0, 0, 0x10 | sub_command, high, low];
        plain(own, address, command::CONFIG, &[&arg[..], string].concat())
    };
    let directive = |dcmd: u8, number: u8| [0, dcmd, 0x52, 0x54, 0, 0, 0, number];
    let flush = AtaArg { command_status: wire::ata::FLUSH_CACHE_EXT, ..AtaArg::read_write_ext(0, 0, false) };
    let replace = [&b"disk"[..], &4_u16.to_be_bytes(), b"tape"].concat();
    let masks = [&[0, mcmd::EDIT, 0, 2][..], &directive(1, 9), &directive(2, 8)].concat();
    vec![
        ("discovery", plain(Mac::BROADCAST, everywhere, command::CONFIG, &[0; 8])),
        ("config-read", config(ccmd::READ, &[], 0)),
        ("config-test", config(ccmd::TEST, b"disk", 4)),
        ("config-prefix", config(ccmd::TEST_PREFIX, b"di", 2)),
        ("config-set", config(ccmd::SET_IF_EMPTY, b"disk", 4)),
        ("config-force", config(ccmd::FORCE_SET, &[b'x'; 1024], 1024)),
        ("config-replace", config(ccmd::TEST_AND_REPLACE, &replace, 4)),
        ("identify", ata(own, address, AtaArg::identify(), 0)),
        ("identify-everywhere", ata(Mac::BROADCAST, everywhere, AtaArg::identify(), 0)),
        ("read", ata(own, address, AtaArg::read_write_ext(8, 2, false), 0)),
        ("read-probe", ata(own, address, AtaArg::read_write_ext(0, 16, false), 8192)),
        ("read-end", ata(own, address, AtaArg::read_write_ext(SIZE_SECTORS - 1, 2, false), 0)),
        ("write", ata(own, address, AtaArg::read_write_ext(8, 2, true), 1024)),
        ("write-long", ata(own, address, AtaArg::read_write_ext(24, 16, true), 8192)),
        ("flush", ata(own, address, flush, 0)),
        ("mask-read", plain(own, address, command::MAC_MASK, &[0; 4])),
        ("mask-edit", plain(own, address, command::MAC_MASK, &masks)),
        ("reserve-read", plain(own, address, command::RESERVE, &[0; 2])),
        (
            "reserve-set",
            plain(own, address, command::RESERVE, &[&[rcmd::SET, 1][..], CLIENT.as_bytes()].concat()),
        ),
        (
            "reserve-force",
            plain(own, address, command::RESERVE, &[&[rcmd::FORCE_SET, 1][..], NIC.as_bytes()].concat()),
        ),
        ("release", plain(own, address, command::RESERVE, &[rcmd::SET, 0])),
        ("unknown", plain(own, address, 0x55, &[0; 16])),
        ("keyed", plain(own, address, 4, &[0; 16])),
    ]
}

/// Sequences of the shorter seeds, each twice, for a target of every kind: what a frame finds after all the others may
/// differ.
#[must_use]
pub fn sequences() -> Vec<(String, Vec<u8>)> {
    let frames: Vec<Vec<u8>> =
        seeds().into_iter().map(|(_, frame)| frame).filter(|frame| frame.len() < 1024).collect();
    let sequence = |setup: u8| {
        let twice = frames.iter().chain(&frames).map(|frame| (setup >> 4, &frame[..]));
        (format!("setup-{setup:02x}"), encode(setup, twice))
    };
    (0..=0xff).step_by(0x11).map(sequence).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    fn corpus(target: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
    }

    /// Every file of a corpus, in the order of their names.
    fn files(target: &str) -> Vec<Vec<u8>> {
        let entries = std::fs::read_dir(corpus(target)).expect("fuzz/corpus is a part of the sources");
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        assert!(paths.len() >= 10, "{target} has {} files", paths.len());
        paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
    }

    /// SplitMix64: the same numbers in every run.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }

        fn below(&mut self, bound: usize) -> usize {
            usize::try_from(self.next() % bound as u64).unwrap()
        }

        fn byte(&mut self) -> u8 {
            self.next().to_le_bytes()[0]
        }
    }

    /// Changes a frame in a few places, mostly where it says what it asks for.
    fn mutate(frame: &mut Vec<u8>, other: &[u8], random: &mut Random) {
        for _ in 0..random.below(4) {
            let at = random.below(frame.len().max(1));
            let early = random.below(frame.len().clamp(1, 48));
            match random.below(9) {
                0 if !frame.is_empty() => frame[at] = random.byte(),
                1 | 2 if !frame.is_empty() => frame[early] = random.byte(),
                3 if !frame.is_empty() => frame[early] ^= 1 << random.below(8),
                4 if !frame.is_empty() => frame[early] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
                5 => frame.truncate(at),
                6 => frame.resize(random.below(9100), random.byte()),
                7 => {
                    frame.truncate(at);
                    frame.extend_from_slice(&other[random.below(other.len().max(1)).min(other.len())..]);
                }
                8 if frame.len() >= 6 => frame[..6].copy_from_slice(&Mac::BROADCAST.0),
                _ => frame.clear(),
            }
        }
    }

    #[test]
    fn case_82_a_million_mutated_frames_break_nothing() {
        let frames = files("frame");
        let mut random = Random(82);
        let (mut given, mut seen) = (0, Effects::default());
        while given < 1_000_000 {
            let mut world = World::new(random.byte());
            for _ in 0..64 {
                let mut frame = frames[random.below(frames.len())].clone();
                mutate(&mut frame, &frames[random.below(frames.len())], &mut random);
                parse(&frame);
                world.receive(&frame, random.byte());
                given += 1;
            }
            seen.answers += world.effects.answers;
            seen.requests += world.effects.requests;
            seen.changes += world.effects.changes;
        }
        let enough = seen.answers > 100_000 && seen.requests > 10_000 && seen.changes > 10_000;
        assert!(enough, "most frames stop at the door: {seen:?}");
    }

    #[test]
    fn case_82_the_corpus_of_sequences_breaks_nothing() {
        for bytes in files("sequence") {
            sequence(&bytes);
        }
    }

    #[test]
    fn the_corpus_holds_every_kind_of_frame() {
        let frames = files("frame");
        for (name, frame) in seeds() {
            assert!(frames.contains(&frame), "fuzz/corpus/frame lacks {name}");
        }
        let kept = files("sequence");
        for (name, bytes) in sequences() {
            assert!(kept.contains(&bytes), "fuzz/corpus/sequence lacks {name}");
        }
    }

    /// Each seed must do what it is named for, or fuzzing begins at silence.
    #[test]
    fn seeds_get_past_the_door() {
        let world = World::new(0b1000);
        for (name, frame) in seeds() {
            match route(&world.exports, &world.ingress, &frame) {
                Route::One(export) => {
                    let action = respond(export, &world.ingress, &frame, frame.len());
                    let silent = matches!(action, Action::Silent(_));
                    assert_eq!(silent, matches!(name, "config-test" | "config-prefix"), "{name}: {action:?}");
                }
                Route::Matching(_) => {}
                Route::Silent(why) => panic!("{name} is met with silence: {why:?}"),
            }
        }
    }
}
