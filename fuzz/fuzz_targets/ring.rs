//! Any bytes as the records of a ring, and the rings that are made of them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cluster_map::ring::fuzzing::read(bytes));
