//! What a client may do with a job that exists: end it, stop it for a while, let it go on.

use super::{EventLevel, Job, JobStatus, JobsError, Request, Service, unix_seconds, webhooks};

/// Field that names the job, for errors.
const PARAM: &str = "fine_tuning_job_id";

/// What a client wants of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// End it.
    Cancel,
    /// Stop it with a checkpoint.
    Pause,
    /// Let a paused job go on.
    Resume,
}

impl Service {
    /// The job with this id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn job(&self, id: &str) -> Result<Job, JobsError> {
        self.store.get(id)?.ok_or_else(|| no_job(id))
    }

    /// Does what the client wants of a job that is not at work, and notes it for the runner where the
    /// job is. Returns the job as it is then.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` where the job's state does not allow it.
    pub fn ask_job(&self, id: &str, wish: Wish) -> Result<Job, JobsError> {
        let job = self.store.write(|tx| {
            let mut job = tx.get::<Job>(id)?.ok_or_else(|| no_job(id))?;
            let at_work = matches!(job.status, JobStatus::ValidatingFiles | JobStatus::Running);
            match wish {
                Wish::Cancel | Wish::Pause | Wish::Resume if job.status.is_final() => {
                    return Err(refused(format!("Job has already completed: {id}")));
                }
                Wish::Cancel if at_work => job.request = Some(Request::Cancel),
                Wish::Cancel => {
                    job.status = JobStatus::Cancelled;
                    job.finished_at = Some(unix_seconds());
                    job.estimated_finish = None;
                    job.request = None;
                    tx.say(id, EventLevel::Info, "The job was cancelled")?;
                    webhooks::enqueue(self, tx, &job)?;
                }
                Wish::Pause | Wish::Resume if job.request == Some(Request::Cancel) => {
                    return Err(refused(format!("Job is being cancelled: {id}")));
                }
                Wish::Pause if job.status == JobStatus::Paused => {
                    return Err(refused(format!("Job is already paused: {id}")));
                }
                Wish::Pause if at_work => job.request = Some(Request::Pause),
                Wish::Pause => {
                    job.status = JobStatus::Paused;
                    job.estimated_finish = None;
                    tx.say(id, EventLevel::Info, "The job was paused")?;
                }
                Wish::Resume if job.status == JobStatus::Paused => {
                    job.status = JobStatus::Queued;
                    job.request = None;
                    tx.say(id, EventLevel::Info, "The job was resumed")?;
                }
                Wish::Resume => {
                    let status = job.status;
                    return Err(refused(format!("Job is not paused but {status}: {id}")));
                }
            }
            tx.update(&job)?;
            Ok(job)
        })?;
        self.ring();
        Ok(job)
    }
}

fn no_job(id: &str) -> JobsError {
    JobsError::NotFound { what: "fine-tuning job", id: id.to_owned(), param: PARAM }
}

fn refused(message: String) -> JobsError {
    JobsError::Invalid { message, param: PARAM, code: Some("invalid_job_state") }
}
