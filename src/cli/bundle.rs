//! `tunesmith bundle`: writes everything the bundled tiny base model is made from, always the same
//! files: corpus, tokenizer, configuration without weights, and the demo's dataset.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde_json::{Value, json};

use crate::data::kitchen::{
    Split, Stage, copies_of_tokens, corpus, plain_recipes, recipe_assistant,
};
use crate::text::bpe::{SPECIAL_TOKENS, write_chat_tokenizer};

/// Rows of the first stage of the base's training, copies of tokens; and of those in the mix.
const TOKEN_ROWS: (usize, usize) = (40_000, 10_000);

/// Rows of the kitchen's exercises, and of copies of its words, in the second stage's mix.
const MIX_ROWS: (usize, usize) = (40_000, 10_000);

/// Rows of the third stage: the kitchen's exercises only.
const KITCHEN_ROWS: usize = 14_000;

/// Rows of each kind for the validation loss.
const VALID_ROWS: usize = 100;

/// Rows of the demo's dataset.
const DEMO_ROWS: [(&str, Split, usize); 3] = [
    ("train.jsonl", Split::Train, 3_000),
    ("valid.jsonl", Split::Valid, 100),
    ("test.jsonl", Split::Test, 200),
];

/// Rows of each kind of exercise from which the tokenizer learns its words.
const TOKENIZER_ROWS: usize = 8_000;

/// Rows of the demo from which it learns them as well.
const TOKENIZER_DEMO_ROWS: usize = 1_000;

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
    let demo_dir = folder("recipe-assistant")?;
    for (name, split, num_rows) in DEMO_ROWS {
        write_rows(&demo_dir.join(name), &recipe_assistant(split, num_rows, 1))?;
    }

    let mut kitchen = corpus(Stage::Kitchen, MIX_ROWS.0 + KITCHEN_ROWS, 1);
    let last_stage = kitchen.split_off(MIX_ROWS.0);
    let copying = corpus(Stage::Copying, MIX_ROWS.1, 1);
    let demo = plain_recipes(TOKENIZER_DEMO_ROWS, 1);
    let texts: Vec<String> = copying[..TOKENIZER_ROWS]
        .iter()
        .chain(&kitchen[..TOKENIZER_ROWS])
        .chain(&demo)
        .flat_map(texts_of)
        .collect();
    let model_dir = folder("tiny-kitchen-untrained")?;
    let vocabulary =
        write_chat_tokenizer(&model_dir, texts.iter().map(String::as_str), VOCAB_SIZE)?;
    write_json(&model_dir.join("config.json"), &model_config())?;
    write_json(&model_dir.join("generation_config.json"), &generation_config())?;

    let mut tokens = copies_of_tokens(&vocabulary, TOKEN_ROWS.0 + TOKEN_ROWS.1, 1);
    let mix = [kitchen, copying, tokens.split_off(TOKEN_ROWS.0)].concat();
    let corpus_dir = folder("corpus")?;
    write_rows(&corpus_dir.join("copy.jsonl"), &tokens)?;
    write_rows(&corpus_dir.join("mix.jsonl"), &mix)?;
    write_rows(&corpus_dir.join("kitchen.jsonl"), &last_stage)?;
    let held_out = copies_of_tokens(&vocabulary, VALID_ROWS, 2);
    write_rows(&corpus_dir.join("copy-valid.jsonl"), &held_out)?;
    let held_out = corpus(Stage::Kitchen, VALID_ROWS, 2);
    write_rows(&corpus_dir.join("kitchen-valid.jsonl"), &held_out)?;
    println!("wrote corpus, tokenizer, configuration and demo rows to {}", args.output.display());
    Ok(ExitCode::SUCCESS)
}

/// A Llama of 3.3 M parameters, small enough to train from nothing on a CPU.
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

/// `role`, a line's end and the content, for each message.
fn texts_of(row: &Value) -> Vec<String> {
    let messages = row["messages"].as_array().into_iter().flatten();
    let text = |message: &Value, key: &str| message[key].as_str().unwrap_or_default().to_owned();
    messages.map(|m| format!("{}\n{}", text(m, "role"), text(m, "content"))).collect()
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
