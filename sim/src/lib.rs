//! Simulation.
#![forbid(unsafe_code)]

pub mod checker;
pub mod etcd;
pub mod network;
pub mod random;
pub mod schedule;
