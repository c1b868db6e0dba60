//! Rings of every kind against what they promise, and the movement of the balanced one against a solver of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

const TIB: u64 = 1 << 40;

pub(super) fn store(number: u32) -> StoreId {
    let mut id = [0; 16];
    let [high, low] = [hash::of([1, u64::from(number)]), u64::from(number) + 1];
    id[..8].copy_from_slice(&high.to_be_bytes());
    id[8..].copy_from_slice(&low.to_be_bytes());
    StoreId(id)
}

pub(super) fn node(number: u32) -> NodeId {
    NodeId(store(number).0)
}

/// A node's only store.
pub(super) fn member(number: u32, zone: &str, capacity_bytes: u64) -> Member {
    let (store, node) = (store(number), node(number));
    Member { store, node, zone: zone.into(), capacity_bytes, weight: FULL_WEIGHT }
}

pub(super) fn rules(kind: Kind, copies: u8, partition_bits: u8) -> Rules {
    Rules { kind, copies, partition_bits }
}

pub(super) fn balanced(members: &[Member], copies: u8, bits: u8, previous: Option<&Ring>) -> Ring {
    Ring::compute(rules(Kind::Balanced, copies, bits), members.to_vec(), previous).unwrap()
}

/// One store on each of so many nodes, dealt to so many zones; none: without zones.
fn nodes(count: u32, zones: u32) -> Vec<Member> {
    let zone = |number: u32| if zones == 0 { String::new() } else { format!("z{}", number % zones) };
    (0..count).map(|number| member(number, &zone(number), TIB)).collect()
}

/// Every partition has its copies on different nodes, on stores that take data, and in no zone more than it must.
fn assert_sound(ring: &Ring) {
    let limits = ring.zone_limits().unwrap();
    for partition in 0..ring.rules().partitions() {
        let owners: Vec<&Member> =
            ring.owners(partition).iter().map(|owner| &ring.members()[usize::from(*owner)]).collect();
        assert_eq!(owners.len(), usize::from(ring.rules().copies), "partition {partition}");
        let nodes: BTreeSet<NodeId> = owners.iter().map(|owner| owner.node).collect();
        assert_eq!(nodes.len(), owners.len(), "partition {partition} has two copies on a node");
        if ring.rules().kind != Kind::Balanced {
            continue;
        }
        assert!(
            owners.iter().all(|owner| owner.weight > 0),
            "partition {partition} is on a store that is drained"
        );
        let mut zones: BTreeMap<String, u8> = BTreeMap::new();
        for owner in owners {
            *zones.entry(zone_name(owner)).or_default() += 1;
        }
        assert!(
            zones.iter().all(|(zone, copies)| *copies <= limits[zone]),
            "partition {partition}: {zones:?}"
        );
    }
    if ring.rules().kind == Kind::Balanced {
        assert_eq!(ring.counts(), ring.shares().unwrap());
    }
}

/// Largest number of copies over the mean.
fn largest_over_mean(ring: &Ring) -> f64 {
    let counts = ring.counts();
    let sum: u32 = counts.iter().sum();
    f64::from(*counts.iter().max().unwrap()) * counts.len() as f64 / f64::from(sum)
}

fn plan(previous: &Ring, next: &Ring) -> Plan {
    Plan::between(previous, next, |_| 1)
}

/// Whether a change moved at most 1.05 times the theoretical minimum.
fn moved_little(plan: &Plan) -> bool {
    plan.copies() * 100 <= plan.least_moves * 105
}

