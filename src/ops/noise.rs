//! Uniform noise that is a pure function of its seed, so that a resumed run repeats it.

use candle_core::{Result, Tensor};

use super::{
    dropout::uniform,
    storage::{mismatch, tensor},
};

const NAME: &str = "noise";

/// `x [tokens, size]` plus noise between `-m` and `m`, where `m = alpha / sqrt(length * size)` for the
/// tokens of a sequence of that length (NEFTune, Jain et al. 2023). `lengths` add up to the tokens. A
/// gradient passes unchanged.
///
/// # Errors
/// Where the lengths do not add up.
pub fn add_noise(x: &Tensor, lengths: &[usize], alpha: f32, seed: u64) -> Result<Tensor> {
    let (tokens, size) = x.dims2()?;
    if lengths.iter().sum::<usize>() != tokens {
        return Err(mismatch(NAME, &format!("lengths {lengths:?} of {tokens} tokens")));
    }
    let mut noise = Vec::with_capacity(tokens * size);
    for length in lengths {
        let magnitude = alpha / ((length * size) as f32).sqrt();
        let draw = |at| magnitude * (2.0 * uniform(seed, at as u64) - 1.0);
        noise.extend((noise.len()..noise.len() + length * size).map(draw));
    }
    x + tensor(noise, (tokens, size))?
}
