//! Connections: how they come about, carry messages, and break.

use std::collections::VecDeque;

use super::{
    Connection, ConnectionId, Due, Endpoint, Event, Item, Lane, Media, Network, Power, SendError, Side,
    State, drawn_delay,
};

impl<M: Clone> Network<M> {
    /// Begins a connection. [`Event::Connected`] or [`Event::ConnectFailed`] follows at this machine, after the former
    /// [`Event::Accepted`] at the other.
    pub fn connect(&mut self, now_ns: u64, from: Endpoint, to: Endpoint) -> ConnectionId {
        self.last_connection += 1;
        let connection = ConnectionId(self.last_connection);
        if from == to || self.connections.len() >= self.setup.connections {
            let life = self.machines[from.0].life;
            let event = Event::ConnectFailed { at: from, connection };
            self.schedule.at(now_ns, Due::Local { life, event });
            return connection;
        }
        let side = |endpoint| Side { endpoint, state: State::Opening, give_up: None };
        let lane = || Lane { items: VecDeque::new(), last_ns: 0, timer: None };
        let timeout_ns = now_ns + self.setup.connect_timeout_ns;
        let timeout = Some(self.schedule.at(timeout_ns, Due::ConnectTimeout { connection }));
        let held = Connection { sides: [side(from), side(to)], lanes: [lane(), lane()], timeout };
        self.connections.insert(connection, held);
        let arrives_ns = now_ns + self.stream_delay(from, to);
        self.schedule.at(arrives_ns, Due::Handshake { connection, answer: false });
        connection
    }

    /// Sends a message by a connection.
    ///
    /// # Errors
    /// It is not open here, or its window is full. Where neither is the case the message arrives unless the connection
    /// breaks.
    pub fn send(
        &mut self,
        now_ns: u64,
        at: Endpoint,
        connection: ConnectionId,
        payload: M,
    ) -> Result<(), SendError> {
        let window = self.setup.window_messages;
        let held = self.connections.get(&connection).ok_or(SendError::Closed)?;
        let side = held.side_of(at).filter(|side| held.sides[*side].state == State::Open);
        let other = 1 - side.ok_or(SendError::Closed)?;
        if held.lanes[other].items.len() >= window {
            return Err(SendError::Full);
        }
        if held.sides[other].state == State::Over {
            self.counters.messages_lost += 1;
            return Ok(());
        }
        self.put(now_ns, connection, other, Item::Message(payload));
        Ok(())
    }

    /// Closes this end of a connection; nothing more happens here by it. The other end gets what was sent before, unless
    /// this end was closed with something unread, and learns of it then.
    pub fn close(&mut self, now_ns: u64, at: Endpoint, connection: ConnectionId) {
        let Some(held) = self.connections.get(&connection) else { return };
        let Some(side) = held.side_of(at).filter(|side| held.sides[*side].state != State::Over) else {
            return;
        };
        let unread = !held.lanes[side].items.is_empty();
        self.close_side(now_ns, connection, side, unread);
    }

    /// Whether this end is open.
    #[must_use]
    pub fn is_open(&self, at: Endpoint, connection: ConnectionId) -> bool {
        let held = self.connections.get(&connection);
        held.is_some_and(|held| held.side_of(at).is_some_and(|side| held.sides[side].state == State::Open))
    }

    /// The kernel closes an end: in good order, or with a reset that overtakes data.
    fn close_side(&mut self, now_ns: u64, connection: ConnectionId, side: usize, reset: bool) {
        let Some(held) = self.connections.get(&connection) else { return };
        if held.sides[0].state == State::Opening {
            // No end has heard of it yet.
            if side == 0 {
                self.remove(connection);
            } else {
                self.refuse(now_ns, connection);
            }
            return;
        }
        self.end_side(connection, side);
        if reset {
            self.lose_suffix(connection, 1 - side);
            self.give_notice(now_ns, connection, 1 - side);
        } else if self.connections.contains_key(&connection) {
            self.put(now_ns, connection, 1 - side, Item::Last);
        }
    }

    fn stream_delay(&mut self, from: Endpoint, to: Endpoint) -> u64 {
        let mut delay_ns = drawn_delay(&self.streams, &mut self.random) + self.link(from, to).slow_ns;
        if self.random.chance_ppm(self.streams.loss_ppm) {
            delay_ns += self.random.range(self.setup.stream_retry_ns.clone());
        }
        delay_ns
    }

