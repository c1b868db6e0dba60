//! Connections between nodes: one for what the heads here ask of another node, one for what its heads ask here. Frames travel as on
//! the wire, and what there is no memory for is left until there is.

use std::collections::VecDeque;
use std::rc::Rc;

use aoe_xdp::link::Pool;
use torus_dataplane::replicating::{Outgoing, from_wire, to_wire};
use torus_dataplane::store::release_blocks;
use torus_replication::connection::{Destination, Receiver, Side};
use torus_replication::message::Message;
use torus_replication::wire::Frame;
use torus_uring::Blocks;

use super::node::Process;
use super::{Travels, World, node_of, site_of, volume_of};
use crate::network::{self, ConnectionId, Endpoint, SendError};

/// When a lost connection is tried again.
const RECONNECT_NS: u64 = 100_000_000;
/// When what had no room or no memory is tried again.
const RETRY_NS: u64 = 1_000_000;

/// One connection, at one of its ends.
struct Line {
    connection: ConnectionId,
    is_up: bool,
    /// What has come and was not taken, and how much of the first was.
    unread: VecDeque<Rc<[u8]>>,
    taken_bytes: usize,
    receiver: Receiver<Blocks>,
    /// What had no room.
    unsent: VecDeque<Rc<[u8]>>,
}

impl Line {
    fn new(connection: ConnectionId, from: Side, is_up: bool) -> Line {
        let receiver = Receiver::new(from);
        Line { connection, is_up, unread: VecDeque::new(), taken_bytes: 0, receiver, unsent: VecDeque::new() }
    }
}

/// What leads to another node.
#[derive(Default)]
pub(super) struct Peer {
    /// For what heads here ask.
    out: Option<Line>,
    retry_at_ns: u64,
    /// For what heads there ask.
    incoming: Option<Line>,
}

impl Peer {
    fn line(&mut self, side: Side) -> &mut Option<Line> {
        match side {
            Side::Connecting => &mut self.out,
            Side::Accepting => &mut self.incoming,
        }
    }

    /// Whether nothing waits to be read or sent.
    pub(super) fn is_idle(&self) -> bool {
        let lines = self.out.iter().chain(&self.incoming);
        lines.into_iter().all(|line| line.unread.is_empty() && line.unsent.is_empty())
    }
}

const SIDES: [Side; 2] = [Side::Connecting, Side::Accepting];

/// Where blocks of frames go.
struct Into<'p> {
    pool: &'p mut Pool,
    /// Chunks that are left for others.
    leave_chunks: usize,
}

impl Destination for Into<'_> {
    type Blocks = Blocks;

    fn add(&mut self, blocks: &mut Blocks) -> bool {
        if self.pool.free_chunks() <= self.leave_chunks {
            return false;
        }
        let chunk = self.pool.take_chunk();
        let is_there = chunk.is_some();
        chunk.into_iter().for_each(|chunk| blocks.push(chunk));
        is_there
    }

    fn copy(&mut self, blocks: &mut Blocks, at: usize, bytes: &[u8], crc: u32) -> u32 {
        let last = blocks.len() - 1;
        self.pool.copy_in_checksummed(blocks.get_mut(last), at, bytes, crc)
    }

    fn release(&mut self, blocks: Blocks) {
        release_blocks(self.pool, blocks);
    }
}

impl World {
    pub(super) fn reconnect(&mut self, node: usize) {
        let now_ns = self.now_ns();
        for other in (0..self.plan.nodes).filter(|other| *other != node) {
            let Some(process) = &mut self.nodes[node].process else { return };
            let peer = &mut process.peers[other];
            if peer.out.is_none() && now_ns >= peer.retry_at_ns {
                let connection = self.network.connect(now_ns, Endpoint(node), Endpoint(other));
                peer.out = Some(Line::new(connection, Side::Accepting, false));
            }
        }
    }

