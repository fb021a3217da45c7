//! Every instruction set against the portable one, on random shapes: the fast bodies say the same as
//! the slow one, and a row never depends on its batch.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a test may panic"
)]

use half::{bf16, f16};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith::kernels::{
    AttentionBackward, AttentionForward, AttentionShape, GROUP, Kernels, KvPanels, LANES,
    MatmulJob, PackedWeight, QuerySpan, RmsNormGradient, WeightForm, all,
};

fn random(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

fn difference_of(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()))
}

/// The greatest difference, relative to the greatest magnitude.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let scale = a.iter().chain(b).fold(1e-6_f32, |max, value| max.max(value.abs()));
    a.iter().zip(b).fold(0.0_f32, |max, (a, b)| max.max((a - b).abs())) / scale
}

const FORMS: [WeightForm; 5] =
    [WeightForm::F32, WeightForm::F16, WeightForm::Bf16, WeightForm::Int8, WeightForm::Int4];

fn linear(kernels: &Kernels, x: &[f32], weight: &PackedWeight, bias: &[f32]) -> Vec<f32> {
    let [n, k] = weight.shape();
    let mut out = vec![f32::NAN; x.len() / k * n];
    weight.linear(kernels, x, Some(bias), &mut out);
    out
}

/// The weight as it is held, row by row.
fn rows_of(weight: &PackedWeight) -> Vec<f32> {
    let [n, k] = weight.shape();
    let mut rows = vec![0.0; n * k];
    for (index, row) in rows.chunks_mut(k).enumerate() {
        weight.row(index, row);
    }
    rows
}

