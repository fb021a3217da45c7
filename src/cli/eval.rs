//! `tunesmith eval`: did the tuned model beat the base and the few-shot prompt?

mod progress;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, ensure};
use clap::Args;

use self::progress::EvalProgress;
use super::{
    common::{LoadedModel, load_model},
    train::show_problems,
};
use crate::adapters::{AdapterRegistry, AdapterVersion};
use crate::data::{Row, questions, read_rows, shared_prompts};
use crate::engine::{self, EngineConfig};
use crate::eval::{
    Arm, EvalReport, Requirement, Runner, arms, html, parse_arms, report::Metadata, table,
};
use crate::model::{KvDtype, Quantization};
use crate::ops::lora_dtype::LoraDtype;
use crate::publish::{publish_file, sha256_file};

/// Memory for keys and values while evaluating, in bytes.
const KV_CACHE_BYTES: usize = 1 << 30;
/// Name of the training rows beside an evaluation file.
const TRAIN_FILE: &str = "train.jsonl";

/// Compare base, few-shot prompt and adapters on held-out rows
///
/// Every arm answers the same rows greedily, in one batch, through the engine that serves. Exit code
/// 1 if a --require does not hold.
#[derive(Args, Debug, Clone, Default)]
pub(super) struct EvalArgs {
    /// Base model: a folder in Hub layout, or owner/name[@revision] on the Hub
    #[arg(long)]
    pub(super) model: String,
    /// Adapter folder, with a name where there are several (repeatable)
    #[arg(long, value_name = "[NAME=]DIR")]
    pub(super) adapter: Vec<String>,
    /// Held-out rows, JSON lines
    #[arg(long, value_name = "FILE")]
    pub(super) data: PathBuf,
    /// Rows that few-shot prompts show [default: train.jsonl beside DATA, else rows that --limit
    /// leaves out]
    #[arg(long, value_name = "FILE")]
    pub(super) train_data: Option<PathBuf>,
    /// What to compare: base, fewshot:K, tuned (every adapter) or tuned:NAME [default: base,tuned
    /// with an adapter, else base]
    #[arg(long, value_name = "LIST")]
    pub(super) arms: Option<String>,
    /// Evaluate only the first N rows
    #[arg(long, value_name = "N")]
    pub(super) limit: Option<usize>,
    /// Most tokens of an answer [default: twice the longest reference answer]
    #[arg(long, value_name = "N")]
    pub(super) max_tokens: Option<usize>,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Write the report as one self-contained HTML page
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// Fail unless arm A is significantly better than B ('A>B', p < 0.05) or not worse ('A>=B'),
    /// by exact match or as in 'A>B:f1' (repeatable)
    #[arg(long, value_name = "A>B[:METRIC]")]
    pub(super) require: Vec<Requirement>,
    /// Rows to print side by side
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) samples: usize,
    /// Chooses the few-shot rows and seeds the bootstrap
    #[arg(long, default_value_t = 42)]
    pub(super) seed: u64,
    /// Hold the base in 8 bits, or its projections in 4: less memory, faster, a little less exact. bf16:
    /// round weights and the inputs of every product to bf16; prompts up to twice as fast on a processor
    /// with bf16 dot products
    #[arg(long, value_name = "none|bf16|int8|int4", default_value = "none")]
    pub(super) quantize: Quantization,
    /// How keys and values are held: bf16 and int8 take less memory and are a little less exact
    #[arg(long, value_name = "f32|bf16|int8", default_value = "f32")]
    pub(super) kv_dtype: KvDtype,
    /// How adapters are held: as they are (`auto`, `float32`), or rounded while they are loaded
    #[arg(long, value_name = "auto|float16|bfloat16|float32", default_value = "auto")]
    pub(super) lora_dtype: LoraDtype,
    /// Threads of the tensor operations [default: all cores]
    #[arg(long)]
    pub(super) threads: Option<usize>,
}

