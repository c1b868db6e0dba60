//! Any frames of a peer, to the codec, to a node's replicas and to a head.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| torus_replication::wire::fuzzing::read(bytes));
