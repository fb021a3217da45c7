//! The first stage of a job: are its files fit to train on?

use std::{ffi::OsStr, path::Path, time::Duration};

use serde::Deserialize;

use super::{
    child::{Ended, Heard, JobProcess},
    ending,
    settings::Places,
};
use crate::jobs::{
    EventLevel, Job, JobError, JobEvent, JobStatus, JobsError, Order, Query, Request, Service,
};
use crate::train::TrainConfig;

/// Fewest examples of a training file, as at OpenAI.
const MIN_EXAMPLES: u64 = 10;
/// Lines named in the job's error.
const MAX_NAMED: usize = 5;
/// Error and warning events of one file.
const MAX_EVENTS: usize = 20;
/// How often a check that crashes is tried.
const MAX_TRIES: usize = 3;
/// How long a request of the client may wait to be seen.
const GLANCE: Duration = Duration::from_millis(100);
/// First words of the event that the stage begins with.
const FIRST_WORDS: &str = "Validating training file: ";

/// What `check --json` prints.
#[derive(Debug, Deserialize)]
struct Report {
    examples: u64,
    num_errors: u64,
    errors: Vec<LineError>,
    warnings: Vec<String>,
    valid: Option<Box<Report>>,
    #[serde(default)]
    shared_prompts: u64,
}

#[derive(Debug, Deserialize)]
struct LineError {
    line: u64,
    message: String,
}

/// What a check said.
enum Verdict {
    Report(Report),
    /// It could not read a file; in words.
    Unreadable(String),
    /// It ended for no reason that it could name.
    Crashed(String),
    /// A cancellation, or the end of the service, came first.
    Interrupted,
}

/// Checks the job's files and puts it into the queue, or ends it.
pub(super) fn validate(service: &Service, job: &Job) -> Result<(), JobsError> {
    say_begun(service, job)?;
    let places = Places::of(service, &job.id);
    places.prepare(service, job)?;
    let mut verdict = check(service, job, &places)?;
    for _ in 1..MAX_TRIES {
        let Verdict::Crashed(reason) = &verdict else { break };
        tracing::warn!(job = job.id, "the check ended unexpectedly: {reason}");
        verdict = check(service, job, &places)?;
    }
    match verdict {
        // A cancellation is seen to by whoever looks at the job next.
        Verdict::Interrupted => Ok(()),
        Verdict::Report(report) => judge(service, job, &report),
        Verdict::Unreadable(reason) => {
            let is_valid = reason.contains("valid.jsonl");
            let which = if is_valid { File::Validation } else { File::Training };
            ending::fail(service, &job.id, &which.error(&reason))
        }
        Verdict::Crashed(reason) => {
            let message =
                format!("The job failed: checking its files ended unexpectedly. {reason}");
            let error = JobError { code: "server_error".to_owned(), message, param: None };
            ending::fail(service, &job.id, &error)
        }
    }
}

/// One of the two.
#[derive(Debug, Clone, Copy)]
enum File {
    Training,
    Validation,
}

impl File {
    fn word(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Validation => "validation",
        }
    }

    fn error(self, reason: &str) -> JobError {
        let word = self.word();
        JobError {
            code: format!("invalid_{word}_file"),
            message: format!("The job failed due to an invalid {word} file. {reason}"),
            param: Some(format!("{word}_file")),
        }
    }
}

fn judge(service: &Service, job: &Job, report: &Report) -> Result<(), JobsError> {
    for (which, report) in
        [(File::Training, Some(report)), (File::Validation, report.valid.as_deref())]
    {
        let Some(report) = report.filter(|report| report.num_errors > 0) else { continue };
        let line = |error: &LineError| format!("Line {}: {}", error.line, error.message);
        let mut named: Vec<String> = report.errors.iter().take(MAX_NAMED).map(line).collect();
        let more = report.num_errors.saturating_sub(named.len() as u64);
        if more > 0 {
            named.push(format!("(and {more} more)"));
        }
        let details: Vec<String> = report.errors.iter().take(MAX_EVENTS).map(line).collect();
        return ending::fail_with(service, &job.id, &which.error(&named.join(" ")), &details);
    }
    if report.examples < MIN_EXAMPLES {
        let count = report.examples;
        let error = JobError {
            code: "invalid_n_examples".to_owned(),
            message: format!(
                "Training file has {count} example(s), but must have at least {MIN_EXAMPLES} examples"
            ),
            param: Some("training_file".to_owned()),
        };
        return ending::fail(service, &job.id, &error);
    }
    enqueue(service, job, report)
}