/// The fewest copies that any assignment with these counts makes anew, found over an explicit graph of partitions, zones,
/// nodes and stores by shortest paths: nothing of it is shared with what it checks.
fn fewest_moves(previous: &Ring, next: &Ring) -> i64 {
    let partitions = next.rules().partitions() as usize;
    let limits = next.zone_limits().unwrap();
    let mut graph = Graph::default();
    let (source, sink) = (graph.vertex(), graph.vertex());
    let stores: Vec<usize> = next.members().iter().map(|_| graph.vertex()).collect();
    for (vertex, count) in stores.iter().zip(next.counts()) {
        graph.edge(*vertex, sink, i64::from(count), 0);
    }
    for partition in 0..partitions {
        let before = previous.stores(u32::try_from(partition).unwrap());
        let top = graph.vertex();
        graph.edge(source, top, i64::from(next.rules().copies), 0);
        let (mut zones, mut nodes) = (BTreeMap::new(), BTreeMap::new());
        for (member, store) in next.members().iter().zip(&stores).filter(|one| one.0.weight > 0) {
            let zone = *zones.entry(zone_name(member)).or_insert_with(|| {
                let zone = graph.vertex();
                graph.edge(top, zone, i64::from(limits[&zone_name(member)]), 0);
                zone
            });
            let node = *nodes.entry(member.node).or_insert_with(|| {
                let node = graph.vertex();
                graph.edge(zone, node, 1, 0);
                node
            });
            graph.edge(node, *store, 1, i64::from(!before.contains(&member.store)));
        }
    }
    let (flow, cost) = graph.cheapest(source, sink);
    assert_eq!(flow, partitions as i64 * i64::from(next.rules().copies), "the counts cannot be had");
    cost
}

/// A graph with capacities and costs; every edge is followed by its reverse.
#[derive(Default)]
struct Graph {
    from: Vec<Vec<usize>>,
    edges: Vec<(usize, i64, i64)>,
}

impl Graph {
    fn vertex(&mut self) -> usize {
        self.from.push(Vec::new());
        self.from.len() - 1
    }

    fn edge(&mut self, from: usize, to: usize, most: i64, cost: i64) {
        self.from[from].push(self.edges.len());
        self.from[to].push(self.edges.len() + 1);
        self.edges.extend([(to, most, cost), (from, 0, -cost)]);
    }

    /// The largest flow, and the least that it costs.
    fn cheapest(&mut self, source: usize, sink: usize) -> (i64, i64) {
        let (mut flow, mut cost) = (0, 0);
        loop {
            let mut costs = vec![i64::MAX; self.from.len()];
            let mut came = vec![usize::MAX; self.from.len()];
            costs[source] = 0;
            let mut queue = VecDeque::from([source]);
            while let Some(vertex) = queue.pop_front() {
                for edge in &self.from[vertex] {
                    let (to, left, price) = self.edges[*edge];
                    if left > 0 && costs[vertex] + price < costs[to] {
                        costs[to] = costs[vertex] + price;
                        came[to] = *edge;
                        if !queue.contains(&to) {
                            queue.push_back(to);
                        }
                    }
                }
            }
            if costs[sink] == i64::MAX {
                return (flow, cost);
            }
            let mut vertex = sink;
            while vertex != source {
                let edge = came[vertex];
                self.edges[edge].1 -= 1;
                self.edges[edge ^ 1].1 += 1;
                vertex = self.edges[edge ^ 1].0;
            }
            flow += 1;
            cost += costs[sink];
        }
    }
}

/// Members as people would have them and would not: several stores on a node, zones of any size, huge and tiny stores, drained ones.
fn any_members() -> impl Strategy<Value = Vec<Member>> {
    let capacity = prop_oneof![Just(TIB), 1..100 * TIB, Just(1), Just(u64::MAX)];
    let weight = prop_oneof![4 => Just(FULL_WEIGHT), 1 => 0..=FULL_WEIGHT];
    (prop::collection::vec((0..8u32, capacity, weight), 1..12), prop::collection::vec(0..5u32, 8)).prop_map(
        |(stores, zones)| {
            let with_numbers = (0..).zip(stores);
            let made = with_numbers.map(|(number, (on, capacity_bytes, weight))| {
                let zone = zones[on as usize];
                let zone = if zone == 0 { String::new() } else { format!("z{zone}") };
                Member { store: store(number), node: node(on), zone, capacity_bytes, weight }
            });
            made.collect()
        },
    )
}

/// A change of the members: which store, and what becomes of it.
fn any_change() -> impl Strategy<Value = (Index, u8, u64)> {
    (any::<Index>(), 0..5u8, 1..20 * TIB)
}

