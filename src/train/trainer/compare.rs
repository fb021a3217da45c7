//! What is published is compared with what is served, also where it is published before the end.

use super::{Examination, TrainError, TrainEvent, Trainer};
use crate::train::{WeightDtype, parity};

/// Sequences by which training and serving are compared before the end.
const NUM_COMPARED: usize = 4;

impl Trainer<'_> {
    /// Asks the examiner whether what is trained is served as it is, where it is about to be published as
    /// that: a model whose every weight is trained is rounded first, and in the course of a run nobody
    /// rounds it.
    pub(super) fn compare(&mut self, is_rounded: bool) -> Result<(), TrainError> {
        let config = &self.job.config;
        if self.model.adapter.is_none() && config.dtype != WeightDtype::F32 && !is_rounded {
            return Ok(());
        }
        let Some(examiner) = self.examiner.take() else { return Ok(()) };
        let wanted = self.job.valid.iter().chain(&self.job.train).take(NUM_COMPARED);
        let scored = parity::score(&self.model, wanted)?;
        let examination = self.as_candidate(&scored, |candidate| examiner.compare(candidate))?;
        self.examiner = Some(examiner);
        self.say_parity(&examination)
    }

    /// Says what a comparison found, if there was one.
    pub(super) fn say_parity(&mut self, examination: &Examination) -> Result<(), TrainError> {
        let Examination { max_difference: Some(max_difference), num_tokens, .. } = *examination
        else {
            return Ok(());
        };
        self.say(TrainEvent::Parity { step: self.step, max_difference, num_tokens })
    }
}
