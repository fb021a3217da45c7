//! The flags of `tunesmith train`.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::cli::config::parse_bytes;
use crate::data::Columns;

/// Fine-tune a model on chat, prompt/completion or preference rows
///
/// Every flag is also a key of the YAML file (`batch_size: 16`) and an environment variable
/// (`TUNESMITH_BATCH_SIZE`); flags win over the environment, the environment over the file.
#[derive(Args, Debug, Default, Serialize)]
pub(crate) struct TrainArgs {
    /// YAML file with settings, of this program, of TRL or of AutoTrain
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) config: Option<PathBuf>,
    /// Base model: a folder in Hub layout, or owner/name[@revision] on the Hub
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Training rows: a file (JSON lines or array, CSV, Parquet, gzip), a folder or a pattern (repeatable)
    #[arg(long, value_name = "PATH")]
    pub(crate) data: Vec<PathBuf>,
    /// Held-out rows for the validation loss
    #[arg(long, value_name = "PATH")]
    pub(crate) valid: Option<PathBuf>,
    /// Columns of the rows under other names: question=prompt,answer=completion
    #[arg(long, value_name = "THEIRS=OURS", value_parser = columns)]
    pub(crate) columns: Option<Columns>,
    /// Column that holds the whole row, a text or a list of messages
    #[arg(long, value_name = "NAME")]
    pub(crate) text_column: Option<String>,
    /// Folder to publish; checkpoints and events are kept in OUTPUT.work until then
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Train a LoRA adapter, or every weight (from random ones if the folder has none) [lora]
    #[arg(long, value_parser = ["lora", "full"])]
    pub(crate) method: Option<String>,
    /// Supervised rows, or preferences: a better and a worse answer to each prompt [sft]
    #[arg(long, value_parser = ["sft", "dpo", "orpo"])]
    pub(crate) objective: Option<String>,
    /// How strongly dpo holds on to the adapter that it started from, up to 2 [0.1]
    #[arg(long, value_parser = finite)]
    pub(crate) dpo_beta: Option<f64>,
    /// How dpo takes a pair's margin [sigmoid]
    #[arg(long, value_parser = ["sigmoid", "robust"])]
    pub(crate) dpo_loss: Option<String>,
    /// Share of pairs that dpo takes to be labelled the wrong way round, below 0.5 [0]
    #[arg(long, value_parser = finite)]
    pub(crate) dpo_label_smoothing: Option<f64>,
    /// Weight of the likelihood of the preferred answers that dpo adds [0]
    #[arg(long, value_parser = finite)]
    pub(crate) dpo_sft_weight: Option<f64>,
    /// Weight of the odds ratio in orpo's loss, up to 2 [0.1]
    #[arg(long, value_parser = finite)]
    pub(crate) orpo_beta: Option<f64>,
    /// Share of the supervised loss that asks for all tokens alike [0]
    #[arg(long, value_parser = finite)]
    pub(crate) label_smoothing: Option<f64>,
    /// Noise on the embeddings while training, as NEFTune has it, such as 5 [0]
    #[arg(long, value_parser = finite)]
    pub(crate) neftune_alpha: Option<f64>,
    /// LoRA rank [16]
    #[arg(long)]
    pub(crate) rank: Option<usize>,
    /// LoRA alpha; the update is scaled by alpha / rank [32]
    #[arg(long, value_parser = finite)]
    pub(crate) alpha: Option<f64>,
    /// Dropout on the adapter's input [0]
    #[arg(long, value_parser = finite)]
    pub(crate) dropout: Option<f64>,
    /// all-linear, or names with commas: q_proj,v_proj [all-linear]
    #[arg(long)]
    pub(crate) targets: Option<String>,
    /// Scale by alpha / sqrt(rank)
    #[arg(long)]
    pub(crate) rslora: bool,
    /// How A and B change a projection: lora, or dora with a trained length for each row [lora]
    #[arg(long, value_name = "NAME", value_parser = crate::adapters::variant_names())]
    pub(crate) variant: Option<String>,
    /// Ranks of some modules, by the end of their path: down_proj=32,layers.0.self_attn.q_proj=4
    #[arg(long, value_name = "MODULE=RANK", value_parser = pattern)]
    pub(crate) rank_pattern: Option<Map<String, Value>>,
    /// Alphas of some modules, likewise
    #[arg(long, value_name = "MODULE=ALPHA", value_parser = pattern)]
    pub(crate) alpha_pattern: Option<Map<String, Value>>,
    /// Layers that get an adapter, from 0, with commas [all]
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    pub(crate) layers: Vec<usize>,
    /// Modules that get none, by the end of their path, with commas
    #[arg(long, value_name = "MODULE,MODULE", value_delimiter = ',')]
    pub(crate) exclude: Vec<String>,
    /// Tables to train whole: embed_tokens, lm_head
    #[arg(long, value_name = "TABLE,TABLE", value_delimiter = ',')]
    pub(crate) modules_to_save: Vec<String>,
    /// Keep embedding and head one matrix there, where the base has one for both
    #[arg(long)]
    pub(crate) ensure_weight_tying: bool,
    /// Tokens, by id, whose rows of embedding and head are trained
    #[arg(long, value_name = "ID,ID", value_delimiter = ',')]
    pub(crate) train_tokens: Vec<u32>,
    /// Tokens to add to the tokenizer and to learn, with commas, or a file with one on each line
    #[arg(long, value_name = "FILE|TOKEN,TOKEN", value_delimiter = ',')]
    pub(crate) new_tokens: Vec<String>,
    /// Start from an existing adapter
    #[arg(long, value_name = "DIR")]
    pub(crate) init_adapter: Option<PathBuf>,
    /// Peak learning rate [lora 2e-4, lora with preferences 5e-5, full 2e-5, full from random 1e-3]
    #[arg(long, value_parser = finite)]
    pub(crate) lr: Option<f64>,
    /// Course of the learning rate after the warm-up [linear]
    #[arg(long, value_parser = ["linear", "cosine", "constant"])]
    pub(crate) schedule: Option<String>,
    /// Optimizer steps of warm-up
    #[arg(long)]
    pub(crate) warmup_steps: Option<usize>,
    /// Warm-up as a share of all steps, if no steps are given [0.03]
    #[arg(long, value_parser = finite)]
    pub(crate) warmup_ratio: Option<f64>,
    /// Passes over the data [3]
    #[arg(long, value_parser = finite)]
    pub(crate) epochs: Option<f64>,
    /// Optimizer steps, instead of epochs
    #[arg(long)]
    pub(crate) max_steps: Option<usize>,
    /// Sequences per optimizer step [8]
    #[arg(long)]
    pub(crate) batch_size: Option<usize>,
    /// Most tokens in one forward and backward pass; bounds the memory [2048]
    #[arg(long)]
    pub(crate) micro_batch_tokens: Option<usize>,
    /// Compute the inside of each layer again in the backward pass instead of keeping it: less memory,
    /// more time, the same numbers [auto: where memory is short]
    #[arg(long, value_parser = ["auto", "none", "block"])]
    pub(crate) recompute: Option<String>,
    /// Pack examples into rows of up to --max-length tokens, which --batch-size then counts [none]
    #[arg(long, value_parser = ["none", "bfd"])]
    pub(crate) packing: Option<String>,
    /// Meet rows of similar lengths together
    #[arg(long)]
    pub(crate) group_by_length: bool,
    /// Largest norm of the gradient, 0 = no clipping [1]
    #[arg(long, value_parser = finite)]
    pub(crate) grad_clip: Option<f64>,
    /// AdamW's decoupled weight decay, not on norms and biases [0]
    #[arg(long, value_parser = finite)]
    pub(crate) weight_decay: Option<f64>,
    /// AdamW's beta1 [0.9]
    #[arg(long, value_parser = finite)]
    pub(crate) beta1: Option<f64>,
    /// AdamW's beta2 [0.999]
    #[arg(long, value_parser = finite)]
    pub(crate) beta2: Option<f64>,
    /// Decides weights, row order and dropout [42]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Whether rows are shuffled each epoch [true]
    #[arg(long)]
    pub(crate) shuffle: Option<bool>,
    /// Longest sequence in tokens; the rest is cut off [1024]
    #[arg(long)]
    pub(crate) max_length: Option<usize>,
    /// Tokens that count in the loss [assistant]
    #[arg(long, value_parser = ["assistant", "all", "auto"])]
    pub(crate) loss_on: Option<String>,
    /// Validate every N steps, and at the end [0 = only at the end]
    #[arg(long, value_name = "N")]
    pub(crate) eval_every: Option<usize>,
    /// Rows of such a validation, in rotation; all at the end [all]
    #[arg(long, value_name = "N")]
    pub(crate) valid_batch: Option<usize>,
    /// Answer N validation rows at each validation: exact match and F1 [0]
    #[arg(long, value_name = "N")]
    pub(crate) eval_generate: Option<usize>,
    /// Rows that the report answers before and after [4]
    #[arg(long, value_name = "N")]
    pub(crate) samples: Option<usize>,
    /// Publish the adapter at the end of each epoch as DIR/step-N
    #[arg(long, value_name = "DIR")]
    pub(crate) epoch_dir: Option<PathBuf>,
    /// Adapters that are kept there, the newest [3]
    #[arg(long, value_name = "N")]
    pub(crate) keep_epochs: Option<usize>,
    /// End when the validation loss has not become better for N validations
    #[arg(long, value_name = "N")]
    pub(crate) early_stopping_patience: Option<usize>,
    /// By how much it must become better to count there [0]
    #[arg(long, value_parser = finite)]
    pub(crate) early_stopping_threshold: Option<f64>,
    /// Publish what was trained when the validation loss was lowest, not the last
    #[arg(long)]
    pub(crate) keep_best: bool,
    /// Publish the last as well, as OUTPUT.last
    #[arg(long)]
    pub(crate) keep_last: bool,
    /// Train every combination over the one base and publish the best: lr=1e-4,2e-4 (repeatable)
    #[arg(long, value_name = "KEY=VALUES", value_parser = axis)]
    #[serde(serialize_with = "axes")]
    pub(crate) sweep: Vec<Axis>,
    /// Leave the worse half of a sweep behind at halves, quarters, ... of the way
    #[arg(long)]
    pub(crate) sweep_halving: bool,
    /// Warn when the loss was above three times its median for N steps, 0 = never [5]
    #[arg(long, value_name = "N")]
    pub(crate) spike_steps: Option<usize>,
    /// End the run there, with its checkpoints
    #[arg(long)]
    pub(crate) stop_on_spike: bool,
    /// Write the log-probabilities of N examples as parity.json beside the adapter [0]
    #[arg(long, value_name = "N")]
    pub(crate) parity_examples: Option<usize>,
    /// Checkpoint every N steps [100]
    #[arg(long, value_name = "N")]
    pub(crate) checkpoint_every: Option<usize>,
    /// Checkpoint at the latest after so many seconds [120]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) checkpoint_seconds: Option<u64>,
    /// Stop after so many minutes and publish what there is
    #[arg(long, value_name = "MINUTES", value_parser = finite)]
    pub(crate) time_limit: Option<f64>,
    /// Number format of the published weights of method full [bf16]
    #[arg(long, value_parser = ["f32", "bf16"])]
    pub(crate) dtype: Option<String>,
    /// Hold the base under an adapter in 8 bits, or its projections in 4, or multiply in bf16: as it will be
    /// served [none]
    #[arg(long, value_parser = ["none", "bf16", "int8", "int4"])]
    pub(crate) quantize: Option<String>,
    /// Threads of the tensor operations [all cores]
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// Continue from the newest good checkpoint, if there is one
    #[arg(long)]
    pub(crate) resume: bool,
    /// Replace an output or an unfinished run that is there
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Keep OUTPUT.work
    #[arg(long)]
    pub(crate) keep_work: bool,
    /// Make three real steps, print what a run would take, and leave nothing behind
    #[arg(long)]
    #[serde(skip)]
    pub(crate) dry_run: bool,
    /// Memory that the run may take, such as 8GiB: chooses --micro-batch-tokens and --recompute
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    #[serde(skip)]
    pub(crate) memory: Option<usize>,
    /// Print every event as a line of JSON, and nothing else
    #[arg(long)]
    #[serde(skip)]
    pub(crate) events: bool,
    /// Answer GET /metrics there with the run's figures, as Prometheus reads them
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(skip)]
    pub(crate) metrics_addr: Option<SocketAddr>,
    /// Push the run's figures to this OTLP/HTTP collector, such as http://localhost:4318
    #[arg(long, value_name = "URL")]
    #[serde(skip)]
    pub(crate) otlp: Option<String>,
    /// Seconds between two pushes [60]
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    #[serde(skip)]
    pub(crate) otlp_seconds: u64,
    /// Stop with a checkpoint when the standard input ends: when the process that holds it dies
    #[arg(long)]
    #[serde(skip)]
    pub(crate) leash: bool,
    /// Give way to other processes: add N, up to 19, to the own niceness
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(..=19))]
    #[serde(skip)]
    pub(crate) nice: Option<u8>,
    /// Fail rather than use more memory than this, such as 2GiB
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    #[serde(skip)]
    pub(crate) memory_limit: Option<usize>,
}

