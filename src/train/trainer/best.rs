//! The best validation loss of a run: when it was, what was trained then, and whether there is hope for
//! a better one.
//!
//! What is known about it is a function of the events, which belong to every checkpoint, so a resumed run
//! knows the same. The parameters lie beside the checkpoints. A new best is followed by a checkpoint of the
//! same step, so the two checkpoints that are kept need the parameters of the two newest, and a process
//! that was killed in between has left one more.

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::{Device, safetensors::load_buffer};

use super::{AdamW, Outcome, TrainError, TrainEvent, TrainJob, Trainer, output};
use crate::publish::{disk, publish_file, sha256_hex};

/// Parameters that are kept, see above.
const NUM_KEPT: usize = 3;
/// Digits of the hash that a file's name has.
const HASH_LENGTH: usize = 16;

/// What the validations of a run over all rows came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::train) struct Standing {
    /// Steps before the best one; the earliest of equal ones.
    pub(in crate::train) step: usize,
    pub(in crate::train) loss: f64,
    pub(in crate::train) token_accuracy: f64,
    /// Steps before the newest one.
    newest: usize,
    /// Validations since the loss was last better by more than the threshold.
    num_stale: usize,
}

impl Standing {
    /// Of the validations after at most `until` steps; `None` if there was none. `threshold` is by how
    /// much a loss must be below the best to be worth waiting for.
    pub(in crate::train) fn of(
        events: &[TrainEvent],
        until: usize,
        threshold: f64,
    ) -> Option<Self> {
        let mut standing: Option<Self> = None;
        for event in events {
            let TrainEvent::Validated { step, full: true, loss, token_accuracy, .. } = *event
            else {
                continue;
            };
            if step > until {
                continue;
            }
            // What is no number is worse than any.
            let loss = if loss.is_nan() { f64::INFINITY } else { comparable(loss) };
            let first = Self { step, loss, token_accuracy, newest: step, num_stale: 0 };
            let Some(before) = standing else {
                standing = Some(first);
                continue;
            };
            let num_stale = if loss < before.loss - threshold { 0 } else { before.num_stale + 1 };
            let best = if loss < before.loss { first } else { before };
            standing = Some(Self { newest: step, num_stale, ..best });
        }
        standing
    }
}

/// `loss` without its last digits: a number that was read back from a log may have lost the very last, and
/// who is best must not depend on that.
fn comparable(loss: f64) -> f64 {
    const DIGITS: f64 = 1e9;
    (loss * DIGITS).round() / DIGITS
}

/// Checks that there is something to be best at.
pub(super) fn check(job: &TrainJob) -> Result<(), TrainError> {
    let config = &job.config;
    let wrong = |key, value: &dyn std::fmt::Debug, allowed| {
        Err(TrainError::Config { key, value: format!("{value:?}"), allowed })
    };
    let waits = config.early_stopping_patience.is_some();
    if (waits || config.keep_best) && job.valid.is_empty() {
        let key = if waits { "early_stopping_patience" } else { "keep_best" };
        return wrong(key, &"set", "unset without validation rows (valid)");
    }
    if waits && config.eval_every == 0 {
        return wrong("eval_every", &0, "at least 1 with early_stopping_patience");
    }
    match config.valid_batch {
        Some(rows) if rows < job.valid.len() && (waits || config.keep_best) => {
            wrong("valid_batch", &rows, "unset with keep_best or early_stopping_patience")
        }
        _ => Ok(()),
    }
}

impl Trainer<'_> {
    /// After a step that may have been validated: keeps the parameters if they are the best so far.
    /// Returns whether the run is to end because nothing has become better for too long.
    pub(super) fn weigh(&mut self) -> Result<bool, TrainError> {
        let Some(standing) = self.standing().filter(|standing| standing.newest == self.step) else {
            return Ok(false);
        };
        let config = &self.job.config;
        if config.keep_best
            && standing.step == self.step
            && let Some(folder) = self.best_folder()
        {
            save(&folder, self.step, &self.optimizer)?;
            self.write_checkpoint()?;
        }
        Ok(config.early_stopping_patience.is_some_and(|patience| standing.num_stale >= patience))
    }

    /// Puts the best parameters into the place of the last ones, which are published as `OUTPUT.last`
    /// where that is wanted. `outcome` is how the run has ended.
    pub(super) fn restore_best(&mut self, outcome: Outcome) -> Result<(), TrainError> {
        let config = &self.job.config;
        let Some(best) = self.standing().filter(|_| config.keep_best) else { return Ok(()) };
        if config.keep_last && outcome != Outcome::Eliminated {
            self.model.round(config.dtype)?;
            self.compare(true)?;
            output::publish(&self.finished(), &last_folder(&config.output))?;
        }
        if best.step != self.step
            && let Some(folder) = self.best_folder()
        {
            load(&folder, best.step, &self.optimizer)?;
        }
        self.say(TrainEvent::Best { step: best.step, loss: best.loss })
    }

    fn standing(&self) -> Option<Standing> {
        let threshold = self.job.config.early_stopping_threshold;
        Standing::of(self.log.events(), self.step, threshold)
    }

    fn best_folder(&self) -> Option<PathBuf> {
        self.workspace.as_ref().map(|workspace| workspace.checkpoints().with_file_name("best"))
    }
}

