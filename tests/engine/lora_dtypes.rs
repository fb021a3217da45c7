//! Adapters as they are and rounded to 16 bits: one choice, the same numbers at every door.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::common::{Server, TempDir, chat, fixture};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tunesmith::{
    adapters::{AdapterRegistry, LoraAdapter, LoraConfig},
    model::ModelConfig,
    ops::lora_dtype::LoraDtype,
};

/// An adapter of tiny-llama with a strong effect and numbers that have all the bits of an f32.
fn adapter(dir: &TempDir) -> PathBuf {
    let model = ModelConfig::from_dir(&fixture("tiny-llama")).unwrap();
    let config = LoraConfig { rank: 5, alpha: 10.0, ..LoraConfig::default() };
    let adapter = LoraAdapter::fresh(&config, &model, 7).unwrap();
    adapter.randomize(0.4, 8).unwrap();
    let folder = dir.join("exact");
    fs::create_dir_all(&folder).unwrap();
    adapter.write(&folder, "base").unwrap();
    folder
}

/// A copy of an adapter's folder whose tensors went through `change`.
fn changed(folder: &Path, to: &Path, change: impl Fn(f32) -> f32) -> PathBuf {
    fs::create_dir_all(to).unwrap();
    let name = "adapter_config.json";
    fs::copy(folder.join(name), to.join(name)).unwrap();
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter().map(|(name, view)| {
        let values = view.data().as_chunks().0.iter().map(|value| f32::from_le_bytes(*value));
        let data: Vec<u8> = values.flat_map(|value| change(value).to_le_bytes()).collect();
        (name, view.shape().to_vec(), data)
    });
    let tensors: Vec<_> = tensors.collect();
    let views = tensors.iter().map(|(name, shape, data)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    fs::write(to.join("adapter_model.safetensors"), safetensors::serialize(views, None).unwrap())
        .unwrap();
    to.to_owned()
}

/// What a server says of each token, and under which fingerprint.
fn answer(folder: &Path, dtype: &str) -> (Value, String, Server) {
    let given = format!("tuned={}", folder.display());
    let root = folder.parent().unwrap().to_str().unwrap();
    let args = ["--adapter", &given, "--adapter-root", root, "--lora-dtype", dtype];
    let server = Server::start(&fixture("tiny-llama"), &args);
    let body = chat("tuned", "one two three", json!({"logprobs": true}));
    let (cold, cached) = (server.chat(&body), server.chat(&body));
    assert_eq!(cold["choices"], cached["choices"], "{dtype}");
    let fingerprint = cold["system_fingerprint"].as_str().unwrap().to_owned();
    (cold["choices"][0].clone(), fingerprint, server)
}

#[test]
fn a_rounded_adapter_is_the_adapter_with_rounded_values_at_every_door() {
    let dir = TempDir::new();
    let exact = adapter(&dir);
    let (said, fingerprint, _) = answer(&exact, "auto");
    let (wide, same_fingerprint, _) = answer(&exact, "float32");
    assert_eq!((&said, &fingerprint), (&wide, &same_fingerprint));
    type Round = fn(f32) -> f32;
    let kinds: [(&str, Round); 2] = [
        ("float16", |value| f16::from_f32(value).to_f32()),
        ("bfloat16", |value| bf16::from_f32(value).to_f32()),
    ];
    for (dtype, round) in kinds {
        let (rounded, other_fingerprint, server) = answer(&exact, dtype);
        assert_ne!(rounded["logprobs"], said["logprobs"], "{dtype}");
        assert_ne!(other_fingerprint, fingerprint, "{dtype}");
        let before = changed(&exact, &dir.join(dtype), round);
        for held in ["auto", "float32", dtype] {
            let (expected, ..) = answer(&before, held);
            assert_eq!(rounded, expected, "{dtype}, held as {held}");
        }
        let text = rounded["message"]["content"].as_str().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
        command.arg("chat").arg("--model").arg(fixture("tiny-llama"));
        command.arg("--adapter").arg(&exact).args(["--max-tokens", "24", "--lora-dtype", dtype]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"one two three").unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), text.trim(), "{dtype}");
        // The files are the same, whatever becomes of them in memory.
        let body = json!({"lora_name": "tuned", "lora_path": exact, "load_inplace": true});
        let accept = [("content-type", "application/json"), ("accept", "application/json")];
        let load =
            server.request("POST", "/v1/load_lora_adapter", &accept, body.to_string().as_bytes());
        let model = ModelConfig::from_dir(&fixture("tiny-llama")).unwrap();
        let content = LoraAdapter::read(&exact, &model, false).unwrap();
        assert_eq!(load.json()["sha256"], content.digest(), "{load:?}");
        assert_eq!(load.json()["lora_dtype"], dtype);
    }
}

