//! What share of the machine the kernels reach: products of a 0.5 B and a 135 M model's shapes, beside
//! what this machine reads from memory and multiplies at best, measured in the same run.
//!
//! `cargo bench --bench kernels -- FILTER`, where the filter is part of a line's name (`896x4864`,
//! `Bf16`, `attention`). Each number is the best of several short windows: on a shared machine the best
//! window is the one that measures the program, the others measure the neighbours.
#![allow(clippy::cast_precision_loss, clippy::print_stdout, reason = "rounded numbers on a page")]

use std::{hint::black_box, time::Duration, time::Instant};

use rayon::prelude::*;
use tunesmith::kernels::{
    AttentionForward, AttentionShape, KvForm, KvPanel, KvPanels, KvSide, LANES, PackedWeight,
    QuerySpan, WeightForm, best,
};

/// Weights are cycled through so much memory, so that they do not come from a cache.
const CYCLED_BYTES: usize = 256 << 20;
const WINDOW: Duration = Duration::from_millis(150);
/// Input and output features: Qwen2.5-0.5B's projections and head, then SmolLM2-135M's.
const SHAPES: [(usize, usize); 7] =
    [(896, 4864), (4864, 896), (896, 896), (896, 151_936), (576, 1536), (1536, 576), (576, 49_152)];
const ROWS: [usize; 6] = [1, 4, 8, 16, 64, 512];

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).unwrap_or_default();
    let bytes_per_second = read_bandwidth();
    let flops = multiply_add_peak();
    println!(
        "{} kernels, {} threads; reads {:.1} GB/s, multiplies and adds {:.0} GFLOP/s",
        best().name,
        rayon::current_num_threads(),
        bytes_per_second / 1e9,
        flops / 1e9,
    );
    for (inputs, outputs) in SHAPES {
        for form in [WeightForm::F32, WeightForm::Bf16, WeightForm::Int8, WeightForm::Int4] {
            let name = format!("{inputs}x{outputs} {form:?}");
            if name.contains(&filter) {
                linear(&name, form, (inputs, outputs), bytes_per_second, flops);
            }
        }
    }
    if "attention".contains(&filter) {
        decode_attention();
    }
}

fn linear(
    name: &str,
    form: WeightForm,
    (inputs, outputs): (usize, usize),
    bytes_per_second: f64,
    flops: f64,
) {
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
            100.0 * read / bytes_per_second,
            operations / 1e9,
            100.0 * operations / flops,
        );
    }
}

/// One new token of a sequence with a thousand cached ones.
fn decode_attention() {
    let shape = AttentionShape {
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        scale: 0.125,
        window: None,
        soft_cap: None,
    };
    let context = 1024;
    let blocks: Vec<u32> = (0..).take(context / LANES).collect();
    let panel = |side| -> Vec<f32> {
        (0..blocks.len() * KvForm::F32.block_len(&shape, side)).map(noise).collect()
    };
    let (keys, values) = (panel(KvSide::Keys), panel(KvSide::Values));
    let queries: Vec<f32> = (0..shape.heads * shape.head_dim).map(noise).collect();
    let mut out = vec![0.0; queries.len()];
    let seconds = best_seconds(|| {
        let spans = [QuerySpan { rows: 0..1, first_position: context - 1, block_table: &blocks }];
        let panels = KvPanels { keys: KvPanel::F32(&keys), values: KvPanel::F32(&values) };
        AttentionForward { shape, panels, queries: &queries, spans: &spans }.run(best(), &mut out);
    });
    println!("attention, 1 row on 1024: {:.1} us", seconds * 1e6);
}

/// Bytes a second that all threads read from memory.
fn read_bandwidth() -> f64 {
    let data = vec![1_u64; 1 << 26];
    let seconds = best_seconds(|| {
        let sums = data.par_chunks(1 << 20).with_max_len(1);
        black_box(sums.map(|chunk| chunk.iter().fold(0_u64, |a, b| a.wrapping_add(*b))).max());
    });
    (data.len() * size_of::<u64>()) as f64 / seconds
}

/// Floating point operations a second that all threads do in registers, where the CPU has AVX-512 or
/// AVX2; else those of a plain loop.
fn multiply_add_peak() -> f64 {
    const TURNS: usize = 20_000;
    let threads = rayon::current_num_threads();
    let mut each = 0;
    let seconds = best_seconds(|| {
        let run = |_| register_loop(black_box(TURNS));
        each = (0..threads).into_par_iter().with_max_len(1).map(run).max().unwrap_or(0);
    });
    (threads * each) as f64 / seconds
}

/// Returns how many operations it did.
#[allow(unsafe_code, reason = "functions with target features")]
fn register_loop(turns: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has the feature.
            return unsafe { avx512_loop(turns) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has the features.
            return unsafe { avx2_loop(turns) };
        }
    }
    let mut sums = [0.5_f32; 32];
    for _ in 0..turns {
        sums.iter_mut().for_each(|sum| *sum = *sum * 0.999 + 0.001);
    }
    black_box(sums);
    turns * 32 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512_loop(turns: usize) -> usize {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};
    let (factor, term) = (_mm512_set1_ps(0.999), _mm512_set1_ps(0.001));
    let mut sums = [term; 20];
    for _ in 0..turns {
        sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(*sum, factor, term));
    }
    black_box(sums);
    turns * 20 * 16 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2_loop(turns: usize) -> usize {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps};
    let (factor, term) = (_mm256_set1_ps(0.999), _mm256_set1_ps(0.001));
    let mut sums = [term; 12];
    for _ in 0..turns {
        sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(*sum, factor, term));
    }
    black_box(sums);
    turns * 12 * 8 * 2
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
