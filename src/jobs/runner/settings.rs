//! From a job's record to the settings file of its training process.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use crate::jobs::{FileRecord, Job, JobsError, Method, ModelRecord, Service, base_learning_rate};
use crate::publish::{disk, publish_dir, publish_file};
use crate::train::{Objective, TrainConfig, work_dir};

/// Examples whose log-probabilities the trainer writes down for the server to compare.
const PARITY_EXAMPLES: usize = 8;
/// Settings that a model which is trained on has already.
const OF_THE_ADAPTER: &[&str] = &["rank", "alpha", "rslora", "variant", "targets"];
/// Validations in an epoch.
const VALIDATIONS_PER_EPOCH: u64 = 10;
/// Epochs' adapters that are kept.
pub(super) const KEEP_EPOCHS: usize = 3;
/// More epochs than a job can have.
const MAX_EPOCHS: usize = 1000;
/// Steps, and seconds, that a crash may cost.
const CHECKPOINT_EVERY: usize = 100;
const CHECKPOINT_SECONDS: u64 = 20;

/// Where a job's process finds and leaves things.
pub(super) struct Places {
    pub(super) dir: PathBuf,
}

impl Places {
    pub(super) fn of(service: &Service, job: &str) -> Self {
        Self { dir: service.job_dir(job) }
    }

    /// Training rows.
    pub(super) fn data(&self) -> PathBuf {
        self.dir.join("train.jsonl")
    }

    /// Validation rows.
    pub(super) fn valid(&self) -> PathBuf {
        self.dir.join("valid.jsonl")
    }

    /// The adapter that the job goes on from.
    pub(super) fn init(&self) -> PathBuf {
        self.dir.join("init")
    }

    /// The settings file.
    pub(super) fn settings(&self) -> PathBuf {
        self.dir.join("job.yaml")
    }

    /// What the process wrote to its standard error.
    pub(super) fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The adapter that the job makes.
    pub(super) fn model(&self) -> PathBuf {
        self.dir.join("model")
    }

    /// Adapters at the end of epochs.
    pub(super) fn epochs(&self) -> PathBuf {
        self.dir.join("epochs")
    }

    /// Makes the folder with the job's own links to its data and a copy of the adapter that it goes on
    /// from, so that deleting those does not break the job. What is there already stays.
    pub(super) fn prepare(&self, service: &Service, job: &Job) -> Result<(), JobsError> {
        fs::create_dir_all(&self.dir).map_err(|source| JobsError::file(&self.dir, source))?;
        link_file(service, &job.training_file, "training_file", &self.data())?;
        if let Some(file) = &job.validation_file {
            link_file(service, file, "validation_file", &self.valid())?;
        }
        if let Some(parent) = &job.parent_model {
            self.copy_parent(service, parent)?;
        }
        Ok(())
    }

    /// Writes the settings, once: a resumed run must have those that it began with.
    pub(super) fn write_settings(&self, service: &Service, job: &Job) -> Result<(), JobsError> {
        let path = self.settings();
        if path.exists() {
            return Ok(());
        }
        // JSON is YAML.
        let settings = serde_json::to_value(self.train_config(service, job));
        let mut settings = settings.expect("a plain struct is always JSON");
        if let (Some(keys), Some(_)) = (settings.as_object_mut(), &job.parent_model) {
            // The adapter that is gone on from decides.
            keys.retain(|key, _| !OF_THE_ADAPTER.contains(&key.as_str()));
        }
        let text = format!("{settings:#}\n");
        Ok(publish_file(&path, text.as_bytes())?)
    }

