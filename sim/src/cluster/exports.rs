//! A node's exports: which volumes it serves, the frames that come for them, and its answers.
//!
//! As in the data plane, a configuration with the export of a new head is taken on after the receive rings were emptied under the old
//! one (I6), and one is taken on when no request of the one before the last is left.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use aoe_xdp::link::{Pool, RxFrame, Segment, Segments};
use aoe_xdp::target::{
    self, Action, AoePolicy, BODY_LEN_MAX, Export, ExportTable, Ingress, ON_ALL_INTERFACES, ReplyHead, Route,
};
use aoe_xdp::wire::{self, Address, Mac};
use torus_dataplane::exchange::{Backing, Served};
use torus_dataplane::serving::{Answer, Arrival};
use torus_dataplane::store::BLOCK_BYTES;
use torus_replication::terms::{EXTENT_BLOCKS, Generation};

use super::node::Process;
use super::sectors::SECTORS;
use super::{Checker, Event, Travels, World, volume_id};
use crate::network::{Endpoint, SegmentId};

/// Segments that a node has an interface to.
pub(super) const INTERFACES: u8 = 2;
/// How long the manager takes from a head to its export.
const CONFIGURE_NS: std::ops::Range<u64> = 200_000..20_000_000;
/// When it looks again whether a configuration can be taken on.
const AGAIN_NS: u64 = 1_000_000;
/// Sectors of a volume.
pub(super) const SIZE_SECTORS: u64 = 1 << 24;
/// How long a frame lies in the ring before it is looked at, at most.
const RING_NS: u64 = 20_000;

/// The address of a volume's export.
pub(super) fn address_of(volume: usize) -> Address {
    Address { shelf: 1, slot: volume as u8 }
}

/// The MAC of a volume's export on an interface.
pub(super) fn mac_of(volume: usize, interface: u8) -> Mac {
    Mac([0x02, 0xee, 0, 0, volume as u8, interface])
}

/// The MAC of a node's own interface.
pub(super) fn ingress_of(node: usize) -> Vec<Ingress> {
    let of_interface = |ordinal| Ingress {
        mac: Mac([0x02, 0xdd, 0, 0, node as u8, ordinal]),
        ordinal,
        sectors_max: 16,
        sectors_told: 16,
    };
    (0..INTERFACES).map(of_interface).collect()
}

/// A MAC, as the network has it.
pub(super) fn station(mac: Mac) -> crate::network::Mac {
    let [a, b, c, d, e, f] = mac.0;
    crate::network::Mac(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
}

/// A MAC, as a frame has it.
pub(super) fn mac_of_station(mac: crate::network::Mac) -> Mac {
    let [_, _, a, b, c, d, e, f] = mac.0.to_be_bytes();
    Mac([a, b, c, d, e, f])
}

/// What a request that a node has taken in asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    volume: usize,
    first_block: u64,
    last_block: u64,
}

/// Which request an answer is to: interface, initiator and tag.
pub(super) type AskedKey = (u8, [u8; 6], u32);

/// How far a configuration is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Changing {
    /// The last one has been taken on, and nothing is left from before.
    #[default]
    No,
    /// It is on its way to the core.
    Coming,
    /// Requests from before are left.
    Settling,
}

/// What a node serves.
#[derive(Debug, Default)]
pub(super) struct Exports {
    /// The heads in the configuration, with their take-overs.
    pub(super) heads: BTreeMap<usize, u64>,
    pub(super) table: ExportTable,
    pub(super) served: Vec<Option<Served>>,
    pub(super) changing: Changing,
    /// What is to be served next.
    next: BTreeMap<usize, u64>,
    /// Requests that were taken in and not answered.
    pub(super) asked: BTreeMap<AskedKey, Asked>,
}

fn export(volume: usize) -> Export {
    Export {
        key: volume as u32,
        address: address_of(volume),
        mac: mac_of(volume, 0),
        size_sectors: SIZE_SECTORS,
        read_only: false,
        serial: format!("volume {volume}"),
        config_string: Vec::new(),
        on_interfaces: ON_ALL_INTERFACES,
        masks: Vec::new(),
        reserved_for: Vec::new(),
        allow: AoePolicy::default(),
    }
}

