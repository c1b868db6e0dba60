//! A simulated etcd, seen by the control processes of nodes: revisions, compare-and-swap, leases, watches, and its faults.
//!
//! Its semantics are those of the control process's `MetaStore`, so that what runs on one runs on the other:
//!
//! * Each transaction that changes something takes the next revision; all its changes carry it.
//! * A key that a lease is attached to is deleted, in a revision of its own per lease, when the lease ends.
//! * A watch delivers every change of its prefix in order from the revision it began at, all of one revision together, or
//!   ends with a reason; it never skips.
//! * An error says whether the request can have been applied ([`Error::Unknown`]: now, or in a while) or not.
//!
//! Nothing here is shared between clients but the key space: each has its delays, can be cut off by itself, and hears of
//! changes at its own time. What must hold in spite of all this: losing etcd stops changes, never running I/O (I1); every
//! change compares a revision (I5); a store that comes back from a backup is recognised (I14).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::ops::Range;

use crate::random::Random;
use crate::schedule::{EventId, Schedule};
use state::{Changes, State};

mod faults;
mod state;

/// Most operations, and most compares, of one transaction.
pub const MAX_TXN_OPS: usize = 128;

/// A point in the history of a key space. The first, of an empty one, is 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub i64);

impl Revision {
    /// The one after this: where to watch from after a list at this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A lease; the number is never used again, whatever happens to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

/// One key as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The whole key.
    pub key: String,
    /// Any bytes.
    pub value: Vec<u8>,
    /// When it was created.
    pub create_revision: Revision,
    /// When it was last changed.
    pub mod_revision: Revision,
    /// Changes since it was created, that one included.
    pub version: u64,
    /// The lease whose end deletes it.
    pub lease: Option<LeaseId>,
}

/// All keys of a prefix at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The store's revision then.
    pub revision: Revision,
    /// In the order of the keys.
    pub entries: Vec<KeyValue>,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It was created or replaced.
    Put(KeyValue),
    /// It was deleted.
    Delete {
        /// The whole key.
        key: String,
        /// When.
        revision: Revision,
    },
}

impl Event {
    /// The key that changed.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The revision of the change.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// A condition of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(String),
    /// The key exists.
    Exists(String),
    /// The key exists and was last changed then.
    Revision(String, Revision),
    /// The key exists and was created then.
    Created(String, Revision),
    /// The key exists and was changed so often.
    Version(String, u64),
    /// The key exists with this value.
    Value(String, Vec<u8>),
}

impl Compare {
    /// The key that it is about.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Absent(key)
            | Self::Exists(key)
            | Self::Revision(key, _)
            | Self::Created(key, _)
            | Self::Version(key, _)
            | Self::Value(key, _) => key,
        }
    }
}

/// A change within a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Creates or replaces a key, its value and its lease.
    Put {
        /// The whole key.
        key: String,
        /// Any bytes.
        value: Vec<u8>,
        /// The lease whose end deletes it.
        lease: Option<LeaseId>,
    },
    /// Deletes a key, if there is one.
    Delete {
        /// The whole key.
        key: String,
    },
}

impl Op {
    /// The key that it changes.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// All of `ops` if all of `compares` hold, else nothing. A key occurs in at most one operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// Conditions, at most [`MAX_TXN_OPS`].
    pub compares: Vec<Compare>,
    /// Changes, at most [`MAX_TXN_OPS`].
    pub ops: Vec<Op>,
}

impl Txn {
    /// An empty transaction, to be filled by the methods below.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Adds the change of one key.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: None });
        self
    }

    /// Adds the change of one key that a lease ends.
    #[must_use]
    pub fn put_leased(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>, lease: LeaseId) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: Some(lease) });
        self
    }

    /// Adds the deletion of one key.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.ops.push(Op::Delete { key: key.into() });
        self
    }

    fn is_valid(&self) -> bool {
        let mut keys = BTreeSet::new();
        self.ops.len() <= MAX_TXN_OPS
            && self.compares.len() <= MAX_TXN_OPS
            && self.ops.iter().all(|op| !op.key().is_empty() && keys.insert(op.key()))
            && self.compares.iter().all(|compare| !compare.key().is_empty())
    }
}

