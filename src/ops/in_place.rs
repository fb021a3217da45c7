//! Operations on a tensor that nobody else holds: where nothing is tracked, the result takes its place. That
//! saves the memory's way to the CPU and back. The numbers are those of the operations that make a new tensor,
//! bit for bit.
#![allow(clippy::needless_pass_by_value, reason = "a tensor that is given away is not read again")]

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result, Tensor};

use super::{
    add,
    gated_mlp::{self, Activation},
    profile::{Op, time},
    rope::{self, Angles},
    storage::{f32_slice, f32_slice_mut, mismatch},
};
use crate::kernels::{best, for_each_rows};

/// Elements that are read and then overwritten; they stay in the first-level cache.
const PIECE: usize = 1024;

/// `x + own`, [`add::add`].
///
/// # Errors
/// As there.
pub fn add(x: &Tensor, own: Tensor) -> Result<Tensor> {
    if x.track_op() || own.track_op() {
        return add::add(x, &own);
    }
    let _time = time(Op::Residual);
    let own = own.contiguous()?;
    own.inplace_op2(&x.contiguous()?, &Add)?;
    Ok(own)
}

/// Every head of `own` rotated, [`rope::rope`].
///
/// # Errors
/// As there.
pub fn rope(own: Tensor, angles: &Angles) -> Result<Tensor> {
    if own.track_op() {
        return rope::rope(&own, angles);
    }
    let _time = time(Op::Rope);
    let own = own.contiguous()?;
    own.inplace_op1(&Rope { angles })?;
    Ok(own)
}

/// `activation(own) * up`, [`gated_mlp::gated_mul`].
///
/// # Errors
/// As there.
pub fn gated_mul(activation: Activation, own: Tensor, up: &Tensor) -> Result<Tensor> {
    if own.track_op() || up.track_op() {
        return gated_mlp::gated_mul(activation, &own, up);
    }
    let _time = time(Op::Gate);
    let own = own.contiguous()?;
    own.inplace_op2(&up.contiguous()?, &GatedMul { activation })?;
    Ok(own)
}

struct Add;

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        own: &mut CpuStorage,
        own_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        let own = f32_slice_mut(own, own_layout, self.name())?;
        let x = f32_slice(x, x_layout, self.name())?;
        if x.len() != own.len() {
            return Err(mismatch(self.name(), "shapes differ"));
        }
        for_each_rows(own, 1, 1, |start, own| {
            for (own, x) in own.iter_mut().zip(&x[start..]) {
                *own += x;
            }
        });
        Ok(())
    }
}

struct Rope<'a> {
    angles: &'a Angles,
}

impl InplaceOp1 for Rope<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, own: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let shape = layout.shape().dims2()?;
        rope::rotate(f32_slice_mut(own, layout, self.name())?, shape, self.angles, 1.0)
    }
}

struct GatedMul {
    activation: Activation,
}

impl InplaceOp2 for GatedMul {
    fn name(&self) -> &'static str {
        "gated_mul"
    }

    fn cpu_fwd(
        &self,
        own: &mut CpuStorage,
        own_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<()> {
        let own = f32_slice_mut(own, own_layout, self.name())?;
        let up = f32_slice(up, up_layout, self.name())?;
        if up.len() != own.len() {
            return Err(mismatch(self.name(), "gate and up differ in shape"));
        }
        for_each_rows(own, 1, gated_mlp::WORK, |start, own| {
            let mut gate = [0.0; PIECE];
            for (own, up) in own.chunks_mut(PIECE).zip(up[start..].chunks(PIECE)) {
                let gate = &mut gate[..own.len()];
                gate.copy_from_slice(own);
                match self.activation {
                    Activation::Silu => best().silu_mul(gate, &up[..own.len()], own),
                    Activation::GeluTanh => best().gelu_mul(gate, &up[..own.len()], own),
                }
            }
        });
        Ok(())
    }
}
