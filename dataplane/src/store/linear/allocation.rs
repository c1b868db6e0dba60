//! Which extents belong to which volume.
//!
//! Invariants:
//! * No extent belongs to two volumes, and all lie on the device.
//! * A volume's bytes are served only up to its committed size, which lies within the extents known to hold zeros or the
//!   volume's own data: an extent that another volume had is zero-filled before it counts.

use cluster_map::VolumeId;

use super::Run;
use crate::store::EXTENT_SECTORS;

/// One volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Whose it is.
    pub id: VolumeId,
    /// Where it lies, in order.
    pub runs: Vec<Run>,
    /// Size that is served, sectors. 0 until the first fill is done.
    pub committed_sectors: u64,
    /// Extents from the beginning that hold zeros or data of this volume.
    pub filled_extents: u32,
}

impl Entry {
    /// Extents it has.
    #[must_use]
    pub fn extents(&self) -> u32 {
        self.runs.iter().map(|run| run.extents).sum()
    }
}

/// Why space could not be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AllocationError {
    /// Not enough extents are free.
    #[error("the store has {free_extents} free extents of 4 MiB and {wanted_extents} are needed")]
    NoSpace {
        /// Extents asked for.
        wanted_extents: u64,
        /// Extents free.
        free_extents: u32,
    },
    /// The size is 0 or beyond what AoE addresses.
    #[error("a volume has between 1 and 2^48 - 1 sectors, not {0}")]
    Size(u64),
}

/// All volumes of a store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Allocation {
    /// By id, so that a volume is found without a walk.
    entries: Vec<Entry>,
    extent_count: u32,
}

/// Why a table read from a device cannot be one that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Inconsistent {
    /// A run has no extent or leaves the device.
    #[error("a run of extents leaves the device")]
    OutOfRange,
    /// Two runs overlap.
    #[error("two volumes have one extent")]
    Overlap,
    /// A volume appears twice.
    #[error("a volume appears twice")]
    Twice,
    /// More is filled or committed than allocated.
    #[error("a volume is larger than its extents")]
    TooLarge,
}

impl Allocation {
    /// No volume, on a device of `extent_count` extents.
    #[must_use]
    pub fn new(extent_count: u32) -> Allocation {
        Allocation { entries: Vec::new(), extent_count }
    }

    /// The allocation that consists of `entries`.
    ///
    /// # Errors
    /// [`Inconsistent`], when they break an invariant.
    pub fn from_entries(mut entries: Vec<Entry>, extent_count: u32) -> Result<Allocation, Inconsistent> {
        for entry in &entries {
            check_entry(entry, extent_count)?;
        }
        entries.sort_unstable_by_key(|entry| entry.id.0);
        if entries.windows(2).any(|pair| pair[0].id == pair[1].id) {
            return Err(Inconsistent::Twice);
        }
        let allocation = Allocation { entries, extent_count };
        let used = allocation.used_runs();
        let overlap =
            used.windows(2).any(|pair| pair[0].first_extent + pair[0].extents > pair[1].first_extent);
        if overlap { Err(Inconsistent::Overlap) } else { Ok(allocation) }
    }

    /// All volumes.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// A volume's entry.
    #[must_use]
    pub fn get(&self, id: VolumeId) -> Option<&Entry> {
        self.position(id).ok().map(|at| &self.entries[at])
    }

    fn get_mut(&mut self, id: VolumeId) -> Option<&mut Entry> {
        self.position(id).ok().map(|at| &mut self.entries[at])
    }

    fn position(&self, id: VolumeId) -> Result<usize, usize> {
        self.entries.binary_search_by_key(&id.0, |entry| entry.id.0)
    }

    /// Extents on the device.
    #[must_use]
    pub fn extent_count(&self) -> u32 {
        self.extent_count
    }

    /// Extents that no volume has.
    #[must_use]
    pub fn free_extents(&self) -> u32 {
        self.extent_count - self.entries.iter().map(Entry::extents).sum::<u32>()
    }

    /// Gives a volume, new or old, extents for `size_sectors`; none are taken away. The new ones do not count as filled.
    ///
    /// # Errors
    /// [`AllocationError`]; nothing has changed then.
    pub fn reserve(&mut self, id: VolumeId, size_sectors: u64) -> Result<(), AllocationError> {
        if size_sectors == 0 || size_sectors >= 1 << 48 {
            return Err(AllocationError::Size(size_sectors));
        }
        let have = self.get(id).map_or(0, Entry::extents);
        let wanted_extents = size_sectors.div_ceil(EXTENT_SECTORS).saturating_sub(u64::from(have));
        let free_extents = self.free_extents();
        let Some(wanted) = u32::try_from(wanted_extents).ok().filter(|&wanted| wanted <= free_extents) else {
            return Err(AllocationError::NoSpace { wanted_extents, free_extents });
        };
        let new_runs = self.choose(wanted);
        if let Err(at) = self.position(id) {
            self.entries.insert(at, Entry { id, runs: Vec::new(), committed_sectors: 0, filled_extents: 0 });
        }
        let entry = self.get_mut(id).expect("just made");
        for run in new_runs {
            match entry.runs.last_mut() {
                Some(last) if last.first_extent + last.extents == run.first_extent => {
                    last.extents += run.extents;
                }
                _ => entry.runs.push(run),
            }
        }
        Ok(())
    }

