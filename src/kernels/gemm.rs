//! Matrix products: `x W^T` for the forward pass, and the general product that backward passes and
//! LoRA's expansion need.
#![allow(clippy::needless_range_loop, reason = "register tiles are indexed in both directions")]

use std::ops::Range;

use super::{
    Kernels,
    simd::{LANES, Simd, Weight, load_partial, store_partial},
    threads::{Shared, for_each_range},
};

/// Rows of `x` that stay in the second-level cache while the weights pass by.
const ROW_BLOCK: usize = 48;
/// Weight rows of one register tile.
const COLUMN_TILE: usize = 4;
/// Terms that [`matmul_tile`] sums in registers before it adds them to the output.
pub(super) const SUM_BLOCK: usize = 512;

/// `out = x W^T + bias`.
pub struct LinearJob<'a, W> {
    /// `[rows, in_features]`
    pub x: &'a [f32],
    /// `[out_features, in_features]`
    pub weight: &'a [W],
    /// `[out_features]`
    pub bias: Option<&'a [f32]>,
    /// Length of a row of `x` and of `weight`.
    pub in_features: usize,
    /// Rows of `weight`.
    pub out_features: usize,
}

impl<W: Weight> LinearJob<'_, W> {
    /// Computes into `out`, `[rows, out_features]`. Each element is one sum over `in_features` in
    /// sixteen interleaved chains, whatever the number of rows or threads.
    ///
    /// # Panics
    /// Where the lengths do not fit each other.
    pub fn run(&self, kernels: &Kernels, out: &mut [f32]) {
        let (k, n) = (self.in_features, self.out_features);
        let rows = self.x.len() / k.max(1);
        assert_eq!(self.x.len(), rows * k, "x is not whole rows of {k}");
        assert_eq!(self.weight.len(), n * k, "weight is not {n} x {k}");
        assert_eq!(out.len(), rows * n, "out is not {rows} x {n}");
        assert!(self.bias.is_none_or(|bias| bias.len() == n), "bias is not {n} long");
        let tile = W::linear(kernels);
        let shared = Shared(out.as_mut_ptr());
        let run = |rows: Range<usize>, columns: Range<usize>| {
            let job = LinearTile {
                x: self.x.as_ptr(),
                weight: self.weight.as_ptr(),
                bias: self.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
                out: shared.get(),
                in_features: k,
                out_features: n,
                rows,
                columns,
            };
            // SAFETY: the lengths were checked above, rows and columns are within them, and tasks
            // write disjoint rectangles of `out`.
            unsafe { tile(&job) };
        };
        if rows <= ROW_BLOCK {
            for_each_range(n, COLUMN_TILE, rows * k, |columns| run(0..rows, columns));
        } else {
            for_each_range(rows, 12, n * k, |rows| {
                for start in rows.clone().step_by(ROW_BLOCK) {
                    run(start..(start + ROW_BLOCK).min(rows.end), 0..n);
                }
            });
        }
    }
}

/// A rectangle of a [`LinearJob`]'s output.
#[allow(unreachable_pub, reason = "named in the public trait `Weight`")]
pub struct LinearTile<W> {
    x: *const f32,
    weight: *const W,
    bias: *const f32,
    out: *mut f32,
    in_features: usize,
    out_features: usize,
    rows: Range<usize>,
    columns: Range<usize>,
}

/// # Safety
/// The pointers are valid for the matrices that `tile` describes, `rows` and `columns` lie within
/// them, nobody else writes this rectangle, and the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn linear_tile<S: Simd, W: Weight>(tile: &LinearTile<W>) {
    let mut column = tile.columns.start;
    // SAFETY: by contract; the loops stay inside `rows` and `columns`.
    unsafe {
        while column + COLUMN_TILE <= tile.columns.end {
            linear_rows::<S, W, COLUMN_TILE>(tile, column);
            column += COLUMN_TILE;
        }
        while column < tile.columns.end {
            linear_rows::<S, W, 1>(tile, column);
            column += 1;
        }
    }
}

#[inline(always)]
unsafe fn linear_rows<S: Simd, W: Weight, const NR: usize>(tile: &LinearTile<W>, column: usize) {
    let mut row = tile.rows.start;
    // SAFETY: by the contract of `linear_tile`.
    unsafe {
        while row + 6 <= tile.rows.end {
            linear_registers::<S, W, 6, NR>(tile, row, column);
            row += 6;
        }
        while row + 2 <= tile.rows.end {
            linear_registers::<S, W, 2, NR>(tile, row, column);
            row += 2;
        }
        if row < tile.rows.end {
            linear_registers::<S, W, 1, NR>(tile, row, column);
        }
    }
}

