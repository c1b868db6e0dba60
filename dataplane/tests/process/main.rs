//! The data plane as a process, with a test as its control process.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod changes;
mod links;
mod many_exports;
#[path = "../../../aoe-xdp/tests/link/netns.rs"]
mod netns;
mod node;
mod replicas;
#[path = "../../../aoe-xdp/tests/link/station.rs"]
#[allow(dead_code, reason = "a part is used here")]
mod station;
mod steering;
