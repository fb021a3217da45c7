//! What some query rows see, and the probabilities that they give to it.

use std::ops::Range;

use super::{AttentionShape, panels::KvElement};
use crate::kernels::{
    simd::{LANES, Simd, exp},
    tanh::tanh,
};

/// Elements of the keys that come next, asked for at a time.
const ASKED: usize = 16;

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

/// Dot products of `N` queries with the keys of `B` blocks, and a request for the memory of those that come
/// `next`. Each sum is one chain over `head_dim`, whatever `N` and `B`.
#[inline(always)]
unsafe fn dots<S: Simd, E: KvElement, const N: usize, const B: usize>(
    queries: &[*const f32; N],
    head_dim: usize,
    (blocks, next): ([*const E; B], Option<[*const E; B]>),
) -> [[S::V; N]; B] {
    // SAFETY: by the contract of `probabilities`; a prefetch of any address is allowed.
    unsafe {
        let mut sums = [[S::splat(0.0); N]; B];
        for start in (0..head_dim).step_by(ASKED) {
            let end = (start + ASKED).min(head_dim);
            // Apart from the sums: beside a prefetch they would not stay in registers.
            for block in next.iter().flatten() {
                for d in start..end {
                    S::prefetch(block.wrapping_add(E::SCALES + d * LANES).cast());
                }
            }
            for d in start..end {
                let at = E::SCALES + d * LANES;
                let mut keys = [S::splat(0.0); B];
                for b in 0..B {
                    keys[b] = E::load::<S>(blocks[b].add(at));
                }
                for i in 0..N {
                    let query = S::splat(*queries[i].add(d));
                    for b in 0..B {
                        sums[b][i] = S::fma(query, keys[b], sums[b][i]);
                    }
                }
            }
        }
        sums
    }
}

/// What [`probabilities`] reads and writes.
pub(super) struct Scores<'a, const N: usize> {
    pub(super) shape: &'a AttentionShape,
    pub(super) view: &'a View<N>,
    /// Nobody has read the keys a moment ago: they come from memory.
    pub(super) is_new: bool,
    /// `head_dim` elements each.
    pub(super) queries: [*const f32; N],
    /// Sixteen elements each for each block of the view: receive `e^(score - max)`, exact zeros where the
    /// row does not see.
    pub(super) rows: [*mut f32; N],
    /// As large: receive the derivative of the capped scores by the uncapped ones, if there is a soft cap.
    pub(super) slopes: Option<[*mut f32; N]>,
}

impl<const N: usize> Scores<'_, N> {
    /// Scores of `B` blocks from `first` on; raises the `greatest` of each row.
    #[inline(always)]
    unsafe fn score<S: Simd, E: KvElement, const B: usize>(
        &self,
        first: usize,
        greatest: &mut [S::V; N],
        head_block: &impl Fn(usize) -> *const E,
    ) {
        let (shape, view) = (self.shape, self.view);
        // SAFETY: by the contract of `probabilities`.
        unsafe {
            let blocks: [*const E; B] = std::array::from_fn(|b| head_block(first + b));
            let last = view.blocks.end - 1;
            let next = || std::array::from_fn(|b| head_block(last.min(first + B + b)));
            let next: Option<[*const E; B]> = self.is_new.then(next);
            let sums = dots::<S, E, N, B>(&self.queries, shape.head_dim, (blocks, next));
            for b in 0..B {
                let block = first + b;
                let to = (block - view.blocks.start) * LANES;
                let mut scale = S::splat(shape.scale);
                if E::SCALES > 0 {
                    scale = S::mul(scale, S::load(blocks[b].cast::<f32>()));
                }
                for i in 0..N {
                    let mut score = S::mul(sums[b][i], scale);
                    if let Some(cap) = shape.soft_cap {
                        let bent = tanh::<S>(S::mul(score, S::splat(1.0 / cap)));
                        score = S::mul(bent, S::splat(cap));
                        if let Some(slopes) = self.slopes {
                            let slope = S::fma(S::mul(bent, S::splat(-1.0)), bent, S::splat(1.0));
                            S::store(slopes[i].add(to), slope);
                        }
                    }
                    let at = self.rows[i].add(to);
                    S::store(at, score);
                    if view.hide(i, block, at, f32::NEG_INFINITY) {
                        score = S::load(at);
                    }
                    greatest[i] = S::max(greatest[i], score);
                }
            }
        }
    }
}

/// Fills the rows (and slopes) of `scores` and returns the inverse of each row's sum.
///
/// # Safety
/// The pointers of `scores` cover what its fields say; `head_block` gives the scales and keys of any block
/// of the view; the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn probabilities<S: Simd, E: KvElement, const N: usize>(
    scores: &Scores<'_, N>,
    head_block: impl Fn(usize) -> *const E,
) -> [f32; N] {
    let view = scores.view;
    // SAFETY: by contract.
    unsafe {
        let mut greatest = [S::splat(f32::NEG_INFINITY); N];
        let mut block = view.blocks.start;
        if 4 * N <= S::SUMS {
            while block + 4 <= view.blocks.end {
                scores.score::<S, E, 4>(block, &mut greatest, &head_block);
                block += 4;
            }
        }
        if 2 * N <= S::SUMS {
            while block + 2 <= view.blocks.end {
                scores.score::<S, E, 2>(block, &mut greatest, &head_block);
                block += 2;
            }
        }
        while block < view.blocks.end {
            scores.score::<S, E, 1>(block, &mut greatest, &head_block);
            block += 1;
        }
        let mut inverse = [0.0; N];
        for i in 0..N {
            let shift = S::splat(-S::max_lane(greatest[i]));
            let mut sum = S::splat(0.0);
            for block in view.blocks.clone() {
                let at = scores.rows[i].add((block - view.blocks.start) * LANES);
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
