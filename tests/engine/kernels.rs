//! Every instruction set against the portable one, on random shapes: the fast bodies say the same as
//! the slow one, and a row never depends on its batch.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a test may panic"
)]

use crate::WEIGHT_FORMS;
use half::{bf16, f16};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith::kernels::{
    Kernels, LoraOutput, LoraSegment, MatmulJob, PackedWeight, RmsNormGradient, WeightForm,
    add_lora, add_loras, all, best,
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

/// The adapters, each on so many rows.
fn adapted<'a>(
    counts: &[usize],
    adapters: &'a [(PackedWeight, Option<PackedWeight>)],
) -> Vec<LoraSegment<'a>> {
    let mut segments = Vec::new();
    let mut start = 0;
    for (count, (a, b)) in counts.iter().zip(adapters) {
        let rows = start..start + count;
        start += count;
        segments.extend(b.as_ref().map(|b| LoraSegment { rows, a, b, scale: 0.5, factors: None }));
    }
    segments
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
        for form in WEIGHT_FORMS {
            let weight = PackedWeight::from_f32(form, &w, k);
            let held = rows_of(&weight);
            // 1. The right values: for small integers, but for the rounding of x.
            let in_bf16 = form == WeightForm::Bf16Dot;
            let near: Vec<f32> =
                x.iter().map(|x| if in_bf16 { bf16::from_f32(*x).to_f32() } else { *x }).collect();
            let mut expected = product(&near, &held, k);
            expected.chunks_mut(n).for_each(|row| {
                row.iter_mut().zip(&bias).for_each(|(out, bias)| *out += bias);
            });
            let portable = linear(all()[0], &x, &weight, &bias);
            if form.is_exact() || in_bf16 {
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
    fn products_in_bf16_are_the_same_bits_on_all_instruction_sets(
        rows in 1_usize..60, k in 1_usize..1100, n in 1_usize..70, seed in any::<u64>(),
        is_wild in any::<bool>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Every number that there is, or those around the least: sums of products become subnormal.
        let mut any = |count: usize| -> Vec<f32> {
            let tiny = |rng: &mut ChaCha8Rng| rng.random::<f32>() * 2.0_f32.powi(rng.random_range(-80..-55));
            let wild = |rng: &mut ChaCha8Rng| f32::from_bits(rng.random::<u32>());
            (0..count).map(|_| if is_wild { wild(&mut rng) } else { tiny(&mut rng) }).collect()
        };
        let (x, w) = (any(rows * k), any(n * k));
        let weight = PackedWeight::from_f32(WeightForm::Bf16Dot, &w, k);
        let bits = |table: &Kernels| -> Vec<u32> {
            let out = linear(table, &x, &weight, &vec![0.0; n]);
            let of = |value: &f32| if value.is_nan() { u32::MAX } else { value.to_bits() };
            out.iter().map(of).collect()
        };
        let expected = bits(all()[0]);
        for table in all() {
            prop_assert!(bits(table) == expected, "{}", table.name);
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
    fn rows_of_many_adapters_get_the_bits_that_each_gets_alone(
        lengths in prop::collection::vec((0_usize..12, 1_usize..40), 1..6), k in 1_usize..1100,
        n in 1_usize..150, seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let forms = [WeightForm::F32, WeightForm::Bf16, WeightForm::F16];
        let adapters: Vec<_> = lengths.iter().enumerate().map(|(i, (_, rank))| {
            let form = forms[i % 3];
            let a = PackedWeight::from_f32(form, &random(&mut rng, rank * k), k);
            (a, PackedWeight::from_f32(form, &random(&mut rng, n * rank), *rank))
        }).collect();
        // Between the segments lies a row without an adapter.
        let rows: usize = lengths.iter().map(|(rows, _)| rows + 1).sum();
        let (x, before) = (random(&mut rng, rows * k), random(&mut rng, rows * n));
        let mut start = 0;
        let segments: Vec<_> = lengths.iter().zip(&adapters).map(|((count, _), (a, b))| {
            let rows = start..start + count;
            start += count + 1;
            LoraSegment { rows, a, b, scale: 0.5, factors: None }
        }).collect();
        for table in all() {
            let mut together = before.clone();
            add_lora(table, &x, &segments, (k, n), &mut together);
            let mut expected = before.clone();
            for LoraSegment { rows, a, b, scale, .. } in &segments {
                for row in rows.clone() {
                    // 1. Alone, and by the products that training uses.
                    let mut alone = before[row * n..(row + 1) * n].to_vec();
                    let x = &x[row * k..(row + 1) * k];
                    let segment = LoraSegment { rows: 0..1, a, b, scale: *scale, factors: None };
                    add_lora(table, x, &[segment], (k, n), &mut alone);
                    prop_assert_eq!(&alone, &together[row * n..(row + 1) * n], "{}", table.name);
                    // 2. The right values.
                    let rank = a.shape()[0];
                    let added = product(&product(x, &rows_of(a), k), &rows_of(b), rank);
                    let to = &mut expected[row * n..(row + 1) * n];
                    to.iter_mut().zip(&added).for_each(|(to, added)| *to += 0.5 * added);
                }
            }
            prop_assert!(difference(&together, &expected) < 2e-5, "{}", table.name);
        }
    }

    #[test]
    fn outputs_that_are_added_to_together_get_the_bits_that_each_gets_alone(
        counts in prop::collection::vec(0_usize..25, 1..5),
        outputs in prop::collection::vec((1_usize..150, 0_usize..40), 1..4),
        k in 1_usize..1300, seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rows: usize = counts.iter().sum();
        let x = random(&mut rng, rows * k);
        let forms = [WeightForm::F32, WeightForm::Bf16, WeightForm::F16];
        let mut adapters = Vec::new();
        for (n, rank) in &outputs {
            let mut of_output = Vec::new();
            for index in 0..counts.len() {
                // Every other adapter has a rank of its own; one has none of this output.
                let rank = rank + 3 * (index % 2);
                let a = PackedWeight::from_f32(forms[index % 3], &random(&mut rng, rank * k), k);
                let b = random(&mut rng, n * rank);
                let b = (rank > 0).then(|| PackedWeight::from_f32(forms[index % 3], &b, rank));
                of_output.push((a, b));
            }
            adapters.push((random(&mut rng, rows * n), of_output));
        }
        for (table, threads) in all().into_iter().flat_map(|table| [(table, 1), (table, 2)]) {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut together: Vec<_> = adapters.iter().map(|(before, _)| before.clone()).collect();
            let mut alone = together.clone();
            let mut all_outputs = Vec::new();
            for ((out, (n, _)), (_, of_output)) in together.iter_mut().zip(&outputs).zip(&adapters) {
                all_outputs.push(LoraOutput { out, out_features: *n, bias: None, segments: adapted(&counts, of_output) });
            }
            pool.install(|| add_loras(table, &x, k, &mut all_outputs));
            for ((out, (n, _)), (_, of_output)) in alone.iter_mut().zip(&outputs).zip(&adapters) {
                for segment in adapted(&counts, of_output) {
                    add_lora(table, &x, &[segment], (k, *n), out);
                }
            }
            prop_assert_eq!(together, alone, "{}", table.name);
        }
    }

    #[test]
    fn threads_and_rows_have_no_part_in_a_result(
        rows in 1_usize..65, k in 1_usize..1300, n in 1_usize..400, seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (x, w) = (random(&mut rng, rows * k), random(&mut rng, n * k));
        let grad = random(&mut rng, rows * n);
        for form in WEIGHT_FORMS {
            let weight = PackedWeight::from_f32(form, &w, k);
            let adapter = PackedWeight::from_f32(WeightForm::F32, &w[..k.min(n * k)], k);
            let b = PackedWeight::from_f32(WeightForm::F32, &grad[..n], 1);
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let [mut out, mut dw] = [vec![0.0; rows * n], vec![0.0; n * k]];
                    let mut dx = vec![0.0; rows * k];
                    weight.linear(best(), &x, None, &mut out);
                    weight.input_gradient(best(), &grad, &mut dx);
                    let segment = LoraSegment { rows: 0..rows, a: &adapter, b: &b, scale: 2.0, factors: None };
                    add_lora(best(), &x, &[segment], (k, n), &mut out);
                    let (a_strides, shape) = ((1, n), (n, rows, k));
                    MatmulJob { a: &grad, a_strides, b: &x, shape, alpha: 1.0, accumulate: false }
                        .run(best(), &mut dw);
                    [out, dx, dw]
                })
            };
            prop_assert_eq!(run(1), run(2), "{:?}", form);
        }
    }

    #[test]
    fn packing_is_lossless_or_within_the_bounds_of_rounding(
        k in 1_usize..200, n in 1_usize..40, size in -30_i32..10, seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let w: Vec<f32> =
            random(&mut rng, n * k).into_iter().map(|w| w * 2.0_f32.powi(size)).collect();
        for form in WEIGHT_FORMS {
            let weight = PackedWeight::from_f32(form, &w, k);
            let bytes: Vec<u8> = match form {
                WeightForm::F16 => w.iter().flat_map(|w| f16::from_f32(*w).to_le_bytes()).collect(),
                WeightForm::Bf16 => w.iter().flat_map(|w| bf16::from_f32(*w).to_le_bytes()).collect(),
                WeightForm::F32
 | WeightForm::Bf16Dot | WeightForm::Int8 | WeightForm::Int4 => {
                    w.iter().flat_map(|w| w.to_le_bytes()).collect()
                }
            };
            if form.is_exact() {
                prop_assert_eq!(weight.unpack(), bytes, "{:?}", form);
                continue;
            }
            // Half a step of the greatest magnitude of a group: of 127 steps, or of 8; a scale chosen
            // for the least squared error may cut the greatest off by up to an eighth of it. Of bf16, half a
            // unit in the eighth bit.
            let share = match form {
                WeightForm::Bf16Dot => 1.0 / 256.0,
                WeightForm::Int8 => 0.5 / 126.0,
                WeightForm::Int4 => 0.16,
                WeightForm::F32 | WeightForm::F16 | WeightForm::Bf16 => 0.0,
            };
            for (held, row) in rows_of(&weight).chunks(k).zip(w.chunks(k)) {
                for (held, group) in held.chunks(form.group()).zip(row.chunks(form.group())) {
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
}

#[test]
fn empty_matrices_are_multiplied_without_a_panic() {
    for (rows, k, n) in [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0), (1, 1, 1), (40, 0, 3)] {
        let (x, w) = (vec![1.0; rows * k], vec![1.0; n * k]);
        let (bias, grad) = (vec![2.0; n], vec![1.0; rows * n]);
        for table in all() {
            for form in WEIGHT_FORMS {
                let source = if form.is_exact() { form } else { WeightForm::F32 };
                let weight = PackedWeight::pack(form, source, [n, k], |_, bytes: &mut [u8]| {
                    bytes.fill(0);
                    Ok::<_, std::convert::Infallible>(())
                })
                .unwrap();
                let mut out = vec![f32::NAN; rows * n];
                weight.linear(table, &x, Some(&bias), &mut out);
                assert!(out.iter().all(|value| *value == 2.0), "{form:?} {rows} {k} {n}: {out:?}");
                let mut dx = vec![f32::NAN; rows * k];
                weight.input_gradient(table, &grad, &mut dx);
                assert!(dx.iter().all(|value| *value == 0.0), "{form:?} {rows} {k} {n}: {dx:?}");
            }
            let mut out = vec![1.0; rows * n];
            let shape = (rows, k, n);
            MatmulJob { a: &x, a_strides: (k, 1), b: &w, shape, alpha: 1.0, accumulate: false }
                .run(table, &mut out);
            #[allow(clippy::cast_precision_loss)]
            let expected = k as f32;
            assert!(out.iter().all(|value| *value == expected));
        }
    }
}
