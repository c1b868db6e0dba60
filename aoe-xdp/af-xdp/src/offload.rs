//! What a NIC does to frames on its own, by the kernel's names (`ethtool -k` shows others for some): read and switched.
//!
//! Replies are parsed totally: a short or odd one is an absence, never a panic.

use crate::error::Error;
use crate::nic::{Nic, word_at};

/// The NIC takes 802.1Q tags out of received frames (`ethtool -K … rxvlan`): a tagged frame then looks untagged to an
/// XDP program.
pub const TAKES_TAGS_OUT: &str = "rx-vlan-hw-parse";
/// The NIC drops frames of VLANs that no interface of the host is on (`ethtool -K … rx-vlan-filter`).
pub const DROPS_OTHER_VLANS: &str = "rx-vlan-filter";
/// The NIC takes receive rules (`ethtool -K … ntuple`).
pub const TAKES_RULES: &str = "rx-ntuple-filter";

// Commands and sets of include/uapi/linux/ethtool.h.
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
const NAME_BYTES: usize = 32;
/// Most offloads that are looked at; Linux has about 60.
const OFFLOADS_MAX: usize = 256;

/// How an offload stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// It is off, or the driver does not have it.
    Off,
    /// It is on and may be switched off.
    On,
    /// It is on and cannot be switched off.
    Fixed,
}

impl Nic {
    /// How the offload of that name stands; off where the driver does not say.
    pub fn offload(&self, name: &str) -> Offload {
        self.try_offload(name).map_or(Offload::Off, |(_, _, state)| state)
    }

    /// Switches the offload of that name on or off; says how it stands then. It stays so when this process ends.
    pub fn switch(&self, name: &str, on: bool) -> Offload {
        let unwanted = if on { Offload::Off } else { Offload::On };
        if let Some((number, offloads, state)) = self.try_offload(name)
            && state == unwanted
        {
            let mut request = switch_request(number, offloads, on);
            // What the driver made of it is read back below.
            let _refused = self.ethtool(ETHTOOL_SFEATURES, &mut request);
        }
        self.offload(name)
    }

    /// The number of an offload, the number of all, and its state; `None` where the driver has none of that name or does
    /// not say.
    fn try_offload(&self, name: &str) -> Option<(usize, usize, Offload)> {
        let names = self.offload_names().ok()?;
        let number = position_of(&names, name)?;
        let offloads = names.len() / NAME_BYTES;
        let mut blocks = get_request(offloads);
        self.ethtool(ETHTOOL_GFEATURES, &mut blocks).ok()?;
        Some((number, offloads, parse_state(&blocks, number)?))
    }

    /// The names of all offloads, 32 bytes each.
    fn offload_names(&self) -> Result<Vec<u8>, Error> {
        let absent = || Error::Malformed { what: "offload names" };
        let mut info = [0; 20];
        info[8..16].copy_from_slice(&(1u64 << ETH_SS_FEATURES).to_ne_bytes());
        self.ethtool(ETHTOOL_GSSET_INFO, &mut info)?;
        let count = word_at(&info, 16).ok_or_else(absent)? as usize;
        if count > OFFLOADS_MAX {
            return Err(absent());
        }
        let mut names = vec![0; 12 + count * NAME_BYTES];
        names[4..8].copy_from_slice(&ETH_SS_FEATURES.to_ne_bytes());
        names[8..12].copy_from_slice(&u32::try_from(count).map_err(|_| absent())?.to_ne_bytes());
        self.ethtool(ETHTOOL_GSTRINGS, &mut names)?;
        Ok(names.split_off(12))
    }
}

/// The place of a name in `struct ethtool_gstrings`' data.
fn position_of(names: &[u8], name: &str) -> Option<usize> {
    names.chunks_exact(NAME_BYTES).position(|entry| {
        let end = entry.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        entry[..end] == *name.as_bytes()
    })
}

/// An empty `struct ethtool_gfeatures` for that many offloads.
fn get_request(offloads: usize) -> Vec<u8> {
    let blocks = offloads.div_ceil(32);
    let mut request = vec![0; 8 + blocks * 16];
    request[4..8].copy_from_slice(&u32::try_from(blocks).expect("a few offloads").to_ne_bytes());
    request
}