/// Where the last adapter goes if the best one is the output.
fn last_folder(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_os_string();
    name.push(".last");
    output.with_file_name(name)
}

/// Writes the parameters after `step` steps and removes all but the newest. The name has a part of the
/// content's hash.
fn save(folder: &Path, step: usize, optimizer: &AdamW) -> Result<(), TrainError> {
    disk::create_dir_all(folder)?;
    let tensors = optimizer.parameters().iter().map(|(name, var)| (name, var.as_tensor().clone()));
    let bytes = safetensors::serialize(tensors, None).map_err(|error| TrainError::Checkpoint {
        path: folder.to_owned(),
        reason: error.to_string(),
    })?;
    let path = folder.join(format!("{}{}.safetensors", prefix(step), hash(&bytes)));
    publish_file(&path, &bytes)?;
    let mut names: Vec<_> = files(folder)?;
    names.sort_unstable();
    for old in names.into_iter().rev().skip(NUM_KEPT) {
        // It costs room and nothing else.
        if let Err(error) = disk::remove_file(&old) {
            tracing::warn!("{error}");
        }
    }
    Ok(())
}

/// Sets the parameters to those that were saved after `step` steps.
fn load(folder: &Path, step: usize, optimizer: &AdamW) -> Result<(), TrainError> {
    let failed = |reason: String| TrainError::Checkpoint { path: folder.to_owned(), reason };
    let named = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix(step)))
    };
    let missing = || failed(format!("the parameters of the best step, {step}, are not there"));
    let path = files(folder)?.into_iter().find(named).ok_or_else(missing)?;
    let bytes =
        fs::read(&path).map_err(|source| TrainError::File { path: path.clone(), source })?;
    if !path.to_string_lossy().contains(&hash(&bytes)) {
        return Err(failed(format!("{} is not what was written", path.display())));
    }
    let mut tensors = load_buffer(&bytes, &Device::Cpu)?;
    for (name, var) in optimizer.parameters() {
        let tensor = tensors.remove(name).ok_or_else(|| failed(format!("{name} is missing")))?;
        var.set(&tensor)?;
    }
    Ok(())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    Ok(files)
}

fn prefix(step: usize) -> String {
    format!("step-{step:08}-")
}

fn hash(bytes: &[u8]) -> String {
    let mut hash = sha256_hex(&[bytes]);
    hash.truncate(HASH_LENGTH);
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(losses: &[f64], threshold: f64) -> (usize, usize) {
        let event = |(index, loss): (usize, &f64)| TrainEvent::Validated {
            step: index + 1,
            full: true,
            loss: *loss,
            perplexity: 1.0,
            token_accuracy: 0.0,
            num_trained_tokens: 1,
            rewards: None,
            seconds: 0.0,
        };
        let events: Vec<_> = losses.iter().enumerate().map(event).collect();
        let standing = Standing::of(&events, losses.len(), threshold).unwrap();
        (standing.step, standing.num_stale)
    }

    #[test]
    fn the_best_is_the_first_of_the_lowest_and_patience_counts_what_is_no_better() {
        assert_eq!(standing(&[3.0], 0.0), (1, 0));
        assert_eq!(standing(&[3.0, 2.0, 2.5, 2.0], 0.0), (2, 2));
        assert_eq!(standing(&[3.0, 2.0, 2.5, 1.0], 0.0), (4, 0));
        // A little better is the best, and still not worth waiting for.
        assert_eq!(standing(&[3.0, 2.95, 2.9], 0.1), (3, 2));
        assert_eq!(standing(&[f64::NAN, 2.0], 0.0), (2, 0));
        assert_eq!(Standing::of(&[], 5, 0.0), None);
    }
}