    /// Something happens to a node's connections.
    pub(super) fn peer_event(&mut self, node: usize, event: network::Event<Travels>) {
        let now_ns = self.now_ns();
        let boot_ns = self.boot_ns(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        match event {
            network::Event::Connected { connection, .. } => {
                if let Some((other, Side::Connecting)) = process.line_of(connection) {
                    process.peers[other].out.as_mut().expect("it was found").is_up = true;
                    process
                        .with(boot_ns, |replicating, ground| replicating.connected(site_of(other), ground));
                }
            }
            network::Event::ConnectFailed { connection, .. } | network::Event::Closed { connection, .. } => {
                if let Some((other, side)) = process.line_of(connection) {
                    self.lose(node, other, side);
                }
            }
            network::Event::Accepted { connection, from, .. } => {
                let older = process.drop_line(from.0, Side::Accepting);
                process.peers[from.0].incoming = Some(Line::new(connection, Side::Connecting, true));
                process.with(boot_ns, |replicating, ground| replicating.accepted(site_of(from.0), ground));
                if let Some(older) = older {
                    self.network.close(now_ns, Endpoint(node), older);
                }
            }
            network::Event::Message { connection, payload: Travels::Peer(bytes), .. } => {
                if let Some((other, side)) = process.line_of(connection)
                    && let Some(line) = process.peers[other].line(side)
                {
                    line.unread.push_back(bytes);
                }
            }
            network::Event::Message { .. }
            | network::Event::Frame { .. }
            | network::Event::Carrier { .. } => {}
        }
        self.pump(node);
    }

    fn lose(&mut self, node: usize, other: usize, side: Side) {
        let now_ns = self.now_ns();
        let boot_ns = self.boot_ns(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        let was_up = process.peers[other].line(side).as_ref().is_some_and(|line| line.is_up);
        process.drop_line(other, side);
        process.peers[other].retry_at_ns = now_ns + RECONNECT_NS;
        process.with(boot_ns, |replicating, ground| match side {
            Side::Connecting if was_up => replicating.disconnected(site_of(other), ground),
            Side::Connecting => {}
            Side::Accepting => replicating.closed(site_of(other), ground),
        });
    }

    /// Closes a node's connection to another one, as something in between may.
    pub(super) fn reset(&mut self, node: usize, other: usize) {
        let now_ns = self.now_ns();
        let Some(process) = &mut self.nodes[node].process else { return };
        let line = process.peers[other].out.as_ref().map(|line| line.connection);
        if let Some(connection) = line {
            self.network.close(now_ns, Endpoint(node), connection);
            self.lose(node, other, Side::Connecting);
            self.pump(node);
        }
    }

    /// Takes what has come from other nodes, as far as there is memory for it; whether there was anything.
    pub(super) fn read_peers(&mut self, node: usize) -> bool {
        let boot_ns = self.boot_ns(node);
        let mut worked = false;
        for other in 0..self.plan.nodes {
            for side in SIDES {
                while let Some(process) = &mut self.nodes[node].process
                    && let Some((frame, blocks)) = process.next_frame(other, side)
                {
                    let message = from_wire(frame, blocks);
                    process.with(boot_ns, |replicating, ground| match side {
                        Side::Connecting => replicating.answered(site_of(other), message, ground),
                        Side::Accepting => replicating.asked(site_of(other), message, ground),
                    });
                    worked = true;
                }
            }
        }
        worked
    }

    /// Sends what heads and replicas have to say; whether there was anything.
    pub(super) fn send_to_peers(&mut self, node: usize) -> bool {
        let mut worked = false;
        while let Some(outgoing) =
            self.nodes[node].process.as_mut().and_then(|process| process.serving.next_outgoing())
        {
            let (site, message, side) = match outgoing {
                Outgoing::Ask(site, message) => (site, message, Side::Connecting),
                Outgoing::Reply(site, message) => (site, message, Side::Accepting),
            };
            let to = node_of(site.node);
            self.note(|| format!("node {node} to {to}: {}", brief(&message)));
            let Some(process) = &mut self.nodes[node].process else { return worked };
            let pool = &mut process.disk.pool;
            let (frame, blocks) = to_wire(message, pool);
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            blocks.iter().for_each(|chunk| bytes.extend_from_slice(pool.region().bytes(chunk)));
            release_blocks(pool, blocks);
            if let Some(line) = process.peers[to].line(side).as_mut().filter(|line| line.is_up) {
                line.unsent.push_back(bytes.into());
                self.send_unsent(node, to, side);
            }
            worked = true;
        }
        worked
    }

    /// Sends what had no room on a connection.
    fn send_unsent(&mut self, node: usize, to: usize, side: Side) {
        let now_ns = self.now_ns();
        let Some(process) = &mut self.nodes[node].process else { return };
        let Some(line) = process.peers[to].line(side) else { return };
        while let Some(bytes) = line.unsent.pop_front() {
            let message = Travels::Peer(Rc::clone(&bytes));
            match self.network.send(now_ns, Endpoint(node), line.connection, message) {
                Ok(()) => {}
                Err(SendError::Full) => {
                    line.unsent.push_front(bytes);
                    return;
                }
                Err(SendError::Closed) => {
                    // It will be told so; what is asked now is asked again on the next one.
                    line.unsent.clear();
                }
            }
        }
    }

    /// Sends on connections that had no room before, and has what waits for memory or room looked at again.
    pub(super) fn retry_peers(&mut self, node: usize) {
        for other in 0..self.plan.nodes {
            SIDES.into_iter().for_each(|side| self.send_unsent(node, other, side));
        }
        let now_ns = self.now_ns();
        let Some(process) = &self.nodes[node].process else { return };
        if !process.peers.iter().all(Peer::is_idle) {
            self.turn_by(node, now_ns + RETRY_NS);
        }
    }
}

impl Process {
    /// Which connection that is.
    fn line_of(&self, connection: ConnectionId) -> Option<(usize, Side)> {
        let is = |line: &Option<Line>| line.as_ref().is_some_and(|line| line.connection == connection);
        self.peers.iter().enumerate().find_map(|(other, peer)| {
            let side = if is(&peer.out) { Some(Side::Connecting) } else { None };
            side.or(is(&peer.incoming).then_some(Side::Accepting)).map(|side| (other, side))
        })
    }

    /// Forgets a connection and what came by it in part.
    fn drop_line(&mut self, other: usize, side: Side) -> Option<ConnectionId> {
        let mut line = self.peers[other].line(side).take()?;
        line.receiver.end(&mut Into { pool: &mut self.disk.pool, leave_chunks: 0 });
        Some(line.connection)
    }

    /// The next whole frame of a connection, if it may be taken and there is memory for it.
    fn next_frame(&mut self, other: usize, side: Side) -> Option<(Frame, Blocks)> {
        if side == Side::Accepting && !self.serving.serves_site(site_of(other)) {
            return None;
        }
        let leave_chunks = if side == Side::Accepting { self.requests_leave_chunks } else { 0 };
        let mut into = Into { pool: &mut self.disk.pool, leave_chunks };
        let line = self.peers[other].line(side).as_mut()?;
        while let Some(bytes) = line.unread.front() {
            let (taken, frame) = line
                .receiver
                .take(&bytes[line.taken_bytes..], &mut into)
                .expect("nothing changes what travels here");
            line.taken_bytes += taken;
            if line.taken_bytes == bytes.len() {
                line.unread.pop_front();
                line.taken_bytes = 0;
            }
            if frame.is_some() || taken == 0 {
                return frame;
            }
        }
        None
    }
}

fn brief<B: std::fmt::Debug>(message: &Message<B>) -> String {
    let cut = |text: String| text.chars().take(120).collect::<String>();
    match message {
        Message::Request(request) => format!(
            "vol {} gen {} id {} stable {} {}",
            volume_of(request.volume),
            request.generation,
            request.id,
            request.stable.0,
            cut(format!("{:?}", request.ask))
        ),
        Message::Answer(answer) => format!(
            "vol {} gen {} id {} {}",
            volume_of(answer.volume),
            answer.generation,
            answer.id,
            cut(format!("{:?}", answer.reply))
        ),
        other => cut(format!("{other:?}")),
    }
}
