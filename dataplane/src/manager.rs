//! The thread that turns the desired state of the map into reality: opens interfaces and stores, makes
//! volumes, tells the cores what to serve, and writes down what came of it.
//!
//! Invariants:
//! * It never touches a request: cores go on at full speed while it waits for a device.
//! * A volume is served only up to the size in force in its store's catalog.
//! * Extents are freed only when the desired state says *purging* (I2) or smaller, and no core has a request on them any
//!   more. What is found and not asked for is reported as orphan and kept.
//! * What is observed of an export or a volume is published after it has become true.

mod changes;
mod links;
pub mod replication;
mod start;
mod stores;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aoe_xdp::target::{Allow, AoePolicy, ChangeOutcome, Export, ExportTable};
use aoe_xdp::wire::{Address, Mac};
use cluster_map::{
    DataMap, Desired, DesiredExport, EVERY_INTERFACE, ExportState, MapError, MapReader, Observed,
    ObservedExport, VolumeId,
};
use rustix::time::{ClockId, clock_gettime};

use changes::Changes;
use links::{Links, NodeInterface};
use replication::Replication;
pub use start::{StartError, start};
use stores::Stores;

use crate::changes::ChangeQueue;
use crate::exchange::{Backing, CoreConfig, Mailbox, Served};

/// How often interfaces are looked at, and the longest time between two signs of life.
const LOOK: Duration = Duration::from_secs(1);
/// The same while volumes are being given up.
const LOOK_BUSY: Duration = Duration::from_millis(20);
/// Longest wait of the thread that watches the desired state.
const WATCH: Duration = Duration::from_secs(60);
/// How long cores may take to finish the requests of an old configuration before it is said to be stuck. A disk that
/// takes longer has its requests finished whenever it does; nothing is freed before.
const SETTLE_WARNING: Duration = Duration::from_secs(10);

/// What is known of an export that cores serve.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KeyedExport {
    key: u32,
    wish: DesiredExport,
    size_sectors: u64,
    /// The interfaces that it is served on, by the ordinals that they have in this process.
    on_interfaces: u16,
    /// The take-over of the head that serves it; `None`: its store does, which has the only copy.
    takeover: Option<u64>,
}

/// Why cores get a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// To serve what it has; what is new is advertised.
    Serve,
    /// To advertise everything, because an interface has changed.
    Reannounce,
    /// To finish and end.
    Drain,
}

/// The manager of one process.
pub struct Manager {
    map: DataMap,
    /// Names of the logical interfaces that are served on, by ordinal.
    interfaces: Vec<String>,
    links: Links,
    stores: Stores,
    replication: Replication,
    mailboxes: Arc<[Mailbox]>,
    threads: Vec<JoinHandle<std::io::Result<()>>>,
    version: u64,
    /// What cores serve now.
    exports: BTreeMap<VolumeId, KeyedExport>,
    keys_free: BTreeSet<u32>,
    /// Of volumes that are not served and whose heads may have requests still: their keys stay theirs.
    keys_of_heads: BTreeMap<VolumeId, u32>,
    keys_next: u32,
    published: Option<Observed>,
    /// What initiators ask to be changed: on its way here, and on its way through the control process.
    change_queue: Arc<ChangeQueue>,
    changes: Changes,
}

impl Manager {
    #[expect(clippy::too_many_arguments, reason = "what a node is made of")]
    fn new(
        map: DataMap,
        names: Vec<String>,
        interfaces: Vec<NodeInterface>,
        stores: Stores,
        replication: Replication,
        mailboxes: Arc<[Mailbox]>,
        threads: Vec<JoinHandle<std::io::Result<()>>>,
        change_queue: Arc<ChangeQueue>,
    ) -> Manager {
        Manager {
            map,
            interfaces: names,
            links: Links::new(interfaces),
            stores,
            replication,
            mailboxes,
            threads,
            version: 0,
            exports: BTreeMap::new(),
            keys_free: BTreeSet::new(),
            keys_of_heads: BTreeMap::new(),
            keys_next: 0,
            published: None,
            change_queue,
            changes: Changes::new(),
        }
    }