    fn train_config(&self, service: &Service, job: &Job) -> TrainConfig {
        let num_examples = job.num_examples.unwrap_or(1);
        let settings = job.hyperparameters.resolved(job.method, num_examples as usize);
        let batch_size = settings.batch_size.value().unwrap_or(1) as usize;
        let multiplier = settings.learning_rate_multiplier.value().unwrap_or(1.0);
        let default = TrainConfig::default();
        let has_valid = job.validation_file.is_some();
        let steps_per_epoch = num_examples.div_ceil(batch_size as u64);
        let eval_every = steps_per_epoch.div_ceil(VALIDATIONS_PER_EPOCH).max(1) as usize;
        TrainConfig {
            model: service.config.base_dir.display().to_string(),
            data: self.data().into(),
            valid: has_valid.then(|| self.valid().into()),
            output: self.model(),
            quantize: service.config.quantize,
            init_adapter: job.parent_model.is_some().then(|| self.init()),
            objective: match job.method {
                Method::Supervised => Objective::Sft,
                Method::Dpo => Objective::Dpo,
            },
            dpo_beta: settings.beta.and_then(|beta| beta.value()).unwrap_or(default.dpo_beta),
            lr: Some(base_learning_rate(job.method) * multiplier),
            epochs: settings.n_epochs.value().map_or(default.epochs, f64::from),
            batch_size,
            seed: job.seed,
            eval_every: if has_valid { eval_every } else { 0 },
            valid_batch: Some(batch_size),
            epoch_dir: Some(self.epochs()),
            // The service removes them: it knows which are deployed.
            keep_epochs: MAX_EPOCHS,
            parity_examples: PARITY_EXAMPLES,
            samples: 0,
            checkpoint_every: CHECKPOINT_EVERY,
            checkpoint_seconds: CHECKPOINT_SECONDS,
            ..default
        }
    }

    /// Removes what only a run needs; models, settings and log stay.
    pub(super) fn remove_work(&self) {
        for path in [work_dir(&self.model()), self.init()] {
            remove(&path, fs::remove_dir_all(&path));
        }
        for path in [self.data(), self.valid()] {
            remove(&path, fs::remove_file(&path));
        }
        // What a killed process had half written.
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains(".tmp-") {
                let path = entry.path();
                let is_dir = path.is_dir();
                let removed =
                    if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                remove(&path, removed);
            }
        }
    }

    /// Removes the model of a job that did not succeed.
    pub(super) fn remove_model(&self) {
        let path = self.model();
        remove(&path, fs::remove_dir_all(&path));
    }

    fn copy_parent(&self, service: &Service, parent: &str) -> Result<(), JobsError> {
        let to = self.init();
        if to.exists() {
            return Ok(());
        }
        let not_found = || JobsError::NotFound {
            what: "fine-tuned model",
            id: parent.to_owned(),
            param: "model",
        };
        // One that a job made, or one that the operator loaded.
        let from = match service.store.get::<ModelRecord>(parent)? {
            Some(record) => service.path(record.path),
            None => service.parts.registry.get(parent).ok_or_else(not_found)?.path.clone(),
        };
        publish_dir(&to, |dir| {
            for entry in fs::read_dir(&from)? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    disk::copy(&entry.path(), &dir.join(entry.file_name()))?;
                }
            }
            Ok(())
        })
        .map_err(|source: std::io::Error| {
            let is_gone = source.kind() == ErrorKind::NotFound;
            if is_gone { not_found() } else { JobsError::file(from, source) }
        })
    }
}

/// Gives the content of the file `id` the name `to`.
fn link_file(service: &Service, id: &str, param: &'static str, to: &Path) -> Result<(), JobsError> {
    if to.exists() {
        return Ok(());
    }
    let not_found = || JobsError::NotFound { what: "File", id: id.to_owned(), param };
    let file: FileRecord = service.store.get(id)?.ok_or_else(not_found)?;
    let from = service.blob_path(&file);
    match fs::hard_link(&from, to) {
        Err(error) if error.kind() == ErrorKind::NotFound => Err(not_found()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        // A file system without hard links.
        Err(_) => {
            let bytes = fs::read(&from).map_err(|source| JobsError::file(from, source))?;
            Ok(publish_file(to, &bytes)?)
        }
        Ok(()) => Ok(()),
    }
}

fn remove(path: &Path, removed: std::io::Result<()>) {
    if let Err(error) = removed
        && error.kind() != ErrorKind::NotFound
    {
        tracing::warn!("{} cannot be removed: {error}", path.display());
    }
}
