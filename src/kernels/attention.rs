//! Causal attention over paged keys and values, forward and backward.
//!
//! Keys and values live in blocks of sixteen positions. Within a block the keys of one head are
//! transposed, `[head_dim][16]`, so that sixteen scores come from `head_dim` multiply-adds without a
//! sum across lanes; the values are rows, `[16][padded_dim]`. Training lays its keys and values out
//! in the same way, so both run the same instructions.
//!
//! A query row's result depends on its own keys in their order only: blocks are visited from the
//! first to the last, and lanes past the row's position add exact zeros.

use std::ops::Range;

use super::{
    Kernels,
    simd::{LANES, Simd, exp, store_partial},
    threads::{Shared, for_each_range},
};

mod backward;

pub use backward::AttentionBackward;
pub(super) use backward::{BackwardTile, backward_tile};

/// Query rows times heads that share one pass over keys and values.
const PAIRS: usize = 8;

/// Heads and scale of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Factor on the scores, `1 / sqrt(head_dim)` as a rule.
    pub scale: f32,
}

impl AttentionShape {
    /// `head_dim` rounded up to whole vectors.
    #[must_use]
    pub fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Elements of one block of keys, over all heads.
    #[must_use]
    pub fn key_block_len(&self) -> usize {
        self.kv_heads * self.head_dim * LANES
    }

    /// Elements of one block of values, over all heads.
    #[must_use]
    pub fn value_block_len(&self) -> usize {
        self.kv_heads * self.padded_dim() * LANES
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Writes key rows `[slots.len(), kv_heads * head_dim]` to their slots (block * 16 + position
    /// in the block) of a panel.
    pub fn write_keys(&self, rows: &[f32], slots: &[u32], panel: &mut [f32]) {
        for (row, slot) in rows.chunks_exact(self.kv_heads * self.head_dim).zip(slots) {
            let (block, lane) = (*slot as usize / LANES, *slot as usize % LANES);
            let base = block * self.key_block_len() + lane;
            for (index, value) in row.iter().enumerate() {
                panel[base + index * LANES] = *value;
            }
        }
    }

    /// Writes value rows `[slots.len(), kv_heads * head_dim]` to their slots of a panel.
    pub fn write_values(&self, rows: &[f32], slots: &[u32], panel: &mut [f32]) {
        for (row, slot) in rows.chunks_exact(self.kv_heads * self.head_dim).zip(slots) {
            let (block, lane) = (*slot as usize / LANES, *slot as usize % LANES);
            for (head, values) in row.chunks_exact(self.head_dim).enumerate() {
                let place = (block * self.kv_heads + head) * LANES + lane;
                let start = place * self.padded_dim();
                panel[start..start + self.head_dim].copy_from_slice(values);
            }
        }
    }
}

/// All blocks of keys and of values of one layer.
#[derive(Clone, Copy)]
pub struct KvPanels<'a> {
    /// `[blocks][kv_heads][head_dim][16]`
    pub keys: &'a [f32],
    /// `[blocks][kv_heads][16][padded_dim]`
    pub values: &'a [f32],
}

/// One sequence's query rows.
pub struct QuerySpan<'a> {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Position of the first of them; row `i` sees keys `0..=first_position + i`.
    pub first_position: usize,
    /// Block of each sixteen positions.
    pub block_table: &'a [u32],
}

/// Attention of a ragged batch.
pub struct AttentionForward<'a> {
    /// Heads and scale.
    pub shape: AttentionShape,
    /// Where keys and values are.
    pub panels: KvPanels<'a>,
    /// `[rows, heads * head_dim]`
    pub queries: &'a [f32],
    /// The sequences; their rows cover `queries`.
    pub spans: &'a [QuerySpan<'a>],
}

