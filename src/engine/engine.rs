//! The loop: take requests, schedule, run one step, sample, tell.
//!
//! One thread owns all of it, so nothing here is locked. It sleeps only when there is nothing to do,
//! and never waits for a client: each request's channel has room for all its events.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::Ordering::{Relaxed, Release},
        mpsc,
    },
    time::Instant,
};

use super::{
    EngineConfig, EngineStats, FinishReason, GenerationEvent,
    batch::Batch,
    pace::Pace,
    request::{Ending, Farewell, Request, Submission},
    sampler::BadLogits,
    scheduler::Scheduler,
    score::{score_token, token_logprobs},
    sequence::Sequence,
};
use crate::model::{Decoder, KvCache, ModelError, Step};

/// What the loop asks of a model.
pub(super) trait StepModel: Send + 'static {
    /// Logits of `step.logit_rows`, one row after the other: `[rows * vocab]`. Fills in the cache.
    fn forward(&self, step: &Step<'_>) -> Result<Vec<f32>, ModelError>;
}

/// The real one.
pub(super) struct CachedDecoder {
    pub(super) decoder: Arc<Decoder>,
    pub(super) cache: KvCache,
}

impl StepModel for CachedDecoder {
    fn forward(&self, step: &Step<'_>) -> Result<Vec<f32>, ModelError> {
        let step = Step { cache: Some(&self.cache), ..*step };
        if step.logit_rows.is_empty() {
            // Chunks in the middle of prompts: only the cache is wanted.
            self.decoder.hidden(&step)?;
            return Ok(Vec::new());
        }
        Ok(self.decoder.forward(&step)?.flatten_all()?.to_vec1()?)
    }
}

/// Everything that the engine thread owns.
pub(super) struct Engine<M> {
    model: M,
    scheduler: Scheduler<Request>,
    submissions: mpsc::Receiver<Submission>,
    counts_prefixes: bool,
    pace: Pace,
    stats: Arc<EngineStats>,
}

impl<M: StepModel> Engine<M> {
    pub(super) fn new(
        model: M,
        config: &EngineConfig,
        submissions: mpsc::Receiver<Submission>,
        stats: Arc<EngineStats>,
    ) -> Self {
        let (scheduler, pace) = (Scheduler::new(config), Pace::new(config.max_step));
        Self { model, scheduler, submissions, counts_prefixes: config.prefix_cache, pace, stats }
    }

    /// Runs until no handle is left and every request has ended, or until a step panics.
    pub(super) fn run(mut self) {
        while self.receive() {
            self.remove_cancelled();
            match catch_unwind(AssertUnwindSafe(|| self.step())) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => self.fail_running(&error),
                Err(panic) => return self.fail_all(panic.as_ref()),
            }
        }
    }

    /// Takes what has been submitted; waits if there is nothing else to do. False when there never
    /// will be.
    fn receive(&mut self) -> bool {
        if self.scheduler.is_idle() {
            match self.submissions.recv() {
                Ok(submission) => self.scheduler.add(submission.params, submission.request),
                Err(mpsc::RecvError) => return false,
            }
        }
        while let Ok(submission) = self.submissions.try_recv() {
            self.scheduler.add(submission.params, submission.request);
        }
        true
    }

    /// Forgets the sequences whose client left; their blocks return with them.
    fn remove_cancelled(&mut self) {
        let cancelled = self.scheduler.remove(|sequence| sequence.request.is_cancelled());
        if !cancelled.is_empty() {
            self.stats.cancelled.fetch_add(cancelled.len() as u64, Relaxed);
            drop(cancelled);
            self.publish();
        }
    }

    fn step(&mut self) -> Result<(), ModelError> {
        // 1. Who runs.
        let plan = self.scheduler.schedule(self.pace.max_rows());
        self.publish();
        if plan.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        for part in &plan {
            let sequence = &mut self.scheduler.running_mut()[part.index];
            if sequence.request.started.is_none() {
                sequence.request.started = Some(now);
                sequence.request.queue_room = None;
                let num_tokens = sequence.num_prompt_tokens() as u64;
                let num_cached_tokens = sequence.num_cached_tokens();
                sequence.request.cached_tokens.store(num_cached_tokens, Relaxed);
                self.stats.prompt_tokens.fetch_add(num_tokens, Relaxed);
                if self.counts_prefixes {
                    self.stats.prefix_queries.fetch_add(num_tokens, Relaxed);
                    self.stats.prefix_hits.fetch_add(num_cached_tokens as u64, Relaxed);
                }
            }
        }
        // 2. One forward pass.
        let batch = Batch::new(&plan, self.scheduler.running());
        let step = batch.step();
        let (logits, num_rows) = (self.model.forward(&step)?, step.logit_rows.len());
        self.pace.observe(step.tokens.len(), now.elapsed());
        self.stats.steps.fetch_add(1, Relaxed);
        // 3. Each sequence reads its rows.
        let vocab_size = (logits.len() / num_rows.max(1)).max(1);
        let mut rows = logits.chunks_exact(vocab_size);
        for part in &plan {
            let sequence = &mut self.scheduler.running_mut()[part.index];
            let num_rows = sequence.logit_positions(part.num_tokens).len();
            let rows: Vec<&[f32]> = rows.by_ref().take(num_rows).collect();
            let before = sequence.num_generated_tokens();
            sequence.request.ending = match advance(sequence, part.num_tokens, &rows, &self.stats) {
                Ok(reason) => reason.map(Ending::Finished),
                Err(error) => Some(Ending::Failed(error.to_string())),
            };
            let generated = (sequence.num_generated_tokens() - before) as u64;
            self.stats.generation_tokens.fetch_add(generated, Relaxed);
        }
        // 4. Those that are done leave.
        let ended = self.scheduler.remove(|sequence| sequence.request.ending.is_some());
        self.end(ended, |request| request.ending.take());
        Ok(())
    }

    fn fail_running(&mut self, error: &ModelError) {
        tracing::error!(%error, "a step failed");
        let failed = self.scheduler.remove_running();
        self.end(failed, |_| Some(Ending::Failed(error.to_string())));
    }

    fn fail_all(mut self, panic: &(dyn Any + Send)) {
        // First, so that whoever hears of the failure also sees that the engine is gone.
        self.stats.panicked.store(true, Release);
        let message = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_string())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        tracing::error!(message, "a step panicked, the engine stops");
        let failed = self.scheduler.remove(|_| true);
        self.end(failed, |_| Some(Ending::Failed(format!("a step panicked: {message}"))));
    }

    /// Drops sequences, then says goodbye: a client that hears the end finds its blocks and its place
    /// in the queue free.
    fn end(
        &mut self,
        ended: Vec<Sequence<Request>>,
        mut ending: impl FnMut(&mut Request) -> Option<Ending>,
    ) {
        if ended.is_empty() {
            return;
        }
        let mut farewells = Vec::with_capacity(ended.len());
        for mut sequence in ended {
            let Some(ending) = ending(&mut sequence.request) else { continue };
            let total = match ending {
                Ending::Finished(_) => &self.stats.finished,
                Ending::Failed(_) => &self.stats.failed,
            };
            total.fetch_add(1, Relaxed);
            farewells.push(Farewell::new(sequence, ending));
        }
        self.publish();
        farewells.into_iter().for_each(Farewell::send);
    }

    /// Brings the live figures up to date.
    fn publish(&self) {
        let (stats, blocks) = (&self.stats, self.scheduler.blocks());
        stats.running.store(self.scheduler.running().len(), Relaxed);
        stats.waiting.store(self.scheduler.waiting().len(), Relaxed);
        stats.used_blocks.store(blocks.num_blocks() - blocks.num_free(), Relaxed);
        stats.preemptions.store(self.scheduler.num_preemptions(), Relaxed);
        let running = adapter_names(self.scheduler.running().iter());
        let waiting = adapter_names(self.scheduler.waiting().iter());
        stats.set_adapters(&running, &waiting);
    }
}

