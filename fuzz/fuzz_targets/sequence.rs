//! Any bytes as a sequence of frames to one target, whose exports they change.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| aoe_xdp::fuzzing::sequence(bytes));
