//! What a training process tells, as events, checkpoints and figures of the job. Written in pieces of
//! a tenth of a second, each step once however often the process was killed and began again.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use super::settings::{KEEP_EPOCHS, Places};
use crate::jobs::{
    Checkpoint, EventLevel, Job, JobEvent, JobsError, ModelRecord, Service, StoreError,
    Transaction, new_id, publish::model_name, step_metrics::StepMetrics, unix_seconds,
};
use crate::train::{EventLog, TrainEvent, work_dir};

/// Least time between two writes.
const WRITE_EVERY: Duration = Duration::from_millis(100);
/// Most steps of a job that become events.
const MAX_STEP_EVENTS: usize = 2000;
/// Things that wait to be written while the disk is full; beyond, the oldest steps are left out.
const MAX_NOTES: usize = 4000;

/// Something to write down.
enum Note {
    Step(StepMetrics),
    Epoch { metrics: StepMetrics, digest: String },
    Warning(String),
}

/// The progress of one training process.
pub(super) struct Progress<'a> {
    service: &'a Service,
    job: &'a Job,
    total_steps: Option<usize>,
    /// The last step: it waits for its validation, if there is one.
    current: Option<StepMetrics>,
    /// Steps up to this one are written down, or in `notes`.
    noted: usize,
    notes: Vec<Note>,
    written: Instant,
    /// When this process began, and after which step.
    begun: Option<(Instant, usize)>,
}

impl<'a> Progress<'a> {
    pub(super) fn new(service: &'a Service, job: &'a Job) -> Self {
        Self {
            service,
            job,
            total_steps: None,
            current: None,
            noted: usize::try_from(job.step).unwrap_or(usize::MAX),
            notes: Vec::new(),
            written: Instant::now(),
            begun: None,
        }
    }

    /// Takes a line of the process's output.
    pub(super) fn hear(&mut self, line: &str) {
        let Ok(event) = serde_json::from_str::<TrainEvent>(line) else {
            tracing::debug!(job = self.job.id, "not an event: {line}");
            return;
        };
        if let TrainEvent::Started { step, total_steps, .. } = event {
            self.total_steps = Some(total_steps);
            self.begun = Some((Instant::now(), step));
            // What the process before this one told when nobody could hear it any more.
            self.catch_up(&work_dir(&Places::of(self.service, &self.job.id).model()));
        }
        if let TrainEvent::Warning { message } = &event {
            self.notes.push(Note::Warning(message.clone()));
        }
        self.take(&event);
    }

    /// Takes what has not been heard of a run's own log in `dir`.
    pub(super) fn catch_up(&mut self, dir: &Path) {
        if let Ok(text) = fs::read_to_string(dir.join("events.jsonl")) {
            for event in EventLog::from_text(&text).events() {
                self.take(event);
            }
        }
    }

    fn take(&mut self, event: &TrainEvent) {
        match event {
            TrainEvent::Step { step, .. } => {
                if self.current.is_none_or(|current| current.step < *step) {
                    self.settle();
                    self.current = StepMetrics::of_step(event);
                    // Without validation there is nothing to wait for.
                    if self.job.validation_file.is_none() {
                        self.settle();
                    }
                }
            }
            TrainEvent::Validated { .. } => {
                if let Some(current) = &mut self.current {
                    current.add_validation(event);
                }
            }
            TrainEvent::Epoch { step, .. } => self.note_epoch(*step),
            TrainEvent::Started { .. }
            | TrainEvent::Checkpointed { .. }
            | TrainEvent::Stopped { .. }
            | TrainEvent::Warning { .. }
            | TrainEvent::Generated { .. }
            | TrainEvent::Parity { .. }
            | TrainEvent::Published { .. } => {}
        }
    }

    /// The last step has heard all that there is to say about it.
    fn settle(&mut self) {
        let Some(metrics) = self.current else { return };
        if metrics.step <= self.noted {
            return;
        }
        self.noted = metrics.step;
        let interval = self.total_steps.map_or(1, |total| total.div_ceil(MAX_STEP_EVENTS)).max(1);
        let is_special = metrics.any_valid().is_some() || Some(metrics.step) == self.total_steps;
        if is_special || metrics.step == 1 || metrics.step.is_multiple_of(interval) {
            self.notes.push(Note::Step(metrics));
        }
    }

    fn note_epoch(&mut self, step: usize) {
        self.settle();
        let Some(metrics) = self.current.filter(|metrics| metrics.step == step) else { return };
        let dir = Places::of(self.service, &self.job.id).epochs().join(format!("step-{step}"));
        // Removed already, since later ones came: then nobody misses it.
        if !dir.exists() {
            return;
        }
        self.notes.push(match self.service.parts.registry.read(&self.job.id, &dir) {
            Ok(version) => Note::Epoch { metrics, digest: version.adapter.digest().to_owned() },
            Err(error) => {
                Note::Warning(format!("The checkpoint of step {step} is unusable: {error}"))
            }
        });
    }

    /// Writes what is due. A full disk makes it wait.
    pub(super) fn write_if_due(&mut self) {
        if self.written.elapsed() >= WRITE_EVERY {
            self.write();
        }
    }

    /// Writes all that there is, at the end of the process.
    pub(super) fn write_all(&mut self) {
        self.settle();
        self.write();
    }