/// A setting and its values in a sweep.
pub(crate) type Axis = (String, Vec<Value>);

/// `lr=1e-4,2e-4`; what is no number or truth value is text. A value with commas stands in quotes.
fn axis(text: &str) -> Result<Axis, String> {
    let (key, values) = text.split_once('=').ok_or("expected KEY=VALUE,VALUE")?;
    let values = values.trim();
    if values.is_empty() {
        return Err(format!("{key} has no values"));
    }
    let list: Result<Vec<Value>, _> = serde_json::from_str(&format!("[{values}]"));
    let plain = |word: &str| {
        let word = word.trim();
        serde_json::from_str(word).unwrap_or_else(|_| Value::String(word.to_owned()))
    };
    let values = list.unwrap_or_else(|_| values.split(',').map(plain).collect());
    Ok((key.trim().replace('-', "_"), values))
}

/// As the settings have it; nothing where there is none.
fn axes<S: serde::Serializer>(axes: &[Axis], serializer: S) -> Result<S::Ok, S::Error> {
    if axes.is_empty() {
        return serializer.serialize_none();
    }
    serializer.collect_map(axes.iter().map(|(key, values)| (key, values)))
}

/// `question=prompt,answer=completion`, theirs first.
pub(crate) fn columns(text: &str) -> Result<Columns, String> {
    let pair = |pair: &str| match pair.split_once('=') {
        Some((theirs, ours)) => Ok((ours.trim().to_owned(), theirs.trim().to_owned())),
        None => Err(format!("{pair:?} is no THEIRS=OURS")),
    };
    text.split(',').map(pair).collect()
}

/// `down_proj=32,layers.0.self_attn.q_proj=4`
fn pattern(text: &str) -> Result<Map<String, Value>, String> {
    let pair = |pair: &str| {
        let (key, number) = pair.rsplit_once('=').ok_or(format!("{pair:?} is no MODULE=NUMBER"))?;
        let number: Value =
            number.trim().parse().map_err(|_| format!("{number:?} is no number"))?;
        Ok((key.trim().to_owned(), number))
    };
    text.split(',').map(pair).collect()
}

fn bytes(text: &str) -> Result<usize, String> {
    parse_bytes(text).map_err(|error| error.to_string())
}

/// A number that can be written as JSON: others would be taken for a setting that is not given.
fn finite(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number),
        Ok(_) => Err("no finite number".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