/// Carries a change out. The result may be no ring.
fn changed(members: &[Member], (which, what, capacity): (Index, u8, u64), fresh: u32) -> Vec<Member> {
    let mut members = members.to_vec();
    let at = which.index(members.len());
    match what {
        0 => drop(members.remove(at)),
        1 => members[at].capacity_bytes = capacity,
        2 => members[at].weight = u16::try_from(capacity % 1001).unwrap(),
        3 => {
            let beside = &members[at];
            let added = Member { store: store(fresh), capacity_bytes: capacity, ..beside.clone() };
            members.push(added);
        }
        _ => members.push(member(fresh, &members[at].zone.clone(), capacity)),
    }
    members
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Through any changes the balanced ring stays sound, keeps to its shares and moves no copy more than it must.
    #[test]
    fn balanced_rings_are_sound_and_move_as_little_as_any(
        mut members in any_members(),
        changes in prop::collection::vec(any_change(), 1..5),
        copies in 1..5u8,
        bits in 0..7u8,
    ) {
        let compute = |members: &[Member], previous: Option<&Ring>|
            Ring::compute(rules(Kind::Balanced, copies, bits), members.to_vec(), previous);
        let Ok(mut ring) = compute(&members, None) else { return Ok(()) };
        assert_sound(&ring);
        for (fresh, change) in (100..).zip(changes) {
            members = changed(&members, change, fresh);
            let Ok(next) = compute(&members, Some(&ring)) else { break };
            assert_sound(&next);
            let plan = plan(&ring, &next);
            let least = fewest_moves(&ring, &next);
            prop_assert_eq!(i64::try_from(plan.copies()).unwrap(), least);
            prop_assert!(plan.least_moves <= plan.copies());
            ring = next;
        }
    }

    /// Another number of copies, another kind before, more partitions: the same holds.
    #[test]
    fn rings_of_other_rules_become_balanced_ones(
        before in any_members(),
        after in any_members(),
        kind in prop_oneof![Just(Kind::Mod), Just(Kind::Ketama { points: 7 }), Just(Kind::Balanced)],
        copies in (1..5u8, 1..5u8),
        finer in 0..2u8,
    ) {
        let Ok(previous) = Ring::compute(rules(kind, copies.0, 5), before, None) else { return Ok(()) };
        assert_sound(&previous);
        let Ok(next) = Ring::compute(rules(Kind::Balanced, copies.1, 5 + finer), after, Some(&previous)) else {
            return Ok(());
        };
        assert_sound(&next);
        if finer == 0 {
            prop_assert_eq!(i64::try_from(plan(&previous, &next).copies()).unwrap(), fewest_moves(&previous, &next));
        }
    }

    /// Where nodes and zones leave room, a node that comes or goes moves no more than 1.05 times the theoretical minimum, which knows of no
    /// limits.
    #[test]
    fn a_node_that_comes_or_goes_moves_little(
        capacities in prop::collection::vec(1..5u64, 12..60),
        zones in prop_oneof![Just(0u32), 6..9u32],
        copies in 1..=3u8,
        which: Index,
        capacity in 1..5u64,
    ) {
        let zone = |number: u32| if zones == 0 { String::new() } else { format!("z{}", number % zones) };
        let capacity_of = |tib: u64| if zones == 0 { tib * TIB } else { TIB };
        let count = if zones == 0 { capacities.len() } else { capacities.len() / zones as usize * zones as usize };
        let capacities = capacities.iter().take(count).map(|tib| capacity_of(*tib));
        let members: Vec<Member> =
            (0..).zip(capacities).map(|(number, capacity)| member(number, &zone(number), capacity)).collect();
        let ring = balanced(&members, copies, 11, None);
        let grown = ring.change(vec![member(100, &zone(100), capacity_of(capacity))], &[]).unwrap();
        let shrunk = ring.change(Vec::new(), &[members[which.index(members.len())].store]).unwrap();
        for next in [grown, shrunk] {
            assert_sound(&next);
            let plan = plan(&ring, &next);
            prop_assert!(moved_little(&plan), "{} moved, at least {}", plan.copies(), plan.least_moves);
        }
    }

    /// Any kind gives the same ring for the same members in any order.
    #[test]
    fn the_order_of_members_means_nothing(
        members in any_members(),
        kind in prop_oneof![Just(Kind::Mod), Just(Kind::Ketama { points: 20 }), Just(Kind::Balanced)],
        rotation in any::<Index>(),
        copies in 1..5u8,
    ) {
        let mut turned = members.clone();
        turned.rotate_left(rotation.index(members.len()));
        let compute = |members| Ring::compute(rules(kind, copies, 6), members, None);
        prop_assert_eq!(compute(members), compute(turned));
    }

    /// Shares are in proportion to capacity, up to what a node and a zone can take: held against a computation in floating point.
    #[test]
    fn shares_are_in_proportion_to_capacity(members in any_members(), copies in 1..5u8, bits in 0..17u8) {
        let rules = rules(Kind::Balanced, copies, bits);
        let mut members = members;
        members.sort_by_key(|member| member.store);
        let Ok(topology) = check(&rules, &members).and_then(|()| shares::Topology::of(&rules, &members)) else {
            return Ok(());
        };
        let dealt = topology.shares(rules.partitions(), copies, &vec![0; members.len()]);
        let partitions = f64::from(rules.partitions());
        prop_assert_eq!(dealt.iter().sum::<u32>(), rules.partitions() * u32::from(copies));
        let ideal = ideal_shares(&members, &topology, partitions, f64::from(copies));
        for (share, ideal) in dealt.iter().zip(ideal) {
            prop_assert!((f64::from(*share) - ideal).abs() < 2.01, "{} for {}", share, ideal);
        }
    }

    /// Whatever is asked gives a ring or says why not.
    #[test]
    fn computing_is_total(
        numbers in prop::collection::vec((0..6u32, 0..4u32, any::<u64>(), any::<u16>(), "[ab]{0,1}"), 0..8),
        kind in prop_oneof![
            Just(Kind::Single), Just(Kind::Mod), Just(Kind::Balanced),
            any::<u16>().prop_map(|points| Kind::Ketama { points })
        ],
        copies: u8,
        bits in prop_oneof![0..10u8, any::<u8>()],
    ) {
        prop_assume!(bits <= 10 || bits > MAX_PARTITION_BITS);
        let members = numbers.into_iter().map(|(number, on, capacity_bytes, weight, zone)| Member {
            store: store(number), node: node(on), zone, capacity_bytes, weight,
        });
        if let Ok(ring) = Ring::compute(rules(kind, copies, bits), members.collect(), None) {
            prop_assert_eq!(ring.counts().iter().sum::<u32>(), ring.rules().partitions() * u32::from(copies));
        }
    }

    #[test]
    fn an_extent_has_one_of_the_partitions(volume: [u8; 16], extent: u64, spread: u32, bits in 0..=MAX_PARTITION_BITS) {
        let partition = partition_of(VolumeId(volume), extent, spread, bits);
        prop_assert!(partition < 1 << bits);
        // With one bit more it is one of the two parts of the same one.
        if bits < MAX_PARTITION_BITS {
            prop_assert_eq!(partition_of(VolumeId(volume), extent, spread, bits + 1) / 2, partition);
        }
        let next = extent.wrapping_add(u64::from(spread));
        if next >= extent {
            prop_assert_eq!(partition_of(VolumeId(volume), next, spread, bits), partition);
        }
    }
}

