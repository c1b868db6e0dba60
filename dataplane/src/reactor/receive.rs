//! Frames in: whose a frame is, and the answers that need no store.

use std::sync::Arc;

use aoe_xdp::link::{Region, RxFrame, Segments};
use aoe_xdp::target::{self, Action, Answer, BODY_LEN_MAX, Body, Export, Route};
use cluster_map::Counter;

use super::cores::send_home;
use super::{Reactor, served};
use crate::exchange::{CoreConfig, Message};
use crate::serving::Arrival;

impl Reactor {
    pub(super) fn receive(&mut self) -> bool {
        let (config, region) = (Arc::clone(&self.config), Arc::clone(&self.region));
        let mut frames = std::mem::take(&mut self.received);
        let mut worked = false;
        for at in 0..self.queues.len() {
            self.queues[at].queue.receive(&mut self.pool, &mut frames);
            worked |= self.dispatch_all(&config, &region, &mut frames);
        }
        for at in 0..self.lanes.len() {
            let (mailboxes, ring) = (&self.mailboxes, &mut self.ring);
            let home = |chunk| send_home(mailboxes, &region, ring, chunk);
            self.lanes[at].lane.receive(&mut frames, home);
            worked |= self.dispatch_all(&config, &region, &mut frames);
        }
        self.received = frames;
        worked
    }

    /// Goes through what was received; whether there was anything.
    fn dispatch_all(&mut self, config: &CoreConfig, region: &Region, frames: &mut Vec<RxFrame>) -> bool {
        let worked = !frames.is_empty();
        for frame in frames.drain(..) {
            self.stats.add(Counter::RxFrames, 1);
            self.stats.add(Counter::RxBytes, frame.len() as u64);
            self.dispatch(config, region, frame.interface(), frame);
        }
        worked
    }

    /// Finds out whose a frame is.
    pub(super) fn dispatch(&mut self, config: &CoreConfig, region: &Region, interface: u8, frame: RxFrame) {
        // Before the first configuration nothing is served, nor where the MTU is too small for any answer.
        let ingress = config.ingress.get(usize::from(interface)).filter(|ingress| ingress.sectors_max > 0);
        let Some(ingress) = ingress else {
            self.give_back(frame.into_segments());
            return;
        };
        match target::route(&config.exports, ingress, frame.head(region)) {
            Route::Silent(_) => self.stats.add(Counter::RxInvalid, 1),
            Route::Matching(address) => {
                let discovery = self.discovery.as_mut();
                if !discovery.is_some_and(|jobs| jobs.ask(interface, address, frame.head(region))) {
                    self.stats.add(Counter::RxDropped, 1);
                }
            }
            Route::One(export) => match served(config, export.key) {
                Some(served) if served.owner == self.core => {
                    let action = target::respond(export, ingress, frame.head(region), frame.len());
                    self.act(interface, export, action, &frame);
                }
                Some(served) => {
                    let owner = served.owner;
                    self.stats.add(Counter::HandedOver, 1);
                    self.hand_over(owner, Message::Serve { interface, frame });
                    return;
                }
                None => self.stats.add(Counter::RxInvalid, 1),
            },
        }
        self.give_back(frame.into_segments());
    }

    /// Carries out what the target decided for an export of this core.
    pub(super) fn act(&mut self, interface: u8, export: &Export, action: Action, frame: &RxFrame) {
        match action {
            Action::Io(io) => self.admit(Arrival { io, export, interface, frame }),
            Action::Answer(answer) => {
                let region = Arc::clone(&self.region);
                self.answer(interface, export, &answer, frame.head(&region));
            }
            Action::Change { frame_len } => {
                let region = Arc::clone(&self.region);
                match frame.head(&region).get(..frame_len) {
                    Some(request) => self.ask_for_change(interface, request),
                    None => self.stats.add(Counter::RxInvalid, 1),
                }
            }
            Action::Silent(_) => self.stats.add(Counter::RxInvalid, 1),
        }
    }

    /// Sends an answer that needs no store. `request` is what it answers.
    pub(super) fn answer(&mut self, interface: u8, export: &Export, answer: &Answer, request: &[u8]) {
        self.count_answer(answer);
        if answer.body == Body::Nothing {
            self.send(interface, &answer.head, Segments::new());
            return;
        }
        let mut body = [0; BODY_LEN_MAX];
        let len = answer.write_body(export, request, &mut body);
        self.send_bytes(interface, &answer.head, &body[..len]);
    }

    fn count_answer(&mut self, answer: &Answer) {
        use aoe_xdp::wire::{ata, command, parse_ata};
        let Ok(head) = parse_ata(&answer.head.bytes) else { return };
        match head.header.command {
            command::CONFIG => self.stats.add(Counter::Configs, 1),
            command::ATA if answer.body == Body::Identify => self.stats.add(Counter::Identifies, 1),
            command::ATA if !head.header.is_error() && head.arg.command_status & ata::STATUS_ERR != 0 => {
                self.stats.add(Counter::AtaErrors, 1);
            }
            _ => {}
        }
    }
}
