//! What several adapters add to a batch: rows on as many adapters (r = 16) over a projection of Qwen2.5-0.5B. The
//! limit is reading each A and B once: the bytes that are stated.
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench may panic")]

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tunesmith::ops::{
    lora::{LoraPart, add_in_place},
    lora_dtype::LoraDtype,
};

const RANK: usize = 16;

fn adapters(criterion: &mut Criterion) {
    let tensor = |rows, columns| {
        let values = (0..rows * columns).map(|i| (i % 89) as f32 / 89.0 - 0.5).collect::<Vec<_>>();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    };
    let mut group = criterion.benchmark_group("adapters");
    for (inputs, outputs) in [(896, 4864), (4864, 896), (896, 896)] {
        let part = || {
            LoraPart::new(&tensor(RANK, inputs), &tensor(outputs, RANK), 2.0, LoraDtype::Auto)
                .unwrap()
        };
        for (rows, count) in [(8, 1), (8, 8), (64, 64)] {
            let parts: Vec<LoraPart> = (0..count).map(|_| part()).collect();
            let x = tensor(rows, inputs);
            let output = Tensor::zeros((rows, outputs), DType::F32, &Device::Cpu).unwrap();
            let each = rows / count;
            let segments = || {
                let rows = |index| index * each..(index + 1) * each;
                parts.iter().enumerate().map(|(i, part)| (rows(i), part.clone())).collect()
            };
            let bytes = count * RANK * (inputs + outputs) * size_of::<f32>();
            group.throughput(Throughput::Bytes(bytes as u64));
            let name = format!("{inputs}x{outputs}: {rows} rows on {count}");
            group.bench_function(name, |bencher| {
                bencher.iter(|| add_in_place(&output, &x, segments()).unwrap());
            });
        }
    }
    group.finish();
}

criterion_group!(benches, adapters);
criterion_main!(benches);
