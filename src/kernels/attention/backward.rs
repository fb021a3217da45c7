//! The backward pass of causal attention over whole sequences. Probabilities are computed again
//! from queries and keys, so that no `[T, T]` matrix is ever held.
//!
//! With `P = softmax(scale Q K^T)` and `O = P V`: `dV = P^T dO`, `dS = P (dO V^T - rowsum(dO O))`,
//! `dQ = scale dS K`, `dK = scale dS^T Q`. A soft cap multiplies `dS` by the slope of its curve.

use std::ops::Range;

use super::{
    AttentionShape, PAIRS,
    scores::{Scores, View, probabilities},
};
use crate::kernels::{
    Kernels,
    simd::{LANES, Simd, store_partial},
    threads::{Shared, for_each_range},
};

/// Gradients of attention over whole sequences (no cache).
pub struct AttentionBackward<'a> {
    /// Heads, scale and reach.
    pub shape: AttentionShape,
    /// `[rows, heads * head_dim]`
    pub queries: &'a [f32],
    /// `[rows, kv_heads * head_dim]`
    pub keys: &'a [f32],
    /// `[rows, kv_heads * head_dim]`
    pub values: &'a [f32],
    /// The forward pass's result, `[rows, heads * head_dim]`.
    pub out: &'a [f32],
    /// Its gradient.
    pub grad_out: &'a [f32],
    /// The rows of each sequence.
    pub sequences: &'a [Range<usize>],
}

/// One sequence's keys and values of one head, in the forms the kernel reads, and its sums.
struct HeadPanels {
    /// `[blocks][head_dim][16]`
    keys_transposed: Vec<f32>,
    /// `[blocks][head_dim][16]`
    values_transposed: Vec<f32>,
    /// `[rows][padded_dim]`
    keys: Vec<f32>,
    /// `[rows][padded_dim]`
    grad_keys: Vec<f32>,
    /// `[rows][padded_dim]`
    grad_values: Vec<f32>,
}

impl AttentionBackward<'_> {
    /// Computes the gradients of queries, keys and values.
    ///
    /// # Panics
    /// Where the lengths do not fit each other.
    pub fn run(&self, kernels: &Kernels, grads: (&mut [f32], &mut [f32], &mut [f32])) {
        let shape = self.shape;
        let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let rows = self.queries.len() / wide;
        let (grad_q, grad_k, grad_v) = grads;
        assert!(
            [self.out.len(), self.grad_out.len(), grad_q.len()].iter().all(|n| *n == rows * wide)
        );
        let narrows = [self.keys.len(), self.values.len(), grad_k.len(), grad_v.len()];
        assert!(narrows.iter().all(|n| *n == rows * narrow), "keys and values differ in length");
        assert!(self.sequences.iter().all(|range| range.end <= rows), "rows past the batch");
        let (grad_q, grad_k, grad_v) =
            (Shared(grad_q.as_mut_ptr()), Shared(grad_k.as_mut_ptr()), Shared(grad_v.as_mut_ptr()));
        let longest = self.sequences.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let work = shape.group() * shape.head_dim * longest * longest * 3;
        let count = self.sequences.len() * shape.kv_heads;
        for_each_range(count, 1, work, |range| {
            for index in range {
                let sequence = &self.sequences[index / shape.kv_heads];
                let kv_head = index % shape.kv_heads;
                let mut panels = self.gather(sequence, kv_head);
                let context = sequence.len().next_multiple_of(LANES);
                let mut scratch = vec![0.0; 2 * PAIRS * (context + shape.padded_dim())];
                let tile = BackwardTile {
                    shape,
                    panels: &raw mut panels,
                    queries: self.queries[sequence.start * wide..].as_ptr(),
                    out: self.out[sequence.start * wide..].as_ptr(),
                    grad_out: self.grad_out[sequence.start * wide..].as_ptr(),
                    // SAFETY: the sequence's rows lie within the batch, checked above.
                    grad_queries: unsafe { grad_q.get().add(sequence.start * wide) },
                    rows: sequence.len(),
                    kv_head,
                    scratch: scratch.as_mut_ptr(),
                    context,
                };
                // SAFETY: lengths were checked above; each task writes the rows of its own
                // sequence for its own heads.
                unsafe { (kernels.attention_backward)(&tile) };
                for row in 0..sequence.len() {
                    let to = (sequence.start + row) * narrow + kv_head * shape.head_dim;
                    let from = row * shape.padded_dim();
                    // SAFETY: as above; both are `head_dim` elements inside their buffers.
                    unsafe {
                        let count = shape.head_dim;
                        let source = panels.grad_keys[from..from + count].as_ptr();
                        std::ptr::copy_nonoverlapping(source, grad_k.get().add(to), count);
                        let source = panels.grad_values[from..from + count].as_ptr();
                        std::ptr::copy_nonoverlapping(source, grad_v.get().add(to), count);
                    }
                }
            }
        });
    }

    fn gather(&self, sequence: &Range<usize>, kv_head: usize) -> HeadPanels {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape;
        let padded = self.shape.padded_dim();
        let rows = sequence.len();
        let transposed = rows.div_ceil(LANES) * head_dim * LANES;
        let mut panels = HeadPanels {
            keys_transposed: vec![0.0; transposed],
            values_transposed: vec![0.0; transposed],
            keys: vec![0.0; rows * padded],
            grad_keys: vec![0.0; rows * padded],
            grad_values: vec![0.0; rows * padded],
        };
        for row in 0..rows {
            let from = (sequence.start + row) * kv_heads * head_dim + kv_head * head_dim;
            let key = &self.keys[from..from + head_dim];
            let value = &self.values[from..from + head_dim];
            panels.keys[row * padded..row * padded + head_dim].copy_from_slice(key);
            for d in 0..head_dim {
                let to = (row / LANES * head_dim + d) * LANES + row % LANES;
                panels.keys_transposed[to] = key[d];
                panels.values_transposed[to] = value[d];
            }
        }
        panels
    }
}

