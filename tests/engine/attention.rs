//! The attention kernels of every instruction set against the textbook: windows, soft caps, every form
//! of keys and values, and results that do not depend on how a sequence is cut.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

use std::ops::Range;

use crate::KV_FORMS;
use half::bf16;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith::kernels::{
    AttentionBackward, AttentionForward, AttentionShape, Kernels, KvForm, KvPanel, KvPanelMut,
    KvPanels, KvSide, LANES, QuerySpan, all,
};

fn random(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

/// The greatest difference, relative to the greatest magnitude.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let scale = a.iter().chain(b).fold(1e-6_f32, |max, value| max.max(value.abs()));
    a.iter().zip(b).fold(0.0_f32, |max, (a, b)| max.max((a - b).abs())) / scale
}

fn shapes() -> impl Strategy<Value = AttentionShape> {
    let window = prop::option::of(1_usize..40);
    let soft_cap = prop::option::of(0.2_f32..3.0);
    (1_usize..10, 1_usize..3, 1_usize..20, window, soft_cap).prop_map(
        |(group, kv_heads, half_dim, window, soft_cap)| AttentionShape {
            heads: group * kv_heads,
            kv_heads,
            head_dim: half_dim * 2,
            scale: 0.3,
            window,
            soft_cap,
        },
    )
}

/// Keys and values of one layer in one form.
enum Store {
    F32([Vec<f32>; 2]),
    Bf16([Vec<bf16>; 2]),
    Int8([Vec<u8>; 2]),
}

impl Store {
    fn new(form: KvForm, shape: &AttentionShape, blocks: usize) -> Self {
        let len = |side| blocks * form.block_len(shape, side);
        let lens = [len(KvSide::Keys), len(KvSide::Values)];
        match form {
            KvForm::F32 => Self::F32(lens.map(|len| vec![0.0; len])),
            KvForm::Bf16 => Self::Bf16(lens.map(|len| vec![bf16::ZERO; len])),
            KvForm::Int8 => Self::Int8(lens.map(|len| vec![0; len])),
        }
    }

    fn write(&mut self, shape: &AttentionShape, slots: &[u32], keys: &[f32], values: &[f32]) {
        for (index, (side, rows)) in
            [(KvSide::Keys, keys), (KvSide::Values, values)].into_iter().enumerate()
        {
            let panel = match self {
                Self::F32(panels) => KvPanelMut::F32(&mut panels[index]),
                Self::Bf16(panels) => KvPanelMut::Bf16(&mut panels[index]),
                Self::Int8(panels) => KvPanelMut::Int8(&mut panels[index]),
            };
            shape.write(side, rows, slots, panel);
        }
    }

    fn panels(&self) -> KvPanels<'_> {
        let panel = |index: usize| match self {
            Self::F32(panels) => KvPanel::F32(&panels[index]),
            Self::Bf16(panels) => KvPanel::Bf16(&panels[index]),
            Self::Int8(panels) => KvPanel::Int8(&panels[index]),
        };
        KvPanels { keys: panel(0), values: panel(1) }
    }
}

/// The blocks of each sequence, handed out back to front, so that a kernel that ignores the table is
/// caught.
fn block_tables(sequences: &[Range<usize>]) -> Vec<Vec<u32>> {
    let mut next: usize = sequences.iter().map(|range| range.len().div_ceil(LANES)).sum();
    let mut block = || {
        next -= 1;
        next as u32
    };
    sequences
        .iter()
        .map(|range| (0..range.len().div_ceil(LANES)).map(|_| block()).collect())
        .collect()
}

