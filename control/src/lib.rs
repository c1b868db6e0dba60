//! The control process of a Torus node and the commands that talk to it.
//!
//! `torusd` reflects the cluster's metadata into the shared map that the data plane follows, supervises the data plane, and
//! serves the HTTP API that `torusctl` and `torusblk` use. It never touches I/O: losing it, or the metadata store, stops
//! *changes* only (I1). What it decides, it decides in pure functions over one consistent view of the metadata, and every
//! change is one compare-and-swap transaction over all the records it depends on.
#![forbid(unsafe_code)]

mod aoe_changes;
pub mod api;
pub mod checks;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod decisions;
pub mod heads;
pub mod known;
pub mod meta;
pub mod model;
pub mod moves;
pub mod node;
pub mod ops;
pub mod placement;
pub mod reconcile;
pub mod settings;
pub mod size;
pub mod starts;
pub mod supervise;
pub mod takeover;
