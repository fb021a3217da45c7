//! The loop.

mod advance;
mod best;
mod compare;
mod pause;

pub(super) use advance::{Position, Turn};

use std::{
    path::PathBuf,
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
    validation::{self, measure, rotation},
    work_dir,
    workers::Workers,
    workspace::Workspace,
};
use crate::data::Example;
use crate::model::Dropout;
use crate::ops::release_freed_memory;
use crate::publish::disk;

/// Models with more parameters than this keep all cores busy with one micro-batch.
const MAX_PARALLEL_PARAMETERS: usize = 60_000_000;
const MAX_WORKERS: usize = 8;
/// Sequences by which training and serving are compared.
const NUM_COMPARED: usize = 8;
/// A loss above this many times the median of the last steps is a spike.
const SPIKE_FACTOR: f64 = 3.0;
/// So many steps with a gradient of exactly 0 are no accident.
const DEAD_STEPS: usize = 5;
/// Steps whose median that is; fewer at the start of a run.
const SPIKE_WINDOW: usize = 20;

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

    /// Ends a run whose gradient has become nothing. Warns when the loss has been far above its median
    /// for `spike_steps` steps, and ends the run there if that is wanted. The newest good checkpoint
    /// stays.
    fn watch_for_spikes(&mut self) -> Result<(), TrainError> {
        let config = &self.job.config;
        if let Some(loss) = report::no_slope(self.log.events(), DEAD_STEPS) {
            return Err(TrainError::NoSlope { step: self.step, steps: DEAD_STEPS, loss });
        }
        let Some((median, loss)) =
            report::spike(self.log.events(), SPIKE_WINDOW, SPIKE_FACTOR, config.spike_steps)
        else {
            return Ok(());
        };
        let (step, steps) = (self.step, config.spike_steps);
        if config.stop_on_spike {
            return Err(TrainError::LossSpike { step, steps, loss, median });
        }
        let message = format!(
            "the loss is {loss:.3} at step {step} and has been above {SPIKE_FACTOR} times its median \
             ({median:.3}) for {steps} steps; a lower lr or a longer warm-up may help"
        );
        self.say(TrainEvent::Warning { message })
    }

    /// Loss and accuracy on the validation examples: all of them, or the next few.
    fn validate(&mut self, full: bool) -> Result<(), TrainError> {
        let begun = Instant::now();
        let (config, valid) = (&self.job.config, &self.job.valid);
        let chosen = if full || valid.is_empty() {
            (0..valid.len()).collect()
        } else {
            rotation(config, valid.len(), self.step)
        };
        let reference = &self.reference.1;
        let (model, workers) = (&self.model, &self.workers);
        let Some(measured) = measure(model, workers, config, valid, reference, &chosen)? else {
            return Ok(());
        };
        let full = chosen.len() == valid.len();
        let seconds = begun.elapsed().as_secs_f64();
        self.say(validation::event(config, self.step, full, measured, seconds))?;
        self.generate()
    }

    /// Has answers to validation rows generated, where that is wanted.
    fn generate(&mut self) -> Result<(), TrainError> {
        let Some(examiner) = self.examiner.take() else { return Ok(()) };
        let (begun, step) = (Instant::now(), self.step);
        let answered = if self.job.config.eval_generate == 0 {
            Ok(None)
        } else {
            self.as_candidate(&[], |candidate| examiner.generate(candidate)).map(Some)
        };
        self.examiner = Some(examiner);
        let Some(generated) = answered? else { return Ok(()) };
        self.say(TrainEvent::Generated {
            step,
            num_rows: generated.num_rows,
            exact_match: generated.exact_match,
            f1: generated.f1,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    /// Shows the adapter or model as it is now to `ask`, in a folder that is gone afterwards.
    fn as_candidate<T>(
        &self,
        scored: &[Scored<'_>],
        ask: impl FnOnce(&Candidate<'_>) -> Result<T, String>,
    ) -> Result<T, TrainError> {
        let folder = self.workspace.as_ref().map(Workspace::candidate);
        if let Some(dir) = &folder {
            disk::create_dir_all(dir)?;
            match &self.model.adapter {
                Some(adapter) => adapter.write(dir, &self.job.config.model)?,
                None => drop(output::write_model(self.job, &self.model, dir)?),
            }
        }
        let answer = ask(&Candidate {
            job: self.job,
            decoder: &self.model.decoder,
            folder: folder.as_deref(),
            from_random: self.model.from_random,
            events: self.log.events(),
            scored,
        });
        if let Some(dir) = &folder {
            // The next one is written over it.
            if let Err(error) = disk::remove_dir_all(dir) {
                tracing::warn!("{error}");
            }
        }
        answer.map_err(|reason| TrainError::Examination { step: self.step, reason })
    }

    /// What the examiner says of what is about to be published.
    fn examine(&mut self, scored: &[Scored<'_>]) -> Result<Examination, TrainError> {
        let Some(examiner) = self.examiner.take() else { return Ok(Examination::default()) };
        let examination = self.as_candidate(scored, |candidate| examiner.examine(candidate))?;
        self.say_parity(&examination)?;
        Ok(examination)
    }

    /// Validates on all rows, unless that was done after this step.
    fn validate_fully(&mut self) -> Result<(), TrainError> {
        let done = |event: &TrainEvent| matches!(event, TrainEvent::Validated { step, full: true, .. } if *step == self.step);
        if self.log.events().iter().any(done) { Ok(()) } else { self.validate(true) }
    }

    /// Validates and publishes what there is after this epoch, if that is wanted.
    fn end_epoch(&mut self) -> Result<(), TrainError> {
        let config = &self.job.config;
        let Some(dir) = &config.epoch_dir else { return Ok(()) };
        self.validate_fully()?;
        self.compare(false)?;
        let path = epochs::folder(dir, self.step);
        output::publish(&self.finished(), &path)?;
        if let Err(error) = epochs::prune(dir, self.step, config.keep_epochs) {
            self.say(TrainEvent::Warning { message: error.to_string() })?;
        }
        let epoch = self.step.div_ceil(self.plan.steps_per_epoch());
        self.say(TrainEvent::Epoch { step: self.step, epoch, path })
    }

    /// Goes back to the newest good checkpoint, if there is one.
    fn resume(&mut self) -> Result<(), TrainError> {
        let Some(workspace) = &self.workspace else { return Ok(()) };
        let mut skipped = Vec::new();
        let mut remember = |reason: &TrainError| skipped.push(reason.to_string());
        let found = checkpoint::newest_checkpoint(&workspace.checkpoints(), &mut remember)?;
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
        let Some(workspace) = &self.workspace else { return Ok(()) };
        let folder = workspace.checkpoints();
        let path = checkpoint::write_checkpoint(
            &folder,
            self.step,
            &self.optimizer,
            &self.recipe,
            &self.log,
        )?;
        self.last_checkpoint = (Instant::now(), self.step);
        self.say(TrainEvent::Checkpointed { step: self.step, path })?;
        // The new one is whole: old ones that stay cost room and nothing else.
        match checkpoint::prune_checkpoints(&folder) {
            Ok(()) => Ok(()),
            Err(error) => self.say(TrainEvent::Warning { message: error.to_string() }),
        }
    }

    /// Ends with a checkpoint instead of an output.
    fn stop(mut self) -> Result<TrainSummary, TrainError> {
        if self.last_checkpoint.1 < self.step || self.step == 0 {
            self.write_checkpoint()?;
        }
        self.say(TrainEvent::Stopped { step: self.step })?;
        let path = work_dir(&self.job.config.output);
        Ok(self.summary(Outcome::Stopped, path, String::new()))
    }

    /// Validates, publishes the output folder and removes the work folder.
    fn publish(mut self, outcome: Outcome) -> Result<TrainSummary, TrainError> {
        release_freed_memory();
        self.validate_fully()?;
        self.end_epoch()?;
        self.restore_best(outcome)?;
        let config = &self.job.config;
        // What is examined are the weights that are published.
        self.model.round(config.dtype)?;
        let compared = if self.examiner.is_some() { NUM_COMPARED } else { 0 };
        let wanted = self.job.valid.iter().chain(&self.job.train);
        let wanted = wanted.take(config.parity_examples.max(compared));
        let scored = parity::score(&self.model, wanted)?;
        let examination = self.examine(&scored)?;
        let given = &scored[..config.parity_examples.min(scored.len())];
        let parity = (config.parity_examples > 0).then(|| parity::text(given));
        let finished = output::Finished { parity, examination, ..self.finished() };
        let digest = output::publish(&finished, &config.output)?;
        let path = config.output.clone();
        let said = self.say(TrainEvent::Published { step: self.step, path: path.clone() });
        let workspace = self.workspace.take().filter(|_| !config.keep_work);
        let removed = workspace.map_or(Ok(()), Workspace::remove);
        // The output is there: what fails from here on is not the run.
        for error in [said, removed].into_iter().filter_map(Result::err) {
            (self.observer)(&TrainEvent::Warning { message: error.to_string() });
        }
        Ok(self.summary(outcome, path, digest))
    }

    /// What is to be published now.
    fn finished(&self) -> output::Finished<'_> {
        output::Finished {
            job: self.job,
            model: &self.model,
            recipe: &self.recipe,
            log: &self.log,
            step: self.step,
            total_steps: self.schedule.total_steps,
            seconds: self.started.elapsed().as_secs_f64(),
            parity: None,
            examination: Examination::default(),
        }
    }

    fn summary(&self, outcome: Outcome, path: PathBuf, digest: String) -> TrainSummary {
        TrainSummary {
            outcome,
            step: self.step,
            total_steps: self.schedule.total_steps,
            best_step: report::best_step(self.log.events()),
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

fn check_examples(job: &TrainJob, vocab_size: usize) -> Result<(), TrainError> {
    if job.train.is_empty() {
        return Err(TrainError::NoExamples("the data has no examples"));
    }
    let wants_pairs = job.config.objective.wants_pairs();
    for example in job.train.iter().chain(&job.valid) {
        if example.rejected.is_some() != wants_pairs {
            return Err(TrainError::NoExamples(
                "pairs of answers are for dpo and orpo, and only for them",
            ));
        }
    }
    for example in job.train.iter().chain(&job.valid).flat_map(Example::sides) {
        if let Some(&token) = example.tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(TrainError::Vocabulary { line: example.line, token, vocab_size });
        }
    }
    // A step whose window has no trained token would divide by zero.
    let untrained = |example: &Example| !example.loss_mask.iter().skip(1).any(|&counts| counts);
    let pairs = job.valid.iter().filter(|_| wants_pairs);
    if job.train.iter().chain(pairs).flat_map(Example::sides).any(untrained) {
        return Err(TrainError::NoExamples("an example has no trained token"));
    }
    Ok(())
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

/// Dropout (and noise on embeddings) of micro-batch `index` of a step: a function of the seed, so that a
/// resumed run drops the same.
fn dropout(config: &TrainConfig, step: usize, index: usize) -> Option<Dropout> {
    let seed = [config.seed, step as u64, index as u64].into_iter().fold(0, mix);
    let (probability, neftune_alpha) = (config.dropout as f32, config.neftune_alpha as f32);
    (probability > 0.0 || neftune_alpha > 0.0).then_some(Dropout {
        probability,
        neftune_alpha,
        seed,
    })
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
