//! Weight matrices packed for being read straight through.
//!
//! A matrix `[out, in]` is cut into panels of sixteen output columns. Within a panel, the sixteen
//! weights of a term `k` of the sum lie side by side, so a product reads the panel once, from its
//! first byte to its last, and each read fills whole vectors:
//!
//! | form | one panel | bytes a weight |
//! |---|---|---|
//! | `F32`, `F16` | `[in][16]` | 4, 2 |
//! | `Bf16`, `Bf16Dot` | `[in / 2][16][2]`: a 32-bit lane holds two terms | 2 |
//! | `Int8` | `[in / 4][16][4]`, each plus 128; scales `[in / 64][16]` | 1.03 |
//! | `Int4` | `[in / 8][16][4]`, two terms a byte, each plus 8; scales `[in / 32][16]` | 0.56 |
//!
//! Terms are padded with zeros to whole pairs (of pairs in `Bf16Dot`) or groups, columns to whole panels.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::{bf16_rows::round, pages::Lines, quantize::RoundRow, simd::LANES, table::best};

/// How a packed matrix holds its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightForm {
    /// As they are, 32 bits.
    F32,
    /// As they are, 16 bits.
    F16,
    /// As they are, 16 bits.
    Bf16,
    /// Rounded to bf16, 16 bits, for products whose input is rounded to bf16 as well. Subnormal weights are
    /// held as zero, which is what the processor's dot products take them for.
    Bf16Dot,
    /// 8 bits, a scale for each 64 terms.
    Int8,
    /// 4 bits, a scale for each 32 terms.
    Int4,
}

impl WeightForm {
    /// Whether the form holds every weight exactly.
    #[must_use]
    pub fn is_exact(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Terms that share a scale in the quantised forms; the others have none.
    #[must_use]
    pub const fn group(self) -> usize {
        match self {
            Self::Int8 => 64,
            Self::Int4 => 32,
            Self::F32 | Self::F16 | Self::Bf16 | Self::Bf16Dot => 1,
        }
    }

    /// Whether a scale belongs to each group of weights.
    fn has_scales(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4)
    }

    /// Bytes of one weight, in a file or a panel, for the exact forms.
    pub(super) fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Bf16Dot | Self::Int8 | Self::Int4 => unreachable!("no form of a file"),
        }
    }

    fn panel_bytes(self, in_features: usize) -> usize {
        match self {
            Self::F32 => in_features.next_multiple_of(2) * LANES * 4,
            Self::F16 | Self::Bf16 => in_features.next_multiple_of(2) * LANES * 2,
            Self::Bf16Dot => in_features.next_multiple_of(4) * LANES * 2,
            Self::Int8 => in_features.next_multiple_of(self.group()) * LANES,
            Self::Int4 => in_features.next_multiple_of(self.group()) * LANES / 2,
        }
    }

    /// Place of an exact weight in its panel, in elements.
    fn place(self, term: usize, lane: usize) -> usize {
        match self {
            Self::Bf16 | Self::Bf16Dot => (term / 2 * LANES + lane) * 2 + term % 2,
            Self::F32 | Self::F16 | Self::Int8 | Self::Int4 => term * LANES + lane,
        }
    }
}

/// A weight matrix `[out, in]` in panels. The one copy of the matrix: forward and backward products,
/// lookups of rows and exact copies are all served from it.
pub struct PackedWeight {
    pub(super) form: WeightForm,
    /// What the weights were before packing.
    source: WeightForm,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    pub(super) data: Lines,
    /// bf16, `[panels][groups][16]`; empty for forms without.
    pub(super) scales: Lines,
}

