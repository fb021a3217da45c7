//! DoRA: the direction of an adapted weight and its length are trained apart
//! (Liu et al. 2024, <https://arxiv.org/abs/2402.09353>).
//!
//! A row of `W + scale * B A` is divided by its norm and multiplied by a trained magnitude `m`. With
//! `f = m / norm` the projection's output changes by `(f - 1) * W x + f * scale * B (A x)`. As the paper
//! has it (section 4.3), the norm counts as a constant in the backward pass.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, InplaceOp2, Layout, Result, Shape, Tensor};

use super::{
    storage::{f32_slice, mismatch, tensor, with_f32},
    weight::Weight,
};
use crate::kernels::{MatmulJob, best, for_each_rows};

const NAME: &str = "dora";
/// Rows of a weight that are widened at once.
const TILE_ROWS: usize = 32;

/// The norm of every row of `W + scale * B A`, `[out]`: the weight is widened some rows at a time,
/// never whole. `a [rank, in]`, `b [out, rank]`; no gradient passes.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn row_norms(weight: &Weight, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let (out_features, in_features) = weight.dims2()?;
    let rank = a.dims2()?.0;
    if a.dims2()?.1 != in_features || b.dims2()? != (out_features, rank) {
        return Err(mismatch(NAME, "W, A and B do not fit each other"));
    }
    #[allow(clippy::cast_possible_truncation)]
    let alpha = scale as f32;
    let mut norms = vec![0.0_f32; out_features];
    with_f32(&a.detach(), NAME, |a| {
        with_f32(&b.detach(), NAME, |b| {
            weight.with_rows(NAME, |rows| {
                for_each_rows(&mut norms, 1, in_features * (rank + 2), |start, norms| {
                    let mut tile = vec![0.0; TILE_ROWS * in_features];
                    for (index, norms) in norms.chunks_mut(TILE_ROWS).enumerate() {
                        let (first, count) = (start + index * TILE_ROWS, norms.len());
                        let tile = &mut tile[..count * in_features];
                        rows(first, tile);
                        let b = &b[first * rank..(first + count) * rank];
                        let (a_strides, shape) = ((rank, 1), (count, rank, in_features));
                        MatmulJob { a: b, a_strides, b: a, shape, alpha, accumulate: true }
                            .run(best(), tile);
                        for (norm, row) in norms.iter_mut().zip(tile.chunks_exact(in_features)) {
                            *norm = length(row);
                        }
                    }
                });
                Ok(())
            })
        })
    })?;
    tensor(norms, out_features)
}

/// What DoRA adds to a projection's output: `(f - 1) * base + f * delta` with `f = magnitude / norms`,
/// per column. `base [rows, out]` is the product with the base's weight, without its bias, and `delta`
/// of the same shape LoRA's contribution; `magnitude` and `norms` are `[out]`. Gradients of the first
/// three.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn dora(base: &Tensor, delta: &Tensor, magnitude: &Tensor, norms: &Tensor) -> Result<Tensor> {
    let norms = norms.to_vec1::<f32>()?.into();
    base.contiguous()?.apply_op3(&delta.contiguous()?, &magnitude.contiguous()?, Dora { norms })
}

/// `magnitude / norms`, by which DoRA makes the base's columns and LoRA's longer.
///
/// # Errors
/// Where the lengths differ.
pub fn factors(magnitude: &Tensor, norms: &Tensor) -> Result<Vec<f32>> {
    let norms = norms.to_vec1::<f32>()?;
    if magnitude.dims() != [norms.len()] {
        return Err(mismatch(NAME, "magnitude and norms do not fit each other"));
    }
    let dora = Dora { norms: norms.into() };
    with_f32(&magnitude.detach(), NAME, |magnitude| Ok(dora.factors(magnitude)))
}

/// `output[start..] += update`, in place: the serving body of an addition to some rows.
///
/// # Errors
/// Where `update [rows, out]` does not fit into `output` from row `start` on.
pub fn add_rows_in_place(output: &Tensor, update: &Tensor, start: usize) -> Result<()> {
    output.inplace_op2(&update.contiguous()?, &AddAt { start })
}

/// The Euclidean norm, summed in one order and in 64 bits.
#[allow(clippy::cast_possible_truncation)]
fn length(row: &[f32]) -> f32 {
    const LANES: usize = 8;
    let mut lanes = [0.0_f64; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }
    let rest: f64 = rest.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
    // A row of zeros has no direction; nothing is divided by its length.
    ((lanes.iter().sum::<f64>() + rest).sqrt() as f32).max(f32::MIN_POSITIVE)
}

