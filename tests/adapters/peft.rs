//! PEFT folders: what peft saved is read, what is written here can be read back, and everything
//! else is refused with its reason and the name of the culprit.

use std::{fs, path::Path};

use crate::support::{
    MODELS, RawTensor, Scratch, config, fresh, model, oracle, read_raw, set_field, write_raw,
};
use proptest::prelude::*;
use serde_json::json;
use tunesmith::{
    adapters::{
        AdapterCard, AdapterError, CurvePoint, LoadLimits, LoraAdapter, LoraModule, check_base,
    },
    model::{Projection, Site},
};

const FIRST_TENSOR: &str = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight";
const SAVED_BY_PEFT: [&str; 4] =
    ["plain-adapter", "pattern-adapter", "train-initial", "train-final"];

fn read(dir: &Path) -> Result<LoraAdapter, AdapterError> {
    LoraAdapter::read(dir, &model("tiny-llama"), false)
}

fn module(adapter: &LoraAdapter, layer: usize, projection: Projection) -> (usize, f64) {
    let module = &adapter.modules()[&Site { layer, projection }];
    (module.rank(), module.scale)
}

fn a(module: &LoraModule) -> candle_core::Tensor {
    let [a, _] = module.matrices().unwrap();
    a
}

#[test]
fn an_adapter_written_here_reads_back_the_same() {
    let scratch = Scratch::new();
    let written = fresh(7);
    let dir = scratch.adapter("adapter", 7);
    let back = read(&dir).unwrap();
    assert_eq!(back.digest(), written.digest());
    assert_eq!(back.modules().len(), 2 * 7);
    assert_eq!(back.rank(), 4);
    assert_eq!(back.num_bytes(), written.num_bytes());
    assert!(back.variables().is_empty());
    assert_eq!(LoraAdapter::read(&dir, &model("tiny-llama"), true).unwrap().variables().len(), 28);
}

#[test]
fn all_linear_adapters_of_peft_are_read_whole() {
    for name in MODELS {
        let dir = oracle(&format!("{name}-plain-adapter"));
        let adapter = LoraAdapter::read(&dir, &model(name), false).unwrap();
        assert_eq!(adapter.modules().len(), 2 * 7);
        assert_eq!(module(&adapter, 1, Projection::Down), (4, 2.0));
    }
}

#[test]
fn ranks_and_scales_follow_the_patterns_as_in_peft() {
    // As peft 0.21 reported them for these configurations: `scaling` of each module.
    let dir = oracle("tiny-llama-pattern-adapter");
    let llama = LoraAdapter::read(&dir, &model("tiny-llama"), false).unwrap();
    assert_eq!(llama.modules().len(), 2 * 3);
    assert_eq!(module(&llama, 0, Projection::Q), (4, 8.0 / 2.0));
    assert_eq!(module(&llama, 1, Projection::Q), (2, 8.0 / 2.0_f64.sqrt()));
    assert_eq!(module(&llama, 0, Projection::V), (4, 3.0 / 2.0));
    assert_eq!(module(&llama, 0, Projection::Down), (6, 5.0 / 6.0_f64.sqrt()));
    assert_eq!(module(&llama, 1, Projection::Down), (6, 8.0 / 6.0_f64.sqrt()));

    let dir = oracle("tiny-qwen2-pattern-adapter");
    let qwen2 = LoraAdapter::read(&dir, &model("tiny-qwen2"), false).unwrap();
    assert_eq!(qwen2.modules().len(), 3);
    assert_eq!(module(&qwen2, 1, Projection::K), (3, 2.0 / 3.0_f64.sqrt()));
    assert_eq!(module(&qwen2, 1, Projection::O), (3, 6.0 / 3.0_f64.sqrt()));
    assert_eq!(module(&qwen2, 1, Projection::Gate), (5, 6.0 / 5.0_f64.sqrt()));
}

#[test]
fn what_peft_saved_survives_being_written_here() {
    let scratch = Scratch::new();
    for name in MODELS {
        for kind in SAVED_BY_PEFT {
            let saved = LoraAdapter::read(&oracle(&format!("{name}-{kind}")), &model(name), false);
            let saved = saved.unwrap();
            let dir = scratch.path().join(format!("{name}-{kind}"));
            fs::create_dir_all(&dir).unwrap();
            saved.write(&dir, name).unwrap();
            let back = LoraAdapter::read(&dir, &model(name), false).unwrap();
            assert_eq!(back.digest(), saved.digest(), "{name} {kind}");
        }
    }
}