/// A frame in the memory of a node; `None` when there is none.
fn take_frame(pool: &mut Pool, bytes: &[u8]) -> Option<RxFrame> {
    let mut segments = Segments::new();
    for part in bytes.chunks(BLOCK_BYTES) {
        let Some(mut chunk) = pool.take_chunk() else {
            release(pool, segments);
            return None;
        };
        pool.bytes_mut(&mut chunk)[..part.len()].copy_from_slice(part);
        let segment = Segment { chunk, offset: 0, len: part.len() as u16 };
        segments.push(segment).expect("a jumbo frame has three parts");
    }
    Some(RxFrame::new(segments))
}

fn release(pool: &mut Pool, segments: Segments) {
    segments.into_iter().for_each(|segment| pool.release(segment.chunk));
}

impl World {
    /// The manager gives a node's core a configuration with these heads.
    pub(super) fn begin_configuration(&mut self, node: usize, heads: BTreeMap<usize, u64>) {
        let at = &mut self.nodes[node];
        let life = at.life;
        let Some(process) = &mut at.process else { return };
        process.exports.changing = Changing::Coming;
        process.exports.next = heads;
        let delay_ns = at.random.range(CONFIGURE_NS);
        self.schedule.after(delay_ns, Event::Configure { node, life });
    }

    /// A node's core takes a configuration on.
    pub(super) fn configure(&mut self, node: usize, life: u64) {
        let boot_ns = self.boot_ns(node);
        let is_paused = self.network.is_paused(Endpoint(node));
        let at = &mut self.nodes[node];
        if at.life != life {
            return;
        }
        let Some(process) = &mut at.process else { return };
        if is_paused || !process.serving.is_settled() {
            self.schedule.after(AGAIN_NS, Event::Configure { node, life });
            return;
        }
        process.exports.changing = Changing::Settling;
        let heads = std::mem::take(&mut process.exports.next);
        let is_new = |(volume, takeover): (&usize, &u64)| process.exports.heads.get(volume) != Some(takeover);
        let announce: Vec<u32> =
            heads.iter().filter(|head| is_new(*head)).map(|(volume, _)| *volume as u32).collect();
        if !announce.is_empty() {
            self.receive(node);
        }
        self.note(|| format!("node {node} exports the heads {heads:?}"));
        let volumes = self.plan.volumes;
        let Some(process) = &mut self.nodes[node].process else { return };
        let exports = &mut process.exports;
        exports.table =
            ExportTable::new(heads.keys().map(|volume| export(*volume)).collect()).expect("one for each");
        let served = |volume: usize| {
            let backing = Backing::Head(volume_id(volume), *heads.get(&volume)?);
            Some(Served { store: 0, backing, owner: 0 })
        };
        exports.served = (0..volumes).map(served).collect();
        let table = &exports.table;
        let kept = |key, address| table.find(address).is_some_and(|export| export.key == key);
        process.serving.clients_mut().keep_only(kept);
        process.serving.begin_configuration();
        process.discovery.announce_heads(announce, boot_ns);
        exports.heads = heads;
        let now_ns = self.now_ns();
        self.manage_by(node, now_ns + AGAIN_NS);
        self.pump(node);
    }

    /// A frame has come by an interface: it lies in the ring until the core looks.
    pub(super) fn frame_comes(&mut self, node: usize, segment: SegmentId, bytes: Rc<[u8]>) {
        let now_ns = self.now_ns();
        let at = &mut self.nodes[node];
        let Some(process) = &mut at.process else { return };
        process.ring.push_back((segment.0 as u8, bytes));
        let at_ns = now_ns + at.random.below(RING_NS);
        self.turn_by(node, at_ns);
    }

    /// Takes everything out of the rings.
    pub(super) fn receive(&mut self, node: usize) {
        while let Some((interface, bytes)) =
            self.nodes[node].process.as_mut().and_then(|process| process.ring.pop_front())
        {
            self.dispatch(node, interface, &bytes);
        }
    }

