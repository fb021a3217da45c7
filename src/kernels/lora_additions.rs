//! What adapters add to products of the same rows, between the tiles of these products.

use std::{
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
    time::{Duration, Instant},
};

use super::{
    Kernels,
    lora::{FEW_ROWS, LoraSegment, LoraTarget, Part, Target, check},
    lora_shrink::{PIECES, Shrink},
    lora_sums::{CHAINS, ExpandTile},
    panels::PackedWeight,
    pool::{for_each_task, look_around},
    simd::LANES,
    threads::{Shared, num_threads},
};

/// Bytes of A and B, for each eight rows, that are not worth a second thread.
const MIN_PARALLEL_BYTES: usize = 24 << 10;
/// Bytes of B of one task, at least and at most.
const TILE_BYTES: [usize; 2] = [4 << 10, 32 << 10];
/// Rows and panels of a task where a segment has many rows.
const MANY_ROWS_TILE: (usize, usize) = (64, 16);
/// Threads of which one may turn from the products to the additions.
const THREADS_A_READER: usize = 4;

/// What adapters add to products of the same rows, done while these are computed.
pub struct Additions<'a> {
    kernels: &'a Kernels,
    x: &'a [f32],
    in_features: usize,
    rows: usize,
    targets: Vec<Target<'a>>,
    /// `x A^T` of each part; those of few rows first. Written to and read by way of the pointer.
    hidden: (Vec<f32>, Shared<f32>),
    shrink: Shrink,
    next_group: AtomicUsize,
    num_shrunk: AtomicUsize,
    is_shrunk: AtomicBool,
    /// Tiles of the products that are there and not added to.
    ready: Mutex<Vec<Ready>>,
    progress: Progress,
}

/// A rectangle of a product's output that is computed.
struct Ready {
    target: usize,
    rows: Range<usize>,
    panels: Range<usize>,
    /// The whole output.
    out: Shared<f32>,
}

/// How far products and additions are, and who is at the latter.
#[derive(Default)]
struct Progress {
    /// Rows times panels of all products.
    area: usize,
    area_done: AtomicUsize,
    /// Bytes of A and B.
    work: usize,
    work_done: AtomicUsize,
    readers: AtomicUsize,
    max_readers: usize,
    /// Time that threads of products have spent on additions.
    nanoseconds: AtomicU64,
}

impl Progress {
    fn is_behind(&self) -> bool {
        let area_done = self.area_done.load(Relaxed);
        // With the last tiles, every thread is about to be free.
        area_done < self.area && self.work_done.load(Relaxed) * self.area < self.work * area_done
    }
}

impl<'a> Additions<'a> {
    /// Plans what is to be added to products of `x [rows, in]`, and multiplies segments of many rows by A.
    ///
    /// # Panics
    /// Where matrices do not fit `in_features` and a target, or segments lie outside or overlap.
    #[must_use]
    pub fn new(
        kernels: &'a Kernels,
        x: &'a [f32],
        in_features: usize,
        targets: Vec<LoraTarget<'a>>,
    ) -> Self {
        let rows = x.len().checked_div(in_features).unwrap_or(0);
        let checked = |target: LoraTarget<'a>| check(target, in_features, rows);
        let mut targets: Vec<Target<'_>> = targets.into_iter().map(checked).collect();
        let mut length = 0;
        let mut work = 0;
        for many in [false, true] {
            let parts = targets.iter_mut().flat_map(|target| {
                target.parts.iter_mut().map(|part| (target.out_features.div_ceil(LANES), part))
            });
            for (panels, part) in parts.filter(|(_, part)| (part.rows() > FEW_ROWS) == many) {
                part.hidden = length;
                length += part.rows() * part.stride;
                work += part.expand_work(part.rows(), panels);
            }
        }
        let mut hidden = vec![0.0; length];
        for part in targets.iter().flat_map(|target| &target.parts) {
            if part.rows() > FEW_ROWS {
                shrink_many(kernels, part, x, in_features, &mut hidden);
            }
        }
        let at = Shared(hidden.as_mut_ptr());
        let mut shrink = Shrink::new(x, in_features);
        for part in targets.iter().flat_map(|target| &target.parts) {
            if part.rows() <= FEW_ROWS {
                shrink.add(&part.segment, part.hidden, part.stride);
            }
        }
        let threads = num_threads();
        let max_readers = threads.div_ceil(THREADS_A_READER);
        shrink.group(threads, max_readers);
        let panels = targets.iter().map(|target| target.out_features.div_ceil(LANES));
        let progress = Progress {
            area: rows * panels.sum::<usize>(),
            work: work + shrink.work,
            // Many rows are arithmetic like the products themselves.
            max_readers: if shrink.groups.is_empty() { threads } else { max_readers },
            ..Progress::default()
        };
        Self {
            kernels,
            x,
            in_features,
            rows,
            is_shrunk: AtomicBool::new(shrink.groups.is_empty()),
            targets,
            hidden: (hidden, at),
            shrink,
            next_group: AtomicUsize::new(0),
            num_shrunk: AtomicUsize::new(0),
            ready: Mutex::default(),
            progress,
        }
    }

