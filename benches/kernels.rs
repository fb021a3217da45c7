//! What share of the machine the kernels reach: products of a 0.5 B and a 135 M model's shapes, beside
//! what this machine reads from memory and multiplies at best, measured in the same run.
//!
//! `cargo bench --bench kernels -- FILTER`, where the filter is part of a line's name (`896x4864`,
//! `Bf16`). Each number is the best of several short windows: on a shared machine the best
//! window is the one that measures the program, the others measure the neighbours.
#![allow(clippy::cast_precision_loss, clippy::print_stdout, reason = "rounded numbers on a page")]

use std::time::{Duration, Instant};

use tunesmith::kernels::{PackedWeight, Roofline, WeightForm, best};

/// Weights are cycled through so much memory, so that they do not come from a cache.
const CYCLED_BYTES: usize = 256 << 20;
const WINDOW: Duration = Duration::from_millis(150);
/// Input and output features: Qwen2.5-0.5B's projections and head, then SmolLM2-135M's.
const SHAPES: [(usize, usize); 7] =
    [(896, 4864), (4864, 896), (896, 896), (896, 151_936), (576, 1536), (1536, 576), (576, 49_152)];
const FORMS: [WeightForm; 5] =
    [WeightForm::F32, WeightForm::Bf16, WeightForm::Bf16Dot, WeightForm::Int8, WeightForm::Int4];
const ROWS: [usize; 6] = [1, 4, 8, 16, 64, 512];

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).unwrap_or_default();
    let limits = Roofline::measure();
    println!(
        "{} kernels, {} threads; reads {:.1} GB/s, multiplies and adds {:.0} GFLOP/s, {:.0} in bf16, \
         {:.0} Gop/s in 8 bits",
        best().name,
        rayon::current_num_threads(),
        limits.bytes_per_second / 1e9,
        limits.f32_per_second / 1e9,
        limits.bf16_per_second / 1e9,
        limits.int8_per_second / 1e9,
    );
    for (inputs, outputs) in SHAPES {
        for form in FORMS {
            let name = format!("{inputs}x{outputs} {form:?}");
            if name.contains(&filter) {
                linear(&name, form, (inputs, outputs), &limits);
            }
        }
    }
}

fn linear(name: &str, form: WeightForm, (inputs, outputs): (usize, usize), limits: &Roofline) {
    let peak = match form {
        WeightForm::F32 | WeightForm::F16 | WeightForm::Bf16 => limits.f32_per_second,
        WeightForm::Bf16Dot => limits.bf16_per_second,
        WeightForm::Int8 | WeightForm::Int4 => limits.int8_per_second,
    };
    let values: Vec<f32> = (0..inputs * outputs).map(noise).collect();
    let first = PackedWeight::from_f32(form, &values, inputs);
    let bytes = first.num_bytes();
    let mut weights = vec![first];
    while weights.len() < (CYCLED_BYTES / bytes).clamp(1, 64) {
        weights.push(PackedWeight::from_f32(form, &values, inputs));
    }
    for rows in ROWS {
        let x: Vec<f32> = (0..rows * inputs).map(noise).collect();
        let mut out = vec![0.0; rows * outputs];
        let mut turn = 0;
        let seconds = best_seconds(|| {
            turn += 1;
            weights[turn % weights.len()].linear(best(), &x, None, &mut out);
        });
        let (read, operations) =
            (bytes as f64 / seconds, 2.0 * (rows * values.len()) as f64 / seconds);
        println!(
            "{name:22} {rows:4} rows {:9.0} us {:6.1} GB/s ({:3.0} %) {:6.0} GFLOP/s ({:3.0} %)",
            seconds * 1e6,
            read / 1e9,
            100.0 * read / limits.bytes_per_second,
            operations / 1e9,
            100.0 * operations / peak,
        );
    }
}

fn best_seconds(mut run: impl FnMut()) -> f64 {
    run();
    let mut best = f64::INFINITY;
    let start = Instant::now();
    while start.elapsed() < WINDOW {
        let once = Instant::now();
        run();
        best = best.min(once.elapsed().as_secs_f64());
    }
    best
}

fn noise(seed: usize) -> f32 {
    (seed.wrapping_mul(2_654_435_761) >> 7 & 0xFFFF) as f32 / 65_536.0 - 0.5
}
