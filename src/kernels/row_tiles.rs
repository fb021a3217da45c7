//! The left side of a product: rows as they are, or laid out for a register tile.
//!
//! A product of many rows reads the rows of one tile side by side, `[terms][rows of the tile]`, so that
//! its factors come from one stream. Turning the rows into that is worth it where many columns use it.

#![allow(clippy::needless_range_loop, reason = "vectors are indexed")]

use std::cell::Cell;

use super::{
    Kernels,
    simd::{LANES, Simd, load_partial, store_partial},
    threads::{Shared, for_each_range},
};

/// Products with so few columns read rows as they are, however many there are.
const FEW_COLUMNS: usize = 2 * LANES;
/// Elements of tiled rows that a thread may keep.
const MAX_KEPT: usize = 4 << 20;

thread_local! {
    /// Memory for tiled rows, kept for the next product of the thread.
    static TILED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// The rows of `x` as the product reads them: up to `few_rows` as they are; more in tiles of
/// `row_tile` rows, `[terms][rows of the tile]`, the last tile as high as it needs to be.
#[derive(Clone, Copy)]
pub(super) struct RowTiles {
    pub(super) base: *const f32,
    pub(super) terms: usize,
    pub(super) is_tiled: bool,
}

// SAFETY: it is only read, and lives no longer than the rows that it was made of.
unsafe impl Send for RowTiles {}
// SAFETY: as above.
unsafe impl Sync for RowTiles {}

/// Heights of register tiles: the least that holds `rows`.
pub(super) fn tile_height(rows: usize, greatest: usize) -> usize {
    [1, 2, 4, 8].into_iter().find(|height| *height >= rows).unwrap_or(greatest).min(greatest)
}

/// Calls `body` with the tiles of `x [rows, terms]` for a product of so many columns.
pub(super) fn with_row_tiles(
    kernels: &Kernels,
    x: &[f32],
    (terms, columns): (usize, usize),
    body: impl FnOnce(RowTiles),
) {
    let (rows, tile) = (x.len() / terms.max(1), kernels.row_tile);
    if rows <= kernels.few_rows || columns <= FEW_COLUMNS {
        return body(RowTiles { base: x.as_ptr(), terms, is_tiled: false });
    }
    // Taken, not borrowed: while this thread waits for others, it may run another product.
    let mut tiled = TILED.take();
    let full = rows / tile * tile;
    let length = (full + tile_height(rows - full, tile)) * terms;
    if tiled.len() < length {
        tiled.resize(length, 0.0);
    }
    let shared = Shared(tiled.as_mut_ptr());
    for_each_range(rows.div_ceil(tile), 1, tile * terms / 2, |tiles| {
        for index in tiles {
            let start = index * tile;
            let count = (rows - start).min(tile);
            let height = if count == tile { tile } else { tile_height(count, tile) };
            // SAFETY: each tile has its own part of `tiled`, which `length` covers.
            let to = unsafe {
                std::slice::from_raw_parts_mut(shared.get().add(start * terms), height * terms)
            };
            let rows = &x[start * terms..(start + count) * terms];
            // SAFETY: `to` is `terms` times `height`, of which `rows` has at most that many.
            unsafe { (kernels.tile_rows)(TileRows { rows, terms, height, to }) };
        }
    });
    body(RowTiles { base: tiled.as_ptr(), terms, is_tiled: true });
    if tiled.len() <= MAX_KEPT {
        TILED.set(tiled);
    }
}

/// The rows of one tile, and where they go.
pub(super) struct TileRows<'a> {
    /// `[count][terms]`
    rows: &'a [f32],
    terms: usize,
    height: usize,
    /// `[terms][height]`; zero where there is no row.
    to: &'a mut [f32],
}

/// # Safety
/// There are at most `height` <= 16 rows, `to` is `terms * height` long, and the CPU has the features of
/// `S`.
#[inline(always)]
pub(super) unsafe fn tile_rows<S: Simd>(job: TileRows<'_>) {
    let TileRows { rows, terms, height, to } = job;
    let count = rows.len() / terms;
    for first in (0..terms).step_by(LANES) {
        let lanes = (terms - first).min(LANES);
        // SAFETY: row `i` has `lanes` terms from `first` on; a store that would reach beyond `to` is cut
        // short, and one that reaches into the next term is overwritten by it.
        unsafe {
            let mut square = [S::splat(0.0); LANES];
            for i in 0..count {
                let from = rows.as_ptr().add(i * terms + first);
                square[i] =
                    if lanes == LANES { S::load(from) } else { load_partial::<S>(from, lanes) };
            }
            for (lane, column) in S::transpose(square).into_iter().take(lanes).enumerate() {
                let at = (first + lane) * height;
                let place = to.as_mut_ptr().add(at);
                if at + LANES <= to.len() {
                    S::store(place, column);
                } else {
                    store_partial::<S>(place, column, height);
                }
            }
        }
    }
}
