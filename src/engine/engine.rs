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

use candle_core::Tensor;

use super::{
    EngineConfig, EngineStats, FinishReason, GenerationEvent,
    batch::Batch,
    choose::{Chosen, Outcome, choose},
    guessing::Guessing,
    pace::Pace,
    request::{Ending, Farewell, Request, Submission},
    scheduler::{Scheduled, Scheduler},
    sequence::Sequence,
};
use crate::model::{Decoder, KvCache, ModelError, Projection, Step};
use crate::ops::{
    profile::{self, Op},
    storage::with_f32,
};

/// What the loop asks of a model.
pub(super) trait StepModel: Send + 'static {
    /// Logits of `step.logit_rows`, `[rows, vocab]`, f32; `None` where there are no such rows. Fills in the
    /// cache.
    fn forward(&self, step: &Step<'_>) -> Result<Option<Tensor>, ModelError>;

    /// What attending to one more position adds to a row, as a part of the rest of the row.
    fn position_cost(&self) -> f64;
}

/// The real one.
pub(super) struct CachedDecoder {
    pub(super) decoder: Arc<Decoder>,
    pub(super) cache: KvCache,
}

impl StepModel for CachedDecoder {
    fn forward(&self, step: &Step<'_>) -> Result<Option<Tensor>, ModelError> {
        let step = Step { cache: Some(&self.cache), ..*step };
        if step.logit_rows.is_empty() {
            // Chunks in the middle of prompts: only the cache is wanted.
            self.decoder.hidden(&step)?;
            return Ok(None);
        }
        Ok(Some(self.decoder.forward(&step)?))
    }

    fn position_cost(&self) -> f64 {
        let config = self.decoder.config();
        let projections = Projection::ALL.map(|projection| config.projection_shape(projection));
        let weights: usize =
            projections.into_iter().map(|(inputs, outputs)| inputs * outputs).sum();
        // A weight and an element of a score or of a sum are one multiplication and one addition each.
        (2 * config.num_heads * config.head_dim) as f64 / weights as f64
    }
}

/// Everything that the engine thread owns.
pub(super) struct Engine<M> {
    model: M,
    scheduler: Scheduler<Request>,
    submissions: mpsc::Receiver<Submission>,
    counts_prefixes: bool,
    pace: Pace,
    guessing: Guessing,
    max_guesses: usize,
    stats: Arc<EngineStats>,
}

impl<M: StepModel> Engine<M> {
    pub(super) fn new(
        model: M,
        config: &EngineConfig,
        submissions: mpsc::Receiver<Submission>,
        stats: Arc<EngineStats>,
    ) -> Self {
        let pace = Pace::new(config.max_step, model.position_cost());
        let scheduler = Scheduler::new(config);
        Self {
            model,
            scheduler,
            submissions,
            counts_prefixes: config.prefix_cache,
            pace,
            guessing: Guessing::new(),
            max_guesses: config.speculate,
            stats,
        }
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
        let whole = profile::time(Op::Step);
        // 1. Who runs.
        let scheduling = profile::time(Op::Scheduling);
        let running = self.scheduler.running().iter();
        let running = running.map(|s| (s.num_remaining_tokens(), s.num_cached_tokens()));
        let num_decodes = running.clone().filter(|(remaining, _)| *remaining == 1).count();
        let max_guess_rows = self.guessing.best_rows(num_decodes, self.max_guesses);
        let plan = self.scheduler.schedule(self.pace.max_rows(running), max_guess_rows);
        self.publish();
        if plan.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        self.note_started(&plan, now);
        let batch = Batch::new(&plan, self.scheduler.running());
        drop(scheduling);
        // 2. One forward pass.
        let step = batch.step();
        let load = self.pace.load(&step);
        let logits = self.model.forward(&step)?;
        drop(batch);
        self.stats.steps.fetch_add(1, Relaxed);
        // 3. Each sequence reads its rows.
        let guesses = self.stats.guesses();
        let sampling = profile::time(Op::Sampling);
        let running = self.scheduler.running_mut();
        let outcomes = match &logits {
            None => choose(&plan, running, &[], 1),
            Some(logits) => {
                let vocab_size = logits.dims2()?.1;
                let read = |logits: &[f32]| Ok(choose(&plan, running, logits, vocab_size));
                with_f32(logits, "sampling", read)?
            }
        };
        drop(sampling);
        for (part, outcome) in plan.iter().zip(outcomes) {
            let sequence = &mut self.scheduler.running_mut()[part.index];
            let reason = outcome.map(|outcome| advance(sequence, *part, outcome, &self.stats));
            sequence.request.ending = match reason {
                Ok(reason) => reason.map(Ending::Finished),
                Err(error) => Some(Ending::Failed(error.to_string())),
            };
        }
        self.pace.observe(load, now.elapsed());
        if plan.iter().all(|part| part.num_tokens == 1) {
            let newest = self.stats.guesses();
            let guesses = (newest.0 - guesses.0, newest.1 - guesses.1);
            self.guessing.observe(load.rows, now.elapsed(), guesses);
        }
        // 4. Those that are done leave.
        let ended = self.scheduler.remove(|sequence| sequence.request.ending.is_some());
        drop(whole); // Who hears of an end finds its step noted.
        self.end(ended, |request| request.ending.take());
        Ok(())
    }

    /// Those that have their first rows in this step have waited until `now`.
    fn note_started(&mut self, plan: &[Scheduled], now: Instant) {
        for part in plan {
            let sequence = &mut self.scheduler.running_mut()[part.index];
            if sequence.request.started.is_some() {
                continue;
            }
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

/// The step over `part` of `sequence` is done, with this `outcome`: keeps it and tells it. `Some` when the
/// sequence is done.
fn advance(
    sequence: &mut Sequence<Request>,
    part: Scheduled,
    outcome: Outcome,
    stats: &EngineStats,
) -> Option<FinishReason> {
    sequence.advance(part.num_tokens);
    outcome.scores.into_iter().for_each(|score| sequence.push_score(score));
    if let Some(scores) = sequence.take_complete_scores() {
        sequence.request.send(GenerationEvent::PromptScores(scores));
    }
    let num_tokens = outcome.tokens.len();
    if num_tokens == 0 {
        let is_done = sequence.num_remaining_tokens() == 0; // Nothing but scores was wanted.
        return is_done.then_some(FinishReason::Length);
    }
    let mut is_stop = false;
    for (place, Chosen { id, logprobs }) in outcome.tokens.into_iter().enumerate() {
        if place > 0 {
            // The token before was guessed right, so this step has run it already.
            sequence.advance(1);
        }
        sequence.push(id);
        sequence.request.first_token.get_or_insert_with(Instant::now);
        sequence.request.send(GenerationEvent::Token { id, logprobs });
        is_stop = sequence.request.stop_token_ids.contains(&id);
    }
    let num_right = num_tokens - 1;
    stats.draft_tokens.fetch_add(sequence.drafts().len() as u64, Relaxed);
    stats.accepted_tokens.fetch_add(num_right as u64, Relaxed);
    stats.generation_tokens.fetch_add(num_tokens as u64, Relaxed);
    sequence.end_drafts(num_right);
    let is_full = sequence.is_complete().then_some(FinishReason::Length);
    if is_stop { Some(FinishReason::Stop) } else { is_full }
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