#[inline(always)]
unsafe fn linear_registers<S: Simd, W: Weight, const MR: usize, const NR: usize>(
    tile: &LinearTile<W>,
    row: usize,
    column: usize,
) {
    let k = tile.in_features;
    // SAFETY: by the contract of `linear_tile`: rows row..row+MR of x and weight rows
    // column..column+NR exist, and reads stop at `k`.
    unsafe {
        let x = tile.x.add(row * k);
        let weight = tile.weight.add(column * k);
        let mut sums = [[S::splat(0.0); NR]; MR];
        let mut at = 0;
        while at + LANES <= k {
            let mut w = [S::splat(0.0); NR];
            for j in 0..NR {
                w[j] = W::load::<S>(weight.add(j * k + at));
            }
            for i in 0..MR {
                let lanes = S::load(x.add(i * k + at));
                for j in 0..NR {
                    sums[i][j] = S::fma(lanes, w[j], sums[i][j]);
                }
            }
            at += LANES;
        }
        if at < k {
            for j in 0..NR {
                let w = load_partial::<S, W>(weight.add(j * k + at), k - at);
                for i in 0..MR {
                    let lanes = load_partial::<S, f32>(x.add(i * k + at), k - at);
                    sums[i][j] = S::fma(lanes, w, sums[i][j]);
                }
            }
        }
        for i in 0..MR {
            for j in 0..NR {
                let bias = if tile.bias.is_null() { 0.0 } else { *tile.bias.add(column + j) };
                *tile.out.add((row + i) * tile.out_features + column + j) =
                    S::sum(sums[i][j]) + bias;
            }
        }
    }
}

/// `out = [out +] alpha * A B`, where `A` may be a transpose.
pub struct MatmulJob<'a, W> {
    /// `A`: element `(i, k)` is at `i * a_strides.0 + k * a_strides.1`.
    pub a: &'a [f32],
    /// Distance between rows and between columns of `A`.
    pub a_strides: (usize, usize),
    /// `B`, `[k, n]`, rows contiguous.
    pub b: &'a [W],
    /// Rows of the output, terms of the sum, columns of the output.
    pub shape: (usize, usize, usize),
    /// Factor on the product.
    pub alpha: f32,
    /// Adds to the output instead of replacing it.
    pub accumulate: bool,
}

impl<W: Weight> MatmulJob<'_, W> {
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
        let tile = W::matmul(kernels);
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
#[allow(unreachable_pub, reason = "named in the public trait `Weight`")]
pub struct MatmulTile<W> {
    a: *const f32,
    a_strides: (usize, usize),
    b: *const W,
    out: *mut f32,
    n: usize,
    k: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    alpha: f32,
    accumulate: bool,
}

/// # Safety
/// As [`linear_tile`].
#[inline(always)]
pub(super) unsafe fn matmul_tile<S: Simd, W: Weight>(tile: &MatmulTile<W>) {
    let mut start = 0;
    loop {
        let terms = start..(start + SUM_BLOCK).min(tile.k);
        let mut column = tile.columns.start;
        // SAFETY: by contract; the loops stay inside `rows`, `columns` and `terms`.
        unsafe {
            while column + 4 * LANES <= tile.columns.end {
                matmul_rows::<S, W, 4>(tile, &terms, column, LANES);
                column += 4 * LANES;
            }
            while column < tile.columns.end {
                let count = LANES.min(tile.columns.end - column);
                matmul_rows::<S, W, 1>(tile, &terms, column, count);
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
unsafe fn matmul_rows<S: Simd, W: Weight, const NV: usize>(
    tile: &MatmulTile<W>,
    terms: &Range<usize>,
    column: usize,
    lanes: usize,
) {
    let mut row = tile.rows.start;
    // SAFETY: by the contract of `matmul_tile`.
    unsafe {
        while row + 6 <= tile.rows.end {
            matmul_registers::<S, W, 6, NV>(tile, terms, (row, column), lanes);
            row += 6;
        }
        while row < tile.rows.end {
            matmul_registers::<S, W, 1, NV>(tile, terms, (row, column), lanes);
            row += 1;
        }
    }
}

#[inline(always)]
unsafe fn matmul_registers<S: Simd, W: Weight, const MR: usize, const NV: usize>(
    tile: &MatmulTile<W>,
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
                    W::load::<S>(b.add(v * LANES))
                } else {
                    load_partial::<S, W>(b, lanes)
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
                        value = S::add(load_partial::<S, f32>(to, lanes), value);
                    }
                    store_partial::<S>(to, value, lanes);
                }
            }
        }
    }
}
