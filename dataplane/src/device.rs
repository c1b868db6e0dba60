//! A store's file or block device: opening, locking, and what is known of it.
//!
//! Invariants:
//! * The lock is on the open file description that all I/O uses, duplicates included. In-flight requests of a killed
//!   process hold it, so that a new process begins only after the old one's last write has landed (I4).
//! * Nothing is written to a device that is not blank or not ours.
//! * What is not known to be power-safe is synced with every write (I3).

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster_map::Durability;
use rustix::fs::{FallocateFlags, FlockOperation, OFlags};
use rustix::io::ReadWriteFlags;
use torus_uring::MappedFile;

/// How long the last writes of a killed process may take before the device counts as in use by a living one.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// Bytes at both ends that must be zero for a device to count as blank: labels of partition tables, file systems and
/// volume managers lie there.
const BLANK_PROBE_BYTES: u64 = 1 << 20;
/// `statfs` types of file systems in memory (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;
/// Bytes of zeros written and synced at a time: large enough for a few hundred MB/s, small enough that a read or write
/// beside it waits about a millisecond.
const FILL_PIECE_BYTES: usize = 256 << 10;
/// Alignment for O_DIRECT on every device there is.
const ALIGN_BYTES: usize = 4096;

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It does not exist.
    #[error(
        "store {path} does not exist: give its size to create a file ({path}:10GiB), or name an existing file or block device"
    )]
    Missing {
        /// The path asked for.
        path: String,
    },
    /// The system refused an operation.
    #[error("store {path}: cannot {what}: {source}")]
    Io {
        /// The path.
        path: String,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has it.
    #[error(
        "store {path} is in use by another process: stop the torusd that uses it, or unmount the device, or name another store"
    )]
    InUse {
        /// The path.
        path: String,
    },
    /// Neither file nor block device.
    #[error("store {path} is neither a regular file nor a block device")]
    Kind {
        /// The path.
        path: String,
    },
    /// Below the smallest size.
    #[error("store {path} has {len_bytes} bytes and needs at least {min_bytes}: use a larger one")]
    TooSmall {
        /// The path.
        path: String,
        /// Its size.
        len_bytes: u64,
        /// The smallest size.
        min_bytes: u64,
    },
}

/// An open, locked store.
#[derive(Debug)]
pub struct Device {
    file: File,
    path: PathBuf,
    len_bytes: u64,
    durability: Durability,
    is_regular: bool,
}

