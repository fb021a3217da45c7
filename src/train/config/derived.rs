//! What follows from the settings of a run, and which of them decide its numbers.

use serde_json::{Map, Value};

use super::{Method, TrainConfig};
use crate::adapters::LoraConfig;
use crate::data::LossOn;
use crate::train::TrainError;

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
