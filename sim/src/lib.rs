//! Simulation.
#![forbid(unsafe_code)]

pub mod checker;
pub mod random;
pub mod schedule;
