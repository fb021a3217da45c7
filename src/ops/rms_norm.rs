//! RMS norm (Zhang & Sennrich 2019, <https://arxiv.org/abs/1910.07467>).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{
    profile::{Op, time},
    storage::{f32_slice, mismatch, tensor, with_f32},
};
use crate::kernels::{RmsNormGradient, best, buffer, for_each_rows};

const NAME: &str = "rms_norm";

/// `x / sqrt(mean(x^2) + eps) * weight` over the rows of `x [rows, size]`; `weight [size]`, f32.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let _time = time(Op::Norm);
    #[allow(clippy::cast_possible_truncation)]
    let eps = eps as f32;
    x.contiguous()?.apply_op2(weight, RmsNorm { eps })
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (f32_slice(x, x_layout, NAME)?, f32_slice(weight, weight_layout, NAME)?);
        let size = weight.len();
        if x_layout.dims().last() != Some(&size) {
            return Err(mismatch(NAME, &format!("x {:?}, weight of {size}", x_layout.dims())));
        }
        let mut out = buffer(x.len());
        for_each_rows(&mut out, size, 4 * size, |first, out| {
            let x = x[first * size..].chunks_exact(size);
            for (out, x) in out.chunks_exact_mut(size).zip(x) {
                best().rms_norm(x, weight, self.eps, out);
            }
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let size = weight.dims1()?;
        let mut grad_x = vec![0.0; x.elem_count()];
        let mut grad_weight = vec![0.0; size];
        let trained = weight.track_op();
        with_f32(x, NAME, |x| {
            with_f32(weight, NAME, |weight| {
                with_f32(grad, NAME, |grad| {
                    let row = |index: usize| index * size..(index + 1) * size;
                    if trained {
                        // One thread: the weight's gradient is summed in the order of the rows.
                        for (index, grad_x) in grad_x.chunks_exact_mut(size).enumerate() {
                            let (x, grad_out) = (&x[row(index)], &grad[row(index)]);
                            let grad_weight = Some(grad_weight.as_mut_slice());
                            let eps = self.eps;
                            best().rms_norm_backward(RmsNormGradient {
                                x,
                                weight,
                                grad_out,
                                eps,
                                grad_x,
                                grad_weight,
                            });
                        }
                        return Ok(());
                    }
                    for_each_rows(&mut grad_x, size, 8 * size, |first, rows| {
                        for (index, grad_x) in rows.chunks_exact_mut(size).enumerate() {
                            let (x, grad_out) = (&x[row(first + index)], &grad[row(first + index)]);
                            let (eps, grad_weight) = (self.eps, None);
                            best().rms_norm_backward(RmsNormGradient {
                                x,
                                weight,
                                grad_out,
                                eps,
                                grad_x,
                                grad_weight,
                            });
                        }
                    });
                    Ok(())
                })
            })
        })?;
        let grad_weight = if trained { Some(tensor(grad_weight, size)?) } else { None };
        Ok((Some(tensor(grad_x, x.shape().clone())?), grad_weight))
    }
}
