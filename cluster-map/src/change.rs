//! Changes of an export's settings that initiators ask for over AoE, and what became of them.
//!
//! A change is level-triggered like everything in the map: the data plane keeps a [`ChangeRequest`] in
//! [`Observed::changes`](crate::Observed::changes) until [`Desired::answers`](crate::Desired::answers) has a [`ChangeAnswer`] with its
//! id; that version of the desired state has the export as changed too. The control process keeps the answer until the
//! request is gone. So either process may die at any point, and a change is neither lost nor carried out twice: ids are
//! never used again, and the export's record in the metadata store names the last one that was carried out.

use crate::VolumeId;
use crate::error::{Fault, MapError};
use crate::record::{Decoder, Encoder, Record, Text, codes, flag};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Longest config string, in bytes: what a frame of an Ethernet without jumbo frames carries by the protocol's rules.
pub const MAX_CONFIG_STRING_BYTES: usize = 1024;

/// Most MACs in a mask list, in a reservation and in a policy: such a list fits a frame of every MTU from 576 bytes.
pub const MAX_LISTED_MACS: usize = 64;

/// Most changes that are asked for at a time, and most answers.
pub const MAX_CHANGES: usize = 64;

/// Most directives or MACs that one frame can carry: their number is one byte.
const MAX_IN_FRAME: usize = 255;

/// A change that an initiator asked for and whose answer it waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeRequest {
    /// Never used twice, not even by another data plane of the node: ids grow by one from the nanoseconds since 1970 at
    /// which the data plane started.
    pub id: u64,
    /// The volume whose export is to change.
    pub volume: VolumeId,
    /// The MAC of the initiator.
    pub client: [u8; 6],
    /// What it asked for.
    pub change: Change,
}

/// What an initiator may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The config string (Query Config, sub-commands 3 and 4, and a replacement of one string by another).
    SetString {
        /// When to set it.
        rule: SetRule,
        /// At most [`MAX_CONFIG_STRING_BYTES`].
        string: Vec<u8>,
    },
    /// The mask list (MAC Mask List, sub-command 1): all edits or none, in this order.
    EditMasks {
        /// At most 255, those that change nothing by definition left out.
        edits: Vec<MaskEdit>,
    },
    /// The reservation (Reserve/Release, sub-commands 1 and 2).
    Reserve {
        /// Who may use the export from now on, at most 255; empty: everyone.
        macs: Vec<[u8; 6]>,
        /// Whoever holds it now.
        force: bool,
    },
}

/// When a config string is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetRule {
    /// If there is none, or the same.
    IfEmpty,
    /// Whatever there is.
    Always,
    /// If it is as expected.
    Replace {
        /// At most [`MAX_CONFIG_STRING_BYTES`].
        expected: Vec<u8>,
    },
}

/// One edit of a mask list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskEdit {
    /// Index of the directive in the frame, from 0; an error names it.
    pub position: u8,
    /// Put it in, otherwise take it out.
    pub add: bool,
    /// The MAC.
    pub mac: [u8; 6],
}

/// What became of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangeAnswer {
    /// The request's.
    pub id: u64,
    /// What became of it.
    pub outcome: ChangeOutcome,
}

/// What became of a change. Only [`Done`](Self::Done) changed anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChangeOutcome {
    /// It is stored.
    Done,
    /// There is another config string.
    StringPresent,
    /// The mask list would be longer than [`MAX_LISTED_MACS`].
    MasksFull {
        /// Of the edit that found no room.
        position: u8,
    },
    /// Another initiator holds the export.
    Reserved,
    /// It cannot be made: the export is going, or its rules do not allow it any more. Not an answer for the wire.
    #[default]
    Refused,
}

/// The codes of a request's kind.
#[derive(Clone, Copy)]
enum Kind {
    SetIfEmpty,
    SetAlways,
    SetReplacing,
    EditMasks,
    Reserve,
}

/// The codes of an outcome.
#[derive(Clone, Copy)]
enum Outcome {
    Done,
    StringPresent,
    MasksFull,
    Reserved,
    Refused,
}

codes!(Kind { SetIfEmpty = 0, SetAlways = 1, SetReplacing = 2, EditMasks = 3, Reserve = 4, });
codes!(Outcome { Done = 0, StringPresent = 1, MasksFull = 2, Reserved = 3, Refused = 4, });

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RequestRecord {
    id: U64,
    volume: [u8; 16],
    client: [u8; 6],
    kind: u8,
    force: u8,
    /// A config string, edits, or MACs.
    what: Text,
    /// The config string to be replaced.
    expected: Text,
}