    /// Records that all extents of a volume hold zeros or data, and serves `size_sectors` from now on.
    ///
    /// # Panics
    /// If there is no such volume or it is smaller.
    pub fn commit(&mut self, id: VolumeId, size_sectors: u64) {
        let entry = self.get_mut(id).expect("a volume of this store");
        entry.filled_extents = entry.extents();
        assert!(size_sectors <= u64::from(entry.filled_extents) * EXTENT_SECTORS);
        entry.committed_sectors = size_sectors;
    }

    /// Serves fewer sectors from now on, and frees the extents beyond them.
    ///
    /// # Panics
    /// If there is no such volume, it is smaller already, or the size is 0.
    pub fn shrink(&mut self, id: VolumeId, size_sectors: u64) {
        let entry = self.get_mut(id).expect("a volume of this store");
        assert!(size_sectors > 0 && size_sectors <= entry.committed_sectors);
        entry.committed_sectors = size_sectors;
        let mut keep =
            u32::try_from(size_sectors.div_ceil(EXTENT_SECTORS)).expect("fewer extents than it had");
        entry.filled_extents = keep;
        entry.runs.retain_mut(|run| {
            run.extents = run.extents.min(keep);
            keep -= run.extents;
            run.extents > 0
        });
    }

    /// Frees a volume's extents; whether there was one.
    pub fn remove(&mut self, id: VolumeId) -> bool {
        let before = self.entries.len();
        self.entries.retain(|entry| entry.id != id);
        self.entries.len() < before
    }

    fn used_runs(&self) -> Vec<Run> {
        let mut used: Vec<Run> = self.entries.iter().flat_map(|entry| entry.runs.iter().copied()).collect();
        used.sort_by_key(|run| run.first_extent);
        used
    }

    fn free_runs(&self) -> Vec<Run> {
        let mut free = Vec::new();
        let mut at = 0;
        let end = Run { first_extent: self.extent_count, extents: 0 };
        for run in self.used_runs().into_iter().chain([end]) {
            if run.first_extent > at {
                free.push(Run { first_extent: at, extents: run.first_extent - at });
            }
            at = run.first_extent + run.extents;
        }
        free
    }

    /// Picks free extents: the smallest gap that takes them all, or else the largest gaps, so that volumes stay in few
    /// runs.
    fn choose(&self, wanted: u32) -> Vec<Run> {
        if wanted == 0 {
            return Vec::new();
        }
        let mut free = self.free_runs();
        if let Some(gap) = free.iter().filter(|gap| gap.extents >= wanted).min_by_key(|gap| gap.extents) {
            return vec![Run { first_extent: gap.first_extent, extents: wanted }];
        }
        free.sort_by_key(|gap| std::cmp::Reverse(gap.extents));
        let mut left = wanted;
        let mut chosen = Vec::new();
        for gap in free {
            let extents = gap.extents.min(left);
            if extents > 0 {
                chosen.push(Run { first_extent: gap.first_extent, extents });
                left -= extents;
            }
        }
        assert_eq!(left, 0, "the free extents were counted before");
        chosen
    }
}

