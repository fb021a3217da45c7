//! `x W^T` over panels of small integers.
//!
//! The rows of `x` are rounded to 8 bits, each group of the weights' terms by a scale of its own. The products of
//! a group are added as integers, which is exact in any order; their sum, times both scales, is added
//! to the output element's one chain, group after group. A row depends on itself only.
//!
//! Weights are held as unsigned bytes, offset by 128 or 8, because the instructions want one unsigned
//! factor; `offset * (sum of the row's integers)` is taken off again where a group's sum begins.
#![allow(clippy::needless_range_loop, reason = "register tiles are indexed in both directions")]

use std::{hint::black_box, ops::Range};

use super::{
    Kernels,
    panels::{PackedWeight, WeightForm},
    product::prefetch,
    quant_rows::{QuantPlaces, with_quant_rows},
    row_tiles::tile_height,
    simd::{LANES, Simd, load_partial, store_partial},
    threads::{Shared, for_each_tile},
};

/// Terms of a block of panels that stays in the first-level cache while the row tiles pass by.
const BLOCK_TERMS: usize = 1024;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Up to so many rows, each panel is read to its end before the next.
const STREAMED_ROWS: usize = 24;

/// The body of [`PackedWeight::linear`] for the quantised forms; it has checked the lengths.
pub(super) fn linear(
    weight: &PackedWeight,
    kernels: &Kernels,
    x: &[f32],
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let [columns, terms] = weight.shape();
    let rows = x.len() / terms;
    let height = quant_height(kernels, rows);
    let is_int8 = weight.form() == WeightForm::Int8;
    let body = if is_int8 { kernels.panels_int8 } else { kernels.panels_int4 };
    let shared = Shared(out.as_mut_ptr());
    with_quant_rows(kernels, x, (terms, height), weight.form(), |x| {
        for_each_tile(rows, columns, terms / 4, height, |rows, panels| {
            let tile = QuantTile {
                x,
                height,
                weight: weight.data.as_ptr(),
                scales: weight.scales.as_ptr().cast(),
                groups: weight.groups(),
                bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
                out: shared.get(),
                columns,
                rows,
                panels,
            };
            // SAFETY: `linear` checked the lengths, tasks write disjoint rectangles.
            unsafe { body(&tile) };
        });
    });
}

/// Rows of a tile: two tiles of four hold eight rows better than six and two.
fn quant_height(kernels: &Kernels, rows: usize) -> usize {
    if rows <= 8 { 4 } else { kernels.quant_tile }
}

/// A rectangle of a product's output.
pub(super) struct QuantTile {
    x: QuantPlaces,
    /// Rows of a whole tile.
    height: usize,
    weight: *const u8,
    scales: *const half::bf16,
    groups: usize,
    /// Null: none.
    bias: *const f32,
    out: *mut f32,
    columns: usize,
    /// The first is a multiple of the row tile.
    rows: Range<usize>,
    panels: Range<usize>,
}

/// Tiles of up to `MANY` rows and `NV` panels; of one or two rows and `WIDE` panels.
///
/// # Safety
/// The pointers are valid for the matrices that `tile` describes, `rows` and `panels` lie within them,
/// nobody else writes this rectangle, and the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn quant_tile<
    S: Simd,
    const BITS: usize,
    const MANY: usize,
    const WIDE: usize,
    const NV: usize,
>(
    tile: &QuantTile,
) {
    let wide = if tile.rows.len() <= 2 { WIDE } else { NV };
    let mut at_once = tile.panels.len();
    if tile.rows.len() <= STREAMED_ROWS {
        at_once = wide;
    }
    let is_one_tile = tile.rows.len() <= tile.height;
    let block = if is_one_tile { tile.groups } else { BLOCK_TERMS / group_terms(BITS) };
    for first in tile.panels.clone().step_by(at_once.max(1)) {
        let panels = first..(first + at_once).min(tile.panels.end);
        for start in (0..tile.groups).step_by(block) {
            let groups = start..(start + block).min(tile.groups);
            let mut panel = panels.start;
            while panel < panels.end {
                let take = if panel + wide <= panels.end { wide } else { 1 };
                let next = if panel + take < panels.end {
                    (panel + take, groups.start)
                } else {
                    (panels.start, groups.end)
                };
                let mut row = tile.rows.start;
                while row < tile.rows.end {
                    let step = Step {
                        row,
                        panel,
                        groups: groups.clone(),
                        ahead: ahead::<BITS>(tile, row, next),
                    };
                    // SAFETY: by contract.
                    unsafe { rows::<S, BITS, MANY, WIDE, NV>(tile, &step, take) };
                    row += tile.height;
                }
                panel += take;
            }
        }
    }
}

