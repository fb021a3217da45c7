//! The loss on held-out rows: all of them, or the next few in rotation.

use super::{
    MicroBatch, TrainConfig, TrainError, TrainEvent,
    batches::split_by_tokens,
    objective::{PairLogProbs, Sums, parts},
    trainable::Trainable,
    workers::Workers,
};
use crate::data::Example;

/// Which of `num_rows` rows the validation after `step` steps asks when it is not a full one: the
/// `valid_batch` after those of the validation before.
pub(super) fn rotation(config: &TrainConfig, num_rows: usize, step: usize) -> Vec<usize> {
    let size = config.valid_batch.unwrap_or(num_rows).min(num_rows);
    let validations_before = (step / config.eval_every.max(1)).saturating_sub(1);
    (0..size).map(|index| (validations_before * size + index) % num_rows).collect()
}

/// Loss and accuracy on the rows `chosen` of `valid`, weighted by unit. No gradient, no dropout.
/// `None` if none of them has a trained token; the second number is how many have been counted.
pub(super) fn measure(
    model: &Trainable,
    workers: &Workers,
    config: &TrainConfig,
    valid: &[Example],
    reference: &[PairLogProbs],
    chosen: &[usize],
) -> Result<Option<(Sums, usize)>, TrainError> {
    let examples: Vec<&Example> = chosen.iter().map(|&index| &valid[index]).collect();
    let runs = split_by_tokens(&examples, config.micro_batch_tokens);
    let batches = runs.into_iter().map(|range| MicroBatch::new(&examples[range]));
    let batches: Vec<_> = batches.filter(|batch| !batch.rows.is_empty()).collect();
    let num_trained = batches.iter().map(|batch| batch.rows.len()).sum();
    let references = chosen.iter().filter_map(|&index| reference.get(index).copied());
    let mut sums = Sums::default();
    let forward = |_, part: &super::objective::Part| part.measure(model, config);
    workers.in_order(&parts(config, batches, references), forward, |part| {
        sums.add(part);
        Ok(())
    })?;
    Ok((sums.num_units > 0).then_some((sums, num_trained)))
}

/// The event of a validation.
pub(super) fn event(
    config: &TrainConfig,
    step: usize,
    full: bool,
    (sums, num_trained_tokens): (Sums, usize),
    seconds: f64,
) -> TrainEvent {
    let loss = sums.loss / sums.num_units as f64;
    TrainEvent::Validated {
        step,
        full,
        loss,
        perplexity: loss.exp(),
        token_accuracy: sums.num_correct / sums.num_units as f64,
        num_trained_tokens,
        rewards: sums.rewards(config.objective),
        seconds,
    }
}
