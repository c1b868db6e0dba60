//! Initiators: read and write a volume by AoE frames, ask again when no answer comes, and tell the checker everything.
//!
//! Two kinds. Linux's driver ([`crate::initiator`]), over one or two interfaces; and a *hasty* one, which asks again after a fixed time, knows
//! the export from the beginning, and never has two requests in progress that overlap.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use aoe_xdp::wire::{
    self, Address, AtaArg, AtaHead, ConfigArg, ConfigHead, FRAME_LEN_MIN, Header, Mac, ata, ccmd, command,
};
use torus_replication::terms::EXTENT_BLOCKS;
use zerocopy::IntoBytes;

use super::exports::{address_of, mac_of, mac_of_station, station};
use super::sectors::{self, SECTORS};
use super::{Checker, Event, Plan, Travels, Trouble, World, Wrong};
use crate::checker::history::{Action, OpId, Outcome, VolumeId};
use crate::initiator::{self, Answer, Command, Initiator, Load, Output, Response, Setup};
use crate::network::{self, Endpoint, SegmentId};
use crate::random::Random;

/// When the hasty one sends a request again.
const RESEND_NS: u64 = 300_000_000;
/// Never in a tag of Linux's: nobody shall take those of the hasty one for such.
const NOT_LINUX: u32 = 1 << 31;

/// A kind of initiator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Asks again soon, over one interface.
    Hasty,
    /// Linux's, over so many interfaces, 1 or 2.
    Linux(usize),
}

impl Kind {
    /// Segments that it is on.
    pub(super) fn paths(self) -> usize {
        match self {
            Kind::Hasty => 1,
            Kind::Linux(paths) => paths,
        }
    }
}

/// When a cluster has started.
const START_NS: u64 = 4_000_000_000;
/// What a request takes at most where nothing is troubled but the metadata.
const CALM_NS: u64 = 2_000_000_000;

/// A request of the hasty one, by sectors.
#[derive(Debug, Clone)]
struct Request {
    lba: u64,
    count: usize,
    frame: Rc<[u8]>,
    is_write: bool,
    begun_ns: u64,
    sent_ns: u64,
}

#[derive(Debug)]
struct Hasty {
    doing: BTreeMap<u64, Request>,
    next_op: u64,
    next_value: u64,
}

#[derive(Debug)]
enum Driver {
    Hasty(Hasty),
    Linux {
        driver: Box<Initiator>,
        /// Machines that were this initiator before.
        former: u64,
        /// When it is looked at next.
        due_ns: u64,
    },
}

/// An initiator.
#[derive(Debug)]
pub(super) struct Client {
    volume: usize,
    pub(super) endpoint: Endpoint,
    random: Random,
    kind: Kind,
    driver: Driver,
    window: usize,
    /// The blocks that it uses, in places around borders between extents, so that requests cross them.
    areas: Vec<Range<u64>>,
    is_stopped: bool,
    /// It only reads for a while.
    is_reading: bool,
    /// It asks for nothing for a while.
    is_resting: bool,
    /// It uses the last of its places only.
    is_narrow: bool,
}

/// The blocks that an initiator uses.
fn areas(plan: &Plan) -> Vec<Range<u64>> {
    // A request has two blocks.
    let count = plan.areas.clamp(1, plan.blocks / 2);
    let blocks = plan.blocks / count;
    let first = |area: u64| (2 * area + 1) * u64::from(EXTENT_BLOCKS) - blocks.min(1024) / 2;
    (0..count).map(|area| first(area)..first(area) + blocks).collect()
}

fn mac_of_client(volume: usize, interface: usize) -> Mac {
    Mac([0x06, 0, 0, 0, volume as u8, interface as u8])
}

fn linux(volume: usize, paths: usize, former: u64, now_ns: u64, random: Random) -> Box<Initiator> {
    let number = 1 + volume as u64 + former * 16;
    let Address { shelf, slot } = address_of(volume);
    let setup = Setup::new(number, initiator::Address { shelf, slot }, 1 << 24, paths);
    Box::new(Initiator::new(now_ns, setup, random))
}

