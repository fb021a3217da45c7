//! Checkpoints: everything a run needs to go on with the same bits, verified by hash when read.
//!
//! A checkpoint is a folder `step-NNNNNNNN` with `tensors.safetensors` (parameters and both running
//! means of the optimizer), `events.jsonl` (what happened so far) and `state.json`, which holds the
//! step, the recipe and the hashes of the other two. It appears under its name only when complete.

use std::{
    borrow::Cow,
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use super::{AdamW, EventLog, Moments, Recipe, TrainError, workspace::EVENTS_FILE};
use crate::publish::{disk, publish_dir, sha256_file, sha256_hex};

/// Checkpoints that are kept: the newest, and one to fall back to.
const NUM_KEPT: usize = 2;
const TENSORS_FILE: &str = "tensors.safetensors";
const STATE_FILE: &str = "state.json";
const PARTS: [&str; 3] = ["parameter", "exp_avg", "exp_avg_sq"];

/// A checkpoint that was read and verified.
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Optimizer steps made before it.
    pub step: usize,
    /// The settings and data it belongs to.
    pub recipe: Recipe,
    /// What happened so far.
    pub log: EventLog,
    tensors: HashMap<String, Vec<f32>>,
}

/// `state.json`.
#[derive(Serialize, Deserialize)]
struct StateFile {
    state: State,
    /// Of `state` as it is written.
    sha256: String,
}

#[derive(Serialize, Deserialize)]
struct State {
    step: usize,
    recipe: Recipe,
    tensors_sha256: String,
    events_sha256: String,
}

/// Writes the checkpoint of `optimizer` after `step` steps into the folder `checkpoints`. Returns its
/// path.
///
/// # Errors
/// Any I/O error; older checkpoints are then untouched.
pub fn write_checkpoint(
    checkpoints: &Path,
    step: usize,
    optimizer: &AdamW,
    recipe: &Recipe,
    log: &EventLog,
) -> Result<PathBuf, TrainError> {
    let path = checkpoints.join(format!("step-{step:08}"));
    publish_dir(&path, |dir| -> Result<(), TrainError> {
        let (tensors, saved) = (dir.join(TENSORS_FILE), state_tensors(optimizer)?);
        disk::write_with(&tensors, || {
            safetensors::serialize_to_file(saved, None, &tensors).map_err(io::Error::other)
        })?;
        disk::write(&dir.join(EVENTS_FILE), log.text())?;
        let state = State {
            step,
            recipe: recipe.clone(),
            tensors_sha256: sha256_file(&tensors)?,
            events_sha256: sha256_hex(&[log.text().as_bytes()]),
        };
        let sha256 = state.sha256();
        let json = serde_json::to_string_pretty(&StateFile { state, sha256 });
        Ok(disk::write(&dir.join(STATE_FILE), json.expect("plain data is always JSON"))?)
    })?;
    Ok(path)
}

/// Removes all but the newest two checkpoints in the folder `checkpoints`.
///
/// # Errors
/// Any I/O error; the newest two are untouched.
pub fn prune_checkpoints(checkpoints: &Path) -> Result<(), TrainError> {
    for old in newest_first(checkpoints)?.into_iter().skip(NUM_KEPT) {
        disk::remove_dir_all(&old)?;
    }
    Ok(())
}

/// The newest checkpoint in the folder `checkpoints` that is whole; `skipped` learns about the ones
/// that are not. `None` if there is none.
///
/// # Errors
/// Only when the folder itself cannot be read.
pub fn newest_checkpoint(
    checkpoints: &Path,
    skipped: &mut dyn FnMut(&TrainError),
) -> Result<Option<Checkpoint>, TrainError> {
    for path in newest_first(checkpoints)? {
        match read_checkpoint(&path) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(reason) => skipped(&TrainError::Checkpoint { path, reason }),
        }
    }
    Ok(None)
}

