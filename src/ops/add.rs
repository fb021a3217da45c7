//! Residual addition.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{
    profile::{Op, time},
    storage::{f32_slice, mismatch},
};
use crate::kernels::{buffer, for_each_rows};

/// `a + b` for f32 tensors of one shape.
///
/// # Errors
/// Where the shapes differ or a tensor is not f32 on the CPU.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _time = time(Op::Residual);
    a.contiguous()?.apply_op2(&b.contiguous()?, Add)
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, y) = (f32_slice(a, a_layout, "add")?, f32_slice(b, b_layout, "add")?);
        if x.len() != y.len() {
            return Err(mismatch("add", "shapes differ"));
        }
        let mut out = buffer(x.len());
        for_each_rows(&mut out, 1, 1, |start, out| {
            for ((out, x), y) in out.iter_mut().zip(&x[start..]).zip(&y[start..]) {
                *out = x + y;
            }
        });
        Ok((CpuStorage::F32(out), a_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _a: &Tensor,
        _b: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), Some(grad.clone())))
    }
}