impl Record for RequestRecord {
    const NAME: &'static str = "change";
    const LEAST: usize = size_of::<Self>();
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct AnswerRecord {
    id: U64,
    outcome: u8,
    position: u8,
}

impl Record for AnswerRecord {
    const NAME: &'static str = "answer";
    const LEAST: usize = size_of::<Self>();
}

/// An edit as bytes of the pool: position, add, MAC.
const EDIT_BYTES: usize = 8;

/// Refuses what is longer than a rule of this crate allows.
pub(crate) fn at_most(most: usize, count: usize, what: &str) -> Result<(), MapError> {
    if count <= most {
        return Ok(());
    }
    Err(MapError::Invalid { what: format!("{count} {what}: at most {most} are possible") })
}

/// The same for what was read.
pub(crate) fn read_at_most(most: usize, count: usize, what: &str) -> Result<(), Fault> {
    if count <= most {
        Ok(())
    } else {
        Err(Fault::Corrupt(format!("{count} {what}, at most {most} expected")))
    }
}

/// Puts a config string into the pool.
pub(crate) fn put_string(out: &mut Encoder<'_>, string: &[u8]) -> Result<Text, MapError> {
    at_most(MAX_CONFIG_STRING_BYTES, string.len(), "bytes of a config string")?;
    out.bytes(string)
}

/// Takes a config string out of the pool.
pub(crate) fn take_string(from: &mut Decoder<'_>, text: Text) -> Result<Vec<u8>, Fault> {
    let bytes = from.bytes(text)?;
    read_at_most(MAX_CONFIG_STRING_BYTES, bytes.len(), "bytes of a config string")?;
    Ok(bytes.to_vec())
}

/// Puts a list of MACs into the pool.
pub(crate) fn put_macs(out: &mut Encoder<'_>, macs: &[[u8; 6]], most: usize) -> Result<Text, MapError> {
    at_most(most, macs.len(), "MAC addresses in a list")?;
    out.bytes(macs.as_flattened())
}

/// Takes a list of MACs out of the pool.
pub(crate) fn take_macs(from: &mut Decoder<'_>, text: Text, most: usize) -> Result<Vec<[u8; 6]>, Fault> {
    let (macs, rest) = from.bytes(text)?.as_chunks::<6>();
    if !rest.is_empty() {
        return Err(Fault::corrupt("a list of MAC addresses has a part of one"));
    }
    read_at_most(most, macs.len(), "MAC addresses in a list")?;
    Ok(macs.to_vec())
}

fn take_edits(from: &mut Decoder<'_>, text: Text) -> Result<Vec<MaskEdit>, Fault> {
    let (edits, rest) = from.bytes(text)?.as_chunks::<EDIT_BYTES>();
    if !rest.is_empty() {
        return Err(Fault::corrupt("a list of mask edits has a part of one"));
    }
    read_at_most(MAX_IN_FRAME, edits.len(), "mask edits")?;
    let edit = |&[position, add, ref mac @ ..]: &[u8; EDIT_BYTES]| {
        Ok(MaskEdit { position, add: flag(add, "add of a mask edit")?, mac: *mac })
    };
    edits.iter().map(edit).collect()
}

impl RequestRecord {
    pub(crate) fn encode(out: &mut Encoder<'_>, request: &ChangeRequest) -> Result<Self, MapError> {
        let nothing = out.bytes(&[])?;
        let mut record = Self {
            id: request.id.into(),
            volume: request.volume.0,
            client: request.client,
            kind: Kind::SetAlways.code(),
            force: 0,
            what: nothing,
            expected: nothing,
        };
        let kind = match &request.change {
            Change::SetString { rule, string } => {
                record.what = put_string(out, string)?;
                match rule {
                    SetRule::IfEmpty => Kind::SetIfEmpty,
                    SetRule::Always => Kind::SetAlways,
                    SetRule::Replace { expected } => {
                        record.expected = put_string(out, expected)?;
                        Kind::SetReplacing
                    }
                }
            }
            Change::EditMasks { edits } => {
                at_most(MAX_IN_FRAME, edits.len(), "mask edits")?;
                let bytes = |edit: &MaskEdit| {
                    let [a, b, c, d, e, f] = edit.mac;
                    [edit.position, edit.add.into(), a, b, c, d, e, f]
                };
                record.what = out.bytes(edits.iter().map(bytes).collect::<Vec<_>>().as_flattened())?;
                Kind::EditMasks
            }
            Change::Reserve { macs, force } => {
                record.what = put_macs(out, macs, MAX_IN_FRAME)?;
                record.force = (*force).into();
                Kind::Reserve
            }
        };
        record.kind = kind.code();
        Ok(record)
    }

