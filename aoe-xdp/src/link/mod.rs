//! The Ethernet links that AoE runs on: AF_XDP where it can be had, AF_PACKET elsewhere, one interface.
//!
//! An [`Interface`] is opened once for each NIC; a [`Queue`] is one receive and transmit queue of it,
//! owned by one core. Frames move as handles to chunks of the process's one [`Region`]. Invariants:
//!
//! * One owner per queue (design: the frame path): a queue's rings are touched by the core that took it. A [`Lane`] has
//!   a receive ring of its own, and its frames' chunks go home to that core.
//! * Steering is for speed alone: a frame may come by any queue and any lane, and whoever gets it must know whose it is.
//! * A chunk is free only when all references are back: each transmit descriptor holds one handle until
//!   its completion.
//! * Nothing is allocated after a queue was taken; out of memory or out of ring is a counted drop or a
//!   frame handed back, never a stall.
//! * What was obtained, and why nothing better, is in [`LinkInfo`].
//!
//! Frames of other VLANs than the opened ones are not ours: both links leave them to the host.

mod error;
mod geometry;
mod interface;
mod lane;
mod packet;
mod ports;
mod programmed;
mod queue;
mod steered;
mod xdp;

use std::fmt;
use std::str::FromStr;

pub use af_xdp::frame::{MAX_SEGMENTS, RxFrame, Segment, Segments, TxFrame};
pub use af_xdp::region::{
    CHUNK_BYTES, Chunk, HEADER_BYTES, Header, Pages, Pool, Region, RegionConfig, RegionError,
};
pub use error::LinkError;
pub use geometry::{MTU_MIN_BYTES, max_sectors};
pub use interface::{Interface, LinkOptions};
pub use lane::Lane;
pub use ports::{Frames, InterfaceName, Port, VlanId};
pub use queue::Queue;

/// Which link a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LinkChoice {
    /// AF_XDP where it can be had, else AF_PACKET.
    #[default]
    Auto,
    /// AF_XDP or an error.
    AfXdp,
    /// AF_PACKET.
    AfPacket,
}

impl FromStr for LinkChoice {
    type Err = LinkError;

    fn from_str(text: &str) -> Result<Self, LinkError> {
        match text {
            "auto" => Ok(Self::Auto),
            "af-xdp" => Ok(Self::AfXdp),
            "af-packet" => Ok(Self::AfPacket),
            _ => Err(LinkError::UnknownChoice { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for LinkChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::AfXdp => "af-xdp",
            Self::AfPacket => "af-packet",
        })
    }
}

/// By what frames are to reach the core that serves their destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SteeringChoice {
    /// By the NIC's receive rules where it has several queues and takes such rules, else by the XDP program, else not.
    #[default]
    Auto,
    /// By the NIC's receive rules, as far as it takes them.
    Nic,
    /// By the XDP program: every core has a socket of its own on every queue.
    Program,
    /// Not at all: who gets a frame hands it over.
    HandOver,
}

/// How frames move between the NIC and our memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkMode {
    /// AF_XDP; the NIC reads and writes our memory.
    XdpZeroCopy,
    /// AF_XDP; the driver runs the XDP program, the kernel copies.
    XdpNativeCopy,
    /// AF_XDP behind the kernel's generic hook: the kernel makes a socket buffer, then copies.
    XdpGeneric,
    /// AF_PACKET.
    Packet,
}

impl fmt::Display for LinkMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::XdpZeroCopy => "xdp-zero-copy",
            Self::XdpNativeCopy => "xdp-native-copy",
            Self::XdpGeneric => "xdp-generic",
            Self::Packet => "packet",
        })
    }
}

/// What a link is, and why it is no better one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkInfo {
    /// The interface's name, as it was opened.
    pub interface: String,
    /// The kernel's index of the interface.
    pub ifindex: u32,
    /// The queue, from 0.
    pub queue: u16,
    /// The interface's own hardware address.
    pub mac: [u8; 6],
    /// Bytes after the Ethernet header, tag not counted; as it was when the interface was last looked at.
    pub mtu: u32,
    /// How frames move.
    pub mode: LinkMode,
    /// Descriptors one sent frame may have, header included; 1 is no scatter-gather.
    pub segments: u8,
    /// Sectors that one frame may carry, to be advertised: 2, 4, 8 or 16; 0 where the MTU is too small for any.
    pub max_sectors: u8,
    /// Whether the frame memory is on 2 MiB pages.
    pub hugepages: bool,
    /// Why nothing better was had, and what to change; empty where there is nothing to say.
    pub note: String,
}

/// Counters of a queue, from its opening on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkStats {
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames the kernel dropped for any reason: ring or buffer full, no empty chunk, too long.
    pub rx_dropped: u64,
    /// Of these, the ones for which the receive ring (AF_PACKET: the socket's buffer) was full: the core was too slow.
    pub rx_ring_full: u64,
    /// Times the kernel found no empty chunk to receive into: the core was too slow, or its memory was in use.
    pub rx_fill_empty: u64,
    /// Frames dropped here: truncated, too many segments, a head in pieces, or of a VLAN that is not opened.
    pub rx_invalid: u64,
    /// Frames given to the kernel.
    pub tx_frames: u64,
    /// Bytes given to the kernel.
    pub tx_bytes: u64,
    /// Frames that could not be sent: malformed, too long, refused by the kernel.
    pub tx_dropped: u64,
    /// Times a frame was handed back because the transmit ring was full.
    pub tx_ring_full: u64,
    /// Frames that were copied into one chunk because there is no scatter-gather.
    pub tx_linearised: u64,
    /// System calls made to make the kernel send or receive.
    pub kicks: u64,
    /// Empty chunks the kernel holds for receiving now.
    pub fill_chunks: u64,
    /// Descriptors sent but not completed now.
    pub tx_outstanding: u64,
}
