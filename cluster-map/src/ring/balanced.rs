//! Owners by shares, near what they were: a flow of least cost.
//!
//! Copies flow from partitions through zones and nodes to stores; a copy on a store that had it costs nothing, any other one. The
//! former owners that still can be are where it begins, at no cost; what is missing then (*holes* in partitions) and what
//! stores have beyond their shares goes along cheapest ways, one after the other, to stores below their shares. A way is a
//! sequence of steps: a partition's copy leaves a store for the next one. Every step keeps the limits of nodes and zones, so that
//! the ring may be looked at after any. As long as each way is a cheapest one the whole is cheapest (successive
//! shortest paths), and there is a way as long as something is missing, because the shares can be dealt out ([`shares`](super::shares)).
//!
//! Nearly all ways have one step, and are found by trying. A search over stores finds the others.

use std::collections::VecDeque;

use super::hash::{self, Sequence};
use super::shares::Topology;
use super::{Member, NONE, Ring, RingError, Rules};

/// Cost of a copy on a store that did not have it; a step costs 1 besides, so that of equal ways the shortest is found.
const COPY: i64 = 1 << 20;
const UNREACHED: i64 = i64::MAX / 2;
/// Stores tried for a copy before the search has to find one.
const TRIES: usize = 16;
/// Ways that the search keeps of those that are equal, for a store where ways end: the first one is often gone when others went it.
const WAYS: usize = 64;
/// How often, on average, a copy is exchanged for another one when all are dealt anew.
const EXCHANGES: usize = 8;
/// Where the sequences of numbers begin: any number would do.
const SEED: u64 = 0x746f_7275_732d_7269;

/// The owners of all partitions.
///
/// # Errors
/// [`RingError::TooFewNodes`]
pub(super) fn owners(
    rules: &Rules,
    members: &[Member],
    previous: Option<&Ring>,
) -> Result<Vec<u16>, RingError> {
    let topology = Topology::of(rules, members)?;
    let (partitions, copies) = (rules.partitions(), rules.copies);
    let Some(previous) = previous else {
        let shares = topology.shares(partitions, copies, &vec![0; members.len()]);
        return Ok(deal(&topology, &shares, partitions as usize, usize::from(copies)));
    };
    let former = Former::of(previous, rules, members);
    let mut held = vec![0; members.len()];
    for owner in former.owners.iter().filter(|owner| **owner != NONE) {
        held[usize::from(*owner)] += 1;
    }
    let shares = topology.shares(partitions, copies, &held);
    let mut flow = Flow::new(&topology, &shares, former, partitions as usize, usize::from(copies));
    if flow.keep() {
        // Copies that were given up may find their way back for nothing, which must be tried before anything is paid for.
        flow.settle(Some(0));
    }
    flow.move_directly();
    flow.settle(None);
    if flow.is_settled() { Ok(flow.owners) } else { Err(RingError::Unsolved) }
}

/// Deals all copies where there are no former owners: the stores laid end to end, each as long as its share, are cut
/// into as many pieces as there are copies, one below the other. No node is longer than a piece, and no zone longer than its limit
/// of pieces, so no partition meets them more often. Copies are then exchanged, so that what one store had
/// lies on many others.
fn deal(topology: &Topology, shares: &[u32], partitions: usize, copies: usize) -> Vec<u16> {
    let mut owners = vec![NONE; partitions * copies];
    let line = topology
        .takers
        .iter()
        .flat_map(|store| std::iter::repeat_n(*store, shares[usize::from(*store)] as usize));
    for (position, store) in line.enumerate() {
        let (piece, partition) = (position / partitions, position % partitions);
        // Turned, so that who is first is not who stands first in the line.
        let slot = (piece + turn(partition)) % copies;
        owners[partition * copies + slot] = store;
    }
    let mut sequence = Sequence::new(SEED);
    for _ in 0..owners.len() * EXCHANGES {
        let (one, other) = (sequence.below(owners.len()), sequence.below(owners.len()));
        if one / copies == other / copies {
            continue;
        }
        let fits = |entry: usize, store| {
            let first = entry / copies * copies;
            topology.fits(&owners[first..first + copies], entry - first, store)
        };
        if fits(one, owners[other]) && fits(other, owners[one]) {
            owners.swap(one, other);
        }
    }
    owners
}