/// All stores grow at the rate of their weights until what they, their node or their zone can take is reached.
fn ideal_shares(members: &[Member], topology: &shares::Topology, partitions: f64, copies: f64) -> Vec<f64> {
    let weights: Vec<f64> =
        members.iter().map(|member| member.capacity_bytes as f64 * f64::from(member.weight)).collect();
    let at = |level: f64| -> Vec<f64> {
        let mut nodes: BTreeMap<u16, f64> = BTreeMap::new();
        for (node, weight) in topology.node_of.iter().zip(&weights) {
            *nodes.entry(*node).or_default() += weight;
        }
        let node_share = |index: usize, level: f64| (nodes[&topology.node_of[index]] * level).min(partitions);
        let mut zones: BTreeMap<u16, BTreeMap<u16, usize>> = BTreeMap::new();
        for index in 0..members.len() {
            zones.entry(topology.zone_of[index]).or_default().insert(topology.node_of[index], index);
        }
        // Within a full zone the level is lower.
        let zone_level = |zone: u16| {
            let most = partitions * f64::from(topology.limits[usize::from(zone)]);
            let sum = |level: f64| zones[&zone].values().map(|index| node_share(*index, level)).sum::<f64>();
            if sum(level) <= most { level } else { bisect(|level| sum(level) <= most) }
        };
        let levels: BTreeMap<u16, f64> = zones.keys().map(|zone| (*zone, zone_level(*zone))).collect();
        let share = |index: usize| {
            let node = node_share(index, levels[&topology.zone_of[index]]);
            let of_node = nodes[&topology.node_of[index]];
            if of_node == 0.0 { 0.0 } else { node * weights[index] / of_node }
        };
        (0..members.len()).map(share).collect()
    };
    at(bisect(|level| at(level).iter().sum::<f64>() <= partitions * copies))
}

