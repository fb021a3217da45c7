//! x86-64 with AVX-512 (F, BW, VNNI, and BF16 where there is one): one register of sixteen lanes.

use std::arch::x86_64::{
    __m128i, __m256i, __m512, __m512bh, __m512i, _MM_HINT_T0, _MM_HINT_T1, _mm_loadu_si128,
    _mm_prefetch, _mm_storeu_si128, _mm256_add_ps, _mm256_loadu_si256, _mm512_add_ps,
    _mm512_and_si512, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps_si512,
    _mm512_castps512_ps256, _mm512_castsi512_ps, _mm512_cmplt_epi32_mask, _mm512_cvtepi8_epi32,
    _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps,
    _mm512_cvtps_epi32, _mm512_div_ps, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_and_epi32, _mm512_max_ps, _mm512_min_ps,
    _mm512_mul_ps, _mm512_reduce_max_ps, _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_shuffle_f32x4, _mm512_slli_epi32, _mm512_srli_epi16,
    _mm512_srli_epi32, _mm512_storeu_ps, _mm512_sub_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps,
    _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use std::mem::transmute;

use half::{bf16, f16};

use super::{avx2::sum_of_eight, simd::Simd};

/// AVX-512: F, BW, VNNI, and `BF16`.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>;

impl<const BF16: bool> Simd for Avx512<BF16> {
    const SUMS: usize = 16;
    type V = __m512;
    type I = __m512i;
    type B = __m512i;
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
    unsafe fn load_int8(from: *const i8) -> __m512 {
        // SAFETY: sixteen elements are readable by contract.
        unsafe {
            let bytes = _mm_loadu_si128(from.cast::<__m128i>());
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
        }
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
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_sub_ps(a, b) }
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
    #[inline(always)]
    unsafe fn split_pairs(pairs: __m512) -> [__m512; 2] {
        // SAFETY: lane arithmetic; a bf16 is the upper half of an f32.
        unsafe {
            let pairs = _mm512_castps_si512(pairs);
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed()));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(second)]
        }
    }
    #[inline(always)]
    unsafe fn flush(a: __m512) -> __m512 {
        // SAFETY: lane arithmetic; magnitudes compare as integers.
        unsafe {
            let bits = _mm512_castps_si512(a);
            let magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX));
            let least = _mm512_set1_epi32(f32::MIN_POSITIVE.to_bits().cast_signed());
            let taken = _mm512_cmplt_epi32_mask(magnitude, least);
            let sign = _mm512_set1_epi32(i32::MIN);
            _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, taken, bits, sign))
        }
    }
    #[inline(always)]
    unsafe fn dot_bf16(x: __m512, w: __m512, sum: __m512) -> __m512 {
        // SAFETY: lane arithmetic; the instruction is there where the type says so.
        unsafe {
            if BF16 {
                return _mm512_dpbf16_ps(sum, bf16_pairs(x), bf16_pairs(w));
            }
            let ([x0, x1], [w0, w1]) = (Self::split_pairs(x), Self::split_pairs(w));
            Self::flush(Self::fma(x0, w0, Self::flush(Self::fma(x1, w1, sum))))
        }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> __m512i {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    unsafe fn int_to_f32(a: __m512i) -> __m512 {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m512i {
        // SAFETY: 64 bytes are readable by contract.
        unsafe { _mm512_loadu_si512(from.cast::<__m512i>()) }
    }
    #[inline(always)]
    unsafe fn low_nibbles(a: __m512i) -> __m512i {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_and_si512(a, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn high_nibbles(a: __m512i) -> __m512i {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(a), _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn byte_to_f32<const SHIFT: u32>(a: __m512i) -> __m512 {
        // SAFETY: lane arithmetic.
        unsafe {
            let byte = _mm512_and_si512(_mm512_srli_epi32::<SHIFT>(a), _mm512_set1_epi32(0xFF));
            _mm512_cvtepi32_ps(byte)
        }
    }
    #[inline(always)]
    unsafe fn dot(sum: __m512i, bytes: __m512i, four: i32) -> __m512i {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_dpbusd_epi32(sum, bytes, _mm512_set1_epi32(four)) }
    }
    #[inline(always)]
    unsafe fn store_int8(to: *mut i8, value: __m512) {
        // SAFETY: sixteen bytes are writable by contract.
        unsafe {
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value));
            _mm_storeu_si128(to.cast::<__m128i>(), bytes);
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
    /// By blocks of 2, 4, 8 and 16 columns.
    #[inline(always)]
    unsafe fn transpose(rows: [__m512; 16]) -> [__m512; 16] {
        let mut pairs = rows;
        let mut fours = rows;
        let mut out = rows;
        // SAFETY: lane arithmetic.
        unsafe {
            for i in 0..8 {
                let (a, b) = (rows[2 * i], rows[2 * i + 1]);
                pairs[2 * i] = _mm512_unpacklo_ps(a, b);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(a, b);
            }
            // No closures here: they would be called, not inlined.
            for i in 0..4 {
                let (a, b) = (_mm512_castps_pd(pairs[4 * i]), _mm512_castps_pd(pairs[4 * i + 1]));
                let (c, d) =
                    (_mm512_castps_pd(pairs[4 * i + 2]), _mm512_castps_pd(pairs[4 * i + 3]));
                fours[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                fours[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                fours[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                fours[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            // Quarter q of fours[4 i + c] holds rows 4 i .. 4 i + 4 of column 4 q + c.
            for c in 0..4 {
                let (a, b, d, e) = (fours[c], fours[4 + c], fours[8 + c], fours[12 + c]);
                let even = _mm512_shuffle_f32x4::<0x88>(a, b);
                let even_last = _mm512_shuffle_f32x4::<0x88>(d, e);
                let odd = _mm512_shuffle_f32x4::<0xDD>(a, b);
                let odd_last = _mm512_shuffle_f32x4::<0xDD>(d, e);
                out[c] = _mm512_shuffle_f32x4::<0x88>(even, even_last);
                out[8 + c] = _mm512_shuffle_f32x4::<0xDD>(even, even_last);
                out[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd, odd_last);
                out[12 + c] = _mm512_shuffle_f32x4::<0xDD>(odd, odd_last);
            }
        }
        out
    }
    #[inline(always)]
    unsafe fn max_lane(a: __m512) -> f32 {
        // SAFETY: lane arithmetic.
        unsafe { _mm512_reduce_max_ps(a) }
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

/// The same bits as the instruction's type.
#[inline(always)]
fn bf16_pairs(lanes: __m512) -> __m512bh {
    // SAFETY: both are 512 bits, and any bits are a value of either.
    unsafe { transmute::<__m512, __m512bh>(lanes) }
}

kernels_for!(Avx512<false>, "avx512", (32, 8, 12, 4, 2), (6, 2),
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]);

/// As [`KERNELS`], with the CPU's dot products of bf16: the same bits from one instruction instead of eight.
pub(super) const KERNELS_BF16: super::Kernels =
    super::Kernels { name: "avx512_bf16", panels_bf16_dot: panels_bf16_instruction, ..KERNELS };

#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512bf16,avx2,fma,f16c")]
unsafe fn panels_bf16_instruction(tile: &super::product::PanelTile) {
    // SAFETY: the caller keeps the body's contract, and `all` hands this table out only on a CPU with
    // these features.
    unsafe { super::product::panel_tile::<Avx512<true>, Bf16Pair, 8, 12, 4, 2>(tile) }
}
