//! Writes the seeds of every target into `fuzz/corpus`: to be run, and the result committed, when a seed is added.
//!
//! `RUSTFLAGS='--cfg fuzzing' cargo run --manifest-path fuzz/Cargo.toml --example seeds`

use std::io;
use std::path::Path;

use aoe_xdp::fuzzing::{seeds, sequences};

fn write(target: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(name), bytes)
}

fn main() -> io::Result<()> {
    for (name, frame) in seeds() {
        write("frame", name, &frame)?;
    }
    for (name, bytes) in sequences() {
        write("sequence", &name, &bytes)?;
    }
    for (name, bytes) in cluster_map::fuzzing::seeds() {
        write("map", name, &bytes)?;
    }
    for (name, bytes) in cluster_map::ring::fuzzing::seeds() {
        write("ring", name, &bytes)?;
    }
    for (name, bytes) in torus_dataplane::store::extent::fuzzing::seeds() {
        write("store", name, &bytes)?;
    }
    for (name, bytes) in torus_replication::wire::fuzzing::seeds() {
        write("peer", name, &bytes)?;
    }
    for (name, bytes) in torus_replication::connection::fuzzing::seeds() {
        write("connection", name, &bytes)?;
    }
    Ok(())
}
