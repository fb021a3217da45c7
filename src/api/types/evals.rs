//! Objects of `/v1/evals` and of the graders' routes, in OpenAI's shapes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::eval::grader::{FaultKind, Grader};
use crate::jobs::{Counts, Eval, EvalOutput, EvalRun, Outcome, RunGrader, RunStatus, SourceRow};

/// A page of any of these objects.
#[derive(Debug, Serialize)]
pub(crate) struct PageObject {
    object: &'static str,
    data: Vec<Value>,
    first_id: Value,
    last_id: Value,
    has_more: bool,
}

impl PageObject {
    pub(crate) fn new(data: Vec<Value>, has_more: bool) -> Self {
        let id = |object: Option<&Value>| object.map_or(Value::Null, |object| object["id"].clone());
        let (first_id, last_id) = (id(data.first()), id(data.last()));
        Self { object: "list", data, first_id, last_id, has_more }
    }
}

/// Body of the graders' routes.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct GraderRequest {
    pub(crate) grader: Option<Value>,
    pub(crate) item: Option<Value>,
    pub(crate) model_sample: Option<String>,
}

/// The definition of an evaluation.
pub(crate) fn eval_object(eval: &Eval) -> Value {
    let mut properties = Map::new();
    properties.insert("item".to_owned(), eval.item_schema.clone());
    let mut required = vec!["item"];
    if eval.include_sample_schema {
        properties.insert("sample".to_owned(), sample_schema());
        required.push("sample");
    }
    json!({
        "object": "eval",
        "id": eval.id,
        "data_source_config": {
            "type": "custom",
            "schema": {"type": "object", "properties": properties, "required": required},
        },
        "testing_criteria": eval.testing_criteria,
        "name": eval.name.as_deref().unwrap_or_default(),
        "created_at": eval.created_at,
        "metadata": metadata(eval.metadata.as_ref()),
    })
}

/// A run; `rows` are shown where its client gave them with the request.
pub(crate) fn run_object(run: &EvalRun, rows: Vec<SourceRow>) -> Value {
    let mut data_source = run.data_source.clone();
    if data_source["source"]["type"] == "file_content" {
        data_source["source"]["content"] = rows.into_iter().map(row_object).collect();
    }
    let has_begun = run.status != RunStatus::Queued;
    let usage: Vec<Value> = (run.usage.iter())
        .map(|usage| {
            json!({
                "model_name": usage.model,
                "invocation_count": usage.invocations,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "cached_tokens": 0,
            })
        })
        .collect();
    let criteria: Vec<Value> = (run.criteria.iter())
        .map(|criterion| {
            json!({
                "testing_criteria": criterion.name,
                "passed": criterion.counts.passed,
                "failed": criterion.counts.failed,
                "errored": criterion.counts.errored,
            })
        })
        .collect();
    let Counts { passed, failed, errored } = run.counts;
    json!({
        "object": "eval.run",
        "id": run.id,
        "eval_id": run.eval_id,
        "report_url": format!("/v1/evals/{}/runs/{}/output_items", run.eval_id, run.id),
        "status": run.status.name(),
        "model": run.model,
        "name": run.name.as_deref().unwrap_or_default(),
        "created_at": run.created_at,
        "result_counts": {
            "total": run.total,
            "errored": errored,
            "failed": failed,
            "passed": passed,
        },
        "per_model_usage": has_begun.then_some(usage),
        "per_testing_criteria_results": has_begun.then_some(criteria),
        "data_source": data_source,
        "error": run.error.as_ref().map(|(code, message)| json!({"code": code, "message": message})),
        "metadata": metadata(run.metadata.as_ref()),
    })
}

