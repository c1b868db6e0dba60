//! What a shard has of a layer, for who compares copies: which extents, their versions, and which are in the activity log.

use super::Shard;
use crate::store::extent::extents::HeldExtent;

impl Shard {
    /// Appends the extents of a layer from number `from_extent` on, at most `max` of them, in order. Whether there are no more.
    ///
    /// An extent counts from when a batch is given its allocation until its end is durable.
    pub fn list(&self, object: u32, from_extent: u32, max: usize, held: &mut Vec<HeldExtent>) -> bool {
        let mut next = Some(from_extent);
        let mut found = 0;
        while let Some((_, extent)) = next.and_then(|next| self.extents.first_from(object, next)) {
            if found == max {
                return false;
            }
            found += 1;
            held.push(extent.held());
            next = extent.number.checked_add(1);
        }
        true
    }

    /// Whether a block's newest data are not known to be in place.
    #[cfg(test)]
    pub fn is_pending(&self, object: u32, block: u64) -> bool {
        let place = super::reading::locate(block);
        let place = place.and_then(|(number, block)| Some((self.extents.find(object, number)?.0, block)));
        place.is_some_and(|place| self.pending.contains_key(&place))
    }

    /// What was done with extents that have two slots.
    #[cfg(test)]
    pub fn twin_tally(&self) -> super::twins::TwinTally {
        self.twins.tally
    }

    /// How many second slots do not come back by themselves.
    #[cfg(test)]
    pub fn blocked_twins(&self) -> usize {
        self.twins.blocked()
    }

    /// Whether the last batch says what lies beside the journal.
    #[cfg(test)]
    pub fn has_unproved(&self) -> bool {
        self.twins.has_unproved()
    }

    /// How many extents wait for the stable mark to end.
    #[cfg(test)]
    pub fn hollow_extents(&self) -> usize {
        self.extents.iter().filter(|(_, extent)| extent.hollow).count()
    }

    /// Appends the extents of a layer that are in the activity log, in no order. Gives the highest version written to the
    /// layer; 0 for none. It never goes back once a state of the layer's replica is durable; before that an extent that has gone
    /// may take its version with it when the store is opened again.
    pub fn survey(&self, object: u32, active: &mut Vec<HeldExtent>) -> u64 {
        let log = self.active.iter().map(|id| self.extents.get(*id));
        active.extend(log.filter(|extent| extent.object == object).map(|extent| extent.held()));
        self.extents.highest_version(object)
    }
}
