//! What share of the machine the kernels reach: the products of a 0.5 B model's shapes, for every
//! instruction set that this CPU has.
#![allow(missing_docs, reason = "criterion's macros write undocumented items")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use tunesmith::kernels::{
    AttentionForward, AttentionShape, KvPanels, LANES, LinearJob, QuerySpan, all,
};

/// Multiply-adds of `rows x 896 -> 4864` with bf16 weights: decoding (1 row), a batch, a prompt.
fn linear(criterion: &mut Criterion) {
    let (k, n) = (896, 4864);
    // Several matrices, so that they come from memory as a model's layers do.
    let weights: Vec<Vec<bf16>> =
        (0..8).map(|seed| (0..n * k).map(|i| bf16::from_f32(noise(i + seed))).collect()).collect();
    let mut group = criterion.benchmark_group("linear 896x4864 bf16");
    for rows in [1, 8, 64] {
        let x: Vec<f32> = (0..rows * k).map(noise).collect();
        let mut out = vec![0.0; rows * n];
        group.throughput(Throughput::Elements((rows * n * k) as u64));
        for table in all() {
            let mut turn = 0;
            group.bench_function(BenchmarkId::new(table.name, rows), |bencher| {
                bencher.iter(|| {
                    turn += 1;
                    let weight = &weights[turn % weights.len()];
                    LinearJob { x: &x, weight, bias: None, in_features: k, out_features: n }
                        .run(table, &mut out);
                });
            });
        }
    }
    group.finish();
}

/// One new token of a sequence with a thousand cached ones.
fn decode_attention(criterion: &mut Criterion) {
    let shape = AttentionShape { heads: 14, kv_heads: 2, head_dim: 64, scale: 0.125 };
    let context = 1024;
    let blocks: Vec<u32> = (0..).take(context / LANES).collect();
    let keys: Vec<f32> = (0..blocks.len() * shape.key_block_len()).map(noise).collect();
    let values: Vec<f32> = (0..blocks.len() * shape.value_block_len()).map(noise).collect();
    let queries: Vec<f32> = (0..shape.heads * shape.head_dim).map(noise).collect();
    let mut out = vec![0.0; queries.len()];
    let mut group = criterion.benchmark_group("attention, 1 row on 1024");
    for table in all() {
        group.bench_function(table.name, |bencher| {
            bencher.iter(|| {
                let spans =
                    [QuerySpan { rows: 0..1, first_position: context - 1, block_table: &blocks }];
                let panels = KvPanels { keys: &keys, values: &values };
                AttentionForward { shape, panels, queries: &queries, spans: &spans }
                    .run(table, &mut out);
            });
        });
    }
    group.finish();
}

#[allow(clippy::cast_precision_loss, reason = "a few bits of noise")]
fn noise(seed: usize) -> f32 {
    (seed.wrapping_mul(2_654_435_761) >> 7 & 0xFFFF) as f32 / 65_536.0 - 0.5
}

criterion_group!(benches, linear, decode_attention);
criterion_main!(benches);
