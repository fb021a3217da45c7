//! `tunesmith train`: rows in, an adapter (or a model) folder out.

mod args;

use std::{
    io::Write,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Context;

pub(super) use self::args::TrainArgs;
use super::{
    common::resolve_model,
    limits,
    progress::Progress,
    settings::layered,
    stop_signal::{stop_at_end_of_input, stop_on_signals},
};
use crate::data::{DataError, Encoder, Example, read_rows, wrong_kinds};
use crate::model::ModelConfig;
use crate::publish::sha256_file;
use crate::text::{ChatTemplate, Tokenizer};
use crate::train::{
    DataSource, Objective, Outcome, TrainConfig, TrainEvent, TrainJob, TrainSummary, run as train,
};

/// Problems of a data file that are shown before the rest is only counted.
const MAX_SHOWN_PROBLEMS: usize = 50;

/// Runs the command.
///
/// # Errors
/// Settings, data, model or output that cannot be used, each by name.
pub(super) fn run(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    // First of all: threads and memory that exist already are not held.
    limits::apply(args.nice, args.memory_limit)?;
    let config: TrainConfig = layered(args.config.as_deref(), args)?;
    config.validate()?;
    if let Some(threads) = config.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signals(&stop, args.leash)?;
    if args.leash {
        stop_at_end_of_input(&stop)?;
    }
    if args.events {
        let job = prepare(config, &|line| eprintln!("{line}"))?;
        train(&job, &mut |event| print_event(event, &stop), &stop)?;
        return Ok(ExitCode::SUCCESS);
    }
    let job = prepare(config, &|line| println!("{line}"))?;
    println!("{}", serde_json::to_string(&job.config)?);
    let mut progress = Progress::new();
    let result = train(&job, &mut |event| progress.show(event), &stop);
    progress.finish();
    print_summary(&result?);
    Ok(ExitCode::SUCCESS)
}

/// One event as a line of JSON. When nobody reads them any more, the run is to stop.
fn print_event(event: &TrainEvent, stop: &AtomicBool) {
    if let TrainEvent::Warning { message } = event {
        eprintln!("warning: {message}");
    }
    let line = serde_json::to_string(event).expect("an event is plain data") + "\n";
    let mut output = std::io::stdout().lock();
    if output.write_all(line.as_bytes()).and_then(|()| output.flush()).is_err() {
        stop.store(true, Ordering::Relaxed);
    }
}

/// Reads the data and turns it into examples; `say` gets a line or two about each file.
pub(super) fn prepare(config: TrainConfig, say: &dyn Fn(&str)) -> anyhow::Result<TrainJob> {
    let model_dir = resolve_model(&config.model)?;
    let context = || format!("loading {}", model_dir.display());
    let tokenizer = Tokenizer::from_dir(&model_dir).with_context(context)?;
    let template = ChatTemplate::from_dir(&model_dir).with_context(context)?;
    let positions =
        ModelConfig::from_dir(&model_dir).with_context(context)?.max_position_embeddings;
    let encoder = Encoder {
        tokenizer: &tokenizer,
        template: &template,
        loss_on: config.loss_on.into(),
        max_length: config.max_length.min(positions),
    };
    let mut sources = Vec::new();
    let mut read = |role, path: &Path| -> anyhow::Result<Vec<Example>> {
        let rows = read_rows(path).map_err(show_problems)?;
        let errors = wrong_kinds(&rows, config.objective == Objective::Dpo);
        if !errors.is_empty() {
            let path = path.display().to_string();
            return Err(show_problems(DataError::Rows { path, errors }));
        }
        let examples = encoder.encode_all(path, &rows).map_err(show_problems)?;
        let sha256 = sha256_file(path).with_context(|| path.display().to_string())?;
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        sources.push(DataSource { role, file, sha256, num_rows: rows.len() });
        describe(path, &examples, encoder.max_length, say);
        Ok(examples)
    };
    let train = read("train", &config.data)?;
    let valid = config.valid.as_deref().map(|path| read("valid", path)).transpose()?;
    Ok(TrainJob { config, model_dir, train, valid: valid.unwrap_or_default(), sources })
}

/// Prints every problem with its line; the error that is left says how many there were.
pub(super) fn show_problems(error: DataError) -> anyhow::Error {
    if let DataError::Rows { path, errors } = &error {
        for problem in errors.iter().take(MAX_SHOWN_PROBLEMS) {
            eprintln!("{path}:{}: {} [{}]", problem.line, problem.message, problem.code);
        }
        if errors.len() > MAX_SHOWN_PROBLEMS {
            eprintln!("... and {} more", errors.len() - MAX_SHOWN_PROBLEMS);
        }
    }
    error.into()
}

fn describe(path: &Path, examples: &[Example], max_length: usize, say: &dyn Fn(&str)) {
    let num_tokens: usize = examples.iter().map(Example::num_tokens).sum();
    let num_trained: usize = examples.iter().map(Example::num_trained).sum();
    let (name, rows) = (path.display(), examples.len());
    say(&format!("{name}: {rows} rows, {num_tokens} tokens, {num_trained} of them trained"));
    let num_cut = examples.iter().filter(|example| example.num_lost() > 0).count();
    if num_cut > 0 {
        say(&format!("{name}: {num_cut} rows are cut off at {max_length} tokens (max_length)"));
    }
}

fn print_summary(summary: &TrainSummary) {
    let TrainSummary { step, total_steps, path, digest, seconds, .. } = summary;
    let path = path.display();
    if summary.outcome == Outcome::Stopped {
        println!("stopped after step {step} of {total_steps}; the state is in {path}");
        println!("to go on, give the same command with --resume");
        return;
    }
    if summary.outcome == Outcome::TimeLimit {
        println!("the time limit ended the run after step {step} of {total_steps}");
    }
    let loss = summary.loss.map_or(String::new(), |loss| format!(", loss {loss:.4}"));
    let valid = summary.valid.map_or(String::new(), |(loss, accuracy)| {
        format!(", valid loss {loss:.4}, valid accuracy {:.1} %", accuracy * 100.0)
    });
    println!("published {path} after {step} steps in {seconds:.1} s{loss}{valid}");
    println!("digest {digest}");
}
