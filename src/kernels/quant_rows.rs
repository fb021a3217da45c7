//! Rows of a product's input rounded to 8 bits, each group of terms by a scale of its own.
//!
//! Groups are as long as those of the weights. Sixteen of them are rounded at a time, so that their
//! greatest magnitudes and their sums are found in the lanes of a vector.
#![allow(clippy::needless_range_loop, reason = "vectors are indexed")]

use std::cell::Cell;

use super::{
    Kernels,
    panels::WeightForm,
    quantize::{size, whole},
    row_tiles::tile_height,
    simd::{LANES, Simd},
    threads::{Shared, for_each_range},
};

/// Multiply-adds that rounding one term is worth.
const WORK: usize = 2;
/// Terms that a thread may keep memory for: about 16 MiB.
const MAX_KEPT: usize = 12 << 20;
/// How far ahead of the rounding rows are asked for.
const PREFETCH_BYTES: usize = 6 << 10;
/// Terms of a group at most.
const MAX_GROUP: usize = 64;

/// Rows as integers, in tiles as high as [`tile_height`] says.
#[derive(Default)]
pub(super) struct QuantRows {
    /// Four terms each: tile after tile, `[groups][rows of the tile][words of a group]`.
    words: Vec<i32>,
    /// `[groups][rows of the tile]`
    scales: Vec<f32>,
    /// Alike: what a group's sum of products begins with, which takes the weights' offset off.
    starts: Vec<i32>,
}

thread_local! {
    /// Kept for the next product of the thread.
    static ROWS: Cell<QuantRows> = const {
        Cell::new(QuantRows { words: Vec::new(), scales: Vec::new(), starts: Vec::new() })
    };
}

/// Where rounded rows lie; row `r`'s tile begins `r * groups` groups after the start.
#[derive(Clone, Copy)]
pub(super) struct QuantPlaces {
    pub(super) words: Shared<i32>,
    pub(super) scales: Shared<f32>,
    pub(super) starts: Shared<i32>,
}

/// Calls `body` with the rounded rows of `x [rows, terms]` in tiles of `tile` rows, for weights of that
/// form.
pub(super) fn with_quant_rows(
    kernels: &Kernels,
    x: &[f32],
    (terms, tile): (usize, usize),
    form: WeightForm,
    body: impl FnOnce(QuantPlaces),
) {
    // Taken, not borrowed: while this thread waits for others, it may run another product.
    let mut rows = ROWS.take();
    body(rows.fill(kernels, x, (terms, tile), form));
    if rows.words.len() * 4 <= MAX_KEPT {
        ROWS.set(rows);
    }
}

impl QuantRows {
    fn fill(
        &mut self,
        kernels: &Kernels,
        x: &[f32],
        (terms, tile): (usize, usize),
        form: WeightForm,
    ) -> QuantPlaces {
        let (rows, groups) = (x.len() / terms, terms.div_ceil(form.group()));
        let full = rows / tile * tile;
        let padded = full + if rows > full { tile_height(rows - full, tile) } else { 0 };
        self.words.resize(self.words.len().max(padded * groups * form.group() / 4), 0);
        self.scales.resize(self.scales.len().max(padded * groups), 0.0);
        self.starts.resize(self.starts.len().max(padded * groups), 0);
        let places = QuantPlaces {
            words: Shared(self.words.as_mut_ptr()),
            scales: Shared(self.scales.as_mut_ptr()),
            starts: Shared(self.starts.as_mut_ptr()),
        };
        for_each_range(rows, 1, WORK * terms, |range| {
            let job = QuantizeRows { x, terms, form, tile, rows: range, places };
            // SAFETY: each row has its own part of the three, which were made long enough; the
            // table's functions are for this CPU.
            unsafe { (kernels.quantize)(&job) };
        });
        places
    }
}

/// Some rows of `x`, and where the integers of all rows go. Rows that only fill up a tile keep what
/// was there: their products are never written out.
pub(super) struct QuantizeRows<'a> {
    x: &'a [f32],
    terms: usize,
    /// Of the weights.
    form: WeightForm,
    /// Rows of a whole tile.
    tile: usize,
    rows: std::ops::Range<usize>,
    places: QuantPlaces,
}

/// # Safety
/// The places have room for all rows of `x`, nobody else writes those of `rows`, and the CPU has the
/// features of `S`.
#[inline(always)]
pub(super) unsafe fn quantize_rows<S: Simd>(job: &QuantizeRows<'_>) {
    // SAFETY: by contract.
    unsafe {
        if job.form == WeightForm::Int8 {
            rows_in_groups::<S, { WeightForm::Int8.group() / LANES }>(job, 128);
        } else {
            rows_in_groups::<S, { WeightForm::Int4.group() / LANES }>(job, 8);
        }
    }
}

