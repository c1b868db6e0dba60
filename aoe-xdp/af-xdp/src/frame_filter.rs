//! Which frames are ours: one definition, carried out by the XDP program and by the packet socket's filter.

/// The EtherType that announces an 802.1Q tag (C-tag). Service tags (0x88a8) are never ours.
pub const TAG_PROTOCOL: u16 = 0x8100;
/// Bytes that a tag adds to a frame.
pub const TAG_BYTES: u8 = 4;
/// The VLAN's number in a tag's control information; the rest is priority.
pub const VLAN_ID_MASK: u16 = 0x0fff;

/// Which frames a socket takes. What it does not take goes to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameFilter {
    /// The EtherType, after the tag where there is one.
    pub ethertype: u16,
    /// Take frames without a tag, and those whose tag is of VLAN 0: it carries a priority and nothing else.
    pub untagged: bool,
    /// Take frames whose tag is of one of these VLANs, 1 to 4094.
    pub vlans: Vec<u16>,
    /// Leave frames that have one of these bits set in the first byte after the EtherType.
    pub rejected_flags: u8,
}

impl FrameFilter {
    /// The numbers that a tag may carry.
    pub(crate) fn vlan_ids(&self) -> impl Iterator<Item = u16> {
        self.untagged.then_some(0).into_iter().chain(self.vlans.iter().copied())
    }

    /// Whether a whole frame, its tag in its place, is taken.
    #[cfg(test)]
    pub(crate) fn wants(&self, frame: &[u8]) -> bool {
        let word = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().unwrap()));
        let payload = match word(12) {
            Some(ethertype) if ethertype == self.ethertype && self.untagged => 14,
            Some(TAG_PROTOCOL) if word(16) == Some(self.ethertype) => {
                let vlan = word(14).unwrap() & VLAN_ID_MASK;
                if !(self.vlans.contains(&vlan) || self.untagged && vlan == 0) {
                    return false;
                }
                18
            }
            _ => return false,
        };
        frame.get(payload).is_some_and(|flags| flags & self.rejected_flags == 0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// All untagged AoE frames.
    pub(crate) fn aoe() -> FrameFilter {
        FrameFilter { ethertype: 0x88a2, untagged: true, vlans: Vec::new(), rejected_flags: 0 }
    }

    /// An AoE frame with a tag of priority 5 and the given flags after its EtherType.
    pub(crate) fn tagged_frame(vlan: u16, flags: u8) -> Vec<u8> {
        let mut frame = vec![0xe0; 64];
        frame[12..14].copy_from_slice(&[0x81, 0x00]);
        frame[14..16].copy_from_slice(&(0xa000 | vlan).to_be_bytes());
        frame[16..18].copy_from_slice(&[0x88, 0xa2]);
        frame[18] = 0x10 | flags;
        frame
    }

    #[test]
    fn each_part_of_the_filter_counts() {
        let filter = FrameFilter { vlans: vec![5], rejected_flags: 8, ..aoe() };
        assert!(filter.wants(&tagged_frame(5, 0)) && filter.wants(&tagged_frame(0, 0)));
        assert!(!filter.wants(&tagged_frame(6, 0)) && !filter.wants(&tagged_frame(5, 8)));
        let tagged_only = FrameFilter { untagged: false, ..filter };
        assert!(tagged_only.wants(&tagged_frame(5, 0)));
        assert!(!tagged_only.wants(&tagged_frame(0, 0)));
    }
}
