//! Gradients: every operation against difference quotients, every adapter tensor of every family
//! reached, no frozen weight's gradient ever computed, and the candle-transformers families beside ours.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

use std::{ops::Range, path::Path, sync::Arc};

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith::{
    adapters::LoraAdapter,
    kernels::AttentionShape,
    model::{Decoder, DeltaRows, ModelConfig, Step, StepSequence, WeightMode},
    ops::{
        self,
        adapted_linear::{TrainedLora, adapted_linear},
        weight::{Precision, Weight},
    },
};

type Op<'a> = dyn Fn(&[Tensor]) -> Result<Tensor> + 'a;

fn random(rng: &mut ChaCha8Rng, shape: &[usize]) -> Tensor {
    let data: Vec<f32> =
        (0..shape.iter().product()).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// `sum(op(inputs) * weights)`, in f64.
fn value(op: &Op<'_>, inputs: &[Tensor], weights: &Tensor) -> f64 {
    let product = (op(inputs).unwrap() * weights).unwrap().to_dtype(DType::F64).unwrap();
    product.sum_all().unwrap().to_scalar().unwrap()
}

/// The slope of `op` along a random direction of all inputs: analytic against numeric.
fn check(name: &str, shapes: &[&[usize]], op: &Op<'_>) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let inputs: Vec<Var> =
        shapes.iter().map(|shape| Var::from_tensor(&random(&mut rng, shape)).unwrap()).collect();
    let tensors: Vec<Tensor> = inputs.iter().map(|input| input.as_tensor().clone()).collect();
    let out = op(&tensors).unwrap();
    let weights = random(&mut rng, out.dims());
    let grads = (out * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    let mut numeric = 0.0;
    let mut analytic = 0.0;
    let mut size = 0.0;
    for (index, input) in tensors.iter().enumerate() {
        let direction = random(&mut rng, input.dims());
        let grad =
            grads.get(input).unwrap_or_else(|| panic!("{name}: input {index} has no gradient"));
        let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(norm(grad) > 0.0, "{name}: the gradient of input {index} is zero");
        size += f64::from(norm(grad));
        let along = (grad * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        analytic += f64::from(along);
        let step = 5e-3;
        let moved = |sign: f64| {
            let mut moved: Vec<Tensor> = tensors.iter().map(Tensor::detach).collect();
            moved[index] = (&moved[index] + (&direction * (sign * step)).unwrap()).unwrap();
            value(op, &moved, &weights)
        };
        numeric += (moved(1.0) - moved(-1.0)) / (2.0 * step);
    }
    let error = (numeric - analytic).abs() / size.sqrt().max(0.1);
    assert!(error < 3e-3, "{name}: numeric {numeric}, analytic {analytic}");
}

#[test]
fn every_operation_has_the_gradient_of_its_forward() {
    let angles = ops::rope::Angles::new(&[0, 1, 2, 0, 1], &[1.0, 0.3]);
    let shape = AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        scale: 0.4,
        window: None,
        soft_cap: None,
    };
    let near = AttentionShape { window: Some(5), soft_cap: Some(0.7), ..shape };
    let sequences: Arc<[Range<usize>]> = [0..3, 3..23].into();
    check("add", &[&[3, 4], &[3, 4]], &|x| ops::add::add(&x[0], &x[1]));
    check("linear", &[&[5, 7], &[3, 7]], &|x| {
        ops::linear::linear(&x[0], &x[1].clone().into(), None)
    });
    check("linear with bias", &[&[5, 7], &[3, 7], &[3]], &|x| {
        ops::linear::linear(&x[0], &x[1].clone().into(), Some(&x[2]))
    });
    check("rms_norm", &[&[5, 19], &[19]], &|x| ops::rms_norm::rms_norm(&x[0], &x[1], 1e-5));
    check("silu_mul", &[&[5, 19], &[5, 19]], &|x| ops::gated_mlp::silu_mul(&x[0], &x[1]));
    check("gelu_mul", &[&[5, 19], &[5, 19]], &|x| {
        ops::gated_mlp::gated_mul(ops::gated_mlp::Activation::GeluTanh, &x[0], &x[1])
    });
    check("soft_cap", &[&[5, 19]], &|x| ops::soft_cap::soft_cap(&x[0], 0.8));
    check("rope", &[&[5, 8]], &|x| ops::rope::rope(&x[0], &angles));
    check("embedding", &[&[6, 4]], &|x| {
        ops::embedding::embedding(&x[0].clone().into(), &[1, 5, 1, 0])
    });
    check("dropout", &[&[6, 40]], &|x| ops::dropout::dropout(&x[0], 0.3, 9));
    check("lora", &[&[5, 7], &[3, 7], &[11, 3]], &|x| ops::lora::lora(&x[0], &x[1], &x[2], 1.5));
    let norms = Tensor::new(&[0.5_f32, 2.0, 1.5], &Device::Cpu).unwrap();
    check("dora", &[&[5, 3], &[5, 3], &[3]], &|x| ops::dora::dora(&x[0], &x[1], &x[2], &norms));
    check("replace_rows", &[&[5, 4], &[2, 4]], &|x| {
        ops::own_rows::replace_rows(&x[0], &x[1], vec![(1, 0), (3, 1), (4, 0)])
    });
    check("cross_entropy with own rows", &[&[4, 6], &[2, 6]], &|x| {
        let head = random(&mut ChaCha8Rng::seed_from_u64(3), &[9, 6]).into();
        let losses = ops::own_rows::cross_entropy(
            &x[0],
            &head,
            (&[7, 2].into(), &x[1]),
            (&[2, 0, 7, 8], None),
        );
        losses?.get(0)
    });
    check("cross_entropy with own rows and a soft cap", &[&[4, 6], &[2, 6]], &|x| {
        let head = random(&mut ChaCha8Rng::seed_from_u64(3), &[9, 6]).into();
        let losses = ops::own_rows::cross_entropy(
            &x[0],
            &head,
            (&[7, 2].into(), &x[1]),
            (&[2, 0, 7, 8], Some(1.5)),
        );
        losses?.get(0)
    });
    check("attention", &[&[23, 24], &[23, 12], &[23, 12]], &|x| {
        ops::attention::attention(&x[0], &x[1], &x[2], shape, &sequences)
    });
    check("attention with a window and a cap", &[&[23, 24], &[23, 12], &[23, 12]], &|x| {
        ops::attention::attention(&x[0], &x[1], &x[2], near, &sequences)
    });
    check("capped cross_entropy", &[&[4, 6], &[9, 6]], &|x| {
        let head = x[1].clone().into();
        ops::cross_entropy::capped_cross_entropy(&x[0], &head, &[1, 8, 0, 3], Some(1.5))?
            .narrow(0, 0, 1)
    });
    check("cross_entropy", &[&[4, 6], &[9, 6]], &|x| {
        ops::cross_entropy::cross_entropy(&x[0], &x[1].clone().into(), &[1, 8, 0, 3])?
            .narrow(0, 0, 1)
    });
}

#[test]
fn what_adapters_drop_is_dropped_from_their_gradients_too() {
    let weight = random(&mut ChaCha8Rng::seed_from_u64(3), &[11, 17]);
    let Weight::Packed(weight) = Weight::pack_tensor(Precision::Exact, &weight).unwrap() else {
        panic!("it was packed")
    };
    check("a projection with its adapter", &[&[5, 17], &[3, 17], &[11, 3]], &|x| {
        let (a, b) = (x[1].clone(), x[2].clone());
        let lora = TrainedLora { a, b, scale: 1.5, dropout: Some((0.4, 9)) };
        adapted_linear(&x[0], &weight, None, &lora)
    });
}

#[test]
fn losses_of_more_rows_than_have_logits_at_a_time_have_their_gradients() {
    // Ninety-six rows at a time over a vocabulary as large as this.
    const VOCAB: usize = 11_000;
    let targets: Vec<u32> = (0..150).map(|row| row * 73 % VOCAB as u32).collect();
    let cross_entropy = |hidden: &Tensor, head: &Weight| {
        ops::cross_entropy::cross_entropy(hidden, head, &targets)?.get(0)
    };
    check("a trained head", &[&[150, 2], &[VOCAB, 2]], &|x| {
        cross_entropy(&x[0], &x[1].clone().into())
    });
    let head = (random(&mut ChaCha8Rng::seed_from_u64(3), &[VOCAB, 2]) * 3.0).unwrap();
    let head = Weight::pack_tensor(Precision::Exact, &head).unwrap();
    check("a frozen head", &[&[150, 2]], &|x| cross_entropy(&x[0], &head));
    let targets: Vec<u32> = (0..150).map(|row| row % 9).collect();
    check("own rows", &[&[150, 6], &[2, 6]], &|x| {
        let head = random(&mut ChaCha8Rng::seed_from_u64(3), &[9, 6]).into();
        let own = (&[7, 2].into(), &x[1]);
        ops::own_rows::cross_entropy(&x[0], &head, own, (&targets, None))?.get(0)
    });
}

#[test]
fn packed_weights_give_the_values_and_gradients_of_plain_ones_bit_for_bit() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let x = Var::from_tensor(&random(&mut rng, &[21, 1030])).unwrap();
    let (weight, bias) = (random(&mut rng, &[530, 1030]), random(&mut rng, &[530]));
    let run = |weight: &Weight, bias: Option<&Tensor>| {
        let out = ops::linear::linear(&x, weight, bias).unwrap();
        let losses = ops::cross_entropy::cross_entropy(&x, weight, &[9; 21]).unwrap();
        let sum =
            (out.sqr().unwrap().sum_all().unwrap() + losses.get(0).unwrap().sum_all()).unwrap();
        let grads = sum.backward().unwrap();
        let rows = ops::embedding::embedding(weight, &[0, 17, 529]).unwrap();
        [&out, &losses, grads.get(&x).unwrap(), &rows]
            .map(|tensor| tensor.to_vec2::<f32>().unwrap())
    };
    let packed = Weight::pack_tensor(Precision::Exact, &weight).unwrap();
    let plain = Var::from_tensor(&weight).unwrap().as_tensor().clone().into();
    assert_eq!(run(&packed, Some(&bias)), run(&plain, Some(&bias)));
    assert_eq!(run(&packed, None), run(&plain, None));
}

#[test]
fn the_gradient_under_a_rounded_weight_is_that_of_the_weight_as_rounded() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let x = Var::from_tensor(&random(&mut rng, &[5, 70])).unwrap();
    let slope = |weight: &Weight| {
        let out = ops::linear::linear(&x, weight, None).unwrap();
        let grads = out.sum_all().unwrap().backward().unwrap();
        grads.get(&x).unwrap().to_vec2::<f32>().unwrap()
    };
    for precision in [Precision::Bf16, Precision::Int8, Precision::Int4] {
        let rounded = Weight::pack_tensor(precision, &random(&mut rng, &[40, 70])).unwrap();
        let same = Weight::pack_tensor(Precision::Exact, &rounded.to_tensor().unwrap()).unwrap();
        assert_eq!(slope(&rounded), slope(&same), "{precision:?}");
    }
}

