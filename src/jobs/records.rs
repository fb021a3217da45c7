//! What the store keeps: files, uploads, jobs with their events and checkpoints, models, aliases.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// An uploaded (or made) file; its bytes are in `blobs/<sha256>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// `file-…`.
    pub id: String,
    /// Size.
    pub bytes: u64,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds after which it is gone; `None`: it stays.
    pub expires_at: Option<u64>,
    /// What the client calls it. Never a path.
    pub filename: String,
    /// `fine-tune`, `evals`, ...
    pub purpose: String,
    /// Of the content, hex.
    pub sha256: String,
    /// Whether it is gone for clients, and here only because a job still reads it.
    #[serde(default)]
    pub is_deleted: bool,
}

/// How far an upload in parts is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UploadStatus {
    /// Takes parts.
    Pending,
    /// Became a file.
    Completed,
    /// By its client.
    Cancelled,
    /// Nobody completed it in time.
    Expired,
}

/// A file that arrives in parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// `upload_…`.
    pub id: String,
    /// Size that was announced.
    pub bytes: u64,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds after which no part is taken.
    pub expires_at: u64,
    /// Name of the file to be.
    pub filename: String,
    /// Purpose of the file to be.
    pub purpose: String,
    /// As announced.
    pub mime_type: String,
    /// How far it is.
    pub status: UploadStatus,
    /// The file that it became.
    pub file_id: Option<String>,
    /// Seconds that the file to be will live; `None`: for ever.
    pub expires_after: Option<u64>,
}

/// A part of an [`Upload`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// `part_…`.
    pub id: String,
    /// The upload.
    pub upload_id: String,
    /// Unix seconds.
    pub created_at: u64,
    /// Size.
    pub bytes: u64,
    /// Of the content, hex.
    pub sha256: String,
}

/// A value that the service may choose.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Auto<T> {
    /// Not chosen yet.
    Auto,
    /// Given, or chosen.
    Value(T),
}

impl<T: Copy> Auto<T> {
    /// The value, if there is one.
    pub fn value(self) -> Option<T> {
        match self {
            Self::Auto => None,
            Self::Value(value) => Some(value),
        }
    }
}

impl<T: Serialize> Serialize for Auto<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Value(value) => value.serialize(serializer),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Auto<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either<T> {
            Value(T),
            Word(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Value(value) => Ok(Self::Value(value)),
            Either::Word(word) if word == "auto" => Ok(Self::Auto),
            Either::Word(word) => {
                let message = format!("expected a number or \"auto\", not {word:?}");
                Err(serde::de::Error::custom(message))
            }
        }
    }
}

/// How a job trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// On the assistant's messages.
    Supervised,
    /// On pairs of a preferred and a non-preferred answer.
    Dpo,
}

impl Method {
    /// As it is written on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Supervised => "supervised",
            Self::Dpo => "dpo",
        }
    }
}

/// What a client may set. `Auto` until the data has been looked at.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Hyperparameters {
    /// Passes over the training file, 1 to 50.
    pub n_epochs: Auto<u32>,
    /// Sequences per optimizer step, 1 to 256.
    pub batch_size: Auto<u32>,
    /// Factor on the method's default learning rate, above 0.
    pub learning_rate_multiplier: Auto<f64>,
    /// DPO's beta, above 0 to 2; `None` for other methods.
    pub beta: Option<Auto<f64>>,
}

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    /// The data is being checked.
    ValidatingFiles,
    /// Waits for its turn.
    Queued,
    /// Trains, or is being evaluated and published.
    Running,
    /// Stopped with a checkpoint, to be resumed.
    Paused,
    /// The model is published.
    Succeeded,
    /// See its error.
    Failed,
    /// By its client.
    Cancelled,
}

impl JobStatus {
    /// Whether nothing will change any more.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// As it is written on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ValidatingFiles => "validating_files",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// What a client wants of a job that is at work; the runner does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// End it.
    Cancel,
    /// Stop it with a checkpoint.
    Pause,
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    /// `invalid_training_file`, `training_failed`, ...
    pub code: String,
    /// In words, with line numbers where the data is to blame.
    pub message: String,
    /// `training_file` or `validation_file`, where one of them is to blame.
    pub param: Option<String>,
}

/// When an alias may move to a new model: the tuned arm must beat the base in a paired test on the
/// validation file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gate {
    /// A grader's name: `exact_match`, `f1`, ...
    pub metric: String,
    /// Least gain of the mean score over the base.
    pub min_gain: f64,
    /// Largest p-value.
    pub p_value: f64,
}

impl Default for Gate {
    fn default() -> Self {
        Self { metric: "exact_match".to_owned(), min_gain: 0.0, p_value: 0.05 }
    }
}