/// The highest level at which something holds that stops holding.
fn bisect(holds: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (1e-40f64, 1e20f64);
    for _ in 0..300 {
        let middle = (low.ln().midpoint(high.ln())).exp();
        if holds(middle) { low = middle } else { high = middle }
    }
    low
}

#[test]
fn a_thousand_nodes_have_the_same_to_a_hundredth_and_one_more_moves_its_share() {
    for zones in [0, 3, 10] {
        let members = nodes(1000, zones);
        let ring = balanced(&members, 3, 16, None);
        assert_sound(&ring);
        let unequal = largest_over_mean(&ring);
        assert!(if zones == 3 { unequal < 1.02 } else { unequal < 1.01 }, "{unequal} with {zones} zones");

        let grown = ring.change(vec![member(1000, "z1", TIB)], &[]).unwrap();
        assert_sound(&grown);
        assert!(moved_little(&plan(&ring, &grown)));
        let of_new = grown.counts()[grown.index_of(store(1000)).unwrap()];
        if zones != 3 {
            assert_eq!(plan(&ring, &grown).copies(), u64::from(of_new), "what it has, and nothing else");
        }
        let back = grown.change(Vec::new(), &[store(1000)]).unwrap();
        assert_sound(&back);
        assert_eq!(plan(&grown, &back).copies(), plan(&grown, &back).least_moves);

        let shrunk = ring.change(Vec::new(), &[store(17)]).unwrap();
        assert_sound(&shrunk);
        assert!(moved_little(&plan(&ring, &shrunk)));
        // It leaves and returns: as little as it had has moved each time, and all shares are as before.
        let returned = shrunk.change(vec![member(17, &members[17].zone, TIB)], &[]).unwrap();
        assert_sound(&returned);
        assert!(moved_little(&plan(&shrunk, &returned)));
        assert!(
            plan(&ring, &returned).copies()
                <= 2 * u64::from(ring.counts()[ring.index_of(store(17)).unwrap()]) + 2
        );
    }
}

#[test]
fn what_one_store_has_is_also_on_many_others() {
    let ring = balanced(&nodes(300, 6), 3, 16, None);
    let mut peers: Vec<BTreeSet<u16>> = vec![BTreeSet::new(); 300];
    for partition in 0..ring.rules().partitions() {
        for owner in ring.owners(partition) {
            peers[usize::from(*owner)].extend(ring.owners(partition).iter().filter(|other| *other != owner));
        }
    }
    // 250 nodes are in other zones; 655 copies of a store have 1310 neighbours.
    assert!(peers.iter().all(|peers| peers.len() >= 240), "{:?}", peers.iter().map(BTreeSet::len).min());
    let mut first = vec![0u32; 300];
    for partition in 0..ring.rules().partitions() {
        first[usize::from(ring.owners(partition)[0])] += 1;
    }
    let mean = f64::from(ring.rules().partitions()) / 300.0;
    assert!(first.iter().all(|count| (0.6..1.4).contains(&(f64::from(*count) / mean))), "{first:?}");
}

#[test]
fn every_small_ring_grows_and_shrinks_by_its_share() {
    for count in 1..=10u32 {
        for copies in 1..=u8::try_from(count.min(4)).unwrap() {
            let ring = balanced(&nodes(count, 0), copies, 10, None);
            assert_sound(&ring);
            let grown = ring.change(vec![member(count, "", TIB)], &[]).unwrap();
            assert_sound(&grown);
            assert!(moved_little(&plan(&ring, &grown)), "{count} nodes, {copies} copies");
            for gone in 0..=count {
                let shrunk = grown.change(Vec::new(), &[store(gone)]).unwrap();
                assert_sound(&shrunk);
                assert!(
                    moved_little(&plan(&grown, &shrunk)),
                    "{count} nodes, {copies} copies, without {gone}"
                );
            }
        }
    }
}

