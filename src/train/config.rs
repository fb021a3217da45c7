//! What a training run is asked to do, checked once at the door.

mod check;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

use candle_core::DType;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::{Packing, TrainError};
use crate::adapters::LoraConfig;
use crate::data::{Columns, LossOn, Sources};
use crate::model::{Projection, Quantization, Recompute};

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

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// A LoRA adapter over the frozen base.
    Lora,
    /// Every weight; from random ones where the model folder has none.
    Full,
}

/// What the loss is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Supervised: the negative log-likelihood of the trained tokens.
    Sft,
    /// Direct preference optimization: that preferred answers gain on the others, compared with the
    /// adapter at the start.
    Dpo,
    /// Odds-ratio preference optimization: the likelihood of the preferred answers, and that their odds
    /// are better than the others'.
    Orpo,
}

impl Objective {
    /// Whether its rows are pairs of answers.
    #[must_use]
    pub fn wants_pairs(self) -> bool {
        self != Self::Sft
    }
}

/// The loss of a pair's margin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairLoss {
    /// `-log sigmoid`; with smoothed labels conservative DPO.
    Sigmoid,
    /// With smoothed labels robust DPO, which is unbiased where so many labels are wrong.
    Robust,
}

/// What of a layer is computed again in the backward pass. The numbers are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecomputeChoice {
    /// Whatever the memory asks for; nothing where nobody has looked.
    Auto,
    /// Nothing: fastest.
    None,
    /// Everything: a layer's activations live only while it is passed.
    Block,
}

impl From<RecomputeChoice> for Recompute {
    fn from(choice: RecomputeChoice) -> Self {
        match choice {
            RecomputeChoice::Auto | RecomputeChoice::None => Self::None,
            RecomputeChoice::Block => Self::Block,
        }
    }
}

/// How the learning rate changes after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Down to 0 in a line.
    Linear,
    /// Down to 0 along half a cosine.
    Cosine,
    /// Not at all.
    Constant,
}

/// `loss_on` of a configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossTokens {
    /// The tokens of the assistant's messages (or of the completion).
    Assistant,
    /// Every token but the first.
    All,
    /// The completion where a row names one, else every token.
    Auto,
}

/// Number format of a written model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

/// New tokens, or one file that has them: a list or a text with commas.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(transparent)]
pub struct NewTokens(pub Vec<String>);

/// Projections named by the user: `all-linear`, one name or a list.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Targets(pub Vec<String>);

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

/// Keys that change neither the numbers nor the published weights; a resumed run may change them.
const FREE_KEYS: &[&str] = &[
    "model",
    "data",
    "valid",
    "columns",
    "text_column",
    "output",
    "init_adapter",
    "eval_every",
    "valid_batch",
    "eval_generate",
    "samples",
    "epoch_dir",
    "keep_epochs",
    "early_stopping_patience",
    "early_stopping_threshold",
    "keep_last",
    "sweep",
    "sweep_halving",
    "spike_steps",
    "stop_on_spike",
    "parity_examples",
    "checkpoint_every",
    "checkpoint_seconds",
    "time_limit",
    "recompute",
    "threads",
    "resume",
    "overwrite",
    "keep_work",
];

