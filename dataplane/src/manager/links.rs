//! The node's interfaces while it runs: what changes about them reaches cores, initiators and whoever looks.
//!
//! * An MTU that changes changes what is advertised; so does a new address. A link that comes up is advertised on again.
//! * An interface that is not there, or down at the start, or gone, is waited for while the others serve on. Once it is
//!   there (again) the process has to be started anew to open it: [`Links::look`] says so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use af_xdp::nic::Nic;
use aoe_xdp::link::{Interface, InterfaceName, LinkInfo, LinkMode, MTU_MIN_BYTES, Port};
use aoe_xdp::target::Ingress;
use aoe_xdp::wire::Mac;
use cluster_map::{LinkLosses, ObservedLink};

use crate::exchange::Losses;

/// A network interface of the node, with all logical interfaces on it.
pub(super) struct NodeInterface {
    netdev: String,
    ports: Vec<Port>,
    state: State,
}

enum State {
    Open {
        interface: Box<Interface>,
        queues: Vec<OpenQueue>,
        /// Has a carrier.
        up: bool,
        /// It is gone, for that reason.
        gone: Option<String>,
    },
    /// It cannot be opened, for that reason.
    Waiting(String),
}

/// One queue of an open interface.
pub(super) struct OpenQueue {
    /// What it is.
    pub(super) info: LinkInfo,
    /// The CPU of the core that owns it.
    pub(super) cpu: u16,
    /// What has been lost on it: by its owner, and by other cores on their lanes.
    pub(super) losses: Vec<Arc<Losses>>,
}

impl OpenQueue {
    fn losses(&self) -> LinkLosses {
        let mut sum = [0; LinkLosses::COUNT];
        for losses in &self.losses {
            for (total, word) in sum.iter_mut().zip(losses.load().words()) {
                *total += word;
            }
        }
        LinkLosses::of_words(sum)
    }
}

impl NodeInterface {
    pub(super) fn open(
        netdev: String,
        ports: Vec<Port>,
        interface: Interface,
        queues: Vec<OpenQueue>,
    ) -> NodeInterface {
        let state = State::Open { interface: Box::new(interface), queues, up: false, gone: None };
        NodeInterface { netdev, ports, state }
    }

    pub(super) fn waiting(netdev: String, ports: Vec<Port>, reason: String) -> NodeInterface {
        NodeInterface { netdev, ports, state: State::Waiting(reason) }
    }

    /// Whether the interface could be opened if the process were started now.
    fn can_be_opened(&self) -> bool {
        let state = Nic::open(&self.netdev).and_then(|nic| nic.state());
        state.is_ok_and(|state| state.up && state.mtu_bytes >= MTU_MIN_BYTES)
    }

    /// Looks at an open interface; whether what initiators must know has changed.
    fn look(&mut self) -> bool {
        let State::Open { interface, up, gone, .. } = &mut self.state else { return false };
        let before = ingress_parts(interface);
        match interface.look() {
            Ok(state) => {
                let was_up = std::mem::replace(up, state.up && state.running);
                *gone = None;
                (*up && !was_up) || ingress_parts(interface) != before
            }
            Err(error) => {
                *up = false;
                *gone = Some(error.to_string());
                false
            }
        }
    }

    fn is_missing(&self) -> bool {
        match &self.state {
            State::Open { gone, .. } => gone.is_some(),
            State::Waiting(_) => true,
        }
    }

    fn name(&self, port: Port) -> String {
        InterfaceName { netdev: self.netdev.clone(), vlan: port.vlan }.to_string()
    }

    fn observe(&self, links: &mut Vec<ObservedLink>) {
        for port in &self.ports {
            let interface = self.name(*port);
            match &self.state {
                State::Waiting(reason) => {
                    // Nothing was had yet: the least that it may become.
                    let mode = cluster_map::LinkMode::Packet;
                    links.push(ObservedLink {
                        interface,
                        mode,
                        note: reason.clone(),
                        ..ObservedLink::default()
                    });
                }
                State::Open { interface: open, queues, up, gone } => {
                    let now = open.info();
                    links.extend(queues.iter().map(|queue| ObservedLink {
                        interface: interface.clone(),
                        queue: queue.info.queue,
                        core: queue.cpu,
                        mode: observed_mode(queue.info.mode),
                        segments: queue.info.segments,
                        mtu: now.mtu,
                        max_sectors: now.max_sectors,
                        up: *up,
                        mac: now.mac,
                        note: gone.clone().unwrap_or_else(|| now.note.clone()),
                        losses: queue.losses(),
                    }));
                }
            }
        }
    }
}