    /// Puts something into the lane that leads to a side.
    fn put(&mut self, now_ns: u64, connection: ConnectionId, side: usize, item: Item<M>) {
        let Some(held) = self.connections.get(&connection) else { return };
        let (from, to) = (held.sides[1 - side].endpoint, held.sides[side].endpoint);
        let at_ns = now_ns + self.stream_delay(from, to);
        let Some(held) = self.connections.get_mut(&connection) else { return };
        let lane = &mut held.lanes[side];
        lane.last_ns = lane.last_ns.max(at_ns);
        lane.items.push_back((lane.last_ns, item));
        if lane.items.len() == 1 {
            lane.timer = Some(self.schedule.at(lane.last_ns, Due::Lane { connection, side }));
        }
    }

    pub(super) fn lane_is_due(&mut self, connection: ConnectionId, side: usize) -> Option<Event<M>> {
        let held = self.connections.get_mut(&connection)?;
        held.lanes[side].timer = None;
        let (from, at) = (held.sides[1 - side].endpoint, held.sides[side].endpoint);
        if self.is_cut(from, at, Media::STREAMS) || self.machines[at.0].paused {
            // It goes on when that is over, or the connection breaks.
            return None;
        }
        let held = self.connections.get_mut(&connection)?;
        let (_, item) = held.lanes[side].items.pop_front()?;
        if let Some((next_ns, _)) = held.lanes[side].items.front() {
            let timer = self.schedule.at(*next_ns, Due::Lane { connection, side });
            held.lanes[side].timer = Some(timer);
        }
        match item {
            Item::Open => {
                held.sides[side].state = State::Open;
                Some(Event::Accepted { at, connection, from })
            }
            Item::Message(payload) => {
                self.counters.messages += 1;
                self.counters.messages_late += u64::from(held.sides[1 - side].state == State::Over);
                Some(Event::Message { at, connection, payload })
            }
            Item::Last => {
                self.end_side(connection, side);
                Some(Event::Closed { at, connection })
            }
        }
    }

    pub(super) fn handshake_is_due(
        &mut self,
        now_ns: u64,
        connection: ConnectionId,
        answer: bool,
    ) -> Option<Event<M>> {
        let held = self.connections.get(&connection)?;
        let (began, other) = (held.sides[0].endpoint, held.sides[1].endpoint);
        let (from, to) = if answer { (other, began) } else { (began, other) };
        if self.is_cut(from, to, Media::STREAMS) || self.machines[other.0].power == Power::Off {
            let again_ns = now_ns + self.random.range(self.setup.stream_retry_ns.clone()).max(1);
            self.schedule.at(again_ns, Due::Handshake { connection, answer });
            return None;
        }
        if self.machines[other.0].power == Power::NoProcess {
            self.refuse(now_ns, connection);
            return None;
        }
        if !answer {
            let arrives_ns = now_ns + self.stream_delay(other, began);
            self.schedule.at(arrives_ns, Due::Handshake { connection, answer: true });
            return None;
        }
        let held = self.connections.get_mut(&connection)?;
        held.sides[0].state = State::Open;
        if let Some(timeout) = held.timeout.take() {
            self.schedule.cancel(timeout);
        }
        self.put(now_ns, connection, 1, Item::Open);
        // A cut that began during the handshake has not been counted yet.
        self.give_up_where_cut(now_ns, connection);
        Some(Event::Connected { at: began, connection })
    }

    /// A connection that is being opened fails as soon as its beginner hears of it.
    fn refuse(&mut self, now_ns: u64, connection: ConnectionId) {
        let Some(held) = self.connections.get(&connection) else { return };
        let (began, other) = (held.sides[0].endpoint, held.sides[1].endpoint);
        if self.is_cut(other, began, Media::STREAMS) {
            return;
        }
        let heard_ns = now_ns + self.stream_delay(other, began);
        if let Some(held) = self.connections.get_mut(&connection) {
            let sooner = self.schedule.at(heard_ns, Due::ConnectTimeout { connection });
            if let Some(timeout) = held.timeout.replace(sooner) {
                self.schedule.cancel(timeout);
            }
        }
    }