impl Device {
    /// Opens and locks the store at `path`. A file that does not exist, or has no bytes, is made `size_bytes` long if
    /// that is not 0.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn open(path: &Path, size_bytes: u64, min_bytes: u64) -> Result<Device, DeviceError> {
        let shown = path.display().to_string();
        let io_error = |what| {
            let path = shown.clone();
            move |source: io::Error| DeviceError::Io { path, what, source }
        };
        let file = open_locked(path, size_bytes > 0)?;
        let metadata = file.metadata().map_err(io_error("read its metadata"))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DeviceError::Kind { path: shown });
        }
        if kind.is_file() && metadata.len() == 0 && size_bytes > 0 {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size_bytes)
                .map_err(|error| io_error("reserve its space")(error.into()))?;
        }
        Device::of(file, path, min_bytes)
    }

    /// What is known of an open store.
    fn of(file: File, path: &Path, min_bytes: u64) -> Result<Device, DeviceError> {
        let shown = path.display().to_string();
        let io_error = |what| {
            let path = shown.clone();
            move |source: io::Error| DeviceError::Io { path, what, source }
        };
        let metadata = file.metadata().map_err(io_error("read its metadata"))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DeviceError::Kind { path: shown });
        }
        // A block device's metadata have no length; its end has.
        let len_bytes = (&file).seek(SeekFrom::End(0)).map_err(io_error("find its size"))?;
        if len_bytes < min_bytes {
            return Err(DeviceError::TooSmall { path: shown, len_bytes, min_bytes });
        }
        let in_memory = rustix::fs::fstatfs(&file).is_ok_and(|fs| is_memory(fs.f_type));
        let number = if kind.is_block_device() { metadata.rdev() } else { metadata.dev() };
        let durability = match (in_memory && kind.is_file(), has_volatile_cache(number)) {
            (true, _) => Durability::Memory,
            (false, true) => Durability::DsyncWriteBack,
            (false, false) => Durability::WriteThrough,
        };
        Ok(Device { file, path: path.to_owned(), len_bytes, durability, is_regular: kind.is_file() })
    }

    /// Opens a store to look at it: nothing can be written through it. It is locked against those that write, who wait as long,
    /// and not against others that look.
    ///
    /// # Errors
    /// [`DeviceError`]; [`DeviceError::InUse`] at once where somebody has it open for writing.
    pub fn open_read_only(path: &Path, min_bytes: u64) -> Result<Device, DeviceError> {
        let shown = || path.display().to_string();
        let io_error = |what| move |source: io::Error| DeviceError::Io { path: shown(), what, source };
        let open = |flags: OFlags| {
            let flags = i32::try_from(flags.bits()).expect("open flags are small");
            OpenOptions::new().read(true).custom_flags(flags).open(path)
        };
        let file = match open(OFlags::DIRECT) {
            // Older tmpfs has no O_DIRECT, and needs none; for looking the page cache does as well.
            Err(error) if error.kind() == ErrorKind::InvalidInput => open(OFlags::empty()),
            opened => opened,
        };
        let file = file.map_err(|source| match source.kind() {
            ErrorKind::NotFound => DeviceError::Missing { path: shown() },
            _ => DeviceError::Io { path: shown(), what: "open it", source },
        })?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(DeviceError::InUse { path: shown() }),
            Err(error) => return Err(io_error("lock it")(error.into())),
        }
        Device::of(file, path, min_bytes)
    }

    /// The descriptor; duplicates share its lock.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A second handle on the same open file description.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn try_clone(&self) -> Result<Device, DeviceError> {
        let file =
            self.file.try_clone().map_err(|source| self.io_error("duplicate its descriptor", source))?;
        let Device { len_bytes, durability, is_regular, .. } = *self;
        Ok(Device { file, path: self.path.clone(), len_bytes, durability, is_regular })
    }

    /// The bare descriptor.
    #[must_use]
    pub fn into_file(self) -> File {
        self.file
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// What a completed write means.
    #[must_use]
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// Whether each write must be synced (`RWF_DSYNC`) to be durable. Files are synced on write-through devices too: it
    /// costs nothing there unless the file system has metadata to write, and then it is needed.
    #[must_use]
    pub fn needs_dsync(&self) -> bool {
        match self.durability {
            Durability::Memory => false,
            Durability::DsyncWriteBack => true,
            Durability::WriteThrough => self.is_regular,
        }
    }

    /// Whether a durable write costs a flush of the device's whole cache, since it cannot force a single write to stable media
    /// (Documentation/ABI/stable/sysfs-block, `queue/fua`): several writes and one sync are cheaper then.
    #[must_use]
    pub fn flushes_whole_cache(&self) -> bool {
        let Ok(metadata) = self.file.metadata() else { return false };
        let number = if self.is_regular { metadata.dev() } else { metadata.rdev() };
        let forces_writes = ["queue/fua", "../queue/fua"].iter().find_map(|name| sysfs_number(number, name));
        self.durability == Durability::DsyncWriteBack && forces_writes == Some(0)
    }

    /// A mapping by which a file in memory is read; `None` for anything else, or where it cannot be mapped.
    #[must_use]
    pub fn map_memory(&self) -> Option<Arc<MappedFile>> {
        if self.durability != Durability::Memory {
            return None;
        }
        MappedFile::new(self.file.as_fd(), self.len_bytes).map(Arc::new)
    }

    /// Whether a fill should go piece by piece, with rests, to leave the device to others. In a file it should not: while
    /// a file has new extents to record, each durable write to it waits for the file system's journal, so what shortens
    /// that time is best.
    #[must_use]
    pub fn fills_gently(&self) -> bool {
        !self.is_regular
    }

    /// Whether it is a file of a file system, which records where its bytes are when they are first written.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.is_regular
    }

    /// Whether nothing has ever been put on it, as far as both ends show. Bytes in `except` are not looked at.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn is_blank(&self, except: std::ops::Range<u64>) -> Result<bool, DeviceError> {
        let probe = BLANK_PROBE_BYTES.min(self.len_bytes / 2) & !(ALIGN_BYTES as u64 - 1);
        let tail = (self.len_bytes - probe) & !(ALIGN_BYTES as u64 - 1);
        for offset_bytes in [0, tail] {
            let len_bytes = usize::try_from(probe).expect("at most a MiB");
            let bytes = self.read(offset_bytes, len_bytes)?;
            let written = |(at, byte): (u64, u8)| byte != 0 && !except.contains(&at);
            if (offset_bytes..).zip(bytes).any(written) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads bytes; offset and length are multiples of 4096.
    ///
    /// # Errors
    /// When they cannot be read in full.
    pub fn read(&self, offset_bytes: u64, len_bytes: usize) -> Result<Vec<u8>, DeviceError> {
        let mut buffer = AlignedBuffer::new(len_bytes);
        self.file
            .read_exact_at(buffer.bytes_mut(), offset_bytes)
            .map_err(|source| self.io_error("read it", source))?;
        Ok(buffer.bytes().to_vec())
    }

    /// Reads bytes into memory that O_DIRECT takes; offset, length and address are multiples of 4096.
    ///
    /// # Errors
    /// When they cannot be read in full.
    pub fn read_into(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.file.read_exact_at(bytes, offset_bytes).map_err(|source| self.io_error("read it", source))
    }

    /// Writes bytes from memory that O_DIRECT takes, durable after the next sync; offset, length and address are multiples of
    /// 4096.
    ///
    /// # Errors
    /// When they cannot be written in full.
    pub fn write_from(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.file.write_all_at(bytes, offset_bytes).map_err(|source| self.io_error("write it", source))
    }

    /// Forces everything written to stable media.
    ///
    /// # Errors
    /// When the device says so: what it holds is unknown then.
    pub fn sync_data(&self) -> Result<(), DeviceError> {
        self.file.sync_data().map_err(|source| self.io_error("sync it", source))
    }

    /// Whether a power cut leaves each 4 KiB that was being written either old or new: it is the device's smallest unit, or it
    /// says so (Documentation/ABI/stable/sysfs-block, `atomic_write_unit_max_bytes`). Never taken for granted in a file.
    #[must_use]
    pub fn writes_blocks_atomically(&self) -> bool {
        if self.durability == Durability::Memory {
            return true;
        }
        let Ok(metadata) = self.file.metadata() else { return false };
        if self.is_regular {
            return false;
        }
        let number = metadata.rdev();
        // A partition has its disk's queue, and may begin anywhere.
        let starts_aligned = sysfs_number(number, "start").is_none_or(|sector| sector.is_multiple_of(8));
        let is_block_or_more = |name: &str| {
            let folders = ["queue", "../queue"];
            let size = folders.iter().find_map(|folder| sysfs_number(number, &format!("{folder}/{name}")));
            size.is_some_and(|bytes| bytes >= ALIGN_BYTES as u64)
        };
        starts_aligned
            && (is_block_or_more("logical_block_size") || is_block_or_more("atomic_write_unit_max_bytes"))
    }

    /// Writes bytes and waits until they are on stable media; offset and length are multiples of 4096.
    ///
    /// # Errors
    /// When they cannot be written. A failed sync fails the device: its state is unknown then.
    pub fn write_durably(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let mut buffer = AlignedBuffer::new(bytes.len());
        buffer.bytes_mut().copy_from_slice(bytes);
        self.file
            .write_all_at(buffer.bytes(), offset_bytes)
            .map_err(|source| self.io_error("write it", source))?;
        self.file.sync_data().map_err(|source| self.io_error("sync it", source))
    }

    /// Writes zeros over a range, in pieces, and tells `progress` after each the bytes done, which says whether to go on;
    /// syncs at the end. Multiples of 4096. Whether it went to the end. Zeros are written, not promised: the first write
    /// to a block that a file system has only reserved costs several times one that overwrites.
    ///
    /// On a block device each piece is synced by itself: a sync of many would hold up every durable write beside it. In
    /// memory what a sparse file has never held is skipped: it reads as zeros, and takes no memory before it is written.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn fill_with_zeros(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        mut progress: impl FnMut(u64) -> bool,
    ) -> Result<bool, DeviceError> {
        let flags = if self.fills_gently() && self.needs_dsync() {
            ReadWriteFlags::DSYNC
        } else {
            ReadWriteFlags::empty()
        };
        let zeros = AlignedBuffer::new(FILL_PIECE_BYTES);
        let mut done = 0;
        while done < len_bytes {
            let hole = self.hole_at(offset_bytes + done).min(len_bytes - done);
            if hole > 0 {
                done += hole;
                if !progress(done) {
                    return Ok(false);
                }
                continue;
            }
            let left = usize::try_from(len_bytes - done).unwrap_or(FILL_PIECE_BYTES);
            let piece = [IoSlice::new(&zeros.bytes()[..left.min(FILL_PIECE_BYTES)])];
            match rustix::io::pwritev2(&self.file, &piece, offset_bytes + done, flags) {
                Ok(0) => return Err(self.io_error("write zeros to it", ErrorKind::WriteZero.into())),
                Ok(written) => done += written as u64,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(self.io_error("write zeros to it", error.into())),
            }
            if !progress(done) {
                return Ok(false);
            }
        }
        self.file.sync_data().map_err(|source| self.io_error("sync it", source))?;
        Ok(true)
    }

    /// Makes a range ready to be written: its room is the store's, and a file system has nothing more to record. What it holds
    /// afterwards is of no matter.
    ///
    /// # Errors
    /// When there is no room, or it cannot be written.
    pub fn make_ready(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        if !self.is_regular || self.was_written(offset_bytes, len_bytes) {
            return Ok(());
        }
        rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset_bytes, len_bytes)
            .map_err(|error| self.io_error("reserve room for it", error.into()))?;
        if self.durability == Durability::Memory {
            return Ok(());
        }
        self.fill_with_zeros(offset_bytes, len_bytes, |_| true).map(drop)
    }

    /// Whether every byte of a range of a file was written before.
    fn was_written(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        let hole = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Hole(offset_bytes));
        hole.is_ok_and(|hole| hole >= offset_bytes + len_bytes)
    }

    /// Bytes from `offset_bytes` on that a file in memory has never held; 0 elsewhere.
    fn hole_at(&self, offset_bytes: u64) -> u64 {
        if self.durability != Durability::Memory {
            return 0;
        }
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(offset_bytes)) {
            Ok(data) => data.saturating_sub(offset_bytes),
            // No data up to the end.
            Err(rustix::io::Errno::NXIO) => self.len_bytes.saturating_sub(offset_bytes),
            Err(_) => 0,
        }
    }

    /// What the system said to something that was tried on it.
    pub(crate) fn io_error(&self, what: &'static str, source: io::Error) -> DeviceError {
        DeviceError::Io { path: self.path.display().to_string(), what, source }
    }
}

