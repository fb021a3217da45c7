//! What some query rows see, and the probabilities that they give to it.

use std::ops::Range;

use super::{AttentionShape, panels::KvElement};
use crate::kernels::{
    simd::{LANES, Simd, exp},
    tanh::tanh,
};

/// The reach of `N` query rows, in the order of their positions.
pub(super) struct View<const N: usize> {
    /// Each sees keys `starts[i]..ends[i]`.
    starts: [usize; N],
    ends: [usize; N],
    /// The blocks of sixteen positions that hold them all.
    pub(super) blocks: Range<usize>,
}

impl<const N: usize> View<N> {
    pub(super) fn new(shape: &AttentionShape, positions: [usize; N]) -> Self {
        Self {
            starts: positions.map(|position| shape.first_key(position)),
            ends: positions.map(|position| position + 1),
            blocks: shape.blocks(positions[0], positions[N - 1]),
        }
    }

    /// The positions of `block` that any of the rows sees.
    pub(super) fn keys(&self, block: usize) -> Range<usize> {
        self.starts[0].max(block * LANES)..self.ends[N - 1].min((block + 1) * LANES)
    }

    /// Puts `value` into the lanes at `at`, those of `block`, that row `i` does not see.
    #[inline(always)]
    unsafe fn hide(&self, i: usize, block: usize, at: *mut f32, value: f32) -> bool {
        let start = block * LANES;
        if self.starts[i] <= start && start + LANES <= self.ends[i] {
            return false;
        }
        for lane in 0..LANES {
            if !(self.starts[i]..self.ends[i]).contains(&(start + lane)) {
                // SAFETY: sixteen elements are writable at `at`, by contract.
                unsafe { *at.add(lane) = value };
            }
        }
        true
    }
}

/// Fills `rows[i]` (sixteen for each block of the view) with `e^(score - max)` of row `i`, exact zeros
/// where it does not see, and returns the inverse of each row's sum. Where scores have a soft cap and
/// `slopes` are given, those receive the derivative of the capped scores by the uncapped ones.
///
/// # Safety
/// Every row of `rows` and `slopes` holds `16 * blocks` scores, every query `head_dim` elements; `head_block`
/// gives the scales and keys of any block of the view; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn probabilities<S: Simd, E: KvElement, const N: usize>(
    shape: &AttentionShape,
    view: &View<N>,
    queries: &[*const f32; N],
    (rows, slopes): (&[*mut f32; N], Option<&[*mut f32; N]>),
    head_block: impl Fn(usize) -> *const E,
) -> [f32; N] {
    // SAFETY: by contract.
    unsafe {
        let mut greatest = [S::splat(f32::NEG_INFINITY); N];
        for block in view.blocks.clone() {
            let (head, to) = (head_block(block), (block - view.blocks.start) * LANES);
            let keys = head.add(E::SCALES);
            let mut scores = [S::splat(0.0); N];
            for d in 0..shape.head_dim {
                let key = E::load::<S>(keys.add(d * LANES));
                for i in 0..N {
                    scores[i] = S::fma(S::splat(*queries[i].add(d)), key, scores[i]);
                }
            }
            let mut scale = S::splat(shape.scale);
            if E::SCALES > 0 {
                scale = S::mul(scale, S::load(head.cast::<f32>()));
            }
            for i in 0..N {
                let mut score = S::mul(scores[i], scale);
                if let Some(cap) = shape.soft_cap {
                    let bent = tanh::<S>(S::mul(score, S::splat(1.0 / cap)));
                    score = S::mul(bent, S::splat(cap));
                    if let Some(slopes) = slopes {
                        let slope = S::fma(S::mul(bent, S::splat(-1.0)), bent, S::splat(1.0));
                        S::store(slopes[i].add(to), slope);
                    }
                }
                let at = rows[i].add(to);
                S::store(at, score);
                if view.hide(i, block, at, f32::NEG_INFINITY) {
                    score = S::load(at);
                }
                greatest[i] = S::max(greatest[i], score);
            }
        }
        let mut inverse = [0.0; N];
        for i in 0..N {
            let shift = S::splat(-S::max_lane(greatest[i]));
            let mut sum = S::splat(0.0);
            for block in view.blocks.clone() {
                let at = rows[i].add((block - view.blocks.start) * LANES);
                let mut e = exp::<S>(S::add(S::load(at), shift));
                S::store(at, e);
                if view.hide(i, block, at, 0.0) {
                    e = S::load(at);
                }
                sum = S::add(sum, e);
            }
            inverse[i] = 1.0 / S::sum(sum);
        }
        inverse
    }
}
