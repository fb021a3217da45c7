//! What the engine costs beside the model: answers of a tiny random model (its weights are 0.3 MB and come from
//! the cache), so that plan, batch, sampling and events are most of it. The limit is the model's own time, which
//! `tunesmith bench --model tests/fixtures/tiny-llama` tells operation by operation.
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench may panic")]

use std::{path::Path, sync::Arc};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tunesmith::{
    engine::{
        EngineConfig, GenerationEvent, GenerationRequest, RequestOptions, SamplingParams, spawn,
    },
    model::{Decoder, WeightMode},
};

const OUTPUT_TOKENS: usize = 32;

fn engine(criterion: &mut Criterion) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama");
    let decoder = Arc::new(Decoder::load(&folder, WeightMode::Frozen).unwrap());
    let mut config = EngineConfig::for_model(decoder.config(), 64, 64 << 20);
    (config.prefix_cache, config.speculate) = (false, 0);
    let engine = spawn(decoder, config).unwrap();
    let request = |index: u32| GenerationRequest {
        prompt: (0..16).map(|i| (index * 37 + i * 11) % 380).collect(),
        adapter: None,
        sampling: SamplingParams::greedy(),
        max_tokens: OUTPUT_TOKENS,
        stop_token_ids: vec![],
        score_prompt: false,
        options: RequestOptions::default(),
    };
    let mut group = criterion.benchmark_group("engine");
    for batch in [1, 8, 64] {
        group.throughput(Throughput::Elements((batch as usize * OUTPUT_TOKENS) as u64));
        group.bench_function(format!("{batch} answers of 32 tokens"), |bencher| {
            bencher.iter(|| {
                let streams: Vec<_> =
                    (0..batch).map(|index| engine.generate(request(index)).unwrap()).collect();
                for mut stream in streams {
                    while let Some(event) = stream.blocking_next() {
                        assert!(!matches!(event, GenerationEvent::Failed { .. }));
                    }
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, engine);
criterion_main!(benches);
