//! What carries messages between machines, and how it fails.
//!
//! Two media, with the promises that real ones make and no others:
//!
//! * *Segments* carry frames between stations by MAC, through a switch that learns where a station was last heard and floods
//!   what it does not know. Frames get lost, come twice, come late. Between two machines each segment is one path and keeps
//!   the order (design.md, I6: the network is FIFO per path), unless a run allows otherwise; several segments do not
//!   wait for one another.
//! * *Streams* are connections between machines: whole, in order, as long as they last. A broken one loses an unknown part of
//!   what was under way, each end learns of it at its own time, and what an old one still delivers can come after a new one
//!   was opened, until the receiving end is closed; it never comes by the new one.
//!
//! Machines are [`Up`](Power::Up), without their process, or off. A paused process hears nothing and is heard as before:
//! the kernel goes on, streams fill up, a ring keeps what frames it can.
//!
//! No queue grows without bound: segments drop, streams refuse.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::Range;

use crate::random::Random;
use crate::schedule::{EventId, Schedule};

mod faults;
mod streams;

/// A machine's place in the network: one for each node and each initiator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(pub usize);

/// An Ethernet segment: one switch, to which a machine has at most one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub usize);

/// A station's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub u64);

impl Mac {
    /// To all stations.
    pub const BROADCAST: Mac = Mac(0xffff_ffff_ffff);
}

/// A connection, the same number at both ends, never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "machine {}", self.0)
    }
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// The process runs.
    Up,
    /// The machine runs without its process: connections are refused and frames dropped.
    NoProcess,
    /// The machine is off: silence.
    Off,
}

/// A set of media, for faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Media(u32);

impl Media {
    /// Streams and all segments.
    pub const ALL: Media = Media(u32::MAX);
    /// Streams.
    pub const STREAMS: Media = Media(1);

    /// One segment.
    #[must_use]
    pub fn segment(segment: SegmentId) -> Media {
        Media(2 << segment.0)
    }

    /// Both.
    #[must_use]
    pub fn and(self, other: Media) -> Media {
        Media(self.0 | other.0)
    }
}

/// How well a medium works while nothing is broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quality {
    /// How long a message is under way.
    pub delay_ns: Range<u64>,
    /// Of a million messages, how many take much longer: that much.
    pub spike_ppm: u32,
    /// See `spike_ppm`.
    pub spike_ns: Range<u64>,
    /// Of a million frames, how many are lost. On a stream one costs a retransmission.
    pub loss_ppm: u32,
    /// Of a million frames, how many come twice.
    pub twice_ppm: u32,
    /// Frames of one path may overtake one another.
    pub reorder: bool,
}

impl Quality {
    /// A good network in one rack.
    #[must_use]
    pub fn good() -> Self {
        Self {
            delay_ns: 5_000..50_000,
            spike_ppm: 0,
            spike_ns: 0..0,
            loss_ppm: 0,
            twice_ppm: 0,
            reorder: false,
        }
    }

    /// A bad one, as bad as it happens to be.
    #[must_use]
    pub fn drawn(random: &mut Random) -> Self {
        let fastest_ns = random.magnitude(2_000..500_000);
        let spike_ns = random.magnitude(1_000_000..2_000_000_000);
        let mut ppm = |most: u64| {
            let drawn = if random.coin() { 0 } else { random.magnitude(1..most) };
            u32::try_from(drawn).unwrap_or(0)
        };
        Self {
            delay_ns: fastest_ns..fastest_ns * 4,
            spike_ppm: ppm(10_000),
            spike_ns: spike_ns / 4..spike_ns,
            loss_ppm: ppm(50_000),
            twice_ppm: ppm(50_000),
            reorder: false,
        }
    }
}

/// What of the network does not change during a run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Machines.
    pub endpoints: usize,
    /// Segments, at most 30.
    pub segments: usize,
    /// Frames that may be under way from one machine to another on one segment; more are dropped.
    pub frames_under_way: usize,
    /// Frames that are kept for a paused process; more are dropped.
    pub ring_frames: usize,
    /// Messages that a connection takes in one direction before it refuses more.
    pub window_messages: usize,
    /// Connections of the whole network; more fail.
    pub connections: usize,
    /// How long an end that hears nothing takes to give a connection up.
    pub give_up_ns: Range<u64>,
    /// How long an end whose peer is gone takes to hear of it, if it can.
    pub notice_ns: Range<u64>,
    /// How long a connection is tried.
    pub connect_timeout_ns: u64,
    /// What a lost segment of a stream costs.
    pub stream_retry_ns: Range<u64>,
}

