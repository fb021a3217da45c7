//! Tokens that a base does not have: trained from the command line, published with their tokenizer,
//! served, gone on from, and folded in.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::support::{Scratch, fixture};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use tunesmith::{
    adapters::{AdapterRegistry, write_weights},
    model::{Decoder, ModelConfig, WeightMode},
    text::Tokenizer,
};

/// Rows of the table beyond the tokenizer's 384 tokens.
const SPARE_ROWS: usize = 8;

/// tiny-llama with room for new tokens.
fn roomy_model(scratch: &Scratch) -> PathBuf {
    let dir = scratch.copy(&fixture("tiny-llama"), "model");
    let decoder = Decoder::load(&dir, WeightMode::Frozen).unwrap();
    let mut weights = decoder.tensors();
    for (name, weight) in &mut weights {
        if name.contains("embed_tokens") {
            let (_, hidden) = weight.dims2().unwrap();
            let spare = Tensor::zeros((SPARE_ROWS, hidden), weight.dtype(), &Device::Cpu).unwrap();
            *weight = Tensor::cat(&[weight.clone(), spare], 0).unwrap();
        }
    }
    write_weights(&dir, &weights).unwrap();
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["vocab_size"] = json!(384 + SPARE_ROWS);
    fs::write(path, config.to_string()).unwrap();
    dir
}

fn rows(scratch: &Scratch) -> PathBuf {
    let path = scratch.path().join("rows.jsonl");
    let row = |prompt: &str, completion: &str| {
        json!({"prompt": prompt, "completion": completion}).to_string()
    };
    let rows = [row("who?", " <brand> of <city>"), row("<brand>?", " yes <brand>"), row("a", "b")];
    fs::write(&path, rows.join("\n")).unwrap();
    path
}

fn tunesmith(arguments: &[&str], paths: &[(&str, &Path)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    command.args(arguments);
    for (flag, path) in paths {
        command.arg(flag).arg(path);
    }
    command.output().unwrap()
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn new_tokens_are_learned_published_served_gone_on_from_and_folded_in() {
    let scratch = Scratch::new();
    let (model, data) = (roomy_model(&scratch), rows(&scratch));
    let first = scratch.path().join("first");
    let common = ["train", "--max-steps", "4", "--rank", "2", "--samples", "2", "--lr", "0.01"];
    let paths = [("--model", model.as_path()), ("--data", &data), ("--output", &first)];
    let new_tokens = ["--new-tokens", "<brand>,<city>"];
    succeeds(&tunesmith(&[common.as_slice(), &new_tokens].concat(), &paths));

    // The folder says what PEFT needs to know, and has a tokenizer with the tokens.
    let config = fs::read(first.join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["trainable_token_indices"], json!({"embed_tokens": [384, 385]}));
    let tokenizer = Tokenizer::from_dir(&first).unwrap();
    assert_eq!(tokenizer.encode("<city>", false).unwrap(), [385]);
    assert!(Tokenizer::from_dir(&model).unwrap().encode("<city>", false).unwrap().len() > 1);

    // A server splits texts for this adapter, and only for it, with that tokenizer.
    let registry = AdapterRegistry::new(ModelConfig::from_dir(&model).unwrap());
    let (version, _) = registry.load("first", &first, false).unwrap();
    let own = version.tokenizer.as_ref().expect("the adapter has tokens of its own");
    assert_eq!(own.decode(&[384, 385], true).unwrap(), "<brand><city>");

    // Going on needs no word about the tokens.
    let second = scratch.path().join("second");
    let paths = [
        ("--model", model.as_path()),
        ("--data", &data),
        ("--output", &second),
        ("--init-adapter", &first),
    ];
    succeeds(&tunesmith(&["train", "--max-steps", "2", "--samples", "0"], &paths));
    assert_eq!(Tokenizer::from_dir(&second).unwrap().encode("<city>", false).unwrap(), [385]);

    let merged = scratch.path().join("merged");
    let paths = [("--model", model.as_path()), ("--adapter", &second), ("--output", &merged)];
    succeeds(&tunesmith(&["merge"], &paths));
    assert_eq!(Tokenizer::from_dir(&merged).unwrap().encode("<city>", false).unwrap(), [385]);
    let tensors = Decoder::load(&merged, WeightMode::Frozen).unwrap().tensors();
    let (_, table) = tensors.iter().find(|(name, _)| name.contains("embed_tokens")).unwrap();
    let rows = table.narrow(0, 384, SPARE_ROWS).unwrap().sqr().unwrap().sum(1).unwrap();
    let rows: Vec<f32> = rows.to_vec1().unwrap();
    let learned: Vec<bool> = rows.iter().map(|norm| *norm > 0.0).collect();
    assert_eq!(learned, [true, true, false, false, false, false, false, false]);
}

#[test]
fn a_model_without_a_free_row_refuses_new_tokens_and_says_how_many_it_has() {
    let scratch = Scratch::new();
    let (model, data) = (fixture("tiny-llama"), rows(&scratch));
    let output = scratch.path().join("output");
    let paths = [("--model", model.as_path()), ("--data", &data), ("--output", &output)];
    let refused = tunesmith(&["train", "--max-steps", "1", "--new-tokens", "<brand>"], &paths);
    assert!(!refused.status.success());
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    for words in ["<brand>", "384 rows", "resize_token_embeddings(385"] {
        assert!(message.contains(words), "{message}");
    }
    assert!(!output.exists());
}
