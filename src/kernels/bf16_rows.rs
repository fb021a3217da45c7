//! Rows of a product's input rounded to bf16, two terms side by side in 32 bits, as the CPU's dot products
//! take them.

use std::cell::Cell;

use super::{
    Kernels,
    simd::Simd,
    threads::{Shared, for_each_range},
};

/// Pairs that a thread may keep memory for.
const MAX_KEPT: usize = 4 << 20;

thread_local! {
    /// Kept for the next product of the thread.
    static PAIRS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `body` with the rounded rows of `x [rows, terms]`, `[rows][terms / 2]` pairs in the bits of f32.
pub(super) fn with_bf16_rows(
    kernels: &Kernels,
    x: &[f32],
    terms: usize,
    body: impl FnOnce(&[f32]),
) {
    let (rows, pairs) = (x.len() / terms, terms.div_ceil(2));
    // Taken, not borrowed: while this thread waits for others, it may run another product.
    let mut kept = PAIRS.take();
    kept.resize(kept.len().max(rows * pairs), 0.0);
    let shared = Shared(kept.as_mut_ptr());
    for_each_range(rows, 1, terms, |range| {
        for row in range {
            // SAFETY: each row has its own pairs, for which there is room.
            let to =
                unsafe { std::slice::from_raw_parts_mut(shared.get().add(row * pairs), pairs) };
            // SAFETY: the table's functions are for this CPU.
            unsafe { (kernels.pair_row)(&x[row * terms..(row + 1) * terms], to) };
        }
    });
    body(&kept[..rows * pairs]);
    if kept.len() <= MAX_KEPT {
        PAIRS.set(kept);
    }
}

/// One row: the first term of each pair in the lower half. An odd last term gets a zero.
///
/// # Safety
/// The CPU has the features of `S`; plain arithmetic that the compiler makes vectors of.
#[inline(always)]
pub(super) unsafe fn pair_row<S: Simd>(x: &[f32], to: &mut [f32]) {
    let (pairs, last) = x.as_chunks::<2>();
    for (to, [first, second]) in to.iter_mut().zip(pairs) {
        *to = f32::from_bits(round(*first) >> 16 | round(*second));
    }
    if let ([last], Some(to)) = (last, to.get_mut(pairs.len())) {
        *to = f32::from_bits(round(*last) >> 16);
    }
}

/// Bits of the nearest bf16, ties to even, as an f32's. Subnormal numbers become zero, as in the dot product.
#[inline(always)]
pub(super) fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    let even = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    let magnitude = bits & 0x7FFF_FFFF;
    let kept = if magnitude < f32::MIN_POSITIVE.to_bits() {
        bits & 0x8000_0000
    } else if magnitude > f32::INFINITY.to_bits() {
        bits | 0x0040_0000
    } else {
        even
    };
    kept & 0xFFFF_0000
}
