//! The model and what of it is trained: an adapter's A and B, or every weight.

use std::{fs, path::Path, sync::Arc};

use candle_core::{DType, Tensor, Var};

use super::{Method, MicroBatch, TrainConfig, TrainError, WeightDtype};
use crate::adapters::LoraAdapter;
use crate::model::{
    Decoder, DeltaRows, Dropout, LayeredPass, ModelConfig, Recompute, Step, StepSequence,
    WeightMode,
};

/// A decoder with parameters to train.
pub(super) struct Trainable {
    pub(super) decoder: Arc<Decoder>,
    /// The adapter that is trained; `None` when all weights are.
    pub(super) adapter: Option<Arc<LoraAdapter>>,
    /// Whether the weights are random ones of `seed` instead of a checkpoint's.
    pub(super) from_random: bool,
    /// Share of the loss that asks for all tokens alike.
    label_smoothing: f64,
}

/// Losses of one micro-batch.
pub(super) struct MicroBatchLoss {
    /// Negative log-likelihood of each trained token, differentiable. `[rows]`, f32.
    pub(super) nll: Tensor,
    /// Trained tokens that were the arg max.
    pub(super) num_correct: f64,
    /// What the losses were computed from. `[tokens, hidden]`
    hidden: Tensor,
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
            let decoder = Arc::new(decoder);
            let label_smoothing = config.label_smoothing;
            return Ok(Self { decoder, adapter: None, from_random, label_smoothing });
        }
        Self::over(Arc::new(Decoder::load(dir, config.quantize.into())?), config)
    }

    /// Makes (or reads) the adapter that is trained over a base that is loaded already.
    pub(super) fn over(decoder: Arc<Decoder>, config: &TrainConfig) -> Result<Self, TrainError> {
        let label_smoothing = config.label_smoothing;
        let wanted = config.lora()?;
        let adapter = match &config.init_adapter {
            Some(dir) => {
                let adapter = LoraAdapter::read(dir, decoder.config(), true)?;
                let defaults = TrainConfig::default().lora()?;
                adapter.check_continues(&wanted, &defaults, &config.given)?;
                adapter
            }
            None => LoraAdapter::fresh_on(&wanted, &decoder, config.seed)?,
        };
        let adapter = Some(Arc::new(adapter));
        Ok(Self { decoder, adapter, from_random: false, label_smoothing })
    }

    /// Rounds every weight that is trained as a published model of `dtype` has it; an adapter is published
    /// as it is.
    pub(super) fn round(&self, dtype: WeightDtype) -> Result<(), TrainError> {
        if self.adapter.is_none() && dtype != WeightDtype::F32 {
            for (_, variable) in self.parameters() {
                variable.set(&variable.to_dtype(dtype.into())?.to_dtype(DType::F32)?)?;
            }
        }
        Ok(())
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
        self.with_step(batch, None, |step| {
            self.losses(self.decoder.hidden_untracked(step)?, batch, step.deltas)
        })
    }

    /// One forward pass, and what its backward pass goes on from. `batch` has at least one trained token.
    pub(super) fn forward_to_train(
        &self,
        batch: &MicroBatch,
        dropout: Option<Dropout>,
        recompute: Recompute,
    ) -> Result<(MicroBatchLoss, LayeredPass<'_>), TrainError> {
        self.with_step(batch, dropout, |step| {
            let pass = self.decoder.layered(step, recompute)?;
            Ok((self.losses(pass.hidden()?, batch, step.deltas)?, pass))
        })
    }

    /// Calls `body` with the step that `batch` is.
    fn with_step<T>(
        &self,
        batch: &MicroBatch,
        dropout: Option<Dropout>,
        body: impl FnOnce(&Step<'_>) -> Result<T, TrainError>,
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
        body(&Step {
            tokens: &batch.tokens,
            sequences: &sequences,
            cache: None,
            deltas: &deltas,
            logit_rows: &[],
            dropout,
        })
    }

    fn losses(
        &self,
        hidden: Tensor,
        batch: &MicroBatch,
        deltas: &[DeltaRows],
    ) -> Result<MicroBatchLoss, TrainError> {
        let MicroBatch { rows, targets, .. } = batch;
        let losses = self.decoder.token_losses_of(&hidden, rows, targets, deltas)?; // [2, n]
        let correct = losses.get(1)?.detach().to_dtype(DType::F64)?.sum_all()?;
        Ok(MicroBatchLoss { nll: losses.get(0)?, num_correct: correct.to_scalar()?, hidden })
    }

    /// The sum of the token losses with smoothed labels, differentiable. Scalar, f32.
    ///
    /// With a smoothing of e a token's loss is, as `transformers`' `LabelSmoother` has it, `1 - e` times
    /// its own plus e times the mean loss of all tokens of the vocabulary, which is its own plus e times
    /// the target's logit above the mean logit.
    pub(super) fn smoothed(
        &self,
        losses: &MicroBatchLoss,
        batch: &MicroBatch,
    ) -> Result<Tensor, TrainError> {
        let sum = losses.sum()?;
        if self.label_smoothing == 0.0 {
            return Ok(sum);
        }
        let above = self.decoder.logits_above_mean(&losses.hidden, &batch.rows, &batch.targets)?;
        Ok((sum + (above.sum_all()? * self.label_smoothing)?)?)
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
