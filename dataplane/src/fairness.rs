//! Fairness between clients: how much of a core's memory one may hold, and whose request goes next to a busy device.
//!
//! * **Memory.** A client may have as many requests in progress as there is room for others ([`may_take`]). So one client
//!   alone gets half of the table, two busy ones a third each, and whatever they do, a newcomer finds a place.
//! * **Turns.** A device gets a bounded number of requests at a time from one core. As long as it has fewer, a request that may start does; beyond it requests wait in one line for each client, and clients take turns, one request each.
//!   So a client with few requests waits for the device and for one request of every other client, never for another's
//!   whole line.
//!
//! A client here is a station together with the export that it uses. All memory is taken at construction; every operation
//! costs the same however many requests, clients and devices there are. No I/O and no clock.

use aoe_xdp::order::RequestId;

use crate::clients::ClientId;

/// Devices of one core: a bit each.
pub const DEVICES_MAX: usize = 64;

/// Sizes of one core's tables, and how much a device gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests in progress.
    pub requests: u32,
    /// Clients known, at least as many as can have a request in progress.
    pub clients: u32,
    /// Requests that a device is given at a time.
    pub device_depth: u32,
}

const NONE: u32 = u32::MAX;

/// Whether a client that has `in_progress` requests may have one more when there is room for `free` ones.
#[must_use]
pub fn may_take(in_progress: u32, free: u32) -> bool {
    in_progress < free
}

/// The requests of one client that may start, the oldest first.
#[derive(Debug, Clone, Copy)]
struct Line {
    head: u32,
    tail: u32,
    /// Whose turn comes after this client's, while it has a line.
    next_client: u32,
}

/// The clients with a line at one device, in a circle.
#[derive(Debug, Clone, Copy)]
struct Round {
    /// Who had the last turn; the one behind it has the next.
    last: u32,
    in_flight: u32,
}

/// Who goes next, for all devices of one core.
#[derive(Debug)]
pub struct Turns {
    /// By client.
    lines: Box<[Line]>,
    /// By request: the one behind it in its line.
    behind: Box<[u32]>,
    /// By device.
    rounds: Box<[Round]>,
    /// Devices, by bit, with a line.
    waited_for: u64,
    /// Devices, by bit, that take another request.
    open: u64,
    device_depth: u32,
}

impl Turns {
    /// No lines.
    ///
    /// # Panics
    /// If devices may be given nothing.
    #[must_use]
    pub fn new(limits: Limits) -> Turns {
        assert!(limits.device_depth > 0, "a device takes one request at least");
        let line = Line { head: NONE, tail: NONE, next_client: NONE };
        Turns {
            lines: vec![line; limits.clients as usize].into(),
            behind: vec![NONE; limits.requests as usize].into(),
            rounds: vec![Round { last: NONE, in_flight: 0 }; DEVICES_MAX].into(),
            waited_for: 0,
            open: u64::MAX,
            device_depth: limits.device_depth,
        }
    }

    /// Puts a request that may start at the end of its client's line.
    ///
    /// # Panics
    /// If a number is too high.
    pub fn wait(&mut self, device: usize, client: ClientId, request: RequestId) {
        let line = &mut self.lines[client.0 as usize];
        self.behind[request.0 as usize] = NONE;
        let last = std::mem::replace(&mut line.tail, request.0);
        if last != NONE {
            // The line may be at another device, where the export was before: the request goes with it.
            self.behind[last as usize] = request.0;
            return;
        }
        line.head = request.0;
        let last = std::mem::replace(&mut self.rounds[device].last, client.0);
        let first = match last {
            NONE => client.0,
            last => std::mem::replace(&mut self.lines[last as usize].next_client, client.0),
        };
        self.lines[client.0 as usize].next_client = first;
        self.waited_for |= 1 << device;
    }

    /// Takes the next request for a device that has room, and counts it as in flight there until [`Turns::ended`].
    pub fn take_next(&mut self) -> Option<(usize, RequestId)> {
        let ready = self.waited_for & self.open;
        if ready == 0 {
            return None;
        }
        let device = ready.trailing_zeros() as usize;
        let round = &mut self.rounds[device];
        let last = round.last;
        let client = self.lines[last as usize].next_client;
        let line = &mut self.lines[client as usize];
        let request = line.head;
        line.head = self.behind[request as usize];
        if line.head == NONE {
            line.tail = NONE;
            let after = std::mem::replace(&mut line.next_client, NONE);
            if client == last {
                round.last = NONE;
                self.waited_for &= !(1 << device);
            } else {
                self.lines[last as usize].next_client = after;
            }
        } else {
            round.last = client;
        }
        round.in_flight += 1;
        if round.in_flight >= self.device_depth {
            self.open &= !(1 << device);
        }
        Some((device, RequestId(request)))
    }

    /// A request taken for `device` has ended.
    ///
    /// # Panics
    /// If none is in flight there.
    pub fn ended(&mut self, device: usize) {
        let in_flight = &mut self.rounds[device].in_flight;
        *in_flight = in_flight.checked_sub(1).expect("a request ends once");
        self.open |= 1 << device;
    }

