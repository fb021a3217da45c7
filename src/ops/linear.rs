//! `x W^T + b`, the one matrix product of a decoder's projections and head.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::{
    storage::{f32_slice, mismatch, tensor, with_f32},
    weight::Weight,
};
use crate::kernels::{self, MatmulJob, PackedWeight, best, buffer};

const NAME: &str = "linear";

/// `x [rows, in] -> [rows, out]` with `weight [out, in]` and `bias [out]`.
///
/// A packed weight never receives a gradient, and backward then costs one product instead of two. A
/// plain one does, and its bias is tracked exactly where it is.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out_features, in_features) = weight.dims2()?;
    if x.dims2()?.1 != in_features {
        let what = format!("x {:?} against weight [{out_features}, {in_features}]", x.dims());
        return Err(mismatch(NAME, &what));
    }
    let x = x.contiguous()?;
    match weight {
        Weight::Packed(weight) => {
            x.apply_op1(FrozenLinear { weight: Arc::clone(weight), bias: bias.cloned() })
        }
        Weight::Plain(weight) => {
            let out = x.apply_op2(weight, TrainableLinear)?;
            match bias {
                Some(bias) => out.broadcast_add(bias),
                None => Ok(out),
            }
        }
    }
}

/// `dW = dy^T x`.
fn weight_gradient(x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (rows, in_features) = x.dims2()?;
    let out_features = grad.dims2()?.1;
    let mut out = vec![0.0; out_features * in_features];
    with_f32(grad, NAME, |grad| {
        with_f32(x, NAME, |b| {
            let (a_strides, shape) = ((1, out_features), (out_features, rows, in_features));
            MatmulJob { a: grad, a_strides, b, shape, alpha: 1.0, accumulate: false }
                .run(best(), &mut out);
            Ok(())
        })
    })?;
    tensor(out, (out_features, in_features))
}

/// Holds the weight, so that candle never sees it as an input.
struct FrozenLinear {
    weight: Arc<PackedWeight>,
    bias: Option<Tensor>,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice(x, layout, NAME)?;
        let [out_features, _] = self.weight.shape();
        let rows = layout.shape().dims2()?.0;
        let mut out = buffer(rows * out_features);
        match &self.bias {
            None => self.weight.linear(best(), x, None, &mut out),
            Some(bias) => with_f32(bias, NAME, |bias| {
                self.weight.linear(best(), x, Some(bias), &mut out);
                Ok(())
            })?,
        }
        Ok((CpuStorage::F32(out), (rows, out_features).into()))
    }

    /// `dx = dy W`.
    fn bwd(&self, _x: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [_, in_features] = self.weight.shape();
        let rows = grad.dims2()?.0;
        let mut out = vec![0.0; rows * in_features];
        with_f32(grad, NAME, |grad| {
            self.weight.input_gradient(best(), grad, &mut out);
            Ok(())
        })?;
        Ok(Some(tensor(out, (rows, in_features))?))
    }
}

struct TrainableLinear;

impl CustomOp2 for TrainableLinear {
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
        let (out_features, in_features) = weight_layout.shape().dims2()?;
        let rows = x_layout.shape().dims2()?.0;
        let (x, weight) = (f32_slice(x, x_layout, NAME)?, f32_slice(weight, weight_layout, NAME)?);
        let mut out = buffer(rows * out_features);
        kernels::linear(best(), x, weight, in_features, &mut out);
        Ok((CpuStorage::F32(out), (rows, out_features).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let in_features = weight.dims2()?.1;
        let rows = grad.dims2()?.0;
        let mut grad_x = vec![0.0; rows * in_features];
        with_f32(grad, NAME, |grad| {
            with_f32(weight, NAME, |weight| {
                kernels::input_gradient(best(), grad, weight, in_features, &mut grad_x);
                Ok(())
            })
        })?;
        let grad_weight = weight_gradient(x, grad)?;
        Ok((Some(tensor(grad_x, (rows, in_features))?), Some(grad_weight)))
    }
}
