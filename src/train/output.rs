//! The published folder: weights, the files that a tokenizer needs, and the card that says where
//! all of it came from.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use candle_core::DType;
use serde_json::{Map, Value, json};

use super::{
    EventLog, Examination, Outcome, TrainConfig, TrainError, TrainJob, TrainSummary,
    checkpoint::newest_first,
    parity::PARITY_FILE,
    recipe::Recipe,
    report,
    trainable::Trainable,
    work_dir,
    workspace::{self, EVENTS_FILE, Workspace},
};
use crate::adapters::{AdapterCard, LoraAdapter};
use crate::publish::{disk, publish_dir, sha256_file, sha256_hex};

/// Files of the base that belong beside any weights trained on it.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
];

/// A run that has made its last step.
pub(super) struct Finished<'a> {
    pub(super) job: &'a TrainJob,
    pub(super) model: &'a Trainable,
    pub(super) recipe: &'a Recipe,
    pub(super) log: &'a EventLog,
    pub(super) step: usize,
    pub(super) total_steps: usize,
    pub(super) seconds: f64,
    /// Text of `parity.json`, if one is wanted.
    pub(super) parity: Option<String>,
    /// What was found before it is published.
    pub(super) examination: Examination,
}

/// Refuses to touch an output or an unfinished run that nobody said may go. A finished run that is
/// asked to resume has nothing to do: its summary is returned.
pub(super) fn check(job: &TrainJob) -> Result<Option<TrainSummary>, TrainError> {
    let config = &job.config;
    let work = work_dir(&config.output);
    refuse_foreign(config)?;
    if config.resume && work.exists() {
        return Ok(None);
    }
    if config.output.exists() && !config.overwrite {
        let finished = config.resume.then(|| read_summary(&config.output)).flatten();
        return match finished {
            Some(summary) => {
                workspace::sweep(&config.output);
                Ok(Some(summary))
            }
            None => Err(TrainError::OutputExists(config.output.clone())),
        };
    }
    let checkpoints = work.join("checkpoints");
    if checkpoints.exists() && !newest_first(&checkpoints)?.is_empty() {
        if !config.overwrite {
            return Err(TrainError::Unfinished(work));
        }
        // Taking the lock first: a living process must not lose its work.
        Workspace::open(&config.output)?.remove()?;
    }
    Ok(None)
}

/// Refuses an output that would be replaced and that no run has made.
pub(super) fn refuse_foreign(config: &TrainConfig) -> Result<(), TrainError> {
    if (config.overwrite || config.resume) && !may_go(&config.output) {
        return Err(TrainError::NotAnOutput(config.output.clone()));
    }
    Ok(())
}

/// Whether nobody loses anything but a run's output, or an adapter of PEFT, if this path is replaced.
fn may_go(path: &Path) -> bool {
    let is_empty = |dir: fs::ReadDir| dir.flatten().next().is_none();
    match fs::read_dir(path) {
        Ok(dir) => {
            let made = [AdapterCard::FILE_NAME, "adapter_config.json"];
            made.iter().any(|name| path.join(name).exists()) || is_empty(dir)
        }
        Err(_) => !path.exists(),
    }
}

/// Publishes the folder `output` at once, replacing one that is there. Returns the digest of its
/// weights.
pub(super) fn publish(run: &Finished<'_>, output: &Path) -> Result<String, TrainError> {
    let mut digest = String::new();
    publish_dir(output, |dir| -> Result<(), TrainError> {
        digest = match &run.model.adapter {
            Some(adapter) => write_adapter(run, adapter, dir)?,
            None => write_model(run.job, run.model, dir)?,
        };
        for name in COMPANIONS {
            let from = run.job.model_dir.join(name);
            if from.exists() {
                disk::copy(&from, &dir.join(name))?;
            }
        }
        for (name, content) in &run.job.companions {
            disk::write(&dir.join(name), content)?;
        }
        disk::write(&dir.join(EVENTS_FILE), run.log.text())?;
        if let Some(parity) = &run.parity {
            disk::write(&dir.join(PARITY_FILE), parity)?;
        }
        for (name, text) in &run.examination.files {
            disk::write(&dir.join(name), text)?;
        }
        disk::write(&dir.join("loss.svg"), report::loss_curve_svg(run.log.events()))?;
        Ok(card(run, &digest).write(dir)?)
    })?;
    Ok(digest)
}

