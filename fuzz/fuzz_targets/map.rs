//! Any bytes as the header and as the states of the map that the two processes share.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cluster_map::fuzzing::read(bytes));
