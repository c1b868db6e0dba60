//! How many copies each store is to have.
//!
//! Shares are dealt from above: to zones, within each to its nodes, within each to its stores, in proportion to capacity, but
//! to no zone more than its limit for every partition, and to no node more than one of each. What one cannot take the others
//! of its level share. Such shares can always be dealt out so that no partition breaks a limit: if each store took
//! from every partition the same fraction of a copy, no limit would be broken, and a flow with whole capacities that exists in
//! fractions exists in whole numbers.

use std::collections::BTreeMap;

use super::{Member, RingError, Rules, zone_name};

/// Fractional bits of a share.
const SHARE_BITS: u32 = 32;
/// Fractional bits of a level, in copies for each unit of weight: as many as let the smallest weight, 1, have
/// all partitions, and the largest sum of weights, below 2^90, be met to a small fraction of a copy.
const LEVEL_BITS: u32 = 73;
const LEVEL_MAX: u128 = 1 << (super::MAX_PARTITION_BITS as u32 + SHARE_BITS + LEVEL_BITS);

/// Where the stores are, by index of the member.
pub(super) struct Topology {
    pub(super) node_of: Vec<u16>,
    pub(super) zone_of: Vec<u16>,
    /// Stores that take data, zone by zone and in each node by node.
    pub(super) takers: Vec<u16>,
    /// Most copies of one partition, by zone.
    pub(super) limits: Vec<u8>,
    /// By member; 0 if it takes nothing.
    weights: Vec<u128>,
    /// The tree that shares are dealt down.
    zones: Vec<Vec<Vec<u16>>>,
}

impl Topology {
    /// # Errors
    /// [`RingError::TooFewNodes`]
    pub(super) fn of(rules: &Rules, members: &[Member]) -> Result<Self, RingError> {
        let mut tree: BTreeMap<String, BTreeMap<_, Vec<u16>>> = BTreeMap::new();
        for (index, member) in (0..u16::MAX).zip(members) {
            tree.entry(zone_name(member)).or_default().entry(member.node).or_default().push(index);
        }
        let weight = |member: &Member| u128::from(member.capacity_bytes) * u128::from(member.weight);
        let weights: Vec<u128> = members.iter().map(weight).collect();
        let (mut node_of, mut zone_of) = (vec![0; members.len()], vec![0; members.len()]);
        let mut zones: Vec<Vec<Vec<u16>>> = Vec::new();
        let mut node = 0;
        for (zone, nodes) in (0..u16::MAX).zip(tree.into_values()) {
            let mut taking = Vec::new();
            for mut stores in nodes.into_values() {
                for store in &stores {
                    node_of[usize::from(*store)] = node;
                    zone_of[usize::from(*store)] = zone;
                }
                node += 1;
                stores.retain(|store| weights[usize::from(*store)] > 0);
                if !stores.is_empty() {
                    taking.push(stores);
                }
            }
            zones.push(taking);
        }
        let limits = limits(&zones, rules.copies)?;
        let takers = zones.iter().flatten().flatten().copied().collect();
        Ok(Self { node_of, zone_of, takers, limits, weights, zones })
    }

    /// The limit of a member's zone.
    pub(super) fn limit(&self, member: usize) -> u8 {
        self.limits[usize::from(self.zone_of[member])]
    }

