//! Contents of files, named by their hash: `staging/` while they arrive, `blobs/<sha256>` once whole.
//!
//! A content is written and synced in `staging/`, then renamed within the transaction that makes the
//! record that names it, so that a record always has its content. What a crash leaves over is content
//! without a record, and [`Blobs::open`] clears the staging folder, [`Service::release`] the rest.
//!
//! [`Service::release`]: super::Service::release

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{JobsError, new_id};
use crate::publish::Sha256Stream;

/// The contents of a data folder.
pub(super) struct Blobs {
    folder: PathBuf,
    staging: PathBuf,
    room: Arc<Room>,
}

/// Whether a content counts against the quota before it is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quota {
    /// A client's.
    Enforced,
    /// The service's own, or one whose bytes were admitted before.
    Exempt,
}

impl Blobs {
    /// Opens or makes the folders, and removes what was still arriving when the last server ended.
    pub(super) fn open(data_dir: &Path, quota: u64) -> Result<Self, JobsError> {
        let (folder, staging) = (data_dir.join("blobs"), data_dir.join("staging"));
        for dir in [&folder, &staging] {
            fs::create_dir_all(dir).map_err(|source| JobsError::file(dir, source))?;
        }
        for (path, _) in entries(&staging)? {
            fs::remove_file(&path).map_err(|source| JobsError::file(path, source))?;
        }
        let used = entries(&folder)?.iter().map(|(_, bytes)| bytes).sum();
        let room = Arc::new(Room { quota, used: AtomicU64::new(used) });
        Ok(Self { folder, staging, room })
    }

    /// A content that is to arrive, of at most `limit` bytes.
    pub(super) fn receive(&self, limit: u64, quota: Quota) -> Result<Incoming, JobsError> {
        let path = self.staging.join(new_id(""));
        let file = File::create_new(&path).map_err(|source| JobsError::file(&path, source))?;
        Ok(Incoming {
            file,
            hash: Sha256Stream::new(),
            limit,
            quota,
            staged: Staged {
                path,
                folder: self.folder.clone(),
                room: Arc::clone(&self.room),
                sha256: String::new(),
                bytes: 0,
                is_published: false,
            },
        })
    }

    /// Where the content of this hash is.
    pub(super) fn path(&self, sha256: &str) -> PathBuf {
        self.folder.join(sha256)
    }

    /// The hashes of all contents.
    pub(super) fn hashes(&self) -> Result<Vec<String>, JobsError> {
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(entries(&self.folder)?.iter().filter_map(|(path, _)| name(path)).collect())
    }

    /// Removes a content. Only while the store's lock is held: somebody may be about to name it.
    pub(super) fn remove(&self, sha256: &str) -> Result<(), JobsError> {
        let path = self.path(sha256);
        let Ok(metadata) = fs::metadata(&path) else { return Ok(()) };
        fs::remove_file(&path).map_err(|source| JobsError::file(path, source))?;
        self.room.give_back(metadata.len());
        Ok(())
    }
}

/// A content that is arriving. Dropped before it is whole, it was never there.
pub struct Incoming {
    file: File,
    hash: Sha256Stream,
    limit: u64,
    quota: Quota,
    staged: Staged,
}

impl Incoming {
    /// Takes the next bytes. Blocking.
    ///
    /// # Errors
    /// The content becomes too large, or there is no room for it.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), JobsError> {
        let (staged, count) = (&mut self.staged, bytes.len() as u64);
        if staged.bytes + count > self.limit {
            return Err(JobsError::TooLarge { limit: self.limit });
        }
        staged.room.take(count, self.quota)?;
        staged.bytes += count;
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(|source| JobsError::file(&staged.path, source))
    }

    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.staged.bytes
    }

    /// Ends the content, which is then whole and on disk, but not yet named by anything. Blocking.
    ///
    /// # Errors
    /// The disk fails, or is full.
    pub fn finish(self) -> Result<Staged, JobsError> {
        let Self { file, hash, mut staged, .. } = self;
        file.sync_all().map_err(|source| JobsError::file(&staged.path, source))?;
        staged.sha256 = hash.finish();
        Ok(staged)
    }
}

/// A whole content that no record names yet. Dropped without one, it was never there.
pub struct Staged {
    path: PathBuf,
    folder: PathBuf,
    room: Arc<Room>,
    sha256: String,
    bytes: u64,
    is_published: bool,
}

impl Staged {
    /// Size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Hash, in hex.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Puts the content in its place. Only within the transaction that makes a record of it: the
    /// store's lock keeps [`Service::release`] from taking the content for a forgotten one.
    ///
    /// [`Service::release`]: super::Service::release
    pub(super) fn publish(&mut self) -> Result<(), JobsError> {
        let target = self.folder.join(&self.sha256);
        let replaced = fs::metadata(&target).map_or(0, |metadata| metadata.len());
        let synced =
            fs::rename(&self.path, &target).and_then(|()| File::open(&self.folder)?.sync_all());
        synced.map_err(|source| JobsError::file(target, source))?;
        self.is_published = true;
        self.room.give_back(replaced);
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.is_published {
            self.room.give_back(self.bytes);
            if let Err(error) = fs::remove_file(&self.path) {
                tracing::warn!("{} could not be removed: {error}", self.path.display());
            }
        }
    }
}

/// How much of the quota is taken, by whole and arriving contents.
#[derive(Debug)]
struct Room {
    quota: u64,
    used: AtomicU64,
}

impl Room {
    fn take(&self, bytes: u64, quota: Quota) -> Result<(), JobsError> {
        let used = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if used > self.quota && quota == Quota::Enforced {
            self.give_back(bytes);
            return Err(JobsError::NoSpace(format!(
                "all files together may have {} bytes; delete some",
                self.quota
            )));
        }
        Ok(())
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The files of a folder, with their sizes.
fn entries(dir: &Path) -> Result<Vec<(PathBuf, u64)>, JobsError> {
    let read = || {
        fs::read_dir(dir)?
            .map(|entry| {
                let entry = entry?;
                Ok((entry.path(), entry.metadata()?.len()))
            })
            .collect::<std::io::Result<Vec<_>>>()
    };
    read().map_err(|source| JobsError::file(dir, source))
}
