//! Measuring what is trained: the validation loss, generated answers, and what an examiner says of it.

use std::time::Instant;

use super::{
    Candidate, Examination, Scored, TrainError, TrainEvent, Trainer, Workspace, output,
    validation::{self, measure, rotation},
};
use crate::publish::disk;

impl Trainer<'_> {
    /// Loss and accuracy on the validation examples: all of them, or the next few.
    pub(super) fn validate(&mut self, full: bool) -> Result<(), TrainError> {
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
    pub(super) fn generate(&mut self) -> Result<(), TrainError> {
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
    pub(super) fn as_candidate<T>(
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
    pub(super) fn examine(&mut self, scored: &[Scored<'_>]) -> Result<Examination, TrainError> {
        let Some(examiner) = self.examiner.take() else { return Ok(Examination::default()) };
        let examination = self.as_candidate(scored, |candidate| examiner.examine(candidate))?;
        self.say_parity(&examination)?;
        Ok(examination)
    }

    /// Validates on all rows, unless that was done after this step.
    pub(super) fn validate_fully(&mut self) -> Result<(), TrainError> {
        let done = |event: &TrainEvent| matches!(event, TrainEvent::Validated { step, full: true, .. } if *step == self.step);
        if self.log.events().iter().any(done) { Ok(()) } else { self.validate(true) }
    }
}
