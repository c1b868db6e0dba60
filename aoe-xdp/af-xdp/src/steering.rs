//! Receive rules of a NIC (`ethtool -N … flow-type ether`): frames to an address come in by a queue of our choice.
//!
//! Rules outlive this process; a rule of exactly the shape that is made here is taken for one that a former process left
//! behind, and removed when a table is opened. All others are left alone. Replies are parsed totally.

use std::collections::BTreeSet;

use crate::error::Error;
use crate::nic::{Nic, word_at};
use crate::offload::TAKES_RULES;

// Commands and values of include/uapi/linux/ethtool.h.
const ETHTOOL_GRXCLSRLCNT: u32 = 0x2e;
const ETHTOOL_GRXCLSRULE: u32 = 0x2f;
const ETHTOOL_GRXCLSRLALL: u32 = 0x30;
const ETHTOOL_SRXCLSRLDEL: u32 = 0x31;
const ETHTOOL_SRXCLSRLINS: u32 = 0x32;
const ETHER_FLOW: u32 = 0x12;
const RX_CLS_LOC_SPECIAL: u32 = 0x8000_0000;
const RX_CLS_LOC_ANY: u32 = 0xffff_ffff;

/// Bytes of `struct ethtool_rxnfc` without its list of places.
const REQUEST_BYTES: usize = 192;
// Where its fields are. The rule's own structure begins at 16.
const DATA_AT: usize = 8;
const FLOW_TYPE_AT: usize = 16;
const VALUE_AT: usize = 20;
const VALUE_EXTENSION_AT: usize = 72;
const MASK_AT: usize = 92;
const MASK_EXTENSION_AT: usize = 144;
const QUEUE_AT: usize = 168;
const PLACE_AT: usize = 176;
const COUNT_AT: usize = 184;
const PLACES_AT: usize = 188;
/// Bytes of a value or mask: an Ethernet header and unused ones.
const FIELDS_BYTES: usize = 52;
/// Most rules that are listed.
const RULES_MAX: u32 = 1 << 16;

/// Frames of an EtherType to an address go to a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// The destination.
    pub mac: [u8; 6],
    /// What the frame is.
    pub ethertype: u16,
    /// The receive queue.
    pub queue: u16,
}

/// Where a rule stands in the NIC's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place(u32);

/// What carries ethtool requests out: a [`Nic`], or a test's own.
pub trait Ethtool {
    /// One request: the buffer starts with the command and is filled in.
    ///
    /// # Errors
    ///
    /// What the driver said.
    fn call(&self, command: u32, buffer: &mut [u8]) -> Result<(), Error>;
}

impl Ethtool for Nic {
    fn call(&self, command: u32, buffer: &mut [u8]) -> Result<(), Error> {
        self.ethtool(command, buffer)
    }
}

/// A NIC's table of rules, as far as it is ours.
#[derive(Debug)]
pub struct RuleTable {
    /// Places that are in use; `None` where the driver chooses a place itself.
    taken: Option<BTreeSet<u32>>,
    places: u32,
}

impl RuleTable {
    /// Opens the table of a NIC, switching it on where that is needed.
    ///
    /// # Errors
    ///
    /// As for [`RuleTable::open`].
    pub fn of(nic: &Nic, ethertype: u16) -> Result<Self, Error> {
        // A driver that has no such switch may have rules all the same: asked for them, it says so itself.
        let _stands = nic.switch(TAKES_RULES, true);
        Self::open(nic, ethertype)
    }

    /// Opens the table and removes what a former process has left in it for `ethertype`.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` where the driver has no rules; otherwise what it said.
    pub fn open(nic: &impl Ethtool, ethertype: u16) -> Result<Self, Error> {
        let mut count = request();
        nic.call(ETHTOOL_GRXCLSRLCNT, &mut count)?;
        let malformed = || Error::Malformed { what: "number of receive rules" };
        let rules = word_at(&count, COUNT_AT).ok_or_else(malformed)?;
        let flags = word_at(&count, DATA_AT).ok_or_else(malformed)?;
        if rules > RULES_MAX {
            return Err(malformed());
        }
        let mut list = vec![0; (PLACES_AT + rules as usize * 4).max(REQUEST_BYTES)];
        put(&mut list, COUNT_AT, rules);
        nic.call(ETHTOOL_GRXCLSRLALL, &mut list)?;
        let places = word_at(&list, DATA_AT).ok_or_else(malformed)? & !RX_CLS_LOC_SPECIAL;
        let listed = word_at(&list, COUNT_AT).ok_or_else(malformed)?.min(rules);
        let mut taken = BTreeSet::new();
        for index in 0..listed as usize {
            let place = word_at(&list, PLACES_AT + index * 4).ok_or_else(malformed)?;
            let mut rule = request();
            put(&mut rule, PLACE_AT, place);
            let is_ours = nic.call(ETHTOOL_GRXCLSRULE, &mut rule).is_ok() && is_left_behind(&rule, ethertype);
            if !is_ours || remove(nic, place).is_err() {
                taken.insert(place);
            }
        }
        let chooses = flags & RX_CLS_LOC_SPECIAL != 0;
        Ok(Self { taken: (!chooses).then_some(taken), places })
    }

