//! Many seeds of one test: as many as it wants, or as the environment says.
//!
//! | variable | meaning |
//! |---|---|
//! | `TORUS_SIM_SEED` | this seed only, twice, and the two must be the same |
//! | `TORUS_SIM_FROM` | the first seed |
//! | `TORUS_SIM_SEEDS` | how many |
//! | `TORUS_SIM_MINUTES` | on and on for so long, whatever their number |
//!
//! The clock of the machine is read between seeds only.

use std::fmt;
use std::time::{Duration, Instant};

/// What a seed came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// How much time passed in it.
    pub simulated_ns: u64,
    /// Events that it had.
    pub events: u64,
    /// What two runs of the seed must have in common.
    pub digest: u64,
}

/// What many seeds came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Explored {
    /// Seeds that were run, repetitions not counted.
    pub seeds: u64,
    /// Of all of them.
    pub simulated_ns: u64,
    /// Of all of them.
    pub events: u64,
    /// The machine's time for it.
    pub took: Duration,
}

impl fmt::Display for Explored {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.took.as_secs_f64().max(1e-9);
        write!(
            f,
            "{} seeds in {seconds:.1} s ({:.0} a second), {:.2} simulated hours, {:.1} million events",
            self.seeds,
            self.seeds as f64 / seconds,
            self.simulated_ns as f64 / 3.6e12,
            self.events as f64 / 1e6,
        )
    }
}

/// A seed that shows something wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// Which.
    pub seed: u64,
    /// How many were right before it.
    pub after: u64,
    /// What is wrong, and the events around it.
    pub report: String,
    /// How to see it again.
    pub repeat: String,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, after, report, repeat } = self;
        write!(f, "seed {seed}, after {after} that were right:\n{report}\nrepeat it with: {repeat}")
    }
}

impl std::error::Error for Failed {}

/// Which seeds to run.
#[derive(Clone, Debug)]
pub struct Exploration {
    command: String,
    first: u64,
    seeds: u64,
    least: Duration,
    /// One in so many seeds is run twice, to see that it is the same.
    twice_one_in: u64,
}

impl Exploration {
    /// So many seeds from 1 on, of the test that this command runs: `cargo test -p torus-sim --test cluster name`.
    #[must_use]
    pub fn new(command: impl Into<String>, seeds: u64) -> Self {
        Self { command: command.into(), first: 1, seeds, least: Duration::ZERO, twice_one_in: 64 }
    }

    /// The same, unless the environment says otherwise.
    #[must_use]
    pub fn from_environment(command: impl Into<String>, seeds: u64) -> Self {
        Self::new(command, seeds).unless_told_otherwise()
    }

    /// One of several parts that have so many seeds each; 0 is the first. What the environment says it says to the first one: the
    /// others have nothing to do then.
    #[must_use]
    pub fn part_from_environment(command: impl Into<String>, seeds: u64, part: u64) -> Self {
        let mut all = Self::new(command, seeds);
        let told = all.clone().unless_told_otherwise();
        if told.seeds != seeds || told.first != all.first || told.least > Duration::ZERO {
            return if part == 0 { told } else { Self { seeds: 0, least: Duration::ZERO, ..all } };
        }
        all.first += part * seeds;
        all
    }

    fn unless_told_otherwise(self) -> Self {
        self.overridden(|name| std::env::var(name).ok()?.trim().parse().ok())
    }

    fn overridden(mut self, number: impl Fn(&str) -> Option<u64>) -> Self {
        if let Some(seed) = number("TORUS_SIM_SEED") {
            return Self { first: seed, seeds: 1, twice_one_in: 1, ..self };
        }
        self.first = number("TORUS_SIM_FROM").unwrap_or(self.first);
        self.seeds = number("TORUS_SIM_SEEDS").unwrap_or(self.seeds);
        if let Some(minutes) = number("TORUS_SIM_MINUTES") {
            self.least = Duration::from_secs(minutes * 60);
        }
        self
    }

    /// Runs the seeds, and prints what they came to.
    ///
    /// # Errors
    /// The first seed that shows something wrong, or that does not repeat itself.
    pub fn run(&self, mut seed: impl FnMut(u64) -> Result<Ran, String>) -> Result<Explored, Failed> {
        let begun = Instant::now();
        let mut explored = Explored::default();
        while explored.seeds < self.seeds || explored.took < self.least {
            let number = self.first.wrapping_add(explored.seeds);
            let repeat = Repeat { command: &self.command, seed: number };
            let fail = |report: String| Failed {
                seed: number,
                after: explored.seeds,
                report,
                repeat: repeat.to_string(),
            };
            let ran = seed(number).map_err(fail)?;
            if self.twice_one_in > 0 && explored.seeds.is_multiple_of(self.twice_one_in) {
                let again = seed(number).map_err(fail)?;
                if again != ran {
                    return Err(fail(format!("it does not repeat itself: {ran:?}, and then {again:?}")));
                }
            }
            explored.seeds += 1;
            explored.simulated_ns += ran.simulated_ns;
            explored.events += ran.events;
            explored.took = begun.elapsed();
        }
        println!("{explored}");
        Ok(explored)
    }
}

/// Says how to repeat a seed, also where it panics.
struct Repeat<'a> {
    command: &'a str,
    seed: u64,
}

impl fmt::Display for Repeat<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TORUS_SIM_SEED={} {} -- --nocapture", self.seed, self.command)
    }
}

impl Drop for Repeat<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("repeat it with: {self}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(digest: u64) -> Ran {
        Ran { simulated_ns: 1_800_000_000_000, events: 10, digest }
    }

    #[test]
    fn runs_so_many_seeds_and_adds_up() {
        let mut seen = Vec::new();
        let explored = Exploration::new("test", 3)
            .run(|seed| {
                seen.push(seed);
                Ok(ran(seed))
            })
            .unwrap();
        assert_eq!(seen, [1, 1, 2, 3], "the first one twice");
        assert_eq!((explored.seeds, explored.events), (3, 30));
        assert!(
            explored.to_string().contains("3 seeds") && explored.to_string().contains("1.50 simulated hours")
        );
    }

    #[test]
    fn stops_at_a_violation_and_says_how_to_repeat_it() {
        let run = |seed: u64| if seed == 5 { Err("wrong".to_owned()) } else { Ok(ran(seed)) };
        let failed = Exploration::new("cargo test x", 10).run(run).unwrap_err();
        assert_eq!((failed.seed, failed.after), (5, 4));
        assert!(failed.to_string().ends_with("repeat it with: TORUS_SIM_SEED=5 cargo test x -- --nocapture"));
    }

    #[test]
    fn a_seed_that_does_not_repeat_itself_is_a_failure() {
        let mut count = 0;
        let run = |_| {
            count += 1;
            Ok(ran(count))
        };
        assert!(Exploration::new("", 1).run(run).unwrap_err().report.contains("does not repeat itself"));
    }

    #[test]
    fn the_environment_has_the_last_word() {
        let with = |name: &'static str, value: u64| {
            Exploration::new("", 7).overridden(move |asked| (asked == name).then_some(value))
        };
        let seed = with("TORUS_SIM_SEED", 99);
        assert_eq!((seed.first, seed.seeds, seed.twice_one_in), (99, 1, 1));
        assert_eq!(with("TORUS_SIM_FROM", 50).first, 50);
        assert_eq!(with("TORUS_SIM_SEEDS", 70).seeds, 70);
        assert_eq!(with("TORUS_SIM_MINUTES", 2).least, Duration::from_secs(120));
    }
}
