//! The thread-per-core storage engine of a Torus node.
#![forbid(unsafe_code)]

pub mod changes;
pub mod clients;
pub mod device;
pub mod discovery;
pub mod exchange;
pub mod fairness;
pub mod manager;
pub mod reactor;
pub mod request;
pub mod serving;
pub mod store;
pub mod tools;
