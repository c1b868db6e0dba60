//! Discovery at a pace that initiators survive: answers to wildcard queries and advertisements, without I/O.
//!
//! One broadcast to ten thousand exports asks for ten thousand answers, and a Linux socket has room for 277 small frames
//! by default (212,992 bytes, 768 for each): a burst would be lost. So a query becomes a job that goes through the exports in
//! order of address, and all jobs share one pace.
//!
//! Invariants:
//! * Memory is fixed: a query that finds no room is dropped and counted, the initiator asks again.
//! * Jobs take turns, whoever asked first: one answer each. Advertisements get every fourth turn while queries wait.
//! * No more than [`BURST_BYTES`] leave at once, and no more than [`PACE_BYTES_PER_S`] go on leaving.
//! * A job outlives a change of configuration: it goes on at the address where it was.
//! * A turn looks at a bounded number of exports, so that reads and writes never wait for discovery.
//! * The advertisement of an export whose head has moved is sent several times: a switch that missed it goes on sending what initiators
//!   ask to where the head was, and nothing but a frame from the export's MAC tells it better.

use std::collections::{BTreeSet, VecDeque};

use aoe_xdp::target::{
    self, Action, Answer, Body, DISCOVERY_LEN_MAX, Export, ExportTable, Ingress, advertisement,
};
use aoe_xdp::wire::{self, Address, Mac, SHELF_ANY};

/// Queries that are answered at a time.
const JOBS_MAX: usize = 32;
/// Of them those of one initiator.
const JOBS_OF_CLIENT_MAX: usize = 4;
/// What a small frame takes of a socket's room, in bytes.
const SMALL_BYTES: u64 = 768;
/// What a frame with a body takes: a sector or a string of up to 1024 bytes.
const LARGE_BYTES: u64 = 2304;
/// Sustained pace: 8,000 small answers a second, so that 10,000 take 1.25 s, or 1.7 s beside advertisements.
pub const PACE_BYTES_PER_S: u64 = 8_000 * SMALL_BYTES;
/// Most that leaves at once: a sixth of a default socket's room.
pub const BURST_BYTES: u64 = 48 * SMALL_BYTES;
/// Answers in one turn, so that requests are served between them.
const ANSWERS_PER_TURN: usize = 16;
/// Exports looked at in one turn.
const LOOKS_PER_TURN: usize = 1024;
/// While queries wait, advertisements get each turn of this number.
const ADVERTISE_EVERY: u64 = 4;

/// How long after the first time an advertisement of a head is sent again: soon enough for I/O to go on within 3 s, and once more for a
/// network that is only just whole again.
const AGAIN_NS: [u64; 4] = [200_000_000, 700_000_000, 2_000_000_000, 5_000_000_000];

/// A query that is being answered.
#[derive(Debug)]
struct Job {
    interface: u8,
    pattern: Address,
    /// The lowest address that has not been looked at.
    next: Address,
    request: [u8; DISCOVERY_LEN_MAX],
    request_len: u16,
}

impl Job {
    fn request(&self) -> &[u8] {
        &self.request[..usize::from(self.request_len)]
    }

    fn client(&self) -> Option<Mac> {
        wire::parse_header(self.request()).ok().map(|header| header.src)
    }
}

/// The exports that are to be advertised, and where.
#[derive(Debug, Default)]
struct Announcements {
    keys: VecDeque<u32>,
    /// By key: it is in `keys`.
    queued: Vec<bool>,
    /// How many advertisements of the first of `keys` have been sent.
    sent: usize,
}

/// All discovery work of one core.
#[derive(Debug)]
pub struct Discovery {
    jobs: Vec<Job>,
    /// The job whose turn it is.
    turn: usize,
    turns: u64,
    announcements: Announcements,
    /// Keys of exports that are to be advertised once more, and when.
    again: BTreeSet<(u64, u32)>,
    tokens_bytes: u64,
    /// When `tokens_bytes` was last added to.
    filled_ns: u64,
}

impl Default for Discovery {
    fn default() -> Discovery {
        Discovery {
            jobs: Vec::with_capacity(JOBS_MAX),
            turn: 0,
            turns: 0,
            announcements: Announcements::default(),
            again: BTreeSet::new(),
            tokens_bytes: BURST_BYTES,
            filled_ns: 0,
        }
    }
}

