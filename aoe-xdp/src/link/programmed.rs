//! Addresses that the XDP program brings to a socket of the core that serves them.
//!
//! What it does not bring there comes to the queue's owner, who hands it over: slower, never wrong.

use std::collections::BTreeMap;

use af_xdp::bpf::AddressMap;

/// Most addresses of an interface: those of every export of a large node on all VLANs of a NIC.
pub(super) const ADDRESSES_MAX: u32 = 1 << 16;

/// The lane of a core; lane 0 is the owner's of each queue, whichever core that is.
pub(super) fn lane_of(core: u16) -> u16 {
    core + 1
}

/// The addresses in the program's map, and what did not fit.
#[derive(Debug)]
pub(super) struct Programmed {
    map: AddressMap,
    lanes: BTreeMap<[u8; 6], u16>,
    wanted: usize,
    /// Why not all that was wanted is steered.
    refusal: Option<String>,
    /// Why nothing is steered from now on.
    broken: Option<String>,
}

impl Programmed {
    pub(super) fn of(map: AddressMap) -> Self {
        Self { map, lanes: BTreeMap::new(), wanted: 0, refusal: None, broken: None }
    }

    pub(super) fn map(&self) -> &AddressMap {
        &self.map
    }

    /// Steers nothing from now on, for that reason: not every core has a socket on every queue.
    pub(super) fn give_up(&mut self, reason: String) {
        self.set(&BTreeMap::new());
        self.broken = Some(reason);
    }

    /// Whether it may steer.
    pub(super) fn is_whole(&self) -> bool {
        self.broken.is_none()
    }

    /// Makes the program bring these addresses to these cores and no others, as far as it can.
    pub(super) fn set(&mut self, core_of: &BTreeMap<[u8; 6], u16>) {
        self.wanted = core_of.len();
        if !self.is_whole() {
            return;
        }
        for (mac, _) in self.lanes.extract_if(.., |mac, _| !core_of.contains_key(mac)) {
            // One that cannot be removed brings frames to a core that hands them over.
            let _kept = self.map.remove(mac);
        }
        self.refusal = None;
        for (mac, core) in core_of {
            let lane = lane_of(*core);
            if self.lanes.get(mac) == Some(&lane) {
                continue;
            }
            match self.map.set(*mac, lane) {
                Ok(()) => {
                    self.lanes.insert(*mac, lane);
                }
                // The map is full; one that has a lane already can still be moved.
                Err(error) => self.refusal = Some(error.to_string()),
            }
        }
    }

    /// What is steered, for people.
    pub(super) fn in_words(&self) -> String {
        let (steered, wanted) = (self.lanes.len(), self.wanted);
        match (&self.broken, &self.refusal) {
            (Some(reason), _) => {
                format!("the XDP program steers no addresses to cores ({reason}): cores hand frames over")
            }
            (None, None) => format!("the XDP program steers {steered} of {wanted} addresses to their cores"),
            (None, Some(reason)) => format!(
                "the XDP program steers {steered} of {wanted} addresses to their cores ({reason}): cores hand over the rest"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(last: u8) -> [u8; 6] {
        [0x02, 0, 0, 0, 0, last]
    }

    /// With a map of the kernel's; needs root.
    #[test]
    fn the_map_follows_what_is_wanted_and_a_full_one_leaves_the_rest() {
        let map = match AddressMap::new(3, 1) {
            Ok(map) => map,
            Err(error) => {
                assert!(error.missing_capability().is_some(), "unexpected failure: {error}");
                eprintln!("skipped: {error}");
                return;
            }
        };
        let mut programmed = Programmed::of(map);
        programmed.set(&BTreeMap::from([(mac(1), 0), (mac(2), 1)]));
        assert_eq!(programmed.in_words(), "the XDP program steers 2 of 2 addresses to their cores");
        // One too many; and what is in may move all the same.
        programmed.set(&(1..5).map(|last| (mac(last), 1)).collect());
        let words = programmed.in_words();
        assert!(words.contains("3 of 4") && words.ends_with("cores hand over the rest"), "{words}");
        assert_eq!(programmed.lanes[&mac(1)], lane_of(1));
        assert_eq!(programmed.map.remove(mac(4)).unwrap_err().errno(), Some(2), "ENOENT: it is not in");
        // Room again.
        programmed.set(&(3..5).map(|last| (mac(last), 0)).collect());
        assert_eq!(programmed.in_words(), "the XDP program steers 2 of 2 addresses to their cores");
        programmed.give_up("a queue is busy".into());
        programmed.set(&BTreeMap::from([(mac(3), 0)]));
        let expected =
            "the XDP program steers no addresses to cores (a queue is busy): cores hand frames over";
        assert_eq!(programmed.in_words(), expected);
        for last in 1..5 {
            assert_eq!(programmed.map.remove(mac(last)).unwrap_err().errno(), Some(2), "{last}");
        }
    }
}
