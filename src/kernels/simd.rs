//! What sixteen lanes of f32 can do, and how a weight of any storage type becomes such lanes.

use half::{bf16, f16};

/// Lanes of one vector on every instruction set, so that sums have the same order on all of them.
pub const LANES: usize = 16;

/// Sixteen f32 lanes of one instruction set.
///
/// # Safety
/// Every function needs a CPU with the implementation's features. Pointers must be valid for
/// sixteen elements; alignment is not required.
#[allow(
    unreachable_pub,
    reason = "named in the public trait `Weight`, which nobody else implements"
)]
pub trait Simd: Copy + 'static {
    /// Sixteen f32.
    type V: Copy;
    unsafe fn splat(value: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn load_bf16(from: *const bf16) -> Self::V;
    unsafe fn load_f16(from: *const f16) -> Self::V;
    unsafe fn store(to: *mut f32, value: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
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

/// A storage type of weights.
pub trait Weight: Copy + Send + Sync + Default + 'static {
    /// The value as f32.
    fn to_f32(self) -> f32;
    /// Sixteen values as lanes.
    ///
    /// # Safety
    /// As `Simd::load`.
    #[doc(hidden)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
    /// The table's product for this type.
    #[doc(hidden)]
    fn linear(table: &super::Kernels) -> unsafe fn(&super::gemm::LinearTile<Self>);
    /// The table's general product for this type.
    #[doc(hidden)]
    fn matmul(table: &super::Kernels) -> unsafe fn(&super::gemm::MatmulTile<Self>);
}

macro_rules! weight {
    ($ty:ty, $to_f32:expr, $load:ident, $linear:ident, $matmul:ident) => {
        impl Weight for $ty {
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to_f32(self)
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(from: *const Self) -> S::V {
                // SAFETY: the caller keeps the contract of `Simd::load`.
                unsafe { S::$load(from) }
            }
            fn linear(table: &super::Kernels) -> unsafe fn(&super::gemm::LinearTile<Self>) {
                table.$linear
            }
            fn matmul(table: &super::Kernels) -> unsafe fn(&super::gemm::MatmulTile<Self>) {
                table.$matmul
            }
        }
    };
}

weight!(f32, |x| x, load, linear_f32, matmul_f32);
weight!(bf16, bf16::to_f32, load_bf16, linear_bf16, matmul_bf16);
weight!(f16, f16::to_f32, load_f16, linear_f16, matmul_f16);

/// The first `count` (< 16) elements at `from`; the other lanes are zero.
///
/// # Safety
/// `from` is valid for `count` elements; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn load_partial<S: Simd, W: Weight>(from: *const W, count: usize) -> S::V {
    let mut lanes = [W::default(); LANES];
    // SAFETY: `count` elements are readable by contract, and fewer than sixteen are written.
    unsafe {
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count.min(LANES));
        W::load::<S>(lanes.as_ptr())
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
