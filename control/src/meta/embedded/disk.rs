//! The few file operations that the journal needs, so that tests can fail and crash each of them.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tokio_uring::buf::BoundedBuf;

/// A directory of files. Nothing is durable before the sync that is named for it.
pub(super) trait Disk {
    type File;

    /// The whole file; `None` if there is none of that name.
    async fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// Opens an existing file for writing.
    async fn open(&self, name: &str) -> io::Result<Self::File>;
    /// Creates an empty file for writing, in place of one that is there.
    async fn create(&self, name: &str) -> io::Result<Self::File>;
    /// Writes all of `bytes`, and gives the buffer back.
    async fn write_at(&self, file: &Self::File, bytes: Vec<u8>, offset: u64) -> (io::Result<()>, Vec<u8>);
    async fn truncate(&self, file: &Self::File, len: u64) -> io::Result<()>;
    /// Makes the file's bytes and length durable (fdatasync).
    async fn sync_data(&self, file: &Self::File) -> io::Result<()>;
    async fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file, if there is one of that name.
    async fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes the directory's names durable.
    async fn sync_dir(&self) -> io::Result<()>;
}

/// A real directory, through the io_uring of the tokio-uring runtime that the calling thread runs.
pub(super) struct UringDisk {
    dir: PathBuf,
}

/// A file and a second handle for what tokio-uring has no operation for.
pub(super) struct UringFile {
    ring: tokio_uring::fs::File,
    plain: fs::File,
}

impl UringDisk {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    fn open_with(&self, name: &str, options: &mut fs::OpenOptions) -> io::Result<UringFile> {
        let plain = options.read(true).write(true).mode(0o600).open(self.dir.join(name))?;
        Ok(UringFile { ring: tokio_uring::fs::File::from_std(plain.try_clone()?), plain })
    }
}

impl Disk for UringDisk {
    type File = UringFile;

    async fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open_with(name, &mut fs::OpenOptions::new()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let len = usize::try_from(file.plain.metadata()?.len()).map_err(io::Error::other)?;
        if len == 0 {
            return Ok(Some(Vec::new()));
        }
        let (result, bytes) = file.ring.read_exact_at(vec![0; len].slice(0..len), 0).await;
        result?;
        file.ring.close().await?;
        Ok(Some(bytes.into_inner()))
    }

    async fn open(&self, name: &str) -> io::Result<UringFile> {
        self.open_with(name, &mut fs::OpenOptions::new())
    }

    async fn create(&self, name: &str) -> io::Result<UringFile> {
        self.open_with(name, fs::OpenOptions::new().create(true).truncate(true))
    }

    async fn write_at(&self, file: &UringFile, bytes: Vec<u8>, offset: u64) -> (io::Result<()>, Vec<u8>) {
        file.ring.write_all_at(bytes, offset).await
    }

    async fn truncate(&self, file: &UringFile, len: u64) -> io::Result<()> {
        // io_uring has ftruncate only since Linux 6.9; this thread has nothing else to do meanwhile.
        file.plain.set_len(len)
    }

    async fn sync_data(&self, file: &UringFile) -> io::Result<()> {
        file.ring.sync_data().await
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        tokio_uring::fs::rename(self.dir.join(from), self.dir.join(to)).await
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        match tokio_uring::fs::remove_file(self.dir.join(name)).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    async fn sync_dir(&self) -> io::Result<()> {
        let dir = tokio_uring::fs::File::open(&self.dir).await?;
        dir.sync_all().await?;
        dir.close().await
    }
}
