//! Publishing files so that nobody ever sees half of one: write, fsync, rename, fsync the folder.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use sha2::{Digest, Sha256};

static TEMPORARY_COUNTER: AtomicU64 = AtomicU64::new(0);

/// Writes `bytes` to `path` so that a reader, or a restart after a crash, finds the old content or
/// the new, never a mixture.
///
/// # Errors
/// Any I/O error; the old file is then untouched and the temporary file is removed.
pub fn publish_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary_sibling(path)?;
    let written = write_synced(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The error that matters is the one above.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    sync_parent(path)
}

/// Builds a folder with `fill` under a temporary name beside `path` and renames it to `path` when
/// everything in it is on disk. An existing folder at `path` is replaced; its old content is gone
/// only after the new one is in place.
///
/// # Errors
/// Whatever `fill` returns, and any I/O error. `path` is then as it was.
pub fn publish_dir<E: From<io::Error>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let temporary = temporary_sibling(path)?;
    let filled = fs::create_dir_all(&temporary)
        .map_err(E::from)
        .and_then(|()| fill(&temporary))
        .and_then(|()| Ok(sync_tree(&temporary)?))
        .and_then(|()| Ok(replace_dir(&temporary, path)?));
    if filled.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    filled?;
    Ok(sync_parent(path)?)
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

fn temporary_sibling(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{} has no file name", path.display()))
    })?;
    let number = TEMPORARY_COUNTER.fetch_add(1, Ordering::Relaxed);
    let name = format!("{}.tmp-{}-{number}", name.to_string_lossy(), std::process::id());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    Ok(path.with_file_name(name))
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path)?.sync_all()?;
        }
    }
    File::open(dir)?.sync_all()
}

/// A non-empty folder cannot be renamed over, so the old one steps aside first.
fn replace_dir(new: &Path, path: &Path) -> io::Result<()> {
    if !path.exists() {
        return fs::rename(new, path);
    }
    let aside = temporary_sibling(path)?;
    fs::rename(path, &aside)?;
    if let Err(error) = fs::rename(new, path) {
        fs::rename(&aside, path)?;
        return Err(error);
    }
    fs::remove_dir_all(&aside)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_fill_leaves_the_old_folder_untouched() {
        let root = std::env::temp_dir().join(format!("publish-{}", std::process::id()));
        let target = root.join("adapter");
        publish_dir(&target, |dir| fs::write(dir.join("a"), "old")).unwrap();
        let failed = publish_dir(&target, |dir| {
            fs::write(dir.join("a"), "half")?;
            Err(io::Error::other("disk full"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "old");
        publish_dir(&target, |dir| fs::write(dir.join("a"), "new")).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "new");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1, "temporary folders were left behind");
        fs::remove_dir_all(&root).unwrap();
    }
}