fn open_locked(path: &Path, create: bool) -> Result<File, DeviceError> {
    let shown = || path.display().to_string();
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match open_direct(path, create) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(DeviceError::Missing { path: shown() });
            }
            // A mounted or claimed block device, or one that a killed process still writes to.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {}
            Err(source) => return Err(DeviceError::Io { path: shown(), what: "open it", source }),
            Ok(file) => match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => {
                    return Err(DeviceError::Io { path: shown(), what: "lock it", source: error.into() });
                }
            },
        }
        if Instant::now() >= deadline {
            return Err(DeviceError::InUse { path: shown() });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn open_direct(path: &Path, create: bool) -> io::Result<File> {
    let is_block = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
    // O_EXCL without O_CREAT claims a block device: a mounted one is refused (open(2)).
    let exclusive = if is_block { OFlags::EXCL } else { OFlags::empty() };
    let open = |flags: OFlags| {
        let flags = i32::try_from(flags.bits()).expect("open flags are small");
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(create && !is_block)
            .truncate(false)
            .custom_flags(flags)
            .open(path)
    };
    match open(OFlags::DIRECT | exclusive) {
        // Older tmpfs has no O_DIRECT, and needs none.
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            let file = open(exclusive)?;
            let in_memory = rustix::fs::fstatfs(&file).is_ok_and(|fs| is_memory(fs.f_type));
            if in_memory { Ok(file) } else { Err(error) }
        }
        opened => opened,
    }
}

