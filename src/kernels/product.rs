//! `x W^T` over panels of floating point weights.
//!
//! Each output element is summed over the terms in blocks of [`SUM_BLOCK`]: one chain of multiply-adds
//! from the first term of a block to its last, then one addition of the block's sum. That order is the
//! same for every number of rows, register tile and thread; threads share out rows and columns only.
#![allow(clippy::needless_range_loop, reason = "register tiles are indexed in both directions")]

use std::{cell::Cell, ops::Range};

use super::{
    Kernels,
    panels::{PackedWeight, WeightForm},
    quant_product,
    simd::{LANES, Simd, Weight, load_partial, store_partial},
    threads::{Shared, for_each_range, for_each_tile},
};

/// Terms of one chain.
pub(super) const SUM_BLOCK: usize = 512;
/// How far ahead of a product with few rows the weights are asked for.
const PREFETCH_BYTES: usize = 1024;

impl PackedWeight {
    /// `out = x W^T + bias`: `x [rows, in]`, `bias [out]`, `out [rows, out]`. With an int8 or int4
    /// weight, the rows of `x` are rounded to 8 bits too, each group of 32 by a scale of its own.
    ///
    /// # Panics
    /// Where the lengths do not fit each other.
    pub fn linear(&self, kernels: &Kernels, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        let [columns, terms] = self.shape();
        let rows = x.len() / terms.max(1);
        assert_eq!(x.len(), rows * terms, "x is not whole rows of {terms}");
        assert_eq!(out.len(), rows * columns, "out is not {rows} x {columns}");
        assert!(bias.is_none_or(|bias| bias.len() == columns), "bias is not {columns} long");
        if rows == 0 || columns == 0 {
            return;
        }
        if terms == 0 {
            for row in out.chunks_exact_mut(columns) {
                match bias {
                    Some(bias) => row.copy_from_slice(bias),
                    None => row.fill(0.0),
                }
            }
            return;
        }
        if !self.form().is_exact() {
            return quant_product::linear(self, kernels, x, bias, out);
        }
        let shared = Shared(out.as_mut_ptr());
        with_row_tiles(kernels, x, terms, |x| {
            for_each_tile(rows, columns, terms, kernels.row_tile, |rows, panels| {
                let tile = PanelTile {
                    x,
                    first_term: 0,
                    terms,
                    weight: self.data.as_ptr(),
                    panel_bytes: self.panel_bytes(),
                    bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
                    out: shared.get(),
                    columns,
                    rows,
                    panels,
                    first_panel: 0,
                    accumulate: false,
                };
                // SAFETY: the lengths were checked above, tasks write disjoint rectangles.
                unsafe { tile.run(kernels, self.form()) };
            });
        });
    }
}

/// The rows of `x` as the product reads them: up to `few_rows` as they are; more in tiles of
/// `row_tile` rows, `[terms][rows of the tile]`, the last tile as high as it needs to be.
#[derive(Clone, Copy)]
pub(super) struct RowTiles {
    base: *const f32,
    terms: usize,
    is_tiled: bool,
}

// SAFETY: it is only read, and lives no longer than the rows that it was made of.
unsafe impl Send for RowTiles {}
// SAFETY: as above.
unsafe impl Sync for RowTiles {}

/// Heights of register tiles: the least that holds `rows`.
pub(super) fn tile_height(rows: usize, greatest: usize) -> usize {
    [1, 2, 4, 8].into_iter().find(|height| *height >= rows).unwrap_or(greatest).min(greatest)
}

/// Elements of tiled rows that a thread may keep.
const MAX_KEPT: usize = 4 << 20;

