//! The loop.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use super::{
    AdamW, AdamWConfig, BatchPlan, EventLog, Gradients, Outcome, Schedule, TrainConfig, TrainError,
    TrainEvent, TrainJob, TrainSummary,
    batches::{MicroBatch, split_by_tokens},
    checkpoint, clip_factor, output,
    recipe::Recipe,
    report,
    schedule::warmup_steps,
    trainable::Trainable,
    work_dir,
    workers::Workers,
    workspace::Workspace,
};
use crate::data::Example;
use crate::model::Dropout;

/// Models with more parameters than this keep all cores busy with one micro-batch.
const MAX_PARALLEL_PARAMETERS: usize = 60_000_000;
const MAX_WORKERS: usize = 8;

/// Trains as `job` says and publishes the output. `observer` hears of every event; when `stop`
/// becomes true, the run ends with a checkpoint at the last step border.
///
/// The numbers depend on the job alone, so a run that was killed and resumed publishes the same
/// bits as one that was not (a `time_limit` excepted, which looks at the clock).
///
/// # Errors
/// Every [`TrainError`]. Checkpoints made before stay where they are.
pub fn run(
    job: &TrainJob,
    observer: &mut dyn FnMut(&TrainEvent),
    stop: &AtomicBool,
) -> Result<TrainSummary, TrainError> {
    job.config.validate()?;
    if let Some(summary) = output::check(job)? {
        return Ok(summary);
    }
    let mut trainer = Trainer::new(job, observer)?;
    let outcome = trainer.train(stop)?;
    if outcome == Outcome::Stopped {
        return trainer.stop();
    }
    trainer.publish(outcome)
}

/// One run.
struct Trainer<'a> {
    job: &'a TrainJob,
    observer: &'a mut dyn FnMut(&TrainEvent),
    workspace: Workspace,
    model: Trainable,
    optimizer: AdamW,
    gradients: Gradients,
    workers: Workers,
    plan: BatchPlan,
    schedule: Schedule,
    /// What a checkpoint must agree on.
    recipe: Recipe,
    /// Everything that happened, over all resumptions.
    log: EventLog,
    /// Optimizer steps made.
    step: usize,
    started: Instant,
    /// When and after which step the last checkpoint was made.
    last_checkpoint: (Instant, usize),
}

impl<'a> Trainer<'a> {
    /// Loads the model and, to resume, the newest good checkpoint.
    fn new(
        job: &'a TrainJob,
        observer: &'a mut dyn FnMut(&TrainEvent),
    ) -> Result<Self, TrainError> {
        let started = Instant::now();
        let config = &job.config;
        let workspace = Workspace::open(&config.output)?;
        let model = Trainable::load(&job.model_dir, config)?;
        check_examples(job, model.decoder.config().vocab_size)?;
        let plan = BatchPlan {
            num_examples: job.train.len(),
            batch_size: config.batch_size,
            micro_batch_tokens: config.micro_batch_tokens,
            seed: config.seed,
            shuffle: config.shuffle,
        };
        let total_steps = total_steps(&plan, config.epochs, config.max_steps);
        let schedule = Schedule {
            kind: config.schedule,
            peak: config.learning_rate(model.from_random),
            warmup_steps: warmup_steps(config.warmup_steps, config.warmup_ratio, total_steps),
            total_steps,
        };
        let optimizer = AdamW::new(
            AdamWConfig {
                beta1: config.beta1,
                beta2: config.beta2,
                epsilon: 1e-8,
                weight_decay: config.weight_decay,
            },
            model.parameters(),
        );
        let mut trainer = Self {
            gradients: Gradients::new(optimizer.parameters()),
            workers: Workers::new(num_workers(&model))?,
            recipe: Recipe::new(job, &model, &schedule),
            log: EventLog::default(),
            step: 0,
            last_checkpoint: (started, 0),
            job,
            observer,
            workspace,
            model,
            optimizer,
            plan,
            schedule,
            started,
        };
        if config.resume {
            trainer.resume()?;
        }
        trainer.workspace.rewrite_events(trainer.log.text())?;
        trainer.say_started()?;
        Ok(trainer)
    }

    /// Steps until there are no more, the time is up or `stop` is set.
    fn train(&mut self, stop: &AtomicBool) -> Result<Outcome, TrainError> {
        let config = &self.job.config;
        let limit = config.time_limit.map(|minutes| Duration::from_secs_f64(minutes * 60.0));
        while self.step < self.schedule.total_steps {
            if limit.is_some_and(|limit| self.started.elapsed() >= limit) {
                return Ok(Outcome::TimeLimit);
            }
            if !self.make_step(stop)? {
                return Ok(Outcome::Stopped);
            }
            let at_end = self.step == self.schedule.total_steps;
            if config.eval_every > 0 && self.step.is_multiple_of(config.eval_every) && !at_end {
                self.validate()?;
            }
            let (made, step) = self.last_checkpoint;
            let overdue = made.elapsed() >= Duration::from_secs(config.checkpoint_seconds);
            if self.step - step >= config.checkpoint_every || overdue {
                self.write_checkpoint()?;
            }
        }
        Ok(Outcome::Finished)
    }

