//! What the values of a [`TrainConfig`] may be, alone and together.

use std::fmt;

use super::{LossTokens, Method, Objective, TrainConfig};
use crate::model::Quantization;
use crate::train::{Packing, TrainError};

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

    /// What is published, and of how many runs.
    fn check_choice(&self) -> Result<(), TrainError> {
        let patience = self.early_stopping_patience;
        require(patience != Some(0), "early_stopping_patience", &0, "at least 1")?;
        let threshold = self.early_stopping_threshold;
        let allowed = "0 or more";
        let holds = threshold.is_finite() && threshold >= 0.0;
        require(holds, "early_stopping_threshold", &threshold, allowed)?;
        require(self.keep_best || !self.keep_last, "keep_last", &true, "unset without keep_best")?;
        let goes_on = self.init_adapter.is_some();
        for (key, is_set) in [
            ("rank_pattern", !self.rank_pattern.is_empty()),
            ("alpha_pattern", !self.alpha_pattern.is_empty()),
            ("layers", !self.layers.is_empty()),
            ("exclude", !self.exclude.is_empty()),
        ] {
            let allowed = "unset with init_adapter, whose modules are as they are";
            require(!(goes_on && is_set), key, &"set", allowed)?;
        }
        let sweeps = !self.sweep.is_empty();
        require(sweeps || !self.sweep_halving, "sweep_halving", &true, "unset without sweep")?;
        let adapter = self.method == Method::Lora;
        require(adapter || !sweeps, "sweep", &"set", "unset with method full")?;
        let plain = self.epoch_dir.is_none() && self.time_limit.is_none();
        require(plain || !sweeps, "sweep", &"set", "unset with epoch_dir or time_limit")
    }

    /// The loss and what it goes with.
    fn check_objective(&self) -> Result<(), TrainError> {
        let beta = self.dpo_beta;
        require(beta > 0.0 && beta <= 2.0, "dpo_beta", &beta, "above 0 and at most 2")?;
        let beta = self.orpo_beta;
        require(beta > 0.0 && beta <= 2.0, "orpo_beta", &beta, "above 0 and at most 2")?;
        let smoothing = self.dpo_label_smoothing;
        require(
            (0.0..0.5).contains(&smoothing),
            "dpo_label_smoothing",
            &smoothing,
            "0 to below 0.5",
        )?;
        let weight = self.dpo_sft_weight;
        require(weight.is_finite() && weight >= 0.0, "dpo_sft_weight", &weight, "0 or more")?;
        let smoothing = self.label_smoothing;
        require((0.0..1.0).contains(&smoothing), "label_smoothing", &smoothing, "0 to below 1")?;
        let alpha = self.neftune_alpha;
        require(alpha.is_finite() && alpha >= 0.0, "neftune_alpha", &alpha, "0 or more")?;
        let supervised = self.objective == Objective::Sft;
        require(
            supervised || self.label_smoothing == 0.0,
            "label_smoothing",
            &self.label_smoothing,
            "0 with preferences; dpo has dpo_label_smoothing",
        )?;
        // The mean logit is that of the base's head.
        let own_head = !self.modules_to_save.is_empty() || !self.train_tokens.is_empty();
        require(
            !own_head || self.label_smoothing == 0.0,
            "label_smoothing",
            &self.label_smoothing,
            "0 with modules_to_save or train_tokens",
        )?;
        let adapter = self.method == Method::Lora;
        let packed = self.packing == Packing::Bfd;
        require(supervised || !packed, "packing", &"bfd", "none with preferences")?;
        let dpo = self.objective == Objective::Dpo;
        require(!dpo || adapter, "objective", &"dpo", "sft or orpo with method full")?;
        let loss_on = match self.loss_on {
            LossTokens::Assistant => "assistant",
            LossTokens::All => "all",
            LossTokens::Auto => "auto",
        };
        require(
            !dpo || loss_on == "assistant",
            "loss_on",
            &loss_on,
            "assistant with objective dpo",
        )?;
        let allowed = "assistant or all with objective orpo";
        require(supervised || loss_on != "auto", "loss_on", &loss_on, allowed)?;
        let epochs = adapter || self.epoch_dir.is_none();
        require(epochs, "epoch_dir", &"set", "unset with method full")
    }
}

pub(super) fn require(
    holds: bool,
    key: &'static str,
    value: &dyn fmt::Debug,
    allowed: &'static str,
) -> Result<(), TrainError> {
    let error = || TrainError::Config { key, value: format!("{value:?}"), allowed };
    holds.then_some(()).ok_or_else(error)
}
