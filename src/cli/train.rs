//! `tunesmith train`: rows in, an adapter (or a model) folder out.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
};

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::{
    common::resolve_model, progress::Progress, settings::layered, stop_signal::stop_on_signals,
};
use crate::data::{DataError, Encoder, Example, read_rows};
use crate::model::ModelConfig;
use crate::publish::sha256_file;
use crate::text::{ChatTemplate, Tokenizer};
use crate::train::{DataSource, Outcome, TrainConfig, TrainJob, TrainSummary, run as train};

/// Problems of a data file that are shown before the rest is only counted.
const MAX_SHOWN_PROBLEMS: usize = 50;

/// Fine-tune a model on chat or prompt/completion rows
///
/// Every flag is also a key of the YAML file (`batch_size: 16`) and an environment variable
/// (`TUNESMITH_BATCH_SIZE`); flags win over the environment, the environment over the file.
#[derive(Args, Debug, Default, Serialize)]
pub(super) struct TrainArgs {
    /// YAML file with settings
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(super) config: Option<PathBuf>,
    /// Base model: a folder in Hub layout, or owner/name[@revision] on the Hub
    #[arg(long)]
    pub(super) model: Option<String>,
    /// Training rows, JSON lines
    #[arg(long, value_name = "FILE")]
    pub(super) data: Option<PathBuf>,
    /// Held-out rows for the validation loss
    #[arg(long, value_name = "FILE")]
    pub(super) valid: Option<PathBuf>,
    /// Folder to publish; checkpoints and events are kept in OUTPUT.work until then
    #[arg(long, value_name = "DIR")]
    pub(super) output: Option<PathBuf>,
    /// Train a LoRA adapter, or every weight (from random ones if the folder has none) [lora]
    #[arg(long, value_parser = ["lora", "full"])]
    pub(super) method: Option<String>,
    /// LoRA rank [16]
    #[arg(long)]
    pub(super) rank: Option<usize>,
    /// LoRA alpha; the update is scaled by alpha / rank [32]
    #[arg(long)]
    pub(super) alpha: Option<f64>,
    /// Dropout on the adapter's input [0]
    #[arg(long)]
    pub(super) dropout: Option<f64>,
    /// all-linear, or names with commas: q_proj,v_proj [all-linear]
    #[arg(long)]
    pub(super) targets: Option<String>,
    /// Scale by alpha / sqrt(rank)
    #[arg(long)]
    pub(super) rslora: bool,
    /// Start from an existing adapter
    #[arg(long, value_name = "DIR")]
    pub(super) init_adapter: Option<PathBuf>,
    /// Peak learning rate [lora 2e-4, full 2e-5, full from random 1e-3]
    #[arg(long)]
    pub(super) lr: Option<f64>,
    /// Course of the learning rate after the warm-up [linear]
    #[arg(long, value_parser = ["linear", "cosine", "constant"])]
    pub(super) schedule: Option<String>,
    /// Optimizer steps of warm-up
    #[arg(long)]
    pub(super) warmup_steps: Option<usize>,
    /// Warm-up as a share of all steps, if no steps are given [0.03]
    #[arg(long)]
    pub(super) warmup_ratio: Option<f64>,
    /// Passes over the data [3]
    #[arg(long)]
    pub(super) epochs: Option<f64>,
    /// Optimizer steps, instead of epochs
    #[arg(long)]
    pub(super) max_steps: Option<usize>,
    /// Sequences per optimizer step [8]
    #[arg(long)]
    pub(super) batch_size: Option<usize>,
    /// Most tokens in one forward and backward pass; bounds the memory [2048]
    #[arg(long)]
    pub(super) micro_batch_tokens: Option<usize>,
    /// Largest norm of the gradient, 0 = no clipping [1]
    #[arg(long)]
    pub(super) grad_clip: Option<f64>,
    /// AdamW's decoupled weight decay, not on norms and biases [0]
    #[arg(long)]
    pub(super) weight_decay: Option<f64>,
    /// AdamW's beta1 [0.9]
    #[arg(long)]
    pub(super) beta1: Option<f64>,
    /// AdamW's beta2 [0.999]
    #[arg(long)]
    pub(super) beta2: Option<f64>,
    /// Decides weights, row order and dropout [42]
    #[arg(long)]
    pub(super) seed: Option<u64>,
    /// Whether rows are shuffled each epoch [true]
    #[arg(long)]
    pub(super) shuffle: Option<bool>,
    /// Longest sequence in tokens; the rest is cut off [1024]
    #[arg(long)]
    pub(super) max_length: Option<usize>,
    /// Tokens that count in the loss [assistant]
    #[arg(long, value_parser = ["assistant", "all"])]
    pub(super) loss_on: Option<String>,
    /// Validate every N steps, and at the end [0 = only at the end]
    #[arg(long, value_name = "N")]
    pub(super) eval_every: Option<usize>,
    /// Checkpoint every N steps [100]
    #[arg(long, value_name = "N")]
    pub(super) checkpoint_every: Option<usize>,
    /// Checkpoint at the latest after so many seconds [120]
    #[arg(long, value_name = "SECONDS")]
    pub(super) checkpoint_seconds: Option<u64>,
    /// Stop after so many minutes and publish what there is
    #[arg(long, value_name = "MINUTES")]
    pub(super) time_limit: Option<f64>,
    /// Number format of the published weights of method full [bf16]
    #[arg(long, value_parser = ["f32", "bf16"])]
    pub(super) dtype: Option<String>,
    /// Hold the base under an adapter in 8 bits, or its projections in 4 [none]
    #[arg(long, value_parser = ["none", "int8", "int4"])]
    pub(super) quantize: Option<String>,
    /// Threads of the tensor operations [all cores]
    #[arg(long)]
    pub(super) threads: Option<usize>,
    /// Continue from the newest good checkpoint, if there is one
    #[arg(long)]
    pub(super) resume: bool,
    /// Replace an output or an unfinished run that is there
    #[arg(long)]
    pub(super) overwrite: bool,
    /// Keep OUTPUT.work
    #[arg(long)]
    pub(super) keep_work: bool,
}

