//! Low-rank additions to a product's output: `out += scale * (x A^T) B^T`, for rows of many adapters
//! of different ranks at once, where they are: no row is copied, none is padded, and rows without an
//! adapter are not looked at.
//!
//! Each sum has the order of `product.rs`: a row's addition is the same alone and beside any others.
#![allow(clippy::needless_range_loop, reason = "chains are indexed")]

use std::ops::Range;

use super::{
    Kernels,
    panels::{PackedWeight, WeightForm},
    product::SUM_BLOCK,
    simd::{LANES, Simd, load_partial, store_partial},
    threads::{Shared, for_each_range},
};

/// Sums that are under way at once, so that none waits for the one before it.
const CHAINS: usize = 4;
/// Segments with more rows than these are shrunk as products of their own.
const FEW_ROWS: usize = 8;

/// Rows of one adapter.
pub struct LoraSegment<'a> {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// `A [rank, in]`, f32.
    pub a: &'a PackedWeight,
    /// `B [out, rank]`, f32.
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
        assert_eq!((a.form(), b.form()), (WeightForm::F32, WeightForm::F32), "A or B");
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
    for_each_range(out_features.div_ceil(LANES), 1, work, |panels| {
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
    let mut sums = Vec::new();
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
                let a = a.data.bytes()[panel * a.panel_bytes()..].as_ptr().cast();
                sums.push(ShrinkSum { x: x.as_ptr(), a, to: to.as_mut_ptr(), count: to.len() });
            }
        }
    }
    let sums = &sums[..];
    // Short sums in a row are done before another thread is awake: an eighth of the work counts.
    let work = CHAINS * in_features * LANES / 8;
    for_each_range(sums.len().div_ceil(CHAINS), 1, work, |chunks| {
        let range = chunks.start * CHAINS..(chunks.end * CHAINS).min(sums.len());
        // SAFETY: each sum has its own row of x, panel of A and place in `hidden`, all long enough.
        unsafe { (kernels.shrink)(&sums[range], in_features) };
    });
}

/// Up to sixteen elements of a row's `x A^T`.
pub(super) struct ShrinkSum {
    x: *const f32,
    /// A panel of `A`.
    a: *const f32,
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
        // Where there are fewer, the last one is computed again and not stored.
        let at = |i: usize| &group[i.min(group.len() - 1)];
        let x: [_; CHAINS] = std::array::from_fn(|i| at(i).x);
        let a: [_; CHAINS] = std::array::from_fn(|i| at(i).a);
        // SAFETY: by contract.
        unsafe {
            let mut totals = [S::splat(0.0); CHAINS];
            for start in (0..terms).step_by(SUM_BLOCK) {
                let mut block = [S::splat(0.0); CHAINS];
                for term in start..(start + SUM_BLOCK).min(terms) {
                    for i in 0..CHAINS {
                        let weight = S::load(a[i].add(term * LANES));
                        block[i] = S::fma(S::splat(*x[i].add(term)), weight, block[i]);
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
    for LoraSegment { rows, b, scale, .. } in tile.segments {
        let rank = b.shape()[1];
        let hidden = &tile.hidden[done..done + rows.len() * rank];
        done += hidden.len();
        for panel in tile.panels.clone() {
            let column = panel * LANES;
            let count = (tile.out_features - column).min(LANES);
            let b = &b.data.bytes()[panel * b.panel_bytes()..][..b.panel_bytes()];
            let mut row = 0;
            while row < rows.len() {
                let take = (rows.len() - row).min(CHAINS);
                let at = |i: usize| (row + i.min(take - 1)) * rank;
                let starts: [_; CHAINS] = std::array::from_fn(at);
                // SAFETY: by contract; a panel has `rank` vectors at least.
                unsafe {
                    let to = tile.out.add((rows.start + row) * tile.out_features + column);
                    let (b, hidden) = (b.as_ptr().cast::<f32>(), hidden.as_ptr());
                    if take == CHAINS {
                        let sums = chains::<S, CHAINS>(b, hidden, &starts, rank);
                        for i in 0..CHAINS {
                            add::<S>(to.add(i * tile.out_features), sums[i], *scale, count);
                        }
                    } else {
                        for i in 0..take {
                            let [sum] = chains::<S, 1>(b, hidden, &[starts[i]], rank);
                            add::<S>(to.add(i * tile.out_features), sum, *scale, count);
                        }
                    }
                }
                row += take;
            }
        }
    }
}

/// The sums of some rows of `hidden` over one panel of B.
///
/// # Safety
/// Each start has `rank` elements after it, the panel `rank` vectors; the CPU has the features of `S`.
#[inline(always)]
unsafe fn chains<S: Simd, const MR: usize>(
    b: *const f32,
    hidden: *const f32,
    starts: &[usize; MR],
    rank: usize,
) -> [S::V; MR] {
    // SAFETY: by contract.
    unsafe {
        let mut totals = [S::splat(0.0); MR];
        for start in (0..rank).step_by(SUM_BLOCK) {
            let mut block = [S::splat(0.0); MR];
            for k in start..(start + SUM_BLOCK).min(rank) {
                let weight = S::load(b.add(k * LANES));
                for i in 0..MR {
                    block[i] = S::fma(S::splat(*hidden.add(starts[i] + k)), weight, block[i]);
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
