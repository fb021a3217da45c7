//! Low-rank additions to a product's output: `out += scale * (x A^T) B^T`, for rows of many adapters
//! of different ranks at once, where they are: no row is copied, none is padded, and rows without an
//! adapter are not looked at. Products of the same rows, such as those to queries, keys and values, are
//! added to together.
//!
//! Everything is one job of the pool. Its first tasks shrink: each sums a block of terms for some rows, and
//! whoever finishes the last one adds the blocks up. The others expand, once that is done.
//!
//! Each sum has the order of `product.rs`: a row's addition is the same alone and beside any others.

use std::{
    ops::Range,
    sync::atomic::{
        AtomicBool, AtomicUsize,
        Ordering::{AcqRel, Acquire, Release},
    },
};

pub(super) use super::lora_sums::{ExpandTile, ShrinkSum, expand_tile, shrink_sums};
use super::{
    Kernels,
    lora_shrink::Shrink,
    lora_sums::CHAINS,
    panels::PackedWeight,
    pool::{for_each_task, look_around},
    simd::LANES,
    threads::{Shared, num_threads},
};

/// Segments with more rows than these are shrunk as products of their own.
const FEW_ROWS: usize = 8;
/// Bytes of A and B, for each eight rows, that are not worth a second thread.
const MIN_PARALLEL_BYTES: usize = 24 << 10;
/// Tasks of either kind for each thread, where there is work for so many.
pub(super) const PIECES: usize = 8;
/// Bytes of B of one task, at least and at most.
const TILE_BYTES: [usize; 2] = [4 << 10, 32 << 10];
/// Rows and panels of a task where a segment has many rows.
const MANY_ROWS_TILE: (usize, usize) = (64, 16);

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
    /// What is in it beside the product, `[out]`.
    pub bias: Option<&'a [f32]>,
    /// In the order of their rows, none of which has two adapters.
    pub segments: Vec<LoraSegment<'a>>,
}

/// Adds what the segments' adapters make of `x [rows, in]` to `out [rows, out]`, a product of these rows without
/// a bias.
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
    let output = LoraOutput { out, out_features, bias: None, segments: segments.to_vec() };
    add_loras(kernels, x, in_features, &mut [output]);
}

/// Adds what the adapters make of `x [rows, in]` to each of the outputs, which are products of these rows.
///
/// # Panics
/// Where matrices do not fit `in_features` and an output, or segments lie outside or overlap.
pub fn add_loras(kernels: &Kernels, x: &[f32], in_features: usize, outputs: &mut [LoraOutput<'_>]) {
    let parts = parts(x, in_features, outputs);
    if in_features == 0 || parts.is_empty() {
        return;
    }
    let length = parts.iter().map(|part| part.hidden + part.rows * part.stride).max().unwrap_or(0);
    let mut hidden = vec![0.0; length];
    for part in parts.iter().filter(|part| part.rows > FEW_ROWS) {
        shrink_many(kernels, part, x, in_features, &mut hidden);
    }
    let bytes = parts.iter().map(|part| {
        (part.segment.a.num_bytes() + part.segment.b.num_bytes()) * part.rows.div_ceil(FEW_ROWS)
    });
    let threads = if bytes.sum::<usize>() < MIN_PARALLEL_BYTES { 1 } else { num_threads() };
    let few: Vec<&Part<'_>> = parts.iter().filter(|part| part.rows <= FEW_ROWS).collect();
    let shrink = Shrink::plan(&few, x, in_features, threads);
    let shared = Shared(hidden.as_mut_ptr());
    let tiles = expand_tiles(&parts, shared.get(), threads);
    let num_shrunk = AtomicUsize::new(0);
    let is_shrunk = AtomicBool::new(shrink.groups.is_empty());
    for_each_task(threads, shrink.groups.len() + tiles.len(), |task| {
        if let Some(group) = shrink.groups.get(task) {
            // SAFETY: each sum reads its block of a row and of a panel, and has a place of its own.
            unsafe { (kernels.shrink)(&shrink.sums[group.sums.clone()], group.terms) };
            if num_shrunk.fetch_add(1, AcqRel) + 1 == shrink.groups.len() {
                // SAFETY: all groups are done, and nobody reads `hidden` before it is said to be ready.
                unsafe { shrink.add_up(shared.get()) };
                is_shrunk.store(true, Release);
            }
            return;
        }
        // Tasks are begun in their order: what this one waits for is under way.
        while !is_shrunk.load(Acquire) {
            look_around(|| is_shrunk.load(Acquire));
        }
        // SAFETY: `parts` has checked rows and matrices; tiles are disjoint rectangles of the outputs.
        unsafe { (kernels.expand)(&tiles[task - shrink.groups.len()]) };
    });
}

/// A segment of one output.
pub(super) struct Part<'a> {
    pub(super) segment: &'a LoraSegment<'a>,
    pub(super) rows: usize,
    /// Where its `x A^T` begins, `[rows, stride]`: the rank in whole panels.
    pub(super) hidden: usize,
    pub(super) stride: usize,
    /// Its first row.
    out: *mut f32,
    out_features: usize,
    bias: Option<&'a [f32]>,
}

