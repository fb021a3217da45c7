//! `tunesmith jobs` against a server that trains.
#![cfg(unix)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use crate::common::{Server, TempDir, fixture, jobs::chat_rows, server::command};
use serde_json::Value;

fn jobs(server: &Server, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TUNESMITH_")) {
        command.env_remove(name);
    }
    let url = format!("http://{}/v1", server.address);
    command.env("TUNESMITH_URL", url).arg("jobs").args(args).output().unwrap()
}

/// What a command that goes well prints.
fn said(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap().trim().to_owned()
}

fn show(server: &Server, id: &str) -> Value {
    serde_json::from_str(&said(&jobs(server, &["show", id]))).unwrap()
}

/// A server with a data folder, and a file of rows.
fn start(dir: &TempDir) -> (Server, String) {
    let rows = dir.join("rows.jsonl");
    fs::write(&rows, chat_rows(12)).unwrap();
    let data = dir.join("data");
    let server = Server::start(&fixture("tiny-llama"), &["--data-dir", data.to_str().unwrap()]);
    (server, rows.to_str().unwrap().to_owned())
}

#[test]
fn a_job_is_created_watched_listed_and_shown() {
    let dir = TempDir::new();
    let (server, rows) = start(&dir);
    let create = ["create", "--training-file", &rows, "--model", "tiny-llama", "--epochs", "2"];
    let watched = said(&jobs(&server, &[&create[..], &["--suffix", "s", "--watch"]].concat()));
    let id = watched.lines().next().unwrap();
    assert!(watched.contains(&format!("{id}: succeeded")), "{watched}");

    let list = said(&jobs(&server, &["list"]));
    assert!(list.contains(id) && list.contains("succeeded"), "{list}");
    let job = show(&server, id);
    let model = job["fine_tuned_model"].as_str().unwrap();
    assert!(watched.contains(&format!("\nmodel: {model}\n")), "{watched}");
    let events = said(&jobs(&server, &["events", id]));
    let (first, last) = (events.lines().next().unwrap(), events.lines().next_back().unwrap());
    assert!(first.ends_with(&format!("Created fine-tuning job: {id}")), "{first}");
    assert!(last.ends_with("The job has successfully completed"), "{last}");
    let checkpoints = said(&jobs(&server, &["checkpoints", id]));
    assert_eq!(checkpoints.lines().count(), 2, "{checkpoints}");
    // It is over, and there are no others.
    for (args, wanted) in
        [(["cancel", id], "already completed"), (["show", "ftjob-none"], "ftjob-none")]
    {
        let output = jobs(&server, &args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(wanted), "{args:?}: {error}");
    }
}

#[test]
fn a_job_is_paused_resumed_and_cancelled() {
    let dir = TempDir::new();
    let (server, rows) = start(&dir);
    let create = ["create", "--training-file", &rows, "--model", "tiny-llama", "--epochs", "50"];
    let id = said(&jobs(&server, &create));
    let paused = said(&jobs(&server, &["pause", &id]));
    // Its file may still be looked at.
    assert!(
        ["paused", "validating_files"].iter().any(|status| paused.contains(status)),
        "{paused}"
    );
    server.wait_until("it is paused", |server| show(server, &id)["status"] == "paused");
    assert!(said(&jobs(&server, &["resume", &id])).starts_with(&format!("{id} is ")));
    said(&jobs(&server, &["cancel", &id]));
    server.wait_until("it has ended", |server| show(server, &id)["status"] == "cancelled");
    // Following what was cancelled is no success.
    assert_eq!(jobs(&server, &["watch", &id]).status.code(), Some(1));
}

#[test]
#[cfg(target_os = "linux")]
fn a_server_whose_program_was_replaced_on_disk_trains_on() {
    let dir = TempDir::new();
    let (program, data) = (dir.join("tunesmith"), dir.join("data"));
    let built = Path::new(env!("CARGO_BIN_EXE_tunesmith"));
    // Another file system has no links to it.
    fs::hard_link(built, &program).or_else(|_| fs::copy(built, &program).map(drop)).unwrap();
    let wanted = command(&fixture("tiny-llama"), &["--data-dir", data.to_str().unwrap()]);
    let mut command = Command::new(&program);
    command.args(wanted.get_args()).stderr(std::process::Stdio::piped());
    let server = Server::from_command(command);
    fs::write(dir.join("new"), "not the program that was started").unwrap();
    fs::rename(dir.join("new"), &program).unwrap();

    let rows = dir.join("rows.jsonl");
    fs::write(&rows, chat_rows(12)).unwrap();
    let rows = rows.to_str().unwrap();
    let create = ["create", "--training-file", rows, "--model", "tiny-llama", "--watch"];
    said(&jobs(&server, &create));
}