struct Dora {
    norms: Arc<[f32]>,
}

impl CustomOp3 for Dora {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        base: &CpuStorage,
        base_layout: &Layout,
        delta: &CpuStorage,
        delta_layout: &Layout,
        magnitude: &CpuStorage,
        magnitude_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let columns = self.norms.len();
        let shape = base_layout.shape();
        if shape != delta_layout.shape()
            || shape.dims2()?.1 != columns
            || magnitude_layout.dims() != [columns]
        {
            return Err(mismatch(NAME, "base, delta, magnitude and norms do not fit each other"));
        }
        let (base, delta) =
            (f32_slice(base, base_layout, NAME)?, f32_slice(delta, delta_layout, NAME)?);
        let factors = self.factors(f32_slice(magnitude, magnitude_layout, NAME)?);
        let mut out = vec![0.0; base.len()];
        for_each_rows(&mut out, columns, 4 * columns, |first, out| {
            let from = first * columns;
            let rows = out.chunks_exact_mut(columns);
            let inputs =
                base[from..].chunks_exact(columns).zip(delta[from..].chunks_exact(columns));
            for (out, (base, delta)) in rows.zip(inputs) {
                let terms = base.iter().zip(delta).zip(&factors);
                for (out, ((base, delta), factor)) in out.iter_mut().zip(terms) {
                    *out = (factor - 1.0) * base + factor * delta;
                }
            }
        });
        Ok((CpuStorage::F32(out), shape.clone()))
    }

    /// `dbase = (f - 1) * dy`, `ddelta = f * dy`, `dm = sum over rows of dy * (base + delta) / norm`.
    fn bwd(
        &self,
        base: &Tensor,
        delta: &Tensor,
        magnitude: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let columns = self.norms.len();
        let factors = with_f32(magnitude, NAME, |magnitude| Ok(self.factors(magnitude)))?;
        with_f32(grad, NAME, |grad| {
            let scaled = |shift: f32| {
                let mut out = grad.to_vec();
                for_each_rows(&mut out, columns, columns, |_, out| {
                    for row in out.chunks_exact_mut(columns) {
                        row.iter_mut().zip(&factors).for_each(|(to, f)| *to *= f - shift);
                    }
                });
                tensor(out, base.shape().clone())
            };
            let grad_base = if base.track_op() { Some(scaled(1.0)?) } else { None };
            let grad_delta = if delta.track_op() { Some(scaled(0.0)?) } else { None };
            let mut sums = vec![0.0_f32; columns];
            with_f32(base, NAME, |base| {
                with_f32(delta, NAME, |delta| {
                    let inputs = base.chunks_exact(columns).zip(delta.chunks_exact(columns));
                    for (grad, (base, delta)) in grad.chunks_exact(columns).zip(inputs) {
                        let terms = grad.iter().zip(base).zip(delta);
                        for (sum, ((grad, base), delta)) in sums.iter_mut().zip(terms) {
                            *sum += grad * (base + delta);
                        }
                    }
                    Ok(())
                })
            })?;
            sums.iter_mut().zip(&*self.norms).for_each(|(sum, norm)| *sum /= norm);
            Ok((grad_base, grad_delta, Some(tensor(sums, columns)?)))
        })
    }
}

impl Dora {
    fn factors(&self, magnitude: &[f32]) -> Vec<f32> {
        magnitude.iter().zip(&*self.norms).map(|(magnitude, norm)| magnitude / norm).collect()
    }
}

struct AddAt {
    start: usize,
}

impl InplaceOp2 for AddAt {
    fn name(&self) -> &'static str {
        "add_rows"
    }

    fn cpu_fwd(
        &self,
        output: &mut CpuStorage,
        output_layout: &Layout,
        update: &CpuStorage,
        update_layout: &Layout,
    ) -> Result<()> {
        let (_, columns) = output_layout.shape().dims2()?;
        let (rows, update_columns) = update_layout.shape().dims2()?;
        let (begin, end) = output_layout
            .contiguous_offsets()
            .ok_or_else(|| mismatch(NAME, "the output is not contiguous"))?;
        let CpuStorage::F32(output) = output else {
            return Err(mismatch(NAME, "the output is not f32"));
        };
        let from = begin + self.start * columns;
        if columns != update_columns || from + rows * columns > end {
            return Err(mismatch(NAME, "the update does not fit into the output"));
        }
        let update = f32_slice(update, update_layout, NAME)?;
        output[from..].iter_mut().zip(update).for_each(|(to, value)| *to += value);
        Ok(())
    }
}