/// What one set of registers computes.
struct Step {
    row: usize,
    panel: usize,
    groups: Range<usize>,
    ahead: Ahead,
}

/// The next block of weights is asked for meanwhile: each of the row tiles that use a block asks for its
/// share of the next one.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const u8,
    /// Lines of each group.
    lines: usize,
}

/// The share of the row tile that `row` begins in asking for the block of `panel` and `group`. Few rows
/// ask for what they read a little later instead.
fn ahead<const BITS: usize>(tile: &QuantTile, row: usize, (panel, group): (usize, usize)) -> Ahead {
    let group_bytes = group_terms(BITS) * LANES * BITS / 8;
    let lines = group_bytes / LINE;
    let (tiles, index) =
        (tile.rows.len().div_ceil(tile.height), (row - tile.rows.start) / tile.height);
    let each = lines.div_ceil(tiles);
    let is_of_use = tile.rows.len() > STREAMED_ROWS && index * each < lines;
    // Only asked for: it may lie outside.
    let at = (panel * tile.groups + group) * group_bytes + index * each * LINE;
    Ahead { from: tile.weight.wrapping_add(at), lines: if is_of_use { each } else { 0 } }
}

/// Terms of a group of weights of so many bits.
const fn group_terms(bits: usize) -> usize {
    if bits == 8 { WeightForm::Int8.group() } else { WeightForm::Int4.group() }
}

/// One tile of rows and `take` panels.
#[inline(always)]
unsafe fn rows<
    S: Simd,
    const BITS: usize,
    const MANY: usize,
    const WIDE: usize,
    const NV: usize,
>(
    tile: &QuantTile,
    step: &Step,
    take: usize,
) {
    // SAFETY: by the contract of `quant_tile`.
    unsafe {
        match (tile_height(tile.rows.end - step.row, tile.height), take) {
            (1, 1) => registers::<S, BITS, 1, 1>(tile, step),
            (2, 1) => registers::<S, BITS, 2, 1>(tile, step),
            (4, 1) => registers::<S, BITS, 4, 1>(tile, step),
            (_, 1) => registers::<S, BITS, MANY, 1>(tile, step),
            (1, take) if take == WIDE => registers::<S, BITS, 1, WIDE>(tile, step),
            (2, take) if take == WIDE => registers::<S, BITS, 2, WIDE>(tile, step),
            (1, _) => registers::<S, BITS, 1, NV>(tile, step),
            (2, _) => registers::<S, BITS, 2, NV>(tile, step),
            (4, _) => registers::<S, BITS, 4, NV>(tile, step),
            (_, _) => registers::<S, BITS, MANY, NV>(tile, step),
        }
    }
}

/// Some groups of `MR` rows and `NV` panels, in registers.
#[inline(always)]
unsafe fn registers<S: Simd, const BITS: usize, const MR: usize, const NV: usize>(
    tile: &QuantTile,
    &Step { row, panel, ref groups, ahead }: &Step,
) {
    let group_bytes = group_terms(BITS) * LANES * BITS / 8;
    let count = (tile.rows.end - row).min(MR);
    // SAFETY: by the contract of `quant_tile`: the tile of rows is padded to MR, the panels have
    // `groups` groups, and output is touched only where it exists.
    unsafe {
        let mut sums = [[S::splat(0.0); NV]; MR];
        if groups.start > 0 {
            for i in 0..MR {
                for v in 0..NV {
                    if i < count {
                        sums[i][v] = load_columns::<S>(tile, row + i, panel + v);
                    }
                }
            }
        }
        for group in groups.clone() {
            for line in 0..ahead.lines {
                let skip = (group - groups.start) * group_bytes + line * LINE;
                for v in 0..NV {
                    let panel = v * tile.groups * group_bytes;
                    S::prefetch_far(ahead.from.wrapping_add(panel + skip));
                }
            }
            let ints = integers::<S, BITS, MR, NV>(tile, (row, panel), group);
            let x_scales = tile.x.scales.get().add(row * tile.groups + group * MR);
            for v in 0..NV {
                let at = ((panel + v) * tile.groups + group) * LANES;
                let scale = S::load_bf16(tile.scales.add(at));
                for i in 0..MR {
                    let both = S::mul(scale, S::splat(*x_scales.add(i)));
                    sums[i][v] = S::fma(both, S::int_to_f32(ints[i][v]), sums[i][v]);
                }
            }
        }
        let is_last = groups.end == tile.groups;
        for i in 0..MR {
            for v in 0..NV {
                if i < count {
                    store_columns::<S>(tile, (row + i, panel + v), sums[i][v], is_last);
                }
            }
        }
    }
}

