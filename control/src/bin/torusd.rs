//! The control process of a Torus node; see [`torus_control::daemon`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    torus_control::daemon::main(std::env::args_os().collect())
}