impl Setup {
    /// Usual bounds and times, as of Linux with short user timeouts.
    #[must_use]
    pub fn new(endpoints: usize, segments: usize) -> Self {
        Self {
            endpoints,
            segments: segments.min(30),
            frames_under_way: 4096,
            ring_frames: 1024,
            window_messages: 1024,
            connections: 4096,
            give_up_ns: 500_000_000..5_000_000_000,
            notice_ns: 20_000..200_000_000,
            connect_timeout_ns: 1_000_000_000,
            stream_retry_ns: 200_000_000..400_000_000,
        }
    }
}

/// What happens at a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<M> {
    /// A frame arrives at an interface, whoever it is addressed to.
    Frame {
        /// Where.
        at: Endpoint,
        /// By which interface.
        segment: SegmentId,
        /// Its sender's address.
        source: Mac,
        /// The address it was sent to.
        destination: Mac,
        /// What it carries.
        payload: M,
    },
    /// An interface gained or lost its carrier.
    Carrier {
        /// Where.
        at: Endpoint,
        /// Of which interface.
        segment: SegmentId,
        /// Whether it has one now.
        up: bool,
    },
    /// A connection that this machine began stands.
    Connected {
        /// Where.
        at: Endpoint,
        /// Which.
        connection: ConnectionId,
    },
    /// A connection that this machine began came to nothing.
    ConnectFailed {
        /// Where.
        at: Endpoint,
        /// Which.
        connection: ConnectionId,
    },
    /// Another machine's connection stands.
    Accepted {
        /// Where.
        at: Endpoint,
        /// Which.
        connection: ConnectionId,
        /// Who began it.
        from: Endpoint,
    },
    /// A message arrives by a connection.
    Message {
        /// Where.
        at: Endpoint,
        /// By which.
        connection: ConnectionId,
        /// What it is.
        payload: M,
    },
    /// This end of a connection is closed, by the peer or by a fault. Nothing more comes by it.
    Closed {
        /// Where.
        at: Endpoint,
        /// Which.
        connection: ConnectionId,
    },
}

impl<M> Event<M> {
    /// Where it happens.
    #[must_use]
    pub fn at(&self) -> Endpoint {
        match self {
            Self::Frame { at, .. }
            | Self::Carrier { at, .. }
            | Self::Connected { at, .. }
            | Self::ConnectFailed { at, .. }
            | Self::Accepted { at, .. }
            | Self::Message { at, .. }
            | Self::Closed { at, .. } => *at,
        }
    }
}

/// Why a stream did not take a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// This end is not open, or not any more.
    #[error("the connection is not open")]
    Closed,
    /// The window is full: send again after messages have arrived.
    #[error("the connection's window is full")]
    Full,
}

/// What the network has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames sent.
    pub frames: u64,
    /// Frames lost by chance, faults or full queues, counted for each receiver.
    pub frames_lost: u64,
    /// Frames that came twice.
    pub frames_twice: u64,
    /// Messages of streams that arrived.
    pub messages: u64,
    /// Messages of streams that were lost when their connection broke.
    pub messages_lost: u64,
    /// Messages that arrived by a connection whose sending end was gone.
    pub messages_late: u64,
    /// Connections that broke, counted for each end.
    pub breaks: u64,
}

/// The network's own events.
#[derive(Clone, Debug)]
enum Due<M> {
    Frame {
        from: Endpoint,
        to: Endpoint,
        segment: SegmentId,
        source: Mac,
        destination: Mac,
        payload: M,
    },
    /// The first item of a lane arrives.
    Lane {
        connection: ConnectionId,
        side: usize,
    },
    /// An end learns that its connection is no more.
    Break {
        connection: ConnectionId,
        side: usize,
    },
    /// The first message of a handshake arrives, or the second one.
    Handshake {
        connection: ConnectionId,
        answer: bool,
    },
    /// A connection that is not yet one is given up.
    ConnectTimeout {
        connection: ConnectionId,
    },
    /// Something for a machine alone: what was kept for a paused process, or news of an interface.
    Local {
        life: u64,
        event: Event<M>,
    },
    /// A link that comes and goes changes.
    Flap {
        number: usize,
        round: u64,
    },
    /// A slow link is as before.
    Faster {
        from: Endpoint,
        to: Endpoint,
        round: u64,
    },
}

#[derive(Clone, Debug)]
enum Item<M> {
    /// The end of the handshake.
    Open,
    Message(M),
    /// The other end was closed in good order.
    Last,
}

/// One direction of a connection, named by the side it leads to.
#[derive(Clone, Debug)]
struct Lane<M> {
    items: VecDeque<(u64, Item<M>)>,
    last_ns: u64,
    timer: Option<EventId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Opening,
    Open,
    Over,
}

#[derive(Clone, Debug)]
struct Side {
    endpoint: Endpoint,
    state: State,
    give_up: Option<(u64, EventId)>,
}

