//! The one door through which published files and folders are changed. Its errors say what was to be
//! done to which path, and a debug build can be told to fail here ([`faults`](super::faults)).

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// A file or folder that could not be changed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}: {cause}", path.display())]
pub struct DiskError {
    /// "writing", "renaming", ...
    pub operation: &'static str,
    /// What it was to be done to.
    pub path: PathBuf,
    /// What the system said.
    pub cause: io::Error,
}

impl From<DiskError> for io::Error {
    fn from(error: DiskError) -> Self {
        Self::new(error.cause.kind(), error)
    }
}

/// Writes a file that is new, or replaces its content.
///
/// # Errors
/// What the system says; a part of it may then be there.
pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<(), DiskError> {
    write_with(path, || fs::write(path, bytes))
}

/// As [`write`](fn@write), by somebody else's function, which writes to `path`.
///
/// # Errors
/// What the function says.
pub fn write_with(path: &Path, write: impl FnOnce() -> io::Result<()>) -> Result<(), DiskError> {
    change("writing", path, Some(0), write)
}

/// Copies a file's content and permissions.
///
/// # Errors
/// What the system says; a part of it may then be there.
pub fn copy(from: &Path, to: &Path) -> Result<(), DiskError> {
    change("copying to", to, Some(0), || fs::copy(from, to).map(drop))
}

/// Opens a file to be added to, and makes it if it is not there.
///
/// # Errors
/// What the system says.
pub fn open_to_append(path: &Path) -> Result<File, DiskError> {
    let mut file = None;
    change("opening", path, None, || {
        file = Some(File::options().create(true).append(true).open(path)?);
        Ok(())
    })?;
    Ok(file.expect("it is open where nothing failed"))
}

/// Adds `bytes` to `file`, which was opened to append at `path`.
///
/// # Errors
/// What the system says; some of the bytes may then be there.
pub fn append(file: &mut File, path: &Path, bytes: &[u8]) -> Result<(), DiskError> {
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    change("writing", path, Some(length), || file.write_all(bytes))
}

/// Empties `file`, which is at `path`.
///
/// # Errors
/// What the system says.
pub fn empty(file: &File, path: &Path) -> Result<(), DiskError> {
    change("emptying", path, None, || file.set_len(0))
}

/// Makes a folder and those above it; it may be there.
///
/// # Errors
/// What the system says.
pub fn create_dir_all(path: &Path) -> Result<(), DiskError> {
    change("creating", path, None, || fs::create_dir_all(path))
}

/// Renames a file, which may replace another, or a folder.
///
/// # Errors
/// What the system says.
pub fn rename(from: &Path, to: &Path) -> Result<(), DiskError> {
    change("renaming to", to, None, || fs::rename(from, to))
}

/// Exchanges two folders at once. False where the file system cannot.
///
/// # Errors
/// What the system says.
#[cfg(target_os = "linux")]
pub fn exchange(one: &Path, other: &Path) -> Result<bool, DiskError> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    let mut done = true;
    change("exchanging", other, None, || {
        match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => done = false,
            result => result?,
        }
        Ok(())
    })?;
    Ok(done)
}

/// Exchanges two folders at once. False where the file system cannot.
///
/// # Errors
/// None here.
#[cfg(not(target_os = "linux"))]
pub fn exchange(_one: &Path, _other: &Path) -> Result<bool, DiskError> {
    Ok(false)
}

/// Waits until a file's content, or a folder's list of names, is on disk.
///
/// # Errors
/// What the system says.
pub fn sync(path: &Path) -> Result<(), DiskError> {
    change("syncing", path, None, || File::open(path)?.sync_all())
}

/// Removes a file.
///
/// # Errors
/// What the system says.
pub fn remove_file(path: &Path) -> Result<(), DiskError> {
    change("removing", path, None, || fs::remove_file(path))
}

/// Removes a folder and all that is in it.
///
/// # Errors
/// What the system says; a part of it may be gone then.
pub fn remove_dir_all(path: &Path) -> Result<(), DiskError> {
    change("removing", path, None, || fs::remove_dir_all(path))
}

/// Does `act`, unless a fault is due. `length`: of the file before, where bytes are added to it.
fn change(
    operation: &'static str,
    path: &Path,
    length: Option<u64>,
    act: impl FnOnce() -> io::Result<()>,
) -> Result<(), DiskError> {
    let done = due_fault(operation, path, length, act);
    done.map_err(|cause| DiskError { operation, path: path.to_owned(), cause })
}

#[cfg(debug_assertions)]
use super::faults::act as due_fault;

#[cfg(not(debug_assertions))]
fn due_fault(
    _operation: &'static str,
    _path: &Path,
    _length: Option<u64>,
    act: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    act()
}
