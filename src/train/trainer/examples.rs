//! Which examples a run can take.

use super::{TrainError, TrainJob};
use crate::data::Example;

pub(super) fn check_examples(job: &TrainJob, vocab_size: usize) -> Result<(), TrainError> {
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
