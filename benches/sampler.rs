//! One choice from a vocabulary of 151,936 tokens (Qwen2.5), on one thread. The limit is reading the logits:
//! 0.6 MB, which the cache of a step holds; the greedy choice does little else, and everything above it is
//! exponentials and filters.
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench may panic")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tunesmith::engine::{Sampler, SamplingParams};

const VOCAB_SIZE: usize = 151_936;

fn sampler(criterion: &mut Criterion) {
    let noise = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7 & 0xFFFF) as f32 / 65_536.0;
    // Most tokens unlikely, a few likely, as a model's are.
    let logits: Vec<f32> =
        (0..VOCAB_SIZE).map(|i| 6.0 * noise(i) + 14.0 * noise(i * 7 + 1).powi(30)).collect();
    let greedy = SamplingParams::greedy;
    let warm = || SamplingParams { temperature: 0.8, ..greedy() };
    let mut group = criterion.benchmark_group("sampler");
    group.throughput(Throughput::Bytes((VOCAB_SIZE * size_of::<f32>()) as u64));
    for (name, params) in [
        ("greedy", greedy()),
        ("temperature", warm()),
        ("top_p", SamplingParams { top_p: 0.95, ..warm() }),
        ("top_k", SamplingParams { top_k: 40, ..warm() }),
        ("top_k top_p min_p", SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.05, ..warm() }),
        ("penalties", SamplingParams { presence_penalty: 0.5, ..warm() }),
    ] {
        let mut sampler = Sampler::new(params, &[1, 2, 3]);
        group.bench_function(name, |bencher| bencher.iter(|| sampler.sample(&logits).unwrap()));
    }
    group.finish();
}

criterion_group!(benches, sampler);
criterion_main!(benches);
