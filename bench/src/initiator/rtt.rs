//! Round-trip time, retransmission timeout and window of one target, as the Linux driver keeps them
//! (`drivers/block/aoe/aoecmd.c`: `calc_rttavg`, `rto`, `rexmit_timer`).

/// One microsecond in nanoseconds: Linux counts round trips in microseconds, and so does the estimator.
const MICROSECOND_NS: u64 = 1_000;
/// An hour; anything longer says no more.
const SAMPLE_MAX_US: i64 = 3_600_000_000;
/// `RTTSCALE` and `RTTDSCALE` of `aoe.h`: fraction bits of the average and of the deviation.
const AVERAGE_SHIFT: u32 = 8;
const DEVIATION_SHIFT: u32 = 3;
/// `RTTAVG_INIT`: a quarter of a second.
const AVERAGE_INIT: i64 = (1_000_000 / 4) << AVERAGE_SHIFT;
/// `RTTDEV_INIT`: with the average it makes the first timeout 16.5 s.
const DEVIATION_INIT: i64 = AVERAGE_INIT / 4;

/// Smoothed round-trip time and its mean deviation.
#[derive(Debug, Clone)]
pub(crate) struct RoundTrip {
    average: i64,
    deviation: i64,
}

impl RoundTrip {
    /// What the driver assumes of a target it has just identified.
    pub(crate) fn new() -> RoundTrip {
        RoundTrip { average: AVERAGE_INIT, deviation: DEVIATION_INIT }
    }

    /// Takes one measured round trip in.
    pub(crate) fn sample(&mut self, round_trip_ns: u64) {
        let sample_us = i64::try_from(round_trip_ns / MICROSECOND_NS).unwrap_or(i64::MAX).min(SAMPLE_MAX_US);
        let error = sample_us - (self.average >> AVERAGE_SHIFT);
        self.average += error;
        self.deviation += error.abs() - (self.deviation >> DEVIATION_SHIFT);
    }

    /// How long a request may stay unanswered: twice the average and eight deviations. Like the driver's it has no
    /// lower bound but one microsecond, and no back-off.
    pub(crate) fn timeout_ns(&self) -> u64 {
        let timeout_us = ((2 * self.average) >> AVERAGE_SHIFT) + ((8 * self.deviation) >> DEVIATION_SHIFT);
        u64::try_from(timeout_us.max(1)).unwrap_or(1) * MICROSECOND_NS
    }
}

/// How many frames may be unanswered: `maxout`, `ssthresh` and `next_cwnd` of the driver.
#[derive(Debug, Clone)]
pub(crate) struct Window {
    limit: u16,
    slow_start_below: u16,
    until_next: u16,
    frames_max: u16,
    collapses: bool,
}

impl Window {
    /// The driver's window: starts at half of what the target can hold, falls to one frame at a timeout, and grows
    /// by one per reply, later by one per full window.
    pub(crate) fn linux(frames_max: u16) -> Window {
        let half = (frames_max / 2).max(1);
        Window { limit: half, slow_start_below: half, until_next: half, frames_max, collapses: true }
    }

    /// A window that stays at what the target can hold.
    pub(crate) fn fixed(frames_max: u16) -> Window {
        Window {
            limit: frames_max,
            slow_start_below: frames_max,
            until_next: 0,
            frames_max,
            collapses: false,
        }
    }

    /// Frames that may be unanswered now.
    pub(crate) fn limit(&self) -> u16 {
        self.limit
    }

    /// The target now holds `frames_max` frames.
    pub(crate) fn set_frames_max(&mut self, frames_max: u16) {
        self.frames_max = frames_max;
        self.limit = if self.collapses { self.limit.min(frames_max) } else { frames_max };
    }

    /// A reply came while `unanswered` frames, itself included, were out.
    pub(crate) fn on_reply(&mut self, unanswered: u16) {
        if self.limit >= self.frames_max {
            return;
        }
        if self.limit < self.slow_start_below {
            self.limit += 1;
            return;
        }
        if unanswered < self.limit {
            return;
        }
        if self.until_next == 0 {
            self.limit += 1;
            self.until_next = self.limit;
        } else {
            self.until_next -= 1;
        }
    }

    /// A frame went unanswered for the retransmission timeout.
    pub(crate) fn on_timeout(&mut self) {
        if self.collapses && self.limit != 1 {
            self.slow_start_below = self.limit / 2;
            self.limit = 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_timeout_is_the_drivers() {
        assert_eq!(RoundTrip::new().timeout_ns(), 16_500_000_000);
    }

    #[test]
    fn the_timeout_falls_to_about_twice_a_steady_round_trip() {
        let mut round_trip = RoundTrip::new();
        for _ in 0..4000 {
            round_trip.sample(100_000);
        }
        let timeout = round_trip.timeout_ns();
        assert!((150_000..=300_000).contains(&timeout), "{timeout} ns");
        round_trip.sample(50_000_000);
        assert!(round_trip.timeout_ns() > 10 * timeout, "one slow reply must raise it");
    }

    #[test]
    fn extreme_samples_do_not_overflow() {
        let mut round_trip = RoundTrip::new();
        for sample in [u64::MAX, 0, u64::MAX, 1] {
            round_trip.sample(sample);
            assert!(round_trip.timeout_ns() > 0);
        }
    }

    #[test]
    fn a_timeout_collapses_the_window_and_replies_open_it() {
        let mut window = Window::linux(64);
        assert_eq!(window.limit(), 32);
        window.on_timeout();
        assert_eq!(window.limit(), 1);
        for _ in 0..15 {
            window.on_reply(1);
        }
        assert_eq!(window.limit(), 16, "slow start goes to half of what it was");
        window.on_reply(1);
        assert_eq!(window.limit(), 16, "then it grows only with a full window out");
        for _ in 0..5000 {
            window.on_reply(window.limit());
        }
        assert_eq!(window.limit(), 64);
    }

    #[test]
    fn a_fixed_window_stays() {
        let mut window = Window::fixed(40);
        window.on_timeout();
        assert_eq!(window.limit(), 40);
        window.set_frames_max(10);
        assert_eq!(window.limit(), 10);
    }
}
