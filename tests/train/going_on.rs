//! Training on from an adapter: what was asked for must be what it is, also where the default was asked for.

use std::process::{Command, Output};

use crate::common::{TempDir, fixture};
use serde_json::json;

/// `tunesmith train` over a few rows into `out` in `dir`.
fn train(dir: &TempDir, out: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let row = |n: usize| json!({"prompt": format!("say {n}"), "completion": n.to_string()});
    let rows: Vec<String> = (0..6).map(|n| row(n).to_string()).collect();
    std::fs::write(dir.join("rows.jsonl"), rows.join("\n")).unwrap();
    Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .current_dir(&dir.0)
        .args(["train", "--data", "rows.jsonl", "--max-steps", "2", "--samples", "0"])
        .args(["--output", out, "--model"])
        .arg(fixture("tiny-llama"))
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_default_that_was_asked_for_is_not_taken_for_nothing() {
    let dir = TempDir::new();
    let first = ["--rank", "8", "--alpha", "8", "--targets", "q_proj,v_proj"];
    let first = train(&dir, "first", &first, &[]);
    assert!(first.status.success(), "{}", error(&first));
    let on = |more: &[&str], environment: &[(&str, &str)]| {
        train(&dir, "second", &[&["--init-adapter", "first"], more].concat(), environment)
    };
    // A configuration of TRL that does not name a rank asks for none, although TRL has a default.
    std::fs::write(dir.join("trl.yaml"), "num_train_epochs: 1\nuse_peft: true\n").unwrap();
    std::fs::write(dir.join("own.yaml"), "rank: 16\n").unwrap();
    for (arguments, environment, words) in [
        (&["--rank", "16"][..], &[][..], "rank 8, but 16"),
        (&["--alpha", "32"], &[], "alpha 8, but 32"),
        (&["--targets", "all-linear"], &[], "targets q_proj, v_proj, but q_proj, k_proj"),
        (&[], &[("TUNESMITH_RANK", "16")], "rank 8, but 16"),
        (&["--config", "own.yaml"], &[], "rank 8, but 16"),
        (&["--layers", "0"], &[], "layers"),
        (&["--rank-pattern", "q_proj=4"], &[], "rank_pattern"),
    ] {
        let refused = on(arguments, environment);
        let error = error(&refused);
        assert!(!refused.status.success() && error.contains(words), "{arguments:?}: {error}");
    }
    let good = ["--rank", "8", "--alpha", "8", "--targets", "q_proj,v_proj"];
    for arguments in [&good[..], &["--overwrite"], &["--overwrite", "--config", "trl.yaml"]] {
        let output = on(arguments, &[]);
        assert!(output.status.success(), "{arguments:?}: {}", error(&output));
    }
    let swept = on(&["--overwrite", "--valid", "rows.jsonl", "--sweep", "rank=16"], &[]);
    let error = error(&swept);
    assert!(!swept.status.success() && error.contains("rank 8, but 16"), "{error}");
}