/// What a transaction came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Applied and durable; the revision of the changes, or the current one if nothing changed.
    Committed(Revision),
    /// A condition did not hold; nothing was done.
    Conflict,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing was changed.
    #[error("etcd is unavailable")]
    Unavailable,
    /// It may have been applied, or may be in a while.
    #[error("the outcome is unknown")]
    Unknown,
    /// The lease has ended.
    #[error("lease {} is gone", .0.0)]
    LeaseGone(LeaseId),
    /// It breaks a rule; nothing was changed.
    #[error("the request is invalid")]
    Invalid,
}

/// Why a watch ended: list again, and watch from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchEnd {
    /// Changes up to and including this revision cannot be had.
    Compacted(Revision),
    /// The connection is gone, or the store.
    Lost,
}

/// A control process as etcd's client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub usize);

/// A request; its client gives each a number of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A watch; its client gives each a number of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WatchId(pub u64);

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {}", self.0)
    }
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// One key, linearizably.
    Get {
        /// The whole key.
        key: String,
    },
    /// All keys of a prefix, linearizably and at one revision.
    List {
        /// Any string.
        prefix: String,
    },
    /// A transaction.
    Txn(Txn),
    /// A lease that ends so long after its last renewal; etcd makes whole seconds of it, and 2 at least.
    Grant {
        /// At least 1.
        ttl_ns: u64,
    },
    /// Renews a lease.
    KeepAlive {
        /// Which.
        lease: LeaseId,
    },
    /// Ends a lease and deletes its keys.
    Revoke {
        /// Which.
        lease: LeaseId,
    },
    /// Begins a watch.
    Watch {
        /// Its number.
        watch: WatchId,
        /// Any string.
        prefix: String,
        /// The first revision to deliver, possibly one to come.
        from: Revision,
    },
    /// Ends a watch.
    Unwatch {
        /// Which.
        watch: WatchId,
    },
}

impl Request {
    fn changes(&self) -> bool {
        matches!(self, Self::Txn(_) | Self::Grant { .. } | Self::Revoke { .. })
    }
}

/// What a client is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To [`Request::Get`].
    Value(Option<KeyValue>),
    /// To [`Request::List`].
    Snapshot(Snapshot),
    /// To [`Request::Txn`].
    Txn(TxnOutcome),
    /// To [`Request::Grant`]. Count the time from before the request.
    Granted {
        /// The lease.
        lease: LeaseId,
        /// Its time.
        ttl_ns: u64,
    },
    /// To [`Request::KeepAlive`]. Count the time from before the request.
    Renewed {
        /// Its time.
        ttl_ns: u64,
    },
    /// To [`Request::Revoke`].
    Revoked,
    /// To [`Request::Watch`]: changes follow.
    Watching {
        /// Its number.
        watch: WatchId,
    },
    /// To [`Request::Unwatch`]: nothing more follows.
    Unwatched,
}

/// What a client hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// The one answer to a request.
    Answer {
        /// To whom.
        client: ClientId,
        /// To which request.
        request: RequestId,
        /// What.
        result: Result<Reply, Error>,
    },
    /// Changes that a watch is for: at least one, in order, whole revisions.
    Changes {
        /// To whom.
        client: ClientId,
        /// By which watch.
        watch: WatchId,
        /// What.
        events: Vec<Event>,
    },
    /// A watch is over.
    WatchEnded {
        /// To whom.
        client: ClientId,
        /// Which.
        watch: WatchId,
        /// Why.
        end: WatchEnd,
    },
}

impl Output {
    /// To whom.
    #[must_use]
    pub fn client(&self) -> ClientId {
        match self {
            Self::Answer { client, .. } | Self::Changes { client, .. } | Self::WatchEnded { client, .. } => {
                *client
            }
        }
    }
}

/// What happens to a change instead of its normal course.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeFault {
    /// Refused: [`Error::Unavailable`].
    Refused,
    /// The request is lost: [`Error::Unknown`], not applied.
    RequestLost,
    /// The answer is lost: [`Error::Unknown`], applied if its conditions held.
    AnswerLost,
    /// It is applied that much later, after its client may have given up.
    Late(u64),
}

/// How often changes have a fault, of a million, and how slow everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quality {
    /// One way between client and server, and the time that the server takes.
    pub delay_ns: Range<u64>,
    /// From a change to its arrival by a watch.
    pub watch_delay_ns: Range<u64>,
    /// See [`ChangeFault::Refused`].
    pub refused_ppm: u32,
    /// See [`ChangeFault::RequestLost`].
    pub request_lost_ppm: u32,
    /// See [`ChangeFault::AnswerLost`].
    pub answer_lost_ppm: u32,
    /// See [`ChangeFault::Late`].
    pub late_ppm: u32,
    /// How much later.
    pub late_ns: Range<u64>,
}

