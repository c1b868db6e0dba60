//! The metadata store on an etcd cluster.
//!
//! One member is used at a time, and another one as soon as that fails: a load-balanced channel has no health check,
//! would send every n-th call to a member that hangs, and could not say which member failed how. What can be repeated
//! without harm (reads, and changes that were certainly not sent) is repeated on the next member at once.
//!
//! What this keeps that the client library does not:
//! - A change whose request may have reached a member and got no answer is [`MetaError::Unknown`], never a plain error.
//! - A watch always ends with a reason: the library reports a compacted start in a flag of a message and then goes
//!   silent, and a hung member is found only by HTTP/2 keep-alive and by progress requests.
//! - A watch from revision r asks etcd for r − 1 and drops what is older: some versions start a watch *at* the
//!   compacted revision without an error and without the deletions of that revision (etcd-io/etcd#18089, #19179; seen
//!   with 3.4.23).
//! - Watches are not fragmented: the library does not tell which message is the last of a revision, and a batch must
//!   not split one. The limit on a message's size is raised instead.

use std::error::Error as StdError;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, Compare as EtcdCompare, CompareOp, ConnectOptions, Error as EtcdError, EventType, GetOptions,
    KvClient, LeaseClient, PutOptions, Txn as EtcdTxn, TxnOp, WatchClient, WatchOptions, WatchStream,
};
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    Compare, Event, KeyValue, LeaseId, MetaError, MetaStore, Op, Revision, Snapshot, Txn, TxnOutcome, Watch,
    WatchEnd, validate_key, validate_ttl, validate_watch_start,
};

/// Keys read by one request of a list.
const LIST_PAGE_KEYS: i64 = 1000;
/// How often a list starts again because the revision it reads at was compacted meanwhile.
const LIST_ATTEMPTS: usize = 3;
/// Longest message taken from a member; the library's own limit of 4 MiB would fail large prefixes.
const MESSAGE_MAX_BYTES: usize = 256 * 1024 * 1024;

/// gRPC status codes that decide what an error means (the gRPC specification, statuscodes.md).
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const NOT_FOUND: i32 = 5;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(super) const OUT_OF_RANGE: i32 = 11;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

/// How long things may take. The defaults suit a local network.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// Time for a connection to a member.
    pub connect_timeout: Duration,
    /// Time for a read on one member, then the next is asked.
    pub read_timeout: Duration,
    /// Time for a change; an election of etcd takes part of it.
    pub write_timeout: Duration,
    /// A connection is asked for a sign of life this often …
    pub keep_alive_interval: Duration,
    /// … and given up when there is none for this long.
    pub keep_alive_timeout: Duration,
    /// A watch without messages for this long asks for its progress, and is lost after as long again.
    pub watch_idle: Duration,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            read_timeout: Duration::from_secs(2),
            write_timeout: Duration::from_secs(5),
            keep_alive_interval: Duration::from_secs(2),
            keep_alive_timeout: Duration::from_secs(2),
            watch_idle: Duration::from_secs(10),
        }
    }
}

/// See the module.
pub struct EtcdStore {
    members: Vec<Member>,
    /// The member that answered last.
    current: AtomicUsize,
    options: EtcdOptions,
}

#[derive(Clone)]
struct Member {
    url: String,
    kv: KvClient,
    watch: WatchClient,
    lease: LeaseClient,
}

impl EtcdStore {
    /// Prepares the use of a cluster's members, given by their client URLs (`http://host:port` or `host:port`). Nothing
    /// is sent yet: members that cannot be reached show in the calls, which then fail until one can.
    ///
    /// # Errors
    /// [`MetaError::Invalid`] for a URL that cannot be used.
    pub async fn connect(urls: &[String], options: EtcdOptions) -> Result<Self, MetaError> {
        if urls.is_empty() {
            return Err(MetaError::Invalid("no etcd URL given".into()));
        }
        let mut members = Vec::with_capacity(urls.len());
        for url in urls {
            members.push(Member::prepare(url, &options).await?);
        }
        Ok(Self { members, current: AtomicUsize::new(0), options })
    }