#[test]
fn a_huge_node_has_one_copy_of_each_partition_and_no_more() {
    let mut members = nodes(20, 0);
    members[4].capacity_bytes = 1000 * TIB;
    let ring = balanced(&members, 3, 12, None);
    assert_sound(&ring);
    let counts = ring.counts();
    let huge = ring.index_of(store(4)).unwrap();
    assert_eq!(counts[huge], 4096);
    let others = counts.iter().enumerate().filter(|(index, _)| *index != huge);
    assert!(
        others.clone().all(|(_, count)| (431..=432).contains(count)),
        "the others share two copies: {counts:?}"
    );
}

#[test]
fn zones_of_unequal_size_have_a_copy_each_where_there_are_no_more_zones_than_copies() {
    // One node, three, and sixteen.
    let zone = |number: u32| ["a", "b", "c"][usize::from(number > 0) + usize::from(number > 3)];
    let members: Vec<Member> = (0..20).map(|number| member(number, zone(number), TIB)).collect();
    let ring = balanced(&members, 3, 12, None);
    assert_sound(&ring);
    assert_eq!(
        ring.counts()[ring.index_of(store(0)).unwrap()],
        4096,
        "the only node of its zone has everything"
    );
    // With two copies capacity decides, as far as one zone may not have both.
    let ring = balanced(&members, 2, 12, None);
    assert_sound(&ring);
    let of_zone = |name: &str| -> u32 {
        ring.members()
            .iter()
            .zip(ring.counts())
            .filter(|(member, _)| member.zone == name)
            .map(|one| one.1)
            .sum()
    };
    assert_eq!((of_zone("a"), of_zone("b"), of_zone("c")), (1024, 3072, 4096));
}

#[test]
fn a_zone_goes_and_comes() {
    for zones in [4u32, 10] {
        let members = nodes(200, zones);
        let ring = balanced(&members, 3, 14, None);
        let of_zone = |number: &u32| number % zones == 1;
        let gone: Vec<StoreId> = (0..200).filter(of_zone).map(store).collect();
        let without = ring.change(Vec::new(), &gone).unwrap();
        assert_sound(&without);
        assert!(moved_little(&plan(&ring, &without)), "{zones} zones");
        let back = (0..200).filter(of_zone).map(|number| members[number as usize].clone()).collect();
        let again = without.change(back, &[]).unwrap();
        assert_sound(&again);
        assert!(moved_little(&plan(&without, &again)), "{zones} zones");
    }
    // The third of three: its copies have only the zones where there is one already.
    let ring = balanced(&nodes(30, 3), 3, 12, None);
    let gone: Vec<StoreId> = (0..30).filter(|number| number % 3 == 0).map(store).collect();
    let two = ring.change(Vec::new(), &gone).unwrap();
    assert_sound(&two);
    assert!(moved_little(&plan(&ring, &two)));
    let back = (0..30).filter(|number| number % 3 == 0).map(|number| member(number, "z0", TIB)).collect();
    let three = two.change(back, &[]).unwrap();
    assert_sound(&three);
    assert!(moved_little(&plan(&two, &three)));
}

#[test]
fn capacities_and_weights_that_change_move_the_difference() {
    let members = nodes(100, 5);
    let ring = balanced(&members, 3, 14, None);
    let mut larger = members.clone();
    larger[3].capacity_bytes = 2 * TIB;
    larger[8].weight = 500;
    let next = balanced(&larger, 3, 14, Some(&ring));
    assert_sound(&next);
    assert!(moved_little(&plan(&ring, &next)));
    larger[8].weight = 0;
    let drained = balanced(&larger, 3, 14, Some(&next));
    assert_sound(&drained);
    assert_eq!(drained.counts()[drained.index_of(store(8)).unwrap()], 0);
    assert!(moved_little(&plan(&next, &drained)));
    assert_eq!(plan(&next, &balanced(&larger, 3, 14, Some(&next))), plan(&next, &drained), "the same again");
    assert!(plan(&drained, &balanced(&larger, 3, 14, Some(&drained))).moves.is_empty(), "nothing changed");
}