impl Client {
    pub(super) fn new(volume: usize, endpoint: Endpoint, plan: &Plan, random: Random) -> Client {
        let driver = match plan.initiator {
            Kind::Hasty => Driver::Hasty(Hasty {
                doing: BTreeMap::new(),
                next_op: 1 + ((volume as u64) << 32),
                next_value: 1,
            }),
            Kind::Linux(paths) => Driver::Linux {
                driver: linux(volume, paths, 0, 0, random.named("driver", 0)),
                former: 0,
                due_ns: u64::MAX,
            },
        };
        let mut client = Client {
            volume,
            endpoint,
            random,
            kind: plan.initiator,
            driver,
            window: plan.window,
            areas: areas(plan),
            is_stopped: false,
            is_reading: false,
            is_resting: false,
            is_narrow: false,
        };
        client.load(0);
        client
    }

    /// Asks for nothing any more.
    pub(super) fn stop(&mut self, now_ns: u64) {
        if !self.is_stopped {
            self.is_stopped = true;
            self.load(now_ns);
        }
    }

    /// Only reads, or writes too.
    pub(super) fn set_reading(&mut self, now_ns: u64, is_reading: bool) {
        self.is_reading = is_reading;
        self.load(now_ns);
    }

    /// Asks for nothing for a while, or goes on.
    pub(super) fn set_resting(&mut self, now_ns: u64, is_resting: bool) {
        self.is_resting = is_resting;
        self.load(now_ns);
    }

    /// Uses one of its places only, or all.
    pub(super) fn set_narrow(&mut self, now_ns: u64, is_narrow: bool) {
        self.is_narrow = is_narrow;
        self.load(now_ns);
    }

    /// The places that it uses now.
    fn used(&self) -> &[Range<u64>] {
        let from = if self.is_narrow { self.areas.len() - 1 } else { 0 };
        &self.areas[from..]
    }