    /// Asks member after member, beginning with the one that answered last.
    async fn call<T, F>(&self, kind: Kind, ask: impl Fn(Member) -> F) -> Result<T, MetaError>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let limit = match kind {
            Kind::Read => self.options.read_timeout,
            Kind::Change => self.options.write_timeout,
        };
        let first = self.current.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for step in 0..self.members.len() {
            let index = (first + step) % self.members.len();
            let member = &self.members[index];
            let failure = match timeout(limit, ask(member.clone())).await {
                Ok(Ok(answer)) => {
                    self.current.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok(Err(error)) => classify(&error),
                Err(_) => Failure::Ambiguous(format!("no answer within {limit:?}")),
            };
            match failure {
                Failure::Final(error) => return Err(error),
                Failure::NotSent(why) => failures.push(format!("{}: {why}", member.url)),
                Failure::Ambiguous(why) => {
                    failures.push(format!("{}: {why}", member.url));
                    if kind == Kind::Change {
                        self.current.store((index + 1) % self.members.len(), Ordering::Relaxed);
                        return Err(MetaError::Unknown(failures.join("; ")));
                    }
                }
            }
        }
        self.current.store((first + 1) % self.members.len(), Ordering::Relaxed);
        Err(MetaError::Unavailable(failures.join("; ")))
    }

    /// Reads a prefix page by page, at the revision of its first page. `None` if that was compacted meanwhile.
    async fn list_pages(&self, prefix: &str) -> Result<Option<Snapshot>, MetaError> {
        let end = prefix_end(prefix);
        let mut start = if prefix.is_empty() { vec![0] } else { prefix.as_bytes().to_vec() };
        let mut snapshot: Option<Snapshot> = None;
        loop {
            let mut options = GetOptions::new().with_range(end.clone()).with_limit(LIST_PAGE_KEYS);
            if let Some(snapshot) = &snapshot {
                options = options.with_revision(snapshot.revision.0);
            }
            let page = self
                .call(Kind::Read, |mut member| {
                    let (start, options) = (start.clone(), options.clone());
                    async move {
                        match member.kv.get(start, Some(options)).await {
                            Err(error) if status_code(&error) == Some(code::OUT_OF_RANGE) => Ok(None),
                            page => page.map(Some),
                        }
                    }
                })
                .await?;
            let Some(mut page) = page else { return Ok(None) };
            let revision = page.header().map_or(0, etcd_client::ResponseHeader::revision);
            let more = page.more();
            let read = page.take_kvs();
            if let Some(last) = read.last() {
                start = last.key().to_vec();
                start.push(0);
            }
            let snapshot = snapshot
                .get_or_insert_with(|| Snapshot { revision: Revision(revision), entries: Vec::new() });
            snapshot.entries.extend(read.into_iter().filter_map(key_value));
            if !more {
                break;
            }
        }
        Ok(snapshot)
    }
}

impl Member {
    async fn prepare(url: &str, options: &EtcdOptions) -> Result<Self, MetaError> {
        let connect = ConnectOptions::new()
            .with_connect_timeout(options.connect_timeout)
            .with_keep_alive(options.keep_alive_interval, options.keep_alive_timeout)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let client = Client::connect([url], Some(connect)).await;
        let client = client
            .map_err(|error| MetaError::Invalid(format!("etcd URL {url:?}: {}", with_causes(&error))))?;
        Ok(Self {
            url: url.to_owned(),
            kv: client.kv_client().max_decoding_message_size(MESSAGE_MAX_BYTES),
            watch: client.watch_client().max_decoding_message_size(MESSAGE_MAX_BYTES),
            lease: client.lease_client(),
        })
    }
}

/// Whether a call may be repeated when its outcome is not known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Change,
}

