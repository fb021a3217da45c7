//! AutoTrain Advanced: `task`, `base_model`, and below them `data`, `params` and `hub`.

use serde_json::{Map, Value, json};

use super::{
    Dialect,
    Rule::{self, Flag, Harmless, Ignored, Number, Read, Refused, Text},
    Theirs, Translation, optimizer, plain, quantized, schedule, validation,
};

pub(super) const DIALECT: Dialect = Dialect {
    name: "AutoTrain",
    detect: |file| file.contains_key("task") && file.contains_key("base_model"),
    nested: &["data", "data.column_mapping", "params", "hub"],
    keys: KEYS,
    finish,
};

const NO_UPLOAD: &str = "nothing is uploaded; the adapter is a local folder";

const KEYS: &[(&str, Rule)] = &[
    ("task", Read),
    ("base_model", Text("model")),
    ("project_name", Text("output")),
    ("log", Ignored("no tracker is called; events.jsonl and loss.svg are in the output")),
    ("backend", Read),
    ("data.path", Read),
    ("data.train_split", Read),
    ("data.valid_split", Read),
    ("data.chat_template", Read),
    ("data.column_mapping", Read),
    ("data.column_mapping.text_column", Read),
    ("data.column_mapping.rejected_text_column", Read),
    ("data.column_mapping.prompt_text_column", Read),
    ("params", Read),
    ("params.trainer", Read),
    ("params.epochs", Number("epochs")),
    ("params.lr", Number("lr")),
    ("params.batch_size", Read),
    ("params.gradient_accumulation", Read),
    ("params.warmup_ratio", Number("warmup_ratio")),
    ("params.weight_decay", Number("weight_decay")),
    ("params.max_grad_norm", Number("grad_clip")),
    ("params.seed", Number("seed")),
    ("params.optimizer", Read),
    ("params.scheduler", Read),
    ("params.block_size", Read),
    ("params.model_max_length", Read),
    ("params.max_prompt_length", Read),
    (
        "params.max_completion_length",
        Refused("answers are cut at model_max_length only; remove it"),
    ),
    ("params.peft", Read),
    ("params.lora_r", Number("rank")),
    ("params.lora_alpha", Number("alpha")),
    ("params.lora_dropout", Number("dropout")),
    ("params.target_modules", Read),
    ("params.quantization", Read),
    ("params.merge_adapter", Ignored("the adapter is published; `tunesmith merge` folds it in")),
    ("params.mixed_precision", Harmless),
    ("params.padding", Harmless),
    ("params.add_eos_token", Read),
    ("params.chat_template", Read),
    ("params.eval_strategy", Read),
    ("params.logging_steps", Harmless),
    ("params.log", Harmless),
    ("params.save_total_limit", Harmless),
    ("params.auto_find_batch_size", Harmless),
    ("params.disable_gradient_checkpointing", Read),
    ("params.use_flash_attention_2", Harmless),
    ("params.unsloth", Harmless),
    ("params.distributed_backend", Ignored("one process does the work")),
    ("params.model_ref", Refused("the reference is the start of the run; remove it")),
    ("params.dpo_beta", Number("dpo_beta")),
    ("params.text_column", Read),
    ("params.rejected_text_column", Read),
    ("params.prompt_text_column", Read),
    ("params.push_to_hub", Ignored(NO_UPLOAD)),
    ("params.username", Harmless),
    ("params.token", Harmless),
    ("hub", Harmless),
    ("hub.username", Harmless),
    ("hub.token", Harmless),
    ("hub.push_to_hub", Ignored(NO_UPLOAD)),
    // Of the command line's own files; no setting here either.
    ("params.rope_scaling_type", Refused("the model's own positions are used; remove it")),
    ("params.resume", Flag("resume")),
];

/// What AutoTrain does where a file says nothing.
const DEFAULTS: &[(&str, f64)] = &[
    ("epochs", 1.0),
    ("lr", 3e-5),
    ("warmup_ratio", 0.1),
    ("weight_decay", 0.0),
    ("grad_clip", 1.0),
    ("seed", 42.0),
    ("rank", 16.0),
    ("alpha", 32.0),
    ("dropout", 0.05),
    ("dpo_beta", 0.1),
    ("orpo_beta", 0.1),
];

fn finish(theirs: &Theirs, ours: &mut Translation) {
    ours.set_defaults(DEFAULTS);
    backend(theirs, ours);
    let preferences = task(theirs, ours);
    data(theirs, preferences, ours);
    adapter(theirs, ours);
    sizes(theirs, preferences, ours);
    if theirs.flag("params.disable_gradient_checkpointing") == Some(true) {
        ours.set("recompute", "none");
    }
    if let Some(name) = theirs.text("params.optimizer") {
        optimizer("params.optimizer", &name, ours);
    }
    let name = theirs.text("params.scheduler").unwrap_or_else(|| "linear".to_owned());
    schedule("params.scheduler", &name, ours);
}

fn backend(theirs: &Theirs, ours: &mut Translation) {
    if let Some(backend) = theirs.text("backend")
        && !backend.starts_with("local")
    {
        ours.refuse(format!("backend: {backend} is a cloud; write `backend: local` to train here"));
    }
}

