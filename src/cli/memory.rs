//! How much memory a run takes: from sizes alone before it starts, and as the system has measured it.

use std::{fs, io, path::Path};

use crate::adapters::{AdapterSize, LoraAdapter};
use crate::data::Example;
use crate::model::{ModelConfig, Projection, Quantization, Recompute};
use crate::train::{BatchPlan, Method, TrainConfig, TrainError, num_workers};

const F32: usize = 4;
/// Steps of the first epoch whose micro-batches are looked at.
const MAX_STEPS: usize = 2000;
/// Program, tokenizer and threads.
const PROGRAM: u64 = 24 << 20;

/// Bytes of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    /// The base, as it is held.
    pub(super) weights: u64,
    /// What is trained with its gradients and the optimizer's two moments, f32.
    pub(super) adapter: u64,
    /// What the backward passes that run at once need.
    pub(super) activations: u64,
}

impl Memory {
    /// From the weight files of `dir`, the settings and the examples; nothing is loaded.
    pub(super) fn estimate(
        dir: &Path,
        model: &ModelConfig,
        config: &TrainConfig,
        examples: &[Example],
    ) -> io::Result<Self> {
        /// Values, gradient of a pass, their sum, first and second moment.
        const COPIES: usize = 5;
        let (weights, adapter) = match config.method {
            Method::Lora => {
                let adapter = adapter_size(model, config).map_err(io::Error::other)?;
                (weight_bytes(dir, model, config.quantize)?, adapter)
            }
            Method::Full => {
                let num_parameters = num_parameters(model);
                (0, AdapterSize { num_parameters, ranks: 0, apart: 0 })
            }
        };
        let workers = num_workers(num_parameters(model));
        // Results of passes that wait to be summed: one per worker.
        let copies = COPIES + if workers > 1 { 2 * workers } else { 0 };
        let (tokens, passes) = tokens_at_once(config, examples, workers);
        let (kept, whole) = layer_floats(model, adapter);
        let floats = match Recompute::from(config.recompute) {
            // The layer that is gone back through is whole, and has gradients: three halves of it, measured.
            Recompute::None => kept * model.num_layers + whole * 3 / 2,
            Recompute::Block => model.hidden_size * model.num_layers + 2 * whole,
        };
        Ok(Self {
            weights,
            adapter: (adapter.num_parameters * F32 * copies) as u64,
            activations: ((tokens * floats + passes * logits(model, tokens / passes)) * F32) as u64,
        })
    }

    pub(super) fn total(&self) -> u64 {
        PROGRAM + self.weights + self.adapter + self.activations
    }
}

/// The most memory that this process has had so far, where the system says it.
pub(super) fn peak() -> Option<u64> {
    const KIB: u64 = 1024;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * KIB)
}

/// A number of bytes for people.
pub(super) fn bytes(number: u64) -> String {
    const MIB: f64 = (1 << 20) as f64;
    let mib = number as f64 / MIB;
    if mib < 1024.0 { format!("{mib:.1} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

/// Memory that can still be had here, where the system says it: what is free in the machine, or in the
/// control group if that is less.
pub(super) fn free() -> Option<u64> {
    const KIB: u64 = 1024;
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let machine = line.split_whitespace().nth(1)?.parse::<u64>().ok()? * KIB;
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse().ok()
    };
    let group = number("memory.max").zip(number("memory.current"));
    Some(group.map_or(machine, |(limit, used)| machine.min(limit.saturating_sub(used))))
}

/// Numbers that the graph of a layer holds of a token, in the mean of all layers: until its turn comes, and then.
fn layer_floats(model: &ModelConfig, adapter: AdapterSize) -> (usize, usize) {
    let (hidden, intermediate) = (model.hidden_size, model.intermediate_size);
    let (queries, kv) = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim);
    // Input and the sum behind attention; q and k as rotated, v, what comes out of attention; gate and up.
    let mut kept = 2 * hidden + 2 * queries + 2 * kv + 2 * intermediate;
    // What goes into norms besides.
    if model.qk_norm {
        kept += queries + kv;
    }
    if model.output_norms {
        kept += 2 * hidden;
    }
    // Plain LoRA is one operation with its projection and keeps x A; others are several, each with an output.
    kept += (adapter.ranks + 4 * adapter.apart).div_ceil(model.num_layers);
    // The normed inputs, what the two blocks make, and the output; q and k before; the product of gate and up.
    (kept, kept + 5 * hidden + queries + kv + intermediate)
}

/// Numbers of the logits that a pass over `tokens` holds at a time.
fn logits(model: &ModelConfig, tokens: usize) -> usize {
    const CHUNK: usize = 1 << 20;
    const ROWS: usize = 96;
    (CHUNK / model.vocab_size.max(1)).max(ROWS).min(tokens) * model.vocab_size
}

/// The most tokens in backward passes that run at once, over the steps of an epoch, and their number.
fn tokens_at_once(config: &TrainConfig, examples: &[Example], workers: usize) -> (usize, usize) {
    if examples.is_empty() {
        return (0, 1);
    }
    let plan = BatchPlan::new(config, examples);
    let of_step = |step: usize| {
        let batches = plan.micro_batches(examples, step);
        let mut sizes: Vec<usize> = batches.iter().map(|batch| batch.tokens.len()).collect();
        sizes.sort_unstable_by(|one, other| other.cmp(one));
        let at_once = if sizes.len() < workers { 1 } else { workers };
        (sizes.iter().take(at_once).sum::<usize>(), at_once)
    };
    (0..plan.steps_per_epoch().min(MAX_STEPS)).map(of_step).max().unwrap_or((0, 1))
}

/// Of the adapter that is made, or that is gone on from.
fn adapter_size(model: &ModelConfig, config: &TrainConfig) -> Result<AdapterSize, TrainError> {
    Ok(match &config.init_adapter {
        Some(dir) => LoraAdapter::read(dir, model, false)?.size(model),
        None => config.lora()?.size(model)?,
    })
}

fn num_parameters(model: &ModelConfig) -> usize {
    projection_parameters(model) + table_parameters(model)
}

fn projection_parameters(model: &ModelConfig) -> usize {
    let shapes = Projection::ALL.iter().map(|projection| model.projection_shape(*projection));
    shapes.map(|(inputs, outputs)| inputs * outputs).sum::<usize>() * model.num_layers
}

/// Of embedding and head.
fn table_parameters(model: &ModelConfig) -> usize {
    let tables = if model.tie_word_embeddings { 1 } else { 2 };
    tables * model.vocab_size * model.hidden_size
}

/// Bytes of the base as it is held: as in its files, or rounded, with a scale for each group of weights.
fn weight_bytes(dir: &Path, model: &ModelConfig, quantize: Quantization) -> io::Result<u64> {
    const SCALE: usize = 2;
    let int8 = |weights: usize| weights + weights / 64 * SCALE;
    let int4 = |weights: usize| weights / 2 + weights / 32 * SCALE;
    match quantize {
        Quantization::None => file_bytes(dir),
        Quantization::Bf16 => Ok(2 * num_parameters(model) as u64),
        Quantization::Int8 => Ok(int8(num_parameters(model)) as u64),
        Quantization::Int4 => {
            Ok((int4(projection_parameters(model)) + int8(table_parameters(model))) as u64)
        }
    }
}

fn file_bytes(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            sum += fs::metadata(&path)?.len();
        }
    }
    Ok(sum)
}
