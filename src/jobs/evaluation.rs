//! Did the tuned model beat the base on the job's validation file, and may its alias move?

use std::{path::PathBuf, sync::Arc};

use serde_json::{Map, Value, json};

use super::{FileRecord, Gate, Job, JobsError, Service};
use crate::adapters::AdapterVersion;
use crate::data::{Question, Reading, epoch_order, questions, read_valid_rows};
use crate::engine::EngineError;
use crate::eval::{
    Arm, EvalError, EvalReport, Runner, graders::GRADERS, report::Metadata, table::p_text,
};

/// Rows of the validation file that are asked at most. 200 show a gain of ten points.
const MAX_ROWS: usize = 200;
/// Bounds of an answer's length, in tokens; within them it is twice the longest reference answer.
const MAX_TOKENS: std::ops::RangeInclusive<usize> = 32..=512;
/// Requests of an evaluation that the engine has at once: users are served at the same time.
const MAX_PENDING: usize = 4;

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

/// Asks base and `version` the questions of the job's validation file through the engine: at most
/// 200 of its rows, chosen by the job's seed. `None` where there is no validation file, or none with
/// answers to compare, and no gate that would need one. Blocking.
///
/// # Errors
/// [`JobsError::Interrupted`] where the service or the engine is about to end: the evaluation is to
/// be made again. Else the file cannot be read, or a request fails.
pub fn evaluate(
    service: &Service,
    job: &Job,
    version: &Arc<AdapterVersion>,
) -> Result<Option<Evaluation>, JobsError> {
    let default = || service.config.gate.as_ref().filter(|_| job.alias.is_some());
    let gate = job.gate.as_ref().or_else(default);
    let asked = chosen(&validation_questions(service, job)?, job.seed);
    if asked.is_empty() {
        return Ok(gate.map(without_rows));
    }
    let report = ask(service, job, version, &asked)?;
    verdict(&report, gate).map(Some)
}

/// The questions of the validation file.
fn validation_questions(service: &Service, job: &Job) -> Result<Vec<Question>, JobsError> {
    let Some(path) = validation_path(service, job)? else { return Ok(Vec::new()) };
    let (rows, _) = read_valid_rows(&path, Reading::default())
        .map_err(|error| JobsError::Evaluation(error.to_string()))?;
    let mut asked = questions(&rows);
    // A row of plain text has no question before it.
    asked.retain(|question| question.raw_prompt.as_deref() != Some(""));
    Ok(asked)
}

/// Where the validation file's bytes are. A file that was deleted meanwhile is evaluated no more.
fn validation_path(service: &Service, job: &Job) -> Result<Option<PathBuf>, JobsError> {
    let Some(id) = &job.validation_file else { return Ok(None) };
    let own = service.job_dir(&job.id).join("valid.jsonl");
    if own.is_file() {
        return Ok(Some(own));
    }
    let file: Option<FileRecord> = service.store.get(id)?;
    Ok(file.map(|file| service.blob_path(&file)))
}

/// At most [`MAX_ROWS`] of them, in their order; which ones depends on `seed` alone.
fn chosen(asked: &[Question], seed: u64) -> Vec<Question> {
    let mut order = epoch_order(asked.len(), seed, 0);
    order.truncate(MAX_ROWS);
    order.sort_unstable();
    order.into_iter().map(|index| asked[index].clone()).collect()
}

fn ask(
    service: &Service,
    job: &Job,
    version: &Arc<AdapterVersion>,
    asked: &[Question],
) -> Result<EvalReport, JobsError> {
    let parts = &service.parts;
    let mut longest = 0;
    let tokenizer = AdapterVersion::tokenizer_of(Some(version), &parts.tokenizer);
    for question in asked {
        let tokens = tokenizer.encode(&question.answer, false);
        longest = longest.max(tokens.map_or(0, |tokens| tokens.len()));
    }
    let runner = Runner {
        engine: &parts.engine,
        tokenizer: &parts.tokenizer,
        template: &parts.template,
        adapters: std::slice::from_ref(version),
        stop_token_ids: &parts.eos_token_ids,
        max_tokens: Some((2 * longest).clamp(*MAX_TOKENS.start(), *MAX_TOKENS.end())),
        seed: job.seed,
        max_pending: Some(MAX_PENDING),
        should_stop: &|| service.is_stopping(),
    };
    let arms = [Arm::Base, Arm::Tuned(version.name.clone())];
    runner
        .run(&arms, asked, &[], Metadata::default(), &mut |_| ())
        .map_err(|error| failure(service, &error))
}

