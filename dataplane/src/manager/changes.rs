//! Changes that initiators ask for, as the manager keeps them: in the map until the control process has carried them out.
//!
//! * A change stands in the observed state until the desired state answers it, or until its initiator no longer waits.
//! * Its outcome goes to the core that asked only when the exports of that desired state are in force.
//! * Ids are never used again: they grow by one from the time at which the process started.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aoe_xdp::target::{self, ChangeOutcome};
use aoe_xdp::wire::{self, Address};
use cluster_map::{Change, ChangeAnswer, ChangeRequest, MAX_CHANGES, MaskEdit, SetRule, VolumeId};

use crate::changes::AskedChange;
use crate::exchange::{Mailbox, Message};

/// How long an initiator is expected to wait.
const PATIENCE: Duration = Duration::from_secs(30);

/// A change that the control process has been asked for.
struct Forwarded {
    request: ChangeRequest,
    core: u16,
    token: u64,
    since: Instant,
}

/// All changes that wait for the control process.
pub(super) struct Changes {
    forwarded: Vec<Forwarded>,
    next_id: u64,
}

impl Changes {
    pub(super) fn new() -> Changes {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let next_id = u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX / 2);
        Changes { forwarded: Vec::new(), next_id }
    }

    /// Takes a request of a core in; `false` if there is no room, or no change in it. `volume_at` finds the volume that is
    /// exported at an address.
    pub(super) fn ask(
        &mut self,
        asked: &AskedChange,
        volume_at: impl FnOnce(Address) -> Option<VolumeId>,
    ) -> bool {
        if self.forwarded.len() >= MAX_CHANGES {
            return false;
        }
        let frame = asked.frame();
        let Ok(header) = wire::parse_header(frame) else { return false };
        let (Some(change), Some(volume)) = (target::change_in(frame), volume_at(header.address())) else {
            return false;
        };
        let request =
            ChangeRequest { id: self.next_id, volume, client: header.src.0, change: for_the_map(change) };
        self.next_id += 1;
        self.forwarded.push(Forwarded {
            request,
            core: asked.core,
            token: asked.token,
            since: Instant::now(),
        });
        true
    }

    /// Hands out what the desired state answers, and forgets what nobody waits for. What a core has no room for is handed
    /// out the next time.
    pub(super) fn hand_out(&mut self, answers: &[ChangeAnswer], mailboxes: &[Mailbox]) {
        self.forwarded.retain(|one| match answers.iter().find(|answer| answer.id == one.request.id) {
            Some(answer) => !tell(mailboxes, one.core, one.token, on_the_wire(answer.outcome)),
            None => one.since.elapsed() < PATIENCE,
        });
    }

    /// What the observed state says of them.
    pub(super) fn observe(&self) -> Vec<ChangeRequest> {
        self.forwarded.iter().map(|one| one.request.clone()).collect()
    }
}

/// Tells a core what became of a change; `false` if it has no room.
pub(super) fn tell(mailboxes: &[Mailbox], core: u16, token: u64, outcome: ChangeOutcome) -> bool {
    let mailbox = &mailboxes[usize::from(core)];
    let sent = mailbox.send(Message::Changed { token, outcome });
    if sent.as_ref().is_ok_and(|sleeps| *sleeps) {
        mailbox.ring_doorbell();
    }
    sent.is_ok()
}

fn for_the_map(change: target::Change) -> Change {
    match change {
        target::Change::SetString { rule, string } => {
            let rule = match rule {
                target::SetRule::IfEmpty => SetRule::IfEmpty,
                target::SetRule::Always => SetRule::Always,
                target::SetRule::Replace { expected } => SetRule::Replace { expected },
            };
            Change::SetString { rule, string }
        }
        target::Change::EditMasks { edits } => {
            let edit = |edit: &target::MaskEdit| MaskEdit {
                position: edit.position,
                add: edit.add,
                mac: edit.mac.0,
            };
            Change::EditMasks { edits: edits.iter().map(edit).collect() }
        }
        target::Change::Reserve { macs, force } => {
            Change::Reserve { macs: macs.iter().map(|mac| mac.0).collect(), force }
        }
    }
}

fn on_the_wire(outcome: cluster_map::ChangeOutcome) -> ChangeOutcome {
    match outcome {
        cluster_map::ChangeOutcome::Done => ChangeOutcome::Done,
        cluster_map::ChangeOutcome::StringPresent => ChangeOutcome::StringPresent,
        cluster_map::ChangeOutcome::MasksFull { position } => ChangeOutcome::MasksFull { position },
        cluster_map::ChangeOutcome::Reserved => ChangeOutcome::Reserved,
        cluster_map::ChangeOutcome::Refused => ChangeOutcome::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: VolumeId = VolumeId([7; 16]);

    /// A forced set of the string "abc" of 1.2.
    fn frame() -> Vec<u8> {
        let mut frame = vec![0; 35];
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        frame[12..24].copy_from_slice(&[0x88, 0xa2, 0x10, 0, 0, 1, 2, 1, 0, 0, 0, 5]);
        frame[29] = 0x14;
        frame[31] = 3;
        frame[32..].copy_from_slice(b"abc");
        frame
    }

    fn asked(token: u64) -> AskedChange {
        AskedChange::new(0, token, &frame()).unwrap()
    }

    fn at_1_2(address: Address) -> Option<VolumeId> {
        (address == Address { shelf: 1, slot: 2 }).then_some(VOLUME)
    }

    #[test]
    fn a_request_stands_until_it_is_answered() {
        let mailboxes = [Mailbox::new().unwrap()];
        let mut changes = Changes::new();
        assert!(changes.ask(&asked(40), at_1_2));
        assert!(changes.ask(&asked(41), at_1_2));
        let observed = changes.observe();
        let [first, second] = &observed[..] else { panic!("{observed:?}") };
        assert_eq!(second.id, first.id + 1);
        assert_eq!((first.volume, first.client), (VOLUME, [2, 0, 0, 0, 0, 9]));
        assert_eq!(first.change, Change::SetString { rule: SetRule::Always, string: b"abc".to_vec() });
        let answer = ChangeAnswer { id: first.id, outcome: cluster_map::ChangeOutcome::Done };
        changes.hand_out(&[answer], &mailboxes);
        assert_eq!(changes.observe(), observed[1..]);
        let Some(Message::Changed { token: 40, outcome: ChangeOutcome::Done }) = mailboxes[0].receive()
        else {
            panic!()
        };
        // The answer of what is gone is nothing.
        changes.hand_out(&[answer], &mailboxes);
        assert!(mailboxes[0].receive().is_none());
    }

    #[test]
    fn there_is_room_for_so_many_and_for_known_exports_only() {
        let mut changes = Changes::new();
        assert!(!changes.ask(&asked(0), |_| None));
        for token in 0..MAX_CHANGES as u64 {
            assert!(changes.ask(&asked(token), at_1_2));
        }
        assert!(!changes.ask(&asked(99), at_1_2));
        assert_eq!(changes.observe().len(), MAX_CHANGES);
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_forgotten() {
        let mut changes = Changes::new();
        assert!(changes.ask(&asked(0), at_1_2));
        changes.forwarded[0].since = Instant::now().checked_sub(PATIENCE).unwrap();
        changes.hand_out(&[], &[]);
        assert!(changes.observe().is_empty());
    }
}
