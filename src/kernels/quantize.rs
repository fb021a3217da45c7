//! Thirty-two weights as small integers and one scale.
//!
//! A scale is a bf16: it has the range of an f32, so that no matrix is too small for it, and its eight
//! bits of precision cost nothing, since the integers are chosen for the scale as it is rounded.

use half::bf16;

use super::panels::GROUP;

/// Scales tried for four bits around the one that maps the greatest magnitude to -8.
const CANDIDATES: i32 = 8;

/// Eight bits: the greatest magnitude becomes (at most) 127. The error is at most half a scale.
pub(super) fn quantize_group_8(values: &[f32; GROUP]) -> (bf16, [i8; GROUP]) {
    let greatest = values.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    let scale = round_up(greatest / 127.0);
    if scale.to_f32() == 0.0 {
        return (bf16::ZERO, [0; GROUP]);
    }
    #[allow(clippy::cast_possible_truncation, reason = "clamped")]
    (scale, values.map(|value| nearest(value / scale.to_f32()).clamp(-127.0, 127.0) as i8))
}

/// Four bits, -8 to 7: of some scales around the one that maps the value of greatest magnitude to
/// -8, the one with the least sum of squared errors.
pub(super) fn quantize_group_4(values: &[f32; GROUP]) -> (bf16, [i8; GROUP]) {
    let extreme = values
        .iter()
        .fold(0.0_f32, |max, value| if value.abs() > max.abs() { *value } else { max });
    let mut best = (f32::INFINITY, bf16::ZERO, [0.0; GROUP]);
    if !(extreme / 16.0).is_normal() {
        return (bf16::ZERO, [0; GROUP]);
    }
    for candidate in -CANDIDATES..=CANDIDATES {
        let inverse = -(8.0 + 0.1 * candidate as f32) / extreme;
        let quants = values.map(|value| nearest(value * inverse).clamp(-8.0, 7.0));
        // The scale that suits these integers best, by least squares.
        let (mut cross, mut square) = (0.0_f32, 0.0_f32);
        for (value, quant) in values.iter().zip(&quants) {
            cross += value * quant;
            square += quant * quant;
        }
        let scale = bf16::from_f32(cross / square);
        let error = values.iter().zip(&quants).fold(0.0_f32, |sum, (value, quant)| {
            let difference = value - scale.to_f32() * quant;
            sum + difference * difference
        });
        if error < best.0 {
            best = (error, scale, quants);
        }
    }
    #[allow(clippy::cast_possible_truncation, reason = "clamped")]
    (best.1, best.2.map(|quant| quant as i8))
}

/// To the nearest integer, for magnitudes below 2^22: without a library call where the instruction
/// set has no rounding.
fn nearest(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: from here on, floats are whole numbers.
    (value + SHIFT) - SHIFT
}

/// The least bf16 that is not below a positive `value`.
fn round_up(value: f32) -> bf16 {
    let bits = value.to_bits();
    #[allow(clippy::cast_possible_truncation, reason = "the upper half")]
    bf16::from_bits((bits >> 16) as u16 + u16::from(bits & 0xFFFF != 0))
}
