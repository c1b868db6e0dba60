//! The AoE initiator without I/O: received frames and the time go in, frames to send and finished operations come
//! out. It does what the Linux driver does (`drivers/block/aoe`): discovery by Query Config broadcast, IDENTIFY,
//! operations cut into frames of at most the target's sector count, at most its buffer count of frames unanswered,
//! and retransmission under a *new* tag, after which a reply to the old one is unexpected.
//!
//! Kept here:
//! - a tag names at most one unanswered frame, so that no reply is ever given to the wrong operation;
//! - an operation finishes exactly once, after each of its frames was answered, or with the failure that ended it;
//! - nothing is allocated once the target is known.

mod rtt;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use aoe_xdp::wire::{
    self, Address, AtaArg, AtaHead, ConfigArg, ConfigHead, Header, Mac, SECTOR_LEN, ata, command,
};
use zerocopy::{FromZeros, IntoBytes};

use self::rtt::{RoundTrip, Window};

const MILLISECOND_NS: u64 = 1_000_000;
/// `TIMERTICK` of the driver: unanswered frames are looked at this often.
const TICK_NS: u64 = 100 * MILLISECOND_NS;
/// A target that says nothing for this long is looked for again, since an export's address can move.
const SILENCE_NS: u64 = 1_000 * MILLISECOND_NS;
/// The floor that [`Behaviour::Steady`] puts under the retransmission timeout.
const STEADY_TIMEOUT_MIN_NS: u64 = 50 * MILLISECOND_NS;
/// `aoe_maxout`: the most frames that the driver leaves unanswered, whatever the target offers.
const LINUX_FRAMES_MAX: u16 = 64;
/// The most frames that are left unanswered in any case: far below the 2^15 sequence numbers of the tags.
const FRAMES_MAX: u16 = 4096;
/// Sequence numbers of the tags (`newtag`): 15 bits, so that bit 31, user space's by convention, stays clear.
const SEQUENCES: u32 = 1 << 15;
/// Status bits of which any one fails an operation (`ktiocomplete`).
const STATUS_FAILED: u8 = ata::STATUS_BSY | ata::STATUS_DF | ata::STATUS_DRQ | ata::STATUS_ERR;
/// Bytes of the longest head of a request.
pub(crate) const HEAD_LEN_MAX: usize = wire::ATA_DATA_OFFSET;

/// When unanswered frames are sent again, and what that does to the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Behaviour {
    /// As the driver: a timeout of about twice the round trip with no floor, and a window that falls to one frame.
    Linux,
    /// The driver's tags and timer, but a timeout of at least 50 ms and a window that stays.
    Steady,
    /// Nothing is sent again.
    Never,
}

/// What the initiator is to do.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The station that frames are sent from.
    pub(crate) station: Mac,
    /// The target.
    pub(crate) address: Address,
    /// Operations that may be unfinished.
    pub(crate) operations_max: u16,
    /// The most sectors of a frame that the link carries.
    pub(crate) link_sectors_max: u8,
    /// See [`Behaviour`].
    pub(crate) behaviour: Behaviour,
    /// A frame unanswered for this long fails its operation.
    pub(crate) timeout_ns: u64,
}

/// The direction of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
}

/// A read or write of consecutive sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Operation {
    pub(crate) kind: Kind,
    /// First sector on the volume.
    pub(crate) lba: u64,
    pub(crate) sectors: u32,
    /// The version that a write stamps; the initiator only carries it.
    pub(crate) version: u32,
    /// When it was due: latency counts from here.
    pub(crate) due_ns: u64,
}

/// The sectors that one frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The frame's slot: unique among unanswered frames, below [`Initiator::frames_max`].
    pub(crate) slot: u16,
    pub(crate) lba: u64,
    pub(crate) sectors: u8,
    pub(crate) version: u32,
}

/// A frame to send.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outgoing {
    head: [u8; HEAD_LEN_MAX],
    head_len: u8,
    /// What the frame is about, with whether it is the first time that it is sent.
    pub(crate) io: Option<(Kind, Piece, bool)>,
}

impl Outgoing {
    fn control(head: &[u8]) -> Outgoing {
        let mut bytes = [0; HEAD_LEN_MAX];
        bytes[..head.len()].copy_from_slice(head);
        Outgoing { head: bytes, head_len: u8::try_from(head.len()).expect("heads are short"), io: None }
    }