    /// Puts a rule in.
    ///
    /// # Errors
    ///
    /// `ENOSPC` where the table is full; otherwise what the driver said.
    pub fn insert(&mut self, nic: &impl Ethtool, rule: Rule) -> Result<Place, Error> {
        let place = match &self.taken {
            None => RX_CLS_LOC_ANY,
            // From the end: administrators' rules stand at the beginning, as a rule.
            Some(taken) => (0..self.places).rev().find(|place| !taken.contains(place)).ok_or(Error::Os {
                action: "adding a receive rule",
                source: std::io::Error::from_raw_os_error(libc::ENOSPC),
            })?,
        };
        let mut buffer = insert_request(rule, place);
        nic.call(ETHTOOL_SRXCLSRLINS, &mut buffer)?;
        let place = word_at(&buffer, PLACE_AT).ok_or(Error::Malformed { what: "place of a receive rule" })?;
        if let Some(taken) = &mut self.taken {
            taken.insert(place);
        }
        Ok(Place(place))
    }

    /// Takes a rule out.
    ///
    /// # Errors
    ///
    /// What the driver said.
    pub fn remove(&mut self, nic: &impl Ethtool, place: Place) -> Result<(), Error> {
        remove(nic, place.0)?;
        if let Some(taken) = &mut self.taken {
            taken.remove(&place.0);
        }
        Ok(())
    }
}

fn request() -> Vec<u8> {
    vec![0; REQUEST_BYTES]
}

fn put(buffer: &mut [u8], at: usize, word: u32) {
    buffer[at..at + 4].copy_from_slice(&word.to_ne_bytes());
}

fn remove(nic: &impl Ethtool, place: u32) -> Result<(), Error> {
    let mut buffer = request();
    put(&mut buffer, PLACE_AT, place);
    nic.call(ETHTOOL_SRXCLSRLDEL, &mut buffer)
}

/// `struct ethtool_rxnfc` with a rule on destination and EtherType; a mask's set bits are compared.
fn insert_request(rule: Rule, place: u32) -> Vec<u8> {
    let mut buffer = request();
    put(&mut buffer, FLOW_TYPE_AT, ETHER_FLOW);
    buffer[VALUE_AT..VALUE_AT + 6].copy_from_slice(&rule.mac);
    buffer[VALUE_AT + 12..VALUE_AT + 14].copy_from_slice(&rule.ethertype.to_be_bytes());
    buffer[MASK_AT..MASK_AT + FIELDS_BYTES].copy_from_slice(&rule_mask());
    buffer[QUEUE_AT..QUEUE_AT + 8].copy_from_slice(&u64::from(rule.queue).to_ne_bytes());
    put(&mut buffer, PLACE_AT, place);
    buffer
}

/// Destination and EtherType whole, nothing else.
fn rule_mask() -> [u8; FIELDS_BYTES] {
    let mut mask = [0; FIELDS_BYTES];
    mask[..6].fill(0xff);
    mask[12..14].fill(0xff);
    mask
}

/// Whether a rule is one of ours: for one locally administered address and our EtherType, and nothing else.
fn is_left_behind(rule: &[u8], ethertype: u16) -> bool {
    let bytes = |at: usize, len: usize| rule.get(at..at + len).unwrap_or(&[]);
    let first = bytes(VALUE_AT, 1).first().copied().unwrap_or(0);
    word_at(rule, FLOW_TYPE_AT) == Some(ETHER_FLOW)
        && first & 0x03 == 0x02
        && bytes(VALUE_AT + 12, 2) == ethertype.to_be_bytes()
        && bytes(MASK_AT, FIELDS_BYTES) == rule_mask()
        && bytes(MASK_EXTENSION_AT, 20).iter().all(|byte| *byte == 0)
}

