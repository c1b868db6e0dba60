//! What the machine says of itself: time, CPU time of this thread and of its core, steal; and where a thread runs.

use std::fs;

use anyhow::Context;

use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, Timespec, clock_gettime};

/// Ticks of `/proc/stat` per second: `USER_HZ`, fixed by the kernel's interface.
const USER_HZ: u64 = 100;

fn nanoseconds(time: Timespec) -> u64 {
    let (seconds, rest) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    seconds.unwrap_or(0) * 1_000_000_000 + rest.unwrap_or(0)
}

/// The monotonic clock in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::Monotonic))
}

/// CPU time of this thread, user and system, in nanoseconds. Soft interrupts on its core are not in it.
pub(crate) fn thread_cpu_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::ThreadCPUTime))
}

/// CPU time of this process, user and system, the kernel's own threads for its io_uring among it, in nanoseconds.
pub(crate) fn process_cpu_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::ProcessCPUTime))
}

/// Bytes of this process that are in memory; 0 where `/proc` does not tell.
pub(crate) fn resident_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: Option<u64> =
        line.and_then(|line| line.split_whitespace().next()).and_then(|word| word.parse().ok());
    kib.unwrap_or(0) << 10
}

/// Keeps this thread on one core.
pub(crate) fn pin(core: u16) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    anyhow::ensure!(usize::from(core) < CpuSet::MAX_CPU, "core {core} does not exist");
    set.set(usize::from(core));
    sched_setaffinity(None, &set).with_context(|| format!("cannot run on core {core}: see nproc"))
}

/// The counters of one `cpu` line of `/proc/stat`, in ticks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CoreTicks {
    /// User, system, interrupts and soft interrupts.
    pub(crate) busy: u64,
    /// Time that the hypervisor gave to others.
    pub(crate) steal: u64,
    /// Everything.
    pub(crate) total: u64,
}

impl CoreTicks {
    /// The counters of one core, or of all with `None`; zeros where `/proc/stat` does not have them.
    pub(crate) fn read(core: Option<u16>) -> CoreTicks {
        let text = fs::read_to_string("/proc/stat").unwrap_or_default();
        CoreTicks::parse(&text, core).unwrap_or_default()
    }

    fn parse(text: &str, core: Option<u16>) -> Option<CoreTicks> {
        let label = core.map_or("cpu".to_owned(), |core| format!("cpu{core}"));
        let line = text.lines().find(|line| line.split_whitespace().next() == Some(label.as_str()))?;
        // user nice system idle iowait irq softirq steal; what follows is contained in user.
        let mut ticks = [0u64; 8];
        for (slot, word) in ticks.iter_mut().zip(line.split_whitespace().skip(1)) {
            *slot = word.parse().ok()?;
        }
        let [user, nice, system, _, _, irq, softirq, steal] = ticks;
        let busy = user + nice + system + irq + softirq;
        Some(CoreTicks { busy, steal, total: ticks.iter().sum() })
    }

    /// What passed since `earlier`.
    pub(crate) fn since(self, earlier: CoreTicks) -> CoreTicks {
        CoreTicks {
            busy: self.busy.saturating_sub(earlier.busy),
            steal: self.steal.saturating_sub(earlier.steal),
            total: self.total.saturating_sub(earlier.total),
        }
    }

    /// Steal as a part of all time, in percent.
    pub(crate) fn steal_percent(self) -> f64 {
        if self.total == 0 { 0.0 } else { 100.0 * self.steal as f64 / self.total as f64 }
    }

    /// Busy time in nanoseconds, with the resolution of a tick (10 ms).
    pub(crate) fn busy_ns(self) -> u64 {
        self.busy * (1_000_000_000 / USER_HZ)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_proc_stat_are_read() {
        let text =
            "cpu  10 1 5 100 7 1 3 9 0 0\ncpu0 4 0 2 50 3 0 1 4 0 0\ncpu1 6 1 3 50 4 1 2 5 0 0\nintr 5\n";
        let all = CoreTicks::parse(text, None).unwrap();
        assert_eq!(all, CoreTicks { busy: 20, steal: 9, total: 136 });
        assert_eq!(CoreTicks::parse(text, Some(1)).unwrap().busy, 13);
        assert_eq!(CoreTicks::parse(text, Some(2)), None);
        assert_eq!(CoreTicks::parse("cpu x", None), None);
    }

    #[test]
    fn the_clocks_advance() {
        let (wall, cpu) = (now_ns(), thread_cpu_ns());
        while thread_cpu_ns() < cpu + 1_000_000 {}
        assert!(now_ns() >= wall + 900_000);
        assert!(CoreTicks::read(None).total > 0);
    }
}
