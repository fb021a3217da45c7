//! Every instruction set against the portable one, on random shapes: the fast bodies say the same as
//! the slow one, and a row never depends on its batch.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

use half::{bf16, f16};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith::kernels::{
    AttentionBackward, AttentionForward, AttentionShape, Kernels, KvPanels, LANES, LinearJob,
    MatmulJob, QuerySpan, RmsNormGradient, Weight, all,
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

fn linear<W: Weight>(kernels: &Kernels, x: &[f32], w: &[W], bias: &[f32], k: usize) -> Vec<f32> {
    let n = bias.len();
    let mut out = vec![0.0; x.len() / k * n];
    let job = LinearJob { x, weight: w, bias: Some(bias), in_features: k, out_features: n };
    job.run(kernels, &mut out);
    out
}

fn check_linear<W: Weight>(x: &[f32], w: &[W], bias: &[f32], k: usize) {
    let tables = all();
    let portable = linear(tables[0], x, w, bias, k);
    for table in tables {
        let out = linear(table, x, w, bias, k);
        assert!(difference(&out, &portable) < 2e-5, "{}", table.name);
        let n = bias.len();
        for (index, row) in x.chunks(k).enumerate() {
            let alone = linear(table, row, w, bias, k);
            assert_eq!(alone, &out[index * n..(index + 1) * n], "{} row {index}", table.name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() })]

    #[test]
    fn linear_is_the_same_everywhere_and_row_by_row(
        rows in 1_usize..70, k in 1_usize..90, n in 1_usize..40, seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (x, w) = (random(&mut rng, rows * k), random(&mut rng, n * k));
        let bias = random(&mut rng, n);
        check_linear(&x, &w, &bias, k);
        check_linear(&x, &w.iter().map(|w| bf16::from_f32(*w)).collect::<Vec<_>>(), &bias, k);
        check_linear(&x, &w.iter().map(|w| f16::from_f32(*w)).collect::<Vec<_>>(), &bias, k);
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
