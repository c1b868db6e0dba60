//! What is done to etcd and to its clients' way to it.

use super::{
    AfterRestore, Backup, ChangeFault, ClientId, Due, Etcd, LeaseId, Output, Quality, Revision, WatchEnd,
    WatchId,
};

impl Etcd {
    /// How a client finds etcd from now on.
    pub fn set_quality(&mut self, client: ClientId, quality: Quality) {
        self.clients[client.0].quality = quality;
    }

    /// Whether nothing keeps a client from being answered in time.
    #[must_use]
    pub fn serves_well(&self, client: ClientId) -> bool {
        let at = &self.clients[client.0];
        !self.is_cut_off(client) && at.quality == Quality::good() && at.scripted.is_empty()
    }

    /// A fault for one of the client's changes to come; several are taken in order, before any by chance.
    pub fn fail_change(&mut self, client: ClientId, fault: ChangeFault) {
        self.clients[client.0].scripted.push_back(fault);
    }

    /// All clients' changes go well from now on, and everything is reachable, available and quick.
    pub fn heal(&mut self, now_ns: u64) {
        for client in (0..self.clients.len()).map(ClientId) {
            self.set_quality(client, Quality::good());
            self.clients[client.0].scripted.clear();
            self.set_reachable(now_ns, client, true);
        }
        self.set_available(now_ns, true);
    }

    pub(super) fn drawn_fault(&mut self, client: ClientId) -> Option<ChangeFault> {
        let Self { clients, random, .. } = self;
        let client = &mut clients[client.0];
        if let Some(fault) = client.scripted.pop_front() {
            return Some(fault);
        }
        let quality = &client.quality;
        if random.chance_ppm(quality.refused_ppm) {
            Some(ChangeFault::Refused)
        } else if random.chance_ppm(quality.request_lost_ppm) {
            Some(ChangeFault::RequestLost)
        } else if random.chance_ppm(quality.answer_lost_ppm) {
            Some(ChangeFault::AnswerLost)
        } else if random.chance_ppm(quality.late_ppm) {
            Some(ChangeFault::Late(random.range(quality.late_ns.clone())))
        } else {
            None
        }
    }

    /// Cuts a client off, or ends that. What was under way either way is lost; its leases run on.
    pub fn set_reachable(&mut self, now_ns: u64, client: ClientId, reachable: bool) {
        let was_cut_off = self.is_cut_off(client);
        self.clients[client.0].reachable = reachable;
        self.outage_changed(now_ns, client, was_cut_off);
    }

    pub(super) fn is_cut_off(&self, client: ClientId) -> bool {
        !self.available || !self.clients[client.0].reachable
    }

    fn outage_changed(&mut self, now_ns: u64, client: ClientId, was_cut_off: bool) {
        let is_cut_off = self.is_cut_off(client);
        if is_cut_off == was_cut_off {
            return;
        }
        self.clients[client.0].round += 1;
        if is_cut_off {
            let after_ns = self.random.range(self.setup.watch_lost_ns.clone());
            let round = self.clients[client.0].round;
            self.schedule.at(now_ns + after_ns, Due::WatchesLost { client, round });
        } else {
            self.tell_watches(now_ns);
        }
    }

    /// Takes the leader away from etcd, or gives it one. Meanwhile nothing is answered but errors, and no lease ends; the new
    /// leader carries out what waited, and gives all leases their time anew.
    pub fn set_available(&mut self, now_ns: u64, available: bool) {
        if self.available == available {
            return;
        }
        let clients: Vec<(ClientId, bool)> =
            (0..self.clients.len()).map(ClientId).map(|client| (client, self.is_cut_off(client))).collect();
        self.available = available;
        for (client, was_cut_off) in clients {
            self.outage_changed(now_ns, client, was_cut_off);
        }
        if !available {
            return;
        }
        let leases: Vec<(LeaseId, u64)> = self.state.leases().collect();
        for (lease, ttl_ns) in leases {
            self.start_lease(now_ns, lease, ttl_ns);
        }
        for (serial, request) in std::mem::take(&mut self.waiting) {
            let result = self.carry_out(now_ns, serial, request);
            self.reply(now_ns, serial, result);
        }
        self.tell_watches(now_ns);
    }