/// The segments that have something to add. Those of few rows have the first places in `hidden`.
fn parts<'a>(x: &[f32], in_features: usize, outputs: &'a mut [LoraOutput<'_>]) -> Vec<Part<'a>> {
    let mut parts = Vec::new();
    for LoraOutput { out, out_features, bias, segments } in outputs {
        let (mut free, out_features) = (0, *out_features);
        assert!(bias.is_none_or(|bias| bias.len() == out_features), "the bias");
        for segment in &*segments {
            let LoraSegment { rows, a, b, factors, .. } = segment;
            let rank = a.shape()[0];
            assert_eq!(
                (a.shape(), b.shape()),
                ([rank, in_features], [out_features, rank]),
                "A or B"
            );
            assert!(a.form().is_exact() && b.form().is_exact(), "A or B is rounded");
            assert!(factors.is_none_or(|factors| factors.len() == out_features), "factors");
            assert!(free <= rows.start && rows.start <= rows.end, "rows of two adapters");
            assert!(rows.end * in_features <= x.len(), "rows of x");
            assert!(rows.end * out_features <= out.len(), "rows of the output");
            free = rows.end;
            if rows.is_empty() || rank == 0 || out_features == 0 {
                continue;
            }
            let first = &mut out[rows.start * out_features..];
            parts.push(Part {
                segment,
                rows: rows.len(),
                hidden: 0,
                stride: rank.next_multiple_of(LANES),
                out: first.as_mut_ptr(),
                out_features,
                bias: *bias,
            });
        }
    }
    let mut length = 0;
    for many in [false, true] {
        for part in parts.iter_mut().filter(|part| (part.rows > FEW_ROWS) == many) {
            part.hidden = length;
            length += part.rows * part.stride;
        }
    }
    parts
}

/// `x A^T` of a segment of many rows.
fn shrink_many(
    kernels: &Kernels,
    part: &Part<'_>,
    x: &[f32],
    in_features: usize,
    hidden: &mut [f32],
) {
    let LoraSegment { rows, a, .. } = part.segment;
    let x = &x[rows.start * in_features..rows.end * in_features];
    let hidden = &mut hidden[part.hidden..][..part.rows * part.stride];
    let rank = a.shape()[0];
    if rank == part.stride {
        return a.linear(kernels, x, None, hidden);
    }
    let mut dense = vec![0.0; part.rows * rank];
    a.linear(kernels, x, None, &mut dense);
    for (to, from) in hidden.chunks_exact_mut(part.stride).zip(dense.chunks_exact(rank)) {
        to[..rank].copy_from_slice(from);
    }
}

/// The outputs' rectangles, one for each task.
fn expand_tiles(parts: &[Part<'_>], hidden: *mut f32, threads: usize) -> Vec<ExpandTile> {
    let bytes = parts.iter().map(|part| part.segment.b.num_bytes()).sum::<usize>();
    let bytes = (bytes / (threads * PIECES)).clamp(TILE_BYTES[0], TILE_BYTES[1]);
    let mut tiles: Vec<ExpandTile> = Vec::new();
    for part in parts {
        let b = part.segment.b;
        let (num_panels, panel_bytes) = (part.out_features.div_ceil(LANES), b.panel_bytes());
        let (at_once, panels) = if part.rows > FEW_ROWS {
            MANY_ROWS_TILE
        } else {
            (part.rows, (bytes / panel_bytes).max(1).next_multiple_of(CHAINS))
        };
        for row in (0..part.rows).step_by(at_once) {
            for panel in (0..num_panels).step_by(panels) {
                let column = panel * LANES;
                let from = |values: Option<&[f32]>| {
                    values.map_or(std::ptr::null(), |values| values[column..].as_ptr())
                };
                tiles.push(ExpandTile {
                    // SAFETY: the rows are within `hidden`, and the column within the output's rows.
                    hidden: unsafe { hidden.add(part.hidden + row * part.stride) },
                    hidden_stride: part.stride,
                    rows: (part.rows - row).min(at_once),
                    b: b.data.bytes()[panel * panel_bytes..].as_ptr(),
                    form: b.form(),
                    panel_bytes,
                    rank: b.shape()[1],
                    scale: part.segment.scale,
                    factors: from(part.segment.factors),
                    bias: from(part.bias),
                    // SAFETY: as above.
                    out: unsafe { part.out.add(row * part.out_features + column) },
                    out_features: part.out_features,
                    columns: (part.out_features - column).min(panels * LANES),
                    next: std::ptr::null(),
                });
            }
        }
    }
    for index in threads..tiles.len() {
        tiles[index - threads].next = tiles[index].b;
    }
    tiles
}
