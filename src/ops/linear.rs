//! `x W^T + b`, the one matrix product of a decoder's projections and head.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::storage::WeightSlice;
use super::storage::{
    f32_slice, for_weight, is_weight_dtype, mismatch, tensor, weight_slice, with_f32, with_weight,
};
use crate::kernels::{LinearJob, MatmulJob, best};

const NAME: &str = "linear";

/// `x [rows, in] -> [rows, out]` with `weight [out, in]` and `bias [out]`.
///
/// A tracked weight (a variable) receives a gradient; a frozen one never does, and backward then
/// costs one product instead of two. A bias is tracked exactly where its weight is.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out_features, in_features) = weight.dims2()?;
    if x.dims2()?.1 != in_features || !is_weight_dtype(weight.dtype()) {
        let what =
            format!("x {:?} against weight {:?} {:?}", x.dims(), weight.dims(), weight.dtype());
        return Err(mismatch(NAME, &what));
    }
    let x = x.contiguous()?;
    if weight.track_op() {
        let out = x.apply_op2(weight, TrainableLinear)?;
        return match bias {
            Some(bias) => out.broadcast_add(bias),
            None => Ok(out),
        };
    }
    let (weight, bias) = (weight.clone(), bias.cloned());
    x.apply_op1(FrozenLinear { weight, bias, in_features, out_features })
}

fn product(
    x: &[f32],
    weight: &WeightSlice<'_>,
    bias: Option<&[f32]>,
    shape: (usize, usize),
) -> Vec<f32> {
    let (out_features, in_features) = shape;
    let mut out = vec![0.0; x.len() / in_features * out_features];
    for_weight!(weight, |weight| {
        LinearJob { x, weight, bias, in_features, out_features }.run(best(), &mut out);
    });
    out
}

/// `dx = dy W`.
fn input_gradient(weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (out_features, in_features) = weight.dims2()?;
    let rows = grad.dims2()?.0;
    let mut out = vec![0.0; rows * in_features];
    with_f32(grad, NAME, |grad| {
        with_weight(weight, NAME, |weight| {
            for_weight!(weight, |b| {
                let (a_strides, shape) = ((out_features, 1), (rows, out_features, in_features));
                MatmulJob { a: grad, a_strides, b, shape, alpha: 1.0, accumulate: false }
                    .run(best(), &mut out);
            });
            Ok(())
        })
    })?;
    tensor(out, (rows, in_features))
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
    weight: Tensor,
    bias: Option<Tensor>,
    in_features: usize,
    out_features: usize,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice(storage, layout, NAME)?;
        let shape = (self.out_features, self.in_features);
        let out = with_weight(&self.weight, NAME, |weight| match &self.bias {
            Some(bias) => with_f32(bias, NAME, |bias| Ok(product(x, &weight, Some(bias), shape))),
            None => Ok(product(x, &weight, None, shape)),
        })?;
        let rows = x.len() / self.in_features;
        Ok((CpuStorage::F32(out), (rows, self.out_features).into()))
    }

    fn bwd(&self, _x: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(input_gradient(&self.weight, grad)?))
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
        let shape = weight_layout.shape().dims2()?;
        let weight = weight_slice(weight, weight_layout, NAME)?;
        let out = product(f32_slice(x, x_layout, NAME)?, &weight, None, shape);
        Ok((CpuStorage::F32(out), (x_layout.shape().dims2()?.0, shape.0).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(input_gradient(weight, grad)?), Some(weight_gradient(x, grad)?)))
    }
}
