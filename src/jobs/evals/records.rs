//! What the store keeps of evaluations: definitions, runs, their rows and what became of each.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::jobs::records::record;

/// What is to be measured: what a row looks like, and what a good answer is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Eval {
    /// `eval_…`.
    pub id: String,
    /// Unix seconds.
    pub created_at: u64,
    /// What its user calls it.
    pub name: Option<String>,
    /// JSON schema of a row.
    pub item_schema: Value,
    /// Whether graders may speak of the model's answer.
    pub include_sample_schema: bool,
    /// The graders, as given.
    pub testing_criteria: Vec<Value>,
    /// The client's own.
    pub metadata: Option<BTreeMap<String, String>>,
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    /// Waits for its turn.
    Queued,
    /// Rows are being answered and graded.
    InProgress,
    /// Every row has an outcome.
    Completed,
    /// See its error.
    Failed,
    /// By its client.
    Canceled,
}

impl RunStatus {
    /// Whether nothing will change any more.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Canceled)
    }

    /// As it is written on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Canceled => "canceled",
        }
    }
}

/// One use of an [`Eval`]: some rows, and a model that answers them or answers that are given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRun {
    /// `evalrun_…`.
    pub id: String,
    /// The evaluation's id.
    pub eval_id: String,
    /// Unix seconds.
    pub created_at: u64,
    /// What its user calls it.
    pub name: Option<String>,
    /// The model that answers; `None` where answers are given.
    pub model: Option<String>,
    /// As given, without the rows: these are in the [`EvalSource`].
    pub data_source: Value,
    /// The client's own.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Where it is.
    pub status: RunStatus,
    /// Why it failed: code and message.
    pub error: Option<(String, String)>,
    /// Rows.
    pub total: usize,
    /// Rows so far, by outcome.
    pub counts: Counts,
    /// Requests and tokens so far, model by model.
    pub usage: Vec<ModelUsage>,
    /// Outcomes so far, grader by grader.
    pub criteria: Vec<CriterionCounts>,
}

/// Rows by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Passed every grader.
    pub passed: usize,
    /// Did not.
    pub failed: usize,
    /// Could not be answered or graded.
    pub errored: usize,
}

/// What a run has asked of a model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelUsage {
    /// As the run or its grader names it.
    pub model: String,
    /// Requests.
    pub invocations: usize,
    /// Tokens of prompts.
    pub prompt_tokens: usize,
    /// Tokens of answers.
    pub completion_tokens: usize,
}

/// How often a grader was content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CriterionCounts {
    /// The grader's name.
    pub name: String,
    /// Rows.
    pub counts: Counts,
}

/// The rows of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalSource {
    /// The run's id.
    pub run_id: String,
    /// In the order in which they were given.
    pub rows: Vec<SourceRow>,
}

/// A row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceRow {
    /// What templates call `item`.
    pub item: Value,
    /// A given answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<Value>,
}

/// A run that has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct EvalTask {
    /// The run's id.
    pub(super) run_id: String,
}

/// What became of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Passed every grader.
    Pass,
    /// Did not.
    Fail,
    /// Could not be answered or graded.
    Error,
}

impl Outcome {
    /// As it is written on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Error => "error",
        }
    }
}

impl Counts {
    /// One more row.
    pub(super) fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Pass => self.passed += 1,
            Outcome::Fail => self.failed += 1,
            Outcome::Error => self.errored += 1,
        }
    }
}

/// What one grader said of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CriterionResult {
    /// The grader's name.
    pub name: String,
    /// Its type.
    pub kind: String,
    /// 0 where there is none.
    pub score: f64,
    /// What became of the row, were this the only grader.
    pub outcome: Outcome,
    /// Scores of a `multi` grader's parts.
    pub parts: BTreeMap<String, f64>,
    /// Why there is no score.
    pub error: Option<String>,
}

/// A row, its answer and its grades.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalOutput {
    /// `outputitem_…`.
    pub id: String,
    /// The run's id.
    pub run_id: String,
    /// The evaluation's id.
    pub eval_id: String,
    /// Unix seconds.
    pub created_at: u64,
    /// Place of the row among the run's rows, from 0.
    pub index: usize,
    /// The row.
    pub item: Value,
    /// What became of it.
    pub outcome: Outcome,
    /// Grader by grader.
    pub results: Vec<CriterionResult>,
    /// The question and the answer, in OpenAI's form.
    pub sample: Value,
    /// What it took.
    pub usage: Vec<ModelUsage>,
}

record!(Eval, "eval", id);
record!(EvalRun, "eval_run", id, eval_id);
record!(EvalSource, "eval_source", run_id);
record!(EvalTask, "eval_task", run_id);
record!(EvalOutput, "eval_output", id, run_id);
