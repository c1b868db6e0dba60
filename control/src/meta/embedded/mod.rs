//! The metadata store of a cluster of one node: a journal file in a directory.
//!
//! One thread owns the journal and runs tokio-uring. It takes all requests that wait, decides them in order on the
//! state that includes what is on its way to the disk, makes their records durable with one write and one fdatasync,
//! publishes them, and only then answers. Readers and watches see durable state only.
//!
//! A write that failed in a way that leaves its outcome open makes the store unusable until it is opened again: every
//! call says so. A second process that opens the directory is refused.

mod codec;
mod disk;
mod journal;
#[cfg(test)]
mod sim_disk;
#[cfg(test)]
mod tests;

use std::fs;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use self::codec::Damage;
use self::disk::{Disk, UringDisk};
use self::journal::{AppendError, JOURNAL, Journal, OpenJournalError, RewriteError};
use super::lease_clock::LeaseClock;
use super::published::Published;
use super::state::{Plan, Record, State};
use super::{
    KeyValue, LeaseId, MetaError, MetaStore, Revision, Snapshot, Txn, TxnOutcome, Watch, WatchEnd,
    validate_key, validate_ttl, validate_watch_start,
};

/// Bytes of changes kept for watches that resume; older ones are compacted.
const HISTORY_BYTES: usize = 16 * 1024 * 1024;
/// The journal is written anew when it has grown by this, and by as much as its snapshot.
const REWRITE_MIN_BYTES: u64 = 1024 * 1024;
/// Most requests decided by one write.
const BATCH_COMMANDS: usize = 256;
/// A batch is closed when its requests hold this many bytes.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
const QUEUE_COMMANDS: usize = 1024;
/// After a write that found no space, leases are not ended for this long: it would only fail again.
const RETRY_MS: u64 = 1000;

/// Why the store in a directory could not be opened. Nothing was changed.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("the metadata store in {} is in use by process {holder}; stop that one, or choose another --state-dir", dir.display())]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// What the other process wrote into the lock file: its process id.
        holder: String,
    },
    /// The journal is damaged: what was acknowledged cannot all be read.
    #[error(
        "{} is damaged at byte {offset}: {what}; restore the file from a backup (its directory is not written to)",
        path.display()
    )]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// First byte of what cannot be read.
        offset: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The journal was written by a newer version.
    #[error("{} has format {found}, this version reads format 1 only; run the version that wrote it", path.display())]
    Version {
        /// The journal.
        path: PathBuf,
        /// Its format.
        found: u16,
    },
    /// The directory or a file in it cannot be used.
    #[error("metadata store in {}: {what}: {source}", dir.display())]
    Io {
        /// The directory.
        dir: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// No io_uring for the journal.
    #[error(
        "the metadata store cannot start io_uring: {0}; allow it (sysctl kernel.io_uring_disabled=0, and the \
         container's seccomp profile)"
    )]
    NoUring(io::Error),
}

/// See the module. Dropping it writes what is queued, closes the journal and unlocks the directory.
pub struct EmbeddedStore {
    dir: PathBuf,
    identity: String,
    published: Arc<Published>,
    broken: Arc<OnceLock<String>>,
    commands: Option<mpsc::Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

impl EmbeddedStore {
    /// Opens the store in a directory; creates both if there is nothing.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(dir: impl Into<PathBuf>) -> Result<Self, OpenError> {
        let dir = dir.into();
        let (opened, opening) = oneshot::channel();
        let (commands, queue) = mpsc::channel(QUEUE_COMMANDS);
        let spawned = std::thread::Builder::new().name("meta-journal".into()).spawn({
            let dir = dir.clone();
            move || run_thread(&dir, opened, queue)
        });
        let thread =
            spawned.map_err(|source| OpenError::Io { dir: dir.clone(), what: "start its thread", source })?;
        let opened = opening.await.unwrap_or_else(|_| {
            let source = io::Error::other("its thread ended; the log says why");
            Err(OpenError::Io { dir: dir.clone(), what: "open", source })
        });
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // It has the lock until it ends, and who sees the error may try again at once.
                let _ = thread.join();
                return Err(error);
            }
        };
        Ok(Self {
            dir,
            identity: opened.identity,
            published: opened.published,
            broken: opened.broken,
            commands: Some(commands),
            thread: Some(thread),
        })
    }

    /// Forgets the history up to and including `through`: watches can no longer start there. Data stays.
    pub fn compact(&self, through: Revision) {
        self.published.change(|state| state.compact(through));
    }

    fn usable(&self) -> Result<&mpsc::Sender<Command>, MetaError> {
        if let Some(broken) = self.broken.get() {
            return Err(unusable(broken));
        }
        let commands = self.commands.as_ref().filter(|commands| !commands.is_closed());
        commands.ok_or_else(|| unusable("the journal's thread ended"))
    }

    /// Sends a command to the journal's thread and waits for its answer.
    async fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, MetaError> {
        let (answer, answered) = oneshot::channel();
        let sent = self.usable()?.send(command(answer)).await;
        sent.map_err(|_| unusable("the journal's thread ended"))?;
        answered.await.unwrap_or_else(|_| Err(MetaError::Unknown("the journal's thread ended".into())))
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by its hook.
            let _ = thread.join();
        }
    }
}

