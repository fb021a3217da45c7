//! Projections of the same rows, and what adapters add to them, where nothing is tracked: the body of serving.
//!
//! The sums are those of [`super::linear`] and [`super::lora`], bit for bit.

use std::{ops::Range, sync::Arc};

use candle_core::{Result, Tensor};

use super::{
    lora::LoraPart,
    profile::{Op, time},
    storage::{mismatch, tensor, with_f32},
};
use crate::kernels::{LoraOutput, PackedWeight, add_loras, best, buffer};

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
        for ((served, bias), out) in served.iter().zip(&biases).zip(&mut outputs) {
            let elements = served.weight.shape().iter().product::<usize>();
            let _time = time(op).work(|| (served.weight.num_bytes(), 2 * rows * elements));
            served.weight.linear(best(), x, bias.as_deref(), out);
        }
        if served.iter().any(|served| !served.parts.is_empty()) {
            add(x, served, &biases, &mut outputs);
        }
        Ok(())
    })?;
    let shaped = outputs.into_iter().zip(served);
    shaped.map(|(out, served)| tensor(out, (rows, served.weight.shape()[0]))).collect()
}

fn add(
    x: &[f32],
    served: &[ServedProjection<'_>],
    biases: &[Option<Vec<f32>>],
    outputs: &mut [Vec<f32>],
) {
    let _time = time(Op::Lora).work(|| {
        let parts = served.iter().flat_map(|served| &served.parts);
        parts.map(|(rows, part)| part.work(rows.len())).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
    });
    let targets = served.iter().zip(biases).zip(outputs).map(|((served, bias), out)| LoraOutput {
        out,
        out_features: served.weight.shape()[0],
        bias: bias.as_deref(),
        segments: served.parts.iter().map(|(rows, part)| part.segment(rows.clone())).collect(),
    });
    let in_features = served[0].weight.shape()[1];
    add_loras(best(), x, in_features, &mut targets.collect::<Vec<_>>());
}
