//! The sums of low-rank additions, some at once, so that none waits for the one before it.
#![allow(clippy::needless_range_loop, reason = "chains are indexed")]

use half::{bf16, f16};

use super::{
    panels::WeightForm,
    product::SUM_BLOCK,
    simd::{LANES, Simd, Weight, load_partial, store_partial},
};

/// Sums that are under way at once.
pub(super) const CHAINS: usize = 4;
/// Rows that share a panel of B, where there are so many.
const TILE_ROWS: usize = 8;
/// Bytes of a cache line.
const LINE: usize = 64;
/// How far ahead a panel of A is asked for.
const SHRINK_AHEAD: usize = 2048;
/// How far ahead B is asked for.
const EXPAND_AHEAD: usize = 4096;

/// A block of the terms of sixteen elements of a row's `x A^T`.
pub(super) struct ShrinkSum {
    /// The row's terms.
    pub(super) x: *const f32,
    /// The panel's terms.
    pub(super) a: *const u8,
    pub(super) form: WeightForm,
    pub(super) terms: usize,
    /// Sixteen elements.
    pub(super) to: *mut f32,
    /// What will probably be read after this; only asked for.
    pub(super) next: *const u8,
}

// SAFETY: `x` and `a` are only read, and no two sums have the same `to`.
unsafe impl Send for ShrinkSum {}
// SAFETY: as above.
unsafe impl Sync for ShrinkSum {}

/// # Safety
/// Each sum's pointers are valid, for `terms` of them and in whole pairs in `a`; nobody else uses its `to`;
/// all have one form; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn shrink_sums<S: Simd>(sums: &[ShrinkSum], terms: usize) {
    for group in sums.chunks(CHAINS) {
        // SAFETY: by contract.
        unsafe {
            match group[0].form {
                WeightForm::Bf16 => shrink_group::<S, bf16>(group, terms),
                WeightForm::F16 => shrink_group::<S, f16>(group, terms),
                // `add_loras` takes no others.
                WeightForm::F32 | WeightForm::Bf16Dot | WeightForm::Int8 | WeightForm::Int4 => {
                    shrink_group::<S, f32>(group, terms);
                }
            }
        }
    }
}

/// # Safety
/// As [`shrink_sums`], with at most [`CHAINS`] sums, whose panels hold elements of type `W`.
#[inline(always)]
unsafe fn shrink_group<S: Simd, W: Weight>(group: &[ShrinkSum], terms: usize) {
    // SAFETY: by contract.
    unsafe {
        match group.len() {
            1 => shrink_chains::<S, W, 1>(group, terms),
            2 => shrink_chains::<S, W, 2>(group, terms),
            3 => shrink_chains::<S, W, 3>(group, terms),
            _ => shrink_chains::<S, W, CHAINS>(group, terms),
        }
    }
}

/// # Safety
/// As [`shrink_group`], with `N` sums.
#[inline(always)]
unsafe fn shrink_chains<S: Simd, W: Weight, const N: usize>(group: &[ShrinkSum], terms: usize) {
    let term_bytes = LANES * size_of::<W>();
    let near = terms.saturating_sub(SHRINK_AHEAD / term_bytes) / 2 * 2;
    let x: [_; N] = std::array::from_fn(|i| group[i].x);
    let a: [_; N] = std::array::from_fn(|i| group[i].a.cast::<W>());
    // SAFETY: by contract.
    unsafe {
        let mut sums = [S::splat(0.0); N];
        for (range, is_near) in [(0..near, true), (near..terms, false)] {
            // The end of a block asks for the beginning of the next one.
            let ahead: [*const u8; N] = std::array::from_fn(|i| {
                if is_near { group[i].a.wrapping_add(SHRINK_AHEAD) } else { group[i].next }
            });
            let first = range.start;
            for term in range.step_by(2) {
                for i in 0..N {
                    let at = (term - first) * term_bytes;
                    for line in (0..2 * term_bytes).step_by(LINE) {
                        S::prefetch(ahead[i].wrapping_add(at + line));
                    }
                    let [first, second] = W::load_pair::<S>(a[i].add(term * LANES));
                    sums[i] = S::fma(S::splat(*x[i].add(term)), first, sums[i]);
                    if term + 1 < terms {
                        sums[i] = S::fma(S::splat(*x[i].add(term + 1)), second, sums[i]);
                    }
                }
            }
        }
        for i in 0..N {
            S::store(group[i].to, sums[i]);
        }
    }
}

/// Some columns of some rows of an output, all of one adapter.
pub(super) struct ExpandTile {
    /// `[rows][hidden_stride]`
    pub(super) hidden: *const f32,
    pub(super) hidden_stride: usize,
    pub(super) rows: usize,
    /// The first panel.
    pub(super) b: *const u8,
    pub(super) form: WeightForm,
    pub(super) panel_bytes: usize,
    pub(super) rank: usize,
    pub(super) scale: f32,
    /// DoRA's factors of the columns, and the output's bias; null: none.
    pub(super) factors: *const f32,
    pub(super) bias: *const f32,
    /// The first row's first column.
    pub(super) out: *mut f32,
    /// From row to row.
    pub(super) out_features: usize,
    pub(super) columns: usize,
    /// What will probably be read after this; only asked for.
    pub(super) next: *const u8,
}

// SAFETY: all but `out` are only read, and no two tiles have an element of an output in common.
unsafe impl Send for ExpandTile {}
// SAFETY: as above.
unsafe impl Sync for ExpandTile {}