impl PackedWeight {
    /// Packs `[out_features, in_features]` weights of type `source` in parallel. `read(row, bytes)`
    /// fills `bytes` with whole rows from `row` on, little endian.
    ///
    /// # Errors
    /// The first error of `read`.
    ///
    /// # Panics
    /// Where `source` is no floating point type, or `form` is another one than `source`.
    pub fn pack<E: Send>(
        form: WeightForm,
        source: WeightForm,
        [out_features, in_features]: [usize; 2],
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        assert!(
            source.is_exact() && (form == source || !form.is_exact()),
            "{source:?} as {form:?}"
        );
        let panels = out_features.div_ceil(LANES);
        let panel_bytes = form.panel_bytes(in_features);
        let scale_bytes =
            if form.has_scales() { in_features.div_ceil(form.group()) * LANES * 2 } else { 0 };
        let mut data = Lines::zeroed(panels * panel_bytes);
        let mut scales = Lines::zeroed(panels * scale_bytes);
        let row_bytes = in_features * source.element_bytes();
        let pack_panel = |panel: usize, rows: &mut Vec<u8>, to: &mut [u8], scales: &mut [u8]| {
            let first = panel * LANES;
            rows.resize((out_features - first).min(LANES) * row_bytes, 0);
            read(first, rows)?;
            for (lane, row) in rows.chunks_exact(row_bytes.max(1)).enumerate() {
                match form {
                    WeightForm::F32 => place_words::<4>(row, lane, to),
                    WeightForm::F16 => place_words::<2>(row, lane, to),
                    WeightForm::Bf16 => place_pairs(row, lane, to),
                    WeightForm::Bf16Dot => {
                        let rounded = widen(source, row).into_iter().map(round);
                        let upper = rounded.flat_map(|bits| {
                            let [_, _, low, high] = bits.to_le_bytes();
                            [low, high]
                        });
                        place_pairs(&upper.collect::<Vec<u8>>(), lane, to);
                    }
                    WeightForm::Int8 | WeightForm::Int4 => {
                        quantize_row(form, widen(source, row), lane, to, scales);
                    }
                }
            }
            if form.has_scales() {
                pad_lanes(form, in_features, rows.len() / row_bytes.max(1), to);
            }
            Ok(())
        };
        let targets = data.bytes_mut().par_chunks_mut(panel_bytes.max(1)).take(panels);
        if scale_bytes == 0 {
            targets.enumerate().try_for_each_init(Vec::new, |rows, (panel, to)| {
                pack_panel(panel, rows, to, &mut [])
            })?;
        } else {
            targets
                .zip(scales.bytes_mut().par_chunks_mut(scale_bytes))
                .enumerate()
                .try_for_each_init(Vec::new, |rows, (panel, (to, scales))| {
                    pack_panel(panel, rows, to, scales)
                })?;
        }
        Ok(Self { form, source, out_features, in_features, data, scales })
    }

    /// Packs f32 weights, for tests and benches.
    #[must_use]
    pub fn from_f32(form: WeightForm, weight: &[f32], in_features: usize) -> Self {
        let source = if form.is_exact() { form } else { WeightForm::F32 };
        let shape = [weight.len() / in_features, in_features];
        let read = |row: usize, bytes: &mut [u8]| {
            let size = source.element_bytes();
            let values = &weight[row * in_features..];
            for (to, value) in bytes.chunks_exact_mut(size).zip(values) {
                match source {
                    WeightForm::F16 => to.copy_from_slice(&f16::from_f32(*value).to_le_bytes()),
                    WeightForm::Bf16 => to.copy_from_slice(&bf16::from_f32(*value).to_le_bytes()),
                    WeightForm::F32 | WeightForm::Bf16Dot | WeightForm::Int8 | WeightForm::Int4 => {
                        to.copy_from_slice(&value.to_le_bytes());
                    }
                }
            }
            Ok::<(), std::convert::Infallible>(())
        };
        match Self::pack(form, source, shape, read) {
            Ok(packed) => packed,
            Err(never) => match never {},
        }
    }

    /// Packs f32 weights in the smallest form that holds each of them exactly.
    #[must_use]
    pub fn from_f32_exact(weight: &[f32], in_features: usize) -> Self {
        let halves = |value: &f32| f16::from_f32(*value).to_f32().to_bits() == value.to_bits();
        let form = if weight.iter().all(|value| value.to_bits() & 0xFFFF == 0) {
            WeightForm::Bf16
        } else if weight.iter().all(halves) {
            WeightForm::F16
        } else {
            WeightForm::F32
        };
        Self::from_f32(form, weight, in_features)
    }

