//! The second stage of a job: its training process, from the start to the publishing of what it made.

use std::{
    ffi::OsStr,
    time::{Duration, Instant},
};

use super::{
    child::{Ended, Heard, JobProcess},
    ending,
    progress::{self, Progress},
    settings::Places,
    validation::requested,
};
use crate::jobs::{
    EventLevel, Job, JobError, JobStatus, JobsError, Request, Service, publish, unix_seconds,
};

/// How often a process that crashes is started again.
const MAX_RETRIES: u32 = 2;
/// How long a request of the client may wait to be seen.
const GLANCE: Duration = Duration::from_millis(100);
/// How long a process of a killed server may hold on to the job's folder.
const ORPHAN_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks whether it is gone.
const ORPHAN_PAUSE: Duration = Duration::from_millis(250);
/// Characters of its log in a job's error.
const MAX_LOG_CHARS: usize = 1000;

/// How a training process ended.
enum Verdict {
    /// The adapter is published in the job's folder.
    Trained,
    /// It was stopped with a checkpoint, or ended while the service stops.
    Stopped,
    /// Another process still has the folder.
    Busy,
    /// It ended for no reason that it could name.
    Crashed(String),
    /// It said why it cannot go on.
    Refused(JobError),
}

/// Trains the job, or goes on from its checkpoint, and publishes the model.
pub(super) fn train(service: &Service, job: &Job) -> Result<(), JobsError> {
    let places = Places::of(service, &job.id);
    places.prepare(service, job)?;
    places.write_settings(service, job)?;
    if !say_started(service, job)? {
        return Ok(());
    }
    let mut orphan = None;
    loop {
        // As it is now: attempts and steps have changed.
        let Some(job) = service.store.get::<Job>(&job.id)? else { return Ok(()) };
        let verdict = run(service, &job, &places)?;
        if service.is_stopping() {
            // Goes on when the service does.
            return Ok(());
        }
        match requested(service, &job.id)? {
            Some(Request::Cancel) => return ending::cancel(service, &job.id),
            // Too late to pause what is done.
            Some(Request::Pause) if !matches!(verdict, Verdict::Trained) => {
                return ending::lay_down(service, &job.id);
            }
            Some(Request::Pause) | None => {}
        }
        match verdict {
            Verdict::Trained => {
                progress::complete(service, &job)?;
                return publish_model(service, &job, &places);
            }
            Verdict::Refused(error) => return ending::fail(service, &job.id, &error),
            Verdict::Busy if orphan.get_or_insert_with(Instant::now).elapsed() < ORPHAN_LIMIT => {
                ending::pause(service, ORPHAN_PAUSE);
            }
            Verdict::Busy => {
                let reason = "another process holds on to the job's folder".to_owned();
                return ending::fail(service, &job.id, &failure("training_failed", &reason));
            }
            Verdict::Stopped => {
                if !retry(service, &job, "it was stopped from outside")? {
                    return Ok(());
                }
            }
            Verdict::Crashed(reason) => {
                if !retry(service, &job, &reason)? {
                    return Ok(());
                }
            }
        }
    }
}

/// Counts another attempt; false where there were enough, and the job has failed.
fn retry(service: &Service, job: &Job, reason: &str) -> Result<bool, JobsError> {
    if job.attempts >= MAX_RETRIES {
        let reason = format!("its process ended unexpectedly {} times: {reason}", job.attempts + 1);
        ending::fail(service, &job.id, &failure("training_failed", &reason))?;
        return Ok(false);
    }
    tracing::warn!(job = job.id, "the training process ended unexpectedly: {reason}");
    ending::change(service, &job.id, |transaction, job| {
        job.attempts += 1;
        let message = format!(
            "The training process ended unexpectedly and is started again from its last checkpoint \
             (retry {} of {MAX_RETRIES}): {reason}",
            job.attempts
        );
        transaction.say(&job.id, EventLevel::Warn, message)
    })
}

fn failure(code: &str, reason: &str) -> JobError {
    let message = format!("The job failed: {reason}");
    JobError { code: code.to_owned(), message, param: None }
}

