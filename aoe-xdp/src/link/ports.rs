//! Logical interfaces: a network interface, or one 802.1Q VLAN of it.
//!
//! Above the link every frame looks untagged; by which logical interface it came is told beside. Answers to a VLAN leave
//! with its tag, at priority 0.

use std::fmt;
use std::str::FromStr;

use af_xdp::frame::RxFrame;
use af_xdp::frame_filter::FrameFilter;

use super::error::LinkError;
use crate::wire::{ETHERTYPE, flags};

/// An 802.1Q VLAN, 1 to 4094.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VlanId(u16);

impl VlanId {
    /// The VLAN of that number; `None` outside 1 to 4094.
    #[must_use]
    pub fn new(number: u16) -> Option<VlanId> {
        (1..=4094).contains(&number).then_some(VlanId(number))
    }

    /// Its number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }
}

/// The name of a logical interface: `eth0`, or `eth0@100` for VLAN 100 of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InterfaceName {
    /// The network interface.
    pub netdev: String,
    /// Its VLAN; `None` for untagged frames.
    pub vlan: Option<VlanId>,
}

impl FromStr for InterfaceName {
    type Err = LinkError;

    fn from_str(text: &str) -> Result<Self, LinkError> {
        let bad = || LinkError::BadName { name: text.to_owned() };
        let (netdev, vlan) = match text.split_once('@') {
            None => (text, None),
            Some((netdev, digits)) => {
                // Not "+5" nor "007": a name has one spelling.
                let number = digits.parse().ok().filter(|number: &u16| number.to_string() == digits);
                (netdev, Some(number.and_then(VlanId::new).ok_or_else(bad)?))
            }
        };
        if netdev.is_empty() {
            return Err(bad());
        }
        Ok(InterfaceName { netdev: netdev.to_owned(), vlan })
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vlan {
            None => f.write_str(&self.netdev),
            Some(vlan) => write!(f, "{}@{}", self.netdev, vlan.0),
        }
    }
}

/// One logical interface of a network interface that is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// The number it has for whoever opens it; received frames carry it.
    pub ordinal: u8,
    /// Its VLAN; `None` for untagged frames.
    pub vlan: Option<VlanId>,
}

/// Which AoE frames a link takes; what it does not take goes to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frames {
    /// All.
    All,
    /// Requests only, so that the host may be an initiator on the same interface.
    Requests,
}

/// The logical interfaces of one network interface, found both ways.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ports(Vec<Port>);

impl Ports {
    pub(super) fn new(ports: &[Port]) -> Ports {
        Ports(ports.to_vec())
    }

    pub(super) fn has_vlans(&self) -> bool {
        self.0.iter().any(|port| port.vlan.is_some())
    }

    /// What the kernel is to give us.
    pub(super) fn filter(&self, frames: Frames) -> FrameFilter {
        FrameFilter {
            ethertype: ETHERTYPE,
            untagged: self.0.iter().any(|port| port.vlan.is_none()),
            vlans: self.0.iter().filter_map(|port| port.vlan).map(VlanId::get).collect(),
            rejected_flags: match frames {
                Frames::All => 0,
                Frames::Requests => flags::RESPONSE,
            },
        }
    }

    /// By which logical interface a frame came; `vlan_id` 0 is none.
    pub(super) fn ordinal_of(&self, vlan_id: u16) -> Option<u8> {
        let is_it = |port: &&Port| port.vlan.map_or(0, VlanId::get) == vlan_id;
        self.0.iter().find(is_it).map(|port| port.ordinal)
    }

    /// Notes by which logical interface each frame from place `from` on came. Frames of none go to `refuse`; how many.
    pub(super) fn tell_apart(
        &self,
        frames: &mut Vec<RxFrame>,
        from: usize,
        mut refuse: impl FnMut(RxFrame),
    ) -> u64 {
        let (mut at, mut foreign) = (from, 0);
        while let Some(frame) = frames.get_mut(at) {
            match self.ordinal_of(frame.vlan_id()) {
                Some(ordinal) => {
                    frame.set_interface(ordinal);
                    at += 1;
                }
                None => {
                    foreign += 1;
                    refuse(frames.remove(at));
                }
            }
        }
        foreign
    }

    pub(super) fn get(&self, ordinal: u8) -> Option<Port> {
        self.0.iter().find(|port| port.ordinal == ordinal).copied()
    }

    pub(super) fn as_slice(&self) -> &[Port] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_have_one_spelling() {
        let name = |text: &str| text.parse::<InterfaceName>();
        assert_eq!(name("eth0").unwrap(), InterfaceName { netdev: "eth0".into(), vlan: None });
        assert_eq!(name("br-1@100").unwrap().vlan, VlanId::new(100));
        for text in ["", "@5", "eth0@", "eth0@0", "eth0@4095", "eth0@+5", "eth0@05", "eth0@5@6", "eth0@x"] {
            let error = name(text).unwrap_err().to_string();
            assert!(error.contains("eth0@100") && error.contains("4094"), "{text}: {error}");
        }
    }

    #[test]
    fn a_port_is_found_by_its_vlan_and_by_its_ordinal() {
        let ports =
            Ports::new(&[Port { ordinal: 3, vlan: VlanId::new(100) }, Port { ordinal: 5, vlan: None }]);
        assert_eq!(
            [ports.ordinal_of(100), ports.ordinal_of(0), ports.ordinal_of(101)],
            [Some(3), Some(5), None]
        );
        assert_eq!(ports.get(3).and_then(|port| port.vlan), VlanId::new(100));
        assert_eq!(ports.get(4), None);
        let filter = ports.filter(Frames::Requests);
        assert_eq!((filter.untagged, filter.vlans, filter.rejected_flags), (true, vec![100], 8));
    }

    proptest! {
        #[test]
        fn a_name_is_written_as_it_is_read(text in "[a-z0-9@.+-]{0,12}") {
            if let Ok(name) = text.parse::<InterfaceName>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