/// # Safety
/// The tile's rows exist in `hidden` and in the output, its panels in `b`, nobody else uses its elements, and
/// the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn expand_tile<S: Simd>(tile: &ExpandTile) {
    // SAFETY: by contract.
    unsafe {
        match tile.form {
            WeightForm::Bf16 => expand_panels::<S, bf16>(tile),
            WeightForm::F16 => expand_panels::<S, f16>(tile),
            WeightForm::F32 | WeightForm::Bf16Dot | WeightForm::Int8 | WeightForm::Int4 => {
                expand_panels::<S, f32>(tile)
            }
        }
    }
}

/// # Safety
/// As [`expand_tile`]; B has elements of type `W`.
#[inline(always)]
unsafe fn expand_panels<S: Simd, W: Weight>(tile: &ExpandTile) {
    let &ExpandTile { panel_bytes, rank, out_features: stride, .. } = tile;
    let num_panels = tile.columns.div_ceil(LANES);
    let mut panel = 0;
    while panel < num_panels {
        let column = panel * LANES;
        let wide = column + CHAINS * LANES <= tile.columns;
        let take = if wide { CHAINS } else { 1 };
        let width = (tile.columns - column).min(LANES);
        let from = tile.b.wrapping_add(panel * panel_bytes);
        // SAFETY: by contract; a panel has `rank` vectors at least, in whole pairs.
        unsafe {
            ask_ahead::<S>(tile, panel, take);
            let to = tile.out.add(column);
            let hidden = |row: usize| tile.hidden.add(row * tile.hidden_stride);
            let mut row = 0;
            while row + TILE_ROWS <= tile.rows {
                for i in 0..take {
                    let panel = from.add(i * panel_bytes).cast::<W>();
                    let at: [_; TILE_ROWS] = std::array::from_fn(|j| (panel, hidden(row + j)));
                    let sums = chains::<S, W, TILE_ROWS>(&at, rank);
                    for j in 0..TILE_ROWS {
                        let to = to.add((row + j) * stride + i * LANES);
                        add::<S>(tile, to, sums[j], (column + i * LANES, width));
                    }
                }
                row += TILE_ROWS;
            }
            while row < tile.rows {
                let to = to.add(row * stride);
                if wide {
                    let at: [_; CHAINS] = std::array::from_fn(|i| {
                        (from.add(i * panel_bytes).cast::<W>(), hidden(row))
                    });
                    let sums = chains::<S, W, CHAINS>(&at, rank);
                    for i in 0..CHAINS {
                        add::<S>(tile, to.add(i * LANES), sums[i], (column + i * LANES, LANES));
                    }
                } else {
                    let [sum] = chains::<S, W, 1>(&[(from.cast::<W>(), hidden(row))], rank);
                    add::<S>(tile, to, sum, (column, width));
                }
                row += 1;
            }
        }
        panel += take;
    }
}

/// Asks for what is read [`EXPAND_AHEAD`] bytes after these panels: of this tile, or of the next one.
#[inline(always)]
unsafe fn ask_ahead<S: Simd>(tile: &ExpandTile, panel: usize, panels: usize) {
    let length = tile.columns.div_ceil(LANES) * tile.panel_bytes;
    let at = panel * tile.panel_bytes + EXPAND_AHEAD;
    for at in (at..at + panels * tile.panel_bytes).step_by(LINE) {
        let line =
            if at < length { tile.b.wrapping_add(at) } else { tile.next.wrapping_add(at - length) };
        // SAFETY: the address is only asked for; it may lie anywhere.
        unsafe { S::prefetch(line) };
    }
}

/// Sums that run beside each other, each of a panel of B and a row of `hidden`.
///
/// # Safety
/// Each row has `rank` elements, each panel `rank` vectors in whole pairs; the CPU has the features of
/// `S`.
#[inline(always)]
unsafe fn chains<S: Simd, W: Weight, const N: usize>(
    at: &[(*const W, *const f32); N],
    rank: usize,
) -> [S::V; N] {
    // SAFETY: by contract.
    unsafe {
        let mut totals = [S::splat(0.0); N];
        for start in (0..rank).step_by(SUM_BLOCK) {
            let end = (start + SUM_BLOCK).min(rank);
            let mut block = [S::splat(0.0); N];
            for k in (start..end).step_by(2) {
                for i in 0..N {
                    let (panel, hidden) = at[i];
                    let [first, second] = W::load_pair::<S>(panel.add(k * LANES));
                    block[i] = S::fma(S::splat(*hidden.add(k)), first, block[i]);
                    if k + 1 < end {
                        block[i] = S::fma(S::splat(*hidden.add(k + 1)), second, block[i]);
                    }
                }
            }
            for i in 0..N {
                totals[i] = if start == 0 { block[i] } else { S::add(totals[i], block[i]) };
            }
        }
        totals
    }
}

/// `to[..count] += scale * sum`, or what DoRA makes of it; the tile's columns from `column` on.
///
/// # Safety
/// `to`, and what the tile has of factors and bias from there on, are valid for `count` elements; the CPU has
/// the features of `S`.
#[inline(always)]
unsafe fn add<S: Simd>(
    tile: &ExpandTile,
    to: *mut f32,
    sum: S::V,
    (column, count): (usize, usize),
) {
    // SAFETY: by contract.
    unsafe {
        let get = |from: *const f32| {
            if count == LANES { S::load(from) } else { load_partial::<S>(from, count) }
        };
        let out = get(to);
        let mut value = S::mul(sum, S::splat(tile.scale));
        if !tile.factors.is_null() {
            let factor = get(tile.factors.add(column));
            let base =
                if tile.bias.is_null() { out } else { S::sub(out, get(tile.bias.add(column))) };
            let longer = S::mul(S::sub(factor, S::splat(1.0)), base);
            value = S::add(longer, S::mul(factor, value));
        }
        let value = S::add(out, value);
        if count == LANES {
            S::store(to, value);
        } else {
            store_partial::<S>(to, value, count);
        }
    }
}