#[test]
fn an_evaluation_of_a_rounded_adapter_is_that_of_what_is_served() {
    let dir = TempDir::new();
    let exact = adapter(&dir);
    let rows = dir.join("rows.jsonl");
    let row = |word: &str| {
        let turns =
            json!([{"role": "user", "content": word}, {"role": "assistant", "content": "x"}]);
        json!({"messages": turns}).to_string() + "\n"
    };
    fs::write(&rows, ["one", "two three", "four"].map(row).concat()).unwrap();
    let answers = |folder: &Path, dtype: &str| {
        let report = dir.join("report.json");
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
        command.arg("eval").arg("--model").arg(fixture("tiny-llama")).arg("--adapter").arg(folder);
        command.arg("--data").arg(&rows).args(["--max-tokens", "24", "--arms", "tuned"]);
        command.arg("--json").arg(&report).args(["--lora-dtype", dtype]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
        report["arms"][0]["perplexity"].clone()
    };
    let coarse = |value: f32| bf16::from_f32(value).to_f32();
    let before = changed(&exact, &dir.join("before"), coarse);
    let rounded = answers(&exact, "bfloat16");
    assert!(rounded.is_number(), "{rounded}");
    assert_eq!(rounded, answers(&before, "auto"));
    assert_ne!(rounded, answers(&exact, "auto"));
}

#[test]
fn what_is_remembered_of_an_adapter_is_not_taken_for_the_rounded_one() {
    let dir = TempDir::new();
    let exact = adapter(&dir);
    let model = ModelConfig::from_dir(&fixture("tiny-llama")).unwrap();
    let under = |dtype| {
        let registry = AdapterRegistry::new(model.clone()).with_dtype(dtype);
        let version = registry.load("tuned", &exact, false).unwrap().0;
        (version.adapter.digest().to_owned(), version.adapter.served_digest().into_owned())
    };
    let [auto, half, coarse, wide] =
        [LoraDtype::Auto, LoraDtype::Float16, LoraDtype::Bfloat16, LoraDtype::Float32].map(under);
    assert_eq!(auto, wide);
    assert!(auto.0 == half.0 && auto.0 == coarse.0);
    assert!(auto.1 != half.1 && auto.1 != coarse.1 && half.1 != coarse.1);
}

#[test]
fn a_value_beyond_the_dtype_is_refused_with_its_tensor() {
    let dir = TempDir::new();
    let exact = adapter(&dir);
    let large = changed(&exact, &dir.join("large"), |value| if value > 0.39 { 7e4 } else { value });
    let model = ModelConfig::from_dir(&fixture("tiny-llama")).unwrap();
    let load = |dtype| {
        AdapterRegistry::new(model.clone())
            .with_dtype(dtype)
            .load("tuned", &large, false)
            .map(|_| ())
    };
    let error = load(LoraDtype::Float16).unwrap_err().to_string();
    assert!(error.contains("lora_B.weight` holds 70000"), "{error}");
    assert!(error.ends_with("too large for --lora-dtype float16"), "{error}");
    load(LoraDtype::Bfloat16).unwrap();
    load(LoraDtype::Auto).unwrap();
}

#[test]
fn an_unknown_dtype_is_refused_with_those_that_there_are() {
    let model = fixture("tiny-llama");
    for args in [
        &["serve", "--model"][..],
        &["chat", "--model"],
        &["bench", "--model"],
        &["eval", "--data", "rows.jsonl", "--model"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
        command.args(args).arg(&model).args(["--lora-dtype", "int8"]);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let expected = "auto, float16, bfloat16 or float32";
        assert!(!output.status.success() && said.contains(expected), "{args:?}: {said}");
    }
}