    /// One optimizer step: forward and backward over its micro-batches, clip, update. Returns false
    /// if `stop` was set on the way; nothing has changed then.
    fn make_step(&mut self, stop: &AtomicBool) -> Result<bool, TrainError> {
        let begun = Instant::now();
        let micro_batches = self.plan.micro_batches(&self.job.train, self.step);
        // The loss is one mean over all trained tokens of the window, however it is cut.
        let num_trained: usize = micro_batches.iter().map(|batch| batch.rows.len()).sum();
        self.gradients.clear();
        let (mut nll_sum, mut num_correct, mut stopped) = (0.0, 0.0, false);
        let (model, parameters) = (&self.model, self.optimizer.parameters());
        let (config, step) = (&self.job.config, self.step);
        let forward_and_backward = |index: usize, batch: &MicroBatch| {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let loss = model.forward(batch, dropout(config, step, index))?;
            let nll = loss.nll()?;
            let scaled = (loss.nll_sum / num_trained as f64)?;
            Ok(Some((nll, loss.num_correct, scaled.backward()?)))
        };
        self.workers.in_order(&micro_batches, forward_and_backward, |result| {
            let Some((nll, correct, store)) = result else {
                stopped = true;
                return Ok(());
            };
            nll_sum += nll;
            num_correct += correct;
            self.gradients.add(parameters, store)
        })?;
        if stopped {
            return Ok(false);
        }
        let loss = finite("loss", nll_sum / num_trained as f64, self.step)?;
        let grad_norm = finite("gradient norm", self.gradients.norm(), self.step)?;

        let learning_rate = self.schedule.learning_rate(self.step);
        let scale = clip_factor(grad_norm, self.job.config.grad_clip);
        self.optimizer.step(self.gradients.sums(), scale, learning_rate)?;
        self.step += 1;
        self.say(TrainEvent::Step {
            step: self.step,
            epoch: self.step as f64 / self.plan.steps_per_epoch() as f64,
            loss,
            token_accuracy: num_correct / num_trained as f64,
            learning_rate,
            grad_norm,
            num_tokens: micro_batches.iter().map(|batch| batch.tokens.len()).sum(),
            num_trained_tokens: num_trained,
            seconds: begun.elapsed().as_secs_f64(),
        })?;
        Ok(true)
    }