impl Quality {
    /// An etcd that works.
    #[must_use]
    pub fn good() -> Self {
        Self {
            delay_ns: 200_000..3_000_000,
            watch_delay_ns: 200_000..10_000_000,
            refused_ppm: 0,
            request_lost_ppm: 0,
            answer_lost_ppm: 0,
            late_ppm: 0,
            late_ns: 1_000_000..10_000_000_000,
        }
    }

    /// One that is as slow and as unreliable as it happens to be.
    #[must_use]
    pub fn drawn(random: &mut Random) -> Self {
        let (slow_ns, watch_ns) =
            (random.magnitude(200_000..500_000_000), random.magnitude(200_000..3_000_000_000));
        let mut ppm = || {
            let drawn = if random.coin() { 0 } else { random.magnitude(1_000..200_000) };
            u32::try_from(drawn).unwrap_or(0)
        };
        Self {
            delay_ns: slow_ns / 4..slow_ns,
            watch_delay_ns: watch_ns / 8..watch_ns,
            refused_ppm: ppm(),
            request_lost_ppm: ppm(),
            answer_lost_ppm: ppm(),
            late_ppm: ppm(),
            ..Self::good()
        }
    }
}

/// What does not change during a run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Clients.
    pub clients: usize,
    /// How long a client waits for an answer.
    pub timeout_ns: u64,
    /// How long a client that is cut off takes to give its watches up.
    pub watch_lost_ns: Range<u64>,
    /// How long after its time a lease ends.
    pub lease_late_ns: Range<u64>,
    /// Changes that are kept for watches; older ones are compacted.
    pub history_changes: usize,
    /// Requests that a client may have under way; more fail.
    pub requests: usize,
}

impl Setup {
    /// Usual times and bounds.
    #[must_use]
    pub fn new(clients: usize) -> Self {
        Self {
            clients,
            timeout_ns: 5_000_000_000,
            watch_lost_ns: 1_000_000_000..6_000_000_000,
            lease_late_ns: 0..600_000_000,
            history_changes: 10_000,
            requests: 1024,
        }
    }
}

/// A copy of everything, as an operator's backup is.
#[derive(Clone, Debug)]
pub struct Backup(State);

/// The revision of a store that came back from a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterRestore {
    /// That of the backup: revisions are given again.
    AsSaved,
    /// That of the backup and so much more, as `--bump-revision` makes it.
    Higher(i64),
}

#[derive(Clone, Debug)]
enum Due {
    Arrive { serial: u64, request: Request, faultless: bool, era: u64 },
    Answer { serial: u64, result: Result<Reply, Error> },
    Timeout { serial: u64 },
    LeaseEnd { lease: LeaseId },
    Deliver { client: ClientId, watch: WatchId, serial: u64 },
    WatchesLost { client: ClientId, round: u64 },
    Held(Output, u64),
}

#[derive(Clone, Debug)]
struct Pending {
    client: ClientId,
    request: RequestId,
    changes: bool,
    timeout: EventId,
}

#[derive(Clone, Debug)]
struct Watching {
    prefix: String,
    next: Revision,
    serial: u64,
    /// A delivery is under way.
    coming: bool,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    ttl_ns: u64,
    /// Without renewal.
    ends_ns: u64,
    timer: EventId,
}

#[derive(Clone, Debug)]
struct Client {
    reachable: bool,
    /// Grows with each outage.
    round: u64,
    /// Grows when the process ends.
    life: u64,
    paused: bool,
    held: VecDeque<Output>,
    under_way: usize,
    quality: Quality,
    scripted: VecDeque<ChangeFault>,
}

/// Requests that a store without a leader keeps until it has one.
const WAITING_REQUESTS: usize = 256;

/// See the module.
#[derive(Clone, Debug)]
pub struct Etcd {
    setup: Setup,
    random: Random,
    schedule: Schedule<Due>,
    state: State,
    clients: Vec<Client>,
    pending: BTreeMap<u64, Pending>,
    watches: BTreeMap<(ClientId, WatchId), Watching>,
    leases: BTreeMap<LeaseId, Lease>,
    last_lease: LeaseId,
    available: bool,
    waiting: VecDeque<(u64, Request)>,
    serial: u64,
    /// Grows with each restored backup: what was under way to the former store does not reach the next.
    era: u64,
}

