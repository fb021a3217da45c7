//! How a job changes its state for good, whatever the disk says meanwhile.

use std::time::Duration;

use super::settings::Places;
use crate::jobs::{
    EventLevel, Job, JobError, JobStatus, JobsError, Service, StoreError, Transaction,
    unix_seconds, webhooks,
};

/// How long to wait for room on a full disk before the next try.
const FULL_DISK_PAUSE: Duration = Duration::from_secs(1);

/// Runs a transaction; while the disk is full it is tried again. `None` where the service stopped
/// before there was room.
pub(in crate::jobs) fn persist<T>(
    service: &Service,
    mut work: impl FnMut(&Transaction<'_>) -> Result<T, JobsError>,
) -> Result<Option<T>, JobsError> {
    let mut warned = false;
    loop {
        match service.store.write(&mut work) {
            Ok(value) => return Ok(Some(value)),
            Err(JobsError::NoSpace(reason)) => {
                if !warned {
                    tracing::error!("jobs wait until there is room: {reason}");
                    warned = true;
                }
                if !pause(service, FULL_DISK_PAUSE) {
                    return Ok(None);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Waits; false where the service is stopping.
pub(super) fn pause(service: &Service, time: Duration) -> bool {
    let step = Duration::from_millis(50);
    let mut left = time;
    while !service.is_stopping() && !left.is_zero() {
        let now = left.min(step);
        std::thread::sleep(now);
        left -= now;
    }
    !service.is_stopping()
}

/// Changes a job that has not ended yet, as it is now in the store. False where it has, or where the
/// service stopped.
pub(super) fn change(
    service: &Service,
    id: &str,
    edit: impl FnMut(&Transaction<'_>, &mut Job) -> Result<(), StoreError>,
) -> Result<bool, JobsError> {
    change_if(service, id, |job| !job.status.is_final(), edit)
}

/// As [`change`], for a job of which `holds` is still true: its client may have been faster.
pub(super) fn change_if(
    service: &Service,
    id: &str,
    holds: impl Fn(&Job) -> bool,
    mut edit: impl FnMut(&Transaction<'_>, &mut Job) -> Result<(), StoreError>,
) -> Result<bool, JobsError> {
    let changed = persist(service, |transaction| {
        let Some(mut job) = transaction.get::<Job>(id)?.filter(&holds) else { return Ok(false) };
        edit(transaction, &mut job)?;
        transaction.update(&job)?;
        Ok(true)
    })?;
    service.ring();
    Ok(changed.unwrap_or(false))
}

/// Ends a job as failed; a cancellation that came before wins.
pub(super) fn fail(service: &Service, id: &str, error: &JobError) -> Result<(), JobsError> {
    fail_with(service, id, error, &[])
}

/// As [`fail`], with more error events before the last one.
pub(super) fn fail_with(
    service: &Service,
    id: &str,
    error: &JobError,
    details: &[String],
) -> Result<(), JobsError> {
    // First of all: it makes room where the disk is full.
    Places::of(service, id).remove_work();
    let failed = change(service, id, |transaction, job| {
        if job.request == Some(crate::jobs::Request::Cancel) {
            return end_cancelled(service, transaction, job);
        }
        for detail in details {
            transaction.say(id, EventLevel::Error, detail.as_str())?;
        }
        transaction.say(id, EventLevel::Error, error.message.as_str())?;
        job.error = Some(error.clone());
        end(service, transaction, job, JobStatus::Failed)
    })?;
    if failed {
        tracing::warn!(job = id, code = error.code, "job failed: {}", error.message);
    }
    tidy(service, id)
}

/// Ends a job as its client asked.
pub(super) fn cancel(service: &Service, id: &str) -> Result<(), JobsError> {
    change(service, id, |transaction, job| end_cancelled(service, transaction, job))?;
    tidy(service, id)
}

/// Removes what an ended job needs no more. A crash may come before it: then it is done at the next
/// start.
pub(super) fn tidy(service: &Service, id: &str) -> Result<(), JobsError> {
    let Some(job) = service.store.get::<Job>(id)?.filter(|job| job.status.is_final()) else {
        return Ok(());
    };
    let places = Places::of(service, id);
    places.remove_work();
    if job.status != JobStatus::Succeeded {
        places.remove_model();
    }
    Ok(())
}

/// Lays a job down until its client wants it to go on.
pub(super) fn lay_down(service: &Service, id: &str) -> Result<(), JobsError> {
    change(service, id, |transaction, job| {
        job.status = JobStatus::Paused;
        job.request = None;
        job.estimated_finish = None;
        transaction.say(id, EventLevel::Info, "The job was paused")
    })?;
    Ok(())
}

/// In the transaction that publishes: the cancellation came first.
pub(in crate::jobs) fn end_cancelled(
    service: &Service,
    transaction: &Transaction<'_>,
    job: &mut Job,
) -> Result<(), StoreError> {
    transaction.say(&job.id, EventLevel::Info, "The job was cancelled")?;
    end(service, transaction, job, JobStatus::Cancelled)
}

/// Sets the last status, and notes whom to tell.
pub(in crate::jobs) fn end(
    service: &Service,
    transaction: &Transaction<'_>,
    job: &mut Job,
    status: JobStatus,
) -> Result<(), StoreError> {
    job.status = status;
    job.request = None;
    job.estimated_finish = None;
    job.finished_at = Some(unix_seconds());
    webhooks::enqueue(service, transaction, job)
}

/// What went wrong on our side, as the job's client sees it.
pub(super) fn own_fault(error: &JobsError) -> JobError {
    let missing = if let JobsError::NotFound { param, .. } = error { Some(*param) } else { None };
    let code = match missing {
        Some("training_file") => "invalid_training_file",
        Some("validation_file") => "invalid_validation_file",
        Some(_) => "model_not_found",
        None if matches!(error, JobsError::NoSpace(_)) => "insufficient_storage",
        None => "server_error",
    };
    JobError {
        code: code.to_owned(),
        message: format!("The job failed: {error}"),
        param: missing.map(str::to_owned),
    }
}