/// Attention over a cache in which everything is written, `chunk` rows of a sequence at a time.
fn paged(
    table: &Kernels,
    shape: &AttentionShape,
    (q, k, v): (&[f32], &[f32], &[f32]),
    sequences: &[Range<usize>],
    (form, chunk): (KvForm, usize),
) -> Vec<f32> {
    let tables = block_tables(sequences);
    let slots: Vec<u32> = sequences
        .iter()
        .zip(&tables)
        .flat_map(|(range, blocks)| {
            (0..range.len()).map(|at| blocks[at / LANES] * LANES as u32 + (at % LANES) as u32)
        })
        .collect();
    let mut store = Store::new(form, shape, tables.iter().map(Vec::len).sum());
    store.write(shape, &slots, k, v);
    let mut out = vec![0.0; q.len()];
    let longest = sequences.iter().map(ExactSizeIterator::len).max().unwrap();
    for start in (0..longest).step_by(chunk) {
        // One batch of the next chunk of every sequence that has one.
        let width = shape.heads * shape.head_dim;
        let (mut queries, mut spans, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (range, block_table) in sequences.iter().zip(&tables) {
            let rows =
                range.start + start.min(range.len())..(range.start + start + chunk).min(range.end);
            if rows.is_empty() {
                continue;
            }
            let first = queries.len() / width;
            queries.extend_from_slice(&q[rows.start * width..rows.end * width]);
            spans.push(QuerySpan {
                rows: first..first + rows.len(),
                first_position: start,
                block_table,
            });
            places.push(rows);
        }
        let mut part = vec![0.0; queries.len()];
        let panels = store.panels();
        AttentionForward { shape: *shape, panels, queries: &queries, spans: &spans }
            .run(table, &mut part);
        for (span, rows) in spans.iter().zip(places) {
            out[rows.start * width..rows.end * width]
                .copy_from_slice(&part[span.rows.start * width..span.rows.end * width]);
        }
    }
    out
}

fn textbook(
    shape: &AttentionShape,
    (q, k, v): (&[f32], &[f32], &[f32]),
    sequences: &[Range<usize>],
) -> Vec<f32> {
    let AttentionShape { heads, kv_heads, head_dim, scale, window, soft_cap } = *shape;
    let mut out = vec![0.0_f32; q.len()];
    for range in sequences {
        for row in range.clone() {
            let first = window
                .map_or(range.start, |window| range.start.max((row + 1).saturating_sub(window)));
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let at = (row * heads + head) * head_dim;
                let key = |j: usize| (j * kv_heads + kv) * head_dim;
                let score = |j: usize| -> f64 {
                    let dot =
                        (0..head_dim).map(|d| f64::from(q[at + d]) * f64::from(k[key(j) + d]));
                    let score = dot.sum::<f64>() * f64::from(scale);
                    soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                };
                let greatest = (first..=row).map(score).fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> =
                    (first..=row).map(|j| (score(j) - greatest).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let mixed = (first..=row)
                        .zip(&weights)
                        .map(|(j, weight)| weight * f64::from(v[key(j) + d]))
                        .sum::<f64>();
                    out[at + d] = (mixed / sum) as f32;
                }
            }
        }
    }
    out
}

/// Sequences one after the other.
fn ranges(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut start = 0;
    let range = |length: &usize| {
        start += length;
        start - length..start
    };
    lengths.iter().map(range).collect()
}

