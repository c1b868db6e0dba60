//! Addresses that the NIC itself steers to the queue of the core that serves them.
//!
//! What it does not steer comes in by whatever queue the NIC chooses, for AoE mostly the first, and is handed over between
//! cores: slower, never wrong.

use std::collections::BTreeMap;

use af_xdp::nic::Nic;
use af_xdp::steering::{Ethtool, Place, Rule, RuleTable};

use crate::wire::ETHERTYPE;

/// A locally administered address that is put in for a moment, to see whether the driver takes it.
const NOBODY: [u8; 6] = [0x02, 0, 0, 0, 0, 0];
/// `EOPNOTSUPP`.
const UNSUPPORTED: i32 = 95;

/// The rules in a NIC's table, and what the NIC refused.
#[derive(Debug)]
pub(super) struct Steered {
    table: Result<RuleTable, String>,
    rules: BTreeMap<[u8; 6], (u16, Place)>,
    wanted: usize,
    /// Why not all that was wanted is steered.
    refusal: Option<String>,
}

impl Steered {
    /// Opens a NIC's table, and removes what a former process left in it.
    pub(super) fn open(nic: &Nic) -> Self {
        let mut opened = Self::of(RuleTable::of(nic, ETHERTYPE).map_err(|error| match error.errno() {
            // What most drivers say: nothing went wrong.
            Some(UNSUPPORTED) => "it has no rules for that".to_owned(),
            _ => error.to_string(),
        }));
        opened.try_out(nic);
        opened
    }

    /// Puts a rule in and takes it out again: a driver with a table need not take rules on addresses.
    fn try_out(&mut self, nic: &impl Ethtool) {
        let Ok(table) = &mut self.table else { return };
        let rule = Rule { mac: NOBODY, ethertype: ETHERTYPE, queue: 0 };
        let tried = table.insert(nic, rule).and_then(|place| table.remove(nic, place));
        if let Err(error) = tried {
            self.table = Err(error.to_string());
        }
    }

    /// Whether the NIC takes rules.
    pub(super) fn is_able(&self) -> bool {
        self.table.is_ok()
    }

    /// Removes what a former process left in a NIC's table, for one that will not steer by it.
    pub(super) fn tidy_up(nic: &Nic) {
        // Most drivers have no table. A rule that stays brings frames to a core that hands them over.
        let _none = RuleTable::open(nic, ETHERTYPE);
    }

    fn of(table: Result<RuleTable, String>) -> Self {
        Self { table, rules: BTreeMap::new(), wanted: 0, refusal: None }
    }

    /// Makes the NIC steer these addresses to these queues and no others, as far as it can.
    pub(super) fn set(&mut self, nic: &impl Ethtool, wanted: &BTreeMap<[u8; 6], u16>) {
        self.wanted = wanted.len();
        let Ok(table) = &mut self.table else { return };
        let stale = |mac: &[u8; 6], queue: u16| wanted.get(mac) != Some(&queue);
        for (_, (_, place)) in self.rules.extract_if(.., |mac, (queue, _)| stale(mac, *queue)) {
            // One that cannot be removed sends frames to a core that hands them over.
            let _kept = table.remove(nic, place);
        }
        self.refusal = None;
        for (mac, queue) in wanted {
            if self.rules.contains_key(mac) {
                continue;
            }
            match table.insert(nic, Rule { mac: *mac, ethertype: ETHERTYPE, queue: *queue }) {
                Ok(place) => {
                    self.rules.insert(*mac, (*queue, place));
                }
                // A full table is no fuller for the next; an unable driver no abler.
                Err(error) => {
                    self.refusal = Some(error.to_string());
                    break;
                }
            }
        }
    }

    /// What is steered, for people.
    pub(super) fn in_words(&self) -> String {
        let (steered, wanted) = (self.rules.len(), self.wanted);
        match (&self.table, &self.refusal) {
            (Err(reason), _) => {
                format!("the NIC steers no addresses to cores ({reason}): cores hand frames over")
            }
            (Ok(_), None) => format!("the NIC steers {steered} of {wanted} addresses to their cores"),
            (Ok(_), Some(reason)) => {
                format!(
                    "the NIC steers {steered} of {wanted} addresses to their cores ({reason}): cores hand over the rest"
                )
            }
        }
    }