fn enqueue(service: &Service, job: &Job, report: &Report) -> Result<(), JobsError> {
    let warnings = warnings(report);
    let is_waiting = |job: &Job| job.status == JobStatus::ValidatingFiles;
    ending::change_if(service, &job.id, is_waiting, |transaction, job| {
        for warning in &warnings {
            transaction.say(&job.id, EventLevel::Warn, warning.as_str())?;
        }
        let num_examples = usize::try_from(report.examples).unwrap_or(usize::MAX);
        job.num_examples = Some(report.examples);
        job.hyperparameters = job.hyperparameters.resolved(job.method, num_examples);
        job.status = JobStatus::Queued;
        let message = "Files validated, moving job to queued state";
        transaction.say(&job.id, EventLevel::Info, message)
    })?;
    Ok(())
}

fn warnings(report: &Report) -> Vec<String> {
    let mut found = Vec::new();
    for (which, report) in
        [(File::Training, Some(report)), (File::Validation, report.valid.as_deref())]
    {
        let warnings = report.into_iter().flat_map(|report| &report.warnings).take(MAX_EVENTS);
        found.extend(warnings.map(|text| format!("{} file: {text}", capital(which.word()))));
    }
    if report.shared_prompts > 0 {
        let count = report.shared_prompts;
        found.push(format!("{count} validation row(s) ask what a training row asks"));
    }
    found
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

/// Runs the check as a process of its own: whatever the file does to it, the server goes on.
fn check(service: &Service, job: &Job, places: &Places) -> Result<Verdict, JobsError> {
    let (data, valid) = (places.data(), places.valid());
    let max_length = TrainConfig::default().max_length.to_string();
    let mut args: Vec<&OsStr> = vec!["check".as_ref(), data.as_ref(), "--json".as_ref()];
    args.extend::<[&OsStr; 2]>(["--model".as_ref(), service.config.base_dir.as_ref()]);
    args.extend::<[&OsStr; 2]>(["--method".as_ref(), job.method.name().as_ref()]);
    args.extend::<[&OsStr; 2]>(["--max-length".as_ref(), max_length.as_ref()]);
    if job.validation_file.is_some() {
        args.extend::<[&OsStr; 2]>(["--valid".as_ref(), valid.as_ref()]);
    }
    let config = &service.config;
    let spawned = JobProcess::spawn(&config.executable, &args, &places.log(), config.memory);
    let mut process = spawned.map_err(|source| JobsError::file(&config.executable, source))?;
    let mut output = String::new();
    loop {
        match process.hear(GLANCE) {
            Heard::Line(line) => output.push_str(&line),
            Heard::End => break,
            Heard::Nothing => {}
        }
        if service.is_stopping() || requested(service, &job.id)? == Some(Request::Cancel) {
            // Dropping it ends it: a check leaves nothing behind.
            return Ok(Verdict::Interrupted);
        }
    }
    let ended = process.wait().map_err(|source| JobsError::file(&config.executable, source))?;
    Ok(verdict(&ended, &output, &places.dir))
}

fn verdict(ended: &Ended, output: &str, dir: &Path) -> Verdict {
    if ended.status.code().is_some_and(|code| code <= 1)
        && let Ok(report) = serde_json::from_str(output)
    {
        return Verdict::Report(report);
    }
    // Paths of ours tell a client nothing.
    let dir = format!("{}/", dir.display());
    let log = ended.log.join("\n").replace(&dir, "");
    match log.lines().rev().find_map(|line| line.strip_prefix("error: ")) {
        Some(reason) if ended.status.code() == Some(1) => Verdict::Unreadable(reason.to_owned()),
        _ => Verdict::Crashed(format!("{}: {log}", ended.status)),
    }
}

/// What the client wants of the job.
pub(super) fn requested(service: &Service, id: &str) -> Result<Option<Request>, JobsError> {
    Ok(service.store.get::<Job>(id)?.and_then(|job| job.request))
}

/// Once, also where the stage begins again after a restart.
fn say_begun(service: &Service, job: &Job) -> Result<(), JobsError> {
    let first = |event: &JobEvent| event.message.starts_with(FIRST_WORDS);
    let query = Query { parent: &job.id, after: None, limit: 1, order: Order::Ascending };
    if !service.store.list(&query, first)?.records.is_empty() {
        return Ok(());
    }
    let mut message = format!("{FIRST_WORDS}{}", job.training_file);
    if let Some(file) = &job.validation_file {
        message += &format!(" and validation file: {file}");
    }
    ending::change(service, &job.id, |transaction, job| {
        transaction.say(&job.id, EventLevel::Info, message.as_str())
    })?;
    Ok(())
}
