//! Opening an interface: checks, the choice of the link, the addresses it accepts and steers.

use std::collections::BTreeMap;
use std::sync::Arc;

use af_xdp::nic::{Nic, NicState};
use af_xdp::offload::{DROPS_OTHER_VLANS, Offload, TAKES_TAGS_OUT};
use af_xdp::packet::{MacFilter, PacketSocket, RECEIVE_BYTES};
use af_xdp::region::{Pages, Pool, Region};

use super::error::LinkError;
use super::geometry::{MTU_MIN_BYTES, TAG_BYTES, limit_in_words, max_sectors};
use super::lane::Lane;
use super::packet::PacketQueue;
use super::ports::{Frames, Port, Ports};
use super::queue::{Kind, Queue};
use super::steered::Steered;
use super::xdp::{Wish, XdpInterface};
use super::{LinkChoice, LinkInfo, LinkMode, MAX_SEGMENTS, SteeringChoice};

/// What an interface is opened as.
#[derive(Debug, Clone)]
pub struct LinkOptions {
    /// Which link.
    pub choice: LinkChoice,
    /// The logical interfaces to be: at least one, of different VLANs and ordinals.
    pub ports: Vec<Port>,
    /// Which frames to take from the host.
    pub frames: Frames,
    /// The cores that frames are for, numbered from 0.
    pub cores: u16,
    /// By what frames are to reach them, where there are several.
    pub steering: SteeringChoice,
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
    /// The core that took each queue, by queue.
    owners: BTreeMap<u16, u16>,
    steering: Steering,
}

/// By what frames reach their cores.
#[derive(Debug)]
enum Steering {
    /// There is one core.
    Alone,
    /// The NIC's rules.
    Rules(Box<Steered>),
    /// The XDP program, which the link holds.
    Program,
    /// Nothing, for that reason.
    HandOver(&'static str),
}

impl Steering {
    /// What is wished and, for rules, can be had, before the link is opened.
    fn choose(options: &LinkOptions, nic: &Nic) -> Self {
        if options.cores < 2 {
            return Self::Alone;
        }
        let queues = nic.queues();
        let several = queues.receive.min(queues.transmit) > 1 && options.choice != LinkChoice::AfPacket;
        if matches!(options.steering, SteeringChoice::Program | SteeringChoice::HandOver) {
            Steered::tidy_up(nic);
        }
        match options.steering {
            SteeringChoice::HandOver => Self::HandOver("as --steering says"),
            SteeringChoice::Program => Self::Program,
            SteeringChoice::Nic if several => Self::Rules(Box::new(Steered::open(nic))),
            SteeringChoice::Nic => Self::HandOver("there is one queue"),
            SteeringChoice::Auto => {
                let rules = several.then(|| Steered::open(nic)).filter(Steered::is_able);
                rules.map_or(Self::Program, |rules| Self::Rules(Box::new(rules)))
            }
        }
    }

    /// What is left of it on a link of one AF_PACKET socket.
    fn without_xdp(self) -> Self {
        match self {
            Self::Rules(_) | Self::Program => Self::HandOver("one AF_PACKET socket takes all of them"),
            other => other,
        }
    }
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
        let options = LinkOptions {
            choice,
            ports: vec![Port { ordinal: 0, vlan: None }],
            frames: Frames::All,
            cores: 1,
            steering: SteeringChoice::Auto,
        };
        Self::open_as(name, &options, region)
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
        let mut steering = Steering::choose(options, &nic);
        let steered_cores = if matches!(steering, Steering::Program) { options.cores } else { 0 };
        let (link, receive_bytes) =
            open_link(options, &ports, steered_cores, region, &nic, state, &mut info)?;
        if matches!(link, Link::Packet(_)) {
            steering = steering.without_xdp();
        }
        if ports.has_vlans() && nic.switch(DROPS_OTHER_VLANS, false) != Offload::Off {
            let advice =
                "the NIC drops frames of VLANs that no interface of the host is on: ip link add link";
            add_note(&mut info.note, &format!("{advice} {name} name {name}.N type vlan id N"));
        }
        let receive_bytes = receive_bytes - if ports.has_vlans() { TAG_BYTES } else { 0 };
        let note = info.note.clone();
        let (macs, owners) = (Vec::new(), BTreeMap::new());
        let mut opened = Self { nic, link, ports, filter, macs, info, receive_bytes, note, owners, steering };
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
        let steered = self.steering_in_words();
        let info = &mut self.info;
        info.max_sectors = max_sectors(info.mtu, info.segments, self.receive_bytes).unwrap_or(0);
        info.note.clone_from(&self.note);
        if let Some(limit) = limit_in_words(info.mtu, info.segments, self.receive_bytes) {
            add_note(&mut info.note, &limit);
        }
        if let Some(steered) = steered {
            add_note(&mut info.note, &steered);
        }
        if info.max_sectors == 0 {
            let error = LinkError::MtuTooSmall { interface: info.interface.clone(), mtu_bytes: info.mtu };
            add_note(&mut info.note, &error.to_string());
        }
    }

