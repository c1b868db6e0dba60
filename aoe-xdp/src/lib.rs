//! ATA over Ethernet for a target: the wire codec, the target's state machine without I/O, the order of overlapping
//! requests, and the links that frames travel on.
//!
//! | module | what it answers |
//! |---|---|
//! | [`wire`] | what the bytes of a frame are |
//! | [`target`] | what is to be done for a frame, and what the answer looks like |
//! | [`identify`] | what an export tells about itself |
//! | [`order`] | when a request may start, so that overlapping ones keep their order of arrival |
//! | [`link`] | how frames get in and out: AF_XDP, or AF_PACKET where that cannot be had |
#![forbid(unsafe_code)]

#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod identify;
pub mod link;
pub mod order;
pub mod tags;
pub mod target;
pub mod wire;
