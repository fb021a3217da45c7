//! One forward pass over a ragged batch.

use std::{ops::Range, sync::Arc};

use super::{DeltaRows, Dropout, KvCache, ModelError};
use crate::ops::attention::PagedSpan;

/// The tokens of several sequences, one after the other, and what is to be done with them.
pub struct Step<'a> {
    /// The tokens of all sequences, concatenated. `[tokens]`
    pub tokens: &'a [u32],
    /// The sequences, in the order of `tokens`; their `num_tokens` add up to `tokens.len()`.
    pub sequences: &'a [StepSequence<'a>],
    /// Where keys and values live; `None`: whole sequences without a cache (training).
    pub cache: Option<&'a KvCache>,
    /// Which rows carry which adapter; disjoint. Rows in no range are the plain base.
    pub deltas: &'a [DeltaRows],
    /// Rows of `tokens` whose logits are wanted.
    pub logit_rows: &'a [u32],
    /// Dropout on the adapters' input (training only).
    pub dropout: Option<Dropout>,
}

/// One sequence's part of a [`Step`].
pub struct StepSequence<'a> {
    /// Tokens of this sequence in this step.
    pub num_tokens: usize,
    /// Tokens before them, already in the cache: the position of the first one.
    pub num_cached_tokens: usize,
    /// Physical block of each `block_size` positions, over cached and new tokens. Empty without a
    /// cache.
    pub block_table: &'a [u32],
}

/// Where a step's keys and values go.
pub(super) enum Layout<'a> {
    Whole(Arc<[Range<usize>]>),
    Paged { cache: &'a KvCache, slots: Arc<[u32]>, spans: Arc<[PagedSpan]> },
}

impl<'a> Step<'a> {
    /// Position of every token.
    pub(super) fn positions(&self) -> Result<Vec<u32>, ModelError> {
        let mut positions = Vec::with_capacity(self.tokens.len());
        for sequence in self.sequences {
            let end = sequence.num_cached_tokens + sequence.num_tokens;
            positions.extend(narrow(sequence.num_cached_tokens)?..narrow(end)?);
        }
        if positions.len() != self.tokens.len() {
            let (covered, tokens) = (positions.len(), self.tokens.len());
            return Err(ModelError::Step(format!("sequences cover {covered} of {tokens} tokens")));
        }
        Ok(positions)
    }

    pub(super) fn layout(&self) -> Result<Layout<'a>, ModelError> {
        let mut start = 0;
        let mut rows = Vec::with_capacity(self.sequences.len());
        for sequence in self.sequences {
            rows.push(start..start + sequence.num_tokens);
            start += sequence.num_tokens;
        }
        let Some(cache) = self.cache else {
            if self.sequences.iter().any(|sequence| sequence.num_cached_tokens > 0) {
                return Err(ModelError::Step("cached tokens without a cache".into()));
            }
            return Ok(Layout::Whole(rows.into()));
        };
        let mut slots = Vec::with_capacity(self.tokens.len());
        let mut spans = Vec::with_capacity(self.sequences.len());
        for (rows, sequence) in rows.into_iter().zip(self.sequences) {
            let first_position = sequence.num_cached_tokens;
            for position in first_position..first_position + sequence.num_tokens {
                let index = position / cache.block_size();
                let block = sequence
                    .block_table
                    .get(index)
                    .ok_or_else(|| ModelError::Step(format!("no block for position {position}")))?;
                slots.push(narrow(
                    *block as usize * cache.block_size() + position % cache.block_size(),
                )?);
            }
            spans.push(PagedSpan {
                rows,
                first_position,
                block_table: sequence.block_table.into(),
            });
        }
        Ok(Layout::Paged { cache, slots: slots.into(), spans: spans.into() })
    }
}

fn narrow(value: usize) -> Result<u32, ModelError> {
    u32::try_from(value).map_err(|_| ModelError::Step(format!("{value} does not fit 32 bits")))
}
