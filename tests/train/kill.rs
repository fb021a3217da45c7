//! The program itself: killed with SIGKILL at any moment and resumed it publishes the same adapter;
//! asked to stop by SIGTERM it says how to go on.
#![cfg(unix)]

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use crate::common::{TempDir, fixture};

/// A folder with rows to train on; removed at the end.
struct Scratch(TempDir);

impl Scratch {
    fn new() -> Self {
        let dir = TempDir::new();
        let row = |n: usize| {
            let (question, answer) =
                (["one", "two", "three"][n % 3], ["red", "green", "blue"][n % 3]);
            format!(
                r#"{{"messages": [{{"role": "user", "content": "{question} {n}"}}, {{"role": "assistant", "content": "{answer}"}}]}}"#
            ) + "\n"
        };
        fs::write(dir.join("rows.jsonl"), (0..40).map(row).collect::<String>()).unwrap();
        Self(dir)
    }

    /// `tunesmith train` with a checkpoint after every second one.
    fn train(&self, output: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
        command
            .args(["train", "--checkpoint-every", "2"])
            .args(["--dropout", "0.05", "--rank", "4", "--lr", "1e-3"])
            .arg("--model")
            .arg(fixture("tiny-llama"))
            .arg("--data")
            .arg(self.0.join("rows.jsonl"))
            .arg("--output")
            .arg(self.0.join(output))
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }
}

fn succeeded(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn weights(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("adapter_model.safetensors")).unwrap()
}

/// Waits until the run in `work` has logged `count` lines, or has ended.
fn wait_for_events(work: &Path, count: usize, child: &mut Child) {
    wait_for_lines(work, "", count, child);
}

/// Waits until the run in `work` has made `count` steps, or has ended.
fn wait_for_steps(work: &Path, count: usize, child: &mut Child) {
    wait_for_lines(work, "\"event\":\"step\"", count, child);
}

