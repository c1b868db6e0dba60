//! An initiator that behaves as Linux's `aoe` driver does with one device.
//!
//! What of the driver a target can notice is here, with its arithmetic: a window of frames for each target address, which
//! collapses to one at every retransmission and grows again; a time for retransmission out of measured round trips, looked
//! at ten times a second and so short in the end that spurious ones are routine; a *new* tag for each, while the old copy may
//! still be under way and its answer, when it comes, only feeds the measurement; the address of a frame stays the same
//! until its target was silent for 10 s, whatever else is advertised meanwhile; several interfaces and several addresses
//! take turns, so that consecutive frames of one request take different ways. It never asks for a flush. A frame may come
//! late over one way after a later write was acknowledged over another: I6 is about exactly this.
//!
//! Left out: the size is known from the beginning, so there is no IDENTIFY; requests are not merged; a device that was given
//! up after [`Setup::dead_ns`] comes back with the next answer to a query, as if it had been closed and opened.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use crate::checker::history::{Action, OpId, Outcome};
use crate::network::Mac;
use crate::random::Random;

mod congestion;
mod workload;

use congestion::{RoundTrips, Target};
pub use workload::Load;

/// Shelf and slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Major address.
    pub shelf: u16,
    /// Minor address.
    pub slot: u8,
}

impl Address {
    /// All devices: for queries.
    pub const ALL: Address = Address { shelf: 0xffff, slot: 0xff };
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "e{}.{}", self.shelf, self.slot)
    }
}

/// What an answer repeats of its request. Linux makes it of 16 bits of its tick counter and 15 of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u32);

/// What a frame asks. A sector is stood for by one number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Query Config.
    Query,
    /// A read.
    Read {
        /// First sector.
        lba: u64,
        /// Sectors.
        count: usize,
    },
    /// A write.
    Write {
        /// First sector.
        lba: u64,
        /// What each sector is to hold.
        values: Arc<[u64]>,
    },
}

/// A frame to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Whom it is for.
    pub address: Address,
    /// Its own, also if it repeats another.
    pub tag: Tag,
    /// What it asks.
    pub command: Command,
}

/// What a frame from a target says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To a query, or of the target's own accord with tag 0.
    Config {
        /// Frames that it takes in at a time.
        buffers: u16,
        /// Most sectors of a frame.
        sectors: u8,
    },
    /// To a read.
    Read(Arc<[u64]>),
    /// To a write.
    Written,
    /// An ATA error.
    Failed,
}

/// A frame from a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Whose.
    pub address: Address,
    /// The request's.
    pub tag: Tag,
    /// What it says.
    pub answer: Answer,
}

/// What an initiator does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// It sends a frame.
    Transmit {
        /// By which of its interfaces.
        interface: usize,
        /// To whom.
        destination: Mac,
        /// What.
        request: Request,
    },
    /// An operation begins: before anything of it is sent.
    Begun {
        /// Which.
        op: OpId,
        /// Its first sector.
        lba: u64,
        /// What it does.
        action: Action,
    },
    /// An operation is over.
    Ended {
        /// Which.
        op: OpId,
        /// How it ended.
        outcome: Outcome,
    },
}

/// What of an initiator does not change.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Tells its operations and values from those of others; below 2^16.
    pub number: u64,
    /// Its device.
    pub address: Address,
    /// The device's size.
    pub sectors: u64,
    /// Its interfaces.
    pub interfaces: usize,
    /// Most sectors that a frame of its interfaces has room for.
    pub frame_sectors: usize,
    /// Most frames under way to one address (`aoe_maxout`).
    pub window: usize,
    /// Ticks of its kernel in a second.
    pub ticks_per_second: u64,
    /// After so long without an answer to a request the device is given up (`aoe_deadsecs`).
    pub dead_ns: u64,
    /// How often it looks for devices.
    pub discover_ns: u64,
}

impl Setup {
    /// A stock Linux with jumbo frames.
    #[must_use]
    pub fn new(number: u64, address: Address, sectors: u64, interfaces: usize) -> Self {
        Self {
            number,
            address,
            sectors,
            interfaces: interfaces.max(1),
            frame_sectors: 16,
            window: 64,
            ticks_per_second: 250,
            dead_ns: 180_000_000_000,
            discover_ns: 60_000_000_000,
        }
    }
}