#[test]
fn dropout_keeps_the_mean_and_repeats_its_mask() {
    let x = Tensor::ones((100, 100), DType::F32, &Device::Cpu).unwrap();
    let drop = |seed| ops::dropout::dropout(&x, 0.25, seed).unwrap().flatten_all().unwrap();
    let once = drop(1).to_vec1::<f32>().unwrap();
    assert_eq!(once, drop(1).to_vec1::<f32>().unwrap());
    assert_ne!(once, drop(2).to_vec1::<f32>().unwrap());
    let dropped = once.iter().filter(|value| **value == 0.0).count();
    assert!((2_300..2_700).contains(&dropped), "{dropped} of 10,000 dropped at 0.25");
    assert!(once.iter().all(|value| *value == 0.0 || (*value - 4.0 / 3.0).abs() < 1e-6));
}

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

#[test]
fn every_tensor_of_every_adapter_is_trained_and_no_frozen_weight_is_touched() {
    for family in ["tiny-llama", "tiny-qwen2"] {
        let decoder = Decoder::load(&fixture(family), WeightMode::Frozen).unwrap();
        let dir = fixture(&format!("oracle/{family}-plain-adapter"));
        let adapter = Arc::new(LoraAdapter::read(&dir, decoder.config(), true).unwrap());
        let tokens: Vec<u32> = (5..25).collect();
        let rows: Vec<u32> = (0..19).collect();
        let step = Step {
            tokens: &tokens,
            sequences: &[StepSequence { num_tokens: 20, num_cached_tokens: 0, block_table: &[] }],
            cache: None,
            deltas: &[DeltaRows { rows: 0..20, delta: adapter.clone() }],
            logit_rows: &[],
            dropout: None,
        };
        let hidden = decoder.hidden(&step).unwrap();
        let losses = decoder.token_losses(&hidden, &rows, &tokens[1..]).unwrap();
        let grads = losses.get(0).unwrap().sum_all().unwrap().backward().unwrap();
        let variables = adapter.variables();
        assert_eq!(variables.len(), 2 * 7 * decoder.config().num_layers, "{family}");
        for (name, variable) in variables {
            let grad =
                grads.get(&variable).unwrap_or_else(|| panic!("{family}: no gradient: {name}"));
            let size = grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(size > 0.0, "{family}: the gradient of {name} is zero");
        }
        for (name, weight) in decoder.tensors() {
            assert!(grads.get(&weight).is_none(), "{family}: a gradient of the frozen {name}");
        }
    }
}

