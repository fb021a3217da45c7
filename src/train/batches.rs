//! Which examples make which optimizer step: a pure function of lengths, seed and sizes, so that a
//! resumed run meets the same examples in the same order.

use std::ops::Range;

use super::{
    Packing, TrainConfig,
    packing::{group_by_length, pack},
};
use crate::data::{Example, epoch_order};

/// How examples are put together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchPlan {
    /// The rows of a batch: indices of the examples in each.
    pub rows: Vec<Vec<usize>>,
    /// Tokens of each row, where rows of similar lengths are to be met together.
    pub lengths: Option<Vec<usize>>,
    /// Rows per optimizer step; the last step of an epoch takes what is left.
    pub batch_size: usize,
    /// Most tokens of a micro-batch, unless a single example is longer.
    pub micro_batch_tokens: usize,
    /// Decides the order.
    pub seed: u64,
    /// Whether there is a new order each epoch; else rows come as they are.
    pub shuffle: bool,
}

impl BatchPlan {
    /// What `config` makes of `examples`.
    #[must_use]
    pub fn new(config: &TrainConfig, examples: &[Example]) -> Self {
        let lengths: Vec<usize> = examples.iter().map(Example::num_tokens).collect();
        let rows = match config.packing {
            Packing::None => (0..examples.len()).map(|index| vec![index]).collect(),
            Packing::Bfd => pack(&lengths, config.max_length),
        };
        let length = |row: &Vec<usize>| row.iter().map(|&index| lengths[index]).sum();
        let lengths = config.group_by_length.then(|| rows.iter().map(length).collect());
        Self {
            rows,
            lengths,
            batch_size: config.batch_size,
            micro_batch_tokens: config.micro_batch_tokens,
            seed: config.seed,
            shuffle: config.shuffle,
        }
    }

    /// Optimizer steps of one pass over the examples.
    #[must_use]
    pub fn steps_per_epoch(&self) -> usize {
        self.rows.len().div_ceil(self.batch_size)
    }

    /// Indices of the examples of optimizer step `step`, counted from 0 over all epochs.
    #[must_use]
    pub fn examples_of_step(&self, step: usize) -> Vec<usize> {
        let (epoch, at) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let range = at * self.batch_size..((at + 1) * self.batch_size).min(self.rows.len());
        self.order(epoch)[range].iter().flat_map(|&row| self.rows[row].iter().copied()).collect()
    }

    /// The rows in the order in which an epoch meets them.
    fn order(&self, epoch: usize) -> Vec<usize> {
        let mut order = if self.shuffle {
            epoch_order(self.rows.len(), self.seed, epoch as u64)
        } else {
            (0..self.rows.len()).collect()
        };
        if let Some(lengths) = &self.lengths {
            group_by_length(&mut order, lengths, self.batch_size);
        }
        order
    }

    /// The micro-batches of optimizer step `step`: its examples in order, cut where the next one
    /// would pass the token limit.
    #[must_use]
    pub fn micro_batches(&self, examples: &[Example], step: usize) -> Vec<MicroBatch> {
        let chosen = self.examples_of_step(step);
        let chosen: Vec<&Example> = chosen.into_iter().map(|index| &examples[index]).collect();
        split_by_tokens(&chosen, self.micro_batch_tokens)
            .into_iter()
            .map(|range| MicroBatch::new(&chosen[range]))
            .collect()
    }
}

/// Cuts `examples` into runs of at most `limit` tokens, or of one example. The sides of a preference stay
/// together.
#[must_use]
pub fn split_by_tokens(examples: &[&Example], limit: usize) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut num_tokens) = (0, 0);
    for (index, example) in examples.iter().enumerate() {
        if index > start && num_tokens + example.num_tokens() > limit {
            runs.push(start..index);
            (start, num_tokens) = (index, 0);
        }
        num_tokens += example.num_tokens();
    }
    if start < examples.len() {
        runs.push(start..examples.len());
    }
    runs
}

/// Sequences of one forward and backward pass, one after the other without padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatch {
    /// Tokens of all sequences. `[tokens]`
    pub tokens: Vec<u32>,
    /// Length of each sequence; they add up to `tokens.len()`.
    pub lengths: Vec<usize>,
    /// Rows of `tokens` whose prediction counts, ascending. `[n]`
    pub rows: Vec<u32>,
    /// What each of these rows has to predict: the token after it. `[n]`
    pub targets: Vec<u32>,
}

impl MicroBatch {
    /// Concatenates `examples`; the rejected side of a preference follows the other one.
    #[must_use]
    pub fn new(examples: &[&Example]) -> Self {
        Self::of_sequences(examples.iter().flat_map(|example| example.sides()))
    }

    /// Concatenates sequences. A trained token is the target of the row before it; the first token
    /// of a sequence has no such row and never counts.
    pub(super) fn of_sequences<'a>(sequences: impl Iterator<Item = &'a Example>) -> Self {
        let (tokens, lengths) = (Vec::new(), Vec::new());
        let mut batch = Self { tokens, lengths, rows: Vec::new(), targets: Vec::new() };
        for example in sequences {
            let start = batch.tokens.len();
            for (position, &token) in example.tokens.iter().enumerate().skip(1) {
                if example.loss_mask[position] {
                    let row = start + position - 1;
                    batch.rows.push(u32::try_from(row).expect("a micro-batch has < 2^32 tokens"));
                    batch.targets.push(token);
                }
            }
            batch.tokens.extend_from_slice(&example.tokens);
            batch.lengths.push(example.tokens.len());
        }
        batch
    }
}
