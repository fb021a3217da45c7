//! `tunesmith files` and `tunesmith jobs` against a server.

use std::{
    fs,
    process::{Command, Output},
};

use crate::common::{Server, TempDir, fake::Fake, fixture};
use serde_json::{Value, json};

fn tunesmith(url: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TUNESMITH_")) {
        command.env_remove(name);
    }
    command.env("TUNESMITH_URL", url).args(args).output().unwrap()
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap().trim().to_owned()
}

#[test]
fn a_file_goes_there_and_back() {
    let dir = TempDir::new();
    let args = ["--data-dir", dir.0.to_str().unwrap(), "--api-key", "user", "--admin-key", "root"];
    let server = Server::start(&fixture("tiny-llama"), &args);
    let url = format!("http://{}/v1/", server.address);
    let local = dir.join("größe \"1\".jsonl");
    let content: Vec<u8> = (0..2_000_000_u32).map(|i| (i % 251) as u8).collect();
    fs::write(&local, &content).unwrap();
    let run = |args: &[&str]| tunesmith(&url, &[args, &["--api-key", "root"]].concat());
    let id = said(&run(&["files", "upload", local.to_str().unwrap(), "--purpose", "evals"]));
    assert!(id.starts_with("file-"), "{id}");
    let list = said(&run(&["files", "list", "--purpose", "evals"]));
    assert!(list.contains(&id) && list.contains("größe") && list.contains("1.91 MiB"), "{list}");
    assert_eq!(said(&run(&["files", "list", "--purpose", "batch"])), "");
    let shown: Value =
        serde_json::from_str(&said(&run(&["files", "show", &id, "--json"]))).unwrap();
    assert_eq!((&shown["id"], &shown["bytes"]), (&json!(id), &json!(content.len())));
    let back = dir.join("back");
    said(&run(&["files", "download", &id, "-o", back.to_str().unwrap()]));
    assert_eq!(fs::read(&back).unwrap(), content);
    assert_eq!(run(&["files", "download", &id]).stdout, content);
    said(&run(&["files", "delete", &id]));
    let gone = run(&["files", "show", &id]);
    assert!(!gone.status.success());
    let error = String::from_utf8(gone.stderr).unwrap();
    assert!(error.contains(&format!("No such File object: {id}")), "{error}");
    let refused = tunesmith(&url, &["files", "list"]);
    assert!(String::from_utf8(refused.stderr).unwrap().contains("API key"), "{:?}", refused.status);
}

#[test]
fn mistakes_are_told_in_words() {
    let fake = Fake::start(|_, _| (200, "<html>".to_owned()));
    for (url, args, expected) in [
        ("http://127.0.0.1:1", vec!["files", "list"], "http://127.0.0.1:1"),
        (fake.url.as_str(), vec!["jobs", "list"], "does not answer as this server would"),
        (fake.url.as_str(), vec!["files", "upload", "/nope"], "/nope"),
        (fake.url.as_str(), vec!["files", "upload", "/tmp"], "/tmp is not a file"),
    ] {
        let output = tunesmith(url, &args);
        assert!(!output.status.success(), "{args:?}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(expected), "{args:?}: {error}");
    }
}

/// A server with one job, which goes a step further each time it is asked for, and fails to answer
/// once in between.
fn job_server(end: &'static str) -> Fake {
    let asked_for = std::sync::Mutex::new(0);
    Fake::start(move |asked, _| {
        let answer = |value: Value| (200, value.to_string());
        let path = asked.line.split(' ').nth(1).unwrap().split('?').next().unwrap();
        let mut turn = asked_for.lock().unwrap();
        let event = |number: u64| match number {
            0 => {
                json!({"id": "e0", "type": "message", "message": "Created fine-tuning job: ftjob-1"})
            }
            4 => json!({"id": "e4", "type": "message", "message": format!("The job has {end}")}),
            step => json!({
                "id": format!("e{step}"), "type": "metrics",
                "message": format!("Step {step}/3: training loss=0.5"),
                "data": {"step": step, "total_steps": 3, "train_loss": 0.5, "valid_loss": 0.6},
            }),
        };
        match path {
            "/v1/files" => answer(json!({"id": "file-up"})),
            "/v1/fine_tuning/jobs/ftjob-1/events" => {
                let after = asked.line.contains("after=");
                let events: Vec<Value> = (0..=*turn).rev().map(event).collect();
                answer(
                    json!({"object": "list", "data": if after { vec![] } else { events }, "has_more": false}),
                )
            }
            "/v1/fine_tuning/jobs/ftjob-1" => {
                *turn += 1;
                if *turn == 2 {
                    return (
                        503,
                        json!({"error": {"message": "the server is shutting down"}}).to_string(),
                    );
                }
                let is_over = *turn >= 4;
                *turn = (*turn).min(4);
                answer(json!({
                    "id": "ftjob-1", "status": if is_over { end } else { "running" },
                    "fine_tuned_model": if is_over && end == "succeeded" { json!("ft:m:o:s:1") } else { Value::Null },
                    "error": if end == "failed" { json!({"message": "the disk is full"}) } else { Value::Null },
                    "result_files": [],
                }))
            }
            _ => answer(json!({"id": "ftjob-1", "status": "validating_files"})),
        }
    })
}

#[test]
fn a_job_is_created_from_a_local_file_and_watched_to_its_end() {
    let dir = TempDir::new();
    let rows = dir.join("train.jsonl");
    fs::write(&rows, "{}\n").unwrap();
    let fake = job_server("succeeded");
    let output = tunesmith(
        &fake.url,
        &[
            "jobs",
            "create",
            "--training-file",
            rows.to_str().unwrap(),
            "--validation-file",
            "file-known",
            "--model",
            "m",
            "--suffix",
            "s",
            "--method",
            "dpo",
            "--epochs",
            "2",
            "--beta",
            "0.2",
            "--seed",
            "7",
            "--alias",
            "prod",
            "--watch",
        ],
    );
    let said = said(&output);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], "ftjob-1");
    assert!(lines.contains(&"the server is shutting down; trying again"), "{said}");
    for step in 1..=3 {
        let line = format!("Step {step}/3: training loss=0.5");
        assert_eq!(said.matches(&line).count(), 1, "{said}");
    }
    assert_eq!(
        lines[lines.len() - 3..],
        ["The job has succeeded", "ftjob-1: succeeded", "model: ft:m:o:s:1"]
    );
    let asked = fake.asked();
    assert!(asked[0].line.starts_with("POST /v1/files") && asked[0].body.contains("{}\n"));
    let body: Value = serde_json::from_str(&asked[1].body).unwrap();
    assert_eq!(
        body,
        json!({
            "model": "m", "training_file": "file-up", "validation_file": "file-known",
            "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "beta": 0.2}}},
            "suffix": "s", "seed": 7, "alias": "prod",
        })
    );
}

#[test]
fn a_job_that_fails_is_an_exit_code_and_a_reason() {
    let fake = job_server("failed");
    let output = tunesmith(&fake.url, &["jobs", "watch", "ftjob-1"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.ends_with("ftjob-1: failed\nerror: the disk is full\n"), "{said}");
}
