//! DoRA, rows of tokens and whole tables: trained, read, served, merged and written as peft 0.21.2 does
//! (`tests/fixtures/make_variants_oracle.py`).

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    ops::Range,
    path::Path,
    sync::Arc,
    sync::atomic::AtomicBool,
};

use crate::support::{MODELS, Scratch, fixture, model, oracle};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use tunesmith::{
    adapters::{LoraAdapter, LoraConfig, merged_weights, write_weights},
    data::Example,
    model::{Decoder, DeltaRows, KvCache, Projection, Step, StepSequence, WeightMode},
    train::{TrainConfig, TrainEvent, TrainJob, run},
};

/// Kinds of adapters of a model; the last is for one that has one matrix for embedding and head.
fn kinds(name: &str) -> &'static [&'static str] {
    let kinds = &["dora", "tokens", "saved", "tied"];
    if name == "tiny-llama" { kinds } else { &kinds[..3] }
}

/// Largest difference of logits from peft's, as a share of the largest logit.
const TOLERANCE: f32 = 1e-4;

fn folder(name: &str, kind: &str, when: &str) -> std::path::PathBuf {
    oracle(&format!("{name}-{kind}-{when}"))
}

fn read(name: &str, kind: &str, when: &str, trainable: bool) -> LoraAdapter {
    LoraAdapter::read(&folder(name, kind, when), &model(name), trainable).unwrap()
}

fn decoder(name: &str, mode: WeightMode) -> Decoder {
    Decoder::load(&fixture(name), mode).unwrap()
}

/// Tokens, and logits by kind.
fn logits_of_peft(name: &str) -> (Vec<u32>, HashMap<String, Vec<Vec<f32>>>) {
    let path = oracle(&format!("{name}-variants.safetensors"));
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let tokens = tensors.remove("input").unwrap().to_vec1::<i64>().unwrap();
    let tokens = tokens.into_iter().map(|token| u32::try_from(token).unwrap()).collect();
    let logits = tensors.into_iter().map(|(kind, logits)| (kind, logits.to_vec2().unwrap()));
    (tokens, logits.collect())
}

/// Logits of all rows of one whole sequence per adapter, in one batch, over a cache if `paged`.
fn batch(
    decoder: &Decoder,
    tokens: &[u32],
    adapters: &[Option<Arc<LoraAdapter>>],
    paged: bool,
) -> Vec<Vec<Vec<f32>>> {
    let length = tokens.len();
    let count = adapters.len();
    let all: Vec<u32> = tokens.repeat(count);
    let tables: Vec<Vec<u32>> =
        (0..u32::try_from(count).unwrap()).map(|index| vec![2 * index + 1, 2 * index]).collect();
    let sequences: Vec<StepSequence<'_>> = tables
        .iter()
        .map(|table| StepSequence {
            num_tokens: length,
            num_cached_tokens: 0,
            block_table: if paged { table } else { &[] },
        })
        .collect();
    let rows = |index: usize| -> Range<usize> { index * length..(index + 1) * length };
    let deltas: Vec<DeltaRows> = adapters
        .iter()
        .enumerate()
        .filter_map(|(index, adapter)| {
            Some(DeltaRows { rows: rows(index), delta: Arc::clone(adapter.as_ref()?) as _ })
        })
        .collect();
    let cache = KvCache::new(decoder.config(), 2 * count, 16).unwrap();
    let logit_rows: Vec<u32> = (0..u32::try_from(all.len()).unwrap()).collect();
    let step = Step {
        tokens: &all,
        sequences: &sequences,
        cache: paged.then_some(&cache),
        deltas: &deltas,
        logit_rows: &logit_rows,
        dropout: None,
    };
    let logits: Vec<Vec<f32>> = decoder.forward(&step).unwrap().to_vec2().unwrap();
    (0..count).map(|index| logits[rows(index)].to_vec()).collect()
}

fn assert_near(name: &str, ours: &[Vec<f32>], theirs: &[Vec<f32>]) {
    let (ours, theirs) = (ours.concat(), theirs.concat());
    assert_eq!(ours.len(), theirs.len(), "{name}");
    let largest = theirs.iter().fold(0.0_f32, |max, logit| max.max(logit.abs()));
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!((ours - theirs).abs() <= TOLERANCE * largest, "{name}: {ours}, not {theirs}");
    }
}