#[test]
fn the_digest_follows_what_is_computed_and_nothing_else() {
    let scratch = Scratch::new();
    let digest = fresh(1).digest().to_owned();
    let described = scratch.adapter("described", 1);
    set_field(&described, "lora_dropout", json!(0.5));
    set_field(&described, "base_model_name_or_path", json!("elsewhere"));
    assert_eq!(read(&described).unwrap().digest(), digest);
    let scaled = scratch.adapter("scaled", 1);
    set_field(&scaled, "lora_alpha", json!(8.5));
    assert_ne!(read(&scaled).unwrap().digest(), digest);
    assert_ne!(fresh(2).digest(), digest);
}

#[test]
fn half_precision_files_are_widened() {
    let scratch = Scratch::new();
    for (dtype, narrow) in [
        ("F16", (|value| half::f16::from_f32(value).to_le_bytes()) as fn(f32) -> [u8; 2]),
        ("BF16", |value| half::bf16::from_f32(value).to_le_bytes()),
    ] {
        let dir = scratch.adapter(dtype, 3);
        let tensors: Vec<RawTensor> = read_raw(&dir)
            .into_iter()
            .map(|tensor| {
                let values =
                    tensor.data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                RawTensor { dtype, data: values.flat_map(narrow).collect(), ..tensor }
            })
            .collect();
        write_raw(&dir, &tensors);
        let (narrowed, wide) = (read(&dir).unwrap(), fresh(3));
        for (site, module) in narrowed.modules() {
            let difference = (a(module) - a(&wide.modules()[site])).unwrap().abs().unwrap();
            let difference = difference.max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(difference > 0.0 && difference < 1e-3, "{dtype} {site:?}: {difference}");
        }
    }
}

#[test]
fn a_look_ahead_in_target_modules_means_what_it_means_in_python() {
    let scratch = Scratch::new();
    let dir = scratch.adapter("adapter", 1);
    set_field(&dir, "target_modules", json!(r".*\.(?!q_proj)[a-z]+_proj"));
    let mut tensors = read_raw(&dir);
    tensors.retain(|tensor| !tensor.name.contains("q_proj"));
    write_raw(&dir, &tensors);
    assert_eq!(read(&dir).unwrap().modules().len(), 2 * 6);
}