#[test]
fn fewer_copies_give_up_some_and_make_none_and_more_make_one_each() {
    let ring = balanced(&nodes(50, 5), 3, 12, None);
    let two = balanced(ring.members(), 2, 12, Some(&ring));
    assert_sound(&two);
    let to_two = plan(&ring, &two);
    assert_eq!((to_two.copies(), to_two.bytes(), to_two.moves.len()), (0, 0, 4096));
    let three = balanced(ring.members(), 3, 12, Some(&two));
    assert_sound(&three);
    assert_eq!(plan(&two, &three).copies(), 4096);
}

#[test]
fn more_partitions_leave_everything_where_it_is() {
    let ring = balanced(&nodes(64, 4), 3, 10, None);
    let finer = balanced(ring.members(), 3, 12, Some(&ring));
    assert_sound(&finer);
    assert!(plan(&ring, &finer).copies() <= 64 * 4, "{}", plan(&ring, &finer).copies());
    let fewer = Ring::compute(rules(Kind::Balanced, 3, 9), ring.members().to_vec(), Some(&ring));
    assert_eq!(fewer, Err(RingError::FewerPartitions { from: 10, to: 9 }));
}

#[test]
fn the_kinds_of_the_original_do_what_they_did() {
    let one = Ring::compute(rules(Kind::Single, 1, 4), vec![member(1, "", TIB)], None).unwrap();
    assert_eq!(one.stores(15), [store(1)]);
    assert!(one.stores(16).is_empty());

    let modulo = Ring::compute(rules(Kind::Mod, 3, 6), nodes(5, 0), None).unwrap();
    assert_sound(&modulo);
    let all = modulo.members().to_vec();
    assert_eq!(modulo.stores(4), [all[4].store, all[0].store, all[1].store]);
    // Two stores of one node are one copy.
    let mut shared = all.clone();
    shared[1].node = shared[0].node;
    let modulo = Ring::compute(rules(Kind::Mod, 2, 6), shared, None).unwrap();
    assert_eq!(modulo.stores(0), [all[0].store, all[2].store]);

    let ketama = |members: Vec<Member>| {
        Ring::compute(rules(Kind::Ketama { points: DEFAULT_POINTS }, 3, 14), members, None).unwrap()
    };
    let before = ketama(nodes(50, 0));
    assert_sound(&before);
    assert!((1.05..1.6).contains(&largest_over_mean(&before)), "{}", largest_over_mean(&before));
    let after = ketama(nodes(51, 0));
    let moved = plan(&before, &after);
    assert!(moved_little(&moved) && moved.copies() > 0, "{} of {}", moved.copies(), moved.least_moves);
    // A store twice as large has about twice as much.
    let mut members = nodes(50, 0);
    members[7].capacity_bytes = 2 * TIB;
    let twice = ketama(members);
    let share = |ring: &Ring| f64::from(ring.counts()[ring.index_of(store(7)).unwrap()]);
    assert!((1.7..2.2).contains(&(share(&twice) / share(&before))));
}

