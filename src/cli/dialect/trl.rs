//! TRL's command line: one flat map with the fields of `ScriptArguments`, `ModelConfig` and
//! `SFTConfig` or `DPOConfig`, the last two over transformers' `TrainingArguments`.
//!
//! Such a file does not say whether `trl sft`, `trl dpo` or an `ORPOTrainer` reads it: a flag does, or a
//! key that only one of them has.

use serde_json::{Map, Value, json};

use super::{
    Dialect,
    Rule::{self, Flag, Harmless, Ignored, Number, Read, Refused, Text},
    Theirs, Translation, optimizer, plain, quantized, schedule, validation,
};

pub(super) const DIALECT: Dialect = Dialect {
    name: "TRL",
    detect: |file| {
        const OWN: &[&str] = &[
            "model_name_or_path",
            "dataset_name",
            "datasets",
            "per_device_train_batch_size",
            "num_train_epochs",
            "output_dir",
        ];
        OWN.iter().any(|key| file.contains_key(*key))
    },
    nested: &[],
    keys: KEYS,
    finish,
};

const NO_UPLOAD: &str = "nothing is uploaded; the output is a local folder";
const NO_TRACKER: &str = "no tracker is called; events.jsonl and loss.svg are in the output";
const ONE_PROCESS: &str = "one process does the work; remove it";
const ONE_LOSS: &str = "this variant of the loss of dpo is not available; remove it";
const OWN_TEMPLATE: &str = "the base's own chat template is used, as a server will; put another one \
                            into the model folder";