impl Checkpoint {
    /// Puts the saved numbers into the optimizer's parameters and means.
    ///
    /// # Errors
    /// [`TrainError::Checkpoint`] if a parameter is missing or has another size.
    pub fn restore(mut self, optimizer: &mut AdamW) -> Result<(), TrainError> {
        let mut moments = Vec::new();
        for (name, var) in optimizer.parameters() {
            let [values, mean, mean_square] = PARTS.map(|part| {
                let key = format!("{part}.{name}");
                let values = self.tensors.remove(&key);
                let fits = values.filter(|values| values.len() == var.elem_count());
                fits.ok_or_else(|| TrainError::Checkpoint {
                    path: self.path.clone(),
                    reason: format!("{key} is missing or has another size"),
                })
            });
            var.set(&Tensor::from_vec(values?, var.shape(), &Device::Cpu)?)?;
            moments.push(Moments { mean: mean?, mean_square: mean_square? });
        }
        optimizer.restore(moments, self.step as u64);
        Ok(())
    }
}

/// Reads and verifies; the error says what is wrong with this checkpoint.
fn read_checkpoint(path: &Path) -> Result<Checkpoint, String> {
    let read = |name: &str| fs::read(path.join(name)).map_err(|error| format!("{name}: {error}"));
    let file: StateFile = serde_json::from_slice(&read(STATE_FILE)?)
        .map_err(|error| format!("{STATE_FILE}: {error}"))?;
    let (tensors, log) = (read(TENSORS_FILE)?, read(EVENTS_FILE)?);
    let state = &file.state;
    for (name, expected, actual) in [
        (STATE_FILE, &file.sha256, state.sha256()),
        (TENSORS_FILE, &state.tensors_sha256, sha256_hex(&[&tensors])),
        (EVENTS_FILE, &state.events_sha256, sha256_hex(&[&log])),
    ] {
        if *expected != actual {
            return Err(format!("{name} has sha256 {actual}, expected {expected}"));
        }
    }
    let tensors = SafeTensors::deserialize(&tensors).map_err(|error| error.to_string())?;
    let tensors = tensors.iter().map(|(name, view)| (name.to_owned(), floats(view.data())));
    let log = EventLog::from_text(&String::from_utf8_lossy(&log));
    let tensors = tensors.collect();
    let State { step, recipe, .. } = file.state;
    Ok(Checkpoint { path: path.to_owned(), step, recipe, log, tensors })
}

impl State {
    fn sha256(&self) -> String {
        sha256_hex(&[&serde_json::to_vec(self).expect("plain data is always JSON")])
    }
}

/// Checkpoint folders in the folder `checkpoints`, newest first.
pub(super) fn newest_first(checkpoints: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let step_of = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix("step-")?.parse::<usize>().ok()
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(checkpoints)? {
        let path = entry?.path();
        found.extend(step_of(&path).map(|step| (step, path)));
    }
    found.sort();
    Ok(found.into_iter().rev().map(|(_, path)| path).collect())
}

/// Everything to save, by name: the parameter and its two means.
fn state_tensors(optimizer: &AdamW) -> Result<Vec<(String, FloatView<'_>)>, TrainError> {
    let mut tensors = Vec::new();
    for ((name, var), moments) in optimizer.parameters().iter().zip(optimizer.moments()) {
        let values = var.flatten_all()?.to_vec1::<f32>()?;
        let parts = [
            Cow::Owned(values),
            Cow::Borrowed(moments.mean.as_slice()),
            Cow::Borrowed(moments.mean_square.as_slice()),
        ];
        for (part, values) in PARTS.iter().zip(parts) {
            let shape = var.dims().to_vec();
            tensors.push((format!("{part}.{name}"), FloatView { values, shape }));
        }
    }
    Ok(tensors)
}

/// f32 numbers in the form in which `safetensors` takes them.
struct FloatView<'a> {
    values: Cow<'a, [f32]>,
    shape: Vec<usize>,
}

impl View for FloatView<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        let (chunks, _) = bytes.as_chunks_mut::<4>();
        chunks.iter_mut().zip(&*self.values).for_each(|(to, value)| *to = value.to_le_bytes());
        bytes.into()
    }

    fn data_len(&self) -> usize {
        size_of_val(&*self.values)
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}