    /// Whether `device` takes no more before one of its requests has ended.
    #[must_use]
    pub fn is_busy(&self, device: usize) -> bool {
        self.open & 1 << device == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const GREEDY: ClientId = ClientId(3);
    const MODEST: ClientId = ClientId(5);
    const DEVICE_DEPTH: u32 = 128;
    const LIMITS: Limits = Limits { requests: 1024, clients: 8, device_depth: DEVICE_DEPTH };

    fn drain(turns: &mut Turns) -> Vec<u32> {
        std::iter::from_fn(|| turns.take_next()).map(|(_, id)| id.0).collect()
    }

    #[test]
    fn a_device_with_room_takes_everything_in_order() {
        let mut turns = Turns::new(LIMITS);
        (0..DEVICE_DEPTH).for_each(|id| turns.wait(0, GREEDY, RequestId(id)));
        assert_eq!(drain(&mut turns), (0..DEVICE_DEPTH).collect::<Vec<_>>());
        assert!(turns.is_busy(0) && !turns.is_busy(1));
        turns.wait(0, GREEDY, RequestId(400));
        turns.wait(1, MODEST, RequestId(401));
        assert_eq!(turns.take_next(), Some((1, RequestId(401))), "another device is not held up");
        assert_eq!(turns.take_next(), None);
        turns.ended(0);
        assert_eq!(turns.take_next(), Some((0, RequestId(400))));
    }

    /// One client keeps 256 requests outstanding and another one 4. Counted in ends of requests, not in time.
    #[test]
    fn a_client_with_four_requests_gets_its_share_beside_one_with_256() {
        let mut turns = Turns::new(LIMITS);
        let mut in_flight = VecDeque::new();
        // (client, admitted at which end, started at which end), by request.
        let mut admitted = vec![(GREEDY, 0usize); 260];
        for id in 0..260u32 {
            let client = if id < 256 { GREEDY } else { MODEST };
            admitted[id as usize] = (client, 0);
            turns.wait(0, client, RequestId(id));
        }
        let (mut modest_ends, mut longest_wait) = (0, 0);
        const ENDS: usize = 10_000;
        for end in 0..ENDS {
            while let Some((_, id)) = turns.take_next() {
                let (client, since) = admitted[id.0 as usize];
                if client == MODEST {
                    longest_wait = longest_wait.max(end - since);
                }
                in_flight.push_back(id);
            }
            assert_eq!(in_flight.len(), DEVICE_DEPTH as usize, "the device is kept busy");
            let id = in_flight.pop_front().unwrap();
            turns.ended(0);
            let client = admitted[id.0 as usize].0;
            modest_ends += usize::from(client == MODEST);
            // Each client asks again as soon as it is answered.
            admitted[id.0 as usize] = (client, end + 1);
            turns.wait(0, client, id);
        }
        assert!(longest_wait <= 2, "{longest_wait} ends until the start: one turn of the other client");
        // All that it asks is in flight all the time: 4 of the device's 128 places.
        let share = ENDS * 4 / DEVICE_DEPTH as usize;
        assert!(modest_ends + 8 >= share, "{modest_ends} of {share}");
    }

    #[test]
    fn equal_clients_share_equally() {
        let mut turns = Turns::new(LIMITS);
        (0..DEVICE_DEPTH).for_each(|id| turns.wait(0, ClientId(7), RequestId(id)));
        let _busy = drain(&mut turns);
        for id in 0..300 {
            // Their lines come one behind the other.
            turns.wait(0, ClientId(id / 100), RequestId(200 + id));
        }
        for round in 0..100 {
            let mut turn: Vec<u32> = (0..3)
                .map(|_| {
                    turns.ended(0);
                    turns.take_next().unwrap().1.0
                })
                .collect();
            turn.sort_unstable();
            assert_eq!(turn, [200 + round, 300 + round, 400 + round]);
        }
    }

    #[test]
    fn newcomers_find_room_beside_any_number_of_greedy_clients() {
        const ROOM: u32 = 1024;
        let mut held = [0u32; 16];
        for round in 0..ROOM {
            for greedy in 0..15 {
                let free = ROOM - held.iter().sum::<u32>();
                held[greedy] += u32::from(may_take(held[greedy], free));
            }
            assert!(held.iter().sum::<u32>() < ROOM, "round {round}");
        }
        let free = ROOM - held.iter().sum::<u32>();
        assert_eq!(free, ROOM / 16, "fifteen clients leave one part of sixteen");
        assert!(may_take(held[15], free));
    }

    proptest! {
        /// Against lists: every request comes out once, a client's in order, and nobody has two turns while another waits.
        #[test]
        fn turns_agree_with_the_model(
            steps in proptest::collection::vec((0u32..6, any::<bool>()), 1..600)
        ) {
            let mut turns = Turns::new(LIMITS);
            let mut waiting: Vec<VecDeque<u32>> = vec![VecDeque::new(); 6];
            let mut round: VecDeque<u32> = VecDeque::new();
            let mut in_flight = 0;
            let mut id = 0;
            for (client, arrives) in steps {
                if arrives {
                    turns.wait(0, ClientId(client), RequestId(id));
                    if waiting[client as usize].is_empty() {
                        round.push_back(client);
                    }
                    waiting[client as usize].push_back(id);
                    id += 1;
                } else if in_flight == DEVICE_DEPTH || (in_flight > 0 && client == 0) {
                    turns.ended(0);
                    in_flight -= 1;
                } else {
                    let expected = round.pop_front().map(|client| {
                        let line = &mut waiting[client as usize];
                        let id = line.pop_front().unwrap();
                        if !line.is_empty() {
                            round.push_back(client);
                        }
                        id
                    });
                    prop_assert_eq!(turns.take_next().map(|(_, id)| id.0), expected);
                    in_flight += u32::from(expected.is_some());
                }
            }
        }
    }
}