fn example(sequence: &Value) -> Example {
    let tokens: Vec<u32> = serde_json::from_value(sequence["tokens"].clone()).unwrap();
    let mask: Vec<u8> = serde_json::from_value(sequence["loss_mask"].clone()).unwrap();
    let loss_mask = mask.into_iter().map(|counts| counts == 1).collect();
    Example { line: 1, tokens, loss_mask, num_truncated: 0, rejected: None }
}

/// The 20 steps of the oracle, from its adapter into `output`.
fn job(name: &str, kind: &str, output: &Path) -> (TrainJob, Vec<Value>) {
    let trace = fs::read(oracle(&format!("{name}-{kind}-train.json"))).unwrap();
    let trace: Value = serde_json::from_slice(&trace).unwrap();
    let steps = trace["steps"].as_array().unwrap().clone();
    let sequences = |step: &Value| step["sequences"].as_array().unwrap().clone();
    let settings = &trace["settings"];
    let job = TrainJob {
        config: TrainConfig {
            model: name.to_owned(),
            data: "trace".into(),
            output: output.to_owned(),
            init_adapter: Some(folder(name, kind, "initial")),
            lr: settings["learning_rate"].as_f64(),
            warmup_steps: usize::try_from(settings["warmup_steps"].as_u64().unwrap()).unwrap(),
            epochs: 1.0,
            batch_size: 2,
            micro_batch_tokens: 20,
            grad_clip: settings["max_grad_norm"].as_f64().unwrap(),
            shuffle: false,
            ..TrainConfig::default()
        },
        model_dir: fixture(name),
        train: steps.iter().flat_map(sequences).map(|sequence| example(&sequence)).collect(),
        valid: Vec::new(),
        companions: Vec::new(),
        sources: Vec::new(),
    };
    (job, steps)
}

#[test]
fn twenty_steps_of_every_kind_are_those_of_peft() {
    let scratch = Scratch::new();
    for name in MODELS {
        for kind in kinds(name) {
            let output = scratch.path().join(format!("{name}-{kind}"));
            let (job, steps) = job(name, kind, &output);
            let mut expected = steps.iter();
            let mut observer = |event: &TrainEvent| {
                let TrainEvent::Step { step, loss, grad_norm, .. } = event else { return };
                let expected = expected.next().unwrap();
                let near = |what: &str, actual: f64, tolerance: f64| {
                    let expected = expected[what].as_f64().unwrap();
                    let near = (actual - expected).abs() <= tolerance;
                    assert!(near, "{name} {kind}, step {step}: {what} {actual}, not {expected}");
                };
                near("loss", *loss, 1e-4);
                near("grad_norm", *grad_norm, 1e-2);
            };
            run(&job, &mut observer, &AtomicBool::new(false)).unwrap();
            assert!(expected.next().is_none(), "{name} {kind}: fewer steps than the oracle made");

            let tensors = |dir: &Path| {
                let path = dir.join("adapter_model.safetensors");
                candle_core::safetensors::load(path, &Device::Cpu).unwrap()
            };
            let (ours, theirs) = (tensors(&output), tensors(&folder(name, kind, "final")));
            assert_eq!(ours.len(), theirs.len());
            for (tensor, theirs) in theirs {
                let difference = (&ours[&tensor] - theirs).unwrap().abs().unwrap();
                let largest: f32 =
                    difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap();
                assert!(largest < 1e-3, "{name} {kind}, {tensor}: differs by {largest}");
            }
        }
    }
}

#[test]
fn adapters_of_every_kind_are_served_in_one_batch_as_peft_serves_them_one_by_one() {
    for name in MODELS {
        let decoder = decoder(name, WeightMode::Frozen);
        let (tokens, expected) = logits_of_peft(name);
        let adapters: Vec<_> = kinds(name)
            .iter()
            .map(|kind| Some(Arc::new(read(name, kind, "final", false))))
            .collect();
        let alone: Vec<_> = adapters
            .iter()
            .map(|adapter| batch(&decoder, &tokens, std::slice::from_ref(adapter), true).remove(0))
            .collect();
        for (kind, alone) in kinds(name).iter().zip(&alone) {
            assert_near(&format!("{name} {kind}"), alone, &expected[*kind]);
        }
        let base = batch(&decoder, &tokens, &[None], true).remove(0);
        for paged in [false, true] {
            // The base before, between and behind.
            let mut mix = vec![None];
            for adapter in &adapters {
                mix.extend([adapter.clone(), None]);
            }
            let mixed = batch(&decoder, &tokens, &mix, paged);
            for (index, logits) in mixed.iter().enumerate() {
                let expected = if index % 2 == 0 { &base } else { &alone[index / 2] };
                assert!(logits == expected, "{name}, paged {paged}: sequence {index} of the mix");
            }
        }
    }
}

