//! What adapters (r = 16, all projections) add to a step of several answers, each on its own adapter: some layers of
//! Qwen2.5-0.5B's shapes, in turn without and with them, and the median of many turns. The limit is reading each
//! weight, A and B once; with many rows the products' arithmetic.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a bench may")]

use std::{sync::Arc, time::Instant};

use candle_core::{Device, Tensor};
use tunesmith::{
    kernels::{PackedWeight, WeightForm},
    ops::{
        lora::LoraPart,
        lora_dtype::LoraDtype,
        profile::Op,
        served::{ServedProjection, projections},
    },
};

const RANK: usize = 16;
const LAYERS: usize = 6;
/// Projections that share an input: its features, and those of each output.
const GROUPS: [(usize, &[usize]); 4] =
    [(896, &[896, 128, 128]), (896, &[896]), (896, &[4864, 4864]), (4864, &[896])];

struct Projection {
    weight: Arc<PackedWeight>,
    parts: Vec<LoraPart>,
}

fn values(count: usize, state: &mut u64) -> Vec<f32> {
    let mut next = || {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn layers(form: WeightForm, dtype: LoraDtype, adapters: usize) -> Vec<Vec<Vec<Projection>>> {
    let mut state = 1;
    let mut tensor = |rows: usize, columns: usize| {
        let data = values(rows * columns, &mut state);
        Tensor::from_vec(data, (rows, columns), &Device::Cpu).unwrap()
    };
    let mut projection = |inputs, outputs| {
        let weight: Vec<f32> = tensor(outputs, inputs).flatten_all().unwrap().to_vec1().unwrap();
        let part =
            |_| LoraPart::new(&tensor(RANK, inputs), &tensor(outputs, RANK), 2.0, dtype).unwrap();
        Projection {
            weight: Arc::new(PackedWeight::from_f32(form, &weight, inputs)),
            parts: (0..adapters).map(part).collect(),
        }
    };
    let mut layer = || {
        let group = |(inputs, outputs): &(usize, &[usize])| {
            outputs.iter().map(|outputs| projection(*inputs, *outputs)).collect()
        };
        GROUPS.iter().map(group).collect()
    };
    (0..LAYERS).map(|_| layer()).collect()
}

/// Seconds of a pass over all layers.
fn pass(layers: &[Vec<Vec<Projection>>], inputs: &[Tensor], with_adapters: bool) -> f64 {
    let begun = Instant::now();
    for layer in layers {
        for (group, x) in layer.iter().zip(inputs) {
            let served = group.iter().map(|Projection { weight, parts }| ServedProjection {
                weight,
                bias: None,
                parts: match with_adapters {
                    true => parts.iter().enumerate().map(|(i, part)| (i..i + 1, part)).collect(),
                    false => Vec::new(),
                },
            });
            projections(x, &served.collect::<Vec<_>>(), Op::Qkv).unwrap();
        }
    }
    begun.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    for (form, dtype, answers, turns) in [
        (WeightForm::Bf16, LoraDtype::Bfloat16, 8, 60),
        (WeightForm::Bf16, LoraDtype::Float32, 8, 60),
        (WeightForm::Bf16, LoraDtype::Bfloat16, 64, 16),
        (WeightForm::Bf16, LoraDtype::Float32, 64, 16),
        (WeightForm::Bf16Dot, LoraDtype::Bfloat16, 64, 16),
        (WeightForm::Int8, LoraDtype::Bfloat16, 8, 60),
        (WeightForm::Int8, LoraDtype::Bfloat16, 64, 16),
    ] {
        let name = format!("{form:?}, {answers} answers on {answers} adapters in {dtype:?}");
        if !wanted.iter().all(|part| name.contains(part)) {
            continue;
        }
        let layers = layers(form, dtype, answers);
        let mut state = 2;
        let x = GROUPS.map(|(inputs, _)| {
            Tensor::from_vec(values(answers * inputs, &mut state), (answers, inputs), &Device::Cpu)
                .unwrap()
        });
        let bytes = |parts: &[LoraPart]| parts.iter().map(LoraPart::num_bytes).sum::<usize>();
        let all = || layers.iter().flatten().flatten();
        let base_bytes: usize = all().map(|p| p.weight.num_bytes()).sum();
        let added_bytes: usize = all().map(|p| bytes(&p.parts)).sum();
        let turn = |_| (pass(&layers, &x, false), pass(&layers, &x, true));
        let (base, both): (Vec<_>, Vec<_>) = (0..turns).map(turn).unzip();
        let cost = base.iter().zip(&both).map(|(base, both)| both / base - 1.0).collect();
        let (base, both) = (median(base), median(both));
        println!(
            "{name}: {:.2} ms ({:.1} GB/s), with adapters {:.2} ms ({:.1} GB/s): {:.1} % more; bytes {:.1} % more",
            1e3 * base,
            base_bytes as f64 / base / 1e9,
            1e3 * both,
            (base_bytes + added_bytes) as f64 / both / 1e9,
            100.0 * median(cost),
            100.0 * added_bytes as f64 / base_bytes as f64,
        );
    }
}