/// A number that differs from partition to partition.
fn turn(partition: usize) -> usize {
    usize::from(hash::of([partition as u64]).to_le_bytes()[0])
}

impl Topology {
    /// Whether a store can be in a slot of a partition with these owners, whoever is there now.
    fn fits(&self, row: &[u16], slot: usize, store: u16) -> bool {
        let store = usize::from(store);
        let (node, zone) = (self.node_of[store], self.zone_of[store]);
        let mut in_zone = 0;
        for (index, owner) in row.iter().enumerate() {
            if index == slot || *owner == NONE {
                continue;
            }
            let owner = usize::from(*owner);
            if self.node_of[owner] == node {
                return false;
            }
            in_zone += u8::from(self.zone_of[owner] == zone);
        }
        in_zone < self.limits[usize::from(zone)]
    }
}

/// The owners before, as indexes of the members that are now.
struct Former {
    copies: usize,
    owners: Vec<u16>,
}

impl Former {
    fn of(previous: &Ring, rules: &Rules, members: &[Member]) -> Self {
        let index = |member: &Member| {
            let found = members.binary_search_by_key(&member.store, |one| one.store).ok();
            found.filter(|index| members[*index].weight > 0).and_then(|index| u16::try_from(index).ok())
        };
        let now: Vec<u16> = previous.members.iter().map(|member| index(member).unwrap_or(NONE)).collect();
        let finer = rules.partition_bits - previous.rules.partition_bits;
        let rows = (0..rules.partitions()).flat_map(|partition| previous.owners(partition >> finer));
        let owners = rows.map(|owner| now[usize::from(*owner)]).collect();
        Self { copies: usize::from(previous.rules.copies), owners }
    }

    fn of_partition(&self, partition: usize) -> &[u16] {
        &self.owners[partition * self.copies..][..self.copies]
    }
}

/// Owners on their way from the former to the new shares. An *entry* is a slot of a partition.
struct Flow<'a> {
    topology: &'a Topology,
    shares: &'a [u32],
    former: Former,
    copies: usize,
    owners: Vec<u16>,
    /// The entries of each store, in any order.
    entries: Vec<Vec<u32>>,
    /// Where in its store's list an entry is.
    places: Vec<u32>,
    /// Entries without a store, and perhaps some that have one by now.
    holes: Vec<u32>,
    sequence: Sequence,
}

/// How a store was reached by the search.
#[derive(Clone, Copy)]
enum Came {
    /// It has more than its share.
    Beginning,
    /// By an entry of a store, or of none.
    By {
        /// The store before; none if the entry had none.
        from: Option<u16>,
        entry: u32,
    },
}

/// The cheapest ways from where too much is, by store.
struct Reached {
    costs: Vec<i64>,
    came: Vec<Came>,
    /// Other ways at the same cost, for the stores below their shares.
    others: Vec<Vec<Came>>,
}

impl<'a> Flow<'a> {
    fn new(
        topology: &'a Topology,
        shares: &'a [u32],
        former: Former,
        partitions: usize,
        copies: usize,
    ) -> Self {
        Self {
            topology,
            shares,
            former,
            copies,
            owners: vec![NONE; partitions * copies],
            entries: vec![Vec::new(); shares.len()],
            places: vec![0; partitions * copies],
            holes: Vec::new(),
            sequence: Sequence::new(SEED),
        }
    }

    fn row(&self, partition: usize) -> &[u16] {
        &self.owners[partition * self.copies..][..self.copies]
    }

    fn fits(&self, entry: u32, store: u16) -> bool {
        let entry = entry as usize;
        self.topology.fits(self.row(entry / self.copies), entry % self.copies, store)
    }

    fn was_owner(&self, entry: u32, store: u16) -> bool {
        self.former.of_partition(entry as usize / self.copies).contains(&store)
    }

    /// What it costs to give an entry to a store.
    fn cost(&self, entry: u32, store: u16) -> i64 {
        let paid = |store: u16| if store == NONE || self.was_owner(entry, store) { 0 } else { COPY };
        paid(store) - paid(self.owners[entry as usize])
    }

    fn len(&self, store: u16) -> usize {
        self.entries[usize::from(store)].len()
    }

    fn share(&self, store: u16) -> usize {
        self.shares[usize::from(store)] as usize
    }

