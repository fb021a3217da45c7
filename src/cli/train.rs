//! `tunesmith train`: rows in, an adapter (or a model) folder out.

pub(super) mod args;
mod data;
mod examiner;
mod figures;
pub(super) mod forecast;
mod report_page;
mod telemetry;
mod vocabulary;

use std::{
    io::Write,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;

pub(super) use self::args::TrainArgs;
use self::{
    data::{DataReader, file_layer, say_overlap},
    examiner::EngineExaminer,
    figures::Figures,
    forecast::{dry_run, fit_free_memory, fit_memory, say_packing},
    vocabulary::{Vocabulary, vocabulary},
};
use super::{
    common::resolve_model,
    limits,
    pause_signal::pause_on_signal,
    progress::Progress,
    settings::layered,
    stop_signal::{stop_at_end_of_input, stop_on_signals},
};
use crate::data::{DataError, Encoder, questions};
use crate::model::ModelConfig;
use crate::text::ChatTemplate;
use crate::train::{
    BatchPlan, Outcome, Surroundings, SweepRow, TrainConfig, TrainError, TrainEvent, TrainJob,
    TrainSummary, candidate_settings, run_sweep, run_with,
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
    // Only events go to the standard output where they are asked for.
    let say = |line: &str| if args.events { eprintln!("{line}") } else { println!("{line}") };
    let (config, eval_each_epoch) = read_settings(args, &say)?;
    config.validate()?;
    let candidates = candidate_settings(&config)?;
    let num_candidates = candidates.len();
    let largest_rank = candidates.iter().map(|one| one.rank).max().unwrap_or(config.rank);
    if let Some(threads) = config.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signals(&stop, args.leash)?;
    let pause = pause_on_signal()?;
    if args.leash {
        stop_at_end_of_input(&stop)?;
    }
    let Prepared { mut job, mut examiner } = prepare(config, &say)?;
    if eval_each_epoch {
        job.config.eval_every = BatchPlan::new(&job.config, &job.train).steps_per_epoch();
    }
    say_packing(&job, &say);
    // The largest candidate of a sweep says what is needed.
    let rank = std::mem::replace(&mut job.config.rank, largest_rank);
    match args.memory {
        Some(budget) => fit_memory(&mut job, budget, &say)?,
        None => fit_free_memory(&mut job, args.memory_limit, &say)?,
    }
    if args.dry_run {
        dry_run(&job, &stop)?;
        if !job.config.sweep.is_empty() {
            println!(
                "a sweep of {num_candidates}: these are the figures of one, with rank {largest_rank}"
            );
        }
        return Ok(ExitCode::SUCCESS);
    }
    job.config.rank = rank;
    let figures = Figures::new();
    let _pusher = publish_figures(args, &job, &figures, &say)?;
    let around = Surroundings { examiner: Some(&mut examiner), pause: Some(&pause) };
    if args.events {
        let mut observer = |event: &TrainEvent| {
            figures.hear(event);
            print_event(event, &stop);
        };
        train(job, &mut observer, around, &stop)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}", serde_json::to_string(&job.config)?);
    let mut progress = Progress::new();
    let mut observer = |event: &TrainEvent| {
        figures.hear(event);
        progress.show(event);
    };
    let result = train(job, &mut observer, around, &stop);
    progress.finish();
    let (summary, rows) = result?;
    print_summary(&summary, &rows);
    Ok(ExitCode::SUCCESS)
}

/// One run, or those of a sweep, of which there is a row each.
fn train(
    job: TrainJob,
    observer: &mut dyn FnMut(&TrainEvent),
    mut around: Surroundings<'_>,
    stop: &AtomicBool,
) -> Result<(TrainSummary, Vec<SweepRow>), TrainError> {
    if job.config.sweep.is_empty() {
        return Ok((run_with(&job, observer, around.lend(), stop)?, Vec::new()));
    }
    let sweep = run_sweep(job, observer, around, stop)?;
    Ok((sweep.summary, sweep.rows))
}

/// Gives the figures to those who were named for it, until the pusher is dropped.
fn publish_figures(
    args: &TrainArgs,
    job: &TrainJob,
    figures: &Figures,
    say: &dyn Fn(&str),
) -> anyhow::Result<Option<telemetry::Pusher>> {
    if let Some(address) = args.metrics_addr {
        let address = telemetry::serve(address, figures.clone())?;
        say(&format!("metrics: http://{address}/metrics"));
    }
    let Some(url) = &args.otlp else { return Ok(None) };
    let output = job.config.output.display().to_string();
    let interval = Duration::from_secs(args.otlp_seconds);
    Ok(Some(telemetry::Pusher::start(url, interval, output, figures.clone())?))
}

/// The settings of all layers, and whether to validate at the end of each epoch.
fn read_settings(args: &TrainArgs, say: &dyn Fn(&str)) -> anyhow::Result<(TrainConfig, bool)> {
    let Some(path) = args.config.as_deref() else { return Ok((layered(None, args)?, false)) };
    let (layer, eval_each_epoch) = file_layer(path, args.objective.as_deref(), say)?;
    Ok((layered(Some((path, layer)), args)?, eval_each_epoch))
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

/// A run that can start, and who looks at what it makes.
pub(super) struct Prepared {
    pub(super) job: TrainJob,
    pub(super) examiner: EngineExaminer,
}

/// Reads the data and turns it into examples; `say` gets a line or two about each file.
pub(super) fn prepare(config: TrainConfig, say: &dyn Fn(&str)) -> anyhow::Result<Prepared> {
    let model_dir = resolve_model(&config.model)?;
    let context = || format!("loading {}", model_dir.display());
    let mut config = config;
    let Vocabulary { tokenizer, companions } = vocabulary(&mut config, &model_dir)?;
    let template = ChatTemplate::from_dir(&model_dir).with_context(context)?;
    let positions =
        ModelConfig::from_dir(&model_dir).with_context(context)?.max_position_embeddings;
    let encoder = Encoder {
        tokenizer: &tokenizer,
        template: &template,
        loss_on: config.encoded_tokens(),
        max_length: config.max_length.min(positions),
    };
    let reader = DataReader { config: &config, encoder, say };
    let train = reader.read("train", &config.data)?;
    let valid = config.valid.as_ref().map(|valid| reader.read("valid", valid)).transpose()?;
    let valid = valid.unwrap_or_default();
    say_overlap(&train.rows, &valid.rows, say);
    let sources = [train.files, valid.files].concat();
    let held_out = questions(&valid.rows);
    let (questions, held_out) =
        if held_out.is_empty() { (questions(&train.rows), false) } else { (held_out, true) };
    let (train, valid) = (train.examples, valid.examples);
    let job = TrainJob { config, model_dir, train, valid, companions, sources };
    let (tokenizer, template) = (Arc::new(tokenizer), Arc::new(template));
    Ok(Prepared { job, examiner: EngineExaminer { tokenizer, template, questions, held_out } })
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

fn print_summary(summary: &TrainSummary, rows: &[SweepRow]) {
    let TrainSummary { step, total_steps, path, digest, seconds, .. } = summary;
    if !rows.is_empty() {
        print!("{}", SweepRow::table(rows));
    }
    let path = path.display();
    if summary.outcome == Outcome::Stopped {
        println!("stopped after step {step} of {total_steps}; the state is in {path}");
        println!("to go on, give the same command with --resume");
        return;
    }
    if summary.outcome == Outcome::TimeLimit {
        println!("the time limit ended the run after step {step} of {total_steps}");
    }
    if summary.outcome == Outcome::EarlyStopped {
        println!(
            "the validation loss did not become better: the run ended after step {step} of {total_steps}"
        );
    }
    let loss = summary.loss.map_or(String::new(), |loss| format!(", loss {loss:.4}"));
    let valid = summary.valid.map_or(String::new(), |(loss, accuracy)| {
        format!(", valid loss {loss:.4}, valid accuracy {:.1} %", accuracy * 100.0)
    });
    let best = summary.best_step.map_or(String::new(), |best| format!(" (the best: step {best})"));
    println!("published {path} after {step} steps{best} in {seconds:.1} s{loss}{valid}");
    println!("digest {digest}");
}
