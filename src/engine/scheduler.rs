//! Who runs in the next step, and with how many tokens.
//!
//! A step gives each decoding sequence its one token first, so that a long prompt never stops the others'
//! streams; the rest of the token budget goes to prefill chunks, no more than the caller allows while
//! somebody decodes. Where no prompt wants the budget, a step has room for guessed tokens. A prompt is
//! admitted when blocks for all its tokens are free, so prefill never gets stuck half-way. A decoding
//! sequence that finds no free block takes those of the last one in rank, which waits again, keeps its tokens
//! and runs them again later.
//!
//! What the cache already holds of a prompt is not computed again: it is taken over at admission, and in
//! later steps as sequences before it in rank, with the same beginning, get on with it.
//!
//! Nobody starves within a priority: the running sequence first in rank is never preempted and gets a token
//! in every step, so it ends, and everybody becomes the first in time.
//!
//! Knows tokens and blocks; must never know tensors, channels or clocks. No candle here.

use super::{
    blocks::BlockManager,
    config::EngineConfig,
    sequence::{Rank, Sequence, SequenceParams},
    waiting::WaitingRoom,
};

/// Prompts that share the prefill budget when they do not all fit into one step.
const MAX_SHARED_PREFILLS: usize = 4;
/// A long prompt leaves room for those behind it only if they get at least so many tokens.
const MIN_SHARED_CHUNK: usize = 16;

/// A running sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scheduled {
    /// Which one: index into [`Scheduler::running`].
    pub(super) index: usize,
    /// Its next so many tokens, at least 1; its [drafts](Sequence::drafts) come on top.
    pub(super) num_tokens: usize,
}

/// The waiting and the running sequences. `R` is what the engine keeps beside each.
pub(super) struct Scheduler<R> {
    waiting: WaitingRoom<R>,
    /// By rank.
    running: Vec<Sequence<R>>,
    blocks: BlockManager,
    max_num_seqs: usize,
    max_batch_tokens: usize,
    max_draft_tokens: usize,
    num_added: u64,
    num_preemptions: u64,
}

impl<R> Scheduler<R> {
    pub(super) fn new(config: &EngineConfig) -> Self {
        let max_batch_tokens = config.max_batch_tokens.max(1);
        Self {
            waiting: WaitingRoom::new(),
            running: Vec::new(),
            blocks: BlockManager::new(config.num_blocks, config.block_size),
            // Each running sequence must be able to get a token in every step.
            max_num_seqs: config.max_num_seqs.clamp(1, max_batch_tokens),
            max_batch_tokens,
            max_draft_tokens: config.speculate,
            num_added: 0,
            num_preemptions: 0,
        }
    }

    /// Queues a sequence that [fits](EngineConfig::max_sequence_len).
    pub(super) fn add(&mut self, params: SequenceParams, request: R) {
        let rank = Rank { priority: params.priority, age: self.num_added };
        self.num_added += 1;
        self.waiting.push(Sequence::new(params, rank, self.blocks.table(), request));
    }

    /// Plans the next step: admits, preempts and reserves the blocks that the step writes to. While
    /// somebody decodes, a step with a chunk of a prompt has no more than `max_mixed_rows` rows (or 1
    /// token of a prompt); with guesses it has no more than `max_guess_rows`. Sequences of one adapter are neighbours, the base first. Empty only when there is nothing to do.
    pub(super) fn schedule(
        &mut self,
        max_mixed_rows: usize,
        max_guess_rows: usize,
    ) -> Vec<Scheduled> {
        self.running.iter_mut().for_each(Sequence::begin_plan);
        // 1. One token for everyone who decodes.
        let num_decodes = self.plan_decodes();
        let mut budget = self.max_batch_tokens - num_decodes;
        if num_decodes > 0 {
            budget = budget.min(max_mixed_rows.saturating_sub(num_decodes).max(1));
        }
        // 2. New prompts, as far as slots, blocks and budget go.
        self.admit(budget);
        // 3. The budget for prompts, the first in rank first; or else for guesses.
        if self.plan_prefills(budget) == 0 {
            self.plan_drafts(num_decodes, max_guess_rows);
        }
        let parts = self.running.iter().enumerate();
        let mut plan: Vec<_> = parts
            .map(|(index, sequence)| Scheduled { index, num_tokens: sequence.num_scheduled_tokens })
            .filter(|part| part.num_tokens > 0)
            .collect();
        plan.sort_unstable_by_key(|part| (self.running[part.index].adapter_key, part.index));
        plan
    }

