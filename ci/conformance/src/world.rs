//! What a case sees: exports, clients, frames out and answers in. The same whether there is a node behind it or the state
//! machine alone.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::frames::{EVERYONE, Mac, Reply, Request};

/// Most sectors of a message, M in the cases: MTU 9000.
pub const SECTORS_MAX: u8 = 16;
/// The client that asks unless a case says otherwise.
pub const CLIENT: Mac = [0x02, 0, 0, 0, 0xc1, 0x10];
/// Another client.
pub const OTHER: Mac = [0x02, 0, 0, 0, 0xc1, 0x20];
/// The client whose questions prove that earlier ones were not answered.
const PROBE: Mac = [0x02, 0, 0, 0, 0xc1, 0xf0];
/// How long a probe is waited for before it is sent again.
const RETRY: Duration = Duration::from_secs(2);
/// How long an answer may take; only what hangs takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// One export of the world.
#[derive(Debug, Clone, Copy)]
pub struct ExportPlan {
    /// Shelf.
    pub shelf: u16,
    /// Slot.
    pub slot: u8,
    /// Size, in sectors.
    pub sectors: u64,
    /// Refuses writes.
    pub read_only: bool,
    /// Everyone may change its config string, mask list and reservation; else nobody may.
    pub open: bool,
}

/// The exports: the one that cases are about, one under the default policy, one that is read-only, and one of 3 TiB that
/// no case changes.
pub const EXPORTS: [ExportPlan; 4] = [
    ExportPlan { shelf: 1, slot: 2, sectors: 32_768, read_only: false, open: true },
    ExportPlan { shelf: 1, slot: 7, sectors: 16_384, read_only: false, open: false },
    ExportPlan { shelf: 9, slot: 3, sectors: 16_384, read_only: true, open: false },
    ExportPlan { shelf: 9, slot: 9, sectors: 3 << 31, read_only: false, open: false },
];
/// [`EXPORTS`] by what they are for.
pub const MAIN: usize = 0;
/// The one under the default policy.
pub const DEFAULT_POLICY: usize = 1;
/// The read-only one.
pub const READ_ONLY: usize = 2;
/// The large one.
pub const LARGE: usize = 3;

/// What carries frames, and what can be done to the target from outside.
pub trait Carrier {
    /// The MAC of an export.
    fn export_mac(&self, export: usize) -> Mac;
    /// The MAC of the interface itself.
    fn interface_mac(&self) -> Mac;
    /// Sends a frame.
    fn send(&mut self, frame: &[u8]);
    /// The next frame, if one comes in time.
    fn receive(&mut self, within: Duration) -> Option<Vec<u8>>;
    /// The tag before a range of tags that nobody else uses.
    fn fresh_tags(&mut self) -> u32;
    /// Ends the target without warning and starts it again.
    fn crash(&mut self);
}

/// A target and the clients of one case.
pub struct World<'c> {
    /// What carries frames.
    pub carrier: &'c mut dyn Carrier,
    next_tag: u32,
    inbox: VecDeque<Vec<u8>>,
}