/// How a step ended.
enum Step {
    /// With an answer.
    Answered,
    /// Its job has nothing more to say, or not within the looks that were left.
    Nothing,
}

impl Discovery {
    /// Takes a query in that is for all exports of `pattern`; `false` if there is no room.
    #[must_use]
    pub fn ask(&mut self, interface: u8, pattern: Address, frame: &[u8]) -> bool {
        let frame = &frame[..frame.len().min(DISCOVERY_LEN_MAX)];
        // A copy of what is being answered is answered by the same answers: they have the same tag.
        if self.jobs.iter().any(|job| job.interface == interface && job.request() == frame) {
            return true;
        }
        let client = wire::parse_header(frame).ok().map(|header| header.src);
        let of_client = self.jobs.iter().filter(|job| job.client() == client).count();
        if self.jobs.len() >= JOBS_MAX || of_client >= JOBS_OF_CLIENT_MAX {
            return false;
        }
        let mut request = [0; DISCOVERY_LEN_MAX];
        request[..frame.len()].copy_from_slice(frame);
        let shelf = if pattern.shelf == SHELF_ANY { 0 } else { pattern.shelf };
        self.jobs.push(Job {
            interface,
            pattern,
            next: Address { shelf, slot: 0 },
            request,
            request_len: u16::try_from(frame.len()).expect("at most 1056 bytes"),
        });
        true
    }

    /// Queues exports to be advertised; may allocate.
    pub fn announce(&mut self, keys: &[u32]) {
        let waiting = &mut self.announcements;
        for &key in keys {
            let at = key as usize;
            if waiting.queued.len() <= at {
                waiting.queued.resize(at + 1, false);
            }
            if !std::mem::replace(&mut waiting.queued[at], true) {
                waiting.keys.push_back(key);
            } else if waiting.sent > 0 && waiting.keys.front() == Some(&key) {
                // Half advertised as it was: once more from the start.
                waiting.sent = 0;
            }
        }
    }

    /// Queues exports of heads that are new here, to be advertised several times; may allocate. Later times are found by
    /// [`Discovery::run`], which a core with heads calls often enough.
    pub fn announce_heads(&mut self, keys: impl IntoIterator<Item = u32>, now_ns: u64) {
        for key in keys {
            self.announce(&[key]);
            self.again.extend(AGAIN_NS.map(|after_ns| (now_ns.saturating_add(after_ns), key)));
        }
    }

    /// Whether there is something left to send.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !self.jobs.is_empty() || !self.announcements.keys.is_empty()
    }

    /// Sends what may leave now: answers by the interface the query came by, advertisements by those in `advertise_on`.
    /// `send` gets the interface's ordinal, the export, the answer, and the request that it answers. Whether anything was
    /// done.
    pub fn run(
        &mut self,
        now_ns: u64,
        table: &ExportTable,
        ingress: &[Ingress],
        advertise_on: &[u8],
        mut send: impl FnMut(u8, &Export, &Answer, &[u8]),
    ) -> bool {
        while let Some((_, key)) = self.again.first().copied().filter(|(due_ns, _)| *due_ns <= now_ns) {
            self.again.pop_first();
            self.announce(&[key]);
        }
        if !self.is_busy() {
            return false;
        }
        self.fill(now_ns);
        let mut looks = LOOKS_PER_TURN;
        let mut worked = false;
        for _ in 0..ANSWERS_PER_TURN {
            if self.tokens_bytes < LARGE_BYTES || looks == 0 || !self.is_busy() {
                break;
            }
            worked = true;
            self.turns += 1;
            let advertise = !self.announcements.keys.is_empty()
                && (self.jobs.is_empty() || self.turns.is_multiple_of(ADVERTISE_EVERY));
            let mut cost_bytes = 0;
            let mut charged = |interface, export: &Export, answer: &Answer, request: &[u8]| {
                cost_bytes = if answer.body == Body::Nothing { SMALL_BYTES } else { LARGE_BYTES };
                send(interface, export, answer, request);
            };
            let step = if advertise {
                self.announcements.step(table, ingress, advertise_on, &mut looks, &mut charged)
            } else {
                self.step_job(table, ingress, &mut looks, &mut charged)
            };
            if matches!(step, Step::Answered) {
                self.tokens_bytes = self.tokens_bytes.saturating_sub(cost_bytes);
            }
        }
        worked
    }

    fn fill(&mut self, now_ns: u64) {
        let elapsed_ns = now_ns.saturating_sub(self.filled_ns);
        // Whole bytes only, so that what is left over is not lost.
        let bytes = elapsed_ns.min(1_000_000_000) * PACE_BYTES_PER_S / 1_000_000_000;
        if bytes > 0 {
            self.filled_ns = now_ns;
            self.tokens_bytes = (self.tokens_bytes + bytes).min(BURST_BYTES);
        }
    }

    /// The next answer of the job whose turn it is.
    fn step_job(
        &mut self,
        table: &ExportTable,
        ingress: &[Ingress],
        looks: &mut usize,
        send: &mut impl FnMut(u8, &Export, &Answer, &[u8]),
    ) -> Step {
        self.turn = if self.turn < self.jobs.len() { self.turn } else { 0 };
        let job = &mut self.jobs[self.turn];
        let Some(ingress) = ingress.get(usize::from(job.interface)) else {
            self.jobs.swap_remove(self.turn);
            return Step::Nothing;
        };
        for export in table.starting_at(job.next) {
            if job.pattern.shelf != SHELF_ANY && export.address.shelf != job.pattern.shelf {
                break;
            }
            if *looks == 0 {
                return Step::Nothing;
            }
            *looks -= 1;
            job.next = after(export.address);
            if !job.pattern.matches(export.address) {
                continue;
            }
            let request = &job.request[..usize::from(job.request_len)];
            if let Action::Answer(answer) = target::respond(export, ingress, request, request.len()) {
                send(job.interface, export, &answer, request);
                self.turn += 1;
                return Step::Answered;
            }
        }
        // The last job takes its place and its turn.
        self.jobs.swap_remove(self.turn);
        Step::Nothing
    }
}

