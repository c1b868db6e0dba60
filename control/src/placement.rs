//! Where things go: volumes on stores, exports at addresses, MACs on exports. Pure functions over one [`View`].
//!
//! Capacity is counted from the records, not from what a store says is free: a volume counts from the moment its record is
//! committed. Orphans, which only the store knows, are subtracted (they are kept, I2).

use std::collections::{BTreeMap, BTreeSet};

use cluster_map::{NodeId, StoreId, VolumeId};
use thiserror::Error;

use crate::heads::{LANES, MemberRecord};
use crate::model::{Address, Mac, View};
use crate::size::human;

/// Largest shelf and slot that are given automatically; any valid address can be asked for. Slots stay below 16 because
/// initiators with static device numbers (`aoe_dyndevs=0`) know no more per shelf.
const AUTO_SHELVES: std::ops::RangeInclusive<u16> = 1..=4094;
const AUTO_SLOTS: std::ops::RangeInclusive<u8> = 1..=15;
/// MACs tried before giving up; 2^42 MACs make a second attempt rare.
const MAC_ATTEMPTS: u8 = 16;

/// Why a volume has no place.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlacementError {
    /// No live node has a store that is ready.
    #[error("no store is ready on any live node")]
    NoStore,
    /// Too few nodes can have a copy.
    #[error("{wanted} copies need as many nodes that are live, replicate and have a ready store, and there {}", are(*.able))]
    TooFewNodes {
        /// Copies that were asked for.
        wanted: u8,
        /// Nodes that can have one.
        able: usize,
    },
    /// Every store is too small.
    #[error("{} are needed, but the store with most free space has {}", human(*.needed), human(*.largest))]
    NoSpace {
        /// Bytes asked for.
        needed: u64,
        /// Most bytes that one store offers.
        largest: u64,
    },
}

fn are(nodes: usize) -> String {
    match nodes {
        0 => "is none".into(),
        1 => "is one".into(),
        nodes => format!("are {nodes}"),
    }
}

/// Rounds up to whole extents; `None` if that exceeds 2^63 − 1 bytes.
#[must_use]
pub fn round_up(size_bytes: u64, extent_bytes: u64) -> Option<u64> {
    size_bytes.checked_next_multiple_of(extent_bytes.max(1)).filter(|size| *size <= i64::MAX.unsigned_abs())
}

/// Bytes that new volumes can have on a store; 0 unless its node is live and says that it is ready.
#[must_use]
pub fn available_bytes(view: &View, store: StoreId) -> u64 {
    let Some(node) = view.stores.get(&store).map(|s| s.record.node) else { return 0 };
    let Some(status) = view.store_status(store).filter(|s| s.state == "ready") else { return 0 };
    if !view.live.contains_key(&node) {
        return 0;
    }
    status.capacity.saturating_sub(view.placed(store).bytes).saturating_sub(status.orphaned)
}

/// The ready store with most available space, the smallest id among equals.
///
/// # Errors
/// [`PlacementError`] if there is none, or none with `size_bytes` available.
pub fn choose_store(view: &View, size_bytes: u64) -> Result<StoreId, PlacementError> {
    let ready = view.stores.keys().filter(|id| {
        let live = view.stores.get(id).is_some_and(|s| view.live.contains_key(&s.record.node));
        live && view.store_status(**id).is_some_and(|s| s.state == "ready")
    });
    let best = ready
        .map(|id| (available_bytes(view, *id), std::cmp::Reverse(*id)))
        .max()
        .ok_or(PlacementError::NoStore)?;
    if best.0 < size_bytes {
        return Err(PlacementError::NoSpace { needed: size_bytes, largest: best.0 });
    }
    Ok(best.1.0)
}

