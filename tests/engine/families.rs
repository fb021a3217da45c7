//! Families with windows, soft caps and norms of their own: against transformers, trained as served, and
//! the same answer however a request is run and whatever the cache holds.
//! tests/fixtures/make_families.py wrote what is expected.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith::{
    adapters::{LoraAdapter, LoraConfig},
    engine::{
        EngineConfig, GenerationEvent, GenerationRequest, RequestOptions, SamplingParams, spawn,
    },
    model::{
        ARCHITECTURES, Decoder, Delta, DeltaRows, KvCache, KvDtype, ModelConfig, Projection, Step,
        StepSequence, WeightMode,
    },
};

const FAMILIES: [&str; 4] = ["mistral", "qwen2-windows", "qwen3", "gemma2"];
const KV_DTYPES: [KvDtype; 3] = [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8];
/// Scattered blocks for sixty-four positions.
const BLOCK_TABLE: [u32; 4] = [3, 0, 4, 1];

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(family)
}

fn decoder(family: &str) -> Decoder {
    Decoder::load(&folder(family), WeightMode::Frozen).unwrap()
}

/// The prompt, and what transformers makes of it: `[tokens, vocab]`.
fn oracle(family: &str) -> (Vec<u32>, Vec<Vec<f32>>) {
    let path = folder(family).join("logits.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let tokens = tensors["tokens"].to_vec1::<i64>().unwrap();
    let tokens = tokens.into_iter().map(|token| u32::try_from(token).unwrap()).collect();
    (tokens, tensors["logits"].to_vec2().unwrap())
}

/// An adapter on all projections with random A and B, trainable.
fn adapter(config: &ModelConfig, seed: u64) -> LoraAdapter {
    let (rank, alpha, targets) = (3, 6.0, Projection::ALL.to_vec());
    let lora = LoraConfig { rank, alpha, targets, ..LoraConfig::default() };
    let adapter = LoraAdapter::fresh(&lora, config, seed).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for (_, variable) in adapter.variables() {
        variable.set(&random(&mut rng, variable.dims(), 0.15)).unwrap();
    }
    adapter
}

fn random(rng: &mut ChaCha8Rng, shape: &[usize], bound: f32) -> Tensor {
    let count = shape.iter().product();
    let data: Vec<f32> = (0..count).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * bound).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// Logits of all tokens, in steps of the given sizes; without a cache if there is one step only.
fn logits(
    decoder: &Decoder,
    tokens: &[u32],
    delta: Option<&Arc<dyn Delta>>,
    (cache, chunks): (Option<&KvCache>, &[usize]),
) -> Vec<Vec<f32>> {
    let mut found = Vec::new();
    let mut start = 0;
    for size in chunks.iter().cycle() {
        let end = (start + size).min(tokens.len());
        let rows: Vec<u32> = (0..(end - start) as u32).collect();
        let table: &[u32] = if cache.is_some() { &BLOCK_TABLE[..end.div_ceil(16)] } else { &[] };
        let deltas: Vec<DeltaRows> = delta
            .map(|delta| DeltaRows { rows: 0..end - start, delta: Arc::clone(delta) })
            .into_iter()
            .collect();
        let step = Step {
            tokens: &tokens[start..end],
            sequences: &[StepSequence {
                num_tokens: end - start,
                num_cached_tokens: start,
                block_table: table,
            }],
            cache,
            deltas: &deltas,
            logit_rows: &rows,
            dropout: None,
        };
        found.extend(decoder.forward(&step).unwrap().to_vec2::<f32>().unwrap());
        start = end;
        if start == tokens.len() {
            return found;
        }
    }
    unreachable!("chunks is not empty")
}

fn whole(decoder: &Decoder, tokens: &[u32], delta: Option<&Arc<dyn Delta>>) -> Vec<Vec<f32>> {
    logits(decoder, tokens, delta, (None, &[tokens.len()]))
}

/// The largest difference, as a share of the largest expected value.
fn difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let (found, expected) = (found.concat(), expected.concat());
    let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let far = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    far.fold(0.0_f32, f32::max) / largest
}

#[test]
fn every_family_has_a_tiny_model() {
    let mut tested: Vec<String> = FAMILIES.map(|family| config(family).model_type).into();
    tested.push("llama".into());
    for architecture in ARCHITECTURES {
        assert!(tested.iter().any(|known| known == architecture.model_type));
    }
}