/// `a [m, k] b [n, k]^T`, in f64.
fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    a.chunks(k).flat_map(|a| b.chunks(k).map(move |b| dot(a, b) as f32)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() })]

    #[test]
    fn packed_products_are_the_same_everywhere_and_row_by_row(
        rows in 1_usize..71, k in 1_usize..1100, n in 1_usize..150, seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (x, w) = (random(&mut rng, rows * k), random(&mut rng, n * k));
        let (bias, grad) = (random(&mut rng, n), random(&mut rng, rows * n));
        for form in FORMS {
            let weight = PackedWeight::from_f32(form, &w, k);
            let held = rows_of(&weight);
            // 1. The right values: for small integers, but for the rounding of x.
            let mut expected = product(&x, &held, k);
            expected.chunks_mut(n).for_each(|row| {
                row.iter_mut().zip(&bias).for_each(|(out, bias)| *out += bias);
            });
            let portable = linear(all()[0], &x, &weight, &bias);
            if form.is_exact() {
                prop_assert!(difference(&portable, &expected) < 2e-5, "{form:?}");
            } else {
                // Roundings of x by up to 1/254, of either sign, as a random walk.
                let walk = 0.01 * (k as f32).sqrt();
                prop_assert!(difference_of(&portable, &expected) < walk, "{form:?}");
            }
            let turned: Vec<f32> = (0..k * n).map(|i| held[i % n * k + i / n]).collect();
            let expected_grad = product(&grad, &turned, n);
            for table in all() {
                // 2. The same on all instruction sets, but for the fusion of multiply and add.
                let out = linear(table, &x, &weight, &bias);
                prop_assert!(difference(&out, &portable) < 2e-5, "{form:?} {}", table.name);
                // 3. A row is bit for bit the row alone, and in any other batch.
                for size in [1, 3, 7, 13] {
                    for (index, part) in x.chunks(size * k).enumerate().take(6) {
                        let alone = linear(table, part, &weight, &bias);
                        let at = index * size * n;
                        prop_assert_eq!(&alone, &out[at..at + alone.len()], "{:?}", form);
                    }
                }
                // 4. The gradient of x.
                let mut grad_x = vec![f32::NAN; rows * k];
                weight.input_gradient(table, &grad, &mut grad_x);
                prop_assert!(difference(&grad_x, &expected_grad) < 2e-5, "{form:?} {}", table.name);
            }
        }
    }

    #[test]
    fn rows_that_are_not_packed_give_the_bits_of_packed_ones(
        rows in 1_usize..40, k in 1_usize..1100, n in 1_usize..70, seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (x, w) = (random(&mut rng, rows * k), random(&mut rng, n * k));
        let grad = random(&mut rng, rows * n);
        let weight = PackedWeight::from_f32(WeightForm::F32, &w, k);
        for table in all() {
            let [mut packed, mut plain] = [(); 2].map(|()| vec![0.0; rows * n]);
            weight.linear(table, &x, None, &mut packed);
            tunesmith::kernels::linear(table, &x, &w, k, &mut plain);
            prop_assert_eq!(packed, plain);
            let [mut packed, mut plain] = [(); 2].map(|()| vec![0.0; rows * k]);
            weight.input_gradient(table, &grad, &mut packed);
            tunesmith::kernels::input_gradient(table, &grad, &w, k, &mut plain);
            prop_assert_eq!(packed, plain);
        }
    }

    #[test]
    fn packing_is_lossless_or_within_the_bounds_of_rounding(
        k in 1_usize..200, n in 1_usize..40, size in -30_i32..10, seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let w: Vec<f32> =
            random(&mut rng, n * k).into_iter().map(|w| w * 2.0_f32.powi(size)).collect();
        for form in FORMS {
            let weight = PackedWeight::from_f32(form, &w, k);
            let bytes: Vec<u8> = match form {
                WeightForm::F16 => w.iter().flat_map(|w| f16::from_f32(*w).to_le_bytes()).collect(),
                WeightForm::Bf16 => w.iter().flat_map(|w| bf16::from_f32(*w).to_le_bytes()).collect(),
                WeightForm::F32 | WeightForm::Int8 | WeightForm::Int4 => {
                    w.iter().flat_map(|w| w.to_le_bytes()).collect()
                }
            };
            if form.is_exact() {
                prop_assert_eq!(weight.unpack(), bytes, "{:?}", form);
                continue;
            }
            // Half a step of the greatest magnitude of a group: of 127 steps, or of 8; a scale chosen
            // for the least squared error may cut the greatest off by up to an eighth of it.
            let share = if form == WeightForm::Int8 { 0.5 / 126.0 } else { 0.16 };
            for (held, row) in rows_of(&weight).chunks(k).zip(w.chunks(k)) {
                for (held, group) in held.chunks(GROUP).zip(row.chunks(GROUP)) {
                    let greatest = group.iter().fold(0.0_f32, |max, w| max.max(w.abs()));
                    prop_assert!(difference_of(held, group) <= share * greatest, "{form:?}");
                }
            }
        }
    }

    #[test]
    fn matmul_is_the_sum_of_products(
        m in 1_usize..40, k in 1_usize..600, n in 1_usize..90, transposed in any::<bool>(),
        accumulate in any::<bool>(), seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (a, b) = (random(&mut rng, m * k), random(&mut rng, k * n));
        let start = random(&mut rng, m * n);
        let a_strides = if transposed { (1, m) } else { (k, 1) };
        let mut expected = vec![0.0_f32; m * n];
        for i in 0..m {
            for j in 0..n {
                let sum: f64 = (0..k)
                    .map(|t| f64::from(a[i * a_strides.0 + t * a_strides.1]) * f64::from(b[t * n + j]))
                    .sum();
                expected[i * n + j] =
                    (0.5 * sum) as f32 + if accumulate { start[i * n + j] } else { 0.0 };
            }
        }
        for table in all() {
            let mut out = start.clone();
            let shape = (m, k, n);
            MatmulJob { a: &a, a_strides, b: &b, shape, alpha: 0.5, accumulate }.run(table, &mut out);
            prop_assert!(difference(&out, &expected) < 1e-5, "{}", table.name);
        }
    }

    #[test]
    fn rows_of_norms_and_gates_agree(size in 4_usize..100, seed in any::<u64>()) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let [x, w, grad] = [(); 3].map(|()| random(&mut rng, size));
        let run = |table: &Kernels| {
            let mut results = vec![vec![0.0; size]; 6];
            let [norm, grad_x, grad_w, gated, grad_gate, grad_up] = &mut results[..] else {
                unreachable!()
            };
            table.rms_norm(&x, &w, 1e-5, norm);
            table.rms_norm_backward(RmsNormGradient {
                x: &x, weight: &w, grad_out: &grad, eps: 1e-5, grad_x, grad_weight: Some(grad_w),
            });
            table.silu_mul(&x, &w, gated);
            table.silu_mul_backward((&x, &w), &grad, (grad_gate, grad_up));
            let (max, sum) = table.softmax_stats(&x);
            results.push(vec![max, sum]);
            results
        };
        let expected = run(all()[0]);
        for table in all() {
            for (out, expected) in run(table).iter().zip(&expected) {
                prop_assert!(difference(out, expected) < 1e-4, "{}", table.name);
            }
        }
    }

    #[test]
    fn attention_agrees_with_the_textbook(
        lengths in prop::collection::vec(1_usize..50, 1..4), group in 1_usize..4,
        kv_heads in 1_usize..3, half_dim in 1_usize..20, seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (heads, head_dim) = (group * kv_heads, half_dim * 2);
        let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.3 };
        let rows: usize = lengths.iter().sum();
        let q = random(&mut rng, rows * heads * head_dim);
        let [k, v] = [(); 2].map(|()| random(&mut rng, rows * kv_heads * head_dim));
        let grad = random(&mut rng, q.len());
        let mut sequences = Vec::new();
        for length in &lengths {
            let start = sequences.last().map_or(0, |range: &std::ops::Range<usize>| range.end);
            sequences.push(start..start + length);
        }
        let expected = textbook(&shape, (&q, &k, &v), &sequences);
        for table in all() {
            let out = paged(table, &shape, (&q, &k, &v), &sequences);
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
}

