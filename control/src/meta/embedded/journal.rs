//! The journal file: open, append durably, rewrite when it has grown.
//!
//! Keeps: what [`Journal::append`] or [`Journal::open`] returned is there after any crash; what an append did not
//! return is there as a whole or not at all; damage is refused, never skipped. After an error that leaves it open
//! what is on the disk, the journal is [`AppendError::Broken`] for good: only opening it again can tell.

use std::io;

use super::codec::{self, Damage, Identity};
use super::disk::Disk;
use crate::meta::state::{Record, State};

/// The journal's name in its directory.
pub(super) const JOURNAL: &str = "journal";
/// A journal that is being written and not yet in force.
const JOURNAL_NEW: &str = "journal.new";

/// Why a journal could not be opened.
#[derive(Debug)]
pub(super) enum OpenJournalError {
    Damage(Damage),
    Io(io::Error),
}

impl From<io::Error> for OpenJournalError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Why records were not appended.
#[derive(Debug)]
pub(super) enum AppendError {
    /// Nothing of them is in the journal, which can be used as before (no space left).
    Refused(io::Error),
    /// They may be in the journal or not.
    Broken(String),
}

/// What became of a rewrite.
#[derive(Debug)]
pub(super) enum RewriteError {
    /// The old journal is in force.
    Kept(io::Error),
    /// Either may be in force after a crash.
    Broken(String),
}

pub(super) struct Journal<D: Disk> {
    disk: D,
    file: D::File,
    identity: Identity,
    /// Header and snapshot.
    base_bytes: u64,
    end: u64,
    sequence: u64,
    payload: Vec<u8>,
    frame: Vec<u8>,
    broken: Option<String>,
}

impl<D: Disk> Journal<D> {
    /// Opens the journal of a directory, or starts one.
    pub(super) async fn open(disk: D, history_limit_bytes: usize) -> Result<(Self, State), OpenJournalError> {
        disk.remove(JOURNAL_NEW).await?;
        let Some(bytes) = disk.read(JOURNAL).await? else {
            return Self::start(disk, history_limit_bytes).await;
        };
        let parsed = codec::parse(&bytes, history_limit_bytes).map_err(OpenJournalError::Damage)?;
        let file = disk.open(JOURNAL).await?;
        if parsed.end < bytes.len() as u64 {
            tracing::warn!(
                offset = parsed.end,
                bytes = bytes.len(),
                "cutting an unfinished write off the metadata journal"
            );
            disk.truncate(&file, parsed.end).await?;
        }
        // The last frame is the only one whose fdatasync may have failed, and a page that failed to reach the disk
        // stays readable and clean in the cache: written again, it is synced in truth before anything is served.
        let last_frame = bytes_between(&bytes, parsed.last_frame, parsed.end);
        let (written, _) = disk.write_at(&file, last_frame, parsed.last_frame).await;
        written?;
        disk.sync_data(&file).await?;
        disk.sync_dir().await?;
        let journal = Self {
            disk,
            file,
            identity: parsed.identity,
            base_bytes: parsed.base_bytes,
            end: parsed.end,
            sequence: parsed.sequence,
            payload: Vec::new(),
            frame: Vec::new(),
            broken: None,
        };
        Ok((journal, parsed.state))
    }

    async fn start(disk: D, history_limit_bytes: usize) -> Result<(Self, State), OpenJournalError> {
        let state = State::new(history_limit_bytes);
        let identity = Identity { store: random_16(), salt: random_16() };
        let (file, base_bytes, sequence) = write_new(&disk, &identity, &state).await?;
        disk.rename(JOURNAL_NEW, JOURNAL).await?;
        disk.sync_dir().await?;
        let journal = Self {
            disk,
            file,
            identity,
            base_bytes,
            end: base_bytes,
            sequence,
            payload: Vec::new(),
            frame: Vec::new(),
            broken: None,
        };
        Ok((journal, state))
    }

    /// The store's id.
    pub(super) fn store_id(&self) -> [u8; 16] {
        self.identity.store
    }

    /// Bytes appended since the journal was last written anew.
    pub(super) fn grown_bytes(&self) -> u64 {
        self.end - self.base_bytes
    }

