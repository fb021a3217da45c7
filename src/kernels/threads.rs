//! Splitting work over the threads of the pool.

use std::ops::Range;

use super::{pool::for_each_task, simd::LANES};

/// Work below this many multiply-adds, a few microseconds of one thread, is not worth sharing.
pub(super) const MIN_PARALLEL_WORK: usize = 128 * 1024;
/// Pieces of work for each thread: one that is held up does not hold up the others.
const PIECES: usize = 8;

/// Threads that may share work: those of the caller's pool.
pub(super) fn num_threads() -> usize {
    rayon::current_num_threads()
}

/// Calls `body` on consecutive ranges that cover `0..count`, in parallel where `count * work_each`
/// (in multiply-adds) is worth it. Ranges start at multiples of `grain`.
pub fn for_each_range(
    count: usize,
    grain: usize,
    work_each: usize,
    body: impl Fn(Range<usize>) + Send + Sync,
) {
    let threads = num_threads();
    if threads == 1 || count.saturating_mul(work_each) < MIN_PARALLEL_WORK || count <= grain {
        return body(0..count);
    }
    let piece = count.div_ceil(threads * PIECES).max(1).next_multiple_of(grain);
    for_each_task(threads, count.div_ceil(piece), |index| {
        body(index * piece..((index + 1) * piece).min(count));
    });
}

/// Rows that share a pass over the weights; a multiple of every row tile.
pub(super) const ROW_BLOCK: usize = 96;
/// Panels of a task that has many rows.
const TASK_PANELS: usize = 16;

/// Cuts a product's output `[rows, columns]` into rectangles and calls `body(rows, panels)` on each, in
/// parallel where `rows * columns * work_each` is worth it. Few rows are not cut; row ranges start at
/// multiples of `row_tile`. The rectangles have no part in the order of any sum.
pub(super) fn for_each_tile(
    rows: usize,
    columns: usize,
    work_each: usize,
    row_tile: usize,
    body: impl Fn(Range<usize>, Range<usize>) + Send + Sync,
) {
    debug_assert_eq!(ROW_BLOCK % row_tile, 0);
    let panels = columns.div_ceil(LANES);
    if rows <= ROW_BLOCK {
        // A few rows are done in little more time than one: the weights have to come by anyway.
        let work_each = rows.div_ceil(8) * work_each * LANES;
        return for_each_range(panels, 4, work_each, |panels| body(0..rows, panels));
    }
    let row_blocks = rows.div_ceil(ROW_BLOCK);
    let panel_blocks = panels.div_ceil(TASK_PANELS);
    for_each_range(row_blocks * panel_blocks, 1, MIN_PARALLEL_WORK, |tasks| {
        for task in tasks {
            let row = task / panel_blocks * ROW_BLOCK;
            let panel = task % panel_blocks * TASK_PANELS;
            let row_end = (row + ROW_BLOCK).min(rows);
            body(row..row_end, panel..(panel + TASK_PANELS).min(panels));
        }
    });
}

/// Keeps candle's own pool, which serves a few element-wise operations, to the calling thread: it
/// would spin on every core of the host. Ours is rayon's, which honours affinity and cgroups.
///
/// Must be the first thing that the program does: the environment is not thread-safe.
pub fn claim_threads() {
    // SAFETY: called from `main` before any other thread exists.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
}

/// A pointer that may cross threads: its users write disjoint elements.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);

// SAFETY: every user of `Shared` states why the elements that its threads write are disjoint.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The pointer. A method, so that closures capture the whole wrapper.
    pub(super) fn get(&self) -> *mut T {
        self.0
    }
}

/// Calls `body(first_row, rows)` on pieces of `data`, rows of `width`, in parallel where
/// `work_each` (multiply-adds a row) makes it worth it.
pub fn for_each_rows<T: Send>(
    data: &mut [T],
    width: usize,
    work_each: usize,
    body: impl Fn(usize, &mut [T]) + Send + Sync,
) {
    for_each_rows_of_two(
        data,
        &mut vec![(); data_rows(data.len(), width)],
        (width, 1),
        work_each,
        |row, rows, _| {
            body(row, rows);
        },
    );
}

/// As [`for_each_rows`], over two outputs of equally many rows at once.
pub fn for_each_rows_of_two<A: Send, B: Send>(
    first: &mut [A],
    second: &mut [B],
    (first_width, second_width): (usize, usize),
    work_each: usize,
    body: impl Fn(usize, &mut [A], &mut [B]) + Send + Sync,
) {
    let rows = data_rows(first.len(), first_width);
    assert!(second.len() >= rows * second_width, "the second output has fewer rows");
    let shared = (Shared(first.as_mut_ptr()), Shared(second.as_mut_ptr()));
    for_each_range(rows, 1, work_each, |rows| {
        // SAFETY: both outputs have these rows, and no other task has them.
        let (first, second) = unsafe {
            let start = (rows.start * first_width, rows.start * second_width);
            (
                std::slice::from_raw_parts_mut(
                    shared.0.get().add(start.0),
                    rows.len() * first_width,
                ),
                std::slice::from_raw_parts_mut(
                    shared.1.get().add(start.1),
                    rows.len() * second_width,
                ),
            )
        };
        body(rows.start, first, second);
    });
}

fn data_rows(length: usize, width: usize) -> usize {
    debug_assert_eq!(length % width.max(1), 0);
    length / width.max(1)
}
