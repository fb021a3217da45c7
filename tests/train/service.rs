//! A run as another program starts it: events on the standard output, the leash, limits, epochs,
//! and what a server needs to compare itself with the trainer.
#![cfg(unix)]

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio},
};

use crate::common::{TempDir, fixture};
use serde_json::{Value, json};

const WORDS: [&str; 5] = ["red", "green", "blue", "black", "white"];

/// `count` chat rows.
fn chats(path: &Path, count: usize) {
    let row = |n: usize| {
        let messages = json!([{"role": "user", "content": format!("question {n}")},
            {"role": "assistant", "content": WORDS[n % WORDS.len()]}]);
        json!({"messages": messages}).to_string() + "\n"
    };
    fs::write(path, (0..count).map(row).collect::<String>()).unwrap();
}

/// `count` preference rows: one word is always better than the next.
fn preferences(path: &Path, count: usize) {
    let row = |n: usize| {
        let answer = |n: usize| json!([{"role": "assistant", "content": WORDS[n % WORDS.len()]}]);
        let input = json!({"messages": [{"role": "user", "content": format!("question {n}")}]});
        json!({"input": input, "preferred_output": answer(n), "non_preferred_output": answer(n + 1)})
            .to_string()
            + "\n"
    };
    fs::write(path, (0..count).map(row).collect::<String>()).unwrap();
}

/// `tunesmith train --events` into DIR/adapter with rows.jsonl and valid.jsonl of DIR.
fn train(dir: &TempDir, more: &[&str]) -> Command {
    train_into(dir, "adapter", more)
}

fn train_into(dir: &TempDir, name: &str, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    command
        .args(["train", "--events", "--rank", "4", "--lr", "1e-2", "--batch-size", "2"])
        .arg("--model")
        .arg(fixture("tiny-llama"))
        .arg("--data")
        .arg(dir.join("rows.jsonl"))
        .arg("--valid")
        .arg(dir.join("valid.jsonl"))
        .arg("--output")
        .arg(dir.join(name))
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// The events of a run that went well. Every line is one.
fn events(output: &Output) -> Vec<Value> {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

fn named<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["event"] == name).collect()
}

/// Names and adapter bytes of what is in an epochs' folder.
fn epochs(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let read = |entry: fs::DirEntry| {
        let weights = fs::read(entry.path().join("adapter_model.safetensors")).unwrap_or_default();
        (entry.file_name().into_string().unwrap(), weights)
    };
    let mut found: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| read(entry.unwrap())).collect();
    found.sort();
    found
}

#[test]
fn the_events_of_a_run_are_all_that_it_prints() {
    let dir = TempDir::new();
    chats(&dir.join("rows.jsonl"), 8);
    chats(&dir.join("valid.jsonl"), 5);
    let epoch_dir = dir.join("epochs").display().to_string();
    let more = ["--epochs", "4", "--eval-every", "3", "--valid-batch", "2"];
    let more = [&more[..], &["--epoch-dir", &epoch_dir, "--parity-examples", "7"]].concat();
    let events = events(&train(&dir, &more).output().unwrap());
    assert_eq!(events[0]["event"], "started");
    assert_eq!(events[0]["total_steps"], 16);
    assert_eq!(events.last().unwrap()["event"], "published");
    assert_eq!(named(&events, "step").len(), 16);

    // Every third step asks the next two rows of five, the end of an epoch all of them.
    let validated: Vec<_> = named(&events, "validated")
        .iter()
        .map(|event| (event["step"].as_u64().unwrap(), event["full"].as_bool().unwrap()))
        .collect();
    let expected = [
        (3, false),
        (4, true),
        (6, false),
        (8, true),
        (9, false),
        (12, true),
        (15, false),
        (16, true),
    ];
    assert_eq!(validated, expected);
    let ends: Vec<_> = named(&events, "epoch")
        .iter()
        .map(|event| (event["step"].as_u64().unwrap(), event["epoch"].as_u64().unwrap()))
        .collect();
    assert_eq!(ends, [(4, 1), (8, 2), (12, 3), (16, 4)]);
    let path = Path::new(&epoch_dir);
    assert_eq!(named(&events, "epoch")[3]["path"], path.join("step-16").display().to_string());

    // The last three are kept; the newest is what is published.
    let kept = epochs(path);
    let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["step-12", "step-16", "step-8"]);
    let published = fs::read(dir.join("adapter/adapter_model.safetensors")).unwrap();
    assert!(kept[1].1 == published && kept[0].1 != published);
    for file in ["adapter_config.json", "tokenizer.json", "tunesmith_card.json"] {
        assert!(path.join("step-12").join(file).is_file(), "{file} is missing");
    }

    // The validation rows first, then training rows; their mean is the loss that was validated.
    let parity = fs::read(dir.join("adapter/parity.json")).unwrap();
    let parity: Value = serde_json::from_slice(&parity).unwrap();
    let examples = parity["examples"].as_array().unwrap();
    assert_eq!(examples.len(), 7);
    let (mut sum, mut count) = (0.0, 0.0);
    for example in &examples[..5] {
        let mask = example["loss_mask"].as_array().unwrap();
        let logprobs = example["logprobs"].as_array().unwrap();
        assert_eq!(example["tokens"].as_array().unwrap().len(), mask.len());
        assert_eq!(logprobs.len(), mask.iter().filter(|counts| **counts == true).count());
        sum -= logprobs.iter().map(|value| value.as_f64().unwrap()).sum::<f64>();
        count += logprobs.len() as f64;
    }
    let loss = named(&events, "validated").last().unwrap()["loss"].as_f64().unwrap();
    assert!((sum / count - loss).abs() < 1e-5, "{} is not {loss}", sum / count);

    // A run that has ended says so again when it is asked to go on.
    let again = self::events(&train(&dir, &["--resume"]).output().unwrap());
    assert_eq!((again.len(), &again[0]["event"]), (1, &json!("published")));
}

