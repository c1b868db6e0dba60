//! The limits of the machine: what the link does with no store behind it, what the disk does with no link before it.

pub(crate) mod disk;
pub(crate) mod link;
pub(crate) mod pair;
