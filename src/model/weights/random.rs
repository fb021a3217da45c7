//! Fresh weights: normal with a standard deviation of 0.02, norms without effect, biases zero.

use candle_core::{Device, Result, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The usual standard deviation of a decoder's initial weights (GPT-2, Llama).
const STANDARD_DEVIATION: f32 = 0.02;

/// Draws weights in the order in which they are asked for.
pub(in crate::model) struct RandomWeights {
    rng: ChaCha8Rng,
    /// The weight of a norm that changes nothing.
    norm: f32,
}

impl RandomWeights {
    /// Weights for a model that adds `norm_offset` to those of its norms.
    #[allow(clippy::cast_possible_truncation)]
    pub(in crate::model) fn new(seed: u64, norm_offset: f64) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), norm: 1.0 - norm_offset as f32 }
    }

    pub(in crate::model) fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let count = shape.iter().product();
        let data: Vec<f32> = if name.ends_with("bias") {
            vec![0.0; count]
        } else if name.contains("norm") {
            vec![self.norm; count]
        } else {
            (0..count).map(|_| self.normal() * STANDARD_DEVIATION).collect()
        };
        Tensor::from_vec(data, shape, &Device::Cpu)
    }

    /// A standard normal number (Box & Muller 1958).
    fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.rng.random::<f32>()).ln()).sqrt();
        radius * (2.0 * std::f32::consts::PI * self.rng.random::<f32>()).cos()
    }
}