    /// Follows the desired state until it says to drain.
    ///
    /// # Errors
    /// When the map or a core fails: the process must end then, so that its supervisor starts another one.
    pub fn run(mut self) -> anyhow::Result<()> {
        self.change_queue.attend();
        watch_desired(self.map.reader().clone(), &self.change_queue);
        let mut desired = self.map.desired()?;
        loop {
            self.map.beat(boot_time_ns());
            if desired.drain {
                return self.drain(&desired);
            }
            // A node at rest looks at its interfaces and at nothing else, however many volumes it has.
            match self.links.look() {
                Ok(true) if self.version > 0 => self.configure(self.exports.clone(), Purpose::Reannounce)?,
                Ok(_) => {}
                Err(returned) => {
                    self.end_cores()?;
                    return Err(returned.into());
                }
            }
            let is_new = self.published.as_ref().is_none_or(|published| published.applied != desired.version);
            let is_told = self.take_reports();
            if is_new || is_told || self.stores.have_work() {
                self.converge(&desired)?;
            }
            self.take_changes(&desired);
            if self.published.as_ref().is_some_and(|published| {
                published.links != self.links.observe()
                    || published.changes != self.changes.observe()
                    || published.granting != self.replication.observe_granting(&desired, boot_time_ns())
            }) {
                self.publish(&desired)?;
            }
            self.check_cores()?;
            // Woken by the desired state and by changes that are asked for.
            let look = if self.stores.is_unmapping() { LOOK_BUSY } else { LOOK };
            if self.map.desired_version() == desired.version {
                std::thread::park_timeout(look);
            }
            if self.map.desired_version() != desired.version {
                match self.map.desired() {
                    // Overtaken by a writer in a hurry: what it wrote last is read in the next round.
                    Err(MapError::Busy) => {}
                    read => desired = read?,
                }
            }
        }
    }

    /// One step towards the desired state.
    fn converge(&mut self, desired: &Desired) -> anyhow::Result<()> {
        self.stores.open_missing(desired);
        self.stores.allocate(desired);
        let wanted = self.wanted_exports(desired);
        if wanted != self.exports || self.stores.access_changed() {
            self.configure(wanted, Purpose::Serve)?;
        }
        // From here on no core has a request on what is not served.
        let served: BTreeSet<VolumeId> = self.exports.keys().copied().collect();
        // Stores that heads and replicas are on are known to cores by now; and what is given up is not used any more before it goes.
        let replicas = self.stores.replicas(desired);
        self.replication.follow(desired, &replicas, self.stores.outbox());
        let (heads, free) = (&self.replication, &mut self.keys_free);
        self.keys_of_heads.retain(|volume, key| {
            let has_head = heads.has_head(*volume);
            if !has_head {
                free.insert(*key);
            }
            has_head
        });
        self.stores.release(desired, &served);
        self.send_to_cores();
        if self.stores.close_removed() {
            self.configure(self.exports.clone(), Purpose::Serve)?;
            self.stores.drop_closed();
        }
        self.publish(desired)
    }

    /// Takes what cores tell of their heads and replicas; whether there was anything.
    fn take_reports(&mut self) -> bool {
        let mut any = false;
        for (core, mailbox) in self.mailboxes.iter().enumerate() {
            if let Some(report) = mailbox.take_report() {
                self.replication.take(core, *report);
                any = true;
            }
        }
        any
    }

    /// Sends what stores have for cores; what finds a full box waits for the next round.
    fn send_to_cores(&mut self) {
        let mailboxes = Arc::clone(&self.mailboxes);
        let mut kept = Vec::new();
        for (core, message) in self.stores.outbox().drain(..) {
            let mailbox = &mailboxes[usize::from(core)];
            match mailbox.send(message) {
                Ok(sleeping) => {
                    if sleeping {
                        mailbox.ring_doorbell();
                    }
                }
                Err(refused) => kept.push((core, refused)),
            }
        }
        *self.stores.outbox() = kept;
    }

