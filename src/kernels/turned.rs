//! Products whose panels are made on the way: a block of the matrix at a time is turned into f32
//! panels, which then serve all rows.
//!
//! This is how a packed matrix multiplies from the other side (the gradient of an input), and how a
//! matrix that changes with every step, and is therefore never packed, is multiplied at all. The sums
//! have the order of `product.rs`, so a matrix gives the same bits packed and not packed.

#![allow(clippy::needless_range_loop, reason = "vectors are indexed")]

use std::{cell::Cell, ops::Range};

use half::{bf16, f16};

use super::{
    Kernels,
    panels::{PackedWeight, WeightForm},
    pool::for_each_task,
    product::{PanelTile, SUM_BLOCK},
    row_tiles::with_row_tiles,
    simd::{LANES, Simd, Weight, load_partial},
    threads::{MIN_PARALLEL_WORK, ROW_BLOCK, Shared, num_threads},
};

/// Panels that one task makes and uses.
const TASK_PANELS: usize = 4;

thread_local! {
    /// Panels that a thread makes, kept for its next task.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Where panels come from: sixteen columns of the product, over some terms of its sums.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// Columns are input features, terms output features.
    Packed(&'a PackedWeight),
    /// `[columns, terms]`
    ColumnsTerms(&'a [f32], usize),
    /// `[terms, columns]`
    TermsColumns(&'a [f32], usize),
}

/// Sixteen columns from `column` on, to `[terms][16]`.
pub(super) struct TurnTile<'a> {
    source: Source<'a>,
    column: usize,
    columns: usize,
    terms: Range<usize>,
    to: &'a mut [f32],
}

impl PackedWeight {
    /// `out = grad W`: `grad [rows, out]`, `out [rows, in]`, the gradient of [`Self::linear`]'s input
    /// as the weights are held. `grad` is not rounded.
    ///
    /// # Panics
    /// Where the lengths do not fit each other.
    pub fn input_gradient(&self, kernels: &Kernels, grad: &[f32], out: &mut [f32]) {
        let [terms, columns] = self.shape();
        product(kernels, grad, (terms, columns), Source::Packed(self), out);
    }
}

/// `out = x W^T`, `W [out_features, in_features]` as plain rows.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn linear(kernels: &Kernels, x: &[f32], weight: &[f32], in_features: usize, out: &mut [f32]) {
    let out_features = rows_of(weight, in_features);
    let source = Source::ColumnsTerms(weight, in_features);
    product(kernels, x, (in_features, out_features), source, out);
}

/// `out = grad W`, `W [out_features, in_features]` as plain rows.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn input_gradient(
    kernels: &Kernels,
    grad: &[f32],
    weight: &[f32],
    in_features: usize,
    out: &mut [f32],
) {
    let out_features = rows_of(weight, in_features);
    let source = Source::TermsColumns(weight, in_features);
    product(kernels, grad, (out_features, in_features), source, out);
}

fn rows_of(weight: &[f32], in_features: usize) -> usize {
    let rows = weight.len() / in_features.max(1);
    assert_eq!(weight.len(), rows * in_features, "weight is not whole rows of {in_features}");
    rows
}

fn product(
    kernels: &Kernels,
    x: &[f32],
    (terms, columns): (usize, usize),
    source: Source<'_>,
    out: &mut [f32],
) {
    if columns == 0 || out.is_empty() {
        return;
    }
    let rows = out.len() / columns;
    assert_eq!(out.len(), rows * columns, "out is not whole rows of {columns}");
    assert_eq!(x.len(), rows * terms, "x is not {rows} x {terms}");
    if terms == 0 {
        return out.fill(0.0);
    }
    let shared = Shared(out.as_mut_ptr());
    let panels = columns.div_ceil(LANES);
    let panel_tasks = panels.div_ceil(TASK_PANELS);
    let threads = num_threads();
    // Where there are few panels, threads share out the rows too, and each turns the panels.
    let row_tasks = (4 * threads).div_ceil(panel_tasks).min(rows.div_ceil(ROW_BLOCK));
    let task_rows = rows.div_ceil(row_tasks).next_multiple_of(ROW_BLOCK);
    with_row_tiles(kernels, x, (terms, columns), |x| {
        let task = |task: usize| {
            let mut scratch = SCRATCH.take();
            let first = task % panel_tasks * TASK_PANELS;
            let panels = first..(first + TASK_PANELS).min(panels);
            let first_row = (task / panel_tasks * task_rows).min(rows);
            let rows = first_row..(first_row + task_rows).min(rows);
            scratch.resize(TASK_PANELS * SUM_BLOCK * LANES, 0.0);
            for start in (0..terms).step_by(SUM_BLOCK) {
                let block = start..(start + SUM_BLOCK).min(terms);
                for (panel, to) in panels.clone().zip(scratch.chunks_exact_mut(SUM_BLOCK * LANES)) {
                    let column = panel * LANES;
                    let terms = block.clone();
                    let tile = TurnTile { source, column, columns, terms, to };
                    // SAFETY: the table's functions are for this CPU.
                    unsafe { (kernels.turn)(tile) };
                }
                let tile = PanelTile {
                    x,
                    first_term: start,
                    terms: block.len(),
                    weight: scratch.as_ptr().cast(),
                    panel_bytes: SUM_BLOCK * LANES * size_of::<f32>(),
                    bias: std::ptr::null(),
                    out: shared.get(),
                    columns,
                    rows: rows.clone(),
                    panels: panels.clone(),
                    first_panel: panels.start,
                    accumulate: start > 0,
                };
                // SAFETY: the lengths were checked above; tasks write disjoint rectangles.
                unsafe { tile.run(kernels, WeightForm::F32) };
            }
            SCRATCH.set(scratch);
        };
        let tasks = panel_tasks * row_tasks;
        let is_small = rows * terms * columns < MIN_PARALLEL_WORK;
        for_each_task(if is_small { 1 } else { threads }, tasks, task);
    });
}

