//! The clients of the exports that one core serves: who asks for how much, and how much of it is in progress.
//!
//! A client is a station, known by its MAC, that reads, writes or flushes one export. The table has a fixed number of
//! places, so that a flood of frames from invented MACs costs bounded memory; what it can cost real clients is bounded by
//! who loses a place when none is free:
//! * Never a client with a request in progress: its window and its order are kept.
//! * First the newcomer that was idle longest. A newcomer becomes a *regular* after [`REGULAR_AFTER`] answered requests, and
//!   regulars hold at most three places of four, so that newcomers always push out newcomers first.
//! * A regular only makes way, idle longest first, for another one: to push one out, invented clients have to be answered
//!   `REGULAR_AFTER` times each, faster than it comes back, for every place of the regulars.
//!
//! Losing a place costs a client its counts and the proof of its tags, nothing else. Finding one costs one look into a hash table; every other step
//! is a few stores. All memory is taken at construction.
//!
//! Each client is a stream of [`TagOrder`], which knows the late copies of writes of initiators whose tags are Linux's (I6).

use aoe_xdp::tags::{StreamId, TagOrder};
use aoe_xdp::target::{Io, IoKind};
use aoe_xdp::wire::{Address, Mac};
use cluster_map::{ClientCounter, CoreClients, Latency};

/// Answered requests that make a newcomer a regular: a Linux initiator's first window.
pub const REGULAR_AFTER: u32 = 64;

/// Writes of one block that are remembered to know late copies, in 1 MiB: 6 s at 10 000 writes a second.
const WRITES_REMEMBERED: u32 = 1 << 16;

const NONE: u32 = u32::MAX;

/// A client's place, valid as long as it has a request in progress, else until the next call of [`Clients::seen`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientId(pub u32);

/// Why a request of a client was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// Too many requests are in progress.
    Limit,
    /// No memory is free.
    Memory,
    /// A newer write of the same station to the same sectors came before.
    Late,
}

/// What a place is linked into while its client has nothing in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum List {
    Newcomers,
    Regulars,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    export: u32,
    address: Address,
    mac: Mac,
    in_flight: u32,
    answered: u32,
    list: List,
    /// Its export is gone: it is nobody's as soon as nothing is in progress.
    gone: bool,
    /// Next place of the same hash; of free places, the next free one.
    hash_next: u32,
    newer: u32,
    older: u32,
}

const FREE: Place = Place {
    export: 0,
    address: Address { shelf: 0, slot: 0 },
    mac: Mac([0; 6]),
    in_flight: 0,
    answered: 0,
    list: List::Newcomers,
    gone: false,
    hash_next: NONE,
    newer: NONE,
    older: NONE,
};

/// The ends of one list of idle clients.
#[derive(Debug, Clone, Copy)]
struct Ends {
    newest: u32,
    oldest: u32,
}

/// The table.
#[derive(Debug)]
pub struct Clients {
    places: Box<[Place]>,
    free: u32,
    buckets: Box<[u32]>,
    bucket_shift: u32,
    /// By [`List`].
    idle: [Ends; 2],
    regulars: u32,
    regulars_max: u32,
    tags: TagOrder,
    published: CoreClients,
}

impl Clients {
    /// A table with `clients_max` places, whose counts are published in the places of the same numbers in the map.
    ///
    /// # Panics
    /// If `clients_max` is 0 or above 2^11.
    #[must_use]
    pub fn new(clients_max: u32, published: CoreClients) -> Clients {
        assert!(clients_max > 0 && clients_max <= 1 << 11);
        let buckets = (clients_max as usize * 2).next_power_of_two();
        let place =
            |index: u32| Place { hash_next: if index + 1 < clients_max { index + 1 } else { NONE }, ..FREE };
        Clients {
            places: (0..clients_max).map(place).collect(),
            free: 0,
            buckets: vec![NONE; buckets].into(),
            bucket_shift: 64 - buckets.trailing_zeros(),
            idle: [Ends { newest: NONE, oldest: NONE }; 2],
            regulars: 0,
            regulars_max: clients_max - clients_max.div_ceil(4),
            tags: TagOrder::new(clients_max, WRITES_REMEMBERED),
            published,
        }
    }

