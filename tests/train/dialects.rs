//! Configuration files of TRL and AutoTrain, given to `tunesmith train` as they are.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use crate::common::{TempDir, fixture};
use serde_json::{Value, json};

fn train(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .current_dir(dir)
        .arg("train")
        .args(arguments)
        .env("TEST_MODEL", fixture("tiny-llama"))
        .env_remove("HF_TOKEN")
        .env_remove("HF_USERNAME")
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The error output of a run that must fail.
fn refusal(output: &Output) -> String {
    assert!(!output.status.success(), "{}", stdout(output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn write_rows(path: &Path, rows: &[Value]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    fs::write(path, lines.join("\n")).unwrap();
}

fn chat_rows(count: usize) -> Vec<Value> {
    let row = |index: usize| {
        json!({"messages": [{"role": "user", "content": format!("question {index}")},
            {"role": "assistant", "content": format!("answer {index}")}]})
    };
    (0..count).map(row).collect()
}

/// A folder with a configuration of `tests/fixtures/configs` in it, some words replaced.
fn with_config(name: &str, changes: &[(&str, &str)]) -> TempDir {
    let dir = TempDir::new();
    let mut text = fs::read_to_string(fixture("configs").join(name)).unwrap();
    for (from, to) in changes {
        assert!(text.contains(from), "{from} is not in {name}");
        text = text.replace(from, to);
    }
    fs::write(dir.join("theirs.yaml"), text).unwrap();
    dir
}

/// The settings that a published run had.
fn settings(output: &Path) -> Value {
    let card = fs::read(output.join("tunesmith_card.json")).unwrap();
    let card: Value = serde_json::from_slice(&card).unwrap();
    card["configuration"]["settings"].clone()
}

fn assert_settings(settings: &Value, expected: &Value) {
    for (key, value) in expected.as_object().unwrap() {
        let same = match (value.as_f64(), settings[key].as_f64()) {
            (Some(one), Some(other)) => one == other,
            _ => settings[key] == *value,
        };
        assert!(same, "{key} is {}, not {value}", settings[key]);
    }
}

#[test]
fn a_trl_file_trains_as_it_is_and_says_what_it_means() {
    let dir = with_config("trl_sft.yaml", &[]);
    write_rows(&dir.join("data/train.jsonl"), &chat_rows(16));
    write_rows(&dir.join("data/test.jsonl"), &chat_rows(4));
    let output = train(&dir.0, &["--config", "theirs.yaml"]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("theirs.yaml is a configuration of TRL; here it means"), "{text}");
    assert!(text.contains("  rank: 16\n") && text.contains("  lr: 0.0001\n"), "{text}");
    assert!(text.contains("valid: 4 rows ask what a training row asks"), "{text}");
    let expected = json!({"rank": 16, "alpha": 32, "dropout": 0.05, "lr": 1e-4, "epochs": 3,
        "batch_size": 8, "loss_on": "assistant", "eval_every": 50, "schedule": "linear",
        "warmup_steps": 0, "warmup_ratio": 0, "max_length": 1024, "method": "lora"});
    assert_settings(&settings(&dir.join("out")), &expected);
}

#[test]
fn an_autotrain_file_trains_with_its_defaults_and_says_what_it_cannot_do() {
    let model = fixture("tiny-llama").display().to_string();
    let changes = [
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", model.as_str()),
        ("HuggingFaceH4/no_robots", "rows"),
        ("valid_split: null", "valid_split: test"),
    ];
    let dir = with_config("autotrain_sft.yaml", &changes);
    write_rows(&dir.join("rows/train.jsonl"), &chat_rows(20));
    write_rows(&dir.join("rows/test.jsonl"), &chat_rows(2));
    let output = train(&dir.0, &["--config", "theirs.yaml"]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for expected in [
        "params.optimizer: paged_adamw_8bit is AdamW",
        "hub.push_to_hub: nothing is uploaded",
        "params.merge_adapter: the adapter is published; `tunesmith merge`",
        "params.quantization: the base is rounded as `--quantize int4` does it",
        "without effect here: ",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
    let settings = settings(&dir.join("autotrain-smollm2-finetune"));
    // 20 rows in steps of 8: an epoch has three.
    let expected = json!({"rank": 16, "alpha": 32, "dropout": 0.05, "lr": 1e-5, "epochs": 2,
        "batch_size": 8, "loss_on": "all", "warmup_ratio": 0.1, "max_length": 2048,
        "eval_every": 3, "text_column": "messages", "quantize": "int4"});
    assert_settings(&settings, &expected);
}

#[test]
fn a_base_in_few_bits_is_trained_over_as_either_tool_asks_and_a_flag_wins() {
    let dir = TempDir::new();
    let model = fixture("tiny-llama");
    write_rows(&dir.join("rows/train.jsonl"), &chat_rows(4));
    let trl = |more: &str| {
        let model = model.display();
        format!(
            "model_name_or_path: {model}\ndataset_name: rows\nuse_peft: true\nmax_steps: 1\n{more}"
        )
    };
    for (name, keys, flags, expected) in [
        ("four", "load_in_4bit: true", [].as_slice(), "int4"),
        ("eight", "load_in_8bit: true\nload_in_4bit: false", &[], "int8"),
        ("flag", "load_in_4bit: true", &["--quantize", "none"], "none"),
        ("plain", "load_in_4bit: false", &[], "none"),
    ] {
        fs::write(dir.join("theirs.yaml"), trl(keys)).unwrap();
        let all = [&["--config", "theirs.yaml", "--output", name], flags].concat();
        let output = train(&dir.0, &all);
        let text = stdout(&output);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(text.contains("the base is rounded as `--quantize"), keys.contains("bit: true"));
        assert_eq!(settings(&dir.join(name))["quantize"], expected, "{name}");
    }
    for (keys, expected) in [
        ("load_in_4bit: true\nload_in_8bit: true", "load_in_4bit: the base has one form"),
        ("load_in_4bit: true\nuse_peft: false", "load_in_4bit: only the base under an adapter"),
    ] {
        let yaml =
            trl(keys).replacen("use_peft: true\n", "", usize::from(keys.contains("use_peft")));
        fs::write(dir.join("theirs.yaml"), yaml).unwrap();
        let error = refusal(&train(&dir.0, &["--config", "theirs.yaml", "--output", "out"]));
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn numbers_may_be_strings_and_what_is_not_said_has_the_other_tools_default() {
    let dir = TempDir::new();
    let yaml = format!(
        "task: llm\nbase_model: {}\nproject_name: out\nlog: none\nbackend: local-cli\n\
         data:\n  path: rows\n  train_split: train\n  valid_split: none\n  chat_template: none\n  \
         column_mapping:\n    text_column: body\nparams:\n  trainer: default\n  lr: '3e-5'\n  \
         epochs: '2'\n  batch_size: '1'\n  gradient_accumulation: \"2\"\n  quantization: none\n",
        fixture("tiny-llama").display()
    );
    fs::write(dir.join("theirs.yaml"), yaml).unwrap();
    // AutoTrain looks for CSV before anything else.
    fs::create_dir_all(dir.join("rows")).unwrap();
    fs::write(dir.join("rows/train.csv"), "id,body\n1,\"one, two\nthree\"\n2,four\n").unwrap();
    fs::write(dir.join("rows/train.jsonl"), "not rows").unwrap();
    let output = train(&dir.0, &["--config", "theirs.yaml"]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("params.peft is not true, so every weight is trained"), "{text}");
    let expected = json!({"method": "full", "lr": 3e-5, "epochs": 2, "batch_size": 2,
        "max_length": 2048, "warmup_ratio": 0.1, "valid": null});
    assert_settings(&settings(&dir.join("out")), &expected);
}

#[test]
fn preferences_of_either_tool_train_dpo() {
    let rows: Vec<Value> = (0..4)
        .map(|n| {
            json!({"question": [{"role": "user", "content": format!("q{n}")}],
            "good": [{"role": "assistant", "content": "yes"}],
            "bad": [{"role": "assistant", "content": "no"}]})
        })
        .collect();
    let dir = TempDir::new();
    write_rows(&dir.join("rows/train.jsonl"), &rows);
    let autotrain = format!(
        "task: llm-dpo\nbase_model: {}\nproject_name: out\nlog: none\nbackend: local\n\
         data: {{path: rows, train_split: train, valid_split: null, chat_template: tokenizer, \
         column_mapping: {{prompt_text_column: question, text_column: good, \
         rejected_text_column: bad}}}}\nparams: {{peft: true, dpo_beta: 0.2, scheduler: constant}}\n",
        fixture("tiny-llama").display()
    );
    fs::write(dir.join("theirs.yaml"), autotrain).unwrap();
    let output = train(&dir.0, &["--config", "theirs.yaml"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected = json!({"objective": "dpo", "dpo_beta": 0.2, "loss_on": "assistant",
        "schedule": "constant", "warmup_ratio": 0});
    assert_settings(&settings(&dir.join("out")), &expected);

    let trl = "model_name_or_path: ${TEST_MODEL}\ndataset_name: rows\nuse_peft: yes\nbeta: 0.05\n\
               loss_type: [sigmoid]\nmax_steps: 2\noptim: adamw_torch_fused\noutput_dir: trl\n";
    fs::write(dir.join("trl.yaml"), trl).unwrap();
    let columns = "question=prompt,good=chosen,bad=rejected";
    let output = train(&dir.0, &["--config", "trl.yaml", "--columns", columns]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected = json!({"objective": "dpo", "dpo_beta": 0.05, "lr": 1e-6, "max_steps": 2,
        "targets": ["q_proj", "v_proj"], "dropout": 0});
    assert_settings(&settings(&dir.join("trl")), &expected);
}

#[test]
fn odds_ratios_and_variants_of_dpo_of_either_tool_train() {
    let rows: Vec<Value> = (0..4)
        .map(|n| {
            json!({"prompt": [{"role": "user", "content": format!("q{n}")}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}]})
        })
        .collect();
    let dir = TempDir::new();
    write_rows(&dir.join("rows/train.jsonl"), &rows);
    write_rows(&dir.join("rows/test.jsonl"), &rows);
    let model = fixture("tiny-llama").display().to_string();
    let autotrain = format!(
        "task: llm-orpo\nbase_model: {model}\nproject_name: out\nlog: none\nbackend: local\n\
         data: {{path: rows, train_split: train, valid_split: test, chat_template: tokenizer, \
         column_mapping: {{prompt_text_column: prompt, text_column: chosen, \
         rejected_text_column: rejected}}}}\nparams: {{peft: true, dpo_beta: 0.2, epochs: 2}}\n"
    );
    fs::write(dir.join("theirs.yaml"), autotrain).unwrap();
    let output = train(&dir.0, &["--config", "theirs.yaml"]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("note: params.dpo_beta: AutoTrain gives orpo none"), "{text}");
    let expected = json!({"objective": "orpo", "orpo_beta": 0.1, "loss_on": "all", "lr": 3e-5,
        "keep_best": true, "eval_every": 1});
    assert_settings(&settings(&dir.join("out")), &expected);

    let trl =
        "model_name_or_path: ${TEST_MODEL}\ndataset_name: rows\nuse_peft: yes\nmax_steps: 1\n";
    let variants = [
        ("orpo", "beta: 0.3\n", json!({"objective": "orpo", "orpo_beta": 0.3, "loss_on": "all"})),
        (
            "dpo",
            "loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.5]\nneftune_noise_alpha: 5\n",
            json!({"objective": "dpo", "dpo_sft_weight": 0.5, "neftune_alpha": 5}),
        ),
        (
            "dpo",
            "loss_type: robust\nlabel_smoothing: 0.2\n",
            json!({"dpo_loss": "robust", "dpo_label_smoothing": 0.2}),
        ),
        ("dpo", "rpo_alpha: 1.0\n", json!({"dpo_loss": "sigmoid", "dpo_sft_weight": 1})),
    ];
    for (index, (objective, more, expected)) in variants.iter().enumerate() {
        fs::write(dir.join("trl.yaml"), format!("{trl}output_dir: trl{index}\n{more}")).unwrap();
        let output = train(&dir.0, &["--config", "trl.yaml", "--objective", objective]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_settings(&settings(&dir.join(&format!("trl{index}"))), expected);
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name_and_all_at_once() {
    let dir = TempDir::new();
    let refused = |name: &str, yaml: &str| {
        fs::write(dir.join(name), yaml).unwrap();
        refusal(&train(&dir.0, &["--config", name]))
    };
    let error = refused(
        "trl.yaml",
        "model_name_or_path: x\ndataset_name: y\noutput_dir: z\nuse_peft: true\nuse_dora: true\n\
         lora_target_parameters: [w]\n\
         loss_weights: [1, 2]\nlr_scheduler_type: polynomial\nloss_type: ipo\nlora_r: many\n\
         deepspeed: zero3.json\nlearning_rte: 1\nmetric_for_best_model: bleu\n",
    );
    for expected in [
        "trl.yaml: as a configuration of TRL:",
        "lora_target_parameters: adapters are for linear layers only",
        "loss_weights: one number for each of loss_type",
        "lr_scheduler_type: polynomial is not available",
        "metric_for_best_model: bleu is not available",
        "lora_r: \"many\" is no number",
        "deepspeed: one process",
        "learning_rte: TRL has no such key",
    ] {
        assert!(error.contains(expected), "{expected:?} is missing in\n{error}");
    }
    let error = refused(
        "autotrain.yaml",
        "task: llm-reward\nbase_model: x\nproject_name: ${NO_SUCH_VARIABLE}\nbackend: spaces-a10g\n\
         data: {path: p, train_split: t}\nparams: {model_ref: other, paddin: left}\n",
    );
    for expected in [
        "task: a reward model gives a number and cannot chat",
        "backend: spaces-a10g is a cloud",
        "project_name: the variable NO_SUCH_VARIABLE is not set",
        "params.model_ref: the reference is the start of the run",
        "params.paddin: AutoTrain has no such key",
    ] {
        assert!(error.contains(expected), "{expected:?} is missing in\n{error}");
    }
}

/// The fields of TRL 1.16's `SFTConfig`, `DPOConfig`, `ORPOConfig`, `ModelConfig`, `ScriptArguments` and
/// `DatasetMixtureConfig`, with transformers 5.23.
#[test]
fn every_key_that_trl_has_is_known() {
    let dir = TempDir::new();
    let keys = include_str!("../fixtures/trl/keys.txt");
    let nothing = keys.lines().filter(|key| *key != "model_name_or_path");
    let lines: String = nothing.map(|key| format!("{key}: null\n")).collect();
    let config = format!("model_name_or_path: nowhere\nuse_peft_or_so: true\n{lines}");
    fs::write(dir.0.join("run.yaml"), config).unwrap();
    let error = refusal(&train(&dir.0, &["--config", "run.yaml"]));
    let unknown: Vec<&str> = error.lines().filter(|line| line.contains("no such key")).collect();
    assert_eq!(unknown, ["  use_peft_or_so: TRL has no such key"], "{error}");
}

#[test]
fn a_dataset_of_the_hub_is_refused_with_what_to_do_and_a_flag_replaces_it() {
    let model = fixture("tiny-llama").display().to_string();
    let changes = [("HuggingFaceTB/SmolLM2-1.7B-Instruct", model.as_str())];
    let dir = with_config("autotrain_sft.yaml", &changes);
    let error = refusal(&train(&dir.0, &["--config", "theirs.yaml"]));
    assert!(error.contains("HuggingFaceH4/no_robots: no such file or folder"), "{error}");
    write_rows(&dir.join("mine.jsonl"), &chat_rows(3));
    let output = train(&dir.0, &["--config", "theirs.yaml", "--data", "mine.jsonl"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
