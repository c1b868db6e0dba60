//! Opening an interface: checks, the choice of the link, the addresses it accepts.

use std::collections::BTreeMap;
use std::sync::Arc;

use af_xdp::nic::{Nic, NicState};
use af_xdp::offload::{DROPS_OTHER_VLANS, Offload, TAKES_TAGS_OUT};
use af_xdp::packet::{MacFilter, PacketSocket, RECEIVE_BYTES};
use af_xdp::region::{Pages, Pool, Region};

use super::error::LinkError;
use super::geometry::{MTU_MIN_BYTES, TAG_BYTES, limit_in_words, max_sectors};
use super::packet::PacketQueue;
use super::ports::{Frames, Port, Ports};
use super::queue::{Kind, Queue};
use super::steered::Steered;
use super::xdp::XdpInterface;
use super::{LinkChoice, LinkInfo, LinkMode, MAX_SEGMENTS};

/// What an interface is opened as.
#[derive(Debug, Clone)]
pub struct LinkOptions {
    /// Which link.
    pub choice: LinkChoice,
    /// The logical interfaces to be: at least one, of different VLANs and ordinals.
    pub ports: Vec<Port>,
    /// Which frames to take from the host.
    pub frames: Frames,
}

/// A NIC, opened once: its link, its queues not yet taken, the addresses it accepts.
///
/// It holds what all queues share (for AF_XDP the attached program), so it must live as long as they do.
#[derive(Debug)]
pub struct Interface {
    nic: Nic,
    link: Link,
    ports: Ports,
    filter: MacFilter,
    macs: Vec<[u8; 6]>,
    info: LinkInfo,
    /// The longest untagged frame that can be received.
    receive_bytes: usize,
    /// The part of the note that follows neither the MTU nor the addresses.
    note: String,
    /// The NIC's own choice of queues, where there are several and it was asked for.
    steered: Option<Steered>,
}

#[derive(Debug)]
enum Link {
    Xdp(Box<XdpInterface>),
    /// The one socket, until its queue is taken.
    Packet(Option<Box<PacketSocket>>),
}

impl Interface {
    /// Opens an interface for all its untagged frames, as number 0.
    ///
    /// # Errors
    ///
    /// As for [`Interface::open_as`].
    pub fn open(name: &str, choice: LinkChoice, region: &Arc<Region>) -> Result<Self, LinkError> {
        let ports = vec![Port { ordinal: 0, vlan: None }];
        Self::open_as(name, &LinkOptions { choice, ports, frames: Frames::All }, region)
    }

    /// Opens an interface: finds the best link that `options` allow, and attaches the XDP program for all
    /// its queues where that is AF_XDP.
    ///
    /// Offloads that hide 802.1Q tags from the link are switched off, and stay so.
    ///
    /// # Errors
    ///
    /// [`LinkError`]: unknown interface, down, MTU below [`MTU_MIN_BYTES`], a missing privilege, or no
    /// AF_XDP where it was insisted on. Each names the next step.
    ///
    /// # Panics
    ///
    /// Without a logical interface.
    pub fn open_as(name: &str, options: &LinkOptions, region: &Arc<Region>) -> Result<Self, LinkError> {
        assert!(!options.ports.is_empty(), "an interface is opened as something");
        let nic = Nic::open(name).map_err(|error| LinkError::system(name, error))?;
        let state = nic.state().map_err(|error| LinkError::system(name, error))?;
        if !state.up {
            return Err(LinkError::Down { interface: name.to_owned() });
        }
        if state.mtu_bytes < MTU_MIN_BYTES {
            return Err(LinkError::MtuTooSmall { interface: name.to_owned(), mtu_bytes: state.mtu_bytes });
        }
        let filter = MacFilter::open(nic.index()).map_err(|error| LinkError::system(name, error))?;
        let ports = Ports::new(&options.ports);
        let mut info = LinkInfo {
            interface: name.to_owned(),
            ifindex: nic.index(),
            queue: 0,
            mac: state.mac,
            mtu: state.mtu_bytes,
            mode: LinkMode::Packet,
            segments: 1,
            max_sectors: 0,
            hugepages: region.pages() == Pages::Huge2MiB,
            note: String::new(),
        };
        let (link, receive_bytes) = open_link(options, &ports, region, &nic, state, &mut info)?;
        if ports.has_vlans() && nic.switch(DROPS_OTHER_VLANS, false) != Offload::Off {
            let advice =
                "the NIC drops frames of VLANs that no interface of the host is on: ip link add link";
            add_note(&mut info.note, &format!("{advice} {name} name {name}.N type vlan id N"));
        }
        let receive_bytes = receive_bytes - if ports.has_vlans() { TAG_BYTES } else { 0 };
        let note = info.note.clone();
        let mut opened =
            Self { nic, link, ports, filter, macs: Vec::new(), info, receive_bytes, note, steered: None };
        opened.follow(state);
        if opened.info.max_sectors == 0 {
            return Err(LinkError::MtuTooSmall { interface: name.to_owned(), mtu_bytes: state.mtu_bytes });
        }
        Ok(opened)
    }