fn check_entry(entry: &Entry, extent_count: u32) -> Result<(), Inconsistent> {
    let in_range = |run: &Run| {
        run.extents > 0 && run.first_extent.checked_add(run.extents).is_some_and(|end| end <= extent_count)
    };
    if !entry.runs.iter().all(in_range) {
        return Err(Inconsistent::OutOfRange);
    }
    let extents: u64 = entry.runs.iter().map(|run| u64::from(run.extents)).sum();
    let filled = u64::from(entry.filled_extents);
    if filled > extents || entry.committed_sectors > filled * EXTENT_SECTORS {
        return Err(Inconsistent::TooLarge);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: u8) -> VolumeId {
        VolumeId([n; 16])
    }

    #[test]
    fn a_volume_is_served_only_after_its_fill() {
        let mut allocation = Allocation::new(10);
        allocation.reserve(id(1), EXTENT_SECTORS + 1).unwrap();
        let entry = allocation.get(id(1)).unwrap();
        assert_eq!((entry.extents(), entry.filled_extents, entry.committed_sectors), (2, 0, 0));
        allocation.commit(id(1), EXTENT_SECTORS + 1);
        assert_eq!(allocation.get(id(1)).unwrap().committed_sectors, EXTENT_SECTORS + 1);
        allocation.reserve(id(1), 4 * EXTENT_SECTORS).unwrap();
        let entry = allocation.get(id(1)).unwrap();
        assert_eq!((entry.extents(), entry.filled_extents), (4, 2));
        assert_eq!(entry.runs, [Run { first_extent: 0, extents: 4 }]);
        assert_eq!(allocation.free_extents(), 6);
    }

    #[test]
    fn too_much_changes_nothing() {
        let mut allocation = Allocation::new(3);
        let error = allocation.reserve(id(1), 4 * EXTENT_SECTORS).unwrap_err();
        assert_eq!(error, AllocationError::NoSpace { wanted_extents: 4, free_extents: 3 });
        assert_eq!(allocation.reserve(id(1), 0), Err(AllocationError::Size(0)));
        assert_eq!(allocation.reserve(id(1), 1 << 48), Err(AllocationError::Size(1 << 48)));
        assert_eq!(allocation, Allocation::new(3));
    }

    #[test]
    fn tables_that_break_an_invariant_are_refused() {
        let entry = |n, first_extent, extents, filled_extents, committed_sectors| Entry {
            id: id(n),
            runs: vec![Run { first_extent, extents }],
            filled_extents,
            committed_sectors,
        };
        for (entries, why) in [
            (vec![entry(1, 9, 2, 0, 0)], Inconsistent::OutOfRange),
            (vec![entry(1, u32::MAX, 2, 0, 0)], Inconsistent::OutOfRange),
            (vec![entry(1, 0, 0, 0, 0)], Inconsistent::OutOfRange),
            (vec![entry(1, 0, 2, 0, 0), entry(2, 1, 2, 0, 0)], Inconsistent::Overlap),
            (vec![entry(1, 0, 2, 0, 0), entry(1, 4, 2, 0, 0)], Inconsistent::Twice),
            (vec![entry(1, 0, 2, 3, 0)], Inconsistent::TooLarge),
            (vec![entry(1, 0, 2, 1, EXTENT_SECTORS + 1)], Inconsistent::TooLarge),
        ] {
            assert_eq!(Allocation::from_entries(entries, 10), Err(why));
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Reserve(u8, u64),
        Commit(u8),
        Shrink(u8, u64),
        Remove(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u8..6, 1u64..20 * EXTENT_SECTORS).prop_map(|(n, size)| Step::Reserve(n, size)),
            (0u8..6).prop_map(Step::Commit),
            (0u8..6, 1u64..20 * EXTENT_SECTORS).prop_map(|(n, size)| Step::Shrink(n, size)),
            (0u8..6).prop_map(Step::Remove),
        ]
    }

    fn take(allocation: &mut Allocation, step: &Step) {
        match *step {
            Step::Reserve(n, size) => {
                let before = allocation.clone();
                match allocation.reserve(id(n), size) {
                    Err(_) => assert_eq!(*allocation, before),
                    Ok(()) => {
                        let extents = allocation.get(id(n)).unwrap().extents();
                        assert!(u64::from(extents) * EXTENT_SECTORS >= size);
                    }
                }
            }
            Step::Commit(n) => {
                if let Some(entry) = allocation.get(id(n)) {
                    let size = u64::from(entry.extents()) * EXTENT_SECTORS - 1;
                    allocation.commit(id(n), size);
                }
            }
            Step::Shrink(n, size) => {
                if allocation.get(id(n)).is_some_and(|entry| entry.committed_sectors >= size) {
                    allocation.shrink(id(n), size);
                    let extents = allocation.get(id(n)).unwrap().extents();
                    assert_eq!(u64::from(extents), size.div_ceil(EXTENT_SECTORS));
                }
            }
            Step::Remove(n) => {
                allocation.remove(id(n));
            }
        }
    }

    proptest! {
        /// Whatever happens, the table is one that would be accepted from a device, and the free count is right.
        #[test]
        fn invariants_hold(steps in proptest::collection::vec(step(), 0..100)) {
            let mut allocation = Allocation::new(40);
            for step in steps {
                take(&mut allocation, &step);
                let again = Allocation::from_entries(allocation.entries().to_vec(), 40);
                prop_assert_eq!(again.as_ref(), Ok(&allocation));
                let free: u32 = allocation.free_runs().iter().map(|run| run.extents).sum();
                prop_assert_eq!(free, allocation.free_extents());
            }
        }
    }
}
