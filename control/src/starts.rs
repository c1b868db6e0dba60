//! Numbers for the starts of the data plane, grown durably before each.
//!
//! A head's generation is the take-over that its volume's record names and the number of its data plane's start. So the number
//! must be larger than that of every start before, whatever was killed or lost in between: the state directory remembers it,
//! and the map, where it still exists, is asked too. The supervisor starts nothing before the number stands in the map.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;
use tokio::sync::watch;

const FILE: &str = "data-plane-start";

/// Why a start has no number.
#[derive(Debug, Error)]
pub enum StartError {
    /// The file cannot be read or written.
    #[error("cannot {what} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file holds something else.
    #[error(
        "{path} does not hold a number; write a larger one into it than any data plane of this node was started with",
        path = .0.display()
    )]
    Damaged(PathBuf),
    /// There is no larger number.
    #[error("no number is left for another start")]
    Exhausted,
}

/// Replaces a file of a directory: after a crash it is the former or the new one, and after this call the new one.
///
/// # Errors
/// What the system says.
pub(crate) fn write_durably(dir: &Path, name: &str, text: &str) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.new"));
    let mut file = File::create(&temporary)?;
    writeln!(file, "{text}")?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(name))?;
    File::open(dir)?.sync_all()
}

/// The number of the last start, in the state directory.
#[derive(Debug)]
struct Counter {
    dir: PathBuf,
    last: u64,
}

impl Counter {
    fn open(dir: &Path) -> Result<Self, StartError> {
        let path = dir.join(FILE);
        let last = match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|_| StartError::Damaged(path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(source) => return Err(StartError::Io { what: "read", path, source }),
        };
        Ok(Self { dir: dir.to_owned(), last })
    }

    /// A number above all former ones and above `seen`; durable at return.
    fn grow(&mut self, seen: u64) -> Result<u64, StartError> {
        let next = self.last.max(seen).checked_add(1).ok_or(StartError::Exhausted)?;
        write_durably(&self.dir, FILE, &next.to_string()).map_err(|source| StartError::Io {
            what: "write",
            path: self.dir.join(FILE),
            source,
        })?;
        self.last = next;
        Ok(next)
    }
}

/// The supervisor's side: gives starts their numbers.
#[derive(Debug)]
pub struct Starts {
    counter: Counter,
    wanted: watch::Sender<u64>,
    in_map: watch::Receiver<u64>,
}

/// The side of whoever writes the map.
#[derive(Debug)]
pub struct StartsInMap {
    wanted: watch::Receiver<u64>,
    in_map: watch::Sender<u64>,
}

impl Starts {
    /// Both sides.
    ///
    /// # Errors
    /// The state directory's file cannot be read.
    pub fn open(state_dir: &Path) -> Result<(Self, StartsInMap), StartError> {
        let counter = Counter::open(state_dir)?;
        let (wanted, wants) = watch::channel(0);
        let (tell, in_map) = watch::channel(0);
        Ok((Self { counter, wanted, in_map }, StartsInMap { wanted: wants, in_map: tell }))
    }

    /// Takes a number for a start, and waits until it stands in the map. Cancel safe: a number that is not used is skipped.
    ///
    /// # Errors
    /// The number cannot be made durable.
    pub async fn next(&mut self) -> Result<u64, StartError> {
        loop {
            let number = self.counter.grow(*self.in_map.borrow())?;
            self.wanted.send_replace(number);
            let Ok(found) = self.in_map.wait_for(|found| *found >= number).await.map(|found| *found) else {
                // Nobody writes the map any more: this process is ending.
                return std::future::pending().await;
            };
            // A larger one was in the map before, which only its writer can tell: a data plane has had it.
            if found == number {
                return Ok(number);
            }
        }
    }
}

impl StartsInMap {
    /// The number that the map is to have, if the next start waits for one.
    #[must_use]
    pub fn wanted(&self) -> u64 {
        *self.wanted.borrow()
    }

    /// A receiver of what is wanted.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.wanted.clone()
    }

    /// Says which number stands in the map.
    pub fn is_in_map(&self, number: u64) {
        self.in_map.send_if_modified(|now| std::mem::replace(now, number) != number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_grow_beyond_all_that_was_seen_and_survive() {
        let dir = tempfile::tempdir().unwrap();
        let mut counter = Counter::open(dir.path()).unwrap();
        assert_eq!((counter.grow(0).unwrap(), counter.grow(0).unwrap()), (1, 2));
        assert_eq!(counter.grow(40).unwrap(), 41);
        let mut again = Counter::open(dir.path()).unwrap();
        assert_eq!(again.grow(7).unwrap(), 42);
        assert!(matches!(again.grow(u64::MAX), Err(StartError::Exhausted)));
        // What a crash left of a write is not looked at.
        fs::write(dir.path().join("data-plane-start.new"), "9").unwrap();
        assert_eq!(Counter::open(dir.path()).unwrap().last, 42);
    }

    #[test]
    fn damage_is_named_and_no_number_is_made_up() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "x", "-1", "1 2"] {
            fs::write(dir.path().join(FILE), text).unwrap();
            let error = Counter::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(FILE) && error.contains("a larger one"), "{error}");
        }
        let mut counter = Counter { dir: dir.path().join("absent"), last: 3 };
        assert!(matches!(counter.grow(0), Err(StartError::Io { .. })));
        assert_eq!(counter.last, 3);
    }

    #[tokio::test]
    async fn a_start_waits_for_a_number_that_no_map_has_had() {
        let dir = tempfile::tempdir().unwrap();
        let (mut starts, map) = Starts::open(dir.path()).unwrap();
        let mut wanted = map.subscribe();
        let writer = tokio::spawn(async move {
            // A map that was found late, of a node whose state directory is behind.
            let mut in_map = 7;
            loop {
                in_map = in_map.max(*wanted.borrow_and_update());
                map.is_in_map(in_map);
                if wanted.changed().await.is_err() {
                    return in_map;
                }
            }
        });
        assert_eq!(starts.next().await.unwrap(), 8);
        assert_eq!(starts.next().await.unwrap(), 9);
        drop(starts);
        assert_eq!(writer.await.unwrap(), 9);
    }
}