    /// Bytes of the journal when it was last written anew.
    pub(super) fn base_bytes(&self) -> u64 {
        self.base_bytes
    }

    /// Makes records durable, all or none of them. With none, marks what is there as complete, so that damage to it is
    /// told from a write that was cut short.
    pub(super) async fn append(&mut self, records: &[Record]) -> Result<(), AppendError> {
        if let Some(broken) = &self.broken {
            return Err(AppendError::Broken(broken.clone()));
        }
        self.payload.clear();
        for record in records {
            codec::put_record(&mut self.payload, record);
        }
        let mut frame = std::mem::take(&mut self.frame);
        frame.clear();
        codec::put_frame(&mut frame, &self.identity.salt, self.sequence, &self.payload);
        let (written, frame) = self.disk.write_at(&self.file, frame, self.end).await;
        let frame_bytes = frame.len() as u64;
        self.frame = frame;
        match written {
            Ok(()) => {}
            Err(error) if is_no_space(&error) => return Err(self.undo(error).await),
            Err(error) => return Err(self.break_append("write", &error)),
        }
        if let Err(error) = self.disk.sync_data(&self.file).await {
            return Err(self.break_append("fdatasync", &error));
        }
        self.end += frame_bytes;
        self.sequence += 1;
        Ok(())
    }

    /// Takes a write that found no space back out of the file.
    async fn undo(&mut self, error: io::Error) -> AppendError {
        if let Err(truncate) = self.disk.truncate(&self.file, self.end).await {
            return self.break_append("truncate after a failed write", &truncate);
        }
        if let Err(sync) = self.disk.sync_data(&self.file).await {
            return self.break_append("fdatasync after a failed write", &sync);
        }
        AppendError::Refused(error)
    }

    fn break_append(&mut self, what: &str, error: &io::Error) -> AppendError {
        AppendError::Broken(self.mark_broken(what, error))
    }

    fn mark_broken(&mut self, what: &str, error: &io::Error) -> String {
        let broken = format!("{what} of the metadata journal failed: {error}");
        self.broken = Some(broken.clone());
        broken
    }

    /// Writes the journal anew, with `state` (all that was appended) as its snapshot.
    pub(super) async fn rewrite(&mut self, state: &State) -> Result<(), RewriteError> {
        if let Some(broken) = &self.broken {
            return Err(RewriteError::Broken(broken.clone()));
        }
        let identity = Identity { store: self.identity.store, salt: random_16() };
        let (file, base_bytes, sequence) = match write_new(&self.disk, &identity, state).await {
            Ok(new) => new,
            Err(error) => {
                // A leftover is removed by the next rewrite or open.
                let _ = self.disk.remove(JOURNAL_NEW).await;
                return Err(RewriteError::Kept(error));
            }
        };
        if let Err(error) = self.disk.rename(JOURNAL_NEW, JOURNAL).await {
            return Err(RewriteError::Broken(self.mark_broken("rename", &error)));
        }
        if let Err(error) = self.disk.sync_dir().await {
            return Err(RewriteError::Broken(self.mark_broken("fsync of the directory", &error)));
        }
        self.file = file;
        self.identity = identity;
        self.base_bytes = base_bytes;
        self.end = base_bytes;
        self.sequence = sequence;
        Ok(())
    }
}

/// Writes a journal that is not yet in force, durably; its file, its length and the next sequence.
async fn write_new<D: Disk>(disk: &D, identity: &Identity, state: &State) -> io::Result<(D::File, u64, u64)> {
    let (bytes, sequence) = codec::encode_file(identity, state);
    let file = disk.create(JOURNAL_NEW).await?;
    let (written, bytes) = disk.write_at(&file, bytes, 0).await;
    written?;
    disk.sync_data(&file).await?;
    Ok((file, bytes.len() as u64, sequence))
}

fn bytes_between(bytes: &[u8], from: u64, to: u64) -> Vec<u8> {
    let from = usize::try_from(from).expect("an offset in a file that is in memory");
    let to = usize::try_from(to).expect("an offset in a file that is in memory");
    bytes[from..to].to_vec()
}

fn is_no_space(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

fn random_16() -> [u8; 16] {
    *uuid::Uuid::new_v4().as_bytes()
}
