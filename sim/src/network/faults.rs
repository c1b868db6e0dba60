//! What is done to the network: cuts, links that come and go, slow links, machines that stop.

use std::ops::Range;

use super::{Due, Endpoint, Event, Flap, Link, Media, Network, Power, SegmentId};

impl<M: Clone> Network<M> {
    /// Cuts the way from some machines to others, and not the way back.
    pub fn cut(&mut self, now_ns: u64, from: &[Endpoint], to: &[Endpoint], media: Media) {
        for (from, to) in pairs(from, to) {
            self.link_mut(from, to).cut |= media.0;
            self.link_changed(now_ns, from, to);
        }
    }

    /// Ends a cut of the way from some machines to others.
    pub fn mend(&mut self, now_ns: u64, from: &[Endpoint], to: &[Endpoint], media: Media) {
        for (from, to) in pairs(from, to) {
            self.link_mut(from, to).cut &= !media.0;
            self.link_changed(now_ns, from, to);
        }
    }

    /// Cuts both ways between two groups.
    pub fn partition(&mut self, now_ns: u64, one: &[Endpoint], other: &[Endpoint], media: Media) {
        self.cut(now_ns, one, other, media);
        self.cut(now_ns, other, one, media);
    }

    /// Makes the way from some machines to others come and go, all of it at once, until everything is healed: gone for a
    /// time of `down_ns`, there for one of `up_ns`.
    pub fn flap(
        &mut self,
        now_ns: u64,
        from: &[Endpoint],
        to: &[Endpoint],
        media: Media,
        down_ns: Range<u64>,
        up_ns: Range<u64>,
    ) {
        let links = pairs(from, to).collect();
        let number = self.flaps.len();
        self.flaps.push(Flap { links, media, down_ns, up_ns, round: 0, is_down: false });
        self.schedule.at(now_ns, Due::Flap { number, round: 0 });
    }

    /// Makes all that goes from some machines to others take so much longer for a time.
    pub fn slow(&mut self, now_ns: u64, from: &[Endpoint], to: &[Endpoint], by_ns: u64, for_ns: u64) {
        for (from, to) in pairs(from, to) {
            let link = self.link_mut(from, to);
            link.slow_ns = by_ns;
            link.slow_round += 1;
            let round = link.slow_round;
            self.schedule.at(now_ns + for_ns, Due::Faster { from, to, round });
        }
    }

    /// Plugs an interface's cable or pulls it: unlike at a cut, the machine notices.
    pub fn set_carrier(&mut self, now_ns: u64, at: Endpoint, segment: SegmentId, up: bool) {
        let machine = &mut self.machines[at.0];
        if machine.carrier[segment.0] == up {
            return;
        }
        machine.carrier[segment.0] = up;
        let life = machine.life;
        self.schedule.at(now_ns, Due::Local { life, event: Event::Carrier { at, segment, up } });
        if !up {
            self.learned.retain(|(of, _), to| *of != segment || *to != at);
        }
    }

    /// Whether an interface has its carrier: what a process that starts finds.
    #[must_use]
    pub fn carrier(&self, at: Endpoint, segment: SegmentId) -> bool {
        self.machines[at.0].carrier[segment.0]
    }

    /// Repairs all links and plugs all cables. Machines stay as they are, and so does the quality of the media.
    pub fn heal(&mut self, now_ns: u64) {
        self.flaps.clear();
        for from in (0..self.setup.endpoints).map(Endpoint) {
            for segment in (0..self.setup.segments).map(SegmentId) {
                self.set_carrier(now_ns, from, segment, true);
            }
            for to in (0..self.setup.endpoints).map(Endpoint) {
                let link = self.link_mut(from, to);
                let was_cut = link.cut | link.flapping != 0;
                let slow_round = link.slow_round + 1;
                *link = Link { slow_round, ..Link::default() };
                if was_cut {
                    self.link_changed(now_ns, from, to);
                }
            }
        }
    }

    /// Whether the way from one machine to another is cut now, on any of the media.
    #[must_use]
    pub fn is_cut_between(&self, from: Endpoint, to: Endpoint, media: Media) -> bool {
        self.is_cut(from, to, media)
    }

    pub(super) fn flap_is_due(&mut self, now_ns: u64, number: usize, round: u64) -> Option<Event<M>> {
        let flap = self.flaps.get_mut(number).filter(|flap| flap.round == round)?;
        flap.is_down = !flap.is_down;
        flap.round += 1;
        let lasts_ns = if flap.is_down { flap.down_ns.clone() } else { flap.up_ns.clone() };
        let (links, round) = (flap.links.clone(), flap.round);
        let lasts_ns = self.random.range(lasts_ns).max(1);
        self.schedule.at(now_ns + lasts_ns, Due::Flap { number, round });
        for (from, to) in links {
            let down = self.flaps.iter().filter(|flap| flap.is_down && flap.links.contains(&(from, to)));
            let flapping = down.fold(0, |media, flap| media | flap.media.0);
            self.link_mut(from, to).flapping = flapping;
            self.link_changed(now_ns, from, to);
        }
        None
    }

    /// What a machine is doing.
    #[must_use]
    pub fn power(&self, at: Endpoint) -> Power {
        self.machines[at.0].power
    }

    /// Ends a machine's process, by [`Power::NoProcess`] or with the machine by [`Power::Off`], or starts it. What was under
    /// way to the process is lost.
    pub fn set_power(&mut self, now_ns: u64, at: Endpoint, power: Power) {
        let machine = &mut self.machines[at.0];
        let before = std::mem::replace(&mut machine.power, power);
        if before == power {
            return;
        }
        if before == Power::Up {
            machine.life += 1;
            machine.paused = false;
            machine.held.clear();
            machine.held_frames = 0;
            self.process_ended(now_ns, at, power);
        } else if before == Power::Off {
            self.machine_started(now_ns, at);
        } else if power == Power::Off {
            self.learned.retain(|_, to| *to != at);
        }
    }

    /// Stops a process where it is; the machine goes on. It sends nothing and learns nothing until it is resumed.
    pub fn pause(&mut self, at: Endpoint) {
        self.machines[at.0].paused = self.machines[at.0].power == Power::Up;
    }

    /// Lets a paused process go on. It finds what came meanwhile, as far as there was room.
    pub fn resume(&mut self, now_ns: u64, at: Endpoint) {
        let machine = &mut self.machines[at.0];
        if !std::mem::replace(&mut machine.paused, false) {
            return;
        }
        machine.held_frames = 0;
        let life = machine.life;
        for event in std::mem::take(&mut machine.held) {
            self.schedule.at(now_ns, Due::Local { life, event });
        }
        self.lanes_go_on(now_ns, at);
    }

    /// Whether a process is paused.
    #[must_use]
    pub fn is_paused(&self, at: Endpoint) -> bool {
        self.machines[at.0].paused
    }
}

fn pairs(from: &[Endpoint], to: &[Endpoint]) -> impl Iterator<Item = (Endpoint, Endpoint)> {
    from.iter().flat_map(move |from| to.iter().map(move |to| (*from, *to))).filter(|(from, to)| from != to)
}