    /// How addresses are steered, for people; nothing where there is one core.
    fn steering_in_words(&self) -> Option<String> {
        match (&self.steering, &self.link) {
            (Steering::Alone, _) => None,
            (Steering::Rules(rules), _) => Some(rules.in_words()),
            (Steering::Program, Link::Xdp(xdp)) => xdp.programmed().map(|programmed| programmed.in_words()),
            (Steering::Program, Link::Packet(_)) => None,
            (Steering::HandOver(reason), _) => Some(format!("cores hand frames over ({reason})")),
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
        self.owners.insert(queue, pool.core());
        Ok(Queue::new(info, self.ports.clone(), kind))
    }

    /// Takes the lane of a core on a queue that another core has taken, where the XDP program steers. All cores must take
    /// theirs on all queues before [`Interface::steer`]. One that the kernel refuses is noted, and nothing is steered then.
    pub fn take_lane(&mut self, queue: u16, core: u16) -> Option<Lane> {
        let Link::Xdp(xdp) = &mut self.link else { return None };
        match xdp.take_lane(queue, core) {
            Ok(lane) => Some(Lane::new(lane?, self.ports.clone(), queue)),
            Err(error) => {
                xdp.programmed_mut()?.give_up(error.to_string());
                self.work_out();
                None
            }
        }
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

    /// Makes the NIC or the XDP program bring frames to these addresses to these cores, and to no others what they do not
    /// bring; the note says how far they do.
    pub fn steer(&mut self, core_of: &BTreeMap<[u8; 6], u16>) {
        match (&mut self.steering, &mut self.link) {
            (Steering::Rules(rules), _) => {
                let queue_of = |core| self.owners.iter().find(|(_, owner)| **owner == core);
                let wanted = core_of.iter().filter_map(|(mac, core)| Some((*mac, *queue_of(*core)?.0)));
                rules.set(&self.nic, &wanted.collect());
            }
            (Steering::Program, Link::Xdp(xdp)) => {
                if let Some(programmed) = xdp.programmed_mut() {
                    programmed.set(core_of);
                }
            }
            _ => return,
        }
        self.work_out();
    }

    /// What the link is; `queue` is 0.
    pub fn info(&self) -> &LinkInfo {
        &self.info
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        if let Steering::Rules(rules) = &mut self.steering {
            rules.clear(&self.nic);
        }
    }
}

/// Opens the best link that `options` allow; fills in `info`. Gives the longest frame that can be received, tag included.
fn open_link(
    options: &LinkOptions,
    ports: &Ports,
    steered_cores: u16,
    region: &Arc<Region>,
    nic: &Nic,
    state: NicState,
    info: &mut LinkInfo,
) -> Result<(Link, usize), LinkError> {
    let name = info.interface.clone();
    let filter = ports.filter(options.frames);
    if options.choice != LinkChoice::AfPacket {
        let tags = nic.switch(TAKES_TAGS_OUT, false);
        let wish = Wish { filter: &filter, tags, choice: options.choice, steered_cores };
        match XdpInterface::open(nic, state, region, wish, info) {
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
