//! Which operation comes next: direction, pattern and block, from a seed alone, so that a run can be repeated.

use crate::initiator::Kind;

/// A small fast generator (SplitMix64, Steele et al. 2014): every seed is good and nothing is allocated.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`, by multiplication (Lemire), whose bias is below 2^-32 for the bounds in use.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(bound);
        u64::try_from(wide >> 64).expect("the high half fits")
    }
}

/// The order in which blocks are visited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pattern {
    /// Each block independently of the last.
    Random,
    /// One after the other, from the first again after the last.
    Sequential,
}

/// Consecutive blocks of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Region {
    /// First sector on the volume.
    pub(crate) start_lba: u64,
    /// Sectors of a block.
    pub(crate) block_sectors: u32,
    /// Number of blocks, at least one.
    pub(crate) blocks: u64,
}

impl Region {
    /// First sector of a block.
    pub(crate) fn lba(&self, block: u64) -> u64 {
        self.start_lba + block * u64::from(self.block_sectors)
    }

    /// The block that a sector of the region lies in.
    pub(crate) fn block(&self, lba: u64) -> u64 {
        (lba - self.start_lba) / u64::from(self.block_sectors)
    }

    /// Number of sectors.
    pub(crate) fn sectors(&self) -> u64 {
        self.blocks * u64::from(self.block_sectors)
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    blocks: u64,
    pattern: Pattern,
    read_percent: u8,
    random: Random,
    next_block: u64,
}

impl Workload {
    pub(crate) fn new(blocks: u64, pattern: Pattern, read_percent: u8, seed: u64) -> Workload {
        Workload { blocks, pattern, read_percent, random: Random::new(seed), next_block: 0 }
    }

    /// The next operation's direction and block.
    pub(crate) fn next(&mut self) -> (Kind, u64) {
        let kind = match self.read_percent {
            0 => Kind::Write,
            100.. => Kind::Read,
            percent if self.random.below(100) < u64::from(percent) => Kind::Read,
            _ => Kind::Write,
        };
        let block = match self.pattern {
            Pattern::Random => self.random.below(self.blocks),
            Pattern::Sequential => {
                let block = self.next_block;
                self.next_block = (block + 1) % self.blocks;
                block
            }
        };
        (kind, block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_another_differs() {
        let run = |seed| {
            let mut workload = Workload::new(1000, Pattern::Random, 50, seed);
            (0..100).map(|_| workload.next()).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn random_blocks_cover_the_region_evenly_and_sequential_ones_wrap() {
        let mut workload = Workload::new(16, Pattern::Random, 100, 1);
        let mut hits = [0u32; 16];
        for _ in 0..16_000 {
            hits[usize::try_from(workload.next().1).unwrap()] += 1;
        }
        assert!(hits.iter().all(|&n| (800..1200).contains(&n)), "{hits:?}");
        let mut workload = Workload::new(3, Pattern::Sequential, 0, 1);
        let seen: Vec<_> = (0..5).map(|_| workload.next()).collect();
        assert_eq!(seen, [0, 1, 2, 0, 1].map(|block| (Kind::Write, block)));
    }

    #[test]
    fn the_mix_is_what_was_asked() {
        let mut workload = Workload::new(10, Pattern::Random, 70, 3);
        let reads = (0..10_000).filter(|_| workload.next().0 == Kind::Read).count();
        assert!((6_700..7_300).contains(&reads), "{reads}");
    }
}