    pub(super) fn connect_is_over(&mut self, connection: ConnectionId) -> Option<Event<M>> {
        let at = self.connections.get(&connection)?.sides[0].endpoint;
        self.remove(connection);
        Some(Event::ConnectFailed { at, connection })
    }

    pub(super) fn break_is_due(
        &mut self,
        now_ns: u64,
        connection: ConnectionId,
        side: usize,
    ) -> Option<Event<M>> {
        let held = self.connections.get_mut(&connection)?;
        held.sides[side].give_up = None;
        let at = held.sides[side].endpoint;
        let was_open = held.sides[side].state == State::Open;
        self.counters.breaks += 1;
        self.end_side(connection, side);
        self.lose_suffix(connection, 1 - side);
        self.give_notice(now_ns, connection, 1 - side);
        was_open.then_some(Event::Closed { at, connection })
    }

    /// Nothing happens at this side any more.
    fn end_side(&mut self, connection: ConnectionId, side: usize) {
        let Some(held) = self.connections.get_mut(&connection) else { return };
        held.sides[side].state = State::Over;
        if let Some((_, event)) = held.sides[side].give_up.take() {
            self.schedule.cancel(event);
        }
        let lane = &mut held.lanes[side];
        let messages = lane.items.iter().filter(|(_, item)| matches!(item, Item::Message(_))).count();
        self.counters.messages_lost += messages as u64;
        lane.items.clear();
        if let Some(timer) = lane.timer.take() {
            self.schedule.cancel(timer);
        }
        if held.sides[1 - side].state == State::Over {
            self.remove(connection);
        }
    }

    /// Of what is under way to a side, a part is lost from some point on.
    fn lose_suffix(&mut self, connection: ConnectionId, side: usize) {
        let Some(held) = self.connections.get_mut(&connection) else { return };
        let lane = &mut held.lanes[side];
        let keep = self.random.index(lane.items.len() + 1);
        let lost = lane.items.iter().skip(keep).filter(|(_, item)| matches!(item, Item::Message(_))).count();
        self.counters.messages_lost += lost as u64;
        lane.items.truncate(keep);
        if lane.items.is_empty()
            && let Some(timer) = lane.timer.take()
        {
            self.schedule.cancel(timer);
        }
    }

    /// A side whose peer is gone hears of it, if it can, or gives up.
    fn give_notice(&mut self, now_ns: u64, connection: ConnectionId, side: usize) {
        let Some(held) = self.connections.get(&connection) else { return };
        // While it is being opened its own timeout decides.
        if held.sides[side].state == State::Over || held.sides[0].state == State::Opening {
            return;
        }
        let (from, to) = (held.sides[1 - side].endpoint, held.sides[side].endpoint);
        let silent = self.is_cut(from, to, Media::STREAMS) || self.machines[from.0].power == Power::Off;
        let range = if silent { self.setup.give_up_ns.clone() } else { self.setup.notice_ns.clone() };
        let at_ns = now_ns + self.random.range(range);
        let Some(held) = self.connections.get_mut(&connection) else { return };
        let give_up = &mut held.sides[side].give_up;
        if let Some((before_ns, event)) = give_up.take() {
            if before_ns <= at_ns {
                *give_up = Some((before_ns, event));
                return;
            }
            self.schedule.cancel(event);
        }
        *give_up = Some((at_ns, self.schedule.at(at_ns, Due::Break { connection, side })));
    }

    fn remove(&mut self, connection: ConnectionId) {
        let Some(held) = self.connections.remove(&connection) else { return };
        let timers = held.lanes.iter().filter_map(|lane| lane.timer);
        let give_ups = held.sides.iter().filter_map(|side| side.give_up.map(|(_, event)| event));
        for event in timers.chain(give_ups).chain(held.timeout) {
            self.schedule.cancel(event);
        }
    }

    fn connections_at(&self, at: Endpoint) -> Vec<(ConnectionId, usize)> {
        let sides = self.connections.iter().map(|(id, held)| (*id, held.side_of(at)));
        sides.filter_map(|(id, side)| Some((id, side?))).collect()
    }