    /// Gives an entry to a store, or to none.
    #[expect(clippy::cast_possible_truncation, reason = "there are fewer than 2^32 entries")]
    fn give(&mut self, entry: u32, store: u16) {
        let former = std::mem::replace(&mut self.owners[entry as usize], store);
        if former != NONE {
            let list = &mut self.entries[usize::from(former)];
            let place = self.places[entry as usize] as usize;
            list.swap_remove(place);
            if let Some(moved) = list.get(place) {
                self.places[*moved as usize] = place as u32;
            }
        }
        if store != NONE {
            let list = &mut self.entries[usize::from(store)];
            self.places[entry as usize] = list.len() as u32;
            list.push(entry);
        }
    }

    /// Keeps the former owners as far as they can be: where some must go, those with most beyond their shares. Whether
    /// some had to.
    #[expect(clippy::cast_possible_truncation, reason = "there are fewer than 2^32 entries")]
    fn keep(&mut self) -> bool {
        let mut beyond: Vec<i64> = self.shares.iter().map(|share| -i64::from(*share)).collect();
        for owner in self.former.owners.iter().filter(|owner| **owner != NONE) {
            beyond[usize::from(*owner)] += 1;
        }
        let mut order: Vec<(usize, u16)> = Vec::new();
        let mut gave_up = false;
        for partition in 0..self.owners.len() / self.copies {
            order.clear();
            order.extend(
                self.former.of_partition(partition).iter().copied().enumerate().filter(|one| one.1 != NONE),
            );
            order.sort_by_key(|(slot, owner)| (beyond[usize::from(*owner)], *slot));
            for (slot, owner) in &order {
                let row = self.row(partition);
                let free = |slot: &usize| row.get(*slot) == Some(&NONE);
                let slot = Some(*slot).filter(free).or_else(|| (0..self.copies).find(free));
                match slot.filter(|slot| self.topology.fits(row, *slot, *owner)) {
                    Some(slot) => self.give((partition * self.copies + slot) as u32, *owner),
                    None => {
                        beyond[usize::from(*owner)] -= 1;
                        gave_up = true;
                    }
                }
            }
        }
        self.holes = (0u32..).zip(&self.owners).filter(|one| *one.1 == NONE).map(|one| one.0).collect();
        gave_up
    }

    /// The ways of one step: holes, and what stores have beyond their shares, go to stores that are below theirs, picked at random.
    fn move_directly(&mut self) {
        let takers = self.topology.takers.iter().copied();
        let missing = |store: u16| self.share(store).saturating_sub(self.len(store));
        let mut places: Vec<u16> =
            takers.flat_map(|store| std::iter::repeat_n(store, missing(store))).collect();
        for entry in std::mem::take(&mut self.holes) {
            match self.place_for(&places, |flow, store| flow.fits(entry, store).then_some(entry)) {
                Some((place, entry)) => self.give(entry, places.swap_remove(place)),
                None => self.holes.push(entry),
            }
        }
        for store in self.topology.takers.clone() {
            while self.len(store) > self.share(store) {
                let start = self.sequence.below(self.len(store));
                let found = self.place_for(&places, |flow, next| {
                    let (before, from) = flow.entries[usize::from(store)].split_at(start);
                    from.iter().chain(before).copied().find(|entry| flow.fits(*entry, next))
                });
                let Some((place, entry)) = found else { break };
                self.give(entry, places.swap_remove(place));
            }
        }
    }

    /// One of the places, and what was found for its store.
    fn place_for(
        &mut self,
        places: &[u16],
        find: impl Fn(&Self, u16) -> Option<u32>,
    ) -> Option<(usize, u32)> {
        let tries = if places.is_empty() { 0 } else { TRIES };
        (0..tries).find_map(|_| {
            let place = self.sequence.below(places.len());
            Some((place, find(self, places[place])?))
        })
    }

    /// Goes cheapest ways until there are none, or none that costs at most so many copies.
    fn settle(&mut self, most_copies: Option<i64>) {
        loop {
            self.holes.retain(|entry| self.owners[*entry as usize] == NONE);
            if self.is_settled() {
                return;
            }
            let reached = self.search();
            let below = |store: &u16| self.len(*store) < self.share(*store);
            let mut ends: Vec<u16> = self.topology.takers.iter().copied().filter(below).collect();
            let copies = |store: &u16| reached.costs[usize::from(*store)].div_euclid(COPY);
            let Some(cheapest) = ends.iter().map(copies).min().filter(|copies| *copies < UNREACHED / COPY)
            else {
                return;
            };
            if most_copies.is_some_and(|most| cheapest > most) {
                return;
            }
            ends.retain(|store| copies(store) == cheapest);
            let mut went = false;
            for end in ends {
                went |= self.go(&reached, end);
            }
            if !went {
                return;
            }
        }
    }

