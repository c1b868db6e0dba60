//! See [`torus_control::cli::blk`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    torus_control::cli::blk::main(std::env::args_os().collect())
}
