//! A soft cap on logits (Gemma 2, <https://arxiv.org/abs/2408.00118>).

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::storage::{f32_slice, tensor, with_f32};
use crate::kernels::{best, for_each_rows};

const NAME: &str = "soft_cap";
/// Multiply-adds that an element's hyperbolic tangent is worth.
const WORK: usize = 8;

/// `cap * tanh(x / cap)`, f32, of any shape.
///
/// # Errors
/// Where the dtype does not fit.
pub fn soft_cap(x: &Tensor, cap: f64) -> Result<Tensor> {
    #[allow(clippy::cast_possible_truncation)]
    let cap = cap as f32;
    x.contiguous()?.apply_op1(SoftCap { cap })
}

/// The derivative of a capped logit by the uncapped one: `1 - (logit / cap)^2`.
pub(super) fn slope(logit: f32, cap: f32) -> f32 {
    let bent = logit / cap;
    1.0 - bent * bent
}

struct SoftCap {
    cap: f32,
}

impl CustomOp1 for SoftCap {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = f32_slice(storage, layout, NAME)?.to_vec();
        for_each_rows(&mut out, 1, WORK, |_, out| best().soft_cap(out, self.cap));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grads = with_f32(out, NAME, |out| {
            with_f32(grad, NAME, |grad| {
                Ok(out.iter().zip(grad).map(|(out, grad)| grad * slope(*out, self.cap)).collect())
            })
        })?;
        Ok(Some(tensor(grads, x.shape().clone())?))
    }
}
