//! Where things go: volumes on stores, exports at addresses, MACs on exports. Pure functions over one [`View`].
//!
//! Capacity is counted from the records, not from what a store says is free: a volume counts from the moment its record is
//! committed. Orphans, which only the store knows, are subtracted (they are kept, I2).

use cluster_map::{StoreId, VolumeId};
use thiserror::Error;

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
    /// Every store is too small.
    #[error("{} are needed, but the store with most free space has {}", human(*.needed), human(*.largest))]
    NoSpace {
        /// Bytes asked for.
        needed: u64,
        /// Most bytes that one store offers.
        largest: u64,
    },
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
    use crate::meta::{KeyValue, Revision};
    use crate::model::{
        Entry, ExportRecord, LiveRecord, StatusRecord, StoreRecord, StoreStatus, VolumeRecord, VolumeState,
        encode, keys,
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
            store: StoreId([store; 16]),
            node: NodeId([store; 16]),
            state: VolumeState::Creating,
            export: None,
            created_unix_s: 0,
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