/// What an initiator has met so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Operations that ended well.
    pub done: u64,
    /// Operations that ended with an error.
    pub failed: u64,
    /// Frames of reads and writes, repeated ones included.
    pub frames: u64,
    /// Frames that repeat another.
    pub repeated: u64,
    /// Answers to a copy that was given up before.
    pub unexpected: u64,
    /// Frames that were given to another address.
    pub reassigned: u64,
    /// Times that the device was given up.
    pub deaths: u64,
}

/// How often frames are looked at for retransmission.
const LOOK_NS: u64 = 100_000_000;
/// A target that was silent for longer is avoided.
const HARD_SCORN_NS: u64 = 10_000_000_000;

#[derive(Clone, Debug)]
struct Frame {
    tag: Tag,
    /// What it is a part of; a probe is of nothing.
    op: Option<OpId>,
    command: Command,
    target: usize,
    interface: usize,
    sent_ns: u64,
    /// Time in vain, at this target, up to the last time it was sent.
    waited_ns: u64,
    waited_total_ns: u64,
}

impl Frame {
    fn is_probe(&self) -> bool {
        self.op.is_none()
    }
}

#[derive(Clone, Debug)]
struct Op {
    lba: u64,
    action: Action,
    /// What was read so far.
    read: Vec<u64>,
    sectors: usize,
    /// Sectors that were put into frames.
    cut: usize,
    frames_out: usize,
    failed: bool,
}

/// The driver's device. See the module.
#[derive(Clone, Debug)]
pub struct Initiator {
    setup: Setup,
    now_ns: u64,
    targets: Vec<Target>,
    /// The target that was used last.
    last_target: usize,
    /// Most sectors of a frame, by all targets and interfaces.
    frame_sectors: usize,
    round_trips: RoundTrips,
    last_tag: u32,
    active: BTreeMap<Tag, Frame>,
    /// Frames to be sent again when there is room in a window. They still answer to their old tags.
    deferred: VecDeque<Frame>,
    ops: BTreeMap<OpId, Op>,
    /// Operations of which something is still to be sent.
    queue: VecDeque<OpId>,
    last_op: u64,
    last_value: u64,
    dead: bool,
    look_ns: u64,
    discover_ns: u64,
    load: Option<Load>,
    next_op_ns: u64,
    random: Random,
    outputs: VecDeque<Output>,
    counters: Counters,
}

