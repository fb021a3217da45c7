//! x86-64 with AVX2, FMA and F16C: two registers of eight lanes.

use std::arch::x86_64::{
    __m128i, __m256, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehl_ps,
    _mm_shuffle_ps, _mm256_add_epi32, _mm256_add_ps, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_cvtps_epi32, _mm256_div_ps,
    _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps,
    _mm256_mul_ps, _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32,
    _mm256_storeu_ps,
};

use half::{bf16, f16};

use super::simd::Simd;

/// AVX2, FMA, F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

type V = (__m256, __m256);

/// Both halves through one instruction.
macro_rules! both {
    ($instruction:ident $(::<$immediate:literal>)?, $($arg:expr),+) => {
        // SAFETY: the CPU has the features by the contract of `Simd`.
        unsafe { ($instruction $(::<$immediate>)? ($($arg.0),+), $instruction $(::<$immediate>)? ($($arg.1),+)) }
    };
}

impl Simd for Avx2 {
    type V = V;
    #[inline(always)]
    unsafe fn splat(value: f32) -> V {
        // SAFETY: features by contract, here and in every function below.
        unsafe { (_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> V {
        // SAFETY: sixteen elements are readable by contract.
        unsafe { (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> V {
        // SAFETY: sixteen elements are readable by contract; a bf16 is the upper half of an f32.
        unsafe {
            let half = |at: *const bf16| {
                let raw = _mm_loadu_si128(at.cast::<__m128i>());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(raw)))
            };
            (half(from), half(from.add(8)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> V {
        // SAFETY: sixteen elements are readable by contract.
        unsafe {
            let half = |at: *const f16| _mm256_cvtph_ps(_mm_loadu_si128(at.cast::<__m128i>()));
            (half(from), half(from.add(8)))
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: V) {
        // SAFETY: sixteen elements are writable by contract.
        unsafe {
            _mm256_storeu_ps(to, value.0);
            _mm256_storeu_ps(to.add(8), value.1);
        }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        both!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    unsafe fn round(a: V) -> V {
        both!(_mm256_round_ps::<8>, a)
    }
    #[inline(always)]
    unsafe fn scale_pow2(a: V, n: V) -> V {
        // SAFETY: lane arithmetic; 2^n is built in the exponent bits.
        let half = |a: __m256, n: __m256| unsafe {
            let bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(bits)))
        };
        (half(a.0, n.0), half(a.1, n.1))
    }
    /// The same tree as the default, without a detour through memory.
    #[inline(always)]
    unsafe fn sum(a: V) -> f32 {
        // SAFETY: lane arithmetic.
        unsafe { sum_of_eight(_mm256_add_ps(a.0, a.1)) }
    }
}

/// Adds eight lanes as a balanced tree: halves, quarters, pairs.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn sum_of_eight(a: __m256) -> f32 {
    // SAFETY: lane arithmetic.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

kernels_for!(Avx2, "avx2", #[target_feature(enable = "avx2,fma,f16c")]);