#[test]
fn preferences_are_learned_and_a_killed_run_leaves_the_same_epochs_and_adapter() {
    let dir = TempDir::new();
    preferences(&dir.join("rows.jsonl"), 10);
    preferences(&dir.join("valid.jsonl"), 3);
    let command = |name: &str, more: &[&str]| {
        let epoch_dir = dir.join(&format!("{name}-epochs")).display().to_string();
        let dpo = ["--objective", "dpo", "--dropout", "0.1", "--epochs", "4"];
        let saved = ["--checkpoint-every", "3", "--epoch-dir", &epoch_dir];
        train_into(&dir, name, &[&dpo[..], &saved, more].concat())
    };
    let whole = events(&command("whole", &[]).output().unwrap());
    let steps = named(&whole, "step");
    assert_eq!(steps.len(), 20);
    assert!((steps[0]["loss"].as_f64().unwrap() - std::f64::consts::LN_2).abs() < 1e-9);
    assert_eq!(steps[0]["reward_margin"], 0.0);
    let last = named(&whole, "validated").last().copied().unwrap();
    assert!(last["reward_margin"].as_f64().unwrap() > 0.0, "{last}");
    assert_eq!(last["token_accuracy"], 1.0, "{last}");
    let expected = epochs(&dir.join("whole-epochs"));
    let adapter = |name: &str| fs::read(dir.join(name).join("adapter_model.safetensors")).unwrap();

    for (index, killed_at) in [1, 2, 5, 9, 14, 19].into_iter().enumerate() {
        let name = format!("killed-{index}");
        let mut child = command(&name, &[]).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let wanted = format!("\"step\":{killed_at},");
        let is_wanted =
            |line: &String| line.contains("\"event\":\"step\"") && line.contains(&wanted);
        assert!(lines.any(|line| is_wanted(&line.unwrap())), "step {killed_at} never came");
        child.kill().unwrap();
        child.wait().unwrap();
        // What a process that is killed while it publishes leaves behind.
        fs::create_dir_all(dir.join(&format!("{name}-epochs/step-10.tmp-1-1"))).unwrap();
        let resumed = events(&command(&name, &["--resume"]).output().unwrap());
        assert_eq!(resumed.last().unwrap()["event"], "published");
        assert!(adapter(&name) == adapter("whole"), "killed at step {killed_at}");
        let left = epochs(&dir.join(&format!("{name}-epochs")));
        assert!(left == expected, "killed at step {killed_at}: other epochs are left");
    }
}

#[test]
fn preferences_may_follow_supervised_training_and_resume_from_the_same_start() {
    let dir = TempDir::new();
    chats(&dir.join("rows.jsonl"), 8);
    chats(&dir.join("valid.jsonl"), 2);
    events(&train(&dir, &["--epochs", "2"]).output().unwrap());
    fs::rename(dir.join("adapter"), dir.join("first")).unwrap();
    preferences(&dir.join("rows.jsonl"), 8);
    preferences(&dir.join("valid.jsonl"), 2);
    let first = dir.join("first").display().to_string();
    let more = ["--objective", "dpo", "--init-adapter", &first, "--max-steps", "9"];
    let more = [&more[..], &["--checkpoint-every", "2"]].concat();
    let whole = events(&train(&dir, &more).output().unwrap());
    // The first adapter is what is compared with, so nothing has been gained yet.
    assert!(
        (named(&whole, "step")[0]["loss"].as_f64().unwrap() - std::f64::consts::LN_2).abs() < 1e-9
    );
    let weights = || fs::read(dir.join("adapter/adapter_model.safetensors")).unwrap();
    let undisturbed = weights();
    fs::remove_dir_all(dir.join("adapter")).unwrap();

    let mut child = train(&dir, &more).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("\"event\":\"checkpointed\",\"step\":4")));
    child.kill().unwrap();
    child.wait().unwrap();
    events(&train(&dir, &[&more[..], &["--resume"]].concat()).output().unwrap());
    assert!(weights() == undisturbed);
}