/// The stores for the copies of a replicated volume: on different nodes, in different zones while there are more of them, those
/// with most available space first. A node without a zone is one by itself.
///
/// # Errors
/// [`PlacementError::TooFewNodes`], or [`PlacementError::NoSpace`] if too few of them have `size_bytes` available.
pub fn choose_owners(view: &View, size_bytes: u64, copies: u8) -> Result<Vec<MemberRecord>, PlacementError> {
    let replicating = |node: &NodeId| {
        let callable = view.nodes.get(node).is_some_and(|node| node.record.peer().is_some());
        callable && view.live.contains_key(node) && view.status.get(node).is_some_and(|s| s.replicates)
    };
    let able = view.stores.iter().filter_map(|(id, store)| {
        let node = Some(store.record.node).filter(replicating)?;
        let status = view.store_status(*id).filter(|status| status.state == "ready")?;
        let member =
            MemberRecord { store: *id, incarnation: status.incarnation, node, shards: status.shards.max(1) };
        Some((available_bytes(view, *id), member))
    });
    let mut able: Vec<_> = able.collect();
    let nodes: BTreeSet<_> = able.iter().map(|(_, member)| member.node).collect();
    if nodes.len() < usize::from(copies) {
        return Err(PlacementError::TooFewNodes { wanted: copies, able: nodes.len() });
    }
    able.sort_by_key(|(available, member)| (std::cmp::Reverse(*available), member.store));
    let zone = |member: &MemberRecord| {
        let zone = view.nodes.get(&member.node).map_or("", |node| node.record.zone.as_str());
        if zone.is_empty() { member.node.to_string() } else { zone.to_owned() }
    };
    let mut chosen: Vec<MemberRecord> = Vec::new();
    for _ in 0..copies {
        let zones: BTreeSet<_> = chosen.iter().map(zone).collect();
        let mut left = able.iter().filter(|(_, member)| chosen.iter().all(|one| one.node != member.node));
        let roomy = left.clone().filter(|(available, _)| *available >= size_bytes);
        let best = roomy.clone().find(|(_, member)| !zones.contains(&zone(member))).or(roomy.clone().next());
        match best {
            Some((_, member)) => chosen.push(*member),
            None => {
                let largest = left.next().map_or(0, |(available, _)| *available);
                return Err(PlacementError::NoSpace { needed: size_bytes, largest });
            }
        }
    }
    Ok(chosen)
}

/// The node among the owners that is head of fewest volumes, the first among equals.
#[must_use]
pub fn choose_head(view: &View, owners: &[MemberRecord]) -> Option<NodeId> {
    let heads_of = |node: NodeId| view.heads.values().filter(|heads| heads.record.head == node).count();
    owners.iter().map(|owner| owner.node).min_by_key(|node| heads_of(*node))
}

/// The lane that fewest replicated volumes have, the first among equals.
#[must_use]
pub fn choose_lane(view: &View) -> u16 {
    let mut used: BTreeMap<u16, usize> = BTreeMap::new();
    for heads in view.heads.values() {
        *used.entry(heads.record.lane).or_default() += 1;
    }
    (0..LANES).min_by_key(|lane| used.get(lane).copied().unwrap_or(0)).unwrap_or(0)
}

/// The lowest free address, from 1.1 on; `None` if all that are given automatically are taken.
#[must_use]
pub fn next_address(view: &View) -> Option<Address> {
    let mut automatic = AUTO_SHELVES
        .flat_map(|shelf| AUTO_SLOTS.filter_map(move |slot| Address::new(shelf, slot)))
        .peekable();
    // Both go up: one pass finds the first that is missing among the taken.
    for taken in view.exports.keys() {
        match automatic.peek() {
            Some(free) if free < taken => break,
            Some(same) if same == taken => drop(automatic.next()),
            _ => {}
        }
    }
    automatic.next()
}

