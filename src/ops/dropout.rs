//! Inverted dropout whose mask is a pure function of its seed, so that a resumed run repeats it.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::storage::f32_slice;

const NAME: &str = "dropout";

/// Sets each element to zero with `probability` and scales the others by `1 / (1 - probability)`.
///
/// # Errors
/// Where `x` is not f32 on the CPU.
pub fn dropout(x: &Tensor, probability: f32, seed: u64) -> Result<Tensor> {
    if probability <= 0.0 {
        return Ok(x.clone());
    }
    x.contiguous()?.apply_op1(Dropout { probability, seed })
}

#[derive(Clone, Copy)]
struct Dropout {
    probability: f32,
    seed: u64,
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let keep = 1.0 / (1.0 - self.probability);
        let mut state = self.seed;
        let out = f32_slice(storage, layout, NAME)?
            .iter()
            .map(|value| if uniform(&mut state) < self.probability { 0.0 } else { value * keep })
            .collect();
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(self)?))
    }
}

/// The next number in `[0, 1)` of SplitMix64 (Steele et al. 2014).
#[allow(clippy::cast_precision_loss)]
pub(super) fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    (z >> 40) as f32 / (1_u64 << 24) as f32
}
