//! Errors of opening a link: what is wrong and the next step.

use super::geometry::MTU_MIN_BYTES;

/// Why a link could not be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Not a link's name.
    #[error("unknown link {text:?}: use auto, af-xdp or af-packet")]
    UnknownChoice {
        /// What was given.
        text: String,
    },
    /// Not the name of a logical interface.
    #[error("{name:?} names no interface: write eth0, or eth0@100 for its VLAN 100 (1 to 4094)")]
    BadName {
        /// What was given.
        name: String,
    },
    /// The interface was deleted and made again, or its driver was loaded again.
    #[error("interface {interface} is another one than was opened: it must be opened again")]
    Replaced {
        /// The interface.
        interface: String,
    },
    /// No such interface in this network namespace.
    #[error("there is no network interface {interface:?} here: choose one that `ip link` shows")]
    UnknownInterface {
        /// The name asked for.
        interface: String,
    },
    /// The interface is administratively down.
    #[error("interface {interface} is down: run `ip link set {interface} up`")]
    Down {
        /// The interface.
        interface: String,
    },
    /// The MTU has no room for two sectors.
    #[error(
        "interface {interface} has MTU {mtu_bytes}, AoE needs at least {MTU_MIN_BYTES}: \
         run `ip link set {interface} mtu 1500` (9000 where all of the segment can)"
    )]
    MtuTooSmall {
        /// The interface.
        interface: String,
        /// Its MTU.
        mtu_bytes: u32,
    },
    /// No such queue, or it was taken before.
    #[error("queue {queue} of interface {interface} does not exist or is taken: it has {queues}")]
    NoSuchQueue {
        /// The interface.
        interface: String,
        /// The queue asked for.
        queue: u16,
        /// How many queues there are.
        queues: u16,
    },
    /// AF_XDP was asked for and cannot be had.
    #[error("interface {interface} gives no AF_XDP socket: {reason}; --link af-packet works without")]
    NoAfXdp {
        /// The interface.
        interface: String,
        /// Each thing that was tried, and what the kernel said.
        reason: String,
    },
    /// A privilege is missing, or the kernel refused.
    #[error("interface {interface}: {source}")]
    System {
        /// The interface.
        interface: String,
        /// What was tried and what the kernel said.
        source: af_xdp::Error,
    },
}

impl LinkError {
    /// Wraps a system error for `interface`.
    pub(super) fn system(interface: &str, source: af_xdp::Error) -> Self {
        match source {
            af_xdp::Error::UnknownInterface { name } => Self::UnknownInterface { interface: name },
            source => Self::System { interface: interface.to_owned(), source },
        }
    }
}