    /// Loss and accuracy on the validation examples, weighted by token. No gradient, no dropout.
    fn validate(&mut self) -> Result<(), TrainError> {
        let begun = Instant::now();
        let examples: Vec<&Example> = self.job.valid.iter().collect();
        let runs = split_by_tokens(&examples, self.plan.micro_batch_tokens);
        let batches = runs.into_iter().map(|range| MicroBatch::new(&examples[range]));
        let batches: Vec<_> = batches.filter(|batch| !batch.rows.is_empty()).collect();
        let num_trained: usize = batches.iter().map(|batch| batch.rows.len()).sum();
        let model = &self.model;
        let forward = |_, batch: &MicroBatch| {
            let loss = model.forward(batch, None)?;
            Ok((loss.nll()?, loss.num_correct))
        };
        let (mut nll_sum, mut num_correct) = (0.0, 0.0);
        self.workers.in_order(&batches, forward, |(nll, correct)| {
            nll_sum += nll;
            num_correct += correct;
            Ok(())
        })?;
        if num_trained == 0 {
            return Ok(());
        }
        let loss = nll_sum / num_trained as f64;
        self.say(TrainEvent::Validated {
            step: self.step,
            loss,
            perplexity: loss.exp(),
            token_accuracy: num_correct / num_trained as f64,
            num_trained_tokens: num_trained,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    /// Goes back to the newest good checkpoint, if there is one.
    fn resume(&mut self) -> Result<(), TrainError> {
        let mut skipped = Vec::new();
        let mut remember = |reason: &TrainError| skipped.push(reason.to_string());
        let found = checkpoint::newest_checkpoint(&self.workspace.checkpoints(), &mut remember)?;
        if let Some(mut checkpoint) = found {
            self.recipe.check(&checkpoint.recipe, &checkpoint.path)?;
            self.log = std::mem::take(&mut checkpoint.log);
            self.step = checkpoint.step;
            self.last_checkpoint = (Instant::now(), self.step);
            checkpoint.restore(&mut self.optimizer)?;
        }
        for reason in skipped {
            let message = format!("a checkpoint is not usable and was passed over: {reason}");
            self.say(TrainEvent::Warning { message })?;
        }
        Ok(())
    }

    fn write_checkpoint(&mut self) -> Result<(), TrainError> {
        let folder = self.workspace.checkpoints();
        let path = checkpoint::write_checkpoint(
            &folder,
            self.step,
            &self.optimizer,
            &self.recipe,
            &self.log,
        )?;
        self.last_checkpoint = (Instant::now(), self.step);
        self.say(TrainEvent::Checkpointed { step: self.step, path })
    }

    /// Ends with a checkpoint instead of an output.
    fn stop(mut self) -> Result<TrainSummary, TrainError> {
        if self.last_checkpoint.1 < self.step || self.step == 0 {
            self.write_checkpoint()?;
        }
        let path = work_dir(&self.job.config.output);
        Ok(self.summary(Outcome::Stopped, path, String::new()))
    }

    /// Validates, publishes the output folder and removes the work folder.
    fn publish(mut self, outcome: Outcome) -> Result<TrainSummary, TrainError> {
        let validated = |event: &TrainEvent| matches!(event, TrainEvent::Validated { step, .. } if *step == self.step);
        if !self.log.events().iter().any(validated) {
            self.validate()?;
        }
        let config = &self.job.config;
        let digest = output::publish(&output::Finished {
            job: self.job,
            model: &self.model,
            recipe: &self.recipe,
            log: &self.log,
            step: self.step,
            total_steps: self.schedule.total_steps,
            seconds: self.started.elapsed().as_secs_f64(),
        })?;
        let path = config.output.clone();
        self.say(TrainEvent::Published { step: self.step, path: path.clone() })?;
        let summary = self.summary(outcome, path, digest);
        if !config.keep_work {
            self.workspace.remove()?;
        }
        Ok(summary)
    }

    fn summary(&self, outcome: Outcome, path: PathBuf, digest: String) -> TrainSummary {
        TrainSummary {
            outcome,
            step: self.step,
            total_steps: self.schedule.total_steps,
            loss: report::last_loss(self.log.events()),
            valid: report::last_validation(self.log.events()),
            path,
            digest,
            seconds: self.started.elapsed().as_secs_f64(),
        }
    }

    fn say_started(&mut self) -> Result<(), TrainError> {
        let parameters = self.optimizer.parameters();
        let event = TrainEvent::Started {
            step: self.step,
            total_steps: self.schedule.total_steps,
            num_examples: self.job.train.len(),
            num_valid_examples: self.job.valid.len(),
            num_parameters: self.model.decoder.num_parameters(),
            num_trained_parameters: parameters.iter().map(|(_, var)| var.elem_count()).sum(),
            learning_rate: self.schedule.peak,
        };
        self.say(event)
    }

    fn say(&mut self, event: TrainEvent) -> Result<(), TrainError> {
        (self.observer)(&event);
        let line = self.log.push(event);
        self.workspace.append_event(&line)
    }
}

/// Micro-batches at once. Only where their activations are small: each worker has its own.
fn num_workers(model: &Trainable) -> usize {
    let small = model.decoder.num_parameters() < MAX_PARALLEL_PARAMETERS;
    if small { rayon::current_num_threads().min(MAX_WORKERS) } else { 1 }
}

fn check_examples(job: &TrainJob, vocab_size: usize) -> Result<(), TrainError> {
    if job.train.is_empty() {
        return Err(TrainError::NoExamples("the data has no examples"));
    }
    for example in job.train.iter().chain(&job.valid) {
        if let Some(&token) = example.tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(TrainError::Vocabulary { line: example.line, token, vocab_size });
        }
    }
    // A step whose window has no trained token would divide by zero.
    let untrained = |example: &Example| !example.loss_mask.iter().skip(1).any(|&counts| counts);
    if job.train.iter().any(untrained) {
        return Err(TrainError::NoExamples("an example has no trained token"));
    }
    Ok(())
}

fn total_steps(plan: &BatchPlan, epochs: f64, max_steps: Option<usize>) -> usize {
    let steps = (plan.steps_per_epoch() as f64 * epochs).ceil() as usize;
    max_steps.unwrap_or(steps.max(1))
}

/// Dropout of micro-batch `index` of a step: a function of the seed, so that a resumed run drops the
/// same.
fn dropout(config: &TrainConfig, step: usize, index: usize) -> Option<Dropout> {
    let seed = [config.seed, step as u64, index as u64].into_iter().fold(0, mix);
    let probability = config.dropout as f32;
    (probability > 0.0).then_some(Dropout { probability, seed })
}

/// `value` if it is a number to go on with; `step` counts from 0.
fn finite(what: &'static str, value: f64, step: usize) -> Result<f64, TrainError> {
    if value.is_finite() {
        Ok(value)
    } else {
        Err(TrainError::NotFinite { what, value, step: step + 1 })
    }
}

/// Mixes `value` into a hash (the finalizer of SplitMix64).
fn mix(hash: u64, value: u64) -> u64 {
    let mut mixed = (hash ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