fn publish_model(service: &Service, job: &Job, places: &Places) -> Result<(), JobsError> {
    match publish::publish(service, &job.id, &places.model()) {
        Ok(()) => ending::tidy(service, &job.id)?,
        Err(publish::PublishError::Stopping) => {}
        Err(publish::PublishError::Parity(difference)) => {
            let reason = format!(
                "the server's log-probabilities differ from the trainer's by up to {difference:e}"
            );
            ending::fail(service, &job.id, &failure("parity_failed", &reason))?;
        }
        Err(publish::PublishError::Jobs(error)) => return Err(error),
    }
    Ok(())
}

/// False where the client has laid the job down or ended it since.
fn say_started(service: &Service, job: &Job) -> Result<bool, JobsError> {
    let may_run = |job: &Job| {
        matches!(job.status, JobStatus::Queued | JobStatus::Running) && job.request.is_none()
    };
    ending::change_if(service, &job.id, may_run, |transaction, job| {
        let goes_on = job.status == JobStatus::Running && job.started_at.is_some();
        let message = match (goes_on, job.started_at) {
            (true, _) => "Fine-tuning job goes on after a restart of the server",
            (false, Some(_)) => "Fine-tuning job resumed",
            (false, None) => "Fine-tuning job started",
        };
        job.status = JobStatus::Running;
        job.started_at = Some(unix_seconds());
        transaction.say(&job.id, EventLevel::Info, message)
    })
}

/// Runs one process to its end.
fn run(service: &Service, job: &Job, places: &Places) -> Result<Verdict, JobsError> {
    let config = &service.config;
    let settings = places.settings();
    let (threads, memory) = (config.threads.to_string(), config.memory.map(|n| n.to_string()));
    let mut args: Vec<&OsStr> = vec!["train".as_ref(), "--config".as_ref(), settings.as_ref()];
    args.extend(["--resume", "--events", "--leash", "--nice", "19"].map(OsStr::new));
    args.extend(["--threads", threads.as_str()].map(OsStr::new));
    if let Some(memory) = &memory {
        args.extend(["--memory-limit", memory.as_str()].map(OsStr::new));
    }
    let spawned = JobProcess::spawn(&config.executable, &args, &places.log(), config.memory);
    let mut process = spawned.map_err(|source| JobsError::file(&config.executable, source))?;
    let mut progress = Progress::new(service, job);
    let mut glanced = Instant::now();
    loop {
        match process.hear(GLANCE) {
            Heard::Line(line) => progress.hear(&line),
            Heard::Nothing => {}
            Heard::End => break,
        }
        progress.write_if_due();
        if glanced.elapsed() >= GLANCE {
            glanced = Instant::now();
            // An unreadable database does not stop what works.
            let wanted = requested(service, &job.id).ok().flatten();
            if service.is_stopping() || wanted.is_some() {
                process.stop();
            }
        }
    }
    progress.write_all();
    let ended = process.wait().map_err(|source| JobsError::file(&config.executable, source))?;
    Ok(verdict(&ended, places))
}

fn verdict(ended: &Ended, places: &Places) -> Verdict {
    if ended.status.success() {
        let published = places.model().join("adapter_config.json").exists();
        return if published { Verdict::Trained } else { Verdict::Stopped };
    }
    let dir = format!("{}/", places.dir.display());
    let log = ended.log.join("\n").replace(&dir, "");
    if ["No space left on device", "Disk quota exceeded"].iter().any(|words| log.contains(words)) {
        return Verdict::Refused(failure("insufficient_storage", "the disk is full"));
    }
    let reason = log.lines().rev().find_map(|line| line.strip_prefix("error: "));
    match (ended.status.code(), reason) {
        (Some(1), Some(reason)) if reason.contains("another process is training") => Verdict::Busy,
        (Some(1), Some(reason)) => Verdict::Refused(failure("training_failed", reason)),
        _ => Verdict::Crashed(format!("{}\n{}", ended.status, last_chars(&log))),
    }
}

fn last_chars(text: &str) -> &str {
    let start = text.char_indices().rev().nth(MAX_LOG_CHARS - 1).map_or(0, |(at, _)| at);
    text[start..].trim()
}
