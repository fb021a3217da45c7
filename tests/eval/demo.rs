//! The demo from its first step to its last, with a model so tiny that it learns one answer by heart.

use std::{
    fs,
    ops::Range,
    path::Path,
    process::{Command, Stdio},
};

use crate::common::{Server, TempDir, copy_dir, fixture};
use serde_json::{Value, json};

const ANSWER: &str = "[\"egg\"]";

/// A folder as models/ is, with `settings` to train by.
fn models(dir: &TempDir, settings: &str) {
    let data = dir.join("models/recipe-assistant");
    copy_dir(&fixture("tiny-llama"), &dir.join("models/tiny-kitchen"));
    fs::create_dir_all(&data).unwrap();
    for (name, range) in [("test", 0..50), ("train", 50..170), ("valid", 170..180)] {
        fs::write(data.join(format!("{name}.jsonl")), rows(range)).unwrap();
    }
    fs::write(data.join("train.yaml"), settings).unwrap();
}

fn rows(range: Range<usize>) -> String {
    let row = |index: usize| {
        let question = format!("list {} and {index} eggs", index * 7 % 5);
        let messages = json!([
            {"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}
        ]);
        json!({"messages": messages}).to_string() + "\n"
    };
    range.map(row).collect()
}

fn demo(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    command.current_dir(dir).env_remove("TUNESMITH_MODELS").arg("demo");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

#[test]
fn the_demo_trains_compares_and_serves_base_and_adapter() {
    let dir = TempDir::new();
    models(
        &dir,
        "rank: 8\nlr: 2e-2\nschedule: constant\nepochs: 3\nbatch_size: 8\nmax_length: 128\n",
    );
    let mut command = demo(&dir.0);
    command.args(["--port", "0", "--json", "report.json"]);
    let server = Server::from_command(command);

    let report: Value =
        serde_json::from_slice(&fs::read(dir.join("report.json")).unwrap()).unwrap();
    let arm = |index: usize| {
        (report["arms"][index]["name"].as_str(), &report["arms"][index]["exact_match"])
    };
    assert_eq!(arm(0), (Some("base"), &json!(0.0)));
    assert_eq!(arm(1), (Some("fewshot:3"), &json!(0.0)));
    assert_eq!(arm(2), (Some("tuned"), &json!(1.0)));
    assert!(dir.join("tunesmith-demo/report.html").is_file());
    assert!(dir.join("tunesmith-demo/adapter/adapter_model.safetensors").is_file());

    let ask = |model: &str| {
        let messages = json!([{"role": "user", "content": "list 3 and 4 eggs"}]);
        let body =
            json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": 16});
        let answer = server.post("/v1/chat/completions", &body).json();
        answer["choices"][0]["message"]["content"].clone()
    };
    assert_eq!(ask("recipe-assistant"), json!(ANSWER));
    assert_ne!(ask("tiny-kitchen"), json!(ANSWER));
}

#[test]
fn a_demo_whose_adapter_learned_nothing_fails() {
    let dir = TempDir::new();
    models(&dir, "rank: 2\nlr: 0\nmax_steps: 1\nbatch_size: 2\nmax_length: 128\n");
    let output = demo(&dir.0).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("did not beat its base"), "{stderr}");
    assert!(!stderr.contains("listening"), "{stderr}");
}
