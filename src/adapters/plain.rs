//! LoRA: a projection's output grows by `scale * B (A x)`
//! (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>).

use candle_core::Tensor;

use super::{
    LoraModule,
    variant::{Contribution, Variant, add_rows},
};
use crate::ops::lora;

pub(super) const PLAIN: Variant = Variant {
    name: "lora",
    field: None,
    vector: None,
    start: |_| Ok(None),
    apply,
    fold,
    is_sum: true,
};

fn apply(
    module: &LoraModule,
    Contribution { at, rows, input, .. }: &Contribution<'_>,
    output: Tensor,
) -> candle_core::Result<Tensor> {
    if let Some(part) = module.part()
        && !input.track_op()
        && !output.track_op()
    {
        lora::add_in_place(&output, at.input, vec![(rows.clone(), part.clone())])?;
        return Ok(output);
    }
    let [a, b] = module.matrices()?;
    add_rows(&output, &lora::lora(input, &a, &b, module.scale)?, rows)
}

/// `W + scale * B A`.
pub(super) fn fold(module: &LoraModule, weight: Tensor) -> candle_core::Result<Tensor> {
    let [a, b] = module.matrices()?;
    weight + (b.detach().matmul(&a.detach())? * module.scale)?
}