    fn dispatch(&mut self, node: usize, interface: u8, bytes: &[u8]) {
        let boot_ns = self.boot_ns(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        let Some(frame) = take_frame(&mut process.disk.pool, bytes) else { return };
        let region = Arc::clone(process.disk.pool.region());
        let ingress = process.ingress[usize::from(interface)];
        let mut answers = Vec::new();
        match target::route(&process.exports.table, &ingress, frame.head(&region)) {
            Route::Silent(_) => {}
            Route::Matching(address) => {
                // Where there is no room the initiator asks again.
                let _has_room = process.discovery.ask(interface, address, frame.head(&region));
            }
            Route::One(export) => {
                let export = export.clone();
                match target::respond(&export, &ingress, frame.head(&region), frame.len()) {
                    Action::Io(io) => {
                        process.note_asked(interface, &export, &io, bytes);
                        let (serving, mut around) = process.parts(boot_ns);
                        serving.admit(Arrival { io, export: &export, interface, frame: &frame }, &mut around);
                    }
                    Action::Answer(answer) => answers.push(answer_bytes(&export, &answer, bytes)),
                    Action::Change { .. } | Action::Silent(_) => {}
                }
            }
        }
        release(&mut process.disk.pool, frame.into_segments());
        for answer in answers {
            self.transmit(node, interface, answer.into());
        }
    }

    /// Sends what discovery has to send.
    pub(super) fn discover(&mut self, node: usize) {
        let boot_ns = self.boot_ns(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        let mut answers = Vec::new();
        let advertise_on: Vec<u8> = (0..INTERFACES).collect();
        let Process { discovery, exports, ingress, .. } = process;
        discovery.run(
            boot_ns,
            &exports.table,
            ingress,
            &advertise_on,
            |interface, export, answer, request| {
                answers.push((interface, answer_bytes(export, answer, request)));
            },
        );
        for (interface, answer) in answers {
            self.transmit(node, interface, answer.into());
        }
    }

    /// Sends the answer to a read or a write.
    pub(super) fn send_answer(&mut self, node: usize, answer: Answer) {
        let Some(process) = &mut self.nodes[node].process else { return };
        let Answer { interface, head, data } = answer;
        let region = Arc::clone(process.disk.pool.region());
        let mut bytes = head_bytes(&head).to_vec();
        for segment in data.iter() {
            bytes.extend_from_slice(segment.bytes(&region));
        }
        release(&mut process.disk.pool, data);
        if let Ok(header) = wire::parse_header(&bytes)
            && let Some(asked) = process.exports.asked.remove(&(interface, header.dst.0, header.tag.get()))
            && let Some(generation) = process.generation(asked.volume)
        {
            self.check_order(node, &asked, generation);
        }
        self.transmit(node, interface, bytes.into());
    }

    fn transmit(&mut self, node: usize, interface: u8, bytes: Rc<[u8]>) {
        let now_ns = self.now_ns();
        let Ok(header) = wire::parse_header(&bytes) else { return };
        let (source, destination) = (station(header.src), station(header.dst));
        let segment = SegmentId(usize::from(interface));
        if segment.0 < self.plan.initiator.paths() {
            let frame = Travels::Frame(Rc::clone(&bytes));
            self.network.transmit(now_ns, Endpoint(node), segment, source, destination, &frame);
        }
    }

    /// Whoever answers an initiator is head at that moment: nobody answers when a later one has (I1).
    fn check_order(&mut self, node: usize, asked: &Asked, now: Generation) {
        let spread = self.plan.spread as u64;
        let Asked { volume, first_block, last_block } = *asked;
        for extent in first_block / u64::from(EXTENT_BLOCKS)..=last_block / u64::from(EXTENT_BLOCKS) {
            let highest = self.answered.entry((volume, extent % spread)).or_default();
            if now < *highest {
                let what = format!(
                    "node {node} answers for volume {volume} under generation {now}, after {highest} has answered"
                );
                self.object(Checker::Generations, what);
                return;
            }
            *highest = now;
        }
    }
}

impl Process {
    fn note_asked(&mut self, interface: u8, export: &Export, io: &target::Io, frame: &[u8]) {
        let Ok(header) = wire::parse_header(frame) else { return };
        let last_lba = io.lba + u64::from(io.sectors).max(1) - 1;
        let sectors = SECTORS as u64;
        let volume = export.key as usize;
        let asked = Asked { volume, first_block: io.lba / sectors, last_block: last_lba / sectors };
        self.exports.asked.insert((interface, header.src.0, header.tag.get()), asked);
    }
}

fn head_bytes(head: &ReplyHead) -> &[u8] {
    &head.bytes[..usize::from(head.len)]
}

/// An answer that needs no store.
fn answer_bytes(export: &Export, answer: &target::Answer, request: &[u8]) -> Vec<u8> {
    let mut bytes = head_bytes(&answer.head).to_vec();
    if answer.body != target::Body::Nothing {
        let mut body = [0; BODY_LEN_MAX];
        let len = answer.write_body(export, request, &mut body);
        bytes.extend_from_slice(&body[..len]);
    }
    bytes
}
