//! An initiator of a volume: reads and writes sectors, asks again when no answer comes, and tells the checker everything.
//!
//! It never has two requests in progress that overlap: what orders those is the target's business.

use std::collections::BTreeMap;

use torus_replication::head::Failure;

use super::store::{Block, SECTORS};
use super::{Checker, Event, Plan, SEGMENT, Travels, Trouble, World, Wrong};
use crate::checker::history::{Action, OpId, Outcome, VolumeId};
use crate::network::{Endpoint, Mac};
use crate::random::Random;

/// When a request is sent again.
const RESEND_NS: u64 = 300_000_000;

/// A request of an initiator, by sectors.
#[derive(Debug, Clone)]
pub(super) struct ClientRequest {
    pub(super) op: u64,
    pub(super) volume: usize,
    pub(super) lba: u64,
    pub(super) count: usize,
    /// What is written; `None` reads.
    pub(super) values: Option<Vec<u64>>,
}

/// The answer.
#[derive(Debug, Clone)]
pub(super) struct ClientReply {
    pub(super) op: u64,
    pub(super) result: Result<Option<Vec<u64>>, Failure>,
}

#[derive(Debug)]
struct Doing {
    request: ClientRequest,
    sent_ns: u64,
}

/// An initiator.
#[derive(Debug)]
pub(super) struct Client {
    volume: usize,
    pub(super) endpoint: Endpoint,
    random: Random,
    doing: BTreeMap<u64, Doing>,
    next_op: u64,
    next_value: u64,
    window: usize,
    blocks: u64,
    is_stopped: bool,
    /// It only reads for a while.
    pub(super) is_reading: bool,
    /// It asks for nothing for a while.
    pub(super) is_resting: bool,
    /// Where the first extent ends in what it uses, so that requests cross it.
    first_block: u64,
}

pub(super) fn mac_of_volume(volume: usize) -> Mac {
    Mac(0x0200_0000_0000 + volume as u64)
}

/// An address of which the switch does not know where it is: a frame to it goes everywhere. Whoever gets it takes it as one to
/// the volume's own.
fn unlearned_mac_of_volume(volume: usize) -> Mac {
    Mac(0x0a00_0000_0000 + volume as u64)
}

fn mac_of_client(volume: usize) -> Mac {
    Mac(0x0600_0000_0000 + volume as u64)
}

impl Client {
    pub(super) fn new(volume: usize, endpoint: Endpoint, plan: &Plan, random: Random) -> Client {
        Client {
            volume,
            endpoint,
            random,
            doing: BTreeMap::new(),
            next_op: 1 + ((volume as u64) << 32),
            next_value: 1,
            window: plan.window,
            blocks: plan.blocks,
            is_stopped: false,
            is_reading: false,
            is_resting: false,
            first_block: 1024 - plan.blocks.min(1024) / 2,
        }
    }

    pub(super) fn stop(&mut self) {
        self.is_stopped = true;
    }

    pub(super) fn is_idle(&self) -> bool {
        self.is_stopped && self.doing.is_empty()
    }

    /// What it uses.
    pub(super) fn blocks(&self) -> std::ops::Range<u64> {
        self.first_block..self.first_block + self.blocks
    }

    pub(super) fn describe(&self) -> String {
        let ops: Vec<_> = self
            .doing
            .values()
            .map(|doing| {
                (doing.request.op, doing.request.lba, doing.request.count, doing.request.values.is_some())
            })
            .collect();
        format!("initiator of volume {}: {ops:?}", self.volume)
    }

    /// A new request, unless it would overlap one in progress.
    fn draw(&mut self) -> Option<ClientRequest> {
        let sectors = self.blocks * SECTORS as u64;
        let count = 1 + self.random.index(16);
        let lba = self.first_block * SECTORS as u64 + self.random.below(sectors - count as u64 + 1);
        // In blocks: a write of a part reads the rest.
        let blocks =
            |lba: u64, count: usize| lba / SECTORS as u64..(lba + count as u64).div_ceil(SECTORS as u64);
        let mine = blocks(lba, count);
        let overlaps = self.doing.values().any(|doing| {
            let other = blocks(doing.request.lba, doing.request.count);
            other.start < mine.end && mine.start < other.end
        });
        if overlaps {
            return None;
        }
        let is_write = self.random.coin() && !self.is_reading;
        let values = is_write.then(|| {
            let first = self.next_value;
            self.next_value += count as u64;
            (first..).take(count).map(|value| value << 8 | self.volume as u64).collect()
        });
        let op = self.next_op;
        self.next_op += 1;
        Some(ClientRequest { op, volume: self.volume, lba, count, values })
    }
}