const KEYS: &[(&str, Rule)] = &[
    // ScriptArguments.
    ("dataset_name", Read),
    ("datasets", Read),
    ("dataset_config", Ignored("local files have no configurations")),
    ("dataset_train_split", Read),
    ("dataset_test_split", Read),
    ("dataset_streaming", Harmless),
    ("streaming", Harmless),
    ("test_split_size", Refused("name held-out rows with --valid; remove it")),
    ("gradient_checkpointing_use_reentrant", Harmless),
    ("ignore_bias_buffers", Harmless),
    // ModelConfig.
    ("model_name_or_path", Read),
    ("model_revision", Read),
    ("dtype", Harmless),
    ("torch_dtype", Harmless),
    ("trust_remote_code", Ignored("no code of a model folder is ever run")),
    ("attn_implementation", Harmless),
    ("use_peft", Read),
    ("lora_r", Number("rank")),
    ("lora_alpha", Number("alpha")),
    ("lora_dropout", Number("dropout")),
    ("lora_target_modules", Read),
    ("lora_target_parameters", Refused("adapters are for linear layers only; remove it")),
    ("lora_modules_to_save", Read),
    ("lora_task_type", Harmless),
    ("use_rslora", Flag("rslora")),
    ("use_dora", Read),
    ("load_in_8bit", Read),
    ("load_in_4bit", Read),
    ("bnb_4bit_quant_type", Harmless),
    ("use_bnb_nested_quant", Harmless),
    ("bnb_4bit_quant_storage", Harmless),
    // SFTConfig and DPOConfig.
    ("model_init_kwargs", Harmless),
    ("chat_template_path", Refused(OWN_TEMPLATE)),
    ("dataset_text_field", Read),
    ("dataset_kwargs", Harmless),
    ("dataset_num_proc", Harmless),
    ("eos_token", Refused("the base's own end token is used, as a server will; remove it")),
    ("pad_token", Harmless),
    ("max_length", Read),
    ("max_seq_length", Read),
    ("shuffle_dataset", Harmless),
    ("packing", Flag("packing")),
    ("packing_strategy", Read),
    ("padding_free", Harmless),
    ("pad_to_multiple_of", Harmless),
    ("eval_packing", Harmless),
    ("completion_only_loss", Read),
    ("assistant_only_loss", Read),
    ("loss_type", Read),
    ("activation_offloading", Harmless),
    ("beta", Read),
    ("label_smoothing", Number("dpo_label_smoothing")),
    ("reference_free", Refused(ONE_LOSS)),
    ("rpo_alpha", Number("dpo_sft_weight")),
    ("ld_alpha", Refused(ONE_LOSS)),
    ("loss_weights", Read),
    ("use_weighting", Refused(ONE_LOSS)),
    ("discopop_tau", Harmless),
    ("f_divergence_type", Read),
    ("f_alpha_divergence_coef", Harmless),
    ("sync_ref_model", Refused("the reference is the start of the run; remove it")),
    ("ref_model_mixup_alpha", Harmless),
    ("ref_model_sync_steps", Harmless),
    ("ref_model_init_kwargs", Harmless),
    ("force_use_ref_model", Harmless),
    ("precompute_ref_log_probs", Harmless),
    ("precompute_ref_batch_size", Harmless),
    ("disable_dropout", Read),
    ("truncation_mode", Read),
    ("max_prompt_length", Ignored("a row is cut at max_length only")),
    ("max_completion_length", Ignored("a row is cut at max_length only")),
    ("use_liger_kernel", Harmless),
    ("use_liger_loss", Harmless),
    // TrainingArguments.
    ("output_dir", Text("output")),
    ("overwrite_output_dir", Flag("overwrite")),
    ("do_train", Harmless),
    ("do_eval", Harmless),
    ("do_predict", Harmless),
    ("eval_strategy", Read),
    ("evaluation_strategy", Read),
    ("eval_steps", Read),
    ("eval_delay", Harmless),
    ("eval_on_start", Harmless),
    ("eval_accumulation_steps", Harmless),
    ("per_device_train_batch_size", Read),
    ("per_device_eval_batch_size", Harmless),
    ("gradient_accumulation_steps", Read),
    ("auto_find_batch_size", Harmless),
    ("learning_rate", Number("lr")),
    ("weight_decay", Number("weight_decay")),
    ("adam_beta1", Number("beta1")),
    ("adam_beta2", Number("beta2")),
    ("adam_epsilon", Read),
    ("max_grad_norm", Number("grad_clip")),
    ("num_train_epochs", Number("epochs")),
    ("max_steps", Read),
    ("lr_scheduler_type", Read),
    ("lr_scheduler_kwargs", Refused("the schedules have no parameters here; remove it")),
    ("warmup_ratio", Read),
    ("warmup_steps", Read),
    ("optim", Read),
    ("optim_args", Refused("the optimizer is AdamW; remove it")),
    ("seed", Number("seed")),
    ("data_seed", Harmless),
    ("bf16", Harmless),
    ("fp16", Harmless),
    ("tf32", Harmless),
    ("bf16_full_eval", Harmless),
    ("fp16_full_eval", Harmless),
    ("gradient_checkpointing", Read),
    ("gradient_checkpointing_kwargs", Harmless),
    ("save_strategy", Harmless),
    ("save_steps", Read),
    ("save_total_limit", Harmless),
    ("save_only_model", Harmless),
    ("save_safetensors", Harmless),
    ("load_best_model_at_end", Flag("keep_best")),
    ("metric_for_best_model", Read),
    ("greater_is_better", Refused("the best is the lowest validation loss; remove it")),
    ("resume_from_checkpoint", Read),
    ("logging_dir", Harmless),
    ("logging_strategy", Harmless),
    ("logging_steps", Harmless),
    ("logging_first_step", Harmless),
    ("logging_nan_inf_filter", Harmless),
    ("log_level", Harmless),
    ("disable_tqdm", Harmless),
    ("report_to", Read),
    ("run_name", Harmless),
    ("project", Harmless),
    ("push_to_hub", Ignored(NO_UPLOAD)),
    ("hub_model_id", Harmless),
    ("hub_strategy", Harmless),
    ("hub_token", Harmless),
    ("hub_private_repo", Harmless),
    ("neftune_noise_alpha", Number("neftune_alpha")),
    ("label_smoothing_factor", Number("label_smoothing")),
    ("group_by_length", Flag("group_by_length")),
    ("train_sampling_strategy", Read),
    ("length_column_name", Harmless),
    ("remove_unused_columns", Harmless),
    ("dataloader_num_workers", Harmless),
    ("dataloader_pin_memory", Harmless),
    ("dataloader_drop_last", Ignored("the last step of an epoch takes the rows that are left")),
    ("dataloader_prefetch_factor", Harmless),
    ("torch_compile", Harmless),
    ("torch_empty_cache_steps", Harmless),
    ("use_cpu", Harmless),
    ("ddp_timeout", Harmless),
    ("ddp_find_unused_parameters", Harmless),
    ("include_tokens_per_second", Harmless),
    ("include_num_input_tokens_seen", Harmless),
    ("deepspeed", Refused(ONE_PROCESS)),
    ("fsdp", Refused(ONE_PROCESS)),
    ("fsdp_config", Refused(ONE_PROCESS)),
    ("full_determinism", Harmless),
    // What changes where and how fast, or what is logged, and nothing that is learned here.
    ("accelerator_config", Harmless),
    ("activation_checkpointing", Harmless),
    ("activation_checkpointing_kwargs", Harmless),
    ("average_tokens_across_devices", Harmless),
    ("batch_eval_metrics", Harmless),
    ("dataloader_in_order", Harmless),
    ("dataloader_multiprocessing_context", Harmless),
    ("dataloader_persistent_workers", Harmless),
    ("ddp_backend", Harmless),
    ("ddp_broadcast_buffers", Harmless),
    ("ddp_bucket_cap_mb", Harmless),
    ("ddp_static_graph", Harmless),
    ("debug", Harmless),
    ("enable_jit_checkpoint", Harmless),
    ("eval_do_concat_batches", Harmless),
    ("eval_use_gather_object", Harmless),
    ("generate_during_eval", Harmless),
    ("hub_always_push", Harmless),
    ("hub_revision", Harmless),
    ("ignore_data_skip", Harmless),
    ("include_for_metrics", Harmless),
    ("is_encoder_decoder", Harmless),
    ("label_names", Harmless),
    ("liger_kernel_config", Harmless),
    ("local_rank", Harmless),
    ("log_level_replica", Harmless),
    ("log_on_each_node", Harmless),
    ("optim_target_modules", Harmless),
    ("padding_value", Harmless),
    ("parallelism_config", Harmless),
    ("prediction_loss_only", Harmless),
    ("restore_callback_states_from_checkpoint", Harmless),
    ("router_aux_loss_coef", Harmless),
    ("save_on_each_node", Harmless),
    ("skip_memory_metrics", Harmless),
    ("torch_compile_backend", Harmless),
    ("torch_compile_mode", Harmless),
    ("trackio_bucket_id", Harmless),
    ("trackio_space_id", Harmless),
    ("trackio_static_space_id", Harmless),
    ("use_cache", Harmless),
];

