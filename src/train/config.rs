//! What a training run is asked to do, checked once at the door.

mod check;
mod choices;
mod derived;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Packing;
use crate::data::{Columns, Sources};
use crate::model::Quantization;

pub use choices::{
    LossTokens, Method, NewTokens, Objective, PairLoss, RecomputeChoice, ScheduleKind, Targets,
    WeightDtype,
};

/// Everything a run can be told. The keys of a YAML file and the flags have these names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// The base: a model folder (or a name that the command line resolves to one).
    pub model: String,
    /// Training rows.
    pub data: Sources,
    /// Held-out rows for the validation loss.
    pub valid: Option<Sources>,
    /// What their columns are called, where a source does not say it: our name -> theirs.
    pub columns: Columns,
    /// The column that holds the whole row, a text or a list of messages.
    pub text_column: Option<String>,
    /// The folder to publish.
    pub output: PathBuf,
    /// What is trained.
    pub method: Method,
    /// What the loss is.
    pub objective: Objective,
    /// How strongly `dpo` holds on to the adapter that it started from, above 0 and at most 2.
    pub dpo_beta: f64,
    /// How `dpo` takes the margin of a pair.
    pub dpo_loss: PairLoss,
    /// Share of pairs that `dpo` takes to be labelled the wrong way round, 0 to below 0.5.
    pub dpo_label_smoothing: f64,
    /// Weight of the likelihood of the preferred answers that `dpo` adds to its loss.
    pub dpo_sft_weight: f64,
    /// Weight of the odds ratio in the loss of `orpo`, above 0 and at most 2.
    pub orpo_beta: f64,
    /// Share of the supervised loss that asks for all tokens alike, 0 to below 1.
    pub label_smoothing: f64,
    /// NEFTune's alpha: noise on the embeddings while training; 0 = none.
    pub neftune_alpha: f64,
    /// LoRA rank r.
    pub rank: usize,
    /// LoRA alpha; the update is scaled by alpha / r (alpha / sqrt(r) with `rslora`).
    pub alpha: f64,
    /// Dropout on the adapter's input, 0 to below 1.
    pub dropout: f64,
    /// Projections that get an adapter.
    pub targets: Targets,
    /// Scale by alpha / sqrt(r).
    pub rslora: bool,
    /// How A and B change a projection: `lora`, or `dora` with a trained length for each row.
    pub variant: String,
    /// Ranks of some modules: a regular expression for the end of a module's path -> rank.
    pub rank_pattern: Map<String, Value>,
    /// Alphas of some modules, likewise.
    pub alpha_pattern: Map<String, Value>,
    /// Layers that get an adapter, from 0; none named: all.
    pub layers: Vec<usize>,
    /// Modules that get none, by the end of their path.
    pub exclude: Vec<String>,
    /// Tables that are trained whole: `embed_tokens`, `lm_head`.
    pub modules_to_save: Vec<String>,
    /// Keep embedding and head one matrix there, where the base has one for both.
    pub ensure_weight_tying: bool,
    /// Tokens, by their id, whose rows of the tables are trained.
    pub train_tokens: Vec<u32>,
    /// Tokens that the tokenizer gets, or a file with one on each line; their rows are trained.
    pub new_tokens: NewTokens,
    /// Tokens whose rows start as the mean of others' rows: what `new_tokens` were written with before.
    pub token_starts: BTreeMap<u32, Vec<u32>>,
    /// An adapter folder to start from instead of a fresh one.
    pub init_adapter: Option<PathBuf>,
    /// Peak learning rate; the default depends on the method, see [`TrainConfig::learning_rate`].
    pub lr: Option<f64>,
    /// How the learning rate changes.
    pub schedule: ScheduleKind,
    /// Optimizer steps of linear warm-up.
    pub warmup_steps: usize,
    /// Warm-up as a share of all steps, rounded up; used when `warmup_steps` is 0.
    pub warmup_ratio: f64,
    /// Passes over the training rows.
    pub epochs: f64,
    /// Optimizer steps; overrides `epochs`.
    pub max_steps: Option<usize>,
    /// Sequences per optimizer step.
    pub batch_size: usize,
    /// Most tokens in one forward and backward pass (a longer single sequence passes alone).
    pub micro_batch_tokens: usize,
    /// What the backward pass computes again instead of keeping it.
    pub recompute: RecomputeChoice,
    /// Which examples share a row of the batch.
    pub packing: Packing,
    /// Whether rows of similar lengths come in one step.
    pub group_by_length: bool,
    /// Largest global L2 norm of the gradient; 0 = no clipping.
    pub grad_clip: f64,
    /// Decoupled weight decay; never on norms and biases.
    pub weight_decay: f64,
    /// Decay of the gradient's mean in AdamW.
    pub beta1: f64,
    /// Decay of the squared gradient's mean in AdamW.
    pub beta2: f64,
    /// Decides weights, row order and dropout.
    pub seed: u64,
    /// Whether the rows are shuffled, anew each epoch.
    pub shuffle: bool,
    /// Longest sequence in tokens; the rest is cut off.
    pub max_length: usize,
    /// Which tokens the loss counts.
    pub loss_on: LossTokens,
    /// Validate every so many steps (and at the end); 0 = only at the end.
    pub eval_every: usize,
    /// Rows of a validation between epochs, in rotation; none = all.
    pub valid_batch: Option<usize>,
    /// Generate answers to so many validation rows at each validation.
    pub eval_generate: usize,
    /// Answers before and after training that the report shows.
    pub samples: usize,
    /// Publish the adapter at the end of each epoch as `step-N` in this folder.
    pub epoch_dir: Option<PathBuf>,
    /// Adapters that are kept there: the newest.
    pub keep_epochs: usize,
    /// End the run when the validation loss has not become better for so many validations.
    pub early_stopping_patience: Option<usize>,
    /// By how much a validation loss must be below the best to count as better there.
    pub early_stopping_threshold: f64,
    /// Publish what was trained when the validation loss was lowest, instead of the last.
    pub keep_best: bool,
    /// Publish the last as well, as `<output>.last`.
    pub keep_last: bool,
    /// Values of settings of which every combination is trained over the one base: key -> values.
    pub sweep: BTreeMap<String, Vec<Value>>,
    /// Leave the worse half of a sweep behind at halves, quarters, ... of the way.
    pub sweep_halving: bool,
    /// Warn when the loss was above three times its median for so many steps; 0 = never.
    pub spike_steps: usize,
    /// End the run there instead.
    pub stop_on_spike: bool,
    /// Write the log-probabilities of so many examples beside the output, so that a server can be
    /// compared with the trainer.
    pub parity_examples: usize,
    /// Checkpoint every so many steps.
    pub checkpoint_every: usize,
    /// Checkpoint at the latest after so many seconds.
    pub checkpoint_seconds: u64,
    /// Stop at the first step border after so many minutes and publish what there is.
    pub time_limit: Option<f64>,
    /// Number format of the published weights (method full).
    pub dtype: WeightDtype,
    /// How the base under an adapter is held.
    pub quantize: Quantization,
    /// Threads of the tensor operations; none = all cores.
    pub threads: Option<usize>,
    /// Continue from the newest good checkpoint, if there is one.
    pub resume: bool,
    /// Replace an output or an unfinished run that is already there.
    pub overwrite: bool,
    /// Keep `<output>.work` after the output is published.
    pub keep_work: bool,
    /// Keys that somebody has set, if only to the default: `init_adapter` must be as they say.
    #[serde(skip)]
    pub given: BTreeSet<String>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            model: String::new(),
            data: Sources::default(),
            valid: None,
            columns: Columns::new(),
            text_column: None,
            output: PathBuf::new(),
            method: Method::Lora,
            objective: Objective::Sft,
            dpo_beta: 0.1,
            dpo_loss: PairLoss::Sigmoid,
            dpo_label_smoothing: 0.0,
            dpo_sft_weight: 0.0,
            orpo_beta: 0.1,
            label_smoothing: 0.0,
            neftune_alpha: 0.0,
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            targets: Targets(vec!["all-linear".to_owned()]),
            rslora: false,
            variant: "lora".to_owned(),
            rank_pattern: Map::new(),
            alpha_pattern: Map::new(),
            layers: Vec::new(),
            exclude: Vec::new(),
            modules_to_save: Vec::new(),
            ensure_weight_tying: false,
            train_tokens: Vec::new(),
            new_tokens: NewTokens::default(),
            token_starts: BTreeMap::new(),
            init_adapter: None,
            lr: None,
            schedule: ScheduleKind::Linear,
            warmup_steps: 0,
            warmup_ratio: 0.03,
            epochs: 3.0,
            max_steps: None,
            batch_size: 8,
            micro_batch_tokens: 2048,
            recompute: RecomputeChoice::Auto,
            packing: Packing::None,
            group_by_length: false,
            grad_clip: 1.0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            seed: 42,
            shuffle: true,
            max_length: 1024,
            loss_on: LossTokens::Assistant,
            eval_every: 0,
            valid_batch: None,
            eval_generate: 0,
            samples: 4,
            epoch_dir: None,
            keep_epochs: 3,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            keep_best: false,
            keep_last: false,
            sweep: BTreeMap::new(),
            sweep_halving: false,
            spike_steps: 5,
            stop_on_spike: false,
            parity_examples: 0,
            checkpoint_every: 100,
            checkpoint_seconds: 120,
            time_limit: None,
            dtype: WeightDtype::Bf16,
            quantize: Quantization::None,
            threads: None,
            resume: false,
            overwrite: false,
            keep_work: false,
            given: BTreeSet::new(),
        }
    }
}
