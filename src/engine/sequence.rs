//! One request while it is alive: its tokens, how many of them are in the cache, its blocks.
//!
//! Knows token ids and counts; must never know tensors, channels or clocks (the engine keeps those in
//! `request`, which nobody here looks at). No candle here.

use std::ops::Range;

use super::{blocks::BlockTable, draft::Drafter, prefix::BlockKey, score::TokenScore};

/// What the scheduler needs to know of a new request.
#[derive(Debug, Clone)]
pub(super) struct SequenceParams {
    /// At least one token.
    pub(super) prompt: Vec<u32>,
    pub(super) max_tokens: usize,
    pub(super) score_prompt: bool,
    /// Equal for sequences of the same adapter version; 0 is the base.
    pub(super) adapter_key: usize,
    /// What its blocks depend on besides its tokens; `None`: they are not shared with anybody.
    pub(super) root: Option<BlockKey>,
    /// Lower ones go first.
    pub(super) priority: i32,
}

/// Whose turn it is: by priority, then by age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    pub(super) priority: i32,
    /// Number of sequences that came before it.
    pub(super) age: u64,
}

/// A prompt and what was generated after it.
#[derive(Debug)]
pub(super) struct Sequence<R> {
    tokens: Vec<u32>,
    num_prompt_tokens: usize,
    num_cached_tokens: usize,
    max_tokens: usize,
    prompt_scores: Option<Vec<TokenScore>>,
    root: Option<BlockKey>,
    /// Keys of its first full blocks, as far as somebody asked.
    keys: Vec<BlockKey>,
    /// Blocks whose content others can find.
    num_named_blocks: usize,
    drafter: Drafter,
    /// Guesses at the tokens after the last one, to be run in the next step.
    drafts: Vec<u32>,
    pub(super) rank: Rank,
    pub(super) was_preempted: bool,
    /// Its part of the step that is being planned.
    pub(super) num_scheduled_tokens: usize,
    pub(super) adapter_key: usize,
    pub(super) block_table: BlockTable,
    /// What the engine keeps beside it.
    pub(super) request: R,
}

impl<R> Sequence<R> {
    pub(super) fn new(
        params: SequenceParams,
        rank: Rank,
        block_table: BlockTable,
        request: R,
    ) -> Self {
        let num_prompt_tokens = params.prompt.len();
        let scores = num_prompt_tokens.saturating_sub(1);
        Self {
            tokens: params.prompt,
            num_prompt_tokens,
            num_cached_tokens: 0,
            max_tokens: params.max_tokens,
            prompt_scores: params.score_prompt.then(|| Vec::with_capacity(scores)),
            // Scores come from logits, so a scored prompt runs whole.
            root: params.root.filter(|_| !params.score_prompt),
            keys: Vec::new(),
            num_named_blocks: 0,
            drafter: Drafter::new(),
            drafts: Vec::new(),
            rank,
            was_preempted: false,
            num_scheduled_tokens: 0,
            adapter_key: params.adapter_key,
            block_table,
            request,
        }
    }

