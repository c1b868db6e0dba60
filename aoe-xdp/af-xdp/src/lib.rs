//! Frame memory and the Linux sockets that move it: AF_XDP over `libc` alone, and an AF_PACKET twin.
//!
//! This is the one crate that touches frame memory unsafely. Everything above it works on move-only
//! handles and borrowed slices. What it keeps:
//!
//! * A [`Chunk`](region::Chunk) or [`Header`](region::Header) has one holder: user code, a ring of the
//!   kernel, or the free list. Bytes are writable only through the only handle to them.
//! * A core's [`Pool`](region::Pool) alone changes the reference counts of its range, so no count is
//!   shared between threads.
//! * An XDP program is attached by a BPF link whose file descriptor this process owns: it is detached
//!   when the process ends, however it ends.
//! * What was obtained from the kernel (mode, zero-copy, segments) is readable, never assumed.
//!
//! Under `--cfg loom` only the ring cursors and the count of what lanes take are built, for the model check.

mod ring;
mod taken;

#[cfg(not(loom))]
mod assembly;
#[cfg(not(loom))]
pub mod bpf;
#[cfg(not(loom))]
pub mod checksum;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
pub mod frame;
#[cfg(not(loom))]
pub mod frame_filter;
#[cfg(not(loom))]
pub mod lane;
#[cfg(not(loom))]
mod netdev;
#[cfg(not(loom))]
pub mod nic;
#[cfg(not(loom))]
pub mod offload;
#[cfg(not(loom))]
pub mod packet;
#[cfg(not(loom))]
pub mod program;
#[cfg(not(loom))]
pub mod queue;
#[cfg(not(loom))]
pub mod raw;
#[cfg(not(loom))]
pub mod region;
#[cfg(not(loom))]
pub mod socket;
#[cfg(not(loom))]
pub mod steering;
#[cfg(not(loom))]
mod sys;

#[cfg(not(loom))]
pub use error::{Capability, Error};

#[cfg(all(test, not(loom)))]
#[path = "../../tests/link/netns.rs"]
mod netns;
