//! The driver's arithmetic of round trips and windows.

use crate::network::Mac;

/// Avoided for so many answers at most.
const MAX_TAINT: u32 = 4096;
const AVERAGE_SCALE: u32 = 8;
const DEVIATION_SCALE: u32 = 3;

/// Average and deviation of round trips, in scaled microseconds as the driver keeps them.
#[derive(Clone, Debug)]
pub(super) struct RoundTrips {
    average: i64,
    deviation: i64,
}

impl RoundTrips {
    pub(super) fn new() -> Self {
        let average = 250_000 << AVERAGE_SCALE;
        Self { average, deviation: average / 4 }
    }

    pub(super) fn timeout_ns(&self) -> u64 {
        let micros = 2 * (self.average >> AVERAGE_SCALE) + 8 * (self.deviation >> DEVIATION_SCALE);
        u64::try_from(micros).unwrap_or(0).max(1) * 1000
    }

    /// An answer came; the target's window grows by it, unless it was to something given up before.
    pub(super) fn measure(&mut self, target: Option<&mut Target>, round_trip_ns: u64) {
        let mut off =
            i64::try_from(round_trip_ns / 1000).unwrap_or(i64::MAX) - (self.average >> AVERAGE_SCALE);
        self.average += off;
        off = off.abs() - (self.deviation >> DEVIATION_SCALE);
        self.deviation += off;
        if let Some(target) = target {
            target.grow();
        }
    }
}

/// One address by which the device is reached.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) mac: Mac,
    /// Most sectors of a frame.
    pub(super) sectors: usize,
    /// Frames that it takes.
    frames: usize,
    /// Frames that are risked at the moment.
    max_out: usize,
    slow_start_to: usize,
    next_growth: usize,
    pub(super) out: usize,
    pub(super) probes_out: usize,
    pub(super) taint: u32,
    /// Our interfaces that reach it, and the frames lost by each.
    interfaces: Vec<(usize, usize)>,
    turn: usize,
}

impl Target {
    pub(super) fn new(mac: Mac, frames: usize, interface: usize, sectors: usize) -> Self {
        Self {
            mac,
            sectors,
            frames,
            // As the driver has it: a device that takes one frame at a time is never used.
            max_out: frames / 2,
            slow_start_to: frames / 2,
            next_growth: frames,
            out: 0,
            probes_out: 0,
            taint: 0,
            interfaces: vec![(interface, 0)],
            turn: 0,
        }
    }

    pub(super) fn set_window(&mut self, frames: usize) {
        self.frames = frames;
        if frames < self.max_out {
            self.reset_window();
        }
    }

    fn reset_window(&mut self) {
        self.max_out = 1;
        self.slow_start_to = self.frames / 2;
        self.next_growth = self.frames;
    }

    /// Nothing is under way to it any more.
    pub(super) fn reset(&mut self) {
        self.reset_window();
        self.out = 0;
        self.probes_out = 0;
        self.taint = 0;
    }

    pub(super) fn meet_interface(&mut self, interface: usize) {
        match self.interfaces.iter_mut().find(|(known, _)| *known == interface) {
            Some((_, lost)) => *lost = 0,
            None => self.interfaces.push((interface, 0)),
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.out < self.max_out
    }

    /// The next frame goes by the next interface.
    pub(super) fn rotate(&mut self) {
        self.turn = (self.turn + 1) % self.interfaces.len();
    }

    pub(super) fn interface(&self) -> usize {
        self.interfaces[self.turn].0
    }

    /// A frame by that interface had no answer: one that loses many is not used any more, if there is another.
    pub(super) fn lost_by(&mut self, interface: usize) {
        let Some(at) = self.interfaces.iter().position(|(known, _)| *known == interface) else { return };
        self.interfaces[at].1 += 1;
        if self.interfaces[at].1 > self.frames * 2 && self.interfaces.len() > 1 {
            self.interfaces.remove(at);
            self.turn %= self.interfaces.len();
        }
    }

    /// One frame at a time, after a loss.
    pub(super) fn collapse(&mut self) {
        if self.max_out != 1 {
            self.slow_start_to = self.max_out / 2;
            self.max_out = 1;
        }
    }

    fn grow(&mut self) {
        if self.max_out >= self.frames {
            return;
        }
        if self.max_out < self.slow_start_to {
            self.max_out += 1;
        } else if self.out == self.max_out {
            if self.next_growth == 0 {
                self.max_out += 1;
                self.next_growth = self.max_out;
            } else {
                self.next_growth -= 1;
            }
        }
    }

    /// Avoids it for longer with every silence.
    pub(super) fn scorn(&mut self) {
        self.taint = (self.taint + 1).saturating_mul(3).min(MAX_TAINT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_answer_may_take_sixteen_seconds_and_the_thousandth_no_time() {
        let mut round_trips = RoundTrips::new();
        assert_eq!(round_trips.timeout_ns(), 16_500_000_000);
        let mut after = Vec::new();
        for number in 1..=3000 {
            round_trips.measure(None, 100_000);
            if [10, 100, 500, 1000, 1500, 3000].contains(&number) {
                after.push(round_trips.timeout_ns() / 1_000_000);
            }
        }
        // As the driver's arithmetic was found to come out.
        assert!((5_000..7_000).contains(&after[0]), "{after:?}");
        assert!((1_500..2_000).contains(&after[1]) && (300..420).contains(&after[2]), "{after:?}");
        assert!((40..60).contains(&after[3]) && after[4] < 10 && after[5] < 1, "{after:?}");
    }

    #[test]
    fn a_window_collapses_and_grows_again() {
        let mut target = Target::new(Mac(1), 64, 0, 16);
        assert_eq!(target.max_out, 32);
        target.collapse();
        target.collapse();
        assert_eq!((target.max_out, target.slow_start_to), (1, 16));
        (0..15).for_each(|_| target.grow());
        assert_eq!(target.max_out, 16);
        (0..100).for_each(|_| target.grow());
        assert_eq!(target.max_out, 16, "it grows no further unless it is used");
        target.out = 16;
        (0..65).for_each(|_| target.grow());
        assert_eq!(target.max_out, 17);
        assert!(!Target::new(Mac(1), 1, 0, 16).has_room());
    }

    #[test]
    fn an_interface_that_loses_frames_is_left() {
        let mut target = Target::new(Mac(1), 4, 0, 16);
        (0..100).for_each(|_| target.lost_by(0));
        assert_eq!(target.interface(), 0, "the only one");
        target.meet_interface(1);
        target.meet_interface(0);
        (0..9).for_each(|_| target.lost_by(0));
        assert!((0..4).all(|_| {
            target.rotate();
            target.interface() == 1
        }));
    }
}
