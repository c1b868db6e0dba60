//! See [`torus_control::cli::ctl`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    torus_control::cli::ctl::main(std::env::args_os().collect())
}
