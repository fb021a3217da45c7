//! The model and what of it is trained: an adapter's A and B, or every weight.

use std::{fs, path::Path, sync::Arc};

use candle_core::{DType, Tensor, Var};

use super::{Method, MicroBatch, TrainConfig, TrainError};
use crate::adapters::LoraAdapter;
use crate::model::{
    Decoder, DeltaRows, Dropout, LayeredPass, ModelConfig, ModelError, Recompute, Step,
    StepSequence, WeightMode,
};

/// A decoder with parameters to train.
pub(super) struct Trainable {
    pub(super) decoder: Arc<Decoder>,
    /// The adapter that is trained; `None` when all weights are.
    pub(super) adapter: Option<Arc<LoraAdapter>>,
    /// Whether the weights are random ones of `seed` instead of a checkpoint's.
    pub(super) from_random: bool,
}

/// Losses of one micro-batch.
pub(super) struct MicroBatchLoss {
    /// Negative log-likelihood of each trained token, differentiable. `[rows]`, f32.
    pub(super) nll: Tensor,
    /// Trained tokens that were the arg max.
    pub(super) num_correct: f64,
}

impl MicroBatchLoss {
    /// Over all trained tokens, differentiable. Scalar, f32.
    pub(super) fn sum(&self) -> Result<Tensor, TrainError> {
        Ok(self.nll.sum_all()?)
    }

    /// The losses as numbers.
    pub(super) fn values(&self) -> Result<Vec<f32>, TrainError> {
        Ok(self.nll.to_vec1()?)
    }
}

impl Trainable {
    /// Loads the base and makes (or reads) what is trained over it.
    pub(super) fn load(dir: &Path, config: &TrainConfig) -> Result<Self, TrainError> {
        if config.method == Method::Full {
            let from_random = !has_weights(dir)?;
            let decoder = if from_random {
                Decoder::random(ModelConfig::from_dir(dir)?, config.seed)?
            } else {
                Decoder::load(dir, WeightMode::Trainable)?
            };
            return Ok(Self { decoder: Arc::new(decoder), adapter: None, from_random });
        }
        let decoder = Decoder::load(dir, config.quantize.into())?;
        let adapter = match &config.init_adapter {
            Some(adapter) => LoraAdapter::read(adapter, decoder.config(), true)?,
            None => LoraAdapter::fresh(&config.lora()?, decoder.config(), config.seed)?,
        };
        let (decoder, adapter) = (Arc::new(decoder), Some(Arc::new(adapter)));
        Ok(Self { decoder, adapter, from_random: false })
    }

    /// What is trained, sorted by name.
    pub(super) fn parameters(&self) -> Vec<(String, Var)> {
        match &self.adapter {
            Some(adapter) => adapter.variables(),
            None => self.decoder.variables(),
        }
    }

    /// One forward pass of which no gradient is wanted, without dropout. `batch` has at least one trained
    /// token.
    pub(super) fn forward(&self, batch: &MicroBatch) -> Result<MicroBatchLoss, TrainError> {
        let hidden = self.with_step(batch, None, |step| self.decoder.hidden_untracked(step))?;
        self.losses(&hidden, batch)
    }

    /// One forward pass, and what its backward pass goes on from. `batch` has at least one trained token.
    pub(super) fn forward_to_train(
        &self,
        batch: &MicroBatch,
        dropout: Option<Dropout>,
        recompute: Recompute,
    ) -> Result<(MicroBatchLoss, LayeredPass<'_>), TrainError> {
        let pass = self.with_step(batch, dropout, |step| self.decoder.layered(step, recompute))?;
        let losses = self.losses(&pass.hidden()?, batch)?;
        Ok((losses, pass))
    }

    /// Calls `body` with the step that `batch` is.
    fn with_step<T>(
        &self,
        batch: &MicroBatch,
        dropout: Option<Dropout>,
        body: impl FnOnce(&Step<'_>) -> Result<T, ModelError>,
    ) -> Result<T, TrainError> {
        let whole = |&num_tokens: &usize| StepSequence {
            num_tokens,
            num_cached_tokens: 0,
            block_table: &[],
        };
        let sequences: Vec<_> = batch.lengths.iter().map(whole).collect();
        let on_all_rows = |adapter: &Arc<LoraAdapter>| DeltaRows {
            rows: 0..batch.tokens.len(),
            delta: Arc::clone(adapter) as _,
        };
        let deltas: Vec<_> = self.adapter.iter().map(on_all_rows).collect();
        Ok(body(&Step {
            tokens: &batch.tokens,
            sequences: &sequences,
            cache: None,
            deltas: &deltas,
            logit_rows: &[],
            dropout,
        })?)
    }

    fn losses(&self, hidden: &Tensor, batch: &MicroBatch) -> Result<MicroBatchLoss, TrainError> {
        let losses = self.decoder.token_losses(hidden, &batch.rows, &batch.targets)?; // [2, n]
        let correct = losses.get(1)?.detach().to_dtype(DType::F64)?.sum_all()?;
        Ok(MicroBatchLoss { nll: losses.get(0)?, num_correct: correct.to_scalar()? })
    }
}

/// Whether a model folder has weights at all (a folder with only a config is trained from random
/// ones).
fn has_weights(dir: &Path) -> Result<bool, TrainError> {
    let entries = fs::read_dir(dir);
    let entries = entries.map_err(|source| TrainError::File { path: dir.to_owned(), source })?;
    for entry in entries {
        if entry?.path().extension().is_some_and(|extension| extension == "safetensors") {
            return Ok(true);
        }
    }
    Ok(false)
}