/// The first MAC of the volume that no other volume has.
#[must_use]
pub fn free_mac(view: &View, volume: VolumeId) -> Option<Mac> {
    (0..MAC_ATTEMPTS)
        .map(|attempt| Mac::of_volume(volume, attempt))
        .find(|mac| view.macs.get(mac).is_none_or(|owner| *owner == volume))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heads::HeadsRecord;
    use crate::meta::{KeyValue, Revision};
    use crate::model::{
        Entry, ExportRecord, LiveRecord, NodeRecord, StatusRecord, StoreRecord, StoreStatus, VolumeRecord,
        VolumeState, encode, keys,
    };
    use crate::settings::ExportSettings;
    use cluster_map::NodeId;

    const GIB: u64 = 1 << 30;

    fn at<T>(record: T) -> Entry<T> {
        Entry { record, revision: Revision(1) }
    }

    /// A cluster with one node per store; `(capacity, orphaned)` each.
    fn view(stores: &[(u64, u64)]) -> View {
        let mut view = View::default();
        for (index, (capacity, orphaned)) in (1u8..).zip(stores) {
            let (node, store) = (NodeId([index; 16]), StoreId([index; 16]));
            let live = LiveRecord { pid: 1, version: String::new(), boot: String::new() };
            view.live.insert(node, live);
            view.stores.insert(store, at(StoreRecord { node, path: "/s".into(), size: *capacity }));
            let status = StoreStatus {
                path: "/s".into(),
                id: Some(store),
                state: "ready".into(),
                durability: String::new(),
                capacity: *capacity,
                free: *capacity,
                orphaned: *orphaned,
                error: String::new(),
                writes: String::new(),
                checksum_errors: 0,
                lost_blocks: 0,
                scrub: None,
                incarnation: 1,
                shards: 1,
            };
            view.status.insert(node, StatusRecord { stores: vec![status], ..StatusRecord::default() });
        }
        view
    }

    fn place(view: &mut View, id: u8, store: u8, size: u64) {
        let volume = VolumeRecord {
            name: id.to_string(),
            size,
            copies: 1,
            store: Some(StoreId([store; 16])),
            node: Some(NodeId([store; 16])),
            state: VolumeState::Creating,
            export: None,
            created_unix_s: 0,
            confirmed: Vec::new(),
        };
        let key = keys::volume(VolumeId([id; 16]));
        let value = encode(&volume);
        view.add(&KeyValue { key, value, mod_revision: Revision(1), lease: None }).unwrap();
    }

    #[test]
    fn the_emptiest_ready_store_wins() {
        let mut view = view(&[(2 * GIB, 0), (4 * GIB, 0), (3 * GIB, 0)]);
        assert_eq!(choose_store(&view, GIB), Ok(StoreId([2; 16])));
        place(&mut view, 9, 2, 2 * GIB);
        assert_eq!(choose_store(&view, GIB), Ok(StoreId([3; 16])));
        view.live.remove(&NodeId([3; 16]));
        assert_eq!(choose_store(&view, GIB), Ok(StoreId([1; 16])), "equal space: the smaller id");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_sizes() {
        let mut view = view(&[(2 * GIB, GIB / 2)]);
        place(&mut view, 9, 1, GIB);
        let error = choose_store(&view, GIB).unwrap_err();
        assert_eq!(error, PlacementError::NoSpace { needed: GIB, largest: GIB / 2 });
        assert_eq!(error.to_string(), "1 GiB are needed, but the store with most free space has 512 MiB");
        view.status.clear();
        assert_eq!(choose_store(&view, 1), Err(PlacementError::NoStore));
    }

    /// Lets the nodes replicate, in these zones.
    fn replicating(mut view: View, zones: &[&str]) -> View {
        for (index, zone) in (1u8..).zip(zones) {
            let node = NodeRecord {
                name: index.to_string(),
                zone: (*zone).into(),
                peer_addr: format!("10.0.0.{index}:4330"),
                cores: 1,
                api_addr: String::new(),
                stores: Vec::new(),
            };
            view.nodes.insert(NodeId([index; 16]), at(node));
            view.status.get_mut(&NodeId([index; 16])).unwrap().replicates = true;
        }
        view
    }

    fn stores(chosen: &[MemberRecord]) -> Vec<u8> {
        chosen.iter().map(|member| member.store.0[0]).collect()
    }

    #[test]
    fn copies_are_on_different_nodes_and_zones_where_there_are_enough() {
        let sizes = [(GIB, 0), (4 * GIB, 0), (3 * GIB, 0), (2 * GIB, 0)];
        let no_zones = replicating(view(&sizes), &["", "", "", ""]);
        assert_eq!(stores(&choose_owners(&no_zones, GIB, 3).unwrap()), [2, 3, 4]);
        let zones = replicating(view(&sizes), &["b", "a", "a", "a"]);
        assert_eq!(
            stores(&choose_owners(&zones, GIB, 2).unwrap()),
            [2, 1],
            "the other zone before more space"
        );
        assert_eq!(stores(&choose_owners(&zones, GIB, 3).unwrap()), [2, 1, 3], "and then the most space");
        assert_eq!(stores(&choose_owners(&zones, 2 * GIB, 2).unwrap()), [2, 3], "space before zones");
        // A second store of a node is no second copy.
        let mut two_stores = replicating(view(&sizes), &["", "", "", ""]);
        two_stores.stores.get_mut(&StoreId([3; 16])).unwrap().record.node = NodeId([2; 16]);
        let third = two_stores.status[&NodeId([3; 16])].stores[0].clone();
        two_stores.status.get_mut(&NodeId([2; 16])).unwrap().stores.push(third);
        assert_eq!(stores(&choose_owners(&two_stores, GIB, 3).unwrap()), [2, 4, 1]);
    }

    #[test]
    fn too_few_nodes_or_too_little_space_is_said() {
        let sizes = [(GIB, 0), (4 * GIB, 0), (3 * GIB, 0)];
        let whole = replicating(view(&sizes), &["", "", ""]);
        let few = |able| Err(PlacementError::TooFewNodes { wanted: 3, able });
        let node = |n| NodeId([n; 16]);
        let takes_one_away: [fn(&mut View, NodeId); 4] = [
            |view, node| drop(view.live.remove(&node)),
            |view, node| view.status.get_mut(&node).unwrap().replicates = false,
            |view, node| view.nodes.get_mut(&node).unwrap().record.peer_addr.clear(),
            |view, node| view.status.get_mut(&node).unwrap().stores[0].state = "failed".into(),
        ];
        for take in takes_one_away {
            let mut view = whole.clone();
            take(&mut view, node(2));
            assert_eq!(choose_owners(&view, 1, 3), few(2));
        }
        assert_eq!(
            PlacementError::TooFewNodes { wanted: 3, able: 1 }.to_string(),
            "3 copies need as many nodes that are live, replicate and have a ready store, and there is one"
        );
        assert_eq!(
            choose_owners(&whole, 2 * GIB, 3),
            Err(PlacementError::NoSpace { needed: 2 * GIB, largest: GIB })
        );
    }

    #[test]
    fn heads_and_lanes_are_dealt_evenly() {
        let mut view = replicating(view(&[(GIB, 0), (GIB, 0)]), &["", ""]);
        let owners = choose_owners(&view, 1, 2).unwrap();
        let mut heads_of = BTreeMap::new();
        for n in 0..2 * u8::try_from(LANES).unwrap() {
            let (head, lane) = (choose_head(&view, &owners).unwrap(), choose_lane(&view));
            assert_eq!(lane, u16::from(n) % LANES);
            *heads_of.entry(head).or_insert(0) += 1;
            view.heads.insert(VolumeId([n; 16]), at(HeadsRecord::new(owners.clone(), head, 0, lane)));
        }
        assert!(heads_of.len() == 2 && heads_of.values().all(|count| *count == LANES), "{heads_of:?}");
        view.heads.remove(&VolumeId([7; 16]));
        assert_eq!(choose_lane(&view), 7);
    }

    #[test]
    fn sizes_round_up_to_extents() {
        assert_eq!(round_up(1, 4 << 20), Some(4 << 20));
        assert_eq!(round_up(4 << 20, 4 << 20), Some(4 << 20));
        assert_eq!(round_up(u64::MAX, 4 << 20), None);
        assert_eq!(round_up(i64::MAX.unsigned_abs(), 4 << 20), None);
    }

    #[test]
    fn addresses_and_macs_are_the_first_free_ones() {
        let mut view = View::default();
        let volume = VolumeId([5; 16]);
        for slot in 1..=15 {
            assert_eq!(next_address(&view), Address::new(1, slot));
            let mac = free_mac(&view, VolumeId([slot; 16])).unwrap();
            let settings = ExportSettings::default();
            let export = ExportRecord { volume, mac, read_only: false, ending: false, settings };
            view.exports.insert(next_address(&view).unwrap(), at(export));
        }
        assert_eq!(next_address(&view), Address::new(2, 1));
        let sixth = view.exports.remove(&Address::new(1, 6).unwrap()).unwrap();
        view.exports.insert(Address::new(0, 9).unwrap(), sixth.clone());
        view.exports.insert(Address::new(1, 20).unwrap(), sixth);
        assert_eq!(next_address(&view), Address::new(1, 6), "the gap, whatever else is taken");
        view.exports.remove(&Address::new(1, 1).unwrap());
        assert_eq!(next_address(&view), Address::new(1, 1));
        let first = free_mac(&view, volume).unwrap();
        view.macs.insert(first, volume);
        assert_eq!(free_mac(&view, volume), Some(first), "its own MAC is free to it");
        view.macs.insert(first, VolumeId([6; 16]));
        assert_eq!(free_mac(&view, volume), Some(Mac::of_volume(volume, 1)));
    }
}
