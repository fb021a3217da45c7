//! A disk that fails while a run writes: at every single change of a file or folder the run ends with
//! an error that names it, or goes on if that is right; the checkpoint before is there, and the run goes
//! on from it to the adapter that it would have made undisturbed.
// Release builds cannot be told to fail.
#![cfg(debug_assertions)]

use std::{fs, path::Path, process::Command, sync::atomic::AtomicBool};

use crate::{
    common::{TempDir, copy_dir, fixture, records::SECOND},
    jobs::{self, row},
};
use tunesmith::{
    adapters::LoraAdapter,
    model::ModelConfig,
    publish::faults,
    train::{
        TrainConfig, TrainError, TrainEvent, TrainJob, TrainSummary, newest_checkpoint, run,
        work_dir,
    },
};

/// A run of six steps, each with an event, with dropout, a checkpoint after every second step, an adapter
/// after each of three epochs, and the best parameters so far.
fn job(dir: &Path) -> TrainJob {
    let config = TrainConfig {
        model: fixture("tiny-llama").display().to_string(),
        data: "rows.jsonl".into(),
        output: dir.join("adapter"),
        rank: 2,
        dropout: 0.1,
        lr: Some(1e-2),
        epochs: 3.0,
        batch_size: 2,
        checkpoint_every: 2,
        eval_every: 3,
        keep_best: true,
        parity_examples: 1,
        epoch_dir: Some(dir.join("epochs")),
        keep_epochs: 1,
        overwrite: true,
        ..TrainConfig::default()
    };
    let example = |index: usize| {
        let token = |at: usize| (20 + index + at % 4) as u32;
        row(index, (0..6).map(token).collect(), vec![true; 6])
    };
    jobs::job(config, (0..4).map(example).collect(), vec![example(5)])
}

/// Runs to the end or to an error; the steps of the checkpoints that it told of.
fn outcome(job: &TrainJob) -> (Result<TrainSummary, TrainError>, Vec<usize>) {
    let mut checkpoints = Vec::new();
    let mut observer = |event: &TrainEvent| {
        if let TrainEvent::Checkpointed { step, .. } = event {
            checkpoints.push(*step);
        }
    };
    let result = run(job, &mut observer, &AtomicBool::new(false));
    (result, checkpoints)
}

fn weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("adapter_model.safetensors")).unwrap()
}

/// Files and folders of `dir` that only a process that is at work may have.
fn left_behind(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.into_string().unwrap());
    names.filter(|name| name.contains(".tmp-") || name.contains(".work")).collect()
}

