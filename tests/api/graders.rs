//! One grader, tried out over HTTP, in OpenAI's shapes.

use crate::common::{Server, TempDir, fixture};
use serde_json::{Value, json};

const RUN: &str = "/v1/fine_tuning/alpha/graders/run";
const VALIDATE: &str = "/v1/fine_tuning/alpha/graders/validate";

fn start(dir: &TempDir, more: &[&str]) -> Server {
    let data = dir.join("data");
    let mut args = vec!["--data-dir", data.to_str().unwrap()];
    args.extend(more);
    Server::start(&fixture("tiny-llama"), &args)
}

fn check(operation: &str) -> Value {
    json!({"type": "string_check", "name": "check", "input": "{{sample.output_text}}",
        "reference": "{{item.label}}", "operation": operation})
}

fn python(body: &str) -> Value {
    json!({"type": "python", "name": "p", "source": format!("def grade(sample, item):\n    {body}\n")})
}

/// The flags of `errors` that are set.
fn flags(result: &Value) -> Vec<&str> {
    let errors = result["metadata"]["errors"].as_object().unwrap();
    errors.iter().filter(|(_, set)| **set == true).map(|(name, _)| name.as_str()).collect()
}

#[test]
fn a_grader_scores_an_answer() {
    let dir = TempDir::new();
    let server = start(&dir, &[]);
    let similar = json!({"type": "text_similarity", "name": "s", "input": "{{sample.output_text}}",
        "reference": "{{item.label}}", "evaluation_metric": "rouge_1"});
    let multi = json!({"type": "multi", "name": "m", "calculate_output": "0.5 * a + 0.5 * b",
        "graders": {"a": check("eq"), "b": similar}});
    for (grader, sample, reward) in [
        (check("eq"), "the cat", 1.0),
        (check("eq"), "the dog", 0.0),
        (check("ilike"), "It is THE CAT.", 1.0),
        (similar.clone(), "the dog", 0.5),
        (multi.clone(), "the cat sat", 0.4),
    ] {
        let body = json!({"grader": grader, "item": {"label": "the cat"}, "model_sample": sample});
        let answer = server.post(RUN, &body);
        assert_eq!(answer.status, 200, "{answer:?}");
        let result = answer.json();
        assert!((result["reward"].as_f64().unwrap() - reward).abs() < 1e-12, "{body}: {result}");
        assert_eq!(flags(&result), Vec::<&str>::new());
        assert_eq!(result["metadata"]["type"], grader["type"]);
        assert!(result["metadata"]["execution_time"].is_number());
        assert!(result["metadata"]["token_usage"].is_null());
    }
    let body = json!({"grader": multi, "item": {"label": "the cat"}, "model_sample": "the dog"});
    assert_eq!(server.post(RUN, &body).json()["sub_rewards"], json!({"a": 0.0, "b": 0.5}));
    let answer = server.post(VALIDATE, &json!({"grader": multi}));
    assert_eq!((answer.status, answer.json()), (200, json!({"grader": multi})));
}

#[test]
fn a_judge_is_asked_and_its_tokens_are_counted() {
    let dir = TempDir::new();
    let adapter = format!("tuned={}", fixture("oracle/tiny-llama-plain-adapter").display());
    let server = start(&dir, &["--adapter", &adapter]);
    for model in ["tiny-llama", "tuned"] {
        let grader = json!({"type": "score_model", "name": "judge", "model": model,
            "input": [{"role": "user", "content": "Is {{sample.output_text}} good?"}],
            "sampling_params": {"max_completions_tokens": 6}});
        let answer = server.post(RUN, &json!({"grader": grader, "model_sample": "it"}));
        assert_eq!(answer.status, 200, "{answer:?}");
        let result = answer.json();
        // A model of random weights says nothing that could be a score.
        assert_eq!(flags(&result), ["model_grader_parse_error"], "{result}");
        assert_eq!(result["reward"], 0.0);
        assert_eq!(result["metadata"]["sampled_model_name"], model);
        let usage = &result["model_grader_token_usage_per_model"][model];
        assert!(usage["prompt_tokens"].as_u64().unwrap() > 10, "{usage}");
        assert_eq!(result["metadata"]["token_usage"], usage["total_tokens"]);
    }
}

