//! The sums `x A^T` of segments of few rows, in groups that are under way at once.

use std::{cmp::Reverse, ops::Range};

use super::{
    lora::LoraSegment,
    lora_sums::{CHAINS, ShrinkSum},
    product::SUM_BLOCK,
    simd::LANES,
};

/// Tasks for each thread, where there is work for so many.
pub(super) const PIECES: usize = 8;

/// The sums, each of a block of terms for sixteen elements of a row.
pub(super) struct Shrink {
    x: *const f32,
    in_features: usize,
    num_blocks: usize,
    sums: Vec<ShrinkSum>,
    pub(super) groups: Vec<Group>,
    /// What the sums come to: `[vectors of hidden][blocks][16]`.
    blocks: Vec<f32>,
    /// Bytes of A, as often as they are read.
    pub(super) work: usize,
}

// SAFETY: `x` is only read.
unsafe impl Send for Shrink {}
// SAFETY: as above.
unsafe impl Sync for Shrink {}

/// Sums of the same form over equally many terms.
pub(super) struct Group {
    sums: Range<usize>,
    pub(super) terms: usize,
    /// Bytes of A.
    pub(super) work: usize,
}

impl Shrink {
    /// No sums as yet, of rows of `x [rows, in]`, which must outlive them.
    pub(super) fn new(x: &[f32], in_features: usize) -> Self {
        Self {
            x: x.as_ptr(),
            in_features,
            num_blocks: in_features.div_ceil(SUM_BLOCK),
            sums: Vec::new(),
            groups: Vec::new(),
            blocks: Vec::new(),
            work: 0,
        }
    }

    /// Adds a segment, whose rows lie in `x` and whose A must outlive the sums. Its `[rows, stride]` elements
    /// begin at `hidden`, where those of the segment before it end.
    pub(super) fn add(&mut self, segment: &LoraSegment<'_>, hidden: usize, stride: usize) {
        let LoraSegment { rows, a, .. } = segment;
        let term_bytes = LANES * a.form().element_bytes();
        for panel in 0..stride / LANES {
            for block in 0..self.num_blocks {
                let term = block * SUM_BLOCK;
                let terms = (self.in_features - term).min(SUM_BLOCK);
                let from = a.data.bytes()[panel * a.panel_bytes() + term * term_bytes..].as_ptr();
                for (index, row) in rows.clone().enumerate() {
                    let vector = (hidden + index * stride) / LANES + panel;
                    self.sums.push(ShrinkSum {
                        // SAFETY: the caller's check of the segments: row and term are those of `x`.
                        x: unsafe { self.x.add(row * self.in_features + term) },
                        a: from,
                        form: a.form(),
                        terms,
                        place: (vector * self.num_blocks + block) * LANES,
                        to: std::ptr::null_mut(),
                        next: std::ptr::null(),
                    });
                }
            }
        }
    }

    /// Makes groups of all that was added, for so many threads, of which `readers` take groups at a time.
    pub(super) fn group(&mut self, threads: usize, readers: usize) {
        let Self { sums, groups, .. } = self;
        self.blocks = vec![0.0; sums.len() * LANES];
        let kind = |sum: &ShrinkSum| (sum.form.element_bytes(), sum.form as u8, Reverse(sum.terms));
        sums.sort_by_key(kind);
        for sum in &mut *sums {
            sum.to = self.blocks[sum.place..sum.place + LANES].as_mut_ptr();
        }
        let mut start = 0;
        for same in sums.chunk_by(|left, right| kind(left) == kind(right)) {
            // Pairs, as long as there are few: so every thread has its share.
            let pairs = same.len().div_ceil(2).min(PIECES * threads);
            let count = same.len().div_ceil(CHAINS).max(pairs);
            let (terms, term_bytes) = (same[0].terms, LANES * same[0].form.element_bytes());
            for index in 0..count {
                let at = |index: usize| start + index * same.len() / count;
                let sums = at(index)..at(index + 1);
                let work = sums.len() * terms * term_bytes;
                self.work += work;
                groups.push(Group { sums, terms, work });
            }
            start += same.len();
        }
        // A thread's next group is probably the one behind those of the others.
        for index in readers..groups.len() {
            let (this, next) = (groups[index - readers].sums.clone(), groups[index].sums.clone());
            for (this, next) in this.zip(next) {
                sums[this].next = sums[next].a;
            }
        }
    }

    pub(super) fn sums(&self, group: usize) -> &[ShrinkSum] {
        &self.sums[self.groups[group].sums.clone()]
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