fn config(family: &str) -> ModelConfig {
    ModelConfig::from_dir(&folder(family)).unwrap()
}

#[test]
fn every_family_gives_the_logits_of_transformers() {
    for family in FAMILIES {
        let (tokens, expected) = oracle(family);
        let far = difference(&whole(&decoder(family), &tokens, None), &expected);
        assert!(far < 1e-5, "{family}: {far}");
    }
}

#[test]
fn old_and_new_configurations_mean_the_same() {
    for family in FAMILIES {
        let classic = fs::read_to_string(folder(family).join("config_classic.json")).unwrap();
        assert_eq!(ModelConfig::from_json(&classic).unwrap(), config(family), "{family}");
    }
}

#[test]
fn windows_are_those_of_the_configuration() {
    let windows =
        |family: &str| (0..3).map(|layer| config(family).window(layer)).collect::<Vec<_>>();
    assert_eq!(windows("mistral"), [Some(20); 3]);
    assert_eq!(windows("qwen2-windows"), [None, Some(13), Some(13)]);
    assert_eq!(windows("qwen3"), [None; 3]);
    assert_eq!(windows("gemma2"), [Some(17), None, Some(17)]);
}

#[test]
fn a_configuration_that_cannot_be_honoured_is_refused_by_name() {
    for (family, from, to, message) in [
        ("mistral", "\"sliding_window\": 20", "\"sliding_window\": 0", "sliding_window is 0"),
        ("qwen3", "full_attention", "chunked_attention", "layer type \"chunked_attention\""),
        ("gemma2", "gelu_pytorch_tanh", "relu", "hidden_activation \"relu\""),
        (
            "gemma2",
            "\"attn_logit_softcapping\": 4.0",
            "\"attn_logit_softcapping\": -4",
            "softcapping -4",
        ),
        ("gemma2", "attention\": null", "attention\": true", "use_bidirectional_attention true"),
        ("gemma2", "query_pre_attn_scalar\": 20", "query_pre_attn_scalar\": 0", "scalar 0"),
    ] {
        let text = fs::read_to_string(folder(family).join("config.json")).unwrap();
        assert!(text.contains(from), "{family}: {from}");
        let error = ModelConfig::from_json(&text.replace(from, to)).unwrap_err();
        assert!(error.contains(message), "{family}: {error}");
    }
}