/// Groups of `PARTS` vectors, for weights that are held plus `offset`.
#[inline(always)]
unsafe fn rows_in_groups<S: Simd, const PARTS: usize>(job: &QuantizeRows<'_>, offset: i32) {
    let length = PARTS * LANES;
    let (groups, num_rows) = (job.terms.div_ceil(length), job.x.len() / job.terms);
    for row in job.rows.clone() {
        let first = row / job.tile * job.tile;
        let height = tile_height(num_rows - first, job.tile);
        let values = &job.x[row * job.terms..(row + 1) * job.terms];
        for start in (0..groups).step_by(LANES) {
            let whole_groups = (values.len() / length - start).min(LANES);
            let values = &values[start * length..];
            let at = first * groups + start * height + (row - first);
            // SAFETY: the groups are there to read, and by contract to write.
            unsafe {
                let to = Places { job, offset, at, height };
                to.round::<S, PARTS>(values.as_ptr(), whole_groups);
                let rest = &values[whole_groups * length..];
                if whole_groups < LANES && !rest.is_empty() {
                    let mut padded = [0.0_f32; MAX_GROUP];
                    padded[..rest.len()].copy_from_slice(rest);
                    let at = at + whole_groups * height;
                    Places { at, ..to }.round::<S, PARTS>(padded.as_ptr(), 1);
                }
            }
        }
    }
}

/// Where the groups of a row go: to `at` and every `height` groups from there.
#[derive(Clone, Copy)]
struct Places<'a> {
    job: &'a QuantizeRows<'a>,
    offset: i32,
    at: usize,
    height: usize,
}

impl Places<'_> {
    /// Rounds `count` (<= 16) groups to integers in -127..=127.
    ///
    /// # Safety
    /// So many groups are readable and their places writable; the CPU has the features of `S`.
    #[inline(always)]
    unsafe fn round<S: Simd, const PARTS: usize>(self, values: *const f32, count: usize) {
        let places = self.job.places;
        // SAFETY: by contract.
        unsafe {
            let mut sizes = [S::splat(0.0); LANES];
            for group in 0..count {
                for part in 0..PARTS {
                    let values = values.add((group * PARTS + part) * LANES);
                    S::prefetch(values.cast::<u8>().wrapping_add(PREFETCH_BYTES));
                    let values = S::load(values);
                    sizes[group] = S::max(sizes[group], size::<S>(values));
                }
            }
            let mut greatest = [0.0_f32; LANES];
            S::store(greatest.as_mut_ptr(), across::<S, true>(sizes));
            let mut inverse = [0.0_f32; LANES];
            for group in 0..LANES {
                let size = greatest[group];
                inverse[group] = if size > 0.0 { 127.0 / size } else { 0.0 };
            }
            let mut sums = [S::splat(0.0); LANES];
            for group in 0..count {
                let at = self.at + group * self.height;
                let to = places.words.get().add(at * PARTS * LANES / 4).cast::<i8>();
                for part in 0..PARTS {
                    let values = S::load(values.add((group * PARTS + part) * LANES));
                    let rounded = S::mul(values, S::splat(inverse[group]));
                    let rounded = whole::<S>(rounded, -127.0, 127.0);
                    S::store_int8(to.add(part * LANES), rounded);
                    sums[group] = S::add(sums[group], rounded);
                }
            }
            // Whole numbers far below 2^24: exact in any order.
            let mut totals = [0.0_f32; LANES];
            S::store(totals.as_mut_ptr(), across::<S, false>(sums));
            for group in 0..count {
                let at = self.at + group * self.height;
                *places.scales.get().add(at) = greatest[group] / 127.0;
                #[allow(clippy::cast_possible_truncation, reason = "a whole number below 2^14")]
                let total = totals[group] as i32;
                *places.starts.get().add(at) = -self.offset * total;
            }
        }
    }
}

/// Lane `i`: the greatest lane of vector `i`, or the sum of them.
#[inline(always)]
unsafe fn across<S: Simd, const GREATEST: bool>(vectors: [S::V; LANES]) -> S::V {
    // SAFETY: lane arithmetic.
    unsafe {
        let columns = S::transpose(vectors);
        let mut joined = columns[0];
        for i in 1..LANES {
            let column = columns[i];
            joined = if GREATEST { S::max(joined, column) } else { S::add(joined, column) };
        }
        joined
    }
}