/// One sequence, for the heads that share one key head.
pub(in crate::kernels) struct BackwardTile {
    shape: AttentionShape,
    panels: *mut HeadPanels,
    queries: *const f32,
    out: *const f32,
    grad_out: *const f32,
    grad_queries: *mut f32,
    rows: usize,
    kv_head: usize,
    /// `2 * PAIRS * (context + padded_dim)` elements.
    scratch: *mut f32,
    context: usize,
}

/// # Safety
/// Pointers cover what the fields say, nobody else uses the panels or writes these heads' rows of
/// the query gradient, and the CPU has the features of `S`.
#[inline(always)]
pub(in crate::kernels) unsafe fn backward_tile<S: Simd>(tile: &BackwardTile) {
    let count = tile.rows * tile.shape.group();
    // SAFETY: by contract; `first` stays below the number of pairs.
    unsafe {
        let mut first = 0;
        while first < count {
            first += match count - first {
                1 => backward_pairs::<S, 1>(tile, first),
                2 | 3 => backward_pairs::<S, 2>(tile, first),
                4..PAIRS => backward_pairs::<S, 4>(tile, first),
                _ => backward_pairs::<S, PAIRS>(tile, first),
            };
        }
    }
}

/// Adds what `N` pairs of row and head contribute; returns `N`.
#[inline(always)]
unsafe fn backward_pairs<S: Simd, const N: usize>(tile: &BackwardTile, first: usize) -> usize {
    let shape = &tile.shape;
    let (group, head_dim, padded) = (shape.group(), shape.head_dim, shape.padded_dim());
    let pair = |i: usize| ((first + i) / group, tile.kv_head * group + (first + i) % group);
    let view = View::<N>::new(shape, std::array::from_fn(|i| pair(i).0));
    // SAFETY: by the contract of `backward_tile`; the panels outlive the call.
    unsafe {
        let panels = &mut *tile.panels;
        let offsets: [usize; N] =
            std::array::from_fn(|i| (pair(i).0 * shape.heads + pair(i).1) * head_dim);
        let area = |index: usize, i: usize| tile.scratch.add((index * PAIRS + i) * tile.context);
        let probs: [*mut f32; N] = std::array::from_fn(|i| area(0, i));
        let grad_scores: [*mut f32; N] = std::array::from_fn(|i| area(1, i));
        let rows_at = tile.scratch.add(2 * PAIRS * tile.context);
        let queries: [*mut f32; N] = std::array::from_fn(|i| rows_at.add(i * padded));
        let grads: [*mut f32; N] = std::array::from_fn(|i| rows_at.add((PAIRS + i) * padded));
        // 1. The rows, padded, and what softmax takes off each score's gradient.
        let mut pull = [0.0_f32; N];
        for i in 0..N {
            for d in 0..head_dim {
                let grad = *tile.grad_out.add(offsets[i] + d);
                *queries[i].add(d) = *tile.queries.add(offsets[i] + d);
                *grads[i].add(d) = grad;
                pull[i] += grad * *tile.out.add(offsets[i] + d);
            }
        }
        // 2. The probabilities, again; with a soft cap, its slopes where the scores' gradients go.
        let keys_transposed = panels.keys_transposed.as_ptr();
        let scores = Scores {
            shape,
            view: &view,
            is_new: false,
            queries: queries.map(<*mut f32>::cast_const),
            rows: probs,
            slopes: Some(grad_scores),
        };
        let inverse = probabilities::<S, f32, N>(&scores, |block| {
            keys_transposed.add(block * head_dim * LANES)
        });
        // 3. The gradients of the scores.
        for block in view.blocks.clone() {
            let values = panels.values_transposed.as_ptr().add(block * head_dim * LANES);
            let mut products = [S::splat(0.0); N];
            for d in 0..head_dim {
                let value = S::load(values.add(d * LANES));
                for i in 0..N {
                    products[i] = S::fma(S::splat(*grads[i].add(d)), value, products[i]);
                }
            }
            let at = (block - view.blocks.start) * LANES;
            for i in 0..N {
                let (prob, grad_score) = (probs[i].add(at), grad_scores[i].add(at));
                let p = S::mul(S::load(prob), S::splat(inverse[i]));
                S::store(prob, p);
                let slope = S::mul(S::add(products[i], S::splat(-pull[i])), S::splat(shape.scale));
                let mut grad = S::mul(p, slope);
                if shape.soft_cap.is_some() {
                    grad = S::mul(grad, S::load(grad_score));
                }
                S::store(grad_score, grad);
            }
        }
        // 4. The gradients of queries, keys and values.
        let keys = view.keys(view.blocks.start).start..view.keys(view.blocks.end - 1).end;
        let first_key = view.blocks.start * LANES;
        for lane in (0..padded).step_by(LANES) {
            let mut sums = [S::splat(0.0); N];
            let query: [S::V; N] = std::array::from_fn(|i| S::load(queries[i].add(lane)));
            let grad: [S::V; N] = std::array::from_fn(|i| S::load(grads[i].add(lane)));
            for key in keys.clone() {
                let at = key * padded + lane;
                let row = S::load(panels.keys.as_ptr().add(at));
                let mut grad_key = S::load(panels.grad_keys.as_ptr().add(at));
                let mut grad_value = S::load(panels.grad_values.as_ptr().add(at));
                for i in 0..N {
                    let slope = S::splat(*grad_scores[i].add(key - first_key));
                    sums[i] = S::fma(slope, row, sums[i]);
                    grad_key = S::fma(slope, query[i], grad_key);
                    let p = S::splat(*probs[i].add(key - first_key));
                    grad_value = S::fma(p, grad[i], grad_value);
                }
                S::store(panels.grad_keys.as_mut_ptr().add(at), grad_key);
                S::store(panels.grad_values.as_mut_ptr().add(at), grad_value);
            }
            for i in 0..N {
                let count = LANES.min(head_dim - lane);
                store_partial::<S>(tile.grad_queries.add(offsets[i] + lane), sums[i], count);
            }
        }
    }
    N
}