    /// The bytes before the data.
    pub(crate) fn head(&self) -> &[u8] {
        &self.head[..usize::from(self.head_len)]
    }
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// The target answered with these registers.
    AtaError {
        status: u8,
        error: u8,
    },
    /// A frame was not answered in time.
    TimedOut,
}

/// A finished operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Finished {
    pub(crate) operation: Operation,
    pub(crate) outcome: Outcome,
}

/// What a received frame was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// Nothing that an operation waited for.
    Other,
    /// The answer to a frame: for a read the data lies behind the first 36 bytes.
    Answer { kind: Kind, piece: Piece, finished: Option<Finished> },
    /// A failure that an operation waited for.
    Failure { finished: Option<Finished> },
}

/// What the initiator counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Counters {
    /// Frames sent for the first time.
    pub(crate) frames: u64,
    /// Frames sent again.
    pub(crate) retransmits: u64,
    /// Operations that ended in a timeout.
    pub(crate) timeouts: u64,
    /// Answers with a failed ATA status.
    pub(crate) ata_errors: u64,
    /// Answers with an AoE error, dropped as the Linux driver drops them.
    pub(crate) aoe_errors: u64,
    /// Replies to no unanswered frame: mostly to a tag that was given up by a retransmission.
    pub(crate) unexpected_replies: u64,
    /// Answers shorter than what was asked for, and frames that are no AoE message, all dropped.
    pub(crate) malformed: u64,
}

/// What discovery found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) mac: Mac,
    pub(crate) buffer_count: u16,
    pub(crate) sector_count: u8,
    pub(crate) firmware: u16,
    pub(crate) size_sectors: u64,
}