/// A long run on a leash: the process, its events and the leash.
fn leashed(dir: &TempDir, more: &[&str]) -> (Child, BufReader<ChildStdout>, ChildStdin) {
    let more = [&["--leash", "--max-steps", "1000000"], more].concat();
    let mut child = train(dir, &more).stdin(Stdio::piped()).spawn().unwrap();
    let leash = child.stdin.take().unwrap();
    let mut events = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("\"event\":\"step\"") {
        line.clear();
        assert!(events.read_line(&mut line).unwrap() > 0, "the run ended");
    }
    (child, events, leash)
}

fn last_event(events: &mut BufReader<ChildStdout>) -> Value {
    let mut text = String::new();
    events.read_to_string(&mut text).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

#[test]
fn a_run_stops_with_a_checkpoint_when_its_leash_is_pulled() {
    let dir = TempDir::new();
    chats(&dir.join("rows.jsonl"), 8);
    chats(&dir.join("valid.jsonl"), 2);
    let (mut child, mut events, leash) = leashed(&dir, &[]);
    drop(leash);
    let stopped = last_event(&mut events);
    assert_eq!(stopped["event"], "stopped");
    assert!(child.wait().unwrap().success());
    let step = stopped["step"].as_u64().unwrap();
    let checkpoint = dir.join(&format!("adapter.work/checkpoints/step-{step:08}"));
    assert!(checkpoint.is_dir(), "{} is missing", checkpoint.display());
    assert!(!dir.join("adapter").exists());
}

#[test]
fn signals_that_follow_each_other_do_not_cost_a_leashed_run_its_checkpoint() {
    let dir = TempDir::new();
    chats(&dir.join("rows.jsonl"), 8);
    chats(&dir.join("valid.jsonl"), 2);
    let (mut child, mut events, leash) = leashed(&dir, &[]);
    for _ in 0..3 {
        Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    }
    drop(leash);
    assert_eq!(last_event(&mut events)["event"], "stopped");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_run_goes_on_while_its_leash_is_held_and_at_the_priority_it_was_given() {
    let dir = TempDir::new();
    chats(&dir.join("rows.jsonl"), 8);
    chats(&dir.join("valid.jsonl"), 2);
    let (mut child, _events, _leash) = leashed(&dir, &["--nice", "7"]);
    let own = niceness("self");
    let threads = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    for thread in threads {
        let id = thread.unwrap().file_name().into_string().unwrap();
        let place = format!("{}/task/{id}", child.id());
        assert_eq!(niceness(&place), (own + 7).min(19), "thread {id}");
    }
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}

/// The niceness of a process, or of one of its threads, as Linux shows it.
fn niceness(process: &str) -> i64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1;
    fields.split_whitespace().nth(16).unwrap().parse().unwrap()
}

#[test]
fn a_run_that_outgrows_its_memory_fails_in_itself() {
    let dir = TempDir::new();
    chats(&dir.join("rows.jsonl"), 8);
    chats(&dir.join("valid.jsonl"), 2);
    // A backtrace must not get in the way of the end.
    for limit in ["1MiB", "4MiB", "8MiB"] {
        let mut command = train(&dir, &["--memory-limit", limit, "--threads", "1"]);
        let output = command.env("RUST_BACKTRACE", "1").output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{limit}");
        assert!(error.contains("error: ") || error.contains("memory allocation"), "{error}");
        assert!(!dir.join("adapter").exists());
    }
    let fine = train(&dir, &["--memory-limit", "2GiB", "--max-steps", "1"]).output().unwrap();
    assert_eq!(events(&fine).last().unwrap()["event"], "published");
}

#[test]
fn rows_of_the_wrong_kind_and_settings_that_do_not_fit_are_named() {
    let dir = TempDir::new();
    chats(&dir.join("rows.jsonl"), 8);
    preferences(&dir.join("valid.jsonl"), 2);
    let epochs = dir.join("epochs");
    fs::create_dir_all(epochs.join("step-3")).unwrap();
    let epochs = epochs.display().to_string();
    for (more, wanted) in [
        (&["--objective", "dpo"][..], "rows.jsonl:1: no preference row"),
        (&[], "valid.jsonl: 2 problems, the first: line 1: a preference row"),
        (&["--objective", "dpo", "--dpo-beta", "3"], "dpo_beta is 3.0"),
        (&["--objective", "dpo", "--method", "full"], "objective is \"dpo\""),
        (&["--objective", "dpo", "--loss-on", "all"], "loss_on is \"all\""),
        (&["--valid-batch", "0"], "valid_batch is 0"),
        (&["--memory-limit", "much"], "`much` is not a number of bytes"),
    ] {
        let output = train(&dir, more).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(wanted), "{wanted:?} is not in {error}");
        assert!(error.lines().any(|line| line.starts_with("error: ")), "{error}");
        assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    chats(&dir.join("valid.jsonl"), 2);
    let more = ["--epoch-dir", epochs.as_str(), "--max-steps", "1"];
    let output = train(&dir, &more).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("step-3 exists already"), "{error}");
    events(&train(&dir, &[&more[..], &["--overwrite"]].concat()).output().unwrap());
    assert!(!Path::new(&epochs).join("step-3").exists());
}
