//! The numbers that decide how many sectors a frame may carry.

use af_xdp::region::CHUNK_BYTES;

/// Bytes of Ethernet, AoE and ATA headers before the payload.
pub(super) const HEADERS_BYTES: usize = 36;
/// Bytes of an Ethernet header, which an MTU does not count.
pub(super) const ETHERNET_BYTES: usize = 14;
/// Bytes of an 802.1Q tag, which an MTU does not count either.
pub(super) const TAG_BYTES: usize = af_xdp::frame_filter::TAG_BYTES as usize;
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

/// In words, where the link carries fewer sectors in a frame than its MTU would: what limits it, with its numbers.
pub(super) fn limit_in_words(mtu_bytes: u32, segments: u8, receive_bytes: usize) -> Option<String> {
    let by_mtu = max_sectors(mtu_bytes, u8::MAX, usize::MAX)?;
    let sectors = max_sectors(mtu_bytes, segments, receive_bytes).unwrap_or(0);
    if sectors == by_mtu {
        return None;
    }
    let needed = HEADERS_BYTES + usize::from(by_mtu) * SECTOR_BYTES;
    let has = if receive_bytes < needed {
        format!("the longest frame it receives has {receive_bytes} bytes")
    } else {
        format!("it sends {CHUNK_BYTES} bytes in each of {segments} buffers, headers in the first")
    };
    let enough = HEADERS_BYTES + usize::from(sectors) * SECTOR_BYTES;
    Some(format!(
        "{sectors} sectors in a frame where MTU {mtu_bytes} would carry {by_mtu} (36 + {by_mtu} x 512 = {needed} bytes, but \
         {has}); MTU {enough} is enough"
    ))
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

    #[test]
    fn the_limit_is_said_where_it_is_below_the_mtu() {
        assert_eq!(limit_in_words(9000, 5, 14_480), None);
        assert_eq!(limit_in_words(1500, 1, 3584), None);
        let text = limit_in_words(9000, 1, 3584).unwrap();
        assert_eq!(
            text,
            "4 sectors in a frame where MTU 9000 would carry 16 (36 + 16 x 512 = 8228 bytes, but the longest frame it \
             receives has 3584 bytes); MTU 2084 is enough"
        );
        assert!(limit_in_words(9000, 2, 14_480).unwrap().contains("4096 bytes in each of 2 buffers"));
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