/// Why a target that answers cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(
        "the target offers a buffer count of 0, so nothing may be sent to it; Linux would never attach it either"
    )]
    NoBuffers,
    #[error("the target lacks LBA48, which this initiator needs")]
    NoLba48,
    #[error(
        "the target refused IDENTIFY with status {status:#04x}, error {error:#04x}: look at the target's log"
    )]
    Identify { status: u8, error: u8 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Discovering,
    Identifying { tag: u32 },
    Ready,
    Refused(Refusal),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FrameState {
    Free,
    /// Sent under the frame's tag.
    Sent,
    /// Waits to be sent again; the tag is given up.
    Again,
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    state: FrameState,
    owner: u16,
    tag: u32,
    lba: u64,
    sectors: u8,
    first_sent_ns: u64,
    sent_ns: u64,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    operation: Operation,
    cut_sectors: u32,
    frames_out: u32,
    outcome: Outcome,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Initiator {
    settings: Settings,
    phase: Phase,
    target: Target,
    counters: Counters,
    round_trip: RoundTrip,
    window: Window,
    frames: Vec<Frame>,
    frames_free: Vec<u16>,
    /// Frames to be sent again, oldest first.
    again: VecDeque<u16>,
    slots: Vec<Slot>,
    slots_free: Vec<u16>,
    /// Operations of which something is still to be cut into frames.
    uncut: VecDeque<u16>,
    /// Frame slot by the tag's sequence number; valid only if that frame is `Sent` under exactly that tag.
    by_sequence: Vec<u16>,
    sequence: u32,
    frames_sent: u16,
    next_tick_ns: u64,
    heard_ns: u64,
    asked_ns: Option<u64>,
    dead: bool,
}

impl Initiator {
    /// An initiator that looks for its target.
    pub(crate) fn new(settings: Settings, now_ns: u64) -> Initiator {
        let operations_max = settings.operations_max.max(1);
        let idle = Operation { kind: Kind::Read, lba: 0, sectors: 0, version: 0, due_ns: 0 };
        let slot = Slot { operation: idle, cut_sectors: 0, frames_out: 0, outcome: Outcome::Done };
        Initiator {
            phase: Phase::Discovering,
            target: Target {
                mac: Mac::BROADCAST,
                buffer_count: 0,
                sector_count: 0,
                firmware: 0,
                size_sectors: 0,
            },
            counters: Counters::default(),
            round_trip: RoundTrip::new(),
            window: Window::fixed(1),
            frames: Vec::new(),
            frames_free: Vec::new(),
            again: VecDeque::new(),
            slots: vec![slot; usize::from(operations_max)],
            slots_free: (0..operations_max).rev().collect(),
            uncut: VecDeque::with_capacity(usize::from(operations_max)),
            by_sequence: vec![u16::MAX; SEQUENCES as usize],
            sequence: 0,
            frames_sent: 0,
            next_tick_ns: now_ns + TICK_NS,
            heard_ns: now_ns,
            asked_ns: None,
            dead: false,
            settings,
        }
    }

    /// The target, once it was identified.
    pub(crate) fn target(&self) -> Option<&Target> {
        (self.phase == Phase::Ready).then_some(&self.target)
    }

    /// Why the target cannot be used, if that is so.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        match self.phase {
            Phase::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// Whether the target was seen but not yet identified.
    pub(crate) fn is_identifying(&self) -> bool {
        matches!(self.phase, Phase::Identifying { .. })
    }

    /// The target left a frame unanswered for the whole timeout: every operation failed, and none is taken any more.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead
    }

    /// What was counted so far.
    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Frames that can be unanswered at most: [`Piece::slot`] is below it.
    pub(crate) fn frames_max(&self) -> usize {
        self.frames.len()
    }

    /// The most sectors of a frame.
    pub(crate) fn frame_sectors_max(&self) -> u8 {
        self.target.sector_count.min(self.settings.link_sectors_max).max(1)
    }

    /// Whether another operation is taken.
    pub(crate) fn has_room(&self) -> bool {
        self.phase == Phase::Ready && !self.dead && !self.slots_free.is_empty()
    }

    /// Operations that are not finished.
    pub(crate) fn unfinished(&self) -> usize {
        self.slots.len() - self.slots_free.len()
    }

    /// Takes an operation. [`Initiator::has_room`] must have said so.
    pub(crate) fn submit(&mut self, operation: Operation) {
        assert!(self.has_room(), "an operation beyond the window");
        assert!(operation.sectors > 0, "an operation without sectors");
        let slot = self.slots_free.pop().expect("has_room saw a free slot");
        self.slots[usize::from(slot)] =
            Slot { operation, cut_sectors: 0, frames_out: 0, outcome: Outcome::Done };
        self.uncut.push_back(slot);
    }

    /// The next frame to send now. It counts as sent.
    pub(crate) fn transmit(&mut self, now_ns: u64) -> Option<Outgoing> {
        if self.wants_config(now_ns) {
            self.asked_ns = Some(now_ns);
            let head = ConfigHead {
                header: Header::request(
                    Mac::BROADCAST,
                    self.settings.station,
                    self.settings.address,
                    command::CONFIG,
                    0,
                ),
                arg: ConfigArg::new_zeroed(),
            };
            return Some(Outgoing::control(head.as_bytes()));
        }
        match self.phase {
            Phase::Ready if !self.dead => self.transmit_io(now_ns),
            Phase::Identifying { tag: 0 } => Some(self.transmit_identify(now_ns)),
            _ => None,
        }
    }

    /// When [`Initiator::tick`] is wanted.
    pub(crate) fn next_tick_ns(&self) -> u64 {
        self.next_tick_ns
    }

    /// Looks at unanswered frames, as often as the driver's timer does. What timed out is added to `finished`, which
    /// needs room for every unfinished operation.
    pub(crate) fn tick(&mut self, now_ns: u64, finished: &mut Vec<Finished>) {
        if now_ns < self.next_tick_ns {
            return;
        }
        self.next_tick_ns = now_ns + TICK_NS;
        if let Phase::Identifying { tag } = self.phase
            && tag != 0
            && now_ns.saturating_sub(self.asked_ns.unwrap_or(0)) >= SILENCE_NS
        {
            self.phase = Phase::Discovering;
            self.asked_ns = None;
        }
        if self.phase == Phase::Ready && !self.dead {
            self.expire(now_ns, finished);
        }
    }

    /// Takes a received frame: `head` is its beginning (all of it, or at least the first 36 bytes and for IDENTIFY
    /// the first 548), `len` the length of the whole.
    pub(crate) fn receive(&mut self, head: &[u8], len: usize, now_ns: u64) -> Received {
        let Ok(header) = wire::parse_header(head) else {
            self.counters.malformed += 1;
            return Received::Other;
        };
        let ours = header.dst == self.settings.station || header.dst == Mac::BROADCAST;
        if !header.is_response() || !ours || header.address() != self.settings.address {
            return Received::Other;
        }
        if header.is_error() {
            self.counters.aoe_errors += 1;
            return Received::Other;
        }
        match header.command {
            command::CONFIG => self.receive_config(head, now_ns),
            command::ATA => return self.receive_ata(head, len, now_ns),
            _ => self.counters.unexpected_replies += 1,
        }
        Received::Other
    }

    fn wants_config(&self, now_ns: u64) -> bool {
        let asked_long_ago = self.asked_ns.is_none_or(|asked| now_ns.saturating_sub(asked) >= SILENCE_NS);
        match self.phase {
            Phase::Discovering => asked_long_ago,
            Phase::Ready => {
                let waits = self.frames_sent > 0 || !self.again.is_empty();
                waits && !self.dead && asked_long_ago && now_ns.saturating_sub(self.heard_ns) >= SILENCE_NS
            }
            Phase::Identifying { .. } | Phase::Refused(_) => false,
        }
    }

    fn receive_config(&mut self, head: &[u8], now_ns: u64) {
        let Ok((config, _)) = wire::parse_config(head) else {
            self.counters.malformed += 1;
            return;
        };
        let (buffer_count, sector_count) = (config.arg.buffer_count.get(), config.arg.sector_count);
        if buffer_count == 0 {
            if self.phase == Phase::Discovering {
                self.phase = Phase::Refused(Refusal::NoBuffers);
            }
            return;
        }
        self.target.mac = config.header.src;
        self.target.buffer_count = buffer_count;
        self.target.sector_count = if sector_count == 0 { 2 } else { sector_count };
        self.target.firmware = config.arg.firmware_version.get();
        if self.phase == Phase::Discovering {
            self.phase = Phase::Identifying { tag: 0 };
            self.asked_ns = Some(now_ns);
        }
        let allocated = u16::try_from(self.frames.len()).unwrap_or(FRAMES_MAX);
        if allocated > 0 {
            self.window.set_frames_max(self.frames_allowed().min(allocated));
        }
    }

    fn transmit_identify(&mut self, now_ns: u64) -> Outgoing {
        let tag = self.new_tag(now_ns);
        self.phase = Phase::Identifying { tag };
        self.asked_ns = Some(now_ns);
        let head = AtaHead { header: self.request_header(tag), arg: AtaArg::identify() };
        Outgoing::control(head.as_bytes())
    }

    fn request_header(&self, tag: u32) -> Header {
        Header::request(self.target.mac, self.settings.station, self.settings.address, command::ATA, tag)
    }

    fn frames_allowed(&self) -> u16 {
        let cap = if self.settings.behaviour == Behaviour::Linux { LINUX_FRAMES_MAX } else { FRAMES_MAX };
        self.target.buffer_count.min(cap)
    }

    fn identified(&mut self, head: &[u8], now_ns: u64) {
        let Some(words) = head.get(wire::ATA_DATA_OFFSET..wire::ATA_DATA_OFFSET + SECTOR_LEN) else {
            self.counters.malformed += 1;
            return;
        };
        let word = |index: usize| u16::from_le_bytes([words[2 * index], words[2 * index + 1]]);
        if (word(83) | word(86)) & 1 << 10 == 0 {
            self.phase = Phase::Refused(Refusal::NoLba48);
            return;
        }
        self.target.size_sectors = (0..4).fold(0, |size, i| size | u64::from(word(100 + i)) << (16 * i));
        let frames_max = self.frames_allowed();
        let free = Frame {
            state: FrameState::Free,
            owner: 0,
            tag: 0,
            lba: 0,
            sectors: 0,
            first_sent_ns: 0,
            sent_ns: 0,
        };
        self.frames = vec![free; usize::from(frames_max)];
        self.frames_free = (0..frames_max).rev().collect();
        self.again = VecDeque::with_capacity(usize::from(frames_max));
        self.round_trip = RoundTrip::new();
        self.window = match self.settings.behaviour {
            Behaviour::Linux => Window::linux(frames_max),
            Behaviour::Steady | Behaviour::Never => Window::fixed(frames_max),
        };
        self.heard_ns = now_ns;
        self.phase = Phase::Ready;
    }

    fn transmit_io(&mut self, now_ns: u64) -> Option<Outgoing> {
        if self.frames_sent >= self.window.limit() {
            return None;
        }
        if let Some(index) = self.again.pop_front() {
            self.counters.retransmits += 1;
            return Some(self.send(index, now_ns, false));
        }
        let slot_index = *self.uncut.front()?;
        let index = self.frames_free.pop()?;
        let sectors_max = u32::from(self.frame_sectors_max());
        let slot = &mut self.slots[usize::from(slot_index)];
        let left = slot.operation.sectors - slot.cut_sectors;
        let sectors = u8::try_from(left.min(sectors_max)).expect("a frame's sectors fit a byte");
        let lba = slot.operation.lba + u64::from(slot.cut_sectors);
        slot.cut_sectors += u32::from(sectors);
        slot.frames_out += 1;
        if slot.cut_sectors == slot.operation.sectors {
            self.uncut.pop_front();
        }
        let frame = &mut self.frames[usize::from(index)];
        *frame = Frame { owner: slot_index, lba, sectors, first_sent_ns: now_ns, ..*frame };
        self.counters.frames += 1;
        Some(self.send(index, now_ns, true))
    }

    fn send(&mut self, index: u16, now_ns: u64, first: bool) -> Outgoing {
        let tag = self.new_tag(now_ns);
        self.by_sequence[(tag >> 16) as usize] = index;
        let header = self.request_header(tag);
        let frame = &mut self.frames[usize::from(index)];
        frame.state = FrameState::Sent;
        frame.tag = tag;
        frame.sent_ns = now_ns;
        self.frames_sent += 1;
        let operation = self.slots[usize::from(frame.owner)].operation;
        let write = operation.kind == Kind::Write;
        let head = AtaHead { header, arg: AtaArg::read_write_ext(frame.lba, frame.sectors, write) };
        let piece = Piece { slot: index, lba: frame.lba, sectors: frame.sectors, version: operation.version };
        Outgoing { io: Some((operation.kind, piece, first)), ..Outgoing::control(head.as_bytes()) }
    }

    /// A tag as the driver's `newtag` makes it: milliseconds in the low half, a sequence number above. A number
    /// still held by an unanswered frame is skipped, which can take as many steps as there are frames.
    fn new_tag(&mut self, now_ns: u64) -> u32 {
        loop {
            self.sequence = (self.sequence + 1) % SEQUENCES;
            let holder = self.by_sequence[self.sequence as usize];
            let taken = self
                .frames
                .get(usize::from(holder))
                .is_some_and(|frame| frame.state == FrameState::Sent && frame.tag >> 16 == self.sequence);
            if !taken && self.sequence != 0 {
                return self.sequence << 16 | jiffies(now_ns);
            }
        }
    }

    fn receive_ata(&mut self, head: &[u8], len: usize, now_ns: u64) -> Received {
        let Ok(message) = wire::parse_ata(head) else {
            self.counters.malformed += 1;
            return Received::Other;
        };
        let tag = message.header.tag.get();
        let (status, error) = (message.arg.command_status, message.arg.error_feature);
        if let Phase::Identifying { tag: asked } = self.phase {
            if asked == 0 || tag != asked {
                self.counters.unexpected_replies += 1;
            } else if status & STATUS_FAILED != 0 {
                self.phase = Phase::Refused(Refusal::Identify { status, error });
            } else {
                self.identified(head, now_ns);
            }
            return Received::Other;
        }
        self.heard_ns = now_ns;
        let Some(index) = self.unanswered(tag) else {
            self.counters.unexpected_replies += 1;
            if self.settings.behaviour == Behaviour::Linux && self.phase == Phase::Ready {
                let age_ms = jiffies(now_ns).wrapping_sub(tag) & 0xffff;
                self.round_trip.sample(u64::from(age_ms) * MILLISECOND_NS);
            }
            return Received::Other;
        };
        self.answered(index, status, error, len, now_ns)
    }

    fn unanswered(&self, tag: u32) -> Option<u16> {
        let index = *self.by_sequence.get((tag >> 16) as usize)?;
        let frame = self.frames.get(usize::from(index))?;
        (frame.state == FrameState::Sent && frame.tag == tag).then_some(index)
    }

    fn answered(&mut self, index: u16, status: u8, error: u8, len: usize, now_ns: u64) -> Received {
        let frame = self.frames[usize::from(index)];
        let operation = self.slots[usize::from(frame.owner)].operation;
        let data_len = usize::from(frame.sectors) * SECTOR_LEN;
        let failed = status & STATUS_FAILED != 0;
        if !failed && operation.kind == Kind::Read && len < wire::ATA_DATA_OFFSET + data_len {
            self.counters.malformed += 1;
            return Received::Other;
        }
        self.round_trip.sample(now_ns.saturating_sub(frame.sent_ns));
        self.window.on_reply(self.frames_sent);
        self.frames_sent -= 1;
        self.release_frame(index);
        if failed {
            self.counters.ata_errors += 1;
            let finished = self.frame_ended(frame.owner, Outcome::AtaError { status, error });
            return Received::Failure { finished };
        }
        let piece = Piece { slot: index, lba: frame.lba, sectors: frame.sectors, version: operation.version };
        Received::Answer {
            kind: operation.kind,
            piece,
            finished: self.frame_ended(frame.owner, Outcome::Done),
        }
    }

    fn release_frame(&mut self, index: u16) {
        self.frames[usize::from(index)].state = FrameState::Free;
        self.frames_free.push(index);
    }

    /// One frame of an operation ended. A failure ends the operation's cutting; the first failure is the outcome.
    fn frame_ended(&mut self, slot_index: u16, outcome: Outcome) -> Option<Finished> {
        let slot = &mut self.slots[usize::from(slot_index)];
        slot.frames_out -= 1;
        if outcome != Outcome::Done && slot.outcome == Outcome::Done {
            slot.outcome = outcome;
            if slot.cut_sectors < slot.operation.sectors {
                slot.cut_sectors = slot.operation.sectors;
                self.uncut.retain(|&other| other != slot_index);
            }
        }
        let slot = &self.slots[usize::from(slot_index)];
        if slot.frames_out > 0 || slot.cut_sectors < slot.operation.sectors {
            return None;
        }
        if slot.outcome == Outcome::TimedOut {
            self.counters.timeouts += 1;
        }
        self.slots_free.push(slot_index);
        Some(Finished { operation: slot.operation, outcome: slot.outcome })
    }

    fn expire(&mut self, now_ns: u64, finished: &mut Vec<Finished>) {
        let (mut given_up, mut expired) = (false, false);
        let timeout_ns = match self.settings.behaviour {
            Behaviour::Linux => self.round_trip.timeout_ns(),
            Behaviour::Steady => self.round_trip.timeout_ns().max(STEADY_TIMEOUT_MIN_NS),
            Behaviour::Never => u64::MAX,
        };
        for index in 0..u16::try_from(self.frames.len()).unwrap_or(FRAMES_MAX) {
            let frame = &mut self.frames[usize::from(index)];
            if frame.state == FrameState::Free {
                continue;
            }
            if now_ns.saturating_sub(frame.first_sent_ns) >= self.settings.timeout_ns {
                if self.settings.behaviour == Behaviour::Never {
                    let owner = frame.owner;
                    self.frames_sent -= 1;
                    self.release_frame(index);
                    finished.extend(self.frame_ended(owner, Outcome::TimedOut));
                    continue;
                }
                given_up = true;
            }
            if frame.state == FrameState::Sent && now_ns.saturating_sub(frame.sent_ns) >= timeout_ns {
                frame.state = FrameState::Again;
                expired = true;
                self.frames_sent -= 1;
                self.again.push_back(index);
            }
        }
        if expired {
            self.window.on_timeout();
            // Oldest first, whatever slots they have: the driver keeps its list in the order of sending.
            let frames = &self.frames;
            self.again.make_contiguous().sort_unstable_by_key(|&i| frames[usize::from(i)].first_sent_ns);
        }
        if given_up {
            self.give_up(finished);
        }
    }

    /// The driver's `aoedev_downdev`: everything unfinished fails.
    fn give_up(&mut self, finished: &mut Vec<Finished>) {
        self.dead = true;
        self.again.clear();
        self.uncut.clear();
        self.frames_sent = 0;
        for frame in &mut self.frames {
            frame.state = FrameState::Free;
        }
        self.frames_free = (0..u16::try_from(self.frames.len()).unwrap_or(FRAMES_MAX)).rev().collect();
        for index in 0..u16::try_from(self.slots.len()).unwrap_or(u16::MAX) {
            if self.slots_free.contains(&index) {
                continue;
            }
            self.counters.timeouts += 1;
            let operation = self.slots[usize::from(index)].operation;
            finished.push(Finished { operation, outcome: Outcome::TimedOut });
        }
        self.slots_free = (0..u16::try_from(self.slots.len()).unwrap_or(u16::MAX)).rev().collect();
    }
}

/// The driver's clock in a tag: milliseconds, 16 bits.
fn jiffies(now_ns: u64) -> u32 {
    u32::try_from((now_ns / MILLISECOND_NS) & 0xffff).expect("16 bits fit")
}