    fn plan_decodes(&mut self) -> usize {
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].num_remaining_tokens() == 1 {
                if !self.reserve_or_preempt(index) {
                    break; // It was the last one, and went itself.
                }
                let sequence = &mut self.running[index];
                sequence.num_scheduled_tokens = 1;
                self.waiting.served(sequence.adapter_key, 1);
            }
            index += 1;
        }
        self.running.iter().filter(|sequence| sequence.num_scheduled_tokens > 0).count()
    }

    /// Makes room for all tokens of `running[index]`, at the cost of the last ones in rank if need be.
    fn reserve_or_preempt(&mut self, index: usize) -> bool {
        while let Some(sequence) = self.running.get_mut(index) {
            let num_tokens = sequence.tokens().len();
            if sequence.block_table.reserve(num_tokens) {
                return true;
            }
            if let Some(mut last) = self.running.pop() {
                last.preempt();
                let adapter_key = last.adapter_key;
                self.waiting.push(last);
                self.waiting.stopped(adapter_key);
                self.num_preemptions += 1;
            }
        }
        false
    }

    fn admit(&mut self, budget: usize) {
        let prefilling = self.running.iter().filter(|sequence| sequence.num_scheduled_tokens == 0);
        let mut num_prefills = prefilling.clone().count();
        let mut wanted: usize = prefilling.map(Sequence::num_remaining_tokens).sum();
        while self.running.len() < self.max_num_seqs
            && (wanted < budget || (budget > 0 && num_prefills < MAX_SHARED_PREFILLS))
        {
            let Some(mut sequence) = self.waiting.pop() else { return };
            sequence.adopt_cached_blocks();
            let num_tokens = sequence.tokens().len();
            if !sequence.block_table.reserve(num_tokens) {
                sequence.reset_cache();
                self.waiting.push(sequence);
                return;
            }
            num_prefills += 1;
            wanted += sequence.num_remaining_tokens();
            self.waiting.started(sequence.adapter_key, sequence.num_remaining_tokens());
            let place = self.running.partition_point(|other| other.rank < sequence.rank);
            self.running.insert(place, sequence);
        }
    }

    /// Returns how many tokens it planned.
    fn plan_prefills(&mut self, budget: usize) -> usize {
        let is_free = |index: &usize| self.running[*index].num_scheduled_tokens == 0;
        let mut prompts: Vec<usize> = (0..self.running.len()).filter(is_free).collect();
        prompts.retain(|&index| self.is_ready(index));
        let mut left = budget;
        for (place, &index) in prompts.iter().enumerate() {
            let remaining = self.running[index].num_remaining_tokens();
            let is_last = place + 1 == prompts.len();
            // What does not fit leaves half of the budget to those behind it.
            let shared = remaining > left && !is_last && left / 2 >= MIN_SHARED_CHUNK;
            let num_tokens = if shared { left.div_ceil(2) } else { remaining.min(left) };
            left -= num_tokens;
            self.running[index].num_scheduled_tokens = num_tokens;
        }
        budget - left
    }

    /// Takes what others have computed meanwhile; false while one before it in rank still computes what
    /// comes next here. The first in rank never waits so, and nobody waits for ever.
    fn is_ready(&mut self, index: usize) -> bool {
        let (before, rest) = self.running.split_at_mut(index);
        let Some(sequence) = rest.first_mut() else { return false };
        sequence.adopt_cached_blocks();
        !before.iter_mut().any(|before| sequence.can_wait_for(before))
    }

    /// Fills the step up to `max_rows` with guesses, fairly among those who decode. Guesses take free
    /// blocks only.
    fn plan_drafts(&mut self, num_decodes: usize, max_rows: usize) {
        let limit = max_rows.min(self.max_batch_tokens);
        let mut room = limit.saturating_sub(num_decodes);
        let mut num_left = num_decodes;
        for sequence in &mut self.running {
            if self.max_draft_tokens == 0 || sequence.num_scheduled_tokens == 0 {
                continue;
            }
            let num_tokens = self.max_draft_tokens.min(room.div_ceil(num_left));
            room -= sequence.draft(num_tokens);
            num_left -= 1;
        }
    }

    /// Takes out every sequence, waiting or running, for which `is_gone` is true. The plan's indices
    /// no longer hold afterwards.
    pub(super) fn remove(
        &mut self,
        mut is_gone: impl FnMut(&Sequence<R>) -> bool,
    ) -> Vec<Sequence<R>> {
        let mut gone: Vec<_> = self.running.extract_if(.., |sequence| is_gone(sequence)).collect();
        gone.iter().for_each(|sequence| self.waiting.stopped(sequence.adapter_key));
        gone.extend(self.waiting.remove(is_gone));
        gone
    }

    /// Takes out all running sequences.
    pub(super) fn remove_running(&mut self) -> Vec<Sequence<R>> {
        let gone = std::mem::take(&mut self.running);
        gone.iter().for_each(|sequence| self.waiting.stopped(sequence.adapter_key));
        gone
    }

    /// The running sequences, by rank.
    pub(super) fn running(&self) -> &[Sequence<R>] {
        &self.running
    }

    /// The running sequences, to advance them.
    pub(super) fn running_mut(&mut self) -> &mut [Sequence<R>] {
        &mut self.running
    }

    /// The waiting sequences.
    pub(super) fn waiting(&self) -> &WaitingRoom<R> {
        &self.waiting
    }

    /// Whether there is nothing to do.
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// The cache blocks.
    pub(super) fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// How often a sequence lost its blocks.
    pub(super) fn num_preemptions(&self) -> u64 {
        self.num_preemptions
    }
}

#[cfg(test)]
mod tests;
