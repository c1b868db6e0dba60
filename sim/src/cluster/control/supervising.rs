//! What starts the data plane, and numbers its starts: durably, and in the map, before each.

use super::super::World;
use super::super::manager::WAKES_NS;

/// How long it waits before another start, at first and at most.
const BACKOFF_NS: (u64, u64) = (50_000_000, 2_000_000_000);
/// After so long a data plane counts as healthy.
const HEALTHY_NS: u64 = 10_000_000_000;
/// What a program takes to begin.
const LAUNCH_NS: std::ops::Range<u64> = 5_000_000..60_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// One ran when it was last looked at, since then.
    Runs { since_ns: u64 },
    /// None is started before.
    Rests { until_ns: u64 },
    /// The number of the next start is to stand in the map.
    Numbered(u64),
    /// It is being started.
    Starts { at_ns: u64 },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Supervisor {
    phase: Phase,
    backoff_ns: u64,
    /// One is to run: else one that runs is only watched.
    pub(super) is_wished: bool,
}

impl Default for Supervisor {
    fn default() -> Supervisor {
        Supervisor { phase: Phase::Rests { until_ns: 0 }, backoff_ns: BACKOFF_NS.0, is_wished: false }
    }
}

impl Supervisor {
    /// The number that the map is to have.
    pub(super) fn wanted(&self) -> u64 {
        if let Phase::Numbered(number) = self.phase { number } else { 0 }
    }
}

impl World {
    /// Starts the data plane, as far as that is due; when it is to be looked at again.
    pub(super) fn supervise(&mut self, node: usize) -> u64 {
        let now_ns = self.now_ns();
        let at = &mut self.nodes[node];
        let (is_up, is_held) = (at.is_up(), at.is_held);
        let Some(control) = &mut at.control else { return u64::MAX };
        let supervisor = &mut control.supervisor;
        match supervisor.phase {
            Phase::Runs { .. } if is_up => return u64::MAX,
            _ if is_up => {
                supervisor.phase = Phase::Runs { since_ns: now_ns };
                return u64::MAX;
            }
            Phase::Runs { since_ns } => {
                if now_ns.saturating_sub(since_ns) > HEALTHY_NS {
                    supervisor.backoff_ns = BACKOFF_NS.0;
                }
                supervisor.phase = Phase::Rests { until_ns: now_ns + supervisor.backoff_ns };
                supervisor.backoff_ns = (supervisor.backoff_ns * 2).min(BACKOFF_NS.1);
            }
            Phase::Rests { .. } | Phase::Numbered(_) | Phase::Starts { .. } => {}
        }
        if is_held {
            return u64::MAX;
        }
        match supervisor.phase {
            Phase::Rests { until_ns } if now_ns < until_ns => return until_ns,
            Phase::Rests { .. } if supervisor.is_wished => {
                at.start = at.start.max(at.map.desired.start) + 1;
                supervisor.phase = Phase::Numbered(at.start);
                control.look_ns = now_ns;
            }
            Phase::Numbered(number) if at.map.desired.start >= number => {
                let at_ns = now_ns + at.random.range(LAUNCH_NS);
                supervisor.phase = Phase::Starts { at_ns };
                return at_ns;
            }
            Phase::Starts { at_ns } if now_ns < at_ns => return at_ns,
            Phase::Starts { .. } => {
                supervisor.phase = Phase::Runs { since_ns: now_ns };
                self.boot(node);
                self.look_by(node, now_ns);
            }
            Phase::Rests { .. } | Phase::Numbered(_) | Phase::Runs { .. } => {}
        }
        u64::MAX
    }

    /// The data plane has ended, or may start: its supervisor finds out.
    pub(in super::super) fn wake_supervisor(&mut self, node: usize) {
        let at_ns = self.now_ns() + self.nodes[node].random.range(WAKES_NS);
        self.look_by(node, at_ns);
    }
}
