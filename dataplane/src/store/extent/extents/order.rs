//! Extents in order of layer and number: a search tree over their places in the table, whose nodes are made in advance.
//!
//! A treap: ordered by key, and as a heap by a hash of the key, so that its depth is logarithmic whatever the order extents come
//! and go in. Nothing is allocated for one that comes.

/// No node.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Node {
    key: (u32, u32),
    left: u32,
    right: u32,
}

/// What points at a node.
#[derive(Debug, Clone, Copy)]
enum Link {
    Root,
    Left(u32),
    Right(u32),
}

/// Places by key.
#[derive(Debug)]
pub(super) struct Order {
    /// By place; those of no extent mean nothing.
    nodes: Vec<Node>,
    root: u32,
}

impl Order {
    /// Empty, with room for so many places.
    pub(super) fn new(places_max: u32) -> Order {
        Order { nodes: Vec::with_capacity(places_max as usize), root: NONE }
    }

    fn node(&self, at: u32) -> Node {
        self.nodes[at as usize]
    }

    fn at(&self, link: Link) -> u32 {
        match link {
            Link::Root => self.root,
            Link::Left(of) => self.node(of).left,
            Link::Right(of) => self.node(of).right,
        }
    }

    fn set(&mut self, link: Link, to: u32) {
        match link {
            Link::Root => self.root = to,
            Link::Left(of) => self.nodes[of as usize].left = to,
            Link::Right(of) => self.nodes[of as usize].right = to,
        }
    }

    /// Takes one in. Its key is not there yet, nor is its place, which is one of those there were or the next.
    pub(super) fn insert(&mut self, key: (u32, u32), place: u32) {
        let mut link = Link::Root;
        let mut at = self.root;
        while at != NONE && weight(self.node(at).key) >= weight(key) {
            link = if key < self.node(at).key { Link::Left(at) } else { Link::Right(at) };
            at = self.at(link);
        }
        let node = Node { key, left: NONE, right: NONE };
        match self.nodes.get_mut(place as usize) {
            Some(former) => *former = node,
            None => self.nodes.push(node),
        }
        self.set(link, place);
        // What was there goes below it, each part to its side.
        let (mut smaller, mut greater) = (Link::Left(place), Link::Right(place));
        while at != NONE {
            if self.node(at).key < key {
                self.set(smaller, at);
                smaller = Link::Right(at);
                at = self.at(smaller);
            } else {
                self.set(greater, at);
                greater = Link::Left(at);
                at = self.at(greater);
            }
        }
        self.set(smaller, NONE);
        self.set(greater, NONE);
    }

    /// Takes one out.
    ///
    /// # Panics
    /// If it is not there.
    pub(super) fn remove(&mut self, key: (u32, u32)) {
        let mut link = Link::Root;
        let mut at = self.root;
        loop {
            assert!(at != NONE, "an extent is in order");
            match key.cmp(&self.node(at).key) {
                std::cmp::Ordering::Less => link = Link::Left(at),
                std::cmp::Ordering::Greater => link = Link::Right(at),
                std::cmp::Ordering::Equal => break,
            }
            at = self.at(link);
        }
        let Node { mut left, mut right, .. } = self.node(at);
        while left != NONE && right != NONE {
            if weight(self.node(left).key) >= weight(self.node(right).key) {
                self.set(link, left);
                link = Link::Right(left);
                left = self.at(link);
            } else {
                self.set(link, right);
                link = Link::Left(right);
                right = self.at(link);
            }
        }
        self.set(link, if left == NONE { right } else { left });
    }

    /// The first one whose key is not below this: key and place.
    pub(super) fn first_from(&self, key: (u32, u32)) -> Option<((u32, u32), u32)> {
        let mut best = None;
        let mut at = self.root;
        while at != NONE {
            let node = self.node(at);
            if node.key < key {
                at = node.right;
            } else {
                best = Some((node.key, at));
                at = node.left;
            }
        }
        best
    }
}

/// Mixes a key so that each of its bits matters to all of the result's; no two keys have the same.
fn weight((object, number): (u32, u32)) -> u64 {
    let mut mixed = u64::from(object) << 32 | u64::from(number);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    impl Order {
        fn depth(&self) -> usize {
            let mut row = vec![self.root];
            let mut depth = 0;
            loop {
                row.retain(|at| *at != NONE);
                if row.is_empty() {
                    return depth;
                }
                row = row.iter().flat_map(|at| [self.node(*at).left, self.node(*at).right]).collect();
                depth += 1;
            }
        }
    }

    #[test]
    fn it_stays_flat_however_extents_come() {
        let count = 1 << 16;
        for step in [1, 0x9e37, count - 1] {
            let mut order = Order::new(count);
            let mut number = 0;
            for place in 0..count {
                order.insert((7, number), place);
                number = (number + step) % count;
            }
            assert!(order.depth() < 48, "{} levels by steps of {step}", order.depth());
        }
    }

    proptest! {
        #[test]
        fn it_has_what_a_map_has(changes in proptest::collection::vec((0u32..3, 0u32..20, any::<bool>()), 0..200)) {
            let mut order = Order::new(0);
            let mut map = BTreeMap::new();
            let (mut free, mut places) = (Vec::new(), 0);
            for (object, number, comes) in changes {
                let key = (object, number);
                match map.get(&key).copied() {
                    None if comes => {
                        let place = free.pop().unwrap_or_else(|| {
                            places += 1;
                            places - 1
                        });
                        map.insert(key, place);
                        order.insert(key, place);
                    }
                    Some(place) if !comes => {
                        map.remove(&key);
                        order.remove(key);
                        free.push(place);
                    }
                    _ => {}
                }
                for from in [(0, 0), key, (object, number + 1), (3, 0)] {
                    let expected = map.range(from..).next().map(|(key, place)| (*key, *place));
                    prop_assert_eq!(order.first_from(from), expected);
                }
            }
        }
    }
}
