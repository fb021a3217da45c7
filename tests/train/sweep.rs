//! Several adapters over one base: the best by validation loss is published, each has the bits of a run of
//! its own, and a sweep that was killed comes to the same end.
#![cfg(unix)]

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    thread::sleep,
    time::Instant,
};

use crate::common::{TempDir, fixture};
use serde_json::{Value, json};

fn write_rows(dir: &Path) {
    let row = |n: usize| {
        let answer = ["red", "green", "blue"][n % 3];
        json!({"messages": [{"role": "user", "content": format!("colour {}", n % 6)},
            {"role": "assistant", "content": answer}]})
        .to_string()
            + "\n"
    };
    fs::write(dir.join("rows.jsonl"), (0..24).map(row).collect::<String>()).unwrap();
    fs::write(dir.join("valid.jsonl"), (0..6).map(row).collect::<String>()).unwrap();
}

fn train(dir: &Path, output: &str, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    command
        .current_dir(dir)
        .args(["train", "--data", "rows.jsonl", "--valid", "valid.jsonl"])
        .env("TUNESMITH_MAX_STEPS", "16")
        .args(["--batch-size", "4", "--samples", "1", "--checkpoint-every", "3"])
        .arg("--model")
        .arg(fixture("tiny-llama"))
        .args(["--output", output])
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn succeeded(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn weights(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("adapter_model.safetensors")).unwrap()
}

fn table(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("sweep.json")).unwrap();
    let table: Value = serde_json::from_str(&text).unwrap();
    table["candidates"].as_array().unwrap().clone()
}

#[test]
fn every_combination_is_trained_as_if_alone_and_the_best_is_published() {
    let dir = TempDir::new();
    write_rows(&dir.0);
    let axes = ["--sweep", "lr=1e-4,1e-2", "--sweep", "rank=2,4"];
    let text = succeeded(&train(&dir.0, "out", &axes).output().unwrap());
    let rows = table(&dir.join("out"));
    assert_eq!(rows.len(), 4);
    let losses: Vec<f64> = rows.iter().map(|row| row["loss"].as_f64().unwrap()).collect();
    assert!(losses.is_sorted(), "{losses:?}");
    assert_eq!(rows[0]["status"], "published");
    assert_eq!(rows[0]["settings"]["lr"], 1e-2, "the higher rate learns more in 16 steps");

    let best = dir.join("out.sweep").join(rows[0]["name"].as_str().unwrap());
    assert!(weights(&best) == weights(&dir.join("out")));
    for row in &rows {
        let name = row["name"].as_str().unwrap();
        assert!(text.contains(name), "{name} is not in\n{text}");
        assert!(dir.join("out.sweep").join(name).join("adapter_config.json").is_file());
        assert!(!dir.join("out.sweep").join(format!("{name}.work")).exists());
    }
    for file in ["sweep.txt", "tunesmith_card.json", "tokenizer.json"] {
        assert!(dir.join("out").join(file).is_file(), "{file} is missing");
    }
    let report = fs::read_to_string(dir.join("out/report.html")).unwrap();
    assert!(report.contains("<h2>Sweep</h2>") && report.contains("lr-0.01_rank-2"));

    let alone = ["--lr", "1e-2", "--rank", "2"];
    succeeded(&train(&dir.0, "alone", &alone).output().unwrap());
    assert!(weights(&dir.join("alone")) == weights(&dir.join("out.sweep/lr-0.01_rank-2")));
    // A sweep that is over has nothing to do, and one over another is refused.
    let again = [&axes[..], &["--resume"]].concat();
    succeeded(&train(&dir.0, "out", &again).output().unwrap());
    assert!(!train(&dir.0, "out", &axes).output().unwrap().status.success());
}

#[test]
fn halving_leaves_the_worse_ones_behind_and_a_killed_sweep_comes_to_the_same_end() {
    let dir = TempDir::new();
    write_rows(&dir.0);
    fs::write(
        dir.join("sweep.yaml"),
        "sweep: {lr: [1.0e-6, 1.0e-3, 1.0e-2, 1.0e+30], dropout: [0.1]}\nsweep_halving: true\n\
         keep_best: true\neval_every: 2\n",
    )
    .unwrap();
    let settings = ["--config", "sweep.yaml", "--resume"];
    let started = Instant::now();
    succeeded(&train(&dir.0, "whole", &settings).output().unwrap());
    let duration = started.elapsed();
    let whole = table(&dir.join("whole"));
    let statuses: Vec<&str> = whole.iter().map(|row| row["status"].as_str().unwrap()).collect();
    assert_eq!(statuses.iter().filter(|status| **status == "published").count(), 1);
    assert!(statuses.contains(&"eliminated"), "{statuses:?}");
    assert_eq!(whole[0]["settings"]["lr"], 1e-2);
    let slowest = whole.iter().find(|row| row["settings"]["lr"] == 1e-6).unwrap();
    assert_eq!(
        (slowest["status"].as_str(), slowest["step"].as_u64()),
        (Some("eliminated"), Some(4))
    );

    for moment in 1..=5_u32 {
        let mut child = train(&dir.0, "killed", &settings).spawn().unwrap();
        sleep(duration.mul_f64(f64::from(moment) * 0.618 % 1.0));
        // It may have ended already, which is as good a moment as any.
        let _ = child.kill();
        child.wait().unwrap();
    }
    succeeded(&train(&dir.0, "killed", &settings).output().unwrap());
    assert!(weights(&dir.join("killed")) == weights(&dir.join("whole")));
    assert_eq!(table(&dir.join("killed")), whole);
}

#[test]
fn a_sweep_over_preferences_shares_the_reference_and_changes_no_bit() {
    let dir = TempDir::new();
    let row = |n: usize| {
        json!({"prompt": [{"role": "user", "content": format!("colour {n}")}],
            "chosen": [{"role": "assistant", "content": "red"}],
            "rejected": [{"role": "assistant", "content": "green"}]})
        .to_string()
            + "\n"
    };
    let rows = (0..8).map(row).collect::<String>();
    fs::write(dir.join("rows.jsonl"), &rows).unwrap();
    fs::write(dir.join("valid.jsonl"), &rows).unwrap();
    let dpo = ["--objective", "dpo", "--max-steps", "4"];
    let sweep = [&dpo[..], &["--sweep", "rank=2,4", "--lr", "1e-3"]].concat();
    succeeded(&train(&dir.0, "out", &sweep).args(["--sweep", "dpo-beta=0.1"]).output().unwrap());
    let alone = [&dpo[..], &["--rank", "4", "--lr", "1e-3"]].concat();
    succeeded(&train(&dir.0, "alone", &alone).output().unwrap());
    assert!(weights(&dir.join("alone")) == weights(&dir.join("out.sweep/dpo_beta-0.1_rank-4")));
}

#[test]
fn what_cannot_be_swept_is_refused_by_name() {
    let dir = TempDir::new();
    write_rows(&dir.0);
    for (more, wanted) in [
        (&["--sweep", "batch_size=1,2"][..], "batch_size"),
        (&["--sweep", "rank=many"][..], "many"),
        (&["--sweep", "rank="][..], "rank has no values"),
        (&["--sweep", "rank=2,4", "--method", "full"][..], "method full"),
        (&["--sweep", "rank=2,4", "--time-limit", "1"][..], "time_limit"),
        (&["--sweep-halving"][..], "sweep_halving"),
    ] {
        let output = train(&dir.0, "out", more).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(wanted), "{more:?}: {error}");
        assert!(!dir.join("out").exists());
    }
}
