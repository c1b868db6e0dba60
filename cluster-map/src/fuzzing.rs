//! What fuzzing gives to whatever reads the map. Built for the targets in `fuzz/` only.
//!
//! The first byte says what the rest is: a header page, which gets a checksum that fits, a desired or an observed state.
//! Whatever can be decoded must be the same when it is encoded and decoded again.

use crate::desired::Desired;
use crate::layout::{self, Geometry, Layout, PAGE};
use crate::observed::Observed;
use crate::{ClusterId, NodeId};

const VERSION: u64 = 7;

/// Reads bytes as the map's readers do.
///
/// # Panics
/// If a state changes on its way through encoding.
pub fn read(bytes: &[u8]) {
    match bytes.split_first() {
        Some((0, rest)) => {
            let mut page = [0; PAGE];
            let len = rest.len().min(PAGE);
            page[..len].copy_from_slice(&rest[..len]);
            layout::seal(&mut page);
            let _ = Layout::parse(&page, layout::file_len(&page));
        }
        Some((1, rest)) => {
            if let Ok(desired) = Desired::decode(rest, VERSION) {
                let mut again = Vec::new();
                if desired.encode(&mut again).is_ok() {
                    assert!(Desired::decode(&again, VERSION).is_ok_and(|same| same == desired));
                }
            }
        }
        Some((_, rest)) => {
            if let Ok(observed) = Observed::decode(rest, VERSION) {
                let mut again = Vec::new();
                if observed.encode(&mut again).is_ok() {
                    assert!(Observed::decode(&again, VERSION).is_ok_and(|same| same == observed));
                }
            }
        }
        None => {}
    }
}

/// A header and states as they are written, for [`read`] to begin with.
///
/// # Panics
/// Never: all of them can be written.
#[must_use]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use crate::{
        DesiredExport, DesiredHead, DesiredPeer, DesiredStore, DesiredVolume, Granting, HeadOwner,
        HeadPartition, MemberId, MemberWish, ObservedExport, ObservedHead, ObservedStore, ObservedVolume,
        PeerAddr, ScrubObserved, ScrubWish, StaleMark, WritePath,
    };
    let geometry = Geometry::new(2, ClusterId([7; 16]), NodeId([9; 16]));
    let page = layout::plan(&geometry, [5; 16]).expect("a usual geometry");
    let header = page.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let mut desired = Vec::new();
    let scrub = Some(ScrubWish { run: 2, rate_bytes_per_s: 64 << 20, stopped: false });
    let store = DesiredStore { path: "/dev/nvme0n1".into(), scrub, ..DesiredStore::default() };
    let export =
        DesiredExport { config_string: b"disk".to_vec(), masks: vec![[2; 6]], ..DesiredExport::default() };
    let addr = PeerAddr { ip: [10, 0, 0, 1].into(), base_port: 4330 };
    let partition = HeadPartition { epoch: 1, owners: vec![HeadOwner::default(); 2] };
    let stale = vec![StaleMark { mark: 7, ..StaleMark::default() }];
    let head = DesiredHead {
        takeover: 1,
        partitions: vec![partition; 2],
        stale: stale.clone(),
        ..DesiredHead::default()
    };
    Desired {
        start: 3,
        listen: Some(addr),
        peers: vec![DesiredPeer { node: NodeId([8; 16]), addr, cores: 2 }],
        heads: vec![head],
        cores: vec![2, 3],
        interfaces: vec!["eth0@100".into()],
        stores: vec![store],
        volumes: vec![DesiredVolume { lane: Some(1), ..DesiredVolume::default() }],
        exports: vec![export],
        ..Desired::default()
    }
    .encode(&mut desired)
    .expect("a usual state");
    let mut observed = Vec::new();
    let scrub = Some(ScrubObserved { run: 2, done_bytes: 1, total_bytes: 2, ..ScrubObserved::default() });
    let store = ObservedStore { writes: WritePath::Journal, scrub, ..ObservedStore::default() };
    let join = vec![MemberId { incarnation: 1, ..MemberId::default() }];
    Observed {
        replicates: true,
        heads: vec![ObservedHead {
            blocked: "two of three copies are away".into(),
            ..ObservedHead::default()
        }],
        wishes: vec![MemberWish { revision: 2, eject: stale, join, ..MemberWish::default() }],
        granting: vec![Granting { node: NodeId([8; 16]), is_granting: true }],
        stores: vec![store],
        volumes: vec![ObservedVolume::default()],
        exports: vec![ObservedExport::default()],
        ..Observed::default()
    }
    .encode(&mut observed)
    .expect("a usual state");
    let seed = |kind: u8, bytes: &[u8]| [&[kind], bytes].concat();
    vec![
        ("header", seed(0, &page[..header])),
        ("desired", seed(1, &desired)),
        ("observed", seed(2, &observed)),
    ]
}
