//! Did the tuned model beat the base on the job's validation file, and may its alias move?

use std::sync::Arc;

use serde_json::Value;

use super::{Job, JobsError, Service};
use crate::adapters::AdapterVersion;

/// What an evaluation says.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Scores of base and tuned arm, as the job's record keeps them.
    pub summary: Value,
    /// In one sentence, for the job's events.
    pub message: String,
    /// Whether the job's gate is passed; `None` without a gate.
    pub passed: Option<bool>,
}

/// Asks base and `version` the questions of the job's validation file through the engine. `None`
/// where there is no validation file, or none with answers to compare.
///
/// # Errors
/// The file cannot be read, or the engine refuses.
pub(super) fn evaluate(
    _service: &Service,
    _job: &Job,
    _version: &Arc<AdapterVersion>,
) -> Result<Option<Evaluation>, JobsError> {
    Ok(None)
}
