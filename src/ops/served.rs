//! Projections of the same rows, and what adapters add to them, where nothing is tracked: the body of serving.
//!
//! The sums are those of [`super::linear`] and [`super::lora`], bit for bit.

use std::{ops::Range, sync::Arc};

use candle_core::{Result, Tensor};

use super::{
    lora::LoraPart,
    profile::{self, Op, time},
    storage::{mismatch, tensor, with_f32},
};
use crate::kernels::{Additions, LoraTarget, PackedWeight, best, buffer};

const NAME: &str = "projections";

/// A projection of the base, and what adapters add to some rows of its output.
pub struct ServedProjection<'a> {
    /// `[out, in]`
    pub weight: &'a Arc<PackedWeight>,
    /// `[out]`
    pub bias: Option<&'a Tensor>,
    /// In the order of their rows, none of which has two adapters.
    pub parts: Vec<(Range<usize>, &'a LoraPart)>,
}

/// `x [rows, in]` -> the output `[rows, out]` of each projection. `op` is the step's part that they belong to.
///
/// # Errors
/// Where shapes or dtypes do not fit, or rows lie outside.
pub fn projections(x: &Tensor, served: &[ServedProjection<'_>], op: Op) -> Result<Vec<Tensor>> {
    let (rows, in_features) = x.dims2()?;
    for ServedProjection { weight, parts, .. } in served {
        if weight.shape()[1] != in_features {
            let what = format!("x {:?} against weight {:?}", x.dims(), weight.shape());
            return Err(mismatch(NAME, &what));
        }
        for (range, part) in parts {
            if range.end > rows {
                return Err(mismatch(NAME, &format!("rows {range:?} lie outside the batch")));
            }
            if part.shape() != weight.shape() {
                return Err(mismatch(NAME, "x, A and B do not fit each other"));
            }
        }
    }
    let mut outputs: Vec<_> =
        served.iter().map(|served| buffer(rows * served.weight.shape()[0])).collect();
    let biases = served.iter().map(|served| served.bias.map(Tensor::to_vec1::<f32>).transpose());
    let biases = biases.collect::<Result<Vec<_>>>()?;
    with_f32(x, NAME, |x| {
        if served.iter().all(|served| served.parts.is_empty()) {
            for ((served, bias), out) in served.iter().zip(&biases).zip(&mut outputs) {
                let _time = time(op).work(|| work(served.weight, rows));
                served.weight.linear(best(), x, bias.as_deref(), out);
            }
        } else {
            with_adapters(x, in_features, served, &biases, &mut outputs, op);
        }
        Ok(())
    })?;
    let shaped = outputs.into_iter().zip(served);
    shaped.map(|(out, served)| tensor(out, (rows, served.weight.shape()[0]))).collect()
}

/// Bytes and operations of a product.
fn work(weight: &PackedWeight, rows: usize) -> (usize, usize) {
    (weight.num_bytes(), 2 * rows * weight.shape().iter().product::<usize>())
}

/// Products and additions in one. What time the additions take within a product counts as theirs.
fn with_adapters(
    x: &[f32],
    in_features: usize,
    served: &[ServedProjection<'_>],
    biases: &[Option<Vec<f32>>],
    outputs: &mut [Vec<f32>],
    op: Op,
) {
    let timer = time(Op::Lora).work(|| {
        let parts = served.iter().flat_map(|served| &served.parts);
        parts.map(|(rows, part)| part.work(rows.len())).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
    });
    let targets = served.iter().zip(biases).map(|(served, bias)| LoraTarget {
        out_features: served.weight.shape()[0],
        bias: bias.as_deref(),
        segments: served.parts.iter().map(|(rows, part)| part.segment(rows.clone())).collect(),
    });
    let additions = Additions::new(best(), x, in_features, targets.collect());
    drop(timer);
    for (index, (served, out)) in served.iter().zip(outputs).enumerate() {
        let timer =
            time(op).work(|| work(served.weight, x.len().checked_div(in_features).unwrap_or(0)));
        let aside = additions.product(index, served.weight, out);
        drop(timer);
        profile::shift(op, Op::Lora, aside);
    }
    let _time = time(Op::Lora);
    additions.finish();
}