    /// Hands out what has become of the changes that initiators asked for (the exports of `desired` are in force), and
    /// takes new ones.
    fn take_changes(&mut self, desired: &Desired) {
        self.changes.hand_out(&desired.answers, &self.mailboxes);
        while let Some(asked) = self.change_queue.pop() {
            let exports = &self.exports;
            let volume_at = |address: Address| {
                let is_there = |export: &KeyedExport| {
                    export.wish.shelf == address.shelf && export.wish.slot == address.slot
                };
                exports.iter().find(|(_, export)| is_there(export)).map(|(volume, _)| *volume)
            };
            if !self.changes.ask(&asked, volume_at) {
                // Silence, and room for the initiator's next request; a core without room forgets it by itself.
                let _told = changes::tell(&self.mailboxes, asked.core, asked.token, ChangeOutcome::Refused);
            }
        }
    }

    /// Exports that can be served now, with stable keys.
    fn wanted_exports(&mut self, desired: &Desired) -> BTreeMap<VolumeId, KeyedExport> {
        let mut wanted = BTreeMap::new();
        let mut addresses = BTreeSet::new();
        let sizes = self.stores.servable_sectors(desired);
        let replicated: BTreeSet<VolumeId> =
            desired.volumes.iter().filter(|volume| volume.lane.is_some()).map(|volume| volume.id).collect();
        for wish in &desired.exports {
            let Some(&size_sectors) = sizes.get(&wish.volume) else { continue };
            let takeover = self.replication.served_takeover(wish.volume);
            if takeover.is_none() && replicated.contains(&wish.volume) {
                continue;
            }
            // The control process keeps addresses unique; should it fail to, the first one stands.
            if !addresses.insert((wish.shelf, wish.slot)) || wanted.contains_key(&wish.volume) {
                continue;
            }
            let known = self.exports.get(&wish.volume).map(|known| known.key);
            let key = known.or_else(|| self.keys_of_heads.remove(&wish.volume));
            let key = key.unwrap_or_else(|| self.take_key());
            let on_interfaces = here(wish.on_interfaces, &desired.interfaces, &self.interfaces);
            let export = KeyedExport { key, wish: wish.clone(), size_sectors, on_interfaces, takeover };
            wanted.insert(wish.volume, export);
        }
        wanted
    }

    fn take_key(&mut self) -> u32 {
        self.keys_free.pop_first().unwrap_or_else(|| {
            self.keys_next += 1;
            self.keys_next - 1
        })
    }

    /// Puts a set of exports in force on all cores, and waits until no request of the former set is left.
    fn configure(
        &mut self,
        exports: BTreeMap<VolumeId, KeyedExport>,
        purpose: Purpose,
    ) -> anyhow::Result<()> {
        self.version += 1;
        let mut served: Vec<Option<Served>> = vec![None; self.keys_next as usize];
        let mut table = Vec::new();
        let mut announce = Vec::new();
        let mut objects = self.stores.objects();
        for (volume, export) in &exports {
            let Some((store, object, owner)) = objects.remove(volume) else { continue };
            let backing = match export.takeover {
                Some(takeover) => Backing::Head(*volume, takeover),
                None => Backing::Layer(object),
            };
            served[export.key as usize] = Some(Served { store, backing, owner });
            table.push(wire_export(export));
            if purpose == Purpose::Reannounce || self.exports.get(volume) != Some(export) {
                announce.push(export.key);
            }
        }
        self.accept_macs(&exports)?;
        let (ingress, mtus) = self.links.ingress();
        let config = Arc::new(CoreConfig {
            version: self.version,
            exports: ExportTable::new(table)?,
            ingress,
            mtus,
            served,
            announce,
            stores: self.stores.access(),
            drain: purpose == Purpose::Drain,
        });
        for mailbox in &*self.mailboxes {
            mailbox.configure(Arc::clone(&config));
        }
        if purpose != Purpose::Drain {
            self.await_settled()?;
        }
        for (volume, export) in &self.exports {
            if exports.contains_key(volume) {
                continue;
            }
            if export.takeover.is_some() {
                self.keys_of_heads.insert(*volume, export.key);
            } else {
                self.keys_free.insert(export.key);
            }
        }
        self.exports = exports;
        Ok(())
    }

