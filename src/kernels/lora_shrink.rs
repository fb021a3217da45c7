//! The sums `x A^T` of segments of few rows, in groups that are under way at once.

use std::{cmp::Reverse, ops::Range};

use super::{
    lora::{LoraSegment, PIECES, Part},
    lora_sums::{CHAINS, ShrinkSum},
    product::SUM_BLOCK,
    simd::LANES,
};

/// The sums of segments of few rows, in groups that are under way at once.
pub(super) struct Shrink {
    pub(super) sums: Vec<ShrinkSum>,
    pub(super) groups: Vec<Group>,
    /// What the sums come to: `[vectors of hidden][blocks][16]`.
    blocks: Vec<f32>,
    num_blocks: usize,
}

/// Sums of the same form over equally many terms.
pub(super) struct Group {
    pub(super) sums: Range<usize>,
    pub(super) terms: usize,
}

impl Shrink {
    /// Of these parts, for so many threads.
    pub(super) fn plan(parts: &[&Part<'_>], x: &[f32], in_features: usize, threads: usize) -> Self {
        let num_blocks = in_features.div_ceil(SUM_BLOCK);
        let vectors: usize = parts.iter().map(|part| part.rows * part.stride / LANES).sum();
        let mut blocks = vec![0.0_f32; vectors * num_blocks * LANES];
        let mut sums = Vec::with_capacity(vectors * num_blocks);
        for Part { segment, rows, hidden, stride, .. } in parts {
            let LoraSegment { rows: Range { start: first, .. }, a, .. } = segment;
            let size = a.form().element_bytes();
            for panel in 0..stride / LANES {
                for block in 0..num_blocks {
                    let term = block * SUM_BLOCK;
                    let at = panel * a.panel_bytes() + term * LANES * size;
                    for row in 0..*rows {
                        let vector = (hidden + row * stride) / LANES + panel;
                        let to = (vector * num_blocks + block) * LANES;
                        sums.push(ShrinkSum {
                            x: x[(first + row) * in_features + term..].as_ptr(),
                            a: a.data.bytes()[at..].as_ptr(),
                            form: a.form(),
                            terms: (in_features - term).min(SUM_BLOCK),
                            to: blocks[to..to + LANES].as_mut_ptr(),
                            next: std::ptr::null(),
                        });
                    }
                }
            }
        }
        let kind = |sum: &ShrinkSum| (sum.form.element_bytes(), sum.form as u8, Reverse(sum.terms));
        sums.sort_by_key(kind);
        let mut groups = Vec::new();
        let mut start = 0;
        for same in sums.chunk_by(|left, right| kind(left) == kind(right)) {
            // Pairs, as long as there are few: so every thread has its share.
            let pairs = same.len().div_ceil(2).min(PIECES * threads);
            let count = same.len().div_ceil(CHAINS).max(pairs);
            for index in 0..count {
                let at = |index: usize| start + index * same.len() / count;
                groups.push(Group { sums: at(index)..at(index + 1), terms: same[0].terms });
            }
            start += same.len();
        }
        // A thread's next group is probably the one behind those of the others.
        for index in threads..groups.len() {
            let (this, next) = (groups[index - threads].sums.clone(), groups[index].sums.clone());
            for (this, next) in this.zip(next) {
                sums[this].next = sums[next].a;
            }
        }
        Self { sums, groups, blocks, num_blocks }
    }

    /// The blocks of each sum, one after the other.
    ///
    /// # Safety
    /// All groups are done, nobody writes to them any more, and `hidden` begins with the vectors.
    pub(super) unsafe fn add_up(&self, hidden: *mut f32) {
        let vectors = self.blocks.chunks_exact(self.num_blocks.max(1) * LANES);
        for (vector, blocks) in vectors.enumerate() {
            let (blocks, _) = blocks.as_chunks::<LANES>();
            let mut total = blocks[0];
            for block in &blocks[1..] {
                total.iter_mut().zip(block).for_each(|(total, value)| *total += value);
            }
            // SAFETY: by contract.
            unsafe { hidden.add(vector * LANES).cast::<[f32; LANES]>().write_unaligned(total) };
        }
    }
}
