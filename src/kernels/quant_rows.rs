//! Rows of a product's input rounded to 8 bits, each group of 32 terms by a scale of its own.

use std::cell::Cell;

use super::{
    Kernels,
    panels::GROUP,
    quantize::{size, whole},
    row_tiles::tile_height,
    simd::{LANES, Simd},
    threads::{Shared, for_each_range},
};

/// Four-byte words of a group.
pub(super) const WORDS: usize = GROUP / 4;
/// Multiply-adds that rounding one term is worth.
const WORK: usize = 4;
/// Groups that a thread may keep memory for: about 16 MiB.
const MAX_KEPT: usize = (16 << 20) / (GROUP + 8);

/// Rows as integers, in tiles as high as [`tile_height`] says.
#[derive(Default)]
pub(super) struct QuantRows {
    /// Four terms each: tile after tile, `[groups][rows of the tile][WORDS]`.
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

/// Calls `body` with the rounded rows of `x [rows, terms]` in tiles of `tile` rows, for weights that are
/// held plus `offset`.
pub(super) fn with_quant_rows(
    kernels: &Kernels,
    x: &[f32],
    (terms, tile): (usize, usize),
    offset: i32,
    body: impl FnOnce(QuantPlaces),
) {
    // Taken, not borrowed: while this thread waits for others, it may run another product.
    let mut rows = ROWS.take();
    body(rows.fill(kernels, x, (terms, tile), offset));
    if rows.scales.len() <= MAX_KEPT {
        ROWS.set(rows);
    }
}

impl QuantRows {
    fn fill(
        &mut self,
        kernels: &Kernels,
        x: &[f32],
        (terms, tile): (usize, usize),
        offset: i32,
    ) -> QuantPlaces {
        let (rows, groups) = (x.len() / terms, terms.div_ceil(GROUP));
        let full = rows / tile * tile;
        let padded = full + if rows > full { tile_height(rows - full, tile) } else { 0 };
        self.words.resize(self.words.len().max(padded * groups * WORDS), 0);
        self.scales.resize(self.scales.len().max(padded * groups), 0.0);
        self.starts.resize(self.starts.len().max(padded * groups), 0);
        let places = QuantPlaces {
            words: Shared(self.words.as_mut_ptr()),
            scales: Shared(self.scales.as_mut_ptr()),
            starts: Shared(self.starts.as_mut_ptr()),
        };
        for_each_range(rows, 1, WORK * terms, |range| {
            let job = QuantizeRows { x, terms, offset, tile, rows: range, places };
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
    offset: i32,
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
    let (groups, num_rows) = (job.terms.div_ceil(GROUP), job.x.len() / job.terms);
    for row in job.rows.clone() {
        let first = row / job.tile * job.tile;
        let height = tile_height(num_rows - first, job.tile);
        let values = &job.x[row * job.terms..(row + 1) * job.terms];
        for (group, values) in values.chunks(GROUP).enumerate() {
            let mut padded = [0.0_f32; GROUP];
            let values = if values.len() == GROUP {
                values
            } else {
                padded[..values.len()].copy_from_slice(values);
                &padded
            };
            let at = first * groups + group * height + (row - first);
            // SAFETY: 32 elements are there to read, and by contract as many bytes to write.
            unsafe {
                let to = job.places.words.get().add(at * WORDS).cast::<i8>();
                let (scale, sum) = quantize_group::<S>(values, to);
                *job.places.scales.get().add(at) = scale;
                *job.places.starts.get().add(at) = -job.offset * sum;
            }
        }
    }
}

/// Writes 32 integers in -127..=127; returns their scale and their sum.
///
/// # Safety
/// 32 elements are readable, 32 bytes writable; the CPU has the features of `S`.
#[inline(always)]
unsafe fn quantize_group<S: Simd>(values: &[f32], to: *mut i8) -> (f32, i32) {
    // SAFETY: by contract.
    unsafe {
        let halves = [S::load(values.as_ptr()), S::load(values.as_ptr().add(LANES))];
        let greatest = S::max_lane(S::max(size::<S>(halves[0]), size::<S>(halves[1])));
        let inverse = S::splat(if greatest > 0.0 { 127.0 / greatest } else { 0.0 });
        // No closures here: they would be called, not inlined.
        let rounded = [
            whole::<S>(S::mul(halves[0], inverse), -127.0, 127.0),
            whole::<S>(S::mul(halves[1], inverse), -127.0, 127.0),
        ];
        S::store_int8(to, rounded[0]);
        S::store_int8(to.add(LANES), rounded[1]);
        // Whole numbers far below 2^24: exact in any order.
        #[allow(clippy::cast_possible_truncation, reason = "a whole number below 2^13")]
        let sum = S::sum(S::add(rounded[0], rounded[1])) as i32;
        (greatest / 127.0, sum)
    }
}
