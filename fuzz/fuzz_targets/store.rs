//! Any bytes as a structure of a store's device, and as what a shard finds on a device when it is opened.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    torus_dataplane::store::extent::fuzzing::store(bytes);
});