/// What transformers and TRL do where a file says nothing.
const DEFAULTS: &[(&str, f64)] = &[
    ("epochs", 3.0),
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
    model(theirs, ours);
    let preferences = objective(theirs, ours);
    data(theirs, ours);
    loss(theirs, preferences, ours);
    let rows = theirs.number("per_device_train_batch_size").unwrap_or(8.0);
    let accumulation = theirs.number("gradient_accumulation_steps").unwrap_or(1.0);
    ours.set("batch_size", plain(rows * accumulation));
    rows_of_a_step(theirs, ours);
    course(theirs, preferences, ours);
    let report_to = theirs.list("report_to").unwrap_or_default();
    if report_to.iter().any(|name| name != "none") {
        ours.notice(format!("report_to: {NO_TRACKER}"));
    }
}

fn model(theirs: &Theirs, ours: &mut Translation) {
    if let Some(model) = theirs.text("model_name_or_path") {
        let revision = theirs.text("model_revision").filter(|revision| revision != "main");
        let at = revision.map_or(String::new(), |revision| format!("@{revision}"));
        ours.set("model", format!("{model}{at}"));
    }
    let wanted = [("load_in_4bit", "int4"), ("load_in_8bit", "int8")];
    let wanted: Vec<_> =
        wanted.into_iter().filter(|(key, _)| theirs.flag(key) == Some(true)).collect();
    if theirs.flag("use_peft") != Some(true) {
        ours.set("method", "full");
        for (key, _) in wanted {
            ours.refuse(format!(
                "{key}: only the base under an adapter can be rounded; set `use_peft: true`"
            ));
        }
        ours.notice(
            "use_peft is not true, so every weight is trained, as TRL does; for an adapter write \
             `use_peft: true`",
        );
        return;
    }
    ours.set("method", "lora");
    match wanted.as_slice() {
        [] => {}
        [(key, form)] => quantized(key, form, ours),
        _ => ours.refuse("load_in_4bit: the base has one form; remove load_in_8bit"),
    }
    let targets = theirs.list("lora_target_modules");
    if targets.is_none() {
        ours.notice(
            "lora_target_modules is not set; PEFT takes q_proj and v_proj for these models",
        );
    }
    if theirs.flag("use_dora") == Some(true) {
        ours.set("variant", "dora");
    }
    if let Some(names) = theirs.list("lora_modules_to_save") {
        ours.set("modules_to_save", names);
    }
    ours.set("targets", targets.unwrap_or_else(|| vec!["q_proj".to_owned(), "v_proj".to_owned()]));
}

