//! The decoder against transformers, adapters against peft: logits of tiny random models, in every
//! way in which the decoder is run. tests/fixtures/make_oracle.py wrote what is expected.

use std::{collections::HashMap, fs, ops::Range, path::Path, sync::Arc};

use crate::support::{MODELS, Scratch, fixture, oracle};
use candle_core::{Device, Tensor};
use tunesmith::{
    adapters::{LoraAdapter, merged_weights, write_weights},
    model::{Decoder, Delta, DeltaRows, KvCache, Step, StepSequence, WeightMode},
};

/// Largest difference from the oracle, as a share of the largest logit.
const TOLERANCE: f32 = 1e-4;
const BLOCK_SIZE: usize = 16;
/// Blocks of three sequences, scattered and interleaved; each covers 48 positions.
const BLOCK_TABLES: [[u32; 3]; 3] = [[7, 2, 5], [0, 8, 3], [4, 1, 6]];
const NUM_BLOCKS: usize = 9;

/// A prompt with the logits of all its tokens, as plain base or with one of the adapters.
struct Expected {
    tokens: Vec<u32>,
    adapter: Option<Arc<dyn Delta>>,
    /// `[tokens, vocab]`
    logits: Vec<Vec<f32>>,
}

struct Oracle {
    name: &'static str,
    tensors: HashMap<String, Tensor>,
}

impl Oracle {
    fn new(name: &'static str) -> Self {
        let path = oracle(&format!("{name}-logits.safetensors"));
        Self { name, tensors: candle_core::safetensors::load(path, &Device::Cpu).unwrap() }
    }

    fn decoder(&self) -> Decoder {
        Decoder::load(&fixture(self.name), WeightMode::Frozen).unwrap()
    }

    fn adapter(&self, kind: &str, decoder: &Decoder, trainable: bool) -> LoraAdapter {
        let dir = oracle(&format!("{}-{kind}-adapter", self.name));
        LoraAdapter::read(&dir, decoder.config(), trainable).unwrap()
    }

    /// Prompts of 40, 1, 9 and 24 tokens for the base, the first and third also for adapters.
    fn expected(&self, prompt: usize, kind: &str, decoder: &Decoder) -> Expected {
        let tokens = self.tensors[&format!("tokens.{prompt}")].to_vec1::<i64>().unwrap();
        let adapter: Option<Arc<dyn Delta>> = match kind {
            "base" => None,
            _ => Some(Arc::new(self.adapter(kind, decoder, false))),
        };
        Expected {
            tokens: tokens.into_iter().map(|token| u32::try_from(token).unwrap()).collect(),
            adapter,
            logits: self.tensors[&format!("{kind}.{prompt}")].to_vec2().unwrap(),
        }
    }

    fn all(&self, decoder: &Decoder) -> Vec<Expected> {
        let base = (0..4).map(|prompt| (prompt, "base"));
        let adapted = ["plain", "pattern"].into_iter().flat_map(|kind| [(0, kind), (2, kind)]);
        base.chain(adapted).map(|(prompt, kind)| self.expected(prompt, kind, decoder)).collect()
    }
}

/// Runs one step over the given range of each sequence's tokens and returns the logits of all rows,
/// one list per sequence. `cache` comes with the block table of each sequence.
fn run(
    decoder: &Decoder,
    sequences: &[(&Expected, Range<usize>)],
    cache: Option<(&KvCache, &[[u32; 3]])>,
) -> Vec<Vec<Vec<f32>>> {
    let mut tokens = Vec::new();
    let mut parts = Vec::new();
    let mut deltas = Vec::new();
    for (index, (expected, range)) in sequences.iter().enumerate() {
        let rows = tokens.len()..tokens.len() + range.len();
        tokens.extend_from_slice(&expected.tokens[range.clone()]);
        if let Some(delta) = &expected.adapter {
            deltas.push(DeltaRows { rows, delta: Arc::clone(delta) });
        }
        let block_table = match cache {
            Some((_, tables)) => &tables[index][..range.end.div_ceil(BLOCK_SIZE)],
            None => &[],
        };
        parts.push(StepSequence {
            num_tokens: range.len(),
            num_cached_tokens: range.start,
            block_table,
        });
    }
    let logit_rows: Vec<u32> = (0..tokens.len() as u32).collect();
    let step = Step {
        tokens: &tokens,
        sequences: &parts,
        cache: cache.map(|(cache, _)| cache),
        deltas: &deltas,
        logit_rows: &logit_rows,
        dropout: None,
    };
    let mut logits = decoder.forward(&step).unwrap().to_vec2::<f32>().unwrap().into_iter();
    sequences.iter().map(|(_, range)| logits.by_ref().take(range.len()).collect()).collect()
}

#[track_caller]
fn assert_equal(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest =
        expected.iter().flatten().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
            let difference = (found - expected).abs();
            assert!(
                difference <= TOLERANCE * largest,
                "{what}, row {row}, token {token}: {found} instead of {expected}"
            );
        }
    }
}

#[test]
fn whole_prompts_without_a_cache_give_the_logits_of_transformers() {
    for name in MODELS {
        let oracle = Oracle::new(name);
        let decoder = oracle.decoder();
        for (index, expected) in oracle.all(&decoder).iter().enumerate() {
            let found = run(&decoder, &[(expected, 0..expected.tokens.len())], None);
            assert_equal(&found[0], &expected.logits, &format!("{name}, case {index}"));
        }
    }
}

