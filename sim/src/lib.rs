//! Simulation.
#![forbid(unsafe_code)]

pub mod checker;
pub mod cluster;
pub mod network;
pub mod random;
pub mod schedule;