    /// Tells Linux's what it is used for.
    fn load(&mut self, now_ns: u64) {
        let sectors = SECTORS as u64;
        let ranges: Vec<Range<u64>> =
            self.used().iter().map(|area| area.start * sectors..area.end * sectors).collect();
        let load = Load {
            writes: ranges.clone(),
            reads: ranges,
            sectors: 1..33,
            writes_percent: if self.is_reading { 0 } else { 50 },
            depth: self.window,
            pause_ns: 1_000_000..15_000_000,
            overlapping_writes: false,
        };
        if let Driver::Linux { driver, .. } = &mut self.driver {
            driver.set_load(now_ns, (!self.is_stopped && !self.is_resting).then_some(load));
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.is_stopped
            && match &self.driver {
                Driver::Hasty(hasty) => hasty.doing.is_empty(),
                Driver::Linux { driver, .. } => driver.is_idle(),
            }
    }

    /// What it uses.
    pub(super) fn blocks(&self) -> impl Iterator<Item = u64> + use<> {
        self.areas.clone().into_iter().flatten()
    }

    pub(super) fn describe(&self) -> String {
        match &self.driver {
            Driver::Hasty(hasty) => {
                let ops: Vec<_> = hasty
                    .doing
                    .iter()
                    .map(|(op, doing)| (*op, doing.lba, doing.count, doing.is_write))
                    .collect();
                format!("initiator of volume {}: {ops:?}", self.volume)
            }
            Driver::Linux { driver, .. } => format!(
                "Linux's initiator of volume {}: is up: {}, frames: {}, {:?}",
                self.volume,
                driver.is_up(),
                driver.frames_out(),
                driver.counters()
            ),
        }
    }

    /// A new request of the hasty one, unless it would overlap one in progress; and what it does.
    fn draw(&mut self, now_ns: u64) -> Option<(u64, Request, Action)> {
        let at = self.random.index(self.used().len());
        let area = self.used()[at].clone();
        let Driver::Hasty(hasty) = &mut self.driver else { return None };
        let sectors = (area.end - area.start) * SECTORS as u64;
        let count = 1 + self.random.index(16);
        let lba = area.start * SECTORS as u64 + self.random.below(sectors - count as u64 + 1);
        // In blocks: a write of a part reads the rest.
        let blocks =
            |lba: u64, count: usize| lba / SECTORS as u64..(lba + count as u64).div_ceil(SECTORS as u64);
        let mine = blocks(lba, count);
        let overlaps = hasty.doing.values().any(|doing| {
            let other = blocks(doing.lba, doing.count);
            other.start < mine.end && mine.start < other.end
        });
        if overlaps {
            return None;
        }
        let is_write = self.random.coin() && !self.is_reading;
        let values: Option<Vec<u64>> = is_write.then(|| {
            let first = hasty.next_value;
            hasty.next_value += count as u64;
            (first..).take(count).map(|value| value << 8 | self.volume as u64).collect()
        });
        let op = hasty.next_op;
        hasty.next_op += 1;
        let header = Header::request(
            mac_of(self.volume, 0),
            mac_of_client(self.volume, 0),
            address_of(self.volume),
            command::ATA,
            op as u32 | NOT_LINUX,
        );
        let frame = ata_frame(header, lba, count, values.as_deref());
        let action = values.map_or(Action::Read(count), Action::Write);
        Some((op, Request { lba, count, frame, is_write, begun_ns: now_ns, sent_ns: now_ns }, action))
    }
}

/// A read, or a write of these values.
fn ata_frame(header: Header, lba: u64, count: usize, values: Option<&[u64]>) -> Rc<[u8]> {
    let arg = AtaArg::read_write_ext(lba, count as u8, values.is_some());
    let mut bytes = AtaHead { header, arg }.as_bytes().to_vec();
    sectors::append(values.unwrap_or_default(), &mut bytes);
    bytes.resize(bytes.len().max(FRAME_LEN_MIN), 0);
    bytes.into()
}

/// A frame of Linux's driver, as it is on the wire.
fn wire_frame(request: &initiator::Request, source: Mac, destination: Mac) -> Rc<[u8]> {
    let address = Address { shelf: request.address.shelf, slot: request.address.slot };
    let header = |command| Header::request(destination, source, address, command, request.tag.0);
    match &request.command {
        Command::Query => {
            let arg = ConfigArg {
                buffer_count: 0.into(),
                firmware_version: 0.into(),
                sector_count: 0,
                version_ccmd: wire::VERSION << 4 | ccmd::READ,
                string_len: 0.into(),
            };
            let mut bytes = ConfigHead { header: header(command::CONFIG), arg }.as_bytes().to_vec();
            bytes.resize(FRAME_LEN_MIN, 0);
            bytes.into()
        }
        Command::Read { lba, count } => ata_frame(header(command::ATA), *lba, *count, None),
        Command::Write { lba, values } => ata_frame(header(command::ATA), *lba, values.len(), Some(values)),
    }
}

/// What a frame of a target says; `None` for one that Linux does not listen to.
///
/// # Errors
/// It has sectors that nobody wrote.
fn response(bytes: &[u8]) -> Result<Option<Response>, Wrong> {
    let Ok(header) = wire::parse_header(bytes) else { return Ok(None) };
    if !header.is_response() || header.is_error() {
        return Ok(None);
    }
    let Address { shelf, slot } = header.address();
    let answer = match header.command {
        command::CONFIG => {
            let Ok((asked, _)) = wire::parse_config(bytes) else { return Ok(None) };
            Answer::Config { buffers: asked.arg.buffer_count.get(), sectors: asked.arg.sector_count }
        }
        command::ATA => {
            let Ok(head) = wire::parse_ata(bytes) else { return Ok(None) };
            let is_write = head.arg.aflags & wire::aflags::WRITE != 0;
            if head.arg.command_status & ata::STATUS_ERR != 0 {
                Answer::Failed
            } else if is_write {
                Answer::Written
            } else {
                let values = sectors::values_of(&bytes[wire::ATA_DATA_OFFSET..]).ok_or_else(|| {
                    Wrong::new(Checker::History, format!("{header:?} has sectors that nobody wrote"))
                })?;
                Answer::Read(values.into())
            }
        }
        _ => return Ok(None),
    };
    let tag = initiator::Tag(header.tag.get());
    Ok(Some(Response { address: initiator::Address { shelf, slot }, tag, answer }))
}

impl World {
    pub(super) fn client_turn(&mut self, at: usize) {
        match self.clients[at].kind {
            Kind::Hasty => self.hasty_turn(at),
            Kind::Linux(_) => self.linux_turn(at),
        }
    }

