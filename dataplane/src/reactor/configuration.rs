//! What the manager tells a core: exports, stores, and the end.
//!
//! * A request admitted under a configuration that is gone starts under the one in force, or not at all.
//! * The manager frees nothing that a request may still name: it waits until none of an older configuration is left.

use std::os::fd::AsFd;

use cluster_map::Durability;

use super::{OwnStore, REQUESTS_MAX, Reactor};
use crate::exchange::StoreAccess;
use crate::store::linear::LinearStore;

impl Reactor {
    pub(super) fn take_config(&mut self) -> bool {
        let Some(config) = self.mailboxes[usize::from(self.core)].take_config() else { return false };
        // Stores come and go with the manager, rarely: this may allocate.
        for (at, access) in config.stores.iter().enumerate() {
            if self.stores.len() <= at {
                self.stores.push(None);
            }
            match (access, &self.stores[at]) {
                (Some(access), None) => self.stores[at] = self.open_store(access),
                (None, Some(own)) => {
                    let file = own.file;
                    self.ring.unregister_file(file);
                    self.stores[at] = None;
                }
                _ => {}
            }
        }
        let exports = &config.exports;
        self.clients.keep_only(|key, address| exports.find(address).is_some_and(|export| export.key == key));
        let old = std::mem::replace(&mut self.config, config);
        self.mailboxes[usize::from(self.core)].retire(old);
        self.epoch ^= 1;
        self.settling = true;
        self.announced = 0;
        true
    }

    pub(super) fn open_store(&mut self, access: &StoreAccess) -> Option<OwnStore> {
        let inline = access.durability == Durability::Memory;
        let file = self.ring.register_file(access.file.as_fd()).ok()?;
        Some(OwnStore { file, dsync: access.dsync, inline, store: LinearStore::new(REQUESTS_MAX) })
    }

    /// Tells the manager once no request of an older configuration is left.
    pub(super) fn settle(&mut self) {
        if self.settling && self.requests.of_epoch(self.epoch ^ 1) == 0 {
            self.settling = false;
            self.mailboxes[usize::from(self.core)].set_applied(self.config.version);
        }
    }

    pub(super) fn is_drained(&self) -> bool {
        self.requests.is_empty() && !self.unsent
    }
}
