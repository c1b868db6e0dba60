//! What breaks, for how long, and how all of it is made whole.

use std::collections::BTreeMap;

use super::{Event, Trouble, World};
use torus_dataplane::store::extent::simulated::Faults;

use crate::etcd::{self, ClientId};
use crate::network::{Endpoint, Media, Power, Quality, SegmentId};
use crate::random::Random;

/// What is broken now.
#[derive(Debug)]
pub(super) struct Troubles {
    random: Random,
    next: u64,
    active: BTreeMap<u64, (Trouble, Vec<usize>)>,
}

impl Troubles {
    pub(super) fn new(random: Random) -> Troubles {
        Troubles { random, next: 0, active: BTreeMap::new() }
    }
}

fn endpoints(nodes: &[usize]) -> Vec<Endpoint> {
    nodes.iter().map(|node| Endpoint(*node)).collect()
}

/// An etcd of whose changes so many of a hundred have no answer: most were made, some were not, some are made later.
pub(super) fn losing(percent: u64) -> etcd::Quality {
    let ppm = |of_ten: u64| u32::try_from(percent * 1_000 * of_ten).expect("below a million");
    etcd::Quality {
        answer_lost_ppm: ppm(6),
        request_lost_ppm: ppm(2),
        late_ppm: ppm(3),
        late_ns: 100_000_000..3_000_000_000,
        ..etcd::Quality::good()
    }
}

/// An etcd that carries every change out that much later.
pub(super) fn late(by_ns: u64) -> etcd::Quality {
    etcd::Quality { late_ppm: 1_000_000, late_ns: by_ns / 2..by_ns, ..etcd::Quality::good() }
}

impl World {
    /// Forgets changes that watches have not delivered.
    pub(super) fn compact(&mut self) {
        let (now_ns, revision) = (self.now_ns(), self.metadata.etcd.revision());
        self.metadata.etcd.compact(now_ns, revision);
    }