/// What ended an evaluation early: the end of the server, which is no fault of the model's, or a fault.
fn failure(service: &Service, error: &EvalError) -> JobsError {
    let is_draining = matches!(
        error,
        EvalError::Stopped | EvalError::Refused { source: EngineError::Draining, .. }
    );
    if is_draining || service.is_stopping() {
        JobsError::Interrupted
    } else {
        JobsError::Evaluation(error.to_string())
    }
}

/// A gate that nothing could be measured for stays closed.
fn without_rows(gate: &Gate) -> Evaluation {
    Evaluation {
        summary: json!({"num_rows": 0, "gate": gate_json(gate, false)}),
        message: format!(
            "No evaluation: there are no validation rows with answers, so the gate on {} stays closed",
            gate.metric
        ),
        passed: Some(false),
    }
}

/// From the report of the two arms to what the job keeps.
fn verdict(report: &EvalReport, gate: Option<&Gate>) -> Result<Evaluation, JobsError> {
    let [base, tuned] = report.arms.as_slice() else {
        return Err(JobsError::Evaluation("not two arms".to_owned()));
    };
    let metric = gate.map_or(GRADERS[0].name, |gate| &gate.metric);
    let unknown = || JobsError::invalid("gate", format!("there is no metric `{metric}`"));
    let decisive = report.comparison(&tuned.name, &base.name, metric).ok_or_else(unknown)?;
    let (base_score, tuned_score) =
        (base.score(metric).unwrap_or(0.0), tuned.score(metric).unwrap_or(0.0));
    let passed = gate.map(|gate| {
        decisive.difference > gate.min_gain.max(0.0) && decisive.p_value <= gate.p_value
    });
    let mut metrics = Map::new();
    for (index, grader) in GRADERS.iter().enumerate() {
        if let Some(pair) = report.comparison(&tuned.name, &base.name, grader.name) {
            let scores = json!({
                "base": base.scores[index],
                "tuned": tuned.scores[index],
                "difference": pair.difference,
                "ci95": pair.ci95,
                "p_value": pair.p_value,
                "test": pair.test,
            });
            metrics.insert(grader.name.to_owned(), scores);
        }
    }
    let tokens = |mean: [f64; 2]| (mean.iter().sum::<f64>() * base.rows as f64).round() as u64;
    let summary = json!({
        "num_rows": base.rows,
        "metrics": metrics,
        "perplexity": {"base": base.perplexity, "tuned": tuned.perplexity},
        "token_accuracy": {"base": base.token_accuracy, "tuned": tuned.token_accuracy},
        "prompt_tokens": tokens([base.prompt_tokens_mean, tuned.prompt_tokens_mean]),
        "completion_tokens": tokens([base.completion_tokens_mean, tuned.completion_tokens_mean]),
        "max_tokens": report.metadata.max_tokens,
        "seconds": report.metadata.seconds,
        "gate": gate.map(|gate| gate_json(gate, passed == Some(true))),
    });
    let mut message = format!(
        "Evaluation on {} rows: {metric} base {:.1} % -> tuned {:.1} % (p = {})",
        base.rows,
        100.0 * base_score,
        100.0 * tuned_score,
        p_text(decisive.p_value)
    );
    if let Some(gate) = gate {
        let word = if passed == Some(true) { "open" } else { "closed" };
        message += &format!(
            "; the gate is {word}: it asks for more than {:+.1} points with p <= {}",
            100.0 * gate.min_gain.max(0.0),
            gate.p_value
        );
    }
    Ok(Evaluation { summary, message, passed })
}

fn gate_json(gate: &Gate, passed: bool) -> Value {
    json!({
        "metric": gate.metric,
        "min_gain": gate.min_gain,
        "p_value": gate.p_value,
        "passed": passed,
    })
}