/// Whether the rows are preferences.
fn objective(theirs: &Theirs, ours: &mut Translation) -> bool {
    const ONLY_DPO: &[&str] = &[
        "beta",
        "loss_weights",
        "precompute_ref_log_probs",
        "sync_ref_model",
        "reference_free",
        "rpo_alpha",
    ];
    let loss = theirs.list("loss_type").unwrap_or_default();
    let by_keys = ONLY_DPO.iter().any(|key| theirs.get(key).is_some())
        || loss.iter().any(|name| name == "sigmoid");
    let by_keys = if by_keys { "dpo" } else { "sft" };
    let objective = theirs.objective().unwrap_or(by_keys);
    match objective {
        "dpo" => pair_losses(theirs, &loss, ours),
        "orpo" => ours.set("orpo_beta", theirs.number("beta").map_or(json!(0.1), plain)),
        _ => {
            for name in loss.iter().filter(|name| !["nll", "chunked_nll"].contains(&name.as_str()))
            {
                ours.refuse(format!("loss_type: {name} is not available; use nll"));
            }
        }
    }
    if let Some(name) = theirs.text("f_divergence_type")
        && name != "reverse_kl"
    {
        ours.refuse(format!("f_divergence_type: {name} is not available; use reverse_kl"));
    }
    if let Some(name) = theirs.text("metric_for_best_model")
        && !["loss", "eval_loss"].contains(&name.as_str())
    {
        ours.refuse(format!("metric_for_best_model: {name} is not available; use eval_loss"));
    }
    ours.set("objective", objective);
    objective != "sft"
}

/// The losses of `dpo`, a list with weights: of pairs one of two, and the likelihood beside it.
fn pair_losses(theirs: &Theirs, names: &[String], ours: &mut Translation) {
    if let Some(beta) = theirs.number("beta") {
        ours.set("dpo_beta", plain(beta));
    }
    let weights: Vec<f64> = match theirs.get("loss_weights") {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_f64).collect(),
        Some(_) => theirs.number("loss_weights").into_iter().collect(),
        None => vec![1.0; names.len()],
    };
    if weights.len() != names.len().max(usize::from(!weights.is_empty())) {
        ours.refuse("loss_weights: one number for each of loss_type");
        return;
    }
    let mut of_pairs = 0;
    for (name, weight) in names.iter().zip(weights) {
        match name.as_str() {
            "sft" => ours.set("dpo_sft_weight", plain(weight)),
            "sigmoid" | "robust" => {
                of_pairs += 1;
                ours.set("dpo_loss", name.as_str());
                if weight != 1.0 {
                    ours.refuse(format!(
                        "loss_weights: {name} has the weight 1 here; divide all weights, and \
                         multiply the learning rate, by {weight}"
                    ));
                }
            }
            _ => ours.refuse(format!(
                "loss_type: {name} is not available; use sigmoid or robust, and sft beside it"
            )),
        }
    }
    if !names.is_empty() && of_pairs != 1 {
        ours.refuse("loss_type: one of sigmoid and robust is needed");
    }
    let smoothed = theirs.number("label_smoothing").is_some_and(|smoothing| smoothing > 0.0);
    if smoothed && !names.iter().any(|name| name == "robust") {
        ours.notice(
            "label_smoothing: TRL since 1.0 ignores it with sigmoid; here it is that of conservative DPO, \
             as before",
        );
    }
}

fn data(theirs: &Theirs, ours: &mut Translation) {
    let train_split = theirs.text("dataset_train_split").filter(|split| split != "train");
    let source = |path: Value, split: Option<String>| {
        let mut source = Map::new();
        source.insert("path".to_owned(), path);
        source.extend(split.map(|split| ("split".to_owned(), split.into())));
        Value::Object(source)
    };
    if let Some(Value::Array(list)) = theirs.get("datasets") {
        let mut sources = Vec::new();
        for entry in list {
            let path = entry.get("data_files").or_else(|| entry.get("path"));
            let split = entry.get("split").and_then(Value::as_str).map(str::to_owned);
            match path {
                Some(path @ Value::String(_)) => sources.push(source(path.clone(), split)),
                _ => ours.refuse(format!("datasets: {entry} has no `path`")),
            }
        }
        ours.set("data", sources);
    } else if let Some(path) = theirs.text("dataset_name") {
        ours.set("data", source(path.clone().into(), train_split));
        let strategy = theirs.text("eval_strategy").or_else(|| theirs.text("evaluation_strategy"));
        let strategy = strategy.unwrap_or_else(|| "no".to_owned());
        let steps = theirs.number("eval_steps").or_else(|| theirs.number("logging_steps"));
        if validation("eval_strategy", &strategy, steps, ours) {
            let split = theirs.text("dataset_test_split").unwrap_or_else(|| "test".to_owned());
            ours.set("valid", json!({"path": path, "split": split}));
        }
    }
    if let Some(field) = theirs.text("dataset_text_field").filter(|field| field != "text") {
        ours.set("text_column", field);
    }
}