    /// The copies that each member is to have; `held` are those that it has. Of the two whole numbers around a share that
    /// one is taken which moves less, as far as the sum lets.
    pub(super) fn shares(&self, partitions: u32, copies: u8, held: &[u32]) -> Vec<u32> {
        let mut shares = vec![0; held.len()];
        let held_by = |stores: &[u16]| stores.iter().map(|store| held[usize::from(*store)]).sum::<u32>();
        let weight_of =
            |stores: &[u16]| stores.iter().map(|store| self.weights[usize::from(*store)]).sum::<u128>();
        let zones: Vec<Part> = (self.zones.iter().zip(&self.limits))
            .map(|(nodes, limit)| Part {
                weights: nodes.iter().map(|stores| weight_of(stores)).collect(),
                each: partitions,
                most: partitions * u32::from(*limit),
                held: nodes.iter().map(|stores| held_by(stores)).sum(),
            })
            .collect();
        let of_zones = deal(partitions * u32::from(copies), &zones);
        for (nodes, of_zone) in self.zones.iter().zip(of_zones) {
            let parts: Vec<Part> = nodes
                .iter()
                .map(|stores| Part::one(weight_of(stores), partitions, held_by(stores)))
                .collect();
            for (stores, of_node) in nodes.iter().zip(deal(of_zone, &parts)) {
                let one = |store: &u16| {
                    Part::one(self.weights[usize::from(*store)], partitions, held[usize::from(*store)])
                };
                let parts: Vec<Part> = stores.iter().map(one).collect();
                for (store, share) in stores.iter().zip(deal(of_node, &parts)) {
                    shares[usize::from(*store)] = share;
                }
            }
        }
        shares
    }
}

/// The most copies of one partition in each zone: as few in the fullest as can be.
fn limits(zones: &[Vec<Vec<u16>>], copies: u8) -> Result<Vec<u8>, RingError> {
    let nodes = zones.iter().map(Vec::len).sum();
    if nodes < usize::from(copies) {
        return Err(RingError::TooFewNodes { copies, nodes });
    }
    let limits =
        |level: u8| zones.iter().map(move |nodes| u8::try_from(nodes.len()).unwrap_or(u8::MAX).min(level));
    let enough = |level: &u8| limits(*level).map(usize::from).sum::<usize>() >= usize::from(copies);
    Ok(limits((1..copies).find(enough).unwrap_or(copies)).collect())
}

/// One that a total is dealt to.
struct Part {
    /// Of what is in it.
    weights: Vec<u128>,
    /// Most for each of those.
    each: u32,
    /// Most for all of it.
    most: u32,
    held: u32,
}

impl Part {
    fn one(weight: u128, most: u32, held: u32) -> Self {
        Self { weights: vec![weight], each: most, most, held }
    }

    /// Its share at a level, in fractions.
    fn share(&self, level: u128) -> u128 {
        let each = u128::from(self.each) << SHARE_BITS;
        // What is too large for the product is above `each` all the same.
        let share = |weight: &u128| (weight.saturating_mul(level) >> LEVEL_BITS).min(each);
        let sum = self.weights.iter().map(share).sum::<u128>();
        sum.min(u128::from(self.most) << SHARE_BITS)
    }
}

/// Deals a total in proportion to the weights, to each at most what it can take; together they can take it all.
fn deal(total: u32, parts: &[Part]) -> Vec<u32> {
    if parts.len() == 1 {
        return vec![total];
    }
    let sum = |level: u128| parts.iter().map(|part| part.share(level)).sum::<u128>();
    let (mut low, mut high) = (0, LEVEL_MAX);
    while high - low > 1 {
        let middle = low.midpoint(high);
        if sum(middle) <= u128::from(total) << SHARE_BITS {
            low = middle;
        } else {
            high = middle;
        }
    }
    let fractions: Vec<u128> = parts.iter().map(|part| part.share(low)).collect();
    let mut dealt: Vec<u32> =
        fractions.iter().map(|share| u32::try_from(share >> SHARE_BITS).unwrap_or(u32::MAX)).collect();
    let mut left = total.saturating_sub(dealt.iter().sum());
    while left > 0 {
        let mut next: Vec<usize> = (0..parts.len()).filter(|part| dealt[*part] < parts[*part].most).collect();
        if next.is_empty() {
            break;
        }
        let fraction = |part: usize| fractions[part] & ((1 << SHARE_BITS) - 1);
        next.sort_by_key(|part| (parts[*part].held <= dealt[*part], std::cmp::Reverse(fraction(*part))));
        for part in next.into_iter().take(left as usize) {
            dealt[part] += 1;
            left -= 1;
        }
    }
    dealt
}
