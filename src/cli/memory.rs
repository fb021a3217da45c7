//! How much memory a run takes: from sizes alone before it starts, and as the system has measured it.

use std::{fs, io, path::Path};

use crate::data::Example;
use crate::model::{ModelConfig, Projection};
use crate::train::{BatchPlan, Method, TrainConfig, num_workers};

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
        let projections = config.targets.projections().unwrap_or_default();
        let (weights, trained) = match config.method {
            Method::Lora => (weight_bytes(dir)?, adapter_parameters(model, config, &projections)),
            Method::Full => (0, num_parameters(model)),
        };
        let workers = num_workers(num_parameters(model));
        // Results of passes that wait to be summed: one per worker.
        let copies = COPIES + if workers > 1 { 2 * workers } else { 0 };
        let tokens = tokens_at_once(config, examples, workers);
        let adapted = if config.method == Method::Lora { &projections[..] } else { &[] };
        Ok(Self {
            weights,
            adapter: (trained * F32 * copies) as u64,
            activations: (tokens * per_token(model, adapted, config.rank)) as u64,
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

/// Bytes that the passes hold of a token, in all layers, with adapters of rank `rank` on `adapted`.
fn per_token(model: &ModelConfig, adapted: &[Projection], rank: usize) -> usize {
    let kv = model.num_kv_heads * model.head_dim;
    let queries = model.num_heads * model.head_dim;
    // Two norms, q and k before and after their rotation, v, what comes out of attention, of the two
    // blocks and of the two residual sums; gate, up, their activation and product.
    let layer = 6 * model.hidden_size + 3 * queries + 3 * kv + 4 * model.intermediate_size;
    // An adapter's x A with its gradient, its update, and the projection's output without it.
    let outputs = adapted.iter().map(|projection| model.projection_shape(*projection).1);
    let adapters: usize = outputs.map(|outputs| 2 * (outputs + rank)).sum();
    (layer + adapters) * model.num_layers * F32
}

/// The most tokens in backward passes that run at once, over the steps of an epoch.
fn tokens_at_once(config: &TrainConfig, examples: &[Example], workers: usize) -> usize {
    if examples.is_empty() {
        return 0;
    }
    let plan = BatchPlan {
        num_examples: examples.len(),
        batch_size: config.batch_size,
        micro_batch_tokens: config.micro_batch_tokens,
        seed: config.seed,
        shuffle: config.shuffle,
    };
    let of_step = |step: usize| {
        let batches = plan.micro_batches(examples, step);
        let mut sizes: Vec<usize> = batches.iter().map(|batch| batch.tokens.len()).collect();
        sizes.sort_unstable_by(|one, other| other.cmp(one));
        let at_once = if sizes.len() < workers { 1 } else { workers };
        sizes.iter().take(at_once).sum::<usize>()
    };
    (0..plan.steps_per_epoch().min(MAX_STEPS)).map(of_step).max().unwrap_or(0)
}

fn adapter_parameters(
    model: &ModelConfig,
    config: &TrainConfig,
    projections: &[Projection],
) -> usize {
    let shapes = projections.iter().map(|projection| model.projection_shape(*projection));
    let per_layer: usize = shapes.map(|(inputs, outputs)| config.rank * (inputs + outputs)).sum();
    let tables = config.modules_to_save.len() * model.vocab_size + 2 * config.train_tokens.len();
    per_layer * model.num_layers + tables * model.hidden_size
}

fn num_parameters(model: &ModelConfig) -> usize {
    let shapes = Projection::ALL.iter().map(|projection| model.projection_shape(*projection));
    let layers = shapes.map(|(inputs, outputs)| inputs * outputs).sum::<usize>() * model.num_layers;
    let heads = if model.tie_word_embeddings { 1 } else { 2 };
    layers + heads * model.vocab_size * model.hidden_size
}

fn weight_bytes(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            sum += fs::metadata(&path)?.len();
        }
    }
    Ok(sum)
}