/// The analytic gradient along a random direction against the difference quotient.
fn check_slope(
    shape: &AttentionShape,
    inputs: [&[f32]; 3],
    grad: &[f32],
    sequences: &[Range<usize>],
    grads: &[Vec<f32>; 3],
) {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let directions = inputs.map(|input| random(&mut rng, input.len()));
    let step = 1e-2_f32;
    let value = |sign: f32| -> f64 {
        let moved: Vec<Vec<f32>> = inputs
            .iter()
            .zip(&directions)
            .map(|(input, direction)| {
                input.iter().zip(direction).map(|(x, d)| x + sign * step * d).collect()
            })
            .collect();
        let out = textbook(shape, (&moved[0], &moved[1], &moved[2]), sequences);
        out.iter().zip(grad).map(|(out, grad)| f64::from(*out) * f64::from(*grad)).sum()
    };
    let numeric = (value(1.0) - value(-1.0)) / f64::from(2.0 * step);
    let analytic: f64 = grads
        .iter()
        .zip(&directions)
        .flat_map(|(grad, direction)| grad.iter().zip(direction))
        .map(|(grad, direction)| f64::from(*grad) * f64::from(*direction))
        .sum();
    let size: f64 = grads.iter().flatten().map(|grad| f64::from(*grad).powi(2)).sum::<f64>().sqrt();
    assert!((numeric - analytic).abs() < 2e-2 * size.max(0.1), "{numeric} against {analytic}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn attention_agrees_with_the_textbook_forwards_and_backwards(
        lengths in prop::collection::vec(1_usize..50, 1..4), shape in shapes(), seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rows: usize = lengths.iter().sum();
        let q = random(&mut rng, rows * shape.heads * shape.head_dim);
        let [k, v] = [(); 2].map(|()| random(&mut rng, rows * shape.kv_heads * shape.head_dim));
        let grad = random(&mut rng, q.len());
        let sequences = ranges(&lengths);
        let expected = textbook(&shape, (&q, &k, &v), &sequences);
        for table in all() {
            let out = paged(table, &shape, (&q, &k, &v), &sequences, (KvForm::F32, rows));
            prop_assert!(difference(&out, &expected) < 1e-5, "{}", table.name);
            let mut grads = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]];
            let [grad_q, grad_k, grad_v] = &mut grads;
            AttentionBackward {
                shape, queries: &q, keys: &k, values: &v, out: &out, grad_out: &grad,
                sequences: &sequences,
            }
            .run(table, (grad_q, grad_k, grad_v));
            check_slope(&shape, [&q, &k, &v], &grad, &sequences, &grads);
        }
    }

    #[test]
    fn neither_chunks_nor_neighbours_change_a_bit_in_any_form(
        lengths in prop::collection::vec(1_usize..80, 1..4), chunk in 1_usize..40, shape in shapes(),
        seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rows: usize = lengths.iter().sum();
        let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let q = random(&mut rng, rows * wide);
        let [k, v] = [(); 2].map(|()| random(&mut rng, rows * narrow));
        let sequences = ranges(&lengths);
        let exact = textbook(&shape, (&q, &k, &v), &sequences);
        for table in all() {
            for (form, bound) in KV_FORMS.into_iter().zip([1e-5, 2e-2, 3e-2]) {
                let whole = paged(table, &shape, (&q, &k, &v), &sequences, (form, rows));
                let chunked = paged(table, &shape, (&q, &k, &v), &sequences, (form, chunk));
                prop_assert!(chunked == whole, "{}, {form:?}", table.name);
                prop_assert!(difference(&whole, &exact) < bound, "{}, {form:?}", table.name);
                let first = sequences[0].clone();
                let parts = (&q[..first.end * wide], &k[..first.end * narrow], &v[..first.end * narrow]);
                let alone = paged(table, &shape, parts, &[first], (form, rows));
                prop_assert!(alone[..] == whole[..alone.len()], "{}, {form:?}", table.name);
            }
        }
    }

    #[test]
    fn hyperbolic_tangents_are_exact_to_a_few_bits(x in prop::collection::vec(-30.0_f32..30.0, 1..40)) {
        let gelu = |g: f64| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3));
            0.5 * g * (1.0 + inner.tanh())
        };
        let ones = vec![1.0; x.len()];
        for table in all() {
            let mut capped = x.clone();
            table.soft_cap(&mut capped, 8.0);
            let mut gated = vec![0.0; x.len()];
            table.gelu_mul(&x, &ones, &mut gated);
            for ((x, capped), gated) in x.iter().zip(capped).zip(gated) {
                let x = f64::from(*x);
                let expected = 8.0 * (x / 8.0).tanh();
                let far = (f64::from(capped) - expected).abs();
                prop_assert!(far <= 1e-6 * expected.abs(), "{}: {x}: {capped}", table.name);
                let far = (f64::from(gated) - gelu(x)).abs();
                prop_assert!(far <= 1e-6 * x.abs().max(1.0), "{}: {x}: {gated}", table.name);
            }
        }
    }
}