fn wait_for_lines(work: &Path, with: &str, count: usize, child: &mut Child) {
    let since = Instant::now();
    loop {
        let log = fs::read_to_string(work.join("events.jsonl")).unwrap_or_default();
        let ended = child.try_wait().unwrap().is_some();
        if log.lines().filter(|line| line.contains(with)).count() >= count
            || ended
            || since.elapsed() > Duration::from_secs(120)
        {
            return;
        }
        sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_killed_run_resumes_to_the_same_weights_wherever_it_was_killed() {
    let scratch = Scratch::new();
    let started = Instant::now();
    succeeded(
        &scratch.train("whole", &["--max-steps", "60", "--batch-size", "2"]).output().unwrap(),
    );
    let duration = started.elapsed();
    let whole = weights(&scratch.0.join("whole"));
    // Moments spread over the run by the golden ratio; the second number shifts them within it.
    for moment in 1..=6_u32 {
        let mut child = scratch
            .train("killed", &["--resume", "--max-steps", "60", "--batch-size", "2"])
            .spawn()
            .unwrap();
        sleep(duration.mul_f64(f64::from(moment) * 0.618 % 1.0));
        // It may have ended already, which is as good a moment as any.
        let _ = child.kill();
        child.wait().unwrap();
        // Killed again while it resumes.
        let mut child = scratch
            .train("killed", &["--resume", "--max-steps", "60", "--batch-size", "2"])
            .spawn()
            .unwrap();
        sleep(duration.mul_f64(f64::from(moment) * 0.382 % 0.5));
        let _ = child.kill();
        child.wait().unwrap();
        succeeded(
            &scratch
                .train("killed", &["--resume", "--max-steps", "60", "--batch-size", "2"])
                .output()
                .unwrap(),
        );
        let output = scratch.0.join("killed");
        assert!(weights(&output) == whole, "killed at moment {moment}");
        let left: Vec<_> = fs::read_dir(&scratch.0.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains(".tmp-") || name.contains(".work"))
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        fs::remove_dir_all(&output).unwrap();
    }
}

/// Kills one run of 200 steps so often, with SIGKILL, at steps spread over it and at any moment within
/// them; a fifth of the processes while they start. With dropout and packed rows, it must make the adapter of an
/// undisturbed run.
fn kill_often(kills: usize) {
    const STEPS: usize = 200;
    let scratch = Scratch::new();
    let settings =
        "--resume --max-steps 200 --samples 0 --batch-size 2 --packing bfd --max-length 64";
    let settings: Vec<&str> = settings.split(' ').collect();
    succeeded(&scratch.train("whole", &settings).output().unwrap());
    let whole = weights(&scratch.0.join("whole"));

    let mut alive = 0;
    for kill in 1..=kills {
        let mut child = scratch.train("killed", &settings).spawn().unwrap();
        let moment = Duration::from_micros((kill as f64 * 0.618 % 1.0 * 20_000.0) as u64);
        if kill.is_multiple_of(5) {
            sleep(3 * moment);
        } else {
            let target = kill * STEPS / (kills + 1);
            wait_for_steps(&scratch.0.join("killed.work"), target, &mut child);
            sleep(moment);
        }
        alive += usize::from(child.try_wait().unwrap().is_none());
        // It may have ended meanwhile.
        let _ = child.kill();
        child.wait().unwrap();
    }
    assert!(alive * 10 >= kills * 9, "only {alive} of {kills} kills met a living process");
    succeeded(&scratch.train("killed", &settings).output().unwrap());
    assert!(weights(&scratch.0.join("killed")) == whole, "other weights after {kills} kills");
}

#[test]
fn a_run_that_is_killed_ten_times_makes_the_same_adapter() {
    kill_often(10);
}

#[test]
#[ignore = "takes half a minute; the same with a hundred kills"]
fn a_run_that_is_killed_a_hundred_times_makes_the_same_adapter() {
    kill_often(100);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let scratch = Scratch::new();
    let weights = ["1", "2", "3"].map(|threads| {
        let more = ["--threads", threads, "--max-steps", "8", "--micro-batch-tokens", "20"];
        succeeded(&scratch.train(threads, &more).args(["--batch-size", "9"]).output().unwrap());
        weights(&scratch.0.join(threads))
    });
    assert!(weights[0] == weights[1] && weights[0] == weights[2]);
}

#[test]
fn sigterm_ends_a_run_with_a_checkpoint_and_a_word_on_how_to_go_on() {
    let scratch = Scratch::new();
    let mut child =
        scratch.train("adapter", &["--max-steps", "100000", "--batch-size", "2"]).spawn().unwrap();
    wait_for_events(&scratch.0.join("adapter.work"), 5, &mut child);
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let text = succeeded(&child.wait_with_output().unwrap());
    assert!(text.contains("--resume"), "{text}");
    assert!(!scratch.0.join("adapter").exists());
    let checkpoints = scratch.0.join("adapter.work/checkpoints");
    assert!(fs::read_dir(checkpoints).unwrap().count() > 0);
}

#[test]
fn two_runs_into_one_output_do_not_meet() {
    let scratch = Scratch::new();
    let mut first =
        scratch.train("adapter", &["--max-steps", "100000", "--batch-size", "2"]).spawn().unwrap();
    wait_for_events(&scratch.0.join("adapter.work"), 2, &mut first);
    let second = scratch
        .train("adapter", &["--overwrite", "--max-steps", "60", "--batch-size", "2"])
        .output()
        .unwrap();
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(!second.status.success());
    let error = String::from_utf8_lossy(&second.stderr);
    assert!(error.contains("another process is training"), "{error}");
}

#[test]
fn settings_come_from_file_environment_and_flags_in_this_order() {
    let scratch = Scratch::new();
    let file = scratch.0.join("run.yaml");
    fs::write(&file, "lr: 5e-3\nbatch-size: 3\nrank: 2\ntargets: [q_proj, v_proj]\n").unwrap();
    let file = file.display().to_string();
    let output = scratch
        .train("adapter", &["--config", &file, "--max-steps", "1", "--keep-work"])
        .env("TUNESMITH_ALPHA", "6")
        .env("TUNESMITH_RANK", "3")
        .output()
        .unwrap();
    let text = succeeded(&output);
    for wanted in ["\"lr\":0.001", "\"rank\":4", "\"alpha\":6.0", "[\"q_proj\",\"v_proj\"]"] {
        assert!(text.contains(wanted), "{wanted} is not in {text}");
    }
    assert!(scratch.0.join("adapter.work").exists());

    for (content, wanted) in
        [("leaning_rate: 1\n", "leaning_rate"), ("epochs: many\n", "epochs"), ("- 1\n", "keys")]
    {
        fs::write(scratch.0.join("run.yaml"), content).unwrap();
        let output = scratch.train("other", &["--config", &file]).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(wanted), "{error}");
        assert!(error.contains("run.yaml"), "{error}");
    }
}

#[test]
fn every_bad_row_is_shown_with_its_line() {
    let scratch = Scratch::new();
    fs::write(scratch.0.join("rows.jsonl"), "{\"messages\": []}\nnot json\n").unwrap();
    let output = scratch.train("adapter", &[]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(error.contains("rows.jsonl:1:") && error.contains("rows.jsonl:2:"), "{error}");
}
