//! Opening an interface: checks, the choice of the link, the addresses it accepts.

use std::sync::Arc;

use af_xdp::nic::{Nic, NicState};
use af_xdp::packet::{MacFilter, PacketSocket, RECEIVE_BYTES};
use af_xdp::region::{Pages, Pool, Region};

use super::error::LinkError;
use super::geometry::{MTU_MIN_BYTES, max_sectors};
use super::packet::PacketQueue;
use super::queue::{Kind, Queue};
use super::xdp::XdpInterface;
use super::{LinkChoice, LinkInfo, LinkMode, MAX_SEGMENTS};
use crate::wire::ETHERTYPE;

/// A NIC, opened once: its link, its queues not yet taken, the addresses it accepts.
///
/// It holds what all queues share (for AF_XDP the attached program), so it must live as long as they do.
#[derive(Debug)]
pub struct Interface {
    nic: Nic,
    link: Link,
    filter: MacFilter,
    macs: Vec<[u8; 6]>,
    info: LinkInfo,
}

#[derive(Debug)]
enum Link {
    Xdp(Box<XdpInterface>),
    /// The one socket, until its queue is taken.
    Packet(Option<Box<PacketSocket>>),
}

impl Interface {
    /// Opens an interface: finds the best link that `choice` allows, and attaches the XDP program for all
    /// its queues where that is AF_XDP.
    ///
    /// # Errors
    ///
    /// [`LinkError`]: unknown interface, down, MTU below [`MTU_MIN_BYTES`], a missing privilege, or no
    /// AF_XDP where it was insisted on. Each names the next step.
    pub fn open(name: &str, choice: LinkChoice, region: &Arc<Region>) -> Result<Self, LinkError> {
        let nic = Nic::open(name).map_err(|error| LinkError::system(name, error))?;
        let state = nic.state().map_err(|error| LinkError::system(name, error))?;
        if !state.up {
            return Err(LinkError::Down { interface: name.to_owned() });
        }
        if state.mtu_bytes < MTU_MIN_BYTES {
            return Err(LinkError::MtuTooSmall { interface: name.to_owned(), mtu_bytes: state.mtu_bytes });
        }
        let filter = MacFilter::open(nic.index()).map_err(|error| LinkError::system(name, error))?;
        let (link, info) = open_link(name, choice, region, &nic, state)?;
        Ok(Self { nic, link, filter, macs: Vec::new(), info })
    }

    /// How many queues there are to take. All of them must be taken: a frame that arrives on a queue that
    /// nobody took goes to the host, not to us.
    pub fn queues(&self) -> u16 {
        match &self.link {
            Link::Xdp(xdp) => xdp.queues(),
            Link::Packet(_) => 1,
        }
    }

    /// Takes a queue for the core that owns `pool`, and gives the kernel empty chunks of it.
    ///
    /// # Errors
    ///
    /// [`LinkError::NoSuchQueue`] for a second take; otherwise what the kernel refused.
    pub fn take_queue(&mut self, queue: u16, pool: &mut Pool) -> Result<Queue, LinkError> {
        let missing =
            LinkError::NoSuchQueue { interface: self.info.interface.clone(), queue, queues: self.queues() };
        let info = LinkInfo { queue, ..self.info.clone() };
        let kind = match &mut self.link {
            Link::Packet(socket) if queue == 0 => {
                let socket = socket.take().ok_or(missing)?;
                Kind::Packet(Box::new(PacketQueue::new(*socket)))
            }
            Link::Packet(_) => return Err(missing),
            Link::Xdp(xdp) => {
                let taken = xdp.take_queue(queue, pool);
                let taken = taken.map_err(|error| LinkError::system(&info.interface, error))?;
                Kind::Xdp(Box::new(taken.ok_or(missing)?))
            }
        };
        Ok(Queue::new(info, kind))
    }

    /// Makes the NIC accept frames to an export's address. One that it accepts already is no error.
    ///
    /// # Errors
    ///
    /// [`LinkError::System`] where neither the filter nor promiscuous mode was granted.
    pub fn add_mac(&mut self, mac: [u8; 6]) -> Result<(), LinkError> {
        if mac == self.info.mac || self.macs.contains(&mac) {
            return Ok(());
        }
        self.filter.add(mac).map_err(|error| LinkError::system(&self.info.interface, error))?;
        self.macs.push(mac);
        Ok(())
    }

    /// Stops accepting an export's address. One that was not added is no error.
    ///
    /// # Errors
    ///
    /// None now; the result leaves room for filters that can refuse.
    pub fn remove_mac(&mut self, mac: [u8; 6]) -> Result<(), LinkError> {
        if let Some(position) = self.macs.iter().position(|known| *known == mac) {
            self.macs.swap_remove(position);
            self.filter.remove(mac);
        }
        Ok(())
    }

    /// What the link is; `queue` is 0.
    pub fn info(&self) -> &LinkInfo {
        &self.info
    }

    /// Flags, MTU and address as they are now: a changed MTU needs the interface to be opened again.
    ///
    /// # Errors
    ///
    /// [`LinkError::System`] where the interface is gone.
    pub fn state(&self) -> Result<NicState, LinkError> {
        self.nic.state().map_err(|error| LinkError::system(&self.info.interface, error))
    }
}

/// Opens the best link that `choice` allows.
fn open_link(
    name: &str,
    choice: LinkChoice,
    region: &Arc<Region>,
    nic: &Nic,
    state: NicState,
) -> Result<(Link, LinkInfo), LinkError> {
    let mut info = LinkInfo {
        interface: name.to_owned(),
        ifindex: nic.index(),
        queue: 0,
        mac: state.mac,
        mtu: state.mtu_bytes,
        mode: LinkMode::Packet,
        segments: 1,
        max_sectors: 2,
        hugepages: region.pages() == Pages::Huge2MiB,
        note: String::new(),
    };
    if choice != LinkChoice::AfPacket {
        match XdpInterface::open(nic, state, region, &mut info) {
            Ok(xdp) => return Ok((Link::Xdp(Box::new(xdp)), info)),
            Err(error) if choice == LinkChoice::AfXdp => return Err(error.into_link_error(name)),
            Err(error) => info.note = format!("no AF_XDP: {error}"),
        }
    }
    let socket =
        PacketSocket::open(nic.index(), ETHERTYPE, region).map_err(|error| LinkError::system(name, error))?;
    if !socket.receive_buffer_forced() {
        add_note(&mut info.note, "socket buffers are limited by net.core.rmem_max without CAP_NET_ADMIN");
    }
    info.segments = u8::try_from(1 + MAX_SEGMENTS).expect("a few segments");
    info.max_sectors = max_sectors(state.mtu_bytes, info.segments, RECEIVE_BYTES)
        .ok_or_else(|| LinkError::MtuTooSmall { interface: name.to_owned(), mtu_bytes: state.mtu_bytes })?;
    Ok((Link::Packet(Some(Box::new(socket))), info))
}

/// Adds a sentence to a note.
pub(super) fn add_note(note: &mut String, sentence: &str) {
    if !note.is_empty() {
        note.push_str("; ");
    }
    note.push_str(sentence);
}