    /// How the weights are held.
    #[must_use]
    pub fn form(&self) -> WeightForm {
        self.form
    }

    /// What the weights were before packing.
    #[must_use]
    pub fn source(&self) -> WeightForm {
        self.source
    }

    /// Rows and columns: output and input features.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.out_features, self.in_features]
    }

    /// Bytes in memory, with padding and scales.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.data.bytes().len() + self.scales.bytes().len()
    }

    pub(super) fn panel_bytes(&self) -> usize {
        self.form.panel_bytes(self.in_features)
    }

    pub(super) fn groups(&self) -> usize {
        self.in_features.div_ceil(self.form.group())
    }

    /// One weight.
    pub(super) fn value(&self, row: usize, term: usize) -> f32 {
        let (panel, lane) = (row / LANES, row % LANES);
        let panel_data = &self.data.bytes()[panel * self.panel_bytes()..][..self.panel_bytes()];
        let two = |at: usize| [panel_data[at * 2], panel_data[at * 2 + 1]];
        let at = self.form.place(term, lane);
        match self.form {
            WeightForm::F32 => {
                f32::from_le_bytes([0, 1, 2, 3].map(|byte| panel_data[at * 4 + byte]))
            }
            WeightForm::F16 => f16::from_le_bytes(two(at)).to_f32(),
            WeightForm::Bf16 | WeightForm::Bf16Dot => bf16::from_le_bytes(two(at)).to_f32(),
            WeightForm::Int8 => {
                let byte = panel_data[(term / 4 * LANES + lane) * 4 + term % 4];
                self.scale(panel, term / self.form.group(), lane) * (f32::from(byte) - 128.0)
            }
            WeightForm::Int4 => {
                let byte = panel_data[(term / 8 * LANES + lane) * 4 + term % 4];
                let nibble = if term % 8 < 4 { byte & 15 } else { byte >> 4 };
                self.scale(panel, term / self.form.group(), lane) * (f32::from(nibble) - 8.0)
            }
        }
    }

    fn scale(&self, panel: usize, group: usize, lane: usize) -> f32 {
        let at = ((panel * self.groups() + group) * LANES + lane) * 2;
        bf16::from_le_bytes([self.scales.bytes()[at], self.scales.bytes()[at + 1]]).to_f32()
    }

    /// A row as f32, `in_features` long.
    ///
    /// # Panics
    /// Where there is no such row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.out_features && out.len() == self.in_features, "row {row}");
        for (term, value) in out.iter_mut().enumerate() {
            *value = self.value(row, term);
        }
    }

    /// The rows as bytes of the source's type, little endian: exactly what was packed where the form
    /// is exact, the nearest that is left of it otherwise.
    #[must_use]
    pub fn unpack(&self) -> Vec<u8> {
        self.unpack_rows(0..self.out_features)
    }

    /// Some of the rows as [`unpack`](Self::unpack) gives them.
    ///
    /// # Panics
    /// Where there are no such rows.
    #[must_use]
    pub fn unpack_rows(&self, rows: Range<usize>) -> Vec<u8> {
        assert!(rows.end <= self.out_features, "rows {rows:?} of {}", self.out_features);
        let size = self.source.element_bytes();
        let mut bytes = vec![0; rows.len() * self.in_features * size];
        let first = rows.start;
        let rows = bytes.par_chunks_mut((self.in_features * size).max(1)).enumerate();
        rows.for_each(|(row, bytes)| {
            let row = first + row;
            if self.form.is_exact() {
                let panel = &self.data.bytes()[row / LANES * self.panel_bytes()..];
                for (term, to) in bytes.chunks_exact_mut(size).enumerate() {
                    let at = self.form.place(term, row % LANES) * size;
                    to.copy_from_slice(&panel[at..at + size]);
                }
                return;
            }
            for (term, to) in bytes.chunks_exact_mut(size).enumerate() {
                let value = self.value(row, term);
                match self.source {
                    WeightForm::F16 => to.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                    WeightForm::Bf16 => to.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                    WeightForm::F32 | WeightForm::Bf16Dot | WeightForm::Int8 | WeightForm::Int4 => {
                        to.copy_from_slice(&value.to_le_bytes());
                    }
                }
            }
        });
        bytes
    }
}

