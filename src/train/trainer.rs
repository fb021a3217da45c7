//! The loop.

mod advance;
mod best;
mod compare;
mod dropout;
mod examples;
mod keep;
mod pause;
mod publish;
mod validate;
mod watch;

pub(super) use advance::{Position, Turn};
use dropout::dropout;
use examples::check_examples;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use super::{
    AdamW, AdamWConfig, Base, BatchPlan, Candidate, EventLog, Examination, Examiner, Gradients,
    Outcome, Schedule, Scored, Surroundings, TrainConfig, TrainError, TrainEvent, TrainJob,
    TrainSummary, checkpoint, clip_factor, epochs,
    objective::{PairLogProbs, Part, Sums, parts, references},
    output, parity,
    recipe::Recipe,
    report,
    schedule::warmup_steps,
    trainable::Trainable,
    validation, work_dir,
    workers::Workers,
    workspace::Workspace,
};
use crate::ops::keep_freed_memory;

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
    run_with(job, observer, Surroundings::default(), stop)
}

/// [`run`], with somebody who examines what is trained, and with a pause.
///
/// # Errors
/// Every [`TrainError`].
pub fn run_with<'a>(
    job: &'a TrainJob,
    observer: &'a mut dyn FnMut(&TrainEvent),
    surroundings: Surroundings<'a>,
    stop: &AtomicBool,
) -> Result<TrainSummary, TrainError> {
    job.config.validate()?;
    if let Some(summary) = output::check(job)? {
        let (step, path) = (summary.step, summary.path.clone());
        observer(&TrainEvent::Published { step, path });
        return Ok(summary);
    }
    let workspace = Workspace::open(&job.config.output)?;
    let mut trainer = Trainer::new(job, Some(workspace), observer, None, stop)?;
    trainer.examiner = surroundings.examiner;
    trainer.pause = surroundings.pause;
    let outcome = trainer.train(stop)?;
    if outcome == Outcome::Stopped {
        return trainer.stop();
    }
    trainer.publish(outcome)
}

/// Makes the first `num_steps` optimizer steps of `job`, as [`run`] would, and forgets them: nothing
/// is written. `observer` hears what they cost.
///
/// # Errors
/// Every [`TrainError`] that a run can meet up to there.
pub fn rehearse(
    job: &TrainJob,
    num_steps: usize,
    observer: &mut dyn FnMut(&TrainEvent),
    stop: &AtomicBool,
) -> Result<(), TrainError> {
    job.config.validate()?;
    let mut trainer = Trainer::new(job, None, observer, None, stop)?;
    while trainer.step < num_steps.min(trainer.schedule.total_steps) && trainer.make_step(stop)? {}
    Ok(())
}

