//! Commands whose reader has gone, as in `tunesmith train | head`.
#![cfg(unix)]

use std::{
    fs::{self, File},
    process::{Command, Output, Stdio},
};

use crate::common::{TempDir, fixture};
use serde_json::json;

/// `tunesmith` in `dir`, where there are a few rows.
fn tunesmith(dir: &TempDir, arguments: &[&str]) -> Command {
    let row = |n: usize| json!({"prompt": format!("say {n}"), "completion": n.to_string()});
    let rows: Vec<String> = (0..6).map(|n| row(n).to_string()).collect();
    fs::write(dir.join("rows.jsonl"), rows.join("\n")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    command.current_dir(&dir.0).args(arguments).arg("--model").arg(fixture("tiny-llama"));
    command.stdin(Stdio::null());
    command
}

/// Somewhere to write that nobody reads.
fn nobody() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn run(mut command: Command) -> Output {
    command.output().unwrap()
}

#[test]
fn a_run_goes_on_to_its_end_when_nobody_reads_what_it_says() {
    for more in [&[][..], &["--events"]] {
        let dir = TempDir::new();
        let train = ["train", "--data", "rows.jsonl", "--valid", "rows.jsonl", "--output", "out"];
        let train = [&train[..], &["--rank", "2", "--max-steps", "3"], more].concat();
        let mut command = tunesmith(&dir, &train);
        command.stdout(nobody()).stderr(nobody());
        assert!(run(command).status.success(), "{more:?}");
        let events = fs::read_to_string(dir.join("out/events.jsonl")).unwrap();
        assert_eq!(events.matches(r#""event":"step""#).count(), 3, "{events}");
        assert!(dir.join("out/report.html").is_file());
    }
}

#[test]
fn what_only_prints_ends_quietly_without_a_reader() {
    let dir = TempDir::new();
    for arguments in
        [&["check", "rows.jsonl", "--show", "3"][..], &["check", "rows.jsonl", "--json"]]
    {
        let mut command = tunesmith(&dir, arguments);
        command.stdout(nobody());
        let output = run(command);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && error.is_empty(), "{error}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn what_a_full_disk_swallows_is_an_error_not_a_panic() {
    let dir = TempDir::new();
    let mut command = tunesmith(&dir, &["check", "rows.jsonl"]);
    command.stdout(File::options().write(true).open("/dev/full").unwrap());
    let output = run(command);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.starts_with("error: standard output: No space left on device"), "{error}");
}