#[test]
fn what_is_trained_is_served_bit_for_bit_whole_in_chunks_and_token_by_token() {
    for family in FAMILIES {
        let decoder = decoder(family);
        let (tokens, _) = oracle(family);
        let trained = Arc::new(adapter(decoder.config(), 5));
        let dir = std::env::temp_dir().join(format!("families-{family}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        trained.write(&dir, family).unwrap();
        let served = LoraAdapter::read(&dir, decoder.config(), false).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        let (trained, served): (Arc<dyn Delta>, Arc<dyn Delta>) = (trained, Arc::new(served));
        for delta in [None, Some((&trained, &served))] {
            let expected = whole(&decoder, &tokens, delta.map(|(trained, _)| trained));
            for chunks in [&[50][..], &[1], &[7, 17, 2]] {
                let cache = KvCache::new(decoder.config(), 5, 16).unwrap();
                let delta = delta.map(|(_, served)| served);
                let found = logits(&decoder, &tokens, delta, (Some(&cache), chunks));
                assert!(found == expected, "{family}, chunks {chunks:?}");
            }
        }
    }
}

#[test]
fn a_smaller_cache_moves_the_logits_a_little_and_chunks_do_not_move_them() {
    for family in FAMILIES {
        let decoder = decoder(family);
        let (tokens, expected) = oracle(family);
        for (dtype, bound) in [(KvDtype::Bf16, 0.02), (KvDtype::Int8, 0.05)] {
            let run = |chunks: &[usize]| {
                let cache = KvCache::with_dtype(decoder.config(), 5, 16, dtype).unwrap();
                logits(&decoder, &tokens, None, (Some(&cache), chunks))
            };
            let at_once = run(&[50]);
            let far = difference(&at_once, &expected);
            assert!(far > 1e-5 && far < bound, "{family}, {dtype:?}: {far}");
            for chunks in [&[1][..], &[7, 17, 2]] {
                assert!(run(chunks) == at_once, "{family}, {dtype:?}, chunks {chunks:?}");
            }
        }
    }
}

#[test]
fn documents_packed_into_one_step_have_the_losses_and_gradients_that_they_have_alone() {
    for family in FAMILIES {
        let decoder = decoder(family);
        let (tokens, _) = oracle(family);
        let adapter = Arc::new(adapter(decoder.config(), 8));
        let run = |documents: &[&[u32]]| {
            let tokens = documents.concat();
            let sequences: Vec<_> = documents
                .iter()
                .map(|document| StepSequence {
                    num_tokens: document.len(),
                    num_cached_tokens: 0,
                    block_table: &[],
                })
                .collect();
            let step = Step {
                tokens: &tokens,
                sequences: &sequences,
                cache: None,
                deltas: &[DeltaRows { rows: 0..tokens.len(), delta: adapter.clone() }],
                logit_rows: &[],
                dropout: None,
            };
            let hidden = decoder.hidden(&step).unwrap();
            let rows: Vec<u32> = (0..tokens.len() as u32).collect();
            let losses = decoder.token_losses(&hidden, &rows, &tokens).unwrap().get(0).unwrap();
            (losses.to_vec1::<f32>().unwrap(), losses.sum_all().unwrap().backward().unwrap())
        };
        let documents = [&tokens[..23], &tokens[23..30], &tokens[30..]];
        let (packed, packed_grads) = run(&documents);
        let alone = documents.map(|document| run(&[document]));
        let losses: Vec<f32> = alone.iter().flat_map(|(losses, _)| losses.clone()).collect();
        assert_eq!(packed, losses, "{family}");
        for (name, variable) in adapter.variables() {
            let mut sum = variable.as_tensor().zeros_like().unwrap();
            for (_, grads) in &alone {
                sum = (sum + grads.get(&variable).unwrap()).unwrap();
            }
            let size = length(&sum);
            let far = length(&(sum - packed_grads.get(&variable).unwrap()).unwrap());
            assert!(far < 1e-5 * size, "{family}, {name}: {far} of {size}");
        }
    }
}

fn length(x: &Tensor) -> f64 {
    let x = x.to_dtype(DType::F64).unwrap();
    x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

/// The mean loss of some tokens of the prompt.
fn loss(decoder: &Decoder, tokens: &[u32], delta: Option<&Arc<dyn Delta>>) -> Tensor {
    let all = 0..tokens.len();
    let deltas: Vec<DeltaRows> =
        delta.map(|delta| DeltaRows { rows: all, delta: Arc::clone(delta) }).into_iter().collect();
    let step = Step {
        tokens,
        sequences: &[StepSequence {
            num_tokens: tokens.len(),
            num_cached_tokens: 0,
            block_table: &[],
        }],
        cache: None,
        deltas: &deltas,
        logit_rows: &[],
        dropout: None,
    };
    let hidden = decoder.hidden(&step).unwrap();
    let rows: Vec<u32> = (0..tokens.len() as u32 - 1).collect();
    let losses = decoder.token_losses(&hidden, &rows, &tokens[1..]).unwrap();
    losses.get(0).unwrap().mean_all().unwrap()
}

/// The slope of `loss` along a random direction of each variable in turn, against its difference
/// quotient; no variable may be without a gradient.
fn check_gradients(family: &str, variables: &[(String, Var)], loss: &dyn Fn() -> Tensor) {
    let grads = loss().backward().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let value = || f64::from(loss().to_scalar::<f32>().unwrap());
    for (name, variable) in variables {
        let grad =
            grads.get(variable).unwrap_or_else(|| panic!("{family}: {name} has no gradient"));
        let size = length(grad);
        // A key's bias moves all scores of a query alike, which softmax does not see; a cap does.
        let blind = name.ends_with("k_proj.bias");
        assert!(size > 1e-7 || blind, "{family}: the gradient of {name} is zero");
        let start = variable.as_tensor().copy().unwrap();
        // Along the gradient and some noise, so that the loss moves by more than its rounding.
        let noise = random(&mut rng, grad.dims(), 1.0);
        let noise = (&noise * (size / length(&noise))).unwrap();
        let direction = ((grad + noise).unwrap() * (1.0 / size.max(1e-9))).unwrap();
        let analytic = (grad * &direction).unwrap().sum_all().unwrap();
        let analytic = f64::from(analytic.to_scalar::<f32>().unwrap());
        let step = 0.008;
        let at = |sign: f64| {
            variable.set(&(&start + (&direction * (sign * step)).unwrap()).unwrap()).unwrap();
            value()
        };
        let numeric = (at(1.0) - at(-1.0)) / (2.0 * step);
        variable.set(&start).unwrap();
        let error = (numeric - analytic).abs();
        assert!(
            error < 0.03 * size + 5e-5,
            "{family}, {name}: numeric {numeric}, analytic {analytic}, length {size}"
        );
    }
}

#[test]
fn every_tensor_of_an_adapter_has_the_gradient_of_its_forward_and_no_frozen_weight_has_one() {
    for family in FAMILIES {
        let decoder = decoder(family);
        let (tokens, _) = oracle(family);
        let adapter = Arc::new(adapter(decoder.config(), 6));
        let variables = adapter.variables();
        assert_eq!(variables.len(), 2 * 7 * decoder.config().num_layers, "{family}");
        let delta: Arc<dyn Delta> = adapter;
        check_gradients(family, &variables, &|| loss(&decoder, &tokens, Some(&delta)));
        let grads = loss(&decoder, &tokens, Some(&delta)).backward().unwrap();
        for (name, weight) in decoder.tensors() {
            assert!(grads.get(&weight).is_none(), "{family}: a gradient of the frozen {name}");
        }
    }
}

#[test]
fn full_training_has_the_gradient_of_every_weight() {
    for family in FAMILIES {
        let decoder = Decoder::load(&folder(family), WeightMode::Trainable).unwrap();
        let (tokens, _) = oracle(family);
        let variables = decoder.variables();
        assert_eq!(variables.len(), decoder.tensors().len(), "{family}");
        check_gradients(family, &variables, &|| loss(&decoder, &tokens, None));
    }
}

#[test]
fn a_greedy_answer_is_the_same_alone_batched_chunked_preempted_and_from_the_cache() {
    for family in FAMILIES {
        let decoder = Arc::new(decoder(family));
        let (tokens, _) = oracle(family);
        for kv_dtype in KV_DTYPES {
            let plain = EngineConfig {
                max_queue: 64,
                max_step: Duration::from_secs(10),
                speculate: 0,
                prefix_cache: false,
                ..EngineConfig::for_cache(decoder.config(), 8, 1 << 24, kv_dtype)
            };
            let ask = |config: &EngineConfig, prompts: &[&[u32]]| -> Vec<Vec<u32>> {
                let engine = spawn(decoder.clone(), config.clone()).unwrap();
                let streams: Vec<_> = prompts
                    .iter()
                    .map(|prompt| {
                        let request = GenerationRequest {
                            prompt: prompt.to_vec(),
                            adapter: None,
                            sampling: SamplingParams::greedy(),
                            max_tokens: 40,
                            stop_token_ids: vec![],
                            score_prompt: false,
                            options: RequestOptions::default(),
                        };
                        engine.generate(request).unwrap()
                    })
                    .collect();
                streams
                    .into_iter()
                    .map(|mut stream| {
                        let mut answer = Vec::new();
                        while let Some(event) = stream.blocking_next() {
                            match event {
                                GenerationEvent::Token { id, .. } => answer.push(id),
                                GenerationEvent::Failed { message } => panic!("{message}"),
                                GenerationEvent::PromptScores(_)
                                | GenerationEvent::Finished { .. } => {}
                            }
                        }
                        answer
                    })
                    .collect()
            };
            let prompts = [&tokens[..], &tokens[..33], &tokens[20..], &tokens[..33], &tokens[..49]];
            let alone: Vec<_> = prompts.iter().flat_map(|prompt| ask(&plain, &[*prompt])).collect();
            for (what, config) in [
                ("batched", plain.clone()),
                ("chunked", EngineConfig { max_batch_tokens: 9, ..plain.clone() }),
                ("preempted", EngineConfig { num_blocks: 9, ..plain.clone() }),
                (
                    "cached and guessed",
                    EngineConfig { prefix_cache: true, speculate: 4, ..plain.clone() },
                ),
            ] {
                assert_eq!(ask(&config, &prompts), alone, "{family}, {kv_dtype:?}, {what}");
            }
        }
    }
}
