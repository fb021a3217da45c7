//! From a trained adapter's folder to a model that answers: compared, evaluated, registered, and then
//! said to have succeeded.

use std::{path::Path, sync::Arc, time::Instant};

use super::{
    Alias, EventLevel, Job, JobStatus, JobsConfig, JobsError, ModelRecord, Request, Service,
    StoreError, Transaction,
    evaluation::{self, Evaluation},
    new_id, parity,
    results::Results,
    runner, unix_seconds,
};
use crate::telemetry;
use crate::train::EventLog;

/// Letters and digits that make a model's name unique.
const ID_LENGTH: usize = 8;

/// Why nothing is published.
#[derive(Debug)]
pub(super) enum PublishError {
    /// The service stops; it is done again when it starts.
    Stopping,
    /// The server says something else than the trainer, by so much.
    Parity(f64),
    /// Anything else.
    Jobs(JobsError),
}

impl<E: Into<JobsError>> From<E> for PublishError {
    fn from(error: E) -> Self {
        Self::Jobs(error.into())
    }
}

/// A new model's name: `ft:base:organization:suffix:id`.
pub(super) fn model_name(config: &JobsConfig, job: &Job) -> String {
    let JobsConfig { base_name, organization, .. } = config;
    let suffix = job.suffix.as_deref().unwrap_or_default();
    format!("ft:{base_name}:{organization}:{suffix}:{}", &new_id("")[..ID_LENGTH])
}

/// Publishes the adapter in `dir`. Done again from the start where it was interrupted: until its last
/// transaction nobody can see anything of it.
pub(super) fn publish(service: &Service, id: &str, dir: &Path) -> Result<(), PublishError> {
    let Some(job) = service.store.get::<Job>(id)? else { return Ok(()) };
    let name = model_name(&service.config, &job);
    let version = Arc::new(service.parts.registry.read(&name, dir)?);
    let mut events = Vec::new();
    let kv_dtype = service.parts.engine.config().kv_dtype;
    match parity::compare(service, &version, dir) {
        _ if service.is_stopping() => return Err(PublishError::Stopping),
        Ok(Some(parity)) if !parity.is_close(kv_dtype, version.adapter.dtype()) => {
            return Err(PublishError::Parity(parity.max_difference));
        }
        Ok(Some(parity)) => events.push((
            EventLevel::Info,
            format!(
                "Serving parity: max difference of log-probabilities {:.1e} over {} tokens",
                parity.max_difference, parity.num_tokens
            ),
        )),
        Ok(None) => {}
        Err(reason) => {
            let message = format!("the comparison of server and trainer failed: {reason}");
            return Err(PublishError::Jobs(JobsError::Conflict(message)));
        }
    }
    let evaluation = match evaluation::evaluate(service, &job, &version) {
        _ if service.is_stopping() => return Err(PublishError::Stopping),
        Ok(evaluation) => evaluation,
        // The model is there all the same; an alias with a gate does not move.
        Err(error) => {
            events.push((EventLevel::Warn, format!("The model could not be evaluated: {error}")));
            None
        }
    };
    events.extend(evaluation.iter().map(|said| (EventLevel::Info, said.message.clone())));
    let news = News { name, digest: version.adapter.digest().to_owned(), events, evaluation };
    drop(version);
    register(service, &job, dir, &news)
}

/// What a publication adds.
struct News {
    name: String,
    digest: String,
    events: Vec<(EventLevel, String)>,
    evaluation: Option<Evaluation>,
}

/// Loads first, then says so: the model answers at the very moment that the job has succeeded.
fn register(service: &Service, job: &Job, dir: &Path, news: &News) -> Result<(), PublishError> {
    let path = dir.join("events.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|source| JobsError::file(path, source))?;
    let results = Results::of(&EventLog::from_text(&text));
    let started = Instant::now();
    service.parts.registry.load(&news.name, dir, false)?;
    telemetry::adapter_loaded(started.elapsed().as_secs_f64());
    let committed = runner::persist(service, |transaction| {
        let Some(mut job) = transaction.get::<Job>(&job.id)?.filter(|job| !job.status.is_final())
        else {
            return Ok(false);
        };
        if job.request == Some(Request::Cancel) {
            runner::end_cancelled(service, transaction, &mut job)?;
            transaction.update(&job)?;
            return Ok(false);
        }
        job.result_files.push(results.add_file(service, transaction)?.id);
        job.trained_tokens = Some(results.trained_tokens);
        succeed(service, transaction, &mut job, news)?;
        transaction.update(&job)?;
        Ok(true)
    });
    if !matches!(committed, Ok(Some(true))) {
        service.parts.registry.unload(&news.name);
    }
    service.ring();
    match committed? {
        Some(_) => Ok(()),
        None => Err(PublishError::Stopping),
    }
}

fn succeed(
    service: &Service,
    transaction: &Transaction<'_>,
    job: &mut Job,
    news: &News,
) -> Result<(), StoreError> {
    let model = ModelRecord {
        id: news.name.clone(),
        job_id: job.id.clone(),
        created_at: unix_seconds(),
        path: format!("jobs/{}/model", job.id),
        digest: news.digest.clone(),
        is_checkpoint: false,
    };
    transaction.insert(&model)?;
    for (level, message) in &news.events {
        transaction.say(&job.id, *level, message.as_str())?;
    }
    let message = format!("New fine-tuned model created: {}", news.name);
    transaction.say(&job.id, EventLevel::Info, message)?;
    job.fine_tuned_model = Some(news.name.clone());
    job.evaluation = news.evaluation.as_ref().map(|evaluation| evaluation.summary.clone());
    move_alias(service, transaction, job, news)?;
    runner::end(service, transaction, job, JobStatus::Succeeded)?;
    transaction.say(&job.id, EventLevel::Info, "The job has successfully completed")
}

/// Lets the job's alias stand for the new model, where the gate allows it.
fn move_alias(
    service: &Service,
    transaction: &Transaction<'_>,
    job: &Job,
    news: &News,
) -> Result<(), StoreError> {
    let Some(name) = &job.alias else { return Ok(()) };
    let has_gate = job.gate.is_some() || service.config.gate.is_some();
    let passed = news.evaluation.as_ref().and_then(|evaluation| evaluation.passed);
    if has_gate && passed != Some(true) {
        let message = format!("The alias {name} stays where it is: the gate was not passed");
        return transaction.say(&job.id, EventLevel::Warn, message);
    }
    let model = news.name.clone();
    match transaction.get::<Alias>(name)? {
        Some(alias) => transaction.update(&Alias { model, ..alias })?,
        None => transaction.insert(&Alias {
            name: name.clone(),
            model,
            created_at: unix_seconds(),
            sku: serde_json::Value::Null,
        })?,
    }
    let message = format!("The alias {name} stands for the new model");
    transaction.say(&job.id, EventLevel::Info, message)
}
