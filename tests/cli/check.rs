//! `tunesmith check`, as a user runs it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Value, json};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-llama");

#[test]
fn good_data_is_described_and_the_exit_code_is_zero() {
    let files = Files::new("good");
    let train =
        files.write("train.jsonl", &[row("a", "one two"), row("b", "three"), row("a", "one two")]);
    let valid = files.write("valid.jsonl", &[row("b", "four")]);
    let output =
        check(&[&train, "--model", MODEL, "--valid", &valid, "--batch-size", "2", "--epochs", "5"]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}");
    for expected in [
        "train.jsonl: 3 rows, sha256 ",
        "warning: 3 rows have no system message",
        "warning: 1 rows repeat an earlier one: line 3 as line 1",
        "warning: 1 validation rows ask what a training row asks, 0 with the same answer: line 1 as in training line 2",
        "per row",
        "trained tokens",
        "run: 5 epochs, 10 steps of 2 rows",
        "memory: ",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
}

#[test]
fn every_problem_is_listed_counted_and_fails_the_check() {
    let files = Files::new("bad");
    let mut lines = vec![row("a", "b"), "{".to_owned(), r#"{"prompt":"a"}"#.to_owned()];
    lines.extend((0..60).map(|_| "7".to_owned()));
    lines.push(
        json!({"messages": [{"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0}]})
        .to_string(),
    );
    let output = check(&[&files.write("rows.jsonl", &lines), "--model", MODEL]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(1));
    for expected in [
        "rows.jsonl: 1 rows",
        "63 errors:",
        "line 2: invalid_json: ",
        "line 3: missing_completion: ",
        "... and 13 more",
        "data_type: 60\n",
        "no_trained_tokens: 1\n",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
}

#[test]
fn rows_that_are_cut_are_counted() {
    let files = Files::new("cut");
    let data = files.write("rows.jsonl", &[row("a", &"word ".repeat(50)), row("a", "b")]);
    let output = check(&[&data, "--model", MODEL, "--max-length", "30"]);
    assert!(output.status.success());
    assert!(stdout(&output).contains("warning: 1 rows are too long and lose "));
}

#[test]
fn shown_tokens_are_marked_as_trained_or_not() {
    let files = Files::new("show");
    let data = files.write("rows.jsonl", &[row("a", "b"), row("c", "d")]);
    let shown = stdout(&check(&[&data, "--model", MODEL, "--show", "1"]));
    assert!(shown.ends_with("(istant)(\\n)\n[b][<|im_end|>](\\n)\n"), "{shown}");
    assert!(shown.contains("line 1: ") && !shown.contains("line 2: "));
    let coloured = command(&[&data, "--model", MODEL, "--show", "1"])
        .env("CLICOLOR_FORCE", "1")
        .output()
        .unwrap();
    assert!(stdout(&coloured).contains("\u{1b}[32m<|im_end|>\u{1b}[0m"));
}

#[test]
fn a_tool_call_is_shown_as_trained_and_the_tools_answer_is_not() {
    let files = Files::new("show-tools");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let template = fs::read_to_string(fixtures.join("chat_templates/templates/qwen2_5.jinja"));
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixtures.join("tiny-qwen2").join(name), files.0.join(name)).unwrap();
    }
    let config = files.0.join("tokenizer_config.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    tokenizer["chat_template"] = template.unwrap().into();
    fs::write(&config, tokenizer.to_string()).unwrap();
    let call = json!({"id": "c", "type": "function",
        "function": {"name": "get", "arguments": "{\"x\": 1}"}});
    let row = json!({"tools": [{"type": "function", "function": {"name": "get"}}], "messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "7"}, {"role": "assistant", "content": "a"}]});
    let data = files.write("rows.jsonl", &[row.to_string()]);
    let model = files.0.display().to_string();
    let shown = stdout(&check(&[&data, "--model", &model, "--show", "1"]));
    for expected in
        ["[\"][g][e][t][\"]", "(<)(/)(t)(o)(o)(l)(_)(re)(s)(p)(on)(se)(>)", "(7)(\\n)", "[a]"]
    {
        assert!(shown.contains(expected), "{expected} is missing in\n{shown}");
    }
}

#[test]
fn the_format_alone_is_checked_without_a_model() {
    let files = Files::new("format");
    let output = check(&[&files.write("rows.jsonl", &[row("a", "b")])]);
    assert!(output.status.success());
    assert!(!stdout(&output).contains("run:"));
}

#[test]
fn an_empty_file_and_a_missing_one_fail() {
    let files = Files::new("empty");
    let empty = check(&[&files.write("rows.jsonl", &[])]);
    assert_eq!(empty.status.code(), Some(1));
    assert!(stdout(&empty).contains("the file has no rows"));
    let missing = check(&["/nowhere/rows.jsonl"]);
    assert_eq!(missing.status.code(), Some(1));
    let error = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(error.contains("/nowhere/rows.jsonl"));
    assert_eq!(error.matches("No such file").count(), 1, "a cause is said once: {error}");
}

#[test]
fn a_program_gets_one_json_object() {
    let files = Files::new("json");
    let rows = [row("a", &"word ".repeat(50)), row("b", "c"), row("b", "c")];
    let train = files.write("train.jsonl", &rows);
    let valid = files.write("valid.jsonl", &[row("b", "d")]);
    let more = [train.as_str(), "--model", MODEL, "--json", "--method", "supervised"];
    let more = [&more[..], &["--max-length", "40", "--valid", &valid]].concat();
    let output = check(&more);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success(), "{report}");
    for (key, value) in [
        ("rows", 3),
        ("examples", 3),
        ("truncated", 1),
        ("duplicates", 1),
        ("num_errors", 0),
        ("shared_prompts", 1),
    ] {
        assert_eq!(report[key], value, "{key} in {report}");
    }
    assert_eq!((&report["kind"], &report["errors"]), (&json!("chat"), &json!([])));
    let number = |value: &Value| value.as_u64().unwrap();
    // The long row counts with what is left of it, and its whole length is the longest.
    assert!(number(&report["longest"]) > 50);
    let short = number(&report["valid"]["tokens"]);
    assert_eq!(number(&report["tokens"]), 40 + 2 * short);
    assert!(number(&report["trained_tokens"]) < number(&report["tokens"]));
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("1 rows repeat an earlier one: line 3 as line 2"), "{warnings}");
    assert_eq!(report["valid"]["rows"], 1);
}

#[test]
fn a_program_gets_every_error_with_line_and_code() {
    let files = Files::new("json-errors");
    let mut lines = vec![row("a", "b"), "{".to_owned(), preference("a", "b", "c")];
    lines.extend((0..120).map(|_| "7".to_owned()));
    let data = files.write("rows.jsonl", &lines);
    let output = check(&[&data, "--model", MODEL, "--json", "--method", "supervised"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["rows"], &report["num_errors"]), (&json!(1), &json!(122)));
    assert_eq!(report["kind"], "mixed");
    let errors = report["errors"].as_array().unwrap();
    assert_eq!(errors.len(), 100);
    assert_eq!((&errors[0]["line"], &errors[0]["code"]), (&json!(2), &json!("invalid_json")));
    assert_eq!((&errors[1]["line"], &errors[1]["code"]), (&json!(3), &json!("wrong_row_kind")));
    assert!(errors[0]["message"].as_str().unwrap().contains("column 1"), "{}", errors[0]);

    let empty = check(&[&files.write("empty.jsonl", &[]), "--model", MODEL, "--json"]);
    let report: Value = serde_json::from_slice(&empty.stdout).unwrap();
    assert_eq!(empty.status.code(), Some(1));
    assert_eq!(report["errors"][0]["code"], "empty_file");
    assert_eq!(report["errors"][0]["line"], 1);
}

#[test]
fn preferences_are_for_dpo_and_count_both_answers() {
    let files = Files::new("preferences");
    let data = files.write("rows.jsonl", &[preference("a", "b", "c"), preference("d", "e", "f")]);
    let check_as = |method: &str| {
        let output = check(&[&data, "--model", MODEL, "--json", "--method", method]);
        (output.status.success(), serde_json::from_slice::<Value>(&output.stdout).unwrap())
    };
    let (fine, report) = check_as("dpo");
    assert!(fine, "{report}");
    assert_eq!((&report["kind"], &report["examples"]), (&json!("preference"), &json!(2)));
    let single = files.write("single.jsonl", &[row("a", "b")]);
    let output = check(&[&single, "--model", MODEL, "--json"]);
    let single: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["tokens"].as_u64(), single["tokens"].as_u64().map(|tokens| 4 * tokens));
    let (fine, report) = check_as("supervised");
    assert!(!fine);
    assert_eq!(report["num_errors"], 2);
    assert_eq!(report["errors"][1]["code"], "wrong_row_kind");
    assert!(
        stdout(&check(&[&data, "--model", MODEL, "--show", "1"])).matches("line 1:").count() == 2
    );
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    command.arg("check").args(arguments).env_remove("CLICOLOR_FORCE");
    command
}

fn check(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn row(question: &str, answer: &str) -> String {
    json!({"messages": [{"role": "user", "content": question},
        {"role": "assistant", "content": answer}]})
    .to_string()
}

fn preference(question: &str, better: &str, worse: &str) -> String {
    json!({"input": {"messages": [{"role": "user", "content": question}]},
        "preferred_output": [{"role": "assistant", "content": better}],
        "non_preferred_output": [{"role": "assistant", "content": worse}]})
    .to_string()
}

/// Data files that are gone with the test.
struct Files(PathBuf);

impl Files {
    fn new(name: &str) -> Self {
        let dir =
            std::env::temp_dir().join(format!("tunesmith-check-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn write(&self, name: &str, lines: &[String]) -> String {
        let path = self.0.join(name);
        fs::write(&path, lines.join("\n")).unwrap();
        path.display().to_string()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
