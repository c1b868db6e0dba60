//! The conformance cases of ATA over Ethernet, each defined once and run twice: against the target's state machine
//! ([`model`]) and against a running node over a virtual Ethernet ([`node`]). docs/conformance.md lists them all.
//!
//! * Frames are made and read by [`frames`] from the protocol's description alone, not by the codec under test.
//! * What every answer must have (length, padding, flags, tag, addresses) is checked by [`world`] for each one.
//! * Silence is proved by a later question that is answered, not by waiting.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]

pub mod cases;
pub mod frames;
pub mod model;
pub mod node;

pub mod world;
