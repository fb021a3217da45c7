//! Exponentials of whole rows of logits: what sampling and scoring spend their time on.
//!
//! Exponentials come from the kernels, sums are made in f64 in a fixed order, so that neither depends on
//! neighbours or threads.

use crate::kernels::best;

/// Logits that are handled together: few enough to stay in the nearest cache.
pub(super) const CHUNK: usize = 1024;
/// Sums side by side, so that the compiler can use vector registers.
const LANES: usize = 8;

/// `e^((logit - max) / temperature)` of a chunk of logits; `weights` is equally long.
pub(super) fn exponentials(logits: &[f32], max: f32, temperature: f32, weights: &mut [f32]) {
    for (weight, &logit) in weights.iter_mut().zip(logits) {
        *weight = (logit - max) / temperature;
    }
    best().softmax_scaled(weights, 0.0, 1.0);
}

/// The sum, in f64.
pub(super) fn sum(values: &[f32]) -> f64 {
    let chunks = values.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().copied().map(f64::from).sum();
    let mut sums = [0.0; LANES];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, &value)| *sum += f64::from(value));
    }
    sums.into_iter().sum::<f64>() + rest
}

/// `ln(sum of e^logit)`; `max` is the greatest logit.
pub(super) fn log_sum_exp(logits: &[f32], max: f32) -> f64 {
    let mut weights = [0.0; CHUNK];
    let chunks = logits.chunks(CHUNK).map(|chunk| {
        let weights = &mut weights[..chunk.len()];
        exponentials(chunk, max, 1.0, weights);
        sum(weights)
    });
    f64::from(max) + chunks.sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_exponentials_are_those_of_f64() {
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 37) % 401) as f32 / 10.0 - 20.0).collect();
        let max = 20.0;
        let exact: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        assert!((log_sum_exp(&logits, max) - exact.ln()).abs() < 1e-7);
        assert_eq!(sum(&[0.5; 1003]), 501.5);
    }
}