impl Etcd {
    /// An empty store that works.
    #[must_use]
    pub fn new(setup: Setup, random: Random) -> Self {
        let client = Client {
            reachable: true,
            round: 0,
            life: 0,
            paused: false,
            held: VecDeque::new(),
            under_way: 0,
            quality: Quality::good(),
            scripted: VecDeque::new(),
        };
        Self {
            random,
            schedule: Schedule::new(),
            state: State::new(setup.history_changes),
            clients: vec![client; setup.clients],
            pending: BTreeMap::new(),
            watches: BTreeMap::new(),
            leases: BTreeMap::new(),
            last_lease: LeaseId(0),
            available: true,
            waiting: VecDeque::new(),
            serial: 0,
            era: 0,
            setup,
        }
    }

    /// The store's revision.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.state.revision()
    }

    /// One key as it stands, for checkers and for setting a scenario up.
    #[must_use]
    pub fn peek(&self, key: &str) -> Option<KeyValue> {
        self.state.get(key)
    }

    /// All keys of a prefix as they stand, for checkers.
    #[must_use]
    pub fn peek_prefix(&self, prefix: &str) -> Snapshot {
        self.state.list(prefix)
    }

    /// Applies a transaction at once, as an operator or an API call at no node in particular.
    ///
    /// # Errors
    /// Those of the transaction itself.
    pub fn apply(&mut self, now_ns: u64, txn: Txn) -> Result<TxnOutcome, Error> {
        let outcome = if txn.is_valid() { self.state.txn(txn) } else { Err(Error::Invalid) };
        self.tell_watches(now_ns);
        outcome
    }

    /// When [`Self::pop`] has something to do next.
    #[must_use]
    pub fn next_ns(&self) -> Option<u64> {
        self.schedule.next_ns()
    }

    /// Sends a request. Exactly one answer follows, unless the client ends before: at the latest after the time that a
    /// client waits.
    pub fn request(&mut self, now_ns: u64, client: ClientId, request: RequestId, what: Request) {
        self.serial += 1;
        let serial = self.serial;
        let changes = what.changes();
        let timeout = self.schedule.at(now_ns + self.setup.timeout_ns, Due::Timeout { serial });
        self.pending.insert(serial, Pending { client, request, changes, timeout });
        let at = &mut self.clients[client.0];
        at.under_way += 1;
        let (too_many, reachable) = (at.under_way > self.setup.requests, at.reachable);
        let at_ns = now_ns + self.drawn_delay(client);
        if too_many || (!reachable && self.random.coin()) {
            self.schedule.at(at_ns, Due::Answer { serial, result: Err(Error::Unavailable) });
        } else if reachable {
            let (faultless, era) = (!changes, self.era);
            self.schedule.at(at_ns, Due::Arrive { serial, request: what, faultless, era });
        }
    }

    fn drawn_delay(&mut self, client: ClientId) -> u64 {
        self.random.range(self.clients[client.0].quality.delay_ns.clone())
    }

    /// The next thing that a client hears by then, and when.
    pub fn pop(&mut self, limit_ns: u64) -> Option<(u64, Output)> {
        while let Some((now_ns, due)) = self.schedule.pop_by(limit_ns) {
            let output = match due {
                Due::Arrive { serial, request, faultless, era } => {
                    if era == self.era {
                        self.arrive(now_ns, serial, request, faultless);
                    }
                    None
                }
                Due::Answer { serial, result } => self.answer(serial, result),
                Due::Timeout { serial } => self.time_out(serial),
                Due::LeaseEnd { lease } => {
                    self.lease_is_due(now_ns, lease);
                    None
                }
                Due::Deliver { client, watch, serial } => self.deliver(now_ns, client, watch, serial),
                Due::WatchesLost { client, round } => {
                    self.lose_watches(now_ns, client, round);
                    None
                }
                Due::Held(output, life) => (self.clients[output.client().0].life == life).then_some(output),
            };
            let Some(output) = output else { continue };
            let client = &mut self.clients[output.client().0];
            if client.paused {
                client.held.push_back(output);
                continue;
            }
            return Some((now_ns, output));
        }
        None
    }

    fn arrive(&mut self, now_ns: u64, serial: u64, request: Request, faultless: bool) {
        // A request whose client has given up is carried out all the same; only nobody hears of it.
        let pending = self.pending.get(&serial);
        if let Some(client) = pending.map(|pending| pending.client)
            && !faultless
        {
            if !self.clients[client.0].reachable {
                return;
            }
            match self.drawn_fault(client) {
                None => {}
                Some(ChangeFault::AnswerLost) if !self.available => {}
                Some(ChangeFault::Refused) => {
                    self.reply(now_ns, serial, Err(Error::Unavailable));
                    return;
                }
                Some(ChangeFault::RequestLost) => return,
                Some(ChangeFault::AnswerLost) => {
                    let _ = self.carry_out(now_ns, serial, request);
                    return;
                }
                Some(ChangeFault::Late(by_ns)) => {
                    let due = Due::Arrive { serial, request, faultless: true, era: self.era };
                    self.schedule.at(now_ns + by_ns, due);
                    return;
                }
            }
        }
        if !self.available {
            // Without a leader: refused, or kept until there is one.
            if self.random.coin() || self.waiting.len() >= WAITING_REQUESTS {
                self.reply(now_ns, serial, Err(Error::Unavailable));
            } else {
                self.waiting.push_back((serial, request));
            }
            return;
        }
        let result = self.carry_out(now_ns, serial, request);
        self.reply(now_ns, serial, result);
    }

    fn reply(&mut self, now_ns: u64, serial: u64, result: Result<Reply, Error>) {
        let Some(client) = self.pending.get(&serial).map(|pending| pending.client) else { return };
        let at_ns = now_ns + self.drawn_delay(client);
        self.schedule.at(at_ns, Due::Answer { serial, result });
    }

    fn carry_out(&mut self, now_ns: u64, serial: u64, request: Request) -> Result<Reply, Error> {
        let client = self.pending.get(&serial).map(|pending| pending.client);
        let result = match request {
            Request::Get { key } => Ok(Reply::Value(self.state.get(&key))),
            Request::List { prefix } => Ok(Reply::Snapshot(self.state.list(&prefix))),
            Request::Txn(txn) if !txn.is_valid() => Err(Error::Invalid),
            Request::Txn(txn) => self.state.txn(txn).map(Reply::Txn),
            Request::Grant { ttl_ns: 0 } => Err(Error::Invalid),
            Request::Grant { ttl_ns } => {
                let ttl_ns = ttl_ns.div_ceil(1_000_000_000).max(2) * 1_000_000_000;
                self.last_lease.0 += 1;
                let lease = self.last_lease;
                self.state.grant(lease, ttl_ns);
                self.start_lease(now_ns, lease, ttl_ns);
                Ok(Reply::Granted { lease, ttl_ns })
            }
            Request::KeepAlive { lease } => match self.leases.get_mut(&lease) {
                Some(held) => {
                    held.ends_ns = now_ns + held.ttl_ns;
                    Ok(Reply::Renewed { ttl_ns: held.ttl_ns })
                }
                None => Err(Error::LeaseGone(lease)),
            },
            Request::Revoke { lease } => self.end_lease(lease).map(|()| Reply::Revoked),
            Request::Watch { from, .. } if from < Revision(1) => Err(Error::Invalid),
            Request::Watch { watch, prefix, from } => {
                if let Some(client) = client {
                    let watching = Watching { prefix, next: from, serial, coming: false };
                    self.watches.insert((client, watch), watching);
                }
                Ok(Reply::Watching { watch })
            }
            Request::Unwatch { watch } => {
                if let Some(client) = client {
                    self.watches.remove(&(client, watch));
                }
                Ok(Reply::Unwatched)
            }
        };
        self.tell_watches(now_ns);
        result
    }

    /// A lease has its whole time from now on.
    fn start_lease(&mut self, now_ns: u64, lease: LeaseId, ttl_ns: u64) {
        let late_ns = self.random.range(self.setup.lease_late_ns.clone());
        let timer = self.schedule.at(now_ns + ttl_ns + late_ns, Due::LeaseEnd { lease });
        let former = self.leases.insert(lease, Lease { ttl_ns, ends_ns: now_ns + ttl_ns, timer });
        if let Some(former) = former {
            self.schedule.cancel(former.timer);
        }
    }

    fn end_lease(&mut self, lease: LeaseId) -> Result<(), Error> {
        let held = self.leases.remove(&lease).ok_or(Error::LeaseGone(lease))?;
        self.schedule.cancel(held.timer);
        self.state.revoke(lease)
    }

    fn lease_is_due(&mut self, now_ns: u64, lease: LeaseId) {
        let Some(ends_ns) = self.leases.get(&lease).map(|held| held.ends_ns) else { return };
        if ends_ns <= now_ns {
            // Without a leader no lease ends; the next leader gives all of them their time anew.
            if self.available && self.end_lease(lease).is_ok() {
                self.tell_watches(now_ns);
            }
            return;
        }
        let late_ns = self.random.range(self.setup.lease_late_ns.clone());
        let timer = self.schedule.at(ends_ns + late_ns, Due::LeaseEnd { lease });
        if let Some(held) = self.leases.get_mut(&lease) {
            held.timer = timer;
        }
    }

    fn answer(&mut self, serial: u64, result: Result<Reply, Error>) -> Option<Output> {
        let pending = self.pending.get(&serial)?;
        let client = pending.client;
        if !self.clients[client.0].reachable && result != Err(Error::Unavailable) {
            return None;
        }
        let Pending { request, timeout, .. } = self.pending.remove(&serial)?;
        self.schedule.cancel(timeout);
        self.clients[client.0].under_way -= 1;
        if let Ok(Reply::Watching { watch }) = result {
            // What the watch delivers comes behind this, or the news that it was lost meanwhile.
            let key = (client, watch);
            if self.watches.get(&key).is_some_and(|watching| watching.serial == serial) {
                self.tell_watch(self.schedule.now_ns(), key);
            } else {
                let output = Output::WatchEnded { client, watch, end: WatchEnd::Lost };
                self.schedule.after(0, Due::Held(output, self.clients[client.0].life));
            }
        }
        Some(Output::Answer { client, request, result })
    }

    fn time_out(&mut self, serial: u64) -> Option<Output> {
        let Pending { client, request, changes, .. } = self.pending.remove(&serial)?;
        self.clients[client.0].under_way -= 1;
        // A watch that nobody knows of delivers to nobody.
        self.watches.retain(|_, watching| watching.serial != serial);
        let error = if changes { Error::Unknown } else { Error::Unavailable };
        Some(Output::Answer { client, request, result: Err(error) })
    }

    /// Begins deliveries to all watches that have something to hear.
    fn tell_watches(&mut self, now_ns: u64) {
        let revision = self.state.revision();
        let behind = |watching: &Watching| !watching.coming && watching.next <= revision;
        let behind: Vec<(ClientId, WatchId)> = self
            .watches
            .iter()
            .filter(|(_, watching)| behind(watching) && !self.pending.contains_key(&watching.serial))
            .map(|(key, _)| *key)
            .collect();
        for key in behind {
            self.tell_watch(now_ns, key);
        }
    }

    fn tell_watch(&mut self, now_ns: u64, key: (ClientId, WatchId)) {
        let range = self.clients[key.0.0].quality.watch_delay_ns.clone();
        let at_ns = now_ns + self.random.range(range);
        let Some(watching) = self.watches.get_mut(&key) else { return };
        if !watching.coming {
            watching.coming = true;
            let serial = watching.serial;
            self.schedule.at(at_ns, Due::Deliver { client: key.0, watch: key.1, serial });
        }
    }

    fn deliver(&mut self, now_ns: u64, client: ClientId, watch: WatchId, serial: u64) -> Option<Output> {
        let (is_cut_off, paused) = (self.is_cut_off(client), self.clients[client.0].paused);
        let watching = self.watches.get_mut(&(client, watch)).filter(|held| held.serial == serial)?;
        watching.coming = false;
        if is_cut_off || paused {
            // It goes on when that is over.
            return None;
        }
        match self.state.changes(&watching.prefix, watching.next) {
            Changes::Compacted(revision) => {
                self.watches.remove(&(client, watch));
                Some(Output::WatchEnded { client, watch, end: WatchEnd::Compacted(revision) })
            }
            Changes::Events { events, next, more } => {
                watching.next = next;
                if more {
                    self.tell_watch(now_ns, (client, watch));
                }
                (!events.is_empty()).then_some(Output::Changes { client, watch, events })
            }
        }
    }
}

#[cfg(test)]
mod tests;