/// What an error of the library means.
enum Failure {
    /// An answer of the store; another member would say the same.
    Final(MetaError),
    /// The request certainly had no effect; another member may do better.
    NotSent(String),
    /// The request may have been applied.
    Ambiguous(String),
}

fn classify(error: &EtcdError) -> Failure {
    let words = with_causes(error);
    if never_connected(error) {
        return Failure::NotSent(words);
    }
    let EtcdError::GRpcStatus(status) = error else {
        return match error {
            EtcdError::InvalidArgs(_) | EtcdError::InvalidUri(_) => Failure::Final(MetaError::Invalid(words)),
            _ => Failure::Ambiguous(words),
        };
    };
    match i32::from(status.code()) {
        code::INVALID_ARGUMENT => Failure::Final(MetaError::Invalid(status.message().into())),
        // Refused before it is proposed: etcd is overloaded, out of space, or does not know us.
        code::RESOURCE_EXHAUSTED | code::PERMISSION_DENIED | code::UNAUTHENTICATED => {
            Failure::Final(MetaError::Unavailable(status.message().into()))
        }
        // The answer of a member that has no quorum, given before it looks at the request (require-leader).
        _ if status.message() == "etcdserver: no leader" => Failure::NotSent(words),
        _ => Failure::Ambiguous(words),
    }
}

fn status_code(error: &EtcdError) -> Option<i32> {
    match error {
        EtcdError::GRpcStatus(status) => Some(i32::from(status.code())),
        _ => None,
    }
}

/// Whether the error says that there was no connection to send the request on.
fn never_connected(error: &EtcdError) -> bool {
    let mut cause: Option<&(dyn StdError + 'static)> = match error {
        EtcdError::GRpcStatus(status) => Some(status),
        EtcdError::TransportError(transport) => Some(transport),
        _ => None,
    };
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// An error in the words of its deepest cause, which is the one that tells: "tcp connect error: Connection refused".
fn with_causes(error: &EtcdError) -> String {
    let mut words = match error {
        EtcdError::GRpcStatus(status) => status.message().to_owned(),
        error => error.to_string(),
    };
    let mut cause: Option<&(dyn StdError + 'static)> = match error {
        EtcdError::GRpcStatus(status) => status.source(),
        EtcdError::TransportError(transport) => transport.source(),
        _ => None,
    };
    let mut deepest = None;
    while let Some(error) = cause {
        deepest = Some(error.to_string());
        cause = error.source();
    }
    if let Some(deepest) = deepest.filter(|deepest| !words.contains(deepest.as_str())) {
        words.push_str(": ");
        words.push_str(&deepest);
    }
    words
}

/// First key behind all keys with this prefix; a single zero byte means that there is no end.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// Keys that are not text are none of ours.
fn key_value(entry: etcd_client::KeyValue) -> Option<KeyValue> {
    let mod_revision = Revision(entry.mod_revision());
    let lease = Some(LeaseId(entry.lease())).filter(|lease| lease.0 != 0);
    let (key, value) = entry.into_key_value();
    Some(KeyValue { key: String::from_utf8(key).ok()?, value, mod_revision, lease })
}

fn etcd_compare(compare: &Compare) -> EtcdCompare {
    match compare {
        Compare::Absent(key) => EtcdCompare::create_revision(key.as_str(), CompareOp::Equal, 0),
        Compare::Exists(key) => EtcdCompare::create_revision(key.as_str(), CompareOp::Greater, 0),
        Compare::Revision(key, revision) => {
            EtcdCompare::mod_revision(key.as_str(), CompareOp::Equal, revision.0)
        }
    }
}

fn etcd_op(op: &Op) -> TxnOp {
    match op {
        Op::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key.as_str(), value.clone(), options)
        }
        Op::Delete { key } => TxnOp::delete(key.as_str(), None),
    }
}

