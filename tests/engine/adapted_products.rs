//! What many adapters add to products of the same rows at once has the bits of one after the other.

use crate::WEIGHT_FORMS;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith::kernels::{
    Kernels, LoraOutput, LoraSegment, PackedWeight, WeightForm, add_lora, add_loras, all,
};

fn random(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

/// A projection, and the adapters that there are of it.
struct Projection {
    weight: PackedWeight,
    bias: Option<Vec<f32>>,
    adapters: Vec<Adapter>,
}

struct Adapter {
    a: PackedWeight,
    b: PackedWeight,
    factors: Option<Vec<f32>>,
}

impl Projection {
    fn new(
        rng: &mut ChaCha8Rng,
        (n, k): (usize, usize),
        form: WeightForm,
        ranks: &[usize],
    ) -> Self {
        let forms = [WeightForm::F32, WeightForm::Bf16, WeightForm::F16];
        let adapters = ranks.iter().enumerate().map(|(index, rank)| {
            let form = forms[index % 3];
            Adapter {
                a: PackedWeight::from_f32(form, &random(rng, rank * k), k),
                b: PackedWeight::from_f32(form, &random(rng, n * rank), *rank),
                // As DoRA has them.
                factors: (index % 2 == 1).then(|| random(rng, n)),
            }
        });
        let adapters = adapters.collect();
        let weight = PackedWeight::from_f32(form, &random(rng, n * k), k);
        let bias = (n % 2 == 0).then(|| random(rng, n));
        Self { weight, bias, adapters }
    }

    /// Each adapter has so many of the rows; the last row has none.
    fn segments(&self, counts: &[usize]) -> Vec<LoraSegment<'_>> {
        let mut start = 0;
        let segments = counts.iter().zip(&self.adapters).map(|(count, adapter)| {
            let Adapter { a, b, factors } = adapter;
            start += count;
            let rows = start - count..start;
            LoraSegment { rows, a, b, scale: 0.5, factors: factors.as_deref() }
        });
        segments.collect()
    }

    fn one_after_the_other(&self, table: &Kernels, x: &[f32], counts: &[usize]) -> Vec<f32> {
        let [n, k] = self.weight.shape();
        let mut out = vec![0.0; x.len() / k * n];
        self.weight.linear(table, x, self.bias.as_deref(), &mut out);
        for segment in self.segments(counts) {
            let Some(factors) = segment.factors else {
                add_lora(table, x, &[segment], (k, n), &mut out);
                continue;
            };
            let rows = segment.rows.clone();
            let mut delta = vec![0.0; out.len()];
            add_lora(table, x, &[LoraSegment { factors: None, ..segment }], (k, n), &mut delta);
            for at in rows.start * n..rows.end * n {
                let base = self.bias.as_ref().map_or(out[at], |bias| out[at] - bias[at % n]);
                let factor = factors[at % n];
                out[at] += (factor - 1.0) * base + factor * delta[at];
            }
        }
        out
    }
}

fn together(
    table: &Kernels,
    x: &[f32],
    k: usize,
    projections: &[Projection],
    counts: &[usize],
) -> Vec<Vec<f32>> {
    let rows = x.len() / k;
    let mut outputs: Vec<Vec<f32>> =
        projections.iter().map(|p| vec![0.0; rows * p.weight.shape()[0]]).collect();
    for (projection, out) in projections.iter().zip(&mut outputs) {
        projection.weight.linear(table, x, projection.bias.as_deref(), out);
    }
    let targets = projections.iter().zip(&mut outputs).map(|(projection, out)| LoraOutput {
        out,
        out_features: projection.weight.shape()[0],
        bias: projection.bias.as_deref(),
        segments: projection.segments(counts),
    });
    add_loras(table, x, k, &mut targets.collect::<Vec<_>>());
    outputs
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn additions_to_several_products_at_once_give_the_bits_of_one_after_the_other(
        counts in prop::collection::vec(0_usize..25, 1..6),
        columns in prop::collection::vec(1_usize..700, 1..4),
        ranks in prop::collection::vec(1_usize..40, 6),
        k in 1_usize..1300, form in 0_usize..WEIGHT_FORMS.len(), seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let x = random(&mut rng, (counts.iter().sum::<usize>() + 1) * k);
        let mut new = |n: &usize| {
            Projection::new(&mut rng, (*n, k), WEIGHT_FORMS[form], &ranks[..counts.len()])
        };
        let projections: Vec<Projection> = columns.iter().map(&mut new).collect();
        for table in all() {
            let expected: Vec<Vec<f32>> = projections
                .iter()
                .map(|projection| projection.one_after_the_other(table, &x, &counts))
                .collect();
            for threads in [1, 2, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let found = pool.install(|| together(table, &x, k, &projections, &counts));
                prop_assert!(found == expected, "{}, {threads} threads", table.name);
            }
        }
    }
}

#[test]
fn long_products_of_many_adapters_are_added_to_by_all_threads() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    // 64 rows on as many adapters, and a chunk of a prompt on one.
    for counts in [vec![1; 64], vec![200], vec![130, 1, 1, 9]] {
        let k = 576;
        let x = random(&mut rng, (counts.iter().sum::<usize>() + 1) * k);
        let projections = [1536, 320]
            .map(|n| Projection::new(&mut rng, (n, k), WeightForm::Bf16, &vec![16; counts.len()]));
        let table = tunesmith::kernels::best();
        let expected = projections.each_ref().map(|p| p.one_after_the_other(table, &x, &counts));
        for threads in [1, 2, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let found = pool.install(|| together(table, &x, k, &projections, &counts));
            assert!(found == expected, "{} adapters, {threads} threads", counts.len());
        }
    }
}