    pub(crate) fn decode(self, from: &mut Decoder<'_>) -> Result<ChangeRequest, Fault> {
        let change = match Kind::from_code(self.kind)? {
            Kind::SetIfEmpty => {
                Change::SetString { rule: SetRule::IfEmpty, string: take_string(from, self.what)? }
            }
            Kind::SetAlways => {
                Change::SetString { rule: SetRule::Always, string: take_string(from, self.what)? }
            }
            Kind::SetReplacing => {
                let rule = SetRule::Replace { expected: take_string(from, self.expected)? };
                Change::SetString { rule, string: take_string(from, self.what)? }
            }
            Kind::EditMasks => Change::EditMasks { edits: take_edits(from, self.what)? },
            Kind::Reserve => Change::Reserve {
                macs: take_macs(from, self.what, MAX_IN_FRAME)?,
                force: flag(self.force, "force of a reservation")?,
            },
        };
        Ok(ChangeRequest { id: self.id.get(), volume: VolumeId(self.volume), client: self.client, change })
    }
}

impl AnswerRecord {
    pub(crate) fn encode(answer: &ChangeAnswer) -> Self {
        let (outcome, position) = match answer.outcome {
            ChangeOutcome::Done => (Outcome::Done, 0),
            ChangeOutcome::StringPresent => (Outcome::StringPresent, 0),
            ChangeOutcome::MasksFull { position } => (Outcome::MasksFull, position),
            ChangeOutcome::Reserved => (Outcome::Reserved, 0),
            ChangeOutcome::Refused => (Outcome::Refused, 0),
        };
        Self { id: answer.id.into(), outcome: outcome.code(), position }
    }

    pub(crate) fn decode(&self) -> Result<ChangeAnswer, Fault> {
        let outcome = match Outcome::from_code(self.outcome)? {
            Outcome::Done => ChangeOutcome::Done,
            Outcome::StringPresent => ChangeOutcome::StringPresent,
            Outcome::MasksFull => ChangeOutcome::MasksFull { position: self.position },
            Outcome::Reserved => ChangeOutcome::Reserved,
            Outcome::Refused => ChangeOutcome::Refused,
        };
        Ok(ChangeAnswer { id: self.id.get(), outcome })
    }
}

/// Any change and any answer; the states that carry them are tested with these.
#[cfg(not(loom))]
#[cfg(test)]
pub(crate) mod strategies {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn change() -> impl Strategy<Value = Change> {
        let bytes = || vec(any::<u8>(), 0..30);
        let rule = prop_oneof![
            Just(SetRule::IfEmpty),
            Just(SetRule::Always),
            bytes().prop_map(|expected| SetRule::Replace { expected }),
        ];
        let edit = (any::<u8>(), any::<bool>(), any::<[u8; 6]>());
        let edit = edit.prop_map(|(position, add, mac)| MaskEdit { position, add, mac });
        prop_oneof![
            (rule, bytes()).prop_map(|(rule, string)| Change::SetString { rule, string }),
            vec(edit, 0..5).prop_map(|edits| Change::EditMasks { edits }),
            (vec(any::<[u8; 6]>(), 0..5), any::<bool>())
                .prop_map(|(macs, force)| Change::Reserve { macs, force }),
        ]
    }

    pub(crate) fn request() -> impl Strategy<Value = ChangeRequest> {
        (any::<u64>(), any::<[u8; 16]>(), any::<[u8; 6]>(), change()).prop_map(
            |(id, volume, client, change)| ChangeRequest { id, volume: VolumeId(volume), client, change },
        )
    }

    pub(crate) fn answer() -> impl Strategy<Value = ChangeAnswer> {
        let outcome = prop_oneof![
            Just(ChangeOutcome::Done),
            Just(ChangeOutcome::StringPresent),
            any::<u8>().prop_map(|position| ChangeOutcome::MasksFull { position }),
            Just(ChangeOutcome::Reserved),
            Just(ChangeOutcome::Refused),
        ];
        (any::<u64>(), outcome).prop_map(|(id, outcome)| ChangeAnswer { id, outcome })
    }
}
