//! Publishing files so that nobody ever sees half of one: write, fsync, rename, fsync the folder.

pub mod disk;
#[cfg(debug_assertions)]
pub mod faults;

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use sha2::{Digest, Sha256};

pub use disk::DiskError;

static TEMPORARY_COUNTER: AtomicU64 = AtomicU64::new(0);

/// Writes `bytes` to `path` so that a reader, or a restart after a crash, finds the old content or
/// the new, never a mixture.
///
/// # Errors
/// Any I/O error; the old file is then untouched and the temporary file is removed, but where the last
/// step failed, that of syncing the folder: then the new file is there.
pub fn publish_file(path: &Path, bytes: &[u8]) -> Result<(), DiskError> {
    let temporary = temporary_sibling(path)?;
    let written = disk::write(&temporary, bytes)
        .and_then(|()| disk::sync(&temporary))
        .and_then(|()| disk::rename(&temporary, path));
    if written.is_err() {
        // The error that matters is the one above.
        let _ = disk::remove_file(&temporary);
    }
    written?;
    disk::sync(parent(path))
}

/// Builds a folder with `fill` under a temporary name beside `path` and gives it the name `path` when
/// everything in it is on disk. An existing folder at `path` is replaced: on Linux there is no moment
/// without one of the two. What is left of an old one that cannot be removed has `.tmp-` in its name.
///
/// # Errors
/// Whatever `fill` returns, and any I/O error. `path` is then as it was, but where the last step
/// failed, that of syncing the folder around it: then the new one is there.
pub fn publish_dir<E: From<DiskError>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let temporary = temporary_sibling(path)?;
    let filled = disk::create_dir_all(&temporary)
        .map_err(E::from)
        .and_then(|()| fill(&temporary))
        .and_then(|()| Ok(sync_tree(&temporary)?))
        .and_then(|()| Ok(replace_dir(&temporary, path)?));
    if filled.is_err() {
        // The error that matters is the one above.
        let _ = disk::remove_dir_all(&temporary);
    }
    filled?;
    Ok(disk::sync(parent(path))?)
}

/// The SHA-256 of a file's content, as 64 lower-case hex digits.
///
/// # Errors
/// Any error of opening or reading the file.
pub fn sha256_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0_u8; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}

/// The SHA-256 of `parts`, one after the other, as 64 lower-case hex digits.
#[must_use]
pub fn sha256_hex(parts: &[&[u8]]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    hex(&hasher.finalize())
}

/// A running SHA-256.
#[derive(Default)]
pub struct Sha256Stream(Sha256);

impl Sha256Stream {
    /// The hash of nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash as 64 lower-case hex digits.
    #[must_use]
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn temporary_sibling(path: &Path) -> Result<PathBuf, DiskError> {
    let name = path.file_name().ok_or_else(|| DiskError {
        operation: "writing",
        path: path.to_owned(),
        cause: io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name"),
    })?;
    let number = TEMPORARY_COUNTER.fetch_add(1, Ordering::Relaxed);
    let name = format!("{}.tmp-{}-{number}", name.to_string_lossy(), std::process::id());
    disk::create_dir_all(parent(path))?;
    Ok(path.with_file_name(name))
}

fn sync_tree(dir: &Path) -> Result<(), DiskError> {
    let unreadable = |cause| DiskError { operation: "reading", path: dir.to_owned(), cause };
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.is_dir() { sync_tree(&path)? } else { disk::sync(&path)? }
    }
    disk::sync(dir)
}

/// A non-empty folder cannot be renamed over: the two change places, or the old one steps aside first.
fn replace_dir(new: &Path, path: &Path) -> Result<(), DiskError> {
    if !path.exists() {
        return disk::rename(new, path);
    }
    let old = if disk::exchange(new, path)? {
        new.to_owned()
    } else {
        let aside = temporary_sibling(path)?;
        disk::rename(path, &aside)?;
        if let Err(error) = disk::rename(new, path) {
            disk::rename(&aside, path)?;
            return Err(error);
        }
        aside
    };
    // The new one is in place, which is what was asked for.
    if let Err(error) = disk::remove_dir_all(&old) {
        tracing::warn!("{error}");
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_fill_leaves_the_old_folder_untouched() {
        let root = std::env::temp_dir().join(format!("publish-{}", std::process::id()));
        let target = root.join("adapter");
        publish_dir(&target, |dir| disk::write(&dir.join("a"), "old")).unwrap();
        let failed = publish_dir(&target, |dir| {
            disk::write(&dir.join("a"), "half")?;
            Err(io::Error::other("disk full"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "old");
        publish_dir(&target, |dir| disk::write(&dir.join("a"), "new")).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "new");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1, "temporary folders were left behind");
        fs::remove_dir_all(&root).unwrap();
    }
}
