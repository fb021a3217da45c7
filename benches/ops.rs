//! Operations of a decoder beside the products (which `benches/kernels.rs` measures against the machine's
//! limits), on rows of Qwen2.5-0.5B. All of them are a matter of memory: each states the bytes that it reads
//! and writes, and at worst these come from memory.
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench may panic")]

use candle_core::{Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tunesmith::ops::{add::add, gated_mlp::silu_mul, rms_norm::rms_norm, rope};

const HIDDEN: usize = 896;
const INTERMEDIATE: usize = 4864;

fn tensor(rows: usize, columns: usize) -> Tensor {
    let values = (0..rows * columns).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect::<Vec<_>>();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

fn ops(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ops");
    for rows in [1, 8, 512] {
        let bytes = |values: usize| Throughput::Bytes((rows * values * size_of::<f32>()) as u64);
        let x = tensor(rows, HIDDEN);
        let weight = tensor(1, HIDDEN).flatten_all().unwrap();
        group.throughput(bytes(2 * HIDDEN));
        group.bench_function(format!("rms_norm {rows}"), |bencher| {
            bencher.iter(|| rms_norm(&x, &weight, 1e-6).unwrap());
        });
        group.throughput(bytes(3 * HIDDEN));
        group.bench_function(format!("add {rows}"), |bencher| {
            bencher.iter(|| add(&x, &x).unwrap());
        });
        let positions: Vec<u32> = (0..rows as u32).collect();
        let inverse: Vec<f32> = (0..32).map(|i| 1e6_f32.powf(-(i as f32) / 32.0)).collect();
        let angles = rope::Angles::new(&positions, &inverse);
        group.throughput(bytes(2 * HIDDEN));
        group.bench_function(format!("rope {rows}"), |bencher| {
            bencher.iter(|| rope::rope(&x, &angles).unwrap());
        });
        let (gate, up) = (tensor(rows, INTERMEDIATE), tensor(rows, INTERMEDIATE));
        group.throughput(bytes(3 * INTERMEDIATE));
        group.bench_function(format!("silu_mul {rows}"), |bencher| {
            bencher.iter(|| silu_mul(&gate, &up).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, ops);
criterion_main!(benches);
