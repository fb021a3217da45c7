//! Keys and values in bf16 and int8: less memory, nearly the same log-probabilities, one answer at every
//! door.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic")]

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use crate::common::{Server, chat, fixture};
use serde_json::json;
use tunesmith::model::{Decoder, KvCache, KvDtype, Step, StepSequence, WeightMode};

/// Log-probabilities of all tokens but the first.
fn logprobs(decoder: &Decoder, tokens: &[u32], dtype: KvDtype) -> Vec<f32> {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(16)).map(|block| block as u32).collect();
    let cache = KvCache::with_dtype(decoder.config(), blocks.len(), 16, dtype).unwrap();
    let step = Step {
        tokens,
        sequences: &[StepSequence {
            num_tokens: tokens.len(),
            num_cached_tokens: 0,
            block_table: &blocks,
        }],
        cache: Some(&cache),
        deltas: &[],
        logit_rows: &[],
        dropout: None,
    };
    let hidden = decoder.hidden(&step).unwrap();
    let rows: Vec<u32> = (0..tokens.len() as u32 - 1).collect();
    let losses = decoder.token_losses(&hidden, &rows, &tokens[1..]).unwrap();
    losses.get(0).unwrap().neg().unwrap().to_vec1().unwrap()
}

#[test]
fn a_rounded_cache_moves_log_probabilities_a_little() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-kitchen");
    let decoder = Decoder::load(&dir, WeightMode::Frozen).unwrap();
    let tokens: Vec<u32> = (0..300).map(|at| 5 + (at * 7919) % 1400).collect();
    let exact = logprobs(&decoder, &tokens, KvDtype::F32);
    for (dtype, bound) in [(KvDtype::Bf16, 0.1), (KvDtype::Int8, 0.3)] {
        let found = logprobs(&decoder, &tokens, dtype);
        let far: Vec<f32> = found.iter().zip(&exact).map(|(a, b)| (a - b).abs()).collect();
        let greatest = far.iter().copied().fold(0.0, f32::max);
        let mean = far.iter().sum::<f32>() / far.len() as f32;
        println!(
            "{dtype:?}: log-probabilities differ by {mean:.4} in the mean, {greatest:.3} at most"
        );
        // Random tokens surprise the model, so that single ones differ by more than any of a text.
        assert!(mean > 0.0 && mean < bound, "{dtype:?}: {mean} in the mean, {greatest} at most");
    }
}

#[test]
fn a_token_takes_as_many_bytes_as_the_documentation_says() {
    let bytes = |text: &str| {
        let config = tunesmith::model::ModelConfig::from_json(text).unwrap();
        [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8]
            .map(|dtype| KvCache::block_bytes(&config, dtype) / 16)
    };
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-kitchen/config.json");
    assert_eq!(bytes(&std::fs::read_to_string(dir).unwrap()), [4096, 2048, 1152]);
    let qwen = r#"{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2}"#;
    assert_eq!(bytes(qwen), [24_576, 12_288, 6_528]);
    let smol = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3}"#;
    assert_eq!(bytes(smol), [46_080, 23_040, 12_240]);
}

#[test]
fn the_same_memory_holds_longer_contexts_and_chat_says_what_the_server_says() {
    for (dtype, longest) in [("f32", 128), ("bf16", 256), ("int8", 400)] {
        let args = ["--kv-dtype", dtype, "--kv-cache-memory", "64KiB"];
        let server = Server::start(&fixture("tiny-llama"), &args);
        let model = server.get("/v1/models").json()["data"][0].clone();
        assert_eq!(model["max_model_len"], longest, "{dtype}");
        let body = chat("tiny-llama", "one two three four five", json!({}));
        let answer = |server: &Server| {
            let response = server.post("/v1/chat/completions", &body).json();
            response["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
        };
        let (cold, cached) = (answer(&server), answer(&server));
        assert_eq!(cold, cached, "{dtype}");
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
        command.arg("chat").arg("--model").arg(fixture("tiny-llama"));
        command.args(["--max-tokens", "24", "--kv-dtype", dtype]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"one two three four five").unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), cold.trim(), "{dtype}");
    }
}

#[test]
fn an_unknown_form_of_the_cache_is_refused_with_those_that_there_are() {
    let model = fixture("tiny-llama");
    for args in [
        &["serve", "--model"][..],
        &["chat", "--model"],
        &["bench", "--model"],
        &["eval", "--data", "rows.jsonl", "--model"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
        command.args(args).arg(&model).args(["--kv-dtype", "f64"]);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains("f32, bf16 or int8"), "{args:?}: {said}");
    }
}
