//! What a request costs, in instructions, against the committed bounds. Needs valgrind.

use std::path::Path;
use std::process::Command;

/// The bounds are of the dev profile, in which tests are built. A bound is changed with the reason in the commit.
#[test]
fn requests_take_no_more_instructions_than_is_committed() {
    let bounds = Path::new(env!("CARGO_MANIFEST_DIR")).join("instructions.json");
    let output = Command::new(env!("CARGO_BIN_EXE_torus-bench"))
        .args(["stages", "--bounds", bounds.to_str().unwrap()])
        .output()
        .unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "{said}{complained}");
}