    /// The client that sent a request for the export with this key and address, now in its place or in that of another one;
    /// `None` if every client of the table has a request in progress: then this one cannot be served. `now_ns` is of
    /// `CLOCK_MONOTONIC`.
    pub fn seen(&mut self, export: u32, address: Address, mac: Mac, now_ns: u64) -> Option<ClientId> {
        let bucket = self.bucket(export, mac);
        let mut at = self.buckets[bucket];
        while at != NONE {
            let place = &self.places[at as usize];
            if place.export == export && place.mac == mac && place.address == address && !place.gone {
                self.published.seen(at, now_ns);
                return Some(ClientId(at));
            }
            at = place.hash_next;
        }
        let at = self.vacate()?;
        let hash_next = std::mem::replace(&mut self.buckets[bucket], at);
        self.places[at as usize] = Place { export, address, mac, hash_next, ..FREE };
        self.published.give(at, mac.0, address.shelf, address.slot, now_ns);
        self.tags.begin(StreamId(at), export);
        self.link(at);
        Some(ClientId(at))
    }

    /// Takes the tag of a request of the client in; whether it is a late copy of a write, which must be dropped: a newer one
    /// of the same host to one of its sectors was [`written`](Self::written) before.
    pub fn is_late(&mut self, id: ClientId, io: &Io, now_ns: u64) -> bool {
        let stream = StreamId(id.0);
        self.tags.observe(stream, io.tag(), now_ns);
        io.kind == IoKind::Write && self.tags.is_late(stream, io.tag(), io.lba, io.sectors, now_ns)
    }

    /// A write of the client was admitted: older ones to its sectors are late from now on.
    pub fn written(&mut self, id: ClientId, io: &Io, now_ns: u64) {
        self.tags.admitted(StreamId(id.0), io.tag(), io.lba, io.sectors, now_ns);
    }

    /// A request of the client is in progress from now on, until [`answered`](Self::answered),
    /// [`failed`](Self::failed) or [`abandoned`](Self::abandoned).
    pub fn admitted(&mut self, id: ClientId) {
        if self.places[id.0 as usize].in_flight == 0 {
            self.unlink(id.0);
        }
        let place = &mut self.places[id.0 as usize];
        place.in_flight += 1;
        self.published.in_flight(id.0, place.in_flight);
    }

    /// A request repeats one that is in progress; counted besides [`admitted`](Self::admitted).
    pub fn duplicate(&mut self, id: ClientId) {
        self.published.add(id.0, ClientCounter::Duplicates, 1);
    }

    /// A request that was not admitted is dropped.
    pub fn dropped(&mut self, id: ClientId, why: Dropped) {
        let counter = match why {
            Dropped::Limit => ClientCounter::DroppedLimit,
            Dropped::Memory => ClientCounter::DroppedMemory,
            Dropped::Late => ClientCounter::DroppedLate,
        };
        self.published.add(id.0, counter, 1);
    }

    /// A request in progress was done and answered, `elapsed_ns` after it arrived; `bytes` of data were read or written.
    pub fn answered(&mut self, id: ClientId, kind: IoKind, bytes: u64, elapsed_ns: u64) {
        match kind {
            IoKind::Read => {
                self.published.add(id.0, ClientCounter::Reads, 1);
                self.published.add(id.0, ClientCounter::ReadBytes, bytes);
                self.published.record(id.0, Latency::Read, elapsed_ns);
            }
            IoKind::Write => {
                self.published.add(id.0, ClientCounter::Writes, 1);
                self.published.add(id.0, ClientCounter::WriteBytes, bytes);
                self.published.record(id.0, Latency::Write, elapsed_ns);
            }
            IoKind::Flush => self.published.add(id.0, ClientCounter::Flushes, 1),
        }
        let place = &mut self.places[id.0 as usize];
        place.answered = place.answered.saturating_add(1);
        self.ended(id);
    }

    /// A request in progress was answered with an ATA error.
    pub fn failed(&mut self, id: ClientId) {
        self.published.add(id.0, ClientCounter::AtaErrors, 1);
        self.ended(id);
    }

    /// A request in progress ended without an answer: dropped for the reason given, or because its export is gone.
    pub fn abandoned(&mut self, id: ClientId, why: Option<Dropped>) {
        if let Some(why) = why {
            self.dropped(id, why);
        }
        self.ended(id);
    }

