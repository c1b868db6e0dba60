//! When leases end: deadlines on a clock that the caller reads, so that tests run it without waiting.

use std::collections::{BTreeMap, BTreeSet};

use super::LeaseId;

/// Deadlines of the leases that are alive, in milliseconds of the caller's monotonic clock.
#[derive(Debug, Default)]
pub(super) struct LeaseClock {
    leases: BTreeMap<LeaseId, Timed>,
    by_deadline: BTreeSet<(u64, LeaseId)>,
}

#[derive(Clone, Copy, Debug)]
struct Timed {
    ttl_ms: u64,
    deadline_ms: u64,
}

impl LeaseClock {
    /// Starts a lease's time.
    pub(super) fn start(&mut self, lease: LeaseId, ttl_ms: u64, now_ms: u64) {
        self.stop(lease);
        let deadline_ms = now_ms.saturating_add(ttl_ms);
        self.leases.insert(lease, Timed { ttl_ms, deadline_ms });
        self.by_deadline.insert((deadline_ms, lease));
    }

    /// Starts a lease's time again; the time it has now, or `None` if there is no such lease.
    pub(super) fn renew(&mut self, lease: LeaseId, now_ms: u64) -> Option<u64> {
        let ttl_ms = self.leases.get(&lease)?.ttl_ms;
        self.start(lease, ttl_ms, now_ms);
        Some(ttl_ms)
    }

    pub(super) fn stop(&mut self, lease: LeaseId) {
        if let Some(timed) = self.leases.remove(&lease) {
            self.by_deadline.remove(&(timed.deadline_ms, lease));
        }
    }

    /// The lease that ends first, and when.
    pub(super) fn first(&self) -> Option<(u64, LeaseId)> {
        self.by_deadline.first().copied()
    }

    /// The leases that are over and not stopped yet, in the order of their deadlines.
    pub(super) fn expired(&self, now_ms: u64) -> Vec<LeaseId> {
        let over = self.by_deadline.iter().take_while(|(deadline_ms, _)| *deadline_ms <= now_ms);
        over.map(|(_, lease)| *lease).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_end_in_order_of_their_deadlines() {
        let mut clock = LeaseClock::default();
        clock.start(LeaseId(1), 100, 0);
        clock.start(LeaseId(2), 50, 0);
        assert_eq!(clock.first(), Some((50, LeaseId(2))));
        assert_eq!(clock.expired(49), []);
        assert_eq!(clock.renew(LeaseId(2), 49), Some(50));
        assert_eq!(clock.expired(98), []);
        assert_eq!(clock.expired(99), [LeaseId(2)]);
        clock.stop(LeaseId(2));
        assert_eq!(clock.renew(LeaseId(2), 99), None);
        assert_eq!(clock.expired(100), [LeaseId(1)]);
    }
}