/// A row with its answer and its grades.
pub(crate) fn output_object(output: &EvalOutput) -> Value {
    let results: Vec<Value> = (output.results.iter())
        .map(|result| {
            let mut object = json!({
                "name": result.name,
                "type": result.kind,
                "score": result.score,
                "passed": result.outcome == Outcome::Pass,
            });
            if !result.parts.is_empty() {
                object["sub_scores"] = json!(result.parts);
            }
            if let Some(error) = &result.error {
                object["error"] = json!({"code": "grader_error", "message": error});
            }
            object
        })
        .collect();
    json!({
        "object": "eval.run.output_item",
        "id": output.id,
        "run_id": output.run_id,
        "eval_id": output.eval_id,
        "created_at": output.created_at,
        "status": output.outcome.name(),
        "datasource_item_id": output.index,
        "datasource_item": output.item,
        "results": results,
        "sample": output.sample,
    })
}

/// What one run of a grader found.
pub(crate) fn grader_result(grader: &Grader, run: &RunGrader) -> Value {
    let graded = &run.graded;
    let fault = graded.score.as_ref().err();
    let details = |kind| fault.filter(|fault| fault.kind == kind).map(|fault| &fault.message);
    let is = |kinds: &[FaultKind]| fault.is_some_and(|fault| kinds.contains(&fault.kind));
    let parts: Map<String, Value> =
        graded.parts.iter().map(|(name, score)| (name.clone(), json!(score))).collect();
    let mut tokens = Map::new();
    for usage in &graded.usage {
        let counts = json!({
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        });
        match tokens.get_mut(&usage.model) {
            None => {
                tokens.insert(usage.model.clone(), counts);
            }
            Some(sum) => {
                for (name, count) in counts.as_object().into_iter().flatten() {
                    let total = sum[name].as_u64().unwrap_or(0) + count.as_u64().unwrap_or(0);
                    sum[name] = total.into();
                }
            }
        }
    }
    let all_tokens: usize =
        graded.usage.iter().map(|usage| usage.prompt_tokens + usage.completion_tokens).sum();
    json!({
        "reward": graded.score.as_ref().copied().unwrap_or(0.0),
        "metadata": {
            "name": grader.name,
            "type": grader.type_name(),
            "errors": {
                "formula_parse_error": is(&[FaultKind::Formula]),
                "sample_parse_error": is(&[FaultKind::SampleParse]),
                "truncated_observation_error": false,
                "unresponsive_reward_error": false,
                "invalid_variable_error": is(&[FaultKind::InvalidVariable]),
                "other_error": is(&[FaultKind::Other, FaultKind::Interrupted]),
                "python_grader_server_error": is(&[FaultKind::PythonServer]),
                "python_grader_server_error_type": details(FaultKind::PythonServer),
                "python_grader_runtime_error": is(&[FaultKind::PythonRuntime]),
                "python_grader_runtime_error_details": details(FaultKind::PythonRuntime),
                "model_grader_server_error": is(&[FaultKind::ModelServer]),
                "model_grader_refusal_error": false,
                "model_grader_parse_error": is(&[FaultKind::ModelParse]),
                "model_grader_server_error_details":
                    details(FaultKind::ModelServer).or(details(FaultKind::ModelParse)),
                // Not OpenAI's: what happened, of whatever kind it is.
                "details": fault.map(|fault| &fault.message),
            },
            "execution_time": run.seconds,
            "scores": parts.clone(),
            "token_usage": (!graded.usage.is_empty()).then_some(all_tokens),
            "sampled_model_name": graded.usage.first().map(|usage| &usage.model),
        },
        "sub_rewards": parts,
        "model_grader_token_usage_per_model": tokens,
    })
}

fn row_object(row: SourceRow) -> Value {
    let mut object = json!({"item": row.item});
    if let Some(sample) = row.sample {
        object["sample"] = sample;
    }
    object
}

fn metadata(metadata: Option<&BTreeMap<String, String>>) -> Value {
    json!(metadata.cloned().unwrap_or_default())
}

/// What a model's answer looks like to a grader.
fn sample_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "choices": {"type": "array"},
            "output_text": {"type": "string"},
            "output_json": {"type": "object"},
            "output_tools": {"type": "array"},
            "finish_reason": {"type": "string"},
        },
        "required": ["output_text"],
    })
}
