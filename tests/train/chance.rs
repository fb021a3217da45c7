//! What a run does at random is new in every step and micro-batch, and as large as it is meant to be.

use crate::{
    common::{TempDir, fixture},
    jobs::{self, losses, patterns, run_to_end},
};
use candle_core::{DType, Device, Tensor};
use tunesmith::{ops::noise::add_noise, train::TrainConfig};

/// Losses of three steps over copies of one row, each a micro-batch, that learn nothing.
fn noisy_losses(rows_per_step: usize) -> Vec<f64> {
    let dir = TempDir::new();
    let config = TrainConfig {
        model: fixture("tiny-llama").display().to_string(),
        data: "rows.jsonl".into(),
        output: dir.join("adapter"),
        rank: 4,
        neftune_alpha: 5.0,
        lr: Some(0.0),
        max_steps: Some(3),
        batch_size: rows_per_step,
        micro_batch_tokens: 1,
        ..TrainConfig::default()
    };
    let rows = vec![patterns(1, 20).remove(0); 6];
    let (_, events) = run_to_end(&jobs::job(config, rows, Vec::new()));
    losses(&events).into_iter().map(|(_, loss)| loss).collect()
}

#[test]
fn no_two_steps_or_micro_batches_share_their_noise() {
    let one = noisy_losses(1);
    assert!(one[0] != one[1] && one[1] != one[2] && one[0] != one[2], "{one:?}");
    // With the noise of the first row for the second as well the mean of both would be the first's.
    let two = noisy_losses(2);
    assert!(one.iter().zip(&two).all(|(one, two)| one != two), "{one:?} {two:?}");
}

#[test]
fn noise_is_smaller_where_a_sequence_is_longer() {
    let (lengths, size, alpha) = ([20, 80], 8, 5.0);
    let zeros = Tensor::zeros((100, size), DType::F32, &Device::Cpu).unwrap();
    let noise = add_noise(&zeros, &lengths, alpha, 3).unwrap().to_vec2::<f32>().unwrap();
    for (rows, length) in [(&noise[..20], 20), (&noise[20..], 80)] {
        let largest = rows.iter().flatten().fold(0.0_f32, |most, value| most.max(value.abs()));
        let bound = alpha / ((length * size) as f32).sqrt();
        assert!((0.95 * bound..=bound).contains(&largest), "{largest}, not below {bound}");
    }
}
