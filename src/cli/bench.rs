//! `tunesmith bench`: how fast this machine serves a model.

mod adapters;
mod load;
mod operations;

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::{Value, json};

use self::{
    adapters::Made,
    load::{Load, median, quantile},
    operations::{report, table},
};
use super::common::resolve_model;
use crate::engine::{self, EngineConfig};
use crate::kernels::{self, Roofline};
use crate::model::{Decoder, KvDtype, Quantization};
use crate::ops::{lora_dtype::LoraDtype, profile};

/// Memory for keys and values, in bytes.
const KV_CACHE_BYTES: usize = 2 << 30;
/// Tokens of the prompts that only start a decode.
const SHORT_PROMPT: usize = 32;
/// Runs of which the median is taken.
const RUNS: usize = 3;
/// Streams that are read while a long prompt arrives.
const READERS: usize = 4;

/// Measure how fast this machine serves a model: prompts, answers of several requests at once, where the time
/// of a step goes beside what the machine can do at best, and how long running answers stand still while a
/// long prompt arrives. Prompts are random tokens, so that nothing is cached.
#[derive(Args, Debug, Clone)]
pub(super) struct BenchArgs {
    /// Base model: a folder in Hub layout, or owner/name[@revision] on the Hub
    #[arg(long)]
    model: String,
    /// Adapter folder (repeatable): the requests take turns with them
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Make so many adapters of random numbers on all projections, in addition: answers are measured without
    /// and with them
    #[arg(long, value_name = "N", default_value_t = 0)]
    adapters: usize,
    /// Rank of the adapters that are made
    #[arg(long, value_name = "R", default_value_t = 16)]
    rank: usize,
    /// Their variant: lora or dora
    #[arg(long, value_name = "NAME", default_value = "lora")]
    variant: String,
    /// Compute in bf16 (`bf16`), hold the base in 8 bits (`int8`), its projections in 4 (`int4`), or all as it is
    /// (`none`)
    #[arg(long, value_name = "none|bf16|int8|int4", default_value = "none")]
    quantize: Quantization,
    /// Hold keys and values in `f32`, `bf16` or `int8`
    #[arg(long, value_name = "f32|bf16|int8", default_value = "f32")]
    kv_dtype: KvDtype,
    /// How adapters are held: as they are (`auto`, `float32`), or rounded while they are loaded
    #[arg(long, value_name = "auto|float16|bfloat16|float32", default_value = "auto")]
    lora_dtype: LoraDtype,
    /// Prompt lengths to measure
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [128, 512])]
    prompt_tokens: Vec<usize>,
    /// Numbers of requests at once to measure
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 4, 8, 16])]
    batch: Vec<usize>,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 64)]
    output_tokens: usize,
    /// Tokens of the prompt that arrives while others are answered; 0 leaves this out
    #[arg(long, value_name = "N", default_value_t = 1024)]
    long_prompt: usize,
    /// Milliseconds that a chunk of a long prompt may keep running answers waiting, about [default: 250]
    #[arg(long, value_name = "MS")]
    max_step_ms: Option<u64>,
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
    ensure!(args.output_tokens > 1, "--output-tokens must be at least 2");
    ensure!(!args.batch.contains(&0), "--batch must be at least 1");
    ensure!(!args.prompt_tokens.contains(&0), "--prompt-tokens must be at least 1");
    ensure!(args.rank > 0, "--rank must be at least 1");
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let limits = Roofline::measure();
    let load = open(args)?;
    let limit = load.max_sequence_len();
    let prompts = args.prompt_tokens.iter().chain([&args.long_prompt]);
    let longest = prompts.max().copied().unwrap_or(0).max(SHORT_PROMPT) + args.output_tokens;
    ensure!(longest <= limit, "{longest} tokens are asked for, but the model allows {limit}");
    load.request(0, SHORT_PROMPT, 2)?.wait()?; // Everything is in memory from here on.

    let prefill = args.prompt_tokens.iter().map(|&length| prefill(&load, length));
    let prefill: Vec<Value> = prefill.collect::<anyhow::Result<_>>()?;
    let decode = args.batch.iter().map(|&batch| decode(&load, batch, args.output_tokens));
    let decode: Vec<Value> = decode.collect::<anyhow::Result<_>>()?;
    let operations = operations(&load, args, &limits)?;
    let arrival = if args.long_prompt > 0 { arrival(&load, args)? } else { Value::Null };
    let report = json!({
        "model": args.model,
        "quantize": args.quantize,
        "kv_dtype": args.kv_dtype,
        "lora_dtype": args.lora_dtype,
        "adapters": args.adapter.len() + args.adapters,
        "machine": {
            "kernels": kernels::best().name,
            "threads": rayon::current_num_threads(),
            "bytes_per_second": limits.bytes_per_second,
            "f32_per_second": limits.f32_per_second,
            "bf16_per_second": limits.bf16_per_second,
            "int8_per_second": limits.int8_per_second,
        },
        "prefill": prefill,
        "decode": decode,
        "operations": operations,
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
    let decoder = Arc::new(decoder);
    let made = Made { count: args.adapters, rank: args.rank, variant: &args.variant };
    let adapters = adapters::open(&decoder, &args.adapter, made, args.lora_dtype)?;
    let most = args.batch.iter().copied().max().unwrap_or(1).max(READERS + 1);
    let mut config = EngineConfig::for_cache(decoder.config(), most, KV_CACHE_BYTES, args.kv_dtype);
    // Random tokens have nothing in common and nothing to guess.
    (config.prefix_cache, config.speculate) = (false, 0);
    if let Some(milliseconds) = args.max_step_ms {
        config.max_step = std::time::Duration::from_millis(milliseconds);
    }
    let vocab_size = decoder.config().vocab_size;
    Ok(Load::new(engine::spawn(decoder, config)?, adapters, vocab_size))
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

/// Tokens a second of `batch` requests, from the moment at which all of them answer. With adapters, the base is
/// measured beside them, in turn.
fn decode(load: &Load, batch: usize, output_tokens: usize) -> anyhow::Result<Value> {
    let (mut rates, mut gaps, mut base_rates) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        if load.has_adapters() {
            let requests = (0..batch).map(|_| load.base_request(SHORT_PROMPT, output_tokens));
            base_rates.push(answer_all(requests.collect::<anyhow::Result<_>>()?, &mut Vec::new())?);
        }
        let requests = (0..batch).map(|index| load.request(index, SHORT_PROMPT, output_tokens));
        rates.push(answer_all(requests.collect::<anyhow::Result<_>>()?, &mut gaps)?);
    }
    let rate = median(rates);
    let mut report = json!({
        "requests": batch,
        "tokens_per_second": rate,
        "gap_ms": {"p50": quantile(&mut gaps, 0.5) * 1e3, "p99": quantile(&mut gaps, 0.99) * 1e3},
    });
    if load.has_adapters() {
        let base_rate = median(base_rates);
        report["base_tokens_per_second"] = json!(base_rate);
        report["adapter_cost_percent"] = json!(100.0 * (base_rate / rate - 1.0));
    }
    Ok(report)
}

/// Tokens a second from the moment at which all answer; notes the gaps between tokens.
fn answer_all(requests: Vec<load::Running>, gaps: &mut Vec<f64>) -> anyhow::Result<f64> {
    let answers = requests.into_iter().map(load::Running::wait);
    let answers = answers.collect::<anyhow::Result<Vec<_>>>()?;
    let all_begun = answers.iter().map(load::Answer::first).max().context("no requests")?;
    let end = answers.iter().map(load::Answer::last).max().context("no requests")?;
    let tokens = answers.iter().map(|answer| answer.tokens_after(all_begun)).sum::<usize>();
    gaps.extend(answers.iter().flat_map(|answer| answer.gaps(all_begun, end)));
    Ok(tokens as f64 / end.duration_since(all_begun).as_secs_f64())
}

/// Where the time goes: of the longest prompt, of one answer and of the most answers at once.
fn operations(load: &Load, args: &BenchArgs, limits: &Roofline) -> anyhow::Result<Vec<Value>> {
    let mut reports = Vec::new();
    if let Some(&length) = args.prompt_tokens.iter().max() {
        profile::start();
        load.request(0, length, 1)?.wait()?;
        let work = format!("a prompt of {length} tokens");
        reports.push(report(&work, &profile::stop(), limits, args.quantize));
    }
    let most = args.batch.iter().copied().max().unwrap_or(1);
    let batches = if most == 1 { vec![1] } else { vec![1, most] };
    for batch in batches {
        let begin = || {
            let request = |index| load.request(index, SHORT_PROMPT, args.output_tokens);
            (0..batch).map(request).collect::<anyhow::Result<Vec<_>>>()
        };
        let requests = begin()?;
        requests.iter().for_each(load::Running::wait_for_first);
        profile::start();
        answer_all(requests, &mut Vec::new())?;
        let mut totals = profile::stop();
        if totals.iter().all(|(_, total)| total.calls == 0) {
            // So small a model had answered by then: with its prompts.
            profile::start();
            answer_all(begin()?, &mut Vec::new())?;
            totals = profile::stop();
        }
        let work = if batch == 1 { "1 answer".into() } else { format!("{batch} answers at once") };
        reports.push(report(&work, &totals, limits, args.quantize));
    }
    Ok(reports)
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
    let machine = &report["machine"];
    println!(
        "{} kernels, {} threads; the machine reads {:.1} GB/s and does {:.0} GFLOP/s, {:.0} in bf16, \
         {:.0} Gop/s in 8 bits",
        machine["kernels"].as_str().unwrap_or_default(),
        machine["threads"],
        number(&machine["bytes_per_second"]) / 1e9,
        number(&machine["f32_per_second"]) / 1e9,
        number(&machine["bf16_per_second"]) / 1e9,
        number(&machine["int8_per_second"]) / 1e9,
    );
    for row in report["prefill"].as_array().into_iter().flatten() {
        let rate = number(&row["tokens_per_second"]);
        println!("prompt of {:>5} tokens    {rate:>9.1} tokens/s", row["prompt_tokens"]);
    }
    for row in report["decode"].as_array().into_iter().flatten() {
        let (rate, gap) = (number(&row["tokens_per_second"]), &row["gap_ms"]);
        let (p50, p99) = (number(&gap["p50"]), number(&gap["p99"]));
        let base = row["adapter_cost_percent"].as_f64().map_or(String::new(), |percent| {
            let base_rate = number(&row["base_tokens_per_second"]);
            format!("; the base alone {base_rate:.1}: adapters cost {percent:.1} %")
        });
        println!(
            "{:>3} answers at once       {rate:>9.1} tokens/s, gap {p50:.1} ms (p99 {p99:.1}){base}",
            row["requests"],
        );
    }
    if !report["arrival"].is_null() {
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
    for work in report["operations"].as_array().into_iter().flatten() {
        print!("{}", table(work));
    }
}