/// Runs the command.
///
/// # Errors
/// Settings, data, model or output that cannot be used, each by name.
pub(super) fn run(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    let config: TrainConfig = layered(args.config.as_deref(), args)?;
    config.validate()?;
    if let Some(threads) = config.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let job = prepare(config)?;
    println!("{}", serde_json::to_string(&job.config)?);
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signals(&stop)?;
    let mut progress = Progress::new();
    let result = train(&job, &mut |event| progress.show(event), &stop);
    progress.finish();
    print_summary(&result?);
    Ok(ExitCode::SUCCESS)
}

/// Reads the data and turns it into examples.
pub(super) fn prepare(config: TrainConfig) -> anyhow::Result<TrainJob> {
    let model_dir = resolve_model(&config.model)?;
    let context = || format!("loading {}", model_dir.display());
    let tokenizer = Tokenizer::from_dir(&model_dir).with_context(context)?;
    let template = ChatTemplate::from_dir(&model_dir).with_context(context)?;
    let positions =
        ModelConfig::from_dir(&model_dir).with_context(context)?.max_position_embeddings;
    let encoder = Encoder {
        tokenizer: &tokenizer,
        template: &template,
        loss_on: config.loss_on.into(),
        max_length: config.max_length.min(positions),
    };
    let mut sources = Vec::new();
    let mut read = |role, path: &Path| -> anyhow::Result<Vec<Example>> {
        let rows = read_rows(path).map_err(show_problems)?;
        let examples = encoder.encode_all(path, &rows).map_err(show_problems)?;
        let sha256 = sha256_file(path).with_context(|| path.display().to_string())?;
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        sources.push(DataSource { role, file, sha256, num_rows: rows.len() });
        describe(path, &examples, encoder.max_length);
        Ok(examples)
    };
    let train = read("train", &config.data)?;
    let valid = config.valid.as_deref().map(|path| read("valid", path)).transpose()?;
    Ok(TrainJob { config, model_dir, train, valid: valid.unwrap_or_default(), sources })
}

/// Prints every problem with its line; the error that is left says how many there were.
pub(super) fn show_problems(error: DataError) -> anyhow::Error {
    if let DataError::Rows { path, errors } = &error {
        for problem in errors.iter().take(MAX_SHOWN_PROBLEMS) {
            eprintln!("{path}:{}: {} [{}]", problem.line, problem.message, problem.code);
        }
        if errors.len() > MAX_SHOWN_PROBLEMS {
            eprintln!("... and {} more", errors.len() - MAX_SHOWN_PROBLEMS);
        }
    }
    error.into()
}

fn describe(path: &Path, examples: &[Example], max_length: usize) {
    let num_tokens: usize = examples.iter().map(|example| example.tokens.len()).sum();
    let num_trained: usize = examples.iter().map(Example::num_trained).sum();
    let (name, rows) = (path.display(), examples.len());
    println!("{name}: {rows} rows, {num_tokens} tokens, {num_trained} of them trained");
    let num_cut = examples.iter().filter(|example| example.num_truncated > 0).count();
    if num_cut > 0 {
        println!("{name}: {num_cut} rows are cut off at {max_length} tokens (max_length)");
    }
}

fn print_summary(summary: &TrainSummary) {
    let TrainSummary { step, total_steps, path, digest, seconds, .. } = summary;
    let path = path.display();
    if summary.outcome == Outcome::Stopped {
        println!("stopped after step {step} of {total_steps}; the state is in {path}");
        println!("to go on, give the same command with --resume");
        return;
    }
    if summary.outcome == Outcome::TimeLimit {
        println!("the time limit ended the run after step {step} of {total_steps}");
    }
    let loss = summary.loss.map_or(String::new(), |loss| format!(", loss {loss:.4}"));
    let valid = summary.valid.map_or(String::new(), |(loss, accuracy)| {
        format!(", valid loss {loss:.4}, valid accuracy {:.1} %", accuracy * 100.0)
    });
    println!("published {path} after {step} steps in {seconds:.1} s{loss}{valid}");
    println!("digest {digest}");
}