    /// A link was cut or mended.
    pub(super) fn link_changed(&mut self, now_ns: u64, from: Endpoint, to: Endpoint) {
        let both = self
            .connections
            .iter()
            .filter(|(_, held)| held.side_of(from).is_some_and(|side| held.sides[1 - side].endpoint == to));
        let between: Vec<ConnectionId> = both.map(|(id, _)| *id).collect();
        if between.is_empty() {
            return;
        }
        let is_cut = self.is_cut(from, to, Media::STREAMS) || self.is_cut(to, from, Media::STREAMS);
        for connection in between {
            if is_cut {
                self.give_up_where_cut(now_ns, connection);
                continue;
            }
            for side in [0, 1] {
                let Some(held) = self.connections.get_mut(&connection) else { continue };
                if held.sides[1 - side].state == State::Over
                    || self.machines[held.sides[1 - side].endpoint.0].power == Power::Off
                {
                    self.give_notice(now_ns, connection, side);
                } else if let Some((_, event)) = held.sides[side].give_up.take() {
                    self.schedule.cancel(event);
                }
                self.lane_goes_on(now_ns, connection, side, true);
            }
        }
    }

    /// Neither end of a connection hears enough from the other where one way is cut: data, or that data arrived.
    fn give_up_where_cut(&mut self, now_ns: u64, connection: ConnectionId) {
        let Some(held) = self.connections.get(&connection) else { return };
        let (one, other) = (held.sides[0].endpoint, held.sides[1].endpoint);
        let is_cut = self.is_cut(one, other, Media::STREAMS) || self.is_cut(other, one, Media::STREAMS);
        if !is_cut || held.sides[0].state == State::Opening {
            return;
        }
        for side in [0, 1] {
            let at_ns = now_ns + self.random.range(self.setup.give_up_ns.clone());
            let Some(held) = self.connections.get_mut(&connection) else { return };
            let at = &mut held.sides[side];
            if at.state != State::Over && at.give_up.is_none() {
                at.give_up = Some((at_ns, self.schedule.at(at_ns, Due::Break { connection, side })));
            }
        }
    }

    fn lane_goes_on(&mut self, now_ns: u64, connection: ConnectionId, side: usize, retried: bool) {
        let Some(held) = self.connections.get(&connection) else { return };
        // Of an end that is gone only copies are left that the network holds; nobody sends them again.
        let is_gone = held.sides[1 - side].state == State::Over;
        let range = if is_gone { 0..self.setup.notice_ns.end } else { self.setup.stream_retry_ns.clone() };
        let late_ns = if retried { self.random.range(range) } else { 0 };
        let Some(held) = self.connections.get_mut(&connection) else { return };
        let lane = &mut held.lanes[side];
        if lane.timer.is_none()
            && let Some((first_ns, _)) = lane.items.front()
        {
            let at_ns = (*first_ns).max(now_ns + late_ns);
            lane.timer = Some(self.schedule.at(at_ns, Due::Lane { connection, side }));
        }
    }

    /// A process that was paused takes what waits for it.
    pub(super) fn lanes_go_on(&mut self, now_ns: u64, at: Endpoint) {
        for (connection, side) in self.connections_at(at) {
            self.lane_goes_on(now_ns, connection, side, false);
        }
    }

    /// A process ended, alone or with its machine.
    pub(super) fn process_ended(&mut self, now_ns: u64, at: Endpoint, power: Power) {
        for (connection, side) in self.connections_at(at) {
            let Some(held) = self.connections.get(&connection) else { continue };
            if held.sides[side].state == State::Over {
                continue;
            }
            if power == Power::NoProcess {
                let reset = self.random.coin();
                self.close_side(now_ns, connection, side, reset);
            } else if held.sides[0].state == State::Opening {
                // The other side tries on in vain.
                if side == 0 {
                    self.remove(connection);
                }
            } else {
                self.end_side(connection, side);
                self.lose_suffix(connection, 1 - side);
                self.give_notice(now_ns, connection, 1 - side);
            }
        }
    }

    /// A machine that was off answers again: that it knows of no connection.
    pub(super) fn machine_started(&mut self, now_ns: u64, at: Endpoint) {
        for (connection, side) in self.connections_at(at) {
            let over =
                self.connections.get(&connection).is_some_and(|held| held.sides[side].state == State::Over);
            if over {
                self.give_notice(now_ns, connection, 1 - side);
            }
        }
    }
}

impl<M> Connection<M> {
    fn side_of(&self, at: Endpoint) -> Option<usize> {
        self.sides.iter().position(|side| side.endpoint == at)
    }
}
