//! How fast members are brought up to date: a budget of bytes that a site's heads share, filled as time passes.
//!
//! A piece of an extent is paid for before it is compared, whether it turns out to differ or not: both copies of it are read. What
//! waits for its turn holds no blocks.

/// What may be spent at once after a rest, as a part of a second.
const BURST_PER_S: u64 = 10;

/// The budget.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    /// 0: no limit.
    bytes_per_s: u64,
    left_bytes: u64,
    filled_ns: u64,
}

impl Budget {
    /// From now on so many bytes in a second; 0: as many as can be.
    pub(crate) fn set_rate(&mut self, bytes_per_s: u64, now_ns: u64) {
        self.fill(0, now_ns);
        self.bytes_per_s = bytes_per_s;
        self.filled_ns = now_ns;
        self.left_bytes = self.left_bytes.min(bytes_per_s / BURST_PER_S);
    }

    /// Takes that many bytes, if they are there.
    pub(crate) fn take(&mut self, bytes: u64, now_ns: u64) -> bool {
        self.fill(bytes, now_ns);
        if self.bytes_per_s == 0 {
            return true;
        }
        let has_room = self.left_bytes >= bytes;
        if has_room {
            self.left_bytes -= bytes;
        }
        has_room
    }

    /// Adds what the time since the last time is worth; there is always room for one piece.
    fn fill(&mut self, piece_bytes: u64, now_ns: u64) {
        let passed_ns = now_ns.saturating_sub(self.filled_ns);
        let earned = u128::from(passed_ns) * u128::from(self.bytes_per_s) / 1_000_000_000;
        if earned == 0 {
            // Less than a byte: the time counts with what comes.
            return;
        }
        self.filled_ns = now_ns;
        let most = piece_bytes.max(self.bytes_per_s / BURST_PER_S).max(self.left_bytes);
        let earned = u64::try_from(earned).unwrap_or(u64::MAX);
        self.left_bytes = self.left_bytes.saturating_add(earned).min(most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;
    const PIECE: u64 = 256 << 10;

    /// How many pieces are paid for within a time, asked for every so many nanoseconds.
    fn pieces(budget: &mut Budget, from_ns: u64, for_ns: u64, every_ns: u64) -> u64 {
        let times = (0..for_ns / every_ns).map(|at| from_ns + at * every_ns);
        times
            .map(|now_ns| {
                std::iter::from_fn(|| budget.take(PIECE, now_ns).then_some(())).take(10_000).count() as u64
            })
            .sum()
    }

    #[test]
    fn as_much_as_the_rate_says_whatever_the_steps() {
        for rate in [PIECE / 3, PIECE * 4, 200 << 20] {
            for every_ns in [7_000, 1_000_000, 20_000_000] {
                let mut budget = Budget::default();
                budget.set_rate(rate, SECOND_NS);
                let spent = pieces(&mut budget, SECOND_NS, 9 * SECOND_NS, every_ns) * PIECE;
                let most = 9 * rate + PIECE;
                assert!(
                    spent <= most && spent + 2 * PIECE + rate / 50 >= 9 * rate,
                    "{rate} {every_ns}: {spent}"
                );
            }
        }
    }

    #[test]
    fn a_rest_is_worth_a_tenth_of_a_second_and_no_limit_is_none() {
        let mut budget = Budget::default();
        assert_eq!(pieces(&mut budget, 0, 1, 1), 10_000);
        budget.set_rate(100 * PIECE, SECOND_NS);
        assert_eq!(pieces(&mut budget, 60 * SECOND_NS, 1, 1), 10);
        budget.set_rate(0, 61 * SECOND_NS);
        assert!(budget.take(u64::MAX, 61 * SECOND_NS));
    }
}