/// Runs the command.
///
/// # Errors
/// Flags, model, adapters, data or outputs that cannot be used, each by name.
pub(super) fn run(args: &EvalArgs) -> anyhow::Result<ExitCode> {
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let report = evaluate(args)?;
    print!("\n{}", table::render(&report));
    if args.samples > 0 {
        print!("\n{}", table::samples(&report, args.samples));
    }
    write_reports(&report, args.json.as_deref(), args.html.as_deref())?;
    let mut exit_code = ExitCode::SUCCESS;
    for requirement in &args.require {
        match requirement.check(&report)? {
            Ok(figures) => println!("required {requirement}: holds ({figures})"),
            Err(reason) => {
                eprintln!("required {requirement}: does not hold: {reason}");
                exit_code = ExitCode::FAILURE;
            }
        }
    }
    Ok(exit_code)
}

/// Everything but what is printed and written at the end.
///
/// # Errors
/// Flags, model, adapters or data that cannot be used, each by name.
pub(super) fn evaluate(args: &EvalArgs) -> anyhow::Result<EvalReport> {
    ensure!(args.limit != Some(0), "--limit must be at least 1");
    ensure!(args.max_tokens != Some(0), "--max-tokens must be at least 1");
    // What is cheap to refuse is refused before the model is read.
    let adapters = adapter_folders(&args.adapter)?;
    let arms = wanted_arms(args, &adapters)?;
    let mut rows = read_rows(&args.data).map_err(show_problems)?;
    let left_out = rows.split_off(args.limit.unwrap_or(rows.len()).min(rows.len()));
    let examples = example_rows(args, &arms, left_out)?;

    let model = load_model(&args.model, args.quantize.into())?;
    let versions = load_adapters(&model, &adapters, args.lora_dtype)?;
    let metadata = Metadata {
        model: args.model.clone(),
        model_fingerprint: model.decoder.fingerprint().to_owned(),
        adapters: (versions.iter())
            .map(|version| (version.name.clone(), version.adapter.digest().to_owned()))
            .collect(),
        data: args.data.display().to_string(),
        data_sha256: sha256_file(&args.data).with_context(|| args.data.display().to_string())?,
        ..Metadata::default()
    };
    let stop_token_ids = model.stop_token_ids();
    let config = EngineConfig::for_cache(
        model.decoder.config(),
        EngineConfig::DEFAULT_MAX_NUM_SEQS,
        KV_CACHE_BYTES,
        args.kv_dtype,
    );
    let engine = engine::spawn(Arc::new(model.decoder), config)?;
    let runner = Runner {
        engine: &engine,
        tokenizer: &model.tokenizer,
        template: &model.template,
        adapters: &versions,
        stop_token_ids: &stop_token_ids,
        max_tokens: args.max_tokens,
        seed: args.seed,
        max_pending: None,
        should_stop: &|| false,
    };
    let asked = questions(&rows);
    ensure!(!asked.is_empty(), "{} has no row with an answer", args.data.display());
    let mut progress = EvalProgress::new(arms.len());
    let report = runner.run(&arms, &asked, &examples, metadata, &mut |now| progress.show(now));
    progress.finish();
    let mut report = report?;
    warn_of_shared_rows(&mut report, &examples, &rows);
    Ok(report)
}

/// Writes the report to the files that are named, each whole or not at all.
///
/// # Errors
/// A file that cannot be written.
pub(super) fn write_reports(
    report: &EvalReport,
    json: Option<&Path>,
    html: Option<&Path>,
) -> anyhow::Result<()> {
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&report.to_json())? + "\n";
        publish_file(path, text.as_bytes())?;
        println!("wrote {}", path.display());
    }
    if let Some(path) = html {
        publish_file(path, html::render(report).as_bytes())?;
        println!("wrote {}", path.display());
    }
    Ok(())
}

/// Name and folder of each `--adapter`. A single one needs no name; of several, the folders' names
/// serve.
fn adapter_folders(given: &[String]) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut adapters: Vec<(String, PathBuf)> = Vec::new();
    for word in given {
        let (name, dir) = match word.split_once('=') {
            Some((name, dir)) => (name.to_owned(), PathBuf::from(dir)),
            None if given.len() == 1 => (arms::TUNED.to_owned(), PathBuf::from(word)),
            None => {
                let dir = PathBuf::from(word);
                let name = dir.file_name().with_context(|| format!("--adapter {word}"))?;
                (name.to_string_lossy().into_owned(), dir)
            }
        };
        ensure!(
            adapters.iter().all(|(other, _)| *other != name),
            "--adapter: two are named {name}; write NAME=DIR"
        );
        adapters.push((name, dir));
    }
    Ok(adapters)
}

