//! What an adapter does to a projection, in both bodies, and to the weights when folded in.

use std::ops::Range;

use crate::support::{Scratch, config, fresh, model, oracle};
use candle_core::{DType, Device, Tensor};
use tunesmith::{
    adapters::{AdapterError, LoraAdapter, LoraConfig, merged_weights},
    model::{Delta, Dropout, Projected, Projection, Site},
};

const SITE: Site = Site { layer: 1, projection: Projection::Down };

fn random(rows: usize, columns: usize) -> Tensor {
    Tensor::randn(0_f32, 1.0, (rows, columns), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(left: &Tensor, right: &Tensor) {
    assert_eq!(left.dims(), right.dims());
    for (left, right) in values(left).into_iter().zip(values(right)) {
        assert!((left - right).abs() < 1e-4, "{left} {right}");
    }
}

/// An adapter with a random B, as variables or not.
fn trained(trainable: bool) -> LoraAdapter {
    let dir = oracle("tiny-llama-plain-adapter");
    LoraAdapter::read(&dir, &model("tiny-llama"), trainable).unwrap()
}

/// The site of a base whose weight and bias do not matter, in adapters that only add.
fn apply(
    adapter: &LoraAdapter,
    site: Site,
    input: &Tensor,
    output: Tensor,
    rows: Range<usize>,
    dropout: Option<Dropout>,
) -> candle_core::Result<Tensor> {
    let weight = Tensor::zeros((32, 64), DType::F32, &Device::Cpu)?.into();
    let at = Projected { site, weight: &weight, bias: None, input };
    Ok(adapter.apply(&at, output, rows, dropout).unwrap())
}

fn a(adapter: &LoraAdapter) -> Tensor {
    let [a, _] = adapter.modules()[&SITE].matrices().unwrap();
    a
}

fn reference(x: &Tensor, adapter: &LoraAdapter) -> Tensor {
    let module = &adapter.modules()[&SITE];
    let [a, b] = module.matrices().unwrap();
    let x = x.matmul(&a.detach().t().unwrap()).unwrap();
    (x.matmul(&b.detach().t().unwrap()).unwrap() * module.scale).unwrap()
}

#[test]
fn both_bodies_add_the_product_on_their_rows_only() {
    let (x, y) = (random(6, 64), random(6, 32));
    for rows in [0..6, 2..5, 0..1, 5..6] {
        let length = rows.len();
        let delta = reference(&x.narrow(0, rows.start, length).unwrap(), &trained(false));
        let expected = y.copy().unwrap();
        let middle = (expected.narrow(0, rows.start, length).unwrap() + delta).unwrap();
        expected.slice_set(&middle, 0, rows.start).unwrap();
        for trainable in [false, true] {
            let output = y.copy().unwrap();
            let adapter = trained(trainable);
            let output = apply(&adapter, SITE, &x, output, rows.clone(), None).unwrap();
            assert_close(&output, &expected);
            assert_eq!(output.track_op(), trainable);
        }
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_is_reproducible() {
    let (x, y) = (random(3, 64), random(3, 32));
    let output = apply(&fresh(5), SITE, &x, y.copy().unwrap(), 0..3, None).unwrap();
    assert_eq!(values(&output), values(&y));
    assert_eq!(fresh(5).digest(), fresh(5).digest());
    // The same A whether or not other modules are adapted as well.
    let one = LoraConfig { targets: vec![Projection::Down], ..config() };
    let one = LoraAdapter::fresh(&one, &model("tiny-llama"), 5).unwrap();
    assert_eq!(values(&a(&one)), values(&a(&fresh(5))));
    let bound = 1.0 / 8.0; // 1 / sqrt(64 inputs)
    let a = values(&a(&one));
    assert!(a.iter().all(|value| value.abs() <= bound));
    assert!(a.iter().any(|value| *value > bound / 2.0) && a.iter().any(|v| *v < -bound / 2.0));
}

#[test]
fn a_site_without_a_part_leaves_the_output_untouched() {
    let only = LoraConfig { targets: vec![Projection::Q], ..config() };
    let adapter = LoraAdapter::fresh(&only, &model("tiny-llama"), 1).unwrap();
    let y = random(3, 32);
    let output = apply(&adapter, SITE, &random(3, 64), y.copy().unwrap(), 0..3, None).unwrap();
    assert!(!output.track_op());
    assert_eq!(values(&output), values(&y));
}

#[test]
fn every_variable_of_the_module_gets_a_gradient() {
    let adapter = trained(true);
    let output = apply(&adapter, SITE, &random(4, 64), random(4, 32), 1..3, None).unwrap();
    let gradients = output.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let mut moved = Vec::new();
    for (name, variable) in adapter.variables() {
        if let Some(gradient) = gradients.get(&variable) {
            assert!(values(gradient).iter().any(|value| *value != 0.0), "{name}");
            moved.push(name);
        }
    }
    let module = "base_model.model.model.layers.1.mlp.down_proj";
    assert_eq!(moved, [format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight")]);
}

#[test]
fn an_update_of_a_variable_is_seen_by_the_forward_pass_and_by_the_writer() {
    let adapter = fresh(1);
    for (_, variable) in adapter.variables() {
        variable.set(&(variable.as_tensor() + 0.5).unwrap()).unwrap();
    }
    let (x, y) = (random(2, 64), random(2, 32));
    let output = apply(&adapter, SITE, &x, y.copy().unwrap(), 0..2, None).unwrap();
    assert_close(&output, &(y + reference(&x, &adapter)).unwrap());
    let scratch = Scratch::new();
    adapter.write(scratch.path(), "base").unwrap();
    let written = LoraAdapter::read(scratch.path(), &model("tiny-llama"), false).unwrap();
    assert_eq!(values(&written.modules()[&SITE].matrices().unwrap()[1]), vec![0.5; 32 * 4]);
}

#[test]
fn dropout_is_a_function_of_seed_and_site_and_only_in_training() {
    let (x, y) = (random(8, 64), Tensor::zeros((8, 32), DType::F32, &Device::Cpu).unwrap());
    let apply = |adapter: &LoraAdapter, layer, seed| {
        let dropout = Some(Dropout { probability: 0.5, neftune_alpha: 0.0, seed });
        let site = Site { layer, projection: Projection::Down };
        values(&self::apply(adapter, site, &x, y.copy().unwrap(), 0..8, dropout).unwrap())
    };
    // The same A and B in both layers, so that only the mask can differ.
    let adapter = trained(true);
    let variables = adapter.variables();
    for (name, variable) in &variables {
        if let Some((_, source)) =
            variables.iter().find(|(other, _)| *other == name.replace("layers.1", "layers.0"))
        {
            variable.set(&source.as_tensor().copy().unwrap()).unwrap();
        }
    }
    assert_eq!(apply(&adapter, 0, 1), apply(&adapter, 0, 1));
    assert_ne!(apply(&adapter, 0, 1), apply(&adapter, 0, 2));
    assert_ne!(apply(&adapter, 0, 1), apply(&adapter, 1, 1));
    assert_eq!(apply(&trained(false), 0, 1), apply(&trained(false), 0, 2));
}

#[test]
fn a_folded_weight_computes_what_the_adapter_adds() {
    let adapter = trained(false);
    let mut weights: Vec<(String, Tensor)> = Vec::new();
    for (site, module) in adapter.modules() {
        let name = format!("model.layers.{}.{}.weight", site.layer, site.projection.path());
        let [a, b] = module.matrices().unwrap();
        let shape = (b.dims()[0], a.dims()[1]);
        weights.push((name, random(shape.0, shape.1)));
    }
    weights.push((
        "model.norm.weight".to_owned(),
        Tensor::ones(32, DType::BF16, &Device::Cpu).unwrap(),
    ));
    let merged = merged_weights(weights.clone(), &adapter).unwrap();
    let name = "model.layers.1.mlp.down_proj.weight";
    let find = |weights: &[(String, Tensor)]| {
        weights.iter().find(|(other, _)| other == name).unwrap().1.clone()
    };
    let x = random(5, 64);
    let base = x.matmul(&find(&weights).t().unwrap()).unwrap();
    let folded = x.matmul(&find(&merged).t().unwrap()).unwrap();
    assert_close(&folded, &(base + reference(&x, &adapter)).unwrap());
    assert_eq!(merged.last().unwrap().1.dtype(), DType::BF16);

    // In the weight's own dtype.
    for (_, weight) in &mut weights {
        *weight = weight.to_dtype(DType::BF16).unwrap();
    }
    let narrow = merged_weights(weights.clone(), &adapter).unwrap();
    assert!(narrow.iter().all(|(_, weight)| weight.dtype() == DType::BF16));

    weights.retain(|(other, _)| other != name);
    let error = merged_weights(weights, &adapter).unwrap_err();
    assert!(matches!(&error, AdapterError::MissingTensor { tensors } if tensors == &[name]));
}
