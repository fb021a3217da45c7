//! The general matrix product, for gradients of weights and of adapters: matrices that are used once.
#![allow(clippy::needless_range_loop, reason = "register tiles are indexed in both directions")]

use std::ops::Range;

use super::{
    Kernels,
    simd::{LANES, Simd, load_partial, store_partial},
    threads::{Shared, for_each_range},
};

/// Terms that [`matmul_tile`] sums in registers before it adds them to the output.
const SUM_BLOCK: usize = 512;

/// `out = [out +] alpha * A B`, where `A` may be a transpose.
pub struct MatmulJob<'a> {
    /// `A`: element `(i, k)` is at `i * a_strides.0 + k * a_strides.1`.
    pub a: &'a [f32],
    /// Distance between rows and between columns of `A`.
    pub a_strides: (usize, usize),
    /// `B`, `[k, n]`, rows contiguous.
    pub b: &'a [f32],
    /// Rows of the output, terms of the sum, columns of the output.
    pub shape: (usize, usize, usize),
    /// Factor on the product.
    pub alpha: f32,
    /// Adds to the output instead of replacing it.
    pub accumulate: bool,
}

impl MatmulJob<'_> {
    /// Computes into `out`, `[m, n]`. Each element is summed over `k` one term after the other.
    ///
    /// # Panics
    /// Where the lengths do not fit each other.
    pub fn run(&self, kernels: &Kernels, out: &mut [f32]) {
        let (m, k, n) = self.shape;
        if m == 0 || n == 0 {
            return;
        }
        let last = (m - 1) * self.a_strides.0 + k.saturating_sub(1) * self.a_strides.1;
        assert!(k == 0 || self.a.len() > last, "a is shorter than {m} x {k}");
        assert!(self.b.len() >= k * n, "b is shorter than {k} x {n}");
        assert_eq!(out.len(), m * n, "out is not {m} x {n}");
        let tile = kernels.matmul;
        let shared = Shared(out.as_mut_ptr());
        let run = |rows: Range<usize>, columns: Range<usize>| {
            let job = MatmulTile {
                a: self.a.as_ptr(),
                a_strides: self.a_strides,
                b: self.b.as_ptr(),
                out: shared.get(),
                n,
                k,
                rows,
                columns,
                alpha: self.alpha,
                accumulate: self.accumulate,
            };
            // SAFETY: the lengths were checked above, and tasks write disjoint rectangles.
            unsafe { tile(&job) };
        };
        if m < 24 {
            for_each_range(n, 4 * LANES, m * k, |columns| run(0..m, columns));
        } else {
            for_each_range(m, 6, n * k, |rows| run(rows, 0..n));
        }
    }
}

/// A rectangle of a [`MatmulJob`]'s output.
pub(super) struct MatmulTile {
    a: *const f32,
    a_strides: (usize, usize),
    b: *const f32,
    out: *mut f32,
    n: usize,
    k: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    alpha: f32,
    accumulate: bool,
}

/// # Safety
/// The pointers are valid for the matrices that `tile` describes, `rows` and `columns` lie within
/// them, nobody else writes this rectangle, and the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn matmul_tile<S: Simd>(tile: &MatmulTile) {
    let mut start = 0;
    loop {
        let terms = start..(start + SUM_BLOCK).min(tile.k);
        let mut column = tile.columns.start;
        // SAFETY: by contract; the loops stay inside `rows`, `columns` and `terms`.
        unsafe {
            while column + 4 * LANES <= tile.columns.end {
                matmul_rows::<S, 4>(tile, &terms, column, LANES);
                column += 4 * LANES;
            }
            while column < tile.columns.end {
                let count = LANES.min(tile.columns.end - column);
                matmul_rows::<S, 1>(tile, &terms, column, count);
                column += count;
            }
        }
        start += SUM_BLOCK;
        if start >= tile.k {
            break;
        }
    }
}

#[inline(always)]
unsafe fn matmul_rows<S: Simd, const NV: usize>(
    tile: &MatmulTile,
    terms: &Range<usize>,
    column: usize,
    lanes: usize,
) {
    let mut row = tile.rows.start;
    // SAFETY: by the contract of `matmul_tile`.
    unsafe {
        while row + 6 <= tile.rows.end {
            matmul_registers::<S, 6, NV>(tile, terms, (row, column), lanes);
            row += 6;
        }
        while row + 4 <= tile.rows.end {
            matmul_registers::<S, 4, NV>(tile, terms, (row, column), lanes);
            row += 4;
        }
        while row < tile.rows.end {
            matmul_registers::<S, 1, NV>(tile, terms, (row, column), lanes);
            row += 1;
        }
    }
}

#[inline(always)]
unsafe fn matmul_registers<S: Simd, const MR: usize, const NV: usize>(
    tile: &MatmulTile,
    terms: &Range<usize>,
    (row, column): (usize, usize),
    lanes: usize,
) {
    // SAFETY: by the contract of `matmul_tile`; only `lanes` columns are touched when NV is 1.
    unsafe {
        let a = tile.a.add(row * tile.a_strides.0);
        let mut sums = [[S::splat(0.0); NV]; MR];
        for k in terms.clone() {
            let b = tile.b.add(k * tile.n + column);
            let mut vectors = [S::splat(0.0); NV];
            for v in 0..NV {
                vectors[v] = if lanes == LANES {
                    S::load(b.add(v * LANES))
                } else {
                    load_partial::<S>(b, lanes)
                };
            }
            for i in 0..MR {
                let factor = S::splat(*a.add(i * tile.a_strides.0 + k * tile.a_strides.1));
                for v in 0..NV {
                    sums[i][v] = S::fma(factor, vectors[v], sums[i][v]);
                }
            }
        }
        let add = tile.accumulate || terms.start > 0;
        let alpha = S::splat(tile.alpha);
        for i in 0..MR {
            for v in 0..NV {
                let to = tile.out.add((row + i) * tile.n + column + v * LANES);
                let mut value = S::mul(sums[i][v], alpha);
                if lanes == LANES {
                    if add {
                        value = S::add(S::load(to), value);
                    }
                    S::store(to, value);
                } else {
                    if add {
                        value = S::add(load_partial::<S>(to, lanes), value);
                    }
                    store_partial::<S>(to, value, lanes);
                }
            }
        }
    }
}
