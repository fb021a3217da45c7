//! Takes each job through its stages: validating, queued, running, and what comes of it.
//!
//! One thread looks at the jobs whenever the bell rings; each job that there is something to do about
//! has a thread of its own, which starts a process and listens to it. The database says where each job
//! is, so a restart goes on where the last process ended, however it did.

mod child;
mod ending;
mod progress;
mod settings;
mod training;
mod validation;

use std::{
    collections::{HashMap, HashSet},
    panic::{AssertUnwindSafe, catch_unwind},
    thread::{Scope, ScopedJoinHandle},
    time::Duration,
};

pub(super) use self::ending::{end, end_cancelled, persist};
use super::{Job, JobError, JobStatus, JobsError, Order, Query, Request, Service};

/// Longest time between two looks at the jobs.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a job whose thread failed rests.
const REST: Duration = Duration::from_secs(1);
/// Files that are checked at once.
const MAX_VALIDATING: usize = 1;

/// What a thread does about a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Validate,
    Train,
}

/// The jobs that have a thread.
type AtWork<'scope> = HashMap<String, (Stage, ScopedJoinHandle<'scope, ()>)>;

/// Looks after the jobs until the service stops; running ones are then left with a checkpoint.
pub(super) fn run(service: &Service) {
    tidy(service);
    std::thread::scope(|scope| {
        let mut at_work = AtWork::new();
        let mut unfinished: HashSet<String> = HashSet::new();
        let mut heard = 0;
        while !service.is_stopping() {
            at_work.retain(|_, (_, thread)| !thread.is_finished());
            let every =
                Query { parent: "", after: None, limit: usize::MAX, order: Order::Ascending };
            match service.store.list(&every, |job: &Job| !job.status.is_final()) {
                Ok(page) => {
                    let now: HashSet<String> =
                        page.records.iter().map(|job| job.id.clone()).collect();
                    // Those that their clients have ended leave things behind too.
                    unfinished.retain(|id| {
                        let ended = !now.contains(id) && !at_work.contains_key(id);
                        if ended {
                            report(id, ending::tidy(service, id));
                        }
                        !ended
                    });
                    unfinished.extend(now);
                    look(service, scope, &mut at_work, page.records);
                }
                Err(error) => tracing::error!("the jobs cannot be read: {error}"),
            }
            service.bell.wait(&mut heard, LOOK_EVERY);
        }
        // The scope waits for the jobs' threads.
    });
}

/// Removes what a process that was killed at the end of a job left.
fn tidy(service: &Service) {
    let every = Query { parent: "", after: None, limit: usize::MAX, order: Order::Ascending };
    match service.store.list(&every, |job: &Job| job.status.is_final()) {
        Ok(ended) => {
            for job in ended.records {
                report(&job.id, ending::tidy(service, &job.id));
            }
        }
        Err(error) => tracing::error!("the jobs cannot be read: {error}"),
    }
}

/// Gives threads to the jobs that can go on, the running ones first, then in the order of their making.
fn look<'scope>(
    service: &'scope Service,
    scope: &'scope Scope<'scope, '_>,
    at_work: &mut AtWork<'scope>,
    mut jobs: Vec<Job>,
) {
    jobs.sort_by_key(|job| job.status != JobStatus::Running);
    for job in jobs {
        if at_work.contains_key(&job.id) {
            continue;
        }
        match job.request {
            Some(Request::Cancel) => {
                report(&job.id, ending::cancel(service, &job.id));
                continue;
            }
            // A job is laid down once its files have been checked.
            Some(Request::Pause) if job.status != JobStatus::ValidatingFiles => {
                report(&job.id, ending::lay_down(service, &job.id));
                continue;
            }
            Some(Request::Pause) | None => {}
        }
        let stage = match job.status {
            JobStatus::ValidatingFiles => Stage::Validate,
            JobStatus::Queued | JobStatus::Running => Stage::Train,
            JobStatus::Paused | JobStatus::Succeeded | JobStatus::Failed | JobStatus::Cancelled => {
                continue;
            }
        };
        let limit = match stage {
            Stage::Validate => MAX_VALIDATING,
            Stage::Train => service.config.max_running,
        };
        if at_work.values().filter(|(other, _)| *other == stage).count() >= limit {
            continue;
        }
        let id = job.id.clone();
        let thread = std::thread::Builder::new().name("job".to_owned());
        match thread.spawn_scoped(scope, move || work(service, &job, stage)) {
            Ok(thread) => {
                at_work.insert(id, (stage, thread));
            }
            Err(error) => tracing::error!(job = id, "no thread can be had: {error}"),
        }
    }
}

/// Does what there is to do about a job. Whatever goes wrong is the job's end, not the server's.
fn work(service: &Service, job: &Job, stage: Stage) {
    let done = catch_unwind(AssertUnwindSafe(|| match stage {
        Stage::Validate => validation::validate(service, job),
        Stage::Train => training::train(service, job),
    }));
    let error = match done {
        Ok(Ok(())) => None,
        // The state cannot be read or written: the job stays what it is and is tried again.
        Ok(Err(JobsError::Store(error))) => {
            tracing::error!(job = job.id, "{error}");
            ending::pause(service, REST);
            None
        }
        Ok(Err(error)) => Some(ending::own_fault(&error)),
        Err(_) => Some(JobError {
            code: "server_error".to_owned(),
            message: "The job failed: the server made a mistake, which its log tells".to_owned(),
            param: None,
        }),
    };
    if let Some(error) = error
        && !service.is_stopping()
    {
        report(&job.id, ending::fail(service, &job.id, &error));
    }
    service.ring();
}

fn report(job: &str, done: Result<(), JobsError>) {
    if let Err(error) = done {
        tracing::error!(job, "{error}");
    }
}