fn loss(theirs: &Theirs, preferences: bool, ours: &mut Translation) {
    let orpo = ours.settings.get("objective").is_some_and(|objective| objective == "orpo");
    let loss_on = if orpo {
        // Its likelihood is that of prompt and answer.
        "all"
    } else if preferences || theirs.flag("assistant_only_loss") == Some(true) {
        "assistant"
    } else {
        match theirs.flag("completion_only_loss") {
            Some(true) => "assistant",
            Some(false) => "all",
            None => "auto",
        }
    };
    ours.set("loss_on", loss_on);
    // An explicit null is no limit; the model's context is one all the same.
    const NO_LIMIT: f64 = 1e9;
    let key = if theirs.entries().any(|(key, _)| key == "max_seq_length") {
        "max_seq_length"
    } else {
        "max_length"
    };
    let given = theirs.entries().any(|(name, _)| name == key);
    let default = if given { NO_LIMIT } else { 1024.0 };
    ours.set("max_length", plain(theirs.number(key).unwrap_or(default)));
    if let Some(mode) = theirs.text("truncation_mode")
        && mode != "keep_start"
    {
        ours.notice(format!(
            "truncation_mode: {mode} is keep_start here: a long row loses its end"
        ));
    }
    if preferences && theirs.flag("disable_dropout") != Some(false) {
        ours.set("dropout", 0);
    }
}

/// What makes a row, in which order rows come, and what of them is kept for the backward pass.
fn rows_of_a_step(theirs: &Theirs, ours: &mut Translation) {
    if theirs.flag("packing") == Some(true)
        && let Some(strategy) = theirs.text("packing_strategy")
        && strategy != "bfd"
    {
        ours.refuse(format!("packing_strategy: {strategy} is not available; use bfd"));
    }
    match theirs.text("train_sampling_strategy").as_deref() {
        None | Some("random") => {}
        Some("sequential") => ours.set("shuffle", false),
        Some("group_by_length") => ours.set("group_by_length", true),
        Some(other) => ours.refuse(format!(
            "train_sampling_strategy: {other} is not available; use random, sequential or \
             group_by_length"
        )),
    }
    if let Some(checkpointing) = theirs.flag("gradient_checkpointing") {
        ours.set("recompute", if checkpointing { "block" } else { "none" });
    }
}

fn course(theirs: &Theirs, preferences: bool, ours: &mut Translation) {
    let default = if preferences { 1e-6 } else { 2e-5 };
    ours.settings.entry("lr").or_insert_with(|| plain(default));
    // Below 1 the steps are a share, since version 5 of transformers.
    let (mut ratio, mut steps) = (theirs.number("warmup_ratio").unwrap_or(0.0), 0.0);
    match theirs.number("warmup_steps") {
        Some(share) if share > 0.0 && share < 1.0 => ratio = share,
        Some(number) => steps = number,
        None => {}
    }
    ours.set("warmup_ratio", plain(ratio));
    ours.set("warmup_steps", plain(steps));
    let name = theirs.text("lr_scheduler_type").unwrap_or_else(|| "linear".to_owned());
    schedule("lr_scheduler_type", &name, ours);
    if let Some(name) = theirs.text("optim") {
        optimizer("optim", &name, ours);
    }
    if let Some(epsilon) = theirs.number("adam_epsilon")
        && epsilon != 1e-8
    {
        ours.refuse(format!("adam_epsilon: {epsilon} is not available; AdamW has 1e-8 here"));
    }
    if let Some(steps) = theirs.number("max_steps").filter(|steps| *steps > 0.0) {
        ours.set("max_steps", plain(steps));
    }
    if let Some(steps) = theirs.number("save_steps").filter(|steps| *steps >= 1.0) {
        ours.set("checkpoint_every", plain(steps));
    }
    match theirs.get("resume_from_checkpoint") {
        Some(Value::Bool(resume)) => ours.set("resume", *resume),
        Some(Value::String(_)) => {
            ours.notice("resume_from_checkpoint: a run goes on from its own newest checkpoint");
            ours.set("resume", true);
        }
        _ => {}
    }
}