    fn is_settled(&self) -> bool {
        self.holes.iter().all(|entry| self.owners[*entry as usize] != NONE)
            && self.entries.iter().zip(self.shares).all(|(entries, share)| entries.len() == *share as usize)
    }

    /// Goes the ways to `end` as often as they are there at the same cost; whether one was.
    fn go(&mut self, reached: &Reached, end: u16) -> bool {
        let last_steps = [reached.came[usize::from(end)]]
            .into_iter()
            .chain(reached.others[usize::from(end)].iter().copied());
        let mut went = false;
        for last in last_steps {
            let mut steps = self.way(reached, end, last);
            while self.len(end) < self.share(end) && self.go_once(&mut steps) {
                went = true;
            }
        }
        went
    }

    /// The steps to `end`, the last of them given.
    fn way(&self, reached: &Reached, end: u16, last: Came) -> Vec<Step> {
        let cost_of = |store: u16| reached.costs[usize::from(store)];
        let mut steps: Vec<Step> = Vec::new();
        let (mut came, mut to) = (last, end);
        while let Came::By { from, entry } = came {
            let cost = cost_of(to) - from.map_or(0, cost_of) - 1;
            steps.push(Step { from, to, cost, entry, looked_at: 0 });
            match from {
                Some(store) if steps.len() <= self.entries.len() => {
                    (came, to) = (reached.came[usize::from(store)], store);
                }
                _ => break,
            }
        }
        steps.reverse();
        steps
    }

    /// Every step once, or none.
    fn go_once(&mut self, steps: &mut [Step]) -> bool {
        if steps
            .first()
            .is_none_or(|step| step.from.is_some_and(|store| self.len(store) <= self.share(store)))
        {
            return false;
        }
        let mut undo: Vec<(u32, u16)> = Vec::new();
        for step in steps {
            let Some(entry) = self.entry_for(step) else {
                for (entry, store) in undo.into_iter().rev() {
                    self.give(entry, store);
                }
                return false;
            };
            undo.push((entry, self.owners[entry as usize]));
            self.give(entry, step.to);
        }
        true
    }

    /// An entry that can make a step at its cost: the one that the search found, or another.
    fn entry_for(&self, step: &mut Step) -> Option<u32> {
        let owner = step.from.unwrap_or(NONE);
        let can = |entry: u32| {
            self.owners[entry as usize] == owner
                && self.fits(entry, step.to)
                && self.cost(entry, step.to) == step.cost
        };
        if can(step.entry) {
            return Some(step.entry);
        }
        let list = step.from.map_or(&self.holes, |store| &self.entries[usize::from(store)]);
        while let Some(entry) = list.get(step.looked_at) {
            if can(*entry) {
                return Some(*entry);
            }
            step.looked_at += 1;
        }
        None
    }

    /// The cheapest way to each store. Costs may be negative, where a copy that was moved goes back, but no circle is.
    fn search(&self) -> Reached {
        let stores = self.entries.len();
        let mut search = Search {
            flow: self,
            reached: Reached {
                costs: vec![UNREACHED; stores],
                came: vec![Came::Beginning; stores],
                others: vec![Vec::new(); stores],
            },
            queue: VecDeque::new(),
            is_queued: vec![false; stores],
            left: Vec::new(),
            zones: Vec::new(),
        };
        for store in 0..u16::try_from(stores).unwrap_or(NONE) {
            if self.len(store) > self.share(store) {
                search.reach(store, 0, Came::Beginning);
            }
        }
        search.spread(&self.holes, None, 0);
        while let Some(store) = search.queue.pop_front() {
            search.is_queued[usize::from(store)] = false;
            let cost = search.reached.costs[usize::from(store)];
            search.spread(&self.entries[usize::from(store)], Some(store), cost);
        }
        search.reached
    }
}

/// A step of a way.
struct Step {
    /// None: an entry without a store gets one.
    from: Option<u16>,
    to: u16,
    cost: i64,
    /// What the search found.
    entry: u32,
    /// How much of the store's list was looked at for others.
    looked_at: usize,
}