/// Puts a row's elements of `SIZE` bytes into its lane.
fn place_words<const SIZE: usize>(row: &[u8], lane: usize, panel: &mut [u8]) {
    let steps = panel.chunks_exact_mut(LANES * SIZE);
    for (from, step) in row.chunks_exact(SIZE).zip(steps) {
        step[lane * SIZE..(lane + 1) * SIZE].copy_from_slice(from);
    }
}

/// Puts a row of 16-bit elements into its lane, two terms at a time.
fn place_pairs(row: &[u8], lane: usize, panel: &mut [u8]) {
    let mut pairs = row.chunks_exact(4);
    let mut steps = panel.chunks_exact_mut(LANES * 4);
    for (from, step) in (&mut pairs).zip(&mut steps) {
        step[lane * 4..lane * 4 + 4].copy_from_slice(from);
    }
    if let ([low, high], Some(step)) = (pairs.remainder(), steps.next()) {
        step[lane * 4..lane * 4 + 2].copy_from_slice(&[*low, *high]);
    }
}

fn widen(source: WeightForm, row: &[u8]) -> Vec<f32> {
    let pairs = || row.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    match source {
        WeightForm::F16 => pairs().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
        WeightForm::Bf16 => pairs().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        WeightForm::F32 | WeightForm::Bf16Dot | WeightForm::Int8 | WeightForm::Int4 => row
            .chunks_exact(4)
            .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect(),
    }
}

/// Quantises a row group by group into its lane.
fn quantize_row(
    form: WeightForm,
    mut values: Vec<f32>,
    lane: usize,
    panel: &mut [u8],
    scales: &mut [u8],
) {
    values.resize(values.len().next_multiple_of(form.group()), 0.0);
    let mut quants = vec![0; values.len()];
    let mut scale_of = vec![bf16::ZERO; values.len() / form.group()];
    let row = RoundRow { values: &values, quants: &mut quants, scales: &mut scale_of };
    let round = if form == WeightForm::Int4 { best().round_int4 } else { best().round_int8 };
    // SAFETY: the table's functions are for this CPU.
    unsafe { round(row) };
    for (group, (quants, scale)) in quants.chunks_exact(form.group()).zip(scale_of).enumerate() {
        let at = (group * LANES + lane) * 2;
        scales[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        place_quants(form, group, lane, quants, panel);
    }
}

/// Puts a group's integers, offset to be positive, into its lane.
fn place_quants(form: WeightForm, group: usize, lane: usize, quants: &[i8], panel: &mut [u8]) {
    if form == WeightForm::Int4 {
        for (index, eight) in quants.chunks_exact(8).enumerate() {
            let at = ((group * (form.group() / 8) + index) * LANES + lane) * 4;
            for byte in 0..4 {
                let [low, high] = [eight[byte], eight[byte + 4]].map(|q| (q + 8).cast_unsigned());
                panel[at + byte] = low | high << 4;
            }
        }
    } else {
        for (index, four) in quants.chunks_exact(4).enumerate() {
            let at = ((group * (form.group() / 4) + index) * LANES + lane) * 4;
            for byte in 0..4 {
                panel[at + byte] = four[byte].cast_unsigned() ^ 0x80;
            }
        }
    }
}

/// Zeros, offset alike, in the lanes that the last panel has no rows for.
fn pad_lanes(form: WeightForm, in_features: usize, rows: usize, panel: &mut [u8]) {
    for lane in rows..LANES {
        for group in 0..in_features.div_ceil(form.group()) {
            place_quants(form, group, lane, &vec![0; form.group()], panel);
        }
    }
}