    fn await_settled(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        let mut warned = false;
        while self.mailboxes.iter().any(|mailbox| mailbox.applied() < self.version) {
            self.check_cores()?;
            if !warned && started.elapsed() > SETTLE_WARNING {
                warned = true;
                eprintln!(
                    "torus-dataplane: a device holds requests for more than {SETTLE_WARNING:?}; changes wait for it"
                );
            }
            std::thread::sleep(Duration::from_micros(200));
            self.map.beat(boot_time_ns());
        }
        Ok(())
    }

    /// Lets the interfaces take frames for the exports' MACs, and no longer for those that are gone.
    fn accept_macs(&mut self, exports: &BTreeMap<VolumeId, KeyedExport>) -> anyhow::Result<()> {
        let macs = |exports: &BTreeMap<VolumeId, KeyedExport>, ordinal: u8| {
            let here = exports.values().map(wire_export).filter(|export| export.is_on(ordinal));
            here.map(|export| export.mac_on(ordinal).0).collect()
        };
        let present = &self.exports;
        self.links.accept_macs(|ordinal| macs(exports, ordinal), |ordinal| macs(present, ordinal))?;
        let objects = self.stores.objects();
        self.links.steer(|ordinal| {
            let owned = exports.iter().filter_map(|(volume, export)| {
                objects.get(volume).map(|(_, _, owner)| (wire_export(export), *owner))
            });
            let here = owned.filter(|(export, _)| export.is_on(ordinal));
            here.map(|(export, owner)| (export.mac_on(ordinal).0, owner)).collect()
        });
        Ok(())
    }

    /// A core that has ended without being told to is a crash.
    fn check_cores(&mut self) -> anyhow::Result<()> {
        let Some(at) = self.threads.iter().position(JoinHandle::is_finished) else { return Ok(()) };
        match self.threads.swap_remove(at).join() {
            Ok(Ok(())) => anyhow::bail!("a core ended without being told to"),
            Ok(Err(error)) => Err(anyhow::Error::new(error).context("io_uring failed")),
            Err(_) => anyhow::bail!("a core panicked"),
        }
    }

    fn drain(mut self, desired: &Desired) -> anyhow::Result<()> {
        self.end_cores()?;
        self.exports.clear();
        self.publish(desired)
    }

    /// Lets the cores finish what they have taken, and end.
    fn end_cores(&mut self) -> anyhow::Result<()> {
        self.configure(self.exports.clone(), Purpose::Drain)?;
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow::anyhow!("a core panicked while draining"))??;
        }
        Ok(())
    }

    /// Writes down what is true now, if it has changed.
    fn publish(&mut self, desired: &Desired) -> anyhow::Result<()> {
        let mut observed = Observed {
            version: 0,
            applied: desired.version,
            pid: std::process::id(),
            links: self.links.observe(),
            stores: self.stores.observe(desired),
            volumes: self.stores.observe_volumes(desired),
            exports: self.observe_exports(desired),
            changes: self.changes.observe(),
            replicates: true,
            heads: self.replication.observe_heads(),
            wishes: self.replication.observe_wishes(),
            granting: self.replication.observe_granting(desired, boot_time_ns()),
        };
        if self.published.as_ref() == Some(&observed) {
            return Ok(());
        }
        self.published = Some(observed.clone());
        self.map.publish_observed(&mut observed)?;
        Ok(())
    }

    fn observe_exports(&self, desired: &Desired) -> Vec<ObservedExport> {
        let volumes: BTreeSet<VolumeId> = desired.volumes.iter().map(|volume| volume.id).collect();
        desired.exports.iter().map(|wish| self.observe_export(wish, volumes.contains(&wish.volume))).collect()
    }

    fn observe_export(&self, wish: &DesiredExport, known_volume: bool) -> ObservedExport {
        let serving = self.exports.get(&wish.volume).filter(|known| known.wish == *wish);
        let (state, error) = match (serving, known_volume) {
            (Some(_), _) => (ExportState::Serving, String::new()),
            (None, true) => (ExportState::Waiting, String::new()),
            (None, false) => (ExportState::Failed, "the node has no such volume".to_owned()),
        };
        ObservedExport {
            volume: wish.volume,
            shelf: wish.shelf,
            slot: wish.slot,
            state,
            size_sectors: serving.map_or(0, |known| known.size_sectors),
            error,
        }
    }
}

