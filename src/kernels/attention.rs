//! Causal attention over paged keys and values, forward and backward.
//!
//! Keys and values live in blocks of sixteen positions. Within a block the keys of one head are
//! transposed, `[head_dim][16]`, so that sixteen scores come from `head_dim` multiply-adds without a
//! sum across lanes; the values are rows, `[16][padded_dim]`. Training lays its keys and values out
//! in the same way, so both run the same instructions. A cache may hold both in fewer bits
//! (`panels.rs`); the arithmetic is that of f32 in any case.
//!
//! A query row's result depends on its own keys in their order only: blocks are visited from the
//! first to the last, and lanes that the row does not see add exact zeros. Blocks that lie before
//! every window of a pass are not visited.

use std::{cmp::Reverse, ops::Range};

use super::{
    Kernels,
    simd::LANES,
    threads::{Shared, for_each_range},
};

mod backward;
mod forward;
mod panels;
mod scores;

pub use backward::AttentionBackward;
pub(super) use backward::{BackwardTile, backward_tile};
pub(super) use forward::{ForwardTile, forward_tile};
pub use panels::{KvForm, KvPanel, KvPanelMut, KvPanels, KvSide};

/// Query rows times heads that share one pass over keys and values.
const PAIRS: usize = 8;
/// Query rows of a task.
const TILE_ROWS: usize = 32;

/// Heads, scale and reach of an attention layer.
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
    /// Keys that a query sees, its own and those right before it; `None`: all before it.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)` (Gemma 2, <https://arxiv.org/abs/2408.00118>).
    pub soft_cap: Option<f32>,
}

impl AttentionShape {
    /// `head_dim` rounded up to whole vectors.
    #[must_use]
    pub fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The first key that the query at `position` sees.
    fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The blocks that queries at `first..=last` see.
    fn blocks(&self, first: usize, last: usize) -> Range<usize> {
        self.first_key(first) / LANES..last / LANES + 1
    }
}

/// One sequence's query rows.
pub struct QuerySpan<'a> {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Position of the first of them; row `i` sees keys up to `first_position + i`.
    pub first_position: usize,
    /// Block of each sixteen positions.
    pub block_table: &'a [u32],
}

/// Attention of a ragged batch.
pub struct AttentionForward<'a> {
    /// Heads, scale and reach.
    pub shape: AttentionShape,
    /// Where keys and values are.
    pub panels: KvPanels<'a>,
    /// `[rows, heads * head_dim]`
    pub queries: &'a [f32],
    /// The sequences; their rows cover `queries`.
    pub spans: &'a [QuerySpan<'a>],
}

/// Some rows of one sequence, for one key head.
struct Task<'a> {
    span: &'a QuerySpan<'a>,
    rows: Range<usize>,
    kv_head: usize,
}

impl AttentionForward<'_> {
    /// Computes into `out`, shaped as `queries`.
    ///
    /// # Panics
    /// Where the lengths do not fit, keys and values differ in form, or a block table is too short or
    /// points past the panels.
    pub fn run(&self, kernels: &Kernels, out: &mut [f32]) {
        let shape = &self.shape;
        let width = shape.heads * shape.head_dim;
        let attention = match self.panels.form(shape) {
            KvForm::F32 => kernels.attention,
            KvForm::Bf16 => kernels.attention_bf16,
            KvForm::Int8 => kernels.attention_int8,
        };
        let tasks = self.tasks(out.len());
        let reach = |span: &QuerySpan<'_>| {
            let last = span.first_position + span.rows.len();
            last.min(shape.window.unwrap_or(last))
        };
        let longest = self.spans.iter().map(reach).max().unwrap_or(0);
        let work = shape.group() * shape.head_dim * longest * 16;
        let shared = Shared(out.as_mut_ptr());
        for_each_range(tasks.len(), 1, work, |range| {
            let (keys, values) = self.panels.addresses();
            let mut scratch = Vec::new();
            for Task { span, rows, kv_head } in &tasks[range] {
                let first_position = span.first_position + (rows.start - span.rows.start);
                let blocks = shape.blocks(first_position, first_position + rows.len() - 1);
                let pairs = PAIRS.min(rows.len() * shape.group());
                let context = blocks.len() * LANES;
                // Whatever is read of it was written before, by the same pairs.
                scratch.resize(scratch.len().max(pairs * (context + shape.padded_dim())), 0.0_f32);
                let tile = ForwardTile {
                    shape: *shape,
                    keys,
                    values,
                    queries: self.queries[rows.start * width..].as_ptr(),
                    // SAFETY: `rows` lie within `out`, as `tasks` checked.
                    out: unsafe { shared.get().add(rows.start * width) },
                    rows: rows.len(),
                    first_position,
                    kv_head: *kv_head,
                    block_table: span.block_table.as_ptr(),
                    scratch: scratch.as_mut_ptr(),
                    context,
                };
                // SAFETY: panels, tables and rows were checked above; each task writes its own rows
                // of its own heads; `scratch` has room for its pairs.
                unsafe { attention(&tile) };
            }
        });
    }

    /// The pieces of work, after a check that they touch nothing outside.
    fn tasks(&self, out_len: usize) -> Vec<Task<'_>> {
        let width = self.shape.heads * self.shape.head_dim;
        assert_eq!(self.queries.len(), out_len, "queries and output differ in length");
        let num_blocks = self.panels.num_blocks(&self.shape);
        let mut tasks = Vec::new();
        for span in self.spans {
            assert!(span.rows.end * width <= out_len, "rows past the batch");
            let used = (span.first_position + span.rows.len()).div_ceil(LANES);
            assert!(span.block_table.len() >= used, "block table is shorter than the context");
            let inside = |block: &u32| (*block as usize) < num_blocks;
            assert!(span.block_table[..used].iter().all(inside), "block past the cache");
            for start in span.rows.clone().step_by(TILE_ROWS) {
                for kv_head in 0..self.shape.kv_heads {
                    let rows = start..(start + TILE_ROWS).min(span.rows.end);
                    tasks.push(Task { span, rows, kv_head });
                }
            }
        }
        // The longest first, so that no thread is left with one of them at the end.
        tasks.sort_by_key(|task| {
            let last = task.span.first_position + (task.rows.end - task.span.rows.start);
            Reverse(task.rows.len() * last)
        });
        tasks
    }
}
