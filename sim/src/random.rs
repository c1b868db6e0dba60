//! The one source of chance in a simulation.
//!
//! Everything that could go one way or another is drawn from a [`Random`], so that a seed repeats a run bit for bit.
//! Each component draws from a stream of its own ([`Random::named`]): a draw more in one of them then leaves the
//! others' as they were, and a failing seed stays one while a component beside it is changed.

use std::ops::Range;

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// A stream of numbers determined by its seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
    /// What streams with a name are derived from; draws leave it as it is.
    origin: u64,
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    /// The stream of a seed. Neighbouring seeds have nothing in common.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let origin = mix(seed.wrapping_add(GOLDEN_GAMMA)) ^ 0x2545_f491_4f6c_dd1d;
        Self { state: mix(origin), origin }
    }

    /// The stream of that name and number: the same whatever was drawn from this one before.
    #[must_use]
    pub fn named(&self, name: &str, number: u64) -> Self {
        let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, fold);
        Self::new(self.origin ^ mix(hash ^ mix(number.wrapping_add(GOLDEN_GAMMA))))
    }

    /// A stream of its own, by one draw from this one.
    #[must_use]
    pub fn split(&mut self) -> Self {
        Self::new(self.next_u64())
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN_GAMMA);
        mix(self.state)
    }

    /// A number below `end`; 0 if there is none.
    pub fn below(&mut self, end: u64) -> u64 {
        // The high half of the product: its bias is 2^-64 of `end`.
        let product = u128::from(self.next_u64()) * u128::from(end);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// A number of `range`; its start if it is empty.
    pub fn range(&mut self, range: Range<u64>) -> u64 {
        range.start + self.below(range.end.saturating_sub(range.start))
    }

    /// A number of `range` whose magnitude is even: as often within 1..2 as within 1024..2048.
    pub fn magnitude(&mut self, range: Range<u64>) -> u64 {
        let bits = |number: u64| u64::from(u64::BITS - number.leading_zeros());
        let last = range.end.saturating_sub(1).max(range.start);
        let width = self.range(bits(range.start)..bits(last) + 1);
        let low = if width == 0 { 0 } else { 1u64 << (width - 1) };
        let end = if width >= 64 { u64::MAX } else { 1u64 << width };
        self.range(low.max(range.start)..end.min(last.saturating_add(1)))
    }

    /// An index of something of that length, which must not be empty for the index to mean anything.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// True once in `count` times; never for 0.
    pub fn one_in(&mut self, count: u64) -> bool {
        count > 0 && self.below(count) == 0
    }

    /// True in so many of a million times.
    pub fn chance_ppm(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.below(1_000_000) < u64::from(ppm)
    }

    /// True or false.
    pub fn coin(&mut self) -> bool {
        self.next_u64() >> 63 == 1
    }

    /// One of the items, if there are any.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        items.get(self.index(items.len()))
    }

    /// Puts the items into any order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.index(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(mut random: Random) -> Vec<u64> {
        (0..8).map(|_| random.next_u64()).collect()
    }

    #[test]
    fn a_seed_repeats_its_stream_and_shares_nothing_with_its_neighbours() {
        assert_eq!(draws(Random::new(7)), draws(Random::new(7)));
        let mut all: Vec<u64> = (0..1000).flat_map(|seed| draws(Random::new(seed))).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 8000);
    }

    #[test]
    fn a_named_stream_does_not_depend_on_what_was_drawn_before() {
        let fresh = Random::new(3);
        let mut used = fresh.clone();
        used.next_u64();
        let _ = used.split();
        assert_eq!(draws(fresh.named("network", 1)), draws(used.named("network", 1)));
        assert_ne!(draws(fresh.named("network", 1)), draws(fresh.named("network", 2)));
        assert_ne!(draws(fresh.named("network", 1)), draws(fresh.named("etcd", 1)));
        assert_ne!(draws(fresh.split_of_clone()), draws(fresh));
    }

    impl Random {
        fn split_of_clone(&self) -> Random {
            self.clone().split()
        }
    }

    #[test]
    fn helpers_stay_in_their_bounds_and_reach_them() {
        let mut random = Random::new(1);
        let (mut below, mut ranged, mut sized) = ([0; 6], [0; 4], [0; 65]);
        for _ in 0..10_000 {
            below[random.index(6)] += 1;
            ranged[usize::try_from(random.range(10..14)).unwrap() - 10] += 1;
            let number = random.magnitude(1..u64::MAX);
            sized[(64 - number.leading_zeros()) as usize] += 1;
            assert!((3..700).contains(&random.magnitude(3..700)));
        }
        assert!(below.iter().all(|count| (1400..1950).contains(count)), "{below:?}");
        assert!(ranged.iter().all(|count| (2200..2800).contains(count)), "{ranged:?}");
        assert!(sized[1..].iter().all(|count| *count > 80), "{sized:?}");
        assert_eq!(random.below(0), 0);
        assert_eq!(random.range(5..5), 5);
        assert_eq!(random.magnitude(5..5), 5);
        assert_eq!(random.pick::<u8>(&[]), None);
        assert!((0..100).all(|_| !random.one_in(0) && random.one_in(1) && !random.chance_ppm(0)));
        assert!((0..100).all(|_| random.chance_ppm(1_000_000)));
    }

    #[test]
    fn a_shuffle_keeps_the_items_and_reaches_every_order() {
        let mut random = Random::new(9);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let mut items = [1, 2, 3];
            random.shuffle(&mut items);
            seen.insert(items);
        }
        assert_eq!(seen.len(), 6);
    }
}
