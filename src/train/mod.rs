//! FLOOR 5. Training: examples in, an adapter (or a model) folder out. What it does: the loop of
//! forward, backward, clip and update, checkpoints that a killed run continues from with the same
//! bits, events, and the published folder with its card. What it knows: examples, the decoder,
//! adapters. What it must never know: text, requests, the command line; it is told when to stop and
//! tells what happens through an observer.

mod backward;
mod base;
mod batches;
mod checkpoint;
mod config;
mod epochs;
mod events;
mod examiner;
mod objective;
mod optimizer;
mod output;
mod packing;
mod parity;
mod preference;
mod recipe;
mod report;
mod schedule;
mod surroundings;
mod sweep;
mod trainable;
mod trainer;
mod validation;
mod workers;
mod workspace;

use std::{io, path::PathBuf};

use base::Base;

pub use crate::model::Quantization;
pub use backward::{Gradients, clip_factor};
pub use batches::{BatchPlan, MicroBatch, split_by_tokens};
pub use checkpoint::{Checkpoint, newest_checkpoint, prune_checkpoints, write_checkpoint};
pub use config::{
    LossTokens, Method, NewTokens, Objective, PairLoss, RecomputeChoice, ScheduleKind, Targets,
    TrainConfig, WeightDtype,
};
pub use events::{EventLog, Rewards, TrainEvent};
pub use examiner::{Candidate, Examination, Examiner, Generated, Scored};
pub use optimizer::{AdamW, AdamWConfig, Moments};
pub use packing::{Packing, pack};
pub use recipe::Recipe;
pub use report::loss_curve_svg;
pub use schedule::{Schedule, warmup_steps};
pub use surroundings::Surroundings;
pub use sweep::{SweepRow, SweepSummary, candidate_settings, run_sweep, sweep_dir};
pub use trainer::{num_workers, rehearse, run, run_with};
pub use workspace::work_dir;

use crate::adapters::AdapterError;
use crate::data::Example;
use crate::model::ModelError;
use crate::publish::DiskError;

/// A run, ready to start: everything that had to be read, resolved or tokenised is.
#[derive(Debug, Clone)]
pub struct TrainJob {
    /// What is asked for.
    pub config: TrainConfig,
    /// The base's folder in Hub layout.
    pub model_dir: PathBuf,
    /// Training examples.
    pub train: Vec<Example>,
    /// Validation examples; empty = no validation.
    pub valid: Vec<Example>,
    /// Files of the published folder that are not the base's: name and content.
    pub companions: Vec<(String, String)>,
    /// Where the examples came from, for the card.
    pub sources: Vec<DataSource>,
}

/// A data file, as the card names it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct DataSource {
    /// "train" or "valid".
    pub role: &'static str,
    /// File name.
    pub file: String,
    /// SHA-256 of its content, hex.
    pub sha256: String,
    /// Rows in it.
    pub num_rows: usize,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are made and the output is published.
    Finished,
    /// The time limit was reached; what there was is published.
    TimeLimit,
    /// The validation loss has not become better for too long; what there is was published.
    EarlyStopped,
    /// Others of its sweep were better; what there is was published.
    Eliminated,
    /// Asked to stop; a checkpoint waits for `resume`.
    Stopped,
}

/// What a run leaves behind.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainSummary {
    /// How it ended.
    pub outcome: Outcome,
    /// Optimizer steps made, over all resumptions.
    pub step: usize,
    /// Optimizer steps planned.
    pub total_steps: usize,
    /// With `keep_best`, the step after which what is published was trained.
    pub best_step: Option<usize>,
    /// Loss of the last step; `None` before the first step.
    pub loss: Option<f64>,
    /// Loss and token accuracy on the validation rows at the end.
    pub valid: Option<(f64, f64)>,
    /// The published folder, or the checkpoint's when stopped.
    pub path: PathBuf,
    /// Digest of the published adapter, or of the model's weights file (method full); empty when
    /// stopped.
    pub digest: String,
    /// Wall time of this process's share, in seconds.
    pub seconds: f64,
}

/// Why a run cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A value that cannot be used.
    #[error("{key} is {value}, but must be {allowed}")]
    Config {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// No examples, or none with a trained token.
    #[error("there is nothing to train on: {0}")]
    NoExamples(&'static str),
    /// A token id that the model has no row for.
    #[error("line {line} has token {token}, but the model's vocabulary ends at {vocab_size}")]
    Vocabulary {
        /// Line in the data file.
        line: usize,
        /// The token.
        token: u32,
        /// Number of ids the model knows.
        vocab_size: usize,
    },
    /// The output folder exists.
    #[error("{} exists already; choose another output or pass overwrite", .0.display())]
    OutputExists(PathBuf),
    /// An unfinished run is there.
    #[error("{} holds an unfinished run; pass resume to continue it or overwrite to drop it", .0.display())]
    Unfinished(PathBuf),
    /// Another process has the work folder.
    #[error("another process is training into {}", .0.display())]
    Busy(PathBuf),
    /// Something that no run has made, where the output is to be.
    #[error(
        "{} is no output of a run, so it is not overwritten; choose another output, or remove it",
        .0.display()
    )]
    NotAnOutput(PathBuf),
    /// A checkpoint of a different run.
    #[error("the checkpoint in {} was made with other settings: {difference}", path.display())]
    OtherRun {
        /// The checkpoint.
        path: PathBuf,
        /// Which key differs, and both values.
        difference: String,
    },
    /// A loss or a gradient that is not a number.
    #[error("the {what} is {value} at step {step}; a lower lr or a smaller grad_clip may help")]
    NotFinite {
        /// "loss" or "gradient norm".
        what: &'static str,
        /// Its value.
        value: f64,
        /// The step, counted from 1.
        step: usize,
    },
    /// The examination found that it must not be published.
    #[error("the adapter after step {step} does not pass: {reason}")]
    Examination {
        /// Steps made.
        step: usize,
        /// Why.
        reason: String,
    },
    /// A loss that went up and stayed there.
    #[error(
        "the loss is {loss:.3} at step {step} and has been above 3 times its median ({median:.3}) for \
         {steps} steps; go on from an earlier checkpoint with a lower lr, or without stop_on_spike"
    )]
    LossSpike {
        /// The step, counted from 1.
        step: usize,
        /// For how many steps.
        steps: usize,
        /// Its value.
        loss: f64,
        /// Of the steps before.
        median: f64,
    },
    /// Steps that change nothing, because what is trained no longer has a part in the loss.
    #[error(
        "the gradient has been exactly 0 for {steps} steps, up to step {step}, at a loss of {loss:.3}: \
         nothing is learned any more; a lower lr or a longer warm-up may help"
    )]
    NoSlope {
        /// The step, counted from 1.
        step: usize,
        /// For how many steps.
        steps: usize,
        /// Its loss.
        loss: f64,
    },
    /// None of a sweep's candidates came to an end.
    #[error("the sweep has no result: {reason}")]
    Sweep {
        /// What became of one of them.
        reason: String,
    },
    /// A graph that is cut somewhere.
    #[error("no gradient reaches {parameter}")]
    NoGradient {
        /// The parameter.
        parameter: String,
    },
    /// A checkpoint that cannot be used.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file or folder that cannot be written, renamed, synced or removed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Reading or writing where no single file is to blame.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A tensor operation.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
