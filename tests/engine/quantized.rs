//! A model whose matrices are rounded: how far from the exact one, and still the same base.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic")]

use std::path::Path;

use crate::support::{fixture, oracle};
use candle_core::Device;
use tunesmith::model::{Decoder, KvCache, Step, StepSequence, WeightMode};

const TOKENS: [u32; 48] = {
    let mut tokens = [0; 48];
    let mut at = 0;
    while at < 48 {
        tokens[at] = 5 + (at as u32 * 7919) % 1400;
        at += 1;
    }
    tokens
};

fn load(mode: WeightMode) -> Decoder {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-kitchen");
    Decoder::load(&dir, mode).unwrap()
}

/// Logits of every token, through the cache, in steps of `chunk` tokens.
fn logits(decoder: &Decoder, tokens: &[u32], chunk: usize) -> Vec<Vec<f32>> {
    let cache = KvCache::new(decoder.config(), 4, 16).unwrap();
    let mut rows = Vec::new();
    for (index, tokens) in tokens.chunks(chunk).enumerate() {
        let logit_rows: Vec<u32> = (0..tokens.len() as u32).collect();
        let step = Step {
            tokens,
            sequences: &[StepSequence {
                num_tokens: tokens.len(),
                num_cached_tokens: index * chunk,
                block_table: &[2, 0, 3, 1],
            }],
            cache: Some(&cache),
            deltas: &[],
            logit_rows: &logit_rows,
            dropout: None,
        };
        rows.extend(decoder.forward(&step).unwrap().to_vec2().unwrap());
    }
    rows
}

#[test]
fn rounded_weights_move_the_logits_a_little_and_the_fingerprint_not() {
    let exact = load(WeightMode::Frozen);
    let expected = logits(&exact, &TOKENS, TOKENS.len());
    let mut last_bytes = exact.num_bytes();
    for (mode, bound) in
        [(WeightMode::Bf16, 0.02), (WeightMode::Int8, 0.04), (WeightMode::Int4, 0.30)]
    {
        let rounded = load(mode);
        let found = logits(&rounded, &TOKENS, TOKENS.len());
        // Root mean square of the error, against that of the logits around their mean.
        let (mut error, mut size, mut greatest) = (0.0, 0.0, 0.0_f32);
        for (found, expected) in found.iter().zip(&expected) {
            let mean = expected.iter().sum::<f32>() / expected.len() as f32;
            for (found, expected) in found.iter().zip(expected) {
                error += f64::from(found - expected).powi(2);
                size += f64::from(expected - mean).powi(2);
                greatest = greatest.max((found - expected).abs());
            }
        }
        let share = (error / size).sqrt();
        println!("{mode:?}: error {share:.4} of the logits' spread, {greatest:.3} at most");
        assert!(share > 0.0 && share < bound, "{mode:?}: {share}");
        assert_eq!(rounded.fingerprint(), exact.fingerprint(), "{mode:?}: an adapter fits both");
        // The file is in bf16.
        let share = if mode == WeightMode::Bf16 { 10 } else { 7 };
        assert!(rounded.num_bytes() <= last_bytes * share / 10 + 100_000, "{mode:?} saves memory");
        last_bytes = rounded.num_bytes();
    }
}

#[test]
fn rounded_models_give_the_same_bits_in_any_chunks() {
    for mode in [WeightMode::Bf16, WeightMode::Int8, WeightMode::Int4] {
        let decoder = load(mode);
        let whole = logits(&decoder, &TOKENS, TOKENS.len());
        for chunk in [1, 5, 17] {
            assert!(logits(&decoder, &TOKENS, chunk) == whole, "{mode:?} in chunks of {chunk}");
        }
    }
}

#[test]
fn a_model_in_bf16_gives_the_logits_of_transformers_with_products_rounded_alike() {
    let path = oracle("tiny-llama-bf16-logits.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let tokens = tensors["tokens"].to_vec1::<i64>().unwrap();
    let tokens: Vec<u32> = tokens.into_iter().map(|token| u32::try_from(token).unwrap()).collect();
    let decoder = Decoder::load(&fixture("tiny-llama"), WeightMode::Bf16).unwrap();
    let found = logits(&decoder, &tokens, tokens.len()).concat();
    // Root mean square of the distance from each of theirs.
    let distance = |name: &str| {
        let theirs = tensors[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let squares = found.iter().zip(&theirs).map(|(a, b)| f64::from(a - b).powi(2));
        (squares.sum::<f64>() / theirs.len() as f64).sqrt()
    };
    let (rounded, exact) = (distance("bf16"), distance("exact"));
    println!("{rounded:.1e} from theirs in bf16, {exact:.1e} from theirs in f32");
    // A sum in another order falls on the other side of a rounding here and there.
    assert!(rounded < exact / 10.0, "{rounded} {exact}");
}