    /// Computes product number `index`, `out = x W^T + bias`, and meanwhile some of the additions. Returns
    /// the time that they took, as if all threads had shared it.
    ///
    /// # Panics
    /// As [`PackedWeight::linear`], and where `weight` is not of the target's shape.
    pub fn product(&self, index: usize, weight: &PackedWeight, out: &'a mut [f32]) -> Duration {
        let Target { out_features, bias, .. } = self.targets[index];
        assert_eq!(weight.shape(), [out_features, self.in_features], "not the target's weight");
        let before = self.progress.nanoseconds.load(Relaxed);
        weight.linear_then(self.kernels, self.x, bias, out, &|rows, panels, out| {
            let begun = Instant::now();
            self.note(index, rows, panels, out);
            self.go_on();
            let nanoseconds = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.progress.nanoseconds.fetch_add(nanoseconds, Relaxed);
        });
        let nanoseconds = self.progress.nanoseconds.load(Relaxed) - before;
        Duration::from_nanos(nanoseconds / num_threads() as u64)
    }

    /// As [`Self::product`], where the product is in `out` already.
    ///
    /// # Panics
    /// Where `out` has too few rows.
    pub(super) fn add_to(&self, index: usize, out: &'a mut [f32]) {
        let columns = self.targets[index].out_features;
        assert!(self.rows * columns <= out.len(), "rows of the output");
        self.note(index, 0..self.rows, 0..columns.div_ceil(LANES), out.as_mut_ptr());
    }

    /// A part of a product is there.
    fn note(&self, target: usize, rows: Range<usize>, panels: Range<usize>, out: *mut f32) {
        let area = rows.len() * panels.len();
        if !self.targets[target].parts.is_empty() {
            let ready = Ready { target, rows, panels, out: Shared(out) };
            self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(ready);
        }
        self.progress.area_done.fetch_add(area, Relaxed);
    }

    /// Catches up with the products, unless others are at it.
    fn go_on(&self) {
        let Progress { readers, max_readers, .. } = &self.progress;
        if readers.fetch_add(1, Acquire) < *max_readers {
            while self.progress.is_behind() && self.step() {}
        }
        readers.fetch_sub(1, Release);
    }

    /// Does one piece; `false` where none can be done now.
    fn step(&self) -> bool {
        if self.next_group.load(Relaxed) < self.shrink.groups.len() {
            let group = self.next_group.fetch_add(1, Relaxed);
            if group < self.shrink.groups.len() {
                self.shrink_group(group);
                return true;
            }
        }
        if !self.is_shrunk.load(Acquire) {
            return false;
        }
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some(ready) = ready else { return false };
        let mut tiles = Vec::new();
        self.tiles(&ready, usize::MAX, &mut tiles);
        link(&mut tiles, 1);
        for tile in &tiles {
            // SAFETY: the rectangle is computed and was taken from the list: it is this thread's.
            unsafe { (self.kernels.expand)(tile) };
        }
        true
    }

    /// The sums of a group that nobody else has.
    fn shrink_group(&self, group: usize) {
        let groups = &self.shrink.groups;
        let work = groups[group].work;
        // SAFETY: each sum reads its block of a row and of a panel, and has a place of its own.
        unsafe { (self.kernels.shrink)(self.shrink.sums(group), groups[group].terms) };
        self.progress.work_done.fetch_add(work, Relaxed);
        if self.num_shrunk.fetch_add(1, AcqRel) + 1 == groups.len() {
            // SAFETY: all groups are done, and nobody reads `hidden` before it is said to be ready.
            unsafe { self.shrink.add_up(self.hidden.1.get()) };
            self.is_shrunk.store(true, Release);
        }
    }