struct Search<'a> {
    flow: &'a Flow<'a>,
    reached: Reached,
    queue: VecDeque<u16>,
    is_queued: Vec<bool>,
    /// Stores that a spreading has not reached yet, zone by zone.
    left: Vec<u16>,
    /// Zones with such stores: which, where their stores begin, how many.
    zones: Vec<(u16, usize, usize)>,
}

impl Search<'_> {
    fn reach(&mut self, store: u16, cost: i64, came: Came) {
        let index = usize::from(store);
        self.reached.costs[index] = cost;
        self.reached.came[index] = came;
        self.reached.others[index].clear();
        if !std::mem::replace(&mut self.is_queued[index], true) {
            self.queue.push_back(store);
        }
    }

    /// Goes on from the entries of a store, or of none, that was reached at this cost.
    fn spread(&mut self, entries: &[u32], from: Option<u16>, cost: i64) {
        let flow = self.flow;
        let is_paid = |entry: u32| from.is_some_and(|store| !flow.was_owner(entry, store));
        for entry in entries {
            let row = flow.row(*entry as usize / flow.copies);
            let refund = if is_paid(*entry) { COPY } else { 0 };
            for former in flow.former.of_partition(*entry as usize / flow.copies) {
                if *former == NONE || row.contains(former) {
                    continue;
                }
                let back = cost - refund + 1;
                if back < self.reached.costs[usize::from(*former)] && flow.fits(*entry, *former) {
                    self.reach(*former, back, Came::By { from, entry: *entry });
                }
            }
        }
        // Entries whose copy is paid for already go first: they are cheaper.
        for paid in [true, false] {
            let new = cost + 1 + if paid { 0 } else { COPY };
            if paid && !entries.iter().any(|entry| is_paid(*entry)) {
                continue;
            }
            self.list_dearer_than(new, from);
            for entry in entries {
                if self.zones.is_empty() {
                    break;
                }
                if is_paid(*entry) == paid {
                    self.spread_entry(from, *entry, new);
                }
            }
        }
    }

    /// Lists the stores whose ways cost more, but for one; and of those below their shares the ones whose ways cost the same.
    fn list_dearer_than(&mut self, cost: i64, but: Option<u16>) {
        self.left.clear();
        self.zones.clear();
        for store in &self.flow.topology.takers {
            let costs = self.reached.costs[usize::from(*store)];
            if (costs <= cost && !(costs == cost && self.may_have_another(*store))) || Some(*store) == but {
                continue;
            }
            let zone = self.flow.topology.zone_of[usize::from(*store)];
            match self.zones.last_mut() {
                Some(last) if last.0 == zone => last.2 += 1,
                _ => self.zones.push((zone, self.left.len(), 1)),
            }
            self.left.push(*store);
        }
    }

    fn may_have_another(&self, store: u16) -> bool {
        self.flow.len(store) < self.flow.share(store) && self.reached.others[usize::from(store)].len() < WAYS
    }

    /// Reaches all listed stores that an entry can go to.
    fn spread_entry(&mut self, from: Option<u16>, entry: u32, cost: i64) {
        let flow = self.flow;
        let (row, slot) = (flow.row(entry as usize / flow.copies), entry as usize % flow.copies);
        let mut index = 0;
        while let Some((zone, first, mut len)) = self.zones.get(index).copied() {
            let others = row.iter().enumerate().filter(|(other, owner)| *other != slot && **owner != NONE);
            let in_zone = others.filter(|one| flow.topology.zone_of[usize::from(*one.1)] == zone).count();
            if in_zone >= usize::from(flow.topology.limits[usize::from(zone)]) {
                index += 1;
                continue;
            }
            let mut at = first;
            while at < first + len {
                let store = self.left[at];
                if flow.topology.fits(row, slot, store) {
                    let came = Came::By { from, entry };
                    if self.reached.costs[usize::from(store)] == cost {
                        self.reached.others[usize::from(store)].push(came);
                    } else {
                        self.reach(store, cost, came);
                    }
                    len -= 1;
                    self.left.swap(at, first + len);
                } else {
                    at += 1;
                }
            }
            if len == 0 {
                self.zones.swap_remove(index);
            } else {
                self.zones[index].2 = len;
                index += 1;
            }
        }
    }
}