/// A way to spoil a good adapter, with the reason it must be refused for and what must be named.
type Case = (&'static str, fn(&Path), &'static str, &'static str);

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn spoilt_tensor_files_are_refused_by_reason_and_name() {
    fn edit(dir: &Path, change: impl FnOnce(&mut Vec<RawTensor>)) {
        let mut tensors = read_raw(dir);
        change(&mut tensors);
        write_raw(dir, &tensors);
    }
    fn edit_bytes(dir: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let path = dir.join("adapter_model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }
    fn to_bin(dir: &Path) {
        let path = dir.join("adapter_model.safetensors");
        fs::rename(path, dir.join("adapter_model.bin")).unwrap();
    }
    fn remove(dir: &Path) {
        fs::remove_file(dir.join("adapter_model.safetensors")).unwrap();
    }
    let cases: &[Case] = &[
        ("no file", remove, "not_found", "adapter_model.safetensors"),
        ("a pickle beside", to_bin, "pickle", "adapter_model.bin"),
        (
            "a zip inside",
            |d| edit_bytes(d, |b| b[..4].copy_from_slice(b"PK\x03\x04")),
            "pickle",
            "",
        ),
        (
            "a bare pickle inside",
            |d| edit_bytes(d, |b| *b = b"\x80\x02ctorch".repeat(9)),
            "pickle",
            "",
        ),
        ("empty", |d| edit_bytes(d, Vec::clear), "malformed_file", "0 bytes"),
        (
            "cut in the header",
            |d| edit_bytes(d, |b| b.truncate(100)),
            "malformed_file",
            "100 bytes",
        ),
        (
            "cut in the data",
            |d| edit_bytes(d, |b| b.truncate(9000)),
            "malformed_file",
            "safetensors",
        ),
        ("trailing bytes", |d| edit_bytes(d, |b| b.push(0)), "malformed_file", "safetensors"),
        (
            "an oversized header",
            |d| edit_bytes(d, |b| b[..8].copy_from_slice(&(1_u64 << 40).to_le_bytes())),
            "too_large",
            "the header has 1099511627776 bytes",
        ),
        ("no JSON", |d| edit_bytes(d, |b| b[9] = b'?'), "malformed_file", "safetensors"),
        ("no tensors", |d| edit(d, Vec::clear), "missing_tensor", FIRST_TENSOR),
        (
            "not a number",
            |d| edit(d, |t| t[0].data[4..8].copy_from_slice(&f32::NAN.to_le_bytes())),
            "not_finite",
            "down_proj.lora_A.weight` holds NaN at element 1",
        ),
        (
            "infinity",
            |d| edit(d, |t| t[1].data[..4].copy_from_slice(&f32::INFINITY.to_le_bytes())),
            "not_finite",
            "down_proj.lora_B.weight` holds inf at element 0",
        ),
        ("integers", |d| edit(d, |t| t[0].dtype = "I32"), "wrong_dtype", FIRST_TENSOR),
        (
            "transposed",
            |d| edit(d, |t| t[0].shape.reverse()),
            "wrong_shape",
            "has shape [64, 4], expected [4, 64]",
        ),
        (
            "zero-sized",
            |d| {
                edit(d, |t| {
                    t[0].shape = vec![0, 64];
                    t[0].data.clear();
                })
            },
            "wrong_shape",
            "has shape [0, 64]",
        ),
        ("no B", |d| edit(d, |t| drop(t.remove(1))), "missing_tensor", "down_proj.lora_B.weight"),
        (
            "a layer too many",
            |d| {
                edit(d, |t| {
                    let mut extra = t[0].clone();
                    extra.name = extra.name.replace("layers.0", "layers.2");
                    t.push(extra);
                })
            },
            "unmatched_tensor",
            "model.layers.2.mlp.down_proj.lora_A.weight",
        ),
        (
            "a saved head",
            |d| {
                edit(d, |t| {
                    let name = "base_model.model.lm_head.weight".to_owned();
                    t.push(RawTensor { name, ..t[0].clone() });
                })
            },
            "unmatched_tensor",
            "base_model.model.lm_head.weight",
        ),
        ("a tensor twice", |d| edit(d, |t| t.push(t[0].clone())), "duplicate_tensor", FIRST_TENSOR),
    ];
    check_refused(cases);
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn configurations_that_change_the_forward_pass_are_refused() {
    fn config_text(dir: &Path, text: &str) {
        fs::write(dir.join("adapter_config.json"), text).unwrap();
    }
    fn remove(dir: &Path) {
        fs::remove_file(dir.join("adapter_config.json")).unwrap();
    }
    let cases: &[Case] = &[
        ("no file", remove, "not_found", "adapter_config.json"),
        ("empty", |d| config_text(d, ""), "malformed_config", "adapter_config.json"),
        ("a list", |d| config_text(d, "[]"), "malformed_config", "not a JSON object"),
        ("deep", |d| config_text(d, &"[".repeat(100_000)), "malformed_config", "recursion"),
        ("no peft_type", |d| config_text(d, r#"{"r": 4}"#), "unsupported_field", "peft_type"),
        ("IA3", |d| set_field(d, "peft_type", json!("IA3")), "unsupported_field", "peft_type"),
        (
            "DoRA without magnitudes",
            |d| set_field(d, "use_dora", json!(true)),
            "missing_tensor",
            "down_proj.lora_magnitude_vector",
        ),
        ("bias", |d| set_field(d, "bias", json!("all")), "unsupported_field", "bias"),
        (
            "a head that is not there",
            |d| set_field(d, "modules_to_save", json!(["lm_head"])),
            "missing_tensor",
            "base_model.model.lm_head.weight",
        ),
        (
            "a norm",
            |d| set_field(d, "modules_to_save", json!(["norm"])),
            "unsupported_target",
            "norm",
        ),
        (
            "PiSSA",
            |d| set_field(d, "init_lora_weights", json!("pissa_niter_4")),
            "unsupported_field",
            "pissa_niter_4",
        ),
        (
            "aLoRA",
            |d| set_field(d, "alora_invocation_tokens", json!([1, 2])),
            "unsupported_field",
            "alora_invocation_tokens",
        ),
        (
            "from the future",
            |d| set_field(d, "use_more", json!(0.5)),
            "unsupported_field",
            "`use_more` = 0.5",
        ),
        (
            "a head as target",
            |d| set_field(d, "target_modules", json!(["q_proj", "lm_head"])),
            "unsupported_target",
            "lm_head",
        ),
        (
            "another family's names",
            |d| set_field(d, "target_modules", json!(".*query_key_value")),
            "unsupported_target",
            "query_key_value",
        ),
        (
            "fewer targets than tensors",
            |d| set_field(d, "target_modules", json!(["q_proj"])),
            "unmatched_tensor",
            FIRST_TENSOR,
        ),
        (
            "a pattern that does not parse",
            |d| set_field(d, "target_modules", json!("(")),
            "malformed_config",
            "target_modules",
        ),
        (
            "a pattern that runs away",
            |d| set_field(d, "target_modules", json!(r"(?:(?=.)(.|..|...|a.)+)+\1\1x")),
            "malformed_config",
            "pattern",
        ),
        ("rank 0", |d| set_field(d, "r", json!(0)), "malformed_config", "`r` is 0"),
        ("rank 1e6", |d| set_field(d, "r", json!(1_000_000)), "rank_too_large", "1000000"),
        ("another rank", |d| set_field(d, "r", json!(5)), "wrong_shape", "expected [5, 32]"),
        ("alpha", |d| set_field(d, "lora_alpha", json!("8")), "malformed_config", "lora_alpha"),
    ];
    check_refused(cases);
}

fn check_refused(cases: &[Case]) {
    let scratch = Scratch::new();
    for (number, (name, spoil, reason, named)) in cases.iter().enumerate() {
        let dir = scratch.adapter(&number.to_string(), 1);
        spoil(&dir);
        let error = read(&dir).expect_err(name);
        assert_eq!(error.reason(), *reason, "{name}: {error}");
        assert!(error.to_string().contains(named), "{name}: `{error}` does not name {named}");
    }
}

#[test]
fn unknown_fields_that_are_off_and_harmless_ones_are_read_over() {
    let scratch = Scratch::new();
    let dir = scratch.adapter("adapter", 1);
    set_field(&dir, "use_something_new", json!(false));
    set_field(&dir, "something_config", json!({}));
    set_field(&dir, "megatron_core", json!("megatron.core"));
    set_field(&dir, "init_lora_weights", json!("gaussian"));
    assert_eq!(read(&dir).unwrap().digest(), fresh(1).digest());
}

#[test]
fn a_path_that_is_no_folder_is_not_found_and_a_pickle_by_path_is_named() {
    let scratch = Scratch::new();
    assert_eq!(read(&scratch.path().join("nowhere")).unwrap_err().reason(), "not_found");
    let pickle = scratch.path().join("adapter_model.bin");
    fs::write(&pickle, b"\x80\x02}").unwrap();
    assert_eq!(read(&pickle).unwrap_err().reason(), "pickle");
}

#[test]
fn limits_hold_for_the_file_its_header_and_the_rank() {
    let scratch = Scratch::new();
    let dir = scratch.adapter("adapter", 1);
    let limits = LoadLimits::default();
    for limits in [
        LoadLimits { file_bytes: 1000, ..limits },
        LoadLimits { header_bytes: 100, ..limits },
        LoadLimits { rank: 3, ..limits },
    ] {
        let read = LoraAdapter::read_as(&dir, &model("tiny-llama"), LoraDtype::Auto, &limits);
        let reason = read.unwrap_err().reason();
        assert!(["too_large", "rank_too_large"].contains(&reason), "{limits:?}: {reason}");
    }
}

#[test]
fn a_card_travels_beside_the_adapter_and_tells_its_base() {
    let scratch = Scratch::new();
    let dir = scratch.adapter("adapter", 1);
    assert_eq!(AdapterCard::read(&dir).unwrap(), None);
    check_base(&dir, || "anything").unwrap();
    let card = AdapterCard {
        base_model: "tiny".to_owned(),
        base_fingerprint: "f00d".to_owned(),
        configuration: json!({"rank": 4}),
        curve: vec![CurvePoint { step: 1, loss: Some(2.5), ..CurvePoint::default() }],
        ..AdapterCard::default()
    };
    card.write(&dir).unwrap();
    assert_eq!(AdapterCard::read(&dir).unwrap(), Some(card));
    check_base(&dir, || "f00d").unwrap();
    let error = check_base(&dir, || "beef").unwrap_err();
    assert_eq!(error.reason(), "wrong_base");
    assert!(error.to_string().contains("f00d") && error.to_string().contains("beef"));
    fs::write(dir.join(AdapterCard::FILE_NAME), "{").unwrap();
    assert_eq!(check_base(&dir, || "f00d").unwrap_err().reason(), "malformed_config");
}

#[test]
fn settings_that_no_adapter_can_have_are_refused() {
    for (field, config) in [
        ("rank", tunesmith::adapters::LoraConfig { rank: 0, ..config() }),
        ("alpha", tunesmith::adapters::LoraConfig { alpha: f64::NAN, ..config() }),
        ("dropout", tunesmith::adapters::LoraConfig { dropout: 1.0, ..config() }),
        ("targets", tunesmith::adapters::LoraConfig { targets: vec![], ..config() }),
    ] {
        let error = LoraAdapter::fresh(&config, &model("tiny-llama"), 1).unwrap_err();
        assert!(error.to_string().starts_with(field), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Wherever bytes are overwritten, the file is read or refused; nothing panics or hangs.
    #[test]
    fn no_bytes_in_a_tensor_file_can_do_harm(
        at in 0_usize..6000,
        bytes in prop::collection::vec(any::<u8>(), 1..12),
    ) {
        let scratch = Scratch::new();
        let dir = scratch.adapter("adapter", 1);
        let path = dir.join("adapter_model.safetensors");
        let mut file = fs::read(&path).unwrap();
        file[at..at + bytes.len()].copy_from_slice(&bytes);
        fs::write(&path, file).unwrap();
        if let Ok(adapter) = read(&dir) {
            prop_assert_eq!(adapter.modules().len(), 14);
        }
    }
}
