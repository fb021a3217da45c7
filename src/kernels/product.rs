//! `x W^T` over panels of floating point weights.
//!
//! Each output element is summed over the terms in blocks of [`SUM_BLOCK`]: one chain of multiply-adds
//! from the first term of a block to its last, then one addition of the block's sum. That order is the
//! same for every number of rows, register tile and thread; threads share out rows and columns only.
//!
//! Where rows are rounded to bf16 ([`WeightForm::Bf16Dot`]), two terms count as one: an instruction adds both
//! products, the second term's first.
#![allow(clippy::needless_range_loop, reason = "register tiles are indexed in both directions")]

use std::ops::Range;

use super::{
    Kernels,
    bf16_rows::with_bf16_rows,
    panels::{PackedWeight, WeightForm},
    quant_product,
    row_tiles::{RowTiles, tile_height, with_row_tiles},
    simd::{LANES, Simd, Weight, load_partial, store_partial},
    threads::{Shared, for_each_tile},
};

/// Terms of one chain.
pub(super) const SUM_BLOCK: usize = 512;
/// How far ahead of a product with few rows the weights are asked for.
const PREFETCH_BYTES: usize = 1024;

impl PackedWeight {
    /// `out = x W^T + bias`: `x [rows, in]`, `bias [out]`, `out [rows, out]`. With an int8 or int4
    /// weight, the rows of `x` are rounded to 8 bits too, each group of its terms by a scale of its own; with
    /// [`WeightForm::Bf16Dot`], to bf16.
    ///
    /// # Panics
    /// Where the lengths do not fit each other.
    pub fn linear(&self, kernels: &Kernels, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        let [columns, terms] = self.shape();
        assert!(bias.is_none_or(|bias| bias.len() == columns), "bias is not {columns} long");
        if columns == 0 || out.is_empty() {
            return;
        }
        let rows = out.len() / columns;
        assert_eq!(out.len(), rows * columns, "out is not whole rows of {columns}");
        assert_eq!(x.len(), rows * terms, "x is not {rows} x {terms}");
        if terms == 0 {
            for row in out.chunks_exact_mut(columns) {
                match bias {
                    Some(bias) => row.copy_from_slice(bias),
                    None => row.fill(0.0),
                }
            }
            return;
        }
        match self.form() {
            WeightForm::Int8 | WeightForm::Int4 => {
                quant_product::linear(self, kernels, x, bias, out);
            }
            WeightForm::F32 | WeightForm::F16 | WeightForm::Bf16 => {
                self.add_up(kernels, (x, terms), bias, out);
            }
            WeightForm::Bf16Dot => with_bf16_rows(kernels, x, terms, |pairs| {
                self.add_up(kernels, (pairs, terms.div_ceil(2)), bias, out);
            }),
        }
    }

    /// The product over panels of so many terms, of which `x` has a number each.
    fn add_up(
        &self,
        kernels: &Kernels,
        (x, terms): (&[f32], usize),
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) {
        let columns = self.shape()[0];
        let rows = out.len() / columns;
        let shared = Shared(out.as_mut_ptr());
        with_row_tiles(kernels, x, (terms, columns), |x| {
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
                // SAFETY: `linear` checked the lengths, tasks write disjoint rectangles.
                unsafe { tile.run(kernels, self.form()) };
            });
        });
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
                WeightForm::Bf16Dot => (kernels.panels_bf16_dot)(self),
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
    // SAFETY: by contract, here and below.
    unsafe {
        if !tile.x.is_tiled {
            match tile.rows.len() {
                1 | 2 => few_rows::<S, W, 2, WIDE>(tile),
                _ => few_rows::<S, W, FEW, NV>(tile),
            }
            return;
        }
        // A block of some panels stays in the first-level cache while the row tiles pass by.
        for start in (0..tile.terms).step_by(W::SUM_BLOCK) {
            let terms = start..(start + W::SUM_BLOCK).min(tile.terms);
            let mut panel = tile.panels.start;
            while panel < tile.panels.end {
                let wide = panel + NV <= tile.panels.end;
                let next = panel + if wide { NV } else { 1 };
                let next_block = if next < tile.panels.end {
                    (next, start)
                } else {
                    (tile.panels.start, start + W::SUM_BLOCK)
                };
                for row in tile.rows.clone().step_by(MANY) {
                    let step = Step {
                        row,
                        panel,
                        terms: terms.clone(),
                        wide,
                        ahead: tile.ahead::<W>(next_block, (row, MANY)),
                    };
                    match tile_height((tile.rows.end - row).min(MANY), MANY) {
                        1 => columns::<S, W, 1, NV, true>(tile, &step),
                        2 => columns::<S, W, 2, NV, true>(tile, &step),
                        4 => columns::<S, W, 4, NV, true>(tile, &step),
                        8 if MANY > 8 => columns::<S, W, 8, NV, true>(tile, &step),
                        _ => columns::<S, W, MANY, NV, true>(tile, &step),
                    }
                }
                panel = next;
            }
        }
    }
}

