//! The numbers that decide how many sectors a frame may carry.

use af_xdp::region::CHUNK_BYTES;

/// Bytes of Ethernet, AoE and ATA headers before the payload.
pub(super) const HEADERS_BYTES: usize = 36;
/// Bytes of an Ethernet header, which an MTU does not count.
pub(super) const ETHERNET_BYTES: usize = 14;
const SECTOR_BYTES: usize = 512;

/// The smallest MTU that carries two sectors by the initiator's own reckoning.
pub const MTU_MIN_BYTES: u32 = 36 + 2 * 512;

/// The largest of 2, 4, 8 and 16 sectors that one frame can carry: within `(mtu − 36) / 512`, which is
/// how the Linux initiator counts (aoecmd.c), and within what the link sends and receives in one frame.
///
/// `segments` is the number of transmit descriptors of one frame, header included; `receive_bytes` is the
/// longest frame that can be received. Other counts make the initiator cut 4 KiB blocks unevenly, and more than 16
/// can overflow its fragment array (`skb_fillup`). Fewer than two sectors is `None`: the link is of no use.
pub fn max_sectors(mtu_bytes: u32, segments: u8, receive_bytes: usize) -> Option<u8> {
    let by_mtu = (mtu_bytes as usize).saturating_sub(HEADERS_BYTES) / SECTOR_BYTES;
    let by_receive = receive_bytes.saturating_sub(HEADERS_BYTES) / SECTOR_BYTES;
    let by_send = match segments {
        0 | 1 => (CHUNK_BYTES - HEADERS_BYTES) / SECTOR_BYTES,
        more => (usize::from(more) - 1) * CHUNK_BYTES / SECTOR_BYTES,
    };
    let limit = by_mtu.min(by_receive).min(by_send);
    [16u8, 8, 4, 2].into_iter().find(|sectors| usize::from(*sectors) <= limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_mtu_decides_where_nothing_else_does() {
        let at = |mtu| max_sectors(mtu, 5, usize::MAX);
        assert_eq!(at(0), None);
        assert_eq!(at(3558), Some(4));
        assert_eq!(at(4200), Some(8));
        assert_eq!(at(9000), Some(16));
        assert_eq!(at(1059), None);
        assert_eq!(at(MTU_MIN_BYTES), Some(2));
        assert_eq!(at(1500), Some(2));
        assert_eq!(at(2084), Some(4));
        assert_eq!(at(4131), Some(4));
        assert_eq!(at(4132), Some(8));
        assert_eq!(at(8227), Some(8));
        assert_eq!(at(8228), Some(16));
        assert_eq!(at(9000), Some(16));
    }

    #[test]
    fn one_chunk_carries_four_sectors() {
        assert_eq!(max_sectors(9000, 1, usize::MAX), Some(4));
        assert_eq!(max_sectors(9000, 5, 3620), Some(4));
        assert_eq!(max_sectors(9000, 2, usize::MAX), Some(8));
    }

    proptest! {
        #[test]
        fn what_is_advertised_fits_everywhere(mtu in 0u32..20_000, segments in 0u8..20, receive in 0usize..20_000) {
            if let Some(sectors) = max_sectors(mtu, segments, receive) {
                let frame = HEADERS_BYTES + usize::from(sectors) * SECTOR_BYTES;
                prop_assert!([2, 4, 8, 16].contains(&sectors));
                prop_assert!(frame <= mtu as usize && frame <= receive);
                let data_chunks = (usize::from(sectors) * SECTOR_BYTES).div_ceil(CHUNK_BYTES);
                prop_assert!(data_chunks < usize::from(segments) || frame <= CHUNK_BYTES);
            }
        }
    }
}
