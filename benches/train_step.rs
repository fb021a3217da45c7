//! What training steps of a LoRA adapter cost: tokens a second, memory, page faults, and the share of what
//! this machine multiplies and adds at best.
//!
//! `cargo bench --bench train_step -- [MODEL_DIR] [--sequence 512] [--rows 1] [--steps 4] [--rank 16]
//! [--recompute none|block] [--quantize none|int8|int4] [--packing none|bfd] [--threads N]`
//!
//! Rows are random tokens, all of them trained, each step one micro-batch. The first step meets memory for
//! the first time; speed is that of the median of the others. Memory is the peak of the whole process, so
//! each case takes a run of its own. `peers/train_step.py` does the same with PEFT.
#![allow(clippy::cast_precision_loss, clippy::print_stdout, reason = "rounded numbers on a page")]
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench may panic")]

use std::{collections::BTreeMap, fs, path::Path, sync::atomic::AtomicBool};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith::{
    data::Example,
    kernels::{Roofline, claim_threads},
    model::{ModelConfig, Projection},
    train::{TrainConfig, TrainEvent, TrainJob, rehearse},
};

fn main() {
    claim_threads();
    let (model, flags) = arguments();
    let number = |name: &str, default: usize| -> usize {
        flags.get(name).map_or(default, |value| value.parse().unwrap())
    };
    let (sequence, rows) = (number("sequence", 512), number("rows", 1));
    let (steps, rank) = (number("steps", 4), number("rank", 16));
    if let Some(threads) = flags.get("threads") {
        let threads = threads.parse().unwrap();
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().unwrap();
    }
    let config = ModelConfig::from_dir(model.as_ref()).unwrap();
    let job = job(&model, &config, &flags, (sequence, rows, steps, rank));
    let mut seconds = Vec::new();
    let mut faults = Vec::new();
    let mut observer = |event: &TrainEvent| {
        if let TrainEvent::Step { seconds: of_step, .. } = event {
            seconds.push(*of_step);
            faults.push(page_faults());
        }
    };
    rehearse(&job, steps, &mut observer, &AtomicBool::new(false)).unwrap();
    let peak = status("VmHWM:");
    let tokens = (sequence * rows) as f64;
    let mut warm = seconds[1..].to_vec();
    warm.sort_by(f64::total_cmp);
    let per_second = tokens / warm[warm.len() / 2];
    let operations = operations_per_token(&config, sequence, rank, job.config.recompute.into());
    let best = Roofline::measure().f32_per_second;
    let name = Path::new(&model).file_name().unwrap().to_string_lossy();
    println!(
        "{name}, {rows} x {sequence} tokens, recompute {}, quantize {}: {per_second:.1} tokens/s warm, \
         {:.1} in the first step; peak {:.2} GB; {:.0} page faults a step; {:.0} GFLOP/s, {:.0} % of {:.0}",
        flags.get("recompute").map_or("none", String::as_str),
        flags.get("quantize").map_or("none", String::as_str),
        tokens / seconds[0],
        peak as f64 * 1024.0 / 1e9,
        (faults[faults.len() - 1] - faults[0]) as f64 / (faults.len() - 1) as f64,
        per_second * operations / 1e9,
        100.0 * per_second * operations / best,
        best / 1e9
    );
}

/// The model folder and the flags with their values.
fn arguments() -> (String, BTreeMap<String, String>) {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-kitchen");
    let mut model = bundled.display().to_string();
    let mut flags = BTreeMap::new();
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        match argument.strip_prefix("--") {
            Some(name) => {
                flags.insert(name.to_owned(), arguments.next().expect("a value"));
            }
            None => model = argument,
        }
    }
    (model, flags)
}

fn job(
    model: &str,
    config: &ModelConfig,
    flags: &BTreeMap<String, String>,
    (sequence, rows, steps, rank): (usize, usize, usize, usize),
) -> TrainJob {
    let mut settings = serde_json::json!({
        "model": model, "data": "random", "output": "none", "rank": rank, "batch_size": rows,
        "micro_batch_tokens": rows * sequence, "max_length": sequence, "max_steps": steps,
        "recompute": "none",
    });
    for key in ["recompute", "quantize", "packing"] {
        if let Some(value) = flags.get(key) {
            settings[key] = value.as_str().into();
        }
    }
    let settings: TrainConfig = serde_json::from_value(settings).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let vocab = u32::try_from(config.vocab_size).unwrap();
    let example = |index: usize, rng: &mut ChaCha8Rng| Example {
        line: index + 1,
        tokens: (0..sequence).map(|_| rng.random_range(0..vocab)).collect(),
        loss_mask: (0..sequence).map(|at| at > 0).collect(),
        num_truncated: 0,
        rejected: None,
    };
    let train = (0..rows * steps).map(|index| example(index, &mut rng)).collect();
    let model_dir = model.into();
    TrainJob {
        config: settings,
        model_dir,
        train,
        valid: Vec::new(),
        sources: Vec::new(),
        companions: Vec::new(),
    }
}

/// Additions and multiplications of a token: every projection forward and to its input's gradient, with
/// recompute once more; the adapter's products thrice; attention over half of the sequence, forward and two
/// and a half times that back; the head forward and back.
fn operations_per_token(
    config: &ModelConfig,
    sequence: usize,
    rank: usize,
    recompute: tunesmith::model::Recompute,
) -> f64 {
    let again = f64::from(u8::from(recompute == tunesmith::model::Recompute::Block));
    let shapes = Projection::ALL.map(|projection| config.projection_shape(projection));
    let weights: usize = shapes.iter().map(|(inputs, outputs)| inputs * outputs).sum();
    let adapter: usize = shapes.iter().map(|(inputs, outputs)| rank * (inputs + outputs)).sum();
    let attention = (config.num_heads * config.head_dim * sequence) as f64;
    let layer = 2.0 * (2.0 + again) * weights as f64
        + 2.0 * (3.0 + again) * adapter as f64
        + 2.0 * (3.5 + again) * attention;
    layer * config.num_layers as f64 + 4.0 * (config.vocab_size * config.hidden_size) as f64
}

/// KiB, from what the system says of this process.
fn status(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or_default()
}

/// Pages that this process has been given so far.
fn page_faults() -> u64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = text.rsplit(')').next().unwrap_or_default();
    after_name.split_whitespace().nth(7).and_then(|count| count.parse().ok()).unwrap_or_default()
}
