//! Advertisements: initiators hear of a new export without having to ask.

use std::sync::Arc;

use aoe_xdp::target;

use super::Reactor;

/// Advertisements sent in one turn, so that requests are served between them.
const ADVERTISEMENTS_BATCH: usize = 16;

impl Reactor {
    /// Advertises exports that are new, by the queues that are each interface's first.
    pub(super) fn advertise(&mut self) -> bool {
        if self.announced >= self.config.announce.len() {
            return false;
        }
        let config = Arc::clone(&self.config);
        let end = config.announce.len().min(self.announced + ADVERTISEMENTS_BATCH);
        for &key in &config.announce[self.announced..end] {
            let Some(export) = config.exports.by_key(key) else { continue };
            for at in 0..self.queues.len() {
                if self.queues[at].queue.info().queue == 0 {
                    let interface = self.queues[at].interface;
                    let Some(ingress) = config.ingress.get(usize::from(interface)) else { continue };
                    for to in export.audience().iter().filter(|_| export.is_on(ingress.ordinal)) {
                        self.answer(interface, export, &target::advertisement(export, ingress, *to), &[]);
                    }
                }
            }
        }
        self.announced = end;
        true
    }
}