    pub(super) fn break_something(&mut self) {
        if self.is_peace {
            return;
        }
        let pause_ns = self.troubles.random.range(self.plan.pause_ns / 4..self.plan.pause_ns * 2);
        self.schedule.after(pause_ns, Event::Break);
        let Some(trouble) = self.troubles.random.pick(&self.plan.troubles).copied() else { return };
        let node = self.troubles.random.index(self.plan.nodes);
        let lasts_ns = self.troubles.random.magnitude(10_000_000..8_000_000_000);
        self.coverage.troubles += 1;
        self.note(|| format!("trouble: {trouble:?} at node {node} for {} ms", lasts_ns / 1_000_000));
        let now_ns = self.now_ns();
        let others: Vec<usize> = (0..self.plan.nodes).filter(|other| *other != node).collect();
        let touched = match trouble {
            Trouble::Restart => {
                if self.nodes[node].is_up() {
                    self.kill(node, Power::NoProcess);
                }
                return;
            }
            Trouble::RestartControl => {
                self.end_control(node);
                if self.troubles.random.coin() {
                    self.start_control(node);
                    return;
                }
                vec![node]
            }
            Trouble::Off => {
                let power = if self.troubles.random.coin() { Power::Off } else { Power::NoProcess };
                self.hold(node, power);
                if self.troubles.random.one_in(4) {
                    self.end_control(node);
                }
                vec![node]
            }
            Trouble::PowerCut => {
                for node in 0..self.plan.nodes {
                    self.hold(node, Power::Off);
                }
                (0..self.plan.nodes).collect()
            }
            Trouble::Pause => {
                let which = self.troubles.random.index(3);
                if which != 1 {
                    self.network.pause(Endpoint(node));
                }
                if which != 0 {
                    self.pause_control(node, true);
                }
                vec![node]
            }
            Trouble::Leave => {
                self.leave(node);
                vec![node]
            }
            Trouble::Leases => {
                if self.troubles.random.coin() {
                    self.lose_lease(node);
                } else {
                    self.metadata.etcd.revoke_all_leases(now_ns);
                }
                return;
            }
            Trouble::Compaction => {
                self.compact();
                return;
            }
            Trouble::SlowMetadata => {
                let quality = etcd::Quality::drawn(&mut self.troubles.random);
                if self.troubles.random.coin() {
                    self.metadata.set_quality(&quality);
                } else {
                    self.metadata.etcd.set_quality(ClientId(node), quality);
                }
                vec![node]
            }
            Trouble::Partition => {
                let mut all: Vec<usize> = (0..self.plan.nodes).collect();
                self.troubles.random.shuffle(&mut all);
                let at = self.troubles.random.index(all.len() + 1);
                let (one, other) = all.split_at(at);
                self.network.partition(now_ns, &endpoints(one), &endpoints(other), Media::STREAMS);
                all.clone()
            }
            Trouble::OneWay => {
                let Some(other) = self.troubles.random.pick(&others).copied() else { return };
                self.network.cut(now_ns, &[Endpoint(node)], &[Endpoint(other)], Media::STREAMS);
                vec![node, other]
            }
            Trouble::Flap => {
                let Some(other) = self.troubles.random.pick(&others).copied() else { return };
                self.network.flap(
                    now_ns,
                    &[Endpoint(node)],
                    &[Endpoint(other)],
                    Media::STREAMS,
                    50_000_000..500_000_000,
                    100_000_000..900_000_000,
                );
                vec![node, other]
            }
            Trouble::TakeOver => {
                let volume = self.troubles.random.index(self.plan.volumes);
                self.force_head(node, volume);
                return;
            }
            Trouble::Move => {
                let volume = self.troubles.random.index(self.plan.volumes);
                self.begin_move(volume, node);
                return;
            }
            Trouble::HandOver => {
                let volume = self.troubles.random.index(self.plan.volumes);
                self.wish_for_head(volume, node);
                return;
            }
            Trouble::NoMetadata => {
                if self.troubles.random.coin() {
                    self.metadata.etcd.set_reachable(now_ns, ClientId(node), false);
                    vec![node]
                } else {
                    self.metadata.etcd.set_available(now_ns, false);
                    vec![]
                }
            }
            Trouble::Unknown => {
                self.metadata.set_quality(&losing(30));
                vec![]
            }
            Trouble::SlowDisk => {
                self.nodes[node].stored.slow_ns = self.troubles.random.magnitude(1_000_000..6_000_000_000);
                vec![node]
            }
            Trouble::SlowLink => {
                let Some(other) = self.troubles.random.pick(&others).copied() else { return };
                let by_ns = self.troubles.random.magnitude(1_000_000..1_500_000_000);
                self.network.slow(now_ns, &[Endpoint(node)], &[Endpoint(other)], by_ns, lasts_ns);
                return;
            }
            Trouble::Reset => {
                if let Some(other) = self.troubles.random.pick(&others).copied() {
                    self.reset(node, other);
                }
                return;
            }
            Trouble::Initiator => {
                let volume = self.troubles.random.index(self.plan.volumes);
                self.abandon(volume);
                return;
            }
            Trouble::BadDisk => {
                let rate = self.troubles.random.range(2..40);
                let faults = &mut self.nodes[node].stored.faults;
                match self.troubles.random.index(5) {
                    0 => faults.read = rate,
                    1 => faults.write = rate,
                    2 => faults.sync = rate,
                    3 => faults.no_space = rate,
                    _ => faults.gone = rate * 10,
                }
                vec![node]
            }
            Trouble::StaleReads => {
                // On one copy only, as with rot.
                if node > 0 || self.plan.copies == 1 {
                    return;
                }
                self.nodes[node].stored.faults.stale = self.troubles.random.range(2..40);
                vec![node]
            }
            Trouble::Segment => {
                let volume = self.troubles.random.index(self.plan.volumes);
                let (at, initiator) = ([Endpoint(node)], [self.clients[volume].endpoint]);
                let segment = SegmentId(self.troubles.random.index(self.plan.initiator.paths()));
                self.network.partition(now_ns, &at, &initiator, Media::segment(segment));
                vec![]
            }
            Trouble::Format => {
                self.format(node);
                return;
            }
            Trouble::Rot => {
                // On one copy only: with all of them rotten a block is lost, and rightly so.
                if node == 0 && self.plan.copies > 1 {
                    self.rot(node);
                }
                return;
            }
        };
        let number = self.troubles.next;
        self.troubles.next += 1;
        self.troubles.active.insert(number, (trouble, touched));
        self.schedule.after(lasts_ns, Event::Mend(number));
    }

