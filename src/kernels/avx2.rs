//! x86-64 with AVX2, FMA and F16C: two registers of eight lanes.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_HINT_T0, _MM_HINT_T1, _mm_add_ps, _mm_add_ss, _mm_cvtsi32_si128,
    _mm_cvtss_f32, _mm_loadu_si128, _mm_movehl_ps, _mm_packs_epi16, _mm_prefetch, _mm_shuffle_ps,
    _mm_srli_si128, _mm_storeu_si128, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256,
    _mm256_andnot_ps, _mm256_castps_si256, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_castsi256_si128, _mm256_cmpgt_epi32, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps,
    _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_cvtps_epi32, _mm256_div_ps,
    _mm256_extractf128_ps, _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_max_ps, _mm256_min_ps,
    _mm256_mul_ps, _mm256_packs_epi32, _mm256_permute4x64_epi64, _mm256_round_ps, _mm256_set1_epi8,
    _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_srl_epi32,
    _mm256_srli_epi16, _mm256_storeu_ps, _mm256_sub_ps,
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
    const SUMS: usize = 6;
    type V = V;
    type I = (__m256i, __m256i);
    type B = (__m256i, __m256i);
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
    unsafe fn load_int8(from: *const i8) -> V {
        // SAFETY: sixteen elements are readable by contract.
        unsafe {
            let bytes = _mm_loadu_si128(from.cast::<__m128i>());
            let half = |bytes| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
            (half(bytes), half(_mm_srli_si128::<8>(bytes)))
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
    unsafe fn sub(a: V, b: V) -> V {
        both!(_mm256_sub_ps, a, b)
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
    #[inline(always)]
    unsafe fn split_pairs(pairs: V) -> [V; 2] {
        // SAFETY: lane arithmetic; a bf16 is the upper half of an f32.
        let half = |pairs: __m256| unsafe {
            let pairs = _mm256_castps_si256(pairs);
            let second = _mm256_set1_epi32(0xFFFF_0000_u32.cast_signed());
            let second = _mm256_castsi256_ps(_mm256_and_si256(pairs, second));
            (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), second)
        };
        let (low, high) = (half(pairs.0), half(pairs.1));
        [(low.0, high.0), (low.1, high.1)]
    }
    #[inline(always)]
    unsafe fn flush(a: V) -> V {
        // SAFETY: lane arithmetic; magnitudes compare as integers.
        let half = |a: __m256| unsafe {
            let magnitude = _mm256_set1_epi32(i32::MAX);
            let bits = _mm256_and_si256(_mm256_castps_si256(a), magnitude);
            let least = _mm256_set1_epi32(f32::MIN_POSITIVE.to_bits().cast_signed());
            let taken = _mm256_and_si256(_mm256_cmpgt_epi32(least, bits), magnitude);
            _mm256_andnot_ps(_mm256_castsi256_ps(taken), a)
        };
        (half(a.0), half(a.1))
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::I {
        // SAFETY: lane arithmetic.
        unsafe { (_mm256_set1_epi32(value), _mm256_set1_epi32(value)) }
    }
    #[inline(always)]
    unsafe fn int_to_f32(a: Self::I) -> V {
        both!(_mm256_cvtepi32_ps, a)
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        // SAFETY: 64 bytes are readable by contract.
        unsafe {
            let from = from.cast::<__m256i>();
            (_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1)))
        }
    }
    #[inline(always)]
    unsafe fn low_nibbles(a: Self::B) -> Self::B {
        // SAFETY: lane arithmetic.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            (_mm256_and_si256(a.0, mask), _mm256_and_si256(a.1, mask))
        }
    }
    #[inline(always)]
    unsafe fn high_nibbles(a: Self::B) -> Self::B {
        // SAFETY: lane arithmetic.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let half = |a| _mm256_and_si256(_mm256_srli_epi16::<4>(a), mask);
            (half(a.0), half(a.1))
        }
    }
    #[inline(always)]
    unsafe fn byte_to_f32<const SHIFT: u32>(a: Self::B) -> V {
        // SAFETY: lane arithmetic.
        let half = |a: __m256i| unsafe {
            let count = _mm_cvtsi32_si128(SHIFT.cast_signed());
            let byte = _mm256_and_si256(_mm256_srl_epi32(a, count), _mm256_set1_epi32(0xFF));
            _mm256_cvtepi32_ps(byte)
        };
        (half(a.0), half(a.1))
    }
    /// The instruction adds pairs of products in 16 bits: the lower seven bits and the highest go
    /// through it one after the other, so that no pair is too great for it.
    #[inline(always)]
    unsafe fn dot(sum: Self::I, bytes: Self::B, four: i32) -> Self::I {
        // SAFETY: lane arithmetic.
        let half = |sum: __m256i, bytes: __m256i| unsafe {
            let (four, ones) = (_mm256_set1_epi32(four), _mm256_set1_epi16(1));
            let lower = _mm256_and_si256(bytes, _mm256_set1_epi8(0x7F));
            let highest = _mm256_and_si256(bytes, _mm256_set1_epi8(i8::MIN));
            let lower = _mm256_madd_epi16(_mm256_maddubs_epi16(lower, four), ones);
            let highest = _mm256_madd_epi16(_mm256_maddubs_epi16(highest, four), ones);
            _mm256_add_epi32(sum, _mm256_add_epi32(lower, highest))
        };
        (half(sum.0, bytes.0), half(sum.1, bytes.1))
    }
    #[inline(always)]
    unsafe fn store_int8(to: *mut i8, value: V) {
        // SAFETY: sixteen bytes are writable by contract; 16-bit words come in halves by four.
        unsafe {
            let (low, high) = (_mm256_cvtps_epi32(value.0), _mm256_cvtps_epi32(value.1));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
            let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.cast::<__m128i>(), _mm_packs_epi16(low, high));
        }
    }
    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast::<i8>()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(address: *const u8) {
        // SAFETY: a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast::<i8>()) }
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

kernels_for!(Avx2, "avx2", (16, 4, 6, 2, 1), (4, 1), #[target_feature(enable = "avx2,fma,f16c")]);
