//! Grants, at the site of the heads: whether a replica's site has promised lately that nobody else is head (I1).
//!
//! One grant for each pair of sites covers all volumes between them. Invariants:
//! * A grant is counted from when its request was *sent*, on the own boot-time clock, and [`COUNTED_NS`] of the [`GRANT_NS`] for which
//!   the replica's site holds to it: so it ends here before it ends there, though clocks drift by up to a tenth.
//! * It counts for a volume only if it was decided after the replica had opened the volume's generation for this site: answers
//!   come in the order of their decisions, so only those count that come after the answer to the opening.
//! * A volume that a renewal excludes is not covered by it nor by any later one.

use std::collections::BTreeMap;

use crate::mutants::{self, Mutant};
use crate::terms::Site;

/// For how long a replica's site opens no higher generation after it has granted.
pub const GRANT_NS: u64 = 1_000_000_000;
/// How much of it the head's site counts.
pub const COUNTED_NS: u64 = GRANT_NS / 10 * 9;
const _: () = assert!(COUNTED_NS + GRANT_NS / 10 <= GRANT_NS);
/// How often a grant is renewed: two renewals may be lost.
pub const RENEW_NS: u64 = GRANT_NS / 4;

/// A grant's place among all that were received from a site.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct GrantIndex(pub u64);

#[derive(Debug, Clone, Copy, Default)]
struct FromSite {
    index: GrantIndex,
    /// Until when the newest counts.
    until_ns: u64,
    /// When it came.
    heard_ns: u64,
}

/// All grants that a site's heads have.
#[derive(Debug, Default)]
pub struct Grants {
    sites: BTreeMap<Site, FromSite>,
}

impl Grants {
    /// That site has granted, as it says at `now_ns`, what was asked for at `asked_ns`. What was not asked for yet is no grant.
    pub fn received(&mut self, site: Site, asked_ns: u64, now_ns: u64) {
        if asked_ns > now_ns {
            return;
        }
        let from = self.sites.entry(site).or_default();
        from.index.0 += 1;
        // Not the latest of all: one that was decided before an opening must not reach beyond it.
        let counted_from_ns = if mutants::is(Mutant::GrantFromReply) { now_ns } else { asked_ns };
        from.until_ns = counted_from_ns + COUNTED_NS;
        from.heard_ns = now_ns;
    }

    /// When that site was heard of last; 0 for never.
    #[must_use]
    pub fn heard_ns(&self, site: Site) -> u64 {
        self.sites.get(&site).map_or(0, |from| from.heard_ns)
    }

    /// Of the newest grant of that site. An opening that is answered now is covered by later ones.
    #[must_use]
    pub fn index(&self, site: Site) -> GrantIndex {
        self.sites.get(&site).map_or(GrantIndex::default(), |from| from.index)
    }

    /// Whether that site's grant covers, at `now_ns`, what was opened there when `opened` was its newest one.
    #[must_use]
    pub fn covers(&self, site: Site, opened: GrantIndex, now_ns: u64) -> bool {
        mutants::is(Mutant::NoGrant)
            || self.sites.get(&site).is_some_and(|from| from.index > opened && now_ns < from.until_ns)
    }
}

#[cfg(test)]
mod tests {
    use cluster_map::NodeId;

    use super::*;

    const SITE: Site = Site { node: NodeId([1; 16]), core: 0 };

    #[test]
    fn a_grant_counts_from_its_request_and_not_to_its_end() {
        let mut grants = Grants::default();
        let opened = grants.index(SITE);
        assert!(!grants.covers(SITE, opened, 0));
        grants.received(SITE, 100, 100);
        assert!(grants.covers(SITE, opened, 100 + COUNTED_NS - 1));
        assert!(!grants.covers(SITE, opened, 100 + COUNTED_NS));
    }

    #[test]
    fn a_grant_from_before_an_opening_does_not_cover_it() {
        let mut grants = Grants::default();
        grants.received(SITE, 100, 100);
        let opened = grants.index(SITE);
        assert!(!grants.covers(SITE, opened, 101), "the replica may not have opened it then");
        grants.received(SITE, 102, 102);
        assert!(grants.covers(SITE, opened, 103));
    }

    #[test]
    fn a_grant_from_before_does_not_prolong_one_from_after() {
        let mut grants = Grants::default();
        grants.received(SITE, 500, 500);
        let opened = grants.index(SITE);
        grants.received(SITE, 100, 100);
        assert!(!grants.covers(SITE, opened, 100 + COUNTED_NS));
    }

    #[test]
    fn what_was_not_asked_for_is_no_grant() {
        let mut grants = Grants::default();
        let opened = grants.index(SITE);
        grants.received(SITE, u64::MAX, 500);
        assert!(!grants.covers(SITE, opened, 500));
    }
}
