//! Who runs in the next step, and with how many tokens.
//!
//! First come, first served. A step gives each decoding sequence its one token first, so that a long
//! prompt never stops the others' streams; the rest of the token budget goes to prefill chunks. A
//! prompt is admitted when blocks for all its tokens are free, so prefill never gets stuck half-way.
//! A decoding sequence that finds no free block takes those of the youngest one, which goes back to
//! the head of the queue, keeps its tokens and runs them again later.
//!
//! What the cache already holds of a prompt is not computed again: it is taken over at admission, and in
//! later steps as older sequences with the same beginning get on with it.
//!
//! Nobody starves: the oldest running sequence is never preempted and gets a token in every step, so it
//! ends, and everybody becomes the oldest in time.
//!
//! Knows token counts and blocks; must never know tensors, channels or clocks. No candle here.

use std::collections::VecDeque;

use super::{
    blocks::BlockManager,
    config::EngineConfig,
    sequence::{Sequence, SequenceParams},
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
    /// Its next so many tokens, at least 1.
    pub(super) num_tokens: usize,
}

/// The waiting and the running sequences. `R` is what the engine keeps beside each.
pub(super) struct Scheduler<R> {
    /// Oldest first; all younger than the running ones.
    waiting: VecDeque<Sequence<R>>,
    /// Oldest first.
    running: Vec<Sequence<R>>,
    blocks: BlockManager,
    max_num_seqs: usize,
    max_batch_tokens: usize,
    num_preemptions: u64,
}

impl<R> Scheduler<R> {
    pub(super) fn new(config: &EngineConfig) -> Self {
        let max_batch_tokens = config.max_batch_tokens.max(1);
        Self {
            waiting: VecDeque::new(),
            running: Vec::new(),
            blocks: BlockManager::new(config.num_blocks, config.block_size),
            // Each running sequence must be able to get a token in every step.
            max_num_seqs: config.max_num_seqs.clamp(1, max_batch_tokens),
            max_batch_tokens,
            num_preemptions: 0,
        }
    }

    /// Queues a sequence that [fits](EngineConfig::max_sequence_len).
    pub(super) fn add(&mut self, params: SequenceParams, request: R) {
        self.waiting.push_back(Sequence::new(params, self.blocks.table(), request));
    }

    /// Plans the next step: admits, preempts and reserves the blocks that the step writes to. Sequences
    /// of one adapter are neighbours, the base first. Empty only when there is nothing to do.
    pub(super) fn schedule(&mut self) -> Vec<Scheduled> {
        // 1. One token for everyone who decodes.
        let mut plan = self.plan_decodes();
        // 2. New prompts, as far as slots, blocks and budget go.
        let budget = self.max_batch_tokens - plan.len();
        self.admit(budget);
        // 3. The rest of the budget for prompts, the oldest first.
        self.plan_prefills(budget, &mut plan);
        plan.sort_unstable_by_key(|part| (self.running[part.index].adapter_key, part.index));
        plan
    }

    fn plan_decodes(&mut self) -> Vec<Scheduled> {
        let mut plan = Vec::with_capacity(self.running.len());
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].num_remaining_tokens() == 1 {
                if !self.reserve_or_preempt(index) {
                    break; // It was the youngest, and went itself.
                }
                plan.push(Scheduled { index, num_tokens: 1 });
            }
            index += 1;
        }
        plan
    }

    /// Makes room for all tokens of `running[index]`, at the cost of the youngest ones if need be.
    fn reserve_or_preempt(&mut self, index: usize) -> bool {
        while let Some(sequence) = self.running.get_mut(index) {
            let num_tokens = sequence.tokens().len();
            if sequence.block_table.reserve(num_tokens) {
                return true;
            }
            if let Some(mut youngest) = self.running.pop() {
                youngest.reset_cache();
                self.waiting.push_front(youngest);
                self.num_preemptions += 1;
            }
        }
        false
    }

    fn admit(&mut self, budget: usize) {
        let mut prefill: Vec<usize> =
            self.prefilling().map(Sequence::num_remaining_tokens).collect();
        let mut wanted: usize = prefill.iter().sum();
        while self.running.len() < self.max_num_seqs
            && (wanted < budget || (budget > 0 && prefill.len() < MAX_SHARED_PREFILLS))
        {
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            sequence.adopt_cached_blocks();
            let num_tokens = sequence.tokens().len();
            if !sequence.block_table.reserve(num_tokens) {
                sequence.reset_cache();
                self.waiting.push_front(sequence);
                return;
            }
            prefill.push(sequence.num_remaining_tokens());
            wanted += sequence.num_remaining_tokens();
            self.running.push(sequence);
        }
    }

    fn plan_prefills(&mut self, mut budget: usize, plan: &mut Vec<Scheduled>) {
        // Up to here the plan is in ascending order.
        let is_free = |index: &usize| plan.binary_search_by_key(index, |part| part.index).is_err();
        let mut prompts: Vec<usize> = (0..self.running.len()).filter(is_free).collect();
        prompts.retain(|&index| self.is_ready(index));
        for (place, &index) in prompts.iter().enumerate() {
            let remaining = self.running[index].num_remaining_tokens();
            let is_last = place + 1 == prompts.len();
            // What does not fit leaves half of the budget to those behind it.
            let shared = remaining > budget && !is_last && budget / 2 >= MIN_SHARED_CHUNK;
            let num_tokens = if shared { budget.div_ceil(2) } else { remaining.min(budget) };
            if num_tokens == 0 {
                break;
            }
            budget -= num_tokens;
            plan.push(Scheduled { index, num_tokens });
        }
    }

    /// Takes what an older sequence has computed meanwhile; false while one still computes what comes
    /// next here. That one is older, so the oldest never waits, and nobody waits for ever.
    fn is_ready(&mut self, index: usize) -> bool {
        let (older, rest) = self.running.split_at_mut(index);
        let Some(sequence) = rest.first_mut() else { return false };
        sequence.adopt_cached_blocks();
        !older.iter_mut().any(|older| sequence.can_wait_for(older))
    }

    fn prefilling(&self) -> impl Iterator<Item = &Sequence<R>> {
        self.running.iter().filter(|sequence| sequence.num_remaining_tokens() > 1)
    }

    /// Takes out every sequence, waiting or running, for which `is_gone` is true. The plan's indices
    /// no longer hold afterwards.
    pub(super) fn remove(
        &mut self,
        mut is_gone: impl FnMut(&Sequence<R>) -> bool,
    ) -> Vec<Sequence<R>> {
        let mut gone: Vec<_> = self.running.extract_if(.., |sequence| is_gone(sequence)).collect();
        for _ in 0..self.waiting.len() {
            let Some(sequence) = self.waiting.pop_front() else { break };
            if is_gone(&sequence) {
                gone.push(sequence);
            } else {
                self.waiting.push_back(sequence);
            }
        }
        gone
    }

    /// Takes out all running sequences.
    pub(super) fn remove_running(&mut self) -> Vec<Sequence<R>> {
        std::mem::take(&mut self.running)
    }

    /// The running sequences, oldest first.
    pub(super) fn running(&self) -> &[Sequence<R>] {
        &self.running
    }

    /// The running sequences, to advance them.
    pub(super) fn running_mut(&mut self) -> &mut [Sequence<R>] {
        &mut self.running
    }

    /// The waiting sequences, next one first.
    pub(super) fn waiting(&self) -> impl ExactSizeIterator<Item = &Sequence<R>> {
        self.waiting.iter()
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