#[derive(Clone, Debug)]
struct Connection<M> {
    sides: [Side; 2],
    lanes: [Lane<M>; 2],
    timeout: Option<EventId>,
}

/// One direction between two machines.
#[derive(Clone, Debug, Default)]
struct Link {
    /// Media that are cut.
    cut: u32,
    /// Media that are cut for the moment, because they come and go.
    flapping: u32,
    slow_ns: u64,
    slow_round: u64,
}

#[derive(Clone, Debug, Default)]
struct Path {
    last_ns: u64,
    under_way: usize,
}

#[derive(Clone, Debug)]
struct Machine<M> {
    power: Power,
    /// Grows when the process ends: what was meant for it is not for the next one.
    life: u64,
    paused: bool,
    /// By segment.
    carrier: Vec<bool>,
    /// What a paused process will find.
    held: VecDeque<Event<M>>,
    held_frames: usize,
}

#[derive(Clone, Debug)]
struct Flap {
    links: Vec<(Endpoint, Endpoint)>,
    media: Media,
    down_ns: Range<u64>,
    up_ns: Range<u64>,
    round: u64,
    is_down: bool,
}

/// Stations that a switch remembers; when there are more it forgets all and floods, as one does.
const LEARNED_STATIONS: usize = 4096;

/// The network of a simulation. See the module.
#[derive(Clone, Debug)]
pub struct Network<M> {
    setup: Setup,
    streams: Quality,
    segments: Vec<Quality>,
    /// By segment: its switch learns nothing.
    is_flooding: Vec<bool>,
    random: Random,
    schedule: Schedule<Due<M>>,
    machines: Vec<Machine<M>>,
    /// By sender and receiver.
    links: Vec<Link>,
    /// By segment, sender and receiver.
    paths: Vec<Path>,
    learned: BTreeMap<(SegmentId, Mac), Endpoint>,
    connections: BTreeMap<ConnectionId, Connection<M>>,
    last_connection: u64,
    flaps: Vec<Flap>,
    counters: Counters,
}

