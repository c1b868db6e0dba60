//! The thread-per-core storage engine of a Torus node.
//!
//! Under `--cfg loom` only what cores and manager share of a store is built, for the model check.
#![forbid(unsafe_code)]

#[cfg(not(loom))]
pub mod changes;
#[cfg(not(loom))]
pub mod clients;
#[cfg(not(loom))]
pub mod device;
#[cfg(not(loom))]
pub mod discovery;
#[cfg(not(loom))]
pub mod exchange;
#[cfg(not(loom))]
pub mod fairness;
#[cfg(not(loom))]
pub mod manager;
#[cfg(not(loom))]
pub mod peers;
#[cfg(not(loom))]
pub mod reactor;
#[cfg(not(loom))]
pub mod replicating;
#[cfg(not(loom))]
pub mod request;
#[cfg(not(loom))]
pub mod serving;
#[cfg(not(loom))]
pub mod store;
#[cfg(not(loom))]
pub mod tools;

/// See [`store::extent::shared`].
#[cfg(loom)]
pub mod store {
    /// See [`shared`].
    pub mod extent {
        pub mod shared;
    }
}
