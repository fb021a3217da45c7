//! x86-64 with AVX-512F: one register of sixteen lanes.

use std::arch::x86_64::{
    __m256i, __m512, _mm256_add_ps, _mm256_loadu_si256, _mm512_add_ps, _mm512_castps512_ps256,
    _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_div_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_roundscale_ps,
    _mm512_scalef_ps, _mm512_set1_ps, _mm512_shuffle_f32x4, _mm512_slli_epi32, _mm512_storeu_ps,
};

use half::{bf16, f16};

use super::{avx2::sum_of_eight, simd::Simd};

/// AVX-512F.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

impl Simd for Avx512 {
    type V = __m512;
    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: features by the trait's contract, here and in every function below.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: sixteen elements are readable by contract.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m512 {
        // SAFETY: sixteen elements are readable by contract; a bf16 is the upper half of an f32.
        unsafe {
            let raw = _mm256_loadu_si256(from.cast::<__m256i>());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(raw)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> __m512 {
        // SAFETY: sixteen elements are readable by contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast::<__m256i>())) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m512) {
        // SAFETY: sixteen elements are writable by contract.
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        // SAFETY: lane arithmetic; 8 = to nearest, no exceptions.
        unsafe { _mm512_roundscale_ps::<8>(a) }
    }
    #[inline(always)]
    unsafe fn scale_pow2(a: __m512, n: __m512) -> __m512 {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_scalef_ps(a, n) }
    }
    /// The same tree as the default, without a detour through memory.
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        // SAFETY: lane arithmetic.
        unsafe {
            let upper = _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0b1110>(a, a));
            sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(a), upper))
        }
    }
}

kernels_for!(Avx512, "avx512", #[target_feature(enable = "avx512f,avx2,fma,f16c")]);