#[test]
fn what_was_trained_is_bit_for_bit_what_is_served_on_every_base() {
    for name in MODELS {
        let (tokens, _) = logits_of_peft(name);
        for mode in [WeightMode::Frozen, WeightMode::Int8, WeightMode::Int4] {
            let decoder = decoder(name, mode);
            for kind in kinds(name) {
                let [trained, served] = [true, false].map(|trainable| {
                    let adapter = Arc::new(read(name, kind, "final", trainable));
                    batch(&decoder, &tokens, &[Some(adapter)], false)
                });
                assert!(trained == served, "{name} {kind} {mode:?}");
            }
        }
    }
}

#[test]
fn every_kind_survives_being_written_and_says_what_peft_says() {
    let scratch = Scratch::new();
    for name in MODELS {
        for kind in kinds(name) {
            let saved = read(name, kind, "final", false);
            let dir = scratch.path().join(format!("{name}-{kind}"));
            fs::create_dir_all(&dir).unwrap();
            saved.write(&dir, name).unwrap();
            let back = LoraAdapter::read(&dir, &model(name), true).unwrap();
            assert_eq!(back.digest(), saved.digest(), "{name} {kind}");
            let config = |dir: &Path| -> Value {
                serde_json::from_slice(&fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
            };
            let (ours, theirs) = (config(&dir), config(&folder(name, kind, "final")));
            for field in ["use_dora", "use_rslora", "r", "lora_alpha", "ensure_weight_tying"] {
                assert_eq!(ours[field], theirs[field], "{name} {kind}: {field}");
            }
            let sorted = |config: &Value| {
                let mut names = config["modules_to_save"].as_array().cloned().unwrap_or_default();
                names.sort_by_key(Value::to_string);
                // PEFT also takes the end of a module's path.
                let ends = names.iter().map(|name| name.as_str().unwrap().rsplit('.').next());
                ends.map(|end| end.unwrap().to_owned()).collect::<Vec<_>>()
            };
            assert_eq!(sorted(&ours), sorted(&theirs), "{name} {kind}");
            let rows = |config: &Value| {
                let rows = &config["trainable_token_indices"];
                if rows.is_array() { json!({"embed_tokens": rows}) } else { rows.clone() }
            };
            assert_eq!(rows(&ours), rows(&theirs), "{name} {kind}");
        }
    }
}

#[test]
fn every_kind_is_merged_as_peft_merges_it() {
    let scratch = Scratch::new();
    for name in MODELS {
        let base = decoder(name, WeightMode::Frozen);
        let (tokens, expected) = logits_of_peft(name);
        for kind in kinds(name) {
            let weights: Vec<(String, Tensor)> = base
                .tensors()
                .into_iter()
                // Wide, so that only the arithmetic can differ.
                .map(|(name, weight)| (name, weight.to_dtype(candle_core::DType::F32).unwrap()))
                .collect();
            let adapter = read(name, kind, "final", false);
            let merged = merged_weights(weights, &adapter).unwrap();
            let dir = scratch.copy(&fixture(name), &format!("{name}-{kind}"));
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                if path.to_string_lossy().contains(".safetensors") {
                    fs::remove_file(path).unwrap();
                }
            }
            write_weights(&dir, &merged).unwrap();
            if adapter.unties_head() {
                let path = dir.join("config.json");
                let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
                config["tie_word_embeddings"] = json!(false);
                fs::write(path, config.to_string()).unwrap();
            }
            let merged = Decoder::load(&dir, WeightMode::Frozen).unwrap();
            let logits = batch(&merged, &tokens, &[None], false).remove(0);
            assert_near(&format!("{name} {kind}"), &logits, &expected[&format!("{kind}.merged")]);
        }
    }
}