    /// Works out what follows from the interface's MTU and address.
    fn follow(&mut self, state: NicState) {
        self.info.mac = state.mac;
        self.info.mtu = state.mtu_bytes;
        self.work_out();
    }

    /// Works out what is advertised and what there is to say.
    fn work_out(&mut self) {
        let info = &mut self.info;
        info.max_sectors = max_sectors(info.mtu, info.segments, self.receive_bytes).unwrap_or(0);
        info.note.clone_from(&self.note);
        if let Some(limit) = limit_in_words(info.mtu, info.segments, self.receive_bytes) {
            add_note(&mut info.note, &limit);
        }
        if let Some(steered) = &self.steered {
            add_note(&mut info.note, &steered.in_words());
        }
        if info.max_sectors == 0 {
            let error = LinkError::MtuTooSmall { interface: info.interface.clone(), mtu_bytes: info.mtu };
            add_note(&mut info.note, &error.to_string());
        }
    }

    /// Looks at the interface again: [`Interface::info`] follows its MTU and address. Queues are told with
    /// [`Queue::set_mtu`].
    ///
    /// # Errors
    ///
    /// [`LinkError::Replaced`] or [`LinkError::System`] where the interface that was opened is gone.
    pub fn look(&mut self) -> Result<NicState, LinkError> {
        let state = self.nic.state().map_err(|error| LinkError::system(&self.info.interface, error))?;
        if state.index != self.nic.index() {
            return Err(LinkError::Replaced { interface: self.info.interface.clone() });
        }
        if (state.mtu_bytes, state.mac) != (self.info.mtu, self.info.mac) {
            self.follow(state);
        }
        Ok(state)
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
        Ok(Queue::new(info, self.ports.clone(), kind))
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

    /// Makes the NIC bring frames to these addresses in by these queues, where it can and where there are several queues;
    /// the note says how far it does. Rules of addresses that are left out go. Rules that a process before this one left
    /// behind go the first time.
    pub fn steer(&mut self, queue_of: &BTreeMap<[u8; 6], u16>) {
        if self.queues() < 2 {
            return;
        }
        let nic = &self.nic;
        self.steered.get_or_insert_with(|| Steered::open(nic)).set(nic, queue_of);
        self.work_out();
    }

    /// What the link is; `queue` is 0.
    pub fn info(&self) -> &LinkInfo {
        &self.info
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        if let Some(steered) = &mut self.steered {
            steered.clear(&self.nic);
        }
    }
}

/// Opens the best link that `options` allow; fills in `info`. Gives the longest frame that can be received, tag included.
fn open_link(
    options: &LinkOptions,
    ports: &Ports,
    region: &Arc<Region>,
    nic: &Nic,
    state: NicState,
    info: &mut LinkInfo,
) -> Result<(Link, usize), LinkError> {
    let name = info.interface.clone();
    let filter = ports.filter(options.frames);
    if options.choice != LinkChoice::AfPacket {
        let tags = nic.switch(TAKES_TAGS_OUT, false);
        match XdpInterface::open(nic, state, region, &filter, tags, options.choice, info) {
            Ok((xdp, receive_bytes)) => return Ok((Link::Xdp(Box::new(xdp)), receive_bytes)),
            Err(error) if options.choice == LinkChoice::AfXdp => return Err(error.into_link_error(&name)),
            Err(error) => info.note = format!("no AF_XDP: {error}"),
        }
    }
    let socket =
        PacketSocket::open(nic.index(), &filter, region).map_err(|error| LinkError::system(&name, error))?;
    if !socket.receive_buffer_forced() {
        add_note(&mut info.note, "socket buffers are limited by net.core.rmem_max without CAP_NET_ADMIN");
    }
    info.segments = u8::try_from(1 + MAX_SEGMENTS).expect("a few segments");
    Ok((Link::Packet(Some(Box::new(socket))), RECEIVE_BYTES))
}

/// Adds a sentence to a note.
pub(super) fn add_note(note: &mut String, sentence: &str) {
    if !note.is_empty() {
        note.push_str("; ");
    }
    note.push_str(sentence);
}
