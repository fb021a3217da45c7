//! Low-rank additions to a product's output: `out += scale * (x A^T) B^T`, for rows of many adapters
//! of different ranks at once, where they are: no row is copied, none is padded, and rows without an
//! adapter are not looked at. Products of the same rows, such as those to queries, keys and values, are
//! added to together.
//!
//! A and B come from memory, and are used once a step; the products that they are added to are a matter of
//! arithmetic as soon as there are several rows. So both are done in one: between the tiles of the products,
//! one thread at a time goes on with the additions, as far as the products have come, while the others
//! compute. What is left is a job of its own.
//!
//! First come the sums `x A^T` ([`lora_shrink`](super::lora_shrink)), then those with B, of tiles that are there.
//! Each sum has the order of `product.rs`: a row's addition is the same alone and beside any others.

use std::ops::Range;

pub(super) use super::lora_sums::{ExpandTile, ShrinkSum, expand_tile, shrink_sums};
use super::{Kernels, lora_additions::Additions, panels::PackedWeight, simd::LANES};

/// Segments with more rows than these are shrunk as products of their own.
pub(super) const FEW_ROWS: usize = 8;

/// Rows of one adapter.
#[derive(Clone)]
pub struct LoraSegment<'a> {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// `A [rank, in]`, in an exact form.
    pub a: &'a PackedWeight,
    /// `B [out, rank]`, in an exact form.
    pub b: &'a PackedWeight,
    /// Factor on the product.
    pub scale: f32,
    /// DoRA's `f = magnitude / norm`, `[out]`: with it, the output grows by `(f - 1) * base + f * addition`,
    /// `base` being the output without its bias.
    pub factors: Option<&'a [f32]>,
}

/// A product's output, and the adapters that add to its rows.
pub struct LoraOutput<'a> {
    /// `[rows, out_features]`
    pub out: &'a mut [f32],
    /// Its columns.
    pub out_features: usize,
    /// In the order of their rows, none of which has two adapters.
    pub segments: Vec<LoraSegment<'a>>,
}

/// Adds what the segments' adapters make of `x [rows, in]` to `out [rows, out]`.
///
/// # Panics
/// As [`add_loras`].
pub fn add_lora(
    kernels: &Kernels,
    x: &[f32],
    segments: &[LoraSegment<'_>],
    (in_features, out_features): (usize, usize),
    out: &mut [f32],
) {
    let output = LoraOutput { out, out_features, segments: segments.to_vec() };
    add_loras(kernels, x, in_features, &mut [output]);
}

/// Adds what the adapters make of `x [rows, in]` to each of the outputs, which are products of these rows
/// without a bias.
///
/// # Panics
/// Where matrices do not fit `in_features` and an output, or segments lie outside or overlap.
pub fn add_loras(kernels: &Kernels, x: &[f32], in_features: usize, outputs: &mut [LoraOutput<'_>]) {
    let targets = outputs.iter().map(|output| LoraTarget {
        out_features: output.out_features,
        bias: None,
        segments: output.segments.clone(),
    });
    let additions = Additions::new(kernels, x, in_features, targets.collect());
    for (index, output) in outputs.iter_mut().enumerate() {
        additions.add_to(index, output.out);
    }
    additions.finish();
}

/// What adapters add to one product.
pub struct LoraTarget<'a> {
    /// Columns of the product.
    pub out_features: usize,
    /// The product's bias, `[out]`.
    pub bias: Option<&'a [f32]>,
    /// In the order of their rows, none of which has two adapters.
    pub segments: Vec<LoraSegment<'a>>,
}

/// One product.
pub(super) struct Target<'a> {
    pub(super) out_features: usize,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) parts: Vec<Part<'a>>,
}

/// A segment that has something to add.
pub(super) struct Part<'a> {
    pub(super) segment: LoraSegment<'a>,
    /// Where its `x A^T` begins, `[rows, stride]`: the rank in whole panels.
    pub(super) hidden: usize,
    pub(super) stride: usize,
}

impl Part<'_> {
    pub(super) fn rows(&self) -> usize {
        self.segment.rows.len()
    }

    /// Bytes of B in some panels, as often as they are read for so many rows.
    pub(super) fn expand_work(&self, rows: usize, panels: usize) -> usize {
        rows.div_ceil(FEW_ROWS) * panels * self.segment.b.panel_bytes()
    }
}

/// The segments that have something to add; refuses what does not fit.
pub(super) fn check<'a>(target: LoraTarget<'a>, in_features: usize, num_rows: usize) -> Target<'a> {
    let LoraTarget { out_features, bias, segments } = target;
    assert!(bias.is_none_or(|bias| bias.len() == out_features), "the bias");
    let mut free = 0;
    for LoraSegment { rows, a, b, factors, .. } in &segments {
        let rank = a.shape()[0];
        assert_eq!((a.shape(), b.shape()), ([rank, in_features], [out_features, rank]), "A or B");
        assert!(a.form().is_exact() && b.form().is_exact(), "A or B is rounded");
        assert!(factors.is_none_or(|factors| factors.len() == out_features), "factors");
        assert!(free <= rows.start && rows.start <= rows.end, "rows of two adapters");
        assert!(rows.end <= num_rows || in_features == 0, "rows of x");
        free = rows.end;
    }
    let has_work = |segment: &LoraSegment<'_>| {
        let size = segment.rows.len() * segment.a.shape()[0] * in_features * out_features;
        size > 0
    };
    let part = |segment: LoraSegment<'a>| {
        let stride = segment.a.shape()[0].next_multiple_of(LANES);
        Part { segment, hidden: 0, stride }
    };
    let parts = segments.into_iter().filter(has_work).map(part).collect();
    Target { out_features, bias, parts }
}
