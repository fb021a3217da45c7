//! The gate of a gated feed-forward layer, SwiGLU or GeGLU (Shazeer 2020,
//! <https://arxiv.org/abs/2002.05202>).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{
    profile::{Op, time},
    storage::{f32_slice, mismatch, tensor, with_f32},
};
use crate::kernels::{best, buffer, for_each_rows, for_each_rows_of_two};

const NAME: &str = "gated_mul";
/// Multiply-adds that an element's exponential is worth.
pub(super) const WORK: usize = 8;

/// What a gate goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `g * sigmoid(g)`
    Silu,
    /// GELU by its hyperbolic tangent: `g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2`
    GeluTanh,
}

/// `silu(gate) * up`, both `[rows, intermediate]`, f32.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated_mul(Activation::Silu, gate, up)
}

/// `activation(gate) * up`, both `[rows, intermediate]`, f32.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn gated_mul(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let _time = time(Op::Gate);
    gate.contiguous()?.apply_op2(&up.contiguous()?, GatedMul { activation })
}

struct GatedMul {
    activation: Activation,
}

impl CustomOp2 for GatedMul {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (f32_slice(gate, gate_layout, NAME)?, f32_slice(up, up_layout, NAME)?);
        if gate.len() != up.len() {
            return Err(mismatch(NAME, "gate and up differ in shape"));
        }
        let mut out = buffer(gate.len());
        for_each_rows(&mut out, 1, WORK, |start, out| {
            let range = start..start + out.len();
            let (gate, up) = (&gate[range.clone()], &up[range]);
            match self.activation {
                Activation::Silu => best().silu_mul(gate, up, out),
                Activation::GeluTanh => best().gelu_mul(gate, up, out),
            }
        });
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let count = gate.elem_count();
        let (mut grad_gate, mut grad_up) = (vec![0.0; count], vec![0.0; count]);
        with_f32(gate, NAME, |gate| {
            with_f32(up, NAME, |up| {
                with_f32(grad, NAME, |grad| {
                    let outputs = (&mut grad_gate, &mut grad_up);
                    for_each_rows_of_two(outputs.0, outputs.1, (1, 1), WORK, |start, a, b| {
                        let range = start..start + a.len();
                        let inputs = (&gate[range.clone()], &up[range.clone()]);
                        match self.activation {
                            Activation::Silu => {
                                best().silu_mul_backward(inputs, &grad[range], (a, b));
                            }
                            Activation::GeluTanh => {
                                best().gelu_mul_backward(inputs, &grad[range], (a, b));
                            }
                        }
                    });
                    Ok(())
                })
            })
        })?;
        let shape = gate.shape();
        Ok((Some(tensor(grad_gate, shape.clone())?), Some(tensor(grad_up, shape.clone())?)))
    }
}
