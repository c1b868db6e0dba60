//! Two ends of a connection, and whatever may happen between them.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    torus_replication::connection::fuzzing::run(script);
});
