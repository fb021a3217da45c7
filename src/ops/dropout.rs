//! Inverted dropout whose mask is a pure function of its seed, so that a resumed run repeats it.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::storage::f32_slice;
use crate::kernels::for_each_rows;

const NAME: &str = "dropout";
/// Multiply-adds that an element's random number is worth.
const WORK: usize = 4;

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
        let mut out = f32_slice(storage, layout, NAME)?.to_vec();
        mask(&mut out, self.probability, self.seed);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(self)?))
    }
}

/// Drops elements of `x` in place: the mask that [`dropout`] applies.
pub(super) fn mask(x: &mut [f32], probability: f32, seed: u64) {
    let keep = 1.0 / (1.0 - probability);
    for_each_rows(x, 1, WORK, |start, x| {
        for (index, value) in x.iter_mut().enumerate() {
            let dropped = uniform(seed, (start + index) as u64) < probability;
            *value = if dropped { 0.0 } else { *value * keep };
        }
    });
}

/// Number `index` in `[0, 1)` of the sequence that SplitMix64 (Steele et al. 2014) makes from `seed`.
#[allow(clippy::cast_precision_loss)]
pub(super) fn uniform(seed: u64, index: u64) -> f32 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    (z >> 40) as f32 / (1_u64 << 24) as f32
}
