//! Discovery: wildcard queries and advertisements, a few in each turn, after reads and writes.
//!
//! The core whose queue a query came by answers for all exports of the node: every export once, whichever core owns it.

use std::sync::Arc;

use super::Reactor;

impl Reactor {
    /// Sends what discovery has to send now; whether there was anything.
    pub(super) fn discover(&mut self) -> bool {
        // Taken out, so that answers can be sent by the rest of the reactor meanwhile.
        let Some(mut discovery) = self.discovery.take() else { return false };
        let (config, advertise_on) = (Arc::clone(&self.config), Arc::clone(&self.advertise_on));
        let worked = discovery.run(
            self.now_ns,
            &config.exports,
            &config.ingress,
            &advertise_on,
            |interface, export, answer, request| {
                // Where the MTU is too small for any answer, nothing is served.
                let ingress = config.ingress.get(usize::from(interface));
                if ingress.is_some_and(|ingress| ingress.sectors_max > 0) {
                    self.answer(interface, export, answer, request);
                }
            },
        );
        self.discovery = Some(discovery);
        worked
    }

    /// Whether something is left to send, at its pace.
    pub(super) fn is_discovering(&self) -> bool {
        self.discovery.as_ref().is_some_and(|discovery| discovery.is_busy())
    }
}