/// Rows as they are, in groups: the first group fetches a block of weights, the others find it in the
/// first-level cache. The weights pass by once.
#[inline(always)]
unsafe fn few_rows<S: Simd, W: Weight, const FEW: usize, const NV: usize>(tile: &PanelTile) {
    let mut panel = tile.panels.start;
    while panel < tile.panels.end {
        let wide = panel + NV <= tile.panels.end;
        let next = panel + if wide { NV } else { 1 };
        for start in (0..tile.terms).step_by(W::SUM_BLOCK) {
            let terms = start..(start + W::SUM_BLOCK).min(tile.terms);
            let next_block = if terms.end < tile.terms { (panel, terms.end) } else { (next, 0) };
            for row in tile.rows.clone().step_by(FEW) {
                let ahead = if tile.rows.len() <= FEW {
                    Ahead::NEAR
                } else {
                    tile.ahead::<W>(next_block, (row, FEW))
                };
                let step = Step { row, panel, terms: terms.clone(), wide, ahead };
                // SAFETY: by the contract of `panel_tile`.
                unsafe {
                    match tile.rows.end - row {
                        1 => columns::<S, W, 1, NV, false>(tile, &step),
                        2 => columns::<S, W, 2, NV, false>(tile, &step),
                        3 | 4 => columns::<S, W, 4, NV, false>(tile, &step),
                        _ => columns::<S, W, FEW, NV, false>(tile, &step),
                    }
                }
            }
        }
        panel = next;
    }
}

/// What one set of registers computes.
struct Step {
    row: usize,
    panel: usize,
    terms: Range<usize>,
    /// `NV` panels; else one.
    wide: bool,
    ahead: Ahead,
}

/// What is asked for from memory meanwhile.
#[derive(Clone, Copy)]
struct Ahead {
    /// Null: what is read a little later. Else a part of the next block of weights: each of the row
    /// tiles that use a block asks for its share of the next one.
    from: *const u8,
    /// Bytes of that part for each pair of terms.
    step: usize,
}

impl Ahead {
    const NEAR: Self = Self { from: std::ptr::null(), step: 0 };
}

impl PanelTile {
    /// The share of the row tile that `row` begins in asking for the block of `panel` and `term`.
    fn ahead<W: Weight>(
        &self,
        (panel, term): (usize, usize),
        (row, height): (usize, usize),
    ) -> Ahead {
        let shares = self.rows.len().div_ceil(height);
        let share = (row - self.rows.start) / height;
        let pair = 2 * LANES * size_of::<W>();
        let step = pair / shares;
        let start = term * LANES * size_of::<W>() + share * step * (W::SUM_BLOCK / 2);
        // Only asked for: it may lie outside.
        let at = (panel - self.first_panel) * self.panel_bytes + start;
        Ahead { from: self.weight.wrapping_add(at), step }
    }
}

/// `NV` panels, or one where the step is not wide.
#[inline(always)]
unsafe fn columns<S: Simd, W: Weight, const MR: usize, const NV: usize, const TILED: bool>(
    tile: &PanelTile,
    step: &Step,
) {
    // SAFETY: by the contract of `panel_tile`.
    unsafe {
        if step.wide {
            registers::<S, W, MR, NV, TILED>(tile, step);
        } else {
            registers::<S, W, MR, 1, TILED>(tile, step);
        }
    }
}

/// One block of terms of `MR` rows and `NV` panels, in registers.
#[inline(always)]
unsafe fn registers<S: Simd, W: Weight, const MR: usize, const NV: usize, const TILED: bool>(
    tile: &PanelTile,
    &Step { row, panel, ref terms, ahead, .. }: &Step,
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
                if TILED || !ahead.from.is_null() {
                    let next = ahead.from.wrapping_add(v * panel_bytes + at / 2 * ahead.step);
                    S::prefetch_far(next);
                } else {
                    let done = start + at * LANES * size_of::<W>();
                    for line in (0..2 * LANES * size_of::<W>()).step_by(64) {
                        prefetch::<S, NV>(from.add(line), done + line, panel_bytes);
                    }
                }
                w[v] = W::load_pair::<S>(from.cast::<W>());
            }
            for term in 0..2 {
                for i in 0..MR {
                    let factor = S::splat(*x.add((at + term) * step + strides[i]));
                    for v in 0..NV {
                        sums[i][v] = W::multiply_add::<S>(factor, w[v][term], sums[i][v]);
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
                    sums[i][v] = W::multiply_add::<S>(factor, w, sums[i][v]);
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