impl TrainConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// [`TrainError::Config`] with the first key that cannot be used, its value and what it may be.
    pub fn validate(&self) -> Result<(), TrainError> {
        let unit = 0.0..1.0;
        require(!self.model.is_empty(), "model", &"", "a model folder")?;
        require(!self.data.is_empty(), "data", &"", "a file of rows")?;
        for source in &self.data.0 {
            let weight = source.weight;
            require(weight.is_finite() && weight > 0.0, "weight", &weight, "above 0")?;
        }
        require(!self.output.as_os_str().is_empty(), "output", &"", "a folder to write")?;
        require(self.rank > 0, "rank", &self.rank, "at least 1")?;
        require(self.alpha.is_finite() && self.alpha > 0.0, "alpha", &self.alpha, "above 0")?;
        require(unit.contains(&self.dropout), "dropout", &self.dropout, "0 to below 1")?;
        let lr = self.lr.unwrap_or(1.0);
        require(lr.is_finite() && lr >= 0.0, "lr", &lr, "0 or more")?;
        let ratio = self.warmup_ratio;
        require((0.0..=1.0).contains(&ratio), "warmup_ratio", &ratio, "0 to 1")?;
        let epochs = self.epochs;
        require(epochs.is_finite() && epochs > 0.0, "epochs", &epochs, "above 0")?;
        require(self.max_steps != Some(0), "max_steps", &0, "at least 1")?;
        require(self.batch_size > 0, "batch_size", &self.batch_size, "at least 1")?;
        let tokens = self.micro_batch_tokens;
        require(tokens > 0, "micro_batch_tokens", &tokens, "at least 1")?;
        require(self.grad_clip >= 0.0, "grad_clip", &self.grad_clip, "0 or more")?;
        let decay = self.weight_decay;
        require(decay.is_finite() && decay >= 0.0, "weight_decay", &decay, "0 or more")?;
        require(unit.contains(&self.beta1), "beta1", &self.beta1, "0 to below 1")?;
        require(unit.contains(&self.beta2), "beta2", &self.beta2, "0 to below 1")?;
        require(self.max_length >= 2, "max_length", &self.max_length, "at least 2")?;
        require(self.checkpoint_every > 0, "checkpoint_every", &0, "at least 1")?;
        let minutes = self.time_limit.unwrap_or(1.0);
        require(minutes.is_finite() && minutes > 0.0, "time_limit", &minutes, "above 0")?;
        require(self.threads != Some(0), "threads", &0, "at least 1")?;
        require(self.valid_batch != Some(0), "valid_batch", &0, "at least 1")?;
        require(self.keep_epochs > 0, "keep_epochs", &0, "at least 1")?;
        self.check_objective()?;
        self.check_choice()?;
        self.targets.projections()?;
        let adapter_only = self.method == Method::Lora || self.init_adapter.is_none();
        require(adapter_only, "init_adapter", &"set", "unset with method full")?;
        let own_rows = !self.modules_to_save.is_empty() || !self.train_tokens.is_empty();
        let value = "modules_to_save or train_tokens";
        let trained = self.method == Method::Lora || !own_rows;
        require(trained, "method", &value, "lora where single tables are trained")?;
        let exact_only = self.method == Method::Lora || self.quantize == Quantization::None;
        require(exact_only, "quantize", &self.quantize, "none with method full")
    }

    /// The tokens that count in an example: of a pair always those of the answers. That `orpo` with
    /// `loss_on: all` counts the preferred answers' prompts as well is the objective's to know.
    #[must_use]
    pub fn encoded_tokens(&self) -> LossOn {
        if self.objective.wants_pairs() { LossOn::Assistant } else { self.loss_on.into() }
    }

    /// The peak learning rate: as given, else 2e-4 for LoRA (5e-5 with preferences), 2e-5 for all
    /// weights of a trained model and 1e-3 from random ones.
    #[must_use]
    pub fn learning_rate(&self, from_random: bool) -> f64 {
        let default = match self.method {
            Method::Lora if self.objective.wants_pairs() => 5e-5,
            Method::Lora => 2e-4,
            Method::Full if from_random => 1e-3,
            Method::Full => 2e-5,
        };
        self.lr.unwrap_or(default)
    }

    /// The fresh adapter that is asked for.
    ///
    /// # Errors
    /// [`TrainError::Config`] for a target that is no projection.
    pub fn lora(&self) -> Result<LoraConfig, TrainError> {
        Ok(LoraConfig {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            targets: self.targets.projections()?,
            use_rslora: self.rslora,
            variant: self.variant.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            layers: self.layers.clone(),
            exclude: self.exclude.clone(),
            modules_to_save: self.modules_to_save.clone(),
            ensure_weight_tying: self.ensure_weight_tying,
            token_ids: self.train_tokens.clone(),
            token_starts: self.token_starts.clone(),
        })
    }

    /// The keys and values that decide the numbers of the run. A run resumes only where they are
    /// the same.
    #[must_use]
    pub fn recipe(&self) -> Map<String, Value> {
        let all = serde_json::to_value(self).expect("a plain struct is always JSON");
        let Value::Object(mut all) = all else { unreachable!("a struct is a JSON object") };
        all.retain(|key, _| !FREE_KEYS.contains(&key.as_str()));
        all
    }
}

fn require(
    holds: bool,
    key: &'static str,
    value: &dyn fmt::Debug,
    allowed: &'static str,
) -> Result<(), TrainError> {
    let error = || TrainError::Config { key, value: format!("{value:?}"), allowed };
    holds.then_some(()).ok_or_else(error)
}

impl Targets {
    /// The projections meant, in the order of the forward pass.
    ///
    /// # Errors
    /// [`TrainError::Config`] for a name that is no projection, or an empty list.
    pub fn projections(&self) -> Result<Vec<Projection>, TrainError> {
        const ALLOWED: &str = "all-linear, or a list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj";
        if self.0.iter().any(|name| name == "all-linear") {
            return Ok(Projection::ALL.to_vec());
        }
        for name in &self.0 {
            require(Projection::from_name(name).is_some(), "targets", name, ALLOWED)?;
        }
        require(!self.0.is_empty(), "targets", &self.0, ALLOWED)?;
        let named = |p: &Projection| self.0.iter().any(|name| name == p.name());
        Ok(Projection::ALL.into_iter().filter(named).collect())
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        names(deserializer).map(Self)
    }
}

impl<'de> Deserialize<'de> for NewTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        names(deserializer).map(Self)
    }
}

/// A list of names, or one string with the names separated by commas.
fn names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::Many(names) => names,
        OneOrMany::One(names) => names.split(',').map(|name| name.trim().to_owned()).collect(),
    })
}

impl From<LossTokens> for LossOn {
    fn from(tokens: LossTokens) -> Self {
        match tokens {
            LossTokens::Assistant => Self::Assistant,
            LossTokens::All => Self::All,
            LossTokens::Auto => Self::Auto,
        }
    }
}

impl From<WeightDtype> for DType {
    fn from(dtype: WeightDtype) -> Self {
        match dtype {
            WeightDtype::F32 => Self::F32,
            WeightDtype::Bf16 => Self::BF16,
        }
    }
}
