//! `tunesmith bench`: how fast this machine serves a model.

mod load;

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::{Value, json};

use self::load::{Load, median, quantile};
use super::common::resolve_model;
use crate::adapters::{AdapterRegistry, AdapterVersion};
use crate::engine::{self, EngineConfig};
use crate::model::{Decoder, Quantization};

/// Memory for keys and values, in bytes.
const KV_CACHE_BYTES: usize = 2 << 30;
/// Tokens of the prompts that only start a decode.
const SHORT_PROMPT: usize = 32;
/// Runs of which the median is taken.
const RUNS: usize = 3;
/// Streams that are read while a long prompt arrives.
const READERS: usize = 4;

/// Measure how fast this machine serves a model: prompts, answers of several requests at once, and how long
/// running answers stand still while a long prompt arrives. Prompts are random tokens, so that nothing is
/// cached.
#[derive(Args, Debug, Clone)]
pub(super) struct BenchArgs {
    /// Base model: a folder in Hub layout, or owner/name[@revision] on the Hub
    #[arg(long)]
    model: String,
    /// Adapter folder (repeatable): the requests take turns with them
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Prompt lengths to measure
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [128, 512])]
    prompt_tokens: Vec<usize>,
    /// Numbers of requests at once to measure
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 4, 8, 16])]
    batch: Vec<usize>,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 64)]
    output_tokens: usize,
    /// Tokens of the prompt that arrives while others are answered
    #[arg(long, value_name = "N", default_value_t = 1024)]
    long_prompt: usize,
    /// Milliseconds that a chunk of a long prompt may keep running answers waiting, about [default: 250]
    #[arg(long, value_name = "MS")]
    max_step_ms: Option<u64>,
    /// Hold the base in 8 bits, or its projections in 4
    #[arg(long, value_name = "none|int8|int4", default_value = "none")]
    quantize: Quantization,
    /// Threads of the tensor operations [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// A model or adapter that cannot be used, lengths that do not fit, and a request that fails.
pub(super) fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let load = open(args)?;
    let limit = load.max_sequence_len();
    let prompts = args.prompt_tokens.iter().chain([&args.long_prompt]);
    let longest = prompts.max().copied().unwrap_or(0).max(SHORT_PROMPT) + args.output_tokens;
    ensure!(args.output_tokens > 1, "--output-tokens must be at least 2");
    ensure!(longest <= limit, "{longest} tokens are asked for, but the model allows {limit}");
    load.request(0, SHORT_PROMPT, 2)?.wait()?; // Everything is in memory from here on.

    let prefill = args.prompt_tokens.iter().map(|&length| prefill(&load, length));
    let prefill: Vec<Value> = prefill.collect::<anyhow::Result<_>>()?;
    let decode = args.batch.iter().map(|&batch| decode(&load, batch, args.output_tokens));
    let decode: Vec<Value> = decode.collect::<anyhow::Result<_>>()?;
    let arrival = arrival(&load, args)?;
    let report = json!({
        "model": args.model,
        "quantize": args.quantize,
        "adapters": args.adapter.len(),
        "prefill": prefill,
        "decode": decode,
        "arrival": arrival,
    });
    if args.json {
        println!("{report:#}");
    } else {
        print(&report);
    }
    Ok(ExitCode::SUCCESS)
}

fn open(args: &BenchArgs) -> anyhow::Result<Load> {
    let dir = resolve_model(&args.model)?;
    let decoder = Decoder::load(&dir, args.quantize.into())
        .with_context(|| format!("loading {}", dir.display()))?;
    let registry = AdapterRegistry::new(decoder.config().clone());
    let load = |(index, dir): (usize, &PathBuf)| -> anyhow::Result<Arc<AdapterVersion>> {
        let name = format!("adapter-{index}");
        let loaded = registry.load(&name, dir, false);
        Ok(loaded.with_context(|| format!("--adapter {}", dir.display()))?.0)
    };
    let adapters = args.adapter.iter().enumerate().map(load).collect::<anyhow::Result<Vec<_>>>()?;
    let most = args.batch.iter().copied().max().unwrap_or(1).max(READERS + 1);
    let mut config = EngineConfig::for_model(decoder.config(), most, KV_CACHE_BYTES);
    // Random tokens have nothing in common and nothing to guess.
    (config.prefix_cache, config.speculate) = (false, 0);
    if let Some(milliseconds) = args.max_step_ms {
        config.max_step = std::time::Duration::from_millis(milliseconds);
    }
    let vocab_size = decoder.config().vocab_size;
    Ok(Load::new(engine::spawn(Arc::new(decoder), config)?, adapters, vocab_size))
}