/// Whether the rows are preferences.
fn task(theirs: &Theirs, ours: &mut Translation) -> bool {
    let task = theirs.text("task").unwrap_or_default().replace(':', "-");
    let trainer = theirs.text("params.trainer");
    let trainer = match task.as_str() {
        "llm" => trainer.as_deref().unwrap_or("default"),
        other => other.strip_prefix("llm-").unwrap_or(other),
    };
    let objective = match trainer {
        "sft" | "generic" | "default" => "sft",
        "dpo" | "orpo" => trainer,
        "reward" => {
            ours.refuse(
                "task: a reward model gives a number and cannot chat; use llm-dpo, which learns from \
                 the same rows",
            );
            "dpo"
        }
        _ => {
            ours.refuse(format!(
                "task: {task} trains no language model; llm-sft, llm-generic, llm-dpo and llm-orpo do"
            ));
            "sft"
        }
    };
    ours.set("objective", objective);
    // Both of AutoTrain's supervised trainers count every token, and orpo those of prompts as well.
    ours.set("loss_on", if objective == "dpo" { "assistant" } else { "all" });
    if objective == "orpo" && theirs.get("params.dpo_beta").is_some() {
        ours.notice("params.dpo_beta: AutoTrain gives orpo none, and so it is 0.1");
    }
    objective != "sft"
}

fn data(theirs: &Theirs, preferences: bool, ours: &mut Translation) {
    let column = |name: &str| {
        theirs
            .text(&format!("data.column_mapping.{name}"))
            .or_else(|| theirs.text(&format!("params.{name}")))
    };
    let text = column("text_column").unwrap_or_else(|| "text".to_owned());
    if preferences {
        let mut columns = Map::new();
        if let Some(prompt) = column("prompt_text_column") {
            columns.insert("prompt".to_owned(), prompt.into());
        }
        columns.insert("chosen".to_owned(), text.into());
        let rejected = column("rejected_text_column").unwrap_or_else(|| "rejected".to_owned());
        columns.insert("rejected".to_owned(), rejected.into());
        ours.set("columns", Value::Object(columns));
    } else {
        ours.set("text_column", text);
    }
    let Some(path) = theirs.text("data.path") else { return };
    // A split may be `configuration:split`, as the Hub has them.
    let split = |key: &str| {
        let split = theirs.text(key)?;
        Some(split.rsplit(':').next().unwrap_or(&split).to_owned())
    };
    let train = split("data.train_split").unwrap_or_else(|| "train".to_owned());
    ours.set("data", json!({"path": path, "split": train}));
    if let Some(valid) = split("data.valid_split") {
        ours.set("valid", json!({"path": path, "split": valid}));
        let strategy = theirs.text("params.eval_strategy").unwrap_or_else(|| "epoch".to_owned());
        if validation("params.eval_strategy", &strategy, None, ours) {
            ours.set("keep_best", true);
        }
    }
    let template =
        theirs.text("data.chat_template").or_else(|| theirs.text("params.chat_template"));
    if let Some(name) = template.filter(|name| name != "tokenizer") {
        ours.notice(format!(
            "data.chat_template: {name} is not put in place of the base's own template, which a \
             server will use"
        ));
    }
    if theirs.flag("params.add_eos_token") == Some(false) {
        ours.notice("params.add_eos_token: a raw text is always ended, so that answers end");
    }
}

fn adapter(theirs: &Theirs, ours: &mut Translation) {
    if theirs.flag("params.peft") == Some(true) {
        ours.set("method", "lora");
        let targets = theirs.list("params.target_modules");
        ours.set("targets", targets.unwrap_or_else(|| vec!["all-linear".to_owned()]));
    } else {
        ours.set("method", "full");
        ours.notice(
            "params.peft is not true, so every weight is trained, as AutoTrain does; for an adapter \
             write `peft: true`",
        );
    }
    match theirs.text("params.quantization").as_deref() {
        _ if theirs.flag("params.peft") != Some(true) => {}
        Some(form @ ("int4" | "int8")) => quantized("params.quantization", form, ours),
        Some(other) => ours.refuse(format!(
            "params.quantization: {other} is not available; use int4, int8 or none"
        )),
        None if theirs.entries().all(|(key, _)| key != "params.quantization") => ours.notice(
            "params.quantization is not set; AutoTrain rounds the base to int4 then, here it stays as it \
             is unless `--quantize int4` is given",
        ),
        None => {}
    }
}

fn sizes(theirs: &Theirs, preferences: bool, ours: &mut Translation) {
    let rows = theirs.number("params.batch_size").unwrap_or(2.0);
    let accumulation = theirs.number("params.gradient_accumulation").unwrap_or(4.0);
    ours.set("batch_size", plain(rows * accumulation));
    let longest = theirs.number("params.model_max_length").unwrap_or(2048.0);
    let block = match theirs.get("params.block_size") {
        Some(Value::Array(list)) => list.first().and_then(Value::as_f64),
        Some(_) => theirs.number("params.block_size"),
        None => None,
    };
    let block = block.filter(|block| *block > 0.0 && *block < longest);
    ours.set("max_length", plain(block.unwrap_or(longest)));
    if preferences {
        if let Some(length) = theirs.number("params.max_prompt_length") {
            ours.notice(format!(
                "params.max_prompt_length: prompts keep their end beyond {length} tokens; a row is cut \
                 at {longest}"
            ));
        }
    } else {
        ours.notice(
            "AutoTrain joins rows to blocks of block_size; here a row stays a row, and batch_size \
             counts rows",
        );
    }
}