#[test]
fn fresh_adapters_of_every_kind_change_nothing() {
    for name in MODELS {
        let decoder = decoder(name, WeightMode::Frozen);
        let (tokens, _) = logits_of_peft(name);
        let base = batch(&decoder, &tokens, &[None], false);
        let configs = [
            LoraConfig { variant: "dora".to_owned(), ..LoraConfig::default() },
            LoraConfig { token_ids: vec![300, 7], ..LoraConfig::default() },
            LoraConfig { modules_to_save: vec!["lm_head".to_owned()], ..LoraConfig::default() },
            LoraConfig {
                modules_to_save: vec!["lm_head".to_owned()],
                ensure_weight_tying: true,
                ..LoraConfig::default()
            },
        ];
        for config in configs {
            let adapter = Arc::new(LoraAdapter::fresh_on(&config, &decoder, 1).unwrap());
            let logits = batch(&decoder, &tokens, &[Some(adapter)], false);
            assert_near(&format!("{name} {config:?}"), &logits[0], &base[0]);
        }
    }
}

#[test]
fn settings_of_a_fresh_adapter_mean_what_they_mean_in_peft() {
    let pattern = |value: Value| value.as_object().unwrap().clone();
    // What make_oracle.py asks of peft for the same models.
    let llama = LoraConfig {
        rank: 4,
        alpha: 8.0,
        use_rslora: true,
        targets: vec![Projection::Q, Projection::V, Projection::Down],
        rank_pattern: pattern(json!({"layers.1.self_attn.q_proj": 2, "down_proj": 6})),
        alpha_pattern: pattern(json!({"v_proj": 3, r"layers\.0\..*down_proj": 5})),
        ..LoraConfig::default()
    };
    let qwen2 = LoraConfig {
        rank: 3,
        alpha: 6.0,
        use_rslora: true,
        targets: vec![Projection::K, Projection::O, Projection::Gate, Projection::Up],
        exclude: vec!["up_proj".to_owned()],
        layers: vec![1],
        rank_pattern: pattern(json!({"gate_proj": 5})),
        alpha_pattern: pattern(json!({"model.layers.1.self_attn.k_proj": 2})),
        ..LoraConfig::default()
    };
    for (name, config) in [("tiny-llama", llama), ("tiny-qwen2", qwen2)] {
        let ours = LoraAdapter::fresh(&config, &model(name), 1).unwrap();
        let dir = oracle(&format!("{name}-pattern-adapter"));
        let theirs = LoraAdapter::read(&dir, &model(name), false).unwrap();
        let shape = |adapter: &LoraAdapter| {
            let modules = adapter.modules().iter();
            modules.map(|(site, module)| (*site, module.rank(), module.scale)).collect::<Vec<_>>()
        };
        assert_eq!(shape(&ours), shape(&theirs), "{name}");
    }
}

#[test]
fn settings_that_cannot_be_honoured_are_refused_by_name() {
    let llama = decoder("tiny-llama", WeightMode::Frozen);
    let config = LoraConfig::default;
    let pattern = |key: &str, value: Value| [(key.to_owned(), value)].into_iter().collect();
    for (config, words) in [
        (LoraConfig { variant: "nora".to_owned(), ..config() }, ["variant", "nora"]),
        (LoraConfig { layers: vec![2], ..config() }, ["layers", "2"]),
        (
            LoraConfig { exclude: vec!["proj".to_owned(), "q_proj".to_owned()], ..config() },
            ["exclude", "proj"],
        ),
        (LoraConfig { token_ids: vec![384], ..config() }, ["token_ids", "384"]),
        (
            LoraConfig { modules_to_save: vec!["norm".to_owned()], ..config() },
            ["modules_to_save", "norm"],
        ),
        (
            LoraConfig {
                modules_to_save: vec!["embed_tokens".to_owned()],
                token_ids: vec![1],
                ..config()
            },
            ["modules_to_save", "embed_tokens"],
        ),
        (
            LoraConfig { rank_pattern: pattern("k_prj", json!(4)), ..config() },
            ["rank_pattern", "k_prj"],
        ),
        (
            LoraConfig { rank_pattern: pattern("k_proj", json!(0)), ..config() },
            ["rank_pattern.k_proj", "0"],
        ),
        (
            LoraConfig { alpha_pattern: pattern("(", json!(4)), ..config() },
            ["alpha_pattern", "parenthesis"],
        ),
    ] {
        let error = LoraAdapter::fresh_on(&config, &llama, 1).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error} lacks {words:?}");
    }
    let dora = LoraConfig { variant: "dora".to_owned(), ..config() };
    let error = LoraAdapter::fresh(&dora, llama.config(), 1).unwrap_err().to_string();
    assert!(error.contains("variant = dora"), "{error}");
}

