//! `tunesmith merge`: a plain model folder out of a base and an adapter.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Output},
};

use crate::support::{Scratch, fixture, oracle};
use safetensors::{Dtype, SafeTensors};
use tunesmith::adapters::AdapterCard;

fn merge(adapter: &Path, output: &Path) -> Output {
    merge_into("tiny-qwen2", adapter, output)
}

fn merge_into(model: &str, adapter: &Path, output: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .args(["merge", "--model"])
        .arg(fixture(model))
        .arg("--adapter")
        .arg(adapter)
        .arg("--output")
        .arg(output)
        .output()
        .unwrap()
}

/// Dtype and bytes of every tensor in the safetensors files of a folder.
fn weights(dir: &Path) -> BTreeMap<String, (Dtype, Vec<u8>)> {
    let mut weights = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                weights.insert(name.to_owned(), (view.dtype(), view.data().to_vec()));
            }
        }
    }
    weights
}

#[test]
fn merging_writes_a_model_folder_that_differs_where_the_adapter_has_a_part() {
    let scratch = Scratch::new();
    let output = scratch.path().join("merged");
    let result = merge(&oracle("tiny-qwen2-pattern-adapter"), &output);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));

    let (base, merged) = (weights(&fixture("tiny-qwen2")), weights(&output));
    assert!(base.keys().eq(merged.keys()));
    let changed: Vec<&str> = base
        .iter()
        .filter(|(name, tensor)| merged[*name] != **tensor)
        .map(|(name, _)| name.as_str())
        .collect();
    let expected = ["mlp.gate_proj", "self_attn.k_proj", "self_attn.o_proj"];
    assert_eq!(changed, expected.map(|path| format!("model.layers.1.{path}.weight")));
    assert!(merged.values().all(|(dtype, _)| *dtype == Dtype::BF16));
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    {
        let base = fs::read(fixture("tiny-qwen2").join(name)).unwrap();
        assert_eq!(fs::read(output.join(name)).unwrap(), base, "{name}");
    }
    assert!(!output.join("model.safetensors.index.json").exists());
}

#[test]
fn an_adapter_with_a_head_of_its_own_makes_a_model_whose_tables_are_two() {
    let scratch = Scratch::new();
    let output = scratch.path().join("merged");
    let adapter = oracle("tiny-llama-saved-final");
    let result = merge_into("tiny-llama", &adapter, &output);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let config = fs::read(output.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
    let (merged, adapter) = (weights(&output), weights(&adapter));
    assert_eq!(merged["lm_head.weight"], adapter["base_model.model.lm_head.weight"]);
    let embedding = "model.embed_tokens.weight";
    assert_eq!(merged[embedding], weights(&fixture("tiny-llama"))[embedding]);
}

#[test]
fn nothing_is_overwritten_and_nothing_is_left_behind_when_merging_fails() {
    let scratch = Scratch::new();
    let taken = scratch.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("precious"), "x").unwrap();
    let adapter = oracle("tiny-qwen2-plain-adapter");
    assert!(!merge(&adapter, &taken).status.success());
    assert_eq!(fs::read_to_string(taken.join("precious")).unwrap(), "x");

    let other_base = scratch.copy(&adapter, "adapter");
    let card = AdapterCard { base_fingerprint: "beef".to_owned(), ..AdapterCard::default() };
    card.write(&other_base).unwrap();
    let output = scratch.path().join("output");
    let result = merge(&other_base, &output);
    assert!(!result.status.success());
    let message = String::from_utf8_lossy(&result.stderr).into_owned();
    assert!(message.contains("beef") && message.contains("adapter"), "{message}");
    assert!(!output.exists());
}