#[test]
fn full_training_reaches_every_weight() {
    for family in ["tiny-llama", "tiny-qwen2"] {
        let decoder = Decoder::load(&fixture(family), WeightMode::Trainable).unwrap();
        let tokens: Vec<u32> = (5..25).collect();
        let step = Step {
            tokens: &tokens,
            sequences: &[StepSequence { num_tokens: 20, num_cached_tokens: 0, block_table: &[] }],
            cache: None,
            deltas: &[],
            logit_rows: &[],
            dropout: None,
        };
        let hidden = decoder.hidden(&step).unwrap();
        let losses = decoder.token_losses(&hidden, &[3, 9], &[1, 2]).unwrap();
        let grads = losses.get(0).unwrap().sum_all().unwrap().backward().unwrap();
        for (name, variable) in decoder.variables() {
            let grad =
                grads.get(&variable).unwrap_or_else(|| panic!("{family}: no gradient: {name}"));
            let size = grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            // A key's bias moves all scores of a query alike, which softmax does not see.
            assert!(size > 0.0 || name.ends_with("k_proj.bias"), "{family}: {name} is zero");
        }
    }
}

#[test]
fn a_random_model_has_the_logits_of_candle_transformers() {
    use candle_transformers::models::llama;
    let config = ModelConfig::from_json(
        r#"{"model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "max_position_embeddings": 128}"#,
    )
    .unwrap();
    let decoder = Decoder::random(config.clone(), 11).unwrap();
    let tensors = decoder.tensors().into_iter().collect();
    let builder = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let theirs = llama::Config {
        hidden_size: 64,
        intermediate_size: 96,
        vocab_size: 97,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        use_flash_attn: false,
        rms_norm_eps: 1e-5,
        rope_theta: 5000.0,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: 128,
        tie_word_embeddings: false,
    };
    let mut cache = llama::Cache::new(false, DType::F32, &theirs, &Device::Cpu).unwrap();
    let model = llama::Llama::load(builder, &theirs).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 97).collect();
    let input = Tensor::new(&tokens[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let expected = model.forward(&input, 0, &mut cache).unwrap();
    let step = Step {
        tokens: &tokens,
        sequences: &[StepSequence { num_tokens: 40, num_cached_tokens: 0, block_table: &[] }],
        cache: None,
        deltas: &[],
        logit_rows: &[39],
        dropout: None,
    };
    let ours = decoder.forward(&step).unwrap();
    let far = (ours - expected).unwrap().abs().unwrap().max_all().unwrap();
    assert!(far.to_scalar::<f32>().unwrap() < 1e-5);
}