/// The arms, all adapters and requirements accounted for.
fn wanted_arms(args: &EvalArgs, adapters: &[(String, PathBuf)]) -> anyhow::Result<Vec<Arm>> {
    let names: Vec<String> = adapters.iter().map(|(name, _)| name.clone()).collect();
    let default = if names.is_empty() { "base" } else { "base,tuned" };
    let arms = parse_arms(args.arms.as_deref().unwrap_or(default), &names).context("--arms")?;
    let arm_names: Vec<String> = arms.iter().map(Arm::to_string).collect();
    for requirement in &args.require {
        requirement.arms(&arm_names).context("--require")?;
    }
    Ok(arms)
}

/// The rows that few-shot prompts may show; none where no arm asks for any and no file is named.
fn example_rows(args: &EvalArgs, arms: &[Arm], left_out: Vec<Row>) -> anyhow::Result<Vec<Row>> {
    let sibling = args.data.with_file_name(TRAIN_FILE);
    let is_few_shot = arms.iter().any(|arm| matches!(arm, Arm::FewShot(_)));
    let file = match &args.train_data {
        Some(file) => Some(file),
        None => (is_few_shot && sibling != args.data && sibling.is_file()).then_some(&sibling),
    };
    match file {
        Some(file) => read_rows(file).map_err(show_problems),
        None => Ok(left_out),
    }
}

fn load_adapters(
    model: &LoadedModel,
    adapters: &[(String, PathBuf)],
    dtype: LoraDtype,
) -> anyhow::Result<Vec<Arc<AdapterVersion>>> {
    let registry = AdapterRegistry::new(model.decoder.config().clone())
        .with_base_fingerprint(model.decoder.fingerprint())
        .with_dtype(dtype);
    let load = |(name, dir): &(String, PathBuf)| {
        let place = || format!("--adapter {name}={}", dir.display());
        registry.load(name, dir, false).map(|(version, _)| version).with_context(place)
    };
    adapters.iter().map(load).collect()
}

/// Rows that were trained on measure memory.
fn warn_of_shared_rows(report: &mut EvalReport, train: &[Row], evaluated: &[Row]) {
    let shared = shared_prompts(train, evaluated);
    if !shared.is_empty() {
        report.warnings.push(format!(
            "{} of {} questions occur among the training or example rows too (line {} is line {} \
             there): they measure memory",
            shared.len(),
            evaluated.len(),
            shared[0].valid_line,
            shared[0].train_line,
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(given: &[&str]) -> anyhow::Result<Vec<(String, PathBuf)>> {
        let given: Vec<String> = given.iter().map(|word| (*word).to_owned()).collect();
        adapter_folders(&given)
    }

    #[test]
    fn one_adapter_is_the_tuned_one_and_several_have_names() {
        assert_eq!(folders(&["out/a"]).unwrap(), [("tuned".to_owned(), PathBuf::from("out/a"))]);
        let two = folders(&["out/a", "b=out/a"]).unwrap();
        assert_eq!(two[0].0, "a");
        assert_eq!(two[1], ("b".to_owned(), PathBuf::from("out/a")));
        assert!(folders(&["x/a", "y/a"]).unwrap_err().to_string().contains("two are named a"));
    }

    #[test]
    fn a_requirement_of_an_arm_that_does_not_run_is_refused_before_anything_runs() {
        let args = EvalArgs {
            arms: Some("base".to_owned()),
            require: vec!["tuned>base".parse().unwrap()],
            ..EvalArgs::default()
        };
        let error = format!("{:#}", evaluate(&args).unwrap_err());
        assert!(error.contains("--require") && error.contains("\"tuned\""), "{error}");
    }
}
