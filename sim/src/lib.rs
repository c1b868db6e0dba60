//! What a whole Torus cluster needs to be run in one thread from one seed, and judged.
//!
//! | module | what it stands for |
//! |---|---|
//! | [`random`] | chance: one seed, a stream for each component |
//! | [`schedule`] | time: what happens next, and the clocks of the nodes |
//! | [`network`] | segments that carry frames, and streams between nodes, with their faults |
//! | [`etcd`] | the metadata store and its faults |
//! | [`initiator`] | the Linux `aoe` driver and what uses it |
//! | [`checker`] | whether what the initiators saw is right, whether everything ends, and what happened |
//! | [`cluster`] | nodes that run the real data plane, and what breaks |
//! | [`exploration`] | many seeds, and how one of them is repeated |
//!
//! Nothing here does I/O, reads a clock, starts a thread or depends on the order of a hash map: the only inputs are the
//! seed and what the nodes do. (Nodes count into a map in memory that has the form of a file, and that nobody reads.) Each component keeps its own events and says when the next is due (`next_ns`); whoever
//! runs a cluster takes the earliest of all, in a fixed order where several are due at once, and hands on what comes of it.
//! The cluster in `tests/cluster.rs` is the shortest example.
//!
//! A run that finds something wrong prints its seed, the events around it and the command that repeats it: the same
//! test, with `TORUS_SIM_SEED` set to the seed.
#![forbid(unsafe_code)]

pub mod checker;
pub mod cluster;
pub mod etcd;
pub mod exploration;
pub mod initiator;
pub mod network;
pub mod random;
pub mod schedule;
