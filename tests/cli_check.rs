//! `tunesmith check`, as a user runs it.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use serde_json::json;

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
    assert!(String::from_utf8_lossy(&missing.stderr).contains("/nowhere/rows.jsonl"));
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