#[test]
fn scores_that_no_float_can_exponentiate_are_probabilities_all_the_same() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    // Scores of some hundreds, of either sign.
    let shape = AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 20,
        scale: 90.0,
        window: None,
        soft_cap: None,
    };
    let rows = 70;
    let q = random(&mut rng, rows * shape.heads * shape.head_dim);
    let [k, v] = [(); 2].map(|()| random(&mut rng, rows * shape.kv_heads * shape.head_dim));
    let whole = 0..rows;
    let sequences = std::slice::from_ref(&whole);
    let expected = textbook(&shape, (&q, &k, &v), sequences);
    for table in all() {
        for chunk in [1, rows] {
            let out = paged(table, &shape, (&q, &k, &v), sequences, (KvForm::F32, chunk));
            let far = difference(&out, &expected);
            assert!(far < 1e-3, "{} {chunk}: {far}", table.name);
        }
    }
}

#[test]
fn blocks_before_the_window_and_positions_after_the_row_are_not_read() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let shape = AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 20,
        scale: 0.2,
        window: Some(30),
        soft_cap: None,
    };
    let (context, width) = (100, shape.heads * shape.head_dim);
    let q = random(&mut rng, context * width);
    let [k, v] = [(); 2].map(|()| random(&mut rng, context * shape.kv_heads * shape.head_dim));
    let whole = 0..context;
    let expected = textbook(&shape, (&q, &k, &v), std::slice::from_ref(&whole));
    for table in all() {
        for row in [40, 63, 64, 80, 99] {
            let mut store = Store::new(KvForm::F32, &shape, 8);
            let Store::F32(panels) = &mut store else { unreachable!() };
            panels.iter_mut().for_each(|panel| panel.fill(f32::NAN));
            // Only what the row's blocks hold up to the row itself.
            let first = (row + 1 - 30) / LANES * LANES;
            let slots: Vec<u32> = (first as u32..=row as u32).collect();
            let narrow = shape.kv_heads * shape.head_dim;
            let part = first * narrow..(row + 1) * narrow;
            store.write(&shape, &slots, &k[part.clone()], &v[part]);
            let spans = [QuerySpan {
                rows: 0..1,
                first_position: row,
                block_table: &[0, 1, 2, 3, 4, 5, 6],
            }];
            let queries = &q[row * width..(row + 1) * width];
            let mut out = vec![0.0; width];
            AttentionForward { shape, panels: store.panels(), queries, spans: &spans }
                .run(table, &mut out);
            let far = difference(&out, &expected[row * width..(row + 1) * width]);
            assert!(far < 1e-5, "{}, row {row}: {far}", table.name);
        }
    }
}

#[test]
fn a_prompt_of_keys_and_values_is_written_as_its_rows_are_one_by_one() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (heads, kv_heads, head_dim, scale) = (6, 3, 40, 0.2);
    let shape = AttentionShape { heads, kv_heads, head_dim, scale, window: None, soft_cap: None };
    // Enough of them for several threads.
    let (count, width) = (700, kv_heads * head_dim);
    let [keys, values] = [(); 2].map(|()| random(&mut rng, count * width));
    // Blocks in no order.
    let num_blocks = count.div_ceil(LANES);
    let block = |index: usize| (index * 7 + 3) % num_blocks;
    let slots: Vec<u32> =
        (0..count).map(|row| (block(row / LANES) * LANES + row % LANES) as u32).collect();
    for form in KV_FORMS {
        let mut at_once = Store::new(form, &shape, num_blocks);
        at_once.write(&shape, &slots, &keys, &values);
        let mut one_by_one = Store::new(form, &shape, num_blocks);
        for (row, slot) in slots.iter().enumerate() {
            let part = row * width..(row + 1) * width;
            one_by_one.write(&shape, &[*slot], &keys[part.clone()], &values[part]);
        }
        let same = match (&at_once, &one_by_one) {
            (Store::F32(a), Store::F32(b)) => a == b,
            (Store::Bf16(a), Store::Bf16(b)) => a == b,
            (Store::Int8(a), Store::Int8(b)) => a == b,
            _ => unreachable!(),
        };
        assert!(same, "{form:?}");
    }
}
