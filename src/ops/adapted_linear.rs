//! A frozen projection and the adapter that is trained over it, as one operation:
//! `x W^T + bias + scale * (drop(x) A^T) B^T`.
//!
//! The graph then holds one output where it would hold three, and `x A^T`, which backward needs again,
//! is kept as it is: `[rows, rank]`. The mask of the dropout is never kept; it follows from its seed.
//! The sums are those of [`super::linear`] and [`super::lora`], bit for bit.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::{
    dropout::mask,
    lora::{expand, narrow, shrink},
    storage::{f32_slice, mismatch, tensor, with_f32},
};
use crate::kernels::{MatmulJob, PackedWeight, best};

const NAME: &str = "adapted_linear";
/// Up to this rank a low-rank sum is one chain, which may be added to the output where it is.
const MAX_CHAIN: usize = 512;

/// A and B of a projection while they are trained.
#[derive(Debug, Clone)]
pub struct TrainedLora {
    /// `[rank, in]`, f32.
    pub a: Tensor,
    /// `[out, rank]`, f32.
    pub b: Tensor,
    /// Factor on the product.
    pub scale: f64,
    /// Probability and seed of the dropout on the adapter's input.
    pub dropout: Option<(f32, u64)>,
}

/// `x [rows, in]`, `weight [out, in]`, `bias [out]` -> `[rows, out]`, with gradients of `x`, A and B.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn adapted_linear(
    x: &Tensor,
    weight: &Arc<PackedWeight>,
    bias: Option<&Tensor>,
    lora: &TrainedLora,
) -> Result<Tensor> {
    let [out_features, in_features] = weight.shape();
    let ((rank, a_in), (b_out, b_rank)) = (lora.a.dims2()?, lora.b.dims2()?);
    if (rank, a_in, b_out) != (b_rank, in_features, out_features) || x.dims2()?.1 != in_features {
        let what = format!(
            "x {:?}, weight [{out_features}, {in_features}], A [{rank}, {a_in}], B [{b_out}, {b_rank}]",
            x.dims()
        );
        return Err(mismatch(NAME, &what));
    }
    let op = AdaptedLinear {
        weight: Arc::clone(weight),
        bias: bias.cloned(),
        scale: narrow(lora.scale),
        dropout: lora.dropout.filter(|(probability, _)| *probability > 0.0),
        hidden: OnceLock::new(),
    };
    x.contiguous()?.apply_op3(&lora.a, &lora.b, op)
}

struct AdaptedLinear {
    weight: Arc<PackedWeight>,
    bias: Option<Tensor>,
    scale: f32,
    dropout: Option<(f32, u64)>,
    /// `drop(x) A^T` of the forward pass, `[rows, rank]`.
    hidden: OnceLock<Vec<f32>>,
}

impl AdaptedLinear {
    /// Calls `body` with the adapter's input.
    fn with_dropped<T>(&self, x: &[f32], body: impl FnOnce(&[f32]) -> T) -> T {
        match self.dropout {
            None => body(x),
            Some((probability, seed)) => {
                let mut x = x.to_vec();
                mask(&mut x, probability, seed);
                body(&x)
            }
        }
    }

    /// `out = x W^T + bias`.
    fn project(&self, x: &[f32], out: &mut [f32]) -> Result<()> {
        match &self.bias {
            None => self.weight.linear(best(), x, None, out),
            Some(bias) => with_f32(bias, NAME, |bias| {
                self.weight.linear(best(), x, Some(bias), out);
                Ok(())
            })?,
        }
        Ok(())
    }

    /// Gradients from those of the output: with `g = scale * dy B` and `h` as kept, `dx = dy W + drop(g A)`,
    /// `dA = g^T drop(x)` and `dB = scale * dy^T h`. `grad_x` is empty where nobody wants it.
    fn gradients(
        &self,
        (x, grad): (&[f32], &[f32]),
        (a, b): (&[f32], &[f32]),
        grad_x: &mut [f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let [out_features, in_features] = self.weight.shape();
        let (rows, rank) = (grad.len() / out_features, a.len() / in_features);
        let run = |a: &[f32], a_strides, b: &[f32], shape, (alpha, accumulate), out: &mut [f32]| {
            MatmulJob { a, a_strides, b, shape, alpha, accumulate }.run(best(), out);
        };
        let mut grad_hidden = vec![0.0; rows * rank];
        let shape = (rows, out_features, rank);
        run(grad, (out_features, 1), b, shape, (self.scale, false), &mut grad_hidden);
        let mut grad_b = vec![0.0; b.len()];
        let hidden =
            self.hidden.get_or_init(|| self.with_dropped(x, |x| shrink(x, a, (rank, in_features))));
        let shape = (out_features, rows, rank);
        run(grad, (1, out_features), hidden, shape, (self.scale, false), &mut grad_b);
        let mut grad_a = vec![0.0; a.len()];
        let shape = (rank, rows, in_features);
        self.with_dropped(x, |x| {
            run(&grad_hidden, (1, rank), x, shape, (1.0, false), &mut grad_a);
        });
        if !grad_x.is_empty() {
            self.weight.input_gradient(best(), grad, grad_x);
            let shape = (rows, rank, in_features);
            if let Some((probability, seed)) = self.dropout {
                let mut through = vec![0.0; grad_x.len()];
                run(&grad_hidden, (rank, 1), a, shape, (1.0, false), &mut through);
                mask(&mut through, probability, seed);
                add_to(grad_x, &through);
            } else {
                run(&grad_hidden, (rank, 1), a, shape, (1.0, true), grad_x);
            }
        }
        (grad_a, grad_b)
    }
}

impl CustomOp3 for AdaptedLinear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [out_features, in_features] = self.weight.shape();
        let (rows, rank) = (x_layout.shape().dims2()?.0, a_layout.shape().dims2()?.0);
        let x = f32_slice(x, x_layout, NAME)?;
        let (a, b) = (f32_slice(a, a_layout, NAME)?, f32_slice(b, b_layout, NAME)?);
        let mut out = vec![0.0; rows * out_features];
        self.project(x, &mut out)?;
        let hidden = self.with_dropped(x, |x| shrink(x, a, (rank, in_features)));
        if rank <= MAX_CHAIN {
            expand(&hidden, b, rank, (self.scale, true), &mut out);
        } else {
            let mut delta = vec![0.0; out.len()];
            expand(&hidden, b, rank, (self.scale, false), &mut delta);
            add_to(&mut out, &delta);
        }
        self.hidden.get_or_init(|| hidden);
        Ok((CpuStorage::F32(out), (rows, out_features).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let tracked = x.track_op();
        let mut grad_x = vec![0.0; if tracked { x.elem_count() } else { 0 }];
        let (grad_a, grad_b) = with_f32(x, NAME, |x| {
            with_f32(grad, NAME, |grad| {
                with_f32(a, NAME, |a| {
                    with_f32(b, NAME, |b| Ok(self.gradients((x, grad), (a, b), &mut grad_x)))
                })
            })
        })?;
        let grad_x = if tracked { Some(tensor(grad_x, x.shape().clone())?) } else { None };
        let grad_a = tensor(grad_a, a.shape().clone())?;
        Ok((grad_x, Some(grad_a), Some(tensor(grad_b, b.shape().clone())?)))
    }
}

fn add_to(out: &mut [f32], addend: &[f32]) {
    out.iter_mut().zip(addend).for_each(|(out, addend)| *out += addend);
}