/// A mask over the interfaces that a desired state names, as one over those that this process serves on: they differ once the
/// control process was restarted with others, and an export that is bound to one must not be served on another.
fn here(mask: u16, named: &[String], served: &[String]) -> u16 {
    if mask == EVERY_INTERFACE {
        return EVERY_INTERFACE;
    }
    let bit = |ordinal: usize| u32::try_from(ordinal).map_or(0, |ordinal| 1_u16.unbounded_shl(ordinal));
    let bound = named.iter().enumerate().filter(|(ordinal, _)| mask & bit(*ordinal) != 0);
    let ordinals = bound.filter_map(|(_, name)| served.iter().position(|served| served == name));
    ordinals.fold(0, |mask, ordinal| mask | bit(ordinal))
}

fn wire_export(export: &KeyedExport) -> Export {
    let serial: String =
        export.wish.volume.to_string().chars().filter(char::is_ascii_hexdigit).take(20).collect();
    Export {
        key: export.key,
        address: Address { shelf: export.wish.shelf, slot: export.wish.slot },
        mac: Mac(export.wish.mac),
        size_sectors: export.size_sectors,
        read_only: export.wish.read_only,
        serial,
        config_string: export.wish.config_string.clone(),
        on_interfaces: export.on_interfaces,
        masks: export.wish.masks.iter().copied().map(Mac).collect(),
        reserved_for: export.wish.reserved_for.iter().copied().map(Mac).collect(),
        allow: AoePolicy {
            config: wire_allow(&export.wish.allow.config),
            masks: wire_allow(&export.wish.allow.masks),
            reserve: wire_allow(&export.wish.allow.reserve),
        },
    }
}

fn wire_allow(allow: &cluster_map::Allow) -> Allow {
    match allow {
        cluster_map::Allow::Nobody => Allow::Nobody,
        cluster_map::Allow::Anyone => Allow::Anyone,
        cluster_map::Allow::Only(macs) => Allow::Only(macs.iter().copied().map(Mac).collect()),
    }
}

/// Wakes the manager whenever there is a new desired state. A thread of its own, because one thread cannot wait for the map
/// and for the cores; it ends with the process.
fn watch_desired(map: MapReader, manager: &Arc<ChangeQueue>) {
    let manager = Arc::clone(manager);
    let watch = move || {
        let mut seen = map.desired_version();
        loop {
            match map.wait_desired(seen, WATCH) {
                Ok(version) if version == seen => {}
                Ok(version) => {
                    seen = version;
                    manager.wake();
                }
                // The manager looks for itself now and then.
                Err(_) => std::thread::sleep(LOOK_BUSY),
            }
        }
    };
    let named = std::thread::Builder::new().name("map-watch".to_owned());
    // Without it changes take a second longer: the manager looks for itself.
    let _started = named.spawn(watch);
}

/// Nanoseconds of the clock that goes on during suspend, by which grants and signs of life are counted.
fn boot_time_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// The process's claim to be the node's one data plane: an exclusive lock, with its pid for the supervisor to read.
#[derive(Debug)]
pub struct ProcessLock(#[expect(dead_code, reason = "held, not read")] OwnedFd);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_stays_on_its_interface_when_the_control_process_names_them_anew() {
        let names = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let served = names("eth0 eth0@100 eth1");
        assert_eq!(here(0b110, &served, &served), 0b110);
        assert_eq!(here(0b001, &names("eth1 eth0"), &served), 0b100, "eth1");
        assert_eq!(here(0b011, &names("eth9 eth0@100"), &served), 0b010, "eth9 is not served on");
        assert_eq!(here(0b100, &names("eth9 eth0"), &served), 0, "no such interface");
        assert_eq!(here(EVERY_INTERFACE, &names("eth9"), &served), EVERY_INTERFACE);
        assert_eq!(here(0, &served, &served), 0);
    }
}
