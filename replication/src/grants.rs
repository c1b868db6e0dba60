//! Grants, at the node of the heads: whether a replica's node has promised lately that nobody else is head (I1).
//!
//! One grant for each pair of nodes covers all volumes between them. Invariants:
//! * A grant is counted from when its request was *sent*, on the own boot-time clock, and [`COUNTED_NS`] of the [`GRANT_NS`] for which
//!   the replica's node holds to it: so it ends here before it ends there, though clocks drift by up to a tenth.
//! * It counts for a volume only if it was decided after the replica had opened the volume's generation for this node: answers
//!   come in the order of their decisions, so only those count that come after the answer to the opening.
//! * A volume that a renewal excludes is not covered by it nor by any later one.

use std::collections::BTreeMap;

use cluster_map::NodeId;

use crate::mutants::{self, Mutant};

/// For how long a replica's node opens no higher generation after it has granted.
pub const GRANT_NS: u64 = 1_000_000_000;
/// How much of it the head's node counts.
pub const COUNTED_NS: u64 = GRANT_NS / 10 * 9;
const _: () = assert!(COUNTED_NS + GRANT_NS / 10 <= GRANT_NS);
/// How often a grant is renewed: two renewals may be lost.
pub const RENEW_NS: u64 = GRANT_NS / 4;

/// A grant's place among all that were received from a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct GrantIndex(pub u64);

#[derive(Debug, Clone, Copy, Default)]
struct FromNode {
    index: GrantIndex,
    /// Until when the newest counts.
    until_ns: u64,
    /// When it came.
    heard_ns: u64,
}

/// All grants that a node's heads have.
#[derive(Debug, Default)]
pub struct Grants {
    nodes: BTreeMap<NodeId, FromNode>,
}

impl Grants {
    /// That node has granted, as it says at `now_ns`, what was asked for at `asked_ns`. What was not asked for yet is no grant.
    pub fn received(&mut self, node: NodeId, asked_ns: u64, now_ns: u64) {
        if asked_ns > now_ns {
            return;
        }
        let from = self.nodes.entry(node).or_default();
        from.index.0 += 1;
        // Not the latest of all: one that was decided before an opening must not reach beyond it.
        let counted_from_ns = if mutants::is(Mutant::GrantFromReply) { now_ns } else { asked_ns };
        from.until_ns = counted_from_ns + COUNTED_NS;
        from.heard_ns = now_ns;
    }

    /// When that node was heard of last; 0 for never.
    #[must_use]
    pub fn heard_ns(&self, node: NodeId) -> u64 {
        self.nodes.get(&node).map_or(0, |from| from.heard_ns)
    }

    /// Of the newest grant of that node. An opening that is answered now is covered by later ones.
    #[must_use]
    pub fn index(&self, node: NodeId) -> GrantIndex {
        self.nodes.get(&node).map_or(GrantIndex::default(), |from| from.index)
    }

    /// Whether that node's grant covers, at `now_ns`, what was opened there when `opened` was its newest one.
    #[must_use]
    pub fn covers(&self, node: NodeId, opened: GrantIndex, now_ns: u64) -> bool {
        mutants::is(Mutant::NoGrant)
            || self.nodes.get(&node).is_some_and(|from| from.index > opened && now_ns < from.until_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId([1; 16]);

    #[test]
    fn a_grant_counts_from_its_request_and_not_to_its_end() {
        let mut grants = Grants::default();
        let opened = grants.index(NODE);
        assert!(!grants.covers(NODE, opened, 0));
        grants.received(NODE, 100, 100);
        assert!(grants.covers(NODE, opened, 100 + COUNTED_NS - 1));
        assert!(!grants.covers(NODE, opened, 100 + COUNTED_NS));
    }

    #[test]
    fn a_grant_from_before_an_opening_does_not_cover_it() {
        let mut grants = Grants::default();
        grants.received(NODE, 100, 100);
        let opened = grants.index(NODE);
        assert!(!grants.covers(NODE, opened, 101), "the replica may not have opened it then");
        grants.received(NODE, 102, 102);
        assert!(grants.covers(NODE, opened, 103));
    }

    #[test]
    fn a_grant_from_before_does_not_prolong_one_from_after() {
        let mut grants = Grants::default();
        grants.received(NODE, 500, 500);
        let opened = grants.index(NODE);
        grants.received(NODE, 100, 100);
        assert!(!grants.covers(NODE, opened, 100 + COUNTED_NS));
    }

    #[test]
    fn what_was_not_asked_for_is_no_grant() {
        let mut grants = Grants::default();
        let opened = grants.index(NODE);
        grants.received(NODE, u64::MAX, 500);
        assert!(!grants.covers(NODE, opened, 500));
    }
}
