//! `torus-bench`
#![forbid(unsafe_code)]
mod initiator;
mod verify;
mod workload;
fn main() {}
