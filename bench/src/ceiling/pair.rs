//! A veth pair in two network namespaces made for one run: no network, no other host, nothing left behind.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;

use anyhow::{Context, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The name of either end.
pub(crate) const INTERFACE: &str = "eth0";

/// Two namespaces joined by a veth pair; removed when dropped.
#[derive(Debug)]
pub(crate) struct Pair {
    /// Namespace of the server.
    pub(crate) server: String,
    /// Namespace of the client.
    pub(crate) client: String,
}

impl Pair {
    /// Makes namespaces and pair, up, with this MTU and number of queues.
    ///
    /// # Errors
    /// What `ip` said; nothing is left then.
    pub(crate) fn create(mtu: u32, queues: u16) -> anyhow::Result<Pair> {
        let id = std::process::id();
        let pair = Pair { server: format!("tbench-{id}-s"), client: format!("tbench-{id}-c") };
        let (server, client) = (pair.server.as_str(), pair.client.as_str());
        let (mtu, queues) = (mtu.to_string(), queues.to_string());
        for namespace in [server, client] {
            ip(&["netns", "add", namespace])?;
        }
        let shape = ["mtu", &mtu, "numtxqueues", &queues, "numrxqueues", &queues];
        let (here, there) = (["-n", server, "link", "add", INTERFACE], ["netns", client]);
        ip(&[&here[..], &shape, &["type", "veth", "peer", "name", INTERFACE], &shape, &there].concat())?;
        for namespace in [server, client] {
            quiet(namespace)?;
            ip(&["-n", namespace, "link", "set", INTERFACE, "up"])?;
        }
        Ok(pair)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for namespace in [&self.server, &self.client] {
            // Nobody is left to be told; a namespace that was never made is the usual reason.
            let _ = Command::new("ip").args(["netns", "del", namespace]).output();
        }
    }
}

/// Moves this thread into a named network namespace. Threads and sockets that it makes from then on are there.
///
/// # Errors
/// No such namespace, or no privilege.
pub(crate) fn enter(namespace: &str) -> anyhow::Result<()> {
    let path = format!("/run/netns/{namespace}");
    let file = File::open(&path)
        .with_context(|| format!("there is no network namespace {namespace}: see `ip netns`"))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter network namespace {namespace}: this needs CAP_SYS_ADMIN"))
}

/// Keeps neighbour discovery and router solicitations away, which would be counted among our frames, and leaves tags
/// in the frames. Where a tool is missing the pair works all the same.
fn quiet(namespace: &str) -> anyhow::Result<()> {
    let script = format!(
        "echo 1 2>/dev/null >/proc/sys/net/ipv6/conf/all/disable_ipv6; \
         ethtool -K {INTERFACE} txvlan off rxvlan off >/dev/null 2>&1; true"
    );
    ip(&["netns", "exec", namespace, "sh", "-c", &script])
}

fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args).output().context("cannot run `ip`: install iproute2")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`ip {}` failed: {} (this needs CAP_NET_ADMIN and CAP_SYS_ADMIN)", args.join(" "), said.trim());
    }
    Ok(())
}
