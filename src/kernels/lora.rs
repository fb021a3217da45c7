//! Low-rank additions to a product's output: `out += scale * (x A^T) B^T`, for rows of many adapters
//! of different ranks at once, where they are: no row is copied, none is padded, and rows without an
//! adapter are not looked at.
//!
//! Each sum has the order of `product.rs`: a row's addition is the same alone and beside any others.
#![allow(clippy::needless_range_loop, reason = "chains are indexed")]

use std::ops::Range;

use half::{bf16, f16};

use super::{
    Kernels,
    panels::{PackedWeight, WeightForm},
    product::SUM_BLOCK,
    simd::{LANES, Simd, Weight, load_partial, store_partial},
    threads::{Shared, for_each_range},
};

/// Sums that are under way at once, so that none waits for the one before it.
const CHAINS: usize = 4;
/// Panels by which B is asked for before it is read.
const AHEAD: usize = 2 * CHAINS;
/// How far ahead A is asked for.
const PREFETCH_BYTES: usize = 1024;
/// Segments with more rows than these are shrunk as products of their own.
const FEW_ROWS: usize = 8;

/// Rows of one adapter.
pub struct LoraSegment<'a> {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// `A [rank, in]`, in an exact form.
    pub a: &'a PackedWeight,
    /// `B [out, rank]`, in an exact form.
    pub b: &'a PackedWeight,
    /// Factor on the product.
    pub scale: f32,
}