#[test]
fn token_by_token_through_the_cache_gives_the_logits_of_transformers() {
    for name in MODELS {
        let oracle = Oracle::new(name);
        let decoder = oracle.decoder();
        for (index, expected) in oracle.all(&decoder).iter().enumerate() {
            let cache = KvCache::new(decoder.config(), NUM_BLOCKS, BLOCK_SIZE).unwrap();
            let mut found = Vec::new();
            for at in 0..expected.tokens.len() {
                let table = Some((&cache, &BLOCK_TABLES[index % 3..]));
                found.append(&mut run(&decoder, &[(expected, at..at + 1)], table)[0]);
            }
            assert_equal(&found, &expected.logits, &format!("{name}, case {index}"));
        }
    }
}

#[test]
fn a_ragged_batch_of_base_and_two_adapters_gives_each_its_own_logits() {
    for name in MODELS {
        let oracle = Oracle::new(name);
        let decoder = oracle.decoder();
        let all = oracle.all(&decoder);
        let batch: Vec<_> =
            all.iter().map(|expected| (expected, 0..expected.tokens.len())).collect();
        let found = run(&decoder, &batch, None);
        for (index, (expected, found)) in all.iter().zip(found).enumerate() {
            assert_equal(&found, &expected.logits, &format!("{name}, case {index}"));
        }
    }
}

#[test]
fn uneven_chunks_of_a_batch_through_the_cache_give_each_its_own_logits() {
    for name in MODELS {
        let oracle = Oracle::new(name);
        let decoder = oracle.decoder();
        let all = [
            oracle.expected(0, "pattern", &decoder),
            oracle.expected(3, "base", &decoder),
            oracle.expected(0, "plain", &decoder),
        ];
        let chunks = [7, 1, 18]; // tokens per step of each sequence
        let cache = KvCache::new(decoder.config(), NUM_BLOCKS, BLOCK_SIZE).unwrap();
        let mut found = [Vec::new(), Vec::new(), Vec::new()];
        loop {
            let mut step = Vec::new();
            let mut tables = Vec::new();
            let mut members = Vec::new();
            for (index, expected) in all.iter().enumerate() {
                let done = found[index].len();
                let end = (done + chunks[index]).min(expected.tokens.len());
                if done < end {
                    step.push((expected, done..end));
                    tables.push(BLOCK_TABLES[index]);
                    members.push(index);
                }
            }
            if step.is_empty() {
                break;
            }
            for (index, mut logits) in
                members.into_iter().zip(run(&decoder, &step, Some((&cache, &tables))))
            {
                found[index].append(&mut logits);
            }
        }
        for (index, (expected, found)) in all.iter().zip(found).enumerate() {
            assert_equal(&found, &expected.logits, &format!("{name}, sequence {index}"));
        }
    }
}

#[test]
fn the_bodies_with_gradients_give_the_same_logits() {
    for name in MODELS {
        let oracle = Oracle::new(name);
        let decoder = Decoder::load(&fixture(name), WeightMode::Trainable).unwrap();
        for (prompt, kind) in [(0, "base"), (0, "plain"), (2, "pattern")] {
            let mut expected = oracle.expected(prompt, kind, &decoder);
            if kind != "base" {
                expected.adapter = Some(Arc::new(oracle.adapter(kind, &decoder, true)));
            }
            let found = run(&decoder, &[(&expected, 0..expected.tokens.len())], None);
            assert_equal(&found[0], &expected.logits, &format!("{name}, {kind}"));
        }
    }
}

#[test]
fn an_adapter_under_training_gives_the_same_logits_over_a_frozen_base() {
    for name in MODELS {
        let oracle = Oracle::new(name);
        let decoder = oracle.decoder();
        for kind in ["plain", "pattern"] {
            let mut expected = oracle.expected(0, kind, &decoder);
            expected.adapter = Some(Arc::new(oracle.adapter(kind, &decoder, true)));
            let found = run(&decoder, &[(&expected, 0..expected.tokens.len())], None);
            assert_equal(&found[0], &expected.logits, &format!("{name}, {kind}"));
        }
    }
}

#[test]
fn a_merged_model_gives_the_logits_of_its_adapter() {
    let oracle = Oracle::new("tiny-llama"); // f32, so that folding rounds nothing away
    let decoder = oracle.decoder();
    for kind in ["plain", "pattern"] {
        let adapter = oracle.adapter(kind, &decoder, false);
        let scratch = Scratch::new();
        let weights = merged_weights(decoder.tensors(), &adapter).unwrap();
        write_weights(scratch.path(), &weights).unwrap();
        copy("config.json", &fixture("tiny-llama"), scratch.path());
        let merged = Decoder::load(scratch.path(), WeightMode::Frozen).unwrap();
        let expected = Expected { adapter: None, ..oracle.expected(0, kind, &decoder) };
        let found = run(&merged, &[(&expected, 0..expected.tokens.len())], None);
        assert_equal(&found[0], &expected.logits, kind);
    }
}

fn copy(name: &str, from: &Path, to: &Path) {
    fs::copy(from.join(name), to.join(name)).unwrap();
}