/// One run.
struct Trainer<'a> {
    job: &'a TrainJob,
    observer: &'a mut dyn FnMut(&TrainEvent),
    /// Who can serve what is trained, if anybody.
    examiner: Option<&'a mut dyn Examiner>,
    /// While it is true, the run waits.
    pause: Option<&'a AtomicBool>,
    /// The steps after which it goes no further for now.
    until: usize,
    /// Where things are written; `None` in a rehearsal.
    workspace: Option<Workspace>,
    model: Trainable,
    optimizer: AdamW,
    gradients: Gradients,
    workers: Workers,
    plan: BatchPlan,
    schedule: Schedule,
    /// What the adapter at the start says of training and validation pairs; empty without pairs.
    reference: (Vec<PairLogProbs>, Vec<PairLogProbs>),
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
        workspace: Option<Workspace>,
        observer: &'a mut dyn FnMut(&TrainEvent),
        base: Option<&Base>,
        stop: &AtomicBool,
    ) -> Result<Self, TrainError> {
        let started = Instant::now();
        let config = &job.config;
        best::check(job)?;
        let model = match base {
            Some(base) => base.trainable(config)?,
            None => Trainable::load(&job.model_dir, config)?,
        };
        check_examples(job, model.decoder.config().vocab_size)?;
        if workspace.is_some() {
            epochs::prepare(config)?;
        }
        // After the model is read: what that left behind is free for the steps, too.
        keep_freed_memory(usize::MAX);
        let workers = Workers::new(num_workers(model.decoder.num_parameters()))?;
        // Before a checkpoint is read: the parameters are still those of the start, so a resumed run
        // compares with the same numbers.
        let at_start = match base {
            Some(base) => base.references(&model, &workers, job, stop)?,
            None => references(&model, &workers, job, stop)?,
        };
        let plan = BatchPlan::new(config, &job.train);
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
            workers,
            reference: at_start,
            recipe: Recipe::new(job, &model, &schedule),
            log: EventLog::default(),
            step: 0,
            last_checkpoint: (started, 0),
            job,
            observer,
            examiner: None,
            pause: None,
            until: total_steps,
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
        if let Some(workspace) = &mut trainer.workspace {
            workspace.rewrite_events(trainer.log.text())?;
        }
        trainer.say_started()?;
        Ok(trainer)
    }

    /// Steps until there are no more, the time is up or `stop` is set.
    fn train(&mut self, stop: &AtomicBool) -> Result<Outcome, TrainError> {
        let config = &self.job.config;
        let limit = config.time_limit.map(|minutes| Duration::from_secs_f64(minutes * 60.0));
        while self.step < self.until {
            self.wait_while_paused(stop)?;
            if limit.is_some_and(|limit| self.started.elapsed() >= limit) {
                return Ok(Outcome::TimeLimit);
            }
            if !self.make_step(stop)? {
                return Ok(Outcome::Stopped);
            }
            self.watch_for_spikes()?;
            let at_end = self.step == self.schedule.total_steps;
            let at_epoch = self.step.is_multiple_of(self.plan.steps_per_epoch());
            if at_epoch && config.epoch_dir.is_some() && !at_end {
                self.end_epoch()?;
            } else if config.eval_every > 0
                && self.step.is_multiple_of(config.eval_every)
                && !at_end
            {
                self.validate(false)?;
            }
            if self.weigh()? {
                return Ok(Outcome::EarlyStopped);
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
        let batches = self.plan.micro_batches(&self.job.train, self.step);
        let references = self.plan.examples_of_step(self.step).into_iter();
        let references = references.filter_map(|index| self.reference.0.get(index).copied());
        let (config, step) = (&self.job.config, self.step);
        let parts = parts(config, batches, references);
        // The loss is one mean over all units of the window, however it is cut.
        let num_units: usize = parts.iter().map(|part| part.num_units(config.objective)).sum();
        self.gradients.clear();
        let (mut sums, mut stopped) = (Sums::default(), false);
        let (model, parameters) = (&self.model, self.optimizer.parameters());
        let recompute = config.recompute.into();
        let forward_and_backward = |index: usize, part: &Part| {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let dropout = dropout(config, step, index);
            let (losses, pass) = model.forward_to_train(&part.batch, dropout, recompute)?;
            let (sums, loss) = part.loss(model, &losses, config)?;
            drop(losses);
            let of_loss = (loss / num_units as f64)?.backward()?;
            Ok(Some((sums, pass.backward(of_loss)?)))
        };
        self.workers.in_order(&parts, forward_and_backward, |result| {
            let Some((of_part, store)) = result else {
                stopped = true;
                return Ok(());
            };
            sums.add(of_part);
            self.gradients.add(parameters, store)
        })?;
        if stopped {
            return Ok(false);
        }
        let loss = finite("loss", sums.loss / num_units as f64, self.step)?;
        let grad_norm = finite("gradient norm", self.gradients.norm(), self.step)?;

        let learning_rate = self.schedule.learning_rate(self.step);
        let scale = clip_factor(grad_norm, config.grad_clip);
        self.optimizer.step(self.gradients.sums(), scale, learning_rate)?;
        self.step += 1;
        self.say(TrainEvent::Step {
            step: self.step,
            epoch: self.step as f64 / self.plan.steps_per_epoch() as f64,
            loss,
            token_accuracy: sums.num_correct / num_units as f64,
            learning_rate,
            grad_norm,
            num_tokens: parts.iter().map(|part| part.batch.tokens.len()).sum(),
            num_trained_tokens: parts.iter().map(|part| part.batch.rows.len()).sum(),
            rewards: sums.rewards(config.objective),
            seconds: begun.elapsed().as_secs_f64(),
        })?;
        Ok(true)
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
        match &mut self.workspace {
            Some(workspace) => workspace.append_event(&line),
            None => Ok(()),
        }
    }
}

/// Micro-batches at once, for a model of so many parameters. Only where their activations are small:
/// each worker has its own.
#[must_use]
pub fn num_workers(num_parameters: usize) -> usize {
    let small = num_parameters < MAX_PARALLEL_PARAMETERS;
    if small { rayon::current_num_threads().min(MAX_WORKERS) } else { 1 }
}

/// Optimizer steps of the whole run of `job`.
pub(super) fn total_steps_of(job: &TrainJob) -> usize {
    let plan = BatchPlan::new(&job.config, &job.train);
    total_steps(&plan, job.config.epochs, job.config.max_steps)
}

fn total_steps(plan: &BatchPlan, epochs: f64, max_steps: Option<usize>) -> usize {
    let steps = (plan.steps_per_epoch() as f64 * epochs).ceil() as usize;
    max_steps.unwrap_or(steps.max(1))
}

/// `value` if it is a number to go on with; `step` counts from 0.
fn finite(what: &'static str, value: f64, step: usize) -> Result<f64, TrainError> {
    if value.is_finite() {
        Ok(value)
    } else {
        Err(TrainError::NotFinite { what, value, step: step + 1 })
    }
}
