//! How keys and values lie in memory: the blocks of a cache, in f32, bf16 or int8.
//!
//! A head's block of sixteen keys is `[head_dim][16]`, of sixteen values `[16][padded_dim]`. In int8,
//! sixteen scales (f32) come before it, one for each position: `value = scale * integer`, where `scale`
//! is the greatest magnitude of that token's head / 127. What a row becomes depends on that row alone.

use std::slice;

use half::bf16;

use super::AttentionShape;
use crate::kernels::{
    simd::{LANES, Simd},
    threads::{Shared, for_each_range},
};

/// Bytes of a block's scales in int8.
const SCALE_BYTES: usize = LANES * size_of::<f32>();
/// The greatest integer.
const GREATEST: f32 = 127.0;
/// Multiply-adds that an element on its way into a panel is worth.
const WORK: usize = 4;

/// How the elements of keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvForm {
    /// As computed.
    F32,
    /// Rounded to nearest, ties to even.
    Bf16,
    /// Integers with a scale for each token and head.
    Int8,
}

/// Keys are transposed within a block, values are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvSide {
    /// Keys.
    Keys,
    /// Values.
    Values,
}

/// All blocks of the keys, or of the values, of one layer: `[blocks][kv_heads]` of what this file says.
#[derive(Clone, Copy)]
pub enum KvPanel<'a> {
    /// See [`KvForm::F32`].
    F32(&'a [f32]),
    /// See [`KvForm::Bf16`].
    Bf16(&'a [bf16]),
    /// See [`KvForm::Int8`]; scales and integers as bytes.
    Int8(&'a [u8]),
}

/// The same to be written.
pub enum KvPanelMut<'a> {
    /// See [`KvForm::F32`].
    F32(&'a mut [f32]),
    /// See [`KvForm::Bf16`].
    Bf16(&'a mut [bf16]),
    /// See [`KvForm::Int8`]; scales and integers as bytes.
    Int8(&'a mut [u8]),
}

/// All blocks of keys and of values of one layer.
#[derive(Clone, Copy)]
pub struct KvPanels<'a> {
    /// The keys.
    pub keys: KvPanel<'a>,
    /// The values, in the same form.
    pub values: KvPanel<'a>,
}

/// An element of a panel.
pub(in crate::kernels) trait KvElement: Copy + 'static {
    /// Elements that a head's block has before its data: its scales, if it has any.
    const SCALES: usize;
    /// # Safety
    /// `from` is valid for sixteen elements; the CPU has the features of `S`.
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
}

impl KvElement for f32 {
    const SCALES: usize = 0;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: by contract.
        unsafe { S::load(from) }
    }
}

impl KvElement for bf16 {
    const SCALES: usize = 0;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: by contract.
        unsafe { S::load_bf16(from) }
    }
}

impl KvElement for i8 {
    const SCALES: usize = SCALE_BYTES;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: by contract.
        unsafe { S::load_int8(from) }
    }
}

impl KvForm {
    /// Elements (bytes, of int8) of one block over all key heads.
    #[must_use]
    pub fn block_len(self, shape: &AttentionShape, side: KvSide) -> usize {
        let scales = match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Int8 => SCALE_BYTES,
        };
        let rows = match side {
            KvSide::Keys => shape.head_dim,
            KvSide::Values => shape.padded_dim(),
        };
        shape.kv_heads * (rows * LANES + scales)
    }

    /// Bytes of one element.
    #[must_use]
    pub fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }
}

impl KvPanel<'_> {
    /// The form of its elements, how many there are, and where.
    fn parts(&self) -> (KvForm, usize, *const u8) {
        match self {
            Self::F32(panel) => (KvForm::F32, panel.len(), panel.as_ptr().cast()),
            Self::Bf16(panel) => (KvForm::Bf16, panel.len(), panel.as_ptr().cast()),
            Self::Int8(panel) => (KvForm::Int8, panel.len(), panel.as_ptr()),
        }
    }
}

impl KvPanelMut<'_> {
    /// Positions that there is room for.
    #[must_use]
    pub fn capacity(&self, shape: &AttentionShape, side: KvSide) -> usize {
        let (form, len) = match self {
            Self::F32(panel) => (KvForm::F32, panel.len()),
            Self::Bf16(panel) => (KvForm::Bf16, panel.len()),
            Self::Int8(panel) => (KvForm::Int8, panel.len()),
        };
        len / form.block_len(shape, side) * LANES
    }
}

