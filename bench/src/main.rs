//! Placeholder head, replaced by the crate.
fn main() {}
