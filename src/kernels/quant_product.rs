//! `x W^T` over panels of small integers.
//!
//! The rows of `x` are rounded to 8 bits, each group of 32 terms by a scale of its own. The products of
//! a group are added as integers, which is exact in any order; their sum, times both scales, is added
//! to the output element's one chain, group after group. A row depends on itself only.
//!
//! Weights are held as unsigned bytes, offset by 128 or 8, because the instructions want one unsigned
//! factor; `offset * (sum of the row's integers)` is taken off again where a group's sum begins.
#![allow(clippy::needless_range_loop, reason = "register tiles are indexed in both directions")]

use std::{cell::Cell, ops::Range};

use super::{
    Kernels,
    panels::{GROUP, PackedWeight, WeightForm},
    product::prefetch,
    row_tiles::tile_height,
    simd::{LANES, Simd, load_partial, store_partial},
    threads::{Shared, for_each_range, for_each_tile},
};

/// Groups of a block of panels that stays in the first-level cache while the row tiles pass by.
const BLOCK_GROUPS: usize = 32;
/// Four-byte words of a group.
const WORDS: usize = GROUP / 4;

/// Rows as integers, in tiles as high as [`tile_height`] says, the greatest `quant_tile` rows.
#[derive(Default)]
struct QuantRows {
    /// Four terms each: tile after tile, `[words][rows of the tile]`.
    words: Vec<i32>,
    /// `[groups][rows of the tile]`
    scales: Vec<f32>,
    /// Sums of the integers, alike.
    sums: Vec<i32>,
}

thread_local! {
    /// Kept for the next product of the thread.
    static ROWS: Cell<QuantRows> = const {
        Cell::new(QuantRows { words: Vec::new(), scales: Vec::new(), sums: Vec::new() })
    };
}

/// The body of [`PackedWeight::linear`] for the quantised forms; it has checked the lengths.
pub(super) fn linear(
    weight: &PackedWeight,
    kernels: &Kernels,
    x: &[f32],
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let [columns, terms] = weight.shape();
    let (rows, tile) = (x.len() / terms, kernels.quant_tile);
    // Taken, not borrowed: while this thread waits for others, it may run another product.
    let mut quants = ROWS.take();
    quants.fill(kernels, x, terms);
    let (words, scales, sums) = (
        Shared(quants.words.as_mut_ptr()),
        Shared(quants.scales.as_mut_ptr()),
        Shared(quants.sums.as_mut_ptr()),
    );
    let shared = Shared(out.as_mut_ptr());
    for_each_tile(rows, columns, terms / 4, tile, |rows, panels| {
        let tile = QuantTile {
            words: words.get(),
            x_scales: scales.get(),
            x_sums: sums.get(),
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
        unsafe {
            if weight.form() == WeightForm::Int8 {
                (kernels.panels_int8)(&tile);
            } else {
                (kernels.panels_int4)(&tile);
            }
        }
    });
    ROWS.set(quants);
}

impl QuantRows {
    fn fill(&mut self, kernels: &Kernels, x: &[f32], terms: usize) {
        let (rows, tile, groups) = (x.len() / terms, kernels.quant_tile, terms.div_ceil(GROUP));
        let full = rows / tile * tile;
        let padded = full + if rows > full { tile_height(rows - full, tile) } else { 0 };
        self.words.resize(self.words.len().max(padded * groups * WORDS), 0);
        self.scales.resize(self.scales.len().max(padded * groups), 0.0);
        self.sums.resize(self.sums.len().max(padded * groups), 0);
        let (words, scales, sums) = (
            Shared(self.words.as_mut_ptr()),
            Shared(self.scales.as_mut_ptr()),
            Shared(self.sums.as_mut_ptr()),
        );
        for_each_range(rows.div_ceil(tile), 1, tile * terms, |tiles| {
            for index in tiles {
                let start = index * tile;
                let count = (rows - start).min(tile);
                let height = tile_height(count, tile);
                let (first, length) = (start * groups, height * groups);
                // SAFETY: each tile has its own part of the three, which were made long enough.
                let mut job = unsafe {
                    QuantizeTile {
                        x: &x[start * terms..(start + count) * terms],
                        terms,
                        height,
                        words: std::slice::from_raw_parts_mut(
                            words.get().add(first * WORDS),
                            length * WORDS,
                        ),
                        scales: std::slice::from_raw_parts_mut(scales.get().add(first), length),
                        sums: std::slice::from_raw_parts_mut(sums.get().add(first), length),
                    }
                };
                // SAFETY: the table's functions are for this CPU.
                unsafe { (kernels.quantize)(&mut job) };
            }
        });
    }
}

/// Rows of one tile, and where their integers go. Rows past the last one keep what was there: they are
/// never written out.
pub(super) struct QuantizeTile<'a> {
    x: &'a [f32],
    terms: usize,
    height: usize,
    words: &'a mut [i32],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
}

