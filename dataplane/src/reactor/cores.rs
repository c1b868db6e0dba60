//! Other cores: frames, answers and chunks go to the core that owns the export, the queue or the chunk.

use std::sync::Arc;

use aoe_xdp::link::{Chunk, Region, Segments};
use aoe_xdp::target::{self, Route};
use cluster_map::Counter;
use torus_uring::Ring;

use super::{Reactor, served};
use crate::exchange::{Mailbox, Message};

/// Messages of other cores taken in one go.
const MESSAGES_BATCH: usize = 256;

impl Reactor {
    pub(super) fn hand_over(&mut self, core: u16, message: Message) {
        let mailbox = &self.mailboxes[usize::from(core)];
        match mailbox.send(message) {
            Ok(false) => {}
            Ok(true) => {
                if let Some(handle) = mailbox.wake_handle() {
                    self.ring.wake(handle);
                }
            }
            Err(Message::Serve { frame, .. }) => {
                self.stats.add(Counter::RxDropped, 1);
                self.give_back(frame.into_segments());
            }
            Err(Message::Send { data, .. }) => {
                self.stats.add(Counter::TxRingFull, 1);
                self.give_back(data);
            }
            Err(
                Message::TakeBack(_)
                | Message::Changed { .. }
                | Message::Unmap { .. }
                | Message::Replicate(_)
                | Message::Scrub { .. },
            ) => {
                unreachable!("chunks go home by `send_home`, and the rest comes from the manager")
            }
        }
    }

    pub(super) fn take_messages(&mut self) -> bool {
        let config = Arc::clone(&self.config);
        let region = Arc::clone(&self.region);
        let mut worked = false;
        for _ in 0..MESSAGES_BATCH {
            let Some(message) = self.mailboxes[usize::from(self.core)].receive() else { break };
            worked = true;
            match message {
                Message::TakeBack(chunk) => self.pool.release(chunk),
                Message::Send { interface, head, data } => self.send(interface, &head, data),
                Message::Changed { token, outcome } => self.finish_change(token, outcome),
                Message::Unmap { store, object, from_block } => self.serving.unmap(store, object, from_block),
                Message::Scrub { store, task } => self.serving.set_scrub(store, task),
                Message::Replicate(order) => self.obey(*order),
                Message::Serve { interface, frame } => {
                    // Routed again: the sender may have had another configuration.
                    if let Some(ingress) = config.ingress.get(usize::from(interface))
                        && let Route::One(export) =
                            target::route(&config.exports, ingress, frame.head(&region))
                        && served(&config, export.key).is_some_and(|served| served.owner == self.core)
                        && !config.drain
                    {
                        let action = target::respond(export, ingress, frame.head(&region), frame.len());
                        self.act(interface, export, action, &frame);
                    }
                    self.give_back(frame.into_segments());
                }
            }
        }
        worked
    }

    /// Gives chunks back to their owners.
    pub(super) fn give_back(&mut self, segments: Segments) {
        for segment in segments {
            if self.pool.owns(&segment.chunk) {
                self.pool.release(segment.chunk);
            } else {
                send_home(&self.mailboxes, &self.region, &mut self.ring, segment.chunk);
            }
        }
    }
}

/// Sends a chunk to the core that owns it. Its letter box is emptied by a core that never waits for this one, so a full
/// box empties soon; one that stays full is that of a core that has ended, and takes its chunks with it.
pub(super) fn send_home(mailboxes: &[Mailbox], region: &Region, ring: &mut Ring, chunk: Chunk) {
    let mailbox = &mailboxes[usize::from(region.owner(&chunk))];
    const TRIES: u32 = 1 << 20;
    let mut message = Message::TakeBack(chunk);
    for _ in 0..TRIES {
        match mailbox.send(message) {
            Ok(false) => return,
            Ok(true) => {
                if let Some(handle) = mailbox.wake_handle() {
                    ring.wake(handle);
                }
                return;
            }
            Err(refused) => {
                message = refused;
                std::hint::spin_loop();
            }
        }
    }
    std::mem::forget(message);
}