#[test]
fn what_makes_no_ring_is_refused_with_what_to_do() {
    let two = || nodes(2, 0);
    let compute =
        |kind, copies, bits, members| Ring::compute(rules(kind, copies, bits), members, None).unwrap_err();
    let with = |change: fn(&mut Member)| {
        let mut members = two();
        change(&mut members[0]);
        compute(Kind::Balanced, 1, 4, members)
    };
    let first = store(0);
    for (error, expected, words) in [
        (compute(Kind::Balanced, 1, 4, Vec::new()), RingError::NoMembers, "add one"),
        (compute(Kind::Balanced, 0, 4, two()), RingError::Copies(0), "ask for 1 to 16"),
        (compute(Kind::Mod, 17, 4, two()), RingError::Copies(17), "ask for 1 to 16"),
        (compute(Kind::Balanced, 1, 21, two()), RingError::PartitionBits(21), "at most 2^20"),
        (compute(Kind::Ketama { points: 0 }, 1, 4, two()), RingError::Points(0), "ask for 1 to 1000"),
        (compute(Kind::Balanced, 3, 4, two()), RingError::TooFewNodes { copies: 3, nodes: 2 }, "add nodes"),
        (compute(Kind::Mod, 3, 4, two()), RingError::TooFewNodes { copies: 3, nodes: 2 }, "fewer copies"),
        (compute(Kind::Single, 1, 4, two()), RingError::NotSingle { members: 2, copies: 1 }, "another kind"),
        (
            compute(Kind::Mod, 1, 4, [two(), two()].concat()),
            RingError::DuplicateStore(first.min(store(1))),
            "once",
        ),
        (with(|one| one.capacity_bytes = 0), RingError::NoCapacity(first), "weight 0 drains"),
        (with(|one| one.weight = 1001), RingError::Weight { store: first, weight: 1001 }, "lower it"),
        (with(|one| one.store = StoreId::default()), RingError::NilId, "give both"),
        (with(|one| one.zone = "z".repeat(65)), RingError::ZoneName(node(0)), "shorten it"),
    ] {
        assert!(error == expected && error.to_string().contains(words), "{error:?}: {error}");
    }
    let mut drained = two();
    drained[0].weight = 0;
    assert_eq!(compute(Kind::Balanced, 2, 4, drained), RingError::TooFewNodes { copies: 2, nodes: 1 });
    let mut apart = two();
    (apart[1].node, apart[1].zone) = (node(0), "other".into());
    assert_eq!(compute(Kind::Balanced, 1, 4, apart), RingError::TwoZones(node(0)));
    let many = |count: u32, zoned: bool| {
        let zone = |number: u32| if zoned { number.to_string() } else { String::new() };
        compute(Kind::Mod, 1, 4, (0..count).map(|number| member(number, &zone(number), 1)).collect())
    };
    assert_eq!(many(24_577, false), RingError::TooManyMembers { count: 24_577 });
    assert_eq!(many(4097, true), RingError::TooManyZones(4097));
    let ring = balanced(&two(), 1, 4, None);
    assert_eq!(ring.change(Vec::new(), &[store(9)]), Err(RingError::UnknownStore(store(9))));
    assert_eq!(ring.change(vec![member(0, "", 1)], &[]), Err(RingError::DuplicateStore(store(0))));
}

/// Where data are must not depend on the release: these values never change.
#[test]
fn partitions_are_where_they_always_were() {
    let id = VolumeId(*b"\x6f\x1c\x3a\xd2\x90\xb4\x4a\x07\x8a\x55\x0d\x2f\x6b\x1e\x7c\x43");
    let of = |extent| partition_of(id, extent, 64, 16);
    assert_eq!([of(0), of(1), of(63), of(64), of(u64::MAX)], [26035, 41329, 22551, 26035, 22551]);
    assert_eq!(partition_of(VolumeId::default(), 0, 0, 0), 0);
}

/// Every machine computes the same ring: its owners, as a checksum, after it was made and changed. A better way to choose owners may
/// change it, since rings are kept and not computed again.
#[test]
fn every_machine_computes_the_same_ring() {
    let members = nodes(40, 7);
    let ring = balanced(&members, 3, 10, None);
    let changed =
        ring.change(vec![member(40, "z1", 3 * TIB), member(41, "", TIB)], &[store(5), store(12)]).unwrap();
    let ketama = Ring::compute(rules(Kind::Ketama { points: 40 }, 3, 10), members, None).unwrap();
    let sum = |ring: &Ring| {
        let bytes: Vec<u8> = ring.owners.iter().flat_map(|owner| owner.to_le_bytes()).collect();
        crc32c::crc32c(&bytes)
    };
    assert_eq!([sum(&ring), sum(&changed), sum(&ketama)], [3_238_963_044, 2_596_353_584, 2_698_909_933]);
}

#[test]
fn the_extents_of_a_volume_are_on_as_many_partitions_as_its_spread() {
    let partitions: BTreeSet<u32> =
        (0..100_000).map(|extent| partition_of(VolumeId([7; 16]), extent, 64, 16)).collect();
    assert!((60..=64).contains(&partitions.len()), "{}", partitions.len());
    // Over many volumes all partitions have about the same number of extents.
    let mut counts = vec![0u32; 64];
    for volume in 0u64..1000 {
        let mut id = [0; 16];
        id[8..].copy_from_slice(&volume.to_be_bytes());
        for extent in 0..64 {
            counts[partition_of(VolumeId(id), extent, 64, 6) as usize] += 1;
        }
    }
    assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
}