/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn turn_tile<S: Simd>(tile: TurnTile<'_>) {
    let TurnTile { source, column, columns, terms, to } = tile;
    let lanes = (columns - column).min(LANES);
    // Sixteen terms at a time: whole panels of a packed source, squares of the others.
    for (index, to) in to.chunks_mut(LANES * LANES).enumerate() {
        let first = terms.start + index * LANES;
        if first >= terms.end {
            return;
        }
        let count = (terms.end - first).min(LANES);
        // SAFETY: the functions read only what exists; `to` is sixteen vectors long.
        unsafe {
            let square = match source {
                Source::Packed(weight) => {
                    S::transpose(packed_rows::<S>(weight, first, column, lanes))
                }
                Source::ColumnsTerms(data, stride) => {
                    S::transpose(plain_rows::<S>(data, stride, (column, lanes), (first, count)))
                }
                Source::TermsColumns(data, stride) => {
                    plain_rows::<S>(data, stride, (first, count), (column, lanes))
                }
            };
            for (vector, to) in square.into_iter().zip(to.chunks_exact_mut(LANES)) {
                S::store(to.as_mut_ptr(), vector);
            }
        }
    }
}

/// Vector `i`: `count` elements from `column` on of row `row + i`. Zero where there are none.
#[inline(always)]
unsafe fn plain_rows<S: Simd>(
    data: &[f32],
    stride: usize,
    (row, rows): (usize, usize),
    (column, count): (usize, usize),
) -> [S::V; LANES] {
    // SAFETY: lane arithmetic.
    let mut vectors = [unsafe { S::splat(0.0) }; LANES];
    for i in 0..rows.min(LANES) {
        let from = &data[(row + i) * stride + column..][..count];
        // SAFETY: the slice has `count` elements.
        vectors[i] = unsafe {
            if count == LANES {
                S::load(from.as_ptr())
            } else {
                load_partial::<S>(from.as_ptr(), count)
            }
        };
    }
    vectors
}

/// Vector `j`: term `term + j` of the sixteen columns of the panel that row `row` begins. Zero where
/// there are none.
#[inline(always)]
unsafe fn packed_rows<S: Simd>(
    weight: &PackedWeight,
    row: usize,
    term: usize,
    count: usize,
) -> [S::V; LANES] {
    let panel_bytes = weight.panel_bytes();
    let panel = &weight.data.bytes()[row / LANES * panel_bytes..][..panel_bytes];
    // SAFETY: `term` is a multiple of sixteen, and a panel has whole pairs of terms.
    unsafe {
        match weight.form() {
            WeightForm::F32 => pairs::<S, f32>(panel, term, count),
            WeightForm::F16 => pairs::<S, f16>(panel, term, count),
            WeightForm::Bf16 | WeightForm::Bf16Dot => pairs::<S, bf16>(panel, term, count),
            WeightForm::Int8 => {
                let panel = panel.as_ptr().add(term * LANES);
                let lines = [
                    S::load_bytes(panel),
                    S::load_bytes(panel.add(64)),
                    S::load_bytes(panel.add(128)),
                    S::load_bytes(panel.add(192)),
                ];
                scaled::<S>(weight, row, term, lines, 128.0)
            }
            WeightForm::Int4 => {
                let panel = panel.as_ptr().add(term * LANES / 2);
                let [a, b] = [S::load_bytes(panel), S::load_bytes(panel.add(64))];
                let lines =
                    [S::low_nibbles(a), S::high_nibbles(a), S::low_nibbles(b), S::high_nibbles(b)];
                scaled::<S>(weight, row, term, lines, 8.0)
            }
        }
    }
}

/// Sixteen terms of integers, four in each line, times their group's scale.
///
/// # Safety
/// The panel that `row` begins and the group of `term` exist; the CPU has the features of `S`.
#[inline(always)]
unsafe fn scaled<S: Simd>(
    weight: &PackedWeight,
    row: usize,
    term: usize,
    lines: [S::B; 4],
    offset: f32,
) -> [S::V; LANES] {
    let at = (row / LANES * weight.groups() + term / weight.form().group()) * LANES;
    // SAFETY: by contract; there are sixteen scales for each panel and group.
    unsafe {
        let scale = S::load_bf16(weight.scales.as_ptr().cast::<bf16>().add(at));
        let offset = S::splat(offset);
        let mut vectors = [scale; LANES];
        for (four, line) in vectors.chunks_exact_mut(4).zip(lines) {
            four[0] = S::mul(scale, S::sub(S::byte_to_f32::<0>(line), offset));
            four[1] = S::mul(scale, S::sub(S::byte_to_f32::<8>(line), offset));
            four[2] = S::mul(scale, S::sub(S::byte_to_f32::<16>(line), offset));
            four[3] = S::mul(scale, S::sub(S::byte_to_f32::<24>(line), offset));
        }
        vectors
    }
}

#[inline(always)]
unsafe fn pairs<S: Simd, W: Weight>(panel: &[u8], term: usize, count: usize) -> [S::V; LANES] {
    // SAFETY: lane arithmetic.
    let mut vectors = [unsafe { S::splat(0.0) }; LANES];
    for j in (0..count).step_by(2) {
        let at = (term + j) * LANES * size_of::<W>();
        let pair = &panel[at..at + 2 * LANES * size_of::<W>()];
        // SAFETY: the slice holds the pair.
        let [first, second] = unsafe { W::load_pair::<S>(pair.as_ptr().cast()) };
        vectors[j] = first;
        if j + 1 < count {
            vectors[j + 1] = second;
        }
    }
    vectors
}
