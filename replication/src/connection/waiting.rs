//! When to try again: soon at first, and at most about once in a second, at moments that two nodes do not share.

/// The longest wait before the first new attempt.
const FIRST_NS: u64 = 20_000_000;
/// The longest wait before any: I/O goes on within three seconds of a peer's return.
pub const WAIT_NS_MAX: u64 = 1_000_000_000;
/// A connection that lasted as long counts as a success.
const SETTLED_NS: u64 = 1_000_000_000;

/// The waits of one peer.
#[derive(Debug, Clone)]
pub struct Waiting {
    failures: u32,
    random: u64,
}

impl Waiting {
    /// Without a failure yet; `seed` should not be the same on two nodes.
    #[must_use]
    pub fn new(seed: u64) -> Waiting {
        Waiting { failures: 0, random: seed }
    }

    /// How long to wait after an attempt that failed, or after a connection that was open for so long.
    pub fn wait_ns(&mut self, open_ns: u64) -> u64 {
        if open_ns >= SETTLED_NS {
            self.failures = 0;
        }
        let longest_ns = WAIT_NS_MAX.min(FIRST_NS << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        // Between half of it and all.
        longest_ns / 2 + self.next() % (longest_ns / 2)
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014).
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_second_and_begin_anew_after_a_connection_that_lasted() {
        let mut waiting = Waiting::new(7);
        let waits: Vec<u64> = (0..40).map(|_| waiting.wait_ns(0)).collect();
        for (at, wait_ns) in waits.iter().enumerate() {
            let longest_ns = WAIT_NS_MAX.min(FIRST_NS << at.min(16));
            assert!((longest_ns / 2..longest_ns).contains(wait_ns), "wait {at} is {wait_ns} ns");
        }
        assert!(waiting.wait_ns(SETTLED_NS - 1) >= WAIT_NS_MAX / 2);
        assert!(waiting.wait_ns(SETTLED_NS) < FIRST_NS);
        assert_ne!(
            waits,
            (0..40)
                .map({
                    let mut other = Waiting::new(8);
                    move |_| other.wait_ns(0)
                })
                .collect::<Vec<_>>(),
            "two nodes do not keep step"
        );
    }
}
