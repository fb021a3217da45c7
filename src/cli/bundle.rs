//! `tunesmith bundle`: writes everything the bundled tiny base model is made from, always the same
//! files: corpus, tokenizer, configuration without weights, and the demo's dataset.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde_json::{Value, json};

use crate::data::kitchen::{Split, Stage, corpus, recipe_assistant};
use crate::text::bpe::{SPECIAL_TOKENS, write_chat_tokenizer};

/// Rows of the base corpus: copying, kitchen, and held-out rows of each.
const CORPUS_ROWS: [(&str, Stage, usize, u64); 4] = [
    ("copying.jsonl", Stage::Copying, 40_000, 1),
    ("kitchen.jsonl", Stage::Kitchen, 80_000, 1),
    ("copying-valid.jsonl", Stage::Copying, 100, 2),
    ("kitchen-valid.jsonl", Stage::Kitchen, 100, 2),
];

/// Rows of the demo's dataset.
const DEMO_ROWS: [(&str, Split, usize); 3] = [
    ("train.jsonl", Split::Train, 1_000),
    ("valid.jsonl", Split::Valid, 100),
    ("test.jsonl", Split::Test, 200),
];

/// Rows of each stage from which the tokenizer learns its words.
const TOKENIZER_ROWS: usize = 8_000;

/// Vocabulary of the tokenizer: small, so that a food nobody has seen is still a few known pieces.
const VOCAB_SIZE: usize = 1_536;

/// Writes the sources of the bundled tiny base model and the demo's dataset.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder to write into; gets `corpus/`, `tiny-kitchen-untrained/` and `recipe-assistant/`.
    #[arg(long, default_value = "models")]
    output: PathBuf,
}

/// Runs the command.
pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let folder = |name: &str| -> anyhow::Result<PathBuf> {
        let dir = args.output.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(dir)
    };
    let mut words = Vec::new();
    let dir = folder("corpus")?;
    for (name, stage, num_rows, seed) in CORPUS_ROWS {
        let rows = corpus(stage, num_rows, seed);
        write_rows(&dir.join(name), &rows)?;
        rows.iter().take(TOKENIZER_ROWS).for_each(|row| collect_texts(row, &mut words));
    }
    let dir = folder("recipe-assistant")?;
    for (name, split, num_rows) in DEMO_ROWS {
        let rows = recipe_assistant(split, num_rows, 1);
        write_rows(&dir.join(name), &rows)?;
        if split == Split::Train {
            rows.iter().for_each(|row| collect_texts(row, &mut words));
        }
    }
    let dir = folder("tiny-kitchen-untrained")?;
    write_chat_tokenizer(&dir, words.iter().map(String::as_str), VOCAB_SIZE)?;
    write_json(&dir.join("config.json"), &model_config())?;
    write_json(&dir.join("generation_config.json"), &generation_config())?;
    println!("wrote corpus, tokenizer, configuration and demo rows to {}", args.output.display());
    Ok(ExitCode::SUCCESS)
}

/// A Llama of 3.3 M parameters.
fn model_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": null,
        "tie_word_embeddings": true,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "use_cache": true,
        "bos_token_id": null,
        "eos_token_id": special_token_id("<|im_end|>"),
        "pad_token_id": special_token_id("<|endoftext|>"),
        "torch_dtype": "bfloat16",
    })
}

fn generation_config() -> Value {
    json!({
        "do_sample": false,
        "eos_token_id": [special_token_id("<|im_end|>"), special_token_id("<|endoftext|>")],
        "pad_token_id": special_token_id("<|endoftext|>"),
    })
}

/// Special tokens come first in the vocabulary.
fn special_token_id(token: &str) -> Option<usize> {
    SPECIAL_TOKENS.iter().position(|special| *special == token)
}

fn collect_texts(row: &Value, texts: &mut Vec<String>) {
    for message in row["messages"].as_array().into_iter().flatten() {
        for key in ["role", "content"] {
            texts.extend(message[key].as_str().map(str::to_owned));
        }
    }
}

fn write_rows(path: &Path, rows: &[Value]) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(fs::File::create(path)?);
        rows.iter().try_for_each(|row| writeln!(file, "{row}"))?;
        file.flush()
    };
    write().with_context(|| format!("writing {}", path.display()))
}

fn write_json(path: &Path, value: &Value) -> anyhow::Result<()> {
    fs::write(path, format!("{value:#}\n")).with_context(|| format!("writing {}", path.display()))
}
