//! The forward pass of one key head for some rows of one sequence.
#![allow(clippy::needless_range_loop, reason = "register tiles are indexed in both directions")]

use std::ops::Range;

use super::{
    AttentionShape, PAIRS,
    panels::KvElement,
    scores::{Scores, View, probabilities},
};
use crate::kernels::simd::{LANES, Simd, store_partial};

/// Fewer rows of a sequence read keys and values once, so that they come from memory; more find them in
/// the CPU's caches.
const FEW_ROWS: usize = 4;
/// How far ahead values are asked for: a block takes less time than memory takes to answer.
const BLOCKS_AHEAD: usize = 2;

/// Some rows of one sequence, for the heads that share one key head.
pub(in crate::kernels) struct ForwardTile {
    pub(super) shape: AttentionShape,
    /// The panels' elements, whatever their form.
    pub(super) keys: *const u8,
    pub(super) values: *const u8,
    pub(super) queries: *const f32,
    pub(super) out: *mut f32,
    pub(super) rows: usize,
    pub(super) first_position: usize,
    pub(super) kv_head: usize,
    pub(super) block_table: *const u32,
    /// For each of at most `PAIRS` pairs, `context + padded_dim` elements.
    pub(super) scratch: *mut f32,
    /// Positions of all blocks that any row sees.
    pub(super) context: usize,
}

/// # Safety
/// Panels (of elements `E`), pointers and the block table cover what the fields say, nobody else writes
/// these rows of these heads, and the CPU has the features of `S`.
#[inline(always)]
pub(in crate::kernels) unsafe fn forward_tile<S: Simd, E: KvElement>(tile: &ForwardTile) {
    let count = tile.rows * tile.shape.group();
    // SAFETY: by contract; `first` stays below the number of pairs.
    unsafe {
        for first in (0..count).step_by(PAIRS) {
            // A group of heads passes over its keys and values once, whatever its size.
            match count - first {
                1 => forward_pairs::<S, E, 1>(tile, first),
                2 => forward_pairs::<S, E, 2>(tile, first),
                3 => forward_pairs::<S, E, 3>(tile, first),
                4 => forward_pairs::<S, E, 4>(tile, first),
                5 => forward_pairs::<S, E, 5>(tile, first),
                6 => forward_pairs::<S, E, 6>(tile, first),
                7 => forward_pairs::<S, E, 7>(tile, first),
                _ => forward_pairs::<S, E, PAIRS>(tile, first),
            }
        }
    }
}

/// Values of some blocks and what `N` rows give to them.
struct Values<'a, F, const N: usize> {
    view: &'a View<N>,
    blocks: Range<usize>,
    /// A block's values, `[16][padded]`, behind its scales.
    block: F,
    /// Nobody has read the values a moment ago: they come from memory.
    is_new: bool,
    padded: usize,
    /// Sixteen for each block of the view.
    weights: [*mut f32; N],
    /// `padded` elements each.
    sums: [*mut f32; N],
}