    /// Has all initiators do something else.
    pub(super) fn use_clients(&mut self, change: impl Fn(&mut Client, u64)) {
        let now_ns = self.now_ns();
        for at in 0..self.clients.len() {
            change(&mut self.clients[at], now_ns);
            if matches!(self.clients[at].kind, Kind::Linux(_)) {
                self.linux_turn(at);
            }
        }
    }

    fn hasty_turn(&mut self, at: usize) {
        let now_ns = self.now_ns();
        let client = &mut self.clients[at];
        let Driver::Hasty(hasty) = &mut client.driver else { return };
        let is_late = |doing: &Request| now_ns > doing.begun_ns.max(START_NS) + CALM_NS;
        if self.plan.is_calm && hasty.doing.values().any(is_late) {
            let what = format!("a request of initiator {at} is not answered");
            self.wrong.get_or_insert(Wrong::new(Checker::Calm, what));
        }
        let mut send = Vec::new();
        for doing in hasty.doing.values_mut() {
            if now_ns >= doing.sent_ns + RESEND_NS {
                doing.sent_ns = now_ns;
                send.push(Rc::clone(&doing.frame));
            }
        }
        let has_room = hasty.doing.len() < client.window;
        if !client.is_stopped
            && !client.is_resting
            && has_room
            && let Some((op, request, action)) = client.draw(now_ns)
        {
            self.history.begin(now_ns, OpId(op), VolumeId(client.volume as u64), request.lba, action);
            send.push(Rc::clone(&request.frame));
            if let Driver::Hasty(hasty) = &mut client.driver {
                hasty.doing.insert(op, request);
            }
        }
        let pause_ns = if client.is_stopped { 50_000_000 } else { client.random.range(500_000..20_000_000) };
        for frame in send {
            self.send_request(at, 0, mac_of(at, 0), frame);
        }
        self.schedule.after(pause_ns, Event::Client { client: at });
    }

    fn send_request(&mut self, at: usize, interface: usize, destination: Mac, frame: Rc<[u8]>) {
        let now_ns = self.now_ns();
        let endpoint = self.clients[at].endpoint;
        let source = station(mac_of_client(at, interface));
        let (segment, destination) = (SegmentId(interface), station(destination));
        self.network.transmit(now_ns, endpoint, segment, source, destination, &Travels::Frame(frame));
    }

    fn linux_turn(&mut self, at: usize) {
        let now_ns = self.now_ns();
        let Driver::Linux { driver, due_ns, .. } = &mut self.clients[at].driver else { return };
        if now_ns >= *due_ns {
            *due_ns = u64::MAX;
        }
        driver.advance(now_ns);
        if let Err(wrong) = self.take_outputs(at) {
            self.wrong.get_or_insert(wrong);
        }
    }

    /// Carries out what Linux's driver wants, and has it looked at when it wants.
    fn take_outputs(&mut self, at: usize) -> Result<(), Wrong> {
        let now_ns = self.now_ns();
        loop {
            let Driver::Linux { driver, .. } = &mut self.clients[at].driver else { return Ok(()) };
            let Some(output) = driver.pop() else { break };
            match output {
                Output::Transmit { interface, destination, request } => {
                    let destination = mac_of_station(destination);
                    let frame = wire_frame(&request, mac_of_client(at, interface), destination);
                    self.send_request(at, interface, destination, frame);
                }
                Output::Begun { op, lba, action } => {
                    self.history.begin(now_ns, op, VolumeId(at as u64), lba, action);
                }
                Output::Ended { op, outcome } => self.op_ends(at, op, &outcome)?,
            }
        }
        let Driver::Linux { driver, due_ns, .. } = &mut self.clients[at].driver else { return Ok(()) };
        let next_ns = driver.next_ns().max(now_ns + 1);
        if next_ns < *due_ns {
            *due_ns = next_ns;
            self.schedule.at(next_ns, Event::Client { client: at });
        }
        Ok(())
    }