    /// The client's watches are lost, if the outage that was to cost them lasts.
    pub(super) fn lose_watches(&mut self, now_ns: u64, client: ClientId, round: u64) {
        let at = &self.clients[client.0];
        if at.round != round {
            return;
        }
        let life = at.life;
        let lost: Vec<WatchId> =
            self.watches.keys().filter(|(of, _)| *of == client).map(|(_, watch)| *watch).collect();
        for watch in lost {
            if !self.forget_watch(client, watch) {
                continue;
            }
            let output = Output::WatchEnded { client, watch, end: WatchEnd::Lost };
            self.schedule.at(now_ns, Due::Held(output, life));
        }
    }

    /// Whether the client has to be told of it: it need not before it knows that the watch was there.
    fn forget_watch(&mut self, client: ClientId, watch: WatchId) -> bool {
        let watching = self.watches.remove(&(client, watch));
        watching.is_some_and(|watching| !self.pending.contains_key(&watching.serial))
    }

    /// Ends all leases at once, as a leader does that stood still.
    pub fn revoke_all_leases(&mut self, now_ns: u64) {
        let leases: Vec<LeaseId> = self.leases.keys().copied().collect();
        for lease in leases {
            self.revoke_lease(now_ns, lease);
        }
    }

    /// Ends one lease though its client renews it.
    pub fn revoke_lease(&mut self, now_ns: u64, lease: LeaseId) {
        if self.end_lease(lease).is_ok() {
            self.tell_watches(now_ns);
        }
    }

    /// Forgets changes up to and including this revision: watches that have not delivered them end.
    pub fn compact(&mut self, now_ns: u64, through: Revision) {
        self.state.compact(through);
        self.tell_watches(now_ns);
    }

    /// Copies everything.
    #[must_use]
    pub fn backup(&self) -> Backup {
        Backup(self.state.clone())
    }

    /// Goes back to a backup, as an operator does. The cluster's id stays; leases begin anew; every watch is lost, at each
    /// client's own time; what was under way never happens.
    pub fn restore(&mut self, now_ns: u64, backup: &Backup, after: AfterRestore) {
        let higher = match after {
            AfterRestore::AsSaved => 0,
            AfterRestore::Higher(by) => by,
        };
        self.state = backup.0.clone().restored(higher);
        self.era += 1;
        self.waiting.clear();
        for (_, lease) in std::mem::take(&mut self.leases) {
            self.schedule.cancel(lease.timer);
        }
        let leases: Vec<(LeaseId, u64)> = self.state.leases().collect();
        for (lease, ttl_ns) in leases {
            self.start_lease(now_ns, lease, ttl_ns);
        }
        let lost: Vec<_> = self.watches.keys().copied().collect();
        for (client, watch) in lost {
            if !self.forget_watch(client, watch) {
                continue;
            }
            let after_ns = self.drawn_delay(client);
            let output = Output::WatchEnded { client, watch, end: WatchEnd::Lost };
            self.schedule.at(now_ns + after_ns, Due::Held(output, self.clients[client.0].life));
        }
    }

    /// The client's process ended: it hears no answers any more, and its watches are gone. Its requests under way may still
    /// be carried out, and its leases run on.
    pub fn client_ended(&mut self, client: ClientId) {
        let of_it: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, pending)| pending.client == client)
            .map(|(serial, _)| *serial)
            .collect();
        for serial in of_it {
            if let Some(pending) = self.pending.remove(&serial) {
                self.schedule.cancel(pending.timeout);
            }
        }
        self.watches.retain(|(of, _), _| *of != client);
        let at = &mut self.clients[client.0];
        at.life += 1;
        at.under_way = 0;
        at.paused = false;
        at.held.clear();
    }

    /// Stops a client's process where it is: it hears nothing until it is resumed.
    pub fn pause(&mut self, client: ClientId) {
        self.clients[client.0].paused = true;
    }

    /// Lets a paused client go on: it hears what came meanwhile.
    pub fn resume(&mut self, now_ns: u64, client: ClientId) {
        let at = &mut self.clients[client.0];
        if !std::mem::replace(&mut at.paused, false) {
            return;
        }
        let life = at.life;
        for output in std::mem::take(&mut at.held) {
            self.schedule.at(now_ns, Due::Held(output, life));
        }
        self.tell_watches(now_ns);
    }
}