    /// The client's requests in progress.
    #[must_use]
    pub fn in_flight(&self, id: ClientId) -> u32 {
        self.places[id.0 as usize].in_flight
    }

    /// Forgets the clients of exports that are not `served` any more under their key and address. Called for every
    /// configuration, so that a key or an address that is given to another export never brings the clients of the former
    /// one along.
    pub fn keep_only(&mut self, served: impl Fn(u32, Address) -> bool) {
        for at in 0..u32::try_from(self.places.len()).expect("at most 2^11") {
            let place = self.places[at as usize];
            if place.mac == FREE.mac || place.gone || served(place.export, place.address) {
                continue;
            }
            self.places[at as usize].gone = true;
            if place.in_flight == 0 {
                self.forget(at);
            }
        }
    }

    fn ended(&mut self, id: ClientId) {
        let place = &mut self.places[id.0 as usize];
        place.in_flight -= 1;
        self.published.in_flight(id.0, place.in_flight);
        if place.in_flight > 0 {
            return;
        }
        let (promoted, gone) = (place.list == List::Newcomers && place.answered >= REGULAR_AFTER, place.gone);
        if promoted {
            self.promote(id.0);
        }
        self.link(id.0);
        if gone {
            self.forget(id.0);
        }
    }

    /// Makes a client a regular, if need be in the stead of the one that was idle longest.
    fn promote(&mut self, at: u32) {
        if self.regulars == self.regulars_max {
            let oldest = self.idle[List::Regulars as usize].oldest;
            if oldest == NONE {
                return;
            }
            self.unlink(oldest);
            let place = &mut self.places[oldest as usize];
            (place.list, place.answered) = (List::Newcomers, 0);
            self.regulars -= 1;
            self.link(oldest);
        }
        self.places[at as usize].list = List::Regulars;
        self.regulars += 1;
    }

    /// A place that is nobody's.
    fn vacate(&mut self) -> Option<u32> {
        if self.free == NONE {
            let [newcomers, regulars] = self.idle;
            let oldest = if newcomers.oldest == NONE { regulars.oldest } else { newcomers.oldest };
            if oldest == NONE {
                return None;
            }
            self.forget(oldest);
        }
        let at = self.free;
        self.free = self.places[at as usize].hash_next;
        Some(at)
    }

    /// Takes an idle client's place away.
    fn forget(&mut self, at: u32) {
        self.unlink(at);
        let place = self.places[at as usize];
        let bucket = self.bucket(place.export, place.mac);
        if self.buckets[bucket] == at {
            self.buckets[bucket] = place.hash_next;
        } else {
            let mut before = self.buckets[bucket];
            while self.places[before as usize].hash_next != at {
                before = self.places[before as usize].hash_next;
            }
            self.places[before as usize].hash_next = place.hash_next;
        }
        if place.list == List::Regulars {
            self.regulars -= 1;
        }
        self.places[at as usize] = Place { hash_next: self.free, ..FREE };
        self.free = at;
        self.published.take_away(at);
        self.tags.end(StreamId(at));
    }

    fn bucket(&self, export: u32, mac: Mac) -> usize {
        let [a, b, c, d, e, f] = mac.0;
        let mixed = u64::from_be_bytes([0, 0, a, b, c, d, e, f])
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(u64::from(export).wrapping_mul(0xd6e8_feb8_6659_fd93))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        usize::try_from(mixed >> self.bucket_shift).expect("fewer buckets than usize")
    }

    /// Makes an idle client the newest of its list.
    fn link(&mut self, at: u32) {
        let ends = &mut self.idle[self.places[at as usize].list as usize];
        let older = std::mem::replace(&mut ends.newest, at);
        match older {
            NONE => ends.oldest = at,
            older => self.places[older as usize].newer = at,
        }
        let place = &mut self.places[at as usize];
        (place.older, place.newer) = (older, NONE);
    }

