//! Telling others that a job has ended: signed, retried, and not forgotten over a restart.
//!
//! The signature is that of <https://www.standardwebhooks.com>, which OpenAI's clients check: HMAC-SHA256
//! over `id.timestamp.body`. A delivery is a record, made in the transaction that ends the job.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::Sha256;
use ureq::Agent;

use super::{
    Job, JobStatus, JobsError, Record, Service, StoreError, Transaction, Webhook,
    files::everything, new_id, unix_seconds,
};

/// Seconds to wait after each attempt that failed; after the last, the delivery is given up.
const RETRY_SECONDS: &[u64] = &[1, 5, 30, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600];

/// How long a receiver may take for its answer. A shutdown may have to wait as long.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The worker looks at least this often.
const INTERVAL: Duration = Duration::from_secs(60);

/// An event that one receiver has not taken yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Delivery {
    /// `whd_…`.
    id: String,
    /// `evt_…`: the same at each attempt, so that a receiver can tell.
    event_id: String,
    /// The receiver.
    url: String,
    /// `fine_tuning.job.succeeded`, ...
    event: String,
    /// What ended.
    job_id: String,
    /// Unix seconds of the event.
    created_at: u64,
    /// Attempts that failed.
    attempts: usize,
    /// Unix seconds of the next attempt.
    next_at: u64,
}

impl Record for Delivery {
    const KIND: &'static str = "delivery";

    fn id(&self) -> &str {
        &self.id
    }
}

/// Whether the receivers can be used.
pub(super) fn check(webhooks: &[Webhook]) -> Result<(), JobsError> {
    for (number, webhook) in webhooks.iter().enumerate() {
        if webhooks[..number].iter().any(|other| other.url == webhook.url) {
            let message = format!("the receiver {} is named twice", webhook.url);
            return Err(JobsError::invalid("webhook", message));
        }
        if webhook.secret.as_ref().is_some_and(|secret| signing_key(secret).is_none()) {
            let message = format!("the secret of {} is not `whsec_` and base64", webhook.url);
            return Err(JobsError::invalid("webhook", message));
        }
    }
    Ok(())
}

/// Notes, in the transaction that ends `job`, whom to tell.
pub(super) fn enqueue(
    service: &Service,
    transaction: &Transaction<'_>,
    job: &Job,
) -> Result<(), StoreError> {
    let event_id = new_id("evt_");
    for webhook in &service.config.webhooks {
        if let Some(delivery) = delivery(&webhook.url, &event_id, job) {
            transaction.insert(&delivery)?;
        }
    }
    Ok(())
}

/// `None` where the job has not ended.
fn delivery(url: &str, event_id: &str, job: &Job) -> Option<Delivery> {
    let event = match job.status {
        JobStatus::Succeeded | JobStatus::Failed | JobStatus::Cancelled => {
            format!("fine_tuning.job.{}", job.status)
        }
        JobStatus::ValidatingFiles | JobStatus::Queued | JobStatus::Running | JobStatus::Paused => {
            return None;
        }
    };
    let now = unix_seconds();
    Some(Delivery {
        id: new_id("whd_"),
        event_id: event_id.to_owned(),
        url: url.to_owned(),
        event,
        job_id: job.id.clone(),
        created_at: job.finished_at.unwrap_or(now),
        attempts: 0,
        next_at: now,
    })
}

/// Delivers, until the service stops. Each receiver has a thread of its own, so that one that is slow
/// keeps nobody else waiting.
pub(super) fn run(service: &Service) {
    if let Err(error) = forget_unnamed(service) {
        tracing::warn!("webhooks: {error}");
    }
    let webhooks = &service.config.webhooks;
    std::thread::scope(|scope| {
        for webhook in webhooks {
            let thread = std::thread::Builder::new().name("webhook".to_owned());
            if let Err(error) = thread.spawn_scoped(scope, || deliver_to(service, webhook)) {
                tracing::error!(
                    "{} is told of nothing: no thread can be had: {error}",
                    webhook.url
                );
            }
        }
    });
}

/// Drops what was meant for receivers that the operator no longer names.
fn forget_unnamed(service: &Service) -> Result<(), JobsError> {
    let is_named = |url: &str| service.config.webhooks.iter().any(|webhook| webhook.url == url);
    for delivery in service.store.all::<Delivery>("")? {
        if !is_named(&delivery.url) {
            tracing::info!("{} is no longer told of {}", delivery.url, delivery.job_id);
            service.store.write(|tx| tx.delete::<Delivery>(&delivery.id))?;
        }
    }
    Ok(())
}

