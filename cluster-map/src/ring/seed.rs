//! The kinds of the original Torus, without a memory: owners follow from the members alone.

use super::{Member, Rules, hash};

/// Picks from `candidates` the first on each node, until there are enough copies.
fn walk(members: &[Member], copies: usize, candidates: impl Iterator<Item = u16>, owners: &mut Vec<u16>) {
    let first = owners.len();
    for candidate in candidates {
        let node = members[usize::from(candidate)].node;
        if owners[first..].iter().all(|owner| members[usize::from(*owner)].node != node) {
            owners.push(candidate);
            if owners.len() - first == copies {
                return;
            }
        }
    }
}

fn indexes(members: &[Member]) -> impl Iterator<Item = u16> {
    (0..u16::MAX).take(members.len())
}

/// Partition `p` on stores `p`, `p + 1`, … modulo their number.
pub(super) fn modulo(rules: &Rules, members: &[Member]) -> Vec<u16> {
    let all: Vec<u16> = indexes(members).collect();
    let mut owners = Vec::with_capacity(rules.partitions() as usize * usize::from(rules.copies));
    for partition in 0..rules.partitions() as usize {
        let (before, from) = all.split_at(partition % all.len());
        walk(members, usize::from(rules.copies), from.iter().chain(before).copied(), &mut owners);
    }
    owners
}

/// Consistent hashing: a partition stands on the circle where its hashes begin, and goes to the next points on different nodes.
pub(super) fn ketama(rules: &Rules, members: &[Member], points: u16) -> Vec<u16> {
    let weight = |member: &Member| u128::from(member.capacity_bytes) * u128::from(member.weight);
    let total: u128 = members.iter().map(weight).sum();
    let takers = members.iter().filter(|member| member.weight > 0).count() as u128;
    let mut circle: Vec<(u64, u16)> = Vec::new();
    for (index, member) in indexes(members).zip(members).filter(|(_, member)| member.weight > 0) {
        // At least one: a store that is small beside the others is there all the same.
        let own = (u128::from(points) * takers * weight(member)).div_ceil(total.max(1));
        let [high, low] = hash::halves(&member.store.0);
        circle.extend(
            (0u64..)
                .take(usize::try_from(own).unwrap_or(usize::MAX))
                .map(|n| (hash::of([high, low, n]), index)),
        );
    }
    circle.sort_unstable();
    let mut owners = Vec::with_capacity(rules.partitions() as usize * usize::from(rules.copies));
    for partition in 0..u64::from(rules.partitions()) {
        let position = partition.checked_shl(64 - u32::from(rules.partition_bits)).unwrap_or(0);
        let (before, from) = circle.split_at(circle.partition_point(|point| point.0 < position));
        let next = from.iter().chain(before).map(|point| point.1);
        walk(members, usize::from(rules.copies), next, &mut owners);
    }
    owners
}