/// The step over the next `num_tokens` of `sequence` returned `rows`, one a logit position: scores,
/// samples and tells. `Some` when the sequence is done.
fn advance(
    sequence: &mut Sequence<Request>,
    num_tokens: usize,
    rows: &[&[f32]],
    stats: &EngineStats,
) -> Result<Option<FinishReason>, BadLogits> {
    let samples = sequence.samples_after(num_tokens);
    let positions = sequence.logit_positions(num_tokens);
    let num_sample_rows = if samples { 1 + sequence.drafts().len() } else { 0 };
    sequence.advance(num_tokens);
    let (score_rows, sample_rows) = rows.split_at(rows.len() - num_sample_rows);
    for (position, row) in positions.zip(score_rows) {
        let score = score_token(row, sequence.tokens()[position + 1]).ok_or(BadLogits)?;
        sequence.push_score(score);
    }
    if let Some(scores) = sequence.take_complete_scores() {
        sequence.request.send(GenerationEvent::PromptScores(scores));
    }
    if sample_rows.is_empty() {
        let is_done = sequence.num_remaining_tokens() == 0; // Nothing but scores was wanted.
        return Ok(is_done.then_some(FinishReason::Length));
    }
    let mut num_right = 0;
    let reason = loop {
        let (id, reason) = sample(sequence, sample_rows[num_right])?;
        if reason.is_some() || sequence.drafts().get(num_right) != Some(&id) {
            break reason;
        }
        // Guessed right: this step has run it already, and the next row says what follows.
        sequence.advance(1);
        num_right += 1;
    };
    stats.draft_tokens.fetch_add(sequence.drafts().len() as u64, Relaxed);
    stats.accepted_tokens.fetch_add(num_right as u64, Relaxed);
    sequence.end_drafts(num_right);
    Ok(reason)
}

/// Chooses the next token from `row` and tells it; with the reason, if it is the last one.
fn sample(
    sequence: &mut Sequence<Request>,
    row: &[f32],
) -> Result<(u32, Option<FinishReason>), BadLogits> {
    let id = sequence.request.sampler.sample(row)?;
    let logprobs = sequence.request.logprobs.and_then(|top| token_logprobs(row, id, top));
    sequence.push(id);
    sequence.request.first_token.get_or_insert_with(Instant::now);
    sequence.request.send(GenerationEvent::Token { id, logprobs: logprobs.map(Box::new) });
    let is_stop = sequence.request.stop_token_ids.contains(&id);
    let is_full = sequence.is_complete().then_some(FinishReason::Length);
    Ok((id, if is_stop { Some(FinishReason::Stop) } else { is_full }))
}

fn adapter_names<'a>(sequences: impl Iterator<Item = &'a Sequence<Request>>) -> Vec<&'a str> {
    let adapters = sequences.filter_map(|sequence| sequence.request.adapter.as_ref());
    let mut names: Vec<&str> = adapters.map(|version| version.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests;
