//! What a micro-batch contributes to the loss: the likelihood of its trained tokens, or, for pairs of
//! answers, how the preferred one fares against the other.
//!
//! A pair's loss is a function of its two log-probabilities, and its slope in either is a number that the
//! forward pass tells, so the backward pass is that of a weighted sum of token losses, as for the
//! likelihood.

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

use candle_core::{DType, Device, Tensor};

use super::{
    LossTokens, MicroBatch, Objective, Rewards, TrainConfig, TrainError, TrainJob,
    batches::split_by_tokens,
    preference::{self, Contribution},
    trainable::{MicroBatchLoss, Trainable},
    workers::Workers,
};
use crate::data::Example;

/// Log-probabilities of the two answers of a pair.
pub(super) type PairLogProbs = [f64; 2];

/// A micro-batch, with what the loss of its pairs needs besides (nothing in a supervised run).
pub(super) struct Part {
    pub(super) batch: MicroBatch,
    /// What the adapter at the start made of the pairs (`dpo`).
    reference: Vec<PairLogProbs>,
    /// Which rows are of answers, where prompts count as well (`orpo` on all tokens).
    answers: Option<Vec<bool>>,
    /// Weight of each token loss of a preferred answer, beside its pair's own.
    nll_weight: f64,
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
        objective.wants_pairs().then_some(Rewards { reward_chosen, reward_rejected, reward_margin })
    }
}

/// The micro-batches of a step (or of a validation), with the references of all pairs in their order.
pub(super) fn parts(
    config: &TrainConfig,
    batches: Vec<MicroBatch>,
    mut references: impl Iterator<Item = PairLogProbs>,
) -> Vec<Part> {
    let part = |batch: MicroBatch| {
        let reference = references.by_ref().take(batch.lengths.len() / 2).collect();
        let (batch, answers) = match (config.objective, config.loss_on) {
            (Objective::Orpo, LossTokens::All) => with_prompts(&batch),
            _ => (batch, None),
        };
        Part { batch, reference, answers, nll_weight: 0.0 }
    };
    let mut parts: Vec<Part> = batches.into_iter().map(part).collect();
    let weight = match config.objective {
        Objective::Sft => return parts,
        Objective::Dpo => config.dpo_sft_weight,
        Objective::Orpo => 1.0,
    };
    // A mean over all tokens of the preferred sides, added to one over all pairs, by whose number the
    // sum of everything is divided.
    let num_pairs: usize = parts.iter().map(|part| part.num_units(config.objective)).sum();
    let num_tokens: usize = parts.iter().map(Part::num_preferred).sum();
    for part in &mut parts {
        part.nll_weight = weight * num_pairs as f64 / num_tokens.max(1) as f64;
    }
    parts
}

impl Part {
    /// Trained tokens, or pairs.
    pub(super) fn num_units(&self, objective: Objective) -> usize {
        if objective.wants_pairs() { self.batch.lengths.len() / 2 } else { self.batch.rows.len() }
    }

    /// Of the batch's `losses` in a training step the sums, and a scalar whose gradient is that of the
    /// summed loss.
    pub(super) fn loss(
        &self,
        model: &Trainable,
        losses: &MicroBatchLoss,
        config: &TrainConfig,
    ) -> Result<(Sums, Tensor), TrainError> {
        if config.objective == Objective::Sft {
            let sum = model.smoothed(losses, &self.batch)?;
            let sums = self.token_sums(number(&sum)?, losses.num_correct);
            return Ok((sums, sum));
        }
        let (sums, weights) = self.pairs(config, &losses.values()?);
        let weights = Tensor::from_vec(weights, self.batch.rows.len(), &Device::Cpu)?;
        Ok((sums, (&losses.nll * weights)?.sum_all()?))
    }

    /// The sums of a forward pass over held-out rows: no dropout, no smoothing of labels.
    pub(super) fn measure(
        &self,
        model: &Trainable,
        config: &TrainConfig,
    ) -> Result<Sums, TrainError> {
        let losses = model.forward(&self.batch)?;
        if config.objective == Objective::Sft {
            return Ok(self.token_sums(number(&losses.sum()?)?, losses.num_correct));
        }
        Ok(self.pairs(config, &losses.values()?).0)
    }

    fn token_sums(&self, loss: f64, num_correct: f64) -> Sums {
        let num_units = self.batch.rows.len();
        Sums { num_units, loss, num_correct, ..Sums::default() }
    }