    fn write(&mut self) {
        self.written = Instant::now();
        if self.notes.is_empty() {
            return;
        }
        match self.service.store.write(|transaction| self.write_notes(transaction)) {
            Ok(gone) => {
                self.notes.clear();
                for model in gone {
                    self.service.parts.registry.unload(&model.id);
                    self.service.remove_model_dir(&model.path);
                }
            }
            Err(error) => {
                tracing::warn!(job = self.job.id, "the progress is not written yet: {error}");
                self.forget_oldest();
            }
        }
    }

    fn forget_oldest(&mut self) {
        let mut surplus = self.notes.len().saturating_sub(MAX_NOTES);
        self.notes.retain(|note| {
            let goes = surplus > 0 && matches!(note, Note::Step(_));
            surplus -= usize::from(goes);
            !goes
        });
    }

    /// Returns the models that are gone, but for their folders.
    fn write_notes(&self, transaction: &Transaction<'_>) -> Result<Vec<ModelRecord>, StoreError> {
        let Some(mut job) = transaction.get::<Job>(&self.job.id)? else { return Ok(Vec::new()) };
        let mut gone = Vec::new();
        for note in &self.notes {
            match note {
                Note::Step(metrics) => self.write_step(transaction, metrics)?,
                Note::Warning(message) => {
                    transaction.say(&job.id, EventLevel::Warn, message.as_str())?;
                }
                Note::Epoch { metrics, digest } => {
                    gone.extend(self.write_epoch(transaction, metrics, digest)?);
                }
            }
        }
        job.step = job.step.max(self.noted as u64);
        job.total_steps = self.total_steps.map(|total| total as u64).or(job.total_steps);
        job.estimated_finish = self.estimated_finish().or(job.estimated_finish);
        transaction.update(&job)?;
        Ok(gone)
    }

    fn write_step(
        &self,
        transaction: &Transaction<'_>,
        metrics: &StepMetrics,
    ) -> Result<(), StoreError> {
        transaction.insert(&JobEvent {
            id: new_id("ftevent-"),
            job_id: self.job.id.clone(),
            created_at: unix_seconds(),
            level: EventLevel::Info,
            message: metrics.message(self.total_steps.unwrap_or(metrics.step)),
            data: metrics.data(self.total_steps),
            is_metrics: true,
        })
    }

    /// Adds a checkpoint and its model, and forgets the oldest of too many: those that nothing needs, be it
    /// an alias or a job that starts from them.
    fn write_epoch(
        &self,
        transaction: &Transaction<'_>,
        metrics: &StepMetrics,
        digest: &str,
    ) -> Result<Vec<ModelRecord>, StoreError> {
        let step = metrics.step as u64;
        let known: Vec<Checkpoint> = transaction.all(&self.job.id)?;
        let name = model_name(self.service.config(), self.job);
        let model = ModelRecord {
            id: format!("{name}:ckpt-step-{step}"),
            job_id: self.job.id.clone(),
            created_at: unix_seconds(),
            path: format!("jobs/{}/epochs/step-{step}", self.job.id),
            digest: digest.to_owned(),
            is_checkpoint: true,
        };
        if known.last().is_some_and(|last| last.step >= step) {
            // Made again after a crash: known, or forgotten already.
            let is_known = known.iter().any(|known| known.step == step);
            return Ok(if is_known { Vec::new() } else { vec![model] });
        }
        transaction.insert(&model)?;
        transaction.insert(&Checkpoint {
            id: new_id("ftckpt_"),
            job_id: self.job.id.clone(),
            created_at: unix_seconds(),
            step,
            model: model.id,
            metrics: metrics.data(None),
        })?;
        let message = format!("Checkpoint created at step {step}");
        transaction.say(&self.job.id, EventLevel::Info, message)?;
        let surplus = (known.len() + 1).saturating_sub(KEEP_EPOCHS);
        let mut gone = Vec::new();
        for old in known.into_iter().take(surplus) {
            let Some(model) = transaction.get::<ModelRecord>(&old.model)? else { continue };
            if transaction.need_of(&model)?.is_none() {
                transaction.delete::<Checkpoint>(&old.id)?;
                transaction.delete::<ModelRecord>(&old.model)?;
                gone.push(model);
            }
        }
        Ok(gone)
    }

    /// From the speed of this process.
    fn estimated_finish(&self) -> Option<u64> {
        let (since, first) = self.begun?;
        let done = self.noted.checked_sub(first).filter(|done| *done > 0)?;
        let left = self.total_steps?.saturating_sub(self.noted);
        let seconds = since.elapsed().as_secs_f64() / done as f64 * left as f64;
        Some(unix_seconds() + seconds.ceil() as u64)
    }
}

/// Writes what a finished run's log says and nobody heard.
pub(super) fn complete(service: &Service, job: &Job) -> Result<(), JobsError> {
    let Some(job) = service.store.get::<Job>(&job.id)? else { return Ok(()) };
    let mut progress = Progress::new(service, &job);
    progress.total_steps = job.total_steps.and_then(|total| usize::try_from(total).ok());
    progress.catch_up(&Places::of(service, &job.id).model());
    progress.write_all();
    Ok(())
}