impl KvPanels<'_> {
    /// Blocks of the keys.
    pub(super) fn num_blocks(&self, shape: &AttentionShape) -> usize {
        let (form, len, _) = self.keys.parts();
        len / form.block_len(shape, KvSide::Keys)
    }

    /// The common form, after a check that there are as many values as keys.
    pub(super) fn form(&self, shape: &AttentionShape) -> KvForm {
        let ((form, ..), (values_form, values_len, _)) = (self.keys.parts(), self.values.parts());
        assert_eq!(form, values_form, "keys and values differ in form");
        let needed = self.num_blocks(shape) * form.block_len(shape, KvSide::Values);
        assert!(values_len >= needed, "fewer blocks of values than of keys");
        form
    }

    /// Where the elements of keys and values begin.
    pub(super) fn addresses(&self) -> (*const u8, *const u8) {
        (self.keys.parts().2, self.values.parts().2)
    }
}

impl AttentionShape {
    /// Writes rows `[slots.len(), kv_heads * head_dim]` of keys or values to their slots
    /// (block * 16 + position in the block) of a panel.
    ///
    /// # Panics
    /// Where a slot lies past the panel.
    pub fn write(&self, side: KvSide, rows: &[f32], slots: &[u32], panel: KvPanelMut<'_>) {
        let rows = Rows { shape: self, side, rows, slots };
        match panel {
            KvPanelMut::F32(panel) => rows.write(KvForm::F32, panel, |values, head, lane| {
                rows.place(values, head, lane, |value| value);
            }),
            KvPanelMut::Bf16(panel) => rows.write(KvForm::Bf16, panel, |values, head, lane| {
                rows.place(values, head, lane, bf16::from_f32);
            }),
            KvPanelMut::Int8(panel) => rows.write(KvForm::Int8, panel, |values, head, lane| {
                let greatest = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
                let inverse = if greatest > 0.0 { GREATEST / greatest } else { 0.0 };
                let (scales, integers) = head.split_at_mut(SCALE_BYTES);
                scales[lane * size_of::<f32>()..][..size_of::<f32>()]
                    .copy_from_slice(&(greatest / GREATEST).to_ne_bytes());
                #[allow(clippy::cast_possible_truncation)]
                let round = |value: f32| (value * inverse).round_ties_even() as i8;
                rows.place(values, integers, lane, |value| round(value).cast_unsigned());
            }),
        }
    }
}

/// Rows on their way into a panel.
struct Rows<'a> {
    shape: &'a AttentionShape,
    side: KvSide,
    /// `[slots.len(), kv_heads * head_dim]`
    rows: &'a [f32],
    slots: &'a [u32],
}

impl Rows<'_> {
    /// Calls `place(head's values, head's block, position in it)` for each head of each row. Threads share out
    /// the heads.
    fn write<T: Send>(
        &self,
        form: KvForm,
        panel: &mut [T],
        place: impl Fn(&[f32], &mut [T], usize) + Send + Sync,
    ) {
        let AttentionShape { kv_heads, head_dim, .. } = *self.shape;
        let record = form.block_len(self.shape, self.side) / kv_heads;
        let num_blocks = panel.len() / (kv_heads * record);
        let inside = |slot: &u32| (*slot as usize) < num_blocks * LANES;
        assert!(self.slots.iter().all(inside), "slot past the panel");
        let shared = Shared(panel.as_mut_ptr());
        for_each_range(kv_heads, 1, self.slots.len() * head_dim * WORK, |heads| {
            for (row, slot) in self.rows.chunks_exact(kv_heads * head_dim).zip(self.slots) {
                let (block, lane) = (*slot as usize / LANES, *slot as usize % LANES);
                for head in heads.clone() {
                    let start = (block * kv_heads + head) * record;
                    // SAFETY: the block lies within the panel, as checked above, and this head's part of every
                    // block is this task's.
                    let to = unsafe { slice::from_raw_parts_mut(shared.get().add(start), record) };
                    place(&row[head * head_dim..][..head_dim], to, lane);
                }
            }
        });
    }

    /// Writes a head's values to position `lane` of its block, without its scales.
    fn place<T>(&self, values: &[f32], to: &mut [T], lane: usize, round: impl Fn(f32) -> T) {
        match self.side {
            KvSide::Keys => {
                for (to, value) in to[lane..].iter_mut().step_by(LANES).zip(values) {
                    *to = round(*value);
                }
            }
            KvSide::Values => {
                let start = lane * self.shape.padded_dim();
                for (to, value) in to[start..start + values.len()].iter_mut().zip(values) {
                    *to = round(*value);
                }
            }
        }
    }
}