/// Delivers to one receiver, until the service stops.
fn deliver_to(service: &Service, webhook: &Webhook) {
    let agent: Agent = Agent::config_builder()
        .timeout_global(Some(TIMEOUT))
        // A receiver that moves is the operator's to name.
        .max_redirects(0)
        .http_status_as_error(false)
        .user_agent(concat!("tunesmith/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    let mut heard = 0;
    while !service.is_stopping() {
        let wait = pass(service, &agent, webhook).unwrap_or_else(|error| {
            tracing::warn!("webhooks: {error}");
            INTERVAL
        });
        service.bell.wait(&mut heard, wait);
    }
}

/// Tries what is due; how long nothing else will be.
fn pass(service: &Service, agent: &Agent, webhook: &Webhook) -> Result<Duration, JobsError> {
    let is_meant = |delivery: &Delivery| delivery.url == webhook.url;
    let deliveries = service.store.list(&everything(), is_meant)?.records;
    let now = unix_seconds();
    for due in deliveries.into_iter().filter(|delivery| delivery.next_at <= now) {
        if service.is_stopping() {
            break;
        }
        let result = attempt(agent, webhook, &due);
        settle(service, due, &result)?;
    }
    let left = service.store.list(&everything(), is_meant)?.records;
    let next = left.iter().map(|delivery| delivery.next_at).min();
    let wait = next.map_or(INTERVAL, |at| Duration::from_secs(at.saturating_sub(unix_seconds())));
    Ok(wait.clamp(Duration::from_millis(100), INTERVAL))
}

/// What becomes of a delivery: done, tried again later, or given up.
fn settle(
    service: &Service,
    mut delivery: Delivery,
    result: &Result<(), String>,
) -> Result<(), StoreError> {
    let (url, event, job) = (&delivery.url, &delivery.event, &delivery.job_id);
    let again = match result {
        Ok(()) => {
            tracing::debug!("{url} took {event} of {job}");
            None
        }
        Err(error) => {
            let wait = RETRY_SECONDS.get(delivery.attempts);
            match wait {
                Some(wait) => tracing::info!("{url}: {error}; {event} of {job} again in {wait} s"),
                None => tracing::warn!("{url}: {error}; {event} of {job} is given up"),
            }
            wait
        }
    };
    service.store.write(|transaction| match again {
        Some(seconds) => {
            delivery.attempts += 1;
            delivery.next_at = unix_seconds() + seconds;
            transaction.update(&delivery)
        }
        None => transaction.delete::<Delivery>(&delivery.id).map(|_| ()),
    })
}

fn attempt(agent: &Agent, webhook: &Webhook, delivery: &Delivery) -> Result<(), String> {
    let body = json!({
        "id": delivery.event_id,
        "object": "event",
        "created_at": delivery.created_at,
        "type": delivery.event,
        "data": {"id": delivery.job_id},
    })
    .to_string();
    let timestamp = unix_seconds().to_string();
    let mut request = agent
        .post(&delivery.url)
        .header("content-type", "application/json")
        .header("webhook-id", &delivery.event_id)
        .header("webhook-timestamp", &timestamp);
    if let Some(key) = webhook.secret.as_deref().and_then(signing_key) {
        let signature = sign(&key, &delivery.event_id, &timestamp, &body);
        request = request.header("webhook-signature", signature);
    }
    let response = request.send(&body).map_err(|error| error.to_string())?;
    match response.status() {
        status if status.is_success() => Ok(()),
        status => Err(format!("answered with status {status}")),
    }
}

/// The bytes behind `whsec_`.
fn signing_key(secret: &str) -> Option<Vec<u8>> {
    STANDARD.decode(secret.strip_prefix("whsec_")?).ok().filter(|key| !key.is_empty())
}

fn sign(key: &[u8], id: &str, timestamp: &str, body: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the Standard Webhooks specification's own libraries.
    #[test]
    fn signatures_are_those_of_standard_webhooks() {
        let key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signature =
            sign(&key, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", r#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert_eq!(signing_key("whsec_?"), None);
        assert_eq!(signing_key("abc"), None);
    }
}