impl World {
    pub(super) fn client_turn(&mut self, at: usize) {
        let now_ns = self.now_ns();
        let client = &mut self.clients[at];
        let mut send = Vec::new();
        for doing in client.doing.values_mut() {
            if now_ns >= doing.sent_ns + RESEND_NS {
                doing.sent_ns = now_ns;
                send.push(doing.request.clone());
            }
        }
        if !client.is_stopped
            && !client.is_resting
            && client.doing.len() < client.window
            && let Some(request) = client.draw()
        {
            let action = request.values.clone().map_or(Action::Read(request.count), Action::Write);
            self.history.begin(
                now_ns,
                OpId(request.op),
                VolumeId(request.volume as u64),
                request.lba,
                action,
            );
            client.doing.insert(request.op, Doing { request: request.clone(), sent_ns: now_ns });
            send.push(request);
        }
        let pause_ns = if client.is_stopped { 50_000_000 } else { client.random.range(200_000..8_000_000) };
        let (endpoint, source) = (client.endpoint, mac_of_client(at));
        let destination = if self.plan.is_flooded { unlearned_mac_of_volume(at) } else { mac_of_volume(at) };
        for request in send {
            self.network.transmit(now_ns, endpoint, SEGMENT, source, destination, &Travels::Client(request));
        }
        self.schedule.after(pause_ns, Event::Client { client: at });
    }

    pub(super) fn client_reply(&mut self, at: usize, reply: ClientReply) -> Result<(), Wrong> {
        let now_ns = self.now_ns();
        let client = &mut self.clients[at];
        let Some(_) = client.doing.remove(&reply.op) else { return Ok(()) };
        self.coverage.answered += 1;
        let outcome = match reply.result {
            Ok(Some(values)) => Outcome::Read(values),
            Ok(None) => Outcome::Written,
            Err(failure) => {
                self.coverage.failed += 1;
                // Only rot takes the last good copy, and only a device that fails keeps the sole copy from being written.
                let excuse = match failure {
                    Failure::Unreadable => Some(Trouble::Rot),
                    Failure::Unwritable => Some(Trouble::BadDisk),
                    Failure::NoSpace => None,
                };
                if excuse.is_none_or(|excuse| !self.plan.may(excuse)) {
                    return Err(Wrong::new(Checker::Errors, format!("initiator {at} is told: {failure}")));
                }
                Outcome::Failed
            }
        };
        let op = reply.op;
        self.note(|| format!("initiator {at} op {op} {outcome:?}"));
        self.history
            .end(now_ns, OpId(op), &outcome)
            .map_err(|violation| Wrong::new(Checker::History, violation.to_string()))
    }

    /// An initiator ends, and another one begins.
    pub(super) fn abandon(&mut self, at: usize) {
        let now_ns = self.now_ns();
        let doing = std::mem::take(&mut self.clients[at].doing);
        self.history.abandon(now_ns, |op| doing.contains_key(&op.0));
    }

    /// A head answers an initiator.
    pub(super) fn reply(&mut self, node: usize, volume: usize, reply: ClientReply) {
        let now_ns = self.now_ns();
        let (source, destination) = (mac_of_volume(volume), mac_of_client(volume));
        self.network.transmit(now_ns, Endpoint(node), SEGMENT, source, destination, &Travels::Reply(reply));
    }

    /// A head makes itself known: the switch learns where the export is.
    pub(super) fn announce(&mut self, node: usize, volume: usize) {
        self.reply(node, volume, ClientReply { op: 0, result: Ok(None) });
    }
}

/// The blocks of a request, with what is written in its place; and the bytes that are kept before and behind.
pub(super) fn to_blocks(request: &ClientRequest) -> (std::ops::Range<u64>, Option<Vec<Block>>, u16, u16) {
    let sectors = SECTORS as u64;
    let end = request.lba + request.count as u64;
    let range = request.lba / sectors..end.div_ceil(sectors);
    let head = (request.lba - range.start * sectors) as u16 * 512;
    let tail = (range.end * sectors - end) as u16 * 512;
    let payload = request.values.as_ref().map(|values| {
        let mut blocks = vec![[0xdead; SECTORS]; (range.end - range.start) as usize];
        for (lba, value) in (request.lba..).zip(values) {
            blocks[(lba / sectors - range.start) as usize][(lba % sectors) as usize] = *value;
        }
        blocks
    });
    (range, payload, head, tail)
}

/// The sectors of a request in the blocks that were read.
pub(super) fn from_blocks(request: &ClientRequest, blocks: &[Block]) -> Vec<u64> {
    let skip = (request.lba % SECTORS as u64) as usize;
    blocks.iter().flatten().copied().skip(skip).take(request.count).collect()
}
