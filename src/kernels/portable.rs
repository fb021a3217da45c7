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
    const SUMS: usize = 4;
    type V = V;
    type I = [i32; LANES];
    type B = [[u8; 4]; LANES];
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
    unsafe fn load_int8(from: *const i8) -> V {
        // SAFETY: as above.
        unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
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
    unsafe fn sub(a: V, b: V) -> V {
        map2(a, b, |a, b| a - b)
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
    #[inline(always)]
    unsafe fn split_pairs(pairs: V) -> [V; 2] {
        let second = pairs.map(|pair| f32::from_bits(pair.to_bits() & 0xFFFF_0000));
        [pairs.map(|pair| f32::from_bits(pair.to_bits() << 16)), second]
    }
    #[inline(always)]
    unsafe fn flush(a: V) -> V {
        a.map(|lane| if lane.is_subnormal() { 0.0_f32.copysign(lane) } else { lane })
    }
    /// By way of f64, which rounds as a fused multiply-add does: it holds a product of bf16 exactly, and
    /// a sum that it does not hold is the greater part in f32.
    #[inline(always)]
    unsafe fn dot_bf16(x: V, w: V, sum: V) -> V {
        #[allow(clippy::cast_possible_truncation, reason = "rounded to f32")]
        let fused = |x: V, w: V, sum: V| -> V {
            std::array::from_fn(|lane| {
                (f64::from(x[lane]) * f64::from(w[lane]) + f64::from(sum[lane])) as f32
            })
        };
        // SAFETY: nothing but arithmetic.
        unsafe {
            let ([x0, x1], [w0, w1]) = (Self::split_pairs(x), Self::split_pairs(w));
            Self::flush(fused(x0, w0, Self::flush(fused(x1, w1, sum))))
        }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> [i32; LANES] {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn int_to_f32(a: [i32; LANES]) -> V {
        a.map(|lane| lane as f32)
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> [[u8; 4]; LANES] {
        // SAFETY: 64 bytes are readable by the trait's contract.
        unsafe { from.cast::<[[u8; 4]; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn low_nibbles(a: [[u8; 4]; LANES]) -> [[u8; 4]; LANES] {
        a.map(|four| four.map(|byte| byte & 15))
    }
    #[inline(always)]
    unsafe fn high_nibbles(a: [[u8; 4]; LANES]) -> [[u8; 4]; LANES] {
        a.map(|four| four.map(|byte| byte >> 4))
    }
    #[inline(always)]
    unsafe fn byte_to_f32<const SHIFT: u32>(a: [[u8; 4]; LANES]) -> V {
        a.map(|four| f32::from(four[SHIFT as usize / 8]))
    }
    #[inline(always)]
    unsafe fn dot(sum: [i32; LANES], bytes: [[u8; 4]; LANES], four: i32) -> [i32; LANES] {
        let factors = four.to_le_bytes().map(|byte| i32::from(byte.cast_signed()));
        std::array::from_fn(|lane| {
            (0..4).fold(sum[lane], |sum, at| sum + i32::from(bytes[lane][at]) * factors[at])
        })
    }
    #[inline(always)]
    unsafe fn store_int8(to: *mut i8, value: V) {
        #[allow(clippy::cast_possible_truncation)]
        // SAFETY: sixteen elements are writable by the trait's contract.
        unsafe {
            to.cast::<[i8; LANES]>().write_unaligned(value.map(|lane| lane as i8));
        }
    }
}

kernels_for!(Portable, "portable", (4, 4, 4, 1, 1), (4, 1), #[allow(clippy::inline_always)]);
