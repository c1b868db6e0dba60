//! Replication of volumes: a volume's *head* orders and numbers its writes and sends each to every in-sync *replica*; what
//! fences an old head, what a replica accepts, and who is in sync, is decided here. Nothing in this crate does I/O: messages,
//! ended store requests, outcomes of metadata changes and time go in; messages, store requests, wished changes and answers come
//! out, so that the same code runs in the data plane and in the simulator.
//!
//! | module | what it answers |
//! |---|---|
//! | [`terms`] | generations, versions, epochs, members |
//! | [`membership`] | who is in sync, what a change to that may be, and what holds while its outcome is unknown (I5) |
//! | [`message`] | what head and replica say to each other |
//! | [`wire`] | what the bytes of that are |
//! | [`connection`] | who may talk, and how a stream of bytes becomes frames |
//! | [`grants`] | whether a head may read and acknowledge now (I1) |
//! | [`replica`] | what a replica accepts, and when it opens a generation (I4, I14) |
//! | `budget` | how fast members are brought up to date |
//! | [`mutants`] | what if one of the rules were not kept: for the test of the simulator only |
//! | [`site`] | the heads and replicas of one core of a node, and what goes between them and other sites |
//! | [`head`] | how requests of initiators become numbered writes and reads, who is ejected, made equal and taken in again (I5 to I9) |
//!
//! Blocks are 4 KiB, extents 4 MiB. The bytes themselves are the driver's: see [`message::Memory`].
#![forbid(unsafe_code)]

mod budget;
pub mod connection;
pub mod grants;
pub mod head;
pub mod membership;
pub mod message;
pub mod mutants;
pub mod replica;
pub mod site;
pub mod terms;
pub mod wire;
