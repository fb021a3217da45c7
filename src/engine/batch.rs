//! A plan as the input of one forward pass.

use std::sync::Arc;

use super::{request::Request, scheduler::Scheduled, sequence::Sequence};
use crate::model::{Delta, DeltaRows, Step, StepSequence};

/// Owns what a [`Step`] borrows.
pub(super) struct Batch<'a> {
    tokens: Vec<u32>,
    sequences: Vec<StepSequence<'a>>,
    deltas: Vec<DeltaRows>,
    logit_rows: Vec<u32>,
}

impl<'a> Batch<'a> {
    /// The planned tokens of the `running` sequences, in the order of the plan.
    pub(super) fn new(plan: &[Scheduled], running: &'a [Sequence<Request>]) -> Self {
        let mut batch =
            Self { tokens: vec![], sequences: vec![], deltas: vec![], logit_rows: vec![] };
        let mut last_adapter_key = 0;
        for part in plan {
            let sequence = &running[part.index];
            let (row, cached) = (batch.tokens.len(), sequence.num_cached_tokens());
            let num_tokens = part.num_tokens + sequence.drafts().len();
            let end = row + num_tokens;
            // 1. Tokens, positions and blocks.
            batch.tokens.extend(&sequence.tokens()[cached..cached + part.num_tokens]);
            batch.tokens.extend(sequence.drafts());
            batch.sequences.push(StepSequence {
                num_tokens,
                num_cached_tokens: cached,
                block_table: sequence.block_table.blocks(),
            });
            // 2. Rows whose logits somebody reads.
            let positions = sequence.logit_positions(part.num_tokens);
            batch.logit_rows.extend(positions.map(|position| (row + position - cached) as u32));
            // 3. Rows of one adapter: neighbours share a range.
            if let Some(version) = &sequence.request.adapter {
                match batch.deltas.last_mut() {
                    Some(last) if last_adapter_key == sequence.adapter_key => last.rows.end = end,
                    _ => {
                        let delta = Arc::clone(&version.adapter) as Arc<dyn Delta>;
                        batch.deltas.push(DeltaRows { rows: row..end, delta });
                    }
                }
            }
            last_adapter_key = sequence.adapter_key;
        }
        batch
    }

    /// The forward pass, but for the cache, which the model's owner adds.
    pub(super) fn step(&self) -> Step<'_> {
        Step {
            tokens: &self.tokens,
            sequences: &self.sequences,
            cache: None,
            deltas: &self.deltas,
            logit_rows: &self.logit_rows,
            dropout: None,
        }
    }
}
