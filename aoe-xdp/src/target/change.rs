//! What an initiator asks to be changed, to be persisted before it is answered.

use crate::wire::Mac;

/// A change of an export that an initiator has asked for and is entitled to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Of the config string.
    SetString {
        /// When it may be set.
        rule: SetRule,
        /// The new string, at most 1024 bytes.
        string: Vec<u8>,
    },
    /// Of the MAC mask list: all edits in order, or none.
    EditMasks {
        /// The edits.
        edits: Vec<MaskEdit>,
    },
    /// Of the reservation.
    Reserve {
        /// Whom it is reserved for, each once; nobody: it is released.
        macs: Vec<Mac>,
        /// Even if others hold it.
        force: bool,
    },
}

/// When a config string may be set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetRule {
    /// If the current one is empty.
    IfEmpty,
    /// Always.
    Always,
    /// If the current one is this.
    Replace {
        /// The string that is to be replaced.
        expected: Vec<u8>,
    },
}

/// One edit of the MAC mask list. Adding what is there and deleting what is not are no errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskEdit {
    /// Position of the directive in the request.
    pub position: u8,
    /// Add, or delete.
    pub add: bool,
    /// The station.
    pub mac: Mac,
}

/// How a change ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeOutcome {
    /// Persisted and in force.
    Done,
    /// Another string is set.
    StringPresent,
    /// The mask list has no room for the edit at this position.
    MasksFull {
        /// Position of the directive in the request.
        position: u8,
    },
    /// Others hold the reservation.
    Reserved,
    /// It cannot be made now: nothing is answered, and the initiator asks again.
    Refused,
}