    /// Adds what has not been added. All products must be there.
    pub fn finish(self) {
        let ready = std::mem::take(&mut *self.ready.lock().unwrap_or_else(PoisonError::into_inner));
        let first = self.next_group.load(Relaxed).min(self.shrink.groups.len());
        let num_groups = self.shrink.groups.len() - first;
        if num_groups == 0 && ready.is_empty() {
            return;
        }
        let left = self.progress.work - self.progress.work_done.load(Relaxed);
        let threads = if left < MIN_PARALLEL_BYTES { 1 } else { num_threads() };
        let piece = (left / (threads * PIECES)).clamp(TILE_BYTES[0], TILE_BYTES[1]);
        let mut tiles = Vec::new();
        for ready in &ready {
            self.tiles(ready, piece, &mut tiles);
        }
        link(&mut tiles, threads);
        for_each_task(threads, num_groups + tiles.len(), |task| {
            if task < num_groups {
                return self.shrink_group(first + task);
            }
            // Tasks are begun in their order: what this one waits for is under way.
            while !self.is_shrunk.load(Acquire) {
                look_around(|| self.is_shrunk.load(Acquire));
            }
            // SAFETY: the rectangles are computed, and their tiles are disjoint.
            unsafe { (self.kernels.expand)(&tiles[task - num_groups]) };
        });
    }

    /// Appends a rectangle's tiles, of about so many bytes of B; notes them as done.
    fn tiles(&self, ready: &Ready, bytes: usize, tiles: &mut Vec<ExpandTile>) {
        let Target { out_features, bias, parts } = &self.targets[ready.target];
        let hidden = self.hidden.1.get();
        for part in parts {
            let LoraSegment { rows, b, scale, factors, .. } = &part.segment;
            let (start, end) = (rows.start.max(ready.rows.start), rows.end.min(ready.rows.end));
            if start >= end {
                continue;
            }
            let work = part.expand_work(end - start, ready.panels.len());
            self.progress.work_done.fetch_add(work, Relaxed);
            let panel_bytes = b.panel_bytes();
            let (at_once, panels) = if part.rows() > FEW_ROWS {
                MANY_ROWS_TILE
            } else {
                let panels = (bytes / panel_bytes).clamp(1, ready.panels.len());
                (end - start, panels.next_multiple_of(CHAINS))
            };
            for row in (start..end).step_by(at_once) {
                for panel in ready.panels.clone().step_by(panels) {
                    let column = panel * LANES;
                    let last = (ready.panels.end * LANES).min(*out_features);
                    let own_row = row - rows.start;
                    tiles.push(ExpandTile {
                        // SAFETY: the rows are within `hidden`.
                        hidden: unsafe { hidden.add(part.hidden + own_row * part.stride) },
                        hidden_stride: part.stride,
                        rows: (end - row).min(at_once),
                        b: b.data.bytes()[panel * panel_bytes..].as_ptr(),
                        form: b.form(),
                        panel_bytes,
                        rank: b.shape()[1],
                        scale: *scale,
                        factors: factors.map_or(std::ptr::null(), |f| f[column..].as_ptr()),
                        bias: bias.map_or(std::ptr::null(), |bias| bias[column..].as_ptr()),
                        // SAFETY: row and column are the output's, by the check of the segments.
                        out: unsafe { ready.out.get().add(row * out_features + column) },
                        out_features: *out_features,
                        columns: (last - column).min(panels * LANES),
                        next: std::ptr::null(),
                    });
                }
            }
        }
    }
}

/// Each tile asks for the beginning of the one that its thread will probably have next.
fn link(tiles: &mut [ExpandTile], threads: usize) {
    for index in threads..tiles.len() {
        tiles[index - threads].next = tiles[index].b;
    }
}

/// `x A^T` of a segment of many rows.
fn shrink_many(
    kernels: &Kernels,
    part: &Part<'_>,
    x: &[f32],
    in_features: usize,
    hidden: &mut [f32],
) {
    let LoraSegment { rows, a, .. } = &part.segment;
    let x = &x[rows.start * in_features..rows.end * in_features];
    let hidden = &mut hidden[part.hidden..][..part.rows() * part.stride];
    let rank = a.shape()[0];
    if rank == part.stride {
        return a.linear(kernels, x, None, hidden);
    }
    let mut dense = vec![0.0; part.rows() * rank];
    a.linear(kernels, x, None, &mut dense);
    for (to, from) in hidden.chunks_exact_mut(part.stride).zip(dense.chunks_exact(rank)) {
        to[..rank].copy_from_slice(from);
    }
}
