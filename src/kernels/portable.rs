//! Plain Rust: the specification that the vector versions are tested against.

use half::{bf16, f16};

use super::simd::{LANES, Simd};

/// Sixteen lanes in an array.
#[derive(Clone, Copy)]
pub(super) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

impl Simd for Portable {
    type V = V;
    #[inline(always)]
    unsafe fn splat(value: f32) -> V {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> V {
        // SAFETY: sixteen elements are readable by the trait's contract.
        unsafe { from.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> V {
        // SAFETY: as above.
        unsafe { from.cast::<[bf16; LANES]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> V {
        // SAFETY: as above.
        unsafe { from.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: V) {
        // SAFETY: sixteen elements are writable by the trait's contract.
        unsafe { to.cast::<V>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        map2(a, b, |a, b| a / b)
    }
    /// Rounds twice: a fused multiply-add without the instruction would be a slow library call.
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        map2(a, b, f32::max)
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        map2(a, b, f32::min)
    }
    #[inline(always)]
    unsafe fn round(a: V) -> V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn scale_pow2(a: V, n: V) -> V {
        #[allow(clippy::cast_possible_truncation)]
        map2(a, n, |a, n| a * f32::from_bits(((n as i32 + 127) << 23).cast_unsigned()))
    }
}

kernels_for!(Portable, "portable", #[allow(clippy::inline_always)]);