/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn quantize_tile<S: Simd>(tile: &mut QuantizeTile<'_>) {
    for (i, row) in tile.x.chunks_exact(tile.terms).enumerate() {
        for (group, values) in row.chunks(GROUP).enumerate() {
            let mut padded = [0.0_f32; GROUP];
            let values = if values.len() == GROUP {
                values
            } else {
                padded[..values.len()].copy_from_slice(values);
                &padded
            };
            let mut bytes = [0_i8; GROUP];
            // SAFETY: 32 elements are there to read and to write.
            let (scale, sum) = unsafe {
                let halves = [S::load(values.as_ptr()), S::load(values.as_ptr().add(LANES))];
                let zero = S::splat(0.0);
                let size = |v| S::max(v, S::sub(zero, v));
                let greatest = S::max_lane(S::max(size(halves[0]), size(halves[1])));
                let inverse = if greatest > 0.0 { 127.0 / greatest } else { 0.0 };
                let rounded = halves.map(|half| {
                    let scaled = S::round(S::mul(half, S::splat(inverse)));
                    let most = S::splat(127.0);
                    S::max(S::min(scaled, most), S::sub(zero, most))
                });
                S::store_int8(bytes.as_mut_ptr(), rounded[0]);
                S::store_int8(bytes.as_mut_ptr().add(LANES), rounded[1]);
                // Exact: whole numbers of at most 32 * 127.
                (greatest / 127.0, S::sum(S::add(rounded[0], rounded[1])))
            };
            #[allow(clippy::cast_possible_truncation, reason = "a whole number of at most 4064")]
            let sum = sum as i32;
            let words = tile.words[group * WORDS * tile.height..].chunks_mut(tile.height);
            for (column, four) in words.zip(bytes.chunks_exact(4)) {
                let four = [0, 1, 2, 3].map(|at| four[at].cast_unsigned());
                column[i] = i32::from_le_bytes(four);
            }
            tile.scales[group * tile.height + i] = scale;
            tile.sums[group * tile.height + i] = sum;
        }
    }
}

/// A rectangle of a product's output.
pub(super) struct QuantTile {
    words: *const i32,
    x_scales: *const f32,
    x_sums: *const i32,
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

/// Tiles of `MANY` rows and `NV` panels; of one or two rows and `WIDE` panels.
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
    // With one tile of rows, a panel is read to its end; else a block of it serves all row tiles.
    let block = if tile.rows.len() <= MANY { tile.groups } else { BLOCK_GROUPS };
    for start in (0..tile.groups).step_by(block) {
        let groups = start..(start + block).min(tile.groups);
        let mut panel = tile.panels.start;
        let wide = if tile.rows.len() <= 2 { WIDE } else { NV };
        while panel < tile.panels.end {
            let take = if panel + wide <= tile.panels.end { wide } else { 1 };
            let mut row = tile.rows.start;
            while row < tile.rows.end {
                let place = (row, panel);
                // SAFETY: by contract.
                unsafe {
                    match (tile_height(tile.rows.end - row, MANY), take) {
                        (1, 1) => registers::<S, BITS, 1, 1>(tile, place, &groups),
                        (2, 1) => registers::<S, BITS, 2, 1>(tile, place, &groups),
                        (4, 1) => registers::<S, BITS, 4, 1>(tile, place, &groups),
                        (_, 1) => registers::<S, BITS, MANY, 1>(tile, place, &groups),
                        (1, take) if take == WIDE => {
                            registers::<S, BITS, 1, WIDE>(tile, place, &groups);
                        }
                        (2, take) if take == WIDE => {
                            registers::<S, BITS, 2, WIDE>(tile, place, &groups);
                        }
                        (1, _) => registers::<S, BITS, 1, NV>(tile, place, &groups),
                        (2, _) => registers::<S, BITS, 2, NV>(tile, place, &groups),
                        (4, _) => registers::<S, BITS, 4, NV>(tile, place, &groups),
                        (_, _) => registers::<S, BITS, MANY, NV>(tile, place, &groups),
                    }
                }
                row += MANY;
            }
            panel += take;
        }
    }
}