fn paged(
    table: &Kernels,
    shape: &AttentionShape,
    (q, k, v): (&[f32], &[f32], &[f32]),
    sequences: &[std::ops::Range<usize>],
) -> Vec<f32> {
    // Blocks are handed out back to front, so that a kernel that ignores the table is caught.
    let total: usize = sequences.iter().map(|range| range.len().div_ceil(LANES)).sum();
    let mut next = total;
    let mut slots = Vec::new();
    let mut tables = Vec::new();
    for range in sequences {
        let blocks: Vec<u32> = (0..range.len().div_ceil(LANES))
            .map(|_| {
                next -= 1;
                next as u32
            })
            .collect();
        slots.extend(
            (0..range.len()).map(|at| blocks[at / LANES] * LANES as u32 + (at % LANES) as u32),
        );
        tables.push(blocks);
    }
    let mut keys = vec![0.0; total * shape.key_block_len()];
    let mut values = vec![0.0; total * shape.value_block_len()];
    shape.write_keys(k, &slots, &mut keys);
    shape.write_values(v, &slots, &mut values);
    let spans: Vec<QuerySpan<'_>> = sequences
        .iter()
        .zip(&tables)
        .map(|(rows, table)| QuerySpan {
            rows: rows.clone(),
            first_position: 0,
            block_table: table,
        })
        .collect();
    let mut out = vec![0.0; q.len()];
    let panels = KvPanels { keys: &keys, values: &values };
    AttentionForward { shape: *shape, panels, queries: q, spans: &spans }.run(table, &mut out);
    out
}