const _: () = assert!(VALUE_AT + FIELDS_BYTES == VALUE_EXTENSION_AT && VALUE_EXTENSION_AT + 20 == MASK_AT);
const _: () = assert!(MASK_AT + FIELDS_BYTES == MASK_EXTENSION_AT && PLACE_AT + 8 == COUNT_AT);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::io;

    const AOE: u16 = 0x88a2;

    fn rule(last: u8, queue: u16) -> Rule {
        Rule { mac: [0x02, 0xaa, 1, 2, 3, last], ethertype: AOE, queue }
    }

    /// A NIC with a table of its own.
    struct Fake {
        rules: RefCell<BTreeMap<u32, Vec<u8>>>,
        places: u32,
        chooses: bool,
        supported: bool,
    }

    impl Fake {
        fn new(places: u32, chooses: bool) -> Fake {
            Fake { rules: RefCell::default(), places, chooses, supported: true }
        }
    }

    impl Ethtool for Fake {
        fn call(&self, command: u32, buffer: &mut [u8]) -> Result<(), Error> {
            let refuse = |errno| {
                let source = io::Error::from_raw_os_error(errno);
                Err(Error::Os { action: "asking the interface's driver", source })
            };
            let mut rules = self.rules.borrow_mut();
            let place = u32::from_ne_bytes(buffer[176..180].try_into().unwrap());
            match command {
                _ if !self.supported => return refuse(libc::EOPNOTSUPP),
                0x2e => {
                    put(buffer, 184, u32::try_from(rules.len()).unwrap());
                    put(buffer, 8, self.places | if self.chooses { 1 << 31 } else { 0 });
                }
                0x30 => {
                    put(buffer, 8, self.places);
                    for (index, place) in rules.keys().enumerate() {
                        put(buffer, 188 + 4 * index, *place);
                    }
                }
                0x2f => match rules.get(&place) {
                    Some(rule) => buffer[16..184].copy_from_slice(rule),
                    None => return refuse(libc::ENOENT),
                },
                0x31 if rules.remove(&place).is_none() => return refuse(libc::ENOENT),
                0x31 => {}
                0x32 => {
                    let free = (0..self.places).find(|place| !rules.contains_key(place));
                    let place = if self.chooses && place == u32::MAX { free } else { Some(place) };
                    let Some(place) = place.filter(|place| *place < self.places) else {
                        return refuse(libc::ENOSPC);
                    };
                    put(buffer, 176, place);
                    rules.insert(place, buffer[16..184].to_vec());
                }
                other => panic!("command {other:#x}"),
            }
            Ok(())
        }
    }

    /// As `ethtool -N eth0 flow-type ether dst 02:aa:01:02:03:04 proto 0x88a2 action 5 loc 7` hands it to the kernel.
    #[test]
    fn a_rule_is_encoded_byte_for_byte() {
        let buffer = insert_request(rule(4, 5), 7);
        let mut expected = vec![0u8; 192];
        expected[16] = 0x12;
        expected[20..26].copy_from_slice(&[0x02, 0xaa, 1, 2, 3, 4]);
        expected[32..34].copy_from_slice(&[0x88, 0xa2]);
        expected[92..98].copy_from_slice(&[0xff; 6]);
        expected[104..106].copy_from_slice(&[0xff; 2]);
        expected[168] = 5;
        expected[176] = 7;
        assert_eq!(buffer, expected);
    }

    #[test]
    fn rules_come_and_go_in_both_kinds_of_tables() {
        for chooses in [true, false] {
            let nic = Fake::new(3, chooses);
            let mut table = RuleTable::open(&nic, AOE).unwrap();
            let places: Vec<_> = (0..3).map(|n| table.insert(&nic, rule(n << 4, 1)).unwrap()).collect();
            assert_eq!(nic.rules.borrow().len(), 3);
            let full = table.insert(&nic, rule(0x70, 0)).unwrap_err();
            assert_eq!(full.errno(), Some(libc::ENOSPC));
            table.remove(&nic, places[1]).unwrap();
            table.insert(&nic, rule(0x70, 0)).unwrap();
            assert!(table.remove(&nic, Place(9)).is_err());
        }
    }

    #[test]
    fn what_a_former_process_left_is_removed_and_nothing_else() {
        for chooses in [true, false] {
            let nic = Fake::new(8, chooses);
            let mut before = RuleTable::open(&nic, AOE).unwrap();
            for n in 0..3 {
                before.insert(&nic, rule(n << 4, 1)).unwrap();
            }
            let others = [
                Rule { ethertype: 0x0800, ..rule(0, 0) },
                Rule { mac: [0x00, 0x1b, 1, 2, 3, 4], ..rule(0, 0) },
            ];
            for other in others {
                before.insert(&nic, other).unwrap();
            }
            // Everything of our EtherType to one queue: an administrator's.
            let mut wide = insert_request(rule(0, 2), 7);
            wide[92..98].fill(0);
            nic.rules.borrow_mut().insert(7, wide[16..184].to_vec());
            let of_a_vlan = {
                let mut buffer = insert_request(rule(0, 2), 6);
                buffer[150] = 0xff;
                buffer[16..184].to_vec()
            };
            nic.rules.borrow_mut().insert(6, of_a_vlan);
            let kept = 4;
            let mut after = RuleTable::open(&nic, AOE).unwrap();
            assert_eq!(nic.rules.borrow().len(), kept);
            assert!(nic.rules.borrow().contains_key(&7) && nic.rules.borrow().contains_key(&6));
            let free = 8 - kept;
            assert_eq!((0..8).filter(|n| after.insert(&nic, rule(n << 4, 0)).is_ok()).count(), free);
        }
    }

    #[test]
    fn a_nic_without_rules_says_so() {
        let nic = Fake { supported: false, ..Fake::new(3, true) };
        assert_eq!(RuleTable::open(&nic, AOE).unwrap_err().errno(), Some(libc::EOPNOTSUPP));
        let test = "steering::tests::a_nic_without_rules_says_so";
        crate::netns::isolated(test, || {
            crate::netns::veth_pair(1500, 2);
            let error = RuleTable::of(&Nic::open("a0").unwrap(), AOE).unwrap_err();
            assert_eq!(error.errno(), Some(libc::EOPNOTSUPP), "{error}");
        });
    }

    proptest! {
        #[test]
        fn rules_of_any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..220)) {
            is_left_behind(&bytes, AOE);
        }
    }
}
