//! What has to come to an end: every operation, and every repair, within a bounded time after the last fault was healed.
//!
//! While anything is broken nothing is demanded. From the moment that all is healed, whatever is awaited, begun before or
//! after, has its limit.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

/// Something took too long.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}, begun at {} us, is not over at {} us; all was healed at {} us", .begun_ns / 1000, .now_ns / 1000, .healed_ns / 1000)]
pub struct Overdue {
    /// What was awaited.
    pub what: String,
    /// When it began.
    pub begun_ns: u64,
    /// When the last fault was healed.
    pub healed_ns: u64,
    /// When it was found to be overdue.
    pub now_ns: u64,
}

#[derive(Clone, Copy, Debug)]
struct Awaited {
    begun_ns: u64,
    limit_ns: u64,
}

impl Awaited {
    fn due_ns(self, healed_ns: u64) -> u64 {
        self.begun_ns.max(healed_ns).saturating_add(self.limit_ns)
    }
}

/// Keeps what is awaited. See the module.
#[derive(Clone, Debug)]
pub struct Watchdog<K> {
    limit_ns: u64,
    /// `None` while something is broken.
    healed_ns: Option<u64>,
    awaited: BTreeMap<K, Awaited>,
    /// When each is due; empty while something is broken.
    due: BTreeSet<(u64, K)>,
}

impl<K: Ord + Clone + Debug> Watchdog<K> {
    /// Everything is whole; what is awaited may take so long, unless it has a limit of its own.
    #[must_use]
    pub fn new(limit_ns: u64) -> Self {
        Self { limit_ns, healed_ns: Some(0), awaited: BTreeMap::new(), due: BTreeSet::new() }
    }

    /// Something begins that has to end.
    pub fn begin(&mut self, now_ns: u64, what: K) {
        self.begin_within(now_ns, what, self.limit_ns);
    }

    /// Something begins that has to end within a time of its own.
    pub fn begin_within(&mut self, now_ns: u64, what: K, limit_ns: u64) {
        self.end(&what);
        let awaited = Awaited { begun_ns: now_ns, limit_ns };
        if let Some(healed_ns) = self.healed_ns {
            self.due.insert((awaited.due_ns(healed_ns), what.clone()));
        }
        self.awaited.insert(what, awaited);
    }

    /// It has ended, well or not.
    pub fn end(&mut self, what: &K) {
        let Some(awaited) = self.awaited.remove(what) else { return };
        if let Some(healed_ns) = self.healed_ns {
            self.due.remove(&(awaited.due_ns(healed_ns), what.clone()));
        }
    }

    /// How many things are awaited.
    #[must_use]
    pub fn awaited(&self) -> usize {
        self.awaited.len()
    }

    /// Something is broken from now on: nothing is demanded.
    pub fn broken(&mut self) {
        self.healed_ns = None;
        self.due.clear();
    }

    /// All is whole from now on.
    pub fn healed(&mut self, now_ns: u64) {
        if self.healed_ns.is_none() {
            self.healed_ns = Some(now_ns);
            self.due = self.awaited.iter().map(|(what, held)| (held.due_ns(now_ns), what.clone())).collect();
        }
    }

    /// The last moment at which nothing is overdue yet, if nothing ends before.
    #[must_use]
    pub fn due_ns(&self) -> Option<u64> {
        self.due.first().map(|(due_ns, _)| *due_ns)
    }

    /// Whether everything is in time.
    ///
    /// # Errors
    /// What has been overdue for longest.
    pub fn check(&self, now_ns: u64) -> Result<(), Overdue> {
        let (Some((due_ns, what)), Some(healed_ns)) = (self.due.first(), self.healed_ns) else {
            return Ok(());
        };
        if *due_ns >= now_ns {
            return Ok(());
        }
        let begun_ns = self.awaited.get(what).map_or(0, |held| held.begun_ns);
        Err(Overdue { what: format!("{what:?}"), begun_ns, healed_ns, now_ns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_end_is_overdue() {
        let mut watchdog = Watchdog::new(100);
        watchdog.begin(10, "a");
        watchdog.begin(20, "b");
        watchdog.end(&"a");
        assert_eq!((watchdog.due_ns(), watchdog.check(120)), (Some(120), Ok(())));
        let overdue = watchdog.check(121).unwrap_err();
        assert_eq!((overdue.what.as_str(), overdue.begun_ns), ("\"b\"", 20));
    }

    #[test]
    fn nothing_is_demanded_while_something_is_broken() {
        let mut watchdog = Watchdog::new(100);
        watchdog.begin(10, 1);
        watchdog.broken();
        watchdog.begin_within(20, 2, 30);
        assert_eq!((watchdog.due_ns(), watchdog.check(10_000)), (None, Ok(())));
        watchdog.healed(10_000);
        watchdog.healed(20_000);
        assert_eq!(watchdog.due_ns(), Some(10_030));
        assert_eq!(watchdog.check(10_031).unwrap_err().what, "2");
        watchdog.end(&2);
        assert_eq!(watchdog.check(10_100), Ok(()));
        assert_eq!(watchdog.check(10_101).unwrap_err().healed_ns, 10_000);
        watchdog.end(&1);
        assert_eq!((watchdog.awaited(), watchdog.due_ns()), (0, None));
    }

    #[test]
    fn what_begins_again_has_its_time_again() {
        let mut watchdog = Watchdog::new(100);
        watchdog.begin(0, 1);
        watchdog.begin(50, 1);
        assert_eq!((watchdog.due_ns(), watchdog.awaited()), (Some(150), 1));
    }
}
