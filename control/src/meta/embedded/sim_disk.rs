//! A disk in memory that fails and crashes where a test says.
//!
//! Nothing that was not synced is certain to survive [`SimDisk::crash`]: of a file's writes any prefix may, cut at any
//! byte, or any sectors of them in any order; of the directory's changes any prefix.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use super::disk::Disk;

const SECTOR_BYTES: usize = 512;

/// What a scheduled operation does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The machine goes during the operation, which may be done or not; it and all later ones fail.
    Crash,
    /// ENOSPC; of a write, the first half of the bytes is in the file.
    NoSpace,
    /// EIO. Of a sync, nothing is durable and nothing is tried again, as Linux does.
    Io,
}

/// What of the unsynced changes a crash leaves.
#[derive(Clone, Copy, Debug)]
pub(super) enum Survival {
    /// The first `bytes` bytes of unsynced writes, in their order; directory changes if `names`.
    Prefix { bytes: usize, names: bool },
    /// Each sector by the toss of a coin; a random prefix of the directory changes.
    Sectors { seed: u64 },
}

#[derive(Clone, Default)]
pub(super) struct SimDisk {
    inner: Rc<RefCell<Inner>>,
}

#[derive(Clone, Default)]
struct Inner {
    files: Vec<SimFile>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    name_changes: Vec<NameChange>,
    operations: usize,
    faults: BTreeMap<usize, Fault>,
    gone: bool,
}

#[derive(Clone, Default)]
struct SimFile {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    changes: Vec<FileChange>,
}

#[derive(Clone)]
enum FileChange {
    Write { offset: usize, bytes: Vec<u8> },
    Truncate(usize),
}

#[derive(Clone)]
enum NameChange {
    Set(String, usize),
    Rename(String, String),
    Remove(String),
}

impl SimDisk {
    /// Schedules a fault for the operation of this number, counted from the first of the disk.
    pub(super) fn fail(&self, operation: usize, fault: Fault) {
        self.inner.borrow_mut().faults.insert(operation, fault);
    }

    /// How many operations were done.
    pub(super) fn operations(&self) -> usize {
        self.inner.borrow().operations
    }

    /// How many bytes of writes are not synced.
    pub(super) fn unsynced_bytes(&self) -> usize {
        let inner = self.inner.borrow();
        let changes = inner.files.iter().flat_map(|file| &file.changes);
        changes.map(|change| if let FileChange::Write { bytes, .. } = change { bytes.len() } else { 0 }).sum()
    }

    /// The disk as a machine finds it that starts after a crash.
    pub(super) fn crash(&self, survival: Survival) -> Self {
        let mut inner = self.inner.borrow().clone();
        let mut coin = Coin::new(survival);
        for file in &mut inner.files {
            for change in std::mem::take(&mut file.changes) {
                change.survive(&mut file.durable, &mut coin);
            }
            file.bytes.clone_from(&file.durable);
        }
        for change in std::mem::take(&mut inner.name_changes) {
            if !coin.name_survives() {
                break;
            }
            change.apply(&mut inner.durable_names);
        }
        inner.names.clone_from(&inner.durable_names);
        inner.faults.clear();
        inner.operations = 0;
        inner.gone = false;
        Self { inner: Rc::new(RefCell::new(inner)) }
    }

    /// The disk as a process finds it that starts after another one ended: nothing is lost that can be read.
    pub(super) fn restart(&self) -> Self {
        let mut inner = self.inner.borrow().clone();
        inner.faults.clear();
        inner.operations = 0;
        Self { inner: Rc::new(RefCell::new(inner)) }
    }

    /// Changes a byte of a file, on the disk itself.
    pub(super) fn damage(&self, name: &str, offset: usize, flip: u8) {
        let mut inner = self.inner.borrow_mut();
        let file = inner.names[name];
        inner.files[file].bytes[offset] ^= flip;
        inner.files[file].durable = inner.files[file].bytes.clone();
    }

    /// A file's bytes.
    pub(super) fn bytes(&self, name: &str) -> Vec<u8> {
        let inner = self.inner.borrow();
        inner.files[inner.names[name]].bytes.clone()
    }

    /// The names in the directory.
    pub(super) fn names(&self) -> Vec<String> {
        self.inner.borrow().names.keys().cloned().collect()
    }

    /// Counts an operation; its fault, or an error if the machine went before it.
    fn operation(&self) -> io::Result<Option<Fault>> {
        let mut inner = self.inner.borrow_mut();
        let number = inner.operations;
        inner.operations += 1;
        if inner.gone {
            return Err(gone());
        }
        let fault = inner.faults.get(&number).copied();
        inner.gone = fault == Some(Fault::Crash);
        Ok(fault)
    }

    /// An operation that a fault replaces as a whole.
    fn plain_operation(&self) -> io::Result<()> {
        self.operation()?.map_or(Ok(()), |fault| Err(fault.error()))
    }

    /// Like [`Self::plain_operation`], but a crash leaves open whether it was done.
    fn lasting_operation(&self, change: impl FnOnce()) -> io::Result<()> {
        let fault = self.operation()?;
        if matches!(fault, None | Some(Fault::Crash)) {
            change();
        }
        fault.map_or(Ok(()), |fault| Err(fault.error()))
    }

