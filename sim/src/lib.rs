//! Simulation.
#![forbid(unsafe_code)]

pub mod random;
pub mod schedule;