/// What answers and advertisements depend on.
fn ingress_parts(interface: &Interface) -> ([u8; 6], u8) {
    (interface.info().mac, interface.info().max_sectors)
}

/// An interface that was missing can be opened now.
#[derive(Debug, thiserror::Error)]
#[error("interface {0} is there now: the data plane is started anew to serve on it")]
pub(super) struct Returned(String);

/// All interfaces of the node.
pub(super) struct Links {
    interfaces: Vec<NodeInterface>,
    /// By ordinal: most sectors that initiators were told.
    sectors_told: Vec<u8>,
}

impl Links {
    pub(super) fn new(interfaces: Vec<NodeInterface>) -> Links {
        let ordinals = interfaces.iter().map(|interface| interface.ports.len()).sum();
        Links { interfaces, sectors_told: vec![0; ordinals] }
    }

    /// Looks at all interfaces; whether initiators must be told something new.
    ///
    /// # Errors
    /// [`Returned`].
    pub(super) fn look(&mut self) -> Result<bool, Returned> {
        let mut changed = false;
        for interface in &mut self.interfaces {
            changed |= interface.look();
            if interface.is_missing() && interface.can_be_opened() {
                return Err(Returned(interface.netdev.clone()));
            }
        }
        Ok(changed)
    }

    /// What frames meet, by ordinal, and the MTUs in bytes. From now on it counts as told to initiators.
    pub(super) fn ingress(&mut self) -> (Vec<Ingress>, Vec<u32>) {
        let unusable = |ordinal| Ingress { mac: Mac([0; 6]), ordinal, sectors_max: 0, sectors_told: 0 };
        let ordinals = u8::try_from(self.sectors_told.len()).expect("at most 16 interfaces");
        let mut ingress: Vec<_> = (0..ordinals).map(unusable).collect();
        let mut mtus = vec![0; usize::from(ordinals)];
        for node in &self.interfaces {
            let State::Open { interface, .. } = &node.state else { continue };
            let info = interface.info();
            for port in &node.ports {
                let at = usize::from(port.ordinal);
                self.sectors_told[at] = self.sectors_told[at].max(info.max_sectors);
                ingress[at] = Ingress {
                    mac: Mac(info.mac),
                    ordinal: port.ordinal,
                    sectors_max: info.max_sectors,
                    sectors_told: self.sectors_told[at],
                };
                mtus[at] = info.mtu;
            }
        }
        (ingress, mtus)
    }

    /// Lets the interfaces take frames for the addresses that `macs_on` gives for an ordinal, instead of the former ones.
    pub(super) fn accept_macs(
        &mut self,
        wanted_on: impl Fn(u8) -> BTreeSet<[u8; 6]>,
        present_on: impl Fn(u8) -> BTreeSet<[u8; 6]>,
    ) -> anyhow::Result<()> {
        for node in &mut self.interfaces {
            let State::Open { interface, gone: None, .. } = &mut node.state else { continue };
            for port in &node.ports {
                let (wanted, present) = (wanted_on(port.ordinal), present_on(port.ordinal));
                for mac in wanted.difference(&present) {
                    interface.add_mac(*mac)?;
                }
                for mac in present.difference(&wanted) {
                    interface.remove_mac(*mac)?;
                }
            }
        }
        Ok(())
    }

    /// Lets NICs or the XDP program bring frames to the addresses that `owners_on` gives for an ordinal to the core that owns
    /// the export.
    pub(super) fn steer(&mut self, owners_on: impl Fn(u8) -> Vec<([u8; 6], u16)>) {
        for node in &mut self.interfaces {
            let State::Open { interface, gone: None, .. } = &mut node.state else { continue };
            let owners = node.ports.iter().flat_map(|port| owners_on(port.ordinal));
            interface.steer(&owners.collect::<BTreeMap<_, _>>());
        }
    }

    pub(super) fn observe(&self) -> Vec<ObservedLink> {
        let mut links = Vec::new();
        for interface in &self.interfaces {
            interface.observe(&mut links);
        }
        links
    }
}

fn observed_mode(mode: LinkMode) -> cluster_map::LinkMode {
    match mode {
        LinkMode::XdpZeroCopy => cluster_map::LinkMode::XdpZeroCopy,
        LinkMode::XdpNativeCopy => cluster_map::LinkMode::XdpNativeCopy,
        LinkMode::XdpGeneric => cluster_map::LinkMode::XdpGeneric,
        LinkMode::Packet => cluster_map::LinkMode::Packet,
    }
}
