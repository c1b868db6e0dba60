//! Frames in: whose a frame is, and the answers that need no store.

use std::sync::Arc;

use aoe_xdp::identify::IDENTIFY_LEN;
use aoe_xdp::link::{Region, RxFrame, Segments};
use aoe_xdp::target::{self, Action, Export, ReplyHead, Route};
use cluster_map::Counter;

use super::{Reactor, served};
use crate::exchange::{CoreConfig, Message};

impl Reactor {
    pub(super) fn receive(&mut self) -> bool {
        let (config, region) = (Arc::clone(&self.config), Arc::clone(&self.region));
        let mut frames = std::mem::take(&mut self.received);
        let mut worked = false;
        for at in 0..self.queues.len() {
            let own = &mut self.queues[at];
            let interface = own.interface;
            own.queue.receive(&mut self.pool, &mut frames);
            worked |= !frames.is_empty();
            for frame in frames.drain(..) {
                self.stats.add(Counter::RxFrames, 1);
                self.stats.add(Counter::RxBytes, frame.len() as u64);
                self.dispatch(&config, &region, interface, frame);
            }
        }
        self.received = frames;
        worked
    }

    /// Finds out whose a frame is.
    pub(super) fn dispatch(&mut self, config: &CoreConfig, region: &Region, interface: u8, frame: RxFrame) {
        // Before the first configuration nothing is served.
        let Some(ingress) = config.ingress.get(usize::from(interface)) else {
            self.give_back(frame.into_segments());
            return;
        };
        match target::route(&config.exports, ingress, frame.head(region)) {
            Route::Silent(_) => self.stats.add(Counter::RxInvalid, 1),
            Route::Matching(address) => {
                for export in config.exports.exports().iter().filter(|export| address.matches(export.address))
                {
                    let action = target::respond(export, ingress, frame.head(region), frame.len());
                    self.answer(interface, export, action);
                }
            }
            Route::One(export) => match served(config, export.key) {
                Some(served) if served.owner == self.core => {
                    let action = target::respond(export, ingress, frame.head(region), frame.len());
                    self.act(interface, export, action, &frame);
                }
                Some(served) => {
                    let owner = served.owner;
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
            Action::Io(io) => self.admit(interface, export, io, frame),
            other => self.answer(interface, export, other),
        }
    }

    /// Sends an answer that needs no store.
    pub(super) fn answer(&mut self, interface: u8, export: &Export, action: Action) {
        match action {
            Action::Silent(_) => self.stats.add(Counter::RxInvalid, 1),
            Action::Reply(head) => {
                self.count_reply(&head);
                self.send(interface, &head, Segments::new());
            }
            Action::Identify(head) => {
                self.stats.add(Counter::Identifies, 1);
                let mut data = [0; IDENTIFY_LEN];
                export.identify(&mut data);
                self.send_bytes(interface, &head, &data);
            }
            Action::ConfigString(head) => {
                self.stats.add(Counter::Configs, 1);
                self.send_bytes(interface, &head, &export.config_string);
            }
            // Only exact addresses give I/O, and those go through `act`.
            Action::Io(_) => self.stats.add(Counter::RxInvalid, 1),
        }
    }

    pub(super) fn count_reply(&mut self, head: &ReplyHead) {
        use aoe_xdp::wire::{ata, command, parse_ata};
        let Ok(reply) = parse_ata(&head.bytes) else { return };
        if reply.header.command == command::CONFIG {
            self.stats.add(Counter::Configs, 1);
        } else if reply.header.command == command::ATA && reply.arg.command_status & ata::STATUS_ERR != 0 {
            self.stats.add(Counter::AtaErrors, 1);
        }
    }
}