/// Some groups of `MR` rows and `NV` panels, in registers.
#[inline(always)]
unsafe fn registers<S: Simd, const BITS: usize, const MR: usize, const NV: usize>(
    tile: &QuantTile,
    (row, panel): (usize, usize),
    groups: &Range<usize>,
) {
    let count = (tile.rows.end - row).min(MR);
    let group_bytes = GROUP * LANES * BITS / 8;
    let panel_bytes = tile.groups * group_bytes;
    let offset = if BITS == 8 { 128 } else { 8 };
    // SAFETY: by the contract of `quant_tile`: the tile of rows is padded to MR, the panels have
    // `groups` groups, and output is touched only where it exists.
    unsafe {
        let words = tile.words.add(row * tile.groups * WORDS);
        let x_scales = tile.x_scales.add(row * tile.groups);
        let x_sums = tile.x_sums.add(row * tile.groups);
        let mut sums = [[S::splat(0.0); NV]; MR];
        if groups.start > 0 {
            for i in 0..MR {
                for v in 0..NV {
                    if i >= count {
                        continue;
                    }
                    sums[i][v] = load_columns::<S>(tile, row + i, panel + v);
                }
            }
        }
        for group in groups.clone() {
            let mut ints: [[S::I; NV]; MR] =
                std::array::from_fn(|i| [S::splat_int(-offset * *x_sums.add(group * MR + i)); NV]);
            let words = words.add(group * WORDS * MR);
            let weight = tile.weight.add(panel * panel_bytes + group * group_bytes);
            let mut word = 0;
            while word < WORDS {
                let mut bytes = [[S::load_bytes(weight); 2]; NV];
                let line = word * BITS / 8 * 64;
                for v in 0..NV {
                    let from = weight.add(v * panel_bytes + line);
                    if MR <= 8 {
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
                        let four = *words.add((word + part) * MR + i);
                        for v in 0..NV {
                            ints[i][v] = S::dot(ints[i][v], bytes[v][part], four);
                        }
                    }
                }
                word += 8 / BITS;
            }
            for v in 0..NV {
                let at = ((panel + v) * tile.groups + group) * LANES;
                let scale = S::load_bf16(tile.scales.add(at));
                for i in 0..MR {
                    let both = S::mul(scale, S::splat(*x_scales.add(group * MR + i)));
                    sums[i][v] = S::fma(both, S::int_to_f32(ints[i][v]), sums[i][v]);
                }
            }
        }
        // By way of memory, because registers cannot be indexed by a row that is not a constant.
        let mut done = [[[0.0_f32; LANES]; NV]; MR];
        for i in 0..MR {
            for v in 0..NV {
                S::store(done[i][v].as_mut_ptr(), sums[i][v]);
            }
        }
        let is_last = groups.end == tile.groups;
        for i in 0..count {
            for v in 0..NV {
                let sum = S::load(done[i][v].as_ptr());
                store_columns::<S>(tile, (row + i, panel + v), sum, is_last);
            }
        }
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