/// What the card of an already published run says; `None` if there is no such card.
pub(super) fn read_summary(output: &Path) -> Option<TrainSummary> {
    let card = AdapterCard::read(output).ok()??.configuration;
    let result = &card["result"];
    let step = usize::try_from(result["step"].as_u64()?).ok()?;
    let valid = &result["valid"];
    Some(TrainSummary {
        outcome: Outcome::Finished,
        step,
        total_steps: usize::try_from(result["total_steps"].as_u64()?).ok()?,
        best_step: result["best_step"].as_u64().and_then(|step| usize::try_from(step).ok()),
        loss: result["loss"].as_f64(),
        valid: valid["loss"].as_f64().zip(valid["token_accuracy"].as_f64()),
        path: output.to_owned(),
        digest: card["digest"].as_str()?.to_owned(),
        seconds: 0.0,
    })
}

/// Writes the PEFT files and reads them back: what cannot be served is not published.
fn write_adapter(
    run: &Finished<'_>,
    adapter: &LoraAdapter,
    dir: &Path,
) -> Result<String, TrainError> {
    adapter.write(dir, &run.job.config.model)?;
    let written = LoraAdapter::read(dir, run.model.decoder.config(), false)?;
    Ok(written.digest().to_owned())
}

/// Writes `config.json` and `model.safetensors`. Returns the hash of the latter.
pub(super) fn write_model(
    job: &TrainJob,
    model: &Trainable,
    dir: &Path,
) -> Result<String, TrainError> {
    let dtype = DType::from(job.config.dtype);
    let name = if dtype == DType::F32 { "float32" } else { "bfloat16" };
    write_config(&job.model_dir.join("config.json"), &dir.join("config.json"), name)?;
    let path = dir.join("model.safetensors");
    let mut tensors = Vec::new();
    for (name, tensor) in model.decoder.tensors() {
        tensors.push((name, tensor.to_dtype(dtype)?.contiguous()?));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(|error| {
        TrainError::Checkpoint { path: path.clone(), reason: error.to_string() }
    })?;
    disk::write(&path, bytes)?;
    Ok(sha256_file(&path)?)
}

/// Copies the base's `config.json`, naming the number format of the new weights.
fn write_config(from: &Path, to: &Path, dtype: &str) -> Result<(), TrainError> {
    let at = |source| TrainError::File { path: PathBuf::from(from), source };
    let text = fs::read(from).map_err(at)?;
    let mut config: Map<String, Value> =
        serde_json::from_slice(&text).map_err(|error| at(error.into()))?;
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.to_owned(), dtype.into());
    let text = serde_json::to_string_pretty(&config).expect("plain data is always JSON");
    Ok(disk::write(to, text + "\n")?)
}

fn card(run: &Finished<'_>, digest: &str) -> AdapterCard {
    let valid = report::last_validation(run.log.events())
        .map(|(loss, accuracy)| json!({"loss": loss, "token_accuracy": accuracy}));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let train: Vec<&str> = (run.job.sources.iter())
        .filter(|source| source.role == "train")
        .map(|source| source.sha256.as_str())
        .collect();
    // Of one file its own hash, of several a hash of theirs.
    let data_sha256 = match train.as_slice() {
        [only] => (*only).to_owned(),
        several => sha256_hex(&[several.concat().as_bytes()]),
    };
    AdapterCard {
        created_by: format!("tunesmith {}", env!("CARGO_PKG_VERSION")),
        created_at: now.as_secs(),
        base_model: run.job.config.model.clone(),
        base_fingerprint: run.model.decoder.fingerprint().to_owned(),
        data_sha256,
        num_examples: run.job.train.len() as u64,
        configuration: json!({
            "digest": digest,
            "data": run.job.sources,
            "settings": run.job.config,
            "recipe": run.recipe,
            "result": {
                "step": run.step,
                "total_steps": run.total_steps,
                "best_step": report::best_step(run.log.events()),
                "loss": report::last_loss(run.log.events()),
                "valid": valid,
                "seconds": run.seconds,
            },
            "examination": run.examination.card,
        }),
        curve: report::curve(run.log.events()),
    }
}