    fn change_name(&self, change: NameChange) {
        let mut inner = self.inner.borrow_mut();
        change.apply(&mut inner.names);
        inner.name_changes.push(change);
    }

    fn change_file(&self, file: usize, change: FileChange) {
        let file = &mut self.inner.borrow_mut().files[file];
        change.apply(&mut file.bytes);
        file.changes.push(change);
    }
}

impl Disk for SimDisk {
    type File = usize;

    async fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.plain_operation()?;
        let inner = self.inner.borrow();
        Ok(inner.names.get(name).map(|file| inner.files[*file].bytes.clone()))
    }

    async fn open(&self, name: &str) -> io::Result<usize> {
        self.plain_operation()?;
        self.inner.borrow().names.get(name).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    async fn create(&self, name: &str) -> io::Result<usize> {
        self.plain_operation()?;
        let file = {
            let mut inner = self.inner.borrow_mut();
            inner.files.push(SimFile::default());
            inner.files.len() - 1
        };
        self.change_name(NameChange::Set(name.to_owned(), file));
        Ok(file)
    }

    async fn write_at(&self, file: &usize, bytes: Vec<u8>, offset: u64) -> (io::Result<()>, Vec<u8>) {
        let offset = usize::try_from(offset).unwrap();
        let (result, written) = match self.operation() {
            Ok(None) => (Ok(()), bytes.len()),
            Ok(Some(Fault::Crash)) => (Err(gone()), bytes.len()),
            Ok(Some(fault)) => (Err(fault.error()), bytes.len() / 2),
            Err(error) => return (Err(error), bytes),
        };
        self.change_file(*file, FileChange::Write { offset, bytes: bytes[..written].to_vec() });
        (result, bytes)
    }

    async fn truncate(&self, file: &usize, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).unwrap();
        self.lasting_operation(|| self.change_file(*file, FileChange::Truncate(len)))
    }

    async fn sync_data(&self, file: &usize) -> io::Result<()> {
        let fault = self.operation()?;
        let file = &mut self.inner.borrow_mut().files[*file];
        match fault {
            Some(Fault::Crash) => return Err(gone()),
            Some(fault) => {
                // The pages stay readable and are clean now: a later sync says success and writes nothing.
                file.changes.clear();
                return Err(fault.error());
            }
            None => {}
        }
        for change in std::mem::take(&mut file.changes) {
            change.apply(&mut file.durable);
        }
        Ok(())
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.lasting_operation(|| self.change_name(NameChange::Rename(from.to_owned(), to.to_owned())))
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        self.lasting_operation(|| self.change_name(NameChange::Remove(name.to_owned())))
    }

    async fn sync_dir(&self) -> io::Result<()> {
        self.plain_operation()?;
        let mut inner = self.inner.borrow_mut();
        for change in std::mem::take(&mut inner.name_changes) {
            change.apply(&mut inner.durable_names);
        }
        Ok(())
    }
}

impl Fault {
    fn error(self) -> io::Error {
        match self {
            Self::Crash => gone(),
            Self::NoSpace => io::ErrorKind::StorageFull.into(),
            Self::Io => io::Error::other("EIO"),
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the machine is gone")
}

impl FileChange {
    fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Self::Write { offset, bytes } => write(file, *offset, bytes),
            Self::Truncate(len) => file.truncate(*len),
        }
    }

    fn survive(&self, file: &mut Vec<u8>, coin: &mut Coin) {
        match (self, coin) {
            (Self::Truncate(len), coin) => {
                if coin.name_survives() {
                    file.truncate(*len);
                }
            }
            (Self::Write { offset, bytes }, Coin::Prefix { left, .. }) => {
                let written = bytes.len().min(*left);
                *left -= written;
                if written > 0 {
                    write(file, *offset, &bytes[..written]);
                }
            }
            (Self::Write { offset, bytes }, Coin::Sectors(random)) => {
                let mut at = 0;
                while at < bytes.len() {
                    let to_boundary = SECTOR_BYTES - (offset + at) % SECTOR_BYTES;
                    let end = bytes.len().min(at + to_boundary);
                    if random.toss() {
                        write(file, offset + at, &bytes[at..end]);
                    }
                    at = end;
                }
            }
        }
    }
}

fn write(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if file.len() < end {
        file.resize(end, 0);
    }
    file[offset..end].copy_from_slice(bytes);
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Set(name, file) => drop(names.insert(name.clone(), *file)),
            Self::Rename(from, to) => {
                let file = names.remove(from).unwrap();
                names.insert(to.clone(), file);
            }
            Self::Remove(name) => drop(names.remove(name)),
        }
    }
}

enum Coin {
    Prefix { left: usize, names: bool },
    Sectors(Random),
}

impl Coin {
    fn new(survival: Survival) -> Self {
        match survival {
            Survival::Prefix { bytes, names } => Self::Prefix { left: bytes, names },
            Survival::Sectors { seed } => Self::Sectors(Random::new(seed)),
        }
    }

    fn name_survives(&mut self) -> bool {
        match self {
            Self::Prefix { names, .. } => *names,
            Self::Sectors(random) => random.toss(),
        }
    }
}

/// A fixed sequence of numbers (splitmix64), so that a failure repeats.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn toss(&mut self) -> bool {
        self.next() & 1 == 1
    }
}
