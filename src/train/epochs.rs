//! The adapters that a run leaves behind at the end of its epochs: `step-N` in one folder, the newest
//! few.
//!
//! A run that was killed makes its epochs' folders again with the same bits, so what is there may stay
//! until then: only folders of steps already made are counted and removed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{TrainConfig, TrainError};
use crate::publish::disk;

/// Where the adapter after `step` steps goes.
pub(super) fn folder(epoch_dir: &Path, step: usize) -> PathBuf {
    epoch_dir.join(format!("step-{step}"))
}

/// Makes the folder, removes what a killed process left half written there and, in a run from the
/// start, what another run left.
pub(super) fn prepare(config: &TrainConfig) -> Result<(), TrainError> {
    let Some(dir) = &config.epoch_dir else { return Ok(()) };
    let at = |source| TrainError::File { path: dir.clone(), source };
    disk::create_dir_all(dir)?;
    for entry in fs::read_dir(dir).map_err(at)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let half_written = name.split_once(".tmp-").is_some_and(|(name, _)| is_epoch(name));
        if half_written || (is_epoch(&name) && config.overwrite && !config.resume) {
            disk::remove_dir_all(&path)?;
        } else if is_epoch(&name) && !config.resume {
            return Err(TrainError::OutputExists(path));
        }
    }
    Ok(())
}

/// Removes all but the newest `keep` of the adapters of steps up to `step`.
pub(super) fn prune(epoch_dir: &Path, step: usize, keep: usize) -> Result<(), TrainError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(epoch_dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        found.extend(name.and_then(step_of).filter(|other| *other <= step));
    }
    found.sort_unstable();
    for old in found.into_iter().rev().skip(keep) {
        disk::remove_dir_all(&folder(epoch_dir, old))?;
    }
    Ok(())
}

fn is_epoch(name: &str) -> bool {
    step_of(name).is_some()
}

fn step_of(name: &str) -> Option<usize> {
    name.strip_prefix("step-")?.parse().ok()
}