    /// Takes all rules out.
    pub(super) fn clear(&mut self, nic: &impl Ethtool) {
        self.set(nic, &BTreeMap::new());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::io;

    /// A NIC that chooses the places of its few rules.
    #[derive(Default)]
    struct Fake {
        rules: RefCell<BTreeMap<u32, ([u8; 6], u16)>>,
        places: u32,
        changes: RefCell<u32>,
    }

    impl Ethtool for Fake {
        fn call(&self, command: u32, buffer: &mut [u8]) -> Result<(), af_xdp::Error> {
            let mut rules = self.rules.borrow_mut();
            let place = u32::from_ne_bytes(buffer[176..180].try_into().unwrap());
            match command {
                0x2e => buffer[11] = 0x80,
                0x30 => {}
                0x31 => {
                    rules.remove(&place).unwrap();
                    *self.changes.borrow_mut() += 1;
                }
                0x32 => {
                    let Some(free) = (0..self.places).find(|place| !rules.contains_key(place)) else {
                        let source = io::Error::from_raw_os_error(28);
                        return Err(af_xdp::Error::Os { action: "asking the interface's driver", source });
                    };
                    buffer[176..180].copy_from_slice(&free.to_ne_bytes());
                    let queue = u16::from_ne_bytes(buffer[168..170].try_into().unwrap());
                    rules.insert(free, (buffer[20..26].try_into().unwrap(), queue));
                    *self.changes.borrow_mut() += 1;
                }
                other => panic!("command {other:#x}"),
            }
            Ok(())
        }
    }

    fn mac(last: u8) -> [u8; 6] {
        [0x02, 0, 0, 0, 0, last]
    }

    #[test]
    fn rules_follow_what_is_wanted_and_only_what_changed_is_touched() {
        let nic = Fake { places: 3, ..Fake::default() };
        let mut steered = Steered::of(Ok(RuleTable::open(&nic, ETHERTYPE).unwrap()));
        let table = |nic: &Fake| nic.rules.borrow().values().copied().collect::<BTreeMap<_, _>>();
        let first = BTreeMap::from([(mac(1), 0), (mac(2), 1)]);
        steered.set(&nic, &first);
        assert_eq!(table(&nic), first);
        assert_eq!(steered.in_words(), "the NIC steers 2 of 2 addresses to their cores");
        steered.set(&nic, &first);
        assert_eq!(*nic.changes.borrow(), 2, "nothing to do");
        // One moves to another core, one comes.
        let second = BTreeMap::from([(mac(1), 1), (mac(2), 1), (mac(3), 0)]);
        steered.set(&nic, &second);
        assert_eq!(table(&nic), second);
        // One too many: the others stay.
        let third: BTreeMap<_, _> = (1..5).map(|n| (mac(n), 0)).collect();
        steered.set(&nic, &third);
        assert_eq!(table(&nic).len(), 3);
        let words = steered.in_words();
        assert!(words.contains("3 of 4") && words.contains("No space left"), "{words}");
        steered.clear(&nic);
        assert!(nic.rules.borrow().is_empty());
    }

    #[test]
    fn a_driver_is_tried_out_and_nothing_stays() {
        for (places, able) in [(1, true), (0, false)] {
            let nic = Fake { places, ..Fake::default() };
            let mut steered = Steered::of(Ok(RuleTable::open(&nic, ETHERTYPE).unwrap()));
            steered.try_out(&nic);
            assert_eq!(steered.is_able(), able);
            assert!(nic.rules.borrow().is_empty());
        }
    }

    #[test]
    fn a_nic_without_rules_is_no_error() {
        let nic = Fake::default();
        let mut steered = Steered::of(Err("Operation not supported".into()));
        steered.set(&nic, &BTreeMap::from([(mac(1), 0)]));
        let expected =
            "the NIC steers no addresses to cores (Operation not supported): cores hand frames over";
        assert_eq!(steered.in_words(), expected);
    }
}
