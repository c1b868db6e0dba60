//! Any bytes as one frame, to every parser and to a target of every set-up.
#![no_main]

use aoe_xdp::fuzzing::{World, parse};

libfuzzer_sys::fuzz_target!(|frame: &[u8]| {
    parse(frame);
    for setup in (0..=0xff).step_by(0x11) {
        World::new(setup).receive(frame, setup);
    }
});