impl AttentionForward<'_> {
    /// Computes into `out`, shaped as `queries`.
    ///
    /// # Panics
    /// Where the lengths do not fit, or a block table is too short or points past the panels.
    pub fn run(&self, kernels: &Kernels, out: &mut [f32]) {
        let shape = &self.shape;
        let width = shape.heads * shape.head_dim;
        assert_eq!(self.queries.len(), out.len(), "queries and output differ in length");
        let num_blocks = self.panels.keys.len() / shape.key_block_len();
        assert!(self.panels.values.len() >= num_blocks * shape.value_block_len());
        let mut tiles = Vec::new();
        for span in self.spans {
            assert!(span.rows.end * width <= out.len(), "rows past the batch");
            let used = (span.first_position + span.rows.len()).div_ceil(LANES);
            assert!(span.block_table.len() >= used, "block table is shorter than the context");
            let inside = |block: &u32| (*block as usize) < num_blocks;
            assert!(span.block_table[..used].iter().all(inside), "block past the cache");
            for start in span.rows.clone().step_by(32) {
                for kv_head in 0..shape.kv_heads {
                    tiles.push((span, start..(start + 32).min(span.rows.end), kv_head));
                }
            }
        }
        let longest = self.spans.iter().map(|span| span.first_position + span.rows.len());
        let work = shape.group() * shape.head_dim * longest.max().unwrap_or(0) * 16;
        let shared = Shared(out.as_mut_ptr());
        for_each_range(tiles.len(), 1, work, |range| {
            for (span, rows, kv_head) in &tiles[range] {
                let first_position = span.first_position + (rows.start - span.rows.start);
                let context = (first_position + rows.len()).next_multiple_of(LANES);
                let mut scores = vec![0.0_f32; PAIRS * context];
                let tile = ForwardTile {
                    shape: *shape,
                    keys: self.panels.keys.as_ptr(),
                    values: self.panels.values.as_ptr(),
                    queries: self.queries[rows.start * width..].as_ptr(),
                    // SAFETY: `rows` lie within `out`, checked above.
                    out: unsafe { shared.get().add(rows.start * width) },
                    rows: rows.len(),
                    first_position,
                    kv_head: *kv_head,
                    block_table: span.block_table.as_ptr(),
                    scores: scores.as_mut_ptr(),
                    context,
                };
                // SAFETY: table and panels were checked above; each tile writes its own rows of
                // its own heads; `scores` has room for PAIRS rows of `context`.
                unsafe { (kernels.attention)(&tile) };
            }
        });
    }
}

/// Some rows of one sequence, for the heads that share one key head.
pub(super) struct ForwardTile {
    shape: AttentionShape,
    keys: *const f32,
    values: *const f32,
    queries: *const f32,
    out: *mut f32,
    rows: usize,
    first_position: usize,
    kv_head: usize,
    block_table: *const u32,
    scores: *mut f32,
    context: usize,
}

/// Calls `$f::<S, N>(tile, first)` over `$count` pairs in groups of 8, 4, 2, 1.
macro_rules! for_pair_groups {
    ($count:expr, $f:ident::<$S:ty>($tile:expr)) => {
        let count = $count;
        let mut first = 0;
        while first + 8 <= count {
            $f::<$S, 8>($tile, first);
            first += 8;
        }
        if first + 4 <= count {
            $f::<$S, 4>($tile, first);
            first += 4;
        }
        if first + 2 <= count {
            $f::<$S, 2>($tile, first);
            first += 2;
        }
        if first < count {
            $f::<$S, 1>($tile, first);
        }
    };
}
use for_pair_groups;

/// # Safety
/// Pointers and the block table cover what the fields say, nobody else writes these rows of these
/// heads, and the CPU has the features of `S`.
#[inline(always)]
pub(super) unsafe fn forward_tile<S: Simd>(tile: &ForwardTile) {
    // SAFETY: by contract.
    unsafe {
        for_pair_groups!(tile.rows * tile.shape.group(), forward_pairs::<S>(tile));
    }
}

