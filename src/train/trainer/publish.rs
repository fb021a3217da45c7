//! The ends of a run and of its epochs: what is published, and what is said of it.

use std::path::PathBuf;

use super::{
    Examination, Outcome, TrainError, TrainEvent, TrainSummary, Trainer, Workspace, epochs, output,
    parity, report, work_dir,
};
use crate::ops::release_freed_memory;

/// Sequences by which training and serving are compared.
const NUM_COMPARED: usize = 8;

impl Trainer<'_> {
    /// Validates and publishes what there is after this epoch, if that is wanted.
    pub(super) fn end_epoch(&mut self) -> Result<(), TrainError> {
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

    /// Ends with a checkpoint instead of an output.
    pub(super) fn stop(mut self) -> Result<TrainSummary, TrainError> {
        if self.last_checkpoint.1 < self.step || self.step == 0 {
            self.write_checkpoint()?;
        }
        self.say(TrainEvent::Stopped { step: self.step })?;
        let path = work_dir(&self.job.config.output);
        Ok(self.summary(Outcome::Stopped, path, String::new()))
    }

    /// Validates, publishes the output folder and removes the work folder.
    pub(super) fn publish(mut self, outcome: Outcome) -> Result<TrainSummary, TrainError> {
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
    pub(super) fn finished(&self) -> output::Finished<'_> {
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

    pub(super) fn summary(&self, outcome: Outcome, path: PathBuf, digest: String) -> TrainSummary {
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
}