/// Adds what the segments' adapters make of `x [rows, in]` to `out [rows, out]`.
///
/// # Panics
/// Where the matrices do not fit `in_features` and `out_features`, or a segment lies outside.
pub fn add_lora(
    kernels: &Kernels,
    x: &[f32],
    segments: &[LoraSegment<'_>],
    (in_features, out_features): (usize, usize),
    out: &mut [f32],
) {
    let mut hidden_length = 0;
    for LoraSegment { rows, a, b, .. } in segments {
        let rank = a.shape()[0];
        assert_eq!((a.shape(), b.shape()), ([rank, in_features], [out_features, rank]), "A or B");
        assert!(a.form().is_exact() && b.form().is_exact(), "A or B is rounded");
        assert!(rows.start <= rows.end && rows.end * in_features <= x.len(), "rows of x");
        assert!(rows.end * out_features <= out.len(), "rows of the output");
        hidden_length += rows.len() * rank;
    }
    if in_features == 0 || out_features == 0 || hidden_length == 0 {
        return;
    }
    let mut hidden = vec![0.0; hidden_length];
    shrink(kernels, x, segments, in_features, &mut hidden);
    // One pass over the columns of the output; each task adds to all segments' rows.
    let work = hidden_length * LANES;
    let shared = Shared(out.as_mut_ptr());
    for_each_range(out_features.div_ceil(LANES), CHAINS, work, |panels| {
        let tile =
            ExpandTile { hidden: &hidden, segments, out: shared.get(), out_features, panels };
        // SAFETY: rows and matrices were checked above; tasks write disjoint columns.
        unsafe { (kernels.expand)(&tile) };
    });
}

/// `hidden = x A^T`, segment after segment, `[rows][rank]`.
fn shrink(
    kernels: &Kernels,
    x: &[f32],
    segments: &[LoraSegment<'_>],
    in_features: usize,
    hidden: &mut [f32],
) {
    let mut rest = hidden;
    let mut sums = Vec::with_capacity(segments.len());
    for LoraSegment { rows, a, .. } in segments {
        let rank = a.shape()[0];
        let (part, after) = rest.split_at_mut(rows.len() * rank);
        rest = after;
        let x = &x[rows.start * in_features..rows.end * in_features];
        if rows.len() > FEW_ROWS {
            a.linear(kernels, x, None, part);
            continue;
        }
        for (x, part) in x.chunks_exact(in_features).zip(part.chunks_exact_mut(rank.max(1))) {
            for (panel, to) in part.chunks_mut(LANES).enumerate() {
                let from = a.data.bytes()[panel * a.panel_bytes()..].as_ptr();
                let (x, to, count) = (x.as_ptr(), to.as_mut_ptr(), to.len());
                sums.push(ShrinkSum { x, a: from, form: a.form(), to, count });
            }
        }
    }
    // Chains that run beside each other read the same form.
    sums.sort_by_key(|sum| sum.form != WeightForm::Bf16);
    let sums = &sums[..];
    for_each_range(sums.len().div_ceil(CHAINS), 1, CHAINS * in_features * LANES, |chunks| {
        let range = chunks.start * CHAINS..(chunks.end * CHAINS).min(sums.len());
        // SAFETY: each sum has its own row of x, panel of A and place in `hidden`, all long enough.
        unsafe { (kernels.shrink)(&sums[range], in_features) };
    });
}

/// Up to sixteen elements of a row's `x A^T`.
pub(super) struct ShrinkSum {
    x: *const f32,
    /// A panel of `A`.
    a: *const u8,
    form: WeightForm,
    to: *mut f32,
    count: usize,
}

// SAFETY: `x` and `a` are only read, and no two sums have the same `to`.
unsafe impl Send for ShrinkSum {}
// SAFETY: as above.
unsafe impl Sync for ShrinkSum {}

/// # Safety
/// Each sum's pointers are valid for `terms` and `count`, nobody else uses its `to`, and the CPU has
/// the features of `S`.
#[inline(always)]
pub(super) unsafe fn shrink_sums<S: Simd>(sums: &[ShrinkSum], terms: usize) {
    for group in sums.chunks(CHAINS) {
        for same in group.chunk_by(|a, b| a.form == b.form) {
            // SAFETY: by contract.
            unsafe {
                match same[0].form {
                    WeightForm::Bf16 => shrink_group::<S, bf16>(same, terms),
                    WeightForm::F16 => shrink_group::<S, f16>(same, terms),
                    // `add_lora` takes no others.
                    WeightForm::F32 | WeightForm::Bf16Dot | WeightForm::Int8 | WeightForm::Int4 => {
                        shrink_group::<S, f32>(same, terms);
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`shrink_sums`], with at most [`CHAINS`] sums, whose panels hold elements of type `W`.
#[inline(always)]
unsafe fn shrink_group<S: Simd, W: Weight>(group: &[ShrinkSum], terms: usize) {
    // Where there are fewer, the last one is computed again and not stored.
    let at = |i: usize| &group[i.min(group.len() - 1)];
    let x: [_; CHAINS] = std::array::from_fn(|i| at(i).x);
    let a: [_; CHAINS] = std::array::from_fn(|i| at(i).a.cast::<W>());
    // SAFETY: by contract.
    unsafe {
        let mut totals = [S::splat(0.0); CHAINS];
        for start in (0..terms).step_by(SUM_BLOCK) {
            let end = (start + SUM_BLOCK).min(terms);
            let mut block = [S::splat(0.0); CHAINS];
            for term in (start..end).step_by(2) {
                for i in 0..CHAINS {
                    let from = a[i].add(term * LANES);
                    S::prefetch(from.cast::<u8>().wrapping_add(PREFETCH_BYTES));
                    let [first, second] = W::load_pair::<S>(from);
                    block[i] = S::fma(S::splat(*x[i].add(term)), first, block[i]);
                    if term + 1 < end {
                        block[i] = S::fma(S::splat(*x[i].add(term + 1)), second, block[i]);
                    }
                }
            }
            for i in 0..CHAINS {
                totals[i] = if start == 0 { block[i] } else { S::add(totals[i], block[i]) };
            }
        }
        let mut done = [[0.0_f32; LANES]; CHAINS];
        for i in 0..CHAINS {
            S::store(done[i].as_mut_ptr(), totals[i]);
        }
        for (sum, done) in group.iter().zip(&done) {
            store_partial::<S>(sum.to, S::load(done.as_ptr()), sum.count);
        }
    }
}

/// Some columns of the output, over all segments.
pub(super) struct ExpandTile<'a> {
    hidden: &'a [f32],
    segments: &'a [LoraSegment<'a>],
    out: *mut f32,
    out_features: usize,
    panels: Range<usize>,
}

/// # Safety
/// The segments' rows exist in `out`, `panels` lie within its columns, nobody else uses these columns,
/// and the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn expand_tile<S: Simd>(tile: &ExpandTile<'_>) {
    let mut done = 0;
    for segment in tile.segments {
        let length = segment.rows.len() * segment.b.shape()[1];
        let hidden = &tile.hidden[done..done + length];
        done += length;
        // SAFETY: by contract.
        unsafe {
            match segment.b.form() {
                WeightForm::Bf16 => expand_segment::<S, bf16>(tile, segment, hidden),
                WeightForm::F16 => expand_segment::<S, f16>(tile, segment, hidden),
                WeightForm::F32 | WeightForm::Bf16Dot | WeightForm::Int8 | WeightForm::Int4 => {
                    expand_segment::<S, f32>(tile, segment, hidden);
                }
            }
        }
    }
}

/// # Safety
/// As [`expand_tile`]; `segment` is one of its segments, and its B has elements of type `W`.
#[inline(always)]
unsafe fn expand_segment<S: Simd, W: Weight>(
    tile: &ExpandTile<'_>,
    LoraSegment { rows, b, scale, .. }: &LoraSegment<'_>,
    hidden: &[f32],
) {
    let (rank, panel_bytes) = (b.shape()[1], b.panel_bytes());
    let stride = tile.out_features;
    let mut panel = tile.panels.start;
    while panel < tile.panels.end {
        let left = tile.panels.end - panel;
        let column = panel * LANES;
        let from = b.data.bytes()[panel * panel_bytes..].as_ptr();
        // SAFETY: by contract; a panel has `rank` vectors at least, in whole pairs.
        unsafe {
            let to = tile.out.add(rows.start * stride + column);
            let count = (stride - column).min(LANES);
            let mut row = 0;
            if rows.len() == 1 && left >= CHAINS && column + CHAINS * LANES <= stride {
                // One row: some panels at once.
                for line in (0..CHAINS * panel_bytes).step_by(64) {
                    S::prefetch(from.wrapping_add(AHEAD * panel_bytes + line));
                }
                let at: [_; CHAINS] = std::array::from_fn(|i| {
                    (from.add(i * panel_bytes).cast::<W>(), hidden.as_ptr())
                });
                let sums = chains::<S, W, CHAINS>(&at, rank);
                for i in 0..CHAINS {
                    add::<S>(to.add(i * LANES), sums[i], *scale, LANES);
                }
                panel += CHAINS;
                continue;
            }
            while row < rows.len() {
                let take = if rows.len() - row >= CHAINS { CHAINS } else { 1 };
                let at = |i: usize| (from.cast::<W>(), hidden.as_ptr().add((row + i) * rank));
                if take == CHAINS {
                    let at: [_; CHAINS] = std::array::from_fn(at);
                    let sums = chains::<S, W, CHAINS>(&at, rank);
                    for i in 0..CHAINS {
                        add::<S>(to.add((row + i) * stride), sums[i], *scale, count);
                    }
                } else {
                    let [sum] = chains::<S, W, 1>(&[at(0)], rank);
                    add::<S>(to.add(row * stride), sum, *scale, count);
                }
                row += take;
            }
        }
        panel += 1;
    }
}

/// Sums that run beside each other, each of a panel of B and a row of `hidden`.
///
/// # Safety
/// Each row has `rank` elements, each panel `rank` vectors in whole pairs; the CPU has the features of
/// `S`.
#[inline(always)]
unsafe fn chains<S: Simd, W: Weight, const MR: usize>(
    at: &[(*const W, *const f32); MR],
    rank: usize,
) -> [S::V; MR] {
    // SAFETY: by contract.
    unsafe {
        let mut totals = [S::splat(0.0); MR];
        for start in (0..rank).step_by(SUM_BLOCK) {
            let end = (start + SUM_BLOCK).min(rank);
            let mut block = [S::splat(0.0); MR];
            for k in (start..end).step_by(2) {
                for i in 0..MR {
                    let (panel, hidden) = at[i];
                    let [first, second] = W::load_pair::<S>(panel.add(k * LANES));
                    block[i] = S::fma(S::splat(*hidden.add(k)), first, block[i]);
                    if k + 1 < end {
                        block[i] = S::fma(S::splat(*hidden.add(k + 1)), second, block[i]);
                    }
                }
            }
            for i in 0..MR {
                totals[i] = if start == 0 { block[i] } else { S::add(totals[i], block[i]) };
            }
        }
        totals
    }
}

/// `to[..count] += scale * sum`.
///
/// # Safety
/// `to` is valid for `count` elements; the CPU has the features of `S`.
#[inline(always)]
unsafe fn add<S: Simd>(to: *mut f32, sum: S::V, scale: f32, count: usize) {
    // SAFETY: by contract.
    unsafe {
        let value = S::mul(sum, S::splat(scale));
        if count == LANES {
            S::store(to, S::add(S::load(to), value));
        } else {
            store_partial::<S>(to, S::add(load_partial::<S>(to, count), value), count);
        }
    }
}
