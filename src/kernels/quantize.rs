//! A group of weights as small integers and one scale: 64 in 8 bits, 32 in four.
//!
//! A scale is a bf16: it has the range of an f32, so that no matrix is too small for it, and its eight
//! bits of precision cost nothing, since the integers are chosen for the scale as it is rounded.
//!
//! No multiplication is fused with an addition here and sums have one order, so that a file gives the
//! same integers on every machine.

#![allow(clippy::needless_range_loop, reason = "vectors are indexed")]

use half::bf16;

use super::{
    panels::WeightForm,
    simd::{LANES, Simd},
};

/// Weights of a group in 8 bits, and in four.
const GROUP_8: usize = WeightForm::Int8.group();
const GROUP_4: usize = WeightForm::Int4.group();
/// Scales tried for four bits around the one that maps the greatest magnitude to -8.
const CANDIDATES: i32 = 8;

/// A row of weights to round: whole groups.
pub(super) struct RoundRow<'a> {
    pub(super) values: &'a [f32],
    /// As many integers.
    pub(super) quants: &'a mut [i8],
    /// One for each group.
    pub(super) scales: &'a mut [bf16],
}

/// Eight bits: the greatest magnitude becomes (at most) 127. The error is at most half a scale.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn round_to_8_bits<S: Simd>(row: RoundRow<'_>) {
    let groups = row.values.chunks_exact(GROUP_8).zip(row.quants.chunks_exact_mut(GROUP_8));
    for ((values, quants), to) in groups.zip(row.scales) {
        // SAFETY: 64 elements are there to read and to write.
        unsafe {
            let mut sizes = S::splat(0.0);
            for part in 0..GROUP_8 / LANES {
                let values = S::load(values.as_ptr().add(part * LANES));
                sizes = S::max(sizes, size::<S>(values));
            }
            let greatest = S::max_lane(sizes);
            let scale = round_up(greatest / 127.0);
            *to = scale;
            if scale.to_f32() == 0.0 {
                quants.fill(0);
                continue;
            }
            let divisor = S::splat(scale.to_f32());
            for part in 0..GROUP_8 / LANES {
                let values = S::load(values.as_ptr().add(part * LANES));
                let rounded = whole::<S>(S::div(values, divisor), -127.0, 127.0);
                S::store_int8(quants.as_mut_ptr().add(part * LANES), rounded);
            }
        }
    }
}

/// Four bits, -8 to 7: of some scales around the one that maps the value of greatest magnitude to
/// -8, the one with the least sum of squared errors.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn round_to_4_bits<S: Simd>(row: RoundRow<'_>) {
    let groups = row.values.chunks_exact(GROUP_4).zip(row.quants.chunks_exact_mut(GROUP_4));
    for ((values, quants), to) in groups.zip(row.scales) {
        *to = bf16::ZERO;
        quants.fill(0);
        // SAFETY: 32 elements are there to read and to write.
        unsafe {
            let halves = [S::load(values.as_ptr()), S::load(values.as_ptr().add(LANES))];
            let greatest = S::max_lane(S::max(size::<S>(halves[0]), size::<S>(halves[1])));
            if !(greatest / 16.0).is_normal() {
                continue;
            }
            let is_positive = S::max_lane(S::max(halves[0], halves[1])) >= greatest;
            let extreme = if is_positive { greatest } else { -greatest };
            let mut least = f32::INFINITY;
            for candidate in -CANDIDATES..=CANDIDATES {
                let inverse = S::splat(-(8.0 + 0.1 * candidate as f32) / extreme);
                let rounded = [
                    whole::<S>(S::mul(halves[0], inverse), -8.0, 7.0),
                    whole::<S>(S::mul(halves[1], inverse), -8.0, 7.0),
                ];
                // The scale that suits these integers best, by least squares.
                let cross = both::<S>(halves, rounded);
                let square = both::<S>(rounded, rounded);
                let scale = bf16::from_f32(cross / square);
                // The squared error, but for the squares of the values.
                let error = scale.to_f32() * (scale.to_f32() * square - 2.0 * cross);
                if error < least {
                    (least, *to) = (error, scale);
                    S::store_int8(quants.as_mut_ptr(), rounded[0]);
                    S::store_int8(quants.as_mut_ptr().add(LANES), rounded[1]);
                }
            }
        }
    }
}

/// The nearest whole numbers from `least` to `most`.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn whole<S: Simd>(a: S::V, least: f32, most: f32) -> S::V {
    // SAFETY: lane arithmetic.
    unsafe { S::max(S::min(S::round(a), S::splat(most)), S::splat(least)) }
}

/// The magnitudes.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn size<S: Simd>(a: S::V) -> S::V {
    // SAFETY: lane arithmetic.
    unsafe { S::max(a, S::sub(S::splat(0.0), a)) }
}

/// The sum of the products.
#[inline(always)]
unsafe fn both<S: Simd>(a: [S::V; 2], b: [S::V; 2]) -> f32 {
    // SAFETY: lane arithmetic.
    unsafe { S::sum(S::add(S::mul(a[0], b[0]), S::mul(a[1], b[1]))) }
}

/// The least bf16 that is not below a positive `value`.
fn round_up(value: f32) -> bf16 {
    let bits = value.to_bits();
    #[allow(clippy::cast_possible_truncation, reason = "the upper half")]
    bf16::from_bits((bits >> 16) as u16 + u16::from(bits & 0xFFFF != 0))
}
