//! Runs a test in a network namespace of its own, which goes away with it.
//!
//! The test re-executes its own binary under unshare(1): no names to clean up, no way for parallel tests
//! to meet, and no unsafe code.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Set in the process that runs inside the namespace.
const INSIDE: &str = "AOE_TEST_IN_NETNS";

/// Runs `body` in a fresh network namespace; `test` is the test's full path in its binary. Without root
/// it says so and does nothing.
pub(crate) fn isolated(test: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    if !is_root {
        eprintln!("skipped: {test} makes network namespaces and needs root");
        return;
    }
    let status = Command::new("unshare")
        .args(["--net", "--"])
        .arg(std::env::current_exe().expect("a test knows its binary"))
        .args(["--exact", test, "--include-ignored", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .status()
        .expect("unshare(1) of util-linux runs");
    assert!(status.success(), "{test} failed in its namespace: {status}");
}

/// A command that runs a test of this binary in the namespace of the caller, with extra environment.
pub(crate) fn inside_command(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a test knows its binary"));
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(INSIDE, "1");
    command
}

/// Runs `ip` with words separated by spaces.
pub(crate) fn ip(words: &str) {
    let status = Command::new("ip").args(words.split_whitespace()).status().expect("iproute2 runs");
    assert!(status.success(), "ip {words}: {status}");
}

/// What `ip` says.
pub(crate) fn ip_output(words: &str) -> String {
    let output = Command::new("ip")
        .args(words.split_whitespace())
        .stderr(Stdio::inherit())
        .output()
        .expect("iproute2 runs");
    assert!(output.status.success(), "ip {words}: {}", output.status);
    String::from_utf8(output.stdout).expect("ip speaks UTF-8")
}

/// Makes a pair of virtual interfaces, up: `a0` and `b0`.
pub(crate) fn veth_pair(mtu: u32, queues: u16) {
    let side = format!("mtu {mtu} numtxqueues {queues} numrxqueues {queues}");
    ip(&format!("link add a0 {side} type veth peer name b0 {side}"));
    ip("link set a0 up");
    ip("link set b0 up");
    wait_up("a0");
    wait_up("b0");
}

/// Waits until the kernel has noticed an interface's carrier and given it a queueing discipline: until
/// then it drops what is sent.
pub(crate) fn wait_up(name: &str) {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let text = ip_output(&format!("link show {name}"));
        if text.contains("state UP") && !text.contains("qdisc noop ") {
            return;
        }
        assert!(Instant::now() < until, "{name} does not come up: {text}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
