//! An idle core: every source of work is armed, then it sleeps; and the kernel's counters are read once in a while.

use std::time::Duration;

use cluster_map::{Counter, LinkLosses};

use super::{DOORBELL, Reactor, SPIN_NS_MIN, now_ns};

/// Longest spin before a sleep: about what a sleep and a wake-up cost together.
const SPIN_NS_MAX: u64 = 50_000;
/// Longest sleep: only for the counters that are read from the kernel.
const SLEEP: Duration = Duration::from_millis(500);
/// Sleep while discovery has more to send: two milliseconds of its pace are less than its burst.
const SLEEP_DISCOVERING: Duration = Duration::from_millis(2);
/// Sleep while memory is short: chunks that the kernel is done with are found by looking.
const SLEEP_SHORT: Duration = Duration::from_millis(1);

impl Reactor {
    pub(super) fn sleep(&mut self) -> std::io::Result<()> {
        // Frames that a dead link holds are no reason to stay awake.
        if self.unsent {
            return Ok(());
        }
        let queues = self.queues.iter_mut().map(|own| (&mut own.armed, own.queue.poll_fd()));
        let lanes = self.lanes.iter_mut().map(|own| (&mut own.armed, own.lane.poll_fd()));
        for (at, (armed, fd)) in (0u32..).zip(queues.chain(lanes)) {
            if !std::mem::replace(armed, true) {
                self.ring.poll(fd, at);
            }
        }
        let mailbox = &self.mailboxes[usize::from(self.core)];
        if !self.doorbell_armed {
            self.doorbell_armed = true;
            self.ring.poll(mailbox.doorbell(), DOORBELL);
        }
        let may_sleep = mailbox.begin_sleep()
            && !self.queues.iter().any(|own| own.queue.has_rx())
            && !self.lanes.iter().any(|own| own.lane.has_rx());
        if may_sleep {
            let short = self.pool.free_chunks() < self.pool.chunk_capacity() / 16;
            self.stats.add(Counter::Sleeps, 1);
            let before_ns = now_ns();
            let longest = match (short, self.is_discovering()) {
                (true, _) => SLEEP_SHORT,
                (false, true) => SLEEP_DISCOVERING,
                (false, false) => SLEEP,
            };
            let due_ns = self.serving.stores_due_ns().min(self.replication_due_ns());
            let due_ns = due_ns.saturating_sub(before_ns);
            self.ring.submit_and_wait(longest.min(Duration::from_nanos(due_ns)))?;
            self.stats.add(Counter::Wakeups, 1);
            self.adapt_spin(now_ns().saturating_sub(before_ns));
        }
        self.mailboxes[usize::from(self.core)].end_sleep();
        Ok(())
    }

    /// Spins longer when sleeps turn out short, and hardly at all when there is nothing to do.
    pub(super) fn adapt_spin(&mut self, slept_ns: u64) {
        self.spin_ns = if slept_ns < 2 * SPIN_NS_MAX {
            (self.spin_ns * 2).min(SPIN_NS_MAX)
        } else {
            (self.spin_ns / 2).max(SPIN_NS_MIN)
        };
    }

    pub(super) fn read_link_stats(&mut self) {
        self.stats_read_ns = self.now_ns;
        let queues = self.queues.iter_mut().map(|own| (own.queue.stats(), &mut own.seen, &own.losses));
        let lanes = self.lanes.iter_mut().map(|own| (own.lane.stats(), &mut own.seen, &own.losses));
        for (now, seen, losses) in queues.chain(lanes) {
            let seen = std::mem::replace(seen, now);
            self.stats.add(Counter::RxDropped, now.rx_dropped.saturating_sub(seen.rx_dropped));
            self.stats.add(Counter::RxInvalid, now.rx_invalid.saturating_sub(seen.rx_invalid));
            losses.store(LinkLosses {
                rx_dropped: now.rx_dropped,
                rx_ring_full: now.rx_ring_full,
                rx_fill_empty: now.rx_fill_empty,
                rx_invalid: now.rx_invalid,
                tx_ring_full: now.tx_ring_full,
                tx_dropped: now.tx_dropped,
            });
        }
        let copied = self.pool.bytes_copied();
        self.stats.add(Counter::BytesCopied, copied - std::mem::replace(&mut self.bytes_copied_seen, copied));
    }
}