    pub(super) fn mend(&mut self, number: u64) {
        let Some((trouble, nodes)) = self.troubles.active.remove(&number) else { return };
        let now_ns = self.now_ns();
        self.note(|| format!("mended: {trouble:?} {nodes:?}"));
        // Another one of its kind may go on.
        let goes_on = |node: usize| {
            self.troubles.active.values().any(|(other, nodes)| *other == trouble && nodes.contains(&node))
        };
        match trouble {
            Trouble::Off | Trouble::PowerCut => {
                for node in nodes {
                    let is_held = self.troubles.active.values().any(|(other, nodes)| {
                        matches!(other, Trouble::Off | Trouble::PowerCut) && nodes.contains(&node)
                    });
                    if !is_held {
                        self.power_on(node);
                    }
                }
            }
            Trouble::Pause => {
                for node in nodes {
                    self.network.resume(now_ns, Endpoint(node));
                    self.pause_control(node, false);
                }
            }
            Trouble::RestartControl | Trouble::Leave => {
                let off = |node: usize| {
                    self.troubles.active.values().any(|(other, nodes)| {
                        matches!(other, Trouble::Off | Trouble::PowerCut) && nodes.contains(&node)
                    })
                };
                for node in nodes.into_iter().filter(|node| !off(*node)).collect::<Vec<_>>() {
                    self.stay(node);
                    self.power_on(node);
                }
            }
            Trouble::Partition | Trouble::OneWay | Trouble::Flap | Trouble::Segment => {
                self.network.heal(now_ns);
            }
            Trouble::NoMetadata | Trouble::Unknown | Trouble::SlowMetadata => {
                self.metadata.etcd.heal(now_ns);
                self.metadata.set_quality(&etcd::Quality::good());
            }
            Trouble::SlowDisk => {
                for node in nodes.into_iter().filter(|node| !goes_on(*node)).collect::<Vec<_>>() {
                    self.nodes[node].stored.slow_ns = 0;
                }
            }
            Trouble::BadDisk | Trouble::StaleReads => {
                for node in nodes.into_iter().filter(|node| !goes_on(*node)).collect::<Vec<_>>() {
                    self.repair_disk(node);
                }
            }
            Trouble::Restart
            | Trouble::Leases
            | Trouble::Compaction
            | Trouble::Format
            | Trouble::TakeOver
            | Trouble::HandOver
            | Trouble::Move
            | Trouble::Rot
            | Trouble::SlowLink
            | Trouble::Reset
            | Trouble::Initiator => {}
        }
    }

    /// A store is formatted anew. Once, where everything is whole, nothing moves and there are two more copies: what a disk takes with it is nobody's fault.
    fn format(&mut self, node: usize) {
        let is_whole = self.coverage.moves == 0
            && (0..self.plan.volumes).all(|volume| self.metadata.record(volume).stale.is_empty());
        if self.formatted.is_none() && is_whole && self.plan.copies > 2 && self.nodes[node].is_up() {
            self.formatted = Some(node);
            self.kill(node, Power::NoProcess);
            self.nodes[node].stored.format();
        }
    }

    /// A node's disk works again. A store that has failed takes writes when it is opened again.
    fn repair_disk(&mut self, node: usize) {
        self.nodes[node].stored.faults = Faults::default();
        if self.nodes[node].has_failed_store() {
            self.kill(node, Power::NoProcess);
        }
    }

    /// Everything is whole from now on.
    pub(super) fn make_peace(&mut self) {
        self.is_peace = true;
        self.use_clients(|client, now_ns| {
            client.set_reading(now_ns, false);
            client.set_resting(now_ns, false);
        });
        let numbers: Vec<u64> = self.troubles.active.keys().copied().collect();
        for number in numbers {
            self.mend(number);
        }
        let now_ns = self.now_ns();
        self.network.heal(now_ns);
        self.network.set_stream_quality(Quality::good());
        for segment in (0..self.plan.initiator.paths()).map(SegmentId) {
            self.network.set_segment_quality(segment, Quality::good());
        }
        self.metadata.etcd.heal(now_ns);
        self.metadata.set_quality(&etcd::Quality::good());
        for node in 0..self.plan.nodes {
            self.nodes[node].stored.slow_ns = 0;
            self.network.resume(now_ns, Endpoint(node));
            self.pause_control(node, false);
            self.stay(node);
            self.power_on(node);
            self.repair_disk(node);
        }
        self.note(|| "peace".into());
    }
}