    /// Prompt and generated tokens.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub(super) fn num_prompt_tokens(&self) -> usize {
        self.num_prompt_tokens
    }

    pub(super) fn num_generated_tokens(&self) -> usize {
        self.tokens.len() - self.num_prompt_tokens
    }

    /// Tokens whose keys and values are in the cache.
    pub(super) fn num_cached_tokens(&self) -> usize {
        self.num_cached_tokens
    }

    /// Tokens still to run: 1 while decoding, more while (re)filling.
    pub(super) fn num_remaining_tokens(&self) -> usize {
        self.tokens.len() - self.num_cached_tokens
    }

    /// Tokens that are still to be generated, at most.
    pub(super) fn num_missing_tokens(&self) -> usize {
        self.max_tokens.saturating_sub(self.num_generated_tokens())
    }

    /// Whether `max_tokens` are generated.
    pub(super) fn is_complete(&self) -> bool {
        self.num_generated_tokens() >= self.max_tokens
    }

    /// Whether a step over the next `num_tokens` ends with a new token.
    pub(super) fn samples_after(&self, num_tokens: usize) -> bool {
        num_tokens == self.num_remaining_tokens() && !self.is_complete()
    }

    /// Positions whose logits a step over the next `num_tokens` must return: those that score a
    /// prompt token not scored yet (position `i` scores token `i + 1`), then those that are sampled
    /// from: the last one's and its drafts'. Always contiguous: sampling follows the last score.
    pub(super) fn logit_positions(&self, num_tokens: usize) -> Range<usize> {
        let last = self.num_cached_tokens + num_tokens;
        let sampled = last - usize::from(self.samples_after(num_tokens));
        let end = last + self.drafts.len();
        match &self.prompt_scores {
            // After a preemption the positions up to `scores.len()` run again, already scored.
            Some(scores) if scores.len() + 1 < self.num_prompt_tokens => {
                let to = if sampled < end { end } else { end.min(self.num_prompt_tokens - 1) };
                scores.len()..to.max(scores.len())
            }
            _ => sampled..end,
        }
    }

    /// The step over the next `num_tokens` is done: they are in the cache, where others may find them.
    pub(super) fn advance(&mut self, num_tokens: usize) {
        self.num_cached_tokens += num_tokens;
        debug_assert!(self.num_cached_tokens <= self.tokens.len());
        while let index = self.num_named_blocks
            && (index + 1) * self.block_table.block_size() <= self.num_cached_tokens
            && let Some(key) = self.block_key(index)
        {
            self.block_table.name(index, key);
            self.num_named_blocks += 1;
        }
    }

    /// Uses what the cache already holds of the next tokens, but never of the last one: its logits are
    /// wanted.
    pub(super) fn adopt_cached_blocks(&mut self) {
        while let Some((index, key)) = self.next_block()
            && self.block_table.adopt(index, key)
        {
            self.num_cached_tokens += self.block_table.block_size();
            self.num_named_blocks = index + 1;
        }
    }

    /// The block that comes next, if it could come from the cache: the sequence stands at a block's
    /// beginning and has tokens beyond its end.
    fn next_block(&mut self) -> Option<(usize, BlockKey)> {
        let block_size = self.block_table.block_size();
        let index = self.num_cached_tokens / block_size;
        let is_between = self.num_cached_tokens.is_multiple_of(block_size);
        let has_more = (index + 1) * block_size < self.tokens.len();
        if is_between && has_more { Some((index, self.block_key(index)?)) } else { None }
    }

    /// Whether `other` is about to compute the very block that comes next here.
    pub(super) fn can_wait_for(&mut self, other: &mut Self) -> bool {
        let Some((index, key)) = self.next_block() else { return false };
        let end = (index + 1) * self.block_table.block_size();
        let is_ahead = other.num_cached_tokens < end && end <= other.tokens.len();
        is_ahead && other.block_key(index) == Some(key)
    }

    /// The key of full block `index`.
    fn block_key(&mut self, index: usize) -> Option<BlockKey> {
        let block_size = self.block_table.block_size();
        let mut last = self.keys.last().copied().or(self.root)?;
        for block in self.keys.len()..=index {
            last = last.next(&self.tokens[block * block_size..(block + 1) * block_size]);
            self.keys.push(last);
        }
        self.keys.get(index).copied()
    }

    /// Appends a generated token.
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
    }

    /// Appends the score of the next prompt token.
    pub(super) fn push_score(&mut self, score: TokenScore) {
        if let Some(scores) = &mut self.prompt_scores {
            scores.push(score);
        }
    }

    /// All prompt scores, once: `Some` when they were asked for, are complete and were not taken.
    pub(super) fn take_complete_scores(&mut self) -> Option<Vec<TokenScore>> {
        let complete = self.prompt_scores.as_ref()?.len() + 1 >= self.num_prompt_tokens;
        if complete { self.prompt_scores.take() } else { None }
    }

    /// A new step is planned: nothing of the last plan holds any more.
    pub(super) fn begin_plan(&mut self) {
        self.num_scheduled_tokens = 0;
        self.drafts.clear();
    }

    /// Guesses at most `max_tokens` of the tokens that follow, as far as free blocks hold them; returns how
    /// many. A step must then run them behind the last token.
    pub(super) fn draft(&mut self, max_tokens: usize) -> usize {
        // The step itself yields one token more than it guesses right.
        let useful = (self.max_tokens - self.num_generated_tokens()).saturating_sub(1);
        self.drafts = self.drafter.propose(&self.tokens, max_tokens.min(useful));
        if !self.block_table.reserve(self.tokens.len() + self.drafts.len()) {
            let room = self.block_table.blocks().len() * self.block_table.block_size();
            self.drafts.truncate(room - self.tokens.len());
        }
        self.drafts.len()
    }

    /// The guesses that the next step runs.
    pub(super) fn drafts(&self) -> &[u32] {
        &self.drafts
    }

    /// The first `num_right` of the drafts were right.
    pub(super) fn end_drafts(&mut self, num_right: usize) {
        self.drafter.learn(self.drafts.len(), num_right);
        self.drafts.clear();
    }

    /// Its blocks are needed by others: it waits again.
    pub(super) fn preempt(&mut self) {
        self.begin_plan();
        self.reset_cache();
        self.was_preempted = true;
    }

    /// Gives the blocks back; every token that the cache does not keep must run again.
    pub(super) fn reset_cache(&mut self) {
        self.num_cached_tokens = 0;
        self.num_named_blocks = 0;
        self.block_table.clear();
    }
}

#[cfg(test)]
mod tests;
