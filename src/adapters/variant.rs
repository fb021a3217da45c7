//! The ways in which A and B can change a projection. A newcomer is a file like `dora.rs` and a line
//! in [`VARIANTS`].

use std::ops::Range;

use candle_core::Tensor;

use super::{LoraModule, dora, plain};
use crate::model::Projected;
use crate::ops::weight::Weight;

/// One way.
pub(super) struct Variant {
    /// What a user calls it.
    pub(super) name: &'static str,
    /// The field of adapter_config.json that is true for it; none for what PEFT takes for granted.
    pub(super) field: Option<&'static str>,
    /// Its trained vector `[out]` beside A and B, as the file names it; none if there is none.
    pub(super) vector: Option<&'static str>,
    /// The vector at the start, of a fresh A and B that add nothing to the base's weight.
    pub(super) start: fn(&Weight) -> candle_core::Result<Option<Tensor>>,
    /// The projection's output with the module's contribution on `rows`. `input` are these rows of the
    /// projection's input, with dropout if `dropped`. In place where nothing is tracked.
    pub(super) apply: fn(&LoraModule, &Contribution<'_>, Tensor) -> candle_core::Result<Tensor>,
    /// The f32 weight `[out, in]` with the module folded in.
    pub(super) fold: fn(&LoraModule, Tensor) -> candle_core::Result<Tensor>,
    /// Whether the contribution is the sum `scale * B (A x)`, which is made for many adapters at once.
    pub(super) is_sum: bool,
}

/// What a module contributes to.
pub(super) struct Contribution<'a> {
    pub(super) at: &'a Projected<'a>,
    pub(super) rows: Range<usize>,
    /// `[rows, in]`
    pub(super) input: Tensor,
    pub(super) dropped: bool,
}

/// Every variant that can be trained and served; the first is the one without a name in PEFT.
pub(super) const VARIANTS: &[Variant] = &[plain::PLAIN, dora::DORA];

/// Names of the variants, for messages and flags.
#[must_use]
pub fn variant_names() -> Vec<&'static str> {
    VARIANTS.iter().map(|variant| variant.name).collect()
}

/// The variant of that name.
pub(super) fn find(name: &str) -> Option<&'static Variant> {
    VARIANTS.iter().find(|variant| variant.name == name)
}

impl std::fmt::Debug for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// `output` with `update` added on `rows`; keeps the graph.
pub(super) fn add_rows(
    output: &Tensor,
    update: &Tensor,
    rows: &Range<usize>,
) -> candle_core::Result<Tensor> {
    let num_rows = output.dim(0)?;
    if *rows == (0..num_rows) {
        return output + update;
    }
    let middle = (output.narrow(0, rows.start, rows.len())? + update)?;
    let mut parts = Vec::new();
    if rows.start > 0 {
        parts.push(output.narrow(0, 0, rows.start)?);
    }
    parts.push(middle);
    if rows.end < num_rows {
        parts.push(output.narrow(0, rows.end, num_rows - rows.end)?);
    }
    Tensor::cat(&parts, 0)
}