fn unusable(why: &str) -> MetaError {
    MetaError::Unavailable(format!("{why}; restart torusd"))
}

#[async_trait]
impl MetaStore for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, MetaError> {
        validate_key(key)?;
        self.usable()?;
        Ok(self.published.read(|state| state.get(key)))
    }

    async fn list(&self, prefix: &str) -> Result<Snapshot, MetaError> {
        self.usable()?;
        Ok(self.published.read(|state| state.list(prefix)))
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, MetaError> {
        validate_watch_start(from)?;
        let watch = self.published.watch(prefix, from);
        // Checked after the cursor exists, so that it cannot miss the end of the store.
        self.usable()?;
        Ok(Box::new(watch))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, MetaError> {
        txn.validate()?;
        self.ask(|answer| Command::Txn(txn, answer)).await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, MetaError> {
        validate_ttl(ttl)?;
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
        self.ask(|answer| Command::Grant(ttl_ms, answer)).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, MetaError> {
        match self.ask(|answer| Command::KeepAlive(lease, answer)).await {
            // A renewal changes nothing that could be read back.
            Err(MetaError::Unknown(why)) => Err(MetaError::Unavailable(why)),
            answer => answer,
        }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), MetaError> {
        self.ask(|answer| Command::Revoke(lease, answer)).await
    }

    async fn identity(&self) -> Result<String, MetaError> {
        self.usable()?;
        Ok(self.identity.clone())
    }

    fn describe(&self) -> String {
        format!("embedded in {}", self.dir.display())
    }
}

type Answer<T> = oneshot::Sender<Result<T, MetaError>>;

#[derive(Debug)]
enum Command {
    Txn(Txn, Answer<TxnOutcome>),
    Grant(u64, Answer<LeaseId>),
    KeepAlive(LeaseId, Answer<Duration>),
    Revoke(LeaseId, Answer<()>),
}

impl Command {
    fn bytes(&self) -> usize {
        match self {
            Self::Txn(txn, _) => txn.ops.iter().map(op_bytes).sum(),
            _ => 0,
        }
    }
}

fn op_bytes(op: &super::Op) -> usize {
    match op {
        super::Op::Put { key, value, .. } => key.len() + value.len(),
        super::Op::Delete { key } => key.len(),
    }
}

/// An answer that is decided, and sent when the batch that it depends on is durable.
enum Staged {
    Txn(Answer<TxnOutcome>, Result<TxnOutcome, MetaError>),
    Grant(Answer<LeaseId>, LeaseId, u64),
    KeepAlive(Answer<Duration>, LeaseId),
    Revoke(Answer<()>, Result<LeaseId, MetaError>),
    Expired(LeaseId),
}

/// The store without its thread: decides batches and makes them durable.
struct Core<D: Disk> {
    journal: Journal<D>,
    /// Durable state and what is on its way to the disk.
    ahead: State,
    published: Arc<Published>,
    broken: Arc<OnceLock<String>>,
    clock: LeaseClock,
    /// Leases are not ended before this.
    expire_after_ms: u64,
    /// Growth at which the journal is written anew.
    rewrite_at_bytes: u64,
    rewrite_min_bytes: u64,
    records: Vec<Record>,
    staged: Vec<Staged>,
}

impl<D: Disk> Core<D> {
    async fn open(disk: D, history_bytes: usize, rewrite_min_bytes: u64) -> Result<Self, OpenJournalError> {
        let (journal, state) = Journal::open(disk, history_bytes).await?;
        let ahead = state.clone().without_history();
        let mut clock = LeaseClock::default();
        for (lease, ttl_ms) in ahead.leases() {
            // Nobody could renew while the store was closed: all start anew.
            clock.start(lease, ttl_ms, 0);
        }
        let rewrite_at_bytes = rewrite_min_bytes.max(journal.base_bytes());
        Ok(Self {
            journal,
            published: Published::new(state),
            ahead,
            broken: Arc::default(),
            clock,
            expire_after_ms: 0,
            rewrite_at_bytes,
            rewrite_min_bytes,
            records: Vec::new(),
            staged: Vec::new(),
        })
    }

    /// When the next lease is to be ended, if any.
    fn next_expiry_ms(&self) -> Option<u64> {
        let (deadline_ms, _) = self.clock.first()?;
        Some(deadline_ms.max(self.expire_after_ms)).filter(|_| self.broken.get().is_none())
    }

    /// Decides, makes durable, publishes and answers a batch, and ends the leases that are over.
    async fn process(&mut self, batch: &mut Vec<Command>, now_ms: u64) {
        for command in batch.drain(..) {
            self.stage(command);
        }
        // After the requests: a renewal that waited for a slow disk still counts.
        self.stage_renewals(now_ms);
        self.stage_expired(now_ms);
        if self.records.is_empty() && self.broken.get().is_none() {
            return self.answer(now_ms);
        }
        match self.journal.append(&self.records).await {
            Ok(()) => {
                let applied = self.published.apply(&self.records);
                applied.expect("records staged on a copy of the published state apply to it");
                self.answer(now_ms);
                self.rewrite_if_grown().await;
            }
            Err(AppendError::Refused(error)) => {
                tracing::warn!(%error, "the metadata journal cannot grow");
                self.ahead = self.published.read(State::clone).without_history();
                self.expire_after_ms = now_ms.saturating_add(RETRY_MS);
                self.refuse(&MetaError::Unavailable(format!("the metadata journal cannot grow: {error}")));
            }
            Err(AppendError::Broken(why)) => self.fail(&why),
        }
        self.records.clear();
    }

    fn stage(&mut self, command: Command) {
        let staged = match command {
            Command::Txn(txn, answer) => {
                let outcome = self.stage_txn(txn);
                Staged::Txn(answer, outcome)
            }
            Command::Grant(ttl_ms, answer) => {
                let record = self.ahead.plan_grant(ttl_ms);
                self.stage_record(record);
                Staged::Grant(answer, self.ahead.last_lease(), ttl_ms)
            }
            Command::KeepAlive(lease, answer) => Staged::KeepAlive(answer, lease),
            Command::Revoke(lease, answer) => {
                let planned = self.ahead.plan_revoke(lease);
                Staged::Revoke(
                    answer,
                    planned.map(|record| {
                        self.stage_record(record);
                        lease
                    }),
                )
            }
        };
        self.staged.push(staged);
    }

    fn stage_txn(&mut self, txn: Txn) -> Result<TxnOutcome, MetaError> {
        match self.ahead.plan(txn)? {
            Plan::Conflict => Ok(TxnOutcome::Conflict),
            Plan::Unchanged(revision) => Ok(TxnOutcome::Committed(revision)),
            Plan::Write(record) => {
                self.stage_record(record);
                Ok(TxnOutcome::Committed(self.ahead.revision()))
            }
        }
    }

    fn stage_record(&mut self, record: Record) {
        self.ahead.apply(&record).expect("a record planned on this very state applies to it");
        self.records.push(record);
    }

    fn stage_renewals(&mut self, now_ms: u64) {
        for staged in &self.staged {
            if let Staged::KeepAlive(_, lease) = staged {
                self.clock.renew(*lease, now_ms);
            }
        }
    }

    fn stage_expired(&mut self, now_ms: u64) {
        if now_ms < self.expire_after_ms {
            return;
        }
        for lease in self.clock.expired(now_ms) {
            // Already revoked by a request of this batch: nothing left to end.
            if let Ok(record) = self.ahead.plan_revoke(lease) {
                self.stage_record(record);
                self.staged.push(Staged::Expired(lease));
            }
        }
    }

    /// Sends the answers; what they depend on is durable.
    fn answer(&mut self, now_ms: u64) {
        for staged in self.staged.drain(..) {
            // Nobody listens to an answer whose caller gave up.
            match staged {
                Staged::Txn(answer, outcome) => drop(answer.send(outcome)),
                Staged::Grant(answer, lease, ttl_ms) => {
                    self.clock.start(lease, ttl_ms, now_ms);
                    drop(answer.send(Ok(lease)));
                }
                Staged::KeepAlive(answer, lease) => {
                    let left_ms = self.clock.renew(lease, now_ms);
                    drop(answer.send(left_ms.map(Duration::from_millis).ok_or(MetaError::LeaseGone(lease))));
                }
                Staged::Revoke(answer, outcome) => {
                    if let Ok(lease) = outcome {
                        self.clock.stop(lease);
                    }
                    drop(answer.send(outcome.map(drop)));
                }
                Staged::Expired(lease) => {
                    self.clock.stop(lease);
                    tracing::info!(%lease, "a lease of the metadata store ended by time");
                }
            }
        }
    }

    /// Answers a batch of which nothing was applied. What is decided already may rest on what was not applied.
    fn refuse(&mut self, error: &MetaError) {
        for staged in self.staged.drain(..) {
            match staged {
                Staged::Txn(answer, _) => drop(answer.send(Err(error.clone()))),
                Staged::Grant(answer, ..) => drop(answer.send(Err(error.clone()))),
                Staged::KeepAlive(answer, _) => drop(answer.send(Err(error.clone()))),
                Staged::Revoke(answer, _) => drop(answer.send(Err(error.clone()))),
                // Still on the clock: tried again when there may be space.
                Staged::Expired(_) => {}
            }
        }
    }

    /// Answers a batch that may or may not be applied, and ends the use of the store.
    fn fail(&mut self, why: &str) {
        if self.broken.set(why.to_owned()).is_ok() {
            tracing::error!(why, "the metadata store is unusable until torusd is restarted");
            self.published.end_watches(WatchEnd::Lost { reason: why.to_owned() });
        }
        let unknown = || MetaError::Unknown(why.to_owned());
        for staged in self.staged.drain(..) {
            match staged {
                Staged::Txn(answer, Ok(TxnOutcome::Committed(_))) => drop(answer.send(Err(unknown()))),
                Staged::Txn(answer, _) => drop(answer.send(Err(unusable(why)))),
                Staged::Grant(answer, ..) => drop(answer.send(Err(unknown()))),
                Staged::KeepAlive(answer, _) => drop(answer.send(Err(unusable(why)))),
                Staged::Revoke(answer, _) => drop(answer.send(Err(unknown()))),
                Staged::Expired(_) => {}
            }
        }
    }

    async fn rewrite_if_grown(&mut self) {
        if self.journal.grown_bytes() < self.rewrite_at_bytes {
            return;
        }
        match self.journal.rewrite(&self.ahead).await {
            Ok(()) => self.rewrite_at_bytes = self.rewrite_min_bytes.max(self.journal.base_bytes()),
            Err(RewriteError::Kept(error)) => {
                tracing::warn!(%error, "the metadata journal could not be compacted; it is used as it is");
                self.rewrite_at_bytes = self.journal.grown_bytes().saturating_add(self.rewrite_min_bytes);
            }
            Err(RewriteError::Broken(why)) => self.fail(&why),
        }
    }

    /// Marks the journal as complete.
    async fn close(&mut self) {
        if let Err(error) = self.journal.append(&[]).await {
            tracing::warn!(?error, "the metadata journal was closed without its mark");
        }
    }
}

/// Ends the watches with the thread, even if that panics: a watch is never silent.
struct EndWatches(Arc<Published>);

impl Drop for EndWatches {
    fn drop(&mut self) {
        self.0.end_watches(WatchEnd::Lost { reason: "the store is closed".into() });
    }
}

/// What a started thread hands to its store.
struct Opened {
    identity: String,
    published: Arc<Published>,
    broken: Arc<OnceLock<String>>,
}

fn run_thread(
    dir: &Path,
    opened: oneshot::Sender<Result<Opened, OpenError>>,
    queue: mpsc::Receiver<Command>,
) {
    // The lock is held until the journal is closed.
    let lock = match lock_dir(dir) {
        Ok(lock) => lock,
        Err(error) => return drop(opened.send(Err(error))),
    };
    match tokio_uring::Runtime::new(tokio_uring::builder().entries(64)) {
        Ok(runtime) => runtime.block_on(run(dir, opened, queue)),
        Err(error) => drop(opened.send(Err(OpenError::NoUring(error)))),
    }
    drop(lock);
}

async fn run(
    dir: &Path,
    opened: oneshot::Sender<Result<Opened, OpenError>>,
    mut queue: mpsc::Receiver<Command>,
) {
    let start = Instant::now();
    let mut core = match Core::open(UringDisk::new(dir), HISTORY_BYTES, REWRITE_MIN_BYTES).await {
        Ok(core) => core,
        Err(error) => return drop(opened.send(Err(open_error(dir, error)))),
    };
    let _end_watches = EndWatches(Arc::clone(&core.published));
    let identity = uuid::Uuid::from_bytes(core.journal.store_id()).to_string();
    let handed =
        Opened { identity, published: Arc::clone(&core.published), broken: Arc::clone(&core.broken) };
    if opened.send(Ok(handed)).is_err() {
        return;
    }
    let now_ms = || u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut batch = Vec::new();
    loop {
        let sleep = core.next_expiry_ms().map(|at_ms| Duration::from_millis(at_ms.saturating_sub(now_ms())));
        tokio::select! {
            biased;
            command = queue.recv() => match command {
                Some(command) => fill_batch(command, &mut queue, &mut batch),
                None => break,
            },
            () = sleep_or_forever(sleep) => {}
        }
        core.process(&mut batch, now_ms()).await;
    }
    core.close().await;
}

fn fill_batch(first: Command, queue: &mut mpsc::Receiver<Command>, batch: &mut Vec<Command>) {
    let mut bytes = first.bytes();
    batch.push(first);
    while batch.len() < BATCH_COMMANDS && bytes < BATCH_BYTES {
        let Ok(command) = queue.try_recv() else { break };
        bytes += command.bytes();
        batch.push(command);
    }
}

async fn sleep_or_forever(duration: Option<Duration>) {
    match duration {
        Some(duration) => tokio::time::sleep(duration).await,
        None => std::future::pending().await,
    }
}

fn open_error(dir: &Path, error: OpenJournalError) -> OpenError {
    let path = dir.join(JOURNAL);
    match error {
        OpenJournalError::Damage(Damage::Version(found)) => OpenError::Version { path, found },
        OpenJournalError::Damage(Damage::At { offset, what }) => OpenError::Damaged { path, offset, what },
        OpenJournalError::Io(source) => {
            OpenError::Io { dir: dir.to_owned(), what: "open the journal", source }
        }
    }
}

/// Creates the directory if needed and takes its lock for this process.
fn lock_dir(dir: &Path) -> Result<fs::File, OpenError> {
    let fail = |what| move |source| OpenError::Io { dir: dir.to_owned(), what, source };
    fs::create_dir_all(dir).map_err(fail("create the directory"))?;
    let mut options = fs::OpenOptions::new();
    let options = options.create(true).truncate(false).read(true).write(true).mode(0o600);
    let mut lock = options.open(dir.join("lock")).map_err(fail("open the lock file"))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            // For the message only.
            let _ = lock.read_to_string(&mut holder);
            return Err(OpenError::Locked { dir: dir.to_owned(), holder: holder.trim().to_owned() });
        }
        Err(errno) => return Err(fail("lock")(errno.into())),
    }
    let written =
        lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| writeln!(lock, "{}", std::process::id()));
    written.map_err(fail("write the lock file"))?;
    Ok(lock)
}
