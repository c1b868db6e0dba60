//! What the manager tells a core: exports, stores, and the end.
//!
//! * A request admitted under a configuration that is gone starts under the one in force, or not at all.
//! * The manager frees nothing that a request may still name: it waits until none of an older configuration is left.

use std::os::fd::AsFd;

use cluster_map::Durability;

use super::devices::OwnDevice;
use super::{Reactor, served};
use crate::exchange::{Backing, CoreConfig, Served, StoreAccess, core_of_shard};

/// Batches that receive rings hold at most, several times over: frames that come meanwhile are not meant.
const EMPTYING_ROUNDS_MAX: u32 = 1024;

impl Reactor {
    pub(super) fn take_config(&mut self) -> bool {
        let Some(config) = self.mailboxes[usize::from(self.core)].take_config() else { return false };
        self.empty_rings(&config);
        // Stores come and go with the manager, rarely: this may allocate.
        for (at, access) in config.stores.iter().enumerate() {
            if self.devices.len() <= at {
                self.devices.push(None);
            }
            match (access, &self.devices[at]) {
                (Some(access), None) => {
                    self.devices[at] = self.open_device(access);
                    if self.devices[at].is_some() {
                        let own = &access.shards[usize::from(self.core)];
                        self.serving.open_store(at, std::iter::from_fn(|| own.pop()));
                        let (core, cores) = (self.core, self.mailboxes.len());
                        let here = access.volumes.iter().copied();
                        let here = here.filter(|(_, object)| core_of_shard(object.shard, cores) == core);
                        self.serving.open_replicas(at, access.member, here);
                    }
                }
                (None, Some(_)) => self.serving.close_store(at),
                _ => {}
            }
        }
        if config.drain {
            self.end_replication();
            for at in 0..self.devices.len() {
                self.serving.close_store(at);
            }
        }
        let exports = &config.exports;
        let kept = |key, address| exports.find(address).is_some_and(|export| export.key == key);
        self.serving.clients_mut().keep_only(kept);
        for own in &mut self.queues {
            let port = own.queue.ports().first().map_or(0, |port| usize::from(port.ordinal));
            if let Some(mtu_bytes) = config.mtus.get(port) {
                own.queue.set_mtu(*mtu_bytes);
            }
        }
        let old = std::mem::replace(&mut self.config, config);
        self.mailboxes[usize::from(self.core)].retire(old);
        self.serving.begin_configuration();
        self.settling = true;
        if let Some(discovery) = &mut self.discovery {
            discovery.announce(&self.config.announce);
            let is_head = |key: &u32| {
                matches!(served(&self.config, *key).map(|served| served.backing), Some(Backing::Head(..)))
            };
            let heads = self.config.announce.iter().copied().filter(is_head);
            discovery.announce_heads(heads, self.now_ns);
        }
        true
    }

    /// Takes out under the old configuration whatever waits in the receive rings, where the new one has exports of heads that were not
    /// there: what was sent to another head, before this one was any, is not for this one (I6).
    fn empty_rings(&mut self, config: &CoreConfig) {
        let is_new = |(key, new): (usize, &Option<Served>)| {
            let old =
                served(&self.config, u32::try_from(key).unwrap_or(u32::MAX)).map(|served| served.backing);
            let new = new.as_ref().map(|served| served.backing);
            matches!(new, Some(Backing::Head(..))) && new != old
        };
        if config.served.iter().enumerate().any(is_new) {
            let mut rounds = 0;
            while rounds < EMPTYING_ROUNDS_MAX && self.receive() {
                rounds += 1;
            }
        }
    }

    fn open_device(&mut self, access: &StoreAccess) -> Option<OwnDevice> {
        let inline = access.durability == Durability::Memory;
        let file = self.ring.register_file(access.file.as_fd()).ok()?;
        Some(OwnDevice { file, dsync: access.dsync, inline, mapped: access.mapped.clone() })
    }

    /// Tells the manager once no request of an older configuration is left.
    pub(super) fn settle(&mut self) {
        if self.settling && self.serving.is_settled() && self.drop_closed_stores() {
            self.settling = false;
            self.mailboxes[usize::from(self.core)].set_applied(self.config.version);
        }
    }

    /// Lets go the stores that the configuration has no more, once they are at rest; whether all are gone.
    fn drop_closed_stores(&mut self) -> bool {
        let mut all = true;
        for at in 0..self.devices.len() {
            let wanted = !self.config.drain && self.config.stores.get(at).is_some_and(Option::is_some);
            if wanted || self.devices[at].is_none() {
                continue;
            }
            if !self.serving.drop_closed_store(at, &mut self.pool) {
                all = false;
            } else if let Some(own) = self.devices[at].take() {
                debug_assert!(!self.waiting.names(own.file), "a store at rest has no disk request");
                self.ring.unregister_file(own.file);
            }
        }
        all
    }

    pub(super) fn is_drained(&mut self) -> bool {
        self.serving.is_empty()
            && self.has_no_peers()
            && self.drop_closed_stores()
            && self.waiting.is_empty()
            && !self.unsent
    }
}