impl<M: Clone> Network<M> {
    /// A network without faults, all of whose machines are up and attached to every segment.
    #[must_use]
    pub fn new(setup: Setup, random: Random) -> Self {
        let (count, segments) = (setup.endpoints, setup.segments);
        let machine = Machine {
            power: Power::Up,
            life: 0,
            paused: false,
            carrier: vec![true; segments],
            held: VecDeque::new(),
            held_frames: 0,
        };
        Self {
            streams: Quality::good(),
            segments: vec![Quality::good(); segments],
            is_flooding: vec![false; segments],
            random,
            schedule: Schedule::new(),
            machines: vec![machine; count],
            links: vec![Link::default(); count * count],
            paths: vec![Path::default(); segments * count * count],
            learned: BTreeMap::new(),
            connections: BTreeMap::new(),
            last_connection: 0,
            flaps: Vec::new(),
            counters: Counters::default(),
            setup,
        }
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// How well streams work from now on.
    pub fn set_stream_quality(&mut self, quality: Quality) {
        self.streams = quality;
    }

    /// How well a segment works from now on.
    pub fn set_segment_quality(&mut self, segment: SegmentId, quality: Quality) {
        self.segments[segment.0] = quality;
    }

    /// Has the switch of a segment learn nothing: every frame goes everywhere.
    pub fn set_flooding(&mut self, segment: SegmentId, is_flooding: bool) {
        self.is_flooding[segment.0] = is_flooding;
    }

    /// When [`Self::pop`] has something to do next.
    #[must_use]
    pub fn next_ns(&self) -> Option<u64> {
        self.schedule.next_ns()
    }

    /// The next thing that happens by then, and when. Call it until there is nothing more before anything later is asked of
    /// the network.
    pub fn pop(&mut self, limit_ns: u64) -> Option<(u64, Event<M>)> {
        while let Some((now_ns, due)) = self.schedule.pop_by(limit_ns) {
            let event = match due {
                Due::Frame { from, to, segment, source, destination, payload } => {
                    let path = self.path(segment, from, to);
                    self.paths[path].under_way -= 1;
                    self.arrives(from, to, segment).then_some(Event::Frame {
                        at: to,
                        segment,
                        source,
                        destination,
                        payload,
                    })
                }
                Due::Lane { connection, side } => self.lane_is_due(connection, side),
                Due::Break { connection, side } => self.break_is_due(now_ns, connection, side),
                Due::Handshake { connection, answer } => self.handshake_is_due(now_ns, connection, answer),
                Due::ConnectTimeout { connection } => self.connect_is_over(connection),
                Due::Local { life, event } => (self.machines[event.at().0].life == life).then_some(event),
                Due::Flap { number, round } => self.flap_is_due(now_ns, number, round),
                Due::Faster { from, to, round } => {
                    let link = self.link_mut(from, to);
                    if link.slow_round == round {
                        link.slow_ns = 0;
                    }
                    None
                }
            };
            if let Some(event) = event.and_then(|event| self.unless_paused(event)) {
                return Some((now_ns, event));
            }
        }
        None
    }

    /// Keeps what comes for a paused process.
    fn unless_paused(&mut self, event: Event<M>) -> Option<Event<M>> {
        let ring_frames = self.setup.ring_frames;
        let machine = &mut self.machines[event.at().0];
        if !machine.paused {
            return Some(event);
        }
        if matches!(event, Event::Frame { .. }) {
            if machine.held_frames == ring_frames {
                self.counters.frames_lost += 1;
                return None;
            }
            machine.held_frames += 1;
        }
        machine.held.push_back(event);
        None
    }

    fn path(&self, segment: SegmentId, from: Endpoint, to: Endpoint) -> usize {
        (segment.0 * self.setup.endpoints + from.0) * self.setup.endpoints + to.0
    }

    fn link(&self, from: Endpoint, to: Endpoint) -> &Link {
        &self.links[from.0 * self.setup.endpoints + to.0]
    }

    fn link_mut(&mut self, from: Endpoint, to: Endpoint) -> &mut Link {
        &mut self.links[from.0 * self.setup.endpoints + to.0]
    }

    fn is_cut(&self, from: Endpoint, to: Endpoint, media: Media) -> bool {
        let link = self.link(from, to);
        (link.cut | link.flapping) & media.0 != 0
    }

    fn arrives(&mut self, from: Endpoint, to: Endpoint, segment: SegmentId) -> bool {
        let machine = &self.machines[to.0];
        let arrives = machine.power == Power::Up
            && machine.carrier[segment.0]
            && !self.is_cut(from, to, Media::segment(segment));
        self.counters.frames_lost += u64::from(!arrives);
        arrives
    }

    /// Sends a frame from a machine's interface. The source may be any address that the machine answers for: the switch
    /// believes it.
    pub fn transmit(
        &mut self,
        now_ns: u64,
        from: Endpoint,
        segment: SegmentId,
        source: Mac,
        destination: Mac,
        payload: &M,
    ) {
        let machine = &self.machines[from.0];
        if machine.power != Power::Up || machine.paused || !machine.carrier[segment.0] {
            return;
        }
        self.counters.frames += 1;
        // Half of what is lost is lost on its way to the switch, which then does not learn where the sender is.
        if self.random.chance_ppm(self.segments[segment.0].loss_ppm / 2) {
            self.counters.frames_lost += 1;
            return;
        }
        if self.learned.len() >= LEARNED_STATIONS {
            self.learned.clear();
        }
        if !self.is_flooding[segment.0] {
            self.learned.insert((segment, source), from);
        }
        match self.learned.get(&(segment, destination)).copied() {
            Some(to) if to == from => {}
            Some(to) => self.send_frame(now_ns, from, to, segment, source, destination, payload),
            None => {
                for to in (0..self.setup.endpoints).map(Endpoint).filter(|to| *to != from) {
                    self.send_frame(now_ns, from, to, segment, source, destination, payload);
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "all of a frame")]
    fn send_frame(
        &mut self,
        now_ns: u64,
        from: Endpoint,
        to: Endpoint,
        segment: SegmentId,
        source: Mac,
        destination: Mac,
        payload: &M,
    ) {
        let quality = &self.segments[segment.0];
        let random = &mut self.random;
        let (loss, twice) = (random.chance_ppm(quality.loss_ppm / 2), random.chance_ppm(quality.twice_ppm));
        if loss {
            self.counters.frames_lost += 1;
            return;
        }
        self.counters.frames_twice += u64::from(twice);
        for _ in 0..1 + u32::from(twice) {
            let quality = &self.segments[segment.0];
            let delay_ns = drawn_delay(quality, &mut self.random) + self.link(from, to).slow_ns;
            let reorder = quality.reorder;
            let path = self.path(segment, from, to);
            let path = &mut self.paths[path];
            if path.under_way >= self.setup.frames_under_way {
                self.counters.frames_lost += 1;
                continue;
            }
            path.under_way += 1;
            let mut at_ns = now_ns + delay_ns;
            if !reorder {
                at_ns = at_ns.max(path.last_ns);
                path.last_ns = at_ns;
            }
            let payload = payload.clone();
            self.schedule.at(at_ns, Due::Frame { from, to, segment, source, destination, payload });
        }
    }
}

fn drawn_delay(quality: &Quality, random: &mut Random) -> u64 {
    let spike = random.chance_ppm(quality.spike_ppm);
    let delay_ns = random.range(quality.delay_ns.clone());
    if spike { delay_ns + random.range(quality.spike_ns.clone()) } else { delay_ns }
}

#[cfg(test)]
mod tests;