/// A fine-tuning job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// `ftjob-…`.
    pub id: String,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds of its (last) start.
    pub started_at: Option<u64>,
    /// Unix seconds of its end.
    pub finished_at: Option<u64>,
    /// What it starts from, as the client named it.
    pub model: String,
    /// The tuned model or checkpoint that it goes on from; `None`: the base.
    pub parent_model: Option<String>,
    /// A file's id.
    pub training_file: String,
    /// A file's id.
    pub validation_file: Option<String>,
    /// Part of the new model's name.
    pub suffix: Option<String>,
    /// Decides order, initial weights and dropout.
    pub seed: u64,
    /// How it trains.
    pub method: Method,
    /// With numbers once they are known.
    pub hyperparameters: Hyperparameters,
    /// The client's own.
    pub metadata: Option<BTreeMap<String, String>>,
    /// As given.
    pub integrations: Vec<Value>,
    /// The alias that is to point at the new model.
    pub alias: Option<String>,
    /// Under which condition.
    pub gate: Option<Gate>,
    /// Where it is.
    pub status: JobStatus,
    /// What the client wants of it, until that is done.
    pub request: Option<Request>,
    /// Why it failed.
    pub error: Option<JobError>,
    /// The model's id, once it is published.
    pub fine_tuned_model: Option<String>,
    /// Files' ids.
    pub result_files: Vec<String>,
    /// Tokens that were trained on over all epochs, once it has succeeded.
    pub trained_tokens: Option<u64>,
    /// Rows of the training file, once counted.
    pub num_examples: Option<u64>,
    /// Optimizer steps made.
    pub step: u64,
    /// Optimizer steps planned, once known.
    pub total_steps: Option<u64>,
    /// Unix seconds at which it should end.
    pub estimated_finish: Option<u64>,
    /// How often its child process has been started after a crash.
    pub attempts: u32,
    /// What the evaluation said, where there was one.
    pub evaluation: Option<Value>,
}

/// How important an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventLevel {
    /// The usual.
    Info,
    /// Something to look at.
    Warn,
    /// What ended the job.
    Error,
}

/// Something that happened in a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobEvent {
    /// `ftevent-…`.
    pub id: String,
    /// The job's id.
    pub job_id: String,
    /// Unix seconds.
    pub created_at: u64,
    /// How important.
    pub level: EventLevel,
    /// In words.
    pub message: String,
    /// OpenAI's metrics keys for a `metrics` event; else null, or what an extension tells.
    pub data: Value,
    /// Whether `data` holds metrics.
    pub is_metrics: bool,
}

/// The model at the end of an epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// `ftckpt_…`.
    pub id: String,
    /// The job's id.
    pub job_id: String,
    /// Unix seconds.
    pub created_at: u64,
    /// Optimizer step.
    pub step: u64,
    /// Id of the [`ModelRecord`].
    pub model: String,
    /// OpenAI's keys: `step`, `train_loss`, ..., `full_valid_mean_token_accuracy`.
    pub metrics: Value,
}

/// A model that a job made: an adapter folder in the data folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// `ft:base:org:suffix:id`, with `:ckpt-step-N` for a checkpoint.
    pub id: String,
    /// The job's id.
    pub job_id: String,
    /// Unix seconds.
    pub created_at: u64,
    /// The adapter's folder, relative to the data folder.
    pub path: String,
    /// The adapter's digest, hex.
    pub digest: String,
    /// Whether it is a checkpoint: callable, but not listed among the models.
    pub is_checkpoint: bool,
}

/// A name that stands for a model: what Azure calls a deployment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alias {
    /// The name; unique.
    pub name: String,
    /// The model's id.
    pub model: String,
    /// Unix seconds.
    pub created_at: u64,
    /// Azure's `sku`, echoed.
    pub sku: Value,
}

/// Makes a struct a kind of record: its kind, the field with its id, the one with its parent's.
macro_rules! record {
    ($record:ty, $kind:literal, $id:ident $(, $parent:ident)?) => {
        impl $crate::jobs::Record for $record {
            const KIND: &'static str = $kind;

            fn id(&self) -> &str {
                &self.$id
            }
            $(
                fn parent(&self) -> &str {
                    &self.$parent
                }
            )?
        }
    };
}
pub(super) use record;

record!(FileRecord, "file", id);
record!(Upload, "upload", id);
record!(Part, "part", id, upload_id);
record!(Job, "job", id);
record!(JobEvent, "event", id, job_id);
record!(Checkpoint, "checkpoint", id, job_id);
record!(ModelRecord, "model", id);
record!(Alias, "alias", name);