/// The products of one group, summed.
#[inline(always)]
unsafe fn integers<S: Simd, const BITS: usize, const MR: usize, const NV: usize>(
    tile: &QuantTile,
    (row, panel): (usize, usize),
    group: usize,
) -> [[S::I; NV]; MR] {
    let words_of_group = group_terms(BITS) / 4;
    let group_bytes = group_terms(BITS) * LANES * BITS / 8;
    let panel_bytes = tile.groups * group_bytes;
    // Few rows wait for the weights. The first tile of rows brings them for the others.
    let fetch = tile.rows.len() <= STREAMED_ROWS && row == tile.rows.start;
    // SAFETY: by the contract of `quant_tile`.
    unsafe {
        let at = row * tile.groups + group * MR;
        let words = tile.x.words.get().add(at * words_of_group);
        let starts = tile.x.starts.get().add(at);
        let weight = tile.weight.add(panel * panel_bytes + group * group_bytes);
        let mut ints: [[S::I; NV]; MR] =
            std::array::from_fn(|i| [S::splat_int(*starts.add(i)); NV]);
        // Unrolled, this loop would be reordered until the sums no longer fit in registers.
        let (mut word, end) = (0, black_box(words_of_group));
        while word < end {
            let mut bytes = [[S::load_bytes(weight); 2]; NV];
            let line = word * BITS / 8 * 64;
            for v in 0..NV {
                let from = weight.add(v * panel_bytes + line);
                if fetch {
                    prefetch::<S, NV>(from, group * group_bytes + line, panel_bytes);
                }
                let loaded = S::load_bytes(from);
                bytes[v] = if BITS == 8 {
                    [loaded, loaded]
                } else {
                    [S::low_nibbles(loaded), S::high_nibbles(loaded)]
                };
            }
            for part in 0..8 / BITS {
                for i in 0..MR {
                    let four = *words.add(i * words_of_group + word + part);
                    for v in 0..NV {
                        ints[i][v] = S::dot(ints[i][v], bytes[v][part], four);
                    }
                }
            }
            word += 8 / BITS;
        }
        ints
    }
}

/// # Safety
/// The row and the panel's first column exist.
#[inline(always)]
unsafe fn load_columns<S: Simd>(tile: &QuantTile, row: usize, panel: usize) -> S::V {
    let column = panel * LANES;
    // SAFETY: by contract; no column past the last one is touched.
    unsafe {
        let from = tile.out.add(row * tile.columns + column);
        let count = (tile.columns - column).min(LANES);
        if count == LANES { S::load(from) } else { load_partial::<S>(from, count) }
    }
}

/// # Safety
/// As [`load_columns`].
#[inline(always)]
unsafe fn store_columns<S: Simd>(
    tile: &QuantTile,
    (row, panel): (usize, usize),
    sum: S::V,
    is_last: bool,
) {
    let column = panel * LANES;
    let count = (tile.columns - column).min(LANES);
    // SAFETY: by contract; no column past the last one is touched.
    unsafe {
        let to = tile.out.add(row * tile.columns + column);
        let mut value = sum;
        if is_last && !tile.bias.is_null() {
            let bias = tile.bias.add(column);
            let bias = if count == LANES { S::load(bias) } else { load_partial::<S>(bias, count) };
            value = S::add(value, bias);
        }
        if count == LANES {
            S::store(to, value);
        } else {
            store_partial::<S>(to, value, count);
        }
    }
}