/// A number that sysfs tells of a block device.
fn sysfs_number(device_number: u64, name: &str) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device_number), rustix::fs::minor(device_number));
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{name}")).ok()?;
    text.trim().parse().ok()
}

fn is_memory(fs_type: i64) -> bool {
    fs_type == TMPFS_MAGIC || fs_type == RAMFS_MAGIC
}

/// Whether the block device with this number has a volatile write cache; unknown counts as yes. Documentation/ABI/stable/
/// sysfs-block, `queue/write_cache`; a partition's queue is its disk's.
fn has_volatile_cache(device_number: u64) -> bool {
    let (major, minor) = (rustix::fs::major(device_number), rustix::fs::minor(device_number));
    let device = format!("/sys/dev/block/{major}:{minor}");
    let attribute = ["queue/write_cache", "../queue/write_cache"]
        .iter()
        .find_map(|name| std::fs::read_to_string(Path::new(&device).join(name)).ok());
    attribute.is_none_or(|text| text.trim() != "write through")
}

/// Bytes at an address that O_DIRECT takes.
pub(crate) struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    pub(crate) fn new(len: usize) -> AlignedBuffer {
        let bytes = vec![0; len + ALIGN_BYTES];
        let start = bytes.as_ptr().align_offset(ALIGN_BYTES);
        AlignedBuffer { bytes, start, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn folder() -> tempfile::TempDir {
        // The build folder is on a disk; /tmp need not be.
        tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
    }

    #[test]
    fn a_missing_path_is_created_only_with_a_size() {
        let folder = folder();
        let path = folder.path().join("store");
        let error = Device::open(&path, 0, MIB).unwrap_err();
        assert!(error.to_string().contains("store:10GiB"), "{error}");
        assert!(!path.exists());
        let device = Device::open(&path, 2 * MIB, MIB).unwrap();
        assert_eq!(device.len_bytes(), 2 * MIB);
        assert_ne!(device.durability(), Durability::Memory);
        assert!(device.is_blank(0..0).unwrap());
    }

    #[test]
    fn an_existing_file_keeps_its_size_and_content() {
        let folder = folder();
        let path = folder.path().join("store");
        std::fs::write(&path, vec![7; 2 << 20]).unwrap();
        let device = Device::open(&path, 5 * MIB, MIB).unwrap();
        assert_eq!(device.len_bytes(), 2 * MIB);
        assert!(!device.is_blank(0..0).unwrap());
    }

    #[test]
    fn a_label_at_either_end_is_not_blank() {
        let folder = folder();
        for at in [1080, 2 * MIB - 512] {
            let path = folder.path().join(format!("at{at}"));
            let file = File::create(&path).unwrap();
            file.set_len(2 * MIB).unwrap();
            file.write_all_at(b"label", at).unwrap();
            assert!(!Device::open(&path, 0, MIB).unwrap().is_blank(0..0).unwrap(), "{at}");
        }
    }

    #[test]
    fn too_small_and_wrong_kinds_are_refused() {
        let folder = folder();
        let path = folder.path().join("small");
        std::fs::write(&path, [0; 4096]).unwrap();
        assert!(matches!(Device::open(&path, 0, MIB), Err(DeviceError::TooSmall { len_bytes: 4096, .. })));
        assert!(Device::open(folder.path(), 0, MIB).is_err());
        assert!(matches!(
            Device::open(Path::new("/dev/null"), 0, MIB),
            Err(DeviceError::Kind { .. } | DeviceError::Io { .. })
        ));
    }

    #[test]
    fn a_locked_store_is_in_use_until_the_last_descriptor_is_closed() {
        let folder = folder();
        let path = folder.path().join("store");
        let first = Device::open(&path, 2 * MIB, MIB).unwrap();
        assert!(matches!(Device::open(&path, 0, MIB), Err(DeviceError::InUse { .. })));
        let duplicate = first.file().try_clone().unwrap();
        drop(first);
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || {
                let started = Instant::now();
                Device::open(&path, 0, MIB).map(|_| started.elapsed())
            }
        });
        std::thread::sleep(Duration::from_millis(300));
        drop(duplicate);
        let waited = waiter.join().unwrap().unwrap();
        assert!(waited >= Duration::from_millis(250), "{waited:?}");
    }

    #[test]
    fn zeros_and_bytes_reach_the_file() {
        let folder = folder();
        let path = folder.path().join("store");
        let device = Device::open(&path, 4 * MIB, MIB).unwrap();
        device.write_durably(0, &vec![9; 8192]).unwrap();
        device.write_durably(3 * MIB, &vec![9; 8192]).unwrap();
        let mut told = Vec::new();
        let to_the_end = device.fill_with_zeros(4096, 2 * MIB + 4096, |done| {
            told.push(done);
            true
        });
        assert!(to_the_end.unwrap());
        assert_eq!(told.len(), 9);
        assert_eq!((told[0], told[8]), (FILL_PIECE_BYTES as u64, 2 * MIB + 4096));
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes[..4096].iter().all(|&b| b == 9) && bytes[4096..8192].iter().all(|&b| b == 0));
        assert_eq!(bytes[3 << 20], 9);
    }

    #[test]
    fn a_sparse_file_in_memory_stays_sparse_and_what_it_held_becomes_zeros() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let folder = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is a tmpfs on every Linux system");
        let path = folder.path().join("store");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(64 * MIB).unwrap();
        file.write_all_at(&[9; 8192], 16 * MIB).unwrap();
        let device = Device::open(&path, 0, MIB).unwrap();
        let mut last = 0;
        let to_the_end = device.fill_with_zeros(0, 64 * MIB, |done| {
            assert!(done > last);
            last = done;
            true
        });
        assert!(to_the_end.unwrap());
        assert_eq!(last, 64 * MIB);
        let mut bytes = [7; 16384];
        file.read_exact_at(&mut bytes, 16 * MIB - 4096).unwrap();
        assert!(bytes.iter().all(|&b| b == 0));
        assert!(file.metadata().unwrap().blocks() * 512 < 2 * MIB, "{}", file.metadata().unwrap().blocks());
    }

    #[test]
    fn a_store_in_memory_is_known_as_such() {
        let folder = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is a tmpfs on every Linux system");
        let device = Device::open(&folder.path().join("store"), 2 * MIB, MIB).unwrap();
        assert_eq!(device.durability(), Durability::Memory);
        assert!(!device.needs_dsync());
    }
}
