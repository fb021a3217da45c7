//! DoRA: the rows of `W + scale * B A` keep their direction and get a trained length
//! (Liu et al. 2024, <https://arxiv.org/abs/2402.09353>), as PEFT computes it.

use candle_core::{DType, Device, Tensor};

use super::{
    LoraModule, plain,
    variant::{Contribution, Variant, add_rows},
};
use crate::ops::{
    dora,
    linear::linear,
    lora::{self, LoraPart},
    weight::Weight,
};

pub(super) const DORA: Variant = Variant {
    name: "dora",
    field: Some("use_dora"),
    vector: Some("lora_magnitude_vector"),
    start,
    apply,
    fold,
    is_sum: false,
};

/// The norms of the base's rows: nothing has changed yet.
fn start(weight: &Weight) -> candle_core::Result<Option<Tensor>> {
    let (out_features, in_features) = weight.dims2()?;
    let zeros = |rows, columns| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu);
    dora::row_norms(weight, &zeros(1, in_features)?, &zeros(out_features, 1)?, 0.0).map(Some)
}

fn apply(
    module: &LoraModule,
    contribution: &Contribution<'_>,
    output: Tensor,
) -> candle_core::Result<Tensor> {
    let Contribution { at, rows, input, dropped } = contribution;
    // 1. W x without the bias; of the dropped input, if there is dropout.
    let base = match (dropped, at.bias) {
        (true, _) => linear(input, at.weight, None)?,
        (false, None) => output.narrow(0, rows.start, rows.len())?,
        (false, Some(bias)) => output.narrow(0, rows.start, rows.len())?.broadcast_sub(bias)?,
    };
    // 2. LoRA's contribution, which is that of serving bit for bit.
    let frozen = module.part().filter(|_| !input.track_op() && !output.track_op());
    let delta = match frozen {
        Some(part) => {
            let delta = base.zeros_like()?;
            lora::add_in_place(&delta, input, vec![(0..rows.len(), part.clone())])?;
            delta
        }
        None => {
            let [a, b] = module.matrices()?;
            lora::lora(input, &a, &b, module.scale)?
        }
    };
    // 3. Both under the trained length.
    let magnitude = module.vector().ok_or_else(|| missing("magnitude"))?;
    let update = dora::dora(&base, &delta, magnitude, &norms(module, at.weight)?)?;
    if frozen.is_some() {
        dora::add_rows_in_place(&output, &update, rows.start)?;
        return Ok(output);
    }
    add_rows(&output, &update, rows)
}

/// Of the rows of `W + scale * B A`, as they are now; a frozen module's are computed once for
/// its first base, and over another one in each pass, as PEFT does.
pub(super) fn norms(module: &LoraModule, weight: &Weight) -> candle_core::Result<Tensor> {
    module.once(weight, || {
        let [a, b] = module.matrices()?;
        dora::row_norms(weight, &a, &b, module.scale)
    })
}

/// What a frozen module adds over `weight`, with its factors; `None` over another base than the first.
pub(super) fn part<'a>(module: &'a LoraModule, weight: &Weight) -> Option<&'a LoraPart> {
    if !module.has_followed() {
        norms(module, weight).ok()?;
    }
    module.followed_part(weight)
}

/// `m / |W + scale * B A| * (W + scale * B A)`, row by row.
fn fold(module: &LoraModule, weight: Tensor) -> candle_core::Result<Tensor> {
    let [a, b] = module.matrices()?;
    let norms = dora::row_norms(&Weight::Plain(weight.clone()), &a, &b, module.scale)?;
    let magnitude = module.vector().ok_or_else(|| missing("magnitude"))?;
    let factors = (magnitude.detach() / norms)?.unsqueeze(1)?;
    plain::fold(module, weight)?.broadcast_mul(&factors)
}

fn missing(what: &str) -> candle_core::Error {
    candle_core::Error::Msg(format!("a module of DoRA has no {what}"))
}