#[inline(always)]
unsafe fn forward_pairs<S: Simd, const N: usize>(tile: &ForwardTile, first: usize) {
    let AttentionShape { heads, kv_heads, head_dim, scale } = tile.shape;
    let (group, padded) = (tile.shape.group(), tile.shape.padded_dim());
    // SAFETY: by the contract of `forward_tile`.
    unsafe {
        let mut offsets = [0; N];
        let mut positions = [0; N];
        for i in 0..N {
            let (row, head) = ((first + i) / group, tile.kv_head * group + (first + i) % group);
            offsets[i] = (row * heads + head) * head_dim;
            positions[i] = tile.first_position + row;
        }
        let queries: [*const f32; N] = offsets.map(|offset| tile.queries.add(offset));
        let blocks = positions[N - 1] / LANES + 1;
        let rows: [*mut f32; N] = std::array::from_fn(|i| tile.scores.add(i * tile.context));
        let key_block = |block: usize| {
            let place = *tile.block_table.add(block) as usize * kv_heads + tile.kv_head;
            tile.keys.add(place * head_dim * LANES)
        };
        let inverse = probabilities::<S, N>(
            &queries,
            &rows,
            &positions,
            blocks,
            (head_dim, scale),
            key_block,
        );
        for lane in (0..padded).step_by(LANES) {
            let mut sums = [S::splat(0.0); N];
            for block in 0..blocks {
                let place = *tile.block_table.add(block) as usize * kv_heads + tile.kv_head;
                let values = tile.values.add(place * LANES * padded + lane);
                let keys = LANES.min(positions[N - 1] + 1 - block * LANES);
                for key in 0..keys {
                    let value = S::load(values.add(key * padded));
                    for i in 0..N {
                        let p = S::splat(*rows[i].add(block * LANES + key));
                        sums[i] = S::fma(p, value, sums[i]);
                    }
                }
            }
            for i in 0..N {
                let result = S::mul(sums[i], S::splat(inverse[i]));
                let to = tile.out.add(offsets[i] + lane);
                if lane + LANES <= head_dim {
                    S::store(to, result);
                } else {
                    store_partial::<S>(to, result, head_dim - lane);
                }
            }
        }
    }
}

/// Fills `rows[i][0..blocks * 16]` with `e^(score - max)` of pair `i` (exact zeros past its
/// position) and returns the inverse of each row's sum.
#[inline(always)]
unsafe fn probabilities<S: Simd, const N: usize>(
    queries: &[*const f32; N],
    rows: &[*mut f32; N],
    positions: &[usize; N],
    blocks: usize,
    (head_dim, scale): (usize, f32),
    key_block: impl Fn(usize) -> *const f32,
) -> [f32; N] {
    // SAFETY: by the contract of the callers: every row holds `blocks * 16` scores, every query
    // `head_dim` elements, every key block `head_dim * 16`.
    unsafe {
        let mut greatest = [S::splat(f32::NEG_INFINITY); N];
        for block in 0..blocks {
            let keys = key_block(block);
            let mut scores = [S::splat(0.0); N];
            for d in 0..head_dim {
                let key = S::load(keys.add(d * LANES));
                for i in 0..N {
                    scores[i] = S::fma(S::splat(*queries[i].add(d)), key, scores[i]);
                }
            }
            for i in 0..N {
                let to = rows[i].add(block * LANES);
                let mut scaled = S::mul(scores[i], S::splat(scale));
                S::store(to, scaled);
                if block * LANES + LANES > positions[i] + 1 {
                    for lane in hidden_lanes(block, positions[i]) {
                        *to.add(lane) = f32::NEG_INFINITY;
                    }
                    scaled = S::load(to);
                }
                greatest[i] = S::max(greatest[i], scaled);
            }
        }
        let mut inverse = [0.0; N];
        for i in 0..N {
            let shift = S::splat(-S::max_lane(greatest[i]));
            let mut sum = S::splat(0.0);
            for block in 0..blocks {
                let at = rows[i].add(block * LANES);
                let mut e = exp::<S>(S::add(S::load(at), shift));
                S::store(at, e);
                if block * LANES + LANES > positions[i] + 1 {
                    for lane in hidden_lanes(block, positions[i]) {
                        *at.add(lane) = 0.0;
                    }
                    e = S::load(at);
                }
                sum = S::add(sum, e);
            }
            inverse[i] = 1.0 / S::sum(sum);
        }
        inverse
    }
}

/// The lanes of `block` that lie past `position`.
#[inline(always)]
fn hidden_lanes(block: usize, position: usize) -> Range<usize> {
    (position + 1).saturating_sub(block * LANES).min(LANES)..LANES
}
