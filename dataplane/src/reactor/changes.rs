//! Changes that initiators ask for: kept here until the manager says what became of them, then answered.
//!
//! * Memory is fixed: what finds no room is dropped, and the initiator asks again.
//! * A request that comes again, with whatever tag, while its first copy waits is answered together with that one.
//! * What takes longer than an initiator waits is forgotten. If it is carried out nevertheless, the initiator's next
//!   request finds it done.

use std::sync::Arc;

use aoe_xdp::target::{self, ChangeOutcome};
use aoe_xdp::wire;
use cluster_map::Counter;

use super::Reactor;
use crate::changes::AskedChange;

/// Changes that wait on one core.
const WAITING_MAX: usize = 16;
/// Of them those of one initiator, so that others find room.
const WAITING_OF_CLIENT_MAX: usize = 4;
/// Tags of one request that are answered.
const TAGS_MAX: usize = 8;
/// How long an answer is worth sending.
const PATIENCE_NS: u64 = 30_000_000_000;
/// Where a frame's tag is.
const TAG: std::ops::Range<usize> = 20..24;

struct Waiting {
    asked: AskedChange,
    interface: u8,
    asked_ns: u64,
    tags: [[u8; 4]; TAGS_MAX],
    tag_count: usize,
}

/// What waits for the manager.
pub(super) struct WaitingChanges {
    waiting: Vec<Waiting>,
    next_token: u64,
}

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
enum Admission {
    /// Ask the manager.
    Ask,
    /// It waits already.
    Known,
    /// There is no room.
    Full,
}

impl WaitingChanges {
    pub(super) fn new() -> WaitingChanges {
        WaitingChanges { waiting: Vec::with_capacity(WAITING_MAX), next_token: 0 }
    }

    /// Takes a request in.
    fn admit(&mut self, core: u16, interface: u8, frame: &[u8], now_ns: u64) -> Admission {
        self.waiting.retain(|one| now_ns.saturating_sub(one.asked_ns) < PATIENCE_NS);
        let Some(tag) = frame.get(TAG).and_then(|tag| <[u8; 4]>::try_from(tag).ok()) else {
            return Admission::Full;
        };
        let is_same = |one: &&mut Waiting| {
            let known = one.asked.frame();
            one.interface == interface
                && known[..TAG.start] == frame[..TAG.start]
                && known[TAG.end..] == frame[TAG.end..]
        };
        if let Some(known) = self.waiting.iter_mut().find(is_same) {
            if !known.tags[..known.tag_count].contains(&tag) && known.tag_count < TAGS_MAX {
                known.tags[known.tag_count] = tag;
                known.tag_count += 1;
            }
            return Admission::Known;
        }
        let client = wire::parse_header(frame).map(|header| header.src);
        let of_client =
            |one: &&Waiting| wire::parse_header(one.asked.frame()).map(|header| header.src) == client;
        let has_room = self.waiting.len() < WAITING_MAX
            && self.waiting.iter().filter(of_client).count() < WAITING_OF_CLIENT_MAX;
        let Some(asked) = AskedChange::new(core, self.next_token, frame).filter(|_| has_room) else {
            return Admission::Full;
        };
        self.next_token += 1;
        let mut tags = [[0; 4]; TAGS_MAX];
        tags[0] = tag;
        self.waiting.push(Waiting { asked, interface, asked_ns: now_ns, tags, tag_count: 1 });
        Admission::Ask
    }

    /// Takes out what the manager has an outcome for.
    fn take(&mut self, token: u64) -> Option<Waiting> {
        let at = self.waiting.iter().position(|one| one.asked.token == token)?;
        Some(self.waiting.swap_remove(at))
    }
}

impl Reactor {
    /// Asks the manager for the change that `frame` asks for.
    pub(super) fn ask_for_change(&mut self, interface: u8, frame: &[u8]) {
        match self.changes.admit(self.core, interface, frame, self.now_ns) {
            Admission::Known => {}
            Admission::Full => self.stats.add(Counter::RxDropped, 1),
            Admission::Ask => {
                let newest = self.changes.waiting.last().expect("just taken in");
                if !self.change_queue.push(newest.asked) {
                    self.stats.add(Counter::RxDropped, 1);
                    self.changes.waiting.pop();
                }
            }
        }
    }

    /// Answers a change that has ended, from the export that is in force now.
    pub(super) fn finish_change(&mut self, token: u64, outcome: ChangeOutcome) {
        let Some(mut waiting) = self.changes.take(token) else { return };
        let config = Arc::clone(&self.config);
        let Ok(header) = wire::parse_header(waiting.asked.frame()) else { return };
        let export = config.exports.find(header.address());
        let (Some(export), Some(ingress)) = (export, config.ingress.get(usize::from(waiting.interface)))
        else {
            return;
        };
        for tag in &waiting.tags[..waiting.tag_count] {
            waiting.asked.frame_mut()[TAG].copy_from_slice(tag);
            let frame = waiting.asked.frame();
            if let Some(answer) = target::finish_change(export, ingress, frame, outcome) {
                self.answer(waiting.interface, export, &answer, frame);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(client: u8, tag: u8, what: u8) -> Vec<u8> {
        let mut frame = vec![0; 40];
        frame[11] = client;
        frame[12..14].copy_from_slice(&[0x88, 0xa2]);
        frame[23] = tag;
        frame[39] = what;
        frame
    }

    #[test]
    fn a_repeated_request_waits_with_its_first_copy() {
        let mut changes = WaitingChanges::new();
        assert_eq!(changes.admit(0, 1, &frame(1, 1, 0), 0), Admission::Ask);
        for tag in [2, 2, 1, 3] {
            assert_eq!(changes.admit(0, 1, &frame(1, tag, 0), 5), Admission::Known);
        }
        // Another interface, another initiator, another change: each a request of its own.
        assert_eq!(changes.admit(0, 2, &frame(1, 1, 0), 5), Admission::Ask);
        assert_eq!(changes.admit(0, 1, &frame(2, 1, 0), 5), Admission::Ask);
        assert_eq!(changes.admit(0, 1, &frame(1, 1, 9), 5), Admission::Ask);
        let ended = changes.take(0).unwrap();
        assert_eq!(ended.tags[..ended.tag_count], [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 3]]);
        assert!(changes.take(0).is_none());
    }

    #[test]
    fn one_initiator_cannot_take_all_the_room() {
        let mut changes = WaitingChanges::new();
        let mut taken = 0;
        for what in 0..100 {
            taken += usize::from(changes.admit(0, 0, &frame(1, 1, what), 0) == Admission::Ask);
        }
        assert_eq!(taken, WAITING_OF_CLIENT_MAX);
        for client in 2..100 {
            taken += usize::from(changes.admit(0, 0, &frame(client, 1, 0), 0) == Admission::Ask);
        }
        assert_eq!(taken, WAITING_MAX);
        // Nobody waits for these any more.
        assert_eq!(changes.admit(0, 0, &frame(1, 1, 99), PATIENCE_NS), Admission::Ask);
        assert_eq!(changes.waiting.len(), 1);
    }
}
