//! What a micro-batch contributes to the loss: the likelihood of its trained tokens, or, for pairs of
//! answers, how much the preferred one has gained on the other (direct preference optimization).
//!
//! The loss of a pair is `-log sigmoid(margin)`. The margin is the difference of two rewards, and an
//! answer's reward is beta times what its log-probability has gained since the start. Its slope in
//! either log-probability is a number that the forward pass tells, so the backward pass is that of a
//! weighted sum of token losses, as for the likelihood.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};

use super::{
    MicroBatch, Objective, Rewards, TrainConfig, TrainError,
    batches::split_by_tokens,
    trainable::{MicroBatchLoss, Trainable},
    workers::Workers,
};
use crate::data::Example;

/// Log-probabilities of the two answers of a pair.
pub(super) type PairLogProbs = [f64; 2];

/// A micro-batch, with what the adapter at the start made of its pairs (nothing in a supervised run).
pub(super) struct Part {
    pub(super) batch: MicroBatch,
    reference: Vec<PairLogProbs>,
}

/// Sums over the units of one or more micro-batches: trained tokens, or pairs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sums {
    pub(super) num_units: usize,
    pub(super) loss: f64,
    /// Tokens that were the arg max, or pairs with a margin above 0.
    pub(super) num_correct: f64,
    /// Of the preferred answers and of the others.
    rewards: [f64; 2],
}

impl Sums {
    pub(super) fn add(&mut self, other: Self) {
        self.num_units += other.num_units;
        self.loss += other.loss;
        self.num_correct += other.num_correct;
        for (sum, reward) in self.rewards.iter_mut().zip(other.rewards) {
            *sum += reward;
        }
    }

    /// The mean rewards, where there are any.
    pub(super) fn rewards(&self, objective: Objective) -> Option<Rewards> {
        let [reward_chosen, reward_rejected] = self.rewards.map(|sum| sum / self.num_units as f64);
        let reward_margin = reward_chosen - reward_rejected;
        (objective == Objective::Dpo).then_some(Rewards {
            reward_chosen,
            reward_rejected,
            reward_margin,
        })
    }
}

/// Puts the references of all pairs, in their order, beside the micro-batches that have them.
pub(super) fn parts(
    batches: Vec<MicroBatch>,
    mut references: impl Iterator<Item = PairLogProbs>,
) -> Vec<Part> {
    let part = |batch: MicroBatch| {
        let reference = references.by_ref().take(batch.lengths.len() / 2).collect();
        Part { batch, reference }
    };
    batches.into_iter().map(part).collect()
}

impl Part {
    /// Trained tokens, or pairs.
    pub(super) fn num_units(&self, objective: Objective) -> usize {
        match objective {
            Objective::Sft => self.batch.rows.len(),
            Objective::Dpo => self.batch.lengths.len() / 2,
        }
    }

    /// Of the batch's `losses` the sums, and a scalar whose gradient is that of the summed loss.
    pub(super) fn loss(
        &self,
        losses: &MicroBatchLoss,
        config: &TrainConfig,
    ) -> Result<(Sums, Tensor), TrainError> {
        let num_units = self.num_units(config.objective);
        if config.objective == Objective::Sft {
            let sum = losses.sum()?;
            let loss = sum.to_dtype(candle_core::DType::F64)?.to_scalar()?;
            let num_correct = losses.num_correct;
            return Ok((Sums { num_units, loss, num_correct, ..Sums::default() }, sum));
        }
        let log_probs = pair_log_probs(&self.batch, &losses.values()?);
        let mut sums = Sums { num_units, ..Sums::default() };
        let mut slopes = Vec::with_capacity(self.batch.lengths.len());
        for (now, start) in log_probs.iter().zip(&self.reference) {
            let [chosen, rejected] = [0, 1].map(|side| config.dpo_beta * (now[side] - start[side]));
            let margin = chosen - rejected;
            // -log sigmoid(margin), from the side on which nothing overflows.
            sums.loss += (-margin.abs()).exp().ln_1p() + (-margin).max(0.0);
            sums.num_correct += f64::from(u8::from(margin > 0.0));
            sums.rewards[0] += chosen;
            sums.rewards[1] += rejected;
            let slope = config.dpo_beta / (1.0 + margin.exp());
            slopes.extend([slope, -slope]);
        }
        let weights: Vec<f32> = rows_of_sequences(&self.batch)
            .zip(slopes)
            .flat_map(|(num_rows, slope)| std::iter::repeat_n(slope as f32, num_rows))
            .collect();
        let weights = Tensor::from_vec(weights, self.batch.rows.len(), &Device::Cpu)?;
        Ok((sums, (&losses.nll * weights)?.sum_all()?))
    }
}

/// What the adapter at the start says of every pair of `examples`; without dropout. Ends early when
/// `stop` is set: the run then makes no step.
pub(super) fn reference(
    model: &Trainable,
    workers: &Workers,
    examples: &[Example],
    micro_batch_tokens: usize,
    stop: &AtomicBool,
) -> Result<Vec<PairLogProbs>, TrainError> {
    let examples: Vec<&Example> = examples.iter().collect();
    let runs = split_by_tokens(&examples, micro_batch_tokens);
    let mut all = Vec::with_capacity(examples.len());
    let log_probs = |_: usize, run: &std::ops::Range<usize>| {
        if stop.load(Ordering::Relaxed) {
            return Ok(Vec::new());
        }
        let batch = MicroBatch::new(&examples[run.clone()]);
        Ok(pair_log_probs(&batch, &model.forward(&batch)?.values()?))
    };
    workers.in_order(&runs, log_probs, |pairs| {
        all.extend(pairs);
        Ok(())
    })?;
    Ok(all)
}

/// Sums of the trained tokens' log-probabilities, from their losses `nll`.
fn pair_log_probs(batch: &MicroBatch, nll: &[f32]) -> Vec<PairLogProbs> {
    let mut rest = nll;
    let mut sums = rows_of_sequences(batch).map(|num_rows| {
        let (own, others) = rest.split_at(num_rows);
        rest = others;
        -own.iter().map(|&nll| f64::from(nll)).sum::<f64>()
    });
    let mut pairs = Vec::with_capacity(batch.lengths.len() / 2);
    while let (Some(chosen), Some(rejected)) = (sums.next(), sums.next()) {
        pairs.push([chosen, rejected]);
    }
    pairs
}

/// How many of the batch's trained rows each sequence has.
fn rows_of_sequences(batch: &MicroBatch) -> impl Iterator<Item = usize> {
    let mut end = 0;
    let mut before = 0;
    batch.lengths.iter().map(move |length| {
        end += length;
        let up_to_here = batch.rows.partition_point(|&row| (row as usize) < end);
        let own = up_to_here - before;
        before = up_to_here;
        own
    })
}