impl Announcements {
    /// The next advertisement: of the first export in the queue, to each of its audience, on each interface.
    fn step(
        &mut self,
        table: &ExportTable,
        ingress: &[Ingress],
        advertise_on: &[u8],
        looks: &mut usize,
        send: &mut impl FnMut(u8, &Export, &Answer, &[u8]),
    ) -> Step {
        while let Some(&key) = self.keys.front() {
            if *looks == 0 {
                return Step::Nothing;
            }
            *looks -= 1;
            let export = table.by_key(key);
            let next = export.and_then(|export| {
                let on = advertise_on.iter().filter(|ordinal| export.is_on(**ordinal));
                let mut all = on.flat_map(|on| export.audience().iter().map(move |to| (*on, *to)));
                all.nth(self.sent).map(|(on, to)| (export, on, to))
            });
            if let Some((export, on, to)) = next {
                self.sent += 1;
                let Some(ingress) = ingress.get(usize::from(on)) else { continue };
                send(on, export, &advertisement(export, ingress, to), &[]);
                return Step::Answered;
            }
            self.keys.pop_front();
            self.queued[key as usize] = false;
            self.sent = 0;
        }
        Step::Nothing
    }
}

/// The address that follows in order.
fn after(address: Address) -> Address {
    match address.slot.checked_add(1) {
        Some(slot) => Address { slot, ..address },
        None => Address { shelf: address.shelf.saturating_add(1), slot: 0 },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use aoe_xdp::target::{AoePolicy, ON_ALL_INTERFACES};
    use aoe_xdp::wire::{AtaArg, AtaHead, Header, command};
    use zerocopy::IntoBytes;

    use super::*;

    const NIC: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const MS: u64 = 1_000_000;

    fn export(key: u32) -> Export {
        let shelf = u16::try_from(key / 250).unwrap();
        let slot = u8::try_from(key % 250).unwrap();
        Export {
            key,
            address: Address { shelf, slot },
            mac: Mac([2, 0xaa, 0, shelf.to_le_bytes()[0], slot, 0]),
            size_sectors: 8,
            read_only: false,
            serial: String::new(),
            config_string: Vec::new(),
            on_interfaces: ON_ALL_INTERFACES,
            masks: Vec::new(),
            reserved_for: Vec::new(),
            allow: AoePolicy::default(),
        }
    }

    fn table(count: u32) -> ExportTable {
        ExportTable::new((0..count).map(export).collect()).unwrap()
    }

    fn ingress() -> Vec<Ingress> {
        (0..2).map(|ordinal| Ingress { mac: NIC, ordinal, sectors_max: 16, sectors_told: 16 }).collect()
    }

    #[test]
    fn the_export_of_a_head_is_advertised_again_and_again() {
        let (table, ingress) = (table(3), ingress());
        let mut discovery = Discovery::default();
        discovery.announce_heads([1], 0);
        let mut times_ms = Vec::new();
        for now_ms in 0..10_000 {
            discovery.run(now_ms * MS, &table, &ingress, &[0], |_, export, _, _| {
                assert_eq!(export.key, 1);
                times_ms.push(now_ms);
            });
        }
        let again = AGAIN_NS.map(|after_ns| after_ns / MS);
        assert_eq!(times_ms, [&[0][..], &again[..]].concat());
        assert!(!discovery.is_busy());
    }

    fn query(client: u8, tag: u32, pattern: Address) -> Vec<u8> {
        let mut frame =
            Header::request(Mac::BROADCAST, Mac([2, 0, 0, 0, 1, client]), pattern, command::CONFIG, tag)
                .as_bytes()
                .to_vec();
        frame.extend([0; 8]);
        frame
    }

    type Answers = Vec<(u64, u8, Address, Mac)>;

    /// Runs until nothing is left, every 2 ms; what was sent when, by which interface, by whom and to whom.
    fn run_all(discovery: &mut Discovery, table: &ExportTable) -> Answers {
        let mut answers = Vec::new();
        let mut now_ns = 1_000_000_000;
        while discovery.is_busy() {
            discovery.run(now_ns, table, &ingress(), &[0, 1], |on, export, answer, _| {
                let header = wire::parse_header(&answer.head.bytes).unwrap();
                answers.push((now_ns, on, export.address, header.dst));
            });
            now_ns += 2 * MS;
            assert!(now_ns < 1_000_000_000_000, "it ends");
        }
        answers
    }

    #[test]
    fn ten_thousand_exports_answer_once_each_within_two_seconds_and_never_too_many_at_once() {
        let table = table(10_000);
        let mut discovery = Discovery::default();
        assert!(discovery.ask(1, Address::ANY, &query(1, 7, Address::ANY)));
        // The same frame once more changes nothing.
        assert!(discovery.ask(1, Address::ANY, &query(1, 7, Address::ANY)));
        let answers = run_all(&mut discovery, &table);
        let addresses: Vec<Address> = answers.iter().map(|a| a.2).collect();
        assert_eq!(addresses, table.exports().iter().map(|e| e.address).collect::<Vec<_>>());
        let (first_ns, last_ns) = (answers[0].0, answers.last().unwrap().0);
        assert!(last_ns - first_ns < 1_400 * MS, "{} ms", (last_ns - first_ns) / MS);
        // In every window of 20 ms no more than half of a default socket's room.
        for (at, start) in answers.iter().enumerate() {
            let in_window = answers[at..].iter().take_while(|a| a.0 < start.0 + 20 * MS).count();
            assert!(in_window as u64 * SMALL_BYTES <= 212_992 * 3 / 4, "{in_window} in 20 ms");
        }
    }

    #[test]
    fn a_core_that_was_away_makes_up_for_no_more_than_a_burst() {
        let table = table(1_000);
        let mut discovery = Discovery::default();
        assert!(discovery.ask(0, Address::ANY, &query(1, 7, Address::ANY)));
        let mut sent = 0;
        for _turn in 0..1000 {
            discovery.run(u64::MAX / 2, &table, &ingress(), &[], |_, _, _, _| sent += 1);
        }
        assert!((40..=48).contains(&sent), "{sent}");
    }

    #[test]
    fn patterns_choose_shelves_and_slots() {
        let table = table(1_000);
        for (pattern, count) in [
            (Address { shelf: 2, slot: 0xff }, 250),
            (Address { shelf: 0xffff, slot: 3 }, 4),
            (Address { shelf: 9, slot: 0xff }, 0),
        ] {
            let mut discovery = Discovery::default();
            assert!(discovery.ask(0, pattern, &query(1, 7, pattern)));
            let answers = run_all(&mut discovery, &table);
            assert_eq!(answers.len(), count, "{pattern}");
            assert!(answers.iter().all(|a| pattern.matches(a.2)));
        }
    }

    #[test]
    fn initiators_take_turns_and_one_cannot_take_all_the_room() {
        let table = table(500);
        let mut discovery = Discovery::default();
        for client in 1..=3 {
            assert!(discovery.ask(0, Address::ANY, &query(client, 7, Address::ANY)));
        }
        let answers = run_all(&mut discovery, &table);
        let mut done: BTreeMap<Mac, usize> = BTreeMap::new();
        for (_, _, _, to) in &answers {
            *done.entry(*to).or_default() += 1;
            let (most, least) = (done.values().max().unwrap(), done.values().min().unwrap());
            assert!(done.len() < 3 || most - least <= 1, "{done:?}");
        }
        assert!(done.values().all(|count| *count == 500));

        let mut discovery = Discovery::default();
        let taken =
            (0..100).filter(|tag| discovery.ask(0, Address::ANY, &query(1, *tag, Address::ANY))).count();
        assert_eq!(taken, JOBS_OF_CLIENT_MAX);
        for client in 2..100 {
            let _full = discovery.ask(0, Address::ANY, &query(client, 0, Address::ANY));
        }
        assert_eq!(discovery.jobs.len(), JOBS_MAX);
    }

    #[test]
    fn identify_is_answered_by_every_export_at_the_pace_of_its_size() {
        let table = table(100);
        let header = Header::request(Mac::BROADCAST, Mac([2, 0, 0, 0, 1, 1]), Address::ANY, command::ATA, 1);
        let frame = AtaHead { header, arg: AtaArg::identify() };
        let mut discovery = Discovery::default();
        assert!(discovery.ask(0, Address::ANY, frame.as_bytes()));
        let answers = run_all(&mut discovery, &table);
        assert_eq!(answers.len(), 100);
        let first_batch = answers.iter().filter(|a| a.0 == answers[0].0).count();
        assert_eq!(first_batch as u64, BURST_BYTES / LARGE_BYTES);
    }

    #[test]
    fn advertisements_go_to_each_interface_and_audience_once_beside_queries() {
        let exports: Vec<Export> = (0..40u32)
            .map(|key| match key {
                7 => Export { masks: vec![Mac([2, 0, 0, 0, 1, 9]), Mac([2, 0, 0, 0, 1, 8])], ..export(7) },
                8 => Export { on_interfaces: 2, ..export(8) },
                _ => export(key),
            })
            .collect();
        let table = ExportTable::new(exports).unwrap();
        let mut discovery = Discovery::default();
        discovery.announce(&[7, 8, 9, 99]);
        discovery.announce(&[9]);
        assert!(discovery.ask(0, Address::ANY, &query(1, 7, Address::ANY)));
        let answers = run_all(&mut discovery, &table);
        let advertised = |key: u32| {
            let of =
                |a: &&(u64, u8, Address, Mac)| a.2 == export(key).address && a.3 != Mac([2, 0, 0, 0, 1, 1]);
            answers.iter().filter(of).map(|a| (a.1, a.3.0[5])).collect::<Vec<_>>()
        };
        assert_eq!(advertised(7), [(0, 9), (0, 8), (1, 9), (1, 8)]);
        assert_eq!(advertised(8), [(1, 0xff)]);
        assert_eq!(advertised(9), [(0, 0xff), (1, 0xff)]);
        assert!(advertised(10).is_empty());
        // Export 7 does not exist for the one that asked, and export 8 not where it asked.
        assert_eq!(answers.iter().filter(|a| a.3 == Mac([2, 0, 0, 0, 1, 1])).count(), 38);
    }

    #[test]
    fn a_query_goes_on_where_it_was_when_exports_come_and_go() {
        let mut discovery = Discovery::default();
        assert!(discovery.ask(0, Address::ANY, &query(1, 7, Address::ANY)));
        let mut seen = Vec::new();
        let before = table(300);
        discovery.run(1_000_000_000, &before, &ingress(), &[], |_, export, _, _| seen.push(export.key));
        assert_eq!(seen, (0..16).collect::<Vec<_>>());
        // The first ten go, and others come behind.
        let after = ExportTable::new((10..400).map(export).collect()).unwrap();
        for step in 1..1000 {
            discovery.run(1_000_000_000 + step * MS, &after, &ingress(), &[], |_, export, _, _| {
                seen.push(export.key);
            });
        }
        assert_eq!(seen, (0..400).collect::<Vec<_>>());
    }
}