impl<'c> World<'c> {
    /// The world of a fresh target.
    #[must_use]
    pub fn new(carrier: &'c mut dyn Carrier) -> World<'c> {
        let next_tag = carrier.fresh_tags();
        World { carrier, next_tag, inbox: VecDeque::new() }
    }

    /// Addresses a request to an export, from [`CLIENT`], with a tag of its own.
    pub fn to(&mut self, export: usize, request: Request) -> Request {
        self.next_tag += 1;
        let plan = EXPORTS[export];
        let (dst, tag) = (self.carrier.export_mac(export), self.next_tag);
        Request { dst, src: CLIENT, shelf: plan.shelf, slot: plan.slot, tag, ..request }
    }

    /// The same to the export that cases are about.
    pub fn main(&mut self, request: Request) -> Request {
        self.to(MAIN, request)
    }

    /// Sends a request as it is.
    pub fn send(&mut self, request: &Request) {
        self.carrier.send(&request.bytes());
    }

    /// The answer of the export that cases are about.
    pub fn ask(&mut self, request: Request) -> Reply {
        let request = self.main(request);
        self.ask_as_is(&request)
    }

    /// The one answer to a request, sent as it is.
    pub fn ask_as_is(&mut self, request: &Request) -> Reply {
        self.ask_all(request, 1).remove(0)
    }

    /// All answers to a request, sent as it is: exactly so many.
    pub fn ask_all(&mut self, request: &Request, count: usize) -> Vec<Reply> {
        self.send(request);
        let mut replies: Vec<Reply> = (0..count).map(|_| self.answer(request)).collect();
        self.settle();
        while let Some(more) = self.take(request.tag) {
            replies.push(Reply(more));
        }
        assert_eq!(replies.len(), count, "one answer for each export");
        replies
    }

    /// The next answer to a request that was sent.
    pub fn answer(&mut self, request: &Request) -> Reply {
        let Some(frame) = self.wait(request.tag) else { panic!("no answer to {request:02x?}") };
        check(request, &frame);
        Reply(frame)
    }

    /// The answer to a request that was sent, if it has come.
    pub fn answered(&mut self, request: &Request) -> Option<Reply> {
        let frame = self.take(request.tag)?;
        check(request, &frame);
        Some(Reply(frame))
    }

    /// Waits for the answers to requests that were sent; their places among all that have come.
    pub fn order_of(&mut self, requests: &[&Request]) -> Vec<usize> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let place = |request: &&Request| {
                self.inbox.iter().position(|frame| frame[20..24] == request.tag.to_be_bytes())
            };
            let places: Vec<usize> = requests.iter().filter_map(place).collect();
            if places.len() == requests.len() {
                return places;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "answers are missing");
            self.inbox.extend(self.carrier.receive(left));
        }
    }

    /// Proves that a request, sent as it is, is not answered.
    pub fn silence(&mut self, request: &Request) {
        self.silence_of_bytes(&request.bytes());
    }

    /// The same for any bytes.
    pub fn silence_of_bytes(&mut self, bytes: &[u8]) {
        self.carrier.send(bytes);
        self.settle();
        let answers: Vec<_> = self.inbox.drain(..).filter(|frame| frame[20..24] != [0; 4]).collect();
        assert!(answers.is_empty(), "answered: {answers:02x?}");
    }

    /// Waits until everything that was asked before has been answered, if it ever will be. A target that was flooded may
    /// drop a probe: then it is sent again.
    pub fn settle(&mut self) {
        let plan = EXPORTS[LARGE];
        let deadline = Instant::now() + PATIENCE;
        let everyone = Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, ..Request::config(0, b"") };
        let dst = self.carrier.export_mac(LARGE);
        // A read too, behind what the disk has to do.
        let read = Request { dst, shelf: plan.shelf, slot: plan.slot, ..Request::read(0, 1) };
        for probe in [everyone, read] {
            loop {
                assert!(Instant::now() < deadline, "the target does not answer a probe");
                self.next_tag += 1;
                let probe = Request { src: PROBE, tag: self.next_tag, ..probe.clone() };
                self.send(&probe);
                // Exports answer in order of address, and the large one has the highest.
                let mut last = self.wait_within(probe.tag, RETRY);
                while last
                    .as_ref()
                    .is_some_and(|frame| Reply(frame.clone()).address() != (plan.shelf, plan.slot))
                {
                    last = self.wait_within(probe.tag, RETRY);
                }
                if last.is_some() {
                    break;
                }
            }
        }
        // Late answers to probes are no answers to anything else.
        self.inbox.retain(|frame| frame[..6] != PROBE);
    }

    /// The next unasked frame, a response with tag 0.
    pub fn advertisement(&mut self) -> Reply {
        Reply(self.wait(0).expect("an advertisement"))
    }

    /// Forgets what has been received.
    pub fn forget(&mut self) {
        self.settle();
        self.inbox.clear();
    }

    /// What an export holds.
    pub fn content(&mut self, export: usize, lba: u64, count: u8) -> Vec<u8> {
        let request = self.to(export, Request::read(lba, count));
        self.ask_as_is(&request).sectors(usize::from(count)).to_vec()
    }

    fn take(&mut self, tag: u32) -> Option<Vec<u8>> {
        let at = self.inbox.iter().position(|frame| frame[20..24] == tag.to_be_bytes())?;
        self.inbox.remove(at)
    }

    fn wait(&mut self, tag: u32) -> Option<Vec<u8>> {
        self.wait_within(tag, PATIENCE)
    }

    fn wait_within(&mut self, tag: u32, within: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(frame) = self.take(tag) {
                return Some(frame);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            if let Some(frame) = self.carrier.receive(left) {
                // Linux's tools throw shorter ones away.
                assert!(frame.len() >= 60, "shorter than an Ethernet frame: {frame:02x?}");
                self.inbox.push_back(frame);
            }
        }
    }
}

/// What every answer has.
fn check(request: &Request, frame: &[u8]) {
    let reply = Reply(frame.to_vec());
    assert_eq!(reply.dst(), request.src);
    assert_eq!(frame[12..14], [0x88, 0xa2]);
    assert_eq!(reply.version_flags() & 0xfb, 0x18, "a response of version 1, reserved bits clear");
    assert_eq!((reply.command(), reply.tag()), (request.command, request.tag));
    let (shelf, slot) = reply.address();
    assert!(shelf != 0xffff && slot != 0xff, "never the wildcard");
    assert!(request.shelf == 0xffff || request.shelf == shelf);
    assert!(request.slot == 0xff || request.slot == slot);
    if reply.error() == 0 && reply.command() == 0 && reply.0.len() == 60 {
        assert!(frame[36..].iter().all(|&b| b == 0), "padding is zeros");
    }
}