    fn unlink(&mut self, at: u32) {
        let Place { list, newer, older, .. } = self.places[at as usize];
        match newer {
            NONE => self.idle[list as usize].newest = older,
            newer => self.places[newer as usize].older = older,
        }
        match older {
            NONE => self.idle[list as usize].oldest = newer,
            older => self.places[older as usize].newer = newer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster_map::{ClientSnapshot, ClusterId, ControlMap, DataMap, Geometry, NodeId};
    use proptest::prelude::*;
    use std::collections::HashMap;

    struct Table {
        clients: Clients,
        control: ControlMap,
        _map: DataMap,
        _folder: tempfile::TempDir,
    }

    fn table(clients_max: u32) -> Table {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("map");
        let control =
            ControlMap::create(&path, &Geometry::new(1, ClusterId([1; 16]), NodeId([2; 16]))).unwrap();
        let map = DataMap::attach(&path).unwrap();
        let clients = Clients::new(clients_max, map.core_clients(0).unwrap());
        Table { clients, control, _map: map, _folder: folder }
    }

    fn address(slot: u8) -> Address {
        Address { shelf: 7, slot }
    }

    fn seen(clients: &mut Clients, slot: u8, number: u64, now_ns: u64) -> Option<ClientId> {
        clients.seen(slot.into(), address(slot), mac(number), now_ns)
    }

    fn mac(number: u64) -> Mac {
        let [_, _, _, a, b, c, d, e] = number.to_be_bytes();
        Mac([2, a, b, c, d, e])
    }

    fn serve(clients: &mut Clients, slot: u8, number: u64, times: u32) {
        for _ in 0..times {
            let id = seen(clients, slot, number, 1).expect("nothing else is in progress");
            clients.admitted(id);
            clients.answered(id, IoKind::Read, 512, 1_000);
        }
    }

    fn published(table: &Table, slot: u8, number: u64) -> Option<ClientSnapshot> {
        let clients = table.control.reader().clients_of(7, slot).unwrap();
        clients.into_iter().find(|client| client.mac == mac(number).0)
    }

    #[test]
    fn what_a_client_does_is_published() {
        let mut table = table(8);
        let clients = &mut table.clients;
        let id = seen(clients, 1, 1, 50).unwrap();
        clients.admitted(id);
        clients.admitted(id);
        clients.duplicate(id);
        assert_eq!((clients.in_flight(id), seen(clients, 1, 1, 60)), (2, Some(id)));
        clients.answered(id, IoKind::Write, 1024, 9_000);
        clients.failed(id);
        for why in [Dropped::Limit, Dropped::Memory, Dropped::Late] {
            clients.dropped(id, why);
        }
        clients.admitted(id);
        clients.abandoned(id, Some(Dropped::Memory));
        clients.admitted(id);
        assert_ne!(seen(clients, 2, 1, 70), Some(id), "another export, another client");
        let seen = published(&table, 1, 1).unwrap();
        assert_eq!((seen.first_seen_ns, seen.last_seen_ns), (50, 60));
        assert_eq!((seen.in_flight, seen.in_flight_max), (1, 2));
        let counts: Vec<u64> = seen.counters().map(|(_, count)| count).collect();
        assert_eq!(counts, [0, 1, 0, 0, 1024, 1, 1, 1, 2, 1], "{seen:?}");
        assert_eq!((seen.write_ns.count(), seen.write_ns.sum_ns(), seen.read_ns.count()), (1, 9_000, 0));
        assert_eq!(published(&table, 2, 1).unwrap().get(ClientCounter::Writes), 0);
    }

    #[test]
    fn a_flood_of_invented_stations_takes_no_place_from_regulars_nor_from_who_waits() {
        let mut table = table(16);
        for number in 1..=12 {
            serve(&mut table.clients, 1, number, REGULAR_AFTER);
        }
        let waiting = seen(&mut table.clients, 1, 13, 1).unwrap();
        table.clients.admitted(waiting);
        for invented in 1_000..100_000 {
            serve(&mut table.clients, 1, invented, 1);
        }
        for number in 1..=12 {
            let client = published(&table, 1, number).expect("a regular keeps its place");
            assert_eq!(client.get(ClientCounter::Reads), u64::from(REGULAR_AFTER));
        }
        assert_eq!(seen(&mut table.clients, 1, 13, 1), Some(waiting));
        assert_eq!(table.control.reader().clients().unwrap().len(), 16);
        // A regular that does not come back makes way for a new one in the end.
        serve(&mut table.clients, 1, 2_000_000, REGULAR_AFTER);
        serve(&mut table.clients, 1, 2_000_001, 3);
        serve(&mut table.clients, 1, 2_000_002, 3);
        serve(&mut table.clients, 1, 2_000_003, 3);
        assert!(published(&table, 1, 2_000_000).is_some() && published(&table, 1, 12).is_some());
        assert!(published(&table, 1, 1).is_none(), "the one that was idle longest");
    }

    #[test]
    fn a_full_table_of_waiting_clients_takes_no_more() {
        let mut table = table(3);
        let ids: Vec<_> = (0..3).map(|number| seen(&mut table.clients, 1, number + 1, 1).unwrap()).collect();
        ids.iter().for_each(|&id| table.clients.admitted(id));
        assert_eq!(seen(&mut table.clients, 1, 9, 1), None);
        table.clients.answered(ids[1], IoKind::Flush, 0, 1);
        assert_eq!(seen(&mut table.clients, 1, 9, 1), Some(ids[1]));
        assert!(published(&table, 1, 2).is_none() && published(&table, 1, 9).is_some());
    }

    #[test]
    fn clients_go_with_their_export() {
        let mut table = table(8);
        serve(&mut table.clients, 1, 5, 1);
        serve(&mut table.clients, 2, 5, 1);
        let waiting = seen(&mut table.clients, 1, 6, 1).unwrap();
        table.clients.admitted(waiting);
        table.clients.keep_only(|key, _| key == 2);
        assert!(published(&table, 1, 5).is_none() && published(&table, 2, 5).is_some());
        // The address again, for another export, while a request of the former one is in progress.
        table.clients.keep_only(|key, _| key == 2 || key == 9);
        assert_ne!(table.clients.seen(9, address(1), mac(6), 1), Some(waiting));
        // A key again, for another export.
        table.clients.keep_only(|key, at| (key, at) != (2, address(2)));
        assert!(published(&table, 2, 5).is_none());
        table.clients.answered(waiting, IoKind::Read, 512, 1);
        let clients = table.control.reader().clients_of(7, 1).unwrap();
        assert_eq!(clients.len(), 1);
        assert_eq!(clients[0].get(ClientCounter::Reads), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// Whatever comes and goes: nobody with a request in progress loses its place or its count, and no place is lost.
        #[test]
        fn who_waits_is_never_forgotten(steps in prop::collection::vec((0u64..24, 0u8..2, 0u8..4), 1..600)) {
            let mut table = table(8);
            let clients = &mut table.clients;
            let mut waiting: HashMap<(u64, u8), (ClientId, u32)> = HashMap::new();
            for (number, slot, what) in steps {
                match (what, waiting.get_mut(&(number, slot))) {
                    (0 | 1, known) => match (seen(clients, slot, number + 1, 1), known) {
                        (Some(id), Some((place, count))) => {
                            prop_assert_eq!(id, *place);
                            clients.admitted(id);
                            *count += 1;
                        }
                        (Some(id), None) => {
                            prop_assert_eq!(clients.in_flight(id), 0);
                            clients.admitted(id);
                            waiting.insert((number, slot), (id, 1));
                        }
                        (None, known) => prop_assert!(known.is_none() && waiting.len() == 8),
                    },
                    (2, Some((id, count))) => {
                        let id = *id;
                        *count -= 1;
                        if *count == 0 {
                            waiting.remove(&(number, slot));
                        }
                        clients.answered(id, IoKind::Read, 0, 1);
                    }
                    (3, None) => {
                        let busy = |other| waiting.keys().any(|key| key.1 == other);
                        clients.keep_only(|key, at| key == u32::from(slot) || busy(at.slot));
                    }
                    _ => {}
                }
                for (id, count) in waiting.values() {
                    prop_assert_eq!(clients.in_flight(*id), *count);
                }
            }
            for (id, count) in waiting.into_values() {
                (0..count).for_each(|_| clients.abandoned(id, None));
            }
            // All places can be had again.
            for number in 100..108 {
                let id = seen(clients, 0, number, 1);
                prop_assert!(id.is_some());
                clients.admitted(id.unwrap());
            }
        }
    }
}
