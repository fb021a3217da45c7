//! What sixteen lanes can do, and how weights of any storage type become such lanes.

use half::{bf16, f16};

/// Lanes of one vector on every instruction set, so that sums have the same order on all of them.
pub const LANES: usize = 16;

/// Sixteen f32 lanes of one instruction set.
///
/// # Safety
/// Every function needs a CPU with the implementation's features. Pointers must be valid for
/// sixteen elements; alignment is not required.
pub(super) trait Simd: Copy + 'static {
    /// Vectors of sums that are kept in registers at a time.
    const SUMS: usize;
    /// Sixteen f32.
    type V: Copy;
    /// Sixteen i32.
    type I: Copy;
    /// Sixty-four bytes: four for each lane.
    type B: Copy;
    unsafe fn splat(value: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn load_bf16(from: *const bf16) -> Self::V;
    unsafe fn load_f16(from: *const f16) -> Self::V;
    unsafe fn load_int8(from: *const i8) -> Self::V;
    /// Sixteen pairs of bf16 in the bits of sixteen lanes: the first of each, and the second of each.
    unsafe fn split_pairs(pairs: Self::V) -> [Self::V; 2];
    /// Subnormal lanes become zeros of their sign.
    unsafe fn flush(a: Self::V) -> Self::V;
    unsafe fn store(to: *mut f32, value: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a * 2^n` for integral `n` in -126..=127.
    unsafe fn scale_pow2(a: Self::V, n: Self::V) -> Self::V;
    unsafe fn splat_int(value: i32) -> Self::I;
    unsafe fn int_to_f32(a: Self::I) -> Self::V;
    /// `from` is valid for 64 bytes.
    unsafe fn load_bytes(from: *const u8) -> Self::B;
    unsafe fn low_nibbles(a: Self::B) -> Self::B;
    unsafe fn high_nibbles(a: Self::B) -> Self::B;
    /// Byte `SHIFT / 8` of each lane, as it is without a sign.
    unsafe fn byte_to_f32<const SHIFT: u32>(a: Self::B) -> Self::V;
    /// Adds to each lane the product of its four unsigned bytes and the four signed ones of `four`,
    /// exactly, for signed bytes of at least -127.
    unsafe fn dot(sum: Self::I, bytes: Self::B, four: i32) -> Self::I;
    /// The lanes, integral and in -128..=127, as sixteen bytes.
    unsafe fn store_int8(to: *mut i8, value: Self::V);

    /// Adds to each lane of `sum` the products of two pairs of bf16, as the instruction `vdpbf16ps`
    /// does: the second terms' first, each rounded once to the nearest f32, subnormal sums to zero.
    /// No bf16 may be subnormal.
    #[inline(always)]
    unsafe fn dot_bf16(x: Self::V, w: Self::V, sum: Self::V) -> Self::V {
        // SAFETY: lane arithmetic on the CPU's features by the trait's contract.
        unsafe {
            let ([x0, x1], [w0, w1]) = (Self::split_pairs(x), Self::split_pairs(w));
            let second = Self::flush(Self::fma(x1, w1, sum));
            Self::flush(Self::fma(x0, w0, second))
        }
    }

    /// Asks for a cache line; any address will do.
    #[inline(always)]
    unsafe fn prefetch(_address: *const u8) {}

    /// As [`Self::prefetch`], to the second-level cache.
    #[inline(always)]
    unsafe fn prefetch_far(_address: *const u8) {}

    /// Lane `j` of vector `i` becomes lane `i` of vector `j`.
    #[inline(always)]
    unsafe fn transpose(rows: [Self::V; LANES]) -> [Self::V; LANES] {
        let mut square = [[0.0_f32; LANES]; LANES];
        let mut turned = [[0.0_f32; LANES]; LANES];
        // SAFETY: the arrays have sixteen elements; the CPU has the features by the contract.
        unsafe {
            for (to, row) in square.iter_mut().zip(rows) {
                Self::store(to.as_mut_ptr(), row);
            }
            for (i, row) in square.iter().enumerate() {
                for (j, value) in row.iter().enumerate() {
                    turned[j][i] = *value;
                }
            }
            turned.map(|row| Self::load(row.as_ptr()))
        }
    }

    /// The lanes' sum, always added as a balanced tree.
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        let mut lanes = [0.0_f32; LANES];
        // SAFETY: the array has sixteen elements; the CPU has the features by the trait's contract.
        unsafe { Self::store(lanes.as_mut_ptr(), a) };
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }

    /// The greatest lane.
    #[inline(always)]
    unsafe fn max_lane(a: Self::V) -> f32 {
        let mut lanes = [0.0_f32; LANES];
        // SAFETY: the array has sixteen elements; the CPU has the features by the trait's contract.
        unsafe { Self::store(lanes.as_mut_ptr(), a) };
        lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// A storage type of weights: how two successive terms of sixteen columns come out of a panel, and how
/// a term is multiplied.
pub(super) trait Weight: Copy + 'static {
    /// Terms of one chain of additions.
    const SUM_BLOCK: usize = super::product::SUM_BLOCK;
    /// # Safety
    /// `from` is valid for 32 elements; the CPU has the features of `S`.
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::V; 2];

    /// `x * w + sum`.
    ///
    /// # Safety
    /// The CPU has the features of `S`.
    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(x: S::V, w: S::V, sum: S::V) -> S::V {
        // SAFETY: by contract.
        unsafe { S::fma(x, w, sum) }
    }
}

impl Weight for f32 {
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::V; 2] {
        // SAFETY: by contract.
        unsafe { [S::load(from), S::load(from.add(LANES))] }
    }
}

impl Weight for f16 {
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::V; 2] {
        // SAFETY: by contract.
        unsafe { [S::load_f16(from), S::load_f16(from.add(LANES))] }
    }
}

impl Weight for bf16 {
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::V; 2] {
        // SAFETY: by contract.
        unsafe { S::split_pairs(S::load(from.cast())) }
    }
}

/// Two bf16 that count as one term: a factor of it is a pair, too, in the bits of an f32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Bf16Pair(u32);

impl Weight for Bf16Pair {
    /// As many bytes as 512 terms of one bf16 each: two panels stay in the first-level cache.
    const SUM_BLOCK: usize = 256;
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::V; 2] {
        // SAFETY: by contract.
        unsafe { [S::load(from.cast()), S::load(from.add(LANES).cast())] }
    }
    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(x: S::V, w: S::V, sum: S::V) -> S::V {
        // SAFETY: by contract.
        unsafe { S::dot_bf16(x, w, sum) }
    }
}

/// The first `count` (< 16) elements at `from`; the other lanes are zero.
///
/// # Safety
/// `from` is valid for `count` elements; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn load_partial<S: Simd>(from: *const f32, count: usize) -> S::V {
    let mut lanes = [0.0_f32; LANES];
    // SAFETY: `count` elements are readable by contract, and fewer than sixteen are written.
    unsafe {
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count.min(LANES));
        S::load(lanes.as_ptr())
    }
}

/// Stores the first `count` (<= 16) lanes at `to`.
///
/// # Safety
/// `to` is valid for `count` elements; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn store_partial<S: Simd>(to: *mut f32, value: S::V, count: usize) {
    let mut lanes = [0.0_f32; LANES];
    // SAFETY: the array holds sixteen elements, `count` of which are writable at `to`.
    unsafe {
        S::store(lanes.as_mut_ptr(), value);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count.min(LANES));
    }
}

/// `e^x` to about 1 ulp, by Cody-Waite reduction and a polynomial of degree 6 (the coefficients of
/// Cephes' `expf`). Arguments below -87 give about 1e-38, above 88 about 1e38.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: as above; only lane arithmetic.
    unsafe {
        let x = S::min(S::max(x, S::splat(-87.0)), S::splat(88.0));
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let e = S::add(S::fma(p, S::mul(r, r), r), S::splat(1.0));
        S::scale_pow2(e, n)
    }
}