#[async_trait]
impl MetaStore for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, MetaError> {
        validate_key(key)?;
        let mut answer =
            self.call(Kind::Read, |mut member| async move { member.kv.get(key, None).await }).await?;
        Ok(answer.take_kvs().pop().and_then(key_value))
    }

    async fn list(&self, prefix: &str) -> Result<Snapshot, MetaError> {
        for _ in 0..LIST_ATTEMPTS {
            if let Some(snapshot) = self.list_pages(prefix).await? {
                return Ok(snapshot);
            }
        }
        Err(MetaError::Unavailable(format!("the list of {prefix:?} is compacted faster than it can be read")))
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, MetaError> {
        validate_watch_start(from)?;
        let options = WatchOptions::new()
            .with_range(prefix_end(prefix))
            .with_start_revision((from.0 - 1).max(1))
            .with_progress_notify();
        let start = if prefix.is_empty() { vec![0] } else { prefix.as_bytes().to_vec() };
        let opened = self
            .call(Kind::Read, |mut member| {
                let (start, options) = (start.clone(), options.clone());
                async move {
                    let mut stream = member.watch.watch(start, Some(options)).await?;
                    let first = stream.message().await?;
                    let first =
                        first.ok_or_else(|| EtcdError::WatchError("the stream ended at once".into()))?;
                    Ok((stream, first))
                }
            })
            .await?;
        let (stream, first) = opened;
        let mut watch = EtcdWatch {
            stream,
            from,
            end: None,
            idle: self.options.watch_idle,
            heard_at: Instant::now(),
            asked: false,
        };
        // The first message says that the watch stands; one that is refused is cancelled in it.
        watch.end = watch.take(&first).err();
        Ok(Box::new(watch))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, MetaError> {
        txn.validate()?;
        let compares: Vec<_> = txn.compares.iter().map(etcd_compare).collect();
        let ops: Vec<_> = txn.ops.iter().map(etcd_op).collect();
        let lease = txn.ops.iter().find_map(|op| if let Op::Put { lease, .. } = op { *lease } else { None });
        let answer = self
            .call(Kind::Change, |mut member| {
                let request = EtcdTxn::new().when(compares.clone()).and_then(ops.clone());
                async move { or_gone(member.kv.txn(request).await) }
            })
            .await?;
        let Some(answer) = answer else {
            return Err(
                lease.map_or(MetaError::Invalid("etcd knows no such lease".into()), MetaError::LeaseGone)
            );
        };
        if !answer.succeeded() {
            return Ok(TxnOutcome::Conflict);
        }
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(TxnOutcome::Committed(Revision(revision)))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, MetaError> {
        validate_ttl(ttl)?;
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds =
            i64::try_from(seconds).map_err(|_| MetaError::Invalid(format!("lease time of {ttl:?}")))?;
        let answer = self
            .call(Kind::Change, |mut member| async move { member.lease.grant(seconds, None).await })
            .await?;
        Ok(LeaseId(answer.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, MetaError> {
        // A stream of its own for each renewal: one that broke is never mistaken for a lease that is alive. The library
        // swallows the first answer, so the time comes from a second one. A renewal is harmless to repeat.
        let seconds = self
            .call(Kind::Read, |mut member| async move {
                let (mut keeper, mut answers) = match member.lease.keep_alive(lease.0).await {
                    Err(EtcdError::LeaseKeepAliveError(_)) => return Ok(0),
                    opened => opened?,
                };
                keeper.keep_alive().await?;
                let answer = answers.message().await?;
                let answer =
                    answer.ok_or_else(|| EtcdError::LeaseKeepAliveError("the stream ended".into()))?;
                Ok(answer.ttl())
            })
            .await?;
        match u64::try_from(seconds) {
            Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
            _ => Err(MetaError::LeaseGone(lease)),
        }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), MetaError> {
        let answer = self
            .call(Kind::Change, |mut member| async move { or_gone(member.lease.revoke(lease.0).await) })
            .await?;
        answer.map(drop).ok_or(MetaError::LeaseGone(lease))
    }

    async fn identity(&self) -> Result<String, MetaError> {
        let options = GetOptions::new().with_count_only();
        let answer = self
            .call(Kind::Read, |mut member| {
                let options = options.clone();
                async move { member.kv.get("identity", Some(options)).await }
            })
            .await?;
        let cluster = answer.header().map_or(0, etcd_client::ResponseHeader::cluster_id);
        Ok(format!("{cluster:016x}"))
    }

    fn describe(&self) -> String {
        let urls: Vec<_> = self.members.iter().map(|member| member.url.as_str()).collect();
        format!("etcd at {}", urls.join(", "))
    }
}

/// `None` for the answer "requested lease not found".
fn or_gone<T>(answer: Result<T, EtcdError>) -> Result<Option<T>, EtcdError> {
    match answer {
        Err(error) if status_code(&error) == Some(code::NOT_FOUND) => Ok(None),
        answer => answer.map(Some),
    }
}

struct EtcdWatch {
    stream: WatchStream,
    from: Revision,
    end: Option<WatchEnd>,
    idle: Duration,
    /// When the last message came, or progress was asked for.
    heard_at: Instant,
    /// Progress was asked for and no message came since.
    asked: bool,
}

impl EtcdWatch {
    /// Takes a message's events, or the end that it tells.
    fn take(&self, message: &etcd_client::WatchResponse) -> Result<Vec<Event>, WatchEnd> {
        if message.compact_revision() > 0 {
            return Err(WatchEnd::Compacted { compacted: Revision(message.compact_revision()) });
        }
        if message.canceled() {
            let reason = message.cancel_reason();
            let reason = if reason.is_empty() { "no reason given" } else { reason };
            return Err(WatchEnd::Cancelled { reason: reason.to_owned() });
        }
        let events = message.events().iter().filter_map(watch_event);
        Ok(events.filter(|event| event.revision() >= self.from).collect())
    }

    async fn receive(&mut self) -> Result<Vec<Event>, WatchEnd> {
        let Ok(message) = timeout_at(self.heard_at + self.idle, self.stream.message()).await else {
            return self.ask_for_progress().await.map(|()| Vec::new());
        };
        self.heard_at = Instant::now();
        self.asked = false;
        match message {
            Ok(Some(message)) => self.take(&message),
            Ok(None) => Err(WatchEnd::Lost { reason: "the stream ended".into() }),
            Err(error) => Err(WatchEnd::Lost { reason: with_causes(&error) }),
        }
    }

    async fn ask_for_progress(&mut self) -> Result<(), WatchEnd> {
        if self.asked {
            return Err(WatchEnd::Lost {
                reason: format!("no answer to a progress request within {:?}", self.idle),
            });
        }
        self.asked = true;
        self.heard_at = Instant::now();
        self.stream.request_progress().await.map_err(|error| WatchEnd::Lost { reason: with_causes(&error) })
    }
}

fn watch_event(event: &etcd_client::Event) -> Option<Event> {
    let entry = event.kv()?;
    match event.event_type() {
        EventType::Put => key_value(entry.clone()).map(Event::Put),
        EventType::Delete => {
            let key = entry.key_str().ok()?.to_owned();
            Some(Event::Delete { key, revision: Revision(entry.mod_revision()) })
        }
    }
}

#[async_trait]
impl Watch for EtcdWatch {
    async fn next(&mut self) -> Result<Vec<Event>, WatchEnd> {
        loop {
            if let Some(end) = &self.end {
                return Err(end.clone());
            }
            match self.receive().await {
                Ok(events) if events.is_empty() => {}
                Ok(events) => return Ok(events),
                Err(end) => self.end = Some(end),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_the_next_sibling() {
        assert_eq!(prefix_end("a/"), b"a0");
        assert_eq!(prefix_end("é"), [0xc3, 0xaa]);
        assert_eq!(prefix_end("\u{10ffff}"), [0xf4, 0x8f, 0xbf, 0xc0]);
        assert_eq!(prefix_end(""), [0]);
    }
}