/// `struct ethtool_gfeatures`: command, count, then blocks of available, requested, active, never changed.
fn parse_state(reply: &[u8], number: usize) -> Option<Offload> {
    let block = 8 + number / 32 * 16;
    let bit = 1 << (number % 32);
    let (available, active) = (word_at(reply, block)?, word_at(reply, block + 8)?);
    let never_changed = word_at(reply, block + 12)?;
    Some(match (active & bit != 0, available & !never_changed & bit != 0) {
        (false, _) => Offload::Off,
        (true, true) => Offload::On,
        (true, false) => Offload::Fixed,
    })
}

/// `struct ethtool_sfeatures` that switches one of that many offloads: command, count, then blocks of valid,
/// requested. The kernel takes it with all blocks only.
fn switch_request(number: usize, offloads: usize, on: bool) -> Vec<u8> {
    let blocks = offloads.div_ceil(32);
    let mut request = vec![0; 8 + blocks * 8];
    request[4..8].copy_from_slice(&u32::try_from(blocks).expect("a few offloads").to_ne_bytes());
    let valid = 8 + number / 32 * 8;
    let bit = (1u32 << (number % 32)).to_ne_bytes();
    request[valid..valid + 4].copy_from_slice(&bit);
    if on {
        request[valid + 4..valid + 8].copy_from_slice(&bit);
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_is_found_whole() {
        let mut names = vec![0; 3 * NAME_BYTES];
        names[..5].copy_from_slice(b"rx-vl");
        names[NAME_BYTES..2 * NAME_BYTES].fill(b'x');
        names[2 * NAME_BYTES..][..14].copy_from_slice(DROPS_OTHER_VLANS.as_bytes());
        assert_eq!(position_of(&names, DROPS_OTHER_VLANS), Some(2));
        assert_eq!(position_of(&names, &"x".repeat(32)), Some(1));
        assert_eq!(position_of(&names, "rx"), None);
    }

    #[test]
    fn states_are_told_apart() {
        let mut reply = get_request(40);
        assert_eq!(reply.len(), 8 + 2 * 16);
        let mut set = |word: usize, bits: u32| {
            reply[8 + 16 + word * 4..][..4].copy_from_slice(&bits.to_ne_bytes());
        };
        set(0, 0b0111);
        set(2, 0b1110);
        set(3, 0b0100);
        let state = |number: usize| parse_state(&reply, 32 + number).unwrap();
        assert_eq!(
            [state(0), state(1), state(2), state(3)],
            [Offload::Off, Offload::On, Offload::Fixed, Offload::Fixed]
        );
        assert_eq!(parse_state(&reply, 64), None);
    }

    #[test]
    fn one_offload_is_asked_for() {
        let mut expected = vec![0; 24];
        expected[4..8].copy_from_slice(&2u32.to_ne_bytes());
        expected[16..20].copy_from_slice(&(1u32 << 3).to_ne_bytes());
        assert_eq!(switch_request(35, 64, false), expected);
        expected[20..24].copy_from_slice(&(1u32 << 3).to_ne_bytes());
        assert_eq!(switch_request(35, 64, true), expected);
    }

    #[test]
    fn an_offload_of_a_virtual_interface_is_switched() {
        let test = "offload::tests::an_offload_of_a_virtual_interface_is_switched";
        crate::netns::isolated(test, || {
            crate::netns::veth_pair(1500, 1);
            let nic = Nic::open("a0").unwrap();
            assert_eq!(nic.offload(TAKES_TAGS_OUT), Offload::On);
            assert_eq!(nic.switch(TAKES_TAGS_OUT, false), Offload::Off);
            assert_eq!(nic.switch(TAKES_TAGS_OUT, false), Offload::Off);
            assert_eq!(Nic::open("b0").unwrap().offload(TAKES_TAGS_OUT), Offload::On);
            assert_eq!(nic.switch(TAKES_TAGS_OUT, true), Offload::On);
            assert_eq!(nic.switch("no-such-offload", true), Offload::Off);
        });
    }

    proptest! {
        #[test]
        fn replies_of_any_bytes_are_parsed(bytes in proptest::collection::vec(any::<u8>(), 0..300), number in 0usize..300) {
            position_of(&bytes, TAKES_TAGS_OUT);
            parse_state(&bytes, number);
        }
    }
}
