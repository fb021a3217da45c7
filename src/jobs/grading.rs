//! One grader, run once over one answer, as somebody does who is writing it.

use std::time::Instant;

use super::{JobsError, Service, ask::Asker, python};
use crate::eval::grader::{Context, Graded, Grader, Invalid, Outside};

/// What a grader made of an answer, and how long it took.
#[derive(Debug, Clone)]
pub struct RunGrader {
    /// Scores, faults and tokens.
    pub graded: Graded,
    /// Seconds.
    pub seconds: f64,
}

impl Service {
    /// Grades `context`. Blocking.
    #[must_use]
    pub fn run_grader(&self, grader: &Grader, context: &Context) -> RunGrader {
        let started = Instant::now();
        let asker: &dyn Outside = &Asker::new(self);
        let graded = grader.grade(context, asker);
        RunGrader { graded, seconds: started.elapsed().as_secs_f64() }
    }
}

/// Refuses graders that this server does not run; `param` says where the one at a place stands.
///
/// # Errors
/// A `python` grader, where these are off.
pub fn check_graders(
    service: &Service,
    graders: &[Grader],
    param: impl Fn(usize) -> String,
) -> Result<(), JobsError> {
    if service.config.allow_python {
        return Ok(());
    }
    match graders.iter().position(Grader::runs_python) {
        Some(index) => Err(Invalid::new(param(index), python::SWITCHED_OFF).into()),
        None => Ok(()),
    }
}