    fn op_ends(&mut self, at: usize, op: OpId, outcome: &Outcome) -> Result<(), Wrong> {
        let now_ns = self.now_ns();
        self.coverage.answered += 1;
        self.note(|| format!("initiator {at} {op} {outcome:?}"));
        let seen = self.history.end(now_ns, op, outcome);
        seen.map_err(|violation| Wrong::new(Checker::History, violation.to_string()))
    }

    /// A frame comes to an initiator.
    pub(super) fn client_frame(
        &mut self,
        at: usize,
        segment: SegmentId,
        source: network::Mac,
        destination: network::Mac,
        bytes: &[u8],
    ) -> Result<(), Wrong> {
        let now_ns = self.now_ns();
        let own = station(mac_of_client(at, segment.0));
        if destination != own && destination != network::Mac::BROADCAST {
            return Ok(());
        }
        let Some(response) = response(bytes)? else { return Ok(()) };
        if response.answer == Answer::Failed {
            self.check_error(at, bytes)?;
        }
        match &mut self.clients[at].driver {
            Driver::Hasty(hasty) => {
                let tag = u64::from(response.tag.0 & !NOT_LINUX);
                let op = (at as u64) << 32 | tag;
                if matches!(response.answer, Answer::Config { .. }) {
                    return Ok(());
                }
                let Some(request) = hasty.doing.remove(&op) else { return Ok(()) };
                let outcome = match response.answer {
                    Answer::Read(values) => Outcome::Read(values[..request.count.min(values.len())].to_vec()),
                    Answer::Written => Outcome::Written,
                    Answer::Failed | Answer::Config { .. } => Outcome::Failed,
                };
                self.op_ends(at, OpId(op), &outcome)
            }
            Driver::Linux { driver, .. } => {
                driver.receive(now_ns, segment.0, source, &response);
                self.take_outputs(at)
            }
        }
    }

    /// An initiator is told of an error: only a disk that does something wrong takes the last good copy, or keeps the sole one from being
    /// written, and only full stores refuse writes.
    fn check_error(&mut self, at: usize, bytes: &[u8]) -> Result<(), Wrong> {
        self.coverage.failed += 1;
        let is_write = wire::parse_ata(bytes).is_ok_and(|head| head.arg.aflags & wire::aflags::WRITE != 0);
        let excuses = [Trouble::Rot, Trouble::StaleReads, Trouble::BadDisk];
        if excuses.into_iter().any(|excuse| self.plan.may(excuse)) || is_write && self.plan.may_be_full() {
            return Ok(());
        }
        let what = if is_write { "written" } else { "read" };
        Err(Wrong::new(Checker::Errors, format!("initiator {at} is told that something cannot be {what}")))
    }

    /// An initiator ends, and another one begins.
    pub(super) fn abandon(&mut self, at: usize) {
        let now_ns = self.now_ns();
        let client = &mut self.clients[at];
        match &mut client.driver {
            Driver::Hasty(hasty) => {
                let doing = std::mem::take(&mut hasty.doing);
                self.history.abandon(now_ns, |op| doing.contains_key(&op.0));
            }
            Driver::Linux { driver, former, .. } => {
                self.history.abandon(now_ns, |op| driver.owns(op));
                *former += 1;
                let random = client.random.named("driver", *former);
                *driver = linux(client.volume, client.kind.paths(), *former, now_ns, random);
                client.load(now_ns);
                self.linux_turn(at);
            }
        }
    }
}