/// Lets change after change of a run fail in this way, every `stride`-th, until the run makes no more
/// of them. `old`: what is at the output before. Returns how many there are.
fn fail_everywhere(kind: &str, stride: usize, old: Option<&str>) -> usize {
    let undisturbed = TempDir::in_memory();
    assert!(outcome(&job(&undisturbed.0)).0.is_ok());
    let whole = weights(&undisturbed.join("adapter"));
    let base = ModelConfig::from_dir(&fixture("tiny-llama")).unwrap();
    for at in (0..).step_by(stride) {
        let dir = TempDir::in_memory();
        let mut job = job(&dir.0);
        let output = job.config.output.clone();
        if let Some(old) = old {
            copy_dir(&fixture(old), &output);
        }
        let before = old.map(|_| weights(&output));

        assert!(faults::arm(&format!("{kind}@{at}")));
        let (result, checkpoints) = outcome(&job);
        let Some(change) = faults::disarm() else {
            assert!(result.is_ok());
            return at;
        };
        let what = format!("{kind}@{at} ({change})");
        let Err(error) = result else {
            // It was not needed for the adapter.
            assert!(weights(&output) == whole, "{what}: other weights");
            continue;
        };
        // A dead disk may have been met before where it did not matter.
        let path = if kind == "dead" { dir.0.to_str() } else { change.rsplit(' ').next() }.unwrap();
        let error = error.to_string();
        let reason =
            if ["enospc", "short"].contains(&kind) { "No space left" } else { "Input/output" };
        assert!(error.contains(path) && error.contains(reason), "{what}: {error}");
        // Whatever is at the output is whole: the old adapter or the new one.
        if old.is_some() || output.exists() {
            LoraAdapter::read(&output, &base, false).unwrap();
            let found = weights(&output);
            assert!(before == Some(found.clone()) || found == whole, "{what}: neither old nor new");
        }
        // The last checkpoint that was told of, or the one that only failed to be told of.
        let folder = work_dir(&output).join("checkpoints");
        if let Some(told) = checkpoints.last().filter(|_| folder.exists()) {
            let mut unusable = |reason: &TrainError| panic!("{what}: {reason}");
            let found = newest_checkpoint(&folder, &mut unusable).unwrap().unwrap();
            assert!((*told..=told + 2).contains(&found.step), "{what}: {}", found.step);
        }
        job.config.resume = true;
        outcome(&job).0.unwrap_or_else(|error| panic!("{what}: the disk is well again: {error}"));
        assert!(weights(&output) == whole, "{what}: other weights after resuming");
        assert_eq!(left_behind(&dir.0), Vec::<String>::new(), "{what}");
        assert_eq!(left_behind(&dir.join("epochs")), Vec::<String>::new(), "{what}");
    }
    unreachable!("a run makes so many changes and no more")
}

#[test]
fn a_full_disk_costs_no_more_than_the_steps_since_the_last_checkpoint_wherever_it_is_met() {
    let changes = fail_everywhere("enospc", 1, None);
    assert!(changes > 100, "only {changes} changes went through the door");
}

#[test]
fn a_broken_disk_leaves_the_adapter_that_was_there_or_the_new_one() {
    fail_everywhere("eio", 1, Some(SECOND));
}

#[test]
fn a_write_that_was_cut_short_is_never_taken_for_whole() {
    fail_everywhere("short", 2, Some(SECOND));
}

#[test]
fn a_disk_that_dies_and_comes_back_leaves_nothing_behind() {
    fail_everywhere("dead", 3, None);
}

#[test]
#[ignore = "takes a minute; each kind of fault at each change, with and without an old adapter"]
fn no_fault_of_any_kind_at_any_change_does_harm() {
    for kind in ["enospc", "eio", "short", "dead"] {
        for old in [None, Some(SECOND)] {
            fail_everywhere(kind, 1, old);
        }
    }
}

#[test]
fn the_program_names_the_file_and_ends_and_goes_on_when_asked() {
    let dir = TempDir::new();
    let row = r#"{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "red"}]}"#;
    fs::write(dir.join("rows.jsonl"), format!("{row}\n").repeat(12)).unwrap();
    let train = |output: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
        command.args(["train", "--resume", "--max-steps", "6", "--checkpoint-every", "2"]);
        command.args(["--samples", "0", "--model"]).arg(fixture("tiny-llama"));
        command.arg("--data").arg(dir.join("rows.jsonl")).arg("--output").arg(dir.join(output));
        command
    };
    assert!(train("whole").output().unwrap().status.success());
    let whole = weights(&dir.join("whole"));
    for (number, fault) in ["enospc@0", "short@12", "eio@25", "dead@40"].iter().enumerate() {
        let name = format!("faulty-{number}");
        let output = train(&name).env(faults::VARIABLE, fault).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{fault}: {said}");
        let error = said.lines().find(|line| line.starts_with("error: ")).unwrap();
        assert!(error.contains(&format!("{}", dir.join(&name).display())), "{fault}: {error}");
        assert!(error.contains("(os error "), "{fault}: {error}");
        assert!(train(&name).output().unwrap().status.success(), "{fault}");
        assert!(weights(&dir.join(&name)) == whole, "{fault}: other weights");
    }
}