impl<E: KvElement, F: Fn(usize) -> *const E, const N: usize> Values<'_, F, N> {
    /// Adds all elements of the values to the sums, as many at once as there are registers for.
    #[inline(always)]
    unsafe fn add_all<S: Simd>(&self) {
        let mut lane = 0;
        // SAFETY: by the contract of `forward_tile`.
        unsafe {
            if 4 * N <= S::SUMS {
                while lane + 4 * LANES <= self.padded {
                    self.add::<S, 4>(lane);
                    lane += 4 * LANES;
                }
            }
            if 2 * N <= S::SUMS {
                while lane + 2 * LANES <= self.padded {
                    self.add::<S, 2>(lane);
                    lane += 2 * LANES;
                }
            }
            while lane < self.padded {
                self.add::<S, 1>(lane);
                lane += LANES;
            }
        }
    }

    /// Adds elements `lane..` of the values, `C` vectors of them, to the sums. Each sum is one chain over
    /// the positions, whatever `N` and `C`.
    #[inline(always)]
    unsafe fn add<S: Simd, const C: usize>(&self, lane: usize) {
        // SAFETY: by the contract of `forward_tile`; a prefetch of any address is allowed.
        unsafe {
            let mut sums = [[S::splat(0.0); C]; N];
            for i in 0..N {
                for c in 0..C {
                    sums[i][c] = S::load(self.sums[i].add(lane + c * LANES));
                }
            }
            for block in self.blocks.clone() {
                let values = (self.block)(block).add(lane);
                if self.is_new {
                    let ahead = (block + BLOCKS_AHEAD).min(self.view.blocks.end - 1);
                    let ahead = (self.block)(ahead).wrapping_add(lane);
                    for at in (0..LANES).map(|key| key * self.padded) {
                        for c in 0..C {
                            S::prefetch(ahead.wrapping_add(at + c * LANES).cast());
                        }
                    }
                }
                let first = self.view.blocks.start * LANES;
                for key in self.view.keys(block) {
                    let mut vectors = [S::splat(0.0); C];
                    for c in 0..C {
                        let at = (key - block * LANES) * self.padded + c * LANES;
                        vectors[c] = E::load::<S>(values.add(at));
                    }
                    for i in 0..N {
                        let weight = S::splat(*self.weights[i].add(key - first));
                        for c in 0..C {
                            sums[i][c] = S::fma(weight, vectors[c], sums[i][c]);
                        }
                    }
                }
            }
            for i in 0..N {
                for c in 0..C {
                    S::store(self.sums[i].add(lane + c * LANES), sums[i][c]);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn forward_pairs<S: Simd, E: KvElement, const N: usize>(tile: &ForwardTile, first: usize) {
    let shape = &tile.shape;
    let (group, padded) = (shape.group(), shape.padded_dim());
    let pair = |i: usize| ((first + i) / group, tile.kv_head * group + (first + i) % group);
    let view = View::<N>::new(shape, std::array::from_fn(|i| tile.first_position + pair(i).0));
    // SAFETY: by the contract of `forward_tile`.
    unsafe {
        let offsets: [usize; N] =
            std::array::from_fn(|i| (pair(i).0 * shape.heads + pair(i).1) * shape.head_dim);
        let rows: [*mut f32; N] = std::array::from_fn(|i| tile.scratch.add(i * tile.context));
        let sums_at = tile.scratch.add(N * tile.context);
        let sums: [*mut f32; N] = std::array::from_fn(|i| sums_at.add(i * padded));
        let head_block = |panel: *const u8, block: usize, record: usize| {
            let place = *tile.block_table.add(block) as usize * shape.kv_heads + tile.kv_head;
            panel.cast::<E>().add(place * (record + E::SCALES))
        };
        // 1. Probabilities, but for the division by their sum.
        let queries = offsets.map(|offset| tile.queries.add(offset));
        let is_new = tile.rows < FEW_ROWS;
        let scores = Scores { shape, view: &view, is_new, queries, rows, slopes: None };
        let key_block = |block| head_block(tile.keys, block, shape.head_dim * LANES);
        let inverse = probabilities::<S, E, N>(&scores, key_block);
        // 2. The values' sums, weighted with them.
        for sum in sums {
            for lane in (0..padded).step_by(LANES) {
                S::store(sum.add(lane), S::splat(0.0));
            }
        }
        if E::SCALES > 0 {
            for block in view.blocks.clone() {
                let head = head_block(tile.values, block, padded * LANES);
                let scales = S::load(head.cast::<f32>());
                for weight in rows.map(|row| row.add((block - view.blocks.start) * LANES)) {
                    S::store(weight, S::mul(S::load(weight), scales));
                }
            }
        }
        // From memory each value is read once; what is near is read in parts, whose sums stay in registers.
        let at_once = if is_new { 1 } else { view.blocks.len() };
        for first in view.blocks.clone().step_by(at_once) {
            let part = Values {
                view: &view,
                blocks: first..(first + at_once).min(view.blocks.end),
                block: |block| head_block(tile.values, block, padded * LANES).add(E::SCALES),
                is_new,
                padded,
                weights: rows,
                sums,
            };
            part.add_all::<S>();
        }
        // 3. The division.
        for i in 0..N {
            for lane in (0..padded).step_by(LANES) {
                let result = S::mul(S::load(sums[i].add(lane)), S::splat(inverse[i]));
                let to = tile.out.add(offsets[i] + lane);
                if lane + LANES <= shape.head_dim {
                    S::store(to, result);
                } else {
                    store_partial::<S>(to, result, shape.head_dim - lane);
                }
            }
        }
    }
}