fn textbook(
    shape: &AttentionShape,
    (q, k, v): (&[f32], &[f32], &[f32]),
    sequences: &[std::ops::Range<usize>],
) -> Vec<f32> {
    let AttentionShape { heads, kv_heads, head_dim, scale } = *shape;
    let mut out = vec![0.0_f32; q.len()];
    for range in sequences {
        for row in range.clone() {
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let at = (row * heads + head) * head_dim;
                let key = |j: usize| (j * kv_heads + kv) * head_dim;
                let score = |j: usize| -> f64 {
                    let dot =
                        (0..head_dim).map(|d| f64::from(q[at + d]) * f64::from(k[key(j) + d]));
                    dot.sum::<f64>() * f64::from(scale)
                };
                let weights: Vec<f64> = (range.start..=row).map(|j| score(j).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let mixed = (range.start..=row)
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

/// The analytic gradient along a random direction against the difference quotient.
fn check_slope(
    shape: &AttentionShape,
    inputs: [&[f32]; 3],
    grad: &[f32],
    sequences: &[std::ops::Range<usize>],
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

/// A buffer between two pages that must not be touched: the kernels read and write nothing beside it.
struct Guarded {
    pages: *mut libc::c_void,
    length: usize,
    at: usize,
    count: usize,
}

impl Guarded {
    /// `values`, with the last one (or else the first one) right beside a guard page.
    #[allow(unsafe_code, reason = "memory with a guard cannot be had otherwise")]
    fn new(values: &[f32], at_end: bool) -> Self {
        const PAGE: usize = 4096;
        let bytes = std::mem::size_of_val(values);
        let inner = bytes.next_multiple_of(PAGE);
        let length = inner + 2 * PAGE;
        let at = PAGE + if at_end { inner - bytes } else { 0 };
        // SAFETY: a fresh private mapping of `length` bytes; the middle of it is made writable and
        // holds `values.len()` floats at `at`, a multiple of four.
        let pages = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let pages = libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(pages, libc::MAP_FAILED);
            let middle = pages.byte_add(PAGE);
            assert_eq!(libc::mprotect(middle, inner, libc::PROT_READ | libc::PROT_WRITE), 0);
            let to = pages.byte_add(at).cast::<f32>();
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
            pages
        };
        Self { pages, length, at, count: values.len() }
    }

    #[allow(unsafe_code, reason = "as above")]
    fn slice(&mut self) -> &mut [f32] {
        // SAFETY: `new` put `count` floats there; the borrow is that of `self`.
        unsafe {
            std::slice::from_raw_parts_mut(self.pages.byte_add(self.at).cast::<f32>(), self.count)
        }
    }
}

impl Drop for Guarded {
    #[allow(unsafe_code, reason = "as above")]
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, used by nobody any more.
        assert_eq!(unsafe { libc::munmap(self.pages, self.length) }, 0);
    }
}

#[test]
fn nothing_beside_the_buffers_is_touched() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for (rows, k, n) in
        [(1, 1, 1), (2, 33, 17), (7, 64, 50), (8, 515, 16), (13, 47, 33), (29, 97, 130)]
    {
        let (x, w) = (random(&mut rng, rows * k), random(&mut rng, n * k));
        let (bias, y) = (random(&mut rng, n), random(&mut rng, rows * n));
        for at_end in [false, true] {
            let [mut x, mut w, mut bias, mut y] =
                [&x, &w, &bias, &y].map(|values| Guarded::new(values, at_end));
            let mut dx = Guarded::new(&vec![0.0; rows * k], at_end);
            for table in all() {
                for form in FORMS {
                    let weight = PackedWeight::from_f32(form, w.slice(), k);
                    weight.linear(table, x.slice(), Some(bias.slice()), y.slice());
                    weight.input_gradient(table, y.slice(), dx.slice());
                }
                tunesmith::kernels::linear(table, x.slice(), w.slice(), k, y.slice());
                tunesmith::kernels::input_gradient(table, y.slice(), w.slice(), k, dx.slice());
                let (a_strides, shape) = ((k, 1), (rows, k, 1));
                let job = MatmulJob {
                    a: x.slice(),
                    a_strides,
                    b: w.slice(),
                    shape,
                    alpha: 1.0,
                    accumulate: false,
                };
                let mut out = Guarded::new(&vec![0.0; rows], at_end);
                job.run(table, out.slice());
            }
        }
    }
}