thread_local! {
    /// Memory for tiled rows, kept for the next product of the thread.
    static TILED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `body` with the tiles of `x [rows, terms]`.
pub(super) fn with_row_tiles(
    kernels: &Kernels,
    x: &[f32],
    terms: usize,
    body: impl FnOnce(RowTiles),
) {
    let (rows, tile) = (x.len() / terms, kernels.row_tile);
    if rows <= kernels.few_rows {
        return body(RowTiles { base: x.as_ptr(), terms, is_tiled: false });
    }
    // Taken, not borrowed: while this thread waits for others, it may run another product.
    let mut tiled = TILED.take();
    let full = rows / tile * tile;
    let length = (full + tile_height(rows - full, tile)) * terms;
    if tiled.len() < length {
        tiled.resize(length, 0.0);
    }
    let shared = Shared(tiled.as_mut_ptr());
    for_each_range(rows.div_ceil(tile), 1, tile * terms / 2, |tiles| {
        for index in tiles {
            let start = index * tile;
            let count = (rows - start).min(tile);
            let height = if count == tile { tile } else { tile_height(count, tile) };
            // SAFETY: each tile has its own part of `tiled`, which `length` covers.
            let to = unsafe {
                std::slice::from_raw_parts_mut(shared.get().add(start * terms), height * terms)
            };
            let rows = &x[start * terms..(start + count) * terms];
            for (term, column) in to.chunks_exact_mut(height).enumerate() {
                for (i, value) in column.iter_mut().enumerate() {
                    *value = if i < count { rows[i * terms + term] } else { 0.0 };
                }
            }
        }
    });
    body(RowTiles { base: tiled.as_ptr(), terms, is_tiled: true });
    if tiled.len() <= MAX_KEPT {
        TILED.set(tiled);
    }
}

/// A rectangle of a product's output.
pub(super) struct PanelTile {
    pub(super) x: RowTiles,
    /// The terms of `x` that the panels have: `first_term` and the following.
    pub(super) first_term: usize,
    pub(super) terms: usize,
    /// Panel `first_panel` and the following.
    pub(super) weight: *const u8,
    pub(super) panel_bytes: usize,
    /// Null: none.
    pub(super) bias: *const f32,
    pub(super) out: *mut f32,
    /// Columns of the whole output.
    pub(super) columns: usize,
    /// The first is a multiple of the row tile.
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
    pub(super) first_panel: usize,
    /// Adds to the output.
    pub(super) accumulate: bool,
}

impl PanelTile {
    /// # Safety
    /// As [`panel_tile`], but for the features; the panels have that form.
    pub(super) unsafe fn run(&self, kernels: &Kernels, form: WeightForm) {
        // SAFETY: by contract.
        unsafe {
            match form {
                WeightForm::F32 => (kernels.panels_f32)(self),
                WeightForm::F16 => (kernels.panels_f16)(self),
                WeightForm::Bf16 => (kernels.panels_bf16)(self),
                WeightForm::Int8 | WeightForm::Int4 => unreachable!("a product of its own"),
            }
        }
    }
}

/// `FEW` rows are read as they are, `WIDE` panels at once, so that enough sums are under way; more rows
/// in tiles of `MANY` rows and `NV` panels.
///
/// # Safety
/// The pointers are valid for the matrices that `tile` describes, `rows` and `panels` lie within them,
/// nobody else writes this rectangle, and the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn panel_tile<
    S: Simd,
    W: Weight,
    const FEW: usize,
    const MANY: usize,
    const WIDE: usize,
    const NV: usize,
>(
    tile: &PanelTile,
) {
    let count = tile.rows.len();
    // SAFETY: by contract, here and below.
    unsafe {
        if !tile.x.is_tiled {
            match count {
                1 => few_rows::<S, W, 1, WIDE>(tile),
                2 => few_rows::<S, W, 2, WIDE>(tile),
                3 | 4 => few_rows::<S, W, 4, NV>(tile),
                _ if FEW > 4 => few_rows::<S, W, 8, NV>(tile),
                _ => unreachable!("more rows than are few"),
            }
            return;
        }
        // A block of some panels stays in the first-level cache while the row tiles pass by.
        for start in (0..tile.terms).step_by(SUM_BLOCK) {
            let terms = start..(start + SUM_BLOCK).min(tile.terms);
            let mut panel = tile.panels.start;
            while panel < tile.panels.end {
                let wide = panel + NV <= tile.panels.end;
                let mut row = tile.rows.start;
                while row < tile.rows.end {
                    let left = tile.rows.end - row;
                    if left >= MANY {
                        columns::<S, W, MANY, NV, true>(tile, (row, panel), &terms, wide);
                    } else {
                        match tile_height(left, MANY) {
                            1 => columns::<S, W, 1, NV, true>(tile, (row, panel), &terms, wide),
                            2 => columns::<S, W, 2, NV, true>(tile, (row, panel), &terms, wide),
                            4 => columns::<S, W, 4, NV, true>(tile, (row, panel), &terms, wide),
                            8 if MANY > 8 => {
                                columns::<S, W, 8, NV, true>(tile, (row, panel), &terms, wide);
                            }
                            _ => columns::<S, W, MANY, NV, true>(tile, (row, panel), &terms, wide),
                        }
                    }
                    row += MANY;
                }
                panel += if wide { NV } else { 1 };
            }
        }
    }
}

/// All rows at once, panel by panel to its end: the weights pass by once.
#[inline(always)]
unsafe fn few_rows<S: Simd, W: Weight, const MR: usize, const NV: usize>(tile: &PanelTile) {
    let mut panel = tile.panels.start;
    while panel < tile.panels.end {
        let wide = panel + NV <= tile.panels.end;
        for start in (0..tile.terms).step_by(SUM_BLOCK) {
            let terms = start..(start + SUM_BLOCK).min(tile.terms);
            // SAFETY: by the contract of `panel_tile`.
            unsafe {
                columns::<S, W, MR, NV, false>(tile, (tile.rows.start, panel), &terms, wide);
            }
        }
        panel += if wide { NV } else { 1 };
    }
}

/// `NV` panels, or one where `wide` is false.
#[inline(always)]
unsafe fn columns<S: Simd, W: Weight, const MR: usize, const NV: usize, const TILED: bool>(
    tile: &PanelTile,
    place: (usize, usize),
    terms: &Range<usize>,
    wide: bool,
) {
    // SAFETY: by the contract of `panel_tile`.
    unsafe {
        if wide {
            registers::<S, W, MR, NV, TILED>(tile, place, terms);
        } else {
            registers::<S, W, MR, 1, TILED>(tile, place, terms);
        }
    }
}

/// One block of terms of `MR` rows and `NV` panels, in registers.
#[inline(always)]
unsafe fn registers<S: Simd, W: Weight, const MR: usize, const NV: usize, const TILED: bool>(
    tile: &PanelTile,
    (row, panel): (usize, usize),
    terms: &Range<usize>,
) {
    let count = (tile.rows.end - row).min(MR);
    let x_terms = tile.x.terms;
    let mut sums;
    // SAFETY: by the contract of `panel_tile`: the rows exist in `x`, a tile of them is padded to MR,
    // and a panel has an even number of terms.
    unsafe {
        let x = tile.x.base.add(row * x_terms);
        // Rows that do not exist are read as the last one that does, and not written.
        let strides: [usize; MR] = if TILED {
            std::array::from_fn(|i| i)
        } else {
            std::array::from_fn(|i| i.min(count - 1) * x_terms)
        };
        let step = if TILED { MR } else { 1 };
        let x = x.add((tile.first_term + terms.start) * step);
        let panel_bytes = tile.panel_bytes;
        let base = tile.weight.add((panel - tile.first_panel) * panel_bytes);
        let start = terms.start * LANES * size_of::<W>();
        sums = [[S::splat(0.0); NV]; MR];
        let mut at = 0;
        while at + 2 <= terms.len() {
            let mut w = [[S::splat(0.0); 2]; NV];
            for v in 0..NV {
                let from = base.add(v * panel_bytes + start + at * LANES * size_of::<W>());
                if !TILED {
                    prefetch::<S, NV>(from, start + at * LANES * size_of::<W>(), panel_bytes);
                }
                w[v] = W::load_pair::<S>(from.cast::<W>());
            }
            for term in 0..2 {
                for i in 0..MR {
                    let factor = S::splat(*x.add((at + term) * step + strides[i]));
                    for v in 0..NV {
                        sums[i][v] = S::fma(factor, w[v][term], sums[i][v]);
                    }
                }
            }
            at += 2;
        }
        if at < terms.len() {
            for v in 0..NV {
                let from = base.add(v * panel_bytes + start + at * LANES * size_of::<W>());
                let [w, _] = W::load_pair::<S>(from.cast::<W>());
                for i in 0..MR {
                    let factor = S::splat(*x.add(at * step + strides[i]));
                    sums[i][v] = S::fma(factor, w, sums[i][v]);
                }
            }
        }
    }
    // By way of memory, because registers cannot be indexed by a row that is not a constant.
    let mut done = [[[0.0_f32; LANES]; NV]; MR];
    for i in 0..MR {
        for v in 0..NV {
            // SAFETY: the array has sixteen elements.
            unsafe { S::store(done[i][v].as_mut_ptr(), sums[i][v]) };
        }
    }
    let add = tile.accumulate || terms.start > 0;
    let bias = if terms.end == tile.terms { tile.bias } else { std::ptr::null() };
    for i in 0..count {
        for v in 0..NV {
            let column = (panel + v) * LANES;
            // SAFETY: `count` rows and the columns up to `tile.columns` exist in the output.
            unsafe {
                let to = tile.out.add((row + i) * tile.columns + column);
                let sum = S::load(done[i][v].as_ptr());
                finish::<S>(to, sum, (tile.columns - column).min(LANES), add, bias, column);
            }
        }
    }
}

/// Asks for what will be read `PREFETCH_BYTES` later: of this panel, or of the one that follows after
/// all `NV` panels.
#[inline(always)]
pub(super) unsafe fn prefetch<S: Simd, const NV: usize>(
    from: *const u8,
    done: usize,
    panel_bytes: usize,
) {
    let is_last = done + PREFETCH_BYTES >= panel_bytes;
    let skip = if is_last { (NV - 1) * panel_bytes } else { 0 };
    // SAFETY: the address is only asked for; it may lie anywhere.
    unsafe { S::prefetch(from.wrapping_add(PREFETCH_BYTES + skip)) }
}

/// `to[..count] = [to +] sum [+ bias]`.
#[inline(always)]
unsafe fn finish<S: Simd>(
    to: *mut f32,
    sum: S::V,
    count: usize,
    add: bool,
    bias: *const f32,
    column: usize,
) {
    let mut value = sum;
    // SAFETY: `count` elements are there at `to`, and at `bias + column` where there is a bias.
    unsafe {
        if count == LANES {
            if add {
                value = S::add(S::load(to), value);
            }
            if !bias.is_null() {
                value = S::add(value, S::load(bias.add(column)));
            }
            S::store(to, value);
        } else {
            if add {
                value = S::add(load_partial::<S>(to, count), value);
            }
            if !bias.is_null() {
                value = S::add(value, load_partial::<S>(bias.add(column), count));
            }
            store_partial::<S>(to, value, count);
        }
    }
}