#[test]
fn a_row_that_cannot_be_graded_sets_a_flag() {
    let dir = TempDir::new();
    let server = start(&dir, &[]);
    let json_check = json!({"type": "string_check", "name": "j", "operation": "eq",
        "input": "{{sample.output_json.x}}", "reference": "1"});
    let division = json!({"type": "multi", "name": "m", "calculate_output": "1 / a",
        "graders": {"a": check("eq")}});
    for (grader, flag) in [
        (check("eq"), "invalid_variable_error"),
        (json_check, "sample_parse_error"),
        (division, "invalid_variable_error"),
    ] {
        let result = server.post(RUN, &json!({"grader": grader, "model_sample": "text"})).json();
        assert_eq!(flags(&result), [flag], "{result}");
        assert!(result["metadata"]["errors"]["details"].as_str().unwrap().contains("no"));
    }
}

#[test]
fn mistakes_are_400_with_their_place_and_the_service_can_be_off() {
    let dir = TempDir::new();
    let server = start(&dir, &[]);
    let judge = json!({"type": "score_model", "name": "j", "model": "gpt-none",
        "input": [{"role": "user", "content": "x"}]});
    for (body, status, param) in [
        (json!({}), 400, "grader"),
        (json!({"grader": check("is"), "model_sample": "x"}), 400, "grader.operation"),
        (json!({"grader": check("eq")}), 400, "model_sample"),
        (json!({"grader": check("eq"), "model_sample": 3}), 400, "model_sample"),
        (json!({"grader": check("eq"), "model_sample": "x", "item": []}), 400, "item"),
        (json!({"grader": judge, "model_sample": "x"}), 404, "model"),
        (json!({"grader": python("return 1"), "model_sample": "x"}), 400, "grader.type"),
    ] {
        let answer = server.post(RUN, &body);
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        assert_eq!(answer.json()["error"]["param"], param, "{body}");
    }
    assert_eq!(server.post(VALIDATE, &json!({"grader": check("is")})).status, 400);
    let off = Server::start(&fixture("tiny-llama"), &[]);
    let answer = off.post(RUN, &json!({"grader": check("eq"), "model_sample": "x"}));
    assert_eq!(answer.status, 403);
    assert!(answer.text().contains("--data-dir"), "{answer:?}");
}

#[test]
fn python_runs_where_the_operator_allows_it_and_within_limits() {
    let dir = TempDir::new();
    let server = start(&dir, &["--allow-python-graders"]);
    let run = |body: &str| {
        let request = json!({"grader": python(body), "item": {"n": 2}, "model_sample": "[1, 2]"});
        server.post(RUN, &request).json()
    };
    let sum = run("print('noise'); return item['n'] * sum(sample['output_json'])");
    assert_eq!((sum["reward"].as_f64(), flags(&sum)), (Some(6.0), vec![]), "{sum}");
    for (body, part) in [
        ("return 1 / 0", "ZeroDivisionError"),
        ("return 'high'", "ValueError"),
        ("return float('nan')", "not a finite number"),
        ("import os; return float(os.environ['HOME'])", "KeyError"),
        ("x = bytearray(4 << 30); return 1", "MemoryError"),
        ("import os; os._exit(3)", "without a score"),
        ("import sys; sys.exit(1)", "SystemExit"),
    ] {
        let result = run(body);
        assert_eq!(flags(&result), ["python_grader_runtime_error"], "{body}: {result}");
        let details = &result["metadata"]["errors"]["python_grader_runtime_error_details"];
        assert!(details.as_str().unwrap().contains(part), "{body}: {details}");
    }
}