#[test]
fn going_on_from_an_adapter_of_another_kind_is_refused_with_both_values() {
    let (defaults, nothing) = (LoraConfig::default(), BTreeSet::new());
    let dora = read("tiny-llama", "dora", "final", true);
    assert!(
        dora.check_continues(&defaults, &defaults, &nothing).is_ok(),
        "what is not said is the adapter's"
    );
    for (wanted, words) in [
        (LoraConfig { rank: 8, ..LoraConfig::default() }, "rank 3, but 8"),
        (LoraConfig { alpha: 7.0, ..LoraConfig::default() }, "alpha 6, but 7"),
        (
            LoraConfig { targets: vec![Projection::Q], ..LoraConfig::default() },
            ", up_proj, down_proj, but q_proj",
        ),
        (LoraConfig { token_ids: vec![7], ..LoraConfig::default() }, "train_tokens none, but 7"),
        (
            LoraConfig { modules_to_save: vec!["lm_head".to_owned()], ..LoraConfig::default() },
            "modules_to_save none, but lm_head",
        ),
    ] {
        let error = dora.check_continues(&wanted, &defaults, &nothing).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let plain = LoraAdapter::read(&oracle("tiny-llama-plain-adapter"), &model("tiny-llama"), true);
    let wanted = LoraConfig { variant: "dora".to_owned(), ..LoraConfig::default() };
    let error =
        plain.unwrap().check_continues(&wanted, &defaults, &nothing).unwrap_err().to_string();
    assert!(error.contains("variant lora, but dora"), "{error}");
}

#[test]
fn dora_takes_the_lengths_of_whatever_base_it_is_over() {
    // Two bases in one process, the second with other weights.
    let bases = [WeightMode::Frozen, WeightMode::Int4].map(|mode| decoder("tiny-llama", mode));
    let (tokens, _) = logits_of_peft("tiny-llama");
    let fresh = || Some(Arc::new(read("tiny-llama", "dora", "final", false)));
    let expected = bases.each_ref().map(|base| batch(base, &tokens, &[fresh()], false));
    assert!(expected[0] != expected[1]);
    let one = fresh();
    for _ in 0..2 {
        for (base, expected) in bases.iter().zip(&expected) {
            assert!(batch(base, &tokens, std::slice::from_ref(&one), false) == *expected);
        }
    }
}

#[test]
fn norms_that_were_trained_whole_are_refused_by_name() {
    let llama = decoder("tiny-llama", WeightMode::Frozen);
    let scratch = Scratch::new();
    for norm in ["input_layernorm", "post_attention_layernorm", "model.norm"] {
        let config = LoraConfig { modules_to_save: vec![norm.to_owned()], ..LoraConfig::default() };
        let error = LoraAdapter::fresh_on(&config, &llama, 1).unwrap_err().to_string();
        assert!(error.contains(norm) && error.contains("embed_tokens or lm_head"), "{error}");
        let dir = scratch.copy(&folder("tiny-llama", "saved", "final"), norm);
        let path = dir.join("adapter_config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["modules_to_save"] = json!([norm]);
        fs::write(path, config.to_string()).unwrap();
        let error = LoraAdapter::read(&dir, llama.config(), false).unwrap_err().to_string();
        assert!(error.contains(norm), "{error}");
    }
}

#[test]
fn files_that_do_not_hold_what_the_configuration_says_are_refused() {
    let scratch = Scratch::new();
    let cases: [(&str, &str, Value, &str); 6] = [
        ("dora", "use_dora", json!(false), "lora_magnitude_vector"),
        ("saved", "modules_to_save", json!(null), "lm_head.weight"),
        ("saved", "modules_to_save", json!(["lm_head", "norm"]), "norm"),
        (
            "tokens",
            "trainable_token_indices",
            json!([7, 12]),
            "has shape [3, 32], expected [2, 32]",
        ),
        ("tokens", "trainable_token_indices", json!([7, 12, 384]), "384"),
        ("tokens", "trainable_token_indices", json!([7, 7, 12]), "each once"),
    ];
    for (index, (kind, field, value, words)) in cases.into_iter().enumerate() {
        let dir = scratch.copy(&folder("tiny-llama", kind, "final"), &format!("{index}"));
        crate::support::set_field(&dir, field, value);
        let error = LoraAdapter::read(&dir, &model("tiny-llama"), false).unwrap_err().to_string();
        assert!(error.contains(words), "{error} lacks {words}");
    }
}
