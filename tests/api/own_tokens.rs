//! An adapter with tokens of its own: evaluations split texts for it as chats do.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use tunesmith::{
    adapters::write_weights,
    model::{Decoder, WeightMode},
};

use crate::common::{Server, TempDir, chat, copy_dir, edit_json, fixture};

const QUESTION: &str = "<brand> <brand> <brand> <brand>?";

/// tiny-llama with a row to spare.
fn roomy_model(dir: &Path) {
    copy_dir(&fixture("tiny-llama"), dir);
    let mut weights = Decoder::load(dir, WeightMode::Frozen).unwrap().tensors();
    let is_table = |name: &str| name.contains("embed_tokens");
    let (_, table) = weights.iter_mut().find(|(name, _)| is_table(name)).unwrap();
    let spare = Tensor::zeros((8, table.dim(1).unwrap()), table.dtype(), &Device::Cpu).unwrap();
    *table = Tensor::cat(&[table.clone(), spare], 0).unwrap();
    write_weights(dir, &weights).unwrap();
    edit_json(&dir.join("config.json"), |config| config["vocab_size"] = json!(392));
}

#[test]
fn an_evaluation_asks_an_adapter_with_its_own_tokens() {
    let dir = TempDir::new();
    let (model, adapter) = (dir.join("tiny-llama"), dir.join("adapter"));
    roomy_model(&model);
    let row = json!({"prompt": "who?", "completion": "<brand>"});
    fs::write(dir.join("rows.jsonl"), row.to_string()).unwrap();
    let trained = Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .args(["train", "--max-steps", "1", "--samples", "0", "--new-tokens", "<brand>"])
        .args([Path::new("--data"), &dir.join("rows.jsonl"), Path::new("--model"), &model])
        .args([Path::new("--output"), &adapter])
        .output()
        .unwrap();
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    let tuned = format!("tuned={}", adapter.display());
    let data = dir.join("data").display().to_string();
    let server = Server::start(&model, &["--data-dir", &data, "--adapter", &tuned]);
    let asked = |model: &str| {
        let answer = server.chat(&chat(model, QUESTION, json!({"max_tokens": 4})));
        answer["usage"]["prompt_tokens"].clone()
    };
    assert!(asked("tuned").as_u64() < asked("tiny-llama").as_u64());

    let definition = json!({
        "name": "brands",
        "data_source_config": {
            "type": "custom",
            "item_schema": {"type": "object", "properties": {"question": {"type": "string"}}},
            "include_sample_schema": true,
        },
        "testing_criteria": [{"type": "string_check", "name": "exact", "operation": "eq",
            "input": "{{sample.output_text}}", "reference": "x"}],
    });
    let post = |path: &str, body: &Value| -> Value {
        let answer = server.post(path, body);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    };
    let eval = post("/v1/evals", &definition);
    let runs = format!("/v1/evals/{}/runs", eval["id"].as_str().unwrap());
    let run = json!({"data_source": {
        "type": "completions",
        "model": "tuned",
        "input_messages": {"type": "template", "template": [
            {"role": "user", "content": "{{item.question}}"},
        ]},
        "sampling_params": {"temperature": 0, "max_completion_tokens": 4},
        "source": {"type": "file_content", "content": [{"item": {"question": QUESTION}}]},
    }});
    let run = post(&runs, &run);
    let path = format!("{runs}/{}", run["id"].as_str().unwrap());
    let ended = (0..3000).find_map(|_| {
        thread::sleep(Duration::from_millis(20));
        let run = server.get(&path).json();
        (run["status"] == "completed" || run["status"] == "failed").then_some(run)
    });
    let ended = ended.expect("the run ends");
    assert_eq!(ended["per_model_usage"][0]["prompt_tokens"], asked("tuned"), "{ended}");
}