/// Prompt tokens a second of one request alone.
fn prefill(load: &Load, length: usize) -> anyhow::Result<Value> {
    let seconds = (0..RUNS).map(|_| Ok(load.request(0, length, 1)?.wait()?.first_token_seconds()));
    let seconds = median(seconds.collect::<anyhow::Result<_>>()?);
    Ok(json!({
        "prompt_tokens": length,
        "seconds": seconds,
        "tokens_per_second": length as f64 / seconds,
    }))
}

/// Tokens a second of `batch` requests, from the moment at which all of them answer.
fn decode(load: &Load, batch: usize, output_tokens: usize) -> anyhow::Result<Value> {
    let mut rates = Vec::new();
    let mut gaps = Vec::new();
    for _ in 0..RUNS {
        let requests = (0..batch).map(|index| load.request(index, SHORT_PROMPT, output_tokens));
        let requests = requests.collect::<anyhow::Result<Vec<_>>>()?;
        let answers = requests.into_iter().map(load::Running::wait);
        let answers = answers.collect::<anyhow::Result<Vec<_>>>()?;
        let all_begun = answers.iter().map(load::Answer::first).max().context("no requests")?;
        let end = answers.iter().map(load::Answer::last).max().context("no requests")?;
        let tokens = answers.iter().map(|answer| answer.tokens_after(all_begun)).sum::<usize>();
        rates.push(tokens as f64 / end.duration_since(all_begun).as_secs_f64());
        gaps.extend(answers.iter().flat_map(|answer| answer.gaps(all_begun, end)));
    }
    Ok(json!({
        "requests": batch,
        "tokens_per_second": median(rates),
        "gap_ms": {"p50": quantile(&mut gaps, 0.5) * 1e3, "p99": quantile(&mut gaps, 0.99) * 1e3},
    }))
}

/// Gaps between the tokens of running answers while a long prompt is computed.
fn arrival(load: &Load, args: &BenchArgs) -> anyhow::Result<Value> {
    let room = load.max_sequence_len() - SHORT_PROMPT;
    let readers = (0..READERS).map(|index| load.request(index, SHORT_PROMPT, room));
    let readers = readers.collect::<anyhow::Result<Vec<_>>>()?;
    readers.iter().for_each(load::Running::wait_for_first);
    let arrived = std::time::Instant::now();
    let long = load.request(READERS, args.long_prompt, 1)?.wait()?;
    let answers = readers.into_iter().map(load::Running::stop);
    let answers = answers.collect::<anyhow::Result<Vec<_>>>()?;
    let during = answers.iter().flat_map(|answer| answer.gaps(arrived, long.last()));
    let mut gaps: Vec<f64> = during.collect();
    Ok(json!({
        "running": READERS,
        "prompt_tokens": args.long_prompt,
        "first_token_seconds": long.first_token_seconds(),
        "gap_ms": {
            "p50": quantile(&mut gaps, 0.5) * 1e3,
            "p99": quantile(&mut gaps, 0.99) * 1e3,
            "max": quantile(&mut gaps, 1.0) * 1e3,
        },
    }))
}

fn print(report: &Value) {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    for row in report["prefill"].as_array().into_iter().flatten() {
        let rate = number(&row["tokens_per_second"]);
        println!("prompt of {:>5} tokens    {rate:>9.1} tokens/s", row["prompt_tokens"]);
    }
    for row in report["decode"].as_array().into_iter().flatten() {
        let (rate, gap) = (number(&row["tokens_per_second"]), &row["gap_ms"]);
        let (p50, p99) = (number(&gap["p50"]), number(&gap["p99"]));
        let requests = &row["requests"];
        println!(
            "{requests:>3} answers at once       {rate:>9.1} tokens/s, gap {p50:.1} ms (p99 {p99:.1})"
        );
    }
    let (row, gap) = (&report["arrival"], &report["arrival"]["gap_ms"]);
    println!(
        "a prompt of {} tokens joins {} answers: its first token after {:.2} s, gap {:.1} ms (p99 {:.1}, \
         longest {:.1})",
        row["prompt_tokens"],
        row["running"],
        number(&row["first_token_seconds"]),
        number(&gap["p50"]),
        number(&gap["p99"]),
        number(&gap["max"]),
    );
}
