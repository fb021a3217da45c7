//! What the values of a [`TrainConfig`] may be, where several belong together.

use super::{LossTokens, Method, Objective, TrainConfig, require};
use crate::train::{Packing, TrainError};

impl TrainConfig {
    /// What is published, and of how many runs.
    pub(super) fn check_choice(&self) -> Result<(), TrainError> {
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
    pub(super) fn check_objective(&self) -> Result<(), TrainError> {
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
