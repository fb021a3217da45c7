//! `<output>.work`: where a run keeps its checkpoints and events until its output is published.

use std::{
    ffi::OsString,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use super::TrainError;
use crate::publish::disk;

/// Name of the event log, here and in the published folder.
pub(super) const EVENTS_FILE: &str = "events.jsonl";

/// The work folder that belongs to `output`.
#[must_use]
pub fn work_dir(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_os_string();
    name.push(".work");
    output.with_file_name(name)
}

/// The work folder of a running process. Holds its lock until dropped.
pub(super) struct Workspace {
    dir: PathBuf,
    output_name: OsString,
    events: File,
    /// Locked: two processes must not train into the same output.
    _lock: File,
}

impl Workspace {
    /// Opens the work folder of `output`, or makes it, and removes what a killed process left half
    /// written.
    pub(super) fn open(output: &Path) -> Result<Self, TrainError> {
        let dir = work_dir(output);
        disk::create_dir_all(&dir.join("checkpoints"))?;
        let lock_path = dir.join("lock");
        let lock = disk::open_to_append(&lock_path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(TrainError::Busy(output.to_owned())),
            Err(TryLockError::Error(source)) => {
                return Err(TrainError::File { path: lock_path, source });
            }
        }
        remove_temporaries(&dir.join("checkpoints"), "")?;
        if let (Some(parent), Some(name)) = (output.parent(), output.file_name()) {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            remove_temporaries(parent, &name.to_string_lossy())?;
        }
        let events = disk::open_to_append(&dir.join(EVENTS_FILE))?;
        let output_name = output.file_name().unwrap_or_default().to_owned();
        Ok(Self { events, dir, output_name, _lock: lock })
    }

    /// Where the checkpoints are.
    pub(super) fn checkpoints(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }

    /// Where an adapter may be put for a while.
    pub(super) fn candidate(&self) -> PathBuf {
        self.dir.join("candidate")
    }

    /// Makes `text` the whole event log: what came after the checkpoint never happened.
    pub(super) fn rewrite_events(&mut self, text: &str) -> Result<(), TrainError> {
        disk::empty(&self.events, &self.dir.join(EVENTS_FILE))?;
        self.append_event(text)
    }

    /// Adds a line to the event log.
    pub(super) fn append_event(&mut self, line: &str) -> Result<(), TrainError> {
        Ok(disk::append(&mut self.events, &self.dir.join(EVENTS_FILE), line.as_bytes())?)
    }

    /// Removes the folder; the output is published. It loses its name first, so that a process
    /// killed meanwhile leaves nothing that looks like an unfinished run.
    pub(super) fn remove(self) -> Result<(), TrainError> {
        let mut name = self.output_name.clone();
        name.push(format!(".tmp-{}-work", std::process::id()));
        let aside = self.dir.with_file_name(name);
        disk::rename(&self.dir, &aside)?;
        Ok(disk::remove_dir_all(&aside)?)
    }
}

/// Removes what a process that was killed while it cleared up after its published `output` left behind.
pub(super) fn sweep(output: &Path) {
    let (Some(parent), Some(name)) = (output.parent(), output.file_name()) else { return };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    if let Err(error) = remove_temporaries(parent, &name.to_string_lossy()) {
        // It may be just now that the other process goes on with it.
        tracing::debug!("{}: {error}", output.display());
    }
}

/// Removes folders `<name>….tmp-…` in `dir`, which a process that was killed while it published
/// left behind. The lock says that no living process uses them.
fn remove_temporaries(dir: &Path, name: &str) -> Result<(), TrainError> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let ours = match file_name.split_once(".tmp-") {
            Some((before, _)) => name.is_empty() || before == name,
            None => false,
        };
        if ours && path.is_dir() {
            disk::remove_dir_all(&path)?;
        }
    }
    Ok(())
}