    /// The sums over the pairs, whose tokens have the losses `nll`, and each of these losses' weight in
    /// the gradient.
    fn pairs(&self, config: &TrainConfig, nll: &[f32]) -> (Sums, Vec<f32>) {
        let mut sums = Sums { num_units: self.num_units(config.objective), ..Sums::default() };
        let mut weights = vec![0.0; nll.len()];
        for (index, sides) in rows_of_sequences(&self.batch).chunks_exact(2).enumerate() {
            let answers = [0, 1].map(|side| self.answer(&sides[side], nll));
            let Contribution { loss, slopes, rewards } = match config.objective {
                Objective::Orpo => {
                    let means = answers.map(|(log_prob, count)| log_prob / count);
                    let mut pair = preference::orpo(config.orpo_beta, means);
                    for (slope, (_, count)) in pair.slopes.iter_mut().zip(answers) {
                        *slope /= count;
                    }
                    pair
                }
                Objective::Sft | Objective::Dpo => {
                    let now = answers.map(|(log_prob, _)| log_prob);
                    preference::dpo(config, now, self.reference[index])
                }
            };
            sums.loss += loss;
            sums.num_correct += f64::from(u8::from(rewards[0] > rewards[1]));
            for (sum, reward) in sums.rewards.iter_mut().zip(rewards) {
                *sum += reward;
            }
            for (rows, slope) in sides.iter().zip(slopes) {
                for row in rows.clone().filter(|row| self.is_answer(*row)) {
                    // A token's loss is minus its log-probability.
                    weights[row] -= slope as f32;
                }
            }
            for row in sides[0].clone() {
                weights[row] += self.nll_weight as f32;
                sums.loss += self.nll_weight * f64::from(nll[row]);
            }
        }
        (sums, weights)
    }

    /// The log-probability of the answer among `rows`, and how many tokens it has.
    fn answer(&self, rows: &Range<usize>, nll: &[f32]) -> (f64, f64) {
        let own = || rows.clone().filter(|row| self.is_answer(*row));
        (-own().map(|row| f64::from(nll[row])).sum::<f64>(), own().count() as f64)
    }

    fn is_answer(&self, row: usize) -> bool {
        self.answers.as_ref().is_none_or(|answers| answers[row])
    }

    /// Counted tokens of the preferred sides.
    fn num_preferred(&self) -> usize {
        rows_of_sequences(&self.batch).iter().step_by(2).map(ExactSizeIterator::len).sum()
    }
}

/// Every token but the first of the preferred sides counted, and which of all rows are of answers.
fn with_prompts(batch: &MicroBatch) -> (MicroBatch, Option<Vec<bool>>) {
    let MicroBatch { tokens, lengths, .. } = batch.clone();
    let mut wider = MicroBatch { tokens, lengths, rows: Vec::new(), targets: Vec::new() };
    let mut answers = Vec::new();
    let mut start = 0_u32;
    for (index, (length, own)) in batch.lengths.iter().zip(rows_of_sequences(batch)).enumerate() {
        let length = u32::try_from(*length).expect("a micro-batch has < 2^32 tokens");
        let counted = &batch.rows[own];
        for row in start..start + length - 1 {
            let is_answer = counted.binary_search(&row).is_ok();
            if is_answer || index % 2 == 0 {
                wider.rows.push(row);
                wider.targets.push(batch.tokens[row as usize + 1]);
                answers.push(is_answer);
            }
        }
        start += length;
    }
    (wider, Some(answers))
}

fn number(scalar: &Tensor) -> Result<f64, TrainError> {
    Ok(scalar.to_dtype(DType::F64)?.to_scalar()?)
}

/// What the adapter at the start says of training and validation pairs, where the objective compares
/// with it; `model` has its parameters of the start.
pub(super) fn references(
    model: &Trainable,
    workers: &Workers,
    job: &TrainJob,
    stop: &AtomicBool,
) -> Result<(Vec<PairLogProbs>, Vec<PairLogProbs>), TrainError> {
    if job.config.objective != Objective::Dpo {
        return Ok((Vec::new(), Vec::new()));
    }
    let limit = job.config.micro_batch_tokens;
    let of = |examples| reference(model, workers, examples, limit, stop);
    Ok((of(&job.train)?, of(&job.valid)?))
}

/// What the adapter at the start says of every pair of `examples`; without dropout. Ends early when
/// `stop` is set: the run then makes no step.
fn reference(
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
    let log_prob =
        |rows: &Range<usize>| -nll[rows.clone()].iter().map(|&nll| f64::from(nll)).sum::<f64>();
    let ranges = rows_of_sequences(batch);
    ranges.chunks_exact(2).map(|sides| [0, 1].map(|side| log_prob(&sides[side]))).collect()
}

/// Which of the batch's trained rows are of which sequence.
fn rows_of_sequences(batch: &MicroBatch) -> Vec<Range<usize>> {
    let (mut end, mut before) = (0, 0);
    let own = |length: &usize| {
        end += length;
        let up_to_here = batch.rows.partition_point(|&row| (row as usize) < end);
        let own = before..up_to_here;
        before = up_to_here;
        own
    };
    batch.lengths.iter().map(own).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_of_preferred_answers_count_in_orpo_and_the_answers_are_still_known() {
        // Two sequences of 4 and 3 tokens; of the first the last token, of the second the last two.
        let batch = MicroBatch {
            tokens: vec![10, 11, 12, 13, 20, 21, 22],
            lengths: vec![4, 3],
            rows: vec![2, 4, 5],
            targets: vec![13, 21, 22],
        };
        let (wider, answers) = with_prompts(&batch);
        assert_eq!(wider.rows, [0, 1, 2, 4, 5]);
        assert_eq!(wider.targets, [11, 12, 13, 21, 22]);
        assert_eq!(answers, Some(vec![false, false, true, true, true]));
    }
}