impl Initiator {
    /// A driver that was just loaded.
    #[must_use]
    pub fn new(now_ns: u64, setup: Setup, mut random: Random) -> Self {
        let frame_sectors = setup.frame_sectors;
        Self {
            setup,
            now_ns,
            targets: Vec::new(),
            last_target: 0,
            frame_sectors,
            round_trips: RoundTrips::new(),
            last_tag: 0,
            active: BTreeMap::new(),
            deferred: VecDeque::new(),
            ops: BTreeMap::new(),
            queue: VecDeque::new(),
            last_op: 0,
            last_value: 0,
            dead: false,
            // The timers of different machines are not in step.
            look_ns: now_ns + random.range(1..LOOK_NS),
            discover_ns: now_ns,
            load: None,
            next_op_ns: now_ns,
            random,
            outputs: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// What it has met so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether no operation is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.ops.is_empty()
    }

    /// Whether it has found its device.
    #[must_use]
    pub fn is_up(&self) -> bool {
        !self.targets.is_empty() && !self.dead
    }

    /// Whether the operation is this initiator's.
    #[must_use]
    pub fn owns(&self, op: OpId) -> bool {
        op.0 >> 40 == self.setup.number
    }

    /// Makes operations of its own from now on, or no more.
    pub fn set_load(&mut self, now_ns: u64, load: Option<Load>) {
        self.load = load;
        self.next_op_ns = now_ns;
    }

    /// What it does next, if anything is to be done.
    pub fn pop(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Self::advance`] has something to do.
    #[must_use]
    pub fn next_ns(&self) -> u64 {
        let mut next_ns = self.discover_ns;
        if !self.active.is_empty() || !self.deferred.is_empty() {
            next_ns = next_ns.min(self.look_ns);
        }
        if self.is_up() && self.load.as_ref().is_some_and(|load| self.ops.len() < load.depth) {
            next_ns = next_ns.min(self.next_op_ns);
        }
        next_ns
    }

    /// Time has passed.
    pub fn advance(&mut self, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
        if self.discover_ns <= self.now_ns {
            self.discover_ns = self.now_ns + self.setup.discover_ns;
            self.discover();
        }
        if self.look_ns <= self.now_ns {
            self.look();
            let passed = (self.now_ns - self.look_ns) / LOOK_NS + 1;
            self.look_ns += passed * LOOK_NS;
        }
        self.make_ops();
        self.work();
    }

    /// Asks for devices on all interfaces, as `aoe-discover` does.
    pub fn discover(&mut self) {
        for interface in 0..self.setup.interfaces {
            let request = Request { address: Address::ALL, tag: Tag(0), command: Command::Query };
            let destination = Mac::BROADCAST;
            self.outputs.push_back(Output::Transmit { interface, destination, request });
        }
    }

    /// Begins an operation.
    ///
    /// # Panics
    /// If it is of nothing, or reaches beyond the device.
    pub fn submit(&mut self, now_ns: u64, lba: u64, action: Action) -> OpId {
        self.now_ns = self.now_ns.max(now_ns);
        let sectors = match &action {
            Action::Read(count) => *count,
            Action::Write(values) => values.len(),
        };
        assert!(sectors > 0 && lba + sectors as u64 <= self.setup.sectors, "an operation on the device");
        self.last_op += 1;
        let op = OpId(self.setup.number << 40 | self.last_op);
        self.outputs.push_back(Output::Begun { op, lba, action: action.clone() });
        if !self.is_up() {
            self.counters.failed += 1;
            self.outputs.push_back(Output::Ended { op, outcome: Outcome::Failed });
            return op;
        }
        let read = if let Action::Read(count) = &action { vec![0; *count] } else { Vec::new() };
        self.ops.insert(op, Op { lba, action, read, sectors, cut: 0, frames_out: 0, failed: false });
        self.queue.push_back(op);
        self.work();
        op
    }

    /// Begins a write of that many sectors with values that were never used.
    pub fn submit_write(&mut self, now_ns: u64, lba: u64, count: usize) -> OpId {
        let first = self.setup.number << 40 | self.last_value;
        self.last_value += count as u64;
        self.submit(now_ns, lba, Action::Write((first + 1..).take(count).collect()))
    }

    /// Begins to read the whole device: after all was healed, to see what is left of it.
    pub fn submit_sweep(&mut self, now_ns: u64, sectors_at_once: usize) {
        let mut lba = 0;
        while lba < self.setup.sectors {
            let count = sectors_at_once.min(usize::try_from(self.setup.sectors - lba).unwrap_or(usize::MAX));
            self.submit(now_ns, lba, Action::Read(count));
            lba += count as u64;
        }
    }

    /// A frame has come by an interface.
    pub fn receive(&mut self, now_ns: u64, interface: usize, source: Mac, response: &Response) {
        self.now_ns = self.now_ns.max(now_ns);
        if response.address != self.setup.address {
            return;
        }
        match &response.answer {
            Answer::Config { buffers, sectors } => self.meet_target(interface, source, *buffers, *sectors),
            answer => self.take_answer(response.tag, answer),
        }
        self.make_ops();
        self.work();
    }

    fn meet_target(&mut self, interface: usize, source: Mac, buffers: u16, sectors: u8) {
        let window = usize::from(buffers).min(self.setup.window);
        let sectors = self.setup.frame_sectors.min(usize::from(sectors).max(1));
        let known = self.targets.iter_mut().find(|target| target.mac == source);
        if let Some(target) = known {
            target.set_window(window);
            target.meet_interface(interface);
            target.sectors = sectors;
        } else {
            self.targets.push(Target::new(source, window, interface, sectors));
        }
        // What all of them take: any frame may be sent again to any of them.
        self.frame_sectors = self.targets.iter().map(|target| target.sectors).min().unwrap_or(1);
        self.dead = false;
    }

    fn take_answer(&mut self, tag: Tag, answer: &Answer) {
        let frame = if let Some(frame) = self.active.remove(&tag) {
            let target = &mut self.targets[frame.target];
            self.round_trips.measure(Some(&mut *target), self.now_ns - frame.sent_ns);
            target.out -= 1;
            target.probes_out -= usize::from(frame.is_probe());
            frame
        } else if let Some(at) = self.deferred.iter().position(|frame| frame.tag == tag)
            && let Some(frame) = self.deferred.remove(at)
        {
            // Given up, and not sent again yet.
            self.round_trips.measure(None, self.now_ns - frame.sent_ns);
            frame
        } else {
            self.counters.unexpected += 1;
            let since_ns = self.since_tag(tag);
            self.round_trips.measure(None, since_ns);
            return;
        };
        let target = &mut self.targets[frame.target];
        if target.taint > 0 {
            target.taint -= 1;
            if target.taint > 0 && target.probes_out == 0 && self.untainted() > 0 {
                self.probe(frame.target);
            }
        }
        self.complete(&frame, answer);
    }

    fn complete(&mut self, frame: &Frame, answer: &Answer) {
        let Some(id) = frame.op else { return };
        let Some(op) = self.ops.get_mut(&id) else { return };
        op.frames_out -= 1;
        match (&frame.command, answer) {
            (Command::Read { lba, count }, Answer::Read(values)) if values.len() >= *count => {
                let from = usize::try_from(lba - op.lba).unwrap_or(0);
                op.read[from..from + count].copy_from_slice(&values[..*count]);
            }
            (Command::Write { .. }, Answer::Written) => {}
            _ => op.failed = true,
        }
        if op.frames_out == 0 && op.cut == op.sectors {
            let Some(op) = self.ops.remove(&id) else { return };
            let outcome = match op.action {
                _ if op.failed => Outcome::Failed,
                Action::Read(_) => Outcome::Read(op.read),
                Action::Write(_) => Outcome::Written,
            };
            self.counters.done += u64::from(!op.failed);
            self.counters.failed += u64::from(op.failed);
            self.outputs.push_back(Output::Ended { op: id, outcome });
        }
    }

    fn ticks(&self, now_ns: u64) -> u64 {
        now_ns / (1_000_000_000 / self.setup.ticks_per_second)
    }

    fn new_tag(&mut self) -> Tag {
        self.last_tag = (self.last_tag + 1) & 0x7fff;
        let ticks = u32::try_from(self.ticks(self.now_ns) & 0xffff).unwrap_or(0);
        Tag(ticks | self.last_tag << 16)
    }

    /// How long ago a frame with this tag was sent, as far as the tag tells.
    fn since_tag(&self, tag: Tag) -> u64 {
        let passed = (self.ticks(self.now_ns) & 0xffff).wrapping_sub(u64::from(tag.0 & 0xffff)) & 0xffff;
        (passed + 1) * (1_000_000_000 / self.setup.ticks_per_second)
    }

    fn untainted(&self) -> usize {
        self.targets.iter().filter(|target| target.taint == 0).count()
    }

    /// The target whose turn it is and whose window has room.
    fn next_target(&mut self) -> Option<usize> {
        let count = self.targets.len();
        let any_untainted = self.untainted() > 0;
        let turns = (1..=count).map(|turn| (self.last_target + turn) % count);
        let chosen = turns.into_iter().find(|at| {
            let target = &self.targets[*at];
            target.has_room() && (target.taint == 0) == any_untainted
        })?;
        self.targets[chosen].rotate();
        self.last_target = chosen;
        Some(chosen)
    }

    /// Sends again what may be, and then what is new.
    fn work(&mut self) {
        if self.targets.is_empty() || self.dead {
            return;
        }
        self.send_deferred();
        while let Some(id) = self.queue.front().copied() {
            let Some(op) = self.ops.get(&id).filter(|op| op.cut < op.sectors) else {
                self.queue.pop_front();
                continue;
            };
            let (lba, from) = (op.lba + op.cut as u64, op.cut);
            let count = self.frame_sectors.min(op.sectors - op.cut);
            let Some(target) = self.next_target() else { return };
            let Some(op) = self.ops.get_mut(&id) else { return };
            let command = match &op.action {
                Action::Read(_) => Command::Read { lba, count },
                Action::Write(values) => Command::Write { lba, values: values[from..from + count].into() },
            };
            op.cut += count;
            op.frames_out += 1;
            self.send_new(Some(id), command, target);
        }
    }

    fn send_new(&mut self, op: Option<OpId>, command: Command, target: usize) {
        let frame = Frame {
            tag: Tag(0),
            op,
            command,
            target,
            interface: self.targets[target].interface(),
            sent_ns: self.now_ns,
            waited_ns: 0,
            waited_total_ns: 0,
        };
        self.send(frame);
    }

    fn send(&mut self, mut frame: Frame) {
        let target = &mut self.targets[frame.target];
        target.out += 1;
        target.probes_out += usize::from(frame.is_probe());
        let destination = target.mac;
        frame.tag = self.new_tag();
        frame.sent_ns = self.now_ns;
        let request = Request { address: self.setup.address, tag: frame.tag, command: frame.command.clone() };
        self.counters.frames += 1;
        self.outputs.push_back(Output::Transmit { interface: frame.interface, destination, request });
        self.active.insert(frame.tag, frame);
    }

    fn probe(&mut self, target: usize) {
        let count = self.frame_sectors.min(usize::try_from(self.setup.sectors).unwrap_or(1));
        self.targets[target].rotate();
        self.send_new(None, Command::Read { lba: 0, count }, target);
    }

    /// The timer: whatever took too long is to be sent again.
    fn look(&mut self) {
        let timeout_ns = self.round_trips.timeout_ns();
        let now_ns = self.now_ns;
        let late = self.active.values().filter(|frame| now_ns - frame.sent_ns >= timeout_ns);
        let mut late: Vec<(u64, Tag)> = late.map(|frame| (frame.sent_ns, frame.tag)).collect();
        late.sort_unstable();
        let targets = self.targets.len() as u64;
        for (_, tag) in late {
            let Some(frame) = self.active.get(&tag) else { continue };
            let since_ns = now_ns - frame.sent_ns;
            if frame.waited_total_ns + since_ns > self.setup.dead_ns && !frame.is_probe() {
                self.die();
                return;
            }
            let Some(frame) = self.active.remove(&tag) else { continue };
            let waited_ns = frame.waited_ns + since_ns;
            let target = &mut self.targets[frame.target];
            if waited_ns > self.setup.dead_ns / targets || waited_ns > HARD_SCORN_NS {
                target.scorn();
            }
            target.collapse();
            target.out -= 1;
            if frame.is_probe() {
                target.probes_out -= 1;
            } else {
                target.lost_by(frame.interface);
            }
            self.deferred.push_back(frame);
        }
    }

    /// Sends again what was given up, as far as the windows allow.
    fn send_deferred(&mut self) {
        for _ in 0..self.deferred.len() {
            let Some(mut frame) = self.deferred.pop_front() else { return };
            let untainted = self.untainted();
            let since_ns = self.now_ns - frame.sent_ns;
            let taint = self.targets[frame.target].taint;
            if frame.is_probe() {
                if taint == 0 || untainted == 0 {
                    continue;
                }
                if since_ns < u64::from(taint) * self.round_trips.timeout_ns() {
                    self.deferred.push_back(frame);
                    continue;
                }
            } else if taint > 0 {
                let before = frame.target;
                if let Some(other) = self.next_target().filter(|other| *other != before) {
                    if self.targets[before].probes_out == 0 && untainted > 0 {
                        self.probe(before);
                    }
                    frame.target = other;
                    frame.waited_ns = 0;
                    self.counters.reassigned += 1;
                }
            }
            let target = &mut self.targets[frame.target];
            if !target.has_room() {
                self.deferred.push_back(frame);
                continue;
            }
            target.rotate();
            frame.interface = target.interface();
            frame.waited_ns += since_ns;
            frame.waited_total_ns += since_ns;
            self.counters.repeated += 1;
            self.send(frame);
        }
    }

    /// The device is given up: everything fails.
    fn die(&mut self) {
        self.dead = true;
        self.counters.deaths += 1;
        self.active.clear();
        self.deferred.clear();
        self.queue.clear();
        for target in &mut self.targets {
            target.reset();
        }
        for (op, _) in std::mem::take(&mut self.ops) {
            self.counters.failed += 1;
            self.outputs.push_back(Output::Ended { op, outcome: Outcome::Failed });
        }
    }

    /// Frames under way or to be sent again: a frame of each target for each place in its window, at most.
    #[must_use]
    pub fn frames_out(&self) -> usize {
        self.active.len() + self.deferred.len()
    }

    /// What it takes for a silent target at the moment before it asks again.
    #[must_use]
    pub fn retransmission_ns(&self) -> u64 {
        self.round_trips.timeout_ns()
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, tag, command } = self;
        write!(f, "{address} tag {:#010x} ", tag.0)?;
        match command {
            Command::Query => write!(f, "query"),
            Command::Read { lba, count } => write!(f, "read {}", Sectors(*lba, *count)),
            Command::Write { lba, values } => {
                write!(f, "write {} of {:#x}", Sectors(*lba, values.len()), values.first().unwrap_or(&0))
            }
        }
    }
}

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, tag, answer } = self;
        write!(f, "{address} tag {:#010x} ", tag.0)?;
        match answer {
            Answer::Config { buffers, sectors } => write!(f, "takes {buffers} frames of {sectors} sectors"),
            Answer::Read(values) => write!(f, "read {:x?}", &values[..values.len().min(4)]),
            Answer::Written => write!(f, "written"),
            Answer::Failed => write!(f, "failed"),
        }
    }
}

struct Sectors(u64, usize);

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sectors {}..{}", self.0, self.0 + self.1 as u64)
    }
}

#[cfg(test)]
mod tests;
